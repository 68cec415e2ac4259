// Writing a result that is much larger than the caches: what a Gram matrix of many subsets costs is
// memory, not arithmetic.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <emmintrin.h>
#endif
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ksm {

// From here on malloc maps fresh memory for every tensor and gives it back with the tensor.
constexpr int64_t kLargeBytes = int64_t{32} << 20;

// Asks for 2 MiB pages for the fresh memory of a large result, where the system grants them on
// request only (the usual Linux setting). Otherwise the faults of its 4 KiB pages cost more than
// its computation: 8192 x 8192 float32, 256 tasks, two Zen 3 cores: 200 ms without, 51 ms with.
//
// It can cost more than it saves. In a virtual machine that hands free blocks of 2 MiB back to its
// host, each is 6 ms at its first touch: 800 ms on a Xeon, 155 in small pages, which come from what is
// too small to hand back; 75 and 168 where memory was in use lately. And where memory is in
// fragments, the system may move pages while the call waits: 312 ms. Neither can be seen from here
// before the memory is touched, both end as memory is used again, and other machines have neither.
inline void request_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__)
  if (bytes < kLargeBytes) return;
  constexpr uintptr_t kHugePage = uintptr_t{2} << 20;
  const auto first = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (first + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (first + bytes) / kHugePage * kHugePage;
  // Only a hint: where it is refused, the pages stay small.
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// Writes tiles of a result whose rows are `row_length` long: past the caches where it is large and
// its rows fill whole cache lines, which then need not be read first (82 ms -> 51 ms, as above).
template <typename T>
class TileWriter {
 public:
  TileWriter(T* out, int64_t num_rows, int64_t row_length)
      : out_(out),
        row_length_(row_length),
        past_caches_(num_rows * row_length * int64_t{sizeof(T)} >= kLargeBytes &&
                     row_length * sizeof(T) % kLine == 0 &&
                     reinterpret_cast<uintptr_t>(out) % kLine == 0) {}

  // out[i + r, j + c] = tile[r, c]. The tile's rows, and j columns of the result, fill whole lines.
  template <int64_t kStride>
  void write(const T* tile,  // (rows, columns) of a row-major tile of kStride columns
             int64_t rows, int64_t columns, int64_t i, int64_t j) const {
    for (int64_t r = 0; r < rows; ++r) {
      copy(tile + r * kStride, columns, out_ + (i + r) * row_length_ + j);
    }
  }

  // Orders the writes past the caches before what follows; each thread calls it at its end.
  void finish() const {
#if defined(__x86_64__)
    _mm_sfence();
#endif
  }

 private:
  static constexpr uint64_t kLine = 64;

  void copy(const T* from, int64_t length, T* to) const {
#if defined(__x86_64__)
    if (past_caches_ && length * sizeof(T) % kLine == 0) {
      const auto* source = reinterpret_cast<const __m128i*>(from);
      auto* target = reinterpret_cast<__m128i*>(to);
      const int64_t vectors = length * sizeof(T) / sizeof(__m128i);
      for (int64_t q = 0; q < vectors; ++q) {
        _mm_stream_si128(target + q, _mm_load_si128(source + q));
      }
      return;
    }
#endif
    std::memcpy(to, from, length * sizeof(T));
  }

  T* const out_;
  const int64_t row_length_;
  const bool past_caches_;
};

}  // namespace ksm
