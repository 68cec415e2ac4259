"""What experiments that train networks depend on, in presets and YAML files.

A setting's value is the preset's, unless the YAML file of ``--config`` or ``--set`` says otherwise.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

Some = TypeVar("Some")


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Attributes:
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.
        learning_rate: The highest, reached in ``num_warmup`` steps.
        decay: ``"constant"`` from then on, or ``"linear"`` to zero at the last step.
        weight_decay: Decoupled for AdamW, in the gradient for SGD.
        batch_size: Of the steps, before samples outside of the subset are left out.
        num_steps: Of a training.
        num_warmup: Steps.
        checkpoints: Where a network is scored and kept, as shares of ``num_steps``.
        perturbation: ``"none"``; ``"sam"``, the gradient at the worst weights at distance
            ``radius``; or ``"nso"``, its mean at weights with Gaussian noise of standard deviation
            ``radius`` added and subtracted.
        radius: Of the perturbation.
        autocast: Whether networks are trained in bfloat16 where that is enough, on a GPU.
    """

    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    decay: Literal["constant", "linear"] = "constant"
    weight_decay: float = 1.0
    batch_size: int = 512
    num_steps: int = 40_000
    num_warmup: int = 10
    checkpoints: tuple[float, ...] = (0.05, 0.5, 1.0)
    perturbation: Literal["none", "sam", "nso"] = "none"
    radius: float = 0.01
    autocast: bool = False

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        share = min(1.0, (step + 1) / max(self.num_warmup, 1))
        if self.decay == "linear":
            left = self.num_steps - max(self.num_warmup, 1)
            share = min(share, (self.num_steps - step) / max(left, 1))
        return self.learning_rate * share

    def stops(self) -> list[int]:
        """Steps done at each checkpoint."""
        return [max(1, round(share * self.num_steps)) for share in self.checkpoints]


@dataclass(frozen=True)
class Truth:
    """What is really retrained.

    Attributes:
        num_subsets: m, drawn without replacement.
        subset_size: Tasks in each; ``None`` draws every task with ``inclusion`` instead.
        inclusion: Probability of a task to be in a subset.
        num_folds: Surrogates are fitted to the others and judged on each fold in turn.
        subset_seeds: Trainings of each subset.
        variant_subsets: How many of the subsets are also trained on in the other ways, once.
        loo_seeds: Trainings without each task, and on all of them.
        checkpoint: Which checkpoint of a training the methods explain.
        seed: Of the draw of subsets.
    """

    num_subsets: int = 50
    subset_size: int | None = 22
    inclusion: float = 0.8
    num_folds: int = 5
    subset_seeds: int = 1
    variant_subsets: int = 50
    loo_seeds: int = 3
    checkpoint: int = -1
    seed: int = 42


@dataclass(frozen=True)
class Methods:
    """What the methods that do not retrain are given.

    Attributes:
        num_models: Networks trained on all tasks, to average over.
        checkpoint: At which checkpoint their gradients are taken.
        proj_dim: Of projected gradients.
        damping: Of influence functions.
        num_steps: Of conjugate gradients and LiSSA.
        trak_ridge: As a share of the mean diagonal of the Gram matrix of features.
        num_estimated: Subsets whose scores are estimated from gradients.
        estimate_ridge: ρ of the estimate, where it is not calibrated.
        estimate_solver: Of the estimate, ``"exact"`` or ``"step"``.
        estimate_checkpoint: At which checkpoint its gradients are taken; ``None``: at that of the
            other methods.
        num_calibrated: Subsets beside those of the truth that are retrained to calibrate it.
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
    estimate_solver: Literal["exact", "step"] = "exact"
    estimate_checkpoint: int | None = None
    num_calibrated: int = 12
    num_probes: int = 32
    hessian_ridge: float = 1e-2


@dataclass(frozen=True)
class Settings:
    """One experiment; a YAML file has the same shape, and only what differs from the preset.

    Attributes:
        data: Which samples there are, in the experiment's own terms.
        model: Which network, likewise.
        variants: Other trainings by name, to compare surrogates over training: what differs from
            ``training``.
    """

    data: Any
    model: Any
    training: Training = field(default_factory=Training)
    truth: Truth = field(default_factory=Truth)
    methods: Methods = field(default_factory=Methods)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def variant(self, name: str) -> Training:
        """The training of a variant, ``"main"`` for that of the experiment."""
        return self.training if name == "main" else replaced(self.training, self.variants[name])


def load_settings(preset: Some, config: Path | None, changes: Sequence[str] = ()) -> Some:
    """A preset, then what a YAML file says, then ``section.name=value`` one by one.

    Raises:
        ValueError: If a name or value does not exist.
    """
    settings = preset
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
    return settings


def replaced(settings: Some, changes: Mapping[str, Any], where: str = "settings") -> Some:
    """A dataclass with some fields, or fields of fields, replaced; kinds stay what they are."""
    known = {f.name: getattr(settings, f.name) for f in fields(settings)}  # type: ignore[arg-type]
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
    return replace(settings, **values)  # type: ignore[type-var]


def as_dict(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON and YAML hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain
