"""Scores with estimates beside them: against dense kriging, refitting and all 2^n subsets."""

from dataclasses import replace

import pytest
import reference
import torch
from problems import close
from safetensors import safe_open

from ksm_ext import (
    RBF,
    Exponential,
    Size,
    fit_surrogate,
    load_surrogate,
    retrain_scores,
)
from ksm_ext.surrogates.spectral import SpectralRidge, TrendRidge
from ksm_ext.surrogates.storage import write_state

N = 8
ALL = reference.all_subsets(N)
centred_or_not = pytest.mark.parametrize("center", [True, False])
one_or_two_levels = pytest.mark.parametrize("num_levels", [1, 2])


def truth(t=2):
    """(2^n, t) a function with main effects and a pair."""
    generator = torch.Generator().manual_seed(3)
    main = torch.randn(N, t, generator=generator, dtype=torch.float64)
    return ALL.double() @ main + 1.5 * (ALL[:, :1] & ALL[:, 1:2]) + 2


def estimates(level=0, num_subsets=80, t=2):
    """Masks and cheap scores: in another unit, and wrong somewhere else at each level."""
    generator = torch.Generator().manual_seed(10 + level)
    rows = torch.randperm(2**N, generator=generator)[:num_subsets]
    bend = torch.randn(N, t, generator=generator, dtype=torch.float64)
    return ALL[rows], (0.3 * truth(t) + 0.2 * torch.sin(ALL.double() @ bend) - 5)[rows]


def observed_rows(m=18):
    return torch.randperm(2**N, generator=torch.Generator().manual_seed(5))[:m]


def fitted(num_levels=1, m=18, **options):
    rows = observed_rows(m)
    levels = [fit_surrogate(*estimates(level)) for level in range(num_levels)]
    return fit_surrogate(ALL[rows], truth()[rows], estimates=levels, **options), levels, rows


def dense(surrogate, levels, rows, j, nugget=False):
    """Means (N,), covariances (N, N) and coefficients of target j, in units of the scores."""
    (term,) = [each for each in surrogate.kernel_terms if j in each.columns.tolist()]
    at = term.columns.tolist().index(j)
    ridge, signal = float(term.ridge[at]), float(term.signal_variance[at])
    functions = [each.predict(ALL, observed=True)[:, j] for each in levels]
    constant = [torch.ones(2**N, dtype=torch.float64)] * surrogate.center
    basis = torch.stack([*constant, *functions], 1)
    gram = term.kernel.gram(surrogate.masks.__class__.of(ALL))
    scores = surrogate.scores[:, j]
    found = reference.kriging(gram, rows, scores, basis, ridge, ridge if nugget else 0.0)
    mean, covariance, slopes = found
    return mean, covariance * signal * surrogate.unit[j] ** 2, slopes[-len(levels) :]


# -- the algebra --------------------------------------------------------------------------------


def ridge_problem(center, p=2, q=3, m=14):
    rows = observed_rows(m)
    gram = RBF(gamma=0.2).gram(fit_surrogate(ALL[rows], truth()[rows], ridge=1.0).masks)
    weights = torch.rand(m, dtype=torch.float64) + 0.5
    basis, scores = torch.randn(p, m, q).double() + 3, torch.randn(m, q).double()
    factor = SpectralRidge(gram, center=center, weights=weights)
    return gram, weights, basis, scores, factor, TrendRidge(factor, basis)


@centred_or_not
@pytest.mark.parametrize("ridge", [1e-3, 0.4, 50.0])
def test_a_trend_is_generalised_least_squares(center, ridge):
    gram, weights, basis, scores, factor, trend = ridge_problem(center)
    rotated, everything = factor.rotate(scores), torch.arange(len(gram))
    one = [torch.ones(len(gram), dtype=torch.float64)] * center
    for j in range(3):
        columns = torch.stack([*one, *basis[:, :, j]], 1)
        options = columns, ridge / weights
        mean, _, slopes = reference.kriging(gram, everything, scores[:, j], *options)
        close(trend.coefficients(rotated, ridge)[:, j], slopes[-2:], 1e-8)
        dual = trend.dual(rotated, ridge)
        close(ridge / weights * dual[:, j], scores[:, j] - mean, 1e-8)
        left_out = []
        for i in everything.tolist():
            rest = everything[everything != i]
            rest_ridge = ridge / weights[rest]
            mean, _, _ = reference.kriging(gram, rest, scores[rest, j], columns, rest_ridge)
            left_out.append(scores[i, j] - mean[i])
        close(trend.leave_one_out(rotated, ridge)[:, j], torch.stack(left_out), 1e-7)


