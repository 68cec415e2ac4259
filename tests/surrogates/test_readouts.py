"""Closed-form readouts against enumeration, dense algebra, shapiq and slow quadrature."""

import math
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import KERNELS, close, every_kernel, few_subsets, of

from ksm_ext import RBF, Exponential, Linear, fit_surrogate
from ksm_ext.surrogates.kernels import Identity
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.readouts import (
    PAIR_READOUTS,
    READOUTS,
    functionals,
    prior_covariance,
    prior_variance,
    tables,
)

SEEDS = st.integers(0, 10**6)
every_readout = pytest.mark.parametrize("readout", READOUTS)

effects = lru_cache(reference.effect_functionals)
pairs = lru_cache(reference.interaction_functionals)
subsets = lru_cache(reference.all_subsets)


@every_kernel
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_prior_covariances_equal_enumeration(kernel, n):
    kernel = of(kernel, n)
    gram = kernel.gram(Masks.of(subsets(n)))
    two = (~torch.eye(n, dtype=torch.bool)).nonzero()
    for readout in READOUTS:
        joint = effects(n, readout) @ gram @ effects(n, readout).T
        off, found = joint[tuple(two.T)], prior_covariance(kernel, readout, n, two)
        close(found / gram.max(), off / gram.max())


@every_kernel
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_readouts_and_their_variance_equal_enumeration(kernel, n, center):
    kernel = of(kernel, n)
    index, masks, scores = few_subsets(n)
    options = {"kernel": kernel, "center": center, "share_ridge": False}
    surrogate = fit_surrogate(masks, scores, ridge=0.3, **options)
    values = surrogate.predict(subsets(n))
    (term,) = surrogate.kernel_terms
    prior = kernel.gram(Masks.of(subsets(n)))

    def std(functionals):
        arguments = (functionals, prior, index, 0.3, center)
        variance = reference.posterior_variance(*arguments)
        return (variance[:, None] * signal).clamp_min(0).sqrt()

    signal = term.signal_variance * surrogate.unit.square()
    scale = (prior.diagonal().max() * signal.max()).sqrt().item()
    first, second = torch.triu_indices(n, n, 1)
    for readout in READOUTS:
        answer, deviation = surrogate.attribute(readout, return_std=True)
        close(answer, effects(n, readout) @ values)
        joint = surrogate.attribution_covariance(readout)
        close(joint.diagonal().T, deviation.square())
        assert joint.shape == (n, n, 2) and torch.equal(joint, joint.transpose(0, 1))
        steps = effects(n, readout)[first] - effects(n, readout)[second]
        apart = joint[first, first] + joint[second, second] - 2 * joint[first, second]
        close(apart / scale**2, (std(steps) / scale) ** 2)
        # rounding in a variance becomes its root in a deviation: compare squares
        close((deviation / scale) ** 2, (std(effects(n, readout)) / scale) ** 2)
        sizes = subsets(n).sum(1).tolist()
        law = [reference.context_weight(readout, n, size) for size in sizes]
        close(surrogate.mean_score(readout), values.new_tensor(law) @ values)
    for readout in PAIR_READOUTS:
        answer, deviation = surrogate.interactions(readout, return_std=True)
        assert answer.shape == deviation.shape == (n, n, 2)
        assert torch.equal(answer, answer.transpose(0, 1)) and not answer.diagonal().any()
        close(answer[first, second], pairs(n, readout) @ values)
        close((deviation[first, second] / scale) ** 2, (std(pairs(n, readout)) / scale) ** 2)
    mean, deviation = surrogate.predict(subsets(n), return_std=True)
    assert torch.equal(mean, values)
    every = torch.eye(2**n, dtype=torch.float64)
    close((deviation / scale) ** 2, (std(every) / scale) ** 2)


@every_kernel
@pytest.mark.parametrize("n", [1, 2, 3, 10])
def test_prior_variances_equal_enumeration(kernel, n):
    kernel = of(kernel, n)
    prior = kernel.gram(Masks.of(subsets(n)))
    for readout in READOUTS:
        expected = (effects(n, readout) @ prior * effects(n, readout)).sum(1)
        found = prior_variance(kernel, readout, n, torch.arange(n)[:, None])
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for readout in PAIR_READOUTS:
        chosen = torch.triu_indices(n, n, 1).T  # none of a single task
        expected = (pairs(n, readout) @ prior * pairs(n, readout)).sum(1)
        found = prior_variance(kernel, readout, n, chosen)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@every_readout
def test_variances_of_components_rotate_to_targets(readout):
    """Latent columns with different ridges: independent components, so variances add."""
    n = 5
    index, masks, scores = few_subsets(n, t=3)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.1), ridge=1.0)
    (term,) = surrogate.kernel_terms
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    ridges = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    terms = (replace(term, ridge=ridges),)
    rotated = replace(surrogate, kernel_terms=terms, rotation=rotation, sharing="component")
    prior = RBF(gamma=0.1).gram(Masks.of(subsets(n)))
    latent = [
        reference.posterior_variance(effects(n, readout), prior, index, ridge, True) * variance
        for ridge, variance in zip(ridges.tolist(), term.signal_variance, strict=True)
    ]
    expected = torch.stack(latent, 1) @ rotation.square().T * surrogate.unit.square()
    close(rotated.attribute(readout, return_std=True)[1].square(), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), SEEDS, st.sampled_from(KERNELS), st.sampled_from(READOUTS))
