// What Gram matrices of real features need beside GEMM, on CUDA.
#include "cuda/block_sum.cuh"
#include "cuda/gram_kernels.h"

namespace ksm {
namespace {

template <typename T>
__global__ void weigh_rows_kernel(const T* __restrict__ x,        // (b, k)
                                  const T* __restrict__ weights,  // (b)
                                  int64_t b, int64_t k,
                                  T* __restrict__ out) {  // (b, k)
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t e = first; e < b * k; e += int64_t{gridDim.x} * kThreads) {
    out[e] = weights[e / k] * x[e];
  }
}

template <typename T>
__global__ void mirror_kernel(T* matrices,  // (count, k, k)
                              int64_t count, int64_t k) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t e = first; e < count * k * k; e += int64_t{gridDim.x} * kThreads) {
    const int64_t matrix = e / (k * k), i = e / k % k, j = e % k;
    if (j < i) matrices[e] = matrices[(matrix * k + j) * k + i];
  }
}

template <typename T>
__global__ void row_squares_kernel(const T* __restrict__ x,  // (m, n)
                                   int64_t m, int64_t n,
                                   T* __restrict__ squares) {  // (m)
  for (int64_t i = blockIdx.x; i < m; i += gridDim.x) {
    double sum = 0;
    for (int64_t d = threadIdx.x; d < n; d += kThreads) {
      sum += static_cast<double>(x[i * n + d]) * static_cast<double>(x[i * n + d]);
    }
    const double total = block_sum(sum);
    if (threadIdx.x == 0) squares[i] = static_cast<T>(total);
  }
}

constexpr int kSide = 16;  // a block's threads are a tile of kSide x kSide pairs
static_assert(kSide * kSide == kThreads);

template <typename T>
__global__ void absolute_distances_kernel(const T* __restrict__ x,  // (m, n)
                                          int64_t m,
                                          const T* __restrict__ y,  // (l, n)
                                          int64_t l, int64_t n,
                                          T* __restrict__ values) {  // (m, l)
  __shared__ T x_tile[kSide][kSide + 1], y_tile[kSide][kSide + 1];   // padded against conflicts
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  const int64_t row_tiles = (m + kSide - 1) / kSide, column_tiles = (l + kSide - 1) / kSide;
  for (int64_t tile = blockIdx.x; tile < row_tiles * column_tiles; tile += gridDim.x) {
    const int64_t i0 = tile / column_tiles * kSide, j0 = tile % column_tiles * kSide;
    T sum = 0;
    for (int64_t d0 = 0; d0 < n; d0 += kSide) {
      // Thread (row, column) loads coordinate `column` of the tile's mask `row` of x and of y.
      const int64_t i = i0 + row, j = j0 + row, d = d0 + column;
      __syncthreads();  // the coordinates before have been read
      x_tile[row][column] = i < m && d < n ? x[i * n + d] : T(0);
      y_tile[row][column] = j < l && d < n ? y[j * n + d] : T(0);
      __syncthreads();
      for (int q = 0; q < kSide; ++q) {
        const T difference = x_tile[row][q] - y_tile[column][q];
        sum += difference < 0 ? -difference : difference;
      }
    }
    if (i0 + row < m && j0 + column < l) values[(i0 + row) * l + j0 + column] = sum;
  }
}

template <typename T>
__device__ T kernel_value(const KernelParameters& kernel, T x_square, T y_square, T value) {
  const T gamma = static_cast<T>(kernel.gamma);
  switch (kernel.kind) {
    case KernelKind::kPolynomial:
      return power_of(gamma * value + static_cast<T>(kernel.coef0), kernel.degree);
    case KernelKind::kRbf: return exp_of_minus(gamma * squared_distance(x_square, y_square, value));
    case KernelKind::kLaplace: return exp_of_minus(gamma * value);
    case KernelKind::kExponential:
      return exp_of_minus(gamma * sqrt(squared_distance(x_square, y_square, value)));
    default: return value;
  }
}

template <typename T>
__global__ void kernel_values_kernel(KernelParameters kernel,
                                     const T* __restrict__ x_squares,  // (m), or null
                                     const T* __restrict__ y_squares,  // (l), or null
                                     int64_t m, int64_t l, bool symmetric,
                                     T* __restrict__ values) {  // (m, l)
  const bool radial = kernel.kind != KernelKind::kLinear && kernel.kind != KernelKind::kPolynomial;
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t e = first; e < m * l; e += int64_t{gridDim.x} * kThreads) {
    const int64_t i = e / l, j = e % l;
    // Entries below the diagonal are written, and never read, by the threads of those above.
    if (symmetric && j < i) continue;
    T value = kernel_value(kernel, x_squares ? x_squares[i] : T(0), y_squares ? y_squares[j] : T(0),
                           values[e]);
    if (symmetric && radial && i == j && value == value) value = T(1);
    values[e] = value;
    if (symmetric && i != j) values[j * l + i] = value;
  }
}

}  // namespace

template <typename T>
cudaError_t launch_weigh_rows(const T* x, const T* weights, int64_t b, int64_t k, T* out,
                              cudaStream_t stream) {
  return launch_threads(b * k, stream, weigh_rows_kernel<T>, x, weights, b, k, out);
}

template <typename T>
cudaError_t launch_mirror(T* matrices, int64_t count, int64_t k, cudaStream_t stream) {
  return launch_threads(count * k * k, stream, mirror_kernel<T>, matrices, count, k);
}

template <typename T>
cudaError_t launch_row_squares(const T* x, int64_t m, int64_t n, T* squares, cudaStream_t stream) {
  return launch_over(m, stream, row_squares_kernel<T>, x, m, n, squares);
}

template <typename T>
cudaError_t launch_absolute_distances(const T* x, int64_t m, const T* y, int64_t l, int64_t n,
                                      T* values, cudaStream_t stream) {
  const int64_t tiles = ((m + kSide - 1) / kSide) * ((l + kSide - 1) / kSide);
  return launch_over(tiles, stream, absolute_distances_kernel<T>, x, m, y, l, n, values);
}

template <typename T>
cudaError_t launch_kernel_values(KernelParameters kernel, const T* x_squares, const T* y_squares,
                                 int64_t m, int64_t l, bool symmetric, T* values,
                                 cudaStream_t stream) {
  return launch_threads(m * l, stream, kernel_values_kernel<T>, kernel, x_squares, y_squares, m, l,
                        symmetric, values);
}

#define KSM_INSTANTIATE(T)                                                                        \
  template cudaError_t launch_weigh_rows(const T*, const T*, int64_t, int64_t, T*, cudaStream_t); \
  template cudaError_t launch_mirror(T*, int64_t, int64_t, cudaStream_t);                         \
  template cudaError_t launch_row_squares(const T*, int64_t, int64_t, T*, cudaStream_t);          \
  template cudaError_t launch_absolute_distances(const T*, int64_t, const T*, int64_t, int64_t,   \
                                                 T*, cudaStream_t);                               \
  template cudaError_t launch_kernel_values(KernelParameters, const T*, const T*, int64_t,        \
                                            int64_t, bool, T*, cudaStream_t);
KSM_INSTANTIATE(float)
KSM_INSTANTIATE(double)
#undef KSM_INSTANTIATE

}  // namespace ksm
