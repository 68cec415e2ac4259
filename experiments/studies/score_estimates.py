"""How well scores are estimated without retraining, against really retrained networks.

    python -m experiments.studies.score_estimates [--output DIR] [--only digits,addition] [--cost]

Two problems, 25 tasks, 100 subsets, two seeds each: a perceptron on scikit-learn's digits with five
spoilt groups, and a transformer of two layers on addition mod 25, its tasks the 5 x 5 grid of the
two summands. Networks are trained on all tasks, for as long as a retraining and for less;
scores of the subsets are estimated from two of them and calibrated on 12 retrained subsets, and
judged on the other 88. ``seed to seed`` is the ceiling: one retraining as estimate of the other.
Retraining is resumable (``--output``); minutes on two cores. ``--cost`` judges nothing, but has the
processor seconds of every step from a network to attributions by 1,000 estimated subsets.
"""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.modular_arithmetic.model import Block
from ksm_ext import (
    GradientEstimator,
    Projector,
    RetrainedScores,
    attribute_tasks,
    fit_surrogate,
    retrain_scores,
)
from ksm_ext.evaluation import lds, relative_error
from ksm_ext.subsets import bernoulli, mixed_sizes

NUM_TASKS, NUM_SUBSETS, NUM_CALIBRATION, SEEDS = 25, 100, 12, (0, 1)


@dataclass(frozen=True)
class Problem:
    """Samples in tasks, a target, a network and how long it is trained.

    Attributes:
        inputs: (b, ...), sorted by task. ``labels`` (b,) and ``task`` (b,) beside them.
        target: Inputs and labels of the samples whose mean loss is the score.
        network: Makes one, at its random start.
        num_steps: Steps of a retraining by AdamW; ``checkpoints`` that are tried, in steps.
        probability: That a task is in a subset.
    """

    inputs: Tensor
    labels: Tensor
    task: Tensor
    target: tuple[Tensor, Tensor]
    network: Callable[[], nn.Module]
    num_steps: int
    checkpoints: tuple[int, ...]
    batch_size: int
    learning_rate: float
    weight_decay: float
    probability: float

    def tasks(self) -> list[tuple[Tensor, Tensor]]:
        parts = [self.task == number for number in range(NUM_TASKS)]
        return [(self.inputs[part], self.labels[part]) for part in parts]


def digits() -> Problem:
    data = load_digits()
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(data.data), generator=generator)
    x, y = torch.from_numpy(data.data[order] / 16).float(), torch.from_numpy(data.target[order])
    task = torch.arange(1000) // 40
    labels = y[:1000].clone()
    for spoilt in torch.randperm(NUM_TASKS, generator=generator)[:5].tolist():
        rows = (task == spoilt).nonzero()[:, 0]
        labels[rows] = labels[rows[torch.randperm(40, generator=generator)]]

    def network() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    target = x[1000:], y[1000:]
    return Problem(
        x[:1000], labels, task, target, network, 400, (60, 200, 400), 50, 0.01, 1e-3, 0.7
    )


class Transformer(nn.Module):
    """Logits of the sum from the last of three tokens: a, b and a question mark."""

    def __init__(self, modulus: int, width: int = 64) -> None:
        super().__init__()
        self.tokens = nn.Embedding(modulus + 1, width)
        self.places = nn.Parameter(0.02 * torch.randn(3, width))
        self.blocks = nn.Sequential(*(Block(width, 4, "relu", causal=False) for _ in range(2)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, modulus))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.tokens(x) + self.places)[:, -1])


def addition(modulus: int = 25) -> Problem:
    a, b = torch.meshgrid(torch.arange(modulus), torch.arange(modulus), indexing="ij")
    a, b = a.flatten(), b.flatten()
    task = a * 5 // modulus * 5 + b * 5 // modulus
    order = task.argsort(stable=True)
    x = torch.stack([a, b, torch.full_like(a, modulus)], 1)[order]
    y, task = ((a + b) % modulus)[order], task[order]
    held = torch.rand(len(x), generator=torch.Generator().manual_seed(0)) < 0.3
    target = x[held], y[held]
    samples, training = (x[~held], y[~held], task[~held]), (180, (45, 75, 105, 180), 128, 1e-3, 1.0)
    return Problem(*samples, target, lambda: Transformer(modulus), *training, 0.75)


PROBLEMS = {"digits": digits, "addition": addition}


def train(problem: Problem, mask: Tensor, seed: int, num_steps: int) -> nn.Module:
    torch.manual_seed(seed)
    model = problem.network()
    rows = mask[problem.task].nonzero()[:, 0]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=problem.learning_rate, weight_decay=problem.weight_decay, fused=True
    )
    for _ in range(num_steps):
        batch = rows[torch.randint(len(rows), (problem.batch_size,))]
        optimizer.zero_grad()
        cross_entropy(model(problem.inputs[batch]), problem.labels[batch]).backward()
        optimizer.step()
    return model


