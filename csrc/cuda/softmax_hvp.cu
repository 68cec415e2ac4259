// The Hessian of softmax cross-entropy on CUDA: a block takes a row of the logits and some tangents.
//
// The row's probabilities are found once, and stay in shared memory where it is large enough: a block
// of a long row then has a multiprocessor for itself, and all that are under way fit the L2 cache. A
// tangent is read by its dot product and again, from that cache, by the pass that writes.
#include "cuda/block_sum.cuh"
#include "cuda/intrinsics.cuh"
#include "cuda/softmax_hvp_launch.h"
#include "series.h"

namespace ksm {
namespace {

constexpr int kLongBlock = 1024;  // threads, of rows longer than
constexpr int64_t kShortRow = 8192;

// Static shared memory of the kernel.
template <int kBlock, typename T>
constexpr int64_t kReductionBytes = kBlock * (sizeof(double) + sizeof(T)) + 64;

// Neighbours that a thread loads and stores at once.
template <typename T>
struct alignas(16) Group {
  static constexpr int kSize = 16 / sizeof(T);

  T values[kSize];
};

// Those from j on of a row of c, zero beyond it; `wide`: rows are aligned.
template <typename T>
__device__ Group<T> group_at(const T* row, int64_t j, int64_t c, bool wide) {
  constexpr int kSize = Group<T>::kSize;
  if (wide && j + kSize <= c) return *reinterpret_cast<const Group<T>*>(row + j);
  Group<T> out;
#pragma unroll
  for (int e = 0; e < kSize; ++e) out.values[e] = j + e < c ? row[j + e] : T(0);
  return out;
}

// Calls body(j, groups) for this thread's groups of a row, where groups[n] begins at
// j + n * kBlock * kSize.
template <int kBlock, int kUnderWay, typename T, typename Body>
__device__ void for_groups(const T* row, int64_t c, bool wide, const Body& body) {
  constexpr int64_t kStep = int64_t{kBlock} * Group<T>::kSize;
  for (int64_t j = threadIdx.x * Group<T>::kSize; j < c; j += kUnderWay * kStep) {
    Group<T> groups[kUnderWay];
#pragma unroll
    for (int n = 0; n < kUnderWay; ++n) groups[n] = group_at(row, j + n * kStep, c, wide);
#pragma unroll
    for (int n = 0; n < kUnderWay; ++n) body(j + n * kStep, groups[n]);
  }
}

// kCached: the probabilities fit dynamic shared memory. A thread reads only its own.
template <int kBlock, bool kCached, typename T>
__global__ void __launch_bounds__(kBlock)
    softmax_hvp_kernel(const T* logits, const T* tangents, const T* weights, int64_t s, int64_t b,
                       int64_t c, int64_t per_item, bool wide, T* out) {
  constexpr int kSize = Group<T>::kSize, kUnderWay = kCached ? 4 : 2;  // groups of a thread
  T* cache = static_cast<T*>(dynamic_shared_memory());
  const int64_t groups = divide_up(s, per_item);
  for (int64_t item = blockIdx.x; item < b * groups; item += gridDim.x) {
    const int64_t i = item / groups, first = item % groups * per_item;
    const T* row = logits + i * c;
    T largest = row[0];
    for_groups<kBlock, kUnderWay>(row, c, wide, [&](int64_t j, const Group<T>& z) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (j + e < c && z.values[e] > largest) largest = z.values[e];
      }
    });
    const T top = block_largest<kBlock>(largest);
    double part = 0;
    for_groups<kBlock, kUnderWay>(row, c, wide, [&](int64_t j, const Group<T>& z) {
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        if (j + e >= c) continue;
        const T value = exp_of_minus(top - z.values[e]);
        if (kCached) cache[j + e] = value;
        part += value;
      }
    });
    const T scale = static_cast<T>(1 / shared_sum<kBlock>(part));
    // The probabilities from j on; those beyond the row are not used.
    const auto probabilities = [&](int64_t j) {
      Group<T> p = {};
      if (kCached) {
        if (j < c) p = *reinterpret_cast<const Group<T>*>(cache + j);
      } else {
        p = group_at(row, j, c, wide);
      }
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        p.values[e] = (kCached ? p.values[e] : exp_of_minus(top - p.values[e])) * scale;
      }
      return p;
    };
    const T weight = weights ? weights[i] : T(1);
    const int64_t last = first + per_item < s ? first + per_item : s;
    for (int64_t r = first; r < last; ++r) {
      const T* tangent = tangents + (r * b + i) * c;
      T* target = out + (r * b + i) * c;
      double dot = 0;
      for_groups<kBlock, kUnderWay>(tangent, c, wide, [&](int64_t j, const Group<T>& u) {
        const Group<T> p = probabilities(j);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          if (j + e < c) dot += static_cast<double>(p.values[e] * u.values[e]);
        }
      });
      const T mean = static_cast<T>(shared_sum<kBlock>(dot));
      for_groups<kBlock, kUnderWay>(tangent, c, wide, [&](int64_t j, Group<T> u) {
        const Group<T> p = probabilities(j);
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          u.values[e] = weight * p.values[e] * (u.values[e] - mean);
        }
        if (wide && j + kSize <= c) {
          *reinterpret_cast<Group<T>*>(target + j) = u;
          return;
        }
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          if (j + e < c) target[j + e] = u.values[e];
        }
      });
    }
  }
}

// Whether rows of whole groups lie in memory as groups do.
template <typename T>
bool is_wide(const T* values, int64_t c) {
  return reinterpret_cast<uintptr_t>(values) % sizeof(Group<T>) == 0 && c % Group<T>::kSize == 0;
}

template <int kBlock, typename T>
cudaError_t launch_rows(const T* logits, const T* tangents, const T* weights, int64_t s, int64_t b,
                        int64_t c, T* out, cudaStream_t stream) {
  constexpr int64_t kEnoughRows = 512, kFewTangents = 8;
  const int64_t per_item = b < kEnoughRows ? std::min(s, kFewTangents) : s;
  const bool wide = is_wide(logits, c) && is_wide(tangents, c) && is_wide(out, c);
  int most = 0;
  cudaError_t status = most_shared_memory(&most);
  if (status != cudaSuccess) return status;
  const int64_t bytes = divide_up(c, Group<T>::kSize) * sizeof(Group<T>);
  const bool cached = bytes + kReductionBytes<kBlock, T> <= most;
  const auto kernel =
      cached ? softmax_hvp_kernel<kBlock, true, T> : softmax_hvp_kernel<kBlock, false, T>;
  if (cached) status = allow_shared_memory(kernel, bytes);
  if (status != cudaSuccess) return status;
  return launch_blocks(grid_for(b * divide_up(s, per_item), 1), kBlock, cached ? bytes : 0, stream,
                       kernel, logits, tangents, weights, s, b, c, per_item, wide, out);
}

}  // namespace

template <typename T>
cudaError_t launch_softmax_hvp(const T* logits, const T* tangents, const T* weights, int64_t s,
                               int64_t b, int64_t c, T* out, cudaStream_t stream) {
  const auto launch_of = c > kShortRow ? launch_rows<kLongBlock, T> : launch_rows<kThreads, T>;
  return launch_of(logits, tangents, weights, s, b, c, out, stream);
}

template cudaError_t launch_softmax_hvp(const float*, const float*, const float*, int64_t, int64_t,
                                        int64_t, float*, cudaStream_t);
template cudaError_t launch_softmax_hvp(const double*, const double*, const double*, int64_t,
                                        int64_t, int64_t, double*, cudaStream_t);

}  // namespace ksm
