// Counts over tiles of masks, and products of tiles with v; see loops.h for how it is included.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/kernels.h"

namespace ksm {
namespace {

#if KSM_VECTOR_BYTES == 64
// ---- AVX-512 VPOPCNTDQ: eight masks per vector, one popcount per 512 bits ----------------------

constexpr int64_t kMasksPerVector = 8;                              // masks per vector
constexpr int64_t kBlockVectors = kBlockColumns / kMasksPerVector;  // vectors per block and word

int64_t block_bytes(int64_t words) { return kBlockColumns * words * 8; }

// Word-major: word w of all masks of the block lies together.
void lay_out_block(const uint64_t* y, int64_t columns, int64_t words, uint8_t* block) {
  auto* out = reinterpret_cast<uint64_t*>(block);  // (words, kBlockColumns)
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t j = 0; j < kBlockColumns; ++j) {
      out[w * kBlockColumns + j] = j < columns ? y[j * words + w] : 0;
    }
  }
}

// kRows x 4 vectors of counts stay in registers over the words.
template <Count kWhat, int kRows>
void count_rows(const uint64_t* x, int64_t words, const uint64_t* y, uint32_t* counts) {
  for (int64_t first = 0; first < kBlockVectors; first += 4) {
    __m512i sum[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < 4; ++q) sum[r][q] = _mm512_setzero_si512();
    }
    for (int64_t w = 0; w < words; ++w) {
      __m512i column[4];
      for (int q = 0; q < 4; ++q) {
        column[q] = _mm512_loadu_si512(y + w * kBlockColumns + (first + q) * kMasksPerVector);
      }
      for (int r = 0; r < kRows; ++r) {
        const __m512i row = _mm512_set1_epi64(static_cast<long long>(x[r * words + w]));
        for (int q = 0; q < 4; ++q) {
          const __m512i pair = kWhat == Count::kOverlap ? _mm512_and_si512(row, column[q])
                                                        : _mm512_xor_si512(row, column[q]);
          sum[r][q] = _mm512_add_epi64(sum[r][q], _mm512_popcnt_epi64(pair));
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < 4; ++q) {
        uint32_t* out = counts + r * kBlockColumns + (first + q) * kMasksPerVector;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(sum[r][q]));
      }
    }
  }
}

template <Count kWhat>
void count_group(const uint64_t* x, int64_t rows, int64_t words, const uint64_t* y,
                 uint32_t* counts) {
  if (rows == kRowGroup) return count_rows<kWhat, kRowGroup>(x, words, y, counts);
  for (int64_t r = 0; r < rows; ++r) {
    count_rows<kWhat, 1>(x + r * words, words, y, counts + r * kBlockColumns);
  }
}

void count_tile(const uint64_t* x, int64_t rows, int64_t words, const uint8_t* block, Count what,
                uint32_t* counts) {
  const auto* y = reinterpret_cast<const uint64_t*>(block);
  if (what == Count::kOverlap) {
    count_group<Count::kOverlap>(x, rows, words, y, counts);
  } else {
    count_group<Count::kHamming>(x, rows, words, y, counts);
  }
}
#elif KSM_VECTOR_BYTES == 32
// ---- AVX2, which has no vector popcount: the method of four Russians ---------------------------
//
// Fix four tasks and a row. Its four bits, a nibble, choose one of 16 tables of 16 bytes that hold
// the count for every nibble a column can have, so that one byte shuffle counts 32 pairs over four
// tasks: two instructions (shuffle, add) per 128 bit pairs.

constexpr int64_t kMasksPerVector = 32;                             // columns per vector
constexpr int64_t kBlockVectors = kBlockColumns / kMasksPerVector;  // vectors per block and nibble
constexpr int64_t kWordsPerFlush = 3;  // a byte holds 63 nibbles of at most 4: 3 whole words

// counts[a][b] = overlap or Hamming distance of the nibbles a and b.
struct NibbleTables {
  alignas(16) uint8_t counts[16][16];
};

