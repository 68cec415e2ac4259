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

// Every lane shows its operands to its warp.
template <typename Sum, typename Multiply>
void mma_on_host(Sum (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                 const Multiply& multiply) {
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
    double sum = d[e];
    for (unsigned word = 0; word < 8; ++word) {  // of a row of A, and of a column of B
      sum += multiply(lanes[4 * g + word % 4].a[high + word / 4 * 2],
                      lanes[4 * column + word % 4].b[word / 4]);
    }
    d[e] = static_cast<Sum>(sum);
  }
  on_host::sync_warp();  // before the next product overwrites the operands
}

inline void mma_and_popc(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  mma_on_host(d, a, b, [](uint32_t x, uint32_t y) { return __builtin_popcount(x & y); });
}

inline void mma_bfloat16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const auto half = [](uint32_t pair, int n) {
    return double{__bfloat162float({static_cast<uint16_t>(pair >> 16 * n)})};
  };
  mma_on_host(d, a, b, [&](uint32_t x, uint32_t y) {
    return half(x, 0) * half(y, 0) + half(x, 1) * half(y, 1);
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
  mma_on_host(d, a, b, [&](uint32_t x, uint32_t y) {
    return double{half_value(x)} * half_value(y) +
           double{half_value(x >> 16)} * half_value(y >> 16);
  });
}

}  // namespace ksm
