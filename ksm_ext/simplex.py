r"""Maximise a function of shares: numbers within bounds whose sum is given.

Generating set search (Kolda, Lewis & Torczon 2003): from every start at once, a step towards each
corner of the simplex and one away from it; the best step is taken while it gains, else steps are
halved. Together these directions generate every cone of feasible ones, so what is found is
stationary where the function is smooth; no derivative is asked for, which kernels of powers do not
have at a share of 0.

Shapes: points (l, n) float64 and their values (l,); bounds (n,).
"""

from collections.abc import Callable

import torch
from torch import Tensor

_FIRST_STEP, _LAST_STEP = 0.25, 1e-4
_MAX_STEPS = 500


def project(points: Tensor, low: Tensor, high: Tensor, total: float) -> Tensor:
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
        function: Values (l,) of points (l, n).
        starts: (s, n) points within bounds.
        low: (n,).
        high: (n,).
        total: The sum of every point.
    """
    points, values = starts, function(starts)
    steps, moves = torch.full_like(values, _FIRST_STEP), torch.zeros_like(starts)
    corners = total * torch.eye(starts.shape[1], dtype=starts.dtype)
    for _ in range(_MAX_STEPS):
        active = (steps > _LAST_STEP).nonzero()[:, 0]
        if not len(active):
            break
        at, step = points[active, None], steps[active, None, None]  # (a, 1, n), (a, 1, 1)
        towards = step * (corners - at)
        tried = torch.cat([at + towards, at - towards, at + moves[active, None]], 1)
        a, count, n = tried.shape
        tried = project(tried.reshape(-1, n), low, high, total)
        best, place = function(tried).reshape(a, count).max(1)
        gains = best > values[active]
        chosen = tried.reshape(a, count, n)[torch.arange(a), place]
        moves[active] = torch.where(gains[:, None], chosen - points[active], 0.0)
        points[active] = torch.where(gains[:, None], chosen, points[active])
        values[active] = torch.where(gains, best, values[active])
        steps[active] *= torch.where(gains, 1.0, 0.5)
    winner = int(values.argmax())
    return points[winner], float(values[winner])
