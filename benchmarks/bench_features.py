"""Projected gradients of a language model against one forward and backward pass, in one run.

A GPT-2 of 6 layers and width 384 with a vocabulary of 2,000, on 64 sequences of 128 tokens, 8 at a
time; weights and text are random, which changes no cost. Processor seconds, and growth of the
resident set at the peak of a process of its own, are printed. Skipped without transformers.

``-k beside_peers`` puts other libraries beside, those of ``feature_peers.py`` that can be imported
(``PYTHONPATH=FOLDER`` where they were installed into a folder). There all do the same work:
gradients of each sequence's loss, or its factors of EK-FAC by labels drawn from the model, for
weights and biases of the 24 linear layers in the blocks, 10.6 million parameters. All ran on one
batch before, in the one process whose seconds and resident set are printed; seconds over those of
forward and backward too, least of ``ROUNDS`` each. Peers have ``side²`` numbers for each layer,
ksm_ext k in all. Errors are root mean squares of the cosines of features, against those of whole
gradients, of 8 sequences that share up to 112 tokens.
"""

import ctypes
import time
from collections.abc import Callable
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import feature_peers
import pytest
import torch
from peak_memory import needs_linux, peak_growth
from torch import Tensor, nn
from torch.nn.functional import normalize

from experiments.common import resident, restart_peak
from ksm_ext import EKFAC, FactoredProjector, GaussNewton, Projector, collect_features
from ksm_ext.network.ekfac import FactoredFisher
from ksm_ext.network.outputs import cross_entropy, log_odds

BATCH, SAMPLES, LENGTH, WORDS = 8, 64, 128, 2_000
ROUNDS = 2  # beside peers


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
IN_BLOCKS = "transformer.h.*.c_*"  # the four linear layers of each


@cache
def problem_of_peers() -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    """The same function with ``nn.Linear`` in the blocks, the tokens, and the layers' names."""
    before, batch = problem()
    model = deepcopy(before)
    names = [name for name, _ in model.named_modules() if fnmatchcase(name, IN_BLOCKS)]
    for name in names:
        conv1d = model.get_submodule(name)  # of transformers: a linear layer, (in, out)
        linear = nn.Linear(*conv1d.weight.shape)
        linear.weight.data, linear.bias.data = conv1d.weight.data.T.contiguous(), conv1d.bias.data
        model.set_submodule(name, linear)
    return model, batch["input_ids"], tuple(names)


def trained_on(ids: Tensor) -> None:
    model = problem_of_peers()[0]
    for rows in ids.split(BATCH):
        model(input_ids=rows, labels=rows).loss.backward()
        model.zero_grad()


def collected_on(projector: Any) -> Callable[[Tensor], Tensor]:
    def run(ids: Tensor) -> Tensor:
        batch = {"input_ids": ids, "labels": ids}
        options = {"batch_size": BATCH, "engine": "hooks", "parameters": IN_BLOCKS}
        model = problem_of_peers()[0]
        return collect_features(model, batch, cross_entropy, projector, **options).gradients

    return run


def factored_on(ids: Tensor, fisher: str = "sampled") -> FactoredFisher:
    model, batch = problem_of_peers()[0], {"input_ids": ids, "labels": ids}
    operator = GaussNewton(model, batch, batch_size=BATCH, parameters=IN_BLOCKS)
    return EKFAC(fisher).fit(operator)


def peer_on(call: Callable[..., Any], **options: Any) -> Callable[[Tensor], Any]:
    def run(ids: Tensor) -> Any:
        model, _, layers = problem_of_peers()
        return call(model, ids, layers, BATCH, **options)

    return run


BESIDE: dict[str, Callable[[Tensor], Any]] = {
    "forward and backward": trained_on,
    "Projector(4096)": collected_on(Projector(4096)),
    "FactoredProjector(1024)": collected_on(FactoredProjector(1024)),
    "FactoredProjector(4096)": collected_on(FactoredProjector(4096)),
    "FactoredProjector(16384)": collected_on(FactoredProjector(16384)),
    "bergson, side 16": peer_on(feature_peers.bergson, side=16),
    "bergson, side 64": peer_on(feature_peers.bergson, side=64),
    "dattri's LoGra, side 16": peer_on(feature_peers.dattri_logra, side=16),
    "dattri's LoGra, side 64": peer_on(feature_peers.dattri_logra, side=64),
    "EKFAC": factored_on,
    "kronfluence": peer_on(feature_peers.kronfluence),
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


@needs_linux
@pytest.mark.filterwarnings("ignore")  # of peers
@pytest.mark.benchmark(group=f"beside peers, {SAMPLES} sequences of {LENGTH} tokens")
@pytest.mark.parametrize("peer", BESIDE)
def bench_features_beside_peers(benchmark, peer) -> None:
    _, ids, _ = problem_of_peers()
    shared = torch.arange(LENGTH) < LENGTH // BATCH * torch.arange(BATCH)[:, None]
    related = ids[0].where(shared, ids[:BATCH])
    features = BESIDE[peer](related)
    if isinstance(features, Tensor):
        whole = cosines(collected_on(None)(related))
        error = float((cosines(features) - whole).square().mean().sqrt())
        print(f"\n{peer}: {features.shape[1]:,} numbers, error {error:.4f}")
        assert error < 0.1  # cosines are up to 0.9: of the same gradients
        benchmark.extra_info.update(error=error)
    del features
    pace = min(seconds_of(lambda: trained_on(ids)) for _ in range(ROUNDS))
    ctypes.CDLL(None).malloc_trim(0)  # memory that earlier runs left
    restart_peak()
    before = resident("VmRSS")
    seconds = []
    run = lambda: seconds.append(seconds_of(lambda: BESIDE[peer](ids)))  # noqa: E731
    benchmark.pedantic(run, rounds=ROUNDS)
    found = {"passes": min(seconds) / pace, "peak_mib": resident("VmHWM") - before}
    print(f"\n{peer}: {min(seconds):.1f} processor seconds", found)
    benchmark.extra_info.update(found, processor_seconds=min(seconds))


@pytest.mark.filterwarnings("ignore")
def bench_beside_peers_whole_gradients_agree() -> None:
    _, ids, _ = problem_of_peers()
    ours, theirs = collected_on(None), peer_on(feature_peers.bergson, side=None)
    inner = [features @ features.T for features in (ours(ids[:2]), theirs(ids[:2]))]
    torch.testing.assert_close(*inner, rtol=1e-5, atol=0.0)


@pytest.mark.filterwarnings("ignore")
def bench_beside_peers_eigenvalues_agree() -> None:
    """Their sums: eigenvectors of the smallest are free."""
    _, ids, layers = problem_of_peers()
    theirs = peer_on(feature_peers.kronfluence, use_empirical_fisher=True)(ids[:BATCH])
    ours = {
        block.layout.weight.removesuffix(".weight"): block.eigenvalues
        for block in factored_on(ids[:BATCH], "empirical").blocks
    }
    for layer in layers:
        mean = theirs["lambda_matrix"][layer] / theirs["num_lambda_processed"][layer]
        torch.testing.assert_close(ours[layer].sum(), mean.sum(), rtol=1e-5, atol=0.0)


def seconds_of(run: Callable[[], Any]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def cosines(features: Tensor) -> Tensor:
    """Of the pairs of samples."""
    directions = normalize(features.double())
    rows, columns = torch.triu_indices(len(features), len(features), 1)
    return (directions @ directions.T)[rows, columns]
