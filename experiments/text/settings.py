"""Settings of the experiment with text: its domains, its network, its presets."""

from dataclasses import dataclass, field, replace

from experiments.settings import Methods, Section, TrainedSettings, Training, Truth
from ksm_ext.checks import check_positive_int, message


@dataclass(frozen=True)
class Data(Section):
    """Which text there is.

    Attributes:
        path: A folder with one folder of UTF-8 text files per domain; ``None`` takes the manual
            pages and Python's documentation of this machine.
        domains: Names of the domains; none takes all folders of ``path``, or ``pages.DOMAINS``.
        length: Bytes of a window: what a sample is.
        train_bytes: The most of each domain that is trained on.
        held_out_bytes: Held-out text of each domain, whole windows of whole pages.
        gradient_windows: Training windows of each domain whose gradients methods look at.
        base_share: Share of the training that all domains divide alike, whatever the subset.
    """

    path: str | None = None
    domains: tuple[str, ...] = ()
    length: int = 64
    train_bytes: int = 150_000
    held_out_bytes: int = 8_000
    gradient_windows: int = 48
    base_share: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.base_share < 1:
            remedy = "A script that is never seen would drown all other effects."
            expected = "between 0 and 1"
            raise ValueError(message("base_share", expected, str(self.base_share), remedy))


@dataclass(frozen=True)
class Model(Section):
    """The network.

    Attributes:
        width: Of its hidden states.
        num_layers: Transformer blocks.
        num_heads: Heads of each.
        num_pairs: Rows of the table of pairs of bytes, which are hashed into it.
    """

    width: int = 64
    num_layers: int = 1
    num_heads: int = 4
    num_pairs: int = 4096


@dataclass(frozen=True)
class Mixtures(Section):
    """What is mixed, and how the best mixture is looked for.

    Attributes:
        num_random: Dirichlet mixtures that are trained on, beside the subsets.
        random_seeds: Trainings of each.
        strength: Range of the Dirichlet distribution's strength, see ``subsets.dirichlet``.
        low: The least share of a domain in a chosen mixture, in units of the uniform one.
        high: The largest, likewise.
        confidence: Of :func:`ksm_ext.selection.best_mixture`.
        chosen_seeds: Trainings of each mixture that was chosen, and of those it is compared with;
            two or more.
        rate: By how much DoReMi's weights follow the excess losses in a step.
    """

    num_random: int = 24
    random_seeds: int = 1
    strength: tuple[float, ...] = (1.0, 10.0)
    low: float = 0.3
    high: float = 3.0
    confidence: float = 0.9
    chosen_seeds: int = 6
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chosen_seeds < 2:
            remedy = "Differences need an interval."
            raise ValueError(message("chosen_seeds", "2 or more", str(self.chosen_seeds), remedy))


@dataclass(frozen=True)
class FineTuning(Section):
    """Low-rank adapters of the networks trained on all domains, and what they are trained on.

    Attributes:
        rank: Of the change of each linear layer's weight, r.
        alpha: The change is scaled by alpha / r.
        learning_rate: The highest; steps are as those of a training otherwise, without decay of
            weights.
        num_steps: Steps of a fine-tuning, a tenth of them until the learning rate is reached.
        num_subsets: How many of the truth's subsets are fine-tuned on, at most.
        subset_seeds: Fine-tunings on each.
        loo_seeds: Fine-tunings without each domain, on each alone, and on all.
    """

    rank: int = 4
    alpha: float = 8.0
    learning_rate: float = 3e-3
    num_steps: int = 100
    num_subsets: int = 48
    subset_seeds: int = 1
    loo_seeds: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "num_subsets", "subset_seeds", "loo_seeds"):
            check_positive_int(name, getattr(self, name))


@dataclass(frozen=True)
class TextSettings(TrainedSettings):
    """All that a score depends on, and what is made of it.

    Attributes:
        mixtures: The second question.
        fine_tuning: The first question once more.
    """

    mixtures: Mixtures = field(default_factory=Mixtures)
    fine_tuning: FineTuning = field(default_factory=FineTuning)


SMALL = TextSettings(
    Data(),
    Model(),
    Training(
        learning_rate=3e-3,
        decay="linear",
        weight_decay=0.01,
        batch_size=24,
        num_steps=300,
        num_warmup=20,
        checkpoints=(0.5, 1.0),
    ),
    Truth(num_subsets=48, subset_size=None, inclusion=0.7, subset_seeds=1, loo_seeds=3),
    Methods(num_models=2, proj_dim=1024, num_steps=12, num_calibrated=12, estimate_solver="step"),
)
PAPER = replace(
    SMALL,
    data=Data(length=128, train_bytes=1_000_000, held_out_bytes=32_000, gradient_windows=256),
    model=Model(width=256, num_layers=4, num_pairs=16_384),
    training=replace(SMALL.training, batch_size=64, num_steps=5_000, num_warmup=200),
    truth=replace(SMALL.truth, num_subsets=120, subset_seeds=3, loo_seeds=6),
    methods=replace(SMALL.methods, num_models=3, proj_dim=4096),
    mixtures=Mixtures(num_random=120, random_seeds=2, chosen_seeds=8),
    fine_tuning=FineTuning(rank=8, alpha=16.0, num_steps=1_000, num_subsets=120, loo_seeds=6),
)
SMOKE = replace(
    SMALL,
    data=Data(
        domains=("de", "nl", "fr", "it", "python"),
        length=32,
        train_bytes=20_000,
        held_out_bytes=2_000,
        gradient_windows=8,
    ),
    model=Model(width=16, num_heads=2, num_pairs=512),
    training=replace(SMALL.training, batch_size=10, num_steps=150),
    truth=replace(
        SMALL.truth, num_subsets=15, inclusion=0.6, num_folds=3, subset_seeds=2, loo_seeds=2
    ),
    methods=replace(SMALL.methods, proj_dim=128, num_steps=4, num_estimated=20, num_calibrated=4),
    mixtures=Mixtures(num_random=8, chosen_seeds=3),
    fine_tuning=FineTuning(rank=2, alpha=4.0, num_steps=60, loo_seeds=2),
)
PRESETS = {"paper": PAPER, "small": SMALL, "smoke": SMOKE}
