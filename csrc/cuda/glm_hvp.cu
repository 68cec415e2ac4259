// What regressions on many subsets do between their GEMMs, on CUDA. No atomics: a row of products
// belongs to one block, and the launches of a stream follow each other.
#include "cuda/block_sum.cuh"
#include "cuda/glm_hvp_launch.h"

namespace ksm {
namespace {

template <typename T>
__global__ void gather_rows_kernel(const T* __restrict__ from, const int64_t* __restrict__ rows,
                                   int64_t count, int64_t k,
                                   T* __restrict__ to) {  // (count, k)
  for (Element e(k); e.row < count; e.next()) {
    to[e.at] = from[rows[e.row] * k + e.column];
  }
}

template <typename T>
__global__ void add_rows_kernel(const T* __restrict__ from,  // (count, k)
                                const int64_t* __restrict__ rows, int64_t count, int64_t k,
                                T* __restrict__ to) {
  for (Element e(k); e.row < count; e.next()) {
    to[rows[e.row] * k + e.column] += from[e.at];
  }
}

// The task of a sample is the last one that begins at or before it.
__global__ void tasks_of_samples_kernel(const int64_t* __restrict__ offsets,  // (n + 1)
                                        int64_t n, int64_t b,
                                        int32_t* __restrict__ task_of) {  // (b)
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t i = first; i < b; i += int64_t{gridDim.x} * kThreads) {
    int64_t low = 0, high = n;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (offsets[middle] <= i) {
        low = middle;
      } else {
        high = middle;
      }
    }
    task_of[i] = static_cast<int32_t>(low);
  }
}

// A block takes stretches of a row; a thread has four products at once under way.
constexpr int kPerThread = 4;
constexpr int64_t kStretch = kPerThread * kThreads;

template <typename T, typename C>
__global__ void weigh_products_kernel(ProductBlock<T> block,
                                      const C* __restrict__ curvature) {  // (m, b)
  const int64_t samples = block.samples(), stretches = divide_up(samples, kStretch);
  for (int64_t item = blockIdx.x; item < block.count * stretches; item += gridDim.x) {
    const int64_t r = item / stretches, subset = block.subset(r);
    const int64_t first = item % stretches * kStretch + threadIdx.x;
    const uint64_t* mask = block.sets.mask(subset);
    const int32_t* task_of = block.sets.task_of + block.begin;
    const C* weights = curvature ? curvature + subset * block.sets.b + block.begin : nullptr;
    T* row = block.products + r * samples;
    T products[kPerThread];
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int64_t j = first + e * kThreads;
      products[e] = T(0);
      if (j >= samples || !has_task(mask, task_of[j])) continue;
      products[e] = weights ? row[j] * static_cast<T>(widened(weights[j])) : row[j];
    }
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int64_t j = first + e * kThreads;
      if (j < samples) row[j] = products[e];
    }
  }
}

template <typename T, typename C>
__global__ void logistic_products_kernel(ProductBlock<T> block,
                                         const T* __restrict__ h,           // (b)
                                         C* __restrict__ curvature,         // (m, b)
                                         double* __restrict__ objective) {  // (m)
  const int64_t samples = block.samples();
  for (int64_t r = blockIdx.x; r < block.count; r += gridDim.x) {
    const int64_t subset = block.subset(r);
    const uint64_t* mask = block.sets.mask(subset);
    T* row = block.products + r * samples;
    double loss = 0;
    for (int64_t j = threadIdx.x; j < samples; j += kThreads) {
      const int64_t i = block.begin + j;
      if (!has_task(mask, block.sets.task_of[i])) {
        row[j] = T(0);
        continue;
      }
      const Logistic<T> entry = logistic_of(h[i] + row[j]);
      row[j] = entry.slope;
      if (curvature) curvature[subset * block.sets.b + i] = Stored<C>::of(entry.curvature);
      loss += static_cast<double>(entry.loss);
    }
    const double sum = block_sum(loss);
    if (threadIdx.x == 0) objective[subset] += sum;
  }
}

