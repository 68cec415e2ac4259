"""Advice on sample sizes, against Bayesian regression in closed form."""

from dataclasses import replace

import pytest
import torch

from ksm_ext import RBF, Linear, fit_surrogate
from ksm_ext.subsets import mixed_sizes
from ksm_ext.surrogates.more_subsets import more_subsets, similar_subsets

N, M = 6, 30
MASKS = mixed_sizes(N, M, seed=0)
GENERATOR = torch.Generator().manual_seed(0)
SCORES = MASKS.double() @ torch.arange(2.0 * N).reshape(N, 2).double()
SCORES = SCORES + 0.5 * torch.randn(M, 2, generator=GENERATOR, dtype=torch.float64)


def weight_std(masks, ridge):
    """Of the weights of a linear model, prior variance 1, noise ``ridge``, an unknown intercept."""
    x = masks.double() - masks.double().mean(0)
    covariance = torch.linalg.inv(torch.eye(N, dtype=torch.float64) + x.T @ x / ridge)
    return covariance.diagonal().sqrt().mean()


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
@pytest.mark.parametrize("factor", [0.5, 0.8])
def test_linear_kernel_is_bayesian_regression(readout, factor):
    surrogate = fit_surrogate(MASKS, SCORES, kernel=Linear(), ridge=2.0)
    advice = more_subsets(surrogate, readout, factor=factor, seed=3)
    new = similar_subsets(MASKS, 1000, seed=3)
    scale = float(Linear().gram(surrogate.masks)[0, 0] / MASKS[0].sum())  # of the prior variance
    now = weight_std(MASKS, 2.0 / scale)

    def ratio(num_more):
        return float(weight_std(torch.cat([MASKS, new[:num_more]]), 2.0 / scale) / now)

    assert advice.computed and advice.factor == factor
    assert ratio(advice.num_more) <= factor * (1 + 1e-9)
    assert ratio(advice.num_more - max(1, advice.num_more // 8)) > factor * (1 - 1e-9)


def test_ten_times_the_noise_is_no_different_to_the_advice():
    """Only the ratio of noise to signal counts: the unit of the scores does not."""
    one = fit_surrogate(MASKS, SCORES, kernel=RBF(gamma=0.1), ridge=0.5)
    ten = fit_surrogate(MASKS, 10 * SCORES[:, :1], kernel=RBF(gamma=0.1), ridge=0.5)
    assert more_subsets(one) == more_subsets(ten)


def test_beyond_what_is_computed_the_rate_is_extrapolated(monkeypatch):
    surrogate = fit_surrogate(MASKS, SCORES, kernel=Linear(), ridge=20.0)
    exact = more_subsets(surrogate).num_more
    monkeypatch.setattr("ksm_ext.surrogates.more_subsets._MAX_SUBSETS", M + exact // 2)
    advice = more_subsets(surrogate)
    assert not advice.computed and abs(advice.num_more - exact) < 0.5 * exact
    monkeypatch.setattr("ksm_ext.surrogates.more_subsets._MAX_PRODUCTS", 0)
    assert abs(more_subsets(surrogate).num_more - exact) < 0.5 * exact  # from half of them to all


def test_what_cannot_be_narrowed():
    """Subsets of one size say nothing of what is far from them."""
    masks = torch.eye(8, dtype=torch.bool)
    surrogate = fit_surrogate(masks, torch.arange(8.0).double(), kernel=RBF(gamma=3.0), ridge=1e-6)
    assert more_subsets(surrogate, "loo").num_more is None


def test_new_subsets_have_the_sizes_of_the_old():
    new = similar_subsets(MASKS[:1], 500, seed=0)
    assert new.sum(1).unique().tolist() == [int(MASKS[0].sum())]
    share = float(MASKS[0].double().mean())
    assert new.double().mean(0).sub(share).abs().max() < 5 * (share * (1 - share) / 500) ** 0.5
    assert similar_subsets(MASKS, 5, seed=0).equal(similar_subsets(MASKS, 5, seed=0))


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("kernel", ["linear", "lasso"])
def test_a_constant_task_changes_no_advice(kernel, on):
    column = torch.full((M, 1), on)
    more = torch.cat([MASKS[:, :2], column, MASKS[:, 2:]], 1)
    one, other = (fit_surrogate(masks, SCORES, kernel=kernel) for masks in (MASKS, more))
    assert more_subsets(one) == more_subsets(other)


def test_checks():
    surrogate = fit_surrogate(MASKS, SCORES, kernel=Linear(), ridge=1.0)
    with pytest.raises(ValueError, match="`factor` must be between 0 and 1, got 1"):
        more_subsets(surrogate, factor=1)
    bare = replace(surrogate, kernel_terms=())
    assert not bare.has_intervals
    with pytest.raises(ValueError, match="`return_std` must be False for this surrogate"):
        more_subsets(bare)
    weights = fit_surrogate(MASKS * 0.5, SCORES, kernel=Linear(), ridge=1.0)
    with pytest.raises(ValueError, match="`surrogate` must be fitted to 0/1 masks, got real"):
        more_subsets(weights)
