"""The scikit-learn estimator: its contract, and the numbers of ``fit_surrogate`` and ``Ridge``."""

import itertools
import sys

import joblib
import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn import config_context
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import VarianceThreshold
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, GroupKFold, KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.utils.estimator_checks import parametrize_with_checks

from ksm_ext import RBF, Linear, fit_surrogate
from ksm_ext.sklearn import SurrogateRegressor, lds_score

N, M = 6, 40
RNG = np.random.default_rng(0)
MASKS = RNG.integers(0, 2, (M, N))
WEIGHTS = RNG.dirichlet(np.ones(N), M)
EFFECTS, NOISE = RNG.normal(size=(N, 2)), 0.1 * RNG.normal(size=(M, 2))


def scores_of(X):
    return X @ EFFECTS + X[:, :1] * X[:, 1:2] + NOISE


SCORES = scores_of(MASKS)


def where_rows_of_weight_are_no_repeats(estimator):
    """A chosen ridge: repeats of one subset measure the noise of a run, which weights do not."""
    if estimator.ridge != "loo":
        return {}
    kinds = ("dense_data", "sparse_data")
    return {
        f"check_sample_weight_equivalence_on_{kind}": "repeats tell the noise" for kind in kinds
    }


@parametrize_with_checks(
    [
        SurrogateRegressor(kernel="linear"),
        SurrogateRegressor(kernel="lasso"),
        SurrogateRegressor(kernel="rbf", ridge=0.1),
        SurrogateRegressor(kernel="linear", ridge=1.0, missing="drop"),
    ],
    expected_failed_checks=where_rows_of_weight_are_no_repeats,
)
def test_the_contract_of_estimators(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [SurrogateRegressor()], expected_failed_checks=where_rows_of_weight_are_no_repeats
)
def test_the_contract_of_estimators_by_default(estimator, check):
    check(estimator)


@pytest.mark.parametrize("X", [MASKS, MASKS.astype(bool), WEIGHTS], ids=["0/1", "bool", "weights"])
@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel": ["linear", "exponential"]},
        {"kernel": RBF(gamma=0.3), "ridge": 0.1, "center": False},
    ],
    ids=["searched", "given"],
)
def test_the_numbers_of_fit_surrogate(X, one, options):
    y = scores_of(X)[:, 0].astype(np.float32) if one else scores_of(X)
    regressor = SurrogateRegressor(**options).fit(X, y)
    surrogate = fit_surrogate(X, y, **options)
    np.testing.assert_array_equal(regressor.predict(X[:9]), surrogate.predict(X[:9]))
    np.testing.assert_array_equal(regressor.attribute(), surrogate.attribute())
    mine = regressor.predict(X[:9], return_std=True)
    np.testing.assert_array_equal(mine, surrogate.predict(X[:9], return_std=True))
    assert mine[0].dtype == mine[1].dtype == y.dtype
    if X is not WEIGHTS:
        mine = regressor.attribute("shapley", return_std=True)
        np.testing.assert_array_equal(mine, surrogate.attribute("shapley", return_std=True))
        mine = regressor.interactions("banzhaf")
        np.testing.assert_array_equal(mine, surrogate.interactions("banzhaf"))


def test_shares_answer_only_what_is_defined_on_them():
    regressor = SurrogateRegressor(kernel="rbf", ridge=0.1).fit(WEIGHTS, scores_of(WEIGHTS))
    with pytest.raises(ValueError, match="`masks` must be 0/1 for interactions, got real-valued"):
        regressor.interactions()


@pytest.mark.parametrize("X", [MASKS, WEIGHTS], ids=["0/1", "weights"])
@pytest.mark.parametrize("center", [True, False])
def test_linear_with_a_fixed_ridge_is_ridge_regression(X, center):
    regressor = SurrogateRegressor(kernel="linear", ridge=0.7, center=center).fit(X, SCORES)
    peer = Ridge(alpha=0.7, fit_intercept=center).fit(X, SCORES)
    np.testing.assert_allclose(regressor.predict(X), peer.predict(X), rtol=0, atol=1e-6)
    if X is MASKS:
        np.testing.assert_allclose(regressor.attribute(), peer.coef_.T, rtol=0, atol=1e-6)


