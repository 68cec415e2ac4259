"""Tables in, tables out: any array kind becomes a tensor, and answers go back as the kind given.

Accepted kinds: ``torch.Tensor`` (any device), ``numpy.ndarray``, nested lists, ``Series`` and
``DataFrame`` of pandas and of polars, xarray ``DataArray``. Everything inside the library is a
tensor; only public functions convert.

What answers say beside their numbers is what their kind has room for: pandas the names of rows and
columns, polars of columns, xarray the names of dimensions too. What tables say beside their numbers
is compared: :func:`aligned` brings those that share a dimension into one order.
"""

import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksm_ext.checks import check_several, message

ArrayLike = Any
"""A tensor, NumPy array, nested list, pandas or polars Series or DataFrame, xarray DataArray."""

TABLES = {
    "pandas": ("Series", "DataFrame"),
    "polars": ("Series", "DataFrame"),
    "xarray": ("DataArray",),
}
"""Libraries whose tables go in and come back, with the names of their classes."""

_PASS_NUMBERS = "Pass a tensor, NumPy array, list or table of numbers."


def table_library(value: object) -> str | None:
    """``"pandas"``, ``"polars"`` or ``"xarray"`` for their tables; imports none of them."""
    for library, kinds in TABLES.items():
        module = sys.modules.get(library)  # without it, nothing can be of its kinds
        if module and isinstance(value, tuple(getattr(module, kind) for kind in kinds)):
            return library
    return None


def names_along(value: ArrayLike, axis: int) -> list[Any] | None:
    """Names of the rows (axis 0) or columns (axis 1) of a table, or None where it has none."""
    library = table_library(value)
    if library is None or axis >= len(value.shape):
        return None
    if library == "pandas":
        return list(value.axes[axis])
    if library == "polars":
        return list(value.columns) if axis == 1 else None
    index = value.indexes.get(value.dims[axis])
    return None if index is None else list(index)


def position(argument: str, wanted: str | int, names: Sequence[str]) -> int:
    """The number of what is ``wanted`` among ``names``: one of them, or the number itself.

    Raises:
        ValueError: If it is neither.
    """
    if isinstance(wanted, str) and wanted in names:
        return names.index(wanted)
    if isinstance(wanted, Integral) and 0 <= wanted < len(names):
        return int(wanted)
    known = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
    known += "" if isinstance(wanted, str) else f", or a number below {len(names)}"
    raise ValueError(message(argument, f"one of {known}", repr(wanted), "Mind its spelling."))


def checked_names(argument: str, names: Iterable[Any], count: int) -> tuple[str, ...]:
    """``count`` names as text, all different.

    Raises:
        ValueError: If there are more or fewer, or one stands twice.
    """
    each = names if isinstance(names, str) else check_several(argument, names, "names")
    given = tuple(str(name) for name in each)
    twice = [name for name, times in Counter(given).items() if times > 1]
    if twice or len(given) != count:
        found = f"{twice[0]!r} more than once" if twice else str(len(given))
        raise ValueError(message(argument, f"{count} different names", found, "Give one to each."))
    return given


@dataclass(frozen=True)
class _Labels:
    """Names along a dimension of a table, all different.

    Attributes:
        whose: The argument they come from.
        names: As text.
        given: Whether the caller gave them; else they count from 0.
    """

    whose: str
    names: list[str]
    given: bool


