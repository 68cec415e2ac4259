"""fit_surrogate: what it chooses, what it must not depend on, and how it refuses."""

import math
import pickle

import numpy as np
import pandas as pd
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ksm_ext import (
    ANOVA2,
    RBF,
    Exponential,
    Linear,
    fit_many,
    fit_surrogate,
    load_surrogate,
    subsets,
)
from ksm_ext.surrogates import trials
from ksm_ext.surrogates.judgement import near_full
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.trials import RELATIVE_RIDGES

CHOICES = ["auto", "linear", "anova2", "rbf", "lasso", "least_squares"]
every_choice = pytest.mark.parametrize("kernel", CHOICES)
sharings = pytest.mark.parametrize("share_ridge", ["auto", True, False])


def problem(m=30, n=6, t=3, noise=0.3):
    """Scores with main effects and a synergy, different in every target."""
    masks = reference.all_subsets(n)[torch.randperm(2**n)[:m]]
    scores = masks.double() @ torch.randn(n, t).double() + 2.0
    scores += (masks[:, 0] & masks[:, 1])[:, None] * torch.randn(t).double()
    return masks, scores + noise * torch.randn(m, t).double()


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# -- what it must not depend on -----------------------------------------------------------------


@every_choice
def test_targets_with_their_own_ridge_equal_single_fits(kernel):
    masks, scores = problem()
    kernel = Exponential() if kernel == "auto" else kernel
    together = fit_surrogate(masks, scores, kernel=kernel, share_ridge=False)
    query = reference.all_subsets(6)
    for j in range(3):
        single = fit_surrogate(masks, scores[:, j], kernel=kernel, share_ridge=False)
        close(together.predict(query)[:, j], single.predict(query), 1e-8)
        close(together.attribute("shapley")[:, j], single.attribute("shapley"), 1e-8)
        close(together.loo_residuals[:, j], single.loo_residuals, 1e-8)


@pytest.mark.parametrize("kernel", ["auto", "rbf", "lasso", "least_squares"])
@sharings
def test_permuting_tasks_permutes_attributions(kernel, share_ridge):
    masks, scores = problem()
    order = torch.randperm(6)
    options = {"kernel": kernel, "share_ridge": share_ridge}
    surrogate = fit_surrogate(masks, scores, **options)
    permuted = fit_surrogate(masks[:, order], scores, **options)
    # lasso stops its descent at a tolerance, and meets the tasks in another order
    tolerance = 1e-2 if permuted.linear_terms and kernel != "least_squares" else 1e-8
    close(permuted.attribute("shapley"), surrogate.attribute("shapley")[order], tolerance)
    matrix = surrogate.interactions("banzhaf")[order][:, order]
    close(permuted.interactions("banzhaf"), matrix, tolerance)


@pytest.mark.parametrize("kernel", ["linear", "rbf", "linear+rbf", "least_squares"])
@pytest.mark.parametrize("share_ridge", [True, False])  # "auto" cross-validates on drawn folds
def test_the_order_of_subsets_changes_nothing(kernel, share_ridge):
    masks, scores = problem()
    order = torch.randperm(len(masks))
    options = {"kernel": kernel, "share_ridge": share_ridge}
    surrogate = fit_surrogate(masks, scores, **options)
    permuted = fit_surrogate(masks[order], scores[order], **options)
    close(permuted.attribute("loo"), surrogate.attribute("loo"), 1e-8)
    close(permuted.loo_residuals, surrogate.loo_residuals[order], 1e-8)


@every_choice
@pytest.mark.parametrize("scale, shift", [(-2.0, 0.0), (1e-6, 0.0), (1.0, 1000.0)])
def test_units_and_sign_are_kept(kernel, scale, shift):
    if kernel == "least_squares" and shift:
        pytest.skip("no intercept")
    masks, scores = problem()
    expected = fit_surrogate(masks, scores, kernel=kernel).attribute("shapley")
    moved = fit_surrogate(masks, scale * scores + shift, kernel=kernel).attribute("shapley")
    close(moved / scale, expected, 1e-7)


