// Gram matrices of packed masks on the CPU: tiles of these, written out or multiplied by v. What
// fills a tile is a class `Tiles`; see mask_gram_tiles.h.
//
// Threads own rows of the result, and every row meets the columns in one order: no result depends
// on the number of threads.
#pragma once

#include <vector>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "cpu/large_output.h"
#include "cpu/mask_gram_tiles.h"
#include "mask_gram.h"

namespace ksm {

// A thread takes at least this many pairs, some 50 us of work: waking it costs 10.
constexpr int64_t kPairsPerThread = 1 << 16;

inline int64_t grain(int64_t pairs_per_item) {
  return std::max<int64_t>(1, kPairsPerThread / std::max<int64_t>(1, pairs_per_item));
}

// Calls body(begin, end) on ranges of the m rows, in parallel; ranges start at multiples of 16, so
// that a few hundred rows still occupy many threads.
template <typename Body>
void parallel_rows(int64_t m, int64_t l, const Body& body) {
  constexpr int64_t kStep = 16;
  const int64_t steps = (m + kStep - 1) / kStep;
  torch::stable::parallel_for(0, steps, grain(kStep * l), [&](int64_t begin, int64_t end) {
    body(begin * kStep, std::min(end * kStep, m));
  });
}

// Rows that meet a block of columns before the next one: what a tile prepares for its columns serves
// them all.
constexpr int64_t kPanelRows = 8 * kTileRows;

template <typename Tiles, typename T>
void mask_gram_kernel(const Tiles& gram, int64_t m, int64_t l,
                      T* out) {  // (m, l)
  const TileWriter<T> writer(out, m, l);
  parallel_rows(m, l, [&](int64_t begin, int64_t end) {
    alignas(64) T values[kTileRows * kBlockColumns];
    typename Tiles::Scratch scratch;
    for (int64_t panel = begin; panel < end; panel += kPanelRows) {
      const int64_t panel_end = std::min(panel + kPanelRows, end);
      for (int64_t b = 0; b < gram.blocks.count(); ++b) {
        const int64_t columns = gram.blocks.columns(b);
        for (int64_t i = panel; i < panel_end; i += kTileRows) {
          const int64_t rows = std::min(kTileRows, panel_end - i);
          gram.template fill<Layout::kRowMajor>(i, rows, b, values, scratch);
          writer.template write<kBlockColumns>(values, rows, columns, i, b * kBlockColumns);
        }
      }
    }
    writer.finish();
  });
}

// A 4 x 4 corner of a tile, transposed.
template <typename T>
void transpose_square(const T* from, T* to) {
  for (int64_t a = 0; a < 4; ++a) {
    for (int64_t b = 0; b < 4; ++b) to[b * kTileRows + a] = from[a * kBlockColumns + b];
  }
}

#if defined(__x86_64__)
// In registers: the compiler moves single floats, which took longer than counting them.
template <>
inline void transpose_square(const float* from, float* to) {
  __m128 row[4];
  for (int64_t a = 0; a < 4; ++a) row[a] = _mm_load_ps(from + a * kBlockColumns);
  _MM_TRANSPOSE4_PS(row[0], row[1], row[2], row[3]);
  for (int64_t b = 0; b < 4; ++b) _mm_store_ps(to + b * kTileRows, row[b]);
}

template <>
inline void transpose_square(const double* from, double* to) {
  for (int64_t a = 0; a < 4; a += 2) {
    for (int64_t b = 0; b < 4; b += 2) {
      const __m128d first = _mm_load_pd(from + a * kBlockColumns + b);
      const __m128d second = _mm_load_pd(from + (a + 1) * kBlockColumns + b);
      _mm_store_pd(to + b * kTileRows + a, _mm_unpacklo_pd(first, second));
      _mm_store_pd(to + (b + 1) * kTileRows + a, _mm_unpackhi_pd(first, second));
    }
  }
}
#endif

template <typename T>
void transpose_tile(const T* tile,    // (kTileRows, kBlockColumns)
                    T* transposed) {  // (kBlockColumns, kTileRows)
  for (int64_t i = 0; i < kTileRows; i += 4) {
    for (int64_t j = 0; j < kBlockColumns; j += 4) {
      transpose_square(tile + i * kBlockColumns + j, transposed + j * kTileRows + i);
    }
  }
}

// y is x: tiles on and below the diagonal, each written twice.
template <typename Tiles, typename T>
void mask_gram_symmetric_kernel(const Tiles& gram, int64_t m,
                                T* out) {  // (m, m)
  static_assert(kTileRows == kBlockColumns, "tiles must be square to be mirrored");
  const TileWriter<T> writer(out, m, m);
  const int64_t tiles = gram.blocks.count();
  // A long column of tiles goes with a short one: the threads get equal work.
  const auto fill_pairs = [&](int64_t begin, int64_t end) {
    alignas(64) T values[kTileRows * kBlockColumns] = {};
    alignas(64) T transposed[kTileRows * kBlockColumns];
    typename Tiles::Scratch scratch;
    const auto fill_column = [&](int64_t b) {
      const int64_t j = b * kBlockColumns, columns = gram.blocks.columns(b);
      for (int64_t a = b; a < tiles; ++a) {
        const int64_t i = a * kTileRows, rows = gram.blocks.columns(a);
        gram.template fill<Layout::kRowMajor>(i, rows, b, values, scratch);
        writer.template write<kBlockColumns>(values, rows, columns, i, j);
        if (a == b) continue;
        transpose_tile(values, transposed);
        writer.template write<kTileRows>(transposed, columns, rows, j, i);
      }
    };
    for (int64_t b = begin; b < end; ++b) {
      fill_column(b);
      if (tiles - 1 - b != b) fill_column(tiles - 1 - b);
    }
    writer.finish();
  };
  torch::stable::parallel_for(0, (tiles + 1) / 2, grain(kTileRows * m), fill_pairs);
}

template <typename Tiles, typename T>
void mask_gram_matmul_kernel(const Tiles& gram, int64_t m, int64_t l,
                             const T* v,  // (l, t)
                             int64_t t,
                             T* out) {  // (m, t)
  const auto multiply_tile = cpu_kernels().of<T>().multiply_tile;
  parallel_rows(m, l, [&](int64_t begin, int64_t end) {
    alignas(64) T values[kBlockColumns * kTileRows] = {};  // transposed: rows are the lanes
    std::vector<double> totals(t * kTileRows);
    typename Tiles::Scratch scratch;
    for (int64_t i = begin; i < end; i += kTileRows) {
      const int64_t rows = std::min(kTileRows, end - i);
      std::fill(totals.begin(), totals.end(), 0.0);
      for (int64_t b = 0; b < gram.blocks.count(); ++b) {
        gram.template fill<Layout::kTransposed>(i, rows, b, values, scratch);
        multiply_tile(values, v + b * kBlockColumns * t, gram.blocks.columns(b), t, totals.data());
      }
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = 0; c < t; ++c) {
          out[(i + r) * t + c] = static_cast<T>(totals[c * kTileRows + r]);
        }
      }
    }
  });
}

