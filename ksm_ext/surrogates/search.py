"""Complete tables of scores: candidates, a screening of many, the choice, and its models.

Every kernel is factored once and judged at every ridge (:mod:`.trials`); with many subsets, kernels
are first compared on a sample of them. The choice may be made once for all targets, per target, or
per principal component of the targets (:mod:`.choice`).

Tables of one shape are searched together, each for itself. A kernel joins the search of ``"auto"``
by its name in :meth:`Search._candidates`, or as one more kernel of every table there.

Shapes: b tables, m subsets, t targets; scores standardised, float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.checks import brief, message
from ksm_ext.surrogates.candidates import Tried
from ksm_ext.surrogates.choice import Chosen, Contest, Model, Sharing, clearly_better, solve
from ksm_ext.surrogates.judgement import Scores, folds_of, near_full
from ksm_ext.surrogates.kernels import (
    Exponential,
    Kernel,
    KernelChoice,
    Linear,
    Size,
    Sum,
    Warped,
    as_kernel,
)
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.likelihood import learnt_kernels, sees_sizes
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.options import Criterion
from ksm_ext.surrogates.trials import (
    Judged,
    KernelTrial,
    KrylovTrial,
    LinearTrial,
    MeanTrial,
    Trial,
    judged_kernels,
)
from ksm_ext.surrogates.warping import is_warped, with_learnt

LINEAR = ("least_squares", "lasso")
ARD = "ard"
"""Kernels that are learnt, by name; see :func:`.likelihood.learnt_kernels`."""

MANY_SUBSETS = 768
"""Subsets beyond which kernels are screened, and ways of sharing judged without new factors."""

_ROUNDS = (192, 192, 8), (MANY_SUBSETS, 512, 2)
"""Rounds of screening: subsets from which on there is one, how many it looks at, kernels it keeps
at most, beside those that single targets want.
"""

_SAMPLE_ROWS = 2048  # the same, where what follows is conjugate gradients on everything
_SCREEN_TARGETS = 128
_WANTED = 2  # kernels at most that single targets want
_LASSO_TASKS = 256  # coordinate descent costs n^2 per sweep: a candidate of "auto" up to here
_LASSO_PROBE = 32
_LASSO_PROBED_TO = 2e-2  # of the largest weight
_LASSO_SUBSETS = 20_000  # its path holds 20 residuals of each target that is probed
_SHARED_FROM = 5  # subsets from which folds can judge ways of sharing
_FACTORED_AGAIN = 1024
"""Subsets up to which kernels are factored again where rank correlations are asked for.

