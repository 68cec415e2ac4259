// Packed masks and their Gram matrices on CUDA: the kernels of mask_gram.cu and mask_gram_matmul.cu as
// operators.
#include "cuda/bind.h"
#include "cuda/mask_gram_launch.h"
#include "mask_gram.h"

namespace ksm {
namespace {

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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CUDA, m) {
  m.impl("pack_masks", TORCH_BOX(&pack_masks_cuda));
  m.impl("mask_gram", TORCH_BOX(&mask_gram_cuda));
  m.impl("mask_gram_matmul", TORCH_BOX(&mask_gram_matmul_cuda));
}

}  // namespace ksm
