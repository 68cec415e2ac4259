// Overlaps of a tile of mask pairs on the tensor cores, which multiply bit matrices: and + popc.
#pragma once

#include "cuda/intrinsics.cuh"
#include "cuda/launch.cuh"
#include "cuda/mask_gram_launch.h"
#include "cuda/neighbours.cuh"

namespace ksm {

constexpr int kWarpRows = 4, kWarpColumns = 2;  // a tile is covered as 4 x 2
static_assert(kWarpRows * kWarpColumns == kWarps);
constexpr int kMmaRows = 16, kMmaColumns = 8;  // one mma: (16, 256) x (256, 8) bits
constexpr int kStepWords = 4;                  // of 64 bits
// A row of staged words is padded from 8 to 12: the 8 rows x 4 words that a warp reads at once lie
// in 32 different banks.
constexpr int kStagedWords = 12;

// A tile of kRows x kColumns pairs, kRowMmas x kColumnMmas matrix products per warp.
template <int kRowMmas, int kColumnMmas>
struct OverlapTile {
  static constexpr int kRows = kWarpRows * kMmaRows * kRowMmas;
  static constexpr int kColumns = kWarpColumns * kMmaColumns * kColumnMmas;

  struct alignas(8) Staging {
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
    const Share<kRows> left(x, i0, n);
    const Share<kColumns> right(y, j0, n);
    typename Share<kRows>::Words left_words;
    typename Share<kColumns>::Words right_words;
    left.load(0, left_words);
    right.load(0, right_words);
    const auto words = static_cast<int>(words_of(n));
    for (int first = 0; first < words; first += kStepWords) {
      __syncthreads();  // the words staged before have been read
      Share<kRows>::store(left_words, staging.x);
      Share<kColumns>::store(right_words, staging.y);
      __syncthreads();
      left.load(first + kStepWords, left_words);  // arrive in the meantime
      right.load(first + kStepWords, right_words);
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

  // Where this thread's pairs begin: they are every 8 rows, and every 8 columns two neighbours.
  static __device__ int own_row() { return first_row() + threadIdx.x % 32 / 4; }
  static __device__ int own_column() { return first_column() + threadIdx.x % 4 * 2; }

 private:
  static __device__ int first_row() {
    return threadIdx.x / 32 / kWarpColumns * kMmaRows * kRowMmas;
  }
  static __device__ int first_column() {
    return threadIdx.x / 32 % kWarpColumns * kMmaColumns * kColumnMmas;
  }

  // What a thread stages of kCount masks: words of 64 bits, one of each of a few masks.
  template <int kCount>
  struct Share {
    static constexpr int kEach = kCount * kStepWords / kThreads, kApart = kThreads / kStepWords;
    static_assert(kEach * kApart == kCount);
    using Words = uint64_t[kEach];

    const uint64_t* own;  // this thread's first word
    int64_t words;        // of a mask
    int count, masks;     // of words from there on, and of the masks that are in the set

    __device__ Share(const MaskSet& set, int64_t i0, int64_t n) : words(words_of(n)) {
      const int r = threadIdx.x / kStepWords, w = threadIdx.x % kStepWords;
      const int64_t left = set.count - i0 - r;
      own = set.words + (i0 + r) * words + w;
      count = static_cast<int>(words) - w;
      masks = left <= 0 ? 0 : left < kCount ? static_cast<int>(left + kApart - 1) / kApart : kEach;
    }
    __device__ void load(int first, Words& out) const {
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        out[e] = e < masks && first < count ? own[e * kApart * words + first] : 0;
      }
    }
    static __device__ void store(const Words& values, uint32_t (&staged)[kCount][kStagedWords]) {
      const int r = threadIdx.x / kStepWords, w = threadIdx.x % kStepWords;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        *reinterpret_cast<Two<uint32_t>*>(&staged[r + e * kApart][2 * w]) = {
            static_cast<uint32_t>(values[e]), static_cast<uint32_t>(values[e] >> 32)};
      }
    }
  };
};

// The tables, in dynamic shared memory if they fit there: known when compiling, so that their loads
// are those of shared memory alone.
template <bool kFit, typename T>
__device__ Tables<T> cached_tables(const Tables<T>& tables, int64_t n) {
  if constexpr (!kFit) return tables;
  auto* shared = static_cast<T*>(dynamic_shared_memory());
  T* second = shared + (tables.hamming ? n + 1 : 0);
  for (int64_t k = threadIdx.x; k <= n; k += kThreads) {
    if (tables.hamming) shared[k] = tables.hamming[k];
    if (tables.overlap) second[k] = tables.overlap[k];
  }
  __syncthreads();
  return {tables.hamming ? shared : nullptr, tables.overlap ? second : nullptr};
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
