"""The section of one target: its attributions, interactions, predictions and spectrum.

Shapes: attributions (n, t), interactions (n, n, t), scores (m, t).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from markupsafe import Markup
from torch import Tensor

from ksm_ext.checks import brief
from ksm_ext.drawing import decimals, fixed, largest
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.report.answers import Direction, answer
from ksm_ext.report.svg import heat_map, number, residuals, scatter, spectrum
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.quality import Quality, has_interactions
from ksm_ext.surrogates.surrogate import Surrogate

MAX_DRAWN = 40  # targets with drawings; the others have their tables
_MANY = 6  # targets from which drawings hold less
_MAX_ROWS, _MAX_PAIRS = 20, 10
_MAX_INTERACTIONS = 2**24  # n^2 t that are computed
_MAX_VARIANCES = 2**24  # pairs times subsets, of their intervals
_ROUNDING = 1e-9  # of the scores: an interaction below it is none, however narrow its interval
_MEANING = {
    "loo": "the full set of tasks against all but this one",
    "shapley": "the effect of adding the task, averaged over all orders of the tasks",
    "banzhaf": "the effect of adding the task, averaged over all subsets of the others",
}
_NO_STRUCTURE = {"text": "", "map": "", "pairs": None, "spectrum": "", "strongest": None}


@dataclass(frozen=True)
class Attributions:
    """What the sections and the map of tasks and targets share.

    Attributes:
        values: (n, t) attributions, float64 on the CPU.
        half: (n, t) half-widths of their 95 % intervals; None where there are none.
        readout: What they are.
    """

    values: Tensor
    half: Tensor | None
    readout: Readout

    __repr__ = brief

    @classmethod
    def of(cls, surrogate: Surrogate, readout: Readout) -> "Attributions":
        """Those of a surrogate that answers tensors."""
        found = surrogate.attribute(readout, return_std=surrogate.has_intervals)
        values, std = found if surrogate.has_intervals else (found, None)
        return cls(values, None if std is None else quantile(0.95) * std, readout)

    @property
    def clear(self) -> Tensor:
        """(n, t) bool: which intervals exclude zero; all, where there are no intervals."""
        if self.half is None:
            return torch.ones_like(self.values, dtype=torch.bool)
        return self.values.abs() > self.half


@dataclass(frozen=True)
class Predictions:
    """True scores and predictions that did not see them.

    Attributes:
        true: (l, t) scores, NaN where missing.
        predicted: (l, t).
        sizes: (l,) of the subsets; None of mixtures.
        held_out: Whether these are other subsets than those fitted.
    """

    true: Tensor
    predicted: Tensor
    sizes: Tensor | None
    held_out: bool

    __repr__ = brief


def sections(
    surrogate: Surrogate,
    attributions: Attributions,
    shown: Sequence[int],
    directions: Sequence[Direction],
    quality: Sequence[Quality],
    predictions: Predictions,
) -> list[dict[str, Any]]:
    """What the page says of each target of ``shown``.

    Args:
        surrogate: One that answers tensors.
        attributions: Of its tasks.
        shown: Numbers of the targets.
        directions: Which way each of the t targets gets better.
        quality: How well each of the t targets is predicted.
        predictions: True scores beside them.
    """
    structure = _Structure(surrogate, attributions.readout)
    most, cells = (1000, 40) if len(shown) <= _MANY else (200, 16)
    found = []
    for place, j in enumerate(shown):
        good, drawn = quality[j], place < MAX_DRAWN
        bars, said = None, None
        if not good.mean_only and (good.predicts or attributions.half is not None):
            bars = _bars(surrogate, attributions, j, directions[j])
            said = answer_of(surrogate, attributions, j, directions[j])
        about = structure.of(j, directions[j], cells if drawn else 0) if good.predicts else None
        found.append(
            {
                "anchor": f"target-{j}",
                "number": j,
                "name": surrogate.target_names[j],
                "error": float(surrogate.loo_error[j]),
                "warning": "" if good.predicts else f"{str(good).capitalize()}.",
                "answer": said,
                "direction": str(directions[j]),
                "attributions": bars,
                "structure": about or _NO_STRUCTURE,
                "drawings": _drawings(predictions, j, good, most) if drawn else (),
            }
        )
    return found


# -- attributions -------------------------------------------------------------------------------


def answer_of(
    surrogate: Surrogate, found: Attributions, j: int, direction: Direction
) -> dict[str, Any]:
    """What is said of a target first; see :func:`ksm_ext.report.answers.answer`."""
    half = None if found.half is None else found.half[:, j]
    digits = digits_of(found, j)
    return answer(found.values[:, j], half, surrogate.task_names, direction, digits)


def digits_of(found: Attributions, j: int) -> int:
    """Decimals of the attributions of a target."""
    left, right = ends_of(found, j)
    return _decimals(max(right, -left))


def ends_of(found: Attributions, j: int) -> tuple[float, float]:
    """Between what all bars and intervals of a target lie, zero included."""
    values = found.values[:, j]
    half = torch.zeros_like(values) if found.half is None else found.half[:, j]
    left, right = min(0.0, float((values - half).min())), max(0.0, float((values + half).max()))
    return (left, right) if left < right else (-1.0, 1.0)


def _bars(
    surrogate: Surrogate, found: Attributions, j: int, direction: Direction
) -> dict[str, Any]:
    """The largest attributions as rows; all of them are data that the script sorts and finds."""
    values, half = found.values[:, j], None if found.half is None else found.half[:, j]
    order = largest(values, _MAX_ROWS)
    if len(order) == len(values):
        order = values.argsort(descending=True, stable=True)
    left, right = ends_of(found, j)
    digits = _decimals(max(right, -left))
    rows = []
    for i in order.tolist():
        value, width = float(values[i]), 0.0 if half is None else float(half[i])
        ends = () if half is None else (value - width, value + width)
        row = {"name": surrogate.task_names[i], **_bar(value, width, left, right, direction.sign)}
        rows.append(row | {"numbers": [fixed(v, digits) for v in (value, *ends)]})
    caption = f"Attributions ({found.readout}): {_MEANING[found.readout]}, in units of the score. "
    if not surrogate.masks.binary:
        caption = "Attributions (loo): the mean weights against the same without this task. "
    caption += f"{colours(direction)}. "
    if half is None:
        caption += "There are no intervals: which differ from zero is not known. "
    else:
        caption += "Low and high end the 95 % interval; pale: it includes zero. "
    return {
        "caption": caption + cap(len(order), len(values)),
        "columns": ["task", "size", "value", *(["low", "high"] if half is not None else [])],
        "style": "attributions" + " certain" * (half is None),
        "zero": _place(0.0, left, right),
        "rows": rows,
        "data": {
            "left": left,
            "right": right,
            "decimals": digits,
            "sign": direction.sign,
            "widest": None if half is None else float(half.max()),
        },
    }


def colours(direction: Direction) -> str:
    """What the two colours stand for."""
    good, bad = direction.words
    return f"Blue: {good}; orange: {bad}"


def cap(shown: int, total: int) -> str:
    """What a caption says of a table or drawing that leaves some out."""
    return f"Shown: {shown} of {total:,}." if shown < total else ""


def _decimals(largest: float) -> int:
    return min(9, decimals(largest, 3))


def _place(value: float, left: float, right: float) -> float:
    """Where a value lies between the ends of all bars, in percent of their width."""
    return 2 + 96 * (value - left) / (right - left)


def _bar(value: float, half: float, left: float, right: float, sign: int) -> dict[str, Any]:
    """The style of a cell: a bar from zero, and where it and its interval begin and how far go."""
    style = "good" if sign * value >= 0 else "bad"
    unsure = " unsure" if half > 0 and abs(value) <= half else ""
    start, end = (_place(v, left, right) for v in (min(0.0, value), max(0.0, value)))
    low, high = (_place(v, left, right) for v in (value - half, value + half))
    return {"style": style + unsure, "places": (start, end - start, low, high - low)}


# -- interactions and spectrum ------------------------------------------------------------------


class _Structure:
    """How tasks act together: interactions (n, n, t) and the Walsh spectrum (r, t), of masks."""

    def __init__(self, surrogate: Surrogate, readout: Readout) -> None:
        n, t = surrogate.masks.num_tasks, len(surrogate.target_names)
        self.names, self.binary = surrogate.task_names, surrogate.masks.binary
        self.able = has_interactions(surrogate)
        self.pairs = self.half = self.spectrum = None
        if n < 2 or not surrogate.masks.binary:
            return
        if any(self.able):
            self.spectrum = surrogate.walsh_spectrum(min(6, surrogate.num_varying))
        few = n * n * t <= _MAX_INTERACTIONS and n * n * len(surrogate.masks) <= _MAX_VARIANCES
        if few and any(self.able) and surrogate.has_intervals:
            self.pairs, std = surrogate.interactions(readout, return_std=True)
            self.half = quantile(0.95) * std + _ROUNDING * surrogate.unit.cpu()

    def of(self, j: int, direction: Direction, most_cells: int) -> dict[str, Any] | None:
        """The spectrum of one target, and its clear interactions as a map and a table, or why not.

        A linear surrogate's spectrum is left out too: it is one bar by the surrogate's form.
        """
        if len(self.names) < 2 or not self.binary:
            return None
        if not self.able[j]:
            return _NO_STRUCTURE | {"text": "A linear surrogate has no interactions."}
        if self.spectrum is None:
            return None
        found = dict(_NO_STRUCTURE)
        if most_cells:
            found["spectrum"] = spectrum(self.spectrum[:, j].tolist())
        if self.pairs is None or self.half is None:
            text = "Interactions are left out: their intervals were not computed."
            return found | {"text": text}
        pairs, half = self.pairs[:, :, j], self.half[:, :, j]
        clear = pairs.abs() > half
        if not clear.any():
            text = "No interaction is clear of zero: every 95 % interval includes it."
            return found | {"text": text}
        strength = (pairs.abs() * clear).amax(1)
        shown = largest(strength, min(most_cells, int((strength > 0).sum()))).sort().values
        names, grid = [self.names[i] for i in shown.tolist()], (shown[:, None], shown)
        if most_cells:
            counts, words = (len(self.names), direction.sign), colours(direction)
            found["map"] = heat_map(pairs[grid], clear[grid], names, *counts, words)
        rows = self._strongest(pairs, half, clear)
        return found | {"pairs": rows, "strongest": rows["rows"][0]}

    def _strongest(self, pairs: Tensor, half: Tensor, clear: Tensor) -> dict[str, Any]:
        """A table of the strongest clear pairs, which says what the map shows to the eye."""
        first, second = clear.triu(1).nonzero(as_tuple=True)
        values, half = pairs[first, second], half[first, second]
        digits = _decimals(float(values.abs().max()))
        rows = []
        for at in largest(values, _MAX_PAIRS).tolist():
            ends = [float(values[at] + side * half[at]) for side in (0, -1, 1)]
            names = self.names[int(first[at])], self.names[int(second[at])]
            rows.append({"names": names, "numbers": [(end, fixed(end, digits)) for end in ends]})
        caption = (
            f"Strongest interactions. {len(values):,} of {math.comb(len(pairs), 2):,} have a 95 % "
            f"interval that excludes zero. {cap(len(rows), len(values))}"
        )
        return {"caption": caption, "rows": rows}


# -- predictions --------------------------------------------------------------------------------


def _drawings(found: Predictions, j: int, quality: Quality, most: int) -> list[Markup]:
    """Predictions of one target over its true scores, and errors over sizes of subsets."""
    seen = ~found.true[:, j].isnan()  # of leave-one-out predictions: a missing score has none
    true, predicted = found.true[seen, j], found.predicted[seen, j]
    if bool((true == true[0]).all()):
        numbers = "all true scores are equal"
    else:
        error = float(residual_error(true, predicted)[0])
        numbers = f"squared error {number(error, 2)} of the variance"
        # Held-out predictions may be far off and yet in the right order.
        if quality.predicts or (found.held_out and not quality.mean_only):
            numbers = f"Spearman {number(float(lds(true, predicted)[0]), 2)}, {numbers}"
        else:
            numbers += ", no better than the mean"
    kind = "held-out" if found.held_out else quality.how
    drawn = [scatter(true, predicted, kind, numbers, most)]
    if found.sizes is not None:
        drawn.append(residuals(found.sizes[seen], true - predicted, most))
    return drawn
