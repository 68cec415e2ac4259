// Sparse projections (sjlt) on CUDA: sums in shared memory by output, or gathers by coordinate.
#include "cuda/intrinsics.cuh"
#include "cuda/neighbours.cuh"
#include "cuda/project_kinds.cuh"

namespace ksm {
namespace {

constexpr int kSjltUnit = 2048;      // coordinates that stay together
constexpr int kSjltRows = 32;        // a lane has one of them
constexpr int kSjltStaged = 128;     // coordinates whose values are staged at once
constexpr int kSjltAdjointRows = 8;  // they share what is drawn
// Rows lie side by side, padded: what a warp stores at once lies in different banks, whether its lanes
// have a row each or an output each.
constexpr int kSjltStride = kSjltRows + 1;
constexpr int kSjltAtOnce = 4;  // terms whose values are under way together

// A nonzero of this warp: where its sums begin, and the staged values of its coordinate with the sign
// in the last bit; both in a few bits of 32.
struct alignas(8) Term {
  uint32_t sums, values;
};
constexpr uint32_t kPlaceBits = 0x3FFFFFFF, kNoSums = 0x40000000, kNegative = 0x80000000;

// The shared memory of a block, before the sums of its outputs and of one more for each warp.
template <typename T>
struct SjltShared {
  Term terms[kWarps][kSjltStaged + kSjltAtOnce];
  uint32_t nonzeros[kThreads];  // of coordinates side by side: the place of the sums, and the sign
  T staged[kSjltStaged * kSjltStride];

  static constexpr int64_t kBytesOfOutput = kSjltStride * sizeof(T);
  static int64_t bytes(int64_t outputs) {
    return sizeof(SjltShared) + (outputs + kWarps) * kBytesOfOutput;
  }
  __device__ T* sums() { return reinterpret_cast<T*>(this + 1); }
};

__device__ float negated_if(uint32_t sign, float value) {
  return float_of(bits_of(value) ^ (sign & kNegative));
}
__device__ double negated_if(uint32_t sign, double value) {
  return sign & kNegative ? -value : value;
}

// Lists the terms of this warp, which has every eighth output; how many.
template <typename T>
__device__ int list_terms(SjltShared<T>& shared, int drawn, int64_t outputs) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, before = (1u << lane) - 1;
  Term* terms = shared.terms[warp];
  int length = 0;
#pragma unroll
  for (uint32_t c = lane; c < kSjltStaged; c += 32) {
    const uint32_t nonzero = shared.nonzeros[drawn + c];
    // The last bits of a place are those of the output.
    static_assert(kSjltStride % kWarps == 1);
    const bool own = ((nonzero ^ warp) & (kNoSums | (kWarps - 1))) == 0;
    const unsigned owners = __ballot_sync(~0u, own);
    const Term term = {nonzero, c * kSjltStride | (nonzero & kNegative)};
    Term* to = terms + length + __popc(owners & before);
    if (own) *to = term;
    length += __popc(owners);
  }
  // What fills the last terms up goes to sums behind the others, of this warp alone.
  const auto spare = static_cast<uint32_t>((outputs + warp) * kSjltStride);
  if (lane < kSjltAtOnce) terms[length + lane] = {spare, 0};
  __syncwarp();
  return length;
}

template <typename T>
__device__ void add_terms(SjltShared<T>& shared, int length) {
  const uint32_t lane = threadIdx.x % 32;
  const Term* terms = shared.terms[threadIdx.x / 32];
  const T* staged = shared.staged + lane;
  T* sums = shared.sums() + lane;
#pragma unroll 1  // lists are short
  for (int n = 0; n < length; n += kSjltAtOnce) {
    Term own[kSjltAtOnce];
    T values[kSjltAtOnce];
#pragma unroll
    for (int e = 0; e < kSjltAtOnce; e += 2) {
      const auto two = *reinterpret_cast<const Two<Term>*>(terms + n + e);
      own[e] = two.first, own[e + 1] = two.second;
    }
#pragma unroll
    for (int e = 0; e < kSjltAtOnce; ++e) values[e] = staged[own[e].values & kPlaceBits];
#pragma unroll
    for (int e = 0; e < kSjltAtOnce; ++e) {
      sums[own[e].sums & kPlaceBits] += negated_if(own[e].values, values[e]);
    }
  }
}

// What a thread stages at once: groups of four neighbours of one row, and those of kSjltBeside threads
// beside each other.
constexpr int kSjltBeside = kThreads / kSjltRows, kSjltLoads = kSjltStaged / (4 * kSjltBeside);

template <typename From>
using SjltValues = Four<From>[kSjltLoads];

// From value `at` of a row of `count` on, and zeros beyond; `wide`: the row is aligned.
template <typename From>
__device__ void load_values(const From* row, int64_t at, int64_t count, bool wide,
                            SjltValues<From>& values) {
  const bool whole = wide && at + kSjltStaged <= count;
#pragma unroll
  for (int n = 0; n < kSjltLoads; ++n) {
    const int64_t first = at + 4 * (threadIdx.x % kSjltBeside + n * kSjltBeside);
    if (whole) {
      values[n] = *reinterpret_cast<const Four<From>*>(row + first);
      continue;
    }
    values[n] = {};
    for (int64_t c = first; c < first + 4 && c < count; ++c) {
      values[n].set(static_cast<int>(c - first), row[c]);
    }
  }
}

template <typename From, typename T>
__device__ void stage(const SjltValues<From>& values, T scale, SjltShared<T>& shared) {
  T* own = shared.staged + threadIdx.x / kSjltBeside;  // its row
#pragma unroll
  for (int n = 0; n < kSjltLoads; ++n) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int c = 4 * (threadIdx.x % kSjltBeside + n * kSjltBeside) + e;
      own[c * kSjltStride] = values[n][e] * scale;
    }
  }
}

