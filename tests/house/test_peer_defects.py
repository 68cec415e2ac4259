"""Defects seen in other libraries of the field, each looked for here.

`docs/reliability.md` lists them all, with the tests elsewhere that answer the others.
"""

import inspect
import resource
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ksm_ext import Projector, collect_features, fit_surrogate
from ksm_ext.attribution.influence import influence, sample_influence
from ksm_ext.attribution.tracin import gradient_cosine, tracin
from ksm_ext.attribution.trak import trak
from ksm_ext.network.gradients import per_sample_gradients
from ksm_ext.network.outputs import log_odds
from ksm_ext.network.solvers import BlockConjugateGradients


def problem(num_samples=24):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(num_samples, 3).double(), torch.randint(3, (num_samples,))
    tasks = [(x[i::4], y[i::4]) for i in range(4)]
    return model, tasks, (torch.randn(5, 3).double(), torch.randint(3, (5,))), (x, y)


def test_an_import_touches_no_gpu_and_needs_none_of_the_extras():
    code = """
import sys
import torch
import ksm_ext
assert not torch.cuda.is_initialized()
extras = {"matplotlib", "pandas", "sklearn", "shapiq", "captum", "faiss", "annoy", "transformers"}
assert not extras & sys.modules.keys(), extras & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_projections_never_store_their_matrix():
    """It would take 16 GiB here."""
    x = torch.ones(1, 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for kind in ("rademacher", "sbp"):
        projector = Projector(4096, kind=kind)
        assert projector(x).isfinite().all()
    assert projector.adjoint(projector(x), 2**20).shape == x.shape
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KiB
    assert grown < 64 * 1024


def test_no_two_blocks_of_projections_are_the_same():
    """Seeds that are sums of a block's and a model's number make some columns equal."""
    eye = torch.eye(40)
    matrix = Projector(10_300, kind="rademacher", seed=0)(eye).sign()
    assert len(torch.unique(matrix.T, dim=0)) == 10_300
    for seed in (1, 1000, 100_000, 658105236):
        other = Projector(10_300, kind="rademacher", seed=seed)(eye).sign()
        both = torch.cat([matrix, other], dim=1)
        assert len(torch.unique(both.T, dim=0)) == 20_600


def test_scores_of_one_checkpoint_are_exact_and_not_projected():
    model, tasks, target, _ = problem()
    parts = [
        torch.autograd.grad(cross_entropy(model(x), y, reduction=how), list(model.parameters()))
        for (x, y), how in [*((task, "sum") for task in tasks), (target, "mean")]
    ]
    *of_tasks, of_target = [torch.cat([part.flatten() for part in row]) for row in parts]
    exact = -0.3 / 24 * (torch.stack(of_tasks) @ of_target)[:, None]
    torch.testing.assert_close(tracin(model, 0.3, tasks, target), exact, rtol=1e-10, atol=1e-14)


def test_a_call_changes_no_default_of_the_next():
    model, tasks, target, _ = problem()
    masks = torch.rand(12, 4) < 0.5
    functions = (fit_surrogate, influence, trak, tracin, collect_features, per_sample_gradients)
    before = [repr(inspect.signature(function)) for function in functions]
    options = {"projector": Projector(6), "relative_ridge": 0.1}
    first = trak(model, tasks, target, **options).values
    trak(model, tasks, target, projector=Projector(3, seed=5), relative_ridge=0.2)
    assert torch.equal(trak(model, tasks, target, **options).values, first)
    scores = torch.randn(12, 2).double()
    fitted = fit_surrogate(masks, scores).predict(masks)
    fit_surrogate(masks, scores, kernel="rbf", ridge=3.0, center=False, share_ridge=False)
    assert torch.equal(fit_surrogate(masks, scores).predict(masks), fitted)
    assert [repr(inspect.signature(function)) for function in functions] == before
    for function in functions:
        for parameter in inspect.signature(function).parameters.values():
            assert not isinstance(parameter.default, (list, dict, set)), (function, parameter)


def test_a_diverged_sample_is_an_error_and_not_a_zero():
    model, _, target, (x, y) = problem()
    x = x.clone()
    x[7] = float("nan")
    with pytest.raises(ValueError, match="finite, got"):
        collect_features(model, (x, y), log_odds, Projector(4), progress=False)
    broken = [(x[i::4], y[i::4]) for i in range(4)]
    for method in (
        lambda: trak(model, broken, target, projector=Projector(4), relative_ridge=0.1),
        lambda: influence(model, broken, target, damping=0.1),
    ):
        with pytest.raises((ValueError, RuntimeError), match="must be"):
            method()


@pytest.mark.parametrize("batch_size", [1, 5, 24])
def test_the_inverse_is_applied_once_whatever_the_batches(batch_size):
    model, tasks, target, _ = problem()
    calls = []

    class Counting(BlockConjugateGradients):
        def solve(self, *args, **options):
            calls.append(1)
            return super().solve(*args, **options)

    influence(model, tasks, target, damping=0.1, solver=Counting(), batch_size=batch_size)
    assert calls == [1]


@pytest.mark.parametrize("sizes", [(10, 4), (4, 10), (24, 7)])
def test_a_run_goes_on_in_the_middle_of_a_batch(tmp_path, sizes):
    """The loader may cut its batches elsewhere when a run is taken up again."""
    model, _, _, data = problem()

    class Stops(TensorDataset):
        def __getitem__(self, row):
            if row == 17:  # the first, middle and last are looked at beforehand
                raise KeyboardInterrupt
            return super().__getitem__(row)

        __getitems__ = None

    def collect(dataset, size, store=None):
        loader = DataLoader(dataset, batch_size=size)
        options = {"batch_size": 3, "store": store, "progress": False}
        return collect_features(model, loader, log_odds, Projector(5), **options)

    whole = collect(TensorDataset(*data), 24)
    with pytest.raises(KeyboardInterrupt):
        collect(Stops(*data), sizes[0], tmp_path)
    resumed = collect(TensorDataset(*data), sizes[1], tmp_path)
    assert torch.equal(resumed.gradients, whole.gradients)
    assert torch.equal(resumed.values, whole.values)


def test_answers_keep_no_graph_and_use_every_batch():
    model, tasks, target, data = problem()
    solver = BlockConjugateGradients(tolerance=1e-10, max_steps=200)
    options = {"damping": 0.1, "solver": solver}
    answers = [
        influence(model, tasks, target, **options).values,
        trak(model, tasks, target, projector=Projector(4), relative_ridge=0.1).values,
        tracin(model, 0.1, tasks, target),
        gradient_cosine(model, tasks, target),
    ]
    assert not any(answer.requires_grad or answer.grad_fn for answer in answers)
    assert all(weight.grad is None for weight in model.parameters())
    loader = DataLoader(TensorDataset(*data), batch_size=5)
    whole = sample_influence(model, data, target, **options).values
    batched = sample_influence(model, loader, target, **options).values
    torch.testing.assert_close(batched, whole, rtol=1e-7, atol=1e-12)
    first = sample_influence(model, (data[0][:5], data[1][:5]), target, **options).values
    assert not torch.allclose(whole[:5], first, rtol=0.1)
