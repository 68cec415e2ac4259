// Packing masks on the CPU.
#include "pack_masks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>

namespace ksm {
namespace {

Tensor pack_masks_cpu(const Tensor& masks) {
  check_masks(masks);
  const int64_t m = masks.size(0), n = masks.size(1), words = words_of(n);
  Tensor out = torch::stable::new_empty(masks, {m, words}, ScalarType::Long);
  const auto* in = reinterpret_cast<const uint8_t*>(masks.const_data_ptr<bool>());
  int64_t* packed = out.mutable_data_ptr<int64_t>();
  constexpr int64_t kTasksPerThread = 1 << 19;  // some 50 us of work
  torch::stable::parallel_for(
      0, m, std::max<int64_t>(1, kTasksPerThread / (n + 1)), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          for (int64_t w = 0; w < words; ++w) {
            const int64_t j = w * kBitsPerWord;
            packed[i * words + w] =
                static_cast<int64_t>(pack_word(in + i * n + j, std::min(kBitsPerWord, n - j)));
          }
        }
      });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CPU, m) { m.impl("pack_masks", TORCH_BOX(&pack_masks_cpu)); }

}  // namespace ksm
