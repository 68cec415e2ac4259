// A Gram matrix of packed masks times v on CUDA: each 64 x 64 tile of K lives in shared memory only.
//
// A block owns 64 rows, 8 or 16 targets and a range of columns, which it visits in order; a thread
// multiplies a row by every target for a quarter of the columns. The quarters' sums are added in
// order, those of the ranges by a second kernel. No atomics: the result is the same in every run.
//
// What fills a tile is a class `Source`: `Value`, `Staging` (shared memory of its own), `rows()`,
// `columns()`, `prepare()`, and fill(i0, j0, staging, gram), where gram[c][r] becomes
// K[i0 + r, j0 + c], or zero beyond the sets; all threads call these, and `fill` passes a barrier before
// it writes.
#pragma once

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "cuda/mask_gram_launch.h"

namespace ksm {

constexpr int kProductTile = 64;  // rows, and columns, of a tile

constexpr int kFewTargets = 8, kMostTargets = 16;  // columns of v per block
constexpr int kParts = kThreads / kProductTile;    // of the columns of a tile
constexpr int kPartColumns = kProductTile / kParts;
// Rows of K^T are padded from 64 to 68: the 4 columns x 8 rows that a warp writes at once lie in
// different banks.
constexpr int kGramStride = kProductTile + 4;

template <typename T>
using GramTile = T[kProductTile][kGramStride];  // transposed

template <typename Source, int kTargets>
struct Shared {
  typename Source::Staging staging;
  alignas(16) GramTile<typename Source::Value> gram;
  alignas(16) typename Source::Value v[kProductTile][kTargets];
};

// The targets of a block: eight at most leave no half of it idle.
constexpr int targets_of(int64_t t) { return t <= kFewTargets ? kFewTargets : kMostTargets; }

struct Work {
  int64_t row_tiles, target_tiles, splits, column_tiles_per_split;

  __host__ __device__ int64_t blocks() const { return row_tiles * target_tiles * splits; }
};

inline Work work_of(int64_t m, int64_t l, int64_t t) {
  constexpr int64_t kEnoughBlocks = 1024;    // several per multiprocessor of any GPU
  constexpr int64_t kFewestColumnTiles = 8;  // below this a block's start and end dominate
  Work work;
  work.row_tiles = (m + kProductTile - 1) / kProductTile;
  work.target_tiles = divide_up(t, targets_of(t));
  const int64_t column_tiles = (l + kProductTile - 1) / kProductTile;
  const int64_t wanted = kEnoughBlocks / (work.row_tiles * work.target_tiles);
  work.splits = std::max<int64_t>(1, std::min(wanted, column_tiles / kFewestColumnTiles));
  work.column_tiles_per_split = (column_tiles + work.splits - 1) / work.splits;
  return work;
}

template <typename Source, int kTargets>
__global__ void __launch_bounds__(kThreads, 2)
    partial_products_kernel(Source source,
                            const typename Source::Value* __restrict__ v,  // (l, t)
                            int64_t t, Work work,
                            double* __restrict__ partials) {  // (splits, m, t)
  using T = typename Source::Value;
  __shared__ Shared<Source, kTargets> shared;
  source.prepare();
  const int64_t m = source.rows(), l = source.columns();
  const int r = threadIdx.x % kProductTile, part = threadIdx.x / kProductTile;
  for (int64_t k = blockIdx.x; k < work.blocks(); k += gridDim.x) {
    const int64_t i0 = k % work.row_tiles * kProductTile;
    const int64_t c0 = k / work.row_tiles % work.target_tiles * kTargets;
    const int64_t split = k / work.row_tiles / work.target_tiles;
    const int64_t begin = split * work.column_tiles_per_split * kProductTile;
    const int64_t end = std::min(begin + work.column_tiles_per_split * kProductTile, l);
    double totals[kTargets] = {};
    for (int64_t j0 = begin; j0 < end; j0 += kProductTile) {
      source.fill(i0, j0, shared.staging, shared.gram);
      constexpr int kApart = kThreads / kTargets;  // rows of v
      const int target = threadIdx.x % kTargets, first_row = threadIdx.x / kTargets;
      const T* from = v + (j0 + first_row) * t + c0 + target;
#pragma unroll
      for (int n = 0; n < kProductTile; n += kApart, from += kApart * t) {
        const bool held = j0 + first_row + n < l && c0 + target < t;
        shared.v[first_row + n][target] = held ? *from : T(0);
      }
      __syncthreads();
#pragma unroll
      for (int first = 0; first < kTargets; first += kFewTargets) {
        T sums[kFewTargets] = {};
#pragma unroll 8
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
    auto* parts = reinterpret_cast<double (*)[kAtOnce][kProductTile]>(shared.gram);
    static_assert(sizeof(shared.gram) >= (kParts - 1) * kAtOnce * kProductTile * sizeof(double));
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

template <int kTargets, typename Source>
cudaError_t launch_partials(const Source& source, int64_t dynamic_bytes,
                            const typename Source::Value* v, int64_t t, Work work, double* partials,
                            cudaStream_t stream) {
  const auto kernel = partial_products_kernel<Source, kTargets>;
  const cudaError_t status = allow_shared_memory(kernel, dynamic_bytes);
  if (status != cudaSuccess) return status;
  return launch(grid_for(work.blocks(), 1), dynamic_bytes, stream, kernel, source, v, t, work,
                partials);
}

// The source may use `dynamic_bytes` of dynamic shared memory; see num_column_splits for the partials.
template <typename Source, typename T>
cudaError_t launch_products(const Source& source, int64_t dynamic_bytes,
                            const T* v,  // (l, t)
                            int64_t t,
                            double* partials,  // (splits, m, t)
                            T* out,            // (m, t)
                            cudaStream_t stream) {
  const Work work = work_of(source.rows(), source.columns(), t);
  const cudaError_t status =
      targets_of(t) == kMostTargets
          ? launch_partials<kMostTargets>(source, dynamic_bytes, v, t, work, partials, stream)
          : launch_partials<kFewTargets>(source, dynamic_bytes, v, t, work, partials, stream);
  if (status != cudaSuccess) return status;
  const int64_t size = source.rows() * t;
  return launch_threads(size, stream, sum_splits_kernel<T>, partials, work.splits, size, out);
}

}  // namespace ksm
