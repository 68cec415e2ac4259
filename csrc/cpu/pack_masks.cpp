// Packing masks on the CPU: eight bytes of 0 or 1 become eight bits by one multiplication. (A bool
// of other memory may be another byte, which is true.)
#include "pack_masks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>

namespace ksm {
namespace {

uint64_t pack_word(const uint8_t* mask,  // (length)
                   int64_t length) {
  uint8_t bytes[kBitsPerWord] = {};
  std::memcpy(bytes, mask, length);
  uint64_t word = 0;
  for (int64_t j = 0; j < kBitsPerWord; j += 8) {
    uint64_t eight = 0;
    for (int64_t q = 0; q < 8; ++q) eight |= uint64_t{bytes[j + q] != 0} << (8 * q);
    // The factor moves the bit of byte q to bit 56 + q; no two products meet below it.
    word |= (eight * 0x0102040810204080) >> 56 << j;
  }
  return word;
}

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
