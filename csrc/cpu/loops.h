// All loops of kernels.h for one instruction set.
//
// Included by each kernels_<isa>.cpp behind its target, with KSM_VECTOR_BYTES defined. Every function
// in the headers of loops is in an anonymous namespace, so that each instruction set keeps its own
// copy: the linker must not pick one for all. The standard headers they need are included before the
// target for the same reason.
#pragma once

#include "cpu/kernels.h"
#include "cpu/mask_gram_loops.h"
#include "cpu/mask_weights_loops.h"
#include "cpu/project_dense.h"
#include "cpu/project_sbp.h"
#include "cpu/project_sjlt.h"
#include "cpu/row_loops.h"

namespace ksm {
namespace {

template <typename T>
void project_rows(const Projection& projection, Range coordinates, Range outputs, int64_t rows,
                  const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  switch (projection.kind) {
    case Kind::kSbp: return project_sbp(projection, coordinates, rows, x, x_stride, y, y_stride);
    case Kind::kSjlt: return project_sjlt(projection, coordinates, rows, x, x_stride, y, y_stride);
    case Kind::kRademacher:
      if constexpr (sizeof(T) == sizeof(float)) {
        return project_rademacher(projection, coordinates, outputs, rows, x, x_stride, y, y_stride);
      }
    case Kind::kGaussian: break;
  }
  project_dense(projection, coordinates, outputs, rows, x, x_stride, y, y_stride);
}

template <typename T>
void project_rows_back(const Projection& projection, Range coordinates, int64_t rows, const T* y,
                       T* x, int64_t x_stride) {
  switch (projection.kind) {
    case Kind::kSbp: return adjoint_sbp(projection, coordinates, rows, y, x, x_stride);
    case Kind::kSjlt: return adjoint_sjlt(projection, coordinates, rows, y, x, x_stride);
    default: return adjoint_dense(projection, coordinates, rows, y, x, x_stride);
  }
}

template <typename T>
constexpr RealKernels<T> kRealKernels = {multiply_tile<T>,
                                         spread_nibbles<T>,
                                         join_nibbles<T>,
                                         finish_values<T>,
                                         scale_by_product<T>,
                                         project_rows<T>,
                                         project_rows_back<T>,
                                         scale<T, T>,
                                         scale<T, BFloat16>,
                                         logistic<T, T>,
                                         logistic<T, BFloat16>,
                                         kernel_values<T>,
                                         absolute_distances<T>,
                                         softmax<T>,
                                         dot<T>,
                                         centre<T>};

constexpr CpuKernels kLoops = {
    {block_bytes, lay_out_block, count_tile}, kRealKernels<float>, kRealKernels<double>};

}  // namespace
}  // namespace ksm