// Calls body(a, b) once for every unordered pair of `count` items, those of an item with itself
// included. Pairs come in the rounds of a round-robin tournament: in a round every item is in at most
// one pair, so that the pairs of a round run in parallel and may write to both of their items.
template <typename Body>
void parallel_pairs(int64_t count, int64_t grain, const Body& body) {
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t a = begin; a < end; ++a) body(a, a);
  });
  // One item (or, if the count is odd, none) stays; the others rotate by one place after each round.
  const int64_t circle = (count + 1) / 2 * 2 - 1;
  for (int64_t round = 0; round < circle; ++round) {
    torch::stable::parallel_for(0, (circle + 1) / 2, grain, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        const int64_t a = (round + k) % circle;
        const int64_t b = k == 0 ? circle : (round + circle - k) % circle;
        if (std::max(a, b) < count) body(std::min(a, b), std::max(a, b));
      }
    });
  }
}

// y = x: a tile off the diagonal is counted once, and serves its rows and, transposed, its columns.
template <typename Tiles, typename T>
void mask_gram_matmul_symmetric_kernel(const Tiles& gram, int64_t m,
                                       const T* v,  // (m, t)
                                       int64_t t,
                                       T* out) {  // (m, t)
  static_assert(kTileRows == kBlockColumns, "tiles must be square to be mirrored");
  // Panels of tiles: masks, v and totals of two (at 32 targets) fit the L2 cache, and there are
  // enough of them for several threads.
  constexpr int64_t kMostTiles = 8;
  const int64_t tiles = gram.blocks.count();
  const int64_t per_panel = (tiles + Tiles::kPanels - 1) / Tiles::kPanels;
  const int64_t panel = std::clamp<int64_t>(per_panel, 1, kMostTiles);
  const int64_t panels = (tiles + panel - 1) / panel;
  std::vector<double> totals(tiles * t * kTileRows);  // (tiles, t, kTileRows)
  const auto multiply_tile = cpu_kernels().of<T>().multiply_tile;
  const auto add = [&](const T* values, int64_t columns_tile, int64_t rows_tile) {
    multiply_tile(values, v + columns_tile * kTileRows * t, gram.blocks.columns(columns_tile), t,
                  totals.data() + rows_tile * t * kTileRows);
  };
  const int64_t pairs = panel * kTileRows * panel * kTileRows;
  parallel_pairs(panels, grain(pairs), [&](int64_t p, int64_t q) {
    alignas(64) T values[kBlockColumns * kTileRows] = {};
    alignas(64) T transposed[kBlockColumns * kTileRows];
    typename Tiles::Scratch scratch;
    for (int64_t a = p * panel; a < std::min((p + 1) * panel, tiles); ++a) {
      for (int64_t b = std::max(q * panel, a); b < std::min((q + 1) * panel, tiles); ++b) {
        const int64_t rows = gram.blocks.columns(a);
        gram.template fill<Layout::kTransposed>(a * kTileRows, rows, b, values, scratch);
        add(values, b, a);
        if (b == a) continue;
        transpose_tile(values, transposed);
        add(transposed, a, b);
      }
    }
  });
  torch::stable::parallel_for(0, tiles, 1024, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * kTileRows; i < std::min(end * kTileRows, m); ++i) {
      const double* total = totals.data() + i / kTileRows * t * kTileRows + i % kTileRows;
      for (int64_t c = 0; c < t; ++c) out[i * t + c] = static_cast<T>(total[c * kTileRows]);
    }
  });
}