@centred_or_not
def test_likelihoods_differ_as_dense_ones(center):
    gram, weights, basis, scores, factor, trend = ridge_problem(center)
    rotated = factor.rotate(scores)
    one = [torch.ones(len(gram), dtype=torch.float64)] * center
    for j in range(3):
        columns = torch.stack([*one, *basis[:, :, j]], 1)
        expected = [
            reference.restricted_likelihood(gram, scores[:, j], columns, ridge, weights)
            for ridge in (1e-3, 0.3, 20.0)
        ]
        found = [trend.log_likelihood(rotated, ridge)[j] for ridge in (1e-3, 0.3, 20.0)]
        close(torch.stack(found).diff(), torch.tensor(expected, dtype=torch.float64).diff(), 1e-8)


def test_functions_that_tell_nothing_get_no_coefficient():
    """A constant has none, and one that stands twice has half of it each."""
    *_, basis, scores, factor, _ = ridge_problem(True, p=1)
    rotated, alone = factor.rotate(scores), TrendRidge(factor, basis)
    three = TrendRidge(factor, torch.cat([basis, torch.full_like(basis, 7.0), basis]))
    expected = alone.coefficients(rotated, 0.3)[0]
    close(three.coefficients(rotated, 0.3), torch.stack([expected / 2, 0 * expected, expected / 2]))
    close(three.leave_one_out(rotated, 0.3), alone.leave_one_out(rotated, 0.3))
    likelihoods = [each.log_likelihood(rotated, 0.3) for each in (three, alone)]
    close(*likelihoods)


# -- the fit against dense kriging --------------------------------------------------------------


@centred_or_not
@one_or_two_levels
@pytest.mark.parametrize("share", [True, False])
def test_predictions_and_intervals_are_those_of_kriging(center, num_levels, share):
    surrogate, levels, rows = fitted(num_levels, center=center, share_ridge=share, ridge=0.3)
    mean, std = surrogate.predict(ALL, return_std=True)
    spread = torch.stack([each.predict(ALL, True, observed=True)[1] for each in levels])
    for j in range(2):
        expected, covariance, slopes = dense(surrogate, levels, rows, j)
        close(surrogate.trend.slopes[:, j], slopes, 1e-7)
        close(mean[:, j], expected, 1e-7)
        of_levels = (slopes.square()[:, None] * spread[..., j].square()).sum(0)
        close(std[:, j].square(), covariance.diagonal() + of_levels, 1e-7)


@one_or_two_levels
def test_left_out_residuals_are_those_of_refitting(num_levels):
    surrogate, levels, rows = fitted(num_levels)
    term = surrogate.kernel_terms[0]
    for i in range(len(rows)):
        rest = rows[torch.arange(len(rows)) != i]
        options = {"kernel": term.kernel, "ridge": float(term.ridge[0]), "estimates": levels}
        refitted = fit_surrogate(ALL[rest], truth()[rest], share_ridge=True, **options)
        close(
            surrogate.loo_residuals[i], truth()[rows[i]] - refitted.predict(ALL[rows[[i]]])[0], 1e-7
        )


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
@one_or_two_levels
def test_readouts_are_those_of_all_subsets(readout, num_levels):
    """Values of the predicted table, observed scores in it; variances of a dense covariance."""
    surrogate, levels, rows = fitted(num_levels, noise_std=0.0)
    table = surrogate.predict(ALL, observed=True)
    close(table[rows], truth()[rows])
    one, two = torch.triu_indices(N, N, 1)

    def asked(each):
        pairs = each.interactions(readout, True)
        return torch.cat([each.attribute(readout, True)[0], pairs[0][one, two]]), torch.cat(
            [each.attribute(readout, True)[1], pairs[1][one, two]]
        )

    functionals = torch.cat(
        [
            getattr(reference, f"{name}_functionals")(N, readout)
            for name in ("effect", "interaction")
        ]
    )
    values, std = asked(surrogate)
    close(values, functionals @ table, 1e-8)
    law = [reference.context_weight(readout, N, size) for size in ALL.sum(1).tolist()]
    close(surrogate.mean_score(readout), table.new_tensor(law) @ table, 1e-8)
    spread = torch.stack([asked(level)[1] for level in levels])
    factors = [surrogate._readout_factors(readout, order) for order in (1, 2)]
    factors = torch.cat([factors[0].expand(N, -1), factors[1].expand(len(one), -1)])
    for j in range(2):
        _, covariance, slopes = dense(surrogate, levels, rows, j, nugget=True)
        own = ((functionals @ covariance) * functionals).sum(1) * factors[:, j]
        of_levels = (slopes.square()[:, None] * spread[..., j].square()).sum(0)
        close(std[:, j].square(), own + of_levels, 1e-7)


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
@one_or_two_levels
def test_attributions_are_as_uncertain_together_as_in_dense_kriging(readout, num_levels):
    surrogate, levels, rows = fitted(num_levels, noise_std=0.0)
    joint = surrogate.attribution_covariance(readout)
    close(joint.diagonal().T, surrogate.attribute(readout, True)[1].square(), 1e-9)
    functionals = reference.effect_functionals(N, readout)
    below = torch.stack([each.attribution_covariance(readout) for each in levels])
    for j in range(2):
        _, covariance, slopes = dense(surrogate, levels, rows, j, nugget=True)
        covariance = covariance * surrogate._readout_factors(readout, 1)[0, j]
        of_levels = torch.einsum("l,lab->ab", slopes.square(), below[..., j])
        close(joint[..., j], functionals @ covariance @ functionals.T + of_levels, 1e-7)


