#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 8 minutes: build, tests, sanitizers, limits of the
# card, and every operator against its peers. Results go to $OUT/<gpu>.json, or benchmarks/results/.
#
#     bash benchmarks/on_device.sh                        # needs torch with CUDA, nvcc; no network
#     bash benchmarks/on_device.sh --device cpu --small   # the same steps, in small, without a GPU
#
# Every step has a time limit of its own and an entry in the results, so that one that fails or hangs
# costs no other. TOTAL (seconds), PYTHON and TORCH_CUDA_ARCH_LIST (9.0) may be set.
set -uo pipefail
cd "$(dirname "$0")/.."

device=cuda small=""
while [ $# -gt 0 ]; do
  case "$1" in
    --device) device=$2; shift ;;
    --small) small=--small ;;
    *) echo "unknown argument $1" >&2; exit 2 ;;
  esac
  shift
done

total=${TOTAL:-470}
python=${PYTHON:-python3}
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # compute-sanitizer
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD"
export OUT=${OUT:-$PWD/benchmarks/results}
work=$PWD/build/on_device
rm -rf "$work"
mkdir -p "$OUT" "$work"
measure="$python benchmarks/device_ops.py --device $device --steps $work"

# step NAME LIMIT COMMAND...: run it within its limit and what is left, and keep how it ended.
step() {
  local name=$1 limit=$2 left=$((total - SECONDS)) start=$SECONDS status=0
  shift 2
  local log="$work/$name.log"
  if [ "$left" -lt 10 ]; then
    echo "no time left" >"$log"
    status=124
  else
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$log" 2>&1 || status=$?
  fi
  case $status in
    0) word=passed ;;
    124 | 137) word="out of time" ;;
    *) word="failed ($status)" ;;
  esac
  printf '== %s: %s after %d s\n' "$name" "$word" $((SECONDS - start))
  [ "$status" = 0 ] || tail -n 15 "$log"
  printf '%s|%s|%d\n' "$name" "$word" $((SECONDS - start)) >>"$work/steps.txt"
  return $status
}

build() {
  if [ "$device" = cpu ]; then
    $python -c "import ksm_ext; print(ksm_ext.build_info())"
  else
    export KSM_EXT_CUDA=1
    $python setup.py -q build_ext --inplace && return
    # An old setuptools cannot read pyproject.toml, which building in place does not need.
    local status=0
    mv pyproject.toml "$work/"
    $python setup.py -q build_ext --inplace || status=$?
    mv "$work/pyproject.toml" .
    return $status
  fi
}

tests() {
  if [ "$device" = cpu ]; then
    $python -m pytest -q -m "not slow" tests/test_operators.py
  else
    local together=""
    $python -c "import xdist" 2>/dev/null && together="-n 4 --dist worksteal"
    # shellcheck disable=SC2046
    KSM_EXT_REQUIRE_CUDA=1 $python -m pytest $together -q -m cuda --tb=short -p no:cacheprovider \
      --continue-on-collection-errors \
      $(grep -lE 'mark\.cuda|\bdevice\b' tests/test_*.py)
  fi
}

ceilings() {
  $measure $small --part ceilings || return
  [ "$device" = cuda ] || return 0
  "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc" -O3 -std=c++17 -Icsrc \
    -gencode=arch=compute_90a,code=sm_90a -o "$work/ceilings" tools/cuda_ceilings.cu || return
  "$work/ceilings" >"$work/ceilings.txt" || return
  $measure --printed-ceilings "$work/ceilings.txt"
}

sanitize() {
  local sizes="--sizes one odd"
  if [ "$device" = cpu ]; then
    $python tools/cuda_smoke.py --device cpu $sizes
  else
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
      $python tools/cuda_smoke.py $sizes
  fi
}

export -f build tests ceilings sanitize
export device small python measure work

step build 150 bash -c build || exit 1
step ceilings 45 bash -c ceilings
step smoke 40 $python tools/cuda_smoke.py --device "$device" ${small:+--sizes one}
step tests 120 bash -c tests
for part in project masks gram glm softmax hvp; do
  # Rows stop a little before they would be stopped.
  step "$part" 50 $measure $small --part "$part" --limit 30
done
for tool in memcheck racecheck; do
  step "$tool" 75 bash -c "sanitize $tool"
done
$measure # keeps how the last steps ended
echo "$SECONDS s; results in $OUT"
