// Signed block permutations on CUDA: vectors of coordinates meet vectors of outputs.
#include <type_traits>

#include "cuda/intrinsics.cuh"
#include "cuda/neighbours.cuh"
#include "cuda/project_kinds.cuh"

namespace ksm {
namespace {

// ---- what meets what ---------------------------------------------------------------------------

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

// ---- vectors of sixteen in float32 ------------------------------------------------------------

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

// Writes what lies in the slab of a thread's rows; `wide`: they are aligned.
__device__ void store_rows(const Totals& totals, const Slab<float>& x, int64_t row,
                           int64_t coordinate, bool wide) {
  const int64_t at = coordinate - x.begin;
  const int rows = own_rows(x, row);
  float* to = x.values + row * x.stride + at;
  if (wide && at >= 0 && at + 4 <= x.count) {
#pragma unroll
    for (int r = 0; r < kSbpRows; ++r, to += x.stride) {
      if (r < rows) store_four(to, totals[r]);
    }
    return;
  }
#pragma unroll
  for (int r = 0; r < kSbpRows; ++r, to += x.stride) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (r < rows && at + e >= 0 && at + e < x.count) to[e] = totals[r][e];
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
    int64_t segment = 0, coordinate = tile * width + 4 * beside;
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
        store_rows(totals, x, row, coordinate, x_wide);
        coordinate += width;
#pragma unroll
        for (int r = 0; r < kSbpRows; ++r) {
#pragma unroll
          for (int e = 0; e < 4; ++e) totals[r][e] = 0;
        }
      }
    }
  }
}

// ---- any vectors ------------------------------------------------------------------------------

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

// ---- the rotation before them ------------------------------------------------------------------

constexpr int kRotationTile = kThreads * kSixteen;  // a multiple of every hadamard_length
constexpr int64_t kRotationRows = 8;                // they share what is drawn

// The signs before the rotation of sixteen coordinates, a bit for each.
__device__ uint16_t rotation_signs(const Projection& projection, int length, int64_t coordinate) {
  const int64_t q = segment_of(projection);
  uint32_t signs = 0;
  for (int lane = 0; lane < kSixteen; lane += length) {
    const int64_t at = coordinate + lane;
    const uint32_t drawn = vector_signs(projection.seed, at / q, kHadamardReplicate, at % q);
    signs |= (drawn & ((1u << length) - 1)) << lane;
  }
  return static_cast<uint16_t>(signs);
}

// Sixteen values of a tile of 4096 that differ in one digit of their number, of base 16.
template <typename T>
struct RotatedValues {
  T values[kSixteen];

  // Where value e of a tile lies in shared memory: padded, so that neither digit's values of the threads
  // of a warp meet in a bank.
  static constexpr int kSize = kRotationTile + kRotationTile / 16 * 4 + kRotationTile / 256 * 16;
  static __device__ int place(int e) { return e + e / 16 * 4 + e / 256 * 16; }
  // The number of this thread's value i where digit 0, 1 or 2 varies.
  static __device__ int number(int digit, int i) {
    const int thread = static_cast<int>(threadIdx.x), low = thread % 16, high = thread / 16;
    return digit == 0 ? 16 * thread + i : digit == 1 ? 256 * high + 16 * i + low : 256 * i + thread;
  }

  // The stages of runs of `run` values in which one digit varies.
  __device__ void rotate(int digit, int run) {
#pragma unroll
    for (int apart = 1; apart < kSixteen; apart *= 2) {
      if (apart << 4 * digit >= run) break;
#pragma unroll
      for (int i = 0; i < kSixteen; ++i) {
        if (i & apart) continue;
        const T a = values[i], b = values[i + apart];
        values[i] = a + b;
        values[i + apart] = a - b;
      }
    }
  }
  // Changes the digit that varies, through shared memory.
  __device__ void exchange(int from, int to, T* shared) {
    __syncthreads();  // what lies there has been read
#pragma unroll
    for (int i = 0; i < kSixteen; ++i) shared[place(number(from, i))] = values[i];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kSixteen; ++i) values[i] = shared[place(number(to, i))];
  }
  // Values whose bit is set change their sign.
  __device__ void negate(uint32_t bits) {
#pragma unroll
    for (int i = 0; i < kSixteen; ++i) values[i] = bits >> i & 1 ? -values[i] : values[i];
  }
};

