// Rates of a GPU that no library call shows, for benchmarks/device_ops.py: a line "name|unit|rate" each.
//
//     nvcc -O3 -std=c++17 -Icsrc -gencode=arch=compute_90a,code=sm_90a -o ceilings tools/cuda_ceilings.cu
//
// Kernels keep their results alive by a store that never happens, and each rate is the best of several
// launches.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "cuda/intrinsics.cuh"
#include "philox.h"

namespace {

constexpr int kThreads = 256;
constexpr int kTurns = 7;

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

// Independent sums of a warp's matrix products, to hide their latency.
constexpr int kChains = 4;

template <typename Sum, void (*kMma)(Sum (&)[4], const uint32_t (&)[4], const uint32_t (&)[2])>
__global__ void mma_kernel(int steps, uint32_t mask, uint32_t bits, Sum* out) {
  uint32_t a[4], b[2];
  Sum d[kChains][4] = {};
  for (int i = 0; i < 4; ++i) a[i] = (threadIdx.x * 0x9E3779B9u + i) & mask | bits;
  for (int i = 0; i < 2; ++i) b[i] = (threadIdx.x * 0xBB67AE85u + i) & mask | bits;
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int chain = 0; chain < kChains; ++chain) kMma(d[chain], a, b);
  }
  Sum sum = 0;
  for (int chain = 0; chain < kChains; ++chain) {
    for (int i = 0; i < 4; ++i) sum += d[chain][i];
  }
  if (sum == Sum{-1}) out[0] = sum;
}

// Bytes: A (16, 32), B (32, 8).
__device__ inline void mma_bytes(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

__device__ inline uint32_t folded(uint32_t value) { return value; }
__device__ inline uint32_t folded(uint4 value) { return value.x ^ value.y ^ value.z ^ value.w; }

// All of the memory, `times` over, past the L1 cache: 64 bytes in flight for each thread. The count
// is a multiple of what all threads load at once.
template <typename T>
__global__ void read_kernel(int times, const T* memory, int64_t count, uint32_t* out) {
  constexpr int kLoads = 64 / sizeof(T);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  uint32_t sum = 0;
  for (int time = 0; time < times; ++time) {
    for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
         i += threads * kLoads) {
      T values[kLoads];
#pragma unroll
      for (int load = 0; load < kLoads; ++load) values[load] = __ldcg(memory + i + load * threads);
#pragma unroll
      for (int load = 0; load < kLoads; ++load) sum += folded(values[load]);
    }
  }
  if (sum == 1u) out[0] = sum;
}

// Atomic additions of float32 to 512 KiB of memory, at places that Philox's multipliers scatter.
__global__ void atomics_kernel(int steps, float* sums, uint32_t mask) {
  uint32_t place = blockIdx.x * kThreads + threadIdx.x;
  for (int step = 0; step < steps; ++step) {
    place = place * 0xD2511F53u + 0x9E3779B9u;
    atomicAdd(sums + (place & mask), 1.0f);
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

// Philox4x32-10, and its 128 bits expanded into pairs of bfloat16 signs. The counter changes in every
// word, so that no round is the same for all steps; results are added, since an exclusive or of the
// same bits twice would be left out.
__global__ void philox_kernel(int steps, bool expanded, uint32_t* out) {
  uint32_t sum = 0;
  const uint32_t thread = blockIdx.x * kThreads + threadIdx.x;
  for (int step = 0; step < steps; ++step) {
    const uint32_t i = static_cast<uint32_t>(step);
    const ksm::Words words = ksm::philox(7, {{thread + i, thread - i, thread ^ i, ~thread ^ i}});
    for (int w = 0; w < 4; ++w) {
      if (!expanded) {
        sum += words.word[w];
        continue;
      }
#pragma unroll
      for (int bit = 0; bit < 16; ++bit) {
        sum += (words.word[w] << bit & 0x80008000u) | 0x3F803F80u;  // two of +1 or -1
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
  const double threads = static_cast<double>(blocks) * kThreads, warps = threads / 32;
  const int64_t round = static_cast<int64_t>(blocks) * kThreads * 64;  // bytes of all threads
  const int64_t resident = round * std::max<int64_t>(1, (16 << 20) / round);
  const int64_t bytes = round * ((int64_t{1} << 30) / round);
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes));
  check(cudaMemset(memory, 0, bytes));
  const auto report = [](const char* name, const char* unit, double amount, double seconds) {
    std::printf("%s|%s|%.6g\n", name, unit, amount / seconds);
    std::fflush(stdout);
  };
  const auto ints = static_cast<int*>(memory);
  const auto floats = static_cast<float*>(memory);
  const auto words = static_cast<uint32_t*>(memory);
  const auto quads = static_cast<uint4*>(memory);
  constexpr int kSteps = 2048;
  const double products = warps * kSteps * kChains * 2.0 * 16 * 8;  // for each column of A
  report("mma.sync of bits", "OP/s", products * 256, best_seconds([&] {
           mma_kernel<int, ksm::mma_and_popc><<<blocks, kThreads>>>(kSteps, ~0u, 0, ints);
         }));
  report("mma.sync of bytes", "OP/s", products * 32, best_seconds([&] {
           mma_kernel<int, mma_bytes><<<blocks, kThreads>>>(kSteps, 0x01010101u, 0, ints);
         }));
  // Random signs and mantissas, of sizes around 1.
  report("mma.sync of bf16", "FLOP/s", products * 16, best_seconds([&] {
           mma_kernel<float, ksm::mma_bfloat16>
               <<<blocks, kThreads>>>(kSteps, 0x807F807Fu, 0x3F803F80u, floats);
         }));
  report("mma.sync of fp16", "FLOP/s", products * 16, best_seconds([&] {
           mma_kernel<float, ksm::mma_float16>
               <<<blocks, kThreads>>>(kSteps, 0x83FF83FFu, 0x3C003C00u, floats);
         }));
  report("read, 32 bits a load", "bytes/s", bytes,
         best_seconds([&] { read_kernel<<<blocks, kThreads>>>(1, words, bytes / 4, words); }));
  report("read, 128 bits a load", "bytes/s", bytes,
         best_seconds([&] { read_kernel<<<blocks, kThreads>>>(1, quads, bytes / 16, words); }));
  report("read from L2, 32 bits a load", "bytes/s", 16.0 * resident,
         best_seconds([&] { read_kernel<<<blocks, kThreads>>>(16, words, resident / 4, words); }));
  report("read from L2, 128 bits a load", "bytes/s", 16.0 * resident,
         best_seconds([&] { read_kernel<<<blocks, kThreads>>>(16, quads, resident / 16, words); }));
  report("atomic additions to 512 KiB", "additions/s", threads * 256,
         best_seconds([&] { atomics_kernel<<<blocks, kThreads>>>(256, floats, 128 * 1024 - 1); }));
  report("permuted reads of shared memory", "bytes/s", threads * kSteps * 4 * 4,
         best_seconds([&] { gather_kernel<<<blocks, kThreads>>>(kSteps, floats); }));
  for (const bool expanded : {false, true}) {
    report(expanded ? "Philox signs, expanded" : "Philox", "bits/s", threads * 512 * 128,
           best_seconds([&] { philox_kernel<<<blocks, kThreads>>>(512, expanded, words); }));
  }
  check(cudaFree(memory));
  return 0;
}
