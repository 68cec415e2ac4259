// Products in float32 on the tensor cores: Gram matrices G[a] = X_a^T diag(w_a) Y_a of every task at
// once, and products X Y^T of rows.
//
// Columns of the first, rows of the second are scaled by powers of two to at most 2^15. A value is then the sum of two float16, high +
// low, to 2^-24 of itself (or 2^-39 of its column's largest), and a product is high high + high low +
// low high: as exact as in float32. A column that holds a value that is not finite spoils its own
// row and column of G alone, and with NaN rather than infinities.
//
// A block of threads owns a tile of one G and a split of its samples, in their order. The first
// split is written or added to G, the others are partial sums that a second kernel adds in order.
#include "cuda/block_sum.cuh"
#include "cuda/gram_launch.h"
#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "cuda/neighbours.cuh"
#include "cuda/warp_sums.cuh"

namespace ksm {
namespace {

constexpr int kSide = 128;  // of a tile of G
constexpr int kDepth = 32;  // samples in shared memory at once
constexpr int kPairs = kDepth / 2;
constexpr int kMmaPairs = 8;
constexpr int kRowMmas = 4, kColumnMmas = 4;
using Accumulator = WarpSums<kRowMmas, kColumnMmas, 4>;
static_assert(Accumulator::kRows == kSide && Accumulator::kColumns == kSide);
// Padded: the pairs q and columns g that a warp reads at once lie in 32 different banks.
constexpr int kStride = kSide + 8;
// A thread stages four columns of so many samples.
constexpr int kSamples = kDepth * kSide / 4 / kThreads;
static_assert(kSamples == 4 && kSide == 4 * 32, "a warp stages whole samples");

// ---- scales ----------------------------------------------------------------------------------

__device__ float weighted_value(const WeightedColumns& x, int64_t sample, int64_t column) {
  const float value = x.values[sample * x.columns + column];
  return x.weights ? x.weights[sample] * value : value;
}

// largest[c, j] = max |value| of column j in chunk c of the samples. A NaN is not seen.
__global__ void __launch_bounds__(kThreads)
    column_largest_kernel(WeightedColumns x, int64_t samples, int64_t chunks,
                          float* __restrict__ largest) {  // (chunks, columns)
  const int64_t tiles = divide_up(x.columns, kThreads), length = divide_up(samples, chunks);
  for (int64_t item = blockIdx.x; item < tiles * chunks; item += gridDim.x) {
    const int64_t column = item % tiles * kThreads + threadIdx.x, chunk = item / tiles;
    if (column >= x.columns) continue;
    const int64_t end = (chunk + 1) * length < samples ? (chunk + 1) * length : samples;
    float most = 0;
    for (int64_t sample = chunk * length; sample < end; ++sample) {
      const float value = weighted_value(x, sample, column);
      const float size = value < 0 ? -value : value;
      most = size > most ? size : most;
    }
    largest[chunk * x.columns + column] = most;
  }
}

// A power of two that takes `largest` to 2^14 .. 2^15: 1 where there is none, and for the smallest
// numbers the largest that has an inverse.
__device__ float scale_for(float largest) {
  uint32_t bits;
  memcpy(&bits, &largest, sizeof(bits));
  const int exponent = static_cast<int>(bits >> 23) - 127;
  if (largest == 0 || exponent == 128) return 1.0f;
  const int shift = 14 - exponent < 126 ? 14 - exponent : 126;
  const uint32_t scale_bits = static_cast<uint32_t>(shift + 127) << 23;
  float scale;
  memcpy(&scale, &scale_bits, sizeof(scale));
  return scale;
}

// Exact: of a power of two, the exponent changes its sign.
__device__ float inverse_of(float scale) {
  uint32_t bits;
  memcpy(&bits, &scale, sizeof(bits));
  bits = 0x7F000000 - bits;
  memcpy(&scale, &bits, sizeof(scale));
  return scale;
}

__global__ void __launch_bounds__(kThreads)
    column_scales_kernel(const float* __restrict__ largest,  // (chunks, columns)
                         int64_t chunks, int64_t columns,
                         float* __restrict__ scales) {  // (columns)
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t column = first; column < columns; column += int64_t{gridDim.x} * kThreads) {
    float most = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const float other = largest[chunk * columns + column];
      most = other > most ? other : most;
    }
    scales[column] = scale_for(most);
  }
}

