"""Tables that other tools write, made into a column per task and a column per score.

* Experiment trackers (:data:`TRACKERS`), known by columns that only they have: parameters become
  columns under their own names, and runs that did not end well are left out and counted.
* Files of one run's results, HuggingFace's ``trainer_state.json`` and those of
  lm-evaluation-harness: a row per file.
* A column of lists of task names, or of bit strings: a column per task.
* A long table with a row per run and task: a row per run.

Nothing else about a column is decided here: that is for :mod:`ksm_ext.tables.roles`.
"""

import json
import re
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from ksm_ext.checks import counted, listed, message
from ksm_ext.tables.files import (
    MAX_BYTES,
    Columns,
    UnfinishedTableError,
    is_text,
    read_json,
)

_INFINITE = 1.79e308  # from here on MLflow means infinity


@dataclass(frozen=True)
class Tracker:
    """How a tracker's table looks.

    Attributes:
        name: What messages call it.
        known_by: Columns that are all there.
        parameters: What the names of parameters begin with.
        scores: What scores are called, as a regular expression; the first group is their name.
        others: The same of columns that say nothing of tasks or scores.
        state: The column that says how a run ended, if there is one.
        ended: What it says of runs that ended well.
    """

    name: str
    known_by: tuple[str, ...]
    parameters: str
    scores: str
    others: str
    state: str = ""
    ended: str = ""


TRACKERS = (
    Tracker(
        "Optuna (`study.trials_dataframe()`)",
        ("number", "state", "datetime_start"),
        "params_",
        r"(value)|values_(.+)",
        r"number|datetime_.*|duration|user_attrs_.*|system_attrs_.*|intermediate_values.*",
        "state",
        "COMPLETE",
    ),
    Tracker(
        "MLflow (`search_runs()`)",
        ("run_id", "experiment_id", "status"),
        "params.",
        r"metrics\.(.+)",
        r"run_id|experiment_id|artifact_uri|start_time|end_time|tags\..*",
        "status",
        "FINISHED",
    ),
    Tracker(
        "scikit-learn (`cv_results_`)",
        ("mean_fit_time", "params"),
        "param_",
        r"mean_(test_.+)",
        r"(mean|std)_(fit|score)_time|params|split\d+_.*|std_.*|rank_.*|mean_train_.*",
    ),
    Tracker(
        "Ray Tune (`get_dataframe()`)",
        ("trial_id", "training_iteration", "done"),
        "config/",
        "",
        r"trial_id|training_iteration|done|date|timestamp|time_.*|pid|hostname|node_ip|logdir"
        r"|iterations_since_restore|experiment_tag|checkpoint_.*|should_checkpoint",
    ),
    Tracker(
        "Weights & Biases (CSV export)",
        ("Name", "State", "Created"),
        "",
        "",
        r"Name|ID|Created|Runtime|User|Notes|Tags|Hostname|Commit|GitHub|Sweep|End Time|Updated"
        r"|Start Time|GPU (Count|Type)|Job Type|Group|Agent",
        "State",
        "finished",
    ),
)
"""The trackers whose tables are known."""


def from_tracker(columns: Columns, where: str) -> tuple[Columns, list[str], str]:
    """The parameters and scores of a tracker's table, of runs that ended well.

    Args:
        columns: Any table.
        where: What messages call it.

    Returns:
        The columns, which of them are scores for sure, and what was done, empty where the table is
        no tracker's.

    Raises:
        ValueError: If no run ended well, or a parameter and a score have one name.
    """
    tracker = next((each for each in TRACKERS if columns.keys() >= {*each.known_by}), None)
    if tracker is None or any(cells.ndim != 1 for cells in columns.values()):
        return columns, [], ""
    kept, said = _ended(columns, tracker, where)
    found: Columns = {}
    scores, renamed = [], []
    for name, cells in columns.items():
        if name == tracker.state or re.fullmatch(tracker.others, name):
            continue
        new = name.removeprefix(tracker.parameters)
        if tracker.scores and (match := re.fullmatch(tracker.scores, name)):
            new = next(group for group in match.groups() if group)
            scores.append(new)
        if new in found:
            remedy = "Rename the parameter or the score."
            found_twice = f"{new!r} of both"
            raise ValueError(message(where, "parameters and scores by name", found_twice, remedy))
        renamed += [new] if new != name else []
        found[new] = _finite(cells[kept])
    dropped = [name for name in columns if re.fullmatch(tracker.others, name)]
    text = f"{where}: a table of {tracker.name}{said}"
    if dropped:
        text += f"; left out: {listed(dropped, 6)}"
    if renamed and tracker.parameters:
        text += f"; without {tracker.parameters!r}: {listed(renamed, 6)}"
    return found, scores, f"{text}."


