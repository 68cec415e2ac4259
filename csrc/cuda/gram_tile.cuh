// Overlaps of a tile of mask pairs on the tensor cores, which multiply bit matrices: and + popc.
#pragma once

#include "cuda/intrinsics.cuh"
#include "cuda/kernels.h"
#include "cuda/launch.cuh"

namespace ksm {

constexpr int kWarpRows = 4, kWarpColumns = 2;  // a tile is covered as 4 x 2
static_assert(kWarpRows * kWarpColumns == kWarps);
constexpr int kMmaRows = 16, kMmaColumns = 8, kMmaWords = 8;  // one mma: (16, 256) x (256, 8) bits
// A row of staged words is padded from 8 to 12: the 8 rows x 4 words that a warp reads at once lie
// in 32 different banks.
constexpr int kStagedWords = 12;

// A tile of kRows x kColumns pairs, kRowMmas x kColumnMmas matrix products per warp.
template <int kRowMmas, int kColumnMmas>
struct OverlapTile {
  static constexpr int kRows = kWarpRows * kMmaRows * kRowMmas;
  static constexpr int kColumns = kWarpColumns * kMmaColumns * kColumnMmas;

  struct Staging {
    uint32_t x[kRows][kStagedWords];
    uint32_t y[kColumns][kStagedWords];
  };

  int counts[kRowMmas][kColumnMmas][4];  // this thread's share, see for_each_pair

  // Counts the pairs (i0 + r, j0 + c); masks beyond the sets count as empty. All threads call it.
  __device__ void count(const MaskSet& x, int64_t i0, const MaskSet& y, int64_t j0, int64_t n,
                        Staging& staging) {
    const int lane = threadIdx.x % 32, group = lane / 4, word = lane % 4;
#pragma unroll
    for (int p = 0; p < kRowMmas; ++p) {
#pragma unroll
      for (int q = 0; q < kColumnMmas; ++q) {
        counts[p][q][0] = counts[p][q][1] = counts[p][q][2] = counts[p][q][3] = 0;
      }
    }
    const int64_t words = 2 * words_of(n);  // of 32 bits
    for (int64_t first = 0; first < words; first += kMmaWords) {
      __syncthreads();  // the words staged before have been read
      stage<kRows>(x, i0, first, words, staging.x);
      stage<kColumns>(y, j0, first, words, staging.y);
      __syncthreads();
      uint32_t b[kColumnMmas][2];
#pragma unroll
      for (int q = 0; q < kColumnMmas; ++q) {
        const uint32_t* column = staging.y[first_column() + q * kMmaColumns + group];
        b[q][0] = column[word];
        b[q][1] = column[word + 4];
      }
#pragma unroll
      for (int p = 0; p < kRowMmas; ++p) {
        const uint32_t* low = staging.x[first_row() + p * kMmaRows + group];
        const uint32_t* high = low + 8 * kStagedWords;
        const uint32_t a[4] = {low[word], high[word], low[word + 4], high[word + 4]};
#pragma unroll
        for (int q = 0; q < kColumnMmas; ++q) mma_and_popc(counts[p][q], a, b[q]);
      }
    }
  }

  // body(r, c, overlap of (r, c), overlap of (r, c + 1)) for this thread's pairs; c is even.
  template <typename Body>
  __device__ void for_each_pair(const Body& body) const {
    const int lane = threadIdx.x % 32, group = lane / 4, word = lane % 4;
#pragma unroll  // counts must stay in registers
    for (int p = 0; p < kRowMmas; ++p) {
#pragma unroll
      for (int q = 0; q < kColumnMmas; ++q) {
        const int r = first_row() + p * kMmaRows + group;
        const int c = first_column() + q * kMmaColumns + 2 * word;
        body(r, c, counts[p][q][0], counts[p][q][1]);
        body(r + 8, c, counts[p][q][2], counts[p][q][3]);
      }
    }
  }

 private:
  static __device__ int first_row() {
    return threadIdx.x / 32 / kWarpColumns * kMmaRows * kRowMmas;
  }
  static __device__ int first_column() {
    return threadIdx.x / 32 % kWarpColumns * kMmaColumns * kColumnMmas;
  }

  template <int kCount>
  static __device__ void stage(const MaskSet& set, int64_t i0, int64_t first, int64_t words,
                               uint32_t (&staged)[kCount][kStagedWords]) {
    const auto* masks = reinterpret_cast<const uint32_t*>(set.words);  // (count, words)
    for (int k = threadIdx.x; k < kCount * kMmaWords; k += kThreads) {
      const int r = k / kMmaWords, w = k % kMmaWords;
      const bool inside = i0 + r < set.count && first + w < words;
      staged[r][w] = inside ? masks[(i0 + r) * words + first + w] : 0;
    }
  }
};

// Moves the tables to shared memory where `fit` says that they have room there.
template <typename T>
__device__ Tables<T> cached_tables(const Tables<T>& tables, int64_t n, bool fit, T* shared) {
  if (!fit) return tables;
  Tables<T> cached = tables;
  const auto copy = [&](const T*& table) {
    if (!table) return;
    for (int64_t k = threadIdx.x; k <= n; k += kThreads) shared[k] = table[k];
    table = shared;
    shared += n + 1;
  };
  copy(cached.hamming);
  copy(cached.overlap);
  __syncthreads();
  return cached;
}

// Bytes of shared memory that the tables take beside `used` bytes, or 0 where they do not fit.
template <typename T>
int64_t cached_table_bytes(const Tables<T>& tables, int64_t n, int64_t used) {
  constexpr int64_t kSharedBytes = 48 * 1024;  // what every kernel may use without asking
  const int64_t bytes = ((tables.hamming ? 1 : 0) + (tables.overlap ? 1 : 0)) * (n + 1) * sizeof(T);
  return used + bytes <= kSharedBytes ? bytes : 0;
}

// K of one pair; sizes are read only with a Hamming table.
template <typename T>
__device__ T entry_of(const Tables<T>& tables, const MaskSet& x, int64_t i, const MaskSet& y,
                      int64_t j, int overlap) {
  if (!tables.hamming) return tables.overlap[overlap];
  return entry_of(tables, int64_t{x.sizes[i]}, int64_t{y.sizes[j]}, int64_t{overlap});
}

}  // namespace ksm
