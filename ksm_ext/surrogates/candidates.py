"""Everything a fit tried: one row per kernel and ridge, with its leave-one-out error."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from functools import cached_property
from typing import Any

from torch import Tensor

from ksm_ext.checks import brief

_ROUNDED = 1e-12  # what a correlation of zero may come to


@dataclass(frozen=True)
class Candidate:
    """One kernel with one ridge.

    Attributes:
        kernel: The kernel with its parameters, ``"lasso"``, ``"least_squares"`` or ``"mean"``.
        ridge: Number added to the diagonal of the (m, m) Gram matrix, at a subset of weight 1; NaN
            for the mean, least squares and lasso, which has a penalty per target.
        error: Mean over targets of mean squared leave-one-out residuals over the variance of the
            scores (``1 - R^2``), in both of which subsets weigh as in the fit; of residuals of
            5-fold cross-validation for lasso.
        rank_correlation: Mean over targets of the Spearman correlation between scores and
            leave-one-out predictions; over at most 32 evenly spaced targets unless selection
            is by rank.
        num_subsets: Subsets it was judged on; fewer than all where kernels were screened.
        num_chosen: Latent columns (targets, or components of the targets) that it predicts.
    """

    kernel: str
    ridge: float
    error: float
    rank_correlation: float
    num_subsets: int
    num_chosen: int


@dataclass(frozen=True, eq=False)
class Tried:
    """Candidates that were judged together on one table: the columns of their rows.

    Attributes:
        predictors: Kernels, or other predictors by name, with how many rows each has.
        ridges: (C,), see :class:`Candidate`.
        errors: (C,).
        ranks: (C,) rank correlations, or what computes them when they are asked for.
        num_subsets: Subsets that all were judged on.
        num_chosen: (C,) int64.
    """

    predictors: Sequence[tuple[object, int]]
    ridges: Tensor
    errors: Tensor
    ranks: Tensor | Callable[[], Tensor]
    num_subsets: int
    num_chosen: Tensor

    __repr__ = brief

    def rows(self) -> Iterator[Candidate]:
        """The rows, with their rank correlations."""
        labels = [label for each, count in self.predictors for label in [str(each)] * count]
        ranks = self.ranks if isinstance(self.ranks, Tensor) else self.ranks()
        columns = (self.ridges, self.errors, ranks, self.num_chosen)
        each = zip(labels, *(column.tolist() for column in columns), strict=True)
        for label, ridge, error, rank, chosen in each:
            yield Candidate(label, ridge, error, rank, self.num_subsets, chosen)


def beats_the_mean(error: Any, rank_correlation: Any) -> Any:
    """Whether scores left out of a fit are predicted better than by the mean of the others.

    The mean of the other subsets falls where the left-out score rises: its rank correlation with
    the scores is -1 by construction. So the error must be below the variance and the correlation
    above zero, by more than rounding. For numbers, or elementwise.
    """
    return (error < 1) & (rank_correlation > _ROUNDED)


@dataclass(frozen=True, eq=False)
class CandidateTable:
    """Rows of :class:`Candidate`, in the order tried; prints as a table, best first.

    Attributes:
        tried: The candidates, or columns of some.
        score_variance: (t,) float64 unbiased variance of the scores per target, in which errors are
            measured; for a constant target the square of its size, or 1 where that is 0.
    """

    tried: tuple[Candidate | Tried, ...]
    score_variance: Tensor

    __repr__ = brief

    @cached_property
    def rows(self) -> tuple[Candidate, ...]:
        """The candidates; rank correlations are computed when this is first asked for."""
        return tuple(
            row
            for each in self.tried
            for row in (each.rows() if isinstance(each, Tried) else (each,))
        )

    def __iter__(self) -> Iterator[Candidate]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Candidate:
        return self.rows[index]

    @property
    def best(self) -> Candidate:
        """The row with the smallest error among those judged on most subsets."""
        return min(self.rows, key=lambda row: (-row.num_subsets, row.error))

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame."""
        import pandas

        names = [field.name for field in fields(Candidate)]
        return pandas.DataFrame([astuple(row) for row in self.rows], columns=names)

    def __str__(self) -> str:
        """The ridges that were chosen, and the best of every other kernel; smallest error first.

        The chosen one need not have the smallest error: a ridge that stands for less than the
        noise is none to choose, and a simpler kernel that is nearly as good is preferred.
        """
        chosen = [row for row in self.rows if row.num_chosen]
        used = {(row.kernel, row.num_subsets) for row in chosen}
        best: dict[tuple[str, int], Candidate] = {}
        for row in self.rows:
            key = (row.kernel, row.num_subsets)
            if key not in used and (key not in best or row.error < best[key].error):
                best[key] = row
        header = f"{'kernel':<44}{'ridge':>10}{'error':>8}{'rank':>8}{'subsets':>9}{'chosen':>8}"
        lines = [
            f"{row.kernel:<44}{row.ridge:>10.3g}{row.error:>8.3f}{row.rank_correlation:>8.3f}"
            f"{row.num_subsets:>9}{row.num_chosen:>8}"
            for row in sorted([*chosen, *best.values()], key=lambda row: row.error)
        ]
        return "\n".join([header, *lines])
