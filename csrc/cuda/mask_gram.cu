// Mask Gram matrices on CUDA: bit counts on the tensor cores, tables in shared memory.
//
// One block computes one tile of 128 x 128 pairs. Of a symmetric result it computes the tiles on and
// above the diagonal, and writes them twice: neighbouring rows, too, are a sector of memory.
#include "cuda/gram_tile.cuh"

namespace ksm {
namespace {

using Tile = OverlapTile<2, 8>;

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T first, second;
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    mask_gram_kernel(MaskSet x, MaskSet y, bool symmetric, int64_t n, Tables<T> global_tables,
                     bool tables_fit,
                     T* __restrict__ out) {  // (m, l)
  __shared__ Tile::Staging staging;
  const Tables<T> tables =
      cached_tables(global_tables, n, tables_fit, static_cast<T*>(dynamic_shared_memory()));
  const int64_t m = x.count, l = y.count;
  const int64_t row_tiles = (m + Tile::kRows - 1) / Tile::kRows;
  const int64_t column_tiles = (l + Tile::kColumns - 1) / Tile::kColumns;
  for (int64_t k = blockIdx.x; k < row_tiles * column_tiles; k += gridDim.x) {
    const int64_t i0 = k / column_tiles * Tile::kRows, j0 = k % column_tiles * Tile::kColumns;
    if (symmetric && j0 < i0) continue;  // the same for all threads
    const bool mirrored = symmetric && j0 > i0;
    Tile tile;
    tile.count(x, i0, y, j0, n, staging);
    tile.for_each_pair([&](int r, int c, int overlap, int next_overlap) {
      const int64_t i = i0 + r, j = j0 + c;
      if (i >= m || j >= l) return;
      const T value = entry_of(tables, x, i, y, j, overlap);
      T* target = out + i * l + j;
      if (mirrored) out[j * l + i] = value;
      if (j + 1 == l) {
        *target = value;
        return;
      }
      const T next = entry_of(tables, x, i, y, j + 1, next_overlap);
      if (mirrored) out[(j + 1) * l + i] = next;
      if (l % 2 == 0) {
        *reinterpret_cast<Two<T>*>(target) = {value, next};
      } else {
        target[0] = value;
        target[1] = next;
      }
    });
  }
}

}  // namespace

template <typename T>
cudaError_t launch_mask_gram(MaskSet x, MaskSet y, bool symmetric, int64_t n, Tables<T> tables,
                             T* out, cudaStream_t stream) {
  const int64_t tiles = ((x.count + Tile::kRows - 1) / Tile::kRows) *
                        ((y.count + Tile::kColumns - 1) / Tile::kColumns);
  const int64_t bytes = cached_table_bytes(tables, n, sizeof(Tile::Staging));
  return launch(grid_for(tiles, 1), bytes, stream, mask_gram_kernel<T>, x, y, symmetric, n, tables,
                bytes > 0, out);
}

template cudaError_t launch_mask_gram(MaskSet, MaskSet, bool, int64_t, Tables<float>, float*,
                                      cudaStream_t);
template cudaError_t launch_mask_gram(MaskSet, MaskSet, bool, int64_t, Tables<double>, double*,
                                      cudaStream_t);

}  // namespace ksm
