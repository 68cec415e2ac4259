"""setuptools' build backend, building beside a torch that is already there.

Build tools build in an isolated environment. Were torch one of the build requirements, they would
download its newest release there (gigabytes), whatever torch the user has. So the folder of a torch
of the same Python joins ``sys.path`` while a hook runs, and nothing is required: that of the
environment which pip installs into; or, since uv and ``python -m build`` do not tell theirs, of one
whose programs are on the PATH, as an activated one's are, or of ``.venv`` here. Where there is
none, torch is required for the build as it is for the run, and that is said. What is built beside
any torch since 2.10 runs beside any other.
"""

import importlib.metadata
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import Version
from setuptools import build_meta

OLDEST_TORCH = "2.10"


def target_folders() -> list[str]:
    """Where packages lie in the environment that pip installs into."""
    # pip's isolation hides it from sys.path only: sysconfig still names it.
    return [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]


def other_folders() -> list[str]:
    """Where packages of this Python lie in the environments on the PATH, and in ``.venv``."""
    prefixes = [str(Path(folder).parent) for folder in os.get_exec_path()]
    return [
        sysconfig.get_path("platlib", vars={"base": prefix, "platbase": prefix})
        for prefix in (*prefixes, os.path.abspath(".venv"))
    ]


def torch_to_borrow() -> tuple[str, str] | None:
    """Version and folder of a torch that is recent enough."""
    for folder in (*target_folders(), *other_folders()):
        for distribution in importlib.metadata.distributions(name="torch", path=[folder]):
            if Version(distribution.version) >= Version(OLDEST_TORCH):
                return distribution.version, folder
    return None


@contextmanager
def borrowed_torch() -> Iterator[None]:
    """Lets ``import torch`` find a torch outside of the isolated environment."""
    found = torch_to_borrow()
    if importlib.util.find_spec("torch") or not found:
        yield
        return
    version, folder = found
    print(f"ksm_ext: building beside torch {version} in {folder}", file=sys.stderr)
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def requirements(config_settings: Any = None) -> list[str]:
    """Torch, unless there is one to build beside."""
    if importlib.util.find_spec("torch") or torch_to_borrow():
        return []
    needed = f"torch>={OLDEST_TORCH}"
    print(
        f"ksm_ext: no {needed} for Python {sysconfig.get_python_version()} in the target, "
        "on the PATH or in .venv: the newest is downloaded for the build. To build beside one that "
        "is installed, activate its environment.",
        file=sys.stderr,
        flush=True,
    )
    return [needed]


def with_torch(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook of setuptools, run where torch can be imported."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with borrowed_torch():
            return hook(*args, **kwargs)

    return wrapped


# setuptools' own get_requires hooks would run setup.py before torch is there.
get_requires_for_build_wheel = requirements
get_requires_for_build_editable = requirements
get_requires_for_build_sdist = requirements
prepare_metadata_for_build_wheel = with_torch(build_meta.prepare_metadata_for_build_wheel)
prepare_metadata_for_build_editable = with_torch(build_meta.prepare_metadata_for_build_editable)
build_wheel = with_torch(build_meta.build_wheel)
build_editable = with_torch(build_meta.build_editable)
build_sdist = with_torch(build_meta.build_sdist)
