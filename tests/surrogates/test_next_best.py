"""What to score next, against Gaussian processes over all subsets, conditioned by brute force."""

from dataclasses import replace
from itertools import combinations
from math import comb

import pandas as pd
import pytest
import reference
import torch

from ksm_ext import ANOVA2, RBF, Exponential, fit_surrogate, next_best
from ksm_ext.arrays import ArrayKind, as_tensor, names_along
from ksm_ext.subsets import all_subsets, design, mixed_sizes
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.next_best import _posteriors, _target_weights

N, M = 5, 12
EVERY = all_subsets(N)
MASKS = mixed_sizes(N, M, seed=1)
GENERATOR = torch.Generator().manual_seed(0)
NOISE = torch.randn(32, 3, generator=GENERATOR, dtype=torch.float64)
X = EVERY.double()
TABLE = torch.stack([X @ torch.arange(5.0).double(), 3 * X[:, 0] * X[:, 1] - X[:, 4], X[:, 2]], 1)
TABLE = TABLE + 0.3 * NOISE
READOUTS = ("loo", "shapley", "banzhaf")


def rows_of(masks):
    return (masks.long() << torch.arange(N)).sum(1)


def scores(masks):
    return TABLE[rows_of(masks)]


def surrogates():
    noisy = torch.full((M, 1), 0.2).double()
    known = {"known": [0, 3]}
    repeats = torch.cat([MASKS, MASKS[:6]])
    twice = torch.cat([scores(MASKS), scores(MASKS[:6]) + 0.1])
    missing = scores(MASKS).clone()
    missing[:3, 1] = torch.nan
    return {
        "ridge chosen": fit_surrogate(MASKS, scores(MASKS), kernel=RBF),
        "a ridge per target": fit_surrogate(MASKS, scores(MASKS), kernel=RBF, share_ridge=False),
        "auto": fit_surrogate(MASKS, scores(MASKS)),
        "fixed ridge": fit_surrogate(MASKS, scores(MASKS), kernel=ANOVA2(pair_weight=0.3), ridge=1),
        "fixed ridge, known": fit_surrogate(MASKS, scores(MASKS), kernel=RBF, ridge=0.1, **known),
        "noise": fit_surrogate(MASKS, scores(MASKS), kernel=Exponential, noise_std=0.2),
        "noise of one": fit_surrogate(
            MASKS, scores(MASKS)[:, 1], kernel=Exponential, noise_std=0.1
        ),
        "noise by rows": fit_surrogate(
            MASKS,
            scores(MASKS)[:, :1],
            kernel=RBF,
            noise_std=noisy * torch.arange(1, M + 1)[:, None],
        ),
        "repeats": fit_surrogate(repeats, twice, kernel=RBF),
        "missing": fit_surrogate(MASKS, missing, kernel=RBF, missing="drop"),
        "no intercept": fit_surrogate(MASKS, scores(MASKS), kernel=RBF, center=False),
        "lasso": fit_surrogate(MASKS, scores(MASKS), kernel="lasso"),
    }


SURROGATES = surrogates()
each = pytest.mark.parametrize("name", SURROGATES)


def weights_of(readout):
    """(n, 2^n) the readout of every task as weights on the values of all subsets."""
    if readout == "prediction":
        query = mixed_sizes(N, 256, range(N + 1), seed=0, allow_fewer=True)
        return torch.nn.functional.one_hot(rows_of(query), 32).double()
    weights = torch.zeros(N, 32, dtype=torch.float64)
    for task in range(N):
        for size in range(N):
            for rest in combinations([other for other in range(N) if other != task], size):
                code = sum(1 << other for other in rest)
                share = {
                    "loo": float(size == N - 1),
                    "banzhaf": 0.5 ** (N - 1),
                    "shapley": 1 / (N * len(list(combinations(range(N - 1), size)))),
                }[readout]
                weights[task, code] -= share
                weights[task, code | 1 << task] += share
    return weights


