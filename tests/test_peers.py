"""``benchmarks/peers.py``: what it judges by, and what it says of peers that are not there."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from benchmarks import peers
from benchmarks.comparisons import common, intervals, learners, mixtures, shapley, small
from benchmarks.comparisons.common import Game
from experiments.studies.interval_coverage import draw, exact_interactions
from experiments.studies.mixtures import mixing_law

MASKS = np.array(list(product([False, True], repeat=5)))
EFFECTS = np.array([1.0, -2.0, 0.5, 3.0, 0.25])
TRIPLE = 6.0


@pytest.fixture(scope="module")
def game():
    """Effects, and a synergy of the first three tasks."""
    values = MASKS @ EFFECTS + TRIPLE * MASKS[:, :3].all(1)
    return Game("effects and a triple", "Synthetic", MASKS, values)


@pytest.fixture(scope="module")
def additive():
    return Game("effects", "Synthetic", MASKS, MASKS @ EFFECTS)


def test_exact_attributions_and_interactions_of_a_triple(game):
    in_triple = np.arange(5) < 3
    for readout, share in {"loo": 1, "shapley": 1 / 3, "banzhaf": 1 / 4}.items():
        np.testing.assert_allclose(
            game.exact[readout], EFFECTS + share * TRIPLE * in_triple, atol=1e-12
        )
        assert game.relative_error(readout, game.exact[readout]) == 0
    pairs = np.outer(in_triple, in_triple) & ~np.eye(5, dtype=bool)
    for readout, share in {"loo": 1, "shapley": 1 / 2, "banzhaf": 1 / 2}.items():
        found = exact_interactions(game.masks, game.values, readout)
        np.testing.assert_allclose(found, share * TRIPLE * pairs, atol=1e-12)


def test_scores_are_found_in_any_order_of_the_table(game):
    order = np.random.default_rng(0).permutation(len(MASKS))
    shuffled = Game("shuffled", "Synthetic", game.masks[order], game.values[order])
    np.testing.assert_array_equal(shuffled.of(MASKS[::-1]), game.values[::-1])


def test_learners_that_know_the_form_make_no_error(additive):
    order = draw("sizes", MASKS, 32, seed=0)
    for record in (
        learners.measure_peer("RidgeCV", additive, order[:20], order[20:]),
        learners.measure_ours("linear", additive, order[:20], order[20:]),
    ):
        assert max(record["nse"], record["shapley"], record["loo"]) < 1e-3


def test_the_ends_are_put_in_as_the_table_has_them(game, monkeypatch):
    """A learner that predicts the mean is left with the steps from it to the ends."""
    nothing = "sklearn", lambda masks, scores: lambda query: np.zeros(len(query))
    monkeypatch.setitem(learners.LEARNERS, "mean", nothing)
    found = learners.measure_peer("mean", game, np.arange(20), np.arange(20, 31))
    effects = {
        "shapley": np.full(5, game.values[-1] / 5),  # F(all) - F(none), shared evenly
        "loo": np.full(5, game.values[-1] - game.values[1:20].mean()),  # row 0 is the empty set
    }
    for readout, expected in effects.items():
        assert found[readout] == pytest.approx(game.relative_error(readout, expected))


@pytest.mark.parametrize("name", ["KernelSHAP", "kADDSHAP"])
def test_estimators_are_exact_when_they_may_ask_for_everything(additive, name):
    pytest.importorskip("shapiq")
    record = shapley.estimate(name, additive, budget=32, seed=0)
    assert record["shapley"] < 1e-6
    assert record["asked"] <= 32


def test_a_mixing_law_finds_its_own_form():
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.ones(4), size=60)
    losses = 2 + np.exp(0.5 - shares @ [3.0, 1.0, 0.0, -0.5])
    fitted = shares[:40], losses[:40, None]
    record = mixtures.judged(mixing_law(*fitted, shares[40:]), losses[40:, None])
    assert record["nse"] < 1e-6
    assert record["spearman"] == pytest.approx(1)


def test_coverage_of_normal_errors():
    generator = np.random.default_rng(0)
    truth, std = generator.normal(size=100_000), np.full(100_000, 0.3)
    found = intervals.coverage((truth + std * generator.normal(size=len(truth)), std, truth))
    for level in intervals.LEVELS:
        assert found[f"{level:.0%}"] == pytest.approx(level, abs=0.01)
    assert found["width"] == pytest.approx(2 * 1.2816 * 0.3, rel=0.02)


def test_ratios_are_of_cells_that_both_have():
    rows = [
        {"method": method, "game": game, "nse": nse}
        for method, game, nse in [
            *(("auto", "a", 0.2), ("auto", "b", 0.5), ("auto", "c", 1e-9)),
            *(("tree", "a", 0.4), ("tree", "c", 0.04), ("tree", "d", 7.0)),
        ]
    ]
    found = common.ratios(rows, "nse", "tree", "auto", ["game"])
    np.testing.assert_allclose(found, [2, 4])  # below FLOOR is FLOOR
    assert common.geometric_mean(found) == pytest.approx(8**0.5)


def test_peers_that_are_not_installed_are_named(monkeypatch):
    gone = {"lightgbm", "gpytorch", "shapiq"}
    real = common.find_spec
    monkeypatch.setattr(common, "find_spec", lambda name: None if name in gone else real(name))
    records = [{"absent": section.absent()} for section in (learners, mixtures, shapley)]
    (line, *_) = peers.remarks(records)
    assert line.startswith("Not installed, and so not compared: ")
    assert all(name in line for name in gone)
    assert small.absent() == intervals.absent() == []


def test_peers_that_fail_are_told():
    def fails():
        raise ArithmeticError("no minimum\nat all")

    records = [{"method": "tree", "nse": 1.0}, {"method": "tree", **common.attempted(fails)}]
    assert peers.remarks(records) == ["tree failed on 1 of 2: ArithmeticError: no minimum"]


@pytest.mark.slow
def test_the_command_puts_a_build_beside_another(tmp_path, game, capsys):
    (tmp_path / "games").mkdir()
    table = tmp_path / "games" / "Synthetic_n5__1.npz"
    np.savez(table, coalitions=game.masks, values=game.values)
    root = Path(__file__).parents[1]
    output = tmp_path / "records.json"
    flags = [str(tmp_path), "--only", "learners,intervals", "--sizes", "20", "-o", str(output)]
    flags += ["--kernels", "linear,rbf", "--before", str(root), "--peers", "none"]
    assert peers.main(flags) == 0
    printed = capsys.readouterr().out
    assert "| linear, before | 1.00 | 1.00 | 1.00 |" in printed
    methods = {row["method"] for row in json.loads(output.read_text())}
    assert methods == {"linear", "rbf", "linear, before", "rbf, before"}
