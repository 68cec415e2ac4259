"""`ksm design` draws the designs of :mod:`ksm_ext.subsets`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sweep import TASKS, frame, surrogate, table

from ksm_ext import load_surrogate, next_best, subsets
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


@pytest.mark.parametrize("question", ["loo", "shapley", "banzhaf", "prediction"])
def test_a_design_for_a_question_is_that_of_python(question, there, capsys):
    frame().head(6).to_csv("scores.csv", index=False)
    Path("names.txt").write_text("\n".join(TASKS))
    call = ["design", "--tasks", "names.txt", "--num-subsets", "9", "--seed", "3", "--for"]
    options = {"readout": question, "seed": 3}
    for more, extra in (
        ([], {}),
        (["--include-empty"], {"include_empty": True}),
        (["--known", "scores.csv"], {"known": frame()[TASKS].head(6).to_numpy()}),
    ):
        assert main([*call, question, *more]) == 0
        text = capsys.readouterr()
        begins_nowhere = question == "shapley" and "--include-empty" not in more
        assert ("--include-empty if it has a score" in text.err) is begins_nowhere
        found = torch.tensor(table(text.out).to_numpy()).bool()
        assert found.equal(subsets.design(5, 9, **options, **extra))


def test_a_second_design_continues_the_first(there):
    """In every layout, by name or by number, with scores or without."""
    start = ["design", "--num-tasks", "6", "--for", "shapley"]
    for form in ("csv", "npz", "json"):
        assert main([*start, "--num-subsets", "20", "-o", f"one.{form}"]) == 0
        more = ["--num-subsets", "43", "--known", f"one.{form}", "-o", "two.npz"]
        assert main([*start, *more]) == 0
        one, two = subsets.design(6, 20, seed=0), torch.tensor(np.load("two.npz")["masks"])
        assert len(torch.cat([one, two]).unique(dim=0)) == 63  # all but the empty set
    np.savez("bare.npz", masks=one.numpy())
    assert main([*start, "--num-subsets", "43", "--known", "bare.npz", "-o", "three.npz"]) == 0
    assert torch.tensor(np.load("three.npz")["masks"]).equal(two)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("--for loo", "`num-subsets` must be given for this design, got none."),
        ("--num-subsets 4 --known m.csv", "`known` must be given with --for"),
        ("--num-subsets 4 --include-empty", "`include-empty` must be given with --for"),
        ("--num-subsets 4 --for loo --known m.csv", "`m.csv` must be a column for every task"),
        ("--num-subsets 4 --for loo --known s.csv", "`'1' of s.csv` must be 0 or 1 in every row"),
        ("--num-subsets 4 --for loo --known t.csv", "`'1' of t.csv` must be 0 or 1 in every row"),
    ],
)
def test_what_a_design_for_a_question_refuses(call, text, there, capsys):
    Path("m.csv").write_text("0,2\n1,0\n")
    Path("s.csv").write_text("0,1,2\n1,0,1\n1,0.5,1\n")
    Path("t.csv").write_text("0,1,2\n1,here,1\n")
    assert main(["design", "--num-tasks", "3", *call.split()]) == 2
    assert text in capsys.readouterr().err


def test_what_tells_most_is_next_best(there):
    call = ["next", "s", "--num-subsets", "3", "--seed", "2"]
    for question in ("loo", "prediction"):
        assert main([*call, "--for", question, "-o", "next.npz"]) == 0
        found = np.load("next.npz")
        assert found["task_names"].tolist() == TASKS
        expected = next_best(surrogate(), 3, question, seed=2)
        assert torch.tensor(found["masks"]).equal(expected)
