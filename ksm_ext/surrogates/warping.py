r"""Learning how a score depends on shares: a power for all tasks, a scale for each, a linear part.

The kernel ``warped + b linear`` that makes the scores of one target most likely, its parameters not
far from what is usual. With y the scores, K the kernel plus the ridge, P the inverse of K without
the constant direction, and the signal variance put where the likelihood is largest,

.. math:: \tfrac{m - 1}{2} \log(y^T P y) + \tfrac12 \log |K| + \tfrac12 \log(1^T K^{-1} 1)
          + \sum_j c_j (p_j - p_{0j})^2

(restricted likelihood: the mean score is unknown) is least over the logarithms p of scales, power,
b and ridge. What is learnt for one target is a candidate for all.

Shapes: m subsets, n tasks; float64.

Reference: *Rasmussen & Williams 2006, Gaussian Processes for Machine Learning*, eq. 2.45 and 5.9.
"""

import math
from typing import Any

import numpy as np
import torch

from ksm_ext.surrogates.judgement import Scores
from ksm_ext.surrogates.kernels import Kernel, Linear, Sum, Warped
from ksm_ext.surrogates.likelihood import Solved, restricted
from ksm_ext.surrogates.masks import Masks

Array = np.ndarray[Any, np.dtype[np.float64]]

_TARGETS = 16  # that parameters are learnt for; the others choose among these
_ROWS = 256  # that they are learnt on: each step costs their third power
_STEPS = 40
_LIKELY = 3.0  # nats over a score that no task matters to: one in ten such scores has as many
_JITTER = 1e-8

# Power, b and ridge: what is usual, its range, and c; of scales relative to what is usual. A scale
# is believed within a factor 3.6 (one deviation), a power within 1.5: smaller ones see no more than
# whether a share is 0.
_USUAL = np.log([1 / 3, 0.02, 0.05])
_LOWER, _UPPER = np.log([0.2, 1e-6, 1e-6]), np.log([3.0, 1e6, 20.0])
_STRENGTH = np.array([3.0, 0.05, 0.02])
_LOWER_SCALE, _UPPER_SCALE, _STRENGTH_OF_SCALE = math.log(1e-3), math.log(1e2), 0.3


def is_warped(kernel: Kernel | None) -> bool:
    """Whether a kernel is of powers, a linear part beside."""
    parts = [part for _, part in kernel.terms] if isinstance(kernel, Sum) else [kernel]
    return any(isinstance(part, Warped) for part in parts)


def with_learnt(
    kernels: list[Kernel], masks: Masks, scores: Scores, *, likely: bool
) -> list[Kernel]:
    """The kernels, with what was learnt for each target in the place of one without scales.

    Args:
        kernels: The kernels, all other parameters set.
        masks: (m, n).
        scores: What is fitted, of one table.
        likely: Leave out what hardly makes the scores of its target likelier.
    """
    found: list[Kernel] = []
    for kernel in kernels:
        if not (isinstance(kernel, Warped) and kernel.scales is None):
            found.append(kernel)
            continue
        weights = masks.floats.cpu().numpy()
        targets = scores.spaced_targets(_TARGETS).tolist() or [0]
        learnt = [learn(kernel, weights, scores.values[0, :, j].cpu().numpy()) for j in targets]
        found += [each for each, gain in learnt if gain > _LIKELY or not likely]
    return found


