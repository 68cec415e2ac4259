"""Measure a device's limits and every operator on it, and keep the results as JSON.

    python benchmarks/device_ops.py --ceilings
    python benchmarks/device_ops.py --parts project masks

writes ``<gpu>.json`` to ``$OUT``, or to ``benchmarks/results``, after every row: what is cut off
keeps what it has. After an error that leaves the GPU unusable, or a row that hangs, the process
ends; started again with the same ``$RUN``, it continues behind that row. ``on_device.sh`` runs all
parts; ``--device cpu --small`` runs the same code in seconds without a GPU. Methods of a row take
turns; times are medians, of CUDA events where there is a GPU, behind a write of 256 MiB that
empties its L2 cache.
"""

import argparse
import faulthandler
import gc
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rows import PARTS, Builder, Row, Runner, rows_of
from torch import Tensor

from ksm_ext.atomic_write import write_whole
from ksm_ext.build_info import build_info

FLUSHED_BYTES = 2**28
SECONDS_OF_A_ROW, MOST_TURNS, FEWEST_TURNS = 0.6, 50, 3
HUNG_AFTER = 60.0  # seconds of one row; compilation by Inductor included


class Results:
    """A JSON file that is whole after every change."""

    def __init__(self, folder: Path, device: torch.device) -> None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.path = folder / f"{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.content: dict[str, Any] = {"environment": {}, "steps": {}, "ceilings": {}, "rows": {}}
        if self.path.exists():
            self.content |= json.loads(self.path.read_text())
        commit = os.environ.get("COMMIT") or printed("git", "rev-parse", "HEAD")
        # Of every number, since a run that is cut off leaves those of an earlier one.
        self.origin = {"card": name, "commit": commit, "run": os.environ.get("RUN", "")}

    def put(self, section: str, name: str, value: dict[str, Any]) -> None:
        self.content[section][name] = value | self.origin
        write_whole(self.path, json.dumps(self.content, indent=1).encode())

    def has(self, row: str) -> bool:
        """Whether this run has been at the row before."""
        run = self.content["rows"].get(row, {}).get("run")
        return bool(self.origin["run"]) and run == self.origin["run"]


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": time.strftime("%Y-%m-%d"),
        **{f"build {name}": value for name, value in build_info().items()},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver": printed("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts


