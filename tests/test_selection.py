"""Selection against brute force, on additive, coverage and arbitrary set functions."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_ext import Linear, Polynomial, fit_surrogate
from ksm_ext.selection import (
    best_mixture,
    exact,
    greedy_backward,
    greedy_forward,
    settled,
    top_k,
    under_budget,
)
from ksm_ext.subsets import all_subsets, dirichlet, from_index_lists, mixed_sizes
from ksm_ext.surrogates.masks import Masks

directions = pytest.mark.parametrize("maximize", [True, False])


def additive(effects):
    weights = torch.as_tensor(effects, dtype=torch.float64)
    return lambda masks: masks.double() @ weights + 0.5


def arbitrary(n, seed, targets=None):
    """A score for each of the 2^n subsets, drawn at random."""
    shape = (2**n,) if targets is None else (2**n, targets)
    table = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    bits = 2 ** torch.arange(n)
    return lambda masks: table[masks.long() @ bits]


def coverage(n, num_points, seed):
    """Number of points covered by the tasks: monotone, submodular, zero for no tasks."""
    covers = torch.rand(n, num_points, generator=torch.Generator().manual_seed(seed)) < 0.3
    return lambda masks: (masks.double() @ covers.double() > 0).double().sum(dim=1)


def brute_force(predict, subsets, n, maximize):
    subsets = [list(tasks) for tasks in subsets]
    scores = predict(from_index_lists(subsets, n))
    best = int(scores.argmax() if maximize else scores.argmin())
    return tuple(subsets[best]), float(scores[best])


# top_k


@directions
def test_top_k_sorts_best_first(maximize):
    tau = np.random.default_rng(0).normal(size=(30, 3))
    order = np.argsort(-tau.mean(axis=1) if maximize else tau.mean(axis=1))
    np.testing.assert_array_equal(top_k(tau, 7, maximize=maximize), order[:7])


@directions
def test_top_k_breaks_ties_by_number(maximize):
    assert top_k(torch.zeros(100), 5, maximize=maximize).tolist() == [0, 1, 2, 3, 4]


def test_top_k_weighs_targets():
    tau = [[1.0, 0.0], [0.0, 3.0], [0.9, 0.9]]
    assert top_k(tau, 3, maximize=True).tolist() == [1, 2, 0]
    assert top_k(tau, 3, maximize=True, target_weights=[1, 0]).tolist() == [0, 2, 1]
    assert top_k(tau, 3, maximize=True, target_weights=[10, 1]).tolist() == [0, 2, 1]


def test_top_k_answers_in_kind():
    assert isinstance(top_k(torch.ones(3), 1, maximize=True), torch.Tensor)
    assert isinstance(top_k([1.0], 1, maximize=True), np.ndarray)
    assert isinstance(top_k(pd.DataFrame([[1.0], [2.0]]), 1, maximize=True), pd.Series)
    assert top_k([1.0, 2.0], 0, maximize=True).shape == (0,)


def test_direction_has_no_default():
    for call in (lambda: top_k([1.0], 1), lambda: greedy_forward(additive([1.0]), 1, 1)):
        with pytest.raises(TypeError, match="maximize"):
            call()


# Greedy


@directions
def test_greedy_forward_takes_the_best_step_each_time(maximize):
    n, predict = 7, arbitrary(7, seed=1)
    selection = greedy_forward(predict, n, 5, maximize=maximize)
    chosen: tuple[int, ...] = ()
    for step in range(5):
        trials = [(*chosen, task) for task in range(n) if task not in chosen]
        chosen, score = brute_force(predict, trials, n, maximize)
        assert selection.path[step] == score
    assert selection.tasks == chosen and selection.score == selection.path[-1]


@directions
def test_greedy_backward_takes_the_best_step_each_time(maximize):
    n, predict = 7, arbitrary(7, seed=2)
    selection = greedy_backward(predict, n, 2, maximize=maximize)
    left = tuple(range(n))
    for step in range(5):
        trials = [tuple(task for task in left if task != gone) for gone in left]
        smaller, score = brute_force(predict, trials, n, maximize)
        assert selection.path[step] == score
        assert (selection.removed[step],) == tuple(set(left) - set(smaller))
        left = smaller
    assert selection.tasks == left and selection.score == selection.path[-1]


def test_greedy_forward_reaches_its_guarantee_on_coverage():
    for seed in range(20):
        predict = coverage(10, 40, seed)
        _, optimum = brute_force(predict, itertools.combinations(range(10), 3), 10, True)
        score = greedy_forward(predict, 10, 3, maximize=True).score
        assert (1 - 1 / math.e) * optimum <= score <= optimum


def test_backward_finds_the_pair_that_forward_misses():
    predict = lambda masks: 3 * masks[:, :2].all(dim=1) + 0.1 * masks[:, 2:].sum(dim=1)  # noqa: E731
    assert greedy_forward(predict, 5, 2, maximize=True).tasks == (2, 3)
    assert greedy_backward(predict, 5, 2, maximize=True).tasks == (0, 1)
    assert exact(predict, 5, 2, maximize=True).tasks == (0, 1)


def test_start_candidates_and_keep():
    predict = additive([5.0, 4, 3, 2, 1])
    forward = greedy_forward(predict, 5, 3, maximize=True, start=[4], candidates=[1, 2, 3, 4])
    assert forward.tasks == (4, 1, 2) and forward.path == (5.5, 8.5)
    backward = greedy_backward(predict, 5, 2, maximize=True, start=[0, 3, 4, 1], keep=[4])
    assert backward.tasks == (0, 4) and backward.removed == (3, 1)
    none = greedy_forward(predict, 5, 1, maximize=True, start=[2])
    assert none.tasks == (2,) and none.score == 3.5 and none.path == ()


def test_ties_go_to_the_lowest_number():
    constant = lambda masks: torch.ones(len(masks))  # noqa: E731
    assert greedy_forward(constant, 50, 3, maximize=True).tasks == (0, 1, 2)
    assert greedy_backward(constant, 5, 2, maximize=False).removed == (0, 1, 2)
    assert exact(constant, 5, 2, maximize=False).tasks == (0, 1)


def test_chunks_do_not_show(monkeypatch):
    predict = arbitrary(9, seed=4)
    calls = [
        lambda: greedy_forward(predict, 9, 4, maximize=True),
        lambda: exact(predict, 9, 4, maximize=True),
        lambda: under_budget(predict, range(1, 10), 17, maximize=True),
    ]
    expected = [call() for call in calls]
    monkeypatch.setattr("ksm_ext.selection._CHUNK_CELLS", 30)
    assert [call() for call in calls] == expected


# Exact


@directions
@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 8), seed=st.integers(0, 10**6), data=st.data())
def test_exact_is_brute_force(maximize, n, seed, data):
    size = data.draw(st.integers(0, n))
    predict = arbitrary(n, seed)
    expected = brute_force(predict, itertools.combinations(range(n), size), n, maximize)
    selection = exact(predict, n, size, maximize=maximize)
    assert (selection.tasks, selection.score) == expected


@directions
def test_exact_within_a_budget_is_brute_force(maximize):
    rng = np.random.default_rng(0)
    for seed in range(10):
        costs, predict = rng.integers(1, 6, 8), arbitrary(8, seed)
        subsets = [
            tasks
            for size in range(9)
            for tasks in itertools.combinations(range(8), size)
            if costs[list(tasks)].sum() <= 9
        ]
        selection = exact(predict, 8, maximize=maximize, costs=costs, budget=9)
        assert (selection.tasks, selection.score) == brute_force(predict, subsets, 8, maximize)


def test_exact_refuses_what_would_not_end():
    with pytest.raises(ValueError, match="`num_tasks` must be such that at most 4194304 subsets"):
        exact(additive(np.ones(40)), 40, 20, maximize=True)


# Budget


def test_rounding_does_not_waste_the_budget():
    selection = under_budget(additive([1.0, 1, 1]), [0.1, 0.1, 0.1], 0.3, maximize=True)
    assert selection.tasks == (0, 1, 2)
    selection = exact(additive([1.0, 1, 1]), 3, maximize=True, costs=[0.1] * 3, budget=0.3)
    assert selection.tasks == (0, 1, 2)


def test_under_budget_goes_by_rate_with_the_best_single_task_as_safeguard():
    predict = additive([2.0, 10.0])
    assert under_budget(predict, [1.0, 10.0], 10.0, maximize=True).tasks == (1,)
    assert under_budget(predict, [1.0, 10.0], 11.0, maximize=True).tasks == (0, 1)
    assert under_budget(predict, [1.0, 10.0], 9.0, maximize=True).tasks == (0,)
    assert under_budget(predict, [1.0, 10.0], 0.5, maximize=True).tasks == ()


def test_under_budget_stops_where_nothing_helps():
    selection = under_budget(additive([-1.0, 2.0, -3.0, 1.0]), [1.0] * 4, 4, maximize=True)
    assert selection.tasks == (1, 3) and selection.path == (2.5, 3.5) and selection.score == 3.5
    selection = under_budget(additive([-1.0, 2.0, -3.0, 1.0]), [1.0] * 4, 4, maximize=False)
    assert selection.tasks == (2, 0) and selection.score == -3.5


def test_under_budget_reaches_its_guarantees():
    rng = np.random.default_rng(1)
    for seed in range(20):
        costs = rng.uniform(0.5, 3, 9)
        effects = rng.uniform(0, 1, 9)
        worth = lambda masks, effects=effects: masks.double() @ torch.tensor(effects)  # noqa: E731
        for predict, share in ((worth, 0.5), (coverage(9, 30, seed), (1 - 1 / math.e) / 2)):
            optimum = exact(predict, 9, maximize=True, costs=costs, budget=5).score
            selection = under_budget(predict, costs, 5, maximize=True)
            assert share * optimum - 1e-12 <= selection.score <= optimum + 1e-12
            assert costs[list(selection.tasks)].sum() <= 5


# What may be given


class Fitted:
    """A surrogate as the library fits them."""

    def predict(self, masks):
        return arbitrary(6, seed=3, targets=2)(masks).numpy()


@pytest.mark.parametrize("weights", [None, [1.0, 3.0]])
def test_fitted_surrogates_and_weights(weights):
    scores = torch.tensor(np.average(Fitted().predict(all_subsets(6)), axis=1, weights=weights))
    predict = lambda masks: scores[masks.long() @ (2 ** torch.arange(6))]  # noqa: E731
    for choose in (greedy_forward, greedy_backward, exact):
        selection = choose(Fitted(), 6, 3, maximize=True, target_weights=weights)
        expected = choose(predict, 6, 3, maximize=True)
        assert selection.tasks == expected.tasks
        assert selection.score == pytest.approx(expected.score)


F = additive([1.0, 2.0, 3.0])
REFUSED = [
    (top_k, ([1.0], 2), {}, "`k` must be at most 1, got 2"),
    (top_k, ([math.nan], 1), {}, "`attributions` must be finite"),
    (top_k, ([[1.0, 2.0]], 1), {"target_weights": [1.0]}, r"`target_weights` .*\(2,\), got .*\(1"),
    (top_k, ([[1.0, 2.0]], 1), {"target_weights": [1.0, -1.0]}, "`target_weights` must be non-neg"),
    (greedy_forward, (F, 3, 4), {}, "`size` must be from 0 to 3, got 4"),
    (greedy_forward, (F, 3, 3), {"start": [0], "candidates": [1]}, "`size` .* from 1 to 2, got 3"),
    (greedy_forward, (F, 3, 1), {"start": [3]}, "`start` must be task num"),
    (greedy_backward, (F, 3, 1), {"start": [0], "keep": [1]}, "`keep` .* of `start`, got task 1"),
    (exact, (F, 3), {}, "`size` must be given, or else .* got none"),
    (exact, (F, 3, 1), {"costs": [1, 1, 1], "budget": 1}, "got size, costs, budget"),
    (exact, (F, 3), {"costs": [1, 1, 1]}, "got costs"),
    (under_budget, (F, [1, 0, 1], 1), {}, "`costs` must be positive, got 0.0 for task 1"),
    (under_budget, (F, [1, 1, 1], -1), {}, "`budget` must be non-negative, got -1"),
    (
        greedy_forward,
        (torch.sum, 3, 1),
        {},
        r"`predict\(masks\)` .* \(3,\) or \(3, t\), got shape \(\)",
    ),
    (
        greedy_forward,
        (lambda masks: masks.sum(1) / 0, 3, 1),
        {},
        r"`predict\(masks\)` must be fini",
    ),
]


@pytest.mark.parametrize("select, arguments, options, found", REFUSED)
def test_errors_name_argument_and_value(select, arguments, options, found):
    with pytest.raises(ValueError, match=found):
        select(*arguments, maximize=True, **options)


def test_selections_carry_names():
    """Of tasks, in their order, where the predictor says what they are called."""
    masks = mixed_sizes(4, 14, seed=0)
    table = masks.double() @ torch.tensor([1.0, -2.0, 3.0, 0.5]).double()
    surrogate = fit_surrogate(masks, table, kernel="linear", task_names=list("wxyz"))
    up = {"maximize": True}
    for function in (surrogate, surrogate.predict):
        assert greedy_forward(function, 4, 2, **up).names == ("y", "w")
        assert greedy_backward(function, 4, 3, **up).names == ("w", "y", "z")
        assert exact(function, 4, 2, **up).names == ("w", "y")
        assert under_budget(function, [1, 1, 1, 1], 2, **up).names == ("y", "w")
        assert under_budget(function, [1, 1, 2, 3], 0.5, **up).names == ()
    assert greedy_forward(lambda each: each.double().sum(1), 4, 2, **up).names == ()
    assert settled(surrogate, 2, **up).names == ("y", "w")
    found = top_k(pd.Series([0.1, -0.3, 0.2], index=list("abc")), 2, **up)
    assert found.to_dict() == {"c": 2, "a": 0}


# settled


def linear_surrogate(effects, noise, seed=0):
    """Fitted to a sum of effects with noise: its posterior is Bayesian regression."""
    generator = torch.Generator().manual_seed(seed)
    masks = mixed_sizes(len(effects), 60, range(len(effects) + 1), seed=seed, allow_repeats=True)
    scores = masks.double() @ torch.tensor(effects).double()
    scores = scores + noise * torch.randn(60, generator=generator, dtype=torch.float64)
    return fit_surrogate(masks, scores, kernel=Linear(), ridge=1.0)


@directions
@pytest.mark.parametrize("k", [1, 2, 4])
def test_settled_is_the_probability_of_the_joint_posterior(k, maximize):
    surrogate = linear_surrogate([0.0, 0.3, 0.5, 0.6, 1.0], noise=0.8)
    found = settled(surrogate, k, maximize=maximize)
    values = surrogate.attribute("loo")
    assert found.tasks == tuple(top_k(values, k, maximize=maximize).tolist())
    joint = surrogate.attribution_covariance("loo").numpy()
    draws = np.random.default_rng(0).multivariate_normal(values.numpy(), joint, 200_000)
    best = np.argsort(-draws if maximize else draws, axis=1)[:, :k]
    among = (best[:, :, None] == np.arange(5)).any(1)
    right = among[:, list(found.tasks)].all(1).mean()
    assert found.probability == pytest.approx(right, abs=0.025)
    assert np.allclose(found.chances, among.mean(0), atol=0.025)
    assert sum(found.chances) == pytest.approx(k)
    assert bool(found) is (found.probability >= 0.95)
    assert bool(settled(surrogate, k, maximize=maximize, level=found.probability))


def test_of_two_tasks_the_probability_is_that_of_their_difference():
    surrogate = linear_surrogate([0.1, 0.2], noise=0.5)
    value, joint = surrogate.attribute("shapley"), surrogate.attribution_covariance("shapley")
    std = math.sqrt(float(joint[0, 0] + joint[1, 1] - 2 * joint[0, 1]))
    true = 0.5 * math.erfc(-abs(float(value[0] - value[1])) / std / math.sqrt(2))
    found = settled(surrogate, 1, "shapley", maximize=True)
    assert found.probability == pytest.approx(true, abs=0.02)


def test_settled_as_often_as_it_says():
    """Over functions drawn from the prior, the set is right as often as its probability."""
    said, right = [], []
    masks = mixed_sizes(6, 25, seed=0)
    for seed in range(150):
        generator = torch.Generator().manual_seed(seed)
        effects = torch.randn(6, generator=generator, dtype=torch.float64)
        noise = 0.7 * torch.randn(25, generator=generator, dtype=torch.float64)
        scores = masks.double() @ effects + noise
        scale = float(Linear().gram(Masks(torch.eye(6, dtype=torch.bool)))[0, 0])
        surrogate = fit_surrogate(masks, scores, kernel=Linear(), ridge=scale * 0.7**2)
        found = settled(surrogate, 2, maximize=True, seed=seed)
        said.append(found.probability)
        right.append(set(found.tasks) == set(effects.topk(2).indices.tolist()))
    assert 0.3 < np.mean(right) < 0.95
    assert np.mean(said) == pytest.approx(np.mean(right), abs=4 * 0.5 / math.sqrt(150))


def test_settled_by_seed_and_target():
    masks = mixed_sizes(5, 40, seed=0, allow_repeats=True)
    one = masks.double() @ torch.arange(5.0).double()
    scores = torch.stack([one, -one], 1) + torch.randn(40, 2, generator=torch.Generator()).double()
    surrogate = fit_surrogate(masks, scores, target_names=["loss", "accuracy"])
    best = settled(surrogate, 2, maximize=True, target="loss", seed=3)
    assert best == settled(surrogate, 2, maximize=True, target=0, seed=3)
    assert set(best.tasks) == set(settled(surrogate, 2, maximize=False, target="accuracy").tasks)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"k": 0}, "`k` must be at least 1"),
        ({"k": 5}, "`k` must be below the number of tasks, 5, got 5"),
        ({"level": 1.0}, "`level` must be between 0 and 1, got 1.0"),
        ({"readout": "owen"}, "`readout` must be one of 'loo'"),
        ({"target": "loss"}, "`target` must be "),
    ],
)
def test_what_cannot_be_settled(options, text):
    surrogate = linear_surrogate([0.0, 0.3, 0.5, 0.6, 1.0], noise=0.8)
    with pytest.raises(ValueError, match=text):
        settled(surrogate, **{"k": 2, "maximize": True} | options)
    two = fit_surrogate(surrogate.masks.values, surrogate.scores.expand(-1, 2), kernel=Linear())
    with pytest.raises(ValueError, match="`target` must be one of 0, 1, got none"):
        settled(two, 2, maximize=True)


# best_mixture


def linear_scores(mixtures, seed=0):
    slopes = torch.randn(mixtures.shape[1], generator=torch.Generator().manual_seed(seed)).double()
    return mixtures @ slopes, slopes


@directions
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_the_best_mixture_of_additive_tasks_is_one_task(maximize, seed):
    mixtures = dirichlet(5, 30, seed=seed)
    scores, slopes = linear_scores(mixtures, seed)
    surrogate = fit_surrogate(mixtures, scores, kernel="linear", ridge=1e-9)
    found = best_mixture(surrogate, maximize=maximize)
    best = slopes.max() if maximize else slopes.min()
    assert abs(found.score - float(best)) < 1e-3
    assert int(found.shares.argmax()) == int((slopes == best).nonzero()[0])


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_the_best_mixture_of_a_quadratic_is_its_top(seed):
    mixtures = dirichlet(4, 60, seed=seed)
    top = dirichlet(4, 1, strength=20.0, seed=seed + 1)[0]
    scores = -(mixtures - top).square().sum(1)
    kernel = Polynomial(degree=2, gamma=1.0)
    found = best_mixture(fit_surrogate(mixtures, scores, kernel=kernel, ridge=1e-9), maximize=True)
    assert torch.allclose(found.shares, top, atol=5e-3) and abs(found.score) < 1e-4


@directions
@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_no_random_mixture_is_better(maximize, confidence):
    mixtures = dirichlet(5, 50, seed=0)
    scores = torch.stack([(mixtures.sqrt() @ torch.randn(5, 5).double()).sin().sum(1)] * 2, 1)
    scores[:, 1] = scores[:, 0].square()
    surrogate, weights = fit_surrogate(mixtures, scores), [3.0, 1.0]
    options = {"maximize": maximize, "confidence": confidence, "target_weights": weights}
    found = best_mixture(surrogate, bounds=(0.01, 0.7), **options)
    random = dirichlet(5, 20_000, strength=(0.5, 5.0), seed=1)
    random = random[((random >= 0.01) & (random <= 0.7)).all(1)]
    mean, std = surrogate.predict(random, return_std=True)
    z = 1.2815515655446004 if confidence == 0.9 else 0.0
    sign = 1.0 if maximize else -1.0
    rivals = (sign * mean - z * std) @ torch.tensor(weights).double() / 4
    assert sign * found.score - z * found.std >= float(rivals.max()) - 1e-6
    assert abs(float(found.shares.sum()) - 1) < 1e-9
    assert float(found.shares.min()) >= 0.01 - 1e-9 and float(found.shares.max()) <= 0.7 + 1e-9
    each, deviation = surrogate.predict(found.shares[None], return_std=True)
    assert found.score == pytest.approx(float(each[0, 0] * 3 + each[0, 1]) / 4)
    assert found.std == pytest.approx(float(deviation[0, 0] * 3 + deviation[0, 1]) / 4)
    distances = (mixtures - found.shares).abs().sum(1) / 2
    assert found.nearest == int(distances.argmin())
    assert found.distance == pytest.approx(float(distances.min()))


def test_confidence_keeps_near_what_was_seen():
    mixtures = 0.2 + 0.4 * dirichlet(3, 40, seed=0)
    mixtures /= mixtures.sum(1, keepdim=True)
    scores, _ = linear_scores(mixtures)
    noise = 0.3 * scores.std() * torch.randn(40).double()
    surrogate = fit_surrogate(mixtures, scores + noise, kernel="rbf")
    bold, careful = (
        best_mixture(surrogate, maximize=True, confidence=each) for each in (0.5, 0.999)
    )
    assert careful.std < bold.std and careful.distance <= bold.distance


def test_tasks_that_never_varied_keep_their_share_and_names_come_back():
    shares = dirichlet(3, 30, seed=0).numpy() * 0.8
    table = pd.DataFrame(shares, columns=["a", "b", "c"]).assign(d=0.2)
    surrogate = fit_surrogate(table, table["a"] - table["b"], kernel="linear", ridge=1e-9)
    found = best_mixture(surrogate, maximize=True)
    assert found.shares.index.tolist() == ["a", "b", "c", "d"]
    assert found.shares.round(3).tolist() == [0.8, 0.0, 0.0, 0.2]
    limits = pd.Series({"d": 0.2, "c": 1.0, "b": 0.1, "a": 0.5})
    found = best_mixture(surrogate, maximize=True, bounds=(0.0, limits))
    assert found.shares.round(3).tolist() == [0.5, 0.0, 0.3, 0.2]


def test_mixtures_that_cannot_be_chosen_are_refused():
    mixtures = dirichlet(3, 20, seed=0)
    surrogate = fit_surrogate(mixtures, linear_scores(mixtures)[0], kernel="linear")
    expected = r"^`bounds` must be 0 <= low <= high, with a mixture of sum 1 between, got"
    for bounds in ((0.5, 1.0), (0.0, 0.2), (0.3, 0.2), (-0.1, 1.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match=expected):
            best_mixture(surrogate, maximize=True, bounds=bounds)
    with pytest.raises(ValueError, match=r"^`bounds` must be a pair \(low, high\), got 0\.5"):
        best_mixture(surrogate, maximize=True, bounds=0.5)
    with pytest.raises(ValueError, match=r"^`bounds` must be numbers or \(3,\), got"):
        best_mixture(surrogate, maximize=True, bounds=([0.1, 0.1], 1.0))
    with pytest.raises(ValueError, match=r"^`confidence` must be from 0\.5 to below 1, got 1"):
        best_mixture(surrogate, maximize=True, confidence=1)
    with pytest.raises(TypeError, match=r"^`surrogate` must be a surrogate, got function\."):
        best_mixture(lambda x: x, maximize=True)
    uneven = mixtures * torch.linspace(1, 2, 20)[:, None]
    for table, found in ((mixtures > 0.2, "0/1 masks"), (uneven, "weights of different sums")):
        other = fit_surrogate(table, linear_scores(mixtures)[0], kernel="linear")
        with pytest.raises(ValueError, match=f"`surrogate` must be fitted to mix.*got {found}"):
            best_mixture(other, maximize=True)


@pytest.mark.parametrize("unit", [1e-300, 1e-170, 1e160, 1e300])
def test_what_is_settled_does_not_depend_on_the_unit(unit):
    masks = mixed_sizes(5, 30, seed=0, allow_repeats=True)
    noise = torch.randn(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = masks.double() @ torch.arange(5.0).double() + 3 * noise
    one, other = (fit_surrogate(masks, scores * u, kernel="linear") for u in (1.0, unit))
    expected = settled(one, 2, "shapley", maximize=True)
    found = settled(other, 2, "shapley", maximize=True)
    assert 0.2 < expected.probability < 0.99
    assert found.tasks == expected.tasks
    assert found.probability == pytest.approx(expected.probability, abs=0.002)
    relative = other.attribution_covariance("shapley", relative=True)
    torch.testing.assert_close(
        relative * one.unit.square(), one.attribution_covariance("shapley"), rtol=1e-6, atol=1e-12
    )


def test_mixtures_have_no_tasks_to_settle():
    shares = dirichlet(3, 20, seed=0)
    surrogate = fit_surrogate(shares, shares[:, 0].square(), kernel="rbf")
    with pytest.raises(
        ValueError, match=r"^`surrogate` must be of 0/1 masks, got one of real weig"
    ):
        settled(surrogate, 1, maximize=True)
