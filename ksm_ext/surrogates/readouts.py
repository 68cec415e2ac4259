r"""Attributions and interactions of kernel expansions in closed form.

A kernel term ``k(., a)`` treats all tasks inside ``a`` alike and all tasks outside ``a`` alike, so
any symmetric readout of it depends on the training subset ``a`` only through its size ``c = |a|``
and on whether the task is in ``a``. Every readout of ``F(S) = sum_a alpha_a k(S, a)`` is therefore
two tables over sizes and one product with the masks:

.. math:: \tau_i = \sum_a \alpha_a \left[ a_i T_1(c_a) + (1 - a_i) T_0(c_a) \right]

A readout averages the effect of a task over random contexts: each other task is present with
probability q, and q follows the readout's law on [0, 1]:

=============  ==================  =================================================
readout        law of q            meaning
=============  ==================  =================================================
``"loo"``      q = 1               ``F(all) - F(all but i)``
``"banzhaf"``  q = 1/2             mean effect over all subsets
``"shapley"``  uniform on [0, 1]   mean effect over all orders (Owen 1972)
=============  ==================  =================================================

For a product kernel ``r^h`` the context average factorises, with ``u1 = q + (1-q) r`` and
``u0 = q r + (1-q)`` for the other tasks in and out of ``a``:

.. math:: T_1(c) = (1-r) E_q[u_1^{c-1} u_0^{n-c}], \qquad T_0(c) = -(1-r) E_q[u_1^c u_0^{n-1-c}]

a polynomial of degree n-1 in q, so a quadrature on [0, 1] gives Shapley values to rounding. For a
kernel ``B[overlap]`` tasks outside ``a`` have no effect and ``T_1(c)`` averages the differences of
B. Pairwise interactions (Grabisch & Roubens 1999) are the same with second differences. The prior
variance of a readout is the readout of its own table, ``E_c[T_1(c+1) - T_0(c)]``.

Shapes: n tasks, m subsets, C distinct sizes; tables (C,) float64.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import numpy as np
import torch
from scipy.special import roots_legendre
from torch import Tensor

from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks

Readout = Literal["loo", "shapley", "banzhaf"]
READOUTS: tuple[Readout, ...] = get_args(Readout)

_GAUSS_LIMIT = 128  # up to this degree Gauss-Legendre is exact to 1e-15


@dataclass(frozen=True)
class EffectTables:
    """Effect of adding a task to a random context, by size of the training subset.

    Attributes:
        inside: (C,) effect of a task that is in the training subset, ``T_1``.
        outside: (C,) effect of a task that is not, ``T_0``.
    """

    inside: Tensor
    outside: Tensor


@dataclass(frozen=True)
class InteractionTables:
    """Second difference for a pair of tasks, by size of the training subset.

    Attributes:
        both: (C,) both tasks in the training subset, ``T_11``.
        one: (C,) exactly one, ``T_10``.
        neither: (C,) none, ``T_00``.
    """

    both: Tensor
    one: Tensor
    neither: Tensor


def effect_tables(kernel: Kernel, readout: Readout, num_tasks: int, sizes: Tensor) -> EffectTables:
    """``T_1`` and ``T_0`` of ``kernel`` at ``sizes`` (C,) int64, exact to rounding.

    ``T_1`` at size 0 and ``T_0`` at size n are meaningless (there is no such task) and finite.
    """
    n, c = num_tasks, sizes.to(torch.float64)
    inside, outside = torch.zeros_like(c), torch.zeros_like(c)
    for weight, rate in kernel.decays():
        drop = weight * -math.expm1(-rate)  # weight (1 - r)
        inside += drop * _context_mean(readout, rate, c - 1, n - c)
        outside -= drop * _context_mean(readout, rate, c, n - 1 - c)
    inside += mean_difference(kernel, readout, n, 1, sizes)
    return EffectTables(inside, outside)


def interaction_tables(
    kernel: Kernel, readout: Readout, num_tasks: int, sizes: Tensor
) -> InteractionTables:
    """``T_11``, ``T_10`` and ``T_00`` of ``kernel`` at ``sizes`` (C,) int64."""
    n, c = num_tasks, sizes.to(torch.float64)
    both, one, neither = torch.zeros_like(c), torch.zeros_like(c), torch.zeros_like(c)
    for weight, rate in kernel.decays():
        drop = weight * math.expm1(-rate) ** 2  # weight (1 - r)^2
        both += drop * _context_mean(readout, rate, c - 2, n - c)
        one -= drop * _context_mean(readout, rate, c - 1, n - 1 - c)
        neither += drop * _context_mean(readout, rate, c, n - 2 - c)
    both += mean_difference(kernel, readout, n, 2, sizes)
    return InteractionTables(both, one, neither)


def effects(masks: Masks, kernel: Kernel, readout: Readout, dual: Tensor) -> Tensor:
    """Readouts of ``sum_a dual_a k(., S_a)`` for every task, (n, q) for dual (m, q).

    Two tables and one product with the masks.
    """
    sizes, index = masks.distinct_sizes
    tables = effect_tables(kernel, readout, masks.num_tasks, sizes)
    inside, outside = (
        table.to(index.device)[index][:, None] * dual for table in (tables.inside, tables.outside)
    )  # (m, q)
    return masks.transposed_matmul(inside - outside) + outside.sum(0)


def effect_functionals(masks: Masks, kernel: Kernel, readout: Readout, tasks: slice) -> Tensor:
    """The readout of ``k(., S_a)`` for some tasks i and every fitted subset a, (tasks, m)."""
    sizes, index = masks.distinct_sizes
    tables = effect_tables(kernel, readout, masks.num_tasks, sizes)
    inside, outside = (t.to(index.device)[index] for t in (tables.inside, tables.outside))
    return torch.where(masks.values[:, tasks], inside[:, None], outside[:, None]).T


def pair_effects(masks: Masks, kernel: Kernel, readout: Readout, dual: Tensor) -> Tensor:
    """Interactions of all pairs, (n, n, q) for dual (m, q); the diagonal is meaningless.

    Three tables and products with the masks.
    """
    sizes, index = masks.distinct_sizes
    tables = interaction_tables(kernel, readout, masks.num_tasks, sizes)
    both, one, neither = (
        table.to(index.device)[index][:, None] * dual
        for table in (tables.both, tables.one, tables.neither)
    )  # (m, q)
    # s s' both + (s + s' - 2 s s') one + (1 - s)(1 - s') neither, summed over subsets
    products = masks.weighted_gram(both - 2 * one + neither)
    single = masks.transposed_matmul(one - neither)  # (n, q)
    return products + single[:, None] + single[None] + neither.sum(0)


def pair_functionals(
    masks: Masks, kernel: Kernel, readout: Readout, first: Tensor, second: Tensor
) -> Tensor:
    """Interactions of some pairs of tasks in ``k(., S_a)``, for every subset a, (pairs, m)."""
    sizes, index = masks.distinct_sizes
    tables = interaction_tables(kernel, readout, masks.num_tasks, sizes)
    by_count = torch.stack([tables.neither, tables.one, tables.both])  # (3, C)
    w = masks.values.to(torch.int64)
    return by_count.to(index.device)[w[:, first] + w[:, second], index[:, None]].T


def mean_difference(
    kernel: Kernel, readout: Readout, num_tasks: int, order: int, sizes: Tensor
) -> Tensor:
    """Mean ``order``-th difference of the overlap part B for tasks inside subsets of ``sizes``.

    Zero where a subset has fewer than ``order`` tasks, or B is absent; (C,).
    """
    table = kernel.tables(num_tasks, sizes.device)[1]
    if table is None or order > num_tasks:
        return torch.zeros(len(sizes), dtype=torch.float64, device=sizes.device)
    mean = _mean_over_overlaps(readout, torch.diff(table, n=order), sizes - order)
    return torch.where(sizes < order, torch.zeros_like(mean), mean)


def effect_prior_variance(kernel: Kernel, readout: Readout, num_tasks: int) -> float:
    """Prior variance of any task's readout under a Gaussian process with this kernel."""
    n = num_tasks
    total = 0.0
    for weight, rate in kernel.decays():
        total += weight * 2 * -math.expm1(-rate) * _context_pair_mean(readout, rate, n - 1)
    inside = mean_difference(kernel, readout, n, 1, torch.arange(1, n + 1))  # T_1(c + 1), c < n
    return total + float(_mean_over_overlaps(readout, inside, torch.tensor([n - 1]))[0])


