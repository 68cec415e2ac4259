"""Resident memory of this process (Linux)."""

import re
from pathlib import Path


def resident(field: str) -> float:
    """MiB of a field such as ``VmRSS``, what is resident now, or ``VmHWM``, its peak."""
    found = re.search(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def restart_peak() -> None:
    """The peak begins at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
