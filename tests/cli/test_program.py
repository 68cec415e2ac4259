"""The command line as a whole: help, the commands of the README, what goes wrong, pipes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pandas as pd
import pytest
import torch
from sweep import MASKS, frame, table

from ksm_ext import fit_surrogate, subsets
from ksm_ext.cli import main
from ksm_ext.cli.program import _names, _parser

ROOT = Path(__file__).parent.parent.parent
COMMANDS = ("design", "import", "fit", "attribute", "select", "report", "next", "compare", "watch")
COMMANDS += ("doctor", "completion")


def readme_commands():
    section = (ROOT / "README.md").read_text().split("## Command line\n")[1].split("\n## ")[0]
    lines = re.search(r"```\n(ksm fit.*?)```", section, re.S)[1].splitlines()
    return section, [shlex.split(line, comments=True) for line in lines]


def test_the_three_commands_of_the_readme(tmp_path, monkeypatch, capsys):
    """From a CSV like the one shown, by these very lines, to a report."""
    section, commands = readme_commands()
    header = re.search(r"```\n(.*)\n", section)[1].split(",")
    monkeypatch.chdir(tmp_path)
    frame().set_axis(header, axis=1).to_csv("scores.csv", index=False)
    assert [" ".join(words[:2]) for words in commands] == ["ksm fit", "ksm attribute", "ksm report"]
    for words in commands:
        assert main(words[1:]) == 0
    assert set(table(capsys.readouterr().out)["task"]) == set(header[:5])
    (page,) = tmp_path.glob("*.html")
    assert all(name in page.read_text() for name in header)
    with pytest.raises(SystemExit):
        main(["--help"])
    help_text = capsys.readouterr().out
    assert all(shlex.join(words) in help_text for words in commands)


def test_the_entry_point_is_declared():
    assert 'ksm = "ksm_ext.cli:main"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"examples:\n  ksm {command}" in text


def test_the_readme_counts_the_commands():
    words = dict(enumerate(["nine", "ten", "eleven", "twelve", "thirteen"], start=9))
    assert f"{words[len(COMMANDS)].capitalize()} commands, from" in (ROOT / "README.md").read_text()
    parser = _parser()
    assert {*COMMANDS} == {name for each in parser._actions for name in each.choices or ()}


@pytest.mark.parametrize("command", ["fit", "watch"])
def test_the_help_names_every_kernel(command, capsys):
    with pytest.raises(ValueError, match="'nope'") as error:
        fit_surrogate(MASKS, torch.rand(len(MASKS), 1), kernel="nope")
    plain, others = re.search("one of (.*), a sum .* or (.*) alone", str(error.value)).groups()
    names = {*plain.split(", "), *re.findall(r"\w+", others)}
    assert {"rbf", "size", "ard"} <= names
    with pytest.raises(SystemExit):
        main([command, "--help"])
    about = re.search(r"\n  --kernel .*?\n  --ridge", capsys.readouterr().out, re.DOTALL)[0]
    assert names <= {*re.findall(r"\w+", about)}


@pytest.mark.parametrize("words", ["--help", "--version", *(f"{c} --help" for c in COMMANDS)])
def test_what_is_said_without_a_table_imports_nothing_slow(words):
    code = (
        "import sys\nfrom ksm_ext.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'scipy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code, *words.split()], check=True, capture_output=True)


def test_names_between_commas():
    assert _names('a, "b, c",d e') == ["a", "b, c", "d e"]
    assert _names('" a ", "say ""b""",') == [" a ", 'say "b"']
    assert _names(" , ") == []


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("fit none.csv -o x", "`path` must be a file, got none.csv"),
        ("fit scores.csv --kernel rbff -o x", "`kernel` must be"),
        ("fit scores.csv --kernel auto,rbf -o x", "`kernel` must be 'auto' or names"),
        ("fit scores.csv --targets los -o x", "`targets` must be among the columns"),
        ("attribute scores.csv", "`path` must be a saved surrogate"),
        ("attribute s --target los", "`target` must be one of 'loss', 'accuracy', got 'los'"),
        ("attribute s -o x.xlsx", "`the ending of the output` must be one of"),
        ("design --num-tasks 5 --num-subsets 3 -o x.xlsx", "'csv', 'json', 'parquet', 'npz'"),
        ("fit scores.csv -o none/x", "`path` must be in a folder that exists, got none/x"),
        ("report s -o none/x", "`path` must be in a folder that exists, got none/x"),
        ("select s --budget 2 --maximize", "`target` must be one of loss, accuracy, got none"),
        ("select s --budget -1 --maximize --target loss", "`budget` must be non-negative"),
        ("report s -o r.html --target los", "`target` must be one of 'loss', 'accuracy'"),
        ("report s -o r --minimize loss --maximize loss", "`minimize` must be other targets"),
        ("design --num-tasks 5", "`num-subsets` must be given for this design"),
        ("design --num-tasks 5 --num-subsets 3 --design fixed-size", "`size` must be given"),
        ("design --tasks none.txt --num-subsets 3", "`tasks` must be a file, got none.txt"),
        ("design --tasks s --num-subsets 3", "`s` must be text in UTF-8, got bytes that are none."),
        ("report s -o r.html --minimize lsos", "`minimize` must be one of 'loss', 'accuracy', got"),
        ("report s -o r.html --maximize lsos", "`maximize` must be one of 'loss', 'accuracy', got"),
        ("fit folder -o x", "`path` must be a file, got the folder folder. Name a file in it."),
        ("attribute folder", "`path` must be a file, got the folder folder. Name a file in it."),
        ("fit scores.csv --masks folder -o x", "`path` must be a file, got the folder folder."),
        ("design --tasks folder --num-subsets 3", "`tasks` must be a file, got the folder folder."),
        ("fit none.csv -o folder", "`path` must be a file, got the folder folder. Name a file in"),
        (
            "fit s -o x",
            "must be CSV with a header row, JSON, NPZ, Parquet, Feather or Excel, got saf",
        ),
    ],
)
def test_bad_input_is_2(call, said, there, capsys):
    (there / "folder").mkdir()
    assert main(call.split()) == 2
    text = capsys.readouterr()
    assert text.out == "" and text.err.splitlines()[-1].startswith("ksm: error: ")
    assert said in text.err and "Traceback" not in text.err


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("fit scores.csv", "scores.safetensors"),
        ("fit folder/runs.v2.csv.gz", "folder/runs.v2.safetensors"),
        ("report s", "s.html"),
        ("watch scores.csv --until 5", "scores.html"),
    ],
)
def test_files_are_named_after_what_is_read_and_replaced_by_force_alone(
    call, written, there, capsys
):
    (there / "folder").mkdir()
    pd.read_csv("scores.csv").to_csv("folder/runs.v2.csv.gz", index=False)
    assert main(call.split()) == 0
    said, first = capsys.readouterr(), Path(written).read_bytes()
    assert written in said.err and said.out == "" and first
    Path(written).write_bytes(b"mine")
    assert main(call.split()) == 2
    assert f"`output` must be a new file where none is named, got {written}. Add" in (
        capsys.readouterr().err
    )
    assert Path(written).read_bytes() == b"mine"
    assert main([*call.split(), "--force"]) == 0
    assert Path(written).read_bytes()[:1] == first[:1] and len(Path(written).read_bytes()) > 99
    Path(written).write_bytes(b"mine")
    assert main([*call.split(), "--output", written]) == 0  # which is named
    assert Path(written).read_bytes() != b"mine"


