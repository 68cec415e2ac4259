"""Column-wise ranks and correlations of tables, vectorised over targets.

Shapes: tables (l, t); ranks and rows (t, l); correlations (t,).
"""

import torch
from torch import Tensor


def ranks(table: Tensor) -> Tensor:
    """Ranks 1 to l within each column, ties averaged; (l, t) -> (t, l) float64."""
    values, order = table.T.sort(dim=1)
    # Runs of equal values share the mean of their positions. Sums of positions are exact, so this
    # repeats bit for bit; two calls of searchsorted would cost as much as the sort, each.
    runs = torch.zeros_like(order)
    torch.cumsum(values[:, 1:] != values[:, :-1], dim=1, out=runs[:, 1:])
    positions = torch.arange(1, len(table) + 1, dtype=torch.float64, device=table.device)
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    sums.scatter_add_(1, runs, positions.expand_as(values))
    counts.scatter_add_(1, runs, torch.ones_like(values))
    return torch.empty_like(values).scatter_(1, order, (sums / counts).gather(1, runs))


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation of the rows of x and y (t, l), 0 where one is constant; (t,)."""
    x, y = (standardised(rows) for rows in (x, y))
    return (x * y).sum(dim=1).clamp(-1, 1)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman correlation of the columns of x and y (l, t), 0 where one is constant; (t,)."""
    return pearson(ranks(x), ranks(y))


def standardised(rows: Tensor) -> Tensor:
    """Centre each row and scale it to length one; constant rows become zero."""
    constant = (rows.amax(dim=1) == rows.amin(dim=1))[:, None]
    centred = (rows - rows.mean(dim=1, keepdim=True)).masked_fill(constant, 0)
    # Squares of very large or small effects would leave the range of float64.
    centred = centred / centred.abs().amax(dim=1, keepdim=True).masked_fill(constant, 1)
    return centred / centred.norm(dim=1, keepdim=True).masked_fill(constant, 1)
