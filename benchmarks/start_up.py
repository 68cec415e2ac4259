"""What starting costs: ``python benchmarks/start_up.py`` prints seconds of processor time.

The least of five runs each, which take turns, and the ratio to ``import torch``.
"""

import resource
import subprocess
import sys

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "import ksm_ext": ["-c", "import ksm_ext"],
    "import ksm_ext, fit_surrogate": ["-c", "import ksm_ext; ksm_ext.fit_surrogate"],
    "import ksm_ext, every name": ["-c", "from ksm_ext import *"],
    "ksm --help": ["-m", "ksm_ext.cli", "--help"],
    "ksm fit --help": ["-m", "ksm_ext.cli", "fit", "--help"],
}


def seconds(arguments: list[str]) -> float:
    """Processor time, user and system, of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    turns = [{name: seconds(command) for name, command in COMMANDS.items()} for _ in range(5)]
    least = {name: min(turn[name] for turn in turns) for name in COMMANDS}
    for name, time in least.items():
        print(f"{name:30} {time:5.2f} s {time / least['import torch']:6.2f} x import torch")
