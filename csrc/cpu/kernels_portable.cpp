// The loops in the instructions that every CPU of the platform has: the oracle of the others.
#define KSM_VECTOR_BYTES 16
#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/loops.h"

namespace ksm {
const CpuKernels kPortableKernels = kLoops;
}  // namespace ksm
