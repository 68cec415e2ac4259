"""Intervals that hold: factors by size, either reading of the ridge, the range of the noise."""

import math

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import close
from scipy import optimize, stats

from ksm_ext import RBF, Exponential, Laplace, Surrogate, fit_surrogate, load_surrogate, subsets
from ksm_ext.selection import settled
from ksm_ext.surrogates import calibration
from ksm_ext.surrogates.calibration import lowest_sizes, quantile, size_factors, size_law
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.readouts import READOUTS

SEEDS = st.integers(0, 2**32 - 1)
LEVELS = (0.5, 0.8, 0.95)
N = 5
ALL = reference.all_subsets(N)


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# -- factors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_quantiles_are_scipys(level):
    assert quantile(level) == pytest.approx(stats.norm.ppf((1 + level) / 2), rel=1e-12)


def dense_factors(squares, sizes, n):
    """The largest posterior by scipy, and the mean over what it leaves of the logarithm."""
    inside = (sizes > 0) & (sizes < n) & ~np.isnan(squares)
    squares, sizes = squares[inside], sizes[inside]
    x = np.linspace(-1, 1, n + 1)
    features = np.stack([np.ones(n + 1), x, (3 * x**2 - 1) / 2], 1)
    precision = np.diag([0.0, 1.5**-2, 1.0])

    def loss(b):
        logs = features[sizes] @ b
        return (logs + squares * np.exp(-logs)).sum() / 2 + b @ precision @ b / 2

    start = [math.log(squares.mean()), 0.0, 0.0]
    found = optimize.minimize(loss, start, method="BFGS", options={"gtol": 1e-7}).x
    unknown = np.linalg.inv(features[sizes].T @ features[sizes] / 2 + precision)
    logs = features @ found + np.einsum("sd,de,se->s", features, unknown, features) / 2
    lowest = np.sort(sizes)[max(1, round(len(sizes) / 40)) - 1]
    gap = np.clip((lowest - np.arange(n + 1)) / n, 0, 0.25)
    return np.exp(logs + 10 * gap)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(3, 20), m=st.integers(20, 120), slope=st.floats(-3, 3))
def test_factors_are_those_of_the_largest_posterior(seed, n, m, slope):
    generator = np.random.default_rng(seed)
    sizes = generator.binomial(n, generator.uniform(0.3, 0.7), m)
    spread = np.exp(slope * sizes / n)[:, None] * np.array([1.0, 30.0, 1e-3])
    squares = spread * generator.normal(size=(m, 3)) ** 2
    squares[generator.uniform(size=(m, 3)) < 0.1] = np.nan
    inside = (sizes > 0) & (sizes < n)
    found = size_factors(torch.tensor(squares), torch.tensor(sizes), n).numpy()
    for j in range(3):
        if (inside & ~np.isnan(squares[:, j])).sum() < calibration.FEWEST:
            np.testing.assert_array_equal(found[:, j], 1.0)
        else:
            np.testing.assert_allclose(found[:, j], dense_factors(squares[:, j], sizes, n), 1e-3)


def test_factors_find_how_residuals_spread():
    sizes = torch.arange(1, 10).repeat(2000)
    squares = normal(0, len(sizes), 1).square() * torch.exp(1 - 2 * sizes / 10)[:, None]
    found = size_factors(squares, sizes, 10)[1:10, 0]
    torch.testing.assert_close(
        found, torch.exp(1 - torch.arange(1, 10) / 5).double(), rtol=0.1, atol=0
    )
    close(size_factors(3 * squares, None, 10), 3 * squares.mean(0, keepdim=True), 1e-3)


@pytest.mark.parametrize("squares", [torch.full((30, 2), torch.nan), torch.zeros(30, 2), None])
def test_without_residuals_factors_are_1(squares):
    squares = torch.rand(7, 2) if squares is None else squares
    sizes = torch.arange(len(squares)) % 4 + 1
    found = size_factors(squares.double(), sizes, 6)
    assert torch.equal(found, torch.ones(7, 2).double())
    assert torch.equal(lowest_sizes(torch.zeros(7, 2)), torch.full((2,), 7))


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_laws_of_sizes_are_those_of_the_subsets_compared(readout, n):
    every = reference.all_subsets(n)
    for order, name in ((1, "effect"), (2, "interaction")):
        if order <= n:
            weights = getattr(reference, f"{name}_functionals")(n, readout).abs().sum(0)
            law = torch.zeros(n + 1).double().index_add_(0, every.sum(1), weights)
            close(size_law(readout, n, order), law / law.sum())