def test_next_gives_what_is_left_and_says_so(there, capsys):
    every = subsets.all_subsets(5)
    rest = sorted(set(map(tuple, every[1:].int().tolist())) - set(map(tuple, MASKS.int().tolist())))
    assert main(["next", "s", "--num-subsets", "40"]) == 0
    text = capsys.readouterr()
    assert sorted(map(tuple, table(text.out).to_numpy().tolist())) == rest
    said = f"Note: {len(rest)} different subsets that were not scored are left of the 40 asked for."
    assert said in text.err


def test_what_comes_by_a_pipe_goes_to_one(there):
    code = "import sys\nfrom ksm_ext.cli import main\nsys.exit(main(sys.argv[1:]))"
    ran = subprocess.run(
        [sys.executable, "-c", code, "fit", "-"],
        input=Path("scores.csv").read_bytes(),
        capture_output=True,
    )
    assert ran.returncode == 0 and ran.stdout[8:9] == b"{"
    Path("again").write_bytes(ran.stdout)
    assert main(["attribute", "again", "-o", "a.csv"]) == 0


@pytest.mark.parametrize(
    "call",
    ["", "fit", "report", "select s --budget 2", "design --num-tasks 0", "nothing"],
)
def test_bad_arguments_are_2(call, capsys):
    with pytest.raises(SystemExit) as ended:
        main(call.split())
    assert ended.value.code == 2 and "usage: ksm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("atribute s", "Did you mean attribute?"),
        ("attribute s --readout sharply", "Did you mean shapley?"),
        ("attribute s --redout shapley", "Did you mean --readout?"),
        ("attribute s --for csv", "Did you mean --format?"),
        ("attribute s --read shapley", "unrecognized arguments: --read shapley"),
        ("attribute s --zzz", "unrecognized arguments: --zzz\n"),
    ],
)
def test_a_misspelled_word_is_answered_by_the_nearest_and_nothing_is_abbreviated(
    call, said, there, capsys
):
    with pytest.raises(SystemExit) as ended:
        main(call.split())
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_without_a_command_there_is_help(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    text = capsys.readouterr()
    assert ended.value.code == 2 and text.out == "" and "ksm fit scores.csv" in text.err


def test_what_cannot_be_written_is_refused_before_the_work(there, monkeypatch):
    fit = Mock()
    monkeypatch.setattr("ksm_ext.cli.commands.fit_surrogate", fit)
    assert main(["fit", "scores.csv", "-o", "none/x"]) == 2
    fit.assert_not_called()


def test_a_design_that_no_memory_holds_is_1(capsys):
    call = ["design", "--num-tasks", "9000000", "--num-subsets", "900000000"]
    assert main(call) == 1
    assert "no memory for 8,100,000 GB at once: ask for less" in capsys.readouterr().err


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_standard_streams_may_be_closed(stream, there, monkeypatch, capsys):
    with monkeypatch.context() as patched:
        patched.setattr(sys, stream, None)
        assert main(["attribute", "s"]) == 0
        getattr(sys, stream).close()


def test_failures_are_1_and_interrupts_130(there, monkeypatch, capsys):
    for error, status, said in (
        (RuntimeError("no memory"), 1, "ksm: error: no memory"),
        (KeyboardInterrupt(), 130, "\nInterrupted."),
        (OSError(28, "No space left on device"), 1, "ksm: error: No space left on device"),
    ):
        fail = Mock(side_effect=error)
        monkeypatch.setattr("ksm_ext.cli.commands.fit_surrogate", fail)
        assert main(["fit", "scores.csv", "-o", "x"]) == status
        assert capsys.readouterr().err.endswith(f"{said}\n")


@pytest.mark.slow
def test_pipes_and_a_reader_that_has_enough(there):
    """A surrogate through a pipe, and more rows than a pipe holds to a reader that leaves."""
    masks = subsets.bernoulli(3000, 4, 0.5, seed=0)
    many = pd.DataFrame(masks.int().numpy(), columns=[f"task {i}" for i in range(3000)])
    many.assign(loss=[0.5, 0.1, 0.9, 0.2]).to_csv("many.csv", index=False)
    ksm = f"{shlex.quote(sys.executable)} -m ksm_ext.cli"
    line = f"{ksm} fit - --kernel linear --ridge 1 --quiet -o - < many.csv | {ksm} attribute - "
    line = ["bash", "-c", f"{line} | head -n 2; echo ${{PIPESTATUS[@]}}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
    header, first, status = run.stdout.splitlines()
    assert header == "task,target,value,std,low,high" and first.startswith("task ")
    assert status == "0 0 0" and run.stderr.startswith("Note: 0 of the ")
