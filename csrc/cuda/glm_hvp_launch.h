// The launchers of glm_hvp.cu; see bind.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "logistic.h"
#include "packed_masks.h"

namespace ksm {

// to[r] = from[rows[r]]
template <typename T>
cudaError_t launch_gather_rows(const T* from, const int64_t* rows, int64_t count, int64_t k,
                               T* to,  // (count, k)
                               cudaStream_t stream);

// to[rows[r]] += from[r]; the rows are distinct.
template <typename T>
cudaError_t launch_add_rows(const T* from,  // (count, k)
                            const int64_t* rows, int64_t count, int64_t k, T* to,
                            cudaStream_t stream);

// Which samples belong to which subsets.
struct SubsetSamples {
  const uint64_t* masks;   // (m, words_of(n)), packed as in packed_masks.h
  const int64_t* offsets;  // (n + 1): the first sample of each task
  const int32_t* task_of;  // (b)
  int64_t b, n;

  KSM_HOST_DEVICE const uint64_t* mask(int64_t subset) const {
    return masks + subset * words_of(n);
  }
};

KSM_HOST_DEVICE inline bool has_task(const uint64_t* mask, int64_t task) {
  return mask[task / kBitsPerWord] >> task % kBitsPerWord & 1;
}

// task_of from the offsets.
cudaError_t launch_tasks_of_samples(const int64_t* offsets,  // (n + 1)
                                    int64_t n, int64_t b,
                                    int32_t* task_of,  // (b)
                                    cudaStream_t stream);

// A block of products of participating subsets with the samples begin .. end.
template <typename T>
struct ProductBlock {
  T* products;          // (count, end - begin)
  const int64_t* rows;  // (count): subsets, or null where they are 0, 1, ..
  int64_t count, begin, end;
  SubsetSamples sets;

  KSM_HOST_DEVICE int64_t samples() const { return end - begin; }
  KSM_HOST_DEVICE int64_t subset(int64_t row) const { return rows ? rows[row] : row; }
};

// products *= curvature inside the subsets (1 where it is null), 0 outside.
template <typename T, typename C>
cudaError_t launch_weigh_products(ProductBlock<T> block,
                                  const C* curvature,  // (m, b) or null
                                  cudaStream_t stream);

// The margins h + products: products become their slopes, 0 outside of the subsets, curvature
// (unless null) their curvatures inside; their losses are added to the subsets' objectives.
template <typename T, typename C>
cudaError_t launch_logistic_products(ProductBlock<T> block,
                                     const T* h,         // (b)
                                     C* curvature,       // (m, b) or null
                                     double* objective,  // (m)
                                     cudaStream_t stream);

// out_S = out_S / max(1, |S|) + ridge_S v_S; and, unless it is null,
// objective_S = objective_S / max(1, |S|) + ridge_S / 2 ||v_S||^2. |S| counts samples.
template <typename T>
cudaError_t launch_finish_subsets(SubsetSamples sets,
                                  const T* ridge,  // (m)
                                  const T* v,      // (m, k)
                                  int64_t m, int64_t k,
                                  T* out,             // (m, k)
                                  double* objective,  // (m) or null
                                  cudaStream_t stream);

}  // namespace ksm
