r"""Ridge-penalised logistic regressions of all subsets at once, by preconditioned Newton-CG.

.. math:: F_S(w) = \frac{1}{|S|} \sum_{i \in S} \log(1 + e^{-(h_i + \phi_i \cdot w)})
          + \frac{\rho}{2} \lVert w \rVert^2

or, where samples have weights :math:`c_i`, with :math:`\sum_{i \in S} c_i \log(\dots) /
\sum_{i \in S} c_i` for the mean.

The subsets share their features, so that a Hessian-vector product of all is a few large matrix
products (:mod:`ksm_ext.ops.glm_hvp`). Their Hessians are close to that of all tasks together, whose
inverse preconditions every conjugate gradient; its solution is where every subset starts. A step
ends where the residual is small beside the gradient (*Dembo, Eisenstat & Steihaug 1982*), a subset
when the decrease that Newton's model promises, about :math:`g^\top M g / 2` with the preconditioner
M, is below half the tolerance.

One step of unit curvature for every subset (:func:`unit_steps`) is one such linear system, of the
same preconditioner: a single factorisation serves all subsets.

Shapes: features (b, k), margins h (b,), task_offsets (n + 1,), masks (m, n), weights w (m, k),
sample_weights c (b,).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus
from tqdm import tqdm

from ksm_ext import ops
from ksm_ext.checks import brief

_CURVATURE_BYTES = 2**28  # of one chunk of subsets
_SAMPLES = 512  # of one block, where not all are taken together
_STEPS = 4096  # systems solved together
_MAX_CG = 200
_MAX_UNIT_CG = 1000  # or 2 k, where a factorisation costs less
_MAX_HALVINGS = 30


@dataclass(frozen=True, eq=False)
class LogisticFit:
    """Solutions of all subsets.

    Attributes:
        weights: (m, k), in the dtype of the features.
        objective: (m,) float64. Of the solutions.
        decrement: (m,) float64. About how far above its minimum each objective is.
        num_products: Hessian-vector products, of all subsets that had not converged, that it took.
    """

    weights: Tensor
    objective: Tensor
    decrement: Tensor
    num_products: int

    __repr__ = brief


def fit_logistic(
    features: Tensor,
    margins: Tensor,
    task_offsets: Tensor,
    masks: Tensor,
    ridge: float,
    *,
    sample_weights: Tensor | None = None,
    tolerance: float = 1e-8,
    max_steps: int = 50,
    progress: bool = False,
) -> LogisticFit:
    """Minimise the objective of every subset.

    Args:
        features: (b, k) float32 or float64, sorted by task.
        margins: (b,), same dtype. At zero weights.
        task_offsets: (n + 1,) int64. First sample of each task, then b.
        masks: (m, n) bool. An empty subset has zero weights.
        ridge: Positive.
        sample_weights: (b,), not negative; None means 1. Their sum over a subset is its size.
        tolerance: How far above its minimum an objective may end, about.
        max_steps: Newton steps at most; what they leave is in ``decrement``.
        progress: Whether to show a progress bar over subsets.
    """
    m, (b, k) = len(masks), features.shape
    if sample_weights is not None:  # a subset without weight is empty
        sample_weights = sample_weights.to(features)
        masks = masks & (task_sums(sample_weights, task_offsets) > 0).to(masks.device)
    everything = torch.ones(1, masks.shape[1], dtype=torch.bool)
    start = features.new_zeros(1, k)
    problem = _Problem(features, margins, task_offsets, ridge, sample_weights)
    start, _, _, products = _minimise(problem, everything, start, tolerance, max_steps)
    problem.precondition_at(start)
    weights = features.new_empty(m, k)
    objective, decrement = torch.empty(2, m, dtype=torch.float64)
    size = max(64, _CURVATURE_BYTES // (2 * max(b, 1)))
    with tqdm(total=m, unit=" subsets", disable=not progress) as bar:
        for rows in torch.arange(m).split(size):
            chunk = masks[rows].cpu()
            first = start * chunk.any(1).to(start)[:, None]
            weights[rows.to(weights.device)], objective[rows], decrement[rows], count = _minimise(
                problem, chunk, first, tolerance, max_steps
            )
            products += count
            bar.update(len(rows))
    return LogisticFit(weights, objective, decrement, products)


def unit_steps(
    features: Tensor,
    task_offsets: Tensor,
    masks: Tensor,
    right: Tensor,
    ridge: float,
    *,
    sample_weights: Tensor | None = None,
    progress: bool = False,
) -> Tensor:
    r"""Solve :math:`(\frac{1}{|S|} \sum_{i \in S} \phi_i \phi_i^\top + \rho) z_S = r_S` for all S.

    By conjugate gradients, preconditioned by the inverse of the matrix of all tasks, as far as
    rounding lets them go; a system that they leave unsolved has a factorisation of its own.

    Args:
        features: (b, k) float32 or float64, sorted by task.
        task_offsets: (n + 1,) int64. First sample of each task, then b.
        masks: (m, n) bool. Not empty.
        right: (m, k) in the dtype of the features.
        ridge: Positive.
        sample_weights: (b,), not negative; None means 1.
        progress: Whether to show a progress bar over subsets.

    Returns:
        (m, k), in the dtype of the features.
    """
    problem = _Quadratic(features, task_offsets, ridge, sample_weights)
    answer = torch.empty_like(right)
    most = min(_MAX_UNIT_CG, 2 * features.shape[1])
    accuracy = (10 * torch.finfo(features.dtype).eps) ** 2
    with tqdm(total=len(masks), unit=" subsets", disable=not progress) as bar:
        for rows in torch.arange(len(masks)).split(_STEPS):
            chunk, here = masks[rows].cpu(), rows.to(right.device)
            product = partial(problem.products, chunk)
            solving = product, problem.preconditioned, right[here]
            step, _ = _conjugate_gradients(*solving, lambda energy: accuracy * energy, most)
            for row in problem.unsolved(chunk, right[here], step).nonzero()[:, 0].tolist():
                step[row] = problem.solved_alone(chunk[row], right[here[row]])
            answer[here] = step
            bar.update(len(rows))
    return answer


def task_sums(sample_weights: Tensor, task_offsets: Tensor) -> Tensor:
    """(n,): the weights (b,) of each task's samples together."""
    parts = sample_weights.split(task_offsets.diff().tolist())
    return torch.stack([part.sum() for part in parts])


