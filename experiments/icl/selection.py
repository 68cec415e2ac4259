"""Choose demonstrations by each method, with the same number of prompts run, and judge the choice.

Methods look at losses of the validation queries; what they choose is run on the test queries. A
method that says nothing of order is judged by the mean over several orders.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import t
from torch import Tensor

from experiments.common import markdown, one_thread, saved_figure, write_json, write_text
from experiments.experiment import Run
from experiments.icl.data import Example, Pool
from experiments.icl.inference import LanguageModel, Runs, runs_of
from experiments.icl.settings import PromptSettings
from experiments.icl.surrogates import (
    RECIPES,
    Predict,
    Recipe,
    contexts,
    effects,
    exchanges,
    random_ensemble,
)
from ksm_ext.selection import top_k

NUM_STARTS = 12


@dataclass(frozen=True, eq=False)
class Task:
    """What a method chooses from.

    Attributes:
        settings: What the experiment depends on.
        pool: Demonstrations and queries.
        runs: What is run on the validation queries.
        prompts: (m, k) random prompts.
        losses: (m, t) their losses.
        seed: For what a method draws.
    """

    settings: PromptSettings
    pool: Pool
    runs: Runs
    prompts: Tensor
    losses: Tensor
    seed: int

    @property
    def num_demonstrations(self) -> int:
        return len(self.pool.demonstrations)

    @property
    def size(self) -> int:
        return self.prompts.shape[1]


@dataclass(frozen=True)
class Choice:
    """Demonstrations, and whether their order is part of the choice."""

    prompts: list[list[int]]
    ordered: bool = False


def local_search(predict: Predict, starts: Tensor, num_demonstrations: int) -> list[list[int]]:
    """Ordered prompts at which no single exchange lowers the predicted mean loss, best first.

    From each start, the best demonstration for one place after the other, until none changes.
    """
    found: dict[tuple[int, ...], float] = {}
    for start in starts.tolist():
        prompt, best, stale, place = list(start), float("inf"), 0, 0
        while stale < len(prompt):
            ways = _ways(prompt, place, num_demonstrations)
            losses = predict(torch.tensor(ways)).mean(1)
            if float(losses.min()) < best - 1e-12:
                best, prompt, stale = float(losses.min()), ways[int(losses.argmin())], 0
            stale, place = stale + 1, (place + 1) % len(prompt)
        found[tuple(prompt)] = best
    return [list(prompt) for prompt in sorted(found, key=found.__getitem__)]


def _ways(prompt: list[int], place: int, num_demonstrations: int) -> list[list[int]]:
    """A prompt with each demonstration at a place, its own among them."""
    before, after = prompt[:place], prompt[place + 1 :]
    numbers = (x for x in range(num_demonstrations) if x not in before + after)
    return [[*before, number, *after] for number in numbers]


def _searched(
    recipe: Recipe, prompts: Tensor, losses: Tensor, num_demonstrations: int
) -> tuple[Predict, list[list[int]]]:
    """A fit to some prompts, and where the search from the best of them ends."""
    predict = recipe.fit(prompts, losses, num_demonstrations)
    starts = prompts[losses.mean(1).argsort()[:NUM_STARTS]]
    return predict, local_search(predict, starts, num_demonstrations)


def by_surrogate(name: str, task: Task) -> Choice:
    """The best prompt that a surrogate of the random prompts predicts."""
    recipe = RECIPES[name]
    _, found = _searched(recipe, task.prompts, task.losses, task.num_demonstrations)
    return Choice(found[:1], ordered=recipe.order != "set")


def guided(task: Task) -> Choice:
    """Part of the prompts at random, the others where the surrogate says that they are best.

    After each round the surrogate is fitted anew; the answer is the best prompt that was run.
    """
    methods, n = task.settings.methods, task.num_demonstrations
    later = round(methods.guided_share * len(task.prompts))
    per_round = later // methods.num_rounds
    first = len(task.prompts) - per_round * methods.num_rounds
    prompts, losses = task.prompts[:first], task.losses[:first]
    recipe = RECIPES["kernel surrogate, by position"]
    for _ in range(methods.num_rounds):
        predict, tops = _searched(recipe, prompts, losses, n)
        near = [way for top in tops for place in range(task.size) for way in _ways(top, place, n)]
        known = prompts.tolist()
        ways = [list(x) for x in dict.fromkeys(map(tuple, tops + near)) if list(x) not in known]
        order = predict(torch.tensor(ways)).mean(1).argsort()
        new = torch.tensor([ways[i] for i in order[:per_round]])
        prompts = torch.cat([prompts, new])
        losses = torch.cat([losses, task.runs.losses(new.tolist())])
    return Choice([prompts[losses.mean(1).argmin()].tolist()], ordered=True)


def at_random(task: Task) -> Choice:
    """Nothing known: the mean over random sets."""
    draw = random.Random(task.seed)
    n, count = task.num_demonstrations, task.settings.methods.num_random
    return Choice([draw.sample(range(n), task.size) for _ in range(count)], ordered=True)


def by_similarity(task: Task) -> Choice:
    """The demonstrations whose texts (TF-IDF) are most similar to the queries'."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = [x.input for x in (*task.pool.demonstrations, *task.pool.validation)]
    table = TfidfVectorizer().fit_transform(texts)
    split = task.num_demonstrations
    alike = torch.from_numpy((table[:split] @ table[split:].T).toarray()).mean(1)
    return Choice([top_k(alike, task.size, maximize=True).tolist()])


