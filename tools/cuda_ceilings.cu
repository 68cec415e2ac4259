// Rates of a GPU that no library call shows, for benchmarks/device_ops.py: a line "name|unit|rate" each.
//
//     nvcc -O3 -std=c++17 -Icsrc -gencode=arch=compute_90a,code=sm_90a -o ceilings tools/cuda_ceilings.cu
//
// Every kernel keeps its results alive by a store that never happens, and each rate is the best of
// several launches.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "philox.h"

namespace {

constexpr int kThreads = 256;
constexpr int kTurns = 7;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

// Bit matrices: and, popcount, add. 16 x 8 x 256 of them in one instruction of a warp.
__global__ void bit_mma_kernel(int steps, int* out) {
  uint32_t a[4], b[2];
  int d[4][4] = {};
  for (int i = 0; i < 4; ++i) a[i] = threadIdx.x * 0x9E3779B9u + i;
  for (int i = 0; i < 2; ++i) b[i] = threadIdx.x * 0xBB67AE85u + i;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int chain = 0; chain < 4; ++chain) {  // independent, to hide the latency
      asm volatile(
          "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+r"(d[chain][0]), "+r"(d[chain][1]), "+r"(d[chain][2]), "+r"(d[chain][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
  int sum = 0;
  for (int chain = 0; chain < 4; ++chain) {
    for (int i = 0; i < 4; ++i) sum += d[chain][i];
  }
  if (sum == -1) out[0] = sum;
}

// Bytes: 16 x 8 x 32 in one instruction of a warp.
__global__ void byte_mma_kernel(int steps, int* out) {
  uint32_t a[4], b[2];
  int d[4][4] = {};
  for (int i = 0; i < 4; ++i) a[i] = (threadIdx.x + i) & 0x01010101u;
  for (int i = 0; i < 2; ++i) b[i] = (threadIdx.x * 3 + i) & 0x01010101u;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int chain = 0; chain < 4; ++chain) {
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
          "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+r"(d[chain][0]), "+r"(d[chain][1]), "+r"(d[chain][2]), "+r"(d[chain][3])
          : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
  }
  int sum = 0;
  for (int chain = 0; chain < 4; ++chain) {
    for (int i = 0; i < 4; ++i) sum += d[chain][i];
  }
  if (sum == -1) out[0] = sum;
}

// Atomic additions of float32 to 512 KiB of memory, at places that Philox's multipliers scatter.
__global__ void atomics_kernel(int steps, float* sums, uint32_t count) {
  uint32_t place = blockIdx.x * kThreads + threadIdx.x;
  for (int step = 0; step < steps; ++step) {
    place = place * 0xD2511F53u + 0x9E3779B9u;
    atomicAdd(sums + place % count, 1.0f);
  }
}

// Reads of shared memory at permuted addresses that meet no bank twice.
__global__ void gather_kernel(int steps, float* out) {
  __shared__ float values[8192];
  for (int e = threadIdx.x; e < 8192; e += kThreads) values[e] = static_cast<float>(e);
  __syncthreads();
  float sums[4] = {};
  uint32_t row = blockIdx.x;
  for (int step = 0; step < steps; ++step) {
    row = row * 5u + 1u;
#pragma unroll
    for (int chain = 0; chain < 4; ++chain) {
      sums[chain] += values[((row + chain) * 32u + (threadIdx.x ^ (row & 31u))) & 8191u];
    }
  }
  if (sums[0] + sums[1] + sums[2] + sums[3] == -1.0f) out[0] = sums[0];
}

// Philox4x32-10, and its 128 bits expanded into pairs of bfloat16 signs.
__global__ void philox_kernel(int steps, bool expanded, uint32_t* out) {
  uint32_t sum = 0;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  for (int step = 0; step < steps; ++step) {
    const ksm::Words words = ksm::philox(7, {{thread, static_cast<uint32_t>(step), 0, 0}});
    for (int w = 0; w < 4; ++w) {
      if (!expanded) {
        sum ^= words.word[w];
        continue;
      }
#pragma unroll
      for (int bit = 0; bit < 16; ++bit) {
        sum ^= (words.word[w] << bit & 0x80008000u) | 0x3F803F80u;  // two of +1 or -1
      }
    }
  }
  if (sum == 1u) out[0] = sum;
}

template <typename Launch>
double best_seconds(const Launch& launch) {
  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  double best = 1e30;
  for (int turn = 0; turn < kTurns; ++turn) {
    check(cudaEventRecord(start));
    launch();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaGetLastError());
    float milliseconds = 0;
    check(cudaEventElapsedTime(&milliseconds, start, end));
    if (turn > 0) best = std::min(best, milliseconds / 1e3);
  }
  return best;
}

}  // namespace

int main() {
  cudaDeviceProp properties;
  check(cudaGetDeviceProperties(&properties, 0));
  const int blocks = properties.multiProcessorCount * 8;
  void* memory = nullptr;
  check(cudaMalloc(&memory, 512 * 1024));
  check(cudaMemset(memory, 0, 512 * 1024));
  const double threads = static_cast<double>(blocks) * kThreads, warps = threads / 32;
  const auto report = [](const char* name, const char* unit, double amount, double seconds) {
    std::printf("%s|%s|%.6g\n", name, unit, amount / seconds);
    std::fflush(stdout);
  };
  constexpr int kSteps = 2048;
  report("mma of bits", "OP/s", warps * kSteps * 4 * 2.0 * 16 * 8 * 256, best_seconds([&] {
           bit_mma_kernel<<<blocks, kThreads>>>(kSteps, static_cast<int*>(memory));
         }));
  report("mma of bytes", "OP/s", warps * kSteps * 4 * 2.0 * 16 * 8 * 32, best_seconds([&] {
           byte_mma_kernel<<<blocks, kThreads>>>(kSteps, static_cast<int*>(memory));
         }));
  report("atomic additions to 512 KiB", "additions/s", threads * 256, best_seconds([&] {
           atomics_kernel<<<blocks, kThreads>>>(256, static_cast<float*>(memory), 128 * 1024);
         }));
  report("permuted reads of shared memory", "bytes/s", threads * kSteps * 4 * 4, best_seconds([&] {
           gather_kernel<<<blocks, kThreads>>>(kSteps, static_cast<float*>(memory));
         }));
  for (const bool expanded : {false, true}) {
    report(expanded ? "Philox signs, expanded" : "Philox", "bits/s", threads * 512 * 128,
           best_seconds([&] {
             philox_kernel<<<blocks, kThreads>>>(512, expanded, static_cast<uint32_t*>(memory));
           }));
  }
  check(cudaFree(memory));
  return 0;
}