# -- either reading of the ridge ----------------------------------------------------------------


def by_brute_force(surrogate, functionals, answered, rows):
    """(2, rows) error variances of answers, linear in the scores, if the ridge is one or other.

    Args:
        surrogate: Of one target, of ``ALL[rows]``.
        functionals: (rows, 32) of F.
        answered: (rows, m) what answers take of the residuals.
        rows: Which subsets were fitted.
    """
    (term,) = surrogate.kernel_terms
    ridge, m = float(term.ridge), len(rows)
    gram = term.kernel.gram(Masks.of(ALL))
    among = gram[rows][:, rows]
    one_score_each = torch.eye(m, dtype=torch.float64)
    dual, intercept = reference.kernel_ridge(among, one_score_each, ridge, surrogate.center)
    smooth = gram[:, rows] @ dual + intercept  # (32, m)
    weights = functionals @ smooth + answered @ (torch.eye(m).double() - smooth[rows])
    off = functionals.clone()
    off[:, rows] -= weights
    of_smooth = ((off @ gram) * off).sum(1)
    peculiar = of_smooth + ridge * off.square().sum(1)
    exact = surrogate.known[:, 0]
    of_exact = ridge * off[:, rows][:, exact].square().sum(1)
    scale, unit = float(term.signal_variance), float(surrogate.unit.square())
    most = max(ridge * scale, float(term.most_noise))
    noise = scale * (of_smooth + of_exact) + most * weights[:, ~exact].square().sum(1)
    return unit * torch.stack([noise, scale * peculiar])


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("known", [None, [0, 3]])
@pytest.mark.parametrize("readout", READOUTS)
def test_deviations_are_the_larger_of_both_readings(readout, known, center):
    rows = torch.cat(
        [
            torch.tensor([0, 31]),
            torch.randperm(30, generator=torch.Generator().manual_seed(1))[:18] + 1,
        ]
    )
    scores = ALL[rows].double() @ normal(1, N) + 0.5 * normal(2, 20)
    surrogate = fit_surrogate(
        ALL[rows], scores, kernel=Exponential(0.3), known=known, center=center
    )
    assert not surrogate.all_is_noise and not surrogate.excluded.any()
    first, second = torch.triu_indices(N, N, 1)
    for name, (_, std), order in (
        ("effect", surrogate.attribute(readout, True), 1),
        ("interaction", [each[first, second] for each in surrogate.interactions(readout, True)], 2),
    ):
        functionals = getattr(reference, f"{name}_functionals")(N, readout)
        expected = by_brute_force(surrogate, functionals, functionals[:, rows], rows)
        close(std.square(), expected.amax(0) * surrogate._readout_factors(readout, order)[0])
    joint = surrogate.attribution_covariance(readout)
    std = surrogate.attribute(readout, True)[1]
    close(joint.diagonal(), std.square())
    assert float(torch.linalg.eigvalsh(joint).min()) > -1e-9 * float(joint.max())


@pytest.mark.parametrize("observed", [True, False])
def test_predictions_are_as_uncertain_as_either_reading_has_them(observed):
    rows = torch.cat([torch.tensor([0, 31]), torch.arange(3, 21)])
    scores = ALL[rows].double() @ normal(1, N) + 0.5 * normal(2, 20)
    surrogate = fit_surrogate(ALL[rows], scores, kernel=RBF(0.1), known=[4])
    own = torch.zeros(32, 20).double()
    answered = torch.arange(20) if observed else torch.tensor([0, 1, 4])
    own[rows[answered], answered] = 1.0
    _, std = surrogate.predict(ALL, True, observed=observed)
    expected = by_brute_force(surrogate, torch.eye(32).double(), own, rows).amax(0)
    factors = surrogate._size_factors[ALL.sum(1), 0]
    factors[own.any(1)] = surrogate._size_factors.amin()
    close(std.square(), expected * factors)
    assert float(std[rows[4]]) < 1e-6 < float(std[0])  # known to be exact, and observed


