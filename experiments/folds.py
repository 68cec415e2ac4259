"""Folds of subsets: each is predicted from a fit to the others, and ranked by itself.

Shapes: tables (m, t), folds the numbers of their rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import rankdata
from torch import Tensor

from ksm_ext import fit_surrogate


def split(num_rows: int, num_folds: int) -> list[Tensor]:
    return list(torch.arange(num_rows).chunk(num_folds))


def from_the_others(folds: list[Tensor], predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """(m, t): ``predict(others, fold)`` of the rows of each fold, given all other rows."""
    rows = torch.cat(folds)
    parts = [predict(rows[~torch.isin(rows, fold)], fold) for fold in folds]
    return torch.cat(parts)[rows.argsort()]


def held_out(masks: Tensor, scores: Tensor, folds: list[Tensor], **options: Any) -> Tensor:
    """(m, t): scores of each fold as a surrogate of the others predicts them."""

    def predict(others: Tensor, fold: Tensor) -> Any:
        return fit_surrogate(masks[others], scores[others], **options).predict(masks[fold])

    return from_the_others(folds, predict)


def centred_ranks(table: Tensor, folds: list[Tensor]) -> Tensor:
    """(m, t) float64: ranks within each column of each fold, less their mean."""
    ranked = torch.zeros_like(table, dtype=torch.float64)
    for fold in folds:
        part = torch.from_numpy(rankdata(table[fold].numpy(), axis=0))
        ranked[fold] = part - part.mean(0)
    return ranked


def lds(true_ranks: Tensor, said_ranks: Tensor) -> float:
    """Spearman's correlation within folds, averaged over them and over targets.

    It is Pearson's of :func:`centred_ranks` over all folds at once; a constant column counts as 0.
    """
    product = (true_ranks * said_ranks).sum(0)
    length = true_ranks.square().sum(0).sqrt() * said_ranks.square().sum(0).sqrt()
    return float(torch.where(length > 0, product / length.clamp(min=1e-30), 0.0).mean())