def test_readouts_of_random_problems(n, seed, kernel, readout):
    kernel = of(kernel, n)
    _, masks, scores = few_subsets(n, seed=seed)
    surrogate = fit_surrogate(masks, scores, kernel=kernel, ridge=0.05)
    close(surrogate.attribute(readout), effects(n, readout) @ surrogate.predict(subsets(n)))


@pytest.mark.parametrize("kernel", [RBF(gamma=0.2), Linear() + 0.5 * Exponential(0.4)], ids=str)
@pytest.mark.filterwarnings("ignore")  # shapiq's own imports
def test_shapiq_agrees(kernel):
    shapiq = pytest.importorskip("shapiq", reason="peer of the closed forms")
    n = 6
    _, masks, scores = few_subsets(n)
    surrogate = fit_surrogate(masks, scores[:, 0], kernel=kernel, ridge=0.1)
    game = shapiq.ExactComputer(lambda rows: surrogate.predict(rows).numpy(), n_players=n)
    for readout, single, double in (("shapley", "SV", "SII"), ("banzhaf", "BV", "BII")):
        values = game(single, order=1)
        expected = torch.tensor([values[(i,)] for i in range(n)], dtype=torch.float64)
        torch.testing.assert_close(surrogate.attribute(readout), expected, rtol=0, atol=1e-10)
        values = game(double, order=2)
        matrix = surrogate.interactions(readout)
        for i in range(n):
            for j in range(i + 1, n):
                assert abs(matrix[i, j].item() - values[(i, j)]) < 1e-10


# -- many tasks ---------------------------------------------------------------------------------


@lru_cache
def fine_nodes():
    """Composite Gauss-Legendre on [0, 1], panels graded towards both ends; q, 1 - q, weights."""
    x, w = np.polynomial.legendre.leggauss(24)
    edges = np.concatenate([[0.0], np.logspace(-8, math.log10(0.02), 60)])
    edges = np.concatenate([edges, np.linspace(0.02, 0.5, 120)[1:]])
    left, width = edges[:-1, None], np.diff(edges)[:, None]
    q = (left + width * (1 + x) / 2).ravel()
    half = (width * w / 2).ravel()
    return (
        torch.from_numpy(np.concatenate([q, 1 - q])),
        torch.from_numpy(np.concatenate([1 - q, q])),
        torch.from_numpy(np.concatenate([half, half])),
    )


def slow_context_mean(rate, inside, outside, tilt=0.0):
    """E_q[u1^inside u0^outside], q uniform, for floats or (C, 1) tensors of counts."""
    q, p, weights = fine_nodes()
    apart, neither = math.exp(tilt - rate), math.exp(2 * tilt)
    logs = inside * torch.log(q + p * apart) + outside * torch.log(q * apart + p * neither)
    return torch.exp(logs) @ weights


