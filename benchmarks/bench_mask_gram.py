"""RBF Gram matrices of subset masks: ksm_ext against correct formulas of PyTorch and scikit-learn.

Every peer gets the masks in the form it likes best (float, NumPy); ksm_ext gets bits.
Medians of a few runs; each function is compared with the float64 formula once before it is timed.
"""

import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor

from ksm_ext import ops

GAMMA = 0.01


def rbf_table(n: int) -> Tensor:
    return torch.exp(-GAMMA * torch.arange(n + 1, dtype=torch.float64)).float()


def gram_ksm_ext(masks: Tensor) -> Callable[[], Tensor]:
    n = masks.shape[1]
    x, table = ops.pack_masks(masks), rbf_table(n)
    return lambda: ops.mask_gram(x, None, n, hamming_table=table)


def gram_torch_addmm(masks: Tensor) -> Callable[[], Tensor]:
    x = masks.float()
    scaled = -GAMMA * x.sum(1)

    def run() -> Tensor:
        gram = torch.addmm(scaled[None, :], x, x.T, alpha=2 * GAMMA)
        return gram.add_(scaled[:, None]).exp_()

    return run


def gram_torch_table(masks: Tensor) -> Callable[[], Tensor]:
    x, table = masks.float(), rbf_table(masks.shape[1])
    sizes = x.sum(1)

    def run() -> Tensor:
        distances = torch.addmm(sizes[None, :], x, x.T, alpha=-2).add_(sizes[:, None])
        return table[distances.int()]

    return run


def gram_torch_cdist(masks: Tensor) -> Callable[[], Tensor]:
    x = masks.float()
    return lambda: torch.cdist(x, x).square_().mul_(-GAMMA).exp_()


def gram_sklearn(masks: Tensor) -> Callable[[], np.ndarray]:
    x = masks.float().numpy()
    return lambda: rbf_kernel(x, gamma=GAMMA)


GRAMS = {
    "ksm_ext": gram_ksm_ext,
    "torch_addmm": gram_torch_addmm,
    "torch_table": gram_torch_table,
    "torch_cdist": gram_torch_cdist,
    "sklearn": gram_sklearn,
}


def check_gram(gram: Tensor, masks: Tensor) -> None:
    x = masks[:64].double()
    distances = x.sum(1)[:, None] + masks.double().sum(1) - 2 * x @ masks.double().T
    expected = torch.exp(-GAMMA * distances)
    torch.testing.assert_close(gram[:64].double(), expected, rtol=1e-4, atol=1e-6)


def gram_group(m: int, n: int) -> str:
    return f"mask_gram m=l={m} n={n} float32, {torch.get_num_threads()} threads"


@pytest.mark.parametrize("m, n", [(8192, 256), (8192, 1024)])
@pytest.mark.parametrize("peer", GRAMS)
def bench_mask_gram(benchmark, peer, m, n):
    benchmark.group = gram_group(m, n)
    masks = torch.rand(m, n, generator=torch.Generator().manual_seed(0)) < 0.5
    run = GRAMS[peer](masks)
    check_gram(torch.as_tensor(run()), masks)
    benchmark.pedantic(run, rounds=9 if peer == "ksm_ext" else 3)


@pytest.mark.parametrize("m, n", [(8192, 256), (8192, 1024)])
@pytest.mark.parametrize("peer", ["torch_full"])
def bench_result_alone(benchmark, peer, m, n):
    """What any result of this size costs in PyTorch: fresh memory, filled with one number."""
    benchmark.group = gram_group(m, n)
    benchmark.pedantic(lambda: torch.full((m, m), 0.5), rounds=5)


def matmul_ksm_ext(masks: Tensor, v: Tensor) -> Callable[[], Tensor]:
    n = masks.shape[1]
    x, table = ops.pack_masks(masks), rbf_table(n)
    return lambda: ops.mask_gram_matmul(x, None, n, v, hamming_table=table)


def matmul_of_two_sets(masks: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """The same product, every pair counted twice."""
    n = masks.shape[1]
    x, table = ops.pack_masks(masks), rbf_table(n)
    return lambda: ops.mask_gram_matmul(x, x, n, v, hamming_table=table)


def matmul_torch(masks: Tensor, v: Tensor) -> Callable[[], Tensor]:
    """The Gram matrix in strips of 2,048 rows, which never exist together."""
    x = masks.float()
    scaled = -GAMMA * x.sum(1)

    def run() -> Tensor:
        strips = []
        for rows, row_terms in zip(x.split(2048), scaled.split(2048), strict=True):
            gram = torch.addmm(scaled[None, :], rows, x.T, alpha=2 * GAMMA)
            strips.append(gram.add_(row_terms[:, None]).exp_() @ v)
        return torch.cat(strips)

    return run


MATMULS = {"ksm_ext": matmul_ksm_ext, "two sets": matmul_of_two_sets, "torch": matmul_torch}


@pytest.mark.parametrize("m, n, t", [(16384, 256, 8), (16384, 1024, 32)])
@pytest.mark.parametrize("peer", MATMULS)
def bench_mask_gram_matmul(benchmark, peer, m, n, t):
    benchmark.group = f"mask_gram_matmul m=l={m} n={n} t={t} float32"
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(m, n, generator=generator) < 0.5
    v = torch.randn(m, t, generator=generator)
    run = MATMULS[peer](masks, v)
    x = masks[:64].double()
    distances = x.sum(1)[:, None] + masks.double().sum(1) - 2 * x @ masks.double().T
    expected = torch.exp(-GAMMA * distances) @ v.double()
    torch.testing.assert_close(run()[:64].double(), expected, rtol=1e-4, atol=1e-4)
    benchmark.pedantic(run, rounds=3)


MEMORY_SCRIPT = """
import re, time, torch
from pathlib import Path
from ksm_ext import ops

def peak_mb():
    return int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

m, n, t = 100_000, 256, 8
x = torch.randint(-2**63, 2**63 - 1, (m, n // 64))
table, v = torch.exp(-0.01 * torch.arange(n + 1.0)), torch.randn(m, t)
before = peak_mb()
start = time.perf_counter()
ops.mask_gram_matmul(x, None, n, v, hamming_table=table)
print(time.perf_counter() - start, peak_mb(), before)
"""


def bench_mask_gram_matmul_of_100_000_subsets(capsys):
    """Time and peak memory of m = l = 100,000, n = 256, t = 8: its Gram matrix would take 40 GB."""
    script = [sys.executable, "-c", MEMORY_SCRIPT]
    result = subprocess.run(script, capture_output=True, text=True, check=True)
    seconds, peak, before = map(float, result.stdout.split())
    with capsys.disabled():
        print(
            f"\nmask_gram_matmul m=l=100000 n=256 t=8: {seconds:.1f} s, peak memory of the process "
            f"{peak:.0f} MB, {before:.0f} MB of it before the call"
        )
    assert peak < 1024
