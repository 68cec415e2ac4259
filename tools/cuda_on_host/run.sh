#!/usr/bin/env bash
# Checks the CUDA kernels without a GPU or a CUDA toolkit: cuda.h runs them on the host.
set -euo pipefail
cd "$(dirname "$0")/../.."

here=tools/cuda_on_host
out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
mkdir "$out/cuda"
cp $here/intrinsics.cuh "$out/cuda" # in place of ours
for header in cuda_runtime cuda_runtime_api cuda_fp16 cuda_bf16; do
  : >"$out/$header.h" # in place of CUDA's own
done
compile() {
  # Fortified jumps do not leave a stack.
  "${CXX:-c++}" -O1 -std=c++17 -ffp-contract=off -w -U_FORTIFY_SOURCE -iquote "$out" -I"$out" \
    -Icsrc -include $here/cuda.h ${CXXFLAGS:-} "$@"
}
build() { compile -x c++ -c "$1" -o "$out/$(basename "$1").o"; }
check() {
  compile "$here/check_$1.cpp" csrc/cpu/kernels_portable.cpp "$out"/*.o -o "$out/$1"
  "$out/$1"
}
export here out
export -f compile build check
ls csrc/cuda/*.cu | xargs -P "$(nproc)" -I{} bash -euc 'build {}'
printf '%s\n' projections masks features | xargs -P "$(nproc)" -I{} bash -euc 'check {}'
