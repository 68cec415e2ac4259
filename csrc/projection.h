// The entries of a random projection P (p, k), a pure function of (seed, kind, k, sparsity, coordinate,
// output): the same number on every device, for every split of rows, coordinates and parameters.
//
// E[P Pᵀ] = I: squared norms and inner products keep their expectation. With scale 1/√s or 1/√k,
// entries are
//
// sbp         signed block permutation. Outputs are split into s segments of q = k / s, coordinates
//             into blocks of q. In each segment every block is permuted and given signs, so that a
//             coordinate meets one output of each segment, two coordinates of one block never meet,
//             and two of different blocks do so with probability 1 / q. With `hadamard`, a block is
//             first given signs of its own and rotated by a Walsh-Hadamard matrix.
// sjlt        s nonzeros, one in each segment, at an independent position (Kane & Nelson 2014).
// rademacher  ±1/√k. gaussian  N(0, 1/k), by Box and Muller in float32.
//
// Philox counters are {index, index >> 32, group, tag}; key: the seed.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace ksm {

enum class Kind : int64_t { kSbp = 0, kRademacher = 1, kGaussian = 2, kSjlt = 3 };

struct Projection {
  Kind kind;
  uint64_t seed;
  int64_t k;         // outputs
  int64_t sparsity;  // s: nonzeros per coordinate of sbp and sjlt; divides k
  bool hadamard;     // sbp only
};

KSM_HOST_DEVICE static inline bool is_sparse(Kind kind) {
  return kind == Kind::kSbp || kind == Kind::kSjlt;
}

KSM_HOST_DEVICE static inline int64_t segment_of(const Projection& projection) {
  return projection.k / projection.sparsity;
}

KSM_HOST_DEVICE static inline double scale_of(const Projection& projection) {
  const int64_t terms = is_sparse(projection.kind) ? projection.sparsity : projection.k;
  return 1.0 / sqrt(static_cast<double>(terms));
}

constexpr uint32_t kStreamVersion = 1;
constexpr uint32_t kHadamardReplicate = 0xffff;  // the signs before the rotation

KSM_HOST_DEVICE static inline Words counter_of(Kind kind, int64_t index, uint32_t group,
                                               uint32_t replicate) {
  const uint32_t tag = kStreamVersion << 24 | static_cast<uint32_t>(kind) << 16 | replicate;
  return {{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), group, tag}};
}

// ---- sbp -------------------------------------------------------------------------------------

// Coordinates move in vectors of up to 16 neighbours, as wide as an AVX-512 register of float32.
KSM_HOST_DEVICE static inline int64_t vector_length(int64_t segment) {
  int64_t length = 1;
  while (length < 16 && segment % (2 * length) == 0) length *= 2;
  return length;
}

// The Walsh-Hadamard rotation acts on runs of this many coordinates, a power of two.
KSM_HOST_DEVICE static inline int64_t hadamard_length(int64_t segment) {
  int64_t length = 1;
  while (length < 4096 && segment % (2 * length) == 0) length *= 2;
  return length;
}

// Vector v goes to (multiplier * v + shift) mod vectors, and its lane l to l ^ flip.
struct BlockPermutation {
  uint32_t multiplier, shift, flip;
};

KSM_HOST_DEVICE static inline BlockPermutation block_permutation(uint64_t seed, int64_t block,
                                                                 uint32_t replicate,
                                                                 int64_t vectors, int64_t length) {
  const Words random = philox(seed, counter_of(Kind::kSbp, block, 0, replicate));
  const auto count = static_cast<uint32_t>(vectors);
  uint32_t multiplier = below(random.word[0], count) + 1;
  for (;; multiplier = multiplier % count + 1) {  // on to one that is coprime to the count
    uint32_t a = multiplier, b = count;
    while (b) {
      const uint32_t rest = a % b;
      a = b;
      b = rest;
    }
    if (a == 1) break;
  }
  return {multiplier % count, below(random.word[1], count),
          random.word[2] & static_cast<uint32_t>(length - 1)};
}

// 128 signs of a block: coordinate u of it is negative where bit u % 128 is set.
KSM_HOST_DEVICE static inline Words block_signs(uint64_t seed, int64_t block, uint32_t replicate,
                                                int64_t u) {
  return philox(seed, counter_of(Kind::kSbp, block, 1 + static_cast<uint32_t>(u / 128), replicate));
}

// ---- sjlt ------------------------------------------------------------------------------------

struct Nonzero {
  uint32_t output;  // within the segment
  bool negative;
};

