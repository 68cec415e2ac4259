"""Tables in files: every format gives the same numbers, and what is damaged says so."""

import io
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from ksm_ext.score_tables import read_index_lists, read_scores
from ksm_ext.subsets import bernoulli, from_index_lists
from ksm_ext.tables import read_document, write_columns

TASKS, TARGETS = ["wiki", "code", "naïve, quoted", "3"], ["loss", "accuracy"]
MASKS = bernoulli(4, 9, 0.5, seed=0)
SCORES = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def frame():
    tasks = pd.DataFrame(MASKS.numpy(), columns=TASKS).astype(int)
    return pd.concat([tasks, pd.DataFrame(SCORES.numpy(), columns=TARGETS)], axis=1)


def arrays():
    names = {"task_names": TASKS, "target_names": TARGETS}
    return {"masks": MASKS.int().tolist(), "scores": SCORES.tolist()} | names


def npz(path):
    np.savez(path, **{name: np.array(value) for name, value in arrays().items()})


WRITERS = {
    "csv": lambda path: frame().to_csv(path, index=False),
    "csv with row numbers": lambda path: frame().to_csv(path),
    "csv with semicolons": lambda path: frame().to_csv(path, index=False, sep=";"),
    "csv with tabs": lambda path: frame().to_csv(path, index=False, sep="\t"),
    "csv of truth values": lambda path: (
        frame().astype({name: bool for name in TASKS}).to_csv(path, index=False)
    ),
    "csv with a byte order mark": lambda path: frame().to_csv(
        path, index=False, encoding="utf-8-sig", lineterminator="\r\n"
    ),
    "json records": lambda path: frame().to_json(path, orient="records", double_precision=15),
    "json lists": lambda path: path.write_text(json.dumps(frame().to_dict("list"))),
    "json arrays": lambda path: path.write_text(json.dumps(arrays())),
    "npz": lambda path: npz(path),
    "parquet": lambda path: frame().to_parquet(path),
}


def check(table):
    assert table.masks.dtype == torch.bool and table.masks.equal(MASKS)
    torch.testing.assert_close(table.scores, SCORES, rtol=1e-12, atol=1e-12)
    assert (list(table.task_names), list(table.target_names)) == (TASKS, TARGETS)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_gives_the_same_table(kind, tmp_path):
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / "scores.npz"  # the ending says nothing
    WRITERS[kind](path)
    check(read_scores(path))
    assert str(read_scores(path)).startswith("9 subsets of 4 tasks (wiki, code, ")