def interaction_prior_variance(kernel: Kernel, readout: Readout, num_tasks: int) -> float:
    """Prior variance of any pair's interaction under a Gaussian process with this kernel."""
    n = num_tasks
    if n < 2:  # there is no pair
        return 0.0
    total = 0.0
    for weight, rate in kernel.decays():
        drop = 4 * weight * math.expm1(-rate) ** 2
        total += drop * _context_pair_mean(readout, rate, n - 2)
    both = mean_difference(kernel, readout, n, 2, torch.arange(2, n + 1))  # T_11(c + 2), c < n - 1
    return total + float(_mean_over_overlaps(readout, both, torch.tensor([n - 2]))[0])


def _context_mean(readout: Readout, rate: float, num_in: Tensor, num_out: Tensor) -> Tensor:
    """``E_q[u1^num_in u0^num_out]`` of (C,) tables of counts; zero where one is negative."""
    present, absent, weights = _context_law(readout, max(int((num_in + num_out).max()), 0))
    r = math.exp(-rate)
    u1, u0 = present + absent * r, present * r + absent  # (Q,)
    inside, outside = num_in.clamp(min=0), num_out.clamp(min=0)
    # log space: u^c underflows for thousands of tasks; xlogy makes 0 log 0 zero (r = 0)
    powers = torch.xlogy(inside[:, None], u1) + torch.xlogy(outside[:, None], u0)  # (C, Q)
    mean = powers.exp_() @ weights
    return torch.where((num_in < 0) | (num_out < 0), torch.zeros_like(mean), mean)


