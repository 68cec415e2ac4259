"""Settings from presets, files and the command line, and what they refuse."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.cifar.settings import SMALL as CIFAR
from experiments.icl.settings import SMALL as ICL
from experiments.modular_arithmetic.settings import SMOKE
from experiments.settings import Section, Training, as_dict, load_settings, replaced


def test_settings_from_yaml_and_flags(tmp_path):
    file = tmp_path / "some.yaml"
    file.write_text("data: {operation: mul}\ntraining: {learning_rate: 1.0e-4}\n")
    loaded = load_settings(SMOKE, file, ["truth.seed=5", "training.checkpoints=[0.5, 1.0]"])
    assert loaded.data.operation == "mul" and loaded.data.modulus == 11
    assert loaded.training.checkpoints == (0.5, 1.0) and loaded.truth.seed == 5
    assert loaded.variant("SAM").perturbation == "sam"
    assert loaded.variant("SAM").learning_rate == 1e-4


def test_nothing_is_said_by_null():
    """As the README of cifar has it, for random groups."""
    loaded = load_settings(CIFAR, None, ["data.concentration=null", "truth.subset_size=null"])
    assert loaded.data.concentration is None and loaded.truth.subset_size is None
    with pytest.raises(ValueError, match="`seed` must be of type int, got None"):
        load_settings(CIFAR, None, ["truth.seed=null"])


def test_numbers_have_exponents_as_they_are_written():
    """YAML 1.1, which PyYAML reads, takes 1e-3 for text."""
    changes = ["training.learning_rate=1e-3", "training.checkpoints=[5e-1, 1.E+0]"]
    loaded = load_settings(SMOKE, None, changes)
    assert loaded.training.learning_rate == 1e-3
    assert loaded.training.checkpoints == (0.5, 1.0)


def test_changes_are_taken_together():
    with pytest.raises(ValueError, match=r"`coin_weights` must be as many as `coins`"):
        load_settings(ICL, None, ["data.coin_weights=[1.0]"])
    loaded = load_settings(ICL, None, ["data.coin_weights=[1.0]", "data.coins=[a]"])
    assert loaded.data.coins == ("a",) and loaded.data.coin_weights == (1.0,)
    for changes in (
        ["training=fast", "training.num_steps=5"],
        ["training.num_steps=5", "training=fast"],
    ):
        with pytest.raises(ValueError, match="must be names with values, got 'fast'"):
            load_settings(SMOKE, None, changes)


REFUSED = [
    ("training.checkpoints=[0.5, end]", r"`checkpoints\[1\]` must be of type float, got 'end'"),
    ("training.radius=1e", "`radius` must be of type float, got '1e'"),
    ("training.lr=1", r"`--set: training` must be one of .*'decay'.*, got 'lr'"),
    ("lr=1", r"`--set` must be one of 'data', .*, got 'lr'"),
    ("truth.num_subsets=many", "`num_subsets` must be of type int, got 'many'"),
    ("truth.num_subsets=true", "`num_subsets` must be of type int, got True"),
    ("training.radius=far", "`radius` must be of type float, got 'far'"),
    ("training.checkpoints=0.5", r"`checkpoints` must be of type tuple\[float, ...\], got 0.5"),
    ("training.checkpoints=end", r"`checkpoints` must be of type tuple.*, got 'end'"),
    ("truth.subset_size=half", r"`subset_size` must be of type int \| None, got 'half'"),
    ("training.decay=steep", "`decay` must be one of 'constant', 'linear', got 'steep'"),
    ("training.decay=[1]", "`decay` must be one of 'constant', 'linear', got"),
    ("training=fast", "`--set: training` must be names with values, got 'fast'"),
    ("data.operation=power", "`operation` must be one of 'add', .*, got 'power'"),
    (
        "methods.num_probes=9",
        "`--set: methods` must be one of .*'num_products', .*, got 'num_probes",
    ),
    ("truth.seed", r"`--set` must be section\.name=value, got 'truth.seed'"),
    ("truth.seed=[", "`--set truth.seed` must be YAML, got"),
]
REFUSED_BY_OTHERS = [
    ("data.size=8", "`size` must be one of 16, 32, got 8", CIFAR),
    ("data.num_noisy=51", "`num_noisy` must be between 0 and 20, got 51", CIFAR),
    ("data.targets=all", "`targets` must be one of 'class', 'random', got 'all'", CIFAR),
    ("model.norm=layer", "`norm` must be one of 'batch', 'group', got 'layer'", CIFAR),
    ("model.name=vgg", "`name` must be one of 'resnet9', 'resnet18', got 'vgg'", CIFAR),
    ("data.coin_weights=[1.0]", "`coin_weights` must be as many as `coins`, got 1 for 8", ICL),
]


@pytest.mark.parametrize(
    ("change", "error", "preset"), [(*pair, SMOKE) for pair in REFUSED] + REFUSED_BY_OTHERS
)
def test_what_does_not_exist_is_refused(change, error, preset):
    with pytest.raises(ValueError, match=error):
        load_settings(preset, None, [change])


def test_a_file_is_of_names_and_values(tmp_path):
    file = tmp_path / "some.yaml"
    for text, error in (("5", "must be names with values, got 5"), ("a: [", "must be YAML, got")):
        file.write_text(text)
        with pytest.raises(ValueError, match=error):
            load_settings(SMOKE, file)
    file.write_text("")
    assert load_settings(SMOKE, file) == SMOKE


@dataclass(frozen=True)
class Any(Section):
    whole: int = 1
    real: float = 1.0
    maybe: float | None = None
    text: str = ""
    flag: bool = False
    some: tuple[int, ...] = ()
    choice: Literal["a", "b"] = "a"
    inner: Training = field(default_factory=Training)


VALUES = {
    "whole": st.integers(),
    "real": st.floats(allow_nan=False) | st.integers(-1000, 1000),
    "maybe": st.none() | st.floats(allow_nan=False),
    "text": st.text(),
    "flag": st.booleans(),
    "some": st.lists(st.integers()),
    "choice": st.sampled_from(["a", "b"]),
}
ANYTHING = st.one_of(*VALUES.values(), st.dictionaries(st.text(max_size=2), st.integers()))


@given(st.fixed_dictionaries({}, optional=VALUES))
@settings(derandomize=True, deadline=None, database=None, max_examples=100)
def test_what_is_of_its_kind_is_taken_and_comes_back(changes):
    found = replaced(Any(), changes)
    for name, value in changes.items():
        assert getattr(found, name) == (tuple(value) if name == "some" else value)
    assert replaced(Any(), as_dict(found)) == found  # as it is kept in config.json


@given(st.sampled_from(sorted(VALUES)), ANYTHING)
@settings(derandomize=True, deadline=None, database=None, max_examples=200)
def test_whatever_is_said_it_is_taken_or_refused_in_words(name, value):
    before = type(getattr(Any(), name))
    try:
        found = getattr(replaced(Any(), {name: value}), name)
    except ValueError as error:
        assert str(error).startswith(f"`{name}` must be ") and ", got " in str(error)
    else:
        assert isinstance(found, before) or name == "maybe"
