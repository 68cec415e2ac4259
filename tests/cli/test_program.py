"""The command line: from a table of scores to attributions, a selection and a report."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from ksm_ext import RBF, fit_surrogate, load_surrogate, read_scores, selection, subsets
from ksm_ext.cli import main
from ksm_ext.cli.doctor import EXTRAS

ROOT = Path(__file__).parent.parent.parent
TASKS = ["wiki", "code", "maths", "noise", "news"]
MASKS = subsets.mixed_sizes(5, 24, seed=0)


def scores():
    noise = torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = MASKS.double()
    loss = 2 - x[:, 0] - 0.5 * x[:, 1] * x[:, 2] + x[:, 3]
    return torch.stack([loss, 0.5 - 0.2 * loss], 1) + 0.02 * noise


def frame():
    tasks = pd.DataFrame(MASKS.int().numpy(), columns=TASKS)
    return pd.concat([tasks, pd.DataFrame(scores().numpy(), columns=["loss", "accuracy"])], axis=1)


def surrogate():
    names = {"task_names": TASKS, "target_names": ["loss", "accuracy"]}
    return fit_surrogate(MASKS, scores(), kernel=RBF(gamma=0.1), ridge=0.05, **names)


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a table of scores and a fitted surrogate."""
    monkeypatch.chdir(tmp_path)
    frame().to_csv("scores.csv", index=False)
    surrogate().save("s")
    return tmp_path


def table(text):
    return pd.read_csv(io.StringIO(text))


# -- a new user ---------------------------------------------------------------------------------


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
    assert [words[:2] for words in commands] == [
        ["ksm", "fit"],
        ["ksm", "attribute"],
        ["ksm", "report"],
    ]
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


@pytest.mark.parametrize("command", ["fit", "attribute", "select", "report", "design", "doctor"])
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0 and f"examples:\n  ksm {command}" in text


# -- fit ----------------------------------------------------------------------------------------


def test_fit_is_fit_surrogate_with_the_names_of_the_table(there, capsys):
    call = ["fit", "scores.csv", "--kernel", "linear,rbf", "--share-ridge", "yes", "-o", "mine"]
    assert main(call) == 0
    mine = load_surrogate("mine")
    true = fit_surrogate(MASKS, scores(), kernel=["linear", "rbf"], share_ridge=True)
    torch.testing.assert_close(mine.attribute(), true.attribute(), rtol=1e-6, atol=1e-9)
    assert list(mine.task_names) == TASKS and mine.target_names == ("loss", "accuracy")
    text = capsys.readouterr()
    assert text.out == "" and str(mine) in text.err and "loss: leave-one-out error" in text.err
    assert main([*call, "--quiet", "--ridge", "2.5", "--criterion", "rank"]) == 0
    assert capsys.readouterr() == ("", "")
    assert load_surrogate("mine").kernel_terms[0].ridge.tolist() == [2.5, 2.5]


def test_quiet_shows_no_products_of_conjugate_gradients(there, monkeypatch, capsys):
    monkeypatch.setattr("ksm_ext.surrogates.fit.MAX_DIRECT", 20)
    monkeypatch.setattr("ksm_ext.cli.commands.on_a_terminal", lambda: True)
    call = ["fit", "scores.csv", "--kernel", "rbf", "-o", "mine"]
    assert main([*call, "--quiet"]) == 0
    assert load_surrogate("mine").solver is not None and capsys.readouterr() == ("", "")
    assert main(call) == 0
    assert " products" in capsys.readouterr().err


def test_fit_says_what_every_column_is_and_how_errors_are_measured(there, capsys):
    frame().assign(seed=range(24), always=1).to_csv("more.csv", index=False)
    call = ["fit", "more.csv", "--kernel", "linear", "-o", "mine"]
    assert main(call) == 2
    advised = re.search(r"Add `(.*?)`", capsys.readouterr().err)[1]
    assert main([*call, *shlex.split(advised)]) == 0
    text = capsys.readouterr().err
    for line in (
        "  task (0 or 1)                wiki, code, maths, noise, news\n",
        "  task (constant: always 1)    always\n",
        "  target (named like a score)  loss, accuracy\n",
        "  ignored (named)              seed\n",
    ):
        assert line in text
    mean = float(load_surrogate("mine").loo_error.mean())
    assert "over the variance of the target's own scores" in text
    assert f"{mean:.3f} averaged over all targets" in text


