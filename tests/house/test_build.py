"""The installation: where it lies, what it was built from, how it decides."""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import ksm_ext
from ksm_ext import ops
from ksm_ext.build_info import build_info

ROOT = Path(__file__).resolve().parents[2]


def test_the_installed_package_is_what_is_tested():
    installed = importlib.metadata.distribution("ksm_ext")
    direct = json.loads(installed.read_text("direct_url.json") or "{}")
    editable = direct.get("dir_info", {}).get("editable", False)
    assert (ROOT / "ksm_ext" in Path(ksm_ext.__file__).parents) == editable


def test_only_a_build_in_place_has_the_module_of_one_python():
    in_place = ROOT / "ksm_ext" in Path(ksm_ext.__file__).parents
    assert (importlib.util.find_spec("ksm_ext._arithmetic") is not None) == in_place


def test_a_tree_that_is_built_but_not_installed_has_a_version(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with monkeypatch.context() as patched:
        patched.setattr(importlib.metadata, "version", absent)
        assert importlib.reload(ksm_ext).__version__ == "0.0.0"
    assert importlib.reload(ksm_ext).__version__ == importlib.metadata.version("ksm_ext")


def test_build_info_states_the_facts():
    info = build_info()
    assert info["torch_running"] == torch.__version__
    assert info["torch_built_against"][0].isdigit()
    assert info["cuda"] == ops.BUILT_WITH_CUDA or not info["cuda"]
    assert (info["nvcc"] is None) == (not info["cuda"])
    assert info["cpu_instruction_set"] in ("avx512", "avx2", "portable")


def test_every_operator_has_its_function_and_fake_kernel():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ksm_ext::")]
    schemas = re.findall(r'm\.def\(\s*"(\w+)\(', (ROOT / "csrc/ops.cpp").read_text())
    assert sorted(names) == sorted(f"ksm_ext::{name}" for name in schemas) != []
    for name in names:
        assert hasattr(ops, name.removeprefix("ksm_ext::"))
        assert torch._library.simple_registry.singleton.find(name).fake_impl.kernel is not None
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")


def load_backend(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "_build_backend"))
    return pytest.importorskip("ksm_backend", reason="setuptools is not installed")


def environment(folder, torch_version):
    """A folder as of an environment of this Python, with what says that a torch is installed."""
    packages = sysconfig.get_path("platlib", vars={"base": folder, "platbase": folder})
    described = Path(packages) / f"torch-{torch_version}.dist-info/METADATA"
    described.parent.mkdir(parents=True)
    described.write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {torch_version}\n")
    return packages


@pytest.fixture
def isolated(monkeypatch, tmp_path):
    """The backend as in an isolated build, with no torch in the target, on the PATH or here."""
    backend = load_backend(monkeypatch)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(backend, "target_folders", lambda: [])
    monkeypatch.setenv("PATH", "/nowhere/bin")
    monkeypatch.chdir(tmp_path)
    return backend


def test_the_build_requires_no_torch_where_there_is_one(monkeypatch, capsys):
    backend = load_backend(monkeypatch)
    assert backend.requirements() == []
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert backend.requirements() == []  # found in the target environment
    assert capsys.readouterr().err == ""


def test_the_build_says_that_it_downloads_a_torch(isolated, capsys):
    assert isolated.requirements() == ["torch>=2.10"]
    assert "the newest is downloaded for the build" in capsys.readouterr().err


@pytest.mark.parametrize("version, recent", [("2.9.1", False), ("2.10.0+cpu", True), ("3.0", True)])
@pytest.mark.parametrize("name", ["active", ".venv"])
def test_the_build_takes_a_recent_torch_on_the_path_or_here(
    isolated, monkeypatch, tmp_path, name, version, recent
):
    packages = environment(tmp_path / name, version)
    monkeypatch.setenv("PATH", os.pathsep.join(["/nowhere/bin", str(tmp_path / "active/bin")]))
    assert isolated.torch_to_borrow() == ((version, packages) if recent else None)
    assert isolated.requirements() == ([] if recent else ["torch>=2.10"])


def test_the_build_takes_the_targets_torch_before_that_of_the_path(isolated, monkeypatch, tmp_path):
    target, other = (environment(tmp_path / name, "2.11") for name in ("target", "other"))
    monkeypatch.setenv("PATH", str(tmp_path / "other/bin"))
    assert isolated.torch_to_borrow() == ("2.11", other)
    monkeypatch.setattr(isolated, "target_folders", lambda: [target])
    assert isolated.torch_to_borrow() == ("2.11", target)


def test_the_build_borrows_a_torch_and_gives_it_back(isolated, monkeypatch, capsys):
    monkeypatch.setattr(isolated, "torch_to_borrow", lambda: ("9.9", "/target/site-packages"))
    before = list(sys.path)
    with isolated.borrowed_torch():
        assert sys.path == [*before, "/target/site-packages"]
    assert sys.path == before
    assert "building beside torch 9.9" in capsys.readouterr().err


def test_an_unknown_cuda_request_is_refused():
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "KSM_EXT_CUDA": "maybe"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "KSM_EXT_CUDA must be 0 or 1, got maybe. Unset it" in result.stderr


def test_avx512_tiles_agree_with_portable_ones_under_emulation():
    result = subprocess.run([ROOT / "tools" / "check_avx512.sh"], capture_output=True, text=True)
    if result.returncode == 77:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stdout + result.stderr
