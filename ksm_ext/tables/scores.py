"""Scores of subsets from files: which columns are tasks, which are targets, and what they say.

Several layouts of a table are read (:mod:`.files` says in which files), and those in which
scores were published with the paper:

* one table: a column per task that is 0 or 1, and a column per target;
* two tables: masks (or mixture weights) and scores, joined by a column that both have, else row by
  row;
* tables of experiment trackers, columns of lists of tasks, and long tables: :mod:`.layouts`;
* arrays ``masks`` (m, n) and ``scores`` (m,) or (m, t), with ``task_names`` and ``target_names``
  where there are names, in NPZ or a JSON object;
* published: ``train_w`` and ``train_subset_scores`` (and ``test_``) in a JSON object; a JSON list
  of score rows beside a list of the task numbers of each subset, or beside records with
  ``sampled_train_indices``.

What a column is for is said by its name, or is beyond doubt, by the rule of
:mod:`ksm_ext.tables.roles`; :attr:`ScoreTable.columns` says what each was taken for, and why.

Shapes: masks (m, n), scores (m, t); float64, or bool for masks of 0 and 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ksm_ext.arrays import checked_names
from ksm_ext.checks import brief, check_choice, counted, listed, message
from ksm_ext.subsets import from_index_lists, merge_duplicate_tasks
from ksm_ext.surrogates.options import Missing
from ksm_ext.tables.files import (
    MAX_BYTES,
    Columns,
    UnfinishedTableError,
    is_text,
    read_document,
    source_name,
)
from ksm_ext.tables.layouts import from_long, from_tracker, split_subsets
from ksm_ext.tables.roles import (
    SHARES,
    Column,
    Role,
    assign_roles,
    check_filled,
    check_numeric,
    name_columns,
    one_column_per_task,
    role_table,
    truth_values,
)

Part = Literal["train", "test"]
Names = str | Sequence[str]
"""A name or glob, or several."""

MAX_COLUMNS = 2**20
"""How many columns the arrays of one file may have, and tasks its lists of task numbers."""

_INDICES = "sampled_train_indices"


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """What :func:`read_scores` returns.

    Attributes:
        masks: (m, n) bool, or float64 weights.
        scores: (m, t) float64.
        task_names: n names.
        target_names: t names.
        columns: What every column was taken for and why, the masks' file first.
        notes: What became of the table of a tracker.
        sample_weight: (m,) float64 how sure each row is, where a column says so, or None.
    """

    masks: Tensor
    scores: Tensor
    task_names: tuple[str, ...]
    target_names: tuple[str, ...]
    columns: tuple[Column, ...] = ()
    notes: tuple[str, ...] = ()
    sample_weight: Tensor | None = None

    __repr__ = brief

    def __str__(self) -> str:
        """Sizes and names in one line."""
        tasks, targets = (listed(names, 4) for names in (self.task_names, self.target_names))
        m, n, t = len(self.masks), len(self.task_names), len(self.target_names)
        distinct = len(torch.unique(self.masks, dim=0))
        runs = f"{counted(m, 'run')} of " if distinct < m else ""
        subsets = f"{runs}{counted(distinct, 'subset')} of {counted(n, 'task')} ({tasks})"
        return f"{subsets}, {counted(t, 'target')} ({targets})"

    def role_table(self) -> str:
        """The columns by role and reason, a line for each, after what became of a tracker's."""
        return "\n".join([*self.notes, role_table(self.columns)])

    def merged(self) -> "ScoreTable":
        """The same with tasks that are in or out together made one, under their first name.

        See :func:`ksm_ext.subsets.merge_duplicate_tasks`.
        """
        masks, groups = merge_duplicate_tasks(self.masks)
        names = tuple(self.task_names[group[0]] for group in groups)
        return replace(self, masks=masks, task_names=names)


