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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ksm_ext.checks import check_choice, message
from ksm_ext.network.batches import as_dataset, datasets_by_name
from ksm_ext.network.gradients import AnyProjector, collect_features
from ksm_ext.network.hessian import CurvatureOperator, ggn, hessian, loss_gradients
from ksm_ext.network.outputs import Loss, log_odds
from ksm_ext.network.solvers import Solution, conjugate_gradient, lissa

Curvature = Literal["ggn", "hessian"]
Solver = Literal["cg", "lissa", "projected"] | Callable[[Tensor], Tensor]
CURVATURES = {"ggn": ggn, "hessian": hessian}


@dataclass(frozen=True, eq=False)
class Influence:
    """Influences, and how well their linear systems were solved.

    Attributes:
        values: (n, t), or (b, t) of single samples.
        residuals: (s,). Relative residuals of the systems; 0 where a factorisation or a function
            of one's own solved them.
        num_steps: Products with the curvature, of s vectors each.
    """

    values: Tensor
    residuals: Tensor
    num_steps: int


def influence(
    model: nn.Module,
    tasks: Sequence[Any],
    targets: Mapping[str, Any] | Any,
    loss: str | Loss = "cross_entropy",
    *,
    damping: float,
    curvature: Curvature = "ggn",
    solver: Solver = "cg",
    max_steps: int = 100,
    tolerance: float = 1e-4,
    scale: float | None = None,
    projector: AnyProjector | None = None,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    vectors_per_pass: int | None = None,
    progress: bool = False,
) -> Influence:
    """Influence of each task on each target's mean loss.

    Args:
        model: The network trained on all tasks.
        tasks: n data sets: tensors (b_i, ...), in a tuple or by name, or a Dataset.
        targets: Data sets by name, or one.
        loss: See :func:`ksm_ext.network.hessian.hessian`.
        damping: λ > 0, in units of the curvature of the mean loss. The Hessian of a network is
            indefinite where training has not ended: λ must then exceed its most negative
            eigenvalue, which :func:`ksm_ext.network.spectrum.top_eigenpairs` finds.
        curvature: ``"ggn"`` or ``"hessian"``.
        solver: ``"cg"``; ``"lissa"``; ``"projected"``, where the Gauss-Newton matrix of projected
            gradients is inverted; or a function from right-hand sides (s, p) to solutions (s, p),
            such as an inverse of ``curvlinops``.
        max_steps: Of ``"cg"`` and ``"lissa"``. Look at the residuals for what they achieved.
        tolerance: Of ``"cg"``, relative.
        scale: Of ``"lissa"``: the largest eigenvalue of the damped curvature.
        projector: Of ``"projected"``, such as :class:`ksm_ext.Projector`; its loss is
            cross-entropy.
        parameters: Names or patterns of the parameters that training moves; None: all.
        batch_size: Samples of a pass.
        vectors_per_pass: Vectors multiplied together.
        progress: Whether to show progress bars.

    Returns:
        The :class:`Influence`; ``values[a, j]`` estimates ``F_j(1) - F_j(1 - e_a)``.

    Raises:
        ValueError: If an argument is out of its range or missing.
        RuntimeError: If the damped curvature is not positive definite.
    """
    named = _check_datasets(tasks, targets)
    _check_damping(damping)
    datasets = [as_dataset(task) for task in tasks]
    counts = torch.tensor([len(data) for data in datasets])
    everything: Any = ConcatDataset(datasets)
    if solver == "projected":
        return _projected(
            model, everything, counts, named, damping, loss, projector, parameters, batch_size
        )
    options: dict[str, Any] = {"parameters": parameters, "batch_size": batch_size}
    products: dict[str, Any] = {"vectors_per_pass": vectors_per_pass, "progress": progress}
    check_choice("curvature", curvature, tuple(CURVATURES))
    operator = CURVATURES[curvature](model, everything, loss, **options, **products)
    solve = _solver(operator, solver, damping, max_steps, tolerance, scale, progress)
    num_targets = torch.tensor([len(as_dataset(data)) for data in named.values()])
    if len(named) <= len(datasets):
        gradients = loss_gradients(model, list(named.values()), loss, **options)
        solution = solve(gradients / num_targets.to(gradients)[:, None])  # (t, p)
        slopes = operator.per_sample_slopes(solution.x)  # (t, b)
        values = _sums(slopes, counts).T
    else:
        solution = solve(loss_gradients(model, datasets, loss, **options))  # (n, p)
        query = hessian(model, ConcatDataset(map(as_dataset, named.values())), loss, **options)
        slopes = query.per_sample_slopes(solution.x)  # (n, target samples)
        values = _sums(slopes, num_targets) / num_targets.to(slopes)
    return Influence(-values / operator.num_samples, solution.residuals, solution.num_steps)


