r"""Owen values: Shapley values where tasks come in groups, such as languages in families.

The mean effect of adding a task over all orders in which the tasks of a group stay together. So
when task i of group G is added, every other group is there as a whole with probability q, every
other task of G with probability p, and q and p are uniform on [0, 1] (Owen 1977, in Owen's 1972
form of the Shapley value). A product kernel ``prod_j g(s_j, a_j)`` factorises:

.. math:: L_i\, k(\cdot, a) = [g(1, a_i) - g(0, a_i)]\;
          E_p \prod_{j \in G \setminus i} [p\, g(1, a_j) + (1 - p)\, g(0, a_j)]\;
          E_q \prod_{H \ne G} \Big[ q \prod_{j \in H} g(1, a_j)
          + (1 - q) \prod_{j \in H} g(0, a_j) \Big]

Every kernel is a sum of such (:mod:`.product_readouts`), so answers are exact to rounding at any n,
in ``O(m n)`` for each product and node.

Shapes: n tasks, m subsets, r groups; float64.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ksm_ext.arrays import aligned, table_library
from ksm_ext.checks import brief, check_several, listed, message
from ksm_ext.surrogates.product_readouts import ProductReadout, product_of_rest, transform, waves
from ksm_ext.surrogates.readouts import uniform_law


@dataclass(frozen=True, eq=False)
class Groups(ProductReadout):
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

    def of_products(self, there: Tensor, away: Tensor) -> Tensor:
        """See :class:`.product_readouts.ProductReadout`."""
        return (there - away) * self._contexts(there, away)

    def of_pairs(self, table: Tensor) -> Tensor:
        """See :class:`.product_readouts.ProductReadout`."""
        change = table[1, 1] - table[1, 0] - table[0, 1] + table[0, 0]
        return change * self._pairs_of_contexts(table)

    @cached_property
    def size_law(self) -> Tensor:
        """(n, n + 1) how often each value looks at subsets of each size; rows sum to 1."""
        wave = waves(self.num_tasks)[:, None].expand(-1, self.num_tasks)
        of_waves = self._contexts(wave, torch.ones_like(wave))  # the law's Fourier transform
        of_context = transform(of_waves).real.T.clamp_min(0.0)
        return (of_context + of_context.roll(1, 1)) / 2  # no context has all n tasks

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


def group_labels(groups: Any, task_names: Sequence[str]) -> list[Hashable]:
    """``groups`` as n labels, of a mapping those of the tasks by name.

    Raises:
        TypeError: If it is no sequence of such.
        ValueError: If there are others than n.
    """
    if isinstance(groups, Mapping):
        lost = [name for name in task_names if name not in groups]
        if lost:
            remedy = "Say for each task, by its name, in which group it is."
            found = f"none for {listed(map(repr, lost))}"
            raise ValueError(message("groups", "a label for each task", found, remedy))
        return [groups[name] for name in task_names]
    if table_library(groups):
        (groups,) = aligned({"groups": (groups, "task")}, {"task": task_names})
    labels = check_several("groups", groups, "labels, one for each task")
    if len(labels) != len(task_names):
        remedy = "Say for each task in which group it is, in the order of `task_names`."
        expected = f"{len(task_names)} labels, one for each task"
        raise ValueError(message("groups", expected, str(len(labels)), remedy))
    labels = [label.item() if hasattr(label, "item") else label for label in labels]
    for name, label in zip(task_names, labels, strict=True):
        if label is None or label != label:
            remedy = "Give a task that is in no group a label of its own."
            found = f"{label} for {name!r}"
            raise ValueError(message("groups", "a label for each task", found, remedy))
    return labels


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
