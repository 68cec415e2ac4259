// Packed masks and their Gram matrices on CUDA: bit counts on the tensor cores, tables in shared memory.
//
// One block computes one tile of 128 x 128 pairs. Of a symmetric result it computes the tiles on and
// above the diagonal, and writes them twice: neighbouring rows, too, are a sector of memory. Nearly
// all tiles lie in the result entirely; of these a thread's sizes stay in registers.
#include "cuda/mask_gram_tile.cuh"

namespace ksm {
namespace {

// ---- packing ----------------------------------------------------------------------------------

// One warp per word, two ballots of 32 tasks each.
__global__ void pack_masks_kernel(const uint8_t* __restrict__ masks,  // (m, n)
                                  uint64_t* __restrict__ out,         // (m, words)
                                  int64_t m, int64_t n, int64_t words) {
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  for (int64_t k = first; k < m * words; k += int64_t{gridDim.x} * kWarps) {
    const int64_t i = k / words, j = k % words * kBitsPerWord + lane;
    const uint8_t* row = masks + i * n;
    const unsigned low = __ballot_sync(~0u, j < n && row[j]);
    const unsigned high = __ballot_sync(~0u, j + 32 < n && row[j + 32]);
    if (lane == 0) out[k] = uint64_t{high} << 32 | low;
  }
}

__global__ void mask_sizes_kernel(const uint64_t* __restrict__ masks,  // (m, words)
                                  int32_t* __restrict__ sizes,         // (m)
                                  int64_t m, int64_t words) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = first; i < m; i += int64_t{gridDim.x} * kThreads) {
    int32_t size = 0;
    for (int64_t w = 0; w < words; ++w) size += __popcll(masks[i * words + w]);
    sizes[i] = size;
  }
}

// ---- Gram matrices ----------------------------------------------------------------------------

using Tile = OverlapTile<2, 8>;

// K of a pair from its two sizes together and its overlap.
template <bool kHamming, bool kOverlap, typename T>
__device__ T value_of(const Tables<T>& tables, int sizes, int overlap) {
  if constexpr (!kHamming) return tables.overlap[overlap];
  const T value = tables.hamming[sizes - 2 * overlap];
  if constexpr (!kOverlap) return value;
  return value + tables.overlap[overlap];
}

// Writes a tile that lies in K entirely.
template <bool kHamming, bool kOverlap, typename T>
__device__ void write_whole(const Tile& tile, const Tables<T>& tables, const MaskSet& x, int64_t i0,
                            const MaskSet& y, int64_t j0, bool mirrored, T* out) {
  const int64_t l = y.count, i = i0 + Tile::own_row(), j = j0 + Tile::own_column();
  constexpr int kOwnRows = 4;
  int x_sizes[kOwnRows] = {};
  if constexpr (kHamming) {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) x_sizes[r] = x.sizes[i + 8 * r];
  }
  T* own = out + i * l + j;
  T* column = out + j * l + i;
#pragma unroll
  for (int q = 0; q < 8; ++q, column += 8 * l) {
    T values[2][kOwnRows];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      int y_size = 0;
      if constexpr (kHamming) y_size = y.sizes[j + 8 * q + e];
#pragma unroll
      for (int r = 0; r < kOwnRows; ++r) {
        const int overlap = tile.counts[r / 2][q][r % 2 * 2 + e];
        values[e][r] = value_of<kHamming, kOverlap>(tables, x_sizes[r] + y_size, overlap);
      }
    }
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      T* to = own + 8 * r * l + 8 * q;
      if (l % 2 == 0) {
        *reinterpret_cast<Two<T>*>(to) = {values[0][r], values[1][r]};
      } else {
        to[0] = values[0][r];
        to[1] = values[1][r];
      }
    }
    if (!mirrored) continue;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      column[8 * r] = values[0][r];
      column[l + 8 * r] = values[1][r];
    }
  }
}

