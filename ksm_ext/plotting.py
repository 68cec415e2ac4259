r"""Figures of attributions, interactions, predictions, spectra, designs and learning curves.

Every function draws tables of any kind on ``ax`` and returns it; those of attributions take a
:class:`ksm_ext.Surrogate` too, whose leave-one-out effects and intervals they show. Without ``ax``
a figure is opened by ``matplotlib.pyplot``, reached as ``ax.figure`` and closed by the caller.
Nothing else of pyplot's state, and no ``rcParams``, is touched. Colours are those of *Okabe & Ito
2008*, told apart with any colour vision: blue is positive, orange is negative.

Shapes: attributions (n,), interactions (n, n), scores (l, t), curves (c, r): c curves of r points.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from scipy.cluster import hierarchy
from scipy.stats import binom
from torch import Tensor

from ksm_ext.arrays import ArrayLike, aligned, as_tensor, names_along, position
from ksm_ext.checks import (
    check_finite,
    check_level,
    check_ndim,
    check_positive_int,
    check_real,
    check_several,
    message,
    shape_text,
)
from ksm_ext.drawing import alike, decimals, fixed, full_colour, largest, limits, shortened
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.subsets import as_masks
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.surrogate import Surrogate, check_surrogate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

_BLUE, _ORANGE, _GREEN, _PINK, _SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
_CYCLE = (_BLUE, _ORANGE, _GREEN, _PINK, _SKY, "#E69F00")
_MARKERS = "osD^vP"
_INK, _MUTED, _GRID, _BLANK = "#222222", "#6B6B6B", "#E4E4E4", "#EFEFEF"
_LABELLED_CELLS = 12  # tasks up to which a heat map carries its numbers
_LONGEST = 32  # letters of a name
_LETTER = 0.07  # inches of one, on an axis


def attribution_bars(
    attributions: ArrayLike | Surrogate,
    std: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    top: int | None = None,
    highlight: Iterable[int] | None = None,
    ax: "Axes | None" = None,
) -> "Axes":
    """Horizontal bars of the attributions to one target, the largest on top.

    Args:
        attributions: (n,) float; the names of its rows, if any, name the tasks. Or a surrogate of
            one target.
        std: (n,) float. Standard deviations; drawn as central normal intervals.
        names: n task names; else those of the rows, else numbers.
        level: Coverage of the intervals, strictly between 0 and 1.
        top: Draw only this many tasks, those of the largest magnitude.
        highlight: Numbers of tasks to draw in full colour, the others being muted.
        ax: Where to draw.

    Returns:
        The axes. The bars from bottom to top ascend in attribution.

    Raises:
        ValueError: If shapes differ or values are not finite.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    if isinstance(attributions, Surrogate):
        attributions, std, names = _of_one_target(attributions, names)
    attributions, std = aligned({"attributions": (attributions, "task"), "std": (std, "task")})
    values = _finite("attributions", attributions, 1, "(n,): one attribution per task")
    tau = values.numpy()
    labels = _task_names(names, attributions, len(tau))
    order = np.argsort(tau, kind="stable")
    if top is not None:
        order = order[np.isin(order, largest(values, check_positive_int("top", top)))]
    meaning = "(n,): one standard deviation per task"
    widths = None if std is None else _half_widths(std, level, tau.shape, meaning)[order]
    axes = _axes(ax, (5.2, 0.9 + 0.24 * len(order)))
    rows = np.arange(len(order))
    colours = [_BLUE if tau[task] >= 0 else _ORANGE for task in order]
    bars = axes.barh(rows, tau[order], height=0.72, color=colours, zorder=2)
    if highlight is not None:
        chosen = set(highlight)
        for bar, task in zip(bars, order, strict=True):
            bar.set_alpha(1.0 if int(task) in chosen else 0.3)
    if widths is not None:
        axes.errorbar(
            tau[order], rows, xerr=widths, fmt="none", ecolor=_INK, elinewidth=1, capsize=2
        )
    axes.axvline(0, color=_INK, linewidth=0.8, zorder=3)
    axes.set_yticks(rows, [labels[task] for task in order])
    axes.set_ylim(-0.6, len(order) - 0.4)
    _style(axes, "attribution", None, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return axes


def attribution_map(
    attributions: ArrayLike | Surrogate,
    std: ArrayLike | None = None,
    names: Sequence[str] | None = None,
    *,
    level: float = 0.95,
    top: int = 40,
    ax: "Axes | None" = None,
) -> "Axes":
    """Attributions of tasks (rows) to targets (columns), those alike side by side.

    Each target is in units of its largest attribution. What is alike is told by average linkage.

    Args:
        attributions: (n, t) float, or a surrogate.
        std: (n, t) float. Standard deviations: what is not clear of zero is left blank.
        names: n task names; else those of the rows, else numbers.
        level: Coverage of the intervals, strictly between 0 and 1.
        top: The tasks that matter most for some target, at most.
        ax: Where to draw.

    Returns:
        The axes, with a colour bar beside it.

    Raises:
        ValueError: If shapes differ or values are not finite.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    table, std, labels, targets = _answers(attributions, std, names)
    drawn = torch.ones_like(table, dtype=torch.bool)
    if std is not None:
        half = _half_widths(std, level, table.shape, "(n, t): tasks by targets")
        drawn = table.abs() > torch.from_numpy(half)
    values = table / table.abs().amax(0).clamp_min(1e-300) * drawn
    rows = largest(values.abs().amax(1), check_positive_int("top", top))
    rows = rows[alike(values[rows])]
    columns = alike(values[rows].T.contiguous())
    grid = (rows[:, None], columns)
    beside, below = (_LETTER * max(map(len, texts)) for texts in (labels, targets))
    axes = _axes(ax, (2.1 + beside + 0.34 * len(columns), 0.9 + below + 0.22 * len(rows)))
    axes.set_facecolor(_BLANK)
    cells = np.ma.masked_array(values[grid].numpy(), mask=~drawn[grid].numpy())
    image = axes.imshow(cells, cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_yticks(range(len(rows)), [labels[i] for i in rows.tolist()], fontsize=8)
    names_above = [targets[j] for j in columns.tolist()]
    axes.set_xticks(range(len(columns)), names_above, rotation=90, fontsize=8)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    _colour_bar(axes, image, "attribution / largest")
    return axes


def beeswarm(
    attributions: ArrayLike | Surrogate,
    names: Sequence[str] | None = None,
    *,
    top: int = 20,
    ax: "Axes | None" = None,
) -> "Axes":
    """A row for each task and a point in it for each target, the task that matters most on top.

    Points that would hide each other are moved up or down. Targets should share a unit.

    Args:
        attributions: (n, t) float, or a surrogate.
        names: n task names; else those of the rows, else numbers.
        top: How many tasks, those of the largest mean magnitude.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: If shapes differ or values are not finite.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    table, _, labels, _ = _answers(attributions, None, names)
    rows = largest(table.abs().mean(1), check_positive_int("top", top)).flip(0).tolist()
    axes = _axes(ax, (5.2, 0.9 + 0.3 * len(rows)))
    width = float(table.max() - table.min()) / 60 or 1.0  # of a point
    for place, task in enumerate(rows):
        values = table[task].numpy()
        seen: dict[int, int] = {}
        for value in values:
            cell = round(float(value) / width)
            count = seen[cell] = seen.get(cell, 0) + 1
            lift = (-1) ** count * (count // 2) * 0.12
            colour = _BLUE if value >= 0 else _ORANGE
            shift = max(-0.42, min(0.42, lift))
            axes.plot(value, place + shift, "o", ms=4, color=colour, alpha=0.8, mew=0)
    axes.axvline(0, color=_INK, linewidth=0.8)
    axes.set_yticks(range(len(rows)), [labels[task] for task in rows])
    _style(axes, "attribution", None, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return axes


def waterfall(
    attributions: ArrayLike,
    start: float,
    names: Sequence[str] | None = None,
    *,
    top: int = 12,
    ax: "Axes | None" = None,
) -> "Axes":
    """From the score without tasks to that with all, by what each task adds.

    Shapley values add up to the difference: ``start + sum = F(all)``.

    Args:
        attributions: (n,) float Shapley values of one target.
        start: Score of the empty subset.
        names: n task names; else those of the rows, else numbers.
        top: How many tasks of their own, those of the largest magnitude; the others are one bar.
        ax: Where to draw.

    Returns:
        The axes; bars from the top down go from ``start`` to the sum.

    Raises:
        ValueError: If shapes differ or values are not finite.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    values = _finite("attributions", attributions, 1, "(n,): one attribution per task")
    first = check_real("start", start, "a number", "Pass the score of the empty subset.")
    labels = _task_names(names, attributions, len(values))
    order = largest(values, check_positive_int("top", top)).tolist()
    steps = [(labels[i], float(values[i])) for i in order]
    if len(order) < len(values):
        rest = float(values.sum()) - sum(step for _, step in steps)
        steps.append((f"{len(values) - len(order):,} others", rest))
    axes = _axes(ax, (5.2, 1.2 + 0.3 * len(steps)))
    level = first
    for row, (_, step) in enumerate(steps):
        colour = _BLUE if step >= 0 else _ORANGE
        axes.barh(row, step, left=level, height=0.7, color=colour, zorder=2)
        level += step
        axes.plot([level, level], [row - 0.35, row + 1.35], color=_MUTED, lw=0.8, zorder=1)
    axes.axvline(first, color=_INK, linewidth=0.8, linestyle=(0, (4, 3)))
    axes.set_yticks(range(-1, len(steps) + 1), ["no task", *(n for n, _ in steps), "all tasks"])
    axes.plot([first, level], [-1, len(steps)], "D", color=_INK, ms=5)
    axes.use_sticky_edges = False  # bars end inside of the frame
    axes.autoscale_view(scaley=False)
    axes.set_ylim(len(steps) + 0.6, -1.6)
    _style(axes, "score", None, grid="x")
    axes.tick_params(axis="y", length=0)
    return axes


def what_if(
    surrogate: Surrogate,
    subset: Sequence[int | str] | None = None,
    *,
    target: int | str = 0,
    level: float = 0.95,
    top: int = 20,
    ax: "Axes | None" = None,
) -> "Axes":
    """Predicted scores where one task is taken out of a subset, or put in.

    Args:
        surrogate: Fitted to 0/1 masks.
        subset: Numbers or names of the tasks that are in, or (n,) bool; by default all.
        target: Number or name.
        level: Coverage of the intervals, strictly between 0 and 1.
        top: How many tasks, those that change the prediction most.
        ax: Where to draw.

    Returns:
        The axes: a row for each task, the highest prediction on top, with a minus before what
        would be taken out and a plus before what would be put in; a broken line at the prediction
        of the subset itself.

    Raises:
        ValueError: If ``subset`` or ``target`` is none of the surrogate, or masks are real weights.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    check_surrogate(surrogate)
    if not surrogate.masks.binary:
        remedy = "Tasks are in a subset or not: fit subsets, not shares."
        raise ValueError(message("surrogate", "of 0/1 masks", "one of real weights", remedy))
    names, n = surrogate.task_names, surrogate.masks.num_tasks
    column = position("target", target, surrogate.target_names)
    inside = torch.ones(n, dtype=torch.bool) if subset is None else _tasks_of(subset, names)
    masks = torch.cat([inside[None], inside ^ torch.eye(n, dtype=torch.bool)])
    asked = surrogate.with_tensor_answers()
    found = asked.predict(masks, return_std=asked.has_intervals)
    scores, std = found if asked.has_intervals else (found, torch.zeros_like(found))
    now, *_ = scores[:, column].tolist()
    values, deviations = scores[1:, column], std[1:, column]
    half = _half_widths(deviations, level, (n,), "(n,): one deviation per task")
    rows = largest(values - now, check_positive_int("top", top))
    tasks = rows[values[rows].argsort(stable=True)].tolist()
    axes = _axes(ax, (5.2, 1.0 + 0.26 * len(tasks)))
    for place, task in enumerate(tasks):
        value = float(values[task])
        colour = _BLUE if value >= now else _ORANGE
        axes.plot([now, value], [place, place], color=colour, linewidth=2.4, zorder=2)
        axes.errorbar(value, place, xerr=half[task], fmt="o", ms=5, color=colour, elinewidth=1)
    axes.axvline(now, color=_INK, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    signs = ["\N{MINUS SIGN}" if inside[task] else "+" for task in tasks]
    labels = [f"{sign} {_label(names[task])}" for sign, task in zip(signs, tasks, strict=True)]
    axes.set_yticks(range(len(tasks)), labels)
    _style(axes, "predicted score", None, grid="x")
    axes.tick_params(axis="y", length=0)
    return axes


def _tasks_of(subset: Any, names: Sequence[str]) -> Tensor:
    """(n,) bool: the tasks of these names, numbers or flags."""
    listed = subset.tolist() if hasattr(subset, "tolist") else subset
    given = check_several("subset", listed, "names or numbers")
    inside = torch.zeros(len(names), dtype=torch.bool)
    if given and all(isinstance(each, (bool, np.bool_)) for each in given):
        if len(given) != len(names):
            remedy = "Give a flag for each task, or names."
            raise ValueError(message("subset", f"{len(names)} flags", f"{len(given)}", remedy))
        return torch.tensor(given)
    places = [position("subset", task, names) for task in given]
    inside[places] = True
    if int(inside.sum()) < len(places):
        remedy = "Name each task once; of flags, pass bools."
        raise ValueError(message("subset", "of different tasks", "some twice", remedy))
    return inside


def dendrogram(
    attributions: ArrayLike | Surrogate,
    names: Sequence[str] | None = None,
    *,
    ax: "Axes | None" = None,
) -> "Axes":
    """Tasks that act alike on all targets, joined at the distance of their attributions.

    Average linkage of Euclidean distances, targets in units of their largest attribution.

    Args:
        attributions: (n, t) float of at least two tasks, or a surrogate.
        names: n task names; else those of the rows, else numbers.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: If there are fewer than two tasks or values are not finite.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    table, _, labels, _ = _answers(attributions, None, names)
    if len(table) < 2:
        remedy = "One task is like no other."
        raise ValueError(message("attributions", "of two tasks or more", str(len(table)), remedy))
    scaled = (table / table.abs().amax(0).clamp_min(1e-300)).numpy()
    axes = _axes(ax, (5.2, 0.9 + 0.24 * len(table)))
    tree = hierarchy.linkage(scaled, "average", optimal_ordering=True)
    hierarchy.dendrogram(
        tree, orientation="right", labels=labels, ax=axes, link_color_func=lambda _: _BLUE
    )
    _style(axes, "distance of attributions", None, grid="x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0, labelsize=9)
    return axes


def design_coverage(masks: ArrayLike, *, ax: "Axes | None" = None) -> "Axes":
    """How many subsets there are of each size, beside what readouts average over.

    Shapley values weigh all sizes alike, Banzhaf values all subsets, leave-one-out effects the
    full set and those that lack one task.

    Args:
        masks: (m, n) 0 or 1.
        ax: Where to draw.

    Returns:
        The axes: a bar for each size from 0 to n, and both laws, scaled to m subsets.

    Raises:
        ValueError: If masks are not 0 or 1.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    table = as_masks("masks", masks)
    (m, n), sizes = table.shape, table.sum(1)
    counts = torch.bincount(sizes.cpu(), minlength=n + 1).numpy()
    axes = _axes(ax, (5.2, 3.0))
    places = np.arange(n + 1)
    axes.bar(places, counts, color=_BLUE, width=0.8, label="subsets", zorder=2)
    shapley, banzhaf = np.full(n + 1, m / (n + 1)), m * binom.pmf(places, n, 0.5)
    axes.plot(places, shapley, color=_ORANGE, label="Shapley", zorder=3)
    axes.plot(places, banzhaf, color=_GREEN, label="Banzhaf", zorder=3)
    axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _style(axes, "tasks in the subset", "number of subsets", grid="y")
    return axes


def interaction_heatmap(
    interactions: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    std: ArrayLike | None = None,
    level: float = 0.95,
    ax: "Axes | None" = None,
) -> "Axes":
    """Matrix of pairwise interactions, with white at zero and symmetric colours about it.

    Args:
        interactions: (n, n) float. The diagonal, which is no pair, is left blank and sets no scale.
        names: n task names; else those of the rows, else numbers.
        std: (n, n) float. Standard deviations; pairs whose central normal interval includes zero
            are left blank too.
        level: Coverage of the intervals, strictly between 0 and 1.
        ax: Where to draw.

    Returns:
        The axes, with a colour bar beside it. Up to 12 tasks the numbers are written in the cells.

    Raises:
        ValueError: If the matrix is not square or not finite, or ``std`` does not fit.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    table, drawn, labels = _pairs(interactions, std, names, level)
    num_tasks = len(table)
    limit = full_colour(table, drawn)
    side = min(9.0, 2.2 + 0.34 * num_tasks)
    axes = _axes(ax, (side + 0.8, side))
    values = np.ma.masked_array(table.numpy(), mask=~drawn.numpy())
    axes.set_facecolor(_BLANK)  # seen where nothing is drawn
    image = axes.imshow(values, cmap="RdBu", vmin=-limit, vmax=limit)
    if num_tasks <= _LABELLED_CELLS:
        for row, column in drawn.nonzero().tolist():
            value = float(table[row, column])
            colour = "white" if abs(value) > 0.6 * limit else _INK
            text = fixed(value, decimals(limit, 2))
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)
    _name_cells(axes, labels)
    _colour_bar(axes, image, "interaction")
    return axes


def interaction_network(
    interactions: ArrayLike,
    names: Sequence[str] | None = None,
    *,
    std: ArrayLike | None = None,
    level: float = 0.95,
    top: int = 30,
    ax: "Axes | None" = None,
) -> "Axes":
    """Tasks on a circle, joined where they interact: blue adds, orange subtracts, wide is strong.

    Args:
        interactions: (n, n) float, symmetric.
        names: n task names; else those of the rows, else numbers.
        std: (n, n) float. Standard deviations; pairs whose interval includes zero are left out.
        level: Coverage of the intervals, strictly between 0 and 1.
        top: How many pairs at most, the strongest.
        ax: Where to draw.

    Returns:
        The axes, with the tasks that some line ends at.

    Raises:
        ValueError: If the matrix is not square or not finite, or ``std`` does not fit.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    table, drawn, labels = _pairs(interactions, std, names, level)
    first, second = (drawn & drawn.T).triu(1).nonzero(as_tuple=True)
    kept = largest(table[first, second], check_positive_int("top", top))
    first, second = first[kept], second[kept]
    tasks = torch.unique(torch.cat([first, second])).tolist()
    axes = _axes(ax, (5.0, 5.0))
    angles = {task: 2 * np.pi * i / max(1, len(tasks)) for i, task in enumerate(tasks)}
    widest = float(table[first, second].abs().max()) if len(kept) else 1.0
    for i, j in zip(first.tolist(), second.tolist(), strict=True):
        value = float(table[i, j])
        ends = np.array([angles[i], angles[j]])
        width = 0.6 + 5 * abs(value) / (widest or 1.0)
        colour = _BLUE if value >= 0 else _ORANGE
        axes.plot(np.cos(ends), np.sin(ends), color=colour, lw=width, alpha=0.75, zorder=1)
    for task, angle in angles.items():
        axes.plot(np.cos(angle), np.sin(angle), "o", color=_INK, ms=7, zorder=2)
        side = "left" if np.cos(angle) >= 0 else "right"
        place = 1.08 * np.cos(angle), 1.08 * np.sin(angle)
        axes.text(*place, labels[task], ha=side, va="center", fontsize=9, color=_INK)
    axes.set_xlim(-1.6, 1.6)
    axes.set_ylim(-1.3, 1.3)
    axes.set_axis_off()
    return axes


def _pairs(
    interactions: ArrayLike, std: ArrayLike | None, names: Sequence[str] | None, level: float
) -> tuple[Tensor, Tensor, list[str]]:
    """A square table, which of its pairs are drawn, and the names of the tasks."""
    interactions, std = aligned(
        {"interactions": (interactions, "task", "other"), "std": (std, "task", "other")}
    )
    table = _finite("interactions", interactions, 2, "(n, n): tasks by tasks")
    num_tasks = len(table)
    if table.shape[1] != num_tasks:
        remedy = "Give one row and one column per task."
        raise ValueError(message("interactions", "square", shape_text(table), remedy))
    labels = _task_names(names, interactions, num_tasks)
    drawn = ~torch.eye(num_tasks, dtype=torch.bool)
    if std is not None:
        half = _half_widths(std, level, table.shape, "(n, n): tasks by tasks")
        drawn &= table.abs() > torch.from_numpy(half)
    return table, drawn, labels


def _answers(
    attributions: ArrayLike | Surrogate, std: ArrayLike | None, names: Sequence[str] | None
) -> tuple[Tensor, ArrayLike | None, list[str], list[str]]:
    """Attributions (n, t), their deviations, and the names of tasks and targets."""
    if isinstance(attributions, Surrogate):
        surrogate = attributions.with_tensor_answers()
        found = surrogate.attribute("loo", return_std=surrogate.has_intervals)
        values, std = found if surrogate.has_intervals else (found, None)
        labels = _task_names(names or surrogate.task_names, values, len(values))
        targets = [_label(name) for name in surrogate.target_names]
        return values.cpu().double(), std, labels, targets
    attributions, std = aligned(
        {"attributions": (attributions, "task", "target"), "std": (std, "task", "target")}
    )
    table = _finite("attributions", attributions, 2, "(n, t): tasks by targets")
    labels = _task_names(names, attributions, len(table))
    columns = names_along(attributions, 1) or range(table.shape[1])
    return table, std, labels, [_label(name) for name in columns]


def _of_one_target(
    surrogate: Surrogate, names: Sequence[str] | None
) -> tuple[Tensor, ArrayLike | None, list[str]]:
    """Leave-one-out effects (n,) of a surrogate of one target, their deviations, and names."""
    values, std, labels, targets = _answers(surrogate, None, names)
    if len(targets) > 1:
        remedy = "Draw attribution_map, or pass surrogate.attribute()[:, j]."
        found = f"{len(targets)} targets"
        raise ValueError(message("attributions", "a surrogate of one target", found, remedy))
    return values[:, 0], None if std is None else std[:, 0], labels


def _name_cells(axes: "Axes", labels: list[str]) -> None:
    """Write names beside a matrix: all of up to 40 tasks, else about 20 of them."""
    num_tasks = len(labels)
    ticks = np.arange(num_tasks) if num_tasks <= 40 else np.arange(0, num_tasks, num_tasks // 20)
    shown = [labels[tick] for tick in ticks]
    turned = max(len(label) for label in shown) > 3
    axes.set_xticks(ticks, shown, rotation=90 if turned else 0)
    axes.set_yticks(ticks, shown)
    axes.tick_params(length=0, labelsize=8, colors=_INK)
    axes.spines[:].set_visible(False)


def predicted_against_true(
    true_scores: ArrayLike, predicted_scores: ArrayLike, *, ax: "Axes | None" = None
) -> "Axes":
    """Scatter of predicted over true scores, with the line on which both agree.

    The title carries the mean over targets of :func:`ksm_ext.evaluation.lds` (constant truths count
    as 0) and the pooled :func:`ksm_ext.evaluation.residual_error`. Draw held-out subsets: where
    nothing is predicted, leave-one-out predictions are anticorrelated with the scores by
    construction.

    Args:
        true_scores: (l, t) or (l,) float.
        predicted_scores: (l, t) or (l,) float.
        ax: Where to draw.

    Returns:
        The axes, of equal scale both ways.

    Raises:
        ValueError: If shapes differ or values are not finite.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    true_scores, predicted_scores = aligned(
        {
            "true_scores": (true_scores, "subset", "target"),
            "predicted_scores": (predicted_scores, "subset", "target"),
        }
    )
    true = as_tensor("true_scores", true_scores).cpu().double()
    predicted = as_tensor("predicted_scores", predicted_scores).cpu().double()
    rank = float(lds(true, predicted, constant="zero").mean())
    error = float(residual_error(true, predicted, pooled=True))
    axes = _axes(ax, (4.0, 4.0))
    x, y = true.flatten().numpy(), predicted.flatten().numpy()
    size, alpha = (22, 0.75) if len(x) <= 300 else (8, 0.35)
    axes.scatter(x, y, s=size, alpha=alpha, color=_BLUE, linewidths=0, rasterized=len(x) > 5000)
    low, high = limits(true, predicted)
    margin = 0.05 * (high - low)
    ends = (low - margin, high + margin)
    axes.plot(ends, ends, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.set_xlim(ends)
    axes.set_ylim(ends)
    axes.set_aspect("equal", adjustable="box")
    title = f"Spearman {fixed(rank, 2)}   residual error {fixed(error, 2)}"
    axes.set_title(title, fontsize=10, color=_INK, loc="left")
    _style(axes, "true score", "predicted score", grid="both")
    return axes


def walsh_spectrum(
    fractions: ArrayLike, *, max_order: int | None = None, ax: "Axes | None" = None
) -> "Axes":
    """Bars of the fraction of a surrogate's variance at each order of interaction.

    Args:
        fractions: (r,) float between 0 and 1. Entry i belongs to order i + 1: single tasks first,
            then pairs, triples and so on.
        max_order: Draw the orders up to this one, the others together in a last bar.
        ax: Where to draw.

    Returns:
        The axes.

    Raises:
        ValueError: If fractions are not within 0 and 1.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    values = _finite("fractions", fractions, 1, "(r,): one fraction per order").numpy()
    outside = values[(values < -1e-9) | (values > 1 + 1e-9)]
    if len(outside):
        found, remedy = f"{outside[0]:.4g}", "Divide by the total variance."
        raise ValueError(message("fractions", "within 0 and 1", found, remedy))
    labels = [str(order + 1) for order in range(len(values))]
    if max_order is not None and max_order < len(values):
        max_order = check_positive_int("max_order", max_order)
        values = np.append(values[:max_order], values[max_order:].sum())
        labels = [*labels[:max_order], f"\N{GREATER-THAN OR EQUAL TO}{max_order + 1}"]
    axes = _axes(ax, (1.6 + 0.5 * len(values), 2.8))
    bars = axes.bar(labels, 100 * values, width=0.68, color=_BLUE, zorder=2)
    texts = [f"{100 * v:.0f}" if v >= 0.01 else "<1" if v > 0 else "0" for v in values]
    axes.bar_label(bars, texts, padding=2, fontsize=8, color=_INK)
    axes.set_ylim(0, max(1.0, 112 * values.max(initial=0)))
    _style(axes, "order of interaction", "variance [%]", grid="y")
    return axes


def learning_curve(
    num_subsets: ArrayLike,
    mean: ArrayLike,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    *,
    labels: Sequence[str] | None = None,
    ylabel: str = "mean Spearman correlation",
    ax: "Axes | None" = None,
) -> "Axes":
    """Lines of a metric over the number of scored subsets, with bands of its uncertainty.

    Args:
        num_subsets: (r,) numbers of subsets m, ascending.
        mean: (r,) or (c, r) float. One row per curve.
        low: Like ``mean``. Lower ends of the bands; given together with ``high``.
        high: Like ``mean``. Upper ends of the bands.
        labels: c names for the legend.
        ylabel: What is measured.
        ax: Where to draw.

    Returns:
        The axes. Its horizontal scale is logarithmic where m spans a factor of 8 or more.

    Raises:
        ValueError: If shapes differ or values are not finite.
        RuntimeError: If an own figure is wanted and Matplotlib is missing.
    """
    tables = {"num_subsets": num_subsets, "mean": mean, "low": low, "high": high}
    num_subsets, mean, low, high = aligned(
        {
            name: (value, "curve", "point")[:: 1 if len(getattr(value, "shape", ())) == 2 else 2]
            for name, value in tables.items()
        }
    )
    x = _finite("num_subsets", num_subsets, 1, "(r,): one number per point").numpy()
    curves = _curves("mean", mean, len(x))
    ends = _bands(low, high, curves)
    if labels is not None and len(labels) != len(curves):
        found = f"{len(labels)} of them"
        remedy = "Give one label per row of `mean`."
        raise ValueError(message("labels", f"{len(curves)} names", found, remedy))
    axes = _axes(ax, (4.8, 3.2))
    for number, curve in enumerate(curves):
        colour, marker = _CYCLE[number % len(_CYCLE)], _MARKERS[number % len(_MARKERS)]
        label = labels[number] if labels is not None else None
        axes.plot(x, curve, color=colour, marker=marker, markersize=4.5, linewidth=1.8, label=label)
        if ends is not None:
            low, high = ends[0][number], ends[1][number]
            axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
    if len(x) and x.min() > 0 and x.max() >= 8 * x.min():
        axes.set_xscale("log")
    axes.set_xticks(x, [f"{value:g}" for value in x], minor=False)
    axes.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    if labels is not None:
        axes.legend(frameon=False, fontsize=9, labelcolor=_INK)
    _style(axes, "number of subsets", ylabel, grid="y")
    return axes


def _axes(ax: "Axes | None", figsize: tuple[float, float]) -> "Axes":
    if ax is not None:
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        remedy = "Run: pip install 'ksm_ext[plot]'."
        raise RuntimeError(message("matplotlib", "installed", "no such module", remedy)) from error
    return plt.subplots(figsize=figsize, layout="constrained")[1]


def _colour_bar(axes: "Axes", image: Any, label: str) -> None:
    bar = axes.figure.colorbar(image, ax=axes, shrink=0.8, aspect=28, pad=0.03)
    bar.set_label(label, color=_INK)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=8, colors=_INK)


def _style(axes: "Axes", xlabel: str, ylabel: str | None, grid: Literal["x", "y", "both"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_MUTED)
    axes.tick_params(colors=_INK, labelsize=9, length=3, color=_MUTED)
    axes.set_xlabel(xlabel, color=_INK)
    if ylabel is not None:
        axes.set_ylabel(ylabel, color=_INK)
    axes.grid(axis=grid, color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)


def _finite(name: str, value: ArrayLike, ndim: int, meaning: str) -> Tensor:
    tensor = as_tensor(name, value).cpu().double()
    check_ndim(name, tensor, ndim, meaning)
    check_finite(name, tensor)
    return tensor


def _task_names(names: Sequence[str] | None, table: ArrayLike, num_tasks: int) -> list[str]:
    if names is None:
        return [_label(name) for name in names_along(table, 0) or range(num_tasks)]
    if len(names) != num_tasks:
        remedy = "Give one name per task."
        raise ValueError(message("names", f"{num_tasks} names", f"{len(names)} of them", remedy))
    return [_label(name) for name in names]


def _label(name: object) -> str:
    """A name as Matplotlib draws it: not too long, and no formula where there are dollars."""
    return shortened(str(name), _LONGEST).replace("$", r"\$")


def _half_widths(std: ArrayLike, level: float, shape: tuple[int, ...], meaning: str) -> np.ndarray:
    """Half the central normal interval of each standard deviation, (n,) or (n, n)."""
    deviations = _finite("std", std, len(shape), meaning)
    if deviations.shape != shape or bool((deviations < 0).any()):
        expected = f"{' x '.join(map(str, shape))} non-negative numbers"
        found = f"{shape_text(deviations)}, the least {float(deviations.min()):.4g}"
        remedy = "Give one standard deviation per value."
        raise ValueError(message("std", expected, found, remedy))
    return np.asarray(quantile(check_level("level", level)) * deviations)


def _curves(name: str, value: ArrayLike, num_points: int) -> np.ndarray:
    """A (c, r) table of curves; one dimension is one curve."""
    tensor = as_tensor(name, value)
    curves = tensor[None] if tensor.ndim == 1 else tensor
    table = _finite(name, curves, 2, "(c, r): curves by points")
    if table.shape[1] != num_points:
        expected = f"of {num_points} columns like `num_subsets`"
        remedy = "Give one value per number of subsets."
        raise ValueError(message(name, expected, shape_text(table), remedy))
    return table.numpy()


def _bands(
    low: ArrayLike | None, high: ArrayLike | None, curves: np.ndarray
) -> tuple[np.ndarray, np.ndarray] | None:
    """Both ends of the bands, shaped as the curves (c, r)."""
    if low is None and high is None:
        return None
    if low is None or high is None:
        found = "`high` alone" if low is None else "`low` alone"
        raise ValueError(message("low", "given together with `high`", found, "Give both ends."))
    ends = _curves("low", low, curves.shape[1]), _curves("high", high, curves.shape[1])
    for name, end in zip(("low", "high"), ends, strict=True):
        if end.shape != curves.shape:
            expected = f"of {len(curves)} rows like `mean`"
            raise ValueError(message(name, expected, str(len(end)), "Give one row per curve."))
    return ends