def _ended(columns: Columns, tracker: Tracker, where: str) -> tuple[np.ndarray, str]:
    """(m,) bool of the runs that ended well, and what is said of the others."""
    first = next(iter(columns.values()))
    if not tracker.state:
        return np.ones(len(first), dtype=bool), ""
    states = np.array([str(cell).split(".")[-1] for cell in columns[tracker.state]])
    kept = np.char.lower(states) == tracker.ended.lower()
    if not kept.any():
        expected = f"runs whose {tracker.state!r} is {tracker.ended}"
        found = listed(map(repr, dict.fromkeys(states.tolist())), 4) or "no runs"
        remedy = "Export it when runs have ended."
        raise UnfinishedTableError(message(where, expected, found, remedy))
    others, counts = np.unique(states[~kept], return_counts=True)
    if not len(others):
        return kept, ""
    left = ", ".join(f"{count:,} {state}" for state, count in zip(others, counts, strict=True))
    return kept, f"; of {counted(len(kept), 'run')} left out: {left}"


def _finite(cells: np.ndarray) -> np.ndarray:
    """Numbers with infinity where a tracker stores the largest number for it."""
    if is_text(cells):
        return cells
    found = cells.astype(np.float64)
    found[cells >= _INFINITE], found[cells <= -_INFINITE] = np.inf, -np.inf
    return found


# -- results of a run in a file of its own ---------------------------------------------------------


def read_results(sources: Sequence[str | Path]) -> Columns:
    """The scores of runs, each in a file of its own, as a table with a row per file.

    Of HuggingFace's ``trainer_state.json`` the last evaluation, or the last losses of training;
    of lm-evaluation-harness every number but standard errors, as ``task/metric``.

    Args:
        sources: The files. A run has the name of its file, without the ending, or of its folder
            where all files have one name.

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If one is neither, or runs have one name or other scores.
    """
    paths = [Path(source) for source in sources]
    folders = len(paths) > 1 and len({path.name for path in paths}) == 1
    names = [path.resolve().parent.name if folders else path.stem for path in paths]
    rows = [_results(path) for path in paths]
    if len({*names}) < len(names):
        found = next(name for name in names if names.count(name) > 1)
        remedy = "Name the files, or their folders, after the runs."
        raise ValueError(message("the names of runs", "all different", repr(found), remedy))
    for path, row in zip(paths, rows, strict=True):
        if row.keys() != rows[0].keys():
            odd = sorted(row.keys() ^ rows[0].keys())
            remedy = "Evaluate all runs alike."
            expected = f"the scores of {paths[0]}"
            raise ValueError(message(str(path), expected, f"a difference in {odd[0]!r}", remedy))
    scores = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    labels = np.empty(len(names), dtype=object)
    labels[:] = names
    return {"run": labels, **scores}


def _results(path: Path) -> dict[str, float]:
    """The scores in the file of one run."""
    document = read_json(path)
    found: dict[str, float] = {}
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        entries = [entry for entry in document["log_history"] if isinstance(entry, dict)]
        last = [entry for entry in entries if any(name.startswith("eval_") for name in entry)]
        for name, value in (last or entries or [{}])[-1].items():
            timing = re.search(r"runtime|per_second|total_flos|^(epoch|step)$", name)
            if isinstance(value, (int, float)) and not timing:
                found[name] = float(value)
    elif isinstance(document, dict) and isinstance(document.get("results"), dict):
        for task, numbers in document["results"].items():
            for name, value in numbers.items() if isinstance(numbers, dict) else ():
                metric = name.removesuffix(",none")
                if isinstance(value, (int, float)) and "_stderr" not in metric:
                    found[f"{task}/{metric}"] = float(value)
    if not found:
        remedy = "Name the trainer_state.json of each run, or its results of lm-evaluation-harness."
        expected = "a file of one run's results"
        raise ValueError(message(str(path), expected, "another document", remedy))
    return found