def _context_pair_mean(readout: Readout, rate: float, num_others: int) -> float:
    """``E_{q, q'}[P(equal) + r P(different)]^num_others`` for two independent contexts."""
    present, absent, weights = _context_law(readout, num_others)
    equal = present[:, None] * present + absent[:, None] * absent  # (Q, Q)
    differ = present[:, None] * absent + absent[:, None] * present
    base = equal + math.exp(-rate) * differ
    exponent = torch.tensor(float(num_others), dtype=torch.float64)
    return float(weights @ torch.xlogy(exponent, base).exp_() @ weights)


def _context_law(readout: Readout, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes q, 1 - q and weights integrating polynomials of ``degree`` under the readout's law."""
    if readout == "loo":
        nodes = [[1.0], [0.0], [1.0]]
    elif readout == "banzhaf":
        nodes = [[0.5], [0.5], [1.0]]
    else:
        nodes = _uniform_nodes(degree)
    present, absent, weights = (torch.tensor(row, dtype=torch.float64) for row in nodes)
    return present, absent, weights


@lru_cache(maxsize=64)
def _uniform_nodes(degree: int) -> list[list[float]]:
    """Quadrature on [0, 1]: Gauss-Legendre, exact, or for large degrees the tanh-sinh rule.

    The integrands are products of powers, so for many tasks they peak within 1/n of an end, where
    tanh-sinh nodes crowd, or within 1/sqrt(n) of the middle, which sets the step; 1 - q is carried
    apart from q so that nothing cancels. (Gauss nodes near the ends are themselves good to 1e-12.)
    """
    if degree <= _GAUSS_LIMIT:
        x, w = roots_legendre(degree // 2 + 1)
        return [((1 + x) / 2).tolist(), ((1 - x) / 2).tolist(), (w / 2).tolist()]
    step = min(1 / 64, 0.3 / math.sqrt(degree))
    t = step * np.arange(-math.ceil(4 / step), math.ceil(4 / step) + 1)
    z = math.pi * np.sinh(t)
    q, one_minus_q = 1 / (1 + np.exp(-z)), 1 / (1 + np.exp(z))
    w = math.pi * step * np.cosh(t) * q * one_minus_q
    return [q.tolist(), one_minus_q.tolist(), w.tolist()]


def _mean_over_overlaps(readout: Readout, values: Tensor, counts: Tensor) -> Tensor:
    """Mean of ``values[u]`` where u of ``counts`` present others follows the readout; (C,).

    u is ``counts`` itself (loo), uniform on 0..counts (shapley) or binomial (banzhaf).
    """
    counts = counts.clamp(min=0)
    if readout == "loo":
        return values[counts]
    if readout == "shapley":
        return torch.cumsum(values, 0)[counts] / (counts + 1)
    u = torch.arange(int(counts.max()) + 1, dtype=torch.float64, device=values.device)
    c = counts.double()[:, None]
    below = (c - u).clamp(min=0)
    log_binomial = torch.lgamma(c + 1) - torch.lgamma(u + 1) - torch.lgamma(below + 1)
    law = (log_binomial - c * math.log(2.0)).exp() * (u <= c)  # (C, max count + 1)
    return law @ values[: len(u)]
