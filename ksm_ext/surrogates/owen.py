r"""Owen values: Shapley values where tasks come in groups, such as languages in families.

The mean effect of adding a task over all orders in which the tasks of a group stay together. So
when task i of group G is added, every other group is there as a whole with probability q, every
other task of G with probability p, and q and p are uniform on [0, 1] (Owen 1977, in Owen's 1972
form of the Shapley value). A product kernel ``prod_j g(s_j, a_j)`` factorises:

.. math:: L_i\, k(\cdot, a) = [g(1, a_i) - g(0, a_i)]\;
          E_p \prod_{j \in G \setminus i} [p\, g(1, a_j) + (1 - p)\, g(0, a_j)]\;
          E_q \prod_{H \ne G} \Big[ q \prod_{j \in H} g(1, a_j)
          + (1 - q) \prod_{j \in H} g(0, a_j) \Big]

Every kernel here is a sum of such: of an overlap, ``B[o]`` is by its discrete Fourier transform
``sum_k b_k w^(k o)``, with ``w = exp(2 pi i / (n + 1))``, a sum of kernels with ``g(1, 1) = w^k``
and else 1; of the sizes of both subsets, likewise each by itself. So answers are exact to rounding
at any n, in ``O(m n)`` for each product and node.

Shapes: n tasks, m subsets, r groups; float64.
"""

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ksm_ext.checks import brief, check_several, message
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.readouts import uniform_law

_ENTRIES = 2**21  # complex numbers of some rows at all nodes


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of every task, as readout.

    Attributes:
        members: r tensors of the numbers of their tasks, int64.
    """

    members: tuple[Tensor, ...]

    __repr__ = brief

    @classmethod
    def of(cls, labels: Sequence[Hashable]) -> "Groups":
        """Tasks of one label are a group."""
        numbers: dict[Hashable, list[int]] = {}
        for task, label in enumerate(labels):
            numbers.setdefault(label, []).append(task)
        return cls(tuple(torch.tensor(tasks) for tasks in numbers.values()))

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        return sum(map(len, self.members))

    def functionals(self, masks: Masks, kernel: Kernel) -> Tensor:
        """Owen values of ``k(., S_a)`` of every subset a, (n, m)."""
        n = masks.num_tasks
        found = torch.zeros(len(masks), n, dtype=torch.float64)
        largest = max(map(len, self.members), default=1)
        nodes = len(uniform_law(max(largest, len(self.members)))[0])
        step = max(1, _ENTRIES // (nodes * max(n, 1)))
        for start in range(0, len(masks), step):
            rows = slice(start, start + step)
            given = masks.values[rows].cpu()
            for weight, table in product_kernels(kernel, n):
                present, absent = (torch.where(given, row[1], row[0]) for row in table.flip(0))
                part = (present - absent) * self._contexts(present, absent)
                found[rows] += (weight * part).real
        sizes = kernel.size_features(masks.sizes.to(torch.float64).cpu(), n)
        found += sizes @ self._of_sizes(kernel)
        return found.T.to(masks.values.device)

    def prior_variance(self, kernel: Kernel) -> Tensor:
        """Variance of the values under a Gaussian process with this kernel, (n,)."""
        found = self._of_sizes(kernel).square().sum(0)
        for weight, table in product_kernels(kernel, self.num_tasks):
            change = table[1, 1] - table[1, 0] - table[0, 1] + table[0, 0]
            found += (weight * change * self._pairs_of_contexts(table)).real
        return found

    @cached_property
    def size_law(self) -> Tensor:
        """(n, n + 1) how often each value looks at subsets of each size; rows sum to 1."""
        of_context = _transform(self._waves).real.T.clamp_min(0.0)
        return (of_context + of_context.roll(1, 1)) / 2  # no context has all n tasks

    @cached_property
    def _waves(self) -> Tensor:
        """(n + 1, n) mean of ``w^(k |S|)`` over the contexts S of every task."""
        wave = _waves(self.num_tasks)[:, None].expand(-1, self.num_tasks)
        return self._contexts(wave, torch.ones_like(wave))

    def _of_sizes(self, kernel: Kernel) -> Tensor:
        """(D, n) values of the kernel's functions of sizes."""
        n = self.num_tasks
        features = kernel.size_features(torch.arange(n + 1.0, dtype=torch.float64), n)
        change = self._waves * (_waves(n) - 1)[:, None]
        return (_transform(features).T @ change).real

    def _contexts(self, present: Tensor, absent: Tensor) -> Tensor:
        """(..., n) mean product over the contexts of every task.

        Args:
            present: (..., n) the factors of tasks that are there.
            absent: (..., n) and of those that are not.
        """
        found = torch.empty_like(present)
        if not self.members:
            return found
        whole, none = (
            torch.stack([side[..., tasks].prod(-1) for tasks in self.members], -1)
            for side in (present, absent)
        )
        of_others = _mean_of_rest(whole, none)
        for i, tasks in enumerate(self.members):
            own = _mean_of_rest(present[..., tasks], absent[..., tasks])
            found[..., tasks] = own * of_others[..., i, None]
        return found

    def _pairs_of_contexts(self, table: Tensor) -> Tensor:
        """(n,) the same of two independent contexts, of factors (2, 2, n) by who is in which."""
        found = torch.empty_like(table[0, 0])
        if not self.members:
            return found
        groups = torch.stack([table[..., tasks].prod(-1) for tasks in self.members], -1)
        of_others = _mean_of_rest_in_both(groups)
        for i, tasks in enumerate(self.members):
            found[tasks] = _mean_of_rest_in_both(table[..., tasks]) * of_others[i]
        return found


