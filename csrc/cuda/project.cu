// Projections on CUDA. Random numbers are drawn where they are used; entries are those of project.h.
//
// Every sum belongs to one thread, or to one block that takes its terms in order. Sums over many
// coordinates are cut into splits by shapes alone: the first is added to y, the others become partial
// sums that a second kernel adds in order. No atomics: the result is the same in every run.
//
// tools/cuda_on_host runs this file on the host.
#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"
#include "cuda/rademacher.cuh"
#include "cuda/slab.cuh"
#include "project.h"

namespace ksm {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads) add_partials_kernel(Sums<T> sums) {
  const int64_t size = sums.rows * sums.k;
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < size;
       first += int64_t{gridDim.x} * kThreads) {
    const int64_t e = first + threadIdx.x;
    if (e >= size) continue;
    T sum = sums.y[e];
#pragma unroll 16  // as many loads under way
    for (int64_t split = 1; split < sums.splits; ++split) sum += sums.of(split)[e];
    sums.y[e] = sum;
  }
}

__device__ uint32_t word_of(const Words& words, int index) {  // keeps the words in registers
  const uint32_t low = index & 1 ? words.word[1] : words.word[0];
  const uint32_t high = index & 1 ? words.word[3] : words.word[2];
  return index & 2 ? high : low;
}

// ---- sbp -------------------------------------------------------------------------------------

constexpr int kSbpRows = 8;  // they share what is drawn

// A vector of up to sixteen neighbours that meets another one: lane l meets lane l ^ flip of the
// other, negated where bit l of the coordinates' signs is set.
struct Meeting {
  int32_t other;  // first coordinate of a block, or first output
  uint16_t signs;
  uint16_t flip;
};

__device__ uint16_t vector_signs(uint64_t seed, int64_t block, uint32_t replicate, int64_t u) {
  const Words random = block_signs(seed, block, replicate, u);
  return static_cast<uint16_t>(word_of(random, static_cast<int>(u % 128 / 32)) >> u % 32);
}

// The inverse of a number modulo `count`, which it is coprime to (Euclid).
__device__ uint32_t inverse_modulo(uint32_t number, uint32_t count) {
  uint32_t rest = count, next_rest = number;
  int64_t factor = 0, next_factor = 1;  // rest = factor * number modulo count
  while (next_rest) {
    const uint32_t quotient = rest / next_rest;
    const uint32_t rest_after = rest - quotient * next_rest;
    const int64_t factor_after = factor - int64_t{quotient} * next_factor;
    rest = next_rest, next_rest = rest_after;
    factor = next_factor, next_factor = factor_after;
  }
  return static_cast<uint32_t>(factor < 0 ? factor + count : factor);
}

// a b modulo `count`; all are at most `count`.
__device__ uint32_t product_modulo(uint32_t a, uint32_t b, uint32_t count) {
  if (count <= 65536) return a % count * (b % count) % count;
  return static_cast<uint32_t>(uint64_t{a} * b % count);
}

// A permutation of a block from the side of its outputs: vector v comes from inverse * (v - shift).
struct Move {
  uint32_t inverse, shift, flip;
};

__device__ Move move_of(const Projection& projection, int64_t length, int64_t block,
                        int64_t replicate) {
  const int64_t vectors = segment_of(projection) / length;
  const BlockPermutation permutation =
      block_permutation(projection.seed, block, static_cast<uint32_t>(replicate), vectors, length);
  return {inverse_modulo(permutation.multiplier, static_cast<uint32_t>(vectors)), permutation.shift,
          permutation.flip};
}

// Which vector of coordinates of a block the vector of outputs from `output` on meets.
__device__ Meeting met_by_outputs(const Projection& projection, int64_t length, int64_t block,
                                  int64_t output, const Move& move) {
  const auto q = static_cast<uint32_t>(segment_of(projection));
  const auto lanes = static_cast<uint32_t>(length), vectors = q / lanes;
  const uint32_t replicate = static_cast<uint32_t>(output) / q;
  const uint32_t v = (static_cast<uint32_t>(output) - replicate * q) / lanes;
  const uint32_t moved = v >= move.shift ? v - move.shift : v + (vectors - move.shift);
  const int64_t u = int64_t{product_modulo(move.inverse, moved, vectors)} * length;
  return {static_cast<int32_t>(u), vector_signs(projection.seed, block, replicate, u),
          static_cast<uint16_t>(move.flip)};
}

// Which vector of outputs of segment t the vector of coordinates from `coordinate` on meets.
__device__ Meeting met_by_coordinates(const Projection& projection, int64_t length,
                                      int64_t coordinate, int64_t t) {
  const int64_t q = segment_of(projection), block = coordinate / q, u = coordinate - block * q;
  const auto lanes = static_cast<uint32_t>(length);
  const uint32_t vectors = static_cast<uint32_t>(q) / lanes;
  const auto replicate = static_cast<uint32_t>(t);
  const BlockPermutation permutation =
      block_permutation(projection.seed, block, replicate, vectors, length);
  const uint32_t moved =
      product_modulo(permutation.multiplier, static_cast<uint32_t>(u) / lanes, vectors);
  const uint32_t sum = moved + permutation.shift;  // below 2^32: q is below 2^31
  const int64_t place = sum < vectors ? sum : sum - vectors;
  return {static_cast<int32_t>(t * q + place * length),
          vector_signs(projection.seed, block, replicate, u),
          static_cast<uint16_t>(permutation.flip)};
}

// ---- sbp, vectors of sixteen in float32 ----

constexpr int kSixteen = 16;

template <typename T>
using RowsOfFour = Four<T>[kSbpRows];
using Totals = float[kSbpRows][4];

