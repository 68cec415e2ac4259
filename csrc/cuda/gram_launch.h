// The launchers of gram.cu and gram_tensor_cores.cu; see bind.h.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "kernel_value.h"

namespace ksm {

// Writes values of the host to the device as parameters of kernels, which read the host at once and
// may be captured in a graph, as a copy from pageable memory may not.
cudaError_t launch_write(const void* from, int64_t bytes, void* to, cudaStream_t stream);

// diag(w) X in float32, and the powers of two that its columns are multiplied by in float16.
struct WeightedColumns {
  const float* values;   // (b, columns)
  const float* weights;  // (b) or null
  int64_t columns;
  const float* scales;  // (columns)
};

// How many values launch_column_scales needs as scratch for each column.
int64_t scale_chunks(int64_t samples, int64_t columns);

// The scales for x, whose own are not read.
cudaError_t launch_column_scales(const WeightedColumns& x, int64_t samples,
                                 float* largest,  // (scale_chunks, columns), scratch
                                 float* scales,   // (columns)
                                 cudaStream_t stream);

// G[a] = X_a^T Y_a in float32, X with weights.
struct GramProblem {
  WeightedColumns x, y;    // (b, k), (b, t)
  const int64_t* offsets;  // (tasks + 1), on the device
  int64_t tasks;
  bool symmetric;   // only what lies on and above the diagonal will be right
  bool accumulate;  // added to G
  int64_t splits;   // gram_splits
};

// Into how many ranges the samples of every task are split: a function of the sizes alone.
int64_t gram_splits(int64_t tasks, int64_t samples, int64_t k, int64_t t);

cudaError_t launch_tensor_gram(const GramProblem& problem,
                               float* partials,  // (splits - 1, tasks, k, t), scratch
                               float* out,       // (tasks, k, t)
                               cudaStream_t stream);

// Rows in float32, and the powers of two that they are multiplied by in float16.
struct ScaledRows {
  const float* values;  // (rows, n)
  int64_t rows;
  const float* scales;  // (rows)
};

cudaError_t launch_row_scales(const float* x, int64_t m, int64_t n,
                              float* scales,  // (m)
                              cudaStream_t stream);

// Whether products of so many rows occupy the GPU: their coordinates are not split.
bool row_products_fill(int64_t m, int64_t l);

// out[i, j] = x_i . y_j; symmetric: only what lies on and above the diagonal will be right.
cudaError_t launch_row_products(const ScaledRows& x, const ScaledRows& y, int64_t n, bool symmetric,
                                float* out,  // (x.rows, y.rows)
                                cudaStream_t stream);

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

// values[i, j] = ||x_i - y_j||_1; symmetric: only what lies on and above the diagonal will be right.
template <typename T>
cudaError_t launch_absolute_distances(const T* x,  // (m, n)
                                      int64_t m,
                                      const T* y,  // (l, n)
                                      int64_t l, int64_t n, bool symmetric,
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
