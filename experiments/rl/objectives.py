"""Objectives as tasks, and their weights as a mixture: which weights to train a policy under.

A policy is trained on one reward, the objectives of an environment of mo-gymnasium weighed; its
scores are its mean returns in each objective by itself. A surrogate of mixtures is fitted to them,
and asked for the weights whose policy is best: in the mean of the objectives, and in the least of
them, each from 0 to 1 over what was seen of it.

Shapes: n objectives, weights (m, n), scores (m, n).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from experiments.common import markdown, one_thread, saved_figure, write_json, write_text
from experiments.experiment import Run
from experiments.folds import held_out, split
from experiments.rl.gym_environments import batch_of
from experiments.rl.model import Policies
from experiments.rl.ppo import train
from experiments.rl.settings import Objectives, RLSettings
from experiments.rl.truth import CHOSEN_SEED
from experiments.settings import as_dict
from ksm_ext import Surrogate, fit_surrogate, retrain_scores
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.selection import best_mixture
from ksm_ext.subsets import dirichlet

SURROGATES = {"ridge": "linear", "kernel, rbf": "rbf", "of its own choice": "auto"}


def available() -> str:
    """What is missing, if something is."""
    try:
        import mo_gymnasium  # noqa: F401
    except ImportError as error:
        return f"mo-gymnasium is missing ({error}): pip install '.[rl]'"
    return ""


def environment(name: str) -> Any:
    import mo_gymnasium

    return mo_gymnasium.make(name)


def trained(run: Run, name: str, part: str, weights: Tensor, seeds: Sequence[int]) -> Tensor:
    """Scores (num_seeds, m, n) of weights (m, n), from the store or by training."""
    objectives = run.settings.objectives
    size = min(objectives.batch, len(weights))
    rows = torch.arange(-(-len(weights) // size) * size) % len(weights)
    batches = weights[rows].view(-1, size, weights.shape[1])
    own = {x: getattr(objectives, x) for x in ("num_episodes", "training")}
    settings = RLSettings(model=run.settings.model, objectives=Objectives(**own))
    scores = retrain_scores(
        partial(_score, settings, name, batches.tolist()),  # others would shut the store
        torch.eye(len(batches), dtype=torch.bool),  # a batch goes by its number
        seeds=seeds,
        store=run.output / f"scores-{name}-{part}.sqlite",
        settings={"model": as_dict(settings.model), "num_episodes": objectives.num_episodes}
        | {"training": as_dict(objectives.training)},
        on_change=run.on_change,
    )
    return scores.values.reshape(len(seeds), len(rows), -1)[:, : len(weights)]


def _score(
    settings: RLSettings, name: str, batches: list[list[list[float]]], mask: Tensor, seed: int
) -> Tensor:
    """Scores of policies trained under the weights whose batch ``mask`` marks."""
    weights = torch.tensor(batches, dtype=torch.float64)[mask][0]
    return returns(settings, name, weights, seed).flatten()


def returns(settings: RLSettings, name: str, weights: Tensor, seed: int) -> Tensor:
    """Scores (p, n) of policies trained under weights (p, n)."""
    training, generator = settings.objectives.training, torch.Generator().manual_seed(seed)
    make = partial(environment, name)
    batch = batch_of(make, weights, training.num_environments, generator)
    inputs, actions = batch.observations.shape[-1], int(make().action_space.n)
    policies = Policies(len(weights), inputs, actions, settings.model, seed)
    train(policies, batch, torch.ones(batch.observations.shape[:2]), training, generator)
    count = settings.objectives.num_episodes
    return evaluated(policies, batch_of(make, weights, count, generator), generator)


@torch.no_grad()
def evaluated(policies: Policies, batch: Any, generator: torch.Generator) -> Tensor:
    """Mean returns (p, n) in each objective, of the first episode of every environment."""
    total = torch.zeros_like(batch.objectives)
    going = torch.ones(total.shape[:2], dtype=torch.bool)
    while going.any():
        step = batch.step(policies.sample(policies.said(batch.observations), generator))
        total += going[..., None] * batch.objectives
        going &= ~(step.terminated | step.truncated)
    return total.mean(1)


@one_thread()
def chosen(weights: Tensor, utilities: dict[str, Tensor], confidence: float) -> dict[str, Tensor]:
    """Weights (n,) by how they were chosen, for each of the utilities (m,)."""
    n = weights.shape[1]
    found = {"uniform": torch.full((n,), 1 / n, dtype=torch.float64)}
    for aim, values in utilities.items():
        found[f"best {aim} of those tried"] = weights[values.argmax()]
        for kernel, called in (("auto", "surrogate"), ("linear", "ridge")):
            fitted = fit_surrogate(weights, values, kernel=kernel)
            best = best_mixture(fitted, maximize=True, confidence=confidence)
            found[f"best {aim}, {called}"] = best.shares
    return found


def compare(run: Run, name: str) -> None:
    """Surrogates over weights, and what is trained under the weights that they choose."""
    settings = run.settings.objectives
    n = len(environment(name).unwrapped.reward_space.low)
    weights = dirichlet(n, settings.num_mixtures, seed=settings.seed)
    scores = trained(run, name, "mixtures", weights, range(settings.num_seeds))
    means = scores.mean(0)
    low, high = means.amin(0), means.amax(0)

    def utilities(table: Tensor) -> dict[str, Tensor]:
        scaled = (table - low) / (high - low)
        return {"mean": scaled.mean(-1), "least": scaled.amin(-1)}

    tried = {aim: values.mean(0) for aim, values in utilities(scores).items()}
    ways = chosen(weights, tried, settings.confidence)
    seeds = range(CHOSEN_SEED, CHOSEN_SEED + settings.chosen_seeds)
    again = trained(run, name, "chosen", torch.stack([*ways.values()]), seeds)
    gained = utilities(again)  # (num_seeds, ways) each
    rows = [
        [way, ", ".join(f"{x:.2f}" for x in shares.tolist())]
        + [_spelled(values[:, number]) for values in gained.values()]
        for number, (way, shares) in enumerate(ways.items())
    ]
    table = markdown(["weights", "", "mean of objectives", "least objective"], rows)
    note = (
        f"{name}, {n} objectives, {len(weights)} weights, {settings.num_seeds} seeds. "
        f"Chosen weights: {settings.chosen_seeds} other trainings, ± one standard error; "
        "objectives from 0 to 1 over the policies of the drawn weights."
    )
    text = f"{_quality(weights, scores)}\n\n{table}\n\n{note}\n"
    write_text(run.output / f"objectives-{name}.md", text)
    facts = {x: again[:, k].mean(0).tolist() for k, x in enumerate(ways)}
    write_json(run.output / f"objectives-{name}.json", facts)
    if n == 2:
        _draw(run, name, weights, scores)


@one_thread()
def _quality(weights: Tensor, scores: Tensor) -> str:
    """How well surrogates predict held-out weights, and one seed another."""
    means, folds = scores.mean(0), split(len(weights), 6)
    lines = []
    for called, kernel in SURROGATES.items():
        said = held_out(weights, means, folds, kernel=kernel)
        error = float(residual_error(means, said, pooled=True))
        lines.append([called, f"{float(lds(means, said).mean()):.3f}", f"{error:.3f}"])
    if len(scores) > 1:
        noise = scores.var(0).mean(0) / len(scores) / means.var(0)
        ranks = float(lds(scores[0], scores[1]).mean())
        lines.append(["one seed for another; noise", f"{ranks:.3f}", f"{float(noise.mean()):.3f}"])
    return markdown(["surrogate", "rank correlation, held out", "residual error"], lines)


def _spelled(values: Tensor) -> str:
    return f"{float(values.mean()):.3f} ± {float(values.std()) / len(values) ** 0.5:.3f}"


def _draw(run: Run, name: str, weights: Tensor, scores: Tensor) -> None:
    """Returns in two objectives by the weight of the first, and what a surrogate says."""
    grid = torch.linspace(0, 1, 200, dtype=torch.float64)
    fitted: Surrogate = fit_surrogate(weights, scores.mean(0))
    said, std = fitted.predict(torch.stack([grid, 1 - grid], 1), return_std=True)
    with saved_figure(run.output / f"objectives-{name}.png", 8.6, 3.6) as figure:
        for number, axes in enumerate(figure.subplots(1, 2)):
            for values in scores[..., number]:
                axes.plot(weights[:, 0], values, ".", color="#999999", markersize=4)
            axes.plot(grid, said[:, number], color="#0072b2")
            low, high = (said + sign * 1.96 * std for sign in (-1, 1))
            axes.fill_between(grid, low[:, number], high[:, number], color="#0072b2", alpha=0.15)
            axes.set(xlabel="weight of the first objective", ylabel=f"objective {number + 1}")
