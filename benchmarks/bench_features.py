"""Projected gradients of a language model against one forward and backward pass, in one run.

A GPT-2 of 6 layers and width 384 with a vocabulary of 2,000, on 64 sequences of 128 tokens, 8 at a
time; weights and text are random, which changes no cost. Processor seconds, and growth of the
resident set at the peak of a process of its own, are printed. Skipped without transformers.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from peak_memory import needs_linux, peak_growth
from torch import nn

from ksm_ext import FactoredProjector, Projector, collect_features
from ksm_ext.network.outputs import log_odds

BATCH, SAMPLES, LENGTH, WORDS = 8, 64, 128, 2_000


@cache
def problem() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=WORDS, n_positions=LENGTH, n_embd=384, n_layer=6, n_head=6
    )
    ids = torch.randint(WORDS, (SAMPLES, LENGTH))
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": ids, "labels": ids}


def trained() -> None:
    """What an epoch costs but for the optimiser: the mean loss of batches, backward."""
    model, batch = problem()
    for rows in torch.arange(SAMPLES).split(BATCH):
        model(**{name: column[rows] for name, column in batch.items()}).loss.backward()
        model.zero_grad()


def collected(projector: Any, batch_size: int | None = BATCH) -> Callable[[], Any]:
    return lambda: collect_features(
        *problem(), log_odds, projector, batch_size=batch_size, engine="hooks"
    )


RUNS: dict[str, Callable[[], Any]] = {
    "forward and backward": trained,
    "Projector(4096)": collected(Projector(4096)),
    "Projector(4096), as it chooses": collected(Projector(4096), None),
    "FactoredProjector(1024)": collected(FactoredProjector(1024)),
    "FactoredProjector(4096)": collected(FactoredProjector(4096)),
    "FactoredProjector(4096), as it chooses": collected(FactoredProjector(4096), None),
}
PREPARE = """
import torch
torch.set_num_threads(1)
from bench_features import RUNS, problem
problem()
run = RUNS[{title!r}]
"""


@needs_linux
@pytest.mark.benchmark(group=f"features of {SAMPLES} sequences of {LENGTH} tokens")
@pytest.mark.parametrize("peer", RUNS)
def bench_features_of_a_language_model(benchmark, peer) -> None:
    problem()
    start = time.process_time()
    benchmark.pedantic(RUNS[peer], rounds=1)
    seconds = time.process_time() - start
    growth = peak_growth(PREPARE.format(title=peer))
    print(f"\n{peer}: {seconds:.1f} processor seconds, {growth:.0f} MiB")
    benchmark.extra_info.update(processor_seconds=seconds, peak_mib=growth)
