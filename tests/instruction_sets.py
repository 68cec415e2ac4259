"""What a test module computes with every instruction set of this CPU."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ksm_ext.build_info import build_info

ORDER = ("portable", "avx2", "avx512")


def digest(tensors: Iterable[Tensor]) -> str:
    """The same in every process that agrees bit for bit, signs of zeros included."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.numpy().tobytes())
    return found.hexdigest()


def run_with(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with one instruction set; it finds what this process does, and the tests."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KSM_EXT_CPU_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def digests_of(module: str, function: str = "results_of_all") -> dict[str, str]:
    """The digest of what ``module.function()`` returns, by instruction set."""
    code = f"import {module}, instruction_sets as s; print(s.digest({module}.{function}()))"
    found = {}
    for isa in ORDER[: ORDER.index(str(build_info()["cpu_instruction_set"])) + 1]:
        result = run_with(isa, code)
        assert result.returncode == 0, result.stderr
        found[isa] = result.stdout.strip()
    return found
