"""Which trial, at which ridge, predicts which target: for all alike, or for some on their own.

A choice made for all targets together sees the most data, and one made for a single target knows it
best. The freer ways are judged on subsets that had no part in their choices, and a target leaves
the common choice only where it is clearly better served alone: no target pays for its company.

Shapes: m subsets, t targets, q latent columns (targets, or principal components of the targets);
scores standardised, float64.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm
from ksm_ext.surrogates.trials import (
    KernelTrial,
    KrylovTrial,
    LinearTrial,
    MeanTrial,
    Scores,
    Trial,
)

Sharing = Literal["shared", "target", "component"]
Term = TypeVar("Term", KernelTerm, LinearTerm)

CROSSED_FROM = 768
"""Subsets beyond which ways of sharing are judged on halves: nothing is factored for it."""

_CLEAR = 2.0  # standard errors by which a choice must be better to be called clearly better
_WORTH = 0.5  # and those by which a predictor must beat the mean, which has nothing to tune


@dataclass(frozen=True, eq=False)
class Choice:
    """The trial and the ridge of every latent column.

    Attributes:
        sharing: What has a choice of its own.
        trial: (q,) int64 index of the trial.
        ridge: (q,) int64 index into the trial's ridges.
    """

    sharing: Sharing
    trial: Tensor
    ridge: Tensor

    def groups(self, trials: list[Trial]) -> list[tuple[Trial, Tensor, Tensor]]:
        """(trial, latent columns, their ridges) for each trial in use."""
        groups = []
        for index in torch.unique(self.trial).tolist():
            columns = (self.trial == index).nonzero()[:, 0]
            ridges = trials[index].judgement.ridges[self.ridge[columns]]
            groups.append((trials[index], columns, ridges))
        return groups

    def where(self, chosen: Tensor, other: "Choice") -> "Choice":
        """This choice for the columns of ``chosen`` (q,) bool, and ``other`` for the rest."""
        return Choice(
            "shared" if self.sharing == other.sharing == "shared" else "target",
            torch.where(chosen, self.trial, other.trial),
            torch.where(chosen, self.ridge, other.ridge),
        )


def residuals(choice: Choice, trials: list[Trial], scores: Scores) -> Tensor:
    """(m, t) leave-one-out residuals of a choice."""
    components = choice.sharing == "component"
    latent = scores.values.new_zeros(len(scores.values), len(choice.trial))
    for trial, columns, ridges in choice.groups(trials):
        latent[:, columns] = trial.residuals(ridges, columns, components=components)
    return latent @ scores.rotation.T if components else latent


def choose(
    trials: list[Trial],
    masks: Masks,
    scores: Scores,
    sharing: tuple[Sharing, ...],
    preferred: set[int],
) -> list[tuple[Choice, Tensor]]:
    """Choices with the targets that each is made for: one, or a second for targets released.

    Args:
        trials: What to choose from.
        masks: The fitted subsets.
        scores: The standardised scores.
        sharing: The ways of sharing to choose from, the strictest first.
        preferred: Trials that are kept unless another is clearly better.
    """
    everything = torch.arange(scores.values.shape[1], device=scores.values.device)
    if len(everything) == 1 or sharing[0] == "target":
        alone = _alone(trials, scores, preferred)
        return [(replace(alone, sharing=sharing[0]), everything)]
    common = _common(trials, masks, scores, sharing, preferred)
    if len(sharing) == 1:
        return [(common, everything)]  # asked for: one choice for all
    alone = _alone(trials, scores, preferred)
    mean = _means(trials)
    gain = _charges(common, trials, scores) - _charges(alone, trials, scores)
    leaves = _exceeds(gain, _CLEAR)
    if mean:
        leaves |= ~_beats_mean(common, best(trials, scores, "target", mean), trials, scores)
    leaves[scores.variance == 0] = False
    if not bool(leaves.any()):
        return [(common, everything)]
    if common.sharing != "component":
        return [(alone.where(leaves, common), everything)]
    return [(common, everything[~leaves]), (alone, everything[leaves])]


def _common(
    trials: list[Trial],
    masks: Masks,
    scores: Scores,
    sharing: tuple[Sharing, ...],
    preferred: set[int],
) -> Choice:
    """One choice for all targets, unless a freer one predicts subsets it has not seen better.

    The freer ways of sharing keep the kernel of the shared choice: the best of hundreds of
    candidates for a single target would be mostly noise.
    """
    pooled = scores.varying

    def charged(choice: Choice) -> Tensor:
        return scores.charges(residuals(choice, trials, scores))[:, pooled].mean(1)

    choice = best(trials, scores, "shared")
    if preferred:
        default = best(trials, scores, "shared", preferred)
        if not bool(_exceeds(charged(default) - charged(choice), _CLEAR)):
            choice = default
    mean = _means(trials)
    if mean:
        least = best(trials, scores, "shared", mean)
        if not bool(_exceeds(charged(least) - charged(choice), _WORTH)):
            choice = least
    kept = int(choice.trial[0])
    trial = trials[kept]
    if len(sharing) == 1 or not isinstance(trial, KernelTrial):
        return choice
    among = {kept} | mean
    if len(masks) > CROSSED_FROM or isinstance(trial, KrylovTrial):
        judged = [residuals(choice, trials, scores), _crossed(trials, scores, among)]
    else:
        judged = _validation_residuals(trial.kernel, masks, scores, sharing)
    # no margin here: nothing in these residuals favours the freer ways
    losses = [scores.charges(each)[:, pooled].mean() for each in judged]
    way = int(torch.stack(losses).argmin())
    return choice if way == 0 else best(trials, scores, sharing[way], among)


def _alone(trials: list[Trial], scores: Scores, preferred: set[int]) -> Choice:
    """For every target what it would get if it were the only one."""
    choice = best(trials, scores, "target")
    if preferred:
        default = best(trials, scores, "target", preferred)
        gain = _charges(default, trials, scores) - _charges(choice, trials, scores)
        choice = choice.where(_exceeds(gain, _CLEAR), default)
    mean = _means(trials)
    if mean:
        least = best(trials, scores, "target", mean)
        choice = choice.where(_beats_mean(choice, least, trials, scores), least)
    return choice


def _beats_mean(choice: Choice, mean: Choice, trials: list[Trial], scores: Scores) -> Tensor:
    """(t,) whether targets are predicted at all: clearly, and better than by their variance."""
    left_out = residuals(choice, trials, scores)
    gain = _charges(mean, trials, scores) - scores.charges(left_out)
    better = _exceeds(gain, _WORTH)
    if scores.center and not scores.by_rank:
        better &= scores.charges(left_out, by_rank=False).mean(0) < 1
    return better


def _charges(choice: Choice, trials: list[Trial], scores: Scores) -> Tensor:
    return scores.charges(residuals(choice, trials, scores))


def _means(trials: list[Trial]) -> set[int]:
    return {index for index, trial in enumerate(trials) if isinstance(trial, MeanTrial)}


def _exceeds(gain: Tensor, errors: float) -> Tensor:
    """Whether mean gains over subsets (m, ...) exceed some of their standard errors."""
    return gain.mean(0) > errors * gain.std(0) / len(gain) ** 0.5


def clearly_better(gain: Tensor) -> Tensor:
    """Whether a mean gain over subsets (m, ...) exceeds twice its standard error."""
    return _exceeds(gain, _CLEAR)


def _crossed(trials: list[Trial], scores: Scores, among: set[int]) -> Tensor:
    """(m, t) leave-one-out residuals of one half under the ridges per target of the other half.

    With many subsets this is as honest as refitting, and costs no factorisation.
    """
    crossed = torch.empty_like(scores.values)
    for half in (0, 1):
        elsewhere = best(trials, scores, "target", among, half=1 - half)
        crossed[half::2] = residuals(elsewhere, trials, scores)[half::2]
    return crossed


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
        components = "component" in sharing
        trials: list[Trial] = [
            MeanTrial(outcome, components=components),
            KernelTrial(kernel, known, outcome, components=components),
        ]
        for way, errors in zip(sharing, judged, strict=True):
            model = assemble(best(trials, outcome, way), trials, outcome)
            errors[held] = scores.values[held] - model.predict(masks[held], known)
    return judged


def best(
    trials: list[Trial],
    scores: Scores,
    sharing: Sharing,
    among: set[int] | None = None,
    *,
    half: int | None = None,
) -> Choice:
    """The best trial and ridge of every latent column under one way of sharing.

    ``among`` restricts the trials; ``half`` has ridges per target chosen on that half of the
    subsets.
    """
    device = scores.values.device
    q = scores.rotation.shape[1] if sharing == "component" else scores.values.shape[1]
    least = torch.full((q,), float("inf"), dtype=torch.float64, device=device)
    trial_index = torch.zeros(q, dtype=torch.int64, device=device)
    ridge_index = torch.zeros(q, dtype=torch.int64, device=device)
    for index, trial in enumerate(trials):
        judgement = trial.judgement
        if among is not None and index not in among:
            continue
        by_half = judgement.target_losses  # (R, 2, t)
        losses: Tensor | None = by_half.mean(1) if half is None else by_half[:, half]
        if sharing == "component":
            losses = judgement.component_losses
        elif sharing == "shared":
            losses = judgement.losses[:, None].expand(-1, q)
        if losses is None:  # lasso is not linear in the scores: it has no components
            continue
        value, at = losses.min(0)
        better = value < least
        least = torch.where(better, value, least)
        trial_index = torch.where(better, index, trial_index)
        ridge_index = torch.where(better, at, ridge_index)
    return Choice(sharing, trial_index, ridge_index)


def folds_of(num_subsets: int, device: torch.device) -> Tensor:
    """(m,) int64 fold of each subset, five of equal size, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randperm(num_subsets, generator=generator) % min(5, num_subsets)).to(device)


