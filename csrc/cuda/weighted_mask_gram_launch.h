// The launchers of weighted_mask_gram.cu; see bind.h.
#pragma once

#include "cuda/mask_gram_launch.h"
#include "mask_weights.h"

namespace ksm {

// terms[nibble, value]: what the kernel's values are joined from.
template <typename T>
cudaError_t launch_nibble_terms(MaskKernel kernel,
                                const T* weights,  // (n)
                                int64_t n,
                                T* terms,  // (nibbles_of(n), kNibbleValues)
                                cudaStream_t stream);

// Masks without sizes, and the terms of their kernel.
template <typename T>
struct WeightedMasks {
  MaskSet x, y;
  int64_t n;
  MaskKernel kernel;
  const T* terms;  // (nibbles_of(n), kNibbleValues)
};

// symmetric: y is x, and so are their factors.
template <typename T>
cudaError_t launch_weighted_mask_gram(const WeightedMasks<T>& masks, bool symmetric,
                                      const T* x_factors,  // (x.count), or null
                                      const T* y_factors,  // (y.count), or null
                                      T* out,              // (x.count, y.count)
                                      cudaStream_t stream);

// See launch_mask_gram_matmul.
template <typename T>
cudaError_t launch_weighted_mask_gram_matmul(const WeightedMasks<T>& masks,
                                             const T* v,  // (y.count, t)
                                             int64_t t,
                                             double* partials,  // (splits, x.count, t), scratch
                                             T* out,            // (x.count, t)
                                             cudaStream_t stream);

}  // namespace ksm
