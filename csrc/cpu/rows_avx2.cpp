// Rows with AVX2.
#if defined(__x86_64__)
#include <cstring>  // before the target: what it defines must run everywhere
#pragma GCC target("avx2")
#include "cpu/row_loops.h"

namespace ksm {

const RowKernels<float> kAvx2RowsFloat = kRowKernels<float>;
const RowKernels<double> kAvx2RowsDouble = kRowKernels<double>;

}  // namespace ksm
#endif
