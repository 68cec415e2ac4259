r"""A fitted surrogate as one HTML page: no network, readable without scripts, in light and dark.

What was fitted and how well, attributions with 95 % intervals, the interactions whose intervals
exclude zero, predictions of subsets left out, the Walsh spectrum, and what more subsets would buy.
What was not measured is not shown: a target that is not predicted has neither rank correlation nor
interactions, a linear surrogate has no interactions. Style, script and drawings are in the page;
names are the user's and are escaped.

Shapes: attributions (n, t), interactions (n, n, t), scores (m, t); a section per target shown.
"""

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from numbers import Integral
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, aligned, as_tensor
from ksm_ext.atomic_write import write_whole
from ksm_ext.checks import check_choice, check_finite, message, shape_text
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.report.svg import heat_map, number, scatter, spectrum
from ksm_ext.surrogates.candidates import Candidate, says_something
from ksm_ext.surrogates.more_subsets import more_subsets
from ksm_ext.surrogates.quality import Quality, has_interactions, qualities
from ksm_ext.surrogates.readouts import READOUTS
from ksm_ext.surrogates.surrogate import Z95, Surrogate

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


def write_report(
    surrogate: Surrogate,
    path: Any,
    *,
    title: str = "Task attribution",
    readout: str | None = None,
    held_out: tuple[ArrayLike, ArrayLike] | None = None,
    target: str | int | None = None,
) -> None:
    """Write a page about a fitted surrogate; it appears whole or not at all.

    Six targets at most are shown, evenly spaced, unless ``target`` names one. All tasks can be
    sorted and searched; 200 of them, those of the largest attributions, are there without scripts.
    Interactions are shown where their intervals exclude zero; their map has at most 40 tasks, those
    of the strongest. The page says what it leaves out.

    Args:
        surrogate: What :func:`ksm_ext.fit_surrogate` returned.
        path: The HTML file.
        title: Heading of the page.
        readout: ``"shapley"``, ``"loo"`` or ``"banzhaf"``; by default the first, or ``"loo"`` for
            real-valued weights, which know no other.
        held_out: Masks (l, n) and scores (l, t) of subsets the surrogate was not fitted to; drawn
            instead of the leave-one-out predictions.
        target: Name or number of the only target shown.

    Raises:
        ValueError: If ``readout`` or ``target`` is unknown, or ``held_out`` has other shapes.
        OSError: If the file cannot be written.
    """
    readout = readout or ("shapley" if surrogate.masks.binary else "loo")
    check_choice("readout", readout, READOUTS)
    shown = _shown_targets(surrogate, target)
    single, surrogate = surrogate.single_target, surrogate.with_tensor_answers()
    if surrogate.has_intervals:
        values, std = surrogate.attribute(readout, return_std=True)
    else:
        values, std = surrogate.attribute(readout), None
    true, predicted = _predictions(surrogate, held_out, single)
    structure = _Structure(surrogate, readout)
    quality = qualities(surrogate)
    sections = []
    for j in shown:
        good, deviations = quality[j], None if std is None else std[:, j]
        texts, figures = [], [_scatter(true[:, j], predicted[:, j], good, held_out is not None)]
        if not good.predicts:
            texts.append(f"<p>{escape(str(good).capitalize())}.</p>")
        if not good.mean_only and (good.predicts or deviations is not None):
            texts.append(_attribution_table(surrogate, readout, values[:, j], deviations))
        if good.predicts:
            text, drawings = structure.interactions_of(j)
            texts.append(text)
            figures = [*drawings, *figures, structure.spectrum_of(j)]
        sections.append(_section(_anchor(j), surrogate.target_names[j], texts, figures))
    content = Template(_asset("report.html")).substitute(
        title=escape(title),
        style=_asset("report.css"),
        script=_asset("report.js"),
        tasks=_json(surrogate.task_names),
        summary=_tiles(surrogate),
        lead=_lead(surrogate, shown),
        targets="\n".join(sections),
        candidates=_candidates_table(surrogate),
        advice=_advice(surrogate, readout, any(good.predicts for good in quality)),
    )
    write_whole(Path(path), content.encode())


# -- what is shown ------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return (files("ksm_ext.report") / name).read_text(encoding="utf-8")


