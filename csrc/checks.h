// Argument checks in the one message form of the library:
//     <name> must be <expected>, got <found>. <what to do>.
//
// ksm_ext/ops checks meaning and speaks first; what is checked here would corrupt memory.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

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

// ---- samples grouped by task: those of task a are rows task_offsets[a] .. task_offsets[a + 1] ----

// Offsets and masks are read by the host, on every device: they decide the sizes of GEMMs.
inline void check_on_host(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, " must be on the CPU, got another device. Move it with ",
                  ".cpu().");
}

inline void check_task_offsets(const Tensor& task_offsets, int64_t b) {
  check_contiguous(task_offsets, "task_offsets", 1);
  check_on_host(task_offsets, "task_offsets");
  STD_TORCH_CHECK(task_offsets.scalar_type() == ScalarType::Long,
                  "task_offsets must be of dtype int64, got another dtype. Convert it.");
  const int64_t n = task_offsets.size(0) - 1;
  STD_TORCH_CHECK(n >= 0, "task_offsets must be of num_tasks + 1 values, got none. Start with 0.");
  const int64_t* offsets = task_offsets.const_data_ptr<int64_t>();
  STD_TORCH_CHECK(offsets[0] == 0 && offsets[n] == b, "task_offsets must be 0 first and ", b,
                  " samples last, got ", offsets[0], " and ", offsets[n],
                  ". Sort the samples by task and accumulate their counts.");
  for (int64_t a = 0; a < n; ++a) {
    STD_TORCH_CHECK(offsets[a] <= offsets[a + 1], "task_offsets must be non-decreasing, got ",
                    offsets[a], " before ", offsets[a + 1], ". Accumulate the counts of samples.");
  }
}

inline void check_features(const Tensor& features, const char* name) {
  check_contiguous(features, name, 2);
  const ScalarType dtype = features.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double, name,
                  " must be of dtype float32 or float64, got another dtype. Convert it.");
}

// A vector or matrix beside the features.
inline void check_beside(const Tensor& tensor, const char* name, const Tensor& features,
                         std::vector<int64_t> shape) {
  check_contiguous(tensor, name, static_cast<int64_t>(shape.size()));
  STD_TORCH_CHECK(tensor.device() == features.device(), name,
                  " must be on the device of the features, got another one. Move it.");
  STD_TORCH_CHECK(tensor.scalar_type() == features.scalar_type(), name,
                  " must be of the dtype of the features, got another dtype. Convert it.");
  for (size_t d = 0; d < shape.size(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == shape[d], name, " must be of ", shape[d],
                    " entries in dimension ", d, ", got ", tensor.size(d),
                    ". Its shape follows from the other arguments.");
  }
}

// ---- data and dtypes ----

// Null where there is no tensor.
template <typename T>
const T* pointer_of(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

// Calls body with a value of the C++ type of a dtype that was checked to be float32 or float64.
template <typename Body>
void for_dtype(ScalarType dtype, const Body& body) {
  dtype == ScalarType::Float ? body(float{}) : body(double{});
}

}  // namespace ksm
