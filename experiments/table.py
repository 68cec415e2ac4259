"""How near each method comes to what was retrained: the table, with its intervals.

Two questions. Attributions (n, t) are compared with the true leave-one-out effects, mean over
seeds: Pearson correlation over tasks, averaged over targets. Predictions (m, t) are compared with
the true scores of the subsets: Spearman correlation within each fold of held-out subsets, averaged
over folds and targets (LDS); squared error in units of the scores' variance, pooled over targets;
and relative error in both definitions, the mean square of Δ / F and the mean of its absolute value.

Intervals are 95 % of a bootstrap that draws the seeds of the truth again, and with them the subsets
or, for leave-one-out effects, the targets: a correlation over tasks that lacks the task next to its
target would be another quantity. Ranks are those of the whole table: ranks of rows drawn twice
would be ties.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiments.common import markdown, write_json, write_text
from experiments.folds import centred_ranks, lds
from ksm_ext.evaluation import loo_correlation, relative_error, residual_error

NUM_RESAMPLES, LEVEL = 400, 0.95
COLUMNS = {
    "correlation": ("correlation with leave-one-out", 1),
    "rank_correlation": ("Spearman", 1),
    "lds": ("LDS", 1),
    "residual": ("residual error", 1),
    "relative": ("relative error², %", 100),
    "relative_absolute": ("relative error, %", 100),
}
"""What each metric is called in the table, and by how much it is multiplied."""


@dataclass(frozen=True, eq=False)
class Results:
    """What the methods are judged by.

    Attributes:
        loo: (num_seeds, n, t) true leave-one-out effects, run by run.
        scores: (num_seeds, m, t) true scores of the subsets.
        folds: Rows of each fold of the subsets.
    """

    loo: Tensor
    scores: Tensor
    folds: list[Tensor]


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: What it is called.
        metrics: Each of :data:`COLUMNS`, with the ends of its interval.
        num_trainings: Networks that the method needs.
        seconds: What it takes beside these trainings.
    """

    name: str
    metrics: dict[str, tuple[float, float, float]]
    num_trainings: int
    seconds: float


def judge(
    name: str,
    results: Results,
    attributions: Tensor,
    predictions: Tensor,
    num_trainings: int,
    seconds: float,
) -> Row:

    def correlation(method: str, loo: Tensor, targets: Tensor) -> float:
        return float(loo_correlation(attributions, loo, method=method)[targets].mean())

    def ranks(scores: Tensor, rows: Tensor) -> float:
        true, ours = (centred_ranks(table, results.folds)[rows] for table in (scores, predictions))
        return lds(true, ours)

    def pooled(scores: Tensor, rows: Tensor) -> float:
        return float(residual_error(scores[rows], predictions[rows], pooled=True))

    def relative(definition: str, scores: Tensor, rows: Tensor) -> float:
        errors = relative_error(scores[rows], predictions[rows], definition=definition)
        return float(errors.mean())

    targets, rows = torch.arange(results.loo.shape[2]), torch.cat(results.folds)
    metrics = {
        "correlation": interval(partial(correlation, "pearson"), results.loo, targets),
        "rank_correlation": interval(partial(correlation, "spearman"), results.loo, targets),
        "lds": interval(ranks, results.scores, rows),
        "residual": interval(pooled, results.scores, rows),
        "relative": interval(partial(relative, "squared"), results.scores, rows),
        "relative_absolute": interval(partial(relative, "absolute"), results.scores, rows),
    }
    return Row(name, metrics, num_trainings, seconds)


def interval(
    metric: Callable[[Tensor, Tensor], float], runs: Tensor, everything: Tensor
) -> tuple[float, float, float]:
    """A metric of the mean of ``runs`` (num_seeds, ...) and unit numbers, with its interval."""
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(NUM_RESAMPLES):
        seeds = torch.from_numpy(random.integers(len(runs), size=len(runs)))
        units = torch.from_numpy(random.integers(len(everything), size=len(everything)))
        drawn.append(metric(runs[seeds].mean(0), everything[units]))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return metric(runs.mean(0), everything), float(low), float(high)


def ceiling(results: Results) -> tuple[float, float]:
    """How well half of the seeds knows the other half: leave-one-out effects, and subsets' ranks.

    The reliability of a mean over half of the seeds. Methods look at networks of the truth's own
    seeds, so they may exceed it.
    """

    def halves(runs: Tensor) -> list[Tensor]:
        count = len(runs) // 2
        return [part.mean(0) for part in runs[: 2 * count].chunk(2)] if count else []

    effects = float(loo_correlation(*halves(results.loo)).mean())
    ranks = [centred_ranks(part, results.folds) for part in halves(results.scores)]
    return effects, lds(*ranks) if ranks else float("nan")


def as_text(rows: list[Row], unit: str = "trainings") -> str:
    """The table as text, the best correlation first; ``unit`` is what ``num_trainings`` counts."""
    titles = ["method", *(title for title, _ in COLUMNS.values()), unit, "seconds"]
    cells = [
        [x.name, *_metrics(x), str(x.num_trainings), f"{x.seconds:.1f}"]
        for x in sorted(rows, key=lambda row: -row.metrics["correlation"][0])
    ]
    return markdown(titles, cells)


def _metrics(row: Row) -> Iterator[str]:
    """Such as ``0.93 [0.90, 0.95]``."""
    for key, (_, times) in COLUMNS.items():
        value = [times * part for part in row.metrics[key]]
        digits = 2 if max(map(abs, value)) < 10 else 0
        estimate, low, high = (f"{part:.{digits}f}" for part in value)
        yield f"{estimate} [{low}, {high}]"


def write(rows: list[Row], note: str, folder: Path, unit: str = "trainings") -> None:
    """The table and what is to be said of it, on the terminal and in ``table.md``; and as JSON."""
    write_text(folder / "table.md", f"{as_text(rows, unit)}\n\n{note}\n")
    facts = [
        {"name": x.name, **x.metrics, "num_trainings": x.num_trainings, "seconds": x.seconds}
        for x in rows
    ]
    write_json(folder / "table.json", facts)