def test_columns_are_named_by_names_globs_and_repeated_options(there):
    frame().assign(**{"run id": range(24), "a,b": 1.5, "val_a": 2.5}).to_csv("m.csv", index=False)
    call = ["fit", "m.csv", "--kernel", "linear", "--quiet", "-o", "mine", "--targets", "l*"]
    assert main([*call, "--ignore", '"a,b",run*', "--ignore", "val_*,accuracy"]) == 0
    assert load_surrogate("mine").target_names == ("loss",)
    assert main([*call, "--tasks", "wiki, code"]) == 0
    assert load_surrogate("mine").task_names == ("wiki", "code")


def test_weights_and_keys(there, capsys):
    shares = pd.DataFrame((0.5 * MASKS).numpy(), columns=TASKS).assign(index=range(24), b=range(24))
    shares[::-1].to_csv("shares.csv", index=False)
    frame()[["loss"]].assign(index=range(24), b=range(24)).to_csv("loss.csv", index=False)
    call = ["fit", "loss.csv", "--masks", "shares.csv", "--kernel", "linear", "-o", "mine"]
    assert main(call) == 2
    assert "`key` must be one column that joins" in capsys.readouterr().err
    assert main([*call, "--key", "index", "--ignore", "b"]) == 2
    assert "Add `--weights`" in capsys.readouterr().err
    assert main([*call, "--key", "index", "--ignore", "b", "--weights"]) == 0
    assert load_surrogate("mine").masks.values.equal(0.5 * MASKS.double())


def test_fit_of_another_file_of_masks(there):
    frame()[TASKS].to_csv("masks.csv", index=False)
    frame()[["loss", "accuracy"]].to_json("scores.json", orient="records")
    call = ["fit", "scores.json", "--masks", "masks.csv", "--targets", "accuracy"]
    assert main([*call, "--kernel", "linear", "-o", "mine"]) == 0
    assert load_surrogate("mine").target_names == ("accuracy",)


def test_tasks_that_are_one(there, capsys):
    frame().assign(twin=frame()["code"]).to_csv("twins.csv", index=False)
    call = ["fit", "twins.csv", "--kernel", "linear", "-o", "mine"]
    assert main(call) == 0
    assert "the 6 tasks are 5 that differ" in capsys.readouterr().err
    assert main([*call, "--merge-duplicates"]) == 0
    assert list(load_surrogate("mine").task_names) == TASKS


# -- attribute ----------------------------------------------------------------------------------


@pytest.mark.parametrize("index", ["loo", "shapley", "banzhaf"])
def test_attributions_are_those_of_the_surrogate(index, there, capsys):
    assert main(["attribute", "s", "--index", index, "--sort", "none"]) == 0
    found = table(capsys.readouterr().out)
    value, std = surrogate().attribute(index, return_std=True)
    assert found["task"].tolist() == 2 * TASKS
    assert found["target"].tolist() == 5 * ["loss"] + 5 * ["accuracy"]
    for name, true in (
        ("value", value),
        ("std", std),
        ("low", value - 1.959964 * std),
        ("high", value + 1.959964 * std),
    ):
        np.testing.assert_allclose(found[name], true.T.flatten(), rtol=1e-10)


def test_interactions_are_those_of_the_surrogate(there, capsys):
    assert main(["attribute", "s", "--interactions", "--target", "loss"]) == 0
    found = table(capsys.readouterr().out)
    value, std = surrogate().interactions("loo", return_std=True)
    assert len(found) == 10 and found["value"].abs().is_monotonic_decreasing
    assert set(found.iloc[0][["task", "other_task"]]) == {"code", "maths"}
    for row in found.itertuples():
        i, j = TASKS.index(row.task), TASKS.index(row.other_task)
        assert row.value == pytest.approx(value[i, j, 0].item(), rel=1e-10)
        assert row.std == pytest.approx(std[i, j, 0].item(), rel=1e-10)


