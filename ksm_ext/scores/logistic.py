r"""Ridge-penalised logistic regressions of all subsets at once, by preconditioned Newton-CG.

.. math:: F_S(w) = \frac{1}{|S|} \sum_{i \in S} \log(1 + e^{-(h_i + \phi_i \cdot w)})
          + \frac{\rho}{2} \lVert w \rVert^2

The subsets share their features, so that a Hessian-vector product of all is a few large matrix
products (:mod:`ksm_ext.ops.glm_hvp`). Their Hessians are close to that of all tasks together, whose
inverse preconditions every conjugate gradient; its solution is where every subset starts. A step
ends where the residual is small beside the gradient (*Dembo, Eisenstat & Steihaug 1982*), a subset
when the decrease that Newton's model promises, about :math:`g^\top M g / 2` with the preconditioner
M, is below half the tolerance.

Shapes: features (b, k), margins h (b,), task_offsets (n + 1,), masks (m, n), weights (m, k).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext import ops
from ksm_ext.checks import brief

_CURVATURE_BYTES = 2**28  # of one chunk of subsets
_MAX_CG = 200
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
        tolerance: How far above its minimum an objective may end, about.
        max_steps: Newton steps at most; what they leave is in ``decrement``.
        progress: Whether to show a progress bar over subsets.
    """
    m, (b, k) = len(masks), features.shape
    everything = torch.ones(1, masks.shape[1], dtype=torch.bool)
    start = features.new_zeros(1, k)
    problem = _Problem(features, margins, task_offsets, ridge)
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


class _Problem:
    """What the subsets share."""

    def __init__(self, features: Tensor, margins: Tensor, task_offsets: Tensor, ridge: float):
        self.features, self.margins = features, margins
        self.task_offsets, self.ridge = task_offsets, ridge
        self.inverse: Tensor | None = None  # (k, k) of the Hessian of all tasks

    def precondition_at(self, weights: Tensor) -> None:
        """Take the inverse Hessian of all tasks at ``weights`` (1, k) as preconditioner."""
        right = torch.sigmoid(self.margins + self.features @ weights[0])
        k = self.features.shape[1]
        hessian = self.features.new_zeros(k, k)
        curvature = right * (1 - right) / max(len(self.features), 1)
        ops.gram_update(hessian, self.features, curvature)
        hessian.diagonal().add_(self.ridge)
        factor = torch.linalg.cholesky(hessian.double())
        self.inverse = torch.cholesky_inverse(factor).to(self.features)

    def evaluate(self, masks: Tensor, weights: Tensor) -> ops.GlmGradient:
        """Gradient, objective and curvature."""
        return ops.glm_gradient(
            self.features,
            self.margins,
            self.task_offsets,
            masks,
            weights,
            ridge=self.ridge,
            curvature_dtype=torch.bfloat16,  # shapes the path to the minimum, not where it is
        )

    def hvp(self, masks: Tensor, curvature: Tensor, v: Tensor) -> Tensor:
        """Hessian-vector products."""
        return ops.glm_hvp(
            self.features, self.task_offsets, masks, v, curvature=curvature, ridge=self.ridge
        )

    def preconditioned(self, v: Tensor) -> Tensor:
        return v / (self.ridge + 0.25) if self.inverse is None else v @ self.inverse


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
    step = torch.zeros_like(gradient)
    residual = gradient.clone()
    direction = problem.preconditioned(residual)
    energy = (residual * direction).sum(1)
    # Coarse far from the minimum and ever finer near it, but no finer than the tolerance.
    wanted = (energy * energy.sqrt().clamp_max(0.1)).clamp_min(0.2 * tolerance)
    for products in range(_MAX_CG):
        rows = (energy > wanted).nonzero()[:, 0]
        if len(rows) == 0:
            return step, products
        part = direction[rows]
        product = problem.hvp(masks[rows.cpu()], curvature[rows], part)
        length = energy[rows] / (part * product).sum(1)
        step[rows] += length[:, None] * part
        residual[rows] -= length[:, None] * product
        preconditioned = problem.preconditioned(residual[rows])
        next_energy = (residual[rows] * preconditioned).sum(1)
        direction[rows] = preconditioned + (next_energy / energy[rows])[:, None] * part
        energy[rows] = next_energy
    return step, _MAX_CG