# -- what a choice amounts to -------------------------------------------------------------------


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
        residuals: (m, t) of the fit itself.
        ridge_variance: (t,) variance that the ridge stands for, at a subset of weight 1.
        sharing: What has a choice of its own.
    """

    kernel_terms: tuple[KernelTerm, ...]
    linear_terms: tuple[LinearTerm, ...]
    rotation: Tensor | None
    intercept: Tensor
    loo_residuals: Tensor
    residuals: Tensor
    ridge_variance: Tensor
    sharing: str

    @property
    def num_latent(self) -> int:
        """Number of latent columns q."""
        return len(self.intercept) if self.rotation is None else self.rotation.shape[1]

    def predict(self, query: Masks, fitted: Masks) -> Tensor:
        """(l, t) of subsets, from the fitted ones."""
        latent = self.intercept.new_zeros(len(query), self.num_latent)
        for term in self.kernel_terms:
            if bool(term.dual.any()):
                latent[:, term.columns] += term.kernel.matmul(query, fitted, term.dual)
        for linear in self.linear_terms:
            latent[:, linear.columns] += query.floats @ linear.weights
        return self.intercept + (latent if self.rotation is None else latent @ self.rotation.T)

    def select(self, targets: Tensor) -> "Model":
        """The same model of some targets."""
        per_target = {
            name: getattr(self, name)[..., targets]
            for name in ("intercept", "loo_residuals", "residuals", "ridge_variance")
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


def assemble(
    choice: Choice, trials: list[Trial], scores: Scores, companion: KernelTrial | None = None
) -> Model:
    """Solve for what was chosen.

    ``companion`` lends its uncertainty to columns that no kernel predicts: the posterior of a
    kernel as wide as the data allow, around the mean or the linear weights.
    """
    components = choice.sharing == "component"
    latent_scores = scores.components if components else scores.values - scores.offset
    offset = torch.zeros_like(latent_scores[0])  # (q,)
    latent_residuals = latent_scores.clone()
    variance = torch.zeros_like(offset)
    intercept = scores.offset.clone()
    kernel_terms: list[KernelTerm] = []
    linear_terms = []
    for trial, columns, ridges in choice.groups(trials):
        solved = isinstance(trial, KernelTrial)
        if isinstance(trial, LinearTrial):
            linear_terms.append(LinearTerm(columns, trial.weights[:, columns]))
            intercept[columns] = trial.offset[columns]
            latent_residuals[:, columns] = trial.fit_residuals(columns)
        if not solved:
            left_out = trial.residuals(ridges, columns, components=components)
            variance[columns] = left_out.square().mean(0)
            if companion is None:
                continue
            ridges = companion.widest_ridge().expand(len(columns))
            trial = companion
        assert isinstance(trial, KernelTrial)
        rotated = trial.rotated(columns, components=components)
        signal = trial.factor.signal_variance(rotated, ridges)
        dual = latent_scores.new_zeros(len(latent_scores), len(columns))
        if solved:
            dual = trial.factor.dual(rotated, ridges)
            if scores.center:
                offset[columns] = trial.factor.offset(dual)
            latent_residuals[:, columns] = ridges / scores.weights[:, None] * dual
            variance[columns] = ridges * signal
        # a Krylov space has grown with the search, and would answer otherwise than a new one
        factor = trial.factor if isinstance(trial.factor, SpectralRidge) else None
        kernel_terms.append(KernelTerm(trial.kernel, columns, dual, ridges, signal, factor=factor))
    rotation = scores.rotation if components else None
    intercept += offset if rotation is None else rotation @ offset
    return Model(
        tuple(kernel_terms),
        tuple(linear_terms),
        rotation,
        intercept,
        residuals(choice, trials, scores),
        latent_residuals if rotation is None else latent_residuals @ rotation.T,
        variance if rotation is None else rotation.square() @ variance,
        choice.sharing,
    )
