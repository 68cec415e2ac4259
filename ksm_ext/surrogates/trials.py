"""One surrogate per kernel, judged at every ridge by its exact leave-one-out residuals.

Scores are standardised first, so that the unit of a target decides nothing, neither for it nor for
the others. Residuals are judged by ``criterion``: squared, so that a mean over subsets is
``1 - R^2``, or by the rank correlation of leave-one-out predictions. Either is a mean over subsets,
so two candidates differ by a mean with a standard error. "Pooled" is the mean over the targets that
are not constant.

Shapes: m subsets, t targets, q components of the targets, R ridges; float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from ksm_ext.correlation import pearson, ranks, standardised
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.krylov import ConjugateGradients, KrylovRidge, check_solved
from ksm_ext.surrogates.lasso import fit_lasso, least_squares, least_squares_residuals
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge

RELATIVE_RIDGES = tuple(10.0 ** (step / 2) for step in range(-10, 7))
"""Ridges searched, in units of the mean variance of a subset under the kernel: 1e-5 to 1e3."""

_SEARCH_TOLERANCE = 1e-2  # of residuals: errors by 1e-2 change a mean square by 1e-4
_RANKED_TARGETS = 32
_SINGLE_FROM = 768  # ridges are compared in float32 where the products with U dominate the time


@dataclass(frozen=True, eq=False)
class Scores:
    """What is fitted: standardised scores and the two views of them in which ridges may differ.

    Attributes:
        values: (m, t), every target in units of its own standard deviation.
        center: Whether the surrogate has an intercept.
        by_rank: Whether the criterion is the rank correlation.
        weights: (m,) of the subsets, of mean 1: how precisely they were scored.
        noise: (t,) known variance of the noise at weight 1, or None: no ridge stands for less.
    """

    values: Tensor
    center: bool
    by_rank: bool
    weights: Tensor
    noise: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Scores":
        """The scores of some subsets."""
        weights = self.weights[rows]
        return replace(self, values=self.values[rows], weights=weights / weights.mean())

    def targets(self, columns: Tensor) -> "Scores":
        """Some of the targets, judged by squares."""
        noise = None if self.noise is None else self.noise[columns]
        return replace(self, values=self.values[:, columns], by_rank=False, noise=noise)

    def spaced_targets(self, count: int) -> Tensor:
        """At most ``count`` columns that are not constant, evenly spaced."""
        if len(self.varying) <= count:
            return self.varying
        places = torch.linspace(0, len(self.varying) - 1, count).round().long()
        return self.varying[places.to(self.varying.device)]

    def sample_targets(self, count: int) -> "Scores":
        """The scores of :meth:`spaced_targets`."""
        return replace(self.targets(self.spaced_targets(count)), by_rank=self.by_rank)

    @cached_property
    def offset(self) -> Tensor:
        """(t,) mean score, or zero without an intercept."""
        mean = self.weights @ self.values / self.weights.sum()
        return mean if self.center else torch.zeros_like(mean)

    @cached_property
    def varying(self) -> Tensor:
        """The numbers of the targets that are not constant here."""
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

    def error(self, residuals: Tensor) -> float:
        """Mean squared residual over variance, ``1 - R^2``, mean over targets."""
        return float(self.charges(residuals, by_rank=False)[:, self.varying].mean())

    def rank_correlation(self, residuals: Tensor) -> float:
        """Mean Spearman correlation of scores and leave-one-out predictions, over a sample."""
        columns, true = self._ranked
        predicted = ranks((self.values[:, columns] - residuals[:, columns]).to(residuals))
        return float(pearson(true, predicted).mean())

    def charges(self, residuals: Tensor, *, by_rank: bool | None = None) -> Tensor:
        """(m, t) what the criterion charges each subset for each target."""
        if self.by_rank if by_rank is None else by_rank:
            predicted = standardised(ranks((self.values - residuals).to(residuals)))  # (t, m)
            return -(standardised(self._ranked[1]) * predicted).T * len(residuals)
        variance = torch.where(self.variance > 0, self.variance, 1.0)
        scale = self.weights[:, None] / variance
        return residuals.square() * scale.to(residuals.dtype)

    def losses(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """What the criterion charges each subset (m,), and each target on two halves (2, t).

        The halves are alternate subsets, so that a choice made on one can be judged on the other.
        """
        charge = self.charges(residuals)
        by_half = torch.stack([charge[half::2].mean(0) for half in (0, 1)])
        return charge[:, self.varying].mean(1), by_half

    @cached_property
    def _ranked(self) -> tuple[Tensor, Tensor]:
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
        subset_losses: (R, m) by the criterion.
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


class Trial(Protocol):
    """A way to predict scores that can be judged and, if chosen, kept."""

    label: str
    judgement: Judgement

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """Leave-one-out residuals (m, len(columns)) of some targets or components."""
        ...


def judge(
    scores: Scores, ridges: Tensor, residuals_at: Iterable[Tensor], *, components: bool
) -> Judgement:
    """Summarise residuals (m, t), one matrix per ridge, none kept."""
    errors, rank, subset, target, component = [], [], [], [], []
    for residuals in residuals_at:
        per_subset, per_target = scores.losses(residuals)
        subset.append(per_subset.double())
        target.append(per_target.double())
        errors.append(scores.error(residuals) if scores.by_rank else float(per_subset.mean()))
        rank.append(scores.rank_correlation(residuals))
        if components:
            component.append(
                scores.weights @ (residuals @ scores.rotation).square() / len(residuals)
            )
    return Judgement(
        ridges,
        torch.tensor(errors, dtype=torch.float64),
        torch.tensor(rank, dtype=torch.float64),
        torch.stack(subset),
        torch.stack(target),
        torch.stack(component) if components else None,
    )


class KernelTrial:
    """Kernel ridge with one kernel, at every ridge."""

    def __init__(
        self,
        kernel: Kernel,
        masks: Masks,
        scores: Scores,
        *,
        ridge: Tensor | None = None,
        components: bool = False,
    ) -> None:
        """Factor the kernel on ``masks``; ``ridge`` replaces the search by given ridges (R,)."""
        self.kernel, self.scores = kernel, scores
        self.label = str(kernel)
        self.kernel_variance = kernel_variance(kernel, masks)
        self.factor: SpectralRidge | KrylovRidge
        self.factor = factor = SpectralRidge(
            kernel.gram(masks), center=scores.center, weights=scores.weights
        )
        if ridge is not None:
            factor.check_ridge(float(ridge.min()))
            ridges = ridge
        else:
            relative = torch.tensor(RELATIVE_RIDGES, dtype=torch.float64)
            ridges = relative.to(scores.values.device) * max(factor.scale, 1e-300)
        self._rotated = rotated = factor.rotate(scores.values)
        if len(masks) > _SINGLE_FROM:
            factor, rotated = factor.in_single_precision(), rotated.to(torch.float32)
        residuals = (factor.leave_one_out(rotated, ridge) for ridge in ridges)
        self.judgement = judge(scores, ridges, residuals, components=components)
        if ridge is None:
            self._admit(factor, rotated)

    def _admit(self, factor: SpectralRidge | KrylovRidge, rotated: Tensor) -> None:
        """Leave out ridges that stand for less variance than the noise is known to have."""
        if self.scores.noise is None:
            return
        kept, ridges = self.judgement, self.judgement.ridges
        total = torch.stack([ridge * factor.signal_variance(rotated, ridge) for ridge in ridges])
        pooled = total[:, self.scores.varying].mean(1)
        noise = self.scores.noise
        self.judgement = replace(
            kept,
            subset_losses=_from(pooled, noise[self.scores.varying].mean(), kept.subset_losses),
            target_losses=_from(total, noise, kept.target_losses),
        )
        if kept.component_losses is not None:
            parts = self.factor.rotate(self.scores.components)
            total = torch.stack([r * self.factor.signal_variance(parts, r) for r in ridges])
            noise = self.scores.rotation.square().T @ noise
            losses = _from(total, noise, kept.component_losses)
            self.judgement = replace(self.judgement, component_losses=losses)

    def rotated(self, columns: Tensor, *, components: bool) -> Tensor:
        """Scores of some targets or components in the eigenbasis, (m, len(columns))."""
        if not components:
            return self._rotated[:, columns]
        return self.factor.rotate(self.scores.components[:, columns])

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """See :class:`Trial`."""
        return self.factor.leave_one_out(self.rotated(columns, components=components), ridges)

    def standardised_residuals(self, ridge: Tensor) -> Tensor:
        """(m, t) leave-one-out residuals in units that are the same for all subsets."""
        left_out = self.factor.leave_one_out(self._rotated, ridge)
        return (left_out * self.factor.dual(self._rotated, ridge)).sqrt()

    def widest_ridge(self) -> Tensor:
        """(1,) the ridge judged nearest to the kernel's own variance: as much noise as signal."""
        distance = (self.judgement.ridges.clamp_min(1e-300) / self.kernel_variance).log().abs()
        return self.judgement.ridges[distance.argmin()].reshape(1)


