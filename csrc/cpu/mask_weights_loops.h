// Kernels of weighted distances over one tile of masks; see loops.h for how it is included.
//
// The method of four Russians: the lanes of a vector are the masks of one side. For each nibble a table
// holds, for every value that the nibble of an other mask can have, the terms of all lanes side by
// side; an other mask then costs one load and one addition (or product) per nibble and vector of
// lanes. The terms of a pair are joined in the order of the nibbles, whatever the width. (Gathers from
// tables of bytes took 7 times as long, a GEMM of scaled masks 4 times.)
#pragma once

#include "cpu/row_loops.h"
#include "mask_weights.h"

namespace ksm {
namespace {

constexpr int kPanelVectors = 4;  // vectors of lanes that stay in registers over the nibbles

template <typename T>
constexpr int64_t kPanelLanes = kPanelVectors * VectorOf<T>::kLanes;

template <typename T>
constexpr int64_t kSpreadNibble = kNibbleValues * kPanelLanes<T>;  // entries

// As wide as T: bits of a lane's mask, of some nibbles at once.
template <typename T>
using LaneBits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

// Nibble p of up to kTileRows masks: spread[value, lane] = table[value ^ the lane's own nibble].
template <typename Bits, typename BitVector>
void spread_nibble(const Bits* table, BitVector own, int64_t stride, Bits* spread) {
  BitVector terms[kNibbleValues];
  for (int value = 0; value < kNibbleValues; ++value) terms[value] = table[value] - BitVector{};
  // Where a lane has bit q, the terms of values with and without it change places.
#pragma GCC unroll 4
  for (int q = 0; q < kNibbleBits; ++q) {
    const BitVector has = -(own >> q & 1);
#pragma GCC unroll 16
    for (int value = 0; value < kNibbleValues; ++value) {
      if (value >> q & 1) continue;
      const BitVector change = (terms[value] ^ terms[value | 1 << q]) & has;
      terms[value] ^= change;
      terms[value | 1 << q] ^= change;
    }
  }
  for (int value = 0; value < kNibbleValues; ++value) {
    *reinterpret_cast<BitVector*>(spread + value * stride) = terms[value];
  }
}

// spread: (panels, nibbles in range, kNibbleValues, kPanelLanes)
template <typename T>
void spread_nibbles(const T* tables, const uint64_t* masks, int64_t count, int64_t words,
                    Range nibbles, T* spread) {
  using Bits = LaneBits<T>;
  using BitVector = typename VectorOf<Bits>::type;
  constexpr int64_t kLanes = VectorOf<T>::kLanes, kStride = kPanelLanes<T>;
  constexpr int64_t kNibblesInBits = 2 * sizeof(Bits);
  for (int64_t panel = 0; panel < kTileRows; panel += kStride) {
    BitVector own[kPanelVectors];
    for (int64_t p = nibbles.begin; p < nibbles.end; ++p, spread += kSpreadNibble<T>) {
      if (p % kNibblesInBits == 0) {
        for (int64_t r = 0; r < kStride; ++r) {
          const int64_t i = panel + r;
          const uint64_t word = i < count ? masks[i * words + p / kNibblesPerWord] : 0;
          own[r / kLanes][r % kLanes] =
              static_cast<Bits>(word >> p % kNibblesPerWord * kNibbleBits);
        }
      }
      Bits table[kNibbleValues];
      std::memcpy(table, tables + p * kNibbleValues, sizeof(table));
      for (int q = 0; q < kPanelVectors; ++q) {
        spread_nibble(table, own[q], kStride, reinterpret_cast<Bits*>(spread + q * kLanes));
        own[q] >>= kNibbleBits;
      }
    }
  }
}

// Joins the terms of `nibbles` nibbles in one word each of kMasks other masks, for a panel of lanes.
template <MaskKernel kKernel, int kMasks, typename T>
void join_panel(const T* spread, const uint64_t* masks, int64_t words, int64_t nibbles, bool start,
                T* tile) {
  using Vector = typename VectorOf<T>::type;
  constexpr int64_t kLanes = VectorOf<T>::kLanes;
  const auto at = [&](int c, int q) {
    return reinterpret_cast<Vector*>(tile + c * kTileRows + q * kLanes);
  };
  Vector values[kMasks][kPanelVectors];
  uint64_t word[kMasks];
  for (int c = 0; c < kMasks; ++c) {
    word[c] = masks[c * words];
    for (int q = 0; q < kPanelVectors; ++q) {
      if (start) {
        values[c][q] = Vector{} + T(kKernel == MaskKernel::kRbf);
      } else {
        values[c][q] = *at(c, q);
      }
    }
  }
  for (int64_t p = 0; p < nibbles; ++p, spread += kSpreadNibble<T>) {
    for (int c = 0; c < kMasks; ++c) {
      const T* terms = spread + word[c] % kNibbleValues * kPanelLanes<T>;
      word[c] >>= kNibbleBits;
      for (int q = 0; q < kPanelVectors; ++q) {
        const auto term = *reinterpret_cast<const Vector*>(terms + q * kLanes);
        if constexpr (kKernel == MaskKernel::kRbf) {
          values[c][q] *= term;
        } else {
          values[c][q] += term;
        }
      }
    }
  }
  for (int c = 0; c < kMasks; ++c) {
    for (int q = 0; q < kPanelVectors; ++q) *at(c, q) = values[c][q];
  }
}

// A word of all other masks before the next word: its terms stay in the nearest caches.
template <MaskKernel kKernel, typename T>
void join_tile(const T* spread, const uint64_t* masks, int64_t count, int64_t words, Range nibbles,
               bool start, T* tile) {
  for (int64_t lane = 0; lane < kTileRows; lane += kPanelLanes<T>) {
    for (int64_t first = nibbles.begin; first < nibbles.end; first += kNibblesPerWord) {
      const int64_t left = nibbles.end - first;
      const int64_t in_word = left < kNibblesPerWord ? left : kNibblesPerWord;
      const bool starts = start && first == nibbles.begin;
      const uint64_t* word = masks + first / kNibblesPerWord;
      int64_t j = 0;
      for (; j + 2 <= count; j += 2) {
        join_panel<kKernel, 2>(spread, word + j * words, words, in_word, starts,
                               tile + j * kTileRows + lane);
      }
      if (j < count) {
        join_panel<kKernel, 1>(spread, word + j * words, words, in_word, starts,
                               tile + j * kTileRows + lane);
      }
      spread += in_word * kSpreadNibble<T>;
    }
  }
}

template <typename T>
void join_nibbles(MaskKernel kernel, const T* spread, const uint64_t* masks, int64_t count,
                  int64_t words, Range nibbles, bool start, T* tile) {
  if (kernel == MaskKernel::kRbf) {
    join_tile<MaskKernel::kRbf>(spread, masks, count, words, nibbles, start, tile);
  } else {
    join_tile<MaskKernel::kExponential>(spread, masks, count, words, nibbles, start, tile);
  }
}

template <typename T>
void finish_values(MaskKernel kernel, int64_t count, T* __restrict values) {
  if (kernel == MaskKernel::kRbf) {
    for (int64_t j = 0; j < count; ++j) values[j] = normal_or_zero(values[j]);
  } else {
    for (int64_t j = 0; j < count; ++j) values[j] = exp_of_minus(root_of(values[j]));
  }
}

template <typename T>
void scale_by_product(T factor, const T* __restrict factors, int64_t count, T* __restrict values) {
  for (int64_t j = 0; j < count; ++j) values[j] *= factor * factors[j];
}

}  // namespace
}  // namespace ksm