def test_sorted_and_cut(there, capsys):
    for sort, best in (("size", [3, 0]), ("value", [3, 2])):
        call = ["attribute", "s", "--sort", sort, "--top", "2", "--format", "json"]
        assert main([*call, "--target", "loss", "--no-intervals"]) == 0
        rows = json.loads(capsys.readouterr().out)
        value = surrogate().attribute()[:, 0]
        by = value.abs() if sort == "size" else value
        true = by.argsort(descending=True)[:2].tolist()
        assert [TASKS.index(row["task"]) for row in rows] == true
        assert true[0] == best[0] and all(row["std"] is None for row in rows)


def test_a_table_for_the_eye(there, capsys):
    assert main(["attribute", "s", "--format", "table", "--top", "1"]) == 0
    header, first, _ = capsys.readouterr().out.splitlines()
    assert header.split() == ["task", "target", "value", "std", "low", "high"]
    assert first.split()[:2] == ["noise", "loss"] and len(first) == len(header)


def test_without_intervals_the_columns_stay_empty(there, capsys):
    rows = [[0.2, 0.8], [0.5, 0.5], [0.7, 0.3], [0.4, 0.6]]
    pd.DataFrame(rows, columns=["a", "b"]).to_csv("shares.csv", index=False)
    pd.DataFrame({"loss": [1.0, 2.0, 2.5, 1.4]}).to_csv("losses.csv", index=False)
    main(["fit", "losses.csv", "--masks", "shares.csv", "-o", "mine", "--quiet"])
    assert main(["attribute", "mine"]) == 0
    text = capsys.readouterr()
    assert "no intervals" in text.err and table(text.out)["std"].isna().all()


def test_missing_scores_and_noise_are_options_of_fit(there, capsys):
    frame = pd.read_csv("scores.csv")
    frame.loc[[2, 5], "loss"] = np.nan
    frame.to_csv("holes.csv", index=False)
    assert main(["fit", "holes.csv", "-o", "mine"]) == 2
    error = capsys.readouterr().err
    assert "'loss' of holes.csv" in error and "`--missing=drop`" in error
    assert main(["fit", "holes.csv", "-o", "mine", "--missing=drop", "--noise-std", "0.5"]) == 0
    assert "noise of a run 0.5, 0.5" in capsys.readouterr().err
    expected = fit_surrogate(
        torch.tensor(frame.iloc[:, :5].to_numpy(bool)),
        torch.tensor(frame[["loss", "accuracy"]].to_numpy()),
        missing="drop",
        noise_std=0.5,
    )
    found = load_surrogate("mine").attribute("shapley")
    torch.testing.assert_close(torch.as_tensor(found), expected.attribute("shapley"))


# -- select -------------------------------------------------------------------------------------


def test_select_is_under_budget(there, capsys):
    costs = [1.0, 2.0, 3.0, 1.0, 1.0]
    pd.DataFrame({"task": TASKS[::-1], "cost": costs[::-1]}).to_csv("costs.csv", index=False)
    call = ["select", "s", "--budget", "6", "--costs", "costs.csv", "--minimize"]
    fitted = surrogate()
    options = {"maximize": False, "target_weights": [1.0, 0.0]}
    for extra, true in (
        ([], selection.under_budget(fitted, costs, 6, **options)),
        (["--exact"], selection.exact(fitted, 5, costs=costs, budget=6, **options)),
    ):
        assert main([*call, "--target", "loss", *extra]) == 0
        text = capsys.readouterr()
        found = table(text.out)
        assert tuple(map(TASKS.index, found["task"])) == true.tasks
        assert found["spent"].iloc[-1] <= 6 and f"predicted score {true.score:.4g}" in text.err


