"""All that the experiment depends on, in presets and YAML files.

A setting's value is the preset's, unless the YAML file of ``--config`` or ``--set`` says otherwise.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from experiments.modular_arithmetic.data import OPERATIONS


@dataclass(frozen=True)
class Data:
    """Which samples there are.

    Attributes:
        operation: Key of ``data.OPERATIONS``.
        modulus: p.
        grid: Cells along an operand; n = grid² tasks.
        held_out: Share of each cell that is a target.
        num_samples: Tuples that are drawn; ``None`` takes all p^r.
        seed: Of the draw and of what is held out.
    """

    operation: str = "add"
    modulus: int = 97
    grid: int = 5
    held_out: float = 0.1
    num_samples: int | None = None
    seed: int = 33


@dataclass(frozen=True)
class Model:
    """The transformer."""

    width: int = 128
    num_layers: int = 2
    num_heads: int = 4
    activation: Literal["relu", "gelu"] = "relu"


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.
        learning_rate: Reached in ``num_warmup`` steps, constant from then on.
        weight_decay: Decoupled for AdamW, in the gradient for SGD.
        batch_size: Of the steps, before samples outside of the subset are left out.
        num_steps: Of a training.
        num_warmup: Steps.
        checkpoints: Where a network is scored and kept, as shares of ``num_steps``.
        perturbation: ``"none"``; ``"sam"``, the gradient at the worst weights at distance
            ``radius``; or ``"nso"``, its mean at weights with Gaussian noise of standard deviation
            ``radius`` added and subtracted.
        radius: Of the perturbation.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1.0
    batch_size: int = 512
    num_steps: int = 40_000
    num_warmup: int = 10
    checkpoints: tuple[float, ...] = (0.05, 0.5, 1.0)
    perturbation: Literal["none", "sam", "nso"] = "none"
    radius: float = 0.01


@dataclass(frozen=True)
class Truth:
    """What is really retrained.

    Attributes:
        num_subsets: m, drawn without replacement.
        subset_size: Tasks in each; ``None`` draws every task with ``inclusion`` instead.
        inclusion: Probability of a task to be in a subset.
        num_folds: Surrogates are fitted to the others and judged on each fold in turn.
        subset_seeds: Trainings of each subset.
        loo_seeds: Trainings without each task, and on all of them.
        checkpoint: Which checkpoint of a training the methods explain.
        seed: Of the draw of subsets.
    """

    num_subsets: int = 50
    subset_size: int | None = 22
    inclusion: float = 0.8
    num_folds: int = 5
    subset_seeds: int = 1
    loo_seeds: int = 3
    checkpoint: int = -1
    seed: int = 42


@dataclass(frozen=True)
class Methods:
    """What the methods that do not retrain are given.

    Attributes:
        num_models: Networks trained on all tasks, with other seeds than the truth, to average over.
        checkpoint: At which checkpoint their gradients are taken.
        proj_dim: Of projected gradients.
        damping: Of influence functions.
        num_steps: Of conjugate gradients and LiSSA.
        trak_ridge: As a share of the mean diagonal of the Gram matrix of features.
        num_estimated: Subsets whose scores are estimated from gradients.
        estimate_ridge: ρ of the estimate.
        num_probes: Of traces and densities.
        hessian_ridge: Of the task Hessian's inner problem.
    """

    num_models: int = 3
    checkpoint: int = -1
    proj_dim: int = 2048
    damping: float = 1e-2
    num_steps: int = 50
    trak_ridge: float = 1e-2
    num_estimated: int = 1000
    estimate_ridge: float = 1e-2
    num_probes: int = 32
    hessian_ridge: float = 1e-2


@dataclass(frozen=True)
class Settings:
    """One experiment; a YAML file has the same shape, and only what differs from the preset.

    Attributes:
        variants: Other trainings by name, to compare surrogates over training: what differs from
            ``training``.
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    training: Training = field(default_factory=Training)
    truth: Truth = field(default_factory=Truth)
    methods: Methods = field(default_factory=Methods)
    variants: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {
            "SGD": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 1e-4},
            "SAM": {"perturbation": "sam", "radius": 0.05},
            "NSO": {"perturbation": "nso", "radius": 0.01},
        }
    )

    def variant(self, name: str) -> Training:
        """The training of a variant, ``"main"`` for that of the experiment."""
        return self.training if name == "main" else replaced(self.training, self.variants[name])


PAPER = Settings()
SMALL = Settings(
    Data(modulus=23, held_out=0.3),
    Model(width=64),
    Training(batch_size=128, num_steps=320, checkpoints=(0.25, 0.5, 1.0)),
    Truth(subset_size=None, subset_seeds=4, loo_seeds=6, checkpoint=1),
    Methods(num_models=2, checkpoint=0, proj_dim=1024, num_steps=30),
    {
        "SGD": {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 1e-3},
        "SAM": {"perturbation": "sam", "radius": 0.05},
        "NSO": {"perturbation": "nso", "radius": 0.01},
    },
)
SMOKE = replace(
    SMALL,
    data=Data(modulus=11, grid=3, held_out=0.3),
    model=Model(width=32, num_layers=1),
    training=replace(SMALL.training, batch_size=64, num_steps=60),
    truth=replace(SMALL.truth, num_subsets=15, subset_seeds=2, loo_seeds=2),
    methods=replace(SMALL.methods, proj_dim=256, num_estimated=100, num_probes=8),
)
PRESETS = {"paper": PAPER, "small": SMALL, "smoke": SMOKE}


def load_settings(preset: str, config: Path | None, changes: Sequence[str] = ()) -> Settings:
    """A preset, then what a YAML file says, then ``section.name=value`` one by one.

    Raises:
        ValueError: If a name or value does not exist.
    """
    settings = PRESETS[preset]
    if config is not None:
        settings = replaced(settings, yaml.safe_load(config.read_text()) or {}, str(config))
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            raise ValueError(
                f"`--set` must be section.name=value, got {change!r}. Put an equals sign."
            )
        nested: Any = yaml.safe_load(value)
        for name in reversed(path.split(".")):
            nested = {name: nested}
        settings = replaced(settings, nested, "--set")
    if settings.data.operation not in OPERATIONS:
        raise ValueError(
            f"`operation` must be one of {', '.join(OPERATIONS)}, "
            f"got {settings.data.operation!r}. Choose one of these."
        )
    return settings


def replaced(settings: Any, changes: Mapping[str, Any], where: str = "settings") -> Any:
    """A dataclass with some fields, or fields of fields, replaced; kinds stay what they are."""
    known = {f.name: getattr(settings, f.name) for f in fields(settings)}
    values = {}
    for name, value in changes.items():
        if name not in known:
            raise ValueError(
                f"`{where}` must have names among {', '.join(known)}, got {name!r}. Spell it so."
            )
        old = known[name]
        if is_dataclass(old):
            value = replaced(old, value, f"{where}: {name}")
        elif isinstance(old, tuple):
            value = tuple(value)
        elif isinstance(old, float):
            value = float(value)
        elif old is not None and not isinstance(value, type(old)):
            raise ValueError(
                f"`{name}` must be of type {type(old).__name__}, got {value!r}. Correct {where}."
            )
        values[name] = value
    return replace(settings, **values)


def as_dict(settings: Settings) -> dict[str, Any]:
    """Settings as JSON and YAML hold them."""
    plain: dict[str, Any] = asdict(settings)
    return plain
