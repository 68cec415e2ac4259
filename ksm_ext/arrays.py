"""Tables in, tables out: any array kind becomes a tensor, and answers go back as the kind given.

Accepted kinds: ``torch.Tensor`` (any device), ``numpy.ndarray``, nested lists, ``Series`` and
``DataFrame`` of pandas and of polars, xarray ``DataArray``. Everything inside the library is a
tensor; only public functions convert.

What answers say beside their numbers is what their kind has room for: pandas the names of rows and
columns, polars of columns, xarray the names of dimensions too.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksm_ext.checks import message

ArrayLike = Any
"""A tensor, NumPy array, nested list, pandas or polars Series or DataFrame, xarray DataArray."""

TABLES = {
    "pandas": ("Series", "DataFrame"),
    "polars": ("Series", "DataFrame"),
    "xarray": ("DataArray",),
}
"""Libraries whose tables go in and come back, with the names of their classes."""


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


def as_tensor(name: str, value: ArrayLike) -> Tensor:
    """Convert any accepted kind to a tensor, sharing memory where that is possible.

    Raises:
        TypeError: If ``value`` holds no numbers or is ragged.
    """
    if isinstance(value, Tensor):
        if value.is_complex() or value.is_sparse:
            found = f"a {'sparse' if value.is_sparse else value.dtype} tensor"
            raise TypeError(message(name, "a dense real tensor", found, "Convert it first."))
        return value.detach()
    try:
        array = np.asarray(value.to_numpy() if table_library(value) else value)
    except ValueError as error:
        found = f"a ragged {type(value).__name__}"
        raise TypeError(
            message(name, "rectangular", found, "Give every row one length.")
        ) from error
    if array.dtype == object:  # pandas frames of mixed numeric columns arrive as objects
        with suppress(TypeError, ValueError):
            array = array.astype(np.float64)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            message(
                name,
                "numeric",
                f"{type(value).__name__} of dtype {array.dtype}",
                "Pass a tensor, NumPy array, list or table of numbers.",
            )
        )
    if array.dtype.kind == "u" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)
    # PyTorch warns of read-only memory (pandas frames): copied there, shared elsewhere
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


@dataclass(frozen=True)
class Kind:
    """How a caller's table looked, so that answers can be given back alike.

    Attributes:
        name: ``"torch"``, ``"numpy"``, ``"pandas"``, ``"polars"`` or ``"xarray"``; lists are
            answered by NumPy arrays.
        device: Where the caller's tensor lived; CPU for the other kinds.
    """

    name: str
    device: torch.device

    @classmethod
    def of(cls, value: ArrayLike) -> "Kind":
        """The kind of ``value``."""
        if isinstance(value, Tensor):
            return cls("torch", value.device)
        return cls(table_library(value) or "numpy", torch.device("cpu"))

    def restore(self, tensor: Tensor, axes: Mapping[str, Sequence[Any] | None]) -> Any:
        """``tensor`` as this kind, with what names there is room for.

        Args:
            tensor: Of any number of dimensions; of three or more, and of none, pandas and polars
                have no table, and a NumPy array is answered.
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