SURENESS = RNG.integers(1, 4, M) * RNG.uniform(0.5, 2.0, M)


@pytest.mark.parametrize("X", [MASKS, WEIGHTS], ids=["0/1", "weights"])
@pytest.mark.parametrize("center", [True, False])
def test_weighted_rows_are_those_of_ridge_regression(X, center):
    mine = SurrogateRegressor(kernel="linear", ridge=0.7, center=center)
    peer = Ridge(alpha=0.7, fit_intercept=center)
    for model in (mine, peer):
        model.fit(X, SCORES, sample_weight=SURENESS)
    np.testing.assert_allclose(mine.predict(X), peer.predict(X), rtol=0, atol=1e-6)
    assert np.abs(mine.predict(X) - clone(peer).fit(X, SCORES).predict(X)).max() > 1e-3
    np.testing.assert_allclose(mine.score(X, SCORES, SURENESS), peer.score(X, SCORES, SURENESS))


@pytest.mark.parametrize("X", [MASKS, WEIGHTS], ids=["0/1", "weights"])
def test_weighted_rows_are_those_of_kernel_ridge_regression(X):
    mine = SurrogateRegressor(kernel=RBF(gamma=0.3), ridge=0.7, center=False)
    peer = KernelRidge(alpha=0.7, kernel="rbf", gamma=0.3)
    for model in (mine, peer):
        model.fit(X, SCORES, sample_weight=SURENESS)
    np.testing.assert_allclose(mine.predict(X), peer.predict(X), rtol=0, atol=1e-6)


