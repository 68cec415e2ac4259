"""Which groups carry flipped labels: each method's area under the ROC curve.

Groups are drawn at random here, whatever the experiment's are: some flipped labels are a faint mark
beside a class mix of one's own. A network is trained on all groups, flipped labels included; the
held-out images keep theirs. A method's score of a group is the mean over targets of its attribution
to the loss. Two scores of the single images look at no target: their loss, and the self-influence
``(1 - q)² φᵀ (ΦᵀΦ + ρ)⁻¹ φ`` with features φ of the log-odds and probabilities q of the labels.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import joblib
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.cifar.attribution import sums_by_task
from experiments.cifar.experiment import Cifar
from experiments.common import one_thread, write_json
from experiments.experiment import outputs
from experiments.methods import METHODS, Problem
from experiments.settings import as_dict
from experiments.truth import models
from ksm_ext.attribution.trak import self_influence
from ksm_ext.evaluation import mislabel_auc
from ksm_ext.network.gradients import collect_features
from ksm_ext.network.outputs import log_odds


def noisy_experiment(experiment: Cifar, draw: int) -> Cifar:
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
    return Cifar(replace(settings, data=data, methods=methods))


def noisy_problem(experiment: Cifar, output: Path) -> Problem:
    """What methods look at; without a single subset."""
    networks = models(experiment, output)
    at = experiment.settings.methods.checkpoint
    scores = [experiment.score(path[at]) for path in networks]
    full = torch.stack(scores).mean(0)
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


def suspicion(problem: Problem) -> dict[str, Tensor]:
    """(n,) of every method: high where labels may be wrong."""
    experiment = problem.experiment
    methods = METHODS | experiment.own_methods
    wanted = experiment.settings.mislabelled.methods
    found = {name: methods[name](problem).attributions.mean(1) for name in wanted}
    tasks = experiment.data().tasks
    for name, score in SAMPLE_SCORES.items():
        by_sample = torch.stack([score(model, problem) for model in problem.models]).mean(0)
        found[name] = sums_by_task(by_sample[:, None], tasks, experiment.num_tasks)[:, 0]
    return found


def find(experiment: Cifar, output: Path) -> dict[str, list[float]]:
    """The area under the curve of every method for every draw, also in ``mislabelled.json``."""
    n_jobs = None if torch.cuda.is_available() else -1
    draws = range(experiment.settings.mislabelled.num_draws)
    found = joblib.Parallel(n_jobs)(joblib.delayed(_areas)(experiment, output, n) for n in draws)
    areas = {name: [areas[name] for areas in found] for name in found[0]}
    write_json(output / "mislabelled.json", areas)
    return areas


def _areas(experiment: Cifar, output: Path, draw: int) -> dict[str, float]:
    """Of one draw; from the disk, if it has those of these settings."""
    noisy = noisy_experiment(experiment, draw)
    folder = output / "mislabelled" / f"draw-{draw}"
    folder.mkdir(parents=True, exist_ok=True)
    path, spelled = folder / "areas.json", as_dict(noisy.settings)
    if path.exists() and (kept := json.loads(path.read_text()))["settings"] == spelled:
        return kept["areas"]
    problem = noisy_problem(noisy, folder)
    with one_thread():
        found = suspicion(problem)
    areas = {name: float(mislabel_auc(x, noisy.data().noisy)[0]) for name, x in found.items()}
    write_json(path, {"settings": spelled, "areas": areas})
    return areas


def markdown(areas: dict[str, list[float]]) -> str:
    """The areas as text, the best mean first."""
    lines = ["| groups with flipped labels | mean AUC | of each draw |", "|---|---|---|"]
    for name, values in sorted(areas.items(), key=lambda item: -sum(item[1])):
        each = ", ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {name} | {sum(values) / len(values):.2f} | {each} |")
    return "\n".join(lines)