class KrylovTrial(KernelTrial):
    """Kernel ridge with one kernel, by conjugate gradients, at the ridges around the best.

    A ridge is a ratio of noise to signal and does not grow with m, so the search starts at the best
    ridge of a sample of the subsets, solved exactly. It walks to neighbours until both sides of
    the best ridge (of every target, if each has its own) are known.
    """

    def __init__(
        self,
        kernel: Kernel,
        masks: Masks,
        scores: Scores,
        settings: ConjugateGradients,
        *,
        ridge: Tensor | None = None,
        sample: Tensor,
        per_target: bool = False,
        progress: bool = False,
    ) -> None:
        """Judge ``kernel`` on ``masks``; ``sample`` are the rows that tell where to start."""
        self.kernel, self.scores = kernel, scores
        self.label = str(kernel)
        self.kernel_variance = kernel_variance(kernel, masks)
        factor = KrylovRidge(
            kernel, masks, settings, center=scores.center, weights=scores.weights, progress=progress
        )
        self.factor, self._rotated = factor, factor.rotate(scores.values)
        if ridge is not None:
            factor.check_ridge(float(ridge.min()))
            self._solve(factor, float(ridge[0]))
            ridges = ridge
        else:
            guess = KernelTrial(kernel, masks[sample], scores[sample])
            ridges = self._search(factor, guess.judgement, per_target)
        residuals = (factor.leave_one_out(self._rotated, ridge) for ridge in ridges)
        self.judgement = judge(scores, ridges, residuals, components=False)
        if ridge is None:
            self._admit(factor, self._rotated)

    def _search(self, factor: KrylovRidge, guess: Judgement, per_target: bool) -> Tensor:
        """The ridges solved for, (R,) increasing."""
        informed = bool(guess.losses.isfinite().all())  # not if the sample's scores are constant
        start = int(guess.losses.argmin()) if informed else len(guess.ridges) // 2
        varying = self.scores.variance > 0  # a constant target has no best ridge
        losses: dict[int, Tensor] = {}
        wanted = {start}
        while wanted - losses.keys():
            at = max(wanted - losses.keys())  # the larger, the sooner solved
            ridge = float(guess.ridges[at])
            residual = self._solve(factor, ridge)
            if not losses:
                check_solved(ridge, residual, _SEARCH_TOLERANCE)
            elif residual > _SEARCH_TOLERANCE:
                break  # below here nothing is solved
            per_subset, by_half = self.scores.losses(factor.leave_one_out(self._rotated, ridge))
            losses[at] = by_half.mean(0)[varying] if per_target else per_subset.mean()[None]
            known = sorted(losses)
            best = torch.stack([losses[index] for index in known]).argmin(0).unique().tolist()
            around = {known[index] + step for index in best for step in (-1, 0, 1)}
            wanted = {index for index in around if 0 <= index < len(guess.ridges)}
        return guess.ridges[sorted(losses)]

    def _solve(self, factor: KrylovRidge, ridge: float) -> float:
        """Solve for scores and probes; the largest residual."""
        together = torch.cat([self._rotated, factor.probes], 1)
        return float(factor.solve(together, ridge, _SEARCH_TOLERANCE).max())


