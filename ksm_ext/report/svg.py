"""Drawings of a report as SVG: predicted over true scores, Walsh spectrum, interactions.

Colours and fonts come from the page's style sheet, so that one drawing serves light and dark.
Names are the user's: ``Markup.format`` escapes them.
"""

import math
from collections.abc import Sequence

from markupsafe import Markup
from torch import Tensor

from ksm_ext.drawing import full_colour, limits

_MAX_POINTS = 1000


def number(value: float, digits: int = 3) -> str:
    """A short number with a real minus sign."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _figure(
    caption: str, width: float, height: float, alt: str, shapes: Markup, style: str = ""
) -> Markup:
    return Markup(
        '<figure class="{}"><svg role="img" aria-label="{}" viewBox="0 0 {:g} {:g}" '
        'style="max-width:{:.0f}px">{}</svg><figcaption>{}</figcaption></figure>'
    ).format(style, alt, width, height, 1.3 * width, shapes, caption)


def _text(x: float, y: float, text: str, anchor: str = "middle", turn: str = "") -> Markup:
    tag = Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>')
    return tag.format(x, y, anchor, Markup(turn), text)


def scatter(x: Tensor, y: Tensor, kind: str, numbers: str) -> Markup:
    """Predicted scores y (l,) over true scores x (l,); nothing where all are equal.

    The caption names the ``kind`` of predictions and gives the ``numbers``.
    """
    low, high = limits(x, y)
    if low == high:
        return Markup()
    every = -(-len(x) // _MAX_POINTS)

    def at(value: float) -> float:
        return 10 + 280 * (value - low) / (high - low)

    shapes = Markup('<line class="axis dashed" x1="70" y1="290" x2="350" y2="10"/>')
    shapes += Markup('<path class="axis" d="M60 5V300H360" fill="none"/>')
    for a, b in zip(x[::every].tolist(), y[::every].tolist(), strict=True):
        place = f'cx="{60 + at(a):.1f}" cy="{300 - at(b):.1f}"'
        shapes += Markup(f'<circle class="dot" {place} r="3.5"/>')
    for value in (low, (low + high) / 2, high):
        shapes += _text(60 + at(value), 316, number(value))
        shapes += _text(54, 304 - at(value), number(value), "end")
    shapes += _text(210, 336, "true score")
    shapes += _text(0, 0, "predicted score", turn=' transform="translate(10 150) rotate(-90)"')
    caption = f"{kind.capitalize()} predictions of {len(x):,} subsets: {numbers}."
    if every > 1:
        caption += f" Shown: one in {every}."
    return _figure(caption, 366, 344, f"Scatter of predicted over true scores: {numbers}", shapes)


def spectrum(fractions: list[float]) -> Markup:
    """Shares of the variance by order of interaction, as bars."""
    shapes = Markup()
    step = 300 / len(fractions)
    for index, fraction in enumerate(fractions):
        x, height = 30 + index * step, 150 * fraction
        shapes += Markup(
            f'<rect class="up" x="{x + 0.15 * step:.1f}" y="{180 - height:.1f}" '
            f'width="{0.7 * step:.1f}" height="{height:.1f}"/>'
        )
        percent = "<1 %" if 0 < fraction < 0.005 else f"{100 * fraction:.0f} %"
        shapes += _text(x + step / 2, 172 - height, percent)
        shapes += _text(x + step / 2, 196, str(index + 1))
    shapes += Markup('<path class="axis" d="M25 180H335"/>')
    shapes += _text(180, 216, "tasks that act together")
    alt = f"{100 * fractions[0]:.0f} percent of the surrogate's variance is due to single tasks"
    caption = (
        "Walsh spectrum: share of the surrogate's variance due to single tasks, pairs, … It is of "
        "the fitted function and has no intervals."
    )
    return _figure(caption, 356, 224, alt, shapes, "across")


def heat_map(pairs: Tensor, clear: Tensor, names: Sequence[str], num_tasks: int) -> Markup:
    """Interactions (n, n) of named tasks, of ``num_tasks`` in all; signs in two colours.

    Only those marked ``clear`` (n, n) are drawn.
    """
    n = len(names)
    labels = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    cell = max(9.0, min(26.0, 360 / n))
    margin = 12 + 6.2 * max(len(label) for label in labels)
    limit = full_colour(pairs, clear)
    square = Markup('<rect {} x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">{}</rect>')
    shapes = Markup()
    for i in range(n):
        y = margin + i * cell
        shapes += _text(margin - 5, y + cell / 2 + 3.5, labels[i], "end")
        turn = f' transform="translate({y + cell / 2 + 3.5:.1f} {margin - 5:.1f}) rotate(-90)"'
        shapes += _text(0, 0, labels[i], "start", turn)
        for j in range(n):
            value = float(pairs[i, j])
            style, title = f'class="{"blank" if i == j else "unclear"}"', Markup()
            if clear[i, j]:
                sign = "up" if value >= 0 else "down"
                style = f'class="{sign}" fill-opacity="{abs(value) / limit:.2f}"'
                title = Markup("<title>{} and {}: {}</title>")
                title = title.format(names[i], names[j], number(value))
            x, side = margin + j * cell, cell - 1
            shapes += square.format(Markup(style), x, y, side, side, title)
    caption = (
        "Interactions: how much a task's effect grows when another is present. Blue adds, orange "
        f"subtracts; full colour is ±{number(limit, 2)}; empty: the 95 % interval includes zero."
    )
    if n < num_tasks:
        caption += f" Shown: {n} of {num_tasks:,} tasks, those of the strongest."
    size = margin + n * cell + 4
    alt = "Heat map of interactions; the table names the strongest"
    return _figure(caption, size, size, alt, shapes, "tall")