constexpr NibbleTables nibble_tables(Count what) {
  NibbleTables tables{};
  for (int a = 0; a < 16; ++a) {
    for (int b = 0; b < 16; ++b) {
      const int bits = what == Count::kOverlap ? a & b : a ^ b;
      tables.counts[a][b] = (bits & 1) + (bits >> 1 & 1) + (bits >> 2 & 1) + (bits >> 3);
    }
  }
  return tables;
}

constexpr NibbleTables kOverlapTables = nibble_tables(Count::kOverlap);
constexpr NibbleTables kHammingTables = nibble_tables(Count::kHamming);

int64_t block_bytes(int64_t words) { return kBlockColumns * words * kNibblesPerWord; }

// One nibble per byte, nibble-major: (words * 16, kBlockColumns) bytes.
void lay_out_block(const uint64_t* y, int64_t columns, int64_t words, uint8_t* block) {
  for (int64_t w = 0; w < words; ++w) {
    for (int64_t j = 0; j < kBlockColumns; ++j) {
      const uint64_t word = j < columns ? y[j * words + w] : 0;
      uint8_t* out = block + w * kNibblesPerWord * kBlockColumns + j;
      for (int64_t p = 0; p < kNibblesPerWord; ++p) out[p * kBlockColumns] = word >> (4 * p) & 15;
    }
  }
}

// The nibbles of one word, each times 16: the byte offsets of their tables.
void table_offsets(uint64_t word, uint8_t* offsets) {
  const __m128i bytes = _mm_cvtsi64_si128(static_cast<long long>(word));
  const __m128i mask = _mm_set1_epi8(static_cast<char>(0xf0));
  const __m128i even = _mm_and_si128(_mm_slli_epi16(bytes, 4), mask);
  const __m128i odd = _mm_and_si128(bytes, mask);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(offsets), _mm_unpacklo_epi8(even, odd));
}

// Adds the byte counts of a tile's rows to its 32-bit counts, or starts these.
template <int kRows>
__attribute__((noinline)) void flush(const uint8_t* bytes, bool start, uint32_t* counts) {
  for (int64_t k = 0; k < kRows * kBlockColumns; k += 8) {
    auto* out = reinterpret_cast<__m256i*>(counts + k);
    const __m256i wide =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes + k)));
    _mm256_storeu_si256(out, start ? wide : _mm256_add_epi32(_mm256_loadu_si256(out), wide));
  }
}

// kRows x kBlockVectors vectors of byte counts stay in registers over kWordsPerFlush words.
template <int kRows>
void count_rows(const uint64_t* x, int64_t words, const uint8_t* block, const uint8_t* tables,
                uint32_t* counts) {
  uint8_t offsets[kRows][kWordsPerFlush * kNibblesPerWord];
  for (int64_t first = 0; first < words; first += kWordsPerFlush) {
    const int64_t last = first + kWordsPerFlush < words ? first + kWordsPerFlush : words;
    for (int r = 0; r < kRows; ++r) {
      for (int64_t w = first; w < last; ++w) {
        table_offsets(x[r * words + w], offsets[r] + (w - first) * kNibblesPerWord);
      }
    }
    __m256i sum[kRows][kBlockVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < kBlockVectors; ++q) sum[r][q] = _mm256_setzero_si256();
    }
    const uint8_t* nibbles = block + first * kNibblesPerWord * kBlockColumns;
    for (int64_t p = 0; p < (last - first) * kNibblesPerWord; ++p, nibbles += kBlockColumns) {
      __m256i column[kBlockVectors];
      for (int q = 0; q < kBlockVectors; ++q) {
        column[q] =
            _mm256_load_si256(reinterpret_cast<const __m256i*>(nibbles + q * kMasksPerVector));
      }
      for (int r = 0; r < kRows; ++r) {
        const __m256i table = _mm256_broadcastsi128_si256(
            _mm_load_si128(reinterpret_cast<const __m128i*>(tables + offsets[r][p])));
        for (int q = 0; q < kBlockVectors; ++q) {
          sum[r][q] = _mm256_add_epi8(sum[r][q], _mm256_shuffle_epi8(table, column[q]));
        }
      }
    }
    alignas(32) uint8_t bytes[kRows][kBlockColumns];
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < kBlockVectors; ++q) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[r] + q * kMasksPerVector), sum[r][q]);
      }
    }
    flush<kRows>(bytes[0], first == 0, counts);
  }
}

