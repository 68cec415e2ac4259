"""Tables of other tools: those that they wrote, long tables, lists of tasks, bit strings."""

import json
import re
import shlex
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_ext.cli import main
from ksm_ext.tables.layouts import read_results
from ksm_ext.tables.scores import read_scores

EXPORTS = Path(__file__).parent / "exports"
EFFECTS = {"wiki": -0.3, "code": -0.2, "spam": 0.4}
TASKS = list(EFFECTS)


def expected_loss(table):
    """The loss of every row up to the .04 that runs add."""
    return 1 + table.masks.double().numpy() @ [EFFECTS[name] for name in table.task_names]


# -- trackers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "runs", "targets", "note"),
    [
        ("optuna", 14, ("value",), "of 16 runs left out: 1 FAIL, 1 PRUNED"),
        ("optuna_two", 12, ("loss", "accuracy"), "Optuna"),
        ("mlflow", 9, ("accuracy", "loss"), "of 10 runs left out: 1 FAILED"),
        ("ray", 8, ("loss", "accuracy"), "Ray Tune"),
    ],
)
def test_trackers_tables_need_no_option(name, runs, targets, note):
    table = read_scores(EXPORTS / f"{name}.csv")
    assert sorted(table.task_names) == sorted(TASKS) and table.target_names == targets
    assert len(table.masks) == runs and note in table.role_table()
    loss = table.scores[:, targets.index("loss" if "loss" in targets else "value")].numpy()
    finite = np.isfinite(loss)
    assert (~finite).sum() == (name == "mlflow")  # 1.797e308 there
    rest = loss[finite] - expected_loss(table)[finite]
    assert (rest > -1e-9).all() and (rest < 0.041).all()


def test_scikit_learns_grid_is_its_mean_test_score():
    table = read_scores(EXPORTS / "cv_results.csv")
    assert sorted(table.task_names) == sorted(TASKS) and table.target_names == ("test_score",)
    assert np.ptp(table.scores[:, 0].numpy() + expected_loss(table)) < 1e-9


def test_a_parameter_that_is_no_task_is_in_doubt(tmp_path):
    frame = pd.read_csv(EXPORTS / "optuna.csv")
    frame["params_lr"] = np.linspace(0.1, 0.2, len(frame))
    frame.to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(ValueError, match=r"got 'lr' \(fractions, named like 'lr'\)"):
        read_scores(tmp_path / "x.csv")
    assert read_scores(tmp_path / "x.csv", ignore="lr").masks.shape[1] == 3


def test_runs_must_have_ended(tmp_path):
    frame = pd.read_csv(EXPORTS / "mlflow.csv").assign(status="RUNNING")
    frame.to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(ValueError, match="must be runs whose 'status' is FINISHED, got 'RUNNING'"):
        read_scores(tmp_path / "x.csv")


@pytest.mark.parametrize("ending", ["json", "npz"])
def test_games_of_shapiq(ending):
    table = read_scores(EXPORTS / f"shapiq.{ending}")
    values = 1 + table.masks.double().numpy() @ [0.3, 0.2, -0.4]
    np.testing.assert_allclose(table.scores[:, 0], values, atol=1e-12)
    assert len(table.masks) == 8


# -- files of one run's results -----------------------------------------------------------------


def test_results_of_runs_are_rows(tmp_path):
    """HuggingFace's file as it is, in folders named after runs; lm-evaluation-harness's form."""
    state = json.loads((EXPORTS / "trainer_state.json").read_text())
    for number, run in enumerate(("b", "a")):
        (tmp_path / run).mkdir()
        state["log_history"][-2]["eval_loss"] = 2.0 + number
        (tmp_path / run / "trainer_state.json").write_text(json.dumps(state))
    found = read_results(sorted(tmp_path.glob("*/trainer_state.json")))
    assert found["run"].tolist() == ["a", "b"] and found["eval_loss"].tolist() == [3.0, 2.0]
    assert list(found) == ["run", "eval_loss"]
    numbers = {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.6}
    (tmp_path / "r1.json").write_text(json.dumps({"results": {"arc": numbers}, "versions": {}}))
    found = read_results([tmp_path / "r1.json"])
    assert {name: cells.tolist() for name, cells in found.items()} == {
        "run": ["r1"],
        "arc/acc": [0.5],
        "arc/acc_norm": [0.6],
    }


