"""Settings of the modular experiment: its samples, its transformer, its presets."""

from dataclasses import dataclass, replace
from typing import Literal

from experiments.modular_arithmetic.data import OPERATIONS
from experiments.settings import Methods, Section, TrainedSettings, Training, Truth
from ksm_ext.checks import check_choice


@dataclass(frozen=True)
class Data(Section):
    """Which samples there are.

    Attributes:
        operation: Key of ``data.OPERATIONS``.
        modulus: p.
        grid: Cells along an operand; n = grid² tasks.
        held_out: Share of each cell that is a target.
        num_samples: Tuples that are drawn; ``None`` takes all p^r.
        seed: Draws the samples, and what is held out.
    """

    operation: str = "add"
    modulus: int = 97
    grid: int = 5
    held_out: float = 0.1
    num_samples: int | None = None
    seed: int = 33

    def __post_init__(self) -> None:
        check_choice("operation", self.operation, tuple(OPERATIONS))


@dataclass(frozen=True)
class Model(Section):
    """The transformer."""

    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    activation: Literal["relu", "gelu"] = "relu"


VARIANTS = {
    "SGD": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 1e-3},
    "SAM": {"perturbation": "sam", "radius": 0.05},
    "NSO": {"perturbation": "nso", "radius": 0.01},
}
PAPER = TrainedSettings(Data(), Model(), variants=VARIANTS)
SMALL = TrainedSettings(
    Data(modulus=23, held_out=0.3),
    Model(width=64),
    Training(batch_size=128, num_steps=260, checkpoints=(0.3, 0.6, 1.0)),
    Truth(subset_size=None, subset_seeds=3, loo_seeds=4, checkpoint=1, variant_subsets=30),
    Methods(num_models=2, checkpoint=0, proj_dim=1024, num_steps=12, num_products=12),
    VARIANTS,
)
SMOKE = replace(
    SMALL,
    data=Data(modulus=11, grid=3, held_out=0.3),
    model=Model(width=16, num_layers=1),
    training=replace(SMALL.training, batch_size=64, num_steps=30),
    truth=replace(SMALL.truth, num_subsets=15, subset_seeds=2, loo_seeds=2, variant_subsets=10),
    methods=replace(
        SMALL.methods,
        proj_dim=256,
        num_steps=8,
        num_estimated=100,
        num_calibrated=8,
        num_products=6,
    ),
)
PRESETS = {"paper": PAPER, "small": SMALL, "smoke": SMOKE}
