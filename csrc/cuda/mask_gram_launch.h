// The launchers of mask_gram.cu and mask_gram_matmul.cu; see bind.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "packed_masks.h"

namespace ksm {

cudaError_t launch_pack_masks(const uint8_t* masks,  // (m, n) of 0 or 1
                              int64_t m, int64_t n,
                              uint64_t* out,  // (m, words_of(n))
                              cudaStream_t stream);

// sizes[i] = |x_i|, needed beside a Hamming table.
cudaError_t launch_mask_sizes(const uint64_t* masks,  // (m, words)
                              int64_t m, int64_t words,
                              int32_t* sizes,  // (m)
                              cudaStream_t stream);

// Packed masks of one side of a Gram matrix.
struct MaskSet {
  const uint64_t* words;  // (count, words_of(n))
  const int32_t* sizes;   // (count), or null without a Hamming table
  int64_t count;
};

// symmetric: y is x.
template <typename T>
cudaError_t launch_mask_gram(MaskSet x, MaskSet y, bool symmetric, int64_t n, Tables<T> tables,
                             T* out,  // (x.count, y.count)
                             cudaStream_t stream);

// Into how many ranges the columns are split, to occupy the GPU when rows are few: a function of
// the sizes alone, so that the order of summation is the same on every GPU.
int64_t num_column_splits(int64_t m, int64_t l, int64_t t);

template <typename T>
cudaError_t launch_mask_gram_matmul(MaskSet x, MaskSet y, int64_t n, Tables<T> tables,
                                    const T* v,  // (y.count, t)
                                    int64_t t,
                                    double* partials,  // (splits, x.count, t), scratch
                                    T* out,            // (x.count, t)
                                    cudaStream_t stream);

}  // namespace ksm
