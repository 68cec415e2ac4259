"""What every experiment does alike: one thread for small sums, its environment, its files."""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import torch

from ksm_ext.atomic_write import write_whole
from ksm_ext.scores.retraining import one_thread as one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def environment(*packages: str) -> dict[str, str]:
    """The machine, and the versions of Python and ``packages``."""
    facts = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {package: version(package) for package in packages}


def write_json(path: Path, facts: Mapping[str, Any] | Sequence[Any]) -> None:
    """Facts, whole or not at all."""
    write_whole(path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


def new_figure(width: float, height: float) -> "Figure":
    """A figure that needs no screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """As PNG, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
