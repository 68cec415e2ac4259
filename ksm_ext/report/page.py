r"""A fitted surrogate as one HTML page: no network, readable without scripts, in light and dark.

The answer comes first: which tasks help and harm each target, clear of zero or not, and how far to
trust that. Then a map of tasks and targets, and a section for each target: attributions with 95 %
intervals, the interactions whose intervals exclude zero, predictions of subsets left out. How it
was fitted comes last. One colour is good everywhere. What was not measured is not shown: a target
that is not predicted has neither rank correlation nor interactions, a linear surrogate none of
these.
The words are in ``page.html.j2``; what is filled in there, and escaped, since names are the user's,
is computed here and in :mod:`.answers` and :mod:`.sections`.

Shapes: attributions (n, t), scores (m, t); a section per target.
"""

import math
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

import ksm_ext
from ksm_ext.arrays import ArrayLike, aligned, as_tensor, position
from ksm_ext.atomic_write import write_whole
from ksm_ext.checks import check_choice, check_finite, message, shape_text
from ksm_ext.drawing import alike, largest, shortened
from ksm_ext.report.answers import Direction, directions
from ksm_ext.report.sections import Attributions, Predictions, cap, sections
from ksm_ext.report.svg import curve, number, task_map
from ksm_ext.surrogates.candidates import Candidate, beats_the_mean
from ksm_ext.surrogates.learning_curve import errors_by_count, variances_of
from ksm_ext.surrogates.more_subsets import more_subsets
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.quality import qualities, suitability
from ksm_ext.surrogates.readouts import READOUTS
from ksm_ext.surrogates.surrogate import Surrogate

_MAX_KERNELS = 12
_MAX_MAP = 40  # tasks and targets on the sides of their map
_MAX_NAME = 48  # characters of a name in text and tables; its whole is its tooltip
_MAX_WIDELY = 3  # tasks named that help or hurt most targets
_MAX_SORTED = 2**20  # attributions that the page's script sorts and finds
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
    maximize: bool | Mapping[str, bool] | None = None,
) -> None:
    """Write a page about a fitted surrogate; it appears whole or not at all.

    All targets are there, the first unfolded, unless ``target`` names one. Up to 2^20 attributions
    can be sorted, searched and saved as CSV or JSON; the 20 largest of each target are there
    without scripts. Interactions are shown where their intervals exclude zero, in a map of the 40
    tasks of the strongest at most; the first 40 targets are drawn. The page says what it leaves
    out.

    Args:
        surrogate: What :func:`ksm_ext.fit_surrogate` returned.
        path: The HTML file.
        title: Heading of the page.
        readout: ``"loo"``, ``"shapley"`` or ``"banzhaf"``; real-valued weights know only the first.
        held_out: Masks (l, n) and scores (l, t) of subsets the surrogate was not fitted to; drawn
            instead of the leave-one-out predictions.
        target: Name or number of the only target shown.
        maximize: Whether more is better, of all targets or by name. What is not said is guessed
            from words of the name, such as loss or accuracy, and the page says so.

    Raises:
        ValueError: If ``readout`` or a target is unknown, or ``held_out`` has other shapes.
        TypeError: If ``maximize`` is none of these.
        OSError: If the file cannot be written.
    """
    check_choice("readout", readout, READOUTS)
    ways = directions(surrogate.target_names, maximize)
    shown = list(range(len(ways)))
    if target is not None:
        shown = [position("target", target, surrogate.target_names)]
    predictions = _predictions(surrogate, held_out)
    surrogate = surrogate.with_tensor_answers()
    quality = qualities(surrogate)
    found = Attributions.of(surrogate, readout)
    targets = sections(surrogate, found, shown, ways, quality, predictions)
    predicts = [each.predicts for each in quality]
    page = _filled(
        {
            "title": title,
            "targets": targets,
            "map": _map(surrogate, found, shown, ways, predicts),
            "widely": _widely(surrogate, found, shown, ways),
            "data": _data(surrogate, found, targets),
            **_fit(surrogate, readout, any(predicts)),
        }
    )
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
        "short": lambda name: shortened(name, _MAX_NAME),
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
            "of the variance explained": _percent(1 - float(error.mean())),
        },
        "kernels": surrogate.predictors or "mean only",
        "notes": surrogate.warp_notes,
        "sharing": _SHARING[surrogate.sharing],
        "error": float(error.mean()),
        "noise": surrogate.noise_summary,
        "num_targets": len(error),
        "num_subsets": len(surrogate.masks),
        "binary": surrogate.masks.binary,
        "candidates": _candidates(surrogate),
        "predicts": predicts,
        "advice": more_subsets(surrogate, readout) if able else None,
        "design": suitability(surrogate, readout) if surrogate.masks.binary else None,
        "curve": _curve(surrogate) if predicts else "",
        "readout": readout,
        "version": ksm_ext.__version__,
        "torch": torch.__version__,
        "smooth": surrogate.noise is None and bool(surrogate.nugget_share.any()),
    }


def _percent(share: float) -> str:
    """Such as ``96 %``; 100 % is only what is all."""
    digits = 1 if 0.99 < share < 1 else 0
    return f"{100 * max(0.0, min(share, 0.999 if share < 1 else 1.0)):.{digits}f} %"


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
    caption = f"Kernels compared, each at its best ridge; ✓ in use. {cap(len(rows), len(ranked))}"
    return {"caption": caption, "rows": rows}


