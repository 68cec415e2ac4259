r"""What numbers are decided by, as digests: arrays, networks, functions and all that they refer to.

A digest depends on content alone: not on addresses, on the order of sets, on where a file lies, on
line numbers or comments. What is the user's is followed to the end:

* a function: its bytecode, defaults, closure, attributes, and the globals and modules that it
  names; the file of a module that it imports inside;
* a class: its methods, attributes and bases; an object: its class and its state, as pickling asks
  for it (``__getstate__`` may leave out a cache);
* a network: classes, hooks, other attributes and extra state of all submodules, by name; inside of
  functions and objects, parameters and buffers too.

What is the standard library's, or lies among installed packages, is its name and the version of the
package; of this package it is the name without the module, which may move. Bytecode compares within
one version of Python. What has no state that can be read, such as a lock, an open file or a
compiled function of one's own, is a name only, and is listed. What a function reads from files, the
environment or the network is not seen.

No package does this: joblib hashes a function's name, and the bytes of cloudpickle, dill and what
is built on them change with line numbers, the order of sets and the process.
"""

import copyreg
import dis
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import re
import sys
import types
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ksm_ext.checks import brief

_PLAIN = (type(None), bool, int, float, str)
_ATOMS = (
    *(*_PLAIN, complex, bytes, type(...), type(NotImplemented)),
    *(torch.dtype, torch.layout, torch.memory_format),
)
_COMPILED = (
    *(types.BuiltinFunctionType, types.MethodWrapperType, np.ufunc),
    *(types.MethodDescriptorType, types.WrapperDescriptorType, types.ClassMethodDescriptorType),
)
_SLOTS = (types.GetSetDescriptorType, types.MemberDescriptorType)
_NAMED = (type, types.ModuleType, types.FunctionType, *_COMPILED, *_SLOTS)
_HOLDERS: dict[type, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    functools._lru_cache_wrapper: ("__wrapped__",),
    functools.cached_property: ("func",),
    property: ("fget", "fset", "fdel"),
}
_METHODS = (types.FunctionType, staticmethod, classmethod, property)
# What a module keeps beside attributes: weights and submodules, its mode, and hooks of loading.
_NO_ATTRIBUTES = {"_parameters", "_buffers", "_modules", "training", "_non_persistent_buffers_set"}


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, shapes, dtypes and every bit of the values, whatever the device."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(content_of(tensor))
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class Checksum:
    """What a tensor holds, on its device, for about one read of its memory.

    Attributes:
        kind: Shape, dtype and device.
        rows: Sums of the bits of each row, which wrap around.
        columns: Of each column: a change of one entry changes two sums.
    """

    kind: tuple[torch.Size, torch.dtype, torch.device]
    rows: Tensor
    columns: Tensor

    __repr__ = brief

    def same(self, other: "Checksum") -> bool:
        """Whether nothing tells the two apart."""
        return (
            self.kind == other.kind
            and torch.equal(self.rows, other.rows)
            and torch.equal(self.columns, other.columns)
        )


def checksums(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Checksum]:
    """By name, for :func:`changed`; much faster than :func:`fingerprint`."""
    return {name: _checksum(tensor.detach()) for name, tensor in tensors}


def changed(before: Mapping[str, Checksum], after: Mapping[str, Checksum]) -> list[str]:
    """Names of the tensors that are other ones, or are in one of the two alone."""
    return [
        name
        for name in dict.fromkeys([*before, *after])
        if name not in before or name not in after or not before[name].same(after[name])
    ]


