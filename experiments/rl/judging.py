"""How near each method comes to what was trained: the table, with its intervals.

Methods are judged by subsets that none of them has seen, by several trainings of each: Spearman
correlation over them, averaged over targets (LDS); squared error in units of the variance of
scores; relative error of returns, the mean square of Δ / return and the mean of its absolute value;
each against one training of every subset by one seed, and averaged over seeds, which share noise
over subsets. And by the exact attributions of the game of all subsets: Pearson correlation over
tasks, averaged over targets. Leave-one-out effects are the worst known of them: where they are
small, several seeds leave them to chance.

Intervals are 95 % of a bootstrap over the seeds and over the subsets, or over the targets of
attributions.

Shapes: n tasks, t targets, subsets (l, n), their scores (l, t) and numbers of trainings (l,).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from experiments.common import markdown, saved_figure
from experiments.folds import centred_ranks, lds
from experiments.rl.games import is_complete, weights_of
from experiments.rl.methods import IN_ORDER, READOUTS, Answer
from experiments.table import COLUMNS as SHARED
from ksm_ext.correlation import pearson, spearman
from ksm_ext.evaluation import relative_error, residual_error

NUM_RESAMPLES = 400
COLUMNS = {
    "loo": ("leave-one-out", 1),
    "shapley": ("Shapley", 1),
    "banzhaf": ("Banzhaf", 1),
    **{name: SHARED[name] for name in ("lds", "residual", "relative", "relative_absolute")},
}
"""What each metric is called, and by how much it is multiplied."""
Metric = Callable[[Tensor], float]
"""Of numbers of subsets, or of targets."""
Draws = np.ndarray
"""(1 + NUM_RESAMPLES,): an estimate, and what the bootstrap makes of it."""
Metrics = dict[str, tuple[float, float, float]]


@dataclass(frozen=True, eq=False)
class Judge:
    """What methods are judged by.

    Attributes:
        masks: (l, n) bool.
        scores: (l, t).
        unseen: (l,) bool, those that no method was fitted to, and not the empty one.
        num_runs: (l,), trainings that a score is the mean of.
        judged: Rows (k,) of unseen subsets that predictions are judged by.
        runs: (num_seeds, k, t) their scores, run by run.
    """

    masks: Tensor
    scores: Tensor
    unseen: Tensor
    num_runs: Tensor
    judged: Tensor
    runs: Tensor

    @property
    def rows(self) -> Tensor:
        """Numbers of the judged subsets in the order of ``all_subsets``."""
        return row_numbers(self.masks[self.judged])

    @property
    def values(self) -> dict[str, Tensor]:
        """Exact attributions (n, t), where every subset is scored."""
        if not is_complete(self.masks):
            return {}
        return {x: weights_of(self.masks, x) @ self.scores for x in READOUTS}

    def ceilings(self) -> Metrics:
        r"""About what a perfect method would reach against these noisy scores.

        A correlation with values of variance v and noise e² reaches :math:`\sqrt{1 - e^2 / v}`,
        ranks of one training the root of their correlation with another's; the error is the noise.
        Noise of attributions is taken for independent over subsets, of which it is a part only.
        """
        variance = self.runs.var(0).mean(0)  # (t,) of one training
        found = {}
        for readout, values in self.values.items():
            if readout == "loo":  # whose noise is that of other subsets: see truth.py
                continue
            noise = weights_of(self.masks, readout).square() @ (1 / self.num_runs.double())
            found[readout] = 1 - noise.mean() * variance / values.var(0)
        found["lds"] = torch.stack([spearman(*pair) for pair in combinations(self.runs, 2)]).mean(0)
        means = {name: float(x.clamp(min=0).sqrt().mean()) for name, x in found.items()}
        means["residual"] = float(variance.mean() / self.runs.var(1).mean())
        return {name: (x, x, x) for name, x in means.items()}


def row_numbers(masks: Tensor) -> Tensor:
    """(l,) int64: where masks (l, n) stand in ``all_subsets``."""
    return masks.long() @ 2 ** torch.arange(masks.shape[1])


def judge(name: str, answer: Answer, truth: Judge) -> dict[str, Draws]:
    """Each of :data:`COLUMNS` that applies."""
    metrics = {}
    for readout, values in truth.values.items():
        each = pearson(getattr(answer, readout).T, values.T)  # (t,)
        metrics[readout] = resampled([lambda rows, each=each: float(each[rows].mean())], len(each))
    each_run = of_predictions(name, answer, truth)
    return metrics | {x: resampled(one, len(truth.judged)) for x, one in each_run.items()}


def of_predictions(name: str, answer: Answer, truth: Judge) -> dict[str, list[Metric]]:
    """Each of :data:`COLUMNS` for predictions, one for each run, as functions of rows."""
    said = answer.predictions[truth.rows]
    metrics: dict[str, list[Metric]] = {"lds": [ranks_agree(true, said) for true in truth.runs]}
    if name not in IN_ORDER:
        metrics["residual"] = [partial(_residual, true, said) for true in truth.runs]
        for metric, definition in (("relative", "squared"), ("relative_absolute", "absolute")):
            metrics[metric] = [
                partial(_relative, 1 - true, 1 - said, definition) for true in truth.runs
            ]
    return metrics


def ranks_agree(scores: Tensor, said: Tensor) -> Metric:
    """From rows to LDS; ranks are those among all rows, for rows drawn twice would be ties."""
    everything = [torch.arange(len(scores))]
    true, ours = (centred_ranks(table, everything) for table in (scores, said))
    return lambda rows: lds(true[rows], ours[rows])


def _residual(true: Tensor, said: Tensor, rows: Tensor) -> float:
    return float(residual_error(true[rows], said[rows], pooled=True))


def _relative(true: Tensor, said: Tensor, definition: str, rows: Tensor) -> float:
    return float(relative_error(true[rows], said[rows], definition=definition).mean())


def resampled(metrics: Sequence[Metric], num_units: int) -> Draws:
    """The mean of metrics, one for each run; and of drawn runs and units, alike for any metrics."""
    random, count = np.random.default_rng(0), len(metrics)

    def mean(runs: np.ndarray, units: np.ndarray) -> float:
        return fmean(metrics[run](torch.from_numpy(units)) for run in runs)

    values = [mean(np.arange(count), np.arange(num_units))]
    for _ in range(NUM_RESAMPLES):
        runs, units = (random.integers(size, size=size) for size in (count, num_units))
        values.append(mean(runs, units))
    return np.array(values)


def interval(draws: Draws) -> tuple[float, float, float]:
    """An estimate with the ends of its interval."""
    low, high = np.quantile(draws[1:], [0.025, 0.975])
    return float(draws[0]), float(low), float(high)


def differences(
    drawn: Mapping[str, Mapping[str, Draws]], first: str, metric: str
) -> dict[str, tuple[float, float, float]]:
    """A metric of one method less that of each other, on the same draws."""
    ours = drawn[first][metric]
    return {
        name: interval(ours - each[metric])
        for name, each in drawn.items()
        if name != first and metric in each
    }


def by_training(answers: Mapping[str, Answer], truth: Judge) -> str:
    """A table of ranks and errors against each training by itself."""
    everything, rows = torch.arange(len(truth.judged)), []
    for name, answer in answers.items():
        metrics = of_predictions(name, answer, truth)
        cells = [
            " ".join(f"{one(everything):.3f}" for one in metrics.get(x, ()))
            for x in ("lds", "residual")
        ]
        rows.append([name, *cells])
    return markdown(["method", "LDS, each training", "residual error, each training"], rows)


def as_text(rows: Mapping[str, tuple[Metrics, int, float]]) -> str:
    """The table: metrics, trainings and seconds by the name of the method, best LDS first."""
    titles = ["method", *(title for title, _ in COLUMNS.values()), "trainings", "seconds"]
    order = sorted(rows.items(), key=lambda pair: -pair[1][0]["lds"][0])
    return markdown(
        titles,
        [
            [name, *(spelled(metrics, x) for x in COLUMNS), str(trainings), f"{seconds:.1f}"]
            for name, (metrics, trainings, seconds) in order
        ],
    )


def spelled(metrics: Metrics, name: str) -> str:
    """Such as ``0.93 [0.90, 0.95]``."""
    if name not in metrics:
        return ""
    value = [COLUMNS[name][1] * part for part in metrics[name]]
    digits = 2 if max(map(abs, value)) < 10 else 0
    estimate, low, high = (f"{part:.{digits}f}" for part in value)
    return estimate if low == high else f"{estimate} [{low}, {high}]"


def draw(
    rows: Mapping[str, Metrics], truth: Judge, camps: Tensor, predictions: Tensor, path: Path
) -> None:
    """LDS of each method; and the true and predicted returns of one target by counts of camps.

    Args:
        rows: Metrics by the name of the method, with the ceiling.
        truth: What they are judged by.
        camps: (n,) of 1 and -1; or all 0, and tasks are counted.
        predictions: (2ⁿ, t) of the method that is shown.
        path: The file.
    """
    order = sorted((x for x in rows if x != "ceiling"), key=lambda name: rows[name]["lds"][0])
    masks = truth.masks[truth.unseen]
    more = masks.double() @ camps.double() * camps[0] if camps.any() else masks.sum(1).double()
    jitter = 0.6 * (torch.rand(len(more), generator=torch.Generator().manual_seed(0)) - 0.5)
    with saved_figure(path, 9.6, 4.2) as figure:
        left, right = figure.subplots(1, 2, width_ratios=[1.15, 1])
        for number, name in enumerate(order):
            value, low, high = rows[name]["lds"]
            left.plot([low, high], [number, number], color="#0072b2", linewidth=1)
            left.plot(value, number, "o", color="#0072b2", markersize=4)
        left.axvline(rows["ceiling"]["lds"][0], color="#d55e00", linewidth=0.8)
        left.set_yticks(range(len(order)), order, fontsize=7)
        left.set_xlabel("LDS over subsets that no method saw (orange: ceiling)")
        scores, said = truth.scores[truth.unseen], predictions[row_numbers(masks)]
        for table, place, colour in ((scores, -0.2, "#999999"), (said, 0.2, "#0072b2")):
            right.plot(more + place + jitter / 2, 1 - table[:, 0], ",", color=colour)
        right.set_xlabel("own camp less the other" if camps.any() else "tasks of the subset")
        right.set_ylabel("return of the first task (grey: true, blue: predicted)")
