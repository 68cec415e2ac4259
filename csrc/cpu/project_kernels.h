// What an instruction set contributes to project: one range of coordinates of a few rows, by one
// thread. project.cpp splits the work and knows nothing of instruction sets.
#pragma once

#include <cstdint>

#include "project.h"

namespace ksm {

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

template <typename T>
struct ProjectKernels {
  // y[i, r] += sum over j of x[i, j] P[j, r], for coordinates j and (dense kinds only) outputs r in
  // their ranges; the sparse kinds fill all outputs.
  void (*project)(const Projection& projection, Range coordinates, Range outputs, int64_t rows,
                  const T* x,  // (rows, coordinates), row i at x + i * x_stride
                  int64_t x_stride,
                  T* y,  // (rows, k), row i at y + i * y_stride
                  int64_t y_stride);

  // x[i, j] = sum over r of y[i, r] P[j, r].
  void (*adjoint)(const Projection& projection, Range coordinates, int64_t rows,
                  const T* y,  // (rows, k)
                  T* x,        // (rows, coordinates), row i at x + i * x_stride
                  int64_t x_stride);
};

struct AllProjectKernels {
  ProjectKernels<float> single;
  ProjectKernels<double> real;
};

extern const AllProjectKernels kPortableProject;
#if defined(__x86_64__)
extern const AllProjectKernels kAvx2Project;
extern const AllProjectKernels kAvx512Project;
#endif

}  // namespace ksm
