r"""Kernels of a weighted Hamming distance between subset masks, from packed bits.

Every task has a weight (automatic relevance determination: a length scale per task),

.. math:: d_{ij} = \sum_k w_k\, |x_{ik} - y_{jk}|, \qquad K_{ij} = a_i\, b_j\, \kappa(d_{ij})

with factors a and b if there are any (an amplitude of each subset), and a kernel of

===============  =====================
kernel           :math:`\kappa(d)`
===============  =====================
``rbf``          ``exp(-d)``
``exponential``  ``exp(-sqrt(d))``
===============  =====================

With all weights equal it is what :func:`ksm_ext.ops.mask_gram` computes from a table. The terms of
every four tasks are tabulated, as exponentials where they can be multiplied (``rbf``), so that a
pair costs n / 4 loads of a vector of pairs. Terms are rounded once from float64 and joined in the
order of the tasks: the same bits on every device, and with ``x`` and ``y`` exchanged. Values below
twice the smallest normal number are zero.

Shapes: packed x (m, w) and y (l, w) int64 with w = ceil(n / 64), weights (n,), factors a (m,) and
b (l,), v (l, t).

Reference: Rasmussen & Williams 2006, section 5.1 (automatic relevance determination).
"""

from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import check_choice, message
from ksm_ext.ops._library import (
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
from ksm_ext.ops.mask_gram import batched_in_columns, check_multiplied, check_packed_pair

MASK_KERNELS = ("rbf", "exponential")
"""Names of the kernels of a weighted distance, in the order of ``csrc/mask_weights.h``."""


def weighted_mask_gram(
    x: Tensor,
    y: Tensor | None,
    num_tasks: int,
    weights: Tensor,
    *,
    kernel: str = "rbf",
    x_factors: Tensor | None = None,
    y_factors: Tensor | None = None,
) -> Tensor:
    """Gram matrix ``x_factors[i] y_factors[j] kernel(sum_k weights[k] |x_ik - y_jk|)``.

    Not differentiable.

    Args:
        x: (m, w) int64. Packed masks, see :func:`ksm_ext.ops.pack_masks`.
        y: (l, w) int64. Packed masks; None means ``x`` and computes half of the symmetric result.
        num_tasks: n, the number of tasks that the masks were packed from.
        weights: (n,) float32 or float64, at least 0; infinity is allowed. What each task in which
            two masks differ adds to their distance.
        kernel: One of the kernels of the module's head.
        x_factors: (m,), same dtype. Factors of the rows, or None; without ``y`` of the columns too.
        y_factors: (l,), same dtype. Factors of the columns, given with ``y`` and ``x_factors``.

    Returns:
        (m, l) in the dtype of the weights, contiguous.

    Raises:
        ValueError: If shapes or devices disagree, ``kernel`` is not known, one of two factors is
            missing, or weights or factors require a gradient.
        TypeError: If the masks are not int64, the weights not of one of the two dtypes, or the
            factors of another one.
        RuntimeError: If a weight is negative or NaN, on a CPU; on CUDA they are not looked at.
    """
    weights = _checked_weights(x, y, num_tasks, weights, kernel)
    _check_factors("x_factors", x_factors, len(x), weights)
    if y is None and y_factors is not None:
        expected = "None without y"
        raise ValueError(message("y_factors", expected, "a tensor", "x_factors serves both sides."))
    if y is not None and (x_factors is None) != (y_factors is None):
        expected, found = "given where x_factors are", "one of the two"
        raise ValueError(message("y_factors", expected, found, "Pass ones for the other."))
    if y is not None:
        _check_factors("y_factors", y_factors, len(y), weights)
    factors = contiguous(x_factors), contiguous(y_factors)
    kind = MASK_KERNELS.index(kernel)
    return _weighted_gram(x.contiguous(), contiguous(y), num_tasks, weights, kind, *factors)


def weighted_mask_gram_matmul(
    x: Tensor,
    y: Tensor | None,
    num_tasks: int,
    weights: Tensor,
    v: Tensor,
    *,
    kernel: str = "rbf",
) -> Tensor:
    """``weighted_mask_gram(x, y) @ v`` without ever storing the Gram matrix.

    Factors of rows and columns are those of the result and of ``v``: multiply them. Sums run in the
    dtype of the weights over at most 64 columns at a time, and in float64 across them.
    Differentiable in ``v``, any number of times and in both modes; the adjoint is the same
    operation with ``x`` and ``y`` exchanged.

    Args:
        x: (m, w) int64. Packed masks, see :func:`ksm_ext.ops.pack_masks`.
        y: (l, w) int64. Packed masks; None means ``x`` and, on a CPU, computes every pair once.
        num_tasks: n, the number of tasks that the masks were packed from.
        weights: (n,) float32 or float64, at least 0, see :func:`weighted_mask_gram`.
        v: (l, t), in the dtype of the weights.
        kernel: One of the kernels of the module's head.

    Returns:
        (m, t) in the dtype of the weights, contiguous.

    Raises:
        ValueError: As :func:`weighted_mask_gram`, or if ``v`` has not one row per mask of ``y``.
        TypeError: As :func:`weighted_mask_gram`, or if ``v`` is not in the dtype of the weights.
        RuntimeError: As :func:`weighted_mask_gram`.
    """
    weights = _checked_weights(x, y, num_tasks, weights, kernel)
    check_multiplied(v, x, y, weights.dtype, "the weights")
    kind = MASK_KERNELS.index(kernel)
    return _weighted_matmul(x.contiguous(), contiguous(y), num_tasks, weights, kind, v.contiguous())


def _checked_weights(
    x: Tensor, y: Tensor | None, num_tasks: int, weights: Tensor, kernel: str
) -> Tensor:
    """Check all that both operators take; the weights, contiguous."""
    check_packed_pair(x, y, num_tasks)
    check_choice("kernel", kernel, MASK_KERNELS)
    check_ndim("weights", weights, 1)
    check_floating("weights", weights)
    if weights.shape[0] != num_tasks:
        found = f"shape {tuple(weights.shape)}"
        raise ValueError(message("weights", f"of {num_tasks} values", found, "Pass one per task."))
    refuse_gradients(weights=weights)
    check_device("weights", weights, x.device)
    return weights.contiguous()


def _check_factors(name: str, factors: Tensor | None, count: int, weights: Tensor) -> None:
    if factors is None:
        return
    check_ndim(name, factors, 1)
    if factors.dtype != weights.dtype:
        expected = f"of dtype {weights.dtype} like the weights"
        raise TypeError(message(name, expected, str(factors.dtype), "Convert one of them."))
    if factors.shape[0] != count:
        found = f"shape {tuple(factors.shape)}"
        raise ValueError(message(name, f"of {count} values", found, "Pass one per mask."))
    refuse_gradients(**{name: factors})
    check_device(name, factors, weights.device)


class _WeightedGram(torch.autograd.Function):
    """Carries the rules of :func:`weighted_mask_gram`: an error instead of zero derivatives."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.ksm_ext.weighted_mask_gram.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise not_differentiable("weights")

    @staticmethod
    def jvp(ctx: Any, x: None, y: None, n: None, weights: Any, kernel: None, *factors: Any) -> None:
        refuse_tangents(weights=weights, x_factors=factors[0], y_factors=factors[1])

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return one_by_one(_weighted_gram, info, in_dims, args), 0


class _WeightedMatmul(torch.autograd.Function):
    """Carries the rules of :func:`weighted_mask_gram_matmul`: linear in v, nothing else moves."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.ksm_ext.weighted_mask_gram_matmul.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, y, ctx.num_tasks, weights, ctx.kernel, _ = inputs
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros
        ctx.save_for_backward(x, y, weights)
        ctx.save_for_forward(x, y, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 6
        x, y, weights = ctx.saved_tensors
        adjoint = (x, None) if y is None else (y, x)
        others = ctx.num_tasks, weights, ctx.kernel
        return None, None, None, None, None, _weighted_matmul(*adjoint, *others, grad.contiguous())

    @staticmethod
    def jvp(ctx: Any, x: None, y: None, n: None, weights: Any, kernel: None, v: Tensor) -> Tensor:
        refuse_tangents(weights=weights)
        saved_x, saved_y, saved_weights = ctx.saved_tensors
        others = ctx.num_tasks, saved_weights, ctx.kernel
        return _weighted_matmul(saved_x, saved_y, *others, v.contiguous())

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return batched_in_columns(_weighted_matmul, info, in_dims, args)


@in_graph
def _weighted_gram(*args: Any) -> Tensor:
    return _WeightedGram.apply(*args)


@in_graph
def _weighted_matmul(*args: Any) -> Tensor:
    return _WeightedMatmul.apply(*args)


@torch.library.register_fake("ksm_ext::weighted_mask_gram")
def _(x: Tensor, y: Any, num_tasks: int, weights: Tensor, kernel: int, a: Any, b: Any) -> Tensor:
    return weights.new_empty(x.shape[0], (x if y is None else y).shape[0])


@torch.library.register_fake("ksm_ext::weighted_mask_gram_matmul")
def _(x: Tensor, y: Any, num_tasks: int, weights: Tensor, kernel: int, v: Tensor) -> Tensor:
    return v.new_empty(x.shape[0], v.shape[1])
