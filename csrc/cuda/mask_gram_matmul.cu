// Mask Gram matrix times v on CUDA: each 64 x 64 tile of K lives in shared memory only.
//
// A block owns 64 rows, 8 or 16 targets and a range of columns, which it visits in order; a thread
// multiplies a row by every target for a quarter of the columns. The quarters' sums are added in
// order, those of the ranges by a second kernel. No atomics: the result is the same in every run.
#include "cuda/mask_gram_tile.cuh"

namespace ksm {
namespace {

using Tile = OverlapTile<1, 4>;

constexpr int kFewTargets = 8, kMostTargets = 16;  // columns of v per block
constexpr int kParts = kThreads / Tile::kRows;     // of the columns of a tile
constexpr int kPartColumns = Tile::kColumns / kParts;
// Rows of K^T are padded from 64 to 68: the 4 columns x 8 rows that a warp writes at once lie in
// different banks.
constexpr int kGramStride = Tile::kRows + 4;

template <typename T, int kTargets>
struct Shared {
  Tile::Staging staging;
  T gram[Tile::kColumns][kGramStride];  // transposed
  alignas(16) T v[Tile::kColumns][kTargets];
};

// The targets of a block: eight at most leave no half of it idle.
constexpr int targets_of(int64_t t) { return t <= kFewTargets ? kFewTargets : kMostTargets; }

struct Work {
  int64_t row_tiles, target_tiles, splits, column_tiles_per_split;

  __host__ __device__ int64_t blocks() const { return row_tiles * target_tiles * splits; }
};

Work work_of(int64_t m, int64_t l, int64_t t) {
  constexpr int64_t kEnoughBlocks = 1024;    // several per multiprocessor of any GPU
  constexpr int64_t kFewestColumnTiles = 8;  // below this a block's start and end dominate
  Work work;
  work.row_tiles = (m + Tile::kRows - 1) / Tile::kRows;
  work.target_tiles = divide_up(t, targets_of(t));
  const int64_t column_tiles = (l + Tile::kColumns - 1) / Tile::kColumns;
  const int64_t wanted = kEnoughBlocks / (work.row_tiles * work.target_tiles);
  work.splits = std::max<int64_t>(1, std::min(wanted, column_tiles / kFewestColumnTiles));
  work.column_tiles_per_split = (column_tiles + work.splits - 1) / work.splits;
  return work;
}

template <bool kFit, int kTargets, typename T>
__global__ void __launch_bounds__(kThreads)
    partial_products_kernel(MaskSet x, MaskSet y, int64_t n, Tables<T> global_tables,
                            const T* __restrict__ v,  // (l, t)
                            int64_t t, Work work,
                            double* __restrict__ partials) {  // (splits, m, t)
  __shared__ Shared<T, kTargets> shared;
  const Tables<T> tables = cached_tables<kFit>(global_tables, n);
  const int64_t m = x.count, l = y.count;
  const int r = threadIdx.x % Tile::kRows, part = threadIdx.x / Tile::kRows;
  for (int64_t k = blockIdx.x; k < work.blocks(); k += gridDim.x) {
    const int64_t i0 = k % work.row_tiles * Tile::kRows;
    const int64_t c0 = k / work.row_tiles % work.target_tiles * kTargets;
    const int64_t split = k / work.row_tiles / work.target_tiles;
    const int64_t begin = split * work.column_tiles_per_split * Tile::kColumns;
    const int64_t end = std::min(begin + work.column_tiles_per_split * Tile::kColumns, l);
    double totals[kTargets] = {};
    for (int64_t j0 = begin; j0 < end; j0 += Tile::kColumns) {
      Tile tile;
      tile.count(x, i0, y, j0, n, shared.staging);
      __syncthreads();  // the gram and v of the tile before have been read
      tile.for_each_pair([&](int row, int c, int overlap, int next_overlap) {
        const int64_t i = i0 + row, j = j0 + c;
        // Pairs beyond the sets meet a v of zero, or a row that is not stored.
        const bool first = i < m && j < l, second = i < m && j + 1 < l;
        shared.gram[c][row] = first ? entry_of(tables, x, i, y, j, overlap) : T(0);
        shared.gram[c + 1][row] = second ? entry_of(tables, x, i, y, j + 1, next_overlap) : T(0);
      });
      for (int q = threadIdx.x; q < Tile::kColumns * kTargets; q += kThreads) {
        const int64_t j = j0 + q / kTargets, c = c0 + q % kTargets;
        shared.v[q / kTargets][q % kTargets] = j < l && c < t ? v[j * t + c] : T(0);
      }
      __syncthreads();
#pragma unroll
      for (int first = 0; first < kTargets; first += kFewTargets) {
        T sums[kFewTargets] = {};
#pragma unroll 4
        for (int n = 0; n < kPartColumns; ++n) {  // those beyond the sets are zero
          const int j = part * kPartColumns + n;
          const T g = shared.gram[j][r];
#pragma unroll
          for (int c = 0; c < kFewTargets; ++c) sums[c] = fma(g, shared.v[j][first + c], sums[c]);
        }
#pragma unroll
        for (int c = 0; c < kFewTargets; ++c) totals[first + c] += sums[c];
      }
    }
    constexpr int kAtOnce = kTargets / 4;
    // Of a few targets at once, where K was.
    auto* parts = reinterpret_cast<double (*)[kAtOnce][Tile::kRows]>(shared.gram);
    static_assert(sizeof(shared.gram) >= (kParts - 1) * kAtOnce * Tile::kRows * sizeof(double));
#pragma unroll
    for (int first = 0; first < kTargets; first += kAtOnce) {
      __syncthreads();  // K, or the parts before, have been read
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        if (part > 0) parts[part - 1][c][r] = totals[first + c];
      }
      __syncthreads();
      if (part > 0 || i0 + r >= m) continue;
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const int64_t target = c0 + first + c;
        double sum = totals[first + c];
        for (int other = 0; other < kParts - 1; ++other) sum += parts[other][c][r];
        if (target < t) partials[(split * m + i0 + r) * t + target] = sum;
      }
    }
  }
}

