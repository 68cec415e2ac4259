r"""To other libraries, and from shapiq: what a surrogate says as their tables, values and games.

``to_pandas``, ``to_polars`` and ``to_xarray`` hold attributions, or interactions, with intervals.

A game's players are the tasks, its coalitions the subsets and its value the score F(S), so that
what shapiq knows as games can be fitted, and what a surrogate says can be stored and plotted as
shapiq's own results are. Main effects :math:`\tau_i`, interactions :math:`I_{ij}` and mean scores
are in closed form for the fitted function, see :mod:`ksm_ext.surrogates.readouts`. The last column
is what shapiq's ``ExactComputer`` gives the empty coalition; its approximators differ there:

===========  ================================================  =====================================
index        values                                            of the empty coalition
===========  ================================================  =====================================
``"SV"``     Shapley values                                    :math:`F(\emptyset)`
``"SII"``    Shapley values, Shapley interactions of pairs     mean of F over subsets of all sizes
             (Grabisch & Roubens 1999)                         alike
``"k-SII"``  :math:`\tau_i - \frac12 \sum_j I_{ij}` and the    :math:`F(\emptyset)`
             same interactions (Bordt & von Luxburg 2023)
``"STII"``   the same of Shapley-Taylor interactions           :math:`F(\emptyset)`
             (Sundararajan et al. 2020)
``"FSII"``   the same of faithful Shapley interactions         :math:`F(\emptyset)`
             (Tsai et al. 2023)
``"BV"``     Banzhaf values                                    mean of F over all subsets
``"BII"``    Banzhaf values, Banzhaf interactions of pairs     mean of F over all subsets
``"FBII"``   as ``"k-SII"``, of Banzhaf: the function of       its constant
             pairs nearest to F over all subsets
===========  ================================================  =====================================

Values of ``"SV"``, ``"k-SII"``, ``"STII"`` and ``"FSII"`` sum to :math:`F(\text{all})`. Libraries
are imported where their classes are made, and only there.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from ksm_ext.arrays import ArrayKind, ArrayLike, aligned, as_tensor, names_along, position
from ksm_ext.checks import (
    check_choice,
    check_level,
    check_positive_int,
    check_several,
    checked,
    message,
    shape_text,
)
from ksm_ext.drawing import largest
from ksm_ext.subsets import as_masks
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.options import PairReadout, Readout
from ksm_ext.surrogates.surrogate import Surrogate, check_surrogate

if TYPE_CHECKING:
    from pandas import DataFrame as PandasFrame
    from polars import DataFrame as PolarsFrame
    from shapiq import Game, InteractionValues
    from xarray import Dataset
else:
    PandasFrame = PolarsFrame = Game = InteractionValues = Dataset = Any

Sort = Literal["size", "value", "none"]

_INDICES: dict[str, tuple[Readout, PairReadout | None]] = {
    **{"SV": ("shapley", None), "BV": ("banzhaf", None)},
    **{"SII": ("shapley", "shapley"), "BII": ("banzhaf", "banzhaf")},
    **{"k-SII": ("shapley", "shapley"), "FBII": ("banzhaf", "banzhaf")},
    **{"STII": ("shapley", "taylor"), "FSII": ("shapley", "faithful")},
}
_WITHOUT_PAIRS = ("k-SII", "STII", "FSII", "FBII")
"""Where a task has its value less half of those of its pairs."""


def scores_of_game(game: Any, masks: ArrayLike) -> Any:
    """Values of a cooperative game, as scores for :func:`ksm_ext.fit_surrogate`.

    Args:
        game: A ``shapiq.Game``, or anything that is called with coalitions (m, n) bool, a NumPy
            array, or has a method ``value_function`` that is; it answers (m,) or (m, t) numbers.
            A normalised game answers relative to its empty coalition, which no attribution sees.
        masks: (m, n) bool. The subsets.

    Returns:
        (m,) or (m, t), of the kind of ``masks``.

    Raises:
        TypeError: If ``game`` cannot be called, or answers no numbers.
        ValueError: If it has other than n players, or answers other than m values.
    """
    (masks,) = aligned({"masks": (masks, "subset", "task")})
    table = as_masks("masks", masks)
    value = game if callable(game) else getattr(game, "value_function", None)
    if value is None:
        remedy = "Pass a shapiq.Game, or a function of coalitions."
        raise TypeError(message("game", "callable", type(game).__name__, remedy))
    num_players = getattr(game, "n_players", table.shape[1])
    if num_players != table.shape[1]:
        found = f"one of {num_players} for {table.shape[1]} columns of `masks`"
        raise ValueError(message("game", "of one player per task", found, "Give both the same."))
    scores = as_tensor("game", value(table.cpu().numpy()))
    if scores.ndim not in (1, 2) or len(scores) != len(table):
        expected = f"a function to ({len(table)},) or ({len(table)}, t) values"
        remedy = "Return one value, or one row, per coalition."
        raise ValueError(message("game", expected, shape_text(scores), remedy))
    axes = {"subset": names_along(masks, 0)} | ({"target": None} if scores.ndim == 2 else {})
    return ArrayKind.of(masks).restore(scores, axes)


def to_interaction_values(
    surrogate: Surrogate, index: str = "SII", order: int | None = None, target: int | str = 0
) -> "InteractionValues":
    """Attributions and interactions as shapiq stores and plots them.

    They are exact for the fitted function and estimates of the scores it was fitted to: shapiq's
    ``estimated`` is True and its ``estimation_budget`` m. Its plots take
    ``list(surrogate.task_names)`` as ``feature_names``.

    Args:
        surrogate: Fitted to 0/1 masks.
        index: One of those in the module's head.
        order: 1 for tasks alone, 2 for pairs too; by default as many as the index has.
        target: Number or name.

    Returns:
        ``shapiq.InteractionValues`` of the empty coalition, all tasks (and pairs).

    Raises:
        ImportError: If shapiq is not installed.
        ValueError: If ``index``, ``order`` or ``target`` is none of these, or the masks are real
            weights.
    """
    check_surrogate(surrogate)
    check_choice("index", index, tuple(_INDICES), "Others have no closed form here.")
    readout, of_pairs = _INDICES[index]
    orders = (1,) if of_pairs is None else (2, 1)
    order = orders[0] if order is None else order
    check_choice("order", order, orders, f"{index} of more tasks has no closed form here.")
    column = position("target", target, surrogate.target_names)
    answering, n = surrogate.with_tensor_answers(), surrogate.masks.num_tasks
    effects = answering.attribute(readout)[:, column]
    empty = baseline = float(_scores(answering, torch.zeros(1, n), column))
    values: dict[tuple[int, ...], float] = {}
    faithful = index == "FBII"  # with the constant of its fit, at order 1 too
    if order == 1 or of_pairs is None:
        index = "SV" if readout == "shapley" else "BV"
    if index == "SII" or readout == "banzhaf":
        empty = float(answering.mean_score(readout)[column])
    empty -= faithful * float(effects.sum()) / 2
    if of_pairs is not None and order == 2:
        pairs = answering.interactions(of_pairs)[..., column]
        values = {pair: float(pairs[pair]) for pair in combinations(range(n), 2)}
        empty += faithful * float(pairs.sum()) / 8
        if index in _WITHOUT_PAIRS:
            effects = effects - pairs.sum(1) / 2
    baseline = empty if faithful else baseline
    values = {(): empty, **{(i,): float(effect) for i, effect in enumerate(effects)}, **values}
    from shapiq import InteractionValues

    return InteractionValues(
        values,
        index=index,
        max_order=order,
        min_order=0,
        n_players=n,
        estimated=True,
        estimation_budget=len(surrogate.masks),
        baseline_value=baseline,
    )


@checked
def to_game(surrogate: Surrogate, target: int | str = 0, *, normalize: bool = False) -> "Game":
    """A surrogate as cooperative game, which shapiq's approximators and explainers ask.

    Its values are those that attributions are of: ``predict(masks, observed=True)``.

    Args:
        surrogate: Fitted to 0/1 masks.
        target: Number or name.
        normalize: Whether values are relative to that of the empty coalition.

    Returns:
        A ``shapiq.Game`` whose players are called ``surrogate.task_names``.

    Raises:
        ImportError: If shapiq is not installed.
        ValueError: If ``target`` is none of the surrogate, or the masks are real weights.
    """
    check_surrogate(surrogate)
    if not surrogate.masks.binary:
        remedy = "Players are in a coalition or not: fit subsets, not shares."
        raise ValueError(message("surrogate", "of 0/1 masks", "one of real weights", remedy))
    column = position("target", target, surrogate.target_names)
    answering, n = surrogate.with_tensor_answers(), surrogate.masks.num_tasks
    from shapiq import Game

    class SurrogateGame(Game):
        """The values of a surrogate's subsets."""

        def value_function(self, coalitions: np.ndarray) -> np.ndarray:
            """(m,) of coalitions (m, n), or of one (n,)."""
            return _scores(answering, torch.as_tensor(np.atleast_2d(coalitions)), column).numpy()

    empty = float(_scores(answering, torch.zeros(1, n), column))
    return SurrogateGame(
        n_players=n,
        normalize=normalize,
        normalization_value=empty if normalize else None,
        player_names=list(surrogate.task_names),
    )


