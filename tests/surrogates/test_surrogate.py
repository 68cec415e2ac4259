"""The fitted surrogate: answers, kinds and errors."""

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from problems import GAMMAS, close, many_subsets, of
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge

from ksm_ext import ANOVA2, RBF, Exponential, Linear, fit_surrogate
from ksm_ext.surrogates.masks import Masks

FIXED = {"kernel": RBF(gamma=0.2), "ridge": 0.1}
RIDGES = [1e-3, 0.1, 1.0, 30.0]
centred_or_not = pytest.mark.parametrize("center", [True, False])
KERNELS = [Linear(), RBF(gamma=0.2), Exponential(gamma=0.5), ANOVA2(0.2) + 0.5 * RBF(gamma=0.1)]
KERNELS += [RBF(0.2, amplitude=1.5), Exponential(GAMMAS, amplitude=-0.7)]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


# -- predictions --------------------------------------------------------------------------------


@pytest.mark.parametrize("ridge", RIDGES)
def test_linear_kernel_is_scikit_learn_ridge(ridge):
    masks, scores = many_subsets()
    surrogate = fit_surrogate(masks, scores, kernel="linear", ridge=ridge)
    peer = Ridge(alpha=ridge).fit(masks.double().numpy(), scores.numpy())
    query = reference.all_subsets(6)
    close(surrogate.predict(query), torch.from_numpy(peer.predict(query.double().numpy())))
    close(surrogate.attribute("loo"), torch.from_numpy(peer.coef_.T))


@pytest.mark.parametrize("ridge", RIDGES)
def test_rbf_without_intercept_is_scikit_learn_kernel_ridge(ridge):
    masks, scores = many_subsets()
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.3), ridge=ridge, center=False)
    peer = KernelRidge(alpha=ridge, kernel="rbf", gamma=0.3)
    peer.fit(masks.double().numpy(), scores.numpy())
    query = reference.all_subsets(6)
    close(surrogate.predict(query), torch.from_numpy(peer.predict(query.double().numpy())))


@every_kernel
@centred_or_not
@pytest.mark.parametrize("weights", [False, True], ids=["masks", "weights"])
def test_predictions_are_those_of_dense_algebra(kernel, center, weights):
    kernel = of(kernel, 6)
    masks, scores = many_subsets()
    table = torch.rand(20, 6).double() if weights else masks
    query = torch.rand(7, 6).double() if weights else torch.rand(7, 6) < 0.5
    surrogate = fit_surrogate(table, scores, kernel=kernel, ridge=0.2, center=center)
    x, y = table.double(), query.double()
    dual, intercept = reference.kernel_ridge(kernel.on_weights(x, x), scores, 0.2, center)
    close(surrogate.predict(query), kernel.on_weights(y, x) @ dual + intercept)
    residuals = reference.leave_one_out(kernel.on_weights(x, x), scores, 0.2, center)
    close(surrogate.loo_residuals, residuals)
    close(surrogate.loo_error, residuals.square().mean(0) / scores.var(0))


@every_kernel
@centred_or_not
def test_standard_deviations_for_real_weights(kernel, center):
    kernel = of(kernel, 4)
    table, scores, query = torch.rand(12, 4).double(), torch.randn(12).double(), torch.rand(5, 4)
    surrogate = fit_surrogate(table, scores, kernel=kernel, ridge=0.2, center=center)
    _, deviation = surrogate.predict(query, return_std=True)
    points = torch.cat([table, query.double()])
    arguments = (kernel.on_weights(points, points), torch.arange(12), 0.2, center)
    every = torch.eye(17, dtype=torch.float64)[12:]
    variance = reference.posterior_variance(every, *arguments)
    signal = surrogate.kernel_terms[0].signal_variance * surrogate.unit.square()
    close(deviation.square(), variance * signal, 1e-8)


def test_masks_may_be_asked_of_weights_and_weights_of_masks():
    masks, scores = many_subsets()
    surrogate = fit_surrogate(masks, scores, **FIXED)
    corners = torch.cat([masks[:3].double(), torch.full((1, 6), 0.5).double()])
    close(surrogate.predict(corners)[:3], surrogate.predict(masks[:3]))
    mixture = fit_surrogate(torch.rand(20, 6), scores, **FIXED)
    close(mixture.predict(masks[:3]), mixture.predict(masks[:3].double()))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_queries(rows):
    masks, scores = many_subsets()
    surrogate = fit_surrogate(masks, scores, **FIXED)
    mean, deviation = surrogate.predict(masks[:rows], return_std=True)
    assert mean.shape == deviation.shape == (rows, 2)


