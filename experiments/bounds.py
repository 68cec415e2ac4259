r"""Generalisation from the trace of the Hessian: flat minima tell more about unseen data.

With the prior :math:`N(W_0, \sigma^2 I)` around the weights before training and the posterior
:math:`N(W, \sigma^2 I)` around those after it, McAllester's bound holds for the loss in
:math:`[0, C]` of a network drawn from the posterior: with probability :math:`1 - \delta` over the b
training samples

.. math:: E\, L_{test} \le E\, L_{train} + C \sqrt{\frac{1}{2 b} \Big(
          \frac{\lVert W - W_0 \rVert^2}{2 \sigma^2} + \log \frac{2 \sqrt b\, r}{\delta} \Big)}

for each of r values of σ fixed beforehand. :func:`pac_bayes_bound` takes the second-order expansion
:math:`E\, L_{train} \approx L(W) + \frac{\sigma^2}{2} \mathrm{tr} H` and the best σ: a bound as far
as the expansion is exact. What falls with the trace and the distance alone is
:func:`hessian_distance`, a measure to compare networks by, not a bound.

References: *McAllester 1999; Maurer 2004*; *Ju, Li & Zhang 2022, arXiv:2206.02659*; *Zhang, Li & Ju
2024, arXiv:2306.08553*.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ksm_ext.checks import check_finite, check_positive_int, message, shape_text

SIGMAS = tuple(10.0 ** (step / 10) for step in range(-60, 21))
"""The standard deviations among which the best is taken: 1e-6 to 100."""


@dataclass(frozen=True)
class Bound:
    """A bound on the expected loss on unseen data, and its parts.

    Attributes:
        value: ``training_loss + sharpness + complexity``; beyond ``loss_bound`` it says nothing.
        training_loss: L(W).
        sharpness: σ² tr(H) / 2.
        complexity: The square root, times the range of the loss.
        sigma: The best σ.
    """

    value: float
    training_loss: float
    sharpness: float
    complexity: float
    sigma: float


def pac_bayes_bound(
    trace: float,
    initial: Tensor,
    final: Tensor,
    num_samples: int,
    *,
    training_loss: float,
    loss_bound: float = 1.0,
    delta: float = 0.05,
) -> Bound:
    """The bound of the module's head at its best σ of :data:`SIGMAS`.

    Args:
        trace: Trace of the Hessian of the mean training loss at ``final``, non-negative.
        initial: (p,). Weights before training, which must not depend on the samples.
        final: (p,). Weights after it, in memory of their own.
        num_samples: b.
        training_loss: Mean loss on them, between 0 and ``loss_bound``.
        loss_bound: C, the largest loss there is.
        delta: The probability that the bound fails.

    Raises:
        ValueError: If a number is out of its range, or the weights share memory.
    """
    distance = _distance(initial, final)
    _check_range("trace", trace, math.inf)
    _check_range("training_loss", training_loss, loss_bound)
    _check_range("delta", delta, 1, open_ends=True)
    num_samples = check_positive_int("num_samples", num_samples)
    confidence = math.log(2 * math.sqrt(num_samples) * len(SIGMAS) / delta)
    bounds = []
    for sigma in SIGMAS:
        divergence = distance**2 / (2 * sigma**2)
        complexity = loss_bound * math.sqrt((divergence + confidence) / (2 * num_samples))
        sharpness = sigma**2 / 2 * trace
        value = training_loss + sharpness + complexity
        bounds.append(Bound(value, training_loss, sharpness, complexity, sigma))
    return min(bounds, key=lambda bound: bound.value)


def hessian_distance(trace: float, initial: Tensor, final: Tensor, num_samples: int) -> float:
    r"""The measure :math:`\sqrt{\mathrm{tr}(H)\, \lVert W - W_0 \rVert^2 / b}`.

    Minimising the bound over σ, without its constants, leaves a multiple of a power of it: a
    network of smaller measure can be expected to generalise better, and no more is claimed.

    Args:
        trace: Trace of the Hessian, as in :func:`pac_bayes_bound`.
        initial: (p,).
        final: (p,).
        num_samples: b.
    """
    _check_range("trace", trace, math.inf)
    num_samples = check_positive_int("num_samples", num_samples)
    return math.sqrt(trace / num_samples) * _distance(initial, final)


def _distance(initial: Tensor, final: Tensor) -> float:
    if initial.shape != final.shape:
        found = f"{shape_text(initial)} and {shape_text(final)}"
        remedy = "Flatten both alike."
        raise ValueError(message("initial", "of the shape of `final`", found, remedy))
    for name, weights in (("initial", initial), ("final", final)):
        check_finite(name, weights, "Check the weights.")
    if initial.data_ptr() == final.data_ptr():
        remedy = "Clone the weights before training: a state_dict is a view of the live ones."
        raise ValueError(message("initial", "a copy", "the memory of `final`", remedy))
    return float(torch.linalg.vector_norm(final.double() - initial.double()))


def _check_range(name: str, value: float, high: float, *, open_ends: bool = False) -> None:
    if not (0 < value < high if open_ends else 0 <= value <= high):
        remedy = "Check where it comes from."
        raise ValueError(message(name, f"between 0 and {high}", str(value), remedy))
