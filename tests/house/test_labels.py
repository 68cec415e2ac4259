"""Labels of rows and columns are compared wherever two tables meet, and decide their order."""

import ast
import functools
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import ksm_ext
from ksm_ext import (
    evaluation,
    fit_many,
    fit_surrogate,
    plotting,
    selection,
    subsets,
    write_report,
)
from ksm_ext.arrays import aligned
from ksm_ext.scores.estimation import GradientEstimator
from ksm_ext.sklearn import SurrogateRegressor, lds_score

matplotlib.use("Agg")

M, N, T = 14, 4, 3
RNG = np.random.default_rng(0)
MASKS = RNG.random((M, N)) < 0.5
MASKS[:2] = [[1, 1, 1, 1], [1, 0, 0, 0]]
MASKS[-1] = MASKS[0]
TRUE = 5 + RNG.normal(size=(M, T))
SAID = TRUE + RNG.normal(size=(M, T))
TAU, LOO = RNG.normal(size=(2, N, T))
PAIRS = RNG.normal(size=(N, N))
LABELS = {
    "subset": [f"run {row}" for row in range(M)],
    "task": list("abcd"),
    "target": ["u", "v", "w"],
    "curve": ["one", "two", "three"],
    "table": ["first", "second", "third"],
    "other": list("abcd"),
    "point": [f"point {row}" for row in range(M)],
}


def table(values, *dims, kind="pandas"):
    """A pandas table with labels, an xarray one transposed, or no table at all."""
    labels = [LABELS[dim] for dim in dims]
    if kind == "numpy":
        return values
    if kind == "transposed":
        xarray = pytest.importorskip("xarray")
        return xarray.DataArray(values, dict(zip(dims, labels, strict=True)), dims).T
    return pd.Series(values, *labels) if len(dims) == 1 else pd.DataFrame(values, *labels)


@functools.cache
def surrogate():
    return fit_surrogate(table(MASKS, "subset", "task"), table(TRUE, "subset", "target"))


@functools.cache
def mixed():
    shares = subsets.dirichlet(N, M, seed=0).numpy()
    scores = table(TRUE, "subset", "target")
    return fit_surrogate(table(shares, "subset", "task"), scores, kernel="linear", ridge=0.01)


@functools.cache
def estimator():
    torch.manual_seed(0)
    tasks = [(torch.randn(6, 3), torch.randint(2, (6,))) for _ in range(N)]
    targets = dict(zip(LABELS["target"], tasks, strict=False))
    names = LABELS["task"]
    made = GradientEstimator(nn.Linear(3, 2), tasks, targets, task_names=names, progress=False)
    return made.fit()


def calibrated(masks, true_scores):
    estimator().calibrate(masks, true_scores, ridges=[0.1])
    answer = estimator().calibration
    estimator().calibration = None
    return [*answer.slope.tolist(), *answer.intercept.tolist()]


def attributed(masks, retrained_masks, retrained_scores):
    made = estimator()
    answer = ksm_ext.attribute_tasks(
        made._models,
        made._task_data,
        dict(zip(LABELS["target"], made._target_data, strict=True)),
        masks=masks,
        retrained=(retrained_masks, retrained_scores),
        kernel="linear",
        task_names=LABELS["task"],
        progress=False,
    )
    return answer.values


def page(tmp_path, masks, scores):
    write_report(surrogate(), tmp_path / "page", held_out=(masks, scores))
    return np.frombuffer((tmp_path / "page").read_bytes(), np.uint8)


def drawn(axes):
    """The numbers of what was drawn."""
    points = [line.get_xydata() for line in axes.lines]
    points += [path.vertices for each in axes.collections for path in each.get_paths()]
    points += [each.get_offsets() for each in axes.collections]
    matplotlib.pyplot.close(axes.figure)
    return np.concatenate([np.asarray(part, float).reshape(-1) for part in points])


def chosen(result):
    return [*result.tasks, result.score]


def upper_end(interval, metric, **options):
    """A call that answers with the end of an interval; tables but ``baseline`` go by position."""

    def call(**tables):
        named = {"baseline": tables.pop("baseline")} if "baseline" in tables else {}
        return [interval(metric, *tables.values(), **named, **options).high]

    return call


