// Random projections x P; cpu/project.cpp and cuda/project*.cu share this contract.
//
//     project_:         y[i, r] += sum over j of x[i, j] P[offset + j, r]
//     project_adjoint:  x[i, j]  = sum over r of y[i, r] P[offset + j, r]
//
// x: (b, p)   y: (b, k)   P: (coordinates of all parameters, k)
//
// P is never stored: its entries (projection.h) are drawn where they are used.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "checks.h"
#include "projection.h"

namespace ksm {

inline Projection checked_projection(int64_t k, int64_t kind, int64_t seed, int64_t sparsity,
                                     bool hadamard) {
  STD_TORCH_CHECK(k >= 1 && k < (int64_t{1} << 31), "dim must be between 1 and 2^31 - 1, got ", k,
                  ". Choose fewer outputs.");
  STD_TORCH_CHECK(kind >= 0 && kind <= 3, "kind must be one of 0, 1, 2, 3, got ", kind,
                  ". Use ksm_ext.ops.project.");
  STD_TORCH_CHECK(sparsity >= 1 && sparsity < kHadamardReplicate && k % sparsity == 0,
                  "sparsity must be a divisor of dim ", k, " below 65535, got ", sparsity,
                  ". Choose one, such as 1.");
  return {static_cast<Kind>(kind), static_cast<uint64_t>(seed), k, sparsity, hadamard};
}

inline void check_offset(int64_t offset, int64_t count) {
  STD_TORCH_CHECK(offset >= 0 && offset <= INT64_MAX - count - kSignBlock,
                  "offset must be at least 0 and leave room for the coordinates, got ", offset,
                  ". Count coordinates from 0.");
}

// y (b, k) float32 or float64 accumulates x (b, p) of the same or a shorter dtype, with unit stride
// along p.
inline void check_projected(const Tensor& y, const Tensor& x, int64_t k, int64_t offset) {
  check_contiguous(y, "out", 2);
  STD_TORCH_CHECK(x.dim() == 2, "x must be 2-dimensional, got ", x.dim(),
                  " dimensions. Flatten all but the first.");
  STD_TORCH_CHECK(x.size(1) <= 1 || x.stride(1) == 1,
                  "x must be contiguous along its coordinates, got a strided tensor. "
                  "Call .contiguous() on it.");
  check_same_device(y, "out", x);
  STD_TORCH_CHECK(y.size(0) == x.size(0) && y.size(1) == k, "out must be of shape (", x.size(0),
                  ", ", k, "), got (", y.size(0), ", ", y.size(1), "). Allocate it anew.");
  const ScalarType from = x.scalar_type(), to = y.scalar_type();
  const bool real = from == ScalarType::Double && to == ScalarType::Double;
  const bool single =
      to == ScalarType::Float &&
      (from == ScalarType::Float || from == ScalarType::Half || from == ScalarType::BFloat16);
  STD_TORCH_CHECK(real || single,
                  "x must be float32, bfloat16 or float16 with a float32 out, or float64 with a "
                  "float64 one, got other dtypes. Convert it.");
  check_offset(offset, x.size(1));
}

inline void check_unprojected(const Tensor& y, int64_t k, int64_t count, int64_t offset) {
  check_contiguous(y, "y", 2);
  STD_TORCH_CHECK(y.size(1) == k, "y must be of ", k, " columns, got ", y.size(1),
                  ". Pass what project returned.");
  STD_TORCH_CHECK(y.scalar_type() == ScalarType::Float || y.scalar_type() == ScalarType::Double,
                  "y must be of dtype float32 or float64, got another dtype. Convert it.");
  STD_TORCH_CHECK(count >= 0, "num_coordinates must be at least 0, got ", count,
                  ". Count coordinates from 0.");
  check_offset(offset, count);
}

}  // namespace ksm
