// The sum over a block, always in the same order.
#pragma once

#include "cuda/launch.cuh"

namespace ksm {

// The sum of every thread's value, valid in thread 0. All threads call it.
__device__ inline double block_sum(double value) {
  __shared__ double sums[kThreads];
  __syncthreads();  // the sums of a call before have been read
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// The same, in every thread.
__device__ inline double shared_sum(double value) {
  __shared__ double total;
  const double sum = block_sum(value);
  if (threadIdx.x == 0) total = sum;
  __syncthreads();
  return total;
}

}  // namespace ksm
