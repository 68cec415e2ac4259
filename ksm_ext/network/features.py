"""Features of samples in memory or in a folder on disk, where an interrupted run continues.

A folder holds ``values.npy`` (b,) and ``gradients.npy`` (b, k), ordinary NumPy files;
``meta.json``, what the features are of (:mod:`ksm_ext.identity`); and ``progress.json``, how many
rows are done, and the CRC-32 of their bytes in each file. Rows reach the disk before they are
counted, and the count is replaced in one step, so whenever a run is killed, the counted rows are
whole and the next run continues after them.

Several processes fill one folder together, each its own part of the rows, which it counts in a file
of its own, such as ``progress_0_of_2.json``. What they end with is what one process would write.
"""

import json
import math
import mmap
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from ksm_ext.atomic_write import checked_path, write_whole
from ksm_ext.checks import brief, message
from ksm_ext.identity import differences

FORMAT = "ksm_ext.features.2"
# The first form has the same arrays, but says too little of what they are of to be continued.
READABLE = (FORMAT, "ksm_ext.features.1")

CHECKED = 2**30  # bytes that are read to compare checksums, unless that is asked for
_SLICE = 2**24  # of them at once

# What NumPy raises at the header of a file that is no array, or not a whole one.
_NO_ARRAY = (
    *(ValueError, TypeError, OverflowError, SyntaxError, TokenError),
    *(EOFError, FileNotFoundError),
)


@dataclass(frozen=True)
class Features:
    """Outputs of a model on b samples, and their gradients: ``h(z) ≈ values + gradients z``.

    Attributes:
        values: (b,) float32 or float64. The output of each sample at the model's parameters.
        gradients: (b, k), same dtype. Its projected gradient φ; k is p without a projection.
        unidentified: What features in a store depend on and could have changed without being
            noticed, such as ``"output.closure.lock (_thread.lock)"``.
        engine: How gradients were taken, see :mod:`.engines`; "" if a former version took them.
    """

    values: Tensor
    gradients: Tensor
    unidentified: tuple[str, ...] = ()
    engine: str = ""

    __repr__ = brief

    def __len__(self) -> int:
        return len(self.values)


def load_features(path: Any, *, check: bool | None = None) -> Features:
    """Open a folder of features that is complete.

    The tensors are mapped, not read: rows come from disk when they are used, so that a table may
    be larger than memory. Writing to the tensors changes this process's copy and never the files.

    Args:
        path: The folder, as given to ``store`` of :func:`.gradients.collect_features`.
        check: Whether to read all rows once and compare their checksums with those of what was
            written: 0.3 s for a gigabyte in memory. None: up to 1 GiB. Folders of former versions
            have no checksums.

    Raises:
        FileNotFoundError: If there is no such folder, or no features in it.
        ValueError: If the features are incomplete or damaged.
    """
    path = checked_path("path", path)
    if not (path / "meta.json").is_file():
        found = f"{path} without meta.json"
        remedy = "Check where the features were collected."
        raise FileNotFoundError(message("path", "a folder of features", found, remedy))
    meta = _read_json(path / "meta.json")
    if meta.get("format") not in READABLE:
        found = f"{path} with format {meta.get('format')!r}"
        remedy = f"This version reads format {FORMAT!r}."
        raise ValueError(message("path", "a folder of features", found, remedy))
    _check_layout(path / "meta.json", meta)
    done = _num_done(path, meta["num_samples"])
    if done < meta["num_samples"]:
        found = f"{path} with {done} of {meta['num_samples']} samples"
        remedy = "Collect the features again with the same arguments: the run goes on from there."
        raise ValueError(message("path", "a complete folder of features", found, remedy))
    tables = {name: _mapped(path / name, *layout) for name, layout in _arrays(meta).items()}
    if check or (check is None and sum(table.nbytes for table in tables.values()) <= CHECKED):
        _check_bytes(path, tables)
    unidentified = meta.get("unidentified", [])
    if not isinstance(unidentified, list):
        raise ValueError(_damaged(path / "meta.json", f"unidentified = {unidentified!r}"))
    engine = str(meta.get("engine", ""))
    values, gradients = tables.values()
    return Features(values, gradients, tuple(map(str, unidentified)), engine)


