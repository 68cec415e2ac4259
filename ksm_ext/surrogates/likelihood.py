r"""Parameters of a kernel learnt from the scores: by restricted likelihood, or by leaving one out.

Decays (one for all tasks, or one for each), the amplitude by size and the ridge are too many for a
grid. They maximise, by L-BFGS-B with exact gradients, the restricted likelihood of the scores
(Patterson & Thompson 1971): that of their contrasts, which an intercept does not move. With
``V = K + ridge / w``, P its inverse on contrasts, and the signal variance of every target at its
best, ``sigma_j^2 = y_j^T P y_j / (m - 1)``,

.. math:: \ell_j = -\tfrac12 \left[ (m - 1) (\log 2 \pi \sigma_j^2 + 1) + \log |V|
          + \log \frac{1^T V^{-1} 1}{m} \right].

The alternative is ``-m/2 log`` of the mean squared leave-one-out residual ``(P y)_i / P_ii``.
Either is a sum over targets, counted as often as they are independent: ``(sum v)^2 / sum v^2`` of
the variances v of their principal components. For a change dV of V both change by ``<G, dV>``, G
one (m, m) matrix; of the likelihood it is

.. math:: G = \tfrac12 \Big( \sum_j \frac{P y_j y_j^T P}{\sigma_j^2} - t P \Big), \qquad
          \Big\langle G, \frac{\partial K}{\partial \log \gamma_i} \Big\rangle
          = -\rho_i \sum_{a, b} M_{ab} (s_{ai} - s_{bi})^2

with ``M = 2 G K`` entry by entry (over ``2 sqrt(h)`` for the exponential kernel) and the kernel's
rates rho: O(m^3 + n m^2) for all gradients together.

Priors keep few scores from deciding much: ``log gamma_i`` is normal around the shared
``log gamma``, and the amplitude around 0.

Shapes: m subsets, n tasks, t targets; scores of one table, standardised, float64.

References: Patterson & Thompson 1971, *Biometrika* 58; Rasmussen & Williams 2006, ch. 5.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ksm_ext.checks import brief, check_choice
from ksm_ext.surrogates.judgement import Scores
from ksm_ext.surrogates.kernels import RBF, Exponential
from ksm_ext.surrogates.masks import Masks

Objective = Literal["likelihood", "loo"]

AMPLITUDE_WIDTH = 1.0
"""Standard deviation of the amplitude's prior: half or twice as wide predict as well on games."""

DECAY_WIDTH = 0.4
"""Standard deviation of the prior of ``log gamma_i`` around the shared ``log gamma``.

The best of 0.2 to 1.5 for 50 to 300 subsets of games of 8 to 16 players; 0.6 and more overfit.
"""

_SIZES_FROM = 3  # different sizes among the subsets from which they can tell anything
_RIDGES = 1e-5, 1e3
_SCALES = 1e-2, 30.0  # of gamma, in units of 1 / typical distance
_MOST_STEPS = 200
_TARGETS = 16  # that kernels of their own are learnt for; the others choose among these
_ROWS = 512  # that they are learnt on: each step costs their third power


@dataclass(frozen=True, eq=False)
class LearntKernel:
    """What :func:`learn_kernel` found.

    Attributes:
        kernel: The kernel, all parameters set.
        ridge: Its ridge.
        log_likelihood: Sum over targets of the restricted log likelihood of the scores.
    """

    kernel: RBF | Exponential
    ridge: float
    log_likelihood: float


