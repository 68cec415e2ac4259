"""How many true scores a surrogate needs, with and without estimates beside them.

    python -m experiments.studies.learning_curve [--output DIR] [--only digits,addition,cifar]

Three problems: those of `score_estimates.py`, and CIFAR-10 in 20 groups (preset `small`). Scores of
a pool of subsets by retraining, one seed each; of these, 10 to 160 at random are fitted, and 120
others predicted, in 12 splits. Three ways: a surrogate of the true scores alone; estimated scores,
corrected by the affine function that fits the true scores best; and both together
(`fit_surrogate(masks, scores, estimates=...)`). Estimates come from two networks trained on all
tasks. A table and a figure; retraining is resumable (``--output``): an hour and a half of one core,
most of it for CIFAR.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import torch
from torch import Tensor

from experiments.cifar.experiment import Cifar
from experiments.cifar.settings import SMALL
from experiments.common import (
    markdown,
    one_thread,
    read_tensors,
    saved_figure,
    write_tensors,
    write_text,
)
from experiments.experiment import Run
from experiments.studies.score_estimates import NUM_TASKS, PROBLEMS, retrain, train
from experiments.truth import models, retrained
from ksm_ext import GradientEstimator, Projector, fit_surrogate
from ksm_ext.evaluation import lds
from ksm_ext.subsets import bernoulli, leave_one_out

POOL, HELD, SPLITS, DRAWN = 280, 120, 12, 600
SIZES = (10, 20, 30, 40, 60, 80, 120, 160)
WAYS = {"surrogate alone": "#d55e00", "estimate, affine": "#999999", "together": "#0072b2"}
SOLVERS = {"digits": "exact", "addition": "step"}


def cifar_run(output: Path, images: str) -> Run:
    settings = replace(SMALL, data=replace(SMALL.data, path=images))
    folder = output / "cifar"
    folder.mkdir(parents=True, exist_ok=True)
    return Run(Cifar(settings), folder)


def pool(name: str, output: Path, images: str) -> tuple[Tensor, Tensor]:
    """(m, n) subsets and their true scores (m,): mean loss on held-out samples."""
    if name in PROBLEMS:
        masks = bernoulli(NUM_TASKS, POOL, PROBLEMS[name]().probability, seed=1)
        return masks, retrain(name, masks, output / f"{name}.sqlite", (0,)).mean[:, 0]
    run = cifar_run(output, images)
    masks = bernoulli(run.experiment.num_tasks, POOL, 0.8, seed=1)
    return masks, retrained(run, masks, 1)[0, :, SMALL.truth.checkpoint].mean(1)


def estimator(name: str, output: Path, images: str) -> GradientEstimator:
    """Of two networks trained on all tasks."""
    if name in PROBLEMS:
        problem = PROBLEMS[name]()
        everything = torch.ones(NUM_TASKS, dtype=torch.bool)
        networks = [train(problem, everything, 100 + i, problem.num_steps) for i in range(2)]
        data, solver = (problem.tasks(), problem.target), SOLVERS[name]
        return GradientEstimator(networks, *data, projector=Projector(1024), solver=solver).fit()
    run = cifar_run(output, images)
    methods, samples = SMALL.methods, run.experiment.data()
    return GradientEstimator(
        [path[methods.estimate_checkpoint or 0] for path in models(run)],
        samples.by_task(),
        samples.by_target(),
        projector=Projector(methods.proj_dim),
        ridge=methods.estimate_ridge,
        solver=methods.estimate_solver,
    ).fit()


def estimated(name: str, masks: Tensor, output: Path, images: str) -> tuple[Tensor, Tensor]:
    """The pool and other subsets, and estimates of their scores (m,), kept in the folder."""
    path, settings = output / f"{name}-estimates.safetensors", {"pool": POOL, "drawn": DRAWN}
    if kept := read_tensors(path, settings):
        return kept[0]["masks"], kept[0]["scores"]
    n, density = masks.shape[1], float(masks.double().mean())
    others = bernoulli(n, DRAWN, density, seed=7)
    every = torch.cat([masks, leave_one_out(n, include_full=True), others]).unique(dim=0)
    scores = estimator(name, output, images).predict(every).mean(1)
    write_tensors(path, {"masks": every, "scores": scores}, settings)
    return every, scores


def errors(name: str, output: Path, images: str) -> dict[tuple[str, int], Tensor]:
    """By way and number of true scores, (splits, 2): error over variance, and Spearman."""
    masks, scores = pool(name, output, images)
    surrogate = fit_surrogate(*estimated(name, masks, output, images), noise_std=0.0)
    cheap = surrogate.predict(masks, observed=True)

    def affine(rows: Tensor) -> Tensor:
        basis = torch.stack([torch.ones_like(cheap), cheap], 1)
        return basis @ torch.linalg.lstsq(basis[rows], scores[rows, None]).solution[:, 0]

    def fitted(rows: Tensor, **options: Any) -> Tensor:
        prediction: Tensor = fit_surrogate(masks[rows], scores[rows], **options).predict(masks)
        return prediction

    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "surrogate alone": fitted,
        "estimate, affine": affine,
        "together": lambda rows: fitted(rows, estimates=surrogate),
    }
    found = {}
    for way, size in ((way, size) for way in ways for size in SIZES):
        parts = []
        for split in range(SPLITS):
            order = torch.randperm(POOL, generator=torch.Generator().manual_seed(split))
            held = order[-HELD:]
            true, predicted = scores[held], ways[way](order[:size])[held]
            error = (predicted - true).square().mean() / true.var()
            parts.append([float(error), float(lds(true, predicted, constant="zero")[0])])
        found[way, size] = torch.tensor(parts, dtype=torch.float64)
    return found


def table(found: dict[str, dict[tuple[str, int], Tensor]]) -> str:
    """Mean error over variance of each way, and Spearman in brackets."""
    rows = [
        [name, way]
        + [f"{by[way, size][:, 0].mean():.3f} ({by[way, size][:, 1].mean():.2f})" for size in SIZES]
        for name, by in found.items()
        for way in WAYS
    ]
    return markdown(["problem", "true scores", *map(str, SIZES)], rows)


def draw(found: dict[str, dict[tuple[str, int], Tensor]], path: Path) -> None:
    with saved_figure(path, 3.1 * len(found), 3.0) as figure:
        panels: Any = figure.subplots(1, len(found), squeeze=False)[0]
        for axes, (name, by) in zip(panels, found.items(), strict=True):
            for way, colour in WAYS.items():
                tables = torch.stack([by[way, size][:, 0] for size in SIZES])
                mean, error = tables.mean(1), tables.std(1) / SPLITS**0.5
                axes.errorbar(SIZES, mean, error, color=colour, marker=".", label=way)
            axes.set(xscale="log", yscale="log", title=name)
            low, high = axes.get_ylim()
            shown = [tick for tick in (0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1) if low < tick < high]
            axes.set_xticks((10, 20, 40, 80, 160), ("10", "20", "40", "80", "160"))
            axes.set_yticks(shown, map(str, shown))
            axes.minorticks_off()
            axes.set_xlabel("retrained subsets")
        panels[0].set_ylabel("squared error / variance")
        panels[-1].legend(frameon=False, fontsize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/learning_curve"))
    parser.add_argument("--only", default="digits,addition,cifar")
    parser.add_argument("--cifar", default="runs/data", metavar="PATH", help="where its images are")
    options = parser.parse_args()
    output, names = options.output, options.only.split(",")
    output.mkdir(parents=True, exist_ok=True)
    with joblib.parallel_config("loky", n_jobs=-1, inner_max_num_threads=1):
        for name in names:
            pool(name, output, options.cifar)
    with one_thread():
        found = {name: errors(name, output, options.cifar) for name in names}
    write_text(output / "learning_curve.md", table(found))
    draw(found, output / "learning_curve.png")


if __name__ == "__main__":
    main()
