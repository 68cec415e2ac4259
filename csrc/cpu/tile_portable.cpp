// Tiles in plain C++: the path of every CPU without a better one, and the oracle of the others.
#define KSM_VECTOR_BYTES 16
#include <cstring>

#include "cpu/multiply_tile.h"
#include "cpu/tile.h"

namespace ksm {
namespace {

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

}  // namespace

const TileKernels kPortableTile = {block_bytes, lay_out_block, count_tile, multiply_tile<float>,
                                   multiply_tile<double>};

}  // namespace ksm
