"""Owen values: every permitted order, one after the other, and dense algebra."""

import itertools

import numpy as np
import pandas as pd
import pytest
import reference
import torch

from ksm_ext import (
    RBF,
    Exponential,
    Linear,
    Polynomial,
    Size,
    fit_surrogate,
    load_surrogate,
    subsets,
)

GROUPS = {
    4: ["a", "b", "b", "a"],
    5: [0, 1, 0, 0, 2],
    6: ["x", "y", "x", "z", "y", "x"],
    7: [0, 0, 0, 1, 2, 1, 0],
}


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def problem(seed, n, t=2):
    every = subsets.all_subsets(n)
    generator = torch.Generator().manual_seed(seed)
    masks = every[torch.randperm(2**n, generator=generator)[: 2**n * 2 // 3]]
    scores = torch.tanh(masks.double() @ normal(seed, n, t)) + 0.3 * normal(seed + 1, len(masks), t)
    return masks, scores


def owen_functionals(groups):
    """Owen values as a matrix on the values of a function on all subsets: (n, 2^n)."""
    n = len(groups)
    members = [[i for i in range(n) if groups[i] == label] for label in dict.fromkeys(groups)]
    place = {tuple(row): k for k, row in enumerate(reference.all_subsets(n).tolist())}
    found, count = torch.zeros(n, 2**n, dtype=torch.float64), 0
    for outer in itertools.permutations(members):
        for inner in itertools.product(*(itertools.permutations(group) for group in outer)):
            here, count = [False] * n, count + 1
            for task in itertools.chain(*inner):
                found[task, place[tuple(here)]] -= 1
                here[task] = True
                found[task, place[tuple(here)]] += 1
    return found / count


KERNELS = [
    "auto",
    "lasso",
    Linear(),
    RBF(gamma=0.3),
    RBF(gamma=[0.1, 0.5, 0.2, 0.9]),
    Exponential(gamma=0.3, amplitude=1.0),
    Polynomial(degree=3, gamma=0.5),
    Size(degree=2) + RBF(gamma=0.1) + Linear(),
]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
@pytest.mark.parametrize("n", GROUPS)
def test_values_are_means_over_every_permitted_order(kernel, n):
    if str(kernel).startswith("rbf(gamma=0.1 to"):
        kernel = RBF(gamma=[0.1 + 0.2 * i for i in range(n)])
    surrogate = fit_surrogate(*problem(n, n), kernel=kernel)
    values = surrogate.predict(reference.all_subsets(n), observed=True)
    expected = owen_functionals(GROUPS[n]) @ values
    found = surrogate.owen_values(GROUPS[n])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert (found - surrogate.attribute("shapley")).abs().max() > 1e-4 or kernel == "lasso"


@pytest.mark.parametrize("kernel", KERNELS[2:], ids=str)
def test_deviations_are_those_of_dense_algebra(kernel):
    n, noise, masks = 4, 0.4, problem(0, 4)[0]
    scores = problem(0, 4)[1][:, 0]
    surrogate = fit_surrogate(masks, scores, kernel=kernel, noise_std=noise)
    (term,) = surrogate.kernel_terms
    query = reference.all_subsets(n)
    own = float(term.nugget_share * term.ridge)
    prior = term.kernel.gram(surrogate._query(query)) + own * torch.eye(2**n).double()
    fitted = torch.tensor([int((query == mask).all(1).nonzero()) for mask in masks])
    functionals = owen_functionals(GROUPS[n])
    left = float(term.ridge) - own
    variance = reference.posterior_variance(functionals, prior, fitted, left, True)
    scale = (term.signal_variance * surrogate.unit.square()).item()
    looked_at = functionals.abs() / functionals.abs().sum(1, keepdim=True)  # (n, 2^n)
    factors = looked_at @ surrogate._size_factors[query.sum(1), 0]
    deviation = surrogate.owen_values(GROUPS[n], return_std=True)[1]
    torch.testing.assert_close(deviation.square(), variance * scale * factors, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kernel", ["exponential", "anova2", Size()], ids=str)
def test_single_tasks_and_one_group_are_shapley_values(kernel):
    n = 40
    masks = subsets.mixed_sizes(n, 90, seed=0)
    surrogate = fit_surrogate(masks, torch.tanh(masks.double() @ normal(0, n, 2)), kernel=kernel)
    expected = surrogate.attribute("shapley", return_std=True)
    for groups in (range(n), [0] * n):
        for found, own in zip(surrogate.owen_values(groups, True), expected, strict=True):
            torch.testing.assert_close(found, own, rtol=1e-9, atol=1e-10)


def test_sums_of_groups_are_shapley_values_of_the_game_of_groups():
    masks, scores = problem(3, 7)
    surrogate = fit_surrogate(masks, scores, kernel="exponential")
    labels = torch.tensor(GROUPS[7])
    unions = reference.all_subsets(3)
    values = surrogate.predict(unions[:, labels], observed=True)
    expected = reference.effect_functionals(3, "shapley") @ values
    found = surrogate.owen_values(GROUPS[7])
    sums = torch.stack([found[labels == group].sum(0) for group in range(3)])
    torch.testing.assert_close(sums, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimated", [False, True])
def test_constant_tasks_estimates_kinds_and_files(estimated, tmp_path):
    n, groups = 6, GROUPS[6]
    masks, scores = problem(5, n)
    constant = masks.clone()
    constant[:, 2] = True
    constant, rows = torch.unique(constant, dim=0, return_inverse=True)
    first = torch.stack([(rows == k).nonzero()[0, 0] for k in range(len(constant))])
    names = list("abcdef")
    tables = pd.DataFrame(constant.numpy(), columns=names), pd.DataFrame(scores[first].numpy())
    options = {"estimates": (masks, scores + 0.1)} if estimated else {}
    surrogate = fit_surrogate(*tables, kernel="rbf", **options)
    value, std = surrogate.owen_values(groups, return_std=True)
    values = surrogate.predict(reference.all_subsets(n), observed=True).to_numpy()
    expected = owen_functionals(groups).numpy() @ values
    np.testing.assert_allclose(value, expected, rtol=0, atol=1e-9)
    assert list(value.index) == names
    assert bool((std.to_numpy()[[0, 1, 3, 4, 5]] > 0).all())
    assert bool((std.loc["c"] > 0).all()) == estimated
    surrogate.save(tmp_path / "s")
    again = load_surrogate(tmp_path / "s").owen_values(pd.Series(groups), return_std=True)
    named = dict(zip(reversed(names), reversed(groups), strict=True))
    for same in (named, pd.Series(named)):
        np.testing.assert_array_equal(surrogate.owen_values(same), value)
    for found, own in zip(again, (value, std), strict=True):
        np.testing.assert_allclose(found, own, rtol=1e-12)


@pytest.mark.parametrize(
    "groups, error, found",
    [
        ([0, 1], ValueError, "`groups` must be 4 labels, one for each task, got 2"),
        ("abcd", TypeError, "`groups` must be a list of labels"),
        (
            {"0": 1, "1": 1, "2": 2},
            ValueError,
            "`groups` must be a label for each task, got none for '3'. Say for",
        ),
        (
            {"a": 0},
            ValueError,
            "`groups` must be a label for each task, got none for '0', '1', '2', '3'. Say for",
        ),
        (3, TypeError, "`groups` must be a list of labels"),
    ],
)
def test_groups_that_are_none(groups, error, found):
    surrogate = fit_surrogate(*problem(0, 4), kernel="linear")
    with pytest.raises(error, match=f"^{found}"):
        surrogate.owen_values(groups)


def test_weights_have_no_orders():
    weights = torch.rand(20, 3, generator=torch.Generator().manual_seed(0)).double()
    surrogate = fit_surrogate(weights, weights.sum(1), kernel="linear")
    with pytest.raises(ValueError, match="`masks` must be 0/1 for owen_values"):
        surrogate.owen_values([0, 0, 1])


@pytest.mark.parametrize("nothing", [None, float("nan")])
def test_a_task_without_a_group_is_named(nothing):
    masks = subsets.mixed_sizes(3, 6, seed=0)
    surrogate = fit_surrogate(masks, masks.sum(1).double(), kernel="linear", ridge=0.1)
    with pytest.raises(ValueError, match=r"`groups` must be a label for each task, got .* for '2'"):
        surrogate.owen_values([0, 0, nothing])
