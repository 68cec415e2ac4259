"""How well targets are predicted, and whether the subsets suit a question: for page and commands.

Shapes: n tasks that vary, t targets.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ksm_ext.checks import counted
from ksm_ext.surrogates.extrapolation import SIZES
from ksm_ext.surrogates.options import Readout
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


@dataclass(frozen=True)
class Suitability:
    """Whether the fitted subsets are of the sizes that a readout compares.

    Attributes:
        scored: Of which sizes they are.
        verdict: What follows for the readout.
        suits: Whether they suit it.
    """

    scored: str
    verdict: str
    suits: bool


def suitability(surrogate: Surrogate, readout: Readout) -> Suitability:
    """Compare the sizes of the fitted subsets, 0/1 masks, with those that ``readout`` averages.

    Leave-one-out effects are observed where the full set and all that lack one task were scored;
    Shapley values average over all sizes alike; Banzhaf values over all subsets, of which nearly
    all have about half of the tasks. Only tasks that vary count.
    """
    n = surrogate.num_varying
    sizes = surrogate.masks.values[:, surrogate.varying].sum(1).cpu()
    low, first, third, high = sizes.double().quantile(torch.tensor([0, 0.25, 0.75, 1.0]).double())
    tasks = counted(n, "task") + " that vary" * (n < surrogate.masks.num_tasks)
    scored = f"They have {low:.0f} to {high:.0f} of {tasks}, half of them {first:.0f} to "
    scored += f"{third:.0f}."
    full, lacking = bool((sizes == n).any()), int((sizes == n - 1).sum())
    observed = full and lacking == n
    if observed:
        scored += " The full set is among them, with all subsets that lack one task."
    compared = readout == "loo" and observed
    if len(sizes.unique()) < min(SIZES, n + 1) and surrogate.size_notes and not compared:
        return Suitability(scored, " ".join(surrogate.size_notes), False)
    if readout == "loo":
        verdict = "Leave-one-out effects compare subsets that were scored."
        if not observed:
            verdict = f"{lacking:,} of the {n:,} subsets that lack one task were scored, and the "
            verdict += f"full set was{'' if full else ' not'}: "
            verdict += f"{'the other' if full and lacking else 'all'} effects are predicted."
        return Suitability(scored, verdict, observed)
    few = _few(sizes, n, readout)
    if not few or (readout == "shapley" and observed and int((sizes == 1).sum()) == n):
        return Suitability(scored, f"These sizes suit {readout.capitalize()} values.", True)
    over = "sizes alike" if readout == "shapley" else "subsets"
    verdict = f"Few of them have {' or '.join(few)} of the tasks. {readout.capitalize()} values "
    verdict += f"average over all {over}: theirs are extrapolated, and intervals may be too narrow."
    return Suitability(scored, verdict, False)


def _few(sizes: Tensor, n: int, readout: Readout) -> list[str]:
    """Ranges of sizes over which ``readout`` averages, and of which few subsets are."""
    if readout == "banzhaf":
        parts = {"about half": ((sizes - n / 2).abs() <= math.sqrt(n), 0.25)}
    else:
        parts = {
            "at most a quarter": (sizes <= max(1, n / 4), 0.05),
            "at least three quarters": (sizes >= min(n - 1, 3 * n / 4), 0.05),
        }
    return [part for part, (inside, share) in parts.items() if inside.double().mean() < share]
