"""Files that are whole or not there, whatever happens while they are written."""

import os
from contextlib import suppress
from pathlib import Path

from ksm_ext.checks import message


def write_whole(path: Path, content: bytes) -> None:
    """Write ``content`` beside ``path``, flush it to disk, then rename it into place.

    Raises:
        OSError: With the path and the cause; nothing is left behind and an old file stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):  # a read-only folder has nothing of ours in it
            partial.unlink(missing_ok=True)
        remedy = "Free some space or choose another path; nothing was changed."
        text = message("path", "writable", f"{path}: {error.strerror}", remedy)
        raise OSError(error.errno, text) from error
