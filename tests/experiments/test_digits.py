"""The digits experiment end to end on its smallest preset: found, resumable, refusing."""

import json
import sqlite3
from contextlib import closing

import joblib
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments.digits.experiment import COMMANDS, PROGRAM, Digits, check, findings
from experiments.digits.settings import PRESETS
from experiments.experiment import Run
from experiments.runner import main
from ksm_ext.scores.retraining import _run

SMOKE = PRESETS["smoke"]
FLAGS = ["run", "--preset", "smoke", "--jobs", "1", "--output"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that is finished."""
    folder = tmp_path_factory.mktemp("digits")
    assert main(PROGRAM, [*FLAGS, str(folder)]) == 0
    return Run(Digits(SMOKE), folder)


def scores_in(folder):
    with closing(sqlite3.connect(folder / "scores.sqlite")) as database:
        return set(database.execute("SELECT subset, seed, scores FROM runs"))


def test_the_shuffled_groups_are_found(finished):
    assert sorted(findings(finished).found) == list(finished.experiment.data().bad)
    before, after = check(finished)
    assert after[0] < before[0]  # without them the test loss falls


def test_everything_is_written(finished):
    folder = finished.output
    names = {path.name for path in folder.iterdir()}
    files = {"attributions.png", "config.json", "report.html", "scores.sqlite"}
    assert names == files | {"surrogate.safetensors"}
    config = (folder / "config.json").read_text()
    assert json.loads(config)["settings"]["num_subsets"] == SMOKE.num_subsets
    assert str(folder) not in config
    assert len(scores_in(folder)) == (SMOKE.num_subsets + 2) * SMOKE.num_repeats


def test_only_what_is_missing_is_trained_again(finished, tmp_path, monkeypatch):
    store = tmp_path / "scores.sqlite"
    store.write_bytes((finished.output / "scores.sqlite").read_bytes())
    with closing(sqlite3.connect(store)) as database, database:
        lost = set(database.execute("SELECT subset, seed FROM runs WHERE subset LIKE '10%'"))
        database.execute("DELETE FROM runs WHERE subset LIKE '10%'")
    trained = set()

    def spy(train, subset, seed, caller):
        trained.add((subset, seed))
        return _run(train, subset, seed, caller)

    monkeypatch.setattr("ksm_ext.scores.retraining._run", spy)  # another `train` would be refused
    again = Run(Digits(SMOKE), tmp_path)
    with joblib.parallel_config("sequential"):
        for command in COMMANDS.values():
            command(again)
    assert trained == lost != set()
    assert scores_in(tmp_path) == scores_in(finished.output)
    assert findings(again).found == findings(finished).found


def test_other_settings_are_refused(finished, capsys):
    folder = finished.output
    before = [(folder / name).read_bytes() for name in ("scores.sqlite", "config.json")]
    assert main(PROGRAM, [*FLAGS, str(folder), "--seed", "1"]) == 2
    text = capsys.readouterr().err
    assert "`store` must be a new file or one of the same tasks, targets and settings" in text
    assert "seed = 0 (now 1)" in text
    assert [(folder / name).read_bytes() for name in ("scores.sqlite", "config.json")] == before
    assert main(PROGRAM, [*FLAGS, str(folder), "--seed", "-1"]) == 2
    assert "`seed` must be at least 0, got -1" in capsys.readouterr().err


def test_scores_of_other_code_are_refused_or_kept(finished, tmp_path, monkeypatch, capsys):
    """A method that trains is changed after the run, without a change of what it does."""
    (tmp_path / "scores.sqlite").write_bytes((finished.output / "scores.sqlite").read_bytes())

    def score(self, mask, repeat):
        raise AssertionError("everything is kept")

    monkeypatch.setattr(Digits, "score", score)
    assert main(PROGRAM, [*FLAGS, str(tmp_path)]) == 2
    assert "on_change" in capsys.readouterr().err
    assert main(PROGRAM, [*FLAGS, str(tmp_path), "--on-change", "keep"]) == 0
    assert scores_in(tmp_path) == scores_in(finished.output)


def test_a_score_depends_on_nothing_but_settings_and_subset_and_repeat():
    mask = torch.tensor([True, False, True, True, False, False, True, False])
    score = Digits(SMOKE).score
    first = score(mask, 0)
    score(~mask, 0)
    assert score(mask, 0) == first
    assert score(mask, 1) != first  # repeats are different trainings