def _json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _shown_targets(surrogate: Surrogate, target: str | int | None) -> list[int]:
    names = surrogate.target_names
    if target is None:
        count = min(len(names), _MAX_TARGETS)
        return torch.linspace(0, len(names) - 1, count).round().long().tolist()
    if isinstance(target, str) and target in names:
        return [names.index(target)]
    if isinstance(target, Integral) and 0 <= target < len(names):
        return [int(target)]
    some = ", ".join(repr(name) for name in names[:8]) + (", …" if len(names) > 8 else "")
    remedy = "Leave it out to show several."
    raise ValueError(message("target", f"a number or one of {some}", repr(target), remedy))


class _Structure:
    """How tasks act together: interactions (n, n, t) and the Walsh spectrum (r, t), of masks."""

    def __init__(self, surrogate: Surrogate, readout: str) -> None:
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
            self.half = Z95 * std + _ROUNDING * surrogate.unit.cpu()

    def interactions_of(self, j: int) -> tuple[str, list[str]]:
        """A sentence on the interactions of one target, or a map and a table of the clear ones."""
        if self.spectrum is None:
            return "", []
        if not self.able[j]:
            return "<p>A linear surrogate has no interactions.</p>", []
        if self.pairs is None or self.half is None:
            return "<p>Interactions are left out: their intervals were not computed.</p>", []
        pairs, half = self.pairs[:, :, j], self.half[:, :, j]
        clear = pairs.abs() > half
        if not clear.any():
            text = "No interaction is clear of zero: every 95 % interval includes it."
            return f"<p>{text}</p>", []
        strength = (pairs.abs() * clear).amax(1)
        order = strength.argsort(descending=True, stable=True)[: int((strength > 0).sum())]
        shown = order[:_MAX_CELLS].sort().values
        names, grid = [self.names[i] for i in shown.tolist()], (shown[:, None], shown)
        drawing = heat_map(pairs[grid], clear[grid], names, len(self.names))
        return "", [drawing, self._strongest(pairs, half, clear)]

    def spectrum_of(self, j: int) -> str:
        """The Walsh spectrum of one target, unless it is one bar by the surrogate's form."""
        if self.spectrum is None or not self.able[j]:
            return ""
        return spectrum(self.spectrum[:, j].tolist())

    def _strongest(self, pairs: Tensor, half: Tensor, clear: Tensor) -> str:
        """A table of the strongest clear pairs, which says what the map shows to the eye."""
        first, second = clear.triu(1).nonzero(as_tuple=True)
        values, half = pairs[first, second], half[first, second]
        decimals = _decimals(float(values.abs().max()))
        rows = []
        for at in values.abs().argsort(descending=True, stable=True)[:_MAX_PAIRS].tolist():
            one, other = (self.names[int(task[at])] for task in (first, second))
            row = [_row_header(one), f'<td class="name">{escape(other)}</td>']
            ends = (values[at], values[at] - half[at], values[at] + half[at])
            rows.append(row + [_cell(float(end), decimals) for end in ends])
        caption = (
            f"Strongest interactions. {len(values):,} of {math.comb(len(pairs), 2):,} have a 95 % "
            f"interval that excludes zero. {_cap(len(rows), len(values))}"
        )
        return _html_table(caption, ("task", "with", "value", "low", "high"), rows, style="pairs")


def _predictions(
    surrogate: Surrogate, held_out: tuple[ArrayLike, ArrayLike] | None, single_target: bool
) -> tuple[Tensor, Tensor]:
    """(l, t) true scores, NaN where missing, and the predictions that did not see them."""
    if held_out is None:
        return surrogate.scores.cpu(), (surrogate.scores - surrogate.residuals).cpu()
    masks, scores = aligned(
        {
            "held_out[0]": (held_out[0], "subset", "task"),
            "held_out[1]": (held_out[1], "subset", "target"),
        },
        {"task": surrogate.task_names, "target": surrogate.target_names},
    )
    predicted = surrogate.predict(masks)
    true = as_tensor("held_out", scores).cpu().double()
    if single_target and true.ndim == 1:
        true = true[:, None]
    if true.shape != predicted.shape or len(true) < 2:
        expected = (
            f"scores of {len(predicted)} subsets (at least 2) and {predicted.shape[1]} targets"
        )
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


# -- text ---------------------------------------------------------------------------------------


def _anchor(j: int) -> str:
    return f"target-{j}"


