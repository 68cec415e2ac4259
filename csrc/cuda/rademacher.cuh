// Products with a Rademacher matrix on the tensor cores.
//
// Signs are exact in bfloat16, and so are values as sums of a few bfloat16: products are exact. A
// lane's share of the signs of an output is one word of project.h's 128 bits, which turns into
// operands in registers by a shift and a mask: P is never stored, not even in shared memory.
#pragma once

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "cuda/slab.cuh"
#include "cuda/warp_sums.cuh"
#include "project.h"

namespace ksm {

constexpr int kTensorDepth = 64;          // coordinates in shared memory at once
constexpr int kTensorColumns = kThreads;  // outputs of a tile: a thread draws the signs of one
constexpr int kParts = kSignBlock / kTensorDepth;
constexpr int kMmaDepth = 16;

// How many bfloat16 a value is the sum of.
template <typename From>
constexpr int kTermsOf = 3;
template <>
inline constexpr int kTermsOf<__half> = 2;
template <>
inline constexpr int kTermsOf<__nv_bfloat16> = 1;

// The next 8 significant bits of `rest`, as the bits of a bfloat16, which they are taken off. Cut
// instead of rounded: what is left is exact, and the largest numbers stay finite.
__device__ inline uint16_t next_term(float& rest) {
  uint32_t bits;
  memcpy(&bits, &rest, sizeof(bits));
  const bool finite = (bits & 0x7F800000) != 0x7F800000, nan = (bits & 0x7FFFFFFF) > 0x7F800000;
  const uint32_t kept = bits & 0xFFFF0000;
  float term;
  memcpy(&term, &kept, sizeof(term));
  rest = finite ? rest - term : 0.0f;
  return static_cast<uint16_t>(nan ? 0x7FC0 : kept >> 16);
}

// kWarpRows warps lie on top of each other, the others side by side. Two rather than one: values
// then serve twice as many outputs each time they are read from shared memory.
template <int kTerms, int kWarpRows>
struct TensorTile {
  static constexpr int kRowMmas = kWarpRows, kColumnMmas = 4 * kWarpRows;  // of a warp
  using Sums = WarpSums<kRowMmas, kColumnMmas, kWarps / kWarpRows>;
  static_assert(Sums::kColumns == kTensorColumns);
  static constexpr int kRows = Sums::kRows;
  // Padded by 8: the rows g and words q that a warp reads at once lie in 32 different banks.
  static constexpr int kStride = kTensorDepth + 8;
  static constexpr int kPerThread = kRows * kTensorDepth / kThreads;

  alignas(4) uint16_t x[kTerms][kRows][kStride];
  uint32_t words[2][4][kTensorColumns + 8];  // of this block of signs and the next one, likewise

  __device__ void store(const float (&values)[kPerThread]) {
    for_each([&](int e, int row, int depth) {
      float rest = values[e];
      for (int term = 0; term < kTerms; ++term) x[term][row][depth] = next_term(rest);
    });
  }

  __device__ void draw(uint64_t seed, int64_t block, int64_t output) {
    const Words drawn = rademacher_words(seed, block, output);
    for (int q = 0; q < 4; ++q) words[block & 1][q][threadIdx.x] = drawn.word[q];
  }

