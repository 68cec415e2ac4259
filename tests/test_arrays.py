"""Array kinds: what is accepted, what is shared, what comes back."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from ksm_ext.arrays import Kind, as_tensor, is_pandas


@pytest.mark.parametrize(
    "value, dtype",
    [
        ([[1, 2]], torch.int64),
        ([[1.5, 2]], torch.float64),
        ([[True, False]], torch.bool),
        (np.ones((1, 2), np.float32), torch.float32),
        (np.ones((1, 2), np.uint16), torch.int64),
        (np.ones((1, 2), np.uint64), torch.int64),
        (np.ones((1, 2), np.uint8), torch.uint8),
        (np.array([[1, 2.5]], dtype=object), torch.float64),
        (pd.DataFrame({"a": [1], "b": [2.5]}), torch.float64),
        (pd.DataFrame({"a": [True], "b": [2.5]}), torch.float64),
        (torch.ones(1, 2, dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_numbers_keep_their_dtype(value, dtype):
    tensor = as_tensor("x", value)
    assert tensor.dtype == dtype and tensor.shape == (1, 2) and not tensor.requires_grad
    expected = value.double().numpy() if isinstance(value, torch.Tensor) else np.array(value, float)
    np.testing.assert_array_equal(tensor.double().numpy(), expected)


def test_gradients_are_left_behind():
    assert not as_tensor("x", torch.ones(2, requires_grad=True) * 2).requires_grad


def test_memory_is_shared_where_possible():
    array = np.zeros(3)
    as_tensor("x", array)[0] = 1
    assert array[0] == 1
    array.flags.writeable = False
    tensor = as_tensor("x", array)  # no warning, and no write into the caller's memory
    tensor[1] = 1
    assert array[1] == 0


@pytest.mark.parametrize("array", [np.arange(6.0)[::-1], np.arange(6.0).reshape(2, 3).T])
def test_any_strides(array):
    np.testing.assert_array_equal(as_tensor("x", array).numpy(), array)


@pytest.mark.parametrize(
    "value, found",
    [
        (["a"], "numeric, got list of dtype <U1. Pass a tensor"),
        (np.array([1j]), "numeric, got ndarray of dtype complex128. Pass"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "numeric, got ndarray of dtype datetime"),
        ([[1], [1, 2]], "rectangular, got a ragged list. Give every row one length"),
        (
            torch.zeros(2, dtype=torch.complex64),
            "a dense real tensor, got a torch.complex64 tensor",
        ),
        (torch.eye(2).to_sparse(), "a dense real tensor, got a sparse tensor. Convert"),
        (pd.DataFrame({"a": ["x"], "b": [1]}), "numeric, got DataFrame of dtype object. Pass"),
    ],
)
def test_other_things_are_refused(value, found):
    with pytest.raises(TypeError, match=f"^`scores` must be {found}"):
        as_tensor("scores", value)


def test_kinds_come_back():
    answer = torch.arange(6.0).reshape(3, 2)
    assert Kind.of(torch.zeros(1)).restore(answer) is answer
    for value in ([1.0], np.zeros(1)):
        assert isinstance(Kind.of(value).restore(answer), np.ndarray)
    pandas = Kind.of(pd.Series([1.0]))
    frame = pandas.restore(answer, list("abc"), ["x", "y"])
    assert list(frame.index) == list("abc") and list(frame.columns) == ["x", "y"]
    series = pandas.restore(answer[:, 0], list("abc"))
    assert isinstance(series, pd.Series) and list(series.index) == list("abc")
    assert isinstance(pandas.restore(answer[None], list("abc")), np.ndarray)


def test_only_what_is_needed_is_imported():
    assert is_pandas(pd.Series([1])) and not is_pandas(np.zeros(1))
    heavy = "'pandas', 'matplotlib', 'sklearn', 'shapiq'"
    code = f"import sys, ksm_ext; print(sorted({{{heavy}}} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_missing_numbers_become_nan():
    """None and pandas NA are left to the finiteness check of the caller."""
    assert as_tensor("x", [1.0, None])[1].isnan()
