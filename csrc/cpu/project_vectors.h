// What the loops of projections are written in: sixteen values at once, in whatever registers the
// instruction set has, sixteen Philox streams, and blocks of coordinates. See loops.h for how it is
// included.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <new>

#include "cpu/kernels.h"

namespace ksm {
namespace {

// ---- vectors of sixteen values -----------------------------------------------------------------

constexpr uint32_t kUpperLanes[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};  // with bit 0, 1, 2, 3

template <typename T>
struct Sixteen {
  T lane[16];

  static Sixteen load(const T* from) {
    Sixteen out;
    std::memcpy(out.lane, from, sizeof(out.lane));
    return out;
  }
  void store(T* to) const { std::memcpy(to, lane, sizeof(lane)); }
  Sixteen times(T factor) const {
    Sixteen out;
    for (int l = 0; l < 16; ++l) out.lane[l] = lane[l] * factor;
    return out;
  }
  Sixteen plus(const Sixteen& other) const {
    Sixteen out;
    for (int l = 0; l < 16; ++l) out.lane[l] = lane[l] + other.lane[l];
    return out;
  }
  // Lane l of the result is lane l ^ flip.
  Sixteen flipped(uint32_t flip) const {
    Sixteen out;
    for (uint32_t l = 0; l < 16; ++l) out.lane[l] = lane[l ^ flip];
    return out;
  }
  // Lanes whose bit is set change their sign.
  Sixteen negated(uint32_t bits) const {
    Sixteen out;
    for (int l = 0; l < 16; ++l) out.lane[l] = bits >> l & 1 ? -lane[l] : lane[l];
    return out;
  }
  Sixteen minus(const Sixteen& other) const {
    Sixteen out;
    for (int l = 0; l < 16; ++l) out.lane[l] = lane[l] - other.lane[l];
    return out;
  }
  // Times the Walsh-Hadamard matrix of 16.
  Sixteen rotated() const {
    Sixteen out = *this;
    for (int bit = 0; bit < 4; ++bit) {
      out = out.flipped(1u << bit).plus(out.negated(kUpperLanes[bit]));
    }
    return out;
  }
  static Sixteen all(T value) {
    Sixteen out;
    for (int l = 0; l < 16; ++l) out.lane[l] = value;
    return out;
  }
  // Lane l of the result is the lane whose number the four bits of words[l] from `shift` on are.
  Sixteen looked_up(const uint32_t* words, int shift) const {
    Sixteen out;
    for (int l = 0; l < 16; ++l) out.lane[l] = lane[words[l] >> shift & 15];
    return out;
  }
};

#if KSM_VECTOR_BYTES == 64
template <>
struct Sixteen<float> {
  __m512 lanes;

  static Sixteen load(const float* from) { return {_mm512_loadu_ps(from)}; }
  void store(float* to) const { _mm512_storeu_ps(to, lanes); }
  Sixteen times(float factor) const { return {_mm512_mul_ps(lanes, _mm512_set1_ps(factor))}; }
  Sixteen plus(Sixteen other) const { return {_mm512_add_ps(lanes, other.lanes)}; }
  Sixteen flipped(uint32_t flip) const {
    const __m512i order = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i from = _mm512_xor_si512(order, _mm512_set1_epi32(static_cast<int>(flip)));
    return {_mm512_permutexvar_ps(from, lanes)};
  }
  Sixteen negated(uint32_t bits) const {
    const __m512i raw = _mm512_castps_si512(lanes);
    const __m512i sign = _mm512_set1_epi32(INT32_MIN);
    return {
        _mm512_castsi512_ps(_mm512_mask_xor_epi32(raw, static_cast<__mmask16>(bits), raw, sign))};
  }
  Sixteen minus(Sixteen other) const { return {_mm512_sub_ps(lanes, other.lanes)}; }
  Sixteen rotated() const {
    Sixteen out = *this;
    for (int bit = 0; bit < 4; ++bit) {  // products with -1 are exact: the sum is rounded once
      const auto upper = static_cast<__mmask16>(kUpperLanes[bit]);
      const __m512 signs = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1), _mm512_set1_ps(-1));
      out = {_mm512_fmadd_ps(out.lanes, signs, out.flipped(1u << bit).lanes)};
    }
    return out;
  }
  static Sixteen all(float value) { return {_mm512_set1_ps(value)}; }
  Sixteen looked_up(const uint32_t* words, int shift) const {
    const __m512i numbers = _mm512_srli_epi32(_mm512_loadu_si512(words), shift);
    return {_mm512_permutexvar_ps(numbers, lanes)};  // looks at the low four bits only
  }
};
#elif KSM_VECTOR_BYTES == 32
template <>
struct Sixteen<float> {
  __m256 low, high;

