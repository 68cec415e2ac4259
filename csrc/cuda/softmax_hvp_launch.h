// The launcher of softmax_hvp.cu; see bind.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace ksm {

template <typename T>
cudaError_t launch_softmax_hvp(const T* logits,    // (b, c)
                               const T* tangents,  // (s, b, c)
                               const T* weights,   // (b) or null
                               int64_t s, int64_t b, int64_t c,
                               T* out,  // (s, b, c), may be the tangents
                               cudaStream_t stream);

}  // namespace ksm
