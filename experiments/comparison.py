"""The commands of an experiment that trains networks: every method against the truth."""

import json
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from time import perf_counter
from typing import Any

import joblib
import torch
from torch import Tensor

from experiments import curvature, figures, table
from experiments.common import one_thread, read_tensors, write_json, write_tensors
from experiments.experiment import Command, Run
from experiments.folds import split
from experiments.methods import FEW, OWN_SHARE, RETRAINED, Answer, Method, Problem
from experiments.settings import as_dict
from experiments.truth import calibration_subsets, growing, left_out, models, retrained, subsets

Methods = Mapping[str, Method]
OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}
SHOWN = (
    "kernel surrogate",
    "kernel surrogate, calibrated",
    "influence, CG on GGN",
    "TRAK",
    "TracIn",
)

# -- the truth ----------------------------------------------------------------------------------


def train_all(run: Run) -> None:
    """Train on all tasks, in each way of training."""
    for variant in ("main", *run.settings.variants):
        models(run, variant)


def train_subsets(run: Run) -> None:
    """Train on each subset: several times in the main way, once in the others."""
    masks = subsets(run.experiment)
    both = torch.cat([masks, calibration_subsets(run.experiment)])
    retrained(run, both, run.settings.truth.subset_seeds)
    for variant in run.settings.variants:
        retrained(run, masks[: run.settings.truth.variant_subsets], 1, variant)


def leave_one_out(run: Run) -> None:
    """Train without each task, and on all of them."""
    retrained(run, left_out(run.experiment), run.settings.truth.loo_seeds)


def results_of(run: Run) -> table.Results:
    """The truth that methods are compared with."""
    truth, masks = run.settings.truth, subsets(run.experiment)
    alone = retrained(run, left_out(run.experiment), truth.loo_seeds)
    alone = alone[:, :, truth.checkpoint]  # (num_seeds, n + 1, t)
    scores = retrained(run, masks, truth.subset_seeds)[:, :, truth.checkpoint]
    loo: Tensor = alone[:, -1:] - alone[:, :-1]
    return table.Results(loo, scores, split(len(masks), truth.num_folds))


# -- the methods --------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # of the command that runs
def problem_of(run: Run) -> Problem:
    """What the methods look at; trains what is missing."""
    settings = run.settings
    masks, others = subsets(run.experiment), calibration_subsets(run.experiment)
    everything = torch.ones(1, masks.shape[1], dtype=torch.bool)

    def mean_scores(masks: Tensor, num_seeds: int) -> Tensor:
        return retrained(run, masks, num_seeds).mean(0)[:, settings.truth.checkpoint]

    scores, other_scores = (mean_scores(x, settings.truth.subset_seeds) for x in (masks, others))
    (full,) = mean_scores(everything, settings.methods.num_models)
    return Problem(run.experiment, models(run), masks, scores, full, others, other_scores)


def answer(run: Run, methods: Methods, names: Iterable[str]) -> dict[str, tuple[Answer, float]]:
    """What methods say, with their seconds: from the disk, or by running them side by side."""
    folder, settings = run.output / "methods", as_dict(run.settings)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {
        name: folder / f"{name.replace(', ', '-').replace(' ', '_')}.safetensors" for name in names
    }
    missing = [name for name, path in paths.items() if read_tensors(path, settings) is None]
    if missing:
        problem = problem_of(run)
        parallel = joblib.Parallel(return_as="generator_unordered", pre_dispatch="n_jobs")
        for name, result, seconds in parallel(
            joblib.delayed(timed)(name, methods[name], problem) for name in missing
        ):
            tensors = {k: x for k, x in vars(result).items() if x is not None}
            write_tensors(paths[name], tensors, settings, seconds=str(seconds))
            print(f"{name}: {seconds:.1f} s", flush=True)
    found = {name: read_tensors(path, settings) for name, path in paths.items()}
    return {
        name: (Answer(**kept[0]), float(kept[1]["seconds"]))
        for name, kept in found.items()
        if kept is not None
    }


def timed(name: str, method: Method, problem: Problem) -> tuple[str, Answer, float]:
    """What one method says, and its seconds on one thread."""
    start = perf_counter()
    with one_thread():
        result = method(problem)
    return name, result, perf_counter() - start


