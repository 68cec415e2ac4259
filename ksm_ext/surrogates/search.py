"""One complete table of scores: candidates, a screening of many, the choice, and its models.

Every kernel is factored once and judged at every ridge (:mod:`.trials`); with many subsets, kernels
are first compared on a sample of them. The choice may be made once for all targets, per target, or
per principal component of the targets (:mod:`.choice`).

Shapes: m subsets, t targets; scores standardised, float64.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.checks import message
from ksm_ext.surrogates.candidates import Candidate
from ksm_ext.surrogates.choice import Choice, Contest, Model, Sharing, clearly_better, solve
from ksm_ext.surrogates.judgement import Scores, folds_of
from ksm_ext.surrogates.kernels import Exponential, Kernel, KernelChoice, Linear, as_kernel
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.trials import KernelTrial, KrylovTrial, LinearTrial, MeanTrial, Trial

LINEAR = ("least_squares", "lasso")
MANY_SUBSETS = 768
"""Subsets beyond which kernels are screened, and ways of sharing judged without new factors."""

_SCREEN_ROWS = 512
_SAMPLE_ROWS = 2048  # the same, where what follows is conjugate gradients on everything
_SCREEN_TARGETS = 128
_SCREEN_KEPT = 4  # kernels at most, of which two by their pooled error
_LASSO_TASKS = 256  # coordinate descent costs n^2 per sweep: a candidate of "auto" up to here
_LASSO_PROBE = 32
_SHARED_FROM = 5  # subsets from which folds can judge ways of sharing

Fits = list[tuple[Model, Tensor]]
"""Models, each with the numbers of the targets it is for."""


@dataclass(frozen=True, eq=False)
class Search:
    """What a fit chooses from, and how: the arguments of :func:`ksm_ext.fit_surrogate`.

    Attributes:
        kernel: What was asked for; several as a tuple.
        ridge: (1,) the given ridge, or None to choose it.
        by_rank: Whether the criterion is the rank correlation.
        share_ridge: Whether targets share kernel and ridge.
        center: Whether an intercept is fitted.
        solver: The settings of conjugate gradients, or None to factor Gram matrices.
        progress: Whether to show bars over kernels, and over products of conjugate gradients.
    """

    kernel: KernelChoice
    ridge: Tensor | None
    by_rank: bool
    share_ridge: Literal["auto"] | bool
    center: bool
    solver: ConjugateGradients | None
    progress: bool

    @property
    def removes_mean(self) -> bool:
        """Whether everything fitted has an intercept, which least squares has not."""
        return self.center and "least_squares" not in self._asked

    @property
    def all_is_noise(self) -> bool:
        """Whether the caller fixed the smoothing, so that every residual counts as noise."""
        return self.ridge is not None or self.kernel in LINEAR

    @property
    def _asked(self) -> tuple[Any, ...]:
        """What was asked for, one by one."""
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)

    def part(self, rows: Tensor, columns: Tensor) -> "Search":
        """The search for some of the subsets and targets."""
        return self

    def fit(self, masks: Masks, scores: Scores) -> tuple[Fits, list[Candidate]]:
        """The chosen models, and everything that was tried."""
        kernels, linear = self._candidates(masks)
        sharing = self._ways_of_sharing(masks, scores, kernels)
        limit = _SCREEN_ROWS if self.solver is None else _SAMPLE_ROWS
        sample = random_rows(len(masks), limit, masks.values.device)
        tried: list[Candidate] = []
        if len(kernels) > 2 and len(masks) > MANY_SUBSETS:
            kernels, tried = self._screened(kernels, masks, scores, sample)

        def trial_of(kernel: Kernel) -> KernelTrial:
            if self.solver is None:
                components = "component" in sharing
                return KernelTrial(kernel, masks, scores, ridge=self.ridge, components=components)
            each: dict[str, Any] = {"sample": sample, "per_target": self.share_ridge is False}
            each["progress"] = self.progress
            return KrylovTrial(kernel, masks, scores, self.solver, ridge=self.ridge, **each)

        bar = tqdm(kernels, "kernels", unit="", disable=not self.progress)
        kernel_trials = [trial_of(kernel) for kernel in bar]
        contest = self._contest(kernel_trials, linear, masks, scores, sharing)
        choices = contest.choose(masks, sharing)
        tried += described(contest.trials, len(masks), choices)
        uncertain = kernel_trials or [trial_of(Linear())]
        substitute = next((each for each in uncertain if _is_default(each.kernel)), uncertain[0])
        fits = [
            (solve(choice, scores, substitute).select(targets), targets)
            for choice, targets in choices
        ]
        return fits, tried

    def _candidates(self, masks: Masks) -> tuple[list[Kernel], list[str]]:
        """Kernels with all parameters set, and linear surrogates by name."""
        asked = self._asked
        if self.kernel == "auto":  # the last equals RBF on masks
            asked = ("linear", "anova2", "rbf", "exponential", "laplace")[: 5 - masks.binary]
        linear = [each for each in asked if each in LINEAR]
        rest = [as_kernel(each) for each in asked if each not in LINEAR]
        kernels = [filled for kernel in rest for filled in kernel.grid(masks)]
        if not asked:
            raise ValueError(message("kernel", "at least one kernel", "an empty list", "Name one."))
        if self.solver is not None and "least_squares" in linear:
            remedy = "Use kernel='linear' with a small ridge, or solver='eigh'."
            expected = "a kernel or 'lasso' with conjugate gradients"
            raise ValueError(message("kernel", expected, "'least_squares'", remedy))
        return kernels, linear

    def _ways_of_sharing(
        self, masks: Masks, scores: Scores, kernels: list[Kernel]
    ) -> tuple[Sharing, ...]:
        """The ways to choose from, the strictest first.

        Components are among them where subsets are few enough to fit anew in folds.
        """
        nothing_to_share = self.ridge is not None and len(kernels) == 1
        alone = scores.values.shape[1] == 1
        if not len(scores.varying):
            return ("target",)
        if self.share_ridge is True or alone or not kernels or nothing_to_share:
            return ("shared",)
        if self.share_ridge is False or len(masks) < _SHARED_FROM:
            return ("target",)
        if len(masks) > MANY_SUBSETS or self.solver is not None:
            return ("shared", "target")
        return ("shared", "target", "component")

    def _screened(
        self, kernels: list[Kernel], masks: Masks, scores: Scores, sample: Tensor
    ) -> tuple[list[Kernel], list[Candidate]]:
        """Kernels that are not clearly worse than the best on a sample, and what that tried.

        At most two, and those that a target is clearly better served by. One eigendecomposition
        costs m^3: searching kernels on few subsets and a sample of the targets, and ridges on
        everything, costs one or two of those instead of one per kernel.
        """
        masks = masks[sample]
        judged = scores.targets(scores.spaced_targets(_SCREEN_TARGETS))[sample]
        if not len(judged.varying):
            return kernels, []  # the sample saw nothing happen: judge all on everything
        trials: list[Trial] = [KernelTrial(k, masks, judged, ridge=self.ridge) for k in kernels]
        losses = [each.judgement.subset_losses[each.judgement.losses.argmin()] for each in trials]
        first, second = torch.stack(losses).mean(1).argsort(stable=True)[:2].tolist()
        kept = [first]
        if not bool(clearly_better(losses[second] - losses[first])):
            kept.append(second)
        contest = Contest(trials, judged)
        shared, alone = (contest.best(way) for way in ("shared", "target"))
        gain = contest.losses(shared) - contest.losses(alone)
        wanted = alone.trial[clearly_better(gain)].bincount(minlength=len(kernels))
        wanted[kept] = 0
        more = wanted.argsort(descending=True, stable=True)[: _SCREEN_KEPT - len(kept)].tolist()
        kept += [index for index in more if wanted[index]]
        return [kernels[index] for index in sorted(kept)], described(trials, len(masks), [])

    def _contest(
        self,
        kernel_trials: list[KernelTrial],
        linear: list[str],
        masks: Masks,
        scores: Scores,
        sharing: tuple[Sharing, ...],
    ) -> Contest:
        """Everything to choose from: the mean, kernels, lasso and least squares.

        What was asked for by name is not replaced by the mean. ``"auto"`` prefers the exponential
        kernel: a mixture of all widths, it is the safest extrapolation.
        """
        mean = MeanTrial(scores, components="component" in sharing)
        trials: list[Trial] = [mean, *kernel_trials]
        automatic = self.kernel == "auto"
        if automatic and self.solver is None and _lasso_is_promising(masks, scores, trials):
            linear = ["lasso"]
        folds = folds_of(len(masks), masks.values.device)
        trials += [LinearTrial(label, masks, scores, folds) for label in linear]
        trials = trials[self.all_is_noise :]
        default = (i for i, trial in enumerate(trials) if automatic and _is_default(trial.kernel))
        return Contest(
            trials, scores, frozenset([] if self.all_is_noise else [0]), frozenset(default)
        )


def _is_default(kernel: Kernel | None) -> bool:
    """Whether a kernel is preferred where none is asked for."""
    return isinstance(kernel, Exponential)


def random_rows(count: int, limit: int, device: torch.device) -> Tensor:
    """At most ``limit`` of ``count`` rows drawn at random, the same in every run; int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:limit].to(device)