def aligned(
    tables: Mapping[str, tuple[Any, ...]],
    known: Mapping[str, Sequence[Any]] = MappingProxyType({}),
) -> list[Any]:
    """Tables with the dimensions they share in one order, that of the first which has labels.

    Labels are compared as text. Along a dimension that only one side labels, tables go by position.
    So they do where one side has no more than the numbers 0, 1, … in their order (pandas' rows and
    columns without names, the names of tasks and targets that were given none) or polars'
    ``column_0``, …, unless the other side has the same in another order. Dimensions of xarray go
    by their names: those given here, or those of the other tables.

    Args:
        tables: By argument, a table of any kind and what its dimensions are, such as ``(scores,
            "subset", "target")``; one-dimensional scores may leave out the last.
        known: Labels of dimensions that are not a table's, such as the ``"task"`` of a surrogate.

    Returns:
        Each table, of its own kind.

    Raises:
        ValueError: If both sides have labels that do not match, or one has a label twice.

    Example:
        >>> aligned({"scores": ([2.0, 1.0], "subset"), "weights": ([0.5, 0.5], "subset")})
        [[2.0, 1.0], [0.5, 0.5]]
    """
    leading = {
        dim: _Labels(f"{dim}_names", names, names != _numbers(len(names)))
        for dim, names in ((dim, [str(name) for name in names]) for dim, names in known.items())
    }
    called = _shared_dimension(tables)
    answers = []
    for argument, (value, *dims) in tables.items():
        if table_library(value) == "xarray":
            value = _oriented(value, dims, called)
        for axis, dim in enumerate(dims):
            labels = _labels(argument, value, axis, dim)
            if labels is None:
                continue
            order = _order(leading[dim], labels, dim) if dim in leading else None
            if order is not None:
                value = _reordered(value, axis, order)
            elif dim not in leading or not leading[dim].given:
                leading[dim] = labels
        answers.append(value)
    return answers


def _numbers(count: int) -> list[str]:
    return [str(number) for number in range(count)]


def _labels(argument: str, table: ArrayLike, axis: int, dim: str) -> _Labels | None:
    along = names_along(table, axis)
    if along is None:
        return None
    names = [str(name) for name in along]
    if len(set(names)) < len(names):
        (twice, _), *_ = Counter(names).most_common(1)
        expected = f"free of repeated labels of its {dim}s"
        remedy = "Rename one of them, or go by position: pass its `.to_numpy()`."
        raise ValueError(message(argument, expected, f"{twice!r} more than once", remedy))
    given = names != _numbers(len(names))
    library = table_library(table)
    if library == "pandas":
        given = given or table.axes[axis].name is not None
    elif library == "polars":
        given = names != [f"column_{number}" for number in range(len(names))]
    return _Labels(argument, names, given)


def _order(leading: _Labels, labels: _Labels, dim: str) -> list[int] | None:
    """Where each of the leading labels is among the others, or None to go by position."""
    place = {name: number for number, name in enumerate(labels.names)}
    missing = [name for name in leading.names if name not in place]
    unknown = list(place.keys() - set(leading.names))
    if not missing and not unknown:
        return None if leading.names == labels.names else [place[name] for name in leading.names]
    if not (leading.given and labels.given):
        return None
    found = [f"no {missing[0]!r}"] if missing else []
    found += [f"an unknown {min(unknown, key=place.__getitem__)!r}"] if unknown else []
    expected = f"labelled along its {dim}s like `{leading.whose}`"
    remedy = "Give both the same labels, or go by position: pass its `.to_numpy()`."
    raise ValueError(message(labels.whose, expected, " and ".join(found), remedy))


def _reordered(table: ArrayLike, axis: int, order: list[int]) -> ArrayLike:
    library = table_library(table)
    if library == "pandas":
        return table.take(order, axis=axis)
    return table[:, order] if library == "polars" else table.isel({table.dims[axis]: order})


def _dimensions(table: Any) -> list[Any]:
    """Names of the dimensions of an xarray table, without those that xarray makes up."""
    return [dim for dim in table.dims if not re.fullmatch(r"dim_\d+", str(dim))]


