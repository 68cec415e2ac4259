// Gram matrices of weighted distances between packed masks on CUDA: the kernels of
// weighted_mask_gram.cu as operators.
#include "cuda/bind.h"
#include "cuda/weighted_mask_gram_launch.h"
#include "weighted_mask_gram.h"

namespace ksm {
namespace {

// The terms of the kernel, on the device.
template <typename T>
Tensor nibble_terms(const Tensor& weights, MaskKernel kernel) {
  const int64_t n = weights.size(0);
  Tensor terms = torch::stable::new_empty(weights, {nibbles_of(n), kNibbleValues});
  if (n > 0) {
    STD_CUDA_CHECK(launch_nibble_terms<T>(kernel, weights.const_data_ptr<T>(), n,
                                          terms.mutable_data_ptr<T>(), current_stream(weights)));
  }
  return terms;
}

template <typename T>
WeightedMasks<T> weighted_masks(const Tensor& x, const Tensor& y, const GramSizes& sizes,
                                MaskKernel kernel, const Tensor& terms) {
  return {{words_pointer(x), nullptr, sizes.m},
          {words_pointer(y), nullptr, sizes.l},
          sizes.n,
          kernel,
          terms.const_data_ptr<T>()};
}

Tensor weighted_mask_gram_cuda(const Tensor& x, const MaybeTensor& maybe_y, int64_t num_tasks,
                               const Tensor& weights, int64_t kernel, const MaybeTensor& x_factors,
                               const MaybeTensor& y_factors) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const GramSizes sizes = checked_weighted_sizes(x, y, num_tasks, weights, kernel);
  check_factors(x_factors, y_factors, maybe_y, sizes, weights);
  const DeviceGuard guard(x.get_device_index());
  Tensor out = torch::stable::new_empty(weights, {sizes.m, sizes.l});
  if (sizes.m == 0 || sizes.l == 0) return out;
  for_dtype(weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto kind = static_cast<MaskKernel>(kernel);
    const Tensor terms = nibble_terms<T>(weights, kind);
    const T* a = pointer_of<T>(x_factors);
    STD_CUDA_CHECK(launch_weighted_mask_gram<T>(weighted_masks<T>(x, y, sizes, kind, terms),
                                                !maybe_y, a, maybe_y ? pointer_of<T>(y_factors) : a,
                                                out.mutable_data_ptr<T>(), current_stream(x)));
  });
  return out;
}

Tensor weighted_mask_gram_matmul_cuda(const Tensor& x, const MaybeTensor& maybe_y,
                                      int64_t num_tasks, const Tensor& weights, int64_t kernel,
                                      const Tensor& v) {
  const Tensor& y = maybe_y ? *maybe_y : x;
  const GramSizes sizes = checked_weighted_sizes(x, y, num_tasks, weights, kernel);
  check_multiplied(v, x, sizes.l, weights.scalar_type());
  const DeviceGuard guard(x.get_device_index());
  const int64_t t = v.size(1);
  Tensor out = torch::stable::new_empty(weights, {sizes.m, t});
  if (sizes.m == 0 || t == 0) return out;
  const int64_t splits = num_column_splits(sizes.m, sizes.l, t);
  Tensor partials = torch::stable::new_empty(weights, {splits, sizes.m, t}, ScalarType::Double);
  for_dtype(weights.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const auto kind = static_cast<MaskKernel>(kernel);
    const Tensor terms = nibble_terms<T>(weights, kind);
    STD_CUDA_CHECK(launch_weighted_mask_gram_matmul<T>(
        weighted_masks<T>(x, y, sizes, kind, terms), v.const_data_ptr<T>(), t,
        partials.mutable_data_ptr<double>(), out.mutable_data_ptr<T>(), current_stream(x)));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CUDA, m) {
  m.impl("weighted_mask_gram", TORCH_BOX(&weighted_mask_gram_cuda));
  m.impl("weighted_mask_gram_matmul", TORCH_BOX(&weighted_mask_gram_matmul_cuda));
}

}  // namespace ksm
