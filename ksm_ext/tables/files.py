"""Tables in files and pipes: CSV, JSON, NPZ, Parquet, Feather and Excel in; CSV, JSON, Parquet out.

What a file holds is told by its first bytes, not by its name, so that pipes need no hint; so is
how it is packed (gzip, bzip2, xz, zstd). The runs that ``retrain_scores`` keeps are read, too.
Parquet, Feather and zstd are read by pyarrow, Excel by pandas. Nothing is unpickled. A table is its
columns by name, in their order; numbers are float64, an empty cell is NaN, and a column that holds
anything but numbers stays as text. Blanks at the ends of names and cells of CSV are no part of
them, since many write ``a, b``; those of the other formats are. Text that is not UTF-8 is read as
Windows-1252 (Latin-1), or as UTF-16 where it begins so. In CSV between semicolons or tabs, a column
of numbers with commas has decimal commas, unless all of these could be thousands.

A packed file may unpack to :data:`MAX_BYTES` at most, whatever it says of itself; other files take
up to 20 times their size.

Names are written as they are to JSON and Parquet. A spreadsheet would run text in CSV that begins
with ``=``, ``+``, ``-`` or ``@``: an apostrophe goes before it, which is taken off again when the
table is read. A terminal would obey control characters: :func:`printable` spells them out.

Shapes: every column (m,).
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, get_args

import numpy as np

from ksm_ext.atomic_write import check_file, write_whole
from ksm_ext.checks import check_choice, message
from ksm_ext.scores.runs import read_runs
from ksm_ext.tables import Format

Columns = dict[str, np.ndarray]
"""Columns (m,) by name: float64, or text."""


class UnfinishedTableError(ValueError):
    """A table that is empty, breaks off or has too few rows: one that is still being written."""


MAX_BYTES = 2**31
"""What an NPZ or Parquet file, or lists of task numbers, may unpack to: 2 GiB."""

_EMPTY = ("", "na", "nan", "none", "null")
_DELIMITERS = ",;\t"
_FORMULA = re.compile("'*[=+\\-@\t\r]")  # what a spreadsheet runs, apostrophes before it or not
_FOREIGN = {
    b"\x80": "a pickle",
    b"\x89HDF": "HDF5",
    b"\xd0\xcf\x11\xe0": "a spreadsheet (.xls)",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program",
}
_PACKED: dict[bytes, Callable[[BinaryIO], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\0": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda file: _pyarrow("zstd").CompressedInputStream(file, "zstd"),
}
_DECIMAL = re.compile(r"[-+]?\d*(,\d+)?([eE][-+]?\d+)?")
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+")
# What NumPy and zipfile raise at members that are cut short, encrypted, packed in other ways, or
# whose headers are no headers.
_NO_ARRAY = (
    *(ValueError, TypeError, LookupError, ArithmeticError, EOFError, OSError, SyntaxError),
    *(RuntimeError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


def read_document(source: str | Path, members: Collection[str] = ()) -> Columns | list[Any]:
    """Read whatever a file or standard input (``"-"``) holds.

    Args:
        source: CSV with a header row (comma, semicolon or tab), JSON (records, lists by name, or
            any ``orient`` of pandas but ``"values"``), JSON lines, NPZ, a single array (NPY),
            Parquet, Feather or Excel; packed or not.
        members: Names of arrays: where an NPZ has any of them, the others are not unpacked.

    Returns:
        Arrays by name: of a table (CSV, Parquet, JSON records) its columns (m,); of NPZ and of a
        JSON object its arrays, whatever their dimensions. A JSON list that holds no records is
        returned as it is, and so are the rows of a single array.

    Raises:
        FileNotFoundError: If there is no such file.
        OSError: If it cannot be read.
        ValueError: If it is none of these, empty, unpacks to more than :data:`MAX_BYTES`, or its
            rows differ in length.
        RuntimeError: If ``pyarrow`` or ``pandas`` is needed and not installed.
    """
    name = source_name(source)
    try:
        with _open(source) as file:
            return _read_open(_unpacked(file, name), name, members)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        text = message(name, "readable", str(error.strerror), "Mind its permissions.")
        raise OSError(error.errno, text) from error


def _read_open(file: BinaryIO, name: str, members: Collection[str]) -> Columns | list[Any]:
    start = file.read(8)
    file.seek(0)
    if start.startswith(b"PAR1"):
        return _read_parquet(file, name)
    if start.startswith(b"ARROW1"):
        return _read_feather(file, name)
    if start.startswith(b"PK\x03\x04"):
        return _read_zip(file, name, members)
    if start.startswith(b"\x93NUMPY"):
        return _read_single_array(file, name)
    if start.startswith(b"SQLite f"):
        try:
            masks, scores = read_runs(file.read(), name)
        except ValueError as error:
            foreign = "no such table" in str(error)
            raise (ValueError if foreign else UnfinishedTableError)(str(error)) from error
        return {"masks": masks, "scores": scores}
    content = file.read()
    for magic, kind in _FOREIGN.items():
        if content.startswith(magic):
            raise _unreadable(name, kind)
    if content[7:9] == b"\0{":  # behind the length of its header
        raise _unreadable(name, "safetensors, as ksm fit saves surrogates")
    text = _decoded(content, name)
    if not text.strip():
        raise _unreadable(name, "nothing in it", UnfinishedTableError)
    if text.lstrip()[0] in "[{":
        return _read_json(text, name)
    return _read_csv(text, name)


def read_json(path: str | Path) -> Any:
    """The document of a JSON file as it is.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not JSON.
    """
    with _open(path) as file:
        text = _decoded(_unpacked(file, str(path)).read(), str(path))
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(str(path), f"JSON that ends or breaks off at {error}") from error


def what_it_is(path: str | Path) -> str:
    """What a file is in words, such as ``"a table"``; empty for safetensors and what is unknown.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    with _open(path) as file:
        start = file.read(64)
    foreign = (kind for magic, kind in _FOREIGN.items() if start.startswith(magic))
    if start[7:9] == b"\0{":  # behind the length of its header
        return ""
    if not start.strip():
        return "an empty file"
    if start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        return "an HTML page"
    if kind := next(foreign, ""):
        return kind
    try:
        read_document(path)
    except UnfinishedTableError:
        return "a table that breaks off"
    except (ValueError, RuntimeError):
        return ""
    return "a table"


