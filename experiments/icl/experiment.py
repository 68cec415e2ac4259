"""The commands: train a model, run prompts, compare surrogates, select demonstrations.

A repetition has a pool, prompts and queries of its own; the comparison with leave-one-out effects
is that of the first. Everything run is kept in ``output/runs``, line by line, and run once.
"""

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from experiments import figures, table
from experiments.common import one_thread, saved_figure, write_json
from experiments.experiment import Command, Experiment, Run
from experiments.folds import from_the_others, split
from experiments.icl.data import Pool, draw_prompts, pool_of, write_prompts
from experiments.icl.embedding import estimate_losses
from experiments.icl.inference import runs_of
from experiments.icl.model import train
from experiments.icl.published import published
from experiments.icl.selection import select, selection_figure
from experiments.icl.settings import PRESETS, PromptSettings
from experiments.icl.surrogates import (
    RECIPES,
    Recipe,
    contexts,
    effects,
    exchanges,
    random_ensemble,
)
from experiments.runner import Program
from ksm_ext.atomic_write import write_whole
from ksm_ext.checks import message
from ksm_ext.evaluation import lds

NUM_CONTEXTS = 100  # of a surrogate's own leave-one-out effects, which cost nothing
SHOWN = ("kernel surrogate", "kernel surrogate, by position", "ridge", "random ensemble")


class InContext(Experiment):
    """Which demonstrations in a prompt help a language model."""

    settings: PromptSettings

    def pool(self, repetition: int) -> Pool:
        """Demonstrations and queries of a repetition."""
        return pool_of(self.settings.data, self.settings.prompts.seed + repetition)

    def prompts(self, repetition: int) -> list[list[int]]:
        """Random prompts of a repetition; those of the first have the published seed."""
        prompts, n = self.settings.prompts, self.settings.data.num_demonstrations
        return draw_prompts(n, prompts.size, prompts.count, prompts.seed + repetition)


def generate_prompts(run: Run) -> None:
    """Draw the prompts, and write them in the published layout."""
    path = run.output / f"{run.settings.data.task}_prompts.json"
    write_prompts(path, run.experiment.pool(0).demonstrations, run.experiment.prompts(0))
    print(f"{run.settings.prompts.count} prompts in {path}")


def run_inference(run: Run) -> None:
    """Losses and margins of all validation queries under all prompts."""
    for repetition in range(run.settings.methods.num_repetitions):
        runs, prompts = runs_of(run, repetition), run.experiment.prompts(repetition)
        losses, margins = runs.losses(prompts), runs.losses(prompts, "margin")
        failed, by_prompt = runs.failures(), losses.nanmean(1)
        print(
            f"repetition {repetition}: mean loss {float(losses.nanmean()):.3f}, by prompt "
            f"{float(by_prompt.min()):.3f} to {float(by_prompt.max()):.3f}; "
            f"{float((margins > 0).double().mean()):.0%} right; {len(failed)} failed"
            + (f", such as: {failed[0]['error']}" if failed else ""),
            flush=True,
        )


# -- the comparison -----------------------------------------------------------------------------


def _without_failures(losses: Tensor, *others: Tensor) -> list[Tensor]:
    """Columns of the queries that did not fail under any prompt.

    Raises:
        RuntimeError: If all failed.
    """
    kept = ~torch.cat([losses, *others]).isnan().any(0)
    if not bool(kept.any()):
        remedy = "Read the reasons in the results' lines with an error."
        raise RuntimeError(message("queries", "some that run under all prompts", "none", remedy))
    return [x[:, kept] for x in (losses, *others)]


def leave_one_out(run: Run) -> tuple[Tensor, Tensor]:
    """Random prompts' losses (m, t), and effects by group of contexts (g, n, t)."""
    sizes, n = run.settings.prompts, run.settings.data.num_demonstrations
    runs, parts, which = runs_of(run, 0), [], []
    for seed in range(1000, 1000 + sizes.loo_groups):
        prompts, numbers = exchanges(contexts(n, sizes.size, sizes.loo_contexts, seed), n, seed)
        parts.append(runs.losses(prompts.tolist()))
        which.append(numbers)
    losses, *parts = _without_failures(runs.losses(run.experiment.prompts(0)), *parts)
    pairs = zip(parts, which, strict=True)
    return losses, torch.stack([effects(x, numbers, n, sizes.loo_contexts) for x, numbers in pairs])


def _held_out(
    recipe: Recipe, prompts: Tensor, losses: Tensor, n: int, folds: list[Tensor]
) -> Tensor:
    """(m, t): losses of each fold's prompts as a fit to the others predicts them."""
    return from_the_others(
        folds, lambda others, fold: recipe.fit(prompts[others], losses[others], n)(prompts[fold])
    )


