"""What was observed: units, repeats, noise, known and missing scores, constant tasks."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.linear_model import LinearRegression, Ridge

from ksm_ext import (
    ConjugateGradients,
    Exponential,
    Linear,
    fit_many,
    fit_surrogate,
    load_surrogate,
    retrain_scores,
    subsets,
)
from ksm_ext.surrogates.observations import MIN_REPEATS, observe

FEW = settings(derandomize=True, deadline=None, database=None, max_examples=8)
SEEDS = st.integers(0, 10**6)
READOUTS = ("loo", "shapley", "banzhaf")
CG = ConjugateGradients(rank=40, tolerance=1e-9)


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def design(seed, n=7, m=40):
    generator = torch.Generator().manual_seed(seed)
    return subsets.all_subsets(n)[torch.randperm(2**n, generator=generator)[:m]]


def close(actual, expected, tolerance=1e-7):
    scale = max(1.0, float(torch.as_tensor(expected).abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def close_with_deviations(actual, expected, tolerance=1e-7):
    """Two pairs of answers and their standard deviations."""
    for found, other in zip(actual, expected, strict=True):
        close(found, other, tolerance)


def truth(seed, masks, t):
    """Main effects and pairs (m, t), with a different amount of noise in every target."""
    n = masks.shape[1]
    scores = masks.double() @ normal(seed, n, t)
    pairs = masks[:, :-1] & masks[:, 1:]
    scores += pairs.double() @ normal(seed + 1, n - 1, t)
    return scores + torch.logspace(-2, 0, t).double() * normal(seed + 2, len(masks), t)


# -- units --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", "rbf", "linear", "anova2", "lasso"])
@pytest.mark.parametrize("share_ridge", ["auto", True, False])
@pytest.mark.parametrize("criterion", ["error", "rank"])
def test_the_unit_of_a_target_decides_nothing(kernel, share_ridge, criterion):
    options = {"kernel": kernel, "share_ridge": share_ridge, "criterion": criterion}
    for seed in range(2):
        masks = design(seed)
        scores = truth(seed, masks, 3)
        unit = torch.tensor([1e-3, 1.0, 1e4]).double()
        shift = torch.tensor([5.0, 0.0, -1e5]).double()
        one = fit_surrogate(masks, scores, **options)
        other = fit_surrogate(masks, scores * unit + shift, **options)
        for readout in READOUTS:
            moved = [each / unit for each in other.attribute(readout, return_std=True)]
            close_with_deviations(moved, one.attribute(readout, return_std=True))
        query = subsets.all_subsets(7)
        close((other.predict(query) - shift) / unit, one.predict(query))
        close(other.loo_error, one.loo_error)
        terms = zip(one.kernel_terms, other.kernel_terms, strict=True)
        assert all(str(term.kernel) == str(same.kernel) for term, same in terms)


@pytest.mark.parametrize("share_ridge", ["auto", False])
def test_the_unit_decides_nothing_for_conjugate_gradients(share_ridge):
    masks = design(0, m=90)
    scores = truth(0, masks, 2)
    unit = torch.tensor([1e-4, 1e4]).double()
    options = {"kernel": "rbf", "solver": CG, "share_ridge": share_ridge}
    one, other = (fit_surrogate(masks, scores * factor, **options) for factor in (1.0, unit))
    close(other.attribute("shapley") / unit, one.attribute("shapley"), 1e-6)


@pytest.mark.parametrize("size", [1e-200, 1e-170, 1e-30, 1e30, 1e160, 1e300])
def test_scores_of_any_size(size):
    masks = design(3)
    scores = truth(3, masks, 1)[:, 0]
    one, other = fit_surrogate(masks, scores), fit_surrogate(masks, scores * size)
    found = [each / size for each in other.attribute("shapley", return_std=True)]
    close_with_deviations(found, one.attribute("shapley", return_std=True))
    assert float(other.loo_error) == pytest.approx(float(one.loo_error))


def held_out_error(surrogate, masks, scores):
    return (surrogate.predict(masks) - scores).square().mean(0) / scores.var(0)


FAMILIES = {
    "additive": lambda masks, seed: masks.double() @ normal(seed, masks.shape[1]),
    "pairs": lambda masks, seed: (
        (masks[:, :-1] & masks[:, 1:]).double() @ normal(seed, masks.shape[1] - 1)
    ),
    "saturating": lambda masks, seed: torch.tanh(masks.double() @ normal(seed, masks.shape[1])),
    "sparse": lambda masks, seed: (
        3.0 * masks[:, seed % 7] - 2.0 * masks[:, (seed + 3) % 7].double()
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unit", [pytest.param(1e-4, marks=pytest.mark.slow), 1e4])
def test_no_target_is_fitted_worse_beside_others(family, unit):
    """20 draws: beside pure noise in another unit, and beside a target of another kind."""
    together, alone, noise = [], [], []
    for seed in range(20):
        every = design(seed, m=128)
        masks, query = every[:50], every[50:]
        clean = FAMILIES[family](every, seed)
        clean = clean + 0.1 * clean.std() * normal(seed + 50, 128)
        other = FAMILIES["saturating"](every, seed + 9) + 0.5 * normal(seed + 60, 128)
        scores = torch.stack([clean, unit * normal(seed + 70, 128), unit * other], 1)
        both = fit_surrogate(masks, scores[:50])
        one = fit_surrogate(masks, scores[:50, 0])
        errors = held_out_error(both, query, scores[50:])
        together.append(errors[0])
        noise.append(errors[1])
        alone.append(held_out_error(one, query, scores[50:, 0]))
    together, alone, noise = (torch.stack(errors) for errors in (together, alone, noise))
    assert together.mean() < 1.05 * alone.mean() + 0.005  # sharing a kernel costs little, or helps
    assert (together < 1.5 * alone + 0.05).all()
    assert noise.mean() < 1.1  # as good as its mean
    assert noise.max() < 1.5


# -- repeats ------------------------------------------------------------------------------------


@FEW
@given(seed=SEEDS, runs=st.integers(2, 4))
def test_rows_of_repeats_and_their_means_give_one_fit(seed, runs):
    masks = design(seed, m=24)
    scores = truth(seed, masks, 2) + 0.3 * normal(seed + 5, runs, 24, 2)
    rows = fit_surrogate(masks.repeat(runs, 1), scores.reshape(-1, 2), kernel="rbf")
    noise = scores.var(0).mean(0).sqrt() / runs**0.5  # of a mean
    means = fit_surrogate(masks, scores.mean(0), kernel="rbf", noise_std=noise)
    query = subsets.all_subsets(7)
    close(rows.predict(query), means.predict(query))
    for readout in READOUTS:
        answers = (each.attribute(readout, return_std=True) for each in (rows, means))
        close_with_deviations(*answers)
    close(rows.loo_error, means.loo_error)
    plain = fit_surrogate(masks, scores.mean(0), kernel="rbf")
    assert plain.noise_std is None
    chosen = [str((each.kernel_terms, each.sharing)) for each in (rows, plain)]
    if chosen[0] == chosen[1]:
        close(rows.loo_residuals, plain.loo_residuals)
    assert len(rows.masks) == 24 and (rows.counts == runs).all()
    close(rows.noise_std, scores.var(0).mean(0).sqrt())


def test_repeats_do_not_predict_each_other():
    """The reported error is that of subsets nobody has seen, not of twins."""
    found, true = [], []
    for seed in range(8):
        masks = design(seed, n=8, m=15)
        weights = normal(seed, 8)
        query = design(seed + 100, n=8, m=200)
        scores = (masks.double() @ weights).repeat(4) + 0.5 * normal(seed + 1, 60)
        surrogate = fit_surrogate(masks.repeat(4, 1), scores, kernel="linear")
        error = (surrogate.predict(query) - query.double() @ weights).square().mean()
        means = scores.reshape(4, 15).mean(0)
        true.append(error / means.var())
        found.append(surrogate.loo_error)
    assert torch.stack(found).mean() > 0.7 * torch.stack(true).mean()


def test_retrained_scores_are_taken_as_they_are():
    masks = design(0, m=20)
    weights = normal(0, 7)

    def train(mask, seed):
        return float(mask.double() @ weights + 0.1 * normal(seed + int(mask.sum()), 1))

    options = {"target_names": ["loss"], "progress": False}
    retrained = retrain_scores(train, masks, seeds=range(3), **options)
    surrogate = fit_surrogate(retrained, kernel="linear")
    assert surrogate.target_names == ("loss",) and len(surrogate.masks) == 20
    close(surrogate.noise_std, retrained.noise_std)
    close(surrogate.scores, retrained.mean)
    rows = fit_surrogate(masks.repeat(3, 1), retrained.values.reshape(60, 1), kernel="linear")
    close(surrogate.attribute("shapley"), rows.attribute("shapley"))
    with pytest.raises(TypeError, match="`scores` must be given, got none beside Tensor"):
        fit_surrogate(masks)


def test_few_repeats_measure_no_noise():
    masks = design(1, m=20)
    again = torch.cat([masks, masks[: MIN_REPEATS - 1]])
    assert fit_surrogate(again, normal(0, len(again))).noise_std is None
    again = torch.cat([masks, masks[:MIN_REPEATS]])
    assert float(fit_surrogate(again, normal(0, len(again))).noise_std) > 0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), repeats=st.integers(1, 4), level=st.floats(0.5, 0.99))
def test_few_repeats_narrow_the_range_of_the_noise_and_are_said(
    tmp_path_factory, seed, repeats, level
):
    masks = design(1, m=20)
    again = torch.cat([masks, masks[:repeats]])
    scores = normal(seed, len(again), 2)
    surrogate = fit_surrogate(again, scores, kernel="linear")
    plain = replace(surrogate, repeats_std=None, noise_degrees=0)
    apart = (scores[:repeats] - scores[20:]).square() / 2  # the variance of two runs
    std = apart.mean(0).sqrt()
    quantiles = [stats.chi2.ppf((1 + sign * level) / 2, repeats) for sign in (1, -1)]
    expected = torch.stack([std * (repeats / each) ** 0.5 for each in quantiles])
    close(surrogate.noise_range(level), expected.minimum(plain.noise_range(level)[1]))
    said = (
        f"({repeats} repeat{'s' * (repeats > 1)}: too few to be taken for the noise, which takes 5)"
    )
    assert said in surrogate.noise_summary and said in str(surrogate)
    assert surrogate.noise_std is None and "too few" not in plain.noise_summary
    assert torch.equal(surrogate.predict(masks, True)[1], plain.predict(masks, True)[1])
    path = tmp_path_factory.mktemp("few") / "surrogate.safetensors"
    surrogate.save(path)
    assert load_surrogate(path).noise_summary == surrogate.noise_summary


def test_subsets_of_different_precision_are_weighted():
    """Generalised least squares: the weights a dense solution has."""
    masks = design(2, m=30)
    scores, noise = truth(2, masks, 1), torch.rand(30).double() + 0.2
    surrogate = fit_surrogate(masks, scores[:, 0], kernel=Exponential(0.3), noise_std=noise)
    (term,) = surrogate.kernel_terms
    gram, ridges = term.kernel.gram(surrogate.masks), term.ridge / term.weights
    dual, intercept = weighted_kernel_ridge(gram, scores[:, 0], ridges)
    query = subsets.all_subsets(7)
    fresh = ~(query[:, None] == masks).all(2).any(1)
    expected = term.kernel.gram(surrogate._query(query), surrogate.masks) @ dual + intercept
    close(surrogate.predict(query[fresh]), expected[fresh])
    left_out = []
    for i in range(30):
        rest = torch.arange(30) != i
        one = weighted_kernel_ridge(gram[rest][:, rest], scores[rest, 0], ridges[rest])
        left_out.append(scores[i, 0] - gram[i, rest] @ one[0] - one[1])
    close(surrogate.loo_residuals, torch.stack(left_out))
    ratio = term.weights.max() / term.weights.min()
    assert ratio > 1.5 and (term.weights.argmax() == noise.argmin())


def weighted_kernel_ridge(gram, scores, ridges):
    """Dual coefficients (m,) and intercept by a dense inverse, ridges (m,)."""
    inverse = torch.linalg.inv(gram + ridges.diag())
    intercept = (inverse @ scores).sum() / inverse.sum()
    return inverse @ (scores - intercept), intercept


# -- known scores and noise ---------------------------------------------------------------------


@FEW
@given(seed=SEEDS, kernel=st.sampled_from(["auto", "linear", "rbf", "anova2", ["lasso"]]))
def test_shapley_values_sum_to_the_observed_ends(seed, kernel):
    masks = design(seed, m=30)
    inner = masks[masks.any(1) & ~masks.all(1)]
    masks = torch.cat([torch.zeros(1, 7).bool(), torch.ones(1, 7).bool(), inner])
    scores = truth(seed, masks, 2)
    scores[0] = 0.0  # a convention
    surrogate = fit_surrogate(masks, scores, kernel=kernel)
    close(surrogate.attribute("shapley").sum(0), scores[1] - scores[0])
    close(surrogate.predict(masks[:2]), scores[:2])


@FEW
@given(seed=SEEDS, readout=st.sampled_from(READOUTS))
def test_attributions_are_those_of_predictions_with_observed_scores(seed, readout):
    """Brute force over all subsets, for every kind of knowledge of the noise."""
    masks = design(seed, n=5, m=20)
    scores = truth(seed, masks, 2)
    query = reference.all_subsets(5)
    for options in ({}, {"noise_std": 0.3}, {"noise_std": 0.0}, {"known": [0, 3], "ridge": 0.5}):
        surrogate = fit_surrogate(masks, scores, **options)
        values = surrogate.predict(query, observed=True)
        close(surrogate.attribute(readout), reference.effect_functionals(5, readout) @ values)
        first, second = torch.triu_indices(5, 5, 1)
        pairs = reference.interaction_functionals(5, readout) @ values
        close(surrogate.interactions(readout)[first, second], pairs)


@pytest.mark.parametrize("n", [4, 10, 30])
@pytest.mark.parametrize("kernel", ["auto", "linear"])
def test_a_leave_one_out_design_answers_leave_one_out(n, kernel):
    masks = subsets.leave_one_out(n, include_full=True)
    effects = torch.linspace(1, 2, n).double()
    surrogate = fit_surrogate(masks, masks.double() @ effects, kernel=kernel)
    value, std = surrogate.attribute("loo", return_std=True)
    close(value, effects)
    assert (std > 0.2).all()  # nothing tells that single runs are without noise
    assert float(surrogate.loo_error) >= 1 and "Nothing is predicted" in str(surrogate)
    assert surrogate.warnings
    exact = fit_surrogate(masks, masks.double() @ effects, kernel=kernel, noise_std=0.0)
    value, std = exact.attribute("loo", return_std=True)
    close(value, effects)
    close(std, torch.zeros(n).double(), 1e-6)


def test_given_noise_shrinks_observed_differences():
    """The posterior mean: own variance over own plus noise."""
    masks = subsets.leave_one_out(8, include_full=True)
    scores = masks.double() @ torch.linspace(1, 2, 8).double() + normal(0, 9)
    sizes = [
        fit_surrogate(masks, scores, noise_std=noise).attribute("loo").abs().mean()
        for noise in (0.0, 0.2, 0.5, 50.0)
    ]
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]
    close(fit_surrogate(masks, scores, noise_std=0.0).attribute("loo"), scores[-1] - scores[:-1])


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("noise", [0.0, 0.4])
def test_deviations_with_known_noise_are_those_of_dense_algebra(readout, noise):
    """A Gaussian process of kernel plus identity, observed with noise, on all subsets at once."""
    n, masks = 5, design(4, n=5, m=20)
    scores = truth(4, masks, 1)[:, 0]
    surrogate = fit_surrogate(masks, scores, kernel=Exponential(0.4), noise_std=noise)
    (term,) = surrogate.kernel_terms
    query = reference.all_subsets(n)
    gram = term.kernel.gram(surrogate._query(query))
    own = float(term.nugget_share * term.ridge)
    prior = gram + own * torch.eye(32).double()
    fitted = torch.tensor([int((query == mask).all(1).nonzero()) for mask in masks])
    left = float(term.ridge) - own
    scale = (term.signal_variance * surrogate.unit.square()).item()
    first, second = torch.triu_indices(n, n, 1)
    factors = [surrogate._readout_factors(readout, order)[0] for order in (1, 2)]
    for functionals, deviation, factor in (
        (
            reference.effect_functionals(n, readout),
            surrogate.attribute(readout, True)[1],
            factors[0],
        ),
        (
            torch.eye(32, dtype=torch.float64),
            surrogate.predict(query, True)[1],
            surrogate._size_factors[query.sum(1), 0],
        ),
        (
            reference.interaction_functionals(n, readout),
            surrogate.interactions(readout, True)[1][first, second],
            factors[1],
        ),
    ):
        variance = reference.posterior_variance(functionals, prior, fitted, left, True)
        close(deviation.square(), variance * scale * factor)


@pytest.mark.parametrize("kernel", ["auto", Exponential(0.01)], ids=str)
def test_intervals_are_no_narrower_than_known_noise(kernel):
    """Whatever ridge fits best: noise that was declared, or measured, is in every interval."""
    held = []
    for seed in range(12):
        masks = design(seed, n=5, m=24)
        effects = normal(seed, 5)
        clean = masks.double() @ effects
        runs = clean + 0.5 * normal(seed + 1, 2, 24)
        for surrogate in (
            fit_surrogate(masks, runs[0], kernel=kernel, noise_std=0.5),
            fit_surrogate(masks.repeat(2, 1), runs.reshape(-1), kernel=kernel),
        ):
            for readout in READOUTS:
                value, std = surrogate.attribute(readout, return_std=True)
                assert (std > 0.05).all()
                held.append(((value - effects).abs() <= 1.96 * std).double())
    assert torch.cat(held).mean() > (0.85 if kernel == "auto" else 0.8)


def test_measured_noise_does_not_drown_effects_that_few_subsets_show():
    """A ridge held to the whole of the noise gave 1.26 times the errors of least squares here."""
    effects, errors = np.array([1.0, 2.0, -1.0, 0.5]), []
    for seed in range(24):
        generator = np.random.default_rng(seed)
        masks = generator.random((60, 4)) < 0.5
        scores = masks @ effects + generator.normal(size=60)
        plain = LinearRegression().fit(masks, scores).coef_
        fits = (fit_surrogate(masks, scores, kernel=kernel) for kernel in ("linear", "auto"))
        found = [plain, *(fit.attribute("shapley") for fit in fits)]
        errors.append([np.square(each - effects).mean() ** 0.5 for each in found])
    of_plain, *others = np.mean(errors, 0)
    assert max(others) < 1.15 * of_plain


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, exponent=st.integers(-150, 150))
def test_runs_of_one_subset_weigh_by_their_own_noise(seed, exponent):
    """By 1 / variance, as weights say it; the mean of a sure and a noisy run is the sure one's."""
    masks = design(seed, n=5, m=16).repeat(3, 1)
    generator = torch.Generator().manual_seed(seed)
    sureness = 10 ** (4 * torch.rand(48, generator=generator, dtype=torch.float64) - 2)
    noise = 0.3 / sureness.sqrt()
    scores = masks.double() @ normal(seed, 5) + noise * normal(seed + 1, 48)
    unit, options = 10.0**exponent, {"kernel": "rbf"}
    one = fit_surrogate(masks, scores * unit, noise_std=noise * unit, **options)
    other = fit_surrogate(masks, scores, noise_std=0.3, sample_weight=sureness, **options)
    for readout in READOUTS:
        value, std = (each / unit for each in one.attribute(readout, True))
        close_with_deviations((value, std), other.attribute(readout, True), 1e-5)


