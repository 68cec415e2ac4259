"""What the README and the documentation say: snippets run, and names are of things that exist."""

import importlib
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
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
SNIPPETS = [page for page in (README, *DOCS) if "```python" in page.read_text()]
CALLS_PAGE = (ROOT / "docs" / "calls.md").read_text()
TABLE = CALLS_PAGE.split("| to | call |\n|---|---|\n")[1].split("\n\n")[0]
CALLS = re.findall(r"`([^`]+)`", "".join(row.split("|", 2)[2] for row in TABLE.splitlines()))
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\nprints\n\n```\n(?P<output>.*?)^```\n)?", re.M | re.S
)


def train(mask, seed):
    """A model trained on the tasks of a subset, in place of a real one."""
    return float(mask.sum()) + 0.1 * seed


@pytest.fixture
def readers_own(tmp_path, monkeypatch):
    """Names that a page takes from its reader, in a folder of one's own."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    tasks = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(12)]
    masks = ksm_ext.subsets.bernoulli(12, 24, 0.7, seed=0)
    scores = 1 + torch.rand(24)
    return {
        "model": nn.Linear(3, 2),
        "tasks": tasks,
        "target": tasks[0],
        "data": tasks[0],
        "few_masks": masks[:10],
        "few_retrained_scores": scores[:10],
        "masks": masks,
        "scores": scores,
        "many_masks": masks,
        "cheap": 0.5 * scores + 1,
        "output": ksm_ext.network.outputs.log_odds,
        "projector": ksm_ext.Projector(4),
        "train": train,
    }


@pytest.fixture
def undrawn():
    """Figures without a screen, which are gone afterwards."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    yield
    pyplot.close("all")


@pytest.fixture
def under_torchrun(monkeypatch):
    """The environment of the only process of a run."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.mark.parametrize("page", SNIPPETS, ids=lambda page: page.name)
def test_snippets_run_and_print_what_they_say(page, readers_own, under_torchrun, request):
    if page.name == "tutorial.md":
        pytest.importorskip("sklearn")
    if "](images/" in page.read_text():
        request.getfixturevalue("undrawn")
    for block in BLOCK.finditer(page.read_text()):
        line = page.read_text()[: block.start()].count("\n") + 1
        code = compile("\n" * line + block["code"], str(page), "exec")
        with redirect_stdout(io.StringIO()) as printed:
            exec(code, readers_own)
        if block["output"] is not None:
            assert printed.getvalue() == block["output"]


@pytest.mark.parametrize("spelled", [call for call in CALLS if not re.match(r"\w+=", call)])
def test_what_the_table_of_calls_spells_can_be_called(spelled, readers_own):
    masks, scores = readers_own["masks"], readers_own["scores"]
    surrogate = ksm_ext.fit_surrogate(masks, scores, kernel="rbf")
    surrogate.save("surrogate.safetensors")
    retrained = ksm_ext.retrain_scores(train, masks, seeds=range(2))
    shares = ksm_ext.subsets.dirichlet(3, 20, seed=0)
    of_mixtures = ksm_ext.fit_surrogate(shares, shares.sqrt().sum(1), kernel="rbf")
    own = {"of_mixtures": of_mixtures, "weights": [1.0] * len(readers_own["tasks"])}
    own |= {"surrogate": surrogate, "retrained": retrained, "path": "surrogate.safetensors"}
    names = {name: getattr(ksm_ext, name) for name in ksm_ext.__all__} | {"ksm_ext": ksm_ext}
    eval(spelled, names | readers_own | own)


def test_every_test_that_a_page_names_exists():
    tests = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    page = (ROOT / "docs" / "reliability.md").read_text()
    for file, names in re.findall(r"`(test_\w+\.py)`((?:[:,] `test_\w+`)*)", page):
        assert all(f"def {name}(" in tests[file] for name in re.findall(r"`(\w+)`", names))
    assert all(
        f"def {name}(" in "".join(tests.values()) for name in re.findall(r"`(test_\w+)`", page)
    )


def test_pages_name_only_files_that_exist():
    for page in (README, ROOT / "CONTRIBUTING.md", *DOCS):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} names {target}"


def test_pictures_are_small_and_shown():
    shown = "".join(page.read_text() for page in DOCS)
    for picture in (ROOT / "docs" / "images").iterdir():
        assert f"](images/{picture.name})" in shown and picture.stat().st_size <= 60_000


def test_a_picture_is_drawn_by_the_snippet_before_it(tmp_path, monkeypatch):
    """And by all before, whose names it has; text may stand between, other snippets may not."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figures = importlib.import_module("docs.figures")
    monkeypatch.setattr(figures, "DOCS", tmp_path)
    (tmp_path / "images").mkdir()
    cells = [
        "height = 3",
        "height = 4",
        "from matplotlib import pyplot",
        "pyplot.figure(figsize=(2, height))",
    ]
    page = "\n".join(f"```python\n{cell}\n```\n" for cell in cells)
    page += "\nHow high?\n\n![It](images/it.png)\n"
    (tmp_path / "page.md").write_text(page)
    figures.draw(tmp_path / "page.md")
    assert pyplot.imread(tmp_path / "images" / "it.png").shape[:2] == (320, 160)


def test_the_reference_has_every_public_module():
    """Those that the stubs of the package name."""
    named = re.findall(r"automodule:: (\S+)", "".join(page.read_text() for page in DOCS))
    for stub in (ROOT / "ksm_ext").rglob("__init__.pyi"):
        package = ".".join(stub.parent.relative_to(ROOT).parts)
        for inner, name in re.findall(r"from \.(\S*) import (\w+)", stub.read_text()):
            module = importlib.import_module(f"{package}.{inner or name}")
            assert module.__name__ in named or hasattr(module, "__path__"), module.__name__
    assert all(importlib.import_module(module) for module in named)


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        ('<script async src="https://cdn.example/mathjax.js"></script>', True),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', True),
        ("<img alt='a' src='http://a.example/b.png'>", True),
        ("@import 'https://fonts.example/a.css';", True),
        ("p {background: url(https://a.example/b.png)}", True),
        ('<a href="https://arxiv.org/abs/2602.03783">a link to follow</a>', False),
        ('<script src="_static/furo.js"></script>', False),
        ("p {background: url(data:image/svg+xml;charset=utf-8,<svg/>)}", False),
    ],
)
def test_pages_that_load_from_another_host_are_found(text, needs):
    pytest.importorskip("sphinx")
    assert bool(importlib.import_module("docs.conf").LOADED.search(text)) == needs


def test_links_to_results_lead_to_their_pages(tmp_path):
    pytest.importorskip("sphinx")
    relinked = importlib.import_module("docs.conf").relinked
    page = "[a](../experiments/icl/README.md#results), ![b](images/report.png), [c](#d), [e](https://f.g)"
    of_docs = relinked(page, ROOT / "docs", ROOT / "docs")
    assert of_docs == page.replace("../experiments/icl/README.md", "results/icl.md")
    page = "![a](figures/selection.png), [b](settings.py), [c](figures), `x[1](y)`"
    moved = relinked(page, ROOT / "experiments" / "icl", ROOT / "docs" / "results")
    there = "../../experiments/icl/"
    assert moved == f"![a]({there}figures/selection.png), [b]({there}settings.py), c, `x[1](y)`"
