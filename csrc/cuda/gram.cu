// What Gram matrices of real features need beside GEMM, on CUDA.
#include <cstring>

#include "cuda/block_sum.cuh"
#include "cuda/gram_launch.h"

namespace ksm {
namespace {

struct Packet {
  static constexpr int64_t kBytes = 4000;  // a kernel takes 4,096 bytes of parameters

  uint8_t bytes[kBytes];
};

__global__ void write_packet_kernel(Packet packet, int count, uint8_t* __restrict__ to) {
  for (int e = static_cast<int>(threadIdx.x); e < count; e += kThreads) to[e] = packet.bytes[e];
}

template <typename T>
__global__ void weigh_rows_kernel(const T* __restrict__ x,        // (b, k)
                                  const T* __restrict__ weights,  // (b)
                                  int64_t b, int64_t k,
                                  T* __restrict__ out) {  // (b, k)
  for (Element e(k); e.row < b; e.next()) out[e.at] = weights[e.row] * x[e.at];
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

constexpr int kTile = 64;                        // a block takes a square of so many pairs
constexpr int kSide = 16, kOwn = kTile / kSide;  // of which a thread has kOwn x kOwn
constexpr int kDepth = 16;                       // coordinates in shared memory at once
static_assert(kSide * kSide == kThreads);

struct Tiles {
  int64_t across, count;

  __host__ __device__ Tiles(int64_t m, int64_t l)
      : across(divide_up(l, kTile)), count(divide_up(m, kTile) * across) {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads) mirror_kernel(T* matrices,  // (count, k, k)
                                                          int64_t count, int64_t k) {
  __shared__ T shared[kTile][kTile + 1];
  const int column = static_cast<int>(threadIdx.x) % kTile;
  const int first_row = static_cast<int>(threadIdx.x) / kTile;
  constexpr int kRowStep = kThreads / kTile;
  const Tiles tiles(k, k);
  for (int64_t item = blockIdx.x; item < count * tiles.count; item += gridDim.x) {
    const int64_t tile = item % tiles.count;
    const int64_t i0 = tile / tiles.across * kTile, j0 = tile % tiles.across * kTile;
    if (j0 < i0) continue;  // the same for all threads
    T* matrix = matrices + item / tiles.count * k * k;
    __syncthreads();  // the tile before has been read
#pragma unroll 4
    for (int r = first_row; r < kTile; r += kRowStep) {
      if (i0 + r < k && j0 + column < k) {
        shared[r][column] = matrix[(i0 + r) * k + j0 + column];
      }
    }
    __syncthreads();
#pragma unroll 4
    for (int r = first_row; r < kTile; r += kRowStep) {
      const int64_t i = j0 + r, j = i0 + column;
      if (i < k && j < i) matrix[i * k + j] = shared[column][r];
    }
  }
}

// kDepth coordinates of kTile rows, side by side for one coordinate; zero beyond the matrix.
template <typename T>
struct Rows {
  alignas(16) T values[kDepth][kTile + 4];

  __device__ void stage(const T* x, int64_t i0, int64_t m, int64_t d0, int64_t n) {
    const int d = threadIdx.x % kDepth;
    for (int r = threadIdx.x / kDepth; r < kTile; r += kThreads / kDepth) {
      const bool inside = i0 + r < m && d0 + d < n;
      values[d][r] = inside ? x[(i0 + r) * n + d0 + d] : T(0);
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    absolute_distances_kernel(const T* __restrict__ x,  // (m, n)
                              int64_t m,
                              const T* __restrict__ y,  // (l, n)
                              int64_t l, int64_t n, bool symmetric,
                              T* __restrict__ values) {  // (m, l)
  __shared__ Rows<T> x_rows, y_rows;
  const int row = static_cast<int>(threadIdx.x) / kSide * kOwn;
  const int column = static_cast<int>(threadIdx.x) % kSide * kOwn;
  const Tiles tiles(m, l);
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int64_t i0 = tile / tiles.across * kTile, j0 = tile % tiles.across * kTile;
    if (symmetric && j0 < i0) continue;  // the same for all threads
    T sums[kOwn][kOwn] = {};
    for (int64_t d0 = 0; d0 < n; d0 += kDepth) {
      __syncthreads();  // the coordinates before have been read
      x_rows.stage(x, i0, m, d0, n);
      y_rows.stage(y, j0, l, d0, n);
      __syncthreads();
#pragma unroll
      for (int d = 0; d < kDepth; ++d) {
#pragma unroll
        for (int r = 0; r < kOwn; ++r) {
#pragma unroll
          for (int c = 0; c < kOwn; ++c) {
            sums[r][c] += fabs(x_rows.values[d][row + r] - y_rows.values[d][column + c]);
          }
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const int64_t i = i0 + row + r, j = j0 + column + c;
        if (i < m && j < l) values[i * l + j] = sums[r][c];
      }
    }
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

// Of a symmetric matrix, tiles on and above the diagonal are read; their mirror images are written
// from shared memory, along rows too.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    kernel_values_kernel(KernelParameters kernel,
                         const T* __restrict__ x_squares,  // (m), or null
                         const T* __restrict__ y_squares,  // (l), or null
                         int64_t m, int64_t l, bool symmetric,
                         T* __restrict__ values) {  // (m, l)
  __shared__ T shared[kTile][kTile + 1];
  const bool radial = kernel.kind != KernelKind::kLinear && kernel.kind != KernelKind::kPolynomial;
  const int column = static_cast<int>(threadIdx.x) % kTile;
  const int first_row = static_cast<int>(threadIdx.x) / kTile;
  constexpr int kRowStep = kThreads / kTile;
  const Tiles tiles(m, l);
  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const int64_t i0 = tile / tiles.across * kTile, j0 = tile % tiles.across * kTile;
    if (symmetric && j0 < i0) continue;  // the same for all threads
    const bool diagonal = symmetric && j0 == i0, mirrored = symmetric && j0 > i0;
    const int64_t j = j0 + column;
    const T y_square = y_squares && j < l ? y_squares[j] : T(0);
    __syncthreads();  // the tile before has been read
#pragma unroll 4
    for (int r = first_row; r < kTile; r += kRowStep) {
      const int64_t i = i0 + r;
      if (i >= m || j >= l || (diagonal && j < i)) continue;
      T value = kernel_value(kernel, x_squares ? x_squares[i] : T(0), y_square, values[i * l + j]);
      if (diagonal && radial && i == j && value == value) value = T(1);
      if (symmetric) shared[r][column] = value;
      values[i * l + j] = value;
    }
    if (!symmetric) continue;
    __syncthreads();
#pragma unroll 4
    for (int r = first_row; r < kTile; r += kRowStep) {
      const int64_t i = j0 + r, own = i0 + column;  // of the mirror image
      if (i >= m || own >= l) continue;
      if (mirrored || own < i) values[i * l + own] = shared[column][r];
    }
  }
}

}  // namespace

cudaError_t launch_write(const void* from, int64_t bytes, void* to, cudaStream_t stream) {
  Packet packet;
  for (int64_t first = 0; first < bytes; first += Packet::kBytes) {
    const int64_t count = std::min(Packet::kBytes, bytes - first);
    std::memcpy(packet.bytes, static_cast<const uint8_t*>(from) + first, count);
    const cudaError_t status = launch(1, 0, stream, write_packet_kernel, packet,
                                      static_cast<int>(count), static_cast<uint8_t*>(to) + first);
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename T>
cudaError_t launch_weigh_rows(const T* x, const T* weights, int64_t b, int64_t k, T* out,
                              cudaStream_t stream) {
  return launch_threads(b * k, stream, weigh_rows_kernel<T>, x, weights, b, k, out);
}

template <typename T>
cudaError_t launch_mirror(T* matrices, int64_t count, int64_t k, cudaStream_t stream) {
  return launch_over(count * Tiles(k, k).count, stream, mirror_kernel<T>, matrices, count, k);
}

template <typename T>
cudaError_t launch_row_squares(const T* x, int64_t m, int64_t n, T* squares, cudaStream_t stream) {
  return launch_over(m, stream, row_squares_kernel<T>, x, m, n, squares);
}

template <typename T>
cudaError_t launch_absolute_distances(const T* x, int64_t m, const T* y, int64_t l, int64_t n,
                                      bool symmetric, T* values, cudaStream_t stream) {
  return launch_over(Tiles(m, l).count, stream, absolute_distances_kernel<T>, x, m, y, l, n,
                     symmetric, values);
}

template <typename T>
cudaError_t launch_kernel_values(KernelParameters kernel, const T* x_squares, const T* y_squares,
                                 int64_t m, int64_t l, bool symmetric, T* values,
                                 cudaStream_t stream) {
  return launch_over(Tiles(m, l).count, stream, kernel_values_kernel<T>, kernel, x_squares,
                     y_squares, m, l, symmetric, values);
}

#define KSM_INSTANTIATE(T)                                                                        \
  template cudaError_t launch_weigh_rows(const T*, const T*, int64_t, int64_t, T*, cudaStream_t); \
  template cudaError_t launch_mirror(T*, int64_t, int64_t, cudaStream_t);                         \
  template cudaError_t launch_row_squares(const T*, int64_t, int64_t, T*, cudaStream_t);          \
  template cudaError_t launch_absolute_distances(const T*, int64_t, const T*, int64_t, int64_t,   \
                                                 bool, T*, cudaStream_t);                         \
  template cudaError_t launch_kernel_values(KernelParameters, const T*, const T*, int64_t,        \
                                            int64_t, bool, T*, cudaStream_t);
KSM_INSTANTIATE(float)
KSM_INSTANTIATE(double)
#undef KSM_INSTANTIATE

}  // namespace ksm