def learn(kernel: Warped, weights: Array, scores: Array) -> tuple[Sum, float]:
    """The kernel with scales and a linear part for one target, and a power unless that is given.

    Args:
        kernel: Without scales.
        weights: (m, n).
        scores: (m,); a constant target leaves what is usual.

    Returns:
        The kernel, and the logarithm of how much likelier it is than that no task matters.
    """
    from scipy.optimize import minimize  # half a second of import time, for this function only

    unit = float(np.abs(weights).sum() / max(np.count_nonzero(weights), 1)) or 1.0
    weights = weights / unit  # so that a power changes nothing at typical weights
    usual = np.concatenate([np.zeros(weights.shape[1]), _USUAL])
    if kernel.power is not None:
        usual[-3] = math.log(kernel.power)
    usual[:-3] = np.log(_usual_scales(weights, math.exp(usual[-3])))
    lower = np.concatenate([usual[:-3] + _LOWER_SCALE, _LOWER])
    upper = np.concatenate([usual[:-3] + _UPPER_SCALE, _UPPER])
    if kernel.power is not None:
        lower[-3] = upper[-3] = usual[-3]
    rows = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0))[:_ROWS].numpy()
    best, gain = usual, 0.0
    if np.ptp(scores[rows]) > 0:
        likelihood = Likelihood(weights[rows], scores[rows], usual)
        best = minimize(
            likelihood,
            usual,
            jac=True,
            method="L-BFGS-B",
            bounds=list(zip(lower, upper, strict=True)),
            options={"maxiter": _STEPS, "maxcor": 20, "ftol": 1e-6},
        ).x
        gain = likelihood.of_noise - likelihood(best)[0]
    *scales, power, linear, _ = np.exp(best)
    warped = Warped(float(power), tuple((np.array(scales) / unit**power).tolist()))
    variance = unit**2 * max(float(weights.var(0).sum()), 1e-300)
    return Sum(((1.0, warped), (float(linear) / variance, Linear()))), gain


def _usual_scales(weights: Array, power: float) -> Array:
    """(n,) scales that make two rows a unit apart or so."""
    deviations = (np.sign(weights) * np.abs(weights) ** power).std(0)
    least = max(1e-12 * float(deviations.max()), 1e-300)
    return np.asarray(1 / (np.maximum(deviations, least) * math.sqrt(weights.shape[1])))


class Likelihood:
    """Minus the log likelihood and prior of the module's head, with its gradient."""

    def __init__(self, weights: Array, scores: Array, usual: Array) -> None:
        """Take (m, n) weights, (m,) scores that vary and (n + 3,) the usual logarithms."""
        self.scores = (scores - scores.mean()) / scores.std()
        self._signs, size = np.sign(weights), np.abs(weights)
        self._logs = np.log(np.where(size > 0, size, 1.0))
        centred = weights - weights.mean(0)
        variance = max(float(centred.var(0).sum()), 1e-300)
        self._linear = centred @ centred.T / variance  # of mean 1 on the diagonal
        self._usual = usual
        strength = np.full(len(usual) - 3, _STRENGTH_OF_SCALE)
        self._strength = np.concatenate([strength, _STRENGTH])

    @property
    def of_noise(self) -> float:
        """The value where nothing matters and nothing is to be believed: K is the identity."""
        return len(self.scores) / 2 * math.log(len(self.scores))

    def __call__(self, logs: Array) -> tuple[float, Array]:
        """The value and its derivative (n + 3,) at the logarithms (n + 3,)."""
        *_, power, linear, ridge = np.exp(logs)
        u = np.exp(logs[:-3]) * self._signs * np.exp(power * self._logs)  # (m, n)
        squares = (u * u).sum(1)
        distance = np.sqrt(np.maximum(squares[:, None] + squares - 2 * u @ u.T, 0.0))
        np.fill_diagonal(distance, 0.0)
        kernel = np.exp(-distance)
        value, slope = self._of_gram(kernel + linear * self._linear, ridge)
        pull = -slope * kernel / np.maximum(distance, 1e-6)  # by half the squared distances
        by_u = 2 * (pull.sum(1)[:, None] * u - pull @ u)
        gradient = np.empty_like(logs)
        gradient[:-3] = (by_u * u).sum(0)
        gradient[-3] = power * float((by_u * u * self._logs).sum())
        gradient[-2] = linear * float((slope * self._linear).sum())
        gradient[-1] = ridge * float(np.trace(slope))
        off = logs - self._usual
        return value + float(self._strength @ off**2), gradient + 2 * self._strength * off

    def _of_gram(self, kernel: Array, ridge: float) -> tuple[float, Array]:
        """The likelihood's part, and its derivative (m, m) by the entries of the matrix K."""
        m = len(kernel)
        covariance = torch.from_numpy(kernel + (ridge + _JITTER) * np.eye(m))
        values = torch.from_numpy(self.scores)[:, None]
        log_likelihood, slope = restricted(Solved.of(covariance, center=True), values)
        constant = (m - 1) / 2 * (1 + math.log(2 * math.pi / (m - 1))) - math.log(m) / 2
        return -float(log_likelihood) - constant, -slope.numpy()
