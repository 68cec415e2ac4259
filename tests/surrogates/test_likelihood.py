"""Parameters learnt by restricted likelihood, against dense densities, peers and differences."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import approx_fprime
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process import kernels as peers

from ksm_ext import RBF, Exponential, Laplace, fit_many, fit_surrogate, load_surrogate
from ksm_ext.surrogates import likelihood
from ksm_ext.surrogates.judgement import Scores
from ksm_ext.surrogates.likelihood import learn_kernel, restricted_log_likelihood
from ksm_ext.surrogates.masks import Masks

FAMILIES = pytest.mark.parametrize("family", [RBF, Exponential])
OBJECTIVES = {"likelihood": likelihood.restricted, "loo": likelihood._left_out}


def table(m=25, n=5, seed=0, t=2, binary=True):
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(m, n, generator=generator, dtype=torch.float64)
    return Masks.of(values < 0.5 if binary else values), torch.randn(
        m, t, generator=generator
    ).double()


def as_scores(values, weights=None, center=True):
    values = (values - values.mean(0)) / values.std(0)
    weights = torch.ones(len(values)).double() if weights is None else weights / weights.mean()
    return Scores(values[None], center, False, weights[None])


def some_weights(m):
    return 0.5 + torch.rand(m, generator=torch.Generator().manual_seed(9)).double()


def drawn(kernel, masks, ridge, t=1, seed=0):
    """Scores of a Gaussian process with this kernel."""
    covariance = kernel.gram(masks) + ridge * torch.eye(len(masks))
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.linalg.cholesky(covariance) @ torch.randn(len(masks), t, generator=generator).double()
    )


# -- the objective ------------------------------------------------------------------------------


@FAMILIES
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_restricted_likelihood_is_the_density_of_contrasts(family, center, weighted):
    masks, values = table()
    weights = some_weights(25) if weighted else torch.ones(25).double()
    scores = as_scores(values, weights, center)
    kernel = family(gamma=(0.1, 0.3, 0.2, 0.7, 0.4), amplitude=0.8)
    found = restricted_log_likelihood(kernel, 0.2, masks, scores)
    covariance = kernel.gram(masks) + torch.diag(0.2 / scores.weights[0])
    contrasts = torch.eye(25).double()
    if center:
        contrasts = torch.linalg.svd(torch.ones(1, 25).double())[2][1:]
    covariance = contrasts @ covariance @ contrasts.T
    for column, value in zip((contrasts @ scores.values[0]).T, found.tolist(), strict=True):
        best = float(column @ torch.linalg.solve(covariance, column)) / len(column)
        expected = multivariate_normal.logpdf(column, cov=best * covariance.numpy())
        assert value == pytest.approx(expected, rel=1e-10)
        for other in (0.9 * best, 1.1 * best):
            assert multivariate_normal.logpdf(column, cov=other * covariance.numpy()) < value


def test_scikit_learn_has_the_same_likelihood():
    masks, values = table(t=1)
    scores = as_scores(values, center=False)
    kernel, ridge = RBF(gamma=(0.1, 0.3, 0.2, 0.7, 0.4)), 0.2
    gram = kernel.gram(masks) + ridge * torch.eye(25)
    y = scores.values[0, :, 0]
    variance = float(y @ torch.linalg.solve(gram, y)) / 25
    lengths = [1 / math.sqrt(2 * gamma) for gamma in kernel.gamma]
    peer = variance * (peers.RBF(lengths) + peers.WhiteKernel(ridge))
    process = GaussianProcessRegressor(peer, optimizer=None, alpha=0.0)
    process.fit(masks.floats.numpy(), y.numpy())
    found = restricted_log_likelihood(kernel, ridge, masks, scores)
    assert found.item() == pytest.approx(process.log_marginal_likelihood_value_, rel=1e-10)


@pytest.mark.parametrize("center", [True, False])
def test_the_other_objective_is_the_leave_one_out_error(center):
    masks, values = table()
    scores = as_scores(values, center=center)
    gram = Exponential(gamma=0.4, amplitude=0.5).gram(masks)
    found, _ = likelihood._left_out(likelihood._solved(gram, 0.3, scores), scores.values[0])
    residuals = reference.leave_one_out(gram, scores.values[0], 0.3, center)
    torch.testing.assert_close(found, -25 / 2 * residuals.square().mean(0).log())


@settings(max_examples=30, deadline=None, database=None, derandomize=True)
@given(
    family=st.sampled_from([RBF, Exponential]),
    objective=st.sampled_from(list(OBJECTIVES)),
    center=st.booleans(),
    weighted=st.booleans(),
    binary=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_gradients_are_those_of_differences(family, objective, center, weighted, binary, seed):
    masks, values = table(m=12, n=3, seed=seed, binary=binary)
    scores = as_scores(values, some_weights(12) if weighted else None, center)
    problem = likelihood._Problem(family, masks, scores, OBJECTIVES[objective], 1.0, 0.7)
    point = np.random.default_rng(seed).normal(0, 0.4, 6)
    point[:2] += problem.unit, -1.5
    _, gradient = problem.loss(point)
    expected = approx_fprime(point, lambda at: problem.loss(at)[0], 1e-6)
    np.testing.assert_allclose(gradient, expected, atol=2e-5 * max(1, abs(expected).max()))


def test_targets_that_move_together_count_once():
    masks, values = table(t=1)
    one = likelihood._Problem(RBF, masks, as_scores(values), likelihood.restricted, 1.0, 0.7)
    twice = as_scores(torch.cat([values, -3 * values], 1))
    two = likelihood._Problem(RBF, masks, twice, likelihood.restricted, 1.0, 0.7)
    point = np.array([-1.0, -2.0, 0.5, 0.1, 0.2, -0.3, 0.0, 0.4])
    for found, expected in zip(two.loss(point), one.loss(point), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10)


# -- what is learnt -----------------------------------------------------------------------------


@FAMILIES
def test_what_made_the_scores_is_found(family):
    truth = family(gamma=(0.9, 0.9, 0.9, 0.05, 0.05, 0.05), amplitude=2.0)
    masks = Masks.of(reference.all_subsets(6))
    scores = as_scores(drawn(truth, masks, 1e-3, t=30))
    found = learn_kernel(family(), masks, scores)
    assert min(found.kernel.gamma[:3]) > 4 * max(found.kernel.gamma[3:])
    assert abs(found.kernel.amplitude - 2.0) < 0.3 and found.ridge < 0.02
    shared = learn_kernel(family(), masks, scores, by_task=False)
    assert isinstance(shared.kernel.gamma, float) and shared.kernel.amplitude > 1
    plain = learn_kernel(family(), masks, scores, by_task=False, amplitude=False)
    assert plain.kernel.is_tabulated
    assert found.log_likelihood > shared.log_likelihood + 10 > plain.log_likelihood + 20


def test_scikit_learn_finds_nothing_likelier():
    masks, _ = table(m=40, n=4)
    scores = as_scores(drawn(RBF(gamma=(1.0, 0.5, 0.2, 0.05)), masks, 0.05), center=False)
    free = {"amplitude": False, "decay_width": math.inf}
    found = learn_kernel(RBF(), masks, scores, **free)
    peer = peers.ConstantKernel() * peers.RBF([1.0] * 4) + peers.WhiteKernel()
    process = GaussianProcessRegressor(peer, n_restarts_optimizer=4, random_state=0, alpha=0.0)
    process.fit(masks.floats.numpy(), scores.values[0, :, 0].numpy())
    assert found.log_likelihood > process.log_marginal_likelihood_value_ - 0.05


@FAMILIES
@pytest.mark.parametrize("objective", ["likelihood", "loo"])
def test_a_narrow_prior_keeps_tasks_alike(family, objective):
    masks, values = table()
    options = {"objective": objective, "amplitude_width": 1e-3, "decay_width": 1e-3}
    found = learn_kernel(family(), masks, as_scores(values), **options)
    gammas = torch.tensor(found.kernel.gamma)
    assert float(gammas.std() / gammas.mean()) < 1e-3 and abs(found.kernel.amplitude) < 1e-3


def test_what_is_learnt_predicts_better():
    truth = RBF(gamma=(1.0, 1.0, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02), amplitude=1.5)
    every = Masks.of(reference.all_subsets(8))
    values = drawn(truth, every, 1e-4, seed=3)
    rows = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:60]
    found = learn_kernel(RBF(), every[rows], as_scores(values[rows]))
    errors = [
        (
            fit_surrogate(every.values[rows], values[rows], kernel=kernel).predict(every.values)
            - values
        )
        .square()
        .mean()
        for kernel in (found.kernel, "rbf")
    ]
    assert errors[0] < 0.6 * errors[1]


def test_constant_targets_have_no_likelihood():
    masks, values = table()
    values[:, 1] = 0.0
    scores = Scores(values[None], True, False, torch.ones(1, 25).double())
    found = restricted_log_likelihood(RBF(gamma=0.2), 0.1, masks, scores)
    assert found[0].isfinite() and found[1].isnan()
    assert math.isfinite(learn_kernel(RBF(), masks, scores).log_likelihood)


def test_objective_errors():
    masks, values = table()
    with pytest.raises(ValueError, match=r"^`objective` must be .*, got 'evidence'"):
        learn_kernel(RBF(), masks, as_scores(values), objective="evidence")
    with pytest.raises(ValueError, match=r"^`kernel` must be .*, got 'laplace'\. The others"):
        learn_kernel(Laplace(), masks, as_scores(values))


# -- kernel="ard" -------------------------------------------------------------------------------


def few_tasks_matter(m=80, n=8, t=2, noise=0.1):
    """Subsets, and scores that each depend on three tasks of their own."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.rand(2 * m, n, generator=generator) < torch.rand(2 * m, 1, generator=generator)
    masks = drawn.unique(dim=0)
    masks = masks[torch.randperm(len(masks), generator=generator)[:m]]
    m = len(masks)
    truth = torch.stack(
        [
            torch.sigmoid(4 * masks[:, 3 * j : 3 * j + 3].double().prod(1) + masks[:, 3 * j] - 2)
            for j in range(t)
        ],
        1,
    )
    return masks, truth + noise * truth.std(0) * torch.randn(m, t, generator=generator).double()


