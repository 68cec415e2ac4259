"""Ways to predict scores: each is judged by leaving subsets out and, if chosen, solved.

Kernels are judged at every ridge, from one eigendecomposition or one Krylov space each. The mean,
lasso and least squares have no ridge to choose.

Shapes: m subsets, t targets, R ridges; ``columns`` are numbers of latent columns, targets or with
``components`` the principal components of the targets (:mod:`.judgement`); float64.
"""

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ksm_ext.surrogates.judgement import Judgement, Scores, judge
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.krylov import ConjugateGradients, KrylovRidge, check_solved
from ksm_ext.surrogates.lasso import fit_lasso, least_squares, least_squares_residuals
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.terms import Factor, KernelTerm, LinearTerm

RELATIVE_RIDGES = tuple(10.0 ** (step / 2) for step in range(-10, 7))
"""Ridges searched, in units of the mean variance of a subset under the kernel: 1e-5 to 1e3."""

_SEARCH_TOLERANCE = 1e-2  # of residuals: errors by 1e-2 change a mean square by 1e-4
_SINGLE_FROM = 768  # ridges are compared in float32 where the products with U dominate the time


@dataclass(frozen=True, eq=False)
class LatentFit:
    """Some latent columns as one trial predicts them.

    Attributes:
        constant: (columns,) intercepts.
        residuals: (m, columns) scores minus the smooth part of the fit.
        ridge_variance: (columns,) variance that residuals stand for, at a subset of weight 1.
        kernel_term: What a kernel adds to the constant, with its uncertainty; None without one.
        linear_term: What weights on tasks add to the constant; None without them.
    """

    constant: Tensor
    residuals: Tensor
    ridge_variance: Tensor
    kernel_term: KernelTerm | None = None
    linear_term: LinearTerm | None = None


class Trial(Protocol):
    """A way to predict scores.

    Attributes:
        label: Its name in the table of candidates.
        judgement: What it costs at each ridge.
    """

    label: str
    judgement: Judgement

    @property
    def kernel(self) -> Kernel | None:
        """Its kernel; None for the mean and weights on tasks."""
        ...

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """Leave-one-out residuals (m, columns) at ``ridges`` (columns,)."""
        ...

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """The fit to all subsets at ``ridges`` (columns,)."""
        ...