template <typename T>
__device__ int own_rows(const Slab<T>& x, int64_t row) {
  return static_cast<int>(x.rows - row < kSbpRows ? x.rows - row : kSbpRows);
}

// totals[e] += factors[e] values[e ^ kFlip] or, the other way round, totals[e ^ kFlip] += ..
template <int kFlip, typename From>
__device__ void add_flipped(const RowsOfFour<From>& values, const float (&factors)[4], bool outputs,
                            Totals& totals) {
#pragma unroll
  for (int r = 0; r < kSbpRows; ++r) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float factor = outputs ? factors[e ^ kFlip] : factors[e];
      totals[r][e] = fma(values[r][e ^ kFlip], factor, totals[r][e]);
    }
  }
}

// Adds what a quarter of a vector meets. Its coordinates are the `four`th of their vector, and the
// totals are of them or, with `outputs`, the values are.
template <typename From>
__device__ void add_met(const Meeting& meeting, int four, float scale,
                        const RowsOfFour<From>& values, bool outputs, Totals& totals) {
  float factors[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) factors[e] = meeting.signs >> (4 * four + e) & 1 ? -scale : scale;
  switch (meeting.flip % 4) {
    case 0: return add_flipped<0>(values, factors, outputs, totals);
    case 1: return add_flipped<1>(values, factors, outputs, totals);
    case 2: return add_flipped<2>(values, factors, outputs, totals);
    default: return add_flipped<3>(values, factors, outputs, totals);
  }
}

// Writes what lies in the slab; `wide`: its rows are aligned.
__device__ void store_rows(const Totals& totals, const Slab<float>& x, int64_t row,
                           int64_t coordinate, bool wide) {
  const int64_t at = coordinate - x.begin;
  const bool whole = wide && at >= 0 && at + 4 <= x.count;
#pragma unroll
  for (int r = 0; r < kSbpRows; ++r) {
    if (row + r >= x.rows) continue;
    float* to = x.values + (row + r) * x.stride + at;
    if (whole) {
      store_four(to, totals[r]);
      continue;
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (at + e >= 0 && at + e < x.count) to[e] = totals[r][e];
    }
  }
}

// How a block of threads covers rows, and outputs or coordinates: few rows leave more threads for
// the others. A thread has a quarter of a vector of kSbpRows rows.
struct SbpLayout {
  int row_groups;

  __host__ __device__ explicit SbpLayout(int64_t rows)
      : row_groups(rows > 2 * kSbpRows ? 4
                   : rows > kSbpRows   ? 2
                                       : 1) {}

  __host__ __device__ int threads() const { return kThreads / row_groups; }  // side by side
  __host__ __device__ int width() const { return 4 * threads(); }
  __host__ __device__ int vectors() const { return threads() / 4; }
  __host__ __device__ int rows() const { return row_groups * kSbpRows; }
  // So many meetings of each vector are known at once.
  __host__ __device__ int depth() const { return kThreads / vectors(); }
};

// A thread owns four outputs and gathers what meets them, block after block. The permutations of
// blocks are drawn by a thread for each, then the meetings of vectors likewise.
template <typename From>
__global__ void __launch_bounds__(kThreads, 2)
    project_sixteen_kernel(Projection projection, float scale, Slab<const From> x, Sums<float> sums,
                           bool wide) {
  __shared__ Move moves[kThreads];
  __shared__ Meeting meetings[kThreads];
  const int64_t k = projection.k, q = segment_of(projection);
  const SbpLayout layout(x.rows);
  const int thread = static_cast<int>(threadIdx.x), vectors = layout.vectors();
  const int depth = layout.depth(), beside = thread % layout.threads();
  const int64_t tiles = divide_up(k, layout.width()), groups = divide_up(x.rows, layout.rows());
  for (int64_t item = blockIdx.x; item < tiles * groups * sums.splits; item += gridDim.x) {
    const int64_t tile = item % tiles * layout.width(), split = item / tiles / groups;
    const int64_t row =
        item / tiles % groups * layout.rows() + thread / layout.threads() * kSbpRows;
    const int64_t output = tile + 4 * beside, end = sums.end(split);
    const int64_t last = tile + layout.width() < k ? tile + layout.width() : k;
    const auto first_replicate = static_cast<uint32_t>(tile / q);
    const auto replicates = static_cast<int>((last - 1) / q - first_replicate + 1);
    const int drawn = kThreads / replicates / depth * depth;  // blocks of which moves are known;
    // no tile has more segments than vectors.
    const ThreadRows<From, kSbpRows> from = {x.values + row * x.stride, x.stride, x.count,
                                             own_rows(x, row), wide};
    Totals totals = {};
    int place = 0;  // of a block's moves
    for (int64_t first = sums.begin(split); first < end; first += depth, place += depth) {
      if (place == drawn) place = 0;
      if (place == 0) {
        __syncthreads();  // the moves before have been read
        const int64_t block = first + thread / replicates;
        if (thread < drawn * replicates && block < end) {
          moves[thread] =
              move_of(projection, kSixteen, block, first_replicate + thread % replicates);
        }
      }
      __syncthreads();  // the meetings before have been read, and moves written
      const int64_t block = first + thread / vectors;
      const int64_t vector_output = tile + thread % vectors * kSixteen;
      if (block < end && vector_output < k) {
        const uint32_t replicate =
            static_cast<uint32_t>(vector_output) / static_cast<uint32_t>(q) - first_replicate;
        const Move& move = moves[(place + thread / vectors) * replicates + replicate];
        meetings[thread] = met_by_outputs(projection, kSixteen, block, vector_output, move);
      }
      __syncthreads();
      if (output >= k || row >= x.rows) continue;
      for (int n = 0; n < depth && first + n < end; ++n) {
        const Meeting meeting = meetings[n * vectors + beside / 4];
        const int four = beside % 4 ^ meeting.flip / 4;
        const int64_t at = (first + n) * q - x.begin + meeting.other + 4 * four;
        RowsOfFour<From> values;
        from.load_at(at, values);
        add_met(meeting, four, scale, values, true, totals);
      }
    }
    if (output >= k) continue;
#pragma unroll
    for (int r = 0; r < kSbpRows; ++r) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (row + r < x.rows) sums.add(split, row + r, output + e, totals[r][e]);
      }
    }
  }
}

