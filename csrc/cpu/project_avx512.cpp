// Projections with AVX-512.
#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl")
#include <immintrin.h>

#define KSM_VECTOR_BYTES 64
#include "cpu/project_rows.h"

namespace ksm {
const AllProjectKernels kAvx512Project = {kernels_of<float>(), kernels_of<double>()};
}  // namespace ksm
#endif