def variance(term, column, ridge, nugget, weights, rows, row_weights, exact, center):
    """Summed posterior variance of ``weights`` (r, 2^n), in units of the signal variance.

    Observed are the subsets numbered ``rows``, with an intercept of unknown size (universal
    kriging). What is peculiar to a subset is part of the answers where ``exact`` (2^n,) has it.
    """
    smooth = term.kernel.gram(Masks(EVERY))
    peculiar = nugget * torch.diag(exact)
    observed = smooth[rows][:, rows] + ridge * torch.diag(1 / row_weights)
    cross = weights @ (smooth + peculiar)[:, rows]
    prior = (weights @ (smooth + peculiar) @ weights.T).diagonal()
    inverse = torch.linalg.inv(observed)
    found = prior - (cross @ inverse * cross).sum(1)
    if center:
        ones = inverse.sum(0)
        found = found + (weights.sum(1) - cross @ ones).square() / ones.sum()
    return float(found.sum())


def brute_gain(surrogate, readout, new, counted):
    """What scoring the subset numbered ``new`` takes off the variance, summed over columns."""
    weights, total, fitted = weights_of(readout), 0.0, rows_of(surrogate.masks.values)
    inexact = bool(((surrogate.nugget_share > 0) & ~surrogate.known).any())
    for term in surrogate.kernel_terms:
        rows = fitted if term.rows is None else fitted[term.rows]
        own = torch.ones(len(rows)).double() if term.weights is None else term.weights
        exact = torch.full((32,), float(inexact or term.nugget_share is not None)).double()
        if term.nugget_share is None:
            exact[fitted] = (surrogate.nugget_share > 0).any(1).double()
        if readout == "prediction":
            exact = 0 * exact
        for place, column in enumerate(term.columns.tolist()):
            ridge = term.ridge[place]
            nugget = ridge * (1 if term.nugget_share is None else term.nugget_share[place])
            now = variance(term, column, ridge, nugget, weights, rows, own, exact, surrogate.center)
            more = torch.cat([rows, torch.tensor([new])]), torch.cat([own, torch.ones(1).double()])
            then = variance(term, column, ridge, nugget, weights, *more, exact, surrogate.center)
            total += float(counted[column] * term.signal_variance[place]) * (now - then)
    return total


def left_of(surrogate):
    """The subsets that were not fitted."""
    seen = set(rows_of(surrogate.masks.values).tolist())
    return EVERY[[row for row in range(32) if row not in seen]]


@each
@pytest.mark.parametrize("readout", [*READOUTS, "prediction"])
def test_gains_are_what_conditioning_on_one_more_score_takes_away(name, readout):
    surrogate = SURROGATES[name]
    assert not surrogate.excluded.any()
    pool, counted = left_of(surrogate), _target_weights(surrogate, None)
    found = sum(p.gains() for p in _posteriors(surrogate, pool, readout, counted, 0))
    true = [brute_gain(surrogate, readout, int(row), counted) for row in rows_of(pool)]
    true = torch.tensor(true, dtype=torch.float64)
    torch.testing.assert_close(found, true, rtol=1e-8, atol=1e-8 * float(true.max()))


def of_estimates(**options):
    """Two targets with estimates of all subsets beside their scores, each with its own slope."""
    estimates = EVERY, TABLE[:, [2, 0]] + 0.5 * NOISE[:, :2]
    table = scores(MASKS)[:, :2]
    return fit_surrogate(MASKS, table, estimates=estimates, share_ridge=False, **options)


@pytest.mark.parametrize("options", [{}, {"noise_std": 0.2}, {"center": False}], ids=str)
@pytest.mark.parametrize("readout", [*READOUTS, "prediction"])
def test_gains_beside_estimates_are_those_of_dense_kriging(readout, options):
    surrogate = of_estimates(kernel=RBF(0.2), **options)
    pool, counted = left_of(surrogate), _target_weights(surrogate, None)
    found = sum(p.gains() for p in _posteriors(surrogate, pool, readout, counted, 0))
    fitted, weights = rows_of(surrogate.masks.values), weights_of(readout)
    (level,) = surrogate.trend.levels
    estimates, expected = level.predict(EVERY, False), torch.zeros(len(pool)).double()
    for term in surrogate.kernel_terms:
        gram = term.kernel.gram(Masks(EVERY))
        for place, column in enumerate(term.columns.tolist()):
            basis = torch.stack([torch.ones(32).double(), estimates[:, column]], 1)
            basis = basis if surrogate.center else basis[:, 1:]
            ridge = float(term.ridge[place])
            share = 1.0 if term.nugget_share is None else float(term.nugget_share[place])
            nugget = 0.0 if readout == "prediction" else ridge * share  # of the smooth part

            def variance(rows):
                about = gram, rows, torch.zeros(len(rows)).double(), basis, ridge, nugget  # noqa: B023
                return torch.einsum("ri,ij,rj->", weights, reference.kriging(*about)[1], weights)

            now = variance(fitted)
            for number, new in enumerate(rows_of(pool)):
                gain = now - variance(torch.cat([fitted, new[None]]))
                expected[number] += counted[column] * term.signal_variance[place] * gain
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8 * float(expected.max()))