class _Problem:
    """What the subsets share."""

    def __init__(
        self,
        features: Tensor,
        margins: Tensor,
        task_offsets: Tensor,
        ridge: float,
        sample_weights: Tensor | None,
    ):
        self.features, self.margins = features, margins
        self.task_offsets, self.ridge = task_offsets, ridge
        self.inverse: Tensor | None = None  # (k, k) of the Hessian of all tasks
        self.sample_weights = sample_weights

    def precondition_at(self, weights: Tensor) -> None:
        """Take the inverse Hessian of all tasks at ``weights`` (1, k) as preconditioner."""
        right = torch.sigmoid(self.margins + self.features @ weights[0])
        curvature = right * (1 - right)
        if self.sample_weights is None:
            curvature /= max(len(self.features), 1)
        else:
            curvature *= self.sample_weights / self.sample_weights.sum()
        factor = _factor(self.features, curvature, self.ridge)
        self.inverse = torch.cholesky_inverse(factor).to(self.features)

    def evaluate(self, masks: Tensor, weights: Tensor) -> ops.GlmGradient:
        """Gradient, objective and curvature."""
        if self.sample_weights is not None:
            return self._evaluate_weighted(masks, weights, self.sample_weights)
        return ops.glm_gradient(
            self.features,
            self.margins,
            self.task_offsets,
            masks,
            weights,
            ridge=self.ridge,
            curvature_dtype=torch.bfloat16,  # shapes the path to the minimum, not where it is
        )

    def _evaluate_weighted(
        self, masks: Tensor, weights: Tensor, sample_weights: Tensor
    ) -> ops.GlmGradient:
        """What :func:`ops.glm_gradient` does, in blocks of samples that have weights."""
        inside = masks.to(weights)  # (m, n)
        sizes = self.task_offsets.diff()
        samples = inside @ sizes.to(weights)
        share = inside / (inside @ task_sums(sample_weights, self.task_offsets))[:, None].clamp_min(
            torch.finfo(weights.dtype).tiny
        )
        task = torch.repeat_interleave(sizes.to(weights.device))
        objective = self.ridge / 2 * weights.double().square().sum(1)
        gradient = self.ridge * weights
        curvature = weights.new_empty(len(weights), len(task), dtype=torch.bfloat16)
        for start in range(0, len(self.features), _SAMPLES):
            rows = slice(start, start + _SAMPLES)
            margins = torch.addmm(self.margins[rows], weights, self.features[rows].T)
            weighed = share[:, task[rows]] * sample_weights[rows]
            objective += (weighed * softplus(-margins)).sum(1).double()
            weighed *= torch.sigmoid(-margins)
            gradient.addmm_(weighed, self.features[rows], alpha=-1)
            # glm_hvp divides by the number of samples, which have their sum of weights already.
            curvature[:, rows] = samples[:, None] * weighed * torch.sigmoid(margins)
        return ops.GlmGradient(gradient, objective, curvature)

    def hvp(self, masks: Tensor, curvature: Tensor, v: Tensor) -> Tensor:
        """Hessian-vector products."""
        return ops.glm_hvp(
            self.features, self.task_offsets, masks, v, curvature=curvature, ridge=self.ridge
        )

    def preconditioned(self, v: Tensor) -> Tensor:
        return v / (self.ridge + 0.25) if self.inverse is None else v @ self.inverse


