"""What experiments depend on, in presets and YAML files.

A setting's value is the preset's, unless the YAML file of ``--config`` or ``--set`` says otherwise.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from inspect import formatannotation
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

from ksm_ext.checks import check_choice, message

AnySettings = TypeVar("AnySettings")


def check_least(settings: object, **least: int) -> None:
    """Raise ``ValueError`` unless fields are at least so much: the only number, or all of several.

    ``None`` passes, where a field may be that.
    """
    for name, minimum in least.items():
        value = getattr(settings, name)
        several = isinstance(value, tuple)
        if several and not value:
            raise ValueError(message(name, "one number or more", "none", "Name them."))
        for number in value if several else (value,):
            if number is not None and number < minimum:
                found, expected = str(number), f"at least {minimum}"
                raise ValueError(message(name, expected, found, "Raise it."))


@dataclass(frozen=True)
class Section:
    """Settings that belong together; those that are a ``Literal`` must be one of its choices."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal:
                check_choice(name, getattr(self, name), get_args(kind))


@dataclass(frozen=True)
class Settings(Section):
    """One experiment; a YAML file has the same shape, and only what differs from the preset.

    Attributes:
        data: Which samples there are, in the experiment's own terms.
        model: Which network, likewise.
    """

    data: Any
    model: Any


# -- of experiments that train networks ----------------------------------------------------------


