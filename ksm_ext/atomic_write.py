"""Files that are whole or not there, whatever happens while they are written."""

import errno
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

from ksm_ext.checks import message


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to disk, then rename it into place.

    Where ``path`` is a symbolic link, the file that it points to is written, and the link stays. A
    pipe or a device is written to as it is.

    Raises:
        OSError: With the path and the cause; nothing is left behind and an old file stays.
    """
    check_place(path)
    target = Path(os.path.realpath(path))
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if target.exists() and not (target.is_file() or target.is_dir()):
            with target.open("wb") as stream:
                stream.write(content)
            return
        if target.is_symlink():  # one that leads back to itself
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(target)
    except OSError as error:
        with suppress(OSError):  # a read-only folder has nothing of ours in it
            partial.unlink(missing_ok=True)
        remedy = "Free some space or choose another path; nothing was changed."
        text = message("path", "writable", f"{path}: {error.strerror}", remedy)
        raise OSError(error.errno, text) from error


def check_file(name: str, path: str | os.PathLike[str], remedy: str) -> None:
    """Raise ``FileNotFoundError`` unless ``path``, which messages call ``name``, is a file."""
    found = str(path)
    if Path(path).is_dir():
        found, remedy = f"the folder {path}", "Name a file in it."
    if not Path(path).is_file():
        raise FileNotFoundError(message(name, "a file", found, remedy))


def check_place(path: str | os.PathLike[str]) -> None:
    """Raise ``FileNotFoundError`` if the folder of ``path`` is not there, whatever would be in it.

    And ``IsADirectoryError`` if ``path`` is a folder. For long work to ask before it begins.
    """
    if Path(path).is_dir():
        text = message("path", "a file", f"the folder {path}", "Name a file in it.")
        raise IsADirectoryError(errno.EISDIR, text)
    folder = Path(os.path.realpath(path)).parent
    if not folder.is_dir():
        remedy = f"Make the folder (`mkdir -p {shlex.quote(str(folder))}`), or choose another path."
        raise FileNotFoundError(message("path", "in a folder that exists", str(path), remedy))


def checked_path(name: str, path: Any) -> Path:
    """``path`` as a path.

    Raises:
        TypeError: If it is none.
        ValueError: If it is empty, which is the current folder to some and no file to others.
    """
    if not isinstance(path, (str, os.PathLike)):
        remedy = "Pass text or a pathlib.Path."
        raise TypeError(message(name, "a path", type(path).__name__, remedy))
    if os.fspath(path) == "":
        remedy = "Pass a name, or None to keep nothing on disk."
        raise ValueError(message(name, "a path", "an empty text", remedy))
    return Path(path)
