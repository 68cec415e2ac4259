"""Scores with estimates beside them: against dense kriging, refitting and all 2^n subsets."""

import pytest
import reference
import torch
from problems import close
from safetensors import safe_open

from ksm_ext import RBF, fit_surrogate, load_surrogate
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
    spread = torch.stack([asked(level)[1] for level in levels])
    for j in range(2):
        _, covariance, slopes = dense(surrogate, levels, rows, j, nugget=True)
        own = ((functionals @ covariance) * functionals).sum(1)
        of_levels = (slopes.square()[:, None] * spread[..., j].square()).sum(0)
        close(std[:, j].square(), own + of_levels, 1e-7)


def test_the_choice_has_the_largest_likelihood():
    """With its prior, over every kernel and ridge that was tried, recomputed densely."""
    surrogate, levels, rows = fitted(share_ridge=True)
    scores = surrogate.scores / surrogate.unit
    functions = [each.predict(ALL[rows], observed=True) for each in levels]
    best = {}
    for row in surrogate.candidates:
        kernel = RBF(gamma=float(row.kernel.split("=")[1][:-1]))
        gram = kernel.gram(surrogate.masks)
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