Sorting what every ridge leaves out takes longer than that.
"""

Fits = list[tuple[Model, Tensor]]
"""Models, each with the numbers of the targets it is for."""


@dataclass(frozen=True, eq=False)
class Search:
    """What a fit chooses from, and how: the arguments of :func:`ksm_ext.fit_surrogate`.

    Attributes:
        kernel: What was asked for; several as a tuple.
        ridge: (1,) the given ridge, or None to choose it.
        criterion: What leave-one-out residuals are judged by.
        share_ridge: Whether targets share kernel and ridge.
        center: Whether an intercept is fitted.
        solver: The settings of conjugate gradients, or None to factor Gram matrices.
        progress: Whether to show bars over kernels, and over products of conjugate gradients.
    """

    kernel: KernelChoice
    ridge: Tensor | None
    criterion: Criterion
    share_ridge: Literal["auto"] | bool
    center: bool
    solver: ConjugateGradients | None
    progress: bool

    __repr__ = brief

    @property
    def by_rank(self) -> bool:
        """Whether the criterion is the rank correlation."""
        return self.criterion == "rank"

    @property
    def removes_mean(self) -> bool:
        """Whether everything fitted has an intercept, which least squares has not."""
        return self.center and "least_squares" not in self.asked

    @property
    def all_is_noise(self) -> bool:
        """Whether the caller fixed the smoothing, so that every residual counts as noise."""
        return self.ridge is not None or all(each in LINEAR for each in self.asked)

    @property
    def asked(self) -> tuple[Any, ...]:
        """What was asked for, one by one."""
        return self.kernel if isinstance(self.kernel, tuple) else (self.kernel,)

    def part(self, rows: Tensor, columns: Tensor) -> "Search":
        """The search for some of the subsets and targets."""
        return self

    def of_tasks(self, kept: Tensor) -> "Search":
        """The search for tasks where ``kept`` (n,) bool: kernels that know tasks lose the rest."""
        kernels = [each.of_tasks(kept) if isinstance(each, Kernel) else each for each in self.asked]
        return replace(
            self, kernel=tuple(kernels) if isinstance(self.kernel, tuple) else kernels[0]
        )

    def fit(self, tables: Sequence[Masks], scores: Scores) -> list[tuple[Fits, list[Tried]]]:
        """The chosen models of every table, and everything that was tried.

        Args:
            tables: Subsets, of as many rows and columns in each table: one, or several that are
                small enough to be judged whole, whose same targets vary, and of whose kernels none
                is learnt.
            scores: Their scores.
        """
        if self.criterion == "attribution":
            importance = [near_full(masks.sizes, masks.num_tasks) for masks in tables]
            scores = replace(scores, importance=torch.stack(importance))
        grids = {i: self._candidates(masks) for i, masks in {id(x): x for x in tables}.items()}
        kernels, linear = [grids[id(masks)][0] for masks in tables], grids[id(tables[0])][1]
        if len(tables) == 1:  # kernels are learnt, and weights searched, one table at a time
            likely = self.kernel == "auto"
            kernels = [with_learnt(kernels[0], tables[0], scores, likely=likely)]
            if ARD in self.asked:
                kernels[0] += learnt_kernels(tables[0], scores, self.share_ridge)
        sharing = self._ways_of_sharing(scores, kernels[0])
        m = len(tables[0])
        sample = random_rows(m, _SAMPLE_ROWS, scores.values.device)
        tried: list[Tried] = []
        for screened_from, num_rows, most in _ROUNDS:
            few = not tables[0].binary and m <= MANY_SUBSETS  # of weights, learnt for a target each
            if m > screened_from and len(kernels[0]) > most and not few:
                rows = random_rows(m, num_rows, scores.values.device)
                kept, rows_tried = self._screened(kernels[0], tables[0], scores, rows, most)
                kernels, tried = [list(kept)], tried + rows_tried
        judged = self._judged_kernels(kernels, tables, scores, sample, "component" in sharing)
        contest = self._contest(judged, linear, tables, scores, sharing)
        chosen = contest.choose(tables, sharing)
        uncertain = judged or self._judged_kernels(
            [[Linear()] for _ in tables], tables, scores, sample, "component" in sharing
        )
        return [
            (fits, [*tried, *rows])
            for fits, rows in zip(
                _models(chosen, *_substitute(uncertain)),
                described(contest, chosen),
                strict=True,
            )
        ]

    def _judged_kernels(
        self,
        kernels: Sequence[Sequence[Kernel]],
        tables: Sequence[Masks],
        scores: Scores,
        sample: Tensor,
        components: bool,
    ) -> list[Judged]:
        """All kernels, judged on everything."""
        with tqdm(total=len(kernels[0]), desc="kernels", unit="", disable=not self.progress) as bar:
            if self.solver is None:
                ranked = len(tables[0]) > _FACTORED_AGAIN
                options: dict[str, Any] = {"components": components, "ranked": ranked}
                options["ridge"] = self.ridge
                each = judged_kernels(kernels, tables, scores, **options)
            else:
                options = {"sample": sample, "per_target": self.share_ridge is False}
                options |= {"ridge": self.ridge, "progress": self.progress}
                solving = (tables[0], scores, self.solver)
                each = (KrylovTrial(kernel, *solving, **options).judged for kernel in kernels[0])
            judged = []
            for part in each:
                judged.append(part)
                bar.update(len(part.trials))
        return judged

    def _candidates(self, masks: Masks) -> tuple[list[Kernel], list[str]]:
        """Kernels with all parameters set, and linear surrogates by name."""
        asked = self.asked
        if self.kernel == "auto":  # the last two are for weights
            asked = ("linear", "anova2", "rbf", "exponential", "laplace", "warped")
            asked = asked[: 4 if masks.binary else 6]
        linear = [each for each in asked if each in LINEAR]
        rest = [as_kernel(each) for each in asked if each not in (*LINEAR, ARD)]
        kernels = [filled for kernel in rest for filled in kernel.grid(masks)]
        if self.kernel == "auto":
            kernels += by_size(masks)
        if not asked:
            raise ValueError(message("kernel", "at least one kernel", "an empty list", "Name one."))
        if self.solver is not None and "least_squares" in linear:
            remedy = "Use kernel='linear' with a small ridge, or solver='eigh'."
            expected = "a kernel or 'lasso' with conjugate gradients"
            raise ValueError(message("kernel", expected, "'least_squares'", remedy))
        return kernels, linear

    def _ways_of_sharing(self, scores: Scores, kernels: Sequence[Kernel]) -> tuple[Sharing, ...]:
        """The ways to choose from, the strictest first.

        Components are among them where subsets are few enough to fit anew in folds.
        """
        nothing_to_share = self.ridge is not None and len(kernels) == 1
        learnt = any(map(is_warped, kernels))  # for a target each
        _, m, t = scores.values.shape
        if not len(scores.varying):
            return ("target",)
        if self.share_ridge is True or t == 1 or not kernels or nothing_to_share:
            return ("shared",)
        if self.share_ridge is False or m < _SHARED_FROM or learnt:
            return ("target",)
        if m > MANY_SUBSETS or self.solver is not None:
            return ("shared", "target")
        return ("shared", "target", "component")

    def _screened(
        self, kernels: Sequence[Kernel], masks: Masks, scores: Scores, sample: Tensor, most: int
    ) -> tuple[Sequence[Kernel], list[Tried]]:
        """The best kernels on a sample, and what that tried.

        At most ``most`` that are not clearly worse than the best, and those that a target is
        clearly better served by. One eigendecomposition costs m^3: searching kernels on few subsets
        and a sample of the targets, and ridges on everything, costs one or two of those instead of
        one per kernel.
        """
        judged = scores.targets(scores.spaced_targets(_SCREEN_TARGETS)).rows(sample)
        if not len(judged.varying):
            return kernels, []  # the sample saw nothing happen: judge all on everything
        trials = list(judged_kernels([kernels], [masks[sample]], judged, ridge=self.ridge))
        contest = Contest(trials, judged)
        each = contest.subset_losses[0].split(contest.sizes)  # (R, m) of every kernel
        best = torch.stack([losses[losses.mean(1).argmin()] for losses in each])  # (K, m)
        first, *others = best.mean(1).argsort(stable=True)[:most].tolist()
        worse = clearly_better((best[others] - best[first]).T[None])[0]
        kept = [
            first,
            *(index for index, out in zip(others, worse.tolist(), strict=True) if not out),
        ]
        shared, alone = (contest.best(way) for way in ("shared", "target"))
        gain = shared.losses - alone.losses
        wanted = alone.trial[clearly_better(gain)].bincount(minlength=len(kernels))
        wanted[kept] = 0
        more = wanted.argsort(descending=True, stable=True)[:_WANTED].tolist()
        kept += [index for index in more if wanted[index]]
        (rows,) = described(contest, None)
        return [kernels[index] for index in sorted(kept)], rows

    def _contest(
        self,
        judged: list[Judged],
        linear: list[str],
        tables: Sequence[Masks],
        scores: Scores,
        sharing: tuple[Sharing, ...],
    ) -> Contest:
        """Everything to choose from: the mean, kernels, lasso and least squares.

        What was asked for by name is not replaced by the mean. ``"auto"`` prefers the exponential
        kernel, a mixture of all widths and the safest extrapolation; of weights, after warping.
        """
        mean = MeanTrial(scores, components="component" in sharing).judged
        automatic, with_mean = self.kernel == "auto", not self.all_is_noise
        folds = folds_of(len(tables[0]), scores.values.device)
        judged = [mean, *judged]
        judged += [LinearTrial(label, tables, scores, folds).judged for label in linear]
        if automatic and len(tables[0]) <= _LASSO_SUBSETS:
            judged += lasso_where_promising(tables, scores, folds, Contest(judged, scores))
        contest = Contest(judged if with_mean else judged[1:], scores, with_mean)
        if not automatic:
            return contest
        preferred, richer = _preferred(contest.trials)
        return replace(contest, preferred=frozenset(preferred), richer=frozenset(richer))


def _models(chosen: Chosen, substitute: KernelTrial, grid: Tensor) -> list[Fits]:
    """The models of every table, with the targets each is for."""
    by_target: list[Sharing] = ["shared" if shared else "target" for shared in chosen.shared]
    other = chosen.targets_of_components
    everything = torch.arange(other.shape[1], device=other.device)
    models = solve(chosen.by_target, by_target, substitute, grid)
    fits: list[Fits] = [[(model, everything)] for model in models]
    if chosen.by_component is None:
        return fits
    of_components = solve(chosen.by_component, ["component"] * len(fits), substitute, grid)
    for i in other.any(1).nonzero()[:, 0].tolist():
        pairs = (of_components[i], everything[other[i]]), (models[i], everything[~other[i]])
        fits[i] = [(model.select(targets), targets) for model, targets in pairs if len(targets)]
    return fits


def _substitute(judged: Sequence[Judged]) -> tuple[KernelTrial, Tensor]:
    """The trial whose uncertainty stands around a mean or linear weights, and its ridges (b, R)."""
    found = [(trial, part, k) for part in judged for k, trial in enumerate(part.trials)]
    trial, part, k = found[min(_preferred([each[0] for each in found])[0], default=0)]
    assert isinstance(trial, KernelTrial)
    return trial, part.judgement.ridges.unflatten(1, (-1, part.num_ridges))[:, k]


def by_size(masks: Masks) -> list[Kernel]:
    """Exponential kernels that see how many tasks there are: by an amplitude, a function, or both.

    Scores that saturate vary more among small subsets, and depend on the number of tasks more than
    on any of them. Amplitudes at equal steps of their logarithm; the function of sizes has a third
    of, or three times, the variance of the rest at the full set.
    """
    if not masks.binary or not bool(sees_sizes(masks.values)):
        return []
    _, *exponentials = Exponential().grid(masks)
    plain = [
        Exponential(kernel.gamma, amplitude)
        for kernel in exponentials
        if isinstance(kernel, Exponential)
        for amplitude in (0.0, 1.0, 2.0, 4.0)
    ]
    of_size = [kernel + weight * Size(degree=4) for kernel in plain for weight in (0.3, 3.0)]
    return [*(kernel for kernel in plain if kernel.amplitude), *of_size]


def _preferred(trials: Sequence[Trial]) -> tuple[list[int], list[int]]:
    """The numbers of the trials whose kernels are preferred, and of those that see sizes too."""
    warped: list[int] = []
    wide: list[int] = []
    sized: list[int] = []
    for index, trial in enumerate(trials):
        kernel = trial.predictor(0)
        part = kernel.terms[0][1] if isinstance(kernel, Sum) else kernel
        if isinstance(part, Warped):
            warped.append(index)
        elif isinstance(part, Exponential):
            (sized if part.amplitude or part is not kernel else wide).append(index)
    return warped or wide, sized


def random_rows(count: int, limit: int, device: torch.device) -> Tensor:
    """At most ``limit`` of ``count`` rows drawn at random, the same in every run; int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:limit].to(device)


