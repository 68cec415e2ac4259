"""Arithmetic modulo p by a transformer: tasks are cells of the table of operands."""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from experiments import comparison
from experiments.methods import METHODS
from experiments.modular_arithmetic.data import OPERATIONS, arithmetic
from experiments.modular_arithmetic.model import Transformer
from experiments.modular_arithmetic.settings import PRESETS
from experiments.runner import Program
from experiments.trained import Grouped, TrainedExperiment


class ModularArithmetic(TrainedExperiment):
    """Which cells of the table help the held-out samples of which."""

    def data(self) -> Grouped:
        return arithmetic(**asdict(self.settings.data))

    def network(self) -> nn.Module:
        data, model = self.data(), self.settings.model
        return Transformer(data.num_classes, data.inputs.shape[1], **asdict(model))

    def special(self) -> tuple[Tensor, str]:
        """A task's own held-out samples or, where operands may change places, their mirror's."""
        grid = self.settings.data.grid
        own = torch.eye(grid**2, dtype=torch.bool)
        if not OPERATIONS[self.settings.data.operation].commutes:
            return own, "a cell on itself"
        mirror = torch.arange(grid**2).reshape(grid, grid).T.flatten()
        return own[mirror], "a cell on its mirror"


PROGRAM = Program(
    "modular_arithmetic",
    "Modular arithmetic: every method against the truth.",
    ModularArithmetic,
    PRESETS,
    comparison.commands(METHODS),
)