constexpr int kTilesPerItem = 16;

// A thread owns four coordinates in one tile after the other, and gathers from every segment.
__global__ void __launch_bounds__(kThreads, 2)
    adjoint_sixteen_kernel(Projection projection, float scale, const float* __restrict__ y,
                           bool y_wide, Slab<float> x, bool x_wide) {
  __shared__ Meeting meetings[kThreads];
  const int64_t k = projection.k, s = projection.sparsity;
  const SbpLayout layout(x.rows);
  const int thread = static_cast<int>(threadIdx.x), vectors = layout.vectors();
  const int depth = layout.depth(), beside = thread % layout.threads();
  const int64_t width = layout.width(), run = width * kTilesPerItem;
  const int64_t runs = x.stretches(run), groups = divide_up(x.rows, layout.rows());
  for (int64_t item = blockIdx.x; item < runs * groups; item += gridDim.x) {
    int64_t tile = (x.first_stretch(run) + item % runs) * kTilesPerItem;
    const int64_t full = tile + kTilesPerItem, last = x.first_stretch(width) + x.stretches(width);
    if (tile < x.first_stretch(width)) tile = x.first_stretch(width);
    const int64_t steps = ((full < last ? full : last) - tile) * s;  // a segment of a tile
    const int64_t row = item / runs * layout.rows() + thread / layout.threads() * kSbpRows;
    const ThreadRows<float, kSbpRows> from = {y + row * k, k, k, own_rows(x, row), y_wide};
    Totals totals = {};
    int64_t segment = 0;
    for (int64_t first = 0; first < steps; first += depth) {
      const int64_t step = first + thread / vectors;
      __syncthreads();  // the meetings before have been read
      if (step < steps) {
        const int64_t vector = (tile + step / s) * width + thread % vectors * kSixteen;
        meetings[thread] = met_by_coordinates(projection, kSixteen, vector, step % s);
      }
      __syncthreads();
      if (row >= x.rows) continue;
      for (int n = 0; n < depth && first + n < steps; ++n) {
        const Meeting meeting = meetings[n * vectors + beside / 4];
        const int64_t at = meeting.other + 4 * (beside % 4 ^ meeting.flip / 4);
        RowsOfFour<float> values;
        from.load_at(at, values);
        add_met(meeting, beside % 4, scale, values, false, totals);
        if (++segment < s) continue;
        segment = 0;
        const int64_t coordinate = (tile + (first + n) / s) * width + 4 * beside;
        store_rows(totals, x, row, coordinate, x_wide);
#pragma unroll
        for (int r = 0; r < kSbpRows; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) totals[r][e] = 0;
        }
      }
    }
  }
}

// ---- sbp, any vectors ----

// A thread owns an output for a few rows and gathers what meets it, block after block: vectors of
// sixteen float32 are two whole sectors of memory, wherever they lie. Each thread first works out the
// meeting of one vector: `length` blocks for the 256 / length vectors of outputs.
template <typename From, typename T>
__global__ void __launch_bounds__(kThreads)
    project_sbp_kernel(Projection projection, T scale, Slab<const From> x, Sums<T> sums) {
  __shared__ Meeting meetings[kThreads];
  const int64_t k = projection.k, q = segment_of(projection);
  const auto length = static_cast<int>(vector_length(q));
  const int vectors = kThreads / length;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = divide_up(k, kThreads), groups = divide_up(x.rows, kSbpRows);
  for (int64_t item = blockIdx.x; item < tiles * groups * sums.splits; item += gridDim.x) {
    const int64_t tile = item % tiles * kThreads, split = item / tiles / groups;
    const int64_t row = item / tiles % groups * kSbpRows;
    const int64_t output = tile + thread, end = sums.end(split);
    T totals[kSbpRows] = {};
    for (int64_t first = sums.begin(split); first < end; first += length) {
      const int64_t block = first + thread / vectors;
      const int64_t output_vector = tile + thread % vectors * length;
      __syncthreads();  // the meetings before have been read
      if (block < end && output_vector < k) {
        meetings[thread] = met_by_outputs(projection, length, block, output_vector,
                                          move_of(projection, length, block, output_vector / q));
      }
      __syncthreads();
      if (output >= k) continue;
      for (int n = 0; n < length && first + n < end; ++n) {
        const Meeting meeting = meetings[n * vectors + thread / length];
        const int lane = thread % length ^ meeting.flip;
        const int64_t coordinate = (first + n) * q + meeting.other + lane;
        const bool negative = meeting.signs >> lane & 1;
        T values[kSbpRows];
        for (int r = 0; r < kSbpRows; ++r) {
          values[r] = x.template value_or_zero<T>(row + r, coordinate) * scale;
        }
        for (int r = 0; r < kSbpRows; ++r) totals[r] += negative ? -values[r] : values[r];
      }
    }
    if (output >= k) continue;
    for (int r = 0; r < kSbpRows && row + r < x.rows; ++r) {
      sums.add(split, row + r, output, totals[r]);
    }
  }
}