// The place of the sums, and the sign, of a coordinate's nonzero in segment t, if it is among
// `outputs` from `first` on.
__device__ uint32_t place_of_nonzero(const Projection& projection, int64_t coordinate, int64_t t,
                                     uint32_t first, int64_t outputs) {
  const Words random = sjlt_words(projection.seed, coordinate, t);
  const uint32_t word = word_of(random, static_cast<int>(t % 4));
  const Nonzero nonzero = nonzero_of(word, segment_of(projection));
  const uint32_t output = nonzero.output - first;
  return (output < outputs ? output * kSjltStride : kNoSums) | (nonzero.negative ? kNegative : 0);
}

// A block owns some outputs of a segment, for a few rows in one split. It stages coordinates' values
// by row, and each warp adds those of its outputs in order: no two threads share a sum.
template <typename From, typename T>
__global__ void __launch_bounds__(kThreads, 2)
    project_sjlt_kernel(Projection projection, T scale, Slab<const From> x, bool wide,
                        int64_t outputs_at_once, Sums<T> sums) {
  auto& shared = *static_cast<SjltShared<T>*>(dynamic_shared_memory());
  const int64_t k = projection.k, s = projection.sparsity, q = segment_of(projection);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t tiles = divide_up(q, outputs_at_once), groups = divide_up(x.rows, kSjltRows);
  for (int64_t item = blockIdx.x; item < tiles * s * groups * sums.splits; item += gridDim.x) {
    const int64_t t = item / tiles % s, split = item / tiles / s / groups;
    const int64_t row = item / tiles / s % groups * kSjltRows;
    const auto first = static_cast<uint32_t>(item % tiles * outputs_at_once);
    const int64_t outputs = q - first < outputs_at_once ? q - first : outputs_at_once;
    T* segment = sums.of(split) + row * k + t * q + first;
    __syncthreads();  // the sums before have been stored
    for (int r = warp; r < kSjltRows; r += kWarps) {
      for (int64_t o = lane; o < outputs; o += 32) {
        shared.sums()[o * kSjltStride + r] = split || row + r >= x.rows ? T(0) : segment[r * k + o];
      }
    }
    const int64_t own_row = row + thread / kSjltBeside;
    const From* from = x.values + (own_row < x.rows ? own_row : row) * x.stride;
    const int64_t begin = sums.begin(split) * kSjltUnit, full = sums.end(split) * kSjltUnit;
    const int64_t end = full < x.count ? full : x.count;
    SjltValues<From> values;
    load_values(from, begin, x.count, wide, values);
    int drawn = 0;  // of the nonzeros, where those of the staged coordinates begin
    for (int64_t at = begin; at < end; at += kSjltStaged) {
      __syncthreads();  // what was staged has been added
      if (drawn == 0) {
        const int64_t own = at + thread;
        shared.nonzeros[thread] =
            own < end ? place_of_nonzero(projection, x.begin + own, t, first, outputs) : kNoSums;
      }
      stage<From>(values, scale, shared);
      __syncthreads();
      load_values(from, at + kSjltStaged, x.count, wide, values);  // arrive in the meantime
      add_terms(shared, list_terms(shared, drawn, outputs));
      drawn = (drawn + kSjltStaged) % kThreads;
    }
    __syncthreads();
    for (int r = warp; r < kSjltRows && row + r < x.rows; r += kWarps) {
      for (int64_t o = lane; o < outputs; o += 32) {
        segment[r * k + o] = shared.sums()[o * kSjltStride + r];
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
  return {kSjltUnit, projection.sparsity * divide_up(rows, kSjltRows)};
}

template <typename From, typename T>
cudaError_t launch_sjlt(const Projection& projection, T scale, Slab<const From> x, Sums<T> sums,
                        cudaStream_t stream) {
  const auto kernel = project_sjlt_kernel<From, T>;
  int most_bytes = 0;
  cudaError_t status = most_shared_memory(&most_bytes);
  if (status != cudaSuccess) return status;
  // As few tiles of outputs as fit, of one size.
  const int64_t fit = (most_bytes - SjltShared<T>::bytes(0)) / SjltShared<T>::kBytesOfOutput;
  const int64_t q = segment_of(projection), tiles = divide_up(q, fit);
  const int64_t outputs = divide_up(q, tiles), bytes = SjltShared<T>::bytes(outputs);
  status = allow_shared_memory(kernel, bytes);
  if (status != cudaSuccess) return status;
  return launch(
      grid_for(tiles * projection.sparsity * divide_up(x.rows, kSjltRows) * sums.splits, 1), bytes,
      stream, kernel, projection, scale, x, is_wide(x.values, x.stride), outputs, sums);
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