PAIR = {"true_scores": (TRUE, "subset", "target"), "predicted_scores": (SAID, "subset", "target")}
FOLLOW = [("predicted_scores", "subset"), ("predicted_scores", "target")]
WEIGHTS = {"target_weights": (np.array([1.0, 2.0, 0.0]), "target")}
COSTS = {"costs": (np.array([1.0, 2.0, 3.0, 4.0]), "task")}
QUERY = {"masks": (MASKS, "subset", "task")}
HELD = QUERY | {"scores": (SAID, "subset", "target")}
BASELINE = {"baseline": (np.array([4.0, 5.0, 6.0]), "target")}
REGRESSOR = {"X": (MASKS * 1.0, "subset", "task"), "y": (TRUE, "subset", "target")}

# By function: its tables, the call, and which dimensions of which tables follow those of others.
FUNCTIONS = {
    "fit_surrogate": (
        HELD,
        lambda masks, scores: fit_surrogate(masks, scores, kernel="linear").attribute(),
        [("scores", "subset")],
    ),
    "fit_many": (
        QUERY
        | {
            "scores": (SAID.T, "table", "subset"),
            "sample_weight": (1 + RNG.random((T, M)), "table", "subset"),
        },
        lambda masks, scores, sample_weight: np.stack(
            [
                s.attribute()
                for s in fit_many(masks, scores, sample_weight=sample_weight, kernel="linear")
            ]
        ),
        [("scores", "subset"), ("sample_weight", "table"), ("sample_weight", "subset")],
    ),
    "observe": (  # what fit_surrogate does with its tables
        HELD,
        lambda masks, scores: fit_surrogate(masks, scores, kernel="rbf").loo_residuals,
        [("scores", "subset")],
    ),
    "attribution_map": (
        {"attributions": (TAU, "task", "target"), "std": (np.abs(TAU) / 3, "task", "target")},
        lambda attributions, std: (
            plotting.attribution_map(attributions, std, level=0.9, ax=Figure().subplots())
            .images[0]
            .get_array()
        ),
        [("std", "task"), ("std", "target")],
    ),
    "interaction_network": (
        {"interactions": (PAIRS, "task", "other"), "std": (np.abs(PAIRS.T) / 3, "task", "other")},
        lambda interactions, std: [
            line.get_linewidth()
            for line in plotting.interaction_network(
                interactions, std=std, level=0.9, ax=Figure().subplots()
            ).lines
        ],
        [("std", "task"), ("std", "other")],
    ),
    "interaction_heatmap": (
        {"interactions": (PAIRS, "task", "other"), "std": (np.abs(PAIRS.T) / 3, "task", "other")},
        lambda interactions, std: (
            plotting.interaction_heatmap(interactions, std=std, level=0.9).images[0].get_array()
        ),
        [("std", "task"), ("std", "other")],
    ),
    "predict": (QUERY, lambda masks: surrogate().predict(masks), [("masks", "task")]),
    "lds": (PAIR, evaluation.lds, FOLLOW),
    "noise_ceiling": (
        {"scores_a": PAIR["true_scores"], "scores_b": PAIR["predicted_scores"]},
        evaluation.noise_ceiling,
        [("scores_b", "subset"), ("scores_b", "target")],
    ),
    "loo_correlation": (
        {"attributions": (TAU, "task", "target"), "true_loo": (LOO, "task", "target")},
        evaluation.loo_correlation,
        [("true_loo", "task"), ("true_loo", "target")],
    ),
    "residual_error": (PAIR, evaluation.residual_error, FOLLOW),
    "relative_error": (
        PAIR | BASELINE,
        evaluation.relative_error,
        [*FOLLOW, ("baseline", "target")],
    ),
    "retrain_noise": (HELD, evaluation.retrain_noise, [("scores", "subset")]),
    "mislabel_auc": (
        {"attributions": (TAU, "task", "target"), "is_bad": (np.eye(N, dtype=bool)[1], "task")},
        evaluation.mislabel_auc,
        [("is_bad", "task")],
    ),
    "jackknife": (
        PAIR | BASELINE,
        upper_end(evaluation.jackknife, evaluation.relative_error),
        [*FOLLOW, ("baseline", "target")],
    ),
    "bootstrap": (PAIR, upper_end(evaluation.bootstrap, evaluation.lds, num_resamples=20), FOLLOW),
    "bootstrap of another function": (
        PAIR,
        upper_end(evaluation.bootstrap, lambda a, b: (a - b).abs().mean(0), num_resamples=20),
        [("predicted_scores", "subset")],
    ),
    "jackknife of masks and scores": (
        HELD,
        upper_end(evaluation.jackknife, lambda a, b: (a.double().T @ b).mean(0)),
        [("scores", "subset")],
    ),
    "top_k": (
        {"attributions": (TAU, "task", "target")} | WEIGHTS,
        functools.partial(selection.top_k, k=3, maximize=True),
        [("target_weights", "target")],
    ),
    "greedy_forward": (
        WEIGHTS,
        lambda **t: chosen(selection.greedy_forward(surrogate(), N, 2, maximize=True, **t)),
        [("target_weights", "target")],
    ),
    "greedy_backward": (
        WEIGHTS,
        lambda **t: chosen(selection.greedy_backward(surrogate(), N, 2, maximize=True, **t)),
        [("target_weights", "target")],
    ),
    "exact": (
        COSTS | WEIGHTS,
        lambda **t: chosen(selection.exact(surrogate().predict, N, maximize=True, budget=5, **t)),
        [("costs", "task"), ("target_weights", "target")],
    ),
    "under_budget": (
        COSTS | WEIGHTS,
        lambda **t: chosen(selection.under_budget(surrogate(), budget=5, maximize=True, **t)),
        [("costs", "task"), ("target_weights", "target")],
    ),
    "best_mixture": (
        WEIGHTS | {"low": (np.array([0.1, 0.0, 0.2, 0.05]), "task")},
        lambda low, target_weights: (
            selection.best_mixture(
                mixed(), maximize=True, target_weights=target_weights, bounds=(low, 0.7)
            ).shares
        ),
        [("target_weights", "target"), ("low", "task")],
    ),
    "dirichlet": (
        {name: (np.array([0.7, 0.3, 0.9, 0.8]), "task") for name in ("prior", "maximum")},
        lambda **tables: subsets.dirichlet(N, 5, seed=0, **tables),
        [("maximum", "task")],
    ),
    "predict by an estimator": (
        QUERY,
        lambda masks: estimator().predict(masks),
        [("masks", "task")],
    ),
    "calibrate": (
        QUERY | {"true_scores": PAIR["true_scores"]},
        calibrated,
        [("masks", "task"), ("true_scores", "subset"), ("true_scores", "target")],
    ),
    "attribute_tasks": (
        QUERY | {"retrained_masks": QUERY["masks"], "retrained_scores": (TRUE, "subset", "target")},
        attributed,
        [("masks", "task"), ("retrained_masks", "task")]
        + [("retrained_scores", dim) for dim in ("subset", "target")],
    ),
    "write_report": (HELD, page, [("masks", "task"), ("scores", "subset"), ("scores", "target")]),
    "fit": (
        REGRESSOR,
        lambda X, y: SurrogateRegressor(kernel="linear").fit(X, y).attribute(),
        [("y", "subset")],
    ),
    "lds_score": (
        REGRESSOR,
        lambda X, y: [lds_score(SurrogateRegressor(kernel="linear").fit(X, SAID), X, y)],
        [("y", "subset")],
    ),
    "score": (
        REGRESSOR,
        lambda X, y: [SurrogateRegressor(kernel="linear").fit(X, SAID).score(X, y)],
        [("y", "subset")],
    ),
    "attribution_bars": (
        {"attributions": (TAU[:, 0], "task"), "std": (np.abs(TAU[:, 1]), "task")},
        lambda attributions, std: drawn(plotting.attribution_bars(attributions, std)),
        [("std", "task")],
    ),
    "predicted_against_true": (
        PAIR,
        lambda **t: drawn(plotting.predicted_against_true(**t)),
        FOLLOW,
    ),
    "learning_curve": (
        {
            "num_subsets": (np.arange(1, M + 1), "point"),
            "mean": (SAID.T, "curve", "point"),
            "low": (SAID.T - 1, "curve", "point"),
            "high": (SAID.T + 1, "curve", "point"),
        },
        lambda **t: drawn(plotting.learning_curve(**t)),
        [("mean", "point"), ("low", "curve"), ("low", "point"), ("high", "curve")],
    ),
}