// A thread owns a coordinate for a few rows, and gathers from one segment after the other.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    adjoint_sbp_kernel(Projection projection, T scale, const T* __restrict__ y, Slab<T> x) {
  __shared__ Meeting meetings[kThreads];
  const int64_t k = projection.k, s = projection.sparsity;
  const auto length = static_cast<int>(vector_length(segment_of(projection)));
  const int vectors = kThreads / length;
  const int thread = static_cast<int>(threadIdx.x);
  // Aligned tiles are made of whole vectors, as segments are.
  const int64_t tiles = x.stretches(kThreads), groups = divide_up(x.rows, kSbpRows);
  for (int64_t item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
    const int64_t tile = (x.first_stretch(kThreads) + item % tiles) * kThreads;
    const int64_t row = item / tiles * kSbpRows, coordinate = tile + thread;
    T totals[kSbpRows] = {};
    for (int64_t first = 0; first < s; first += length) {
      const int64_t t = first + thread / vectors;
      __syncthreads();  // the meetings before have been read
      if (t < s) {
        meetings[thread] =
            met_by_coordinates(projection, length, tile + thread % vectors * length, t);
      }
      __syncthreads();
      if (!x.holds(coordinate)) continue;
      for (int n = 0; n < length && first + n < s; ++n) {
        const Meeting meeting = meetings[n * vectors + thread / length];
        const int lane = thread % length;
        const bool negative = meeting.signs >> lane & 1;
        const T* from = y + meeting.other + (lane ^ meeting.flip);
        for (int r = 0; r < kSbpRows; ++r) {
          const T value = row + r < x.rows ? from[(row + r) * k] * scale : T(0);
          totals[r] += negative ? -value : value;
        }
      }
    }
    if (!x.holds(coordinate)) continue;
    for (int r = 0; r < kSbpRows && row + r < x.rows; ++r) {
      *x.at(row + r, coordinate) = totals[r];
    }
  }
}

constexpr int kRotationTile = 4096;  // a multiple of every hadamard_length
constexpr int64_t kRotationRows = 4;

// Signs, then the Walsh-Hadamard matrix; with kAdjoint the other way round. `out` or `in` consists of
// whole blocks, and so of whole runs; what the other one lacks of them is zero, or not wanted.
template <bool kAdjoint, typename From, typename T>
__global__ void __launch_bounds__(kThreads)
    rotate_kernel(Projection projection, Slab<const From> in, Slab<T> out) {
  __shared__ T values[kRotationTile];
  __shared__ uint16_t signs[kRotationTile];
  const int64_t q = segment_of(projection);
  const auto length = static_cast<int>(vector_length(q));
  const auto run = static_cast<int>(hadamard_length(q));
  const int thread = static_cast<int>(threadIdx.x);
  const auto negative = [&](int e) { return signs[e / length] >> e % length & 1; };
  const int64_t tiles = out.stretches(kRotationTile), groups = divide_up(out.rows, kRotationRows);
  for (int64_t item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
    const int64_t tile = (out.first_stretch(kRotationTile) + item % tiles) * kRotationTile;
    __syncthreads();  // the signs and the last row before have been read
    for (int e = thread; e < kRotationTile / length; e += kThreads) {
      const int64_t coordinate = tile + int64_t{e} * length;
      signs[e] = vector_signs(projection.seed, coordinate / q, kHadamardReplicate, coordinate % q);
    }
    __syncthreads();
    const int64_t first_row = item / tiles * kRotationRows;
    for (int64_t row = first_row; row < first_row + kRotationRows && row < out.rows; ++row) {
      for (int e = thread; e < kRotationTile; e += kThreads) {  // the thread's own, until a barrier
        const T value = in.template value_or_zero<T>(row, tile + e);
        values[e] = !kAdjoint && negative(e) ? -value : value;
      }
      for (int half = 1; half < run; half *= 2) {
        __syncthreads();
        for (int pair = thread; pair < kRotationTile / 2; pair += kThreads) {
          const int low = pair / half * 2 * half + pair % half;
          const T a = values[low], b = values[low + half];
          values[low] = a + b;
          values[low + half] = a - b;
        }
      }
      __syncthreads();
      for (int e = thread; e < kRotationTile; e += kThreads) {
        if (!out.holds(tile + e)) continue;
        *out.at(row, tile + e) = kAdjoint && negative(e) ? -values[e] : values[e];
      }
    }
  }
}

// ---- sjlt ------------------------------------------------------------------------------------

constexpr int kSjltChunk = 2048;     // coordinates that are sorted at once; a power of two
constexpr int64_t kSjltRows = 32;    // they share a sort
constexpr int kSjltAdjointRows = 8;  // they share what is drawn

// In place, ascending, by the whole block (Batcher's bitonic sort). Leaves with a barrier.
__device__ void sort_keys(uint64_t (&keys)[kSjltChunk]) {
  for (int size = 2; size <= kSjltChunk; size *= 2) {
    for (int half = size / 2; half > 0; half /= 2) {
      for (int pair = static_cast<int>(threadIdx.x); pair < kSjltChunk / 2; pair += kThreads) {
        const int low = pair / half * 2 * half + pair % half;
        const bool ascending = (low & size) == 0;
        const uint64_t a = keys[low], b = keys[low + half];
        if ((a > b) == ascending) {
          keys[low] = b;
          keys[low + half] = a;
        }
      }
      __syncthreads();
    }
  }
}