def source_name(source: str | Path) -> str:
    """How messages call a file or standard input."""
    return "standard input" if str(source) == "-" else str(source)


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
        check_choice("the ending of the output", form, get_args(Format), remedy)
    if form == "parquet":
        content = _parquet_bytes(columns)
        if target == "-":
            sys.stdout.buffer.write(content)
            return
    else:
        text = _csv_text(columns) if form == "csv" else _json_text(columns)
        if target == "-":
            sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
            return
        content = text.encode()
    write_whole(Path(target), content)


def is_text(column: np.ndarray) -> bool:
    """Whether a column holds anything but numbers."""
    return column.dtype.kind not in "biuf"


def printable(text: str) -> str:
    """Text for a terminal, with every character that it would obey spelled as an escape."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


# -- reading ------------------------------------------------------------------------------------


def _open(source: str | Path) -> BinaryIO:
    if str(source) == "-":
        return io.BytesIO(sys.stdin.buffer.read())
    check_file("path", source, 'Check the path; "-" is standard input.')
    return Path(source).open("rb")


def _unpacked(file: BinaryIO, name: str) -> BinaryIO:
    """The file, or what a packed one holds, at most :data:`MAX_BYTES`."""
    start = file.read(8)
    file.seek(0)
    for magic, opened in _PACKED.items():
        if start.startswith(magic):
            try:
                content = opened(file).read(MAX_BYTES + 1)
            except (*_NO_ARRAY, lzma.LZMAError) as error:
                found = f"packed with {error or type(error).__name__}"
                raise _unreadable(name, found, UnfinishedTableError) from error
            _check_size(name, len(content))
            return io.BytesIO(content)
    return file


def _decoded(content: bytes, name: str) -> str:
    """Text in UTF-8 or, where it is none, UTF-16 with its mark, or Windows-1252."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encodings: tuple[str, ...] = ("utf-16",)
    elif b"\0" in content:
        encodings = ("utf-8-sig",)  # no text in any encoding of eight bits
    else:
        encodings = ("utf-8-sig", "cp1252", "latin-1")
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            failure = error
    raise _unreadable(name, f"no text in {encodings[0]}") from failure