GAMMAS = tuple(0.05 * (1 + i) for i in range(N))


@pytest.mark.parametrize(
    "kernel", [RBF(GAMMAS), Exponential(GAMMAS, amplitude=1.0), RBF(0.2) + 0.5 * Size(degree=2)]
)
def test_every_kernel_has_trends(kernel):
    """With a gamma for each task, an amplitude by size, or a function of sizes."""
    surrogate, levels, rows = fitted(kernel=kernel, ridge=0.3)
    for readout in ("loo", "shapley"):
        functionals = reference.effect_functionals(N, readout)
        values, std = surrogate.attribute(readout, True)
        spread = levels[0].attribute(readout, True)[1]
        for j in range(2):
            mean, covariance, slopes = dense(surrogate, levels, rows, j)
            close(surrogate.predict(ALL)[:, j], mean, 1e-7)
            own = ((functionals @ covariance) * functionals).sum(1)
            close(std[:, j].square(), own + slopes.square() * spread[:, j].square(), 1e-7)
        close(values, functionals @ surrogate.predict(ALL, observed=True), 1e-8)


def test_the_choice_has_the_largest_likelihood():
    """With its prior, over every kernel and ridge that was tried, recomputed densely."""
    surrogate, levels, rows = fitted(share_ridge=True)
    scores = surrogate.scores / surrogate.unit
    functions = [each.predict(ALL[rows], observed=True) for each in levels]
    best = {}
    kernels = {str(k): k for each in surrogate.candidates.tried for k, _ in each.predictors}
    assert any("amplitude" in name for name in kernels), "kernels that see sizes are among them"
    for row in surrogate.candidates:
        gram = kernels[row.kernel].gram(surrogate.masks)
        centred = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
        total = 0.0
        for j in range(2):
            basis = torch.stack([torch.ones(len(rows)).double(), *(f[:, j] for f in functions)], 1)
            weights = torch.ones(len(rows), dtype=torch.float64)
            options = scores[:, j], basis, row.ridge, weights
            total += reference.restricted_likelihood(gram, *options)
            total -= 0.3 * float(torch.log1p(centred.diagonal().mean() / row.ridge))
        best[total] = row
    chosen = next(row for row in surrogate.candidates if row.num_chosen)
    assert chosen == best[max(best)]


# -- files --------------------------------------------------------------------------------------


def answers(surrogate):
    parts = [*surrogate.predict(ALL, True), surrogate.predict(ALL, observed=True)]
    parts += [*surrogate.attribute("shapley", True), *surrogate.interactions("loo", True)]
    return [*parts, surrogate.loo_residuals, surrogate.loo_error]


