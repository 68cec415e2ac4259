"""What the commands of ``ksm`` do; :mod:`ksm_ext.cli.program` says how they are called.

Each takes the parsed arguments and returns the exit status. Names of tasks and targets come from
the tables and go with every result.
"""

import math
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.arrays import position
from ksm_ext.checks import message
from ksm_ext.cli.output import (
    STANDARD,
    on_a_terminal,
    read_surrogate,
    say,
    show_table,
    write_bytes,
)
from ksm_ext.correlation import spearman
from ksm_ext.drawing import largest
from ksm_ext.interop import answers_with_std, attribution_table
from ksm_ext.report.page import write_report
from ksm_ext.selection import best_mixture, exact, under_budget
from ksm_ext.subsets import identical_subsets
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.fit import fit_surrogate
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.quality import qualities, suitability
from ksm_ext.surrogates.surrogate import Surrogate
from ksm_ext.tables.files import UnfinishedTableError, read_document, read_json, write_columns
from ksm_ext.tables.layouts import read_results
from ksm_ext.tables.roles import better_high
from ksm_ext.tables.scores import ScoreTable, read_scores

_MAX_VARIANCES = 2**27  # pairs times subsets of the intervals of interactions: 1 GB
_SHOWN_TARGETS = 12
_FEWEST = 3  # subsets of a fit
_AVERAGED = "averaged over targets in standard deviations from their means"


def fit(args: Namespace) -> int:
    """Fit a surrogate to a table of scores and save it."""
    table = _score_table(args)
    say(f"{table.role_table()}\nFitting {table}.", quiet=args.quiet)
    start = perf_counter()
    progress = on_a_terminal() and not args.quiet
    surrogate = _fitted(args, table, estimates=_estimates(args, table), progress=progress)
    _write(args.output, surrogate.save)
    saved = f"Saved to {args.output} after {perf_counter() - start:.1f} s."
    say(f"{_quality(surrogate)}\n{saved}", quiet=args.quiet)
    return 0


def _fitted(args: Namespace, table: ScoreTable, **options: Any) -> Surrogate:
    return fit_surrogate(
        table.masks,
        table.scores,
        kernel=_kernels(args.kernel),
        ridge=args.ridge,
        criterion=args.criterion,
        warp=args.warp,
        share_ridge={"yes": True, "no": False}.get(args.share_ridge, "auto"),
        center=not args.no_intercept,
        noise_std=args.noise_std,
        missing=args.missing,
        sample_weight=table.sample_weight,
        task_names=table.task_names,
        target_names=table.target_names,
        **options,
    )


def watch(args: Namespace) -> int:
    """Fit again and write the report anew whenever a table or a store of runs has changed."""
    files = [file for file in (args.scores, args.masks) if file is not None]
    if STANDARD in files:
        remedy = "Write it to a file, or fit it once by `ksm fit`."
        raise ValueError(message("scores", "a file that grows", "standard input", remedy))
    seen: list[tuple[int, int] | None] = []
    args.quiet = True
    while True:
        state = [_state(file) for file in files]
        if state != seen:
            seen = state
            table = None
            try:
                table = _score_table(args)
                surrogate = _fitted(args, table)
            except (ValueError, FileNotFoundError) as error:
                if not _may_come(error, files, table):
                    raise
                say(f"Not yet: {error}")
            else:
                _show(args, surrogate, len(table.masks))
                if args.until is not None and len(table.masks) >= args.until:
                    return 0
        time.sleep(args.every)


def _show(args: Namespace, surrogate: Surrogate, num_runs: int) -> None:
    """Write the report of ``ksm watch``, and say so."""
    shown: dict[str, Any] = {"title": args.title, "readout": args.readout}
    shown["maximize"] = _maximize(args, surrogate.target_names)
    write_report(surrogate, args.output, **shown)
    say(f"{num_runs:,} runs. {str(surrogate).splitlines()[0]}. Wrote {args.output}.")


def _may_come(error: Exception, files: Sequence[str], table: ScoreTable | None) -> bool:
    """Whether what ``error`` says is missing may be written yet: a file, the rest of it, runs."""
    if isinstance(error, FileNotFoundError):
        return not any(Path(file).is_dir() for file in files)
    if table is None:
        return isinstance(error, UnfinishedTableError)
    num_subsets = len(torch.unique(table.masks, dim=0))
    num_scores = int(table.scores.isfinite().sum(0).min())
    return min(num_subsets, num_scores) < _FEWEST