def _unreadable(name: str, found: str, kind: type[ValueError] = ValueError) -> ValueError:
    remedy = "Export the table again as one of these."
    expected = "CSV with a header row, JSON, NPZ, Parquet, Feather or Excel"
    return kind(message(name, expected, found, remedy))


def _check_size(name: str, size: int) -> None:
    if size > MAX_BYTES:
        remedy = "Leave out what is not needed."
        raise ValueError(message(name, f"at most {MAX_BYTES:,} bytes", f"{size:,}", remedy))


def _check_header(header: Sequence[str], name: str) -> None:
    seen: set[str] = set()
    for cell in header:
        if cell in seen:
            remedy = "Give the table a header row of different names."
            raise ValueError(message(f"the header of {name}", "all different", repr(cell), remedy))
        seen.add(cell)


def _read_csv(text: str, name: str) -> Columns:
    lines = io.StringIO(text, newline="")  # rows end with \n, \r\n or, on old Macs, \r
    first = lines.readline()
    delimiter = max(_DELIMITERS, key=first.count)
    lines.seek(0)
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        rows = [row for row in reader if row]
    except csv.Error as error:
        remedy = "Shorten or quote the cells of that line, or export the table as JSON."
        found = f"{error} in line {reader.line_num}"
        raise ValueError(message(name, "CSV that can be parsed", found, remedy)) from error
    header = [_unquoted(cell.strip()) for cell in rows.pop(0)]
    _check_header(header, name)
    for number, row in enumerate(rows, start=2):
        if len(row) != len(header):
            remedy = "Fill or quote the cells of that row."
            expected = f"{len(header)} cells wide like its header"
            kind = UnfinishedTableError if number == len(rows) + 1 else ValueError
            raise kind(message(name, expected, f"{len(row)} in row {number}", remedy))
    cells = zip(*rows, strict=True) if rows else [()] * len(header)
    commas = delimiter != ","
    return {key: _numbers(column, commas) for key, column in zip(header, cells, strict=True)}


def _numbers(cells: Sequence[str], commas: bool) -> np.ndarray:
    """Text as float64 where every cell is a number or empty; ``commas`` may be decimal ones."""
    stripped = [cell.strip() for cell in cells]
    numerals = ["nan" if cell.lower() in _EMPTY else cell for cell in stripped]
    if commas and _have_decimal_commas(numerals):
        numerals = [cell.replace(",", ".") for cell in numerals]
    if not any("_" in cell for cell in numerals) and not _are_bits(stripped):  # 1_2 is 12 to Python
        try:
            return np.array(numerals, dtype=np.float64)
        except ValueError:
            pass
    return _objects([_unquoted(cell) for cell in stripped])


def _have_decimal_commas(cells: Sequence[str]) -> bool:
    """Whether all cells are numbers, some with a comma that cannot be one of thousands."""
    given = [cell for cell in cells if cell != "nan"]
    with_comma = [cell for cell in given if "," in cell]
    decimal = any(not _THOUSANDS.fullmatch(cell) for cell in with_comma)
    return decimal and all(_DECIMAL.fullmatch(cell) for cell in given)


def _are_bits(cells: Sequence[str]) -> bool:
    """Whether cells are strings of bits, of which one begins with a 0 that a number would lose."""
    leading = any(len(cell) > 1 and cell.startswith("0") for cell in cells)
    return leading and all(re.fullmatch("[01]+", cell) for cell in cells)


def _objects(values: Sequence[Any]) -> np.ndarray:
    """(m,) objects, since an array of text is as wide everywhere as its longest cell."""
    objects = np.empty(len(values), dtype=object)
    objects[:] = values
    return objects


