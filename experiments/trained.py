"""What an experiment that trains networks says of itself: samples in groups, and a network.

A task is a group of training samples; a target is a group of held-out ones, and its score F(S) is
their mean loss under the network trained on the tasks of S.

Shapes: b training samples in n tasks, held-out samples in t targets, masks (n,) bool.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.experiment import Experiment
from experiments.settings import TrainedSettings
from experiments.training import train


@dataclass(frozen=True, eq=False)
class Grouped:
    """Samples for training and held-out ones.

    Attributes:
        inputs: (b, ...) the training samples.
        labels: (b,) int64.
        tasks: (b,) int64, the number of each sample's task.
        held_inputs: The held-out samples likewise.
        held_labels: int64.
        held_targets: int64, the number of each held-out sample's target.
        task_names: n names.
        target_names: t names.
        num_classes: How many labels there are.
    """

    inputs: Tensor
    labels: Tensor
    tasks: Tensor
    held_inputs: Tensor
    held_labels: Tensor
    held_targets: Tensor
    task_names: tuple[str, ...]
    target_names: tuple[str, ...]
    num_classes: int

    def by_task(self) -> list[tuple[Tensor, Tensor]]:
        rows = [self.tasks == task for task in range(len(self.task_names))]
        return [(self.inputs[own], self.labels[own]) for own in rows]

    def by_target(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Held-out inputs and labels of each target, by its name."""
        rows = [self.held_targets == target for target in range(len(self.target_names))]
        samples = [(self.held_inputs[own], self.held_labels[own]) for own in rows]
        return dict(zip(self.target_names, samples, strict=True))


class TrainedExperiment(Experiment, ABC):
    """Networks that are trained on groups of samples."""

    settings: TrainedSettings

    @abstractmethod
    def data(self) -> Grouped:
        """The samples; read or made once per process."""

    @abstractmethod
    def network(self) -> nn.Module:
        """A network at its start, drawn from the global random state."""

    def augmented(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """What a step sees of a batch of inputs."""
        return inputs

    def special(self) -> tuple[Tensor | None, str]:
        """Pairs of a task and a target (n, t) bool that figures show apart, and what they are."""
        return None, ""

    @property
    def num_tasks(self) -> int:
        """How many tasks there are, n."""
        return len(self.data().task_names)

    def initial_model(self, seed: int) -> nn.Module:
        """The network that training with a seed starts from."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.network()

    def train(self, variant: str, mask: Tensor, seed: int) -> Iterator[nn.Module]:
        """Train on the tasks of ``mask``, and yield the network at each checkpoint."""
        data = self.data()
        return train(
            self.initial_model(seed),
            data.inputs,
            data.labels,
            mask[data.tasks],
            self.settings.variant(variant),
            torch.Generator().manual_seed(seed),
            self.augmented,
        )

    @torch.no_grad()
    def score(self, network: nn.Module) -> Tensor:
        """(t,) float64: the mean loss on the held-out samples of each target."""
        data = self.data()
        logits = outputs(network, data.held_inputs)
        losses = cross_entropy(logits, data.held_labels, reduction="none")
        sums = torch.zeros(len(data.target_names), dtype=torch.float64)
        sums.index_add_(0, data.held_targets, losses.double())
        return sums / data.held_targets.bincount(minlength=len(sums))

    @torch.no_grad()
    def accuracy(self, network: nn.Module) -> tuple[float, float]:
        """Share of right answers on the training and on the held-out samples."""
        data = self.data()
        pairs = (data.inputs, data.labels), (data.held_inputs, data.held_labels)
        seen, held = (float((outputs(network, x).argmax(1) == y).double().mean()) for x, y in pairs)
        return seen, held

    def depends_on(self, variant: str) -> dict[str, Any]:
        """What a score depends on beside subset and seed."""
        settings = self.settings
        training = settings.variant(variant)
        return {"data": settings.data, "model": settings.model, "training": training}


def outputs(network: nn.Module, inputs: Tensor, batch_size: int = 1024) -> Tensor:
    """Logits (b, C) on the CPU, by the network as it is used, not as it is trained."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        parts = [network(part.to(device)).float().cpu() for part in inputs.split(batch_size)]
    finally:
        network.train(was_training)
    return torch.cat(parts)