def test_a_run_without_noise_stands_for_its_subset_alone():
    masks = design(3, m=20).repeat(2, 1)
    scores = truth(3, masks, 2) + torch.cat([torch.zeros(20, 2), 3 * torch.ones(20, 2)])
    noise = torch.arange(40)[:, None].expand(40, 2) >= 20
    found = observe(masks, scores, noise_std=3.0 * noise)
    close(found.scores, scores[:20], 0)
    assert not bool(found.noise.any()) and (found.counts == 1).all()


@settings(max_examples=15, deadline=None)
@given(seed=SEEDS, level=st.floats(0.1, 3.0), kernel=st.sampled_from(["linear", "auto", "rbf"]))
def test_a_ridge_stands_for_the_noise_at_least(seed, level, kernel):
    """However well subsets happen to be predicted: what is added to every interval has its size."""
    masks = design(seed, n=5, m=24).repeat(2, 1)
    scores = truth(seed, masks, 2) + level * normal(seed + 1, 48, 2)
    for options in ({}, {"noise_std": level}):
        found = fit_surrogate(masks, scores, kernel=kernel, share_ridge=False, **options)
        for term in found.kernel_terms:
            unit, noise = found.unit[term.columns], found.noise_std[term.columns] / 2**0.5
            assert (term.ridge * term.signal_variance >= 0.999 * (noise / unit).square()).all()