def _read_json(text: str, name: str) -> Columns | list[Any]:
    try:
        document = _parsed_json(text)
    except (ValueError, RecursionError) as error:
        found = f"JSON that ends or breaks off at {error}"
        raise _unreadable(name, found, UnfinishedTableError) from error
    if isinstance(document, dict):
        if {"columns", "data"} <= document.keys() <= {"columns", "index", "data"}:
            header, rows = document["columns"], document["data"]
            return _json_records(_split_rows(header, rows, name), name)
        if {"schema", "data"} == document.keys():  # pandas' "table"
            return _json_records(list(document["data"]), name)
        if document.get("data_type") == "game" and isinstance(document.get("data"), dict):
            return _saved_game(document, name)
        kinds = {type(value) for value in document.values()}
        if list in kinds:
            return {key: _array(value) for key, value in document.items()}
        if kinds == {dict}:
            return _json_records(_of_objects(document, name), name)
        if dict in kinds:
            raise _no_records(f"what {name} holds", "objects by name")
        document = [document]  # one line of JSON lines
    if not any(isinstance(row, dict) for row in document):
        return list(document)
    return _json_records(document, name)


def _parsed_json(text: str) -> Any:
    """One document, or the list of those that stand on a line each."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        lines = text.splitlines()
        if not text.lstrip().startswith("{") or len(lines) < 2:
            raise
        try:
            return [json.loads(line) for line in lines if line.strip()]
        except json.JSONDecodeError:
            pass  # what is wrong with the whole says more
        raise


def _saved_game(document: dict[str, Any], name: str) -> Columns:
    """A game that shapiq saved: values by the numbers of players, between commas."""
    try:
        n = int(document["metadata"]["n_players"])
        keys = ("" if key == "Empty" else key for key in document["data"])
        members = [[int(player) for player in key.split(",") if key] for key in keys]
        coalitions = np.zeros((len(members), n))
        for row, players in zip(coalitions, members, strict=True):
            row[players] = 1
        values = np.array([*document["data"].values()], dtype=np.float64)
    except (KeyError, TypeError, ValueError, IndexError, MemoryError) as error:
        raise _unreadable(name, f"a game of shapiq with {error!r}") from error
    found = {"coalitions": coalitions, "values": values}
    if players := document["metadata"].get("player_names"):
        found["task_names"] = _objects(players)
    return found


def _of_objects(document: dict[str, dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Records of pandas' ``orient="columns"`` (by column and row) or ``"index"`` (by row).

    Rows of the first are numbered, or are the same labels in every column.
    """
    labels = {tuple(cells) for cells in document.values()}
    if len(labels) > 1:
        raise _no_records(f"what {name} holds", "objects of different names")
    rows, names = list(document), list(labels.pop())
    numbered = all(label.isdigit() for label in rows)
    if all(label.isdigit() for label in names) and not numbered:
        rows, names = names, rows
        return [{key: document[key][row] for key in names} for row in rows]
    if not numbered:
        raise _no_records(f"what {name} holds", "objects by name of objects by name")
    return [document[row] for row in rows]


def _no_records(what: str, found: str) -> ValueError:
    remedy = 'Export it again as records (pandas: `table.to_json(path, orient="records")`).'
    return ValueError(message(what, "records, or lists by name", found, remedy))


def _split_rows(header: Any, rows: Any, name: str) -> list[dict[str, Any]]:
    fits = isinstance(header, list) and isinstance(rows, list)
    if not fits or not all(isinstance(row, list) and len(row) == len(header) for row in rows):
        raise _no_records(f"the data of {name}", "rows that do not fit its columns")
    names = [str(cell) for cell in header]
    _check_header(names, name)
    return [dict(zip(names, row, strict=True)) for row in rows]


def _json_records(document: list[Any], name: str) -> Columns:
    keys = next(list(row) for row in document if isinstance(row, dict)) if document else []
    for number, row in enumerate(document):
        if not isinstance(row, dict) or row.keys() != set(keys):
            remedy = "Give every record the same names."
            expected = f"records of {', '.join(map(repr, keys[:8]))}"
            found = f"{str(row)[:60]} as record {number}"
            raise ValueError(message(name, expected, found, remedy))
    return {key: _array([row[key] for row in document]) for key in keys}


