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

Product kernels whose factors depend on the task, or on whether it is in the subset, have
``c_T = sum_a alpha_a prod_i p_ai prod_{i in T} rho_ai``, p the mean of ``g_i(s, a_i)`` over s and
rho half its change over that, and overlap kernels the same with p = 1, ``rho_ai = a_i``. The pair
sum is the elementary symmetric polynomial ``e_d`` of the products ``rho_ai rho_bi``, in O(n d) for
each pair of subsets and of product kernels in a mixture; up to 16 tasks all subsets are enumerated
instead.

Functions of sizes have the same ``c_T`` for all T of one order, their mean d-th difference over
2^d: one more row with ``rho = 1``.

Shapes: duals (m, t); energies (max_order, t), totals (t,).
"""

import itertools

import torch
from torch import Tensor

from ksm_ext import ops
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.readouts import mean_difference, size_difference

Mixture = tuple[Kernel, Tensor]
_ROWS = 1024  # rows of the (m, m) forms held at a time
_ENUMERATED = 16  # tasks up to which all subsets are
_NEWTON = 10  # orders up to which Newton's identities lose no digits that matter
_FORM_ENTRIES = 2**22  # of forms of all orders held at a time: 32 MB


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
    products = [each for kernel, _ in mixtures for each in kernel.products(masks.num_tasks)]
    of_size = any(kernel.size_degree for kernel, _ in mixtures)
    if of_size or any(each.by_task or each.tilt for each in products):
        alike = _energies_of_few if masks.num_tasks <= _ENUMERATED else _energies_by_task
        return alike(masks, mixtures, max_order, first_order)
    n = masks.num_tasks
    degree = max((kernel.overlap_degree for kernel, _ in mixtures), default=0)
    decaying = bool(products)
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
    table = _krawtchouk(order, identity, torch.full_like(identity, n))  # by symmetric difference
    product = ops.mask_gram_matmul(masks.bits, None, n, decay.contiguous(), hamming_table=table)
    energy = (decay * product).sum(0)
    if decays_only or not bool(overlap.any()):
        return energy
    sizes = masks.sizes.to(torch.float64)
    for start in range(0, len(masks), _ROWS):
        rows = slice(start, start + _ROWS)
        bits = masks.bits[rows].contiguous()
        o = ops.mask_gram(bits, masks.bits, n, overlap_table=identity)  # (rows, m)
        cross = _krawtchouk(order, sizes - o, sizes.expand_as(o))
        energy += 2 * (decay[rows] * (cross @ overlap)).sum(0)
        energy += (overlap[rows] * (_binomial(o, order) @ overlap)).sum(0)
    return energy


def _decay_coefficient(kernel: Kernel, n: int, order: int) -> float:
    """Lambda_d of the kernel's mixture of product kernels."""
    total = 0.0
    for products in kernel.products(n):
        r = torch.exp(-products.rates)
        total += float(products.weights @ (((1 - r) / 2) ** order * ((1 + r) / 2) ** (n - order)))
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
            for one, two in itertools.product(kernel.products(n), other.products(n)):
                r = torch.exp(-two.rates)[:, None]
                for weight, p in zip(one.weights, torch.exp(-one.rates), strict=True):
                    logs = torch.xlogy(n - h, (1 + r * p) / 2) + torch.xlogy(h, (r + p) / 2)
                    table += weight * (two.weights @ logs.exp())
            product = ops.mask_gram_matmul(
                masks.bits, None, n, other_dual.contiguous(), hamming_table=table.to(device)
            )
            variance += (dual * product).sum(0)
    return variance - mean.square()


