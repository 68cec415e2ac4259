// The Gram matrix of two sets of packed masks, one tile of values at a time, from two tables.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "cpu/kernels.h"
#include "packed_masks.h"

namespace ksm {

// l columns in blocks.
struct BlockSizes {
  int64_t l;

  int64_t count() const { return (l + kBlockColumns - 1) / kBlockColumns; }
  int64_t columns(int64_t b) const { return std::min(kBlockColumns, l - b * kBlockColumns); }
};

// The masks of y, laid out in blocks as the kernels of masks want them.
class Blocks : public BlockSizes {
 public:
  Blocks(const uint64_t* y,  // (l, words)
         int64_t l, int64_t words)
      : BlockSizes{l},
        kernels_(cpu_kernels().masks),
        stride_((kernels_.block_bytes(words) + kAlignment - 1) / kAlignment * kAlignment),
        memory_(new (std::align_val_t(kAlignment)) uint8_t[count() * stride_]) {
    torch::stable::parallel_for(0, count(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        kernels_.lay_out_block(y + b * kBlockColumns * words, columns(b), words,
                               memory_.get() + b * stride_);
      }
    });
  }

  const uint8_t* operator[](int64_t b) const { return memory_.get() + b * stride_; }

 private:
  static constexpr int64_t kAlignment = 64;
  struct Free {
    void operator()(uint8_t* memory) const {
      ::operator delete[](memory, std::align_val_t(kAlignment));
    }
  };

  const MaskKernels& kernels_;
  const int64_t stride_;
  const std::unique_ptr<uint8_t[], Free> memory_;
};

// |x_i| for every mask, and zeros up to a multiple of kBlockColumns.
inline std::vector<uint32_t> sizes_of(const uint64_t* masks,  // (m, words)
                                      int64_t m, int64_t words) {
  std::vector<uint32_t> sizes((m + kBlockColumns - 1) / kBlockColumns * kBlockColumns);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t w = 0; w < words; ++w) sizes[i] += __builtin_popcountll(masks[i * words + w]);
  }
  return sizes;
}

enum class Layout { kRowMajor, kTransposed };

// Writes value(r, j) of a row group into its tile. Four values are read before they are written:
// one vector store instead of four (0.28 against 0.49 ns per pair on Zen 3; a gather takes 0.43).
template <Layout kLayout, typename T, typename Value>
void fill_group(const Value& value, T* tile) {
  static_assert(kRowGroup == 4 && kBlockColumns % 4 == 0);
  if constexpr (kLayout == Layout::kTransposed) {
    for (int64_t j = 0; j < kBlockColumns; ++j) {
      const T four[4] = {value(0, j), value(1, j), value(2, j), value(3, j)};
      std::memcpy(tile + j * kTileRows, four, sizeof(four));
    }
  } else {
    for (int64_t r = 0; r < kRowGroup; ++r) {
      for (int64_t j = 0; j < kBlockColumns; j += 4) {
        const T four[4] = {value(r, j), value(r, j + 1), value(r, j + 2), value(r, j + 3)};
        std::memcpy(tile + r * kBlockColumns + j, four, sizeof(four));
      }
    }
  }
}

template <typename T>
class GramTiles {
 public:
  struct Scratch {};                      // what a thread keeps from tile to tile: nothing here
  static constexpr int64_t kPanels = 16;  // see mask_gram_matmul_symmetric_kernel

  GramTiles(const uint64_t* x,  // (m, words)
            int64_t m,
            const uint64_t* y,  // (l, words)
            int64_t l, int64_t words, Tables<T> tables)
      : blocks(y, l, words), x_(x), words_(words), tables_(tables) {
    if (tables.hamming && tables.overlap) {
      x_sizes_ = sizes_of(x, m, words);
      y_sizes_ = sizes_of(y, l, words);
    }
  }

  // tile[r, j] = K[i + r, column j of block b] for r < rows, or tile[j, r] if transposed. What lies
  // beyond the rows and the block's columns is arbitrary, but finite where the tables are.
  template <Layout kLayout>
  void fill(int64_t i, int64_t rows, int64_t b,
            T* tile,  // (kTileRows, kBlockColumns), or the reverse
            Scratch&) const {
    constexpr int64_t kRowStride = kLayout == Layout::kTransposed ? 1 : kBlockColumns;
    // With one table, what it is indexed by is counted directly.
    const Count what = tables_.overlap ? Count::kOverlap : Count::kHamming;
    alignas(64) uint32_t counts[kRowGroup * kBlockColumns] = {};
    for (int64_t first = 0; first < rows; first += kRowGroup) {
      const int64_t group = std::min(kRowGroup, rows - first);
      if (group < kRowGroup) std::fill_n(counts, kRowGroup * kBlockColumns, 0);
      kernels_.count_tile(x_ + (i + first) * words_, group, words_, blocks[b], what, counts);
      T* target = tile + first * kRowStride;
      if (x_sizes_.empty()) {
        const T* table = tables_.overlap ? tables_.overlap : tables_.hamming;
        const auto value = [&](int64_t r, int64_t j) {
          return table[counts[r * kBlockColumns + j]];
        };
        fill_group<kLayout>(value, target);
      } else {
        const uint32_t* x_sizes = x_sizes_.data() + i + first;
        const uint32_t* y_sizes = y_sizes_.data() + b * kBlockColumns;
        const auto value = [&](int64_t r, int64_t j) {
          const int64_t x_size = r < group ? x_sizes[r] : 0;
          return entry_of(tables_, x_size, y_sizes[j], counts[r * kBlockColumns + j]);
        };
        fill_group<kLayout>(value, target);
      }
    }
  }

  const Blocks blocks;

 private:
  const MaskKernels& kernels_ = cpu_kernels().masks;
  const uint64_t* x_;  // (m, words)
  const int64_t words_;
  const Tables<T> tables_;
  std::vector<uint32_t> x_sizes_, y_sizes_;  // only where both tables are given
};

}  // namespace ksm