def read_scores(
    scores: str | Path,
    masks: str | Path | None = None,
    *,
    tasks: Names = (),
    targets: Names = (),
    ignore: Names = (),
    weights: bool = False,
    key: str | None = None,
    num_tasks: int | None = None,
    subset: str | None = None,
    long: Sequence[str] | None = None,
    separator: Names = (),
    part: Part = "train",
    missing: Missing = "error",
    sample_weight: str | None = None,
) -> ScoreTable:
    """Read scored subsets in any layout of the module's head.

    ``tasks``, ``targets`` and ``ignore`` are names, or globs such as ``"valid_*"``. What they do
    not name is used only where it is beyond doubt what it is: :mod:`ksm_ext.tables.roles`.

    Args:
        scores: The file of the scores; ``"-"`` is standard input.
        masks: The file of the masks, where they are not in the same one.
        tasks: Names of the task columns, whose order is kept.
        targets: Names of the score columns, whose order is kept.
        ignore: Columns that are neither.
        weights: Whether masks may be other numbers than 0 and 1: shares of a mixture, counts.
        key: The column that joins two tables. Without it, the one that both have; of several, the
            one that has the same values, each once, in both.
        num_tasks: n, where subsets are lists of task numbers; by default the largest number + 1.
        subset: The column whose cells are lists of task names, or bit strings.
        long: The columns that name the run and the task, where each task of a run has a row.
        separator: What stands between names in the cells of ``subset``, such as ``"/"``, or
            several of these; by default found, where no task is other tasks joined by a symbol.
        part: Which rows of a published table that has ``train_`` and ``test_`` rows.
        missing: Whether empty cells of scores are an error, or NaN: ``"drop"``, as of
            :func:`ksm_ext.fit_surrogate`.
        sample_weight: The column, beside the scores, that says how sure each row is.

    Returns:
        Masks, scores and their names, by default "0", "1", …, and what every column was taken for.

    Raises:
        FileNotFoundError: If a file is not there.
        OSError: If it cannot be read.
        ValueError: If a file is damaged or larger than :data:`MAX_COLUMNS` and
            :data:`.files.MAX_BYTES` allow; if the role of a column is in doubt; if columns
            are missing, have empty cells or no numbers; if masks are not 0 or 1 and ``weights`` is
            False; or if the keys of two tables differ or repeat.
        RuntimeError: If a file is Parquet and ``pyarrow`` is not installed.

    Example:
        >>> table = read_scores("scores.csv", targets="loss", ignore="seed")  # doctest: +SKIP
        >>> ksm_ext.fit_surrogate(table.masks, table.scores)  # doctest: +SKIP
    """
    given: dict[Role, Names] = {"task": tasks, "target": targets, "ignored": ignore}
    given["weight"] = () if sample_weight is None else sample_weight
    patterns = {role: (n,) if isinstance(n, str) else n for role, n in given.items()}
    check_choice("missing", missing, get_args(Missing))
    names = None if long is None else _two_names(long)
    separators = (separator,) if isinstance(separator, str) else tuple(separator)
    if separators and subset is None:
        remedy = "Name the column of lists of tasks too (`--subset`)."
        raise ValueError(message("separator", "given with `subset`", repr(separator), remedy))
    reshape = _Reshape(subset, names, tuple(patterns["ignored"]), separators)
    return _assembled(
        _tables(scores, masks, part, num_tasks, reshape), patterns, weights, key, missing
    )


def read_masks(source: str | Path, tasks: Sequence[str]) -> Tensor:
    """The masks of a file, whether their scores are beside them or not.

    Args:
        source: Any layout that :func:`read_scores` takes; ``"-"`` is standard input.
        tasks: Names of the task columns, in the order wanted; arrays and lists of task numbers
            without names have them by number.

    Returns:
        (m, n) bool.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read.
        ValueError: If it has no column of a task, or other numbers than 0 and 1.
    """
    table = _table(_read(source, "train"), source_name(source), "masks", len(tasks), _Reshape())
    columns, names = table.columns, [str(number) for number in range(len(tasks))]
    if len(columns) == len(tasks) and list(columns) == names:  # an array, which has no names
        columns = dict(zip(tasks, columns.values(), strict=True))
    missing = [name for name in tasks if name not in columns]
    if missing:
        remedy = "Give a table with a column per task, 1 where it was in the subset."
        found = f"none for {listed(map(repr, missing))}"
        raise ValueError(message(table.where, "a column for every task", found, remedy))
    rows = []
    for name in tasks:
        cells = columns[name].astype(str)
        rows.append(np.isin(cells, ("1", "1.0", "True")))
        known = rows[-1] | np.isin(cells, ("0", "0.0", "False"))
        if not known.all():
            row = int(known.argmin())
            what, remedy = f"{name!r} of {table.where}", "Correct it, or leave out the row."
            found = f"{cells[row]} in row {row + 1}"
            raise ValueError(message(what, "0 or 1 in every row", found, remedy))
    return torch.from_numpy(np.stack(rows, axis=1))


