r"""Readouts of sums of product kernels: linear functionals that factorise over tasks.

A functional L of ``prod_i g(s_i, a_i)`` is what it makes of factors ``g(1, a_i)`` of tasks that are
there and ``g(0, a_i)`` of those that are not. Every kernel on masks is a sum of such products: an
overlap ``B[o]`` is by its discrete Fourier transform ``sum_k b_k w^(k o)``, with
``w = exp(2 pi i / (n + 1))``, a sum of kernels with ``g(1, 1) = w^k`` and else 1; functions of the
sizes of both subsets likewise, each by itself. So readouts are exact to rounding at any n.

Shapes: n tasks that kernels know, m subsets, N answers; float64.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks

_ENTRIES = 2**16  # factors of some rows at a time, each at every node


class ProductReadout(ABC):
    """A readout of N answers, by what it makes of products."""

    @abstractmethod
    def of_products(self, there: Tensor, away: Tensor) -> Tensor:
        """``L``, (..., N), of products of factors (..., n) of tasks that are there or away."""

    @abstractmethod
    def of_pairs(self, table: Tensor) -> Tensor:
        """``L L'``, (N,), of products of factors (2, 2, n) by which of two subsets has a task."""

    def functionals(self, masks: Masks, kernel: Kernel) -> Tensor:
        """Answers of ``k(., S_a)`` of every subset a, (N, m)."""
        n = masks.num_tasks
        found = masks.sizes.cpu().double()
        found = kernel.size_features(found, n) @ self._of_sizes(kernel, n)  # (m, N)
        for rows in torch.arange(len(masks)).split(max(1, _ENTRIES // max(n, 1))):
            given = masks.values[rows].cpu()
            for weight, table in _product_kernels(kernel, n):
                there, away = (torch.where(given, row[1], row[0]) for row in table.flip(0))
                found[rows] += (weight * self.of_products(there, away)).real
        return found.T.to(masks.values.device)

    def prior_variance(self, kernel: Kernel, n: int) -> Tensor:
        """Variance of the answers under a Gaussian process with this kernel, (N,)."""
        found = self._of_sizes(kernel, n).square().sum(0)
        for weight, table in _product_kernels(kernel, n):
            found += (weight * self.of_pairs(table)).real
        return found

    def _of_sizes(self, kernel: Kernel, n: int) -> Tensor:
        """(D, N) answers of the kernel's functions of sizes."""
        features = kernel.size_features(torch.arange(n + 1.0, dtype=torch.float64), n)
        wave = waves(n)[:, None].expand(-1, n)
        return (transform(features).T @ self.of_products(wave, torch.ones_like(wave))).real


def _product_kernels(kernel: Kernel, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights and factors ``g[s, a]`` (2, 2, n) of product kernels that sum to all but sizes."""
    for products in kernel.products(n):
        tilt = products.tilt
        for weight, rate in zip(products.weights, products.rates, strict=True):
            table = torch.ones(2, 2, n, dtype=torch.float64)
            table[0, 0] = math.exp(2 * tilt)
            table[0, 1] = table[1, 0] = torch.exp(tilt - rate)
            yield weight, table
    overlaps = kernel.overlap_values(torch.arange(n + 1.0, dtype=torch.float64))
    if overlaps is not None:
        half = (n + 1) // 2 + 1  # the others are their conjugates: real parts count twice
        weights = transform(overlaps)[:half]
        weights[1 : n // 2 + 1] *= 2
        for weight, wave in zip(weights, waves(n)[:half], strict=True):
            table = torch.ones(2, 2, n, dtype=wave.dtype)
            table[1, 1] = wave
            yield weight, table


def waves(n: int) -> Tensor:
    """(n + 1,) ``w^k``."""
    angles = torch.arange(n + 1, dtype=torch.float64) * (2 * math.pi / (n + 1))
    return torch.polar(torch.ones_like(angles), angles)


def transform(values: Tensor) -> Tensor:
    """(n + 1, ...) complex b with ``values[o] = sum_k b_k w^(k o)``."""
    k = torch.arange(len(values))
    inverse = waves(len(values) - 1).conj()[k[:, None] * k % len(values)]
    return inverse @ values.to(inverse) / len(values)


def product_of_rest(factors: Tensor) -> Tensor:
    """(..., k) the product of all others; no division, since a factor may be 0."""
    one = torch.ones_like(factors[..., :1])
    before = torch.cat([one, factors[..., :-1].cumprod(-1)], -1)
    after = torch.cat([one, factors.flip(-1)[..., :-1].cumprod(-1)], -1)
    return before * after.flip(-1)
