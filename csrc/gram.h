// Gram matrices of real features; cpu/gram.cpp and cuda/gram*.cu share this contract.
//
//     gram_update:  G += X^T diag(w) X                         X: (b, k)   w: (b)   G: (k, k)
//     task_gram:    G[a] = X_a^T diag(w_a) Y_a                 Y: (b, t)            G: (n, k, t)
//     kernel_gram:  K[i, j] = kernel(x_i, y_j)                 x: (m, n)   y: (l, n)   K: (m, l)
//
// X_a are the rows task_offsets[a] .. task_offsets[a + 1] of X. A symmetric G is computed on and
// above its diagonal and mirrored. Products are the GEMM of torch (on CUDA, large ones in
// float32 those of cuda/gram_tensor_cores.cu); the rest happens on tiles of its result while they are
// in the caches.
#pragma once

#include <algorithm>
#include <optional>

#include "gemm.h"
#include "kernel_value.h"

namespace ksm {

inline void check_gram_update(const Tensor& gram, const Tensor& features,
                              const std::optional<Tensor>& weights) {
  check_features(features, "features");
  const int64_t k = features.size(1);
  check_beside(gram, "gram", features, {k, k});
  if (weights) check_beside(*weights, "weights", features, {features.size(0)});
}

inline void check_task_gram(const Tensor& features, const Tensor& task_offsets,
                            const std::optional<Tensor>& other,
                            const std::optional<Tensor>& weights) {
  check_features(features, "features");
  const int64_t b = features.size(0);
  check_task_offsets(task_offsets, b);
  if (other) {
    check_contiguous(*other, "other", 2);
    check_beside(*other, "other", features, {b, other->size(1)});
  }
  if (weights) check_beside(*weights, "weights", features, {b});
}

inline KernelParameters checked_kernel(const Tensor& x, const std::optional<Tensor>& y,
                                       int64_t kind, double gamma, double coef0, int64_t degree) {
  check_features(x, "x");
  if (y) {
    check_contiguous(*y, "y", 2);
    check_beside(*y, "y", x, {y->size(0), x.size(1)});
  }
  STD_TORCH_CHECK(0 <= kind && kind < static_cast<int64_t>(KernelKind::kCount),
                  "kind must be the number of a kernel, got ", kind, ". See kernel_value.h.");
  STD_TORCH_CHECK(degree >= 1, "degree must be at least 1, got ", degree, ". Use 2 or 3.");
  return {static_cast<KernelKind>(kind), gamma, coef0, degree};
}

// A symmetric matrix is computed in strips of rows, each from its diagonal on: of the k^2 products
// of columns at most 5/8 remain, and GEMM still gets wide matrices.
inline int64_t rows_per_strip(int64_t k) { return std::clamp<int64_t>((k + 3) / 4, 16, 128); }

}  // namespace ksm
