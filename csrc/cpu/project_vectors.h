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
  // What looked_up() takes for eight numbers of four bits.
  static uint32_t numbers_of(uint32_t word) { return word; }
  // Lane l of the result is the lane whose number the four bits of words[l] from `shift` on are.
  // Lanes l and 15 - l must differ by their signs alone.
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
    __m512 out = lanes;
    // Products with -1 are exact: the sum is rounded once.
    const auto stage = [&](int bit, __m512 flipped) {
      const auto upper = static_cast<__mmask16>(kUpperLanes[bit]);
      const __m512 signs = _mm512_mask_blend_ps(upper, _mm512_set1_ps(1), _mm512_set1_ps(-1));
      out = _mm512_fmadd_ps(out, signs, flipped);
    };
    stage(0, _mm512_shuffle_ps(out, out, 0xB1));  // unlike flipped(), without an order to load
    stage(1, _mm512_shuffle_ps(out, out, 0x4E));
    __m512i raw = _mm512_castps_si512(out);
    stage(2, _mm512_castsi512_ps(_mm512_shuffle_i32x4(raw, raw, 0xB1)));
    raw = _mm512_castps_si512(out);
    stage(3, _mm512_castsi512_ps(_mm512_shuffle_i32x4(raw, raw, 0x4E)));
    return {out};
  }
  static Sixteen all(float value) { return {_mm512_set1_ps(value)}; }
  static uint32_t numbers_of(uint32_t word) { return word; }
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
  // Numbers n from 8 on as the negative of 15 - n, whose lower three bits are those of n inverted:
  // a register holds the lower eight lanes.
  static uint32_t numbers_of(uint32_t word) {
    const uint32_t upper = word & 0x88888888u;
    return word ^ (upper - (upper >> 3));
  }
  Sixteen looked_up(const uint32_t* words, int shift) const {
    return {eight_looked_up(words, shift), eight_looked_up(words + 8, shift)};
  }

 private:
  __m256 eight_looked_up(const uint32_t* words, int shift) const {
    const auto* from = reinterpret_cast<const __m256i*>(words);
    const __m256i numbers = _mm256_loadu_si256(from);
    const __m256 lanes = _mm256_permutevar8x32_ps(low, _mm256_srli_epi32(numbers, shift));
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(numbers, 28 - shift));
    return _mm256_xor_ps(lanes, _mm256_and_ps(upper, _mm256_set1_ps(-0.0f)));
  }
  static __m256 negated(__m256 lanes, uint32_t bits) {
    const __m256i place = _mm256_set_epi32(24, 25, 26, 27, 28, 29, 30, 31);
    const __m256i top = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), place);
    return _mm256_xor_ps(lanes, _mm256_and_ps(_mm256_castsi256_ps(top), _mm256_set1_ps(-0.0f)));
  }
};
#endif

// ---- sixteen Philox streams ----------------------------------------------------------------------

// Words 0 to 3 of the streams of sixteen counters.
struct PhiloxSixteen {
  alignas(64) uint32_t words[4][16];
};

// Sixteen streams in the middle of their rounds: those of the counters `counter`, whose word `varying`
// goes up by one from stream to stream.
//
// 32 x 32 -> 64 bits exist for even lanes only, and look at the lower half of 64 bits. So the even and
// the odd streams have registers of their own, each number in 64 bits whose upper half is anything.
#if KSM_VECTOR_BYTES == 64
class PhiloxStreams {
 public:
  PhiloxStreams(const Words& counter, int varying) {
    for (int q = 0; q < 4; ++q) {
      streams_[0][q] = streams_[1][q] = _mm512_set1_epi64(counter.word[q]);
    }
    const __m512i order = _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0);
    __m512i &even = streams_[0][varying], &odd = streams_[1][varying];
    even = _mm512_add_epi32(even, order);
    odd = _mm512_add_epi32(odd, _mm512_add_epi32(order, _mm512_set1_epi64(1)));
  }

  void round(uint32_t key0, uint32_t key1) {
    constexpr int kXor3 = 0x96;
    const __m512i a = _mm512_set1_epi64(kPhiloxA), b = _mm512_set1_epi64(kPhiloxB);
    const __m512i first = _mm512_set1_epi64(key0), second = _mm512_set1_epi64(key1);
    for (__m512i(&c)[4] : streams_) {
      const __m512i from_a = _mm512_mul_epu32(c[0], a), from_b = _mm512_mul_epu32(c[2], b);
      c[0] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(from_b, 32), c[1], first, kXor3);
      c[2] = _mm512_ternarylogic_epi32(_mm512_srli_epi64(from_a, 32), c[3], second, kXor3);
      c[1] = from_b;
      c[3] = from_a;
    }
  }

  void join(const Words& words) {
    for (__m512i(&c)[4] : streams_) {
      for (int q = 0; q < 4; ++q) {
        c[q] = _mm512_xor_si512(c[q], _mm512_set1_epi32(static_cast<int>(words.word[q])));
      }
    }
  }

  PhiloxSixteen words() const {
    constexpr __mmask16 kOdd = 0xAAAA;
    const __m512i lower = _mm512_set_epi32(14, 14, 12, 12, 10, 10, 8, 8, 6, 6, 4, 4, 2, 2, 0, 0);
    PhiloxSixteen out;
    for (int q = 0; q < 4; ++q) {
      _mm512_store_si512(
          out.words[q], _mm512_mask_permutexvar_epi32(streams_[0][q], kOdd, lower, streams_[1][q]));
    }
    return out;
  }

 private:
  __m512i streams_[2][4];  // even, odd
};
#elif KSM_VECTOR_BYTES == 32
class PhiloxStreams {
 public:
  PhiloxStreams(const Words& counter, int varying) {
    for (int part = 0; part < 4; ++part) {
      for (int q = 0; q < 4; ++q) streams_[part][q] = _mm256_set1_epi64x(counter.word[q]);
      const int first = 8 * (part / 2) + part % 2;
      __m256i& word = streams_[part][varying];
      word = _mm256_add_epi32(word, _mm256_set_epi64x(first + 6, first + 4, first + 2, first));
    }
  }

