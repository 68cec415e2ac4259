r"""Scores of two kinds at once: many estimates and few true scores, by autoregressive co-kriging.

.. math:: F(S) = a + \sum_l b_l E_l(S) + \delta(S)

The estimates become surrogates E of their own (:func:`levels_of`). δ is a kernel surrogate whose
trend they are: a and b are unpenalised, for each target its own (:class:`.spectral.TrendRidge`).
With so few true scores, leave-one-out errors over a grid of kernels and ridges choose by chance.
What is chosen has the largest restricted likelihood instead, which no coefficient of the trend can
flatter, with a mild prior :math:`(1 + q)^{-0.3}` on the ratio q of signal to noise.

References: Kennedy & O'Hagan 2000 (co-kriging); Le Gratiet & Garnier 2014 (level after level);
Patterson & Thompson 1971 (restricted likelihood).

Shapes: m subsets, t targets, L levels, R ridges; scores standardised, float64.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksm_ext.arrays import as_tensor
from ksm_ext.checks import brief, listed, message
from ksm_ext.subsets import distinct_rows, leave_one_out
from ksm_ext.surrogates.candidates import Tried
from ksm_ext.surrogates.choice import Choice, Chosen, Contest, Model, Sharing, solve
from ksm_ext.surrogates.judgement import Scores, judge
from ksm_ext.surrogates.kernels import RBF, Kernel, grams
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.more_subsets import similar_subsets
from ksm_ext.surrogates.observations import Observations
from ksm_ext.surrogates.search import Fits, Search, by_size, described
from ksm_ext.surrogates.spectral import SpectralRidge, TrendRidge
from ksm_ext.surrogates.surrogate import Surrogate
from ksm_ext.surrogates.trend import Level
from ksm_ext.surrogates.trials import RELATIVE_RIDGES, Judged, KernelTrial, LatentFit

_PRIOR = 0.3
"""Exponent of the prior on the ratio of signal to noise: a factor of 10 costs .7 of likelihood."""

_DRAWN = 500
"""Subsets, beside those with true scores, whose scores a predictor is asked for."""

_SIZED_SUBSETS = 192
"""True scores up to which there are kernels that see sizes: more of them tell what is needed."""

_SAME, _COPIED = 1e-6, 10
"""Of their spread: what estimates may differ by and be the true scores; at how many subsets."""

_TOGETHER = 2**22  # numbers of Gram matrices, and of residuals, held at a time

_OWN_CHOICE = 3.0
"""Log-likelihood that kernel and ridge of a target's own must win: twice is chi-squared, of two
degrees of freedom, and beyond 6 by chance once in twenty."""


# -- estimates ----------------------------------------------------------------------------------


def levels_of(
    estimates: Any,
    masks: Masks,
    task_names: Sequence[str],
    target_names: Sequence[str],
    *,
    fit: Callable[..., Surrogate],
) -> tuple[Level, ...]:
    """Surrogates of the estimates, their tasks and targets matched by name or position.

    A predictor that is no surrogate is asked for the subsets with true scores, all tasks, all but
    one, and :data:`_DRAWN` drawn ones of like sizes; a surrogate of these answers for it. Its
    answers have no noise, so where true scores are they are its very own. (Of the empty subset it
    is not asked: a model that was trained on nothing, or not moved from where it is, is no limit of
    others.)

    Args:
        estimates: See :func:`ksm_ext.fit_surrogate`.
        masks: (m, n) the subsets with true scores.
        task_names: n names.
        target_names: t names.
        fit: Fits a surrogate to masks and scores.

    Raises:
        TypeError: If one of ``estimates`` is nothing of the kind.
        ValueError: If its tasks or targets are others, or there is none.
    """
    several = isinstance(estimates, list) or (
        isinstance(estimates, tuple) and all(hasattr(each, "predict") for each in estimates)
    )
    given = list(estimates) if several else [estimates]
    if not given:
        raise ValueError(message("estimates", "at least one", "an empty list", "Leave it out."))
    levels = []
    for each in given:
        if not isinstance(each, Surrogate):
            each = _surrogate_of(each, masks, task_names, fit)
        own = each.task_names, each.target_names
        tasks = _matched("task", own[0], task_names)
        levels.append(
            Level(each.with_tensor_answers(), tasks, _matched("target", target_names, own[1]))
        )
    return tuple(levels)


def _surrogate_of(
    given: Any, masks: Masks, task_names: Sequence[str], fit: Callable[..., Surrogate]
) -> Surrogate:
    """A surrogate of scores, of finished runs, or of what a predictor predicts."""
    if hasattr(given, "runs"):
        return fit(given)
    if isinstance(given, tuple) and len(given) == 2:
        return fit(*given)
    if not hasattr(given, "predict"):
        expected = "a pair (masks, scores), something with predict(masks), or a list of these"
        remedy = "Fit a surrogate to it, and pass that."
        raise TypeError(message("estimates", expected, type(given).__name__, remedy))
    if not masks.binary:
        remedy = "Fit a surrogate to its predictions, and pass that."
        found = f"{type(given).__name__} for real weights"
        raise ValueError(message("estimates", "a surrogate or a pair", found, remedy))
    names = getattr(given, "task_names", task_names)
    asked = masks.values[masks.sizes > 0].cpu()
    drawn = similar_subsets(asked, _DRAWN, seed=0)
    nearest = leave_one_out(masks.num_tasks, include_full=True)
    asked = torch.cat([asked, nearest, drawn]).unique(dim=0)
    asked = asked[:, list(_matched("task", names, task_names))]
    scores = as_tensor("estimates.predict(masks)", given.predict(asked))
    called = {name: getattr(given, name, None) for name in ("task_names", "target_names")}
    return fit(asked, scores, noise_std=0.0, **called)


def _matched(kind: str, wanted: Sequence[str], names: Sequence[str]) -> tuple[int, ...]:
    """Numbers among ``names`` of those that are ``wanted``, or the same numbers without names."""
    if set(wanted) <= set(names) and (kind == "target" or len(wanted) == len(names)):
        return tuple(names.index(name) for name in wanted)
    unnamed = {tuple(map(str, range(len(wanted)))), ("target",)}
    if len(wanted) == len(names) and unnamed & {tuple(wanted), tuple(names)}:
        return tuple(range(len(names)))
    expected = f"of the same {kind}s as the true scores"
    found = f"{listed(wanted)} beside {listed(names)}"
    remedy = f"Give their {kind}s the same names, or one of the two none, to go by position."
    raise ValueError(message("estimates", expected, found, remedy))


def check_independent(
    levels: Sequence[Level], observed: Observations, target_names: Sequence[str]
) -> None:
    """Raise ``ValueError`` where estimates are the true scores themselves.

    Fitted to them, a surrogate answers with them: what is left to explain is 0 at every subset, and
    leave-one-out errors say that all is known.
    """
    for level in levels:
        own, asked = level.surrogate, observed.masks.values[:, list(level.tasks)]
        if own.masks.binary != observed.masks.binary:
            continue
        numbers, first = distinct_rows(torch.cat([own.masks.values.to(asked.device), asked]))
        place = first[numbers[len(own.masks) :]]  # (m,)
        there = place < len(own.masks)
        estimated = own.scores.to(observed.scores)[place[there]][:, list(level.targets)]
        apart = (estimated - observed.scores[there]).abs()
        same = (apart <= _SAME * observed.unit).sum(0)  # (t,), of those scored
        copied = (same == observed.observed.sum(0)) & (same >= _COPIED) & observed.varying
        if bool(copied.any()):
            names = [name for name, one in zip(target_names, copied.tolist(), strict=True) if one]
            found = f"the true scores of {listed(map(repr, names))} at every subset"
            remedy = "Leave out what was made from the true scores: it tells nothing beside them."
            raise ValueError(message("estimates", "other scores than the true ones", found, remedy))


# -- the fit ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class TrendModel(Model):
    """A model beside its trend.

    Attributes:
        slopes: (L, t) standardised scores per unit of the estimates.
    """

    slopes: Tensor

    __repr__ = brief


@dataclass(frozen=True, eq=False)
class TrendSearch(Search):
    """A fit of scores with estimates beside them.

    Attributes:
        basis: (L, m, t) the estimates of the subsets' scores.
    """

    basis: Tensor

    __repr__ = brief

    def part(self, rows: Tensor, columns: Tensor) -> "TrendSearch":
        """The same for some subsets and targets."""
        return replace(self, basis=self.basis[:, rows][..., columns])

    def fit(self, tables: Sequence[Masks], scores: Scores) -> list[tuple[Fits, list[Tried]]]:
        """The model of all targets, and everything that was tried, of the one table."""
        (masks,) = tables
        trials = trials_of(self._kernels(masks), masks, scores, self)
        contest = Contest([trial.judged for trial in trials], scores)
        choice, sharing = self._choice(trials, contest)
        (model,) = solve(choice, [sharing], trials[0], trials[0].judged.judgement.ridges)
        targets = torch.arange(scores.values.shape[2], device=scores.values.device)
        slopes = torch.zeros_like(self.basis[:, 0])
        for trial, columns, ridges, _ in choice.groups():
            assert isinstance(trial, TrendTrial)
            slopes[:, columns] = trial.slopes(ridges[0], columns)
        shared = torch.tensor([sharing == "shared"], device=targets.device)
        chosen = Chosen(choice, shared, None, torch.zeros_like(choice.candidate, dtype=torch.bool))
        (tried,) = described(contest, chosen)
        return [([(TrendModel(**vars(model), slopes=slopes), targets)], tried)]

    def _kernels(self, masks: Masks) -> list[Kernel]:
        """Those asked for; for ``"auto"`` RBF ones, and where m is small, those that see sizes."""
        if self.kernel != "auto":
            return self._candidates(masks)[0]
        few = len(masks) <= _SIZED_SUBSETS
        return RBF().grid(masks) + (by_size(masks) if few else [])

    def _choice(self, trials: list["TrendTrial"], contest: Contest) -> tuple[Choice, Sharing]:
        """The kernel and ridge of the largest likelihood, of all targets together or of each."""
        scores = contest.scores
        likelihoods = torch.cat([trial.log_likelihoods for trial in trials])  # (candidates, t)
        pooled = likelihoods[:, scores.varying].sum(1).argmax()
        best, chosen = likelihoods.max(0)
        if self.share_ridge == "auto":
            chosen = torch.where(best - likelihoods[pooled] > _OWN_CHOICE, chosen, pooled)
        elif self.share_ridge:
            chosen = pooled.expand_as(chosen)
        chosen = torch.where(scores.variance[0] > 0, chosen, pooled)
        sharing: Sharing = "shared" if bool((chosen == pooled).all()) else "target"
        return Choice(contest, chosen[None]), sharing


class TrendTrial(KernelTrial):
    """Kernel ridge beside a trend, with one kernel of one table, at every ridge.

    Attributes:
        judged: What it costs.
        log_likelihoods: (R, t) restricted log-likelihood and prior.
    """

    def __init__(
        self,
        kernel: Kernel,
        masks: Masks,
        scores: Scores,
        search: TrendSearch,
        solved: tuple[SpectralRidge, Tensor],
        number: int,
    ) -> None:
        """Judge ``kernel``, the one with this ``number`` of those ``solved`` (1, K), at its ridges.

        These are all of a search, or the one that was given.
        """
        super().__init__([kernel], [masks], scores, solved, number)
        self._plain, y = self._factor[0], self._rotated[0]
        self._beside = TrendRidge(self._plain, search.basis)
        scale = self._plain.scale.clamp_min(1e-300)
        if search.ridge is not None:
            self._plain.check_ridge(float(search.ridge.min()))
            ridges = search.ridge
        else:
            ridges = torch.tensor(RELATIVE_RIDGES, dtype=torch.float64).to(scale) * scale
        left_out, signal, likelihoods = self._at(y, ridges)
        found = judge(scores, ridges[None, None], [left_out[None, None]])
        everything = torch.ones(1, dtype=torch.bool, device=y.device)
        again = partial(_ranks_again, kernel, masks, scores, search)
        self.judged = Judged([self], len(ridges), found, everything, lambda _: again)
        prior = _PRIOR * torch.log1p(scale / ridges.clamp_min(1e-300))
        self.log_likelihoods = likelihoods - prior[:, None]
        if search.ridge is None and scores.noise is not None:  # no ridge stands for less
            low = ridges[:, None] * signal < scores.noise[0]
            low[-1] = False
            self.log_likelihoods = self.log_likelihoods.masked_fill(low, -torch.inf)

    def _at(self, y: Tensor, ridges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Leave-one-out residuals (m, R, t), and signal variances and log-likelihoods (R, t)."""
        t, rest = y.shape[1], []
        for part in ridges.split(max(1, _TOGETHER // (len(y) * t))):
            columns = torch.arange(t, device=y.device).repeat(len(part))
            beside, scores, each = self._beside.columns(columns), y[:, columns], part[:, None]
            each = each.expand(-1, t).flatten()
            found = (
                beside.leave_one_out(scores, each),
                beside.signal_variance(scores, each)[None],
                beside.log_likelihood(scores, each)[None],
            )
            rest.append([values.unflatten(1, (-1, t)) for values in found])
        left_out, signal, likelihoods = (torch.cat(each, 1) for each in zip(*rest, strict=True))
        return left_out, signal[0], likelihoods[0]

    def residuals(self, ridges: Tensor, columns: Tensor, *, components: bool) -> Tensor:
        """See :class:`.trials.Trial`."""
        beside, y = self._of(columns)
        return beside.leave_one_out(y, ridges[0])[None]

    def slopes(self, ridges: Tensor, columns: Tensor) -> Tensor:
        """(L, columns) coefficients of the trend at ``ridges`` (columns,)."""
        beside, y = self._of(columns)
        return beside.coefficients(y, ridges)

    def solve(self, ridges: Tensor, columns: Tensor, *, components: bool) -> LatentFit:
        """See :class:`.trials.Trial`; the trend itself is in :meth:`slopes`."""
        beside, y = self._of(columns)
        dual, signal = beside.dual(y, ridges[0]), beside.signal_variance(y, ridges[0])
        constant = self._scores.offset[0, columns]
        if self._scores.center:
            trend = (self.slopes(ridges[0], columns) * beside.basis_mean).sum(0)
            constant = constant + self._plain.offset(dual) - trend
        residuals = ridges[0] / self._scores.weights[0, :, None] * dual
        parts = constant, residuals, ridges[0] * signal, dual, signal
        return LatentFit(*(part[None] for part in parts))

    def _of(self, columns: Tensor) -> tuple[TrendRidge, Tensor]:
        """What solves for these columns, and their scores in the eigenbasis."""
        return self._beside.columns(columns), self._rotated[0][:, columns]


def trials_of(
    kernels: Sequence[Kernel], masks: Masks, scores: Scores, search: TrendSearch
) -> list[TrendTrial]:
    """Kernels of one table beside its trend, factored as many at a time as memory allows."""
    trials = []
    step = max(1, _TOGETHER // len(masks) ** 2)
    for part in (kernels[start : start + step] for start in range(0, len(kernels), step)):
        factor = SpectralRidge(
            grams([part], [masks]), center=scores.center, weights=scores.weights[:, None]
        )
        solved = factor, factor.rotate(scores.values[:, None])
        trials += [
            TrendTrial(kernel, masks, scores, search, solved, number)
            for number, kernel in enumerate(part)
        ]
    return trials


def _ranks_again(kernel: Kernel, masks: Masks, scores: Scores, search: TrendSearch) -> Tensor:
    """(R,) rank correlations of a kernel at its ridges: computed anew, since few ask for them."""
    (trial,) = trials_of([kernel], masks, scores, search)
    left_out, _, _ = trial._at(trial._rotated[0], trial.judged.judgement.ridges[0])
    return scores.rank_correlations(left_out[None, None]).flatten()
