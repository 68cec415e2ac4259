// Projections on CUDA. Random numbers are drawn where they are used; entries are those of projection.h.
//
// Every sum belongs to one thread, or to one block that takes its terms in order. Sums over many
// coordinates are cut into splits by shapes alone: the first is added to y, the others become partial
// sums that a second kernel adds in order. No atomics: the result is the same in every run.
#include <type_traits>

#include "cuda/launch.cuh"
#include "cuda/project_kinds.cuh"
#include "cuda/project_launch.h"

namespace ksm {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) add_partials_kernel(Sums<T> sums) {
  const int64_t size = sums.rows * sums.k;
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < size;
       first += int64_t{gridDim.x} * kThreads) {
    const int64_t e = first + threadIdx.x;
    if (e >= size) continue;
    T sum = sums.y[e];
#pragma unroll 16  // as many loads under way
    for (int64_t split = 1; split < sums.splits; ++split) sum += sums.of(split)[e];
    sums.y[e] = sum;
  }
}

// The largest rotated part of x, in values: it then stays in the cache between two kernels. One
// block of each row is the least.
constexpr int64_t kRotated = int64_t{1} << 22;

int64_t rotated_blocks(const Projection& projection, int64_t b, int64_t p) {
  const int64_t q = segment_of(projection);
  return std::clamp<int64_t>(kRotated / (b * q), 1, p / q + 2);
}

Cut cut_of(const Projection& projection, int64_t rows) {
  switch (projection.kind) {
    case Kind::kSbp: return sbp_cut(projection, rows);
    case Kind::kSjlt: return sjlt_cut(projection, rows);
    case Kind::kRademacher: return rademacher_cut(projection, rows);
    default: return dense_cut(projection, rows);
  }
}

// y and its partial sums, for coordinates `begin` to `begin + p`; a function of shapes alone.
template <typename T>
Sums<T> sums_of(const Projection& projection, int64_t begin, int64_t b, int64_t p, T* y,
                T* partials) {
  constexpr int64_t kEnoughBlocks = 1024;  // several per multiprocessor of any GPU
  const auto [unit, blocks] = cut_of(projection, b);
  if (projection.kind == Kind::kSjlt) begin = 0;  // its chunks start where x does
  Sums<T> sums = {};
  sums.y = y, sums.partials = partials, sums.rows = b, sums.k = projection.k;
  sums.first_unit = begin / unit;
  sums.units = divide_up(begin + p, unit) - sums.first_unit;
  // Partial sums stay small beside the input.
  const int64_t splits =
      std::clamp<int64_t>(p / (16 * projection.k), 1, divide_up(kEnoughBlocks, blocks));
  sums.units_per_split = divide_up(sums.units, splits);
  sums.splits = divide_up(sums.units, sums.units_per_split);
  return sums;
}

template <typename T>
T scale_of_values(const Projection& projection) {
  const double run =
      projection.hadamard ? static_cast<double>(hadamard_length(segment_of(projection))) : 1.0;
  return static_cast<T>(scale_of(projection) / (projection.hadamard ? sqrt(run) : 1.0));
}

template <typename From, typename T>
cudaError_t launch_sums(const Projection& projection, Slab<const From> x, Sums<T> sums,
                        cudaStream_t stream) {
  const T scale = scale_of_values<T>(projection);
  switch (projection.kind) {
    case Kind::kSbp: return launch_sbp(projection, scale, x, sums, stream);
    case Kind::kSjlt: return launch_sjlt(projection, scale, x, sums, stream);
    case Kind::kRademacher:
      if constexpr (std::is_same_v<T, float>) {
        return launch_rademacher(projection, scale, x, sums, stream);
      }
    default: return launch_dense(projection, scale, x, sums, stream);
  }
}

// All but the rotation.
template <typename From, typename T>
cudaError_t project_slab(const Projection& projection, Slab<const From> x, T* y, T* partials,
                         cudaStream_t stream) {
  const Sums<T> sums = sums_of(projection, x.begin, x.rows, x.count, y, partials);
  const cudaError_t status = launch_sums(projection, x, sums, stream);
  if (status != cudaSuccess || sums.splits == 1) return status;
  return launch_over(divide_up(sums.rows * sums.k, kThreads), stream, add_partials_kernel<T>, sums);
}

