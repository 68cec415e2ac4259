// Sparse projections (sjlt) of a few rows and a range of coordinates; see loops.h for how it is
// included.
#pragma once

#include <algorithm>

#include "cpu/project_vectors.h"

namespace ksm {
namespace {

constexpr int64_t kSjltPanel = 256;  // coordinates whose nonzeros are drawn at once

// The nonzeros of coordinates [first, first + count): outputs and values, `sparsity` in a row.
template <typename T>
void draw_nonzeros(const Projection& projection, int64_t first, int64_t count, int32_t* outputs,
                   T* values) {
  const int64_t s = projection.sparsity, segment = segment_of(projection);
  const T scale = static_cast<T>(scale_of(projection));
  for (int64_t c = 0; c < count; c += 16) {
    for (int64_t t = 0; t < s; t += 4) {
      const auto group = static_cast<uint32_t>(t / 4);
      const Words counter = counter_of(Kind::kSjlt, first + c, group, 0);
      PhiloxSixteen random;
      if (counter.word[0] <= UINT32_MAX - 15) {
        random = philox_sixteen(projection.seed, counter, 0);
      } else {  // the low word of the coordinate overflows within the sixteen
        for (int l = 0; l < 16; ++l) {
          const Words words = sjlt_words(projection.seed, first + c + l, t);
          for (int q = 0; q < 4; ++q) random.words[q][l] = words.word[q];
        }
      }
      for (int64_t l = 0; l < std::min<int64_t>(16, count - c); ++l) {
        for (int64_t q = 0; q < std::min<int64_t>(4, s - t); ++q) {
          const Nonzero nonzero = nonzero_of(random.words[q][l], segment);
          outputs[(c + l) * s + t + q] = static_cast<int32_t>((t + q) * segment + nonzero.output);
          values[(c + l) * s + t + q] = nonzero.negative ? -scale : scale;
        }
      }
    }
  }
}

// y += the nonzeros of a row's coordinates times its values. kSparsity: of each, 0 for `sparsity`.
template <int64_t kSparsity, typename T>
void add_nonzeros(const T* x, int64_t count, int64_t sparsity, const int32_t* outputs,
                  const T* values, T* y) {
  const int64_t s = kSparsity ? kSparsity : sparsity;
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t t = 0; t < s; ++t) y[outputs[c * s + t]] += x[c] * values[c * s + t];
  }
}

template <typename T>
void project_sjlt(const Projection& projection, Range coordinates, int64_t rows, const T* x,
                  int64_t x_stride, T* y, int64_t y_stride) {
  const int64_t s = projection.sparsity;
  const Buffer<int32_t> outputs(kSjltPanel * s);
  const Buffer<T> values(kSjltPanel * s);
  for (int64_t first = coordinates.begin; first < coordinates.end; first += kSjltPanel) {
    const int64_t count = std::min(kSjltPanel, coordinates.end - first);
    draw_nonzeros(projection, first, count, outputs.data(), values.data());
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = x + i * x_stride + first - coordinates.begin;
      const auto add = s == 1 ? add_nonzeros<1, T> : add_nonzeros<0, T>;
      add(from, count, s, outputs.data(), values.data(), y + i * y_stride);
    }
  }
}

template <typename T>
void adjoint_sjlt(const Projection& projection, Range coordinates, int64_t rows, const T* y, T* x,
                  int64_t x_stride) {
  const int64_t s = projection.sparsity;
  const Buffer<int32_t> outputs(kSjltPanel * s);
  const Buffer<T> values(kSjltPanel * s);
  for (int64_t first = coordinates.begin; first < coordinates.end; first += kSjltPanel) {
    const int64_t count = std::min(kSjltPanel, coordinates.end - first);
    draw_nonzeros(projection, first, count, outputs.data(), values.data());
    for (int64_t i = 0; i < rows; ++i) {
      const T* from = y + i * projection.k;
      T* to = x + i * x_stride + first - coordinates.begin;
      for (int64_t c = 0; c < count; ++c) {
        T sum = 0;
        for (int64_t t = 0; t < s; ++t) sum += from[outputs[c * s + t]] * values[c * s + t];
        to[c] = sum;
      }
    }
  }
}

}  // namespace
}  // namespace ksm
