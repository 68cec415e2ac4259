r"""Projections of weight gradients from both sides, which never form them.

For a matrix (out, in) of weights whose gradient on a sample is :math:`G = \sum_t g_t a_t^\top`,
over positions t,

.. math:: \varphi = \operatorname{vec}(P_{out} G P_{in}^\top)
    = \operatorname{vec} \sum_t (P_{out} g_t)(P_{in} a_t)^\top,
    \qquad E\langle \varphi, \varphi' \rangle = \langle G, G' \rangle

with :math:`P_{out}` (s, out) and :math:`P_{in}` (s, in), s = √k, of a kind of
:mod:`ksm_ext.ops.project`. This is LoGra's projection with random matrices (Choe et al. 2024,
arXiv:2405.13954); but where LoGra lays the layers side by side, each adds to the same k numbers
with matrices of its own, so that no layer has fewer than others.

Rows of a table that were looked up are such factors too, :math:`g_t` being a one. That goes by the
shape of a parameter alone, so that all uses of tied weights meet one matrix. Formed, and projected
as :class:`~ksm_ext.ops.project.Projector` does, are the gradients of biases, norms and kernels of
convolutions, and of matrices that have a side of at most √k, such as adapters of low rank.

At equal k inner products have larger errors than by a projection of all coordinates, at worst, for
gradients of rank one, about those of √k numbers; but k costs little here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isqrt

import torch
from torch import Tensor

from ksm_ext.checks import message
from ksm_ext.network.factors import OuterProducts, Part, Rows, added, total
from ksm_ext.ops.project import Projector

# The seeds of both sides are the projector's but for these bits: matrices that share nothing.
_OUT, _IN = 0x2545F4914F6CDD1D, 0x5851F42D4C957F2D


@dataclass(frozen=True)
class FactoredProjector:
    """The projection of gradients by the factors that they come in; see the module's head.

    It goes where a :class:`~ksm_ext.ops.project.Projector` goes, with ``engine="hooks"``, which has
    these factors; ``"auto"`` is that here.

    Attributes:
        dim: k, a square number.
        kind: ``"sbp"``, ``"rademacher"``, ``"gaussian"`` or ``"sjlt"``.
        seed: Any integer of 64 bits.
        sparsity: Nonzeros per coordinate of the sparse kinds; a divisor of √k.
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
    _whole: Projector = field(init=False, repr=False, compare=False)
    _out: Projector = field(init=False, repr=False, compare=False)
    _in: Projector = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        whole = Projector(self.dim, self.kind, self.seed, self.sparsity, self.hadamard)
        side = isqrt(whole.dim)
        if side**2 != whole.dim:
            remedy = f"Choose {side**2:,} or {(side + 1) ** 2:,}."
            raise ValueError(message("dim", "a square number", f"{whole.dim:,}", remedy))
        if side % whole.sparsity:
            expected, remedy = f"a divisor of √dim = {side}", "Choose √dim as a multiple of it."
            raise ValueError(message("sparsity", expected, str(whole.sparsity), remedy))
        of_side = replace(whole, dim=side)
        parts = {
            "dim": whole.dim,
            "seed": whole.seed,
            "sparsity": whole.sparsity,
            "_whole": whole,
            "_out": replace(of_side, seed=whole.seed ^ _OUT),
            "_in": replace(of_side, seed=whole.seed ^ _IN),
        }
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    def __call__(self, parts: Sequence[Part], shape: Sequence[int], *, offset: int = 0) -> Tensor:
        """Project the sum of parts of each sample's gradient of one parameter.

        Args:
            parts: One or more, of b samples each.
            shape: That of the parameter.
            offset: Coordinates of the parameters before it.

        Returns:
            (b, dim) float32, or float64 for float64 parts.
        """
        if len(shape) != 2 or min(shape) <= self._in.dim:
            return self._whole(total(parts), offset=offset)
        return added(self._from_both_sides(part, shape[0], offset) for part in parts).flatten(1)

    def _from_both_sides(self, part: Part, num_rows: int, offset: int) -> Tensor:
        """(b, s, s)."""
        if isinstance(part, OuterProducts):
            rows, columns = part.sides
            return _along(rows, self._out, offset).mT @ _along(columns, self._in, offset)
        if isinstance(part, Rows):
            columns = _along(part.gradients, self._in, offset)
            one = torch.eye(self._out.dim, dtype=columns.dtype, device=columns.device)
            table = self._out.adjoint(one, num_rows, offset=offset).T  # (num_rows, s)
            return table[part.index].mT @ columns
        return _along(_along(part.gradient(), self._in, offset).mT, self._out, offset).mT


def _along(x: Tensor, projector: Projector, offset: int) -> Tensor:
    """The last dimension projected: (b, T, d) to (b, T, s)."""
    return projector(x.reshape(-1, x.shape[-1]), offset=offset).unflatten(0, x.shape[:-1])