template <typename T>
__global__ void finish_subsets_kernel(SubsetSamples sets,
                                      const T* __restrict__ ridge,  // (m)
                                      const T* __restrict__ v,      // (m, k)
                                      int64_t m, int64_t k,
                                      T* __restrict__ out,               // (m, k)
                                      double* __restrict__ objective) {  // (m)
  for (int64_t subset = blockIdx.x; subset < m; subset += gridDim.x) {
    const uint64_t* mask = sets.mask(subset);
    double own = 0;  // exact below 2^53
    for (int64_t a = threadIdx.x; a < sets.n; a += kThreads) {
      if (has_task(mask, a)) own += static_cast<double>(sets.offsets[a + 1] - sets.offsets[a]);
    }
    const double total = shared_sum(own), samples = total > 0 ? total : 1;
    const T penalty = ridge[subset];
    double square = 0;
    for (int64_t d = threadIdx.x; d < k; d += kThreads) {
      const int64_t e = subset * k + d;
      out[e] = out[e] / static_cast<T>(samples) + penalty * v[e];
      square += static_cast<double>(v[e]) * static_cast<double>(v[e]);
    }
    if (!objective) continue;  // the same for all threads
    const double norm = block_sum(square);
    if (threadIdx.x == 0) {
      objective[subset] = objective[subset] / samples + 0.5 * static_cast<double>(penalty) * norm;
    }
  }
}

}  // namespace

cudaError_t launch_tasks_of_samples(const int64_t* offsets, int64_t n, int64_t b, int32_t* task_of,
                                    cudaStream_t stream) {
  return launch_threads(b, stream, tasks_of_samples_kernel, offsets, n, b, task_of);
}

template <typename T>
cudaError_t launch_gather_rows(const T* from, const int64_t* rows, int64_t count, int64_t k, T* to,
                               cudaStream_t stream) {
  return launch_threads(count * k, stream, gather_rows_kernel<T>, from, rows, count, k, to);
}

template <typename T>
cudaError_t launch_add_rows(const T* from, const int64_t* rows, int64_t count, int64_t k, T* to,
                            cudaStream_t stream) {
  return launch_threads(count * k, stream, add_rows_kernel<T>, from, rows, count, k, to);
}

template <typename T, typename C>
cudaError_t launch_weigh_products(ProductBlock<T> block, const C* curvature, cudaStream_t stream) {
  return launch_over(block.count * divide_up(block.samples(), kStretch), stream,
                     weigh_products_kernel<T, C>, block, curvature);
}

template <typename T, typename C>
cudaError_t launch_logistic_products(ProductBlock<T> block, const T* h, C* curvature,
                                     double* objective, cudaStream_t stream) {
  return launch_over(block.count, stream, logistic_products_kernel<T, C>, block, h, curvature,
                     objective);
}

template <typename T>
cudaError_t launch_finish_subsets(SubsetSamples sets, const T* ridge, const T* v, int64_t m,
                                  int64_t k, T* out, double* objective, cudaStream_t stream) {
  return launch_over(m, stream, finish_subsets_kernel<T>, sets, ridge, v, m, k, out, objective);
}

#define KSM_INSTANTIATE(T)                                                                        \
  template cudaError_t launch_gather_rows(const T*, const int64_t*, int64_t, int64_t, T*,         \
                                          cudaStream_t);                                          \
  template cudaError_t launch_add_rows(const T*, const int64_t*, int64_t, int64_t, T*,            \
                                       cudaStream_t);                                             \
  template cudaError_t launch_weigh_products(ProductBlock<T>, const T*, cudaStream_t);            \
  template cudaError_t launch_weigh_products(ProductBlock<T>, const BFloat16*, cudaStream_t);     \
  template cudaError_t launch_logistic_products(ProductBlock<T>, const T*, T*, double*,           \
                                                cudaStream_t);                                    \
  template cudaError_t launch_logistic_products(ProductBlock<T>, const T*, BFloat16*, double*,    \
                                                cudaStream_t);                                    \
  template cudaError_t launch_finish_subsets(SubsetSamples, const T*, const T*, int64_t, int64_t, \
                                             T*, double*, cudaStream_t);
KSM_INSTANTIATE(float)
KSM_INSTANTIATE(double)
#undef KSM_INSTANTIATE

}  // namespace ksm
