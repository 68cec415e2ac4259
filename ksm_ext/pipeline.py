"""Attributions in one call: from a trained model, its tasks and a target, with little retraining.

Subsets are drawn, their scores estimated from gradients (:mod:`ksm_ext.scores.estimation`), a
surrogate fitted to them (:mod:`ksm_ext.surrogates`) and its attributions read off. With a function
that trains, some subsets are really retrained, and both kinds of scores are fitted together
(:mod:`ksm_ext.surrogates.cokriging`).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ksm_ext.arrays import ArrayLike, aligned
from ksm_ext.checks import (
    check_callable,
    check_choice,
    check_positive_int,
    checked,
    counted,
    message,
)
from ksm_ext.network.distributed import Group
from ksm_ext.network.gradients import AnyProjector
from ksm_ext.network.outputs import Output, log_odds
from ksm_ext.scores.estimation import GradientEstimator
from ksm_ext.scores.retraining import RetrainedScores, Train, retrain_scores
from ksm_ext.subsets import design, leave_one_out, mixed_sizes
from ksm_ext.surrogates.fit import fit_surrogate
from ksm_ext.surrogates.options import Readout
from ksm_ext.surrogates.readouts import READOUTS
from ksm_ext.surrogates.surrogate import Surrogate

_BUDGET = 20  # subsets that are retrained


@dataclass(frozen=True, eq=False)
class TaskAttributions:
    """What including each task does to each target, and all it was computed from.

    Attributes:
        values: (n, t) float64. ``values[i, j] > 0`` means that task i raises score j; for a loss,
            it hurts.
        std: (n, t). Posterior standard deviation given the scores. Without retraining, the error
            of the estimates themselves is not in it.
        masks: (m, n) bool. The subsets.
        exhaustive: Whether these are all subsets of their sizes, fewer than were asked for.
        scores: (m, t). Their estimated scores.
        estimator: For the scores of other subsets.
        surrogate: For predictions, interactions, reports and files.
        retrained: The true scores, or None without retraining.
    """

    values: Tensor
    std: Tensor
    masks: Tensor
    exhaustive: bool
    scores: Tensor
    estimator: GradientEstimator
    surrogate: Surrogate
    retrained: RetrainedScores | None = None

    def __str__(self) -> str:
        """One line: sizes, whether there were no more subsets, what was retrained, settings."""
        n, t = self.values.shape
        text = f"Attributions of {counted(n, 'task')} to {counted(t, 'target')}"
        text += f" from {counted(len(self.masks), 'subset')}"
        text += ", all there are of their sizes" * self.exhaustive
        if self.retrained is not None:
            text += f" and {len(self.retrained.masks)} retrained ones"
        return f"{text}: {self.estimator.settings}"

    __repr__ = __str__


@checked
def attribute_tasks(
    models: nn.Module | Sequence[nn.Module],
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Any,
    *,
    readout: Readout = "loo",
    num_subsets: int = 1000,
    masks: ArrayLike | None = None,
    seed: int = 0,
    retrained: tuple[ArrayLike, ArrayLike] | RetrainedScores | None = None,
    retrain: Train | None = None,
    budget: int | None = None,
    include_empty: bool = False,
    seeds: Sequence[int] = (0,),
    n_jobs: int | None = None,
    kernel: Any = "auto",
    task_names: Sequence[str] | None = None,
    output: Output = log_odds,
    projector: AnyProjector | None = None,
    parameters: str | Sequence[str] | None = None,
    sample_weights: Any = None,
    loss: Literal["logistic", "squared"] = "logistic",
    ridge: float | None = None,
    solver: Literal["exact", "step"] = "exact",
    store: str | os.PathLike[str] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
    progress: bool = False,
    group: Group = None,
) -> TaskAttributions:
    """Attribute the scores of a model to the tasks it was trained on.

    Args:
        models: The network trained on all tasks, or several whose estimates are averaged.
        tasks: n data sets, see :class:`GradientEstimator`.
        targets: Data sets by name, or one; their mean losses are the scores.
        readout: ``"loo"`` at the full set, ``"shapley"`` or ``"banzhaf"``.
        num_subsets: m, drawn with every size from n / 2 to n - 1 equally often: the estimate
            holds near the model it expands, which has seen all tasks. Up to ten tasks there are
            fewer than 1000 such subsets: then all of them (``exhaustive`` says so).
        masks: (m, n) bool. Subsets to use instead.
        seed: Seed of the subsets that are drawn.
        retrained: Masks and scores of a few really retrained subsets, to calibrate with, or what
            :func:`ksm_ext.retrain_scores` returned.
        retrain: A function ``retrain(mask, seed)`` that trains on the tasks of a mask and returns
            the t scores, see :func:`ksm_ext.retrain_scores`. Then ``budget`` subsets are retrained,
            and a surrogate of their scores fitted with the estimates beside them.
        budget: How many subsets to retrain (20 by default), with each of ``seeds``, as
            :func:`ksm_ext.subsets.design` draws them for ``readout``.
        include_empty: Let the empty set be one of them, right after the full set: Shapley values
            sum to its distance from the full set. Only where ``retrain`` can train on nothing.
        seeds: Seeds of each retraining.
        n_jobs: Trainings at a time, see :func:`ksm_ext.retrain_scores`.
        kernel: Kernel of the surrogate of estimated scores, see :func:`ksm_ext.fit_surrogate`.
        task_names: n names; None: those of ``tasks``, if they have some.
        output: A function ``output(model, batch) -> (b,)``, see :mod:`ksm_ext.network.outputs`.
        projector: See :class:`GradientEstimator`.
        parameters: Names or patterns of the parameters that training moves.
        sample_weights: How much samples of the tasks count, see :class:`GradientEstimator`.
        loss: See :class:`GradientEstimator`.
        ridge: The penalty of moving away from the model, unless ``retrained`` chooses it; None: see
            :class:`GradientEstimator`.
        solver: See :class:`GradientEstimator`.
        store: A folder for features and retrained scores, from which a killed run resumes.
        batch_size: See :class:`GradientEstimator`.
        engine: See :class:`GradientEstimator`.
        progress: Whether to show progress bars.
        group: See :class:`GradientEstimator`.

    Returns:
        Attributions (n, t) with the estimator and the surrogate behind them.

    Raises:
        ValueError: If there are fewer than two tasks, an argument is out of its range, or names of
            tasks or targets do not match those of ``masks`` or ``retrained``.
    """
    check_choice("readout", readout, READOUTS)
    if not hasattr(tasks, "__len__") or isinstance(tasks, (str, type)):
        expected = "a list of data sets, or a dict of them"
        raise TypeError(message("tasks", expected, type(tasks).__name__, "One for each task."))
    n = len(tasks)
    if n < 2:
        raise ValueError(message("tasks", "two data sets or more", str(n), "Split the data."))
    if retrain is None and budget is not None:
        remedy = "Pass `retrain`, a function that trains on a subset, or leave it out."
        raise ValueError(message("budget", "None without `retrain`", str(budget), remedy))
    if retrain is None and include_empty:
        remedy = "Give masks that have the empty set among them, or pass `retrain`."
        raise ValueError(message("include_empty", "False without `retrain`", "True", remedy))
    pair = _pair(retrained)
    if retrain is not None:
        remedy = "Pass scores that are there as `retrained`." if hasattr(retrain, "runs") else ""
        expected = "a function of (mask, seed) that returns scores"
        check_callable("retrain", retrain, expected, remedy or "See retrain_scores.")
    budget = check_positive_int("budget", _BUDGET if budget is None else budget, 4)
    if retrain is not None:
        if n < 3:
            expected = "three data sets or more with `retrain`"
            raise ValueError(message("tasks", expected, str(n), "Train on every subset of two."))
        if group is not None:
            remedy = "Retrain in one process, by retrain_scores, and fit with `estimates=`."
            raise ValueError(message("group", "None with `retrain`", "a group", remedy))
    if task_names is None and isinstance(tasks, Mapping):
        task_names = [*map(str, tasks)]
    estimator = GradientEstimator(
        models,
        tasks,
        targets,
        output=output,
        projector=projector,
        parameters=parameters,
        sample_weights=sample_weights,
        loss=loss,
        ridge=ridge,
        solver=solver,
        store=store,
        batch_size=batch_size,
        engine=engine,
        progress=progress,
        group=group,
        task_names=task_names,
    )
    drawn = masks is None
    if drawn:
        sizes = range(max(1, n // 2), max(n, 3))  # of two tasks the pair too: a fit takes three
        masks = mixed_sizes(n, num_subsets, sizes, seed=seed, allow_fewer=True)
    (masks,) = aligned({"masks": (masks, "subset", "task")}, {"task": estimator.task_names})
    estimator.fit()
    if pair is not None:
        estimator.calibrate(*pair)
    scores = estimator.predict(masks)
    names: dict[str, Any] = {"task_names": task_names, "target_names": estimator.target_names}
    surrogate = fit_surrogate(masks, scores, kernel=kernel, progress=progress, **names)
    true = None
    if retrain is not None:
        true = retrain_scores(
            retrain,
            _to_retrain(surrogate, budget, readout, seed, include_empty),
            seeds=seeds,
            n_jobs=n_jobs,
            store=None if store is None else Path(store) / "retrained.sqlite",
            progress=progress,
            target_names=estimator.target_names,
        )
        surrogate = fit_surrogate(*true.runs(), estimates=surrogate, **names)
    values, std = surrogate.attribute(readout, return_std=True)
    exhaustive = drawn and len(masks) < num_subsets
    return TaskAttributions(values, std, masks, exhaustive, scores, estimator, surrogate, true)


def _pair(retrained: Any) -> tuple[ArrayLike, ArrayLike] | None:
    """Masks and scores of what was retrained, runs of one subset as rows of their own."""
    if retrained is None or hasattr(retrained, "runs"):
        return None if retrained is None else retrained.runs()
    if not isinstance(retrained, (tuple, list)) or len(retrained) != 2:
        expected = "a pair (masks, scores), or what retrain_scores returned"
        found = type(retrained).__name__
        raise TypeError(message("retrained", expected, found, "Put both into a tuple."))
    return retrained[0], retrained[1]


def _to_retrain(
    surrogate: Surrogate, budget: int, readout: Readout, seed: int, include_empty: bool
) -> Tensor:
    """(budget, n) bool: subsets whose true scores are to be had, fewer if there are no more.

    Those of a design for the question. Where it cannot have all that lack one task, it has those
    of tasks from the most harmful to the most helpful, as far as estimates tell.
    """
    n = surrogate.masks.num_tasks
    options: dict[str, Any] = {"readout": readout, "include_empty": include_empty}
    masks = design(n, budget, seed=seed, allow_fewer=True, **options)
    if readout != "banzhaf":  # which begins with the ends, and all that lack one task
        start = 1 + int(include_empty)
        order = surrogate.attribute(readout).mean(1).argsort()
        spaced = torch.linspace(0, n - 1, min(n, budget - start)).round().long()
        masks[start : start + len(spaced)] = leave_one_out(n)[order[spaced]]
    return masks