def sizes_of(n):
    return torch.tensor(sorted({1, 2, 3, 10, n // 20, n // 3, n // 2, n - 9, n - 2, n - 1}))


@pytest.mark.parametrize("n", [5, 129, 130, 2000, 10_000])
def test_many_tasks_beta_function(n):
    """r = 0: E[q^a (1-q)^b] = a! b! / (a + b + 1)!, exact integers."""
    sizes = sizes_of(n) if n > 20 else torch.arange(1, n)
    outside, inside = tables(Identity(), "shapley", n, 1, sizes)
    _, one, both = tables(Identity(), "shapley", n, 2, sizes[sizes >= 2])

    def beta(a, b):
        return float(Fraction(1, (a + b + 1) * math.comb(a + b, a)))

    for at, c in enumerate(sizes.tolist()):
        near = {"rel": 1e-10, "abs": 1e-300}
        assert inside[at].item() == pytest.approx(beta(c - 1, n - c), **near)
        assert outside[at].item() == pytest.approx(-beta(c, n - 1 - c), **near)
    for at, c in enumerate(sizes[sizes >= 2].tolist()):
        assert both[at].item() == pytest.approx(beta(c - 2, n - c), **near)
        assert one[at].item() == pytest.approx(-beta(c - 1, n - 1 - c), **near)


@pytest.mark.parametrize("amplitude", [0.0, 3.0, -1.0])
@pytest.mark.parametrize("r", [0.2, 0.9, 0.9999])
@pytest.mark.parametrize("n", [40, 128, 129, 2000, 10_000])
def test_many_tasks_slow_quadrature(n, r, amplitude):
    rate, tilt = -math.log(r), amplitude / n
    sizes = sizes_of(n)
    c = sizes.double()[:, None]
    outside, inside = tables(RBF(rate, amplitude), "shapley", n, 1, sizes)
    expected = -math.expm1(tilt - rate) * slow_context_mean(rate, c - 1, n - c, tilt)
    torch.testing.assert_close(inside, expected, rtol=1e-10, atol=1e-300)
    change = math.exp(2 * tilt) * math.expm1(-tilt - rate)
    expected = change * slow_context_mean(rate, c, n - 1 - c, tilt)
    torch.testing.assert_close(outside, expected, rtol=1e-10, atol=1e-300)


@pytest.mark.parametrize("n", [30, 1000])
def test_decays_of_many_tasks_slow_quadrature(n):
    generator = torch.Generator().manual_seed(n)
    rates = 10 ** (4 * torch.rand(n, generator=generator).double() - 4)
    masks = torch.rand(6, n, generator=generator) < torch.linspace(0, 1, 6)[:, None]
    tilt = 2.0 / n
    kernel = RBF(rates, amplitude=2.0)
    q, p, weights = fine_nodes()
    found = functionals(Masks.of(masks), kernel, "shapley", torch.tensor([[3]]))[0]
    for value, mask in zip(found, masks, strict=True):
        logs = torch.zeros_like(q)
        for task, (rate, held) in enumerate(zip(rates.tolist(), mask.tolist(), strict=True)):
            present = math.exp((0 if held else tilt) - (0 if held else rate))
            absent = math.exp((tilt if held else 2 * tilt) - (rate if held else 0))
            if task == 3:
                change = present - absent
            else:
                logs += torch.log(q * present + p * absent)
        assert value.item() == pytest.approx(change * float(logs.exp() @ weights), rel=1e-9)


@every_readout
@pytest.mark.parametrize("kernel", [RBF(0.01, 2.0), Exponential(0.1, -1.0)], ids=str)
def test_equal_decays_of_many_tasks_are_one(readout, kernel):
    n, tasks = 150, torch.tensor([[0, 140], [7, 3]])
    every = replace(kernel, gamma=(kernel.gamma,) * n)
    masks = Masks.of(torch.arange(n) < torch.tensor([0, 1, 75, 149, 150])[:, None])
    for chosen in (tasks[:, :1], tasks):
        found, expected = (functionals(masks, k, readout, chosen) for k in (every, kernel))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)
        found, expected = (prior_variance(k, readout, n, chosen) for k in (every, kernel))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-14)


@every_kernel
@every_readout
def test_many_tasks_are_finite(kernel, readout):
    n, one = 1500, torch.tensor([[0]])
    sizes = torch.tensor([0, 1, n // 2, n])
    masks = Masks.of(torch.arange(n) < sizes[:, None])
    for order in (1, 2):
        assert tables(kernel, readout, n, order, sizes).isfinite().all()
    if sum(len(each.weights) for each in kernel.products(n)) < 2:
        assert prior_variance(kernel, readout, n, one).isfinite().all()
        assert functionals(masks, kernel, readout, one).isfinite().all()


@pytest.mark.parametrize("n", [128, 129, 2000])
def test_shapley_prior_variance_of_many_tasks(n):
    """For the identity it is sum_c 2 / (n^2 C(n-1, c)): exact integers."""
    exact = sum(Fraction(2, n * n * math.comb(n - 1, c)) for c in range(n))
    value = prior_variance(Identity(), "shapley", n, torch.tensor([[0]])).item()
    assert value == pytest.approx(float(exact), rel=1e-10)


def test_ten_thousand_tasks():
    n, m, gamma = 10_000, 2_000, 2e-4
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(m, 1, generator=generator)
    masks = torch.rand(m, n, generator=generator) < chance
    dual = torch.randn(m, 1, generator=generator, dtype=torch.float64)
    # the fit itself, an eigendecomposition, is not the point here
    small = fit_surrogate(masks[:8], dual[:8, 0], kernel=RBF(gamma=gamma), ridge=0.01)
    term = replace(small.kernel_terms[0], dual=dual - dual.mean())
    every = torch.ones(n, dtype=torch.bool)
    imagined = small.with_design(Masks.of(masks))
    surrogate = replace(imagined, kernel_terms=(term,), varying=every)
    shapley = surrogate.attribute("shapley")
    assert shapley.shape == (n,) and shapley.isfinite().all()
    dual = term.dual[:, 0] * surrogate.unit
    for task in (0, 1, 7_777):
        held = masks[:, task]
        others = masks.sum(1) - held.long()  # of the training subset, in n - 1 tasks
        sizes, index = others.unique(return_inverse=True)
        c = sizes.double()[:, None]
        table = -math.expm1(-gamma) * slow_context_mean(gamma, c, n - 1 - c)
        slow = (dual * torch.where(held, 1.0, -1.0) * table[index]).sum()
        assert shapley[task].item() == pytest.approx(slow.item(), rel=1e-8, abs=1e-11)
    none, every = surrogate.predict(torch.tensor([[False], [True]]).expand(2, n))
    assert shapley.sum().item() == pytest.approx((every - none).item(), rel=1e-8)
    assert surrogate.attribute("banzhaf").isfinite().all()
