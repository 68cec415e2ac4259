// The Hessian of softmax cross-entropy on CUDA: the kernel of softmax_hvp.cu as operators.
#include "cuda/bind.h"
#include "cuda/softmax_hvp_launch.h"
#include "softmax_hvp.h"

namespace ksm {
namespace {

void softmax_hvp_into(const Tensor& logits, const Tensor& tangents,
                      const std::optional<Tensor>& weights, SoftmaxSizes sizes, Tensor& out) {
  if (sizes.s * sizes.b * sizes.c == 0) return;
  const DeviceGuard guard(logits.get_device_index());
  for_dtype(logits.scalar_type(), [&](auto type) {
    using T = decltype(type);
    STD_CUDA_CHECK(launch_softmax_hvp(logits.const_data_ptr<T>(), tangents.const_data_ptr<T>(),
                                      weights ? weights->const_data_ptr<T>() : nullptr, sizes.s,
                                      sizes.b, sizes.c, out.mutable_data_ptr<T>(),
                                      current_stream(logits)));
  });
}

Tensor softmax_hvp_cuda(const Tensor& logits, const Tensor& tangents,
                        const std::optional<Tensor>& weights) {
  const SoftmaxSizes sizes = checked_softmax_sizes(logits, tangents, weights);
  Tensor out = torch::stable::new_empty(tangents, {sizes.s, sizes.b, sizes.c});
  softmax_hvp_into(logits, tangents, weights, sizes, out);
  return out;
}

void softmax_hvp_in_place_cuda(Tensor tangents, const Tensor& logits,
                               const std::optional<Tensor>& weights) {
  const SoftmaxSizes sizes = checked_softmax_sizes(logits, tangents, weights);
  softmax_hvp_into(logits, tangents, weights, sizes, tangents);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CUDA, m) {
  m.impl("softmax_hvp", TORCH_BOX(&softmax_hvp_cuda));
  m.impl("softmax_hvp_", TORCH_BOX(&softmax_hvp_in_place_cuda));
}

}  // namespace ksm