def test_results_of_other_runs_are_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"results": {"arc": {"acc,none": 0.5}}}')
    (tmp_path / "b.json").write_text('{"results": {"arc": {"f1,none": 0.5}}}')
    (tmp_path / "c.json").write_text('{"masks": [[1]]}')
    with pytest.raises(
        ValueError, match=r"must be the scores of .*, got a difference in 'arc/acc'"
    ):
        read_results([tmp_path / "a.json", tmp_path / "b.json"])
    with pytest.raises(ValueError, match="must be a file of one run's results, got another"):
        read_results([tmp_path / "c.json"])
    with pytest.raises(ValueError, match="`the names of runs` must be all different, got 'a'"):
        read_results([tmp_path / "a.json", tmp_path / "a.json", tmp_path / "b.json"])


# -- lists, bits, long tables: they say what a table of 0 and 1 says ------------------------------


WIDE = st.integers(1, 6).flatmap(
    lambda n: st.lists(
        st.lists(st.booleans(), min_size=n, max_size=n).filter(any), min_size=1, max_size=8
    )
)
FAST = settings(max_examples=40, deadline=None, database=None, derandomize=True)


def saved(frame, folder):
    path = folder.getbasetemp() / "layout.csv"
    frame.to_csv(path, index=False)
    return path


def as_columns(table):
    order = sorted(table.task_names)
    return {name: table.masks[:, table.task_names.index(name)].tolist() for name in order}


@FAST
@given(masks=WIDE, separator=st.sampled_from([";", "|", ", ", " ", "+", " + "]))
def test_lists_of_tasks(masks, separator, tmp_path_factory):
    names = [f"task-{i}" for i in range(len(masks[0]))]
    cells = [
        separator.join(n for n, there in zip(names, row, strict=True) if there) for row in masks
    ]
    loss = np.arange(len(masks)) + 0.5
    path = saved(pd.DataFrame({"data": cells, "loss": loss}), tmp_path_factory)
    table = read_scores(path, subset="data", targets="loss")
    used = [n for i, n in enumerate(names) if any(row[i] for row in masks)]
    expected = {n: [row[names.index(n)] for row in masks] for n in used}
    assert as_columns(table) == expected and table.scores[:, 0].tolist() == loss.tolist()


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        (["wiki+code", "wiki", "code + c++", "c++"], ["wiki", "code", "c++"]),
        (["c++,wiki", "c+d,wiki", "c++"], ["c++", "wiki", "c+d"]),
        (["web text;wiki", "web text", "wiki"], ["web text", "wiki"]),
        (['["a+b", "c"]', "c d", "d"], ["a+b", "c", "d"]),
        (["[a, b]", "b, c"], ["a", "b", "c"]),
    ],
)
def test_what_stands_between_names_is_one_for_a_column(cells, expected, tmp_path):
    frame = pd.DataFrame({"data": cells, "loss": np.arange(len(cells)) + 0.5})
    frame.to_csv(tmp_path / "x.csv", index=False)
    table = read_scores(tmp_path / "x.csv", subset="data", targets="loss")
    assert list(table.task_names) == expected


@pytest.mark.parametrize(
    ("cells", "joined", "symbol", "split", "kept"),
    [
        (["wiki+c++", "c+++maths", "wiki"], "c+++maths", "+", "wiki c++ maths", None),
        (["wiki/code", "wiki", "code"], "wiki/code", "/", "wiki code", "wiki/code wiki code"),
        (["wiki", "wiki-code", "code"], "wiki-code", "-", "wiki code", "wiki wiki-code code"),
        (["a_b", "b", "a", "c_a"], "a_b", "_", "a b c", "a_b b a c_a"),
        (["a;b", "a/b;c", "c"], "a/b", "/", "a b c", "a b a/b c"),
        (["a b", "a/b c", "c"], "a/b", "/", "a b c", "a b a/b c"),
        (["a b;c", "a;b"], "a b", " ", "a b c", "a b c a b"),
        (["x-y-z", "x-y", "z"], "x-y-z", "-", "x y z", "x-y-z x-y z"),
    ],
)
def test_joined_tasks_are_no_task_in_silence(cells, joined, symbol, split, kept, tmp_path):
    """And the options of the error do what it says of them."""
    frame = pd.DataFrame({"data": cells, "loss": np.arange(len(cells)) + 0.5})
    frame.to_csv(tmp_path / "x.csv", index=False)
    read = partial(read_scores, tmp_path / "x.csv", subset="data", targets="loss")
    with pytest.raises(ValueError, match=r"^`'data' of .*x.csv` must be lists of single") as error:
        read()
    assert f"got {joined!r}, which is other tasks joined by {symbol!r}. Add `" in str(error.value)
    advice = [shlex.split(part) for part in re.findall("`('?--[^`]+)`", str(error.value))]
    found = [read(separator=[o.removeprefix("--separator=") for o in each]) for each in advice]
    assert list(found[0].task_names) == split.split()
    for row, cell in zip(found[0].masks.tolist(), cells, strict=True):
        lengths = [len(name) for name, there in zip(split.split(), row, strict=True) if there]
        assert sum(lengths) + len(lengths) - 1 == len(cell)  # names, a symbol between two
    assert len(found) == 1 if kept is None else " ".join(found[1].task_names) == kept


