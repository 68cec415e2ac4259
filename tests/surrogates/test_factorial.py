"""Factorial designs: what they hold, and main effects by enumeration and dense algebra."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_ext import ANOVA2, RBF, Exponential, Factors, Linear, Size, fit_surrogate

FEW = settings(derandomize=True, deadline=None, database=None, max_examples=60)
FACTORS = Factors({"rate": [1e-4, 1e-3, 1e-2], "data": ["v1", "v2", "v3", "v4"], "warm": [0, 1]})
BASE = {"data": "v2", "rate": 1e-3}


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(m=16, t=2):
    masks = FACTORS.design(m, seed=1)
    scores = torch.tanh(masks.double() @ normal(0, 9, t)) + 0.2 * normal(1, m, t)
    return masks, scores


def every():
    combinations = itertools.product(*FACTORS.levels.values())
    return FACTORS.masks([dict(zip(FACTORS.levels, each, strict=True)) for each in combinations])


def contrasts(baseline):
    """Main effects as a matrix on the scores of all runs: (9, 24)."""
    masks, rows, start = every(), [], 0
    for name, levels in FACTORS.levels.items():
        at = [masks[:, start + j].double() for j in range(len(levels))]
        at = [each / each.sum() for each in at]
        other = sum(at) / len(at)
        if name in baseline:
            other = at[levels.index(baseline[name])]
        rows += [each - other for each in at]
        start += len(levels)
    return torch.stack(rows)


@FEW
@given(
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=5),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 10**6),
)
def test_runs_are_distinct_and_levels_balanced(sizes, share, seed):
    factors = Factors({f"f{i}": range(k) for i, k in enumerate(sizes)})
    m = max(1, min(round(share * math.prod(sizes)), 60))
    masks = factors.design(m, seed=seed)
    assert masks.shape == (m, sum(sizes)) and torch.equal(masks, factors.design(m, seed=seed))
    assert len(masks.unique(dim=0)) == m
    for part in masks.split(sizes, 1):
        assert bool((part.sum(1) == 1).all())
        assert int(part.sum(0).max() - part.sum(0).min()) <= 1
    assert torch.equal(factors.masks(factors.settings(masks)), masks)


def test_names_are_factor_and_level():
    assert FACTORS.names[:4] == ("rate=0.0001", "rate=0.001", "rate=0.01", "data=v1")
    assert FACTORS.settings(every())[0] == {"rate": 1e-4, "data": "v1", "warm": 0}


KERNELS = [Linear(), RBF(gamma=0.3), Exponential(gamma=0.4), ANOVA2(pair_weight=0.5)]
KERNELS += [Exponential(gamma=0.3, amplitude=1.0), Linear() + Size(degree=1)]
KERNELS += [RBF(gamma=[0.1 * i + 0.1 for i in range(9)])]


@pytest.mark.parametrize("baseline", [{}, BASE], ids=["mean", "baseline"])
@pytest.mark.parametrize("kernel", ["auto", "lasso", *KERNELS], ids=str)
def test_effects_are_those_of_all_combinations(kernel, baseline):
    surrogate = fit_surrogate(*problem(), kernel=kernel, task_names=FACTORS.names)
    expected = contrasts(baseline) @ surrogate.predict(every(), observed=True)
    found = surrogate.level_effects(FACTORS, baseline)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("baseline", [{}, BASE], ids=["mean", "baseline"])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_deviations_are_those_of_dense_algebra(kernel, baseline):
    masks, scores = problem(t=1)
    surrogate = fit_surrogate(masks, scores[:, 0], kernel=kernel, noise_std=0.2)
    (term,), query = surrogate.kernel_terms, every()
    own = float(term.nugget_share * term.ridge)
    prior = term.kernel.gram(surrogate._query(query)) + own * torch.eye(24).double()
    fitted = torch.tensor([int((query == mask).all(1).nonzero()) for mask in masks])
    left = float(term.ridge) - own
    variance = reference.posterior_variance(contrasts(baseline), prior, fitted, left, True)
    scale = (term.signal_variance * surrogate.unit.square() * surrogate._size_factors[3]).item()
    value, std = surrogate.level_effects(FACTORS, baseline, return_std=True)
    torch.testing.assert_close(std.square(), variance.clamp_min(0) * scale, rtol=1e-6, atol=1e-9)
    at_base = [i for i, row in enumerate(contrasts(baseline)) if not bool(row.any())]
    assert not bool(value[at_base].any()) and not bool(std[at_base].any())


@pytest.mark.parametrize("kernel", ["auto", Linear() + Size(degree=1), KERNELS[4]], ids=str)
@pytest.mark.parametrize("left", ["data=v2", "warm=0"])
def test_levels_without_a_run_and_names(left, kernel):
    masks, scores = problem(t=2)
    rows = ~masks[:, FACTORS.names.index(left)]
    tables = pd.DataFrame(masks[rows].numpy(), columns=FACTORS.names), scores[rows].numpy()
    surrogate = fit_surrogate(tables[0], pd.DataFrame(tables[1]), kernel=kernel)
    value, std = surrogate.level_effects(FACTORS, return_std=True)
    values = surrogate.predict(every(), observed=True).to_numpy()
    np.testing.assert_allclose(value, contrasts({}).numpy() @ values, rtol=0, atol=1e-9)
    assert list(value.index) == list(FACTORS.names) and np.isfinite(std.to_numpy()).all()


def test_effects_of_a_full_design_are_differences_of_means():
    """Without noise every score is answered by itself: analysis of variance."""
    masks = every()
    scores = torch.tanh(masks.double() @ normal(0, 9, 2)) + 0.2 * normal(1, 24, 2)
    found = fit_surrogate(masks, scores, noise_std=0.0).level_effects(FACTORS)
    torch.testing.assert_close(found, contrasts({}) @ scores, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "ask, error, found",
    [
        (lambda s: Factors({}), ValueError, "`levels` must be of one factor or more"),
        (lambda s: Factors([1]), TypeError, "`levels` must be a mapping"),
        (lambda s: Factors({"a": [1]}), ValueError, r"`levels\['a'\]` must be two levels or more"),
        (lambda s: Factors({"a": [1, 1]}), ValueError, r"`levels\['a'\]` must be two levels"),
        (lambda s: FACTORS.design(25, seed=0), ValueError, "`num_runs` must be at most 24"),
        (lambda s: FACTORS.masks([{"rate": 1}]), ValueError, r"`settings\[0\]` must be with one"),
        (lambda s: FACTORS.masks([3]), TypeError, r"`settings\[0\]` must be a mapping"),
        (lambda s: FACTORS.settings(torch.eye(4)), ValueError, "`masks` must be of 9 columns"),
        (lambda s: FACTORS.settings(torch.eye(9)), ValueError, "`masks` must be of one level"),
        (lambda s: s.level_effects(FACTORS, {"data": 7}), ValueError, "`baseline` must be a level"),
        (lambda s: s.level_effects(FACTORS, 7), TypeError, "`baseline` must be a mapping"),
        (
            lambda s: s.level_effects(Factors({"a": [1, 2]})),
            ValueError,
            "`factors` must be factors of 9 levels, those of the tasks, got 2",
        ),
    ],
)
def test_what_is_no_factor(ask, error, found):
    surrogate = fit_surrogate(*problem(), kernel="linear")
    with pytest.raises(error, match=f"^{found}"):
        ask(surrogate)


def test_estimates_are_refused():
    masks, scores = problem()
    surrogate = fit_surrogate(masks, scores, estimates=(every(), normal(0, 24, 2)), kernel="rbf")
    with pytest.raises(ValueError, match="`estimates` must be left out for level_effects"):
        surrogate.level_effects(FACTORS)


def test_names_decide_and_other_orders_are_refused():
    """A table with its columns in another order is read by name, and a surrogate of it refused."""
    factors = Factors({"rate": [1, 2], "data": ["a", "b", "c"]})
    masks = factors.design(6, seed=0)
    frame = pd.DataFrame(masks.int().numpy(), columns=factors.names)
    turned = frame[sorted(factors.names)]
    assert factors.settings(turned) == factors.settings(frame) == factors.settings(masks)
    scores = torch.tensor([float(run["rate"]) for run in factors.settings(masks)])
    right = fit_surrogate(frame, scores, kernel="linear", ridge=0.1)
    plain = fit_surrogate(masks, scores, kernel="linear", ridge=0.1)
    close = torch.testing.assert_close
    close(torch.as_tensor(right.level_effects(factors)), plain.level_effects(factors))
    wrong = fit_surrogate(turned, scores, kernel="linear", ridge=0.1)
    with pytest.raises(ValueError, match="`factors` must be of the tasks data=a, data=b"):
        wrong.level_effects(factors)
    for other in ({"rate": [1, 2]}, None):
        with pytest.raises(TypeError, match=r"`factors` must be ksm_ext\.Factors"):
            plain.level_effects(other)
    with pytest.raises(ValueError, match="all different as text"):
        Factors({"a=b": [1, 2], "a": ["b=1", "x"]})
