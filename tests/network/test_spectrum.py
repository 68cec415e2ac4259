import math

import numpy as np
import pytest
import torch
from torch import nn

from ksm_ext.network.hessian import GaussNewton, Hessian
from ksm_ext.network.spectrum import (
    hutch_pp_trace,
    hutchinson_trace,
    lanczos,
    per_sample_traces,
    signs,
    spectral_density,
    top_eigenpairs,
)


def symmetric(p, seed=0):
    root = torch.randn(p, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (root + root.T) / 2


@pytest.fixture(scope="module")
def network():
    """A trained network of 2,018 parameters, its operators and dense Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 39), nn.Tanh(), nn.Linear(39, 10), nn.Tanh(), nn.Linear(10, 2)
    )
    model = model.double()
    x = torch.randn(300, 40, dtype=torch.float64)
    y = (x[:, 0] * x[:, 1] > 0).long()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(30):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    operator = Hessian(model, (x, y), vectors_per_pass=64)
    matrix = operator(torch.eye(operator.shape[0], dtype=torch.float64))
    return model, (x, y), operator, matrix


def test_dense_matrix_of_the_network_is_symmetric_and_right(network):
    model, (x, y), operator, matrix = network
    assert 1990 <= operator.shape[0] <= 2050
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    v = torch.randn(len(start), dtype=torch.float64)

    def gradient(step):
        torch.nn.utils.vector_to_parameters(start + step * v, model.parameters())
        return Hessian(model, (x, y)).gradient()

    difference = (gradient(1e-5) - gradient(-1e-5)) / 2e-5
    torch.nn.utils.vector_to_parameters(start, model.parameters())
    torch.testing.assert_close(matrix @ v, difference, rtol=1e-6, atol=1e-8)


def test_ends_of_the_networks_spectrum(network):
    _, _, operator, matrix = network
    exact, vectors = torch.linalg.eigh(matrix)
    values, pairs = top_eigenpairs(operator, 10, tolerance=1e-8)
    torch.testing.assert_close(values, exact.flip(0)[:10], rtol=1e-6, atol=0)
    for i in range(10):
        assert abs(pairs[i] @ vectors[:, -1 - i]) > 1 - 1e-6
    lowest, _ = top_eigenpairs(operator, 2, which="smallest", tolerance=1e-8)
    torch.testing.assert_close(lowest, exact[:2], rtol=1e-6, atol=0)
    far, _ = top_eigenpairs(operator, 3, which="magnitude", tolerance=1e-8)
    assert far.abs().tolist() == pytest.approx(exact.abs().sort().values.flip(0)[:3].tolist())


def test_density_of_the_network(network):
    _, _, operator, matrix = network
    exact = torch.linalg.eigvalsh(matrix)
    found = spectral_density(operator, num_probes=16, num_steps=60)
    torch.testing.assert_close(found.weights.sum(1), torch.ones(16).double())
    assert found.moment(2) == pytest.approx(float(exact.square().mean()), rel=0.15)
    assert found.trace() == pytest.approx(float(exact.sum()), rel=0.1)
    assert float(found.nodes.max()) == pytest.approx(float(exact[-1]), rel=1e-6)
    reach = float(exact.abs().max())
    for edge in (0.05 * reach, 0.1 * reach, 0.3 * reach):  # shares of eigenvalues below
        share = float((found.weights * (found.nodes < edge)).sum(1).mean())
        assert share == pytest.approx(float((exact < edge).double().mean()), abs=0.05)
    width = 0.02 * reach
    grid = torch.linspace(float(exact[0]) - 5 * width, float(exact[-1]) + 5 * width, 2000).double()
    curve = found.density(grid, width)
    bells = torch.exp(-((grid[:, None] - exact) / width).square() / 2).mean(1)
    true = bells / (width * math.sqrt(2 * math.pi))
    assert float(torch.trapezoid(curve, grid)) == pytest.approx(1, abs=1e-3)
    assert float(torch.trapezoid((curve - true).abs(), grid)) < 0.05


def test_traces_of_the_network_and_their_errors(network):
    _model, _data, operator, matrix = network
    exact = float(matrix.trace())
    inside = 0
    for seed in range(40):
        found = hutchinson_trace(
            lambda v: v @ matrix,
            len(matrix),
            num_probes=30,
            seed=seed,
        )
        inside += abs(found.value - exact) < 2 * found.std_error
    assert 34 <= inside <= 40  # 95 % of 40, three standard deviations wide
    found = hutchinson_trace(operator, num_probes=30)
    again = hutchinson_trace(lambda v: v @ matrix, len(matrix), num_probes=30)
    assert found.value == pytest.approx(again.value) and found.num_products == 30


@pytest.mark.parametrize("kind", [pytest.param(Hessian, marks=pytest.mark.slow), GaussNewton])
def test_hutch_pp_needs_half_the_products(network, kind):
    """From about a hundred products on; below, its subspace is too small to matter."""
    model, data, *_ = network
    operator = kind(model, data, vectors_per_pass=64)
    matrix = operator(torch.eye(operator.shape[0], dtype=torch.float64))
    exact = float(matrix.trace())

    def error(estimate, **products):
        values = [
            estimate(lambda v: v @ matrix, len(matrix), seed=seed, **products).value
            for seed in range(50)
        ]
        return float(np.sqrt(np.mean((np.array(values) - exact) ** 2)))

    assert error(hutch_pp_trace, num_products=120) < error(hutchinson_trace, num_probes=240)


def test_hutch_pp_is_exact_on_few_dimensions():
    root = torch.randn(50, 4, dtype=torch.float64)
    matrix = root @ root.T
    found = hutch_pp_trace(lambda v: v @ matrix, 50, num_products=15)
    assert found.value == pytest.approx(float(matrix.trace()))
    assert found.num_products == 15


def test_lanczos_reproduces_the_matrix():
    matrix = symmetric(12)
    start = torch.randn(3, 12, dtype=torch.float64)
    diagonal, beside, basis = lanczos(lambda v: v @ matrix, start, 12)
    for i in range(3):
        t = diagonal[i].diag() + beside[i].diag(1) + beside[i].diag(-1)
        torch.testing.assert_close(basis[i] @ basis[i].T, torch.eye(12).double())
        torch.testing.assert_close(basis[i].T @ t @ basis[i], matrix)


def test_lanczos_ends_where_the_space_does():
    values, vectors = torch.linalg.eigh(symmetric(20))
    matrix = vectors @ values.diag() @ vectors.T
    start = vectors[:, :3].sum(1)[None]  # three dimensions are all it can reach
    diagonal, beside, _basis = lanczos(lambda v: v @ matrix, start, 10)
    assert bool(diagonal.isfinite().all()) and float(beside[0, 2]) < 1e-10
    inner = diagonal[0, :3].diag() + beside[0, :2].diag(1) + beside[0, :2].diag(-1)
    torch.testing.assert_close(torch.linalg.eigvalsh(inner), values[:3])
    nothing = lanczos(torch.zeros_like, start, 10)
    assert all(bool(part.isfinite().all()) for part in nothing) and not nothing[1].any()


def test_moments_of_quadrature_are_exact_for_the_probes():
    matrix = symmetric(30)
    probes = signs(lambda v: v, 30, 5, 3)
    found = spectral_density(lambda v: v @ matrix, 30, num_probes=5, num_steps=4, seed=3)
    power = torch.eye(30).double()
    for order in range(8):  # 2 * 4 - 1
        exact = ((probes @ power) * probes).sum(1).mean() / 30
        assert found.moment(order) == pytest.approx(float(exact), rel=1e-8, abs=1e-10)
        power = power @ matrix


def test_traces_of_samples(network):
    model, data, *_ = network
    few = tuple(column[:4] for column in data)
    operator = Hessian(model, few)
    exact = torch.stack(
        [
            Hessian(model, tuple(c[i : i + 1] for c in few), vectors_per_pass=128)(
                torch.eye(operator.shape[0], dtype=torch.float64)
            ).trace()
            for i in range(4)
        ]
    )
    values, errors = per_sample_traces(
        operator.per_sample_quadratic, operator.shape[0], num_probes=400, dtype=torch.float64
    )
    assert bool(((values - exact).abs() < 4 * errors).all())
    assert bool((errors < 0.25 * exact.abs().max()).all())


def test_probes_depend_on_seed_and_number_only():
    few, more = (signs(lambda v: v, 9, count, 5) for count in (3, 7))
    assert torch.equal(more[:3], few) and set(more.flatten().tolist()) == {-1.0, 1.0}
    assert not torch.equal(few, signs(lambda v: v, 9, 3, 6))


def test_bad_input():
    with pytest.raises(TypeError, match="`dim` must be a number for a plain function"):
        hutchinson_trace(lambda v: v)
    with pytest.raises(ValueError, match="`num_products` must be at least 3"):
        hutch_pp_trace(lambda v: v, 5, num_products=2)
    with pytest.raises(ValueError, match="`num_pairs` must be below 5"):
        top_eigenpairs(lambda v: v, 5, 5)
    with pytest.raises(ValueError, match="`which` must be one of"):
        top_eigenpairs(lambda v: v, 1, 5, which="middle")
    with pytest.raises(ValueError, match="`start` must be of rows that are not zero"):
        lanczos(lambda v: v, torch.zeros(1, 4), 2)
    with pytest.raises(ValueError, match="`width` must be positive"):
        spectral_density(lambda v: v, 5, num_probes=1).density(torch.zeros(1), 0)
    assert math.isnan(hutchinson_trace(lambda v: v, 4, num_probes=1).std_error)