def test_targets_of_one_direction_are_averaged_in_standard_deviations(there, capsys):
    """The unit of a target decides nothing: one is a thousand times as large as the other."""
    both = scores()[:, :1] * torch.tensor([1.0, 1000.0]) + torch.tensor([0.0, 7.0])
    both[:, 1] += 500 * MASKS[:, 4]
    names = {"task_names": TASKS, "target_names": ["loss", "val_loss"]}
    fitted = fit_surrogate(MASKS, both, kernel=RBF(gamma=0.1), ridge=0.05, **names)
    fitted.save("both")
    call = ["select", "both", "--budget", "3", "--minimize", "--target", "loss"]
    assert main([*call, "--target", "val_loss"]) == 0
    text = capsys.readouterr()
    units = lambda masks: (fitted.predict(masks) - both.mean(0)) / both.std(0)  # noqa: E731
    true = selection.under_budget(units, torch.ones(5), 3, maximize=False)
    assert tuple(map(TASKS.index, table(text.out)["task"])) == true.tasks
    assert f"predicted score {true.score:.4g}, averaged over targets in standard" in text.err
    np.testing.assert_allclose(table(text.out)["score"], true.path, rtol=1e-10)


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        ("all", "`target` must be one of loss, accuracy, got all of them"),
        ("loss accuracy", "must be names of scores of one direction, got 'loss' and 'accuracy'"),
    ],
)
def test_a_loss_and_an_accuracy_are_not_averaged(targets, found, there, capsys):
    named = [word for name in targets.split() for word in ("--target", name)]
    assert main(["select", "s", "--budget", "2", "--maximize", *named]) == 2
    assert found in capsys.readouterr().err


def test_all_of_one_target_is_that_one(there, capsys):
    main(["fit", "scores.csv", "--targets", "loss", "--ignore", "accuracy", "-o", "one", "--quiet"])
    assert main(["select", "one", "--budget", "2", "--minimize", "--target", "all"]) == 0
    assert "averaged" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("costs", "found"),
    [
        ("task,cost\nwiki,1\n", "no cost of 'code'"),
        ("name,price\nwiki,1\n", "got name, price"),
        ("task,cost\n" + "".join(f"{name},1\n" for name in [*TASKS, "law"]), "another or"),
        ("task,cost\n" + "".join(f"{name},free\n" for name in TASKS), "must be numbers"),
        ("task,cost\n" + "".join(f"{name},-1\n" for name in TASKS), "must be positive"),
        (json.dumps({"task": TASKS, "cost": [1]}), "must be one cost per task"),
        (json.dumps({"task": TASKS, "cost": [[1], [1, 2], [], None, 1]}), "must be numbers"),
    ],
)
def test_costs_are_checked(costs, found, there, capsys):
    Path("costs.csv").write_text(costs)
    call = ["select", "s", "--budget", "3", "--costs", "costs.csv", "--maximize"]
    assert main([*call, "--target", "loss"]) == 2
    assert found in capsys.readouterr().err


# -- design -------------------------------------------------------------------------------------

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


def test_a_wide_design_is_not_counted_to_its_end(there):
    assert main(["design", "--num-tasks", "20000", "--num-subsets", "3", "-o", "wide.npz"]) == 0
    assert np.load("wide.npz")["masks"].shape == (3, 20000)


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


# -- report and doctor --------------------------------------------------------------------------


def test_report_of_held_out_scores(there):
    assert main(["report", "s", "-o", "r.html", "--title", "My <tasks>"]) == 0
    page = Path("r.html").read_text()
    assert "My &lt;tasks&gt;" in page and "Leave-one-out predictions of 24 subsets" in page
    frame().iloc[:10, ::-1].to_csv("new.csv", index=False)  # columns in another order
    assert main(["report", "s", "-o", "h.html", "--held-out", "new.csv", "--target", "loss"]) == 0
    assert "Held-out predictions of 10 subsets: Spearman 0.9" in Path("h.html").read_text()
    frame().assign(seed=range(24), notes="ok", news2=1).to_csv("new.csv", index=False)
    assert main(["report", "s", "-o", "h.html", "--held-out", "new.csv"]) == 0
    frame().drop(columns="wiki").to_csv("new.csv", index=False)
    assert main(["report", "s", "-o", "h.html", "--held-out", "new.csv"]) == 2


def test_doctor_runs_an_operator(capsys):
    assert main(["doctor"]) == 0
    assert "operators   on cpu: works" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["works"] and facts["versions"]["torch"] == torch.__version__
    assert facts["build"]["cpu_instruction_set"] in ("avx512", "avx2", "portable")


