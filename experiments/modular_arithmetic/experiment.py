"""Arithmetic modulo p by a transformer: tasks are cells of the table of operands."""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from experiments.experiment import Experiment, Grouped
from experiments.methods import METHODS
from experiments.modular_arithmetic.data import arithmetic
from experiments.modular_arithmetic.model import Transformer
from experiments.modular_arithmetic.settings import PRESETS


class ModularArithmetic(Experiment):
    """Which cells of the table help the held-out samples of which."""

    presets = PRESETS
    methods = tuple(METHODS)

    def data(self) -> Grouped:
        """All samples of the operation."""
        return arithmetic(**asdict(self.settings.data))

    def network(self) -> nn.Module:
        """A transformer at its random start."""
        data, model = self.data(), self.settings.model
        return Transformer(data.num_classes, data.inputs.shape[1], **asdict(model))

    def special(self) -> tuple[Tensor, str]:
        """A task's own held-out samples."""
        return torch.eye(self.num_tasks, dtype=torch.bool), "a cell on itself"
