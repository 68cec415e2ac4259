// What only a GPU has; tools/cuda_on_host/intrinsics.cuh says the same in plain code.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace ksm {

// What a block may ask for at its launch, in bytes.
inline cudaError_t most_shared_memory(int* bytes) {
  int device = 0;
  const cudaError_t status = cudaGetDevice(&device);
  if (status != cudaSuccess) return status;
  return cudaDeviceGetAttribute(bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
}

// Asks for more than the 48 KiB that every kernel may use.
template <typename... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), int64_t bytes) {
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// What a launch gave a block beyond its static shared memory.
__device__ inline void* dynamic_shared_memory() {
  extern __shared__ __align__(16) double memory[];
  return memory;
}

// 16 aligned bytes at once; a compiler may take a float4 apart.
__device__ inline void store_four(float* to, const float (&values)[4]) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values[0]), "f"(values[1]),
               "f"(values[2]), "f"(values[3])
               : "memory");
}

// Starts to copy 8 or 16 aligned bytes to shared memory, or zeros unless `held`; `from` is then not read.
template <int kBytes>
__device__ inline void copy_async(void* to, const void* from, bool held) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(to))),
               "l"(from), "n"(kBytes), "r"(held ? kBytes : 0)
               : "memory");
}

// Waits for the copies that this thread has started; a barrier makes them known to the others.
__device__ inline void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// Matrix products of a warp on the tensor cores, D += A B. With lane = 4 g + q, a lane holds of
// D (16, 8) rows g and g + 8 of columns 2 q and 2 q + 1: row g first, columns side by side. Of A's
// rows g and g + 8 it holds word q of each, then word q + 4; of B's column g words q and q + 4.

// Products are ands of bits: A (16, 256), B (256, 8). Present since sm_80; sm_100 and later emulate
// it.
__device__ inline void mma_and_popc(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A (16, 16), B (16, 8): a word is two neighbours, the first in its low half. Sums are rounded
// towards zero: short ones are exact enough, long ones would shrink.
__device__ inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// A (16, 16), B (16, 8), likewise.
__device__ inline void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 rows of 4 words from shared memory: lane l points to row l % 8 of matrix l / 8,
// 16 aligned bytes, and gets word q of row g of each.
__device__ inline void load_matrices(uint32_t (&a)[4], const uint32_t* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

// Two numbers rounded to float16, to nearest, the first in the low half.
__device__ inline uint32_t pack_halves(float first, float second) {
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  return pair;
}

// The number in the low half.
__device__ inline float half_value(uint32_t pair) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(pair)));
  return value;
}

}  // namespace ksm