@FAST
@given(
    masks=WIDE.filter(lambda masks: len(masks[0]) > 1),
    separator=st.sampled_from(["/", "&", "::", " and ", "+", ";", "_", " "]),
    ends=st.sampled_from(["", "++", "#"]),
)
def test_a_named_separator(masks, separator, ends, tmp_path_factory):
    names = [f"t{i}{ends}" for i in range(len(masks[0]))]
    cells = [separator.join(n for n, t in zip(names, row, strict=True) if t) for row in masks]
    loss = np.arange(len(masks)) + 0.5
    path = saved(pd.DataFrame({"data": cells, "loss": loss}), tmp_path_factory)
    table = read_scores(path, subset="data", targets="loss", separator=separator)
    used = [n for i, n in enumerate(names) if any(row[i] for row in masks)]
    assert as_columns(table) == {n: [row[names.index(n)] for row in masks] for n in used}


def test_a_separator_without_lists(tmp_path):
    (tmp_path / "x.csv").write_text("a,b,loss\n1,0,.5\n0,1,.25\n")
    with pytest.raises(ValueError, match="`separator` must be given with `subset`"):
        read_scores(tmp_path / "x.csv", separator="/")
    with pytest.raises(ValueError, match="`separator` must be a symbol, got an empty text"):
        read_scores(tmp_path / "x.csv", separator="", subset="a")


@FAST
@given(masks=WIDE.filter(lambda masks: len(masks[0]) > 1))
def test_bit_strings(masks, tmp_path_factory):
    cells = ["".join("1" if there else "0" for there in row) for row in masks]
    frame = pd.DataFrame({"bits": cells, "loss": np.arange(len(masks)) + 0.5})
    path = saved(frame, tmp_path_factory)
    table = read_scores(path, subset="bits", targets="loss")
    assert table.masks.tolist() == masks


def test_bit_strings_of_any_length(tmp_path):
    """Longer than a float64 can tell apart."""
    rows = np.random.default_rng(0).integers(0, 2, (5, 300))
    frame = pd.DataFrame({"bits": ["".join(map(str, row)) for row in rows], "loss": range(5)})
    frame.to_csv(tmp_path / "x.csv", index=False)
    table = read_scores(tmp_path / "x.csv", subset="bits", targets="loss")
    assert table.masks.int().tolist() == rows.tolist()


@FAST
@given(masks=WIDE)
def test_long_tables(masks, tmp_path_factory):
    names = [f"task-{i}" for i in range(len(masks[0]))]
    rows = [
        {"run": f"r{i}", "task": name, "loss": i + 0.5}
        for i, row in enumerate(masks)
        for name, there in zip(names, row, strict=True)
        if there
    ]
    path = saved(pd.DataFrame(rows), tmp_path_factory)
    table = read_scores(path, long=("run", "task"), targets="loss")
    used = [n for i, n in enumerate(names) if any(row[i] for row in masks)]
    assert as_columns(table) == {n: [row[names.index(n)] for row in masks] for n in used}
    assert table.scores[:, 0].tolist() == [i + 0.5 for i in range(len(masks))]


