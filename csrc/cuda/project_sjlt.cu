// Sparse projections (sjlt) on CUDA: nonzeros are sorted by output, or gathered by coordinate.
#include "cuda/project_kinds.cuh"

namespace ksm {
namespace {

constexpr int kSjltChunk = 2048;     // coordinates that are sorted at once; a power of two
constexpr int64_t kSjltRows = 32;    // they share a sort
constexpr int kSjltAdjointRows = 8;  // they share what is drawn

// In place, ascending, by the whole block (Batcher's bitonic sort). Leaves with a barrier.
__device__ void sort_keys(uint64_t (&keys)[kSjltChunk]) {
  for (int size = 2; size <= kSjltChunk; size *= 2) {
    for (int half = size / 2; half > 0; half /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < kSjltChunk / 2; pair += kThreads) {
        const int low = pair / half * 2 * half + pair % half;
        const bool ascending = (low & size) == 0;
        const uint64_t a = keys[low], b = keys[low + half];
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[low + half] = a;
        }
      }
      __syncthreads();
    }
  }
}

// A block owns a segment of the sums of a few rows in one split. It sorts the nonzeros of a chunk of
// coordinates by output; each output's terms are then added by one thread, in their order.
template <typename From, typename T>
__global__ void __launch_bounds__(kThreads)
    project_sjlt_kernel(Projection projection, T scale, Slab<const From> x, Sums<T> sums) {
  // The output within the segment, the coordinate within the chunk, and the sign in the last bit.
  __shared__ uint64_t keys[kSjltChunk];
  constexpr uint64_t kNone = ~uint64_t{0};
  const auto output_of = [](uint64_t key) { return static_cast<int64_t>(key / (2 * kSjltChunk)); };
  const int64_t k = projection.k, s = projection.sparsity, q = segment_of(projection);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t groups = divide_up(x.rows, kSjltRows);
  for (int64_t item = blockIdx.x; item < s * groups * sums.splits; item += gridDim.x) {
    const int64_t t = item % s, split = item / s / groups;
    const int64_t first_row = item / s % groups * kSjltRows;
    const int64_t rows = x.rows - first_row < kSjltRows ? x.rows - first_row : kSjltRows;
    T* segment = sums.of(split) + first_row * k + t * q;
    for (int64_t e = split ? thread : rows * q; e < rows * q; e += kThreads) {
      segment[e / q * k + e % q] = T(0);
    }
    for (int64_t chunk = sums.begin(split); chunk < sums.end(split); ++chunk) {
      const int64_t first = x.begin + chunk * kSjltChunk;
      __syncthreads();  // the sums and keys of the chunk before are complete
      for (int c = thread; c < kSjltChunk; c += kThreads) {
        keys[c] = kNone;
        if (!x.holds(first + c)) continue;
        const Words random = sjlt_words(projection.seed, first + c, t);
        const Nonzero nonzero = nonzero_of(word_of(random, static_cast<int>(t % 4)), q);
        keys[c] = (uint64_t{nonzero.output} * kSjltChunk + static_cast<uint64_t>(c)) * 2 +
                  (nonzero.negative ? 1 : 0);
      }
      __syncthreads();
      sort_keys(keys);
      for (int e = thread; e < kSjltChunk; e += kThreads) {
        if (keys[e] == kNone) continue;
        const int64_t output = output_of(keys[e]);
        if (e > 0 && output_of(keys[e - 1]) == output) continue;  // another thread's
        for (int64_t r = 0; r < rows; ++r) {
          T sum = segment[r * k + output];
          for (int n = e; n < kSjltChunk && keys[n] != kNone && output_of(keys[n]) == output; ++n) {
            const auto c = static_cast<int64_t>(keys[n] / 2 % kSjltChunk);
            const T value = static_cast<T>(load(x.at(first_row + r, first + c)));
            sum += value * (keys[n] & 1 ? -scale : scale);
          }
          segment[r * k + output] = sum;
        }
      }
    }
  }
}

// A thread owns a coordinate for a few rows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    adjoint_sjlt_kernel(Projection projection, T scale, const T* __restrict__ y, Slab<T> x) {
  const int64_t k = projection.k, q = segment_of(projection);
  const int64_t tiles = divide_up(x.count, kThreads), groups = divide_up(x.rows, kSjltAdjointRows);
  for (int64_t item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
    const int64_t coordinate = x.begin + item % tiles * kThreads + threadIdx.x;
    const int64_t row = item / tiles * kSjltAdjointRows;
    if (!x.holds(coordinate)) continue;
    T totals[kSjltAdjointRows] = {};
    Words random = {};
    for (int64_t t = 0; t < projection.sparsity; ++t) {
      if (t % 4 == 0) random = sjlt_words(projection.seed, coordinate, t);
      const Nonzero nonzero = nonzero_of(word_of(random, static_cast<int>(t % 4)), q);
      const T value = nonzero.negative ? -scale : scale;
      const T* from = y + t * q + nonzero.output;
      for (int r = 0; r < kSjltAdjointRows && row + r < x.rows; ++r) {
        totals[r] += from[(row + r) * k] * value;
      }
    }
    for (int r = 0; r < kSjltAdjointRows && row + r < x.rows; ++r) {
      *x.at(row + r, coordinate) = totals[r];
    }
  }
}

}  // namespace

Cut sjlt_cut(const Projection& projection, int64_t rows) {
  return {kSjltChunk, projection.sparsity * divide_up(rows, kSjltRows)};
}

template <typename From, typename T>
cudaError_t launch_sjlt(const Projection& projection, T scale, Slab<const From> x, Sums<T> sums,
                        cudaStream_t stream) {
  return launch_over(projection.sparsity * divide_up(x.rows, kSjltRows) * sums.splits, stream,
                     project_sjlt_kernel<From, T>, projection, scale, x, sums);
}

template <typename T>
cudaError_t launch_sjlt_adjoint(const Projection& projection, T scale, const T* y, Slab<T> x,
                                cudaStream_t stream) {
  return launch_over(divide_up(x.count, kThreads) * divide_up(x.rows, kSjltAdjointRows), stream,
                     adjoint_sjlt_kernel<T>, projection, scale, y, x);
}

#define KSM_INSTANTIATE(From, T) \
  template cudaError_t launch_sjlt(const Projection&, T, Slab<const From>, Sums<T>, cudaStream_t);
KSM_FOR_PROJECTED_TYPES(KSM_INSTANTIATE)
#undef KSM_INSTANTIATE

template cudaError_t launch_sjlt_adjoint(const Projection&, float, const float*, Slab<float>,
                                         cudaStream_t);
template cudaError_t launch_sjlt_adjoint(const Projection&, double, const double*, Slab<double>,
                                         cudaStream_t);

}  // namespace ksm