class _Quadratic:
    """The systems of :func:`unit_steps`; weights are in the rows of the features."""

    def __init__(
        self, features: Tensor, task_offsets: Tensor, ridge: float, sample_weights: Tensor | None
    ):
        self.features, self.task_offsets, self.ridge = features, task_offsets, ridge
        self.totals = task_offsets.diff().to(features)  # (n,)
        if sample_weights is not None:
            self.features = sample_weights.sqrt().to(features)[:, None] * features
            self.totals = task_sums(sample_weights.to(features), task_offsets)
        factor = _factor(self.features, None, ridge, self.totals.sum())
        eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        # The root, and not the inverse, stays positive where it is rounded.
        self.root = torch.linalg.solve_triangular(factor, eye, upper=False)

    def products(self, masks: Tensor, rows: Tensor, v: Tensor) -> Tensor:
        """Matrix-vector products of some rows of masks."""
        masks = masks[rows.cpu()]
        inside = masks.to(v)
        # The operator divides by the number of samples.
        scale = (inside @ self.task_offsets.diff().to(v)) / (inside @ self.totals.to(v))
        products = ops.glm_hvp(self.features.to(v), self.task_offsets, masks, v)
        return scale[:, None] * products + self.ridge * v

    def preconditioned(self, v: Tensor) -> Tensor:
        root = self.root.to(v)
        return v @ root.T @ root

    def unsolved(self, masks: Tensor, right: Tensor, step: Tensor) -> Tensor:
        """(m,) bool: whether steps have less than half their digits, in their matrix's norm.

        As residuals in float64 tell, with the inverse of the matrix of all tasks for their own.
        """
        tolerance = torch.finfo(step.dtype).eps ** 0.5
        right, step = right.double(), step.double()
        every = torch.arange(len(masks), device=right.device)
        residual = right - self.products(masks, every, step)
        off, size = ((each @ self.root.T).square().sum(1) for each in (residual, right))
        return ~(off <= tolerance**2 * size)

    def solved_alone(self, mask: Tensor, right: Tensor) -> Tensor:
        """The solution (k,) of one subset (n,), in float64."""
        inside = mask.repeat_interleave(self.task_offsets.diff()).to(right.device)
        total = self.totals[mask.to(right.device)].sum()
        factor = _factor(self.features[inside], None, self.ridge, total)
        return torch.cholesky_solve(right.double()[:, None], factor)[:, 0].to(right)


def _factor(
    features: Tensor, curvature: Tensor | None, ridge: float, total: Tensor | float = 1.0
) -> Tensor:
    """Cholesky factor (k, k) of ``features^T curvature features / total + ridge``, in float64."""
    k = features.shape[1]
    matrix = torch.zeros(k, k, dtype=torch.float64, device=features.device)
    for start in range(0, len(features), _SAMPLES):  # without a copy of all samples
        rows = slice(start, start + _SAMPLES)
        bent = None if curvature is None else curvature[rows].double()
        ops.gram_update(matrix, features[rows].double(), bent)
    matrix /= total
    matrix.diagonal().add_(ridge)
    return torch.linalg.cholesky(matrix)


