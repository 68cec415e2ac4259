// Products with dense signs in float32 on the tensor cores of CUDA.
//
// Signs are exact in bfloat16, and so are values as sums of a few bfloat16: products are exact. A
// lane's share of the signs of an output is one word of projection.h's 128 bits, which turns into
// operands in registers by a shift and a mask: P is never stored, not even in shared memory.
#include "cuda/intrinsics.cuh"
#include "cuda/neighbours.cuh"
#include "cuda/project_kinds.cuh"
#include "cuda/warp_sums.cuh"

namespace ksm {
namespace {

constexpr int kTensorDepth = 64;          // coordinates in shared memory at once
constexpr int kTensorColumns = kThreads;  // outputs of a tile: a thread draws the signs of one
constexpr int kParts = kSignBlock / kTensorDepth;
constexpr int kMmaDepth = 16;

// How many bfloat16 a value is the sum of.
template <typename From>
constexpr int kTermsOf = 3;
template <>
constexpr int kTermsOf<__half> = 2;
template <>
constexpr int kTermsOf<__nv_bfloat16> = 1;

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

// The terms of four values in pairs.
template <typename From>
using Terms = uint32_t[kTermsOf<From>][2];

template <typename From>
__device__ void cut(const Four<From>& four, Terms<From>& terms) {
  if constexpr (kTermsOf<From> == 1) {
    terms[0][0] = four.words[0], terms[0][1] = four.words[1];
  } else {
    float rest[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) rest[e] = four[e];
    const float zero = (rest[0] + rest[1] * 0.0f) * 0.0f + (rest[2] + rest[3] * 0.0f) * 0.0f;
    if (zero == 0) {  // all are finite
#pragma unroll
      for (int term = 0; term < kTermsOf<From>; ++term) {
        uint32_t bits[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          memcpy(&bits[e], &rest[e], sizeof(bits[e]));
          const uint32_t kept = bits[e] & 0xFFFF0000;
          float value;
          memcpy(&value, &kept, sizeof(value));
          rest[e] -= value;
        }
        terms[term][0] = bits[0] >> 16 | (bits[1] & 0xFFFF0000);
        terms[term][1] = bits[2] >> 16 | (bits[3] & 0xFFFF0000);
      }
      return;
    }
#pragma unroll
    for (int term = 0; term < kTermsOf<From>; ++term) {
#pragma unroll
      for (int e = 0; e < 4; e += 2) {
        const uint32_t low = next_term(rest[e]), high = next_term(rest[e + 1]);
        terms[term][e / 2] = low | high << 16;
      }
    }
  }
}

constexpr int kTensorRows = 32;  // of a tile, or half as many

// Warps lie side by side. Two blocks find room on a multiprocessor: while one stages, one multiplies.
template <typename From, int kTileRows>
struct TensorTile {
  static constexpr int kTerms = kTermsOf<From>;
  static constexpr int kRowMmas = kTileRows / 16, kColumnMmas = 4;  // of a warp
  using Sums = WarpSums<kRowMmas, kColumnMmas, kWarps>;
  static_assert(Sums::kColumns == kTensorColumns && Sums::kRows == kTileRows);
  // Words of two neighbours. Padded by 4: the rows that a warp reads at once lie in 32 different banks.
  static constexpr int kStride = kTensorDepth / 2 + 4;
  // A thread loads and cuts four neighbours of rows that are so far apart.
  static constexpr int kThreadsOfRow = kTensorDepth / 4, kApart = kThreads / kThreadsOfRow;
  static constexpr int kFours = kTileRows / kApart;
  using Values = Four<From>[kFours];

  alignas(16) uint32_t x[kTerms][kTileRows][kStride];
  uint32_t words[2][4][kTensorColumns + 8];  // of this block of signs and the next one, likewise

  static __device__ int own_row() { return static_cast<int>(threadIdx.x) / kThreadsOfRow; }
  static __device__ int own_depth() { return static_cast<int>(threadIdx.x) % kThreadsOfRow * 4; }

