r"""Many regressions on subsets of the tasks of one set of samples, all at once.

The samples of task a are the rows ``task_offsets[a] .. task_offsets[a + 1]`` of the features;
subset S has the samples of its tasks, :math:`|S|` of them. With one weight vector and one penalty
for each subset,

.. math:: F_S(w) = \frac{1}{|S|} \sum_{i \in S} \log(1 + e^{-(h_i + \phi_i \cdot w)})
          + \frac{\rho_S}{2} \lVert w \rVert^2, \qquad
          H_S v = \frac{1}{|S|} \Phi^\top (D_S \odot \Phi v) + \rho_S v,

where :math:`h_i` is the margin of sample i at w = 0, already multiplied by its label, and
:math:`D_{Si}` the curvature of its loss, zero outside of S. An empty subset has only its penalty.

Newton-CG for every subset: :func:`glm_gradient` once for each step, with its curvatures stored, and
:func:`glm_hvp` for each conjugate gradient. bfloat16 curvatures halve what is stored and read: the
minimiser does not move, because the gradient is exact, and the Hessian stays positive definite.
Subsets that have converged leave by passing fewer rows.

Shapes: features Φ (b, k) float32 or float64, task_offsets (n + 1,) int64, masks (m, n) bool,
curvature D (m, b), margins h (b,), ridge ρ (m,), v and w (m, k).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ksm_ext.checks import message
from ksm_ext.ops._library import (
    check_beside,
    check_boolean_masks,
    check_device,
    check_matrix,
    check_ndim,
    check_task_offsets,
    contiguous,
    in_graph,
    one_by_one,
    refuse_gradients,
    refuse_tangents,
    without_derivatives,
)


class GlmGradient(NamedTuple):
    """What :func:`glm_gradient` returns."""

    gradient: Tensor
    objective: Tensor
    curvature: Tensor | None


def glm_hvp(
    features: Tensor,
    task_offsets: Tensor,
    masks: Tensor,
    v: Tensor,
    *,
    curvature: Tensor | None = None,
    ridge: Tensor | float = 0.0,
) -> Tensor:
    """Hessian-vector products of all subsets: ``features^T (D * (features v)) / |S| + ridge v``.

    A task's samples are multiplied only with the subsets that contain it, in blocks: memory beyond
    the result does not depend on the number of samples. Sums run in the dtype of the features.
    Differentiable in ``v``, any number of times and in both modes: the product is its own adjoint.

    Args:
        features: (b, k) float32 or float64. Row i is sample i, sorted by task.
        task_offsets: (n + 1,) int64. First sample of each task, then b. Read by the host.
        masks: (m, n) bool. Row i selects the tasks of subset i. Read by the host.
        v: (m, k), in the dtype of the features. One vector for each subset.
        curvature: (m, b), in the dtype of the features or bfloat16; entries outside of a subset
            are not read. None means 1 for every sample of the subset: the squared loss.
        ridge: (m,), or one number for all subsets.

    Returns:
        (m, k) in the dtype of the features, contiguous.

    Raises:
        ValueError: If shapes or devices disagree, or anything but ``v`` carries a gradient.
        TypeError: If a dtype is another.
        RuntimeError: If the values of ``task_offsets`` are not 0 .. b, ascending.
    """
    ridge = _checked(features, task_offsets, masks, "v", v, ridge)
    if curvature is not None:
        check_ndim("curvature", curvature, 2)
        _check_curvature_dtype("curvature", curvature.dtype, features)
        shape = (masks.shape[0], features.shape[0])
        if tuple(curvature.shape) != shape:
            found = f"shape {tuple(curvature.shape)}"
            remedy = "Pass one row per subset and one column per sample."
            raise ValueError(message("curvature", f"of shape {shape}", found, remedy))
        check_device("curvature", curvature, features.device)
    return _glm_hvp(
        features.contiguous(),
        task_offsets.cpu().contiguous(),
        masks.cpu().contiguous(),
        contiguous(curvature),
        v.contiguous(),
        ridge,
    )


def glm_gradient(
    features: Tensor,
    margins: Tensor,
    task_offsets: Tensor,
    masks: Tensor,
    w: Tensor,
    *,
    ridge: Tensor | float = 0.0,
    curvature_dtype: torch.dtype | None = None,
) -> GlmGradient:
    """Logistic objectives of all subsets with their gradients and curvatures, in one pass.

    Not differentiable: it is a derivative already, and :func:`glm_hvp` is the next.

    Args:
        features: (b, k) float32 or float64. Row i is sample i, sorted by task.
        margins: (b,), in the dtype of the features. Margin of each sample at ``w = 0``.
        task_offsets: (n + 1,) int64. First sample of each task, then b. Read by the host.
        masks: (m, n) bool. Row i selects the tasks of subset i. Read by the host.
        w: (m, k), in the dtype of the features. The weights of each subset.
        ridge: (m,), or one number for all subsets.
        curvature_dtype: The features' dtype or bfloat16 stores the curvatures for :func:`glm_hvp`;
            None does not.

    Returns:
        ``gradient`` (m, k) and ``curvature`` (m, b) or None, zero outside of a subset; and
        ``objective`` (m,) float64.

    Raises:
        ValueError: If shapes or devices disagree, or an argument carries a gradient.
        TypeError: If a dtype is another.
        RuntimeError: If the values of ``task_offsets`` are not 0 .. b, ascending.
    """
    ridge = _checked(features, task_offsets, masks, "w", w, ridge)
    check_ndim("margins", margins, 1)
    check_beside("margins", margins, (features.shape[0],), features)
    if curvature_dtype is not None:
        _check_curvature_dtype("curvature_dtype", curvature_dtype, features)
    gradient, objective, curvature = _glm_gradient(
        features.contiguous(),
        margins.contiguous(),
        task_offsets.cpu().contiguous(),
        masks.cpu().contiguous(),
        w.contiguous(),
        ridge,
        curvature_dtype,
    )
    return GlmGradient(gradient, objective, None if curvature_dtype is None else curvature)


def _check_curvature_dtype(name: str, dtype: torch.dtype, features: Tensor) -> None:
    if dtype not in (features.dtype, torch.bfloat16):
        expected = f"{features.dtype} like the features, or torch.bfloat16"
        raise TypeError(message(name, expected, str(dtype), "Choose one of them."))


def _checked(
    features: Tensor,
    task_offsets: Tensor,
    masks: Tensor,
    name: str,
    vectors: Tensor,
    ridge: Tensor | float,
) -> Tensor:
    """Check what both operators take; the ridge of each subset."""
    check_matrix("features", features)
    check_task_offsets(task_offsets)
    check_boolean_masks(masks)
    m, n = masks.shape
    if n != len(task_offsets) - 1:
        expected = f"of {len(task_offsets) - 1} columns like task_offsets has tasks"
        remedy = "Pass one column per task."
        raise ValueError(message("masks", expected, f"shape ({m}, {n})", remedy))
    check_ndim(name, vectors, 2)
    check_beside(name, vectors, (m, features.shape[1]), features)
    if not isinstance(ridge, Tensor):
        return torch.full((m,), ridge, dtype=features.dtype, device=features.device)
    check_beside("ridge", ridge, (m,), features)
    return ridge.contiguous()


class _GlmHvp(torch.autograd.Function):
    """Carries the rules of :func:`glm_hvp`: linear in v and its own adjoint, nothing else moves."""

    @staticmethod
    def forward(*args: Any) -> Tensor:
        return torch.ops.ksm_ext.glm_hvp.default(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        features, task_offsets, masks, curvature, _, ridge = inputs
        constants = features, task_offsets, masks, curvature, ridge
        ctx.set_materialize_grads(False)  # an absent tangent is None, not zeros
        ctx.save_for_backward(*constants)
        ctx.save_for_forward(*constants)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        if grad is None:
            return (None,) * 6
        features, task_offsets, masks, curvature, ridge = ctx.saved_tensors
        grad_v = _glm_hvp(features, task_offsets, masks, curvature, grad.contiguous(), ridge)
        return None, None, None, None, grad_v, None

    @staticmethod
    def jvp(
        ctx: Any, features: Any, offsets: None, masks: None, curvature: Any, v: Any, ridge: Any
    ) -> Tensor:
        refuse_tangents(features=features, curvature=curvature, ridge=ridge)
        saved, task_offsets, subsets, saved_curvature, saved_ridge = ctx.saved_tensors
        return _glm_hvp(saved, task_offsets, subsets, saved_curvature, v.contiguous(), saved_ridge)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> tuple[Tensor, int]:
        return one_by_one(_glm_hvp, info, in_dims, args), 0


@in_graph
def _glm_hvp(
    features: Tensor,
    task_offsets: Tensor,
    masks: Tensor,
    curvature: Tensor | None,
    v: Tensor,
    ridge: Tensor,
) -> Tensor:
    refuse_gradients(features=features, curvature=curvature, ridge=ridge)
    return _GlmHvp.apply(features, task_offsets, masks, curvature, v, ridge)


@in_graph
def _glm_gradient(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return without_derivatives(torch.ops.ksm_ext.glm_gradient.default, *args)


@torch.library.register_fake("ksm_ext::glm_hvp")
def _(x: Any, offsets: Any, masks: Any, curvature: Any, v: Tensor, ridge: Any) -> Tensor:
    return v.new_empty(v.shape)


@torch.library.register_fake("ksm_ext::glm_gradient")
def _(
    features: Tensor,
    margins: Tensor,
    task_offsets: Tensor,
    masks: Tensor,
    w: Tensor,
    ridge: Tensor,
    curvature_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    m, b = masks.shape[0], features.shape[0]
    shape = (0, 0) if curvature_dtype is None else (m, b)
    return (
        w.new_empty(w.shape),
        w.new_empty(m, dtype=torch.float64),
        w.new_empty(shape, dtype=curvature_dtype or w.dtype),
    )
