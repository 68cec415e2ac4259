"""Ways to predict scores: each is judged by leaving subsets out and, if chosen, solved.

Kernels are judged at every ridge, from one eigendecomposition or one Krylov space each. Kernels of
small tables are factored and judged many at a time, in batched products. The mean, lasso and least
squares have no ridge to choose.

Shapes: b tables of one shape, m subsets, t targets, K kernels, R ridges; ``columns`` (c,) are
numbers of latent columns, targets or with ``components`` the principal components of the targets
(:mod:`.judgement`), and ``ridges`` (b, c) those of each; float64.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ksm_ext.checks import brief
from ksm_ext.surrogates.judgement import KEPT_RESIDUALS, Judgement, Scores, judge
from ksm_ext.surrogates.kernels import Kernel, grams
from ksm_ext.surrogates.krylov import ConjugateGradients, KrylovRidge, check_solved
from ksm_ext.surrogates.lasso import (
    cross_validated_lasso,
    lasso,
    least_squares,
    least_squares_residuals,
)
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.terms import Factor, KernelTerm, factored_alone

RELATIVE_RIDGES = tuple(10.0 ** (step / 2) for step in range(-10, 7))
"""Ridges searched, in units of the mean variance of a subset under the kernel: 1e-5 to 1e3."""

_SEARCH_TOLERANCE = 1e-2  # of residuals: errors by 1e-2 change a mean square by 1e-4
_SINGLE_FROM = 768  # ridges are compared in float32 where the products with U dominate the time

_TOGETHER = 2**22
"""Numbers held at a time of eigenvectors and residuals: 32 MB. Of kernels, one at least."""


@dataclass(frozen=True, eq=False)
class LatentFit:
    """Some latent columns as one trial predicts them.

    Attributes:
        constant: (b, c) intercepts.
        residuals: (b, m, c) scores minus the smooth part of the fit.
        ridge_variance: (b, c) variance that residuals stand for, at a subset of weight 1.
        dual: (b, m, c) what a kernel adds to the constant; None without one.
        signal: (b, c) prior variance per unit of the kernel; None without one.
        weights: (b, n, c) what weights on tasks add to the constant; None without them.
    """

    constant: Tensor
    residuals: Tensor
    ridge_variance: Tensor
    dual: Tensor | None = None
    signal: Tensor | None = None
    weights: Tensor | None = None

    __repr__ = brief


class Trial(Protocol):
    """A way to predict scores: a kernel, or another predictor, of every table."""

    def predictor(self, table: int) -> Kernel | str:
        """The kernel that predicts a table, or the name of what does."""
        ...

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """Leave-one-out residuals (b, m, c)."""
        ...

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """The fit to all subsets."""
        ...


@dataclass(frozen=True, eq=False)
class Judged:
    """Trials that were judged together.

    Attributes:
        trials: One for each kernel, or one predictor.
        num_ridges: How many ridges each was judged at.
        judgement: What they cost, of the first at every ridge, then of the next.
        tables: (b,) bool: the tables that these trials are for.
        later: Computes the rank correlations (C,) of a table, where the judgement has none.
    """

    trials: Sequence[Trial]
    num_ridges: int
    judgement: Judgement
    tables: Tensor
    later: Callable[[int], Callable[[], Tensor]] | None = None

    __repr__ = brief

    def ranks(self, table: int) -> Tensor | Callable[[], Tensor]:
        """(C,) rank correlations of a table, or what computes them."""
        if self.judgement.ranks is not None:
            return self.judgement.ranks[table]
        assert self.later is not None
        return self.later(table)


class KernelTrial:
    """Kernel ridge with one kernel of every table."""

    def __init__(
        self,
        kernels: Sequence[Kernel],
        tables: Sequence[Masks],
        scores: Scores,
        solved: tuple[Any, Tensor],
        number: int,
    ) -> None:
        """Take what is known of ``tables``.

        Args:
            kernels: One kernel for each table.
            tables: The tables.
            scores: Their scores.
            solved: What solves for K kernels of every table, as :class:`.spectral.SpectralRidge`
                does, and the scores (b, K, rank, t) in their eigenbases.
            number: Which of the K it is.
        """
        self._kernels, self._tables, self._scores = kernels, tables, scores
        self._solved, self._number = solved, number

    @cached_property
    def _factor(self) -> Any:
        return self._solved[0][:, self._number]

    @property
    def _rotated(self) -> Tensor:
        return self._solved[1][:, self._number]

    def predictor(self, table: int) -> Kernel:
        """See :class:`Trial`."""
        return self._kernels[table]

    def _latent(self, columns: Tensor, components: bool) -> Tensor:
        if not components:
            return self._rotated[..., columns]
        return self._factor.rotate(self._scores.components[..., columns])

    def _signal(self, rotated: Tensor, ridges: Tensor, columns: Tensor, components: bool) -> Tensor:
        """Prior variance (b, c) per unit of the kernel, with which a ridge is all of the noise."""
        signal = self._factor.signal_variance(rotated, ridges)
        noise = self._scores.latent_noise(components=components)
        return signal if noise is None else signal.maximum(noise[:, columns] / ridges)

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """See :class:`Trial`."""
        return self._factor.leave_one_out(self._latent(columns, components), ridges)

    def squared_residuals(self, ridges: Tensor, columns: Tensor) -> Tensor:
        """Squares (b, m, c) of leave-one-out residuals in units that are the same for all."""
        rotated = self._latent(columns, components=False)
        return self._factor.leave_one_out(rotated, ridges) * self._factor.dual(rotated, ridges)

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`Trial`."""
        rotated = self._latent(columns, components)
        signal = self._signal(rotated, ridges, columns, components)
        dual = self._factor.dual(rotated, ridges)
        _, constant = self._scores.latent(columns, components=components)
        if self._scores.center:
            constant = constant + self._factor.offset(dual)
        residuals = ridges[:, None] / self._scores.weights[..., None] * dual
        return LatentFit(constant, residuals, ridges * signal, dual, signal)

    @property
    def is_factored(self) -> bool:
        """Whether the Gram matrix was factored."""
        return isinstance(self._solved[0], SpectralRidge)

    def ridge_variances(self, ridges: Tensor, *, components: bool) -> Tensor:
        """(b, K, q) variance that ridges of all K kernels factored together stand for; 0 of 0."""
        factor, rotated = self._solved
        if components:
            rotated = factor.rotate(self._scores.components[:, None])
        return ridges * factor.signal_variance(rotated, torch.where(ridges > 0, ridges, 1.0))

    def term(
        self, table: int, columns: Tensor, dual: Tensor, ridges: Tensor, signal: Tensor
    ) -> KernelTerm:
        """The kernel of a table with what was solved for these columns of it."""
        kernel, masks = self._kernels[table], self._tables[table]
        weights, center = self._scores.weights[table], self._scores.center
        factor = None  # of many tables, factors would be most of the memory
        if len(self._tables) == 1 and self._kept is not None:
            factor = Factor(self._kept, kernel, masks, weights, center, None)
        return KernelTerm(kernel, columns, dual, ridges, signal, factor=factor)

    @cached_property
    def _kept(self) -> SpectralRidge | None:
        """The factor that intervals are computed with; as a term would make it, bit for bit."""
        solver, rotated = self._solved
        if not isinstance(solver, SpectralRidge):
            return None  # a Krylov space has grown with the search, and would answer otherwise
        if rotated.shape[1] == 1:
            return solver[0, 0]
        of = self._kernels[0], self._tables[0], self._scores.weights[0]
        return factored_alone(*of, center=self._scores.center)

    def uncertainty(
        self, table: int, ridges: Tensor, columns: Tensor, *, components: bool
    ) -> KernelTerm:
        """The term of a fit that predicts nothing: the uncertainty around another trial's fit.

        At that of ``ridges`` (R,) nearest to the kernel's own variance: as much noise as signal.
        """
        variance = max(self._kernels[table].variance(self._tables[table][:128]), 1e-300)
        nearest = (ridges.clamp_min(1e-300) / variance).log().abs().argmin()
        ridge = ridges[nearest].repeat(len(columns))
        ridges = ridge.expand(len(self._tables), -1)
        rotated = self._latent(columns, components)
        signal = self._signal(rotated, ridges, columns, components)[table]
        dual = ridge.new_zeros(len(self._tables[table]), len(columns))
        return self.term(table, columns, dual, ridge, signal)