template <typename T>
cudaError_t adjoint_slab(const Projection& projection, const T* y, Slab<T> x, cudaStream_t stream) {
  const T scale = scale_of_values<T>(projection);
  switch (projection.kind) {
    case Kind::kSbp: return launch_sbp_adjoint(projection, scale, y, x, stream);
    case Kind::kSjlt: return launch_sjlt_adjoint(projection, scale, y, x, stream);
    default: return launch_dense_adjoint(projection, scale, y, x, stream);
  }
}

// Calls body with whole blocks of rotated coordinates, a few at a time, until they cover
// `begin` to `begin + p` or an error occurs.
template <typename T, typename Body>
cudaError_t for_rotated(const Projection& projection, int64_t begin, int64_t b, int64_t p,
                        T* rotated, const Body& body) {
  const int64_t q = segment_of(projection), blocks = rotated_blocks(projection, b, p);
  const int64_t end = divide_up(begin + p, q);
  for (int64_t first = begin / q; first < end; first += blocks) {
    const int64_t count = std::min(blocks, end - first) * q;
    const cudaError_t status = body(Slab<T>{rotated, count, b, first * q, count});
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename T>
Slab<const T> as_const(const Slab<T>& slab) {
  return {slab.values, slab.stride, slab.rows, slab.begin, slab.count};
}

int64_t rotated_size(const Projection& projection, int64_t b, int64_t p) {
  return projection.hadamard ? rotated_blocks(projection, b, p) * segment_of(projection) * b : 0;
}

}  // namespace

int64_t project_adjoint_scratch(const Projection& projection, int64_t b, int64_t p) {
  return rotated_size(projection, b, p);
}

int64_t project_scratch(const Projection& projection, int64_t offset, int64_t b, int64_t p) {
  const auto partials = [&](int64_t begin, int64_t count) {
    const Sums<float> sums = sums_of<float>(projection, begin, b, count, nullptr, nullptr);
    return (sums.splits - 1) * b * projection.k;
  };
  int64_t most = 0;
  if (!projection.hadamard) {
    most = partials(offset, p);
  } else {
    for_rotated<float>(projection, offset, b, p, nullptr, [&](const Slab<float>& rotated) {
      most = std::max(most, partials(rotated.begin, rotated.count));
      return cudaSuccess;
    });
  }
  return rotated_size(projection, b, p) + most;
}

template <typename From, typename T>
cudaError_t launch_project(const Projection& projection, int64_t offset, const From* x,
                           int64_t x_stride, int64_t b, int64_t p, T* scratch, T* y,
                           cudaStream_t stream) {
  const Slab<const From> slab = {x, x_stride, b, offset, p};
  T* partials = scratch + rotated_size(projection, b, p);
  if (!projection.hadamard) return project_slab<From, T>(projection, slab, y, partials, stream);
  return for_rotated(projection, offset, b, p, scratch, [&](const Slab<T>& rotated) {
    const cudaError_t status = launch_rotation<false>(projection, slab, rotated, stream);
    if (status != cudaSuccess) return status;
    return project_slab<T, T>(projection, as_const(rotated), y, partials, stream);
  });
}

template <typename T>
cudaError_t launch_project_adjoint(const Projection& projection, int64_t offset, const T* y,
                                   int64_t b, int64_t p, T* scratch, T* x, cudaStream_t stream) {
  const Slab<T> slab = {x, p, b, offset, p};
  if (!projection.hadamard) return adjoint_slab(projection, y, slab, stream);
  return for_rotated(projection, offset, b, p, scratch, [&](const Slab<T>& rotated) {
    const cudaError_t status = adjoint_slab(projection, y, rotated, stream);
    if (status != cudaSuccess) return status;
    // Only the part of x that these blocks cover.
    const int64_t begin = std::max(offset, rotated.begin);
    const int64_t end = std::min(offset + p, rotated.begin + rotated.count);
    const Slab<T> out = {x + (begin - offset), p, b, begin, end - begin};
    return launch_rotation<true>(projection, as_const(rotated), out, stream);
  });
}

#define KSM_INSTANTIATE(From, T)                                                                 \
  template cudaError_t launch_project(const Projection&, int64_t, const From*, int64_t, int64_t, \
                                      int64_t, T*, T*, cudaStream_t);
KSM_FOR_PROJECTED_TYPES(KSM_INSTANTIATE)
#undef KSM_INSTANTIATE

template cudaError_t launch_project_adjoint(const Projection&, int64_t, const float*, int64_t,
                                            int64_t, float*, float*, cudaStream_t);
template cudaError_t launch_project_adjoint(const Projection&, int64_t, const double*, int64_t,
                                            int64_t, double*, double*, cudaStream_t);

}  // namespace ksm