  static Sixteen load(const float* from) {
    return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)};
  }
  void store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  Sixteen times(float factor) const {
    const __m256 all = _mm256_set1_ps(factor);
    return {_mm256_mul_ps(low, all), _mm256_mul_ps(high, all)};
  }
  Sixteen plus(Sixteen other) const {
    return {_mm256_add_ps(low, other.low), _mm256_add_ps(high, other.high)};
  }
  Sixteen flipped(uint32_t flip) const {
    const __m256i order = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    const __m256i from = _mm256_xor_si256(order, _mm256_set1_epi32(static_cast<int>(flip & 7)));
    const __m256 a = _mm256_permutevar8x32_ps(low, from);
    const __m256 b = _mm256_permutevar8x32_ps(high, from);
    return flip & 8 ? Sixteen{b, a} : Sixteen{a, b};
  }
  Sixteen negated(uint32_t bits) const { return {negated(low, bits), negated(high, bits >> 8)}; }
  Sixteen minus(Sixteen other) const {
    return {_mm256_sub_ps(low, other.low), _mm256_sub_ps(high, other.high)};
  }
  Sixteen rotated() const {
    Sixteen out = *this;
#pragma GCC unroll 4
    for (int bit = 0; bit < 3; ++bit) {
      out = out.flipped(1u << bit).plus(out.negated(kUpperLanes[bit]));
    }
    return {_mm256_add_ps(out.low, out.high), _mm256_sub_ps(out.low, out.high)};
  }
  static Sixteen all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  Sixteen looked_up(const uint32_t* words, int shift) const {
    return {eight_looked_up(words, shift), eight_looked_up(words + 8, shift)};
  }

 private:
  __m256 eight_looked_up(const uint32_t* words, int shift) const {
    const auto* from = reinterpret_cast<const __m256i*>(words);
    const __m256i numbers = _mm256_srli_epi32(_mm256_loadu_si256(from), shift);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(numbers, 28));  // bit 3 as the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, numbers),
                            _mm256_permutevar8x32_ps(high, numbers), upper);
  }
  static __m256 negated(__m256 lanes, uint32_t bits) {
    const __m256i place = _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31);
    const __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), place);
    return _mm256_xor_ps(lanes, _mm256_and_ps(_mm256_castsi256_ps(top), _mm256_set1_ps(-0.0f)));
  }
};
#endif

// ---- sixteen Philox streams ----------------------------------------------------------------------

// Words 0 to 3 of the streams of sixteen counters: words[q][l] belongs to counter.word[varying] + l.
struct PhiloxSixteen {
  alignas(64) uint32_t words[4][16];
};

