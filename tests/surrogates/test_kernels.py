"""Kernels: the three forms of each agree, with each other and with loops."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from problems import KERNELS as KERNELS_SET
from problems import every_kernel, of
from sklearn.metrics import pairwise

from ksm_ext import ANOVA2, RBF, Exponential, Laplace, Linear, Polynomial
from ksm_ext.surrogates import kernels
from ksm_ext.surrogates.kernels import KERNELS, Sum, by_name, from_description
from ksm_ext.surrogates.masks import Masks


def oracle(kernel, x, y):
    if isinstance(kernel, Sum):
        return sum(weight * oracle(term, x, y) for weight, term in kernel.terms)
    parameters = kernel.describe()
    return reference.kernel_matrix(parameters.pop("name"), x, y, **parameters)


def random_masks(m, n):
    return torch.rand(m, n) < torch.rand(m, 1)


def mixture_of(kernel, x, y, **options):
    """The product kernels between rows of x (m, n) and y (l, n) bool, task by task."""
    total = torch.zeros(len(x), len(y)).double()
    for products in kernel.products(x.shape[1], **options):
        rates = products.rates.reshape(len(products.weights), -1).expand(-1, x.shape[1])
        for weight, each in zip(products.weights, rates.tolist(), strict=True):
            parts = []
            for i, rate in enumerate(each):
                apart = (x[:, i, None] ^ y[:, i]).double()
                absent = 2 - x[:, i, None].double() - y[:, i].double()
                parts.append((products.tilt * absent).exp() * math.exp(-rate) ** apart)
            total += weight * torch.stack(parts).prod(0)
    return total


@every_kernel
@pytest.mark.parametrize("m, l, n", [(1, 1, 1), (6, 4, 7), (3, 5, 70), (0, 2, 3)])
def test_masks_weights_and_loops_agree(kernel, m, l, n):
    kernel = of(kernel, n)
    x, y = random_masks(m, n), random_masks(l, n)
    expected = oracle(kernel, x.double(), y.double())
    close = {"rtol": 1e-12, "atol": 1e-14}
    torch.testing.assert_close(kernel.gram(Masks.of(x), Masks.of(y)), expected, **close)
    torch.testing.assert_close(kernel.on_weights(x.double(), y.double()), expected, **close)
    gram = oracle(kernel, x.double(), x.double())
    torch.testing.assert_close(kernel.gram(Masks.of(x)), gram, **close)
    torch.testing.assert_close(kernel.diagonal(Masks.of(x)), gram.diagonal(), **close)


@every_kernel
@pytest.mark.parametrize("entries", [1, 10, 2**24])
def test_products_are_those_of_the_matrix(kernel, entries, monkeypatch):
    monkeypatch.setattr(kernels, "_MATMUL_ENTRIES", entries)  # blocks of 1, 2 and all rows
    kernel = of(kernel, 70)
    x, y, v = random_masks(7, 70), random_masks(5, 70), torch.randn(5, 3).double()
    for scale in (1, 0.3):
        left, right = Masks.of(scale * x.double()), Masks.of(scale * y.double())
        expected = oracle(kernel, left.floats, right.floats) @ v
        close = {"rtol": 1e-11, "atol": 1e-11 * float(expected.abs().max())}
        torch.testing.assert_close(kernel.matmul(left, right, v), expected, **close)
        square = kernel.matmul(right, None, v)
        torch.testing.assert_close(square, kernel.matmul(right, right, v), **close)


@every_kernel
def test_real_weights_agree_with_loops(kernel):
    kernel = of(kernel, 6)
    x, y = torch.rand(5, 6).double(), torch.rand(4, 6).double()
    close = {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(kernel.gram(Masks.of(x), Masks.of(y)), oracle(kernel, x, y), **close)
    gram = oracle(kernel, x, x)
    torch.testing.assert_close(kernel.gram(Masks.of(x)), gram, **close)
    diagonal = kernel.diagonal(Masks.of(x))
    torch.testing.assert_close(diagonal, gram.diagonal(), rtol=1e-7, atol=0)
    mixed = kernel.gram(Masks.of(x), Masks.of(random_masks(3, 6)))  # one side 0/1
    assert mixed.shape == (5, 3) and mixed.dtype == torch.float64


@every_kernel
@pytest.mark.parametrize("n", [1, 9, 130])
def test_tables_are_the_kernel_of_counts(kernel, n):
    if not kernel.is_tabulated:
        pytest.skip("it has none")
    hamming, overlap = kernel.tables(n, torch.device("cpu"))
    zero = torch.zeros(n + 1, dtype=torch.float64)
    hamming, overlap = (zero if t is None else t for t in (hamming, overlap))
    base = torch.ones(1, n, dtype=torch.float64)
    for count in range(n + 1):
        other = (torch.arange(n) < count).double()[None]
        # against the full subset, overlap is count and distance the rest
        value = hamming[n - count] + overlap[count]
        expected = oracle(kernel, base, other)[0, 0]
        assert value.item() == pytest.approx(expected.item(), rel=1e-12, abs=1e-300)


@every_kernel
@pytest.mark.parametrize("n", [1, 4, 12])
def test_products_and_degree_describe_the_kernel(kernel, n):
    kernel = of(kernel, n)
    masks = torch.cat(
        [random_masks(20, n), torch.eye(n).bool(), torch.tensor([[False], [True]]).expand(2, n)]
    )
    counts = torch.arange(n + 1, dtype=torch.float64)
    overlap, gram = kernel.overlap_values(counts), kernel.gram(Masks.of(masks))
    if overlap is None:
        assert kernel.overlap_degree == 0
        overlap = 0 * counts
    elif n > kernel.overlap_degree:  # its differences do not vanish, those beyond do
        scale = overlap.abs().max()
        assert torch.diff(overlap, n=kernel.overlap_degree).abs().max() > 1e-6 * scale
        assert torch.diff(overlap, n=kernel.overlap_degree + 1).abs().max() < 1e-11 * scale
    rest = gram - overlap[reference.overlap(masks, masks)]
    scale = gram.abs().max()
    torch.testing.assert_close(mixture_of(kernel, masks, masks), rest, rtol=0, atol=1e-12 * scale)
    coarse = mixture_of(kernel, masks, masks, coarse=True)
    torch.testing.assert_close(coarse, rest, rtol=0, atol=2e-8 * scale)


@pytest.mark.parametrize("gamma", [1e-3, 1e-2, 0.03, 0.1, 0.3, 0.7, 1.0, 2.0, 3.0, 5.0, 7.0, 10.0])
def test_exponential_is_a_mixture_of_products(gamma):
    h, kernel = torch.arange(201, dtype=torch.float64), Exponential(gamma=gamma)
    products = kernel.products(200)
    assert all(each.weights.min() > -1e-15 for each in products)
    found = sum(
        each.weights @ torch.xlogy(h, torch.exp(-each.rates)[:, None]).exp() for each in products
    )
    expected = torch.exp(-gamma * h.sqrt())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_laplace_is_rbf_on_masks_only():
    masks, weights = Masks.of(random_masks(6, 5)), Masks.of(torch.rand(6, 5).double())
    rbf, laplace = RBF(gamma=0.3), Laplace(gamma=0.3)
    assert torch.equal(rbf.gram(masks), laplace.gram(masks))
    assert not torch.allclose(rbf.gram(weights), laplace.gram(weights))


def test_scikit_learn_agrees():
    x, y = torch.rand(5, 4).double(), torch.rand(3, 4).double()
    pairs = [
        (Linear(), pairwise.linear_kernel(x, y)),
        (RBF(gamma=0.7), pairwise.rbf_kernel(x, y, gamma=0.7)),
        (Laplace(gamma=0.7), pairwise.laplacian_kernel(x, y, gamma=0.7)),
        (Polynomial(3, 0.7, 2.0), pairwise.polynomial_kernel(x, y, degree=3, gamma=0.7, coef0=2.0)),
    ]
    for kernel, expected in pairs:
        torch.testing.assert_close(kernel.on_weights(x, y), torch.from_numpy(expected))


@every_kernel
@pytest.mark.parametrize("m, n", [(0, 3), (1, 1), (9, 2), (5, 63), (9, 64), (7, 70)])
def test_gram_does_not_depend_on_the_order_of_tasks(kernel, m, n):
    kernel = of(kernel, n)
    x, order = random_masks(m, n), torch.randperm(n)
    if not any(each.by_task for each in kernel.products(n)):  # tasks are alike
        assert torch.equal(kernel.gram(Masks.of(x)), kernel.gram(Masks.of(x[:, order])))


# -- parameters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [*KERNELS_SET, RBF(), Linear() + RBF(), by_name("rbf+anova2")])
def test_descriptions_round_trip(kernel):
    assert from_description(kernel.describe()) == kernel


def test_text():
    assert str(Linear()) == "linear" and str(RBF()) == "rbf"
    assert str(RBF(gamma=0.02)) == "rbf(gamma=0.02)"
    assert str(RBF(gamma=(0.5, 0.02), amplitude=1.5)) == "rbf(gamma=0.02 to 0.5, amplitude=1.5)"
    assert str(Linear() + 0.5 * RBF(gamma=0.1)) == "linear + 0.5 rbf(gamma=0.1)"


def test_sums_are_flat_and_scale():
    kernel = 2.0 * (Linear() + 3.0 * RBF(gamma=0.1)) + Laplace(gamma=1.0)
    weights = [(weight, term.name) for weight, term in kernel.terms]
    assert weights == [(2.0, "linear"), (6.0, "rbf"), (1.0, "laplace")]


@pytest.mark.parametrize("name", KERNELS)
def test_by_name(name):
    assert type(by_name(name)) is KERNELS[name]
    both = by_name(f" {name} + linear")
    assert [term.name for _, term in both.terms] == [name, "linear"]
    assert [weight for weight, _ in both.terms] == [None, None]


@pytest.mark.parametrize("name", ["", "gauss", "linear+", "RBF", "linear*rbf"])
def test_unknown_names(name):
    known = "linear, polynomial, anova2, rbf, laplace, exponential"
    form = rf"^`kernel` must be 'auto', one of {known}.*, got '.*Pass a name, or an object such as "
    with pytest.raises(ValueError, match=form):
        by_name(name)


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda: RBF(gamma=0.0), "`gamma` must be positive and finite, got 0.0. Leave it out"),
        (lambda: Laplace(gamma=-1.0), "`gamma` must be positive and finite, got -1.0. Leave"),
        (lambda: Exponential(gamma=math.nan), "`gamma` must be positive and finite, got nan."),
        (lambda: Polynomial(gamma=math.inf), "`gamma` must be positive and finite, got inf."),
        (lambda: Polynomial(degree=0), "`degree` must be a whole number of at least 1, got 0. Use"),
        (lambda: Polynomial(degree=2.5), "`degree` must be a whole number of at least 1, got 2.5."),
        (lambda: Polynomial(coef0=-0.1), "`coef0` must be at least 0, got -0.1. A negative one"),
        (lambda: Polynomial(coef0=math.nan), "`coef0` must be at least 0, got nan."),
        (lambda: ANOVA2(pair_weight=0.0), "`pair_weight` must be positive and finite, got 0.0."),
        (lambda: RBF(gamma=[0.1, -2.0]), "`gamma` must be positive and finite, got -2.0."),
        (lambda: RBF(gamma=[[0.1]]), r"`gamma` must be a number, or one for each task, got shape"),
        (lambda: RBF(gamma=()), r"`gamma` must be a number, or one for each task, got shape"),
        (lambda: RBF(1.0, 51.0), "`amplitude` must be between -50 and 50, got 51.0. Scores of"),
        (lambda: RBF(1.0, math.nan), "`amplitude` must be between -50 and 50, got nan."),
        (lambda: 0.0 * RBF(gamma=1.0), "`weight` must be positive and finite, got 0.0."),
        (lambda: -2.0 * Linear(), "`weight` must be positive and finite, got -2.0."),
    ],
)
def test_parameter_errors(make, found):
    with pytest.raises(ValueError, match=f"^{found}"):
        make()


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, pd.Series])
def test_decays_of_any_kind(kind):
    made = RBF(gamma=kind([0.5, 0.25]))
    assert made == RBF(gamma=(0.5, 0.25)) and hash(made) == hash(RBF(gamma=(0.5, 0.25)))
    assert from_description(json.loads(json.dumps(made.describe()))) == made
    assert (2.0 * made).of_tasks(torch.tensor([False, True])) == 2.0 * RBF(gamma=(0.25,))


def test_decays_of_other_tasks():
    form = "^`gamma` must be a number, or one for each of 3 tasks, got 2 numbers. Give them in the"
    kernel, masks = RBF(gamma=(0.1, 0.2)), random_masks(4, 3)
    for ask in (kernel.gram, kernel.diagonal, lambda masks: (Linear() + kernel).gram(masks)):
        for table in (masks, 0.3 * masks):
            with pytest.raises(ValueError, match=form):
                ask(Masks.of(table))


@pytest.mark.parametrize("kernel", [RBF(), Laplace(), Exponential(), Polynomial(), ANOVA2()])
def test_open_parameters_are_no_kernel_yet(kernel):
    masks = Masks.of(random_masks(4, 3))
    form = r"^`(gamma|pair_weight)` must be a number, got None\. Set"
    with pytest.raises(ValueError, match=form):
        kernel.gram(masks)
    filled = kernel.grid(masks)
    assert len(filled) >= 3 and len({str(one) for one in filled}) == len(filled)
    for one in filled:
        assert one.grid(masks) == [one] and torch.isfinite(one.gram(masks)).all()


def test_open_weights_are_scaled_to_the_subsets():
    masks = Masks.of(random_masks(40, 8))
    kernels = by_name("linear+rbf").grid(masks)
    assert len(kernels) == 3 * len(RBF().grid(masks))
    for kernel in kernels:
        (first, linear), (second, rbf) = kernel.terms
        variances = [
            weight * (term.gram(masks).diagonal().mean() - term.gram(masks).mean())
            for weight, term in ((first, linear), (second, rbf))
        ]
        assert variances[0].item() == pytest.approx(1.0)
        assert min(abs(math.log(variances[1] / factor)) for factor in (0.1, 1, 10)) < 1e-9
    fixed = (Linear() + RBF()).grid(masks)  # weights of 1, only gamma open
    assert len(fixed) == len(RBF().grid(masks)) and all(k.terms[0][0] == 1.0 for k in fixed)


def test_grids_survive_subsets_without_spread():
    masks = Masks.of([[1, 1], [1, 1], [1, 1]])
    for name in [*KERNELS, "linear+rbf"]:
        assert all(torch.isfinite(k.gram(masks)).all() for k in by_name(name).grid(masks))