// ---- products --------------------------------------------------------------------------------

// Pairs of neighbouring samples of kSide columns, as float16.
struct alignas(16) Staged {
  uint32_t high[kPairs][kStride], low[kPairs][kStride];
};

// What a thread stages of one side. Values are worked on when they are stored: until then, products
// of those before go on.
class Share {
 public:
  __device__ Share(const WeightedColumns& x, int64_t column, bool wide)
      : x_(x), column_(column + threadIdx.x % 32 * 4), wide_(wide) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      scales_[c] = column_ + c < x.columns ? x.scales[column_ + c] : 0.0f;
    }
  }

  // Of the samples `begin` to `end`; zero beyond.
  __device__ void load(int64_t begin, int64_t end) {
    const int64_t own = begin + threadIdx.x / 32 * kSamples, left = end - own;
    const int samples = static_cast<int>(left < kSamples ? left : kSamples);
    const ThreadRows<float, kSamples> rows = {x_.values + own * x_.columns, x_.columns, x_.columns,
                                              samples, wide_};
    rows.load_at(column_, values_);
    if (!x_.weights) return;
#pragma unroll
    for (int s = 0; s < kSamples; ++s) weights_[s] = s < samples ? x_.weights[own + s] : 0.0f;
  }

  __device__ void store(Staged& staged) const {
    const int own = static_cast<int>(threadIdx.x % 32) * 4;
#pragma unroll
    for (int p = 0; p < kSamples / 2; ++p) {
      Four<float> high, low;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float first = scaled(2 * p, c), second = scaled(2 * p + 1, c);
        high.words[c] = pack_halves(first, second);
        low.words[c] = pack_halves(first - half_value(high.words[c]),
                                   second - half_value(high.words[c] >> 16));
      }
      const int pair = static_cast<int>(threadIdx.x) / 32 * (kSamples / 2) + p;
      *reinterpret_cast<Four<float>*>(&staged.high[pair][own]) = high;
      *reinterpret_cast<Four<float>*>(&staged.low[pair][own]) = low;
    }
  }

 private:
  __device__ float scaled(int sample, int c) const {
    const float value = values_[sample][c];
    return (x_.weights ? weights_[sample] * value : value) * scales_[c];
  }

  const WeightedColumns& x_;
  const int64_t column_;
  const bool wide_;
  float scales_[4], weights_[kSamples];
  Four<float> values_[kSamples];
};

__device__ void multiply(Accumulator& to, const uint32_t (&a)[kPairs][kStride],
                         const uint32_t (&b)[kPairs][kStride], int step) {
  const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, q = lane % 4;
  const int pair = step * kMmaPairs + q;
  uint32_t right[kColumnMmas][2];
#pragma unroll
  for (int c = 0; c < kColumnMmas; ++c) {
    const int column = to.first_column() + c * Accumulator::kMmaColumns + g;
    right[c][0] = b[pair][column];
    right[c][1] = b[pair + 4][column];
  }
#pragma unroll
  for (int p = 0; p < kRowMmas; ++p) {
    const int row = to.first_row() + p * Accumulator::kMmaRows + g;
    const uint32_t left[4] = {a[pair][row], a[pair][row + 8], a[pair + 4][row],
                              a[pair + 4][row + 8]};
#pragma unroll
    for (int c = 0; c < kColumnMmas; ++c) mma_float16(to.sums[p][c], left, right[c]);
  }
}

