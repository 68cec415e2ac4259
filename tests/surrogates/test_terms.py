"""Gram matrices are factored once, and what is kept of it says what a new factor would."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_ext import RBF, ConjugateGradients, fit_surrogate, load_surrogate, write_report
from ksm_ext.surrogates import parts, search
from ksm_ext.surrogates.krylov import KrylovRidge
from ksm_ext.surrogates.masks import Masks

OPTIONS = [{"ridge": 0.3}, {"center": False}, {"share_ridge": False}, {"known": [1, 2]}]
OPTIONS += [{}, {"noise_std": 0.3}]
SMALL = pytest.param(70, id="70 subsets")
LARGE = pytest.param(1500, id="1500 subsets", marks=pytest.mark.slow)


def problem(m, t=2, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(m, n, generator=generator) < 0.5
    masks[0] = True
    masks = masks.unique(dim=0)
    masks = masks[masks.any(1)]
    effects = torch.randn(n, t, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(masks), t, generator=generator, dtype=torch.float64)
    return masks, masks.double() @ effects + noise


@pytest.fixture
def factored(monkeypatch):
    """Sizes of the matrices that were factored."""
    sizes = []
    for name in ("eigh", "cholesky", "svd", "qr", "solve", "inv", "pinv"):
        original = getattr(torch.linalg, name)

        def counting(matrix, *args, original=original, **options):
            if matrix.shape[-2] == matrix.shape[-1]:
                sizes.extend([matrix.shape[-1]] * matrix[..., 0, 0].numel())
            return original(matrix, *args, **options)

        monkeypatch.setattr(torch.linalg, name, counting)
    return sizes


def ask(surrogate, folder):
    """Everything that needs a factor, twice, of copies too."""
    for each in (surrogate, surrogate.with_tensor_answers(), replace(surrogate, sharing="target")):
        each.attribute("shapley", return_std=True)
        each.attribute(return_std=True)
        each.predict(surrogate.masks.values[:5], return_std=True)
        write_report(each, folder / "report.html")


@pytest.mark.parametrize("m", [SMALL, LARGE])
def test_one_kernel_is_factored_once(m, factored, tmp_path):
    masks, scores = problem(m)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.05))
    assert factored.count(len(masks)) == 1
    ask(surrogate, tmp_path)
    assert factored.count(len(masks)) == 1


@pytest.mark.parametrize("options", [{}, {"noise_std": 0.5}, {"share_ridge": False}], ids=str)
@pytest.mark.parametrize("m", [SMALL, LARGE])
def test_nothing_is_factored_after_a_fit(m, options, factored, tmp_path):
    masks, scores = problem(m)
    surrogate = fit_surrogate(masks, scores, **options)
    assert len(surrogate.candidates)  # whose rank correlations may need them once more
    fitted = factored.count(len(masks))
    assert fitted >= 1
    ask(surrogate, tmp_path)
    assert factored.count(len(masks)) == fitted


def test_a_loaded_surrogate_is_factored_once(factored, tmp_path):
    masks, scores = problem(70)
    fit_surrogate(masks, scores, kernel=RBF(gamma=0.05)).save(tmp_path / "s")
    size = (tmp_path / "s").stat().st_size
    assert size < 8 * len(masks) ** 2, "no eigenvectors in the file"
    factored.clear()
    surrogate = load_surrogate(tmp_path / "s")
    surrogate.attribute("loo")
    assert not factored
    ask(surrogate.with_tensor_answers(), tmp_path)
    ask(surrogate, tmp_path)
    assert factored.count(len(masks)) == 1
    surrogate.save(tmp_path / "s")
    assert (tmp_path / "s").stat().st_size == size


def test_a_preconditioner_is_made_once(monkeypatch):
    made = []
    original = search.KrylovTrial.__init__.__globals__["KrylovRidge"]
    monkeypatch.setattr(
        "ksm_ext.surrogates.terms.KrylovRidge",
        lambda *args, **options: made.append(args) or original(*args, **options),
    )
    masks, scores = problem(70)
    solver = ConjugateGradients(rank=20)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.05), solver=solver)
    first = surrogate.attribute("loo", return_std=True)[1]
    again = surrogate.with_tensor_answers().attribute("loo", return_std=True)[1]
    assert len(made) == 1 and torch.equal(first, again)


@pytest.mark.parametrize("copied", [deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_a_copy_leaves_the_factor_behind(copied):
    masks, scores = problem(70)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.05))
    copy = copied(surrogate)
    assert copy.kernel_terms[0].factor is None and surrogate.kernel_terms[0].factor is not None
    assert len(pickle.dumps(surrogate.kernel_terms)) < 8 * len(masks) ** 2
    expected = surrogate.attribute("shapley", return_std=True)
    assert all(map(torch.equal, copy.attribute("shapley", return_std=True), expected))


@pytest.mark.parametrize("missing", [False, True])
def test_large_fits_keep_no_factor(missing, monkeypatch):
    """Of as many groups of targets as miss different scores, all together."""
    masks, scores = problem(70)
    if missing:
        scores[3, 0] = scores[5, 1] = torch.nan
    options = {"kernel": RBF(gamma=0.05), "missing": "drop"}
    kept = fit_surrogate(masks, scores, **options)
    assert all(term.factor is not None for term in kept.kernel_terms)
    monkeypatch.setattr(parts, "KEPT", len(masks) if missing else len(masks) - 1)
    large = fit_surrogate(masks, scores, **options)
    assert all(term.factor is None for term in large.kernel_terms)
    expected = kept.attribute("shapley", return_std=True)
    assert all(map(torch.equal, large.attribute("shapley", return_std=True), expected))


@pytest.mark.parametrize(
    "change",
    [
        lambda s: replace(s, masks=Masks.of(~s.masks.values)),
        lambda s: replace(s, kernel_terms=(replace(s.kernel_terms[0], kernel=RBF(gamma=2.0)),)),
        lambda s: replace(s, kernel_terms=(replace(s.kernel_terms[0], weights=uneven(s)),)),
        lambda s: replace(s, kernel_terms=(replace(s.kernel_terms[0], rows=torch.arange(40)),)),
    ],
)
def test_a_factor_of_something_else_is_not_used(change):
    masks, scores = problem(70)
    changed = change(fit_surrogate(masks, scores, kernel=RBF(gamma=0.05)))
    fresh = replace(changed, kernel_terms=tuple(map(without_factor, changed.kernel_terms)))
    found = changed.attribute("shapley", return_std=True)[1]
    assert torch.equal(found, fresh.attribute("shapley", return_std=True)[1])


def test_what_all_kernels_keep_is_bounded(monkeypatch):
    masks, scores = problem(70, t=6)
    monkeypatch.setattr(parts, "KEPT", len(masks))
    fits = [fit_surrogate(masks, scores, share_ridge=way) for way in (True, False)]
    held = [
        len({id(term.factor.solver) for term in fit.kernel_terms if term.factor}) for fit in fits
    ]
    assert len(fits[1].kernel_terms) > 1 and held == [1, 0]


def test_intervals_by_conjugate_gradients_in_threads_and_after_an_interrupt(monkeypatch):
    masks, scores = problem(300, n=30)
    solver = ConjugateGradients(rank=10)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.05), solver=solver)
    ask_for = lambda readout: surrogate.attribute(readout, return_std=True)[1]  # noqa: E731
    alone = [ask_for(readout) for readout in ("loo", "shapley", "banzhaf")]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(ask_for, ("loo", "shapley", "banzhaf")))
    assert all(map(torch.equal, together, alone))
    with monkeypatch.context() as patch:
        patch.setattr(KrylovRidge, "_coordinates", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask_for("loo")
    assert torch.equal(ask_for("loo"), alone[0])


def uneven(surrogate):
    return torch.linspace(0.5, 2.0, len(surrogate.masks), dtype=torch.float64)


def interrupted(*_):
    raise KeyboardInterrupt


def without_factor(term):
    return replace(term, factor=None)


def test_the_factor_of_other_subsets_is_not_used():
    masks, scores = problem(70)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.05))
    half = surrogate.with_design(surrogate.masks[:35])
    (term,) = surrogate.kernel_terms
    stale = replace(half, kernel_terms=(replace(half.kernel_terms[0], factor=term.factor),))
    expected = half.attribute("loo", return_std=True)[1]
    assert torch.equal(stale.attribute("loo", return_std=True)[1], expected)


@settings(derandomize=True, deadline=None, database=None, max_examples=12)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(6, 40),
    kernel=st.sampled_from(["auto", "linear", "rbf", "lasso", ["anova2", "exponential"]]),
    options=st.sampled_from(OPTIONS),
    missing=st.booleans(),
    weights=st.booleans(),
)
def test_a_kept_factor_is_the_one_that_would_be_made(seed, m, kernel, options, missing, weights):
    masks, scores = problem(m, t=3, n=6, seed=seed)
    masks[0], scores[0] = False, 30.0  # a convention, apart from the rest
    if missing:
        scores[2, 0] = scores[-1, 1] = torch.nan
    if weights:
        masks = 0.5 * masks.double()
    surrogate = fit_surrogate(masks, scores, kernel=kernel, missing="drop", **options)
    terms = tuple(replace(term, factor=None) for term in surrogate.kernel_terms)
    again = replace(surrogate, kernel_terms=terms)
    for observed in (False, True):
        expected = again.predict(masks, return_std=True, observed=observed)
        found = surrogate.predict(masks, return_std=True, observed=observed)
        assert all(map(torch.equal, found, expected))