def _state(source: str) -> tuple[int, int] | None:
    """What tells that a file has changed; None while it is not there."""
    path = Path(source)
    return (path.stat().st_mtime_ns, path.stat().st_size) if path.is_file() else None


def compare(args: Namespace) -> int:
    """Write the attributions of two surrogates side by side, and how far they agree."""
    one, other = (read_surrogate(s).with_tensor_answers() for s in (args.surrogate, args.other))
    tasks = [name for name in one.task_names if name in other.task_names]
    targets = [name for name in one.target_names if name in other.target_names]
    if len(tasks) < 2 or not targets:
        expected = "surrogates that share tasks (two at least) and targets"
        found = f"{len(tasks)} and {len(targets)}"
        raise ValueError(message("surrogates", expected, found, "Fit them with the same names."))
    (first, first_std), (second, second_std) = (
        _of_shared(each, args.readout, tasks, targets) for each in (one, other)
    )
    difference = second - first
    half = quantile(0.95) * (first_std.square() + second_std.square()).sqrt()
    order = torch.stack([largest(column, args.top) for column in difference.T])
    at = order.flatten(), torch.arange(len(targets)).repeat_interleave(order.shape[1])
    columns: dict[str, Any] = {"task": [tasks[i] for i in at[0]]}
    columns["target"] = [targets[j] for j in at[1]]
    numbers = {"one": first, "other": second, "difference": difference}
    numbers |= {"low": difference - half, "high": difference + half}
    columns |= {name: table[at].tolist() for name, table in numbers.items()}
    show_table(columns, args.output, args.format)
    ranks = spearman(first, second).tolist()
    clear = (difference.abs() > half).sum(0).tolist()
    for name, rank, count in zip(targets, ranks, clear, strict=True):
        text = f"{name}: Spearman correlation {rank:.3f} over {len(tasks):,} tasks; "
        say(f"{text}{count:,} differences are clear of zero.")
    return 0


