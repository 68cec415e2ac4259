// Neighbouring values that are loaded and stored at once.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "projection.h"

namespace ksm {

// Two neighbours.
template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T first, second;
};

// Four neighbours, as they lie in memory.
template <typename T>
struct alignas(4 * sizeof(T)) Four {
  uint32_t words[sizeof(T)];

  __device__ void set(int e, T value) {
    if constexpr (sizeof(T) >= 4) {
      memcpy(&words[e * sizeof(T) / 4], &value, sizeof(T));
    } else {
      uint16_t bits;
      memcpy(&bits, &value, sizeof(T));
      words[e / 2] |= uint32_t{bits} << e % 2 * 16;
    }
  }

  __device__ auto operator[](int e) const {
    if constexpr (sizeof(T) == 2) {
      if constexpr (std::is_same_v<T, __half>) return half_value(words[e / 2] >> e % 2 * 16);
      return float_of(e % 2 ? words[e / 2] & 0xFFFF0000 : words[e / 2] << 16);
    } else {
      T value;
      memcpy(&value, &words[e * sizeof(T) / 4], sizeof(value));
      return value;
    }
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

}  // namespace ksm
