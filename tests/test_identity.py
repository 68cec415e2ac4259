"""Identities: another one for everything that decides numbers, and the same wherever it runs."""

import ast
import collections
import copy
import dataclasses
import enum
import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ksm_ext
from ksm_ext import Projector, evaluation
from ksm_ext.evaluation import _mean_of_rows
from ksm_ext.identity import changed as altered
from ksm_ext.identity import checksums, differences, fingerprint, identify
from ksm_ext.network.outputs import log_odds, margin
from ksm_ext.network.spectrum import signs
from ksm_ext.selection import _Objective

SCALE = 1.0
TABLE = {"layers": [8, 8], "rates": (0.1, 0.2)}


def changed(one, other):
    """Names of what differs between two things."""
    return names_of(identify(it=one), identify(it=other))


def names_of(facts, others):
    return [name for name, *_ in differences(facts, others)]


# -- changes that are noticed -------------------------------------------------------------------


def make(temperature, table=None):
    def output(model, sample, power=2):
        return model(sample) / temperature if table is None else table

    return output


def with_default(value):
    def output(model, sample, power=value, *, factor=1.0):
        return model(sample) ** power

    return output


def method_of(value):
    class Output:
        rate = value

        def __call__(self, model, sample):
            return self.rate * self.helper(sample)

        def helper(self, sample):
            return sample

    return Output


def inherited(value):
    class Parent:
        def __call__(self, x):
            return x * value

    class Child(Parent):
        pass

    return Child()


class Scaled:
    def __init__(self, factor, **others):
        self.factor = factor
        self.__dict__ |= others

    def __repr__(self):
        return "Scaled()"

    def __call__(self, x):
        return self.factor * x


class Slotted:
    __slots__ = ("factor",)

    def __init__(self, factor):
        self.factor = factor


class Color(enum.Enum):
    RED, BLUE = 1, 2


Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Settings:
    rate: float = 0.1
    layers: list = dataclasses.field(default_factory=list)


def reads_scale(x):
    return SCALE * x


def calls_reads_scale(x):
    return reads_scale(x)


def nudged(array):
    array.reshape(-1).view(np.uint8)[-1] ^= 1
    return array


CHANGES = {
    "code": (lambda m, z: m(z)[0], lambda m, z: m(z)[1]),
    "an operator": (lambda m, z: m(z) + z, lambda m, z: m(z) - z),
    "inner code": (lambda m, z: [m(x) for x in z], lambda m, z: [m(x + 1) for x in z]),
    "a name of an attribute": (lambda m, z: z.sin(), lambda m, z: z.cos()),
    "another library function": (F.relu, F.gelu),
    "another compiled function": (torch.sin, torch.cos),
    "another function called": (lambda x: F.relu(x), lambda x: F.gelu(x)),
    "another of ours": (log_odds, margin),
    "a closure": (make(1.0), make(5.0)),
    "a table in a closure": (make(1.0, np.zeros(9)), make(1.0, nudged(np.zeros(9)))),
    "a tensor in a closure": (make(1.0, torch.zeros(3)), make(1.0, -torch.zeros(3))),
    "a dtype in a closure": (make(torch.float32), make(torch.float64)),
    "a list in a closure": (make([1, [2, 3]]), make([1, [2, 4]])),
    "keys in a closure": (make({1: 2}), make({2: 2})),
    "a set in a closure": (make({"a", "b"}), make({"a", "c"})),
    "a long number": (make(10**5000), make(10**5000 + 1)),
    "an int for a float": (make(1), make(1.0)),
    "a default": (with_default(2), with_default(3)),
    "a partial": [functools.partial(make(1.0), power=power) for power in (2, 3)],
    "an argument of a partial": (functools.partial(max, 1), functools.partial(max, 2)),
    "what a partial calls": (functools.partial(make(1.0)), functools.partial(make(2.0))),
    "an object's attribute": (Scaled(1.0), Scaled(2.0)),
    "an object's slot": (Slotted(1.0), Slotted(2.0)),
    "a method's object": (Scaled(1.0).__call__, Scaled(2.0).__call__),
    "an attribute of the class": (method_of(1.0)(), method_of(2.0)()),
    "a parent's method": (inherited(1.0), inherited(2.0)),
    "a wrapper": (torch.no_grad()(make(1.0)), torch.no_grad()(make(2.0))),
    "a transformed function": (torch.vmap(make(1.0)), torch.vmap(make(2.0))),
    "a cached function": (functools.cache(make(1.0)), functools.cache(make(2.0))),
    "a network in a closure": (make(nn.ReLU()), make(nn.Tanh())),
    "its attribute": (make(nn.LeakyReLU(0.1)), make(nn.LeakyReLU(0.2))),
    "its weights": (make(nn.Linear(2, 2)), make(nn.Linear(2, 2))),
    "a member": (make(Color.RED), make(Color.BLUE)),
    "a named tuple": (make(Pair(1, 2)), make(Pair(1, 3))),
    "a data class": (make(Settings()), make(Settings(layers=[1]))),
    "a pattern": (make(re.compile("a")), make(re.compile("b"))),
    "a path": (make(pathlib.Path("a")), make(pathlib.Path("b"))),
    "random numbers": (make(np.random.default_rng(0)), make(np.random.default_rng(1))),
    "Python's random numbers": (make(random.Random(0)), make(random.Random(1))),
    "PyTorch's": [make(torch.Generator().manual_seed(seed)) for seed in (0, 1)],
    "a projector": (Projector(4), Projector(4, seed=1)),
    "nothing": (None, Projector(4)),
}


