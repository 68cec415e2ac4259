// Tiles with AVX-512 VPOPCNTDQ: eight masks per vector, one popcount per 512 bits.
#if defined(__x86_64__)
#ifndef KSM_EMULATE_AVX512  // tools/check_avx512.sh compiles this file against SIMDe instead
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vpopcntdq")
#include <immintrin.h>
#endif
#define KSM_VECTOR_BYTES 64
#include "cpu/multiply_tile.h"
#include "cpu/tile.h"

namespace ksm {
namespace {

constexpr int64_t kLanes = 8;                         // masks per vector
constexpr int64_t kVectors = kBlockColumns / kLanes;  // vectors per block and word

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
  for (int64_t first = 0; first < kVectors; first += 4) {
    __m512i sum[kRows][4];
    for (int r = 0; r < kRows; ++r) {
      for (int q = 0; q < 4; ++q) sum[r][q] = _mm512_setzero_si512();
    }
    for (int64_t w = 0; w < words; ++w) {
      __m512i column[4];
      for (int q = 0; q < 4; ++q) {
        column[q] = _mm512_loadu_si512(y + w * kBlockColumns + (first + q) * kLanes);
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
        uint32_t* out = counts + r * kBlockColumns + (first + q) * kLanes;
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

}  // namespace

const TileKernels kAvx512Tile = {block_bytes, lay_out_block, count_tile, multiply_tile<float>,
                                 multiply_tile<double>};

}  // namespace ksm
#endif
