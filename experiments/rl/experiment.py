"""The commands: what is trained, what methods say of it, and what is chosen by them.

Shapes: n tasks, which are the t targets too; masks (m, n), scores (m, t).
"""

from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from typing import Any

import joblib
import torch
from torch import Tensor

from experiments.common import (
    markdown,
    one_thread,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from experiments.experiment import Command, Run
from experiments.rl import judging, learning_curve, linearisation, objectives, selecting
from experiments.rl.data import suite_of
from experiments.rl.judging import Judge
from experiments.rl.methods import (
    FEW,
    RETRAINED,
    Answer,
    ControlProblem,
    Method,
    methods_for,
)
from experiments.rl.model import Policies
from experiments.rl.rollouts import seen_by, steps_of
from experiments.rl.settings import LEAST_JUDGED, PRESETS
from experiments.rl.truth import (
    CHOSEN_SEED,
    Control,
    edges,
    fitted_subsets,
    leave_one_out_agreement,
    retrained,
    train_judges,
    train_references,
    train_subsets,
)
from experiments.runner import Program
from experiments.settings import as_dict
from ksm_ext.checks import message

FIRST = ("kernel surrogate", "kernel surrogate, warped")
"""Methods that the others are compared with."""
MAIN = (
    *FIRST,
    "ridge datamodel",
    "ridge datamodel, warped",
    "surrogate of its own choice, warped",
    "kernel surrogate, calibrated",
    "counting camps, fitted and warped",
    "counting camps",
)
"""Methods that are also shown by each training that they are judged by."""
SIDES = {"own task allowed": False, "own task held out": True}


def each_suite(command: Callable[[Run, str], Any]) -> Command:
    """A command for every suite in turn."""

    def of_all(run: Run) -> None:
        for name in run.settings.data.suites:
            command(run, name)

    return of_all


# -- what methods look at -----------------------------------------------------------------------


@lru_cache(maxsize=4)
def policies(run: Run, name: str) -> list[Policies]:
    """Policies trained on all tasks, each a batch of one; trained once, and kept."""
    suite, path = suite_of(name), run.output / f"policies-{name}.safetensors"
    settings = as_dict(run.settings.of_policies(name))
    settings["num_models"] = run.settings.methods.num_models
    everything = torch.ones(1, len(suite.task_names), dtype=torch.bool)
    kept = read_tensors(path, settings)
    if kept is None:
        with one_thread():
            trained = [
                run.experiment.policies(suite, everything, seed)
                for seed in range(run.settings.methods.num_models)
            ]
        tensors = {f"{k}.{i}": w for k, x in enumerate(trained) for i, w in enumerate(x.weights)}
        write_tensors(path, tensors, settings)
        return trained
    found = []
    for k in range(run.settings.methods.num_models):
        sizes = suite.num_inputs, suite.num_outputs
        policy = Policies(1, *sizes, run.settings.model, k, discrete=suite.discrete)
        policy.weights = [kept[0][f"{k}.{i}"] for i in range(len(policy.weights))]
        found.append(policy)
    return found


@lru_cache(maxsize=4)
def problem_of(run: Run, name: str) -> ControlProblem:
    """What the methods look at; trains what is missing."""
    suite, settings = suite_of(name), run.settings
    num_tasks, few = len(suite.task_names), settings.methods.num_calibrated
    masks = fitted_subsets(settings, num_tasks)
    scores = train_subsets(run, name).mean(0)
    trained = policies(run, name)
    everything = torch.ones(1, num_tasks, dtype=torch.bool)
    full = retrained(run, name, "all", everything, range(settings.methods.num_models)).mean(0)[0]
    networks = [[policy.policy(0)] for policy in trained]
    with one_thread():
        seen = seen_by(trained, suite, settings)
    return ControlProblem(
        run.experiment,
        networks,
        masks,
        scores,
        full,
        masks[:few],
        scores[:few],
        suite,
        seen,
    )


def judge_of(run: Run, name: str) -> Judge:
    """What the methods are judged by."""
    truth = run.settings.truth
    masks, scores = train_references(run, name)
    fitted = judging.row_numbers(fitted_subsets(run.settings, masks.shape[1]))
    unseen = ~torch.isin(judging.row_numbers(masks), fitted) & masks.any(1)
    if unseen.sum() < LEAST_JUDGED:
        expected = f"few enough for {LEAST_JUDGED} references that are none of them"
        remedy = "Lower it, or raise `truth.num_references`."
        raise ValueError(message("truth.num_subsets", expected, str(truth.num_subsets), remedy))
    num_runs = torch.where(edges(masks), truth.num_edge_seeds, 1)
    return Judge(masks, scores, unseen, num_runs, *train_judges(run, name, unseen))


# -- the methods --------------------------------------------------------------------------------


def answers(run: Run, name: str) -> dict[str, tuple[Answer, float]]:
    """What methods say, with their seconds: from the disk, or by running them side by side."""
    folder, settings = run.output / f"methods-{name}", as_dict(run.settings)
    folder.mkdir(parents=True, exist_ok=True)
    methods = methods_for(suite_of(name))
    paths = {x: folder / f"{x.replace(', ', '-').replace(' ', '_')}.safetensors" for x in methods}
    missing = [x for x, path in paths.items() if read_tensors(path, settings) is None]
    if missing:
        problem = problem_of(run, name)
        parallel = joblib.Parallel(return_as="generator_unordered", pre_dispatch="n_jobs")
        for method, found, seconds in parallel(
            joblib.delayed(_timed)(x, methods[x], problem) for x in missing
        ):
            write_tensors(paths[method], vars(found), settings, seconds=str(seconds))
            print(f"{name}, {method}: {seconds:.1f} s", flush=True)
    kept = {x: read_tensors(path, settings) for x, path in paths.items()}
    return {x: (Answer(**pair[0]), float(pair[1]["seconds"])) for x, pair in kept.items() if pair}


def _timed(name: str, method: Method, problem: ControlProblem) -> tuple[str, Answer, float]:
    start = perf_counter()
    with one_thread():
        found = method(problem)
    return name, found, perf_counter() - start


def _trainings(name: str, run: Run) -> int:
    """How many policies a method needs."""
    truth, methods = run.settings.truth, run.settings.methods
    if name in RETRAINED:
        return int(truth.num_subsets * truth.num_seeds)
    few = methods.num_calibrated * truth.num_seeds * (name in FEW)
    from_all = name != "counting camps" and not name.endswith("few retrained")
    return int(few + methods.num_models * from_all)


# -- what is shown ------------------------------------------------------------------------------


def write_table(run: Run, name: str) -> None:
    """Every method against the truth."""
    said, truth = answers(run, name), judge_of(run, name)
    drawn = {x: judging.judge(x, found, truth) for x, (found, _) in said.items()}
    rows = {
        x: ({m: judging.interval(y) for m, y in drawn[x].items()}, _trainings(x, run), seconds)
        for x, (_, seconds) in said.items()
    }
    ceilings, note = truth.ceilings(), ""
    if truth.values:
        agree, highest = leave_one_out_agreement(run, name)
        ceilings["loo"] = highest, highest, highest
        note = f"\n\nLeave-one-out effects, half of the seeds against the other: {agree:.2f}."
    rows["ceiling"] = ceilings, 0, 0.0
    only = {x: found for x, (found, _) in said.items()}
    against = [_against(drawn, metric) for metric in ("lds", "residual")]
    each = judging.by_training({x: found for x, found in only.items() if x in MAIN}, truth)
    text = "\n\n".join([judging.as_text(rows), each, *against]) + f"{note}\n"
    write_text(run.output / f"table-{name}.md", text)
    metrics = {x: row[0] for x, row in rows.items()}
    write_json(run.output / f"table-{name}.json", metrics)
    camps, shown = suite_of(name).camps, only["kernel surrogate, warped"].predictions
    judging.draw(metrics, truth, camps, shown, run.output / f"methods-{name}.png")


def _against(drawn: dict[str, dict[str, judging.Draws]], metric: str) -> str:
    """A table of :data:`FIRST` less the others."""
    less = [judging.differences(drawn, first, metric) for first in FIRST]
    lines = [
        [x, *("{:+.3f} [{:+.3f}, {:+.3f}]".format(*part[x]) if x in part else "" for part in less)]
        for x in drawn
        if any(x in part for part in less)
    ]
    return markdown([f"{judging.COLUMNS[metric][0]} less that of", *FIRST], lines)


def learning(run: Run, name: str) -> None:
    """How many subsets each surrogate needs."""
    path, settings = run.output / f"learning_curve-{name}.safetensors", as_dict(run.settings)
    problem, curve = problem_of(run, name), run.settings.curve
    kept = read_tensors(path, settings)
    if kept is None:
        runs, truth = train_subsets(run, name), judge_of(run, name)
        kept = {"found": learning_curve.learn(problem, runs, truth, curve)}, {}
        write_tensors(path, kept[0], settings)
    shown, found = learning_curve.shown(problem), kept[0]["found"]
    write_text(path.with_suffix(".md"), learning_curve.as_text(shown, curve, found) + "\n")
    learning_curve.draw(shown, curve, found, path.with_suffix(".png"))


def select(run: Run, name: str) -> None:
    """Choose tasks for each target in every way, train on them, and compare returns."""
    settings, suite = run.settings.selection, suite_of(name)
    num_tasks = len(suite.task_names)
    said = {x: found for x, (found, _) in answers(run, name).items()}
    chosen = {
        (side, way): masks
        for side, held_out in SIDES.items()
        for way, masks in selecting.choices(
            said, num_tasks, settings.size, settings.num_draws, held_out=held_out
        ).items()
    }
    distinct = torch.cat([x.flatten(0, 1) for x in chosen.values()]).unique(dim=0)
    seeds = range(CHOSEN_SEED, CHOSEN_SEED + settings.num_seeds)
    returns = 1 - retrained(run, name, "chosen", distinct, seeds)  # (num_seeds, l, t)
    place = {row: number for number, row in enumerate(judging.row_numbers(distinct).tolist())}
    rows, facts = [], {}
    own = {}  # (num_seeds, num_draws, t) returns of each target on what was chosen for it
    for key, masks in chosen.items():
        numbers = judging.row_numbers(masks.flatten(0, 1)).apply_(place.get).view(masks.shape[:2])
        own[key] = returns[:, numbers, torch.arange(num_tasks)]
    for (side, way), values in own.items():
        mean, *ends = selecting.interquartile_mean(values)
        first = own[side, "kernel surrogate"]
        less = selecting.interquartile_mean(first, values)
        facts[f"{side}, {way}"] = {
            "returns": [mean, *ends],
            "kernel less this": less,
            "by target": dict(zip(suite.task_names, values.mean((0, 1)).tolist(), strict=True)),
        }
        cells = "{:.3f} [{:.3f}, {:.3f}]".format(mean, *ends), f"{float(values.mean()):.3f}"
        rows.append([side, way, *cells, "{:+.3f} [{:+.3f}, {:+.3f}]".format(*less)])
    titles = ["", "chosen by", "interquartile mean of returns", "mean", "kernel less this"]
    note = (
        f"At most {settings.size} tasks for each target; shares of the largest return; intervals "
        f"over {settings.num_seeds} seeds, each drawn for all targets and ways together."
    )
    write_text(run.output / f"selection-{name}.md", f"{markdown(titles, rows)}\n\n{note}\n")
    write_json(run.output / f"selection-{name}.json", facts)


def expand(run: Run, name: str) -> None:
    """How far the first-order expansion holds, and how near estimated scores come."""
    suite, settings = suite_of(name), run.settings
    masks = fitted_subsets(settings, len(suite.task_names))[: settings.truth.batch]
    found: dict[float, list[tuple[Tensor, Tensor]]] = {x: [] for x in linearisation.DISTANCES}
    with one_thread():
        for policy in policies(run, name):
            generator = torch.Generator().manual_seed(1)
            steps = steps_of(policy, suite, settings, generator)
            states, actions = (torch.cat([task[i] for task in steps]) for i in (0, 1))
            moved = linearisation.directions(policy, suite, masks, settings)
            errors = linearisation.errors(policy.policy(0), moved, states, actions)
            for distance, pair in errors.items():
                found[distance].append(pair)
    rows, facts = [], {}
    for distance, pairs in found.items():
        both = [torch.cat(x) for x in zip(*pairs, strict=True)]
        facts[str(distance)] = [[float(x.mean()), float(x.std())] for x in both]
        cells = [f"{100 * float(x.mean()):.3g} ± {100 * float(x.std()):.2g}" for x in both]
        rows.append([f"{distance:.1%}", *cells])
    titles = ["distance", "log-probability, relative error², %", "log-ratio, relative error², %"]
    write_text(run.output / f"expansion-{name}.md", markdown(titles, rows) + "\n")
    write_json(run.output / f"expansion-{name}.json", facts)


def weigh(run: Run) -> None:
    """Which weights of objectives to train under; says so where mo-gymnasium is missing."""
    if missing := objectives.available():
        print(f"Left out: {missing}")
        return
    for name in run.settings.objectives.environments:
        objectives.compare(run, name)


COMMANDS: dict[str, Command] = {
    "train-subsets": each_suite(train_subsets),
    "references": each_suite(judge_of),
    "methods": each_suite(answers),
    "select": each_suite(select),
    "expansion": each_suite(expand),
    "learning-curve": each_suite(learning),
    "objectives": weigh,
    "figures": each_suite(write_table),
}
PROGRAM = Program(
    "rl",
    "Which tasks and objectives help which, in reinforcement learning?",
    Control,
    PRESETS,
    COMMANDS,
    uses_gpu=False,
)