// A block owns a segment of the sums of a few rows in one split. It sorts the nonzeros of a chunk of
// coordinates by output; each output's terms are then added by one thread, in their order.
template <typename From, typename T>
__global__ void __launch_bounds__(kThreads)
    project_sjlt_kernel(Projection projection, T scale, Slab<const From> x, Sums<T> sums) {
  // The output within the segment, the coordinate within the chunk, and the sign in the last bit.
  __shared__ uint64_t keys[kSjltChunk];
  constexpr uint64_t kNone = ~uint64_t{0};
  const auto output_of = [](uint64_t key) { return static_cast<int64_t>(key / (2 * kSjltChunk)); };
  const int64_t k = projection.k, s = projection.sparsity, q = segment_of(projection);
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t groups = divide_up(x.rows, kSjltRows);
  for (int64_t item = blockIdx.x; item < s * groups * sums.splits; item += gridDim.x) {
    const int64_t t = item % s, split = item / s / groups;
    const int64_t first_row = item / s % groups * kSjltRows;
    const int64_t rows = x.rows - first_row < kSjltRows ? x.rows - first_row : kSjltRows;
    T* segment = sums.of(split) + first_row * k + t * q;
    for (int64_t e = split ? thread : rows * q; e < rows * q; e += kThreads) {
      segment[e / q * k + e % q] = T(0);
    }
    for (int64_t chunk = sums.begin(split); chunk < sums.end(split); ++chunk) {
      const int64_t first = x.begin + chunk * kSjltChunk;
      __syncthreads();  // the sums and keys of the chunk before are complete
      for (int c = thread; c < kSjltChunk; c += kThreads) {
        keys[c] = kNone;
        if (!x.holds(first + c)) continue;
        const Words random = sjlt_words(projection.seed, first + c, t);
        const Nonzero nonzero = nonzero_of(word_of(random, static_cast<int>(t % 4)), q);
        keys[c] = (uint64_t{nonzero.output} * kSjltChunk + static_cast<uint64_t>(c)) * 2 +
                  (nonzero.negative ? 1 : 0);
      }
      __syncthreads();
      sort_keys(keys);
      for (int e = thread; e < kSjltChunk; e += kThreads) {
        if (keys[e] == kNone) continue;
        const int64_t output = output_of(keys[e]);
        if (e > 0 && output_of(keys[e - 1]) == output) continue;  // another thread's
        for (int64_t r = 0; r < rows; ++r) {
          T sum = segment[r * k + output];
          for (int n = e; n < kSjltChunk && keys[n] != kNone && output_of(keys[n]) == output; ++n) {
            const auto c = static_cast<int64_t>(keys[n] / 2 % kSjltChunk);
            const T value = static_cast<T>(load(x.at(first_row + r, first + c)));
            sum += value * (keys[n] & 1 ? -scale : scale);
          }
          segment[r * k + output] = sum;
        }
      }
    }
  }
}

// A thread owns a coordinate for a few rows.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    adjoint_sjlt_kernel(Projection projection, T scale, const T* __restrict__ y, Slab<T> x) {
  const int64_t k = projection.k, q = segment_of(projection);
  const int64_t tiles = divide_up(x.count, kThreads), groups = divide_up(x.rows, kSjltAdjointRows);
  for (int64_t item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
    const int64_t coordinate = x.begin + item % tiles * kThreads + threadIdx.x;
    const int64_t row = item / tiles * kSjltAdjointRows;
    if (!x.holds(coordinate)) continue;
    T totals[kSjltAdjointRows] = {};
    Words random = {};
    for (int64_t t = 0; t < projection.sparsity; ++t) {
      if (t % 4 == 0) random = sjlt_words(projection.seed, coordinate, t);
      const Nonzero nonzero = nonzero_of(word_of(random, static_cast<int>(t % 4)), q);
      const T value = nonzero.negative ? -scale : scale;
      const T* from = y + t * q + nonzero.output;
      for (int r = 0; r < kSjltAdjointRows && row + r < x.rows; ++r) {
        totals[r] += from[(row + r) * k] * value;
      }
    }
    for (int r = 0; r < kSjltAdjointRows && row + r < x.rows; ++r) {
      *x.at(row + r, coordinate) = totals[r];
    }
  }
}

// ---- dense kinds -----------------------------------------------------------------------------

// A block multiplies tiles of rows by tiles of P that it draws, 32 deep and 64 wide; a thread owns
// 4 columns of kPerThread rows. Rows are padded by one against bank conflicts.
constexpr int kDepth = 32;
constexpr int kColumns = 64;
constexpr int kSide = 16;  // 16 x 16 threads
constexpr int kThreadColumns = kColumns / kSide;

template <typename T, int kPerThread>
struct DenseTile {
  static constexpr int kRows = kSide * kPerThread;

  T rows[kDepth][kRows + 1];
  T entries[kDepth][kColumns + 1];

  __device__ void multiply(T (&sums)[kPerThread][kThreadColumns]) const {
    const int column = static_cast<int>(threadIdx.x) % kSide;
    const int row = static_cast<int>(threadIdx.x) / kSide;
    for (int d = 0; d < kDepth; ++d) {
      for (int r = 0; r < kPerThread; ++r) {
        const T value = rows[d][row + r * kSide];
        for (int c = 0; c < kThreadColumns; ++c) {
          sums[r][c] = fma(value, entries[d][column + c * kSide], sums[r][c]);
        }
      }
    }
  }

  // Calls body(row, column, sum) for the sums of this thread.
  template <typename Body>
  __device__ static void for_each(const T (&sums)[kPerThread][kThreadColumns], const Body& body) {
    const int column = static_cast<int>(threadIdx.x) % kSide;
    const int row = static_cast<int>(threadIdx.x) / kSide;
    for (int r = 0; r < kPerThread; ++r) {
      for (int c = 0; c < kThreadColumns; ++c) {
        body(row + r * kSide, column + c * kSide, sums[r][c]);
      }
    }
  }
};

