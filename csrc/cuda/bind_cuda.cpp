// The CUDA kernels of the operators on masks: tensors above, raw pointers and launchers (kernels.h) below.
#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/kernels.h"
#include "cuda/stream.h"
#include "mask_gram_args.h"
#include "pack_masks.h"
#include "project_args.h"

namespace ksm {
namespace {

using torch::stable::accelerator::DeviceGuard;

Tensor pack_masks_cuda(const Tensor& masks) {
  check_masks(masks);
  const DeviceGuard guard(masks.get_device_index());
  const int64_t m = masks.size(0), n = masks.size(1);
  Tensor out = torch::stable::new_empty(masks, {m, words_of(n)}, ScalarType::Long);
  if (m == 0 || n == 0) return out;
  STD_CUDA_CHECK(launch_pack_masks(
      reinterpret_cast<const uint8_t*>(masks.const_data_ptr<bool>()), m, n,
      reinterpret_cast<uint64_t*>(out.mutable_data_ptr<int64_t>()), current_stream(masks)));
  return out;
}

// Packed masks on the device together with their sizes, where these are needed.
class MasksWithSizes {
 public:
  MasksWithSizes(const Tensor& masks, bool with_sizes)
      : sizes_(torch::stable::new_empty(masks, {with_sizes ? masks.size(0) : 0}, ScalarType::Int)),
        set_{words_pointer(masks), with_sizes ? sizes_.const_data_ptr<int32_t>() : nullptr,
             masks.size(0)} {
    if (sizes_.size(0) == 0) return;
    STD_CUDA_CHECK(launch_mask_sizes(set_.words, set_.count, masks.size(1),
                                     sizes_.mutable_data_ptr<int32_t>(), current_stream(masks)));
  }

  const MaskSet& set() const { return set_; }

 private:
  Tensor sizes_;  // (m) int32
  MaskSet set_;
};

Tensor mask_gram_cuda(const Tensor& x, const MaybeTensor& maybe_y, int64_t num_tasks,
                      const MaybeTensor& hamming_table, const MaybeTensor& overlap_table) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const auto [m, l, n] = checked_sizes(x, y, num_tasks, hamming_table, overlap_table);
  const DeviceGuard guard(x.get_device_index());
  const Tensor& like = result_like(hamming_table, overlap_table);
  Tensor out = torch::stable::new_empty(like, {m, l});
  if (m == 0 || l == 0) return out;
  const MasksWithSizes rows(x, hamming_table.has_value());
  const MasksWithSizes columns = maybe_y ? MasksWithSizes(y, hamming_table.has_value()) : rows;
  for_dtype(like.scalar_type(), [&, n = n](auto type) {
    using T = decltype(type);
    STD_CUDA_CHECK(launch_mask_gram<T>(rows.set(), columns.set(), !maybe_y, n,
                                       tables_of<T>(hamming_table, overlap_table),
                                       out.mutable_data_ptr<T>(), current_stream(x)));
  });
  return out;
}

Tensor mask_gram_matmul_cuda(const Tensor& x, const MaybeTensor& maybe_y, int64_t num_tasks,
                             const MaybeTensor& hamming_table, const MaybeTensor& overlap_table,
                             const Tensor& v) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const auto [m, l, n] = checked_sizes(x, y, num_tasks, hamming_table, overlap_table);
  const Tensor& like = result_like(hamming_table, overlap_table);
  check_multiplied(v, x, l, like.scalar_type());
  const DeviceGuard guard(x.get_device_index());
  const int64_t t = v.size(1);
  Tensor out = torch::stable::new_empty(like, {m, t});
  if (m == 0 || t == 0) return out;
  const MasksWithSizes rows(x, hamming_table.has_value());
  const MasksWithSizes columns = maybe_y ? MasksWithSizes(y, hamming_table.has_value()) : rows;
  Tensor partials =
      torch::stable::new_empty(like, {num_column_splits(m, l, t), m, t}, ScalarType::Double);
  for_dtype(like.scalar_type(), [&, n = n](auto type) {
    using T = decltype(type);
    STD_CUDA_CHECK(launch_mask_gram_matmul<T>(
        rows.set(), columns.set(), n, tables_of<T>(hamming_table, overlap_table),
        v.const_data_ptr<T>(), t, partials.mutable_data_ptr<double>(), out.mutable_data_ptr<T>(),
        current_stream(x)));
  });
  return out;
}

template <typename From, typename T>
void project_on_stream(const Projection& projection, int64_t offset, const Tensor& x,
                       const Tensor& y) {
  const int64_t b = x.size(0), p = x.size(1);
  Tensor scratch = torch::stable::new_empty(y, {project_scratch(projection, offset, b, p)});
  STD_CUDA_CHECK((launch_project<From, T>(
      projection, offset, static_cast<const From*>(x.const_data_ptr()), x.stride(0), b, p,
      scratch.mutable_data_ptr<T>(), y.mutable_data_ptr<T>(), current_stream(x))));
}

void project_cuda(const Tensor& y, const Tensor& x, int64_t offset, int64_t k, int64_t kind,
                  int64_t seed, int64_t sparsity, bool hadamard) {
  const Projection projection = checked_projection(k, kind, seed, sparsity, hadamard);
  check_projected(y, x, k, offset);
  if (x.size(0) == 0 || x.size(1) == 0) return;
  const DeviceGuard guard(x.get_device_index());
  switch (x.scalar_type()) {
    case ScalarType::Float: return project_on_stream<float, float>(projection, offset, x, y);
    case ScalarType::BFloat16:
      return project_on_stream<__nv_bfloat16, float>(projection, offset, x, y);
    case ScalarType::Half: return project_on_stream<__half, float>(projection, offset, x, y);
    default: return project_on_stream<double, double>(projection, offset, x, y);
  }
}

Tensor project_adjoint_cuda(const Tensor& y, int64_t num_coordinates, int64_t offset, int64_t k,
                            int64_t kind, int64_t seed, int64_t sparsity, bool hadamard) {
  const Projection projection = checked_projection(k, kind, seed, sparsity, hadamard);
  check_unprojected(y, k, num_coordinates, offset);
  const DeviceGuard guard(y.get_device_index());
  const int64_t b = y.size(0), p = num_coordinates;
  Tensor x = torch::stable::new_empty(y, {b, p});
  if (b == 0 || p == 0) return x;
  Tensor scratch = torch::stable::new_empty(y, {project_adjoint_scratch(projection, b, p)});
  for_dtype(y.scalar_type(), [&](auto type) {
    using T = decltype(type);
    STD_CUDA_CHECK(launch_project_adjoint<T>(projection, offset, y.const_data_ptr<T>(), b, p,
                                             scratch.mutable_data_ptr<T>(), x.mutable_data_ptr<T>(),
                                             current_stream(y)));
  });
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CUDA, m) {
  m.impl("pack_masks", TORCH_BOX(&pack_masks_cuda));
  m.impl("mask_gram", TORCH_BOX(&mask_gram_cuda));
  m.impl("mask_gram_matmul", TORCH_BOX(&mask_gram_matmul_cuda));
  m.impl("project_", TORCH_BOX(&project_cuda));
  m.impl("project_adjoint", TORCH_BOX(&project_adjoint_cuda));
}

}  // namespace ksm

// Importing ksm_ext._C_cuda loads this library, which registers the kernels; the module is empty.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, nullptr};
  return PyModule_Create(&module);
}
