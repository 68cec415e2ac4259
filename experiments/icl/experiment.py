"""The commands: train a model, run prompts, compare surrogates, select demonstrations.

A repetition has a pool, prompts and queries of its own; the comparison with leave-one-out effects
is that of the first. Everything run is kept in ``output/runs``, line by line, and run once.
"""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from scipy.stats import t
from torch import Tensor

from experiments import figures, table
from experiments.common import new_figure, one_thread, save_figure, write_json
from experiments.folds import from_the_others, split
from experiments.icl import published
from experiments.icl.data import Pool, draw_prompts, pool_of, write_prompts
from experiments.icl.embedding import estimate
from experiments.icl.inference import LanguageModel, Runs, load_model
from experiments.icl.selection import SELECTORS, Task, judged
from experiments.icl.settings import Settings
from experiments.icl.surrogates import (
    RECIPES,
    Recipe,
    contexts,
    effects,
    exchanges,
    random_ensemble,
)
from experiments.icl.tiny import train_model
from experiments.settings import as_dict
from ksm_ext.atomic_write import write_whole
from ksm_ext.evaluation import lds, relative_error

NUM_CONTEXTS = 100  # of a surrogate's own leave-one-out effects, which cost nothing
ESTIMATED = "embedding gradients"
SHOWN = ("kernel surrogate", "kernel surrogate, by position", "ridge", "random ensemble")


@dataclass(frozen=True)
class Run:
    """Settings and the folder of results."""

    settings: Settings
    output: Path

    @cached_property
    def model(self) -> LanguageModel:
        """The language model; trained first where none is named."""
        train(self)
        settings = self.settings
        return load_model(settings.model, self.output / "model", settings.prompts.batch_size)

    def pool(self, repetition: int) -> Pool:
        """Demonstrations and queries of a repetition."""
        return pool_of(self.settings.data, self.settings.prompts.seed + repetition)

    def prompts(self, repetition: int) -> list[list[int]]:
        """Its random prompts; those of the first have the published seed."""
        some = self.settings.prompts
        n = self.settings.data.num_demonstrations
        return draw_prompts(n, some.size, some.count, some.seed + repetition)

    def runs(self, repetition: int, part: str = "validation") -> Runs:
        """What has been run on the queries of a part, ``"validation"`` or ``"test"``."""
        pool = self.pool(repetition)
        facts = {name: asdict(getattr(self.settings, name)) for name in ("data", "model")}
        return Runs(
            self.model,
            pool.demonstrations,
            getattr(pool, part),
            self.output / "runs" / f"repetition{repetition}-{part}.jsonl",
            facts | {"part": part, "repetition": repetition, "size": self.settings.prompts.size},
        )


def train(run: Run) -> None:
    """Train a small GPT on the task's text, unless a model is named.

    Raises:
        ValueError: If the one on disk was trained with other settings.
    """
    folder, mark = run.output / "model", run.output / "model" / "trained.json"
    if run.settings.model.name:
        return
    facts = as_dict(run.settings)
    facts = {"data": facts["data"], "model": facts["model"], "size": run.settings.prompts.size}
    if mark.exists():
        if json.loads(mark.read_text())["settings"] != facts:
            raise ValueError(
                f"`{folder}` must be a model of these settings, got one of others. Give another "
                "--output, or remove the folder."
            )
        return
    print("No pretrained model is named (`model.name`): a small GPT is trained here.", flush=True)
    start = perf_counter()
    with one_thread():
        losses = train_model(run.settings, folder)
    seconds = perf_counter() - start
    print(f"{seconds:.0f} s; loss after 0, 1, … demonstrations: {losses}", flush=True)
    write_json(mark, {"settings": facts, "seconds": seconds, "loss by demonstrations": losses})


def generate_prompts(run: Run) -> None:
    """Draw the prompts, and write them in the published layout."""
    path = run.output / f"{run.settings.data.task}_prompts.json"
    write_prompts(path, run.pool(0).demonstrations, run.prompts(0))
    print(f"{run.settings.prompts.count} prompts in {path}")


