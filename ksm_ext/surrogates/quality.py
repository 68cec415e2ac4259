"""How well each target is predicted, for the report and the command line alike.

The mean of the other subsets falls where the left-out score rises: its rank correlation with the
scores is -1 by construction, whatever the scores. So a target counts as predicted where the error
is below the variance, the rank correlation above zero, and the fitted function is not constant.

Shapes: scores (m, t); t targets.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ksm_ext.evaluation import lds
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.surrogate import Surrogate
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm

NOTHING = "nothing is predicted: the mean is as good"


@dataclass(frozen=True)
class Quality:
    """How well one target is predicted where it was left out of the fit.

    Attributes:
        how: ``"leave-one-out"``, or ``"cross-validated"`` for lasso.
        error: Mean squared error over the variance of the scores.
        rank_correlation: Spearman correlation of scores and predictions; None where nothing is
            predicted.
        mean_only: Whether the fitted function is constant.
    """

    how: str
    error: float
    rank_correlation: float | None
    mean_only: bool

    @property
    def predicts(self) -> bool:
        """Whether predictions are better than the mean."""
        return self.rank_correlation is not None

    def __str__(self) -> str:
        """Such as ``leave-one-out error 0.050, Spearman correlation 0.970``."""
        error = f"{self.how} error {self.error:.3f}"
        if self.rank_correlation is None:
            return f"{NOTHING} ({error})"
        return f"{error}, Spearman correlation {self.rank_correlation:.3f}"


def qualities(surrogate: Surrogate) -> list[Quality]:
    """The quality of each of the t targets."""
    surrogate = surrogate.with_tensor_answers()
    errors, scores = surrogate.loo_error, surrogate.scores
    both = scores.T, surrogate.residuals.T
    ranks = torch.stack([_rank(*columns) for columns in zip(*both, strict=True)])
    constant = ~_reached(surrogate, [*surrogate.kernel_terms, *surrogate.linear_terms])
    lasso = any(row.kernel == "lasso" and row.num_chosen for row in surrogate.candidates)
    folded = _linear_targets(surrogate) if lasso else ()
    return [
        Quality(
            "cross-validated" if j in folded else "leave-one-out",
            error,
            rank if not constant[j] and says_something(error, rank) else None,
            bool(constant[j]),
        )
        for j, (error, rank) in enumerate(zip(errors.tolist(), ranks.tolist(), strict=True))
    ]


def _rank(scores: Tensor, residuals: Tensor) -> Tensor:
    """() rank correlation of a target with its predictions, over the subsets that have it."""
    seen = ~scores.isnan()
    return lds(scores[seen], (scores - residuals)[seen], constant="zero")[0]


def _linear_targets(surrogate: Surrogate) -> set[int]:
    """The numbers of the targets whose latent columns are predicted by linear weights."""
    columns = {j for term in surrogate.linear_terms for j in term.columns.tolist()}
    if surrogate.rotation is None:
        return columns
    mixing = surrogate.rotation[:, sorted(columns)]  # (t, columns)
    return set((mixing != 0).any(1).nonzero()[:, 0].tolist())


def says_something(error: float, rank_correlation: float) -> bool:
    """Whether predictions of that error and rank correlation are better than the mean."""
    return error < 1 and rank_correlation > 0


def has_interactions(surrogate: Surrogate) -> list[bool]:
    """For each target, whether its fitted function can have interactions."""
    able = [term for term in surrogate.kernel_terms if _interacts(term.kernel)]
    return _reached(surrogate, able).tolist()


def _interacts(kernel: Kernel) -> bool:
    return bool(kernel.decays()) or kernel.overlap_degree > 1


def _reached(surrogate: Surrogate, terms: Iterable[KernelTerm | LinearTerm]) -> Tensor:
    """(t,) bool: the targets that a term moves."""
    found = torch.zeros(len(surrogate.target_names), dtype=torch.bool)
    for term in terms:
        weights = term.dual if isinstance(term, KernelTerm) else term.weights  # (m or n, q_g)
        if surrogate.rotation is None:
            found[term.columns.cpu()] |= (weights != 0).any(0).cpu()
        else:
            found |= (weights @ surrogate.rotation[:, term.columns].T != 0).any(0).cpu()
    return found