def _energies_of_few(
    masks: Masks, mixtures: list[Mixture], max_order: int, first_order: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`walsh_energies` from the values on all 2^n subsets, by the fast Walsh transform."""
    n = masks.num_tasks
    every = Masks.from_bits(torch.arange(2**n, device=masks.values.device)[:, None], n)
    parts = [kernel.matmul(every, masks, dual) for kernel, dual in mixtures]
    values = torch.stack(parts).sum(0)  # (2^n, t)
    for task in range(n):
        without, given = values.reshape(2 ** (n - 1 - task), 2, 2**task, -1).unbind(1)
        values = torch.stack([given + without, given - without], 1).reshape(2**n, -1) / 2
    energies = values.new_zeros(n + 1, values.shape[1])
    energies.index_add_(0, every.sizes, values.square())
    energies[1] = first_order
    return energies[1 : max_order + 1], energies[1:].sum(0)


def _energies_by_task(
    masks: Masks, mixtures: list[Mixture], max_order: int, first_order: Tensor
) -> tuple[Tensor, Tensor]:
    """:func:`walsh_energies` of product kernels that tell tasks, or in from out, apart."""
    n = masks.num_tasks
    degrees = [max(kernel.overlap_degree, kernel.size_degree) for kernel, _ in mixtures]
    last = max(max_order, min(max(degrees), n))
    half = torch.tensor(0.5, dtype=torch.float64)
    ratios, weights = [], []  # rows: every subset in every product kernel and overlap part
    for kernel, dual in mixtures:
        for products in kernel.products(n, coarse=True):
            rates = products.rates.reshape(len(products.weights), -1).expand(-1, n)
            means = products.mean(rates, half, half)
            changes = zip(products.change(rates), means, strict=True)
            ratios.append(_by_membership(masks, *(change / 2 / mean for change, mean in changes)))
            scale = _by_membership(masks, *means).prod(1).reshape(len(rates), -1)
            weight = (products.weights.to(scale.device)[:, None] * scale)[..., None] * dual
            weights.append(weight.flatten(0, 1).expand(last + 2, -1, -1))
        if kernel.overlap_degree:
            ratios.append(masks.floats)
            orders = [_overlap_coefficient(kernel, masks, order) for order in range(last + 2)]
            weights.append(torch.stack(orders) * dual)
        if kernel.size_degree:  # the same whichever tasks: a subset of all, as it were
            features = kernel.size_features(masks.sizes.to(torch.float64), n)
            moments = features.T @ dual  # (D, t)
            steps = [size_difference(kernel, "banzhaf", n, order) for order in range(last + 1)]
            by_order = torch.stack([0.5**d * step.to(moments) for d, step in enumerate(steps)])
            ratios.append(torch.ones_like(masks.floats[:1]))
            weights.append(torch.cat([by_order @ moments, 0 * moments[:1]])[:, None])
    energies = _symmetric_forms(torch.cat(ratios), torch.cat(weights, 1))
    energies[1] = first_order
    return energies[1 : max_order + 1], energies[1:].sum(0)


def _symmetric_forms(ratios: Tensor, weights: Tensor) -> Tensor:
    """``sum_{a, b} w_da w_db e_d(rho_a rho_b)`` of orders d, and of those beyond; (D + 2, t).

    Args:
        ratios: (V, n) rho.
        weights: (D + 2, V, t) for orders 0 to D, and for what is beyond.
    """
    count, num = weights.shape[:2]
    forms_of = _by_power_sums if count - 2 <= _NEWTON else _task_by_task
    energies = weights.new_zeros(count, weights.shape[2])
    step = max(1, _FORM_ENTRIES // (count * num))
    for start in range(0, num, step):
        rows, others = ratios[start : start + step], ratios[start:]
        right = weights[:, start:].clone()
        right[:, len(rows) :] *= 2  # pairs of two blocks count twice
        forms = forms_of(rows, others, count)
        energies += (weights[:, start : start + step] * (forms @ right)).sum(1)
    return energies


def _task_by_task(x: Tensor, y: Tensor, count: int) -> Tensor:
    """``e_0`` to ``e_D`` of ``x_a y_b`` and the sum of the others, (count, rows, columns)."""
    forms = x.new_zeros(count, len(x), len(y))
    forms[0] = 1.0
    for one, other in zip(x.T, y.T, strict=True):  # a task more
        factor = one[:, None] * other
        forms[-1] += (forms[-1] + forms[-2]) * factor
        forms[1:-1] += forms[:-2] * factor
    return forms


def _by_power_sums(x: Tensor, y: Tensor, count: int) -> Tensor:
    """The same by Newton's identities, ``d e_d = sum_k (-1)^(k-1) e_{d-k} p_k``: mostly products.

    They cancel for high orders.
    """
    forms = x.new_zeros(count, len(x), len(y))
    forms[0] = forms[-1] = 1.0
    sums = [x**power @ (y**power).T for power in range(1, count - 1)]
    for d in range(1, count - 1):
        for k in range(1, d + 1):
            forms[d].addcmul_(forms[d - k], sums[k - 1], value=(-1) ** (k - 1) / d)
    for one, other in zip(x.T, y.T, strict=True):
        forms[-1].addcmul_(forms[-1], one[:, None] * other)
    forms[-1] -= forms[:-1].sum(0)
    return forms


def _by_membership(masks: Masks, outside: Tensor, inside: Tensor) -> Tensor:
    """(J m, n) of numbers (J, n) for tasks out of subsets and in them, all subsets for each j."""
    device = masks.values.device
    found = torch.where(masks.values, inside.to(device)[:, None], outside.to(device)[:, None])
    return found.flatten(0, 1)


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
