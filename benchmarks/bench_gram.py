"""Gram matrices of real features: ksm_ext against PyTorch and scikit-learn.

Each function is compared with its peers' result once before it is timed.
"""

from collections.abc import Callable

import pytest
import torch
from sklearn.metrics import pairwise
from torch import Tensor

from ksm_ext import ops

GAMMA = 0.02


def random(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def update_ksm_ext(x: Tensor, weights: Tensor, gram: Tensor) -> Callable[[], Tensor]:
    return lambda: ops.gram_update(gram, x, weights)


def update_torch(x: Tensor, weights: Tensor, gram: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.addmm(gram, (x * weights[:, None]).T, x, out=gram)


UPDATES = {"ksm_ext": update_ksm_ext, "torch": update_torch}


@pytest.mark.parametrize("b, k", [(20_000, 512), (4096, 2048)])
@pytest.mark.parametrize("peer", UPDATES)
def bench_gram_update(benchmark, peer, b, k):
    benchmark.group = f"gram_update b={b} k={k} float32, {torch.get_num_threads()} threads"
    x, weights, gram = random(b, k) - 0.5, random(b), torch.zeros(k, k)
    run = UPDATES[peer](x, weights, gram)
    expected = (x * weights[:, None]).T @ x
    torch.testing.assert_close(run(), expected, rtol=1e-4, atol=1e-2)
    benchmark.pedantic(run, rounds=5)


def task_ksm_ext(x: Tensor, offsets: Tensor) -> Callable[[], Tensor]:
    return lambda: ops.task_gram(x, offsets)


def task_torch(x: Tensor, offsets: Tensor) -> Callable[[], Tensor]:
    counts = offsets.diff().tolist()
    return lambda: torch.stack([part.T @ part for part in x.split(counts)])


def task_torch_bmm(x: Tensor, offsets: Tensor) -> Callable[[], Tensor]:
    """Possible only where every task has as many samples."""
    parts = x.reshape(len(offsets) - 1, -1, x.shape[1])
    return lambda: torch.bmm(parts.mT, parts)


TASKS = {"ksm_ext": task_ksm_ext, "torch": task_torch, "torch_bmm": task_torch_bmm}


@pytest.mark.parametrize("n, samples, k", [(50, 400, 256), (200, 100, 64)])
@pytest.mark.parametrize("peer", TASKS)
def bench_task_gram(benchmark, peer, n, samples, k):
    threads = torch.get_num_threads()
    benchmark.group = f"task_gram n={n} b={n * samples} k={k} float32, {threads} threads"
    x, offsets = random(n * samples, k) - 0.5, samples * torch.arange(n + 1)
    run = TASKS[peer](x, offsets)
    torch.testing.assert_close(run(), task_torch(x, offsets)(), rtol=1e-4, atol=1e-3)
    benchmark.pedantic(run, rounds=9)


def kernel_ksm_ext(x: Tensor, kind: str) -> Callable[[], Tensor]:
    return lambda: ops.kernel_gram(x, None, kind, gamma=GAMMA, coef0=1.0, degree=3)


def kernel_torch(x: Tensor, kind: str) -> Callable[[], Tensor]:
    """The fastest formulas in place."""

    def run() -> Tensor:
        if kind == "laplace":
            return torch.cdist(x, x, p=1.0).mul_(-GAMMA).exp_()
        if kind == "polynomial":
            return (x @ x.T).mul_(GAMMA).add_(1.0).pow_(3)
        squares = x.square().sum(1).mul_(-GAMMA)
        scaled = torch.addmm(squares[None, :], x, x.T, alpha=2 * GAMMA)
        return scaled.add_(squares[:, None]).clamp_max_(0).exp_()

    return run


def kernel_torch_cdist(x: Tensor, kind: str) -> Callable[[], Tensor]:
    p = 1.0 if kind == "laplace" else 2.0

    def run() -> Tensor:
        distances = torch.cdist(x, x, p=p)
        return (distances if p == 1 else distances.square_()).mul_(-GAMMA).exp_()

    return run


def kernel_sklearn(x: Tensor, kind: str) -> Callable[[], Tensor]:
    array = x.numpy()
    options = {"coef0": 1.0, "degree": 3} if kind == "polynomial" else {}
    function = getattr(pairwise, {"laplace": "laplacian"}.get(kind, kind) + "_kernel")
    return lambda: torch.from_numpy(function(array, gamma=GAMMA, **options)).to(x.dtype)


KERNELS = {
    "ksm_ext": kernel_ksm_ext,
    "torch": kernel_torch,
    "torch_cdist": kernel_torch_cdist,
    "sklearn": kernel_sklearn,
}


KINDS = [("rbf", peer) for peer in KERNELS] + [("laplace", peer) for peer in KERNELS]
KINDS += [("polynomial", peer) for peer in KERNELS if peer != "torch_cdist"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind, peer", KINDS)
def bench_kernel_gram(benchmark, peer, kind, dtype):
    m, n = 3000, 128
    benchmark.group = f"{kind} m=l={m} n={n} {dtype}, {torch.get_num_threads()} threads"
    x = random(m, n).to(dtype)
    run = KERNELS[peer](x, kind)
    torch.testing.assert_close(run(), kernel_ksm_ext(x, kind)(), rtol=1e-3, atol=1e-4)
    benchmark.pedantic(run, rounds=1 if kind == "laplace" and peer != "ksm_ext" else 5)
