r"""Choose tasks: by attribution, by greedy steps on a predicted score, or exactly; or their shares.

With :math:`\hat F(S)` the predicted score of a subset, averaged over targets by their weights,
every function but :func:`top_k` and :func:`best_mixture` looks for

.. math:: \operatorname*{arg\,max}_S \hat F(S) \quad \text{or} \quad
    \operatorname*{arg\,min}_S \hat F(S), \qquad |S| = \text{size or } \sum_{i \in S} c_i \le
    \text{budget.}

They refuse a surrogate of real weights: rows of 0 and 1 are no mixtures like those it saw.
:func:`best_mixture` looks for the best shares of the tasks instead. Costs and
weights of targets that have labels go by the names of the surrogate, or of what is predicted.

``maximize`` has no default, since a score may be an accuracy or a loss. Ties go to the task with
the lowest number, so that every result can be repeated.

Shapes: masks (l, n) bool, predicted scores (l,) or (l, t), attributions (n, t), costs and shares
(n,).

References: greedy under a budget, *Khuller, Moss & Naor 1999, Inf. Process. Lett. 70(1)*; greedy on
submodular functions, *Nemhauser, Wolsey & Fisher 1978*; forward selection of tasks on estimated
scores, *Li et al. 2024 (GradEx)*.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayKind, ArrayLike, aligned, as_tensor, names_along, position
from ksm_ext.checks import (
    brief,
    check_callable,
    check_finite,
    check_ndim,
    check_positive_int,
    check_real,
    check_several,
    checked,
    listed,
    message,
    shape_text,
)
from ksm_ext.subsets import common_sum, dirichlet, from_index_lists, iterate_subsets
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.simplex import maximise, onto_simplex
from ksm_ext.surrogates.surrogate import Surrogate, check_surrogate

_MAX_CANDIDATES = 2**22
_DRAWS = 10_000  # of all attributions together
_RANDOM_MIXTURES = 4096  # that a search for mixtures looks at
_STARTS = 6  # of the best of these, and of the fitted ones, that it starts from
_CHUNK_CELLS = 2**24  # of the mask matrix handed to one call of the predictor


@runtime_checkable
class Predictor(Protocol):
    """Anything fitted that predicts scores of subsets: a surrogate, or a gradient estimator.

    One that has ``task_names`` and ``target_names`` says what costs and weights go by.
    """

    def predict(self, masks: Tensor, /) -> Any:
        """Scores (l,) or (l, t) of masks (l, n) bool."""
        ...


Predict = Callable[[Tensor], Any] | Predictor
"""A function of masks (l, n) bool to scores (l,) or (l, t), or an object whose ``predict`` is."""


@dataclass(frozen=True)
class Selection:
    """The tasks chosen, and what is predicted of them.

    Attributes:
        tasks: Task numbers, in the order of choice where there was one, else ascending.
        score: Predicted score of exactly these tasks, in its own units and sign.
        path: Predicted score after each step.
        removed: Tasks in the order of removal, for :func:`greedy_backward`.
        names: What ``tasks`` are called, as far as the predictor says.
    """

    tasks: tuple[int, ...]
    score: float
    path: tuple[float, ...] = ()
    removed: tuple[int, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mixture:
    """The shares chosen, and what is predicted of them.

    Attributes:
        shares: (n,) float, of the kind of the fitted scores, with the names of the tasks.
        score: Predicted score, averaged over targets by their weights.
        std: Its posterior standard deviation, as if all targets erred together.
        nearest: Number of the fitted row (of ``surrogate.masks``) that is nearest.
        distance: Half the sum of absolute differences from that row: what share differs.
    """

    shares: Any
    score: float
    std: float
    nearest: int
    distance: float

    __repr__ = brief


@checked
def top_k(
    attributions: ArrayLike, k: int, *, maximize: bool, target_weights: ArrayLike | None = None
) -> Any:
    """The k tasks of the best attribution, best first.

    Right where effects add up. Where tasks are redundant or need each other, use
    :func:`greedy_forward`.

    Args:
        attributions: (n,) or (n, t) float. How much including a task raises the score.
        k: Number of tasks, at most n.
        maximize: Whether a higher score is better; False for a loss.
        target_weights: (t,) float, non-negative; ``None`` weighs all targets alike.

    Returns:
        (k,) int64 task numbers, of the kind of ``attributions``, with their names.

    Raises:
        ValueError: If ``k`` exceeds n, shapes differ or values are not finite.

    Example:
        >>> top_k([0.1, -0.3, 0.2], 2, maximize=True)
        array([2, 0])
    """
    (attributions,) = aligned({"attributions": (attributions, "task", "target")})
    values = _average_targets("attributions", attributions, "task", target_weights)  # (n,)
    k = check_positive_int("k", k, minimum=0)
    if k > len(values):
        remedy = "There are no more tasks."
        raise ValueError(message("k", f"at most {len(values)}", str(k), remedy))
    order = values.sort(descending=maximize, stable=True).indices
    names = names_along(attributions, 0)
    called = None if names is None else [names[task] for task in order[:k].tolist()]
    return ArrayKind.of(attributions).restore(order[:k], {"task": called})


@dataclass(frozen=True)
class Settled:
    """What :func:`settled` found.

    Attributes:
        tasks: Numbers of the k tasks of the best attribution, best first.
        probability: That these, in any order, are the k best.
        chances: Of every task, the probability to be among the k best.
        level: The probability asked for.
        names: What ``tasks`` are called.
    """

    tasks: tuple[int, ...]
    probability: float
    chances: tuple[float, ...]
    level: float
    names: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        """Whether the probability reaches the level."""
        return self.probability >= self.level


@checked
def settled(
    surrogate: Surrogate,
    k: int,
    readout: Readout = "loo",
    *,
    maximize: bool,
    target: str | int | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> Settled:
    """Whether it is settled which k tasks are the best, or the worst.

    The probability that the tasks of :func:`top_k` are the right ones, from 10,000 draws of all
    attributions together (:meth:`.Surrogate.attribution_covariance`), which know it to a percent.
    It is as good as the intervals are: kernel and ridge are taken as fitted.

    Args:
        surrogate: A surrogate of 0/1 masks.
        k: Number of tasks, below n.
        readout: ``"loo"``, ``"shapley"`` or ``"banzhaf"``.
        maximize: Whether a higher attribution is better. The tasks that hurt most have the highest
            attributions to a loss, the lowest to an accuracy.
        target: Name or number of the target; needed where there are several.
        level: The probability from which it counts as settled.
        seed: Seed of the draws.

    Returns:
        The tasks with their probability; true, as a condition, where it reaches ``level``.

    Raises:
        ValueError: If ``k`` or ``level`` is out of range, ``readout`` or ``target`` unknown, or the
            surrogate is one of real weights or has no intervals.

    Example:
        >>> masks = [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0], [0, 0, 1]]
        >>> scores = [3.0, 1.0, 2.0, 3.0, 1.0, 2.0, 0.0]
        >>> fitted = ksm_ext.fit_surrogate(masks, scores, kernel="linear")
        >>> settled(fitted, 1, maximize=True).tasks
        (1,)
    """
    check_surrogate(surrogate)
    if not surrogate.masks.binary:
        remedy = "Compare mixtures by predict(return_std=True), or see best_mixture."
        raise ValueError(message("surrogate", "of 0/1 masks", "one of real weights", remedy))
    surrogate = surrogate.with_tensor_answers()
    names = surrogate.target_names
    if target is None and len(names) > 1:
        remedy = "Ask of each target by itself."
        raise ValueError(message("target", f"one of {listed(names)}", "none", remedy))
    column = 0 if target is None else position("target", target, names)
    k, n = check_positive_int("k", k), len(surrogate.task_names)
    if k >= n:
        remedy = "There is nothing to settle for all tasks."
        raise ValueError(message("k", f"below the number of tasks, {n}", str(k), remedy))
    level = check_real("level", level)
    if not 0 < level < 1:
        raise ValueError(message("level", "between 0 and 1", str(level), "0.95 is usual."))
    generator = torch.Generator().manual_seed(check_positive_int("seed", seed, minimum=0))
    values = surrogate.attribute(readout)[:, column] / surrogate.unit[column]
    covariance = surrogate.attribution_covariance(readout, relative=True)[:, :, column]
    variance, axes = torch.linalg.eigh(covariance)
    normal = torch.randn(_DRAWS, n, generator=generator, dtype=torch.float64)
    draws = values + normal @ (axes * variance.clamp_min(0).sqrt()).T
    best = top_k(values, k, maximize=maximize)
    chosen = draws.sort(dim=1, descending=maximize, stable=True).indices[:, :k]
    among = torch.zeros(_DRAWS, n, dtype=torch.bool).scatter_(1, chosen, True)
    right = float(among[:, best].all(1).double().mean())
    chances = tuple(among.double().mean(0).tolist())
    called = tuple(surrogate.task_names[task] for task in best.tolist())
    return Settled(tuple(best.tolist()), right, chances, level, called)


@checked
def greedy_forward(
    predict: Predict,
    num_tasks: int,
    size: int,
    *,
    maximize: bool,
    start: Iterable[int] = (),
    candidates: Iterable[int] | None = None,
    target_weights: ArrayLike | None = None,
) -> Selection:
    """Add the task that improves the predicted score most, until there are ``size``.

    Optimal where effects add up; within ``1 - 1/e`` of the optimum where the predicted score is
    monotone, submodular and zero at ``start`` (Nemhauser et al. 1978). Surrogates promise neither:
    two tasks that help only together are found by :func:`exact` or :func:`greedy_backward`. Costs
    about ``n * size`` predictions.

    Args:
        predict: Scores of masks, see :data:`Predict`.
        num_tasks: n.
        size: Number of tasks in the end, those of ``start`` included. Steps are taken even where
            they make the score worse.
        maximize: Whether a higher score is better; False for a loss.
        start: Tasks to begin with.
        candidates: Tasks that may be added; ``None`` is all.
        target_weights: (t,) float, non-negative; ``None`` weighs all targets alike.

    Returns:
        Tasks in the order of choice, ``start`` first; ``path`` has one score per task added.

    Raises:
        ValueError: If ``size`` cannot be reached, predictions have the wrong shape or are not
            finite, or the surrogate is one of real weights.
    """
    objective = _Objective(predict, maximize, target_weights)
    tasks = _task_list("start", start, num_tasks)
    given = range(num_tasks) if candidates is None else candidates
    left = sorted(set(_task_list("candidates", given, num_tasks)) - set(tasks))
    size = _check_reachable(size, len(tasks), len(tasks) + len(left))
    added, path, score = _greedy_steps(objective, tasks, left, size - len(tasks), num_tasks)
    return objective.selected([*tasks, *added], score, path)


@checked
def greedy_backward(
    predict: Predict,
    num_tasks: int,
    size: int,
    *,
    maximize: bool,
    start: Iterable[int] | None = None,
    keep: Iterable[int] = (),
    target_weights: ArrayLike | None = None,
) -> Selection:
    """Remove the task whose absence improves the predicted score most, until ``size`` are left.

    Optimal where effects add up; otherwise without guarantee. Prefer it to
    :func:`greedy_forward` where most tasks stay, near the subsets a surrogate is usually fitted to,
    and where tasks need each other. Costs about ``n * (n - size)`` predictions.

    Args:
        predict: Scores of masks, see :data:`Predict`.
        num_tasks: n.
        size: Number of tasks in the end. Steps are taken even where they make the score worse.
        maximize: Whether a higher score is better; False for a loss.
        start: Tasks to begin with; ``None`` is all.
        keep: Tasks that stay, a part of ``start``.
        target_weights: (t,) float, non-negative; ``None`` weighs all targets alike.

    Returns:
        The remaining tasks, ascending; ``removed`` and ``path`` have one entry per step.

    Raises:
        ValueError: If ``size`` cannot be reached, predictions have the wrong shape or are not
            finite, or the surrogate is one of real weights.
    """
    objective = _Objective(predict, maximize, target_weights)
    tasks = _task_list("start", range(num_tasks) if start is None else start, num_tasks)
    kept = _task_list("keep", keep, num_tasks)
    if outside := sorted(set(kept) - set(tasks)):
        remedy = "Add these tasks to `start`."
        raise ValueError(message("keep", "a part of `start`", f"task {outside[0]}", remedy))
    size = _check_reachable(size, len(kept), len(tasks))
    left = sorted(set(tasks) - set(kept))
    removed, path, score = _greedy_steps(objective, tasks, left, len(tasks) - size, num_tasks)
    return objective.selected(sorted(set(tasks) - set(removed)), score, path, removed)


def _greedy_steps(
    objective: "_Objective", tasks: list[int], left: list[int], steps: int, num_tasks: int
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """The tasks of ``left`` that are added to ``tasks`` or removed, the scores and the last one."""
    mask = from_index_lists([tasks], num_tasks)[0]  # (n,)
    changed, path = [], []
    for _ in range(steps):
        best, score = objective.best_of(_toggled(mask, left))
        changed.append(left.pop(best))
        mask[changed[-1]] ^= True
        path.append(score)
    return tuple(changed), tuple(path), path[-1] if path else objective.of(mask)


@checked
def exact(
    predict: Predict,
    num_tasks: int,
    size: int | None = None,
    *,
    maximize: bool,
    costs: ArrayLike | None = None,
    budget: float | None = None,
    target_weights: ArrayLike | None = None,
) -> Selection:
    """The best subset of a size, or within a budget, by predicting all of them.

    Args:
        predict: Scores of masks, see :data:`Predict`.
        num_tasks: n.
        size: Number of tasks; or else give ``costs`` and ``budget``.
        maximize: Whether a higher score is better; False for a loss.
        costs: (n,) float, positive.
        budget: The most that the costs of the tasks may sum to, up to rounding. The empty set is
            within any budget.
        target_weights: (t,) float, non-negative; ``None`` weighs all targets alike.

    Returns:
        The tasks, ascending. Of equally good subsets the first in the order of
        :func:`ksm_ext.subsets.iterate_subsets`.

    Raises:
        ValueError: If more than 2^22 subsets would be enumerated, predictions have the wrong shape
            or are not finite, or the surrogate is one of real weights.

    Example:
        >>> both = lambda masks: masks.all(dim=1).double()
        >>> exact(both, 2, size=2, maximize=True)
        Selection(tasks=(0, 1), score=1.0, path=(), removed=(), names=())
    """
    num_tasks = check_positive_int("num_tasks", num_tasks)
    if (size is None) == (costs is None) or (costs is None) != (budget is None):
        names = {"size": size, "costs": costs, "budget": budget}
        found = ", ".join(name for name, value in names.items() if value is not None) or "none"
        remedy = "Give exactly one of the two limits."
        raise ValueError(message("size", "given, or else `costs` and `budget`", found, remedy))
    if size is not None:
        size = _check_reachable(size, 0, num_tasks)
    num_subsets = 2**num_tasks if size is None else math.comb(num_tasks, size)
    if num_subsets > _MAX_CANDIDATES:
        expected = f"such that at most {_MAX_CANDIDATES} subsets exist"
        remedy = "Use `greedy_forward`, `greedy_backward` or `under_budget`."
        raise ValueError(message("num_tasks", expected, str(num_subsets), remedy))
    objective = _Objective(predict, maximize, target_weights)
    chunks = iterate_subsets(num_tasks, size, chunk_rows=_chunk_rows(num_tasks))
    if costs is not None and budget is not None:
        prices = _cost_vector(costs, objective.names)
        _check_length(prices, num_tasks)
        chunks = _affordable(chunks, prices, budget)
    winners = []  # of each chunk: its mask and score
    for masks in chunks:
        row, score = objective.best_of([masks])
        winners.append((masks[row], score))
    winner = objective.first_best(torch.tensor([score for _, score in winners]).double())
    mask, score = winners[winner]
    return objective.selected(mask.nonzero()[:, 0].tolist(), score)


@checked
def under_budget(
    predict: Predict,
    costs: ArrayLike,
    budget: float,
    *,
    maximize: bool,
    target_weights: ArrayLike | None = None,
) -> Selection:
    """Spend a budget: best improvement per cost first, with the best single task as a safeguard.

    Adds, among the tasks that still fit, the one of the largest improvement per cost, as long as it
    improves the predicted score at all. The answer is the better of that set and the best single
    task that fits, which keeps one large task from being crowded out by a cheap small one. Where
    the predicted score is monotone, submodular and zero for no tasks, its improvement is at least
    ``(1 - 1/e) / 2`` of the best possible (Khuller, Moss & Naor 1999), and at least half where
    effects add up; otherwise there is no guarantee. Up to 22 tasks, :func:`exact` has no such need.

    Args:
        predict: Scores of masks, the empty one included, see :data:`Predict`.
        costs: (n,) float, positive. In the units of ``budget``, such as samples or seconds.
        budget: The most that the costs of the tasks may sum to, up to rounding.
        maximize: Whether a higher score is better; False for a loss.
        target_weights: (t,) float, non-negative; ``None`` weighs all targets alike.

    Returns:
        Tasks in the order of choice, none where no task that fits improves the score; ``path`` has
        one score per task.

    Raises:
        ValueError: If costs are not positive, the budget is negative, predictions have the wrong
            shape or are not finite, or the surrogate is one of real weights.
    """
    objective = _Objective(predict, maximize, target_weights)
    prices = _cost_vector(costs, objective.names)
    greedy = _greedy_per_cost(objective, prices, budget)
    fitting = _fitting(prices, budget)
    if not fitting:
        return greedy
    empty = torch.zeros(len(prices), dtype=torch.bool)
    row, score = objective.best_of(_toggled(empty, fitting))
    if objective.improvement(greedy.score, score) > 0:
        return objective.selected([fitting[row]], score, (score,))
    return greedy


@checked
def best_mixture(
    surrogate: Surrogate,
    *,
    maximize: bool,
    target_weights: ArrayLike | None = None,
    bounds: tuple[ArrayLike | float, ArrayLike | float] = (0.0, math.inf),
    confidence: float = 0.5,
    seed: int = 0,
) -> Mixture:
    r"""The shares of the tasks with the best predicted score.

    .. math:: \operatorname*{arg\,max}_x \; \hat F(x) - z\, \sigma(x) \quad \text{or} \quad
        \operatorname*{arg\,min}_x \; \hat F(x) + z\, \sigma(x), \qquad
        \sum_i x_i = c, \; l_i \le x_i \le u_i

    with :math:`\sigma` the posterior standard deviation and z the normal quantile of
    ``confidence``: at 0.95 the mixture that is best of what can be promised with 95 %, which keeps
    away from corners that no fitted mixture is near. c is the sum of the fitted rows. Searched by
    :mod:`ksm_ext.surrogates.simplex` from the best of the fitted and 4,096 random mixtures: a local
    optimum, no worse than any of these. Tasks that never varied keep their weight.

    Args:
        surrogate: Fitted to real weights whose rows share one sum, to 2 %.
        maximize: Whether a higher score is better; False for a loss.
        target_weights: (t,) float, non-negative; ``None`` weighs all targets alike.
        bounds: The least and the largest share, each a number or (n,).
        confidence: From 0.5 (the predicted score itself) to below 1.
        seed: Seed of the random mixtures.

    Returns:
        The mixture.

    Raises:
        TypeError: If ``surrogate`` is no surrogate.
        ValueError: If it was fitted to 0/1 masks, or to rows of different sums; if no mixture is
            within bounds, or ``confidence`` is not in [0.5, 1).

    Reference: Liu et al. 2025 (RegMix), arXiv:2407.01492, which keeps the best of 10^6 at random.
    """
    fitted = _fitted(surrogate)
    check_surrogate(fitted)
    rows = fitted.masks.values.cpu()
    total = None if fitted.masks.binary else common_sum(rows)
    if total is None:
        found = "0/1 masks" if fitted.masks.binary else "weights of different sums"
        remedy = "For tasks in or out use `greedy_forward`, `exact` or `under_budget`."
        expected = "fitted to mixtures, whose rows share one sum to 2 %"
        raise ValueError(message("surrogate", expected, found, remedy))
    confidence = check_real("confidence", confidence)
    if not 0.5 <= confidence < 1:
        remedy = "0.5 goes by the predicted score alone."
        raise ValueError(message("confidence", "from 0.5 to below 1", str(confidence), remedy))
    margin = NormalDist().inv_cdf(confidence)
    low, high = _share_bounds(bounds, fitted, total)
    answering, sign = fitted.with_tensor_answers(), 1.0 if maximize else -1.0
    known = {"target": fitted.target_names}

    def predicted(points: Tensor, return_std: bool) -> list[Tensor]:
        """(l,) predicted scores, and perhaps their standard deviations."""
        found = answering.predict(points.to(fitted.masks.values.device), return_std)
        tables = found if return_std else (found,)
        of = "subset", target_weights, known
        return [_average_targets("predict(masks)", table.cpu(), *of) for table in tables]

    def value(points: Tensor) -> Tensor:
        score, *std = predicted(points, margin > 0)
        return sign * score - margin * std[0] if std else sign * score

    drawn = dirichlet(len(low), _RANDOM_MIXTURES, strength=(0.1, float(len(low))), seed=seed)
    starts = onto_simplex(torch.cat([rows, total * drawn]), low, high, total)
    order = value(starts).argsort(descending=True, stable=True)
    shares, _ = maximise(value, starts[order[:_STARTS]].clone(), low, high, total)
    (score,), (std,) = predicted(shares[None], True)
    distances = (rows - shares).abs().sum(1) / 2
    nearest = int(distances.argmin())
    answer = fitted.kind.restore(shares.to(fitted.dtype), {"task": fitted.task_names})
    return Mixture(answer, float(score), float(std), nearest, float(distances[nearest]))


def _share_bounds(
    bounds: tuple[Any, Any], surrogate: Surrogate, total: float
) -> tuple[Tensor, Tensor]:
    """The least and the largest share of each task, (n,); those that never varied stay."""
    n, remedy = len(surrogate.task_names), "Give two numbers, or n of each."
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ValueError(message("bounds", "a pair (low, high)", repr(bounds), remedy))
    ends = []
    for given in bounds:
        (given,) = aligned({"bounds": (given, "task")}, {"task": surrogate.task_names})
        end = as_tensor("bounds", given).double().cpu()
        if end.shape not in ((), (n,)):
            raise ValueError(message("bounds", f"numbers or ({n},)", shape_text(end), remedy))
        ends.append(end.expand(n).clone())
    low, high = ends
    constant = ~surrogate.varying.cpu()
    low[constant] = high[constant] = surrogate.masks.floats[0].cpu()[constant]
    high = high.clamp_max(total)
    within = bool((low >= 0).all()) and bool((low <= high).all())  # not where one is NaN
    if not within or not float(low.sum()) <= total * (1 + 1e-12) <= float(high.sum()) + 1e-9:
        expected = f"0 <= low <= high, with a mixture of sum {total:g} between"
        found = f"sums from {float(low.sum()):.4g} to {float(high.sum()):.4g}"
        raise ValueError(message("bounds", expected, found, "Widen them."))
    return low, high


def _greedy_per_cost(objective: "_Objective", prices: Tensor, budget: float) -> Selection:
    mask = torch.zeros(len(prices), dtype=torch.bool)
    score = objective.of(mask)
    tasks: list[int] = []
    path: list[float] = []
    while True:
        spent = float(prices[mask].sum())
        left = [task for task in _fitting(prices, budget, spent) if not mask[task]]
        if not left:
            break
        scores = objective.scores(_toggled(mask, left))
        rates = objective.improvement(score, scores) / prices[left]
        best = int((rates == rates.max()).nonzero()[0])  # argmax promises no order among ties
        if rates[best] <= 0:
            break
        score = float(scores[best])
        mask[left[best]] = True
        tasks.append(left[best])
        path.append(score)
    return objective.selected(tasks, score, tuple(path))


@dataclass(frozen=True)
class _Objective:
    """A predicted score with its direction, averaged over targets."""

    predict: Predict
    maximize: bool
    target_weights: ArrayLike | None

    def __post_init__(self) -> None:
        """Refuse what cannot be asked about subsets."""
        if not isinstance(self.predict, Predictor):
            expected = "a function of masks, or have one named `predict`"
            check_callable("predict", self.predict, expected, "Pass a surrogate or its predict.")
        fitted = _fitted(self.predict)
        if isinstance(fitted, Surrogate) and not fitted.masks.binary:
            expected = "of tasks that are in or out to select some"
            remedy = "Use `best_mixture`."
            raise ValueError(message("predict", expected, "a surrogate of real weights", remedy))

    @property
    def names(self) -> Mapping[str, Sequence[str]]:
        """What tasks and targets are called, as far as the predictor says."""
        fitted = _fitted(self.predict)
        if not (hasattr(fitted, "task_names") and hasattr(fitted, "target_names")):
            return {}
        return {"task": fitted.task_names, "target": fitted.target_names}

    def selected(
        self, tasks: list[int], score: float, path: tuple[float, ...] = (), removed: Any = ()
    ) -> Selection:
        """The tasks that were chosen, with their names."""
        names = self.names.get("task", ())
        called = tuple(names[task] for task in tasks) if names else ()
        return Selection(tuple(tasks), score, path, removed, called)

    def scores(self, chunks: Iterable[Tensor]) -> Tensor:
        """Predicted scores (l,) float64 on the CPU, in the caller's sign, of all masks."""
        return torch.cat([self._scores_of_chunk(masks) for masks in chunks])

    def _scores_of_chunk(self, masks: Tensor) -> Tensor:
        function = self.predict.predict if isinstance(self.predict, Predictor) else self.predict
        table = function(masks)
        predicted = as_tensor("predict(masks)", table)
        if predicted.ndim not in (1, 2) or len(predicted) != len(masks):
            expected = f"of shape ({len(masks)},) or ({len(masks)}, t)"
            remedy = "Return one row per subset."
            raise ValueError(message("predict(masks)", expected, shape_text(predicted), remedy))
        check_finite("predict(masks)", predicted, "Mind the subsets with very few tasks.")
        known = {"target": self.names["target"]} if self.names else {}
        weights = self.target_weights
        return _average_targets("predict(masks)", table, "subset", weights, known).cpu()

    def of(self, mask: Tensor) -> float:
        """Predicted score of one mask (n,)."""
        return float(self.scores([mask[None]]))

    def best_of(self, chunks: Iterable[Tensor]) -> tuple[int, float]:
        """Row and score of the first of the best masks."""
        scores = self.scores(chunks)
        row = self.first_best(scores)
        return row, float(scores[row])

    def first_best(self, scores: Tensor) -> int:
        best = scores.max() if self.maximize else scores.min()
        return int((scores == best).nonzero()[0])

    def improvement(self, before: float, after: Any) -> Any:
        """By how much ``after`` is better than ``before``."""
        return after - before if self.maximize else before - after


