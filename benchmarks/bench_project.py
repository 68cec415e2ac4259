"""Random projections of gradients: ksm_ext against PyTorch and TRAK, float32.

Dense: a group has p = 100,000 coordinates for everybody, because the stored matrix of a million
would take 16 GB. The peers are the matrix product with a stored matrix (1.6 GB, drawn before the
clock starts), and TRAK's BasicProjector, which draws 100 columns at a time (pip install --no-deps
traker; skipped without it).

Sparse: a million coordinates, against the sum of the same tensor, which is what reading it costs in
PyTorch, and against a CountSketch by ``index_add_`` with stored positions and signs.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ksm_ext.ops import Projector, project

K = 4096


def gradients(b: int, p: int) -> Tensor:
    return torch.randn(b, p, generator=torch.Generator().manual_seed(0))


def group_name(what: str, b: int, p: int) -> str:
    return f"project {what} b={b} p={p} k={K} float32, {torch.get_num_threads()} threads"


def check_norms(x: Tensor, y: Tensor) -> None:
    """Squared norms keep their expectation; their standard deviation is 2.2 % at k = 4096."""
    ratios = y.square().sum(1) / x.square().sum(1)
    assert abs(ratios.mean().item() - 1) < 0.1


def dense_ksm_ext(kind: str, x: Tensor) -> Callable[[], Tensor]:
    return lambda: project(x, Projector(K, kind))


def dense_torch_mm_stored(kind: str, x: Tensor) -> Callable[[], Tensor]:
    entries = torch.empty(x.shape[1], K)
    if kind == "rademacher":
        entries.bernoulli_().mul_(2).sub_(1)
    else:
        entries.normal_()
    entries /= K**0.5
    return lambda: x @ entries


def dense_trak(kind: str, x: Tensor) -> Callable[[], Tensor]:
    projectors = pytest.importorskip("trak.projectors")
    kind = {"rademacher": "rademacher", "gaussian": "normal"}[kind]
    projector = projectors.BasicProjector(x.shape[1], K, 0, kind, torch.device("cpu"))
    return lambda: projector.project(x, model_id=0).div_(K**0.5)


DENSE = {
    "ksm_ext": dense_ksm_ext,
    "torch_mm_stored": dense_torch_mm_stored,
    "trak_basic": dense_trak,
}


@pytest.mark.parametrize("kind, b", [("rademacher", 256), ("rademacher", 16), ("gaussian", 256)])
@pytest.mark.parametrize("peer", DENSE)
def bench_dense(benchmark, peer, kind, b):
    x = gradients(b, 100_000)
    benchmark.group = group_name(kind, *x.shape)
    run = DENSE[peer](kind, x)
    results = []
    rounds = 3 if peer == "ksm_ext" and kind == "rademacher" else 1
    benchmark.pedantic(lambda: results.append(run()), rounds=rounds)
    check_norms(x, results[-1])


def sparse_ksm_ext(x: Tensor, sparsity: int, hadamard: bool) -> Callable[[], Tensor]:
    projection = Projector(K, sparsity=sparsity, hadamard=hadamard)
    return lambda: project(x, projection)


def sparse_torch_sum(x: Tensor, sparsity: int, hadamard: bool) -> Callable[[], Tensor]:
    return x.sum


def sparse_torch_index_add(x: Tensor, sparsity: int, hadamard: bool) -> Callable[[], Tensor]:
    p, segment = x.shape[1], K // sparsity
    starts = torch.arange(sparsity)[:, None] * segment
    outputs = torch.randint(segment, (sparsity, p)) + starts
    signs = torch.randint(2, (sparsity, p)).mul(2).sub(1).float() / sparsity**0.5

    def run() -> Tensor:
        y = torch.zeros(len(x), K)
        for t in range(sparsity):
            y.index_add_(1, outputs[t], x * signs[t])
        return y

    return run


SPARSE = {
    "ksm_ext": sparse_ksm_ext,
    "torch_sum": sparse_torch_sum,
    "torch_index_add": sparse_torch_index_add,
}


@pytest.mark.parametrize("sparsity, hadamard", [(1, False), (2, False), (4, False), (1, True)])
@pytest.mark.parametrize("peer", SPARSE)
def bench_sbp(benchmark, peer, sparsity, hadamard):
    x = gradients(64, 1_000_000)
    what = f"sbp s={sparsity}{' hadamard' if hadamard else ''}"
    benchmark.group = group_name(what, *x.shape)
    run = SPARSE[peer](x, sparsity, hadamard)
    if peer != "torch_sum":
        check_norms(x, run())
    benchmark.pedantic(run, rounds=3 if peer == "torch_index_add" else 7, warmup_rounds=1)


MEMORY_SCRIPT = """
import re, time, torch
from pathlib import Path
from ksm_ext.ops import Projector, project

def peak_mb():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

x = torch.randn(16, 1_000_000)
for kind in ("sbp", "rademacher"):
    before = peak_mb()
    start = time.perf_counter()
    project(x, Projector(4096, kind))
    print(kind, time.perf_counter() - start, before, peak_mb())
"""


def bench_memory_of_a_million_coordinates(capsys):
    """Peak memory of b = 16, p = 1,000,000, k = 4096, whose matrix would take 16 GB."""
    script = [sys.executable, "-c", MEMORY_SCRIPT]
    result = subprocess.run(script, capture_output=True, text=True, check=True)
    with capsys.disabled():
        for line in result.stdout.splitlines():
            kind, seconds, before, peak = line.split()
            print(
                f"\nproject {kind} b=16 p=1000000 k={K}: {float(seconds):.2f} s, peak memory of "
                f"the process {float(peak):.0f} MB, {float(before):.0f} MB of it before the call"
            )
            assert float(peak) - float(before) < 64
