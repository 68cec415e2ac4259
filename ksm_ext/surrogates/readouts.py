r"""Attributions and interactions of kernel expansions in closed form.

A kernel term ``k(., a)`` treats all tasks inside ``a`` alike and all tasks outside ``a`` alike, so
any symmetric readout of it depends on the training subset ``a`` only through its size ``c = |a|``
and on whether the task is in ``a``. Every readout of ``F(S) = sum_a alpha_a k(S, a)`` is therefore
two tables over sizes and one product with the masks:

.. math:: \tau_i = \sum_a \alpha_a \left[ a_i T_1(c_a) + (1 - a_i) T_0(c_a) \right]

A readout averages the effect of a task over random contexts: each other task is present with
probability q, and q follows the readout's law on [0, 1]:

==============  ==================  =================================================
readout         law of q            meaning
==============  ==================  =================================================
``"loo"``       q = 1               ``F(all) - F(all but i)``
``"banzhaf"``   q = 1/2             mean effect over all subsets
``"shapley"``   uniform on [0, 1]   mean effect over all orders (Owen 1972)
``"taylor"``    2 (1 - q)           of pairs: Shapley-Taylor (Sundararajan et al. 2020)
``"faithful"``  6 q (1 - q)         of pairs: faithful Shapley (Tsai et al. 2023)
==============  ==================  =================================================

For a product kernel ``prod_i g(s_i, a_i)`` the context average factorises, with ``u_a = q g(1, a) +
(1-q) g(0, a)`` of the other tasks and ``d_a = g(1, a) - g(0, a)`` of the task itself:

.. math:: T_1(c) = d_1 E_q[u_1^{c-1} u_0^{n-c}], \qquad T_0(c) = d_0 E_q[u_1^c u_0^{n-1-c}]

(``r^h`` has ``d_1 = -d_0 = 1 - r``), a polynomial of degree n-1 in q, so a quadrature on [0, 1]
gives Shapley values to rounding. For a kernel ``B[overlap]`` tasks outside ``a`` have no effect and
``T_1(c)`` averages the differences of B. Functions of sizes have their mean difference, whichever
the task. Pairwise interactions (Grabisch & Roubens 1999) are the same with second differences: of
order d, 1 for a task and 2 for a pair, there are d + 1 tables, ``T_j`` where j of the d tasks are
in ``a``. The prior variance of a readout is the readout of its own table, ``E_c[T_1(c+1) -
T_0(c)]``.

A product kernel with a factor ``g_i`` for each task has no such tables: at every node q

.. math:: \tau_i = \sum_a \alpha_a E_q\Big[ z_{ai} \prod_j u_{a_j, j} \Big], \qquad
          z_{ai} = d_{a_i, i} / u_{a_i, i}

is two products with the masks, for interactions ``z_ai z_aj`` one more: O(m n) and O(m n^2) for
each node and each product kernel of a mixture.

Shapes: n tasks, m subsets, C distinct sizes; tables (d + 1, C) float64.
"""

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import get_args

import torch
from torch import Tensor

from ksm_ext.surrogates.kernels import Kernel, Products
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.options import PairReadout, Readout

_ROWS = 8192  # of masks as floats at a time
_ENTRIES = 2**22  # of tables of product kernels at a time: 32 MB

READOUTS: tuple[Readout, ...] = get_args(Readout)
PAIR_READOUTS: tuple[PairReadout, ...] = get_args(PairReadout)
_DENSITIES = {"shapley": (1.0,), "taylor": (2.0, -2.0), "faithful": (0.0, 6.0, -6.0)}
"""Coefficients of the density of q on [0, 1]: 1, q, q^2."""


