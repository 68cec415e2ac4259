r"""A fitted surrogate as one HTML page: no network, readable without scripts, in light and dark.

What was fitted and how well, attributions with 95 % intervals, interactions, predictions of subsets
left out, the Walsh spectrum, and what more subsets would buy. Style, script and drawings are in the
page; names are the user's and are escaped.

Shapes: attributions (n, t), interactions (n, n, t), scores (m, t); a section per target shown.
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, as_tensor
from ksm_ext.checks import check_choice, check_finite, message, shape_text
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.files import write_whole
from ksm_ext.readouts import READOUTS
from ksm_ext.surrogates.candidates import Candidate
from ksm_ext.surrogates.surrogate import Surrogate

_MAX_TARGETS, _MAX_TASKS, _MAX_CELLS, _MAX_POINTS, _MAX_KERNELS = 6, 200, 60, 1000, 12
_Z95 = 1.959964
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

    Six targets at most are shown, evenly spaced, unless ``target`` names one; 200 tasks at most,
    those of the largest attributions. The page says what it leaves out.

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
    values, std = _attributions(surrogate, readout)
    pairs, spectrum = _structure(surrogate, readout)
    true, predicted = _predictions(surrogate, held_out)
    kind = "leave-one-out" if held_out is None else "held-out"
    if held_out is None and not surrogate.kernel_terms and surrogate.linear_terms:
        kind = "cross-validated"
    sections = [
        _section(
            _anchor(j),
            surrogate.target_names[j],
            _attribution_table(
                surrogate, readout, values[:, j], None if std is None else std[:, j]
            ),
            "" if pairs is None else _heat_map_figure(pairs[:, :, j], surrogate.task_names),
            _scatter_figure(true, predicted, j, kind),
            "" if spectrum is None else _spectrum_figure(spectrum[:, j].tolist()),
        )
        for j in shown
    ]
    content = Template(_asset("report.html")).substitute(
        title=escape(title),
        style=_asset("report.css"),
        script=_asset("report.js"),
        summary=_tiles(surrogate),
        lead=_lead(surrogate, shown),
        targets="\n".join(sections),
        candidates=_candidates_table(surrogate),
        advice=_advice(surrogate, std),
    )
    write_whole(Path(path), content.encode())


# -- what is shown ------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return (files("ksm_ext") / "_report" / name).read_text(encoding="utf-8")


def _table(surrogate: Surrogate, answer: Any) -> Tensor:
    """An answer of the surrogate as (..., t) float64."""
    tensor = as_tensor("answer", answer).cpu().double()
    return tensor[..., None] if surrogate.single_target else tensor


def _shown_targets(surrogate: Surrogate, target: str | int | None) -> list[int]:
    names = surrogate.target_names
    if target is None:
        count = min(len(names), _MAX_TARGETS)
        return torch.linspace(0, len(names) - 1, count).round().long().tolist()
    if isinstance(target, str) and target in names:
        return [names.index(target)]
    if isinstance(target, int) and 0 <= target < len(names):
        return [target]
    some = ", ".join(repr(name) for name in names[:8]) + (", …" if len(names) > 8 else "")
    remedy = "Leave it out to show several."
    raise ValueError(message("target", f"a number or one of {some}", repr(target), remedy))


def _attributions(surrogate: Surrogate, readout: str) -> tuple[Tensor, Tensor | None]:
    """(n, t) attributions, and their standard deviations where there is a posterior."""
    if surrogate.masks.binary and surrogate.kernel_terms and not surrogate.linear_terms:
        values, std = surrogate.attribute(readout, return_std=True)
        return _table(surrogate, values), _table(surrogate, std)
    return _table(surrogate, surrogate.attribute(readout)), None


def _structure(surrogate: Surrogate, readout: str) -> tuple[Tensor | None, Tensor | None]:
    """(n, n, t) interactions of up to 60 tasks and the (r, t) Walsh spectrum, for masks."""
    if not surrogate.masks.binary:
        return None, None
    spectrum = _table(surrogate, surrogate.walsh_spectrum(min(6, surrogate.masks.num_tasks)))
    if not 2 <= surrogate.masks.num_tasks <= _MAX_CELLS:
        return None, spectrum
    return _table(surrogate, surrogate.interactions(readout)), spectrum


def _predictions(
    surrogate: Surrogate, held_out: tuple[ArrayLike, ArrayLike] | None
) -> tuple[Tensor | None, Tensor | None]:
    """(l, t) true scores and the predictions that did not see them."""
    if held_out is None:
        true = _fitted_scores(surrogate)
        return true, None if true is None else true - surrogate.residuals.cpu()
    predicted = _table(surrogate, surrogate.predict(held_out[0]))
    true = as_tensor("held_out", held_out[1]).cpu().double()
    if surrogate.single_target and true.ndim == 1:
        true = true[:, None]
    if true.shape != predicted.shape or len(true) < 2:
        expected = (
            f"scores of {len(predicted)} subsets (at least 2) and {predicted.shape[1]} targets"
        )
        remedy = "Give masks (l, n) and scores (l, t)."
        raise ValueError(message("held_out", expected, shape_text(true), remedy))
    check_finite("held_out", true)
    return true, predicted


def _fitted_scores(surrogate: Surrogate) -> Tensor | None:
    """(m, t) scores the surrogate was fitted to; None where lasso or least squares lost them.

    The residual of kernel ridge at a fitted subset is ``ridge * alpha``; that of the mean is its
    leave-one-out residual times ``(m - 1) / m``.
    """
    if surrogate.linear_terms:
        return None
    m, rotation = len(surrogate.masks), surrogate.rotation
    left_out = surrogate.residuals if rotation is None else surrogate.residuals @ rotation
    residuals = left_out * ((m - 1) / m if surrogate.center else 1.0)
    for term in surrogate.kernel_terms:
        residuals[:, term.columns] = term.ridge * term.dual
    if rotation is not None:
        residuals = residuals @ rotation.T
    return _table(surrogate, surrogate.predict(surrogate.masks.values)) + residuals.cpu()


# -- text ---------------------------------------------------------------------------------------


def _anchor(j: int) -> str:
    return f"target-{j}"


def _number(value: float, digits: int = 3) -> str:
    """A short number with a real minus sign."""
    if not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:.{digits}g}".replace("-", "\N{MINUS SIGN}")


def _fixed(value: float, decimals: int) -> str:
    """With as many decimals as the rest of its column."""
    return f"{value:.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def _kernels(surrogate: Surrogate) -> str:
    names = [str(term.kernel) for term in surrogate.kernel_terms]
    names += ["linear weights"] * bool(surrogate.linear_terms)
    return ", ".join(dict.fromkeys(names)) or "mean only"


def _tiles(surrogate: Surrogate) -> str:
    error = _table(surrogate, surrogate.loo_error).reshape(-1)
    facts = {
        "subsets": f"{len(surrogate.masks):,}",
        "tasks": f"{surrogate.masks.num_tasks:,}",
        "targets" if len(error) > 1 else "target": f"{len(error):,}",
        "variance explained*": f"{max(0.0, 100 * (1 - float(error.mean()))):.0f} %",
    }
    return "\n".join(f"<div><dd>{v}</dd><dt>{escape(k)}</dt></div>" for k, v in facts.items())


def _lead(surrogate: Surrogate, shown: Sequence[int]) -> str:
    names = surrogate.target_names
    error = _table(surrogate, surrogate.loo_error).reshape(-1)
    sharing = {
        "shared": "one ridge for all targets",
        "target": "a ridge for every target",
        "component": "a ridge for every principal component of the targets",
    }[surrogate.sharing]
    lines = [
        f"<p>Kernel: <strong>{escape(_kernels(surrogate))}</strong>, {sharing}. "
        f"*Of subsets that were left out of the fit; mean leave-one-out error "
        f"{_number(float(error.mean()))} of the variance.</p>"
    ]
    if len(shown) < len(names):
        lines.append(f"<p>Shown: {len(shown)} of {len(names):,} targets.</p>")
    if len(shown) > 1:
        links = " ".join(
            f'<a href="#{_anchor(j)}">{escape(names[j])}'
            f"<span>error {_number(float(error[j]), 2)}</span></a>"
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


def _advice(surrogate: Surrogate, std: Tensor | None) -> str:
    m = len(surrogate.masks)
    if std is None:
        return (
            "<p>This surrogate has no posterior, hence no intervals: fit a kernel to 0/1 masks, "
            "for example <code>kernel=&quot;linear&quot;</code> (ridge), to get them.</p>"
        )
    return (
        f"<p>Intervals are those of the Gaussian process: they shrink about as 1/√m, so about "
        f"<strong>4 times as many subsets ({4 * m:,} instead of {m:,}) would halve them</strong>, "
        f"and 2 times as many ({2 * m:,}) would take off 30 %. A rule of thumb: the first subsets "
        f"gain less than that, and a wrong kernel is not cured by more of them.</p>"
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
    text = _number(value) if decimals is None else _fixed(value, decimals)
    return f'<td data-value="{value:.12g}">{text}</td>'


def _html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = "\n".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"
    )


def _attribution_table(
    surrogate: Surrogate, readout: str, values: Tensor, std: Tensor | None
) -> str:
    keep = values.abs().argsort(descending=True, stable=True)[:_MAX_TASKS]
    order = keep[values[keep].argsort(descending=True, stable=True)].tolist()
    half = torch.zeros_like(values) if std is None else _Z95 * std
    low, high = values - half, values + half
    left, right = min(0.0, float(low[keep].min())), max(0.0, float(high[keep].max()))
    if left == right:
        left, right = -1.0, 1.0
    decimals = max(0, min(9, 2 - math.floor(math.log10(max(right, -left)))))
    columns = ["task", "", "attribution", *(["95 % from", "to"] if std is not None else [])]
    rows = []
    for i in order:
        ends = (float(low[i]), float(high[i])) if std is not None else None
        bar = _bar(float(values[i]), ends, left, right)
        row = [_row_header(surrogate.task_names[i]), f'<td class="bar">{bar}</td>']
        row += [_cell(float(v), decimals) for v in (values[i], *(ends or ()))]
        rows.append(row)
    caption = f"Attributions ({readout}): {_MEANING[readout]}, in units of the score. "
    if not surrogate.masks.binary:
        caption = "Attributions (loo): the mean weights against the same without this task. "
    if std is not None:
        caption += "Pale: the 95 % interval includes zero. "
    return _html_table(caption + _cap(len(order), len(values)), columns, rows)


# -- drawings -----------------------------------------------------------------------------------


def _bar(value: float, ends: tuple[float, float] | None, left: float, right: float) -> str:
    """A bar from zero with its interval, in percentages of whatever width it is given."""

    def at(x: float) -> float:
        return 2 + 96 * (x - left) / (right - left)

    sign = "up" if value >= 0 else "down"
    unsure = " unsure" if ends is not None and ends[0] <= 0 <= ends[1] else ""
    x, width = at(min(0.0, value)), abs(at(value) - at(0.0))
    shapes = f'<rect class="{sign}{unsure}" x="{x:.2f}%" y="3" width="{width:.2f}%" height="12"/>'
    if ends is not None:
        a, b = at(ends[0]), at(ends[1])
        shapes += f'<line class="ink" x1="{a:.2f}%" x2="{b:.2f}%" y1="9" y2="9"/>'
        for end in (a, b):
            shapes += f'<line class="ink" x1="{end:.2f}%" x2="{end:.2f}%" y1="6" y2="12"/>'
    zero = at(0.0)
    shapes += f'<line class="axis" x1="{zero:.2f}%" x2="{zero:.2f}%" y1="0" y2="18"/>'
    return f'<svg aria-hidden="true" width="100%" height="18">{shapes}</svg>'


def _figure(
    caption: str, width: float, height: float, alt: str, shapes: str, style: str = ""
) -> str:
    return (
        f'<figure class="{style}"><svg role="img" aria-label="{escape(alt)}" '
        f'viewBox="0 0 {width:g} {height:g}">'
        f"{shapes}</svg><figcaption>{escape(caption)}</figcaption></figure>"
    )


def _text(x: float, y: float, text: str, anchor: str = "middle", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _scatter_figure(true: Tensor | None, predicted: Tensor | None, j: int, kind: str) -> str:
    if true is None or predicted is None:
        return ""
    x, y = true[:, j], predicted[:, j]
    low, high = float(torch.minimum(x, y).min()), float(torch.maximum(x, y).max())
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
        shapes += _text(60 + at(value), 316, _number(value))
        shapes += _text(54, 304 - at(value), _number(value), "end")
    shapes += _text(210, 336, "true score")
    shapes += _text(0, 0, "predicted score", extra=' transform="translate(10 150) rotate(-90)"')
    rank = float(lds(x, y, constant="zero")[0])
    error = float(residual_error(x, y)[0]) if bool((x != x[0]).any()) else math.nan
    numbers = f"Spearman {_number(rank, 2)}, squared error {_number(error, 2)} of the variance"
    caption = f"{kind.capitalize()} predictions of {len(x):,} subsets: {numbers}."
    if every > 1:
        caption += f" Shown: one in {every}."
    return _figure(caption, 366, 344, f"Scatter of predicted over true scores: {numbers}", shapes)


def _spectrum_figure(fractions: list[float]) -> str:
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
    alt = f"{100 * fractions[0]:.0f} percent of the variance is due to single tasks"
    caption = "Walsh spectrum: share of the surrogate's variance due to single tasks, pairs, …"
    return _figure(caption, 356, 224, alt, shapes)


def _heat_map_figure(pairs: Tensor, names: Sequence[str]) -> str:
    n = len(names)
    labels = [name if len(name) <= 16 else name[:15] + "…" for name in names]
    cell = max(9.0, min(26.0, 360 / n))
    margin = 12 + 6.2 * max(len(label) for label in labels)
    limit = float(pairs.abs().max()) or 1.0
    shapes = ""
    for i in range(n):
        y = margin + i * cell
        shapes += _text(margin - 5, y + cell / 2 + 3.5, labels[i], "end")
        turn = f' transform="translate({y + cell / 2 + 3.5:.1f} {margin - 5:.1f}) rotate(-90)"'
        shapes += _text(0, 0, labels[i], "start", turn)
        for j in range(n):
            value = float(pairs[i, j])
            style = 'class="blank"'
            if i != j:
                sign = "up" if value >= 0 else "down"
                style = f'class="{sign}" fill-opacity="{abs(value) / limit:.2f}"'
            shapes += (
                f'<rect {style} x="{margin + j * cell:.1f}" y="{y:.1f}" '
                f'width="{cell - 1:.1f}" height="{cell - 1:.1f}">'
                f"<title>{escape(names[i])} and {escape(names[j])}: {_number(value)}</title></rect>"
            )
    above = pairs.triu(1).abs().argmax().item()
    i, j = int(above) // n, int(above) % n
    strongest = f"strongest: {names[i]} and {names[j]}, {_number(float(pairs[i, j]))}"
    caption = (
        f"Interactions: how much a task's effect grows when another is present; {strongest}. "
        f"Blue adds, orange subtracts; full colour is ±{_number(limit, 2)}."
    )
    size = margin + n * cell + 4
    return _figure(caption, size, size, f"Heat map of interactions; {strongest}", shapes, "tall")
