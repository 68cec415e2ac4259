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
  "${CXX:-c++}" -O1 -std=c++17 -ffp-contract=off -w -iquote "$out" -I"$out" -Icsrc \
    -include $here/cuda.h "$@"
}
for kernels in csrc/cuda/*.cu; do
  compile "$@" -x c++ -c "$kernels" -o "$out/$(basename "$kernels").o"
done
for check in projections masks features; do
  compile "$@" $here/check_$check.cpp csrc/cpu/project_portable.cpp "$out"/*.o -o "$out/$check"
  "$out/$check"
done
