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
B. Pairwise interactions (Grabisch & Roubens 1999) are the same with second differences: of order
d, 1 for a task and 2 for a pair, there are d + 1 tables, ``T_j`` where j of the d tasks are in
``a``. The prior variance of a readout is the readout of its own table, ``E_c[T_1(c+1) - T_0(c)]``.

Shapes: n tasks, m subsets, C distinct sizes; tables (d + 1, C) float64.
"""

import math
from functools import lru_cache
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.options import Readout

READOUTS: tuple[Readout, ...] = get_args(Readout)

_GAUSS_LIMIT = 128  # up to this degree Gauss-Legendre is exact to 1e-15


def tables(kernel: Kernel, readout: Readout, num_tasks: int, order: int, sizes: Tensor) -> Tensor:
    """``T_0`` to ``T_order`` of ``kernel`` at ``sizes`` (C,) int64, (order + 1, C).

    Exact to rounding; finite and meaningless at sizes that leave no such tasks in or out.
    """
    c = sizes.to(torch.float64)
    found = c.new_zeros(order + 1, len(c))
    for weight, rate in kernel.decays():
        drop = weight * (-math.expm1(-rate)) ** order  # weight (1 - r)^order
        for j in range(order + 1):
            others_in = c - j
            mean = _context_mean(readout, rate, others_in, num_tasks - order - others_in)
            found[j] += (-1) ** (order - j) * drop * mean
    found[order] += mean_difference(kernel, readout, num_tasks, order, sizes)
    return found


def effects(masks: Masks, kernel: Kernel, readout: Readout, dual: Tensor) -> Tensor:
    """Readouts of ``sum_a dual_a k(., S_a)`` for every task, (n, q) for dual (m, q)."""
    outside, inside = _weighted_tables(masks, kernel, readout, 1, dual)
    return masks.transposed_matmul(inside - outside) + outside.sum(0)


def pair_effects(masks: Masks, kernel: Kernel, readout: Readout, dual: Tensor) -> Tensor:
    """Interactions of all pairs, (n, n, q) for dual (m, q); the diagonal is meaningless."""
    neither, one, both = _weighted_tables(masks, kernel, readout, 2, dual)
    # s s' both + (s + s' - 2 s s') one + (1 - s)(1 - s') neither, summed over subsets
    products = masks.weighted_gram(both - 2 * one + neither)
    single = masks.transposed_matmul(one - neither)  # (n, q)
    return products + single[:, None] + single[None] + neither.sum(0)


def _weighted_tables(
    masks: Masks, kernel: Kernel, readout: Readout, order: int, dual: Tensor
) -> list[Tensor]:
    """``T_j(c_a) dual_a`` of every subset a, order + 1 tensors (m, q)."""
    sizes, index = masks.distinct_sizes
    found = tables(kernel, readout, masks.num_tasks, order, sizes).to(index.device)
    return [table[index][:, None] * dual for table in found]


def functionals(masks: Masks, kernel: Kernel, readout: Readout, tasks: Tensor) -> Tensor:
    """Readouts of ``k(., S_a)`` for every subset a, (rows, m).

    Args:
        masks: (m, n) the subsets.
        kernel: The kernel.
        readout: The readout.
        tasks: (rows, d) int64: a task, or the two of a pair, for each row.
    """
    sizes, index = masks.distinct_sizes
    found = tables(kernel, readout, masks.num_tasks, tasks.shape[1], sizes).to(index.device)
    count = torch.stack([masks.values[:, chosen] for chosen in tasks.T]).sum(0)  # (m, rows)
    return found[count, index[:, None]].T


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


def prior_variance(kernel: Kernel, readout: Readout, num_tasks: int, order: int) -> float:
    """Prior variance of any task's or pair's readout under a Gaussian process with this kernel."""
    others = num_tasks - order
    if others < 0:  # there is no pair
        return 0.0
    total = 0.0
    for weight, rate in kernel.decays():
        drop = weight * (2 * -math.expm1(-rate)) ** order
        total += drop * _context_pair_mean(readout, rate, others)
    sizes = torch.arange(order, num_tasks + 1)
    inside = mean_difference(kernel, readout, num_tasks, order, sizes)  # T_order(c + order)
    return total + float(_mean_over_overlaps(readout, inside, torch.tensor([others]))[0])


def prior_covariance(kernel: Kernel, readout: Readout, num_tasks: int) -> float:
    """Prior covariance of the readouts of two tasks i and j; 0 where there is one task only.

    The readout of j of the readout of i, which is ``T_1`` at the size of subsets that have i, and
    ``T_0`` of others: ``E_c[T(c + 1) - T(c)]``, i among the c of n - 1 others in the context of j.
    """
    others = num_tasks - 1
    if others < 1:
        return 0.0
    size = torch.arange(num_tasks)
    without, inside = tables(kernel, readout, num_tasks, 1, torch.arange(num_tasks + 1)).diff(dim=1)
    present = size.to(torch.float64) / others
    # tables are meaningless at sizes that leave no such task i, which have probability 0
    steps = torch.where(size > 0, present * inside, 0.0)
    steps = steps + torch.where(size < others, (1 - present) * without, 0.0)
    return float(_mean_over_overlaps(readout, steps, torch.tensor([others]))[0])


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
        from scipy.special import roots_legendre  # a fifth of the time that torch takes to import

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
