// What the kinds of projections on CUDA have in common: what they read and write, how their work is
// cut, and their launchers, each in the file of its kind.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/launch.cuh"
#include "projection.h"

namespace ksm {

__device__ inline float load(const float* from) { return *from; }
__device__ inline double load(const double* from) { return *from; }
__device__ inline float load(const __half* from) { return __half2float(*from); }
__device__ inline float load(const __nv_bfloat16* from) { return __bfloat162float(*from); }

// Rows of coordinates `begin` to `begin + count`.
template <typename T>
struct Slab {
  T* values;
  int64_t stride, rows;
  int64_t begin, count;

  __device__ bool holds(int64_t coordinate) const {
    return coordinate >= begin && coordinate < begin + count;
  }
  __device__ T* at(int64_t row, int64_t coordinate) const {
    return values + row * stride + (coordinate - begin);
  }
  // Zero outside of the slab.
  template <typename Value>
  __device__ Value value_or_zero(int64_t row, int64_t coordinate) const {
    return row < rows && holds(coordinate) ? static_cast<Value>(load(at(row, coordinate)))
                                           : Value(0);
  }
  // How many aligned stretches of `length` coordinates it touches, and the index of the first.
  __host__ __device__ int64_t first_stretch(int64_t length) const { return begin / length; }
  __host__ __device__ int64_t stretches(int64_t length) const {
    return divide_up(begin + count, length) - begin / length;
  }
};

// The sums of a projection: y (rows, k), and how the coordinates are cut into splits.
template <typename T>
struct Sums {
  T* y;         // (rows, k): the first split is added to it
  T* partials;  // (splits - 1, rows, k)
  int64_t rows, k;
  int64_t splits;
  int64_t first_unit, units, units_per_split;  // a unit: coordinates that stay together

  __host__ __device__ int64_t begin(int64_t split) const {
    return first_unit + split * units_per_split;
  }
  __host__ __device__ int64_t end(int64_t split) const {
    const int64_t full = begin(split) + units_per_split, last = first_unit + units;
    return full < last ? full : last;
  }
  // Where a split sums to; all but the first start from nothing.
  __device__ T* of(int64_t split) const { return split ? partials + (split - 1) * rows * k : y; }
  __device__ void add(int64_t split, int64_t row, int64_t output, T sum) const {
    T* to = of(split) + row * k + output;
    *to = split ? sum : *to + sum;
  }
};

// words.word[index], where the words stay in registers.
__device__ inline uint32_t word_of(const Words& words, int index) {
  const uint32_t low = index & 1 ? words.word[1] : words.word[0];
  const uint32_t high = index & 1 ? words.word[3] : words.word[2];
  return index & 2 ? high : low;
}

// How a kind's work is cut: `unit` coordinates stay together, and one split of them takes `blocks`
// blocks of threads.
struct Cut {
  int64_t unit, blocks;
};

Cut sbp_cut(const Projection& projection, int64_t rows);
Cut sjlt_cut(const Projection& projection, int64_t rows);
Cut rademacher_cut(const Projection& projection, int64_t rows);
Cut dense_cut(const Projection& projection, int64_t rows);

// Sums of one kind. `scale` is that of all entries.
template <typename From, typename T>
cudaError_t launch_sbp(const Projection& projection, T scale, Slab<const From> x, Sums<T> sums,
                       cudaStream_t stream);
template <typename From, typename T>
cudaError_t launch_sjlt(const Projection& projection, T scale, Slab<const From> x, Sums<T> sums,
                        cudaStream_t stream);
template <typename From, typename T>
cudaError_t launch_dense(const Projection& projection, T scale, Slab<const From> x, Sums<T> sums,
                         cudaStream_t stream);
// On the tensor cores.
template <typename From>
cudaError_t launch_rademacher(const Projection& projection, float scale, Slab<const From> x,
                              Sums<float> sums, cudaStream_t stream);

// x = y P^T of one kind.
template <typename T>
cudaError_t launch_sbp_adjoint(const Projection& projection, T scale,
                               const T* y,  // (rows, k)
                               Slab<T> x, cudaStream_t stream);
template <typename T>
cudaError_t launch_sjlt_adjoint(const Projection& projection, T scale, const T* y, Slab<T> x,
                                cudaStream_t stream);
template <typename T>
cudaError_t launch_dense_adjoint(const Projection& projection, T scale, const T* y, Slab<T> x,
                                 cudaStream_t stream);

// What sbp with `hadamard` does first: signs, then the Walsh-Hadamard matrix; with kAdjoint the other
// way round. `out` or `in` consists of whole blocks; what the other one lacks of them is zero, or not
// wanted.
template <bool kAdjoint, typename From, typename T>
cudaError_t launch_rotation(const Projection& projection, Slab<const From> in, Slab<T> out,
                            cudaStream_t stream);

// INSTANTIATE(type of x, type of the sums) for all there are.
#define KSM_FOR_PROJECTED_TYPES(INSTANTIATE) \
  INSTANTIATE(float, float)                  \
  INSTANTIATE(__nv_bfloat16, float)          \
  INSTANTIATE(__half, float)                 \
  INSTANTIATE(double, double)

}  // namespace ksm
