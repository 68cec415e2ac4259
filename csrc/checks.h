// Argument checks in the one message form of the library:
//     <name> must be <expected>, got <found>. <what to do>.
//
// ops.py checks meaning and speaks first; what is checked here would corrupt memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace ksm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_contiguous(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " must be ", dim, "-dimensional, got ", tensor.dim(),
                  " dimensions. Reshape it.");
  STD_TORCH_CHECK(tensor.is_contiguous(), name,
                  " must be contiguous, got a strided tensor. Call .contiguous() on it.");
}

inline void check_same_device(const Tensor& tensor, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(tensor.device() == x.device(), name, " must be on the device of x, got another ",
                  "one. Move it with .to(x.device).");
}

// Calls body with a value of the C++ type of a dtype that was checked to be float32 or float64.
template <typename Body>
void for_dtype(ScalarType dtype, const Body& body) {
  dtype == ScalarType::Float ? body(float{}) : body(double{});
}

}  // namespace ksm