def decays(surrogate, target=0):
    (gamma,) = (
        term.kernel.gamma for term in surrogate.kernel_terms if target in term.columns.tolist()
    )
    return np.array(gamma)


def test_ard_is_what_is_learnt_and_the_ridge_is_by_leaving_one_out():
    masks, values = few_tasks_matter(t=1)
    found = fit_surrogate(masks, values, kernel="ard")
    learnt = [
        learn_kernel(k, Masks(masks), as_scores(values)).kernel for k in (Exponential(), RBF())
    ]
    (kernel,) = [term.kernel for term in found.kernel_terms]
    assert str(kernel) in map(str, learnt)
    errors = [
        float(fit_surrogate(masks, values, kernel=k).loo_error) for k in learnt
    ]  # each at its best ridge
    assert float(found.loo_error) == pytest.approx(min(errors), rel=1e-4)
    assert {row.kernel for row in found.candidates} == {"mean", *map(str, learnt)}


@pytest.mark.parametrize("share_ridge", ["auto", False, True])
def test_targets_have_decays_of_their_own_unless_they_share(share_ridge):
    masks, values = few_tasks_matter()
    found = fit_surrogate(masks, values, kernel="ard", share_ridge=share_ridge)
    if share_ridge is True:
        assert len(found.kernel_terms) == 1
    elif share_ridge is False:
        for j in range(2):
            own = decays(found, j)
            assert own[3 * j : 3 * j + 3].min() > np.delete(own, range(3 * j, 3 * j + 3)).max()
    plain = fit_surrogate(masks, values, kernel="exponential", share_ridge=share_ridge)
    assert found.loo_error.mean() < plain.loo_error.mean()


