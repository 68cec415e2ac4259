"""The commands that fit, ask and show a surrogate do what the library does."""

import json
import re
import shlex
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sweep import MASKS, TASKS, frame, scores, surrogate, table

import ksm_ext
from ksm_ext import RBF, fit_surrogate, load_surrogate, selection, subsets
from ksm_ext.cli import main
from ksm_ext.scores.runs import RunStore
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.quality import suitability
from ksm_ext.tables.scores import read_scores


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


def test_fit_says_what_every_column_is_and_how_errors_are_measured(there, capsys):
    frame().assign(seed=range(24), always=1).to_csv("more.csv", index=False)
    call = ["fit", "more.csv", "--kernel", "linear", "-o", "mine"]
    assert main(call) == 2
    advised = re.search(r"Add `(.*?)`", capsys.readouterr().err)[1]
    assert main([*call, *shlex.split(advised)]) == 0
    text = capsys.readouterr().err
    assert text.startswith(
        "  task (0 or 1)                wiki, code, maths, noise, news\n"
        "  target (named like a score)  loss, accuracy\n"
        "  ignored (named)              seed\n"
        "  task (constant: always 1)    always\n"
    )
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


def test_quiet_shows_no_products_of_conjugate_gradients(there, monkeypatch, capsys):
    monkeypatch.setattr("ksm_ext.surrogates.fit.MAX_DIRECT", 20)
    monkeypatch.setattr("ksm_ext.cli.commands.on_a_terminal", lambda: True)
    call = ["fit", "scores.csv", "--kernel", "rbf", "-o", "mine"]
    assert main([*call, "--quiet"]) == 0
    assert load_surrogate("mine").solver is not None and capsys.readouterr() == ("", "")
    assert main(call) == 0
    assert " products" in capsys.readouterr().err


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


def test_tasks_that_are_one(there, capsys):
    frame().assign(twin=frame()["code"]).to_csv("twins.csv", index=False)
    call = ["fit", "twins.csv", "--kernel", "linear", "-o", "mine"]
    assert main(call) == 0
    assert "the 6 tasks are 5 that differ" in capsys.readouterr().err
    assert main([*call, "--merge-duplicates"]) == 0
    assert list(load_surrogate("mine").task_names) == TASKS


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
def test_attributions_are_those_of_the_surrogate(readout, there, capsys):
    assert main(["attribute", "s", "--readout", readout, "--sort", "none"]) == 0
    text = capsys.readouterr()
    found = table(text.out)
    sizes = suitability(surrogate(), readout)
    note = f"Note: {sizes.verdict} `ksm design --for {readout}`"
    assert (note in text.err) is not sizes.suits and sizes.suits is (readout != "loo")
    value, std = surrogate().attribute(readout, return_std=True)
    assert found["task"].tolist() == 2 * TASKS
    assert found["target"].tolist() == 5 * ["loss"] + 5 * ["accuracy"]
    ends = {"low": value - quantile(0.95) * std, "high": value + quantile(0.95) * std}
    for name, true in {"value": value, "std": std, **ends}.items():
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


def test_without_intervals_the_columns_stay_empty(there, capsys):
    older = Path(__file__).parents[1] / "data" / "format_2_lasso.safetensors"
    assert main(["attribute", str(older)]) == 0
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
    holes = torch.tensor(frame[["loss", "accuracy"]].to_numpy())
    expected = fit_surrogate(MASKS, holes, missing="drop", noise_std=0.5)
    found = load_surrogate("mine").attribute("shapley")
    torch.testing.assert_close(found, expected.attribute("shapley"))


def mixtures():
    """A surrogate of two losses of four shares, saved as m."""
    shares = subsets.dirichlet(4, 40, seed=0)
    losses = torch.exp(-shares.sqrt() @ torch.tensor([[1.0, 4], [3, 2], [0, 1], [2, 0]]).double())
    names = {"task_names": ["a", "b", "c", "d"], "target_names": ["one loss", "other loss"]}
    fitted = fit_surrogate(shares, losses, **names)
    fitted.save("m")
    return fitted


