r"""Random projections whose matrix is a function of a seed, never stored.

.. math:: Y = X P, \qquad X = Y P^T, \qquad E[P P^T] = I_p

P has a row for each coordinate (a model's parameters, one after the other) and a column for each
output. An entry depends on the seed, the kind, the coordinate and the output alone, so that the
matrix is the same on the CPU and on every GPU, for any split of rows and coordinates. Sums over
coordinates are the same bits on every CPU, and agree to rounding between devices and splits. Kinds:

* ``"sbp"``, signed block permutation: every block of ``dim / sparsity`` coordinates is permuted and
  given random signs, once for each of ``sparsity`` segments of the outputs. Errors of norms and
  inner products have the second moments of dense signs (the pairwise collision probability is that
  of Charikar, Chen & Farach-Colton 2002), at the cost of reading x. ``hadamard`` first mixes each
  block by signs and a Walsh-Hadamard matrix, which tames gradients of few large entries.
* ``"sjlt"``: ``sparsity`` nonzeros at independent places (Kane & Nelson 2014, arXiv:1012.1577).
* ``"rademacher"``, ``"gaussian"``: dense signs or normals (Achlioptas 2003), as TRAK projects.

Shapes: x (b, p), y (b, k) with k = ``dim``. Sums run in float32, in float64 for float64 inputs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import check_choice, check_positive_int, message
from ksm_ext.ops._library import check_device, check_floating, check_ndim, in_graph

KINDS = ("sbp", "rademacher", "gaussian", "sjlt")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Projector:
    """The matrix P, and the projection ``x -> x P`` of gradients given as one tensor or several.

    The default, a signed block permutation, costs one reading of the gradients.

    Attributes:
        dim: k, the number of outputs.
        kind: ``"sbp"``, ``"rademacher"``, ``"gaussian"`` or ``"sjlt"``.
        seed: Any integer of 64 bits.
        sparsity: Nonzeros per coordinate of the sparse kinds; a divisor of ``dim``.
        hadamard: Mix the blocks of ``"sbp"`` first.

    Raises:
        ValueError: If a value is out of its range, or belongs to another kind.
        TypeError: If an integer is not one.
    """

    dim: int
    kind: str = "sbp"
    seed: int = 0
    sparsity: int = 1
    hadamard: bool = False

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        for name, minimum in (("dim", 1), ("seed", -(2**63)), ("sparsity", 1)):
            number = check_positive_int(name, getattr(self, name), minimum)
            object.__setattr__(self, name, number)  # Python's own, of whatever kind it was
        if self.dim >= 2**31:
            raise ValueError(message("dim", "below 2^31", str(self.dim), "Project to fewer."))
        sparse = self.kind in ("sbp", "sjlt")
        if self.sparsity != 1 and not sparse:
            expected = f"1 for {self.kind}"
            raise ValueError(message("sparsity", expected, str(self.sparsity), "Leave it out."))
        if self.dim % self.sparsity or self.sparsity >= 2**16 - 1:
            expected = f"a divisor of dim {self.dim} below 65535"
            remedy = "Choose dim as a multiple of it."
            raise ValueError(message("sparsity", expected, str(self.sparsity), remedy))
        if self.hadamard and self.kind != "sbp":
            raise ValueError(message("hadamard", f"False for {self.kind}", "True", "Leave it out."))

    @property
    def _arguments(self) -> tuple[int, int, int, int, bool]:
        return self.dim, KINDS.index(self.kind), self.seed, self.sparsity, self.hadamard

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
                total = project(rows, self, offset=offset)
            elif out is not None or not (torch.is_grad_enabled() and rows.requires_grad):
                project_(total.detach(), rows, self, offset=offset)
            else:
                total = total + project(rows, self, offset=offset)
            offset += rows.shape[1]
        assert total is not None
        return total

    def adjoint(self, y: Tensor, num_coordinates: int, *, offset: int = 0) -> Tensor:
        """``y P^T`` for coordinates ``offset`` and on: (b, dim) -> (b, num_coordinates)."""
        return project_adjoint(y, self, num_coordinates, offset=offset)


def project(x: Tensor, projection: Projector, *, offset: int = 0) -> Tensor:
    """``x P[offset : offset + p]``; differentiable any number of times, in both modes.

    Args:
        x: (b, p) float32, float64, bfloat16 or float16.
        projection: Which matrix.
        offset: The first coordinate of x.

    Returns:
        (b, k) float32, or float64 for a float64 x.

    Raises:
        ValueError: If x is not two-dimensional or the offset is negative.
        TypeError: If x is of another dtype.
    """
    _check_input("x", x, offset)
    return _project(x, projection, offset)


def project_(out: Tensor, x: Tensor, projection: Projector, *, offset: int = 0) -> Tensor:
    """Add ``x P[offset : offset + p]`` to ``out`` in place, and return it; without derivatives.

    Gradients of one parameter after the other are projected like this without being concatenated.

    Args:
        out: (b, k) float32, or float64 for a float64 x. Contiguous.
        x: (b, p) float32, float64, bfloat16 or float16.
        projection: Which matrix.
        offset: The first coordinate of x.

    Raises:
        ValueError: As :func:`project`, or if ``out`` has another shape or device, or requires a
            gradient.
        TypeError: If dtypes disagree.
    """
    _check_input("x", x, offset)
    check_ndim("out", out, 2)
    check_device("out", out, x.device)
    if out.shape != (len(x), projection.dim) or not out.is_contiguous():
        expected = f"contiguous of shape ({len(x)}, {projection.dim})"
        found = f"shape {tuple(out.shape)} with strides {out.stride()}"
        raise ValueError(message("out", expected, found, "Allocate it by torch.zeros."))
    if out.dtype != _result_dtype(x):
        expected = f"{_result_dtype(x)} for this x"
        raise TypeError(message("out", expected, str(out.dtype), "Allocate it anew."))
    if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
        name = "x" if x.requires_grad else "out"
        expected = "without a gradient for accumulation in place"
        remedy = "Detach it, or use project."
        raise ValueError(message(name, expected, "requires_grad=True", remedy))
    torch.ops.ksm_ext.project_.default(out, _unit_stride(x), offset, *projection._arguments)
    return out


def project_adjoint(
    y: Tensor, projection: Projector, num_coordinates: int, *, offset: int = 0
) -> Tensor:
    """``y P[offset : offset + p]^T``; differentiable any number of times, in both modes.

    Args:
        y: (b, k) float32 or float64.
        projection: Which matrix.
        num_coordinates: p, how many coordinates are wanted.
        offset: The first of them.

    Returns:
        (b, p) in the dtype of y.

    Raises:
        ValueError: If y has not k columns, or a number is negative.
        TypeError: If y is of another dtype.
    """
    num_coordinates = check_positive_int("num_coordinates", num_coordinates, 0)
    _check_input("y", y, offset)
    check_floating("y", y)
    if y.shape[1] != projection.dim:
        expected = f"of {projection.dim} columns like the projection"
        found = f"shape {tuple(y.shape)}"
        raise ValueError(message("y", expected, found, "Pass what project returned."))
    return _project_adjoint(y, projection, num_coordinates, offset)


def _check_input(name: str, x: Tensor, offset: int) -> None:
    check_ndim(name, x, 2)
    if x.dtype not in _DTYPES:
        expected, remedy = "of a floating-point dtype", "Convert it with .float()."
        raise TypeError(message(name, expected, str(x.dtype), remedy))
    offset = check_positive_int("offset", offset, 0)
    if offset > 2**62:
        raise ValueError(message("offset", "at most 2^62", str(offset), "Count from 0."))
    check_device(name, x, x.device)


def _result_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _project_raw(x: Tensor, projection: Projector, offset: int) -> Tensor:
    out = x.new_zeros(len(x), projection.dim, dtype=_result_dtype(x))
    torch.ops.ksm_ext.project_.default(out, _unit_stride(x), offset, *projection._arguments)
    return out


class _Project(torch.autograd.Function):
    """Linear: the tangent is projected alike, the gradient goes through the adjoint."""

    @staticmethod
    def forward(x: Tensor, projection: Projector, offset: int) -> Tensor:
        return _project_raw(x, projection, offset)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, ctx.projection, ctx.offset = inputs
        ctx.num_coordinates, ctx.dtype = x.shape[1], x.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = _project_adjoint(grad, ctx.projection, ctx.num_coordinates, ctx.offset)
        return x.to(ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, x: Tensor, *_: None) -> Tensor:
        return _project(x, ctx.projection, ctx.offset)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor, *others: Any) -> tuple[Tensor, int]:
        x = x.movedim(in_dims[0], 0)  # (batch, b, p): a batch is more rows
        flat = _project(x.flatten(0, 1), *others)
        return flat.reshape(*x.shape[:2], -1), 0


class _ProjectAdjoint(torch.autograd.Function):
    """Linear: the tangent is treated alike, the gradient is projected."""

    @staticmethod
    def forward(y: Tensor, projection: Projector, num_coordinates: int, offset: int) -> Tensor:
        return torch.ops.ksm_ext.project_adjoint.default(
            y.contiguous(), num_coordinates, offset, *projection._arguments
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        _, ctx.projection, ctx.num_coordinates, ctx.offset = inputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _project(grad, ctx.projection, ctx.offset), None, None, None

    @staticmethod
    def jvp(ctx: Any, y: Tensor, *_: None) -> Tensor:
        return _project_adjoint(y, ctx.projection, ctx.num_coordinates, ctx.offset)

    @staticmethod
    def vmap(info: Any, in_dims: Any, y: Tensor, *others: Any) -> tuple[Tensor, int]:
        y = y.movedim(in_dims[0], 0)  # (batch, b, k)
        flat = _project_adjoint(y.flatten(0, 1), *others)
        return flat.reshape(*y.shape[:2], -1), 0


@in_graph
def _project(*args: Any) -> Tensor:
    return _Project.apply(*args)


@in_graph
def _project_adjoint(*args: Any) -> Tensor:
    return _ProjectAdjoint.apply(*args)


@torch.library.register_fake("ksm_ext::project_")
def _(out: Tensor, x: Tensor, offset: int, *projection: Any) -> None:
    return None


@torch.library.register_fake("ksm_ext::project_adjoint")
def _(y: Tensor, num_coordinates: int, offset: int, *projection: Any) -> Tensor:
    return y.new_empty(len(y), num_coordinates)
