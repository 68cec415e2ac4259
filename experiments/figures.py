"""The figures that experiments share, each from arrays to a PNG file.

All errors and ranks are of held-out subsets: what a fit says of subsets that it has not seen.

Shapes: masks (m, n), scores (m, t), attributions (n, t).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from experiments.common import saved_figure
from experiments.folds import centred_ranks, held_out, lds
from ksm_ext import fit_surrogate
from ksm_ext.evaluation import residual_error
from ksm_ext.network.spectrum import SpectralDensity

NAMES = {"least_squares": "least squares", "linear": "ridge", "rbf": "kernel"}
COLOURS = {"least_squares": "#999999", "linear": "#d55e00", "rbf": "#0072b2"}
VARIANTS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
NUM_SPLITS = 20


def quality(masks: Tensor, scores: Tensor, folds: list[Tensor], kernel: str) -> tuple[float, float]:
    """Pooled residual error and LDS of a surrogate, each fold predicted from the others."""
    predicted = held_out(masks, scores, folds, kernel=kernel)
    ranks = lds(centred_ranks(scores, folds), centred_ranks(predicted, folds))
    return float(residual_error(scores, predicted, pooled=True)), ranks


def linear_and_kernel(
    masks: Tensor, scores: Tensor, grown: Tensor, measured: Tensor, path: Path, *, xlabel: str
) -> None:
    """What a line and a kernel, fitted to masks (m, n) and scores (m,), say of growing subsets.

    ``grown`` (l, n) has a task more in each row, ``measured`` (l,) its scores; ``xlabel`` says what
    the number of tasks is.
    """
    sizes = grown.sum(1).numpy()
    with saved_figure(path, 5.4, 3.6) as figure:
        axes = figure.subplots()
        axes.plot(sizes, measured.numpy(), "ko", markersize=4, label="measured, not fitted to")
        for kernel in ("linear", "rbf"):
            predicted = fit_surrogate(masks, scores, kernel=kernel).predict(grown)
            axes.plot(sizes, predicted.numpy(), color=COLOURS[kernel], label=NAMES[kernel])
        axes.axvspan(*np.quantile(masks.sum(1).numpy(), [0, 1]), color="#eeeeee", zorder=0)
        axes.set(xlabel=f"{xlabel} (grey: sizes fitted to)", ylabel="mean loss on held-out samples")
        axes.legend(frameon=False)


def sample_complexity(masks: Tensor, scores: Tensor, path: Path) -> dict[str, Any]:
    """Held-out error of fits to 20, 40, 60 and 80 % of the subsets."""
    sizes = [round(share * len(masks)) for share in (0.2, 0.4, 0.6, 0.8)]
    orders = [
        torch.randperm(len(masks), generator=torch.Generator().manual_seed(number))
        for number in range(NUM_SPLITS)
    ]

    def error(order: Tensor, size: int, kernel: str) -> float:
        fit, held = order[:size], order[max(sizes) :]
        predicted = fit_surrogate(masks[fit], scores[fit], kernel=kernel).predict(masks[held])
        return float(residual_error(scores[held], predicted, pooled=True))

    found = {}
    with saved_figure(path, 5.4, 3.6) as figure:
        axes = figure.subplots()
        for kernel, name in NAMES.items():
            errors = np.array([[error(x, size, kernel) for size in sizes] for x in orders])
            middle, spread = np.median(errors, axis=0), np.quantile(errors, [0.25, 0.75], axis=0)
            axes.plot(sizes, middle, "o-", color=COLOURS[kernel], label=name)
            axes.fill_between(sizes, *spread, color=COLOURS[kernel], alpha=0.15, linewidth=0)
            found[name] = {"sizes": sizes, "median error": middle.tolist()}
        axes.set(xlabel="subsets fitted to", ylabel="residual error on held-out subsets")
        axes.set_yscale("log")
        axes.axhline(1, color="#cccccc", linewidth=0.8)
        axes.legend(frameon=False)
    return found


def over_training(
    masks: Tensor,
    folds: list[Tensor],
    scores: Mapping[str, tuple[Sequence[int], Tensor]],
    path: Path,
) -> dict[str, Any]:
    """Error and LDS of surrogates at each checkpoint, by the way of training.

    ``scores`` has, for each way, the steps of its checkpoints and the scores there, (c, m, t).
    """
    found = {}
    with saved_figure(path, 8.6, 3.6) as figure:
        errors, ranks = figure.subplots(1, 2)
        for colour, (name, (steps, runs)) in zip(VARIANTS, scores.items(), strict=False):
            for kernel, line in (("rbf", "o-"), ("linear", "x--")):
                pairs = [quality(masks, part, folds, kernel) for part in runs]
                label = name if kernel == "rbf" else None
                errors.plot(steps, [error for error, _ in pairs], line, color=colour, label=label)
                ranks.plot(steps, [lds for _, lds in pairs], line, color=colour, label=label)
                found[f"{name}, {NAMES[kernel]}"] = {"steps": list(steps), "error and LDS": pairs}
        errors.set(xlabel="steps of training", ylabel="residual error on held-out subsets")
        ranks.set(xlabel="steps of training", ylabel="LDS")
        errors.legend(frameon=False, title="kernel solid, ridge dashed")
    return found


def trace_and_error(points: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> float:
    """Error of a surrogate against the Hessian's trace; answers their rank correlation.

    ``points`` are pairs of trace and error, by the way of training.
    """
    everything = [pair for pairs in points.values() for pair in pairs]
    with saved_figure(path, 5.4, 3.6) as figure:
        axes = figure.subplots()
        for colour, (name, pairs) in zip(VARIANTS, points.items(), strict=False):
            axes.plot(*zip(*pairs, strict=True), "o", color=colour, label=name)
        axes.set(
            xlabel="trace of the Hessian of the training loss",
            ylabel="residual error of the ridge surrogate",
            xscale="symlog",
        )
        axes.legend(frameon=False)
    return float(spearmanr(*zip(*everything, strict=True)).statistic)


def density(facts: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Spectral densities by name, from their Ritz values and weights (num_probes, k)."""
    with saved_figure(path, 5.4, 3.6) as figure:
        axes = figure.subplots()
        for colour, (name, fact) in zip(VARIANTS, facts.items(), strict=False):
            points = SpectralDensity(torch.tensor(fact["nodes"]), torch.tensor(fact["weights"]), 1)
            low, high = float(points.nodes.min()), float(points.nodes.max())
            reach = max(-low, high)
            grid = torch.linspace(low - 0.05 * reach, high + 0.05 * reach, 1000)
            axes.semilogy(grid, points.density(grid, 0.01 * reach), color=colour, label=name)
        axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", ylim=(1e-7, None))
        axes.legend(frameon=False)


def attributions_and_truth(
    effects: Tensor,
    answers: Mapping[str, Tensor],
    path: Path,
    *,
    special: Tensor | None = None,
    meaning: str = "",
) -> None:
    """Attributions (n, t) of methods against the true leave-one-out effects (n, t).

    Where ``special`` (n, t) is true, points are orange; ``meaning`` says what they are.
    """
    orange = torch.zeros(effects.shape, dtype=torch.bool) if special is None else special
    with saved_figure(path, 2.7 * len(answers), 2.9) as figure:
        panels = figure.subplots(1, len(answers))
        for axes, (name, values) in zip(panels, answers.items(), strict=True):
            blue = {"color": "#0072b2", "markersize": 3, "alpha": 0.4}
            axes.plot(effects[~orange], values[~orange], ".", **blue)
            axes.plot(effects[orange], values[orange], ".", color="#d55e00", markersize=4)
            axes.set_title(name, fontsize=9)
            axes.set_xlabel("leave-one-out effect")
        label = f"attribution (orange: {meaning})" if meaning else "attribution"
        figure.supylabel(label, fontsize=9)
