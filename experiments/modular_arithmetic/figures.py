"""The figures, drawn from what the other commands have left on disk.

All of them are of the held-out subsets: what a fit says of subsets that it has not seen.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.common import new_figure, save_figure
from experiments.modular_arithmetic.settings import Settings
from experiments.modular_arithmetic.table import fold_ranks
from experiments.modular_arithmetic.truth import growing, left_out, retrained, split, subsets
from ksm_ext import fit_surrogate
from ksm_ext.evaluation import residual_error

NAMES = {"least_squares": "least squares", "linear": "ridge", "rbf": "kernel"}
COLOURS = {"least_squares": "#999999", "linear": "#d55e00", "rbf": "#0072b2"}
VARIANTS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
NUM_SPLITS = 20


def quality(masks: Tensor, scores: Tensor, folds: list[Tensor], kernel: str) -> tuple[float, float]:
    """Pooled residual error and LDS of a surrogate, each fold predicted from the others."""
    predictions = torch.empty_like(scores)
    for fold in folds:
        others = torch.ones(len(masks), dtype=torch.bool).index_fill(0, fold, False)
        fitted = fit_surrogate(masks[others], scores[others], kernel=kernel)
        predictions[fold] = fitted.predict(masks[fold])
    true, said = fold_ranks(scores, folds), fold_ranks(predictions, folds)
    length = true.square().sum(0).sqrt() * said.square().sum(0).sqrt()
    lds = torch.where(length > 0, (true * said).sum(0) / length.clamp(min=1e-30), 0.0).mean()
    return float(residual_error(scores, predictions, pooled=True)), float(lds)


def linear_and_kernel(settings: Settings, output: Path) -> None:
    """What a line and a kernel make of the score while tasks are added one by one."""
    masks = growing(settings)
    checkpoint = settings.truth.checkpoint
    scores = retrained(settings, output, masks, 1).mean(0)[:, checkpoint].mean(1)  # (n,)
    figure = new_figure(5.4, 3.6)
    axes = figure.subplots()
    sizes = masks.sum(1).numpy()
    axes.plot(sizes, scores.numpy(), "ko", markersize=4, label="retrained")
    for kernel in ("linear", "rbf"):
        said = fit_surrogate(masks, scores, kernel=kernel).predict(masks)
        axes.plot(sizes, said.numpy(), color=COLOURS[kernel], label=NAMES[kernel])
    axes.set(xlabel="tasks trained on", ylabel="mean loss on held-out samples")
    axes.legend(frameon=False)
    save_figure(figure, output / "linear_and_kernel.png")


def sample_complexity(settings: Settings, output: Path) -> dict[str, Any]:
    """Held-out error of fits to 20, 40, 60 and 80 % of the subsets."""
    masks = subsets(settings)
    runs = retrained(settings, output, masks, settings.truth.subset_seeds)
    scores = runs.mean(0)[:, settings.truth.checkpoint]
    sizes = [round(share * len(masks)) for share in (0.2, 0.4, 0.6, 0.8)]
    figure = new_figure(5.4, 3.6)
    axes = figure.subplots()
    found = {}
    for kernel, name in NAMES.items():
        errors = np.empty((NUM_SPLITS, len(sizes)))
        for number in range(NUM_SPLITS):
            order = torch.randperm(len(masks), generator=torch.Generator().manual_seed(number))
            held = order[max(sizes) :]
            for column, size in enumerate(sizes):
                fitted = fit_surrogate(masks[order[:size]], scores[order[:size]], kernel=kernel)
                said = fitted.predict(masks[held])
                errors[number, column] = float(residual_error(scores[held], said, pooled=True))
        middle, spread = np.median(errors, axis=0), np.quantile(errors, [0.25, 0.75], axis=0)
        axes.plot(sizes, middle, "o-", color=COLOURS[kernel], label=name)
        axes.fill_between(sizes, *spread, color=COLOURS[kernel], alpha=0.15, linewidth=0)
        found[name] = {"sizes": sizes, "median error": middle.tolist()}
    axes.set(xlabel="subsets fitted to", ylabel="residual error on held-out subsets", yscale="log")
    axes.axhline(1, color="#cccccc", linewidth=0.8)
    axes.legend(frameon=False)
    save_figure(figure, output / "sample_complexity.png")
    return found


def over_training(settings: Settings, output: Path) -> dict[str, Any]:
    """Error and LDS of surrogates at each checkpoint, by the way of training."""
    masks = subsets(settings)
    folds = split(masks, settings.truth.num_folds)
    figure = new_figure(8.6, 3.6)
    errors, ranks = figure.subplots(1, 2)
    found = {}
    for colour, variant in zip(VARIANTS, ("main", *settings.variants), strict=False):
        training = settings.variant(variant)
        steps = [round(share * training.num_steps) for share in training.checkpoints]
        # one run of each subset, for every variant alike
        scores = retrained(settings, output, masks, 1, variant)[0]
        label = "AdamW" if variant == "main" else variant
        for kernel, line in (("rbf", "o-"), ("linear", "x--")):
            pairs = [quality(masks, scores[:, c], folds, kernel) for c in range(len(steps))]
            name = label if kernel == "rbf" else None
            errors.plot(steps, [error for error, _ in pairs], line, color=colour, label=name)
            ranks.plot(steps, [lds for _, lds in pairs], line, color=colour, label=name)
            found[f"{label}, {NAMES[kernel]}"] = {"steps": steps, "error and LDS": pairs}
    errors.set(xlabel="steps of training", ylabel="residual error on held-out subsets")
    ranks.set(xlabel="steps of training", ylabel="LDS")
    errors.legend(frameon=False, title="kernel solid, ridge dashed")
    save_figure(figure, output / "over_training.png")
    return found


def trace_and_error(settings: Settings, output: Path, quality_over_training: dict) -> float:
    """Error of the ridge surrogate against the Hessian's trace; answers their rank correlation."""
    from scipy.stats import spearmanr

    curvature = json.loads((output / "curvature.json").read_text())
    figure = new_figure(5.4, 3.6)
    axes = figure.subplots()
    points = []
    for colour, variant in zip(VARIANTS, ("main", *settings.variants), strict=False):
        label = "AdamW" if variant == "main" else variant
        pairs = quality_over_training[f"{label}, ridge"]["error and LDS"]
        traces = [fact["trace"] for fact in curvature.values() if fact["variant"] == variant]
        errors = [error for error, _ in pairs]
        axes.plot(traces, errors, "o", color=colour, label=label)
        points += zip(traces, errors, strict=True)
    axes.set(
        xlabel="trace of the Hessian of the training loss",
        ylabel="residual error of the ridge surrogate",
        xscale="symlog",
    )
    axes.legend(frameon=False)
    save_figure(figure, output / "trace_and_error.png")
    return float(spearmanr(*zip(*points, strict=True)).statistic)


