// Gram matrices of real features; cpu/gram.cpp and cuda/gram.cu share this contract.
//
//     gram_update:  G += X^T diag(w) X                         X: (b, k)   w: (b)   G: (k, k)
//     task_gram:    G[a] = X_a^T diag(w_a) Y_a                 Y: (b, t)            G: (n, k, t)
//     kernel_gram:  K[i, j] = kernel(x_i, y_j)                 x: (m, n)   y: (l, n)   K: (m, l)
//
// X_a are the rows task_offsets[a] .. task_offsets[a + 1] of X. A symmetric G is computed on and
// above its diagonal and mirrored. Products are the GEMM of torch (on CUDA, large ones in float32 those of
// cuda/tensor_gram.cu); the rest happens on tiles of its result while they are in the caches.
#pragma once

#include <cstdint>

#include "series.h"

namespace ksm {

// The order of the names in ops/gram.py.
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