def test_files_keep_the_trend(tmp_path):
    """Trends of trends too; their format is one that versions without trends refuse."""
    inner, _, rows = fitted(2)
    surrogate = fit_surrogate(ALL[rows[:9]], truth()[rows[:9]], estimates=inner)
    surrogate.save(tmp_path / "s")
    loaded = load_surrogate(tmp_path / "s")
    for ours, theirs in zip(answers(surrogate), answers(loaded), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert str(loaded) == str(surrogate) and loaded.warnings == surrogate.warnings
    with safe_open(tmp_path / "s", "pt") as file:
        assert file.metadata()["format"] == "ksm_ext.surrogate.4"


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors, facts: tensors.pop("trend.slopes"),
        lambda tensors, facts: tensors.update({"trend.slopes": torch.zeros(1, 3).double()}),
        lambda tensors, facts: tensors.pop("trend.0.scores"),
        lambda tensors, facts: facts["trend"][0].update(tasks=[0] * N),
        lambda tensors, facts: facts["trend"][0].update(targets=[0, 2]),
        lambda tensors, facts: facts["trend"][0]["surrogate"].update(kernels=3),
    ],
)
def test_damaged_trends_are_refused(tmp_path, damage):
    tensors, facts = fitted()[0].state()
    damage(tensors, facts)
    write_state(tmp_path / "s", tensors, facts)
    with pytest.raises(ValueError, match=r"^`path` must be a saved surrogate, got .*damaged"):
        load_surrogate(tmp_path / "s")


# -- what estimates may be ----------------------------------------------------------------------


class Predictor:
    """Scores of any subset, by a formula; the empty one has none that means anything."""

    target_names = ("b", "a")

    def __init__(self):
        self.asked = []

    def predict(self, masks):
        self.asked.append(masks)
        assert bool(masks.any(1).all())
        sizes = masks.double().sum(1, keepdim=True)
        return torch.cat([sizes.square(), masks.double() @ torch.arange(N).double()[:, None]], 1)


def test_a_predictor_is_asked_where_true_scores_are():
    rows, predictor = observed_rows(), Predictor()
    names = {"target_names": ["a", "b"]}
    surrogate = fit_surrogate(ALL[rows], truth()[rows], estimates=predictor, **names)
    (level,) = surrogate.trend.levels
    (asked,) = predictor.asked
    seen = {tuple(row) for row in asked.tolist()}
    assert seen >= {tuple(row) for row in ALL[rows].tolist() if any(row)}
    assert seen >= {tuple(row) for row in (~torch.eye(N, dtype=torch.bool)).tolist()}
    close(level.predict(ALL[rows], False), predictor.predict(ALL[rows])[:, [1, 0]], 1e-9)


def test_every_form_of_estimates_is_the_same_fit():
    pair, rows = estimates(), observed_rows()
    options = ALL[rows], truth()[rows]
    expected = fit_surrogate(*options, estimates=fit_surrogate(*pair)).attribute()
    finished = retrain_scores(lambda mask, seed: dictionary[tuple(mask.tolist())], pair[0])
    for form in (pair, [pair], (fit_surrogate(*pair),), finished):
        close(fit_surrogate(*options, estimates=form).attribute(), expected, 1e-12)


dictionary = {
    tuple(mask): score for mask, score in zip(*(x.tolist() for x in estimates()), strict=True)
}


def test_tasks_and_targets_go_by_their_names():
    """Tables in another order, and an estimate of more targets than there are true scores of."""
    masks, cheap = estimates()
    rows, tasks = observed_rows(), list("abcdefgh")
    wide = torch.cat([cheap[:, [1]], cheap.sum(1, keepdim=True), cheap[:, [0]]], 1)
    names = {"task_names": tasks[::-1], "target_names": ["loss", "other", "error"]}
    alone = fit_surrogate(masks, cheap, kernel="rbf", share_ridge=True)
    expected = fit_surrogate(ALL[rows], truth()[rows], estimates=alone)
    turned = fit_surrogate(masks.flip(1), wide, kernel=alone.kernel_terms[0].kernel, **names)
    named = {"task_names": tasks, "target_names": ["error", "loss"]}
    found = fit_surrogate(ALL[rows], truth()[rows], estimates=turned, **named)
    for ask in ("attribute", "interactions"):
        close(getattr(found, ask)("shapley"), getattr(expected, ask)("shapley"), 2e-2)
    close(found.walsh_spectrum(), expected.walsh_spectrum(), 2e-2)
    close(found.attribute("banzhaf"), brute(found, "banzhaf"), 1e-9)


def brute(surrogate, readout):
    table = surrogate.predict(ALL, observed=True)
    return reference.effect_functionals(N, readout) @ table