@pytest.mark.parametrize(
    "options", [{}, {"ridge": 1.0}, {"ridge": 1.0, "criterion": "rank"}], ids=str
)
def test_candidates_have_the_error_of_the_fit_whatever_its_repeats(options):
    masks = design(3, m=20).repeat(4, 1)
    scores = truth(3, masks, 1) + normal(4, 80, 1)
    found = fit_surrogate(masks, scores, kernel="linear", **options)
    (chosen,) = [row for row in found.candidates if row.num_chosen]
    assert chosen.error == pytest.approx(float(found.loo_error), 1e-6)
    shown = [line for line in str(found.candidates).splitlines() if line.startswith("linear")]
    assert len(shown) == 1 and shown[0].endswith(" 1") and f"{chosen.ridge:.3g}" in shown[0]


@pytest.mark.parametrize("options", [{}, {"ridge": 0.7}, {"criterion": "rank"}], ids=str)
def test_errors_of_candidates_weigh_subsets_in_both_of_their_parts(options):
    """The mean of the others is as good as 1, whatever subsets have been run most."""
    times = torch.tensor([15, 15, 15] + [1] * 17)
    masks = design(1, m=20).repeat_interleave(times, 0)
    scores = truth(1, design(1, m=20), 1).repeat_interleave(times, 0) + normal(1, len(masks), 1)
    found = fit_surrogate(masks, scores, kernel="rbf", **options)
    (chosen,) = [row for row in found.candidates if row.num_chosen]
    weights = found.kernel_terms[0].weights
    share = weights / weights.sum()
    values = found.scores[:, 0] - share @ found.scores[:, 0]
    variance = share @ values.square() / (1 - share.square().sum())
    expected = share @ found.loo_residuals[:, 0].square() / variance
    assert chosen.error == pytest.approx(float(expected), rel=1e-6)


