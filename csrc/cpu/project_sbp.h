// Signed block permutations of a few rows and a range of coordinates; see loops.h for how it is
// included.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/project_vectors.h"

namespace ksm {
namespace {

constexpr int64_t kPanelBlocks = 8;  // blocks whose permutations and signs are drawn at once

// The random part of one block in one segment.
struct BlockStream {
  BlockPermutation permutation;
  const uint16_t* signs;   // a bit for each coordinate, sixteen in a word
  const uint32_t* places;  // the first output of each vector of sixteen, where blocks are rotated
};

// The signs of coordinates `part`, in their places of `signs`, which holds `groups` of 128.
void draw_signs(uint64_t seed, int64_t block, uint32_t replicate, Range part, int64_t groups,
                uint16_t* signs) {
  for (int64_t group = part.begin / 128; group * 128 < part.end; group += 16) {
    const PhiloxSixteen random = philox_sixteen(
        seed, counter_of(Kind::kSbp, block, 1 + static_cast<uint32_t>(group), replicate), 2);
    for (int64_t l = 0; l < std::min<int64_t>(16, groups - group); ++l) {
      const uint32_t words[4] = {random.words[0][l], random.words[1][l], random.words[2][l],
                                 random.words[3][l]};
      std::memcpy(signs + (group + l) * 8, words, sizeof(words));  // low halves first
    }
  }
}

// Where vectors v, v + 1, ... of sixteen go, without a division.
class Places {
 public:
  Places() = default;
  Places(const BlockPermutation& permutation, int64_t v, int64_t vectors)
      : step_(permutation.multiplier),
        vectors_(vectors),
        place_((permutation.multiplier * v + permutation.shift) % vectors) {}
  int64_t next() {
    const int64_t place = place_;
    place_ += step_;
    if (place_ >= vectors_) place_ -= vectors_;
    return place * 16;
  }

 private:
  int64_t step_ = 0, vectors_ = 0, place_ = 0;
};

// Where all vectors of a block go, sixteen at once.
void draw_places(const BlockPermutation& permutation, int64_t segment,
                 uint32_t* places) {  // (segment / 16), and room for 15 more
  typedef uint32_t Lanes __attribute__((vector_size(64)));
  const auto end = static_cast<uint32_t>(segment);
  Places first(permutation, 0, segment / 16);
  Lanes lanes;
  for (int l = 0; l < 16; ++l) lanes[l] = static_cast<uint32_t>(first.next());
  const uint32_t apart = static_cast<uint32_t>(first.next()) + end - lanes[0];
  const uint32_t step = apart < end ? apart : apart - end;
  for (int64_t v = 0; v < segment / 16; v += 16) {
    std::memcpy(places + v, &lanes, sizeof(lanes));
    lanes += step;
    lanes = lanes < end ? lanes : lanes - end;
  }
}

// The permutations and signs of a panel of blocks.
class SbpPanel {
 public:
  explicit SbpPanel(const Projection& projection)
      : projection_(projection),
        segment_(segment_of(projection)),
        length_(vector_length(segment_)),
        groups_((segment_ + 127) / 128),
        places_size_(projection.hadamard && length_ == 16 ? segment_ / 16 + 15 : 0),
        streams_(kPanelBlocks * projection.sparsity),
        places_(kPanelBlocks * projection.sparsity * places_size_),
        signs_(kPanelBlocks * (projection.sparsity + 1) * groups_ * 8) {}

  void draw(int64_t first, int64_t count, Range coordinates) {
    const int64_t s = projection_.sparsity;
    for (int64_t b = 0; b < count; ++b) {
      const Range part = projection_.hadamard ? Range{0, segment_}
                                              : part_of_block(coordinates, first + b, segment_);
      for (int64_t t = 0; t < s; ++t) {
        const auto replicate = static_cast<uint32_t>(t);
        draw_signs(projection_.seed, first + b, replicate, part, groups_, signs(b, t));
        const BlockPermutation permutation =
            block_permutation(projection_.seed, first + b, replicate, segment_ / length_, length_);
        uint32_t* places = places_.data() + (b * s + t) * places_size_;
        if (places_size_) draw_places(permutation, segment_, places);
        streams_[b * s + t] = {permutation, signs(b, t), places};
      }
      if (projection_.hadamard) {
        draw_signs(projection_.seed, first + b, kHadamardReplicate, part, groups_, signs(b, s));
      }
    }
  }

  const BlockStream* streams(int64_t b) const { return &streams_[b * projection_.sparsity]; }
  const uint16_t* rotation_signs(int64_t b) const { return signs(b, projection_.sparsity); }
  int64_t segment() const { return segment_; }
  int64_t length() const { return length_; }

 private:
  uint16_t* signs(int64_t b, int64_t t) const {
    return signs_.data() + (b * (projection_.sparsity + 1) + t) * groups_ * 8;
  }