def test_no_effect_is_certain_where_single_runs_may_be_noisy():
    """Half of the subsets that lack one task were scored, once each."""
    lacking = subsets.leave_one_out(8, include_full=True)[4:]
    masks = torch.cat([lacking, subsets.mixed_sizes(8, 30, range(1, 7), seed=0)])
    scores = masks.double() @ normal(0, 8) + 0.3 * normal(1, len(masks))
    surrogate = fit_surrogate(masks, scores)
    _, std = surrogate.attribute("loo", return_std=True)
    assert float(std.min()) > 0.2 * float(std.max()) > 0
    joint = surrogate.attribution_covariance("loo")
    close(joint.diagonal(), std.square())
    assert float(torch.linalg.eigvalsh(joint).min()) > -1e-9 * float(joint.max())


def noise_of_kernels_as_good(surrogate, kernels, y, together):
    """(t,) the largest, each candidate refitted to all but one subset; scores y standardised.

    ``together``, targets are predicted as well each for itself and on average.
    """
    (m, _), found = y.shape, torch.zeros(2, y.shape[1]).double()
    (term,) = {id(each): each for each in surrogate.kernel_terms}.values()
    losses, noises = [], []
    for kernel in kernels:
        gram = kernel.gram(surrogate.masks)
        rows = [row for row in surrogate.candidates if row.kernel == str(kernel)]
        for ridge in {row.ridge for row in rows}:
            left_out = reference.leave_one_out(gram, y, ridge, True)
            dual, _ = reference.kernel_ridge(gram, y, ridge, True)
            loss = left_out.square().mean(0)
            losses.append(torch.stack([loss, loss.mean().expand_as(loss) if together else loss]))
            noises.append(ridge * (left_out * dual).mean(0))
            for j in (
                (term.ridge == ridge).nonzero()[:, 0] if str(term.kernel) == str(kernel) else ()
            ):
                found[:, j] = losses[-1][:, j]
    as_good = (torch.stack(losses) <= found * (1 + 0.25 * (2 / m) ** 0.5)).all(1)
    return torch.where(as_good, torch.stack(noises), 0.0).amax(0)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, noise=st.sampled_from([0.0, 0.3, 1.0]), together=st.booleans())
def test_the_most_noise_is_that_of_kernels_which_predict_as_well(seed, noise, together):
    masks = subsets.mixed_sizes(N, 18, seed=seed % 1000)
    scores = masks.double() @ normal(seed, N, 2) + noise * normal(seed + 1, len(masks), 2)
    kernels = [Exponential(0.02), RBF(0.1), RBF(0.5)]
    surrogate = fit_surrogate(masks, scores, kernel=kernels, share_ridge=together)
    terms = surrogate.kernel_terms
    assume(surrogate.noise is None and len(terms) == 1 and bool(terms[0].dual.any(0).all()))
    assume(not surrogate.excluded.any())
    y = (surrogate.scores - surrogate.scores.mean(0)) / surrogate.unit
    expected = noise_of_kernels_as_good(surrogate, kernels, y, together)
    found = torch.zeros(2).double().index_copy_(0, terms[0].columns, terms[0].most_noise)
    close(found, expected, 1e-8)


@pytest.mark.parametrize("seed", [7, 8])
def test_noise_that_a_rough_kernel_follows_is_allowed_for(seed):
    """A ridge of next to nothing is chosen, though smooth kernels find the noise that there is."""
    effects, noise = torch.linspace(-1, 1, 10).double(), np.random.default_rng(seed).normal(size=60)
    masks = subsets.design(10, 60, readout="loo", seed=0)
    surrogate = fit_surrogate(masks, masks.double() @ effects + 0.3 * torch.from_numpy(noise))
    (term,) = surrogate.kernel_terms
    assert float(term.ridge * term.signal_variance) < 1e-4 < 0.05 < float(term.most_noise)
    values, std = surrogate.attribute("loo", return_std=True)
    assert float(((values - effects).abs() <= 1.96 * std).double().mean()) >= 0.9
    assert 0.3 < float(std.mean()) < 1.0
    assert not settled(surrogate, 3, maximize=True)