  void round(uint32_t key0, uint32_t key1) {
    const __m256i a = _mm256_set1_epi64x(kPhiloxA), b = _mm256_set1_epi64x(kPhiloxB);
    const __m256i first = _mm256_set1_epi64x(key0), second = _mm256_set1_epi64x(key1);
    for (__m256i(&c)[4] : streams_) {
      const __m256i from_a = _mm256_mul_epu32(c[0], a), from_b = _mm256_mul_epu32(c[2], b);
      c[0] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(from_b, 32), c[1]), first);
      c[2] = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(from_a, 32), c[3]), second);
      c[1] = from_b;
      c[3] = from_a;
    }
  }

  void join(const Words& words) {
    for (__m256i(&c)[4] : streams_) {
      for (int q = 0; q < 4; ++q) c[q] = _mm256_xor_si256(c[q], _mm256_set1_epi64x(words.word[q]));
    }
  }

  PhiloxSixteen words() const {
    PhiloxSixteen out;
    for (int half = 0; half < 2; ++half) {
      for (int q = 0; q < 4; ++q) {
        constexpr int kOdd = 0xAA;
        const __m256i moved = _mm256_slli_epi64(streams_[2 * half + 1][q], 32);
        _mm256_store_si256(reinterpret_cast<__m256i*>(out.words[q] + 8 * half),
                           _mm256_blend_epi32(streams_[2 * half][q], moved, kOdd));
      }
    }
    return out;
  }

 private:
  __m256i streams_[4][4];  // even and odd ones of the first eight, and of the others
};
#else
class PhiloxStreams {
 public:
  PhiloxStreams(const Words& counter, int varying) {
    for (uint32_t l = 0; l < 16; ++l) {
      streams_[l] = counter;
      streams_[l].word[varying] += l;
    }
  }

  void round(uint32_t key0, uint32_t key1) {
    for (Words& c : streams_) c = philox_round(c, key0, key1);
  }

  void join(const Words& words) {
    for (Words& c : streams_) {
      for (int q = 0; q < 4; ++q) c.word[q] ^= words.word[q];
    }
  }

  PhiloxSixteen words() const {
    PhiloxSixteen out;
    for (int l = 0; l < 16; ++l) {
      for (int q = 0; q < 4; ++q) out.words[q][l] = streams_[l].word[q];
    }
    return out;
  }

 private:
  Words streams_[16];
};
#endif

inline void run_rounds(uint64_t seed, int first, int end, PhiloxStreams& streams) {
  for (int r = first; r < end; ++r) {
    streams.round(static_cast<uint32_t>(seed) + r * kPhiloxKey0,
                  static_cast<uint32_t>(seed >> 32) + r * kPhiloxKey1);
  }
}

inline PhiloxSixteen philox_sixteen(uint64_t seed, const Words& counter, int varying) {
  PhiloxStreams streams(counter, varying);
  run_rounds(seed, 0, kPhiloxRounds, streams);
  return streams.words();
}

// Sixteen streams that differ in word 2 of their counters, for many a word 0: after two rounds, what
// word 0 does is the same for all of them, an exclusive or. The rest of these rounds is done once.
class PhiloxOfIndices {
 public:
  PhiloxOfIndices(uint64_t seed, const Words& counter)
      : seed_(seed), tag_(counter.word[3]), others_(counter, 2) {
    run_rounds(seed, 0, kShared, others_);
    others_.join(two_rounds_of(counter.word[0]));
  }

  PhiloxSixteen at(uint32_t index) const {
    PhiloxStreams streams = others_;
    streams.join(two_rounds_of(index));
    run_rounds(seed_, kShared, kPhiloxRounds, streams);
    return streams.words();
  }

 private:
  static constexpr int kShared = 2;

  Words two_rounds_of(uint32_t index) const {
    const uint64_t a = uint64_t{kPhiloxA} * index;
    const uint32_t word2 =
        static_cast<uint32_t>(a >> 32) ^ tag_ ^ static_cast<uint32_t>(seed_ >> 32);
    const uint64_t b = uint64_t{kPhiloxB} * word2;
    return {
        {static_cast<uint32_t>(b >> 32), static_cast<uint32_t>(b), static_cast<uint32_t>(a), 0}};
  }

  const uint64_t seed_;
  const uint32_t tag_;
  PhiloxStreams others_;
};

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