def _scores(surrogate: Surrogate, masks: Tensor, column: int) -> Tensor:
    """(l,) scores of subsets (l, n) that attributions are of, to one target."""
    found: Tensor = surrogate.predict(masks.bool(), observed=True)
    return found[:, column]


# -- tables -------------------------------------------------------------------------------------


def answers_with_std(
    surrogate: Surrogate, readout: PairReadout, interactions: bool = False, intervals: bool = True
) -> tuple[Tensor, Tensor]:
    """Attributions (n, t), or interactions (n, n, t), and standard deviations.

    Args:
        surrogate: It answers in tensors.
        readout: What is asked.
        interactions: Pairs of tasks instead of single ones.
        intervals: Whether deviations are wanted; else, and where there are none, they are NaN.
    """
    ask: Any = surrogate.interactions if interactions else surrogate.attribute
    if intervals and surrogate.has_intervals:
        values, std = ask(readout, return_std=True)
        return values, std
    values = ask(readout)
    return values, torch.full_like(values, torch.nan)


@checked
def attribution_table(
    surrogate: Surrogate,
    readout: PairReadout = "loo",
    *,
    interactions: bool = False,
    targets: Sequence[int | str] | None = None,
    sort: Sort = "none",
    top: int | None = None,
    intervals: bool = True,
    level: float = 0.95,
) -> dict[str, list[Any]]:
    """Attributions, or interactions of pairs, a row for each task and target.

    Args:
        surrogate: The surrogate.
        readout: What is asked: see :meth:`Surrogate.attribute` and :meth:`Surrogate.interactions`.
        interactions: Pairs of tasks instead of single ones.
        targets: Numbers or names; by default all.
        sort: Of each target, the largest magnitude first, the largest value, or as tasks are.
        top: The first so many of each target; by default all.
        intervals: Whether to compute them; else, and where there are none, they are NaN.
        level: Coverage of the intervals, strictly between 0 and 1.

    Returns:
        Columns ``task``, of pairs ``other_task``, then ``target``, ``value``, ``std``, ``low`` and
        ``high``, the ends of the interval, in the units of the scores.

    Raises:
        ValueError: If an argument is none of these.
    """
    check_surrogate(surrogate)
    check_choice("sort", sort, ("size", "value", "none"))
    answering, names = surrogate.with_tensor_answers(), surrogate.task_names
    asked = range(len(surrogate.target_names)) if targets is None else targets
    asked = check_several("targets", asked, "names or numbers of targets")
    columns = [position("targets", target, surrogate.target_names) for target in asked]
    values, std = answers_with_std(answering, readout, interactions, intervals)
    tasks = {"task": torch.arange(len(values))}
    if interactions:
        first, second = torch.triu_indices(len(names), len(names), 1)
        values, std = values[first, second], std[first, second]
        tasks = {"task": first, "other_task": second}
    top = None if top is None else check_positive_int("top", top)
    orders = [_order(values[:, j], sort)[:top] for j in columns]
    table: dict[str, list[Any]] = {
        name: [names[i] for order in orders for i in numbers[order].tolist()]
        for name, numbers in tasks.items()
    }
    table["target"] = [
        surrogate.target_names[j] for j, order in zip(columns, orders, strict=True) for _ in order
    ]
    half = quantile(check_level("level", level)) * std
    for name, each in (("value", values), ("std", std), ("low", values - half)):
        table[name] = _cells(each, orders, columns)
    return table | {"high": _cells(values + half, orders, columns)}


