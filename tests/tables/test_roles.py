"""Roles of columns: what is named, what is beyond doubt, and the advice where it is not."""

import json
import re
import shlex

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_ext import fit_surrogate, read_scores
from ksm_ext.cli.program import _parser
from ksm_ext.tables.roles import Column, _option, name_columns, role_table, words_of

PROPERTY = settings(derandomize=True, deadline=None, database=None, max_examples=60)
ROWS = 12


def bits(seed):
    return np.random.default_rng(seed).integers(0, 2, ROWS)


def fractions(seed):
    return np.random.default_rng(seed).normal(size=ROWS).round(4)


def table(**more):
    """Three tasks and a loss, and what else there is."""
    tasks = {name: bits(i) for i, name in enumerate(("wiki", "code", "noise"))}
    return pd.DataFrame({**tasks, "loss": fractions(9), **more})


@pytest.fixture
def read(tmp_path):
    def read(frame, **options):
        frame.to_csv(tmp_path / "t.csv", index=False)
        return read_scores(tmp_path / "t.csv", **options)

    return read


def options_of(text):
    """The options that an error advises, as the command line parses them."""
    advised = re.search(r"Add `(.*?)`, or name columns", text, re.S)
    words = shlex.split(advised[1]) if advised else []
    args = _parser().parse_args(["fit", "t.csv", "-o", "x", *words])
    return {name: getattr(args, name) for name in ("tasks", "targets", "ignore", "weights")}


# -- columns of every kind, whose role is known -------------------------------------------------

KINDS = {
    "task": (st.sampled_from(["wiki", "code", "Maths", "pile_cc", "group 7", "3", "x-y"]), bits),
    "target": (st.sampled_from(["loss", "val_loss", "Accuracy", "evalF1", "nll2"]), fractions),
    "binary score": (st.sampled_from(["solved", "correct", "pass@1", "is_match"]), bits),
    "binary detail": (st.sampled_from(["seed", "run id", "fold", "gpu", "weight_decay"]), bits),
    "detail": (st.sampled_from(["Runtime", "lr", "gpu_hours", "rank_test", "loss_std"]), fractions),
    "count": (st.sampled_from(["books", "arxiv"]), lambda seed: 2 * bits(seed)),
    "text": (st.sampled_from(["notes", "optimizer", "a, b", '"q"']), lambda seed: ["sgd"] * ROWS),
}
FREE = {"target": "target", "binary score": "target"}  # the only ones that may be advised


@st.composite
def columns(draw):
    """Names and kinds of columns: two tasks at least, in any order with whatever else."""
    kinds = ["task", "task", *draw(st.lists(st.sampled_from(list(KINDS)), max_size=6))]
    found = {}
    for kind in draw(st.permutations(kinds)):
        found.setdefault(draw(KINDS[kind][0]), kind)
    return found


@PROPERTY
@given(kinds=columns(), name_targets=st.booleans())
def test_no_column_is_taken_for_another_and_advice_works(kinds, name_targets, tmp_path_factory):
    frame = pd.DataFrame({n: KINDS[k][1](i) for i, (n, k) in enumerate(kinds.items())})
    path = tmp_path_factory.getbasetemp() / "roles.csv"
    frame.to_csv(path, index=False)
    scores = [name for name, kind in kinds.items() if kind == "target"]
    given = {"targets": scores[:1]} if name_targets and scores else {}
    try:
        found = read_scores(path, **given)
    except ValueError as error:
        text = str(error)
        assert re.match(r"(?s)`.+` must be .+, got .+\. .+", text)
        advised = options_of(text)
        if not any(advised.values()):
            assert "no scores" in text and not scores
            return
        try:
            found = read_scores(
                path, **{name: advised[name] or given.get(name, ()) for name in advised}
            )
        except ValueError as again:
            assert "no scores" in str(again) and not FREE.keys() & set(kinds.values())
            return
    for column in found.columns:
        kind = kinds[column.name]
        assert column.role in ("ignored", FREE.get(kind, kind)), (column, kind)
    tasks = [name for name, kind in kinds.items() if kind == "task"]
    assert list(found.task_names) == tasks
    assert found.masks.numpy().astype(int).tolist() == frame[tasks].to_numpy().tolist()
    for j, name in enumerate(found.target_names):
        assert found.scores[:, j].tolist() == frame[name].tolist()