@pytest.mark.parametrize("one, other", CHANGES.values(), ids=CHANGES)
def test_changes_are_noticed_and_nothing_else_is(one, other):
    assert changed(one, other)
    assert not changed(one, one) and not changed(other, other)
    assert not identify(it=one)["unidentified"]


def test_changed_globals_are_noticed_through_calls(monkeypatch):
    functions = (reads_scale, calls_reads_scale)
    before = [identify(it=function) for function in functions]
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    names = [names_of(identify(it=f), old) for f, old in zip(functions, before, strict=True)]
    assert names == [["it.globals.SCALE"], ["it.globals.reads_scale"]]


def test_a_function_that_takes_the_name_of_another():
    def own(x):
        return -x

    taken = functools.wraps(F.relu)(own)
    assert identify(it=taken)["it"] != identify(it=F.relu)["it"]
    assert changed(taken, functools.wraps(F.relu)(lambda x: 2 * x))


def attributed(**attributes):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for name, value in attributes.items():
        setattr(model[1], name, value)
    return model


class WithState(nn.Linear):
    count = 0

    def get_extra_state(self):
        return {"count": self.count}


def hooked(factor):
    model = attributed()
    model[1].register_forward_hook(lambda module, args, output: factor * output)
    return model


def extra(count):
    model = nn.Sequential(nn.Linear(2, 2), WithState(2, 2))
    type(model[1]).count = 0
    model[1].__dict__["_count"] = count
    return model


@pytest.mark.parametrize(
    "one, other",
    [
        (attributed(scale=1.0), attributed(scale=2.0)),
        (attributed(names=["a"]), attributed(names=["b"])),
        (attributed(mask=np.zeros(3)), attributed(mask=np.ones(3))),
        (attributed(activation=F.relu), attributed(activation=F.gelu)),
        (attributed(), hooked(2.0)),
        (hooked(3.0), hooked(2.0)),
        (attributed(), nn.Sequential(nn.Linear(2, 2), WithState(2, 2))),
        (extra(1), extra(2)),
    ],
)
def test_networks_are_told_apart_by_module(one, other):
    assert changed(one, other) == ["it.1"]
    assert not changed(one, copy.deepcopy(one).train(not one.training))


def test_weights_and_modes_are_not_of_the_network():
    assert not changed(attributed(), attributed().double().eval().requires_grad_(False))


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)

    @functools.cached_property
    def table(self):
        return torch.ones(2)

    def forward(self, x):
        return self.linear(x) * self.table


def test_what_is_computed_on_demand_is_no_change():
    model = Cached()
    before = identify(it=model)
    model(torch.zeros(1, 2))
    assert "table" in vars(model) and not differences(identify(it=model), before)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_a_call_leaves_language_models_the_same(family):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "max_position_embeddings": 8}
    if family == "gpt2":
        sizes = {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8}
    config = transformers.AutoConfig.for_model(family, vocab_size=11, **sizes)
    kind = getattr(transformers, f"AutoModelFor{'MaskedLM' if family == 'bert' else 'CausalLM'}")
    model = kind.from_config(config)
    before = identify(it=model)
    model(input_ids=torch.arange(6)[None])
    assert not differences(identify(it=model), before)
    assert not differences(identify(it=kind.from_config(config)), before)
    assert before["unidentified"] == [] and "transformers" in before["libraries"]
    config.layer_norm_epsilon = config.rms_norm_eps = config.layer_norm_eps = 0.1
    assert differences(identify(it=kind.from_config(config)), before)


# -- what is no change --------------------------------------------------------------------------


class Node:
    pass


