r"""What was observed: distinct subsets, their mean scores, and how far single runs scatter.

Rows of one subset are repeats of one experiment. They become one row, the mean of its runs: left
out together, never a subset's own twin predicts it, and what differs between them measures the
noise of a run,

.. math:: \sigma_j^2 = \sum_S \sum_{r \in S} (F_{rj} - \bar F_{Sj})^2 \Big/ (M - m) .

A score is the smooth part f of the surrogate, what is peculiar to its subset (the "nugget" of
geostatistics), and noise. The ridge stands for the last two. Where the noise is known they are told
from each other (:func:`nugget_share`), and where subsets were scored with different precision their
ridges differ (:func:`precision_weights`).

A run of weight w is as sure as w runs: its noise has the variance :math:`\sigma_j^2 / w`, means and
the sum of squares above are weighted, and a subset weighs what its runs do together.

Shapes: M rows given, m distinct subsets, n tasks, t targets; float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, as_tensor
from ksm_ext.checks import brief, check_choice, check_finite, message, shape_text
from ksm_ext.evaluation import pooled_runs
from ksm_ext.subsets import distinct_rows
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.options import Missing

MIN_REPEATS = 5
"""Degrees of freedom from which repeated subsets count as a measurement of the noise."""


@dataclass(frozen=True, eq=False)
class Observations:
    """Distinct subsets with their scores, in the order of their first rows.

    Attributes:
        masks: (m, n).
        scores: (m, t) means over the runs of a subset, in units of the scores; NaN where missing.
        counts: (m, t) int64 runs of each.
        noise: (m, t) standard deviation of these means by the noise of runs, or None if unknown.
        known: (m, t) bool: scores that were declared exact.
        degrees_of_freedom: Degrees of freedom of noise that was measured on repeats; else 0.
        repeats_std: (t,) standard deviation of a run by repeats that are too few to go by, of one
            to four degrees of freedom; else None.
        weights: (m, t) what the runs of each weigh together; by default their number.
        uneven: Whether runs weigh differently, and nothing else is known of their noise.
    """

    masks: Masks
    scores: Tensor
    counts: Tensor
    noise: Tensor | None
    known: Tensor
    degrees_of_freedom: int
    repeats_std: Tensor | None = None
    weights: Tensor | None = None
    uneven: bool = False

    __repr__ = brief

    def part(self, rows: Tensor, columns: Tensor) -> "Observations":
        """The subsets at ``rows`` and the targets at ``columns``."""
        noise = None if self.noise is None else self.noise[rows][:, columns]
        return Observations(
            self.masks[rows],
            self.scores[rows][:, columns],
            self.counts[rows][:, columns],
            noise,
            self.known[rows][:, columns],
            self.degrees_of_freedom,
            weights=None if self.weights is None else self.weights[rows][:, columns],
            uneven=self.uneven,
        )

    @cached_property
    def precision(self) -> Tensor:
        """(m, t) how sure each score is in units of a run of weight 1; 0 where missing."""
        return self.counts.to(torch.float64) if self.weights is None else self.weights

    @cached_property
    def observed(self) -> Tensor:
        """(m, t) bool: not missing."""
        return self.counts > 0

    @cached_property
    def shift(self) -> Tensor:
        """(t,) mean score over the observed subsets."""
        scale = self._largest
        total = torch.where(self.observed, self.scores / scale, 0.0).sum(0)
        return scale * (total / self.observed.sum(0))

    @cached_property
    def unit(self) -> Tensor:
        """(t,) standard deviation over the observed subsets; a constant target has its size, or 1.

        Computed relative to the largest score, so that no square overflows or vanishes.
        """
        scaled = (self.scores - self.shift) / self._largest
        largest = torch.where(self.observed, scaled.abs(), 0.0).amax(0)
        steps = torch.where(self.observed, scaled / largest.clamp_min(1e-300), 0.0)
        spread = (steps.square().sum(0) / (self.observed.sum(0) - 1).clamp_min(1)).sqrt()
        return torch.where(self.varying, spread * largest * self._largest, self._largest)

    @cached_property
    def varying(self) -> Tensor:
        """(t,) bool: targets that are not constant."""
        high = torch.where(self.observed, self.scores, -torch.inf).amax(0)
        low = torch.where(self.observed, self.scores, torch.inf).amin(0)
        return high > low

    @cached_property
    def _largest(self) -> Tensor:
        largest = torch.where(self.observed, self.scores.abs(), 0.0).amax(0)
        return torch.where(largest > 0, largest, 1.0)


def observe(
    masks: ArrayLike,
    scores: ArrayLike,
    *,
    noise_std: ArrayLike | float | None = None,
    known: ArrayLike | Sequence[int] | None = None,
    missing: Missing = "error",
    sample_weight: ArrayLike | None = None,
) -> Observations:
    """Check the tables and bring together the rows of every subset.

    Args:
        masks: (M, n), see :func:`ksm_ext.fit_surrogate`.
        scores: (M,) or (M, t) float.
        noise_std: Standard deviation of one run: a number, (t,), (M,) or (M, t). Where M = t, (M,)
            is taken as one per row.
        known: (M,) bool, or numbers of rows, whose scores are exact.
        missing: What NaN in ``scores`` means: an error, or a run that has no such score.
        sample_weight: (M,) how many runs each row is as sure as; a row of 0 is left out.

    Raises:
        TypeError: If an argument holds no numbers.
        ValueError: If shapes disagree, or values are not finite or, for noise and weights,
            negative.
    """
    check_choice("missing", missing, get_args(Missing))
    outcome = as_tensor("scores", scores)
    if outcome.ndim not in (1, 2):
        remedy = "Give one row per subset and one column per target."
        raise ValueError(message("scores", "of shape (m,) or (m, t)", shape_text(outcome), remedy))
    table = Masks.of(masks).to(outcome.device)
    if len(outcome) != len(table):
        expected = f"of {len(table)} rows like `masks`"
        remedy = "Give one score (row) per subset."
        raise ValueError(message("scores", expected, shape_text(outcome), remedy))
    if outcome.ndim == 2 and outcome.shape[1] == 0:
        remedy = "Give one column per target."
        raise ValueError(message("scores", "of at least one target", shape_text(outcome), remedy))
    remedy = "Drop the subsets concerned, find out why their runs diverged, or fit each target to "
    remedy += "the scores it has by missing='drop'."
    absent = outcome.isnan() & (missing == "drop")
    check_finite("scores", outcome.masked_fill(absent, 0), remedy)
    if outcome.ndim == 1:
        outcome, absent = outcome[:, None], absent[:, None]
    rows, present = outcome.to(torch.float64), ~absent
    exact = known_rows(known, len(table)).to(rows.device)
    noise = None if noise_std is None else noise_rows(noise_std, present)
    weights = None if sample_weight is None else row_weights(sample_weight, len(table)).to(rows)
    kept = present.any(1)  # a run without any score tells nothing
    kept = kept if weights is None else kept & (weights > 0)
    if not bool(kept.all()):
        table, rows, present, exact = table[kept], rows[kept], present[kept], exact[kept]
        noise = None if noise is None else noise[kept]
        weights = None if weights is None else weights[kept]
    return _collapsed(table, rows, present, exact, noise, weights)


def _collapsed(
    table: Masks,
    rows: Tensor,
    present: Tensor,
    exact: Tensor,
    noise: Tensor | None,
    weights: Tensor | None,
) -> Observations:
    """Means over the rows (M, t) of every subset; an exact score stands for its subset alone."""
    subset, first = distinct_rows(table.bits if table.binary else table.values)
    m = len(first)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(m, *values.shape[1:]).index_add_(0, subset, values)

    exactly = present & exact[:, None]
    known = total(exactly.long()) > 0  # (m, t)
    used = exactly | (present & ~known[subset])
    each = torch.ones_like(rows) if weights is None else weights[:, None].expand_as(rows)
    precision = total(used * each)  # of mean scores, in units of a run
    least, inverse = None, each
    if noise is not None:  # runs weigh by their own; of no noise, they stand for their subset alone
        index = subset[:, None].expand_as(rows)
        least = torch.full_like(precision, torch.inf).scatter_reduce(
            0, index, torch.where(used, noise, torch.inf), "amin"
        )
        used = used & ((noise == 0) | (least[subset] > 0))
        inverse = each / torch.where(noise > 0, noise / least[subset], 1.0).square()
    scores, counts, deviation = pooled_runs(rows, subset, used, inverse)
    divisor = torch.where(counts > 0, total(used * inverse), 1.0).sqrt()
    degrees = int((counts - 1).clamp_min(0).sum(0).min()) if m else 0
    degrees = degrees if noise is None else 0
    few = deviation if 0 < degrees < MIN_REPEATS else None
    std: Tensor | None = None
    if degrees >= MIN_REPEATS:
        std = deviation / divisor
    if least is not None:
        std = least / divisor
    if std is not None:
        std = torch.where((counts > 0) & ~known, std, 0.0)
    uneven = weights is not None and std is None and bool((weights != weights[:1]).any())
    return Observations(table[first], scores, counts, std, known, degrees, few, precision, uneven)


def row_weights(sample_weight: Any, count: int) -> Tensor:
    """(count,) float64 of what is given as ``sample_weight``, see :func:`observe`."""
    weights = as_tensor("sample_weight", sample_weight).to(torch.float64)
    remedy = "Give one number for each row of `masks`: 2 for one as sure as two runs."
    if tuple(weights.shape) != (count,):
        found = shape_text(weights)
        raise ValueError(message("sample_weight", f"of shape ({count},)", found, remedy))
    check_finite("sample_weight", weights, remedy)
    if bool((weights < 0).any()):
        found = f"{float(weights.min())}"
        raise ValueError(message("sample_weight", "at least 0", found, remedy))
    if not bool((weights > 0).any()):
        found = "zeros alone"
        raise ValueError(message("sample_weight", "above 0 for some rows", found, remedy))
    return weights


def known_rows(known: object, count: int) -> Tensor:
    """(count,) bool of what is given as ``known``, see :func:`observe`."""
    flags = torch.zeros(count, dtype=torch.bool)
    if known is None:
        return flags
    rows = as_tensor("known", known).cpu()
    if not rows.numel():
        return flags
    expected = f"({count},) bool or different numbers of rows below {count}"
    remedy = "Say which rows of `masks` have exact scores."
    if rows.dtype == torch.bool and rows.shape == (count,):
        return rows
    whole = rows.ndim == 1 and not rows.is_floating_point() and rows.dtype != torch.bool
    twice = whole and len(rows.unique()) < len(rows)
    if not whole or twice or bool(((rows < 0) | (rows >= count)).any()):
        found = f"{shape_text(rows)} of {rows.dtype}"
        raise ValueError(message("known", expected, found, remedy))
    flags[rows.long()] = True
    return flags


def noise_rows(noise_std: Any, present: Tensor) -> Tensor:
    """(M, t) standard deviation of every run, 0 where there is no score."""
    noise = as_tensor("noise_std", noise_std).to(present.device, torch.float64)
    count, t = present.shape
    if noise.ndim == 1 and len(noise) == count:
        noise = noise[:, None]
    if tuple(noise.shape) not in ((), (count, 1), (t,), (count, t)):
        expected = f"a number, or of shape ({count},), ({t},) or ({count}, {t})"
        remedy = "Give the standard deviation of one run, per row, per target or for all."
        raise ValueError(message("noise_std", expected, shape_text(noise), remedy))
    noise = torch.where(present, noise, 0.0)
    check_finite("noise_std", noise, "Give 0 where scores are exact.")
    if bool((noise < 0).any()):
        remedy = "Give standard deviations in units of the scores."
        raise ValueError(message("noise_std", "at least 0", f"{float(noise.min())}", remedy))
    return noise


def relative_noise(noise: Tensor, present: Tensor) -> Tensor:
    """(m, t) variance of the noise over its mean over the scores that are present; 1 without noise.

    Args:
        noise: (m, t) standard deviation of the noise of each score, 0 where there is none.
        present: (m, t) bool.
    """
    largest = noise.amax(0).clamp_min(1e-300)
    squares = (noise / largest).square()
    level = squares.sum(0) / present.sum(0)
    return torch.where(level > 0, squares / level.clamp_min(1e-300), 1.0)


def nugget_to_noise(total: Tensor, noise: Tensor) -> Tensor:
    r"""(t,) variance of what is peculiar to a subset, over the mean variance of the noise.

    :math:`\kappa_j / \bar\sigma_j^2`, where :math:`\kappa_j` is the part of the residual variance
    that exceeds the noise; infinite without noise.

    Args:
        total: (t,) variance that the ridge stands for, at a subset of mean noise.
        noise: (m, t) variance of the noise of each mean score.
    """
    level = noise.mean(0)
    ratio = (total - level).clamp_min(0.0) / level
    return torch.where(level > 0, ratio, torch.inf)  # of a constant target both are 0


def nugget_share(ratio: Tensor, relative: Tensor) -> Tensor:
    r"""Share of a subset's residual that is peculiar to it: :math:`\kappa / (\kappa + \sigma_i^2)`.

    Args:
        ratio: (t,) what :func:`nugget_to_noise` returns.
        relative: (m, t) what :func:`relative_noise` returns.

    Returns:
        (m, t) in [0, 1].
    """
    return torch.where(ratio.isinf() | (relative == 0), 1.0, ratio / (ratio + relative))


def precision_weights(ratio: Tensor, relative: Tensor) -> Tensor:
    """(m,) weights of subsets in the fit, of mean 1: one over the variance of their residuals.

    Args:
        ratio: () what :func:`nugget_to_noise` returns, of targets that share a fit the mean.
        relative: (m,) what :func:`relative_noise` returns.
    """
    weights = 1 / (ratio + relative).clamp_min(1e-3 * (1 + ratio))  # no row outweighs all others
    return weights / weights.mean()