@dataclass(frozen=True)
class Training(Section):
    """How a network is trained.

    Attributes:
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum 0.9.
        learning_rate: The highest, reached in ``num_warmup`` steps.
        decay: ``"constant"`` from then on, or ``"linear"`` to zero at the last step.
        weight_decay: Decoupled for AdamW, in the gradient for SGD.
        batch_size: Samples in a step, before those outside of the subset are left out.
        num_steps: Steps of a training.
        num_warmup: Steps until the learning rate is reached.
        checkpoints: Where a network is scored and kept, as shares of ``num_steps``.
        perturbation: ``"none"``; ``"sam"``, the gradient at the worst weights at distance
            ``radius``; or ``"nso"``, its mean at weights with Gaussian noise of standard deviation
            ``radius`` added and subtracted.
        radius: How far the perturbation goes.
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
class Truth(Section):
    """What is really retrained.

    Attributes:
        num_subsets: m, drawn without replacement.
        subset_size: Tasks in each; ``None`` draws every task with ``inclusion`` instead.
        inclusion: Probability that a task is in a subset.
        num_folds: Surrogates are fitted to the others and judged on each fold in turn.
        subset_seeds: Trainings of each subset.
        variant_subsets: How many of the subsets are also trained on in the other ways, once.
        loo_seeds: Trainings without each task, and on all of them.
        checkpoint: Which checkpoint of a training the methods explain.
        seed: Draws the subsets.
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
class Methods(Section):
    """What the methods that do not retrain are given.

    Attributes:
        num_models: Networks trained on all tasks, to average over.
        checkpoint: At which checkpoint their gradients are taken.
        proj_dim: Length of projected gradients.
        damping: Added to the curvature of influence functions.
        num_steps: The most steps of conjugate gradients and LiSSA.
        trak_ridge: TRAK's ridge, as a share of the mean diagonal of the Gram matrix of features.
        num_estimated: Subsets whose scores are estimated from gradients.
        estimate_ridge: ρ of the estimate, where it is not calibrated.
        estimate_solver: How the estimate is solved, ``"exact"`` or in one ``"step"``.
        estimate_checkpoint: At which checkpoint its gradients are taken; ``None``: at that of the
            other methods.
        num_calibrated: Subsets beside those of the truth that are retrained to calibrate it.
        num_products: Products with the Hessian that an estimate of its trace may take (Hutch++).
        hessian_ridge: Ridge of the task Hessian's inner problem.
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
    num_products: int = 32
    hessian_ridge: float = 1e-2


@dataclass(frozen=True)
class TrainedSettings(Settings):
    """An experiment that compares methods with retrained networks.

    Attributes:
        training: How networks are trained.
        truth: What is really retrained.
        methods: What the methods are given.
        variants: Other trainings by name, to compare surrogates over training: what differs from
            ``training``.
    """

    training: Training = field(default_factory=Training)
    truth: Truth = field(default_factory=Truth)
    methods: Methods = field(default_factory=Methods)
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def variant(self, name: str) -> Training:
        """The training of a variant, ``"main"`` for that of the experiment."""
        return self.training if name == "main" else replaced(self.training, self.variants[name])


# -- from presets, files and the command line ----------------------------------------------------


def load_settings(
    preset: AnySettings, config: Path | None, changes: Sequence[str] = ()
) -> AnySettings:
    """A preset, then what a YAML file says, then ``section.name=value`` one by one.

    Raises:
        ValueError: If a name or value does not exist.
    """
    settings = preset
    if config is not None:
        settings = replaced(settings, _yaml(config.read_text(), str(config)) or {}, str(config))
    told: Any = {}  # all at once: settings may only fit together
    for change in changes:
        path, equals, value = change.partition("=")
        if not equals:
            remedy = "Put an equals sign."
            raise ValueError(message("--set", "section.name=value", repr(change), remedy))
        nested = _yaml(value, f"--set {path}")
        for name in reversed(path.split(".")):
            nested = {name: nested}
        told = _merged(told, nested)
    return replaced(settings, told, "--set")


def _merged(first: Any, then: Any) -> Any:
    """Names and values of both, the later ones where both have them."""
    if not isinstance(then, Mapping):
        return then
    if not isinstance(first, Mapping):
        return first  # no names and values, which is refused
    return {**first, **{x: _merged(first[x], y) if x in first else y for x, y in then.items()}}


def replaced(
    settings: AnySettings, changes: Mapping[str, Any], where: str = "settings"
) -> AnySettings:
    """A dataclass with some fields, or fields of fields, replaced; kinds stay what they are.

    A tuple is written as a list, and a number may have an exponent without a point, as YAML 1.2 has
    it.

    Raises:
        ValueError: If there is no such field, or it does not take the value.
    """
    if not isinstance(changes, Mapping):
        raise ValueError(message(where, "names with values", repr(changes), "Name its settings."))
    hints = get_type_hints(type(settings))
    values = {}
    for name, value in changes.items():
        check_choice(where, name, tuple(hints), "Spell it so.")
        old = getattr(settings, name)
        if is_dataclass(old):
            values[name] = replaced(old, value, f"{where}: {name}")
        else:
            values[name] = _taken(name, value, hints[name], where)
    return replace(settings, **values)  # type: ignore[type-var]


def _taken(name: str, value: Any, hint: Any, where: str) -> Any:
    """What a field of this type becomes by a value of YAML."""
    kinds = _kinds(hint)
    if float in kinds and isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        kind = f"of type {formatannotation(hint)}"
        remedy = f"Write a list, [{value}]." if tuple in kinds else f"Correct {where}."
        raise ValueError(message(name, kind, repr(value), remedy))
    if tuple in kinds and value is not None:
        of_each = get_args(hint)[0]
        return tuple(_taken(f"{name}[{k}]", x, of_each, where) for k, x in enumerate(value))
    return float(value) if float in kinds and value is not None else value


_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+", re.ASCII)  # text to YAML 1.1


def _kinds(hint: Any) -> tuple[type, ...]:
    """The classes of what YAML may hold for a field; a ``Literal`` checks its values itself."""
    if isinstance(hint, UnionType):
        return tuple(kind for part in get_args(hint) for kind in _kinds(part))
    kind = get_origin(hint) or hint
    lenient = {float: (float, int), tuple: (tuple, list), Literal: (object, bool)}
    return lenient.get(kind, (kind,))


def _yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        found = " ".join(str(error).split())
        raise ValueError(message(where, "YAML", found, "Correct it.")) from error


def as_dict(settings: Any) -> dict[str, Any]:
    """A dataclass as JSON and YAML hold it."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(settings)))
    return plain
