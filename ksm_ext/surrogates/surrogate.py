r"""A fitted surrogate: predictions, attributions, interactions and their uncertainty.

.. math:: \hat F(S) = b + u V \Big( \sum_g \sum_a \alpha^{(g)}_a\, k_g(S, S_a) + w^T 1_S \Big)
          + \sum_a s_a\, e_a\, [S = S_a] + \sum_l b_l E_l(S)

Targets are fitted in units u of their own standard deviation, so that none decides another's fit.
They may share kernels through latent columns (V rotates them to targets; without V a latent column
is a target). The last sum is there where the fit was given estimates (:mod:`.trend`). The sum
before it adds what was observed beyond all else, the smooth part: e_a is the residual of fitted
subset a and s_a the share of it that is peculiar to the subset (the rest is noise).
Everything asked of the surrogate is linear in alpha, w and s e.

**Observed scores in readouts.** ``[S = S_a]`` is the product kernel ``r^h`` with r = 0, so that sum
has the readouts of :mod:`.readouts` too: where the scores that a readout compares were
observed, such as F(all) and F(all but i), it compares these, and Shapley values sum to
F(all) - F(none).

**Uncertainty.** Answers are about the scores themselves, noise apart: f and what is peculiar to a
subset. f is a Gaussian process, and answers have its posterior variance (:mod:`.posterior`), times
what leave-one-out residuals say of subsets of the sizes concerned (:mod:`.calibration`). Where the
noise is unknown, it is the larger of two: all that the kernel does not explain is peculiar to
subsets, or all of it is noise. Where the ridge is given, it is all noise, and the model is taken at
its word. Estimates add ``b^2`` times their own variance, as if they were wrong elsewhere than at
the fitted subsets.

Shapes: n tasks, m fitted subsets, l query subsets, t targets, q latent columns; float64 inside.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksm_ext.arrays import ArrayKind, ArrayLike, aligned, names_along
from ksm_ext.checks import (
    check_bool,
    check_choice,
    check_kind,
    check_level,
    check_positive_int,
    checked,
    counted,
    listed,
    message,
)
from ksm_ext.correlation import spearman
from ksm_ext.subsets import common_sum
from ksm_ext.surrogates.calibration import (
    FEWEST,
    context_law,
    lowest_sizes,
    size_factors,
    size_law,
)
from ksm_ext.surrogates.candidates import Candidate, CandidateTable, beats_the_mean
from ksm_ext.surrogates.extrapolation import (
    SIZES,
    extrapolated,
    last_kept,
    left_out,
    thinned,
    unknown_of_sizes,
)
from ksm_ext.surrogates.factorial import Factors, MainEffects
from ksm_ext.surrogates.kernels import Identity, Kernel, from_description
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.observations import MIN_REPEATS
from ksm_ext.surrogates.options import PairReadout, Readout
from ksm_ext.surrogates.owen import Groups, group_labels
from ksm_ext.surrogates.posterior import FittedSubsets, Functionals, TrendFunctionals
from ksm_ext.surrogates.product_readouts import ProductReadout
from ksm_ext.surrogates.readouts import (
    PAIR_READOUTS,
    READOUTS,
    effects,
    functionals,
    mean_value,
    pair_effects,
    prior_covariance,
    prior_variance,
)
from ksm_ext.surrogates.score_warps import ScoreWarp
from ksm_ext.surrogates.spectral import TrendRidge
from ksm_ext.surrogates.storage import check_state, read_state, write_state
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm
from ksm_ext.surrogates.trend import Answers, Level, Trend
from ksm_ext.surrogates.walsh import Mixture, side_by_side, walsh_energies

_CHUNK = 2**22  # numbers of a (rows, m) matrix of functionals held at a time: 32 MB
_USELESS = 0.05  # share of variance below which estimates are no help
_FAR = 0.14  # share of a Shapley value from which it counts as extrapolated
_LITTLE = 0.1  # of the noise that residuals allow, below which scores are taken as exact
_SHOWN = 6  # names or numbers in a line


# Tensors of a surrogate and of its terms that are stored under these names; some may be None.
_TENSORS = (
    *("intercept", "rotation", "scores", "unit", "residuals", "gaps", "own", "known", "noise"),
    *("counts", "apart", "varying", "repeats_std"),
)
_OF_KERNEL = (
    *("columns", "dual", "ridge", "signal_variance", "rows", "weights", "own", "most_noise"),
)
_OF_LINEAR = ("columns", "weights")
_CALLED = {"gaps": "fit_residuals", "own": "nugget_share", "apart": "excluded"}
"""Attributes whose names in files are older."""
_FACTS = ("center", "sharing", "single_target", "task_names", "target_names")
_NEWER = ("all_is_noise", "noise_degrees")
"""Facts that older files do not have."""


@dataclass(frozen=True, eq=False, repr=False)
class Surrogate:
    """What :func:`ksm_ext.fit_surrogate` returns.

    Answers have the array kind, device and dtype of the scores it was fitted to; for scores of
    shape (m,) the target dimension is dropped everywhere.

    Attributes:
        masks: The distinct subsets, (m, n), in the order of their first rows.
        intercept: (t,) float64, in units of the scores.
        kernel_terms: Kernel expansions, over the tasks that vary.
        linear_terms: Linear expansions, over the tasks that vary.
        rotation: (t, q) float64 from latent columns to targets, or None for the identity.
        center: Whether an intercept was fitted.
        task_names: n names.
        target_names: t names.
        candidates: Every kernel and ridge tried, with its leave-one-out error.
        sharing: ``"shared"``, ``"target"`` or ``"component"``: what has a ridge to itself.
        scores: (m, t) float64 mean scores of the subsets; NaN where missing.
        unit: (t,) float64 standard deviation of the scores, in which the terms are.
        residuals: (m, t) float64 leave-one-out residuals of the mean scores, in units of the
            scores; NaN where missing.
        fit_residuals: (m, t) float64 mean scores minus the smooth part of the surrogate; 0 where
            missing.
        nugget_share: (m, t) float64 in [0, 1]: the share of these residuals that readouts take to
            be peculiar to the subset.
        known: (m, t) bool: scores that are exact.
        noise: (m, t) float64 standard deviation of the mean scores by the noise of runs, or None
            if that is unknown.
        counts: (m, t) int64 number of runs of every subset.
        excluded: (m, t) bool: scores that are no part of the fit (of the empty subset, where that
            is a convention which the other scores do not lead to).
        varying: (n,) bool: tasks that were in some of the subsets and not in others.
        kind: The array kind of answers, such as ``"torch"`` or ``"pandas"``, and their device.
        dtype: ``torch.float64`` or ``torch.float32``, of answers; scores of half precision are
            answered in ``float32``.
        single_target: Whether the scores were given as (m,): answers then have no dimension t.
        solver: How conjugate gradients were set, or None where the Gram matrix was factored.
        trend: Surrogates of estimates and their slopes, or None without estimates.
        all_is_noise: Whether the caller gave the ridge, or weights that differ, so that all
            residuals count as noise and intervals are those of the model.
        noise_degrees: Degrees of freedom of repeats that measure the noise; else 0.
        repeats_std: (t,) float64 standard deviation of a run by one to four such, too few to be
            taken for the noise; else None.
        warps: Maps of scores through which targets are predicted, each with a surrogate.
    """

    masks: Masks
    intercept: Tensor
    kernel_terms: tuple[KernelTerm, ...]
    linear_terms: tuple[LinearTerm, ...]
    rotation: Tensor | None
    center: bool
    task_names: tuple[str, ...]
    target_names: tuple[str, ...]
    candidates: CandidateTable
    sharing: str
    scores: Tensor
    unit: Tensor
    residuals: Tensor
    fit_residuals: Tensor
    nugget_share: Tensor
    known: Tensor
    noise: Tensor | None
    counts: Tensor
    excluded: Tensor
    varying: Tensor
    kind: ArrayKind
    dtype: torch.dtype
    single_target: bool
    solver: ConjugateGradients | None = None
    trend: Trend | None = None
    all_is_noise: bool = False
    noise_degrees: int = 0
    repeats_std: Tensor | None = None
    warps: tuple[ScoreWarp, ...] = ()

    # -- asking ---------------------------------------------------------------------------------

    @property
    def has_intervals(self) -> bool:
        """Whether answers come with standard deviations; in older files they may have none.

        Around a mean, lasso or least squares, they are those of a kernel.
        """
        levels = () if self.trend is None else self.trend.levels
        able = all(level.surrogate.has_intervals for level in levels)
        return self._is_covered and able and (self.masks.binary or not levels)

    @cached_property
    def _is_covered(self) -> bool:
        """Whether every latent column has a kernel, for its uncertainty."""
        covered = [column for term in self.kernel_terms for column in term.columns.tolist()]
        return len(set(covered)) == self._num_latent

    @checked
    def predict(self, masks: ArrayLike, return_std: bool = False, *, observed: bool = False) -> Any:
        """Predicted scores of subsets.

        The smooth part of the surrogate, and of the residual of a fitted subset as much as is known
        not to be noise: all of it for scores that are ``known`` or have no noise and for the empty
        and the full subset; the share ``nugget_share`` where noise is given or measured; else none.
        A target of ``warps`` is predicted through its map, by another function than attributions
        are of.

        Args:
            masks: (l, n) in the form of the fitted masks, any array kind. Columns that have names
                are put in the order of ``task_names``. Tasks that never varied are ignored.
            return_std: Also return the standard deviation of F(S), what is peculiar to S included,
                the noise of a single training run not: ``value +- 1.96 std`` is a 95 % interval.
                Where the noise is unknown it holds for another run of S too; else add
                ``noise_std**2`` to the variance for one.
            observed: Add the share ``nugget_share`` of every residual, as attributions and
                interactions do; they are exactly those of this function, which no map changes.

        Returns:
            (l, t), or the pair of (l, t) predictions and standard deviations.

        Raises:
            ValueError: If ``masks`` has other columns than the fitted masks or is not finite.
        """
        (masks,) = aligned({"masks": (masks, "subset", "task")}, {"task": self.task_names})
        table = self._query(masks)
        query = self._of_varying(table)
        mean, trend = self._smooth(query), None
        if self.trend is not None:
            trend = self.trend.ask(lambda level: level.predict(table.values, return_std))
            mean = mean + trend.mean
        answered = self.nugget_share > 0 if observed else self._answered  # (m, t)
        seen = answered.any(1)
        if bool(seen.any()):
            fit_residuals = (answered * self.nugget_share * self.fit_residuals)[seen]
            mean = mean + Identity().matmul(query, self._active[seen], fit_residuals)
        axes = {"subset": names_along(masks, 0)}
        warps = () if observed else self.warps
        if not return_std:
            return self._answer(_mapped_back(warps, table.values, mean)[0], axes)

        def of_rows(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            return self._fitted.predictions(kernel, query[rows], term, answered)

        if trend is not None:  # where a score answers, its residual makes up for the estimates
            answering = Identity().matmul(query, self._active, answered * self.nugget_share)
            trend = trend.less(answering)
        factors = self._query_factors(query, answered)
        variance = self._variances(len(query), of_rows, trend, factors).amax(0)
        if self._unknown_of_sizes is not None:
            variance = variance + self._unknown_of_sizes[self._sizes_of(query)].square()
        std, rows = self.unit * variance.sqrt(), self.excluded.any(1)
        if bool(rows.any()):  # these scores are certain
            cells = self.excluded[rows].to(torch.float64)
            certain = Identity().matmul(query, self._active[rows], cells)
            std = torch.where(certain > 0, 0.0, std)
        mean, std = _mapped_back(warps, table.values, mean, std)
        return self._answer(mean, axes), self._answer(std, axes)

    def observed_share(self, masks: Tensor) -> Tensor:
        """(l, t) float64 share of a subset's residual that :meth:`predict` answers with."""
        query = self._of_varying(self._query(masks))
        return Identity().matmul(query, self._active, self._answered * self.nugget_share)

    @checked
    def attribute(
        self, readout: Readout = "loo", return_std: bool = False, *, scale_rest: bool | None = None
    ) -> Any:
        r"""How much each task raises each target.

        ``"loo"``: ``F(all) - F(all but i)``. ``"shapley"``: the mean effect of adding task i over
        all orders of the tasks (Shapley 1953). ``"banzhaf"``: its mean effect over all subsets
        (Banzhaf 1965; Wang & Jia 2023, arXiv:2205.15466). All exact for the fitted function with
        the observed scores in it, in ``O(m n t)``; see :mod:`.readouts`. Values keep the
        units and sign of the scores. A task that was in every subset, or in none, has 0.

        For real-valued weights only ``"loo"`` is defined: the fitted function at the mean weights,
        minus at the mean weights with task i at zero and, for mixtures, the rest scaled up to the
        same sum.

        Args:
            readout: Which of the three.
            return_std: Also return standard deviations; ``value +- 1.96 std`` is a 95 % interval of
                the effect, the noise of runs apart. Fitted by conjugate gradients, each of the n
                tasks is one or two more linear systems and takes ``8 m n`` bytes.
            scale_rest: For real weights, whether the rest is scaled up. None is for mixtures alone,
                which are rows whose sums differ by at most 2 % of their mean. Nothing else is ever
                normalised: rows that sum to 0.996 are fitted and predicted as they are.

        Returns:
            (n, t), or the pair of (n, t) attributions and standard deviations.

        Raises:
            ValueError: If ``readout`` is none of the three, or is not defined for weights, or
                ``scale_rest`` is given for 0/1 masks.
        """
        check_choice("readout", readout, READOUTS)
        if not self.masks.binary:
            return self._attribute_weights(readout, return_std, scale_rest)
        if scale_rest is not None:
            found, remedy = repr(scale_rest), "There are no shares to scale."
            raise ValueError(message("scale_rest", "left out for 0/1 masks", found, remedy))
        name, masks, n = readout, self._active, self._active.num_tasks
        values = self._with_observed(
            n, lambda kernel, dual: effects(masks, kernel, name, dual), lambda term: term.weights
        )
        values, trend = self._of_all_tasks(values), None
        if self.trend is not None:
            trend = self.trend.ask(lambda level: level.attribute(name, return_std))
            values = values + trend.mean
        axes = {"task": self.task_names}
        if not return_std:
            return self._answer(values, axes)
        tasks = torch.arange(len(values), device=masks.values.device)[:, None]
        std = self.unit * self._readout_variances(name, tasks, trend).amax(0).sqrt()
        return self._answer(values, axes), self._answer(std, axes)

    @checked
    def owen_values(
        self, groups: Sequence[Hashable] | Mapping[str, Hashable], return_std: bool = False
    ) -> Any:
        """Shapley values of tasks that come in groups: languages in families, domains of data.

        The mean effect of adding task i over all orders in which the tasks of a group stay
        together (Owen 1977). Values of a group sum to its Shapley value among groups, those of all
        to ``F(all) - F(none)``; if every task is a group, or all are one, they are Shapley values.
        Exact for the fitted function with the observed scores in it; see :mod:`.owen`.

        Args:
            groups: n labels, the group of each task in the order of ``task_names``; or a mapping
                of names of tasks to labels.
            return_std: Also return standard deviations; ``value +- 1.96 std`` is a 95 % interval.

        Returns:
            (n, t), or the pair of (n, t) values and standard deviations.

        Raises:
            TypeError: If ``groups`` is neither.
            ValueError: If it has no label for each task, or the masks are real weights.
        """
        self._require_masks("owen_values")
        labels, masks, trend = group_labels(groups, self.task_names), self._active, None
        law = Groups.of([labels[task] for task in self._varying_tasks.tolist()])
        values = self._of_all_tasks(
            self._with_observed(
                law.num_tasks,
                lambda kernel, dual: law.functionals(masks, kernel) @ dual,
                lambda term: term.weights,
            )
        )
        if self.trend is not None:
            trend = self.trend.ask(lambda level: level.owen_values(labels, return_std))
            values = values + trend.mean
        if not return_std:
            return self._answer(values, {"task": self.task_names})
        factors = self._of_all_tasks(law.size_law.to(values) @ self._size_factors)
        return self._with_deviations(values, law, self._of_all_tasks, factors, trend)

    @checked
    def level_effects(
        self,
        factors: Factors,
        baseline: Mapping[str, Any] | None = None,
        return_std: bool = False,
    ) -> Any:
        """Main effects of the levels of factors, of a fit to runs with one level of each.

        The mean of F over all combinations of the levels of other factors, less the mean over the
        levels of the same factor, or at a baseline level. Exact for the fitted function with the
        observed scores in it; see :mod:`.factorial`. Whether a level is there that no run had, or
        all had, changes nothing.

        Args:
            factors: The factors, whose ``names`` are those of the tasks in the same order; tasks
                that were given no names go by position.
            baseline: The level that others are compared with, by factor; by default their mean.
            return_std: Also return standard deviations; ``value +- 1.96 std`` is a 95 % interval.

        Returns:
            (n, t), or the pair of (n, t) effects and standard deviations.

        Raises:
            ValueError: If the tasks are others than the levels, ``baseline`` names none of them,
                or the surrogate was fitted with estimates.
        """
        self._require_masks("level_effects")
        remedy = "Pass the factors of the design that was scored."
        check_kind("factors", factors, Factors, "ksm_ext.Factors", remedy)
        contrasts = factors.contrasts(baseline).to(self.unit)
        if len(contrasts) != self.masks.num_tasks:
            expected = f"factors of {counted(self.masks.num_tasks, 'level')}, those of the tasks"
            raise ValueError(message("factors", expected, str(len(contrasts)), remedy))
        numbers = tuple(map(str, range(len(contrasts))))
        if self.task_names not in (factors.names, numbers):
            remedy = "Fit masks whose columns are `factors.names`, in this order."
            expected, found = f"of the tasks {listed(self.task_names)}", listed(factors.names)
            raise ValueError(message("factors", expected, found, remedy))
        if self.trend is not None:
            remedy = "Fit the true scores alone."
            raise ValueError(message("estimates", "left out for level_effects", "some", remedy))
        law, masks = MainEffects(factors.num_levels, contrasts.cpu(), self.varying), self._active
        values = self._with_observed(
            len(contrasts),
            lambda kernel, dual: law.functionals(masks, kernel) @ dual,
            lambda term: contrasts @ self._of_all_tasks(term.weights),
        )
        if not return_std:
            return self._answer(values, {"task": self.task_names})
        at_size = self._size_factors[law.size : law.size + 1]
        return self._with_deviations(values, law, lambda rows: rows, at_size, None)

    @checked
    def attribution_covariance(self, readout: Readout = "loo", *, relative: bool = False) -> Any:
        """Joint posterior covariance of attributions: how far they are uncertain together.

        Its diagonal is the square of the deviations of :meth:`attribute`; the variance of a
        difference of tasks is ``C_ii + C_jj - 2 C_ij``, by which it was computed. Where the noise
        is unknown, correlations are those of the reading of the ridge that makes attributions more
        uncertain in sum. Estimates add ``b^2`` times their own.

        Args:
            readout: ``"loo"``, ``"shapley"`` or ``"banzhaf"``.
            relative: Answer in squares of :attr:`unit`, which no unit of the scores brings to 0 or
                infinity.

        Returns:
            (n, n, t) symmetric, in squared units of the scores (costs ``O(n^2 m^2)``).

        Raises:
            ValueError: If ``readout`` is none of the three, or the masks are real weights.
        """
        check_choice("readout", readout, READOUTS)
        self._require_masks("attribution_covariance")
        name, masks, n = readout, self._active, self._active.num_tasks
        tasks, trend, of_pairs = self._varying_tasks, None, None
        if self.trend is not None:
            tasks = torch.arange(self.masks.num_tasks, device=tasks.device)
            trend = self.trend.ask(lambda level: level.attribute(name, False))
        first, second = torch.triu_indices(len(tasks), len(tasks), 1, device=tasks.device)
        if trend is not None:
            of_pairs = trend.differences(first, second)
        place, live = self._among_varying(torch.stack([tasks[first], tasks[second]], 1))

        def differences(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            pairs, counted = place[rows], live[rows]
            own = [prior_variance(kernel, name, n, each[:, None]) for each in pairs.T]
            prior = (torch.stack(own, 1).to(live) * counted).sum(1)
            joint = prior_covariance(kernel, name, n, pairs).to(live)
            one, other = (
                functionals(masks, kernel, name, each[:, None]) * alive[:, None]
                for each, alive in zip(pairs.T, counted.T, strict=True)
            )
            return Functionals(prior - 2 * joint * counted.prod(1), one - other)

        readings = self._readout_variances(name, tasks[:, None], trend)  # (readings, n, t)
        factors = self._readout_factors(name, 1)
        apart = self._variances(len(first), differences, of_pairs, factors)
        larger = readings.sum(1).argmax(0).expand(1, 1, -1)
        variance = readings.take_along_dim(larger, 0)[0]
        matrix = torch.diag_embed(variance.T).permute(1, 2, 0)  # (n, n, t)
        of_differences = apart.take_along_dim(larger, 0)[0]
        matrix[first, second] = (variance[first] + variance[second] - of_differences) / 2
        matrix[second, first] = matrix[first, second]
        certain = variance <= 0
        scale = torch.where(
            certain, 0.0, readings.amax(0) / variance.masked_fill(certain, 1.0)
        ).sqrt()
        matrix = matrix * scale[:, None] * scale
        matrix.diagonal().copy_(readings.amax(0).T)
        matrix = self._of_all_tasks(self._of_all_tasks(matrix).transpose(0, 1))
        if self.trend is not None:
            for level, slopes in self.trend.with_slopes():
                own = level.attribution_covariance(name).to(matrix)
                matrix = matrix + (slopes * (level.unit / self.unit)).square() * own
        if not relative:
            matrix = self.unit.square() * matrix
        return self._answer(matrix, {"task": self.task_names, "other_task": self.task_names})

    @checked
    def mean_score(self, readout: Readout = "shapley") -> Any:
        """Mean of F over the subsets that a readout looks at: what it says of no task at all.

        ``"loo"``: F(all). ``"banzhaf"``: the mean over all subsets. ``"shapley"``: over subsets of
        a size that is uniform on 0 to n. Exact for the fitted function with the observed scores.

        Args:
            readout: Which of the three.

        Returns:
            (t,), or a number for scores (m,).

        Raises:
            ValueError: If ``readout`` is none of the three, or the masks are real weights.
        """
        check_choice("readout", readout, READOUTS)
        self._require_masks("mean_score")
        share = 1.0 if readout == "loo" else 0.5
        values = self._with_observed(
            1,
            lambda kernel, dual: mean_value(self._active, kernel, readout, dual)[None],
            lambda term: share * term.weights.sum(0, keepdim=True),
        )[0]
        if self.trend is not None:
            values = values + self.trend.ask(lambda level: level.mean_score(readout)).mean
        return self._per_target(self.intercept + values)

    @checked
    def interactions(self, readout: PairReadout = "loo", return_std: bool = False) -> Any:
        """Pairwise synergy: how much task i's effect grows when task j is present.

        ``"loo"``: ``F(all) - F(all but i) - F(all but j) + F(all but i, j)``. ``"shapley"`` and
        ``"banzhaf"``: the interaction indices of Grabisch & Roubens 1999. ``"taylor"`` and
        ``"faithful"``: those with which pairs and tasks sum to F(all) - F(none) (Sundararajan et
        al. 2020; Tsai et al. 2023), tasks having their Shapley value less half of their pairs.
        Exact; zero diagonal.

        Args:
            readout: Which of the five.
            return_std: Also return posterior standard deviations (costs ``O(n^2 m^2)``).

        Returns:
            (n, n, t) symmetric, or the pair with standard deviations.

        Raises:
            ValueError: If ``readout`` is none of the five, or the masks are real weights.
        """
        check_choice("readout", readout, PAIR_READOUTS)
        self._require_masks("interactions")
        name, masks, n = readout, self._active, self._active.num_tasks

        def matrix(pairs: Tensor, count: int) -> Tensor:
            first, second = torch.triu_indices(count, count, 1, device=masks.values.device)
            found = pairs.new_zeros(count, count, pairs.shape[1])
            found[first, second] = pairs
            found[second, first] = pairs
            return found

        def answer(found: Tensor) -> Any:
            return self._answer(found, {"task": self.task_names, "other_task": self.task_names})

        first, second = torch.triu_indices(n, n, 1, device=masks.values.device)
        pairs = self._with_observed(
            len(first),
            lambda kernel, dual: pair_effects(masks, kernel, name, dual)[first, second],
            lambda term: term.weights.new_zeros(len(first), len(term.columns)),
        )
        values = self._of_all_tasks(self._of_all_tasks(matrix(pairs, n)).transpose(0, 1))
        trend = None
        if self.trend is not None:
            trend = self.trend.ask(lambda level: level.interactions(name, return_std))
            values = values + trend.mean
        if not return_std:
            return answer(values)
        first, second = torch.triu_indices(len(values), len(values), 1, device=values.device)
        tasks = torch.stack([first, second], 1)
        trend = None if trend is None else trend.at(first, second)
        std = self.unit * self._readout_variances(name, tasks, trend).amax(0).sqrt()
        return answer(values), answer(matrix(std, len(values)))

    def walsh_spectrum(self, max_order: int | None = None) -> Any:
        r"""Fraction of the surrogate's variance over all subsets by order of interaction.

        Order d holds the terms of ``F(S) = sum_T c_T prod_{i in T} (2 s_i - 1)`` with ``|T| = d``:
        order 1 is linear in the tasks, the rest is interaction. It is the spectrum of the smooth
        part: residuals of single subsets are left out.

        Args:
            max_order: Last order reported, by default all n up to 64 tasks and 10 beyond; n counts
                the tasks that vary.

        Returns:
            (max_order, t); row 0 is order 1. Sums to one when ``max_order`` is n. A target whose
            prediction is constant has zeros.

        Raises:
            ValueError: If ``max_order`` is not in 1..n, the masks are real weights, or other tasks
                vary among the estimates than among the scores.
        """
        self._require_masks("walsh_spectrum")
        n = self._active.num_tasks
        last = n if n <= 64 else 10
        if max_order is not None:
            last = check_positive_int("max_order", max_order, minimum=-(2**63))
        if not 1 <= last <= n:
            remedy = "Leave it out for the default."
            raise ValueError(message("max_order", f"between 1 and {n}", str(max_order), remedy))
        parts, banzhaf = self._expansion()
        masks, mixtures = side_by_side(parts)
        energies, total = walsh_energies(masks, mixtures, last, (banzhaf / 2).square().sum(0))
        positive = total > 1e-24  # in units of the variance of the scores
        fractions = torch.where(positive, energies / total.clamp_min(1e-300), 0 * energies)
        return self._answer(fractions, {"order": range(1, last + 1)})

    def _expansion(self) -> tuple[list[tuple[Masks, list[Mixture]]], Tensor]:
        """The smooth part: mixtures of kernels on their subsets, and Banzhaf values (n, t).

        In units of ``unit``; n are the tasks that vary.
        """
        banzhaf = self._assemble(
            self._active.num_tasks,
            lambda term: effects(self._active, term.kernel, "banzhaf", term.dual),
            lambda term: term.weights,
        )
        mixtures = [
            (term.kernel, self._rotate_columns(term.dual, term.columns))
            for term in self.kernel_terms
        ]
        parts = [(self._active, mixtures)]
        for level, slopes in () if self.trend is None else self.trend.with_slopes():
            other, targets = level.surrogate, list(level.targets)
            places = [level.places[task] for task in self._varying_tasks.tolist()]
            if sorted(places) != other.varying.nonzero()[:, 0].tolist():
                found, remedy = "others", "Fit both to subsets in which the same tasks vary."
                expected = "of subsets in which the tasks vary that do among the scores"
                raise ValueError(message("estimates", expected, found, remedy))
            order = torch.tensor(places).argsort().argsort()
            scale = other.unit[targets].to(slopes) * slopes / self.unit
            below, of_level = other._expansion()
            banzhaf = banzhaf + of_level[order][:, targets].to(scale) * scale
            for masks, kernels in below:
                scaled = [
                    (kernel.of_tasks(order), dual[:, targets].to(scale) * scale)
                    for kernel, dual in kernels
                ]
                parts.append((Masks(masks.values[:, order]).to(scale.device), scaled))
        return parts, banzhaf

    def with_excluded(self, excluded: Tensor) -> "Surrogate":
        """The same surrogate, which answers with scores that the fit left out for their subsets.

        Args:
            excluded: (m, t) bool: these scores. They change no answer for other subsets.
        """
        rows = excluded.any(1).nonzero()[:, 0]
        distance = torch.zeros_like(self.scores)
        distance[rows] = self.scores[rows] - self._smooth(self._active[rows])
        if self.trend is not None:
            distance[rows] -= Answers(self.trend.slopes, self._trend_at_fitted[:, rows]).mean
        return replace(
            self,
            fit_residuals=torch.where(excluded, distance, self.fit_residuals),
            residuals=torch.where(excluded, distance, self.residuals),
            nugget_share=torch.where(excluded, 1.0, self.nugget_share),
        )

    def with_design(self, masks: Masks) -> "Surrogate":
        """A surrogate as uncertain as this one would be with other subsets, each scored once.

        Its answers are 0: only standard deviations mean something, those of the model. Where the
        noise is unknown, they are those of the smooth part.

        Args:
            masks: (m', n) the other subsets.
        """
        m, t = len(masks), len(self.unit)
        zeros = self.unit.new_zeros(m, t)
        terms = []
        for term in self.kernel_terms:
            same = masks is self.masks and term.rows is None and term.weights is None
            dual, factor = zeros.new_zeros(m, len(term.columns)), term.factor if same else None
            terms.append(replace(term, dual=dual, rows=None, weights=None, factor=factor))
        runs = None if self.noise is None else (self.noise.square() * self.counts).mean(0).sqrt()
        return replace(
            self,
            masks=masks,
            kernel_terms=tuple(terms),
            scores=zeros,
            residuals=(self._loo_error.sqrt() * self.unit).expand(m, t),
            fit_residuals=zeros,
            nugget_share=zeros if runs is None else self.nugget_share.mean(0).expand(m, t),
            known=self.known.new_zeros(m, t),
            noise=None if runs is None else runs.expand(m, t),
            counts=self.counts.new_ones(m, t),
            excluded=self.excluded.new_zeros(m, t),
            all_is_noise=True,
            warps=(),
        )

    def with_tensor_answers(self) -> "Surrogate":
        """The same surrogate, answering in float64 tensors on the CPU, always with targets."""
        kind = ArrayKind("torch", torch.device("cpu"))
        return replace(self, kind=kind, dtype=torch.float64, single_target=False)

    @property
    def loo_residuals(self) -> Any:
        """Exact leave-one-out residuals ``F_j(S_i)`` minus prediction without subset i, (m, t).

        Of predictions through a map where there is one; ``residuals`` are without.

        One row per distinct subset, its mean score left out with all its runs; NaN where a score
        is missing. For ``lasso`` they are those of its 5-fold cross-validation. Fitted by conjugate
        gradients they are estimates: alpha is solved for, its denominator ``P_ii`` measured on
        ``num_probes`` random vectors (:mod:`ksm_ext.surrogates.krylov`).
        """
        return self._answer(self._left_out, {"subset": None})

    @property
    def loo_error(self) -> Any:
        """Mean squared leave-one-out residual over the variance of scores: ``1 - R^2``, (t,).

        Over distinct subsets that were fitted; 1 for constant scores.
        """
        return self._per_target(self._error_of(self._left_out))

    @property
    def explained_by_estimates(self) -> Any:
        """(t,) share of the scores' variance that ``b E`` explains; None without estimates.

        Over the fitted subsets; negative where it is further from them than their mean is.
        """
        return None if self.trend is None else self._per_target(self._explained)

    @property
    def noise_std(self) -> Any:
        """(t,) standard deviation of a single run, given or measured on repeats; None if unknown.

        The root mean square over subsets.
        """
        return None if self._noise_std is None else self._per_target(self._noise_std)

    def noise_range(self, level: float = 0.95) -> Any:
        """Between what the noise of a single run lies: the least and the largest, (2, t).

        Measured on repeats: an interval by chi-square. Given: that number twice. Else nothing tells
        noise from what is peculiar to subsets: from 0 to what :attr:`loo_residuals` allow, of
        predictions through a map where there is one. A residual r of a left-out run is its noise
        and more, so that, with M of them, the noise is below ``sqrt(sum(r^2) / q)`` with
        probability ``level``, q the quantile of chi-square with M degrees of freedom at ``1 -
        level``. One to four repeats are too few to be taken for the noise, but narrow this by their
        chi-square.

        Args:
            level: Strictly between 0 and 1.

        Raises:
            ValueError: If ``level`` is not.
        """
        ends = self._noise_range(check_level("level", level), self._left_out)
        return self._answer(ends, {"end": ("low", "high")})

    @cached_property
    def constant_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that were in every subset or in none: no score depends on them."""
        varying = self.varying.cpu()
        for level in () if self.trend is None else self.trend.levels:
            varying = varying | level.moving
        named = zip(self.task_names, varying.tolist(), strict=True)
        return tuple(name for name, varies in named if not varies)

    @property
    def warnings(self) -> tuple[str, ...]:
        """What to know before trusting the answers, a sentence each; empty if there is nothing."""
        found = []
        each = zip(self.target_names, self.is_predicted.tolist(), strict=True)
        nothing = [repr(name) for name, predicted in each if not predicted]
        if nothing:
            who = "" if len(self.target_names) == 1 else f" of {listed(nothing)}"
            found.append(
                f"Nothing{who} is predicted: scores left out of the fit are predicted no better "
                "than by the mean score. Attributions are observed differences, or 0."
            )
        if self.constant_tasks:
            found.append(
                f"Attribution 0 for {listed(map(repr, self.constant_tasks))}: in every subset or "
                "in none, so that no score tells."
            )
        if self.trend is not None:
            useless = self._explained < _USELESS
            if len(self.trend.levels) == 1:  # several may well be weighed against each other
                useless = useless | (self.trend.slopes[0] < 0)
            names = [name for name, no in zip(self.target_names, useless, strict=True) if no]
            if names:
                found.append(
                    f"The estimates tell little of {listed(map(repr, names))}, or the opposite of "
                    "what they say: compare with a fit without them."
                )
        found += self.warp_notes
        if bool(self.excluded.any()):
            found.append(
                "The score of the empty subset is a value of its own: the other scores do not lead "
                "to it."
            )
        each = zip(self.target_names, self._taken_as_exact.tolist(), strict=True)
        names = [repr(name) for name, exact in each if exact]
        if names:
            who = "" if len(self.target_names) == 1 else f" of {listed(names)}"
            found.append(
                f"Scores{who} are taken as exact, though nothing says so: if runs have noise, "
                "intervals are too narrow. Repeat some subsets or pass noise_std=, 0 if there is "
                "none."
            )
        return (*found, *self.size_notes)

    @property
    def size_notes(self) -> tuple[str, ...]:
        """What leaves the sizes that were scored, a sentence for targets with the same; or none.

        Nothing where the ridge was given: the model is taken at its word.
        """
        if self.all_is_noise or not self._active.binary:
            return ()
        said: dict[str, list[str]] = {}
        for scored, targets in self._alike_scored:
            note = _said_of_sizes(self._active.sizes[scored], self.num_varying)
            said.setdefault(note, []).extend(self.target_names[j] for j in targets.tolist())
        several = len(said) > 1
        return tuple(
            (f"Of {listed(map(repr, names))}: " if several else "") + note
            for note, names in said.items()
            if note
        )

    @property
    def warp_notes(self) -> tuple[str, ...]:
        """Which targets are predicted through a map of their scores, a sentence for each map."""
        notes = []
        for warp in self.warps:
            targets = list(warp.targets)
            names = listed(repr(self.target_names[j]) for j in targets)
            each = self._left_out, self.residuals
            through, own = (float(self._error_of(found)[targets].mean()) for found in each)
            notes.append(
                f"Predictions of {names} go through a {warp.name} map of the scores "
                f"(leave-one-out error {through:.3f}); attributions and interactions are of the "
                f"scores themselves ({own:.3f})."
            )
        return tuple(notes)

    # -- storing --------------------------------------------------------------------------------

    def save(self, path: Any) -> None:
        """Write to ``path`` as safetensors (no pickle); see :func:`ksm_ext.load_surrogate`.

        The file appears whole or not at all: a full disk or a kill leaves an older file as it was.

        Raises:
            OSError: If it cannot be written; the message names the path and the cause.
        """
        write_state(path, *self.state())

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that the surrogate is: tensors by name, copies of its own, and facts for JSON."""
        tensors = _tensors_of(self, _TENSORS)
        masks = self.masks.bits if self.masks.binary else self.masks.values
        tensors["masks"] = masks.clone()
        tensors["score_variance"] = self.candidates.score_variance.clone()
        for i, term in enumerate(self.kernel_terms):
            tensors |= _tensors_of(term, _OF_KERNEL, f"kernel.{i}.")
        for i, linear in enumerate(self.linear_terms):
            tensors |= _tensors_of(linear, _OF_LINEAR, f"linear.{i}.")
        levels = []
        for i, level in enumerate(() if self.trend is None else self.trend.levels):
            parts, described = level.surrogate.state()
            tensors |= {f"trend.{i}.{name}": tensor for name, tensor in parts.items()}
            places = {"tasks": level.tasks, "targets": level.targets}
            levels.append({"surrogate": described, **places})
        if self.trend is not None:
            tensors["trend.slopes"] = self.trend.slopes.clone()
        warps = []
        for i, warp in enumerate(self.warps):
            parts, described = warp.surrogate.state()
            tensors |= {f"warp.{i}.{name}": tensor for name, tensor in parts.items()}
            warps.append({"name": warp.name, "targets": warp.targets, "surrogate": described})
        return tensors, {
            **{name: getattr(self, name) for name in _FACTS + _NEWER},
            "kernels": [term.kernel.describe() for term in self.kernel_terms],
            "num_linear": len(self.linear_terms),
            "binary": self.masks.binary,
            "candidates": [asdict(row) for row in self.candidates],
            "kind": self.kind.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "solver": None if self.solver is None else asdict(self.solver),
            **({"trend": levels} if levels else {}),
            **({"warps": warps} if warps else {}),
        }

    @classmethod
    def from_state(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "Surrogate":
        """The surrogate whose :meth:`state` is given; it answers on the device of the tensors.

        Raises:
            ValueError: If the parts do not fit each other.
            LookupError: If one is missing.
            TypeError: If one is of another kind.
        """
        check_state(tensors, facts)

        def part(prefix: str, names: Sequence[str]) -> dict[str, Any]:
            found = [name for name in names if prefix + name in tensors]
            return {_CALLED.get(name, name): tensors[prefix + name] for name in found}

        names = {name: tuple(facts[name]) for name in ("task_names", "target_names")}
        stored, n = tensors["masks"], len(names["task_names"])
        candidates = tuple(Candidate(**row) for row in facts["candidates"])
        return cls(
            masks=Masks.from_bits(stored, n) if facts["binary"] else Masks(stored),
            kernel_terms=tuple(
                KernelTerm(from_description(described), **part(f"kernel.{i}.", _OF_KERNEL))
                for i, described in enumerate(facts["kernels"])
            ),
            linear_terms=tuple(
                LinearTerm(**part(f"linear.{i}.", _OF_LINEAR)) for i in range(facts["num_linear"])
            ),
            candidates=CandidateTable(candidates, tensors["score_variance"]),
            **{"rotation": None, "noise": None, **part("", _TENSORS)},
            **{name: facts[name] for name in _FACTS} | names,
            noise_degrees=facts.get("noise_degrees", 0),
            all_is_noise=facts.get("all_is_noise", not _takes_inexact(tensors)),
            kind=ArrayKind(facts["kind"], stored.device),
            dtype=getattr(torch, facts["dtype"]),
            solver=None if facts["solver"] is None else ConjugateGradients(**facts["solver"]),
            trend=cls._trend_of(tensors, facts.get("trend", ())),
            warps=tuple(
                ScoreWarp(
                    warp["name"],
                    tuple(warp["targets"]),
                    tensors["scores"],
                    cls._part_of(tensors, f"warp.{i}.", warp["surrogate"]),
                )
                for i, warp in enumerate(facts.get("warps", ()))
            ),
        )

    @classmethod
    def _part_of(cls, tensors: dict[str, Tensor], start: str, described: Any) -> "Surrogate":
        """A surrogate that is part of another: of the tensors whose names begin with ``start``.

        It answers in tensors.
        """
        parts = {
            name.removeprefix(start): tensor
            for name, tensor in tensors.items()
            if name.startswith(start)
        }
        return cls.from_state(parts, described).with_tensor_answers()

    @classmethod
    def _trend_of(cls, tensors: dict[str, Tensor], levels: Sequence[Any]) -> Trend | None:
        """The trend in a :meth:`state`."""
        if not levels:
            return None
        found = []
        for i, level in enumerate(levels):
            surrogate = cls._part_of(tensors, f"trend.{i}.", level["surrogate"])
            found.append(Level(surrogate, tuple(level["tasks"]), tuple(level["targets"])))
        return Trend(tuple(found), tensors["trend.slopes"])

    # -- describing -----------------------------------------------------------------------------

    @property
    def predictors(self) -> str:
        """Estimates, the kernels in use, each once, and linear weights; empty for the mean."""
        kernels = ["estimates"] * (self.trend is not None)
        kernels += [str(term.kernel) for term in self.kernel_terms if bool(term.dual.any())]
        return listed(dict.fromkeys(kernels + ["linear weights"] * bool(self.linear_terms)))

    def __str__(self) -> str:
        """Sizes, kernels and leave-one-out error in a line, and warnings."""
        errors = self._error_of(self._left_out)
        quality = f"leave-one-out error {float(errors.mean()):.3f} of the variance"
        if len(errors) > 1:
            each = zip(self.target_names, errors.tolist(), strict=True)
            single = listed((f"{name} {error:.3f}" for name, error in each), _SHOWN)
            quality += f", mean over targets ({single})"
        quality += f", {self.noise_summary}"
        if self.trend is not None:
            slopes = (listed(f"{b:.3g}" for b in row) for row in self.trend.slopes.tolist())
            shares = listed(f"{share:.3f}" for share in self._explained.tolist())
            quality += f", estimates times {' and '.join(slopes)} explain {shares} of the variance"
        sizes = (len(self.masks), "subset"), (self.masks.num_tasks, "task"), (len(errors), "target")
        line = f"Surrogate of {', '.join(counted(*size) for size in sizes)}: "
        line += f"{self.predictors or 'mean'} ({self.sharing} ridge), {quality}"
        return "\n".join([line, *self.warnings])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """What notebooks show: what helps and hurts a few targets, in words and bars."""
        # The one step up: by name, since the report is built on surrogates.
        return str(import_module("ksm_ext.report.notebook").card(self))

    @cached_property
    def noise_summary(self) -> str:
        """What is known of the noise of a run, in words: :meth:`noise_range` at 95 %."""
        low, high = self._noise_range(0.95, self._left_out)
        if self._noise_std is None:
            most = ", ".join(f"{value:.3g}" for value in high.tolist()[:_SHOWN])
            least = ", ".join(f"{value:.3g}" for value in low.tolist()[:_SHOWN])
            said = f"noise of a run between {least if bool(low.any()) else 0} and {most} at 95 %"
            if self.repeats_std is not None:
                few = counted(self.noise_degrees, "repeat")
                said += f" ({few}: too few to be taken for the noise, which takes {MIN_REPEATS})"
            return said
        shown = self._noise_std.tolist()[:_SHOWN]
        if not self.noise_degrees:
            return f"noise of a run {', '.join(f'{value:.3g}' for value in shown)}"
        each = zip(shown, low.tolist(), high.tolist(), strict=False)
        ranges = (f"{value:.3g} ({least:.3g} to {most:.3g} at 95 %)" for value, least, most in each)
        return f"noise of a run {', '.join(ranges)}"

    # -- assembling -----------------------------------------------------------------------------

    @property
    def _num_latent(self) -> int:
        return len(self.intercept) if self.rotation is None else self.rotation.shape[1]

    @cached_property
    def _left_out(self) -> Tensor:
        """(m, t) scores minus what predicts them when they are left out, through maps."""
        found = self.residuals.clone()
        for warp in self.warps:
            found[:, list(warp.targets)] = warp.residuals.to(found)
        return torch.where(self.excluded, self.residuals, found)

    @cached_property
    def _loo_error(self) -> Tensor:
        return self._error_of(self.residuals)

    def _error_of(self, residuals: Tensor) -> Tensor:
        """(t,) mean square over the variance of the scores; 1 for constant scores."""
        squares = (residuals / self.unit).square()
        judged = ~squares.isnan() & ~self.excluded
        error = torch.where(judged, squares, 0.0).sum(0) / judged.sum(0)
        high = torch.where(judged, self.scores, -torch.inf).amax(0)
        low = torch.where(judged, self.scores, torch.inf).amin(0)
        return torch.where(high > low, error, torch.ones_like(error))

    @cached_property
    def _explained(self) -> Tensor:
        assert self.trend is not None
        trend = Answers(self.trend.slopes, self._trend_at_fitted).mean
        judged = ~self.scores.isnan() & ~self.excluded

        def scatter(values: Tensor) -> Tensor:
            values = torch.where(judged, values, 0.0)
            mean = values.sum(0) / judged.sum(0)
            return torch.where(judged, values - mean, 0.0).square().sum(0)

        rest, total = (scatter(table / self.unit) for table in (self.scores - trend, self.scores))
        return torch.where(total > 0, 1 - rest / total.clamp_min(1e-300), 0.0)

    @cached_property
    def _noise_std(self) -> Tensor | None:
        if self.noise is None:
            return None
        runs = (self.noise / self.unit).square() * self.counts
        scattered = ((self.counts > 0) & ~self.known).sum(0).clamp_min(1)
        return self.unit * (runs.sum(0) / scattered).sqrt()

    def _noise_range(self, level: float, residuals: Tensor) -> Tensor:
        """See :meth:`noise_range`, of leave-one-out residuals (m, t)."""
        from scipy.special import chdtri  # takes long to import, for this function only

        of_repeats, repeats = None, self.repeats_std if self.noise is None else self._noise_std
        if repeats is not None:
            if not self.noise_degrees:
                return repeats.expand(2, -1)
            tails = np.array([(1 - level) / 2, (1 + level) / 2])
            factors = np.sqrt(self.noise_degrees / chdtri(self.noise_degrees, tails))
            of_repeats = torch.from_numpy(factors).to(self.unit)[:, None] * repeats
            if self.noise is not None:
                return of_repeats
        runs = (residuals / self.unit).square() * self.counts
        judged = ~runs.isnan() & ~self.excluded & ~self.known
        count = judged.sum(0)
        ceiling = chdtri(count.clamp_min(1).cpu().numpy(), level)
        total = torch.where(judged, runs, 0.0).sum(0) / torch.from_numpy(ceiling).to(self.unit)
        most = self.unit * total.sqrt()
        if of_repeats is None:
            return torch.stack([torch.zeros_like(most), most])
        return of_repeats.minimum(most)

    @cached_property
    def rank_correlations(self) -> Tensor:
        """(t,) Spearman correlation of scores and what predicts them when they are left out.

        0 for a constant prediction.
        """
        pairs = zip(self.scores.T, (self.scores - self._left_out).T, strict=True)
        present = [torch.stack([true, other], 1)[~true.isnan()] for true, other in pairs]
        found = torch.cat([spearman(pair[:, :1], pair[:, 1:]) for pair in present])
        return torch.where(self._moved, found, 0.0)

    @cached_property
    def is_predicted(self) -> Tensor:
        """(t,) bool: targets whose scores are predicted better than by the mean when left out.

        See :func:`.candidates.beats_the_mean`.
        """
        return beats_the_mean(self._error_of(self._left_out), self.rank_correlations)

    @property
    def _moved(self) -> Tensor:
        """(t,) bool: targets whose prediction is not constant."""
        moved = self.moved_by((*self.kernel_terms, *self.linear_terms))
        for warp in self.warps:
            targets = list(warp.targets)
            moved[targets] = warp.surrogate._moved[targets].to(moved.device)
        return moved

    def moved_by(self, terms: Iterable[KernelTerm | LinearTerm]) -> Tensor:
        """(t,) bool: targets to whose predictions one of these terms, or a trend, adds anything."""
        moved = torch.zeros_like(self.intercept, dtype=torch.bool)
        for term in terms:
            weights = term.dual if isinstance(term, KernelTerm) else term.weights  # (m or n, q_g)
            moved |= (self._rotate_columns(weights, term.columns) != 0).any(0)
        return moved if self.trend is None else moved | (self.trend.slopes != 0).any(0)

    @property
    def num_varying(self) -> int:
        """Number of tasks that were in some subsets and not in others."""
        return len(self._varying_tasks)

    @cached_property
    def _varying_tasks(self) -> Tensor:
        return self.varying.nonzero()[:, 0]

    @cached_property
    def _active(self) -> Masks:
        """The subsets as masks of the tasks that vary."""
        if len(self._varying_tasks) == self.masks.num_tasks:
            return self.masks
        return Masks(self.masks.values[:, self._varying_tasks])

    def _of_all_tasks(self, values: Tensor) -> Tensor:
        """(n, ...) from the values of the tasks that vary: 0 for the others."""
        if len(values) == self.masks.num_tasks:
            return values
        full = values.new_zeros(self.masks.num_tasks, *values.shape[1:])
        full[self._varying_tasks] = values
        return full

    @cached_property
    def _answered(self) -> Tensor:
        """(m, t) bool: scores that predictions answer with, see :meth:`predict`."""
        if self.noise is not None:
            return self.nugget_share > 0
        ends = self.known
        if self._active.binary:
            sizes = self._active.sizes[:, None]
            ends = ends | (sizes == 0) | (sizes == self._active.num_tasks)
        return ends & (self.nugget_share > 0)

    @cached_property
    def _trend_at_fitted(self) -> Tensor:
        """(L, m, t) the estimates of the fitted subsets."""
        assert self.trend is not None
        return self.trend.ask(lambda level: level.predict(self.masks.values, False)).values

    def _smooth(self, query: Masks) -> Tensor:
        """(l, t) predictions of the kernels and linear weights alone."""
        return self.intercept + self.unit * self._assemble(
            len(query),
            lambda term: term.kernel.matmul(query, self._active, term.dual),
            lambda term: query.floats @ term.weights,
        )

    def _with_observed(
        self,
        rows: int,
        of_kernel: Callable[[Kernel, Tensor], Tensor],
        of_linear: Callable[[LinearTerm], Tensor],
    ) -> Tensor:
        """(rows, t) readout of the smooth part with the observed scores, in units of the scores."""
        smooth = self._assemble(rows, lambda term: of_kernel(term.kernel, term.dual), of_linear)
        return self.unit * smooth + of_kernel(Identity(), self.nugget_share * self.fit_residuals)

    def _rotate_columns(self, values: Tensor, columns: Tensor) -> Tensor:
        if self.rotation is not None:
            return values @ self.rotation[:, columns].T
        full = values.new_zeros(len(values), self._num_latent)
        full[:, columns] = values
        return full

    def _assemble(
        self,
        rows: int,
        of_kernel: Callable[[KernelTerm], Tensor],
        of_linear: Callable[[LinearTerm], Tensor],
    ) -> Tensor:
        """(rows, t) from each term's (rows, q_g)."""
        latent = self.unit.new_zeros(rows, self._num_latent)
        for kernel_term in self.kernel_terms:
            if bool(kernel_term.dual.any()):
                latent[:, kernel_term.columns] += of_kernel(kernel_term)
        for linear_term in self.linear_terms:
            latent[:, linear_term.columns] += of_linear(linear_term)
        return latent if self.rotation is None else latent @ self.rotation.T

    def _answer(self, values: Tensor, axes: Mapping[str, Sequence[Any] | None]) -> Any:
        """(..., t) float64 as the caller's kind and dtype, without t for (m,) scores."""
        values = values.to(self.dtype)
        if self.single_target:
            return self.kind.restore(values[..., 0], axes)
        return self.kind.restore(values, {**axes, "target": self.target_names})

    def _per_target(self, values: Tensor) -> Any:
        """(t,) like the scores; a number for scores (m,)."""
        if self.single_target:
            return self._answer(values[None], {"target": None})[0]
        return self._answer(values, {})

    def _query(self, masks: ArrayLike) -> Masks:
        return Masks.of(masks, num_tasks=self.masks.num_tasks).to(self.masks.values.device)

    def _of_varying(self, query: Masks) -> Masks:
        """The same subsets as masks of the tasks that vary, in the form of the fitted ones."""
        if len(self._varying_tasks) < self.masks.num_tasks:
            query = Masks(query.values[:, self._varying_tasks])
        return query if self.masks.binary == query.binary else query.as_weights()

    def _require_masks(self, what: str) -> None:
        if not self.masks.binary:
            found = "real-valued weights"
            remedy = "Use predict, or attribute('loo')."
            raise ValueError(message("masks", f"0/1 for {what}", found, remedy))

    # -- uncertainty ----------------------------------------------------------------------------

    @cached_property
    def _fitted(self) -> FittedSubsets:
        """The fitted subsets as :mod:`.posterior` knows them."""
        noise = None if self.noise is None else (self.noise / self.unit).square()
        if noise is not None and self.rotation is not None:
            noise = noise @ self.rotation.square()
        exact = (self.known | (self.counts == 0)).all(1) & self.known.any(1)
        excluded = self.excluded.any(1)
        return FittedSubsets(self._active, self.center, exact, excluded, noise, self.all_is_noise)

    def _among_varying(self, tasks: Tensor) -> tuple[Tensor, Tensor]:
        """The places of tasks among those that vary, and 1 for those that do, else 0."""
        place = (self.varying.cumsum(0) - 1).clamp_min(0)
        return place[tasks], self.varying[tasks].to(torch.float64)

    @cached_property
    def _size_factors(self) -> Tensor:
        """(n + 1, t) what variances are multiplied by at each size; of real weights (1, t).

        From leave-one-out residuals; 1 where the model is taken at its word.
        """
        sizes = self._active.sizes if self._active.binary else None
        if self.all_is_noise:
            return self.unit.new_ones(
                1 if sizes is None else self._active.num_tasks + 1, len(self.unit)
            )
        variance = self.unit.new_zeros(len(self.masks), self._num_latent)
        for term in self.kernel_terms:
            solver: Any = term.factored(self._active, center=self.center, solver=self.solver)
            rows = slice(None) if term.rows is None else term.rows
            if self.trend is not None:
                solver = TrendRidge(solver, self._trend_at_fitted[:, rows][..., term.columns])
            found = variance.new_zeros(len(variance), len(term.columns))
            found[rows] = solver.loo_variance(term.ridge) * term.signal_variance
            variance[:, term.columns] = found
        if self.rotation is not None:
            variance = variance @ self.rotation.square().T
        judged = ~self.excluded & (variance > 1e-24)  # else the scores are explained to rounding
        squares = (self.residuals / self.unit).square() / variance
        squares = torch.where(judged, squares, torch.nan)
        factors = size_factors(squares, sizes, self._active.num_tasks)
        if sizes is not None:
            factors = self._extrapolated(factors)
        if self.noise is None:
            return factors
        shares = torch.where(judged, (self.noise / self.unit).square() / variance, 0.0)
        share = shares.sum(0) / judged.sum(0).clamp_min(1)
        return factors.maximum(share.clamp_max(1.0))  # noise stays

    def _extrapolated(self, factors: Tensor) -> Tensor:
        """Factors (n + 1, t), beyond the sizes scored no less than :mod:`.extrapolation` has them.

        Targets that miss different scores have sizes, and blocks, of their own. Where no kernel
        predicts, deviations are still a kernel's: so are the residuals of blocks.
        """
        n, sizes = self._active.num_tasks, self._active.sizes
        factors = factors.clone()
        for scored, targets in self._alike_scored:
            part = factors[:, targets]
            # smaller subsets are larger ones, counted from the full set
            ends = (n - sizes, part.flip(0)), (sizes, part)
            blocks = [self._blocks(scored, targets, *end) for end in ends]
            for (end, _), told, other in zip(ends, blocks, reversed(blocks), strict=True):
                largest = end[scored].amax().expand(len(targets))
                told = told if len(told[0]) else other
                part = extrapolated(part.flip(0), largest, *told)
            factors[:, targets] = part
        return factors

    def _blocks(
        self, scored: Tensor, targets: Tensor, sizes: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Distances (B, rows) of left-out sizes, of ``sizes`` (m,), and squares (B, rows, t')."""
        rows = scored[thinned(sizes[scored])]
        own = sizes[rows]
        last = last_kept(own)
        squares = self._squares_of_blocks(rows, own, last, targets)
        by_kernel = self.moved_by(self.kernel_terms)[targets]
        squares = squares / torch.where(by_kernel, factors[own], 1.0)
        beyond = (own - last[:, None]).clamp_min(0) / max(len(factors) - 1, 1)
        return beyond.to(squares), squares

    def _squares_of_blocks(
        self, rows: Tensor, sizes: Tensor, last: Tensor, targets: Tensor
    ) -> Tensor:
        """(B, rows, t') squared residuals of left-out sizes in units of their deviation, or NaN.

        Args:
            rows: The subsets that are looked at.
            sizes: Of these, from whichever end.
            last: (B,) the last size that stays.
            targets: (t',) the targets that have their scores.
        """
        scores = torch.where(self._is_scored, self.scores - self.intercept, 0.0)[rows] / self.unit
        scores = scores if self.rotation is None else scores @ self.rotation
        residuals, variances = scores.new_zeros(2, len(last), *scores.shape)
        columns = targets  # latent ones, of these targets
        if self.rotation is not None:
            columns = (self.rotation[targets] != 0).any(0).nonzero()[:, 0]
        for term in self.kernel_terms:
            weights = term.all_weights()[rows]
            chosen = weights.nonzero()[:, 0]
            if len(chosen) < FEWEST or not bool(torch.isin(term.columns, columns).any()):
                continue
            at, place = rows[chosen], (slice(None), chosen[:, None], term.columns)
            part = replace(term, rows=None, weights=weights[chosen])
            plain: Any = part.factored(self._active[at], center=self.center, solver=None)
            solver = plain
            if self.trend is not None:
                solver = TrendRidge(plain, self._trend_at_fitted[:, at][..., term.columns])
            dual = solver.dual(plain.rotate(scores[place[1:]]), term.ridge)
            found = left_out(solver, term.ridge, dual, sizes[chosen], last)
            residuals[place], variances[place] = found[0], found[1] * term.signal_variance
        if self.rotation is not None:
            residuals = residuals @ self.rotation.T
            variances = variances @ self.rotation.square().T
        judged = self._is_scored[rows] & (variances > 1e-24)
        return torch.where(judged, residuals.square() / variances, torch.nan)[..., targets]

    @cached_property
    def _alike_scored(self) -> list[tuple[Tensor, Tensor]]:
        """Numbers of subsets, and of the targets that have the scores of just these."""
        patterns, group = torch.unique(self._is_scored, dim=1, return_inverse=True)
        found = [
            (scored.nonzero()[:, 0], (group == number).nonzero()[:, 0])
            for number, scored in enumerate(patterns.T)
        ]
        return sorted(found, key=lambda each: int(each[1][0]))

    @cached_property
    def _unjudged_sizes(self) -> Tensor:
        """(t,) bool: targets scored on one or two sizes, or too few subsets to leave sizes out."""
        found = torch.zeros_like(self.unit, dtype=torch.bool)
        if self._active.binary:
            for scored, targets in self._alike_scored:
                found[targets] = (
                    len(scored) < FEWEST or len(self._active.sizes[scored].unique()) < SIZES
                )
        return found

    @cached_property
    def _unknown_of_sizes(self) -> Tensor | None:
        """(n + 1, t) what :func:`.unknown_of_sizes` says, in units of ``unit``; None if nothing."""
        if self.all_is_noise or not bool(self._unjudged_sizes.any()):
            return None
        scores = self.scores
        if self.trend is not None:
            scores = scores - Answers(self.trend.slopes, self._trend_at_fitted).mean
        scores, n = (scores - self.intercept) / self.unit, self._active.num_tasks
        found = scores.new_zeros(n + 1, scores.shape[1])
        for scored, targets in self._alike_scored:
            if bool(self._unjudged_sizes[targets[0]]):
                of = scores[scored[:, None], targets], self._active.sizes[scored]
                found[:, targets] = unknown_of_sizes(*of, n)
        return found

    @property
    def _is_scored(self) -> Tensor:
        """(m, t) bool: scores that are part of the fit."""
        return (self.counts > 0) & ~self.excluded

    @property
    def _taken_as_exact(self) -> Tensor:
        """(t,) bool: noise is unknown, and intervals take it for far less than residuals allow."""
        if self.noise is not None or self.all_is_noise or not self._is_covered:
            return torch.zeros_like(self.unit, dtype=torch.bool)
        latent = self.unit.new_zeros(self._num_latent)
        for term in self.kernel_terms:
            taken = term.ridge * term.signal_variance
            latent[term.columns] = (
                taken if term.most_noise is None else taken.maximum(term.most_noise)
            )
        taken = latent if self.rotation is None else self.rotation.square() @ latent
        room = self._noise_range(0.95, self.residuals)[1] / self.unit
        return (room > 1e-6) & (taken.sqrt() < _LITTLE * room)

    def _sizes_of(self, query: Masks) -> Tensor:
        """(l,) int64 number of tasks of subsets (l, n), of real weights the nearest."""
        return query.floats.sum(1).round().long().clamp(0, self._active.num_tasks)

    def _query_factors(self, query: Masks, answered: Tensor) -> Tensor:
        """(l, t) the same for predictions of subsets (l, n), some ``answered`` (m, t) by scores.

        Where the noise is unknown, nothing else is left of these: it is the same for all sizes, and
        no more than residuals leave room for where they are smallest.
        """
        factors = self._size_factors
        if not self._active.binary:
            return factors
        at_size = factors[self._sizes_of(query)]
        if self.noise is not None:
            return at_size
        own = Identity().matmul(query, self._active, answered.to(torch.float64))
        return torch.where(own > 0, factors[self._active.sizes].amin(0), at_size)

    def _readout_factors(self, readout: PairReadout, order: int) -> Tensor:
        """(1, t) the same for a readout of tasks or pairs: the mean over what it compares."""
        law = size_law(readout, self._active.num_tasks, order).to(self.unit)
        return law[None] @ self._size_factors

    def _with_deviations(
        self,
        values: Tensor,
        law: ProductReadout,
        of_all: Callable[[Tensor], Tensor],
        factors: Tensor,
        trend: Answers | None,
    ) -> tuple[Any, Any]:
        """Answers (n, t) of a readout and their standard deviations; ``of_all`` gives it n rows."""

        def of_rows(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            prior = law.prior_variance(kernel, self._active.num_tasks).to(values)
            found = law.functionals(self._active, kernel)
            return Functionals(of_all(prior)[rows], of_all(found)[rows])

        variance = self._variances(len(values), of_rows, trend, factors).amax(0)
        axes, std = {"task": self.task_names}, self.unit * variance.sqrt()
        return self._answer(values, axes), self._answer(std, axes)

    def _readout_variances(
        self, readout: PairReadout, tasks: Tensor, trend: Answers | None
    ) -> Tensor:
        """(readings, rows, t) variances of a readout of ``tasks`` (rows, d)."""
        n = self._active.num_tasks
        place, live = self._among_varying(tasks)
        live = live.prod(1)  # kernels have no part in the rest
        asked = live > 0 if trend is None else torch.ones_like(live, dtype=torch.bool)
        place, live = place[asked], live[asked]

        def of_rows(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            prior = prior_variance(kernel, readout, n, place[rows]).to(live) * live[rows]
            found = functionals(self._active, kernel, readout, place[rows])
            return Functionals(prior, found * live[rows, None])

        found = self._variances(
            len(place), of_rows, trend, self._readout_factors(readout, tasks.shape[1])
        )
        if self._unknown_of_sizes is not None:  # the same for all tasks
            order = tasks.shape[1]
            law = context_law(readout, n, order).to(self.unit)
            apart = law @ self._unknown_of_sizes.diff(n=order, dim=0)
            found = found + live[:, None] * apart.square()
        variances = found.new_zeros(len(found), len(tasks), len(self.unit))
        variances[:, asked] = found
        return variances

    def _variances(
        self,
        count: int,
        of_rows: Callable[[Kernel, slice, KernelTerm], Functionals],
        trend: Answers | None,
        factors: Tensor,
    ) -> Tensor:
        """(readings, count, t) variances in units of ``unit``, squared; some rows at a time.

        Args:
            count: How many functionals.
            of_rows: Some of them.
            trend: What the trend answers to them.
            factors: (count or 1, t) what the posterior variance is multiplied by.
        """
        if not self._is_covered:
            remedy = "Fit the scores again: this version has intervals for every surrogate."
            found = "a surrogate saved without the uncertainty of a mean, lasso or least squares"
            raise ValueError(message("return_std", "False for this surrogate", found, remedy))
        step = max(1, _CHUNK // max(len(self.masks), 1))
        parts = []
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            latent = self.unit.new_zeros(2, rows.stop - rows.start, self._num_latent)
            of_trend = None
            if trend is not None:
                of_trend = TrendFunctionals(trend.values[:, rows], self._trend_at_fitted)
            for term in self.kernel_terms:
                smooth, observed = (
                    of_rows(kernel, rows, term) for kernel in (term.kernel, Identity())
                )
                factor = term.factored(self._active, center=self.center, solver=self.solver)
                latent[..., term.columns] = self._fitted.variance(
                    term, factor, smooth, observed, of_trend
                )
            parts.append(latent if self.rotation is None else latent @ self.rotation.square().T)
        variances = torch.cat(parts, 1) if parts else self.unit.new_zeros(2, 0, len(self.unit))
        if trend is None or trend.std is None:
            return factors * variances
        return factors * variances + trend.variance(self.unit)

    def _attribute_weights(
        self, readout: Readout, return_std: bool, scale_rest: bool | None
    ) -> Any:
        if readout != "loo":
            remedy = "Shapley and Banzhaf values need 0/1 masks."
            raise ValueError(
                message("readout", "'loo' for real-valued weights", repr(readout), remedy)
            )
        mean = self._active.floats.mean(0)  # (n,)
        without = mean.repeat(len(mean), 1)
        without.fill_diagonal_(0.0)
        if scale_rest is None:
            scale_rest = common_sum(self.masks.values) is not None
        scale_rest = check_bool("scale_rest", scale_rest)
        if scale_rest:
            without *= mean.sum() / without.sum(1, keepdim=True).clamp_min(1e-300)
        if self.trend is not None and return_std:
            remedy = "Intervals of mixtures do not know estimates: ask for values, or fit without."
            expected = "False for real-valued weights with estimates"
            raise ValueError(message("return_std", expected, "True", remedy))
        whole, rest, masks = Masks(mean[None]), Masks(without), self._active
        values = self._smooth(whole) - self._smooth(rest)
        if self.trend is not None:
            points = self.masks.floats.mean(0).repeat(len(rest) + 1, 1)
            points[:, self._varying_tasks] = torch.cat([whole.values, rest.values])
            told = self.trend.ask(lambda level: level.predict(points, False)).mean
            values = values + told[:1] - told[1:]
        axes = {"task": self.task_names}
        if not return_std:
            return self._answer(self._of_all_tasks(values), axes)

        def of_rows(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            part = rest[rows]
            between = kernel.gram(part, whole)[:, 0]
            prior = kernel.diagonal(whole) + kernel.diagonal(part) - 2 * between
            if isinstance(kernel, Identity):  # no observed score answers
                return Functionals(prior, between.new_zeros(len(between), len(masks)))
            return Functionals(prior, kernel.gram(whole, masks) - kernel.gram(part, masks))

        readings = self._variances(len(without), of_rows, None, self._size_factors[:1])
        std = self._of_all_tasks(self.unit * readings.amax(0).sqrt())
        return self._answer(self._of_all_tasks(values), axes), self._answer(std, axes)


def check_surrogate(value: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is a surrogate."""
    if not isinstance(value, Surrogate):
        remedy = "Fit one with fit_surrogate."
        raise TypeError(message("surrogate", "a surrogate", type(value).__name__, remedy))


def _said_of_sizes(sizes: Tensor, n: int) -> str:
    """Which answers leave the sizes (m,) of the subsets scored, of n tasks; empty if few do."""
    counts = sizes.bincount(minlength=n + 1)
    distinct = counts.nonzero()[:, 0].tolist()
    if len(distinct) < min(SIZES, n + 1):
        return (
            f"All subsets have {' or '.join(map(str, distinct))} of {n} tasks, which does not tell "
            "how scores change with their number: answers about other sizes have the intervals of "
            "a usual change. Score subsets of three sizes or more, as ksm_ext.subsets.mixed_sizes "
            "draws them."
        )
    counts[[0, n]] = 0
    lowest, highest = int(lowest_sizes(counts[:, None])) % (n + 1), distinct[-1]
    law = size_law("shapley", n, 1)
    few, none = (float(part.sum()) > _FAR for part in (law[:lowest], law[highest + 1 :]))
    if not few and not none:
        return ""
    fewer = f"Hardly any subset has fewer than {lowest} of {n} tasks"
    said, what = f"{fewer}: predictions of such", ", and Shapley values,"
    if none:
        said = (
            f"{fewer}, and none more than {highest}"
            if few
            else (f"No subset has more than {highest} of {n} tasks")
        )
        said, what = f"{said}: predictions of such", ", leave-one-out effects and Shapley values"
    return f"{said}{what} are extrapolated. Their intervals are widened, and may be too narrow yet."


def load_surrogate(path: Any, *, device: torch.device | str = "cpu") -> Surrogate:
    """Read a surrogate written by :meth:`Surrogate.save`.

    Args:
        path: The file.
        device: Where the surrogate lives; answers in the kind ``torch`` come back there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds something else.
    """
    return read_state(path, device, Surrogate.from_state)


def _takes_inexact(tensors: dict[str, Tensor]) -> bool:
    """Whether answers take observed scores not known to be exact: then no ridge was given."""
    return bool(((tensors["own"] > 0) & ~tensors["known"] & ~tensors["apart"]).any())


def _tensors_of(part: Any, names: Sequence[str], prefix: str = "") -> dict[str, Tensor]:
    """Copies of the attributes of these names that are not None."""
    found = {prefix + name: getattr(part, _CALLED.get(name, name)) for name in names}
    return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}


def _mapped_back(
    warps: Iterable[ScoreWarp], masks: Tensor, mean: Tensor, std: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Predictions (l, t) of subsets (l, n) and deviations, with those of warped targets in them."""
    for warp in warps:
        targets = list(warp.targets)
        found, deviation = warp.predict(masks, std is not None)
        mean[:, targets] = found.to(mean)
        if std is not None and deviation is not None:
            std[:, targets] = deviation.to(std)
    return mean, std