@settings(max_examples=8, deadline=None)
@given(st.integers(3, 12), st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6))
def test_random_problems_are_fitted_or_refused(m, n, t, seed):
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(m, n, generator=generator) < 0.5
    scores = torch.randn(m, t, generator=generator).double()
    if (masks == masks[0]).all():
        with pytest.raises(ValueError, match="at least two different subsets"):
            fit_surrogate(masks, scores)
        return
    surrogate = fit_surrogate(masks, scores)
    for answer in (surrogate.predict(masks), surrogate.attribute("shapley"), surrogate.loo_error):
        assert answer.isfinite().all()
    for values in (surrogate.walsh_spectrum().sum(0)).tolist():
        assert values == pytest.approx(1, abs=1e-6) or values == 0
    none, every = surrogate.predict([[False] * n, [True] * n])
    close(surrogate.attribute("shapley").sum(0), every - none, 1e-8)


# -- residuals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["linear", "exponential", "linear+rbf"])
@pytest.mark.parametrize("center", [True, False])
@sharings
def test_residuals_are_those_of_refitting(kernel, center, share_ridge):
    """Every latent column is refitted without each subset; components keep their rotation."""
    masks, scores = problem(m=14)
    surrogate = fit_surrogate(masks, scores, kernel=kernel, center=center, share_ridge=share_ridge)
    offset = scores.mean(0) if center else 0.0
    rotation = surrogate.rotation if surrogate.rotation is not None else torch.eye(3).double()
    latent = (scores - offset) / scores.std(0) @ rotation
    residuals = latent * (14 / 13 if center else 1.0)  # of the mean, where nothing beats it
    for term in surrogate.kernel_terms:
        gram = term.kernel.gram(Masks.of(masks))
        for column, ridge in zip(term.columns.tolist(), term.ridge.tolist(), strict=True):
            if not term.dual[:, term.columns == column].any():
                continue  # the mean, with the uncertainty of this kernel
            one = latent[:, [column]]
            residuals[:, column] = reference.leave_one_out(gram, one, ridge, center)[:, 0]
    close(surrogate.loo_residuals, residuals @ rotation.T * scores.std(0))


def test_component_sharing_is_chosen_where_targets_are_few_signals():
    """Two signals of different smoothness, mixed into 30 targets."""
    masks = subsets.bernoulli(8, 120, 0.5, seed=0)
    signs = 2.0 * masks.double() - 1
    signals = torch.stack([3 * signs[:, 0] + signs[:, 1], signs[:, :6].prod(1)], 1)
    signals[:, 1] = torch.randn(120).double()  # noise shared by all targets
    scores = signals @ torch.randn(2, 30).double() + 0.01 * torch.randn(120, 30).double()
    surrogate = fit_surrogate(masks, scores, kernel="linear")
    shared = fit_surrogate(masks, scores, kernel="linear", share_ridge=True)
    assert surrogate.sharing in ("shared", "component")
    assert surrogate.loo_error.mean() <= shared.loo_error.mean() + 1e-12
    if surrogate.sharing == "component":
        latent = (scores - scores.mean(0)) @ surrogate.rotation @ surrogate.rotation.T
        close(latent, scores - scores.mean(0))


# -- what it chooses ----------------------------------------------------------------------------


def test_auto_takes_lasso_for_a_sparse_problem():
    masks = subsets.bernoulli(60, 80, 0.5, seed=0)
    scores = 3.0 * masks[:, 4].double() - 2.0 * masks[:, 17].double()
    scores = scores + 0.05 * torch.randn(80).double()
    surrogate = fit_surrogate(masks, scores)
    assert surrogate.linear_terms and not surrogate.kernel_terms[0].dual.any()
    top = surrogate.attribute("loo").abs().topk(2).indices
    assert set(top.tolist()) == {4, 17}


def test_auto_takes_a_kernel_for_a_dense_problem():
    masks = subsets.bernoulli(8, 150, 0.5, seed=0)
    scores = masks.double().sum(1).square() + 0.1 * torch.randn(150).double()
    surrogate = fit_surrogate(masks, scores)
    assert surrogate.kernel_terms and not surrogate.linear_terms
    assert surrogate.loo_error < 0.02