def test_doctor_says_what_is_wrong_and_what_is_missing(monkeypatch, capsys):
    wrong = lambda *args, **options: torch.zeros(4, 4)  # noqa: E731
    monkeypatch.setattr("ksm_ext.cli.doctor.ops.mask_gram", wrong)
    monkeypatch.setattr("ksm_ext.cli.doctor.find_spec", lambda name: None)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "on cpu: is wrong by 1" in text and "reinstall" in text
    assert 'matplotlib, for figures: ksm_ext.plotting: pip install "ksm_ext[plot]"' in text

    def broken(*args, **options):
        raise RuntimeError("no kernel")

    monkeypatch.setattr("ksm_ext.cli.doctor.ops.mask_gram", broken)
    assert main(["doctor"]) == 1 and "fails: no kernel" in capsys.readouterr().out


def test_extras_named_by_the_doctor_exist():
    text = (ROOT / "pyproject.toml").read_text()
    for name in re.findall(r"ksm_ext\[(\w+)\]", " ".join(extra.install for extra in EXTRAS)):
        assert f"\n{name} = [" in text


# -- what goes wrong ----------------------------------------------------------------------------


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
        ("select s --budget 2 --maximize", "`target` must be one of loss, accuracy, got none"),
        ("select s --budget -1 --maximize --target loss", "`budget` must be non-negative"),
        ("report s -o r.html --target los", "`target` must be a number or one of 'loss'"),
        ("design --num-tasks 5", "`num-subsets` must be given for this design"),
        ("design --num-tasks 5 --num-subsets 3 --design fixed-size", "`size` must be given"),
        ("design --tasks none.txt --num-subsets 3", "`tasks` must be a file, got none.txt"),
        ("design --tasks s --num-subsets 3", "`s` must be text in UTF-8"),
    ],
)
def test_bad_input_is_2(call, said, there, capsys):
    assert main(call.split()) == 2
    text = capsys.readouterr()
    assert text.out == "" and text.err.splitlines()[-1].startswith("ksm: error: ")
    assert said in text.err and "Traceback" not in text.err


@pytest.mark.parametrize(
    "call",
    ["", "fit", "fit scores.csv", "select s --budget 2", "design --num-tasks 0", "nothing"],
)
def test_bad_arguments_are_2(call, capsys):
    with pytest.raises(SystemExit) as ended:
        main(call.split())
    assert ended.value.code == 2 and "usage: ksm" in capsys.readouterr().err


def test_failures_are_1_and_interrupts_130(there, monkeypatch, capsys):
    def fail(error):
        def fit_surrogate(*args, **options):
            raise error

        monkeypatch.setattr("ksm_ext.cli.commands.fit_surrogate", fit_surrogate)
        return main(["fit", "scores.csv", "-o", "x"])

    assert fail(RuntimeError("no memory")) == 1
    assert "ksm: error: no memory" in capsys.readouterr().err
    assert fail(KeyboardInterrupt()) == 130
    assert capsys.readouterr().err.endswith("\nInterrupted.\n")
    assert fail(OSError(28, "No space left on device")) == 1
    assert capsys.readouterr().err.endswith("ksm: error: No space left on device\n")


# -- pipes --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pipes_and_a_reader_that_has_enough(there):
    """A surrogate through a pipe, and more rows than a pipe holds to a reader that leaves."""
    masks = subsets.bernoulli(3000, 4, 0.5, seed=0)
    many = pd.DataFrame(masks.int().numpy(), columns=[f"task {i}" for i in range(3000)])
    many.assign(loss=[0.5, 0.1, 0.9, 0.2]).to_csv("many.csv", index=False)
    ksm = f"{shlex.quote(sys.executable)} -m ksm_ext.cli"
    line = (
        f"{ksm} fit - --kernel linear --ridge 1 --quiet -o - < many.csv | "
        f"{ksm} attribute - | head -n 2; echo ${{PIPESTATUS[@]}}"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=True, env=environment
    )
    header, first, status = run.stdout.splitlines()
    assert header == "task,target,value,std,low,high" and first.startswith("task ")
    assert status == "0 0 0" and run.stderr == ""