// ---- from tensors to the drivers ---------------------------------------------------------------

template <typename Tiles, typename T>
void write_gram(const Tiles& gram, bool symmetric, int64_t m, int64_t l,
                T* out) {  // (m, l)
  request_huge_pages(out, m * l * sizeof(T));
  if (symmetric) return mask_gram_symmetric_kernel(gram, m, out);
  mask_gram_kernel(gram, m, l, out);
}

template <typename Tiles, typename T>
void multiply_gram(const Tiles& gram, bool symmetric, int64_t m, int64_t l,
                   const T* v,  // (l, t)
                   int64_t t,
                   T* out) {  // (m, t)
  if (symmetric) return mask_gram_matmul_symmetric_kernel(gram, m, v, t, out);
  mask_gram_matmul_kernel(gram, m, l, v, t, out);
}

// Bits past n would be counted, and a table be read past its end. On the GPU they are not looked
// at: the answer would have to be waited for.
inline void check_last_words(const Tensor& masks, const char* name, int64_t n) {
  const int64_t words = words_of(n), used = n % kBitsPerWord;
  if (used == 0) return;
  const uint64_t* word = words_pointer(masks);
  uint64_t stray = 0;
  for (int64_t i = 0; i < masks.size(0); ++i) stray |= word[i * words + words - 1] >> used;
  STD_TORCH_CHECK(stray == 0, name, " must be packed masks of ", n,
                  " tasks, got bits past these. Use pack_masks.");
}

}  // namespace ksm
