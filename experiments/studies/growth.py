"""How time and memory grow with p, k and n: the tables of docs/scale.md, in a few minutes.

    python -m experiments.studies.growth

Each line is a process of its own, of one thread. It collects the projected gradients of 64 samples
of a perceptron (p parameters), adds up the Gram matrices of their n tasks in k dimensions, and does
that again. Shown are the processor's seconds of the second time, which other work on the machine
hardly changes, and how far the resident set has grown at its peak.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from typing import Any

from experiments.common import resident, restart_peak

SAMPLES, INPUTS, CLASSES = 64, 64, 10
SMALL = {"p": 10_000, "k": 256, "n": 16}
SIZES = {"p": (100_000, 1_000_000, 10_000_000), "k": (256, 1024, 4096), "n": (16, 64)}


def measure(p: int, k: int, n: int) -> dict[str, float]:
    """Seconds of the features and of the Gram matrices, and MiB at their peaks."""
    import torch
    from torch import nn

    from ksm_ext import Projector, collect_features, ops
    from ksm_ext.network.outputs import log_odds

    torch.manual_seed(0)
    width = max(1, (p - CLASSES) // (INPUTS + CLASSES + 1))
    model = nn.Sequential(nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, CLASSES))
    data = torch.randn(SAMPLES, INPUTS), torch.randint(CLASSES, (SAMPLES,))
    offsets = torch.linspace(0, SAMPLES, n + 1).long()
    found: dict[str, float] = {}

    def timed(name: str, run: Any) -> Any:
        run()
        restart_peak()
        before, start = resident("VmRSS"), time.process_time()
        result = run()
        found[f"{name} seconds"] = time.process_time() - start
        found[f"{name} MiB"] = resident("VmHWM") - before
        return result

    features = timed(
        "features", lambda: collect_features(model, data, log_odds, Projector(k), progress=False)
    )
    timed("Gram", lambda: ops.task_gram(features.gradients, offsets))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", type=json.loads, help="sizes of one measurement, in this process")
    parser.add_argument("--small", action="store_true", help="sizes for a check of the code")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(**arguments.one)))
        return
    lines = [SMALL]
    if not arguments.small:
        base = {name: sizes[0] for name, sizes in SIZES.items()}
        others = [{**base, name: size} for name, sizes in SIZES.items() for size in sizes[1:]]
        lines = [base, *others]
    print("| p | k | n | features | memory | Gram matrices | memory |")
    print("|---|---|---|---|---|---|---|")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for sizes in lines:
        command = [sys.executable, "-m", __spec__.name, "--one", json.dumps(sizes)]
        printed = subprocess.run(
            command, check=True, capture_output=True, text=True, env=env
        ).stdout
        found = json.loads(printed.splitlines()[-1])
        cells = [f"{size:,}" for size in sizes.values()]
        for name in ("features", "Gram"):
            cells += [f"{found[f'{name} seconds']:.3g} s", f"{found[f'{name} MiB']:.0f} MiB"]
        print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
