// The Gram matrix of two tables times v on CUDA.
#include "cuda/mask_gram_products.cuh"
#include "cuda/mask_gram_tile.cuh"

namespace ksm {
namespace {

using Tile = OverlapTile<1, 4>;
static_assert(Tile::kRows == kProductTile && Tile::kColumns == kProductTile);

// See mask_gram_products.cuh.
template <bool kFit, typename T>
struct TableSource {
  using Value = T;
  struct Staging {};  // masks are staged where K is then

  MaskSet x, y;
  int64_t n;
  Tables<T> tables;

  static __device__ int at_most_tile(int64_t count) {
    return count < kProductTile ? static_cast<int>(count) : kProductTile;
  }
  __host__ __device__ int64_t rows() const { return x.count; }
  __host__ __device__ int64_t columns() const { return y.count; }
  __device__ void prepare() { tables = cached_tables<kFit>(tables, n); }

  __device__ void fill(int64_t i0, int64_t j0, Staging&, GramTile<T>& gram) const {
    static_assert(sizeof(Tile::Staging) <= sizeof(GramTile<T>));
    Tile tile;
    tile.count(x, i0, y, j0, n, reinterpret_cast<Tile::Staging&>(gram));
    __syncthreads();  // the masks have been read
    by_tables(tables, [&](auto hamming, auto overlap) {
      fill_by<hamming.value, overlap.value>(tile, i0, j0, gram);
    });
  }

  template <bool kHamming, bool kOverlap>
  __device__ void fill_by(const Tile& tile, int64_t i0, int64_t j0, GramTile<T>& gram) const {
    using Row = RowValues<kHamming, kOverlap, T>;
    const int row = Tile::own_row(), column = Tile::own_column();
    // From the thread's first pair on.
    const int rows_left = at_most_tile(x.count - i0) - row;
    const int columns_left = at_most_tile(y.count - j0) - column;
    const int32_t *x_sizes = x.sizes + i0 + row, *y_sizes = y.sizes + j0 + column;
    const Row rows[] = {{tables, kHamming && rows_left > 0 ? x_sizes[0] : 0},
                        {tables, kHamming && rows_left > 8 ? x_sizes[8] : 0}};
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const int c = k / 2 * 8 + k % 2;
      const int y_size = kHamming && columns_left > c ? y_sizes[c] : 0;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const T value = rows[r].of(y_size, tile.counts[0][k / 2][2 * r + k % 2]);
        // Beyond the sets, pairs meet a v of zero, or a row that is not stored.
        gram[column + c][row + 8 * r] = columns_left > c ? value : T(0);
      }
    }
  }
};

template <bool kFit, typename T>
cudaError_t launch_of(MaskSet x, MaskSet y, int64_t n, Tables<T> tables, int64_t bytes, const T* v,
                      int64_t t, double* partials, T* out, cudaStream_t stream) {
  return launch_products(TableSource<kFit, T>{x, y, n, tables}, bytes, v, t, partials, out, stream);
}

}  // namespace

int64_t num_column_splits(int64_t m, int64_t l, int64_t t) { return work_of(m, l, t).splits; }

template <typename T>
cudaError_t launch_mask_gram_matmul(MaskSet x, MaskSet y, int64_t n, Tables<T> tables, const T* v,
                                    int64_t t, double* partials, T* out, cudaStream_t stream) {
  using Largest = Shared<TableSource<true, T>, kMostTargets>;
  using Smallest = Shared<TableSource<true, T>, kFewTargets>;
  const bool many = targets_of(t) == kMostTargets;
  const int64_t bytes = cached_table_bytes(tables, n, many ? sizeof(Largest) : sizeof(Smallest));
  const auto launch = bytes > 0 ? launch_of<true, T> : launch_of<false, T>;
  return launch(x, y, n, tables, bytes, v, t, partials, out, stream);
}

template cudaError_t launch_mask_gram_matmul(MaskSet, MaskSet, int64_t, Tables<float>, const float*,
                                             int64_t, double*, float*, cudaStream_t);
template cudaError_t launch_mask_gram_matmul(MaskSet, MaskSet, int64_t, Tables<double>,
                                             const double*, int64_t, double*, double*,
                                             cudaStream_t);

}  // namespace ksm
