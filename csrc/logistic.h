// The logistic loss of one margin z, with its first two derivatives.
//
//     loss = log(1 + e^-z)     slope = d loss / dz = -sigma(-z)     curvature = sigma(z) sigma(-z)
#pragma once

#include "series.h"

namespace ksm {

// bfloat16 is the upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

namespace {

template <typename T>
struct Logistic {
  T loss, slope, curvature;
};

template <typename T>
KSM_HOST_DEVICE inline Logistic<T> logistic_of(T z) {
  const T e = exp_of_minus(z < 0 ? -z : z);  // at most 1: nothing overflows
  const T likelier = T(1) / (T(1) + e);      // sigma(|z|)
  const T rarer = e * likelier;              // sigma(-|z|)
  return {(z < 0 ? -z : T(0)) + log_of_one_plus(e), -(z < 0 ? likelier : rarer), likelier * rarer};
}

KSM_HOST_DEVICE inline float widened(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float wide;
  memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
KSM_HOST_DEVICE inline float widened(float value) { return value; }
KSM_HOST_DEVICE inline double widened(double value) { return value; }

// Rounds a curvature for storage, to nearest and ties to even. No curvature is infinite or NaN
// unless its margin was NaN, which stays one.
template <typename C>
struct Stored {
  template <typename T>
  KSM_HOST_DEVICE static C of(T value) {
    return static_cast<C>(value);
  }
};

template <>
struct Stored<BFloat16> {
  template <typename T>
  KSM_HOST_DEVICE static BFloat16 of(T value) {
    const float narrow = static_cast<float>(value);
    uint32_t bits;
    memcpy(&bits, &narrow, sizeof(bits));
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return {static_cast<uint16_t>(narrow == narrow ? rounded : 0x7fc0)};
  }
};

}  // namespace
}  // namespace ksm