// Sixteen neighbours of a row, zero outside of the slab; `wide`: its rows are aligned.
template <typename From, typename T>
__device__ void load_sixteen(const Slab<const From>& x, int64_t row, int64_t coordinate, bool wide,
                             T (&values)[kSixteen]) {
  const int64_t at = coordinate - x.begin;
  if constexpr (!std::is_same_v<From, double>) {
    if (wide && at >= 0 && at + kSixteen <= x.count) {
      const auto* from = reinterpret_cast<const Four<From>*>(x.values + row * x.stride + at);
#pragma unroll
      for (int n = 0; n < kSixteen / 4; ++n) {
        const Four<From> four = from[n];
#pragma unroll
        for (int e = 0; e < 4; ++e) values[4 * n + e] = four[e];
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kSixteen; ++i) values[i] = x.template value_or_zero<T>(row, coordinate + i);
}

// Signs, then the Walsh-Hadamard matrix; with kAdjoint the other way round. `out` or `in` consists of
// whole blocks, and so of whole runs; what the other one lacks of them is zero, or not wanted. Three
// times a thread adds and subtracts sixteen values in registers, four stages at once.
template <bool kAdjoint, typename From, typename T>
__global__ void __launch_bounds__(kThreads, kAdjoint && sizeof(T) == 8 ? 1 : 2)
    rotate_kernel(Projection projection, Slab<const From> in, Slab<T> out, bool wide) {
  using Values = RotatedValues<T>;
  __shared__ T shared[Values::kSize];
  __shared__ uint16_t signs[kThreads];
  const int64_t q = segment_of(projection);
  const auto length = static_cast<int>(vector_length(q));
  const auto run = static_cast<int>(hadamard_length(q));
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t tiles = out.stretches(kRotationTile), groups = divide_up(out.rows, kRotationRows);
  for (int64_t item = blockIdx.x; item < tiles * groups; item += gridDim.x) {
    const int64_t tile = (out.first_stretch(kRotationTile) + item % tiles) * kRotationTile;
    const int64_t own = tile + kSixteen * thread;
    uint32_t negative = rotation_signs(projection, length, own);
    if (kAdjoint) {
      __syncthreads();  // the signs before have been read
      signs[thread] = static_cast<uint16_t>(negative);
      __syncthreads();
      negative = 0;
#pragma unroll
      for (int i = 0; i < kSixteen; ++i) {
        const int e = Values::number(2, i);
        negative |= (uint32_t{signs[e / 16]} >> e % 16 & 1) << i;
      }
    }
    const int64_t first_row = item / tiles * kRotationRows;
    for (int64_t row = first_row; row < first_row + kRotationRows && row < out.rows; ++row) {
      Values own_values;
      load_sixteen(in, row, own, wide, own_values.values);
      if (!kAdjoint) own_values.negate(negative);
      own_values.rotate(0, run);
      own_values.exchange(0, 1, shared);
      own_values.rotate(1, run);
      own_values.exchange(1, 2, shared);
      own_values.rotate(2, run);
      if (kAdjoint) own_values.negate(negative);
      T* to = out.at(row, tile);
#pragma unroll
      for (int i = 0; i < kSixteen; ++i) {
        const int e = Values::number(2, i);
        if (out.holds(tile + e)) to[e] = own_values.values[i];
      }
    }
  }
}

bool of_sixteen(const Projection& projection) {
  return vector_length(segment_of(projection)) == kSixteen;
}

}  // namespace

Cut sbp_cut(const Projection& projection, int64_t rows) {
  return {segment_of(projection),
          divide_up(divide_up(projection.k, kThreads) * divide_up(rows, kSbpRows), 2)};
}

template <typename From, typename T>
cudaError_t launch_sbp(const Projection& projection, T scale, Slab<const From> x, Sums<T> sums,
                       cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (of_sixteen(projection)) {
      const SbpLayout layout(x.rows);
      return launch_over(
          divide_up(sums.k, layout.width()) * divide_up(x.rows, layout.rows()) * sums.splits,
          stream, project_sixteen_kernel<From>, projection, scale, x, sums,
          is_wide(x.values, x.stride, x.begin));
    }
  }
  return launch_over(divide_up(sums.k, kThreads) * divide_up(x.rows, kSbpRows) * sums.splits,
                     stream, project_sbp_kernel<From, T>, projection, scale, x, sums);
}

template <typename T>
cudaError_t launch_sbp_adjoint(const Projection& projection, T scale, const T* y, Slab<T> x,
                               cudaStream_t stream) {
  if constexpr (std::is_same_v<T, float>) {
    if (of_sixteen(projection)) {
      const SbpLayout layout(x.rows);
      return launch_over(
          x.stretches(layout.width() * kTilesPerItem) * divide_up(x.rows, layout.rows()), stream,
          adjoint_sixteen_kernel, projection, scale, y, is_wide(y, projection.k), x,
          is_wide(x.values, x.stride, x.begin));
    }
  }
  return launch_over(x.stretches(kThreads) * divide_up(x.rows, kSbpRows), stream,
                     adjoint_sbp_kernel<T>, projection, scale, y, x);
}

template <bool kAdjoint, typename From, typename T>
cudaError_t launch_rotation(const Projection& projection, Slab<const From> in, Slab<T> out,
                            cudaStream_t stream) {
  return launch_over(out.stretches(kRotationTile) * divide_up(out.rows, kRotationRows), stream,
                     rotate_kernel<kAdjoint, From, T>, projection, in, out,
                     is_wide(in.values, in.stride, in.begin));
}

#define KSM_INSTANTIATE(From, T)                                                                  \
  template cudaError_t launch_sbp(const Projection&, T, Slab<const From>, Sums<T>, cudaStream_t); \
  template cudaError_t launch_rotation<false>(const Projection&, Slab<const From>, Slab<T>,       \
                                              cudaStream_t);
KSM_FOR_PROJECTED_TYPES(KSM_INSTANTIATE)
#undef KSM_INSTANTIATE

template cudaError_t launch_sbp_adjoint(const Projection&, float, const float*, Slab<float>,
                                        cudaStream_t);
template cudaError_t launch_sbp_adjoint(const Projection&, double, const double*, Slab<double>,
                                        cudaStream_t);

template cudaError_t launch_rotation<true>(const Projection&, Slab<const float>, Slab<float>,
                                           cudaStream_t);
template cudaError_t launch_rotation<true>(const Projection&, Slab<const double>, Slab<double>,
                                           cudaStream_t);

}  // namespace ksm
