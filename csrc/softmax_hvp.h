// The Hessian of softmax cross-entropy over its logits, times many tangents; cpu/softmax_hvp.cpp
// and cuda/softmax_hvp.cu share this contract.
//
//     p_i     = softmax(logits_i)
//     out_ri  = weights_i p_i o (tangents_ri - <p_i, tangents_ri>)
//
// logits: (b, c); tangents, out: (s, b, c); weights: (b), 1 without. Out may be the tangents
// themselves. A logit of -inf is a class that cannot be: its probability and its entries are 0.
//
// The probabilities of a row are computed once for many tangents, each of which is read from memory
// once and written once. Nothing of size (s, b, c) exists beside the result.
#pragma once

#include <optional>

#include "checks.h"

namespace ksm {

struct SoftmaxSizes {
  int64_t s, b, c;
};

inline SoftmaxSizes checked_softmax_sizes(const Tensor& logits, const Tensor& tangents,
                                          const std::optional<Tensor>& weights) {
  check_contiguous(logits, "logits", 2);
  check_contiguous(tangents, "tangents", 3);
  const ScalarType dtype = logits.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                  "logits must be float32 or float64, got another dtype. Convert them.");
  const int64_t b = logits.size(0), c = logits.size(1);
  STD_TORCH_CHECK(tangents.size(1) == b && tangents.size(2) == c, "tangents must be of shape (s, ",
                  b, ", ", c, "), got (", tangents.size(0), ", ", tangents.size(1), ", ",
                  tangents.size(2), "). Give each the shape of the logits.");
  const auto check_like_logits = [&](const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == dtype, name,
                    " must be of the dtype of the logits, got another one. Convert it.");
    STD_TORCH_CHECK(tensor.device() == logits.device(), name,
                    " must be on the device of the logits, got another one. Move it.");
  };
  check_like_logits(tangents, "tangents");
  if (weights) {
    check_contiguous(*weights, "weights", 1);
    STD_TORCH_CHECK(weights->size(0) == b, "weights must be of ", b, " values, got ",
                    weights->size(0), ". Give one per row of the logits.");
    check_like_logits(*weights, "weights");
  }
  return {tangents.size(0), b, c};
}

}  // namespace ksm