// Calls set(j, entry) for the coordinates j = 8 m + 2 q and its neighbour, m in `first` to
// `first + 4`, of a block of 128; `word` is word q of an output.
template <typename Set>
__device__ void for_signs(uint32_t word, int q, int first, const Set& set) {
  for (int m = first; m < first + 4; ++m) {
    for (int n = 0; n < 2; ++n) {
      const int j = 8 * m + 2 * q + n;
      set(j, word >> sign_bit(j) & 1 ? -1 : 1);
    }
  }
}

template <typename From, typename T, int kPerThread>
__global__ void __launch_bounds__(kThreads)
    project_dense_kernel(Projection projection, T scale, Slab<const From> x, Sums<T> sums) {
  using Tile = DenseTile<T, kPerThread>;
  __shared__ Tile tile;
  const int64_t k = projection.k;
  const bool gaussian = projection.kind == Kind::kGaussian;
  const int thread = static_cast<int>(threadIdx.x);
  const int column = thread % kColumns, q = thread / kColumns;  // each of 4 words of 64 outputs
  const int64_t column_tiles = divide_up(k, kColumns), row_tiles = divide_up(x.rows, Tile::kRows);
  for (int64_t item = blockIdx.x; item < column_tiles * row_tiles * sums.splits;
       item += gridDim.x) {
    const int64_t output = item % column_tiles * kColumns;
    const int64_t row = item / column_tiles % row_tiles * Tile::kRows;
    const int64_t split = item / column_tiles / row_tiles;
    T totals[kPerThread][kThreadColumns] = {};
    for (int64_t block = sums.begin(split); block < sums.end(split); ++block) {
      uint32_t word = 0;
      if (!gaussian) word = word_of(rademacher_words(projection.seed, block, output + column), q);
      for (int part = 0; part < kSignBlock / kDepth; ++part) {
        const int64_t first = block * kSignBlock + part * kDepth;
        __syncthreads();  // the tile before has been read
        for (int e = thread; e < kDepth * Tile::kRows; e += kThreads) {
          const int d = e % kDepth, r = e / kDepth;
          tile.rows[d][r] = x.template value_or_zero<T>(row + r, first + d);
        }
        if (gaussian) {
          for (int quad = q; quad < kDepth / 4; quad += kThreads / kColumns) {
            float normals[4];
            gaussian_quad(projection.seed, first / 4 + quad, output + column, normals);
            for (int j = 0; j < 4; ++j) tile.entries[4 * quad + j][column] = normals[j];
          }
        } else {
          for_signs(word, q, 4 * part, [&](int j, int sign) {
            tile.entries[j - part * kDepth][column] = static_cast<T>(sign);
          });
        }
        __syncthreads();
        tile.multiply(totals);
      }
    }
    Tile::for_each(totals, [&](int r, int c, T sum) {
      if (row + r < x.rows && output + c < k) sums.add(split, row + r, output + c, sum * scale);
    });
  }
}

template <typename T, int kPerThread>
__global__ void __launch_bounds__(kThreads)
    adjoint_dense_kernel(Projection projection, T scale, const T* __restrict__ y, Slab<T> x) {
  using Tile = DenseTile<T, kPerThread>;
  static_assert(kSignBlock == 2 * kColumns, "a tile is one half of a block of signs");
  __shared__ Tile tile;
  const int64_t k = projection.k;
  const int thread = static_cast<int>(threadIdx.x);
  const int depth = thread % kDepth, part = thread / kDepth;  // each of 8 parts of 32 outputs
  const int64_t column_tiles = x.stretches(kColumns), row_tiles = divide_up(x.rows, Tile::kRows);
  for (int64_t item = blockIdx.x; item < column_tiles * row_tiles; item += gridDim.x) {
    const int64_t first = (x.first_stretch(kColumns) + item % column_tiles) * kColumns;
    const int64_t row = item / column_tiles * Tile::kRows;
    const auto half = static_cast<int>(first % kSignBlock);  // where the tile starts in its block
    T totals[kPerThread][kThreadColumns] = {};
    for (int64_t output = 0; output < k; output += kDepth) {
      __syncthreads();  // the tile before has been read
      for (int e = thread; e < kDepth * Tile::kRows; e += kThreads) {
        const int d = e % kDepth, r = e / kDepth;
        const bool inside = row + r < x.rows && output + d < k;
        tile.rows[d][r] = inside ? y[(row + r) * k + output + d] : T(0);
      }
      if (projection.kind == Kind::kGaussian) {
        for (int quad = part; quad < kColumns / 4; quad += kThreads / kDepth) {
          float normals[4];
          gaussian_quad(projection.seed, first / 4 + quad, output + depth, normals);
          for (int j = 0; j < 4; ++j) tile.entries[depth][4 * quad + j] = normals[j];
        }
      } else {
        const int q = part % 4;
        const Words random = rademacher_words(projection.seed, first / kSignBlock, output + depth);
        for_signs(word_of(random, q), q, half / 8 + part / 4 * 4,
                  [&](int j, int sign) { tile.entries[depth][j - half] = static_cast<T>(sign); });
      }
      __syncthreads();
      tile.multiply(totals);
    }
    Tile::for_each(totals, [&](int r, int c, T sum) {
      if (row + r < x.rows && x.holds(first + c)) *x.at(row + r, first + c) = sum * scale;
    });
  }
}

// ---- all kinds -------------------------------------------------------------------------------

// The largest rotated part of x, in values: it then stays in the cache between two kernels. One
// block of each row is the least.
constexpr int64_t kRotated = int64_t{1} << 22;

