#!/usr/bin/env bash
# Checks the CUDA kernels of projections without a GPU or a CUDA toolkit: cuda_on_host.h runs them.
set -euo pipefail
cd "$(dirname "$0")/.."

out="$(mktemp -d)"
trap 'rm -rf "$out"' EXIT
# In place of CUDA's own headers.
for header in cuda_runtime cuda_runtime_api cuda_fp16 cuda_bf16; do
  : >"$out/$header.h"
done
flags=(-O1 -std=c++17 -ffp-contract=off -Icsrc -w "$@")
"${CXX:-c++}" "${flags[@]}" -include tools/cuda_on_host.h -I"$out" tools/check_cuda_project.cpp \
  csrc/cpu/project_portable.cpp -o "$out/check"
"$out/check"
