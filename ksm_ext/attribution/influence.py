r"""Influence functions: what a target's loss would have been without a task, to first order.

With the mean loss :math:`L = \frac1b \sum_i \ell_i` over all b training samples at its minimum W,
and :math:`g_a = \sum_{i \in a} \nabla \ell_i`, leaving out task a moves the minimum by about
:math:`(b H)^{-1} g_a`. So for a target's mean loss F, in its own units and sign,

.. math:: \tau_a = -\frac1b \nabla F^\top (H + \lambda I)^{-1} g_a \approx F(1) - F(1 - e_a).

H is the Hessian or, positive semi-definite and cheaper, the Gauss-Newton matrix. All systems are
solved in one block, on the side of targets or tasks, whichever are fewer; what is left are slopes
of samples along the solutions, so that gradients of single samples are never stored.

Shapes: n tasks of b samples together, t targets, τ (n, t), p parameters.

References: *Koh & Liang 2017, arXiv:1703.04730*; *Bae et al. 2022, arXiv:2209.05364*.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ksm_ext.checks import brief, check_positive, message
from ksm_ext.network.batches import checked_datasets, task_datasets
from ksm_ext.network.gradients import AnyProjector, collect_features, usual_projector
from ksm_ext.network.hessian import CurvatureOperator, GaussNewton, Hessian, loss_gradients
from ksm_ext.network.outputs import Loss, log_odds
from ksm_ext.network.solvers import (
    BlockConjugateGradients,
    Operator,
    Solver,
    as_solver,
    without_autocast,
)
from ksm_ext.network.spectrum import lanczos, signs

SOLVER = BlockConjugateGradients(tolerance=1e-4)


@dataclass(frozen=True, eq=False)
class Influence:
    """Influences, and how well their linear systems were solved.

    Attributes:
        values: (n, t), or (b, t) of single samples.
        residuals: (s,). Relative residuals of the systems; 0 where a factorisation or a function
            of one's own solved them.
        num_steps: Products with the curvature, of s vectors each.
        damping: λ.
    """

    values: Tensor
    residuals: Tensor
    num_steps: int
    damping: float

    __repr__ = brief


def influence(
    model: nn.Module,
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Mapping[str, Any] | Any,
    loss: str | Loss = "cross_entropy",
    *,
    damping: float | None = None,
    curvature: type[CurvatureOperator] = GaussNewton,
    solver: Solver = SOLVER,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    vectors_per_pass: int | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> Influence:
    """Influence of each task on each target's mean loss.

    Args:
        model: The network trained on all tasks.
        tasks: n data sets, in a sequence or by name: tensors (b_i, ...), in a tuple or by name, a
            Dataset, or a DataLoader that does not shuffle.
        targets: Data sets by name, or one.
        loss: ``"cross_entropy"``, ``"squared_error"``, or a function (outputs, labels) -> (b,).
        damping: λ > 0, in units of the curvature of the mean loss. The Hessian of a network is
            indefinite where training has not ended: λ must then exceed its most negative
            eigenvalue, which :func:`ksm_ext.network.spectrum.top_eigenpairs` finds. None: a
            hundredth of the largest eigenvalue, or twice the most negative one where that is more,
            as far as ten steps of Lanczos' method tell.
        curvature: :class:`ksm_ext.GaussNewton` or :class:`ksm_ext.Hessian`.
        solver: :class:`ksm_ext.network.solvers.BlockConjugateGradients` or ``LiSSA``, whose
            residuals say what they achieved; :class:`ksm_ext.EKFAC`, by a Fisher matrix of
            Kronecker products, whose residuals say how near it is; or a function from right-hand
            sides (s, p) to solutions (s, p), which knows its damping.
        parameters: Names or patterns of the parameters that training moves; None: all.
        batch_size: Samples of a pass.
        vectors_per_pass: Vectors multiplied together.
        engine: How gradients of single samples are taken, see :mod:`ksm_ext.network.engines`;
            ``"auto"`` has slopes along solutions without them where it can.
        progress: Whether to show progress bars.

    Returns:
        The :class:`Influence`; ``values[a, j]`` estimates ``F_j(1) - F_j(1 - e_a)``.

    Raises:
        ValueError: If an argument is out of its range, or there is no task or target.
        TypeError: If ``curvature`` is no such class, or ``solver`` no solver.
        RuntimeError: If the damped curvature is not positive definite.
    """
    datasets, named = task_datasets(tasks, targets)
    _check_curvature(curvature)
    counts = torch.tensor([len(data) for data in datasets])
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "engine": engine,
    }
    products: dict[str, Any] = {"vectors_per_pass": vectors_per_pass, "progress": progress}
    operator = curvature(model, ConcatDataset(datasets), loss, **options, **products)
    damping = _checked_damping(damping, operator, signs(operator, None, 1, 0))
    solve = partial(as_solver(solver).solve, operator, damping=damping, progress=progress)
    num_targets = torch.tensor([len(data) for data in named.values()])
    if len(named) <= len(datasets):
        gradients = loss_gradients(model, list(named.values()), loss, **options)
        solution = solve(gradients / num_targets.to(gradients)[:, None])  # (t, p)
        slopes = operator.per_sample_slopes(solution.x)  # (t, b)
        values = _sums(slopes, counts).T
    else:
        solution = solve(loss_gradients(model, datasets, loss, **options))  # (n, p)
        query = Hessian(model, ConcatDataset(named.values()), loss, **options)
        slopes = query.per_sample_slopes(solution.x)  # (n, target samples)
        values = _sums(slopes, num_targets) / num_targets.to(slopes)
    values = -values / operator.num_samples
    return Influence(values, solution.residuals, solution.num_steps, damping)


def sample_influence(
    model: nn.Module,
    data: Any,
    queries: Any,
    loss: str | Loss = "cross_entropy",
    *,
    damping: float | None = None,
    curvature: type[CurvatureOperator] = GaussNewton,
    solver: Solver = SOLVER,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    vectors_per_pass: int | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> Influence:
    """Influence of each training sample on the loss of each query.

    Args:
        model: See :func:`influence`.
        data: b training samples: a tuple of tensors (b, ...), a Dataset or a DataLoader.
        queries: t samples likewise; their gradients (t, p) are kept.
        loss: See :func:`influence`.
        damping: See :func:`influence`.
        curvature: See :func:`influence`.
        solver: See :func:`influence`.
        parameters: See :func:`influence`.
        batch_size: See :func:`influence`.
        vectors_per_pass: See :func:`influence`.
        engine: See :func:`influence`.
        progress: See :func:`influence`.

    Returns:
        ``values`` (b, t): the loss of query j less what it would be without sample i.
    """
    _check_curvature(curvature)
    (queries,) = checked_datasets("queries", [queries])
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "vectors_per_pass": vectors_per_pass,
        "engine": engine,
        "progress": progress,
    }
    operator = curvature(model, data, loss, **options)
    damping = _checked_damping(damping, operator, signs(operator, None, 1, 0))
    solve = partial(as_solver(solver).solve, operator, damping=damping, progress=progress)
    solution = solve(Hessian(model, queries, loss, **options).per_sample_gradients())
    values = operator.per_sample_slopes(solution.x).T  # (b, t)
    values = -values / operator.num_samples
    return Influence(values, solution.residuals, solution.num_steps, damping)


def projected_influence(
    model: nn.Module,
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Mapping[str, Any] | Any,
    projector: AnyProjector | None = None,
    *,
    damping: float | None = None,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> Influence:
    """Influence on the mean cross-entropy in a projected space, whose curvature is (k, k).

    Cross-entropy is ``softplus(-h)`` of the log-odds h, of slope -(1 - q) and curvature q (1 - q)
    for the right answer's probability q: the curvature is the Gauss-Newton matrix of the log-odds.

    Args:
        model: See :func:`influence`.
        tasks: See :func:`influence`.
        targets: See :func:`influence`.
        projector: Takes gradients to k dimensions, such as :class:`ksm_ext.Projector` to some
            hundred. None: a signed block permutation to 1,024, or none for fewer parameters.
        damping: See :func:`influence`.
        parameters: See :func:`influence`.
        batch_size: Samples whose gradients are held at a time.
        engine: How their gradients are taken, see :mod:`ksm_ext.network.engines`.
        progress: Whether to show progress bars.

    Returns:
        The :class:`Influence`; ``values[a, j]`` estimates ``F_j(1) - F_j(1 - e_a)``.
    """
    datasets, named = task_datasets(tasks, targets)
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "engine": engine,
        "progress": progress,
    }

    if projector is None:
        projector = usual_projector(model, parameters)

    def features(data: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = collect_features(model, data, log_odds, projector, **options)
        right = found.values.sigmoid()
        return found.gradients, -(1 - right)[:, None] * found.gradients, right * (1 - right)

    phi, slopes, weight = features(ConcatDataset(datasets))
    of_tasks = _sums(slopes.T, torch.tensor([len(data) for data in datasets]))  # (k, n)
    means = torch.stack([features(data)[1].mean(0) for data in named.values()])
    with without_autocast():
        matrix = phi.T @ (weight[:, None] * phi) / len(phi)
        damping = _checked_damping(damping, lambda v: v @ matrix, phi.sum(0, keepdim=True))
        matrix.diagonal().add_(damping)
        factor = torch.linalg.cholesky(matrix)
        values = -(means @ torch.cholesky_solve(of_tasks, factor)).T / len(phi)  # (n, t)
    return Influence(values, torch.zeros_like(values[0]), 0, damping)


def _sums(columns: Tensor, counts: Tensor) -> Tensor:
    """Sums (s, n) of consecutive columns (s, b), ``counts`` (n,) of them at a time."""
    return torch.stack([part.sum(1) for part in columns.split(counts.tolist(), dim=1)], dim=1)


def _checked_damping(damping: float | None, operator: Operator, start: Tensor) -> float:
    if damping is None:
        diagonal, beside, _ = lanczos(operator, start, 10)
        matrix = torch.diag(diagonal[0]) + torch.diag(beside[0], 1) + torch.diag(beside[0], -1)
        ends = torch.linalg.eigvalsh(matrix.double())
        damping = max(float(ends[-1]) / 100, -2 * float(ends[0]))
    remedy = "Pass a small share of the largest eigenvalue: without it there is no solution."
    return check_positive("damping", damping, remedy)


def _check_curvature(curvature: object) -> None:
    if not (isinstance(curvature, type) and issubclass(curvature, CurvatureOperator)):
        expected = "ksm_ext.GaussNewton or ksm_ext.Hessian"
        raise TypeError(message("curvature", expected, repr(curvature), "Pass the class itself."))
