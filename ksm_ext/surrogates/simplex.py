r"""Maximise a function of shares: numbers within bounds whose sum is given.

A search by patterns, from every start at once. Where one share more, or less, changes the function
is measured for all tasks; then are tried: steps along the gradient that these changes make, moves
of share between the pairs of tasks that they promise most for, and the last step again. The best is
taken while it gains, else steps are halved. No derivative is asked for, which kernels of powers do
not have at a share of 0; where the function is smooth, what is found is stationary.

Shapes: points (l, n) float64 and their values (l,); bounds (n,).

Reference: *Kolda, Lewis & Torczon 2003, SIAM Review 45(3)* (generating set search).
"""

from collections.abc import Callable

import torch
from torch import Tensor

_FIRST_STEP, _LAST_STEP = 0.25, 1e-4  # of the sum
_MAX_STEPS = 300
_LENGTHS = (0.25, 1.0, 4.0)  # of steps along the gradient


def onto_simplex(points: Tensor, low: Tensor, high: Tensor, total: float) -> Tensor:
    """The nearest points within bounds whose sum is ``total``: shifted by one number and clipped.

    Args:
        points: (l, n) float64.
        low: (n,) of a sum of at most ``total``.
        high: (n,) of a sum of at least ``total``.
        total: The sum.
    """
    floor, ceiling = (low - points).amin(1), (high - points).amax(1)  # all at one bound
    for _ in range(60):  # halvings of the interval that the shift is in
        middle = (floor + ceiling) / 2
        above = (points + middle[:, None]).clamp(low, high).sum(1) > total
        floor, ceiling = torch.where(above, floor, middle), torch.where(above, middle, ceiling)
    return (points + ceiling[:, None]).clamp(low, high)


def maximise(
    function: Callable[[Tensor], Tensor], starts: Tensor, low: Tensor, high: Tensor, total: float
) -> tuple[Tensor, float]:
    """The best point (n,) reached from any of the starts, and its value.

    Args:
        function: Values (l,) of points (l, n), near mixtures too.
        starts: (s, n) points within bounds.
        low: (n,).
        high: (n,).
        total: The sum of every point.
    """
    points, values = starts.clone(), function(starts)
    steps, moves = torch.full_like(values, _FIRST_STEP * total), torch.zeros_like(starts)
    for _ in range(_MAX_STEPS):
        active = (steps > _LAST_STEP * total).nonzero()[:, 0]
        if not len(active):
            break
        at, step = points[active], steps[active]
        tried = _tried(function, at, step, low, high, total)
        tried = torch.cat([tried, onto_simplex(at + moves[active], low, high, total)[:, None]], 1)
        best, place = function(tried.flatten(0, 1)).reshape(tried.shape[:2]).max(1)
        gains = best > values[active]
        chosen = torch.where(gains[:, None], tried[torch.arange(len(at)), place], at)
        points[active], moves[active] = chosen, chosen - at
        values[active] = torch.where(gains, best, values[active])
        steps[active] = torch.where(gains, step, step / 2)
    winner = int(values.argmax())
    return points[winner], float(values[winner])


def _tried(
    function: Callable[[Tensor], Tensor],
    at: Tensor,
    step: Tensor,
    low: Tensor,
    high: Tensor,
    total: float,
) -> Tensor:
    """(a, 2 n + 3, n) points around those at hand (a, n), ``step`` (a,) away."""
    a, n = at.shape
    each = torch.eye(n, dtype=at.dtype)
    more = torch.minimum(step[:, None], high - at)  # (a, n) that each task can take
    less = torch.minimum(step[:, None], at - low)  # and give
    around = torch.cat(
        [at[:, None] + more[..., None] * each, at[:, None] - less[..., None] * each], 1
    )
    here, changed = function(at)[:, None], function(around.flatten(0, 1)).reshape(a, 2, n)
    taking, giving = changed[:, 0] - here, changed[:, 1] - here
    slope = (taking - giving) / (more + less).clamp_min(1e-300)
    slope = slope / slope.abs().amax(1, keepdim=True).clamp_min(1e-300)
    along = [at + length * step[:, None] * slope for length in _LENGTHS]
    promise = taking[:, :, None] + giving[:, None, :]  # from the last to the middle
    possible = (more[:, :, None] > 0) & (less[:, None, :] > 0) & (each == 0)
    promise = promise.masked_fill(~possible, -torch.inf).flatten(1)
    pairs = promise.topk(min(2 * n, n * n), 1).indices  # (a, 2 n)
    taker, giver = pairs // n, pairs % n
    moved = torch.minimum(more.gather(1, taker), less.gather(1, giver))[..., None]
    between = at[:, None] + moved * (each[taker] - each[giver])
    points = torch.stack(along, 1).flatten(0, 1)
    along_simplex = onto_simplex(points, low, high, total).reshape(a, len(_LENGTHS), n)
    return torch.cat([along_simplex, between], 1)
