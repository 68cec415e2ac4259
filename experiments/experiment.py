"""What every experiment is: settings and what they mean; and a run of it, with its results."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, eq=False)
class Experiment:
    """Settings, and what they mean; travels to the processes that train.

    A store of scores knows by which code they came about, this class and all that it refers to: so
    methods and commands, which scores do not depend on, are no part of it.
    """

    settings: Any


@dataclass(frozen=True)
class Run:
    """An experiment and the folder of its results.

    Attributes:
        experiment: The experiment.
        output: The folder.
        on_change: Whether :func:`ksm_ext.retrain_scores` refuses scores in the folder that came of
            other code (``"raise"``), or takes them over (``"keep"``).
    """

    experiment: Any
    output: Path
    on_change: Literal["raise", "keep"] = "raise"

    @property
    def settings(self) -> Any:
        return self.experiment.settings


Command = Callable[[Run], Any]
"""Leaves its results in the folder of a run, and does nothing twice."""