def test_subsets_are_chosen_beside_estimates():
    surrogate = of_estimates()
    chosen = next_best(surrogate, 3, "shapley")
    assert chosen.shape == (3, 5) and len(chosen.unique(dim=0)) == 3
    seen = rows_of(surrogate.masks.values).tolist()
    assert not set(rows_of(chosen).tolist()) & set(seen)


def variance_with(surrogate, masks, readout):
    """Summed variance as :meth:`Surrogate.with_design` has it, had these subsets been scored.

    Without what noise adds that the ridge does not stand for.
    """
    grown = Masks(torch.cat([surrogate.masks.values, masks]))
    smooth = replace(surrogate, noise=None).with_design(grown)
    _, std = smooth.attribute(readout, return_std=True)
    return float((std / surrogate.unit).square().sum())


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("name", ["fixed ridge", "noise of one"])
def test_the_best_one_is_the_best_of_all_refits(name, readout):
    surrogate = SURROGATES[name]
    pool = left_of(surrogate)
    pool = pool[pool.any(1)]
    found = next_best(surrogate, 1, readout)  # of all but the empty set
    refits = [variance_with(surrogate, row[None], readout) for row in pool]
    refits = torch.tensor(refits, dtype=torch.float64)
    assert found.equal(pool[refits.argmin()][None])
    now = variance_with(surrogate, pool[:0], readout)
    posteriors = _posteriors(surrogate, pool, readout, _target_weights(surrogate, None), 0)
    gains = sum(posterior.gains() for posterior in posteriors)
    torch.testing.assert_close(now - gains, refits, rtol=1e-7, atol=1e-8)


@each
@pytest.mark.parametrize("readout", ["loo", "shapley", "prediction"])
def test_no_exchange_does_better_and_random_choices_do_worse(name, readout):
    surrogate, k = SURROGATES[name], 4
    pool, counted = left_of(surrogate), _target_weights(surrogate, None)
    posteriors = list(_posteriors(surrogate, pool, readout, counted, 0))

    def gain(chosen):
        total = 0.0
        for posterior in posteriors:
            posterior.forget()
            for place in chosen:
                total += float(posterior.gains()[place])
                posterior.choose(place)
        return total

    masks = next_best(surrogate, k, readout, candidates=pool)
    found = [rows_of(pool).tolist().index(row) for row in rows_of(masks).tolist()]
    best = gain(found)
    for place in range(k):
        for other in set(range(len(pool))) - set(found):
            assert gain([*found[:place], other, *found[place + 1 :]]) <= best * (1 + 1e-8)
    for seed in range(20):
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        assert gain(order[:k].tolist()) <= best * (1 + 1e-8)
    first = [gain([place]) for place in found]  # the one that tells most comes first
    assert first[0] == max(first)


def test_gains_of_several_add_up_to_one_refit():
    """A row of a Cholesky factor after each choice is the same as conditioning on all at once."""
    surrogate = SURROGATES["noise of one"]
    pool = left_of(surrogate)
    (posterior,) = _posteriors(surrogate, pool, "shapley", torch.ones(1).double(), 0)
    total = 0.0
    for place in (3, 0, 7, 5):
        total += float(posterior.gains()[place])
        posterior.choose(place)
    before, after = (variance_with(surrogate, pool[[3, 0, 7, 5][:k]], "shapley") for k in (0, 4))
    assert before - after == pytest.approx(total, rel=1e-8)
    kept = posterior.gains_in_place_of([3, 0, 7, 5], 2)
    posterior.forget()
    for place in (3, 0, 5):
        posterior.choose(place)
    torch.testing.assert_close(kept, posterior.gains(), rtol=1e-8, atol=1e-12)


