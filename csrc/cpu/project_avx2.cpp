// Projections with AVX2.
#if defined(__x86_64__)
#pragma GCC target("avx2")
#include <immintrin.h>

#define KSM_VECTOR_BYTES 32
#include "cpu/project_rows.h"

namespace ksm {
const AllProjectKernels kAvx2Project = {kernels_of<float>(), kernels_of<double>()};
}  // namespace ksm
#endif