def _minimise(
    problem: _Problem, masks: Tensor, start: Tensor, tolerance: float, max_steps: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Weights (m, k), objectives (m,), decrements (m,) of masks (m, n), and products taken."""
    weights = start.expand(len(masks), -1).clone()
    gradient, objective, curvature = problem.evaluate(masks, weights)
    assert curvature is not None
    decrement = torch.empty_like(objective)
    active = torch.arange(len(masks), device=weights.device)  # rows of the tensors above
    products = 0
    for _ in range(max_steps):
        # The preconditioner stands in for the Hessian: no product is spent on knowing the end.
        promised = (gradient[active] * problem.preconditioned(gradient[active])).sum(1).double()
        decrement[active] = promised / 2
        active = active[promised > tolerance]
        if len(active) == 0:
            break
        step, count = _newton_step(
            problem, masks[active.cpu()], gradient[active], curvature[active], tolerance
        )
        products += count
        slope = (gradient[active] * step).sum(1).double()
        searching, length = torch.arange(len(active), device=active.device), 1.0
        for _ in range(_MAX_HALVINGS):
            rows = active[searching]
            trial = weights[rows] - length * step[searching]
            found = problem.evaluate(masks[rows.cpu()], trial)
            assert found.curvature is not None
            # Sums in the features' precision tell objectives apart to so much.
            rounding = 1e-7 * objective[rows].abs()
            enough = objective[rows] - 1e-4 * length * slope[searching] + rounding
            accepted = found.objective <= enough
            rows = rows[accepted]
            weights[rows], gradient[rows] = trial[accepted], found.gradient[accepted]
            objective[rows] = found.objective[accepted]
            curvature[rows] = found.curvature[accepted]
            searching, length = searching[~accepted], length / 2
            if len(searching) == 0:
                break
    return weights, objective.cpu(), decrement.cpu(), products


def _newton_step(
    problem: _Problem, masks: Tensor, gradient: Tensor, curvature: Tensor, tolerance: float
) -> tuple[Tensor, int]:
    """Approximate ``H^-1 g`` (m, k) and the products taken."""

    def wanted(energy: Tensor) -> Tensor:
        # Coarse far from the minimum and ever finer near it, but no finer than the tolerance.
        return (energy * energy.sqrt().clamp_max(0.1)).clamp_min(0.2 * tolerance)

    def product(rows: Tensor, v: Tensor) -> Tensor:
        bent = curvature if len(rows) == len(masks) else curvature[rows]
        return problem.hvp(masks[rows.cpu()], bent, v)

    return _conjugate_gradients(product, problem.preconditioned, gradient, wanted, _MAX_CG)


def _conjugate_gradients(
    product: Callable[[Tensor, Tensor], Tensor],
    preconditioned: Callable[[Tensor], Tensor],
    right: Tensor,
    wanted: Callable[[Tensor], Tensor],
    most: int,
) -> tuple[Tensor, int]:
    """Approximate ``H^-1 right`` (m, k) and the products taken.

    Those that have converged leave, so that nothing is done for them any more.

    Args:
        product: Of some of the m matrices, by their rows, with a vector each.
        preconditioned: Vectors times the preconditioner.
        right: (m, k).
        wanted: What may remain of squared residuals (m,), in the preconditioner's norm, given those
            at the start.
        most: Products at most.
    """
    answer = torch.zeros_like(right)
    rows = torch.arange(len(right), device=right.device)  # those below, which go on
    step, residual = torch.zeros_like(right), right.clone()
    direction = preconditioned(residual)
    energy = (residual * direction).sum(1)
    enough = wanted(energy)
    for products in range(most):
        going = energy > enough
        if not bool(going.all()):
            answer[rows] = step
            state = rows, step, residual, direction, energy, enough
            rows, step, residual, direction, energy, enough = (each[going] for each in state)
        if len(rows) == 0:
            return answer, products
        image = product(rows, direction)
        length = (energy / (direction * image).sum(1))[:, None]
        step.addcmul_(length, direction)
        residual.addcmul_(length, image, value=-1)
        downhill = preconditioned(residual)
        before, energy = energy, (residual * downhill).sum(1)
        direction = torch.addcmul(downhill, (energy / before)[:, None], direction)
    answer[rows] = step
    return answer, most