def test_deviations_shrink_where_there_are_scores():
    masks = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1]]).repeat(1, 2)
    masks[:, 3:] = 0
    surrogate = fit_surrogate(masks, [1.0, 2.0, 3.0, 2.5], kernel=RBF(gamma=0.5), ridge=1e-4)
    near, far = (surrogate.predict(rows, return_std=True)[1] for rows in (masks, 1 - masks))
    assert near.max() < 0.1 * far.min()


def test_intervals_cover_what_the_prior_draws():
    """95 % intervals of the readouts of 500 functions drawn from the prior."""
    n, t, kernel = 5, 500, RBF(gamma=0.1)
    subsets = reference.all_subsets(n)
    root = torch.linalg.cholesky(kernel.gram(Masks.of(subsets)))
    index = torch.randperm(2**n)[:20]
    values = root @ torch.randn(2**n, t, dtype=torch.float64)
    scores = values[index] + 0.1 * torch.randn(20, t, dtype=torch.float64)
    surrogate = fit_surrogate(subsets[index], scores, kernel=kernel, ridge=0.01)
    for readout in ("loo", "shapley", "banzhaf"):
        answer, deviation = surrogate.attribute(readout, return_std=True)
        truth = reference.effect_functionals(n, readout) @ values
        covered = ((answer - truth).abs() < 1.96 * deviation).double().mean().item()
        assert 0.90 < covered < 0.98


# -- kinds --------------------------------------------------------------------------------------


ANSWERS = {
    "predict": lambda s: s.predict([[True] * 6, [False] * 6]),
    "predict std": lambda s: s.predict([[True] * 6, [False] * 6], return_std=True)[1],
    "attribute": lambda s: s.attribute("shapley"),
    "attribute std": lambda s: s.attribute("loo", return_std=True)[1],
    "interactions": lambda s: s.interactions("loo"),
    "interactions std": lambda s: s.interactions("banzhaf", return_std=True)[1],
    "walsh_spectrum": lambda s: s.walsh_spectrum(),
    "loo_residuals": lambda s: s.loo_residuals,
    "loo_error": lambda s: s.loo_error,
}
SHAPES = [(2,), (2,), (6,), (6,), (6, 6), (6, 6), (6,), (20,), ()]
SHAPED = list(zip(ANSWERS.values(), SHAPES, strict=True))
every_answer = pytest.mark.parametrize("ask, shape", SHAPED, ids=ANSWERS)


@every_answer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.half, torch.int64], ids=str)
def test_answers_have_the_scores_kind_and_dtype(ask, shape, dtype):
    masks, scores = many_subsets()
    scores = (4 * scores).to(dtype)
    expected = {torch.float16: torch.float32, torch.int64: torch.float64}.get(dtype, dtype)
    double = ask(fit_surrogate(masks, scores.double(), **FIXED))
    answer = ask(fit_surrogate(masks, scores, **FIXED))
    assert answer.dtype == expected and answer.shape == (*shape, 2)
    torch.testing.assert_close(answer.double(), double, rtol=1e-6, atol=1e-6)
    single = ask(fit_surrogate(masks, scores[:, 1], **FIXED))
    assert single.shape == shape  # targets do not differ in what one fixed ridge gives
    torch.testing.assert_close(single.double(), double[..., 1], rtol=1e-6, atol=1e-6)
    for kind in (lambda x: x.numpy(), lambda x: x.tolist()):
        other = ask(fit_surrogate(kind(masks), kind(scores), **FIXED))
        assert isinstance(other, np.ndarray) and other.shape == (*shape, 2)
        np.testing.assert_allclose(other, answer.numpy(), rtol=1e-5, atol=1e-6)


