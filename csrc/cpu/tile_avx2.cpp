// Tiles with AVX2, which has no vector popcount: the method of four Russians.
//
// Fix four tasks and a row. Its four bits, a nibble, choose one of 16 tables of 16 bytes that hold
// the count for every nibble a column can have, so that one byte shuffle counts 32 pairs over four
// tasks: two instructions (shuffle, add) per 128 bit pairs.
#if defined(__x86_64__)
#pragma GCC target("avx2")
#include <immintrin.h>

#define KSM_VECTOR_BYTES 32
#include "cpu/multiply_tile.h"
#include "cpu/tile.h"

namespace ksm {
namespace {

constexpr int64_t kLanes = 32;                        // columns per vector
constexpr int64_t kVectors = kBlockColumns / kLanes;  // vectors per block and nibble
constexpr int64_t kNibblesPerWord = 16;
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

// kRows x kVectors vectors of byte counts stay in registers over kWordsPerFlush words.
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
    __m256i sum[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < kVectors; ++q) sum[r][q] = _mm256_setzero_si256();
    }
    const uint8_t* nibbles = block + first * kNibblesPerWord * kBlockColumns;
    for (int64_t p = 0; p < (last - first) * kNibblesPerWord; ++p, nibbles += kBlockColumns) {
      __m256i column[kVectors];
      for (int q = 0; q < kVectors; ++q) {
        column[q] = _mm256_load_si256(reinterpret_cast<const __m256i*>(nibbles + q * kLanes));
      }
      for (int r = 0; r < kRows; ++r) {
        const __m256i table = _mm256_broadcastsi128_si256(
            _mm_load_si128(reinterpret_cast<const __m128i*>(tables + offsets[r][p])));
        for (int q = 0; q < kVectors; ++q) {
          sum[r][q] = _mm256_add_epi8(sum[r][q], _mm256_shuffle_epi8(table, column[q]));
        }
      }
    }
    alignas(32) uint8_t bytes[kRows][kBlockColumns];
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < kVectors; ++q) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(bytes[r] + q * kLanes), sum[r][q]);
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

}  // namespace

const TileKernels kAvx2Tile = {block_bytes, lay_out_block, count_tile, multiply_tile<float>,
                               multiply_tile<double>};

}  // namespace ksm
#endif