def sample_influence(
    model: nn.Module,
    data: Any,
    queries: Any,
    loss: str | Loss = "cross_entropy",
    *,
    damping: float,
    curvature: Curvature = "ggn",
    solver: Solver = "cg",
    max_steps: int = 100,
    tolerance: float = 1e-4,
    scale: float | None = None,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    vectors_per_pass: int | None = None,
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
        solver: ``"cg"``, ``"lissa"`` or a function, see :func:`influence`.
        max_steps: See :func:`influence`.
        tolerance: See :func:`influence`.
        scale: See :func:`influence`.
        parameters: See :func:`influence`.
        batch_size: See :func:`influence`.
        vectors_per_pass: See :func:`influence`.
        progress: See :func:`influence`.

    Returns:
        ``values`` (b, t): the loss of query j less what it would be without sample i.
    """
    _check_damping(damping)
    check_choice("curvature", curvature, tuple(CURVATURES))
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "vectors_per_pass": vectors_per_pass,
        "progress": progress,
    }
    operator = CURVATURES[curvature](model, data, loss, **options)
    solve = _solver(operator, solver, damping, max_steps, tolerance, scale, progress)
    solution = solve(hessian(model, queries, loss, **options).per_sample_gradients())
    values = operator.per_sample_slopes(solution.x).T  # (b, t)
    return Influence(-values / operator.num_samples, solution.residuals, solution.num_steps)


def _solver(
    operator: CurvatureOperator,
    solver: Solver,
    damping: float,
    max_steps: int,
    tolerance: float,
    scale: float | None,
    progress: bool,
) -> Callable[[Tensor], Solution]:
    """From right-hand sides (s, p) to their solution."""

    def solve(rhs: Tensor) -> Solution:
        if solver == "cg":
            return conjugate_gradient(
                operator,
                rhs,
                damping=damping,
                tolerance=tolerance,
                max_steps=max_steps,
                progress=progress,
            )
        if solver == "lissa":
            if scale is None:
                remedy = "Pass the largest eigenvalue of the damped curvature."
                raise ValueError(message("scale", "a number for LiSSA", "None", remedy))
            return lissa(operator, rhs, damping=damping, scale=scale, num_steps=max_steps)
        if not callable(solver):
            check_choice("solver", solver, ("cg", "lissa", "projected"), "Or pass a function.")
            raise AssertionError
        done = torch.ones(len(rhs), dtype=torch.bool, device=rhs.device)
        return Solution(solver(rhs), torch.zeros_like(rhs[:, 0]), 0, done)

    return solve


def _projected(
    model: nn.Module,
    everything: Any,
    counts: Tensor,
    named: dict[str, Any],
    damping: float,
    loss: str | Loss,
    projector: AnyProjector | None,
    parameters: str | Sequence[str] | None,
    batch_size: int | None,
) -> Influence:
    """Influence in the projected space, where the curvature is a matrix (k, k).

    Cross-entropy is ``softplus(-h)`` of the log-odds h, of slope -(1 - q) and curvature q (1 - q)
    for the right answer's probability q.
    """
    if loss != "cross_entropy":
        remedy = "Use solver='cg' for other losses."
        raise ValueError(message("loss", "'cross_entropy' where projected", repr(loss), remedy))
    if projector is None:
        remedy = "Pass a `ksm_ext.Projector` of some hundred dimensions."
        raise ValueError(message("projector", "given to be projected", "None", remedy))

    def features(data: Any) -> tuple[Tensor, Tensor, Tensor]:
        found = collect_features(
            model,
            data,
            log_odds,
            projector,
            parameters=parameters,
            batch_size=batch_size,
            progress=False,
        )
        right = found.values.sigmoid()
        return found.gradients, -(1 - right)[:, None] * found.gradients, right * (1 - right)

    phi, slopes, weight = features(everything)
    matrix = phi.T @ (weight[:, None] * phi) / len(phi)
    matrix.diagonal().add_(damping)
    of_tasks = _sums(slopes.T, counts)  # (k, n)
    means = torch.stack([features(as_dataset(data))[1].mean(0) for data in named.values()])
    factor = torch.linalg.cholesky(matrix)
    values = -(means @ torch.cholesky_solve(of_tasks, factor)).T / len(phi)  # (n, t)
    return Influence(values, torch.zeros_like(values[0]), 0)


def _sums(columns: Tensor, counts: Tensor) -> Tensor:
    """Sums (s, n) of consecutive columns (s, b), ``counts`` (n,) of them at a time."""
    return torch.stack([part.sum(1) for part in columns.split(counts.tolist(), dim=1)], dim=1)


def _check_damping(damping: float) -> None:
    if not damping > 0:
        remedy = "Pass a small share of the largest eigenvalue: without it there is no solution."
        raise ValueError(message("damping", "positive", str(damping), remedy))


def _check_datasets(tasks: Sequence[Any], targets: Any) -> dict[str, Any]:
    """The targets by name; there is a task and a target."""
    if len(tasks) == 0:
        raise ValueError(message("tasks", "one data set or more", "none", "Pass some."))
    named = datasets_by_name(targets)
    if not named:
        raise ValueError(message("targets", "one data set or more", "none", "Pass some."))
    return named