def _array(values: Any) -> np.ndarray:
    """A JSON value as numbers or text; lists of different lengths stay lists in (m,) objects."""
    if not isinstance(values, list):
        return np.asarray(values, dtype=object)
    try:
        if all(cell is None or isinstance(cell, (int, float)) for cell in values):
            filled = [math.nan if cell is None else cell for cell in values]
            return np.array(filled, dtype=np.float64)
        rows = [row for row in values if isinstance(row, list)]
        if len(rows) == len(values) and len(set(map(len, rows))) == 1:
            kinds = {type(cell) for row in rows for cell in row}
            array = np.asarray(rows) if kinds <= {bool, int, float} else np.empty(0, object)
            return _objects(values) if is_text(array) else array
    except (ValueError, OverflowError):
        pass  # lists of lists that differ, and integers that no float64 is near to
    return _objects(values)


def _read_zip(file: BinaryIO, name: str, members: Collection[str]) -> Columns:
    """NPZ or Excel, which are both zip archives."""
    try:
        with zipfile.ZipFile(file) as archive:
            excel = "xl/workbook.xml" in archive.namelist()
            size = sum(info.file_size for info in archive.infolist())
    except _NO_ARRAY as error:
        found = f"a damaged zip archive ({error or type(error).__name__})"
        raise _unreadable(name, found, UnfinishedTableError) from error
    file.seek(0)
    if not excel:
        return _read_npz(file, name, members)
    _check_size(name, size)
    try:
        import pandas

        frame = pandas.read_excel(file)
    except ImportError as error:
        remedy = 'pip install "ksm_ext[tables]", or save it as CSV.'
        expected = "readable through pandas and openpyxl"
        found = f"no {error.name or 'openpyxl'}"
        raise RuntimeError(message("Excel", expected, found, remedy)) from error
    except (*_NO_ARRAY, AttributeError) as error:
        raise _unreadable(name, f"Excel with {error}") from error
    header = [str(label).strip() for label in frame.columns]
    _check_header(header, name)
    cells = (frame.iloc[:, j].tolist() for j in range(len(header)))
    return {key: _from_sheet(column) for key, column in zip(header, cells, strict=True)}


def _from_sheet(cells: list[Any]) -> np.ndarray:
    """A column of a sheet: numbers, or text in which an empty cell is empty."""
    if all(isinstance(cell, (int, float)) for cell in cells):
        return np.array(cells, dtype=np.float64)
    return _numbers(["" if cell != cell or cell is None else str(cell) for cell in cells], False)


def _read_single_array(file: BinaryIO, name: str) -> list[Any]:
    """The rows of an array that stands alone (.npy)."""
    try:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        array = _array_of(file, size, name)
    except _NO_ARRAY as error:
        found = f"an array (.npy) with {error or type(error).__name__}"
        raise _unreadable(name, found, UnfinishedTableError) from error
    if array.ndim not in (1, 2):
        raise _unreadable(name, f"an array (.npy) of {array.ndim} dimensions")
    return list(array)


def _read_npz(file: BinaryIO, name: str, members: Collection[str]) -> Columns:
    try:
        with zipfile.ZipFile(file) as archive:
            found = {
                info.filename.removesuffix(".npy"): info
                for info in archive.infolist()
                if info.filename.endswith(".npy")
            }
            wanted = [key for key in found if key in members] or list(found)
            size = sum(found[key].file_size for key in wanted)
            if size <= MAX_BYTES:
                columns = {key: _read_npy(archive, found[key]) for key in wanted}
    except _NO_ARRAY as error:
        raise _unreadable(name, f"NPZ with {error or type(error).__name__}") from error
    if not found:
        raise _unreadable(name, "a zip archive without arrays, such as .pt is")
    _check_size(name, size)
    return columns