def knot():
    node = Node()
    node.self, node.all, node.list = node, {node, 3}, [1, node]
    node.list.append(node.list)
    return node


def test_cycles_end():
    assert not changed(knot(), knot())
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert not changed(make(deep), make(deep))


def test_a_function_that_ran_often_is_the_same():
    def square(x, table=TABLE):
        return x * x + len(table) + (x in {"a", "b"})

    before = identify(it=square)
    for x in range(5000):
        square(float(x))
    assert not differences(identify(it=square), before)


def test_devices_and_places_do_not_matter():
    assert not changed(make(torch.device("cpu")), make(torch.device("meta")))
    assert fingerprint([("w", torch.ones(3))]) == fingerprint([("w", torch.ones(6)[::2])])


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.frozensets(st.text(max_size=3), max_size=3),
)
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=4),
        st.builds(Scaled, inner),
        st.builds(lambda x: np.array([x], object), inner),
    ),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(one=NESTED, other=NESTED)
def test_copies_are_the_same_and_others_are_not(one, other):
    assert not changed(make(one), make(copy.deepcopy(one)))
    if told(one) != told(other):
        assert changed(make(one), make(other))
    assert changed(make([one, one]), make([one, [one]]))


@settings(derandomize=True, deadline=None, database=None, max_examples=100)
@given(
    shape=st.lists(st.integers(2, 5), max_size=3),
    kind=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.complex128]),
    seed=st.integers(0, 99),
)
def test_checksums_tell_every_bit_and_rows_that_trade_places(shape, kind, seed):
    tensor = torch.randn(shape, dtype=kind, generator=torch.Generator().manual_seed(seed))
    bit = tensor.clone()
    octets = bit.view(-1).view(torch.uint8)
    octets[seed % len(octets)] ^= 2 ** (seed % 8)
    others = [bit, tensor[None], tensor.real.half(), *([tensor.flip(0)] if shape else [])]
    before = checksums([("a", tensor)])
    assert not altered(before, checksums([("a", tensor.clone())]))
    for other in others:
        assert altered(before, checksums([("a", other)])) == ["a"]
    assert altered(before, checksums([("b", tensor)])) == ["a", "b"]


def told(thing):
    """What a thing is, by another way: as text, with types."""
    if isinstance(thing, Scaled):
        return f"Scaled {told(thing.factor)}"
    if isinstance(thing, (list, tuple, np.ndarray)):
        return f"{type(thing).__name__} {[told(element) for element in thing]}"
    if isinstance(thing, dict):
        return f"dict {[(key, told(value)) for key, value in thing.items()]}"
    if isinstance(thing, frozenset):
        return f"set {sorted(thing)}"
    return f"{type(thing).__name__} {thing!r}"


SCRIPT = """
import json, sys, logging
import numpy as np, torch
import torch.nn.functional as F
from torch import nn
from ksm_ext.identity import identify

NAMES = {"a", "b", "c", "d", "e"}
log = logging.getLogger("training")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.names = set(NAMES)
        self.linear = nn.Linear(2, 2)
    def forward(self, x):
        return F.relu(self.linear(x))

def helper(x, kinds={"x", "y", "z"}):
    log.info("a")
    return x in {"p", "q", "r"} or NAMES or kinds

def train(mask, seed):
    torch.manual_seed(seed)
    return [helper(x) for x in mask] + [(lambda: np.abs(seed))()]

print(json.dumps(identify(train=train, net=Net(), output=lambda m, z: m(z)[0])))
"""