def group_labels(groups: object, task_names: Sequence[str]) -> list[Hashable]:
    """``groups`` as n labels.

    Raises:
        TypeError: If it is no sequence of such.
        ValueError: If there are others than n.
    """
    labels = check_several("groups", groups, "labels, one for each task")
    if len(labels) != len(task_names):
        remedy = "Say for each task in which group it is, in the order of `task_names`."
        expected = f"{len(task_names)} labels, one for each task"
        raise ValueError(message("groups", expected, str(len(labels)), remedy))
    return [label.item() if hasattr(label, "item") else label for label in labels]


def product_kernels(kernel: Kernel, n: int) -> Iterator[tuple[Tensor, Tensor]]:
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
        weights = _transform(overlaps)[:half]
        weights[1 : n // 2 + 1] *= 2
        for weight, wave in zip(weights, _waves(n)[:half], strict=True):
            table = torch.ones(2, 2, n, dtype=wave.dtype)
            table[1, 1] = wave
            yield weight, table


def _waves(n: int) -> Tensor:
    """(n + 1,) ``w^k``."""
    angles = torch.arange(n + 1, dtype=torch.float64) * (2 * math.pi / (n + 1))
    return torch.polar(torch.ones_like(angles), angles)


def _transform(values: Tensor) -> Tensor:
    """(n + 1, ...) complex b with ``values[o] = sum_k b_k w^(k o)``."""
    k = torch.arange(len(values))
    inverse = _waves(len(values) - 1).conj()[k[:, None] * k % len(values)]
    return inverse @ values.to(inverse) / len(values)


def _mean_of_rest(present: Tensor, absent: Tensor) -> Tensor:
    """Of factors (..., k), the product of all but each, the mean over how likely they are there."""
    q, rest, weights = uniform_law(present.shape[-1] - 1)
    factors = q[:, None] * present[..., None, :] + rest[:, None] * absent[..., None, :]
    return torch.einsum("...qk,q->...k", product_of_rest(factors), weights.to(factors))


def _mean_of_rest_in_both(table: Tensor) -> Tensor:
    """The same for two independent draws, of factors (2, 2, k)."""
    q, rest, weights = uniform_law(table.shape[-1] - 1)
    law = torch.stack([rest, q]).to(table)  # (2, Q)
    factors = torch.einsum("sta,sx,ty->xya", table, law, law)
    weights = weights.to(table)
    return torch.einsum("xya,x,y->a", product_of_rest(factors), weights, weights)


def product_of_rest(factors: Tensor) -> Tensor:
    """(..., k) the product of all others; no division, since a factor may be 0."""
    one = torch.ones_like(factors[..., :1])
    before = torch.cat([one, factors[..., :-1].cumprod(-1)], -1)
    after = torch.cat([one, factors.flip(-1)[..., :-1].cumprod(-1)], -1)
    return before * after.flip(-1)
