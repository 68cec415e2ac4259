"""Exact Hessian- and Gauss-Newton products of a 2-layer transformer with 64 vectors.

``ksm_ext`` against what can be written in PyTorch: a double backward per vector on a shared graph,
``vmap(jvp(grad))`` of all vectors at once, and a double backward batched by ``is_grads_batched``.
On 512 tokens the arithmetic of two gradients per vector is the floor, on 16 tokens the overhead is.
Times are of one thread, so that no peer profits from more cores than another. Peak memory is the
growth of the resident set over one call, each in its own process.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from peak_memory import needs_linux, peak_growth
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from experiments.modular_arithmetic.model import Block
from ksm_ext.network.hessian import CurvatureOperator, GaussNewton, Hessian
from ksm_ext.scores.retraining import one_thread

WIDTH, HEADS, CLASSES, NUM_VECTORS = 128, 4, 512, 64
SIZES = {"8 x 64 tokens": (8, 64), "1 x 16 tokens": (1, 16)}


def problem(b: int, t: int, r: int = NUM_VECTORS) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """The network, its tokens and labels (b, t), and r vectors."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(CLASSES, WIDTH),
        Block(WIDTH, HEADS, "gelu"),
        Block(WIDTH, HEADS, "gelu"),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, CLASSES),
    )
    tokens, labels = torch.randint(CLASSES, (2, b, t))
    num_parameters = sum(weight.numel() for weight in model.parameters())
    return model, tokens, labels, torch.randn(r, num_parameters)


Multiply = Callable[[], Tensor]


def of_ksm_ext(
    model: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    v: Tensor,
    curvature: type[CurvatureOperator] = Hessian,
) -> Multiply:
    return partial(curvature(model, (tokens, labels)), v)


def _unflattened(model: nn.Module, v: Tensor) -> list[Tensor]:
    weights = list(model.parameters())
    parts = v.split([weight.numel() for weight in weights], dim=1)
    pairs = zip(parts, weights, strict=True)
    return [part.reshape(len(v), *weight.shape) for part, weight in pairs]


def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten(1) for part in parts], dim=1)


def _slope(model: nn.Module, tokens: Tensor, labels: Tensor) -> tuple[list, tuple[Tensor, ...]]:
    """Parameters, and the gradient of the mean over samples, with its graph."""
    weights = list(model.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        total = cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="sum")
        return weights, torch.autograd.grad(total / len(tokens), weights, create_graph=True)


def of_loop(model: nn.Module, tokens: Tensor, labels: Tensor, v: Tensor) -> Multiply:
    vectors = _unflattened(model, v)

    def run() -> Tensor:
        weights, slope = _slope(model, tokens, labels)
        rows = []
        for number in range(len(v)):
            one = [vector[number] for vector in vectors]
            parts = torch.autograd.grad(slope, weights, one, retain_graph=True)
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    return run


def of_is_grads_batched(model: nn.Module, tokens: Tensor, labels: Tensor, v: Tensor) -> Multiply:
    vectors = _unflattened(model, v)

    def run() -> Tensor:
        weights, slope = _slope(model, tokens, labels)
        return _joined(list(torch.autograd.grad(slope, weights, vectors, is_grads_batched=True)))

    return run


def of_vmap(model: nn.Module, tokens: Tensor, labels: Tensor, v: Tensor) -> Multiply:
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    vectors = dict(zip(weights, _unflattened(model, v), strict=True))

    def loss(weights: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, weights, (tokens,))
        total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        return total / len(tokens)

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            parts = vmap(lambda vector: jvp(grad(loss), (weights,), (vector,))[1])(vectors)
        return _joined(list(parts.values()))

    return run


PEERS = {
    "ksm_ext": of_ksm_ext,
    "shared-graph loop": of_loop,
    "vmap(jvp(grad))": of_vmap,
    "is_grads_batched": of_is_grads_batched,
    "ksm_ext, GGN": partial(of_ksm_ext, curvature=GaussNewton),
}


@pytest.fixture(autouse=True)
def small_sums():
    with one_thread():
        yield


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("size", SIZES)
def bench_hessian_products(benchmark, size: str, peer: str) -> None:
    benchmark.group = f"Hessian products of a transformer, {NUM_VECTORS} vectors, {size}"
    given = problem(*SIZES[size])
    run = PEERS[peer](*given)
    if peer != "ksm_ext, GGN":  # another matrix, with its own tests
        torch.testing.assert_close(run(), of_loop(*given)(), rtol=1e-3, atol=1e-4)
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)


PREPARE = """
import bench_hvp, torch
torch.set_num_threads(1)
run = bench_hvp.PEERS["{peer}"](*bench_hvp.problem(8, 64))
"""


@needs_linux
def bench_memory(capsys) -> None:
    growth = {peer: peak_growth(PREPARE.format(peer=peer)) for peer in PEERS}
    with capsys.disabled():
        for peer, megabytes in growth.items():
            print(f"\n{peer}: {megabytes:.0f} MiB more")
    assert growth["ksm_ext"] < growth["vmap(jvp(grad))"] / 2
