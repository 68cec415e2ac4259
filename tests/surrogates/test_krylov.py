"""fit_surrogate by conjugate gradients: the answers of one factorisation, without the matrix."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from problems import GAMMAS, of

from ksm_ext import (
    ANOVA2,
    RBF,
    ConjugateGradients,
    Exponential,
    Laplace,
    Linear,
    fit_surrogate,
    load_surrogate,
    subsets,
)
from ksm_ext.surrogates import extrapolation, fit, search
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.krylov import KrylovRidge, Preconditioner, pivoted_cholesky
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge

M, N, T = 500, 24, 3
TIGHT = ConjugateGradients(rank=60, tolerance=1e-10)
USUAL = ConjugateGradients(rank=60)
KERNELS = [RBF(gamma=0.1), Exponential(gamma=0.4), ANOVA2(0.3), Linear(), Linear() + RBF(gamma=0.2)]
KERNELS.append(Exponential([gamma / 5 for gamma in GAMMAS], amplitude=0.7))
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


def problem(m=M, n=N, t=T, noise=1.0, repeats=False):
    """Main effects and pairs, different in every target, over subsets of many sizes."""
    sizes = None if repeats else range(3, n - 2)
    masks = subsets.mixed_sizes(n, m, sizes, seed=0, allow_repeats=repeats)
    scores = masks.double() @ torch.randn(n, t).double() + 5.0
    first, second = torch.randint(0, n, (2, n))
    scores += (masks[:, first] & masks[:, second]).double() @ torch.randn(n, t).double()
    return masks, scores + noise * torch.randn(m, t).double()


def close(actual, expected, tolerance=1e-6):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def centring(m):
    return torch.eye(m, dtype=torch.float64) - 1 / m


# -- the answers of one factorisation -----------------------------------------------------------


@every_kernel
@pytest.mark.parametrize("center", [True, False])
def test_the_same_ridge_gives_the_same_surrogate(kernel, center):
    kernel = of(kernel, N)
    masks, scores = problem()
    options = {"kernel": kernel, "ridge": 0.3, "center": center}
    exact = fit_surrogate(masks, scores, solver="eigh", **options)
    found = fit_surrogate(masks, scores, solver=TIGHT, **options)
    query = torch.rand(40, N) < 0.5
    close(found.predict(query), exact.predict(query))
    close(found.intercept, exact.intercept)
    close(found.kernel_terms[0].dual, exact.kernel_terms[0].dual)
    for readout in ("loo", "shapley", "banzhaf"):
        close(found.attribute(readout), exact.attribute(readout))
    close(found.interactions("banzhaf"), exact.interactions("banzhaf"))


@pytest.mark.parametrize("center", [True, False])
def test_the_normal_equations_hold_to_the_tolerance(center):
    masks, scores = problem()
    kernel = RBF(gamma=0.1)
    settings = ConjugateGradients(rank=30, tolerance=1e-7)
    found = fit_surrogate(masks, scores, kernel=kernel, ridge=0.05, center=center, solver=settings)
    (term,) = found.kernel_terms
    h = centring(M) if center else torch.eye(M).double()
    gram = kernel.gram(Masks(masks))
    dual = term.dual * found.unit
    residual = h @ scores - (h @ gram @ h @ dual + 0.05 * dual)
    assert bool((residual.norm(dim=0) <= 1.01e-7 * (h @ scores).norm(dim=0)).all())
    if center:
        close(term.dual.sum(0), torch.zeros(T).double(), 1e-9)


@pytest.mark.parametrize("share_ridge", [True, False, "auto"])
@pytest.mark.parametrize("kernel", [RBF(gamma=0.1), ANOVA2(0.3)], ids=str)
def test_the_ridge_is_the_one_of_exact_residuals(kernel, share_ridge):
    masks, scores = problem(m=300, noise=2.0)
    scores[:, 0] = scores[:, 0] + 10 * torch.randn(300).double()  # another ridge than the others
    options = {"kernel": kernel, "share_ridge": share_ridge}
    exact = fit_surrogate(masks, scores, solver="eigh", **options)
    found = fit_surrogate(masks, scores, solver=USUAL, **options)
    if share_ridge != "auto":  # a choice between sharings may tip either way
        (ours,), (theirs,) = found.kernel_terms, exact.kernel_terms
        assert bool(((ours.ridge / theirs.ridge).log10().abs() < 0.51).all())
    pooled = [each.loo_residuals.square().mean().item() for each in (found, exact)]
    assert pooled[0] == pytest.approx(pooled[1], rel=0.05)
    judged, known = (
        [row for row in each.candidates if row.kernel != "mean"] for each in (found, exact)
    )
    assert 3 <= len(judged) < len(known)  # not the whole grid
    for row in judged:
        exactly = min(known, key=lambda each: abs(np.log(each.ridge / row.ridge)))
        assert row.error == pytest.approx(exactly.error, rel=0.05)


def test_many_kernels_are_screened_on_a_sample(monkeypatch):
    monkeypatch.setattr(search, "_ROUNDS", ((100, 100, 8), (200, 150, 2)))
    masks, scores = problem(m=400)
    masks, scores, held, truth = masks[:300], scores[:300], masks[300:], scores[300:]
    options = {"kernel": ["linear", "anova2", "rbf"], "share_ridge": True}
    exact = fit_surrogate(masks, scores, solver="eigh", **options)
    found = fit_surrogate(masks, scores, solver=USUAL, **options)
    errors = [(truth - each.predict(held)).square().mean() for each in (found, exact)]
    assert errors[0] < 1.05 * errors[1]
    assert {row.num_subsets for row in found.candidates} == {100, 150, 300}


@every_kernel
def test_leave_one_out_residuals_are_close(kernel):
    kernel = of(kernel, N)
    masks, scores = problem()
    options = {"kernel": kernel, "ridge": 1.0}
    exact = fit_surrogate(masks, scores, solver="eigh", **options)
    many = ConjugateGradients(rank=60, num_probes=64)
    found = fit_surrogate(masks, scores, solver=many, **options)
    difference = (found.loo_residuals - exact.loo_residuals).norm() / exact.loo_residuals.norm()
    assert difference < 0.1
    close(found.loo_error, exact.loo_error, 0.03)
    ratio = found.kernel_terms[0].signal_variance / exact.kernel_terms[0].signal_variance
    close(ratio, torch.ones(T).double(), 0.02)


def test_the_diagonal_is_exact_where_the_preconditioner_is():
    masks, scores = problem(m=120)
    kernel = RBF(gamma=0.1)
    spectral = SpectralRidge(kernel.gram(Masks(masks)))
    krylov = KrylovRidge(kernel, Masks(masks), ConjugateGradients())
    y = krylov.rotate(scores)
    krylov.solve(torch.cat([y, krylov.probes], 1), 0.1, 1e-10)
    expected = spectral.leave_one_out(spectral.rotate(scores), 0.1)
    close(krylov.leave_one_out(y, 0.1), expected, 1e-4)


@pytest.mark.parametrize("share_ridge", [True, False])
def test_deviations_are_those_of_the_factorisation_and_never_smaller(share_ridge):
    masks, scores = problem(m=200)
    scores[:, 0] = scores[:, 0] + 10 * torch.randn(200).double()
    options = {"kernel": RBF(gamma=0.1), "share_ridge": share_ridge}
    found = fit_surrogate(masks, scores, solver=USUAL, **options)
    found = replace(found, all_is_noise=True)  # as where the ridge is given
    (term,) = found.kernel_terms
    query = torch.rand(10, N) < 0.5
    values = torch.cat([found.predict(query, True)[1], found.attribute("shapley", True)[1]])
    for column, (ridge, signal) in enumerate(zip(term.ridge, term.signal_variance, strict=True)):
        exact = fit_surrogate(
            masks, scores[:, column], kernel=RBF(gamma=0.1), ridge=float(ridge), solver="eigh"
        )
        unit = (signal / exact.kernel_terms[0].signal_variance).sqrt()  # an estimate, checked above
        deviations = [exact.predict(query, True)[1], exact.attribute("shapley", True)[1]]
        ratio = values[:, column] / (torch.cat(deviations) * unit)
        assert ratio.min() > 1 - 1e-6 and ratio.max() < 1.01


@pytest.mark.parametrize("options", [{}, {"known": [0]}, {"noise_std": 0.5}], ids=str)
def test_calibrated_deviations_are_those_of_the_factorisation(options):
    """Either reading of the ridge; the variances of left-out residuals are estimates."""
    masks, scores = problem(m=200)
    masks[0] = True
    found = fit_surrogate(masks, scores, kernel=RBF(gamma=0.1), solver=USUAL, **options)
    terms = tuple(replace(term, factor=None) for term in found.kernel_terms)
    exact = replace(found, solver=None, kernel_terms=terms)
    query = torch.cat([masks[:3], torch.rand(10, N) < 0.5])
    for ask in (
        lambda s: s.predict(query, True)[1],
        lambda s: s.predict(query, True, observed=True)[1],
        lambda s: s.attribute("loo", True)[1],
        lambda s: s.attribute("shapley", True)[1],
        lambda s: s.interactions("banzhaf", True)[1] + torch.eye(N)[..., None],
    ):
        torch.testing.assert_close(ask(found), ask(exact), rtol=0.05, atol=0.005)


# -- hard designs -------------------------------------------------------------------------------


def test_fewer_subsets_than_tasks():
    masks, scores = problem(m=60, n=200)
    options = {"kernel": RBF(gamma=0.02), "ridge": 0.1}
    found = fit_surrogate(masks, scores, solver=ConjugateGradients(rank=10), **options)
    exact = fit_surrogate(masks, scores, solver="eigh", **options)
    close(found.attribute("shapley"), exact.attribute("shapley"), 1e-5)


def test_repeated_subsets_and_a_tiny_ridge():
    masks, scores = problem(m=200, n=8, repeats=True)
    assert len(torch.unique(masks, dim=0)) < 150
    options = {"kernel": ANOVA2(0.3), "ridge": 1e-5}  # condition number 1e9
    exact = fit_surrogate(masks, scores, solver="eigh", **options)
    settings = ConjugateGradients(rank=60, tolerance=1e-8)
    found = fit_surrogate(masks, scores, solver=settings, **options)
    close(found.predict(masks), exact.predict(masks), 1e-5)


def test_a_constant_target_beside_others():
    masks, scores = problem()
    scores[:, 1] = 7.0
    for options in ({"ridge": 0.3}, {"share_ridge": False}):
        found = fit_surrogate(masks, scores, kernel=RBF(gamma=0.1), solver=USUAL, **options)
        assert found.loo_error[1] == 1.0 and found.loo_error.isfinite().all()
        close(found.predict(masks)[:, 1], torch.full((M,), 7.0).double())


def test_nothing_but_noise_is_left_to_the_mean():
    masks = subsets.bernoulli(N, M, 0.5, seed=0)
    found = fit_surrogate(masks, torch.randn(M, 2).double(), kernel="rbf", solver=USUAL)
    assert bool((found.loo_error < 1.02).all())
    assert found.attribute("shapley").abs().max() < 0.05


def test_real_weights():
    weights = torch.rand(150, 6, dtype=torch.float64)
    scores = weights.sin() @ torch.randn(6, 2).double()
    options = {"kernel": Laplace(gamma=0.5), "ridge": 0.01}
    exact = fit_surrogate(weights, scores, solver="eigh", **options)
    found = fit_surrogate(weights, scores, solver=TIGHT, **options)
    close(found.predict(weights[:20]), exact.predict(weights[:20]))
    close(found.attribute("loo"), exact.attribute("loo"))


# -- what it must not depend on, and what it must not do ----------------------------------------


def test_the_seed_decides_to_the_bit():
    masks, scores = problem(m=200)
    first, again, other = (
        fit_surrogate(
            masks, scores, kernel=RBF(gamma=0.1), solver=ConjugateGradients(rank=20, seed=seed)
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first.attribute("shapley"), again.attribute("shapley"))
    assert torch.equal(first.loo_residuals, again.loo_residuals)
    assert not torch.equal(first.loo_residuals, other.loo_residuals)
    close(other.attribute("shapley"), first.attribute("shapley"), 1e-4)


def test_no_gram_matrix_is_formed(monkeypatch):
    masks, scores = problem(m=400)
    sizes = []
    gram = Kernel.gram

    def counted(self, x, y=None):
        sizes.append(len(x) * len(x if y is None else y))
        return gram(self, x, y)

    monkeypatch.setattr(Kernel, "gram", counted)
    monkeypatch.setattr(search, "_SAMPLE_ROWS", 100)
    monkeypatch.setattr(extrapolation, "LOOKED_AT", 100)
    found = fit_surrogate(masks, scores, kernel=RBF(gamma=0.1), share_ridge=True, solver=USUAL)
    found.attribute("shapley", return_std=True)
    assert max(sizes) <= 400 * 64


def test_many_subsets_choose_conjugate_gradients(monkeypatch):
    masks, scores = problem(m=150)
    assert fit_surrogate(masks, scores, kernel=RBF(gamma=0.1)).solver is None
    monkeypatch.setattr(fit, "MAX_DIRECT", 149)
    found = fit_surrogate(masks, scores, kernel=RBF(gamma=0.1), ridge=0.1)
    assert found.solver == ConjugateGradients()


def test_conjugate_gradients_are_chosen_where_they_are_faster(monkeypatch):
    """For a ridge that is chosen; answers are those of a factor to the tolerance."""
    masks, scores = problem(m=150)
    monkeypatch.setattr(fit, "_FASTER_DIRECT", 149 - 30 * T)
    found = fit_surrogate(masks, scores, kernel=RBF(gamma=0.1), share_ridge=True)
    assert found.solver == ConjugateGradients()
    (term,) = found.kernel_terms
    options = {"kernel": RBF(gamma=0.1), "ridge": float(term.ridge[0]), "share_ridge": True}
    exact = fit_surrogate(masks, scores, **options)  # given: factored
    assert exact.solver is None
    close(found.kernel_terms[0].dual, exact.kernel_terms[0].dual, 1e-5)
    assert fit_surrogate(masks, scores, kernel="least_squares").solver is None
    monkeypatch.setattr(fit, "_FASTER_DIRECT", 150 - 30 * T)
    assert fit_surrogate(masks, scores, kernel=RBF(gamma=0.1)).solver is None


class Impatient(ConjugateGradients):
    def __init__(self):
        super().__init__(rank=1, tolerance=1e-12, max_steps=1)


def test_what_was_chosen_for_its_speed_and_does_not_converge_is_factored(monkeypatch):
    masks, scores = problem(m=150)
    options = {"kernel": RBF(gamma=0.1), "share_ridge": True}
    exact = fit_surrogate(masks, scores, **options)
    monkeypatch.setattr(fit, "_FASTER_DIRECT", 0)
    monkeypatch.setattr(fit, "_PER_TARGET", 0)
    monkeypatch.setattr(fit, "ConjugateGradients", Impatient)
    found = fit_surrogate(masks, scores, **options)
    assert found.solver is None and torch.equal(found.predict(masks), exact.predict(masks))
    with pytest.raises(RuntimeError, match="`ridge` must be large enough for conjugate"):
        fit_surrogate(masks, scores, solver=Impatient(), **options)


def test_a_saved_surrogate_answers_alike(tmp_path):
    masks, scores = problem(m=150, n=130)  # three words, the last one in part
    found = fit_surrogate(masks, scores, kernel=RBF(gamma=0.02), ridge=0.3, solver=USUAL)
    found.save(tmp_path / "x")
    loaded = load_surrogate(tmp_path / "x")
    assert loaded.solver == USUAL and torch.equal(loaded.masks.values, masks)
    assert torch.equal(loaded.predict(masks), found.predict(masks))
    assert torch.equal(loaded.loo_residuals, found.loo_residuals)
    values, deviations = found.attribute("shapley", return_std=True)
    again = loaded.attribute("shapley", return_std=True)
    assert torch.equal(again[0], values) and torch.equal(again[1], deviations)


def test_one_switch_shows_products(capsys):
    """And none is shown again when the surrogate is asked."""
    masks, scores = problem(m=80)
    for progress in (False, True):
        options = {"kernel": RBF(gamma=0.1), "solver": USUAL, "progress": progress}
        surrogate = fit_surrogate(masks, scores, **options)
        assert ("products" in capsys.readouterr().err) == progress
        surrogate.attribute("loo", return_std=True)
        surrogate.predict(masks, return_std=True)
        assert capsys.readouterr().err == ""
    fit_surrogate(masks, scores, kernel="auto", share_ridge=False, solver="cg")
    assert capsys.readouterr().err == ""


# -- parts --------------------------------------------------------------------------------------


def test_pivoted_cholesky_stays_below_the_gram_matrix():
    masks = Masks(problem(m=300)[0])
    kernel = RBF(gamma=0.1)
    gram = kernel.gram(masks)
    before = float("inf")
    for rank in (20, 100, 300):
        factor, missing = pivoted_cholesky(kernel, masks, rank, 0)
        rest = gram - factor.double() @ factor.double().T
        close(missing, rest.diagonal(), 1e-5)
        assert float(torch.linalg.eigvalsh(rest)[0]) > -1e-4  # float32
        assert missing.mean() < before
        before = float(missing.mean())
    assert before < 1e-5


@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_the_guess_is_the_inverse_of_low_rank_and_diagonal(center, even):
    masks = Masks(problem(m=150)[0])
    kernel = ANOVA2(0.3)
    constant = torch.ones(150).double() if even else 0.5 + torch.rand(150).double()
    parts = Preconditioner(kernel, masks, constant, center=center, rank=20, seed=0)
    signs = torch.randn(150, 4).double()
    diagonal, product = parts.guess(signs, 2.0)
    low_rank = parts.vectors.double() @ parts.eigenvalues.diag() @ parts.vectors.double().T
    h = torch.eye(150).double()
    if center:
        h -= torch.outer(constant, constant) / constant.square().sum()
    matrix = h @ (low_rank + (parts.missing + 2.0).diag()) @ h
    inverse = torch.linalg.pinv(matrix, rtol=1e-10, hermitian=True)
    close(diagonal, inverse.diagonal(), 1e-5)
    close(product, inverse @ signs, 1e-5)


def test_one_space_serves_all_ridges():
    masks, scores = problem(m=300)
    kernel = RBF(gamma=0.1)
    krylov = KrylovRidge(kernel, Masks(masks), USUAL)
    spectral = SpectralRidge(kernel.gram(Masks(masks)))
    y = krylov.rotate(scores)
    assert float(krylov.solve(y, 0.1, 1e-8).max()) <= 1e-8
    alone = krylov.num_products
    assert float(krylov.solve(y, 0.3, 1e-8).max()) <= 1e-8
    assert krylov.num_products < 1.6 * alone
    close(krylov.dual(y, 1.0), spectral.dual(spectral.rotate(scores), 1.0), 1e-5)
    ridges = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    close(krylov.dual(y, ridges), spectral.dual(spectral.rotate(scores), ridges), 1e-5)


# -- refusals -----------------------------------------------------------------------------------


def test_what_cannot_be_done_is_said():
    masks, scores = problem(m=100)
    short = ConjugateGradients(rank=1, max_steps=1)
    form = r"`ridge` must be large enough for conjugate gradients to converge, got 1e-06, which"
    with pytest.raises(RuntimeError, match=form):
        fit_surrogate(masks, scores, kernel=RBF(gamma=0.1), ridge=1e-6, solver=short)
    cg = {"solver": "cg"}
    for options, form in (
        ({"solver": "lu"}, "`solver` must be one of 'auto', 'eigh', 'cg', got 'lu'"),
        (cg | {"kernel": Linear(), "ridge": 0.0}, "`ridge` must be positive with conj.*, got 0"),
        (cg | {"kernel": "least_squares"}, "`kernel` must be a kernel or 'lasso' with conjugate"),
    ):
        with pytest.raises(ValueError, match=form):
            fit_surrogate(masks, scores, **options)
    for options, form in (
        ({"rank": 0}, "`rank` must be at least 1, got 0"),
        ({"num_probes": 1}, "`num_probes` must be at least 2, got 1"),
        ({"tolerance": 0}, r"`tolerance` must be in \(0, 1\), got 0"),
    ):
        with pytest.raises(ValueError, match=form):
            ConjugateGradients(**options)
