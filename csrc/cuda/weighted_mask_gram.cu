// Gram matrices of weighted distances between packed masks on CUDA, and their products with v.
//
// One block computes one tile of 64 x 64 pairs, a thread 16 of them. For a word of tasks the terms of
// its nibbles lie in shared memory: the 16 of a nibble in different banks, so that a warp reads any of
// them at once. Values are joined in the order of the CPU: the same bits.
#include "cuda/mask_gram_products.cuh"
#include "cuda/weighted_mask_gram_launch.h"

namespace ksm {
namespace {

constexpr int kOwn = 4;                      // rows, and columns, of a thread
constexpr int kApart = kProductTile / kOwn;  // between them
static_assert(kApart * kApart == kThreads);
static_assert(kNibblesPerWord * kNibbleValues == kThreads);

template <MaskKernel kKernel, typename T>
struct WeightedTile {
  struct Staging {
    T terms[kNibblesPerWord][kNibbleValues];
    uint64_t x[kProductTile], y[kProductTile];
  };

  T values[kOwn][kOwn];  // of rows own_row() + kApart r and columns own_column() + kApart c

  static __device__ int own_row() { return threadIdx.x / kApart; }
  static __device__ int own_column() { return threadIdx.x % kApart; }

  // Computes the pairs (i0 + r, j0 + c); masks beyond the sets count as empty. All threads call it.
  __device__ void compute(const MaskSet& x, int64_t i0, const MaskSet& y, int64_t j0, int64_t n,
                          const T* terms, Staging& staging) {
    const int64_t words = words_of(n), nibbles = nibbles_of(n);
    for_each([](T& value, int, int) { value = T(kKernel == MaskKernel::kRbf); });
    for (int64_t w = 0; w < words; ++w) {
      const int64_t left = nibbles - w * kNibblesPerWord;
      const int in_word = static_cast<int>(left < kNibblesPerWord ? left : kNibblesPerWord);
      __syncthreads();  // what was staged before has been read
      stage(x, i0, w, words, 0, staging.x);
      stage(y, j0, w, words, kProductTile, staging.y);
      const int nibble = threadIdx.x / kNibbleValues, value = threadIdx.x % kNibbleValues;
      if (nibble < in_word) staging.terms[nibble][value] = terms[w * kThreads + threadIdx.x];
      __syncthreads();
      constexpr int kHalf = kNibblesPerWord / 2;
      join(staging, 0, in_word < kHalf ? in_word : kHalf);
      if (in_word > kHalf) join(staging, kHalf, in_word);
    }
    for_each([](T& value, int, int) {
      if constexpr (kKernel == MaskKernel::kRbf) {
        value = normal_or_zero(value);
      } else {
        value = exp_of_minus(sqrt(value));
      }
    });
  }

  // body(value, row, column) for this thread's pairs.
  template <typename Body>
  __device__ void for_each(const Body& body) {
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        body(values[r][c], own_row() + kApart * r, own_column() + kApart * c);
      }
    }
  }

 private:
  // Word w of the masks from i0 on, by the threads from `first` on.
  static __device__ void stage(const MaskSet& set, int64_t i0, int64_t w, int64_t words, int first,
                               uint64_t (&staged)[kProductTile]) {
    const int r = static_cast<int>(threadIdx.x) - first;
    if (r < 0 || r >= kProductTile) return;
    staged[r] = i0 + r < set.count ? set.words[(i0 + r) * words + w] : 0;
  }

  // The nibbles begin .. end, all in one half of the staged words.
  __device__ void join(const Staging& staging, int begin, int end) {
    const int shift = begin * static_cast<int>(kNibbleBits);
    uint32_t differ[kOwn][kOwn];
#pragma unroll
    for (int r = 0; r < kOwn; ++r) {
      const uint64_t row = staging.x[own_row() + kApart * r];
#pragma unroll
      for (int c = 0; c < kOwn; ++c) {
        const uint64_t column = staging.y[own_column() + kApart * c];
        differ[r][c] = static_cast<uint32_t>((row ^ column) >> shift);
      }
    }
    for (int p = begin; p < end; ++p) {
#pragma unroll
      for (int r = 0; r < kOwn; ++r) {
#pragma unroll
        for (int c = 0; c < kOwn; ++c) {
          const T term = staging.terms[p][differ[r][c] % kNibbleValues];
          differ[r][c] >>= kNibbleBits;
          if constexpr (kKernel == MaskKernel::kRbf) {
            values[r][c] *= term;
          } else {
            values[r][c] += term;
          }
        }
      }
    }
  }
};

template <typename T>
__global__ void nibble_terms_kernel(MaskKernel kernel, const T* __restrict__ weights, int64_t n,
                                    T* __restrict__ terms) {
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  for (int64_t k = first; k < nibbles_of(n) * kNibbleValues; k += int64_t{gridDim.x} * kThreads) {
    terms[k] = nibble_term(kernel, weights, n, k / kNibbleValues, k % kNibbleValues);
  }
}