def test_auto_is_hardly_worse_than_the_best_kernel():
    masks, scores = problem(m=60, n=10)
    auto = fit_surrogate(masks, scores).loo_error.mean()
    for kernel in ("linear", "anova2", "rbf", "exponential"):
        single = fit_surrogate(masks, scores, kernel=kernel, share_ridge=True).loo_error.mean()
        assert auto < 1.15 * single


def test_noise_is_predicted_by_the_mean():
    generator = torch.Generator().manual_seed(5)
    masks = torch.rand(40, 30, generator=generator) < 0.5
    scores = torch.randn(40, generator=generator).double()
    surrogate = fit_surrogate(masks, scores, kernel="anova2")
    assert surrogate.loo_error < 1.1  # the mean has (m / (m-1))^2 (m-1) / m = 1.026
    assert any(row.kernel == "mean" for row in surrogate.candidates)


@sharings
@pytest.mark.parametrize("kernel", ["auto", "rbf", "lasso"])
def test_a_constant_target_among_others_is_its_constant(kernel, share_ridge):
    masks, scores = problem()
    scores[:, 1] = 7.25
    surrogate = fit_surrogate(masks, scores, kernel=kernel, share_ridge=share_ridge)
    prediction = surrogate.predict(reference.all_subsets(6))
    close(prediction[:, 1], torch.full((64,), 7.25).double())
    close(surrogate.attribute("shapley")[:, 1], torch.zeros(6).double())
    assert surrogate.loo_error[1] == 1.0 and surrogate.loo_error.isfinite().all()


def test_a_list_of_kernels_is_chosen_from():
    masks, scores = problem(m=60)
    kernels = [Linear(), "rbf", ANOVA2(0.3), "lasso"]
    surrogate = fit_surrogate(masks, scores, kernel=kernels, share_ridge=True)
    names = {row.kernel.split("(")[0] for row in surrogate.candidates}
    assert names == {"mean", "linear", "rbf", "anova2", "lasso"}
    (best,) = {row.kernel for row in surrogate.candidates if row.num_chosen}
    assert best == surrogate.candidates.best.kernel
    only = fit_surrogate(masks, scores, kernel=["linear"], share_ridge=True)
    named = fit_surrogate(masks, scores, kernel="linear", share_ridge=True)
    assert torch.equal(only.attribute("loo"), named.attribute("loo"))


def test_candidates_tell_what_was_tried():
    masks, scores = problem()
    surrogate = fit_surrogate(masks, scores, kernel="rbf", share_ridge=True)
    table = surrogate.candidates
    assert len(table) == len(list(table)) == 8 * 17 + 1
    assert all(row.num_subsets == 30 for row in table)
    chosen = [row for row in table if row.num_chosen]
    assert len(chosen) == 1 and chosen[0].num_chosen == 3 and chosen[0] == table.best
    assert chosen[0].error == pytest.approx(surrogate.loo_error.mean().item(), rel=1e-9)
    frame = table.to_pandas()
    assert isinstance(frame, pd.DataFrame) and len(frame) == len(table)
    assert str(table).count("\n") == 9 and "rbf(gamma=" in str(table)


def test_the_chosen_ridge_is_the_best_of_a_fine_search():
    masks, scores = problem(t=1)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.1))
    gram = RBF(gamma=0.1).gram(Masks.of(masks))
    errors = [
        reference.leave_one_out(gram, scores, ridge, True).square().mean().item()
        for ridge in np.logspace(-4, 3, 30)
    ]
    assert surrogate.loo_residuals.square().mean().item() < 1.05 * min(errors)


def test_criterion_rank_orders_by_rank_correlation():
    masks, scores = problem(m=40)
    scores = scores.exp()  # heavy tails: error and rank disagree
    by_rank = fit_surrogate(masks, scores, kernel="rbf", criterion="rank", share_ridge=True)
    (chosen,) = [row for row in by_rank.candidates if row.num_chosen]
    highest = max(row.rank_correlation for row in by_rank.candidates)
    assert chosen.rank_correlation == pytest.approx(highest)
    true, left_out = (pd.DataFrame(x.numpy()) for x in (scores, scores - by_rank.loo_residuals))
    peer = true.corrwith(left_out, method="spearman")
    assert chosen.rank_correlation == pytest.approx(peer.mean(), abs=1e-9)