def _from(total: Tensor, noise: Tensor, losses: Tensor) -> Tensor:
    """Losses (R, ..., columns), infinite at ridges whose variance, (R, columns), is below noise.

    The largest ridge stays in any case.
    """
    low = total < noise
    low[-1] = False
    shape = (len(low), *(1,) * (losses.ndim - low.ndim), *low.shape[1:])
    if low.ndim == 1:
        shape = (len(low), *(1,) * (losses.ndim - 1))
    return losses.masked_fill(low.reshape(shape), torch.inf)


def kernel_variance(kernel: Kernel, masks: Masks) -> float:
    """Mean variance of a subset under ``kernel``, over at most 128 of them."""
    gram = kernel.gram(masks[:128])
    return max(float(gram.diagonal().mean() - gram.mean()), 1e-300)


class FixedTrial:
    """A predictor without a ridge to choose: its residuals are known."""

    def __init__(
        self, label: str, scores: Scores, residuals: Tensor, *, components: bool = False
    ) -> None:
        """Judge given residuals (m, t)."""
        self.label, self.scores, self._residuals = label, scores, residuals
        ridges = residuals.new_full((1,), float("nan"))
        self.judgement = judge(scores, ridges, [residuals], components=components)

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """See :class:`Trial`."""
        rotated = self._residuals @ self.scores.rotation if components else self._residuals
        return rotated[:, columns]


class MeanTrial(FixedTrial):
    """The mean score (zero without an intercept): what every kernel has to beat."""

    def __init__(self, scores: Scores, *, components: bool = False) -> None:
        """Leave-one-out residuals of a mean are ``(y - mean) / (1 - share of y in it)``."""
        share = scores.weights / scores.weights.sum() * float(scores.center)
        residuals = (scores.values - scores.offset) / (1 - share)[:, None]
        super().__init__("mean", scores, residuals, components=components)


class LinearTrial(FixedTrial):
    """Lasso or least squares on the tasks."""

    def __init__(self, label: str, masks: Masks, scores: Scores, folds: Tensor) -> None:
        """Fit, and judge by cross-validation (lasso) or leaving one out (least squares)."""
        self._masks = masks
        if label == "lasso":
            self.weights, _, residuals = fit_lasso(
                masks.floats, scores.values, folds, scores.weights
            )
            share = scores.weights / scores.weights.sum()
            self.offset = share @ (scores.values - masks.floats @ self.weights)
        else:
            half = scores.weights.sqrt()[:, None]
            weighted = half * masks.floats, half * scores.values
            self.weights = least_squares(*weighted)
            residuals = least_squares_residuals(*weighted) / half
            self.offset = torch.zeros_like(scores.offset)
        super().__init__(label, scores, residuals)

    def fit_residuals(self, columns: Tensor) -> Tensor:
        """Scores minus fitted values (m, len(columns)) of some targets."""
        fitted = self._masks.floats @ self.weights[:, columns] + self.offset[columns]
        return self.scores.values[:, columns] - fitted