def _shared_dimension(tables: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """What the one dimension that xarray tables share is called there, if they share only one."""
    ours = [(v, dims[: v.ndim]) for v, *dims in tables.values() if table_library(v) == "xarray"]
    if len(ours) < 2:
        return {}
    meant = set.intersection(*(set(dims) for _, dims in ours))
    names = set.intersection(*(set(_dimensions(table)) for table, _ in ours))
    return {meant.pop(): names.pop()} if len(meant) == len(names) == 1 else {}


def _oriented(table: Any, dims: Sequence[str], called: dict[str, Any]) -> Any:
    """An xarray table with its dimensions in the order of ``dims``, as far as names tell."""
    if table.ndim > len(dims):
        return table
    wanted = [called[dim] if called.get(dim) in table.dims else dim for dim in dims[: table.ndim]]
    rest = [dim for dim in table.dims if dim not in wanted]
    order = [dim if dim in table.dims else rest.pop(0) for dim in wanted]
    named = _dimensions(table)
    for dim, name in zip(dims, order, strict=False):
        if name in named:
            called.setdefault(dim, name)
    return table.transpose(*order)


def _is_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and {isinstance(v, Tensor) for v in value} == {True}


def as_tensor(name: str, value: ArrayLike) -> Tensor:
    """Convert any accepted kind to a tensor, sharing memory where that is possible.

    What is missing (masked, None, pandas' NA) becomes NaN. Numbers that PyTorch hardly computes
    with take the nearest dtype it does: unsigned integers int64, 8-bit floats float32, long doubles
    float64.

    Raises:
        TypeError: If ``value`` holds no real numbers, is sparse or is ragged.
        ValueError: If an integer is beyond int64.
    """
    if isinstance(value, Tensor):
        return _plain_tensor(name, value)
    if _is_of_tensors(value):
        parts = [_plain_tensor(name, part).cpu() for part in value]
        if len({part.shape for part in parts}) > 1:
            raise TypeError(_ragged(name, value))
        return _plain_tensor(name, torch.stack(parts))
    array: Any = _as_array(name, value)
    if array.dtype == object:  # pandas frames of mixed numeric columns arrive as objects
        array = _from_objects(array)
    if array.dtype.kind not in "biuf":
        found = f"{type(value).__name__} of dtype {array.dtype}"
        raise TypeError(message(name, "numeric", found, _PASS_NUMBERS))
    if isinstance(array, np.ma.MaskedArray):
        missing = np.ma.getmaskarray(array)
        array = np.where(missing, np.nan, array.data) if missing.any() else array.data
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        _check_int64(name, int(array.max(initial=0)))
        array = array.astype(np.int64)
    native = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    with np.errstate(over="ignore"):  # a long double beyond float64 is infinite there
        array = array.astype(native, copy=False)
    # PyTorch warns of read-only memory (pandas frames): copied there, shared elsewhere
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


_PLAIN = (
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
)
_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
_EIGHT_BITS = (
    *(torch.float8_e4m3fn, torch.float8_e4m3fnuz),
    *(torch.float8_e5m2, torch.float8_e5m2fnuz),
)


def _plain_tensor(name: str, value: Tensor) -> Tensor:
    """A tensor without its graph, of a dtype that everything computes with."""
    sparse, meta = value.layout != torch.strided, value.is_meta
    if sparse or meta or value.is_nested or value.dtype not in (*_PLAIN, *_UNSIGNED, *_EIGHT_BITS):
        kinds = {"sparse": sparse, "meta": meta, "nested": value.is_nested, str(value.dtype): True}
        found = f"a {next(kind for kind, applies in kinds.items() if applies)} tensor"
        raise TypeError(message(name, "a dense real tensor", found, "Convert it first."))
    value = value.detach().resolve_neg()
    if value.dtype in _EIGHT_BITS:
        return value.to(torch.float32)
    if value.dtype not in _UNSIGNED:
        return value
    signed = value.to(torch.int64)
    if value.dtype == torch.uint64 and bool((signed < 0).any()):
        _check_int64(name, 2**64 + int(signed[signed < 0].max()))
    return signed


def _as_array(name: str, value: ArrayLike) -> np.ndarray:
    """The NumPy array of any kind but tensors, of whatever dtype, masked where it was."""
    if hasattr(value, "toarray") and hasattr(value, "nnz"):  # SciPy's sparse matrices
        found = f"a sparse {type(value).__name__}"
        raise TypeError(message(name, "dense", found, "Pass its `.toarray()`."))
    try:
        if isinstance(value, (list, tuple)) and any(np.ma.isMaskedArray(row) for row in value):
            return np.ma.stack([np.ma.asanyarray(row) for row in value])
        array = value.to_numpy() if table_library(value) else value
        return np.ma.asanyarray(array) if np.ma.isMaskedArray(array) else np.asarray(array)
    except ValueError as error:
        raise TypeError(_ragged(name, value)) from error
    except (TypeError, RuntimeError, OverflowError) as error:
        found = f"{type(value).__name__} ({error})"
        raise TypeError(message(name, "numeric", found, _PASS_NUMBERS)) from error


def _ragged(name: str, value: ArrayLike) -> str:
    found = f"a ragged {type(value).__name__}"
    return message(name, "rectangular", found, "Give every row one length.")


def _from_objects(array: np.ndarray) -> np.ndarray:
    """Objects as float64 where all are real numbers or missing, which is NaN; else as they are."""
    if isinstance(array, np.ma.MaskedArray):
        missing, array = np.ma.getmaskarray(array), np.array(array)
        array[missing] = None
    na = getattr(sys.modules.get("pandas"), "NA", None)
    cells = [np.nan if cell is None or cell is na else cell for cell in array.ravel().tolist()]
    if array.shape == () or not all(isinstance(cell, (Real, Decimal, np.bool_)) for cell in cells):
        return array
    try:
        return np.array([float(cell) for cell in cells]).reshape(array.shape)
    except OverflowError:
        return array


def _check_int64(name: str, largest: int) -> None:
    if largest >= 2**63:
        remedy = "Pass it as float64, or in other units."
        raise ValueError(message(name, "below 2^63", str(largest), remedy))


@dataclass(frozen=True)
class ArrayKind:
    """How a caller's table looked, so that answers can be given back alike.

    Attributes:
        name: ``"torch"``, ``"numpy"``, ``"pandas"``, ``"polars"`` or ``"xarray"``; lists are
            answered by NumPy arrays, and lists of tensors by tensors.
        device: Where the caller's tensor lived; CPU for the other kinds.
    """

    name: str
    device: torch.device

    @classmethod
    def of(cls, value: ArrayLike) -> "ArrayKind":
        """The kind of ``value``."""
        first = value[0] if _is_of_tensors(value) else value
        if isinstance(first, Tensor):
            return cls("torch", first.device)
        return cls(table_library(value) or "numpy", torch.device("cpu"))

    def restore(self, tensor: Tensor, axes: Mapping[str, Sequence[Any] | None]) -> Any:
        """``tensor`` as this kind, with what names there is room for.

        Args:
            tensor: The answer, of any shape. pandas and polars have no table of three or more
                dimensions, nor of none: a NumPy array is returned there.
            axes: What each dimension is, such as ``"task"``, with the names along it or None.
        """
        if self.name == "torch":
            return tensor.to(self.device)
        array = tensor.cpu().numpy()
        if self.name == "xarray":
            import xarray

            named = {axis: list(names) for axis, names in axes.items() if names is not None}
            return xarray.DataArray(array, named, tuple(axes))
        if self.name == "numpy" or array.ndim not in (1, 2):
            return array
        index, columns = (*axes.values(), None)[:2]
        if self.name == "polars":
            import polars

            if array.ndim == 1:
                return polars.Series(array)
            schema = None if columns is None else [str(name) for name in columns]
            return polars.DataFrame(array, schema, orient="row")
        import pandas

        if array.ndim == 1:
            return pandas.Series(array, index=index)
        return pandas.DataFrame(array, index=index, columns=columns)
