// Products with dense signs and normals, of a few rows and a range of coordinates; see loops.h for how
// it is included.
#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/project_vectors.h"

namespace ksm {
namespace {

constexpr int64_t kTileOutputs = 64;

// The coordinates of a row that lie in block `block` of 128, padded with zeros where it is cut.
template <typename T>
const T* padded_block(Range coordinates, int64_t block, const T* x, T* padded) {
  const Range part = part_of_block(coordinates, block, kSignBlock);
  const T* from = x + block * kSignBlock - coordinates.begin;
  if (part.size() == kSignBlock) return from;
  std::fill(padded, padded + kSignBlock, T{0});
  std::copy(from + part.begin, from + part.end, padded + part.begin);
  return padded;
}

// Normals of a block of 128 coordinates and 64 outputs from `output` on. All words of sixteen outputs
// come first: steps of few registers, many of which the processor then has under way at once.
template <typename T>
void fill_normals(uint64_t seed, int64_t block, int64_t output,
                  T* tile) {  // (kSignBlock, kTileOutputs)
  constexpr int64_t kQuads = kSignBlock / 4;
  PhiloxSixteen random[kQuads];
  for (int64_t r = 0; r < kTileOutputs; r += 16) {
    const Words counter =
        counter_of(Kind::kGaussian, block * kQuads, static_cast<uint32_t>(output + r), 0);
    const PhiloxOfIndices streams(seed, counter);
    for (uint32_t quad = 0; quad < kQuads; ++quad) {
      random[quad] = streams.at(counter.word[0] + quad);
    }
    for (int64_t pair = 0; pair < 2 * kQuads; ++pair) {
      const uint32_t* words = random[pair / 2].words[pair % 2 * 2];
      T* __restrict first = tile + 2 * pair * kTileOutputs + r;
      T* __restrict second = first + kTileOutputs;
      for (int l = 0; l < 16; ++l) {
        const NormalPair normals = normals_of(words[l], words[16 + l]);
        first[l] = normals.first;
        second[l] = normals.second;
      }
    }
  }
}

// Entries of a block of 128 coordinates and 64 outputs from `output` on, without the scale.
template <typename T>
void fill_tile(const Projection& projection, int64_t block, int64_t output,
               T* tile) {  // (kSignBlock, kTileOutputs)
  if (projection.kind == Kind::kGaussian) {
    return fill_normals(projection.seed, block, output, tile);
  }
  for (int64_t r = 0; r < kTileOutputs; r += 16) {
    const Words counter =
        counter_of(Kind::kRademacher, block, static_cast<uint32_t>(output + r), 0);
    const PhiloxSixteen random = philox_sixteen(projection.seed, counter, 2);
    for (int j = 0; j < kSignBlock; ++j) {
      const uint32_t* words = random.words[sign_word(j)];
      T* row = tile + j * kTileOutputs + r;
      for (int l = 0; l < 16; ++l) row[l] = words[l] >> sign_bit(j) & 1 ? T{-1} : T{1};
    }
  }
}

// Sums over a block's coordinates for 64 outputs: kRows rows of x share the loads of the tile.
template <int kRows, typename T>
void multiply_rows(Range coordinates, int64_t block, const T* x, int64_t x_stride, const T* tile,
                   T scale, int64_t outputs, T* y, int64_t y_stride) {
  T padded[kRows][kSignBlock];
  const T* row[kRows];
  for (int i = 0; i < kRows; ++i) {
    row[i] = padded_block(coordinates, block, x + i * x_stride, padded[i]);
  }
  for (int64_t r = 0; r < kTileOutputs; r += 16) {
    Sixteen<T> sum[kRows];
    for (int i = 0; i < kRows; ++i) sum[i] = Sixteen<T>::load(tile + r).times(row[i][0]);
    for (int64_t j = 1; j < kSignBlock; ++j) {
      const auto entries = Sixteen<T>::load(tile + j * kTileOutputs + r);
      for (int i = 0; i < kRows; ++i) sum[i] = sum[i].plus(entries.times(row[i][j]));
    }
    for (int i = 0; i < kRows; ++i) {
      T values[16];
      sum[i].times(scale).store(values);
      T* to = y + i * y_stride + r;
      for (int64_t l = 0; l < std::min<int64_t>(16, outputs - r); ++l) to[l] += values[l];
    }
  }
}

template <typename T>
void project_dense(const Projection& projection, Range coordinates, Range outputs, int64_t rows,
                   const T* x, int64_t x_stride, T* y, int64_t y_stride) {
  // As many as have registers for their sums.
  constexpr int kMostRows = sizeof(T) == 4 && KSM_VECTOR_BYTES == 64 ? 8 : 4;
  const T scale = static_cast<T>(scale_of(projection));
  const Buffer<T> tile(kSignBlock * kTileOutputs);
  const int64_t end = (coordinates.end + kSignBlock - 1) / kSignBlock;
  for (int64_t block = coordinates.begin / kSignBlock; block < end; ++block) {
    for (int64_t output = outputs.begin; output < outputs.end; output += kTileOutputs) {
      const int64_t count = std::min(kTileOutputs, outputs.end - output);
      fill_tile(projection, block, output, tile.data());
      int64_t i = 0;
      const auto multiply = [&](auto group) {
        for (; i + group <= rows; i += group) {
          multiply_rows<group>(coordinates, block, x + i * x_stride, x_stride, tile.data(), scale,
                               count, y + i * y_stride + output, y_stride);
        }
      };
      multiply(std::integral_constant<int, kMostRows>());
      multiply(std::integral_constant<int, 4>());
      multiply(std::integral_constant<int, 1>());
    }
  }
}

template <typename T>
void adjoint_dense(const Projection& projection, Range coordinates, int64_t rows, const T* y, T* x,
                   int64_t x_stride) {
  const T scale = static_cast<T>(scale_of(projection));
  const Buffer<T> tile(kSignBlock * kTileOutputs);
  for (int64_t i = 0; i < rows; ++i) {
    std::fill(x + i * x_stride, x + i * x_stride + coordinates.size(), T{0});
  }
  const int64_t end = (coordinates.end + kSignBlock - 1) / kSignBlock;
  for (int64_t block = coordinates.begin / kSignBlock; block < end; ++block) {
    const Range part = part_of_block(coordinates, block, kSignBlock);
    for (int64_t output = 0; output < projection.k; output += kTileOutputs) {
      const int64_t count = std::min(kTileOutputs, projection.k - output);
      fill_tile(projection, block, output, tile.data());
      for (int64_t i = 0; i < rows; ++i) {
        T weights[kTileOutputs] = {};  // zero past the last output, whatever the tile holds there
        for (int64_t r = 0; r < count; ++r) weights[r] = y[i * projection.k + output + r] * scale;
        T* to = x + i * x_stride + block * kSignBlock - coordinates.begin;
        for (int64_t j = part.begin; j < part.end; ++j) {
          T lanes[16] = {};
          for (int64_t r = 0; r < kTileOutputs; r += 16) {
            for (int64_t l = 0; l < 16; ++l) {
              lanes[l] += tile[j * kTileOutputs + r + l] * weights[r + l];
            }
          }
          T sum = 0;
          for (const T lane : lanes) sum += lane;
          to[j] += sum;
        }
      }
    }
  }
}

// Rademacher signs of float32 by lookup: the four bits of a nibble choose one of the sixteen signed
// sums of four coordinates. A lookup and a sum then do the work of four products and sums, and
// nothing is rounded that a product would not be.
void project_rademacher(const Projection& projection, Range coordinates, Range outputs,
                        int64_t rows, const float* x, int64_t x_stride, float* y,
                        int64_t y_stride) {
  constexpr int kNibbles = 8;                                     // per word
  constexpr uint32_t kSet[4] = {0xAAAA, 0xCCCC, 0xF0F0, 0xFF00};  // entries with bit 0, 1, 2, 3
  using Values = Sixteen<float>;
  const auto scale = static_cast<float>(scale_of(projection));
  const int64_t width = round_up(outputs.size(), 16);
  const Buffer<uint32_t> words(4 * width);  // word q of every output
  float padded[kSignBlock];
  const Buffer<float> sums(2 * width);

  const auto table_of = [&](const float* row, int q, int nibble) {
    // Bits 4 * nibble + j of word q belong to coordinates 8 apart (see sign_bit).
    const float* four = row + 32 * (nibble % 4) + 2 * q + nibble / 4;
    Values table = Values::all(0);
    for (int j = 0; j < 4; ++j) {
      table = table.plus(Values::all(four[8 * j] * scale).negated(kSet[j]));
    }
    return table;
  };
  const auto add_word = [&](const float* row, int q, float* to) {
    Values table[kNibbles];
    for (int g = 0; g < kNibbles; ++g) table[g] = table_of(row, q, g);
    const uint32_t* word = words.data() + q * width;
    for (int64_t r = 0; r < width; r += 16) {
      Values even = Values::load(to + r),
             odd = Values::all(0);  // two sums wait for each other less
      for (int g = 0; g < kNibbles; g += 2) {
        even = even.plus(table[g].looked_up(word + r, 4 * g));
        odd = odd.plus(table[g + 1].looked_up(word + r, 4 * g + 4));
      }
      even.plus(odd).store(to + r);
    }
  };

  const int64_t end = (coordinates.end + kSignBlock - 1) / kSignBlock;
  for (int64_t block = coordinates.begin / kSignBlock; block < end; ++block) {
    for (int64_t r = 0; r < width; r += 16) {
      const Words counter =
          counter_of(Kind::kRademacher, block, static_cast<uint32_t>(outputs.begin + r), 0);
      const PhiloxSixteen random = philox_sixteen(projection.seed, counter, 2);
      for (int q = 0; q < 4; ++q) {
        uint32_t* to = words.data() + q * width + r;
        for (int l = 0; l < 16; ++l) to[l] = Values::numbers_of(random.words[q][l]);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = padded_block(coordinates, block, x + i * x_stride, padded);
      float* to = y + i * y_stride + outputs.begin;
      if (outputs.size() == width) {
        for (int q = 0; q < 4; ++q) add_word(row, q, to);
      } else {
        std::fill(sums.data(), sums.data() + width, 0.0f);
        for (int q = 0; q < 4; ++q) add_word(row, q, sums.data());
        for (int64_t r = 0; r < outputs.size(); ++r) to[r] += sums[r];
      }
    }
  }
}

}  // namespace
}  // namespace ksm