  const Projection projection_;
  const int64_t segment_, length_, groups_, places_size_;
  const Buffer<BlockStream> streams_;
  const Buffer<uint32_t> places_;
  const Buffer<uint16_t> signs_;  // those before the rotation after those of the segments
};

bool sign_at(const uint16_t* signs, int64_t u) { return signs[u / 16] >> (u % 16) & 1; }

int64_t place_of(const BlockPermutation& permutation, int64_t u, int64_t length, int64_t vectors) {
  const int64_t v = (permutation.multiplier * (u / length) + permutation.shift) % vectors;
  return v * length + ((u % length) ^ permutation.flip);
}

// Memory that arrives while vectors are worked on: `values` more of it with each.
template <typename T>
struct Ahead {
  const T* memory;
  int64_t values;
};

// Calls body(v, values, first lane, end lane) for the vectors of sixteen that hold `part` of a
// block; x is its first value. Lanes outside of the part are zero.
template <typename T, typename Body>
void for_vectors(Range part, const T* x, Ahead<T> ahead, const Body& body) {
  for (int64_t v = part.begin / 16; v * 16 < part.end; ++v) {
    const int64_t first = std::max<int64_t>(part.begin - v * 16, 0);
    const int64_t end = std::min<int64_t>(part.end - v * 16, 16);
    const T* from = x + v * 16 - part.begin;
    if (first == 0 && end == 16) {
      __builtin_prefetch(ahead.memory + v * ahead.values);
      body(v, Sixteen<T>::load(from));
    } else {
      T padded[16] = {};
      std::copy(from + first, from + end, padded + first);
      body(v, Sixteen<T>::load(padded));
    }
  }
}

// y += part of a block, in kSegments segments at once.
template <int kSegments, typename T>
void scatter_vectors(const BlockStream* streams, int64_t segment, Range part, T scale, const T* x,
                     Ahead<T> ahead, T* y) {
  // Locals: what lies behind pointers would be read again after every vector that is stored.
  Places places[kSegments];
  const uint16_t* signs[kSegments];
  uint32_t flips[kSegments];
  for (int t = 0; t < kSegments; ++t) {
    places[t] = Places(streams[t].permutation, part.begin / 16, segment / 16);
    signs[t] = streams[t].signs;
    flips[t] = streams[t].permutation.flip;
  }
  for_vectors(part, x, ahead, [&](int64_t v, Sixteen<T> value) {
    value = value.times(scale);
    for (int t = 0; t < kSegments; ++t) {
      T* target = y + t * segment + places[t].next();
      const auto moved = value.negated(signs[t][v]).flipped(flips[t]);
      Sixteen<T>::load(target).plus(moved).store(target);
    }
  });
}

// y += part of a block.
template <typename T>
void scatter_block(const BlockStream* streams, int64_t sparsity, int64_t segment, int64_t length,
                   Range part, T scale, const T* x, Ahead<T> ahead, T* y) {
  if (length < 16) {  // too short for vectors of sixteen
    for (int64_t t = 0; t < sparsity; ++t) {
      for (int64_t u = part.begin; u < part.end; ++u) {
        const T value = x[u - part.begin] * scale;
        y[t * segment + place_of(streams[t].permutation, u, length, segment / length)] +=
            sign_at(streams[t].signs, u) ? -value : value;
      }
    }
    return;
  }
  int64_t t = 0;
  const auto advance = [&](int64_t count) { t += count, streams += count, y += count * segment; };
  for (; t + 4 <= sparsity; advance(4))
    scatter_vectors<4>(streams, segment, part, scale, x, ahead, y);
  for (; t + 2 <= sparsity; advance(2))
    scatter_vectors<2>(streams, segment, part, scale, x, ahead, y);
  for (; t < sparsity; advance(1)) scatter_vectors<1>(streams, segment, part, scale, x, ahead, y);
}

// x = the sum over segments of the values of y that coordinates `part` of a block meet.
template <typename T>
void gather_block(const BlockStream* streams, int64_t sparsity, int64_t segment, int64_t length,
                  Range part, T scale, const T* y, T* x) {
  std::fill(x, x + part.size(), T{0});
  for (int64_t t = 0; t < sparsity; ++t, y += segment) {
    const BlockPermutation& permutation = streams[t].permutation;
    const uint16_t* signs = streams[t].signs;
    if (length < 16) {
      for (int64_t u = part.begin; u < part.end; ++u) {
        const T value = y[place_of(permutation, u, length, segment / length)] * scale;
        x[u - part.begin] += sign_at(signs, u) ? -value : value;
      }
      continue;
    }
    Places places(permutation, part.begin / 16, segment / 16);
    for (int64_t v = part.begin / 16; v * 16 < part.end; ++v) {
      const auto moved = Sixteen<T>::load(y + places.next())
                             .times(scale)
                             .flipped(permutation.flip)
                             .negated(signs[v]);
      T* to = x + v * 16 - part.begin;
      if (v * 16 >= part.begin && v * 16 + 16 <= part.end) {
        Sixteen<T>::load(to).plus(moved).store(to);
      } else {
        T values[16];
        moved.store(values);
        for (int64_t l = 0; l < 16; ++l) {
          if (v * 16 + l >= part.begin && v * 16 + l < part.end) to[l] += values[l];
        }
      }
    }
  }
}

// How many vectors of sixteen are added and subtracted while they stay in registers, a power of two.
template <typename T>
constexpr int kRadix = sizeof(T) == 4 && KSM_VECTOR_BYTES == 64 ? 16 : 4;

// Stages of the Walsh-Hadamard matrix from neighbours `half` values apart to those kVectors / 2 times as
// far apart. load(i) is the vector whose first value is i; store(vectors, i, half) gets kVectors, whose
// first values are i, i + half, ...
template <int kVectors, typename T, typename Load, typename Store>
void add_and_subtract(int64_t count, int64_t half, const Load& load, const Store& store) {
  for (int64_t run = 0; run < count; run += kVectors * half) {
    for (int64_t i = run; i < run + half; i += 16) {
      Sixteen<T> values[kVectors];
#pragma GCC unroll 16
      for (int r = 0; r < kVectors; ++r) values[r] = load(i + r * half);
#pragma GCC unroll 16
      for (int apart = 1; apart < kVectors; apart *= 2) {
#pragma GCC unroll 16
        for (int r = 0; r < kVectors; ++r) {
          if (r & apart) continue;
          const Sixteen<T> sum = values[r].plus(values[r + apart]);
          values[r + apart] = values[r].minus(values[r + apart]);
          values[r] = sum;
        }
      }
      store(values, i, half);
    }
  }
}

// What add_and_subtract stores to: memory,
template <typename T>
struct InOrder {
  T* to;

