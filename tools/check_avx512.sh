#!/usr/bin/env bash
# Checks the AVX-512 source on a CPU that need not have it: SIMDe (libsimde-dev) spells every
# intrinsic out in plain C++.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! echo '#include <simde/x86/avx512.h>' | "${CXX:-c++}" -E -x c++ - >/dev/null 2>&1; then
  echo "check_avx512 needs the headers of SIMDe: apt-get install libsimde-dev" >&2
  exit 77 # skipped
fi
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
flags=(-O1 -std=c++17 -ffp-contract=off -Icsrc -w -Wno-psabi)
"${CXX:-c++}" "${flags[@]}" -c csrc/cpu/kernels_avx512.cpp -o "$out/avx512.o" \
  -DKSM_EMULATE_AVX512 -D__mmask16=simde__mmask16 -DSIMDE_ENABLE_NATIVE_ALIASES -include simde/x86/avx512.h
"${CXX:-c++}" "${flags[@]}" tools/check_avx512.cpp csrc/cpu/kernels_portable.cpp "$out/avx512.o" \
  -o "$out/check"
"$out/check"