def _lasso_is_promising(masks: Masks, scores: Scores, trials: list[Trial]) -> bool:
    """Whether sparse linear effects beat the kernels on a sample of targets, or clearly on one.

    Lasso costs more than all kernels together, and wins rarely, but then by far.
    """
    if masks.num_tasks > _LASSO_TASKS or len(masks) < 10 or not len(scores.varying):
        return False
    columns = scores.spaced_targets(_LASSO_PROBE)
    probed = replace(scores.targets(columns), by_rank=False)
    lasso = LinearTrial("lasso", masks, probed, folds_of(len(masks), columns.device))
    everything = torch.arange(len(columns), device=columns.device)
    left_out = lasso.residuals(lasso.judgement.ridges, everything, components=False)
    losses = probed.losses(left_out)
    contest = Contest(trials, scores)
    together, alone = (
        probed.losses(contest.best(way).residuals(scores)[:, columns])
        for way in ("shared", "target")
    )
    return bool(losses.mean() < together.mean()) or bool(clearly_better(alone - losses).any())


def described(
    trials: list[Trial], num_subsets: int, choices: list[tuple[Choice, Tensor]]
) -> list[Candidate]:
    """A row for every trial and ridge, with the latent columns that chose it."""
    rows = []
    for index, trial in enumerate(trials):
        found = trial.judgement
        each = zip(found.ridges.tolist(), found.errors.tolist(), found.ranks.tolist(), strict=True)
        for at, (ridge, error, rank) in enumerate(each):
            chosen = 0
            for choice, targets in choices:
                taken = (choice.trial == index) & (choice.ridge == at)
                chosen += int((taken if choice.components else taken[targets]).sum())
            rows.append(Candidate(trial.label, ridge, error, rank, num_subsets, chosen))
    return rows