  __device__ void store(const Values& values) {
#pragma unroll
    for (int n = 0; n < kFours; ++n) {
      Terms<From> terms;
      cut(values[n], terms);
#pragma unroll
      for (int term = 0; term < kTerms; ++term) {
        uint32_t* to = &x[term][own_row() + n * kApart][own_depth() / 2];
        *reinterpret_cast<Two<uint32_t>*>(to) = {terms[term][0], terms[term][1]};
      }
    }
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
          const int row = Sums::first_row() + p * Sums::kMmaRows + lane % 16;
          uint32_t a[4];
          load_matrices(a, &x[term][row][step * kMmaDepth / 2 + lane / 16 * 4]);
#pragma unroll
          for (int c = 0; c < kColumnMmas; ++c) mma_bfloat16(to.sums[p][c], a, b[c]);
        }
      }
    }
  }

 private:
  // Bits m and m + 16 as the signs of two bfloat16 ones.
  static __device__ uint32_t signed_ones(uint32_t signs, int m) {
    return (signs << (15 - m) & 0x80008000) ^ 0x3F803F80;
  }
};

// A block of threads multiplies a tile of rows by signs of 256 outputs, part after part of the
// coordinates. The values of the next part, and the signs of the next block, arrive in the meantime.
template <typename From, int kTileRows>
__global__ void __launch_bounds__(kThreads, 2)
    project_rademacher_kernel(Projection projection, float scale, Slab<const From> x,
                              Sums<float> sums, bool wide) {
  using Tile = TensorTile<From, kTileRows>;
  __shared__ Tile tile;
  const int64_t k = projection.k;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t column_tiles = divide_up(k, kTensorColumns);
  const int64_t row_tiles = divide_up(x.rows, kTileRows);
  for (int64_t item = blockIdx.x; item < column_tiles * row_tiles * sums.splits;
       item += gridDim.x) {
    const int64_t output = item % column_tiles * kTensorColumns;
    const int64_t row = item / column_tiles % row_tiles * kTileRows;
    const int64_t split = item / column_tiles / row_tiles;
    const int64_t end = sums.end(split) * kParts, own_row = row + Tile::own_row();
    const int64_t own_rows = divide_up(x.rows - own_row, Tile::kApart);
    const ThreadRows<From, Tile::kFours> from = {
        x.values + own_row * x.stride, Tile::kApart * x.stride, x.count,
        static_cast<int>(own_rows < Tile::kFours ? own_rows : Tile::kFours), wide};
    typename Tile::Values values;
    typename Tile::Sums totals;
    const auto load_values = [&](int64_t part) {
      from.load_at(part * kTensorDepth + Tile::own_depth() - x.begin, values);
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

}  // namespace

Cut rademacher_cut(const Projection& projection, int64_t rows) {
  return {kSignBlock,
          divide_up(divide_up(projection.k, kTensorColumns) * divide_up(rows, kTensorRows), 2)};
}

template <typename From>
cudaError_t launch_rademacher(const Projection& projection, float scale, Slab<const From> x,
                              Sums<float> sums, cudaStream_t stream) {
  const auto work = [&](int64_t rows) {
    return divide_up(sums.k, kTensorColumns) * divide_up(x.rows, rows) * sums.splits;
  };
  const bool wide = is_wide(x.values, x.stride, x.begin);
  constexpr int kFew = kTensorRows / 2;
  if (x.rows <= kFew) {
    return launch_over(work(kFew), stream, project_rademacher_kernel<From, kFew>, projection, scale,
                       x, sums, wide);
  }
  return launch_over(work(kTensorRows), stream, project_rademacher_kernel<From, kTensorRows>,
                     projection, scale, x, sums, wide);
}

#define KSM_INSTANTIATE(From)                                                                     \
  template cudaError_t launch_rademacher(const Projection&, float, Slab<const From>, Sums<float>, \
                                         cudaStream_t);
KSM_INSTANTIATE(float)
KSM_INSTANTIATE(__nv_bfloat16)
KSM_INSTANTIATE(__half)
#undef KSM_INSTANTIATE

}  // namespace ksm