def tables(
    kernel: Kernel, readout: PairReadout, num_tasks: int, order: int, sizes: Tensor
) -> Tensor:
    """``T_0`` to ``T_order`` of ``kernel`` at ``sizes`` (C,) int64, (order + 1, C).

    Exact to rounding; finite and meaningless at sizes that leave no such tasks in or out. Product
    kernels with a rate for each task are left out.
    """
    c = sizes.to(torch.float64)
    found = c.new_zeros(order + 1, len(c))
    for products in kernel.products(num_tasks):
        if products.by_task:
            continue
        outside, inside = products.change(products.rates)  # (J,)
        for j in range(order + 1):
            others_in = c - j
            means = _context_means(readout, products, others_in, num_tasks - order - others_in)
            found[j] += (products.weights * inside**j * outside ** (order - j)) @ means
    found[order] += mean_difference(kernel, readout, num_tasks, order, sizes)
    of_sizes = kernel.size_features(c, num_tasks)  # (C, D): the same whichever tasks they are
    return found + of_sizes @ size_difference(kernel, readout, num_tasks, order)


def effects(masks: Masks, kernel: Kernel, readout: PairReadout, dual: Tensor) -> Tensor:
    """Readouts of ``sum_a dual_a k(., S_a)`` for every task, (n, q) for dual (m, q)."""
    outside, inside = _weighted_tables(masks, kernel, readout, 1, dual)
    values = masks.transposed_matmul(inside - outside) + outside.sum(0)
    for rows, factor, slopes in _contexts(masks, kernel, readout, 1):
        values += slopes.T @ (factor[:, None] * dual[rows])
    return values


def pair_effects(masks: Masks, kernel: Kernel, readout: PairReadout, dual: Tensor) -> Tensor:
    """Interactions of all pairs, (n, n, q) for dual (m, q); the diagonal is meaningless."""
    neither, one, both = _weighted_tables(masks, kernel, readout, 2, dual)
    # s s' both + (s + s' - 2 s s') one + (1 - s)(1 - s') neither, summed over subsets
    products = masks.weighted_gram(both - 2 * one + neither)
    single = masks.transposed_matmul(one - neither)  # (n, q)
    values = products + single[:, None] + single[None] + neither.sum(0)
    for rows, factor, slopes in _contexts(masks, kernel, readout, 2):
        for j, weights in enumerate((factor[:, None] * dual[rows]).T):
            values[..., j] += slopes.T @ (weights[:, None] * slopes)
    return values


def mean_value(masks: Masks, kernel: Kernel, readout: Readout, dual: Tensor) -> Tensor:
    """Mean of ``sum_a dual_a k(., S_a)`` where a task is present with probability q, (q,)."""
    (values,) = _weighted_tables(masks, kernel, readout, 0, dual)
    total = values.sum(0)
    for rows, factor, _ in _contexts(masks, kernel, readout, 0):
        total = total + factor @ dual[rows]
    return total


def _weighted_tables(
    masks: Masks, kernel: Kernel, readout: PairReadout, order: int, dual: Tensor
) -> list[Tensor]:
    """``T_j(c_a) dual_a`` of every subset a, order + 1 tensors (m, q)."""
    sizes, index = masks.distinct_sizes
    found = tables(kernel, readout, masks.num_tasks, order, sizes).to(index.device)
    return [table[index][:, None] * dual for table in found]


def functionals(masks: Masks, kernel: Kernel, readout: PairReadout, tasks: Tensor) -> Tensor:
    """Readouts of ``k(., S_a)`` for every subset a, (rows, m).

    Args:
        masks: (m, n) the subsets.
        kernel: The kernel.
        readout: The readout.
        tasks: (rows, d) int64: a task, or the two of a pair, for each row.
    """
    sizes, index = masks.distinct_sizes
    order = tasks.shape[1]
    found = tables(kernel, readout, masks.num_tasks, order, sizes).to(index.device)
    count = torch.stack([masks.values[:, chosen] for chosen in tasks.T]).sum(0)  # (m, rows)
    values = found[count, index[:, None]]
    for rows, factor, slopes in _contexts(masks, kernel, readout, order):
        for chosen in tasks.T:
            factor = factor.reshape(len(slopes), -1) * slopes[:, chosen]
        values[rows] += factor
    return values.T


