// Compares the AVX-512 loops with the portable ones: tiles of random masks, and projections; see
// check_avx512.sh.
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/kernels.h"
#include "packed_masks.h"

namespace {

using namespace ksm;

std::mt19937_64 random_bits(0);

bool same_counts(int64_t rows, int64_t columns, int64_t words, Count what) {
  std::vector<uint64_t> x(rows * words), y(columns * words);
  for (uint64_t& word : x) word = random_bits();
  for (uint64_t& word : y) word = random_bits();
  const auto counts_by = [&](const CpuKernels& kernels) {
    const MaskKernels& masks = kernels.masks;
    std::vector<uint8_t> block(masks.block_bytes(words));
    std::vector<uint32_t> counts(kRowGroup * kBlockColumns, 0);
    masks.lay_out_block(y.data(), columns, words, block.data());
    masks.count_tile(x.data(), rows, words, block.data(), what, counts.data());
    counts.resize(rows * kBlockColumns);
    return counts;
  };
  return counts_by(kAvx512Kernels) == counts_by(kPortableKernels);
}

template <typename T>
bool same_products(int64_t columns, int64_t t) {
  std::vector<T> gram(kBlockColumns * kTileRows), v(columns * t);
  std::normal_distribution<T> normal;
  for (T& entry : gram) entry = normal(random_bits);
  for (T& entry : v) entry = normal(random_bits);
  const auto product_by = [&](const CpuKernels& kernels) {
    std::vector<double> totals(t * kTileRows, 1.0);
    kernels.of<T>().multiply_tile(gram.data(), v.data(), columns, t, totals.data());
    return totals;
  };
  return product_by(kAvx512Kernels) == product_by(kPortableKernels);
}

// A tile of kernels of weighted distances, over the nibbles of all words.
template <typename T>
bool same_values(MaskKernel kernel, int64_t count, int64_t others, int64_t n) {
  const int64_t words = words_of(n), nibbles = nibbles_of(n);
  std::vector<uint64_t> x(count * words), y(others * words);
  for (uint64_t& word : x) word = random_bits();
  for (uint64_t& word : y) word = random_bits();
  std::vector<T> terms(nibbles * kNibbleValues);
  std::uniform_real_distribution<T> uniform(T(0.8), T(1));
  for (T& term : terms) term = uniform(random_bits);
  const auto tile_by = [&](const CpuKernels& kernels) {
    const RealKernels<T>& real = kernels.of<T>();
    std::vector<T> spread(nibbles * kNibbleValues * kTileRows), tile(others * kTileRows);
    real.spread_nibbles(terms.data(), x.data(), count, words, {0, nibbles}, spread.data());
    real.join_nibbles(kernel, spread.data(), y.data(), others, words, {0, nibbles}, true,
                      tile.data());
    real.finish_values(kernel, tile.size(), tile.data());
    real.scale_by_product(T(3), terms.data(), kNibbleValues, tile.data());
    return tile;
  };
  return tile_by(kAvx512Kernels) == tile_by(kPortableKernels);
}

// Sums of a few rows of one range of coordinates, and their way back.
template <typename T>
bool same_projections(const Projection& projection, Range coordinates, int64_t rows) {
  const int64_t k = projection.k, p = coordinates.size();
  std::vector<T> x(rows * p), y(rows * k);
  std::normal_distribution<T> normal;
  for (T& entry : x) entry = normal(random_bits);
  for (T& entry : y) entry = normal(random_bits);
  const auto results_by = [&](const CpuKernels& kernels) {
    std::vector<T> sums = y, back(rows * p);
    const RealKernels<T>& real = kernels.of<T>();
    real.project_rows(projection, coordinates, {0, k}, rows, x.data(), p, sums.data(), k);
    real.project_rows_back(projection, coordinates, rows, y.data(), back.data(), p);
    sums.insert(sums.end(), back.begin(), back.end());
    return sums;
  };
  return results_by(kAvx512Kernels) == results_by(kPortableKernels);
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
  for (const MaskKernel kernel : {MaskKernel::kRbf, MaskKernel::kExponential}) {
    for (const int64_t n : {3, 64, 90, 300}) {
      expect(same_values<float>(kernel, 64, 64, n) && same_values<float>(kernel, 5, 13, n));
      expect(same_values<double>(kernel, 64, 64, n) && same_values<double>(kernel, 5, 13, n));
    }
  }
  for (const Projection& projection :
       {Projection{Kind::kSbp, 1, 96, 1, false}, Projection{Kind::kSbp, 2, 384, 4, true},
        Projection{Kind::kSbp, 3, 30, 3, false}, Projection{Kind::kSjlt, 4, 60, 5, false},
        Projection{Kind::kRademacher, 5, 70, 1, false},
        Projection{Kind::kGaussian, 6, 70, 1, false}, Projection{Kind::kSbp, 7, 4096, 1, true},
        Projection{Kind::kSbp, 8, 8192, 1, true}}) {
    for (const Range coordinates :
         {Range{0, 1}, Range{5, 700}, Range{(int64_t{1} << 32) - 9, (int64_t{1} << 32) + 300}}) {
      expect(same_projections<float>(projection, coordinates, 5));
      expect(same_projections<double>(projection, coordinates, 5));
    }
  }
  std::printf("AVX-512 loops, emulated: %d comparisons, %d differ\n", compared, different);
  return different != 0;
}