def lasso_where_promising(
    tables: Sequence[Masks], scores: Scores, folds: Tensor, contest: Contest
) -> list[Judged]:
    """Lasso for the tables where sparse linear effects beat the kernels, or clearly on one target.

    Lasso costs more than all kernels together, and wins rarely, but then by far: it is tried on a
    sample of targets first.
    """
    m, columns = len(folds), scores.spaced_targets(_LASSO_PROBE)
    if tables[0].num_tasks > _LASSO_TASKS or m < 10 or not len(columns):
        return []
    probed = replace(scores.targets(columns), by_rank=False)
    probe = LinearTrial("lasso", tables, probed, folds, tol=_LASSO_PROBED_TO)
    losses = probed.losses(probe.left_out)
    together, alone = (
        probed.losses(contest.best(way).residuals[..., columns]) for way in ("shared", "target")
    )
    promising = probed.pooled(losses - together).mean(1) < 0
    promising |= clearly_better(alone - losses).any(1)
    if not bool(promising.any()):
        return []
    lasso = LinearTrial("lasso", tables, scores, folds)
    return [replace(lasso.judged, tables=promising)]


def described(contest: Contest, chosen: Chosen | None) -> Iterator[list[Tried]]:
    """For every table what was tried, with the latent columns that chose it.

    In memory of its own: who keeps one table keeps none of the others.
    """
    b, num_candidates = contest.ridges.shape
    counts = torch.zeros(b, num_candidates, dtype=torch.int64, device=contest.ridges.device)
    if chosen is not None:
        ones = (~chosen.targets_of_components).long()
        counts.scatter_add_(1, chosen.by_target.candidate, ones)
        if chosen.by_component is not None:
            candidate = chosen.by_component.candidate
            used = chosen.targets_of_components.any(1, keepdim=True).long()
            counts.scatter_add_(1, candidate, used.expand_as(candidate))
    m = contest.scores.values.shape[1]
    for i in range(b):
        rows, start = [], 0
        for part in contest.judged:
            at = slice(start, start + part.judgement.ridges.shape[1])
            start = at.stop
            if not bool(part.tables[i]):
                continue
            rows.append(
                Tried(
                    [(trial.predictor(i), part.num_ridges) for trial in part.trials],
                    part.judgement.ridges[i].clone(),
                    part.judgement.errors[i].clone(),
                    part.ranks(i),
                    m,
                    counts[i, at].clone(),
                )
            )
        yield rows
