// The Hessian of softmax cross-entropy on CUDA: a block takes a row of the logits and some tangents.
//
// The row's maximum and sum are found once; probabilities are computed again where they are needed,
// which costs less than to keep a long row. A tangent is read by its dot product and again, from
// the L2 cache, by the pass that writes.
#include "cuda/block_sum.cuh"
#include "cuda/softmax_hvp_kernels.h"
#include "series.h"

namespace ksm {
namespace {

constexpr int64_t kTangentsPerItem = 8;  // for which a row's maximum and sum are found once

// The largest of every thread's value, in every thread. All threads call it.
template <typename T>
__device__ T block_largest(T value) {
  __shared__ T values[kThreads];
  __syncthreads();
  values[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half && values[threadIdx.x + half] > values[threadIdx.x]) {
      values[threadIdx.x] = values[threadIdx.x + half];
    }
    __syncthreads();
  }
  return values[0];
}

template <typename T>
__global__ void softmax_hvp_kernel(const T* logits, const T* tangents, const T* weights, int64_t s,
                                   int64_t b, int64_t c, T* out) {
  const int64_t groups = (s + kTangentsPerItem - 1) / kTangentsPerItem;
  for (int64_t item = blockIdx.x; item < b * groups; item += gridDim.x) {
    const int64_t i = item / groups, first = item % groups * kTangentsPerItem;
    const T* row = logits + i * c;
    T largest = row[0];
    for (int64_t j = threadIdx.x; j < c; j += kThreads)
      largest = row[j] > largest ? row[j] : largest;
    const T top = block_largest(largest);
    double part = 0;
    for (int64_t j = threadIdx.x; j < c; j += kThreads) part += exp_of_minus(top - row[j]);
    const T scale = static_cast<T>(1 / shared_sum(part));
    const T weight = weights ? weights[i] : T(1);
    const int64_t last = first + kTangentsPerItem < s ? first + kTangentsPerItem : s;
    for (int64_t r = first; r < last; ++r) {
      const T* tangent = tangents + (r * b + i) * c;
      T* target = out + (r * b + i) * c;
      double dot = 0;
      for (int64_t j = threadIdx.x; j < c; j += kThreads) {
        dot += static_cast<double>(exp_of_minus(top - row[j]) * scale * tangent[j]);
      }
      const T mean = static_cast<T>(shared_sum(dot));
      for (int64_t j = threadIdx.x; j < c; j += kThreads) {
        target[j] = weight * (exp_of_minus(top - row[j]) * scale) * (tangent[j] - mean);
      }
    }
  }
}

}  // namespace

template <typename T>
cudaError_t launch_softmax_hvp(const T* logits, const T* tangents, const T* weights, int64_t s,
                               int64_t b, int64_t c, T* out, cudaStream_t stream) {
  const int64_t items = b * ((s + kTangentsPerItem - 1) / kTangentsPerItem);
  return launch_over(items, stream, softmax_hvp_kernel<T>, logits, tangents, weights, s, b, c, out);
}

template cudaError_t launch_softmax_hvp(const float*, const float*, const float*, int64_t, int64_t,
                                        int64_t, float*, cudaStream_t);
template cudaError_t launch_softmax_hvp(const double*, const double*, const double*, int64_t,
                                        int64_t, int64_t, double*, cudaStream_t);

}  // namespace ksm
