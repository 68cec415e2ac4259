"""fit_logistic against dense Newton in float64, subset by subset."""

import pytest
import torch

from ksm_ext.scores.logistic import fit_logistic, task_sums, unit_steps

OFFSETS = torch.tensor([0, 7, 7, 19, 30, 41])  # the second task is empty


def problem(dtype=torch.float64, seed=0, k=6):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(41, k, generator=generator, dtype=torch.float64)
    margins = torch.randn(41, generator=generator, dtype=torch.float64)
    masks = torch.rand(9, 5, generator=generator) < 0.5
    masks[0], masks[1] = True, False
    return features.to(dtype), margins.to(dtype), masks


def dense(features, margins, mask, ridge):
    """The minimum of one subset's objective by dense Newton steps with halving."""
    task = torch.repeat_interleave(torch.arange(5), OFFSETS.diff())
    x, h = features[mask[task]].double(), margins[mask[task]].double()
    weights = torch.zeros(features.shape[1], dtype=torch.float64)

    def objective(w):
        penalty = ridge / 2 * w @ w
        return (
            penalty if len(x) == 0 else -torch.nn.functional.logsigmoid(h + x @ w).mean() + penalty
        )

    for _ in range(60):
        error = torch.sigmoid(-(h + x @ weights))
        size = max(len(x), 1)
        gradient = -(x * error[:, None]).sum(0) / size + ridge * weights
        hessian = (x * (error * (1 - error))[:, None]).T @ x / size
        hessian.diagonal().add_(ridge)
        step = torch.linalg.solve(hessian, gradient)
        while objective(weights - step) > objective(weights) and step.norm() > 1e-14:
            step = step / 2
        weights = weights - step
    return weights, objective(weights)


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 10.0])
def test_solutions_are_the_minima(ridge):
    features, margins, masks = problem()
    fitted = fit_logistic(features, margins, OFFSETS, masks, ridge, tolerance=1e-14)
    for row, mask in enumerate(masks):
        weights, objective = dense(features, margins, mask, ridge)
        torch.testing.assert_close(fitted.weights[row], weights, rtol=1e-5, atol=1e-5)
        assert abs(float(fitted.objective[row] - objective)) < 1e-12
    assert (fitted.decrement <= 1e-14).all()


def test_the_tolerance_is_of_the_objective():
    features, margins, masks = problem(k=30)
    coarse = fit_logistic(features, margins, OFFSETS, masks, 1e-2, tolerance=1e-4)
    for row, mask in enumerate(masks):
        gap = float(coarse.objective[row] - dense(features, margins, mask, 1e-2)[1])
        assert -1e-12 < gap < 1e-3
    fine = fit_logistic(features, margins, OFFSETS, masks, 1e-2, tolerance=1e-12)
    assert fine.num_products > coarse.num_products


def test_single_precision_reaches_the_same_minima():
    features, margins, masks = problem()
    double = fit_logistic(features, margins, OFFSETS, masks, 1e-2, tolerance=1e-12)
    single = fit_logistic(features.float(), margins.float(), OFFSETS, masks, 1e-2)
    assert single.weights.dtype == torch.float32
    torch.testing.assert_close(single.objective, double.objective, rtol=0, atol=1e-6)


def test_an_empty_subset_stays_where_it_is():
    features, margins, masks = problem()
    fitted = fit_logistic(features, margins, OFFSETS, masks, 1e-2)
    assert not fitted.weights[1].any() and fitted.objective[1] == 0


def test_separable_and_extreme_margins_end_finite():
    features, _, masks = problem()
    margins = torch.tensor([-80.0, 80.0, 500.0]).repeat(14)[:41].double()
    fitted = fit_logistic(features * 100, margins, OFFSETS, masks, 1e-3)
    assert fitted.weights.isfinite().all() and fitted.objective.isfinite().all()


def test_chunks_of_subsets_change_nothing(monkeypatch):
    features, margins, _ = problem()
    masks = torch.rand(200, 5, generator=torch.Generator().manual_seed(3)) < 0.5
    whole = fit_logistic(features, margins, OFFSETS, masks, 1e-2, tolerance=1e-13)
    monkeypatch.setattr("ksm_ext.scores.logistic._CURVATURE_BYTES", 1)
    parts = fit_logistic(features, margins, OFFSETS, masks, 1e-2, tolerance=1e-13)
    torch.testing.assert_close(whole.weights, parts.weights, rtol=1e-6, atol=1e-6)


def test_repeats_are_bit_equal():
    features, margins, masks = problem(torch.float32)
    a, b = (fit_logistic(features, margins, OFFSETS, masks, 1e-2).weights for _ in range(2))
    assert torch.equal(a, b)