def _fitted(predict: Predict) -> Any:
    """What predicts: as itself, by its method, or as the surrogate within a regressor."""
    function = getattr(predict, "func", predict)  # of functools.partial
    owner = getattr(function, "__self__", function)
    return getattr(owner, "surrogate_", owner)


def _average_targets(
    name: str,
    table: ArrayLike,
    rows: str,
    target_weights: ArrayLike | None,
    known: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Tensor:
    """Weighted mean over targets; (rows,) or (rows, t) -> (rows,) float64."""
    tables = {name: (table, rows, "target"), "target_weights": (target_weights, "target")}
    table, target_weights = aligned(tables, known)
    values = as_tensor(name, table).double()
    if values.ndim == 1:
        values = values[:, None]
    check_ndim(name, values, 2, "with one column per target")
    check_finite(name, values)
    if target_weights is None:
        return values.mean(dim=1)
    weights = as_tensor("target_weights", target_weights).to(values)
    if weights.shape != values.shape[1:]:
        expected = f"of shape ({values.shape[1]},)"
        remedy = "Give one weight per target."
        raise ValueError(message("target_weights", expected, shape_text(weights), remedy))
    if not bool((weights >= 0).all()) or not 0 < float(weights.sum()) < math.inf:
        found = str(weights.tolist()[:8])
        remedy = "Set the weights of targets to ignore to 0."
        raise ValueError(message("target_weights", "non-negative, one positive", found, remedy))
    return values @ weights / weights.sum()


def _task_list(name: str, tasks: Iterable[int], num_tasks: int) -> list[int]:
    """The task numbers as a list, each valid and given once."""
    num_tasks = check_positive_int("num_tasks", num_tasks)
    listed = check_several(name, tasks, "task numbers")
    try:
        from_index_lists([listed], num_tasks)
    except (TypeError, ValueError) as error:
        remedy = f"Give each task at most once, from 0 to {num_tasks - 1}."
        raise type(error)(message(name, "task numbers", str(listed[:8]), remedy)) from error
    return [int(task) for task in listed]


def _check_reachable(size: int, minimum: int, maximum: int) -> int:
    size = check_positive_int("size", size, minimum=0)
    if not minimum <= size <= maximum:
        remedy = "Mind the tasks that are fixed and those that are not candidates."
        raise ValueError(message("size", f"from {minimum} to {maximum}", str(size), remedy))
    return size


def _chunk_rows(num_tasks: int) -> int:
    return min(2**16, max(1, _CHUNK_CELLS // num_tasks))


def _toggled(mask: Tensor, tasks: list[int]) -> Iterator[Tensor]:
    """Chunks of the masks (l, n) that differ from ``mask`` (n,) in one of the tasks each."""
    for columns in torch.tensor(tasks, dtype=torch.int64).split(_chunk_rows(len(mask))):
        masks = mask.repeat(len(columns), 1)
        masks[torch.arange(len(columns)), columns] ^= True
        yield masks


def _cost_vector(costs: ArrayLike, names: Mapping[str, Sequence[str]]) -> Tensor:
    known = {"task": names["task"]} if names else {}
    (costs,) = aligned({"costs": (costs, "task")}, known)
    prices = as_tensor("costs", costs).double().cpu()
    check_ndim("costs", prices, 1, "(n,): one cost per task")
    if known:
        _check_length(prices, len(known["task"]))
    check_finite("costs", prices, "Leave such tasks out.")
    if not bool((prices > 0).all()):
        first = int((prices <= 0).nonzero()[0])
        found = f"{prices[first].item()} for task {first}"
        remedy = "Leave free tasks out and add them afterwards."
        raise ValueError(message("costs", "positive", found, remedy))
    return prices


def _check_length(prices: Tensor, num_tasks: int) -> None:
    if len(prices) != num_tasks:
        remedy = "Give one cost per task."
        raise ValueError(message("costs", f"of shape ({num_tasks},)", shape_text(prices), remedy))


def _limit(budget: float) -> float:
    budget = check_real("budget", budget)
    if not budget >= 0:
        remedy = "It is in the units of `costs`."
        raise ValueError(message("budget", "non-negative", str(budget), remedy))
    return budget * (1 + 1e-12)  # three times 0.1 is within 0.3


def _fitting(prices: Tensor, budget: float, spent: float = 0.0) -> list[int]:
    """The tasks that fit into what is left of the budget, ascending."""
    return [int(task) for task in (spent + prices <= _limit(budget)).nonzero()[:, 0]]


def _affordable(chunks: Iterator[Tensor], prices: Tensor, budget: float) -> Iterator[Tensor]:
    for masks in chunks:
        within = masks.double() @ prices <= _limit(budget)
        if within.any():
            yield masks[within]
