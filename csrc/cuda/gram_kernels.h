// The launchers of gram.cu; see kernels.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "gram.h"

namespace ksm {

// out[i, c] = weights[i] x[i, c]
template <typename T>
cudaError_t launch_weigh_rows(const T* x,        // (b, k)
                              const T* weights,  // (b)
                              int64_t b, int64_t k,
                              T* out,  // (b, k)
                              cudaStream_t stream);

// matrix[j, i] = matrix[i, j] for i < j, of every matrix.
template <typename T>
cudaError_t launch_mirror(T* matrices,  // (count, k, k)
                          int64_t count, int64_t k, cudaStream_t stream);

// squares[i] = ||x_i||^2, added up in float64.
template <typename T>
cudaError_t launch_row_squares(const T* x,  // (m, n)
                               int64_t m, int64_t n,
                               T* squares,  // (m)
                               cudaStream_t stream);

// values[i, j] = ||x_i - y_j||_1
template <typename T>
cudaError_t launch_absolute_distances(const T* x,  // (m, n)
                                      int64_t m,
                                      const T* y,  // (l, n)
                                      int64_t l, int64_t n,
                                      T* values,  // (m, l)
                                      cudaStream_t stream);

// values become the kernel of their pairs from their dot products, or with kLaplace distances. If
// symmetric, those below the diagonal are copies of those above, and distances on it are zero.
template <typename T>
cudaError_t launch_kernel_values(KernelParameters kernel, const T* x_squares, const T* y_squares,
                                 int64_t m, int64_t l, bool symmetric,
                                 T* values,  // (m, l)
                                 cudaStream_t stream);

}  // namespace ksm
