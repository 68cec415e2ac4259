"""Which trial, at which ridge, predicts which target: one for all targets, or one for each.

A choice made for all targets together sees the most data, and one made for a single target knows it
best. Freer ways of sharing are judged on subsets that had no part in their choices, and a target
leaves the common choice only where it is clearly better served alone: no target is predicted worse
because others are fitted with it.

Shapes: b tables of one shape, each with a choice of its own; m subsets, t targets, q latent columns
(targets, or principal components of the targets), C candidates (a trial at one of its ridges each);
scores standardised, float64.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import compress
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ksm_ext.checks import brief
from ksm_ext.surrogates.judgement import Scores, folds_of
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm
from ksm_ext.surrogates.trials import Judged, KernelTrial, MeanTrial, Trial, judged_factor

Sharing = Literal["shared", "target", "component"]
"""Whether all targets share one kernel and ridge, or each has its own, or each component has."""

Term = TypeVar("Term", KernelTerm, LinearTerm)

_CLEAR = 2.0
"""Standard errors by which a candidate must win to replace the default or the common choice.

It is the best of many, so some win by chance: one in forty by so much.
"""

_RICHER = 0.5
"""Standard errors by which kernels that see sizes must win: they are many."""

_BETTER_THAN_MEAN = 0.5
"""Standard errors by which a predictor must beat the mean.

Few, since real effects may be small; above 0, since the predictor's ridge was chosen to win, and
the mean has nothing to choose.
"""

_ROUNDED = 1e-9  # of a loss

_AS_GOOD = 0.25
"""Standard errors of a mean of m squares by which a loss may be larger, and be as good.

