"""What a module of the tests computes with every instruction set of this CPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from ksm_ext.build_info import build_info
from ksm_ext.identity import fingerprint

ORDER = ("portable", "avx2", "avx512")


def digests(results: Mapping[str, Iterable[Tensor]]) -> dict[str, str]:
    """By name: the same in every process that agrees bit for bit, signs of zeros included."""
    return {name: fingerprint(("", each) for each in found) for name, found in results.items()}


def run_with(isa: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run Python with one instruction set; it finds what this process does, and the tests."""
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "KSM_EXT_CPU_ISA": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def check_every_instruction_set(module: str) -> None:
    """Assert that ``module.results_of_all()``, tensors by name, has the same bits with each."""
    code = f"import json, {module} as m, instruction_sets as s"
    code += "; print(json.dumps(s.digests(m.results_of_all())))"
    found = []
    for isa in ORDER[: ORDER.index(str(build_info()["cpu_instruction_set"])) + 1]:
        result = run_with(isa, code)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout))
        assert found[0] and found[-1] == found[0], isa
