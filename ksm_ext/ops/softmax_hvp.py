r"""The Hessian of softmax cross-entropy over its logits, times many tangents in one pass.

With :math:`p_i = \mathrm{softmax}(z_i)` of row i of the logits,

.. math:: \mathrm{out}_{ri} = w_i \, (\mathrm{diag}(p_i) - p_i p_i^\top) \, \dot z_{ri}
          = w_i \, p_i \odot (\dot z_{ri} - \langle p_i, \dot z_{ri} \rangle),

the middle of every Gauss-Newton product of a classifier or language model. Written in PyTorch it
makes three more tensors of the size of the tangents; here there is none but the result, and with
:func:`softmax_hvp_` none at all.

Shapes: logits (b, c) float32 or float64, tangents (s, b, c), weights (b,).
"""

from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import message
from ksm_ext.ops._library import (
    check_beside,
    check_matrix,
    check_ndim,
    contiguous,
    in_graph,
    refuse_gradients,
    refuse_tangents,
    without_derivatives,
)


def softmax_hvp(logits: Tensor, tangents: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Hessian-vector products of softmax cross-entropy, for every tangent.

    Differentiable in the tangents, any number of times and in both modes: the product is its own
    adjoint.

    Args:
        logits: (b, c) float32 or float64. -inf is a class that cannot be.
        tangents: (s, b, c), in the dtype of the logits.
        weights: (b,), of each row; None: 1. 0 leaves a row out.

    Returns:
        (s, b, c), contiguous.

    Raises:
        ValueError: If shapes or devices disagree, or logits or weights carry a gradient.
        TypeError: If a dtype is another.
    """
    _check(logits, tangents, weights)
    return _softmax_hvp(logits.contiguous(), tangents.contiguous(), contiguous(weights))


def softmax_hvp_(tangents: Tensor, logits: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """The same in place of the tangents, which are returned; not differentiable.

    Args:
        tangents: (s, b, c), contiguous.
        logits: See :func:`softmax_hvp`.
        weights: See :func:`softmax_hvp`.
    """
    _check(logits, tangents, weights)
    if not tangents.is_contiguous():
        found = f"strides {tuple(tangents.stride())}"
        raise ValueError(message("tangents", "contiguous", found, "Use `softmax_hvp`."))
    _softmax_hvp_in_place(tangents, logits.contiguous(), contiguous(weights))
    return tangents


def _check(logits: Tensor, tangents: Tensor, weights: Tensor | None) -> None:
    check_matrix("logits", logits)
    check_ndim("tangents", tangents, 3)
    check_beside("tangents", tangents, (tangents.shape[0], *logits.shape), logits)
    if weights is not None:
        check_beside("weights", weights, (logits.shape[0],), logits)


class _SoftmaxHvp(torch.autograd.Function):
    """Carries the rules of :func:`softmax_hvp`: linear in the tangents and its own adjoint."""

    @staticmethod
    def forward(logits: Tensor, tangents: Tensor, weights: Tensor | None) -> Tensor:
        return torch.ops.ksm_ext.softmax_hvp.default(logits, tangents, weights)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        logits, _, weights = inputs
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros
        ctx.save_for_backward(logits, weights)
        ctx.save_for_forward(logits, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return None, None, None
        logits, weights = ctx.saved_tensors
        return None, _softmax_hvp(logits, grad.contiguous(), weights), None

    @staticmethod
    def jvp(ctx: Any, logits: Any, tangents: Any, weights: Any) -> Tensor:
        refuse_tangents(logits=logits, weights=weights)
        saved, saved_weights = ctx.saved_tensors
        return _softmax_hvp(saved, tangents.contiguous(), saved_weights)

    @staticmethod
    def vmap(info: Any, in_dims: Any, logits: Any, tangents: Any, weights: Any) -> Any:
        """Fold the batch into the tangents, or where logits are batched too, into the rows."""
        of_logits, of_tangents, of_weights = in_dims
        size = info.batch_size
        if of_tangents is None:
            tangents = tangents.expand(size, *tangents.shape)
        else:
            tangents = tangents.movedim(of_tangents, 0)  # (v, s, b, c)
        s, b, c = tangents.shape[1:]
        if of_logits is None and of_weights is None:
            out = _softmax_hvp(logits, tangents.reshape(size * s, b, c).contiguous(), weights)
            return out.reshape(size, s, b, c), 0

        def rows(tensor: Tensor, dim: int | None) -> Tensor:
            moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return moved.reshape(size * b, *moved.shape[2:]).contiguous()

        tall = tangents.transpose(0, 1).reshape(s, size * b, c).contiguous()
        tall_weights = None if weights is None else rows(weights, of_weights)
        out = _softmax_hvp(rows(logits, of_logits), tall, tall_weights)
        return out.reshape(s, size, b, c), 1


@in_graph
def _softmax_hvp(logits: Tensor, tangents: Tensor, weights: Tensor | None) -> Tensor:
    refuse_gradients(logits=logits, weights=weights)
    return _SoftmaxHvp.apply(logits, tangents, weights)


@in_graph
def _softmax_hvp_in_place(*args: Any) -> None:
    without_derivatives(torch.ops.ksm_ext.softmax_hvp_.default, *args)


@torch.library.register_fake("ksm_ext::softmax_hvp")
def _(logits: Tensor, tangents: Tensor, weights: Tensor | None) -> Tensor:
    return tangents.new_empty(tangents.shape)


@torch.library.register_fake("ksm_ext::softmax_hvp_")
def _(tangents: Tensor, logits: Tensor, weights: Tensor | None) -> None:
    return None
