"""Maps of scores: exact inverses, and predictions against real refits and closed forms."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import close
from scipy.integrate import quad
from scipy.special import logit
from scipy.stats import chi2, norm, rankdata

from ksm_ext import RBF, fit_many, fit_surrogate, load_surrogate, subsets
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.score_warps import Log, Logit, NormalScores
from ksm_ext.surrogates.storage import write_state

FEW = settings(max_examples=40, deadline=None)
some_scores = st.lists(st.floats(-1e6, 1e6), min_size=3, max_size=30)
some_positions = st.lists(st.floats(-6, 6), min_size=1, max_size=20)


def doubles(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def saturating(m=60, n=8, seed=0, t=1, noise=0.05):
    """Masks, accuracies that saturate, and what they would be of all subsets."""
    generator = torch.Generator().manual_seed(seed)
    every = subsets.all_subsets(n)
    weights = torch.rand(n, t, generator=generator, dtype=torch.float64) * 4 - 0.4
    truth = torch.sigmoid(every.double() @ weights - 3)
    rows = torch.randperm(2**n, generator=generator)[:m]
    moved = torch.logit(truth) + noise * torch.randn(2**n, t, generator=generator).double()
    return every[rows], torch.sigmoid(moved)[rows], every, truth


# -- maps ---------------------------------------------------------------------------------------


@FEW
@given(some_scores, some_positions)
def test_normal_scores_are_increasing_and_inverted_exactly(numbers, positions):
    scores = doubles(numbers)
    assume(NormalScores.suits(scores))
    known, z = NormalScores(scores), doubles(sorted(positions))
    spread = float(scores.abs().amax())
    y = known.inverse(z)
    assert bool((y.diff() >= -1e-12 * spread).all())
    torch.testing.assert_close(known.inverse(known(y)), y, rtol=0, atol=1e-9 * (spread + 1))
    torch.testing.assert_close(known.inverse(known(scores)), scores, rtol=0, atol=1e-9 * spread)


@FEW
@given(some_scores)
def test_normal_scores_are_quantiles_of_mean_ranks(numbers):
    scores = doubles(numbers)
    assume(NormalScores.suits(scores))
    close_ones_tie = (scores / scores.abs().amax()).round(decimals=12)
    expected = norm.ppf((rankdata(close_ones_tie) - 0.5) / len(numbers))
    apart = close_ones_tie.unique().diff().amin() > 1e-6  # where it is steep, rounding counts
    assume(bool(apart))
    close(NormalScores(scores)(scores), doubles(expected), 1e-5)


def test_normal_scores_are_smooth_and_go_on_linearly():
    scores = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).exp()
    known, step = NormalScores(scores), 1e-7
    for y in scores:
        around = torch.stack([y - 2 * step, y - step, y + step, y + 2 * step])
        slopes = known(around).diff() / around.diff()
        assert float(slopes[0]) == pytest.approx(float(slopes[2]), rel=1e-3)
    low, high = known(scores).aminmax()
    steepest = (scores.amax() - scores.amin()) / (high - low)
    for end, sign in ((low, -1.0), (high, 1.0)):
        beyond = known.inverse(end + sign * doubles([0.0, 1.0, 2.0, 3.0]))
        assert beyond.diff().abs().max() <= steepest * (1 + 1e-9)
        torch.testing.assert_close(beyond.diff(2), torch.zeros(2).double(), rtol=0, atol=1e-9)


def test_logits_are_of_shrunk_scores_and_stay_in_their_range():
    scores = doubles([0.0, 0.2, 0.5, 1.0])
    known = Logit(scores)
    close(known(scores), doubles(logit((scores.numpy() * 3 + 0.5) / 4)))
    close(known.inverse(known(scores)), scores)
    assert known.inverse(doubles([-50.0, 50.0])).tolist() == [0.0, 1.0]
    close(Log(scores).inverse(Log(scores)(scores + 1)), scores + 1)


@pytest.mark.parametrize("unit", [5e-324, 1e-300, 1e300])
def test_scores_of_any_size_have_normal_scores(unit):
    scores = doubles([1.0, 2.0, 5.0, -3.0]) * unit
    known = NormalScores(scores)
    assert bool(known(scores).isfinite().all())
    torch.testing.assert_close(known.inverse(known(scores)), scores, rtol=1e-9, atol=0)


# -- predictions --------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 3])
def test_predictions_through_a_logarithm_are_those_of_a_fit_of_logarithms(t):
    masks, scores, every, _ = saturating(t=t)
    options = {"kernel": "exponential", "share_ridge": True}
    found = fit_surrogate(masks, scores, warp="log", **options)
    inner = fit_surrogate(masks, scores.log(), **options)
    (z, std), s = inner.predict(every, True), inner.loo_residuals.square().mean(0).sqrt()
    mean, deviation = found.predict(every, return_std=True)
    own = ~(every.all(1) | ~every.any(1))  # where no score answers
    close(mean[own], (z + s**2 / 2).exp()[own], 1e-6)  # of a log-normal variable
    reach = quantile(0.95)
    close(deviation, ((z + reach * std).exp() - (z - reach * std).exp()) / (2 * reach), 1e-7)
    close(mean, found.predict(every))


def test_the_mean_is_that_over_what_leaving_out_leaves_over():
    masks, scores, every, _ = saturating(m=40, noise=0.6)
    found = fit_surrogate(masks, scores[:, 0], warp="logit", kernel="linear")
    known = Logit(scores[:, 0])
    inner = fit_surrogate(masks, known(scores[:, 0]), kernel="linear")
    s = float(inner.loo_residuals.square().mean().sqrt())
    for mask in every[[5, 77, 201]]:
        z = float(inner.predict(mask[None]))

        def density(e, z=z):
            return float(known.inverse(doubles(z + s * e))) * norm.pdf(e)

        expected = quad(density, -8, 8)[0]
        assert float(found.predict(mask[None])) == pytest.approx(expected, abs=1e-4)


def test_residuals_are_those_of_real_refits():
    masks, scores, _, _ = saturating(m=25)
    options = {"kernel": RBF(gamma=0.1), "ridge": 0.2}
    found = fit_surrogate(masks, scores[:, 0], warp="log", **options)
    (warp,) = found.warps
    s = float(warp.spread)
    for i in range(25):
        rest = torch.arange(25) != i
        without = fit_surrogate(masks[rest], scores[rest, 0].log(), **options)
        expected = scores[i, 0] - (without.predict(masks[i : i + 1])[0] + s**2 / 2).exp()
        assert float(found.loo_residuals[i]) == pytest.approx(float(expected), abs=1e-7)
    error = found.loo_residuals.square().mean() / scores[:, 0].var()
    assert float(found.loo_error) == pytest.approx(float(error))


@pytest.mark.parametrize("warp", ["log", "logit", "normal", "auto"])
def test_attributions_are_of_the_scores_as_they_are(warp):
    masks, scores, every, _ = saturating(t=2)
    plain, found = (fit_surrogate(masks, scores, warp=w) for w in ("identity", warp))
    for readout in ("loo", "shapley", "banzhaf"):
        for ask in ("attribute", "interactions"):
            pairs = zip(*(getattr(s, ask)(readout, True) for s in (plain, found)), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(plain.walsh_spectrum(), found.walsh_spectrum())
    assert torch.equal(plain.predict(every, observed=True), found.predict(every, observed=True))
    assert torch.equal(plain.residuals, found.residuals)


@pytest.mark.parametrize("warp", ["log", "logit", "normal"])
def test_a_score_that_is_known_is_what_is_predicted(warp):
    masks, scores, _, _ = saturating()
    masks[0], scores[0] = True, 0.97
    found = fit_surrogate(masks, scores[:, 0], warp=warp, known=[3])
    mean, std = found.predict(masks[[0, 3]], return_std=True)
    close(mean, scores[[0, 3], 0], 1e-9)
    assert float(std[1]) < 1e-6


@pytest.mark.parametrize("seed", range(5))
def test_saturating_scores_are_predicted_better(seed):
    masks, scores, every, truth = saturating(seed=seed, t=3)
    plain, found = (fit_surrogate(masks, scores, warp=w) for w in ("identity", "auto"))
    assert {name for warp in found.warps for name in warp.targets} == {0, 1, 2}
    errors = [(s.predict(every) - truth).square().mean() for s in (plain, found)]
    assert errors[1] < errors[0] / 2 and bool((found.loo_error < plain.loo_error).all())
    assert bool((found.rank_correlations > plain.rank_correlations).all())


def test_scores_that_do_not_saturate_are_predicted_as_they_are():
    masks, scores, every, _ = saturating(t=2)
    straight = masks.double() @ torch.arange(8).double() + 5
    table = torch.stack([straight, scores[:, 0], torch.full_like(straight, 2.0)], 1)
    found = fit_surrogate(masks, table, warp="auto")
    assert [warp.targets for warp in found.warps] == [(1,)]
    plain = fit_surrogate(masks, table)
    assert torch.equal(found.predict(every)[:, [0, 2]], plain.predict(every)[:, [0, 2]])
    with_std = [s.predict(every, True)[1] for s in (found, plain)]
    assert torch.equal(*(std[:, [0, 2]] for std in with_std))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["log", "logit", "normal"]))
def test_a_chosen_map_has_the_smaller_error(seed, warp):
    masks, scores, _, _ = saturating(m=20, n=5, seed=seed, t=2, noise=0.5)
    plain, named, chosen = (
        fit_surrogate(masks, scores, warp=w) for w in ("identity", warp, "auto")
    )
    assert bool((chosen.loo_error <= plain.loo_error + 1e-12).all())
    for j in range(2):
        if not any(j in each.targets for each in chosen.warps):
            gain = (plain.loo_residuals**2 - named.loo_residuals**2)[:, j]
            assert gain.mean() <= gain.std() / math.sqrt(20) + 1e-12


def test_missing_scores_and_repeats():
    masks, scores, every, _ = saturating(t=2)
    holed = scores.clone()
    holed[::7, 1] = math.nan
    found = fit_surrogate(masks, holed, warp="logit", missing="drop", kernel="rbf")
    assert found.loo_residuals.isnan().equal(holed.isnan())
    kept = ~holed[:, 1].isnan()
    alone = fit_surrogate(masks[kept], holed[kept, 1], warp="logit", kernel="rbf")
    close(found.predict(every)[:, 1], alone.predict(every), 1e-8)
    twice = fit_surrogate(masks.repeat(2, 1), scores.repeat(2, 1), warp="normal", kernel="rbf")
    assert twice.loo_residuals.shape == scores.shape


def test_mixtures_are_predicted_through_maps_too():
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(50, 4, generator=generator).double().square()
    scores = torch.sigmoid(shares @ doubles([6.0, 3.0, 0.0, -1.0]) - 3)
    found = fit_surrogate(shares, scores, warp="logit", kernel="rbf")
    plain = fit_surrogate(shares, scores, kernel="rbf")
    assert found.loo_error < plain.loo_error
    assert torch.equal(found.attribute("loo"), plain.attribute("loo"))
    inner = fit_surrogate(shares, Logit(scores)(scores), kernel="rbf")
    known, s = Logit(scores), inner.loo_residuals.square().mean().sqrt()
    expected = torch.stack([known.inverse(inner.predict(shares) + e * s) for e in (-1, 0, 1)])
    assert bool(
        (found.predict(shares) - expected[1]).abs().max() < (expected[2] - expected[0]).max()
    )


def test_noise_is_what_the_map_makes_of_it():
    masks, scores, _, _ = saturating()
    std = torch.linspace(0, 1e-6, 60).double()[:, None]
    found = fit_surrogate(masks, scores, warp="log", noise_std=std)
    close(found.warps[0].surrogate.noise, std / scores, 1e-8)
    found = fit_surrogate(masks, scores, warp="normal", noise_std=0.2)
    noise, known = found.warps[0].surrogate.noise[:, 0], NormalScores(scores[:, 0])
    expected = (known(scores[:, 0] + 0.2) - known(scores[:, 0] - 0.2)) / 2
    inside = (scores[:, 0] - 0.2 > scores.amin()) & (scores[:, 0] + 0.2 < scores.amax())
    assert bool(inside.any())
    close(noise[inside], expected[inside])


def test_tables_together_are_tables_one_by_one():
    tables = [saturating(seed=seed)[:2] for seed in range(3)]
    masks, scores = (torch.stack(each) for each in zip(*tables, strict=True))
    for one, table, outcome in zip(
        fit_many(masks, scores, warp="auto"), masks, scores, strict=True
    ):
        assert torch.equal(
            one.predict(table), fit_surrogate(table, outcome, warp="auto").predict(table)
        )


@pytest.mark.parametrize("kind", [np.asarray, torch.Tensor.float])
def test_answers_and_files(kind, tmp_path):
    masks, scores, every, _ = saturating(t=2)
    found = fit_surrogate(masks, kind(scores), warp="auto")
    assert found.warps
    found.save(tmp_path / "file")
    again = load_surrogate(tmp_path / "file")
    assert str(again) == str(found) and "go through a logit map of the scores" in str(found)
    for one, other in zip(again.predict(every, True), found.predict(every, True), strict=True):
        assert type(one) is type(other) and one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(again.loo_residuals, found.loo_residuals)


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, facts: facts["warps"][0].update(name="rank"),
        lambda tensors, facts: facts["warps"][0].update(targets=[0, 0]),
        lambda tensors, facts: facts["warps"][0].update(targets=[2]),
        lambda tensors, facts: facts["warps"][0].pop("surrogate"),
        lambda tensors, facts: facts["warps"][0]["surrogate"].update(task_names=list("abc")),
        lambda tensors, facts: tensors.pop("warp.0.scores"),
        lambda tensors, facts: tensors.update({"warp.0.scores": torch.zeros(3, 2).double()}),
        lambda tensors, facts: tensors["scores"].neg_(),
    ],
)
def test_damaged_maps_are_refused(tmp_path, damage):
    masks, scores, _, _ = saturating(t=2)
    tensors, facts = fit_surrogate(masks, scores, warp="logit").state()
    write_state(tmp_path / "s", tensors, facts)
    load_surrogate(tmp_path / "s")
    damage(tensors, facts)
    write_state(tmp_path / "s", tensors, facts)
    with pytest.raises(ValueError, match=r"^`path` must be a saved surrogate, got .*damaged"):
        load_surrogate(tmp_path / "s")


REFUSED = {
    "name": (
        {"warp": "rank"},
        "`warp` must be one of 'identity', 'log', 'logit', 'normal', 'auto'",
    ),
    "log": ({"warp": "log"}, "`scores` must be positive for warp='log', got -1 to 2 of target '1'"),
    "logit": ({"warp": "logit"}, r"must be in \[0, 1\] and apart for warp='logit', got -1 to 2 of"),
}


def test_the_line_of_a_surrogate_is_of_predictions_through_the_map():
    """Error and range of the noise are of the same residuals."""
    masks = subsets.mixed_sizes(8, 60, seed=0)
    effects = torch.rand(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = torch.exp(masks.double() @ effects)
    found = fit_surrogate(masks, scores, warp="log", kernel="linear")
    squares = found.loo_residuals.square().sum(0)
    assert not torch.equal(squares, found.residuals.square().sum(0))
    expected = (squares / chi2.ppf(0.05, 60)).sqrt()
    torch.testing.assert_close(found.noise_range()[1], expected)
    line = str(found).split("\n")[0]
    assert f"between 0 and {expected[0]:.3g}, {expected[1]:.3g} at 95 %" in line
    assert f"leave-one-out error {float(found.loo_error.mean()):.3f}" in line


@pytest.mark.parametrize("options, found", REFUSED.values(), ids=REFUSED)
def test_scores_that_a_map_is_not_for(options, found):
    masks, scores, _, _ = saturating(t=2)
    scores[:2, 1] = doubles([-1.0, 2.0])
    for fit in (fit_surrogate, lambda m, s, **o: fit_many(m[None], s[None], **o)):
        with pytest.raises(ValueError, match=found):
            fit(masks, scores, **options)
    fit_surrogate(masks, scores, warp="normal")  # as the message advises


def test_estimates_have_no_maps():
    masks, scores, every, truth = saturating()
    with pytest.raises(ValueError, match="`warp` must be 'identity' with estimates, got 'auto'"):
        fit_surrogate(masks, scores, estimates=(every, truth), warp="auto")


def test_scores_that_logits_cannot_tell_apart_are_predicted_otherwise():
    """Probabilities of whole sequences: all are 0 beside 1/2, whatever their ratios."""
    masks, scores, every, _ = saturating()
    tiny, expected = (
        fit_surrogate(masks, scores * unit, warp="auto").predict(every) / unit
        for unit in (1e-17, 1e-3)
    )
    assert bool(tiny.isfinite().all()) and float((tiny - scores.mean()).abs().max()) < 2
    close(tiny, expected, 0.2)
    with pytest.raises(
        ValueError, match=r"^`scores` must be in \[0, 1\] and apart for warp='logit'"
    ):
        fit_surrogate(masks, scores * 1e-17, warp="logit")


@pytest.mark.parametrize("warp", ["normal", "log", "auto"])
def test_noise_below_the_rounding_of_scores_is_none(warp):
    masks, scores, every, _ = saturating()
    none, little = (
        fit_surrogate(masks, scores + 1, warp=warp, noise_std=std).predict(every, True)
        for std in (0.0, 1e-18)
    )
    for one, other in zip(none, little, strict=True):
        close(one, other, 1e-6)