def density(output: Path) -> None:
    """Spectral density of the Hessian at the main checkpoints."""
    curvature = json.loads((output / "curvature.json").read_text())
    figure = new_figure(5.4, 3.6)
    axes = figure.subplots()
    for colour, (name, fact) in zip(VARIANTS, curvature.items(), strict=False):
        if "nodes" not in fact:
            continue
        nodes, weights = np.array(fact["nodes"]).ravel(), np.array(fact["weights"])
        share = (weights / len(weights)).ravel()
        reach = np.abs(nodes).max()
        grid = np.linspace(nodes.min() - 0.05 * reach, nodes.max() + 0.05 * reach, 1000)
        width = 0.01 * reach
        heights = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) @ share
        label = name.replace("main", "AdamW")
        axes.semilogy(grid, heights / (width * np.sqrt(2 * np.pi)), color=colour, label=label)
    axes.set(xlabel="eigenvalue of the Hessian", ylabel="density", ylim=(1e-7, None))
    axes.legend(frameon=False)
    save_figure(figure, output / "density.png")


def attributions_and_truth(settings: Settings, output: Path, answers: dict[str, Tensor]) -> None:
    """Attributions of some methods against the true leave-one-out effects."""
    runs = retrained(settings, output, left_out(settings), settings.truth.loo_seeds)
    scores = runs.mean(0)[:, settings.truth.checkpoint]
    effects = scores[-1:] - scores[:-1]  # (n, t)
    figure = new_figure(2.7 * len(answers), 2.9)
    own = torch.eye(len(effects), dtype=torch.bool)
    for axes, (name, values) in zip(figure.subplots(1, len(answers)), answers.items(), strict=True):
        axes.plot(effects[~own], values[~own], ".", color="#0072b2", markersize=3, alpha=0.4)
        axes.plot(effects[own], values[own], ".", color="#d55e00", markersize=4)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("leave-one-out effect")
    figure.supylabel("attribution (orange: a cell on itself)", fontsize=9)
    save_figure(figure, output / "attributions_and_truth.png")