@one_thread()
def compare(run: Run) -> None:
    """The table of surrogates against prompts and leave-one-out effects that were really run."""
    sizes, n = run.settings.prompts, run.settings.data.num_demonstrations
    losses, loo = leave_one_out(run)
    prompts = torch.tensor(run.experiment.prompts(0))
    folds = split(len(prompts), sizes.num_folds)
    results = table.Results(loo, losses[None], folds)
    context = contexts(n, sizes.size, NUM_CONTEXTS, 7)
    exchanged, which = exchanges(context, n, 7)
    rows, answers = [], {}

    def judge(name: str, predicted: Tensor, seconds: float) -> None:
        rows.append(table.judge(name, results, answers[name], predicted, len(prompts), seconds))

    for name, recipe in RECIPES.items():
        start = perf_counter()
        predicted = _held_out(recipe, prompts, losses, n, folds)
        predict = recipe.fit(prompts, losses, n)
        answers[name] = effects(predict(exchanged), which, n, len(context))
        judge(name, predicted, perf_counter() - start)

    def ensemble(others: Tensor, fold: Tensor) -> Tensor:
        added = random_ensemble(prompts[others], losses[others], n)[prompts[fold]].sum(1)
        return losses[others].mean(0) + added

    answers["random ensemble"] = random_ensemble(prompts, losses, n)
    judge("random ensemble", from_the_others(folds, ensemble), 0.0)
    ceiling, _ = table.ceiling(results)
    note = f"Ceiling, half of the contexts against the other half: leave-one-out {ceiling:.2f}."
    table.write(rows, note, run.output, unit="prompts")
    write_whole(run.output / "attributions.safetensors", save(answers | {"truth": loo.mean(0)}))


# -- the figures --------------------------------------------------------------------------------


@one_thread()
def make_figures(run: Run) -> None:
    """Linear and kernel, sample complexity, attributions, selection."""
    n, output = run.settings.data.num_demonstrations, run.output
    prompts = torch.tensor(run.experiment.prompts(0))
    (losses,) = _without_failures(runs_of(run, 0).losses(prompts.tolist()))
    masks = RECIPES["ridge"].features(prompts, n)
    if not (output / "attributions.safetensors").exists():
        compare(run)
    answers = load_file(output / "attributions.safetensors")
    mislabelled = torch.tensor(run.experiment.pool(0).mislabelled)
    _predicted_and_run(prompts, losses, n, run.settings.prompts.num_folds, output)
    mean = losses.mean(1, keepdim=True)  # one target: many fits, each a quick one
    found = figures.sample_complexity(masks, mean, output / "sample_complexity.png")
    figures.attributions_and_truth(
        answers["truth"],
        {name: answers[name] for name in SHOWN},
        output / "attributions_and_truth.png",
        special=mislabelled[:, None].expand_as(answers["truth"]),
        meaning="mislabelled",
    )
    selection_figure(run)
    write_json(output / "figures.json", {"sample complexity": found})


def _predicted_and_run(
    prompts: Tensor, losses: Tensor, n: int, num_folds: int, output: Path
) -> None:
    """Mean loss of held-out prompts: what a line and a kernel say, and what was run."""
    folds, true = split(len(prompts), num_folds), losses.mean(1)
    ends = [float(true.min()), float(true.max())]
    with saved_figure(output / "linear_and_kernel.png", 6.4, 3.2) as figure:
        panels: Any = figure.subplots(1, 2, sharex=True, sharey=True)
        for axes, name in zip(panels, ("ridge", "kernel surrogate"), strict=True):
            predicted = _held_out(RECIPES[name], prompts, losses, n, folds).mean(1)
            axes.plot(predicted, true, ".", color="#d55e00" if name == "ridge" else "#0072b2")
            axes.plot(ends, ends, color="#cccccc", linewidth=0.8)
            rank = float(lds(true, predicted, constant="zero")[0])
            axes.set_title(f"{name}, Spearman {rank:.2f}", fontsize=9)
            axes.set(xlabel="predicted mean loss")
        panels[0].set_ylabel("mean loss, run")


COMMANDS: dict[str, Command] = {
    "train-model": train,
    "generate-prompts": generate_prompts,
    "run-inference": run_inference,
    "fit": compare,
    "estimate": estimate_losses,
    "select": select,
    "published": published,
    "figures": make_figures,
}
PROGRAM = Program(
    "icl", "Which demonstrations help a language model.", InContext, PRESETS, COMMANDS
)