Of 10 tasks, 20 or 60 scores with noise: leave-one-out intervals hold in .61 without any of this, in
.79 at 0, .89 at 0.25 and .90 at 0.3. On games, without noise, they are 1.1 to 2.1 times as wide.
"""


@dataclass(frozen=True, eq=False)
class Choice:
    """The trial and the ridge of every latent column.

    Attributes:
        contest: What was chosen from.
        candidate: (b, q) int64 number of the candidate.
        components: Whether latent columns are components of the targets.
    """

    contest: "Contest"
    candidate: Tensor
    components: bool = False

    __repr__ = brief

    @property
    def trial(self) -> Tensor:
        """(b, q) int64 index of the trial."""
        return self.contest.trial_of[self.candidate]

    def groups(self) -> Iterator[tuple[Trial, Tensor, Tensor, Tensor]]:
        """Each trial in use, latent columns (c,), and the ridges of those and whether it is theirs.

        Both are (b, c): of a column that is its in one table only, the others have a ridge of its
        too, to be ignored.
        """
        trial, ridges = self.trial, self.contest.ridges.gather(1, self.candidate)
        for index in torch.unique(trial).tolist():
            its = trial == index  # (b, q)
            columns = its.any(0).nonzero()[:, 0]
            used = its[:, columns]
            start = int(self.contest.starts[index])
            ridge = torch.where(used, ridges[:, columns], self.contest.ridges[:, [start]])
            yield self.contest.trials[index], columns, ridge, used

    @cached_property
    def residuals(self) -> Tensor:
        """(b, m, t) leave-one-out residuals."""
        each = {"components": self.components}
        latent = self.gathered(lambda trial, *at: trial.residuals(*at, **each))
        return latent @ self.contest.scores.rotation.mT if self.components else latent

    def gathered(self, of_trial: Callable[[Any, Tensor, Tensor], Tensor]) -> Tensor:
        """(b, m, q) of what each trial in use says (b, m, c) of its ridges and columns."""
        shape = self.contest.scores.values.shape[:2]
        found = self.contest.scores.values.new_zeros(*shape, self.candidate.shape[1])
        for trial, columns, ridges, used in self.groups():
            its = of_trial(trial, ridges, columns)
            found[..., columns] = torch.where(used[:, None], its, found[..., columns])
        return found

    @cached_property
    def losses(self) -> Tensor:
        """(b, m, t) loss of each subset for each target."""
        return self.contest.scores.losses(self.residuals)

    def where(self, chosen: Tensor, other: "Choice") -> "Choice":
        """This choice where ``chosen`` (b, q) or (b, 1) is True, and ``other`` elsewhere."""
        if bool(chosen.all()):
            return self
        return replace(self, candidate=torch.where(chosen, self.candidate, other.candidate))


@dataclass(frozen=True, eq=False)
class Chosen:
    """What is chosen for b tables, all targets of a table at once or some by components.

    Attributes:
        by_target: The choice of targets.
        shared: (b,) bool: tables whose targets share one kernel and ridge.
        by_component: The choice of components, or None.
        targets_of_components: (b, t) bool: targets that are predicted by components.
    """

    by_target: Choice
    shared: Tensor
    by_component: Choice | None
    targets_of_components: Tensor

    __repr__ = brief


@dataclass(frozen=True, eq=False)
class Contest:
    """Trials of the same scores, to choose from.

    Attributes:
        judged: The trials, with what they cost.
        scores: What they predict.
        mean: Whether the first of them is the mean.
        preferred: Indices of trials that are kept unless another is clearly better.
        richer: Indices of trials that must win against what is chosen from the others.
    """

    judged: Sequence[Judged]
    scores: Scores
    mean: bool = False
    preferred: frozenset[int] = frozenset()
    richer: frozenset[int] = frozenset()

    @cached_property
    def trials(self) -> list[Trial]:
        """All trials, in the order of their candidates."""
        return [trial for each in self.judged for trial in each.trials]

    @cached_property
    def sizes(self) -> list[int]:
        """Number of candidates of each trial: its ridges."""
        return [each.num_ridges for each in self.judged for _ in each.trials]

    @cached_property
    def trial_of(self) -> Tensor:
        """(C,) int64: the trial of each candidate."""
        sizes = torch.tensor(self.sizes, device=self.scores.values.device)
        return torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)

    @cached_property
    def starts(self) -> list[int]:
        """The first candidate of each trial."""
        return [sum(self.sizes[:index]) for index in range(len(self.sizes))]

    @cached_property
    def ridges(self) -> Tensor:
        """(b, C)."""
        return torch.cat([each.judgement.ridges for each in self.judged], 1)

    @cached_property
    def subset_losses(self) -> Tensor:
        """(b, C, m) pooled loss of each subset."""
        return torch.cat([each.judgement.subset_losses for each in self.judged], 1)

    @cached_property
    def _possible(self) -> Tensor:
        """(b, C, 1) bool: candidates that are for the table."""
        columns = [
            each.tables[:, None].expand(-1, each.judgement.ridges.shape[1]) for each in self.judged
        ]
        return torch.cat(columns, 1)[..., None]

    @cached_property
    def _target_losses(self) -> Tensor:
        """(b, C, 2, t), infinite where there is no choice."""
        losses = torch.cat([each.judgement.target_losses for each in self.judged], 1)
        return losses.masked_fill(~self._possible[..., None] | losses.isnan(), torch.inf)

    @cached_property
    def _shared_losses(self) -> Tensor:
        """(b, C, 1)."""
        losses = self.subset_losses.mean(2)[..., None]
        return losses.masked_fill(~self._possible | losses.isnan(), torch.inf)

    @cached_property
    def _component_losses(self) -> Tensor:
        """(b, C, q), infinite for trials that were not judged on components."""
        parts, q = [], self.scores.rotation.shape[2]
        for judgement in (each.judgement for each in self.judged):
            found = judgement.component_losses
            none = judgement.ridges.new_full((*judgement.ridges.shape, q), torch.inf)
            parts.append(none if found is None else found)
        losses = torch.cat(parts, 1)
        return losses.masked_fill(~self._possible | losses.isnan(), torch.inf)

    def best(
        self, sharing: Sharing, among: Tensor | None = None, *, half: int | None = None
    ) -> Choice:
        """The best candidate of every latent column under one way of sharing.

        Args:
            sharing: What has a choice of its own.
            among: (b or 1, C) bool: the candidates to choose from; all by default.
            half: The half of the subsets (0 or 1) on which ridges per target are chosen; all
                subsets by default.
        """
        if sharing == "component":
            losses = self._component_losses
        elif sharing == "shared":
            losses = self._shared_losses
        else:
            by_half = self._target_losses
            losses = by_half.mean(2) if half is None else by_half[:, :, half]
        if among is not None:
            losses = losses.masked_fill(~among[..., None], torch.inf)
        candidate = losses.argmin(1)
        if sharing == "shared":
            candidate = candidate.expand(-1, self.scores.values.shape[2])
        return Choice(self, candidate, sharing == "component")

    def among(self, trials: Iterable[int]) -> Tensor:
        """(1, C) bool: the candidates of these trials."""
        wanted = torch.tensor(sorted(trials), dtype=torch.int64, device=self.trial_of.device)
        return torch.isin(self.trial_of, wanted)[None]

    def choose(self, tables: Sequence[Masks], sharing: tuple[Sharing, ...]) -> Chosen:
        """The choice of every table: one for all targets, or others for targets that leave it.

        Args:
            tables: The fitted subsets of each.
            sharing: The ways of sharing to choose from, the strictest first.
        """
        scores = self.scores
        b, _, t = scores.values.shape
        nowhere = torch.zeros(b, t, dtype=torch.bool, device=scores.values.device)
        everywhere = ~nowhere[:, 0]
        if t == 1 or sharing[0] == "target":
            shared = everywhere if sharing[0] == "shared" else ~everywhere
            return Chosen(self._alone(), shared, None, nowhere)
        common, ways = self._common(tables, sharing)
        if len(sharing) == 1:
            return Chosen(common[0], everywhere, None, nowhere)  # asked for: one choice for all
        residuals, way = common[0].residuals, ways[:, None, None]
        for number, choice in common.items():
            if number:
                residuals = torch.where(way == number, choice.residuals, residuals)
        alone, losses = self._alone(), scores.losses(residuals)
        leaves = clearly_better(losses - alone.losses)
        if self.mean:
            leaves |= ~self._beats_mean(residuals, losses)
        leaves &= scores.variance > 0
        shared = (ways == 0) & ~leaves.any(1)
        component = ways == 2
        by_target = common[0]
        if 1 in common:
            by_target = common[1].where((ways == 1)[:, None], by_target)
        by_target = alone.where(leaves | component[:, None], by_target)
        return Chosen(by_target, shared, common.get(2), component[:, None] & ~leaves)

    def most_noise(self, choice: Choice, shared: Tensor) -> Tensor | None:
        """(b, q) the largest variance of noise with which a kernel predicts as well as a choice.

        That a kernel with a small ridge was chosen does not mean that scores are exact: a rough one
        follows noise as well as a smooth one leaves it out. So of every kernel, the largest ridge
        counts at which left-out subsets are predicted as well, and the variance it stands for. Of
        targets that share a choice, all together and the one itself: what many noisy ones would
        bear would be far more than one that is predicted well has residuals for. None where noise
        is known, or no kernel was factored.

        Args:
            choice: What was chosen.
            shared: (b,) bool: tables whose targets share one choice, to be judged together.
        """
        factored = [
            isinstance(each.trials[0], KernelTrial) and each.trials[0].is_factored
            for each in self.judged
        ]
        if self.scores.noise is not None or not any(factored):
            return None
        each = self._component_losses if choice.components else self._target_losses.mean(2)
        apart = ~shared[:, None, None] | choice.components
        as_good = self._are_as_good(each, choice.candidate)  # (b, C, q)
        together = self._shared_losses.expand_as(each)
        as_good &= apart | self._are_as_good(together, choice.candidate)
        ridges = torch.where(as_good, self.ridges[..., None], 0.0)
        parts = ridges.split([each.judgement.ridges.shape[1] for each in self.judged], 1)
        found = torch.zeros_like(each[:, :1])
        for judged, part in zip(
            compress(self.judged, factored), compress(parts, factored), strict=True
        ):
            trial = judged.trials[0]
            assert isinstance(trial, KernelTrial)
            largest = part.unflatten(1, (-1, judged.num_ridges)).amax(2)  # (b, K, q)
            noise = trial.ridge_variances(largest, components=choice.components)
            found = found.maximum(noise.amax(1, keepdim=True))
        return found[:, 0]

    def _are_as_good(self, losses: Tensor, candidate: Tensor) -> Tensor:
        """(b, C, q) bool: losses that are those of ``candidate`` (b, q), but for chance."""
        best = losses.gather(1, candidate[:, None])
        spread = (2 / self.scores.values.shape[1]) ** 0.5 * best.clamp_min(0.0)  # ranks have none
        return (losses <= best + _AS_GOOD * spread) & losses.isfinite()

    def _common(
        self, tables: Sequence[Masks], sharing: tuple[Sharing, ...]
    ) -> tuple[dict[int, Choice], Tensor]:
        """One choice for all targets, unless a freer one predicts subsets it has not seen better.

        The freer ways of sharing keep the kernel of the shared choice: the best of hundreds of
        candidates for a single target would be mostly noise.

        Returns:
            The choice by each way of sharing that some table takes, the shared one in any case, and
            the numbers of these ways (b,).
        """
        scores = self.scores
        choice, means = self._careful("shared"), self.among([0] * self.mean)
        if self.mean:
            mean = self.best("shared", means)
            choice = choice.where(self._wins(choice, mean, "shared", _BETTER_THAN_MEAN), mean)
        kept = choice.trial[:, 0]  # (b,)
        ways = torch.zeros_like(kept)
        kernels = [isinstance(self.trials[index], KernelTrial) for index in kept.tolist()]
        if len(sharing) == 1 or not any(kernels):
            return {0: choice}, ways
        among = means | (self.trial_of == kept[:, None])
        if "component" in sharing:
            fitted = [self.trials[index].predictor(i) for i, index in enumerate(kept.tolist())]
            judged = validation_residuals(fitted, tables, scores, sharing)
        else:
            judged = [choice.residuals, self._crossed(among)]
        # no margin here: nothing in these residuals favours the freer ways
        losses = torch.stack([scores.pooled(scores.losses(each)).mean(1) for each in judged])
        least = losses.amin(0)
        # the strictest of those that rounding alone tells apart: components of one ridge, say
        best = (losses <= least + _ROUNDED * least.abs()).long().argmax(0)
        ways = torch.where(torch.tensor(kernels, device=best.device), best, ways)
        freer = {number: sharing[number] for number in set(ways.tolist()) - {0}}
        return {0: choice, **{i: self.best(way, among) for i, way in freer.items()}}, ways

    def _careful(self, sharing: Sharing) -> Choice:
        """The best, unless simpler is nearly as good."""
        everything = range(len(self.trials))
        choice = self.best(sharing, self.among(set(everything) - self.richer))
        if self.preferred:
            default = self.best(sharing, self.among(self.preferred))
            choice = choice.where(self._wins(choice, default, sharing, _CLEAR), default)
        if self.richer:
            other = self.best(sharing, self.among(self.richer))
            choice = other.where(self._wins(other, choice, sharing, _RICHER), choice)
        return choice

    def _wins(self, one: Choice, other: Choice, sharing: Sharing, errors: float) -> Tensor:
        """(b, t) bool: whether one choice predicts better by so many standard errors."""
        gain = other.losses - one.losses  # (b, m, t)
        if sharing == "shared":
            gain = self.scores.pooled(gain)[..., None]
        return clearly_better(gain, errors)

    def _alone(self) -> Choice:
        """For every target what it would get if it were the only one."""
        choice = self._careful("target")
        if self.mean:
            better = self._beats_mean(choice.residuals, choice.losses)
            choice = choice.where(better, self.best("target", self.among([0])))
        return choice

    def _beats_mean(self, residuals: Tensor, losses: Tensor) -> Tensor:
        """(b, t) bool: targets predicted better than by the mean, and than by their variance."""
        mean = self.best("target", self.among([0]))
        better = clearly_better(mean.losses - losses, _BETTER_THAN_MEAN)
        if self.scores.center and not self.scores.by_rank and self.scores.importance is None:
            better &= losses.mean(1) < 1
        return better

    def _crossed(self, among: Tensor) -> Tensor:
        """(b, m, t) leave-one-out residuals of one half under the ridges of the other half.

        With many subsets this is as honest as refitting, and costs no factorisation.
        """
        crossed = torch.empty_like(self.scores.values)
        for half in (0, 1):
            elsewhere = self.best("target", among, half=1 - half)
            crossed[:, half::2] = elsewhere.residuals[:, half::2]
        return crossed


def clearly_better(gain: Tensor, errors: float = _CLEAR) -> Tensor:
    """(b, ...) bool: whether mean gains over subsets (b, m, ...) exceed some standard errors."""
    return gain.mean(1) > errors * gain.std(1) / gain.shape[1] ** 0.5


def validation_residuals(
    kernels: Sequence[Kernel | str],
    tables: Sequence[Masks],
    scores: Scores,
    sharing: tuple[Sharing, ...],
) -> list[Tensor]:
    """5-fold residuals (b, m, t) of each way of sharing, everything chosen anew in each fold.

    Leave-one-out residuals would flatter the freer ways: they chose their ridges, and components
    their axes, with the subset at hand. Folds of one size are fitted together, as tables.

    Args:
        kernels: One of each table; a name where none predicts it, and any answer will do.
        tables: The subsets.
        scores: Their scores.
        sharing: The ways of sharing.
    """
    b, m, t = scores.values.shape
    judged = [torch.zeros_like(scores.values) for _ in sharing]
    gram = scores.values.new_zeros(b, m, m)
    for i, kernel in enumerate(kernels):
        if isinstance(kernel, Kernel):
            gram[i] = kernel.gram(tables[i])
    folds = folds_of(m, gram.device)
    sizes = folds.bincount()
    for size in sizes.unique().tolist():
        numbers = (sizes == size).nonzero()  # (F, 1)
        held = (folds == numbers).nonzero()[:, 1].reshape(-1, size)  # (F, size)
        rest = (folds != numbers).nonzero()[:, 1].reshape(len(held), -1)  # (F, m')
        outcome = scores.rows(rest)  # of b F tables
        known = gram[:, rest[:, :, None], rest[:, None]].flatten(0, 1)  # (b F, m', m')
        across = gram[:, held[:, :, None], rest[:, None]].flatten(0, 1)  # (b F, size, m')
        factor = SpectralRidge(
            known[:, None], center=outcome.center, weights=outcome.weights[:, None]
        )
        trials = judged_factor([], [], outcome, factor, components=True)
        contest = Contest([MeanTrial(outcome, components=True).judged, trials], outcome)
        for way, errors in zip(sharing, judged, strict=True):
            predicted = predictions(contest.best(way), across)
            errors[:, held] = scores.values[:, held] - predicted.reshape(b, *held.shape, t)
    return judged


def predictions(choice: Choice, across: Tensor) -> Tensor:
    """(b, l, t) of other subsets by a choice of means and one kernel, ``across`` (b, l, m) it."""
    scores = choice.contest.scores
    b, q = choice.candidate.shape
    latent = across.new_zeros(b, across.shape[1], q)
    for trial, columns, ridges, used in choice.groups():
        solution = trial.solve(ridges, columns, components=choice.components)
        found = solution.constant[:, None]
        if solution.dual is not None:
            found = found + across @ solution.dual
        latent[..., columns] = torch.where(used[:, None], found, latent[..., columns])
    return scores.offset[:, None] + latent @ scores.rotation.mT if choice.components else latent


@dataclass(frozen=True, eq=False)
class Model:
    """A choice for one table, solved: coefficients of standardised scores.

    Attributes:
        kernel_terms: Kernel expansions. Columns that a mean or linear weights predict have
            coefficients of zero there, and the uncertainty of the kernel.
        linear_terms: Linear expansions.
        rotation: (t, q) from latent columns to targets, or None for the identity.
        intercept: (t,).
        loo_residuals: (m, t) leave-one-out residuals.
        fit_residuals: (m, t) residuals of the fit itself.
        ridge_variance: (t,) variance that the ridge stands for, at a subset of weight 1.
        sharing: What has a choice of its own.
    """

    kernel_terms: tuple[KernelTerm, ...]
    linear_terms: tuple[LinearTerm, ...]
    rotation: Tensor | None
    intercept: Tensor
    loo_residuals: Tensor
    fit_residuals: Tensor
    ridge_variance: Tensor
    sharing: Sharing

    __repr__ = brief

    @property
    def num_latent(self) -> int:
        """Number of latent columns q."""
        return len(self.intercept) if self.rotation is None else self.rotation.shape[1]

    def without_factors(self) -> "Model":
        """The same model, whose kernels are factored anew when they are asked for intervals."""
        terms = tuple(replace(term, factor=None) for term in self.kernel_terms)
        return replace(self, kernel_terms=terms)

    def select(self, targets: Tensor) -> "Model":
        """The same model for the targets with these numbers."""
        if len(targets) == len(self.intercept):
            return self
        per_target = {
            name: getattr(self, name)[..., targets]
            for name in ("intercept", "loo_residuals", "fit_residuals", "ridge_variance")
        }
        if self.rotation is not None:
            return replace(self, rotation=self.rotation[targets], **per_target)
        place = torch.full_like(self.intercept, -1, dtype=torch.int64)
        place[targets] = torch.arange(len(targets), device=targets.device)
        return replace(
            self,
            kernel_terms=_with_columns(term.select(place) for term in self.kernel_terms),
            linear_terms=_with_columns(term.select(place) for term in self.linear_terms),
            **per_target,
        )


def _with_columns(terms: Iterable[Term]) -> tuple[Term, ...]:
    return tuple(term for term in terms if len(term.columns))


def solve(
    choice: Choice, sharing: Sequence[Sharing], substitute: KernelTrial, grid: Tensor
) -> list[Model]:
    """The models of a choice, one of each table.

    Columns that no kernel predicts have the uncertainty of ``substitute``: the posterior of a
    kernel as wide as the data allow, around the mean or the linear weights.

    Args:
        choice: What was chosen.
        sharing: What has a choice of its own, of each table.
        substitute: A kernel trial of the same scores.
        grid: (b, R) the ridges it was judged at.
    """
    scores, of_components = choice.contest.scores, choice.components
    (b, m, _), q = scores.values.shape, choice.candidate.shape[1]
    constant, variance = scores.values.new_zeros(2, b, q)
    residuals = scores.values.new_zeros(b, m, q)
    kernel_terms: list[list[KernelTerm]] = [[] for _ in range(b)]
    linear_terms: list[list[LinearTerm]] = [[] for _ in range(b)]
    together = torch.tensor([way == "shared" for way in sharing], device=constant.device)
    noise = choice.contest.most_noise(choice, together)
    for trial, columns, ridges, used in choice.groups():
        solution = trial.solve(ridges, columns, components=of_components)
        parts = (constant, solution.constant), (variance, solution.ridge_variance)
        for whole, part in parts:
            whole[:, columns] = torch.where(used, part, whole[:, columns])
        residuals[..., columns] = torch.where(
            used[:, None], solution.residuals, residuals[..., columns]
        )
        for i in used.any(1).nonzero()[:, 0].tolist():
            its = used[i]
            if solution.weights is not None:
                linear_terms[i].append(LinearTerm(columns[its], solution.weights[i][:, its]))
            if solution.dual is not None and solution.signal is not None:
                assert isinstance(trial, KernelTrial)
                answer = solution.dual[i][:, its], ridges[i, its], solution.signal[i, its]
                term = trial.term(i, columns[its], *answer)
            else:
                term = substitute.uncertainty(i, grid[i], columns[its], components=of_components)
            kernel_terms[i].append(
                replace(term, most_noise=None if noise is None else noise[i, columns[its]])
            )
    rotation = scores.rotation if of_components else None
    if rotation is not None:
        constant = scores.offset + (rotation @ constant[..., None])[..., 0]
        residuals = residuals @ rotation.mT
        variance = (rotation.square() @ variance[..., None])[..., 0]
    return [
        Model(
            tuple(kernel_terms[i]),
            tuple(linear_terms[i]),
            None if rotation is None else rotation[i],
            constant[i],
            choice.residuals[i],
            residuals[i],
            variance[i],
            sharing[i],
        )
        for i in range(b)
    ]
