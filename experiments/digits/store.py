"""Scores on disk, one line of JSON for each subset, each on the disk before the next is trained.

The first line holds the settings. A line that a kill cut short is dropped when the file is opened
again, so that at most the subsets in flight are trained twice.
"""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from experiments.digits.pipeline import Settings
from ksm_ext.checks import message

FORMAT = "ksm_ext.digits.1"


class ScoreStore:
    """The scores of the subsets that are done, opened for more.

    Attributes:
        path: The file.
        scores: For each subset, a string of "0" and "1", one row of targets for each training.
        num_dropped: Lines that were cut short: 0 or 1.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        """Read ``path``, or create it.

        Raises:
            ValueError: If the file holds scores of other settings, or is damaged before its end.
        """
        self.path = path
        self.scores: dict[str, list[list[float]]] = {}
        self.num_dropped = 0
        header = {"format": FORMAT, "settings": asdict(settings)}
        lines = self._whole_lines() if path.exists() else []
        if lines:
            self._check_header(lines[0], header)
        for number, line in enumerate(lines[1:], start=2):
            try:
                self.scores[line["subset"]] = line["scores"]
            except (KeyError, TypeError) as error:
                raise ValueError(self._damaged(number)) from error
        self._file = path.open("ab")
        if not lines:
            self._append(header)

    def add(self, subset: str, scores: list[list[float]]) -> None:
        """Keep the scores of a subset; they are on the disk when this returns."""
        self._append({"subset": subset, "scores": scores})
        self.scores[subset] = scores

    def __enter__(self) -> "ScoreStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def _append(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _whole_lines(self) -> list[Any]:
        """The lines of the file, which loses its last one if that was cut short."""
        content = self.path.read_bytes()
        records: list[Any] = []
        end = 0
        lines = content.splitlines(keepends=True)
        for number, line in enumerate(lines, start=1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("no end of line")
                records.append(json.loads(line))
            except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
                if number < len(lines):
                    raise ValueError(self._damaged(number)) from error
                self.num_dropped = 1
                break
            end += len(line)
        if end < len(content):
            os.truncate(self.path, end)
        return records

    def _check_header(self, found: Any, expected: dict[str, Any]) -> None:
        if not isinstance(found, dict) or found.get("format") != expected["format"]:
            raise ValueError(self._damaged(1))
        wanted, have = expected["settings"], found.get("settings", {})
        other = [name for name in {**wanted, **have} if wanted.get(name) != have.get(name)]
        if other:
            text = ", ".join(
                f"{name} = {have.get(name)} (now {wanted.get(name)})" for name in other
            )
            raise ValueError(
                message(
                    "output",
                    "a new folder or one of the same settings",
                    f"{self.path.parent} with {text}",
                    "Choose another folder by --output, or delete this one to start over.",
                )
            )

    def _damaged(self, number: int) -> str:
        remedy = "Delete this file to start over."
        return message(
            "output", "a folder of this experiment", f"{self.path}, line {number}", remedy
        )
