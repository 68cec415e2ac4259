// Kernels of a weighted Hamming distance between masks, and the arithmetic of one value.
//
//     d = sum of weights[k] over the tasks k in which two masks differ
//     kRbf: exp(-d)     kExponential: exp(-sqrt(d))
//
// Four tasks at a time: the 16 possible terms of a nibble are tabulated once, and a value is joined
// from those that the nibbles of x ^ y select, the first nibble first. The terms of kRbf are
// exponentials already, and multiplied: no exponential is left for a pair. Table and order depend on
// nothing else, hence values are the same bits on every device, and with x and y exchanged.
//
// Products below twice the smallest normal number are zero. Then it does not matter whether subnormal
// numbers on the way became zero, as a CPU must let them: they take it 20 times as long.
#pragma once

#include <cstdint>

#include "series.h"

namespace ksm {

// The order of the names in ksm_ext/ops/weighted_mask_gram.py.
enum class MaskKernel : int64_t { kRbf, kExponential, kCount };

constexpr int64_t kNibbleBits = 4, kNibbleValues = 16, kNibblesPerWord = 16;

KSM_HOST_DEVICE constexpr int64_t nibbles_of(int64_t n) {
  return (n + kNibbleBits - 1) / kNibbleBits;
}

namespace {

// The term of a nibble's four tasks that differ where `bits` are set.
template <typename T>
KSM_HOST_DEVICE inline T nibble_term(MaskKernel kernel,
                                     const T* weights,  // (n)
                                     int64_t n, int64_t nibble, int64_t bits) {
  double distance = 0;
  for (int64_t q = 0; q < kNibbleBits; ++q) {
    const int64_t task = nibble * kNibbleBits + q;
    if (task < n && (bits >> q & 1)) distance += static_cast<double>(weights[task]);
  }
  return static_cast<T>(kernel == MaskKernel::kRbf ? exp_of_minus(distance) : distance);
}

template <typename T>
KSM_HOST_DEVICE inline T normal_or_zero(T product) {
  constexpr T kLeast = static_cast<T>(sizeof(T) == sizeof(float) ? 0x1p-125 : 0x1p-1021);
  return product < kLeast ? T(0) : product;
}

}  // namespace
}  // namespace ksm