def test_pandas_carries_names():
    masks, scores = many_subsets()
    tasks, targets = list("abcdef"), ["u", "v"]
    table = pd.DataFrame(masks.numpy(), columns=tasks)
    surrogate = fit_surrogate(table, pd.DataFrame(scores.numpy(), columns=targets), **FIXED)
    assert surrogate.task_names == tuple(tasks) and surrogate.target_names == tuple(targets)
    for frame in (surrogate.attribute("shapley"), surrogate.attribute("loo", return_std=True)[1]):
        assert list(frame.index) == tasks and list(frame.columns) == targets
    assert list(surrogate.predict(table).columns) == targets
    assert isinstance(surrogate.interactions("loo"), np.ndarray)
    single = fit_surrogate(table, pd.Series(scores[:, 0].numpy()), **FIXED)
    assert isinstance(single.attribute("loo"), pd.Series)
    assert list(single.attribute("loo").index) == tasks
    np.testing.assert_allclose(single.attribute("loo"), surrogate.attribute("loo")["u"])
    assert isinstance(single.predict(table), pd.Series)
    assert list(surrogate.loo_error.index) == targets and np.ndim(single.loo_error) == 0
    np.testing.assert_allclose(single.loo_error, surrogate.loo_error["u"])


def test_names_may_be_given():
    masks, scores = many_subsets(m=8, n=3)
    surrogate = fit_surrogate(
        masks, scores, kernel="linear", task_names=["x", "y", "z"], target_names=[1, 2]
    )
    assert surrogate.task_names == ("x", "y", "z") and surrogate.target_names == ("1", "2")


def test_text():
    masks, scores = many_subsets()
    text = str(fit_surrogate(masks, scores, **FIXED))
    assert text.startswith("Surrogate of 20 subsets, 6 tasks, 2 targets: rbf(gamma=0.2) (shared")
    assert "linear weights" in str(fit_surrogate(masks, scores, kernel="least_squares"))
    one = fit_surrogate([[0], [1], [0], [1]], [1.0, 2.0, 1.1, 2.2])
    assert str(one).startswith("Surrogate of 2 subsets, 1 task, 1 target: ")


# -- real weights -------------------------------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("shares", [True, False])
def test_leave_one_out_of_mixtures(kernel, shares):
    kernel = of(kernel, 4)
    weights = torch.rand(20, 4).double()
    if shares:
        weights /= weights.sum(1, keepdim=True)
    scores = torch.randn(20, 2).double()
    surrogate = fit_surrogate(weights, scores, kernel=kernel, ridge=0.1)
    mean = weights.mean(0)
    expected = []
    for i in range(4):
        without = mean.clone()
        without[i] = 0
        if shares:
            without *= mean.sum() / without.sum()
        points = torch.stack([mean, without])
        # the points are not rounded to 0/1, so predict takes them as weights
        values = surrogate.predict(points)
        expected.append(values[0] - values[1])
    close(surrogate.attribute("loo"), torch.stack(expected))


@every_kernel
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shares", [True, False])
def test_standard_deviations_of_leave_one_out_of_mixtures(kernel, center, shares):
    # those of differences between the mean mixture and the others, by dense algebra
    kernel = of(kernel, 3)
    weights = torch.rand(12, 3).double()
    weights = weights / weights.sum(1, keepdim=True) if shares else weights
    scores = torch.randn(12).double()
    surrogate = fit_surrogate(weights, scores, kernel=kernel, ridge=0.2, center=center)
    mean = weights.mean(0)
    without = mean * (1 - torch.eye(3).double())
    if shares:
        without = without / without.sum(1, keepdim=True)
    points = torch.cat([weights, mean[None], without])
    arguments = (kernel.on_weights(points, points), torch.arange(12), 0.2, center)
    every = torch.eye(16, dtype=torch.float64)
    variance = reference.posterior_variance(every[12] - every[13:], *arguments)
    signal = surrogate.kernel_terms[0].signal_variance * surrogate.unit.square()
    close(surrogate.attribute(return_std=True)[1].square(), variance * signal, 1e-8)


def test_the_rest_is_scaled_up_where_rows_share_a_sum_or_on_request():
    rounded = torch.rand(20, 4).double()
    rounded /= rounded.sum(1, keepdim=True)
    rounded *= 1 + 0.004 * torch.linspace(-1, 1, 20)[:, None].double()
    scores = rounded.square().sum(1)
    surrogate = fit_surrogate(rounded, scores, kernel="rbf")
    scaled, plain = (surrogate.attribute(scale_rest=flag) for flag in (True, False))
    close(surrogate.attribute(), scaled)
    assert (scaled - plain).abs().max() > 0.01
    mean = rounded.mean(0)
    points = torch.cat([mean[None], mean * (1 - torch.eye(4).double())])
    values = surrogate.predict(points)  # nothing is normalised
    close(plain, values[0] - values[1:])
    uneven = fit_surrogate(2 * rounded * torch.linspace(1, 2, 20)[:, None], scores, kernel="rbf")
    close(uneven.attribute(), uneven.attribute(scale_rest=False))
    masks = fit_surrogate(rounded > 0.2, scores)
    with pytest.raises(ValueError, match=r"^`scale_rest` must be left out for 0/1 masks, got True"):
        masks.attribute(scale_rest=True)


