"""The table of subsets a surrogate is fitted to, in the form that kernels compute with.

0/1 masks are packed to bits, 64 tasks to a word: every kernel between them is a function of two
popcounts. Anything else (mixture weights) stays a float matrix.

Shapes: masks (m, n); bits (m, ceil(n / 64)) int64; sizes ``|S_i|`` (m,).
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ksm_ext import ops
from ksm_ext.arrays import ArrayLike, as_tensor
from ksm_ext.checks import brief, check_finite, check_ndim, message, shape_text

_ROWS = 8192  # converted to floats at a time


@dataclass(frozen=True, eq=False)
class Masks:
    """Subsets as rows: either 0/1 masks or real weights.

    Attributes:
        values: (m, n) bool for 0/1 masks, else float64 weights.
    """

    values: Tensor

    __repr__ = brief

    @classmethod
    def of(cls, masks: ArrayLike, *, num_tasks: int | None = None) -> "Masks":
        """Validate any array kind; 0/1 numbers of any dtype count as masks.

        Raises:
            ValueError: If ``masks`` is not (m, n) with n >= 1, holds NaN or infinities, or has
                other than ``num_tasks`` columns.
        """
        tensor = as_tensor("masks", masks)
        check_ndim("masks", tensor, 2, "(subsets, tasks)")
        if tensor.shape[1] == 0:
            remedy = "Give one column per task."
            raise ValueError(message("masks", "of at least one task", shape_text(tensor), remedy))
        if num_tasks is not None and tensor.shape[1] != num_tasks:
            expected = f"of {num_tasks} columns like the fitted masks"
            remedy = "Use the same tasks in the same order."
            raise ValueError(message("masks", expected, shape_text(tensor), remedy))
        check_finite("masks", tensor)
        if tensor.dtype == torch.bool or bool(((tensor == 0) | (tensor == 1)).all()):
            return cls(tensor.to(torch.bool, copy=True))  # the caller may reuse the table
        return cls(tensor.to(torch.float64, copy=True))

    @classmethod
    def from_bits(cls, bits: Tensor, num_tasks: int) -> "Masks":
        """The masks that were packed into ``bits`` (m, ceil(n / 64)) int64."""
        octets = bits.cpu().contiguous().numpy().astype("<i8", copy=False).view(np.uint8)
        values = np.unpackbits(octets, axis=1, count=num_tasks, bitorder="little")
        return cls(torch.from_numpy(values).view(torch.bool).to(bits.device))

    @property
    def binary(self) -> bool:
        """Whether every entry is 0 or 1."""
        return self.values.dtype == torch.bool

    @property
    def num_tasks(self) -> int:
        """Number of columns n."""
        return self.values.shape[1]

    def __len__(self) -> int:
        return self.values.shape[0]

    def __getitem__(self, rows: Tensor | slice) -> "Masks":
        return Masks(self.values[rows])

    def to(self, device: torch.device) -> "Masks":
        """The same subsets on ``device``."""
        return self if self.values.device == device else Masks(self.values.to(device))

    def as_weights(self) -> "Masks":
        """The same subsets as real weights."""
        return Masks(self.values.to(torch.float64)) if self.binary else self

    @cached_property
    def bits(self) -> Tensor:
        """(m, ceil(n / 64)) int64; bit ``j % 64`` of word ``j // 64`` is task j."""
        return ops.pack_masks(self.values)

    @cached_property
    def sizes(self) -> Tensor:
        """(m,) int64: how many tasks each subset holds."""
        return self.values.sum(1, dtype=torch.int64)

    @cached_property
    def distinct_sizes(self) -> tuple[Tensor, Tensor]:
        """Sizes that occur, (C,) on the CPU, and the index of each subset's among them, (m,)."""
        sizes, index = torch.unique(self.sizes, return_inverse=True)
        return sizes.cpu(), index

    @cached_property
    def floats(self) -> Tensor:
        """(m, n) float64."""
        return self.values.to(torch.float64)

    def mean_squared_distance(self) -> float:
        """Mean of ``||s_i - s_j||^2`` over pairs of rows: twice the summed column variance."""
        m = len(self)
        if m < 2:
            return 0.0
        if self.binary:  # without an (m, n) matrix of floats
            present = self.values.sum(0, dtype=torch.int64).to(torch.float64) / m
            return float(2 * (present * (1 - present)).sum()) * m / (m - 1)
        return float(2 * self.floats.var(0, unbiased=True).sum())

    def mean_squared_norm(self) -> float:
        """Mean of ``||s_i||^2`` over rows."""
        squares = self.sizes.to(torch.float64) if self.binary else self.floats.square().sum(1)
        return float(squares.mean())

    def transposed_matmul(self, v: Tensor) -> Tensor:
        """``values^T v``, (n, t) for v (m, t) float64, converted to floats by blocks of rows."""
        total = v.new_zeros(self.num_tasks, v.shape[1])
        for rows, part in zip(self.values.split(_ROWS), v.split(_ROWS), strict=True):
            total.addmm_(rows.to(v.dtype).T, part)
        return total

    def mean_absolute_distance(self) -> float:
        """Mean of ``||s_i - s_j||_1`` over pairs of rows."""
        if self.binary:
            return self.mean_squared_distance()
        m = len(self)
        ordered = self.floats.sort(0).values  # sum over pairs = sum of (2 i - m + 1) x_(i)
        rank = 2 * torch.arange(m, dtype=torch.float64, device=ordered.device) - (m - 1)
        return float(2 * (rank[:, None] * ordered).sum() / (m * (m - 1))) if m > 1 else 0.0

    def weighted_gram(self, v: Tensor) -> Tensor:
        """``values^T diag(v_j) values``, (n, n, t), for the columns v_j of v (m, t), by blocks."""
        total = v.new_zeros(v.shape[1], self.num_tasks, self.num_tasks)
        for rows, part in zip(self.values.split(_ROWS), v.split(_ROWS), strict=True):
            floats = rows.to(v.dtype)
            for matrix, weights in zip(total, part.T, strict=True):
                matrix.addmm_(floats.T, weights[:, None] * floats)
        return total.permute(1, 2, 0)