# Metrics of the caller's own: of their tables, rows alone are known.
OWN_METRICS = ("bootstrap of another function", "jackknife of masks and scores")
FOLLOWERS = [
    pytest.param(function, argument, dim, id=f"{function}: {dim}s of {argument}")
    for function, (_, _, follow) in FUNCTIONS.items()
    for argument, dim in follow
]
every_function = pytest.mark.parametrize("function", FUNCTIONS)
every_follower = pytest.mark.parametrize("function, argument, dim", FOLLOWERS)


@pytest.fixture
def answer(tmp_path):
    def ask(function, changes=(), kind="pandas"):
        tables, call, _ = FUNCTIONS[function]
        given = {name: table(*spec, kind=kind) for name, spec in tables.items()} | dict(changes)
        folder = {"tmp_path": tmp_path} if call is page else {}
        return np.asarray(call(**given, **folder), dtype=np.float64)

    return ask


def changed(function, argument, dim, change):
    """One labelled table of a function, with ``change(frame, axis)`` made to it."""
    values, *dims = FUNCTIONS[function][0][argument]
    return {argument: change(table(values, *dims), dims.index(dim))}


def called(dim, function):
    return "rows" if function in OWN_METRICS else f"{dim}s"


@every_follower
def test_labels_decide_the_order(answer, function, argument, dim):
    order = np.random.default_rng(1).permutation(len(LABELS[dim]))
    shuffled = changed(function, argument, dim, lambda frame, axis: frame.take(order, axis=axis))
    np.testing.assert_array_equal(answer(function, shuffled), answer(function))


