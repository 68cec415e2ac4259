"""`ksm design` draws the designs of :mod:`ksm_ext.subsets`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sweep import TASKS, frame, table

from ksm_ext import load_surrogate, subsets
from ksm_ext.cli import main

DESIGNS = {
    "mixed-sizes": lambda: subsets.mixed_sizes(5, 8, seed=3),
    "mixed-sizes --sizes 2,3": lambda: subsets.mixed_sizes(5, 8, [2, 3], seed=3),
    "bernoulli --probability 0.3": lambda: subsets.bernoulli(5, 8, 0.3, seed=3),
    "fixed-size --size 2": lambda: subsets.fixed_size(5, 8, 2, seed=3),
    "paired": lambda: subsets.paired(5, 8, probability=0.5, seed=3),
    "paired --size 2": lambda: subsets.paired(5, 8, size=2, seed=3),
    "leave-one-out --include-full": lambda: subsets.leave_one_out(5, include_full=True),
}


@pytest.mark.parametrize("design", DESIGNS)
def test_designs_are_those_of_subsets(design, there, capsys):
    Path("names.txt").write_text("\n".join(TASKS))
    call = ["design", "--tasks", "names.txt", "--num-subsets", "8", "--seed", "3", "--design"]
    assert main([*call, *design.split()]) == 0
    found = table(capsys.readouterr().out)
    assert found.columns.tolist() == TASKS
    assert torch.tensor(found.to_numpy()).bool().equal(DESIGNS[design]())


@pytest.mark.parametrize(
    ("design", "count"),
    [
        ("mixed-sizes", 30),
        ("mixed-sizes --sizes 2,2,3,5", 21),
        ("bernoulli --probability 0.3", 30),
        ("fixed-size --size 2", 10),
        ("paired", 30),
        ("paired --size 2", 20),
    ],
)
def test_a_design_has_no_more_subsets_than_there_are(design, count, capsys):
    """Where all are asked for and more, all are drawn: each once, and it is said."""
    call = ["design", "--num-tasks", "5", "--num-subsets", "100", "--design", *design.split()]
    assert main(call) == 0
    text = capsys.readouterr()
    masks = table(text.out).to_numpy()
    assert len(masks) == count == len(np.unique(masks, axis=0))
    assert f"Note: there are {count} different subsets in this design" in text.err


@pytest.mark.parametrize(
    ("options", "drawn"),
    [
        ("", {}),
        ("--strength 2 --minimum 0.01", {"strength": 2.0, "minimum": 0.01}),
        ("--strength 1,9 --maximum 0.6", {"strength": (1.0, 9.0), "maximum": 0.6}),
        ("--prior 1,2,3,4,5", {"prior": [1.0, 2.0, 3.0, 4.0, 5.0]}),
    ],
)
def test_mixtures_are_those_of_dirichlet(options, drawn, there, capsys):
    call = "design --num-tasks 5 --num-subsets 8 --seed 3 --design dirichlet"
    assert main([*call.split(), *options.split()]) == 0
    text = capsys.readouterr()
    expected = subsets.dirichlet(5, 8, seed=3, **drawn)
    np.testing.assert_allclose(table(text.out).to_numpy(), expected, rtol=1e-14)
    assert main([*call.split(), *options.split(), "-o", "mixtures.npz"]) == 0
    assert "8 mixtures of 5 tasks." in capsys.readouterr().err
    np.testing.assert_array_equal(np.load("mixtures.npz")["masks"], expected)


def test_a_wide_design_is_not_counted_to_its_end(there):
    assert main(["design", "--num-tasks", "20000", "--num-subsets", "3", "-o", "wide.npz"]) == 0
    assert np.load("wide.npz")["masks"].shape == (3, 20000)


def test_a_design_in_a_file_is_read_by_fit(there):
    for form in ("csv", "npz", "json"):
        call = ["design", "--num-tasks", "5", "--num-subsets", "24", "-o", f"masks.{form}"]
        assert main(call) == 0
        frame()[["loss"]].to_csv("loss.csv", index=False)
        call = ["fit", "loss.csv", "--masks", f"masks.{form}", "--kernel", "linear", "-o", form]
        assert main([*call, "--quiet"]) == 0
        fitted = load_surrogate(form)
        assert fitted.masks.values.equal(subsets.mixed_sizes(5, 24, seed=0))
        assert fitted.task_names == ("0", "1", "2", "3", "4")
