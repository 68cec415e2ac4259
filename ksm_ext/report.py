r"""A fitted surrogate as one HTML page: no network, readable without scripts, in light and dark.

What was fitted and how well, attributions with 95 % intervals, interactions, predictions of subsets
left out, the Walsh spectrum, and what more subsets would buy. Style, script and drawings are in the
page; names are the user's and are escaped.

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
from ksm_ext.checks import check_choice, check_finite, message, shape_text
from ksm_ext.drawings import heat_map, number, scatter, spectrum
from ksm_ext.files import write_whole
from ksm_ext.readouts import READOUTS
from ksm_ext.sample_size import more_subsets
from ksm_ext.surrogates.candidates import Candidate
from ksm_ext.surrogates.surrogate import Z95, Surrogate

_MAX_TARGETS, _MAX_ROWS, _MAX_KERNELS, _MAX_PAIRS = 6, 200, 12, 10
_MAX_CELLS = 40  # tasks on a side of the map of interactions
_MAX_INTERACTIONS = 2**24  # n^2 t that are computed for it
_MAX_VARIANCES = 2**24  # pairs times subsets, of their intervals
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
    readout: str = "shapley",
    held_out: tuple[ArrayLike, ArrayLike] | None = None,
    target: str | int | None = None,
) -> None:
    """Write a page about a fitted surrogate; it appears whole or not at all.

    Six targets at most are shown, evenly spaced, unless ``target`` names one. All tasks can be
    sorted and searched; 200 of them, those of the largest attributions, are there without scripts.
    The map of interactions shows at most 40 tasks, those of the strongest. The page says what it
    leaves out.

    Args:
        surrogate: What :func:`ksm_ext.fit_surrogate` returned.
        path: The HTML file.
        title: Heading of the page.
        readout: ``"shapley"``, ``"loo"`` or ``"banzhaf"``; real-valued weights know only ``"loo"``.
        held_out: Masks (l, n) and scores (l, t) of subsets the surrogate was not fitted to; drawn
            instead of the leave-one-out predictions.
        target: Name or number of the only target shown.

    Raises:
        ValueError: If ``readout`` or ``target`` is unknown, or ``held_out`` has other shapes.
        OSError: If the file cannot be written.
    """
    check_choice("readout", readout, READOUTS)
    shown = _shown_targets(surrogate, target)
    single, surrogate = surrogate.single_target, surrogate.with_tensor_answers()
    values, std = _with_std(surrogate.attribute, readout, surrogate.has_intervals)
    true, predicted = _predictions(surrogate, held_out, single)
    kind = "leave-one-out" if held_out is None else "held-out"
    if held_out is None and not surrogate.kernel_terms and surrogate.linear_terms:
        kind = "cross-validated"
    structure = _Structure(surrogate, readout)
    sections = [
        _section(
            _anchor(j),
            surrogate.target_names[j],
            _attribution_table(
                surrogate, readout, values[:, j], None if std is None else std[:, j]
            ),
            structure.interactions_of(j),
            scatter(true[:, j], predicted[:, j], kind),
            structure.spectrum_of(j),
        )
        for j in shown
    ]
    content = Template(_asset("report.html")).substitute(
        title=escape(title),
        style=_asset("report.css"),
        script=_asset("report.js"),
        tasks=_json(surrogate.task_names),
        summary=_tiles(surrogate),
        lead=_lead(surrogate, shown),
        targets="\n".join(sections),
        candidates=_candidates_table(surrogate),
        advice=_advice(surrogate, readout),
    )
    write_whole(Path(path), content.encode())


# -- what is shown ------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return (files("ksm_ext") / "_report" / name).read_text(encoding="utf-8")


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


def _with_std(ask: Any, readout: str, has_intervals: bool) -> tuple[Tensor, Tensor | None]:
    """Attributions or interactions, and their standard deviations where there are any."""
    return ask(readout, return_std=True) if has_intervals else (ask(readout), None)


class _Structure:
    """How tasks act together: interactions (n, n, t) and the Walsh spectrum (r, t), of masks."""

    def __init__(self, surrogate: Surrogate, readout: str) -> None:
        n, t = surrogate.masks.num_tasks, len(surrogate.target_names)
        self.names = surrogate.task_names
        self.pairs = self.std = self.spectrum = None
        if not surrogate.masks.binary:
            return
        self.spectrum = surrogate.walsh_spectrum(min(6, n))
        if n >= 2 and n * n * t <= _MAX_INTERACTIONS:
            cheap = n * n * len(surrogate.masks) <= _MAX_VARIANCES
            self.pairs, self.std = _with_std(
                surrogate.interactions, readout, surrogate.has_intervals and cheap
            )

    def interactions_of(self, j: int) -> str:
        """The map of the interactions of one target, and a table of the strongest."""
        if self.pairs is None:
            return ""
        pairs, std = self.pairs[:, :, j], None if self.std is None else self.std[:, :, j]
        strength = pairs.abs().amax(1)
        shown = strength.argsort(descending=True, stable=True)[:_MAX_CELLS].sort().values
        names = [self.names[i] for i in shown.tolist()]
        drawing = heat_map(pairs[shown][:, shown], names, len(self.names))
        return drawing + self._strongest(pairs, std)

    def spectrum_of(self, j: int) -> str:
        """The Walsh spectrum of one target."""
        return "" if self.spectrum is None else spectrum(self.spectrum[:, j].tolist())

    def _strongest(self, pairs: Tensor, std: Tensor | None) -> str:
        """A table of the strongest pairs, which says what the map shows to the eye."""
        first, second = torch.triu_indices(len(pairs), len(pairs), 1)
        values = pairs[first, second]
        decimals = _decimals(float(values.abs().max()))
        rows = []
        for at in values.abs().argsort(descending=True, stable=True)[:_MAX_PAIRS].tolist():
            i, j = int(first[at]), int(second[at])
            row = [_row_header(self.names[i]), f'<td class="name">{escape(self.names[j])}</td>']
            cells = [float(values[at])]
            if std is not None:
                half = Z95 * float(std[i, j])
                cells += [cells[0] - half, cells[0] + half]
            rows.append(row + [_cell(value, decimals) for value in cells])
        columns = ["task", "with", "value", *(["low", "high"] if std is not None else [])]
        caption = f"Strongest interactions. {_cap(len(rows), len(values))}"
        return _html_table(caption, columns, rows, style="pairs")


def _predictions(
    surrogate: Surrogate, held_out: tuple[ArrayLike, ArrayLike] | None, single_target: bool
) -> tuple[Tensor, Tensor]:
    """(l, t) true scores and the predictions that did not see them."""
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


# -- text ---------------------------------------------------------------------------------------


def _anchor(j: int) -> str:
    return f"target-{j}"


def _fixed(value: float, decimals: int) -> str:
    """With as many decimals as the rest of its column."""
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _kernels(surrogate: Surrogate) -> str:
    names = [str(term.kernel) for term in surrogate.kernel_terms]
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
        f"*Of subsets that were left out of the fit; mean leave-one-out error "
        f"{number(float(error.mean()))} of the variance.</p>"
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


def _section(anchor: str, name: str, attributions: str, *figures: str) -> str:
    return (
        f'<section id="{anchor}" aria-labelledby="{anchor}-name">\n'
        f'<h2 id="{anchor}-name">{escape(name)}</h2>\n{attributions}\n'
        f'<div class="figures">{"".join(figures)}</div>\n</section>'
    )


def _advice(surrogate: Surrogate, readout: str) -> str:
    if not surrogate.has_intervals:
        return (
            "<p>This surrogate has no posterior, hence no intervals: fit a kernel to 0/1 masks, "
            "for example <code>kernel=&quot;linear&quot;</code> (ridge), to get them.</p>"
        )
    m, advice = len(surrogate.masks), more_subsets(surrogate, readout)
    if advice.num_more is None:
        answer = "More subsets of these sizes would hardly narrow the intervals."
    else:
        answer = (
            f"About <strong>{advice.num_more:,} more subsets</strong> "
            f"({m + advice.num_more:,} instead of {m:,}) <strong>would halve the intervals</strong>"
            " of the attributions."
        )
    how = (
        "Computed from the posterior variance, σ² (L K Lᵀ \N{MINUS SIGN} L K (K + λI)⁻¹ K Lᵀ) with "
        "K centred: "
        "it depends on which subsets are scored and not on their scores, so subsets of the same "
        "sizes can be added before they are trained on."
        if advice.computed
        else f"Extrapolated from {m:,} subsets at the rate at which intervals shrink."
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
            _cell(row.rank_correlation),
            f"<td>{row.num_subsets:,}</td>",
        )
        for key, row in rows[:_MAX_KERNELS]
    ]
    caption = f"Kernels compared, each at its best ridge; ✓ in use. {_cap(len(cells), len(rows))}"
    return _html_table(caption, ("kernel", "ridge", "error", "rank", "subsets"), cells)


def _cap(shown: int, total: int) -> str:
    return f"Shown: {shown} of {total:,}." if shown < total else ""


# -- tables -------------------------------------------------------------------------------------


def _row_header(name: str) -> str:
    return f'<th scope="row">{escape(name)}</th>'


def _cell(value: float, decimals: int | None = None) -> str:
    text = number(value) if decimals is None else _fixed(value, decimals)
    return f'<td data-value="{value:.12g}">{text}</td>'


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
    if std is not None:
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
