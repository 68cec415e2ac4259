r"""To and from shapiq: cooperative games as score tables, attributions as interaction values.

A game's players are the tasks, its coalitions the subsets and its value the score F(S), so that
what shapiq knows as games can be fitted, and what a surrogate says can be stored and plotted as
shapiq's own results are. Main effects :math:`\tau_i` and interactions :math:`I_{ij}` are in closed
form for the fitted function, see :mod:`ksm_ext.surrogates.readouts`:

===========  =====================================================================================
index        values
===========  =====================================================================================
``"SV"``     Shapley values
``"SII"``    Shapley values, and Shapley interactions of pairs (Grabisch & Roubens 1999)
``"k-SII"``  :math:`\tau_i - \frac12 \sum_j I_{ij}` and the same interactions, which sum to
             :math:`F(\text{all}) - F(\emptyset)` (Bordt & von Luxburg 2023)
``"BV"``     Banzhaf values
``"BII"``    Banzhaf values, and Banzhaf interactions of pairs
===========  =====================================================================================

shapiq is imported where its classes are made, and only there.
"""

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from ksm_ext.arrays import ArrayKind, ArrayLike, aligned, as_tensor, names_along, position
from ksm_ext.checks import check_choice, message, shape_text
from ksm_ext.subsets import as_masks
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.surrogate import Surrogate

if TYPE_CHECKING:
    from shapiq import InteractionValues
else:
    InteractionValues = Any

_READOUTS: dict[str, Readout] = {
    **{"SV": "shapley", "SII": "shapley", "k-SII": "shapley"},
    **{"BV": "banzhaf", "BII": "banzhaf"},
}
_EFFECTS = {"shapley": "SV", "banzhaf": "BV"}


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
    ``estimated`` is True and its ``estimation_budget`` m. Its plots take ``surrogate.task_names``
    as ``feature_names``.

    Args:
        surrogate: Fitted to 0/1 masks.
        index: One of those in the module's head.
        order: 1 for tasks alone, 2 for pairs too; by default as many as the index has.
        target: Number or name.

    Returns:
        ``shapiq.InteractionValues`` of all tasks (and pairs), with the prediction for the empty
        subset as baseline.

    Raises:
        ImportError: If shapiq is not installed.
        ValueError: If ``index``, ``order`` or ``target`` is none of these, or the masks are real
            weights.
    """
    check_choice("index", index, tuple(_READOUTS), "Others have no closed form here.")
    orders = (1,) if index in _EFFECTS.values() else (2, 1)
    order = orders[0] if order is None else order
    check_choice("order", order, orders, f"{index} of more tasks has no closed form here.")
    column = position("target", target, surrogate.target_names)
    n, readout = surrogate.masks.num_tasks, _READOUTS[index]

    def of_target(answer: Any, *leading: int) -> np.ndarray:
        return as_tensor("answer", answer).cpu().double().reshape(*leading, -1)[..., column].numpy()

    empty = of_target(surrogate.predict(np.zeros((1, n), bool), observed=True), 1)
    effects = of_target(surrogate.attribute(readout), n)
    values: dict[tuple[int, ...], float] = {(task,): float(effects[task]) for task in range(n)}
    if order == 1:
        index = _EFFECTS[readout]
    else:
        pairs = of_target(surrogate.interactions(readout), n, n)
        values |= {pair: float(pairs[pair]) for pair in combinations(range(n), 2)}
    from shapiq import InteractionValues

    return InteractionValues(
        values,
        index=index.removeprefix("k-"),
        target_index=index,  # k-SII is summed up from SII by shapiq
        max_order=order,
        min_order=0 if index in ("SV", "k-SII") else 1,  # with the baseline, these sum to F(all)
        n_players=n,
        estimated=True,
        estimation_budget=len(surrogate.masks),
        baseline_value=float(empty[0]),
    )
