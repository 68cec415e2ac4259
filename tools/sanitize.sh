#!/usr/bin/env bash
# Runs the operators' tests on CPU kernels built with AddressSanitizer and
# UndefinedBehaviorSanitizer, in a folder of their own. PYTHON has torch and pytest; arguments go
# to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
built=build/sanitize
mkdir -p "$built"
KSM_EXT_SANITIZE=1 KSM_EXT_CUDA=0 "$python" setup.py -q egg_info --egg-base "$built" build --build-lib "$built" \
  --build-temp "$built/temp" >"$built.log" 2>&1 || {
  cat "$built.log"
  exit 1
}
grep -q __asan_report "$built"/ksm_ext/_C*.so # else nothing would be checked

# The runtime comes before everything else, and libstdc++ with it, or exceptions pass it by unseen.
# Python leaks what it allocates once.
runtime() { "${CXX:-c++}" -print-file-name="$1"; }
export LD_PRELOAD="$(runtime libasan.so) $(runtime libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1
export UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1

PYTHONPATH="$built" "$python" -P -c "import ksm_ext; assert '$built' in ksm_ext.__file__"
# Without what compiles or starts processes, where the kernels see nothing new, and without what
# takes gigabytes or many draws.
skipped="compile or opcheck or gradcheck or transforms or derivatives or instruction_set or cuda"
skipped+=" or 32_bits or moments or expectation or tails"
# Every kernel has a test file of its name.
tests=(tests/surrogates/test_masks.py)
for kernel in csrc/cpu/*.cpp; do
  of_kernel="tests/ops/test_$(basename "$kernel" .cpp).py"
  if [ -e "$of_kernel" ]; then tests+=("$of_kernel"); fi
done
"$python" -P -m pytest -q -p no:cacheprovider -o pythonpath="$built ." \
  -m "not slow and not cuda" -k "not ($skipped)" \
  "${tests[@]}" "$@"