def test_taking_scores_as_exact_is_said_where_nothing_says_so():
    masks = subsets.mixed_sizes(8, 60, seed=0)
    scores = (masks.double() @ torch.linspace(0.2, 1, 8).double()).square()
    noisy = scores + normal(0, len(scores))

    def said(scores, **options):
        warnings = fit_surrogate(masks, scores, **options).warnings
        return [text for text in warnings if "taken as exact" in text]

    smooth = {"kernel": RBF(0.05)}
    (sentence,) = said(scores, **smooth)
    assert sentence.startswith("Scores are taken as exact") and "noise_std=" in sentence
    (sentence,) = said(torch.stack([scores, noisy], 1), share_ridge=False, **smooth)
    assert sentence.startswith("Scores of '0' are")
    everything = range(len(masks))
    for options in ({"noise_std": 0.0}, {"known": everything}, {"ridge": 1e-6}):
        assert not said(scores, **smooth, **options)
    assert not said(noisy)


def test_a_given_ridge_is_noise_and_the_model_taken_at_its_word():
    masks, scores = ALL[:24], ALL[:24].double() @ normal(0, N)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(0.1), ridge=0.3)
    assert surrogate.all_is_noise and bool((surrogate._size_factors == 1).all())
    assert not fit_surrogate(masks, scores, kernel=RBF(0.1)).all_is_noise


# -- coverage -----------------------------------------------------------------------------------


def drawn(seed, steep, share, t=60, n=8, m=60):
    """Functions of a Gaussian process, (256, t), and rows that were scored.

    Deviations are ``exp(steep (1 - |S| / n))``; a ``share`` of the variance is of single subsets.
    """
    every = reference.all_subsets(n)
    gram = (1 - share) * RBF(0.08).gram(Masks.of(every)) + share * torch.eye(2**n).double()
    root = torch.linalg.cholesky(gram + 1e-9 * torch.eye(2**n).double())
    sizes = every.sum(1)
    values = torch.exp(steep * (1 - sizes / n))[:, None] * (root @ normal(seed, 2**n, t))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(2**n, generator=generator).log() * sizes.bincount()[sizes]
    keys[[0, -1]] = 1.0
    return every, values, keys.argsort(descending=True)[:m]


@pytest.mark.parametrize("steep", [0.0, 1.3])
@pytest.mark.parametrize("share", [0.05, 0.3])
def test_intervals_hold_for_subsets_of_all_sizes(steep, share):
    """Of the scores themselves, as often as they should: also where small subsets vary more."""
    every, values, rows = drawn(3, steep, share)
    surrogate = fit_surrogate(every[rows], values[rows], kernel="rbf", share_ridge=False)
    rest = torch.ones(256, dtype=torch.bool)
    rest[rows] = False
    mean, std = surrogate.predict(every[rest], return_std=True)
    off = (mean - values[rest]).abs() / std
    small = every[rest].sum(1) < 4
    for part in (off[small], off[~small]):
        for level, least, most in ((0.5, 0.42, 0.62), (0.8, 0.72, 0.9), (0.95, 0.9, 0.99)):
            assert least < float((part <= quantile(level)).double().mean()) < most
    for readout in READOUTS:
        value, std = surrogate.attribute(readout, return_std=True)
        truth = reference.effect_functionals(8, readout) @ values
        held = float(((value - truth).abs() <= quantile(0.95) * std).double().mean())
        assert held > 0.9
        pairs, std = surrogate.interactions(readout, return_std=True)
        first, second = torch.triu_indices(8, 8, 1)
        off = pairs[first, second] - reference.interaction_functionals(8, readout) @ values
        held = float((off.abs() <= quantile(0.95) * std[first, second]).double().mean())
        assert held > 0.88


def test_effects_near_the_full_set_are_not_as_uncertain_as_small_subsets():
    """Leave-one-out effects of functions that vary a fifth as much near the full set."""
    every, values, rows = drawn(5, 1.6, 0.2)
    surrogate = fit_surrogate(every[rows], values[rows], kernel="rbf", share_ridge=False)
    value, std = surrogate.attribute("loo", return_std=True)
    truth = reference.effect_functionals(8, "loo") @ values
    assert float(((value - truth).abs() <= quantile(0.95) * std).double().mean()) > 0.9
    residuals = surrogate.loo_residuals.square().mean(0).sqrt()
    assert float((std.mean(0) / residuals).mean()) < 0.8


