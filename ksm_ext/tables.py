"""Tables in files and pipes: CSV, Parquet, JSON and NPZ in, CSV, Parquet and JSON out.

What a file holds is told by its first bytes, not by its name, so that pipes need no hint. Nothing
is unpickled. A table is its columns by name, in their order; numbers are float64, an empty cell is
NaN, and a column that holds anything but numbers stays as text.

Shapes: every column (m,).
"""

import csv
import io
import json
import math
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ksm_ext.checks import check_choice, message
from ksm_ext.files import write_whole

Columns = dict[str, np.ndarray]
"""Columns (m,) by name: float64, or text."""

FORMATS = ("csv", "json", "parquet")

_TRUTH = {"true": "1", "false": "0", "": "nan", "na": "nan", "none": "nan", "null": "nan"}
_DELIMITERS = ",;\t"


def read_document(source: str | Path) -> Columns | list[Any]:
    """Read whatever a file or standard input (``"-"``) holds.

    Args:
        source: CSV with a header row (comma, semicolon or tab), Parquet, JSON or NPZ.

    Returns:
        Arrays by name: of a table (CSV, Parquet, JSON records) its columns (m,); of NPZ and of a
        JSON object its arrays, whatever their dimensions. A JSON list that holds no records is
        returned as it is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these, empty, or its rows differ in length.
        RuntimeError: If it is Parquet and ``pyarrow`` is not installed.
    """
    name = "standard input" if str(source) == "-" else str(source)
    content = _read(source)
    if content.startswith(b"PAR1"):
        return _read_parquet(content, name)
    if content.startswith(b"PK\x03\x04"):
        return _read_npz(content, name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _unreadable(name, str(error)) from error
    if not text.strip():
        raise _unreadable(name, "nothing in it")
    if text.lstrip()[0] in "[{":
        return _read_json(text, name)
    return _read_csv(text, name)


def write_columns(columns: Mapping[str, Sequence[Any]], target: str, form: str | None) -> None:
    """Write a table to a file, whole or not at all, or to standard output (``"-"``).

    Args:
        columns: Equally long columns of text and numbers; NaN becomes an empty cell or ``null``.
        target: The file, or ``"-"``.
        form: ``"csv"``, ``"json"`` (records) or ``"parquet"``; ``None`` goes by the file's ending,
            and is CSV on standard output.

    Raises:
        ValueError: If the ending is none of these.
        OSError: If the file cannot be written.
        RuntimeError: If it is Parquet and ``pyarrow`` is not installed.
    """
    if form is None:
        form = "csv" if target == "-" else Path(target).suffix.lower().lstrip(".")
        remedy = "Choose another ending, or name the format."
        check_choice("the ending of the output", form, FORMATS, remedy)
    if form == "parquet":
        content = _parquet_bytes(columns)
        if target == "-":
            sys.stdout.buffer.write(content)
            return
    else:
        text = _csv_text(columns) if form == "csv" else _json_text(columns)
        if target == "-":
            sys.stdout.write(text)
            return
        content = text.encode()
    write_whole(Path(target), content)


def is_text(column: np.ndarray) -> bool:
    """Whether a column holds anything but numbers."""
    return column.dtype.kind not in "biuf"


# -- reading ------------------------------------------------------------------------------------


def _read(source: str | Path) -> bytes:
    if str(source) == "-":
        return sys.stdin.buffer.read()
    path = Path(source)
    if not path.is_file():
        remedy = 'Check the path; "-" is standard input.'
        raise FileNotFoundError(message("path", "a file", str(path), remedy))
    return path.read_bytes()


def _unreadable(name: str, found: str) -> ValueError:
    remedy = "Export the table again as one of these."
    expected = "CSV with a header row, Parquet, JSON or NPZ"
    return ValueError(message(name, expected, found, remedy))


def _read_csv(text: str, name: str) -> Columns:
    first = text.split("\n", 1)[0]
    delimiter = max(_DELIMITERS, key=first.count)
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if row]
    header = [cell.strip() for cell in rows.pop(0)]
    twice = next((cell for cell in header if header.count(cell) > 1), None)
    if twice is not None:
        remedy = "Give the table a header row of different names."
        raise ValueError(message(f"the header of {name}", "all different", repr(twice), remedy))
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            remedy = "Fill or quote the cells of that row."
            expected = f"{len(header)} cells wide like its header"
            raise ValueError(message(name, expected, f"{len(row)} in row {number}", remedy))
    cells = zip(*rows, strict=True) if rows else [()] * len(header)
    return {key: _numbers(column) for key, column in zip(header, cells, strict=True)}


