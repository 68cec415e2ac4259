"""setuptools' build backend, building beside the torch that will be used.

pip builds in an isolated environment. Were torch one of the build requirements, pip would download
its newest release there (gigabytes), whatever torch the user has. So: if the environment that pip
installs into has a torch, its site-packages join ``sys.path`` while a hook runs, and nothing is
required; if it has none, torch is required for the build as it is for the run. Tools that isolate
in an environment of their own (uv, ``python -m build``) end up in the second case.
"""

import importlib.metadata
import importlib.util
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from setuptools import build_meta

TORCH_REQUIREMENT = "torch>=2.10"


def torch_of_target() -> tuple[str, str] | None:
    """Version and folder of the torch of the environment that pip installs into."""
    # pip's isolation hides that environment from sys.path only: sysconfig still names it.
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for distribution in importlib.metadata.distributions(name="torch", path=[folder]):
            return distribution.version, folder
    return None


@contextmanager
def borrowed_torch() -> Iterator[None]:
    """Lets ``import torch`` find the target environment's torch."""
    found = torch_of_target()
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
    if importlib.util.find_spec("torch") or torch_of_target():
        return []
    return [TORCH_REQUIREMENT]


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
