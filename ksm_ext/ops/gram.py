r"""Gram matrices of real features: streamed, one for each task, or through a kernel.

.. math:: G \mathrel{+}= \Phi^\top \mathrm{diag}(w)\, \Phi, \qquad
          G_a = \Phi_a^\top \mathrm{diag}(w_a)\, \Psi_a, \qquad K_{ij} = k(x_i, y_j)

with a kernel of

===============  =====================================
kind             k(x, y)
===============  =====================================
``linear``       ``x . y``
``polynomial``   ``(gamma x . y + coef0)^degree``
``rbf``          ``exp(-gamma ||x - y||_2^2)``
``laplace``      ``exp(-gamma ||x - y||_1)``
``exponential``  ``exp(-gamma ||x - y||_2)``
===============  =====================================

Symmetric matrices cost little more than half of their products. A kernel is applied to its
distances while they are in the caches; exponentials below the normal numbers are zero. On CUDA,
:func:`gram_update`, :func:`task_gram` and large :func:`kernel_gram` of float32 run on the tensor
cores, a value as the sum of two float16 after its column (of a kernel, its row) is scaled: as exact
as float32, but infinities become NaN.

Shapes: features Φ (b, k), weights w (b,), Ψ (b, t), x (m, n), y (l, n), K (m, l).
"""

from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import check_choice, message
from ksm_ext.ops._library import (
    check_beside,
    check_matrix,
    check_ndim,
    check_one_tangent,
    check_task_offsets,
    contiguous,
    in_graph,
    one_by_one,
    without_derivatives,
)

KINDS = ("linear", "polynomial", "rbf", "laplace", "exponential")
"""Names of the kernels of :func:`kernel_gram`, in the order of ``csrc/kernel_value.h``."""