// to += A^T B of what is staged.
__device__ void multiply(Accumulator& to, const Staged& a, const Staged& b) {
#pragma unroll
  for (int step = 0; step < kPairs / kMmaPairs; ++step) {
    multiply(to, a.low, b.high, step);
    multiply(to, a.high, b.low, step);
    multiply(to, a.high, b.high, step);
  }
}

__global__ void __launch_bounds__(kThreads)
    tensor_gram_kernel(GramProblem problem, bool x_wide, bool y_wide, float* __restrict__ partials,
                       float* __restrict__ out) {
  __shared__ Staged a, b;
  const int64_t k = problem.x.columns, t = problem.y.columns, splits = problem.splits;
  const int64_t column_tiles = divide_up(t, kSide), tiles = divide_up(k, kSide) * column_tiles;
  for (int64_t item = blockIdx.x; item < problem.tasks * splits * tiles; item += gridDim.x) {
    const int64_t i0 = item % tiles / column_tiles * kSide, j0 = item % column_tiles * kSide;
    if (problem.symmetric && j0 < i0) continue;  // the same for all threads
    const int64_t split = item / tiles % splits, task = item / tiles / splits;
    const int64_t first = problem.offsets[task], last = problem.offsets[task + 1];
    const int64_t length = divide_up(divide_up(last - first, splits), kDepth) * kDepth;
    const int64_t begin = first + split * length;
    const int64_t end = begin + length < last ? begin + length : last;
    Share left(problem.x, i0, x_wide), right(problem.y, j0, y_wide);
    const auto load = [&](int64_t sample) {
      left.load(sample, end);
      right.load(sample, end);
    };
    Accumulator totals;
    load(begin);
    for (int64_t sample = begin; sample < end; sample += kDepth) {
      __syncthreads();  // what was staged before has been read
      left.store(a);
      right.store(b);
      __syncthreads();
      if (sample + kDepth < end) load(sample + kDepth);  // arrives in the meantime
      Accumulator sums;  // for itself, and added with rounding to nearest
      multiply(sums, a, b);
      totals += sums;
    }
    float* target = (split ? partials + (split - 1) * problem.tasks * k * t : out) + task * k * t;
    const bool add = problem.accumulate && split == 0;
    totals.for_each([&](int r, int c, float scaled) {
      const int64_t i = i0 + r, j = j0 + c;
      if (i >= k || j >= t) return;
      const float sum =
          scaled * (inverse_of(problem.x.scales[i]) * inverse_of(problem.y.scales[j]));
      target[i * t + j] = add ? target[i * t + j] + sum : sum;
    });
  }
}

__global__ void __launch_bounds__(kThreads)
    add_splits_kernel(GramProblem problem, const float* __restrict__ partials,
                      float* __restrict__ out) {
  const int64_t k = problem.x.columns, t = problem.y.columns, size = problem.tasks * k * t;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t e = first; e < size; e += int64_t{gridDim.x} * kThreads) {
    if (problem.symmetric && e % t / kSide < e / t % k / kSide) continue;  // below the diagonal
    float sum = out[e];
    for (int64_t split = 1; split < problem.splits; ++split) {
      sum += partials[(split - 1) * size + e];
    }
    out[e] = sum;
  }
}

// ---- products of rows ------------------------------------------------------------------------

__global__ void __launch_bounds__(kThreads)
    row_scales_kernel(const float* __restrict__ x,  // (m, n)
                      int64_t m, int64_t n,
                      float* __restrict__ scales) {  // (m)
  for (int64_t i = blockIdx.x; i < m; i += gridDim.x) {
    float most = 0;
    for (int64_t d = threadIdx.x; d < n; d += kThreads) {
      const float value = x[i * n + d], size = value < 0 ? -value : value;
      most = size > most ? size : most;
    }
    const float largest = block_largest<kThreads>(most);
    if (threadIdx.x == 0) scales[i] = scale_for(largest);
  }
}

