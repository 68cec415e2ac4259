// Just enough of CUDA to run kernels on the host, for checks without a GPU: a block's threads are
// fibers that take turns at every barrier, in an order that the check chooses. A result that depends
// on this order has a race; a barrier that only some threads reach is reported.
//
// Without atomics and most warp functions. Included first, in place of CUDA's own headers (run.sh).
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static  // one block runs at a time
#define __launch_bounds__(...)

using std::fma;
using std::sqrt;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  explicit dim3(unsigned x) : x(x) {}
};

using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline dim3 threadIdx, blockIdx, gridDim, blockDim;

namespace on_host {

// Contexts start fibers; jumps, which call no system, switch between them.
struct Fiber {
  ucontext_t context;
  std::jmp_buf place;  // where it stopped
  std::vector<char> stack = std::vector<char>(64 * 1024);
  bool started = false, done = true;
};

inline std::vector<Fiber> fibers(1024);
inline std::jmp_buf scheduler;
inline unsigned current;
inline std::vector<char> dynamic_memory;  // shared, of the block that runs
inline int most_shared = 227 * 1024;      // bytes that a block may ask for
inline bool at_warp_barrier;              // why the last fiber stopped, if it is not done
inline std::function<void()> body;
inline std::mt19937_64 order_bits;
inline bool shuffled = false;           // threads, and blocks, in a random order
inline unsigned most_blocks = 1 << 14;  // of a grid: few make a block take many items

inline void run_fiber() {
  body();
  fibers[current].done = true;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it stops.
[[gnu::noinline]] inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

// Stops the fiber that runs.
[[gnu::noinline]] inline void stop() {
  if (!_setjmp(fibers[current].place)) _longjmp(scheduler, 1);
}

inline std::vector<unsigned> order_of(unsigned count) {
  std::vector<unsigned> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (shuffled) std::shuffle(order.begin(), order.end(), order_bits);
  return order;
}

inline void require_all(unsigned arrived, unsigned all) {
  if (arrived == 0 || arrived == all) return;
  std::fprintf(stderr, "a barrier is not reached by all threads\n");
  std::abort();
}

// Runs the threads `first` to `first + count` up to a barrier of the block, or to their end; how
// many have ended.
inline unsigned run_warp(unsigned first, unsigned count) {
  for (;;) {
    unsigned finished = 0, waiting = 0;
    for (const unsigned t : order_of(count)) {
      current = threadIdx.x = first + t;
      at_warp_barrier = false;
      resume(fibers[first + t]);
      finished += fibers[first + t].done;
      waiting += at_warp_barrier;
    }
    require_all(finished, count);
    require_all(waiting, count);
    if (waiting == 0) return finished;
  }
}

inline void run_block(unsigned threads) {
  for (unsigned t = 0; t < threads; ++t) {
    Fiber& fiber = fibers[t];
    fiber.started = fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (unsigned finished = 0; finished == 0;) {
    for (const unsigned warp : order_of(threads / 32)) finished += run_warp(32 * warp, 32);
    require_all(finished, threads);
  }
}

inline void sync_warp() {
  at_warp_barrier = true;
  stop();
}

}  // namespace on_host

inline void __syncthreads() { on_host::stop(); }

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  on_host::dynamic_memory.assign(config->dynamicSmemBytes, char{0x7F});
  gridDim.x = std::min(config->gridDim.x, on_host::most_blocks);
  blockDim = config->blockDim;
  on_host::body = [&] { kernel(arguments...); };
  for (const unsigned block : on_host::order_of(gridDim.x)) {
    blockIdx.x = block;
    on_host::run_block(blockDim.x);
  }
  return cudaSuccess;
}

// Bit l is the predicate of lane l.
inline unsigned __ballot_sync(unsigned, bool predicate) {
  static bool lanes[32];
  lanes[threadIdx.x % 32] = predicate;
  on_host::sync_warp();
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned{lanes[lane]} << lane;
  on_host::sync_warp();  // before the next ballot
  return bits;
}

inline void __syncwarp() { on_host::sync_warp(); }

inline int __popc(unsigned word) { return __builtin_popcount(word); }
inline int __popcll(unsigned long long word) { return __builtin_popcountll(word); }

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float out;
  std::memcpy(&out, &bits, sizeof(out));
  return out;
}

inline float __half2float(__half value) {  // finite values
  const int exponent = value.bits >> 10 & 31, fraction = value.bits & 1023;
  const float size = exponent ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                              : std::ldexp(static_cast<float>(fraction), -24);
  return value.bits >> 15 ? -size : size;
}