@pytest.mark.parametrize("targets", [["one loss"], ["one loss", "other loss"]])
def test_the_mixture_selected_is_the_best(targets, there, capsys):
    fitted = mixtures()
    named = [word for name in targets for word in ("--target", name)]
    call = ["select", "m", "--mixture", "--minimize", *named, "--maximum", "0.6"]
    assert main([*call, "--confidence", "0.9"]) == 0
    text = capsys.readouterr()
    scale = fitted.scores.std(0)
    weights = 1 / scale if len(targets) > 1 else torch.tensor([1.0, 0.0])
    options = {"maximize": False, "target_weights": weights}
    best = selection.best_mixture(fitted, bounds=(0.0, 0.6), confidence=0.9, **options)
    found = table(text.out)
    assert found["task"].tolist() == ["a", "b", "c", "d"]
    np.testing.assert_allclose(found["share"], best.shares, atol=1e-12)
    np.testing.assert_allclose(found["nearest_fitted"], fitted.masks.values[best.nearest])
    predicted = fitted.predict(best.shares[None])[0]
    score = float(((predicted - fitted.scores.mean(0)) / scale).mean())
    score = score if len(targets) > 1 else float(predicted[0])
    assert f"Predicted score {score:.4g} with" in text.err


def test_mixtures_have_no_budget_and_masks_no_mixture(there, capsys):
    mixtures()
    assert main(["select", "m", "--budget", "2", "--minimize", "--target", "one loss"]) == 2
    assert "of mixtures add `--mixture`" in capsys.readouterr().err
    assert main(["select", "s", "--mixture", "--minimize", "--target", "loss"]) == 2
    assert "`masks` must be shares of mixtures" in capsys.readouterr().err


def test_attributions_of_mixtures_have_intervals(there, capsys):
    value, std = mixtures().attribute(return_std=True)
    assert main(["attribute", "m", "--sort", "none"]) == 0
    found = table(capsys.readouterr().out)
    np.testing.assert_allclose(found["value"], value.T.flatten(), rtol=1e-10)
    np.testing.assert_allclose(found["std"], std.T.flatten(), rtol=1e-6)


def test_select_is_under_budget(there, capsys):
    costs = [1.0, 2.0, 3.0, 1.0, 1.0]
    pd.DataFrame({"task": TASKS[::-1], "cost": costs[::-1]}).to_csv("costs.csv", index=False)
    call = ["select", "s", "--budget", "6", "--costs", "costs.csv", "--minimize"]
    fitted = surrogate()
    options = {"maximize": False, "target_weights": [1.0, 0.0]}
    greedy = selection.under_budget(fitted, costs, 6, **options)
    best = selection.exact(fitted, 5, costs=costs, budget=6, **options)
    for extra, true in (([], greedy), (["--exact"], best)):
        assert main([*call, "--target", "loss", *extra]) == 0
        text = capsys.readouterr()
        found = table(text.out)
        assert tuple(map(TASKS.index, found["task"])) == true.tasks
        firsts = torch.zeros(len(found), 5)
        for row, task in enumerate(true.tasks):
            firsts[row:, task] = 1
        np.testing.assert_allclose(found["score"], fitted.predict(firsts)[:, 0], rtol=1e-10)
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


def test_estimates_are_read_from_tables_and_surrogates(there, capsys):
    """Columns in any order, of the same names; or what ksm fit saved of them."""
    cheap = fit_surrogate(
        MASKS, 0.5 * scores() + 1, task_names=TASKS, target_names=["loss", "accuracy"]
    )
    cheap.save("cheap.safetensors")
    table = frame()
    table[["loss", "accuracy"]] = 0.5 * table[["loss", "accuracy"]] + 1
    table[table.columns[::-1]].assign(seed=1).to_csv("cheap.csv", index=False)
    frame()[:10].to_csv("few.csv", index=False)
    expected = fit_surrogate(MASKS[:10], scores()[:10], estimates=cheap).attribute()
    cheap.save("cheap.st")
    for source in ("cheap.csv", "cheap.safetensors", "cheap.st"):
        assert main(["fit", "few.csv", "--estimates", source, "-o", "mine"]) == 0
        assert "estimates times" in capsys.readouterr().err
        found = load_surrogate("mine")
        torch.testing.assert_close(found.attribute(), expected, rtol=1e-6, atol=1e-8)
    frame().rename(columns={"wiki": "web"}).to_csv("other.csv", index=False)
    assert main(["fit", "few.csv", "--estimates", "other.csv", "-o", "mine"]) == 2
    assert "'wiki'" in capsys.readouterr().err


