"""The digits experiment end to end on its smallest preset: found, resumable, refusing."""

import json

import joblib
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from experiments.digits.pipeline import PRESETS, Settings, load, train_and_score
from experiments.digits.run import main, run
from experiments.digits.store import ScoreStore

SMOKE = PRESETS["smoke"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder of a finished run, and its result."""
    folder = tmp_path_factory.mktemp("digits")
    with joblib.parallel_config("sequential"):
        return folder, run(SMOKE, folder)


def test_the_shuffled_groups_are_found(finished):
    _, result = finished
    assert sorted(result.found) == list(result.planted) == list(load(SMOKE).bad)
    assert result.check[1][0] < result.check[0][0]  # without them the test loss falls


def test_everything_is_written(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    files = {"attributions.png", "config.json", "report.html", "scores.jsonl"}
    assert names == files | {"surrogate.safetensors"}
    config = (folder / "config.json").read_text()
    assert json.loads(config)["settings"]["num_subsets"] == SMOKE.num_subsets
    assert str(folder) not in config
    assert len((folder / "scores.jsonl").read_bytes().splitlines()) == 1 + SMOKE.num_subsets + 2


def test_a_torn_line_is_trained_again_and_nothing_else(finished, tmp_path, capsys, monkeypatch):
    folder, result = finished
    content = (folder / "scores.jsonl").read_bytes()
    lines = content.splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_bytes(b"".join(lines[:10]) + lines[10][:-7])
    trained = []

    def spy(settings: Settings, subset: str) -> list[list[float]]:
        trained.append(subset)
        return train_and_score(settings, subset)

    monkeypatch.setattr("experiments.digits.run.train_and_score", spy)
    with joblib.parallel_config("sequential"):
        again = run(SMOKE, tmp_path)
    assert sorted(trained) == sorted(json.loads(line)["subset"] for line in lines[10:])
    assert (tmp_path / "scores.jsonl").read_bytes() == content
    assert again.found == result.found
    printed = capsys.readouterr().out
    assert "cut short" in printed and "Resuming: 9 of 24 subsets are done." in printed


@pytest.mark.parametrize("keep", [0, 5])
def test_a_torn_header_starts_over(finished, tmp_path, keep):
    path = tmp_path / "scores.jsonl"
    path.write_bytes((finished[0] / "scores.jsonl").read_bytes()[:keep])
    with ScoreStore(path, SMOKE) as store:
        store.add("1" * 8, [[0.5, 0.9]])
    with ScoreStore(path, SMOKE) as store:
        assert store.scores == {"1" * 8: [[0.5, 0.9]]}


def test_other_settings_are_refused(finished, capsys):
    folder, _ = finished
    arguments = ["--preset", "smoke", "--jobs", "1", "--output", str(folder)]
    before = (folder / "scores.jsonl").read_bytes()
    assert main([*arguments, "--seed", "1"]) == 2
    text = capsys.readouterr().err
    assert "`output` must be a new folder or one of the same settings" in text
    assert "seed = 0 (now 1)" in text
    assert (folder / "scores.jsonl").read_bytes() == before


def test_damage_before_the_end_is_refused(finished, tmp_path):
    lines = (finished[0] / "scores.jsonl").read_bytes().splitlines(keepends=True)
    lines[3] = b"\x00\xff\n"
    (tmp_path / "scores.jsonl").write_bytes(b"".join(lines))
    with pytest.raises(ValueError, match=r"scores.jsonl, line 4\. Delete"):
        ScoreStore(tmp_path / "scores.jsonl", SMOKE)


def test_a_score_depends_on_nothing_but_settings_and_subset():
    first = train_and_score(SMOKE, "10110010")
    train_and_score(SMOKE, "11110000")
    assert train_and_score(SMOKE, "10110010") == first
    assert first[0] != first[1]  # repeats are different trainings
