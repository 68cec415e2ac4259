"""Maxima of functions of shares, against closed forms and enumeration."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ksm_ext.surrogates.simplex import maximise, onto_simplex

some_seeds = st.integers(0, 2**31)


def problem(seed, n=5):
    """Bounds (n,) that leave mixtures, and points (6, n) around them."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (torch.rand(n, generator=generator).double() for _ in range(2))
    low, high = 0.8 * low / n, 1 / n + high
    return torch.randn(6, n, generator=generator).double(), low, high


@settings(max_examples=25, deadline=None)
@given(some_seeds)
def test_projections_are_the_nearest_points(seed):
    points, low, high = problem(seed)
    found = onto_simplex(points, low, high, 1.0)
    assert torch.allclose(found.sum(1), torch.ones(6).double(), atol=1e-9)
    assert bool(((found >= low - 1e-12) & (found <= high + 1e-12)).all())
    for point, nearest in zip(points, found, strict=True):
        best = minimize(
            lambda x, point=point: ((x - point.numpy()) ** 2).sum(),
            low + (1 - low.sum()) * (high - low) / (high - low).sum(),
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
            bounds=list(zip(low, high, strict=True)),
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
        )
        assert torch.allclose(nearest, torch.from_numpy(best.x), atol=1e-5)


@settings(max_examples=15, deadline=None)
@given(some_seeds)
def test_a_linear_function_is_largest_at_a_vertex(seed):
    points, low, high = problem(seed)
    slopes = points[0]
    found, value = maximise(
        lambda x: x @ slopes, onto_simplex(points, low, high, 1.0), low, high, 1.0
    )
    best, left = low.clone(), 1 - float(low.sum())  # fill the best first
    for task in slopes.argsort(descending=True).tolist():
        added = min(left, float(high[task] - low[task]))
        best[task] += added
        left -= added
    assert abs(value - float(best @ slopes)) < 1e-3 and torch.allclose(found, best, atol=1e-2)


@settings(max_examples=15, deadline=None)
@given(some_seeds)
def test_a_concave_quadratic_is_largest_where_its_projection_is(seed):
    points, low, high = problem(seed)
    top = points[0] / 3
    found, _ = maximise(
        lambda x: -(x - top).square().sum(1), onto_simplex(points, low, high, 1.0), low, high, 1.0
    )
    assert torch.allclose(found, onto_simplex(top[None], low, high, 1.0)[0], atol=1e-3)


def test_sums_other_than_one():
    zeros, start = torch.zeros(3).double(), torch.full((1, 3), 4.0).double()
    slopes = torch.tensor([1.0, 3.0, 2.0]).double()
    found, value = maximise(lambda x: x @ slopes, start, zeros, zeros + 12, 12.0)
    assert abs(value - 36) < 1e-2 and torch.allclose(
        found, torch.tensor([0.0, 12, 0]).double(), atol=1e-2
    )
