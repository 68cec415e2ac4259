"""What is really retrained: on subsets, without each task, and on everything; and kept.

Shapes: masks (m, n), scores (num_seeds, m, num_checkpoints, t).
"""

from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from experiments.common import one_thread
from experiments.experiment import Run
from experiments.settings import as_dict
from experiments.trained import TrainedExperiment
from ksm_ext import retrain_scores
from ksm_ext.atomic_write import write_whole
from ksm_ext.subsets import bernoulli, fixed_size, leave_one_out


def subsets(experiment: TrainedExperiment) -> Tensor:
    """(m, n) bool: the subsets that surrogates are fitted to and judged on."""
    return _drawn(experiment)[: experiment.settings.truth.num_subsets]


def calibration_subsets(experiment: TrainedExperiment) -> Tensor:
    """(num_calibrated, n) bool: drawn likewise, and none of the others."""
    return _drawn(experiment)[experiment.settings.truth.num_subsets :]


def _drawn(experiment: TrainedExperiment) -> Tensor:
    truth, num_tasks = experiment.settings.truth, experiment.num_tasks
    count = truth.num_subsets + experiment.settings.methods.num_calibrated
    if truth.subset_size is None:
        return bernoulli(num_tasks, count, truth.inclusion, seed=truth.seed)
    return fixed_size(num_tasks, count, truth.subset_size, seed=truth.seed)


def left_out(experiment: TrainedExperiment) -> Tensor:
    """(n + 1, n) bool: all tasks but one, and last, all tasks."""
    return leave_one_out(experiment.num_tasks, include_full=True)


def growing(experiment: TrainedExperiment) -> Tensor:
    """(n, n) bool: task after task, in a random order."""
    num_tasks = experiment.num_tasks
    generator = torch.Generator().manual_seed(experiment.settings.truth.seed)
    order = torch.randperm(num_tasks, generator=generator)
    masks = torch.zeros(num_tasks, num_tasks, dtype=torch.bool)
    masks[:, order] = torch.ones(num_tasks, num_tasks, dtype=torch.bool).tril()
    return masks


def retrained(run: Run, masks: Tensor, num_seeds: int, variant: str = "main") -> Tensor:
    """Scores (num_seeds, m, num_checkpoints, t), from the store or by training what it lacks.

    Trainings run side by side, or wherever ``joblib.parallel_config`` sends them.

    Raises:
        ValueError: If the store is of other settings or code, or a training diverged.
        RuntimeError: If a training fails.
        OSError: If the store cannot be written.
    """
    parts = run.experiment.depends_on(variant).items()
    scores = retrain_scores(
        partial(_score, run.experiment, variant),
        masks,
        seeds=range(num_seeds),
        store=run.output / f"scores-{variant}.sqlite",
        settings={name: as_dict(part) for name, part in parts},
        on_change=run.on_change,
    )
    stops = run.settings.variant(variant).checkpoints
    return scores.values.unflatten(2, (len(stops), -1))


def _score(experiment: TrainedExperiment, variant: str, mask: Tensor, seed: int) -> Tensor:
    """The scores of one training, checkpoint after checkpoint."""
    return torch.cat([experiment.score(net) for net in experiment.train(variant, mask, seed)])


def models(run: Run, variant: str = "main") -> list[list[nn.Module]]:
    """Networks trained on all tasks: one list for each seed, of its checkpoints.

    They are trained once, and read from ``output/models`` from then on. Their seeds are those of
    the truth, so that theirs are the very networks that leaving out a task is compared with.
    """
    folder = run.output / "models"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(run.settings.methods.num_models):
        path = folder / f"{variant}-seed{seed}.safetensors"
        if not path.exists():
            _train_and_keep(run.experiment, variant, seed, path)
        found.append(_read(run.experiment, variant, seed, path))
    return found


def _train_and_keep(experiment: TrainedExperiment, variant: str, seed: int, path: Path) -> None:
    tensors = {}
    everything = torch.ones(experiment.num_tasks, dtype=torch.bool)
    stops = experiment.settings.variant(variant).stops()
    with one_thread():  # sums in the order of the retrained networks
        networks = experiment.train(variant, everything, seed)
        for number, network in enumerate(networks):
            seen, held = experiment.accuracy(network)
            print(
                f"{variant}, seed {seed}, step {stops[number]}: "
                f"accuracy {seen:.1%} on training samples, {held:.1%} on held-out ones",
                flush=True,
            )
            for name, value in network.state_dict().items():
                kept = value.detach().cpu().clone(memory_format=torch.contiguous_format)
                tensors[f"{number}.{name}"] = kept
    write_whole(path, save(tensors))


def _read(experiment: TrainedExperiment, variant: str, seed: int, path: Path) -> list[nn.Module]:
    tensors = load_file(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = []
    for number in range(len(experiment.settings.variant(variant).checkpoints)):
        network = experiment.initial_model(seed)
        mark = f"{number}."
        network.load_state_dict(
            {name.removeprefix(mark): w for name, w in tensors.items() if name.startswith(mark)}
        )
        networks.append(network.to(device).eval())
    return networks
