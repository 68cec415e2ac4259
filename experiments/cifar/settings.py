"""Settings of the CIFAR experiment: its images, its network, its presets."""

from dataclasses import dataclass, field, replace
from typing import Literal

from experiments.settings import Methods, Section, TrainedSettings, Training, Truth
from ksm_ext.checks import message


@dataclass(frozen=True)
class Data(Section):
    """Which images there are, in which groups.

    Attributes:
        path: A folder for ``torchvision.datasets.CIFAR10``, which downloads there what it lacks;
            or a packed ``.npz`` file, see :mod:`experiments.cifar.data`.
        num_groups: n.
        group_size: Training images in each.
        concentration: Parameter of the Dirichlet distribution of the classes' shares in a group;
            ``None`` draws groups at random, as published. Random groups are all alike: what
            leaving out one of them does is less than what another seed does, and needs dozens of
            trainings to be seen. Below 1, a group has few classes, and effects of its own.
        targets: ``"class"``, or ``"random"`` groups of held-out images as published.
        num_targets: Random ones.
        num_held: Held-out images.
        size: Pixels of a side: 32, or 16 if images are averaged over squares of 2 by 2 pixels.
        num_noisy: Groups in which labels are flipped.
        noise: Share of their labels.
        seed: Draws the groups and the flips.
    """

    path: str = "runs/data"
    num_groups: int = 50
    group_size: int = 1000
    concentration: float | None = None
    targets: Literal["class", "random"] = "random"
    num_targets: int = 5
    num_held: int = 10_000
    size: Literal[16, 32] = 32
    num_noisy: int = 0
    noise: float = 0.1
    seed: int = 1234

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.num_noisy <= self.num_groups:
            expected, remedy = f"between 0 and {self.num_groups}", "Flip labels in fewer groups."
            raise ValueError(message("num_noisy", expected, str(self.num_noisy), remedy))


@dataclass(frozen=True)
class Model(Section):
    """The network.

    Attributes:
        name: The architecture.
        widths: Channels of ResNet-9.
        norm: ``"batch"``, or ``"group"`` normalisation, of 4 groups.
        channels_last: Whether images and weights lie in memory that way.
    """

    name: Literal["resnet9", "resnet18"] = "resnet9"
    widths: tuple[int, ...] = (64, 128, 256, 128)
    norm: Literal["batch", "group"] = "batch"
    channels_last: bool = True


@dataclass(frozen=True)
class Lissa(Section):
    """Influence by LiSSA on random mini-batches, as the original's influence functions do it.

    Attributes:
        depth: Steps of the recursion.
        num_averages: Recursions whose solutions are averaged.
        batch_size: Images in a step.
        damping: Added to the curvature.
        scale: What the curvature is divided by: above half of its largest eigenvalue on any batch.
    """

    depth: int = 1
    num_averages: int = 1
    batch_size: int = 512
    damping: float = 0.01
    scale: float = 25.0


@dataclass(frozen=True)
class Mislabelled(Section):
    """The search for groups with flipped labels.

    Attributes:
        num_draws: Draws of groups, of noisy ones among them, and of their flipped labels.
        num_noisy: Groups with flipped labels.
        noise: Share of their labels.
        checkpoint: At which methods look: late, when right labels are learnt and wrong ones are
            not.
        methods: Those that need no retraining, by name.
    """

    num_draws: int = 3
    num_noisy: int = 10
    noise: float = 0.1
    checkpoint: int = -1
    methods: tuple[str, ...] = (
        "kernel surrogate, estimated",
        "influence, CG on GGN",
        "influence, mini-batch LiSSA",
        "influence, projected",
        "influence, EK-FAC",
        "TRAK",
        "TracIn",
        "gradient cosine",
    )


@dataclass(frozen=True)
class CifarSettings(TrainedSettings):
    """What every experiment depends on, and what this one adds.

    Attributes:
        lissa: Influence by mini-batch LiSSA.
        curvature_images: Training images whose curvature conjugate gradients solve with.
        mislabelled: The search for groups with flipped labels.
    """

    lissa: Lissa = field(default_factory=Lissa)
    curvature_images: int = 5000
    mislabelled: Mislabelled = field(default_factory=Mislabelled)


STEPS_PER_EPOCH = 98  # 50,000 images in batches of 512
PAPER = CifarSettings(
    Data(),
    Model(),
    Training(
        optimizer="sgd",
        learning_rate=0.4,
        decay="linear",
        weight_decay=5e-4,
        batch_size=512,
        num_steps=25 * STEPS_PER_EPOCH,
        num_warmup=5 * STEPS_PER_EPOCH,
        checkpoints=(0.2, 0.4, 0.6, 1.0),
        autocast=True,
    ),
    Truth(subset_size=30, inclusion=0.6, loo_seeds=5, seed=2025),
    Methods(checkpoint=1),
)
SMALL = replace(
    PAPER,
    data=Data(
        num_groups=20, group_size=250, concentration=0.3, targets="class", num_held=1000, size=16
    ),
    model=Model(widths=(8, 16, 32, 16)),
    training=replace(
        PAPER.training,
        learning_rate=0.1,
        batch_size=128,
        num_steps=240,
        num_warmup=48,
        checkpoints=(0.25, 0.5, 0.75, 1.0),
    ),
    truth=replace(PAPER.truth, subset_size=16, inclusion=0.8, subset_seeds=2, loo_seeds=4),
    methods=replace(
        PAPER.methods,
        checkpoint=0,
        proj_dim=1024,
        num_steps=10,
        num_models=2,
        num_estimated=200,
        trak_ridge=0.1,
        estimate_ridge=0.1,
        estimate_solver="step",
        estimate_checkpoint=2,
    ),
    lissa=Lissa(depth=30, batch_size=128, scale=100.0),
    curvature_images=500,
    mislabelled=Mislabelled(
        num_noisy=5,
        methods=(
            "kernel surrogate, estimated",
            "influence, projected",
            "TRAK",
            "TracIn",
            "gradient cosine",
        ),
    ),
)
SMOKE = replace(
    SMALL,
    data=replace(SMALL.data, num_groups=8, group_size=40, num_held=200),
    model=replace(SMALL.model, widths=(8, 8, 8, 8)),
    training=replace(
        SMALL.training, batch_size=64, num_steps=20, num_warmup=4, checkpoints=(0.5, 1.0)
    ),
    truth=replace(
        SMALL.truth, num_subsets=15, subset_size=6, num_folds=3, subset_seeds=1, loo_seeds=2
    ),
    methods=replace(
        SMALL.methods,
        estimate_checkpoint=1,
        proj_dim=128,
        num_steps=2,
        num_models=1,
        num_estimated=50,
        num_calibrated=6,
    ),
    lissa=replace(SMALL.lissa, depth=3),
    curvature_images=100,
    mislabelled=replace(SMALL.mislabelled, num_draws=1, num_noisy=2),
)
PRESETS = {"paper": PAPER, "small": SMALL, "smoke": SMOKE}