def test_a_score_of_the_empty_subset_that_was_left_out_is_certain():
    masks = torch.cat([torch.zeros(1, 8), mixed_sizes(8, 60, seed=0)]).bool()
    values = masks.double() @ torch.arange(8.0).double() + 100
    values += torch.randn(61, generator=GENERATOR, dtype=torch.float64)
    values[0] = -1e4
    surrogate = fit_surrogate(masks, values, kernel=RBF)
    assert bool(surrogate.excluded[0, 0])
    pool = all_subsets(8, include_empty=False)
    pool = pool[[row not in masks.tolist() for row in pool.tolist()]][:20]
    (posterior,) = _posteriors(surrogate, pool, "shapley", torch.ones(1).double(), 0)
    (term,) = surrogate.kernel_terms
    every, code = all_subsets(8), 1 << torch.arange(8)
    smooth = term.kernel.gram(Masks(every))
    weights = torch.zeros(8, 256, dtype=torch.float64)
    for row in range(256):
        size = int(every[row].sum())
        for task in range(8):
            if every[row, task]:
                weights[task, row] += 1 / (8 * comb(7, size - 1))
            else:
                weights[task, row] -= 1 / (8 * comb(7, size))
    weights[:, 0] = 0.0  # certain
    fitted = (masks[1:].long() * code).sum(1)

    def left(rows):
        joint = smooth + term.ridge * torch.eye(256).double()
        inverse = torch.linalg.inv(joint[rows][:, rows])
        cross = (weights @ joint)[:, rows]
        found = (weights @ joint @ weights.T).diagonal() - (cross @ inverse * cross).sum(1)
        slack = weights.sum(1) - cross @ inverse.sum(0)
        return float((found + slack.square() / inverse.sum()).sum() * term.signal_variance)

    new = (pool.long() * code).sum(1)
    true = [left(fitted) - left(torch.cat([fitted, row[None]])) for row in new]
    true = torch.tensor(true, dtype=torch.float64)
    torch.testing.assert_close(posterior.gains(), true, rtol=1e-7, atol=1e-7 * float(true.max()))


def test_conjugate_gradients_choose_what_the_factored_matrix_does():
    masks = mixed_sizes(12, 300, seed=0)
    values = masks.double() @ torch.arange(12.0).double() + masks[:, 0] * masks[:, 1]
    found = []
    for solver in ("eigh", "cg"):
        fitted = fit_surrogate(masks, values, kernel=RBF(gamma=0.1), ridge=0.1, solver=solver)
        (posterior,) = _posteriors(
            fitted, design(12, 40, known=masks, seed=1), "loo", torch.ones(1).double(), 0
        )
        found.append(posterior.gains() / posterior.weight)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3 * float(found[0].max()))


def test_targets_that_do_not_count_decide_nothing():
    """Each by itself is chosen for as if it had been fitted with its kernel and ridge alone."""
    surrogate = SURROGATES["a ridge per target"]
    pool = left_of(surrogate)
    for j in range(3):
        alone = fit_surrogate(MASKS, scores(MASKS)[:, j], kernel=RBF)
        found = next_best(surrogate, 3, candidates=pool, targets=[j])
        assert found.equal(next_best(surrogate, 3, candidates=pool, targets=str(j)))
        assert found.equal(next_best(alone, 3, candidates=pool))


def test_the_seed_alone_decides_and_units_do_not():
    masks = mixed_sizes(14, 40, seed=0)
    values = masks.double() @ torch.arange(14.0).double()
    surrogate = fit_surrogate(masks, values)
    found = next_best(surrogate, 6, seed=5)
    torch.manual_seed(1)
    assert found.equal(next_best(surrogate, 6, seed=5))
    assert found.equal(next_best(fit_surrogate(masks, 1e3 * values - 7), 6, seed=5))
    assert found.shape == (6, 14) and found.dtype == torch.bool
    both = torch.cat([masks, found])
    assert len(both.unique(dim=0)) == 46 and bool(found.any(1).all())


def test_tasks_that_never_varied_stay_as_they_were():
    column = torch.ones(M, 1, dtype=torch.bool)
    wider = torch.cat([MASKS[:, :2], column, MASKS[:, 2:], ~column], 1)
    surrogate = fit_surrogate(wider, scores(MASKS), kernel=RBF)
    found = next_best(surrogate, 4, "loo")
    assert bool(found[:, 2].all()) and not bool(found[:, 6].any())
    assert found[:, [0, 1, 3, 4, 5]].equal(next_best(SURROGATES["ridge chosen"], 4, "loo"))


