"""How far one call raises the peak of a process, which is all its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak restarts on Linux only"
)

HERE = Path(__file__).parent
SCRIPT = """
import sys
sys.path[:0] = sys.argv[2:]
exec(sys.argv[1])
from experiments.common import resident, restart_peak
restart_peak()
before = resident("VmRSS")
result = run()
print("MiB", resident("VmHWM") - before)
"""


def peak_growth(prepare: str) -> float:
    """MiB that ``run()`` adds at its peak, where ``prepare`` is Python that defines ``run``."""
    command = [sys.executable, "-c", SCRIPT, prepare, str(HERE), str(HERE.parent)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"MiB ([\d.]+)", printed)
    assert found, printed
    return float(found[1])