@sharings
@pytest.mark.parametrize("options", [{}, {"noise_std": 0.2}, {"criterion": "rank"}], ids=str)
def test_kernels_judged_together_are_judged_as_alone(options, share_ridge, monkeypatch):
    masks, scores = problem()
    options = {"share_ridge": share_ridge} | options
    together = fit_surrogate(masks, scores, **options)
    monkeypatch.setattr(trials, "_TOGETHER", 1)  # one kernel, and one ridge, at a time
    alone = fit_surrogate(masks, scores, **options)
    close(together.predict(masks), alone.predict(masks), 1e-8)
    close(together.loo_residuals, alone.loo_residuals, 1e-8)
    for column in ("kernel", "num_chosen"):
        one, other = ([getattr(row, column) for row in s.candidates] for s in (together, alone))
        assert one == other
    for column in ("ridge", "error", "rank_correlation"):
        one, other = ([getattr(row, column) for row in s.candidates] for s in (together, alone))
        np.testing.assert_allclose(one, other, rtol=1e-8, atol=1e-9)


def test_rank_correlations_asked_for_later_are_those_computed_at_once(tmp_path, monkeypatch):
    """Of a fit of its own, which keeps residuals, and of many, which factor again."""
    masks, scores = problem()
    later = fit_surrogate(masks, scores, kernel=["rbf", "lasso"], share_ridge=True)
    fit_surrogate(masks, scores, kernel=["rbf", "lasso"], share_ridge=True).save(tmp_path / "s")
    many = fit_many(masks, scores[None], kernel=["rbf", "lasso"], share_ridge=True)[0]
    with monkeypatch.context() as patch:
        patch.setattr(trials, "KEPT_RESIDUALS", 0)
        at_once = fit_surrogate(masks, scores, kernel=["rbf", "lasso"], share_ridge=True)
    expected = [row.rank_correlation for row in at_once.candidates]
    copied = pickle.loads(pickle.dumps(later))
    for found in (later, copied, many, load_surrogate(tmp_path / "s")):
        ranks = [row.rank_correlation for row in found.candidates]
        np.testing.assert_allclose(ranks, expected, rtol=0, atol=1e-12)
    single = fit_surrogate(masks, scores[:, 0], kernel=RBF(gamma=0.1))
    (chosen,) = [row for row in single.candidates if row.num_chosen]
    peer = stats.spearmanr(scores[:, 0], scores[:, 0] - single.loo_residuals).statistic
    assert chosen.rank_correlation == pytest.approx(peer, abs=1e-9)


@pytest.mark.parametrize("noise", [0.1, [0.1, 0.3], "each"])
def test_tables_with_even_noise_are_fitted_together(noise, monkeypatch):
    """As one by one, without a fit of one."""
    masks = subsets.mixed_sizes(6, 24, seed=0)
    scores = torch.randn(4, 24, 2, generator=torch.Generator().manual_seed(1)).double()
    scores += (
        masks.double() @ torch.randn(6, 2, generator=torch.Generator().manual_seed(2)).double()
    )
    levels = 0.1 + torch.rand(4, 1, 2, generator=torch.Generator().manual_seed(3)).double()
    given = levels.expand(4, 24, 2) if noise == "each" else noise
    alone = [
        fit_surrogate(masks, table, noise_std=given[i] if noise == "each" else noise)
        for i, table in enumerate(scores)
    ]
    monkeypatch.setattr("ksm_ext.surrogates.fit.fit_surrogate", None)
    for one, other in zip(fit_many(masks, scores, noise_std=given), alone, strict=True):
        pairs = [
            *zip(one.predict(~masks, True), other.predict(~masks, True), strict=True),
            *zip(one.attribute("loo", True), other.attribute("loo", True), strict=True),
            *((getattr(one, name), getattr(other, name)) for name in ("noise", "nugget_share")),
        ]
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-8)
    wrong = torch.ones(3, 24, 2)
    with pytest.raises(
        ValueError, match=r"^`noise_std` must be of shape \(4, 24\) or \(4, 24, t\)"
    ):
        fit_many(masks, scores, noise_std=wrong)


