"""What figures show, computed once: :mod:`.plotting` draws it by Matplotlib, the report as SVG.

Shapes: values (n,); points (l,).
"""

import math

from torch import Tensor


def largest(values: Tensor, count: int | None = None) -> Tensor:
    """Positions of values (n,), the largest magnitude first; of equal ones the first is first."""
    return values.abs().argsort(descending=True, stable=True)[:count]


def limits(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The ends that the two axes of a scatter of y over x share."""
    return min(float(x.min()), float(y.min())), max(float(x.max()), float(y.max()))


def full_colour(values: Tensor, drawn: Tensor) -> float:
    """The magnitude that has the full colour: the largest of those drawn, or 1 for zeros alone."""
    return (float(values[drawn].abs().max()) if bool(drawn.any()) else 0.0) or 1.0


def decimals(largest: float, digits: int) -> int:
    """Decimals of a column of numbers whose largest shows that many digits."""
    return max(0, digits - 1 - math.floor(math.log10(largest or 1.0)))


def fixed(value: float, decimals: int) -> str:
    """A number with so many decimals and a real minus sign."""
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")