def test_precise_scores_are_believed_and_others_are_not():
    """Uneven noise: full and leave-one-out subsets scored a hundred times better."""
    masks = torch.cat([subsets.leave_one_out(6, include_full=True), design(3, n=6, m=40)])
    masks = masks[torch.tensor([int((masks == row).all(1).nonzero()[0]) for row in masks]).unique()]
    noise = torch.where(masks.sum(1) >= 5, 0.01, 1.0).double()
    scores = masks.double() @ normal(1, 6) + noise * normal(2, len(masks))
    scores = scores + 0.5 * normal(3, len(masks))  # peculiar to subsets
    surrogate = fit_surrogate(masks, scores, noise_std=noise)
    value, std = surrogate.attribute("loo", return_std=True)
    without = [int((~row).nonzero()) for row in masks[masks.sum(1) == 5]]
    observed = scores[masks.all(1)] - scores[masks.sum(1) == 5]
    close(value[without], observed, 0.02)
    assert (std < 0.05).all()


def test_a_target_is_weighted_by_its_own_noise():
    masks = design(4, m=40)
    scores = truth(4, masks, 2)
    noise = torch.full((40, 2), 0.05).double()
    noise[::2, 0] = 3.0
    scores[:, 0] += noise[:, 0] * normal(9, 40)
    both = fit_surrogate(masks, scores, noise_std=noise)
    alone = fit_surrogate(masks, scores[:, 1], noise_std=noise[:, 1])
    query = subsets.all_subsets(7)
    close(both.predict(query)[:, 1], alone.predict(query))