def _fixed(value: float, decimals: int) -> str:
    """With as many decimals as the rest of its column."""
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _kernels(surrogate: Surrogate) -> str:
    names = [str(term.kernel) for term in surrogate.kernel_terms if bool(term.dual.any())]
    names += ["linear weights"] * bool(surrogate.linear_terms)
    return ", ".join(dict.fromkeys(names)) or "mean only"


def _tiles(surrogate: Surrogate) -> str:
    error = surrogate.loo_error
    facts = {
        "subsets": f"{len(surrogate.masks):,}",
        "tasks": f"{surrogate.masks.num_tasks:,}",
        "targets" if len(error) > 1 else "target": f"{len(error):,}",
        "variance explained*": f"{max(0.0, 100 * (1 - float(error.mean()))):.0f} %",
    }
    return "\n".join(f"<div><dd>{v}</dd><dt>{escape(k)}</dt></div>" for k, v in facts.items())


def _lead(surrogate: Surrogate, shown: Sequence[int]) -> str:
    names = surrogate.target_names
    error = surrogate.loo_error
    sharing = {
        "shared": "one ridge for all targets",
        "target": "a ridge for every target",
        "component": "a ridge for every principal component of the targets",
    }[surrogate.sharing]
    lines = [
        f"<p>Kernel: <strong>{escape(_kernels(surrogate))}</strong>, {sharing}. "
        f"*Of subsets that were left out of the fit; mean error {number(float(error.mean()))} of "
        f"the variance.</p>"
    ]
    if len(shown) < len(names):
        lines.append(f"<p>Shown: {len(shown)} of {len(names):,} targets.</p>")
    if len(shown) > 1:
        links = " ".join(
            f'<a href="#{_anchor(j)}">{escape(names[j])}'
            f"<span>error {number(float(error[j]), 2)}</span></a>"
            for j in shown
        )
        lines.append(f'<nav aria-label="Targets">{links}</nav>')
    return "\n".join(lines)


def _section(anchor: str, name: str, texts: Sequence[str], figures: Sequence[str]) -> str:
    text = "\n".join(texts)
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-name">\n'
        f'<h2 id="{anchor}-name">{escape(name)}</h2>\n{text}\n'
        f'<div class="figures">{"".join(figures)}</div>\n</section>'
    )


def _advice(surrogate: Surrogate, readout: str, predicts: bool) -> str:
    """Of how many more subsets, where attributions have a posterior and something is predicted."""
    if not predicts:
        return (
            "<p>Nothing is predicted from these subsets. How many more would change that is not "
            "known.</p>"
        )
    if not surrogate.has_intervals or not surrogate.kernel_terms:
        remedy = (
            " Fit a kernel, for example <code>kernel=&quot;linear&quot;</code> (ridge), to know."
        )
        return (
            "<p>Not known: there are no intervals of a kernel's attributions that more subsets "
            f"could narrow.{remedy if surrogate.masks.binary else ''}</p>"
        )
    m, advice = len(surrogate.masks), more_subsets(surrogate, readout)
    if advice.num_more is None:
        answer = "More subsets of these sizes would hardly narrow the intervals."
    else:
        answer = (
            f"About <strong>{advice.num_more:,} more subsets</strong> "
            f"({m + advice.num_more:,} instead of {m:,}) <strong>would halve the intervals</strong>"
            " of the attributions, on average over tasks and targets."
        )
    how = (
        "Computed from the posterior variance, σ² (L K Lᵀ \N{MINUS SIGN} L K (K + λI)⁻¹ K Lᵀ) with "
        "K centred: "
        "it depends on which subsets are scored and not on their scores, so subsets of the same "
        "sizes can be added before they are trained on."
        if advice.computed
        else f"Extrapolated from {m:,} subsets, not computed: intervals are taken to shrink as a "
        "power of the number of subsets."
    )
    return (
        f"<p>{answer}</p><p>{how} Kernel and noise are taken as fitted; a wrong kernel is not "
        f"cured by more subsets.</p>"
    )