def test_a_map_a_criterion_and_learnt_decays_are_those_of_python(there, capsys):
    call = ["fit", "scores.csv", "-o", "mine"]
    named = ["--kernel", "ard", "--criterion", "attribution"]
    assert main([*call, *named, "--warp", "normal", "--ignore", "loss"]) == 0
    assert "go through a normal map of the scores" in capsys.readouterr().err
    options = {"warp": "normal", "kernel": "ard", "criterion": "attribution"}
    mine, true = load_surrogate("mine"), fit_surrogate(MASKS, scores()[:, 1], **options)
    assert mine.warp_notes and not mine.with_design(mine.masks).warps
    torch.testing.assert_close(mine.predict(MASKS)[:, 0], true.predict(MASKS), rtol=1e-5, atol=1e-6)
    assert main([*call, "--warp", "logit", "--ignore", "loss"]) == 2
    assert "`scores` must be in [0, 1] and apart for warp='logit'" in capsys.readouterr().err


# -- comparing and watching ---------------------------------------------------------------------


def test_compare_is_the_difference_of_attributions(there, capsys):
    """Beside another surrogate of more tasks in another order."""
    masks = subsets.mixed_sizes(6, 40, seed=1)
    other = fit_surrogate(
        masks,
        masks.double() @ torch.tensor([0.0, 1.0, 0.0, -0.5, 0.3, -1.0]).double(),
        task_names=["extra", *TASKS[::-1]],
        target_names=["loss"],
    )
    other.save("other")
    assert main(["compare", "s", "other", "--readout", "shapley"]) == 0
    text = capsys.readouterr()
    found = table(text.out)
    assert set(found["task"]) == set(TASKS) and set(found["target"]) == {"loss"}
    (a, a_std), (b, b_std) = (
        each.attribute("shapley", return_std=True) for each in (surrogate(), other)
    )
    for row in found.itertuples():
        i, j = TASKS.index(row.task), other.task_names.index(row.task)
        difference = float(b[j] - a[i, 0])
        half = quantile(0.95) * float((a_std[i, 0] ** 2 + b_std[j] ** 2).sqrt())
        assert row.difference == pytest.approx(difference, rel=1e-8)
        assert (row.low, row.high) == pytest.approx((difference - half, difference + half))
    assert found["difference"].abs().is_monotonic_decreasing
    rank = spearmanr(found["one"], found["other"]).statistic
    assert f"loss: Spearman correlation {rank:.3f} over 5 tasks" in text.err
    clear = int(((found["low"] > 0) | (found["high"] < 0)).sum())
    assert f"{clear} differences are clear of zero" in text.err


def test_surrogates_of_other_tasks_are_not_compared(there, capsys):
    masks = subsets.mixed_sizes(5, 24, seed=0)
    fit_surrogate(masks, masks.sum(1).double()).save("other")
    assert main(["compare", "s", "other"]) == 2
    assert "must be surrogates that share tasks (two at least)" in capsys.readouterr().err


