r"""Kernels between sets of subset masks, from packed bits and tables of values.

A set of subsets arrives as *packed masks*: bits in int64 words, task j at bit ``j % 64`` of word
``j // 64``, the bits past n zero. A kernel between masks arrives as tables,

.. math:: K_{ij} = A[\mathrm{hamming}(x_i, y_j)] + B[\mathrm{overlap}(x_i, y_j)],

where hamming counts the tasks in which two subsets differ and overlap those they share. Every
kernel on 0/1 masks that depends on distances and inner products has this form, so that its Gram
matrix costs bit counts and table reads: no products, no exponentials.

Shapes: masks (m, n) bool, packed x (m, w) and y (l, w) int64 with w = ceil(n / 64), tables A and B
(n + 1,) float32 or float64, v (l, t).
"""

from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import message
from ksm_ext.ops._library import (
    check_boolean_masks,
    check_device,
    check_floating,
    check_ndim,
    contiguous,
    in_graph,
    not_differentiable,
    one_by_one,
    refuse_gradients,
    refuse_tangents,
)

BITS_PER_WORD = 64


def pack_masks(masks: Tensor) -> Tensor:
    """Pack boolean masks into the bits of int64 words.

    Args:
        masks: (m, n) bool. Row i selects the tasks of subset i.

    Returns:
        (m, ceil(n / 64)) int64: bit ``j % 64`` of word ``j // 64`` is task j, the rest zero.

    Raises:
        ValueError: If ``masks`` is not two-dimensional.
        TypeError: If ``masks`` is not bool.
    """
    check_boolean_masks(masks)
    check_device("masks", masks, masks.device)
    return torch.ops.ksm_ext.pack_masks.default(masks.contiguous())


def mask_gram(
    x: Tensor,
    y: Tensor | None,
    num_tasks: int,
    *,
    hamming_table: Tensor | None = None,
    overlap_table: Tensor | None = None,
) -> Tensor:
    """Gram matrix ``hamming_table[hamming(x_i, y_j)] + overlap_table[overlap(x_i, y_j)]``.

    The entries are the tables' own values (or one sum of two): the same bits on every device.

    Args:
        x: (m, w) int64. Packed masks, see :func:`pack_masks`.
        y: (l, w) int64. Packed masks; None means ``x`` and computes half of the symmetric result.
        num_tasks: n, the number of tasks that the masks were packed from.
        hamming_table: (n + 1,) float32 or float64. The term for 0 .. n differing tasks, or None.
        overlap_table: (n + 1,), same dtype. The term for 0 .. n shared tasks, or None.

    Returns:
        (m, l) in the dtype of the tables, contiguous.

    Raises:
        ValueError: If shapes or devices disagree, no table is given, or a table requires a
            gradient: tables are not differentiable here.
        TypeError: If the masks are not int64, or the tables not of one of the two dtypes.
    """
    tables = _checked_tables(x, y, num_tasks, hamming_table, overlap_table)
    return _mask_gram(x.contiguous(), contiguous(y), num_tasks, *tables)


def mask_gram_matmul(
    x: Tensor,
    y: Tensor | None,
    num_tasks: int,
    v: Tensor,
    *,
    hamming_table: Tensor | None = None,
    overlap_table: Tensor | None = None,
) -> Tensor:
    """``mask_gram(x, y) @ v`` without ever storing the Gram matrix.

    Sums run in the dtype of the tables over at most 64 columns at a time, and in float64 across
    them. Differentiable in ``v``, any number of times and in both modes; the adjoint is the same
    operation with ``x`` and ``y`` exchanged.

    Args:
        x: (m, w) int64. Packed masks, see :func:`pack_masks`.
        y: (l, w) int64. Packed masks; None means ``x`` and, on a CPU, counts every pair once.
        num_tasks: n, the number of tasks that the masks were packed from.
        v: (l, t), in the dtype of the tables.
        hamming_table: (n + 1,) float32 or float64. The term for 0 .. n differing tasks, or None.
        overlap_table: (n + 1,), same dtype. The term for 0 .. n shared tasks, or None.

    Returns:
        (m, t) in the dtype of the tables, contiguous.

    Raises:
        ValueError: As :func:`mask_gram`, or if ``v`` has not one row per mask of ``y``.
        TypeError: As :func:`mask_gram`, or if ``v`` is not in the dtype of the tables.
    """
    tables = _checked_tables(x, y, num_tasks, hamming_table, overlap_table)
    dtype = next(table.dtype for table in tables if table is not None)
    check_multiplied(v, x, y, dtype, "the tables")
    return _mask_gram_matmul(x.contiguous(), contiguous(y), num_tasks, *tables, v.contiguous())