@every_follower
def test_labels_that_do_not_match_are_named(answer, function, argument, dim):
    first = LABELS[dim][1]

    def rename(frame, axis):
        labels = ["stranger" if label == first else label for label in frame.axes[axis]]
        return frame.set_axis(labels, axis=axis)

    rows = called(dim, function)
    found = rf"must be labelled along its {rows} like `.*`, got no '{first}' and an unknown 'str"
    with pytest.raises(ValueError, match=found):
        answer(function, changed(function, argument, dim, rename))


@every_follower
def test_a_label_given_twice_is_an_error(answer, function, argument, dim):
    def repeat(frame, axis):
        return frame.set_axis([LABELS[dim][0], *frame.axes[axis][:-1]], axis=axis)

    rows, first = called(dim, function), LABELS[dim][0]
    found = rf"must be free of repeated labels of its {rows}, got '{first}' more than once"
    with pytest.raises(ValueError, match=found):
        answer(function, changed(function, argument, dim, repeat))


@every_follower
def test_numbers_that_nobody_gave_are_no_labels(answer, function, argument, dim):
    def bare(frame, axis):
        return frame.set_axis(pd.RangeIndex(frame.shape[axis]), axis=axis)

    expected = answer(function)
    np.testing.assert_array_equal(
        answer(function, changed(function, argument, dim, bare)), expected
    )
    plain = changed(function, argument, dim, lambda frame, axis: frame.to_numpy())
    np.testing.assert_array_equal(answer(function, plain), expected)


@every_function
def test_without_labels_tables_go_by_position(answer, function):
    np.testing.assert_array_equal(answer(function, kind="numpy"), answer(function))


@every_function
def test_transposed_tables_of_xarray_are_put_in_order(answer, function):
    tables, _, _ = FUNCTIONS[function]
    kinds = {
        name: table(*spec, kind="transposed") for name, spec in tables.items() if len(spec) == 3
    }
    if function == "learning_curve" or function in OWN_METRICS:
        pytest.skip("nothing says what the dimensions of these are called")
    np.testing.assert_array_equal(answer(function, kinds), answer(function))