@pytest.mark.parametrize("ridge", [1e-3, 1e-1, 10.0])
def test_weighted_solutions_are_scikit_learns(ridge):
    """Samples with weights, some of them 0, and a subset whose samples have none."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    features, _, masks = problem()
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(41, generator=generator, dtype=torch.float64)
    weights[3], weights[30:] = 0.0, 0.0
    masks[2] = torch.tensor([False, True, False, False, True])
    data = features, torch.zeros(41, dtype=torch.float64), OFFSETS, masks, ridge
    fitted = fit_logistic(*data, sample_weights=weights, tolerance=1e-15)
    labels = torch.where(torch.arange(41) % 2 == 0, 1.0, -1.0)
    task = torch.repeat_interleave(OFFSETS.diff())
    for row, mask in enumerate(masks):
        inside = mask[task] & (weights > 0)
        if not inside.any():
            assert row in (1, 2) and not fitted.weights[row].any() and fitted.objective[row] == 0
            continue
        strength = float(ridge * weights[inside].sum())
        peer = linear_model.LogisticRegression(
            C=1 / strength, fit_intercept=False, tol=1e-12, max_iter=10_000
        )
        signed = (labels[:, None] * features)[inside].numpy()
        peer.fit(signed, labels[inside].numpy(), sample_weight=weights[inside].numpy())
        torch.testing.assert_close(
            fitted.weights[row], torch.from_numpy(peer.coef_[0]), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
@pytest.mark.parametrize("max_steps", [0, 2, 200])
def test_unit_steps_are_dense_solutions(dtype, ridge, max_steps, monkeypatch):
    """Also of systems that conjugate gradients leave unsolved."""
    monkeypatch.setattr("ksm_ext.scores.logistic._MAX_UNIT_CG", max_steps)
    monkeypatch.setattr("ksm_ext.scores.logistic._STEPS", 3)
    features, _, masks = problem(k=30)  # some subsets have fewer samples
    masks = masks[masks[:, [0, 2, 3, 4]].any(1)]
    generator = torch.Generator().manual_seed(5)
    right = torch.randn(len(masks), 30, generator=generator, dtype=torch.float64)
    weights = torch.rand(41, generator=generator, dtype=torch.float64)
    weights[3] = 0.0
    task = torch.repeat_interleave(OFFSETS.diff())
    of_tasks = torch.zeros(5).double().index_add(0, task, weights)
    torch.testing.assert_close(task_sums(weights, OFFSETS), of_tasks)
    for given in (None, weights):
        data = features.to(dtype), OFFSETS, masks, right.to(dtype), ridge
        found = unit_steps(*data, sample_weights=given)
        assert found.dtype == dtype
        for row, mask in enumerate(masks):
            inside = mask[task]
            counts = torch.ones(41).double() if given is None else given
            phi = features[inside]
            matrix = phi.T @ (counts[inside, None] * phi) / counts[inside].sum()
            matrix.diagonal().add_(ridge)
            expected = torch.linalg.solve(matrix, right[row])
            error = (found[row].double() - expected).norm() / expected.norm()
            assert error < (1e-9 if dtype == torch.float64 else 2e-3 if ridge < 1e-3 else 1e-5)


def test_unit_steps_of_features_whose_curvature_rounds_the_ridge_away():
    """Conjugate gradients in float32 end where they should not, which residuals tell."""
    features, _, masks = problem(torch.float32, k=60)
    masks = masks[masks[:, [0, 2, 3, 4]].any(1)]
    features = 100 * features
    right = torch.randn(len(masks), 60, generator=torch.Generator().manual_seed(6))
    found = unit_steps(features, OFFSETS, masks, right, 1e-3)
    for row, mask in enumerate(masks):
        phi = features[mask[torch.repeat_interleave(OFFSETS.diff())]].double()
        matrix = phi.T @ phi / len(phi) + 1e-3 * torch.eye(60).double()
        expected = torch.linalg.solve(matrix, right[row].double())
        off = found[row] - expected
        assert off @ matrix @ off < 1e-6 * (expected @ matrix @ expected)


def test_whole_weights_are_repeated_samples(monkeypatch):
    monkeypatch.setattr("ksm_ext.scores.logistic._SAMPLES", 7)  # several blocks
    features, margins, masks = problem()
    times = torch.randint(4, (41,), generator=torch.Generator().manual_seed(2))
    repeated = features.repeat_interleave(times, 0), margins.repeat_interleave(times)
    task = torch.repeat_interleave(OFFSETS.diff())
    offsets = torch.cat([torch.zeros(1).long(), torch.bincount(task, times, 5).long().cumsum(0)])
    weighted, plain = (
        fit_logistic(*data, masks, 1e-2, tolerance=1e-15, **options)
        for data, options in (
            ((features, margins, OFFSETS), {"sample_weights": 0.3 * times.double()}),
            ((*repeated, offsets), {}),
        )
    )
    torch.testing.assert_close(weighted.weights, plain.weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weighted.objective, plain.objective, rtol=1e-12, atol=1e-12)