def _check_packed(name: str, masks: Tensor, num_tasks: int, device: torch.device) -> None:
    check_ndim(name, masks, 2)
    if masks.dtype != torch.int64:
        expected = "packed masks of torch.int64"
        raise TypeError(message(name, expected, str(masks.dtype), "Use ops.pack_masks."))
    words = -(-num_tasks // BITS_PER_WORD)
    if masks.shape[1] != words:
        expected, found = f"of {words} words for {num_tasks} tasks", f"shape {tuple(masks.shape)}"
        remedy = "Pass the num_tasks that the masks were packed from."
        raise ValueError(message(name, expected, found, remedy))
    check_device(name, masks, device)


def check_packed_pair(x: Tensor, y: Tensor | None, num_tasks: int) -> None:
    """Raise unless ``x``, and ``y`` if it is given, are packed masks of ``num_tasks`` tasks."""
    if num_tasks < 0:
        raise ValueError(message("num_tasks", "at least 0", str(num_tasks), "Count the tasks."))
    _check_packed("x", x, num_tasks, x.device)
    if y is not None:
        _check_packed("y", y, num_tasks, x.device)


def check_multiplied(
    v: Tensor, x: Tensor, y: Tensor | None, dtype: torch.dtype, whose: str
) -> None:
    """Raise unless a Gram matrix of ``x`` and ``y`` in ``dtype``, ``whose`` it is, multiplies v."""
    check_ndim("v", v, 2)
    check_device("v", v, x.device)
    name, rows = ("x", len(x)) if y is None else ("y", len(y))
    if v.shape[0] != rows:
        found, remedy = f"shape {tuple(v.shape)}", f"Pass one row per mask of {name}."
        raise ValueError(message("v", f"of {rows} rows like {name}", found, remedy))
    if v.dtype != dtype:
        expected = f"of dtype {dtype} like {whose}"
        raise TypeError(message("v", expected, str(v.dtype), "Convert one of them."))


def batched_in_columns(
    function: Any, info: Any, in_dims: tuple[int | None, ...], args: Any
) -> tuple[Tensor, int]:
    """Batch a product with ``v``, its last argument: a batch of v is more columns of v."""
    *others, v = args
    *other_dims, v_dim = in_dims
    if any(dim is not None for dim in other_dims):
        return one_by_one(function, info, in_dims, args), 0
    v = v.movedim(v_dim, 1)  # (l, batch, t)
    flat = function(*others, v.reshape(len(v), -1))  # (m, batch * t)
    return flat.reshape(len(flat), *v.shape[1:]), 1


def _checked_tables(
    x: Tensor,
    y: Tensor | None,
    num_tasks: int,
    hamming_table: Tensor | None,
    overlap_table: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Check all but ``v``; the tables, contiguous."""
    check_packed_pair(x, y, num_tasks)
    if hamming_table is None and overlap_table is None:
        expected = "given where overlap_table is not"
        raise ValueError(message("hamming_table", expected, "neither", "Pass one."))
    for name, table in (("hamming_table", hamming_table), ("overlap_table", overlap_table)):
        if table is None:
            continue
        check_ndim(name, table, 1)
        check_floating(name, table)
        if table.shape[0] != num_tasks + 1:
            found, remedy = f"shape {tuple(table.shape)}", "Tabulate the counts 0 .. num_tasks."
            raise ValueError(message(name, f"of {num_tasks + 1} values", found, remedy))
        refuse_gradients(**{name: table})
        check_device(name, table, x.device)
    dtypes = [table.dtype for table in (hamming_table, overlap_table) if table is not None]
    if dtypes[0] != dtypes[-1]:
        expected = f"of dtype {dtypes[0]} like hamming_table"
        raise TypeError(message("overlap_table", expected, str(dtypes[-1]), "Convert one of them."))
    return contiguous(hamming_table), contiguous(overlap_table)


class _MaskGram(torch.autograd.Function):
    """Carries the rules of :func:`mask_gram`: no derivative, and an error instead of zeros."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.ksm_ext.mask_gram.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise not_differentiable("hamming_table")

    @staticmethod
    def jvp(ctx: Any, x: None, y: None, n: None, hamming: Any, overlap: Any) -> None:
        refuse_tangents(hamming_table=hamming, overlap_table=overlap)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return one_by_one(_mask_gram, info, in_dims, args), 0


class _MaskGramMatmul(torch.autograd.Function):
    """Carries the rules of :func:`mask_gram_matmul`: linear in v, nothing else moves."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.ksm_ext.mask_gram_matmul.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, y, ctx.num_tasks, hamming, overlap, _ = inputs
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros
        ctx.save_for_backward(x, y, hamming, overlap)
        ctx.save_for_forward(x, y, hamming, overlap)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 6
        x, y, hamming, overlap = ctx.saved_tensors
        adjoint = (x, None) if y is None else (y, x)
        grad_v = _mask_gram_matmul(*adjoint, ctx.num_tasks, hamming, overlap, grad.contiguous())
        return None, None, None, None, None, grad_v

    @staticmethod
    def jvp(ctx: Any, x: None, y: None, n: None, hamming: Any, overlap: Any, v: Tensor) -> Tensor:
        refuse_tangents(hamming_table=hamming, overlap_table=overlap)
        saved_x, saved_y, *tables = ctx.saved_tensors
        return _mask_gram_matmul(saved_x, saved_y, ctx.num_tasks, *tables, v.contiguous())

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return batched_in_columns(_mask_gram_matmul, info, in_dims, args)


@in_graph
def _mask_gram(*args: Any) -> Tensor:
    return _MaskGram.apply(*args)


@in_graph
def _mask_gram_matmul(*args: Any) -> Tensor:
    return _MaskGramMatmul.apply(*args)


@torch.library.register_fake("ksm_ext::pack_masks")
def _(masks: Tensor) -> Tensor:
    words = (masks.shape[1] + BITS_PER_WORD - 1) // BITS_PER_WORD
    return masks.new_empty(masks.shape[0], words, dtype=torch.int64)


@torch.library.register_fake("ksm_ext::mask_gram")
def _(
    x: Tensor, y: Tensor | None, num_tasks: int, hamming: Tensor | None, overlap: Tensor | None
) -> Tensor:
    like = overlap if hamming is None else hamming
    assert like is not None
    return like.new_empty(x.shape[0], (x if y is None else y).shape[0])


@torch.library.register_fake("ksm_ext::mask_gram_matmul")
def _(x: Tensor, y: Any, num_tasks: int, hamming: Any, overlap: Any, v: Tensor) -> Tensor:
    return v.new_empty(x.shape[0], v.shape[1])