def test_every_process_and_folder_has_the_same_identities(tmp_path):
    """Also with a comment, blank lines and other indentation."""
    restyled = "# A comment.\n\n\n" + SCRIPT.replace("    ", "  ").replace(
        "def helper", "\n\n# Why.\ndef helper"
    )
    root = str(pathlib.Path(__file__).parent.parent)
    printed = []
    for number, (text, seed) in enumerate([(SCRIPT, "0"), (SCRIPT, "1"), (restyled, "2")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / f"script_{number}.py").write_text(text)
        environment = os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": seed}
        command = [sys.executable, str(folder / f"script_{number}.py")]
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        printed.append(json.loads(run.stdout))
    assert printed[0] == printed[1] == printed[2]
    assert printed[0]["unidentified"] == []
    assert set(printed[0]["libraries"]) == {"numpy", "python", "torch"}


# -- modules ------------------------------------------------------------------------------------


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A module of the user's, under a name that nothing else has."""
    name = "module_of_a_user"
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda text: (tmp_path / f"{name}.py").write_text(text)
    sys.modules.pop(name, None)


def imports_inside(x):
    from module_of_a_user import weight

    return weight(x)


def test_modules_imported_inside_a_function_are_their_files(own_module):
    own_module("def weight(x):\n    return 2 * x\n")
    before = identify(it=imports_inside)
    assert "module_of_a_user" not in sys.modules, "it is read, not run"
    assert imports_inside(2) == 4
    assert not differences(identify(it=imports_inside), before), "loaded or not"
    own_module("# A comment.\ndef weight(x):\n\n    return 2 * x\n")
    assert not differences(identify(it=imports_inside), before)
    own_module("def weight(x):\n    return 3 * x\n")
    names = names_of(identify(it=imports_inside), before)
    assert names == ["it.globals.import module_of_a_user"]


def test_attributes_of_modules_are_followed(own_module):
    own_module("RATE = 1.0\nOTHER = 2.0\ndef weight(x):\n    return RATE * x\n")
    import module_of_a_user

    function = eval("lambda x: module.weight(x) + module.OTHER", {"module": module_of_a_user})
    before = identify(it=function)
    assert set(before["it"]) == {"code", "globals.module.OTHER", "globals.module.weight"}
    module_of_a_user.RATE = 3.0
    assert names_of(identify(it=function), before) == ["it.globals.module.weight"]


# -- names of this package's own ----------------------------------------------------------------


@pytest.mark.parametrize(
    "thing, name, former",
    [
        (log_odds, "ksm_ext.log_odds", "ksm_ext.outputs.log_odds"),
        (Projector, "ksm_ext.Projector", "ksm_ext.projection.Projector"),
        (Projector.adjoint, "ksm_ext.Projector.adjoint", "ksm_ext.ops.x_1.Projector.adjoint"),
        (_Objective, "ksm_ext._Objective", "ksm_ext._choice.selection._Objective"),
        (signs, "ksm_ext.signs", "ksm_ext.spectrum.signs"),
        (F.relu, "torch.nn.functional.relu", "torch.nn.functional.relu"),
    ],
)
def test_a_name_of_this_package_has_no_module(thing, name, former):
    facts = identify(it=thing)
    assert facts["it"] == name
    assert not differences(facts, facts | {"it": former})
    other = former.replace(name.rpartition(".")[2], "other")
    assert differences(facts, facts | {"it": other}) == [("it", name, other)]


def test_a_function_made_by_one_of_this_package_keeps_the_name_of_that():
    facts = identify(it=_mean_of_rows(evaluation.lds, [], {}))
    names = {"former": "ksm_ext.x._mean_of_rows.<locals>.statistic"}
    assert facts["it"]["code"] == "ksm_ext._mean_of_rows.<locals>.statistic"
    assert not differences({"former": facts["it"]["code"]}, names)


def test_an_instance_is_known_by_its_class_and_state_alone():
    facts = identify(it=Projector(3, seed=1))
    former = facts["it"] | {"class": "ksm_ext.projection.Projector"}
    assert not differences(facts, facts | {"it": former})
    assert names_of(facts, identify(it=Projector(3))) == ["it.seed"]


def test_no_two_public_names_of_this_package_are_the_same():
    """But for the sum of :func:`task_gram` over processes."""
    counts = collections.Counter(
        node.name
        for path in pathlib.Path(ksm_ext.__file__).parent.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
    )
    assert {name for name, count in counts.items() if count > 1} <= {"task_gram", "check_ndim"}


# -- what has no identity -----------------------------------------------------------------------


def test_what_cannot_be_identified_is_listed(tmp_path):
    class Opaque:
        def __reduce_ex__(self, protocol):
            raise KeyError("no")

    with (tmp_path / "log").open("w") as file:
        facts = identify(
            output=make(threading.Lock(), file),
            train=Opaque(),
            meta=make(torch.empty(2, device="meta")),
        )
    assert facts["unidentified"] == [
        "meta.closure.temperature (torch.Tensor)",
        "output.closure.table (_io.TextIOWrapper)",
        "output.closure.temperature (_thread.lock)",
        "train (test_identity.Opaque)",
    ]


def test_loggers_have_an_identity():
    logger = logging.getLogger("test_identity")
    before = identify(it=make(logger))
    logger.info("fills a cache of the logger")
    assert not differences(identify(it=make(logger)), before) and not before["unidentified"]


def test_versions_of_libraries_are_told():
    facts = identify(output=lambda x: F.relu(x), projector=np.abs)
    assert facts["libraries"] == {
        "numpy": np.__version__,
        "python": f"{sys.version_info[0]}.{sys.version_info[1]}",
        "torch": importlib.metadata.version("torch"),
    }
    assert facts["projector"].startswith("numpy.")
