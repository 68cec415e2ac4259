// Masks as bits; cpu/pack_masks.cpp and cuda/pack_masks.cu share this contract.
//
//     bit j % 64 of out[i, j / 64] = masks[i, j]      masks: (m, n) bool   out: (m, words_of(n)) int64
//
// The bits past n are zero.
#pragma once

#include <cstring>

#include "checks.h"
#include "mask_gram.h"

namespace ksm {

inline void check_masks(const Tensor& masks) {
  check_contiguous(masks, "masks", 2);
  STD_TORCH_CHECK(masks.scalar_type() == ScalarType::Bool,
                  "masks must be of dtype bool, got another dtype. Convert it with .bool().");
}

// Up to 64 bytes as a word: eight of 0 or 1 become eight bits by one multiplication. (A bool of other
// memory may be another byte, which is true.)
inline uint64_t pack_word(const uint8_t* mask,  // (length)
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

}  // namespace ksm
