"""What the columns of a table are: tasks, targets or neither; by name, or beyond doubt.

No role is guessed. In this order, a column

1. is what it is named (``tasks``, ``targets``, ``ignore``: names, or globs such as ``valid_*``; a
   name goes before a glob). Once all that a table can hold is named, its other columns are ignored.
2. without a name (pandas' row numbers) is ignored; the one that joins two tables is their key.
3. is a **task**, unless tasks are named, if every cell is 0 or 1, and no word of its name is one of
   scores or of runs (:data:`SCORES`, :data:`RUNS`: accuracy, solved, seed, id, …). Truth values are
   0 and 1: true and false, yes and no, y and n, t and f, on and off, in and out, x and nothing.
   Shares of mixtures are tasks too: what is left beside names of scores, runs and costs, if these
   are numbers from 0 whose rows have one sum, to 2 %. With ``weights``, in a table without scores,
   a task may be any number.
4. is a **target**, unless targets are named, if it holds numbers, and its name is one of scores and
   not of runs and their cost (:data:`RUNS`, :data:`COSTS`: lr, hours, rank, …). The name need not
   be one of scores where the table holds nothing else, nor where one column of fractions is all
   that is left beside tasks. Beside tasks that are not named, a target is not 0 or 1 everywhere.
5. is refused otherwise: the error lists all such columns, and the options that settle them.

The words of a name are what stands between capitals, spaces and punctuation, without digits at the
end: ``valLoss``, ``val_loss2`` and ``val/loss`` are scores.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import torch

from ksm_ext.checks import listed, message
from ksm_ext.subsets import common_sum
from ksm_ext.tables.files import Columns, UnfinishedTableError, is_text

Role = Literal["task", "target", "weight", "key", "ignored"]

ARGUMENTS: dict[Role, str] = {"task": "tasks", "target": "targets", "weight": "sample_weight"}
ARGUMENTS["ignored"] = "ignore"
"""What names the columns of a role, in Python and, after two dashes, on the command line."""


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


BETTER_LOW = _set("loss losses nll ppl perplexity error errors err mse rmse mae wer cer regret")
"""Words of scores of which less is better."""

BETTER_HIGH = _set(
    "accuracy acc f1 auc auroc auprc map precision recall bleu rouge meteor reward rewards return "
    "returns r2 correct solved solve success passed pass match win wins hit"
)
"""Words of scores of which more is better."""

SCORES = _set(
    "score scores metric metrics eval y target label outcome result output failed failure fail "
    "diverged converged"
).union(BETTER_LOW, BETTER_HIGH)
"""Words of scores."""

RUNS = _set(
    "seed seeds run runs id ids uid uuid idx index rank fold trial replicate replica rep epoch "
    "epochs iteration iterations iter steps finished done status gpu gpus worker device version "
    "lr wd decay momentum dropout warmup"
)
"""Words of what tells runs apart or sets them, which may be 0 or 1 too."""

COSTS = _set(
    "time runtime walltime duration seconds secs minutes hours cost memory mem gb mb date day "
    "timestamp rate temperature depth width layers batch std stderr sem"
)
"""Words of what a run took, was set to, or is uncertain by."""

_TRUTH = (
    *(("1", "0"), ("true", "false"), ("t", "f"), ("yes", "no"), ("y", "n"), ("on", "off")),
    ("in", "out"),
)
_EMPTY = ("", "na", "nan", "none", "null")
SHARES = "shares of one sum"
"""Why the columns of a table of mixtures are tasks."""

_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table, what it was taken for, and why.

    Attributes:
        name: Name of the column.
        role: ``"task"``, ``"target"``, ``"weight"``, ``"key"`` or ``"ignored"``.
        reason: Why, such as ``"0 or 1"``, ``"named"``, ``"constant: always 1"``.
    """

    name: str
    role: Role
    reason: str


def role_table(columns: Iterable[Column]) -> str:
    """Every role and reason on a line, with the columns that have it; a name stays on its line."""
    groups: dict[str, list[str]] = {}
    for column in columns:
        head, name = f"{column.role} ({column.reason})", column.name.replace("\n", "\\n")
        groups.setdefault(head, []).append(name)
    width = max(map(len, groups), default=0)
    return "\n".join(f"  {head:{width}}  {listed(names, 20)}" for head, names in groups.items())


def name_columns(
    known: Collection[str],
    patterns: Mapping[Role, Sequence[str]],
    where: str,
    elsewhere: Collection[str] = (),
) -> dict[str, Role]:
    """The roles given by names and globs, in their order.

    Args:
        known: Names of the columns.
        patterns: Names and globs by role.
        where: What messages call the table.
        elsewhere: Names in another table, which may be what is to be ignored.

    Raises:
        ValueError: If one matches no column, or two roles claim the same one.
    """
    exact = {part for parts in patterns.values() for part in parts if part in known}
    named: dict[str, Role] = {}
    for role, parts in patterns.items():
        for part in parts:
            globbed = (name for name in known if name not in exact and fnmatchcase(name, part))
            found = [part] if part in exact else list(globbed)
            there = (n for n in elsewhere if n == part or fnmatchcase(n, part))
            if not found and not (role == "ignored" and any(there)):
                expected = f"among the columns {listed(known, _SHOWN)} of {where}"
                remedy = "Mind its spelling, which of two files is SCORES and which `--masks`, and "
                remedy += "that estimates have the names that scores have."
                raise ValueError(message(ARGUMENTS[role], expected, repr(part), remedy))
            for name in found:
                if named.setdefault(name, role) != role:
                    expected = f"other columns than `{ARGUMENTS[named[name]]}`"
                    remedy = "Give every column one role."
                    raise ValueError(message(ARGUMENTS[role], expected, repr(name), remedy))
    return named


def truth_values(column: np.ndarray) -> np.ndarray:
    """Text as numbers, where it says true or false everywhere; NaN where a cell is empty.

    A column of ``x`` and empty cells has 1 and 0. One that says it in two ways, such as ``yes``
    among 0 and 1, stays text: what it means is in doubt.
    """
    if column.ndim != 1 or not is_text(column):
        return column
    cells = [str(cell).strip().lower() for cell in column]
    found = set(cells)
    if found == {"x", ""}:
        return np.array([float(cell == "x") for cell in cells])
    for true, false in _TRUTH:
        if {true, false, *_EMPTY} >= found:
            values = {true: 1.0, false: 0.0}
            return np.array([values.get(cell, np.nan) for cell in cells])
    return column


def assign_roles(
    columns: Columns,
    where: str,
    named: Mapping[str, Role],
    may: tuple[Role, ...],
    *,
    weights: bool = False,
    sure: str = "",
) -> list[Column]:
    """The role of every column by the rule of the module's head, in the order of the table.

    Args:
        columns: The table; :func:`truth_values` are numbers already.
        where: What messages call it.
        named: The roles that are given.
        may: What else it can hold: ``"task"``, ``"target"`` or both.
        weights: Whether tasks may be other numbers than 0 and 1.
        sure: Why every other column has the first role of ``may``, where that is known.

    Raises:
        ValueError: If a role is in doubt, or there are no tasks or no targets.
    """
    open_roles = [role for role in may if role not in named.values()]
    given = {n: _known_role(n, cells, named, open_roles, sure) for n, cells in columns.items()}
    found = {name: column for name, column in given.items() if column is not None}
    rest = {name: cells for name, cells in columns.items() if name not in found}
    mixed = rest if may == ("task",) else {n: c for n, c in rest.items() if not _is_named_other(n)}
    if "task" in open_roles and _are_shares(mixed):
        found |= {name: Column(name, "task", SHARES) for name in mixed}
    elif may == ("task",) and weights:
        heavy = [name for name, cells in rest.items() if _is_weight(name, cells)]
        found |= {name: Column(name, "task", "weights") for name in heavy}
    for name in [name for name in columns if name not in found]:
        column = _unmistakable(name, columns[name], where, open_roles, alone=len(may) == 1)
        found |= {name: column} if column is not None else {}
    doubtful = [name for name in columns if name not in found]
    roles = {column.role for column in found.values()}
    if len(may) == 2 and "target" in open_roles and "target" not in roles:
        fractions = [name for name in doubtful if _is_score_by_content(name, columns[name])]
        if len(fractions) == 1:
            doubtful.remove(fractions[0])
            why = "the only fractions beside tasks"
            found[fractions[0]] = Column(fractions[0], "target", why)
            roles.add("target")
    if len(may) == 2 and "task" not in roles:
        raise _no_tasks(columns, where, doubtful, weights)
    if doubtful:
        alone = len(may) == 1
        raise _doubt(columns, where, doubtful, found, open_roles, alone=alone, weights=weights)
    for role in may:
        if role not in roles:
            what = "tasks" if role == "task" else "scores"
            remedy = f"Name them (`--{ARGUMENTS[role]}`), and mind what is ignored."
            raise ValueError(
                message(where, f"a table with columns of {what}", f"no {what}", remedy)
            )
    return [found[name] for name in columns]


