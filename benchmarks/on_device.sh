#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most 6 minutes: build, tests, sanitizers, limits of the
# card, every operator against its peers, and a table of it all last. Results go to $OUT/<gpu>.json
# and each step's log beside it, or to benchmarks/results/ and build/on_device/.
#
#     bash benchmarks/on_device.sh                        # needs torch with CUDA, nvcc; no network
#     bash benchmarks/on_device.sh --device cpu --small   # the same steps, in small, without a GPU
#
# Every step has a time limit of its own and an entry in the results, so that one that fails or hangs
# costs no other. TOTAL (seconds), PYTHON, TORCH_CUDA_ARCH_LIST (9.0) and, where there is no git,
# COMMIT may be set.
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

total=${TOTAL:-360}
python=${PYTHON:-python3}
work=$PWD/build/on_device
logs=${OUT:-$work}
export OUT=${OUT:-$PWD/benchmarks/results}
rm -rf "$work"
mkdir -p "$OUT" "$work" "$logs"
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0}
# ninja lies beside Python; nvcc and compute-sanitizer in the toolkit.
export PATH="$PATH:$(dirname "$($python -c 'import sys; print(sys.executable)')")"
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export TORCHINDUCTOR_CACHE_DIR="$work/inductor" # what is compiled beside the tests is there for the rows
RUN=$(date +%s)
export RUN
measure="$python benchmarks/device_ops.py --device $device $small"

# errors LOG: what went wrong: failing tests counted by name, with their reasons, then other errors.
errors() {
  {
    grep -oE '\] (FAILED|ERROR) tests/[^[ ]+' "$1" | sort | uniq -c | sort -rn | head -n 20
    grep -E '^(FAILED|ERROR) ' "$1" | head -n 25
    grep -vE '^(FAILED|ERROR) |PASSED|SKIPPED|ptxas info' "$1" |
      grep -E 'error|Error|^E  |========= ' | awk '!seen[$0]++' | head -n 25
  } | cut -c -150
}

# step NAME LIMIT COMMAND...: run it within its limit and what is left, and keep how it ended.
step() {
  local name=$1 limit=$2 left=$((total - SECONDS)) start=$SECONDS status=0 word log=$logs/$1.log
  shift 2
  if [ "$left" -lt 5 ]; then
    echo "no time left" >"$log"
    status=124
  else
    # pytest prints its failures when interrupted.
    timeout -s INT -k 20 "$((limit < left ? limit : left))" "$@" >"$log" 2>&1 || status=$?
  fi
  case $status in
    0) word=passed ;;
    124 | 137) word="out of time" ;;
    *) word="failed ($status)" ;;
  esac
  printf '%s|%s|%d\n' "$name" "$word" $((SECONDS - start)) >>"$work/steps.txt"
  local shown="== $name: $word after $((SECONDS - start)) s"
  [ "$status" = 0 ] || shown+=$'\n'$(errors "$log")$'\n-- its end:\n'$(tail -n 8 "$log" | cut -c -150)
  echo "$shown" # at once, since steps run beside each other
  return $status
}

build() {
  if [ "$device" = cpu ]; then
    $python -c "import ksm_ext; print(ksm_ext.build_info())"
    return
  fi
  $python -c "import torch; print(torch.__version__, torch.cuda.get_device_name())" || return
  export KSM_EXT_CUDA=1
  if $python -c "import setuptools as s; exit(int(s.__version__.split('.')[0]) >= 77)"; then
    # It is too old to read pyproject.toml, which building in place does not need.
    mv pyproject.toml "$work/"
    trap 'mv "$work/pyproject.toml" .' EXIT
  fi
  $python setup.py -q build_ext --inplace
}

tests() {
  if [ "$device" = cpu ]; then
    $python -m pytest -q -m "not slow" tests/ops/test_operators.py
  else
    local together=""
    $python -c "import xdist" && together="-n 8 --dist worksteal --max-worker-restart 30"
    # Warnings of a torch that CI never sees are no errors.
    # shellcheck disable=SC2046
    COLUMNS=160 KSM_EXT_REQUIRE_CUDA=1 OMP_NUM_THREADS=2 $python -m pytest $together -v -m cuda --tb=short -rfE --maxfail 400 \
      -o filterwarnings=default -o faulthandler_timeout=60 -p no:cacheprovider --durations=10 \
      --continue-on-collection-errors \
      --deselect tests/ops/test_operators.py::test_another_device_than_the_current_one \
      $(grep -rlE 'mark\.cuda|\bdevice\b' --include 'test_*.py' tests)
  fi
}

sanitize() {
  local sizes="--sizes one odd"
  [ "$1" = racecheck ] || sizes="$sizes aligned" # which the slower tool leaves out
  if [ "$device" = cpu ]; then
    $python tools/cuda_smoke.py --device cpu $sizes
  else
    # Our kernels alone: neither torch's own, nor its questions about what the driver has.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 OMP_NUM_THREADS=2 compute-sanitizer --tool "$1" --error-exitcode 9 \
      --kernel-name kernel_substring=ksm --report-api-errors no $python tools/cuda_smoke.py $sizes
  fi
}

ceilings() {
  $measure --ceilings || return
  [ "$device" = cuda ] || return 0
  nvcc -O3 -std=c++17 -Icsrc -gencode=arch=compute_90a,code=sm_90a -o "$work/ceilings" \
    tools/cuda_ceilings.cu || return
  "$work/ceilings" >"$work/ceilings.txt"
  local status=$?
  $measure --printed-ceilings "$work/ceilings.txt" || return
  return $status
}

# A row that breaks its process is not tried again; the next process continues behind it.
rows() {
  local before=none after=""
  until $measure --parts project masks gram glm softmax hvp --until "$until"; do
    after=$(cat "$OUT"/*.json | cksum)
    [ "$after" != "$before" ] || return 1
    before=$after
  done
}

results() {
  $measure --steps "$work/steps.txt" "$logs"
  $python benchmarks/results_table.py --from "$OUT" --brief $small
}

export -f build tests sanitize ceilings rows results
export device small python measure work logs

if step build 120 bash -c build; then
  step memcheck 120 bash -c "sanitize memcheck" &
  step racecheck 120 bash -c "sanitize racecheck" &
  step compile 90 $measure --compile &
  step tests 120 bash -c tests
  wait
  step ceilings 40 bash -c ceilings # from here on alone on the card
  until=$(($(date +%s) + total - SECONDS - 25))
  export until
  step rows $((total - SECONDS - 15)) bash -c rows
fi
echo "== $SECONDS s; results in $OUT"
timeout -k 5 40 bash -c results
