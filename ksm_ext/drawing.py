"""What figures show, computed once: :mod:`.plotting` draws it by Matplotlib, the report as SVG.

Shapes: values (n,); points (l,).
"""

import math

import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from torch import Tensor


def largest(values: Tensor, count: int | None = None) -> Tensor:
    """Positions of values (n,), the largest magnitude first; of equal ones the first is first."""
    return values.abs().argsort(descending=True, stable=True)[:count]


def alike(rows: Tensor) -> Tensor:
    """An order of rows (n, t) with those alike side by side: the leaves of average linkage."""
    if len(rows) < 3:
        return torch.arange(len(rows))
    tree = linkage(rows.numpy(), "average", optimal_ordering=True)
    return torch.from_numpy(leaves_list(tree)).long()


def limits(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The ends that the two axes of a scatter of y over x share."""
    return min(float(x.min()), float(y.min())), max(float(x.max()), float(y.max()))


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers between two ends, about ``count``: multiples of 1, 2 or 5 times a power of 10.

    None where the ends are equal.
    """
    if not high > low:
        return []
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = min((power * f for f in (1, 2, 5, 10)), key=lambda s: abs((high - low) / s - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def shortened(name: str, length: int) -> str:
    """A name of at most so many characters: long ones lose their middle, since ends tell apart."""
    if len(name) <= length:
        return name
    start = length // 2
    return f"{name[:start]}…{name[len(name) - (length - start - 1) :]}"


def full_colour(values: Tensor, drawn: Tensor) -> float:
    """The magnitude that has the full colour: the largest of those drawn, or 1 for zeros alone."""
    return (float(values[drawn].abs().max()) if bool(drawn.any()) else 0.0) or 1.0


def decimals(largest: float, digits: int) -> int:
    """Decimals of a column of numbers whose largest shows that many digits."""
    return max(0, digits - 1 - math.floor(math.log10(largest or 1.0)))


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals and a real minus sign."""
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