KSM_HOST_DEVICE static inline Nonzero nonzero_of(uint32_t word, int64_t segment) {
  const auto bound = static_cast<uint32_t>(segment);
  return {static_cast<uint32_t>(uint64_t{word >> 1} * bound >> 31), (word & 1) != 0};
}

KSM_HOST_DEVICE static inline Words sjlt_words(uint64_t seed, int64_t coordinate,
                                               int64_t replicate) {
  return philox(seed, counter_of(Kind::kSjlt, coordinate, static_cast<uint32_t>(replicate / 4), 0));
}

// ---- dense kinds -----------------------------------------------------------------------------

// 128 signs of an output. The order suits both the fragments of tensor cores and, as four
// neighbouring bits are coordinates 8 apart, lookups of sums of four.
constexpr int64_t kSignBlock = 128;

KSM_HOST_DEVICE static inline Words rademacher_words(uint64_t seed, int64_t block, int64_t output) {
  return philox(seed, counter_of(Kind::kRademacher, block, static_cast<uint32_t>(output), 0));
}

// Coordinate j of a block of 128 is negative where bit sign_bit(j) of word sign_word(j) is set.
KSM_HOST_DEVICE static constexpr int sign_word(int j) { return j % 8 / 2; }
KSM_HOST_DEVICE static constexpr int sign_bit(int j) { return j / 8 + 16 * (j % 2); }

struct NormalPair {
  float first, second;
};

KSM_HOST_DEVICE static inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

KSM_HOST_DEVICE static inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

// Box and Muller with polynomials of float32 products and sums, each rounded once: the same bits
// wherever IEEE arithmetic is not contracted. Without a branch: loops over it vectorise.
KSM_HOST_DEVICE static inline NormalPair normals_of(uint32_t radius_word, uint32_t angle_word) {
  // u = (r + 1/2) 2^-23 in (0, 1), from the 23 bits of r as the fraction of a number in [1, 2): the
  // difference is exact. u = m 2^e with m in [0.75, 1.5), whose bits are one range of 2^23.
  const float u = float_of(radius_word >> 9 | 0x3f800000u) - (1.0f - 0x1p-24f);
  constexpr uint32_t kLeast = 0x3f400000, kFraction = 0x7fffff;  // the bits of 0.75
  const auto above = static_cast<int32_t>(bits_of(u) - kLeast);
  const auto exponent = static_cast<float>(above >> 23);
  const float m = float_of((static_cast<uint32_t>(above) & kFraction) + kLeast);
  const float s = (m - 1.0f) / (m + 1.0f), s2 = s * s;
  const float series =
      1.0f + s2 * (0.333333333f + s2 * (0.2f + s2 * (0.142857143f + s2 * 0.111111111f)));
  // sqrt(-2 log(u)); doubling is exact.
  const float radius = sqrtf(exponent * (-2.0f * 0.693147181f) + (-4.0f * s) * series);
  // A quarter turn by two bits, and an angle within ±pi/4 by 23 bits: (r + 1/2) 2^-23 - 1/2 of pi/2.
  const float fraction = float_of((angle_word >> 7 & kFraction) | 0x3f800000u);
  const float angle = ((fraction - 1.5f) + 0x1p-24f) * 1.57079633f, a2 = angle * angle;
  const float sine =
      angle * (1.0f - a2 * (0.166666667f - a2 * (0.00833333333f - a2 * 0.000198412698f)));
  const float cosine =
      1.0f - a2 * (0.5f - a2 * (0.0416666667f - a2 * (0.00138888889f - a2 * 2.48015873e-05f)));
  // Turned by 0, 1, 2, 3 quarters: (c, s), (-s, c), (-c, -s), (s, -c).
  const bool odd = (angle_word & 0x40000000u) != 0;
  const float turned = float_of(bits_of(radius) ^ (angle_word & 0x80000000u));
  const float with_cosine = turned * cosine, with_sine = turned * sine;
  return {odd ? -with_sine : with_cosine, odd ? with_cosine : with_sine};
}

// Normals of four neighbouring coordinates, 4 * quad and on, of an output.
KSM_HOST_DEVICE static inline void gaussian_quad(uint64_t seed, int64_t quad, int64_t output,
                                                 float normals[4]) {
  const Words random =
      philox(seed, counter_of(Kind::kGaussian, quad, static_cast<uint32_t>(output), 0));
  const NormalPair low = normals_of(random.word[0], random.word[1]);
  const NormalPair high = normals_of(random.word[2], random.word[3]);
  normals[0] = low.first;
  normals[1] = low.second;
  normals[2] = high.first;
  normals[3] = high.second;
}

}  // namespace ksm