def test_without_an_intercept_zero_is_no_better_than_it_is():
    masks = design(5, m=40)
    scores = 100 + truth(5, masks, 1)[:, 0]
    surrogate = fit_surrogate(masks, scores, kernel="exponential", center=False)
    query = design(6, m=40)
    fresh = query[~(query[:, None] == masks).all(2).any(1)]
    assert (surrogate.predict(fresh) - 100).abs().max() < 20


@pytest.mark.parametrize("holes", [[5], [5, 9, 12]])
def test_an_empty_subset_is_judged_beside_missing_scores(holes):
    masks = torch.cat([subsets.mixed_sizes(8, 60, seed=0), torch.zeros(1, 8).bool()])
    scores = truth(2, masks, 2)
    scores[-1] = -300.0
    scores[holes, 1] = torch.nan
    surrogate = fit_surrogate(masks, scores, missing="drop")
    assert surrogate.excluded[-1].all() and (surrogate.loo_error < 1).all()
    single = fit_surrogate(masks, scores[:, 1], missing="drop")
    assert single.excluded[-1].all()
    value, std = single.predict(masks[-1:], return_std=True)
    assert float(value) == pytest.approx(-300) and float(std) == 0.0


@pytest.mark.parametrize("threads", [1, 3])
def test_targets_with_gaps_of_their_own_are_fitted_in_threads(threads):
    """Each is a fit to its own rows."""
    masks = design(4, m=40)
    scores = truth(4, masks, 5)
    scores[torch.arange(5), torch.arange(5)] = torch.nan
    before = torch.get_num_threads()
    together = fit_surrogate(masks, scores, missing="drop", kernel="rbf")
    try:
        torch.set_num_threads(threads)
        again = fit_surrogate(masks, scores, missing="drop", kernel="rbf")
    finally:
        torch.set_num_threads(before)
    for j in range(5):
        rows = torch.arange(40) != j
        alone = fit_surrogate(masks[rows], scores[rows, j], kernel="rbf")
        for found in (together, again):
            close(found.predict(masks)[:, j], alone.predict(masks))
            close(found.attribute("shapley", True)[1][:, j], alone.attribute("shapley", True)[1])


def test_a_run_without_scores_tells_nothing():
    masks = design(7, m=30)
    masks[:, 2] = True
    scores = truth(7, masks, 2)
    extra = masks[:1].clone()
    extra[0, 2] = False
    more = torch.cat([masks, extra]), torch.cat([scores, torch.full((1, 2), torch.nan).double()])
    one, other = fit_surrogate(masks, scores), fit_surrogate(*more, missing="drop")
    assert other.constant_tasks == ("2",)
    close(other.attribute("shapley"), one.attribute("shapley"))


def test_holes_in_one_target_do_not_weigh_in_another():
    masks = design(8, m=20).repeat(2, 1)
    scores = truth(8, masks, 2)
    holes = scores.clone()
    holes[20:25, 0] = torch.nan
    query = subsets.all_subsets(7)
    one, other = (
        fit_surrogate(masks, table, kernel="linear", ridge=0.5, missing="drop")
        for table in (scores, holes)
    )
    close(other.predict(query)[:, 1], one.predict(query)[:, 1])


def test_known_rows_are_interpolated():
    masks, scores = design(5), truth(5, design(5), 2) * 3
    surrogate = fit_surrogate(masks, scores, kernel="linear", known=[4, 7])
    value, std = surrogate.predict(masks, return_std=True)
    close(value[[4, 7]], scores[[4, 7]])
    close(std[[4, 7]], torch.zeros(2, 2).double(), 1e-5)
    flags = torch.zeros(len(masks), dtype=torch.bool)
    flags[[4, 7]] = True
    close(fit_surrogate(masks, scores, kernel="linear", known=flags).predict(masks), value)
    noise = torch.full((len(masks),), 0.5)
    noise[[4, 7]] = 0.0
    value = fit_surrogate(masks, scores, kernel="linear", noise_std=noise).predict(masks)
    close(value[[4, 7]], scores[[4, 7]])


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("center", [True, False])
def test_deviations_beside_an_empty_subset_are_those_of_dense_algebra(readout, center):
    """What was set apart is known; the rest of the readout is a Gaussian process."""
    n, query = 5, reference.all_subsets(5)
    inner = query[query.any(1)][torch.randperm(31)[:20]]
    masks = torch.cat([inner, torch.zeros(1, n).bool()])
    scores = truth(1, masks, 1)[:, 0] + (20 if center else 0)
    scores[-1] = -500.0
    options = {"kernel": Exponential(0.4), "noise_std": 0.3, "center": center}
    surrogate = fit_surrogate(masks, scores, **options)
    assert surrogate.excluded[-1].all()
    (term,) = surrogate.kernel_terms
    own = float(term.nugget_share * term.ridge)
    prior = term.kernel.gram(surrogate._query(query)) + own * torch.eye(32).double()
    fitted = torch.tensor([int((query == mask).all(1).nonzero()) for mask in inner])
    functionals = reference.effect_functionals(n, readout).clone()
    functionals[:, ~query.any(1)] = 0.0
    left = float(term.ridge) - own
    variance = reference.posterior_variance(functionals, prior, fitted, left, center)
    scale = (term.signal_variance * surrogate.unit.square()).item()
    deviation = surrogate.attribute(readout, return_std=True)[1]
    close(deviation.square(), variance * scale * surrogate._readout_factors(readout, 1)[0])