def to_pandas(
    surrogate: Surrogate,
    readout: PairReadout = "loo",
    *,
    interactions: bool = False,
    level: float = 0.95,
) -> "PandasFrame":
    """:func:`attribution_table` as a pandas ``DataFrame``.

    Args:
        surrogate: The surrogate.
        readout: What is asked.
        interactions: Pairs of tasks instead of single ones.
        level: Coverage of the intervals.
    """
    import pandas

    table = attribution_table(surrogate, readout, interactions=interactions, level=level)
    return pandas.DataFrame(table)


def to_polars(
    surrogate: Surrogate,
    readout: PairReadout = "loo",
    *,
    interactions: bool = False,
    level: float = 0.95,
) -> "PolarsFrame":
    """:func:`attribution_table` as a polars ``DataFrame``.

    Args:
        surrogate: The surrogate.
        readout: What is asked.
        interactions: Pairs of tasks instead of single ones.
        level: Coverage of the intervals.
    """
    import polars

    table = attribution_table(surrogate, readout, interactions=interactions, level=level)
    return polars.DataFrame(table)


@checked
def to_xarray(
    surrogate: Surrogate,
    readout: PairReadout = "loo",
    *,
    interactions: bool = False,
    level: float = 0.95,
) -> "Dataset":
    """Attributions, or interactions of pairs, with named dimensions.

    Args:
        surrogate: The surrogate.
        readout: What is asked.
        interactions: Pairs of tasks instead of single ones.
        level: Coverage of the intervals.

    Returns:
        An xarray ``Dataset`` of ``value``, ``std``, ``low`` and ``high`` (NaN where there are no
        intervals), by ``task``, of pairs ``other_task``, and ``target``.
    """
    check_surrogate(surrogate)
    import xarray

    values, std = answers_with_std(surrogate.with_tensor_answers(), readout, interactions, True)
    half, names = quantile(check_level("level", level)) * std, surrogate.task_names
    axes = {"task": names, "other_task": names} if interactions else {"task": names}
    kind = ArrayKind("xarray", torch.device("cpu"))
    tables = {"value": values, "std": std, "low": values - half, "high": values + half}
    axes = {**axes, "target": surrogate.target_names}
    found = {name: kind.restore(table, axes) for name, table in tables.items()}
    return xarray.Dataset(found, attrs={"readout": readout, "level": level})


def _order(values: Tensor, sort: Sort) -> Tensor:
    if sort == "none":
        return torch.arange(len(values))
    return largest(values) if sort == "size" else values.argsort(descending=True, stable=True)


def _cells(values: Tensor, orders: Sequence[Tensor], columns: Sequence[int]) -> list[float]:
    """Some rows of each of these columns, one after the other."""
    return [
        cell for order, j in zip(orders, columns, strict=True) for cell in values[order, j].tolist()
    ]