// Of a symmetric result the tiles on and above the diagonal are computed, and written twice.
template <MaskKernel kKernel, typename T>
__global__ void __launch_bounds__(kThreads)
    weighted_mask_gram_kernel(WeightedMasks<T> masks, bool symmetric,
                              const T* __restrict__ x_factors, const T* __restrict__ y_factors,
                              T* __restrict__ out) {  // (m, l)
  using Tile = WeightedTile<kKernel, T>;
  __shared__ typename Tile::Staging staging;
  __shared__ T mirror[kProductTile][kProductTile + 1];  // padded: columns lie in different banks
  const int64_t m = masks.x.count, l = masks.y.count;
  const int64_t row_tiles = divide_up(m, kProductTile), column_tiles = divide_up(l, kProductTile);
  for (int64_t k = blockIdx.x; k < row_tiles * column_tiles; k += gridDim.x) {
    const int64_t i0 = k / column_tiles * kProductTile, j0 = k % column_tiles * kProductTile;
    if (symmetric && j0 < i0) continue;  // the same for all threads
    Tile tile;
    tile.compute(masks.x, i0, masks.y, j0, masks.n, masks.terms, staging);
    tile.for_each([&](T& value, int r, int c) {
      const int64_t i = i0 + r, j = j0 + c;
      if (i >= m || j >= l) return;
      if (x_factors) value *= x_factors[i] * y_factors[j];
      out[i * l + j] = value;
    });
    if (!symmetric || j0 == i0) continue;
    __syncthreads();  // the tile before has been read
    tile.for_each([&](T& value, int r, int c) { mirror[r][c] = value; });
    __syncthreads();
    tile.for_each([&](T&, int r, int c) {
      if (j0 + r < l && i0 + c < m) out[(j0 + r) * l + i0 + c] = mirror[c][r];
    });
  }
}

// See mask_gram_products.cuh.
template <MaskKernel kKernel, typename T>
struct WeightedSource {
  using Value = T;
  using Tile = WeightedTile<kKernel, T>;
  using Staging = typename Tile::Staging;

  WeightedMasks<T> masks;

  __host__ __device__ int64_t rows() const { return masks.x.count; }
  __host__ __device__ int64_t columns() const { return masks.y.count; }
  __device__ void prepare() {}

  // The transposed tile, so that neighbouring threads write neighbours.
  __device__ void fill(int64_t i0, int64_t j0, Staging& staging, GramTile<T>& gram) const {
    Tile tile;
    tile.compute(masks.y, j0, masks.x, i0, masks.n, masks.terms, staging);
    __syncthreads();  // the gram and v of the tile before have been read
    tile.for_each([&](T& value, int c, int r) {
      gram[c][r] = i0 + r < rows() && j0 + c < columns() ? value : T(0);
    });
  }
};

}  // namespace

template <typename T>
cudaError_t launch_nibble_terms(MaskKernel kernel, const T* weights, int64_t n, T* terms,
                                cudaStream_t stream) {
  return launch_threads(nibbles_of(n) * kNibbleValues, stream, nibble_terms_kernel<T>, kernel,
                        weights, n, terms);
}

template <typename T>
cudaError_t launch_weighted_mask_gram(const WeightedMasks<T>& masks, bool symmetric,
                                      const T* x_factors, const T* y_factors, T* out,
                                      cudaStream_t stream) {
  const int64_t tiles =
      divide_up(masks.x.count, kProductTile) * divide_up(masks.y.count, kProductTile);
  const auto kernel = masks.kernel == MaskKernel::kRbf
                          ? weighted_mask_gram_kernel<MaskKernel::kRbf, T>
                          : weighted_mask_gram_kernel<MaskKernel::kExponential, T>;
  return launch_over(tiles, stream, kernel, masks, symmetric, x_factors, y_factors, out);
}

template <typename T>
cudaError_t launch_weighted_mask_gram_matmul(const WeightedMasks<T>& masks, const T* v, int64_t t,
                                             double* partials, T* out, cudaStream_t stream) {
  if (masks.kernel == MaskKernel::kRbf) {
    const WeightedSource<MaskKernel::kRbf, T> source{masks};
    return launch_products(source, 0, v, t, partials, out, stream);
  }
  const WeightedSource<MaskKernel::kExponential, T> source{masks};
  return launch_products(source, 0, v, t, partials, out, stream);
}

#define KSM_INSTANTIATE(T)                                                                   \
  template cudaError_t launch_nibble_terms(MaskKernel, const T*, int64_t, T*, cudaStream_t); \
  template cudaError_t launch_weighted_mask_gram(const WeightedMasks<T>&, bool, const T*,    \
                                                 const T*, T*, cudaStream_t);                \
  template cudaError_t launch_weighted_mask_gram_matmul(const WeightedMasks<T>&, const T*,   \
                                                        int64_t, double*, T*, cudaStream_t);
KSM_INSTANTIATE(float)
KSM_INSTANTIATE(double)
#undef KSM_INSTANTIATE

}  // namespace ksm