def by_embedding(task: Task) -> Choice:
    """The same with the mean of the language model's last hidden states."""
    model = task.runs.model
    parts = [mean_states(model, x) for x in (task.pool.demonstrations, task.pool.validation)]
    shown, asked = (x / x.norm(dim=1, keepdim=True) for x in parts)
    return Choice([top_k((shown @ asked.T).mean(1), task.size, maximize=True).tolist()])


@torch.inference_mode()
def mean_states(model: LanguageModel, examples: Sequence[Example]) -> Tensor:
    """(n, width): the mean over a text's own tokens of their last hidden states."""
    rows = []
    for example in examples:
        ids, opening = model.tokens(example.input)
        inputs = torch.tensor([ids], device=model.model.device)
        states = model.model(inputs, output_hidden_states=True).hidden_states[-1]
        rows.append(states[0, opening:].mean(0).float().cpu())
    return torch.stack(rows)


def by_leave_one_out(task: Task) -> Choice:
    """The demonstrations of the best measured effect, from as many prompts as the others run."""
    n, k = task.num_demonstrations, task.size
    count = max(1, len(task.prompts) // (n - k + 1))
    prompts, which = exchanges(contexts(n, k, count, task.seed), n, task.seed)
    found = effects(task.runs.losses(prompts.tolist()), which, n, count)
    return Choice([top_k(found, k, maximize=False).tolist()])


def by_random_ensemble(task: Task) -> Choice:
    """The demonstrations whose random prompts did best."""
    found = random_ensemble(task.prompts, task.losses, task.num_demonstrations)
    return Choice([top_k(found, task.size, maximize=False).tolist()])


def greedy(task: Task) -> Choice:
    """One demonstration after the other, each the best of all that are really run."""
    prompt: list[int] = []
    for _ in range(task.size):
        numbers = (i for i in range(task.num_demonstrations) if i not in prompt)
        ways = [[*prompt, number] for number in numbers]
        prompt = ways[int(task.runs.losses(ways).mean(1).argmin())]
    return Choice([prompt], ordered=True)


SELECTORS: dict[str, Callable[[Task], Choice]] = {
    "random": at_random,
    "similarity, TF-IDF": by_similarity,
    "similarity, embeddings": by_embedding,
    "leave-one-out": by_leave_one_out,
    "ridge": partial(by_surrogate, "ridge"),
    "random ensemble": by_random_ensemble,
    "greedy forward": greedy,
    "kernel surrogate": partial(by_surrogate, "kernel surrogate"),
    "kernel surrogate, by position": partial(by_surrogate, "kernel surrogate, by position"),
    "kernel surrogate, guided": guided,
}


def judged(choice: Choice, runs: Runs, num_orders: int, seed: int) -> float:
    """Mean test loss of a choice."""
    draw = random.Random(seed)
    prompts = choice.prompts
    if not choice.ordered:
        prompts = [draw.sample(p, len(p)) for p in prompts for _ in range(num_orders)]
    return float(runs.losses(prompts).nanmean())


# -- the command --------------------------------------------------------------------------------


def select(run: Run) -> dict[str, list[float]]:
    """Test loss of the demonstrations that each method chooses, by repetition."""
    chosen: list[dict[str, Any]] = []
    for repetition in range(run.settings.methods.num_repetitions):
        facts = list(_choices(run, repetition))
        line = ", ".join(f"{fact['method']} {fact['test loss']:.3f}" for fact in facts)
        print(f"repetition {repetition}: {line}", flush=True)
        chosen += facts
    found = {
        name: [fact["test loss"] for fact in chosen if fact["method"] == name] for name in SELECTORS
    }
    chosen = [fact for fact in chosen if fact["method"] != "random"]
    write_json(run.output / "selection.json", {"test loss": found, "chosen": chosen})
    write_text(run.output / "selection.md", selection_table(found))
    return found


def _choices(run: Run, repetition: int) -> Iterator[dict[str, Any]]:
    settings, pool = run.settings, run.experiment.pool(repetition)
    prompts, seed = run.experiment.prompts(repetition), settings.prompts.seed + repetition
    runs, test = runs_of(run, repetition).whole(prompts), runs_of(run, repetition, "test")
    task = Task(settings, pool, runs, torch.tensor(prompts), runs.losses(prompts), seed)
    for name, selector in SELECTORS.items():
        with one_thread():
            choice = selector(task)
        yield {
            "repetition": repetition,
            "method": name,
            "demonstrations": choice.prompts[0],
            "mislabelled": sum(pool.mislabelled[i] for i in choice.prompts[0]),
            "test loss": judged(choice, test, settings.methods.num_orders, seed),
        }


def with_interval(values: Any) -> tuple[float, float]:
    """Mean over repetitions, and half of its 95 % interval (Student)."""
    values = np.asarray(values)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean()), float(half)


