// cuda/intrinsics.cuh in plain code.
#pragma once

namespace ksm {

inline cudaError_t most_shared_memory(int* bytes) {
  *bytes = on_host::most_shared;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t allow_shared_memory(void (*)(Parameters...), int64_t bytes) {
  return bytes <= on_host::most_shared ? cudaSuccess : 1;
}

inline void* dynamic_shared_memory() { return on_host::dynamic_memory.data(); }

inline void store_four(float* to, const float (&values)[4]) {
  if (reinterpret_cast<uintptr_t>(to) % 16) std::abort();
  std::copy_n(values, 4, to);
}

// Copies are made when they are waited for, as late as they may be.
struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool held;
};
inline std::vector<Copy> copies[1024];  // of each thread

template <int kBytes>
void copy_async(void* to, const void* from, bool held) {
  const auto addresses = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from);
  if (addresses % kBytes) std::abort();
  copies[threadIdx.x].push_back({to, from, kBytes, held});
}

inline void wait_for_copies() {
  for (const Copy& copy : copies[threadIdx.x]) {
    if (copy.held) {
      std::memcpy(copy.to, copy.from, copy.bytes);
    } else {
      std::memset(copy.to, 0, copy.bytes);
    }
  }
  copies[threadIdx.x].clear();
}

// Calls add(e, word of A, word of B) for the eight words that meet in D's entry e. Every lane shows
// its operands to its warp.
template <typename Add>
void for_met_words(const uint32_t (&a)[4], const uint32_t (&b)[2], const Add& add) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  static Operands lanes[32];
  const unsigned lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  std::memcpy(lanes[lane].a, a, sizeof(a));
  std::memcpy(lanes[lane].b, b, sizeof(b));
  on_host::sync_warp();
  for (unsigned e = 0; e < 4; ++e) {
    const unsigned high = e / 2, column = 2 * q + e % 2;
    for (unsigned word = 0; word < 8; ++word) {  // of a row of A, and of a column of B
      add(e, lanes[4 * g + word % 4].a[high + word / 4 * 2],
          lanes[4 * column + word % 4].b[word / 4]);
    }
  }
  on_host::sync_warp();  // before the next product overwrites the operands
}

inline void mma_and_popc(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  for_met_words(a, b,
                [&](unsigned e, uint32_t x, uint32_t y) { d[e] += __builtin_popcount(x & y); });
}

// The sum as the worst of tensor cores may round it: every addend is cut to 24 bits behind the first
// of the largest, and so is the result to float32, towards zero.
inline float cut_sum(const double (&addends)[17]) {
  double largest = 0, sum = 0;
  for (const double addend : addends) {
    if (!std::isfinite(addend))
      return static_cast<float>(std::accumulate(addends, addends + 17, 0.0));
    largest = std::max(largest, std::abs(addend));
  }
  if (largest == 0) return 0;
  const int unit = std::ilogb(largest) - 24;
  for (const double addend : addends) sum += std::trunc(std::ldexp(addend, -unit));
  sum = std::ldexp(sum, unit);
  const auto rounded = static_cast<float>(sum);
  return std::abs(rounded) > std::abs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
}

// Pairs of numbers, whose values half(pair, 0) and half(pair, 1) are.
template <typename Half>
void mma_of_pairs(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Half& half) {
  double addends[4][17];
  int count[4] = {};
  for_met_words(a, b, [&](unsigned e, uint32_t x, uint32_t y) {
    for (int n = 0; n < 2; ++n) addends[e][count[e]++] = half(x, n) * half(y, n);
  });
  for (int e = 0; e < 4; ++e) {
    addends[e][16] = d[e];
    d[e] = cut_sum(addends[e]);
  }
}

inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_of_pairs(d, a, b, [](uint32_t pair, int n) {
    return double{__bfloat162float({static_cast<uint16_t>(pair >> 16 * n)})};
  });
}

inline void load_matrices(uint32_t (&a)[4], const uint32_t* row) {
  static const uint32_t* rows[32];
  const unsigned lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  rows[lane] = row;
  on_host::sync_warp();
  for (unsigned matrix = 0; matrix < 4; ++matrix) a[matrix] = rows[8 * matrix + g][q];
  on_host::sync_warp();  // before the next load overwrites the pointers
}

inline uint32_t pack_halves(float first, float second) {
  const _Float16 halves[2] = {static_cast<_Float16>(first), static_cast<_Float16>(second)};
  uint32_t pair;
  std::memcpy(&pair, halves, sizeof(pair));
  return pair;
}

inline float half_value(uint32_t pair) {
  _Float16 half;
  std::memcpy(&half, &pair, sizeof(half));
  return static_cast<float>(half);
}

inline void mma_float16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_of_pairs(d, a, b, [](uint32_t pair, int n) { return double{half_value(pair >> 16 * n)}; });
}

}  // namespace ksm