def _read_npy(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(info) as member:
        return _array_of(member, info.file_size, info.filename)


def _array_of(member: Any, size: int, name: str) -> np.ndarray:
    """An array of which a file holds as many bytes as its header says."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(member)
    shape, by_columns, dtype = readers[version](member)
    if dtype.hasobject:
        raise zipfile.BadZipFile("Object arrays cannot be loaded")
    left = size - member.tell()
    counts = all(type(side) is int and side >= 0 for side in shape)
    if not counts or math.prod(shape) * dtype.itemsize != left:
        raise zipfile.BadZipFile(f"{left:,} bytes for shape {shape} in {name}")
    array = np.frombuffer(member.read(), dtype)
    return array.reshape(shape, order="F" if by_columns else "C")


def _pyarrow(kind: str = "Parquet") -> Any:
    try:
        import pyarrow.feather
        import pyarrow.parquet
    except ImportError as error:
        found = "pyarrow is not installed"
        remedy = 'pip install "ksm_ext[tables]", or use CSV.'
        raise RuntimeError(message(kind, "readable through pyarrow", found, remedy)) from error
    return pyarrow


def _read_parquet(file: BinaryIO, name: str) -> Columns:
    pyarrow = _pyarrow()
    unreadable = (pyarrow.ArrowException, OSError, ValueError, OverflowError)
    try:
        parquet = pyarrow.parquet.ParquetFile(file)
        facts, schema = parquet.metadata, parquet.schema_arrow
    except unreadable as error:
        raise _unreadable(name, f"Parquet with {error}", UnfinishedTableError) from error
    packed = sum(facts.row_group(i).total_byte_size for i in range(facts.num_row_groups))
    _check_size(name, max(packed, 8 * facts.num_rows * facts.num_columns))
    _check_header(schema.names, name)
    kinds = pyarrow.types
    text = [f.name for f in schema if kinds.is_string(f.type) or kinds.is_large_string(f.type)]
    try:  # text by its distinct values, of which a small file may repeat a large one
        table = pyarrow.parquet.read_table(file, read_dictionary=text)
        return {
            key: _from_arrow(table.column(key))
            for key in table.column_names
            if not key.startswith("__index_level_")  # pandas' row numbers
        }
    except unreadable as error:
        raise _unreadable(name, f"Parquet with {error}", UnfinishedTableError) from error


def _read_feather(file: BinaryIO, name: str) -> Columns:
    pyarrow = _pyarrow("Feather")
    try:
        table = pyarrow.feather.read_table(file)
        _check_size(name, table.nbytes)
        _check_header(table.column_names, name)
        return {key: _from_arrow(table.column(key)) for key in table.column_names}
    except (pyarrow.ArrowException, OSError, OverflowError) as error:
        raise _unreadable(name, f"Feather with {error}", UnfinishedTableError) from error


def _from_arrow(column: Any) -> np.ndarray:
    """A column as float64, NaN for null, or as text."""
    pyarrow = _pyarrow()
    kind, kinds = column.type, pyarrow.types
    if kinds.is_dictionary(kind):
        if kinds.is_string(kind.value_type) or kinds.is_large_string(kind.value_type):
            whole = column.unify_dictionaries().combine_chunks()
            values = _objects([*whole.dictionary.to_pylist(), ""])
            return values[whole.indices.fill_null(len(values) - 1).to_numpy()]
        column, kind = column.cast(kind.value_type), kind.value_type
    numbers = (kinds.is_integer, kinds.is_floating, kinds.is_decimal, kinds.is_boolean)
    if any(holds(kind) for holds in (*numbers, kinds.is_null)):
        return np.asarray(column.cast(pyarrow.float64(), safe=False).to_numpy())
    return _objects([c if isinstance(c, list) else str(c) for c in column.to_pylist()])


# -- writing ------------------------------------------------------------------------------------


def _plain(cell: Any) -> Any:
    """A cell as Python's own number or text; None for NaN."""
    value = cell.item() if isinstance(cell, np.generic) else cell
    return None if isinstance(value, float) and math.isnan(value) else value


def _quoted(cell: Any) -> Any:
    """A cell that no spreadsheet runs."""
    return f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell


def _unquoted(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def _csv_text(columns: Mapping[str, Sequence[Any]]) -> str:
    lines: list[str] = []
    # A cell with a character of the line's end is put into quotes: \r has to be one.
    writer = csv.writer(SimpleNamespace(write=lines.append), lineterminator="\r\n")
    writer.writerow(map(_quoted, columns))
    rows = zip(*columns.values(), strict=True)
    writer.writerows([_quoted(_plain(cell)) for cell in row] for row in rows)
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


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
