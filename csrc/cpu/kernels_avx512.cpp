// The loops with AVX-512.
#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>

#ifndef KSM_EMULATE_AVX512  // tools/check_avx512.sh compiles this file against SIMDe instead
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vpopcntdq")
#include <immintrin.h>
#endif

#define KSM_VECTOR_BYTES 64
#include "cpu/loops.h"

namespace ksm {
const CpuKernels kAvx512Kernels = kLoops;
}  // namespace ksm
#endif
