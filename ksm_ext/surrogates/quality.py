"""How well each target is predicted, for the report and the command line alike.

Shapes: t targets.
"""

from dataclasses import dataclass

from ksm_ext.surrogates.surrogate import Surrogate

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
    """One for each of the t targets."""
    surrogate = surrogate.with_tensor_answers()
    errors, ranks = surrogate.loo_error.tolist(), surrogate.rank_correlations.tolist()
    moved = surrogate.moved_by((*surrogate.kernel_terms, *surrogate.linear_terms)).tolist()
    lasso = any(row.kernel == "lasso" and row.num_chosen for row in surrogate.candidates)
    folded = _linear_targets(surrogate) if lasso else ()
    return [
        Quality(
            "cross-validated" if j in folded else "leave-one-out",
            errors[j],
            ranks[j] if predicted else None,
            not moved[j],
        )
        for j, predicted in enumerate(surrogate.is_predicted.tolist())
    ]


def _linear_targets(surrogate: Surrogate) -> set[int]:
    """The numbers of the targets whose latent columns are predicted by linear weights."""
    columns = {j for term in surrogate.linear_terms for j in term.columns.tolist()}
    if surrogate.rotation is None:
        return columns
    mixing = surrogate.rotation[:, sorted(columns)]  # (t, columns)
    return set((mixing != 0).any(1).nonzero()[:, 0].tolist())


def has_interactions(surrogate: Surrogate) -> list[bool]:
    """Whether the function fitted to each target is one that can have interactions."""
    able = [
        term
        for term in surrogate.kernel_terms
        if term.kernel.products(surrogate.num_varying)
        or max(term.kernel.overlap_degree, term.kernel.size_degree) > 1
    ]
    return surrogate.moved_by(able).tolist()