def run_inference(run: Run) -> None:
    """Losses and margins of all validation queries under all prompts."""
    for repetition in range(run.settings.methods.num_repetitions):
        runs = run.runs(repetition)
        losses = runs.losses(run.prompts(repetition))
        margins = runs.losses(run.prompts(repetition), "margin")
        failed = runs.failures()
        print(
            f"repetition {repetition}: mean loss {float(losses.nanmean()):.3f}, by prompt "
            f"{float(losses.nanmean(1).min()):.3f} to {float(losses.nanmean(1).max()):.3f}; "
            f"{float((margins > 0).double().mean()):.0%} right; {len(failed)} failed"
            + (f", such as: {failed[0]['error']}" if failed else ""),
            flush=True,
        )


# -- the comparison -----------------------------------------------------------------------------


def _whole(losses: Tensor, *others: Tensor) -> list[Tensor]:
    """Columns of the queries that did not fail under any prompt.

    Raises:
        RuntimeError: If all failed.
    """
    kept = torch.stack([~x.isnan().any(0) for x in (losses, *others)]).all(0)
    if not bool(kept.any()):
        raise RuntimeError(
            "`queries` must be some that run under all prompts, got none. Read the reasons in the "
            "results' lines with an error."
        )
    return [x[:, kept] for x in (losses, *others)]


def leave_one_out(run: Run) -> tuple[Tensor, Tensor]:
    """Random prompts' losses (m, t), and effects by group of contexts (g, n, t)."""
    some, n = run.settings.prompts, run.settings.data.num_demonstrations
    runs, parts, which = run.runs(0), [], []
    for group in range(some.loo_groups):
        others = contexts(n, some.size, some.loo_contexts, 1000 + group)
        prompts, numbers = exchanges(others, n, 1000 + group)
        parts.append(runs.losses(prompts.tolist()))
        which.append(numbers)
    losses, exchanged = _whole(runs.losses(run.prompts(0)), torch.cat(parts))
    loo = torch.stack(
        [
            effects(part, numbers, n, some.loo_contexts)
            for part, numbers in zip(exchanged.chunk(some.loo_groups), which, strict=True)
        ]
    )
    return losses, loo


def _held_out(
    recipe: Recipe, prompts: Tensor, losses: Tensor, n: int, folds: list[Tensor]
) -> Tensor:
    """(m, t): losses of each fold's prompts as a fit to the others predicts them."""
    return from_the_others(
        folds,
        lambda others, fold: recipe.fit(prompts[others], losses[others], n)(prompts[fold]),
    )


@one_thread()
def compare(run: Run) -> dict[str, Tensor]:
    """The table of surrogates against prompts and leave-one-out effects that were really run."""
    some, n = run.settings.prompts, run.settings.data.num_demonstrations
    losses, loo = leave_one_out(run)
    prompts = torch.tensor(run.prompts(0))
    folds = split(len(prompts), some.num_folds)
    results = table.Results(loo, losses[None], folds)
    context = contexts(n, some.size, NUM_CONTEXTS, 7)
    exchanged, which = exchanges(context, n, 7)
    rows, answers = [], {}
    for name, recipe in RECIPES.items():
        start = perf_counter()
        said = _held_out(recipe, prompts, losses, n, folds)
        predict = recipe.fit(prompts, losses, n)
        answers[name] = effects(predict(exchanged), which, n, len(context))
        seconds = perf_counter() - start
        rows.append(table.judge(name, results, answers[name], said, len(prompts), seconds))

    def ensemble(others: Tensor, fold: Tensor) -> Tensor:
        added = random_ensemble(prompts[others], losses[others], n)[prompts[fold]].sum(1)
        return losses[others].mean(0) + added

    said = from_the_others(folds, ensemble)
    answers["random ensemble"] = random_ensemble(prompts, losses, n)
    rows.append(
        table.judge("random ensemble", results, answers["random ensemble"], said, len(prompts), 0.0)
    )
    text = table.markdown(rows).replace("trainings", "prompts")
    ceiling, _ = table.ceiling(results)
    text += (
        f"\n\nCeiling, half of the contexts against the other half: leave-one-out {ceiling:.2f}.\n"
    )
    print(f"\n{text}")
    write_whole(run.output / "table.md", text.encode())
    table.write(rows, run.output / "table.json")
    write_whole(run.output / "attributions.safetensors", save(answers | {"truth": loo.mean(0)}))
    return answers


