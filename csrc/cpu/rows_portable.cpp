// Rows in the instructions that every CPU of the platform has.
#include "cpu/row_loops.h"

namespace ksm {

const RowKernels<float> kPortableRowsFloat = kRowKernels<float>;
const RowKernels<double> kPortableRowsDouble = kRowKernels<double>;

}  // namespace ksm
