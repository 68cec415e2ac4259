// Kernels between sets of subset masks, from packed bits and tables; cpu/mask_gram.cpp and
// cuda/mask_gram.cu share this contract.
//
//     K[i, j] = A[hamming(x_i, y_j)] + B[overlap(x_i, y_j)]      x: (m, n)   y: (l, n)   K: (m, l)
//
// Every kernel on 0/1 masks that is a function of distances and inner products has this form; A or
// B (n + 1 entries each) may be absent. A mask is n bits in words(n) 64-bit words: task j is bit
// j % 64 of word j / 64, and the bits past n are zero. An entry of K is a table's own value, or one
// rounded sum of two, so that it is the same number on every device.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace ksm {

constexpr int64_t kBitsPerWord = 64;

KSM_HOST_DEVICE constexpr int64_t words_of(int64_t n) {
  return (n + kBitsPerWord - 1) / kBitsPerWord;
}

// |x ^ y| = |x| + |y| - 2 |x & y|: one overlap count serves both tables.
KSM_HOST_DEVICE constexpr int64_t hamming_of(int64_t x_size, int64_t y_size, int64_t overlap) {
  return x_size + y_size - 2 * overlap;
}

// The values of A and B; a null pointer is an absent table, read as zero.
template <typename T>
struct Tables {
  const T* hamming;  // (n + 1)
  const T* overlap;  // (n + 1)
};

// K[i, j] from the sizes |x_i|, |y_j| (used only with A) and the overlap of the pair.
template <typename T>
KSM_HOST_DEVICE inline T entry_of(const Tables<T>& tables, int64_t x_size, int64_t y_size,
                                  int64_t overlap) {
  if (!tables.hamming) return tables.overlap[overlap];
  const T a = tables.hamming[hamming_of(x_size, y_size, overlap)];
  return tables.overlap ? a + tables.overlap[overlap] : a;
}

}  // namespace ksm