// Pairs of neighbouring coordinates of kSide rows, as float16. Padded: the rows that a warp reads at
// once lie in 32 different banks.
struct alignas(16) StagedRows {
  uint32_t high[kSide][kPairs + 4], low[kSide][kPairs + 4];
};

// What a thread stages of one side: four coordinates of kOwnRows rows that are kApart apart.
class RowShare {
 public:
  __device__ RowShare(const ScaledRows& x, int64_t i0, int64_t n, bool wide) {
    const int64_t own = i0 + own_row(), left = divide_up(x.rows - own, kApart);
    const int rows = static_cast<int>(left < kOwnRows ? left : kOwnRows);
    rows_ = {x.values + own * n, kApart * n, n, rows, wide};
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) scales_[r] = r < rows ? x.scales[own + r * kApart] : 0.0f;
  }

  __device__ void load(int64_t first) { rows_.load_at(first + own_quad() * 4, values_); }

  __device__ void store(StagedRows& staged) const {
#pragma unroll
    for (int r = 0; r < kOwnRows; ++r) {
      uint32_t high[2], low[2];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const float first = values_[r][2 * p] * scales_[r];
        const float second = values_[r][2 * p + 1] * scales_[r];
        high[p] = pack_halves(first, second);
        low[p] = pack_halves(first - half_value(high[p]), second - half_value(high[p] >> 16));
      }
      const int row = own_row() + r * kApart, pair = own_quad() * 2;
      *reinterpret_cast<Two<uint32_t>*>(&staged.high[row][pair]) = {high[0], high[1]};
      *reinterpret_cast<Two<uint32_t>*>(&staged.low[row][pair]) = {low[0], low[1]};
    }
  }

 private:
  static constexpr int kQuads = kDepth / 4, kApart = kThreads / kQuads, kOwnRows = kSide / kApart;

  static __device__ int own_row() { return static_cast<int>(threadIdx.x) / kQuads; }
  static __device__ int own_quad() { return static_cast<int>(threadIdx.x) % kQuads; }

  ThreadRows<float, kOwnRows> rows_;
  float scales_[kOwnRows];
  Four<float> values_[kOwnRows];
};

__device__ void multiply_rows(Accumulator& to, const uint32_t (&a)[kSide][kPairs + 4],
                              const uint32_t (&b)[kSide][kPairs + 4], int step) {
  const int lane = static_cast<int>(threadIdx.x % 32), word = step * kMmaPairs;
  uint32_t right[kColumnMmas][2];
#pragma unroll
  for (int c = 0; c < kColumnMmas; c += 2) {  // of two products at once
    const int row = to.first_column() + c * Accumulator::kMmaColumns + lane / 16 * 8 + lane % 8;
    uint32_t both[4];
    load_matrices(both, &b[row][word + lane / 8 % 2 * 4]);
    right[c][0] = both[0], right[c][1] = both[1];
    right[c + 1][0] = both[2], right[c + 1][1] = both[3];
  }
#pragma unroll
  for (int p = 0; p < kRowMmas; ++p) {
    uint32_t left[4];
    const int row = to.first_row() + p * Accumulator::kMmaRows + lane % 16;
    load_matrices(left, &a[row][word + lane / 16 * 4]);
#pragma unroll
    for (int c = 0; c < kColumnMmas; ++c) mma_float16(to.sums[p][c], left, right[c]);
  }
}

