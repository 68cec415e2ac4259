r"""How many more subsets would make the intervals of attributions shorter.

With kernel, ridge and noise as fitted, the posterior variance of an attribution :math:`L F` depends
on which subsets are scored, not on their scores:

.. math:: \sigma_f^2 \big( L K L^T - L K_{\cdot S} (H K_{SS} H + \lambda I)^{+} K_{S \cdot} L^T
    \big), \qquad H = I - 1 1^T / m

so it is computed for the fitted subsets together with more that look like them, before any of those
is trained on. Adding subsets never widens an interval, hence the number wanted is found by
bisection.

Shapes: masks (m, n), standard deviations (n, t).

Reference: *Rasmussen & Williams 2006, Gaussian Processes for Machine Learning*, eq. 2.26.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ksm_ext.checks import check_positive_int, check_real, message
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.surrogate import Surrogate, check_surrogate

_MAX_SUBSETS = 512  # or twice the fitted ones: the largest Gram matrix factored for this
_MAX_RATE = 256  # subsets from which the rate is taken where more are fitted
_MAX_PRODUCTS = 2**31  # n m^2, the cost of the variances of n tasks
_STEPS_PER_DOUBLING = 8  # of the bisection: the answer is within a tenth of itself


@dataclass(frozen=True)
class MoreSubsets:
    """What :func:`more_subsets` found.

    Attributes:
        num_more: Subsets to score besides those fitted; None where no number would do.
        factor: What mean intervals would be multiplied by.
        computed: Whether the number follows from the posterior variance; otherwise it is
            extrapolated: precisions are taken to grow evenly with m.
    """

    num_more: int | None
    factor: float
    computed: bool


def more_subsets(
    surrogate: Surrogate, readout: Readout = "loo", *, factor: float = 0.5, seed: int = 0
) -> MoreSubsets:
    """How many more subsets multiply the mean interval of attributions by ``factor``.

    The mean is over tasks, relative to what it is now, and over targets. New subsets are drawn by
    :func:`similar_subsets`. The fitted kernel and noise are taken as true: what a wrong kernel
    misses is not in the interval, and more subsets do not cure it.

    Args:
        surrogate: A kernel fitted to 0/1 masks.
        readout: ``"loo"``, ``"shapley"`` or ``"banzhaf"``.
        factor: Between 0 and 1.
        seed: Seed of the new subsets.

    Returns:
        The number, rounded up to about a tenth of itself. Beyond 512 subsets, or twice the fitted
        ones, it is extrapolated by the rate seen up to there; where more than 512 were fitted, by
        that between half of them and all, or of 256 of them.

    Raises:
        ValueError: If ``factor`` is not between 0 and 1, the surrogate has no intervals, or it was
            fitted to real weights.
    """
    check_surrogate(surrogate)
    factor = check_real("factor", factor)
    if not 0 < factor < 1:
        remedy = "0.5 halves the intervals."
        raise ValueError(message("factor", "between 0 and 1", str(factor), remedy))
    if not surrogate.masks.binary:
        remedy = "Mixtures like the fitted ones are not drawn: score some, and fit again."
        raise ValueError(message("surrogate", "fitted to 0/1 masks", "real weights", remedy))
    surrogate = surrogate.with_tensor_answers()
    masks, m = surrogate.masks.values, len(surrogate.masks)
    limit = max(_MAX_SUBSETS, 2 * m)
    if m > _MAX_SUBSETS or masks.shape[1] * limit**2 > _MAX_PRODUCTS:
        kept = torch.randperm(m, generator=torch.Generator().manual_seed(seed))[:_MAX_RATE]
        half, whole = (
            _mean_std(surrogate, Masks(masks[kept[:count].sort().values]), readout)
            for count in (len(kept) // 2, len(kept))
        )
        share = len(kept) // 2 / len(kept)
        return _extrapolated(m, share * m, m, float((whole / half).mean()), factor)
    varying = (masks != masks[0]).any(0)  # the others have no effect, and stay constant
    more = masks[:1].repeat(limit - m, 1)
    more[:, varying] = similar_subsets(masks[:, varying], limit - m, seed=seed)
    grown = torch.cat([masks, more])
    now = _mean_std(surrogate, surrogate.masks, readout)  # (t,)

    def ratio(num_more: int) -> float:
        return float((_mean_std(surrogate, Masks(grown[: m + num_more]), readout) / now).mean())

    low, high = 0, max(1, m // _STEPS_PER_DOUBLING)
    while (reached := ratio(high)) > factor:
        if high == limit - m:
            return _extrapolated(m, m, limit, reached, factor)
        low, high = high, min(2 * high, limit - m)
    while high - low > max(1, high // _STEPS_PER_DOUBLING):
        middle = (low + high) // 2
        low, high = (low, middle) if ratio(middle) <= factor else (middle, high)
    return MoreSubsets(high, factor, True)


def _extrapolated(m: int, start: float, end: float, reached: float, factor: float) -> MoreSubsets:
    """From mean intervals that ``end`` subsets multiply by ``reached`` since ``start``.

    Precisions, the inverses of variances, are taken to grow by the same amount with every subset,
    as those of independent weights do.
    """
    reached = min(reached, 1.0)
    if -math.log(reached) / math.log(end / start) < 0.1:  # it is 0.5 for independent noise
        return MoreSubsets(None, factor, False)
    growth = (reached**-2 - 1) / (end - start)  # per subset, in units of the precision at start
    now = 1 + growth * (m - start)
    return MoreSubsets(math.ceil(now * (factor**-2 - 1) / growth), factor, False)


def similar_subsets(masks: Tensor, num_subsets: int, *, seed: int) -> Tensor:
    """Subsets (num_subsets, n) of random tasks, with sizes drawn from those of ``masks`` (m, n)."""
    seed = check_positive_int("seed", seed, minimum=-(2**63))
    generator = torch.Generator().manual_seed(seed)
    m, n = masks.shape
    rows = torch.randint(m, (num_subsets,), generator=generator)
    order = torch.rand(num_subsets, n, generator=generator).argsort(1)
    return masks.cpu()[rows].gather(1, order).to(masks.device)


def _mean_std(surrogate: Surrogate, masks: Masks, readout: Readout) -> Tensor:
    """(t,) mean posterior standard deviation of attributions, had ``masks`` been scored."""
    _, std = surrogate.with_design(masks).attribute(readout, return_std=True)
    return torch.as_tensor(std.mean(0)).clamp_min(1e-300)
