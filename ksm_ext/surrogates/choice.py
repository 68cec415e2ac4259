"""What is chosen, a trial and a ridge for every latent column, and the model that it amounts to.

Shapes: m subsets, t targets, q latent columns (targets, or principal components of the targets);
scores standardised, float64.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ksm_ext.surrogates.judgement import Scores
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm
from ksm_ext.surrogates.trials import KernelTrial, Trial

Sharing = Literal["shared", "target", "component"]
"""Whether all targets share one kernel and ridge, or each has its own, or each component has."""

Term = TypeVar("Term", KernelTerm, LinearTerm)


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
            yield (
                self.trials[index],
                self.trials[index].judgement.ridges[self.ridge[columns]],
                columns,
            )

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


def solve(choice: Choice, scores: Scores, companion: KernelTrial | None = None) -> Model:
    """The model of a choice.

    ``companion`` lends its uncertainty to columns that no kernel predicts: the posterior of a
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
        elif companion is not None:
            kernel_terms.append(companion.uncertainty(columns, components=choice.components))
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
