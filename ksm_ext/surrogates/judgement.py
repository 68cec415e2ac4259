"""What is fitted, and what a prediction of it costs.

Scores are standardised first, so that the unit of a target decides nothing, neither for it nor for
the others. Leave-one-out residuals are judged by ``criterion``: squared, so that a mean over
subsets is ``1 - R^2``, or by the rank correlation of leave-one-out predictions. Either is a mean
over subsets, so two candidates differ by a mean with a standard error. "Pooled" is the mean over
the targets that are not constant. Squares may count more at some subsets (:func:`near_full`).

Latent columns are the targets or, with ``components``, the principal components of the targets.

Shapes: b tables of one shape, which are judged together (b = 1 for a fit of its own), m subsets, t
targets, q components of the targets, C candidates (a kernel at a ridge each); float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ksm_ext.checks import brief
from ksm_ext.correlation import standard_ranks

_RANKED_TARGETS = 32
_NEAR = 0.15  # of all tasks; 0.1 to 0.2 serve leave-one-out effects of games as well
_MOST_IMPORTANT = 10.0  # over the mean: no few subsets decide
KEPT_RESIDUALS = 2**17
"""Numbers (1 MB) kept for rank correlations that may be asked for; with more they are computed."""


@dataclass(frozen=True, eq=False)
class Scores:
    """Standardised scores of b tables, as targets and as principal components of the targets.

    Attributes:
        values: (b, m, t), every target in units of its own standard deviation.
        center: Whether the surrogate has an intercept.
        by_rank: Whether the criterion is the rank correlation.
        weights: (b, m) weights of the subsets: how precisely they were scored.
        noise: (b, t) known variance of the noise at weight 1, or None.
        importance: (b, m) by how much more than its weight the squared residual of each subset
            counts in a choice, of mean 1; None where all count alike.
    """

    values: Tensor
    center: bool
    by_rank: bool
    weights: Tensor
    noise: Tensor | None = None
    importance: Tensor | None = None

    __repr__ = brief

    def rows(self, rows: Tensor) -> "Scores":
        """The scores of the subsets at ``rows`` (m',), or (F, m') for b F tables, F of each."""
        values, weights = self.values[:, rows], self.weights[:, rows]
        noise = self.noise
        importance = None if self.importance is None else self.importance[:, rows]
        if rows.ndim == 2:
            values, weights = values.flatten(0, 1), weights.flatten(0, 1)
            noise = None if noise is None else noise.repeat_interleave(len(rows), 0)
            importance = None if importance is None else importance.flatten(0, 1)
        weights = weights / weights.mean(-1, keepdim=True)
        return replace(self, values=values, weights=weights, noise=noise, importance=importance)

    def tables(self, places: Tensor) -> "Scores":
        """The scores of the tables at ``places``."""
        values, weights = self.values[places], self.weights[places]
        noise = None if self.noise is None else self.noise[places]
        importance = None if self.importance is None else self.importance[places]
        return replace(self, values=values, weights=weights, noise=noise, importance=importance)

    def targets(self, columns: Tensor) -> "Scores":
        """The scores of the targets at ``columns``."""
        noise = None if self.noise is None else self.noise[:, columns]
        return replace(self, values=self.values[:, :, columns], noise=noise)

    def spaced_targets(self, count: int) -> Tensor:
        """At most ``count`` columns that are not constant, evenly spaced."""
        if len(self.varying) <= count:
            return self.varying
        places = torch.linspace(0, len(self.varying) - 1, count).round().long()
        return self.varying[places.to(self.varying.device)]

    @cached_property
    def relative_weights(self) -> Tensor:
        """(b, m) weights of mean 1; those of a ridge that is given count runs."""
        return self.weights / self.weights.mean(-1, keepdim=True)

    @cached_property
    def counted(self) -> Tensor:
        """(b, m) what the squared residual of each subset counts."""
        each = self.relative_weights
        return each if self.importance is None else each * self.importance

    @cached_property
    def share(self) -> Tensor:
        """(b, m) of each subset in a mean over subsets."""
        return self.weights / self.weights.sum(-1, keepdim=True)

    @cached_property
    def offset(self) -> Tensor:
        """(b, t) mean score, or zero without an intercept."""
        mean = (self.share[:, None] @ self.values)[:, 0]
        return mean if self.center else torch.zeros_like(mean)

    @property
    def least_share(self) -> float:
        """Share of the noise that a ridge stands for at least: all, less a standard error of it.

        A mean of m squared residuals scatters. Held to the whole of the noise, subsets that happen
        to be predicted well would get a ridge by which they are predicted badly: of 15 subsets of 4
        tasks, Shapley values were off by an eighth more.
        """
        return max(0.0, 1 - (2 / self.values.shape[1]) ** 0.5)

    @cached_property
    def varies(self) -> Tensor:
        """(b, t) bool: which targets are not constant here."""
        return self.values.amax(1) > self.values.amin(1)

    @cached_property
    def varying(self) -> Tensor:
        """The numbers of the targets that vary in some table, int64."""
        return self.varies.any(0).nonzero()[:, 0]

    @cached_property
    def pool(self) -> Tensor:
        """(b, t) share of each target in the pooled mean."""
        varies = self.varies.to(self.values)
        return varies / varies.sum(-1, keepdim=True).clamp_min(1)

    @cached_property
    def variance(self) -> Tensor:
        """(b, t) unbiased variance over the subsets; exactly zero for constant targets."""
        if self.values.shape[1] < 2:
            return torch.zeros_like(self.values[:, 0])
        return torch.where(self.varies, self.values.var(1), 0.0)

    @cached_property
    def _weighted_variance(self) -> Tensor:
        """(b, t) unbiased variance where subsets weigh differently; 1 for constant targets."""
        share = self.share
        centred = self.values - share[:, None] @ self.values
        variance = (share[:, None] @ centred.square())[:, 0] / (1 - share.square().sum(-1))[:, None]
        return torch.where(self.varies & (variance > 0), variance, 1.0)

    @cached_property
    def _scale(self) -> Tensor:
        """(b, t) what squared residuals are divided by."""
        return torch.where(self.variance > 0, self.variance, 1.0)

    @cached_property
    def rotation(self) -> Tensor:
        """(b, t, q) orthonormal principal components of the scores.

        ``values - offset = components @ rotation.mT`` exactly: nothing is truncated.
        """
        centred = self.values - self.offset[:, None]
        return torch.linalg.svd(centred, full_matrices=False)[2].mT

    @cached_property
    def components(self) -> Tensor:
        """(b, m, q) scores of the principal components."""
        return (self.values - self.offset[:, None]) @ self.rotation

    def latent(self, columns: Tensor, *, components: bool) -> tuple[Tensor, Tensor]:
        """Latent columns as deviations (b, m, columns) from constants (b, columns)."""
        if components:
            found = self.components[..., columns]
            return found, torch.zeros_like(found[:, 0])
        offset = self.offset[:, columns]
        return self.values[..., columns] - offset[:, None], offset

    def latent_noise(self, *, components: bool) -> Tensor | None:
        """(b, t) or, of components, (b, q): known variance of the noise at weight 1, or None."""
        if self.noise is None or not components:
            return self.noise
        return (self.noise[:, None] @ self.rotation.square())[:, 0]

    def losses(self, residuals: Tensor) -> Tensor:
        """Loss of each subset for each target by the criterion, of residuals (b, ..., m, t)."""
        across = (len(residuals), *(1,) * (residuals.ndim - 3))
        if self.by_rank:
            values = self.values.reshape(*across, *self.values.shape[1:])
            true, predicted = map(standard_ranks, (values, (values - residuals).to(residuals)))
            return -(true * predicted) * residuals.shape[-2]
        scale = self.counted[:, :, None] / self._scale[:, None]
        return residuals.square() * scale.reshape(*across, *scale.shape[1:]).to(residuals)

    def pooled(self, losses: Tensor) -> Tensor:
        """Mean (b, ...) over the targets that are not constant, of losses (b, ..., t)."""
        flat = losses.reshape(len(losses), -1, losses.shape[-1])
        return (flat @ self.pool[..., None].to(losses)).reshape(losses.shape[:-1])

    def summary(self, residuals: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What a choice needs of leave-one-out residuals (b, K, m, R, t), by the criterion.

        Returns:
            Pooled losses (b, K, R, m) of subsets, those of targets on alternate subsets (b, K, R,
            2, t), so that a choice made on one half can be judged on the other, and ``1 - R^2``
            (b, K, R).
        """
        half = residuals.new_zeros(2, residuals.shape[2])
        half[0, ::2], half[1, 1::2] = 1.0, 1.0
        of_half = half / half.sum(1, keepdim=True)
        squares = residuals.square()
        errors = self._errors(squares)
        if self.by_rank:
            losses = self.losses(residuals.movedim(2, 3))  # (b, K, R, m, t)
            return self.pooled(losses), of_half.to(losses) @ losses, errors
        weights = self.relative_weights.to(squares)
        share = (self.pool / self._scale).to(squares)[..., None]  # (b, t, 1)
        pooled = (squares.flatten(1, 3) @ share).reshape(squares.shape[:-1])  # (b, K, m, R)
        pooled = (pooled * weights[:, None, :, None]).mT
        if self.importance is not None:
            pooled = pooled * self.importance.to(squares)[:, None, None]
            weights = self.counted.to(squares)
        by_half = (of_half * weights[:, None])[:, None] @ squares.flatten(-2)
        by_half = by_half.unflatten(-1, squares.shape[-2:]).movedim(2, 3)  # (b, K, R, 2, t)
        return pooled, by_half / self._scale[:, None, None, None].to(squares), errors

    def _errors(self, squares: Tensor) -> Tensor:
        """``1 - R^2``, (b, K, R), of squares (b, K, m, R, t); subsets weigh in both parts of it."""
        mean = (self.share.to(squares)[:, None, None] @ squares.flatten(-2))[:, :, 0]
        variance = self._weighted_variance[:, None, None].to(squares)
        return self.pooled(mean.unflatten(-1, squares.shape[-2:]) / variance)

    def rank_correlations(self, residuals: Tensor) -> Tensor:
        """Mean (b, K, R) over targets of the Spearman correlation of scores and predictions.

        Of residuals (b, K, m, R, t), over the targets whose ranks are shown.
        """
        columns = self.ranked_targets
        true = self.values[:, None, :, None, columns]
        predicted = (true - residuals[..., columns]).to(residuals)
        products = standard_ranks(true.movedim(3, 2)) * standard_ranks(predicted.movedim(3, 2))
        found = products.sum(-2).clamp(-1, 1)
        return found.mean(-1) if len(columns) else found.sum(-1)

    @cached_property
    def ranked_targets(self) -> Tensor:
        """Targets whose ranks are shown, int64: all where they are the criterion."""
        if self.by_rank:
            return torch.arange(self.values.shape[2], device=self.values.device)
        return self.spaced_targets(_RANKED_TARGETS)


