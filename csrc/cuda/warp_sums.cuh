// The sums of a thread in a tile that warps multiply on the tensor cores (intrinsics.cuh).
#pragma once

#include "cuda/launch.cuh"

namespace ksm {

// kWarpColumns warps lie side by side, the others below; each has kRowMmas x kColumnMmas products.
template <int kRowMmas, int kColumnMmas, int kWarpColumns>
struct WarpSums {
  static constexpr int kMmaRows = 16, kMmaColumns = 8;
  static constexpr int kRows = kWarps / kWarpColumns * kRowMmas * kMmaRows;
  static constexpr int kColumns = kWarpColumns * kColumnMmas * kMmaColumns;

  float sums[kRowMmas][kColumnMmas][4] = {};

  __device__ void operator+=(const WarpSums& other) {
#pragma unroll
    for (int p = 0; p < kRowMmas; ++p) {
#pragma unroll
      for (int c = 0; c < kColumnMmas; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[p][c][e] += other.sums[p][c][e];
      }
    }
  }

  // Calls body(row, column, sum) for the sums of this thread.
  template <typename Body>
  __device__ void for_each(const Body& body) const {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, q = lane % 4;
#pragma unroll
    for (int p = 0; p < kRowMmas; ++p) {
#pragma unroll
      for (int c = 0; c < kColumnMmas; ++c) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          body(first_row() + p * kMmaRows + g + e / 2 * 8,
               first_column() + c * kMmaColumns + 2 * q + e % 2, sums[p][c][e]);
        }
      }
    }
  }

  // Where this thread's warp begins in the tile.
  static __device__ int first_row() {
    return static_cast<int>(threadIdx.x / 32 / kWarpColumns) * kRowMmas * kMmaRows;
  }
  static __device__ int first_column() {
    return static_cast<int>(threadIdx.x / 32 % kWarpColumns) * kColumnMmas * kMmaColumns;
  }
};

}  // namespace ksm