def test_weights_go_through_folds_and_searches():
    options = {"kernel": "linear", "ridge": 1.0}
    params = {"sample_weight": SURENESS}
    with config_context(enable_metadata_routing=True):
        model = SurrogateRegressor(**options).set_fit_request(sample_weight=True)
        model.set_score_request(sample_weight=False)
        found = cross_val_score(model, MASKS, SCORES, cv=KFold(4), params=params)
        grid = {"ridge": [0.1, 1.0]}
        search = GridSearchCV(model, grid, cv=KFold(4)).fit(MASKS, SCORES, **params)
    expected = []
    for train, held in KFold(4).split(MASKS):
        alone = SurrogateRegressor(**options)
        alone.fit(MASKS[train], SCORES[train], sample_weight=SURENESS[train])
        expected.append(alone.score(MASKS[held], SCORES[held]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"][1], np.mean(expected))
    best = clone(search.best_estimator_).fit(MASKS, SCORES, sample_weight=SURENESS)
    np.testing.assert_array_equal(search.predict(MASKS), best.predict(MASKS))


def test_weights_go_by_the_labels_of_rows():
    rows = [f"run {i}" for i in range(M)]
    X, y = pd.DataFrame(MASKS, rows), pd.DataFrame(SCORES, rows)
    weights = pd.Series(SURENESS, rows)
    model, other = (SurrogateRegressor(kernel="linear", ridge=1.0) for _ in range(2))
    model.fit(X, y[::-1], sample_weight=weights.iloc[::-1])
    other.fit(X, y, sample_weight=SURENESS)
    np.testing.assert_array_equal(model.predict(X), other.predict(X))
    assert model.score(X, y[::-1], weights[::-1]) == other.score(X, y, SURENESS)


GROUPS = np.arange(M) % 9 // 2  # of unequal sizes


def error_without(groups, y, options, weights=None):
    """Squared leave-one-group-out error by refitting, in variances, the mean over targets."""
    squares = np.full(y.shape, np.nan)
    for group in np.unique(groups):
        held = groups == group
        sure = None if weights is None else weights[~held]
        fitted = fit_surrogate(
            MASKS[~held], y[~held], sample_weight=sure, missing="drop", **options
        )
        squares[held] = (y[held] - fitted.predict(MASKS[held])) ** 2
    each = []
    for j, seen in enumerate(~np.isnan(y.T)):
        share = None if weights is None else weights[seen]
        mean = np.average(y[seen, j], weights=share)
        spread = np.average((y[seen, j] - mean) ** 2, weights=share)
        each.append(np.average(squares[seen, j], weights=share) / spread)
    return np.mean(each)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("kind", ["plain", "weighted", "missing", "constant"])
def test_groups_choose_what_predicts_groups_left_out(kind, center, monkeypatch):
    """Of all kernels and ridges: by refitting without each group, one after the other."""
    y, weights = SCORES.copy(), SURENESS if kind == "weighted" else None
    if kind == "missing":
        y[::7, 0] = np.nan
    if kind == "constant":
        monkeypatch.setitem(globals(), "MASKS", np.column_stack([MASKS, np.ones(M, int)]))
    kernels = [Linear(), RBF(gamma=0.05), RBF(gamma=0.5)]
    options = {"center": center, "missing": "drop" if kind == "missing" else "error"}
    model = SurrogateRegressor(kernel=kernels, **options)
    model.fit(MASKS, y, sample_weight=weights, groups=GROUPS)
    (chosen,) = {(term.kernel, float(term.ridge[0])) for term in model.surrogate_.kernel_terms}
    size = MASKS[:, MASKS.min(0) < MASKS.max(0) if center else slice(None)].sum(1).mean()
    found = {}
    for kernel in kernels:
        for relative in 10.0 ** (np.arange(-10, 7) / 2):
            given = {"kernel": kernel, "ridge": relative * (size if kernel == Linear() else 1)}
            error = error_without(GROUPS, y, {"center": center, **given}, weights)
            found[kernel, given["ridge"]] = error
    best = min(found, key=found.get)
    assert chosen[0] == best[0] and chosen[1] == pytest.approx(best[1], rel=1e-9)
    assert model.group_error_ == pytest.approx(found[best], rel=1e-6)
    options |= {"kernel": chosen[0], "ridge": chosen[1]}
    refitted = fit_surrogate(MASKS, y, sample_weight=weights, **options)
    np.testing.assert_allclose(model.predict(MASKS), refitted.predict(MASKS), rtol=1e-9)


def test_groups_of_one_row_are_leaving_one_out():
    model = SurrogateRegressor(kernel=RBF(gamma=0.3), ridge=0.1).fit(
        MASKS, SCORES, groups=[f"row {i}" for i in range(M)]
    )
    rows = fit_surrogate(MASKS, SCORES, kernel=RBF(gamma=0.3), ridge=0.1)
    if len(rows.masks) == M:
        errors = (rows.loo_residuals**2).mean(0) / SCORES.var(0)
        assert model.group_error_ == pytest.approx(errors.mean(), rel=1e-9)


def batches(rng, num):
    """Families of five subsets that are alike, whose runs share an offset."""
    X = np.repeat(rng.integers(0, 2, (num, 10)), 5, 0) ^ (rng.random((5 * num, 10)) < 0.15)
    y = X @ np.linspace(-1, 1, 10) + 2 * np.repeat(rng.normal(size=num), 5)
    return X, y + 0.1 * rng.normal(size=5 * num)


def test_groups_tell_how_well_new_batches_are_predicted():
    """Leaving out single rows does not: the others of the batch tell its offset."""
    ratios = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        (X, y), (new, outcome) = batches(rng, 24), batches(rng, 60)
        model = SurrogateRegressor(kernel="rbf").fit(X, y, groups=np.repeat(np.arange(24), 5))
        error = np.mean((model.predict(new) - outcome) ** 2) / y.var()
        single = float(fit_surrogate(X, y, kernel="rbf").loo_error)
        ratios.append([np.log(model.group_error_ / error), np.log(single / error)])
    by_groups, by_rows = np.mean(ratios, 0)
    assert abs(by_groups) < 0.3 and by_rows < -0.5


def test_groups_go_through_folds_and_searches():
    options = {"kernel": ["linear", "rbf"]}
    with config_context(enable_metadata_routing=True):
        model = SurrogateRegressor(**options).set_fit_request(groups=True)
        params = {"groups": GROUPS}
        found = cross_val_score(model, MASKS, SCORES, cv=GroupKFold(3), params=params)
    expected = []
    for train, held in GroupKFold(3).split(MASKS, groups=GROUPS):
        alone = SurrogateRegressor(**options).fit(MASKS[train], SCORES[train], groups=GROUPS[train])
        expected.append(alone.score(MASKS[held], SCORES[held]))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_groups_go_by_the_labels_of_rows():
    rows = [f"run {i}" for i in range(M)]
    X, groups = pd.DataFrame(MASKS, rows), pd.Series(GROUPS, rows)
    models = [SurrogateRegressor(kernel="rbf") for _ in range(2)]
    models[0].fit(X, pd.DataFrame(SCORES, rows), groups=groups.iloc[::-1])
    models[1].fit(MASKS, SCORES, groups=GROUPS)
    assert models[0].group_error_ == models[1].group_error_


@pytest.mark.parametrize(
    "options, groups, found",
    [
        ({}, [0, 1], f"`groups` must be of {M} labels, got 2. Say for each row"),
        ({}, ["a"] * M, "`groups` must be two or more for every target, got one. Leave them out"),
        ({"criterion": "rank"}, GROUPS, "`criterion` must be 'error' with groups, got 'rank'"),
        ({"share_ridge": False}, GROUPS, "`share_ridge` must be 'auto' or True with groups"),
        ({"kernel": "lasso"}, GROUPS, "`kernel` must be a kernel with groups, got 'lasso'"),
    ],
)
def test_what_no_groups_can_choose(options, groups, found):
    with pytest.raises(ValueError, match=found):
        SurrogateRegressor(**{"kernel": "linear", **options}).fit(MASKS, SCORES, groups=groups)


def test_missing_targets_are_fitted_and_scored_where_they_are():
    y = SCORES.copy()
    y[::5, 0] = y[3, 1] = np.nan
    options = {"kernel": "rbf", "ridge": 0.1}
    model = SurrogateRegressor(missing="drop", **options).fit(MASKS, y)
    for j, seen in enumerate(~np.isnan(y.T)):
        alone = SurrogateRegressor(**options).fit(MASKS[seen], y[seen, j])
        np.testing.assert_allclose(model.predict(MASKS)[:, j], alone.predict(MASKS), rtol=1e-9)
    each = [
        r2_score(y[seen, j], model.predict(MASKS)[seen, j]) for j, seen in enumerate(~np.isnan(y.T))
    ]
    assert model.score(MASKS, y) == pytest.approx(np.mean(each), rel=1e-12)
    assert np.isfinite(cross_val_score(model, MASKS, y, cv=KFold(4))).all()
    with pytest.raises(ValueError, match="NaN"):
        SurrogateRegressor(**options).fit(MASKS, y)


def test_it_is_searched_by_grid():
    grid = {"kernel": ["linear", RBF(gamma=0.3)], "ridge": [0.01, 1.0], "share_ridge": [True]}
    search = GridSearchCV(SurrogateRegressor(), grid, cv=KFold(4)).fit(MASKS, SCORES)
    errors = {}
    for kernel, ridge in itertools.product(grid["kernel"], grid["ridge"]):
        scores = []
        for train, held in KFold(4).split(MASKS):
            model = fit_surrogate(MASKS[train], SCORES[train], kernel=kernel, ridge=ridge)
            residual = ((SCORES[held] - model.predict(MASKS[held])) ** 2).sum(0)
            total = ((SCORES[held] - SCORES[held].mean(0)) ** 2).sum(0)
            scores.append((1 - residual / total).mean())  # R², uniform over targets
        errors[kernel, ridge] = np.mean(scores)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], list(errors.values()))
    best = max(errors, key=errors.get)
    assert (search.best_params_["kernel"], search.best_params_["ridge"]) == best