@dataclass(frozen=True, eq=False)
class Judgement:
    """What C candidates cost: those of K kernels with R ridges each, or one without a ridge.

    Attributes:
        ridges: (b, C) absolute ridges.
        errors: (b, C) ``1 - R^2``.
        ranks: (b, C) mean rank correlations; None where they were not asked for.
        subset_losses: (b, C, m) pooled, by the criterion.
        target_losses: (b, C, 2, t) by the criterion, on either half of the subsets.
        component_losses: (b, C, q) squared residuals, or None where components were not asked for.
    """

    ridges: Tensor
    errors: Tensor
    ranks: Tensor | None
    subset_losses: Tensor
    target_losses: Tensor
    component_losses: Tensor | None

    __repr__ = brief

    @cached_property
    def losses(self) -> Tensor:
        """(b, C) mean over subsets."""
        return self.subset_losses.mean(-1)


def judge(
    scores: Scores,
    ridges: Tensor,
    residuals_at: Iterable[Tensor],
    *,
    components: bool = False,
    ranked: bool = False,
) -> Judgement:
    """Summarise leave-one-out residuals at ``ridges`` (b, K, R).

    Args:
        scores: What was predicted.
        ridges: (b, K, R).
        residuals_at: (b, K, m, R', t) for some ridges at a time, in their order; none is kept.
        components: Whether to judge components too.
        ranked: Whether to compute rank correlations.
    """
    parts, ranks = [], []
    for residuals in residuals_at:
        subset, target, errors = scores.summary(residuals)
        found = [errors, subset, target]
        if components:
            across = (residuals.flatten(1, 3) @ scores.rotation.to(residuals)).square()
            across = across.unflatten(1, residuals.shape[1:4]).flatten(-2)  # (b, K, m, R q)
            weights = scores.counted.to(residuals)[:, None, None] / residuals.shape[2]
            found.append((weights @ across).reshape(*errors.shape, -1))
        parts.append([each.double() for each in found])
        if ranked:
            ranks.append(scores.rank_correlations(residuals))
    errors, subset, target, *component = (
        torch.cat(each, 2).flatten(1, 2) for each in zip(*parts, strict=True)
    )
    first = component[0] if component else None
    correlations = torch.cat(ranks, 2).flatten(1) if ranked else None
    return Judgement(ridges.flatten(1), errors, correlations, subset, target, first)