def test_spectra_are_those_of_the_predicted_table():
    """Of the smooth part of both; a level in other tasks than the scores has none."""
    rows, (masks, cheap) = observed_rows(), estimates()
    level = fit_surrogate(masks, cheap, ridge=0.1)
    surrogate = fit_surrogate(ALL[rows], truth()[rows], estimates=level, ridge=0.1)
    table = surrogate.predict(ALL)
    close(surrogate.walsh_spectrum(), reference.walsh_spectrum(table, N), 1e-9)
    kernels = {"kernel": RBF(GAMMAS), "ridge": 0.1}  # each with the gammas of its own columns
    turned = fit_surrogate(masks.flip(1), cheap, task_names=list("hgfedcba"), **kernels)
    options = {"estimates": turned, "task_names": list("abcdefgh")}
    surrogate = fit_surrogate(ALL[rows], truth()[rows], **options, **kernels)
    table = surrogate.predict(ALL)
    close(surrogate.walsh_spectrum(), reference.walsh_spectrum(table, N), 1e-9)
    half = masks[masks[:, 0]]
    level = fit_surrogate(half, cheap[masks[:, 0]])
    surrogate = fit_surrogate(ALL[rows], truth()[rows], estimates=level)
    form = (
        r"^`estimates` must be of subsets in which the tasks vary that do among the scores, got oth"
    )
    with pytest.raises(ValueError, match=form):
        surrogate.walsh_spectrum()


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
def test_tasks_that_vary_among_estimates_only_have_their_effects(readout):
    """b times those of the estimates; their variance has that of b too."""
    rows = torch.tensor([row for row in observed_rows(60).tolist() if ALL[row, 0]][:18])
    level = fit_surrogate(*estimates())
    surrogate = fit_surrogate(ALL[rows], truth()[rows], estimates=level, ridge=0.3)
    assert surrogate.constant_tasks == ()
    values, std = surrogate.attribute(readout, True)
    effects, spread = level.attribute(readout, True)
    close(values[0], (surrogate.trend.slopes * effects)[0])
    _, pairs = surrogate.interactions(readout, True)
    (term,) = surrogate.kernel_terms
    gram = term.kernel.gram(surrogate.masks.__class__.of(ALL[rows][:, 1:]))
    for j in range(2):
        cheap = level.predict(ALL[rows], observed=True)[:, j]
        one = torch.ones(len(rows), dtype=torch.float64)
        h, ridge = torch.stack([one, cheap], 1), float(term.ridge[j])
        inverse = torch.linalg.inv(gram + ridge * torch.eye(len(rows), dtype=torch.float64))
        of_slope = torch.linalg.inv(h.T @ inverse @ h)[1, 1] * term.signal_variance[j]
        of_slope = of_slope * surrogate.unit[j] ** 2
        slope = surrogate.trend.slopes[0, j]
        expected = effects[0, j] ** 2 * of_slope + slope**2 * spread[0, j] ** 2
        close(std[0, j] ** 2, expected, 1e-9)
        pair, pair_std = (table[0, 3, j] for table in level.interactions(readout, True))
        close(pairs[0, 3, j] ** 2, pair**2 * of_slope + slope**2 * pair_std**2, 1e-9)


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
def test_effects_of_tasks_that_vary_among_estimates_only_are_uncertain_with_others(readout):
    """All through the coefficient of the estimates, and those of a kernel that knows the rest."""
    rows = torch.tensor([row for row in observed_rows(60).tolist() if ALL[row, 0]][:18])
    level = fit_surrogate(*estimates())
    options = {"kernel": RBF(GAMMAS), "ridge": 0.3, "estimates": level}
    surrogate = fit_surrogate(ALL[rows], truth()[rows], **options)
    joint, below = (each.attribution_covariance(readout) for each in (surrogate, level))
    functionals, (term,) = reference.effect_functionals(N, readout), surrogate.kernel_terms
    assert term.kernel == RBF(GAMMAS[1:])
    gram, one = term.kernel.gram(surrogate.masks.__class__.of(ALL[:, 1:])), torch.ones(2**N)
    for j in range(2):
        basis = torch.stack([one.double(), level.predict(ALL, observed=True)[:, j]], 1)
        fit = reference.kriging(gram, rows, truth()[rows, j], basis, float(term.ridge[j]), 0.0)
        own = functionals @ fit[1] @ functionals.T
        own = own * term.signal_variance[j] * surrogate.unit[j] ** 2
        of_level = surrogate.trend.slopes[0, j] ** 2 * below[..., j]
        close(joint[..., j], own + of_level, 1e-7)


