"""What the commands print and write."""

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sweep import MASKS, scores, table

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


def test_a_device_may_be_read_and_written():
    check_apart(os.devnull, [os.devnull])
