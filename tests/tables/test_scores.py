"""Masks and scores of tables: one or two of them, keys, weights, published layouts."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import torch
from score_files import MASKS, SCORES, TARGETS, TASKS, check, frame

from ksm_ext.subsets import from_index_lists
from ksm_ext.tables.scores import read_index_lists, read_masks, read_scores


def keyed(tmp_path, masks, scores):
    (tmp_path / "masks").write_text(masks)
    (tmp_path / "scores").write_text(scores)
    return tmp_path / "scores", tmp_path / "masks"


def test_two_tables_row_by_row_and_joined(tmp_path):
    masks, scores = tmp_path / "masks.csv", tmp_path / "scores.csv"
    frame()[TASKS].to_csv(masks, index=False)
    frame()[TARGETS].to_csv(scores, index=False)
    check(read_scores(scores, masks))
    both = frame().assign(run=[f"run {i}" for i in range(9)])
    both[["run", *TASKS]].sample(frac=1, random_state=0).to_csv(masks, index=False)
    both[["run", *TARGETS]].to_csv(scores, index=False)
    check(read_scores(scores, masks))
    both[["run", *TASKS]][:8].to_csv(masks, index=False)
    with pytest.raises(ValueError, match=r"`'run' of .*masks.csv` must be that of the scores, got"):
        read_scores(scores, masks)


def test_targets_by_name_and_columns_to_ignore(tmp_path):
    path = tmp_path / "scores.csv"
    frame().assign(perfect=1, note="text").to_csv(path, index=False)
    table = read_scores(path, targets=["perfect", "loss"], ignore=["note", "accuracy"])
    assert table.target_names == ("perfect", "loss") and list(table.task_names) == TASKS
    assert table.scores[:, 0].tolist() == [1.0] * 9
    with pytest.raises(ValueError, match=r"beyond doubt, .* got 'note' \(text such as 'text'\)"):
        read_scores(path)
    with pytest.raises(ValueError, match=r"`'note' of .*` must be a column of numbers, got text"):
        read_scores(path, targets=["note", "loss"], ignore="accuracy")
    with pytest.raises(ValueError, match="`targets` must be among the columns wiki, code"):
        read_scores(path, targets=["los"])
    with pytest.raises(ValueError, match="`ignore` must be among the columns"):
        read_scores(path, ignore=["nothing"])


def test_a_column_of_weights_is_that_of_its_rows(tmp_path):
    """In a table of both, beside scores that are joined, and of a long table."""
    weights = np.arange(9) % 4 / 2
    both = frame().assign(run=[f"run {i}" for i in range(9)], sure=weights, seed=1)
    both.drop(columns="run").to_csv(tmp_path / "one.csv", index=False)
    table = read_scores(tmp_path / "one.csv", ignore="seed", sample_weight="sure")
    check(table)
    assert table.sample_weight.tolist() == weights.tolist()
    assert "weight (named)  " in table.role_table() and "sure" in table.role_table()
    assert table.merged().sample_weight is table.sample_weight
    both[["run", *TASKS]][::-1].to_csv(tmp_path / "masks.csv", index=False)
    both[["run", "sure", *TARGETS]].to_csv(tmp_path / "scores.csv", index=False)
    joined = read_scores(tmp_path / "scores.csv", tmp_path / "masks.csv", sample_weight="sure")
    check(joined)
    assert joined.sample_weight.tolist() == weights.tolist()
    assert read_scores(tmp_path / "one.csv", ignore="s*").sample_weight is None


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"sample_weight": "suer"}, "`sample_weight` must be among the columns .*, got 'suer'"),
        ({"sample_weight": "s*"}, "`sample_weight` must be one column, got 2 columns. Name the"),
        ({"sample_weight": "note"}, "`'note' of .*` must be a column of numbers, got text"),
        (
            {"sample_weight": "seed", "ignore": "seed"},
            "`sample_weight` must be other columns than `ignore`, got 'seed'",
        ),
    ],
)
def test_what_is_no_column_of_weights(tmp_path, options, found):
    path = tmp_path / "scores.csv"
    frame().assign(sure=0.5, seed=1, note="text").to_csv(path, index=False)
    options = {"tasks": TASKS, "targets": TARGETS, **options}
    with pytest.raises(ValueError, match=found):
        read_scores(path, **options)


def test_mixture_weights_stay_weights(tmp_path):
    path = tmp_path / "scores.csv"
    shares = pd.DataFrame((0.25 * MASKS).numpy(), columns=TASKS)
    shares.assign(loss=SCORES[:, 0].numpy()).to_csv(path, index=False)
    table = read_scores(path, tasks=TASKS, targets=["loss"], weights=True)
    torch.testing.assert_close(table.masks, 0.25 * MASKS.double())
    with pytest.raises(ValueError, match=r"got no tasks\. .* add `--weights`, and name all tasks"):
        read_scores(path, targets=["loss"])
    with pytest.raises(ValueError, match=r"`'wiki' of .*` must be 0 or 1 .* Add `--weights`"):
        read_scores(path, tasks=TASKS, targets=["loss"])


def test_weights_in_a_file_of_their_own(tmp_path):
    masks, scores = tmp_path / "masks.csv", tmp_path / "scores.csv"
    shares = pd.DataFrame((0.25 * MASKS).numpy(), columns=TASKS).assign(index=range(9))
    shares.to_csv(masks, index=False)
    frame()[TARGETS].assign(index=range(9))[::-1].to_csv(scores, index=False)
    table = read_scores(scores, masks, weights=True)
    torch.testing.assert_close(table.masks, 0.25 * MASKS.double().flip(0))
    with pytest.raises(ValueError, match=r"got 'wiki' \(fractions\), .* Add `--weights`, or"):
        read_scores(scores, masks)


@pytest.mark.parametrize(
    ("masks", "scores", "found"),
    [
        ("run,a\n1,0\n2,1\n", "run,loss\n2,.5\n3,1\n", "got no 3 and 1, which the scores lack"),
        ("run,a\n1,0\n2,1\n", "run,loss\n2,.5\n", "got 1, which the scores lack"),
        ("run,a\nx,0\ny,1\n", "run,loss\nx,.5\nz,.5\n", "got no 'z' and 'y', which"),
        ("run,a\n1,0\n1,1\n", "run,loss\n1,.5\n", "must be all different, got 1 in rows 1 and 2"),
        ("run,a\n1,0\n", "run,loss\n1,.5\n1,1\n", "must be all different, got 1 in rows 1 and 2"),
        ("run,a\n1,0\n,1\n", "run,loss\n1,.5\n,1\n", "got no number in 1 of them, the first row 2"),
        ("run,a\n9007199254740993,0\n", "run,loss\n9007199254740993,1\n", "below 2^53"),
        ("run,task\n0,wiki\n0,code\n", "run,loss\n0,1\n", "`pandas.crosstab(table['run'], "),
        ("a,b\n1,0\n0,1\n", "a,b\n.5,2\n.6,3\n", "must be one column that joins the two tables"),
    ],
)
def test_keys_that_do_not_join(masks, scores, found, tmp_path):
    with pytest.raises(ValueError, match=r"^`.*` must be .*, got .*\. [A-Z]") as caught:
        read_scores(*keyed(tmp_path, masks, scores))
    assert found in str(caught.value)


def test_domains_that_are_tasks_and_targets(tmp_path):
    """Columns that both tables have join them only if they can, or are named."""
    paths = keyed(tmp_path, "n,a,b\n2,0,1\n1,1,0\n", "n,a,b\n1,.5,2\n2,.6,3\n")
    table = read_scores(*paths)
    assert table.task_names == table.target_names == ("a", "b")
    assert table.masks.tolist() == [[True, False], [False, True]]
    assert next((c.name, c.role) for c in table.columns) == ("n", "key")
    assert read_scores(*paths, key="n").masks.equal(table.masks)
    paths = keyed(tmp_path, "a,b\n0,1\n1,0\n", "a,b\n.5,2\n.6,3\n")
    assert read_scores(*paths, targets=["a", "b"]).masks.tolist() == [[False, True], [True, False]]
    with pytest.raises(ValueError, match=r"`key` must be a column of both tables"):
        read_scores(*paths, key="run")


def test_columns_are_ignored_in_whichever_table_has_them(tmp_path):
    paths = keyed(tmp_path, "a,x\n0,u\n1,u\n", "loss,y\n.5,u\n.6,u\n")
    assert read_scores(*paths, ignore=["x", "y"]).task_names == ("a",)
    with pytest.raises(ValueError, match="`ignore` must be among the columns a, x"):
        read_scores(*paths, ignore=["z"])


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
    rows = [{"prompt_index": i, "sampled_train_indices": row} for i, row in enumerate(PROMPTS)]
    lists = json.dumps(rows if records else PROMPTS)
    scores, prompts = keyed(tmp_path, lists, "[[0.5], [0.25], [1.5]]")
    assert read_index_lists(prompts) == PROMPTS
    table = read_scores(scores, prompts)
    assert table.masks.equal(from_index_lists(PROMPTS, 48))
    assert table.scores.flatten().tolist() == [0.5, 0.25, 1.5]
    assert read_scores(scores, prompts, num_tasks=50).masks.shape == (3, 50)
    with pytest.raises(ValueError, match="must be a table of tasks and scores, got a list of rows"):
        read_scores(scores)
    with pytest.raises(ValueError, match="must be lists of task numbers, or records"):
        read_index_lists(scores)


@pytest.mark.parametrize(
    ("lists", "masks"),
    [("[[0, 2], [1]]", [[1, 0, 1], [0, 1, 0]]), ("[[0, 1], [1, 0]]", [[0, 1], [1, 0]])],
)
def test_lists_of_one_length_of_zeros_and_ones_are_masks(lists, masks, tmp_path):
    found = read_scores(*keyed(tmp_path, lists, "loss\n1\n2\n"))
    assert found.masks.int().tolist() == masks


def test_tasks_that_are_one(tmp_path):
    path = tmp_path / "scores.csv"
    frame().assign(twin=frame()["code"]).to_csv(path, index=False)
    table = read_scores(path)
    assert len(table.task_names) == 5 and table.merged().masks.equal(MASKS)
    assert list(table.merged().task_names) == TASKS


def test_masks_are_read_with_scores_and_without(tmp_path):
    """Tables by names, whatever else is in them; arrays and lists of task numbers by position."""
    masks = torch.tensor([[1, 0, 1], [0, 1, 1], [0, 0, 0]]).bool()
    files = {
        "a.csv": "run,c,b,a,loss\n7,1,0,1,0.5\n8,1,1,0,\n9,0,0,0,here\n",
        "b.csv": "a;b;c\nTrue;False;True\nFalse;True;True\nFalse;False;False\n",
        "c.json": "[[0, 2], [1, 2], []]",
        "d.json": "[[1, 0, 1], [0, 1, 1], [0, 0, 0]]",
        "e.json": json.dumps({"masks": masks.int().tolist(), "scores": [1, 2, 3]}),
        "f.json": json.dumps({"train_w": masks.int().tolist(), "train_subset_scores": [1, 2, 3]}),
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        assert read_masks(tmp_path / name, ["a", "b", "c"]).equal(masks), name
    np.savez(tmp_path / "g.npz", masks=masks.numpy()[:, [2, 0, 1]], task_names=["c", "a", "b"])
    assert read_masks(tmp_path / "g.npz", ["a", "b", "c"]).equal(masks)
    assert read_masks(tmp_path / "a.csv", ["c"]).equal(masks[:, 2:])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a,b\n1,0\n", "m.csv` must be a column for every task, got none for 'c'"),
        ("a,b,c\n1,0,1\n1,0,\n", "must be 0 or 1 in every row, got nan in row 2"),
        ("a,b,c\n1,0,1\n1,0,yesno\n", "must be 0 or 1 in every row, got yesno in row 2"),
        ("a,b,c\n1,0,2\n", "must be 0 or 1 in every row, got 2.0 in row 1"),
    ],
)
def test_what_is_no_mask_is_named(text, found, tmp_path):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(found)):
        read_masks(tmp_path / "m.csv", ["a", "b", "c"])