__global__ void __launch_bounds__(kThreads)
    row_products_kernel(ScaledRows x, ScaledRows y, int64_t n, bool symmetric, bool wide,
                        float* __restrict__ out) {  // (x.rows, y.rows)
  __shared__ StagedRows a, b;
  const int64_t m = x.rows, l = y.rows;
  const int64_t column_tiles = divide_up(l, kSide), tiles = divide_up(m, kSide) * column_tiles;
  for (int64_t item = blockIdx.x; item < tiles; item += gridDim.x) {
    const int64_t i0 = item / column_tiles * kSide, j0 = item % column_tiles * kSide;
    if (symmetric && j0 < i0) continue;  // the same for all threads
    RowShare left(x, i0, n, wide), right(y, j0, n, wide);
    Accumulator totals;
    left.load(0);
    right.load(0);
    for (int64_t first = 0; first < n; first += kDepth) {
      __syncthreads();  // what was staged before has been read
      left.store(a);
      right.store(b);
      __syncthreads();
      left.load(first + kDepth);  // arrives in the meantime
      right.load(first + kDepth);
      Accumulator sums;  // for itself, and added with rounding to nearest
#pragma unroll
      for (int step = 0; step < kPairs / kMmaPairs; ++step) {
        multiply_rows(sums, a.low, b.high, step);
        multiply_rows(sums, a.high, b.low, step);
        multiply_rows(sums, a.high, b.high, step);
      }
      totals += sums;
    }
    totals.for_each([&](int r, int c, float scaled) {
      const int64_t i = i0 + r, j = j0 + c;
      if (i >= m || j >= l) return;
      out[i * l + j] = scaled * (inverse_of(x.scales[i]) * inverse_of(y.scales[j]));
    });
  }
}

}  // namespace

int64_t gram_splits(int64_t tasks, int64_t samples, int64_t k, int64_t t) {
  constexpr int64_t kEnoughBlocks = 1024, kFewestSamples = 512;
  const int64_t blocks = tasks * divide_up(k, kSide) * divide_up(t, kSide);
  return std::clamp<int64_t>(samples / tasks / kFewestSamples, 1, divide_up(kEnoughBlocks, blocks));
}

int64_t scale_chunks(int64_t samples, int64_t columns) {
  constexpr int64_t kEnoughBlocks = 1024, kFewestSamples = 64;
  return std::clamp<int64_t>(samples / kFewestSamples, 1,
                             divide_up(kEnoughBlocks, divide_up(columns, kThreads)));
}

cudaError_t launch_column_scales(const WeightedColumns& x, int64_t samples, float* largest,
                                 float* scales, cudaStream_t stream) {
  const int64_t chunks = scale_chunks(samples, x.columns);
  const cudaError_t status = launch_over(chunks * divide_up(x.columns, kThreads), stream,
                                         column_largest_kernel, x, samples, chunks, largest);
  if (status != cudaSuccess) return status;
  return launch_threads(x.columns, stream, column_scales_kernel, static_cast<const float*>(largest),
                        chunks, x.columns, scales);
}

bool row_products_fill(int64_t m, int64_t l) {
  constexpr int64_t kEnoughBlocks = 128;
  return divide_up(m, kSide) * divide_up(l, kSide) >= kEnoughBlocks;
}

cudaError_t launch_row_scales(const float* x, int64_t m, int64_t n, float* scales,
                              cudaStream_t stream) {
  return launch_over(m, stream, row_scales_kernel, x, m, n, scales);
}

cudaError_t launch_row_products(const ScaledRows& x, const ScaledRows& y, int64_t n, bool symmetric,
                                float* out, cudaStream_t stream) {
  return launch_over(divide_up(x.rows, kSide) * divide_up(y.rows, kSide), stream,
                     row_products_kernel, x, y, n, symmetric,
                     is_wide(x.values, n) && is_wide(y.values, n), out);
}

cudaError_t launch_tensor_gram(const GramProblem& problem, float* partials, float* out,
                               cudaStream_t stream) {
  const int64_t k = problem.x.columns, t = problem.y.columns;
  const cudaError_t status =
      launch_over(problem.tasks * problem.splits * divide_up(k, kSide) * divide_up(t, kSide),
                  stream, tensor_gram_kernel, problem, is_wide(problem.x.values, k),
                  is_wide(problem.y.values, t), partials, out);
  if (status != cudaSuccess || problem.splits == 1) return status;
  return launch_threads(problem.tasks * k * t, stream, add_splits_kernel, problem,
                        static_cast<const float*>(partials), out);
}

}  // namespace ksm
