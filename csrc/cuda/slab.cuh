// What a projection on CUDA reads and writes, and how its work is cut.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"

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

// Four neighbours, as they lie in memory.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  uint32_t words[sizeof(T)];

  __device__ void set(int e, T value) {
    if constexpr (sizeof(T) == 4) {
      memcpy(&words[e], &value, sizeof(T));
    } else {
      uint16_t bits;
      memcpy(&bits, &value, sizeof(T));
      words[e / 2] |= uint32_t{bits} << e % 2 * 16;
    }
  }

  __device__ float operator[](int e) const {
    if constexpr (std::is_same_v<T, __half>) return half_value(words[e / 2] >> e % 2 * 16);
    const uint32_t narrow = e % 2 ? words[e / 2] & 0xFFFF0000 : words[e / 2] << 16;
    const uint32_t bits = sizeof(T) == 4 ? words[e % sizeof(T)] : narrow;
    float value;
    memcpy(&value, &bits, sizeof(value));
    return value;
  }
};

// Whether rows of groups of four can be loaded and stored at once.
template <typename T>
bool is_wide(const T* values, int64_t stride, int64_t begin = 0) {
  return reinterpret_cast<uintptr_t>(values) % sizeof(Four<T>) == 0 && stride % 4 == 0 &&
         begin % 4 == 0;
}

// Up to kRows rows of `count` values, of which a thread reads groups of four.
template <typename From, int kRows>
struct ThreadRows {
  const From* first;
  int64_t stride, count;
  int rows;
  bool wide;  // aligned

  // The four values from `at` on of each row, zero beyond them.
  __device__ void load_at(int64_t at, Four<From> (&values)[kRows]) const {
    const From* from = first + at;
#pragma unroll
    for (int r = 0; r < kRows; ++r) values[r] = {};
    if (wide && at >= 0 && at + 4 <= count) {
#pragma unroll
      for (int r = 0; r < kRows; ++r, from += stride) {
        if (r < rows) values[r] = *reinterpret_cast<const Four<From>*>(from);
      }
      return;
    }
    bool inside[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) inside[e] = at + e >= 0 && at + e < count;
#pragma unroll
    for (int r = 0; r < kRows; ++r, from += stride) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (inside[e] && r < rows) values[r].set(e, from[e]);
      }
    }
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

}  // namespace ksm
