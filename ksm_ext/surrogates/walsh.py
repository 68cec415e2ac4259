r"""Energy of a kernel expansion by order of interaction on the hypercube.

With ``chi_T(S) = prod_{i in T} (2 s_i - 1)`` every function of S is ``sum_T c_T chi_T(S)``, and
``sum_{|T| = d} c_T^2`` is its variance at order d over uniformly random subsets (O'Donnell 2014,
*Analysis of Boolean Functions*). For ``F = sum_a alpha_a k(., S_a)`` that energy is a quadratic
form:

* product kernels ``r^h``: ``c_T = Lambda_d sum_a alpha_a chi_T(a)``,
  ``Lambda_d = ((1-r)/2)^d ((1+r)/2)^(n-d)``, and ``sum_{|T|=d} chi_T(a) chi_T(b) = Kr_d(h_ab; n)``,
  the Krawtchouk polynomial;
* overlap kernels B[o]: ``c_T = sum_{a contains T} alpha_a g_d(|a|)``, g_d the mean d-th difference
  of B over random contexts, and the pair sum is ``binom(o_ab, d)``;
* across the two: ``sum_{T in b} chi_T(a) = Kr_d(|b| - o_ab; |b|)``.

Shapes: duals (m, t); energies (max_order, t), totals (t,).
"""

import math

import torch
from torch import Tensor

from ksm_ext import ops
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.readouts import mean_difference

Mixture = tuple[Kernel, Tensor]
_ROWS = 1024  # rows of the (m, m) forms held at a time


def side_by_side(parts: list[tuple[Masks, list[Mixture]]]) -> tuple[Masks, list[Mixture]]:
    """Expansions on several tables of subsets as one on all of them."""
    if len(parts) == 1:
        return parts[0]
    rows = [len(masks) for masks, _ in parts]
    mixtures: list[Mixture] = []
    for place, (_, kernels) in enumerate(parts):
        for kernel, dual in kernels:
            padding = (0, 0, sum(rows[:place]), sum(rows[place + 1 :]))
            mixtures.append((kernel, torch.nn.functional.pad(dual, padding)))
    return Masks(torch.cat([masks.values for masks, _ in parts])), mixtures


def walsh_energies(
    masks: Masks, mixtures: list[Mixture], max_order: int, first_order: Tensor
) -> tuple[Tensor, Tensor]:
    """Energies at orders 1..max_order and in total, orders beyond included.

    The caller has ``first_order`` (t,) from Banzhaf values, of linear terms too.
    """
    n = masks.num_tasks
    degree = max((kernel.overlap_degree for kernel, _ in mixtures), default=0)
    decaying = any(kernel.decays() for kernel, _ in mixtures)
    energies = [first_order]
    for order in range(2, max(max_order, min(degree, n)) + 1):
        if order > degree and not decaying:
            energies.append(torch.zeros_like(first_order))
        else:
            energies.append(_energy(masks, mixtures, order))
    total = torch.stack(energies).sum(0)
    if decaying and len(energies) < n:
        low = max(degree, 1)  # up to here the energies hold more than the product kernels'
        seen = [_energy(masks, mixtures, order, decays_only=True) for order in range(1, low + 1)]
        seen += energies[low:]
        beyond = _decay_variance(masks, mixtures) - torch.stack(seen).sum(0)
        total = total + beyond.clamp_min(0.0)
    return torch.stack(energies[:max_order]), total


def _energy(
    masks: Masks, mixtures: list[Mixture], order: int, *, decays_only: bool = False
) -> Tensor:
    """``sum_{|T| = order} c_T^2`` per target, (t,)."""
    n, device = masks.num_tasks, masks.values.device
    decay = sum(dual * _decay_coefficient(kernel, n, order) for kernel, dual in mixtures)
    overlap = sum(dual * _overlap_coefficient(kernel, masks, order) for kernel, dual in mixtures)
    assert isinstance(decay, Tensor) and isinstance(overlap, Tensor)  # (m, t) both
    identity = torch.arange(n + 1, dtype=torch.float64, device=device)
    energy = torch.zeros_like(decay[0])
    sizes = masks.sizes.to(torch.float64)
    for start in range(0, len(masks), _ROWS):
        rows = slice(start, start + _ROWS)
        bits = masks.bits[rows].contiguous()
        o = ops.mask_gram(bits, masks.bits, n, overlap_table=identity)  # (rows, m)
        h = sizes[rows, None] + sizes - 2 * o
        energy += (decay[rows] * (_krawtchouk(order, h, torch.full_like(h, n)) @ decay)).sum(0)
        if not decays_only and bool(overlap.any()):
            cross = _krawtchouk(order, sizes - o, sizes.expand_as(o))
            energy += 2 * (decay[rows] * (cross @ overlap)).sum(0)
            energy += (overlap[rows] * (_binomial(o, order) @ overlap)).sum(0)
    return energy


def _decay_coefficient(kernel: Kernel, n: int, order: int) -> float:
    """Lambda_d of the kernel's mixture of product kernels."""
    total = 0.0
    for weight, rate in kernel.decays():
        r = math.exp(-rate)
        total += weight * ((1 - r) / 2) ** order * ((1 + r) / 2) ** (n - order)
    return total


def _overlap_coefficient(kernel: Kernel, masks: Masks, order: int) -> Tensor:
    """``g_d(|a|)`` of the kernel's overlap part for every fitted subset, (m, 1)."""
    sizes, index = masks.distinct_sizes
    values = mean_difference(kernel, "banzhaf", masks.num_tasks, order, sizes)
    return (values * 0.5**order).to(index.device)[index][:, None]


def _decay_variance(masks: Masks, mixtures: list[Mixture]) -> Tensor:
    """Variance over all subsets of the product-kernel part alone, (t,)."""
    n, device = masks.num_tasks, masks.values.device
    h = torch.arange(n + 1, dtype=torch.float64)
    variance = torch.zeros_like(mixtures[0][1][0])
    mean = torch.zeros_like(variance)
    for kernel, dual in mixtures:
        mean += _decay_coefficient(kernel, n, 0) * dual.sum(0)
        for other, other_dual in mixtures:
            table = torch.zeros_like(h)  # E_S[k(S, a) k'(S, b)] by h_ab
            for w, rate in kernel.decays():
                for v, rival in other.decays():
                    r, p = math.exp(-rate), math.exp(-rival)
                    agree = torch.tensor((1 + r * p) / 2, dtype=torch.float64)
                    differ = torch.tensor((r + p) / 2, dtype=torch.float64)
                    table += w * v * (torch.xlogy(n - h, agree) + torch.xlogy(h, differ)).exp()
            product = ops.mask_gram_matmul(
                masks.bits, None, n, other_dual.contiguous(), hamming_table=table.to(device)
            )
            variance += (dual * product).sum(0)
    return variance - mean.square()


def _krawtchouk(order: int, x: Tensor, n: Tensor) -> Tensor:
    """``Kr_order(x; n) = sum_j (-1)^j binom(x, j) binom(n - x, order - j)``, by its recurrence."""
    previous, current = torch.ones_like(x), n - 2 * x
    for d in range(1, order):
        following = ((n - 2 * x) * current - (n - d + 1) * previous) / (d + 1)
        previous, current = current, following
    return current


def _binomial(o: Tensor, order: int) -> Tensor:
    """``binom(o, order)``, zero where o < order."""
    result = torch.ones_like(o)
    for j in range(order):
        result = result * (o - j) / (j + 1)
    return result.clamp_min_(0.0)
