// Projections on the CPU: how rows, coordinates and outputs are shared between threads.
//
// Work is cut by shapes alone, and sums over cuts run in their order: the result is the same for any
// number of threads.
#include "project.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <memory>
#include <type_traits>

#include "cpu/kernels.h"

namespace ksm {
namespace {

constexpr int64_t divide_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit; }

// A grid of pieces of the work: rows x outputs x chunks of coordinates.
struct Pieces {
  int64_t rows, row_groups;        // per group
  int64_t outputs, output_ranges;  // per range
  int64_t coordinates, chunks;     // per chunk

  int64_t count() const { return row_groups * output_ranges * chunks; }
};

Pieces pieces_of(const Projection& projection, int64_t b, int64_t p) {
  // Random numbers are drawn once for a group of rows, which is why groups are large for the dense
  // kinds; and the outputs of a dense range stay in the cache.
  constexpr int64_t kSparseRows = 16, kDenseRows = 64, kDenseOutputs = 1024, kEnough = 16;
  const bool sparse = is_sparse(projection.kind);
  Pieces pieces;
  pieces.row_groups = divide_up(b, sparse ? kSparseRows : kDenseRows);
  pieces.rows = divide_up(b, pieces.row_groups);
  pieces.outputs = sparse ? projection.k : kDenseOutputs;
  pieces.output_ranges = divide_up(projection.k, pieces.outputs);
  // Few rows are cut along p, as far as the partial sums (chunks, b, k) stay small beside the input.
  const int64_t wanted = divide_up(kEnough, pieces.row_groups * pieces.output_ranges);
  const int64_t chunks = std::clamp<int64_t>(p / (48 * projection.k), 1, wanted);
  pieces.coordinates = divide_up(divide_up(p, chunks), kSignBlock) * kSignBlock;
  pieces.chunks = divide_up(p, pieces.coordinates);
  if (projection.kind == Kind::kGaussian) {
    // A normal costs more than 64 rows do with it: as many pieces of more rows and fewer outputs.
    // Chunks stay: results have their bits by these alone.
    constexpr int64_t kMore = 4;
    pieces.row_groups = divide_up(b, kMore * kDenseRows);
    pieces.rows = divide_up(b, pieces.row_groups);
    pieces.outputs = kDenseOutputs / kMore;
    pieces.output_ranges = divide_up(projection.k, pieces.outputs);
  }
  return pieces;
}

// As the kernel, for inputs of another type: converted a stretch at a time.
template <typename From, typename T>
void project_piece(const Projection& projection, Range coordinates, Range outputs, int64_t rows,
                   const From* x, int64_t x_stride, T* y, int64_t y_stride) {
  const auto kernel = cpu_kernels().of<T>().project_rows;
  if constexpr (std::is_same_v<From, T>) {
    kernel(projection, coordinates, outputs, rows, x, x_stride, y, y_stride);
  } else {
    constexpr int64_t kStretch = 8192;
    const std::unique_ptr<T[]> converted(new T[rows * kStretch]);
    for (int64_t begin = coordinates.begin; begin < coordinates.end; begin += kStretch) {
      const Range stretch = {begin, std::min(begin + kStretch, coordinates.end)};
      for (int64_t i = 0; i < rows; ++i) {
        const From* from = x + i * x_stride + begin - coordinates.begin;
        std::transform(from, from + stretch.size(), converted.get() + i * kStretch,
                       [](From value) { return static_cast<T>(value); });
      }
      kernel(projection, stretch, outputs, rows, converted.get(), kStretch, y, y_stride);
    }
  }
}

template <typename From, typename T>
void project_all(const Projection& projection, int64_t offset, const Tensor& x, T* y) {
  const int64_t b = x.size(0), p = x.size(1), k = projection.k, x_stride = x.stride(0);
  const auto* values = static_cast<const From*>(x.const_data_ptr());
  const Pieces pieces = pieces_of(projection, b, p);
  // The first chunk adds to y itself.
  const std::unique_ptr<T[]> partials(new T[(pieces.chunks - 1) * b * k]());
  torch::stable::parallel_for(0, pieces.count(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t range = piece % pieces.output_ranges;
      const int64_t group = piece / pieces.output_ranges % pieces.row_groups;
      const int64_t chunk = piece / pieces.output_ranges / pieces.row_groups;
      const int64_t first_row = group * pieces.rows, first = chunk * pieces.coordinates;
      T* sums = chunk ? partials.get() + (chunk - 1) * b * k : y;
      project_piece<From, T>(
          projection, {offset + first, offset + std::min(first + pieces.coordinates, p)},
          {range * pieces.outputs, std::min((range + 1) * pieces.outputs, k)},
          std::min(pieces.rows, b - first_row), values + first_row * x_stride + first, x_stride,
          sums + first_row * k, k);
    }
  });
  torch::stable::parallel_for(0, b * k, 1 << 14, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = 1; chunk < pieces.chunks; ++chunk) {
      const T* sums = partials.get() + (chunk - 1) * b * k;
      for (int64_t i = begin; i < end; ++i) y[i] += sums[i];
    }
  });
}

void project_cpu(const Tensor& y, const Tensor& x, int64_t offset, int64_t k, int64_t kind,
                 int64_t seed, int64_t sparsity, bool hadamard) {
  const Projection projection = checked_projection(k, kind, seed, sparsity, hadamard);
  check_projected(y, x, k, offset);
  if (x.size(0) == 0 || x.size(1) == 0) return;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return project_all<float>(projection, offset, x, y.mutable_data_ptr<float>());
    case ScalarType::BFloat16:
      return project_all<c10::BFloat16>(projection, offset, x, y.mutable_data_ptr<float>());
    case ScalarType::Half:
      return project_all<c10::Half>(projection, offset, x, y.mutable_data_ptr<float>());
    default: return project_all<double>(projection, offset, x, y.mutable_data_ptr<double>());
  }
}

template <typename T>
void adjoint_all(const Projection& projection, int64_t offset, const T* y, int64_t b, int64_t p,
                 T* x) {
  constexpr int64_t kRows = 64, kCoordinates = 1 << 15;
  const int64_t row_groups = divide_up(b, kRows), chunks = divide_up(p, kCoordinates);
  torch::stable::parallel_for(0, row_groups * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t row = piece % row_groups * kRows, first = piece / row_groups * kCoordinates;
      cpu_kernels().of<T>().project_rows_back(
          projection, {offset + first, offset + std::min(first + kCoordinates, p)},
          std::min(kRows, b - row), y + row * projection.k, x + row * p + first, p);
    }
  });
}

Tensor project_adjoint_cpu(const Tensor& y, int64_t num_coordinates, int64_t offset, int64_t k,
                           int64_t kind, int64_t seed, int64_t sparsity, bool hadamard) {
  const Projection projection = checked_projection(k, kind, seed, sparsity, hadamard);
  check_unprojected(y, k, num_coordinates, offset);
  const int64_t b = y.size(0), p = num_coordinates;
  Tensor x = torch::stable::new_empty(y, {b, p});
  if (b == 0 || p == 0) return x;
  if (y.scalar_type() == ScalarType::Float) {
    adjoint_all(projection, offset, y.const_data_ptr<float>(), b, p, x.mutable_data_ptr<float>());
  } else {
    adjoint_all(projection, offset, y.const_data_ptr<double>(), b, p, x.mutable_data_ptr<double>());
  }
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ksm_ext, CPU, m) {
  m.impl("project_", TORCH_BOX(&project_cpu));
  m.impl("project_adjoint", TORCH_BOX(&project_adjoint_cpu));
}

}  // namespace ksm
