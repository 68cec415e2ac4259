"""What the README's table of calls spells is what a reader gets after ``import ksm_ext``."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import ksm_ext

README = (Path(__file__).parents[2] / "README.md").read_text()
TABLE = README.split("| to | call |\n|---|---|\n")[1].split("\n\n")[0]
CODE = re.findall(r"`([^`]+)`", "".join(row.split("|", 2)[2] for row in TABLE.splitlines()))
SPELLED = [code for code in CODE if not re.match(r"\w+=", code)]  # those are arguments


@pytest.fixture(scope="module")
def readers_own():
    """What the calls of the table take from their reader."""
    torch.manual_seed(0)
    draw = lambda: (torch.randn(8, 3), torch.randint(2, (8,)))  # noqa: E731
    masks = ksm_ext.subsets.bernoulli(5, 24, 0.5, seed=0)
    scores = masks.float() @ torch.arange(5.0) + 0.1 * torch.randn(24)
    tasks = [draw() for _ in range(5)]
    return {
        "masks": masks,
        "scores": scores,
        "retrained": ksm_ext.retrain_scores(train, masks, seeds=range(2), progress=False),
        "surrogate": ksm_ext.fit_surrogate(masks, scores, kernel="rbf"),
        "train": train,
        "model": nn.Linear(3, 2),
        "tasks": tasks,
        "target": tasks[0],
        "data": tasks[0],
        "projector": ksm_ext.Projector(4),
        "path": "surrogate.safetensors",
    }


def train(mask, seed):
    """A model trained on the tasks of a subset, in place of a real one."""
    return float(mask.sum()) + 0.1 * seed


@pytest.mark.parametrize("spelled", SPELLED)
def test_what_the_table_spells_can_be_called(spelled, readers_own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    readers_own["surrogate"].save(readers_own["path"])
    names = {name: getattr(ksm_ext, name) for name in ksm_ext.__all__} | {"ksm_ext": ksm_ext}
    eval(spelled, names | readers_own)


def test_every_public_name_is_found():
    assert not [name for name in ksm_ext.__all__ if getattr(ksm_ext, name, None) is None]
    assert callable(ksm_ext.attribution.influence), "not the module of that name"


def test_import_loads_nothing_that_was_not_asked_for():
    code = (
        "import sys, ksm_ext; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
