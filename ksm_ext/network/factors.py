r"""Parts of per-sample gradients as layers have them, before a matrix is formed.

A part knows what its layer was given and the gradient of what it gave, (b, ...) each; its
``gradient()`` forms (b, ...). A projection may take the two factors instead, or :func:`blocks`
of rows, one after another.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight


@dataclass(frozen=True, eq=False)
class OuterProducts:
    r"""Each sample's gradient of the matrix of a product, :math:`\sum_t g_t a_t^\top`.

    Attributes:
        activations: (b, ..., T, in).
        gradients: (b, ..., T, out), of what the product gave.
        shape: That of the matrix or kernel, whose entries lie as (..., out, in).
        transposed: Whether they lie as (..., in, out).
    """

    activations: Tensor
    gradients: Tensor
    shape: torch.Size
    transposed: bool = False

    def gradient(self) -> Tensor:
        """(b, ...)."""
        left, right = self.sides
        return (left.mT @ right).reshape(len(left), *self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """(b, ..., stop - start, columns), of a matrix."""
        left, right = self.sides
        return left[..., start:stop].mT @ right

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """What the rows and the columns come from."""
        kind = torch.promote_types(self.gradients.dtype, self.activations.dtype)  # see Patches
        sides = self.gradients.to(kind), self.activations.to(kind)
        return sides[::-1] if self.transposed else sides


@dataclass(frozen=True, eq=False)
class Patches:
    """Each sample's gradient of the kernel of a convolution.

    Attributes:
        inputs: (b, r, in, ...), of r images each.
        gradients: (b, r, out, ...), of what came out.
        shape: (out, in / groups, ...), of the kernel.
        how: Stride, padding, dilation and groups.
    """

    inputs: Tensor
    gradients: Tensor
    shape: torch.Size
    how: Mapping[str, Any]

    def gradient(self) -> Tensor:
        """(b, ...): by one convolution that has the samples as groups."""
        b, (out, *rest) = len(self.inputs), self.shape
        kind = torch.promote_types(
            self.inputs.dtype, self.gradients.dtype
        )  # they differ by autocast
        sides = (side.to(kind).transpose(0, 1) for side in (self.inputs, self.gradients))
        x, g = (side.flatten(1, 2) for side in sides)
        how = {**self.how, "groups": b * self.how["groups"]}
        of_weight = conv1d_weight if len(rest) == 2 else conv2d_weight
        return of_weight(x, (b * out, *rest), g, **how).reshape(b, *self.shape)


@dataclass(frozen=True, eq=False)
class Rows:
    """Each sample's gradient of a table, by the rows that it looked up.

    Attributes:
        index: (b, T).
        gradients: (b, T, d), of what was looked up.
        shape: (rows, d), of the table.
    """

    index: Tensor
    gradients: Tensor
    shape: torch.Size

    def gradient(self) -> Tensor:
        """(b, ...)."""
        table = self.gradients.new_zeros(len(self.index), *self.shape)
        place = self.index[..., None].expand_as(self.gradients)
        return table.scatter_add_(1, place, self.gradients)

    def rows(self, start: int, stop: int) -> Tensor:
        """(b, stop - start, d)."""
        inside = (self.index >= start) & (self.index < stop)
        index = (self.index - start).where(inside, 0)
        gradients = self.gradients * inside[..., None]
        return Rows(index, gradients, torch.Size((stop - start, self.shape[1]))).gradient()


@dataclass(frozen=True, eq=False)
class Whole:
    """Each sample's gradient itself, (b, ...), where it has no factors."""

    values: Tensor

    def gradient(self) -> Tensor:
        """(b, ...)."""
        return self.values


Part = OuterProducts | Patches | Rows | Whole


def total(parts: Iterable[Part]) -> Tensor:
    """The sum of the parts' gradients, (b, ...)."""
    return added(part.gradient() for part in parts)


def flat(x: Tensor) -> Tensor:
    """(b, ...) as (b, p), also where there is no other dimension, or one of no numbers."""
    return x.reshape(len(x), x.shape[1:].numel())


def added(tensors: Iterable[Tensor]) -> Tensor:
    """Their sum; one alone is not copied."""
    return reduce(torch.add, tensors)


def blocks(parts: Sequence[Part], num_bytes: int) -> Iterator[tuple[int, Tensor]]:
    """The sum of the parts' gradients in some blocks (b, rows, columns), if they have rows.

    Yields:
        How many coordinates lie before the block, and the block.
    """
    of_rows = [
        part for part in parts if isinstance(part, (OuterProducts, Rows)) and len(part.shape) == 2
    ]
    if len(of_rows) < len(parts):
        yield 0, total(parts)
        return
    one, (num_rows, num_columns) = of_rows[0].gradients, of_rows[0].shape
    size = max(1, num_bytes // max(1, len(one) * num_columns * one.itemsize))
    for start in range(0, num_rows, size):
        stop = min(start + size, num_rows)
        yield start * num_columns, added(part.rows(start, stop) for part in of_rows)


def formed(
    parts: Mapping[str, Sequence[Part]], weights: Mapping[str, Tensor], num_samples: int
) -> dict[str, Tensor]:
    """Gradients (b, ...) by name, in the dtype of the weights."""
    return {
        name: total(parts[name]).to(weight.dtype)
        if parts[name]
        else weight.new_zeros(num_samples, *weight.shape)
        for name, weight in weights.items()
    }
