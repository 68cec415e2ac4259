"""Drawings of a report as SVG: predictions, residuals, learning curve, spectrum, maps.

Colours and fonts come from the page's style sheet, so that one drawing serves light and dark.
Names are the user's: ``Markup.format`` escapes them.
"""

import math
from collections.abc import Sequence

import torch
from markupsafe import Markup
from torch import Tensor

from ksm_ext.drawing import full_colour, limits, shortened, ticks

_LEVELS = 8  # of colour in a map of tasks and targets: its cells of one level are one shape


def number(value: float, digits: int = 3) -> str:
    """A short number with a real minus sign."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    if 1000 <= abs(value) < 1e6:
        value = float(f"{value:.{digits}g}")
        return f"{value:,.0f}".replace("-", "\N{MINUS SIGN}")
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


class _Axes:
    """A frame of 300 by 290 with round numbers at its axes, and the points in it."""

    def __init__(self, across: tuple[float, float], up: tuple[float, float]) -> None:
        self.across, self.up = across, up
        self.shapes = Markup('<path class="axis" d="M60 5V300H360" fill="none"/>')
        for value in ticks(*across):
            self.shapes += _text(self.x(value), 316, number(value))
        for value in ticks(*up):
            self.shapes += _text(54, self.y(value) + 4, number(value), "end")

    def x(self, value: float) -> float:
        low, high = self.across
        return 70 + 280 * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.up
        return 290 - 280 * (value - low) / (high - low)

    def add_points(self, x: Tensor, y: Tensor, most: int) -> str:
        """Draw them, evenly chosen beyond ``most``; answers what the caption says of that."""
        every = -(-len(x) // most)
        places = zip(x[::every].tolist(), y[::every].tolist(), strict=True)
        dots = "".join(f"M{self.x(a):.0f} {self.y(b):.0f}h0" for a, b in places)
        self.shapes += Markup(f'<path class="dots" d="{dots}"/>')
        return f" Shown: one in {every}." if every > 1 else ""

    def add_line(self, x: Sequence[float], y: Sequence[float], style: str) -> None:
        points = " ".join(f"{self.x(a):.1f},{self.y(b):.1f}" for a, b in zip(x, y, strict=True))
        self.shapes += Markup(f'<polyline class="{style}" fill="none" points="{points}"/>')

    def name(self, across: str, up: str) -> None:
        self.shapes += _text(210, 336, across)
        self.shapes += _text(0, 0, up, turn=' transform="translate(10 150) rotate(-90)"')

    def figure(self, caption: str, alt: str) -> Markup:
        return _figure(caption, 366, 344, alt, self.shapes)


def bars(values: Tensor, half: Tensor | None, names: Sequence[str], sign: int) -> Markup:
    """Attributions (k,) as bars with their 95 % intervals; pale where these include zero.

    ``sign`` is 1 where positive is good, else -1.
    """
    width = torch.zeros_like(values) if half is None else half
    low, high = min(0.0, float((values - width).min())), max(0.0, float((values + width).max()))
    margin = 14 + 6.8 * max(map(len, names))
    step, unit = 20.0, 300 / ((high - low) or 1.0)
    zero, bottom = margin - low * unit, step * len(names) + 4
    shapes = Markup(f'<path class="axis" d="M{zero:.1f} 0V{bottom:.1f}"/>')
    for row, (value, w, name) in enumerate(
        zip(values.tolist(), width.tolist(), names, strict=True)
    ):
        y, x = row * step + 4, zero + min(0.0, value) * unit
        style = ("good" if sign * value >= 0 else "bad") + " unsure" * (0 < abs(value) <= w)
        size = f'width="{abs(value) * unit:.1f}" height="14"'
        shapes += Markup(f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" {size}/>')
        if half is not None:
            ends = f"M{zero + (value - w) * unit:.1f} {y + 7:.1f}h{2 * w * unit:.1f}"
            shapes += Markup(f'<path class="axis" d="{ends}"/>')
        shapes += _text(margin - 8, y + 11, name, "end")
        shapes += _text(margin + 312, y + 11, number(value), "start")
    return _figure("", margin + 370, bottom, "Attributions as bars", shapes)


def scatter(x: Tensor, y: Tensor, kind: str, numbers: str, most: int) -> Markup:
    """Predicted scores y (l,) over true scores x (l,); nothing where all are equal.

    The caption names the ``kind`` of predictions and gives the ``numbers``.
    """
    ends = limits(x, y)
    if ends[0] == ends[1]:
        return Markup()
    axes = _Axes(ends, ends)
    axes.add_line(ends, ends, "axis dashed")
    left_out = axes.add_points(x, y, most)
    axes.name("true score", "predicted score")
    caption = f"{kind.capitalize()} predictions of {len(x):,} subsets: {numbers}.{left_out}"
    return axes.figure(caption, f"Scatter of predicted over true scores: {numbers}")


def residuals(sizes: Tensor, errors: Tensor, most: int) -> Markup:
    """True less predicted scores (l,) over sizes (l,) of subsets; nothing for one size."""
    across = float(sizes.min()), float(sizes.max())
    reach = float(errors.abs().max())
    if across[0] == across[1] or reach == 0:
        return Markup()
    axes = _Axes(across, (-reach, reach))
    axes.add_line(across, (0, 0), "axis dashed")
    left_out = axes.add_points(sizes, errors, most)
    axes.name("tasks in the subset", "true less predicted")
    caption = (
        f"Errors by size of subset: a slope or a fan says where predictions are off.{left_out}"
    )
    return axes.figure(caption, "Scatter of errors over the sizes of subsets")


def curve(sizes: Sequence[int], errors: Sequence[float], least: float) -> Markup:
    """A learning curve: errors over numbers of subsets, and below what no surrogate can go."""
    top = max(1.0, *errors)
    places = [math.log2(size) for size in sizes]
    axes = _Axes((places[0], places[-1]), (0.0, top))
    axes.shapes = Markup('<path class="axis" d="M60 5V300H360" fill="none"/>')
    for place, size in zip(places, sizes, strict=True):
        axes.shapes += _text(axes.x(place), 316, f"{size:,}")
    for value in ticks(0.0, top):
        axes.shapes += _text(54, axes.y(value) + 4, number(value), "end")
    axes.add_line(places, errors, "curve")
    axes.add_points(torch.tensor(places), torch.tensor(errors), len(places))
    caption = (
        "Learning curve: error of predictions over the variance, by how many subsets were used."
    )
    if least > 0:
        axes.add_line((places[0], places[-1]), (least, least), "axis dashed")
        caption += f" Dashed: the noise of a run, {100 * least:.2g} % of the variance."
    axes.name("subsets", "error")
    return axes.figure(caption, f"Error falls from {errors[0]:.2g} to {errors[-1]:.2g}")


def spectrum(fractions: list[float]) -> Markup:
    """Shares of the variance by order of interaction, as bars."""
    shapes = Markup()
    step = 300 / len(fractions)
    for index, fraction in enumerate(fractions):
        x, height = 30 + index * step, 150 * fraction
        shapes += Markup(
            f'<rect class="good" x="{x + 0.15 * step:.1f}" y="{180 - height:.1f}" '
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


def heat_map(
    pairs: Tensor, clear: Tensor, names: Sequence[str], num_tasks: int, sign: int, colours: str
) -> Markup:
    """Interactions (n, n) of named tasks, of ``num_tasks`` in all; signs in two colours.

    Only those marked ``clear`` (n, n) are drawn. ``sign`` is 1 where positive is good, else -1;
    ``colours`` says what blue and orange do.
    """
    n = len(names)
    labels = [shortened(name, 16) for name in names]
    cell = max(9.0, min(26.0, 360 / n))
    margin = 12 + 6.2 * max(len(label) for label in labels)
    limit, side = full_colour(pairs, clear), cell - 1
    square = Markup('<rect class="{}" fill-opacity="{:.2f}" x="{:.1f}" y="{:.1f}"')
    square += Markup(' width="{0:.1f}" height="{0:.1f}">').format(side)
    square += Markup("<title>{} and {}: {}</title></rect>")
    shapes, grid = Markup(), {"blank": "", "unclear": ""}
    for i in range(n):
        y = margin + i * cell
        shapes += _text(margin - 5, y + cell / 2 + 3.5, labels[i], "end")
        turn = f' transform="translate({y + cell / 2 + 3.5:.1f} {margin - 5:.1f}) rotate(-90)"'
        shapes += _text(0, 0, labels[i], "start", turn)
        for j in range(n):
            x, value = margin + j * cell, float(pairs[i, j])
            if clear[i, j]:
                style, strength = "good" if sign * value >= 0 else "bad", abs(value) / limit
                cells = (style, strength, x, y, names[i], names[j], number(value))
                shapes += square.format(*cells)
            else:
                grid["blank" if i == j else "unclear"] += _cell(x, y, side, side)
    shapes += _paths(grid)
    caption = (
        f"Interactions: how much a task's effect grows when another is present. {colours}; full "
        f"colour is ±{number(limit, 2)}; empty: the 95 % interval includes zero."
    )
    if n < num_tasks:
        caption += f" Shown: {n} of {num_tasks:,} tasks, those of the strongest."
    size = margin + n * cell + 4
    alt = "Heat map of interactions; the table names the strongest"
    return _figure(caption, size, size, alt, shapes, "tall")


def _cell(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:.1f} {y:.1f}h{width:.1f}v{height:.1f}h{-width:.1f}z"


def _paths(cells: dict[str, str]) -> Markup:
    """Cells of one style each as one shape."""
    return Markup("").join(
        Markup(f'<path class="{style}" d="{path}"/>') for style, path in cells.items() if path
    )


def task_map(
    good: Tensor, clear: Tensor, tasks: Sequence[str], targets: Sequence[str], caption: str
) -> Markup:
    """Attributions (n, t), positive where good, in units that targets share, of those ``clear``.

    A row for each task and a column for each target, in the order in which they are given.
    """
    rows, columns = [shortened(name, 20) for name in tasks], [shortened(n, 16) for n in targets]
    left = 10 + 6.8 * max(map(len, rows))
    top = 14 + 6.8 * max(map(len, columns))
    width, height = max(10.0, min(44.0, 560 / len(targets))), 16.0
    limit = full_colour(good, clear)
    shapes, cells = Markup(), dict[str, str]()
    for i, row in enumerate(good.tolist()):
        y = top + i * height
        shapes += _text(left - 6, y + 11.5, rows[i], "end")
        for j, value in enumerate(row):
            style = "unclear"
            if clear[i, j]:
                level = max(1, math.ceil(_LEVELS * abs(value) / limit))
                style = f"{'good' if value >= 0 else 'bad'} level{level}"
            x = left + j * width
            cells[style] = cells.get(style, "") + _cell(x, y, width - 1, height - 1)
    for j, label in enumerate(columns):
        x = left + (j + 0.5) * width + 3.5
        turn = f' transform="translate({x:.1f} {top - 6:.1f}) rotate(-90)"'
        shapes += _text(0, 0, label, "start", turn)
    shapes += _paths(cells)
    size = left + width * len(targets) + 4, top + height * len(tasks) + 4
    return _figure(caption, *size, "Map of attributions by task and target", shapes, "whole")