class FeatureStore:
    """A folder of features being written; made by :meth:`open`.

    Attributes:
        path: The folder.
        rows: The rows that are written here: all b, or a part of them.
        num_done: How many of them are safe on disk; the next ones go behind these.
    """

    def __init__(
        self,
        path: Path,
        meta: Mapping[str, Any],
        rows: range,
        progress: str,
        files: list[tuple[IO[bytes], int]],
    ):
        self.path = path
        self.rows = rows
        done = _Progress.read(path / progress, len(rows)) if files else None
        self.num_done = done.num_done if done else len(rows)
        self._checksums = done.checksums if done else []
        self._progress = progress
        self._arrays = list(_arrays(meta).values())
        self._files = files  # each with the offset of its first row

    @classmethod
    @contextmanager
    def open(
        cls,
        path: Any,
        meta: Mapping[str, Any],
        *,
        part: tuple[int, int] = (0, 1),
        rows: range | None = None,
    ) -> Iterator["FeatureStore"]:
        """Create the folder, or open one of the same ``meta`` to continue it.

        Args:
            path: The folder; its parents are created too.
            meta: What the features are of. ``num_samples``, ``dim`` and ``dtype`` lay out the
                files; everything else, as JSON, only has to be the same in every run.
            part: The number of this writer, and how many write together. The first one creates the
                folder: the others open it afterwards.
            rows: Those of this writer, if there are others.

        Raises:
            ValueError: If the folder holds features of another ``meta``, is damaged, has files of
                the same names that are no features, or was begun by another number of writers.
            RuntimeError: If another process writes to the folder.
            OSError: If the folder cannot be written to.
        """
        path = checked_path("store", path)
        meta = json.loads(json.dumps({"format": FORMAT, **meta}))
        rows = range(meta["num_samples"]) if rows is None else rows
        suffix = "" if part[1] == 1 else f"_{part[0]}_of_{part[1]}"
        progress = f"progress{suffix}.json"
        with ExitStack() as stack:
            writing = _num_done(path) < meta["num_samples"]  # many may read what is complete
            if writing:
                with _stated(path, "Free some space or choose another folder."):
                    if part[0] == 0:
                        path.mkdir(parents=True, exist_ok=True)
                    _check_writers(path, part[1])
                    stack.enter_context(_lock(path, f"lock{suffix}"))
                    for partial in path.glob(".*.partial") if part[0] == 0 else ():
                        partial.unlink()  # of a run killed while writing it
                if not (path / progress).exists():
                    if part[0] == 0:
                        _create(path, meta)
                    _Progress(0, rows.start, [0, 0]).write(path / progress)
                    _flush_names(path)
            _check_same(path, meta, _read_json(path / "meta.json"))
            _num_done(path, meta["num_samples"])  # no more than there are
            files = []
            for name, (shape, dtype) in _arrays(meta).items() if writing else ():
                offset = _first_row(path / name, shape, dtype)
                with _stated(path, "Make the folder's files writable."):
                    file = stack.enter_context((path / name).open("r+b", buffering=0))
                files.append((file, offset))
            yield cls(path, meta, rows, progress, files)

    def read(self, rows: Sequence[int]) -> Features:
        """Some of the rows that are done."""
        values, gradients = (
            _mapped(self.path / name, *layout)[rows]
            for name, layout in zip(("values.npy", "gradients.npy"), self._arrays, strict=True)
        )
        return Features(values, gradients)

    def append(self, *blocks: Tensor) -> None:
        """Write the next rows, and return when they are safe on disk.

        Args:
            *blocks: values (rows,) and gradients (rows, k).

        Raises:
            OSError: If the disk is full. The rows before these are kept.
        """
        remedy = f"Free some space and run again: the first {self.num_done} samples are kept."
        first = self.rows.start + self.num_done
        pieces = []
        with _stated(self.path, remedy):
            for block, (file, offset), (shape, dtype) in zip(
                blocks, self._files, self._arrays, strict=True
            ):
                rows = block.detach().to("cpu", getattr(torch, dtype)).contiguous().numpy()
                if rows.shape[1:] != shape[1:] or first + len(rows) > self.rows.stop:
                    expected = f"the next rows of {shape}"
                    found = f"shape {rows.shape} behind {first} rows"
                    raise ValueError(message("blocks", expected, found, "Append rows in order."))
                stride = rows.itemsize * int(np.prod(shape[1:], dtype=np.int64))
                _write_at(file.fileno(), rows, offset + first * stride)
                os.fsync(file.fileno())
                pieces.append(rows.reshape(-1).view(np.uint8).data)
        checksums = [*map(zlib.crc32, pieces, self._checksums)]
        done = _Progress(self.num_done + len(blocks[0]), self.rows.start, checksums)
        done.write(self.path / self._progress)
        self.num_done, self._checksums = done.num_done, done.checksums


