import subprocess
import sys

import numpy as np
import pytest
import torch
from retrained import effects
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from ksm_ext import Projector
from ksm_ext.attribution import influence, projected_influence, sample_influence
from ksm_ext.correlation import pearson, spearman
from ksm_ext.network.gradients import collect_features
from ksm_ext.network.hessian import GaussNewton, Hessian, loss_gradients
from ksm_ext.network.outputs import log_odds
from ksm_ext.network.solvers import BlockConjugateGradients, LiSSA

TO_THE_END = BlockConjugateGradients(tolerance=1e-12, max_steps=200)


def problem(num_samples=40, num_tasks=5, seed=0):
    """A small network in double precision, its tasks and two targets."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = torch.randn(num_samples, 4).double()
    y = torch.randint(3, (num_samples,))
    size = num_samples // num_tasks
    tasks = [(x[i : i + size], y[i : i + size]) for i in range(0, num_samples, size)]
    draw = lambda n: (torch.randn(n, 4).double(), torch.randint(3, (n,)))  # noqa: E731
    return model, tasks, {"one": draw(7), "two": draw(4)}, (x, y)


def by_dense_algebra(model, tasks, targets, kind, damping):
    data = tuple(torch.cat(column) for column in zip(*tasks, strict=True))
    matrix = kind(model, data)(torch.eye(sum(w.numel() for w in model.parameters())).double())
    matrix += damping * torch.eye(len(matrix)).double()
    means = torch.stack([loss_gradients(model, [d])[0] / len(d[1]) for d in targets.values()])
    return -loss_gradients(model, tasks) @ torch.linalg.solve(matrix, means.T) / len(data[1])


@pytest.mark.parametrize("curvature, damping", [(GaussNewton, 0.01), (Hessian, 0.5)])
@pytest.mark.parametrize("num_tasks", [1, 5, 10])
def test_influence_is_dense_algebra(curvature, damping, num_tasks):
    model, tasks, targets, _ = problem(num_tasks=num_tasks)
    found = influence(
        model, tasks, targets, curvature=curvature, damping=damping, solver=TO_THE_END
    )
    exact = by_dense_algebra(model, tasks, targets, curvature, damping)
    assert found.values.shape == (num_tasks, 2)
    torch.testing.assert_close(found.values, exact, rtol=1e-8, atol=1e-12)
    assert float(found.residuals.max()) <= 1e-12


@pytest.mark.parametrize("curvature", [GaussNewton, Hessian])
def test_the_damping_that_is_chosen(curvature):
    """A share of the largest eigenvalue, and enough for the most negative one."""
    model, tasks, targets, data = problem()
    eigenvalues = torch.linalg.eigvalsh(
        curvature(model, data)(torch.eye(sum(w.numel() for w in model.parameters())).double())
    )
    found = influence(model, tasks, targets, curvature=curvature)
    largest, least = float(eigenvalues[-1]) / 100, -2 * float(eigenvalues[0])
    assert found.damping == pytest.approx(max(largest, least), rel=0.3)
    assert found.damping > -float(eigenvalues[0])
    again = influence(model, tasks, targets, curvature=curvature, damping=found.damping)
    assert torch.equal(found.values, again.values)
    samples = sample_influence(model, data, targets["one"], curvature=curvature)
    assert samples.damping == found.damping
    projected = projected_influence(model, tasks, targets)
    phi = collect_features(model, data, log_odds)
    right = phi.values.sigmoid()
    bent = phi.gradients.T @ ((right * (1 - right))[:, None] * phi.gradients) / len(phi)
    assert projected.damping == pytest.approx(float(torch.linalg.eigvalsh(bent)[-1]) / 100, rel=0.1)
    same = projected_influence(model, tasks, targets, damping=projected.damping)
    assert torch.equal(projected.values, same.values)


def test_lissa_and_functions_agree_with_conjugate_gradients():
    model, tasks, targets, data = problem()
    operator = GaussNewton(model, data)
    matrix = operator(torch.eye(operator.shape[0]).double())
    exact = influence(model, tasks, targets, damping=0.1, solver=TO_THE_END).values
    largest = float(torch.linalg.eigvalsh(matrix)[-1]) + 0.1
    series = influence(model, tasks, targets, damping=0.1, solver=LiSSA(largest, num_steps=500))
    torch.testing.assert_close(series.values, exact, rtol=1e-6, atol=1e-12)
    matrix.diagonal().add_(0.1)
    own = influence(
        model, tasks, targets, damping=0.1, solver=lambda v: torch.linalg.solve(matrix, v.T).T
    )
    torch.testing.assert_close(own.values, exact, rtol=1e-8, atol=1e-12)


def test_influence_in_all_dimensions_of_a_projection_is_influence():
    model, tasks, targets, data = problem()

    class Identity:
        dim = sum(w.numel() for w in model.parameters())

        def __call__(self, x, *, offset=0, out=None):
            out[:, offset : offset + x.shape[1]] += x
            return out

    found = projected_influence(model, tasks, targets, Identity(), damping=0.01).values
    # The log-odds' own Gauss-Newton matrix, which is not that of all logits
    features = collect_features(model, data, log_odds, progress=False)
    right = features.values.sigmoid()
    matrix = features.gradients.T @ ((right * (1 - right))[:, None] * features.gradients) / 40
    matrix.diagonal().add_(0.01)
    means = torch.stack([loss_gradients(model, [d])[0] / len(d[1]) for d in targets.values()])
    exact = -loss_gradients(model, tasks) @ torch.linalg.solve(matrix, means.T) / 40
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-10)
    near = projected_influence(model, tasks, targets, Projector(32), damping=0.01).values
    assert float(pearson(near.T, exact.T).min()) > 0.8


def test_ekfac_of_curvlinops_as_the_solver():
    curvlinops = pytest.importorskip("curvlinops")
    model, tasks, targets, data = problem()
    factored = curvlinops.EKFACLinearOperator(
        *(model, nn.CrossEntropyLoss(), list(model.parameters()), [data]),
        fisher_type=curvlinops.FisherType.TYPE2,
    )
    inverse = curvlinops.KFACInverseLinearOperator(factored, damping=0.1, use_exact_damping=True)
    near = influence(model, tasks, targets, damping=0.1, solver=lambda v: (inverse @ v.T).T).values
    exact = influence(model, tasks, targets, damping=0.1, solver=TO_THE_END).values
    assert float(pearson(near.T, exact.T).min()) > 0.8


def test_samples_are_tasks_of_one():
    model, _, _, data = problem()
    queries = torch.randn(6, 4).double(), torch.randint(3, (6,))
    single = [tuple(c[i : i + 1] for c in data) for i in range(40)]
    targets = {str(j): tuple(c[j : j + 1] for c in queries) for j in range(6)}
    options = {"damping": 0.05, "solver": TO_THE_END}
    of_samples = sample_influence(model, data, queries, **options)
    torch.testing.assert_close(
        of_samples.values, influence(model, single, targets, **options).values
    )


def test_it_predicts_real_retraining_of_a_convex_problem():
    torch.manual_seed(0)
    x = torch.randn(200, 5).double()
    y = (x @ torch.randn(5, 3).double() + torch.randn(200, 3).double()).argmax(1)
    tasks = [(x[i : i + 5], y[i : i + 5]) for i in range(0, 150, 5)]
    target = x[150:], y[150:]
    model = nn.Linear(5, 3).double()
    ridge = 0.01

    def objective(x, y):
        penalty = sum(w.square().sum() for w in model.parameters())
        return cross_entropy(model(x), y, reduction="sum") / 150 + ridge / 2 * penalty

    truth = effects(model, tasks, target, objective)
    said = influence(model, tasks, target, damping=ridge, solver=TO_THE_END).values[:, 0]
    assert float(pearson(said[None], truth[None])) > 0.99
    assert 0.8 < float((said @ truth) / (truth @ truth)) < 1.2  # in its units


def test_nothing_depends_on_loaders_batches_or_threads():
    model, tasks, targets, data = problem()
    options = {"damping": 0.05, "solver": TO_THE_END}
    whole = influence(model, tasks, targets, **options).values
    for size in (1, 7, 40):
        found = influence(model, tasks, targets, batch_size=size, vectors_per_pass=size, **options)
        torch.testing.assert_close(found.values, whole, rtol=1e-8, atol=1e-12)
        loader = DataLoader(TensorDataset(*data), batch_size=size)
        samples = sample_influence(model, loader, targets["one"], **options).values
        exact = sample_influence(model, data, targets["one"], **options).values
        torch.testing.assert_close(samples, exact, rtol=1e-8, atol=1e-12)


def test_dattri_agrees_at_full_batch():
    """And departs from itself at smaller ones, which ours does not."""
    pytest.importorskip("dattri")
    from dattri.algorithm.influence_function import IFAttributorExplicit
    from dattri.task import AttributionTask

    model, _, targets, data = problem(num_samples=60)
    queries = targets["one"]

    def loss(params, batch):
        x, y = batch
        return cross_entropy(torch.func.functional_call(model, params, (x,)), y)

    def of(batch):
        weights = {k: v.detach() for k, v in model.state_dict().items()}
        task = AttributionTask(loss_func=loss, model=model, checkpoints=weights)
        peer = IFAttributorExplicit(task=task, regularization=0.5, device="cpu")
        peer.cache(DataLoader(TensorDataset(*data), batch_size=batch))
        with torch.no_grad():
            return peer.attribute(
                DataLoader(TensorDataset(*data), batch_size=batch),
                DataLoader(TensorDataset(*queries), batch_size=7),
            )

    ours = sample_influence(
        model, data, queries, damping=0.5, curvature=Hessian, solver=TO_THE_END
    ).values
    theirs = of(60).double()
    assert float(spearman(ours, -theirs).abs().min()) > 0.999
    ratio = (theirs / ours).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)


def test_bad_input():
    model, tasks, targets, _ = problem()
    with pytest.raises(ValueError, match="`damping` must be positive, got 0"):
        influence(model, tasks, targets, damping=0.0)
    with pytest.raises(ValueError, match="`tasks` must be one data set or more"):
        influence(model, [], targets, damping=0.1)
    with pytest.raises(ValueError, match="`targets` must be one data set or more"):
        influence(model, tasks, {}, damping=0.1)
    with pytest.raises(TypeError, match=r"`solver` must be .* got 'projected'.*projected_influ"):
        influence(model, tasks, targets, damping=0.1, solver="projected")
    for curvature in ("hessian", nn.Linear, Hessian(model, tasks[0])):
        with pytest.raises(TypeError, match=r"`curvature` must be ksm_ext\.GaussNewton or"):
            influence(model, tasks, targets, damping=0.1, curvature=curvature)
    with pytest.raises(RuntimeError, match="positive definite with its damping"):
        influence(model, tasks, targets, curvature=Hessian, damping=1e-6)
    with pytest.raises(ValueError, match="`damping` must be positive, got 0"):
        projected_influence(model, tasks, targets, Projector(4), damping=0.0)
    assert np.isfinite(influence(model, tasks, targets, damping=1.0).values.numpy()).all()


def test_nothing_is_written_that_pytorch_says_of_itself():
    """Its rules of forward differentiation are compiled, by what it calls deprecated."""
    program = (
        "import torch; from ksm_ext import influence; "
        "data = torch.randn(8, 4), torch.randint(3, (8,)); "
        "print(influence(torch.nn.Linear(4, 3), [data], data, damping=0.1).values.shape)"
    )
    for options in ([], ["-W", "error"]):  # where it is an error, too, nothing steps down
        run = subprocess.run([sys.executable, *options, "-c", program], capture_output=True)
        assert (run.stdout.decode(), run.stderr.decode()) == ("torch.Size([1, 1])\n", "")