@pytest.mark.parametrize("made", ["surrogate", "smooth", "pair", "predictor", "one target"])
def test_estimates_made_from_the_true_scores_are_refused(made):
    """They would be explained to rounding: an error of 0 that says nothing."""
    rows, scores = observed_rows(), truth()[observed_rows()]
    given = {
        "surrogate": lambda: fit_surrogate(ALL[rows], scores),
        "smooth": lambda: fit_surrogate(ALL[rows], scores, kernel="rbf", ridge=0.1),
        "pair": lambda: (ALL[rows.flip(0)], scores.flip(0)),
        "predictor": lambda: Told(fit_surrogate(ALL[rows], scores)),
        "one target": lambda: (ALL[rows], torch.stack([scores[:, 0], scores[:, 1] ** 2], 1)),
    }[made]()
    said = "'0'" if made == "one target" else "'0', '1'"
    expected = (
        f"^`estimates` must be other scores than the true ones, got the true scores of {said} "
    )
    with pytest.raises(ValueError, match=expected):
        fit_surrogate(ALL[rows], scores, estimates=given)
    few = rows[:9]
    fit_surrogate(ALL[few], truth()[few], estimates=(ALL[few], truth()[few]))  # may be by chance
    noisy = (ALL[rows], scores + 1e-3 * torch.randn(scores.shape).double())
    fit_surrogate(ALL[rows], scores, estimates=noisy)


class Told:
    """Whatever has a ``predict``, here by the observed scores."""

    def __init__(self, surrogate):
        self.surrogate = surrogate

    def predict(self, masks):
        return self.surrogate.predict(masks, observed=True)


# -- everything that scores may be --------------------------------------------------------------


def test_each_target_is_fitted_to_the_scores_that_it_has():
    """With its own trend: as if it were the only one."""
    rows, level = observed_rows(), fit_surrogate(*estimates())
    scores = truth()[rows]
    scores[:3, 0] = torch.nan
    options = {"estimates": level, "missing": "drop"}
    both = fit_surrogate(ALL[rows], scores, **options)
    for j in range(2):
        own = fit_surrogate(*estimates(), target_names=["x", "y"])
        alone = fit_surrogate(
            ALL[rows], scores[:, [j]], estimates=own, missing="drop", target_names=["xy"[j]]
        )
        close(both.predict(ALL)[:, [j]], alone.predict(ALL), 1e-9)
        close(both.predict(ALL, True)[1][:, [j]], alone.predict(ALL, True)[1], 1e-9)


def test_known_scores_and_those_without_noise_are_answered():
    rows, level = observed_rows(), fit_surrogate(*estimates())
    options = {"estimates": level}
    surrogate = fit_surrogate(ALL[rows], truth()[rows], known=[2, 5], **options)
    close(surrogate.predict(ALL[rows[[2, 5]]]), truth()[rows[[2, 5]]])
    surrogate = fit_surrogate(ALL[rows], truth()[rows], noise_std=0.0, **options)
    mean, std = surrogate.predict(ALL[rows], True)
    close(mean, truth()[rows])
    close(std, torch.zeros_like(std), 1e-6)


def test_repeated_runs_measure_noise_and_weigh():
    """A subset of many runs counts as their mean, more precise than others."""
    rows, level = observed_rows(), fit_surrogate(*estimates())
    noise = 0.3 * torch.randn(4 * len(rows), 2).double()
    repeated = rows.repeat(4)
    runs = truth()[repeated] + noise
    surrogate = fit_surrogate(ALL[repeated[:-9]], runs[:-9], estimates=level)
    assert 0.2 < float(surrogate.noise_std.mean()) < 0.4
    (term,) = surrogate.kernel_terms
    assert term.weights is not None and len(term.weights.unique()) > 1
    signal = term.ridge * term.signal_variance * surrogate.unit.square()
    assert bool((signal > 0.5 * 0.3**2 / 4).all())


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
def test_a_convention_for_the_empty_subset_stays_apart(readout):
    """It answers for itself, is certain, and changes nothing else."""
    rows = torch.cat([torch.tensor([0]), observed_rows()[observed_rows() > 0]])
    level, scores = fit_surrogate(*estimates()), truth()[rows]
    scores[0] = 500.0
    options = {"estimates": level, "noise_std": 0.0}
    surrogate = fit_surrogate(ALL[rows], scores, **options)
    assert bool(surrogate.excluded[0].all()) and not bool(surrogate.excluded[1:].any())
    others = fit_surrogate(ALL[rows[1:]], scores[1:], **options)
    close(surrogate.predict(ALL)[1:], others.predict(ALL)[1:])
    close(surrogate.predict(ALL)[0], scores[0])
    functionals = reference.effect_functionals(N, readout)
    values, std = surrogate.attribute(readout, True)
    close(values, functionals @ surrogate.predict(ALL, observed=True))
    spread = level.attribute(readout, True)[1]
    for j in range(2):
        _, covariance, (slope,) = dense(others, [level], rows[1:], j, nugget=True)
        covariance[0], covariance[:, 0] = 0.0, 0.0
        own = ((functionals @ covariance) * functionals).sum(1)
        own = own * surrogate._readout_factors(readout, 1)[0, j]
        close(std[:, j].square(), own + slope.square() * spread[:, j].square(), 1e-6)