  template <int kVectors>
  void operator()(const Sixteen<T> (&values)[kVectors], int64_t i, int64_t half) const {
#pragma GCC unroll 16
    for (int r = 0; r < kVectors; ++r) values[r].store(to + i + r * half);
  }
};

// or the outputs, y += a block, while memory from `next` on arrives, half as much.
template <typename T>
struct Scattered {
  BlockStream stream;
  T scale;
  const T* next;
  T* y;

  template <int kVectors>
  void operator()(const Sixteen<T> (&values)[kVectors], int64_t i, int64_t half) const {
    const int64_t done = i / (kVectors * half) * (kVectors * half);  // values in whole runs
    const T* ahead = next + (done + (i - done) * kVectors) / 2;
    for (int64_t r = 0; r < kVectors; r += 2) __builtin_prefetch(ahead + r * 8, 0, 2);
#pragma GCC unroll 16
    for (int r = 0; r < kVectors; ++r) {
      const int64_t v = (i + r * half) / 16;
      T* to = y + stream.places[v];
      const auto moved =
          values[r].times(scale).negated(stream.signs[v]).flipped(stream.permutation.flip);
      Sixteen<T>::load(to).plus(moved).store(to);
    }
  }
};

// Every run of `length` >= 16 values times the Walsh-Hadamard matrix of +-1; before that, values whose
// bit is set change their sign. The last pass goes to `last`, those before it to `work`, which may be
// x. Half of what is read next, at `next`, arrives in the first pass.
template <typename T, typename Last>
void walsh_hadamard(const T* x, int64_t count, int64_t length, const uint16_t* signs, const T* next,
                    T* work, const Last& last) {
  int64_t half = 16;
  const auto pass = [&](auto radix, const auto& load) {
    if (half * radix == length) {
      add_and_subtract<radix, T>(count, half, load, last);
    } else {
      add_and_subtract<radix, T>(count, half, load, InOrder<T>{work});
    }
    half *= radix;
  };
  const auto first = [&](int64_t i) {
    if (i % 32 == 0) __builtin_prefetch(next + i / 2, 0, 2);
    return Sixteen<T>::load(x + i).negated(signs[i / 16]).rotated();
  };
  const auto later = [&](int64_t i) { return Sixteen<T>::load(work + i); };
  constexpr std::integral_constant<int, kRadix<T>> kMost{};
  if (half * kMost <= length) {
    pass(kMost, first);
  } else {
    pass(std::integral_constant<int, 1>(), first);
  }
  while (half * kMost <= length) pass(kMost, later);
  while (half < length) pass(std::integral_constant<int, 2>(), later);
}

// The same for shorter runs, into `out`.
template <typename T>
void short_walsh_hadamard(const T* x, int64_t count, int64_t length, const uint16_t* signs,
                          T* out) {
  for (int64_t u = 0; u < count; ++u) out[u] = sign_at(signs, u) ? -x[u] : x[u];
  for (int64_t half = 1; half < length; half *= 2) {
    for (int64_t run = 0; run < count; run += 2 * half) {
      for (int64_t i = run; i < run + half; ++i) {
        const T a = out[i], b = out[i + half];
        out[i] = a + b;
        out[i + half] = a - b;
      }
    }
  }
}

template <typename T>
void negate_signed(T* x, int64_t count, const uint16_t* signs) {
  int64_t u = 0;
  for (; u + 16 <= count; u += 16) Sixteen<T>::load(x + u).negated(signs[u / 16]).store(x + u);
  for (; u < count; ++u) x[u] = sign_at(signs, u) ? -x[u] : x[u];
}

constexpr int64_t kPrefetch = 1024;  // values ahead: a page of float32, where streams restart

template <typename T>
void project_sbp(const Projection& projection, Range coordinates, int64_t rows, const T* x,
                 int64_t x_stride, T* y, int64_t y_stride) {
  SbpPanel panel(projection);
  const int64_t q = panel.segment(), s = projection.sparsity, run = hadamard_length(q);
  const T scale = static_cast<T>(scale_of(projection) /
                                 (projection.hadamard ? std::sqrt(static_cast<double>(run)) : 1.0));
  const Buffer<T> rotated(projection.hadamard ? q : 0);
  const int64_t end = (coordinates.end + q - 1) / q;
  for (int64_t first = coordinates.begin / q; first < end; first += kPanelBlocks) {
    const int64_t count = std::min(kPanelBlocks, end - first);
    panel.draw(first, count, coordinates);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t b = 0; b < count; ++b) {
        Range part = part_of_block(coordinates, first + b, q);
        const T* from = x + i * x_stride + (first + b) * q + part.begin - coordinates.begin;
        T* to = y + i * y_stride;
        if (projection.hadamard) {  // a part is a block with zeros: the projection is linear
          const T* next = b + 1 < count ? from + part.size() : x + (i + 1) * x_stride;
          if (part.size() < q) {
            std::fill(rotated.data(), rotated.data() + q, T{0});
            std::copy(from, from + part.size(), rotated.data() + part.begin);
            from = rotated.data();
          }
          const uint16_t* signs = panel.rotation_signs(b);
          if (run >= 16 && s == 1) {
            walsh_hadamard(from, q, run, signs, next, rotated.data(),
                           Scattered<T>{*panel.streams(b), scale, next + q / 2, to});
            continue;
          }
          if (run >= 16) {
            walsh_hadamard(from, q, run, signs, next, rotated.data(), InOrder<T>{rotated.data()});
          } else {
            short_walsh_hadamard(from, q, run, signs, rotated.data());
          }
          from = rotated.data();
          part = {0, q};
        }
        const Ahead<T> ahead = {from - part.begin + kPrefetch, 16};
        scatter_block(panel.streams(b), s, q, panel.length(), part, scale, from, ahead, to);
      }
    }
  }
}