// 32 x 32 -> 64 bits exist for even lanes only, and look at the lower half of 64 bits. So the even and
// the odd streams have registers of their own, each number in 64 bits whose upper half is anything.
#if KSM_VECTOR_BYTES == 64
inline PhiloxSixteen philox_sixteen(uint64_t seed, const Words& counter, int varying) {
  __m512i streams[2][4];  // even, odd
  for (int q = 0; q < 4; ++q) {
    streams[0][q] = streams[1][q] = _mm512_set1_epi64(counter.word[q]);
  }
  const __m512i order = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
  streams[0][varying] = _mm512_add_epi32(streams[0][varying], order);
  streams[1][varying] =
      _mm512_add_epi32(streams[1][varying], _mm512_add_epi32(order, _mm512_set1_epi64(1)));
  const __m512i a = _mm512_set1_epi64(kPhiloxA), b = _mm512_set1_epi64(kPhiloxB);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m512i first = _mm512_set1_epi64(key0), second = _mm512_set1_epi64(key1);
    for (__m512i(&c)[4] : streams) {
      const __m512i from_a = _mm512_mul_epu32(c[0], a), from_b = _mm512_mul_epu32(c[2], b);
      constexpr int kXor3 = 0x96;
      c[0] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(from_b, 32), c[1], first, kXor3);
      c[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(from_a, 32), c[3], second, kXor3);
      c[1] = from_b;
      c[3] = from_a;
    }
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  PhiloxSixteen out;
  for (int q = 0; q < 4; ++q) {
    constexpr __mmask16 kOdd = 0xAAAA;
    const __m512i moved = _mm512_slli_epi64(streams[1][q], 32);
    _mm512_store_si512(out.words[q], _mm512_mask_mov_epi32(streams[0][q], kOdd, moved));
  }
  return out;
}
#elif KSM_VECTOR_BYTES == 32
inline void philox_four(uint64_t seed, __m256i c[4]) {
  const __m256i a = _mm256_set1_epi64x(kPhiloxA), b = _mm256_set1_epi64x(kPhiloxB);
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const __m256i from_a = _mm256_mul_epu32(c[0], a), from_b = _mm256_mul_epu32(c[2], b);
    c[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(from_b, 32), c[1]),
                            _mm256_set1_epi64x(key0));
    c[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(from_a, 32), c[3]),
                            _mm256_set1_epi64x(key1));
    c[1] = from_b;
    c[3] = from_a;
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
}

inline PhiloxSixteen philox_sixteen(uint64_t seed, const Words& counter, int varying) {
  PhiloxSixteen out;
  for (int half = 0; half < 2; ++half) {
    __m256i even[4], odd[4];
    for (int q = 0; q < 4; ++q) even[q] = odd[q] = _mm256_set1_epi64x(counter.word[q]);
    const __m256i order =
        _mm256_add_epi32(_mm256_set_epi64x(6, 4, 2, 0), _mm256_set1_epi64x(8 * half));
    even[varying] = _mm256_add_epi32(even[varying], order);
    odd[varying] = _mm256_add_epi32(odd[varying], _mm256_add_epi32(order, _mm256_set1_epi64x(1)));
    philox_four(seed, even);
    philox_four(seed, odd);
    for (int q = 0; q < 4; ++q) {
      constexpr int kOdd = 0xAA;
      _mm256_store_si256(reinterpret_cast<__m256i*>(out.words[q] + 8 * half),
                         _mm256_blend_epi32(even[q], _mm256_slli_epi64(odd[q], 32), kOdd));
    }
  }
  return out;
}
#else
inline PhiloxSixteen philox_sixteen(uint64_t seed, Words counter, int varying) {
  PhiloxSixteen out;
  for (int l = 0; l < 16; ++l, ++counter.word[varying]) {
    const Words random = philox(seed, counter);
    for (int q = 0; q < 4; ++q) out.words[q][l] = random.word[q];
  }
  return out;
}
#endif

// ---- memory and ranges -------------------------------------------------------------------------

// Zeroed memory from a line of the cache on, so that no vector lies in two. The members of a
// std::vector would be compiled for this instruction set under names that the linker shares with code
// for lesser ones.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size)
      : memory_(static_cast<T*>(::operator new(size * sizeof(T), kLine))) {
    std::memset(static_cast<void*>(memory_), 0, size * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(memory_, kLine); }
  T* data() const { return memory_; }
  T& operator[](int64_t i) const { return memory_[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  T* const memory_;
};

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// The part of block `block` (of `length` coordinates) that lies in `coordinates`, counted from the
// block's first coordinate.
Range part_of_block(Range coordinates, int64_t block, int64_t length) {
  return {std::max<int64_t>(0, coordinates.begin - block * length),
          std::min(length, coordinates.end - block * length)};
}

}  // namespace
}  // namespace ksm
