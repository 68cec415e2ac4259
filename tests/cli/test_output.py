"""What the commands print and write."""

import io
import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from sweep import MASKS, frame, scores, table

from ksm_ext import RBF, fit_surrogate, read_scores
from ksm_ext.cli import main
from ksm_ext.cli.output import check_apart


def test_a_table_for_the_eye(there, capsys):
    assert main(["attribute", "s", "--format", "table", "--top", "1"]) == 0
    header, first, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "target", "value", "std", "low", "high"]
    assert first.split()[:2] == ["noise", "loss"] and len(first) == len(header)


def test_names_are_neither_run_nor_obeyed(there, capsys, monkeypatch):
    """By a spreadsheet that opens the CSV, and by a terminal."""
    names = ["=1+1", "\x1b[31mred", "+x", "@y", "-z"]
    values = {"task_names": names, "target_names": ["\x1b]0;loss\x07"]}
    fit_surrogate(MASKS, scores()[:, :1], kernel=RBF(gamma=0.1), ridge=0.05, **values).save("odd")
    assert main(["attribute", "odd", "--sort", "none"]) == 0
    cells = table(capsys.readouterr().out)
    assert cells["task"].tolist() == ["'=1+1", "\x1b[31mred", "'+x", "'@y", "'-z"]
    assert cells["value"].dtype == float and (cells["value"] < 0).any()
    assert main(["attribute", "odd", "--sort", "none", "--format", "json"]) == 0
    assert [row["task"] for row in json.loads(capsys.readouterr().out)] == names
    for form in ("csv", "table"):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
        assert main(["attribute", "odd", "--format", form]) == 0
        assert main(["attribute", "odd", "--target", "\x1b[2J"]) == 2
        text = capsys.readouterr()
        assert "\x1b" not in text.out + text.err and "\\x1b[31mred" in text.out
        assert "\\x1b]0;loss" in text.err or "\\x1b[2J" in text.err
    Path("names.txt").write_text("=1+1\nb\n")
    assert main(["design", "--tasks", "names.txt", "--num-subsets", "2", "-o", "m.csv"]) == 0
    Path("y.csv").write_text("loss\n.5\n.25\n")
    assert Path("m.csv").read_text().startswith("'=1+1,b\n")
    assert read_scores("y.csv", "m.csv").task_names == ("=1+1", "b")


def test_a_report_goes_to_standard_output(there, capsysbinary):
    assert main(["report", "s", "-o", "-"]) == 0
    assert capsysbinary.readouterr().out.startswith(b"<!DOCTYPE html>") and not Path("-").exists()


def test_a_pipe_is_written_to_and_stays_one(there):
    os.mkfifo("pipe")
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(Path("pipe").read_bytes)
        assert main(["report", "s", "-o", "pipe"]) == 0
        assert read.result(timeout=60).startswith(b"<!DOCTYPE html>") and Path("pipe").is_fifo()


@pytest.mark.parametrize(
    "call",
    [
        "watch page.html",
        "watch nofile.html",
        "fit weird.safetensors",
        "report weird.html",
        "fit scores.csv --masks scores.safetensors",
        "fit scores.csv --estimates page.html --estimates scores.safetensors",
        "fit scores.csv -o scores.csv",
        "fit scores.csv -o folder/../scores.csv",
        "fit link.csv -o scores.csv",
        "fit scores.csv -o link.csv",
        "watch scores.csv -o link.csv",
        "import scores.csv -o scores.csv",
        "report s -o s",
        "report s --held-out scores.csv -o scores.csv",
        "attribute s -o s --format csv",
        "compare weird.html s -o s --format csv",
        "select s --budget 2 --maximize --costs scores.csv -o scores.csv",
        "next s -o s --format csv",
        "design --tasks scores.csv --num-subsets 2 -o scores.csv",
        "design --num-tasks 2 --num-subsets 2 --for loo --known scores.csv -o scores.csv",
    ],
)
def test_what_is_read_is_not_replaced(call, there, capsys):
    Path("folder").mkdir()
    Path("link.csv").symlink_to("scores.csv")
    for name in ("page.html", "weird.safetensors", "scores.safetensors"):
        shutil.copy("scores.csv", name)
    shutil.copy("s", "weird.html")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    words = call.split()
    forced = [] if "-o" in words else [["--force"]]
    for more in ([], *forced):
        assert main([*words, *more]) == 2
        said = capsys.readouterr().err
        assert said.startswith("ksm: error: `output` must be another file than ")
        assert "`--output`" in said and "--force" not in said
    assert before == {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}


@pytest.mark.parametrize("command", ["attribute", "compare s", "next", "report"])
def test_what_is_no_surrogate_is_called_by_what_it_is(command, there, capsys, monkeypatch):
    assert main(["report", "s", "-o", "page"]) == 0
    frame().to_parquet("parquet")
    frame().to_json("json", orient="records")
    np.savez("npz", masks=MASKS, scores=scores())
    os.rename("npz.npz", "npz")
    Path("png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(90))
    Path("empty").write_bytes(b"")
    Path("half").write_text('[{"a": 1, "b')
    first, fit = "Name what `ksm fit` saved.", "`ksm fit` it first."
    kinds = dict.fromkeys(("scores.csv", "parquet", "json", "npz"), ("a table", fit))
    kinds |= {"png": ("a PNG picture", first), "empty": ("an empty file", first)}
    kinds |= {"page": ("an HTML page", first), "half": ("a table that breaks off", first)}
    capsys.readouterr()
    for name, (kind, advice) in kinds.items():
        assert main([*command.split(), name, "-o", "out.csv"]) == 2
        said = f"`path` must be a saved surrogate, got {name}, {kind}. {advice}"
        assert capsys.readouterr().err == f"ksm: error: {said}\n"
    stream = io.TextIOWrapper(io.BytesIO(Path("scores.csv").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stream)
    assert main([*command.split(), "-", "-o", "out.csv"]) == 2
    assert f"got standard input, a table. {fit}" in capsys.readouterr().err
    assert not Path("out.csv").exists()


def test_a_damaged_surrogate_is_one(there, capsys):
    content = Path("s").read_bytes()
    Path("cut").write_bytes(content[: len(content) // 2])
    assert main(["attribute", "cut"]) == 2
    assert "damaged" in capsys.readouterr().err


def test_a_device_may_be_read_and_written():
    check_apart(os.devnull, [os.devnull])
