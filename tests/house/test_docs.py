"""Every snippet of the README and of the documentation runs, and prints what it says."""

import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import ksm_ext

ROOT = Path(__file__).parent.parent.parent
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text()
]
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\nprints\n\n```\n(?P<output>.*?)^```\n)?", re.M | re.S
)


def readers_own():
    """Names that a page takes from its reader."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    tasks = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(12)]
    few_masks = torch.rand(10, 12) < 0.7
    return {
        "model": model,
        "tasks": tasks,
        "target": tasks[0],
        "few_masks": few_masks,
        "few_retrained_scores": 1 + torch.rand(10),
        "masks": few_masks,
        "scores": 1 + torch.rand(10),
        "data": tasks[0],
        "output": ksm_ext.network.outputs.log_odds,
        "projector": ksm_ext.Projector(4),
    }


@pytest.fixture
def under_torchrun(monkeypatch):
    """The environment of the only process of a run."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_run_and_print_what_they_say(page, tmp_path, monkeypatch, under_torchrun):
    if page.name == "tutorial.md":
        pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    names = readers_own()
    for block in BLOCK.finditer(page.read_text()):
        line = page.read_text()[: block.start()].count("\n") + 1
        code = compile("\n" * line + block["code"], str(page), "exec")
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        if block["output"] is not None:
            assert printed.getvalue() == block["output"]


def test_every_test_that_a_page_names_exists():
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    page = (ROOT / "docs" / "reliability.md").read_text()
    for file, names in re.findall(r"`(test_\w+\.py)`((?:[:,] `test_\w+`)*)", page):
        assert all(f"def {name}(" in tests[file] for name in re.findall(r"`(\w+)`", names))


def test_pages_name_only_files_that_exist():
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *sorted((ROOT / "docs").glob("*.md")),
    ):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} names {target}"
