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

// Neighbours that are stored at once.
template <typename T>
struct alignas(16) Sixteen {
  T values[16 / sizeof(T)];
};

// Eight columns of a warp's rows, for their mirror image; padded, so that what a warp writes at once
// lies in different banks.
template <typename T>
struct alignas(16) MirroredColumns {
  static constexpr int kRows = kMmaRows * 2, kAtOnce = 16 / sizeof(T), kLanes = kRows / kAtOnce;
  T values[kMmaColumns][kRows + 4];

  __device__ void set(int column, const T (&rows)[4]) {
    const int group = threadIdx.x % 32 / 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) values[column][group + 8 * r] = rows[r];
  }
  // Writes them as rows, l apart.
  __device__ void write(T* out, int64_t l) const {
    const int lane = threadIdx.x % 32;
    constexpr int kColumnsAtOnce = 32 / kLanes;
    const int c = lane / kLanes, row = lane % kLanes * kAtOnce;
    out += c * l + row;
#pragma unroll
    for (int n = 0; n < kMmaColumns; n += kColumnsAtOnce, out += kColumnsAtOnce * l) {
      *reinterpret_cast<Sixteen<T>*>(out) =
          *reinterpret_cast<const Sixteen<T>*>(&values[c + n][row]);
    }
  }
};

// Where masks are staged, and then what is mirrored.
template <typename T>
union SharedTile {
  Tile::Staging staging;
  MirroredColumns<T> mirrored[kWarps];
};

constexpr int kOwnRows = 4, kOwnColumns = 8;  // of a thread: pairs of columns

// Writes a tile that lies in K entirely, where rows are aligned.
template <bool kHamming, bool kOverlap, typename T>
__device__ void write_whole(const Tile& tile, const Tables<T>& tables, const MaskSet& x, int64_t i0,
                            const MaskSet& y, int64_t j0, bool mirrored, SharedTile<T>& shared,
                            T* out) {
  const int64_t l = y.count, i = i0 + Tile::own_row(), j = j0 + Tile::own_column();
  const int lane = threadIdx.x % 32;
  using Row = RowValues<kHamming, kOverlap, T>;
  int x_sizes[kOwnRows] = {};
  Two<int32_t> y_sizes[kOwnColumns] = {};
  if constexpr (kHamming) {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) x_sizes[r] = x.sizes[i + 8 * r];
#pragma unroll
    for (int q = 0; q < kOwnColumns; ++q) {
      y_sizes[q] = *reinterpret_cast<const Two<int32_t>*>(y.sizes + j + 8 * q);
    }
  }
  if (mirrored) __syncthreads();  // the masks that are staged have been read
  MirroredColumns<T>& columns = shared.mirrored[threadIdx.x / 32];
  T* own = out + i * l + j;
  T* mirror = out + (j - lane % 4 * 2) * l + (i - lane / 4);
  const int64_t apart = 8 * l;  // of a thread's rows, and of its columns' mirror images
#pragma unroll
  for (int q = 0; q < kOwnColumns; ++q, own += 8, mirror += apart) {
    T values[2][kOwnRows];
    T* to = own;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r, to += apart) {
      const int* overlaps = tile.counts[r / 2][q] + r % 2 * 2;
      const Row row(tables, x_sizes[r]);
      values[0][r] = row.of(y_sizes[q].first, overlaps[0]);
      values[1][r] = row.of(y_sizes[q].second, overlaps[1]);
      *reinterpret_cast<Two<T>*>(to) = {values[0][r], values[1][r]};
    }
    if (!mirrored) continue;
    __syncwarp();  // the columns before have been written
    columns.set(lane % 4 * 2, values[0]);
    columns.set(lane % 4 * 2 + 1, values[1]);
    __syncwarp();
    columns.write(mirror, l);
  }
}

// Writes what lies in K.
template <typename T>
__device__ void write_partial(const Tile& tile, const Tables<T>& tables, const MaskSet& x,
                              int64_t i0, const MaskSet& y, int64_t j0, bool mirrored, T* out) {
  const int64_t l = y.count, i = i0 + Tile::own_row(), j = j0 + Tile::own_column();
  int64_t x_sizes[kOwnRows];
#pragma unroll
  for (int r = 0; r < kOwnRows; ++r) {
    x_sizes[r] = tables.hamming && i + 8 * r < x.count ? x.sizes[i + 8 * r] : 0;
  }
#pragma unroll
  for (int c = 0; c < 2 * kOwnColumns; ++c) {
    const int64_t column = j + c / 2 * 8 + c % 2;
    if (column >= l) continue;
    const int64_t y_size = tables.hamming ? y.sizes[column] : 0;
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      const int64_t row = i + 8 * r;
      if (row >= x.count) continue;
      const int overlap = tile.counts[r / 2][c / 2][r % 2 * 2 + c % 2];
      const T value = entry_of(tables, x_sizes[r], y_size, int64_t{overlap});
      out[row * l + column] = value;
      if (mirrored) out[column * l + row] = value;
    }
  }
}

template <bool kFit, typename T>
__global__ void __launch_bounds__(kThreads, kFit && sizeof(T) == 4 ? 2 : 1)
    mask_gram_kernel(MaskSet x, MaskSet y, bool symmetric, int64_t n, Tables<T> global_tables,
                     T* __restrict__ out) {  // (m, l)
  __shared__ SharedTile<T> shared;
  const Tables<T> tables = cached_tables<kFit>(global_tables, n);
  const int64_t m = x.count, l = y.count;
  // No memory holds 2^32 tiles.
  const auto column_tiles = static_cast<uint32_t>(divide_up(l, Tile::kColumns));
  const uint32_t tiles = static_cast<uint32_t>(divide_up(m, Tile::kRows)) * column_tiles;
  for (uint32_t k = blockIdx.x; k < tiles; k += gridDim.x) {
    const int64_t i0 = int64_t{k / column_tiles} * Tile::kRows;
    const int64_t j0 = int64_t{k % column_tiles} * Tile::kColumns;
    if (symmetric && j0 < i0) continue;  // the same for all threads
    const bool mirrored = symmetric && j0 > i0;
    Tile tile;
    tile.count(x, i0, y, j0, n, shared.staging);
    const bool aligned = l % MirroredColumns<T>::kAtOnce == 0;
    if (!aligned || i0 + Tile::kRows > m || j0 + Tile::kColumns > l) {
      write_partial(tile, tables, x, i0, y, j0, mirrored, out);
    } else {
      by_tables(tables, [&](auto hamming, auto overlap) {
        write_whole<hamming.value, overlap.value>(tile, tables, x, i0, y, j0, mirrored, shared,
                                                  out);
      });
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
  const int64_t bytes = cached_table_bytes(tables, n, sizeof(SharedTile<T>));
  const auto kernel = bytes > 0 ? mask_gram_kernel<true, T> : mask_gram_kernel<false, T>;
  const cudaError_t status = allow_shared_memory(kernel, bytes);
  if (status != cudaSuccess) return status;
  return launch(grid_for(tiles, 1), bytes, stream, kernel, x, y, symmetric, n, tables, out);
}

template cudaError_t launch_mask_gram(MaskSet, MaskSet, bool, int64_t, Tables<float>, float*,
                                      cudaStream_t);
template cudaError_t launch_mask_gram(MaskSet, MaskSet, bool, int64_t, Tables<double>, double*,
                                      cudaStream_t);

}  // namespace ksm
