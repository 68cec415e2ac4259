"""What the commands print and write: words to standard error, tables to a file, pipe or screen.

On a screen, names are spelled by :func:`ksm_ext.tables.files.printable`.
"""

import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ksm_ext.atomic_write import check_place, write_whole
from ksm_ext.checks import check_choice, message
from ksm_ext.surrogates.surrogate import Surrogate, load_surrogate
from ksm_ext.tables.files import printable, source_name, what_it_is, write_columns

STANDARD = "-"
"""Standard input or output, where a file is asked for."""
_PACKED = (".gz", ".bz2", ".xz", ".zst")


def say(text: str, *, quiet: bool = False) -> None:
    """Tell the user, away from the results."""
    if not quiet:
        print(printable(text), file=sys.stderr, flush=True)


def on_a_terminal() -> bool:
    """Whether a progress bar has somewhere to be drawn; in a log, lines have to do."""
    return sys.stderr.isatty()


def check_target(target: str, form: str | None, formats: Sequence[str]) -> None:
    """Raise before any work is done, if ``target`` is a file that could not be written.

    Args:
        target: A file, or ``"-"``.
        form: The format that was asked for; ``None`` goes by the ending.
        formats: Which endings there are; none where it does not matter.
    """
    if target == STANDARD:
        return
    check_place(target)
    if form is None and formats:
        ending = Path(target).suffix.lower().lstrip(".")
        remedy = "Choose another ending, or name the format (`--format`)."
        check_choice("the ending of the output", ending, formats, remedy)


def check_apart(target: str, sources: Sequence[str]) -> None:
    """Raise ``ValueError`` if the file ``target`` is one of ``sources``, by whatever path or link.

    Pipes and devices may be both: a terminal is.
    """
    path = os.path.realpath(target)
    there = [
        source for source in sources if source != STANDARD and os.path.realpath(source) == path
    ]
    if target != STANDARD and there and (Path(path).is_file() or not Path(path).exists()):
        remedy = "Name another file by `--output`; what is read is not replaced."
        raise ValueError(message("output", f"another file than {there[0]}", target, remedy))


def default_target(sources: Sequence[str], ending: str, *, replace: bool) -> str:
    """The file beside the first source with another ending; standard output for standard input.

    Args:
        sources: What is read.
        ending: Such as ``".html"``.
        replace: Whether a file that is there may be replaced.

    Raises:
        ValueError: If it is there and may not, or is one of the sources.
    """
    if sources[0] == STANDARD:
        return STANDARD
    path = Path(sources[0])
    path = path.with_suffix("") if path.suffix.lower() in _PACKED else path
    path = path.with_suffix(ending)
    check_apart(str(path), sources)
    if path.exists() and not replace:
        remedy = "Add `--force` to replace it, or name another by `--output`."
        raise ValueError(message("output", "a new file where none is named", str(path), remedy))
    return str(path)


def show_table(columns: Mapping[str, Sequence[Any]], target: str, form: str | None) -> None:
    """Write a table where it was asked for; on a screen, aligned for reading.

    Args:
        columns: Equally long columns by name.
        target: A file, or ``"-"``.
        form: One of :data:`ksm_ext.tables.Format`, ``"table"`` for an aligned one, or ``None``:
            the file's ending, CSV in a pipe, ``"table"`` on a screen.
    """
    if form == "table" or (form is None and target == STANDARD and sys.stdout.isatty()):
        sys.stdout.write(_aligned(columns))
    else:
        write_columns(columns, target, form)


def read_surrogate(source: str) -> Surrogate:
    """What ``ksm fit`` saved, in a file or standard input."""
    if source != STANDARD:
        return _loaded(Path(source), source)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "standard input"
        path.write_bytes(sys.stdin.buffer.read())
        return _loaded(path, source_name(source))


def _loaded(path: Path, name: str) -> Surrogate:
    """The surrogate in a file; what is none is called by what it is."""
    kind = what_it_is(path) if path.is_file() else ""
    if kind:
        found = f"{name}, {kind}"
        remedy = "`ksm fit` it first." if kind == "a table" else "Name what `ksm fit` saved."
        raise ValueError(message("path", "a saved surrogate", found, remedy))
    return load_surrogate(path)


def write_bytes(content: bytes, target: str) -> None:
    """Write to a file, whole or not at all, or to standard output."""
    if target == STANDARD:
        sys.stdout.buffer.write(content)
    else:
        write_whole(Path(target), content)


def _aligned(columns: Mapping[str, Sequence[Any]]) -> str:
    """Columns padded to one width each: text to the left, numbers to the right."""
    padded = []
    for name, cells in columns.items():
        texts = [printable(text).replace("\n", "\\n") for text in (name, *map(_short, cells))]
        width = max(map(len, texts))
        is_text = any(isinstance(cell, str) for cell in cells)
        padded.append([text.ljust(width) if is_text else text.rjust(width) for text in texts])
    return "".join("  ".join(row).rstrip() + "\n" for row in zip(*padded, strict=True))


def _short(cell: Any) -> str:
    if isinstance(cell, float):
        return "" if cell != cell else f"{cell:.4g}"
    return str(cell)