def test_lists_of_tensors_are_answered_by_tensors():
    masks, scores = (torch.as_tensor(table) for table in problem(t=2))
    for fitted in fit_many([masks, masks], [scores, scores]):
        answer = fitted.attribute("shapley")
        assert isinstance(answer, torch.Tensor)
        expected = fit_surrogate(masks, scores).attribute("shapley")
        torch.testing.assert_close(answer, expected, rtol=1e-9, atol=1e-12)
    assert isinstance(fit_surrogate([*masks], [*scores]).attribute("loo"), torch.Tensor)


def test_one_of_many_keeps_nothing_of_the_others():
    tables = [problem(t=2) for _ in range(40)]
    many = fit_many(torch.stack([m for m, _ in tables]), torch.stack([s for _, s in tables]))
    sizes = [len(pickle.dumps(fit)) for fit in (many[7], fit_surrogate(*tables[7]))]
    assert sizes[0] < 1.1 * sizes[1]


def test_many_subsets_are_screened():
    masks = subsets.bernoulli(12, 800, 0.5, seed=0)
    scores = masks.double() @ torch.randn(12).double() + 0.3 * torch.randn(800).double()
    surrogate = fit_surrogate(masks, scores, kernel="rbf")
    sizes = [row.num_subsets for row in surrogate.candidates]
    assert set(sizes) == {512, 800}
    assert len({row.kernel for row in surrogate.candidates if row.num_subsets == 512}) == 8
    assert len({row.kernel for row in surrogate.candidates if row.num_subsets == 800}) <= 3
    assert all(row.num_subsets == 800 for row in surrogate.candidates if row.num_chosen)
    assert surrogate.candidates.best.num_subsets == 800 and surrogate.loo_error < 0.2


def test_screening_survives_scores_that_are_constant_on_the_sample():
    """One subset in a thousand has another score: it need not be among the screened."""
    masks = subsets.bernoulli(6, 62, 0.5, seed=0)[torch.arange(1000) % 62]
    for odd in (0, 1, 2):
        scores = torch.zeros(1000, dtype=torch.float64)
        scores[odd] = 1.0
        assert fit_surrogate(masks, scores, kernel="anova2").attribute("loo").isfinite().all()


def test_ridge_zero_has_the_residuals_of_refitting():
    masks = reference.all_subsets(5)[torch.randperm(32)[:20]]
    scores = torch.randn(20, 2).double()
    for center in (True, False):
        surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=1.0), ridge=0, center=center)
        gram = RBF(gamma=1.0).gram(Masks.of(masks))
        close(surrogate.loo_residuals, reference.leave_one_out(gram, scores, 0.0, center))


# -- given ridges -------------------------------------------------------------------------------


def test_a_tiny_ridge_interpolates():
    masks = reference.all_subsets(5)[torch.randperm(32)[:20]]
    scores = torch.randn(20, 2).double()
    for ridge in (1e-9, 0, 0.0, np.float64(0)):
        surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=1.0), ridge=ridge)
        close(surrogate.predict(masks), scores, 1e-6)
        assert [row.kernel for row in surrogate.candidates] == ["rbf(gamma=1)"]


def test_a_given_ridge_still_searches_the_kernel():
    masks, scores = problem()
    surrogate = fit_surrogate(masks, scores, kernel="rbf", ridge=0.3)
    assert len(surrogate.candidates) == 8 and all(row.ridge == 0.3 for row in surrogate.candidates)
    assert (surrogate.kernel_terms[0].ridge == 0.3).all()


def test_ridge_zero_with_a_singular_gram_matrix():
    masks, scores = problem(m=10)
    form = r"^`ridge` must be positive for these masks, got 0 with a singular Gram matrix \(rank \d"
    with pytest.raises(ValueError, match=form):
        fit_surrogate(masks, scores, kernel="linear", ridge=0)
    masks[1] = masks[0]  # repeats are one subset, and nothing is singular
    answer = fit_surrogate(masks, scores, kernel=RBF(gamma=1.0), ridge=0).predict(masks[:1])
    close(answer, scores[:2].mean(0, keepdim=True), 1e-8)