def hessian(run: Run, methods: Methods) -> None:
    """Traces, eigenvalues and densities, and the second order in the tasks' weights."""
    if not (run.output / "curvature.json").exists():
        curvature.measure(run)
    answer(run, methods, [name for name in methods if "Hessian" in name])


# -- the comparison -----------------------------------------------------------------------------


def write_table(run: Run, methods: Methods) -> dict[str, Answer]:
    """The table of all methods, on the terminal and as JSON and text."""
    answers = answer(run, methods, methods)
    results = results_of(run)
    rows = [
        table.judge(
            name, results, result.attributions, result.predictions, _trainings(name, run), seconds
        )
        for name, (result, seconds) in answers.items()
    ]
    effects, ranks = table.ceiling(results)
    note = (
        f"Ceiling, half of the seeds against the other half: leave-one-out {effects:.2f}, "
        f"LDS {ranks:.2f}. Leave-one-out itself: {results.loo.shape[1] + 1} x "
        f"{len(results.loo)} trainings."
    )
    table.write(rows, note, run.output)
    return {name: result for name, (result, _) in answers.items()}


def _trainings(name: str, run: Run) -> int:
    """How many networks a method needs."""
    truth, methods = run.settings.truth, run.settings.methods
    if name in (*RETRAINED, OWN_SHARE):
        return int(truth.num_subsets * truth.subset_seeds)
    few = methods.num_calibrated * truth.subset_seeds * (name in FEW)
    return int(few + methods.num_models * (name != FEW[-1]))


def make_figures(run: Run, methods: Methods) -> None:
    """The table, and the figures."""
    answers, results, masks = write_table(run, methods), results_of(run), subsets(run.experiment)
    checkpoint, output = run.settings.truth.checkpoint, run.output
    with one_thread():
        grown = growing(run.experiment)
        measured = retrained(run, grown, 1)[0, :, checkpoint].mean(1)  # (n,)
        scores = results.scores[0].mean(1)  # (m,) of one seed too
        path = output / "linear_and_kernel.png"
        figures.linear_and_kernel(masks, scores, grown, measured, path, xlabel="tasks trained on")
        path = output / "sample_complexity.png"
        errors = figures.sample_complexity(masks, results.scores.mean(0), path)
        found: dict[str, Any] = {"sample complexity": errors}
        special, meaning = run.experiment.special()
        figures.attributions_and_truth(
            results.loo.mean(0),
            {name: answers[name].attributions for name in SHOWN if name in answers},
            output / "attributions_and_truth.png",
            special=special,
            meaning=meaning,
        )
        if (output / "curvature.json").exists():
            found |= _curvature_figures(run)
    write_json(output / "figures.json", found)


def _curvature_figures(run: Run) -> dict[str, Any]:
    """What the way of training does to surrogates and to the Hessian."""
    truth = run.settings.truth
    masks = subsets(run.experiment)[: truth.variant_subsets]
    folds = split(len(masks), truth.num_folds)
    facts = json.loads((run.output / "curvature.json").read_text()).items()
    main = OPTIMIZERS[run.settings.training.optimizer]
    names = {"main": main} | {variant: variant for variant in run.settings.variants}
    scores = {}
    for variant, name in names.items():
        runs = retrained(run, masks, 1, variant)[0]  # one run, for all alike
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


def commands(methods: Methods) -> dict[str, Command]:
    """The commands by name, of an experiment that compares these methods."""

    def answers(belongs: Callable[[str], bool]) -> Command:
        return lambda run: answer(run, methods, filter(belongs, methods))

    return {
        "train-all": train_all,
        "leave-one-out": leave_one_out,
        "train-subsets": train_subsets,
        "datamodels": answers(lambda name: "datamodel" in name or name == "least squares"),
        "influence": answers(lambda name: name.startswith("influence") or name == "task Hessian"),
        "trak": answers(lambda name: name in ("TRAK", "TracIn", "gradient cosine")),
        "kernel-surrogate": answers(lambda name: "surrogate" in name),
        "hessian": partial(hessian, methods=methods),
        "figures": partial(make_figures, methods=methods),
    }
