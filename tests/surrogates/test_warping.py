"""Powers and scales of shares, learnt by marginal likelihood."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from ksm_ext import Warped, fit_surrogate, load_surrogate
from ksm_ext.evaluation import residual_error
from ksm_ext.surrogates import warping

some_seeds = st.integers(0, 2**31)


def mixtures(m, n, seed):
    """Dirichlet shares (m, n) with zeros among them."""
    generator = np.random.default_rng(seed)
    shares = generator.dirichlet(generator.uniform(0.1, 1, n), m)
    return np.where(shares < 0.001, 0.0, shares)


def law(shares, seed, t=2):
    """Losses (m, t) that fall with the shares of a few tasks, as losses of domains do."""
    generator = np.random.default_rng(seed)
    rates = (
        generator.uniform(1, 8, (shares.shape[1], t)) * (np.arange(shares.shape[1]) < 3)[:, None]
    )
    return 1 + np.exp(-(np.sqrt(shares) @ rates))


def likelihood(m=12, n=3, seed=0):
    """A likelihood, the shares, and usual parameters."""
    shares, usual = mixtures(m, n, seed), np.log(np.r_[np.full(n, 0.8), 0.4, 0.3, 0.1])
    return warping.Likelihood(shares, law(shares, seed)[:, 0], usual), shares, usual


@settings(max_examples=20, deadline=None)
@given(some_seeds)
def test_the_gradient_is_that_of_differences(seed):
    found, _, usual = likelihood(seed=seed)
    at = usual + np.random.default_rng(seed).uniform(-0.5, 0.5, len(usual))
    steps, gradient = 1e-3 * np.eye(len(at)), found(at)[1]  # smaller ones drown in rounding
    central = [(found(at + step)[0] - found(at - step)[0]) / 2e-3 for step in steps]
    assert np.linalg.norm(central - gradient) < 1e-4 * max(1.0, np.linalg.norm(gradient))


@settings(max_examples=20, deadline=None)
@given(some_seeds)
def test_the_likelihood_is_that_of_contrasts(seed):
    # of m - 1 contrasts, which do not see the mean, at the best signal variance: up to a constant
    found, shares, usual = likelihood(seed=seed)
    scores = found.scores
    contrasts = np.linalg.svd(np.eye(12) - 1 / 12)[0][:, :11]
    values, references = [], []
    for shift in (0.0, 0.3):
        p = usual + shift
        u = torch.from_numpy(np.exp(p[:-3]) * shares ** np.exp(p[-3]))
        kernel = torch.exp(-torch.cdist(u, u)).numpy() + (np.exp(p[-1]) + 1e-8) * np.eye(12)
        kernel += np.exp(p[-2]) * shares @ shares.T / shares.var(0).sum()
        covariance, seen = contrasts.T @ kernel @ contrasts, contrasts.T @ scores
        scale = seen @ np.linalg.solve(covariance, seen) / 11
        references.append(-multivariate_normal.logpdf(seen, np.zeros(11), scale * covariance))
        values.append(found(p)[0] - found._strength @ (p - usual) ** 2)
    assert abs((values[1] - values[0]) - (references[1] - references[0])) < 1e-6


def test_learnt_kernels_predict_shares_that_were_left_out_better():
    kernels, errors = ("auto", "warped", "exponential", "linear"), []
    for seed in range(12):
        shares = mixtures(120, 8, seed)
        losses = law(shares, seed)
        fits = [fit_surrogate(shares[:60], losses[:60], kernel=kernel) for kernel in kernels]
        held = [residual_error(losses[60:], fit.predict(shares[60:])).mean() for fit in fits]
        errors.append(held)
    automatic, warped, *others = np.mean(errors, 0)
    assert max(automatic, warped) < 0.5 * min(others)


def test_a_linear_score_of_shares_stays_linear():
    shares = mixtures(60, 6, 0)
    scores = shares @ np.arange(6.0) + 1e-3 * np.random.default_rng(0).normal(size=60)
    found = fit_surrogate(shares[:40], scores[:40])
    assert residual_error(scores[40:], found.predict(shares[40:])) < 1e-4


def test_scores_without_signal_are_predicted_by_their_mean():
    errors = []
    for seed in range(6):
        noise = np.random.default_rng(seed + 100).normal(size=(400, 2))
        found = fit_surrogate(mixtures(60, 6, seed), noise[:60])
        errors.append(residual_error(noise[60:], found.predict(mixtures(340, 6, seed + 50))))
    assert np.mean(errors) < 1.1  # 1 is what the mean has


def test_scales_tell_the_tasks_that_matter():
    shares = mixtures(200, 6, 2)
    kernel, gain = warping.learn(Warped(), shares, law(shares, 2)[:, 0])
    (_, warped), _ = kernel.terms
    reach = np.array(warped.scales) * (shares**warped.power).std(0)
    assert reach[:3].min() > 2 * reach[3:].max() and gain > 100


@settings(max_examples=10, deadline=None)
@given(some_seeds, st.sampled_from([1e-6, 1.0, 1e6]))
def test_the_unit_of_weights_decides_nothing(seed, unit):
    shares = mixtures(30, 4, seed)
    scores = law(shares, seed)
    near, far = (fit_surrogate(unit * shares, scores, kernel="warped") for unit in (1.0, unit))
    query = mixtures(10, 4, seed + 1)
    assert np.allclose(near.predict(query), far.predict(unit * query), atol=1e-3 * scores.std())


def test_what_is_given_is_not_learnt():
    shares = mixtures(30, 3, 0)
    scores = law(shares, 0)[:, 0]
    assert warping.learn(Warped(power=0.5), shares, scores)[0].terms[0][1].power == 0.5
    fixed = Warped(power=0.5, scales=(1.0, 2.0, 3.0))
    assert fit_surrogate(shares, scores, kernel=fixed).kernel_terms[0].kernel == fixed


def test_features_are_powers_with_their_sign():
    kernel = Warped(power=0.5, scales=(2.0, 3.0))
    x = torch.tensor([[4.0, -9.0], [0.0, 1.0]]).double()
    assert kernel.features(x).tolist() == [[4.0, -9.0], [0.0, 3.0]]
    assert torch.allclose(
        kernel.on_weights(x, x)[0, 1], torch.exp(-torch.tensor(160.0).sqrt()).double()
    )


def test_a_task_that_only_unseen_rows_have_keeps_its_scale():
    shares = mixtures(400, 4, 0)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).numpy()
    shares[order[: warping._ROWS], 3] = 0.0
    (_, warped), _ = warping.learn(Warped(), shares, law(shares, 0)[:, 0])[0].terms
    assert warped.scales[3] * (shares[:, 3] ** warped.power).std() < 2


def test_warped_surrogates_are_stored(tmp_path):
    shares = mixtures(30, 4, 0)
    surrogate = fit_surrogate(shares, law(shares, 0))
    surrogate.save(tmp_path / "stored")
    stored = load_surrogate(tmp_path / "stored")
    assert "warped(power=" in str(stored)
    for before, after in zip(
        surrogate.predict(shares, return_std=True),
        stored.predict(shares, return_std=True),
        strict=True,
    ):
        assert np.array_equal(before, after)


def test_many_targets_choose_among_a_few_kernels():
    shares = mixtures(40, 4, 0)
    surrogate = fit_surrogate(shares, law(shares, 0, t=40), kernel="warped")
    assert len({row.kernel for row in surrogate.candidates}) <= warping._TARGETS + 1


@pytest.mark.parametrize(
    ("wrong", "form"),
    [
        ({"power": 0.0}, r"^`power` must be positive and finite, got 0\.0\."),
        (
            {"power": 1.0, "scales": (1.0, -1.0)},
            r"^`scales` must be at least 0 each, got \(1\.0, -1\.0\)\. Leave",
        ),
        ({"power": 1, "scales": ()}, r"^`scales` must be at least 0 each, got \(\)\. Leave"),
    ],
)
def test_impossible_parameters_are_refused(wrong, form):
    with pytest.raises(ValueError, match=form):
        Warped(**wrong)


def test_what_cannot_be_learnt_or_asked_is_refused():
    shares = mixtures(20, 3, 0)
    scores = law(shares, 0)
    with pytest.raises(
        ValueError, match=r"^`kernel` must be one for 0/1 masks, got 'warped'\. Use"
    ):
        fit_surrogate(shares > 0.3, scores, kernel="warped")
    with pytest.raises(
        ValueError, match=r"^`scales` must be one for each of the 3 tasks that vary"
    ):
        fit_surrogate(shares, scores, kernel=Warped(power=0.5, scales=(1.0, 2.0)))
    with pytest.raises(
        ValueError, match=r"^`power and scales` must be numbers, got warped\(\)\. Set"
    ):
        fit_surrogate(shares, scores, kernel="linear+warped")
