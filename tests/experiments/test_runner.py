"""The command line of every experiment: what runs, with which settings, and what is left."""

import json
import re
import runpy
import sys
from pathlib import Path

import joblib
import pytest

from experiments.experiment import Experiment
from experiments.modular_arithmetic.settings import PRESETS
from experiments.runner import Program, main

ROOT = Path(__file__).parents[2]


@pytest.fixture
def program():
    """A program whose commands note the runs that they are given."""
    seen = []

    def command(name):
        return lambda run: seen.append((name, run))

    commands = {name: command(name) for name in ("first", "second")}
    shortcuts = {"operation": "data.operation"}
    found = Program("noted", "What was asked for.", Experiment, PRESETS, commands, shortcuts)
    return found, seen


def test_run_is_all_commands_in_their_order(program, tmp_path):
    program, seen = program
    assert main(program, ["run", "--preset", "smoke", "--output", str(tmp_path)]) == 0
    assert [name for name, _ in seen] == ["first", "second"]
    assert seen[0][1] is seen[1][1] and seen[0][1].settings == PRESETS["smoke"]
    assert main(program, ["second", "--preset", "smoke", "--output", str(tmp_path)]) == 0
    assert [name for name, _ in seen] == ["first", "second", "second"]


def test_flags_reach_the_run_and_its_record(program, tmp_path):
    program, seen = program
    flags = ["--set", "truth.seed=7", "--operation", "mul", "--on-change", "keep", "--jobs", "3"]
    assert main(program, ["first", *flags, "--output", str(tmp_path / "new")]) == 0
    ((_, run),) = seen
    assert run.output == tmp_path / "new" and run.on_change == "keep"
    assert (run.settings.truth.seed, run.settings.data.operation) == (7, "mul")
    kept = json.loads((tmp_path / "new" / "config.json").read_text())
    assert kept["settings"]["truth"]["seed"] == 7 and "torch" in kept["environment"]


def test_jobs_are_those_of_joblib(tmp_path):
    def command(run):
        jobs.append(joblib.Parallel().n_jobs)

    jobs = []
    program = Program("counted", "", Experiment, PRESETS, {"count": command})
    assert main(program, ["count", "--jobs", "3", "--output", str(tmp_path)]) == 0
    assert jobs == [3]


def test_by_default_results_lie_under_runs(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(program[0], ["first"]) == 0
    assert (tmp_path / "runs" / "noted-small" / "config.json").exists()


def test_what_goes_wrong_is_said_in_a_line(program, tmp_path, capsys):
    program, seen = program
    for flags, error in (
        (["--jobs", "0"], "--jobs must be a number of processes, got 0"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(program, ["run", *flags, "--output", str(tmp_path)])
        assert error in capsys.readouterr().err
    assert main(program, ["run", "--config", str(tmp_path / "none.yaml")]) == 2
    assert re.match(r"error: .*none\.yaml'\n$", capsys.readouterr().err)
    assert not seen


def test_an_interrupted_run_says_how_it_goes_on(tmp_path, capsys):
    def interrupt(run):
        raise KeyboardInterrupt

    program = Program("long", "", Experiment, PRESETS, {"only": interrupt})
    assert main(program, ["run", "--output", str(tmp_path)]) == 130
    assert f"goes on from {tmp_path}" in capsys.readouterr().err
    assert not (tmp_path / "config.json").exists()


@pytest.mark.parametrize("name", ["digits", "modular_arithmetic", "cifar", "icl", "text", "rl"])
def test_every_experiment_has_the_same_files(name, monkeypatch, capsys):
    folder = ROOT / "experiments" / name
    files = ("README.md", "__main__.py", "settings.py", "data.py", "model.py", "experiment.py")
    assert not [file for file in (*files, "figures") if not (folder / file).exists()]
    pytest.importorskip("sklearn")
    monkeypatch.setattr(sys, "argv", ["", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module(f"experiments.{name}", run_name="__main__")
    printed = capsys.readouterr().out
    assert f"usage: python -m experiments.{name}" in printed and "--on-change" in printed
