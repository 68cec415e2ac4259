// What makes operators (<op>_bind.cpp) of launchers (<op>_launch.h), which know no tensors: every
// launcher enqueues on `stream` without waiting, returns the launch's error code, and takes sizes of at
// least 1.
#pragma once

#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace ksm {

using torch::stable::accelerator::DeviceGuard;

// The stream that torch works on.
inline cudaStream_t current_stream(const torch::stable::Tensor& like) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace ksm