def _numbers(cells: Sequence[str]) -> np.ndarray:
    """Text as float64 where every cell is a number, a truth value or empty."""
    try:
        return np.array(cells, dtype=np.float64)
    except ValueError:
        pass
    stripped = [cell.strip() for cell in cells]
    try:
        return np.array([_TRUTH.get(cell.lower(), cell) for cell in stripped], dtype=np.float64)
    except ValueError:
        return np.array(stripped, dtype=np.str_)


def _read_json(text: str, name: str) -> Columns | list[Any]:
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise _unreadable(name, f"JSON that ends or breaks off at {error}") from error
    if isinstance(document, dict):
        return {key: _array(value) for key, value in document.items()}
    records = [row for row in document if isinstance(row, dict)]
    if not records:
        return list(document)
    keys = list(records[0])
    for number, row in enumerate(document):
        if not isinstance(row, dict) or set(row) != set(keys):
            remedy = "Give every record the same names."
            expected = f"records of {', '.join(map(repr, keys[:8]))}"
            found = f"{str(row)[:60]} as record {number}"
            raise ValueError(message(name, expected, found, remedy))
    return {key: _array([row[key] for row in records]) for key in keys}


def _array(values: Any) -> np.ndarray:
    """A JSON value as numbers or text; lists of different lengths stay lists in (m,) objects."""
    if not isinstance(values, list):
        return np.asarray(values, dtype=object)
    if all(cell is None or isinstance(cell, (int, float)) for cell in values):
        return np.array([math.nan if cell is None else cell for cell in values], dtype=np.float64)
    if all(isinstance(cell, str) for cell in values):
        return np.array(values, dtype=np.str_)
    if len({len(cell) if isinstance(cell, list) else -1 for cell in values}) == 1:
        array = np.asarray(values)
        if array.dtype.kind in "biuf":
            return array
    objects = np.empty(len(values), dtype=object)
    objects[:] = values
    return objects


def _read_npz(content: bytes, name: str) -> Columns:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise _unreadable(name, f"NPZ with {error}") from error


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        found = "pyarrow is not installed"
        remedy = 'pip install "ksm_ext[parquet]", or use CSV.'
        raise RuntimeError(message("Parquet", "readable through pyarrow", found, remedy)) from error
    return pyarrow


def _read_parquet(content: bytes, name: str) -> Columns:
    pyarrow = _pyarrow()
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise _unreadable(name, f"Parquet with {error}") from error
    columns = {}
    for name in table.column_names:
        if not name.startswith("__index_level_"):  # pandas' row numbers
            column = table.column(name).to_numpy()
            columns[name] = column.astype(np.float64 if column.dtype.kind in "biuf" else np.str_)
    return columns


# -- writing ------------------------------------------------------------------------------------


def _plain(cell: Any) -> Any:
    """A cell as Python's own number or text; None for NaN."""
    value = cell.item() if isinstance(cell, np.generic) else cell
    return None if isinstance(value, float) and math.isnan(value) else value


def _csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(map(_plain, row) for row in zip(*columns.values(), strict=True))
    return text.getvalue()


def _json_text(columns: Mapping[str, Sequence[Any]]) -> str:
    rows = zip(*columns.values(), strict=True)
    lines = [json.dumps(dict(zip(columns, map(_plain, row), strict=True))) for row in rows]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def _parquet_bytes(columns: Mapping[str, Sequence[Any]]) -> bytes:
    pyarrow = _pyarrow()
    cells = {name: [_plain(cell) for cell in column] for name, column in columns.items()}
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(cells), sink)
    return sink.getvalue()
