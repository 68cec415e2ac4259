// What an instruction set contributes to mask_gram: counts over one tile, and one tile times v.
//
// A tile is up to kRowGroup rows of x against one block of kBlockColumns columns (masks of y).
// tile_avx512.cpp, tile_avx2.cpp and tile_portable.cpp each fill one TileKernels; the driver
// mask_gram.cpp knows nothing of instruction sets beyond picking one of them.
#pragma once

#include <cstdint>

namespace ksm {

constexpr int64_t kRowGroup = 4;  // rows counted at once: their tables or words sit in registers
constexpr int64_t kBlockColumns =
    64;                            // columns per block: a block of 1,024 tasks fits the L1 cache
constexpr int64_t kTileRows = 64;  // rows that pass over a block before the next one is loaded

// What is counted for a pair of masks.
enum class Count { kOverlap, kHamming };

struct TileKernels {
  // Bytes of one block of kBlockColumns masks in this instruction set's own layout.
  int64_t (*block_bytes)(int64_t words);

  // Lays out `columns` <= kBlockColumns masks as a block; the missing ones are empty masks.
  void (*lay_out_block)(const uint64_t* y,  // (columns, words)
                        int64_t columns, int64_t words, uint8_t* block);

  // counts[r, j] of every pair of the tile; rows past `rows` are left alone.
  void (*count_tile)(const uint64_t* x,  // (rows, words)
                     int64_t rows, int64_t words, const uint8_t* block, Count what,
                     uint32_t* counts);  // (kRowGroup, kBlockColumns)

  // total[c, r] += sum over j of gram[j, r] * v[j, c], in the order of j. The sum over the block is
  // taken in the dtype of v, the total in float64.
  void (*multiply_tile_float)(const float* gram,  // (columns, kTileRows)
                              const float* v,     // (columns, t)
                              int64_t columns, int64_t t,
                              double* total);  // (t, kTileRows)
  void (*multiply_tile_double)(const double* gram, const double* v, int64_t columns, int64_t t,
                               double* total);
};

extern const TileKernels kPortableTile;
#if defined(__x86_64__)
extern const TileKernels kAvx2Tile;
extern const TileKernels kAvx512Tile;
#endif

}  // namespace ksm