def test_repeated_subsets_are_welcome_with_a_ridge():
    masks, scores = problem()
    twice = fit_surrogate(masks.repeat(2, 1), scores.repeat(2, 1), kernel="linear", ridge=2.0)
    once = fit_surrogate(masks, scores, kernel="linear", ridge=1.0)
    close(twice.attribute("loo"), once.attribute("loo"))


# -- real weights -------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["auto", "linear", "rbf", "laplace", "exponential", "lasso"])
def test_mixtures_are_fitted(kernel):
    weights = torch.rand(60, 4).double()
    weights /= weights.sum(1, keepdim=True)
    scores = (weights @ torch.tensor([1.0, 2.0, -1.0, 0.5]).double())[:, None].exp()
    surrogate = fit_surrogate(weights, scores, kernel=kernel)
    assert surrogate.loo_error < 0.1
    effects = surrogate.attribute("loo")[:, 0]
    assert effects.argmax() == 1 and effects.argmin() == 2
    close(surrogate.predict(weights.float()), surrogate.predict(weights), 1e-3)


# -- refusals -----------------------------------------------------------------------------------

M = (torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) < 0.5).int().tolist()
F = [1.0, 2.0, 0.5, 3.0, 1.5, 2.5, 0.0, 4.0]
M0 = np.zeros((8, 0))


def with_entry(value):
    return [*F[:2], value, *F[3:]]


REFUSED = {
    "nan score": (
        M,
        with_entry(math.nan),
        {},
        r"`scores` must be finite, got 1 NaN .* \(2,\)\. Dr",
    ),
    "infinite score": (M, with_entry(-math.inf), {}, r"`scores` must be finite, got .* -inf at \("),
    "nan mask": ([[math.nan] * 4] * 8, F, {}, "`masks` must be finite, got 32 NaN or infinite"),
    "rows": (M[:7], F, {}, r"`scores` must be of 7 rows like `masks`, got shape \(8\)\. Give one"),
    "scalar": (M, 1.0, {}, r"`scores` must be of shape \(m,\) or \(m, t\), got shape \(\)\. Give"),
    "3-D": (M, [[[1.0]]] * 8, {}, r"`scores` must be of shape .m,. or .m, t., got shape \(8, 1,"),
    "1-D": (F, F, {}, r"`masks` must be 2-dimensional .subsets, tasks., got shape \(8\)\. Reshape"),
    "no task": (M0, F, {}, r"`masks` must be of at least one task, got shape \(8, 0\)"),
    "no target": (M, np.zeros((8, 0)), {}, "`scores` must be of at least one target, got shape"),
    "few": (M[:2], F[:2], {}, "`masks` must be at least 3 subsets, got 2. Score more subsets"),
    "none": (M0.T[:, :4], M0.T[:, :2], {}, "`masks` must be at least 3 subsets, got 0. Score more"),
    "constant": (M, [[2.0, 3.0]] * 8, {}, "`scores` must be varying over .*, got constant targets"),
    "all empty": ([[0, 0]] * 8, F, {}, "`masks` must be at least two .* got the empty subset 8 ti"),
    "all full": ([[1, 1]] * 8, F, {}, "`masks` must be .*, got the full subset 8 times. Draw"),
    "all same": ([[0, 1]] * 8, F, {}, "`masks` must be .*, got the same subset 8 times. Draw"),
    "same mixture": ([[0.2, 0.8]] * 8, F, {}, "`masks` must be .*, got the same subset 8 times."),
    "task names": (M, F, {"task_names": ["a"]}, "`task_names` must be 4 different names, got 1. G"),
    "task twice": (M, F, {"task_names": [*"abca"]}, "`task_names` must be 4 .*, got 'a' more than"),
    "target names": (M, F, {"target_names": []}, "`target_names` must be 1 different names, got 0"),
    "kernel": (M, F, {"kernel": "gauss"}, "`kernel` must be 'auto', one of .*, got 'gauss'. Pass"),
    "kernel sum": (M, F, {"kernel": "linear+"}, "`kernel` must be 'auto', one of .*, got 'linear"),
    "no kernel": (M, F, {"kernel": []}, "`kernel` must be at least one kernel, got an empty list."),
    "criterion": (
        M,
        F,
        {"criterion": "r2"},
        "`criterion` must be one of 'error', 'rank', .*, got 'r",
    ),
    "share": (M, F, {"share_ridge": "no"}, "`share_ridge` must be one of 'auto', True, False, got"),
    "negative ridge": (M, F, {"ridge": -1}, "`ridge` must be 'loo' or at least 0, got -1. Leave"),
    "nan ridge": (M, F, {"ridge": math.nan}, "`ridge` must be 'loo' or at least 0, got nan. Leave"),
    "infinite ridge": (M, F, {"ridge": math.inf}, "`ridge` must be 'loo' or finite, got inf."),
}


