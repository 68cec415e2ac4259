"""How many retrained subsets each surrogate needs: draws out of those that methods learn from.

A draw is so many of the subsets, and for each one of its trainings; all surrogates see the same,
and are judged as methods are, by other subsets and other seeds. Intervals are 95 % over draws, by
Student's t: of this pool of subsets, for large draws out of it overlap.

Shapes: runs (num_seeds, m, t).
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import joblib
import torch
from scipy.stats import t as student
from torch import Tensor

from experiments.common import markdown, one_thread, saved_figure
from experiments.rl.judging import Judge
from experiments.rl.methods import RETRAINED, ControlProblem, methods_for
from experiments.rl.settings import Curve
from ksm_ext.evaluation import lds, residual_error

COLOURS = {
    "ridge datamodel": "#d55e00",
    "kernel surrogate": "#0072b2",
    "surrogate of its own choice": "#009e73",
    "counting camps, fitted": "#999999",
    "ridge datamodel, warped": "#e69f00",
    "kernel surrogate, warped": "#56b4e9",
}
FIRST = "kernel surrogate", "kernel surrogate, warped"
METRICS = ("residual error", "LDS")


def learn(problem: ControlProblem, runs: Tensor, truth: Judge, curve: Curve) -> Tensor:
    """(surrogates, sizes, draws, 2): residual error and LDS of each fit."""
    names = shown(problem)
    todo = [(x, m, draw) for x in names for m in curve.sizes for draw in range(curve.num_draws)]
    found = joblib.Parallel()(
        joblib.delayed(_quality)(problem, runs, truth, *each) for each in todo
    )
    return torch.tensor(found).view(len(names), len(curve.sizes), curve.num_draws, 2)


def shown(problem: ControlProblem) -> list[str]:
    """The surrogates that are compared."""
    return [name for name in COLOURS if name in methods_for(problem.suite)]


@one_thread()
def _quality(
    problem: ControlProblem, runs: Tensor, truth: Judge, surrogate: str, size: int, draw: int
) -> tuple[float, float]:
    generator = torch.Generator().manual_seed(draw)
    rows = torch.randperm(len(problem.masks), generator=generator)[:size]
    seeds = torch.randint(len(runs), (size,), generator=generator)
    drawn = replace(problem, masks=problem.masks[rows], scores=runs[seeds, rows])
    said = RETRAINED[surrogate](drawn).predictions[truth.rows]
    errors = [float(residual_error(true, said, pooled=True)) for true in truth.runs]
    return fmean(errors), fmean(float(lds(true, said).mean()) for true in truth.runs)


def as_text(names: Sequence[str], curve: Curve, found: Tensor) -> str:
    """Means, and differences of kernel surrogates from the others on the same draws."""
    rows = []
    for number, metric in enumerate(METRICS):
        for name, values in zip(names, found[..., number], strict=True):  # (sizes, draws)
            means = [f"{float(x.mean()):.3f}" for x in values]
            rows.append([metric, name, *means])
        for first in FIRST:
            ours = found[names.index(first), ..., number]
            for name, values in zip(names, found[..., number], strict=True):
                if name != first and ("warped" in name) == ("warped" in first):
                    cells = [_spelled(x) for x in ours - values]
                    rows.append([metric, f"{first} less {name}", *cells])
    return markdown(["", "surrogate", *(f"{m} subsets" for m in curve.sizes)], rows)


def _spelled(values: Tensor) -> str:
    """Such as ``-0.031 ± 0.010``."""
    half = student.ppf(0.975, len(values) - 1) * float(values.std()) / len(values) ** 0.5
    return f"{float(values.mean()):+.3f} ± {half:.3f}"


def draw(names: Sequence[str], curve: Curve, found: Tensor, path: Path) -> None:
    """Errors by the number of subsets, with the quartiles over draws."""
    with saved_figure(path, 8.6, 3.6) as figure:
        for number, axes in enumerate(figure.subplots(1, 2)):
            for name, values in zip(names, found[..., number], strict=True):
                low, high = values.quantile(torch.tensor([0.25, 0.75]).to(values), dim=1)
                axes.plot(curve.sizes, values.mean(1), "o-", color=COLOURS[name], label=name)
                axes.fill_between(curve.sizes, low, high, color=COLOURS[name], alpha=0.15)
            axes.set(xlabel="subsets fitted to", ylabel=f"{METRICS[number]}, other subsets")
            axes.set_xscale("log")
            axes.set_xticks(curve.sizes, [str(size) for size in curve.sizes])
            axes.minorticks_off()
        figure.axes[0].legend(frameon=False, fontsize=7)
