// Products with dense signs and normals on CUDA, drawn a tile at a time; signs in float32 have a faster
// way in project_rademacher.cu.
#include <type_traits>

#include "cuda/project_kinds.cuh"

namespace ksm {
namespace {

// A block multiplies tiles of rows by tiles of P that it draws, 32 deep and 64 wide; a thread owns 4
// columns of kPerThread rows, side by side: it reads up to 16 bytes of each at once.
constexpr int kDepth = 32;
constexpr int kColumns = 64;
constexpr int kSide = 16;  // 16 x 16 threads
constexpr int kThreadColumns = kColumns / kSide;

// Of a multiprocessor: as many as have registers without spilling.
template <typename T, int kPerThread>
constexpr int kBlocks = (sizeof(T) == 4 ? 3 : 2) + (kPerThread == 1);

// Neighbours in shared memory.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T) < 16 ? kCount * sizeof(T) : 16) Neighbours {
  T values[kCount];
};

template <typename T, int kPerThread>
struct DenseTile {
  static constexpr int kRows = kSide * kPerThread;
  static constexpr int kPadding = 16 / sizeof(T);  // against bank conflicts

  alignas(16) T rows[kDepth][kRows + kPadding];
  alignas(16) T entries[kDepth][kColumns + kPadding];

  __device__ void multiply(T (&sums)[kPerThread][kThreadColumns]) const {
    for (int d = 0; d < kDepth; ++d) {
      const auto& own = *reinterpret_cast<const Neighbours<T, kPerThread>*>(&rows[d][own_row()]);
      const auto& drawn =
          *reinterpret_cast<const Neighbours<T, kThreadColumns>*>(&entries[d][own_column()]);
      for (int r = 0; r < kPerThread; ++r) {
        for (int c = 0; c < kThreadColumns; ++c) {
          sums[r][c] = fma(own.values[r], drawn.values[c], sums[r][c]);
        }
      }
    }
  }

  // Calls body(row, column, sum) for the sums of this thread.
  template <typename Body>
  __device__ static void for_each(const T (&sums)[kPerThread][kThreadColumns], const Body& body) {
    for (int r = 0; r < kPerThread; ++r) {
      for (int c = 0; c < kThreadColumns; ++c) body(own_row() + r, own_column() + c, sums[r][c]);
    }
  }

  static __device__ int own_row() { return static_cast<int>(threadIdx.x) / kSide * kPerThread; }
  static __device__ int own_column() {
    return static_cast<int>(threadIdx.x) % kSide * kThreadColumns;
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
__global__ void __launch_bounds__(kThreads, kBlocks<T, kPerThread>)
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
#pragma unroll 1  // two at once would take twice the registers
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
__global__ void __launch_bounds__(kThreads, kBlocks<T, kPerThread>)
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
#pragma unroll 1
        for (int quad = part; quad < kColumns / 4; quad += kThreads / kDepth) {
          float normals[4];
          gaussian_quad(projection.seed, first / 4 + quad, output + depth, normals);
          Neighbours<T, 4> four;
          for (int j = 0; j < 4; ++j) four.values[j] = normals[j];
          *reinterpret_cast<Neighbours<T, 4>*>(&tile.entries[depth][4 * quad]) = four;
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

}  // namespace

Cut dense_cut(const Projection& projection, int64_t rows) {
  return {kSignBlock, divide_up(projection.k, kColumns) * divide_up(rows, 4 * kSide)};
}

namespace {

// Calls launch_tiles(rows per thread, a constant) with as few as tiles of `rows` rows need: what is
// drawn is drawn for a tile, and rows beyond the last are multiplied in vain.
template <typename Launch>
cudaError_t for_tiles_of(int64_t rows, const Launch& launch_tiles) {
  if (rows <= kSide) return launch_tiles(std::integral_constant<int, 1>());
  if (rows <= 2 * kSide) return launch_tiles(std::integral_constant<int, 2>());
  return launch_tiles(std::integral_constant<int, 4>());
}

}  // namespace

template <typename From, typename T>
cudaError_t launch_dense(const Projection& projection, T scale, Slab<const From> x, Sums<T> sums,
                         cudaStream_t stream) {
  return for_tiles_of(x.rows, [&](auto per_thread) {
    constexpr int kPerThread = decltype(per_thread)::value;
    const int64_t row_tiles = divide_up(x.rows, kPerThread * kSide);
    return launch_over(divide_up(sums.k, kColumns) * row_tiles * sums.splits, stream,
                       project_dense_kernel<From, T, kPerThread>, projection, scale, x, sums);
  });
}

template <typename T>
cudaError_t launch_dense_adjoint(const Projection& projection, T scale, const T* y, Slab<T> x,
                                 cudaStream_t stream) {
  return for_tiles_of(x.rows, [&](auto per_thread) {
    constexpr int kPerThread = decltype(per_thread)::value;
    return launch_over(x.stretches(kColumns) * divide_up(x.rows, kPerThread * kSide), stream,
                       adjoint_dense_kernel<T, kPerThread>, projection, scale, y, x);
  });
}

#define KSM_INSTANTIATE(From, T) \
  template cudaError_t launch_dense(const Projection&, T, Slab<const From>, Sums<T>, cudaStream_t);
KSM_FOR_PROJECTED_TYPES(KSM_INSTANTIATE)
#undef KSM_INSTANTIATE

template cudaError_t launch_dense_adjoint(const Projection&, float, const float*, Slab<float>,
                                          cudaStream_t);
template cudaError_t launch_dense_adjoint(const Projection&, double, const double*, Slab<double>,
                                          cudaStream_t);

}  // namespace ksm