def _candidates_table(surrogate: Surrogate) -> str:
    best: dict[tuple[str, int], Candidate] = {}
    chosen: dict[tuple[str, int], int] = {}
    for row in surrogate.candidates:
        key = (row.kernel, row.num_subsets)
        chosen[key] = chosen.get(key, 0) + row.num_chosen
        if key not in best or row.error < best[key].error:
            best[key] = row
    rows = sorted(best.items(), key=lambda item: (not chosen[item[0]], item[1].error))
    cells = [
        (
            _row_header(row.kernel + (" ✓" if chosen[key] else "")),
            _cell(row.ridge),
            _cell(row.error),
            _cell(_rank(row)),
            f"<td>{row.num_subsets:,}</td>",
        )
        for key, row in rows[:_MAX_KERNELS]
    ]
    caption = f"Kernels compared, each at its best ridge; ✓ in use. {_cap(len(cells), len(rows))}"
    return _html_table(caption, ("kernel", "ridge", "error", "rank", "subsets"), cells)


def _rank(row: Candidate) -> float:
    """NaN where it would be that of a mean, -1 by construction."""
    rank = row.rank_correlation
    return rank if says_something(row.error, rank) else math.nan


def _cap(shown: int, total: int) -> str:
    return f"Shown: {shown} of {total:,}." if shown < total else ""


# -- tables -------------------------------------------------------------------------------------


def _row_header(name: str) -> str:
    return f'<th scope="row">{escape(name)}</th>'


def _cell(value: float, decimals: int | None = None) -> str:
    text = number(value) if decimals is None else _fixed(value, decimals)
    sorted_by = f"{value:.12g}" if math.isfinite(value) else "-Infinity"
    return f'<td data-value="{sorted_by}">{text}</td>'


def _html_table(
    caption: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    style: str = "",
    facts: str = "",
) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="wide {style}" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f"<table{facts}><caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _attribution_table(
    surrogate: Surrogate, readout: str, values: Tensor, std: Tensor | None
) -> str:
    """The largest attributions as rows, and all of them as data that the script sorts and finds."""
    order = values.abs().argsort(descending=True, stable=True)[:_MAX_ROWS]
    if len(order) == len(values):
        order = values.argsort(descending=True, stable=True)
    half = torch.zeros_like(values) if std is None else Z95 * std
    left, right = min(0.0, float((values - half).min())), max(0.0, float((values + half).max()))
    if left == right:
        left, right = -1.0, 1.0
    decimals = _decimals(max(right, -left))
    columns = ["task", "size", "value", *(["low", "high"] if std is not None else [])]
    rows = []
    for i in order.tolist():
        value, width = float(values[i]), float(half[i])
        ends = (value - width, value + width) if std is not None else ()
        row = [_row_header(surrogate.task_names[i]), _bar(value, width, left, right)]
        rows.append([*row, *(f"<td>{_fixed(v, decimals)}</td>" for v in (value, *ends))])
    caption = f"Attributions ({readout}): {_MEANING[readout]}, in units of the score. "
    if not surrogate.masks.binary:
        caption = "Attributions (loo): the mean weights against the same without this task. "
    if std is None:
        caption += "There are no intervals: which differ from zero is not known. "
    else:
        caption += "Low and high end the 95 % interval; pale: it includes zero. "
    data = {
        "values": _rounded(values),
        "halves": None if std is None else _rounded(half),
        "left": left,
        "right": right,
        "decimals": decimals,
    }
    zero = f' style="--zero:{_place(0.0, left, right):.2f}%"'
    style = "attributions" + " certain" * (std is None)
    table = _html_table(
        caption + _cap(len(order), len(values)), columns, rows, style=style, facts=zero
    )
    return f'{table}\n<script type="application/json" class="data">{_json(data)}</script>'


def _decimals(largest: float) -> int:
    """Of a column, for three digits of its largest number."""
    return max(0, min(9, 2 - math.floor(math.log10(largest or 1.0))))


def _rounded(values: Tensor) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]


def _place(value: float, left: float, right: float) -> float:
    """Where a value lies between the ends of all bars, in percent of their width."""
    return 2 + 96 * (value - left) / (right - left)


def _bar(value: float, half: float, left: float, right: float) -> str:
    """A cell whose style draws a bar from zero, and the interval over it."""
    sign = "up" if value >= 0 else "down"
    unsure = " unsure" if half > 0 and abs(value) <= half else ""
    start, end = (_place(v, left, right) for v in (min(0.0, value), max(0.0, value)))
    low, high = (_place(v, left, right) for v in (value - half, value + half))
    return (
        f'<td class="bar {sign}{unsure}" style="--x:{start:.2f}%;--w:{end - start:.2f}%;'
        f'--a:{low:.2f}%;--i:{high - low:.2f}%"></td>'
    )
