"""Column-wise ranks and correlations of tables, vectorised over targets.

Shapes: tables (l, t); ranks and rows (t, l); correlations (t,).
"""

import torch
from torch import Tensor

_TIED_UNITS = 16  # in the last place of a column's largest value: what sums of tasks err by


def resolution(table: Tensor) -> Tensor:
    """Differences (t,) within the columns of (l, t) that are rounding and no more.

    Sixteen units in the last place of the column's largest value, of float32 where the table is
    that. Half precision counts as exact: what is stored in it was rounded once, after its sums.
    """
    eps = torch.finfo(torch.float32 if table.dtype == torch.float32 else torch.float64).eps
    return _TIED_UNITS * eps * table.double().abs().amax(dim=0)


def is_constant(table: Tensor) -> Tensor:
    """Which columns (t,) of (l, t) vary by rounding alone."""
    return table.double().amax(dim=0) - table.double().amin(dim=0) <= resolution(table)


def ranks(table: Tensor) -> Tensor:
    """Ranks 1 to l within each column, ties averaged; (l, t) -> (t, l) float64.

    Values that differ by rounding alone tie: those within :func:`resolution` of each other, where
    they are farther than it from all others. Where values lie closer than it one after another,
    further than it together, none of their differences is called rounding.
    """
    values, order = table.double().T.sort(dim=1)
    tie = resolution(table)[:, None]
    steps = values.diff(dim=1)
    apart = steps > tie
    if not torch.equal(apart, steps > 0):
        runs = _numbered(apart)
        widths = torch.zeros_like(values).scatter_add_(1, runs[:, 1:], steps.masked_fill(apart, 0))
        apart |= (widths.gather(1, runs)[:, 1:] > tie) & (steps > 0)
    # Runs of equal values share the mean of their positions. Sums of positions are exact, so this
    # repeats bit for bit; two calls of searchsorted would cost as much as the sort, each.
    runs = _numbered(apart)
    positions = torch.arange(1, len(table) + 1, dtype=torch.float64, device=table.device)
    sums, counts = torch.zeros_like(values), torch.zeros_like(values)
    sums.scatter_add_(1, runs, positions.expand_as(values))
    counts.scatter_add_(1, runs, torch.ones_like(values))
    return torch.empty_like(values).scatter_(1, order, (sums / counts).gather(1, runs))


def _numbered(apart: Tensor) -> Tensor:
    """Numbers of the runs (t, l) in rows whose neighbours are ``apart`` (t, l - 1)."""
    runs = apart.new_zeros(len(apart), apart.shape[1] + 1, dtype=torch.int64)
    torch.cumsum(apart, dim=1, out=runs[:, 1:])
    return runs


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson correlation of the rows of x and y (t, l), 0 where one is constant; (t,)."""
    x, y = (standardised(rows) for rows in (x, y))
    return (x * y).sum(dim=1).clamp(-1, 1)


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Spearman correlation of the columns of x and y (l, t), 0 where one is constant; (t,)."""
    return pearson(ranks(x), ranks(y))


def standardised(rows: Tensor) -> Tensor:
    """Centre each row and scale it to length one, in float64; constant rows become zero."""
    constant = is_constant(rows.T)[:, None]
    rows = rows.double()
    centred = (rows - rows.mean(dim=1, keepdim=True)).masked_fill(constant, 0)
    # Squares of very large or small effects would leave the range of float64.
    centred = centred / centred.abs().amax(dim=1, keepdim=True).masked_fill(constant, 1)
    return centred / centred.norm(dim=1, keepdim=True).masked_fill(constant, 1)


def standard_ranks(table: Tensor) -> Tensor:
    """Ranks within the columns of (..., l, t), centred and of length one: products correlate."""
    rows = table.movedim(-2, 0)
    found = standardised(ranks(rows.flatten(1)))  # (columns, l)
    return found.T.reshape(rows.shape).movedim(0, -2)