@one_thread()
def estimate_losses(run: Run) -> None:
    """Prompts estimated from the gradients of a few, against prompts that were really run."""
    methods, n = run.settings.methods, run.settings.data.num_demonstrations
    runs, prompts = run.runs(0), torch.tensor(run.prompts(0))
    losses = runs.losses(prompts.tolist())
    fine = ~losses.isnan().any(0)
    losses = losses[:, fine]
    queries = [q for q, kept in zip(runs.queries, fine.tolist(), strict=True) if kept]
    few = methods.num_anchors
    start = perf_counter()
    made = estimate(run.model, runs.demonstrations, queries, prompts[:few], losses[:few])
    gradients = perf_counter() - start
    many = draw_prompts(n, prompts.shape[1], methods.num_estimated, run.settings.prompts.seed + 500)
    start = perf_counter()
    estimated = made.losses(torch.tensor(many))
    seconds = perf_counter() - start
    true, said = losses[few:], made.losses(prompts[few:])
    guess = losses[:few].mean(0).expand_as(true)
    recipe = RECIPES["kernel surrogate"]
    fitted = recipe.fit(torch.tensor(many), estimated, n)(prompts[few:])
    alone = recipe.fit(prompts[:few], losses[:few], n)(prompts[few:])
    facts: dict[str, Any] = {
        "anchors": few,
        "share": made.share,
        "nearest": made.nearest,
        "seconds of gradients": gradients,
        "prompts estimated": len(many),
        "seconds of estimates": seconds,
    }
    for name, values in (
        (ESTIMATED, said),
        ("surrogate of estimated prompts", fitted),
        ("surrogate of the anchors alone", alone),
        ("mean of the anchors", guess),
    ):
        facts[name] = {
            "relative error squared": float(
                relative_error(true, values, definition="squared").mean()
            ),
            "relative error": float(relative_error(true, values, definition="absolute").mean()),
            "relative error squared of the mean loss": float(
                relative_error(true.mean(1), values.mean(1), definition="squared")
            ),
            "spearman of the mean loss": float(
                lds(true.mean(1), values.mean(1), constant="zero")[0]
            ),
        }
        line = ", ".join(f"{key} {value:.3f}" for key, value in facts[name].items())
        print(f"{name}: {line}", flush=True)
    write_json(run.output / "estimate.json", facts)


# -- the selection ------------------------------------------------------------------------------


def select(run: Run) -> dict[str, list[float]]:
    """Test loss of the demonstrations that each method chooses, by repetition."""
    methods = run.settings.methods
    found: dict[str, list[float]] = {name: [] for name in SELECTORS}
    chosen = []
    for repetition in range(methods.num_repetitions):
        runs, test = run.runs(repetition), run.runs(repetition, "test")
        prompts = run.prompts(repetition)
        losses = runs.losses(prompts)
        if bool(losses.isnan().any()):  # selection needs one loss for every prompt
            kept = ~losses.isnan().any(0)
            queries = [q for q, fine in zip(runs.queries, kept.tolist(), strict=True) if fine]
            path = runs.path.with_name(f"repetition{repetition}-whole.jsonl")
            runs = Runs(run.model, runs.demonstrations, queries, path, runs.facts)
            losses = runs.losses(prompts)
        pool, seed = run.pool(repetition), run.settings.prompts.seed + repetition
        task = Task(run.settings, pool, runs, torch.tensor(prompts), losses, seed)
        for name, selector in SELECTORS.items():
            with one_thread():
                choice = selector(task)
            found[name].append(judged(choice, test, methods.num_orders, seed))
            if name != "random":
                wrong = sum(pool.mislabelled[i] for i in choice.prompts[0])
                chosen.append(
                    {
                        "repetition": repetition,
                        "method": name,
                        "demonstrations": choice.prompts[0],
                        "mislabelled": wrong,
                        "test loss": found[name][-1],
                    }
                )
        print(f"repetition {repetition}: " + _line(found), flush=True)
    write_json(run.output / "selection.json", {"test loss": found, "chosen": chosen})
    text = selection_table(found)
    print(f"\n{text}")
    write_whole(run.output / "selection.md", text.encode())
    return found


def _line(found: dict[str, list[float]]) -> str:
    return ", ".join(f"{name} {values[-1]:.3f}" for name, values in found.items())