def read_index_lists(source: str | Path) -> list[list[int]]:
    """The task numbers of each subset, in their order, from a JSON list or published records.

    Args:
        source: A list of lists of task numbers, or records with ``sampled_train_indices``.

    Returns:
        m lists.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    document = read_document(source)
    lists = _index_lists(document)
    if lists is None:
        found = "list" if isinstance(document, list) else f"{list(document)[:8]}"
        expected = f"lists of task numbers, or records with {_INDICES!r}"
        raise ValueError(message(str(source), expected, found, "Export it as a JSON list."))
    return lists


# -- columns ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Table:
    """Columns, what messages call them, what they may be, and why they surely are.

    ``tasks`` and ``scores`` are that beyond doubt; ``note`` says what became of a tracker's table.
    """

    columns: Columns
    where: str
    may: tuple[Role, ...]
    sure: str = ""
    tasks: tuple[str, ...] = ()
    scores: tuple[str, ...] = ()
    note: str = ""

    def numbers(
        self, roles: list[Column], named: Mapping[str, Role], role: Role, missing: Missing = "error"
    ) -> Columns:
        """The columns of a role, in the order in which they were named, else that of the table."""
        names = [name for name in named if named[name] == role]
        names = names or [column.name for column in roles if column.role == role]
        for name in names:
            check_numeric(name, self.columns[name], self.where)
            if missing == "error":
                drop = "fit each score to the rows that have it (`--missing=drop`), "
                check_filled(name, self.columns[name], self.where, drop if role == "target" else "")
            rows, first = len(self.columns[name]), len(self.columns[names[0]])
            if rows != first or not rows:
                expected = f"of {first:,} rows like {names[0]!r}" if rows else "of a row per subset"
                remedy = "Give every column one number per subset."
                found = f"{rows:,} rows"
                raise ValueError(message(f"{name!r} of {self.where}", expected, found, remedy))
        return {name: self.columns[name] for name in names}


def _assembled(
    tables: list[_Table],
    patterns: Mapping[Role, Sequence[str]],
    weights: bool,
    key: str | None,
    missing: Missing,
) -> ScoreTable:
    """Masks and scores of one table of both, or of one of each."""
    named = []
    for table in tables:
        asked = (*table.may, "ignored", *(["weight"] if table is tables[-1] else []))
        known = {role: parts for role, parts in patterns.items() if role in asked}
        others = [name for other in tables if other is not table for name in other.columns]
        own: dict[Role, tuple[str, ...]] = {"task": table.tasks, "target": table.scores}
        for role, names_there in own.items():
            if names_there and not patterns[role]:
                known[role] = [name for name in names_there if name not in patterns["ignored"]]
        named.append(name_columns(table.columns, known, table.where, others))
    report: list[Column] = []
    if key is not None or len(tables) == 2:
        key = _key(tables, named, key)
    if key is not None:
        tables = _joined(tables, key)
        report.append(Column(key, "key", "joins the two tables"))
    roles = [
        assign_roles(table.columns, table.where, given, table.may, weights=weights, sure=table.sure)
        for table, given in zip(tables, named, strict=True)
    ]
    masks = tables[0].numbers(roles[0], named[0], "task")
    scores = tables[-1].numbers(roles[-1], named[-1], "target", missing)
    sure = list(tables[-1].numbers(roles[-1], named[-1], "weight").values())
    if len(sure) > 1:
        found, remedy = f"{len(sure)} columns", "Name the one."
        raise ValueError(message("sample_weight", "one column", found, remedy))
    shares = any(column.reason == SHARES for column in roles[0])
    mask_rows = _mask_rows(masks, tables[0].where, weights or shares)
    score_rows = np.stack(list(scores.values()), axis=1).astype(np.float64)
    if len(mask_rows) != len(score_rows):
        remedy = "Give both one row per subset in the same order, or a column that joins them."
        expected = f"of {len(score_rows)} rows like the scores"
        kind = UnfinishedTableError if len(score_rows) < len(mask_rows) else ValueError
        raise kind(message("masks", expected, f"{len(mask_rows)} rows", remedy))
    for names in (masks, scores):
        checked_names("names", list(names), len(names))
    known_names = {name for table in tables for name in (*table.tasks, *table.scores)}
    report += [
        replace(column, reason=f"a {column.role} there")
        if column.reason == "named" and column.name in known_names and not patterns[column.role]
        else column
        for columns in roles
        for column in columns
    ]
    numbers = torch.from_numpy(mask_rows), torch.from_numpy(score_rows)
    notes = tuple(table.note for table in tables if table.note)
    weight = torch.from_numpy(sure[0].astype(np.float64)) if sure else None
    return ScoreTable(*numbers, tuple(masks), tuple(scores), tuple(report), notes, weight)


def _mask_rows(columns: Columns, where: str, weights: bool) -> np.ndarray:
    """(m, n) bool, or float64 weights."""
    binary = True
    for name, cells in columns.items():
        other = (cells != 0) & (cells != 1)
        binary &= not other.any()
        if other.any() and not weights:
            row = int(other.argmax())
            found = f"{cells[row]:g} in row {row + 1}"
            remedy = "Add `--weights` (`weights=True`) if it holds shares of a mixture, or counts."
            raise ValueError(message(f"{name!r} of {where}", "0 or 1 in every row", found, remedy))
    kind = np.bool_ if binary else np.float64
    return np.stack([cells.astype(kind) for cells in columns.values()], axis=1)


# -- joining ------------------------------------------------------------------------------------


def _key(
    tables: Sequence[_Table], named: Sequence[Mapping[str, Role]], key: str | None
) -> str | None:
    left, right = (table.columns for table in (tables[0], tables[-1]))
    shared = [
        name
        for name in right
        if name in left
        and name
        and not any(name in given for given in named)
        and not any(table.sure for table in tables)
        and left[name].ndim == right[name].ndim == 1
    ]
    if key is not None:
        if key not in shared or len(tables) == 1:
            expected = f"a column of both tables ({listed(shared, 12) or 'none is'})"
            raise ValueError(message("key", expected, repr(key), "Mind its spelling."))
        return key
    if len(shared) < 2:
        return shared[0] if shared else None
    values = [[_values(table.columns[name]) for table in tables] for name in shared]
    same = [
        name
        for name, (a, b) in zip(shared, values, strict=True)
        if len(set(a)) == len(a) == len(b) and set(a) == set(b)
    ]
    if len(same) != 1:
        remedy = "Name it (`--key`); where rows go by position, name the others "
        remedy += "(`--tasks`, `--targets`, `--ignore`)."
        expected = "one column that joins the two tables"
        raise ValueError(message("key", expected, f"several: {listed(shared, 12)}", remedy))
    return same[0]


def _joined(tables: Sequence[_Table], key: str) -> list[_Table]:
    """The masks in the order of the scores, both without the key."""
    pool, table = tables
    for side in tables:
        _check_key(side, key)
    place = {value: row for row, value in enumerate(_values(pool.columns[key]))}
    wanted = _values(table.columns[key])
    missing = next((value for value in wanted if value not in place), None)
    scored = set(wanted)
    unknown = next((value for value in place if value not in scored), None)
    if missing is not None or unknown is not None:
        found = [] if missing is None else [f"no {_shown(missing)}"]
        found += [] if unknown is None else [f"{_shown(unknown)}, which the scores lack"]
        remedy = "Give every subset one row in both tables."
        what = f"{key!r} of {pool.where}"
        kind = UnfinishedTableError if missing is None else ValueError
        raise kind(message(what, "that of the scores", " and ".join(found), remedy))
    rows = [place[value] for value in wanted]
    return [
        replace(side, columns={n: cells[order] for n, cells in side.columns.items() if n != key})
        for side, order in ((pool, rows), (table, slice(None)))
    ]


def _check_key(table: _Table, key: str) -> None:
    cells, what = table.columns[key], f"{key!r} of {table.where}"
    if not is_text(cells):
        check_filled(key, cells, table.where)
        if len(cells) and np.abs(cells).max() >= 2**53:
            found, remedy = f"{np.abs(cells).max():.0f}", "Write a letter before every number."
            raise ValueError(message(what, "text, or numbers below 2^53", found, remedy))
    rows: dict[Any, int] = {}
    for row, value in enumerate(_values(cells), start=1):
        if rows.setdefault(value, row) != row:
            found = f"{_shown(value)} in rows {rows[value]} and {row}"
            remedy = "Keep one row per subset; if it is no key, name it (`--tasks`, `--targets`)."
            if table.may == ("task",):
                others = [name for name in table.columns if name != key]
                remedy = f"{one_column_per_task(table.columns, others, key)} {remedy}".lstrip()
            raise ValueError(message(what, "all different", found, remedy))


def _values(cells: np.ndarray) -> list[Any]:
    return [str(cell) for cell in cells] if is_text(cells) else list(cells.tolist())


def _shown(value: Any) -> str:
    return f"{value:.15g}" if isinstance(value, float) else repr(value)


# -- arrays and published layouts ---------------------------------------------------------------


@dataclass(frozen=True)
class _Reshape:
    """Which columns hold lists of tasks, or name the run and the task of each row."""

    subset: str | None = None
    long: tuple[str, str] | None = None
    ignored: tuple[str, ...] = ()
    separators: tuple[str, ...] = ()

    def table(self, columns: Columns, where: str, may: tuple[Role, ...]) -> _Table:
        """A table by its columns, whatever tool wrote it."""
        columns, scores, note = from_tracker(columns, where)
        if not any(cells.size for cells in columns.values()):
            expected = "a table with a row per scored subset below its header"
            remedy = "Add the rows, or name another file."
            raise UnfinishedTableError(message(where, expected, "no rows", remedy))
        before = set(columns)
        if "task" in may and self.long is not None:
            columns = from_long(columns, *self.long, where, self.ignored)
        if "task" in may and self.subset is not None:
            columns = split_subsets(columns, self.subset, where, self.separators)
        tasks = tuple(name for name in columns if name not in before)
        columns = {name: truth_values(cells) for name, cells in columns.items()}
        known = tuple(scores) if "target" in may else ()
        return _Table(columns, where, may, tasks=tasks, scores=known, note=note)


def _two_names(long: Sequence[str]) -> tuple[str, str]:
    if isinstance(long, str) or len(long) != 2:
        remedy = 'Such as long=("run", "task"), `--long run,task`.'
        raise ValueError(message("long", "the columns of the run and the task", repr(long), remedy))
    return long[0], long[1]


def _tables(
    scores: str | Path,
    masks: str | Path | None,
    part: Part,
    num_tasks: int | None,
    reshape: _Reshape,
) -> list[_Table]:
    """One table of tasks and targets, or the masks and the scores."""
    document, where = _read(scores, part), source_name(scores)
    if masks is not None:
        pool = _table(_read(masks, part), source_name(masks), "masks", num_tasks, reshape)
        return [pool, _table(document, where, "scores", None, reshape)]
    if isinstance(document, list):
        found, remedy = "a list of rows", "Name the file of the masks too (`--masks`)."
        raise ValueError(message(where, "a table of tasks and scores", found, remedy))
    if "masks" not in document:
        return [reshape.table(document, where, ("task", "target"))]
    if "scores" not in document:
        expected = "an array of scores beside that of masks"
        remedy = "Add one, or name the file of the scores as SCORES and this as `--masks`."
        raise ValueError(message(where, expected, "none", remedy))
    return [_table(document, where, what, num_tasks, reshape) for what in ("masks", "scores")]


def _read(source: str | Path, part: Part) -> Columns | list[Any]:
    """What a file holds; of an NPZ with arrays, only these. Published names become our own."""
    published = {f"{part}_w": "masks", f"{part}_subset_scores": "scores"}
    published |= {"coalitions": "masks"}  # shapiq's games, whose values are scores
    arrays = (*published, *published.values(), "values", "task_names", "target_names")
    document = read_document(source, arrays)
    if isinstance(document, list):
        return document
    if "coalitions" in document:
        published["values"] = "scores"
    own = {theirs: ours for theirs, ours in published.items() if ours not in document}
    return {own.get(name, name): cells for name, cells in document.items()}


def _table(
    document: Columns | list[Any],
    where: str,
    what: Literal["masks", "scores"],
    num_tasks: int | None,
    reshape: _Reshape,
) -> _Table:
    """A document of masks or of scores as columns."""
    role: Role = "task" if what == "masks" else "target"
    lists = _index_lists(document) if what == "masks" else None
    names = None
    if lists is not None and not _are_masks(lists):
        array, why = _masks_of_lists(lists, where, num_tasks), "task numbers"
    elif isinstance(document, list):
        array, why = _rectangular(document), f"the {what}"
    elif what in document:
        array, why = document[what], f"the array of {what}"
        names = document.get(f"{role}_names")
    else:
        return reshape.table(document, where, (role,))
    if array.ndim == 1:
        array = array[:, None]
    if array.ndim != 2 or is_text(array):
        found = "rows of different lengths or no numbers"
        remedy = "Give one row of numbers per subset."
        raise ValueError(message(f"the {what} of {where}", "a matrix of numbers", found, remedy))
    if array.shape[1] > MAX_COLUMNS:
        expected = f"of at most {MAX_COLUMNS:,} columns"
        found, remedy = f"{array.shape[1]:,}", "Leave out what is not needed."
        raise ValueError(message(f"the {what} of {where}", expected, found, remedy))
    given = _names_of(names, f"{role}_names of {where}", array.shape[1])
    return _Table(dict(zip(given, array.T, strict=True)), where, (role,), why)


def _names_of(names: np.ndarray | None, what: str, count: int) -> list[str]:
    """Names of ``count`` columns, their numbers by default."""
    if names is None:
        return [str(index) for index in range(count)]
    if names.ndim != 1:
        remedy = "Give a list of names."
        raise ValueError(message(what, f"{count} names", f"{names.ndim} dimensions", remedy))
    given = [n.decode(errors="replace") if isinstance(n, bytes) else n for n in names.tolist()]
    return list(checked_names(what, given, count))


def _rectangular(rows: list[Any]) -> np.ndarray:
    """Rows of numbers as an array, and anything else as an array of objects."""
    try:
        return np.asarray(rows) if rows else np.empty(0, dtype=object)
    except (ValueError, OverflowError):
        return np.empty(0, dtype=object)


def _index_lists(document: Columns | list[Any]) -> list[list[int]] | None:
    """Lists of task numbers, where ``document`` is that."""
    rows = document if isinstance(document, list) else document.get(_INDICES, np.empty(()))
    if not isinstance(rows, list) and rows.ndim == 0:
        return None
    if not all(isinstance(row, (list, np.ndarray)) for row in rows):
        return None
    cells: list[Any] = [cell for row in rows for cell in row]
    kinds = {type(cell) for cell in cells}
    integers = all(issubclass(kind, (int, np.integer)) and kind is not bool for kind in kinds)
    if integers and all(abs(int(cell)) < 2**62 for cell in cells):
        return [[int(cell) for cell in row] for row in rows]
    return None


def _masks_of_lists(lists: list[list[int]], where: str, num_tasks: int | None) -> np.ndarray:
    n: int = num_tasks or 1 + max((cell for row in lists for cell in row), default=0)
    if n > MAX_COLUMNS or len(lists) * n > MAX_BYTES:
        expected = f"such that n is at most {MAX_COLUMNS:,}, and m n at most {MAX_BYTES:,}"
        found = f"n = {n:,} for {len(lists):,} lists"
        remedy = "Number the tasks that there are from 0."
        raise ValueError(message(f"the task numbers of {where}", expected, found, remedy))
    return np.asarray(from_index_lists(lists, n).numpy())


def _are_masks(lists: list[list[int]]) -> bool:
    """Whether integers are the cells of masks rather than task numbers."""
    return len(set(map(len, lists))) == 1 and all(cell in (0, 1) for r in lists for cell in r)
