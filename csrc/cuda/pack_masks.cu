// Packing masks on CUDA: one warp per word, two ballots of 32 tasks each.
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace ksm {
namespace {

__global__ void pack_masks_kernel(const uint8_t* __restrict__ masks,  // (m, n)
                                  uint64_t* __restrict__ out,         // (m, words)
                                  int64_t m, int64_t n, int64_t words) {
  const int lane = threadIdx.x % 32;
  const int64_t first = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  for (int64_t k = first; k < m * words; k += int64_t{gridDim.x} * kWarps) {
    const int64_t i = k / words, j = k % words * kBitsPerWord + lane;
    const uint8_t* row = masks + i * n;
    const unsigned low = __ballot_sync(~0u, j < n && row[j]);
    const unsigned high = __ballot_sync(~0u, j + 32 < n && row[j + 32]);
    if (lane == 0) out[k] = uint64_t{high} << 32 | low;
  }
}

__global__ void mask_sizes_kernel(const uint64_t* __restrict__ masks,  // (m, words)
                                  int32_t* __restrict__ sizes,         // (m)
                                  int64_t m, int64_t words) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = first; i < m; i += int64_t{gridDim.x} * kThreads) {
    int32_t size = 0;
    for (int64_t w = 0; w < words; ++w) size += __popcll(masks[i * words + w]);
    sizes[i] = size;
  }
}

}  // namespace

cudaError_t launch_pack_masks(const uint8_t* masks, int64_t m, int64_t n, uint64_t* out,
                              cudaStream_t stream) {
  const int64_t words = words_of(n);
  return launch(grid_for(m * words, kWarps), 0, stream, pack_masks_kernel, masks, out, m, n, words);
}

cudaError_t launch_mask_sizes(const uint64_t* masks, int64_t m, int64_t words, int32_t* sizes,
                              cudaStream_t stream) {
  return launch_threads(m, stream, mask_sizes_kernel, masks, sizes, m, words);
}

}  // namespace ksm
