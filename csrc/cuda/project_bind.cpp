// Projections on CUDA: the kernels of project.cu as operators.
#include "cuda/bind.h"
#include "cuda/project_launch.h"
#include "project.h"

namespace ksm {
namespace {

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
  m.impl("project_", TORCH_BOX(&project_cuda));
  m.impl("project_adjoint", TORCH_BOX(&project_adjoint_cuda));
}

}  // namespace ksm
