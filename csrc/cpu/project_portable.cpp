// Projections for any CPU.
#define KSM_VECTOR_BYTES 16
#include "cpu/project_rows.h"

namespace ksm {
const AllProjectKernels kPortableProject = {kernels_of<float>(), kernels_of<double>()};
}  // namespace ksm
