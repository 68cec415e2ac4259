"""The Hessian of softmax cross-entropy times tangents: one pass against eager PyTorch.

PyTorch gets the probabilities ready made, in the best of three spellings. The size is that of a
language model's head: 2,048 tokens, 32,000 classes, 8 tangents, 2 GiB of them. Peak memory is the
growth of the resident set over one call, each in its own process.
"""

from collections.abc import Callable

import pytest
import torch
from peak_memory import needs_linux, peak_growth
from torch import Tensor

from ksm_ext import ops

TOKENS, CLASSES, NUM_TANGENTS = 2048, 32_000, 8


def problem(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Logits (b, c) and tangents (s, b, c)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, CLASSES, generator=generator)
    return logits, torch.randn(NUM_TANGENTS, tokens, CLASSES, generator=generator)


Multiply = Callable[[], Tensor]


def of_ksm_ext(logits: Tensor, tangents: Tensor) -> Multiply:
    return lambda: ops.softmax_hvp(logits, tangents)


def of_ksm_ext_in_place(logits: Tensor, tangents: Tensor) -> Multiply:
    """It overwrites its tangents: what it is given shrinks from call to call, its time does not."""
    return lambda: ops.softmax_hvp_(tangents, logits)


def of_torch(logits: Tensor, tangents: Tensor) -> Multiply:
    def run() -> Tensor:
        p = logits.softmax(-1)
        return p * (tangents - (p * tangents).sum(-1, keepdim=True))

    return run


def of_torch_in_place(logits: Tensor, tangents: Tensor) -> Multiply:
    def run() -> Tensor:
        p = logits.softmax(-1)
        out = p * tangents
        return out.sub_(p * out.sum(-1, keepdim=True))

    return run


def of_torch_einsum(logits: Tensor, tangents: Tensor) -> Multiply:
    def run() -> Tensor:
        p = logits.softmax(-1)
        means = torch.einsum("bc,sbc->sb", p, tangents)
        return (tangents - means[:, :, None]).mul_(p)

    return run


PEERS = {
    "ksm_ext": of_ksm_ext,
    "ksm_ext, in place": of_ksm_ext_in_place,
    "torch": of_torch,
    "torch, in place": of_torch_in_place,
    "torch, einsum": of_torch_einsum,
}


@pytest.mark.parametrize("peer", PEERS)
def bench_softmax_hvp(benchmark, peer: str) -> None:
    threads = torch.get_num_threads()
    benchmark.group = f"softmax_hvp, {TOKENS} x {CLASSES} x {NUM_TANGENTS}, {threads} threads"
    few = problem(8)
    expected = of_torch(*(x.double() for x in few))()
    torch.testing.assert_close(PEERS[peer](*few)().double(), expected, rtol=1e-4, atol=1e-7)
    run = PEERS[peer](*problem())
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


PREPARE = """
import bench_softmax_hvp as bench
run = bench.PEERS["{peer}"](*bench.problem())
"""


@needs_linux
def bench_memory(capsys) -> None:
    """Nothing of the size of the tangents but the result."""
    growth = {peer: peak_growth(PREPARE.format(peer=peer)) for peer in PEERS}
    with capsys.disabled():
        for peer, megabytes in growth.items():
            print(f"\n{peer}: {megabytes:.0f} MiB more")
    of_tangents = 4 * NUM_TANGENTS * TOKENS * CLASSES / 2**20
    assert growth["ksm_ext"] < 1.05 * of_tangents and growth["ksm_ext, in place"] < 50
