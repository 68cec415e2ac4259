"""What experiments do alike: one thread for small sums, environment and memory, tables, files."""

import json
import platform
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import joblib
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ksm_ext.atomic_write import write_whole
from ksm_ext.scores.retraining import one_thread as one_thread

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PACKAGES = ("ksm_ext", "torch", "numpy", "scipy", "scikit-learn", "joblib")


def environment() -> dict[str, str]:
    """The machine, and the versions of Python and :data:`PACKAGES`."""
    facts = {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {joblib.cpu_count()} cores",
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts | {package: version(package) for package in PACKAGES}


def resident(field: str) -> float:
    """MiB of this process: its ``VmRSS``, what is resident now, or ``VmHWM``, the peak (Linux)."""
    found = re.search(field + r":\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) / 1024


def restart_peak() -> None:
    """The peak begins at what is resident now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table as text."""
    lines = [f"| {' | '.join(cells)} |" for cells in (titles, *rows)]
    return "\n".join([lines[0], "|---" * len(titles) + "|", *lines[1:]])


def write_text(path: Path, text: str) -> None:
    """A text, on the terminal too; whole or not at all."""
    print(f"\n{text}")
    write_whole(path, text.encode())


def write_json(path: Path, facts: Mapping[str, Any] | Sequence[Any]) -> None:
    """Facts, whole or not at all."""
    write_whole(path, (json.dumps(facts, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], settings: Any, **facts: str) -> None:
    """Tensors, with the settings (JSON) that they belong to and facts beside them."""
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(whole, metadata={"settings": json.dumps(settings), **facts}))


def read_tensors(path: Path, settings: Any) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors of a file and the facts beside them, if there is one of these settings."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        if facts.pop("settings") != json.dumps(settings):
            return None
        return {name: file.get_tensor(name) for name in file.keys()}, facts  # noqa: SIM118


@contextmanager
def saved_figure(path: Path, width: float, height: float) -> Iterator["Figure"]:
    """A figure that needs no screen; when it is drawn, saved as PNG, whole or not at all."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=150)
    FigureCanvasAgg(figure)
    yield figure
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(path)
