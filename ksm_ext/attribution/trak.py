r"""TRAK: attribution as if the network were a logistic regression on its projected gradients.

With features :math:`\phi_i` of the b training samples' log-odds (b, k), probabilities :math:`q_i`
of their right answers, and :math:`A = \Phi^\top \Phi + \rho I`, sample i raises the log-odds h of a
query x by

.. math:: \mathrm{trak}(x, i) = \phi(x)^\top A^{-1} \phi_i \, (1 - q_i),

averaged over networks (seeds, checkpoints). :func:`trak` sums it over the samples of a task and
turns it into units of a target's mean loss, whose slope in h is :math:`-(1 - q(x))`.

The original averages features and residuals over networks separately and divides each network's
:math:`A^{-1}` by its mean absolute entry, which weighs networks arbitrarily and takes the units
away. Here each network's own scores are averaged.

Shapes: n tasks of b samples together, t targets, τ (n, t), k projected dimension.

Reference: *Park et al. 2023, arXiv:2303.14186*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ksm_ext.checks import brief, check_kind, check_positive, check_positive_int, counted, message
from ksm_ext.network.batches import task_datasets
from ksm_ext.network.distributed import Group, gram
from ksm_ext.network.features import Features
from ksm_ext.network.gradients import (
    AnyProjector,
    check_networks,
    collect_features,
    projection_text,
    usual_projector,
)
from ksm_ext.network.outputs import log_odds
from ksm_ext.network.solvers import without_autocast

_BLOCK_BYTES = 2**26  # of scores at once


@dataclass(frozen=True, eq=False)
class Trak:
    """TRAK of tasks, and the settings it was computed with, given or chosen.

    Attributes:
        values: (n, t). ``[a, j]`` estimates the loss of target j with task a less that without it.
        projector: None is no projection.
        relative_ridge: ρ as a share of the mean diagonal entry of Φ^T Φ.
    """

    values: Tensor
    projector: AnyProjector | None
    relative_ridge: float

    def __str__(self) -> str:
        """One line: sizes and settings."""
        n, t = self.values.shape
        text = f"TRAK of {counted(n, 'task')} for {counted(t, 'target')}: "
        return f"{text}{projection_text(self.projector)}, relative ridge {self.relative_ridge:.3g}"

    __repr__ = __str__


def trak(
    models: nn.Module | Sequence[nn.Module],
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Mapping[str, Any] | Any,
    *,
    projector: AnyProjector | None = None,
    relative_ridge: float | None = None,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
    progress: bool = False,
    group: Group = None,
) -> Trak:
    """TRAK of each task for each target's mean cross-entropy.

    Args:
        models: A network trained on all tasks, or several to average over.
        tasks: n data sets, in a sequence or by name: tensors (b_i, ...), in a tuple or by name, a
            Dataset, or a DataLoader that does not shuffle.
        targets: Data sets by name, or one.
        projector: Such as :class:`ksm_ext.Projector`, to k dimensions; k well below b. None: a
            signed block permutation to 1,024, or no projection where there are fewer parameters.
        relative_ridge: ρ as a share of the mean diagonal entry of Φ^T Φ, which differs between
            networks and projections as their gradients do. None: 0, or 0.01 without a
            ``projector``.
        parameters: Names or patterns of the parameters to differentiate by; None: all.
        batch_size: Samples whose gradients are taken together.
        engine: How they are taken, see :mod:`ksm_ext.network.engines`.
        progress: Whether to show progress bars.
        group: The processes that share the samples, see ``network.distributed``; all of them
            call with the same arguments and get the result.

    Returns:
        The :class:`Trak`, whose ``values`` are (n, t).

    Raises:
        ValueError: If there is no model, task or target.
        RuntimeError: If the Gram matrix of the features is singular.
    """
    networks = check_networks("models", models)
    datasets, named = task_datasets(tasks, targets)
    if relative_ridge is None:
        relative_ridge = 0.01 if projector is None else 0.0
    if projector is None:
        projector = usual_projector(networks[0], parameters)
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "engine": engine,
        "progress": progress,
        "group": group,
    }
    queries = [*named.values()]
    answers = []
    for network in networks:
        train, query = (
            collect_features(network, ConcatDataset(part), log_odds, projector, **options)
            for part in (datasets, queries)
        )
        of_tasks = _steps(train).split([len(data) for data in datasets])
        by_task = torch.stack([part.sum(0) for part in of_tasks])  # (n, k)
        of_queries = (-_steps(query)).split([len(data) for data in queries])
        means = torch.stack([part.mean(0) for part in of_queries])  # (t, k)
        factor = _factor(train, relative_ridge, group)
        with without_autocast():
            answers.append(by_task @ torch.cholesky_solve(means.T, factor))
    return Trak(torch.stack(answers).mean(0), projector, relative_ridge)


@without_autocast()
def trak_scores(train: Features, queries: Features, *, relative_ridge: float = 0.0) -> Tensor:
    """The original scores of one network: how much each sample raises each query's log-odds.

    Args:
        train: Log-odds and their projected gradients of b training samples.
        queries: Log-odds and projected gradients of t samples.
        relative_ridge: See :func:`trak`.

    Returns:
        (b, t). Positive: the sample helps, whereas a positive :func:`trak` raises a loss.
    """
    _check_features("queries", queries)
    solved = torch.cholesky_solve(queries.gradients.T, _factor(train, relative_ridge))
    return (1 - train.values.sigmoid())[:, None] * (train.gradients @ solved)


@dataclass(frozen=True, eq=False)
class TopSamples:
    """The training samples of the largest scores for each query.

    Attributes:
        scores: (count, t), decreasing.
        samples: (count, t) int64, their numbers.
    """

    scores: Tensor
    samples: Tensor

    __repr__ = brief


@without_autocast()
def top_samples(
    train: Features,
    queries: Features,
    count: int,
    *,
    relative_ridge: float = 0.0,
    largest: bool = True,
) -> TopSamples:
    """The ``count`` best of :func:`trak_scores` for each query, without the table of all.

    Training samples pass in blocks, of which only the best are kept: memory does not grow with b,
    and features that lie in a store are read once.

    Args:
        train: Log-odds and their projected gradients of b training samples.
        queries: Log-odds and projected gradients of t samples.
        count: At most b.
        relative_ridge: See :func:`trak`.
        largest: False for the most harmful samples, whose scores are the least.

    Raises:
        ValueError: If ``count`` is not between 1 and b.
    """
    _check_features("train", train)
    if not 1 <= check_positive_int("count", count, minimum=0) <= len(train):
        expected = f"between 1 and {len(train)}, the training samples"
        raise ValueError(message("count", expected, str(count), "Ask for fewer."))
    _check_features("queries", queries)
    solved = torch.cholesky_solve(queries.gradients.T, _factor(train, relative_ridge))  # (k, t)
    sign = 1 if largest else -1
    best = solved.new_empty(0, len(queries))
    numbers = torch.empty(0, len(queries), dtype=torch.int64, device=solved.device)
    rows = max(count, _BLOCK_BYTES // (solved.element_size() * max(1, len(queries))))
    for block in torch.arange(len(train), device=solved.device).split(rows):
        part = slice(int(block[0]), int(block[-1]) + 1)
        error = 1 - train.values[part].sigmoid()  # the probability of another answer
        scores = torch.cat([best, sign * error[:, None] * (train.gradients[part] @ solved)])
        samples = torch.cat([numbers, block[:, None].expand(-1, len(queries))])
        best, kept = scores.topk(min(count, len(scores)), dim=0)
        numbers = samples.gather(0, kept)
    return TopSamples(sign * best, numbers)


@without_autocast()
def self_influence(train: Features, *, relative_ridge: float = 0.0) -> Tensor:
    r"""What each training sample does to itself; large where a label may be wrong.

    .. math:: (1 - q_i)^2 \, \phi_i^\top (\Phi^\top \Phi + \rho I)^{-1} \phi_i

    is its TRAK score as its own query, in units of its loss: it costs b solutions of k numbers,
    not the table of all pairs.

    Args:
        train: Log-odds and their projected gradients of b training samples.
        relative_ridge: See :func:`trak`.

    Returns:
        (b,), not negative.
    """
    factor = _factor(train, relative_ridge)
    error = 1 - train.values.sigmoid()
    whitened = torch.linalg.solve_triangular(factor, train.gradients.T, upper=False)  # (k, b)
    return error.square() * whitened.square().sum(0)


def _check_features(name: str, features: object) -> None:
    check_kind(name, features, Features, "Features", "Pass what `collect_features` gave.")


def _steps(features: Features) -> Tensor:
    """(b, k): gradients of each sample's loss, sign reversed."""
    return (1 - features.values.sigmoid())[:, None] * features.gradients


@without_autocast()
def _factor(train: Features, relative_ridge: float, group: Group = None) -> Tensor:
    """Cholesky factor (k, k) of the Gram matrix with its ridge."""
    _check_features("train", train)
    remedy = "Pass 0 or a small share."
    relative_ridge = check_positive("relative_ridge", relative_ridge, remedy, zero=True)
    matrix = gram(train.gradients, group)
    mean = float(matrix.diagonal().mean())
    matrix.diagonal().add_(relative_ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    smallest = float(factor.diagonal().abs().min()) ** 2 if not int(failed) else 0.0
    if smallest <= len(matrix) * torch.finfo(matrix.dtype).eps * mean:
        b, k = train.gradients.shape
        found = f"a singular one of {b} samples in {k} dimensions"
        remedy = (
            "Pass a `relative_ridge` such as 0.01, or project to fewer dimensions than samples."
        )
        raise RuntimeError(message("gram", "an invertible matrix", found, remedy))
    return factor
