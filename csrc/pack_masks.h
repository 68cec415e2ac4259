// Masks as bits; cpu/pack_masks.cpp and cuda/pack_masks.cu share this contract.
//
//     bit j % 64 of out[i, j / 64] = masks[i, j]      masks: (m, n) bool   out: (m, words_of(n)) int64
//
// The bits past n are zero.
#pragma once

#include "checks.h"
#include "mask_gram.h"

namespace ksm {

inline void check_masks(const Tensor& masks) {
  check_contiguous(masks, "masks", 2);
  STD_TORCH_CHECK(masks.scalar_type() == ScalarType::Bool,
                  "masks must be of dtype bool, got another dtype. Convert it with .bool().");
}

}  // namespace ksm
