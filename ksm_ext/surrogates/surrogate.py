r"""A fitted surrogate: predictions, attributions, interactions and their uncertainty.

.. math:: \hat F(S) = b + u V \Big( \sum_g \sum_a \alpha^{(g)}_a\, k_g(S, S_a) + w^T 1_S \Big)
          + \sum_a s_a\, e_a\, [S = S_a]

Targets are fitted in units u of their own standard deviation, so that none decides another's fit.
They may share kernels through latent columns (V rotates them to targets; without V a latent column
is a target). The last sum is what was observed and the smooth part does not say: e is the residual
of a fitted subset and s the share of it that is peculiar to the subset (the rest is noise).
Everything asked of the surrogate is linear in alpha, w and s e.

**Observed scores in readouts.** ``[S = S_a]`` is the product kernel ``r^h`` with r = 0, so the last
sum has the readouts of :mod:`.readouts` too: where the answer stands in the table, such as
F(all) and F(all but i), the readout is that answer, and Shapley values sum to F(all) - F(none).

**Uncertainty.** f is a Gaussian process with kernel ``sigma^2 k``, and the ridge is the variance of
what is peculiar to a subset together with the noise of its score. For a functional L, ``L_a`` its
weight of subset a, and rho the ridge's peculiar part in units of sigma^2,

.. math:: \mathrm{Var} = \sigma^2 \Big[ L k L^T + \rho \sum_S L_S^2 - z P z^T \Big], \qquad
          z = L K + \rho L,

the posterior variance. Where the noise is unknown, L is restricted to subsets whose scores are
known to be exact, and the others may be as noisy as leave-one-out residuals e:
``+ mean(e^2) sum_a L_a^2``.

Shapes: n tasks, m fitted subsets, l query subsets, t targets, q latent columns; float64 inside.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, Kind, aligned, names_along
from ksm_ext.checks import check_choice, counted, listed, message
from ksm_ext.correlation import spearman
from ksm_ext.surrogates.candidates import CandidateTable, says_something
from ksm_ext.surrogates.kernels import Identity, Kernel
from ksm_ext.surrogates.krylov import ConjugateGradients, KrylovRidge
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.readouts import (
    READOUTS,
    Readout,
    effect_prior_variance,
    effect_tables,
    interaction_prior_variance,
    interaction_tables,
)
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.walsh import walsh_energies

Z95 = 1.959964
"""``value +- Z95 * std`` is a 95 % interval."""


_CHUNK = 2**24  # numbers of a (rows, m) matrix of functionals held at a time: 128 MB
_SHOWN = 6  # targets spelled out in a line


@dataclass(frozen=True, eq=False)
class KernelTerm:
    """One kernel and the latent columns it predicts.

    Attributes:
        kernel: The kernel, all parameters set.
        columns: (q_g,) int64 latent columns.
        dual: (m, q_g) coefficients alpha; they sum to zero where an intercept was fitted. Zero for
            columns that a mean or linear weights predict: these have the kernel's uncertainty.
        ridge: (q_g,) ridge of each column.
        signal_variance: (q_g,) prior variance per unit of kernel, for intervals.
        rows: The subsets that were fitted, int64; None for all m.
        weights: Of these subsets, whose ridges are ``ridge / weights``; None for all 1.
        own: (q_g,) share of the ridge that is peculiar to subsets, at weight 1; None where noise
            is not told from it.
    """

    kernel: Kernel
    columns: Tensor
    dual: Tensor
    ridge: Tensor
    signal_variance: Tensor
    rows: Tensor | None = None
    weights: Tensor | None = None
    own: Tensor | None = None

    def select(self, place: Tensor) -> "KernelTerm":
        """The columns with a ``place`` (q,) of at least 0, moved there."""
        kept = place[self.columns] >= 0
        columns = place[self.columns[kept]]
        return replace(
            self,
            columns=columns,
            dual=self.dual[:, kept],
            ridge=self.ridge[kept],
            signal_variance=self.signal_variance[kept],
        )


@dataclass(frozen=True, eq=False)
class LinearTerm:
    """Weights on tasks (least squares, lasso): columns (q_g,), weights (n, q_g)."""

    columns: Tensor
    weights: Tensor

    def select(self, place: Tensor) -> "LinearTerm":
        """See :meth:`KernelTerm.select`."""
        kept = place[self.columns] >= 0
        return LinearTerm(place[self.columns[kept]], self.weights[:, kept])


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
        rotation: (t, q) from latent columns to targets, or None for the identity.
        center: Whether an intercept was fitted.
        task_names: n names.
        target_names: t names.
        candidates: Every kernel and ridge tried, with its leave-one-out error.
        sharing: ``"shared"``, ``"target"`` or ``"component"``: what has a ridge of its own.
        scores: (m, t) float64 mean scores of the subsets; NaN where missing.
        unit: (t,) standard deviation of the scores, in which the terms are.
        residuals: (m, t) leave-one-out residuals of the mean scores; NaN where missing.
        gaps: (m, t) mean scores minus the smooth part of the surrogate; 0 where missing.
        own: (m, t) in [0, 1]: the share of a gap that readouts take to be peculiar to its subset.
        known: (m, t) bool: scores that are exact.
        noise: (m, t) standard deviation of the mean scores by the noise of runs, or None if that
            is unknown.
        counts: (m, t) int64 runs of every subset.
        apart: (m, t) bool: scores that are no part of the fit (of the empty subset, where that is a
            convention which the other scores do not lead to).
        varying: (n,) bool: tasks that were in some of the subsets and not in others.
        solver: How conjugate gradients were set, or None where the Gram matrix was factored.
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
    scores: Tensor = field(repr=False)
    unit: Tensor = field(repr=False)
    residuals: Tensor = field(repr=False)
    gaps: Tensor = field(repr=False)
    own: Tensor = field(repr=False)
    known: Tensor = field(repr=False)
    noise: Tensor | None = field(repr=False)
    counts: Tensor = field(repr=False)
    apart: Tensor = field(repr=False)
    varying: Tensor = field(repr=False)
    kind: Kind = field(repr=False)
    dtype: torch.dtype = field(repr=False)
    single_target: bool = field(repr=False)
    solver: ConjugateGradients | None = None

    # -- asking ---------------------------------------------------------------------------------

    @property
    def has_intervals(self) -> bool:
        """Whether attributions and interactions come with standard deviations: on 0/1 masks.

        Around a mean, lasso or least squares, they are those of a kernel.
        """
        return self.masks.binary and self._is_covered

    @cached_property
    def _is_covered(self) -> bool:
        """Whether a kernel says how uncertain every latent column is."""
        covered = [column for term in self.kernel_terms for column in term.columns.tolist()]
        return len(set(covered)) == self._num_latent

    def predict(self, masks: ArrayLike, return_std: bool = False, *, observed: bool = False) -> Any:
        """Predicted scores of subsets.

        Smooth: a subset that was fitted is not answered by its own score, except where that is
        known (``known``, no noise, the empty and the full subset); with noise that is given or
        measured, by as much of it as is not noise.

        Args:
            masks: (l, n) in the form of the fitted masks, any array kind. Columns that have names
                are put in the order of ``task_names``. Tasks that never varied are not looked at.
            return_std: Also return the posterior standard deviation of F(S), without the noise of
                a single training run.
            observed: Answer every fitted subset by its own score, as attributions and interactions
                do; they are exactly those of this function.

        Returns:
            (l, t), or the pair of (l, t) predictions and standard deviations.

        Raises:
            ValueError: If ``masks`` has other columns than the fitted masks or is not finite.
        """
        (masks,) = aligned({"masks": (masks, "subset", "task")}, {"task": self.task_names})
        query = self._query(masks)
        mean = self._smooth(query)
        answered = self.own > 0 if observed else self._answered  # (m, t)
        seen = answered.any(1)
        if bool(seen.any()):
            gaps = (answered * self.own * self.gaps)[seen]
            mean = mean + Identity().matmul(query, self._active[seen], gaps)
        axes = {"subset": names_along(masks, 0)}
        if not return_std:
            return self._targets(mean, axes)

        def functionals(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            return self._prediction_functionals(kernel, query[rows], term, answered)

        std = self._std(len(query), functionals)
        rows = self.apart.any(1)
        if bool(rows.any()):  # these scores are what they are
            cells = self.apart[rows].to(torch.float64)
            settled = Identity().matmul(query, self._active[rows], cells)
            std = torch.where(settled > 0, 0.0, std)
        return self._targets(mean, axes), self._targets(std, axes)

    def attribute(self, readout: str = "loo", return_std: bool = False) -> Any:
        r"""How much each task raises each target.

        ``"loo"``: ``F(all) - F(all but i)``. ``"shapley"``: the mean effect of adding task i over
        all orders of the tasks (Shapley 1953). ``"banzhaf"``: its mean effect over all subsets
        (Banzhaf 1965; Wang & Jia 2023, arXiv:2205.15466). All exact for the fitted function with
        the observed scores in it, in ``O(m n t)``; see :mod:`.readouts`. Values keep the
        units and sign of the scores. A task that was in every subset, or in none, has 0.

        For real-valued weights only ``"loo"`` is defined: the fitted function at the mean weights,
        minus at the mean weights with task i at zero and, where all rows share one sum, the rest
        scaled up to that sum.

        Args:
            readout: Which of the three.
            return_std: Also return posterior standard deviations; ``value +- 1.96 std`` is a 95 %
                interval. Fitted by conjugate gradients, each of the n tasks is one more linear
                system and takes ``8 m n`` bytes; the deviations are then never too small.

        Returns:
            (n, t), or the pair of (n, t) attributions and standard deviations.

        Raises:
            ValueError: If ``readout`` is none of the three, or is not defined for weights.
        """
        check_choice("readout", readout, READOUTS)
        if not self.masks.binary:
            return self._attribute_weights(readout, return_std)
        name, n = cast(Readout, readout), self._active.num_tasks
        values = self._rescaled(
            n,
            lambda term: self._effects(term.kernel, term.dual, name),
            lambda term: term.weights,
        )
        values = values + self._effects(Identity(), self.own * self.gaps, name)
        axes = {"task": self.task_names}
        if not return_std:
            return self._targets(self._of_all_tasks(values), axes)

        def functionals(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            prior = effect_prior_variance(kernel, name, n)
            return Functionals(prior, self._effect_functionals(kernel, name)[rows])

        std = self._std(n, functionals)
        return (
            self._targets(self._of_all_tasks(values), axes),
            self._targets(self._of_all_tasks(std), axes),
        )

    def interactions(self, readout: str = "loo", return_std: bool = False) -> Any:
        """Pairwise synergy: how much task i's effect grows when task j is present.

        ``"loo"``: ``F(all) - F(all but i) - F(all but j) + F(all but i, j)``. ``"shapley"`` and
        ``"banzhaf"``: the interaction indices of Grabisch & Roubens 1999. Exact; zero diagonal.

        Args:
            readout: Which of the three.
            return_std: Also return posterior standard deviations (costs ``O(n^2 m^2)``).

        Returns:
            (n, n, t) symmetric, or the pair with standard deviations.

        Raises:
            ValueError: If ``readout`` is none of the three, or the masks are real weights.
        """
        check_choice("readout", readout, READOUTS)
        self._require_masks("interactions")
        name, n = cast(Readout, readout), self._active.num_tasks
        first, second = torch.triu_indices(n, n, 1, device=self.masks.values.device)

        def full(pairs: Tensor) -> Any:
            matrix = pairs.new_zeros(n, n, pairs.shape[1])
            matrix[first, second] = pairs
            matrix[second, first] = pairs
            matrix = self._of_all_tasks(self._of_all_tasks(matrix).transpose(0, 1))
            return self._targets(matrix, {"task": self.task_names, "other_task": self.task_names})

        pairs = self._rescaled(
            len(first),
            lambda term: self._pair_effects(term.kernel, term.dual, name)[first, second],
            lambda term: term.weights.new_zeros(len(first), len(term.columns)),
        )
        pairs = pairs + self._pair_effects(Identity(), self.own * self.gaps, name)[first, second]
        if not return_std:
            return full(pairs)

        def functionals(kernel: Kernel, rows: slice, term: KernelTerm) -> Functionals:
            prior = interaction_prior_variance(kernel, name, n)
            return Functionals(
                prior, self._pair_functionals(kernel, name, first[rows], second[rows])
            )

        return full(pairs), full(self._std(len(first), functionals))

    def walsh_spectrum(self, max_order: int | None = None) -> Any:
        r"""Fraction of the surrogate's variance over all subsets by order of interaction.

        Order d holds the terms of ``F(S) = sum_T c_T prod_{i in T} (2 s_i - 1)`` with ``|T| = d``:
        order 1 is what a linear surrogate could say, the rest is interaction. Of the smooth part.

        Args:
            max_order: Last order reported, by default all n up to 64 tasks and 10 beyond; n counts
                the tasks that vary.

        Returns:
            (max_order, t); row 0 is order 1. Sums to one when ``max_order`` is n. A target whose
            prediction is constant has zeros.

        Raises:
            ValueError: If ``max_order`` is not in 1..n, or the masks are real weights.
        """
        self._require_masks("walsh_spectrum")
        n = self._active.num_tasks
        last = max_order if max_order is not None else (n if n <= 64 else 10)
        if not 1 <= last <= n:
            remedy = "Leave it out for the default."
            raise ValueError(message("max_order", f"between 1 and {n}", str(max_order), remedy))
        banzhaf = self._assemble(
            n,
            lambda term: self._effects(term.kernel, term.dual, "banzhaf"),
            lambda term: term.weights,
        )
        mixtures = [
            (term.kernel, self._rotate_columns(term.dual, term.columns))
            for term in self.kernel_terms
        ]
        energies, total = walsh_energies(
            self._active, mixtures, last, (banzhaf / 2).square().sum(0)
        )
        positive = total > 1e-24  # in units of the variance of the scores
        fractions = torch.where(positive, energies / total.clamp_min(1e-300), 0 * energies)
        return self._targets(fractions, {"order": range(1, last + 1)})

    def with_apart(self, apart: Tensor) -> "Surrogate":
        """The same surrogate with scores (m, t) bool that the fit left out, as values of their own.

        They are what they are where they were observed, and nothing elsewhere.
        """
        rows = apart.any(1).nonzero()[:, 0]
        gaps, residuals = self.gaps.clone(), self.residuals.clone()
        distance = self.scores[rows] - self._smooth(self._active[rows])
        gaps[rows] = torch.where(apart[rows], distance, gaps[rows])
        residuals[rows] = torch.where(apart[rows], distance, residuals[rows])
        own = torch.where(apart, 1.0, self.own)
        return replace(self, gaps=gaps, residuals=residuals, own=own)

    def imagined(self, masks: Masks) -> "Surrogate":
        """A surrogate as uncertain as this one would be with other subsets (m', n) scored, once.

        Its answers are 0: only standard deviations mean something. Where the noise is unknown, they
        are those of the smooth part.
        """
        m, t = len(masks), len(self.unit)
        nothing = self.unit.new_zeros(m, t)
        terms = tuple(
            replace(term, dual=nothing.new_zeros(m, len(term.columns)), rows=None, weights=None)
            for term in self.kernel_terms
        )
        runs = None if self.noise is None else (self.noise.square() * self.counts).mean(0).sqrt()
        return replace(
            self,
            masks=masks,
            kernel_terms=terms,
            scores=nothing,
            residuals=(self._loo_error.sqrt() * self.unit).expand(m, t),
            gaps=nothing,
            own=nothing if runs is None else self.own.mean(0).expand(m, t),
            known=torch.zeros(m, t, dtype=torch.bool, device=nothing.device),
            noise=None if runs is None else runs.expand(m, t),
            counts=torch.ones(m, t, dtype=torch.int64, device=nothing.device),
            apart=torch.zeros(m, t, dtype=torch.bool, device=nothing.device),
        )

    def with_tensor_answers(self) -> "Surrogate":
        """The same surrogate, answering in float64 tensors on the CPU, always with targets."""
        kind = Kind("torch", torch.device("cpu"))
        return replace(self, kind=kind, dtype=torch.float64, single_target=False)

    @property
    def loo_residuals(self) -> Any:
        """Exact leave-one-out residuals ``F_j(S_i)`` minus prediction without subset i, (m, t).

        One row per distinct subset, its mean score left out with all its runs; NaN where a score
        is missing. For ``lasso`` they are those of its 5-fold cross-validation. Fitted by conjugate
        gradients they are estimates: alpha is solved for, its denominator ``P_ii`` measured on
        ``num_probes`` random vectors (:mod:`ksm_ext.surrogates.krylov`).
        """
        return self._targets(self.residuals, {"subset": None})

    @property
    def loo_error(self) -> Any:
        """Mean squared leave-one-out residual over the variance of scores: ``1 - R^2``, (t,).

        Over distinct subsets that were fitted; 1 for constant scores.
        """
        error = self._loo_error
        if self.single_target:
            return self._targets(error[None], {"target": None})[0]
        return self.kind.restore(error.to(self.dtype), {"target": self.target_names})

    @property
    def noise_std(self) -> Any:
        """(t,) standard deviation of a single run, given or measured on repeats; None if unknown.

        The root mean square over subsets.
        """
        if self.noise is None:
            return None
        runs = (self.noise / self.unit).square() * self.counts
        scattered = ((self.counts > 0) & ~self.known).sum(0).clamp_min(1)
        std = self.unit * (runs.sum(0) / scattered).sqrt()
        if self.single_target:
            return self._targets(std[None], {"target": None})[0]
        return self.kind.restore(std.to(self.dtype), {"target": self.target_names})

    @cached_property
    def constant_tasks(self) -> tuple[str, ...]:
        """Names of the tasks that were in every subset or in none: no score tells their effect."""
        varying = set(self._varying_tasks.tolist())
        return tuple(name for i, name in enumerate(self.task_names) if i not in varying)

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
        if bool(self.apart.any()):
            found.append(
                "The score of the empty subset is a value of its own: the other scores do not lead "
                "to it."
            )
        return tuple(found)

    def save(self, path: Any) -> None:
        """Write to ``path`` as safetensors (no pickle); see :func:`ksm_ext.load_surrogate`.

        The file appears whole or not at all: a full disk or a kill leaves an older file as it was.

        Raises:
            OSError: If it cannot be written; the message names the path and the cause.
        """
        from ksm_ext.surrogates.storage import save_surrogate

        save_surrogate(self, path)

    def __str__(self) -> str:
        """Sizes, kernels and leave-one-out error in a line, and warnings."""
        kernels = ", ".join(
            dict.fromkeys(str(term.kernel) for term in self.kernel_terms if bool(term.dual.any()))
        )
        if self.linear_terms:
            kernels = ", ".join(filter(None, [kernels, "linear weights"]))
        errors = self._loo_error
        quality = f"leave-one-out error {float(errors.mean()):.3f} of the variance"
        if len(errors) > 1:
            each = zip(self.target_names, errors.tolist(), strict=True)
            single = listed((f"{name} {error:.3f}" for name, error in each), _SHOWN)
            quality += f", mean over targets ({single})"
        noise = self.noise_std
        if noise is not None:
            shown = torch.as_tensor(np.asarray(noise)).reshape(-1).tolist()
            quality += f", noise of a run {', '.join(f'{value:.3g}' for value in shown[:_SHOWN])}"
        sizes = (len(self.masks), "subset"), (self.masks.num_tasks, "task"), (len(errors), "target")
        line = f"Surrogate of {', '.join(counted(*size) for size in sizes)}: {kernels or 'mean'} "
        line += f"({self.sharing} ridge), {quality}"
        return "\n".join([line, *self.warnings])

    __repr__ = __str__

    # -- assembling -----------------------------------------------------------------------------

    @property
    def _num_latent(self) -> int:
        return len(self.intercept) if self.rotation is None else self.rotation.shape[1]

    @cached_property
    def _loo_error(self) -> Tensor:
        """(t,) see :attr:`loo_error`."""
        squares = (self.residuals / self.unit).square()
        judged = ~squares.isnan() & ~self.apart
        error = torch.where(judged, squares, 0.0).sum(0) / judged.sum(0)
        high = torch.where(judged, self.scores, -torch.inf).amax(0)
        low = torch.where(judged, self.scores, torch.inf).amin(0)
        return torch.where(high > low, error, torch.ones_like(error))

    @cached_property
    def rank_correlations(self) -> Tensor:
        """(t,) Spearman correlation of scores and what predicts them when they are left out.

        0 for a constant prediction.
        """
        pairs = zip(self.scores.T, (self.scores - self.residuals).T, strict=True)
        present = [torch.stack([true, other], 1)[~true.isnan()] for true, other in pairs]
        found = torch.cat([spearman(pair[:, :1], pair[:, 1:]) for pair in present])
        return torch.where(self.moved_by((*self.kernel_terms, *self.linear_terms)), found, 0.0)

    @cached_property
    def is_predicted(self) -> Tensor:
        """(t,) bool: targets whose scores are predicted better than by the mean when left out.

        See :func:`.candidates.says_something`.
        """
        return says_something(self._loo_error, self.rank_correlations)

    def moved_by(self, terms: Iterable[KernelTerm | LinearTerm]) -> Tensor:
        """(t,) bool: targets to whose predictions one of these terms adds anything."""
        moved = torch.zeros_like(self.intercept, dtype=torch.bool)
        for term in terms:
            weights = term.dual if isinstance(term, KernelTerm) else term.weights  # (m or n, q_g)
            moved |= (self._rotate_columns(weights, term.columns) != 0).any(0)
        return moved

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
            return self.own > 0
        ends = self.known
        if self._active.binary:
            sizes = self._active.sizes[:, None]
            ends = ends | (sizes == 0) | (sizes == self._active.num_tasks)
        return ends & (self.own > 0)

    def _smooth(self, query: Masks) -> Tensor:
        """(l, t) predictions of the kernels and linear weights alone."""
        return self.intercept + self._rescaled(
            len(query),
            lambda term: term.kernel.matmul(query, self._active, term.dual),
            lambda term: query.floats @ term.weights,
        )

    def _rotate(self, latent: Tensor) -> Tensor:
        return latent if self.rotation is None else latent @ self.rotation.T

    def _rotate_columns(self, values: Tensor, columns: Tensor) -> Tensor:
        if self.rotation is not None:
            return values @ self.rotation[:, columns].T
        full = values.new_zeros(len(values), self._num_latent)
        full[:, columns] = values
        return full

    def _rescaled(
        self,
        rows: int,
        of_kernel: Callable[[KernelTerm], Tensor],
        of_linear: Callable[[LinearTerm], Tensor],
    ) -> Tensor:
        """(rows, t) in units of the scores, see :meth:`_assemble`."""
        return self.unit * self._assemble(rows, of_kernel, of_linear)

    def _assemble(
        self,
        rows: int,
        of_kernel: Callable[[KernelTerm], Tensor],
        of_linear: Callable[[LinearTerm], Tensor],
    ) -> Tensor:
        """(rows, t) from each term's (rows, q_g)."""
        latent = torch.zeros(rows, self._num_latent, dtype=torch.float64)
        latent = latent.to(self.masks.values.device)
        for kernel_term in self.kernel_terms:
            if bool(kernel_term.dual.any()):
                latent[:, kernel_term.columns] += of_kernel(kernel_term)
        for linear_term in self.linear_terms:
            latent[:, linear_term.columns] += of_linear(linear_term)
        return self._rotate(latent)

    def _targets(self, values: Tensor, axes: Mapping[str, Sequence[Any] | None]) -> Any:
        """(..., t) float64 as the caller's kind and dtype, without t for (m,) scores."""
        values = values.to(self.dtype)
        if self.single_target:
            return self.kind.restore(values[..., 0], axes)
        return self.kind.restore(values, {**axes, "target": self.target_names})

    def _query(self, masks: ArrayLike) -> Masks:
        query = Masks.of(masks, num_tasks=self.masks.num_tasks).to(self.masks.values.device)
        if len(self._varying_tasks) < self.masks.num_tasks:
            query = Masks(query.values[:, self._varying_tasks])
        return query if self.masks.binary == query.binary else query.as_weights()

    def _require_masks(self, what: str) -> None:
        if not self.masks.binary:
            found = "real-valued weights"
            remedy = "Use predict, or attribute('loo')."
            raise ValueError(message("masks", f"0/1 for {what}", found, remedy))

    # -- kernel terms ---------------------------------------------------------------------------

    @cached_property
    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Distinct subset sizes (C,) on the CPU, and each subset's index into them (m,)."""
        sizes, index = torch.unique(self._active.sizes, return_inverse=True)
        return sizes.cpu(), index

    def _effects(self, kernel: Kernel, dual: Tensor, readout: Readout) -> Tensor:
        """(n, q) of ``sum_a dual_a k(., S_a)``: two tables and one product with the masks."""
        sizes, index = self._sizes
        tables = effect_tables(kernel, readout, self._active.num_tasks, sizes)
        inside, outside = (
            table.to(index.device)[index][:, None] * dual
            for table in (tables.inside, tables.outside)
        )  # (m, q)
        return self._active.transposed_matmul(inside - outside) + outside.sum(0)

    def _effect_functionals(self, kernel: Kernel, readout: Readout) -> Tensor:
        """(n, m): the readout of ``k(., S_a)`` for every task i and fitted subset a."""
        sizes, index = self._sizes
        tables = effect_tables(kernel, readout, self._active.num_tasks, sizes)
        inside, outside = (t.to(index.device)[index] for t in (tables.inside, tables.outside))
        return torch.where(self._active.values, inside[:, None], outside[:, None]).T

    def _pair_effects(self, kernel: Kernel, dual: Tensor, readout: Readout) -> Tensor:
        """(n, n, q): three tables and products with the masks; the diagonal is meaningless."""
        sizes, index = self._sizes
        tables = interaction_tables(kernel, readout, self._active.num_tasks, sizes)
        both, one, neither = (
            table.to(index.device)[index][:, None] * dual
            for table in (tables.both, tables.one, tables.neither)
        )  # (m, q)
        # s s' both + (s + s' - 2 s s') one + (1 - s)(1 - s') neither, summed over subsets
        products = self._active.weighted_gram(both - 2 * one + neither)
        single = self._active.transposed_matmul(one - neither)  # (n, q)
        return products + single[:, None] + single[None] + neither.sum(0)

    def _pair_functionals(
        self, kernel: Kernel, readout: Readout, first: Tensor, second: Tensor
    ) -> Tensor:
        """(pairs, m): the interaction of ``k(., S_a)``."""
        sizes, index = self._sizes
        tables = interaction_tables(kernel, readout, self._active.num_tasks, sizes)
        by_count = torch.stack([tables.neither, tables.one, tables.both])  # (3, C)
        w = self._active.values.to(torch.int64)
        return by_count.to(index.device)[w[:, first] + w[:, second], index[:, None]].T

    def _prediction_functionals(
        self, kernel: Kernel, query: Masks, term: KernelTerm, answered: Tensor
    ) -> "Functionals":
        """``F(S)`` of some subsets.

        With an intercept, ``F(S)`` is taken relative to the mean score, which has residuals of its
        own, that of S perhaps among them: their variance is ridge / sum of weights.
        """
        rows = kernel.gram(query, self._active)  # (l, m)
        prior = kernel.diagonal(query)
        if isinstance(kernel, Identity):
            return Functionals(prior, rows * answered.any(1))
        if not self.center:
            return Functionals(prior, rows)
        weights = self._weights(term)
        share = weights / weights.sum()  # (m,)
        mean = kernel.matmul(self._active, None, share[:, None])[:, 0]
        prior = prior - 2 * rows @ share + share @ mean
        return Functionals(prior, rows - mean, rows.new_ones(len(rows), 1))

    # -- uncertainty ----------------------------------------------------------------------------

    def _weights(self, term: KernelTerm) -> Tensor:
        """(m,) of all subsets in the fit of a term, 0 for those that are not in it."""
        weights = self.intercept.new_zeros(len(self.masks))
        weights[slice(None) if term.rows is None else term.rows] = (
            1.0 if term.weights is None else term.weights
        )
        return weights

    @cached_property
    def _factors(self) -> list[SpectralRidge | KrylovRidge]:
        """What solves for each kernel term; prepared anew on first use."""
        factors: list[SpectralRidge | KrylovRidge] = []
        for term in self.kernel_terms:
            masks = self._active if term.rows is None else self._active[term.rows]
            options: dict[str, Any] = {"center": self.center, "weights": term.weights}
            if self.solver is None:
                factors.append(SpectralRidge(term.kernel.gram(masks), **options))
            else:
                factors.append(KrylovRidge(term.kernel, masks, self.solver, **options))
        return factors

    def _std(
        self, count: int, functionals: Callable[[Kernel, slice, KernelTerm], "Functionals"]
    ) -> Tensor:
        """(count, t) posterior standard deviations in units of the scores, some rows at a time."""
        if not self._is_covered:
            remedy = "Fit the scores again: this version has intervals for every surrogate."
            found = "a surrogate saved without the uncertainty of a mean, lasso or least squares"
            raise ValueError(message("return_std", "False for this surrogate", found, remedy))
        step = max(1, _CHUNK // max(len(self.masks), 1))
        # what is not known to be exact may all be noise, as far as leaving out can tell
        doubtful = (self.own > 0) & ~self.known & ~self.apart  # (m, t)
        parts = []
        for start in range(0, count, step):
            rows = slice(start, min(start + step, count))
            latent = self.unit.new_zeros(rows.stop - rows.start, self._num_latent)
            for term, factor in zip(self.kernel_terms, self._factors, strict=True):
                smooth, seen = (
                    functionals(kernel, rows, term) for kernel in (term.kernel, Identity())
                )
                latent[:, term.columns] = self._variance(term, factor, smooth, seen)
            variance = latent if self.rotation is None else latent @ self.rotation.square().T
            if self.noise is None:
                doubt = seen.of_fitted.square() @ doubtful.to(torch.float64)
                variance = variance + self._loo_error * doubt
            parts.append(self.unit * variance.sqrt())
        return torch.cat(parts) if parts else self.unit.new_zeros(0, len(self.unit))

    def _variance(
        self,
        term: KernelTerm,
        factor: SpectralRidge | KrylovRidge,
        smooth: "Functionals",
        seen: "Functionals",
    ) -> Tensor:
        """(rows, q_g) of the module's head, the term's columns, but for doubt in the scores."""
        fitted = slice(None) if term.rows is None else term.rows
        weights = self._weights(term)[fitted]
        rows, prior, on_mean = self._without_apart(term, smooth, seen)
        if term.own is None:  # all of the ridge of a score that is known, and nothing of others
            own_ridge = term.ridge
            known = (self.known | (self.counts == 0)).all(1) & self.known.any(1)
            exact = seen.of_fitted[:, fitted] * (known[fitted] / weights)
            others = (exact * seen.of_fitted[:, fitted]).sum(1, keepdim=True)
        else:
            own_ridge = term.ridge * term.own
            exact = seen.of_fitted[:, fitted]  # L_a
            left = self.apart.any(1) & (self._weights(term) == 0)  # these scores are settled
            others = seen.prior_column() - seen.of_fitted[:, left].square().sum(1, keepdim=True)
        if on_mean is not None:  # the mean score has a residual, with parts of these scores in it
            share = weights / weights.sum()
            prior = prior + on_mean.square() * term.ridge / weights.sum()
            prior = prior - 2 * own_ridge * on_mean * (exact @ share)[:, None]
        explained = factor.explained_variance(rows[:, fitted], term.ridge, exact, own_ridge)
        variance = (prior + own_ridge * others - explained).clamp_min(0.0) * term.signal_variance
        if term.own is None:
            return variance
        # a ridge shared with others may stand for less than the noise of a target
        noise = self._noise(term)[fitted]  # (rows, q_g)
        level = (weights[:, None] * noise).mean(0)
        counted = (term.ridge - own_ridge) * term.signal_variance
        missed = (1 - counted / level.clamp_min(1e-300)).clamp(0.0, 1.0)
        missed = torch.where(missed > 1e-6, missed, 0.0) * (level > 0)
        if not bool(missed.any()):
            return variance
        rest = missed * noise
        return variance + factor.noise_gain(rows[:, fitted], term.ridge, exact, own_ridge, rest)

    def _noise(self, term: KernelTerm) -> Tensor:
        """(m, q_g) known variance of the noise of each score, of the columns of a term."""
        assert self.noise is not None
        squares = (self.noise / self.unit).square()
        if self.rotation is not None:
            squares = squares @ self.rotation.square()
        return squares[:, term.columns]

    def _without_apart(
        self, term: KernelTerm, smooth: "Functionals", seen: "Functionals"
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``L K``, ``L k L^T`` and the part of the mean score, without what was set apart.

        The score of an empty subset that was set apart is what it is: only the rest of L is
        uncertain. That no longer ignores constants, so it is taken relative to the mean score.
        """
        rows, prior, on_mean = smooth.of_fitted, smooth.prior_column(), smooth.on_mean
        if term.rows is None or on_mean is not None:
            return rows, prior, on_mean
        left = torch.ones(len(self.masks), dtype=torch.bool, device=rows.device)
        left[term.rows] = False
        weights = self._weights(term)
        share = (weights / weights.sum())[:, None] * float(self.center)  # (m, 1)
        for place in (left & self.apart.any(1)).nonzero()[:, 0].tolist():
            point = self._active[place : place + 1]
            weight = seen.of_fitted[:, place, None]
            mean = term.kernel.matmul(self._active, None, share)  # (m, 1)
            moved = mean.T - term.kernel.gram(point, self._active)  # (1, m), of mean minus point
            change = rows @ share - rows[:, place, None]
            size = moved @ share - moved[:, place, None]
            prior = prior + 2 * weight * change + weight.square() * size
            rows = rows + weight * moved
            on_mean = -weight if self.center else None
        return rows, prior, on_mean

    def _attribute_weights(self, readout: str, return_std: bool) -> Any:
        if readout != "loo" or return_std:
            expected = "'loo' without return_std for real-valued weights"
            found = f"{readout!r}" + (" with return_std" if return_std else "")
            remedy = "Shapley and Banzhaf values need 0/1 masks."
            raise ValueError(message("readout", expected, found, remedy))
        mean = self._active.floats.mean(0)  # (n,)
        without = mean.repeat(len(mean), 1)
        without.fill_diagonal_(0.0)
        sums = self._active.floats.sum(1)
        if float(sums.max() - sums.min()) < 0.02 * float(sums.mean().abs()):  # rounded shares
            without *= mean.sum() / without.sum(1, keepdim=True).clamp_min(1e-300)
        points = Masks(torch.cat([mean[None], without]))
        values = self._smooth(points)
        effects = self._of_all_tasks(values[:1] - values[1:])
        return self._targets(effects, {"task": self.task_names})


@dataclass(frozen=True, eq=False)
class Functionals:
    """Linear functionals L of the surrogate's kernel, a row each.

    Attributes:
        prior: ``L k L^T``, a number or (rows,).
        of_fitted: (rows, m) ``L K``; for :class:`Identity`, the weight of each fitted subset.
        on_mean: (rows, 1) how much of the mean score was taken out of L, where L does not ignore
            constants.
    """

    prior: float | Tensor
    of_fitted: Tensor
    on_mean: Tensor | None = None

    def prior_column(self) -> Tensor:
        """(rows, 1)."""
        prior = torch.as_tensor(self.prior, dtype=torch.float64, device=self.of_fitted.device)
        return prior.expand(len(self.of_fitted))[:, None]