def _are_shares(columns: Columns) -> bool:
    """Whether the columns are parts of mixtures: numbers from 0 whose rows have one sum, to 2 %."""
    tables = list(columns.values())
    alike = len({cells.shape for cells in tables}) == 1
    if len(tables) < 2 or not alike or not all(map(_is_numeric, tables)):
        return False
    values = np.stack([cells.astype(np.float64) for cells in tables], axis=1)
    if not np.isfinite(values).all() or (values < 0).any() or np.isin(values, (0, 1)).all():
        return False
    return common_sum(torch.from_numpy(values)) is not None


def _known_role(
    name: str, cells: np.ndarray, named: Mapping[str, Role], open_roles: Sequence[Role], sure: str
) -> Column | None:
    """Rules 1 and 2, and tables that say themselves what they are."""
    constant = _constant(cells)
    if name in named:
        return Column(name, named[name], (named[name] == "task" and constant) or "named")
    if not name or re.fullmatch(r"Unnamed: \d+", name):
        return Column(name, "ignored", "row numbers, without a name")
    if not open_roles:
        return Column(name, "ignored", "not named")
    if sure:
        return Column(name, open_roles[0], (open_roles[0] == "task" and constant) or sure)
    return None


def _unmistakable(
    name: str, cells: np.ndarray, where: str, open_roles: Sequence[Role], *, alone: bool
) -> Column | None:
    """Rules 3 and 4, but for the one column of fractions."""
    content, words = _content(cells), words_of(name)
    if "task" in open_roles and not words & (SCORES | RUNS):
        if content == "0 or 1":
            return Column(name, "task", _constant(cells) or content)
        if content == "0, 1 or empty":
            check_filled(name, cells, where)
    if "target" in open_roles and words & SCORES and _has_numerals(cells):
        check_numeric(name, cells, where)  # a score in other numerals, whose advice it has
    if "target" in open_roles and _is_numeric(cells) and not words & (RUNS | COSTS):
        if alone and content != "empty":
            return Column(name, "target", "a column of the scores")
        if words & SCORES and not ("task" in open_roles and content.startswith("0")):
            return Column(name, "target", "named like a score")
    return None


def check_filled(name: str, cells: np.ndarray, where: str, remedy: str = "") -> None:
    """Raise ``ValueError`` that names the first row in which a column of numbers is empty."""
    empty = np.isnan(cells) if cells.dtype.kind == "f" else np.zeros(len(cells), dtype=bool)
    if empty.any():
        row = int(empty.argmax()) + 1
        found = f"no number in {int(empty.sum())} of them, the first row {row} below the header"
        remedy = f"Fill in the cells, delete these rows, {remedy}or {_left_out(name)}."
        what = f"{name!r} of {where}"
        raise UnfinishedTableError(message(what, "a number in every row", found, remedy))


def check_numeric(name: str, cells: np.ndarray, where: str) -> None:
    """Raise ``ValueError`` unless a column holds numbers, where it is not empty."""
    if not _is_numeric(cells):
        remedy = "Write plain numbers, with decimal points and without % or units"
        what, remedy = f"{name!r} of {where}", f"{remedy}, or {_left_out(name)}."
        kind = UnfinishedTableError if _breaks_off(cells) else ValueError
        raise kind(message(what, "a column of numbers", _content(cells), remedy))


# -- what a column holds and is called ----------------------------------------------------------


def _is_numeric(cells: np.ndarray) -> bool:
    return cells.ndim == 1 and not is_text(cells)


def _says_otherwise(cells: np.ndarray) -> bool:
    """Whether some cells of text are 0 or 1."""
    return not _is_numeric(cells) and any(str(cell).strip() in ("0", "1") for cell in cells.flat)


def _has_numerals(cells: np.ndarray) -> bool:
    return not _is_numeric(cells) and any(re.match(r"[-+.]?\d", str(cell)) for cell in cells.flat)


def _breaks_off(cells: np.ndarray) -> bool:
    """Whether there are numbers, and text in the last row alone, such as ``1e-``."""
    try:
        return cells.ndim == 1 and len(cells[:-1].astype(np.float64)) > 0
    except (TypeError, ValueError):
        return False


def _constant(cells: np.ndarray) -> str:
    same = _is_numeric(cells) and len(cells) > 0 and (cells == cells[0]).all()
    return f"constant: always {cells[0]:g}" if same else ""