def _contexts(
    masks: Masks, kernel: Kernel, readout: PairReadout, order: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Every node q of every product kernel with a rate for each task, for some rows of masks.

    With the weight times ``prod_j u_{a_j, j}`` (rows,), and the slopes ``z`` (rows, n).
    """
    n, device = masks.num_tasks, masks.values.device
    for products in kernel.products(n):
        if not products.by_task or order > n:
            continue
        present, absent, weights = _context_law(readout, n - order)
        # beyond e^-300 nothing is left, and what is divided by must not be 0
        for scale, rate in zip(products.weights, products.rates.clamp(max=300.0), strict=True):
            means = products.mean(rate, present[:, None], absent[:, None])  # (Q, n) each
            changes = zip(products.change(rate), means, strict=True)
            slopes = [(change / mean).to(device) for change, mean in changes]
            logs = [mean.log().to(device) for mean in means]
            for start in range(0, len(masks), _ROWS):
                rows = slice(start, start + _ROWS)
                values = masks.values[rows].to(torch.float64)
                powers = (1 - values) @ logs[0].T + values @ logs[1].T  # (rows, Q)
                factors = (scale * weights).to(device) * powers.exp_()
                for factor, outside, inside in zip(factors.T, *slopes, strict=True):
                    yield rows, factor, torch.where(masks.values[rows], inside, outside)


def mean_difference(
    kernel: Kernel, readout: PairReadout, num_tasks: int, order: int, sizes: Tensor
) -> Tensor:
    """Mean ``order``-th difference of the overlap part B for tasks inside subsets of ``sizes``.

    Zero where a subset has fewer than ``order`` tasks, or B is absent; (C,).
    """
    table = kernel.overlap_values(torch.arange(num_tasks + 1.0, dtype=torch.float64))
    if table is None or order > num_tasks:
        return torch.zeros(len(sizes), dtype=torch.float64)
    mean = _mean_over_overlaps(readout, torch.diff(table, n=order), sizes - order)
    return torch.where(sizes < order, torch.zeros_like(mean), mean)


def size_difference(kernel: Kernel, readout: PairReadout, num_tasks: int, order: int) -> Tensor:
    """Mean ``order``-th difference of the kernel's functions of sizes, (D,)."""
    sizes = torch.arange(num_tasks + 1.0, dtype=torch.float64)
    features = kernel.size_features(sizes, num_tasks)
    if order > num_tasks:
        return torch.zeros_like(features[0])
    others = torch.tensor([num_tasks - order])
    steps = torch.diff(features, n=order, dim=0)
    means = [_mean_over_overlaps(readout, column, others) for column in steps.T]
    return torch.cat(means) if means else torch.zeros_like(features[0])


def prior_variance(kernel: Kernel, readout: PairReadout, num_tasks: int, tasks: Tensor) -> Tensor:
    """Prior variance of a readout under a Gaussian process with this kernel, (rows,) on the CPU.

    Args:
        kernel: The kernel.
        readout: The readout.
        num_tasks: Number of tasks n.
        tasks: (rows, d) int64: a task, or the two of a pair, for each row.
    """
    order = tasks.shape[1]
    others = num_tasks - order
    total = torch.zeros(len(tasks), dtype=torch.float64)
    if others < 0:  # there is no pair
        return total
    for products in kernel.products(num_tasks):
        readout_of = _pair_readout_by_task if products.by_task else _pair_readout
        total += readout_of(readout, products, num_tasks, tasks.cpu())
    sizes = torch.arange(order, num_tasks + 1)
    inside = mean_difference(kernel, readout, num_tasks, order, sizes)  # T_order(c + order)
    total += size_difference(kernel, readout, num_tasks, order).square().sum()
    return total + _mean_over_overlaps(readout, inside, torch.tensor([others]))


def prior_covariance(kernel: Kernel, readout: PairReadout, num_tasks: int, pairs: Tensor) -> Tensor:
    """Prior covariance of the readouts of two different tasks, (rows,) on the CPU.

    The readout of j of the readout of i, which is ``T_1`` at the size of subsets that have i, and
    ``T_0`` of others: ``E_c[T(c + 1) - T(c)]``, i among the c of n - 1 others in the context of j.

    Args:
        kernel: The kernel.
        readout: The readout.
        num_tasks: Number of tasks n.
        pairs: (rows, 2) int64: the two tasks of each row.
    """
    others = num_tasks - 1
    total = torch.zeros(len(pairs), dtype=torch.float64)
    if others < 1:
        return total
    size = torch.arange(num_tasks)
    without, inside = tables(kernel, readout, num_tasks, 1, torch.arange(num_tasks + 1)).diff(dim=1)
    present = size.to(torch.float64) / others
    # tables are meaningless at sizes that leave no such task i, which have probability 0
    steps = torch.where(size > 0, present * inside, 0.0)
    steps = steps + torch.where(size < others, (1 - present) * without, 0.0)
    total += _mean_over_overlaps(readout, steps, torch.tensor([others]))
    for products in kernel.products(num_tasks):
        if products.by_task:
            total += _cross_readouts_by_task(readout, products, num_tasks)[tuple(pairs.cpu().T)]
    return total


def _cross_readouts_by_task(readout: PairReadout, products: Products, num_tasks: int) -> Tensor:
    """(n, n): the change by one task, averaged over a context, of the change by another."""
    present, absent, weights = _context_law(readout, num_tasks - 1)
    total = torch.zeros(num_tasks, num_tasks, dtype=torch.float64)
    for scale, rate in zip(products.weights, products.rates, strict=True):
        outside, inside = products.mean(rate, present[:, None], absent[:, None])  # (Q, n)
        without, given = products.change(rate)
        changed = present[:, None] * given + absent[:, None] * without  # of one, in both contexts
        for q, p, weight, of_other in zip(present, absent, weights, changed, strict=True):
            base = q * inside + p * outside
            mass = scale * weight * weights * base.prod(1)
            total += (mass[:, None] * changed / base).T @ (of_other / base)
    return total


def _context_means(
    readout: PairReadout, products: Products, num_in: Tensor, num_out: Tensor
) -> Tensor:
    """``E_q[u1^num_in u0^num_out]`` at (C,) counts, (J, C); zero where a count is negative."""
    present, absent, weights = _context_law(readout, max(int((num_in + num_out).max()), 0))
    inside, outside = num_in.clamp(min=0)[:, None], num_out.clamp(min=0)[:, None]
    means = []
    for rate in products.rates.split(_at_a_time(len(num_in) * len(weights))):
        u0, u1 = products.mean(rate[:, None, None], present, absent)  # (j, 1, Q)
        # log space: u^c underflows for thousands of tasks; xlogy makes 0 log 0 zero (r = 0)
        powers = torch.xlogy(inside, u1) + torch.xlogy(outside, u0)  # (j, C, Q)
        means.append(powers.exp_() @ weights)
    return torch.cat(means).masked_fill_((num_in < 0) | (num_out < 0), 0.0)


def _pair_readout(
    readout: PairReadout, products: Products, num_tasks: int, tasks: Tensor
) -> Tensor:
    """``E_{q, q'}`` over two independent contexts of what ``prior_variance`` sums, ()."""
    order = tasks.shape[1]
    present, absent, weights = _context_law(readout, num_tasks - order)
    exponent = torch.tensor(float(num_tasks - order), dtype=torch.float64)
    outside, inside = products.change(products.rates)
    change = products.weights * (inside - outside) ** order  # g(1, 1) - 2 g(0, 1) + g(0, 0)
    total = torch.zeros((), dtype=torch.float64)
    step = _at_a_time(len(weights) ** 2)
    for rate, scale in zip(products.rates.split(step), change.split(step), strict=True):
        outside, inside = products.mean(rate[:, None, None], present[:, None], absent[:, None])
        base = present * inside + absent * outside  # (j, Q, Q): of a task in two contexts
        total += scale @ (torch.xlogy(exponent, base).exp_() @ weights @ weights)
    return total


def _pair_readout_by_task(
    readout: PairReadout, products: Products, num_tasks: int, tasks: Tensor
) -> Tensor:
    """The same of :func:`_pair_readout` where tasks differ, (rows,)."""
    order = tasks.shape[1]
    present, absent, weights = _context_law(readout, num_tasks - order)
    total = torch.zeros(len(tasks), dtype=torch.float64)
    for scale, rate in zip(products.weights, products.rates, strict=True):
        outside, inside = products.change(rate)
        change = scale * (inside - outside)[tasks].prod(1)
        outside, inside = products.mean(rate, present[:, None], absent[:, None])  # (Q, n)
        contexts = torch.zeros((num_tasks,) * order, dtype=torch.float64)
        for q, p, weight in zip(present, absent, weights, strict=True):
            base = q * inside + p * outside
            mass, inverse = weight * weights * base.prod(1), 1 / base
            contexts += (mass[:, None] * inverse).T @ inverse if order == 2 else mass @ inverse
        total += change * contexts[tuple(tasks.T)]
    return total


def _at_a_time(entries: int) -> int:
    """How many products fit in memory, of so many numbers each."""
    return max(1, _ENTRIES // max(entries, 1))


def _context_law(readout: PairReadout, degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes q, 1 - q and weights integrating polynomials of ``degree`` under the readout's law."""
    if readout == "loo":
        nodes = [[1.0], [0.0], [1.0]]
    elif readout == "banzhaf":
        nodes = [[0.5], [0.5], [1.0]]
    else:
        density = _DENSITIES[readout]
        present, absent, weights = uniform_law(degree + len(density) - 1)
        powers = present[:, None] ** torch.arange(len(density))
        return present, absent, weights * (powers @ weights.new_tensor(density))
    present, absent, weights = (torch.tensor(row, dtype=torch.float64) for row in nodes)
    return present, absent, weights


def uniform_law(degree: int) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes q, 1 - q and weights integrating polynomials of ``degree`` over [0, 1]."""
    present, absent, weights = torch.tensor(_uniform_nodes(degree), dtype=torch.float64)
    return present, absent, weights


@lru_cache(maxsize=64)
def _uniform_nodes(degree: int) -> list[list[float]]:
    """Gauss-Legendre quadrature on [0, 1]: exact, or for large degrees to rounding.

    The integrands are products of ``degree`` factors linear in q, inside of [0, 1] no narrower than
    ``degree ** -1/2``: their Chebyshev coefficients fall as ``exp(-k^2 / 2 degree)``, and N nodes
    are exact up to k = 2 N.
    """
    from scipy.special import roots_legendre  # a fifth of the time that torch takes to import

    x, w = roots_legendre(min(degree // 2 + 1, math.ceil(5 * math.sqrt(degree)) + 8))
    return [((1 + x) / 2).tolist(), ((1 - x) / 2).tolist(), (w / 2).tolist()]


def _mean_over_overlaps(readout: PairReadout, values: Tensor, counts: Tensor) -> Tensor:
    """Mean of ``values[u]`` where u of ``counts`` present others follows the readout; (C,).

    u is ``counts`` itself (loo), binomial (banzhaf), or binomial with a q of some density: of
    ``q^k``, in proportion to ``(u + 1) ... (u + k)`` on 0..counts.
    """
    counts = counts.clamp(min=0)
    if readout == "loo":
        return values[counts]
    u = torch.arange(int(counts.max()) + 1, dtype=torch.float64, device=values.device)
    if readout in _DENSITIES:
        rising, falling = values[: len(u)], counts.to(u) + 1
        mean = torch.zeros_like(falling)
        for power, coefficient in enumerate(_DENSITIES[readout], 1):
            mean += coefficient * torch.cumsum(rising, 0)[counts] / falling
            rising, falling = rising * (u + power), falling * (counts + 1 + power)
        return mean
    c = counts.double()[:, None]
    below = (c - u).clamp(min=0)
    log_binomial = torch.lgamma(c + 1) - torch.lgamma(u + 1) - torch.lgamma(below + 1)
    law = (log_binomial - c * math.log(2.0)).exp() * (u <= c)  # (C, max count + 1)
    return law @ values[: len(u)]