@PROPERTY
@given(kinds=columns())
def test_what_is_named_is_what_it_is_named(kinds, tmp_path_factory):
    """With tasks and targets named, no other column matters, whatever it holds."""
    frame = pd.DataFrame({n: KINDS[k][1](i) for i, (n, k) in enumerate(kinds.items())})
    frame["loss"] = fractions(99)
    path = tmp_path_factory.getbasetemp() / "named.csv"
    frame.to_csv(path, index=False)
    tasks = [name for name, kind in kinds.items() if kind.startswith(("task", "binary"))]
    found = read_scores(path, tasks=tasks[::-1], targets="loss")
    assert list(found.task_names) == tasks[::-1] and found.target_names == ("loss",)
    others = frame.columns.difference([*tasks, "loss"])
    assert {c.name for c in found.columns if c.reason == "not named"} == set(others)


# -- single rules -------------------------------------------------------------------------------


def test_a_sweep_says_what_every_column_is(read):
    found = read(table(accuracy=fractions(3)))
    names = ("wiki", "code", "noise"), ("loss", "accuracy")
    assert (found.task_names, found.target_names) == names and len(found.columns) == 5
    assert found.role_table() == (
        "  task (0 or 1)                wiki, code, noise\n"
        "  target (named like a score)  loss, accuracy"
    )


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"accuracy": fractions(3)}, "got 'accuracy' (fractions, named like 'accuracy')"),
        ({"seed": bits(3)}, "got 'seed' (0 or 1, named like 'seed')"),
        ({"lr": fractions(3)}, "got 'lr' (fractions, named like 'lr')"),
        ({"Runtime": fractions(3)}, "named like 'runtime'"),
        ({"rank_test_score": 2 + bits(3)}, "'rank_test_score' (whole numbers"),
        ({"correct": bits(3)}, "got 'correct' (0 or 1, named like 'correct')"),
        ({"notes": ["ok"] * ROWS}, "got 'notes' (text such as 'ok')"),
        ({"books": 2 * bits(3)}, "got 'books' (whole numbers)"),
        ({"nothing": [None] * ROWS}, "got 'nothing' (empty)"),
    ],
)
def test_leftover_columns_are_refused_beside_named_targets(more, found, read):
    with pytest.raises(ValueError, match=r"must be tasks beyond doubt, or named") as caught:
        read(table(**more), targets="loss")
    assert found in str(caught.value)
    (name,) = more
    assert options_of(str(caught.value))["ignore"] == [name]
    assert read(table(**more), targets="loss", ignore=name).task_names == ("wiki", "code", "noise")


def test_truth_values_of_two_kinds_are_in_doubt(read):
    """What yes means among 0 and 1, nobody knows."""
    frame = table().astype({"noise": object})
    frame.loc[7, "noise"] = "yes"
    with pytest.raises(ValueError, match=r"'noise' .text such as 'yes'.* A task says 0 or 1 in ev"):
        read(frame)
    frame["noise"] = ["yes" if bit else "No" for bit in bits(3)]
    assert read(frame).masks[:, 2].tolist() == bits(3).astype(bool).tolist()


def test_mixtures_beside_their_scores_need_no_option(read):
    shares = np.random.default_rng(0).dirichlet(np.ones(3), ROWS)
    frame = pd.DataFrame(shares, columns=["wiki", "code", "noise"])
    frame = frame.assign(loss=fractions(1), seconds=fractions(2))
    with pytest.raises(ValueError, match="got 'seconds'"):
        read(frame)
    found = read(frame, ignore="seconds")
    assert found.task_names == ("wiki", "code", "noise") and found.target_names == ("loss",)
    np.testing.assert_allclose(found.masks, shares, rtol=1e-12)


def test_a_table_without_rows_asks_for_rows(read):
    with pytest.raises(ValueError, match=r"must be a table with a row per .* got no rows. Add the"):
        read(table().iloc[:0])


def test_weights_are_not_advised_where_they_are_given(read):
    counts = pd.DataFrame({"wiki": 2 * bits(1) + 1, "code": 3 * bits(2) + 1, "loss": fractions(1)})
    for there in (False, True):
        with pytest.raises(ValueError, match="name all tasks, by `--tasks`") as caught:
            read(counts, weights=there)
        assert ("add `--weights`" in str(caught.value)) is not there


def test_runs_of_one_subset_are_counted_apart(read):
    frame = pd.concat([table(), table()])
    distinct = len(table()[["wiki", "code", "noise"]].drop_duplicates())
    assert str(read(frame)).startswith(f"{2 * ROWS} runs of {distinct} subsets of 3 tasks")


def test_a_blank_in_the_column_of_a_task_is_named(read):
    frame = table().astype({"noise": object})
    frame.loc[7, "noise"] = None
    expected = (
        "`'noise' of .*` must be a number in every row, got no number in 1 .*, the first row 8"
    )
    for options in ({}, {"targets": "loss"}, {"tasks": ["wiki", "noise"], "targets": "loss"}):
        with pytest.raises(ValueError, match=expected):
            read(frame, **options)
    assert read(frame, ignore="noise").task_names == ("wiki", "code")


