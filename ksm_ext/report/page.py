r"""A fitted surrogate as one HTML page: no network, readable without scripts, in light and dark.

What was fitted and how well, attributions with 95 % intervals, the interactions whose intervals
exclude zero, predictions of subsets left out, the Walsh spectrum, and what more subsets would buy.
What was not measured is not shown: a target that is not predicted has neither rank correlation nor
interactions, a linear surrogate has no interactions. The words are in ``page.html.j2``; what is
filled in there, and escaped, since names are the user's, is computed here.

Shapes: attributions (n, t), interactions (n, n, t), scores (m, t); a section per target shown.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from ksm_ext.arrays import ArrayLike, aligned, as_tensor, position
from ksm_ext.atomic_write import write_whole
from ksm_ext.checks import check_choice, check_finite, message, shape_text
from ksm_ext.drawing import decimals, fixed, largest
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.report.svg import heat_map, number, scatter, spectrum
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.candidates import Candidate, beats_the_mean
from ksm_ext.surrogates.more_subsets import more_subsets
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.quality import Quality, has_interactions, qualities, suitability
from ksm_ext.surrogates.readouts import READOUTS
from ksm_ext.surrogates.surrogate import Surrogate

_MAX_TARGETS, _MAX_ROWS, _MAX_KERNELS, _MAX_PAIRS = 6, 200, 12, 10
_MAX_CELLS = 40  # tasks on a side of the map of interactions
_MAX_INTERACTIONS = 2**24  # n^2 t that are computed for it
_MAX_VARIANCES = 2**24  # pairs times subsets, of their intervals
_ROUNDING = 1e-9  # of the scores: an interaction below it is none, however narrow its interval
_MEANING = {
    "loo": "the full set of tasks against all but this one",
    "shapley": "the effect of adding the task, averaged over all orders of the tasks",
    "banzhaf": "the effect of adding the task, averaged over all subsets of the others",
}
_NO_STRUCTURE = {"text": "", "map": "", "pairs": None, "spectrum": ""}
_SHARING = {
    "shared": "one ridge for all targets",
    "target": "a ridge for every target",
    "component": "a ridge for every principal component of the targets",
}


def write_report(
    surrogate: Surrogate,
    path: Any,
    *,
    title: str = "Task attribution",
    readout: Readout = "loo",
    held_out: tuple[ArrayLike, ArrayLike] | None = None,
    target: str | int | None = None,
) -> None:
    """Write a page about a fitted surrogate; it appears whole or not at all.

    Six targets at most are shown, evenly spaced, unless ``target`` names one. All tasks can be
    sorted and searched; the 200 of the largest attributions are there without scripts. Interactions
    are shown where their intervals exclude zero; their map has the 40 tasks of the strongest at
    most. The page says what it leaves out.

    Args:
        surrogate: What :func:`ksm_ext.fit_surrogate` returned.
        path: The HTML file.
        title: Heading of the page.
        readout: ``"loo"``, ``"shapley"`` or ``"banzhaf"``; real-valued weights know only the first.
        held_out: Masks (l, n) and scores (l, t) of subsets the surrogate was not fitted to; drawn
            instead of the leave-one-out predictions.
        target: Name or number of the only target shown.

    Raises:
        ValueError: If ``readout`` or ``target`` is unknown, or ``held_out`` has other shapes.
        OSError: If the file cannot be written.
    """
    check_choice("readout", readout, READOUTS)
    t = len(surrogate.target_names)
    if target is None:
        shown = torch.linspace(0, t - 1, min(t, _MAX_TARGETS)).round().long().tolist()
    else:
        shown = [position("target", target, surrogate.target_names)]
    predictions = _predictions(surrogate, held_out)
    surrogate = surrogate.with_tensor_answers()
    quality = qualities(surrogate)
    targets = _targets(surrogate, readout, shown, quality, predictions, held_out is not None)
    fitted = _fit(surrogate, readout, any(each.predicts for each in quality))
    page = _filled({"title": title, "targets": targets, **fitted})
    write_whole(Path(path), page.encode())


def _filled(facts: dict[str, Any]) -> str:
    pages = Environment(
        loader=PackageLoader("ksm_ext.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    pages.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":")}
    pages.filters |= {
        "number": number,
        "sorted_by": lambda value: f"{value:.12g}" if math.isfinite(value) else "-Infinity",
    }
    return pages.get_template("page.html.j2").render(facts)


# -- the fit ------------------------------------------------------------------------------------


def _fit(surrogate: Surrogate, readout: Readout, predicts: bool) -> dict[str, Any]:
    """What the page says of all targets together."""
    error = surrogate.loo_error
    able = predicts and surrogate.has_intervals and surrogate.masks.binary
    return {
        "summary": {
            "subsets": f"{len(surrogate.masks):,}",
            "tasks": f"{surrogate.masks.num_tasks:,}",
            "targets" if len(error) > 1 else "target": f"{len(error):,}",
            "variance explained*": f"{max(0.0, 100 * (1 - float(error.mean()))):.0f} %",
        },
        "kernels": surrogate.predictors or "mean only",
        "notes": surrogate.warp_notes,
        "sharing": _SHARING[surrogate.sharing],
        "error": float(error.mean()),
        "noise": surrogate.noise_summary,
        "num_targets": len(error),
        "num_subsets": len(surrogate.masks),
        "tasks": surrogate.task_names,
        "binary": surrogate.masks.binary,
        "candidates": _candidates(surrogate),
        "predicts": predicts,
        "advice": more_subsets(surrogate, readout) if able else None,
        "design": suitability(surrogate, readout) if surrogate.masks.binary else None,
        "readout": readout,
        "smooth": surrogate.noise is None and bool(surrogate.nugget_share.any()),
    }


def _candidates(surrogate: Surrogate) -> dict[str, Any]:
    """The kernels compared, each at its best ridge, those in use first."""
    best: dict[tuple[str, int], Candidate] = {}
    for row in sorted(surrogate.candidates, key=lambda row: row.error):
        best.setdefault((row.kernel, row.num_subsets), row)
    chosen = {(row.kernel, row.num_subsets) for row in surrogate.candidates if row.num_chosen}
    ranked = sorted(best.items(), key=lambda item: (item[0] not in chosen, item[1].error))
    rows = []
    for key, row in ranked[:_MAX_KERNELS]:
        name, rank = row.kernel + " ✓" * (key in chosen), row.rank_correlation
        if not beats_the_mean(row.error, rank):
            rank = math.nan  # that of a mean, -1 by construction
        numbers = (row.ridge, row.error, rank)
        rows.append({"kernel": name, "numbers": numbers, "num_subsets": row.num_subsets})
    caption = f"Kernels compared, each at its best ridge; ✓ in use. {_cap(len(rows), len(ranked))}"
    return {"caption": caption, "rows": rows}


def _cap(shown: int, total: int) -> str:
    return f"Shown: {shown} of {total:,}." if shown < total else ""


# -- targets ------------------------------------------------------------------------------------


def _targets(
    surrogate: Surrogate,
    readout: Readout,
    shown: list[int],
    quality: list[Quality],
    predictions: tuple[Tensor, Tensor],
    held_out: bool,
) -> list[dict[str, Any]]:
    answer = surrogate.attribute(readout, return_std=surrogate.has_intervals)
    values, std = answer if surrogate.has_intervals else (answer, None)
    structure = _Structure(surrogate, readout)
    sections = []
    for j in shown:
        good, bars = quality[j], None
        if not good.mean_only and (good.predicts or std is not None):
            deviations = None if std is None else std[:, j]
            bars = _attributions(surrogate, readout, values[:, j], deviations)
        true, predicted = (scores[:, j] for scores in predictions)
        sections.append(
            {
                "anchor": f"target-{j}",
                "name": surrogate.target_names[j],
                "error": float(surrogate.loo_error[j]),
                "warning": "" if good.predicts else f"{str(good).capitalize()}.",
                "attributions": bars,
                "structure": structure.of(j) if good.predicts else _NO_STRUCTURE,
                "scatter": _scatter(true, predicted, good, held_out),
            }
        )
    return sections


class _Structure:
    """How tasks act together: interactions (n, n, t) and the Walsh spectrum (r, t), of masks."""

    def __init__(self, surrogate: Surrogate, readout: Readout) -> None:
        n, t = surrogate.masks.num_tasks, len(surrogate.target_names)
        self.names = surrogate.task_names
        self.able = has_interactions(surrogate)
        self.pairs = self.half = self.spectrum = None
        if n < 2 or not surrogate.masks.binary:
            return
        self.spectrum = surrogate.walsh_spectrum(min(6, surrogate.num_varying))
        few = n * n * t <= _MAX_INTERACTIONS and n * n * len(surrogate.masks) <= _MAX_VARIANCES
        if few and any(self.able) and surrogate.has_intervals:
            self.pairs, std = surrogate.interactions(readout, return_std=True)
            self.half = quantile(0.95) * std + _ROUNDING * surrogate.unit.cpu()

    def of(self, j: int) -> dict[str, Any]:
        """The spectrum of one target, and its clear interactions as a map and a table, or why not.

        A linear surrogate's spectrum is left out too: it is one bar by the surrogate's form.
        """
        if self.spectrum is None:
            return _NO_STRUCTURE
        if not self.able[j]:
            return _NO_STRUCTURE | {"text": "A linear surrogate has no interactions."}
        found = _NO_STRUCTURE | {"spectrum": spectrum(self.spectrum[:, j].tolist())}
        if self.pairs is None or self.half is None:
            text = "Interactions are left out: their intervals were not computed."
            return found | {"text": text}
        pairs, half = self.pairs[:, :, j], self.half[:, :, j]
        clear = pairs.abs() > half
        if not clear.any():
            text = "No interaction is clear of zero: every 95 % interval includes it."
            return found | {"text": text}
        strength = (pairs.abs() * clear).amax(1)
        shown = largest(strength, min(_MAX_CELLS, int((strength > 0).sum()))).sort().values
        names, grid = [self.names[i] for i in shown.tolist()], (shown[:, None], shown)
        drawing = heat_map(pairs[grid], clear[grid], names, len(self.names))
        return found | {"map": drawing, "pairs": self._strongest(pairs, half, clear)}

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
            f"interval that excludes zero. {_cap(len(rows), len(values))}"
        )
        return {"caption": caption, "rows": rows}


def _predictions(
    surrogate: Surrogate, held_out: tuple[ArrayLike, ArrayLike] | None
) -> tuple[Tensor, Tensor]:
    """(l, t) true scores, NaN where missing, and the predictions that did not see them."""
    if held_out is None:
        scores = surrogate.scores.cpu()
        return scores, scores - surrogate.with_tensor_answers().loo_residuals
    masks, scores = aligned(
        {
            "held_out[0]": (held_out[0], "subset", "task"),
            "held_out[1]": (held_out[1], "subset", "target"),
        },
        {"task": surrogate.task_names, "target": surrogate.target_names},
    )
    predicted = surrogate.with_tensor_answers().predict(masks)
    true = as_tensor("held_out", scores).cpu().double()
    if surrogate.single_target and true.ndim == 1:
        true = true[:, None]
    if true.shape != predicted.shape or len(true) < 2:
        l, t = predicted.shape
        expected = f"scores of {l} subsets (at least 2) and {t} targets"
        remedy = "Give masks (l, n) and scores (l, t)."
        raise ValueError(message("held_out", expected, shape_text(true), remedy))
    check_finite("held_out", true)
    return true, predicted


def _scatter(true: Tensor, predicted: Tensor, quality: Quality, held_out: bool) -> str:
    """Predictions (l,) of one target over its true scores, with what they are worth."""
    seen = ~true.isnan()  # of leave-one-out predictions: a missing score has none
    true, predicted = true[seen], predicted[seen]
    if bool((true == true[0]).all()):
        numbers = "all true scores are equal"
    else:
        error = float(residual_error(true, predicted)[0])
        numbers = f"squared error {number(error, 2)} of the variance"
        # Held-out predictions may be far off and yet in the right order.
        if quality.predicts or (held_out and not quality.mean_only):
            numbers = f"Spearman {number(float(lds(true, predicted)[0]), 2)}, {numbers}"
        else:
            numbers += ", no better than the mean"
    return scatter(true, predicted, "held-out" if held_out else quality.how, numbers)


def _attributions(
    surrogate: Surrogate, readout: Readout, values: Tensor, std: Tensor | None
) -> dict[str, Any]:
    """The largest attributions as rows, and all of them as data that the script sorts and finds."""
    order = largest(values, _MAX_ROWS)
    if len(order) == len(values):
        order = values.argsort(descending=True, stable=True)
    half = torch.zeros_like(values) if std is None else quantile(0.95) * std
    left, right = min(0.0, float((values - half).min())), max(0.0, float((values + half).max()))
    if left == right:
        left, right = -1.0, 1.0
    digits = _decimals(max(right, -left))
    rows = []
    for i in order.tolist():
        value, width = float(values[i]), float(half[i])
        ends = () if std is None else (value - width, value + width)
        row = {"name": surrogate.task_names[i], **_bar(value, width, left, right)}
        rows.append(row | {"numbers": [fixed(v, digits) for v in (value, *ends)]})
    caption = f"Attributions ({readout}): {_MEANING[readout]}, in units of the score. "
    if not surrogate.masks.binary:
        caption = "Attributions (loo): the mean weights against the same without this task. "
    if std is None:
        caption += "There are no intervals: which differ from zero is not known. "
    else:
        caption += "Low and high end the 95 % interval; pale: it includes zero. "
    return {
        "caption": caption + _cap(len(order), len(values)),
        "columns": ["task", "size", "value", *(["low", "high"] if std is not None else [])],
        "style": "attributions" + " certain" * (std is None),
        "zero": _place(0.0, left, right),
        "rows": rows,
        "data": {
            "values": _rounded(values),
            "halves": None if std is None else _rounded(half),
            "left": left,
            "right": right,
            "decimals": digits,
        },
    }


def _decimals(largest: float) -> int:
    return min(9, decimals(largest, 3))


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]


def _place(value: float, left: float, right: float) -> float:
    """Where a value lies between the ends of all bars, in percent of their width."""
    return 2 + 96 * (value - left) / (right - left)


def _bar(value: float, half: float, left: float, right: float) -> dict[str, Any]:
    """The style of a cell: a bar from zero, and where it and its interval begin and how far go."""
    sign = "up" if value >= 0 else "down"
    unsure = " unsure" if half > 0 and abs(value) <= half else ""
    start, end = (_place(v, left, right) for v in (min(0.0, value), max(0.0, value)))
    low, high = (_place(v, left, right) for v in (value - half, value + half))
    return {"style": sign + unsure, "places": (start, end - start, low, high - low)}