def _checksum(tensor: Tensor) -> Checksum:
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    real = torch.view_as_real(dense) if dense.is_complex() else dense
    bits = real.view(_BITS[real.itemsize])
    table = bits.reshape(bits.shape[0] if bits.ndim else 1, math.prod(bits.shape[1:]))
    sums = (table.sum(dim, dtype=table.dtype) for dim in (1, 0))
    return Checksum((tensor.shape, tensor.dtype, tensor.device), *sums)


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row by row."""
    dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
    whole = dense.cpu().resolve_conj().resolve_neg().contiguous()
    return whole.reshape(-1).view(torch.uint8).numpy().data


def identify(**things: Any) -> dict[str, Any]:
    """What each of ``things`` is, as JSON holds it.

    Returns:
        By name: a plain value as it is, a function or class of a library by its name, and others as
        a dict of their parts, in which a part is a plain value or a digest. Beside them
        ``libraries``, the versions of packages that were named, and ``unidentified``, a list of
        what can change unnoticed.
    """
    found = _Found({}, [])
    facts = {name: _Walk(name, found).describe(thing) for name, thing in things.items()}
    libraries = dict(sorted(found.libraries.items()))
    return {**facts, "libraries": libraries, "unidentified": sorted(set(found.unidentified))}


def differences(facts: Any, others: Any, field: str = "") -> list[tuple[str, Any, Any]]:
    """Names of the fields in which two records differ, with the value in each, or None.

    Records of before this package's names lost their modules are read without these.
    """
    if not (isinstance(facts, Mapping) and isinstance(others, Mapping)):
        # As text: 1 is not True, 0.0 not -0.0, and a NaN is itself.
        texts = (json.dumps(_without_module(value)) for value in (facts, others))
        return [(field, facts, others)] if len({*texts}) > 1 else []
    return [
        difference
        for name in dict.fromkeys([*facts, *others])
        for difference in differences(
            facts.get(name), others.get(name), f"{field}.{name}" if field else name
        )
    ]


class _Found(NamedTuple):
    libraries: dict[str, str]
    unidentified: list[str]


class _Source(NamedTuple):
    """A module that is imported inside a function: perhaps not loaded yet, so it is its file."""

    name: str


class _Walk:
    """Feeds all that can be reached from an object to digests of its parts, each thing once.

    Things that may refer to each other wait in a queue, and are numbered within their part: cycles
    end, no nesting is too deep, and a change in one part leaves the digests of others as they are.
    """

    def __init__(self, root: str, found: _Found, open_sets: Mapping[int, str] = {}) -> None:
        self.root, self.found = root, found
        self.digests: dict[str, Any] = {}  # by part; also plain values and names
        self.labels: dict[int, str] = {}  # of things seen, by id
        self.sizes: Counter[str] = Counter()  # of things seen, by part
        self.open_sets = {**open_sets}
        self.waiting: deque[tuple[str, str, Any]] = deque()  # part, path and thing
        self.alive: list[Any] = []  # or an id would come back as another thing's

    def describe(self, thing: Any) -> Any:
        if _is_plain(thing):
            return thing
        if name := self.library_name(thing):
            return name
        if isinstance(thing, nn.Module):
            return self.describe_network(thing)
        self.describe_parts("", thing)
        return {
            part: fact.hexdigest() if isinstance(fact, hashlib.blake2b) else fact
            for part, fact in self.digests.items()
        }

    def describe_parts(self, prefix: str, thing: Any) -> None:
        """Each part by itself, those of a partial function's or a method's function too."""
        for name, value in self.parts(self.root, thing):
            part = prefix + name
            if _is_plain(value):
                self.digests[part] = value
            elif label := self.library_name(value):
                self.digests[part] = label
            elif name == "func":
                self.describe_parts(f"{part}.", value)
            else:
                self.feed(part, f"{self.root}.{part}", value)
        self.finish()

    def describe_network(self, model: nn.Module) -> dict[str, str]:
        """Class and digest of every submodule, without parameters and buffers."""
        kinds = {}
        for path, module in model.named_modules(remove_duplicate=False):
            part = path or "model"
            kinds[part] = type(module).__qualname__
            for name, value in self.layer(module):
                self.write(part, name)
                self.feed(part, f"{self.root}.{part}.{name}", value)
            self.finish()
        return {part: f"{kind} {self.digests[part].hexdigest()}" for part, kind in kinds.items()}

    def finish(self) -> None:
        while self.waiting:
            part, path, thing = self.waiting.popleft()
            for name, value in self.parts(path, thing):
                self.write(part, name)
                self.feed(part, f"{path}.{name}", value)

    def write(self, part: str, content: str | bytes | memoryview) -> None:
        digest = self.digests.setdefault(part, hashlib.blake2b(digest_size=16))
        content = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        digest.update(f"{len(content)} ".encode())
        digest.update(content)

    def feed(self, part: str, path: str, thing: Any) -> None:
        """Write what holds no references, and put the rest into the queue."""
        kind = type(thing)
        if kind in _ATOMS:
            self.write(part, f"{kind.__name__} {hex(thing) if kind is int else repr(thing)}")
        elif kind is torch.device:
            self.write(part, "device")  # whichever: it decides rounding at most
        elif isinstance(thing, Tensor):
            self.feed_tensor(part, path, thing)
        elif kind in (np.ndarray, np.memmap) and not thing.dtype.hasobject:
            self.write(part, f"array {thing.dtype.descr} {thing.shape}")
            self.write(part, np.ascontiguousarray(thing).reshape(-1).view(np.uint8).data)
        elif kind in (tuple, torch.Size):
            self.write(part, f"tuple {len(thing)}")
            for number, element in enumerate(thing):
                self.feed(part, f"{path}[{number}]", element)
        elif kind in (set, frozenset):
            self.feed_set(part, path, thing)
        elif kind is types.CodeType:
            self.feed_code(part, path, thing)
        elif name := self.library_name(thing):
            self.write(part, f"named {name}")
        elif label := self.labels.get(id(thing)):
            self.write(part, label)
        else:
            self.sizes[part] += 1
            self.labels[id(thing)] = f"{kind.__qualname__} {self.sizes[part]} of {part}"
            self.alive.append(thing)
            self.waiting.append((part, path, thing))

    def feed_tensor(self, part: str, path: str, tensor: Tensor) -> None:
        self.write(part, f"{type(tensor).__name__} {tuple(tensor.shape)} {tensor.dtype}")
        if tensor.is_meta:
            self.unidentified(path, tensor)
        else:
            self.write(part, content_of(tensor))

    def feed_set(self, part: str, path: str, elements: Set[Any]) -> None:
        """Elements in an order of their own; a set inside itself is known by its nesting."""
        if label := self.open_sets.get(id(elements)):
            return self.write(part, label)
        open_sets = {**self.open_sets, id(elements): f"set {len(self.open_sets)}"}
        inner = []
        for element in elements:
            walk = _Walk(self.root, self.found, open_sets)
            walk.feed("element", f"{path} element", element)
            walk.finish()
            inner.append(walk.digests["element"].hexdigest())
        return self.write(part, f"set {' '.join(sorted(inner))}")

    def feed_code(self, part: str, path: str, code: types.CodeType) -> None:
        """The bytecode, not the source: that may have been edited since, or stand nowhere."""
        self.found.libraries["python"] = f"{sys.version_info[0]}.{sys.version_info[1]}"
        self.write(part, code.co_code)
        self.write(part, getattr(code, "co_exceptiontable", b""))
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
        self.write(part, f"{counts} {names}")
        self.feed(part, path, code.co_consts)

    def unidentified(self, path: str, thing: Any) -> None:
        self.found.unidentified.append(f"{path} ({type(thing).__module__}.{type(thing).__name__})")

    def library_name(self, thing: Any) -> str | None:
        """Such as ``torch.nn.functional.relu``; None for what is the user's, or holds something."""
        if isinstance(thing, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            return str(thing)
        if not isinstance(thing, _NAMED):
            return None
        owner = getattr(thing, "__self__", None)
        if isinstance(thing, types.ModuleType):
            module = name = thing.__name__
        elif isinstance(thing, types.FunctionType):
            if thing.__closure__ or thing.__code__.co_flags & inspect.CO_NESTED:
                return None  # made by a function, which may have put anything into it
            module, name = _origin(thing)
        elif isinstance(owner, (type(None), type, types.ModuleType)):
            holder = getattr(thing, "__objclass__", owner if isinstance(owner, type) else thing)
            module = getattr(holder, "__module__", None) or "builtins"
            name = f"{module}.{getattr(thing, '__qualname__', thing.__name__)}"
        else:
            return None
        return _without_module(name) if self.library(module) else None

    def library(self, module: str) -> bool:
        """Whether a module is a library's, whose version then counts."""
        package = _library(module)
        if package:
            self.found.libraries[package] = _version(package)
        return package is not None

    def parts(self, path: str, thing: Any) -> list[tuple[str, Any]]:
        """What a thing consists of, by name; the names count as well."""
        if isinstance(thing, types.FunctionType):
            return self.function(thing)
        if isinstance(thing, type):
            return _class(thing)
        if isinstance(thing, nn.Module):
            weights = [("parameters", thing._parameters), ("buffers", thing._buffers)]
            return [*self.layer(thing), *weights, ("modules", thing._modules)]
        if isinstance(thing, types.ModuleType):
            return [("source", _Source(thing.__name__))]
        if isinstance(thing, _Source):
            return self.source(path, thing)
        if isinstance(thing, functools.partial):
            pairs = [(f"arguments.{number}", value) for number, value in enumerate(thing.args)]
            return [("func", thing.func), *pairs, *_under("keywords", thing.keywords)]
        if isinstance(thing, _SLOTS):
            return [("name", thing.__name__)]
        for kind, names in _HOLDERS.items():
            if isinstance(thing, kind):
                return [(name.strip("_"), getattr(thing, name)) for name in names]
        if type(thing) in (dict, types.MappingProxyType):
            return [("keys", tuple(thing)), *((str(key), value) for key, value in thing.items())]
        if type(thing) is list:
            return [("list", len(thing)), *((str(i), value) for i, value in enumerate(thing))]
        return self.state(path, thing)

    def function(self, function: types.FunctionType) -> list[tuple[str, Any]]:
        code, (module, name) = function.__code__, _origin(function)
        own = not self.library(module)
        cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
        defaults = function.__defaults__ or ()
        last = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
        named = dict(zip(last, defaults, strict=True)) | (function.__kwdefaults__ or {})
        return [
            ("code", code if own else _without_module(name)),
            *_under("defaults", named),
            *((f"closure.{name}", _content(cell)) for name, cell in cells),
            *_under("globals", _references(code, function.__globals__) if own else {}),
            *_under("attributes", function.__dict__),
        ]

    def layer(self, module: nn.Module) -> list[tuple[str, Any]]:
        """A network's module without its weights and the modules in it."""
        attributes = {}
        for name, value in _own(module, vars(module)):
            if name in _NO_ATTRIBUTES or name.startswith(("_state_dict", "_load_state_dict")):
                continue
            is_hooks = name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called"))
            attributes[name] = list(value.values()) if is_hooks and value else value
        pairs = [("class", type(module)), *_under("attributes", attributes)]
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            pairs.append(("extra_state", module.get_extra_state()))
        return pairs

    def source(self, path: str, source: _Source) -> list[tuple[str, Any]]:
        file = _file(source.name)
        if self.library(source.name) or file is None or file.suffix != ".py":
            if not _library(source.name):
                self.unidentified(path, source)
            return [("name", source.name)]
        code = compile(file.read_bytes(), "", "exec", dont_inherit=True)
        return [("code", code), *_under("imports", _references(code, {}, source.name))]

    def state(self, path: str, thing: Any) -> list[tuple[str, Any]]:
        """An object as pickling would take it apart; one that it refuses is its class alone."""
        pairs: list[tuple[str, Any]] = [("class", type(thing))]
        try:
            registered = copyreg.dispatch_table.get(type(thing))
            reduced = registered(thing) if registered else thing.__reduce_ex__(4)
        except Exception:  # of any kind: it is code of whoever wrote the class
            reduced = None
        if reduced is None or (isinstance(reduced, str) and isinstance(thing, _COMPILED)):
            self.unidentified(path, thing)
        if not isinstance(reduced, tuple):
            return [*pairs, ("name", reduced)]
        constructor, arguments, state, items, entries = [*reduced, None, None, None][:5]
        if constructor is copyreg.__newobj__:  # type: ignore[attr-defined]
            arguments = arguments[1:]
        elif constructor is not type(thing):
            pairs.append(("constructor", constructor))
        if arguments:
            pairs.append(("arguments", arguments))
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[1], dict):
            state = {**(state[0] or {}), **state[1]}  # of __dict__ and of __slots__
        pairs += _own(thing, state) if type(state) is dict else [("state", state)]
        contents = [*(items or ()), *(entries or ())]
        return [*pairs, *((str(number), value) for number, value in enumerate(contents))]