template <typename T>
__device__ void write_partial(const Tile& tile, const Tables<T>& tables, const MaskSet& x,
                              int64_t i0, const MaskSet& y, int64_t j0, bool mirrored, T* out) {
  const int64_t m = x.count, l = y.count;
  tile.for_each_pair([&](int r, int c, int overlap, int next_overlap) {
    const int64_t i = i0 + r, j = j0 + c;
    const auto write = [&](int64_t column, int count) {
      if (i >= m || column >= l) return;
      const T value = entry_of(tables, x, i, y, column, count);
      out[i * l + column] = value;
      if (mirrored) out[column * l + i] = value;
    };
    write(j, overlap);
    write(j + 1, next_overlap);
  });
}

template <bool kFit, typename T>
__global__ void __launch_bounds__(kThreads, kFit && sizeof(T) == 4 ? 2 : 1)
    mask_gram_kernel(MaskSet x, MaskSet y, bool symmetric, int64_t n, Tables<T> global_tables,
                     T* __restrict__ out) {  // (m, l)
  __shared__ Tile::Staging staging;
  const Tables<T> tables = cached_tables<kFit>(global_tables, n);
  const int64_t m = x.count, l = y.count;
  const int64_t row_tiles = (m + Tile::kRows - 1) / Tile::kRows;
  const int64_t column_tiles = (l + Tile::kColumns - 1) / Tile::kColumns;
  for (int64_t k = blockIdx.x; k < row_tiles * column_tiles; k += gridDim.x) {
    const int64_t i0 = k / column_tiles * Tile::kRows, j0 = k % column_tiles * Tile::kColumns;
    if (symmetric && j0 < i0) continue;  // the same for all threads
    const bool mirrored = symmetric && j0 > i0;
    Tile tile;
    tile.count(x, i0, y, j0, n, staging);
    if (i0 + Tile::kRows > m || j0 + Tile::kColumns > l) {
      write_partial(tile, tables, x, i0, y, j0, mirrored, out);
    } else if (!tables.hamming) {
      write_whole<false, true>(tile, tables, x, i0, y, j0, mirrored, out);
    } else if (!tables.overlap) {
      write_whole<true, false>(tile, tables, x, i0, y, j0, mirrored, out);
    } else {
      write_whole<true, true>(tile, tables, x, i0, y, j0, mirrored, out);
    }
  }
}

}  // namespace

cudaError_t launch_pack_masks(const uint8_t* masks, int64_t m, int64_t n, uint64_t* out,
                              cudaStream_t stream) {
  const int64_t words = words_of(n);
  return launch(grid_for(m * words, kWarps), 0, stream, pack_masks_kernel, masks, out, m, n, words);
}

cudaError_t launch_mask_sizes(const uint64_t* masks, int64_t m, int64_t words, int32_t* sizes,
                              cudaStream_t stream) {
  return launch_threads(m, stream, mask_sizes_kernel, masks, sizes, m, words);
}

template <typename T>
cudaError_t launch_mask_gram(MaskSet x, MaskSet y, bool symmetric, int64_t n, Tables<T> tables,
                             T* out, cudaStream_t stream) {
  const int64_t tiles = ((x.count + Tile::kRows - 1) / Tile::kRows) *
                        ((y.count + Tile::kColumns - 1) / Tile::kColumns);
  const int64_t bytes = cached_table_bytes(tables, n, sizeof(Tile::Staging));
  const auto kernel = bytes > 0 ? mask_gram_kernel<true, T> : mask_gram_kernel<false, T>;
  return launch(grid_for(tiles, 1), bytes, stream, kernel, x, y, symmetric, n, tables, out);
}

template cudaError_t launch_mask_gram(MaskSet, MaskSet, bool, int64_t, Tables<float>, float*,
                                      cudaStream_t);
template cudaError_t launch_mask_gram(MaskSet, MaskSet, bool, int64_t, Tables<double>, double*,
                                      cudaStream_t);

}  // namespace ksm
