"""Lasso and least squares: optimality, scikit-learn, and the choice of the penalty."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

from ksm_ext import fit_surrogate
from ksm_ext.surrogates.lasso import fit_lasso, lasso_path, least_squares, least_squares_residuals


def problem(m=40, n=12, t=3, nonzero=3):
    masks = (torch.rand(m, n) < 0.5).double()
    weights = torch.zeros(n, t).double()
    weights[:nonzero] = torch.randn(nonzero, t).double() + 1
    return masks, masks @ weights + 0.1 * torch.randn(m, t).double() + 5


def centred(x):
    return x - x.mean(0)


FOLDS = torch.arange(40) % 5


def scikit_learn(masks, scores, penalty, tol=1e-10):
    return Lasso(alpha=penalty.item(), tol=tol, max_iter=100_000).fit(masks.numpy(), scores.numpy())


def path_of(masks, scores, tol=1e-12):
    x, y = centred(masks), centred(scores)
    largest = (x.T @ y).abs().amax(0) / len(x)
    penalties = largest * torch.logspace(0, -2, 6).double()[:, None]
    return penalties, lasso_path(x, y, penalties, tol=tol)


@pytest.mark.parametrize("m, n", [(40, 12), (25, 30), (10, 1)])
def test_every_point_of_the_path_is_optimal(m, n):
    """Subgradient conditions: |moment| <= penalty, with the weight's sign where it is not zero."""
    masks, scores = problem(m, n, nonzero=min(n, 3))
    penalties, path = path_of(masks, scores)
    assert path.shape == (6, n, 3) and not path[0].abs().max() > 1e-12
    for penalty, weights in zip(penalties, path, strict=True):
        moment = centred(masks).T @ (centred(scores) - centred(masks) @ weights) / m  # (n, t)
        assert (moment.abs() <= penalty * (1 + 1e-6) + 1e-9).all()
        active = weights != 0
        expected = (penalty * weights.sign())[active]
        torch.testing.assert_close(moment[active], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("m, n", [(40, 12), (60, 25)])
def test_scikit_learn_finds_the_same_weights(m, n):
    masks, scores = problem(m, n)
    penalties, path = path_of(masks, scores)
    for penalty, weights in zip(penalties, path, strict=True):
        for j in range(3):
            peer = scikit_learn(masks, scores[:, j], penalty[j], tol=1e-12)
            np.testing.assert_allclose(weights[:, j].numpy(), peer.coef_, atol=1e-8)


def test_fitted_weights_are_scikit_learns_at_the_chosen_penalty():
    masks, scores = problem()
    weights, penalties, _ = fit_lasso(masks, scores, FOLDS)
    for j in range(3):
        peer = scikit_learn(masks, scores[:, j], penalties[j])
        np.testing.assert_allclose(weights[:, j].numpy(), peer.coef_, atol=2e-3)
        surrogate = fit_surrogate(masks, scores[:, j], kernel="lasso")
        assert surrogate.attribute("loo").shape == (12,)


def test_cross_validated_residuals_are_those_of_refitting():
    masks, scores = problem()
    _, penalties, residuals = fit_lasso(masks, scores, FOLDS)
    for fold in range(5):
        held = FOLDS.eq(fold)
        for j in range(3):
            peer = scikit_learn(masks[~held], scores[~held, j], penalties[j])
            expected = scores[held, j].numpy() - peer.predict(masks[held].numpy())
            np.testing.assert_allclose(residuals[held, j].numpy(), expected, atol=0.05)


def test_tables_are_independent():
    pairs = [problem() for _ in range(3)]
    masks, scores = (torch.stack(each) for each in zip(*pairs, strict=True))
    scores[1] *= 0.01
    together = fit_lasso(masks, scores, FOLDS)
    for i, pair in enumerate(zip(masks, scores, strict=True)):
        for found, expected in zip(together, fit_lasso(*pair, FOLDS), strict=True):
            torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)


def test_the_truth_is_found():
    masks, scores = problem(m=100)
    surrogate = fit_surrogate(masks, scores, kernel="lasso")
    effects = surrogate.attribute("shapley")
    assert (effects[:3].abs() > 0.05).all() and (effects[3:].abs() < 0.1).all()
    assert torch.equal(effects, surrogate.attribute("loo"))
    assert not surrogate.interactions("loo").any()
    assert (surrogate.loo_error < 0.1).all()


def test_targets_are_independent():
    masks, scores = problem()
    together = fit_lasso(masks, scores, FOLDS)[0]
    apart = [fit_lasso(masks, scores[:, [j]], FOLDS)[0] for j in range(3)]
    torch.testing.assert_close(together, torch.cat(apart, 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 1.0])
def test_constant_tasks_and_targets_weigh_nothing(constant):
    masks, scores = problem()
    masks[:, 4] = constant
    scores[:, 1] = 7.0
    weights = fit_lasso(masks, scores, FOLDS)[0]
    assert weights.isfinite().all() and not weights[4].any() and not weights[:, 1].any()


def test_prediction_of_lasso_and_intercept():
    masks, scores = problem()
    surrogate = fit_surrogate(masks, scores, kernel="lasso")
    prediction = surrogate.predict(masks)
    torch.testing.assert_close(prediction.mean(0), scores.mean(0))
    expected = surrogate.intercept + masks @ surrogate.attribute("loo")
    torch.testing.assert_close(prediction, expected)


# -- least squares ------------------------------------------------------------------------------


@pytest.mark.parametrize("m, n", [(40, 12), (8, 12)])
def test_least_squares_has_minimum_norm(m, n):
    masks, scores = problem(m, n)
    masks = torch.cat([masks, masks[:, :2]], 1)  # deficient rank
    expected = np.linalg.lstsq(masks.numpy(), scores.numpy(), rcond=1e-10)[0]
    np.testing.assert_allclose(least_squares(masks, scores).numpy(), expected, atol=1e-9)
    surrogate = fit_surrogate(masks, scores, kernel="least_squares")
    np.testing.assert_allclose(surrogate.attribute("loo").numpy(), expected, atol=1e-9)
    torch.testing.assert_close(surrogate.predict(masks), masks @ torch.from_numpy(expected))
    assert not surrogate.predict(torch.zeros(1, n + 2)).any()  # no intercept


def test_least_squares_residuals_are_those_of_refitting():
    masks, scores = problem(14, 6)
    expected = []
    for i in range(14):
        rest = [j for j in range(14) if j != i]
        weights = np.linalg.lstsq(masks[rest].numpy(), scores[rest].numpy(), rcond=1e-10)[0]
        expected.append(scores[i].numpy() - masks[i].numpy() @ weights)
    residuals = least_squares_residuals(masks, scores)
    np.testing.assert_allclose(residuals.numpy(), np.stack(expected), atol=1e-9)
    surrogate = fit_surrogate(masks, scores, kernel="least_squares")
    np.testing.assert_allclose(surrogate.loo_residuals.numpy(), np.stack(expected), atol=1e-9)
