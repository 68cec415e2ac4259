r"""Factorial designs: factors of several levels, such as a learning rate or a version of the data.

Every level is a task, named ``"factor=level"``; a run has one level of each factor. The main effect
of a level (Box, Hunter & Hunter 2005, ch. 5) is its mean score over all combinations of the levels
of other factors, less the mean over the levels of its own factor, or a baseline level. On a product
kernel, with ``v_l = g(1, a_l) prod_{j != l} g(0, a_j)`` of the levels of one factor,

.. math:: L_l\, k(\cdot, a) = \Big( v_l - \sum_j c_j v_j \Big)
          \prod_{\text{other factors}} \operatorname{mean}_j v_j

c = 1 / k for the mean of k levels. All kernels are sums of such (:mod:`.product_readouts`).

Shapes: n levels of r factors in all, m runs.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, aligned
from ksm_ext.checks import (
    brief,
    check_kind,
    check_positive_int,
    check_seed,
    check_several,
    counted,
    message,
    shape_text,
)
from ksm_ext.subsets import as_masks, distinct_rows
from ksm_ext.surrogates.product_readouts import ProductReadout, product_of_rest

_MAX_ROUNDS = 1000  # of exchanging levels between runs that are the same


class Factors:
    """Factors, their levels, and designs of runs that have one level of each.

    Attributes:
        levels: The levels of each factor, by its name.
        names: n names ``"factor=level"``, those of the columns of masks.

    Example:
        >>> factors = Factors({"rate": [1e-4, 1e-3, 1e-2], "data": ["v1", "v2"]})
        >>> masks = factors.design(6, seed=0)
        >>> masks.sum(0).tolist()
        [2, 2, 2, 3, 3]
        >>> factors.settings(factors.masks([{"rate": 1e-2, "data": "v1"}]))
        [{'rate': 0.01, 'data': 'v1'}]
    """

    def __init__(self, levels: Mapping[str, Sequence[Any]]) -> None:
        """Take two levels or more of each factor.

        Args:
            levels: The levels of each factor, by its name; different and hashable.

        Raises:
            TypeError: If ``levels`` is no mapping, or levels are no sequence.
            ValueError: If there is no factor, or one has repeated levels or fewer than two.
        """
        remedy = "Give a dict such as {'rate': [1e-3, 1e-2]}."
        check_kind("levels", levels, Mapping, "a mapping of names to levels", remedy)
        self.levels = {
            name: tuple(check_several(f"levels[{name!r}]", each, "levels"))
            for name, each in levels.items()
        }
        for name, each in self.levels.items():
            if len(set(each)) < max(2, len(each)):
                expected, found = "two levels or more, all different", repr(list(each))
                raise ValueError(message(f"levels[{name!r}]", expected, found, remedy))
        if not self.levels:
            raise ValueError(message("levels", "of one factor or more", "none", remedy))
        self.names = tuple(f"{name}={each}" for name in self.levels for each in self.levels[name])
        if len(set(self.names)) < len(self.names):
            found = "two that read alike"
            raise ValueError(message("levels", "all different as text", found, "Rename one."))

    def __repr__(self) -> str:
        """Factors and how many levels they have."""
        sizes = (f"{name!r}: {len(each)}" for name, each in self.levels.items())
        return f"Factors(levels of {', '.join(sizes)})"

    @property
    def num_levels(self) -> list[int]:
        """How many levels each of the r factors has."""
        return [len(each) for each in self.levels.values()]

    def design(
        self, num_runs: int, *, seed: int, device: torch.device | str | None = None
    ) -> Tensor:
        """Draw different runs at random, in which the levels of a factor are balanced.

        Args:
            num_runs: m. Levels of one factor occur equally often, or with a difference of one.
            seed: Seeds a generator of its own; the same seed gives the same bits.
            device: Where the masks shall live; drawn on the CPU whatever it is.

        Returns:
            (m, n) bool.

        Raises:
            ValueError: If there are fewer combinations of levels than ``num_runs``.
        """
        m, most = check_positive_int("num_runs", num_runs), math.prod(self.num_levels)
        if m > most:
            remedy = "Ask for fewer, and repeat them to measure the noise of a run."
            expected = f"at most {most:,}, the number of combinations"
            raise ValueError(message("num_runs", expected, f"{m:,}", remedy))
        generator = torch.Generator().manual_seed(check_seed("seed", seed))
        if 2 * m <= most:
            return self._one_hot(self._balanced(m, generator)).to(device)
        every = torch.cartesian_prod(*map(torch.arange, self.num_levels)).reshape(most, -1)
        left_out = self._balanced(most - m, generator)  # then what stays is balanced too
        first = distinct_rows(self._one_hot(torch.cat([left_out, every])))[1]
        kept = every[first[first >= len(left_out)] - len(left_out)]
        return self._one_hot(kept[torch.randperm(m, generator=generator)]).to(device)

    def masks(self, settings: Iterable[Mapping[str, Any]]) -> Tensor:
        """Masks (m, n) bool of m runs, each a level of every factor by its name.

        Raises:
            TypeError: If ``settings`` is no sequence of mappings.
            ValueError: If a run lacks a factor, or has a level that is none.
        """
        rows = []
        for i, run in enumerate(check_several("settings", settings, "levels by factor")):
            remedy = f"Give a level of each of {', '.join(map(repr, self.levels))}."
            check_kind(f"settings[{i}]", run, Mapping, "a mapping of factors to levels", remedy)
            for name, levels in self.levels.items():
                if name not in run or run[name] not in levels:
                    expected = f"with one of {', '.join(map(repr, levels))} as {name!r}"
                    raise ValueError(message(f"settings[{i}]", expected, repr(dict(run)), remedy))
            rows.append([levels.index(run[name]) for name, levels in self.levels.items()])
        return self._one_hot(torch.tensor(rows, dtype=torch.int64).reshape(len(rows), -1))

    def settings(self, masks: ArrayLike) -> list[dict[str, Any]]:
        """The level of every factor in each run of ``masks`` (m, n), by its name.

        Columns with names go by these, others by position.

        Raises:
            ValueError: If the masks have other columns, or a run has not one level of each factor.
        """
        (masks,) = aligned({"masks": (masks, "subset", "task")}, {"task": self.names})
        table = as_masks("masks", masks).cpu()
        remedy = "Use what design() or masks() returned."
        if table.shape[1] != len(self.names):
            expected = f"of {counted(len(self.names), 'column')}, one for each level"
            raise ValueError(message("masks", expected, shape_text(table), remedy))
        parts = table.split(self.num_levels, dim=1)
        for name, part in zip(self.levels, parts, strict=True):
            bad = (part.sum(1) != 1).nonzero()[:, 0]
            if len(bad):
                found = f"{int(part[bad[0]].sum())} of {name!r} in row {int(bad[0])}"
                raise ValueError(message("masks", "of one level of each factor", found, remedy))
        places = torch.stack([part.long().argmax(1) for part in parts], 1)
        named = self.levels.items()
        return [
            {name: levels[j] for (name, levels), j in zip(named, row, strict=True)}
            for row in places.tolist()
        ]

    def contrasts(self, baseline: Mapping[str, Any] | None) -> Tensor:
        """(n, n) a row for each level: 1 for it, less what it is compared with.

        Raises:
            ValueError: If ``baseline`` names no factor, or a level that is none.
        """
        baseline = {} if baseline is None else baseline
        remedy = f"Name levels of {', '.join(map(repr, self.levels))}, or leave it out."
        check_kind("baseline", baseline, Mapping, "a mapping of factors to levels", remedy)
        for name, level in baseline.items():
            if level not in self.levels.get(name, ()):
                found = f"{level!r} of {name!r}"
                raise ValueError(message("baseline", "a level of each factor", found, remedy))
        blocks = []
        for name, levels in self.levels.items():
            own = torch.eye(len(levels), dtype=torch.float64)
            compared = own[levels.index(baseline[name])] if name in baseline else own.mean(0)
            blocks.append(own - compared)
        return torch.block_diag(*blocks)

    def _balanced(self, m: int, generator: torch.Generator) -> Tensor:
        """(m, r) int64 numbers of levels, distinct rows."""

        def shuffled(values: Tensor) -> Tensor:
            return values[torch.randperm(len(values), generator=generator)]

        columns = []
        for k in self.num_levels:
            more = shuffled(torch.arange(k))[: m % k]
            columns.append(shuffled(torch.cat([torch.arange(k).repeat(m // k), more])))
        found = torch.stack(columns, 1)
        for turn in range(_MAX_ROUNDS):
            again = torch.ones(m, dtype=torch.bool)
            again[distinct_rows(self._one_hot(found))[1]] = False
            if not bool(again.any()):
                return found
            rows = again.nonzero()[:, 0]  # exchanged among these and as many others
            rows = torch.cat([rows, shuffled((~again).nonzero()[:, 0])[: len(rows) + 1]])
            factor = turn % found.shape[1]
            found[rows, factor] = found[shuffled(rows), factor]
        remedy = "Ask for another number of runs."
        raise ValueError(message("num_runs", "of distinct runs in balance", f"{m:,}", remedy))

    def _one_hot(self, numbers: Tensor) -> Tensor:
        """(m, n) bool of numbers of levels (m, r)."""
        columns = [
            column[:, None] == torch.arange(k)
            for column, k in zip(numbers.T, self.num_levels, strict=True)
        ]
        return torch.cat(columns, 1)


@dataclass(frozen=True, eq=False)
class MainEffects(ProductReadout):
    """Main effects of the levels of factors, as readout.

    Attributes:
        num_levels: How many levels each of the r factors has.
        contrasts: (n, n) see :meth:`Factors.contrasts`.
        varying: (n,) bool: levels that kernels know, since not all runs or none had them.
    """

    num_levels: list[int]
    contrasts: Tensor
    varying: Tensor

    __repr__ = brief

    def of_products(self, there: Tensor, away: Tensor) -> Tensor:
        """See :class:`.product_readouts.ProductReadout`."""
        rest = [product_of_rest(part) for part in self._of_all(away).split(self.num_levels, -1)]
        values = self._of_all(there) * torch.cat(rest, -1)  # v of the module's head
        means = torch.stack([part.mean(-1) for part in values.split(self.num_levels, -1)], -1)
        return (values @ self.contrasts.T.to(values)) * self._of_others(means)

    def of_pairs(self, table: Tensor) -> Tensor:
        """See :class:`.product_readouts.ProductReadout`."""
        blocks = [_of_pairs(part) for part in self._of_all(table).split(self.num_levels, -1)]
        joint, means = torch.block_diag(*blocks), torch.stack([block.mean() for block in blocks])
        contrasts = self.contrasts.to(joint)
        return ((contrasts @ joint) * contrasts).sum(1) * self._of_others(means)

    @property
    def size(self) -> int:
        """How many levels that vary are in a run."""
        return sum(bool(part.any()) for part in self.varying.cpu().split(self.num_levels))

    def _of_all(self, table: Tensor) -> Tensor:
        """Factors (..., n) of all levels: 1 of those that kernels do not know."""
        full = table.new_ones(*table.shape[:-1], len(self.varying))
        full[..., self.varying.cpu()] = table
        return full

    def _of_others(self, means: Tensor) -> Tensor:
        """(..., n) products over all other factors, of numbers (..., r)."""
        return product_of_rest(means).repeat_interleave(torch.tensor(self.num_levels), -1)


def _of_pairs(table: Tensor) -> Tensor:
    """(k, k) products over the levels of a factor, of (2, 2, k), where two runs have any two."""
    own = torch.eye(table.shape[-1], dtype=torch.int64)
    levels = torch.arange(len(own))
    return table[own[:, None], own[None], levels].prod(-1)