def _without_module(name: Any) -> Any:
    """``ksm_ext.Projector`` for ``ksm_ext.ops.project.Projector``; others as they are."""
    own = isinstance(name, str) and name.startswith("ksm_ext.")
    return re.sub(r"^ksm_ext\.([a-z0-9_]+\.(?!<))+", "ksm_ext.", name) if own else name


def _is_plain(thing: Any) -> bool:
    """Whether it is told as it is, not by its digest."""
    if type(thing) is int:
        return thing.bit_length() <= 64  # longer ones may not even be written as text
    return type(thing) in _PLAIN and len(str(thing)) <= 100


def _origin(function: types.FunctionType) -> tuple[str, str]:
    """Module and full name by the code; the function's own may be copied from one it wraps."""
    module = str(function.__globals__.get("__name__", ""))
    name = getattr(function.__code__, "co_qualname", function.__qualname__)
    return module, f"{module}.{name}"


def _under(prefix: str, named: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{prefix}.{name}", value) for name, value in named.items())


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return NotImplemented


def _own(thing: Any, attributes: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Attributes but those that the class computes when they are first asked for."""
    computed = functools.cached_property
    return [
        (str(name), value)
        for name, value in attributes.items()
        if not isinstance(getattr(type(thing), str(name), None), computed)
    ]


def _class(cls: type) -> list[tuple[str, Any]]:
    attributes = {
        name: value
        for name, value in sorted(vars(cls).items())
        if name != "_abc_impl" and (not name.startswith("__") or isinstance(value, _METHODS))
    }
    return [("name", cls.__qualname__), ("bases", cls.__bases__), *_under("", attributes)]


def _references(
    code: types.CodeType, namespace: Mapping[str, Any], module: str = ""
) -> dict[str, Any]:
    """The globals that code and the code in it read, by name; attributes of the user's modules."""
    package = namespace.get("__package__") or module.rpartition(".")[0]
    found: dict[str, Any] = {}
    name, value = "", None
    steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
    for number, step in enumerate(steps):
        follows = name and isinstance(value, types.ModuleType) and not _library(value.__name__)
        if follows and step.opname in ("LOAD_ATTR", "LOAD_METHOD") and hasattr(value, step.argval):
            name, value = f"{name}.{step.argval}", getattr(value, step.argval)
            continue
        if name:
            found[name] = value
        name = ""
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME") and step.argval in namespace:
            name, value = step.argval, namespace[step.argval]
        elif step.opname == "IMPORT_NAME":
            level, items = steps[number - 2].argval, steps[number - 1].argval
            target = "." * level + step.argval
            full = importlib.util.resolve_name(target, package) if level and package else target
            inner = (f"{full}.{item}" for item in items or ())
            for imported in [full, *(each for each in inner if _file(each))]:
                found[f"import {imported}"] = _Source(imported)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _references(constant, namespace, module)
    return dict(sorted(found.items()))


@functools.cache
def _library(module: str) -> str | None:
    """The package of a module that is not the user's: of Python, installed, or this one."""
    package = module.partition(".")[0]
    if not package:
        return None
    if package in sys.stdlib_module_names:
        return "python"
    if package in ("torch", "numpy", "ksm_ext"):  # wherever their developers keep them
        return package
    file = _file(package)
    return package if file and {"site-packages", "dist-packages"} & {*file.parts} else None


def _file(module: str) -> Path | None:
    """Where a module comes from, which need not be loaded and is not loaded here."""
    loaded = getattr(sys.modules.get(module), "__file__", None)
    if loaded or module == "__main__":
        return Path(loaded) if loaded else None
    search, whole = None, ""
    for name in module.split("."):
        whole = f"{whole}.{name}".lstrip(".")
        spec = PathFinder.find_spec(whole, search)
        if spec is None:
            return None
        search = spec.submodule_search_locations
    return Path(spec.origin) if spec and spec.origin else None


def _version(package: str) -> str:
    """As it was installed, whether it is loaded or not."""
    if package == "python":
        return f"{sys.version_info[0]}.{sys.version_info[1]}"
    if package == "ksm_ext":
        return str(sys.modules["ksm_ext"].__version__)
    return _installed(package)


@functools.cache
def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # its distribution has another name
        names = importlib.metadata.packages_distributions().get(package, ())
        return ", ".join(importlib.metadata.version(name) for name in sorted(set(names)))