  // to += the products of one part of a block.
  __device__ void multiply(int64_t block, int part, Sums& to) const {
    const int lane = static_cast<int>(threadIdx.x % 32), g = lane / 4, q = lane % 4;
    uint32_t signs[kColumnMmas];
#pragma unroll
    for (int c = 0; c < kColumnMmas; ++c) {
      signs[c] = words[block & 1][q][Sums::first_column() + c * Sums::kMmaColumns + g];
    }
#pragma unroll
    for (int step = 0; step < kTensorDepth / kMmaDepth; ++step) {
      const int m = part * (kTensorDepth / 8) + 2 * step;  // of coordinates 8 m to 8 m + 7
      uint32_t b[kColumnMmas][2];
#pragma unroll
      for (int c = 0; c < kColumnMmas; ++c) {
        b[c][0] = signed_ones(signs[c], m);
        b[c][1] = signed_ones(signs[c], m + 1);
      }
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
#pragma unroll
        for (int p = 0; p < kRowMmas; ++p) {
          const uint16_t* low =
              x[term][Sums::first_row() + p * Sums::kMmaRows + g] + step * kMmaDepth + 2 * q;
          const uint16_t* high = low + 8 * kStride;
          const uint32_t a[4] = {pair_at(low), pair_at(high), pair_at(low + 8), pair_at(high + 8)};
#pragma unroll
          for (int c = 0; c < kColumnMmas; ++c) mma_bfloat16(to.sums[p][c], a, b[c]);
        }
      }
    }
  }

  // Calls body(e, row, depth) for the values that this thread loads.
  template <typename Body>
  __device__ static void for_each(const Body& body) {
#pragma unroll
    for (int e = 0; e < kPerThread; ++e) {
      const int index = e * kThreads + static_cast<int>(threadIdx.x);
      body(e, index / kTensorDepth, index % kTensorDepth);
    }
  }

 private:
  static __device__ uint32_t pair_at(const uint16_t* first) {
    uint32_t pair;
    memcpy(&pair, __builtin_assume_aligned(first, 4), sizeof(pair));
    return pair;
  }

  // Bits m and m + 16 as the signs of two bfloat16 ones.
  static __device__ uint32_t signed_ones(uint32_t signs, int m) {
    return (signs << (15 - m) & 0x80008000) ^ 0x3F803F80;
  }
};

// A block of threads multiplies a tile of rows by signs of 256 outputs, part after part of the
// coordinates. The values of the next part, and the signs of the next block, arrive in the meantime.
template <typename From, int kWarpRows>
__global__ void __launch_bounds__(kThreads)
    project_rademacher_kernel(Projection projection, float scale, Slab<const From> x,
                              Sums<float> sums) {
  using Tile = TensorTile<kTermsOf<From>, kWarpRows>;
  __shared__ Tile tile;
  const int64_t k = projection.k;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column_tiles = divide_up(k, kTensorColumns);
  const int64_t row_tiles = divide_up(x.rows, Tile::kRows);
  for (int64_t item = blockIdx.x; item < column_tiles * row_tiles * sums.splits;
       item += gridDim.x) {
    const int64_t output = item % column_tiles * kTensorColumns;
    const int64_t row = item / column_tiles % row_tiles * Tile::kRows;
    const int64_t split = item / column_tiles / row_tiles;
    const int64_t end = sums.end(split) * kParts;
    float values[Tile::kPerThread];
    typename Tile::Sums totals;
    const auto load_values = [&](int64_t part) {
      Tile::for_each([&](int e, int r, int depth) {
        values[e] = x.template value_or_zero<float>(row + r, part * kTensorDepth + depth);
      });
    };
    __syncthreads();  // the signs of the item before have been read
    tile.draw(projection.seed, sums.begin(split), output + thread);
    load_values(sums.begin(split) * kParts);
    for (int64_t part = sums.begin(split) * kParts; part < end; ++part) {
      const int64_t block = part / kParts;
      __syncthreads();  // the part before has been read
      tile.store(values);
      __syncthreads();
      if (part + 1 < end) load_values(part + 1);
      if (part % kParts == 0) tile.draw(projection.seed, block + 1, output + thread);
      // A part is summed for itself, and added with rounding to nearest.
      typename Tile::Sums part_sums;
      tile.multiply(block, static_cast<int>(part % kParts), part_sums);
      totals += part_sums;
    }
    totals.for_each([&](int r, int c, float sum) {
      if (row + r < x.rows && output + c < k) sums.add(split, row + r, output + c, sum * scale);
    });
  }
}

}  // namespace ksm