def judged_kernels(
    kernels: Sequence[Sequence[Kernel]],
    tables: Sequence[Masks],
    scores: Scores,
    *,
    ridge: Tensor | None = None,
    components: bool = False,
    ranked: bool = False,
) -> Iterator[Judged]:
    """Factor and judge kernels, as many at a time as memory allows.

    Args:
        kernels: K kernels of every table.
        tables: The tables.
        scores: Their scores.
        ridge: (1,) replaces the search by a given ridge.
        components: Whether to judge principal components of the targets too.
        ranked: Whether to compute rank correlations; else they are computed if they are asked for.
    """
    b, m, t = scores.values.shape
    num_ridges = len(RELATIVE_RIDGES) if ridge is None else 1
    step = max(1, _TOGETHER // (b * m * (m + num_ridges * t)))
    if m > _SINGLE_FROM:
        step = 1  # nothing is saved together, and a factor of its own serves intervals too
    for start in range(0, len(kernels[0]), step):
        part = [each[start : start + step] for each in kernels]
        alike = 1 if all(masks is tables[0] for masks in tables) else b  # then factored once
        weights = scores.weights[:alike, None]
        # nobody else holds the Gram matrices, so that they are gone when they are factored
        factor = SpectralRidge(
            grams(part[:alike], tables[:alike]), center=scores.center, weights=weights
        )
        options: dict[str, Any] = {"ridge": ridge, "components": components, "ranked": ranked}
        yield judged_factor(part, tables, scores, factor, **options)


def judged_factor(
    kernels: Sequence[Sequence[Kernel]],
    tables: Sequence[Masks],
    scores: Scores,
    factor: SpectralRidge,
    *,
    ridge: Tensor | None = None,
    components: bool = False,
    ranked: bool = False,
) -> Judged:
    """Judge K kernels of every table that are ``factor`` (b, K), see :func:`judged_kernels`."""
    b, m, t = scores.values.shape
    if ridge is not None:
        factor.check_ridge(float(ridge))
        ridges = ridge.expand(b, factor.scale.shape[1], 1)
    else:
        relative = torch.tensor(RELATIVE_RIDGES, dtype=torch.float64, device=factor.scale.device)
        ridges = (factor.scale.clamp_min(1e-300)[..., None] * relative).expand(b, -1, -1)
    rotated = factor.rotate(scores.values[:, None])
    judging, of_judging = factor, rotated
    if m > _SINGLE_FROM:
        judging, of_judging = factor.in_single_precision(), rotated.to(torch.float32)
    at_once = max(1, _TOGETHER // (ridges[..., 0].numel() * m * t))
    answers = (judging.at_ridges(of_judging, part) for part in ridges.split(at_once, -1))
    keeps = b == 1 and ridges.numel() * m * t <= KEPT_RESIDUALS
    kept: list[Tensor] = []

    def residuals() -> Iterator[tuple[Tensor, Tensor]]:
        for dual, precision in answers:
            left_out = dual / precision
            if keeps:
                kept.append(left_out)
            yield left_out, dual

    found = _judgement(
        residuals(),
        scores,
        ridges,
        searched=ridge is None,
        of_components=factor if components else None,
        ranked=ranked and b == 1 and not keeps,
    )
    trials = [
        KernelTrial([each[k] for each in kernels], tables, scores, (factor, rotated), k)
        for k in range(ridges.shape[1])
    ]
    everything = torch.ones(b, dtype=torch.bool, device=ridges.device)

    def later(table: int) -> Callable[[], Tensor]:
        if keeps:
            return partial(_ranks_of, scores, torch.cat(kept, 3))
        own = scores.tables(torch.tensor([table], device=ridges.device))  # too many to be kept
        return partial(_ranks_again, kernels[table], tables[table], own, ridge)

    return Judged(trials, ridges.shape[2], found, everything, later)


def _ranks_again(
    kernels: Sequence[Kernel], masks: Masks, scores: Scores, ridge: Tensor | None
) -> Tensor:
    """(C,) rank correlations of kernels of one table."""
    options: dict[str, Any] = {"ridge": ridge, "ranked": True}
    each = (part.ranks(0) for part in judged_kernels([kernels], [masks], scores, **options))
    return torch.cat([ranks if isinstance(ranks, Tensor) else ranks() for ranks in each])


def _judgement(
    answers: Iterable[tuple[Tensor, Tensor]],
    scores: Scores,
    ridges: Tensor,
    *,
    searched: bool,
    of_components: SpectralRidge | None = None,
    ranked: bool = False,
) -> Judgement:
    """Judge every ridge; a search has no use for those that stand for less than the noise.

    Args:
        answers: Leave-one-out residuals and dual coefficients (b, K, m, R', t), some ridges at a
            time.
        scores: What is judged.
        ridges: (b, K, R).
        searched: Whether ridges were searched.
        of_components: What solves for components of the targets, where they are judged too.
        ranked: Whether to compute rank correlations.
    """
    signal: list[Tensor] = []
    noise = scores.noise if searched else None

    def residuals() -> Iterator[Tensor]:
        for left_out, dual in answers:
            if noise is not None:
                signal.append((left_out * dual).mean(2).double())
            yield left_out

    options = {"components": of_components is not None, "ranked": ranked}
    found = judge(scores, ridges, residuals(), **options)
    if noise is None:
        return found
    least = scores.least_share * noise[:, None, None]
    total = ridges[..., None] * torch.cat(signal, 2)  # (b, K, R, t) variance a ridge stands for
    pooled = _is_below(scores.pooled(total), scores.pooled(least))[..., None]
    single = _is_below(total, least)[..., None, :]
    found = replace(
        found,
        subset_losses=found.subset_losses.masked_fill(pooled, torch.inf),
        target_losses=found.target_losses.masked_fill(single, torch.inf),
    )
    if of_components is None or found.component_losses is None:
        return found
    least = least @ scores.rotation.square()[:, None]
    rotated = of_components.rotate(scores.components[:, None])
    dual, precision = of_components.at_ridges(rotated, ridges)
    below = _is_below(ridges[..., None] * (dual.square() / precision).mean(2), least)
    return replace(found, component_losses=found.component_losses.masked_fill(below, torch.inf))


def _is_below(total: Tensor, noise: Tensor) -> Tensor:
    """(b, K R, ...) bool: ridges whose variance (b, K, R, ...) is below the noise, but the last."""
    low = total < noise
    low[:, :, -1] = False
    return low.flatten(1, 2)


class _Single:
    """A Krylov space as a batch of one: a dimension less goes in, and one more comes out."""

    def __init__(self, space: KrylovRidge) -> None:
        self.space = space

    def __getitem__(self, index: Any) -> "_Single":
        return self

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.space, name)
        return lambda *given: method(*(each[0] for each in given))[None]


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
        options: dict[str, Any] = {"center": scores.center, "weights": scores.weights[0]}
        self._space = KrylovRidge(kernel, masks, settings, progress=progress, **options)
        y = self._space.rotate(scores.values[0])
        super().__init__([kernel], [masks], scores, (_Single(self._space), y[None, None]), 0)
        if ridge is not None:
            self._space.check_ridge(float(ridge.min()))
            self._solve(float(ridge[0]))
            ridges = ridge
        else:
            (guess,) = judged_kernels([[kernel]], [masks[sample]], scores.rows(sample))
            ridges = self._search(guess.judgement, per_target)
        answers = (
            (self._space.leave_one_out(y, each), self._space.dual_so_far(y, each))
            for each in ridges
        )
        shaped = ((one[None, None, :, None], two[None, None, :, None]) for one, two in answers)
        found = _judgement(shaped, scores, ridges[None, None], searched=ridge is None, ranked=True)
        self.judged = Judged(
            [self], len(ridges), found, torch.ones(1, dtype=torch.bool, device=y.device)
        )

    def _search(self, guess: Judgement, per_target: bool) -> Tensor:
        """(R,) increasing: the ridges that were solved for."""
        expected, grid = guess.losses[0], guess.ridges[0]
        informed = bool(expected.isfinite().all())  # not if the sample's scores are constant
        start = int(expected.argmin()) if informed else len(grid) // 2
        varies = self._scores.varies[0]  # a constant target has no best ridge
        losses: dict[int, Tensor] = {}
        wanted = {start}
        while wanted - losses.keys():
            at = max(wanted - losses.keys())  # the larger, the sooner solved
            ridge = float(grid[at])
            residual = self._solve(ridge)
            if not losses:
                check_solved(ridge, residual, _SEARCH_TOLERANCE)
            elif residual > _SEARCH_TOLERANCE:
                break  # below here nothing is solved
            left_out = self._space.leave_one_out(self._rotated[0], ridge)
            pooled, by_half, _ = self._scores.summary(left_out[None, None, :, None])
            per_target_losses = by_half[0, 0, 0].mean(0)[varies]
            losses[at] = per_target_losses if per_target else pooled.mean()[None]
            known = sorted(losses)
            best = torch.stack([losses[index] for index in known]).argmin(0).unique().tolist()
            around = {known[index] + step for index in best for step in (-1, 0, 1)}
            wanted = {index for index in around if 0 <= index < len(grid)}
        return grid[sorted(losses)]

    def _solve(self, ridge: float) -> float:
        """Solve for scores and probes; the largest residual."""
        together = torch.cat([self._rotated[0], self._space.probes], 1)
        return float(self._space.solve(together, ridge, _SEARCH_TOLERANCE).max())


def _ranks_of(scores: Scores, residuals: Tensor) -> Tensor:
    """(C,) rank correlations of one table, of residuals (1, K, m, R, t)."""
    return scores.rank_correlations(residuals).flatten()


class FixedTrial(ABC):
    """A predictor without a ridge to choose: its leave-one-out residuals are known."""

    def __init__(
        self, label: str, scores: Scores, residuals: Tensor, *, components: bool = False
    ) -> None:
        """Judge given residuals (b, m, t)."""
        self._label, self._scores, self.left_out = label, scores, residuals
        ridges = residuals.new_full((len(residuals), 1, 1), float("nan"))
        options = {"components": components, "ranked": residuals[0].numel() > KEPT_RESIDUALS}
        found = judge(scores, ridges, [residuals[:, None, :, None]], **options)
        everything = torch.ones(len(residuals), dtype=torch.bool, device=residuals.device)
        self.judged = Judged([self], 1, found, everything, self._ranks)

    def _ranks(self, table: int) -> Callable[[], Tensor]:
        own = self._scores.tables(torch.tensor([table], device=self.left_out.device))
        return partial(_ranks_of, own, self.left_out[table].clone()[None, None, :, None])

    def predictor(self, table: int) -> str:
        """See :class:`Trial`."""
        return self._label

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """See :class:`Trial`."""
        rotated = self.left_out @ self._scores.rotation if components else self.left_out
        return rotated[..., columns]

    @abstractmethod
    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`Trial`."""


class MeanTrial(FixedTrial):
    """The mean score (zero without an intercept): what every kernel has to beat."""

    def __init__(self, scores: Scores, *, components: bool = False) -> None:
        """Leave-one-out residuals of a mean are ``(y - mean) / (1 - share of y in it)``."""
        share = scores.share * float(scores.center)
        residuals = (scores.values - scores.offset[:, None]) / (1 - share)[..., None]
        super().__init__("mean", scores, residuals, components=components)

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`Trial`."""
        residuals, constant = self._scores.latent(columns, components=components)
        left_out = self.residuals(ridges, columns, components=components)
        return LatentFit(constant, residuals, left_out.square().mean(1))


class LinearTrial(FixedTrial):
    """Lasso or least squares on the tasks. Lasso is not linear in the scores: no components."""

    def __init__(
        self,
        label: str,
        tables: Sequence[Masks],
        scores: Scores,
        folds: Tensor,
        *,
        tol: float = 1e-3,
    ) -> None:
        """Fit, and judge by cross-validation (lasso, to ``tol``) or leaving one out."""
        self._floats = torch.stack([masks.floats for masks in tables])  # (b, m, n)
        self._penalties: Tensor | None = None
        if label == "lasso":
            each = self._floats, scores.values, folds, scores.weights
            self._penalties, residuals = cross_validated_lasso(*each, tol=tol)
        else:
            half = scores.weights.sqrt()[..., None]
            pairs = zip(half * self._floats, half * scores.values, strict=True)
            residuals = torch.stack([least_squares_residuals(*pair) for pair in pairs]) / half
        super().__init__(label, scores, residuals)

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`Trial`."""
        scores, x = self._scores, self._floats
        y, constant = scores.values[..., columns], torch.zeros_like(scores.offset[:, columns])
        if self._penalties is None:
            half = scores.weights.sqrt()[..., None]
            pairs = zip(half * x, half * y, strict=True)
            weights = torch.stack([least_squares(*pair) for pair in pairs])
        else:
            weights = lasso(x, y, self._penalties[:, columns], scores.weights)
            constant = (scores.share[:, None] @ (y - x @ weights))[:, 0]
        fitted = x @ weights + constant[:, None]
        left_out = self.residuals(ridges, columns, components=components)
        variance = left_out.square().mean(1)
        return LatentFit(constant, y - fitted, variance, weights=weights)
