"""The terms of a surrogate: kernel expansions, and weights on tasks.

Shapes: n tasks that vary, m subsets, q_g columns of a term. A column is a target, or a latent
column that is rotated to the targets.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ksm_ext.checks import brief
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.krylov import ConjugateGradients, KrylovRidge
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge

KEPT = 4096
"""Subsets up to which a fit hands on the eigenvectors of one Gram matrix, for intervals: m² numbers
of 8 bytes are 128 MB, which surrogates keep by default; of several kernels, as many numbers in all.
Beyond, the first interval factors anew.
"""


@dataclass(frozen=True, eq=False)
class Factor:
    """What solves for a term, and what it was made of.

    Attributes:
        solver: The factored Gram matrix, or the Krylov space in its place.
        kernel: The kernel.
        masks: (m', n) the subsets that were fitted.
        weights: (m',) their weights; None where all are 1.
        center: Whether an intercept was fitted.
        settings: How conjugate gradients were set, or None.
    """

    solver: SpectralRidge | KrylovRidge
    kernel: Kernel
    masks: Masks
    weights: Tensor | None
    center: bool
    settings: ConjugateGradients | None

    __repr__ = brief

    def is_of(
        self,
        kernel: Kernel,
        masks: Masks,
        weights: Tensor | None,
        center: bool,
        settings: ConjugateGradients | None,
    ) -> bool:
        """Whether it is the factor of these."""
        return (
            (self.kernel, self.center, self.settings) == (kernel, center, settings)
            and (masks is self.masks or _equal(masks.values, self.masks.values))
            and _equal(weights, self.weights)
        )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return all(bool((each == 1).all()) for each in (one, other) if each is not None)
    return one.shape == other.shape and bool((one == other).all())


def factored_alone(
    kernel: Kernel, masks: Masks, weights: Tensor | None, *, center: bool
) -> SpectralRidge:
    """The factor of one kernel of one table, the same bits whoever asks for it.

    In the shapes of a search for a single kernel, whose factor this is; of several that are
    factored together, each may be rounded otherwise.
    """
    weights = None if weights is None else weights[None, None]
    return SpectralRidge(kernel.gram(masks)[None, None], center=center, weights=weights)[0, 0]


@dataclass(frozen=True, eq=False)
class KernelTerm:
    """One kernel and the columns it predicts; everything float64 but the indices.

    Attributes:
        kernel: The kernel, all parameters set.
        columns: (q_g,) int64 columns.
        dual: (m, q_g) coefficients alpha; they sum to zero where an intercept was fitted. Zero for
            columns that a mean or linear weights predict: these have the kernel's uncertainty.
        ridge: (q_g,) ridge of each column.
        signal_variance: (q_g,) prior variance per unit of kernel, for intervals.
        rows: int64 indices of the subsets that were fitted; None for all m.
        weights: (rows,) weight of each fitted subset, whose ridges are ``ridge / weights``; None
            where all are 1.
        nugget_share: (q_g,) share of the ridge that is peculiar to subsets, at weight 1; None
            where noise is not told from it.
        most_noise: (q_g,) the largest variance of noise with which another kernel or ridge predicts
            left-out subsets as well, for intervals; None where noise is known or nothing tells.
        factor: The factored Gram matrix of the fitted subsets, shared by the copies that it is
            right for; None until :meth:`factored` is asked for it. Neither saved nor pickled.
    """

    kernel: Kernel
    columns: Tensor
    dual: Tensor
    ridge: Tensor
    signal_variance: Tensor
    rows: Tensor | None = None
    weights: Tensor | None = None
    nugget_share: Tensor | None = None
    most_noise: Tensor | None = None
    factor: Factor | None = field(default=None, repr=False)

    __repr__ = brief

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
            most_noise=None if self.most_noise is None else self.most_noise[kept],
        )

    def all_weights(self) -> Tensor:
        """(m,) weight of every subset in the fit, 0 for those that are not in it."""
        weights = self.dual.new_zeros(len(self.dual))
        fitted = slice(None) if self.rows is None else self.rows
        weights[fitted] = 1.0 if self.weights is None else self.weights
        return weights

    def factored(
        self, masks: Masks, *, center: bool, solver: ConjugateGradients | None
    ) -> SpectralRidge | KrylovRidge:
        """What solves for the term; made on first use unless the fit handed it on, and kept.

        Args:
            masks: All m subsets, of the tasks that vary.
            center: Whether an intercept was fitted.
            solver: How conjugate gradients are set, or None to factor the Gram matrix.
        """
        masks = masks if self.rows is None else masks[self.rows]
        of = (self.kernel, masks, self.weights, center, solver)
        if self.factor is None or not self.factor.is_of(*of):
            made: SpectralRidge | KrylovRidge
            if solver is None:
                made = factored_alone(self.kernel, masks, self.weights, center=center)
            else:
                options: dict[str, Any] = {"center": center, "weights": self.weights}
                made = KrylovRidge(self.kernel, masks, solver, **options)
            object.__setattr__(self, "factor", Factor(made, *of))
        assert self.factor is not None
        return self.factor.solver

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "factor": None}


@dataclass(frozen=True, eq=False)
class LinearTerm:
    """Weights on tasks (least squares, lasso).

    Attributes:
        columns: (q_g,) int64 columns.
        weights: (n, q_g) float64.
    """

    columns: Tensor
    weights: Tensor

    __repr__ = brief

    def select(self, place: Tensor) -> "LinearTerm":
        """See :meth:`KernelTerm.select`."""
        kept = place[self.columns] >= 0
        return LinearTerm(place[self.columns[kept]], self.weights[:, kept])