def retrain(
    name: str, masks: Tensor, store: Path, seeds: tuple[int, ...] = SEEDS
) -> RetrainedScores:
    def score(mask: Tensor, seed: int) -> float:
        problem = PROBLEMS[name]()
        x, y = problem.target
        with torch.enable_grad():
            model = train(problem, mask, seed, problem.num_steps)
        with torch.no_grad():
            return float(cross_entropy(model(x), y))

    return retrain_scores(score, masks, seeds=seeds, n_jobs=-1, store=store)


def row(name: str, true: Tensor, estimate: Tensor) -> None:
    squared = float(relative_error(true, estimate, definition="squared"))
    absolute = float(relative_error(true, estimate, definition="absolute"))
    print(
        f"| {name} | {float(lds(true, estimate)):.3f} | {squared:.4f} | {absolute:.3f} |",
        flush=True,
    )


def report(name: str, output: Path) -> None:
    problem = PROBLEMS[name]()
    masks = bernoulli(NUM_TASKS, NUM_SUBSETS, problem.probability, seed=1)
    truth = retrain(name, masks, output / f"{name}.sqlite")
    everything = torch.ones(NUM_TASKS, dtype=torch.bool)
    started = time.perf_counter()
    train(problem, everything, 99, problem.num_steps)
    retraining = time.perf_counter() - started
    print(f"\n### {name}: one retraining {retraining:.2f} s\n")
    print("| estimate | Spearman | mean squared relative error | mean relative error |")
    print("|---|---|---|---|")
    first, second = (truth.values[number] for number in range(2))
    row("seed to seed", first, second)
    few, rest = masks[:NUM_CALIBRATION], masks[NUM_CALIBRATION:]
    mean = truth.mean
    for steps in problem.checkpoints:
        models = [train(problem, everything, 100 + number, steps) for number in range(2)]
        for solver in ("exact", "step"):
            estimator = GradientEstimator(
                models,
                problem.tasks(),
                problem.target,
                projector=Projector(1024),
                solver=solver,
                progress=False,
            ).fit()
            label = f"{steps} steps, {solver}"
            row(
                f"{label}, ridge {estimator.ridge:.2g} as chosen",
                mean[NUM_CALIBRATION:],
                estimator.predict(rest),
            )
            estimator.calibrate(few, mean[:NUM_CALIBRATION])
            label = f"{label}, calibrated to ridge {estimator.ridge:.2g}"
            row(label, mean[NUM_CALIBRATION:], estimator.predict(rest))


def cost(name: str, repeats: int = 5) -> None:
    """The least processor seconds of each step, and as shares of one retraining."""
    problem = PROBLEMS[name]()
    everything = torch.ones(NUM_TASKS, dtype=torch.bool)
    model = train(problem, everything, 100, problem.num_steps)
    data = problem.tasks(), problem.target
    seconds: dict[str, float] = {}

    def timed(step: str, run: Callable[[], Any]) -> Any:
        started = time.process_time()
        answer = run()
        spent = time.process_time() - started
        seconds[step] = min(spent, seconds.get(step, math.inf))
        return answer

    for _ in range(repeats):
        timed("one retraining", lambda: train(problem, everything, 99, problem.num_steps))
        for solver in ("exact", "step"):
            options: dict[str, Any] = {"projector": Projector(256), "solver": solver}
            estimator = GradientEstimator(model, *data, **options)
            timed(f"{solver}: features", estimator.fit)
            masks = mixed_sizes(NUM_TASKS, 1000, range(NUM_TASKS // 2, NUM_TASKS), seed=0)
            scores = timed(f"{solver}: 1,000 estimates", partial(estimator.predict, masks))
            surrogate = timed(f"{solver}: surrogate", partial(fit_surrogate, masks, scores))
            timed(f"{solver}: attributions", partial(surrogate.attribute, "loo", return_std=True))
            whole = partial(attribute_tasks, model, *data, **options)
            timed(f"{solver}: all in one call", whole)
    print(f"\n### {name}\n\n| step | processor seconds | retrainings |\n|---|---|---|")
    for step, spent in seconds.items():
        print(f"| {step} | {spent:.3f} | {spent / seconds['one retraining']:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/score_estimates"))
    parser.add_argument("--only", default=",".join(PROBLEMS))
    parser.add_argument("--cost", action="store_true", help="measure times instead of errors")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        if options.cost:
            cost(name)
        else:
            report(name, options.output)


if __name__ == "__main__":
    main()
