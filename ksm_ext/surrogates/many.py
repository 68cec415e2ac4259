"""``fit_many``: a surrogate of each of many small tables, found together.

What takes long in a small fit is no arithmetic but the steps between: a thousand small operations.
Tables of one shape take each step together (:mod:`.search` knows b tables throughout, of which
:func:`.fit.fit_surrogate` has one), some hundred tables at a time. A table is left to
``fit_surrogate`` where a step of its own would be different: repeated subsets, missing scores,
tasks or targets that are constant, weights, many subsets.

Shapes: b tables, m subsets, n tasks, t targets.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, as_tensor
from ksm_ext.checks import message, shape_text
from ksm_ext.subsets import distinct_rows
from ksm_ext.surrogates.fit import assembled, fit_surrogate, names_for, search_for
from ksm_ext.surrogates.kernels import KernelChoice
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.observations import Observations
from ksm_ext.surrogates.options import Criterion, ShareRidge
from ksm_ext.surrogates.parts import parts_of_many
from ksm_ext.surrogates.search import Search
from ksm_ext.surrogates.surrogate import Surrogate

_AT_A_TIME = 2**22
"""Numbers of Gram matrices and residuals held at a time: 32 MB, of each thread."""

_MOST_SUBSETS = 256  # where arithmetic is what takes long, there is nothing to share
_KERNELS, _RIDGES = 20, 17  # of a usual search


def fit_many(
    masks: ArrayLike,
    scores: ArrayLike,
    *,
    kernel: KernelChoice = "auto",
    ridge: Literal["loo"] | float = "loo",
    criterion: Criterion = "error",
    share_ridge: ShareRidge = "auto",
    center: bool = True,
    solver: Literal["auto", "eigh", "cg"] | ConjugateGradients = "auto",
    task_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
) -> list[Surrogate]:
    """Fit a surrogate to each of many tables of one shape.

    The answers are those of :func:`ksm_ext.fit_surrogate` on one table after the other, to
    rounding. Small tables are fitted together; those with repeated subsets, constant tasks
    or targets, weights, or a score of the empty subset that the others do not lead to, are fitted
    one by one, and so is what conjugate gradients solve.

    Args:
        masks: (b, m, n), the subsets of each table, or (m, n), those of all: bool or 0/1.
        scores: (b, m) or (b, m, t) float. Surrogates answer in its array kind, dtype and device.
        kernel: See :func:`ksm_ext.fit_surrogate`, as all that follow.
        ridge: The same for every table.
        criterion: The same for every table.
        share_ridge: Whether the targets of a table share one; tables share nothing.
        center: The same for every table.
        solver: The same for every table.
        task_names: n names, of every table.
        target_names: t names, of every table.

    Returns:
        b surrogates. What their standard deviations need is factored on first use.

    Raises:
        TypeError: If an argument holds no numbers.
        ValueError: If shapes disagree, or where :func:`ksm_ext.fit_surrogate` refuses a table.

    Example:
        >>> masks = [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0]]
        >>> scores = [[3.0, 1.0, 2.0, 3.0, 1.0, 2.0], [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]]
        >>> [fitted.attribute("loo").round(1).tolist() for fitted in fit_many(masks, scores)]
        [[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    """
    subsets, outcomes = _checked(as_tensor("masks", masks), as_tensor("scores", scores))
    if isinstance(kernel, Iterator):
        kernel = tuple(kernel)  # read once, for all tables
    options: dict[str, Any] = {
        "kernel": kernel,
        "ridge": ridge,
        "criterion": criterion,
        "share_ridge": share_ridge,
        "center": center,
        "solver": solver,
    }
    search = search_for(outcomes[0], **options)
    b, m, n = subsets.shape
    t = outcomes[0, 0].numel()
    names = names_for(subsets[0], outcomes[0], task_names, target_names, (n, t))
    rows = [scores[i] for i in range(b)]
    found: list[Surrogate | None] = [None] * b

    def fit_together(places: Tensor) -> None:
        tables = outcomes[places].to(torch.float64).reshape(len(places), m, t)
        if subsets.stride(0) == 0:
            known = [Masks(subsets[0].to(outcomes.device))] * len(places)
        else:
            known = [Masks(each) for each in subsets[places].to(outcomes.device)]
        once = torch.ones(m, t, dtype=torch.int64, device=outcomes.device)
        for at, parts in parts_of_many(known, tables, search):
            observed = Observations(known[at], tables[at], once, None, once == 0, 0)
            i = int(places[at])
            found[i] = assembled(parts, observed, search, names, like=rows[i])

    step = max(1, _AT_A_TIME // (_KERNELS * m * (m + _RIDGES * t)))
    alike = _alike(subsets, outcomes, search).nonzero()[:, 0]
    chunks = alike.split(step) if len(alike) else ()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fit_together, chunks))  # raises what a thread raised
    options |= {"task_names": task_names, "target_names": target_names}
    return [
        fit_surrogate(subsets[i], rows[i], **options) if each is None else each
        for i, each in enumerate(found)
    ]


def _checked(subsets: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (b, m, n), bool where they are 0/1, and scores (b, m) or (b, m, t)."""
    remedy = "Give one table after the other, all of one shape."
    if outcomes.ndim not in (2, 3) or 0 in outcomes.shape:
        expected, found = "of shape (b, m) or (b, m, t)", shape_text(outcomes)
        raise ValueError(message("scores", expected, found, remedy))
    b, m = outcomes.shape[:2]
    if subsets.ndim == 2 and len(subsets) == m:
        subsets = subsets.expand(b, -1, -1)
    if subsets.ndim != 3 or subsets.shape[:2] != (b, m) or subsets.shape[2] == 0:
        expected = f"of shape ({b}, {m}, n), or ({m}, n) for all tables, like `scores`"
        raise ValueError(message("masks", expected, shape_text(subsets), remedy))
    table = subsets[0] if subsets.stride(0) == 0 else subsets
    if bool(((table == 0) | (table == 1)).all()):
        table = table.to(torch.bool, copy=True)  # the caller may reuse it
    return table.expand(b, -1, -1), outcomes


def _alike(subsets: Tensor, outcomes: Tensor, search: Search) -> Tensor:
    """(b,) bool: tables that take the same steps, so that they can take them together."""
    b, m, _ = subsets.shape
    nowhere = torch.zeros(b, dtype=torch.bool, device=outcomes.device)
    if subsets.dtype != torch.bool or search.solver is not None or not 3 <= m <= _MOST_SUBSETS:
        return nowhere
    scores = outcomes.reshape(b, m, -1)
    alike = scores.isfinite().all(1).all(1) & (scores.amax(1) > scores.amin(1)).all(1)
    tables = subsets[:1] if subsets.stride(0) == 0 else subsets
    tasks = tables.any(1) & ~tables.all(1)
    number = torch.arange(len(tables), device=tables.device).repeat_interleave(m)[:, None]
    bits = number.bitwise_right_shift(torch.arange(32, device=tables.device)).bitwise_and(1) > 0
    first = distinct_rows(torch.cat([bits, tables.flatten(0, 1)], 1))[1]
    distinct = (first // m).bincount(minlength=len(tables)) == m
    return alike & (tasks.all(1) & distinct).to(alike.device)
