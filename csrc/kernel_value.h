// The kernels of real vectors: what they are called, and the arithmetic of one value.
#pragma once

#include <cstdint>

#include "series.h"

namespace ksm {

// The order of the names in ksm_ext/ops/gram.py.
enum class KernelKind : int64_t { kLinear, kPolynomial, kRbf, kLaplace, kExponential, kCount };

struct KernelParameters {
  KernelKind kind;
  double gamma, coef0;
  int64_t degree;
};

namespace {

// base^exponent by squaring, for exponents of at least 1.
template <typename T>
KSM_HOST_DEVICE inline T power_of(T base, int64_t exponent) {
  T power = 1;
  for (; exponent > 1; exponent >>= 1, base *= base) {
    if (exponent & 1) power *= base;
  }
  return power * base;
}

// ||x - y||^2, clamped at zero against rounding; NaN stays.
template <typename T>
KSM_HOST_DEVICE inline T squared_distance(T x_square, T y_square, T dot) {
  const T distance = x_square + y_square - T(2) * dot;
  return distance < 0 ? T(0) : distance;
}

}  // namespace
}  // namespace ksm