void count_tile(const uint64_t* x, int64_t rows, int64_t words, const uint8_t* block, Count what,
                uint32_t* counts) {
  const auto& tables = what == Count::kOverlap ? kOverlapTables : kHammingTables;
  const uint8_t* first_table = &tables.counts[0][0];
  if (rows == kRowGroup) return count_rows<kRowGroup>(x, words, block, first_table, counts);
  for (int64_t r = 0; r < rows; ++r) {
    count_rows<1>(x + r * words, words, block, first_table, counts + r * kBlockColumns);
  }
}
#else
// ---- plain C++ ---------------------------------------------------------------------------------

int64_t block_bytes(int64_t words) { return kBlockColumns * words * 8; }

// Column by column, as in y.
void lay_out_block(const uint64_t* y, int64_t columns, int64_t words, uint8_t* block) {
  std::memset(block, 0, block_bytes(words));
  std::memcpy(block, y, columns * words * 8);
}

template <Count kWhat>
void count_pairs(const uint64_t* x, int64_t rows, int64_t words, const uint64_t* y,
                 uint32_t* counts) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < kBlockColumns; ++j) {
      uint32_t count = 0;
      for (int64_t w = 0; w < words; ++w) {
        const uint64_t a = x[r * words + w], b = y[j * words + w];
        count += __builtin_popcountll(kWhat == Count::kOverlap ? a & b : a ^ b);
      }
      counts[r * kBlockColumns + j] = count;
    }
  }
}

void count_tile(const uint64_t* x, int64_t rows, int64_t words, const uint8_t* block, Count what,
                uint32_t* counts) {
  const auto* y = reinterpret_cast<const uint64_t*>(block);
  if (what == Count::kOverlap) {
    count_pairs<Count::kOverlap>(x, rows, words, y, counts);
  } else {
    count_pairs<Count::kHamming>(x, rows, words, y, counts);
  }
}
#endif

// ---- one tile of the Gram matrix times v -------------------------------------------------------
//
// The lanes of a vector are rows, hence every entry of the result is the same sequence of products
// and sums, whatever the width (and with -ffp-contract=off the same bits).

template <typename T>
struct VectorOf {
  static constexpr int kLanes = KSM_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(KSM_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

// Two vectors of rows by kTargets columns of v stay in registers over the whole block.
template <typename T, int kTargets>
void multiply_panel(const T* gram, const T* v, int64_t columns, int64_t t, double* total) {
  using Vector = typename VectorOf<T>::type;
  constexpr int kLanes = VectorOf<T>::kLanes;
  for (int64_t r = 0; r < kTileRows; r += 2 * kLanes) {
    Vector low[kTargets] = {}, high[kTargets] = {};
    for (int64_t j = 0; j < columns; ++j) {
      const Vector g_low = *reinterpret_cast<const Vector*>(gram + j * kTileRows + r);
      const Vector g_high = *reinterpret_cast<const Vector*>(gram + j * kTileRows + r + kLanes);
      for (int c = 0; c < kTargets; ++c) {
        low[c] += g_low * v[j * t + c];
        high[c] += g_high * v[j * t + c];
      }
    }
    for (int c = 0; c < kTargets; ++c) {
      double* out = total + c * kTileRows + r;
      for (int q = 0; q < kLanes; ++q) out[q] += low[c][q];
      for (int q = 0; q < kLanes; ++q) out[kLanes + q] += high[c][q];
    }
  }
}

template <typename T>
void multiply_tile(const T* gram, const T* v, int64_t columns, int64_t t, double* total) {
  int64_t c = 0;
  for (; c + 4 <= t; c += 4) multiply_panel<T, 4>(gram, v + c, columns, t, total + c * kTileRows);
  if (c + 2 <= t) {
    multiply_panel<T, 2>(gram, v + c, columns, t, total + c * kTileRows);
    c += 2;
  }
  if (c < t) multiply_panel<T, 1>(gram, v + c, columns, t, total + c * kTileRows);
}

}  // namespace
}  // namespace ksm
