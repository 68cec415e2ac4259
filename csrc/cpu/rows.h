// What an instruction set contributes to gram, glm_hvp and softmax_hvp: passes over one row.
//
// rows_avx512.cpp, rows_avx2.cpp and rows_portable.cpp compile the same loops (row_loops.h), whose
// entries do not depend on the width of the vectors: every instruction set gives the same bits.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "gram.h"
#include "logistic.h"

namespace ksm {

template <typename T>
struct RowKernels {
  // u[j] *= curvature[j]
  void (*scale)(const T* curvature, int64_t count, T* u);
  void (*scale_bfloat16)(const BFloat16* curvature, int64_t count, T* u);

  // The margins h + u: u becomes their slopes, curvature (unless null) their curvatures. Returns
  // the sum of their losses.
  double (*logistic)(const T* h, int64_t count, T* u, T* curvature);
  double (*logistic_bfloat16)(const T* h, int64_t count, T* u, BFloat16* curvature);

  // values[j] becomes the kernel of a pair from its dot product, or with kLaplace its distance.
  void (*kernel_values)(const KernelParameters& kernel, T x_square,
                        const T* y_squares,  // (count)
                        int64_t count, T* values);

  // values[j] = ||x - y_j||_1, added up in the order of the n coordinates.
  void (*absolute_distances)(const T* x,  // (n)
                             const T* y,  // (n, count)
                             int64_t n, int64_t count, T* values);

  // p = softmax(z)
  void (*softmax)(const T* z, int64_t count, T* p);

  // <x, y>, added up in an order that depends on count alone.
  T (*dot)(const T* x, const T* y, int64_t count);

  // out[j] = weight p[j] (x[j] - mean); out may be x.
  void (*centre)(const T* p, const T* x, T weight, T mean, int64_t count, T* out);
};

extern const RowKernels<float> kPortableRowsFloat;
extern const RowKernels<double> kPortableRowsDouble;
#if defined(__x86_64__)
extern const RowKernels<float> kAvx2RowsFloat, kAvx512RowsFloat;
extern const RowKernels<double> kAvx2RowsDouble, kAvx512RowsDouble;
#endif

template <typename T>
const RowKernels<T>& row_kernels();

template <>
inline const RowKernels<float>& row_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512: return kAvx512RowsFloat;
    case Isa::kAvx2: return kAvx2RowsFloat;
#endif
    default: return kPortableRowsFloat;
  }
}

template <>
inline const RowKernels<double>& row_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512: return kAvx512RowsDouble;
    case Isa::kAvx2: return kAvx2RowsDouble;
#endif
    default: return kPortableRowsDouble;
  }
}

}  // namespace ksm
