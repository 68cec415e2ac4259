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
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ksm_ext.batches import as_dataset, datasets_by_name
from ksm_ext.checks import message
from ksm_ext.distributed import Group, gram
from ksm_ext.features import Features
from ksm_ext.gradients import AnyProjector, collect_features
from ksm_ext.outputs import log_odds


def trak(
    models: nn.Module | Sequence[nn.Module],
    tasks: Sequence[Any],
    targets: Mapping[str, Any] | Any,
    *,
    projector: AnyProjector,
    ridge: float = 0.0,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    progress: bool = False,
    group: Group = None,
) -> Tensor:
    """TRAK of each task for each target's mean cross-entropy.

    Args:
        models: A network trained on all tasks, or several to average over.
        tasks: n data sets: tensors (b_i, ...), in a tuple or by name, or a Dataset.
        targets: Data sets by name, or one.
        projector: Such as :class:`ksm_ext.Projector`, to k dimensions; k well below b.
        ridge: ρ, in units of the mean diagonal entry of Φ^T Φ.
        parameters: Names or patterns of the parameters to differentiate by; None: all.
        batch_size: Samples whose gradients are taken together.
        progress: Whether to show progress bars.
        group: The processes that share the samples, see :mod:`ksm_ext.distributed`; all of them
            call with the same arguments and get the result.

    Returns:
        (n, t). ``[a, j]`` estimates the loss of target j with task a less that without it.

    Raises:
        ValueError: If there is no model, task or target.
        RuntimeError: If the Gram matrix of the features is singular.
    """
    networks = [models] if isinstance(models, nn.Module) else list(models)
    named = datasets_by_name(targets)
    for name, given in (("models", networks), ("tasks", tasks), ("targets", named)):
        if len(given) == 0:
            raise ValueError(message(name, "one or more", "none", "Pass some."))
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "progress": progress,
        "group": group,
    }
    datasets = [as_dataset(task) for task in tasks]
    queries = [as_dataset(data) for data in named.values()]
    answers = []
    for network in networks:
        train, query = (
            collect_features(network, ConcatDataset(part), log_odds, projector, **options)
            for part in (datasets, queries)
        )
        by_task = _sums(train, [len(data) for data in datasets])  # (n, k)
        slopes = -(1 - query.values.sigmoid())[:, None] * query.gradients
        parts = slopes.split([len(data) for data in queries])
        means = torch.stack([part.mean(0) for part in parts])  # (t, k)
        answers.append(by_task @ torch.cholesky_solve(means.T, _factor(train, ridge, group)))
    return torch.stack(answers).mean(0)


def trak_scores(train: Features, queries: Features, *, ridge: float = 0.0) -> Tensor:
    """The original scores of one network: how much each sample raises each query's log-odds.

    Args:
        train: Log-odds and their projected gradients of b training samples.
        queries: Of t samples.
        ridge: See :func:`trak`.

    Returns:
        (b, t). Positive: the sample helps, whereas a positive :func:`trak` raises a loss.
    """
    solved = torch.cholesky_solve(queries.gradients.T, _factor(train, ridge))
    return (1 - train.values.sigmoid())[:, None] * (train.gradients @ solved)


def _sums(train: Features, counts: list[int]) -> Tensor:
    """(n, k): what each task adds to the gradient of the total loss, sign reversed."""
    steps = (1 - train.values.sigmoid())[:, None] * train.gradients
    return torch.stack([part.sum(0) for part in steps.split(counts)])


def _factor(train: Features, ridge: float, group: Group = None) -> Tensor:
    """Cholesky factor (k, k) of the Gram matrix with its ridge."""
    if not ridge >= 0:
        raise ValueError(message("ridge", "non-negative", str(ridge), "Pass 0 or a small share."))
    matrix = gram(train.gradients, group)
    mean = float(matrix.diagonal().mean())
    matrix.diagonal().add_(ridge * mean)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    smallest = float(factor.diagonal().abs().min()) ** 2 if not int(failed) else 0.0
    if smallest <= len(matrix) * torch.finfo(matrix.dtype).eps * mean:
        b, k = train.gradients.shape
        found = f"a singular one of {b} samples in {k} dimensions"
        remedy = "Pass a `ridge` such as 0.01, or project to fewer dimensions than samples."
        raise RuntimeError(message("gram", "an invertible matrix", found, remedy))
    return factor
