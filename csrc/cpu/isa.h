// Which instruction set the CPU kernels use: the best this CPU has, or what KSM_EXT_CPU_ISA names.
#pragma once

namespace ksm {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The choice, made once per process. Throws std::runtime_error if KSM_EXT_CPU_ISA is not one of
// avx512, avx2, portable, or names one that this CPU lacks.
Isa cpu_isa();

// "avx512", "avx2" or "portable".
const char* name_of(Isa isa);

}  // namespace ksm
