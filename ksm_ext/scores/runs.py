"""Finished training runs on disk: an SQLite file that a kill, a crash or a full disk leaves whole.

Two tables that any SQLite tool reads, once they are closed: ``metadata`` (name, value) and ``runs``
with a row for each subset ("0110": tasks 1 and 2 of 4) and seed. Its scores are little-endian
float64, and its checksum is of subset, seed and scores. A kill may leave a file ``-journal`` beside
it, which belongs to it until the next opening.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from datetime import datetime, timezone
from os import PathLike
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any

import numpy as np

from ksm_ext.atomic_write import checked_path
from ksm_ext.checks import listed, message
from ksm_ext.identity import differences

FORMAT = "ksm_ext.runs.2"
OLD_FORMAT = "ksm_ext.runs.1"  # without checksums, and without a word of the function

_TABLES = """
    CREATE TABLE metadata (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE runs (
        subset TEXT, seed INTEGER, scores BLOB NOT NULL, finished TEXT NOT NULL,
        seconds REAL NOT NULL, checksum BLOB NOT NULL, PRIMARY KEY (subset, seed)
    ) WITHOUT ROWID;
"""
# What SQLite calls an operation that failed, and is a file of other columns or of broken text.
_DAMAGE = ("no such", "has no column", "UTF-8", "may not be modified")


class RunStore:
    """The runs of one training function, opened by one process at a time.

    Attributes:
        path: The file; ``":memory:"`` keeps nothing.
        num_targets: Scores of each run, t; ``None`` until they are known.
        changed: Where the function is another than that of earlier runs, which were kept.
    """

    def __init__(
        self,
        path: str | PathLike[str] | None,
        num_tasks: int,
        num_targets: int | None = None,
        settings: Mapping[str, Any] | None = None,
        identity: Mapping[str, Any] | None = None,
        keep_changed: bool = False,
    ) -> None:
        """Open ``path``, or create it.

        Args:
            path: The file, or ``None`` to keep the runs in memory.
            num_tasks: Length of the subsets, n.
            num_targets: Scores of each run, t, if that is known before the first.
            settings: What the scores depend on beside subset and seed, as JSON has it.
            identity: What the function is, see :func:`ksm_ext.identity.identify`; None to read
                whatever there is.
            keep_changed: Keep the runs of another function as if they were of this one.

        Raises:
            TypeError: If ``settings`` cannot be written as JSON.
            ValueError: If the file is something else, or holds runs of other tasks, targets,
                settings or of another function.
            OSError: If it cannot be written, or another process has it open.
        """
        self.path = ":memory:" if path is None else str(checked_path("store", path))
        if path is not None and self.path == ":memory:":
            remedy = "Pass the name of a file, or None to keep nothing on disk."
            raise ValueError(message("store", "a file", repr(self.path), remedy))
        facts = {"num_tasks": num_tasks, "settings": _as_json(settings or {})}
        own = {} if identity is None else {"identity": json.loads(json.dumps(identity))}
        self.changed: tuple[str, ...] = ()
        with ExitStack() as undo, self._explained():
            self._db = sqlite3.connect(self.path, timeout=0)
            undo.callback(self._db.close)
            # The lock lasts until the file is closed, by whatever end of this process.
            self._db.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._db.execute("PRAGMA synchronous = EXTRA")  # commits survive a power cut
            self._db.execute("BEGIN EXCLUSIVE")
            names = "SELECT name FROM sqlite_master WHERE type = 'table'"
            tables = {name for (name,) in self._db.execute(names)}
            if not tables:
                self._create(facts | own)
            elif not tables >= {"metadata", "runs"}:
                raise sqlite3.DatabaseError("it has other tables")
            found = dict(self._db.execute("SELECT name, value FROM metadata"))
            self._db.commit()
            known = _facts(found)
            self.num_targets: int | None = known.setdefault("num_targets", num_targets)
            earlier = known.pop("identity", None)
            self._check({**facts, "num_targets": num_targets or self.num_targets}, known)
            if own:
                self._check_identity(own["identity"], earlier, keep_changed)
            undo.pop_all()

    def load(
        self, subsets: Collection[str], seeds: Collection[int]
    ) -> dict[tuple[str, int], np.ndarray]:
        """Scores (t,) of the finished runs among ``subsets`` and ``seeds``."""
        wanted = set(subsets)
        with self._explained():
            rows = self._db.execute("SELECT subset, seed, scores, checksum FROM runs")
            runs = {row[:2]: self._scores(*row) for row in rows}  # damage anywhere is damage
        return {run: scores for run, scores in runs.items() if run[0] in wanted and run[1] in seeds}

    def add(self, subset: str, seed: int, scores: np.ndarray, seconds: float) -> None:
        """Keep the scores (t,) of a run that took ``seconds``; it is on the disk when this returns.

        Raises:
            OSError: If it cannot be written; the runs that were kept stay.
        """
        content = scores.astype("<f8").tobytes()
        row = (subset, seed, content, _now(), seconds, _checksum(subset, seed, content))
        with self._explained(), self._db:
            targets = ("num_targets", json.dumps(len(scores)))
            self._db.execute("INSERT OR IGNORE INTO metadata VALUES (?, ?)", targets)
            self._db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", row)
        self.num_targets = len(scores)

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._db.close()

    def _scores(self, subset: str, seed: int, content: object, checksum: object) -> np.ndarray:
        if (
            not isinstance(content, bytes)
            or len(content) != 8 * (self.num_targets or 0)
            or checksum != _checksum(subset, seed, content)
        ):
            raise sqlite3.DatabaseError(f"subset {subset} with seed {seed} has damaged scores")
        return np.frombuffer(content, "<f8")

    def _create(self, facts: Mapping[str, Any]) -> None:
        for statement in _TABLES.split(";"):  # executescript would commit, and give up the lock
            self._db.execute(statement)
        rows = [(name, json.dumps(value, sort_keys=True)) for name, value in facts.items()]
        self._db.executemany("INSERT INTO metadata VALUES (?, ?)", [("format", FORMAT), *rows])

    def _check(self, wanted: dict[str, Any], found: dict[str, Any]) -> None:
        """Refuse runs of other tasks, targets or settings, and say which."""
        other = [
            f"{name} = {have.get(name)} (now {want.get(name)})"
            for want, have in ((wanted, found), (wanted.pop("settings"), found.pop("settings")))
            for name in want | have
            if want.get(name) != have.get(name)
        ]
        if other:
            expected = "a new file or one of the same tasks, targets and settings"
            remedy = "Choose another path, or delete the file to start over."
            text = f"{self.path} with {', '.join(other)}"
            raise ValueError(message("store", expected, text, remedy))

    def _check_identity(self, wanted: Any, found: Any, keep_changed: bool) -> None:
        """Refuse runs of another function, or take them over."""
        other = differences(wanted, found)
        if not other:
            return
        self.changed = tuple(name for name, *_ in other if name)
        if not keep_changed:
            text = "a function that the file does not tell"
            if self.changed:
                text = f"another in {listed(self.changed, 4)}"
            remedy = (
                "Choose another path, or delete the file to start over. If this `train` gives the "
                "same scores, pass on_change='keep'."
            )
            expected = "a new file or one with runs of this `train`"
            raise ValueError(message("store", expected, f"{self.path}, of {text}", remedy))
        with self._db:
            self._upgrade()
            row = ("identity", json.dumps(wanted))
            self._db.execute("INSERT OR REPLACE INTO metadata VALUES (?, ?)", row)

    def _upgrade(self) -> None:
        """Give the rows of an old file their checksums."""
        if "checksum" in {row[1] for row in self._db.execute("PRAGMA table_info(runs)")}:
            return
        self._db.execute("ALTER TABLE runs ADD COLUMN checksum BLOB")
        for row in self._db.execute("SELECT subset, seed, scores FROM runs").fetchall():
            if isinstance(row[2], bytes):  # others are found to be damaged
                change = "UPDATE runs SET checksum = ? WHERE subset = ? AND seed = ?"
                self._db.execute(change, (_checksum(*row), *row[:2]))
        self._db.execute("UPDATE metadata SET value = ? WHERE name = 'format'", (FORMAT,))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Raise what SQLite reports as errors that say what to do."""
        try:
            yield
        except sqlite3.OperationalError as error:
            if any(said in str(error) for said in _DAMAGE):
                raise ValueError(self._no_store(error)) from error
            expected = "writable"
            remedy = "Make room or choose another path, and call again: finished runs are kept."
            if "locked" in str(error):  # error codes come with Python 3.11
                expected = "open in one process at a time"
                remedy = "Wait for the other process to end, or choose another path."
            found = f"{self.path} ({error})"
            raise OSError(message("store", expected, found, remedy)) from error
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # or of what it reports
            raise ValueError(self._no_store(error)) from error

    def _no_store(self, error: Exception) -> str:
        remedy = "Choose another path, or delete the file to start over."
        return message("store", "a store of runs", f"{self.path} ({error})", remedy)


def read_runs(content: bytes, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The finished runs of a store, while a process may be adding to it.

    Args:
        content: The bytes of its file, in whatever state they were copied.
        name: What messages call it.

    Returns:
        Masks (m, n) bool and scores (m, t), a row for each run.

    Raises:
        ValueError: If it is no store, or was copied between two states of it.
        OSError: If it cannot be copied to be opened.
    """
    with TemporaryDirectory() as folder:
        path = os.path.join(folder, "runs")
        with open(path, "wb") as file:
            file.write(content)
        try:
            with closing(sqlite3.connect(path)) as database:
                facts = _facts(dict(database.execute("SELECT name, value FROM metadata")))
                rows = database.execute(
                    "SELECT subset, seed, scores, checksum FROM runs"
                ).fetchall()
            scores = [np.frombuffer(row[2], "<f8") for row in rows]
            whole = all(row[3] == _checksum(*row[:3]) for row in rows)
            if not whole or len({len(row) for row in scores}) > 1:
                raise sqlite3.DatabaseError("a run has damaged scores")
        except (sqlite3.Error, TypeError, ValueError) as error:
            remedy = "Name what retrain_scores keeps; if it is being written, read it again."
            raise ValueError(message(name, "a store of runs", str(error), remedy)) from error
    if not rows:
        remedy = "Read it again when the first run has ended."
        raise ValueError(message(name, "a store of finished runs", "none", remedy))
    n = facts["num_tasks"]
    masks = np.array([[bit == "1" for bit in row[0]] for row in rows], dtype=bool).reshape(-1, n)
    return masks, np.array(scores).reshape(len(rows), -1)


def _facts(metadata: Mapping[Any, Any]) -> dict[str, Any]:
    """What the table ``metadata`` says, with ``num_targets`` or without.

    Raises:
        sqlite3.DatabaseError: If it says something else.
    """
    if metadata.get("format") not in (FORMAT, OLD_FORMAT):
        raise sqlite3.DatabaseError(f"its format is {metadata.get('format')!r}")
    try:
        facts = {name: json.loads(metadata[name]) for name in metadata.keys() - {"format"}}
    except (ValueError, TypeError, RecursionError) as error:
        raise sqlite3.DatabaseError(f"its metadata is damaged: {error}") from error
    counts = [facts.get("num_tasks"), facts.get("num_targets", 1)]
    if any(type(count) is not int for count in counts) or type(facts.get("settings")) is not dict:
        raise sqlite3.DatabaseError("its metadata is damaged")
    return facts


def _checksum(subset: object, seed: object, content: bytes) -> bytes:
    return hashlib.blake2b(f"{subset} {seed} ".encode() + content, digest_size=8).digest()


def _as_json(settings: Mapping[str, Any]) -> Any:
    """``settings`` as they come back from JSON, where tuples are lists and keys are text."""
    try:
        return json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        remedy = "Pass numbers, text, and lists and dicts of these."
        raise TypeError(
            message("settings", "a mapping that JSON can hold", f"{settings!r}", remedy)
        ) from error


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