@pytest.mark.parametrize("masks, scores, options, found", REFUSED.values(), ids=REFUSED)
def test_values_are_refused_by_name(masks, scores, options, found):
    with pytest.raises(ValueError, match=f"^{found}"):
        fit_surrogate(masks, scores, **options)


@pytest.mark.parametrize(
    "masks, scores, found",
    [
        (
            torch.zeros(4, 3, 2),
            torch.randn(4),
            r"`scores` must be of shape \(b, m\) or \(b, m, t\)",
        ),
        (torch.zeros(4, 3, 2), torch.randn(4, 0), "`scores` must be of shape .b, m. or"),
        (
            torch.zeros(4, 3, 2),
            torch.randn(5, 3),
            r"`masks` must be of shape \(5, 3, n\), or \(3, n",
        ),
        (
            torch.zeros(4, 2),
            torch.randn(5, 3),
            r"`masks` must be of shape \(5, 3, n\), or \(3, n\)",
        ),
        (torch.zeros(5, 3, 0), torch.randn(5, 3), r"`masks` must be of shape \(5, 3, n\), or"),
        (torch.zeros(5, 3, 2), torch.randn(5, 3), "`masks` must be at least two different subsets"),
    ],
)
def test_tables_that_do_not_fit_are_refused(masks, scores, found):
    with pytest.raises(ValueError, match=f"^{found}"):
        fit_many(masks, scores)


@pytest.mark.parametrize(
    "masks, scores, options, found",
    [
        ([["a", "b"]] * 8, F, {}, "`masks` must be numeric, got list of dtype <U1. Pass"),
        (M, ["a"] * 8, {}, "`scores` must be numeric, got list of dtype <U1. Pass a tensor"),
        ([*M[:7], [1, 0]], F, {}, "`masks` must be rectangular, got a ragged list. Give every row"),
        (M, [*F[:7], [1.0, 2.0]], {}, "`scores` must be rectangular, got a ragged list. Give"),
        (M, torch.zeros(8, dtype=torch.complex64), {}, "`scores` must be a dense real tensor, got"),
        (M, F, {"ridge": True}, "`ridge` must be 'loo' or a number, got True. Leave it out"),
        (M, F, {"ridge": "cv"}, "`ridge` must be 'loo' or a number, got 'cv'. Leave it out"),
        (M, F, {"ridge": None}, "`ridge` must be 'loo' or a number, got None. Leave it out"),
        (M, F, {"kernel": [3]}, "`kernel` must be a name or a kernel, got int. Pass a name"),
        (M, F, {"kernel": None}, "`kernel` must be a name or a kernel, got NoneType. Pass a name"),
        (M, F, {"kernel": 3}, "`kernel` must be a name or a kernel, got int. Pass a name"),
        (M, F, {"kernel": Kernel}, "`kernel` must be a name or a kernel, got Kernel. Pass a name"),
        (M, F, {"kernel": dict}, "`kernel` must be a name or a kernel, got dict. Pass a name"),
    ],
)
def test_kinds_are_refused_by_name(masks, scores, options, found):
    with pytest.raises(TypeError, match=f"^{found}"):
        fit_surrogate(masks, scores, **options)


