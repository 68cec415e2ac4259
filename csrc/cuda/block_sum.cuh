// The sum over a block, always in the same order, and the largest value.
#pragma once

#include "cuda/launch.cuh"

namespace ksm {

// The sum of the values of kBlock threads, valid in thread 0. All threads call it.
template <int kBlock = kThreads>
__device__ double block_sum(double value) {
  __shared__ double sums[kBlock];
  __syncthreads();  // the sums of a call before have been read
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// The same, in every thread.
template <int kBlock = kThreads>
__device__ double shared_sum(double value) {
  __shared__ double total;
  const double sum = block_sum<kBlock>(value);
  if (threadIdx.x == 0) total = sum;
  __syncthreads();
  return total;
}

// The largest of every thread's value, in every thread. All threads call it.
template <int kBlock, typename T>
__device__ T block_largest(T value) {
  __shared__ T values[kBlock];
  __syncthreads();
  values[threadIdx.x] = value;
  __syncthreads();
  for (int half = kBlock / 2; half > 0; half /= 2) {
    if (threadIdx.x < half && values[threadIdx.x + half] > values[threadIdx.x]) {
      values[threadIdx.x] = values[threadIdx.x + half];
    }
    __syncthreads();
  }
  return values[0];
}

}  // namespace ksm
