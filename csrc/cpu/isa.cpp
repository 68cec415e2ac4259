#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ksm {
namespace {

bool cpu_has(Isa isa) {
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2");
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vpopcntdq");
#else
  return false;
#endif
}

constexpr Isa kBestFirst[] = {Isa::kAvx512, Isa::kAvx2, Isa::kPortable};

Isa choose_isa() {
  const char* request = std::getenv("KSM_EXT_CPU_ISA");
  for (const Isa isa : kBestFirst) {
    if (request && *request ? request == std::string(name_of(isa)) && cpu_has(isa) : cpu_has(isa))
      return isa;
  }
  std::string available;
  for (const Isa isa : kBestFirst) {
    if (cpu_has(isa)) available += (available.empty() ? "" : ", ") + std::string(name_of(isa));
  }
  throw std::runtime_error("KSM_EXT_CPU_ISA must be one of {" + available + "} on this CPU, got " +
                           request + ". Unset it to use the best of them.");
}

}  // namespace

Isa cpu_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    case Isa::kPortable: return "portable";
  }
  return "portable";
}

}  // namespace ksm
