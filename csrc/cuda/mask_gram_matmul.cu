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
  using Staging = Tile::Staging;

  MaskSet x, y;
  int64_t n;
  Tables<T> tables;

  __host__ __device__ int64_t rows() const { return x.count; }
  __host__ __device__ int64_t columns() const { return y.count; }
  __device__ void prepare() { tables = cached_tables<kFit>(tables, n); }

  __device__ void fill(int64_t i0, int64_t j0, Staging& staging, GramTile<T>& gram) const {
    Tile tile;
    tile.count(x, i0, y, j0, n, staging);
    __syncthreads();  // the gram and v of the tile before have been read
    tile.for_each_pair([&](int row, int c, int overlap, int next_overlap) {
      const int64_t i = i0 + row, j = j0 + c;
      // Pairs beyond the sets meet a v of zero, or a row that is not stored.
      const bool first = i < x.count && j < y.count, second = i < x.count && j + 1 < y.count;
      gram[c][row] = first ? entry_of(tables, x, i, y, j, overlap) : T(0);
      gram[c + 1][row] = second ? entry_of(tables, x, i, y, j + 1, next_overlap) : T(0);
    });
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
