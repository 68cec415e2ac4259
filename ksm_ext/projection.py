"""Random projection of gradients, parameter after parameter, without concatenating them.

Shapes: gradients (b, p) as a matrix or as one tensor (b, ...) for each parameter; features (b, k).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ksm_ext import ops
from ksm_ext.checks import message


@dataclass(frozen=True)
class Projector(ops.Projection):
    """The projection ``x -> x P`` to ``dim`` numbers; see :class:`ksm_ext.ops.Projection` for P.

    The default, a signed block permutation, costs one reading of the gradients.
    """

    def __call__(
        self, x: Tensor | Sequence[Tensor], *, offset: int = 0, out: Tensor | None = None
    ) -> Tensor:
        """Project ``x``, whose first coordinate has number ``offset``.

        Args:
            x: (b, ...) float, or a sequence of them whose coordinates follow each other.
            offset: Coordinates before those of ``x``.
            out: (b, dim) float32 (float64 for float64 inputs) to add to in place, or None.

        Returns:
            (b, dim): ``out``, or a new tensor through which gradients flow.

        Raises:
            ValueError: If shapes disagree or there is no tensor.
            TypeError: If dtypes disagree.
        """
        tensors = [x] if isinstance(x, Tensor) else list(x)
        if not tensors:
            raise ValueError(message("x", "one tensor or more", "none", "Choose parameters."))
        total = out
        for tensor in tensors:
            rows = tensor.reshape(len(tensor), math.prod(tensor.shape[1:]))
            if total is None:
                total = ops.project(rows, self, offset=offset)
            elif out is not None or not (torch.is_grad_enabled() and rows.requires_grad):
                ops.project_(total.detach(), rows, self, offset=offset)
            else:
                total = total + ops.project(rows, self, offset=offset)
            offset += rows.shape[1]
        assert total is not None
        return total

    def adjoint(self, y: Tensor, num_coordinates: int, *, offset: int = 0) -> Tensor:
        """``y P^T`` for coordinates ``offset`` and on: (b, dim) -> (b, num_coordinates)."""
        return ops.project_adjoint(y, self, num_coordinates, offset=offset)