def test_ard_sees_sizes_where_there_are_some():
    masks, values = few_tasks_matter(t=1)
    assert any(
        "amplitude" in row.kernel for row in fit_surrogate(masks, values, kernel="ard").candidates
    )
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([torch.randperm(8, generator=generator) < 4 for _ in range(40)])
    values = masks[:, :2].double().sum(1) + torch.randn(40, generator=generator).double() / 9
    found = fit_surrogate(masks, values, kernel=["ard"])
    assert not any("amplitude" in row.kernel for row in found.candidates)
    assert decays(found)[:2].min() > decays(found)[2:].max()


@pytest.mark.parametrize(
    "options",
    [
        {"ridge": 0.1},
        {"solver": "cg"},
        {"center": False},
        {"noise_std": 0.05},
        {"criterion": "rank"},
        {"kernel": ["ard", "linear", "lasso"]},
        {"missing": "drop"},
    ],
    ids=str,
)
def test_ard_goes_with_every_option(options, tmp_path):
    masks, values = few_tasks_matter()
    masks, values = torch.cat([masks, masks[:9]]), torch.cat([values, values[:9] + 0.01])  # repeats
    masks = torch.cat([masks, torch.ones(len(masks), 1, dtype=torch.bool)], 1)  # a constant task
    values = torch.cat([values, torch.ones_like(values[:, :1])], 1)  # a constant target
    if "missing" in options:
        values[::9, 1] = math.nan
    found = fit_surrogate(masks, values, **{"kernel": "ard", **options})
    assert bool((found.loo_error[:2] < 0.5).all())
    found.save(tmp_path / "s")
    mean, std = load_surrogate(tmp_path / "s").predict(masks, return_std=True)
    assert bool(mean.isfinite().all()) and bool(std.isfinite().all())
    assert float(found.attribute("shapley")[-1].abs().max()) < 1e-9 or options == {"center": False}


