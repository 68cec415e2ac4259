// What every launch of ours has in common.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace ksm {

constexpr int kThreads = 256;  // per block, in nearly every kernel
constexpr int kWarps = kThreads / 32;

__host__ __device__ constexpr int64_t divide_up(int64_t value, int64_t unit) {
  return (value + unit - 1) / unit;
}

// Blocks for a grid-stride loop over `work` items: enough to fill any GPU several times over, and
// below the grid's limit for any int64 size.
inline unsigned grid_for(int64_t work, int64_t per_block) {
  constexpr int64_t kMaxBlocks = int64_t{1} << 14;
  return static_cast<unsigned>(std::clamp<int64_t>(divide_up(work, per_block), 1, kMaxBlocks));
}

// The elements of a matrix that a thread of launch_threads takes in turn, neighbours by neighbouring
// threads: a division each only for the first and for the step.
struct Element {
  int64_t row, column, at;  // `at` counts them all

  __device__ explicit Element(int64_t columns)
      : at(int64_t{blockIdx.x} * kThreads + threadIdx.x),
        columns_(columns),
        step_(int64_t{gridDim.x} * kThreads),
        row_step_(step_ / columns) {
    row = at / columns, column = at - row * columns;
  }
  __device__ void next() {
    at += step_, row += row_step_, column += step_ - row_step_ * columns_;
    if (column < columns_) return;
    ++row, column -= columns_;
  }

 private:
  int64_t columns_, step_, row_step_;
};

// An ordinary call instead of <<<>>>, so that a host compiler reads it too (tools/cuda_on_host).
template <typename... Parameters, typename... Arguments>
cudaError_t launch_blocks(unsigned blocks, int threads, int64_t shared_bytes, cudaStream_t stream,
                          void (*kernel)(Parameters...), const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(unsigned blocks, int64_t shared_bytes, cudaStream_t stream,
                   void (*kernel)(Parameters...), const Arguments&... arguments) {
  return launch_blocks(blocks, kThreads, shared_bytes, stream, kernel, arguments...);
}

// For a kernel whose blocks take `work` items in turn.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_over(int64_t work, cudaStream_t stream, void (*kernel)(Parameters...),
                        const Arguments&... arguments) {
  return launch(grid_for(work, 1), 0, stream, kernel, arguments...);
}

// For a kernel whose threads do.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_threads(int64_t work, cudaStream_t stream, void (*kernel)(Parameters...),
                           const Arguments&... arguments) {
  return launch(grid_for(work, kThreads), 0, stream, kernel, arguments...);
}

}  // namespace ksm