# -- lists of tasks, bit strings, long tables ------------------------------------------------------


def split_subsets(
    columns: Columns, name: str, where: str, separators: Sequence[str] = ()
) -> Columns:
    """A column of lists of task names, or of bit strings, as a column of 0 and 1 for each task.

    Lists are JSON or Python's, or names between ``;``, ``|``, ``,``, ``+`` (as in ``wiki+code``) or
    blanks: the first of these that some cell has, or ``separators``. Bit strings are all of one
    length; their tasks are numbered from 0.

    Raises:
        ValueError: If there is no such column, bit strings differ in length, a name is one of
            another column or, without ``separators``, others joined by a symbol, or the masks would
            pass 2 GiB.
    """
    _check_there(columns, [name], where, "subset")
    cells = columns[name].tolist()
    texts = [cell for cell in cells if isinstance(cell, str) and _of_json(cell.strip()) is None]
    there = (s for s, between in _BETWEEN.items() if any(re.search(between, t) for t in texts))
    symbol = next(there, " ")
    between = "|".join(map(_given_between, separators)) or _BETWEEN[symbol]
    rows = [_members(cell, between) for cell in cells]
    bits = [row for row in rows if isinstance(row, str)]
    if bits and len(bits) == len(rows):
        lengths = {len(row) for row in bits}
        if len(lengths) > 1:
            remedy = "Write the bits as text, with the zeros that they begin with."
            found = f"{min(lengths)} and {max(lengths)}"
            raise ValueError(message(f"{name!r} of {where}", "of one length", found, remedy))
        tasks = [str(i) for i in range(lengths.pop())]
        sets = [{str(i) for i, bit in enumerate(row) if bit == "1"} for row in bits]
    else:
        members = [[row] if isinstance(row, str) else row for row in rows]
        tasks = list(dict.fromkeys(task for row in members for task in row))
        sets = [set(row) for row in members]
        if not separators:
            split = {part for text in texts for part in _members(text, between)}
            used = any(re.search(between, text) for text in texts)
            named = [task for task in tasks if task in split]
            _check_joined(named, {*tasks}, symbol, used, f"{name!r} of {where}")
    return _with_masks(columns, [name], sets, tasks, where)


_BETWEEN = {
    **{symbol: rf"\s*{re.escape(symbol)}\s*" for symbol in ";|,"},
    "+": r"(?<=\w)\s*\+\s*(?=\w)",
    " ": r"\s+",
}
"""What may stand between names, in the order in which it is looked for."""


def _given_between(separator: str) -> str:
    """A separator that was named, as a regular expression; of ``+++`` the last is one."""
    if separator == "+":
        return r"\s*\+(?!\s*\+)\s*(?=\S)"
    if not separator:
        remedy = "Name what stands between the names of tasks, such as ;."
        raise ValueError(message("separator", "a symbol", "an empty text", remedy))
    return rf"\s*{re.escape(separator)}\s*" if separator.strip() else r"\s+"


def _check_joined(
    tasks: Sequence[str], known: set[str], separator: str, used: bool, where: str
) -> None:
    """Raise ``ValueError`` if a task is other tasks, with a symbol between them.

    Args:
        tasks: Those to check.
        known: All tasks.
        separator: What was taken to stand between names.
        used: Whether some cell has it.
        where: What messages call the column.
    """
    for task in tasks:
        others = known - {task} if re.search(r"[\W_]", task) else set()
        for symbol in dict.fromkeys(re.findall(r"[\W_]", task) if others else ()):
            if _is_joined(task, symbol, others, symbol == separator == "+"):
                both = [separator, symbol] if used and separator != symbol else [symbol]
                split = shlex.join(f"--separator={each}" for each in both)
                remedy = f"Add `{split}` if {symbol!r} stands between names"
                if symbol != separator:
                    keep = shlex.join([f"--separator={separator}"])
                    remedy += f", or `{keep}` if it is a part of one"
                found = f"{task!r}, which is other tasks joined by {symbol!r}"
                raise ValueError(message(where, "lists of single tasks", found, f"{remedy}."))


