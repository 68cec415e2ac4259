// Compares the AVX-512 tiles with the portable ones on random masks; see check_avx512.sh.
#include <cstdio>
#include <random>
#include <type_traits>
#include <vector>

#include "cpu/tile.h"

namespace {

using namespace ksm;

std::mt19937_64 random_bits(0);

bool same_counts(int64_t rows, int64_t columns, int64_t words, Count what) {
  std::vector<uint64_t> x(rows * words), y(columns * words);
  for (uint64_t& word : x) word = random_bits();
  for (uint64_t& word : y) word = random_bits();
  const auto counts_by = [&](const TileKernels& tile) {
    std::vector<uint8_t> block(tile.block_bytes(words));
    std::vector<uint32_t> counts(kRowGroup * kBlockColumns, 0);
    tile.lay_out_block(y.data(), columns, words, block.data());
    tile.count_tile(x.data(), rows, words, block.data(), what, counts.data());
    counts.resize(rows * kBlockColumns);
    return counts;
  };
  return counts_by(kAvx512Tile) == counts_by(kPortableTile);
}

template <typename T>
bool same_products(int64_t columns, int64_t t) {
  std::vector<T> gram(kBlockColumns * kTileRows), v(columns * t);
  std::normal_distribution<T> normal;
  for (T& entry : gram) entry = normal(random_bits);
  for (T& entry : v) entry = normal(random_bits);
  const auto product_by = [&](const TileKernels& tile) {
    std::vector<double> totals(t * kTileRows, 1.0);
    if constexpr (std::is_same_v<T, float>) {
      tile.multiply_tile_float(gram.data(), v.data(), columns, t, totals.data());
    } else {
      tile.multiply_tile_double(gram.data(), v.data(), columns, t, totals.data());
    }
    return totals;
  };
  return product_by(kAvx512Tile) == product_by(kPortableTile);
}

}  // namespace

int main() {
  int compared = 0, different = 0;
  const auto expect = [&](bool same) { ++compared, different += !same; };
  for (const int64_t words : {1, 2, 5, 16}) {
    for (const int64_t rows : {1, 3, 4}) {
      for (const int64_t columns : {1, 13, 64}) {
        expect(same_counts(rows, columns, words, Count::kOverlap));
        expect(same_counts(rows, columns, words, Count::kHamming));
      }
    }
  }
  for (const int64_t columns : {1, 17, 64}) {
    for (const int64_t t : {1, 2, 3, 4, 9}) {
      expect(same_products<float>(columns, t));
      expect(same_products<double>(columns, t));
    }
  }
  std::printf("AVX-512 tiles, emulated: %d comparisons, %d differ\n", compared, different);
  return different != 0;
}
