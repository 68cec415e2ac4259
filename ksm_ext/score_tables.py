"""Scores of subsets from files: which columns are tasks, which are targets, and what they say.

Three layouts of a table are read (:mod:`ksm_ext.tables` says in which files), and those in which
scores were published with the paper:

* one table: a column per task that is 0 or 1, and a column per target;
* two tables: masks (or mixture weights) and scores, row by row, or joined by the one column that
  both have;
* arrays ``masks`` (m, n) and ``scores`` (m,) or (m, t), with ``task_names`` and ``target_names``
  where there are names, in NPZ or a JSON object;
* published: ``train_w`` and ``train_subset_scores`` (and ``test_``) in a JSON object; a JSON list
  of score rows beside a list of the task numbers of each subset, or beside records with
  ``sampled_train_indices``.

Shapes: masks (m, n), scores (m, t); float64, or bool for masks of 0 and 1.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ksm_ext.checks import message
from ksm_ext.subsets import from_index_lists, merge_duplicate_tasks
from ksm_ext.tables import Columns, is_text, read_document

Part = Literal["train", "test"]

_INDICES = "sampled_train_indices"


@dataclass(frozen=True, eq=False)
class ScoreTable:
    """What :func:`read_scores` returns.

    Attributes:
        masks: (m, n) bool, or float64 weights.
        scores: (m, t) float64.
        task_names: n names.
        target_names: t names.
    """

    masks: Tensor
    scores: Tensor
    task_names: tuple[str, ...]
    target_names: tuple[str, ...]

    def __str__(self) -> str:
        """Sizes and names in one line."""
        tasks, targets = (_listed(names) for names in (self.task_names, self.target_names))
        m, n, t = len(self.masks), len(self.task_names), len(self.target_names)
        return f"{m:,} subsets of {n:,} tasks ({tasks}), {t:,} targets ({targets})"

    def merged(self) -> "ScoreTable":
        """The same with tasks that are in or out together made one, under their first name.

        See :func:`ksm_ext.subsets.merge_duplicate_tasks`.
        """
        masks, groups = merge_duplicate_tasks(self.masks)
        names = tuple(self.task_names[group[0]] for group in groups)
        return ScoreTable(masks, self.scores, names, self.target_names)


def read_scores(
    scores: str | Path,
    masks: str | Path | None = None,
    *,
    targets: Sequence[str] = (),
    ignore: Collection[str] = (),
    num_tasks: int | None = None,
    part: Part = "train",
) -> ScoreTable:
    """Read scored subsets in any layout of the module's head.

    Args:
        scores: The file of the scores; ``"-"`` is standard input.
        masks: The file of the masks, where they are not in the same one.
        targets: Names of the score columns. Without them, in a table of its own every column is
            one; beside tasks in one table, every column that holds anything but 0 and 1.
        ignore: Columns that are neither. One without a name (pandas' row numbers) never counts.
        num_tasks: n, where subsets are lists of task numbers; by default the largest number + 1.
        part: Which rows of a published table that has ``train_`` and ``test_`` rows.

    Returns:
        Masks, scores and their names, by default "0", "1", ….

    Raises:
        FileNotFoundError: If a file is not there.
        ValueError: If a file is damaged, or columns are missing, empty or no numbers.
        RuntimeError: If a file is Parquet and ``pyarrow`` is not installed.

    Example:
        >>> table = read_scores("scores.csv")  # doctest: +SKIP
        >>> ksm_ext.fit_surrogate(table.masks, table.scores)  # doctest: +SKIP
    """
    document = _without(read_document(scores), ignore)
    if masks is not None:
        pool = _without(read_document(masks), ignore)
        document, pool = _joined(document, pool, str(scores), str(masks))
        mask_rows, task_names = _mask_rows(pool, str(masks), num_tasks, part)
        score_rows, target_names = _score_rows(document, str(scores), targets, part)
    elif isinstance(document, list):
        found = "a list of rows"
        remedy = "Name the file of the masks too (`--masks`)."
        raise ValueError(message(str(scores), "a table of tasks and scores", found, remedy))
    elif _array_named(document, "masks", part) is not None:
        mask_rows, task_names = _mask_rows(document, str(scores), num_tasks, part)
        score_rows, target_names = _score_rows(document, str(scores), targets, part)
    else:
        tasks, document = _split_columns(document, str(scores), targets)
        mask_rows, task_names = _stacked(tasks, str(scores))
        score_rows, target_names = _stacked(document, str(scores))
    if len(mask_rows) != len(score_rows):
        remedy = "Give both one row per subset in the same order, or a column that joins them."
        expected = f"of {len(score_rows)} rows like the scores"
        raise ValueError(message("masks", expected, f"{len(mask_rows)} rows", remedy))
    if bool(((mask_rows == 0) | (mask_rows == 1)).all()):
        mask_rows = mask_rows.bool()
    return ScoreTable(mask_rows, score_rows, task_names, target_names)


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
        found = type(document).__name__ if isinstance(document, list) else f"{list(document)[:8]}"
        expected = f"lists of task numbers, or records with {_INDICES!r}"
        raise ValueError(message(str(source), expected, found, "Export it as a JSON list."))
    return lists


# -- columns ------------------------------------------------------------------------------------


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (", …" if len(names) > 4 else "")


def _without(document: Columns | list[Any], ignore: Collection[str]) -> Columns | list[Any]:
    if isinstance(document, list):
        return document
    for name in ignore:
        _check_column(document, name, "ignore")
    return {name: column for name, column in document.items() if name and name not in ignore}


def _check_column(columns: Columns, name: str, argument: str) -> None:
    if name not in columns:
        expected = f"among the columns {_listed(list(columns))}"
        raise ValueError(message(argument, expected, repr(name), "Mind its spelling."))


def _split_columns(columns: Columns, where: str, targets: Sequence[str]) -> tuple[Columns, Columns]:
    """The tasks and the targets of one table."""
    for name in targets:
        _check_column(columns, name, "targets")
    if targets:
        chosen = set(targets)
    else:
        binary = {
            name for name, c in columns.items() if not is_text(c) and np.isin(c, (0, 1)).all()
        }
        chosen = set(columns) - binary
    tasks = {name: column for name, column in columns.items() if name not in chosen}
    scores = {name: columns[name] for name in (targets or columns) if name in chosen}
    if not tasks or not scores:
        what = "tasks" if not tasks else "scores"
        expected = "columns of tasks (0 or 1) and columns of scores"
        remedy = "Name the score columns (`--targets`), or the file of the masks (`--masks`)."
        raise ValueError(message(where, expected, f"no {what}", remedy))
    return tasks, scores


def _stacked(columns: Columns, where: str) -> tuple[Tensor, tuple[str, ...]]:
    """Columns side by side, (m, number of columns) float64."""
    for name, column in columns.items():
        if column.ndim != 1 or is_text(column):
            remedy = "Leave it out (`--ignore`), or correct its cells."
            found = repr(str(column.flat[0])[:40]) if column.size else "nothing"
            expected = "a column of numbers"
            raise ValueError(message(f"{name!r} of {where}", expected, found, remedy))
    if not columns:
        raise ValueError(message(where, "a table of columns", "none", "Mind what is ignored."))
    return torch.from_numpy(np.stack(list(columns.values()), axis=1).astype(np.float64)), tuple(
        columns
    )


def _joined(
    scores: Columns | list[Any], masks: Columns | list[Any], scores_at: str, masks_at: str
) -> tuple[Columns | list[Any], Columns | list[Any]]:
    """Both with the rows of the masks in the order of the scores, without the shared column."""
    if isinstance(scores, list) or isinstance(masks, list):
        return scores, masks
    shared = [name for name in scores if name in masks and scores[name].ndim == 1]
    if not shared or _array_named(masks, "masks", "train") is not None:
        return scores, masks
    if len(shared) > 1:
        remedy = "Leave the others out (`--ignore`)."
        found = _listed(shared)
        raise ValueError(message("the columns of both tables", "one at most", found, remedy))
    key = shared[0]
    place = {value: row for row, value in enumerate(masks[key].tolist())}
    wanted = scores[key].tolist()
    for name, column in ((scores_at, scores[key]), (masks_at, masks[key])):
        if len(set(column.tolist())) < len(column):
            remedy = "One row per subset can be joined."
            raise ValueError(message(f"{key!r} of {name}", "all different", "repeats", remedy))
    missing = [value for value in wanted if value not in place]
    if missing:
        remedy = "Give the mask of every scored subset."
        found = f"no {missing[0]!r}"
        raise ValueError(message(f"{key!r} of {masks_at}", "that of the scores", found, remedy))
    rows = [place[value] for value in wanted]
    return (
        {name: column for name, column in scores.items() if name != key},
        {name: column[rows] for name, column in masks.items() if name != key},
    )


# -- arrays and published layouts ---------------------------------------------------------------


def _array_named(document: Columns, what: str, part: Part) -> np.ndarray | None:
    """The array ``masks`` or ``scores`` under its own or its published name."""
    published = {"masks": f"{part}_w", "scores": f"{part}_subset_scores"}[what]
    return document.get(what, document.get(published))


def _index_lists(document: Columns | list[Any]) -> list[list[int]] | None:
    """Lists of task numbers, where ``document`` is that."""
    rows = document if isinstance(document, list) else document.get(_INDICES)
    if rows is None or not all(isinstance(row, (list, np.ndarray)) for row in rows):
        return None
    cells = [cell for row in rows for cell in row]
    if all(isinstance(cell, (int, np.integer)) and not isinstance(cell, bool) for cell in cells):
        return [[int(cell) for cell in row] for row in rows]
    return None


def _mask_rows(
    document: Columns | list[Any], where: str, num_tasks: int | None, part: Part
) -> tuple[Tensor, tuple[str, ...]]:
    """Masks (m, n) and task names of a document of masks alone, or of arrays."""
    lists = _index_lists(document)
    if lists is not None and not _are_masks(lists):
        largest = max((max(row) for row in lists if row), default=0)
        n = num_tasks or largest + 1
        return from_index_lists(lists, n).double(), _numbered(n)
    return _rows(document, "masks", "task_names", where, part)


def _score_rows(
    document: Columns | list[Any], where: str, targets: Sequence[str], part: Part
) -> tuple[Tensor, tuple[str, ...]]:
    rows, names = _rows(document, "scores", "target_names", where, part)
    if not targets:
        return rows, names
    for name in targets:
        _check_column(dict.fromkeys(names, np.empty(0)), name, "targets")
    return rows[:, [names.index(name) for name in targets]], tuple(targets)


def _are_masks(lists: list[list[int]]) -> bool:
    """Whether integers are the cells of masks rather than task numbers."""
    return len({len(row) for row in lists}) == 1 and all(
        cell in (0, 1) for r in lists for cell in r
    )


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(str(index) for index in range(count))


def _rows(
    document: Columns | list[Any], what: str, names: str, where: str, part: Part
) -> tuple[Tensor, tuple[str, ...]]:
    """(m, count) float64 and the names of its columns."""
    if isinstance(document, list):
        array = np.asarray(document) if len({np.shape(row) for row in document}) == 1 else None
        given = None
    else:
        array = _array_named(document, what, part)
        if array is None:
            return _stacked(document, where)
        given = document.get(names)
    if array is not None and array.ndim == 1:
        array = array[:, None]
    if array is None or array.ndim != 2 or is_text(array):
        found = "rows of different lengths or no numbers"
        remedy = "Give one row of numbers per subset."
        raise ValueError(message(f"the {what} of {where}", "a matrix of numbers", found, remedy))
    listed = _numbered(array.shape[1]) if given is None else tuple(str(n) for n in given)
    if len(listed) != array.shape[1]:
        remedy = "Give one name per column."
        expected = f"{array.shape[1]} names"
        raise ValueError(message(f"{names} of {where}", expected, str(len(listed)), remedy))
    return torch.from_numpy(array.astype(np.float64)), listed
