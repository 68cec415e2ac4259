"""Settings of the digits experiment: its groups, its network, its presets."""

from dataclasses import dataclass, field

from experiments.settings import Section, Settings
from ksm_ext.checks import message


@dataclass(frozen=True)
class Data(Section):
    """The groups of images.

    Attributes:
        num_tasks: Groups of training images, n.
        num_bad: How many of them get shuffled labels.
        group_size: Images in a group.
    """

    num_tasks: int = 20
    num_bad: int = 3
    group_size: int = 25


@dataclass(frozen=True)
class Model(Section):
    """The network and its training.

    Attributes:
        num_hidden: Width of the network.
        num_epochs: Passes over the training images.
        batch_size: Images in a step.
        learning_rate: Adam's learning rate.
    """

    num_hidden: int = 64
    num_epochs: int = 20
    batch_size: int = 50
    learning_rate: float = 0.02


@dataclass(frozen=True)
class DigitsSettings(Settings):
    """All that a score depends on.

    Attributes:
        num_subsets: Subsets that are scored, m; an even number.
        num_repeats: Trainings whose scores are averaged for each subset.
        seed: Draws the split, the bad groups, the subsets, and every initialisation.
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    num_subsets: int = 120
    num_repeats: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed < 0:
            raise ValueError(message("seed", "at least 0", str(self.seed), "Choose another."))


PRESETS = {
    "small": DigitsSettings(),
    "smoke": DigitsSettings(
        Data(num_tasks=8, num_bad=2, group_size=60), Model(num_epochs=6), num_subsets=24
    ),
}
