r"""Designs: which subsets of the tasks to score.

A design is a boolean matrix of masks whose row i is the indicator of the subset :math:`S_i`. Every
random design here draws a size from a distribution :math:`w`, then a set uniformly among those of
that size:

.. math:: P(S) = w_{|S|} \Big/ \binom{n}{|S|}

Without repeats (the default) rows are drawn one after another and a row seen before is drawn anew.
:func:`dirichlet` draws shares of tasks in a mixture instead.

Shapes: masks (m, n) bool with n tasks and m subsets.

References: the fraction of tasks kept decides what a linear surrogate estimates, *Ilyas et al.
2022, arXiv:2202.00622*; sampling by complementary pairs, *Covert & Lee 2021, arXiv:2012.01536*;
mixtures, *Liu et al. 2025 (RegMix), arXiv:2407.01492*.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, combinations, islice
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ksm_ext.arrays import ArrayKind, ArrayLike, aligned, as_tensor, names_along
from ksm_ext.checks import (
    check_choice,
    check_finite,
    check_ndim,
    check_positive_int,
    check_real,
    check_several,
    checked,
    message,
    shape_text,
)

Question = Literal["loo", "shapley", "banzhaf", "prediction"]
"""What a design is for: a readout of the surrogate, or its predictions."""

_MAX_ENUMERATED_TASKS = 24  # 2^24 masks of 24 tasks are 400 MB
_CHUNK_CELLS = 2**26  # of a mask matrix held beside the result while it is filled
_LISTED_CELLS = 2**20  # of a mask matrix that is listed rather than sampled
_UNIFORM_PER_TASK = 16  # subsets up to which those of middle size tell most besides borders
SHARES_TOLERANCE = 0.02
"""By how much of their mean the sums of mixtures may differ that are said to share one sum."""

_MAX_ROUNDS = 100  # of drawing anew what was drawn before


@checked
def fixed_size(
    num_tasks: int,
    num_subsets: int,
    size: int,
    *,
    seed: int,
    allow_repeats: bool = False,
    allow_fewer: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw subsets of one size, uniformly.

    The design of published datamodels: each task is left out of a fraction ``1 - size / num_tasks``
    of the subsets. Prefer :func:`mixed_sizes` where the surrogate will be asked about subsets of
    other sizes, as leave-one-out and Shapley values do.

    Args:
        num_tasks: n.
        num_subsets: m.
        size: Number of tasks in every subset, 0 to n.
        seed: Seeds a generator of its own; the same seed gives the same bits.
        allow_repeats: Draw independently, so that a subset may appear twice.
        allow_fewer: Answer all there are where fewer than ``num_subsets`` distinct subsets exist,
            in random order, instead of raising.
        device: Where the masks shall live; drawn on the CPU whatever it is.

    Returns:
        (m, n) bool.

    Raises:
        ValueError: If ``size`` exceeds ``num_tasks``, or fewer than ``num_subsets`` distinct
            subsets exist (unless allowed to).

    Example:
        >>> fixed_size(5, 3, 2, seed=0).sum(dim=1).tolist()
        [2, 2, 2]
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    size = _check_size("size", size, num_tasks)
    weights = _weights_of_sizes(num_tasks, [size])
    return _sample(weights, num_subsets, seed, allow_repeats, allow_fewer).to(device)


@checked
def bernoulli(
    num_tasks: int,
    num_subsets: int,
    probability: float,
    *,
    seed: int,
    allow_empty_and_full: bool = False,
    allow_repeats: bool = False,
    allow_fewer: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw subsets that include each task independently with one probability.

    The design of the theory of linear surrogates. For a score quadratic in the mask with gradient g
    and Hessian H at the full set, such a design makes least squares converge to
    ``g + (q - 1) H 1 + (1 - 2q) / 2 diag H`` with ``q = probability``.

    Args:
        num_tasks: n.
        num_subsets: m.
        probability: Chance of each task to be in, strictly between 0 and 1.
        seed: Seeds a generator of its own; the same seed gives the same bits.
        allow_empty_and_full: Keep the empty and the full subset among what is drawn; otherwise the
            distribution is conditioned on neither.
        allow_repeats: Draw independently, so that a subset may appear twice. Without repeats a
            probability far from one half is only approached, since likely subsets run out.
        allow_fewer: Answer what could be found where that is fewer than ``num_subsets`` distinct
            subsets, all there are or nearly, instead of raising.
        device: Where the masks shall live; drawn on the CPU whatever it is.

    Returns:
        (m, n) bool.

    Raises:
        ValueError: If ``probability`` is not in (0, 1), or fewer than ``num_subsets`` distinct
            subsets exist or could be found (unless allowed to).
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    weights = _weights_of_bernoulli(num_tasks, probability, allow_empty_and_full)
    return _sample(weights, num_subsets, seed, allow_repeats, allow_fewer).to(device)


@checked
def mixed_sizes(
    num_tasks: int,
    num_subsets: int,
    sizes: Iterable[int] | None = None,
    *,
    seed: int,
    allow_repeats: bool = False,
    allow_fewer: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw a size uniformly, then a subset of this size uniformly.

    Covers the whole range from single tasks to all but one, so that leave-one-out, Shapley values
    and greedy selection interpolate instead of extrapolating.

    Args:
        num_tasks: n.
        num_subsets: m.
        sizes: Sizes to draw from, each 0 to n; ``None`` is 1 to n - 1.
        seed: Seeds a generator of its own; the same seed gives the same bits.
        allow_repeats: Draw independently, so that a subset may appear twice. Without repeats sizes
            of which few subsets exist run out and the others fill their place.
        allow_fewer: Answer what could be found where that is less, see :func:`fixed_size`.
        device: Where the masks shall live; drawn on the CPU whatever it is.

    Returns:
        (m, n) bool.

    Raises:
        ValueError: If a size exceeds ``num_tasks``, none is given, or fewer than ``num_subsets``
            distinct subsets exist or could be found (unless allowed to).
    """
    num_tasks = check_positive_int("num_tasks", num_tasks, minimum=1 if sizes is not None else 2)
    given = range(1, num_tasks) if sizes is None else check_several("sizes", sizes, "sizes")
    chosen = sorted({_check_size("sizes", size, num_tasks) for size in given})
    if not chosen:
        remedy = "Leave it out for 1 to num_tasks - 1."
        raise ValueError(message("sizes", "a list of sizes", "none", remedy))
    weights = _weights_of_sizes(num_tasks, chosen)
    return _sample(weights, num_subsets, seed, allow_repeats, allow_fewer).to(device)


