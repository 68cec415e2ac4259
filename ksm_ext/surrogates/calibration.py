r"""How far intervals reach: a normal quantile, and variances made right by the size of a subset.

A kernel and a ridge say how uncertain a left-out score is, and its residual how far off it was. The
squares of the ratio, r, are 1 on average by the choice of the signal variance, and not for subsets
of every size alike: scores of small subsets may vary more than kernel and ridge allow, those near
the full set less. Of M subsets, not the empty and the full one, with u = ``|S| / n``,

.. math:: r_S \sim N(0, e^{\eta(u)}), \qquad
          \eta(u) = b_0 + b_1 P_1(2u - 1) + b_2 P_2(2u - 1), \qquad b_k \sim N(0, \tau_k^2)

with Legendre polynomials P, at the largest posterior; a variance at size u is multiplied by the
mean of :math:`e^{\eta}` over what remains unknown of b,

.. math:: h(u) = e^{\eta(u) + x^T C x / 2}, \qquad C = (X^T X / 2 + \tau^{-2})^{-1},

and, below the sizes that were scored, by as much more as was measured on complete tables; below and
above by at least what :mod:`.extrapolation` says. Readouts have the mean of h over the sizes of the
subsets that they compare.

Shapes: m subsets, n tasks, t targets; float64.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from ksm_ext.surrogates.options import PairReadout

FEWEST = 8
"""Subsets from which residuals say anything about intervals; the factor is 1 below."""

_WIDTHS = 1.5, 1.0
"""tau_1 and tau_2: standard deviations fall 4.5-fold from the empty to the full set, or rise so.

Chosen, as the next two, on half of 33 complete tables of 8 to 16 tasks, and confirmed on the rest
(``python -m benchmarks.peers DATA --only intervals``).
"""

_BEYOND, _FARTHEST = 10.0, 0.25
"""Variances of subsets smaller than those scored: e^10 larger per n tasks, over n / 4 at most."""

_TAIL = 1 / 40  # share of subsets that may be smaller than "those scored"
_CAREFUL, _STEPS = 20, 60


def quantile(level: float) -> float:
    """The z for which ``value +- z std`` is an interval of this level.

    Args:
        level: Strictly between 0 and 1.
    """
    return NormalDist().inv_cdf((1 + level) / 2)


def size_factors(squares: Tensor, sizes: Tensor | None, num_tasks: int) -> Tensor:
    """What variances are multiplied by, (n + 1, t) at every size, or (1, t) without sizes.

    Args:
        squares: (m, t) squared residuals in units of their deviation; NaN where there is none.
        sizes: (m,) int64 sizes of the subsets, or None for mixtures, all of one kind.
        num_tasks: n.
    """
    if sizes is None:
        features, sizes = squares.new_ones(1, 1), torch.zeros_like(squares[:, 0], dtype=torch.int64)
    else:
        inside = (sizes > 0) & (sizes < num_tasks)
        squares, sizes = squares[inside], sizes[inside]
        x = torch.linspace(-1, 1, num_tasks + 1, dtype=torch.float64, device=squares.device)
        features = torch.stack([torch.ones_like(x), x, (3 * x.square() - 1) / 2], 1)
    seen = ~squares.isnan()
    totals, counts = (
        torch.zeros(len(features), squares.shape[1]).to(squares).index_add_(0, sizes, table)
        for table in (torch.where(seen, squares, 0.0), seen.to(squares))
    )
    known = (counts.sum(0) >= FEWEST) & (totals.sum(0) > 0)
    logs = torch.zeros_like(counts)
    if bool(known.any()):
        logs[:, known] = _log_factors(features, totals[:, known], counts[:, known])
    every = torch.arange(len(features), device=sizes.device)[:, None]
    gap = (lowest_sizes(counts) - every) / max(num_tasks, 1)
    return (logs + _BEYOND * gap.clamp(0.0, _FARTHEST) * known).exp()


def _log_factors(features: Tensor, totals: Tensor, counts: Tensor) -> Tensor:
    """(S, t) logarithms of h, by Newton steps.

    Args:
        features: (S, d) of every size.
        totals: (S, t) sums of squares at each size, positive for every target.
        counts: (S, t) how many.
    """
    precision = torch.tensor([0.0, *(width**-2 for width in _WIDTHS)][: features.shape[1]])
    precision = torch.diag(precision.to(features))
    level = totals.sum(0) / counts.sum(0)  # the intercept is free: in units of it
    totals = totals / level
    found = features.new_zeros(totals.shape[1], features.shape[1])  # (t, d)
    for number in range(_STEPS):
        ratio = totals * torch.exp(-features @ found.T)  # (S, t)
        slope = (ratio - counts).T @ features / 2 - found @ precision
        # far away, at least the expected curvature: no step is too long where residuals are small
        weight = torch.maximum(ratio, counts) if number < _CAREFUL else ratio
        curvature = torch.einsum("sd,st,se->tde", features, weight / 2, features) + precision
        step = torch.linalg.solve(curvature, slope[..., None])[..., 0]
        found = found + step
        if float(step.abs().max()) < 1e-10:
            break
    expected = torch.einsum("sd,st,se->tde", features, counts / 2, features) + precision
    unknown = torch.einsum("sd,tde,se->st", features, torch.linalg.inv(expected), features)
    return features @ found.T + unknown / 2 + level.log()


def lowest_sizes(counts: Tensor) -> Tensor:
    """(t,) the size below which hardly any subset was scored.

    Args:
        counts: (S, t) how many of each size.
    """
    return (counts.cumsum(0) < (_TAIL * counts.sum(0)).round().clamp_min(1.0)).sum(0)


def context_law(readout: PairReadout, num_tasks: int, order: int) -> Tensor:
    """(n - order + 1,) how often a readout looks at contexts, the other tasks, of each size.

    Args:
        readout: The readout.
        num_tasks: n.
        order: 1 for tasks, 2 for pairs.
    """
    others = max(num_tasks - order, 0)
    counts = torch.arange(others + 1, dtype=torch.float64)
    if readout == "loo":
        return (counts == others).to(torch.float64)
    if readout == "shapley":
        return torch.full_like(counts, 1 / (others + 1))
    if readout != "banzhaf":  # densities that are no more than a factor from that
        law = others + 1 - counts
        law = law if readout == "taylor" else law * (counts + 1)
        return law / law.sum()
    return torch.softmax(-torch.lgamma(counts + 1) - torch.lgamma(others - counts + 1), 0)


def size_law(readout: PairReadout, num_tasks: int, order: int) -> Tensor:
    """(n + 1,) how often a readout looks at subsets of each size; sums to 1. See above."""
    context = context_law(readout, num_tasks, order)
    law = torch.zeros(num_tasks + 1, dtype=torch.float64)
    for present in range(min(order, num_tasks) + 1):
        law[present : present + len(context)] += math.comb(order, present) * context
    return law / law.sum()