def test_extrapolated_intervals_are_wider_and_the_surrogate_says_so():
    every, values, even = drawn(7, 1.0, 0.1, t=20)
    middle = (every.sum(1) - 4).abs() <= 1
    rows = torch.cat([torch.tensor([0, 255]), middle.nonzero()[:, 0][: len(even) - 2]])
    says = "Hardly any subset has fewer than 3 of 8 tasks"
    held = []
    for chosen in (even, rows):
        surrogate = fit_surrogate(every[chosen], values[chosen], kernel="rbf", share_ridge=False)
        value, std = surrogate.attribute("shapley", return_std=True)
        truth = reference.effect_functionals(8, "shapley") @ values
        held.append(float(((value - truth).abs() <= quantile(0.95) * std).double().mean()))
        assert (says in str(surrogate)) is (chosen is rows)
        ratio = surrogate._readout_factors("shapley", 1) / surrogate._readout_factors("banzhaf", 1)
        assert (float(ratio.mean()) > 2) is (chosen is rows)
    assert min(held) > 0.88


@pytest.mark.parametrize("m", [60, 120])
@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("kernel", ["auto", "laplace"])
def test_intervals_of_mixtures_hold_where_kernels_are_rough(m, noise, kernel):
    """Of rough functions of 8 shares: as often as they should, and no wider than residuals.

    Where the noise is unknown, for another run of a mixture.
    """
    draws = np.random.default_rng(m).dirichlet(np.ones(8), m + 300)
    shares = torch.from_numpy(draws)
    root = torch.linalg.cholesky(Laplace(1.0).gram(Masks(shares)) + 1e-9 * torch.eye(m + 300))
    values = root @ normal(m, m + 300, 20)
    runs = values + noise * normal(m + 1, m + 300, 20)
    surrogate = fit_surrogate(shares[:m], runs[:m], kernel=kernel, share_ridge=False)
    assert "laplace" in surrogate.predictors
    mean, std = surrogate.predict(shares[m:], return_std=True)
    off = (mean - runs[m:]).abs() / std
    for level in LEVELS:
        assert abs(float((off <= quantile(level)).double().mean()) - level) < 0.08
    size = surrogate.loo_residuals.square().mean(0).sqrt()
    assert float((std.mean(0) / size).max()) < 1.25


@pytest.mark.parametrize("m", [60, 120])
@pytest.mark.parametrize("shares", [True, False])
def test_a_target_that_is_predicted_well_is_not_as_uncertain_as_those_it_shares_with(m, shares):
    """What others would bear as noise is far more than there is in its residuals."""
    found = []
    for seed in range(6):
        generator = np.random.default_rng(seed)
        masks = torch.from_numpy(generator.dirichlet(np.full(3, 0.3), m + 200))
        if not shares:
            masks = subsets.mixed_sizes(9, m + 200, seed=seed)
        effects = torch.from_numpy(generator.normal(size=masks.shape[1]))
        easy, hard = masks.double() @ effects, (masks > masks.double().mean(0)).double() @ effects
        scores = torch.stack([easy, *[hard + 0.3 * normal(seed + j, m + 200) for j in range(4)]], 1)
        surrogate = fit_surrogate(masks[:m], scores[:m], share_ridge=True)
        _, std = surrogate.predict(masks[m:], return_std=True)
        residuals = surrogate.loo_residuals.square().mean(0).sqrt()
        found.append(std.mean(0) / residuals)
    assert float(torch.stack(found)[:, 0].max()) < 1.5
    assert 0.5 < float(torch.stack(found).median()) < 1.2


# -- the noise of a run -------------------------------------------------------------------------


def test_the_noise_lies_in_its_range():
    """Of one run each from 0 on, and as chi-square has it where subsets were repeated."""
    once, twice = [], []
    for seed in range(40):
        masks = subsets.mixed_sizes(7, 30, seed=seed)
        clean, noise = torch.tanh(masks.double() @ normal(seed, 7)), 0.1 + 0.9 * (seed % 2)
        runs = clean + noise * normal(seed + 100, 2, 30)
        low, high = fit_surrogate(masks, runs[0], kernel="rbf").noise_range()
        assert low == 0
        once.append(float(high) >= noise)
        low, high = fit_surrogate(masks.repeat(2, 1), runs.flatten(), kernel="rbf").noise_range(0.8)
        twice.append(float(low) <= noise <= float(high))
    assert sum(once) >= 38 and 25 <= sum(twice) <= 38


