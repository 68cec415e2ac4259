"""Ridge regression in the eigenbasis against dense algebra and refitting."""

import pytest
import reference
import torch
from problems import close, many_subsets

from ksm_ext import RBF, Exponential
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge

centred_or_not = pytest.mark.parametrize("center", [True, False])
every_ridge = pytest.mark.parametrize("ridge", [1e-3, 0.1, 1.0, 30.0])


def gram_and_scores():
    masks, scores = many_subsets(12, 5, 3)
    return Exponential(gamma=0.4).gram(Masks.of(masks)), scores


@centred_or_not
@every_ridge
def test_leave_one_out_is_refitting(center, ridge):
    gram, scores = gram_and_scores()
    factor = SpectralRidge(gram, center=center)
    expected = reference.leave_one_out(gram, scores, ridge, center)
    close(factor.leave_one_out(factor.rotate(scores), ridge), expected)


@centred_or_not
@every_ridge
def test_dual_is_the_dense_solution(center, ridge):
    gram, scores = gram_and_scores()
    factor = SpectralRidge(gram, center=center)
    dual, intercept = reference.kernel_ridge(gram, scores, ridge, center)
    close(factor.dual(factor.rotate(scores), ridge), dual)
    if center:
        close(scores.mean(0) - factor.gram_row_mean @ dual, intercept)
        close(dual.sum(0), torch.zeros(3).double())


@centred_or_not
def test_each_column_may_have_its_ridge(center):
    gram, scores = gram_and_scores()
    factor = SpectralRidge(gram, center=center)
    rotated, ridges = factor.rotate(scores), torch.tensor([0.1, 1.0, 7.0], dtype=torch.float64)
    for answer in (factor.dual, factor.leave_one_out):
        single = [answer(rotated[:, [j]], ridge) for j, ridge in enumerate(ridges.tolist())]
        close(answer(rotated, ridges), torch.cat(single, 1), 1e-13)


@centred_or_not
@every_ridge
def test_signal_variance_makes_left_out_errors_standard(center, ridge):
    """Predicting subset i from the rest has variance signal (k_ii - ... + ridge)."""
    gram, scores = gram_and_scores()
    m = len(gram)
    factor = SpectralRidge(gram, center=center)
    signal = factor.signal_variance(factor.rotate(scores), ridge)
    residuals = reference.leave_one_out(gram, scores, ridge, center)
    variance = []
    for i in range(m):
        rest = torch.tensor([j for j in range(m) if j != i])
        one = torch.zeros(1, m, dtype=torch.float64)
        one[0, i] = 1
        variance.append(reference.posterior_variance(one, gram, rest, ridge, center) + ridge)
    standardised = residuals.square() / torch.cat(variance)[:, None] / signal
    close(standardised.mean(0), torch.ones(3).double())


@pytest.mark.parametrize("center, rank", [(True, "2 of 3"), (False, "3 of 4")])
def test_ridge_zero_needs_a_regular_gram_matrix(center, rank):
    masks = Masks.of([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    factor = SpectralRidge(RBF(gamma=1.0).gram(masks), center=center)
    form = r"^`ridge` must be positive for these masks, got 0 with a singular Gram matrix \(rank "
    form += rf"{rank}\)\. Use a positive ridge or ridge='loo'\.$"
    with pytest.raises(ValueError, match=form):
        factor.check_ridge(0.0)
    factor.check_ridge(1e-9)
    SpectralRidge(RBF(gamma=1.0).gram(masks[:3]), center=center).check_ridge(0.0)


@centred_or_not
def test_a_batch_is_its_parts(center):
    gram, scores = gram_and_scores()
    batch = torch.stack([gram, gram @ gram, gram.exp()])
    weights = torch.linspace(0.5, 2, 3 * len(gram)).double().reshape(3, -1)
    factor = SpectralRidge(batch, center=center, weights=weights)
    ridges = torch.tensor([[0.1], [1.0], [7.0]], dtype=torch.float64).expand(-1, 3)
    rotated = factor.rotate(scores)
    for i in range(3):
        alone = SpectralRidge(batch[i], center=center, weights=weights[i])
        y = alone.rotate(scores)
        for name in ("dual", "leave_one_out", "signal_variance"):
            expected = getattr(alone, name)(y, ridges[i])
            close(getattr(factor, name)(rotated, ridges)[i], expected, 1e-9)
            close(getattr(factor[i], name)(rotated[i], ridges[i]), expected, 1e-9)
        dual, precision = factor.at_ridges(rotated, ridges[:, :1])
        close((dual / precision)[i, :, 0], alone.leave_one_out(y, ridges[i]), 1e-9)
        close(
            factor.offset(factor.dual(rotated, ridges))[i], alone.offset(alone.dual(y, ridges[i]))
        )


def test_many_columns_of_few_ridges_are_those_of_each():
    gram, scores = gram_and_scores()
    factor = SpectralRidge(gram)
    y = factor.rotate(scores.repeat(1, 20))
    ridges = torch.tensor([0.1, 2.0, 30.0], dtype=torch.float64).repeat(20)
    each = [factor.leave_one_out(y[:, [j]], float(ridges[j])) for j in range(60)]
    close(factor.leave_one_out(y, ridges), torch.cat(each, 1), 1e-12)
