"""Tables in, tables out: any array kind becomes a tensor, and answers go back as the kind given.

Accepted kinds: ``torch.Tensor`` (any device), ``numpy.ndarray``, nested lists, pandas ``Series``
and ``DataFrame``. Everything inside the library is a tensor; only public functions convert.
"""

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksm_ext.checks import message

ArrayLike = Any
"""A tensor, NumPy array, nested list, pandas Series or DataFrame."""


def is_pandas(value: object) -> bool:
    """Whether ``value`` is a pandas Series or DataFrame; pandas is never imported for this."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(value, (pandas.Series, pandas.DataFrame))


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
        array = np.asarray(value.to_numpy() if is_pandas(value) else value)
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
                "Pass a tensor, NumPy array, list or pandas table of numbers.",
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
        name: ``"torch"``, ``"numpy"`` or ``"pandas"``; lists are answered by NumPy arrays.
        device: Where the caller's tensor lived; CPU for the other kinds.
    """

    name: str
    device: torch.device

    @classmethod
    def of(cls, value: ArrayLike) -> "Kind":
        """The kind of ``value``."""
        if isinstance(value, Tensor):
            return cls("torch", value.device)
        return cls("pandas" if is_pandas(value) else "numpy", torch.device("cpu"))

    def restore(
        self,
        tensor: Tensor,
        index: Sequence[str] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Any:
        """``tensor`` as this kind; pandas answers of one or two dimensions carry the names."""
        if self.name == "torch":
            return tensor.to(self.device)
        array = tensor.cpu().numpy()
        if self.name == "pandas" and array.ndim in (1, 2):
            import pandas

            if array.ndim == 1:
                return pandas.Series(array, index=index)
            return pandas.DataFrame(array, index=index, columns=columns)
        return array