def learnt_kernels(
    masks: Masks, scores: Scores, share_ridge: Literal["auto"] | bool
) -> list[RBF | Exponential]:
    """What ``kernel="ard"`` is: kernels with decays by task, and an amplitude where sizes vary.

    Exponential and RBF, learnt by restricted likelihood of all targets together, of each target
    (evenly spaced ones of many), or both to choose from, as kernel and ridge are shared.

    Args:
        masks: (m, n) subsets, or real weights.
        scores: Scores of one table.
        share_ridge: See :func:`ksm_ext.fit_surrogate`.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randperm(len(masks), generator=generator)[:_ROWS].to(scores.values.device)
    masks, scores = masks[rows], scores.rows(rows)
    if not len(scores.varying):
        return [Exponential(gamma=1.0)]  # nothing to learn from, nor to predict
    each = [scores.targets(column[None]) for column in scores.spaced_targets(_TARGETS)]
    groups = each if share_ridge is False or len(each) == 1 else [scores]
    if share_ridge == "auto" and len(each) > 1:
        groups = [scores, *each]
    amplitude = masks.binary and bool(sees_sizes(masks.values))
    return [
        learn_kernel(family, masks, group, amplitude=amplitude).kernel
        for group in groups
        for family in (Exponential(), RBF())
    ]


def sees_sizes(subsets: Tensor) -> Tensor:
    """(...) bool: whether subsets (..., m, n) are of enough different sizes to tell anything."""
    sizes = subsets.sum(-1).sort(-1).values
    return (sizes.diff(dim=-1) > 0).sum(-1) + 1 >= _SIZES_FROM


def learn_kernel(
    kernel: RBF | Exponential,
    masks: Masks,
    scores: Scores,
    *,
    amplitude: bool = True,
    by_task: bool = True,
    objective: Objective = "likelihood",
    amplitude_width: float = AMPLITUDE_WIDTH,
    decay_width: float = DECAY_WIDTH,
) -> LearntKernel:
    """Decays, amplitude and ridge of a kernel of squared distances.

    From the best of a grid of a shared decay and ridge; decays of single tasks start at the shared
    one.

    Args:
        kernel: :class:`RBF` or :class:`Exponential`; its parameters are not looked at.
        masks: (m, n) subsets, or real weights.
        scores: Standardised scores, with their weights.
        amplitude: Whether to learn an amplitude by size; else it is 0.
        by_task: Whether to learn a decay for each task.
        objective: ``"likelihood"`` or ``"loo"``.
        amplitude_width: Standard deviation of the prior of the amplitude.
        decay_width: Standard deviation of the prior of each ``log gamma_i``.

    Raises:
        ValueError: If ``objective`` is another, or the kernel is.
    """
    from scipy.optimize import minimize  # takes as long to import as all of this package

    check_choice("objective", objective, get_args(Objective))
    check_choice(
        "kernel", kernel.name, (RBF.name, Exponential.name), "The others have no gradients."
    )
    evaluate = {"likelihood": restricted, "loo": _left_out}[objective]
    problem = _Problem(type(kernel), masks, scores, evaluate, amplitude_width, decay_width)
    point = problem.start()
    stages = [(False, False), (amplitude, False), (amplitude, by_task)]
    for stage in dict.fromkeys(stages):
        free = problem.free(*stage)
        found = minimize(
            problem.part_loss,
            point[free],
            args=(point, free),
            jac=True,
            method="L-BFGS-B",
            bounds=problem.bounds()[free],
            options={"maxiter": _MOST_STEPS},
        )
        point[free] = found.x
    learnt, ridge = problem.model(point)
    total = float(restricted_log_likelihood(learnt, ridge, masks, scores).nansum())
    return LearntKernel(learnt, ridge, total)


def restricted_log_likelihood(
    kernel: RBF | Exponential, ridge: float, masks: Masks, scores: Scores
) -> Tensor:
    """(t,) restricted log likelihood of every target, at its best signal variance.

    Without an intercept it is the likelihood itself.
    """
    values = scores.values[0][:, scores.varying]
    found = torch.full_like(scores.values[0, 0], math.nan)
    found[scores.varying] = restricted(_solved(kernel.gram(masks), ridge, scores), values)[0]
    return found


@dataclass(frozen=True, eq=False)
class Solved:
    """The covariance V of the observations, factored.

    Attributes:
        precision: (m, m) P.
        log_determinant: Of V, on contrasts where there is an intercept.
        degrees: m, less one for an intercept.
    """

    precision: Tensor
    log_determinant: Tensor
    degrees: int

    __repr__ = brief

    @classmethod
    def of(cls, covariance: Tensor, *, center: bool) -> "Solved":
        """Of (m, m) V, with an intercept or without."""
        factor, failed = torch.linalg.cholesky_ex(covariance)
        extra = 1e-10
        while bool(failed) and extra < 1e-3:  # rounding made an eigenvalue negative
            diagonal = extra * covariance.diagonal().mean().expand(len(covariance))
            factor, failed = torch.linalg.cholesky_ex(covariance + torch.diag(diagonal))
            extra *= 100
        if bool(failed):
            factor = torch.linalg.cholesky(covariance)  # raises
        inverse = torch.cholesky_inverse(factor)
        determinant, m = 2 * factor.diagonal().log().sum(), len(covariance)
        if not center:
            return cls(inverse, determinant, m)
        constant = inverse.sum(1)
        total = constant.sum()
        precision = inverse - constant[:, None] * constant / total
        return cls(precision, determinant + (total / m).log(), m - 1)


def _solved(gram: Tensor, ridge: float, scores: Scores) -> Solved:
    covariance = gram + torch.diag(ridge / scores.weights[0])
    return Solved.of(covariance, center=scores.center)


Evaluate = Callable[[Solved, Tensor], tuple[Tensor, Tensor]]


def restricted(solved: Solved, values: Tensor) -> tuple[Tensor, Tensor]:
    """(t,) log likelihoods and the G of the module's head, for values (m, t)."""
    dual = solved.precision @ values
    variance = (values * dual).sum(0).clamp_min(1e-300) / solved.degrees
    logs = solved.degrees * (1 + (2 * math.pi * variance).log()) + solved.log_determinant
    change = (dual / variance) @ dual.T - values.shape[1] * solved.precision
    return -logs / 2, change / 2


