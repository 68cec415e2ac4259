r"""Hessian products of weights that stand in one linear layer, formed from what goes in and out.

A layer :math:`y_t = W x_t` that is used once gives :math:`\nabla_W L = \sum_t g_t x_t^\top`, with
the gradient g by y. Along a change of all weights, marked by a dot, that is

.. math:: \sum_t \dot g_t x_t^\top + g_t \dot x_t^\top,

one product of matrices with twice the rows. Automatic differentiation forms the two terms and a
zero, all as large as the weights, and adds them up.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.overrides import TorchFunctionMode

Weights = dict[str, Tensor]
Pair = tuple[Tensor, Tensor]
"""Rows (s, r, a) and (s, r, c), whose products, summed over r, are (s, a, c)."""

_PLACES = {F.linear: (0, 1), torch.addmm: (1, 2)}
"""Of the input and the weight, in layers as PyTorch and as HuggingFace's Conv1D write them."""


class Layer(NamedTuple):
    """A linear layer that alone uses a weight.

    Attributes:
        shape: What it gives, (..., out).
        input_first: Whether the weight is (in, out), not (out, in).
    """

    shape: torch.Size
    input_first: bool


def lone_layers(total: Callable[[Weights], Tensor], weights: Weights) -> dict[str, Layer]:
    """Weights that one layer uses and nothing else does, and those layers.

    Only where what goes into the layer and out of it is no more numbers than the weight.

    Args:
        total: From weights to a number.
        weights: By name.
    """
    used: dict[str, list[Layer]] = {}

    def constant(name: str, func: Any, args: list[Any], kwargs: Any) -> Tensor:
        place = _PLACES[func][1]
        result = func(*args[:place], args[place].detach(), *args[place + 1 :], **kwargs)
        used.setdefault(name, []).append(Layer(result.shape, func is torch.addmm))
        return result

    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    with torch.enable_grad(), _AtLayers(leaves, constant):
        value = total(leaves)
    found = {
        name: layers[0]
        for name, layers in used.items()
        if len(layers) == 1
        and _num_rows(layers[0]) * sum(leaves[name].shape) <= leaves[name].numel()
    }
    if not found or not value.requires_grad:
        return found
    # The layers took their weights as constants: one that has a gradient is used elsewhere, too.
    others = torch.autograd.grad(value, [leaves[name] for name in found], allow_unused=True)
    return {
        name: layer for (name, layer), at in zip(found.items(), others, strict=True) if at is None
    }


def hessian_products(
    total: Callable[[Weights], Tensor],
    weights: Weights,
    vectors: Weights,
    lone: Mapping[str, Layer],
) -> dict[str, Tensor | Pair]:
    """Products of the Hessian of ``total`` with vectors.

    Args:
        total: From weights to a number.
        weights: By name.
        vectors: Stacks ``(s, *shape)`` by name.
        lone: What :func:`lone_layers` found.

    Returns:
        Stacks ``(s, *shape)`` by name, or pairs of rows for the weights in ``lone``.
    """
    some = next(iter(weights.values()))
    zeros = {name: some.new_zeros(layer.shape) for name, layer in lone.items()}

    def gradients(weights: Weights) -> tuple[Weights, Weights, Weights]:
        """By other weights, and by what lone layers give; and what goes into these."""
        fixed = {name: weights[name] for name in lone}

        def shifted(others: Weights, shifts: Weights) -> tuple[Tensor, Weights]:
            inputs: Weights = {}

            def shift(name: str, func: Any, args: list[Any], kwargs: Any) -> Tensor:
                inputs[name] = args[_PLACES[func][0]]
                result = func(*args, **kwargs)
                return result + shifts[name].to(result.dtype)  # which autocast may have chosen

            with _AtLayers(fixed, shift):
                return total({**others, **fixed}), inputs

        others = {name: w for name, w in weights.items() if name not in lone}
        (of_others, of_shifts), inputs = grad(shifted, (0, 1), has_aux=True)(others, zeros)
        return of_others, of_shifts, inputs

    def along(vector: Weights) -> Any:
        return jvp(gradients, (weights,), (vector,))

    out_dims: Any = (None, 0)  # what does not depend on the vector, and what does
    (_, slopes, inputs), (products, bent, moved) = vmap(along, out_dims=out_dims)(vectors)

    def pair(name: str) -> Pair:
        outside = _rows([bent[name], slopes[name][None]]).to(some.dtype)
        inside = _rows([inputs[name][None], moved[name]]).to(some.dtype)
        return (inside, outside) if lone[name].input_first else (outside, inside)

    return {name: pair(name) if name in lone else products[name] for name in weights}


class _AtLayers(TorchFunctionMode):
    """Has linear layers of the given weights computed by ``instead(name, func, args, kwargs)``."""

    def __init__(
        self, weights: Weights, instead: Callable[[str, Any, list[Any], Any], Tensor]
    ) -> None:
        super().__init__()
        self._names = {id(weight): name for name, weight in weights.items()}
        self._instead = instead

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _, place = _PLACES.get(func, (0, len(args)))
        name = self._names.get(id(args[place])) if place < len(args) else None
        if name is None or kwargs.keys() - {"bias"}:
            return func(*args, **kwargs)
        return self._instead(name, func, args, kwargs)


def _num_rows(layer: Layer) -> int:
    return layer.shape[:-1].numel()


def _rows(parts: list[Tensor]) -> Tensor:
    """Parts (s or 1, ..., c), one after the other: (s, r, c)."""
    s = max(len(part) for part in parts)
    rows = [part.reshape(len(part), -1, part.shape[-1]).expand(s, -1, -1) for part in parts]
    return torch.cat(rows, 1)