def test_a_blank_score_is_named(read):
    frame = table()
    frame.loc[[3, 5], "loss"] = None
    with pytest.raises(
        ValueError, match=r"'loss' of .*got no number in 2 of them, the first row 4"
    ):
        read(frame)
    assert len(read(frame.dropna()).scores) == ROWS - 2


def test_counts_are_weights_only_if_they_are_asked_for(read):
    frame = table(books=2 * bits(3))
    with pytest.raises(ValueError, match="Counts and shares of tasks are weights: add `--weights`"):
        read(frame)
    tasks = ["wiki", "books"]
    with pytest.raises(ValueError, match=r"`'books' .*` must be 0 or 1 in every row, got 2 in row"):
        read(frame, tasks=tasks, targets="loss")
    found = read(frame, tasks=tasks, targets="loss", weights=True)
    assert found.masks.dtype == torch.float64
    assert found.masks.tolist() == frame[tasks].to_numpy(dtype=float).tolist()


def test_a_task_that_is_always_in_is_reported_and_kept(read):
    found = read(table(always=1, never=0))
    assert found.task_names == ("wiki", "code", "noise", "always", "never")
    reasons = {column.name: column.reason for column in found.columns}
    assert reasons["always"] == "constant: always 1" and reasons["never"] == "constant: always 0"
    assert "task (constant: always 1)" in found.role_table()


def test_the_only_fractions_beside_tasks_are_the_score(read):
    frame = table().rename(columns={"loss": "mmlu"})
    assert read(frame).target_names == ("mmlu",)
    for other in ({"gsm8k": fractions(1)}, {"books": 2 * bits(1)}):
        with pytest.raises(ValueError, match=r"`the columns .*` must be tasks or targets beyond"):
            read(frame.assign(**other))
    with pytest.raises(ValueError, match="beyond doubt") as caught:
        read(frame.assign(arc=fractions(1)))
    assert options_of(str(caught.value))["targets"] == ["mmlu", "arc"]


@pytest.mark.parametrize("cells", ["81.7%", "0,817", "1.2 s"])
def test_scores_in_other_numerals_say_how_to_write_them(cells, read):
    with pytest.raises(ValueError, match=r"`'loss' .*` must be a column of numbers, got text such"):
        read(table(loss=[cells] * ROWS))


def followed(error, frame):
    """A table made by the advice of an error, to the letter."""
    advised = re.search(r"in pandas by `(.*?)`\.", str(error.value))[1]
    return eval(advised, {"table": frame, "pandas": pd})


@pytest.mark.parametrize("comma", [" ", ";", ",", "|", "+", " + "])
@pytest.mark.parametrize("name", ["tasks", "what was there", "data"])
def test_lists_of_tasks_say_the_option_that_reads_them(comma, name, read):
    lists = [f"wiki{comma}code", "code"] * 6
    values = {name: lists, "loss": fractions(1)}
    noted = {**values, "notes": ["as planned"] * 12} if comma != " " else values
    for frame in (pd.DataFrame(values), pd.DataFrame(noted)):
        with pytest.raises(ValueError, match=r"got no tasks\. .* lists the tasks of") as caught:
            read(frame, targets="loss")
        (option,) = shlex.split(re.search("add `(.*?)`", str(caught.value))[1])
        found = read(frame, targets="loss", subset=option.removeprefix("--subset="))
        assert found.task_names == ("wiki", "code")
        assert found.masks.tolist() == [[True, True], [False, True]] * 6


def test_lists_of_json_say_the_option_that_reads_them(tmp_path):
    rows = [{"used": ["a", "b"][: 1 + i % 2], "loss": i + 0.5} for i in range(4)]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="add `--subset=used`"):
        read_scores(tmp_path / "x.json")
    assert read_scores(tmp_path / "x.json", subset="used").task_names == ("a", "b")


