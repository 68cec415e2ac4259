"""The Walsh spectrum against enumeration."""

import pytest
import reference
import torch
from problems import KERNELS, close, every_kernel, few_subsets, of

from ksm_ext import RBF, fit_surrogate
from ksm_ext.surrogates import walsh


@every_kernel
@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_walsh_spectrum(kernel, center, n):
    kernel = of(kernel, n)
    _, masks, scores = few_subsets(n)
    surrogate = fit_surrogate(masks, scores, kernel=kernel, ridge=0.2, center=center)
    expected = reference.walsh_spectrum(surrogate.predict(reference.all_subsets(n)), n)
    spectrum = surrogate.walsh_spectrum()
    close(spectrum, expected)
    close(spectrum.sum(0), torch.ones(2).double())
    for max_order in range(1, n + 1):
        close(surrogate.walsh_spectrum(max_order), expected[:max_order])


@pytest.mark.parametrize("max_order", [1, 3, 5])
@pytest.mark.parametrize("newton", [0, 10])
@pytest.mark.parametrize("kernel", [each for each in KERNELS if not each.is_tabulated], ids=str)
def test_walsh_spectrum_without_enumeration(kernel, newton, max_order, monkeypatch):
    _, masks, scores = few_subsets(5)
    surrogate = fit_surrogate(masks[:8], scores[:8], kernel=of(kernel, 5), ridge=0.2)
    expected = surrogate.walsh_spectrum(max_order)
    monkeypatch.setattr(walsh, "_ENUMERATED", 0)
    monkeypatch.setattr(walsh, "_NEWTON", newton)
    monkeypatch.setattr(walsh, "_FORM_ENTRIES", 2**15)  # several blocks
    close(surrogate.walsh_spectrum(max_order), expected, 1e-6)


@pytest.mark.parametrize("kernel", ["lasso", "least_squares", "linear"])
def test_walsh_spectrum_of_linear_surrogates(kernel):
    _, masks, noise = few_subsets(6)
    scores = masks.double() @ torch.randn(6, 2).double() + 0.1 * noise
    spectrum = fit_surrogate(masks, scores, kernel=kernel).walsh_spectrum()
    close(spectrum, torch.eye(6).double()[:, :1].expand(6, 2), 1e-12)


def test_walsh_spectrum_of_constant_targets_is_zero():
    _, masks, scores = few_subsets(5)
    scores[:, 1] = 3.0
    spectrum = fit_surrogate(masks, scores, kernel="rbf", share_ridge=False).walsh_spectrum()
    assert not spectrum[:, 1].any()


def test_walsh_orders_of_many_tasks():
    masks = torch.rand(50, 100) < 0.5
    scores = masks[:, 0].double() + (masks[:, 1] & masks[:, 2]).double()
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.01), ridge=0.1)
    spectrum = surrogate.walsh_spectrum()
    assert spectrum.shape == (10,) and (spectrum >= 0).all() and spectrum.sum() <= 1 + 1e-12
    close(surrogate.walsh_spectrum(3), spectrum[:3])


@pytest.mark.parametrize("max_order", [0, -1, 6])
def test_walsh_order_errors(max_order):
    _, masks, scores = few_subsets(5)
    form = rf"^`max_order` must be between 1 and 5, got {max_order}\."
    with pytest.raises(ValueError, match=form):
        fit_surrogate(masks, scores, kernel="linear").walsh_spectrum(max_order)
