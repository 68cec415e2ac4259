"""What is really retrained: on subsets, without each task, and on everything; and kept.

Shapes: masks (m, n), scores (num_seeds, m, num_checkpoints, t) with one target for each of the n
cells, the mean loss on its held-out samples.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from experiments.modular_arithmetic.data import Arithmetic, arithmetic
from experiments.modular_arithmetic.settings import Settings
from experiments.modular_arithmetic.training import accuracy, initial_model, target_losses, train
from ksm_ext import retrain_scores
from ksm_ext.files import write_whole
from ksm_ext.subsets import bernoulli, fixed_size, leave_one_out


def load(settings: Settings) -> Arithmetic:
    """The experiment's samples."""
    return arithmetic(**asdict(settings.data))


def subsets(settings: Settings) -> Tensor:
    """(m, n) bool: the subsets that surrogates are fitted to and judged on."""
    truth = settings.truth
    num_tasks = settings.data.grid**2
    if truth.subset_size is None:
        return bernoulli(num_tasks, truth.num_subsets, truth.inclusion, seed=truth.seed)
    return fixed_size(num_tasks, truth.num_subsets, truth.subset_size, seed=truth.seed)


def left_out(settings: Settings) -> Tensor:
    """(n + 1, n) bool: all tasks but one, and last, all tasks."""
    return leave_one_out(settings.data.grid**2, include_full=True)


def growing(settings: Settings) -> Tensor:
    """(n, n) bool: task after task, in a random order."""
    num_tasks = settings.data.grid**2
    generator = torch.Generator().manual_seed(settings.truth.seed)
    order = torch.randperm(num_tasks, generator=generator)
    masks = torch.zeros(num_tasks, num_tasks, dtype=torch.bool)
    masks[:, order] = torch.ones(num_tasks, num_tasks, dtype=torch.bool).tril()
    return masks


def retrained(
    settings: Settings, output: Path, masks: Tensor, num_seeds: int, variant: str = "main"
) -> Tensor:
    """Scores (num_seeds, m, num_checkpoints, t), from the store or by training what it lacks.

    Trainings run side by side, or wherever ``joblib.parallel_config`` sends them.

    Raises:
        ValueError: If the store is of other settings, or a training diverged.
        RuntimeError: If a training fails.
        OSError: If the store cannot be written.
    """
    training = settings.variant(variant)
    depends_on = {"data": settings.data, "model": settings.model, "training": training}
    scores = retrain_scores(
        partial(_score, settings, variant),
        masks,
        seeds=range(num_seeds),
        n_jobs=None if torch.cuda.is_available() else -1,
        store=output / f"scores-{variant}.sqlite",
        settings={name: _plain(asdict(part)) for name, part in depends_on.items()},
    )
    return scores.values.unflatten(2, (len(training.checkpoints), -1))


def _score(settings: Settings, variant: str, mask: Tensor, seed: int) -> Tensor:
    """The scores of one training, checkpoint after checkpoint."""
    data = load(settings)
    networks = train(data, settings.model, settings.variant(variant), mask, seed)
    return torch.cat([target_losses(network, data) for network in networks])


def _plain(values: dict) -> dict:
    return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}


def models(settings: Settings, output: Path, variant: str = "main") -> list[list[nn.Module]]:
    """Networks trained on all tasks: one list for each seed, of its checkpoints.

    They are trained once, and read from ``output/models`` from then on. Their seeds are those of
    the truth, so that theirs are the very networks that leaving out a task is compared with.
    """
    folder = output / "models"
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for seed in range(settings.methods.num_models):
        path = folder / f"{variant}-seed{seed}.safetensors"
        if not path.exists():
            _train_and_keep(settings, variant, seed, path)
        found.append(_read(settings, variant, seed, path))
    return found


def _train_and_keep(settings: Settings, variant: str, seed: int, path: Path) -> None:
    data, training = load(settings), settings.variant(variant)
    tensors, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # sums in the order of the retrained networks
    try:
        everything = torch.ones(len(data.names), dtype=torch.bool)
        networks = train(data, settings.model, training, everything, seed)
        for number, network in enumerate(networks):
            seen, held = accuracy(network, data)
            step = round(training.checkpoints[number] * training.num_steps)
            print(
                f"{variant}, seed {seed}, step {step}: "
                f"accuracy {seen:.1%} on training samples, {held:.1%} on held-out ones",
                flush=True,
            )
            for name, weight in network.state_dict().items():
                tensors[f"{number}.{name}"] = weight.detach().cpu().clone()
    finally:
        torch.set_num_threads(threads)
    write_whole(path, save(tensors))


def _read(settings: Settings, variant: str, seed: int, path: Path) -> list[nn.Module]:
    data, tensors = load(settings), load_file(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    networks = []
    for number in range(len(settings.variant(variant).checkpoints)):
        network = initial_model(data, settings.model, seed)
        mark = f"{number}."
        network.load_state_dict(
            {name.removeprefix(mark): w for name, w in tensors.items() if name.startswith(mark)}
        )
        networks.append(network.to(device).eval())
    return networks


def split(masks: Tensor, num_folds: int) -> list[Tensor]:
    """Rows of each fold."""
    return list(torch.arange(len(masks)).chunk(num_folds))