int64_t rotated_blocks(const Projection& projection, int64_t b, int64_t p) {
  const int64_t q = segment_of(projection);
  return std::clamp<int64_t>(kRotated / (b * q), 1, p / q + 2);
}

// y and its partial sums, for coordinates `begin` to `begin + p`; a function of shapes alone.
template <typename T>
Sums<T> sums_of(const Projection& projection, int64_t begin, int64_t b, int64_t p, T* y,
                T* partials) {
  constexpr int64_t kEnoughBlocks = 1024;  // several per multiprocessor of any GPU
  const int64_t k = projection.k, q = segment_of(projection);
  Sums<T> sums = {};
  sums.y = y, sums.partials = partials, sums.rows = b, sums.k = k;
  int64_t unit = q, blocks = 0;
  switch (projection.kind) {
    case Kind::kSbp: blocks = divide_up(divide_up(k, kThreads) * divide_up(b, kSbpRows), 2); break;
    case Kind::kSjlt:
      unit = kSjltChunk;
      begin = 0;  // chunks start where x does
      blocks = projection.sparsity * divide_up(b, kSjltRows);
      break;
    case Kind::kRademacher:
      unit = kSignBlock;
      blocks = divide_up(divide_up(k, kTensorColumns) * divide_up(b, kTensorRows), 2);
      break;
    default: unit = kSignBlock; blocks = divide_up(k, kColumns) * divide_up(b, 4 * kSide);
  }
  sums.first_unit = begin / unit;
  sums.units = divide_up(begin + p, unit) - sums.first_unit;
  // Partial sums stay small beside the input.
  const int64_t splits = std::clamp<int64_t>(p / (16 * k), 1, divide_up(kEnoughBlocks, blocks));
  sums.units_per_split = divide_up(sums.units, splits);
  sums.splits = divide_up(sums.units, sums.units_per_split);
  return sums;
}

template <typename T>
T scale_of_values(const Projection& projection) {
  const double run =
      projection.hadamard ? static_cast<double>(hadamard_length(segment_of(projection))) : 1.0;
  return static_cast<T>(scale_of(projection) / (projection.hadamard ? sqrt(run) : 1.0));
}

// In float32, on the tensor cores.
template <typename From>
cudaError_t project_rademacher(const Projection& projection, float scale, Slab<const From> x,
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

template <typename From>
cudaError_t project_sixteen(const Projection& projection, float scale, Slab<const From> x,
                            Sums<float> sums, cudaStream_t stream) {
  const SbpLayout layout(x.rows);
  return launch_over(
      divide_up(sums.k, layout.width()) * divide_up(x.rows, layout.rows()) * sums.splits, stream,
      project_sixteen_kernel<From>, projection, scale, x, sums,
      is_wide(x.values, x.stride, x.begin));
}

cudaError_t adjoint_sixteen(const Projection& projection, float scale, const float* y,
                            Slab<float> x, cudaStream_t stream) {
  const SbpLayout layout(x.rows);
  return launch_over(x.stretches(layout.width() * kTilesPerItem) * divide_up(x.rows, layout.rows()),
                     stream, adjoint_sixteen_kernel, projection, scale, y, is_wide(y, projection.k),
                     x, is_wide(x.values, x.stride, x.begin));
}

template <typename T>
bool of_sixteen(const Projection& projection) {
  return std::is_same_v<T, float> && vector_length(segment_of(projection)) == kSixteen;
}

// All but the rotation.
template <typename From, typename T>
cudaError_t project_slab(const Projection& projection, Slab<const From> x, T* y, T* partials,
                         cudaStream_t stream) {
  const int64_t k = projection.k, b = x.rows;
  const Sums<T> sums = sums_of(projection, x.begin, b, x.count, y, partials);
  const T scale = scale_of_values<T>(projection);
  cudaError_t status = cudaSuccess;
  if (projection.kind == Kind::kSbp && of_sixteen<T>(projection)) {
    if constexpr (std::is_same_v<T, float>) {
      status = project_sixteen(projection, scale, x, sums, stream);
    }
  } else if (projection.kind == Kind::kSbp) {
    status = launch_over(divide_up(k, kThreads) * divide_up(b, kSbpRows) * sums.splits, stream,
                         project_sbp_kernel<From, T>, projection, scale, x, sums);
  } else if (projection.kind == Kind::kSjlt) {
    status = launch_over(projection.sparsity * divide_up(b, kSjltRows) * sums.splits, stream,
                         project_sjlt_kernel<From, T>, projection, scale, x, sums);
  } else if (std::is_same_v<T, float> && projection.kind == Kind::kRademacher) {
    if constexpr (std::is_same_v<T, float>) {
      status = project_rademacher(projection, scale, x, sums, stream);
    }
  } else if (b <= kSide) {
    status = launch_over(divide_up(k, kColumns) * sums.splits, stream,
                         project_dense_kernel<From, T, 1>, projection, scale, x, sums);
  } else {
    status = launch_over(divide_up(k, kColumns) * divide_up(b, 4 * kSide) * sums.splits, stream,
                         project_dense_kernel<From, T, 4>, projection, scale, x, sums);
  }
  if (status != cudaSuccess || sums.splits == 1) return status;
  return launch_over(divide_up(b * k, kThreads), stream, add_partials_kernel<T>, sums);
}

template <typename T>
cudaError_t adjoint_slab(const Projection& projection, const T* y, Slab<T> x, cudaStream_t stream) {
  const T scale = scale_of_values<T>(projection);
  const int64_t b = x.rows;
  switch (projection.kind) {
    case Kind::kSbp:
      if constexpr (std::is_same_v<T, float>) {
        if (of_sixteen<T>(projection)) return adjoint_sixteen(projection, scale, y, x, stream);
      }
      return launch_over(x.stretches(kThreads) * divide_up(b, kSbpRows), stream,
                         adjoint_sbp_kernel<T>, projection, scale, y, x);
    case Kind::kSjlt:
      return launch_over(divide_up(x.count, kThreads) * divide_up(b, kSjltAdjointRows), stream,
                         adjoint_sjlt_kernel<T>, projection, scale, y, x);
    default:
      if (b <= kSide) {
        return launch_over(x.stretches(kColumns), stream, adjoint_dense_kernel<T, 1>, projection,
                           scale, y, x);
      }
      return launch_over(x.stretches(kColumns) * divide_up(b, 4 * kSide), stream,
                         adjoint_dense_kernel<T, 4>, projection, scale, y, x);
  }
}

// Calls body with whole blocks of rotated coordinates, a few at a time, until they cover
// `begin` to `begin + p` or an error occurs.
template <typename T, typename Body>
cudaError_t for_rotated(const Projection& projection, int64_t begin, int64_t b, int64_t p,
                        T* rotated, const Body& body) {
  const int64_t q = segment_of(projection), blocks = rotated_blocks(projection, b, p);
  const int64_t end = divide_up(begin + p, q);
  for (int64_t first = begin / q; first < end; first += blocks) {
    const int64_t count = std::min(blocks, end - first) * q;
    const cudaError_t status = body(Slab<T>{rotated, count, b, first * q, count});
    if (status != cudaSuccess) return status;
  }
  return cudaSuccess;
}

template <typename T>
Slab<const T> as_const(const Slab<T>& slab) {
  return {slab.values, slab.stride, slab.rows, slab.begin, slab.count};
}

template <typename T>
int64_t rotation_work(const Slab<T>& out) {
  return out.stretches(kRotationTile) * divide_up(out.rows, kRotationRows);
}

int64_t rotated_size(const Projection& projection, int64_t b, int64_t p) {
  return projection.hadamard ? rotated_blocks(projection, b, p) * segment_of(projection) * b : 0;
}

}  // namespace