class KernelTrial:
    """Kernel ridge with one kernel, at every ridge."""

    factor: SpectralRidge | KrylovRidge

    def __init__(
        self,
        kernel: Kernel,
        masks: Masks,
        scores: Scores,
        *,
        ridge: Tensor | None = None,
        components: bool = False,
    ) -> None:
        """Factor the kernel on ``masks``; ``ridge`` (R,) replaces the search by given ridges."""
        factor = SpectralRidge(kernel.gram(masks), center=scores.center, weights=scores.weights)
        self._prepare(kernel, masks, scores, factor)
        if ridge is not None:
            factor.check_ridge(float(ridge.min()))
            ridges = ridge
        else:
            relative = torch.tensor(RELATIVE_RIDGES, dtype=torch.float64)
            ridges = relative.to(scores.values.device) * max(factor.scale, 1e-300)
        rotated = self._rotated
        if len(masks) > _SINGLE_FROM:
            factor, rotated = factor.in_single_precision(), rotated.to(torch.float32)
        self._judge(factor, rotated, ridges, searched=ridge is None, components=components)

    def _prepare(
        self, kernel: Kernel, masks: Masks, scores: Scores, factor: SpectralRidge | KrylovRidge
    ) -> None:
        self.kernel, self.label, self.factor = kernel, str(kernel), factor
        self._masks, self._scores = masks, scores
        self._rotated = factor.rotate(scores.values)

    def _judge(
        self,
        factor: SpectralRidge | KrylovRidge,
        rotated: Tensor,
        ridges: Tensor,
        *,
        searched: bool,
        components: bool = False,
    ) -> None:
        """Judge every ridge; a search has no use for those below what the noise is known to be."""
        scores = self._scores
        residuals = (factor.leave_one_out(rotated, ridge) for ridge in ridges)
        found = judge(scores, ridges, residuals, components=components)
        if searched and scores.noise is not None:
            varying, noise = scores.varying, scores.noise
            total = _ridge_variances(factor, rotated, ridges)  # (R, t)
            pooled, least = total[:, varying].mean(1), noise[varying].mean()
            found = replace(
                found,
                subset_losses=_infinite_below(least, pooled, found.subset_losses),
                target_losses=_infinite_below(noise, total, found.target_losses),
            )
            if found.component_losses is not None:
                noise = scores.rotation.square().T @ noise
                total = _ridge_variances(self.factor, self.factor.rotate(scores.components), ridges)
                losses = _infinite_below(noise, total, found.component_losses)
                found = replace(found, component_losses=losses)
        self.judgement = found

    def _latent(self, columns: Tensor, components: bool) -> Tensor:
        if not components:
            return self._rotated[:, columns]
        return self.factor.rotate(self._scores.components[:, columns])

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """See :class:`Trial`."""
        return self.factor.leave_one_out(self._latent(columns, components), ridges)

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`Trial`."""
        rotated = self._latent(columns, components)
        signal = self.factor.signal_variance(rotated, ridges)
        dual = self.factor.dual(rotated, ridges)
        _, constant = self._scores.latent(columns, components=components)
        if self._scores.center:
            constant = constant + self.factor.offset(dual)
        residuals = ridges / self._scores.weights[:, None] * dual
        term = self._term(columns, dual, ridges, signal)
        return LatentFit(constant, residuals, ridges * signal, kernel_term=term)

    def uncertainty(self, columns: Tensor, *, components: bool) -> KernelTerm:
        """The term of a fit that predicts nothing: the uncertainty around another trial's fit.

        At the ridge judged that is nearest to the kernel's own variance: as much noise as signal.
        """
        ridges = self.judgement.ridges
        variance = max(self.kernel.variance(self._masks[:128]), 1e-300)
        nearest = (ridges.clamp_min(1e-300) / variance).log().abs().argmin()
        ridge = ridges[nearest].repeat(len(columns))
        signal = self.factor.signal_variance(self._latent(columns, components), ridge)
        dual = self._scores.values.new_zeros(len(self._masks), len(columns))
        return self._term(columns, dual, ridge, signal)

    def _term(self, columns: Tensor, dual: Tensor, ridge: Tensor, signal: Tensor) -> KernelTerm:
        # a Krylov space has grown with the search, and would answer otherwise than a new one
        factor = None
        if isinstance(self.factor, SpectralRidge):
            of = (self.kernel, self._masks, self._scores.weights, self._scores.center, None)
            factor = Factor(self.factor, *of)
        return KernelTerm(self.kernel, columns, dual, ridge, signal, factor=factor)

    def standardised_residuals(self, ridge: Tensor) -> Tensor:
        """(m, t) leave-one-out residuals in units that are the same for all subsets."""
        left_out = self.factor.leave_one_out(self._rotated, ridge)
        return (left_out * self.factor.dual(self._rotated, ridge)).sqrt()


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
        options: dict[str, Any] = {"center": scores.center, "weights": scores.weights}
        factor = KrylovRidge(kernel, masks, settings, progress=progress, **options)
        self._prepare(kernel, masks, scores, factor)
        if ridge is not None:
            factor.check_ridge(float(ridge.min()))
            self._solve(factor, float(ridge[0]))
            ridges = ridge
        else:
            guess = KernelTrial(kernel, masks[sample], scores[sample])
            ridges = self._search(factor, guess.judgement, per_target)
        self._judge(factor, self._rotated, ridges, searched=ridge is None)

    def _search(self, factor: KrylovRidge, guess: Judgement, per_target: bool) -> Tensor:
        """(R,) increasing: the ridges that were solved for."""
        informed = bool(guess.losses.isfinite().all())  # not if the sample's scores are constant
        start = int(guess.losses.argmin()) if informed else len(guess.ridges) // 2
        varying = self._scores.variance > 0  # a constant target has no best ridge
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
            left_out = factor.leave_one_out(self._rotated, ridge)
            per_subset, by_half = self._scores.mean_losses(left_out)
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


def _ridge_variances(
    factor: SpectralRidge | KrylovRidge, rotated: Tensor, ridges: Tensor
) -> Tensor:
    """(R, columns) variance that each ridge stands for, of scores in the eigenbasis."""
    return torch.stack([ridge * factor.signal_variance(rotated, ridge) for ridge in ridges])


def _infinite_below(noise: Tensor, total: Tensor, losses: Tensor) -> Tensor:
    """Losses (R, ..., columns), infinite at ridges whose variance (R, columns) is below the noise.

    The largest ridge stays in any case.
    """
    low = total < noise
    low[-1] = False
    shape = (len(low), *(1,) * (losses.ndim - low.ndim), *low.shape[1:])
    return losses.masked_fill(low.reshape(shape), torch.inf)


class FixedTrial:
    """A predictor without a ridge to choose: its leave-one-out residuals are known."""

    kernel = None

    def __init__(
        self, label: str, scores: Scores, residuals: Tensor, *, components: bool = False
    ) -> None:
        """Judge given residuals (m, t)."""
        self.label, self._scores, self._residuals = label, scores, residuals
        ridges = residuals.new_full((1,), float("nan"))
        self.judgement = judge(scores, ridges, [residuals], components=components)

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """See :class:`Trial`."""
        rotated = self._residuals @ self._scores.rotation if components else self._residuals
        return rotated[:, columns]


class MeanTrial(FixedTrial):
    """The mean score (zero without an intercept): what every kernel has to beat."""

    def __init__(self, scores: Scores, *, components: bool = False) -> None:
        """Leave-one-out residuals of a mean are ``(y - mean) / (1 - share of y in it)``."""
        share = scores.weights / scores.weights.sum() * float(scores.center)
        residuals = (scores.values - scores.offset) / (1 - share)[:, None]
        super().__init__("mean", scores, residuals, components=components)

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`Trial`."""
        residuals, constant = self._scores.latent(columns, components=components)
        left_out = self.residuals(ridges, columns, components=components)
        return LatentFit(constant, residuals, left_out.square().mean(0))


class LinearTrial(FixedTrial):
    """Lasso or least squares on the tasks. Lasso is not linear in the scores: no components."""

    def __init__(self, label: str, masks: Masks, scores: Scores, folds: Tensor) -> None:
        """Fit, and judge by cross-validation (lasso) or leaving one out (least squares)."""
        self._masks = masks
        if label == "lasso":
            self._weights, _, residuals = fit_lasso(
                masks.floats, scores.values, folds, scores.weights
            )
            share = scores.weights / scores.weights.sum()
            self._constant = share @ (scores.values - masks.floats @ self._weights)
        else:
            half = scores.weights.sqrt()[:, None]
            weighted = half * masks.floats, half * scores.values
            self._weights = least_squares(*weighted)
            residuals = least_squares_residuals(*weighted) / half
            self._constant = torch.zeros_like(scores.offset)
        super().__init__(label, scores, residuals)

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`Trial`."""
        weights, constant = self._weights[:, columns], self._constant[columns]
        fitted = self._masks.floats @ weights + constant
        left_out = self.residuals(ridges, columns, components=components)
        return LatentFit(
            constant,
            self._scores.values[:, columns] - fitted,
            left_out.square().mean(0),
            linear_term=LinearTerm(columns, weights),
        )