template <typename T>
__global__ void sum_splits_kernel(const double* __restrict__ partials,  // (splits, size)
                                  int64_t splits, int64_t size,
                                  T* __restrict__ out) {  // (size)
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t k = first; k < size; k += int64_t{gridDim.x} * kThreads) {
    double sum = 0;
    for (int64_t s = 0; s < splits; ++s) sum += partials[s * size + k];
    out[k] = static_cast<T>(sum);
  }
}

template <int kTargets, typename T>
cudaError_t launch_partials(MaskSet x, MaskSet y, int64_t n, Tables<T> tables, const T* v,
                            int64_t t, Work work, double* partials, cudaStream_t stream) {
  const int64_t bytes = cached_table_bytes(tables, n, sizeof(Shared<T, kTargets>));
  const auto kernel = bytes > 0 ? partial_products_kernel<true, kTargets, T>
                                : partial_products_kernel<false, kTargets, T>;
  return launch(grid_for(work.blocks(), 1), bytes, stream, kernel, x, y, n, tables, v, t, work,
                partials);
}

}  // namespace

int64_t num_column_splits(int64_t m, int64_t l, int64_t t) { return work_of(m, l, t).splits; }

template <typename T>
cudaError_t launch_mask_gram_matmul(MaskSet x, MaskSet y, int64_t n, Tables<T> tables, const T* v,
                                    int64_t t, double* partials, T* out, cudaStream_t stream) {
  const Work work = work_of(x.count, y.count, t);
  const cudaError_t status =
      targets_of(t) == kMostTargets
          ? launch_partials<kMostTargets>(x, y, n, tables, v, t, work, partials, stream)
          : launch_partials<kFewTargets>(x, y, n, tables, v, t, work, partials, stream);
  if (status != cudaSuccess) return status;
  const int64_t size = x.count * t;
  return launch_threads(size, stream, sum_splits_kernel<T>, partials, work.splits, size, out);
}

template cudaError_t launch_mask_gram_matmul(MaskSet, MaskSet, int64_t, Tables<float>, const float*,
                                             int64_t, double*, float*, cudaStream_t);
template cudaError_t launch_mask_gram_matmul(MaskSet, MaskSet, int64_t, Tables<double>,
                                             const double*, int64_t, double*, double*,
                                             cudaStream_t);

}  // namespace ksm
