// Subset masks as bits, and one entry of their kernel matrix.
//
// A mask is n bits in words_of(n) words of 64 bits: task j is bit j % 64 of word j / 64, and the bits
// past n are zero. An entry of the kernel matrix is a table's own value, or one rounded sum of two,
// so that it is the same number on every device.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace ksm {

constexpr int64_t kBitsPerWord = 64;

KSM_HOST_DEVICE constexpr int64_t words_of(int64_t n) {
  return (n + kBitsPerWord - 1) / kBitsPerWord;
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

// |x ^ y| = |x| + |y| - 2 |x & y|: one overlap count serves both tables.
KSM_HOST_DEVICE constexpr int64_t hamming_of(int64_t x_size, int64_t y_size, int64_t overlap) {
  return x_size + y_size - 2 * overlap;
}

// The values of A (of Hamming distances) and B (of overlaps); a null pointer is an absent table, read
// as zero.
template <typename T>
struct Tables {
  const T* hamming;  // (n + 1)
  const T* overlap;  // (n + 1)
};

// A[hamming] + B[overlap] of a pair, from the sizes of its masks (used only with A) and its overlap.
template <typename T>
KSM_HOST_DEVICE inline T entry_of(const Tables<T>& tables, int64_t x_size, int64_t y_size,
                                  int64_t overlap) {
  if (!tables.hamming) return tables.overlap[overlap];
  const T a = tables.hamming[hamming_of(x_size, y_size, overlap)];
  return tables.overlap ? a + tables.overlap[overlap] : a;
}

}  // namespace ksm