def _is_joined(text: str, symbol: str, known: Collection[str], some: bool) -> bool:
    """Whether text is names that are known, all or ``some`` of them, between symbols."""
    for found in re.finditer(rf"\s*{re.escape(symbol)}\s*", text):
        head, rest = text[: found.start()], text[found.end() :]
        if some and re.match(r"\w", rest) and (head in known or rest in known):
            return True
        if head in known and (rest in known or _is_joined(rest, symbol, known, some)):
            return True
    return False


def _members(cell: object, between: str) -> str | list[str]:
    """The names in a cell, or its bits."""
    if isinstance(cell, (list, tuple, np.ndarray)):
        return [str(each) for each in cell]
    text = f"{int(cell)}" if isinstance(cell, float) and cell == cell else str(cell).strip()
    if re.fullmatch("[01]{2,}", text):
        return text
    found = _of_json(text)
    if found is not None:
        return found
    if text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    return [part.strip().strip("'\"") for part in re.split(between, text) if part.strip()]


def _of_json(text: str) -> list[str] | None:
    """The names in a list of JSON's or Python's form; None if it is of neither."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        return [str(each) for each in json.loads(text.replace("'", '"'))]
    except ValueError:
        return None


def from_long(
    columns: Columns, run: str, task: str, where: str, ignored: Sequence[str] = ()
) -> Columns:
    """A table with a row per run and task as one with a row per run.

    The other columns have one value in all rows of a run; they are kept. Those that are ``ignored``
    (names or globs) need not.

    Raises:
        ValueError: If there are no such columns, a run has a task twice, or another column changes
            within a run.
    """
    _check_there(columns, [run, task], where, "long")
    runs = [str(cell) for cell in columns[run].tolist()]
    tasks = [_text(cell) for cell in columns[task].tolist()]
    first = {label: row for row, label in reversed(list(enumerate(runs)))}
    order = list(dict.fromkeys(runs))
    members: dict[str, set[str]] = {label: set() for label in order}
    for label, name in zip(runs, tasks, strict=True):
        if name in members[label]:
            remedy = "Give every run each task once."
            found = f"{name!r} twice in {label!r}"
            raise ValueError(message(f"{task!r} of {where}", "once per run", found, remedy))
        members[label].update([name] if name else [])
    for name, cells in columns.items():
        if name in (run, task) or any(fnmatchcase(name, part) for part in ignored):
            continue
        for row, label in enumerate(runs):
            here, there = cells[row], cells[first[label]]
            if here != there and not (here != here and there != there):
                remedy = f"Leave it out (`--ignore={name}`), or give each run one value. Where it "
                remedy += "says whether the task was there, keep the rows in which it was."
                what = f"{name!r} of {where}"
                found = f"{there} and {here} in {label!r}"
                raise ValueError(message(what, "one value per run", found, remedy))
    rows = [first[label] for label in order]
    kept = {name: cells[rows] for name, cells in columns.items()}
    names = sorted({name for name in tasks if name})
    return _with_masks(kept, [run, task], [members[label] for label in order], names, where)


def _text(cell: object) -> str:
    if isinstance(cell, float):
        return "" if cell != cell else f"{cell:g}"
    return str(cell).strip()


def _check_there(columns: Columns, names: Sequence[str], where: str, argument: str) -> None:
    for name in names:
        if name not in columns:
            expected = f"among the columns {listed(columns, 12)} of {where}"
            raise ValueError(message(argument, expected, repr(name), "Mind its spelling."))


def _with_masks(
    columns: Columns,
    spent: Sequence[str],
    sets: Sequence[set[str]],
    tasks: Sequence[str],
    where: str,
) -> Columns:
    """The other columns, and one of 0 and 1 for each task."""
    rest = {name: cells for name, cells in columns.items() if name not in spent}
    both = next((task for task in tasks if task in rest), None)
    if both is not None:
        remedy = "Rename the column."
        expected = f"other names than the columns of {where}"
        raise ValueError(message("tasks", expected, repr(both), remedy))
    if len(tasks) * len(sets) > MAX_BYTES:
        expected = f"at most {MAX_BYTES:,} cells of masks"
        found = f"{len(tasks):,} x {len(sets):,}"
        raise ValueError(message(f"the tasks of {where}", expected, found, "Score fewer at once."))
    masks = {task: np.array([float(task in each) for each in sets]) for task in tasks}
    return {**masks, **rest}
