// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): the only source
// of randomness, a pure function of a key and a counter on the host and on the device.
#pragma once

#include <cstdint>

#include "host_device.h"

// Functions are static: each instruction set compiles its own copy, and the linker must not pick one
// for all.
namespace ksm {

struct Words {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxA = 0xD2511F53u, kPhiloxB = 0xCD9E8D57u;        // multipliers
constexpr uint32_t kPhiloxKey0 = 0x9E3779B9u, kPhiloxKey1 = 0xBB67AE85u;  // steps of the key
constexpr int kPhiloxRounds = 10;

KSM_HOST_DEVICE static inline Words philox_round(Words c, uint32_t key0, uint32_t key1) {
  const uint64_t a = uint64_t{kPhiloxA} * c.word[0], b = uint64_t{kPhiloxB} * c.word[2];
  return {{static_cast<uint32_t>(b >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(b),
           static_cast<uint32_t>(a >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(a)}};
}

KSM_HOST_DEVICE static inline Words philox(uint64_t seed, Words counter) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += kPhiloxKey0;
    key1 += kPhiloxKey1;
  }
  return counter;
}

// A number in 0 .. bound - 1 from 32 random bits.
KSM_HOST_DEVICE static inline uint32_t below(uint32_t word, uint32_t bound) {
  return static_cast<uint32_t>(uint64_t{word} * bound >> 32);
}

}  // namespace ksm
