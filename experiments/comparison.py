"""The commands of an experiment that trains networks: every method against the truth."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter

import joblib
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from experiments import curvature, figures, table
from experiments.common import one_thread, write_json
from experiments.experiment import Experiment
from experiments.folds import split
from experiments.methods import METHODS, RETRAINED, Answer, Method, Problem
from experiments.runner import Command
from experiments.settings import Settings, as_dict
from experiments.truth import (
    calibration_subsets,
    growing,
    left_out,
    models,
    retrained,
    subsets,
)
from ksm_ext.atomic_write import write_whole

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
SHOWN = (
    "kernel surrogate",
    "kernel surrogate, calibrated",
    "influence, CG on GGN",
    "TRAK",
    "TracIn",
)


@dataclass(frozen=True)
class Run:
    """An experiment and the folder of its results."""

    experiment: Experiment
    output: Path

    @property
    def settings(self) -> Settings:
        return self.experiment.settings


# -- the truth ----------------------------------------------------------------------------------


def train_all(run: Run) -> None:
    """Train on all tasks, in each way of training."""
    for variant in ("main", *run.settings.variants):
        models(run.experiment, run.output, variant)


def train_subsets(run: Run) -> None:
    """Train on each subset: several times in the main way, once in the others."""
    masks = subsets(run.experiment)
    both = torch.cat([masks, calibration_subsets(run.experiment)])
    retrained(run.experiment, run.output, both, run.settings.truth.subset_seeds)
    some = masks[: run.settings.truth.variant_subsets]
    for variant in run.settings.variants:
        retrained(run.experiment, run.output, some, 1, variant)


def leave_one_out(run: Run) -> None:
    """Train without each task, and on all of them."""
    retrained(run.experiment, run.output, left_out(run.experiment), run.settings.truth.loo_seeds)


def results_of(run: Run) -> table.Results:
    """The truth that methods are compared with."""
    truth = run.settings.truth
    alone = retrained(run.experiment, run.output, left_out(run.experiment), truth.loo_seeds)
    alone = alone[:, :, truth.checkpoint]  # (num_seeds, n + 1, t)
    masks = subsets(run.experiment)
    scores = retrained(run.experiment, run.output, masks, truth.subset_seeds)
    loo: Tensor = alone[:, -1:] - alone[:, :-1]
    return table.Results(loo, scores[:, :, truth.checkpoint], split(len(masks), truth.num_folds))


# -- the methods --------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # of the command that runs
def problem_of(run: Run) -> Problem:
    """What the methods look at; trains what is missing."""
    experiment, settings = run.experiment, run.settings
    masks, others = subsets(experiment), calibration_subsets(experiment)
    seeds, checkpoint = settings.truth.subset_seeds, settings.truth.checkpoint
    runs, other_runs = (retrained(experiment, run.output, x, seeds) for x in (masks, others))
    everything = torch.ones(1, masks.shape[1], dtype=torch.bool)
    full = retrained(experiment, run.output, everything, settings.methods.num_models)
    return Problem(
        experiment,
        models(experiment, run.output),
        masks,
        runs.mean(0)[:, checkpoint],
        full.mean(0)[0, checkpoint],
        others,
        other_runs.mean(0)[:, checkpoint],
    )


def answer(run: Run, *names: str) -> dict[str, tuple[Answer, float]]:
    """What methods say, with their seconds: from the disk, or by running them side by side."""
    folder = run.output / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    spelled = yaml.safe_dump(as_dict(run.settings))
    paths = {
        name: folder / f"{name.replace(', ', '-').replace(' ', '_')}.safetensors" for name in names
    }
    missing = [name for name, path in paths.items() if _read(path, spelled) is None]
    if missing:
        methods = METHODS | run.experiment.own_methods
        problem = problem_of(run)
        n_jobs = None if torch.cuda.is_available() else -1
        parallel = joblib.Parallel(n_jobs, return_as="generator_unordered", pre_dispatch="n_jobs")
        for name, result, seconds in parallel(
            joblib.delayed(_timed)(name, methods[name], problem) for name in missing
        ):
            tensors = {k: x.contiguous() for k, x in vars(result).items() if x is not None}
            facts = {"settings": spelled, "seconds": str(seconds)}
            content = save(tensors, metadata=facts)
            write_whole(paths[name], content)
            print(f"{name}: {seconds:.1f} s", flush=True)
    found = {name: _read(path, spelled) for name, path in paths.items()}
    return {name: kept for name, kept in found.items() if kept is not None}


def _timed(name: str, method: Method, problem: Problem) -> tuple[str, Answer, float]:
    """What one method says, and its seconds on one thread."""
    start = perf_counter()
    with one_thread():
        result = method(problem)
    return name, result, perf_counter() - start


def _read(path: Path, settings: str) -> tuple[Answer, float] | None:
    """An answer on disk, if it is one to these settings."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        if facts["settings"] != settings:
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return Answer(**tensors), float(facts["seconds"])


