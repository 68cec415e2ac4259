"""What is fitted, and what a prediction of it costs.

Scores are standardised first, so that the unit of a target decides nothing, neither for it nor for
the others. Leave-one-out residuals are judged by ``criterion``: squared, so that a mean over
subsets is ``1 - R^2``, or by the rank correlation of leave-one-out predictions. Either is a mean
over subsets, so two candidates differ by a mean with a standard error. "Pooled" is the mean over
the targets that are not constant.

Latent columns are the targets or, with ``components``, the principal components of the targets.

Shapes: m subsets, t targets, q components of the targets, R ridges; float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ksm_ext.correlation import pearson, ranks, standardised

_RANKED_TARGETS = 32


@dataclass(frozen=True, eq=False)
class Scores:
    """Standardised scores, as targets and as principal components of the targets.

    Attributes:
        values: (m, t), every target in units of its own standard deviation.
        center: Whether the surrogate has an intercept.
        by_rank: Whether the criterion is the rank correlation.
        weights: (m,) weights of the subsets, of mean 1: how precisely they were scored.
        noise: (t,) known variance of the noise at weight 1, or None: no ridge stands for less.
    """

    values: Tensor
    center: bool
    by_rank: bool
    weights: Tensor
    noise: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Scores":
        """The scores of the subsets at ``rows``."""
        weights = self.weights[rows]
        return replace(self, values=self.values[rows], weights=weights / weights.mean())

    def targets(self, columns: Tensor) -> "Scores":
        """The scores of the targets at ``columns``."""
        noise = None if self.noise is None else self.noise[columns]
        return replace(self, values=self.values[:, columns], noise=noise)

    def spaced_targets(self, count: int) -> Tensor:
        """At most ``count`` columns that are not constant, evenly spaced."""
        if len(self.varying) <= count:
            return self.varying
        places = torch.linspace(0, len(self.varying) - 1, count).round().long()
        return self.varying[places.to(self.varying.device)]

    @cached_property
    def offset(self) -> Tensor:
        """(t,) mean score, or zero without an intercept."""
        mean = self.weights @ self.values / self.weights.sum()
        return mean if self.center else torch.zeros_like(mean)

    @cached_property
    def varying(self) -> Tensor:
        """The numbers of the targets that are not constant here, int64."""
        return (self.values.amax(0) > self.values.amin(0)).nonzero()[:, 0]

    @cached_property
    def variance(self) -> Tensor:
        """(t,) unbiased variance over the subsets; exactly zero for constant targets."""
        variance = torch.zeros_like(self.values[0])
        if len(self.varying):
            variance[self.varying] = self.values[:, self.varying].var(0)
        return variance

    @cached_property
    def rotation(self) -> Tensor:
        """(t, q) orthonormal principal components of the scores.

        ``values - offset = components @ rotation.T`` exactly: nothing is truncated.
        """
        return torch.linalg.svd(self.values - self.offset, full_matrices=False)[2].T

    @cached_property
    def components(self) -> Tensor:
        """(m, q) scores of the principal components."""
        return (self.values - self.offset) @ self.rotation

    def latent(self, columns: Tensor, *, components: bool) -> tuple[Tensor, Tensor]:
        """Latent columns as deviations (m, len(columns)) from constants (len(columns),)."""
        if components:
            return self.components[:, columns], torch.zeros_like(self.components[0, columns])
        return (self.values - self.offset)[:, columns], self.offset[columns]

    def losses(self, residuals: Tensor, *, by_rank: bool | None = None) -> Tensor:
        """(m, t) loss of each subset for each target by the criterion, of residuals (m, t)."""
        if self.by_rank if by_rank is None else by_rank:
            predicted = standardised(ranks((self.values - residuals).to(residuals)))  # (t, m)
            return -(standardised(self._ranked[1]) * predicted).T * len(residuals)
        variance = torch.where(self.variance > 0, self.variance, 1.0)
        scale = self.weights[:, None] / variance
        return residuals.square() * scale.to(residuals.dtype)

    def mean_losses(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled loss of each subset (m,), and loss of each target on two halves (2, t).

        The halves are alternate subsets, so that a choice made on one can be judged on the other.
        """
        losses = self.losses(residuals)
        by_half = torch.stack([losses[half::2].mean(0) for half in (0, 1)])
        return losses[:, self.varying].mean(1), by_half

    def error(self, residuals: Tensor) -> float:
        """Mean squared residual over variance, ``1 - R^2``, mean over targets."""
        return float(self.losses(residuals, by_rank=False)[:, self.varying].mean())

    def rank_correlation(self, residuals: Tensor) -> float:
        """Mean Spearman correlation of scores and leave-one-out predictions, over a sample."""
        columns, true = self._ranked
        predicted = ranks((self.values[:, columns] - residuals[:, columns]).to(residuals))
        return float(pearson(true, predicted).mean())

    @cached_property
    def _ranked(self) -> tuple[Tensor, Tensor]:
        """Targets whose ranks are looked at, and these ranks, (targets, m)."""
        if self.by_rank:
            columns = torch.arange(self.values.shape[1], device=self.values.device)
        else:
            columns = self.spaced_targets(_RANKED_TARGETS)
        return columns, ranks(self.values[:, columns])


@dataclass(frozen=True, eq=False)
class Judgement:
    """What one predictor costs at each of its ridges.

    Attributes:
        ridges: (R,) absolute ridges.
        errors: (R,) ``1 - R^2``.
        ranks: (R,) mean rank correlations.
        subset_losses: (R, m) pooled, by the criterion.
        target_losses: (R, 2, t) by the criterion, on either half of the subsets.
        component_losses: (R, q) squared residuals, or None where components were not asked for.
    """

    ridges: Tensor
    errors: Tensor
    ranks: Tensor
    subset_losses: Tensor
    target_losses: Tensor
    component_losses: Tensor | None

    @cached_property
    def losses(self) -> Tensor:
        """(R,) mean over subsets."""
        return self.subset_losses.mean(1)


def judge(
    scores: Scores, ridges: Tensor, residuals_at: Iterable[Tensor], *, components: bool
) -> Judgement:
    """Summarise leave-one-out residuals (m, t), one matrix per ridge, none kept."""
    errors, rank, subset, target, component = [], [], [], [], []
    for residuals in residuals_at:
        per_subset, per_target = scores.mean_losses(residuals)
        subset.append(per_subset.double())
        target.append(per_target.double())
        errors.append(scores.error(residuals) if scores.by_rank else float(per_subset.mean()))
        rank.append(scores.rank_correlation(residuals))
        if components:
            squares = (residuals @ scores.rotation).square()
            component.append(scores.weights @ squares / len(residuals))
    return Judgement(
        ridges,
        torch.tensor(errors, dtype=torch.float64),
        torch.tensor(rank, dtype=torch.float64),
        torch.stack(subset),
        torch.stack(target),
        torch.stack(component) if components else None,
    )


def folds_of(num_subsets: int, device: torch.device) -> Tensor:
    """(m,) int64 fold of each subset, five of equal size, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randperm(num_subsets, generator=generator) % min(5, num_subsets)).to(device)