def _curve(surrogate: Surrogate) -> Markup:
    """The learning curve, with the noise of a run where that is known."""
    points = errors_by_count(surrogate)
    if len(points) < 2:
        return Markup()
    least = 0.0
    if surrogate.noise_std is not None:
        noise = surrogate.noise_std.cpu().square()
        least = float((noise / variances_of(surrogate.scores.cpu())).mean())
    sizes, errors = zip(*points, strict=True)
    return curve(sizes, errors, least)


# -- tasks and targets --------------------------------------------------------------------------


def _map(
    surrogate: Surrogate,
    found: Attributions,
    shown: list[int],
    ways: list[Direction],
    predicts: list[bool],
) -> Markup:
    """Which tasks are good and bad for which targets, like beside like; nothing for one target."""
    kept = torch.tensor([j for j in shown if predicts[j]][:_MAX_MAP])
    clear = found.clear[:, kept] if len(kept) else torch.zeros(0, 0, dtype=torch.bool)
    if len(kept) < 2 or not clear.any():
        return Markup()
    signs = torch.tensor([ways[j].sign for j in kept.tolist()], dtype=torch.float64)
    spread = variances_of(surrogate.scores.cpu()).sqrt()
    good = signs * found.values[:, kept] / spread[kept]
    strength = (good.abs() * clear).amax(1)
    rows = largest(strength, min(_MAX_MAP, int((strength > 0).sum())))
    rows = rows[alike((good * clear)[rows])]
    columns = alike((good * clear)[rows].T.contiguous())
    targets = [surrogate.target_names[j] for j in kept[columns].tolist()]
    unknown = [ways[j].maximize is None for j in kept.tolist()]
    caption = "Attributions over the standard deviation of each target. Blue: good, orange: bad"
    caption += " (raises and lowers, where which is better is not known)" * any(unknown)
    caption += "; empty: the 95 % interval includes zero. Those alike are side by side. "
    caption += f"{cap(len(rows), len(good)).replace('.', ' tasks.')} "
    caption += cap(len(kept), len(shown)).replace(".", " targets.")
    tasks = [surrogate.task_names[i] for i in rows.tolist()]
    grid = (rows[:, None], columns)
    return task_map(good[grid], clear[grid], tasks, targets, caption.strip())


def _widely(
    surrogate: Surrogate, found: Attributions, shown: list[int], ways: list[Direction]
) -> list[dict[str, Any]]:
    """Tasks that are clearly good, and clearly bad, for more than half of the targets.

    Of targets of which it is known which way is better.
    """
    known = [j for j in shown if ways[j].maximize is not None]
    if found.half is None or len(known) < 2:
        return []
    signs = torch.tensor([ways[j].sign for j in known], dtype=torch.float64)
    good, clear = signs * found.values[:, known], found.clear[:, known]
    sides = []
    for style, word, side in (("good", "help", 1), ("bad", "hurt", -1)):
        counts = (clear & (side * good > 0)).sum(1)
        order = counts.argsort(descending=True, stable=True)[:_MAX_WIDELY].tolist()
        tasks = [
            (surrogate.task_names[i], int(counts[i])) for i in order if 2 * counts[i] > len(known)
        ]
        sides.append({"style": style, "word": word, "tasks": tasks, "of": len(known)})
    return sides


def _data(
    surrogate: Surrogate, found: Attributions, targets: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """What the script sorts, finds and saves, (t, n): None for too many.

    Values are float32, half-widths 65,535ths of the largest of their target.
    """
    kept = [each["number"] for each in targets]
    if len(kept) * len(found.values) > _MAX_SORTED:
        return None
    return {
        "tasks": surrogate.task_names,
        "targets": [each["name"] for each in targets],
        "readout": found.readout,
        "values": _packed(found.values[:, kept].T, "<f4"),
        "halves": None if found.half is None else _packed(_fractions(found, kept), "<u2"),
    }


def _fractions(found: Attributions, kept: list[int]) -> Tensor:
    half = torch.as_tensor(found.half)[:, kept].T
    return (half / half.amax(1, keepdim=True).clamp_min(1e-300) * 65535).round()


def _packed(numbers: Tensor, kind: str) -> str:
    """Numbers in base64, of which JSON would take three times as much."""
    return b64encode(numbers.cpu().numpy().astype(kind).tobytes()).decode()


# -- predictions --------------------------------------------------------------------------------


def _predictions(surrogate: Surrogate, held_out: tuple[ArrayLike, ArrayLike] | None) -> Predictions:
    """Of the subsets fitted, each left out, or of others."""
    binary = surrogate.masks.binary
    if held_out is None:
        scores = surrogate.scores.cpu()
        predicted = scores - surrogate.with_tensor_answers().loo_residuals.cpu()
        sizes = surrogate.masks.values[:, surrogate.varying].sum(1).cpu() if binary else None
        return Predictions(scores, predicted, sizes, False)
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
    sizes = as_tensor("held_out", masks).cpu()[:, surrogate.varying.cpu()].sum(1)
    return Predictions(true, predicted, sizes if binary else None, True)