def test_another_design_has_the_intervals_of_its_own():
    surrogate, (level,), _ = fitted(share_ridge=True)
    rows = observed_rows(60)[20:]
    (term,) = surrogate.kernel_terms
    options = {"kernel": term.kernel, "ridge": float(term.ridge[0]), "share_ridge": True}
    other = fit_surrogate(ALL[rows], truth()[rows], estimates=level, **options)
    found = surrogate.with_design(other.masks).attribute("shapley", True)[1]
    spread = level.attribute("shapley", True)[1] * surrogate.trend.slopes[0]
    own = (found.square() - spread.square()) / term.signal_variance / surrogate.unit.square()
    spread = level.attribute("shapley", True)[1] * other.trend.slopes[0]
    expected = other.attribute("shapley", True)[1].square() - spread.square()
    (term,) = other.kernel_terms
    close(own, expected / term.signal_variance / other.unit.square(), 1e-8)


def test_real_weights_have_trends_too():
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(60, 4, generator=generator, dtype=torch.float64)
    weights /= weights.sum(1, keepdim=True)
    true = weights.square() @ torch.arange(1.0, 5.0).double()
    cheap = 2 * true + 0.1 * torch.sin(9 * weights[:, 0])
    surrogate = fit_surrogate(weights[:12], true[:12], estimates=(weights, cheap))
    error = (surrogate.predict(weights[12:]) - true[12:]).square().mean() / true.var()
    assert error < 0.02
    mean, effects = weights[:12].mean(0), surrogate.attribute("loo")
    without = mean.repeat(4, 1).fill_diagonal_(0.0)
    without /= without.sum(1, keepdim=True)
    close(effects, surrogate.predict(mean[None]) - surrogate.predict(without), 1e-9)


def test_what_is_said(capsys):
    surrogate, *_ = fitted()
    slopes = ", ".join(f"{slope:.3g}" for slope in surrogate.trend.slopes[0].tolist())
    shares = ", ".join(f"{share:.3f}" for share in surrogate.explained_by_estimates.tolist())
    line, *warnings = str(surrogate).splitlines()
    assert line.endswith(f"estimates times {slopes} explain {shares} of the variance")
    assert warnings == list(surrogate.warnings) and not any(
        "estimates" in each for each in warnings
    )
    rows = observed_rows()
    for cheap in (-truth(), torch.randn(2**N, 2).double()):
        found = fit_surrogate(ALL[rows], truth()[rows], estimates=(ALL[60:], cheap[60:]))
        assert any("The estimates tell little of '0'" in text for text in found.warnings)
    assert fit_surrogate(ALL[rows], truth()[rows]).explained_by_estimates is None


def test_estimates_that_say_nothing_leave_the_surrogate_alone():
    """Constant ones: as if there were none, but for what chooses."""
    rows = observed_rows()
    level = fit_surrogate(ALL[rows[:5]], truth()[rows[:5]], kernel=RBF(1.0), ridge=1.0)
    constant = replace(
        level,
        kernel_terms=tuple(replace(term, dual=0 * term.dual) for term in level.kernel_terms),
        nugget_share=0 * level.nugget_share,
    )
    options = {"kernel": RBF(0.1), "ridge": 0.5}
    alone = fit_surrogate(ALL[rows], truth()[rows], **options)
    found = fit_surrogate(ALL[rows], truth()[rows], estimates=constant, **options)
    close(found.predict(ALL), alone.predict(ALL))
    close(found.attribute("shapley", True)[1], alone.attribute("shapley", True)[1])


