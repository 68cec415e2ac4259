// The checked arguments of gram_update, task_gram and kernel_gram; both backends take them from
// here.
#pragma once

#include <algorithm>
#include <optional>

#include "gemm.h"
#include "gram.h"
#include "task_blocks.h"

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
                  "kind must be the number of a kernel, got ", kind, ". See gram.h.");
  STD_TORCH_CHECK(degree >= 1, "degree must be at least 1, got ", degree, ". Use 2 or 3.");
  return {static_cast<KernelKind>(kind), gamma, coef0, degree};
}

// A symmetric matrix is computed in strips of rows, each from its diagonal on: of the k^2 products
// of columns at most 5/8 remain, and GEMM still gets wide matrices.
inline int64_t rows_per_strip(int64_t k) { return std::clamp<int64_t>((k + 3) / 4, 16, 128); }

}  // namespace ksm