def gram_update(gram: Tensor, features: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add ``features^T diag(weights) features`` to the symmetric ``gram``, in place.

    Not differentiable.

    Args:
        gram: (k, k) contiguous, in the dtype of the features. Symmetric: what is below its diagonal
            is not read.
        features: (b, k) float32 or float64. A batch of samples.
        weights: (b,), same dtype; None means 1.

    Returns:
        ``gram`` itself.

    Raises:
        ValueError: If shapes or devices disagree, ``gram`` is strided, or an argument carries a
            gradient.
        TypeError: If a dtype is another.
    """
    check_matrix("features", features)
    k = features.shape[1]
    check_beside("gram", gram, (k, k), features)
    if not gram.is_contiguous():
        expected = "contiguous, to be updated in place"
        raise ValueError(message("gram", expected, "a strided one", "Allocate it anew."))
    if weights is not None:
        check_beside("weights", weights, (features.shape[0],), features)
    _gram_update(gram, features.contiguous(), contiguous(weights))
    return gram


def task_gram(
    features: Tensor,
    task_offsets: Tensor,
    other: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """``features_a^T diag(weights_a) other_a`` of the samples of every task a.

    With ``other=None`` the Gram matrices of the tasks; with targets their moments. A subset's sums
    are then sums over its tasks: one pass over the samples serves all subsets. Not differentiable.

    Args:
        features: (b, k) float32 or float64. Row i is sample i, sorted by task.
        task_offsets: (n + 1,) int64. First sample of each task, then b. Read by the host.
        other: (b, t), same dtype; None means ``features`` and computes half of the result.
        weights: (b,), same dtype; None means 1.

    Returns:
        (n, k, t) in the dtype of the features, contiguous; zero for a task without samples.

    Raises:
        ValueError: If shapes or devices disagree, or an argument carries a gradient.
        TypeError: If a dtype is another.
        RuntimeError: If the values of ``task_offsets`` are not 0 .. b, ascending.
    """
    check_matrix("features", features)
    check_task_offsets(task_offsets)
    b = features.shape[0]
    if other is not None:
        check_ndim("other", other, 2)
        check_beside("other", other, (b, other.shape[1]), features)
    if weights is not None:
        check_beside("weights", weights, (b,), features)
    offsets = task_offsets.cpu().contiguous()
    return _task_gram(features.contiguous(), offsets, contiguous(other), contiguous(weights))


def kernel_gram(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    *,
    gamma: float = 1.0,
    coef0: float = 0.0,
    degree: int = 1,
) -> Tensor:
    """Kernel matrix between the rows of ``x`` and ``y``.

    Differentiable in ``x`` and ``y``, any number of times, one of them in forward mode; the
    derivatives are plain PyTorch, and zero where ``laplace`` and ``exponential`` have a kink.

    Args:
        x: (m, n) float32 or float64.
        y: (l, n), same dtype. None means ``x``: half of the symmetric result is computed, and
            distances on its diagonal are exactly zero.
        kind: One of the kernels of the module's head; a parameter it lacks is ignored.
        gamma: Its scale.
        coef0: Added to the scaled product.
        degree: At least 1.

    Returns:
        (m, l) in the dtype of ``x``, contiguous.

    Raises:
        ValueError: If shapes or devices disagree, or ``kind`` or a parameter is not possible.
        TypeError: If a dtype is another.
    """
    check_choice("kind", kind, KINDS)
    check_matrix("x", x)
    if y is not None:
        check_ndim("y", y, 2)
        check_beside("y", y, (y.shape[0], x.shape[1]), x)
    if kind == "polynomial" and degree < 1:
        raise ValueError(message("degree", "at least 1", str(degree), "Use 2 or 3."))
    if kind in KINDS[2:] and not gamma >= 0:
        remedy = "A negative one grows with the distance."
        raise ValueError(message("gamma", "at least 0", str(gamma), remedy))
    return _kernel_gram(x.contiguous(), contiguous(y), KINDS.index(kind), gamma, coef0, degree)


@in_graph
def _gram_update(*args: Any) -> None:
    without_derivatives(torch.ops.ksm_ext.gram_update.default, *args)


@in_graph
def _task_gram(*args: Any) -> Tensor:
    return without_derivatives(torch.ops.ksm_ext.task_gram.default, *args)


def _squared_distances(x: Tensor, y: Tensor | None) -> Tensor:
    squares = x.square().sum(1)
    if y is not None:
        return (squares[:, None] + y.square().sum(1) - 2 * (x @ y.T)).clamp_min(0)
    distances = (squares[:, None] + squares - 2 * (x @ x.T)).clamp_min(0)
    return distances.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), 0)


def _slope(
    x: Tensor, y: Tensor | None, gram: Tensor, kind: str, gamma: float, coef0: float, degree: int
) -> Tensor:
    """DK / d(x . y), d(squared distance), or with ``laplace`` d(distance): (m, l)."""
    if kind == "linear":
        return torch.ones_like(gram)
    if kind == "polynomial":
        dots = x @ (x if y is None else y).T
        return degree * gamma * (gamma * dots + coef0) ** (degree - 1)
    if kind == "exponential":
        squares = _squared_distances(x, y)
        apart = squares > 0
        root = torch.where(apart, squares, 1.0).sqrt()
        return torch.where(apart, -gamma / 2 * gram / root, 0.0)
    return -gamma * gram


class _KernelGram(torch.autograd.Function):
    """Carries the rules of :func:`kernel_gram`, in PyTorch: they are differentiable in turn."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.ksm_ext.kernel_gram.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        x, y, ctx.kind, *ctx.parameters = inputs
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros
        ctx.save_for_backward(x, y)
        ctx.save_for_forward(x, y)

    @staticmethod
    def slope_of(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        kind = KINDS[ctx.kind]
        # Recomputed: a saved output would carry no tangent to the next derivative.
        gram = _kernel_gram(x, y, ctx.kind, *ctx.parameters)
        return _slope(x, y, gram, kind, *ctx.parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 6
        x, y = ctx.saved_tensors
        kind = KINDS[ctx.kind]
        weights = grad * _KernelGram.slope_of(ctx, x, y)
        right = x if y is None else y
        if kind in ("linear", "polynomial"):
            grad_x, grad_y = weights @ right, weights.T @ x
        elif kind == "laplace":
            signed = [  # one coordinate at a time: (m, l, n) need not fit
                weights * torch.sign(x[:, d, None] - right[:, d]) for d in range(x.shape[1])
            ]
            grad_x = _columns([part.sum(1) for part in signed], x)
            grad_y = _columns([-part.sum(0) for part in signed], right)
        else:
            grad_x = 2 * (weights.sum(1)[:, None] * x - weights @ right)
            grad_y = 2 * (weights.sum(0)[:, None] * right - weights.T @ x)
        if y is None:
            return grad_x + grad_y, None, None, None, None, None
        return grad_x, grad_y, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dy: Tensor | None, *_: Any) -> Tensor:
        x, y = ctx.saved_tensors
        kind = KINDS[ctx.kind]
        right = x if y is None else y
        dx = torch.zeros_like(x) if dx is None else dx
        dright = dx if y is None else torch.zeros_like(y) if dy is None else dy
        if kind == "laplace":
            change = x.new_zeros(len(x), len(right))
            for d in range(x.shape[1]):
                sign = torch.sign(x[:, d, None] - right[:, d])
                change = change + sign * (dx[:, d, None] - dright[:, d])
        else:
            change = dx @ right.T + x @ dright.T  # of the products
            if kind in ("rbf", "exponential"):
                own = (x * dx).sum(1)[:, None] + (right * dright).sum(1)
                change = 2 * (own - change)  # of the squared distances
        return _KernelGram.slope_of(ctx, x, y) * change

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return one_by_one(_kernel_gram, info, in_dims, args), 0


def _columns(columns: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(columns, dim=1) if columns else torch.zeros_like(like)


@in_graph
def _kernel_gram(x: Tensor, y: Tensor | None, *kernel: Any) -> Tensor:
    check_one_tangent("x", x)
    check_one_tangent("y", y)
    return _KernelGram.apply(x, y, *kernel)


@torch.library.register_fake("ksm_ext::gram_update")
def _(gram: Tensor, features: Tensor, weights: Tensor | None) -> None:
    return None


@torch.library.register_fake("ksm_ext::task_gram")
def _(
    features: Tensor, task_offsets: Tensor, other: Tensor | None, weights: Tensor | None
) -> Tensor:
    t = (features if other is None else other).shape[1]
    return features.new_empty(task_offsets.shape[0] - 1, features.shape[1], t)


@torch.library.register_fake("ksm_ext::kernel_gram")
def _(x: Tensor, y: Tensor | None, kind: int, gamma: float, coef0: float, degree: int) -> Tensor:
    return x.new_empty(x.shape[0], (x if y is None else y).shape[0])
