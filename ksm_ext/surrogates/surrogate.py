r"""A fitted surrogate: predictions, attributions, interactions and their uncertainty.

.. math:: \hat F(S) = b + V \sum_g \sum_a \alpha^{(g)}_a\, k_g(S, S_a) \quad (+\; V w^T 1_S)

Targets may share kernels through latent columns (V rotates them to targets; without V a latent
column is a target). Everything asked of the surrogate is linear in alpha and w.

Shapes: n tasks, m fitted subsets, l query subsets, t targets, q latent columns; float64 inside.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, Kind, aligned, names_along
from ksm_ext.checks import check_choice, message
from ksm_ext.kernels import Kernel
from ksm_ext.masks import Masks
from ksm_ext.readouts import (
    READOUTS,
    Readout,
    effect_prior_variance,
    effect_tables,
    interaction_prior_variance,
    interaction_tables,
)
from ksm_ext.surrogates.candidates import CandidateTable
from ksm_ext.surrogates.krylov import ConjugateGradients, KrylovRidge
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.walsh import walsh_energies

Z95 = 1.959964
"""``value +- Z95 * std`` is a 95 % interval."""


@dataclass(frozen=True, eq=False)
class KernelTerm:
    """One kernel and the latent columns it predicts.

    Attributes:
        kernel: The kernel, all parameters set.
        columns: (q_g,) int64 latent columns.
        dual: (m, q_g) coefficients alpha; they sum to zero where an intercept was fitted.
        ridge: (q_g,) ridge of each column.
        signal_variance: (q_g,) prior variance per unit of kernel, for intervals.
    """

    kernel: Kernel
    columns: Tensor
    dual: Tensor
    ridge: Tensor
    signal_variance: Tensor


@dataclass(frozen=True, eq=False)
class LinearTerm:
    """Weights on tasks (least squares, lasso): columns (q_g,), weights (n, q_g)."""

    columns: Tensor
    weights: Tensor


@dataclass(frozen=True, eq=False)
class Surrogate:
    """What :func:`ksm_ext.fit_surrogate` returns.

    Answers have the array kind, device and dtype of the scores it was fitted to; for scores of
    shape (m,) the target dimension is dropped everywhere.

    Attributes:
        masks: The fitted subsets.
        intercept: (t,) float64.
        kernel_terms: Kernel expansions.
        linear_terms: Linear expansions.
        rotation: (t, q) from latent columns to targets, or None for the identity.
        center: Whether an intercept was fitted.
        task_names: n names.
        target_names: t names.
        candidates: Every kernel and ridge tried, with its leave-one-out error.
        sharing: ``"shared"``, ``"target"`` or ``"component"``: what has a ridge of its own.
        scores: (m, t) float64 scores it was fitted to.
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
    residuals: Tensor = field(repr=False)
    kind: Kind = field(repr=False)
    dtype: torch.dtype = field(repr=False)
    single_target: bool = field(repr=False)
    solver: ConjugateGradients | None = None

    # -- asking ---------------------------------------------------------------------------------

    @property
    def has_intervals(self) -> bool:
        """Whether attributions and interactions come with standard deviations.

        They do for kernels on 0/1 masks; not for lasso, least squares, a mean, or real weights.
        """
        return self.masks.binary and bool(self.kernel_terms) and not self.linear_terms

    def predict(self, masks: ArrayLike, return_std: bool = False) -> Any:
        """Predicted scores of subsets.

        Args:
            masks: (l, n) in the form of the fitted masks, any array kind. Columns that have names
                are put in the order of ``task_names``.
            return_std: Also return the posterior standard deviation of F(S), without the noise of
                a single training run.

        Returns:
            (l, t), or the pair of (l, t) predictions and standard deviations.

        Raises:
            ValueError: If ``masks`` has other columns than the fitted masks or is not finite.
        """
        (masks,) = aligned({"masks": (masks, "subset", "task")}, {"task": self.task_names})
        query = self._query(masks)
        mean = self._assemble(
            len(query),
            lambda term: term.kernel.matmul(query, self.masks, term.dual),
            lambda term: query.floats @ term.weights,
        )
        mean = mean + self.intercept
        axes = {"subset": names_along(masks, 0)}
        if not return_std:
            return self._targets(mean, axes)
        variance = self._variance(lambda term: self._prediction_functionals(term, query))
        return self._targets(mean, axes), self._targets(variance.sqrt(), axes)

    def attribute(self, readout: str = "loo", return_std: bool = False) -> Any:
        r"""How much each task raises each target.

        ``"loo"``: ``F(all) - F(all but i)``. ``"shapley"``: the mean effect of adding task i over
        all orders of the tasks (Shapley 1953). ``"banzhaf"``: its mean effect over all subsets
        (Banzhaf 1965; Wang & Jia 2023, arXiv:2205.15466). All exact for the fitted function, in
        ``O(m n t)``; see :mod:`ksm_ext.readouts`. Values keep the units and sign of the scores.

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
        name, n = cast(Readout, readout), self.masks.num_tasks
        values = self._assemble(
            n,
            lambda term: self._effects(term, name),
            lambda term: term.weights,
        )
        if not return_std:
            return self._targets(values, {"task": self.task_names})
        variance = self._variance(
            lambda term: (
                effect_prior_variance(term.kernel, name, n),
                self._effect_functionals(term.kernel, name),
            )
        )
        return (
            self._targets(values, {"task": self.task_names}),
            self._targets(variance.sqrt(), {"task": self.task_names}),
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
        name, n = cast(Readout, readout), self.masks.num_tasks
        first, second = torch.triu_indices(n, n, 1, device=self.masks.values.device)

        def full(pairs: Tensor) -> Any:
            matrix = pairs.new_zeros(n, n, pairs.shape[1])
            matrix[first, second] = pairs
            matrix[second, first] = pairs
            axes = {"task": self.task_names, "other_task": self.task_names}
            return self._targets(matrix, axes)

        latent = torch.zeros(len(first), self._num_latent, dtype=torch.float64)
        latent = latent.to(self.masks.values.device)
        for term in self.kernel_terms:
            latent[:, term.columns] = self._pair_effects(term, name)[first, second]
        values = full(self._rotate(latent))
        if not return_std:
            return values
        variance = self._variance(
            lambda term: (
                interaction_prior_variance(term.kernel, name, n),
                self._pair_functionals(term.kernel, name, first, second),
            )
        )
        return values, full(variance.sqrt())

    def walsh_spectrum(self, max_order: int | None = None) -> Any:
        r"""Fraction of the surrogate's variance over all subsets by order of interaction.

        Order d holds the terms of ``F(S) = sum_T c_T prod_{i in T} (2 s_i - 1)`` with ``|T| = d``:
        order 1 is what a linear surrogate could say, the rest is interaction.

        Args:
            max_order: Last order reported, by default all n up to 64 tasks and 10 beyond.

        Returns:
            (max_order, t); row 0 is order 1. Sums to one when ``max_order`` is n. A target whose
            prediction is constant has zeros.

        Raises:
            ValueError: If ``max_order`` is not in 1..n, or the masks are real weights.
        """
        self._require_masks("walsh_spectrum")
        n = self.masks.num_tasks
        last = max_order if max_order is not None else (n if n <= 64 else 10)
        if not 1 <= last <= n:
            remedy = "Leave it out for the default."
            raise ValueError(message("max_order", f"between 1 and {n}", str(max_order), remedy))
        banzhaf = self._assemble(
            n, lambda term: self._effects(term, "banzhaf"), lambda term: term.weights
        )
        mixtures = [
            (term.kernel, self._rotate_columns(term.dual, term.columns))
            for term in self.kernel_terms
        ]
        energies, total = walsh_energies(self.masks, mixtures, last, (banzhaf / 2).square().sum(0))
        positive = total > 1e-24 * (self._score_variance + self.intercept.square())
        fractions = torch.where(positive, energies / total.clamp_min(1e-300), 0 * energies)
        return self._targets(fractions, {"order": range(1, last + 1)})

    def with_tensor_answers(self) -> "Surrogate":
        """The same surrogate, answering in float64 tensors on the CPU, always with targets."""
        kind = Kind("torch", torch.device("cpu"))
        return replace(self, kind=kind, dtype=torch.float64, single_target=False)

    @property
    def loo_residuals(self) -> Any:
        """Exact leave-one-out residuals ``F_j(S_i)`` minus prediction without subset i, (m, t).

        For ``lasso`` they are those of its 5-fold cross-validation. Fitted by conjugate gradients
        they are estimates: alpha is solved for, its denominator ``P_ii`` measured on
        ``num_probes`` random vectors (:mod:`ksm_ext.surrogates.krylov`).
        """
        return self._targets(self.residuals, {"subset": None})

    @property
    def loo_error(self) -> Any:
        """Mean squared leave-one-out residual over the variance of scores: ``1 - R^2``, (t,)."""
        variance = self._score_variance
        error = self.residuals.square().mean(0) / variance.clamp_min(1e-300)
        error = torch.where(variance > 0, error, torch.ones_like(error))
        if self.single_target:
            return self._targets(error[None], {"target": None})[0]
        return self.kind.restore(error.to(self.dtype), {"target": self.target_names})

    def save(self, path: Any) -> None:
        """Write to ``path`` as safetensors (no pickle); see :func:`ksm_ext.load_surrogate`.

        The file appears whole or not at all: a full disk or a kill leaves an older file as it was.

        Raises:
            OSError: If it cannot be written; the message names the path and the cause.
        """
        from ksm_ext.surrogates.storage import save_surrogate

        save_surrogate(self, path)

    def __str__(self) -> str:
        """One line: sizes, kernels, leave-one-out error."""
        kernels = ", ".join(dict.fromkeys(str(term.kernel) for term in self.kernel_terms))
        if self.linear_terms:
            kernels = ", ".join(filter(None, [kernels, "linear weights"]))
        error = self.residuals.square().sum() / (self._score_variance.sum() * len(self.masks))
        return (
            f"Surrogate of {len(self.masks)} subsets, {self.masks.num_tasks} tasks, "
            f"{len(self.intercept)} targets: {kernels or 'mean'} ({self.sharing} ridge), "
            f"leave-one-out error {float(error):.3f} of the variance"
        )

    # -- assembling -----------------------------------------------------------------------------

    @property
    def _num_latent(self) -> int:
        return len(self.intercept) if self.rotation is None else self.rotation.shape[1]

    @cached_property
    def _score_variance(self) -> Tensor:
        """(t,) unbiased variance of the fitted scores, from the candidates' table."""
        return self.candidates.score_variance.to(self.intercept.device)

    def _rotate(self, latent: Tensor) -> Tensor:
        return latent if self.rotation is None else latent @ self.rotation.T

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
        latent = torch.zeros(rows, self._num_latent, dtype=torch.float64)
        latent = latent.to(self.masks.values.device)
        for kernel_term in self.kernel_terms:
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
        sizes, index = torch.unique(self.masks.sizes, return_inverse=True)
        return sizes.cpu(), index

    def _effects(self, term: KernelTerm, readout: Readout) -> Tensor:
        """(n, q_g): two tables and one product with the masks."""
        sizes, index = self._sizes
        tables = effect_tables(term.kernel, readout, self.masks.num_tasks, sizes)
        inside, outside = (
            table.to(index.device)[index][:, None] * term.dual
            for table in (tables.inside, tables.outside)
        )  # (m, q_g)
        return self.masks.transposed_matmul(inside - outside) + outside.sum(0)

    def _effect_functionals(self, kernel: Kernel, readout: Readout) -> Tensor:
        """(n, m): the readout of ``k(., S_a)`` for every task i and fitted subset a."""
        sizes, index = self._sizes
        tables = effect_tables(kernel, readout, self.masks.num_tasks, sizes)
        inside, outside = (t.to(index.device)[index] for t in (tables.inside, tables.outside))
        return torch.where(self.masks.values, inside[:, None], outside[:, None]).T

    def _pair_effects(self, term: KernelTerm, readout: Readout) -> Tensor:
        """(n, n, q_g): three tables and products with the masks; the diagonal is meaningless."""
        sizes, index = self._sizes
        tables = interaction_tables(term.kernel, readout, self.masks.num_tasks, sizes)
        both, one, neither = (
            table.to(index.device)[index][:, None] * term.dual
            for table in (tables.both, tables.one, tables.neither)
        )  # (m, q_g)
        # s s' both + (s + s' - 2 s s') one + (1 - s)(1 - s') neither, summed over subsets
        products = self.masks.weighted_gram(both - 2 * one + neither)
        single = self.masks.transposed_matmul(one - neither)  # (n, q_g)
        return products + single[:, None] + single[None] + neither.sum(0)

    def _pair_functionals(
        self, kernel: Kernel, readout: Readout, first: Tensor, second: Tensor
    ) -> Tensor:
        """(pairs, m): the interaction of ``k(., S_a)``."""
        sizes, index = self._sizes
        tables = interaction_tables(kernel, readout, self.masks.num_tasks, sizes)
        by_count = torch.stack([tables.neither, tables.one, tables.both])  # (3, C)
        w = self.masks.values.to(torch.int64)
        return by_count.to(index.device)[w[:, first] + w[:, second], index[:, None]].T

    # -- uncertainty ----------------------------------------------------------------------------

    @cached_property
    def _factors(self) -> list[SpectralRidge | KrylovRidge]:
        """What solves for each kernel term; prepared anew on first use."""
        if self.solver is not None:
            return [
                KrylovRidge(term.kernel, self.masks, self.solver, center=self.center)
                for term in self.kernel_terms
            ]
        grams = (term.kernel.gram(self.masks) for term in self.kernel_terms)
        return [SpectralRidge(gram, center=self.center) for gram in grams]

    def _variance(
        self, functionals: Callable[[KernelTerm], tuple[float | Tensor, Tensor]]
    ) -> Tensor:
        """(rows, t) posterior variance of functionals given as (prior variance, L K)."""
        if self.linear_terms:
            remedy = "Fit with kernel=['linear', 'rbf', 'exponential'] for intervals."
            found = "a least-squares or lasso surrogate"
            raise ValueError(message("return_std", "False for this surrogate", found, remedy))
        latent: Tensor | None = None
        for term, factor in zip(self.kernel_terms, self._factors, strict=True):
            prior, rows = functionals(term)
            if latent is None:
                latent = rows.new_zeros(len(rows), self._num_latent)
            explained = factor.explained_variance(factor.centred(rows), term.ridge)
            remaining = (prior - explained).clamp_min(0.0)  # (rows, q_g)
            latent[:, term.columns] = remaining * term.signal_variance
        if latent is None:  # every target is predicted by its mean
            raise ValueError(
                message(
                    "return_std",
                    "False where every target is predicted by its mean",
                    "no kernel that beats it",
                    "Score more subsets.",
                )
            )
        return latent if self.rotation is None else latent @ self.rotation.square().T

    def _prediction_functionals(self, term: KernelTerm, query: Masks) -> tuple[Tensor, Tensor]:
        """Prior variance (l, 1 or q_g) and ``L K`` of ``F(S)``.

        With an intercept, ``F(S)`` is taken relative to the mean score, whose own noise is ridge /
        m.
        """
        rows = term.kernel.gram(query, self.masks)  # (l, m)
        prior = term.kernel.diagonal(query)
        if not self.center:
            return prior[:, None], rows
        constant = rows.new_full((len(self.masks), 1), 1 / len(self.masks))
        gram_row_mean = term.kernel.matmul(self.masks, None, constant)[:, 0]
        prior = prior - 2 * rows.mean(1) + gram_row_mean.mean()
        return prior[:, None] + term.ridge / len(self.masks), rows - gram_row_mean

    def _attribute_weights(self, readout: str, return_std: bool) -> Any:
        if readout != "loo" or return_std:
            expected = "'loo' without return_std for real-valued weights"
            found = f"{readout!r}" + (" with return_std" if return_std else "")
            remedy = "Shapley and Banzhaf values need 0/1 masks."
            raise ValueError(message("readout", expected, found, remedy))
        mean = self.masks.floats.mean(0)  # (n,)
        without = mean.repeat(len(mean), 1)
        without.fill_diagonal_(0.0)
        sums = self.masks.floats.sum(1)
        if float(sums.max() - sums.min()) < 0.02 * float(sums.mean().abs()):  # rounded shares
            without *= mean.sum() / without.sum(1, keepdim=True).clamp_min(1e-300)
        points = Masks(torch.cat([mean[None], without]))
        values = self._assemble(
            len(mean) + 1,
            lambda term: term.kernel.matmul(points, self.masks, term.dual),
            lambda term: points.floats @ term.weights,
        )
        return self._targets(values[:1] - values[1:], {"task": self.task_names})
