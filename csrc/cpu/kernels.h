// What an instruction set contributes to the operators: loops of one thread, in one table for each.
//
// kernels_avx512.cpp, kernels_avx2.cpp and kernels_portable.cpp fill one CpuKernels each from the same
// loops (cpu/loops.h). Their entries do not depend on the width of the vectors: every instruction set
// gives the same bits. The drivers know nothing of instruction sets but cpu_kernels().
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/isa.h"
#include "kernel_value.h"
#include "logistic.h"
#include "mask_weights.h"
#include "projection.h"

namespace ksm {

// ---- masks: counts over one tile, and one tile times v ----------------------------------------
//
// A tile is up to kRowGroup rows of x against one block of kBlockColumns columns (masks of y).

constexpr int64_t kRowGroup = 4;  // rows counted at once: their tables or words sit in registers
constexpr int64_t kBlockColumns =
    64;                            // columns per block: a block of 1,024 tasks fits the L1 cache
constexpr int64_t kTileRows = 64;  // rows that pass over a block before the next one is loaded

// What is counted for a pair of masks.
enum class Count { kOverlap, kHamming };

struct MaskKernels {
  // Bytes of one block of kBlockColumns masks in this instruction set's own layout.
  int64_t (*block_bytes)(int64_t words);

  // Lays out `columns` <= kBlockColumns masks as a block; the missing ones are empty masks.
  void (*lay_out_block)(const uint64_t* y,  // (columns, words)
                        int64_t columns, int64_t words, uint8_t* block);

  // counts[r, j] of every pair of the tile; rows past `rows` are left alone.
  void (*count_tile)(const uint64_t* x,  // (rows, words)
                     int64_t rows, int64_t words, const uint8_t* block, Count what,
                     uint32_t* counts);  // (kRowGroup, kBlockColumns)
};

// Of coordinates, or of nibbles.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// ---- projections: one range of coordinates of a few rows --------------------------------------

// ---- everything that is written for float32 and float64 ---------------------------------------

template <typename T>
struct RealKernels {
  // total[c, r] += sum over j of gram[j, r] * v[j, c], in the order of j. The sum over the block is
  // taken in T, the total in float64.
  void (*multiply_tile)(const T* gram,  // (columns, kTileRows)
                        const T* v,     // (columns, t)
                        int64_t columns, int64_t t,
                        double* total);  // (t, kTileRows)

  // Lays out, for `count` <= kTileRows masks and a range of nibbles, the terms of these masks and of
  // every value that an other mask's nibble can have.
  void (*spread_nibbles)(const T* tables,        // (nibbles, kNibbleValues), all of them
                         const uint64_t* masks,  // (count, words)
                         int64_t count, int64_t words, Range nibbles,
                         T* spread);  // (nibbles in range, kNibbleValues, kTileRows), in any order

  // tile[j, r] joins the terms of other mask j and spread mask r over the range of nibbles: to what
  // it holds, or from nothing where `start`.
  void (*join_nibbles)(MaskKernel kernel, const T* spread,
                       const uint64_t* masks,  // (count, words)
                       int64_t count, int64_t words, Range nibbles, bool start,
                       T* tile);  // (count, kTileRows)

  // Makes values of what was joined.
  void (*finish_values)(MaskKernel kernel, int64_t count, T* values);

  // values[j] *= factor factors[j]
  void (*scale_by_product)(T factor, const T* factors, int64_t count, T* values);

  // y[i, r] += sum over j of x[i, j] P[j, r], for coordinates j and (dense kinds only) outputs r in
  // their ranges; the sparse kinds fill all outputs.
  void (*project_rows)(const Projection& projection, Range coordinates, Range outputs, int64_t rows,
                       const T* x,  // (rows, coordinates), row i at x + i * x_stride
                       int64_t x_stride,
                       T* y,  // (rows, k), row i at y + i * y_stride
                       int64_t y_stride);

  // x[i, j] = sum over r of y[i, r] P[j, r].
  void (*project_rows_back)(const Projection& projection, Range coordinates, int64_t rows,
                            const T* y,  // (rows, k)
                            T* x,        // (rows, coordinates), row i at x + i * x_stride
                            int64_t x_stride);

  // u[j] *= curvature[j]
  void (*scale)(const T* curvature, int64_t count, T* u);
  void (*scale_bfloat16)(const BFloat16* curvature, int64_t count, T* u);

  // The margins h + u: u becomes their slopes, curvature (unless null) their curvatures. Returns
  // the sum of their losses.
  double (*logistic)(const T* h, int64_t count, T* u, T* curvature);
  double (*logistic_bfloat16)(const T* h, int64_t count, T* u, BFloat16* curvature);

  // values[j] becomes the kernel of a pair from its dot product, or with kLaplace its distance.
  void (*kernel_values)(const KernelParameters& kernel, T x_square,
                        const T* y_squares,  // (count)
                        int64_t count, T* values);

  // values[j] = ||x - y_j||_1, added up in the order of the n coordinates.
  void (*absolute_distances)(const T* x,  // (n)
                             const T* y,  // (n, count)
                             int64_t n, int64_t count, T* values);

  // p = softmax(z)
  void (*softmax)(const T* z, int64_t count, T* p);

  // <x, y>, added up in an order that depends on count alone.
  T (*dot)(const T* x, const T* y, int64_t count);

  // out[j] = weight p[j] (x[j] - mean); out may be x.
  void (*centre)(const T* p, const T* x, T weight, T mean, int64_t count, T* out);
};

// ---- one table for each instruction set -------------------------------------------------------

struct CpuKernels {
  MaskKernels masks;
  RealKernels<float> single;
  RealKernels<double> real;

  template <typename T>
  const RealKernels<T>& of() const {
    if constexpr (std::is_same_v<T, float>) {
      return single;
    } else {
      return real;
    }
  }
};

extern const CpuKernels kPortableKernels;
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels, kAvx512Kernels;
#endif

// Those of the instruction set in use.
inline const CpuKernels& cpu_kernels() {
  switch (cpu_isa()) {
#if defined(__x86_64__)
    case Isa::kAvx512: return kAvx512Kernels;
    case Isa::kAvx2: return kAvx2Kernels;
#endif
    default: return kPortableKernels;
  }
}

}  // namespace ksm
