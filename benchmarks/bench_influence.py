"""Influence of 1,000 training samples on 100 queries of a small MLP: block CG against dattri's CG.

A network of 64-32-10 units (2,410 parameters) on scikit-learn's digits, damping 0.01. Both use the
exact Hessian. dattri takes its default of ten steps; ksm_ext as many as a residual of 1e-4 needs,
and ten. The oracle is the dense Hessian in float64; quality is Spearman's correlation with it, mean
over queries, and is printed. dattri is skipped where it is not installed.
"""

import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ksm_ext.attribution.influence import sample_influence
from ksm_ext.correlation import spearman
from ksm_ext.network.hessian import Hessian
from ksm_ext.network.solvers import BlockConjugateGradients

DAMPING, NUM_STEPS = 0.01, 10
Data = tuple[Tensor, Tensor]


@cache
def problem() -> tuple[nn.Module, Data, Data]:
    """A network trained on 1,000 digits, and 100 others."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images / 16).float(), torch.from_numpy(labels)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        penalty = sum(weight.square().sum() for weight in model.parameters())
        loss = cross_entropy(model(x[:1000]), y[:1000]) + 1e-3 / 2 * penalty
        loss.backward()
        return loss

    optimizer.step(closure)
    return model, (x[:1000], y[:1000]), (x[1000:1100], y[1000:1100])


@cache
def exact() -> Tensor:
    """(1000, 100): by the dense Hessian, in float64."""
    model, train, queries = problem()
    weights = {name: weight.detach().double() for name, weight in model.named_parameters()}
    sizes = [weight.numel() for weight in weights.values()]

    def losses(flat: Tensor, data: Data) -> Tensor:
        parts = zip(flat.split(sizes), weights.items(), strict=True)
        named = {name: part.reshape(weight.shape) for part, (name, weight) in parts}
        logits = functional_call(model, named, (data[0].double(),))
        return cross_entropy(logits, data[1], reduction="none")

    flat = torch.cat([weight.reshape(-1) for weight in weights.values()])
    matrix = torch.func.hessian(lambda w: losses(w, train).mean())(flat)
    matrix += DAMPING * torch.eye(len(matrix), dtype=matrix.dtype)
    slopes = [torch.func.jacrev(losses)(flat, data) for data in (train, queries)]
    return -slopes[0] @ torch.linalg.solve(matrix, slopes[1].T) / len(slopes[0])


def of_ksm_ext(tolerance: float, max_steps: int) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model, train, queries = problem()
        solver = BlockConjugateGradients(tolerance, max_steps)
        return sample_influence(
            model, train, queries, damping=DAMPING, curvature=Hessian, solver=solver
        ).values

    return run


def of_dattri() -> Callable[[], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports
        influence = pytest.importorskip("dattri.algorithm.influence_function")
        from dattri.task import AttributionTask
    model, train, queries = problem()

    def loss(weights: dict[str, Tensor], batch: Data) -> Tensor:
        return cross_entropy(functional_call(model, weights, (batch[0],)), batch[1])

    def run() -> Tensor:
        state = {name: weight.detach() for name, weight in model.state_dict().items()}
        task = AttributionTask(loss_func=loss, model=model, checkpoints=state)
        peer = influence.IFAttributorCG(task=task, max_iter=NUM_STEPS, regularization=DAMPING)
        loaders = [
            DataLoader(TensorDataset(*data), batch_size=len(data[0])) for data in (train, queries)
        ]
        peer.cache(loaders[0])
        with torch.no_grad():
            return -peer.attribute(*loaders)

    return run


PEERS = {
    "ksm_ext": lambda: of_ksm_ext(1e-4, 100),
    "ksm_ext, ten steps": lambda: of_ksm_ext(0.0, NUM_STEPS),
    "dattri": of_dattri,
}


@pytest.mark.parametrize("peer", PEERS)
def bench_influence(benchmark, capsys, peer: str) -> None:
    benchmark.group = (
        f"influence of 1,000 samples on 100 queries, {torch.get_num_threads()} threads"
    )
    run = PEERS[peer]()
    quality = float(spearman(run().double(), exact()).mean())
    with capsys.disabled():
        print(f"\n{peer}: Spearman with the exact influence {quality:.4f}")
    if peer.startswith("ksm_ext"):
        assert quality >= 0.995
    benchmark.pedantic(run, rounds=5)
