"""Kernels and small problems that several tests of surrogates share."""

import pytest
import reference
import torch

from ksm_ext import ANOVA2, RBF, Exponential, Laplace, Linear, Polynomial, Size

_GENERATOR = torch.Generator().manual_seed(0)
GAMMAS = tuple((10 ** (2 * torch.rand(1500, generator=_GENERATOR) - 1.5)).tolist())
KERNELS = [
    Linear(),
    Polynomial(gamma=0.3),
    Polynomial(degree=2, gamma=1.5, coef0=0.0),
    Polynomial(degree=1, gamma=0.2, coef0=2.0),
    ANOVA2(pair_weight=0.3),
    RBF(gamma=0.07),
    RBF(gamma=9.0),
    RBF(gamma=30.0),
    Laplace(gamma=0.4),
    Exponential(gamma=0.5),
    Exponential(gamma=3.0),
    Linear() + 0.5 * RBF(gamma=0.2),
    ANOVA2(pair_weight=0.1) + 2.0 * Exponential(gamma=0.3) + Polynomial(gamma=0.1),
    Size(),
    Exponential(gamma=0.4, amplitude=1.0) + 0.3 * Size(degree=3),
    ANOVA2(pair_weight=0.1) + 2.0 * Size(degree=4) + RBF(gamma=GAMMAS) + Size(degree=1),
    RBF(gamma=0.1, amplitude=1.5),
    Exponential(gamma=0.4, amplitude=-0.8),
    Laplace(gamma=30.0, amplitude=0.3),
    ANOVA2(pair_weight=0.1) + 0.5 * RBF(gamma=0.3, amplitude=1.0),
    RBF(gamma=GAMMAS),
    Exponential(gamma=GAMMAS, amplitude=0.7),
    Polynomial(gamma=0.1) + 0.5 * Laplace(gamma=GAMMAS, amplitude=-0.5) + Exponential(gamma=0.2),
]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=str)


def of(kernel, n):
    """The kernel of n tasks."""
    return kernel.of_tasks(torch.arange(len(GAMMAS)) < n)


def close(actual, expected, tolerance=1e-10):
    """Up to ``tolerance`` of 1, or of the largest number expected."""
    scale = max(1.0, expected.abs().max().item()) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def few_subsets(n, t=2, seed=0):
    """Indices of subsets (m,), their masks (m, n) and scores (m, t)."""
    generator = torch.Generator().manual_seed(seed)
    m = min(20, 2**n + 1)
    index = torch.cat([torch.randperm(2**n, generator=generator), torch.zeros(1).long()])[:m]
    if n == 1:
        index = torch.tensor([0, 1, 1])
    return (
        index,
        reference.all_subsets(n)[index],
        torch.randn(m, t, generator=generator, dtype=torch.float64),
    )


def many_subsets(m=20, n=6, t=2):
    """Masks (m, n) and scores (m, t) with main effects and noise."""
    masks = reference.all_subsets(n)[torch.randperm(2**n)[:m]]
    scores = masks.double() @ torch.randn(n, t).double() + 0.3 * torch.randn(m, t).double() + 2
    return masks, scores
