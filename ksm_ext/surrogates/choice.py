"""Which trial, at which ridge, predicts which target: one for all targets, or one for each.

A choice made for all targets together sees the most data, and one made for a single target knows it
best. Freer ways of sharing are judged on subsets that had no part in their choices, and a target
leaves the common choice only where it is clearly better served alone: no target is predicted worse
because others are fitted with it.

Shapes: m subsets, t targets, q latent columns (targets, or principal components of the targets);
scores standardised, float64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ksm_ext.surrogates.judgement import Scores, folds_of
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm
from ksm_ext.surrogates.trials import KernelTrial, MeanTrial, Trial

Sharing = Literal["shared", "target", "component"]
"""Whether all targets share one kernel and ridge, or each has its own, or each component has."""

Term = TypeVar("Term", KernelTerm, LinearTerm)

_CLEAR = 2.0
"""Standard errors by which a candidate must win to replace the default or the common choice.

It is the best of many, so some win by chance: one in forty by so much.
"""

_BETTER_THAN_MEAN = 0.5
"""Standard errors by which a predictor must beat the mean.

Few, since real effects may be small; above 0, since the predictor's ridge was chosen to win, and
the mean has nothing to choose.
"""


@dataclass(frozen=True, eq=False)
class Choice:
    """The trial and the ridge of every latent column.

    Attributes:
        sharing: What has a choice of its own.
        trials: What was chosen from.
        trial: (q,) int64 index of the trial.
        ridge: (q,) int64 index into the trial's ridges.
    """

    sharing: Sharing
    trials: list[Trial]
    trial: Tensor
    ridge: Tensor

    @property
    def components(self) -> bool:
        """Whether latent columns are components of the targets."""
        return self.sharing == "component"

    def groups(self) -> Iterator[tuple[Trial, Tensor, Tensor]]:
        """Each trial in use, its ridges (q_g,) and latent columns (q_g,)."""
        for index in torch.unique(self.trial).tolist():
            columns = (self.trial == index).nonzero()[:, 0]
            trial = self.trials[index]
            yield trial, trial.judgement.ridges[self.ridge[columns]], columns

    def residuals(self, scores: Scores) -> Tensor:
        """(m, t) leave-one-out residuals."""
        latent = scores.values.new_zeros(len(scores.values), len(self.trial))
        for trial, ridges, columns in self.groups():
            latent[:, columns] = trial.residuals(ridges, columns, components=self.components)
        return latent @ scores.rotation.T if self.components else latent

    def where(self, chosen: Tensor, other: "Choice") -> "Choice":
        """This choice for the columns of ``chosen`` (q,) bool, and ``other`` for the rest."""
        return Choice(
            "shared" if self.sharing == other.sharing == "shared" else "target",
            self.trials,
            torch.where(chosen, self.trial, other.trial),
            torch.where(chosen, self.ridge, other.ridge),
        )


@dataclass(frozen=True, eq=False)
class Contest:
    """Trials of the same scores, to choose from.

    Attributes:
        trials: The trials.
        scores: What they predict.
        mean: The index of the mean among them, if it is there.
        preferred: Indices of trials that are kept unless another is clearly better.
    """

    trials: list[Trial]
    scores: Scores
    mean: frozenset[int] = frozenset()
    preferred: frozenset[int] = frozenset()

    def losses(self, choice: Choice) -> Tensor:
        """(m, t) loss of each subset for each target."""
        return self.scores.losses(choice.residuals(self.scores))

    def best(
        self, sharing: Sharing, among: frozenset[int] | None = None, *, half: int | None = None
    ) -> Choice:
        """The best trial and ridge of every latent column under one way of sharing.

        Args:
            sharing: What has a choice of its own.
            among: Indices of the trials to choose from; all by default.
            half: The half of the subsets (0 or 1) on which ridges per target are chosen; all
                subsets by default.
        """
        like = self.scores.rotation[0] if sharing == "component" else self.scores.values[0]
        least = torch.full_like(like, float("inf"))  # (q,)
        trial_index = torch.zeros_like(like, dtype=torch.int64)
        ridge_index = torch.zeros_like(trial_index)
        for index, trial in enumerate(self.trials):
            if among is not None and index not in among:
                continue
            judgement = trial.judgement
            by_half = judgement.target_losses  # (R, 2, t)
            losses: Tensor | None = by_half.mean(1) if half is None else by_half[:, half]
            if sharing == "component":
                losses = judgement.component_losses
            elif sharing == "shared":
                losses = judgement.losses[:, None].expand(-1, len(like))
            if losses is None:
                continue
            value, at = losses.min(0)
            better = value < least
            least = torch.where(better, value, least)
            trial_index = torch.where(better, index, trial_index)
            ridge_index = torch.where(better, at, ridge_index)
        return Choice(sharing, self.trials, trial_index, ridge_index)

    def choose(self, masks: Masks, sharing: tuple[Sharing, ...]) -> list[tuple[Choice, Tensor]]:
        """Choices with the targets each is for: one for all, or a second for targets that leave it.

        Args:
            masks: The fitted subsets.
            sharing: The ways of sharing to choose from, the strictest first.
        """
        scores = self.scores
        everything = torch.arange(scores.values.shape[1], device=scores.values.device)
        if len(everything) == 1 or sharing[0] == "target":
            return [(replace(self._alone(), sharing=sharing[0]), everything)]
        common = self._common(masks, sharing)
        if len(sharing) == 1:
            return [(common, everything)]  # asked for: one choice for all
        alone = self._alone()
        leaves = clearly_better(self.losses(common) - self.losses(alone))
        if self.mean:
            leaves |= ~self._beats_mean(common, self.best("target", self.mean))
        leaves[scores.variance == 0] = False
        if not bool(leaves.any()):
            return [(common, everything)]
        if not common.components:
            return [(alone.where(leaves, common), everything)]
        return [(common, everything[~leaves]), (alone, everything[leaves])]

    def _common(self, masks: Masks, sharing: tuple[Sharing, ...]) -> Choice:
        """One choice for all targets, unless a freer one predicts subsets it has not seen better.

        The freer ways of sharing keep the kernel of the shared choice: the best of hundreds of
        candidates for a single target would be mostly noise.
        """
        scores, pooled = self.scores, self.scores.varying

        def pooled_losses(choice: Choice) -> Tensor:
            return self.losses(choice)[:, pooled].mean(1)  # (m,)

        choice = self.best("shared")
        for simpler, errors in ((self.preferred, _CLEAR), (self.mean, _BETTER_THAN_MEAN)):
            if simpler:
                other = self.best("shared", simpler)
                if not bool(clearly_better(pooled_losses(other) - pooled_losses(choice), errors)):
                    choice = other
        kept = int(choice.trial[0])
        kernel = self.trials[kept].kernel
        if len(sharing) == 1 or kernel is None:
            return choice
        among = self.mean | {kept}
        if "component" in sharing:
            judged = _validation_residuals(kernel, masks, scores, sharing)
        else:
            judged = [choice.residuals(scores), self._crossed(among)]
        # no margin here: nothing in these residuals favours the freer ways
        losses = [scores.losses(each)[:, pooled].mean() for each in judged]
        way = int(torch.stack(losses).argmin())
        return choice if way == 0 else self.best(sharing[way], among)

    def _alone(self) -> Choice:
        """For every target what it would get if it were the only one."""
        choice = self.best("target")
        if self.preferred:
            default = self.best("target", self.preferred)
            better = clearly_better(self.losses(default) - self.losses(choice))
            choice = choice.where(better, default)
        if self.mean:
            mean = self.best("target", self.mean)
            choice = choice.where(self._beats_mean(choice, mean), mean)
        return choice

    def _beats_mean(self, choice: Choice, mean: Choice) -> Tensor:
        """(t,) bool: targets predicted better than by the mean, and than by their variance."""
        left_out = choice.residuals(self.scores)
        gain = self.losses(mean) - self.scores.losses(left_out)
        better = clearly_better(gain, _BETTER_THAN_MEAN)
        if self.scores.center and not self.scores.by_rank:
            better &= self.scores.losses(left_out).mean(0) < 1
        return better

    def _crossed(self, among: frozenset[int]) -> Tensor:
        """(m, t) leave-one-out residuals of one half under the ridges per target of the other half.

        With many subsets this is as honest as refitting, and costs no factorisation.
        """
        crossed = torch.empty_like(self.scores.values)
        for half in (0, 1):
            elsewhere = self.best("target", among, half=1 - half)
            crossed[half::2] = elsewhere.residuals(self.scores)[half::2]
        return crossed


def clearly_better(gain: Tensor, errors: float = _CLEAR) -> Tensor:
    """(...) bool: whether mean gains over subsets (m, ...) exceed so many standard errors."""
    return gain.mean(0) > errors * gain.std(0) / len(gain) ** 0.5


def _validation_residuals(
    kernel: Kernel, masks: Masks, scores: Scores, sharing: tuple[Sharing, ...]
) -> list[Tensor]:
    """5-fold residuals (m, t) of each way of sharing, everything chosen anew in each fold.

    Leave-one-out residuals would flatter the freer ways: they chose their ridges, and components
    their axes, with the subset at hand.
    """
    judged = [torch.empty_like(scores.values) for _ in sharing]
    folds = folds_of(len(masks), masks.values.device)
    for fold in range(int(folds.max()) + 1):
        held, rest = folds == fold, folds != fold
        known, outcome = masks[rest], scores[rest]
        trials: list[Trial] = [
            MeanTrial(outcome, components=True),
            KernelTrial(kernel, known, outcome, components=True),
        ]
        contest = Contest(trials, outcome)
        for way, errors in zip(sharing, judged, strict=True):
            model = solve(contest.best(way), outcome)
            errors[held] = scores.values[held] - model.predict(masks[held], known)
    return judged


@dataclass(frozen=True, eq=False)
class Model:
    """A choice, solved: coefficients of standardised scores.

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

    @property
    def num_latent(self) -> int:
        """Number of latent columns q."""
        return len(self.intercept) if self.rotation is None else self.rotation.shape[1]

    def predict(self, query: Masks, fitted: Masks) -> Tensor:
        """(l, t) predictions of subsets ``query`` (l, n), from the ``fitted`` ones (m, n)."""
        latent = self.intercept.new_zeros(len(query), self.num_latent)
        for term in self.kernel_terms:
            if bool(term.dual.any()):
                latent[:, term.columns] += term.kernel.matmul(query, fitted, term.dual)
        for linear in self.linear_terms:
            latent[:, linear.columns] += query.floats @ linear.weights
        return self.intercept + (latent if self.rotation is None else latent @ self.rotation.T)

    def without_factors(self) -> "Model":
        """The same model, whose kernels are factored anew when they are asked for intervals."""
        terms = tuple(replace(term, factor=None) for term in self.kernel_terms)
        return replace(self, kernel_terms=terms)

    def select(self, targets: Tensor) -> "Model":
        """The same model for the targets with these numbers."""
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