def printed(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Clock:
    """Times calls on a device, in seconds."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(
            FLUSHED_BYTES if self.cuda else 1, dtype=torch.int8, device=device
        )

    def once(self, run: Runner) -> float:
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flushed.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def medians(self, runs: dict[str, Runner], seconds: float) -> dict[str, dict[str, float]]:
        """The median of each method's turns, and their spread: the middle half over the median."""
        turns = {name: [self.once(run)] for name, run in runs.items()}  # warm already
        total = max(1e-6, sum(first for [first] in turns.values()))
        for _ in range(min(MOST_TURNS, max(FEWEST_TURNS, int(seconds / total)))):
            for name, run in runs.items():
                turns[name].append(self.once(run))
        return {name: summary(sorted(times)) for name, times in turns.items()}


def summary(ordered: list[float]) -> dict[str, float]:
    quarter, middle = len(ordered) // 4, median(ordered)
    spread = (ordered[-1 - quarter] - ordered[quarter]) / middle
    return {"seconds": middle, "spread": spread}


# -- limits of the device -----------------------------------------------------------------------


def ceilings(
    device: torch.device, small: bool
) -> dict[str, tuple[str, float, Callable[[], Runner]]]:
    """Unit, amount of one call, and what builds the call."""
    size = 2**20 if small else 2**30
    side = 128 if small else 8192
    flops = 2.0 * side**3

    def product(dtype: torch.dtype, precision: str = "highest") -> Runner:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

        def run() -> Tensor:
            torch.set_float32_matmul_precision(precision)
            return a @ b

        return run

    def integers() -> Runner:
        a, b = (torch.randint(-9, 9, (side, side), device=device).to(torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b)

    def moved(how: str) -> Runner:
        x, y = (torch.ones(size // 4, device=device) for _ in range(2))
        return {"copy": lambda: y.copy_(x), "write": lambda: y.fill_(1.0), "read": x.sum}[how]

    def launches(graphed: bool) -> Runner:
        x = torch.zeros(1, device=device)

        def run() -> None:
            for _ in range(100):
                x.add_(1)

        if not graphed:
            return run
        if device.type != "cuda":
            raise ModuleNotFoundError("CUDA graphs need a GPU")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    return {
        "copy": ("bytes/s, read and written", 2.0 * size, lambda: moved("copy")),
        "write": ("bytes/s", float(size), lambda: moved("write")),
        "read": ("bytes/s", float(size), lambda: moved("read")),
        "bf16": ("FLOP/s", flops, lambda: product(torch.bfloat16)),
        "fp16": ("FLOP/s", flops, lambda: product(torch.float16)),
        "tf32": ("FLOP/s", flops, lambda: product(torch.float32, "high")),
        "fp32": ("FLOP/s", flops, lambda: product(torch.float32)),
        "fp64": ("FLOP/s", flops, lambda: product(torch.float64)),
        "int8": ("OP/s", flops, integers),
        "launches": ("launches/s", 100.0, lambda: launches(False)),
        "launches in a graph": ("launches/s", 100.0, lambda: launches(True)),
    }


def measure_ceilings(results: Results, clock: Clock, device: torch.device, small: bool) -> None:
    precision = torch.get_float32_matmul_precision()
    for name, (unit, amount, build) in ceilings(device, small).items():
        try:
            run = build()
            run()
            seconds = clock.medians({name: run}, 0.01 if small else 0.5)[name]["seconds"]
            results.put("ceilings", name, {"unit": unit, "rate": amount / seconds})
        except Exception as error:  # whatever it is, the next one may work
            results.put("ceilings", name, {"unit": unit, "not run": reason(error)})
        torch.set_float32_matmul_precision(precision)
        print(name, results.content["ceilings"][name], flush=True)


def keep_printed_ceilings(results: Results, lines: Path) -> None:
    """The lines ``name|unit|rate`` that tools/cuda_ceilings.cu prints."""
    for name, unit, rate in cells_of(lines):
        results.put("ceilings", name, {"unit": unit, "rate": float(rate)})


def cells_of(lines: Path) -> list[list[str]]:
    return [line.split("|") for line in lines.read_text().splitlines()]


def keep_steps(results: Results, steps: Path, logs: Path) -> None:
    """The lines ``name|status|seconds`` of on_device.sh, with the log's end of those that fail."""
    for name, status, seconds in cells_of(steps):
        log = (logs / f"{name}.log").read_text(errors="replace").strip().splitlines()
        step = {"status": status, "seconds": float(seconds)}
        if status != "passed":
            step["last lines"] = log[-12:]
        results.put("steps", name, step)


# -- operators ----------------------------------------------------------------------------------


def measure_row(
    row: Row, results: Results, clock: Clock, device: torch.device, small: bool
) -> None:
    """Every method of a row that can run, ours first."""
    found: dict[str, Any] = {"limit": row.limit, "amount": row.amount, "methods": {}}
    methods, runs = found["methods"], {}
    cut = {"not run": "never finished"}  # what stays of a row that ends the process
    results.put("rows", row.title, found | cut)
    try:
        for name, build in row.problem(device).methods.items():
            runs |= started(name, build, methods, clock, device)
            results.put("rows", row.title, found | cut)
            if broken(device):
                break
        else:
            methods |= clock.medians(runs, 0.01 if small else SECONDS_OF_A_ROW)
    except Exception as error:
        found["not run"] = reason(error)
    rate = results.content["ceilings"].get(row.limit, {}).get("rate")
    ours = methods.get("ksm_ext", {}).get("seconds")
    if rate and ours:
        found["share of limit"] = row.amount / rate / ours
    results.put("rows", row.title, found)


def started(
    name: str, build: Builder, methods: dict[str, Any], clock: Clock, device: torch.device
) -> dict[str, Runner]:
    """The method by its name once it has run; ``methods`` is told why it has not."""
    methods[name] = {"not run": "never finished"}
    try:
        run = build()
        run()
        synchronise(device)
        if name == "ksm_ext":  # before the others, in case that one of them ends the process
            methods |= clock.medians({name: run}, 0.01)
    except Exception as error:
        methods[name] = {"not run": reason(error)}
        return {}
    return {name: run}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def broken(device: torch.device) -> bool:
    """Whether an error has left the device unusable for the rest of the process."""
    try:
        synchronise(device)
    except Exception:
        return True
    return False


def reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"no {error.name}"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def compile_all(device: torch.device, small: bool) -> None:
    """Fill Inductor's cache, so that no row waits for it."""
    for row in rows_of("small" if small else "gpu", ("masks", "gram")):
        for name, build in row.problem(device).methods.items():
            if "compiled" in name:
                build()
                print(row.title, name, flush=True)


def measure_parts(
    parts: list[str], results: Results, device: torch.device, small: bool, until: float
) -> None:
    clock = Clock(device)
    for row in rows_of("small" if small else "gpu", parts):
        if results.has(row.title):
            continue
        if time.time() > until:
            results.put("rows", row.title, {"not run": "no time left"})
            continue
        faulthandler.dump_traceback_later(HUNG_AFTER, exit=True)
        measure_row(row, results, clock, device, small)
        print(row.title, json.dumps(results.content["rows"][row.title]), flush=True)
        gc.collect()
        if broken(device):
            sys.exit(f"{row.title} left {device} unusable")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    faulthandler.cancel_dump_traceback_later()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ceilings", action="store_true", help="measure the limits of the device")
    parser.add_argument("--compile", action="store_true", help="fill the cache of torch.compile")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a check of the code")
    parser.add_argument(
        "--until", type=float, default=float("inf"), help="Unix time, after which no row starts"
    )
    parser.add_argument(
        "--steps", type=Path, nargs=2, help="what on_device.sh noted, and the folder of its logs"
    )
    parser.add_argument("--printed-ceilings", type=Path, help="what tools/cuda_ceilings.cu printed")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    default = Path(__file__).parent / "results"
    results = Results(Path(os.environ.get("OUT", default)), device)
    if arguments.steps:
        keep_steps(results, *arguments.steps)
    if arguments.printed_ceilings:
        keep_printed_ceilings(results, arguments.printed_ceilings)
    if arguments.ceilings:
        results.put("environment", "facts", environment(device))
        measure_ceilings(results, Clock(device), device, arguments.small)
    if arguments.compile:
        compile_all(device, arguments.small)
    if arguments.parts:
        measure_parts(arguments.parts, results, device, arguments.small, arguments.until)


if __name__ == "__main__":
    main()