def _is_named_other(name: str) -> bool:
    """Whether a name is that of a score, of a run or of its cost."""
    return bool(words_of(name) & (SCORES | RUNS | COSTS))


def _is_weight(name: str, cells: np.ndarray) -> bool:
    return not _is_named_other(name) and _content(cells).startswith(("whole numbers", "fractions"))


def _is_score_by_content(name: str, cells: np.ndarray) -> bool:
    return _content(cells).startswith("fractions") and not words_of(name) & (RUNS | COSTS)


def _content(cells: np.ndarray) -> str:
    """What the cells of a column are, for decisions and for messages."""
    if not _is_numeric(cells):
        written = [cell for cell in cells.flat if str(cell)]
        odd = (cell for cell in written if not re.fullmatch(r"[-+]?[\d.]+", str(cell)))
        first = next(odd, written[0] if written else "")
        what = "lists" if cells.ndim > 1 or isinstance(first, list) else "text"
        return f"{what} such as {str(first)[:40]!r}"
    given = cells[~np.isnan(cells)] if cells.dtype.kind == "f" else cells
    empty = len(given) < len(cells)
    if not len(given):
        return "empty"
    if ((given == 0) | (given == 1)).all():
        return "0, 1 or empty" if empty else "0 or 1"
    whole = bool((given == np.floor(given)).all())
    return ("whole numbers" if whole else "fractions") + (", some empty" if empty else "")


def words_of(name: str) -> set[str]:
    """The words of a name, small, with and without the digits at their ends.

    A letter is one only where it is the whole name: ``y`` is a score, and ``x-y`` is not.
    """
    parts = [part.lower() for part in re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name)]
    words = {*parts, *(part.rstrip("0123456789") for part in parts)}
    return {word for word in words if len(word) > 1 or word == name.lower()}


def better_high(name: str) -> bool | None:
    """Whether more of a score is better, by the words of its name; None where they do not say."""
    high, low = (bool(words_of(name) & words) for words in (BETTER_HIGH, BETTER_LOW))
    return high if high != low else None


# -- what is in doubt ---------------------------------------------------------------------------


def _option(argument: str, names: Iterable[str]) -> str:
    """An option as the command line reads it and a shell takes it."""
    return shlex.join([f"--{argument}={','.join(map(_between_commas, names))}"])


def _between_commas(name: str) -> str:
    """A name, in double quotes where a comma, a quote or a blank at its end asks for them."""
    plain = name == name.strip() and not set(name) & set(',"')
    return name if plain else '"' + name.replace('"', '""') + '"'


def _left_out(name: str) -> str:
    return f"leave the column out (`{_option('ignore', [name])}`, and named nowhere else)"


def _doubt(
    columns: Columns,
    where: str,
    doubtful: Sequence[str],
    found: Mapping[str, Column],
    open_roles: Sequence[Role],
    *,
    alone: bool,
    weights: bool,
) -> ValueError:
    """The columns whose role is in doubt, and the options that settle it."""
    seen = []
    for name in doubtful[:8]:
        words = sorted(words_of(name) & (SCORES | RUNS | COSTS))
        named_like = f", named like {words[0]!r}" if words else ""
        seen.append(f"{name!r} ({_content(columns[name])}{named_like})")
    if doubtful[8:]:
        seen.append(f"and {len(doubtful) - 8:,} more")
    scores = [name for name, column in found.items() if column.role == "target"]
    more = [name for name in doubtful if "target" in open_roles and _may_be_score(name, columns)]
    shares = [name for name in doubtful if "task" in open_roles and _is_weight(name, columns[name])]
    left = [n for n in doubtful if n not in more and not (alone and n in shares)]
    options = ["--weights"] if alone and shares and not weights else []
    options += [_option("targets", [*scores, *more])] if more else []
    options += [_option("ignore", left)] if left else []
    others = "or name columns otherwise (`--tasks`, `--targets`, `--ignore`)"
    remedy = f"Add `{' '.join(options)}`, {others}."
    if "task" in open_roles and any(_content(columns[name]).startswith("0") for name in doubtful):
        remedy += " Where one is a task, name all tasks."
    if "task" in open_roles and any(_says_otherwise(columns[name]) for name in doubtful):
        remedy += " A task says 0 or 1 in every row, or yes or no, but not both."
    if shares and not alone:
        remedy += _name_weights(weights)
    expected = " or ".join(f"{role}s" for role in open_roles) + " beyond doubt, or named"
    return ValueError(message(f"the columns of {where}", expected, listed(seen, _SHOWN), remedy))


