"""Beyond the sizes that were scored: sizes left out, and intervals that widen with distance."""

from dataclasses import replace

import numpy as np
import pytest
import reference
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import close

from ksm_ext import RBF, ConjugateGradients, Exponential, Surrogate, fit_surrogate, subsets
from ksm_ext.subsets import distinct_rows
from ksm_ext.surrogates import extrapolation
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.extrapolation import extrapolated, last_kept, left_out, thinned
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.quality import suitability
from ksm_ext.surrogates.readouts import READOUTS
from ksm_ext.surrogates.spectral import SpectralRidge, TrendRidge

SEEDS = st.integers(0, 2**32 - 1)


def middle(n, m, seed, low=0.3, high=0.6):
    """Different subsets (m, n) of sizes from 30 to 60 % alike."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(round(low * n), round(high * n) + 1, 2 * m)
    masks = torch.from_numpy(generator.random((2 * m, n)).argsort(1).argsort(1) < sizes[:, None])
    return masks[distinct_rows(masks)[1][:m]]


def games(masks, seed):
    """(m, 7) functions of a weighted size x in [0, 1] that saturate, bend, or are straight."""
    weights = torch.from_numpy(np.random.default_rng(seed).uniform(0.2, 1.2, masks.shape[1]))
    x = masks.double() @ (weights / weights.sum())
    values = 1 - torch.exp(-3 * x), x / (x + 0.2), 2 * x - x**2, torch.tanh(2.5 * x), x.sqrt()
    return torch.stack([*values, x**2, torch.log1p(5 * x)], 1)


# -- blocks -------------------------------------------------------------------------------------


def by_refitting(gram, y, ridge, weights, kept, basis):
    """Residuals of the others and their variance by a dense Gaussian process, trend unpenalised."""
    rest = ~kept
    covariance = gram + torch.diag(ridge / weights)
    inverse = torch.linalg.inv(covariance[kept][:, kept])
    of_trend = basis[kept].T @ inverse
    curvature = torch.linalg.inv(of_trend @ basis[kept])
    slopes = curvature @ (of_trend @ y[kept])
    across = covariance[rest][:, kept] @ inverse
    predicted = basis[rest] @ slopes + across @ (y[kept] - basis[kept] @ slopes)
    left = basis[rest] - across @ basis[kept]
    variance = covariance[rest][:, rest] - across @ covariance[kept][:, rest]
    return y[rest] - predicted, (variance + left @ curvature @ left.T).diagonal()


@settings(max_examples=30, deadline=None)
@given(
    seed=SEEDS,
    m=st.integers(9, 30),
    center=st.booleans(),
    weighted=st.booleans(),
    trends=st.integers(0, 2),
)
def test_blocks_are_predicted_as_by_refitting_to_the_rest(seed, m, center, weighted, trends):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(m, 7, generator=generator) < torch.rand(m, 1, generator=generator)
    y = torch.randn(m, 3, generator=generator, dtype=torch.float64)
    weights = torch.rand(m, generator=generator).double() + 0.5 if weighted else torch.ones(m)
    gram, ridge = RBF(0.1).gram(Masks(masks)), torch.tensor([0.3, 0.02, 0.3]).double()
    basis = torch.randn(trends, m, 3, generator=generator, dtype=torch.float64)
    solver = plain = SpectralRidge(gram, center=center, weights=weights.double())
    if trends:
        solver = TrendRidge(plain, basis)
    sizes = masks.sum(1)
    last = last_kept(sizes)
    dual = solver.dual(plain.rotate(y), ridge)
    residuals, variances = left_out(solver, ridge, dual, sizes, last)
    for block, size in enumerate(last.tolist()):
        kept = sizes <= size
        assert 0.25 * m <= int(kept.sum()) < m and len(sizes[kept].unique()) >= 2
        assert not residuals[block, kept].any() and not variances[block, kept].any()
        for j in range(3):
            functions = [torch.ones(m).double()] * center + list(basis[..., j])
            if len(functions) >= int(kept.sum()):
                continue
            known = torch.stack(functions, 1) if functions else torch.zeros(m, 0).double()
            expected = by_refitting(gram, y[:, j], ridge[j], weights, kept, known)
            scale = expected[0].abs().max().clamp_min(1.0)
            close(residuals[block, ~kept, j] / scale, expected[0] / scale, 1e-7)
            torch.testing.assert_close(
                variances[block, ~kept, j], expected[1], rtol=1e-6, atol=1e-9
            )


def test_as_many_subsets_are_looked_at_as_are_told_of_all_sizes():
    sizes = torch.from_numpy(np.random.default_rng(0).integers(0, 30, 5000))
    rows = thinned(sizes)
    assert len(rows.unique()) == len(rows) == extrapolation.LOOKED_AT
    shares = [part.bincount(minlength=30) / len(part) for part in (sizes, sizes[rows])]
    assert float((shares[0] - shares[1]).abs().max()) < 0.005
    assert torch.equal(thinned(sizes[:9]), torch.arange(9))
    assert torch.equal(last_kept(torch.tensor([3, 3, 3])), torch.zeros(0).long())
    assert torch.equal(last_kept(torch.tensor([1, 2, 3, 4, 4])), torch.tensor([2, 3]))


@pytest.mark.parametrize("sharing", [True, False, "auto"])
def test_blocks_of_a_surrogate_are_those_of_its_targets(sharing):
    """Whatever targets share, and by conjugate gradients, whose subsets are factored for this."""
    masks = middle(12, 60, 0, 0.2, 0.8)
    scores = games(masks, 0)[:, [0, 5]] + 0.01 * torch.randn(60, 2).double()
    surrogate = fit_surrogate(masks, scores, kernel=RBF(0.02), share_ridge=sharing)
    sizes = masks.sum(1)
    last = last_kept(sizes)
    found = surrogate._squares_of_blocks(torch.arange(60), sizes, last, torch.arange(2))
    by_cg = replace(surrogate, solver=ConjugateGradients())
    again = by_cg._squares_of_blocks(torch.arange(60), sizes, last, torch.arange(2))
    torch.testing.assert_close(again, found, rtol=1e-8, atol=1e-9, equal_nan=True)
    if surrogate.rotation is not None:
        return
    gram = RBF(0.02).gram(Masks(masks))
    for term in surrogate.kernel_terms:
        for column, j in enumerate(term.columns.tolist()):
            for block, size in enumerate(last.tolist()):
                kept = sizes <= size
                y, ones = surrogate.scores[:, j] / surrogate.unit[j], torch.ones(60, 1).double()
                parts = by_refitting(gram, y, term.ridge[column], torch.ones(60), kept, ones)
                expected = parts[0].square() / parts[1] / term.signal_variance[column]
                torch.testing.assert_close(found[block, ~kept, j], expected, rtol=1e-6, atol=1e-9)


# -- growth -------------------------------------------------------------------------------------


def by_loops(factors, largest, distances, squares):
    """One target: the mean over rates by the sum over all of them."""
    n = len(factors) - 1
    rates = np.linspace(0, 20, 81)
    weights = np.ones(81)
    if np.isnan(squares).all():  # no growth: see test_what_sizes_leave_open_is_as_by_loops
        weights[1:] = 0
    for block in range(len(squares)):
        seen = [i for i in range(squares.shape[1]) if not np.isnan(squares[block, i])]
        for i in seen:
            variance = np.exp(rates * distances[block, i])
            density = np.exp(-squares[block, i] / variance / 2) / np.sqrt(variance)
            weights = weights * density ** (4 / len(seen))
    found = list(factors)
    for size in range(largest + 1, n + 1):
        growth = np.sum(weights * np.exp(rates * (size - largest) / n)) / weights.sum()
        found[size] = max(found[size], factors[largest] * growth)
    return np.array(found)


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, n=st.integers(1, 20), blocks=st.integers(0, 3), spread=st.floats(0.1, 30))
def test_growth_is_the_mean_over_the_rates_that_remain_possible(seed, n, blocks, spread):
    generator = np.random.default_rng(seed)
    factors, largest = generator.gamma(1, size=(n + 1, 2)), generator.integers(0, n + 1, 2)
    distances = generator.uniform(0, 0.3, (blocks, 9))
    squares = spread * generator.normal(size=(blocks, 9, 2)) ** 2
    squares[generator.uniform(size=squares.shape) < 0.3] = np.nan
    found = extrapolated(*map(torch.from_numpy, (factors, largest, distances, squares))).numpy()
    for j in range(2):
        expected = by_loops(factors[:, j], largest[j], distances, squares[..., j])
        np.testing.assert_allclose(found[:, j], expected, rtol=1e-8)
        assert (found[: largest[j] + 1, j] == factors[: largest[j] + 1, j]).all()


# -- coverage -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fits():
    """20 surrogates of the seven games, each with its own kernel and ridge."""
    tables = [(middle(12, 60, seed), seed) for seed in range(20)]
    return [
        (fit_surrogate(masks, games(masks, seed), share_ridge=False), seed)
        for masks, seed in tables
    ]


def off(surrogate, seed, query):
    mean, std = surrogate.predict(query, return_std=True)
    return ((mean - games(query, seed)).abs() / std)[0], std[0] / surrogate.unit


def test_intervals_of_the_full_set_hold_where_all_sizes_scored_are_smaller(fits):
    """In every game; they are not so wide as to say nothing."""
    full = torch.ones(1, 12, dtype=torch.bool)
    found, width = map(torch.stack, zip(*(off(*each, full) for each in fits), strict=True))
    assert bool(((found <= quantile(0.95)).double().mean(0) >= 0.85).all())
    assert float(width.median()) < 5 and float(found.mean()) > 0.2


def test_intervals_of_the_empty_set_hold_where_scores_have_a_slope_there(fits):
    """All but the root, which is infinitely steep at 0, and the logarithm, nearly so."""
    empty = torch.zeros(1, 12, dtype=torch.bool)
    found = torch.stack([off(*each, empty)[0] for each in fits])[:, [0, 1, 2, 3, 5]]
    assert float((found <= quantile(0.95)).double().mean()) >= 0.85


@pytest.mark.parametrize("readout", READOUTS)
def test_intervals_of_attributions_hold(fits, readout):
    held = []
    for surrogate, seed in fits[:6]:
        every = reference.all_subsets(12)
        truth = reference.effect_functionals(12, readout) @ games(every, seed)
        value, std = surrogate.attribute(readout, return_std=True)
        held.append(((value - truth).abs() <= quantile(0.95) * std).double().mean())
    assert float(torch.stack(held).mean()) >= 0.85


def test_intervals_at_sizes_that_were_scored_do_not_change(fits, monkeypatch):
    wider = []
    for surrogate, seed in fits[:3]:
        query = torch.cat([surrogate.masks.values, middle(12, 40, seed + 100)])
        beyond = torch.cat([subsets.leave_one_out(12), torch.eye(12, dtype=torch.bool)])
        found = [surrogate.predict(each, return_std=True)[1] for each in (query, beyond)]
        with monkeypatch.context() as patch:
            patch.setattr(Surrogate, "_extrapolated", lambda self, factors: factors)
            plain = replace(surrogate)
            assert torch.equal(plain.predict(query, return_std=True)[1], found[0])
            wider.append(found[1] / plain.predict(beyond, return_std=True)[1])
    assert all(bool((each >= 1 - 1e-12).all()) for each in wider)
    assert float(torch.cat(wider)[: len(wider[0]) // 2].median()) > 1.5


def test_intervals_widen_with_the_distance(fits):
    surrogate, _ = fits[0]
    nested = torch.ones(13, 12, dtype=torch.bool).tril(-1)[:, :12]
    factors = surrogate._size_factors[nested.sum(1)]
    largest = int(surrogate.masks.sizes.max())
    assert bool((factors[largest + 1 :] > factors[largest]).all())
    assert bool((factors[largest + 1 :].diff(dim=0) > 0).all())


@settings(max_examples=8, deadline=None)
@given(
    seed=SEEDS,
    low=st.integers(1, 5),
    high=st.integers(6, 9),
    sharing=st.sampled_from(["auto", True, False]),
    options=st.sampled_from([{}, {"kernel": "rbf"}, {"noise_std": 0.02}, {"known": [3, 7]}]),
)
def test_answers_do_not_depend_on_what_others_were_scored_on(seed, low, high, sharing, options):
    """Each target, at all sizes and of all readouts, as if it were fitted to its rows alone."""
    masks = middle(9, 60, seed, 0.1, 0.9)
    generator = torch.Generator().manual_seed(seed)
    scores = games(masks, seed)[:, :3]
    scores += 0.02 * torch.randn(scores.shape, generator=generator).double()
    sizes, lost = masks.sum(1), torch.rand(scores.shape, generator=generator) < 0.1
    lost[:, 0] |= sizes > high
    lost[:, 1] |= sizes < low
    assume(all((masks[~own] != masks[~own][0]).any(0).all() for own in lost.T))
    holes = scores.masked_fill(lost, torch.nan)
    together = fit_surrogate(masks, holes, missing="drop", share_ridge=sharing, **options)
    query = torch.ones(10, 9, dtype=torch.bool).tril(-1)[:, :9]
    for j in range(3):
        rows = (~lost[:, j]).nonzero()[:, 0]
        own = dict(options)
        if "known" in own:
            own["known"] = [i for i, row in enumerate(rows.tolist()) if row in options["known"]]
        alone = fit_surrogate(masks[rows], scores[rows, j], **own)
        pairs = [
            (together.predict(query, return_std=True), alone.predict(query, return_std=True)),
            *(
                (together.attribute(name, return_std=True), alone.attribute(name, return_std=True))
                for name in READOUTS
            ),
        ]
        for found, expected in pairs:
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one[:, j], other, rtol=1e-6, atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(seed=SEEDS, unit=st.sampled_from([1e-6, 3.0, 1e6]))
def test_neither_the_unit_nor_which_end_decides(seed, unit):
    """Blocks of complements, from the other end, are off by as much."""
    masks = middle(9, 40, seed)
    scores = games(masks, seed)[:, :2] + 0.05 * torch.randn(40, 2).double()
    one = fit_surrogate(masks, scores, kernel=Exponential(0.3))
    other = fit_surrogate(~masks, 5 - unit * scores, kernel=Exponential(0.3))
    sizes, rows = masks.sum(1), torch.arange(40)  # of the complements, from the empty set
    pair = [
        each._squares_of_blocks(rows, sizes, last_kept(sizes), rows[:2]) for each in (one, other)
    ]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6, equal_nan=True)


# -- one size, or two ---------------------------------------------------------------------------

DESIGNS = {  # sizes, and how often intervals hold at least: 2x - x^2 is flat at the full set
    "one": ([6], 0.85),
    "neighbours": ([5, 6], 0.85),
    "apart": ([3, 9], 0.85),
    "near the full set": ([10, 11], 0.75),
}


def of_sizes(sizes, seed, n=12, m=60):
    """At most m different subsets of these sizes."""
    every = reference.all_subsets(n)
    every = every[torch.isin(every.sum(1), torch.tensor(sizes))]
    return every[torch.from_numpy(np.random.default_rng(seed).permutation(len(every))[:m])].bool()


def unknown_by_loops(scores, sizes, n):
    """One target: effects from their variance within sizes, the slope from two means."""
    levels = sorted(set(sizes))
    means = [np.mean(scores[sizes == size]) for size in levels]
    rest = sum(
        ((scores[sizes == s] - mean) ** 2).sum() for s, mean in zip(levels, means, strict=True)
    )
    deviation = np.sqrt(rest / sum(s * (n - s) / n for s in sizes))
    if len(levels) == 1:
        return np.array([2 * deviation * (s - levels[0]) for s in range(n + 1)])
    (low, high), slope = levels, (means[1] - means[0]) / (levels[1] - levels[0])
    scale = 1.5 * np.sqrt(deviation**2 + slope**2) / n
    return np.array([scale * (s - low) * (s - high) for s in range(n + 1)])


@settings(max_examples=25, deadline=None)
@given(
    seed=SEEDS,
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=2, unique=True),
    unit=st.sampled_from([1e-150, 1.0, 1e150]),
)
def test_what_sizes_leave_open_is_as_by_loops(seed, sizes, unit):
    masks = of_sizes(sizes, seed, n=9, m=20)
    assume((masks != masks[0]).any(0).all())
    scores = (
        np.random.default_rng(seed).normal(size=(len(masks), 2)) + masks.sum(1)[:, None].numpy()
    )
    surrogate = fit_surrogate(masks, torch.from_numpy(unit * scores), kernel=RBF(0.1))
    found = surrogate._unknown_of_sizes * (surrogate.unit / unit)
    for j in range(2):
        expected = unknown_by_loops(scores[:, j], masks.sum(1).numpy(), 9)
        np.testing.assert_allclose(found[:, j], expected, rtol=1e-9, atol=1e-9)
    of_size = found[reference.all_subsets(9).sum(1)]
    without = replace(surrogate)
    object.__setattr__(without, "_unknown_of_sizes", None)
    for name in READOUTS:
        asked = [each.attribute(name, True)[1] / unit for each in (surrogate, without)]
        effect = reference.effect_functionals(9, name) @ of_size  # (n, t)
        close(asked[0].square() - asked[1].square(), effect.square(), 1e-6)
        asked = [each.interactions(name, True)[1] / unit for each in (surrogate, without)]
        first, second = torch.triu_indices(9, 9, 1)
        both = reference.interaction_functionals(9, name) @ of_size
        apart = asked[0].square() - asked[1].square()
        close(apart[first, second], both.square(), 1e-6)


@pytest.mark.parametrize("name", DESIGNS)
def test_intervals_hold_at_all_sizes_though_one_or_two_were_scored(name):
    """In units of the spread of the scores; a bare prior had deviations of thousands of it."""
    query = torch.cat([middle(12, 60, seed + 50, 0.0, 1.0) for seed in range(2)])
    (sizes, least), held, width = DESIGNS[name], [], []
    for seed in range(4):
        masks = of_sizes(sizes, seed)
        surrogate = fit_surrogate(masks, games(masks, seed), share_ridge=False)
        mean, std = surrogate.predict(query, return_std=True)
        held.append(((mean - games(query, seed)).abs() <= quantile(0.95) * std).double().mean())
        width.append(float((std / surrogate.unit).max()))
        (note,) = surrogate.size_notes
        assert "does not tell how scores change with their number" in note
        assert note in str(surrogate)
    assert float(torch.stack(held).mean()) >= least
    assert max(width) < 100


# -- said ---------------------------------------------------------------------------------------


def test_a_surrogate_says_which_answers_leave_the_sizes_that_were_scored():
    def said(masks, **options):
        scores = games(masks, 0)[:, 0]
        found = fit_surrogate(masks, scores, kernel="rbf", **options).warnings
        return [text for text in found if "extrapolated" in text]

    (both,) = said(middle(12, 60, 0))
    assert both.startswith("Hardly any subset has fewer than 4 of 12 tasks, and none more than 7: ")
    assert "leave-one-out effects and Shapley values are extrapolated." in both
    (large,) = said(middle(12, 60, 0, 0.1, 0.6))
    assert large.startswith("No subset has more than 7 of 12 tasks: predictions of such, leave-one")
    (small,) = said(middle(12, 60, 0, 0.3, 1.0))
    assert small.startswith("Hardly any subset has fewer than 4 of 12 tasks: predictions of such, ")
    assert not said(middle(12, 60, 0, 0.1, 1.0))
    assert not said(middle(12, 60, 0), ridge=0.1)  # the model is taken at its word


def test_sizes_are_those_of_each_target():
    masks = middle(12, 80, 0, 0.1, 1.0)
    scores = games(masks, 0)[:, :3]
    scores[masks.sum(1) > 7, 1] = torch.nan
    scores[masks.sum(1) != 6, 2] = torch.nan
    surrogate = fit_surrogate(masks, scores, missing="drop", kernel="rbf")
    one, other = surrogate.size_notes
    assert one.startswith("Of '1': No subset has more than 7 of 12 tasks: ")
    assert other.startswith("Of '2': All subsets have 6 of 12 tasks, which does not tell ")
    rows = masks.sum(1) == 6
    judged = suitability(fit_surrogate(masks[rows], scores[rows, 0]), "loo")
    assert not judged.suits and judged.verdict.startswith("All subsets have 6 of ")