def _arrays(meta: Mapping[str, Any]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each file."""
    b, k, dtype = meta["num_samples"], meta["dim"], meta["dtype"]
    return {"values.npy": ((b,), dtype), "gradients.npy": ((b, k), dtype)}


def _check_layout(path: Path, meta: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` unless what lays out the files can be that of a folder of features."""
    for name in ("num_samples", "dim"):
        if type(meta.get(name)) is not int or not 1 <= meta[name] < 2**63:
            raise ValueError(_damaged(path, f"{name} = {meta.get(name)!r}"))
    if meta.get("dtype") not in ("float32", "float64"):
        raise ValueError(_damaged(path, f"dtype = {meta.get('dtype')!r}"))


def _create(path: Path, meta: Mapping[str, Any]) -> None:
    """Lay out the files; whose progress is written last, and says that they are there."""
    names = _arrays(meta)
    foreign = [name for name in names if (path / name).exists()]
    if foreign and not (path / "meta.json").exists():
        remedy = "Choose another folder; nothing was changed."
        found = f"{path} with a {foreign[0]} of something else"
        raise ValueError(message("store", "a new folder or one of features", found, remedy))
    write_whole(path / "meta.json", json.dumps(meta, indent=2).encode())
    with _stated(path, "Free some space or choose another folder."):
        for name, (shape, dtype) in names.items():
            open_memmap(path / name, mode="w+", dtype=dtype, shape=shape)  # a file of holes
            with (path / name).open("rb") as file:
                os.fsync(file.fileno())


def _flush_names(path: Path) -> None:
    """See to it that the names of a folder's files are on disk, not only what is in them."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _check_writers(path: Path, number: int) -> None:
    """Raise ``ValueError`` if the folder was begun by another number of writers."""
    expected = {f"progress_{part}_of_{number}.json" for part in range(number)}
    expected = {"progress.json"} if number == 1 else expected
    for file in sorted(path.glob("progress*.json")):
        if file.name not in expected:
            found = f"{path} with {file.name}"
            remedy = "Go on with as many processes as before, or choose another folder."
            by = "one process" if number == 1 else f"{number} processes"
            raise ValueError(message("store", f"a folder begun by {by}", found, remedy))


def _check_same(path: Path, meta: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    """Raise ``ValueError`` naming the fields in which the folder's features differ."""
    if other := differences(meta, stored):
        (field, *values), *more = other
        value, kept = (text if len(text) < 100 else f"{text[:90]}…" for text in map(repr, values))
        also = f" (also {', '.join(name for name, *_ in more[:3])}{', …' * (len(more) > 3)})"
        found = f"{field} = {value} where {path} has {kept}{also * bool(more)}"
        remedy = (
            "Run it with the same arguments and data, choose another folder, or delete this one."
        )
        raise ValueError(message("store", "a folder of the same features", found, remedy))


def _first_row(path: Path, shape: tuple[int, ...], dtype: str) -> int:
    """Where the rows begin in a .npy file, once it is known to be the file that was laid out."""
    try:
        array = open_memmap(path, mode="r")
    except _NO_ARRAY as error:
        raise ValueError(_damaged(path, str(error))) from error
    if array.shape != shape or array.dtype != np.dtype(dtype) or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " by columns"
        raise ValueError(_damaged(path, f"{array.dtype} of shape {array.shape}{order}"))
    return int(array.offset)


def _mapped(path: Path, shape: tuple[int, ...], dtype: str) -> Tensor:
    """The array of a .npy file, private to this process and read as it is used."""
    offset = _first_row(path, shape, dtype)
    # Without a reservation, or the system refuses private maps of more than its memory.
    no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    flags, prot = mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE
    with path.open("rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, flags=flags, prot=prot)
    numbers = {"dtype": getattr(torch, dtype), "count": math.prod(shape), "offset": offset}
    return torch.frombuffer(buffer, **numbers).reshape(shape)


def _num_done(path: Path, num_samples: int = 2**63) -> int:
    """The rows that are done, by all who write."""
    num_done = sum(
        _Progress.read(file, num_samples).num_done for file in path.glob("progress*.json")
    )
    if num_done > num_samples:
        raise ValueError(_damaged(path, f"{num_done} of {num_samples} samples"))
    return num_done


class _Progress(NamedTuple):
    """What one writer has done: rows from ``start`` on, with the CRC-32 of both arrays' bytes.

    A former version wrote their number alone: where it began there are no checksums.
    """

    num_done: int
    start: int
    checksums: list[int]

    @classmethod
    def read(cls, path: Path, num_rows: int = 2**63) -> "_Progress":
        facts: dict[str, Any] = {"num_done": None, "start": 0, "checksums": []} | _read_json(path)
        num_done, start, checksums = (facts[name] for name in cls._fields)
        if not _is_count(num_done) or num_done > num_rows:
            raise ValueError(_damaged(path, f"num_done = {num_done!r}"))
        whole = isinstance(checksums, list) and len(checksums) in (0, 2)
        if not whole or not all(map(_is_count, [start, *checksums])):
            raise ValueError(_damaged(path, f"start = {start!r}, checksums = {checksums!r}"))
        return cls(num_done, start, checksums)

    def write(self, path: Path) -> None:
        write_whole(path, json.dumps(self._asdict()).encode())


def _is_count(number: object) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _check_bytes(path: Path, tables: Mapping[str, Tensor]) -> None:
    """Raise ``ValueError`` unless rows have the checksums that they were written with."""
    for file in sorted(path.glob("progress*.json")):
        progress = _Progress.read(file)
        done = slice(progress.start, progress.start + progress.num_done)
        for (name, table), expected in zip(tables.items(), progress.checksums, strict=False):
            rows = table[done].numpy().reshape(-1).view(np.uint8)
            found = 0
            for place in range(0, len(rows), _SLICE):
                found = zlib.crc32(rows[place : place + _SLICE].data, found)
            if found != expected:
                raise ValueError(_damaged(path / name, "other bytes than were written"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise ValueError(_damaged(path, str(error))) from error
    if not isinstance(content, dict):
        raise ValueError(_damaged(path, f"a {type(content).__name__} in it"))
    return content


def _damaged(path: Path, found: str) -> str:
    remedy = "The folder is damaged: delete it and collect the features again."
    return message("store", f"a folder of features with a whole {path.name}", found, remedy)


def _write_at(descriptor: int, rows: np.ndarray, offset: int) -> None:
    """Write all bytes of ``rows``. Not through a map: a full disk would kill the process."""
    content = rows.reshape(-1).view(np.uint8).data
    while content:
        written = os.pwrite(descriptor, content, offset)
        content, offset = content[written:], offset + written


def _lock(path: Path, name: str) -> AbstractContextManager[Any]:
    """A lock of the folder, which ends with the process, however that ends.

    Raises:
        RuntimeError: If another process, or another store of this one, holds it.
    """
    import filelock  # slow to import, and of no use without a store

    try:
        return filelock.FileLock(path / name).acquire(timeout=0)
    except filelock.Timeout as error:
        remedy = "Wait for it to finish, or choose another folder."
        found = f"{path} that another run is writing to"
        raise RuntimeError(message("store", "a folder of its own", found, remedy)) from error


@contextmanager
def _stated(path: Path, remedy: str) -> Iterator[None]:
    """Turn an ``OSError`` into one that names the folder and the remedy."""
    try:
        yield
    except OSError as error:
        text = message("store", "a writable folder", f"{path}: {error.strerror}", remedy)
        raise OSError(error.errno, text) from error