def _says(belongs: Callable[[str], bool]) -> Callable[[Run], None]:
    """The command that runs some of the experiment's methods."""

    def command(run: Run) -> None:
        answer(run, *filter(belongs, run.experiment.methods))

    return command


def hessian(run: Run) -> None:
    """Traces, eigenvalues and densities, and the second order in the tasks' weights."""
    if not (run.output / "curvature.json").exists():
        curvature.measure(run.experiment, run.output)
    answer(run, *filter(lambda name: "Hessian" in name, run.experiment.methods))


# -- the comparison -----------------------------------------------------------------------------


def write_table(run: Run) -> dict[str, Answer]:
    """The table of all methods, on the terminal and as JSON and text."""
    answers = answer(run, *run.experiment.methods)
    results, truth = results_of(run), run.settings.truth
    rows = []
    for name, (said, seconds) in answers.items():
        needs = run.settings.methods.num_models
        if name in RETRAINED:
            needs = truth.num_subsets * truth.subset_seeds
        elif name.endswith("calibrated"):
            needs += run.settings.methods.num_calibrated * truth.subset_seeds
        rows.append(table.judge(name, results, said.attributions, said.predictions, needs, seconds))
    effects, ranks = table.ceiling(results)
    text = table.markdown(rows) + (
        f"\n\nCeiling, half of the seeds against the other half: leave-one-out {effects:.2f}, "
        f"LDS {ranks:.2f}. Leave-one-out itself: {results.loo.shape[1] + 1} x "
        f"{len(results.loo)} trainings.\n"
    )
    print(f"\n{text}")
    write_whole(run.output / "table.md", text.encode())
    table.write(rows, run.output / "table.json")
    return {name: said for name, (said, _) in answers.items()}


def make_figures(run: Run) -> None:
    """The table, and the figures."""
    answers, results, masks = write_table(run), results_of(run), subsets(run.experiment)
    checkpoint, output = run.settings.truth.checkpoint, run.output
    with one_thread():
        grown = growing(run.experiment)
        measured = retrained(run.experiment, output, grown, 1)[0, :, checkpoint].mean(1)  # (n,)
        scores = results.scores[0].mean(1)  # (m,) of one seed too
        path = output / "linear_and_kernel.png"
        figures.linear_and_kernel(masks, scores, grown, measured, path, xlabel="tasks trained on")
        path = output / "sample_complexity.png"
        found = {
            "sample complexity": figures.sample_complexity(masks, results.scores.mean(0), path)
        }
        shown = {name: answers[name].attributions for name in SHOWN if name in answers}
        special, meaning = run.experiment.special()
        figures.attributions_and_truth(
            results.loo.mean(0),
            shown,
            output / "attributions_and_truth.png",
            special=special,
            meaning=meaning,
        )
        if (output / "curvature.json").exists():
            found |= _curvature_figures(run)
    write_json(output / "figures.json", found)


def _curvature_figures(run: Run) -> dict:
    """What the way of training does to surrogates and to the Hessian."""
    truth = run.settings.truth
    masks = subsets(run.experiment)[: truth.variant_subsets]
    folds = split(len(masks), truth.num_folds)
    facts = json.loads((run.output / "curvature.json").read_text()).items()
    main = OPTIMIZERS[run.settings.training.optimizer]
    names = {"main": main} | {variant: variant for variant in run.settings.variants}
    scores = {}
    for variant, name in names.items():
        runs = retrained(run.experiment, run.output, masks, 1, variant)[0]  # one run, for all alike
        scores[name] = run.settings.variant(variant).stops(), runs.transpose(0, 1)
    path = run.output / "over_training.png"
    quality = figures.over_training(masks, folds, scores, path)
    points = {}
    for variant, name in names.items():
        traces = [fact["trace"] for _, fact in facts if fact["variant"] == variant]
        errors = [error for error, _ in quality[f"{name}, ridge"]["error and LDS"]]
        points[name] = list(zip(traces, errors, strict=True))
    correlation = figures.trace_and_error(points, run.output / "trace_and_error.png")
    densities = {name.replace("main", main): fact for name, fact in facts if "nodes" in fact}
    figures.density(densities, run.output / "density.png")
    return {"over training": quality, "rank correlation of trace and error": correlation}


COMMANDS: dict[str, Callable[[Run], None]] = {
    "train-all": train_all,
    "leave-one-out": leave_one_out,
    "train-subsets": train_subsets,
    "datamodels": _says(lambda name: "datamodel" in name or name == "least squares"),
    "influence": _says(lambda name: name.startswith("influence") or name == "task Hessian"),
    "trak": _says(lambda name: name in ("TRAK", "TracIn", "gradient cosine")),
    "kernel-surrogate": _says(lambda name: "surrogate" in name),
    "hessian": hessian,
    "figures": make_figures,
}


def commands(kind: type[Experiment], *names: str) -> dict[str, Command]:
    """Commands of an experiment, all of them or some by name."""
    wanted = names or tuple(COMMANDS)

    def bound(command: Callable[[Run], None]) -> Command:
        return lambda settings, output: command(Run(kind(settings), output))

    return {name: bound(COMMANDS[name]) for name in wanted}