def folds_of(num_subsets: int, device: torch.device) -> Tensor:
    """(m,) int64 fold of each subset, five of equal size, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randperm(num_subsets, generator=generator) % min(5, num_subsets)).to(device)


def near_full(sizes: Tensor, num_tasks: int) -> Tensor:
    """(m,) importance of subsets to leave-one-out effects, by their sizes (m,).

    These effects are differences near the full set, and a kernel or ridge that is best over all
    sizes is not best there. So the squared residual at size s counts ``exp(-(n - s) / 0.15 n)``
    over how many subsets have about that size, at most 10 times the mean; those of the empty and
    the full set count nothing, since readouts have their scores.

    On games, leave-one-out effects are then off by .81 to .94 of what they are by plain errors.
    Weights by which Shapley or Banzhaf values weigh sizes did not help these (.95 to 1.10): the
    fewer subsets decide, the more chance does.

    Args:
        sizes: (m,) numbers of tasks that vary.
        num_tasks: Number n of these.
    """
    count = torch.bincount(sizes, minlength=num_tasks + 1).to(torch.float64)
    around = torch.nn.functional.pad(count, (1, 1))
    around = (around[:-2] + 2 * count + around[2:]) / 4
    found = torch.exp((sizes - num_tasks) / (_NEAR * num_tasks)) / around[sizes]
    found = found.masked_fill((sizes == 0) | (sizes == num_tasks), 0.0)
    found = (found / found.mean().clamp_min(1e-300)).clamp_max(_MOST_IMPORTANT)
    return found / found.mean() if bool(found.any()) else torch.ones_like(found)