@pytest.mark.parametrize(
    "model", [SurrogateRegressor(kernel="rbf", ridge=0.1), LinearRegression()], ids=repr
)
def test_lds_as_a_scorer(model):
    found = cross_val_score(model, MASKS, SCORES, cv=KFold(3), scoring=lds_score)
    for value, (train, held) in zip(found, KFold(3).split(MASKS), strict=True):
        predicted = clone(model).fit(MASKS[train], SCORES[train]).predict(MASKS[held])
        expected = [spearmanr(predicted[:, j], SCORES[held, j]).statistic for j in range(2)]
        assert value == pytest.approx(np.mean(expected), rel=1e-12)


def test_lds_of_a_constant_target_is_refused():
    model = SurrogateRegressor(kernel="linear").fit(MASKS, SCORES)
    with pytest.raises(ValueError, match="`true_scores` must be varying in every column"):
        lds_score(model, MASKS, np.ones_like(SCORES))


def test_names_pass_through_a_pipeline():
    X = pd.DataFrame(MASKS, columns=list("abcdef")).assign(always=1)
    pipeline = make_pipeline(VarianceThreshold(), SurrogateRegressor(kernel="linear", ridge=1.0))
    pipeline.set_output(transform="pandas").fit(X, pd.DataFrame(SCORES, columns=["u", "v"]))
    regressor = pipeline[-1]
    assert list(regressor.feature_names_in_) == list("abcdef")
    assert regressor.surrogate_.task_names == tuple("abcdef")
    assert regressor.surrogate_.target_names == ("u", "v")
    expected = fit_surrogate(MASKS, SCORES, kernel="linear", ridge=1.0).predict(MASKS)
    np.testing.assert_array_equal(pipeline.predict(X), expected)
    with pytest.raises(ValueError, match="feature names should match"):
        regressor.predict(X[list("bacdef")])


