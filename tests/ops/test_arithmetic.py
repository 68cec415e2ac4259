"""The arithmetic of one value that all kernels share, as the module of pybind11 shows it."""

import numpy as np
import pytest
import torch

from ksm_ext import ops

arithmetic = pytest.importorskip("ksm_ext._arithmetic", reason="only of a build in place")

WIDER = {np.float32: np.float64, np.float64: np.longdouble}


def evenly(dtype, low, high, count=100_000):
    """Values from low to high, evenly spaced by how many numbers lie between them."""
    integers = np.int32 if dtype is np.float32 else np.int64
    first, last = np.array([low, high], dtype).view(integers).tolist()
    between = first + (last - first) // count * np.arange(count, dtype=np.int64)
    return np.append(between.astype(integers).view(dtype), dtype(high))


def units_in_the_last_place(found, expected):
    unit = np.spacing(np.abs(expected.astype(found.dtype)))
    return (np.abs(found - expected) / unit).max()


@pytest.mark.parametrize("dtype", WIDER)
def test_exp_and_log_are_right_to_the_units_they_state(dtype):
    limit = 87.0 if dtype is np.float32 else 708.0
    a, e = evenly(dtype, 2.0**-60, limit), evenly(dtype, 2.0**-60, 1.0)
    exact = np.exp(-a.astype(WIDER[dtype]))
    assert units_in_the_last_place(arithmetic.exp_of_minus(a), exact) <= 1.25
    exact = np.log1p(e.astype(WIDER[dtype]))
    assert units_in_the_last_place(arithmetic.log_of_one_plus(e), exact) <= 3


@pytest.mark.parametrize("dtype", WIDER)
def test_the_logistic_loss_and_its_derivatives_are_right_to_a_few_units(dtype):
    positive = evenly(dtype, 2.0**-40, 80.0)
    z = np.concatenate([-positive, np.zeros(1, dtype), positive])
    wide = z.astype(WIDER[dtype])
    sigma, other = 1 / (1 + np.exp(-wide)), 1 / (1 + np.exp(wide))
    loss = np.maximum(-wide, 0) + np.log1p(np.exp(-abs(wide)))
    assert units_in_the_last_place(arithmetic.logistic_loss(z), loss) <= 4
    assert units_in_the_last_place(arithmetic.logistic_slope(z), -other) <= 3
    assert units_in_the_last_place(arithmetic.logistic_curvature(z), sigma * other) <= 5


@pytest.mark.parametrize("dtype", WIDER)
def test_the_ends_of_exp_and_log(dtype):
    ends = np.array([0.0, 800.0, np.inf, np.nan], dtype)
    np.testing.assert_array_equal(arithmetic.exp_of_minus(ends), np.array([1, 0, 0, np.nan], dtype))
    ends = np.array([0.0, np.nan], dtype)
    np.testing.assert_array_equal(arithmetic.log_of_one_plus(ends), ends)


@pytest.mark.parametrize("dtype", WIDER)
def test_operators_have_the_bits_of_their_arithmetic(dtype):
    n = 300
    a = np.random.default_rng(0).exponential(3.0, n).astype(dtype)
    x, y = ops.pack_masks(torch.eye(n, dtype=torch.bool)), torch.zeros(1, 5, dtype=torch.int64)
    values = ops.weighted_mask_gram(x, y, n, torch.tensor(a))
    expected = arithmetic.exp_of_minus(a.astype(np.float64)).astype(dtype)  # tabulated in float64
    np.testing.assert_array_equal(values[:, 0].numpy(), expected)
    z = np.random.default_rng(1).normal(0.0, 5.0, n).astype(dtype)
    eye = torch.eye(n, dtype=torch.tensor(z).dtype)  # each sample is a task and a subset of its own
    found = ops.glm_gradient(
        eye,
        torch.tensor(z),
        torch.arange(n + 1),
        eye.bool(),
        torch.zeros_like(eye),
        curvature_dtype=eye.dtype,
    )
    slope, curvature = found.gradient.diagonal(), found.curvature.diagonal()
    np.testing.assert_array_equal(slope.numpy(), arithmetic.logistic_slope(z))
    np.testing.assert_array_equal(curvature.numpy(), arithmetic.logistic_curvature(z))
