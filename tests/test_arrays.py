"""Array kinds: what is accepted, what is shared, what comes back."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch

from ksm_ext import evaluation, fit_surrogate, load_surrogate, selection, subsets
from ksm_ext.arrays import ArrayKind, as_tensor, names_along, table_library


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
        (torch.ones(1, 2, requires_grad=True) * 2, torch.float32),
    ],
)
def test_numbers_keep_their_dtype(value, dtype):
    tensor = as_tensor("x", value)
    assert tensor.dtype == dtype and tensor.shape == (1, 2) and not tensor.requires_grad
    expected = value.detach().double() if torch.is_tensor(value) else np.array(value, float)
    np.testing.assert_array_equal(tensor.double(), expected)


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
    "value, expected",
    [
        (np.ma.masked_array([1.0, 2.0], [0, 1]), [1, np.nan]),
        (np.ma.masked_array([1, 2], [0, 1]), [1, np.nan]),
        (np.ma.masked_array([1, 2]), [1, 2]),
        (np.ma.masked_array([1, 2], [0, 1], dtype=object), [1, np.nan]),
        ([np.ma.masked_array([1, 2], [0, 1]), np.array([3, 4])], [[1, np.nan], [3, 4]]),
        (pd.Series([1, None], dtype="Int64"), [1, np.nan]),
        (pd.Series([True, None], dtype="boolean"), [1, np.nan]),
        (pd.DataFrame({"a": pd.array([None], "Float64"), "b": [1]}), [[np.nan, 1]]),
        (pd.DataFrame({"a": pd.arrays.SparseArray([0, 1])}), [[0], [1]]),
        (np.array([2**63 - 1], np.uint64), [2**63 - 1]),
        (torch.tensor([5], dtype=torch.uint64), [5]),
        (torch.tensor([5], dtype=torch.uint16), [5]),
        (np.array([1.5, 2], ">f8"), [1.5, 2]),
        (np.array([1, 2], ">u2"), [1, 2]),
        (np.array([1.5], np.longdouble), [1.5]),
        (np.array(["1e400"], np.longdouble), [np.inf]),
        (torch.tensor([1.5]).to(torch.float8_e4m3fn), [1.5]),
        ([Decimal("1.5"), Fraction(1, 2), None, pd.NA], [1.5, 0.5, np.nan, np.nan]),
        ([1.0, None], [1, np.nan]),
        ([torch.ones(2, requires_grad=True), torch.zeros(2)], [[1, 1], [0, 0]]),
        ([torch.ones(1, dtype=torch.bfloat16)], [[1]]),
        (np.float32(0.5), 0.5),
        (torch._neg_view(torch.ones(1)), [-1]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_number_has_its_value(value, expected):
    found = as_tensor("x", value)
    np.testing.assert_array_equal(found.double().numpy(), np.array(expected, float))
    assert found.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int32)


@pytest.mark.parametrize(
    "value", [np.array([2**63], np.uint64), torch.tensor([2**64 - 1], dtype=torch.uint64), [2**63]]
)
def test_integers_do_not_wrap(value):
    with pytest.raises(ValueError, match=r"^`scores` must be below 2\^63, got \d+\. Pass it as f"):
        as_tensor("scores", value)


@pytest.mark.parametrize(
    "value, found",
    [
        (["1", "2"], "numeric, got list of dtype <U1. Pass a tensor"),
        (pd.Series(["1", "2"], dtype=object), "numeric, got Series of dtype object. Pass"),
        ([pd.Timestamp("2020-01-01"), 1.0], "numeric, got list of dtype object. Pass"),
        (None, "numeric, got NoneType of dtype object. Pass"),
        (scipy.sparse.csr_matrix(np.eye(2)), r"dense, got a sparse csr_matrix. Pass its `.toarray"),
        (scipy.sparse.coo_array(np.eye(2)), r"dense, got a sparse coo_array. Pass its `.toarray"),
        (torch.ones(2, device="meta"), "a dense real tensor, got a meta tensor. Convert"),
        (np.zeros(2, [("a", float)]), "numeric, got ndarray of dtype "),
        ([10**400], "numeric, got list of dtype object. Pass"),
        ([torch.ones(2), torch.ones(3)], "rectangular, got a ragged list. Give every row"),
        ([[torch.ones(1, requires_grad=True)]], r"numeric, got list \(Can't call numpy"),
        (["a"], "numeric, got list of dtype <U1. Pass a tensor"),
        (np.array([1j]), "numeric, got ndarray of dtype complex128. Pass"),
        (np.array(["2020-01-01"], dtype="datetime64[D]"), "numeric, got ndarray of dtype datetime"),
        ([[1], [1, 2]], "rectangular, got a ragged list. Give every row one length"),
        (torch.zeros(2) * 1j, "a dense real tensor, got a torch.complex64 tensor"),
        (torch.eye(2).to_sparse(), "a dense real tensor, got a sparse tensor. Convert"),
        (pd.DataFrame({"a": ["x"], "b": [1]}), "numeric, got DataFrame of dtype object. Pass"),
    ],
)
def test_other_things_are_refused(value, found):
    with pytest.raises(TypeError, match=f"^`scores` must be {found}"):
        as_tensor("scores", value)


def test_kinds_come_back():
    answer = torch.arange(6.0).reshape(3, 2)
    axes = {"task": list("abc"), "target": ["x", "y"]}
    assert ArrayKind.of(torch.zeros(1)).restore(answer, axes) is answer
    for value in ([1.0], np.zeros(1)):
        assert isinstance(ArrayKind.of(value).restore(answer, axes), np.ndarray)
    pandas = ArrayKind.of(pd.Series([1.0]))
    frame = pandas.restore(answer, axes)
    assert list(frame.index) == list("abc") and list(frame.columns) == ["x", "y"]
    series = pandas.restore(answer[:, 0], {"task": list("abc")})
    assert isinstance(series, pd.Series) and list(series.index) == list("abc")
    assert isinstance(pandas.restore(answer[None], {"seed": None, **axes}), np.ndarray)
    assert isinstance(pandas.restore(answer.sum(), {}), np.ndarray)


def test_only_what_is_needed_is_imported():
    heavy = {"pandas", "polars", "xarray", "matplotlib", "sklearn", "shapiq"}
    code = (
        "import sys, ksm_ext, ksm_ext.interop; "
        "ksm_ext.fit_surrogate([[1, 0], [0, 1], [1, 1]], [1.0, 2.0, 3.0]).attribute(); "
        f"print(sorted({heavy} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


# -- tables of other libraries ------------------------------------------------------------------

MASKS = subsets.bernoulli(5, 24, 0.5, seed=0)
SCORES = MASKS.double() @ torch.linspace(-1, 1, 10, dtype=torch.float64).reshape(5, 2)
SCORES += 0.1 * MASKS[:, :1] * MASKS[:, 1:2]
TASKS, TARGETS, ROWS = list("abcde"), ["u", "v"], [f"run {row}" for row in range(24)]


def pandas_table(values, **axes):
    index, columns = (*axes.values(), None)[:2]
    if values.ndim == 1:
        return pd.Series(values.numpy(), index)
    return pd.DataFrame(values.numpy(), index, columns)


def polars_table(values, **axes):
    polars = pytest.importorskip("polars")
    if values.ndim == 1:
        return polars.Series(values.numpy())
    return polars.DataFrame(values.numpy(), (*axes.values(), None)[1])


def xarray_table(values, **axes):
    xarray = pytest.importorskip("xarray")
    named = {axis: names for axis, names in axes.items() if names is not None}
    return xarray.DataArray(values.numpy(), named, tuple(axes))


def assert_table_equal(found, expected):
    """Kind, dtype, numbers and every name are the same."""
    library = table_library(expected)
    testing = pytest.importorskip(f"{library}.testing")
    if library == "xarray":
        assert found.dtype == expected.dtype and found.dims == expected.dims
        return testing.assert_identical(found, expected)
    kind = "series" if len(expected.shape) == 1 else "frame"
    return getattr(testing, f"assert_{kind}_equal")(found, expected, check_exact=True)


every_table = pytest.mark.parametrize("table", [pandas_table, polars_table, xarray_table])


@every_table
@pytest.mark.parametrize(
    "values",
    [MASKS, MASKS.int(), SCORES, SCORES.float(), SCORES[:, 0]],
    ids=["bool", "int32", "float64", "float32", "series"],
)
def test_tables_become_tensors(table, values):
    axes = {"row": ROWS} | ({"column": TASKS[: values.shape[1]]} if values.ndim == 2 else {})
    tensor = as_tensor("x", table(values, **axes))
    assert tensor.dtype == values.dtype and tensor.equal(values)


@every_table
def test_tables_go_through_a_surrogate(table):
    subset = {"subset": ROWS}
    masks, scores = table(MASKS, **subset, task=TASKS), table(SCORES, **subset, target=TARGETS)
    options = {"kernel": "anova2", "ridge": 0.1}
    given, plain = fit_surrogate(masks, scores, **options), fit_surrogate(MASKS, SCORES, **options)
    assert given.task_names == tuple(TASKS) and given.target_names == tuple(TARGETS)
    for ask, rows in [
        (lambda s, m: s.attribute("shapley"), {"task": TASKS}),
        (lambda s, m: s.attribute("shapley", return_std=True)[1], {"task": TASKS}),
        (lambda s, m: s.predict(m), subset),
        (lambda s, m: s.predict(m, return_std=True)[1], subset),
        (lambda s, m: s.loo_residuals, {"subset": None}),
        (lambda s, m: s.loo_error, {}),
        (lambda s, m: s.walsh_spectrum(3), {"order": [1, 2, 3]}),
    ]:
        expected = table(ask(plain, MASKS), **rows, target=TARGETS)
        assert_table_equal(ask(given, masks), expected)
    pairs = given.interactions("banzhaf")
    if table is xarray_table:
        axes = {"task": TASKS, "other_task": TASKS, "target": TARGETS}
        assert_table_equal(pairs, table(plain.interactions("banzhaf"), **axes))
    else:
        np.testing.assert_array_equal(pairs, plain.interactions("banzhaf").numpy())


@every_table
def test_a_stored_surrogate_answers_in_tables(table, tmp_path):
    scores = table(SCORES, subset=ROWS, target=TARGETS)
    surrogate = fit_surrogate(MASKS, scores, kernel="linear", ridge=0.1, task_names=TASKS)
    surrogate.save(tmp_path / "surrogate.safetensors")
    again = load_surrogate(tmp_path / "surrogate.safetensors")
    assert_table_equal(again.attribute(), surrogate.attribute())


@every_table
def test_series_go_through_a_surrogate(table):
    masks, scores = table(MASKS, subset=ROWS, task=TASKS), SCORES[:, 0].clone()
    options = {"kernel": "anova2", "ridge": 0.1}
    given = fit_surrogate(masks, table(scores, subset=ROWS), **options)
    plain = fit_surrogate(MASKS, scores, **options)
    assert_table_equal(given.attribute(), table(plain.attribute(), task=TASKS))
    assert_table_equal(given.predict(masks), table(plain.predict(MASKS), subset=ROWS))
    pairs = table(plain.interactions(), task=TASKS, other_task=TASKS)
    assert_table_equal(given.interactions(), pairs)
    assert float(given.loo_error) == float(plain.loo_error)


@every_table
def test_tables_go_through_the_rest(table):
    subset = {"subset": ROWS}
    masks, scores = table(MASKS, **subset, task=TASKS), table(SCORES, **subset, target=TARGETS)
    noisy = SCORES + 0.3 * torch.randn(SCORES.shape, generator=torch.Generator().manual_seed(0))
    lds, alike = evaluation.lds, subsets.identical_subsets
    assert_table_equal(lds(scores, noisy), table(lds(SCORES, noisy), target=TARGETS))
    error, expected = (
        evaluation.residual_error(each, noisy, pooled=True) for each in (scores, SCORES)
    )
    assert float(error) == float(expected)
    assert_table_equal(alike(masks), table(alike(MASKS), **subset))
    doubled = table(torch.cat([MASKS, MASKS[:, 1:2]], 1), **subset, task=[*TASKS, "again"])
    merged, groups = subsets.merge_duplicate_tasks(doubled)
    assert_table_equal(merged, masks)
    assert groups == [[0], [1, 5], [2], [3], [4]]
    best = selection.top_k(table(SCORES[0], target=TARGETS), 2, maximize=True)
    plain = selection.top_k(SCORES[0], 2, maximize=True)
    names = [TARGETS[i] for i in plain.tolist()]
    assert_table_equal(best, table(plain, task=names))


@every_table
def test_names_are_where_the_library_keeps_them(table):
    two = table(SCORES, subset=ROWS, target=TARGETS)
    assert names_along(two, 1) == TARGETS
    assert names_along(two, 0) == (None if table is polars_table else ROWS)
    assert names_along(table(SCORES[:, 0], subset=ROWS), 1) is None
    assert names_along(SCORES, 1) is names_along(SCORES.numpy(), 0) is None


def test_missing_numbers_of_polars_become_nan():
    polars = pytest.importorskip("polars")
    for column in ([1.0, None], [1, None], [True, None]):
        tensor = as_tensor("x", polars.DataFrame({"a": column, "b": [1.0, 2.0]}))
        assert tensor[1].isnan().tolist() == [True, False]


@pytest.mark.parametrize("library, kind", [("polars", "DataFrame"), ("xarray", "DataArray")])
def test_words_in_tables_are_refused(library, kind):
    words = getattr(pytest.importorskip(library), kind)([["x"], ["y"]])
    with pytest.raises(TypeError, match=f"^`scores` must be numeric, got {kind} of dtype "):
        as_tensor("scores", words)


def test_an_array_without_coordinates_has_no_names():
    xarray = pytest.importorskip("xarray")
    surrogate = fit_surrogate(xarray.DataArray(MASKS.numpy()), xarray.DataArray(SCORES.numpy()))
    assert surrogate.task_names == tuple("01234") and surrogate.target_names == ("0", "1")
    assert surrogate.attribute().dims == ("task", "target")
