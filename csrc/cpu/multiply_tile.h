// One tile of the Gram matrix times v, written once for vectors of any width.
//
// Included by each tile_<isa>.cpp, which defines KSM_VECTOR_BYTES first: everything is in an
// anonymous namespace, so that each instruction set keeps its own copy. The lanes of a vector are
// rows, hence every entry of the result is the same sequence of products and sums, whatever the
// width (and with -ffp-contract=off the same bits).
#pragma once

#include <cstdint>

#include "cpu/tile.h"

namespace ksm {
namespace {

template <typename T>
struct VectorOf {
  static constexpr int kLanes = KSM_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(KSM_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

// Two vectors of rows by kTargets columns of v stay in registers over the whole block.
template <typename T, int kTargets>
void multiply_panel(const T* gram, const T* v, int64_t columns, int64_t t, double* total) {
  using Vector = typename VectorOf<T>::type;
  constexpr int kLanes = VectorOf<T>::kLanes;
  for (int64_t r = 0; r < kTileRows; r += 2 * kLanes) {
    Vector low[kTargets] = {}, high[kTargets] = {};
    for (int64_t j = 0; j < columns; ++j) {
      const Vector g_low = *reinterpret_cast<const Vector*>(gram + j * kTileRows + r);
      const Vector g_high = *reinterpret_cast<const Vector*>(gram + j * kTileRows + r + kLanes);
      for (int c = 0; c < kTargets; ++c) {
        low[c] += g_low * v[j * t + c];
        high[c] += g_high * v[j * t + c];
      }
    }
    for (int c = 0; c < kTargets; ++c) {
      double* out = total + c * kTileRows + r;
      for (int q = 0; q < kLanes; ++q) out[q] += low[c][q];
      for (int q = 0; q < kLanes; ++q) out[kLanes + q] += high[c][q];
    }
  }
}

template <typename T>
void multiply_tile(const T* gram, const T* v, int64_t columns, int64_t t, double* total) {
  int64_t c = 0;
  for (; c + 4 <= t; c += 4) multiply_panel<T, 4>(gram, v + c, columns, t, total + c * kTileRows);
  if (c + 2 <= t) {
    multiply_panel<T, 2>(gram, v + c, columns, t, total + c * kTileRows);
    c += 2;
  }
  if (c < t) multiply_panel<T, 1>(gram, v + c, columns, t, total + c * kTileRows);
}

}  // namespace
}  // namespace ksm