def test_ranges_are_scipys():
    masks = subsets.mixed_sizes(7, 30, seed=0)
    scores = normal(0, 30, 2) * torch.tensor([1.0, 50.0])
    surrogate = fit_surrogate(masks, scores, kernel="linear", known=[2])
    residuals = surrogate.loo_residuals[torch.arange(30) != 2]
    for level in (0.5, 0.95):
        expected = (residuals.square().sum(0) / stats.chi2.ppf(1 - level, 29)).sqrt()
        close(surrogate.noise_range(level), torch.stack([0 * expected, expected]))
    assert f"noise of a run between 0 and {expected[0]:.3g}, {expected[1]:.3g} at 95 %" in str(
        surrogate
    )
    runs = scores + 0.3 * normal(1, 3, 30, 2)
    measured = fit_surrogate(masks.repeat(3, 1), runs.reshape(90, 2), kernel="linear")
    assert measured.noise_degrees == 60
    sums = measured.noise_std.square() * 60
    ends = [(sums / stats.chi2.ppf(tail, 60)).sqrt() for tail in (0.975, 0.025)]
    close(measured.noise_range(), torch.stack(ends))
    assert f"({ends[0][0]:.3g} to {ends[1][0]:.3g} at 95 %)" in str(measured)
    given = fit_surrogate(masks, scores[:, 0].numpy(), kernel="linear", noise_std=0.3)
    np.testing.assert_allclose(given.noise_range(), [0.3, 0.3])
    assert "noise of a run 0.3" in str(given) and " at 95 %" not in str(given)
    with pytest.raises(ValueError, match=r"^`level` must be strictly between 0 and 1, got 1\.0"):
        given.noise_range(1.0)


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, unit=st.sampled_from([1e-6, 3.0, 1e6]), repeats=st.integers(1, 2))
def test_the_unit_decides_nothing(seed, unit, repeats):
    """Of ranges of the noise and of deviations; nor does a constant."""
    masks = subsets.mixed_sizes(7, 30, seed=0)
    scores = torch.tanh(masks.double() @ normal(seed, 7)).repeat(repeats)
    scores = scores + 0.2 * normal(seed + 1, 30 * repeats)
    options = {"kernel": Exponential(0.3)}
    one = fit_surrogate(masks.repeat(repeats, 1), scores, **options)
    other = fit_surrogate(masks.repeat(repeats, 1), 5 * unit - unit * scores, **options)
    close(other.noise_range() / unit, one.noise_range(), 1e-6)
    query = subsets.mixed_sizes(7, 20, seed=9)
    for ask in (lambda s: s.predict(query, True)[1], lambda s: s.attribute("loo", True)[1]):
        close(ask(other) / unit, ask(one), 1e-5)


# -- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"ridge": 0.3}, {"noise_std": 0.1}], ids=str)
@pytest.mark.parametrize("weights", [False, True])
def test_files_keep_how_intervals_are_made(options, weights, tmp_path):
    masks = torch.cat([ALL[:24], ALL[:6]])
    masks = 0.25 * masks.double() + 0.1 if weights else masks
    scores = masks.double() @ normal(0, N) + 0.3 * normal(1, 30)
    scores[24:] = scores[:6] + 0.1 * normal(2, 6)  # the rest is peculiar to subsets
    surrogate = fit_surrogate(masks, scores, kernel="rbf", **options)
    surrogate.save(tmp_path / "surrogate")
    loaded = load_surrogate(tmp_path / "surrogate")
    assert loaded.all_is_noise is ("ridge" in options)
    assert loaded.noise_degrees == surrogate.noise_degrees == (0 if "noise_std" in options else 6)
    for ask in (lambda s: s.predict(masks, True)[1], lambda s: s.attribute("loo", True)[1]):
        assert torch.equal(ask(loaded), ask(surrogate))
    assert torch.equal(loaded.noise_range(), surrogate.noise_range())
    tensors, facts = surrogate.state()
    for name in ("all_is_noise", "noise_degrees"):  # as in older files
        facts.pop(name)
    if not weights:
        assert Surrogate.from_state(tensors, facts).all_is_noise is loaded.all_is_noise