def test_what_mixtures_do_not_have():
    surrogate = fit_surrogate(torch.rand(12, 3), torch.randn(12), kernel="rbf", ridge=0.1)
    form = r"^`readout` must be 'loo' for real-valued weights, got '{}'\. Shapley"
    for readout in ("shapley", "banzhaf"):
        with pytest.raises(ValueError, match=form.format(readout)):
            surrogate.attribute(readout)
    form = r"^`masks` must be 0/1 for {}, got real-valued weights\. Use predict, or attribute"
    for name in ("interactions", "walsh_spectrum", "mean_score"):
        with pytest.raises(ValueError, match=form.format(name)):
            getattr(surrogate, name)()


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "of_pairs"),
    [("attribute", ""), ("mean_score", ""), ("interactions", ", 'taylor', 'faithful'")],
)
def test_unknown_readout(ask, of_pairs):
    masks, scores = many_subsets()
    surrogate = fit_surrogate(masks, scores, kernel="linear", ridge=0.1)
    form = rf"^`readout` must be one of 'loo', 'shapley', 'banzhaf'{of_pairs}, got 'owen'\. Choose"
    with pytest.raises(ValueError, match=form):
        getattr(surrogate, ask)("owen")


@pytest.mark.parametrize(
    "query, error, found",
    [
        ([[1, 0]], ValueError, r"of 6 columns like the fitted masks, got shape \(1, 2\)\. Use the"),
        ([1] * 6, ValueError, r"2-dimensional \(subsets, tasks\), got shape \(6\)\. Reshape"),
        ([[np.nan] * 6], ValueError, r"finite, got 6 NaN or infinite entries"),
        ([["a"] * 6], TypeError, "numeric, got list of dtype <U1. Pass"),
    ],
)
def test_query_errors(query, error, found):
    masks, scores = many_subsets()
    surrogate = fit_surrogate(masks, scores, kernel="linear", ridge=0.1)
    with pytest.raises(error, match=f"^`masks` must be {found}"):
        surrogate.predict(query)


@pytest.mark.parametrize("kernel", ["lasso", "least_squares"])
def test_linear_surrogates_have_the_deviations_of_the_linear_kernel(kernel):
    masks, scores = many_subsets()
    surrogate = fit_surrogate(masks, scores, kernel=kernel)
    assert surrogate.has_intervals and [str(t.kernel) for t in surrogate.kernel_terms] == ["linear"]
    value, std = surrogate.attribute("shapley", return_std=True)
    close(value, surrogate.linear_terms[0].weights * surrogate.unit)
    (term,) = surrogate.kernel_terms
    points = torch.cat([masks.double(), torch.zeros(1, 6).double(), torch.eye(6).double()])
    effects = torch.zeros(6, 27, dtype=torch.float64)  # F(task i) - F(none)
    effects[:, 20], effects[:, 21:] = -1.0, torch.eye(6)
    for j in range(2):
        arguments = (points @ points.T, torch.arange(20), float(term.ridge[j]), True)
        variance = reference.posterior_variance(effects, *arguments) * term.signal_variance[j]
        close(std[:, j], variance.sqrt() * surrogate.unit[j], 1e-8)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: x.numpy()], ids=["torch", "numpy"])
@pytest.mark.parametrize("weights", [False, True], ids=["masks", "weights"])
def test_surrogates_do_not_change_with_the_callers_table(kind, weights):
    masks, scores = many_subsets()
    masks = masks * 0.5 if weights else masks
    masks, query = masks.double() if weights else masks, masks[:5].clone()
    untouched = fit_surrogate(masks.clone(), scores.clone(), **FIXED)
    surrogate = fit_surrogate(kind(masks), kind(scores), **FIXED)
    masks.fill_(0)
    scores.fill_(0)
    for ask in (lambda s: s.attribute("loo"), lambda s: s.predict(query)):
        assert np.array_equal(np.asarray(ask(surrogate)), ask(untouched).numpy())