def test_a_convention_for_the_empty_subset_is_no_data_point():
    masks = subsets.mixed_sizes(8, 60, seed=0)
    scores = 10.0 + masks.double() @ normal(0, 8) * 0.1
    with_empty = torch.cat([masks, torch.zeros(1, 8, dtype=torch.bool)])
    surrogate = fit_surrogate(with_empty, torch.cat([scores, torch.zeros(1).double()]))
    assert surrogate.excluded.sum() == 1 and "empty subset" in str(surrogate)
    assert float(surrogate.loo_error) < 0.2
    without = fit_surrogate(masks, scores)
    query = subsets.mixed_sizes(8, 40, seed=9)
    close(surrogate.predict(query), without.predict(query))
    assert float(surrogate.predict(with_empty[-1:])) == pytest.approx(0.0, abs=1e-9)
    smooth = masks.double() @ normal(0, 8) * 0.1
    continued = fit_surrogate(with_empty, torch.cat([smooth, torch.zeros(1).double()]))
    assert not continued.excluded.any()


# -- missing scores, constant tasks, what is kept -----------------------------------------------


def test_missing_scores_leave_the_other_targets_alone():
    masks = design(6, m=50)
    scores = truth(6, masks, 3)
    holes = scores.clone()
    holes[3:9, 1] = torch.nan
    surrogate = fit_surrogate(masks, holes, missing="drop")
    present = ~holes[:, 1].isnan()
    for columns, rows in (([0, 2], torch.ones(50, dtype=torch.bool)), ([1], present)):
        alone = fit_surrogate(masks[rows], scores[rows][:, columns])
        query = subsets.all_subsets(7)
        close(surrogate.predict(query)[:, columns], alone.predict(query))
        for readout in READOUTS:
            found = [each[:, columns] for each in surrogate.attribute(readout, return_std=True)]
            close_with_deviations(found, alone.attribute(readout, return_std=True))
        close(surrogate.loo_error[columns], alone.loo_error)
    assert torch.equal(surrogate.loo_residuals.isnan(), holes.isnan())
    with pytest.raises(ValueError, match=r"`scores` must be finite, got 6 NaN.*missing='drop'"):
        fit_surrogate(masks, holes)


@FEW
@given(seed=SEEDS, on=st.booleans(), kernel=st.sampled_from(["auto", "linear", "rbf", "lasso"]))
def test_a_constant_task_changes_no_other(seed, on, kernel):
    masks = design(seed)
    scores = truth(seed, masks, 2)
    column = torch.full((len(masks), 1), on)
    more = torch.cat([masks[:, :3], column, masks[:, 3:]], 1)
    one = fit_surrogate(masks, scores, kernel=kernel)
    other = fit_surrogate(more, scores, kernel=kernel)
    others = [0, 1, 2, 4, 5, 6, 7]
    for readout in READOUTS:
        found = other.attribute(readout, return_std=True)
        expected = one.attribute(readout, return_std=True)
        close_with_deviations([each[others] for each in found], expected, 1e-6)
        assert not any(each[3].any() for each in found)
        matrix = other.interactions(readout)
        close(matrix[others][:, others], one.interactions(readout), 1e-6)
        assert not matrix[3].any() and not matrix[:, 3].any()
    assert other.constant_tasks == ("3",) and "Attribution 0 for '3'" in str(other)


def test_what_was_observed_is_saved(tmp_path):
    masks = torch.cat([design(8), design(8)[:9]])
    masks[:, 2] = True
    scores = truth(8, masks, 2)
    scores[[2, 15], 1] = torch.nan  # of a subset with another run, and of one without
    scores[:, 0] *= 1e200
    surrogate = fit_surrogate(masks, scores, missing="drop", known=[5])
    surrogate.save(tmp_path / "s")
    loaded = load_surrogate(tmp_path / "s")
    assert str(loaded) == str(surrogate) and torch.equal(loaded.counts, surrogate.counts)
    for readout in READOUTS:
        expected = surrogate.attribute(readout, return_std=True)
        assert all(map(torch.equal, loaded.attribute(readout, return_std=True), expected))
    assert torch.equal(loaded.predict(masks), surrogate.predict(masks))


@pytest.mark.parametrize("kernel", ["auto", "linear", "lasso", "least_squares"])
def test_every_fit_to_masks_has_intervals(kernel):
    for scores in (truth(0, design(0), 2), normal(1, 40, 2)):
        surrogate = fit_surrogate(design(0), scores, kernel=kernel)
        assert surrogate.has_intervals
        _, std = surrogate.attribute("shapley", return_std=True)
        assert std.isfinite().all() and (std > 0).all()


def test_intervals_of_a_target_that_is_noise_hold_zero():
    """By the mean: 0, as uncertain as a kernel that may see half of the variance."""
    held = []
    for seed in range(20):
        surrogate = fit_surrogate(design(seed, m=60), normal(seed, 60))
        value, std = surrogate.attribute("shapley", return_std=True)
        held.append((value.abs() <= 1.96 * std).double().mean())
    assert torch.stack(held).mean() > 0.9