def test_it_travels_by_joblib(tmp_path):
    regressor = SurrogateRegressor(kernel=[RBF(), "linear"]).fit(MASKS, SCORES)
    joblib.dump(regressor, tmp_path / "regressor.joblib")
    again = joblib.load(tmp_path / "regressor.joblib")
    assert again.get_params() == regressor.get_params() == clone(regressor).get_params()
    np.testing.assert_array_equal(again.predict(MASKS), regressor.predict(MASKS))
    np.testing.assert_array_equal(again.attribute("shapley"), regressor.attribute("shapley"))


def test_nothing_is_said_before_fitting():
    for ask in (lambda r: r.predict(MASKS), lambda r: r.attribute(), lambda r: r.interactions()):
        with pytest.raises(NotFittedError):
            ask(SurrogateRegressor())


@pytest.mark.parametrize(
    "X, y, options, found",
    [
        (MASKS[:2], SCORES[:2], {}, r"Found array with 2 sample\(s\).*minimum of 3 is required"),
        (MASKS, np.ones(M), {}, "`scores` must be varying over subsets, got constant targets only"),
        (MASKS, SCORES, {"kernel": "cubic"}, "`kernel` must be 'auto', one of linear"),
        (MASKS, SCORES, {"criterion": "r2"}, "`criterion` must be one of 'error', 'rank', "),
    ],
)
def test_what_cannot_be_fitted(X, y, options, found):
    with pytest.raises(ValueError, match=found):
        SurrogateRegressor(**options).fit(X, y)


def test_its_name_hides_nothing():
    """The module is called as the library is."""
    assert sys.modules["sklearn"].__file__.endswith("sklearn/__init__.py")
    assert sys.modules["ksm_ext.sklearn"].__file__.endswith("ksm_ext/sklearn.py")


def test_maps_criteria_and_learnt_decays_go_through_searches():
    accuracies = 1 / (1 + np.exp(-SCORES))
    grid = {"warp": ["identity", "normal"], "criterion": ["error", "attribution"]}
    found = GridSearchCV(SurrogateRegressor(kernel="linear"), grid, cv=3).fit(MASKS, accuracies)
    best = found.best_estimator_
    alone = fit_surrogate(MASKS, accuracies, kernel="linear", **found.best_params_)
    np.testing.assert_array_equal(best.predict(MASKS), alone.predict(MASKS))
    assert SurrogateRegressor(kernel="ard").fit(MASKS, SCORES).score(MASKS, SCORES) > 0