def test_what_is_ignored_may_change_within_a_run(tmp_path):
    (tmp_path / "x.csv").write_text("run,task,step,loss\na,x,1,1\na,y,2,1\nb,x,1,3\n")
    table = read_scores(tmp_path / "x.csv", long=("run", "task"), targets="loss", ignore="st*")
    assert table.masks.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("text", "options", "found"),
    [
        ("run,task,loss\na,x,1\na,x,1\n", {"long": ("run", "task")}, "got 'x' twice in 'a'"),
        ("run,task,loss\na,x,1\na,y,2\n", {"long": ("run", "task")}, "must be one value per run"),
        ("run,task,loss\na,x,1\n", {"long": ("run", "tsak")}, "`long` must be among the columns"),
        ("run,task,loss\na,x,1\n", {"long": "run,task"}, "`long` must be the columns of the run"),
        ("data,loss\n0110,1\n011,2\n", {"subset": "data"}, "must be of one length, got 3 and 4"),
        ("data,loss\nx;loss,1\nx,2\n", {"subset": "data"}, "`tasks` must be other names than"),
        ("data,loss\nx;y,1\nx,2\n", {"subset": "date"}, "`subset` must be among the columns"),
    ],
)
def test_what_cannot_be_reshaped_is_named(text, options, found, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(ValueError, match=found):
        read_scores(tmp_path / "x.csv", **options)


# -- a newcomer's trial -------------------------------------------------------------------------


@pytest.fixture
def exports(tmp_path, monkeypatch):
    """What five newcomers have: trackers, a wide table with junk, a long one, mixtures."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    masks = random.integers(0, 2, (40, 3))
    loss = 1 + masks @ list(EFFECTS.values()) + 0.01 * random.normal(size=40)
    wide = pd.DataFrame(masks, columns=TASKS)
    wide.insert(0, "run_name", [f"run {i}" for i in range(40)])
    wide = wide.assign(seed=random.integers(0, 2, 40), lr=0.1, gpu_hours=random.uniform(size=40))
    wide.assign(val_loss=loss, created="2026-01-01").to_csv("wide.csv", index=False)
    pd.DataFrame(
        [
            {"run": f"run {i}", "dataset": task, "val_loss": loss[i]}
            for i, row in enumerate(masks)
            for task, there in zip(TASKS, row, strict=True)
            if there
        ]
    ).to_csv("long.csv", index=False)
    shares = random.dirichlet(np.ones(3), 40)
    keyed = {"index": np.arange(40)}
    pd.DataFrame(shares, columns=TASKS).assign(**keyed).to_csv("config.csv", index=False)
    values = shares @ [0.3, 0.2, 0.9]
    pd.DataFrame({**keyed, "valid_loss": values}).to_csv("target.csv", index=False)
    for name in ("optuna", "mlflow"):
        frame = pd.read_csv(EXPORTS / f"{name}.csv")
        frame = frame[~(frame.filter(like="loss") > 1e300).any(axis=1)]
        frame.to_csv(f"{name}.csv", index=False)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("optuna", "optuna.csv"),
        ("mlflow", "mlflow.csv"),
        ("wide", "wide.csv --targets val_loss --tasks wiki,code,spam"),
        ("long", "long.csv --long run,dataset --targets val_loss"),
        ("regmix", "target.csv --masks config.csv --key index"),
    ],
)
def test_a_newcomer_has_a_report_in_three_commands(name, call, exports, capsys):
    """With no option but names; the task that hurts is found, and named first."""
    assert main(["fit", *call.split(), "-o", "s.safetensors"]) == 0
    assert main(["attribute", "s.safetensors", "-o", "a.csv"]) == 0
    assert main(["report", "s.safetensors", "-o", "r.html"]) == 0
    table = pd.read_csv("a.csv")
    assert set(table["task"]) == set(TASKS), name
    loss = table[table["target"].isin(["value", "loss", "val_loss", "valid_loss"])]
    assert loss.sort_values("value")["task"].iloc[-1] == "spam"
    assert "spam" in Path("r.html").read_text()


def test_what_is_imported_is_read_again(exports, capsys):
    for call in ("optuna.csv", "long.csv --long run,dataset --targets val_loss"):
        assert main(["import", *call.split(), "-o", "t.csv"]) == 0
        one = read_scores("t.csv", targets=["value", "val_loss"][call.startswith("long")])
        options = {"long": ("run", "dataset"), "targets": "val_loss"} if "long" in call else {}
        other = read_scores(call.split()[0], **options)
        assert one.task_names == other.task_names and one.masks.equal(other.masks)
        assert one.scores.equal(other.scores)
    assert "left out: 1 FAIL, 1 PRUNED" in capsys.readouterr().err


def test_results_and_a_design_are_imported(exports, capsys):
    for run in range(4):
        Path(f"r{run}.json").write_text(json.dumps({"results": {"arc": {"acc,none": run / 4}}}))
    design = pd.DataFrame([[0, 1], [1, 0], [1, 1], [0, 0]], columns=["wiki", "code"])
    design.assign(run=[f"r{i}" for i in (3, 2, 1, 0)]).to_csv("masks.csv", index=False)
    files = [f"r{i}.json" for i in range(4)]
    assert main(["import", *files, "--masks", "masks.csv", "-o", "t.csv"]) == 0
    found = pd.read_csv("t.csv")
    assert found["arc/acc"].tolist() == [0.0, 0.25, 0.5, 0.75]
    assert found["wiki"].tolist() == [0, 1, 1, 0]
    assert main(["import", *files]) == 0
    assert "add `--masks`" in capsys.readouterr().err