def test_a_column_of_weights_is_fitted_with(there):
    """Rows of weight 0 are left out, those of 2 are as sure as two runs."""
    weights = np.arange(24) % 3
    frame().assign(sure=weights).to_csv("weighted.csv", index=False)
    call = ["fit", "weighted.csv", "--kernel", "linear", "--ridge", "0.5", "-o", "w", "--quiet"]
    assert main([*call, "--sample-weight", "sure"]) == 0
    names = {"task_names": TASKS, "target_names": ["loss", "accuracy"]}
    options = {"kernel": "linear", "ridge": 0.5, "sample_weight": weights, **names}
    expected = fit_surrogate(MASKS, scores(), **options).attribute()
    torch.testing.assert_close(load_surrogate("w").attribute(), expected)
    rows = np.arange(24).repeat(weights)
    frame().iloc[rows].to_csv("repeated.csv", index=False)
    assert main(["fit", "repeated.csv", *call[2:6], "-o", "r", "--quiet"]) == 0
    torch.testing.assert_close(load_surrogate("r").attribute(), expected)
    watch = ["watch", "weighted.csv", *call[2:6], "--sample-weight", "sure", "--until", "9"]
    assert main([*watch, "-o", "w.html"]) == 0


def test_watch_fits_again_as_runs_arrive(there, monkeypatch, capsys):
    """From no file over a few rows to enough; a look that finds nothing new does nothing."""
    Path("scores.csv").unlink()
    arrivals = iter([None, 3, 3, 12, 24])

    def arrive(seconds):
        assert seconds == 0.5
        if (count := next(arrivals)) is not None and count != arrive.count:
            frame().head(count).to_csv("scores.csv", index=False)
            arrive.count = count

    arrive.count = 0
    monkeypatch.setattr("ksm_ext.cli.commands.time.sleep", arrive)
    call = ["watch", "scores.csv", "--kernel", "linear", "--every", "0.5", "--until", "24"]
    assert main([*call, "-o", "page.html"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Not yet: `path` must be a file")
    assert [line.split()[0] for line in lines if " runs. " in line][-2:] == ["12", "24"]
    assert "<b>noise</b>" in Path("page.html").read_text()


class Waits(Exception):
    """Of a watch that would look again."""


@pytest.fixture
def one_look(monkeypatch):
    def sleep(seconds):
        raise Waits

    monkeypatch.setattr("ksm_ext.cli.commands.time.sleep", sleep)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("folder", "the folder folder. Name a file in it."),
        ("scores.csv --masks folder", "the folder folder"),
        ("picture", "a PNG picture"),
        ("program", "a program"),
        ("bytes", "no text in utf-8"),
        ("s", "safetensors, as ksm fit saves surrogates"),
        ("other.sqlite", "no such table"),
        ("scores.csv --sample-weight nope", "`sample_weight` must be among the columns"),
        ("scores.csv --tasks nope", "`tasks` must be among the columns"),
        ("scores.csv --targets nope", "`targets` must be among the columns"),
        ("scores.csv --ignore nope", "`ignore` must be among the columns"),
        ("scores.csv --subset nope", "`subset` must be among the columns"),
        ("scores.csv --long nope,task", "`long` must be among the columns"),
        ("scores.csv --key nope --masks scores.csv", "`key` must be a column of both tables"),
        ("scores.csv --minimize nope", "`minimize` must be one of"),
        ("scores.csv --kernel nope", "'nope'"),
        ("text.csv --targets loss", "`'loss' of text.csv` must be a column of numbers"),
        ("wide.csv", "got 9 in row 3"),
        ("-", "`scores` must be a file that grows, got standard input"),
    ],
)
def test_watch_ends_where_waiting_would_not_help(call, said, there, one_look, capsys):
    Path("folder").mkdir()
    Path("picture").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(90))
    Path("program").write_bytes(b"\x7fELF" + bytes(90))
    Path("bytes").write_bytes(bytes(range(256)))
    with closing(sqlite3.connect("other.sqlite")) as database:
        database.execute("CREATE TABLE other (name TEXT)")
    Path("text.csv").write_text("a,b,loss\n1,0,high\n0,1,low\n1,1,low\n")
    Path("wide.csv").write_text("a,b,loss\n1,0,.5\n" + "0," * 8 + "1\n1,1,.5\n")
    assert main(["watch", *call.split(), "-o", "page.html"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("ksm: error: ") and said in text and not Path("page.html").exists()


def _zipped(kind):
    frame().to_parquet("whole") if kind == "parquet" else np.savez("whole.npz", masks=MASKS)
    return Path("whole" if kind == "parquet" else "whole.npz").read_bytes()


@pytest.mark.parametrize(
    "content",
    [
        *("", "\n", "a,b,lo", "a,b,loss\n", "a,b,loss\n1,0,.5\n", "a,b,loss\n1,0,.5\n0,1,.25\n"),
        *("a,b,loss\n1,0,.5\n0,1,.25\n1,1", "a,b,loss\n1,0,.5\n0,1,.25\n1,1,"),
        *("a,b,loss\n1,0,.5\n0,1,.25\n1,1,1e-", '[{"a": 1, "b": 0, "loss": 0.5}, {"a"'),
        *("number,state,datetime_start,params_a,value\n0,RUNNING,1,1,\n", "parquet", "npz"),
    ],
)
def test_watch_waits_for_the_rest_of_a_table(content, there, one_look, capsys):
    whole = _zipped(content) if content in ("parquet", "npz") else None
    Path("t").write_bytes(content.encode() if whole is None else whole[: len(whole) // 2])
    with pytest.raises(Waits):
        main(["watch", "t", "--targets", "loss", "-o", "page.html"])
    assert capsys.readouterr().err.startswith("Not yet: ")
    with pytest.raises(Waits):
        main(["watch", "nofile.csv", "-o", "page.html"])


def test_watch_waits_for_scores_of_masks_that_are_there(there, one_look, capsys):
    Path("masks.csv").write_text("id,a,b\n1,1,0\n2,0,1\n3,1,1\n4,0,0\n")
    for content in ("id,loss\n1,.5\n2,.25\n3,.125\n", "loss\n.5\n.25\n.125\n"):
        Path("t.csv").write_text(content)
        with pytest.raises(Waits):
            main(["watch", "t.csv", "--masks", "masks.csv", "--ignore", "id", "-o", "page.html"])
        assert capsys.readouterr().err.startswith("Not yet: ")
    with RunStore("runs", 5), pytest.raises(Waits):
        main(["watch", "runs", "-o", "page.html"])
    assert "must be a store of finished runs, got none" in capsys.readouterr().err


def test_the_store_of_retrained_scores_is_a_table(there, capsys):
    """Also while the process that fills it has it open."""
    masks = subsets.mixed_sizes(5, 12, seed=0)

    def train(subset, seed):
        return [float(subset.sum()) + 0.1 * seed, -float(subset.sum())]

    retrained = ksm_ext.retrain_scores(train, masks, seeds=(0, 1), store="runs")
    with RunStore("runs", 5):
        found = read_scores("runs")
    assert len(found.masks) == 24 and found.scores.shape == (24, 2)
    both = sorted(map(tuple, torch.cat([found.masks, found.scores], 1).tolist()))
    rows, values = retrained.runs()
    assert both == sorted(map(tuple, torch.cat([rows.double(), values], 1).tolist()))
    content = bytearray(Path("runs").read_bytes())
    content[content.index(values.numpy()[0, 0].tobytes())] ^= 1
    Path("runs").write_bytes(content)
    with pytest.raises(ValueError, match="must be a store of runs, got a run has damaged scores"):
        read_scores("runs")


def test_a_separator_is_named(there, capsys):
    """What stands between names, where a symbol may be a part of one."""
    cells = ["wiki/code", "wiki", "code", "wiki/code/maths", "maths", "maths/wiki", "code/maths"]
    values = {"data": cells, "loss": np.arange(7) ** 2.0}
    pd.DataFrame(values).to_csv("lists.csv", index=False)
    call = ["fit", "lists.csv", "--subset", "data", "--kernel", "linear", "-o", "mine"]
    assert main(call) == 2
    assert "Add `--separator=/` if '/' stands between names" in capsys.readouterr().err
    assert main([*call, "--separator=/"]) == 0
    assert load_surrogate("mine").task_names == ("wiki", "code", "maths")
    assert main([*call, "--separator=/", "--estimates", "lists.csv"]) == 0