def _may_be_score(name: str, columns: Columns) -> bool:
    words, cells = words_of(name), columns[name]
    by_name = bool(words & SCORES) and _is_numeric(cells) and _content(cells) != "empty"
    return (by_name and not words & (RUNS | COSTS)) or _is_score_by_content(name, cells)


def _name_weights(given: bool) -> str:
    """The advice for tables in which tasks are no masks; ``given``: ``--weights`` is there."""
    add = "" if given else "add `--weights`, and "
    return f" Counts and shares of tasks are weights: {add}name all tasks, by `--tasks`."


def _no_tasks(columns: Columns, where: str, doubtful: Sequence[str], weights: bool) -> ValueError:
    advice = one_column_per_task(columns, doubtful)
    remedy = f"{advice} Otherwise name" if advice else "Name"
    remedy += " them (`--tasks`), or the file of the masks (`--masks`)."
    if any(_is_weight(name, columns[name]) for name in doubtful):
        remedy += _name_weights(weights)
    expected = "a table with a column per task that is 0 or 1"
    return ValueError(message(where, expected, "no tasks", remedy))


def one_column_per_task(columns: Columns, names: Sequence[str], key: str = "") -> str:
    """What makes masks of a row per run and task, or of lists of tasks, where a table has them.

    Args:
        columns: The table.
        names: Columns that may name tasks, and runs too unless ``key`` does.
        key: The column that names the runs, where that is known.
    """
    texts = [name for name in names if not _is_numeric(columns[name])]
    if any(columns[name].ndim > 1 or name in ("y", "scores") for name in texts):
        return "Call arrays `masks` and `scores`."
    if long := _run_and_task(columns, names, key):
        run, name, scores = long
        make = f"pandas.crosstab(table[{run!r}], table[{name!r}])"
        if not key:
            make += f".join(table.groupby({run!r})[{scores!r}].first()).reset_index(drop=True)"
        return f"If {name!r} names the tasks, make a column of each, in pandas by `{make}`."
    lists = [(rank, name) for name in texts if (rank := _rank_of_lists(columns[name])) is not None]
    if not lists:
        return ""
    name = min(lists)[1]
    return f"If {name!r} lists the tasks of each row, add `{shlex.join([f'--subset={name}'])}`."


def _rank_of_lists(column: np.ndarray) -> int | None:
    """How surely a column has lists of names, 0 first; None where no cell is one."""
    cells = [cell for cell in column.flat if str(cell)]
    if any(isinstance(cell, list) for cell in cells):
        return 0
    between = (";", r"\|", ",", r"\w\s*\+\s*\w", r"\S\s+\S")
    found = (rank for rank, s in enumerate(between, 1) if any(re.search(s, str(c)) for c in cells))
    return next(found, None)


def _run_and_task(
    columns: Columns, names: Sequence[str], key: str
) -> tuple[str, str, list[str]] | None:
    """The columns of runs, tasks and scores of a table with a row per run and task.

    No run has a task twice, and a run's scores are the same in all of its rows. Tasks are text, or
    the only whole numbers beside those of the runs.
    """
    kinds = ("text", "whole numbers", "0 or 1")
    labels = {n: columns[n].tolist() for n in names if _content(columns[n]).startswith(kinds)}
    if len(labels) > _SHOWN:  # a wide table, whose pairs of columns are too many to compare
        return None
    found = []
    for run in [key] if key else labels:
        runs = columns[run].tolist()
        scores = [n for n in columns if _may_be_score(n, columns) and n != run and n not in labels]
        scores = [n for n in scores if _tells(runs, columns[n].tolist())]
        texts = [n for n in labels if is_text(columns[n]) and n != run]
        numbers = [n for n in labels if n not in (run, *texts)]
        for task in [*texts, *(numbers if len(numbers) == 1 else ())]:
            tasks = labels[task]
            once = len({*zip(runs, tasks, strict=True)}) == len(tasks)
            if once and len({*runs}) < len(runs) and (key or scores):
                words = words_of(task) & (SCORES | RUNS | COSTS)
                rank = bool(words_of(run) & RUNS), is_text(columns[task]), not words, -len({*tasks})
                found.append((rank, (run, task, scores)))
    return max(found, default=((), None))[1]


def _tells(runs: Sequence[Any], values: Sequence[Any]) -> bool:
    """Whether each run has one value, and not all the same."""
    return len({*values}) > 1 and len({*zip(runs, values, strict=True)}) == len({*runs})