def test_ard_of_many_tables_and_of_weights():
    masks, values = few_tasks_matter(m=40)
    tables = torch.stack([values, values.flip(1).exp()])
    for one, table in zip(fit_many(masks, tables, kernel="ard"), tables, strict=True):
        alone = fit_surrogate(masks, table, kernel="ard")
        torch.testing.assert_close(one.predict(masks), alone.predict(masks), rtol=1e-6, atol=1e-6)
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(60, 5, generator=generator).double()
    scores = (3 * shares[:, 0]).sin() + shares[:, 1]
    found = fit_surrogate(shares, scores, kernel="ard")
    assert decays(found)[:2].min() > decays(found)[2:].max()
    assert float(found.loo_error) < 0.5 * float(
        fit_surrogate(shares, scores, kernel="rbf").loo_error
    )


def test_a_covariance_that_rounding_made_indefinite_has_the_least_added():
    y = as_scores(table()[1]).values[0]
    _, vectors = torch.linalg.eigh(RBF(gamma=0.2).gram(table()[0]))
    spectrum = torch.linspace(0.1, 1.0, 25).double()
    spectrum[3] = -1e-11
    rounded = (vectors * spectrum) @ vectors.T
    found, change = likelihood.restricted(likelihood.Solved.of(rounded, center=True), y)
    assert bool(change.isfinite().all())
    repaired = rounded + 1e-10 * rounded.diagonal().mean() * torch.eye(25)
    for j in range(2):  # the density of contrasts, at the best signal variance
        contrasts = torch.linalg.svd(torch.eye(25).double() - 1 / 25)[0][:, :24]
        inner, seen = contrasts.T @ repaired @ contrasts, contrasts.T @ y[:, j]
        variance = seen @ torch.linalg.solve(inner, seen) / 24
        density = torch.distributions.MultivariateNormal(torch.zeros(24).double(), variance * inner)
        assert float(found[j]) == pytest.approx(float(density.log_prob(seen)), rel=1e-3)
    with pytest.raises(torch.linalg.LinAlgError):
        likelihood.restricted(likelihood.Solved.of(-torch.eye(25).double(), center=True), y)