def with_interval(values: Any) -> tuple[float, float]:
    """Mean over repetitions, and half of its 95 % interval (Student)."""
    values = np.asarray(values)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def selection_table(found: dict[str, list[float]]) -> str:
    """Test losses, and what the surrogate saves against each, repetition by repetition."""
    best = np.asarray(found["kernel surrogate, guided"])
    lines = [
        "| method | test loss | guided surrogate less this | lower loss by |",
        "|---|---|---|---|",
    ]
    for name, values in sorted(found.items(), key=lambda item: np.mean(item[1])):
        mean, half = with_interval(values)
        less, spread = with_interval(best - np.asarray(values))
        cells = [f"{mean:.3f} ± {half:.3f}", f"{less:+.3f} ± {spread:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {1 - best.mean() / mean:.0%} |")
    return "\n".join(lines) + "\n"


# -- published scores and figures ---------------------------------------------------------------


@one_thread()
def judge_published(run: Run) -> None:
    """How well the published scores are predicted."""
    if not run.settings.published.path:
        print("Skipped: `--set published.path=DIR` names the folder of the published scores.")
        return
    found = published.judge_published(run.settings.published)
    write_json(run.output / "published.json", found)
    text = published.markdown(found)
    print(text)
    write_whole(run.output / "published.md", text.encode())


@one_thread()
def make_figures(run: Run) -> None:
    """Linear and kernel, sample complexity, attributions, selection."""
    n, output = run.settings.data.num_demonstrations, run.output
    prompts = torch.tensor(run.prompts(0))
    (losses,) = _whole(run.runs(0).losses(prompts.tolist()))
    masks = RECIPES["ridge"].features(prompts, n)
    if not (output / "attributions.safetensors").exists():
        compare(run)
    answers = load_file(output / "attributions.safetensors")
    pool = run.pool(0)
    wrong = torch.tensor(pool.mislabelled)[:, None].expand_as(answers["truth"])
    _predicted_and_run(prompts, losses, n, run.settings.prompts.num_folds, output)
    mean = losses.mean(1, keepdim=True)  # one target: many fits, each a quick one
    found = figures.sample_complexity(masks, mean, output / "sample_complexity.png")
    figures.attributions_and_truth(
        answers["truth"],
        {name: answers[name] for name in SHOWN},
        output / "attributions_and_truth.png",
        special=wrong,
        meaning="mislabelled",
    )
    path = output / "selection.json"
    chosen = json.loads(path.read_text())["test loss"] if path.exists() else select(run)
    _selection_figure(chosen, output / "selection.png")
    write_json(output / "figures.json", {"sample complexity": found})


def _predicted_and_run(
    prompts: Tensor, losses: Tensor, n: int, num_folds: int, output: Path
) -> None:
    """Mean loss of held-out prompts: what a line and a kernel say, and what was run."""
    figure = new_figure(6.4, 3.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, name in zip(panels, ("ridge", "kernel surrogate"), strict=True):
        folds = split(len(prompts), num_folds)
        said = _held_out(RECIPES[name], prompts, losses, n, folds).mean(1)
        true = losses.mean(1)
        axes.plot(said, true, ".", color="#d55e00" if name == "ridge" else "#0072b2")
        low, high = float(true.min()), float(true.max())
        axes.plot([low, high], [low, high], color="#cccccc", linewidth=0.8)
        axes.set_title(
            f"{name}, Spearman {float(lds(true, said, constant='zero')[0]):.2f}", fontsize=9
        )
        axes.set(xlabel="predicted mean loss")
    panels[0].set_ylabel("mean loss, run")
    save_figure(figure, output / "linear_and_kernel.png")


def _selection_figure(found: dict[str, list[float]], path: Path) -> None:
    """Test loss of what each method chose, with the repetitions."""
    figure = new_figure(6.4, 3.4)
    axes = figure.subplots()
    names = sorted(found, key=lambda name: -float(np.mean(found[name])))
    for row, name in enumerate(names):
        mean, half = with_interval(found[name])
        colour = "#0072b2" if "surrogate" in name else "#999999"
        axes.plot(found[name], [row] * len(found[name]), ".", color=colour, alpha=0.5)
        axes.errorbar(mean, row, xerr=half, fmt="D", color=colour, markersize=4, capsize=3)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="mean loss on test queries (95 % interval over repetitions)")
    save_figure(figure, path)


COMMANDS = {
    "train-model": train,
    "generate-prompts": generate_prompts,
    "run-inference": run_inference,
    "fit": compare,
    "estimate": estimate_losses,
    "select": select,
    "published": judge_published,
    "figures": make_figures,
}