@PROPERTY
@given(
    masks=st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=3, max_size=6),
    run=st.sampled_from(["run", "experiment", "sweep item"]),
    task=st.sampled_from(["task", "source", "group"]),
    score=st.sampled_from(["loss", "quality"]),
    text=st.booleans(),
    swap=st.booleans(),
    apart=st.booleans(),
    keyed=st.booleans(),
)
def test_the_advice_for_long_tables_works_whatever_columns_are_called(
    masks, run, task, score, text, swap, apart, keyed, tmp_path_factory
):
    """With notes beside, tasks and runs by name or number, and scores there or in another file."""
    masks = [[True, True, False, False], [False, True, True, False], *masks]  # what makes it long
    rows = [
        {run: f"r{i}" if text else i + 7, task: "abcd"[j] if text else j + 3, "value": i + 0.5}
        for i, row in enumerate(masks)
        for j in range(4)
        if row[j]
    ]
    long = pd.DataFrame(rows).rename(columns={"value": score}).assign(notes="as planned")
    long = long[[*([task, run] if swap else [run, task]), score, "notes"]]
    folder = tmp_path_factory.mktemp("long")
    files = [folder / "scores.csv"]
    if apart:
        files.append(folder / "masks.csv")
        long.groupby(run)[[score]].first().to_csv(files[0])
        long = long.drop(columns=score)
    long.to_csv(files[-1], index=False)
    with pytest.raises(ValueError, match="in pandas by") as caught:
        read_scores(*files, **({"key": run} if apart and keyed else {}))
    assert f"If {task!r} names the tasks" in str(caught.value)
    followed(caught, long).to_csv(files[-1])
    found = read_scores(*files, **({} if apart else {"targets": score}))
    seen = [i for i, row in enumerate(masks) if any(row)]
    tasks = [j for j in range(4) if any(row[j] for row in masks)]
    assert found.masks.tolist() == [[masks[i][j] for j in tasks] for i in seen]
    assert found.scores[:, 0].tolist() == [i + 0.5 for i in seen]


# -- names --------------------------------------------------------------------------------------


def test_names_and_globs():
    known = ["wiki", "code", "val_loss", "val_acc", "odd[1]"]
    named = name_columns(known, {"target": ["val_*"], "ignored": ["val_acc"]}, "t")
    assert named == {"val_loss": "target", "val_acc": "ignored"}
    assert list(name_columns(known, {"target": ["odd[1]", "val_a*"]}, "t")) == ["odd[1]", "val_acc"]
    assert name_columns(known, {"task": ["*"], "target": ["wiki"]}, "t")["wiki"] == "target"
    with pytest.raises(
        ValueError, match="`targets` must be other columns than `tasks`, got 'val_l"
    ):
        name_columns(known, {"task": ["*"], "target": ["val_l*"]}, "t")
    with pytest.raises(
        ValueError, match=r"`tasks` must be among the columns wiki, .* of t, got 'x"
    ):
        name_columns(known, {"task": ["x*"]}, "t")


@PROPERTY
@given(names=st.lists(st.text(st.sampled_from("ab ,\"'\n*-"), min_size=1, max_size=5), min_size=1))
def test_names_in_advised_options_are_read_as_they_are(names):
    """Names of JSON and Parquet may end in blanks, which CSV has none of."""
    (option,) = shlex.split(_option("ignore", names))
    assert _parser().parse_args(["fit", "t.csv", "-o", "x", option]).ignore == names


def test_words_of_names():
    assert {"val", "loss"} <= words_of("valLoss") and "f1" in words_of("eval/F1")
    assert "y" in words_of("Y") and "y" not in words_of("x-y")
    assert "loss" in words_of("loss3") and "loss" not in words_of("glossary")


def test_many_columns_are_a_line():
    text = role_table(Column(f"task {i}", "task", "0 or 1") for i in range(3000))
    assert re.fullmatch(r"  task \(0 or 1\)  task 0, task 1, .*, task 19 and 2,980 more", text)


# -- masks and scores --------------------------------------------------------------------------


def test_roles_reach_the_surrogate(read):
    """A seed and a second score beside the table change no attribution."""
    frame = table()
    more = frame.assign(seed=bits(5), accuracy=-frame["loss"])
    plain, other = read(frame), read(more, targets="loss", ignore=["seed", "accuracy"])
    fits = [fit_surrogate(t.masks, t.scores, kernel="linear", ridge=1.0) for t in (plain, other)]
    assert fits[0].attribute().equal(fits[1].attribute())


def test_shares_of_mixtures_in_a_table_of_their_own_are_unmistakable(tmp_path):
    random, files = np.random.default_rng(0), (tmp_path / "scores.csv", tmp_path / "masks.csv")
    shares = random.dirichlet(np.ones(4), 12).round(3)  # sums .998 to 1.002
    pd.DataFrame({"loss": shares @ [1.0, 2.0, 3.0, 4.0]}).to_csv(files[0], index_label="run")
    pd.DataFrame(shares, columns=list("abcd")).to_csv(files[1], index_label="run")
    table = read_scores(*files)
    assert table.task_names == tuple("abcd") and table.masks.dtype == torch.float64
    assert "task (shares of one sum)" in table.role_table()
    counts = pd.DataFrame(random.integers(0, 3, (12, 4)), columns=list("abcd"))
    counts.to_csv(files[1], index_label="run")
    with pytest.raises(ValueError, match="--weights"):
        read_scores(*files)