def test_every_public_function_of_two_tables_is_asked():
    """Whoever annotates two arguments, or one beside a surrogate's names, as tables."""
    found = set()
    for path in Path(ksm_ext.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if node.args.vararg:
                arguments += 2 * [node.args.vararg]
            texts = [ast.unparse(each.annotation) for each in arguments if each.annotation]
            if sum(text.count("ArrayLike") for text in texts) > 1:
                found.add(node.name)
    assert found - set(FUNCTIONS) == set()
    assert len(found) >= 20


# The rules themselves


def in_order(first, second):
    return aligned({"first": (first, "subset"), "second": (second, "subset")})[1]


def test_a_shuffled_default_index_is_a_label():
    frame = pd.Series([10.0, 11.0, 12.0])
    shuffled = frame.iloc[[2, 0, 1]]
    assert in_order(frame, shuffled).tolist() == [10, 11, 12]
    assert in_order(shuffled, frame).tolist() == [12, 10, 11]
    assert in_order(frame, frame.iloc[::-1]).tolist() == [10, 11, 12]
    assert in_order(frame, pd.Series([1.0, 2.0, 3.0], list("abc"))).tolist() == [1, 2, 3]


def test_a_filtered_index_is_a_label():
    frame = pd.Series(range(6))
    one, other = frame[frame > 2], frame[frame > 2].iloc[::-1]
    assert in_order(one, other).tolist() == [3, 4, 5]
    with pytest.raises(ValueError, match=r"`second` must be labelled .*, got no '3' and an unk"):
        in_order(one, frame[:3].rename_axis("run"))


def test_numbers_of_an_index_with_a_name_are_labels():
    named = pd.Series([1.0, 2.0], pd.RangeIndex(2, name="run"))
    with pytest.raises(ValueError, match=r"`second` must be labelled .*, got no '0' and an unk"):
        in_order(named, pd.Series([1.0, 2.0], ["a", "b"]))


def test_the_third_table_is_compared_with_the_second_where_the_first_has_no_labels():
    bare, one, other = np.zeros(2), pd.Series([1, 2], ["a", "b"]), pd.Series([4, 3], ["b", "a"])
    tables = {"bare": (bare, "task"), "one": (one, "task"), "other": (other, "task")}
    assert aligned(tables)[2].tolist() == [3, 4]
    tables["bare"] = (pd.Series(bare), "task")
    assert aligned(tables)[2].tolist() == [3, 4]


def test_names_of_a_surrogate_that_nobody_gave_are_no_labels():
    plain = fit_surrogate(MASKS, TRUE, kernel="linear")
    expected = plain.predict(MASKS)
    np.testing.assert_array_equal(plain.predict(table(MASKS, "subset", "task")), expected)
    numbered = pd.DataFrame(MASKS)
    np.testing.assert_array_equal(plain.predict(numbered[[3, 1, 0, 2]]), expected)


def test_columns_of_polars_are_labels_unless_polars_gave_them():
    polars = pytest.importorskip("polars")
    named = polars.DataFrame(MASKS * 1.0, LABELS["task"])
    expected = surrogate().predict(MASKS)
    np.testing.assert_array_equal(surrogate().predict(named[:, ::-1]), expected)
    np.testing.assert_array_equal(surrogate().predict(polars.DataFrame(MASKS * 1.0)), expected)
    with pytest.raises(ValueError, match=r"got no 'a' and an unknown 'z'"):
        surrogate().predict(named.rename({"a": "z"}))


def test_dimensions_of_ones_own_are_matched_between_tables():
    xarray = pytest.importorskip("xarray")
    true = xarray.DataArray(TRUE[:3], dims=("run", "metric"))
    said = xarray.DataArray(SAID[:3], dims=("run", "metric"))
    expected = evaluation.lds(TRUE[:3], SAID[:3])
    np.testing.assert_array_equal(evaluation.lds(true, said.T), expected)
    masks = xarray.DataArray(MASKS[:4], dims=("run", "source"))
    scores = xarray.DataArray(np.c_[TRUE[:4], TRUE[:4, 0]], dims=("run", "metric"))
    one = fit_surrogate(masks, scores, kernel="linear", ridge=0.1).attribute()
    for turned in ((masks.T, scores), (masks, scores.T), (masks.T, scores.T)):
        other = fit_surrogate(*turned, kernel="linear", ridge=0.1).attribute()
        np.testing.assert_array_equal(other, one)
    ours = xarray.DataArray(SAID[:3], dims=("subset", "target")).T
    np.testing.assert_array_equal(evaluation.lds(true, ours), expected)
    bare = xarray.DataArray(SAID[:3]).T
    assert bare.dims == ("dim_1", "dim_0")  # which nobody named
    np.testing.assert_array_equal(evaluation.lds(true, bare), evaluation.lds(TRUE[:3], SAID[:3].T))


def test_errors_say_what_works():
    masks = table(MASKS, "subset", "task").set_axis(list("abcz"), axis=1)
    with pytest.raises(ValueError, match=r"go by position: pass its `\.to_numpy\(\)`"):
        surrogate().predict(masks)
    np.testing.assert_array_equal(surrogate().predict(masks.to_numpy()), surrogate().predict(MASKS))
