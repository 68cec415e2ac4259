r"""Parts of per-sample gradients as layers have them, before a matrix is formed.

A part knows what its layer was given and the gradient of what it gave, (b, ...) each; its
``gradient()`` forms (b, *shape). A projection may take the two factors instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight


@dataclass(frozen=True, eq=False)
class Factors:
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
        """(b, *shape)."""
        left, right = self.gradients, self.activations
        left, right = (right, left) if self.transposed else (left, right)
        return (left.mT @ right).reshape(-1, *self.shape)


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
        """(b, *shape): by one convolution that has the samples as groups."""
        b, (out, *rest) = len(self.inputs), self.shape
        x, g = (side.transpose(0, 1).flatten(1, 2) for side in (self.inputs, self.gradients))
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
        """(b, *shape)."""
        table = self.gradients.new_zeros(len(self.index), *self.shape)
        place = self.index[..., None].expand_as(self.gradients)
        return table.scatter_add_(1, place, self.gradients)


@dataclass(frozen=True, eq=False)
class Whole:
    """Each sample's gradient itself, (b, *shape), where it has no factors."""

    values: Tensor

    def gradient(self) -> Tensor:
        """(b, *shape)."""
        return self.values


Part = Factors | Patches | Rows | Whole


def total(parts: Sequence[Part]) -> Tensor:
    """The sum of the parts' gradients, (b, *shape)."""
    first, *others = (part.gradient() for part in parts)
    for other in others:
        first = first + other
    return first
