"""Metrics against SciPy, scikit-learn and their formulas; intervals against closed forms."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from ksm_ext.evaluation import (
    Interval,
    bootstrap,
    jackknife,
    lds,
    loo_correlation,
    mislabel_auc,
    noise_ceiling,
    pooled_runs,
    relative_error,
    residual_error,
    retrain_noise,
)


def tables(rows=30, targets=4, seed=0, ties=False):
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(rows, targets))
    predicted = true + rng.normal(size=(rows, targets))
    return (true.round(0), predicted.round(0)) if ties else (true, predicted)


def by_column(function, a, b):
    return np.array([function(a[:, j], b[:, j])[0] for j in range(a.shape[1])])


# Correlations


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("rows, targets", [(2, 1), (3, 5), (30, 4), (257, 33)])
def test_lds_is_spearmanr_of_each_column(rows, targets, ties):
    true, predicted = tables(rows, targets, ties=ties and rows > 3)
    expected = by_column(stats.spearmanr, true, predicted)
    np.testing.assert_allclose(lds(true, predicted), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "method, oracle", [("pearson", stats.pearsonr), ("spearman", stats.spearmanr)]
)
def test_loo_correlation_is_scipys(method, oracle):
    tau, truth = tables(20, 6, ties=method == "spearman")
    actual = loo_correlation(tau, truth, method=method)
    np.testing.assert_allclose(actual, by_column(oracle, tau, truth), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_correlations_are_blind_to_scale(scale):
    tau, truth = tables()
    expected = by_column(stats.pearsonr, tau, truth)
    np.testing.assert_allclose(loo_correlation(scale * tau, truth), expected, atol=1e-13)


def test_noise_ceiling_is_symmetric_and_one_for_a_perfect_repeat():
    a, b = tables()
    np.testing.assert_allclose(noise_ceiling(a, b), noise_ceiling(b, a), atol=1e-15)
    np.testing.assert_allclose(noise_ceiling(a, np.exp(a)), 1, atol=1e-14)


def test_a_perfect_predictor_reaches_the_root_of_the_ceiling():
    rng = np.random.default_rng(0)
    expected_score = rng.normal(size=(4000, 8))
    runs = [expected_score + rng.normal(size=(4000, 8)) for _ in range(2)]
    ceiling = np.sqrt(noise_ceiling(*runs).mean())
    assert abs(lds(runs[0], expected_score).mean() - ceiling) < 0.02


def test_constant_predictions_count_as_zero():
    true, predicted = tables()
    predicted[:, 2] = 0.1
    assert lds(true, predicted)[2] == 0
    assert loo_correlation(predicted, true)[2] == 0
    assert np.isfinite(lds(true, predicted)).all()


def test_constant_truth_is_an_error_unless_asked_for():
    true, predicted = tables()
    true[:, [1, 3]] = 0.1
    form = r"`true_scores` must be varying .* 2 constant columns, the f"
    with pytest.raises(ValueError, match=form):
        lds(true, predicted)
    with pytest.raises(ValueError, match=r"`true_loo` must be varying in every column"):
        loo_correlation(predicted, true)
    with pytest.raises(ValueError, match=r"`scores_b` must be varying"):
        noise_ceiling(predicted, true)
    expected = lds(tables()[0], predicted)
    expected[[1, 3]] = 0
    np.testing.assert_array_equal(lds(true, predicted, constant="zero"), expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_differences_of_rounding_are_ties(dtype):
    """.1 + .2 and .3 are one value; ranks of rounding would be a correlation of their own."""
    rng = np.random.default_rng(0)
    masks = rng.random((60, 6)) < 0.5
    tenths = np.array([1, 2, 3, 3, 2, 1])
    said = np.zeros(60, dtype)
    for task in range(6):
        said += masks[:, task] * dtype(tenths[task] / 10)
    assert len(np.unique(said)) > len(np.unique(masks @ tenths))
    true = rng.normal(size=60)
    expected = stats.spearmanr(true, masks @ tenths)[0]
    np.testing.assert_allclose(lds(true, said), expected, atol=1e-14)
    np.testing.assert_allclose(noise_ceiling(said, true), expected, atol=1e-14)
    actual = loo_correlation(said, true, method="spearman")
    np.testing.assert_allclose(actual, expected, atol=1e-14)


def test_what_is_constant_but_for_rounding_is_constant():
    true, predicted = tables()
    predicted[:, 2] = 0.3 + 3e-17 * np.arange(30)
    assert lds(true, predicted)[2] == loo_correlation(predicted, true)[2] == 0
    with pytest.raises(ValueError, match="`true_scores` must be varying in every column"):
        residual_error(predicted, true)


# Errors


def test_residual_error():
    true, predicted = tables()
    mse, variance = ((true - predicted) ** 2).mean(axis=0), true.var(axis=0, ddof=1)
    np.testing.assert_allclose(residual_error(true, predicted), mse / variance, rtol=1e-14)
    pooled = residual_error(true, predicted, pooled=True)
    np.testing.assert_allclose(pooled, mse.sum() / variance.sum(), rtol=1e-14)
    assert pooled.shape == ()


def test_residual_error_of_constant_truth():
    true, predicted = tables()
    true[:, 0] = 1
    with pytest.raises(ValueError, match=r"1 constant columns, the first 0. .*pooled=True"):
        residual_error(true, predicted)
    errors = ((true - predicted) ** 2).mean(axis=0).sum()
    expected = errors / true.var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(residual_error(true, predicted, pooled=True), expected)
    with pytest.raises(ValueError, match=r"There is nothing to predict"):
        residual_error(np.ones((3, 2)), predicted[:3, :2], pooled=True)


def test_relative_error_in_both_definitions():
    true, predicted = tables()
    ratio = np.abs((predicted - true) / true)
    squared = relative_error(true, predicted)
    np.testing.assert_allclose(squared, (ratio**2).mean(axis=0), rtol=1e-13)
    absolute = relative_error(true, predicted, definition="absolute")
    np.testing.assert_allclose(absolute, ratio.mean(axis=0), rtol=1e-13)


@pytest.mark.parametrize("baseline", [0.5, [0.5, -1.0, 2.0, 0.1]])
def test_relative_error_against_a_baseline(baseline):
    true, predicted = tables()
    scale = np.maximum(np.abs(true), np.abs(baseline))
    expected = (((predicted - true) / scale) ** 2).mean(axis=0)
    np.testing.assert_allclose(relative_error(true, predicted, baseline=baseline), expected)


def test_relative_error_of_zero_truth():
    with pytest.raises(ValueError, match=r"`true_scores` must be non-zero, got 0 at \(1, 0\)"):
        relative_error([1.0, 0.0], [1.0, 1.0])
    assert relative_error([1.0, 0.0], [1.0, 1.0], baseline=2.0) == 0.125


def test_retrain_noise_is_the_pooled_variance_within_groups():
    rng = np.random.default_rng(0)
    rows = np.array([0, 1, 0, 2, 1, 0, 3])
    masks, scores = np.eye(4, dtype=bool)[rows], rng.normal(size=(7, 3))
    groups = [scores[rows == g] for g in range(4)]
    squares = sum(((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in groups)
    np.testing.assert_allclose(retrain_noise(masks, scores), squares / 3, rtol=1e-13)


def test_pooled_runs_leave_out_what_does_not_count():
    rng = np.random.default_rng(1)
    group, used = np.array([0, 1, 0, 2, 1, 0, 1, 3]), rng.random((8, 3)) < 0.8
    runs = 1e6 + rng.normal(size=(8, 3))
    answers = pooled_runs(*(torch.from_numpy(each) for each in (runs, group, used)))
    means, counts, deviation = (answer.numpy() for answer in answers)
    for j in range(3):
        members = [runs[(group == g) & used[:, j], j] for g in range(4)]
        assert counts[:, j].tolist() == [len(each) for each in members]
        expected = [each.mean() if len(each) else np.nan for each in members]
        np.testing.assert_allclose(means[:, j], expected, rtol=1e-14)
        squares = sum(((each - each.mean()) ** 2).sum() for each in members if len(each))
        freedom = sum(len(each) - 1 for each in members if len(each))
        np.testing.assert_allclose(deviation[j], np.sqrt(squares / freedom), rtol=1e-8)


def test_retrain_noise_is_unbiased():
    rng = np.random.default_rng(0)
    masks = np.repeat(rng.random((200, 12)) < 0.5, 2, axis=0)
    scores = masks @ rng.normal(size=(12, 50)) + 0.3 * rng.normal(size=(400, 50))
    assert abs(retrain_noise(masks, scores).mean() / 0.09 - 1) < 0.05


def test_retrain_noise_needs_repeats():
    with pytest.raises(ValueError, match=r"`masks` must be with a subset .* got 3 distinct rows"):
        retrain_noise(np.eye(3), np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"`masks` must be 2 rows like `scores`, got 3"):
        retrain_noise(np.eye(3), np.ones((2, 2)))


@pytest.mark.parametrize("ties", [False, True])
def test_mislabel_auc_is_sklearns(ties):
    tau, _ = tables(40, 5, ties=ties)
    bad = np.random.default_rng(1).random(40) < 0.3
    expected = [roc_auc_score(bad, tau[:, j]) for j in range(5)]
    np.testing.assert_allclose(mislabel_auc(tau, bad), expected, atol=1e-14)


@pytest.mark.parametrize(
    "bad, found", [([0, 0], "0 bad of 2"), ([1, 1], "2 bad of 2"), ([1], "shape")]
)
def test_mislabel_auc_needs_both(bad, found):
    with pytest.raises(ValueError, match=f"`is_bad` must be .*{found}"):
        mislabel_auc([1.0, 2.0], bad)


# Intervals


def test_jackknife_of_a_mean_is_the_t_interval():
    values = np.random.default_rng(0).normal(size=(15, 1))
    interval = jackknife(lambda table: table.mean(dim=0), torch.tensor(values), level=0.9)
    error = values.std(ddof=1) / np.sqrt(15)
    low, high = stats.t.interval(0.9, 14, loc=values.mean(), scale=error)
    np.testing.assert_allclose([interval.low, interval.high], [low, high], rtol=1e-12)
    assert interval.estimate == pytest.approx(values.mean()) and interval.level == 0.9


def test_jackknife_covers_the_true_correlation():
    rng, rho, hits = np.random.default_rng(0), 0.6, 0
    true = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's coefficient of a normal pair
    for _ in range(80):
        x = rng.normal(size=(20, 10))
        y = rho * x + np.sqrt(1 - rho**2) * rng.normal(size=(20, 10))
        interval = jackknife(lds, x, y, level=0.9)
        hits += interval.low <= true <= interval.high
    assert 0.8 <= hits / 80 < 1


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_bootstrap_over_targets_is_scipys(method):
    true, predicted = tables(20, 25)
    interval = bootstrap(lds, true, predicted, resample="targets", method=method, seed=3)
    expected = stats.bootstrap(
        (lds(true, predicted),),
        np.mean,
        n_resamples=1000,
        method=method,
        rng=np.random.default_rng(3),
    ).confidence_interval
    np.testing.assert_allclose([interval.low, interval.high], expected, rtol=1e-12)


def test_bootstrap_over_rows_resamples_rows_together():
    true, predicted = tables(12, 3)
    interval = bootstrap(lds, true, predicted, num_resamples=50, seed=3)
    rows = np.random.default_rng(3).integers(0, 12, (50, 12))
    means = [lds(true[chosen], predicted[chosen]).mean() for chosen in rows]
    expected = np.quantile(means, [0.025, 0.975])
    np.testing.assert_allclose([interval.low, interval.high], expected, rtol=1e-12)
    assert interval.estimate == pytest.approx(lds(true, predicted).mean())
    assert interval == bootstrap(lds, true, predicted, num_resamples=50, seed=3)


def test_options_reach_the_metric():
    true, predicted = tables(12, 3)
    true[:, 0] = 1
    assert jackknife(lds, true, predicted, constant="zero").estimate < 1
    pooled = bootstrap(residual_error, true, predicted, pooled=True, num_resamples=20)
    assert pooled.estimate == residual_error(true, predicted, pooled=True)


def test_intervals_say_which_resample_failed():
    for interval in (jackknife, bootstrap):
        with pytest.raises(ValueError, match=r"`arrays` must be such that the metric .* varying"):
            interval(lds, np.eye(10)[9], np.arange(10.0))


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda a: bootstrap(lds, a, a, level=1.0), "`level` must be strictly between 0 and 1"),
        (lambda a: bootstrap(lds, a, a, resample="both"), "`resample` must be one of"),
        (lambda a: bootstrap(lds, a, a, method="t"), "`method` must be one of"),
        (lambda a: bootstrap(lds, a, a[:2]), "`arrays` must be tables with the same number"),
        (lambda a: bootstrap(lds), "same number of rows, got none"),
        (lambda a: bootstrap(lds, a, a, resample="targets"), "at least 2 targets"),
        (lambda a: jackknife(lds, a, a), "`arrays` must be 10 rows or longer, got shape \\(5"),
        (lambda a: bootstrap(lds, a, a), "`arrays` must be 10 rows or longer, got shape \\(5"),
        (lambda a: jackknife(np.mean, a[:2]), "`arrays` must be 3 rows or longer"),
        (lambda a: jackknife(np.mean, a, bounds=(1, -1)), "`bounds` must be two ascending"),
    ],
)
def test_interval_errors(call, found):
    with pytest.raises(ValueError, match=found):
        call(np.arange(5.0))


def test_jackknife_of_a_correlation_is_fishers():
    """On the scale of artanh, by the delta method; as wide as the plain one in the middle."""
    true, predicted = tables(40, 2)
    interval = jackknife(lds, true, predicted, level=0.9)
    plain = jackknife(lds, true, predicted, level=0.9, bounds=(-1e9, 1e9))
    z, half = np.arctanh(interval.estimate), (plain.high - plain.low) / 2
    ends = np.tanh(z + np.array([-1, 1]) * half / (1 - interval.estimate**2))
    np.testing.assert_allclose([interval.low, interval.high], ends, rtol=1e-6)
    assert jackknife(partial(lds, constant="zero"), true, predicted, level=0.9) == interval


def test_jackknife_of_an_error_stays_positive():
    true, predicted = tables(12, 1)
    predicted[0] += 20  # one row carries the error
    interval, plain = (
        jackknife(residual_error, true, predicted, level=0.99, **bounds)
        for bounds in ({}, {"bounds": (-1e9, 1e9)})
    )
    half = (plain.high - plain.low) / 2
    factor = np.exp(half / interval.estimate)
    assert plain.low < 0 < interval.low
    np.testing.assert_allclose(interval.low, interval.estimate / factor, rtol=1e-6)
    np.testing.assert_allclose(interval.high, interval.estimate * factor, rtol=1e-6)


@pytest.mark.parametrize("flags", [[0, 2, 1], [0.5, 0, 1], [np.nan, 0, 1]])
def test_flags_are_true_or_false(flags):
    with pytest.raises(ValueError, match="`is_bad` must be boolean, or 0 and 1, got "):
        mislabel_auc([1.0, 2.0, 3.0], flags)


def test_interval_reads_well():
    assert str(Interval(0.8123, 0.7412, 0.8599, 0.95)) == "0.812 [0.741, 0.86]"


# Kinds and checks


METRICS = [lds, noise_ceiling, loo_correlation, residual_error, relative_error]
metrics = pytest.mark.parametrize("metric", METRICS)


@metrics
def test_kinds_come_back(metric):
    true, predicted = tables()
    expected = metric(true, predicted)
    assert isinstance(expected, np.ndarray) and expected.dtype == np.float64
    tensor = metric(torch.tensor(true), torch.tensor(predicted))
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), expected)
    frame = metric(pd.DataFrame(true, columns=list("abcd")), predicted)
    assert list(frame.index) == list("abcd")
    np.testing.assert_array_equal(frame.to_numpy(), expected)
    np.testing.assert_array_equal(metric(true.tolist(), predicted.tolist()), expected)
    np.testing.assert_array_equal(metric(np.asfortranarray(true), predicted), expected)


@metrics
def test_one_dimension_is_one_target(metric):
    true, predicted = tables()
    actual = metric(true[:, 0], predicted[:, 0])
    np.testing.assert_allclose(actual, metric(true, predicted)[:1], rtol=1e-14)


@metrics
def test_half_precision_is_computed_in_double(metric):
    true, predicted = (torch.tensor(table).half() for table in tables())
    torch.testing.assert_close(metric(true, predicted), metric(true.double(), predicted.double()))


@metrics
def test_shapes_and_values_are_checked(metric):
    true, predicted = tables()
    form = r"must be of shape \(30, 4\) like .*, got shape \(30, 3\)"
    with pytest.raises(ValueError, match=form):
        metric(true, predicted[:, :3])
    with pytest.raises(ValueError, match=r"must be 2-dimensional"):
        metric(true[None], predicted[None])
    predicted[3, 1] = np.nan
    with pytest.raises(ValueError, match=r"must be finite, got 1 NaN .* at \(3, 1\)"):
        metric(true, predicted)


def test_one_row_is_too_few():
    with pytest.raises(ValueError, match=r"`true_scores` must be 2 rows or more, got 1"):
        lds([[1.0]], [[2.0]])