@pytest.mark.parametrize(
    "options, found",
    [
        ({"noise_std": -1.0}, "`noise_std` must be at least 0, got -1"),
        ({"noise_std": [1.0, 2.0, 3.0]}, "`noise_std` must be a number, or of shape"),
        ({"known": [40]}, "`known` must be .* below 40"),
        ({"known": [0.5]}, "`known` must be"),
        ({"missing": "mean"}, "`missing` must be one of 'error', 'drop'"),
        ({"sample_weight": [1.0]}, r"`sample_weight` must be of shape \(40,\), got shape \(1\)"),
        ({"sample_weight": [-1.0] * 40}, "`sample_weight` must be at least 0, got -1"),
        ({"sample_weight": [0] * 40}, "`sample_weight` must be above 0 for some rows"),
        ({"sample_weight": [float("nan")] * 40}, "`sample_weight` must be finite"),
    ],
)
def test_checks(options, found):
    with pytest.raises(ValueError, match=f"^{found}"):
        fit_surrogate(design(0), normal(0, 40), **options)


def test_scores_are_means_of_what_was_given():
    masks = torch.tensor([[1, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.bool)
    seen = observe(masks, torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert seen.masks.values.tolist() == masks[[0, 1, 3]].tolist()
    assert seen.scores[:, 0].tolist() == [2.5, 2.0, 8.0] and seen.counts[:, 0].tolist() == [2, 1, 1]
    exact = observe(masks, np.array([1.0, 2.0, 4.0, 8.0]), known=[2])
    assert exact.scores[:, 0].tolist() == [4.0, 2.0, 8.0]
    assert exact.known[:, 0].tolist() == [True, False, False]
    assert Linear().gram(seen.masks).shape == (3, 3)


@pytest.mark.parametrize("kernel", ["auto", "rbf"])
@pytest.mark.parametrize("noise_std", [None, 0.0])
def test_a_constant_target_beside_known_noise_is_predicted_by_its_constant(kernel, noise_std):
    generator = torch.Generator().manual_seed(1)
    masks = torch.rand(80, 5, generator=generator) < 0.5  # with repeats, which measure the noise
    moving = masks.double().sum(1) + 0.1 * torch.randn(80, generator=generator).double()
    scores = torch.stack([moving, torch.ones(80).double()], 1)
    found = fit_surrogate(masks, scores, kernel=kernel, noise_std=noise_std)
    mean, std = found.predict(masks, return_std=True)
    assert torch.equal(mean[:, 1], torch.ones(80).double()) and not bool(std.isnan().any())
    assert not bool(found.attribute("shapley")[:, 1].any())


@pytest.mark.parametrize("unit", [1e-300, 1e-200, 1e-165, 1e160, 1e290])
def test_known_noise_of_any_size(unit):
    """Its variance, in the unit of the scores, would be 0 or infinite."""
    masks = design(0)
    scores = truth(0, masks, 1)[:, 0] + 0.1 * normal(1, len(masks))
    one, other = (
        fit_surrogate(masks, scores * u, noise_std=0.1 * u, kernel="linear") for u in (1.0, unit)
    )
    close(other.noise_std / unit, one.noise_std, 1e-6)
    close(other.attribute("shapley", True)[1] / unit, one.attribute("shapley", True)[1], 1e-6)


# -- weights of rows ----------------------------------------------------------------------------

SURENESS = torch.rand(40, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.1


@pytest.mark.parametrize("options", [{"ridge": 0.3}, {"ridge": 0.3, "center": False}], ids=str)
@pytest.mark.parametrize("kernel", [Exponential(gamma=0.5), Linear(), "lasso"], ids=str)
def test_weighted_rows_are_left_out_as_by_refitting(kernel, options):
    masks, scores = design(1), truth(1, design(1), 2)
    found = fit_surrogate(masks, scores, kernel=kernel, sample_weight=SURENESS, **options)
    if kernel == "lasso":  # by folds
        weighed = fit_surrogate(masks, scores, kernel=kernel, sample_weight=7 * SURENESS, **options)
        close(weighed.predict(masks), found.predict(masks))
        return
    for i in range(0, 40, 7):
        rest = torch.arange(40) != i
        kept = {"kernel": kernel, "sample_weight": SURENESS[rest], **options}
        alone = fit_surrogate(masks[rest], scores[rest], **kept)
        close(found.loo_residuals[i], scores[i] - alone.predict(masks[i : i + 1])[0])


@pytest.mark.parametrize("kernel", ["auto", "rbf", "ard", "least_squares"])
@pytest.mark.parametrize("solver", ["eigh", CG], ids=["eigh", "cg"])
def test_only_the_proportions_of_weights_decide_where_the_ridge_is_chosen(kernel, solver, tmp_path):
    if solver is CG and kernel in ("ard", "least_squares"):
        pytest.skip("these factor")
    masks, scores = design(2), truth(2, design(2), 2)
    options = {"kernel": kernel, "solver": solver}
    plain = fit_surrogate(masks, scores, **options)
    even = fit_surrogate(masks, scores, sample_weight=torch.full((40,), 3), **options)
    torch.testing.assert_close(
        even.attribute("shapley"), plain.attribute("shapley"), rtol=0, atol=0
    )
    one, other = (
        fit_surrogate(masks, scores, sample_weight=unit * SURENESS, **options)
        for unit in (1.0, 1e-200)
    )
    assert (one.predict(masks) - plain.predict(masks)).abs().max() > 1e-4
    close_with_deviations(other.predict(masks, True), one.predict(masks, True), 1e-5)
    one.save(tmp_path / "weighted.safetensors")
    again = load_surrogate(tmp_path / "weighted.safetensors")
    for readout in READOUTS:
        close_with_deviations(again.attribute(readout, True), one.attribute(readout, True))


@pytest.mark.parametrize("ridge", [0.3, "loo"])
def test_tables_fitted_together_have_weights_of_their_own_or_the_same(ridge):
    masks = design(3)
    scores = torch.stack([truth(seed, masks, 2) for seed in range(3)])
    each = torch.stack([SURENESS, SURENESS.flip(0), torch.ones(40).double()])
    for weights in (each, SURENESS):
        options = {"kernel": ["linear", "rbf"], "ridge": ridge if ridge == "loo" else 0.3}
        options["kernel"] = options["kernel"] if ridge == "loo" else "linear"
        found = fit_many(masks, scores, sample_weight=weights, **options)
        for one, outcome, own in zip(found, scores, weights.expand(3, 40), strict=True):
            alone = fit_surrogate(masks, outcome, sample_weight=own, **options)
            close_with_deviations(one.attribute("loo", True), alone.attribute("loo", True))
    with pytest.raises(ValueError, match=r"`sample_weight` must be of shape \(40,\), got shape"):
        fit_many(masks, scores, sample_weight=torch.ones(3))


def test_whole_weights_are_repeated_rows_where_the_ridge_is_given():
    masks, scores = design(4), torch.stack([truth(seed, design(4), 1)[:, 0] for seed in (0, 1)])
    counts = torch.arange(40) % 3 + 1
    options = {"kernel": "linear", "ridge": 0.7}
    found = fit_many(masks, scores, sample_weight=counts, **options)
    for one, outcome in zip(found, scores, strict=True):
        rows = torch.arange(40).repeat_interleave(counts)
        repeated = fit_surrogate(masks[rows], outcome[rows], **options)
        close(one.predict(masks), repeated.predict(masks))
        peer = Ridge(alpha=0.7).fit(masks, outcome, sample_weight=counts)
        close(one.predict(masks), torch.from_numpy(peer.predict(masks.numpy())))


def test_sure_rows_lead():
    """Half of the rows are ten times as noisy, and weights that say so halve the error."""
    errors = []
    for seed in range(10):
        every = design(seed, m=128)
        clean = FAMILIES["saturating"](every, seed)
        std = torch.where(torch.arange(60) % 2 == 0, 0.1, 1.0).double()
        scores = clean[:60] + std * normal(seed + 5, 60)
        query = every[60:], clean[60:]
        weights = None, 1 / std.square()
        fits = (fit_surrogate(every[:60], scores, sample_weight=each) for each in weights)
        errors.append(torch.stack([held_out_error(fit, *query) for fit in fits]))
    plain, weighted = torch.stack(errors).mean(0)
    assert weighted < plain / 2


@pytest.mark.parametrize("ridge", ["loo", 0.3])
def test_a_weight_divides_the_variance_of_given_noise(ridge):
    masks, scores = design(4), truth(4, design(4), 2)
    options = {"kernel": "rbf", "ridge": ridge}
    one = fit_surrogate(masks, scores, noise_std=0.5, sample_weight=SURENESS, **options)
    each = 0.5 / SURENESS.sqrt()[:, None]
    close(one.noise_std, each.square().mean().sqrt().expand(2), 1e-12)
    if ridge == "loo":
        other = fit_surrogate(masks, scores, noise_std=each.expand(40, 2), **options)
        close_with_deviations(one.attribute("loo", True), other.attribute("loo", True))


def test_weights_of_repeats():
    masks = design(5)[:8].repeat_interleave(torch.tensor([1, 2, 3, 1, 2, 3, 1, 2]), 0)
    scores, weights = normal(5, len(masks), 2), SURENESS[: len(masks)]
    found = observe(masks, scores, sample_weight=weights)
    subset = found.masks.values[:, None].eq(masks).all(2)  # (8, M)
    total = subset.double() @ weights
    means = (subset.double() * weights) @ scores / total[:, None]
    within = weights[:, None] * (scores - means[subset.long().argmax(0)]).square()
    close(found.scores, means, 1e-12)
    close(found.precision[:, 0], total, 1e-12)
    deviation = (within.sum(0) / (len(masks) - 8)).sqrt()
    close(found.noise, deviation / total[:, None].sqrt(), 1e-12)
    assert not found.uneven  # the noise is measured, at weight 1
    close(
        fit_surrogate(masks, scores, sample_weight=torch.ones(len(masks))).noise_std,
        fit_surrogate(masks, scores).noise_std,
        1e-12,
    )


@pytest.mark.parametrize("extra", [3, 40])  # rows; 40 measure the noise
@pytest.mark.parametrize("kernel", ["least_squares", "lasso", ("least_squares",)], ids=str)
def test_linear_surrogates_count_every_run(kernel, extra):
    """Least squares on all rows is what the literature fits; means alone would forget how many."""
    rows = torch.arange(40 + extra) % 40
    rows = torch.where(rows < 20, rows, rows % 7)
    masks, scores = design(7)[rows], truth(7, design(7), 2)[rows] + normal(7, len(rows), 2)
    found = fit_surrogate(masks, scores, kernel=kernel)
    every = torch.cat([masks, ~masks[:9]])
    if kernel != "lasso":
        peer = LinearRegression(fit_intercept=False).fit(masks.numpy(), scores.numpy())
        close(found.predict(every), torch.from_numpy(peer.predict(every.numpy())))
        rest = (masks != masks[0]).any(1)  # a subset is left out with all of its runs
        peer.fit(masks[rest].numpy(), scores[rest].numpy())
        own = scores[~rest].mean(0) - torch.from_numpy(peer.predict(masks[:1].numpy()))[0]
        close(found.loo_residuals[0], own)
        return
    seen = observe(masks, scores)
    tables = seen.masks.values, seen.scores
    weighted = fit_surrogate(*tables, kernel=kernel, sample_weight=seen.counts[:, 0])
    close(found.predict(every), weighted.predict(every))


def test_weights_go_with_their_labels_and_through_maps():
    masks, scores = design(6), 1 / (1 + torch.exp(-truth(6, design(6), 1)[:, 0]))
    rows = [f"run {i}" for i in range(40)]
    weights = pd.Series(SURENESS.numpy(), rows)
    tables = pd.DataFrame(masks.numpy(), rows), pd.Series(scores.numpy(), rows)
    options = {"kernel": "rbf", "warp": "logit"}
    one = fit_surrogate(*tables, sample_weight=weights[::-1], **options)
    other = fit_surrogate(masks, scores, sample_weight=SURENESS, **options)
    np.testing.assert_allclose(one.predict(masks), other.predict(masks), rtol=0, atol=1e-9)
    assert one.warps[0].surrogate.kernel_terms[0].weights is not None
