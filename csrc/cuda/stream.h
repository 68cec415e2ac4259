// The stream that torch works on.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace ksm {

inline cudaStream_t current_stream(const torch::stable::Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace ksm