int64_t project_adjoint_scratch(const Projection& projection, int64_t b, int64_t p) {
  return rotated_size(projection, b, p);
}

int64_t project_scratch(const Projection& projection, int64_t offset, int64_t b, int64_t p) {
  const auto partials = [&](int64_t begin, int64_t count) {
    const Sums<float> sums = sums_of<float>(projection, begin, b, count, nullptr, nullptr);
    return (sums.splits - 1) * b * projection.k;
  };
  int64_t most = 0;
  if (!projection.hadamard) {
    most = partials(offset, p);
  } else {
    for_rotated<float>(projection, offset, b, p, nullptr, [&](const Slab<float>& rotated) {
      most = std::max(most, partials(rotated.begin, rotated.count));
      return cudaSuccess;
    });
  }
  return rotated_size(projection, b, p) + most;
}

template <typename From, typename T>
cudaError_t launch_project(const Projection& projection, int64_t offset, const From* x,
                           int64_t x_stride, int64_t b, int64_t p, T* scratch, T* y,
                           cudaStream_t stream) {
  const Slab<const From> slab = {x, x_stride, b, offset, p};
  T* partials = scratch + rotated_size(projection, b, p);
  if (!projection.hadamard) return project_slab<From, T>(projection, slab, y, partials, stream);
  return for_rotated(projection, offset, b, p, scratch, [&](const Slab<T>& rotated) {
    const cudaError_t status = launch_over(
        rotation_work(rotated), stream, rotate_kernel<false, From, T>, projection, slab, rotated);
    if (status != cudaSuccess) return status;
    return project_slab<T, T>(projection, as_const(rotated), y, partials, stream);
  });
}

template <typename T>
cudaError_t launch_project_adjoint(const Projection& projection, int64_t offset, const T* y,
                                   int64_t b, int64_t p, T* scratch, T* x, cudaStream_t stream) {
  const Slab<T> slab = {x, p, b, offset, p};
  if (!projection.hadamard) return adjoint_slab(projection, y, slab, stream);
  return for_rotated(projection, offset, b, p, scratch, [&](const Slab<T>& rotated) {
    const cudaError_t status = adjoint_slab(projection, y, rotated, stream);
    if (status != cudaSuccess) return status;
    // Only the part of x that these blocks cover.
    const int64_t begin = std::max(offset, rotated.begin);
    const int64_t end = std::min(offset + p, rotated.begin + rotated.count);
    const Slab<T> out = {x + (begin - offset), p, b, begin, end - begin};
    return launch_over(rotation_work(out), stream, rotate_kernel<true, T, T>, projection,
                       as_const(rotated), out);
  });
}

#define KSM_INSTANTIATE_PROJECT(From, T)                                                         \
  template cudaError_t launch_project(const Projection&, int64_t, const From*, int64_t, int64_t, \
                                      int64_t, T*, T*, cudaStream_t);
KSM_INSTANTIATE_PROJECT(float, float)
KSM_INSTANTIATE_PROJECT(__nv_bfloat16, float)
KSM_INSTANTIATE_PROJECT(__half, float)
KSM_INSTANTIATE_PROJECT(double, double)
#undef KSM_INSTANTIATE_PROJECT

template cudaError_t launch_project_adjoint(const Projection&, int64_t, const float*, int64_t,
                                            int64_t, float*, float*, cudaStream_t);
template cudaError_t launch_project_adjoint(const Projection&, int64_t, const double*, int64_t,
                                            int64_t, double*, double*, cudaStream_t);

}  // namespace ksm