def selection_table(found: dict[str, list[float]]) -> str:
    """Test losses, and what the surrogate saves against each, repetition by repetition."""
    best, rows = np.asarray(found["kernel surrogate, guided"]), []
    for name, values in sorted(found.items(), key=lambda item: np.mean(item[1])):
        mean, half = with_interval(values)
        less, spread = with_interval(best - np.asarray(values))
        cells = [f"{mean:.3f} ± {half:.3f}", f"{less:+.3f} ± {spread:.3f}"]
        rows.append([name, *cells, f"{1 - best.mean() / mean:.0%}"])
    titles = ("method", "test loss", "guided surrogate less this", "lower loss by")
    return markdown(titles, rows) + "\n"


def selection_figure(run: Run) -> None:
    """Test loss of what each method chose, with the repetitions."""
    path = run.output / "selection.json"
    found = json.loads(path.read_text())["test loss"] if path.exists() else select(run)
    names = sorted(found, key=lambda name: -float(np.mean(found[name])))
    with saved_figure(run.output / "selection.png", 6.4, 3.4) as figure:
        axes = figure.subplots()
        for row, name in enumerate(names):
            mean, half = with_interval(found[name])
            colour = "#0072b2" if "surrogate" in name else "#999999"
            axes.plot(found[name], [row] * len(found[name]), ".", color=colour, alpha=0.5)
            axes.errorbar(mean, row, xerr=half, fmt="D", color=colour, markersize=4, capsize=3)
        axes.set_yticks(range(len(names)), names)
        axes.set(xlabel="mean loss on test queries (95 % interval over repetitions)")
