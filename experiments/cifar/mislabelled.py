"""Which groups carry flipped labels: each method's area under the ROC curve.

Groups are drawn at random here, whatever the experiment's are: some flipped labels are a faint mark
beside a class mix of one's own. A network is trained on all groups, flipped labels included; the
held-out images keep theirs. A method's score of a group is the mean over targets of its attribution
to the loss. Two scores of the single images look at no target: their loss, and the self-influence
``(1 - q)² φᵀ (ΦᵀΦ + ρ)⁻¹ φ`` with features φ of the log-odds and probabilities q of the labels.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace

import joblib
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.cifar.attribution import sums_by_task
from experiments.common import markdown, one_thread, write_json
from experiments.experiment import Run
from experiments.methods import Method, Problem, mean_of
from experiments.settings import as_dict
from experiments.trained import TrainedExperiment, outputs
from experiments.truth import models
from ksm_ext.attribution.trak import self_influence
from ksm_ext.evaluation import mislabel_auc
from ksm_ext.network.gradients import collect_features
from ksm_ext.network.outputs import log_odds


def noisy_experiment(experiment: TrainedExperiment, draw: int) -> TrainedExperiment:
    """The experiment with random groups, in some of which labels are flipped."""
    settings, wanted = experiment.settings, experiment.settings.mislabelled
    data = replace(
        settings.data,
        concentration=None,
        num_noisy=wanted.num_noisy,
        noise=wanted.noise,
        seed=settings.data.seed + draw,
    )
    methods = replace(
        settings.methods, checkpoint=wanted.checkpoint, estimate_checkpoint=wanted.checkpoint
    )
    return replace(experiment, settings=replace(settings, data=data, methods=methods))


def noisy_problem(run: Run) -> Problem:
    """What methods look at; without a single subset."""
    experiment, networks = run.experiment, models(run)
    at = run.settings.methods.checkpoint
    full = torch.stack([experiment.score(path[at]) for path in networks]).mean(0)
    none = torch.zeros(0, experiment.num_tasks, dtype=torch.bool)
    empty = full.new_zeros(0, len(full))
    return Problem(experiment, networks, none, empty, full, none, empty)


def by_loss(model: nn.Module, problem: Problem) -> Tensor:
    inputs, labels = problem.samples
    return cross_entropy(outputs(model, inputs), labels, reduction="none")


def by_self_influence(model: nn.Module, problem: Problem) -> Tensor:
    train = collect_features(model, problem.samples, log_odds, problem.projector, progress=False)
    return self_influence(train, relative_ridge=problem.settings.methods.trak_ridge).cpu()


SAMPLE_SCORES: dict[str, Callable[[nn.Module, Problem], Tensor]] = {
    "loss of its images": by_loss,
    "self-influence of its images": by_self_influence,
}


def suspicion(problem: Problem, methods: Mapping[str, Method]) -> dict[str, Tensor]:
    """(n,) of every method: high where labels may be wrong."""
    data, wanted = problem.experiment.data(), problem.experiment.settings.mislabelled.methods
    found = {name: methods[name](problem).attributions.mean(1) for name in wanted}
    for name, score in SAMPLE_SCORES.items():
        by_sample = mean_of(score, problem)[:, None]
        found[name] = sums_by_task(by_sample, data.tasks, len(data.task_names))[:, 0]
    return found


def find(run: Run, methods: Mapping[str, Method]) -> dict[str, list[float]]:
    """The area under the curve of every method for every draw, also in ``mislabelled.json``."""
    draws = range(run.settings.mislabelled.num_draws)
    found = joblib.Parallel()(joblib.delayed(_areas)(run, methods, draw) for draw in draws)
    areas = {name: [areas[name] for areas in found] for name in found[0]}
    write_json(run.output / "mislabelled.json", areas)
    return areas


def _areas(run: Run, methods: Mapping[str, Method], draw: int) -> dict[str, float]:
    """The areas of one draw; from the disk, if it has those of these settings."""
    noisy = noisy_experiment(run.experiment, draw)
    folder = run.output / "mislabelled" / f"draw-{draw}"
    folder.mkdir(parents=True, exist_ok=True)
    path, settings = folder / "areas.json", as_dict(noisy.settings)
    if path.exists() and (kept := json.loads(path.read_text()))["settings"] == settings:
        return kept["areas"]
    problem = noisy_problem(Run(noisy, folder))
    with one_thread():
        found = suspicion(problem, methods)
    areas = {name: float(mislabel_auc(x, noisy.data().noisy)[0]) for name, x in found.items()}
    write_json(path, {"settings": settings, "areas": areas})
    return areas


def as_text(areas: dict[str, list[float]]) -> str:
    """The areas as text, the best mean first."""
    cells = [
        (name, f"{sum(values) / len(values):.2f}", ", ".join(f"{value:.2f}" for value in values))
        for name, values in sorted(areas.items(), key=lambda item: -sum(item[1]))
    ]
    return markdown(("groups with flipped labels", "mean AUC", "of each draw"), cells)
