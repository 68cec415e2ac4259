"""How far one call raises the peak of a process, which is all its own."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

needs_linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the peak restarts on Linux only"
)

SCRIPT = """
import re, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
exec(sys.argv[2])

def resident(field):
    text = Path("/proc/self/status").read_text()
    return int(re.search(field + r":\\s*(\\d+) kB", text)[1]) / 1024

Path("/proc/self/clear_refs").write_text("5")  # the peak restarts at what is resident now
before = resident("VmRSS")
result = run()
print("MiB", resident("VmHWM") - before)
"""


def peak_growth(prepare: str) -> float:
    """MiB that ``run()`` adds at its peak, where ``prepare`` is Python that defines ``run``."""
    command = [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), prepare]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"MiB ([\d.]+)", printed)
    assert found, printed
    return float(found[1])
