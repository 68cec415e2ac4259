// ksm_ext._build: the facts of this build, as setup.py and the compiler knew them. No tensor passes
// here: operators go through the dispatcher (ops.cpp).
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

namespace {

const char* compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_build, m) {
  m.doc() = "Facts of this build.";
  m.attr("torch_version") = KSM_TORCH_VERSION;
  m.attr("cuda") = static_cast<bool>(KSM_WITH_CUDA);
  m.attr("nvcc_version") = KSM_NVCC_VERSION;
  m.attr("cuda_architectures") = KSM_CUDA_ARCHITECTURES;
  m.attr("compiler") = compiler();
  m.def(
      "cpu_instruction_set", [] { return ksm::name_of(ksm::cpu_isa()); },
      "The instruction set in use on this CPU: avx512, avx2 or portable.");
}