def test_candidates_of_a_table_go_by_names():
    table = pd.DataFrame(MASKS.numpy(), columns=list("abcde"))
    surrogate = fit_surrogate(table, scores(MASKS), kernel=RBF)
    pool = pd.DataFrame(left_of(surrogate).numpy(), columns=list("abcde"))
    found = next_best(surrogate, 3, candidates=pool[list("edcba")])
    assert found.equal(next_best(surrogate, 3, candidates=pool))
    assert found.equal(
        next_best(surrogate, 3, candidates=pd.concat([table, pool, pool], ignore_index=True))
    )


@pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "polars", "xarray"])
def test_subsets_come_back_in_the_kind_of_the_scores_with_names(kind):
    values = scores(MASKS)
    surrogate = fit_surrogate(MASKS, values, kernel=RBF, task_names=list("abcde"))
    expected = next_best(surrogate, 3)
    assert isinstance(expected, torch.Tensor)
    given = ArrayKind(kind, torch.device("cpu")).restore(values, {"subset": None, "target": None})
    of_kind = fit_surrogate(MASKS, given, kernel=RBF, task_names=list("abcde"))
    found = next_best(of_kind, 3)
    assert type(found) is type(given) and as_tensor("found", found).equal(expected)
    names = names_along(found, 1)
    assert names is None if kind in ("torch", "numpy") else list(names) == list("abcde")
    assert as_tensor("again", of_kind.predict(found)).shape == values[:3].shape  # goes in again


def test_after_a_design_around_the_full_set_loo_wants_what_it_compares():
    masks = design(8, 60, readout="banzhaf", seed=0)[1:]
    values = masks.double() @ torch.arange(8.0).double() + (masks.sum(1) > 6)
    borders = design(8, 9, readout="loo", seed=0)
    missing = borders[[row not in masks.tolist() for row in borders.tolist()]]
    surrogate = fit_surrogate(masks, values, kernel=Exponential, noise_std=0.05)
    assert len(missing) > 4
    found = next_best(surrogate, len(missing), "loo")
    assert sorted(rows.tolist() for rows in found) == sorted(rows.tolist() for rows in missing)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_subsets": 0}, "`num_subsets` must be at least 1"),
        ({"num_subsets": 99}, "`num_subsets` must be at most 19, the number of subsets left"),
        ({"num_subsets": 2, "candidates": MASKS}, "`num_subsets` must be at most 0, the number"),
        ({"num_subsets": 1, "readout": "owen"}, "`readout` must be one of 'loo', 'shapley'"),
        ({"num_subsets": 1, "targets": ["acc"]}, "`target"),
        ({"num_subsets": 1, "candidates": MASKS[:, 1:]}, "`masks` must be of 5 columns"),
        ({"num_subsets": 1, "candidates": 0.5 * MASKS.double()}, "`candidates` must be 0 or 1"),
    ],
)
def test_errors(options, text):
    with pytest.raises(ValueError, match=text):
        next_best(SURROGATES["ridge chosen"], **options)


@pytest.mark.parametrize("scored", [5, 12, 15])
def test_fewer_are_all_that_are_left(scored):
    """Of the 16 subsets of four tasks; the empty one is not chosen."""
    every = all_subsets(4)
    every = every[every.sum(1).argsort(descending=True)]
    masks, left = every[:scored], every[scored:-1]
    surrogate = fit_surrogate(masks, masks.double() @ torch.arange(4.0).double(), kernel="linear")
    found = next_best(surrogate, 99, "loo", allow_fewer=True)
    assert sorted(found.tolist()) == sorted(left.tolist()) and found.dtype == torch.bool
    if len(left):
        assert torch.equal(next_best(surrogate, len(left), "loo"), found)
    with pytest.raises(ValueError, match=f"`num_subsets` must be at most {len(left)}, .*allow_few"):
        next_best(surrogate, 99, "loo")


def test_weights_have_no_next_subset():
    shares = torch.rand(20, 3, generator=GENERATOR, dtype=torch.float64)
    surrogate = fit_surrogate(shares, shares[:, 0], kernel=RBF)
    with pytest.raises(ValueError, match="`surrogate` must be one of 0/1 masks"):
        next_best(surrogate, 1)
