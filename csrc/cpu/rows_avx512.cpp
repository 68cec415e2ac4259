// Rows with AVX-512.
#if defined(__x86_64__)
#include <cstring>  // before the target: what it defines must run everywhere
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq")
#include "cpu/row_loops.h"

namespace ksm {

const RowKernels<float> kAvx512RowsFloat = kRowKernels<float>;
const RowKernels<double> kAvx512RowsDouble = kRowKernels<double>;

}  // namespace ksm
#endif