def test_standard_input(monkeypatch, tmp_path):
    WRITERS["csv"](tmp_path / "x")
    stdin = io.TextIOWrapper(io.BytesIO((tmp_path / "x").read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    check(read_scores("-"))


def test_two_tables_row_by_row_and_joined(tmp_path):
    masks, scores = tmp_path / "masks.csv", tmp_path / "scores.csv"
    frame()[TASKS].to_csv(masks, index=False)
    frame()[TARGETS].to_csv(scores, index=False)
    check(read_scores(scores, masks))
    keyed = frame().assign(run=[f"run {i}" for i in range(9)])
    keyed[["run", *TASKS]].sample(frac=1, random_state=0).to_csv(masks, index=False)
    keyed[["run", *TARGETS]].to_csv(scores, index=False)
    check(read_scores(scores, masks))
    keyed[["run", *TASKS]][:8].to_csv(masks, index=False)
    with pytest.raises(ValueError, match=r"`'run' of .*masks.csv` must be that of the scores, got"):
        read_scores(scores, masks)


def test_targets_by_name_and_columns_to_ignore(tmp_path):
    path = tmp_path / "scores.csv"
    frame().assign(perfect=1, note="text").to_csv(path, index=False)
    table = read_scores(path, targets=["perfect", "loss"], ignore=["note", "accuracy"])
    assert table.target_names == ("perfect", "loss") and list(table.task_names) == TASKS
    assert table.scores[:, 0].tolist() == [1.0] * 9
    with pytest.raises(ValueError, match=r"`'note' of .*` must be a column of numbers, got 'text'"):
        read_scores(path)
    with pytest.raises(ValueError, match="`targets` must be among the columns wiki, code"):
        read_scores(path, targets=["los"])
    with pytest.raises(ValueError, match="`ignore` must be among the columns"):
        read_scores(path, ignore=["nothing"])


def test_mixture_weights_stay_weights(tmp_path):
    path = tmp_path / "scores.csv"
    shares = pd.DataFrame((0.25 * MASKS).numpy(), columns=TASKS)
    shares.assign(loss=SCORES[:, 0].numpy()).to_csv(path, index=False)
    table = read_scores(path, targets=["loss"])
    torch.testing.assert_close(table.masks, 0.25 * MASKS.double())


# -- published layouts --------------------------------------------------------------------------


def test_published_train_and_test_rows(tmp_path):
    path = tmp_path / "modular.json"
    rows, scores = MASKS.double().tolist(), SCORES.tolist()
    facts = {"train_w": rows[:6], "train_subset_scores": scores[:6]}
    facts |= {"test_w": rows[6:], "test_subset_scores": scores[6:]}
    path.write_text(json.dumps(facts))
    train, test = read_scores(path), read_scores(path, part="test")
    assert train.masks.equal(MASKS[:6]) and test.masks.equal(MASKS[6:])
    assert train.scores.equal(SCORES[:6]) and test.scores.equal(SCORES[6:])
    assert train.task_names == ("0", "1", "2", "3") and train.target_names == ("0", "1")


PROMPTS = [[40, 7], [1, 47], [17, 15]]


@pytest.mark.parametrize("records", [False, True])
def test_published_lists_of_task_numbers(records, tmp_path):
    scores, prompts = tmp_path / "scores.json", tmp_path / "prompts.json"
    scores.write_text(json.dumps([[0.5], [0.25], [1.5]]))
    rows = [{"prompt_index": i, "sampled_train_indices": row} for i, row in enumerate(PROMPTS)]
    prompts.write_text(json.dumps(rows if records else PROMPTS))
    assert read_index_lists(prompts) == PROMPTS
    table = read_scores(scores, prompts)
    assert table.masks.equal(from_index_lists(PROMPTS, 48))
    assert table.scores.flatten().tolist() == [0.5, 0.25, 1.5]
    assert read_scores(scores, prompts, num_tasks=50).masks.shape == (3, 50)
    with pytest.raises(ValueError, match="must be a table of tasks and scores, got a list of rows"):
        read_scores(scores)
    with pytest.raises(ValueError, match="must be lists of task numbers, or records"):
        read_index_lists(scores)


def test_lists_of_different_lengths(tmp_path):
    scores, lists = tmp_path / "scores.csv", tmp_path / "lists.json"
    scores.write_text("loss\n1\n2\n")
    lists.write_text("[[0, 2], [1]]")
    assert read_scores(scores, lists).masks.int().tolist() == [[1, 0, 1], [0, 1, 0]]


def test_rows_of_zeros_and_ones_are_masks(tmp_path):
    scores, masks = tmp_path / "scores.csv", tmp_path / "masks.json"
    scores.write_text("loss\n1\n2\n")
    masks.write_text("[[0, 1], [1, 0]]")
    assert read_scores(scores, masks).masks.int().tolist() == [[0, 1], [1, 0]]


def test_tasks_that_are_one(tmp_path):
    path = tmp_path / "scores.csv"
    frame().assign(twin=frame()["code"]).to_csv(path, index=False)
    table = read_scores(path)
    assert len(table.task_names) == 5 and table.merged().masks.equal(MASKS)
    assert list(table.merged().task_names) == TASKS


# -- what is no table ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "nothing in it"),
        (b"\xff\xfe\x00", "utf-8"),
        (b'{"masks": [[1, 0]', "JSON that ends or breaks off"),
        (b"PK\x03\x04 no archive", "NPZ with"),
        (b"a,a\n1,2\n", "got 'a'"),
        (b"a,b\n1,2\n3\n", "got 1 in row 3"),
        (b"a,b\n1,0\n0,1\n", "no scores"),
        (b"x,y\n0.5,2\n1.5,3\n", "no tasks"),
        (b'[{"a": 1}, {"b": 2}]', "as record 1"),
        (b'{"masks": [[1, 0], [1]], "scores": [1, 2]}', "rows of different lengths"),
        (b'{"masks": [[1, 0], [0, 1]], "scores": [1]}', "got 2 rows"),
        (b'{"masks": [[1, 0]], "scores": [1], "task_names": ["a"]}', "must be 2 names, got 1"),
    ],
)
def test_what_is_no_table(content, found, tmp_path):
    path = tmp_path / "scores"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"^`.*` must be .*\. [A-Z]") as caught:
        read_scores(path)
    assert found in str(caught.value)


def test_damaged_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "x").write_bytes(b"PAR1 and nothing else PAR1")
    with pytest.raises(ValueError, match=r"must be CSV .*, got Parquet with"):
        read_document(tmp_path / "x")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x").write_bytes(b"PAR1")
    with pytest.raises(RuntimeError, match=r'pip install "ksm_ext\[parquet\]"'):
        read_document(tmp_path / "x")


def test_nothing_pickled_is_read(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, masks=np.array([{}, 1], dtype=object))
    with pytest.raises(ValueError, match="got NPZ with Object arrays cannot be loaded"):
        read_scores(path)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`path` must be a file, got .*/none"):
        read_document(tmp_path / "none")


@pytest.mark.parametrize("form", ["csv", "json", "parquet"])
def test_what_is_written_is_read_again(form, tmp_path):
    if form == "parquet":
        pytest.importorskip("pyarrow")
    columns = {"task": ["a, b", 'c "d"'], "value": [0.1 + 0.2, float("nan")], "count": [1, 2]}
    path = tmp_path / f"x.{form}"
    write_columns(columns, str(path), None)
    again = read_document(path)
    assert list(again) == list(columns) and again["task"].tolist() == columns["task"]
    np.testing.assert_array_equal(again["value"], columns["value"])
    np.testing.assert_array_equal(again["count"], [1, 2])


def test_unknown_endings(tmp_path):
    with pytest.raises(ValueError, match="`the ending of the output` must be one of 'csv'"):
        write_columns({"a": [1]}, str(tmp_path / "x.xlsx"), None)
