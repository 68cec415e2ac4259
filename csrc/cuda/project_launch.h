// The launchers of project.cu; see bind.h.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "projection.h"

namespace ksm {

// How many values of the result's type a projection, or its adjoint, needs as scratch.
int64_t project_scratch(const Projection& projection, int64_t offset, int64_t b, int64_t p);
int64_t project_adjoint_scratch(const Projection& projection, int64_t b, int64_t p);

template <typename From, typename T>
cudaError_t launch_project(const Projection& projection, int64_t offset,
                           const From* x,  // (b, p), row i at x + i * x_stride
                           int64_t x_stride, int64_t b, int64_t p,
                           T* scratch,  // (project_scratch)
                           T* y,        // (b, k), added to
                           cudaStream_t stream);

template <typename T>
cudaError_t launch_project_adjoint(const Projection& projection, int64_t offset,
                                   const T* y,  // (b, k)
                                   int64_t b, int64_t p,
                                   T* scratch,  // (project_adjoint_scratch)
                                   T* x,        // (b, p)
                                   cudaStream_t stream);

}  // namespace ksm
