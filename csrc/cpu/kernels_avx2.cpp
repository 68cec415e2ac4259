// The loops with AVX2.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>

#pragma GCC target("avx2")
#include <immintrin.h>

#define KSM_VECTOR_BYTES 32
#include "cpu/loops.h"

namespace ksm {
const CpuKernels kAvx2Kernels = kLoops;
}  // namespace ksm
#endif
