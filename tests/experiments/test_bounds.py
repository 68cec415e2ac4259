import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from experiments.bounds import SIGMAS, hessian_distance, pac_bayes_bound


def test_the_bound_is_its_parts_at_the_best_sigma():
    initial, final = torch.zeros(100), torch.full((100,), 0.2)
    bound = pac_bayes_bound(3.0, initial, final, 5000, training_loss=0.1, delta=0.1)

    def formula(log_sigma):
        sigma = math.exp(log_sigma)
        divergence = 4.0 / (2 * sigma**2)
        confidence = math.log(2 * math.sqrt(5000) * len(SIGMAS) / 0.1)
        return 0.1 + 1.5 * sigma**2 + math.sqrt((divergence + confidence) / 10000)

    best = minimize_scalar(formula, bounds=(-10, 4), method="bounded")
    assert bound.value == pytest.approx(formula(math.log(bound.sigma)), rel=1e-6)
    assert best.fun <= bound.value < 1.01 * best.fun
    parts = bound.training_loss + bound.sharpness + bound.complexity
    assert bound.value == pytest.approx(parts)


def test_it_holds_for_a_gaussian_mean():
    """Loss (w - x)² / 8 clipped to [0, 1]: the quadratic expansion is nearly exact."""
    generator = torch.Generator().manual_seed(0)
    broken = 0
    for _ in range(200):
        x = torch.rand(50, generator=generator)
        w = x.mean()
        train = float(((w - x) ** 2 / 8).mean())
        bound = pac_bayes_bound(0.25, torch.zeros(1), w.reshape(1), 50, training_loss=train)
        expected = float(((w - 0.5) ** 2 + 1 / 12 + bound.sigma**2) / 8)  # over the posterior
        broken += expected > bound.value
    assert broken <= 10


def test_flatter_nearer_and_more_data_are_better():
    def bound(trace=1.0, distance=1.0, b=1000):
        return pac_bayes_bound(
            trace, torch.zeros(1), torch.tensor([distance]), b, training_loss=0.0
        ).value

    assert bound(trace=0.1) < bound() < bound(trace=10)
    assert bound(distance=0.1) < bound() < bound(b=100)
    measure = hessian_distance(4.0, torch.zeros(2), torch.tensor([3.0, 4.0]), 25)
    assert measure == pytest.approx(math.sqrt(4 * 25 / 25))


@given(
    trace=st.floats(0, 100),
    length=st.floats(0, 10),
    b=st.integers(1, 10**6),
    seed=st.integers(0, 10**6),
)
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
def test_bounds_grow_with_trace_and_distance_and_fall_with_samples(trace, length, b, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    end = start + length * start / start.norm()
    far = end + start / start.norm()

    def bound(*arguments):
        return pac_bayes_bound(*arguments, training_loss=0.1).value

    assert 0.1 < bound(trace, start, end, b) <= bound(trace + 1, start, end, b)
    assert bound(trace, start, end, b) <= bound(trace, start, far, b) + 1e-12
    assert bound(trace, start, end, 4 * b) <= bound(trace, start, end, b)
    measure = hessian_distance(trace, start, end, b)
    assert measure == pytest.approx(math.sqrt(trace / b) * length, abs=1e-9)


def test_bad_input():
    weights = torch.zeros(3)
    with pytest.raises(ValueError, match="`initial` must be a copy, got the memory of `final`"):
        pac_bayes_bound(1.0, weights, weights, 10, training_loss=0.0)
    with pytest.raises(ValueError, match="`trace` must be between 0"):
        pac_bayes_bound(-1.0, weights, torch.ones(3), 10, training_loss=0.0)
    with pytest.raises(ValueError, match="`delta` must be between 0 and 1"):
        pac_bayes_bound(1.0, weights, torch.ones(3), 10, training_loss=0.0, delta=1.0)
    with pytest.raises(ValueError, match="`training_loss` must be between 0 and 1"):
        pac_bayes_bound(1.0, weights, torch.ones(3), 10, training_loss=2.0)
    with pytest.raises(ValueError, match="of the shape of `final`"):
        hessian_distance(1.0, torch.ones(2), torch.ones(3), 10)