def _left_out(solved: Solved, values: Tensor) -> tuple[Tensor, Tensor]:
    """(t,) ``-m/2 log`` of mean squared leave-one-out residuals, and their G."""
    dual, own = solved.precision @ values, solved.precision.diagonal()[:, None]
    residuals = dual / own
    mean = residuals.square().mean(0).clamp_min(1e-300)
    scaled = residuals / own / mean  # (m, t): of d log mean / 2 by each dual coefficient, times m
    moved = solved.precision @ scaled
    direct = (moved @ dual.T + dual @ moved.T) / 2
    own_change = (scaled * residuals).sum(1)  # by each P_ii
    indirect = (solved.precision * own_change) @ solved.precision
    return -len(values) / 2 * mean.log(), direct - indirect


@dataclass(frozen=True, eq=False)
class _Problem:
    """The loss of a point: log gamma, log ridge, amplitude, and n deviations of log gamma_i."""

    family: type[RBF] | type[Exponential]
    masks: Masks
    scores: Scores
    evaluate: Evaluate
    amplitude_width: float
    decay_width: float

    @property
    def unit(self) -> float:
        """The logarithm of 1 / typical distance."""
        return -math.log(max(self.family().typical_distance(self.masks), 1e-12))

    def free(self, amplitude: bool, by_task: bool) -> np.ndarray:
        """Which numbers of a point are learnt, bool."""
        return np.array([True, True, amplitude] + [by_task] * self.masks.num_tasks)

    def bounds(self) -> np.ndarray:
        """(3 + n, 2)."""
        shared = [np.log(_SCALES) + self.unit, np.log(_RIDGES), (-8.0, 8.0)]
        return np.array(shared + [(-5.0, 5.0)] * self.masks.num_tasks)

    def start(self) -> np.ndarray:
        """The best of a grid of gammas and ridges."""
        points = np.zeros((12, 3 + self.masks.num_tasks))
        grid = [(gamma, ridge) for gamma in (0.1, 0.3, 1.0, 3.0) for ridge in (1e-3, 3e-2, 1.0)]
        points[:, :2] = np.log(grid)
        points[:, 0] += self.unit
        return points[np.argmin([self.loss(point)[0] for point in points])]

    def model(self, point: np.ndarray) -> tuple[RBF | Exponential, float]:
        """The kernel and the ridge."""
        log_gamma, log_ridge, amplitude, *deviations = point.tolist()
        if any(deviations):
            gamma = tuple(math.exp(log_gamma + deviation) for deviation in deviations)
            return self.family(gamma, amplitude), math.exp(log_ridge)
        return self.family(math.exp(log_gamma), amplitude), math.exp(log_ridge)

    def part_loss(
        self, values: np.ndarray, point: np.ndarray, free: np.ndarray
    ) -> tuple[float, np.ndarray]:
        """:meth:`loss` of ``point`` with ``values`` where it is ``free``."""
        moved = point.copy()
        moved[free] = values
        loss, gradient = self.loss(moved)
        return loss, gradient[free]

    def loss(self, point: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the objective and the log prior, and the gradient."""
        kernel, ridge = self.model(point)
        gram, varying = kernel.gram(self.masks), self.scores.varying
        solved = _solved(gram, ridge, self.scores)
        values, change = self.evaluate(solved, self.scores.values[0][:, varying])
        moved = change * gram
        sizes = 1 - self.masks.floats.sum(1) / self.masks.num_tasks
        of_tasks = self._decays(kernel, gram, moved).cpu().numpy()
        by_ridge = float(change.diagonal() @ (ridge / self.scores.weights[0]))
        by_amplitude = 2 * float(sizes @ moved.sum(1))
        gradient = np.array([of_tasks.sum(), by_ridge, by_amplitude, *of_tasks])
        widths = np.array(
            [np.inf, np.inf, self.amplitude_width] + [self.decay_width] * len(of_tasks)
        )
        share = self._independent / len(varying)
        loss = -share * float(values.sum()) + float(((point / widths) ** 2).sum()) / 2
        return loss, -share * gradient + point / widths**2

    def _decays(self, kernel: RBF | Exponential, gram: Tensor, moved: Tensor) -> Tensor:
        """(n,) gradients by ``log gamma_i``."""
        if isinstance(kernel, Exponential):
            plain = replace(kernel, amplitude=0.0).gram(self.masks)
            distance = -plain.log()
            moved = torch.where(distance > 0, moved / distance, 0.0)
        x, rates = self.masks.floats, kernel.rates(self.masks.num_tasks).to(gram.device)
        return -2 * rates * (moved.sum(1) @ x.square() - (x * (moved @ x)).sum(0))

    @property
    def _independent(self) -> float:
        """How many targets there are, counting those that move together as one."""
        variances = torch.linalg.svdvals(self.scores.values[0][:, self.scores.varying]).square()
        return float(variances.sum().square() / variances.square().sum())