template <typename T>
void adjoint_sbp(const Projection& projection, Range coordinates, int64_t rows, const T* y, T* x,
                 int64_t x_stride) {
  SbpPanel panel(projection);
  const int64_t q = panel.segment(), s = projection.sparsity, run = hadamard_length(q);
  const T scale = static_cast<T>(scale_of(projection) /
                                 (projection.hadamard ? std::sqrt(static_cast<double>(run)) : 1.0));
  const Buffer<T> rotated(projection.hadamard ? q : 0);
  const Buffer<uint16_t> no_signs(q / 16 + 1);
  const int64_t end = (coordinates.end + q - 1) / q;
  for (int64_t first = coordinates.begin / q; first < end; first += kPanelBlocks) {
    const int64_t count = std::min(kPanelBlocks, end - first);
    panel.draw(first, count, coordinates);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t b = 0; b < count; ++b) {
        const Range part = part_of_block(coordinates, first + b, q);
        const T* from = y + i * projection.k;
        T* to = x + i * x_stride + (first + b) * q + part.begin - coordinates.begin;
        if (!projection.hadamard) {
          gather_block(panel.streams(b), s, q, panel.length(), part, scale, from, to);
          continue;
        }
        gather_block(panel.streams(b), s, q, panel.length(), {0, q}, scale, from, rotated.data());
        if (run >= 16) {
          walsh_hadamard(rotated.data(), q, run, no_signs.data(), from, rotated.data(),
                         InOrder<T>{rotated.data()});
        } else {
          short_walsh_hadamard(rotated.data(), q, run, no_signs.data(), rotated.data());
        }
        negate_signed(rotated.data(), q, panel.rotation_signs(b));
        std::copy(rotated.data() + part.begin, rotated.data() + part.end, to);
      }
    }
  }
}

}  // namespace
}  // namespace ksm
