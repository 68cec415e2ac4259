// Kernels of a weighted Hamming distance between packed masks, and products with their Gram matrix;
// cpu/weighted_mask_gram.cpp and cuda/weighted_mask_gram.cu share this contract.
//
//     weighted_mask_gram:         K[i, j] = a_i b_j kernel(sum of w_k over the tasks k of x_i ^ y_j)
//     weighted_mask_gram_matmul:  out = K v, with a = b = 1
//
// x: (m, words_of(n)) int64   y: (l, words_of(n)) int64   w: (n)   a: (m)   b: (l)   K: (m, l)
// v: (l, t)   out: (m, t). Factors a and b are given both or neither, and are one tensor where y is x.
// For masks see packed_masks.h, for values mask_weights.h.
#pragma once

#include "mask_gram.h"
#include "mask_weights.h"

namespace ksm {

inline GramSizes checked_weighted_sizes(const Tensor& x, const Tensor& y, int64_t n,
                                        const Tensor& weights, int64_t kernel) {
  check_packed(x, "x", n);
  check_packed(y, "y", n);
  check_same_device(y, "y", x);
  check_contiguous(weights, "weights", 1);
  check_same_device(weights, "weights", x);
  const ScalarType dtype = weights.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "weights must be of dtype float32 or float64, got another dtype. Convert them.");
  STD_TORCH_CHECK(weights.size(0) == n, "weights must be of ", n, " values, got ", weights.size(0),
                  ". Pass one per task.");
  STD_TORCH_CHECK(0 <= kernel && kernel < static_cast<int64_t>(MaskKernel::kCount),
                  "kernel must be the number of a kernel, got ", kernel, ". See mask_weights.h.");
  return {x.size(0), y.size(0), n};
}

inline void check_factors(const MaybeTensor& factors, const char* name, int64_t count,
                          const Tensor& weights) {
  if (!factors) return;
  check_contiguous(*factors, name, 1);
  check_same_device(*factors, name, weights);
  STD_TORCH_CHECK(factors->size(0) == count, name, " must be of ", count, " values, got ",
                  factors->size(0), ". Pass one per mask.");
  STD_TORCH_CHECK(factors->scalar_type() == weights.scalar_type(), name,
                  " must be of the dtype of weights, got another dtype. Convert one of them.");
}

// Both factors, or neither. Without y those of x serve both sides.
inline void check_factors(const MaybeTensor& x_factors, const MaybeTensor& y_factors,
                          const MaybeTensor& y, const GramSizes& sizes, const Tensor& weights) {
  check_factors(x_factors, "x_factors", sizes.m, weights);
  check_factors(y_factors, "y_factors", sizes.l, weights);
  STD_TORCH_CHECK(y_factors.has_value() == (y && x_factors),
                  "y_factors must be given exactly where y and x_factors are, got another "
                  "combination. Without y, x_factors serves both sides.");
}

}  // namespace ksm