@checked
def paired(
    num_tasks: int,
    num_subsets: int,
    *,
    size: int | None = None,
    probability: float | None = None,
    seed: int,
    allow_repeats: bool = False,
    allow_fewer: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Draw subsets together with their complements: rows 2i and 2i + 1 share no task.

    Antithetic sampling: in a pair every interaction of even order cancels from the difference, and
    every one of odd order from the sum, so main effects are seen without pairwise noise.

    Args:
        num_tasks: n.
        num_subsets: m, an even number.
        size: Number of tasks in row 2i; row 2i + 1 has the other ``n - size``. Strictly between 0
            and n.
        probability: Instead of ``size``: chance of each task to be in row 2i.
        seed: Seeds a generator of its own; the same seed gives the same bits.
        allow_repeats: Draw independently, so that a pair may appear twice.
        allow_fewer: Answer what could be found where that is less, see :func:`bernoulli`; still of
            whole pairs.
        device: Where the masks shall live; drawn on the CPU whatever it is.

    Returns:
        (m, n) bool; ``masks[1::2]`` equals ``~masks[0::2]``.

    Raises:
        ValueError: If ``num_subsets`` is odd, not exactly one of ``size`` and ``probability`` is
            given, or fewer than ``num_subsets / 2`` distinct pairs exist or could be found (unless
            allowed to).
    """
    num_tasks = check_positive_int("num_tasks", num_tasks, minimum=2)
    num_subsets = check_positive_int("num_subsets", num_subsets, minimum=0)
    if num_subsets % 2:
        remedy = "A pair takes two subsets."
        raise ValueError(message("num_subsets", "even", str(num_subsets), remedy))
    if (size is None) == (probability is None):
        found = "neither" if size is None else "both"
        remedy = "Give exactly one of the two."
        raise ValueError(message("size", "given or else `probability`", found, remedy))
    if size is not None:
        size = _check_size("size", size, num_tasks, minimum=1, maximum=num_tasks - 1)
        weights = _weights_of_sizes(num_tasks, [size])
    else:
        assert probability is not None
        weights = _weights_of_bernoulli(num_tasks, probability, allow_empty_and_full=False)
    first = _sample(weights, num_subsets // 2, seed, allow_repeats, allow_fewer, pairs=True)
    return torch.stack([first, ~first], dim=1).reshape(2 * len(first), num_tasks).to(device)


@checked
def design(
    num_tasks: int,
    num_subsets: int,
    *,
    readout: Question = "shapley",
    known: ArrayLike | None = None,
    include_empty: bool = False,
    seed: int,
    allow_fewer: bool = False,
    device: torch.device | str | None = None,
) -> Tensor:
    """Choose subsets for what will be asked of the surrogate.

    The full set comes first, and then, as far as ``num_subsets`` goes,

    =================  =====================================================================
    ``"shapley"``      all that lack one task, single tasks, then pairs of complements
    ``"loo"``          all that lack one task, then pairs of complements
    ``"banzhaf"``      uniform among all subsets
    ``"prediction"``   pairs of complements, of all sizes alike
    =================  =====================================================================

    The pairs of the first two are uniform among all subsets up to 16 n subsets in all, and of all
    sizes alike for more. On complete tables of retrained scores these were best, or as good, of all
    that ``python -m experiments.studies.designs`` compares.

    Args:
        num_tasks: n.
        num_subsets: m.
        readout: What will be asked: attributions or interactions of this name, or predictions of
            subsets of any size.
        known: (k, n) subsets that are scored already, or whose scores are known, such as the full
            set: they are not drawn again.
        include_empty: Begin with the empty set too. Shapley values sum to its distance from the
            full set, so it is worth its score wherever training on nothing has one.
        seed: Seeds a generator of its own; the same seed gives the same bits.
        allow_fewer: Answer all there are where fewer subsets exist, instead of raising.
        device: Where the masks shall live; drawn on the CPU whatever it is.

    Returns:
        (m, n) bool, distinct, none of them ``known``, in the order in which to score them.

    Raises:
        ValueError: If ``readout`` is unknown, ``known`` has other than n columns, or fewer than
            ``num_subsets`` further subsets exist (unless allowed to).

    Example:
        >>> design(3, 4, readout="loo", seed=0).sum(dim=1).tolist()
        [3, 2, 2, 2]
    """
    n = check_positive_int("num_tasks", num_tasks, minimum=2)
    num_subsets = check_positive_int("num_subsets", num_subsets, minimum=0)
    seed = check_positive_int("seed", seed, minimum=0)
    check_choice("readout", readout, get_args(Question))
    seen = torch.empty(0, n, dtype=torch.bool) if known is None else as_masks("known", known).cpu()
    if seen.shape[1] != n:
        remedy = "Use the same tasks in the same order."
        raise ValueError(message("known", f"of {n} columns", shape_text(seen), remedy))

    def new(rows: Tensor) -> Tensor:
        """The first of ``rows`` that differ from each other and from what is known."""
        rows = torch.cat([seen, rows])
        kept = distinct_rows(rows)[1]
        return rows[kept[kept >= len(seen)][:num_subsets]]

    total = num_subsets + len(seen)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:total, None]
    single = torch.zeros(len(order), n, dtype=torch.bool).scatter_(1, order, True)
    first = [torch.ones(1, n, dtype=torch.bool), torch.zeros(int(include_empty), n).bool()]
    borders = {"loo": [~single], "shapley": [~single, single]}
    masks = new(torch.cat([*first, *borders.get(readout, [])]))
    if len(masks) < num_subsets:
        weights = _weights_of_bernoulli(n, 0.5, allow_empty_and_full=False)
        pairs = readout != "banzhaf"
        if readout == "prediction" or (pairs and total > _UNIFORM_PER_TASK * n):
            weights = _weights_of_sizes(n, range(1, n))
        half = -(-(total + len(masks)) // (1 + pairs))
        drawn = _sample(weights, half, seed, False, True, pairs=pairs)
        if pairs:
            drawn = torch.stack([drawn, ~drawn], dim=1).reshape(-1, n)
        masks = new(torch.cat([masks, drawn]))
    if len(masks) < num_subsets and not allow_fewer:
        expected = f"at most {len(masks)}, the number of subsets that are left"
        remedy = "Ask for fewer, or pass allow_fewer=True."
        raise ValueError(message("num_subsets", expected, str(num_subsets), remedy))
    return masks.to(device)


@checked
def dirichlet(
    num_tasks: int,
    num_mixtures: int,
    *,
    prior: ArrayLike | None = None,
    strength: float | tuple[float, float] = (0.1, 5.0),
    minimum: float = 0.0,
    maximum: ArrayLike | float = 1.0,
    seed: int,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Draw mixtures: the share of every task in the training data.

    .. math:: x \sim \mathrm{Dirichlet}(s\, p), \qquad \log s \sim \mathrm{uniform}

    As RegMix draws them, with p the square roots of the domains' token counts. Small strengths s
    give mixtures of few tasks, large ones mixtures near the prior: a range covers both.

    Args:
        num_tasks: n.
        num_mixtures: m.
        prior: (n,) positive float, the mean mixture up to a factor, such as tokens of each task;
            None for all alike.
        strength: The range that s is drawn from for each mixture, or one number for all.
        minimum: Shares below become 0, and the others are scaled up.
        maximum: The largest share allowed of each task, (n,) or a number; a mixture that exceeds it
            is drawn anew.
        seed: Seeds a generator of its own; the same seed gives the same bits.
        device: Where the mixtures shall live; drawn on the CPU whatever it is.

    Returns:
        (m, n) float64; every row sums to 1.

    Raises:
        ValueError: If ``prior`` or ``strength`` is not positive, ``minimum`` is not below 1 / n, or
            too few mixtures within ``maximum`` could be found.

    Example:
        >>> dirichlet(4, 2, seed=0).sum(dim=1).round(decimals=9).tolist()
        [1.0, 1.0]
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    num_mixtures = check_positive_int("num_mixtures", num_mixtures, minimum=0)
    tables = {"prior": (prior, "task"), "maximum": (maximum, "task")}
    prior, maximum = aligned(tables)
    weights = _of_each_task("prior", 1.0 if prior is None else prior, num_tasks)
    limits = _of_each_task("maximum", maximum, num_tasks)
    low, high = _strengths(strength)
    minimum = check_real("minimum", minimum)
    if not 0 <= minimum < 1 / num_tasks:
        expected, remedy = f"at least 0 and below 1 / {num_tasks}", "Something must be left."
        raise ValueError(message("minimum", expected, str(minimum), remedy))
    generator = np.random.default_rng(check_positive_int("seed", seed, minimum=0))
    found = np.empty((0, num_tasks))
    for _ in range(_MAX_ROUNDS):
        if len(found) == num_mixtures:
            break
        size = (max(num_mixtures, 64), 1)
        concentration = np.exp(generator.uniform(math.log(low), math.log(high), size)) * weights
        # a gamma variate of index a as one of a + 1 times u^(1/a), in logarithms: small ones vanish
        logs = np.log(generator.standard_gamma(concentration + 1))
        logs += np.log1p(-generator.random(logs.shape)) / concentration
        shares = torch.from_numpy(logs).softmax(1).numpy()
        shares[shares < minimum] = 0.0
        shares /= shares.sum(1, keepdims=True)
        found = np.concatenate([found, shares[(shares <= limits).all(1)]])[:num_mixtures]
    if len(found) < num_mixtures:
        what = f"{len(found)} of {num_mixtures} mixtures after {_MAX_ROUNDS} rounds"
        remedy = "Raise it, or the strength."
        raise ValueError(message("maximum", "within reach of sampling", what, remedy))
    return torch.from_numpy(found).to(device)


@checked
def leave_one_out(
    num_tasks: int, include_full: bool = False, *, device: torch.device | str | None = None
) -> Tensor:
    """All subsets that lack exactly one task; row i lacks task i.

    Args:
        num_tasks: n.
        include_full: Append the full set as the last row, as ``F(1) - F(1 - e_i)`` needs it.
        device: Where the masks shall live.

    Returns:
        (n, n) bool, or (n + 1, n) with the full set.

    Example:
        >>> leave_one_out(2, include_full=True).int().tolist()
        [[0, 1], [1, 0], [1, 1]]
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    masks = torch.ones(num_tasks + include_full, num_tasks, dtype=torch.bool, device=device)
    return masks.fill_diagonal_(False)


@checked
def leave_two_out(num_tasks: int, *, device: torch.device | str | None = None) -> Tensor:
    """All subsets that lack exactly two tasks, in the order of ``itertools.combinations``.

    Args:
        num_tasks: n, at least 2.
        device: Where the masks shall live.

    Returns:
        (n (n - 1) / 2, n) bool. The row of tasks i < j is that of
        ``torch.triu_indices(n, n, offset=1)``.
    """
    num_tasks = check_positive_int("num_tasks", num_tasks, minimum=2)
    pairs = torch.triu_indices(num_tasks, num_tasks, offset=1).T  # (n (n - 1) / 2, 2)
    masks = torch.ones(len(pairs), num_tasks, dtype=torch.bool)
    return masks.scatter_(1, pairs, False).to(device)


@checked
def all_subsets(
    num_tasks: int, include_empty: bool = True, *, device: torch.device | str | None = None
) -> Tensor:
    """Every subset; task i is bit i of the row number.

    Args:
        num_tasks: n, at most 24; beyond, go through :func:`iterate_subsets` in chunks.
        include_empty: Keep the empty set, row 0. Without it row r is the binary of r + 1.
        device: Where the masks shall live.

    Returns:
        (2^n, n) bool, or (2^n - 1, n) without the empty set.

    Raises:
        ValueError: If ``num_tasks`` exceeds 24.

    Example:
        >>> all_subsets(2).int().tolist()
        [[0, 0], [1, 0], [0, 1], [1, 1]]
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    if num_tasks > _MAX_ENUMERATED_TASKS:
        expected = f"at most {_MAX_ENUMERATED_TASKS}"
        found = f"{num_tasks}, hence 2^{num_tasks} subsets"
        remedy = "Draw a sample by `mixed_sizes` or `bernoulli`."
        raise ValueError(message("num_tasks", expected, found, remedy))
    return _binary_rows(0 if include_empty else 1, 2**num_tasks, num_tasks).to(device)


def iterate_subsets(
    num_tasks: int, size: int | None = None, *, chunk_rows: int = 2**16
) -> Iterator[Tensor]:
    """Every subset, or every one of a size, in chunks that never meet in memory.

    Args:
        num_tasks: n.
        size: Only subsets of this many tasks, in the order of ``itertools.combinations``; ``None``
            gives all in the order of :func:`all_subsets`, the empty set first.
        chunk_rows: Subsets per chunk.

    Yields:
        (chunk_rows, n) bool on the CPU; the last chunk may be shorter.
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    chunk_rows = check_positive_int("chunk_rows", chunk_rows)
    if size is None:
        for start in range(0, 2**num_tasks, chunk_rows):
            yield _binary_rows(start, min(start + chunk_rows, 2**num_tasks), num_tasks)
        return
    size = _check_size("size", size, num_tasks)
    tuples = combinations(range(num_tasks), size)
    while chunk := list(islice(tuples, chunk_rows)):
        columns = np.fromiter(chain.from_iterable(chunk), np.int64, len(chunk) * size)
        masks = torch.zeros(len(chunk), num_tasks, dtype=torch.bool)
        yield masks.scatter_(1, torch.from_numpy(columns).reshape(len(chunk), size), True)


@checked
def from_index_lists(
    index_lists: Sequence[Iterable[int]],
    num_tasks: int,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Masks of subsets that are given as lists of task numbers.

    Args:
        index_lists: m lists of task numbers 0 to n - 1, each number at most once per list.
        num_tasks: n. Required: read off the largest number, it is silently wrong as soon as the
            last task is in no subset.
        device: Where the masks shall live.

    Returns:
        (m, n) bool.

    Raises:
        TypeError: If a task number is not an integer.
        ValueError: If a task number is out of range or repeated within a list.

    Example:
        >>> from_index_lists([[2, 0], []], num_tasks=3).int().tolist()
        [[1, 0, 1], [0, 0, 0]]
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    of = "lists of task numbers"
    lists = [
        check_several("index_lists", indices, of)
        for indices in check_several("index_lists", index_lists, of)
    ]
    lengths = [len(indices) for indices in lists]
    columns = as_tensor("index_lists", list(chain.from_iterable(lists)) or np.empty(0, np.int64))
    if columns.is_floating_point() or columns.dtype == torch.bool:
        expected = "lists of integers"
        found = str(columns.dtype).removeprefix("torch.")
        remedy = "A boolean matrix is a mask already."
        raise TypeError(message("index_lists", expected, found, remedy))
    rows = torch.repeat_interleave(torch.arange(len(lists)), torch.tensor(lengths).long())
    outside = (columns < 0) | (columns >= num_tasks)
    if outside.any():
        first = int(outside.nonzero()[0])
        expected = f"task numbers from 0 to {num_tasks - 1}"
        found = f"{int(columns[first])} in list {int(rows[first])}"
        remedy = "Count tasks from 0, and check `num_tasks`."
        raise ValueError(message("index_lists", expected, found, remedy))
    masks = torch.zeros(len(lists), num_tasks, dtype=torch.bool)
    masks[rows, columns.long()] = True
    repeated = _count_tasks(masks) != torch.tensor(lengths).long()
    if repeated.any():
        first = int(repeated.nonzero()[0])
        expected = "free of repeated task numbers"
        found = f"list {first} = {lists[first][:8]}"
        remedy = "A task is in or out; drop the repeats."
        raise ValueError(message("index_lists", expected, found, remedy))
    return masks.to(device)


def to_index_lists(masks: ArrayLike) -> list[list[int]]:
    """The ascending task numbers of each subset; undoes :func:`from_index_lists`.

    Args:
        masks: (m, n) bool, or numbers that are 0 or 1.

    Returns:
        m lists of integers.
    """
    table = as_masks("masks", _oriented(masks)).cpu()
    columns = table.nonzero()[:, 1]
    return [part.tolist() for part in columns.split(_count_tasks(table).tolist())]


def identical_subsets(masks: ArrayLike) -> Any:
    """Number the distinct rows in the order of their first appearance.

    Args:
        masks: (m, n) bool, or numbers that are 0 or 1.

    Returns:
        (m,) int64, of the kind of ``masks``: equal numbers for equal rows, 0 for the first row.

    Example:
        >>> identical_subsets(torch.tensor([[1, 0], [1, 1], [1, 0]])).tolist()
        [0, 1, 0]
    """
    masks = _oriented(masks)
    groups, _ = distinct_rows(as_masks("masks", masks))
    return ArrayKind.of(masks).restore(groups, {"subset": names_along(masks, 0)})


def merge_duplicate_tasks(masks: ArrayLike) -> tuple[Any, list[list[int]]]:
    """Merge tasks that are in or out together in every subset, since no score can tell them apart.

    Published modular-arithmetic data have 500 columns that are 25 tasks. Merged, distances between
    subsets count tasks once; the effect found for a group belongs to all of it.

    Args:
        masks: (m, n) bool, or numbers that are 0 or 1.

    Returns:
        Two things: the merged masks, (m, g) bool of the kind of ``masks``, one column per group, in
        the order of each group's first task, whose name a table keeps; and the groups, g
        ascending lists of column numbers of ``masks``.

    Example:
        >>> merge_duplicate_tasks(torch.tensor([[1, 0, 1], [0, 0, 0]]))[1]
        [[0, 2], [1]]
    """
    masks = _oriented(masks)
    table = as_masks("masks", masks)
    numbers, first_columns = distinct_rows(table.T)  # (n,), (g,)
    first = first_columns.tolist()
    groups: list[list[int]] = [[] for _ in first]
    for column, number in enumerate(numbers.tolist()):
        groups[number].append(column)
    names = names_along(masks, 1)
    axes = {
        "subset": names_along(masks, 0),
        "task": None if names is None else [names[column] for column in first],
    }
    return ArrayKind.of(masks).restore(table[:, first], axes), groups


def _oriented(masks: ArrayLike) -> ArrayLike:
    """Masks with their dimensions in order, where they have names of dimensions."""
    return aligned({"masks": (masks, "subset", "task")})[0]


def as_masks(name: str, value: ArrayLike) -> Tensor:
    """Any accepted kind of masks as a boolean tensor on the device of ``value``.

    Args:
        name: The argument's name, for messages.
        value: (m, n) bool, or numbers that are 0 or 1.

    Returns:
        (m, n) bool.

    Raises:
        TypeError: If ``value`` holds no numbers.
        ValueError: If it is not a matrix, or holds anything but 0 and 1.
    """
    tensor = as_tensor(name, value)
    check_ndim(name, tensor, 2, "(m, n): subsets by tasks")
    if tensor.dtype == torch.bool:
        return tensor
    other = (tensor != 0) & (tensor != 1)
    if other.any():
        row, column = other.nonzero()[0].tolist()
        expected = "boolean, or 0 and 1"
        found = f"{tensor[row, column].item()} at ({row}, {column})"
        remedy = "Lists of task numbers go through `from_index_lists`."
        raise ValueError(message(name, expected, found, remedy))
    return tensor.bool()


def common_sum(weights: Tensor) -> float | None:
    """The sum that all rows of weights (m, n) share, up to rounding; None where they share none.

    Rows share a sum where the largest and the smallest differ by at most 2 % of their mean: shares
    rounded to three digits sum to 0.996 to 1.003. Then 1 where that is within 2 % of the mean, else
    the mean.
    """
    if not len(weights) or bool((weights < 0).any()):
        return None
    sums = weights.double().sum(1)
    mean = float(sums.mean())
    if not float(sums.max() - sums.min()) <= SHARES_TOLERANCE * mean or mean == 0:
        return None
    return 1.0 if abs(mean - 1) <= SHARES_TOLERANCE * mean else mean


def _of_each_task(name: str, given: ArrayLike | float, num_tasks: int) -> np.ndarray:
    """(n,) positive numbers; of the prior, of sum 1."""
    values = as_tensor(name, [given] * num_tasks if isinstance(given, (int, float)) else given)
    if values.shape != (num_tasks,):
        remedy = "Give one number per task."
        raise ValueError(message(name, f"of shape ({num_tasks},)", shape_text(values), remedy))
    check_finite(name, values)
    if not bool((values > 0).all()):
        remedy = "Leave out tasks that are in no mixture."
        raise ValueError(message(name, "positive", str(values.tolist()[:8]), remedy))
    numbers = values.double().cpu().numpy()
    return numbers / numbers.sum() if name == "prior" else numbers


def _strengths(given: float | tuple[float, float]) -> tuple[float, float]:
    """The smallest and the largest strength."""
    expected, remedy = "positive, or a pair of these in order", "RegMix has (0.1, 5)."
    single = isinstance(given, (int, float))
    pair = (given, given) if single else check_several("strength", given, "two numbers")
    if len(pair) != 2:
        raise ValueError(message("strength", expected, repr(given), remedy))
    low, high = (check_real("strength", each, expected, remedy) for each in pair)
    if not 0 < low <= high < math.inf:
        raise ValueError(message("strength", expected, str(given), remedy))
    return low, high


def _check_size(
    name: str, size: int, num_tasks: int, minimum: int = 0, maximum: int | None = None
) -> int:
    maximum = num_tasks if maximum is None else maximum
    size = check_positive_int(name, size, minimum=minimum)
    if size > maximum:
        remedy = f"There are {num_tasks} tasks."
        raise ValueError(message(name, f"from {minimum} to {maximum}", str(size), remedy))
    return size


def _weights_of_sizes(num_tasks: int, sizes: Sequence[int]) -> Tensor:
    weights = torch.zeros(num_tasks + 1, dtype=torch.float64)
    weights[list(sizes)] = 1 / len(sizes)
    return weights


def _weights_of_bernoulli(num_tasks: int, probability: float, allow_empty_and_full: bool) -> Tensor:
    """Binomial probabilities of the sizes 0 to n, scaled to sum to one; (n + 1,) float64."""
    probability = check_real("probability", probability)
    if not 0 < probability < 1:
        expected = "strictly between 0 and 1"
        remedy = "It is the chance of each task to be in."
        raise ValueError(message("probability", expected, str(probability), remedy))
    size = torch.arange(num_tasks + 1, dtype=torch.float64)
    choices = torch.lgamma(size + 1) + torch.lgamma(num_tasks - size + 1)
    logs = size * math.log(probability) + (num_tasks - size) * math.log1p(-probability) - choices
    if not allow_empty_and_full:
        num_tasks = check_positive_int("num_tasks", num_tasks, minimum=2)
        logs[[0, num_tasks]] = -torch.inf
    return torch.softmax(logs, dim=0)


def _sample(
    size_weights: Tensor,
    num_subsets: int,
    seed: int,
    allow_repeats: bool,
    allow_fewer: bool,
    *,
    pairs: bool = False,
) -> Tensor:
    """Draw from the law of the module's head, sizes with probabilities (n + 1,); (m, n) bool.

    ``pairs`` counts a complement as a repeat.
    """
    num_subsets = check_positive_int("num_subsets", num_subsets, minimum=0)
    seed = check_positive_int("seed", seed, minimum=0)
    generator = torch.Generator().manual_seed(seed)
    if allow_repeats:
        return _draw(size_weights, num_subsets, generator)
    cap = max(2 * num_subsets, _LISTED_CELLS)
    num_possible = _count_possible(size_weights, pairs, cap)
    if num_subsets > num_possible and not allow_fewer:
        what = "distinct pairs of complements" if pairs else "distinct subsets of these sizes"
        expected = f"at most {num_possible * (1 + pairs)}, the number of {what}"
        remedy = "Ask for fewer, or pass allow_fewer=True or allow_repeats=True."
        raise ValueError(message("num_subsets", expected, str(num_subsets * (1 + pairs)), remedy))

    def distinct(masks: Tensor) -> Tensor:
        """Where rows appear first; of pairs, those of the member that has task 0."""
        return distinct_rows(masks ^ ~masks[:, :1] if pairs else masks)[1]

    # Where most of what exists is asked for, drawing until it was all seen would take too long; and
    # where little exists, listing it costs nothing.
    cells = num_possible * len(size_weights)
    if num_possible <= 2 * num_subsets or cells <= _LISTED_CELLS:
        shuffled = _shuffle_all(size_weights, generator)
        return shuffled[distinct(shuffled)[:num_subsets]]
    masks = torch.empty(0, len(size_weights) - 1, dtype=torch.bool)
    for _ in range(_MAX_ROUNDS):
        drawn = _draw(size_weights, num_subsets, generator)
        masks = torch.cat([masks, drawn]) if len(masks) else drawn
        kept = distinct(masks)
        if len(kept) == num_subsets == len(masks):
            return masks  # the usual case, spared a copy
        masks = masks[kept[:num_subsets]]
        if len(masks) == num_subsets:
            return masks
    if allow_fewer:
        return masks
    found = f"{len(masks)} distinct of {num_subsets} after {_MAX_ROUNDS} rounds"
    remedy = "Ask for fewer, or pass allow_fewer=True or allow_repeats=True."
    raise ValueError(message("num_subsets", "within reach of sampling", found, remedy))


def _count_possible(size_weights: Tensor, pairs: bool, cap: int) -> int:
    """How many subsets, or pairs of complements, can be drawn; exact up to ``cap``."""
    n = len(size_weights) - 1
    possible = (size_weights > 0).tolist()
    doubled = 0  # a subset whose complement is possible too is half of a pair
    for size in range(n + 1):
        if possible[size]:
            doubled += math.comb(n, size) * (1 if pairs and possible[n - size] else 2)
        if doubled > 2 * cap:  # the binomials to come may have thousands of digits
            break
    return doubled // 2


def _shuffle_all(size_weights: Tensor, generator: torch.Generator) -> Tensor:
    """All possible subsets in the order in which drawing without repeats would find them.

    Sorting log-probabilities plus Gumbel noise gives exactly that law (Efraimidis & Spirakis 2006).
    """
    n = len(size_weights) - 1
    sizes = size_weights.nonzero()[:, 0].tolist()
    masks = torch.cat([chunk for size in sizes for chunk in iterate_subsets(n, size)])
    log_choices = torch.tensor([math.log(math.comb(n, size)) for size in range(n + 1)])
    log_weights = (size_weights.log() - log_choices)[_count_tasks(masks)]
    uniform = torch.rand(len(masks), generator=generator, dtype=torch.float64)
    order = (log_weights - torch.log(-torch.log(uniform))).argsort(descending=True)
    return masks[order]


def _draw(size_weights: Tensor, num_subsets: int, generator: torch.Generator) -> Tensor:
    """Independent draws from the law of the module's head; (m, n) bool."""
    n = len(size_weights) - 1
    masks = torch.empty(num_subsets, n, dtype=torch.bool)
    if num_subsets == 0:
        return masks
    sizes = torch.multinomial(size_weights, num_subsets, replacement=True, generator=generator)
    chunk_rows = max(1, _CHUNK_CELLS // n)
    for start in range(0, num_subsets, chunk_rows):
        rows = slice(start, start + chunk_rows)
        masks[rows] = _uniform_sets(sizes[rows], n, generator)
    return masks


def _count_tasks(masks: Tensor) -> Tensor:
    """Row sums of (m, n) bool on the CPU; NumPy's count is a hundred times torch's in speed."""
    return torch.from_numpy(np.count_nonzero(masks.numpy(), axis=1))


# Note [Drawing uniform sets of given sizes]
# Sorting random keys costs 80 s for 10^5 subsets of 10^4 tasks (2 cores, AVX2), this way 12 s.
# Coins of any bias, tossed for all tasks, give a set that is uniform among those of its size,
# whatever size comes out; the tasks still missing are then added one by one, uniformly among those
# absent. The bias is aimed three standard deviations below the wanted size, so that a set rarely
# comes out too large; where one does it is tossed anew, which looks at its size only and so keeps
# the law. Sets of more than half the tasks are drawn as the complements of small ones, so that an
# addition finds an absent task at least every other time.


def _uniform_sets(sizes: Tensor, num_tasks: int, generator: torch.Generator) -> Tensor:
    """A uniform set of each of the sizes (m,) int64; (m, n) bool. Note [Drawing uniform sets …]."""
    small = torch.minimum(sizes, num_tasks - sizes)  # (m,)
    aim = (small - 3 * small.sqrt()) * (256 / num_tasks)
    threshold = aim.clamp(min=0).to(torch.uint8)  # a byte below it is a coin that says "in"
    masks = _coins(threshold, num_tasks, generator)
    missing = small - _count_tasks(masks)
    while (too_large := (missing < 0).nonzero()[:, 0]).numel():
        masks[too_large] = _coins(threshold[too_large], num_tasks, generator)
        missing[too_large] = small[too_large] - _count_tasks(masks[too_large])
    _add_tasks(masks, missing, generator)
    return masks.logical_xor_((sizes > small)[:, None])


def _coins(threshold: Tensor, num_tasks: int, generator: torch.Generator) -> Tensor:
    """Toss one coin per cell, "in" with chance ``threshold / 256``; (m,) uint8 -> (m, n) bool."""
    words = torch.empty(len(threshold), -(-num_tasks // 8), dtype=torch.int64)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.uint8)[:, :num_tasks] < threshold[:, None]


def _add_tasks(masks: Tensor, missing: Tensor, generator: torch.Generator) -> None:
    """Add ``missing`` (m,) absent tasks to each row of ``masks`` (m, n), uniformly, in place."""
    cells = masks.view(-1).numpy()  # hundreds of short gathers: NumPy has no threads to wake
    num_tasks = masks.shape[1]
    left = missing.numpy()
    starts = np.arange(len(left)) * num_tasks  # the first cell of each row
    while len(left):
        unfinished = left > 0
        if not unfinished.all():
            left, starts = left[unfinished], starts[unfinished]
        columns = torch.randint(num_tasks, (len(left),), generator=generator).numpy()
        chosen = starts + columns
        left = left - ~cells[chosen]
        cells[chosen] = True


def _binary_rows(start: int, stop: int, num_tasks: int) -> Tensor:
    """The binary digits of start to stop - 1, lowest first; (stop - start, n) bool."""
    numbers = torch.arange(start, stop)
    masks = torch.empty(stop - start, num_tasks, dtype=torch.bool)
    for task in range(num_tasks):  # by columns: the (2^n, n) int64 matrix of shifts would be 8x
        masks[:, task] = numbers.bitwise_right_shift(task).bitwise_and(1).bool()
    return masks


def distinct_rows(table: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct rows of a table in the order of their first appearance.

    Args:
        table: (m, k) of any dtype, without NaN.

    Returns:
        The number of each row, (m,) int64, and the first row of each number, (numbers,) int64.
    """
    if 0 in table.shape:  # all rows are the same
        numbers = torch.zeros(len(table), dtype=torch.int64, device=table.device)
        return numbers, numbers[:1]
    rows = table.cpu().numpy()
    rows = np.packbits(rows, axis=1) if rows.dtype == bool else rows + 0  # -0.0 is 0.0
    # One opaque item per row compares by memcmp; np.unique(axis=0) goes field by field.
    row = np.dtype((np.void, rows.shape[1] * rows.itemsize))
    _, first, inverse = np.unique(
        np.ascontiguousarray(rows).view(row)[:, 0], return_index=True, return_inverse=True
    )
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    answers = torch.from_numpy(rank[inverse]), torch.from_numpy(first[order])
    return answers[0].to(table.device), answers[1].to(table.device)