@pytest.mark.parametrize(
    "error, match, options",
    [
        (ValueError, r"`estimates` must be at least one, got an empty list", {"estimates": []}),
        (TypeError, r"`estimates` must be a pair \(masks, scores\), .*got int", {"estimates": 3}),
        (ValueError, r"`criterion` must be 'error' with estimates", {"criterion": "rank"}),
        (ValueError, r"`criterion` must be .* got 'attribution'", {"criterion": "attribution"}),
        (ValueError, r"`kernel` must be a kernel with estimates, got 'ard'", {"kernel": "ard"}),
        (ValueError, r"`kernel` must be a kernel with estimates, got 'lasso'", {"kernel": "lasso"}),
        (ValueError, r"`solver` must be 'eigh' with estimates", {"solver": "cg"}),
        (
            ValueError,
            r"`estimates` must be of the same targets as the true scores, got p, q beside 0, 1\.",
            {"target_names": ["p", "q"], "estimates": ("x", "y")},
        ),
        (
            ValueError,
            r"`estimates` must be of the same tasks as the true scores, got 0, 1, 2 beside",
            {"estimates": (ALL[:7, -3:], truth()[:7])},
        ),
    ],
)
def test_errors_name_what_is_wrong(error, match, options):
    rows = observed_rows()
    if options.get("estimates") == ("x", "y"):
        named = fit_surrogate(*estimates(), target_names=["x", "y"])
        options, match = options | {"estimates": named}, match.replace("0, 1", "x, y")
    with pytest.raises(error, match=f"^{match}"):
        fit_surrogate(ALL[rows], truth()[rows], **({"estimates": estimates()} | options))


def test_too_few_true_scores():
    form = r"^`masks` must be at least 4 different subsets beside 1 estimate, got 3\. Score more"
    with pytest.raises(ValueError, match=form):
        fit_surrogate(ALL[1:4], truth()[1:4], estimates=estimates())
    fit_surrogate(ALL[1:5], truth()[1:5], estimates=estimates())


def test_scikit_learn_has_the_same_rest():
    """Its Gaussian process of what the trend leaves, with our kernel and ridge."""
    process = pytest.importorskip("sklearn.gaussian_process")
    surrogate, (level,), rows = fitted()
    trend = surrogate.trend.slopes * level.predict(ALL, observed=True)
    one = torch.ones(len(rows), dtype=torch.float64)
    for term in surrogate.kernel_terms:
        width = (2 * term.kernel.gamma) ** -0.5
        kernel = process.kernels.RBF(width, "fixed")
        for j, ridge in zip(term.columns.tolist(), term.ridge.tolist(), strict=True):
            peer = process.GaussianProcessRegressor(kernel, alpha=ridge, optimizer=None)
            rest = truth()[rows, j] - trend[rows, j]
            inverse = torch.linalg.inv(
                term.kernel.gram(surrogate.masks) + ridge * torch.eye(len(rows)).double()
            )
            constant = one @ inverse @ rest / (one @ inverse @ one)
            peer.fit(ALL[rows].double().numpy(), (rest - constant).numpy())
            expected = torch.from_numpy(peer.predict(ALL.double().numpy())) + constant + trend[:, j]
            close(surrogate.predict(ALL)[:, j], expected, 1e-7)


@pytest.mark.parametrize(("unit", "of_estimates"), [(1e-280, 1.0), (1e280, 1.0), (1.0, 1e280)])
def test_units_of_any_size(unit, of_estimates):
    """Deviations are products of slopes and deviations, whose squares none of them has to hold."""
    rows = torch.randperm(2**N, generator=torch.Generator().manual_seed(0))
    apart = 0.1 * torch.sin(torch.arange(24.0).double()).reshape(12, 2)  # more than rounding

    def fit(size, cheap):
        true = (truth()[rows[:12]] + apart) * size
        estimates = 2 * truth()[rows[:25]] * cheap + cheap
        options = {"kernel": "exponential"}
        level = fit_surrogate(ALL[rows[:25]], estimates, **options)
        return fit_surrogate(ALL[rows[:12]], true, estimates=level, **options)

    one, other = fit(1.0, 1.0), fit(unit, of_estimates)
    for readout in ("loo", "shapley"):
        std, expected = (each.attribute(readout, True)[1] for each in (other, one))
        close(std / unit, expected, 2e-3)
        joint = other.attribution_covariance(readout, relative=True) * one.unit.square()
        close(joint, one.attribution_covariance(readout), 2e-3)
    close(other.predict(ALL, True)[1] / unit, one.predict(ALL, True)[1], 2e-3)