def _of_shared(
    surrogate: Surrogate, readout: Readout, tasks: Sequence[str], targets: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Attributions and their standard deviations of some tasks and targets, by name."""
    rows = [surrogate.task_names.index(name) for name in tasks]
    columns = [surrogate.target_names.index(name) for name in targets]
    values, std = answers_with_std(surrogate, readout)
    return values[rows][:, columns], std[rows][:, columns]


def _maximize(args: Namespace, names: Sequence[str]) -> dict[str, bool]:
    """Which way targets get better, of those that are named; ``names`` are all of them."""
    for option in ("maximize", "minimize"):
        for name in getattr(args, option):
            position(option, name, names)
    both = [name for name in args.maximize if name in args.minimize]
    if both:
        remedy = "Name each target once."
        raise ValueError(message("minimize", "other targets than `maximize`", both[0], remedy))
    return dict.fromkeys(args.maximize, True) | dict.fromkeys(args.minimize, False)


def import_scores(args: Namespace) -> int:
    """Write masks and scores of any table that is read as one of a column per task and score."""
    args.quiet = False
    if len(args.scores) == 1 and not _is_results(args.scores[0]):
        args.scores = args.scores[0]
        table = _score_table(args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "results.json")
            results = {name: cells.tolist() for name, cells in read_results(args.scores).items()}
            write_columns(results, path, "json")
            if args.masks is None:
                show_table(results, args.output, args.format)
                say("Scores alone: add `--masks` with a column `run` to join them.")
                return 0
            args.scores = path
            table = _score_table(args)
    targets = [f"score {n}" if n in table.task_names else n for n in table.target_names]
    names = [*table.task_names, *targets]
    masks = table.masks if table.masks.is_floating_point() else table.masks.int()
    cells = [*masks.T.tolist(), *table.scores.T.tolist()]
    say(f"{table.role_table()}\n{table}.")
    show_table(dict(zip(names, cells, strict=True)), args.output, args.format)
    return 0


def _is_results(source: str) -> bool:
    """Whether a file holds the results of one run."""
    if not source.endswith(".json"):
        return False
    document = read_json(source)
    return isinstance(document, dict) and bool({"log_history", "results"} & document.keys())


def attribute(args: Namespace) -> int:
    """Write attributions, or interactions, with their intervals."""
    surrogate = read_surrogate(args.surrogate)
    targets = _target_numbers(surrogate, args.target)
    intervals = surrogate.has_intervals and not args.no_intervals
    if not surrogate.has_intervals:
        say("This surrogate has no intervals: fit the scores again to get them.")
    pairs, m = math.comb(surrogate.masks.num_tasks, 2), len(surrogate.masks)
    if args.interactions and intervals and pairs * m > _MAX_VARIANCES:
        expected = f"of at most {_MAX_VARIANCES:,} pairs times subsets"
        remedy, found = "Add `--no-intervals`.", f"{pairs:,} x {m:,}"
        raise ValueError(message("interactions with intervals", expected, found, remedy))
    table = attribution_table(
        surrogate,
        args.readout,
        interactions=args.interactions,
        targets=targets,
        sort=args.sort,
        top=args.top,
        intervals=intervals,
    )
    show_table(table, args.output, args.format)
    if surrogate.masks.binary and not (sizes := suitability(surrogate, args.readout)).suits:
        say(f"Note: {sizes.verdict} `ksm design --for {args.readout}` draws what is missing.")
    return 0


def select(args: Namespace) -> int:
    """Choose the tasks of the best predicted score within a budget."""
    surrogate = read_surrogate(args.surrogate).with_tensor_answers()
    if args.mixture:
        return _select_mixture(surrogate, args)
    if not surrogate.masks.binary:
        remedy = "Tasks can be chosen where they are in or out; of mixtures add `--mixture`."
        raise ValueError(message("masks", "0 or 1 to select tasks", "real weights", remedy))
    names, n = surrogate.task_names, surrogate.masks.num_tasks
    targets = _targets_to_select(surrogate, args.target)
    center, scale = _units(surrogate, targets)
    costs = torch.ones(n, dtype=torch.float64) if args.costs is None else _costs(args.costs, names)
    with tqdm(unit=" subsets", disable=not on_a_terminal(), leave=False) as bar:

        def predict(masks: Tensor) -> Tensor:
            bar.update(len(masks))
            return (surrogate.predict(masks)[:, targets] - center) / scale

        up, budget = args.maximize, args.budget
        if args.exact:
            chosen = exact(predict, n, costs=costs, budget=budget, maximize=up)
        else:
            chosen = under_budget(predict, costs, budget, maximize=up)
    tasks = list(chosen.tasks)
    columns: dict[str, Any] = {
        "task": [names[i] for i in tasks],
        "cost": costs[tasks].tolist(),
        "spent": costs[tasks].cumsum(0).tolist(),
    }
    firsts = torch.zeros(len(tasks), n, dtype=torch.bool)
    firsts[:, tasks] = torch.ones(len(tasks), len(tasks)).tril().bool()
    columns["score"] = predict(firsts).mean(1).tolist() if tasks else []
    show_table(columns, args.output, args.format)
    say(
        f"{len(tasks)} of {n} tasks for {float(costs[tasks].sum()):g} of {args.budget:g}: "
        f"predicted score {chosen.score:.4g}" + (f", {_AVERAGED}" if len(targets) > 1 else "")
    )
    return 0


def _select_mixture(surrogate: Surrogate, args: Namespace) -> int:
    """Find the shares of the best predicted score."""
    if surrogate.masks.binary:
        remedy = "Tasks that are in or out are chosen by `--budget`, without `--mixture`."
        found = "0 or 1"
        raise ValueError(message("masks", "shares of mixtures for `--mixture`", found, remedy))
    targets = _targets_to_select(surrogate, args.target)
    center, scale = _units(surrogate, targets)
    weights = torch.zeros(len(surrogate.target_names), dtype=torch.float64)
    weights[targets] = 1 / scale
    chosen = best_mixture(
        surrogate,
        maximize=args.maximize,
        target_weights=weights,
        bounds=(args.minimum, args.maximum),
        confidence=args.confidence,
    )
    nearest = surrogate.masks.floats[chosen.nearest]
    columns = {"task": surrogate.task_names, "share": chosen.shares.tolist()}
    show_table({**columns, "nearest_fitted": nearest.tolist()}, args.output, args.format)
    # a weighted mean in the units of the scores; said in those that the targets share
    factor = float(weights.sum()) / len(targets)
    score, std = factor * chosen.score - float((center / scale).mean()), factor * chosen.std
    say(
        f"Predicted score {score:.4g} with a standard deviation of {std:.2g}"
        + (f", {_AVERAGED}" if len(targets) > 1 else "")
        + f"; {chosen.distance:.0%} of the mixture differs from the nearest one fitted."
    )
    return 0


def report(args: Namespace) -> int:
    """Write the report of a surrogate as one HTML page."""
    surrogate = read_surrogate(args.surrogate)
    held_out = None
    if args.held_out is not None:
        table = read_scores(
            args.held_out,
            args.masks,
            tasks=surrogate.task_names,
            targets=surrogate.target_names,
            ignore=args.ignore,
            weights=not surrogate.masks.binary,
            key=args.key,
            num_tasks=surrogate.masks.num_tasks,
            part="test",
        )
        held_out = (table.masks, table.scores)
    shown: dict[str, Any] = {"title": args.title, "readout": args.readout, "target": args.target}
    shown["maximize"] = _maximize(args, surrogate.target_names)
    _write(args.output, lambda path: write_report(surrogate, path, held_out=held_out, **shown))
    if args.output != STANDARD:
        say(f"Wrote {args.output}: open it in a browser.")
    return 0


def _write(target: str, write: Callable[[str | Path], None]) -> None:
    """Let ``write`` make the file ``target``, or what goes to standard output."""
    if target != STANDARD:
        return write(target)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "output"
        write(path)
        write_bytes(path.read_bytes(), STANDARD)


# -- arguments ----------------------------------------------------------------------------------


def _score_table(args: Namespace) -> ScoreTable:
    table = read_scores(
        args.scores,
        args.masks,
        tasks=args.tasks,
        targets=args.targets,
        ignore=args.ignore,
        weights=args.weights,
        key=args.key,
        num_tasks=args.num_tasks,
        subset=args.subset,
        long=args.long,
        separator=args.separator,
        missing=args.missing,
        sample_weight=getattr(args, "sample_weight", None),  # ksm import has none
    )
    if table.masks.dtype == torch.bool:
        n, num_distinct = len(table.task_names), int(identical_subsets(table.masks.T).max()) + 1
        if num_distinct < n and args.merge_duplicates:
            return table.merged()
        if num_distinct < n:
            note = f"Note: the {n:,} tasks are {num_distinct:,} that differ in some subset; "
            note += "--merge-duplicates makes one of those that do not."
            say(note, quiet=args.quiet)
    return table


def _estimates(args: Namespace, table: ScoreTable) -> list[Surrogate] | None:
    """Surrogates of estimated scores: saved ones, and of tables of the same tasks and targets."""
    found = []
    for source in args.estimates:
        if _is_safetensors(source):
            found.append(read_surrogate(source))
            continue
        names: dict[str, Any] = {
            "task_names": table.task_names,
            "target_names": table.target_names,
        }
        cheap = read_scores(
            source,
            tasks=table.task_names,
            targets=table.target_names,
            weights=args.weights,
            num_tasks=args.num_tasks,
            subset=args.subset,
            long=args.long,
            separator=args.separator,
            missing=args.missing,
        )
        say(f"Fitting {cheap} of estimates.", quiet=args.quiet)
        found.append(fit_surrogate(cheap.masks, cheap.scores, missing=args.missing, **names))
    return found or None


def _is_safetensors(source: str) -> bool:
    """Whether a file begins with the length of its header, and the header."""
    if not Path(source).is_file():
        return Path(source).suffix == ".safetensors"  # the error names the file
    with open(source, "rb") as file:
        start = file.read(9)
    length = int.from_bytes(start[:8], "little")
    return start[8:] == b"{" and length < Path(source).stat().st_size


def _kernels(text: str) -> str | list[str]:
    names = [name.strip() for name in text.split(",")]
    if "auto" in names and len(names) > 1:
        raise ValueError(message("kernel", "'auto' or names", repr(text), "Leave out the others."))
    return names if len(names) > 1 else names[0]


def _target_numbers(surrogate: Surrogate, names: Sequence[str]) -> list[int]:
    """The columns of the targets named; all of them for none, or for ``all``."""
    if not names or list(names) == ["all"]:
        return list(range(len(surrogate.target_names)))
    return [position("target", name, surrogate.target_names) for name in dict.fromkeys(names)]


def _targets_to_select(surrogate: Surrogate, names: Sequence[str]) -> list[int]:
    """The targets that a selection is for: one, or several of one direction that were named."""
    targets = _target_numbers(surrogate, names)
    if len(targets) == 1:
        return targets
    if not names or list(names) == ["all"]:
        expected = f"one of {', '.join(surrogate.target_names[:8])}"
        remedy = "Name it; several that all get better the same way may be named one by one."
        raise ValueError(message("target", expected, "all of them" if names else "none", remedy))
    high, low = ([name for name in names if better_high(name) is way] for way in (True, False))
    if low and high:
        remedy = "Select for one of them, or fit the negative of the other."
        found = f"{low[0]!r} and {high[0]!r}"
        raise ValueError(message("target", "names of scores of one direction", found, remedy))
    return targets


def _units(surrogate: Surrogate, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """What scores are measured from and in: their own units, or those that several can share."""
    scores = surrogate.scores[:, targets]
    if len(targets) == 1:
        return torch.zeros(1, dtype=scores.dtype), torch.ones(1, dtype=scores.dtype)
    deviation = scores.std(0)
    if not bool((deviation > 0).all()):
        constant = surrogate.target_names[targets[int((deviation <= 0).nonzero()[0])]]
        remedy = "Leave it out: no choice of tasks changes it."
        raise ValueError(message("target", "scores that vary", repr(constant), remedy))
    return scores.mean(0), deviation


def _costs(source: str, names: Sequence[str]) -> Tensor:
    """(n,) float64 costs in the order of the tasks, from a table of tasks and costs."""
    table = read_document(source)
    if isinstance(table, list) or not {"task", "cost"} <= table.keys():
        found = "a list" if isinstance(table, list) else ", ".join(table) or "none"
        remedy = "Give one row per task."
        raise ValueError(message("costs", "a table with columns task and cost", found, remedy))
    tasks = [_name(cell) for cell in table["task"].flat]
    given = dict(zip(tasks, table["cost"].flat, strict=False))
    missing = [name for name in names if name not in given]
    unknown = [name for name in tasks if name not in names]
    if missing or unknown or len(given) < len(tasks) or table["cost"].shape != (len(tasks),):
        found = f"no cost of {missing[0]!r}" if missing else "another or a repeated task"
        remedy = "Give every task of the surrogate once."
        raise ValueError(message("costs", "one cost per task", found, remedy))
    try:
        return torch.tensor([float(given[name]) for name in names], dtype=torch.float64)
    except (TypeError, ValueError) as error:
        remedy = "Correct the column cost."
        raise ValueError(message("costs", "numbers", str(error), remedy)) from error


def _name(cell: Any) -> str:
    """A name that a table may have taken for a number."""
    return str(int(cell)) if isinstance(cell, float) and cell.is_integer() else str(cell)


# -- results ------------------------------------------------------------------------------------


def _quality(surrogate: Surrogate) -> str:
    """The surrogate in a line, and how well each target is predicted."""
    lines = [str(surrogate)]
    each = list(zip(surrogate.target_names, qualities(surrogate), strict=True))
    lines += [f"  {name}: {quality}" for name, quality in each[:_SHOWN_TARGETS]]
    if len(each) > _SHOWN_TARGETS:
        lines.append(f"  … and {len(each) - _SHOWN_TARGETS:,} more targets")
    lines.append(
        "  (mean squared leave-one-out residual over the variance of the target's own scores: 1 is "
        f"as good as their mean; {float(surrogate.loo_error.mean()):.3f} averaged over all targets)"
    )
    if not surrogate.has_intervals:
        lines.append("  no intervals: they were not saved")
    return "\n".join(lines)