def solve(choice: Choice, scores: Scores, substitute: KernelTrial | None = None) -> Model:
    """The model of a choice.

    Columns that no kernel predicts have the uncertainty of ``substitute``: the posterior of a
    kernel as wide as the data allow, around the mean or the linear weights.
    """
    m, q = len(scores.values), len(choice.trial)
    constant, variance = scores.values.new_zeros(2, q)
    fit_residuals = scores.values.new_zeros(m, q)
    kernel_terms, linear_terms = [], []
    for trial, ridges, columns in choice.groups():
        solution = trial.solve(ridges, columns, components=choice.components)
        constant[columns] = solution.constant
        variance[columns] = solution.ridge_variance
        fit_residuals[:, columns] = solution.residuals
        if solution.linear_term is not None:
            linear_terms.append(solution.linear_term)
        if solution.kernel_term is not None:
            kernel_terms.append(solution.kernel_term)
        elif substitute is not None:
            kernel_terms.append(substitute.uncertainty(columns, components=choice.components))
    rotation = scores.rotation if choice.components else None
    return Model(
        tuple(kernel_terms),
        tuple(linear_terms),
        rotation,
        constant if rotation is None else scores.offset + rotation @ constant,
        choice.residuals(scores),
        fit_residuals if rotation is None else fit_residuals @ rotation.T,
        variance if rotation is None else rotation.square() @ variance,
        choice.sharing,
    )
