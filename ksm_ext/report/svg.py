"""Drawings of a report as SVG text: predicted over true scores, Walsh spectrum, interactions.

Colours and fonts come from the page's style sheet, so that one drawing serves light and dark.
"""

import math
from collections.abc import Sequence
from html import escape

from torch import Tensor

_MAX_POINTS = 1000


def number(value: float, digits: int = 3) -> str:
    """A short number with a real minus sign."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _figure(
    caption: str, width: float, height: float, alt: str, shapes: str, style: str = ""
) -> str:
    return (
        f'<figure class="{style}"><svg role="img" aria-label="{escape(alt)}" '
        f'viewBox="0 0 {width:g} {height:g}" style="max-width:{1.3 * width:.0f}px">'
        f"{shapes}</svg><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def scatter(x: Tensor, y: Tensor, kind: str, numbers: str) -> str:
    """Predicted scores y (l,) over true scores x (l,); nothing where all are equal.

    The caption names the ``kind`` of predictions and gives the ``numbers``.
    """
    low, high = min(float(x.min()), float(y.min())), max(float(x.max()), float(y.max()))
    if low == high:
        return ""
    every = -(-len(x) // _MAX_POINTS)

    def at(value: float) -> float:
        return 10 + 280 * (value - low) / (high - low)

    shapes = '<line class="axis dashed" x1="70" y1="290" x2="350" y2="10"/>'
    shapes += '<path class="axis" d="M60 5V300H360" fill="none"/>'
    for a, b in zip(x[::every].tolist(), y[::every].tolist(), strict=True):
        shapes += f'<circle class="dot" cx="{60 + at(a):.1f}" cy="{300 - at(b):.1f}" r="3.5"/>'
    for value in (low, (low + high) / 2, high):
        shapes += _text(60 + at(value), 316, number(value))
        shapes += _text(54, 304 - at(value), number(value), "end")
    shapes += _text(210, 336, "true score")
    shapes += _text(0, 0, "predicted score", extra=' transform="translate(10 150) rotate(-90)"')
    caption = f"{kind.capitalize()} predictions of {len(x):,} subsets: {numbers}."
    if every > 1:
        caption += f" Shown: one in {every}."
    return _figure(caption, 366, 344, f"Scatter of predicted over true scores: {numbers}", shapes)


def spectrum(fractions: list[float]) -> str:
    """Shares of the variance by order of interaction, as bars."""
    shapes = ""
    step = 300 / len(fractions)
    for index, fraction in enumerate(fractions):
        x, height = 30 + index * step, 150 * fraction
        shapes += (
            f'<rect class="up" x="{x + 0.15 * step:.1f}" y="{180 - height:.1f}" '
            f'width="{0.7 * step:.1f}" height="{height:.1f}"/>'
        )
        percent = "<1 %" if 0 < fraction < 0.005 else f"{100 * fraction:.0f} %"
        shapes += _text(x + step / 2, 172 - height, percent)
        shapes += _text(x + step / 2, 196, str(index + 1))
    shapes += '<path class="axis" d="M25 180H335"/>' + _text(180, 216, "tasks that act together")
    alt = f"{100 * fractions[0]:.0f} percent of the surrogate's variance is due to single tasks"
    caption = (
        "Walsh spectrum: share of the surrogate's variance due to single tasks, pairs, … It is of "
        "the fitted function and has no intervals."
    )
    return _figure(caption, 356, 224, alt, shapes, "across")


def heat_map(pairs: Tensor, clear: Tensor, names: Sequence[str], num_tasks: int) -> str:
    """Interactions (n, n) of named tasks, of ``num_tasks`` in all; signs in two colours.

    Only those marked ``clear`` (n, n) are drawn.
    """
    n = len(names)
    labels = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    cell = max(9.0, min(26.0, 360 / n))
    margin = 12 + 6.2 * max(len(label) for label in labels)
    limit = float(pairs[clear].abs().max())
    shapes = ""
    for i in range(n):
        y = margin + i * cell
        shapes += _text(margin - 5, y + cell / 2 + 3.5, labels[i], "end")
        turn = f' transform="translate({y + cell / 2 + 3.5:.1f} {margin - 5:.1f}) rotate(-90)"'
        shapes += _text(0, 0, labels[i], "start", turn)
        for j in range(n):
            value = float(pairs[i, j])
            style, title = f'class="{"blank" if i == j else "unclear"}"', ""
            if clear[i, j]:
                sign = "up" if value >= 0 else "down"
                style = f'class="{sign}" fill-opacity="{abs(value) / limit:.2f}"'
                pair = f"{escape(names[i])} and {escape(names[j])}"
                title = f"<title>{pair}: {number(value)}</title>"
            shapes += (
                f'<rect {style} x="{margin + j * cell:.1f}" y="{y:.1f}" '
                f'width="{cell - 1:.1f}" height="{cell - 1:.1f}">{title}</rect>'
            )
    caption = (
        "Interactions: how much a task's effect grows when another is present. Blue adds, orange "
        f"subtracts; full colour is ±{number(limit, 2)}; empty: the 95 % interval includes zero."
    )
    if n < num_tasks:
        caption += f" Shown: {n} of {num_tasks:,} tasks, those of the strongest."
    size = margin + n * cell + 4
    return _figure(
        caption,
        size,
        size,
        "Heat map of interactions; the table names the strongest",
        shapes,
        "tall",
    )
