"""The digits experiment end to end on its smallest preset: found, resumable, refusing."""

import json
import sqlite3
from contextlib import closing

import joblib
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments.digits.pipeline import PRESETS, load, train_and_score
from experiments.digits.run import main, run
from ksm_ext.scores.retraining import _run

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of a finished run, and its result."""
    folder = tmp_path_factory.mktemp("digits")
    with joblib.parallel_config("sequential"):
        return folder, run(SMOKE, folder)


def scores_in(folder):
    with closing(sqlite3.connect(folder / "scores.sqlite")) as database:
        return set(database.execute("SELECT subset, seed, scores FROM runs"))


def test_the_shuffled_groups_are_found(finished):
    _, result = finished
    assert sorted(result.found) == list(result.planted) == list(load(SMOKE).bad)
    assert result.check[1][0] < result.check[0][0]  # without them the test loss falls


def test_everything_is_written(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    files = {"attributions.png", "config.json", "report.html", "scores.sqlite"}
    assert names == files | {"surrogate.safetensors"}
    config = (folder / "config.json").read_text()
    assert json.loads(config)["settings"]["num_subsets"] == SMOKE.num_subsets
    assert str(folder) not in config
    assert len(scores_in(folder)) == (SMOKE.num_subsets + 2) * SMOKE.num_repeats


def test_only_what_is_missing_is_trained_again(finished, tmp_path, monkeypatch):
    folder, result = finished
    store = tmp_path / "scores.sqlite"
    store.write_bytes((folder / "scores.sqlite").read_bytes())
    with closing(sqlite3.connect(store)) as database, database:
        lost = set(database.execute("SELECT subset, seed FROM runs WHERE subset LIKE '10%'"))
        database.execute("DELETE FROM runs WHERE subset LIKE '10%'")
    trained = set()

    def spy(train, subset, seed, caller):
        trained.add((subset, seed))
        return _run(train, subset, seed, caller)

    monkeypatch.setattr("ksm_ext.scores.retraining._run", spy)  # another `train` would be refused
    with joblib.parallel_config("sequential"):
        again = run(SMOKE, tmp_path)
    assert trained == lost != set()
    assert scores_in(tmp_path) == scores_in(folder)
    assert again.found == result.found


def test_other_settings_are_refused(finished, capsys):
    folder, _ = finished
    arguments = ["--preset", "smoke", "--jobs", "1", "--output", str(folder)]
    before = [(folder / name).read_bytes() for name in ("scores.sqlite", "config.json")]
    assert main([*arguments, "--seed", "1"]) == 2
    text = capsys.readouterr().err
    assert "`store` must be a new file or one of the same tasks, targets and settings" in text
    assert "seed = 0 (now 1)" in text
    assert [(folder / name).read_bytes() for name in ("scores.sqlite", "config.json")] == before


def test_a_score_depends_on_nothing_but_settings_and_subset_and_repeat():
    mask = torch.tensor([True, False, True, True, False, False, True, False])
    first = train_and_score(SMOKE, mask, 0)
    train_and_score(SMOKE, ~mask, 0)
    assert train_and_score(SMOKE, mask, 0) == first
    assert train_and_score(SMOKE, mask, 1) != first  # repeats are different trainings
