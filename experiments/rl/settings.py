"""Settings of reinforcement learning: its tasks, its policies, its presets."""

from dataclasses import dataclass, field, replace

from experiments.rl.data import Data, counts_of
from experiments.rl.model import Model
from experiments.rl.ppo import Training
from experiments.settings import Section, Settings, check_least
from ksm_ext.checks import check_level, check_positive, message

NUM_STEPS = 1024
"""Of each task, or some more, in a rollout that the samples of methods are drawn from."""

LEAST_JUDGED = 8
"""Subsets that a bootstrap is drawn from; of fewer, all draws may be of one."""


@dataclass(frozen=True)
class Truth(Section):
    """What is really trained.

    Attributes:
        num_subsets: m that surrogates are fitted to, each task drawn with probability 1/2.
        num_seeds: Trainings of each of them, averaged.
        num_references: Other subsets that methods are judged by, trained once; ``None`` is all
            subsets there are, of which Shapley and Banzhaf values are exact.
        num_edge_seeds: Trainings of the subsets of at most one task and at least all but one, of
            which Shapley values are made most.
        num_judged: Of the subsets that no method was fitted to, those that predictions are judged
            by; all where there are fewer.
        num_judges: More trainings of each of these.
        batch: Policies that are trained at once.
        seed: Draws the subsets.
    """

    num_subsets: int = 192
    num_seeds: int = 2
    num_references: int | None = None
    num_edge_seeds: int = 8
    num_judged: int = 512
    num_judges: int = 3
    batch: int = 64
    seed: int = 42

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, num_subsets=8, num_seeds=1, num_references=8, num_edge_seeds=2)
        check_least(self, num_judged=LEAST_JUDGED, num_judges=1, batch=1)


@dataclass(frozen=True)
class Methods(Section):
    """What the methods that do not retrain are given.

    Attributes:
        num_models: Policies trained on all tasks, to average over.
        num_samples: Steps of each task at each policy, whose gradients are taken.
        proj_dim: Length of projected gradients.
        num_calibrated: Of the subsets, that estimates are calibrated with.
        num_estimated: Subsets whose scores are estimated.
        damping: Of influence functions; ``None`` is a hundredth of the largest curvature.
        num_steps: The most steps of conjugate gradients.
        trak_ridge: TRAK's ridge, as a share of the mean diagonal of its Gram matrix.
    """

    num_models: int = 4
    num_samples: int = 400
    proj_dim: int = 400
    num_calibrated: int = 16
    num_estimated: int = 1000
    damping: float | None = None
    num_steps: int = 100
    trak_ridge: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, num_models=1, proj_dim=1, num_calibrated=4, num_estimated=1, num_steps=1)
        low, high = self.num_models, self.num_models * NUM_STEPS
        if not low <= self.num_samples <= high:
            expected, remedy = f"from {low} to {high}, by `num_models`", "Choose another."
            raise ValueError(message("num_samples", expected, str(self.num_samples), remedy))
        for name in ("damping", "trak_ridge"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name), "Choose a positive one.")


@dataclass(frozen=True)
class Curve(Section):
    """How many subsets a surrogate needs.

    Attributes:
        sizes: Numbers of subsets that surrogates are fitted to.
        num_draws: Of each number.
    """

    sizes: tuple[int, ...] = (30, 60, 120, 180)
    num_draws: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, sizes=8, num_draws=2)


@dataclass(frozen=True)
class Selection(Section):
    """Choosing tasks to train on.

    Attributes:
        size: The most tasks that may be chosen for a target.
        num_draws: Of the choices that are made at random.
        num_seeds: Trainings on what was chosen.
    """

    size: int = 4
    num_draws: int = 2
    num_seeds: int = 10

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, size=1, num_draws=1, num_seeds=2)


@dataclass(frozen=True)
class Objectives(Section):
    """Weights of the objectives of an environment.

    Attributes:
        environments: Of mo-gymnasium, with a list of actions.
        num_mixtures: Weights drawn uniformly, that surrogates are fitted to.
        num_seeds: Trainings under each of them.
        chosen_seeds: Trainings under what was chosen.
        num_episodes: That a policy is judged by.
        batch: Policies that are trained at once.
        confidence: With which the chosen weights shall be best.
        training: How policies are trained.
        seed: Draws the weights.
    """

    environments: tuple[str, ...] = ("deep-sea-treasure-v0", "mo-reacher-v5")
    num_mixtures: int = 36
    num_seeds: int = 2
    chosen_seeds: int = 4
    num_episodes: int = 8
    batch: int = 18
    confidence: float = 0.9
    training: Training = field(
        default_factory=lambda: Training(
            num_environments=8, num_steps=50, num_rollouts=50, batch_size=100, discount=0.95
        )
    )
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, num_mixtures=12, num_seeds=1, chosen_seeds=2, num_episodes=1, batch=1)
        check_level("confidence", self.confidence)


@dataclass(frozen=True)
class PolicySettings(Settings):
    """What a policy and its scores depend on."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)


@dataclass(frozen=True)
class RLSettings(PolicySettings):
    """All that results depend on."""

    truth: Truth = field(default_factory=Truth)
    methods: Methods = field(default_factory=Methods)
    curve: Curve = field(default_factory=Curve)
    selection: Selection = field(default_factory=Selection)
    objectives: Objectives = field(default_factory=Objectives)

    def __post_init__(self) -> None:
        super().__post_init__()
        fewest = min(sum(counts_of(name)) for name in self.data.suites)
        subsets = self.truth.num_subsets
        for name, value, most, what in (
            ("selection.size", self.selection.size, fewest - 1, "all tasks of a suite but one"),
            ("curve.sizes", max(self.curve.sizes), subsets, "`truth.num_subsets`"),
            ("methods.num_calibrated", self.methods.num_calibrated, subsets, "`truth.num_subsets`"),
        ):
            if value > most:
                raise ValueError(message(name, f"at most {most}, {what}", str(value), "Lower it."))

    def of_policies(self, suite: str) -> PolicySettings:
        """Those that policies of a suite depend on, and no others."""
        return PolicySettings(replace(self.data, suites=(suite,)), self.model, self.training)


PRESETS = {
    "small": RLSettings(),
    "paper": RLSettings(
        Data(suites=("MT10",), horizon=500),
        Model(widths=(400, 400, 400)),
        Training(
            num_environments=20,
            num_steps=1024,
            num_rollouts=1000,
            num_epochs=8,
            batch_size=2048,
            learning_rate=5e-4,
            discount=0.99,
            trace=0.97,
            entropy=0.005,
        ),
        Truth(num_subsets=96, num_references=64, num_edge_seeds=2, num_judges=1, batch=4),
        Methods(num_estimated=1000),
        Curve(sizes=(16, 32)),
        Selection(size=3, num_seeds=3),
    ),
    "smoke": RLSettings(
        Data(suites=("3+2",), num_episodes=4),
        training=Training(num_environments=12, num_rollouts=8),
        truth=Truth(num_subsets=20, num_edge_seeds=2, num_judges=1, batch=16),
        methods=Methods(num_models=2, num_samples=100, proj_dim=100, num_calibrated=8),
        curve=Curve(sizes=(12,), num_draws=2),
        selection=Selection(size=2, num_draws=1, num_seeds=2),
        objectives=Objectives(
            environments=("deep-sea-treasure-v0",), num_mixtures=12, chosen_seeds=2, batch=12
        ),
    ),
}