def test_the_class_of_a_kernel_is_its_kernel_with_nothing_set():
    for kernel in (RBF, [RBF, "linear"]):
        named = "rbf" if kernel is RBF else ["rbf", "linear"]
        one, other = (fit_surrogate(M, F, kernel=each).predict(M) for each in (kernel, named))
        np.testing.assert_array_equal(one, other)


def test_too_many_subsets_are_refused_before_the_work():
    masks = reference.all_subsets(15)[:20_001]
    form = r"^`solver` must be 'cg' or 'auto' for more than 20000 subsets, got 'eigh' with 20001"
    with pytest.raises(ValueError, match=form):
        fit_surrogate(masks, torch.randn(20_001), solver="eigh")


def test_a_generator_of_kernels_is_a_list_of_them():
    """Read once, though a fit asks for its kernels several times."""
    masks, scores = np.array(M), np.array(F)
    options = {"noise_std": np.linspace(0.01, 0.5, len(masks)), "share_ridge": True}
    given = fit_surrogate(masks, scores, kernel=(name for name in ["linear", "rbf"]), **options)
    listed = fit_surrogate(masks, scores, kernel=["linear", "rbf"], **options)
    assert str(given.candidates) == str(listed.candidates)
    np.testing.assert_array_equal(given.predict(masks), listed.predict(masks))


def test_the_criterion_of_attributions_is_the_error_near_the_full_set():
    """The chosen candidate has the smallest weighted error, by its own residuals."""
    masks, scores = problem(m=60)
    sizes, n = masks.sum(1), masks.shape[1]
    counts = torch.bincount(sizes, minlength=n + 1).double()
    around = torch.stack([counts.roll(1), 2 * counts, counts.roll(-1)]).sum(0) / 4
    around[0], around[n] = (2 * counts[0] + counts[1]) / 4, (2 * counts[n] + counts[n - 1]) / 4
    wanted = ((sizes - n) / (0.15 * n)).double().exp() / around[sizes]
    wanted = torch.where((sizes == 0) | (sizes == n), 0.0, wanted)
    wanted = (wanted / wanted.mean()).clamp_max(10.0)
    wanted /= wanted.mean()
    torch.testing.assert_close(near_full(sizes, n), wanted)
    found = {}
    for gamma in (0.03, 0.3, 3.0):
        for ridge in RELATIVE_RIDGES:
            kernel, variance = RBF(gamma), RBF(gamma).variance(Masks(masks))
            fit = fit_surrogate(masks, scores, kernel=kernel, ridge=ridge * variance)
            errors = fit.loo_residuals.square() / scores.var(0)
            found[gamma, ridge] = float((wanted[:, None] * errors).mean())
    options = {"kernel": [RBF(0.03), RBF(0.3), RBF(3.0)], "share_ridge": True}
    chosen = fit_surrogate(masks, scores, criterion="attribution", **options)
    errors = chosen.loo_residuals.square() / scores.var(0)
    assert float((wanted[:, None] * errors).mean()) == pytest.approx(min(found.values()), rel=1e-8)
    (row,) = [row for row in chosen.candidates if row.num_chosen]
    assert row.error == pytest.approx(float(errors.mean()))  # the table has plain errors


def test_subsets_that_count_alike_near_the_full_set_are_chosen_by_as_by_error():
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([torch.randperm(10, generator=generator) < 5 for _ in range(40)])
    scores = masks.double() @ torch.randn(10, 2, generator=generator).double()
    scores += 0.5 * torch.randn(40, 2, generator=generator).double()
    one, other = (fit_surrogate(masks, scores, criterion=c) for c in ("error", "attribution"))
    torch.testing.assert_close(one.predict(masks), other.predict(masks))
    assert torch.equal(one.attribute("loo"), other.attribute("loo"))


def test_mixtures_have_no_size_to_be_near():
    masks, scores = problem(m=20)
    with pytest.raises(ValueError, match="`masks` must be 0/1 for criterion='attribution', got"):
        fit_surrogate(masks * 0.5, scores, criterion="attribution")
