// Overlaps of a tile of mask pairs on the tensor cores, which multiply bit matrices: and + popc.
#pragma once

#include <type_traits>

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

  // Two steps: one is multiplied while the other one arrives.
  struct alignas(16) Staging {
    uint32_t x[2][kRows][kStagedWords];
    uint32_t y[2][kColumns][kStagedWords];
  };

  int counts[kRowMmas][kColumnMmas][4];  // this thread's share, see own_row

  // Counts the pairs (i0 + r, j0 + c); masks beyond the sets count as empty. All threads call it.
  __device__ void count(const MaskSet& x, int64_t i0, const MaskSet& y, int64_t j0, int64_t n,
                        Staging& staging) {
    const bool wide = words_of(n) % 2 == 0 && is_aligned(x.words) && is_aligned(y.words);
    if (wide) {
      count_by<2>(x, i0, y, j0, n, staging);
    } else {
      count_by<1>(x, i0, y, j0, n, staging);
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

  static __device__ bool is_aligned(const uint64_t* words) {
    return reinterpret_cast<uintptr_t>(words) % 16 == 0;
  }

  // What a thread stages of kCount masks: kWords neighbouring words of 64 bits, of a few masks each.
  template <int kCount, int kWords>
  struct Share {
    static constexpr int kBeside = kStepWords / kWords, kApart = kThreads / kBeside;
    static constexpr int kEach = divide_up(kCount, kApart);

    const uint64_t* own;  // this thread's first word
    int64_t words;        // of a mask
    int count, masks;     // of words from there on, and of the masks that are in the set

    __device__ Share(const MaskSet& set, int64_t i0, int64_t n) : words(words_of(n)) {
      const int r = threadIdx.x / kBeside, w = threadIdx.x % kBeside * kWords;
      const int64_t left = set.count - i0 - r;
      own = set.words + (i0 + r) * words + w;
      count = static_cast<int>(words) - w;
      masks = left <= 0 ? 0 : left < kCount ? static_cast<int>(left + kApart - 1) / kApart : kEach;
    }
    // Of the step that begins with word `first`; zeros beyond the masks and the set.
    __device__ void stage(int first, uint32_t (&staged)[kCount][kStagedWords]) const {
      const int r = threadIdx.x / kBeside, w = threadIdx.x % kBeside * kWords;
#pragma unroll
      for (int e = 0; e < kEach; ++e) {
        if (kCount < kApart && r >= kCount) continue;
        copy_async<8 * kWords>(&staged[r + e * kApart][2 * w], own + e * kApart * words + first,
                               e < masks && first < count);
      }
    }
  };

  template <int kWords>
  __device__ void count_by(const MaskSet& x, int64_t i0, const MaskSet& y, int64_t j0, int64_t n,
                           Staging& staging) {
    const int lane = threadIdx.x % 32, group = lane / 4, word = lane % 4;
#pragma unroll
    for (int p = 0; p < kRowMmas; ++p) {
#pragma unroll
      for (int q = 0; q < kColumnMmas; ++q) {
        counts[p][q][0] = counts[p][q][1] = counts[p][q][2] = counts[p][q][3] = 0;
      }
    }
    const Share<kRows, kWords> left(x, i0, n);
    const Share<kColumns, kWords> right(y, j0, n);
    __syncthreads();  // what lies there has been read
    left.stage(0, staging.x[0]);
    right.stage(0, staging.y[0]);
    const auto words = static_cast<int>(words_of(n));
#pragma unroll 1
    for (int first = 0, now = 0; first < words; first += kStepWords, now ^= 1) {
      wait_for_copies();
      __syncthreads();  // all have arrived, and the words of the step before have been read
      if (first + kStepWords < words) {
        left.stage(first + kStepWords, staging.x[now ^ 1]);
        right.stage(first + kStepWords, staging.y[now ^ 1]);
      }
      uint32_t b[kColumnMmas][2];
#pragma unroll
      for (int q = 0; q < kColumnMmas; ++q) {
        const uint32_t* column = staging.y[now][first_column() + q * kMmaColumns + group];
        b[q][0] = column[word];
        b[q][1] = column[word + 4];
      }
#pragma unroll
      for (int p = 0; p < kRowMmas; ++p) {
        const uint32_t* low = staging.x[now][first_row() + p * kMmaRows + group];
        const uint32_t* high = low + 8 * kStagedWords;
        const uint32_t a[4] = {low[word], high[word], low[word + 4], high[word + 4]};
#pragma unroll
        for (int q = 0; q < kColumnMmas; ++q) mma_and_popc(counts[p][q], a, b[q]);
      }
    }
  }
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

// Bytes of shared memory that the tables take beside `used` bytes, or 0 where they do not fit; to be
// allowed (allow_shared_memory).
template <typename T>
int64_t cached_table_bytes(const Tables<T>& tables, int64_t n, int64_t used) {
  constexpr int64_t kSharedBytes = 64 * 1024;  // every GPU with these products has more
  const int64_t bytes = ((tables.hamming ? 1 : 0) + (tables.overlap ? 1 : 0)) * (n + 1) * sizeof(T);
  return used + bytes <= kSharedBytes ? bytes : 0;
}

// K of pairs that share a row, by tables known to be there when compiling.
template <bool kHamming, bool kOverlap, typename T>
struct RowValues {
  const T* hamming;  // of no overlap and an empty mask of y
  const T* overlap;

  __device__ RowValues(const Tables<T>& tables, int x_size)
      : hamming(tables.hamming + x_size), overlap(tables.overlap) {}
  __device__ T of(int y_size, int overlaps) const {
    if constexpr (!kHamming) return overlap[overlaps];
    const T value = (hamming + y_size)[-2 * overlaps];
    if constexpr (!kOverlap) return value;
    return value + overlap[overlaps];
  }
};

// body(whether there is a Hamming table, whether there is one of overlaps), as types.
template <typename T, typename Body>
__device__ void by_tables(const Tables<T>& tables, const Body& body) {
  if (!tables.hamming) {
    body(std::false_type(), std::true_type());
  } else if (!tables.overlap) {
    body(std::true_type(), std::false_type());
  } else {
    body(std::true_type(), std::true_type());
  }
}

}  // namespace ksm
