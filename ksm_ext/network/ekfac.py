r"""EK-FAC: a Fisher matrix of Kronecker products, whose damped inverse costs a few small products.

The Fisher matrix of a mean loss, :math:`F = \frac1b \sum_i E[\nabla\ell_i \nabla\ell_i^\top]`, is
taken block by block, a block being the weight of a layer with its bias. On a sample the block's
gradient is :math:`G_i = \sum_t g_t a_t^\top` over positions t, with activations :math:`a_t` (and a
one for the bias) and gradients :math:`g_t` of what the layer gave. The eigenvectors U and V of

.. math:: \sum_{i,t} g_t g_t^\top \quad \text{and} \quad \sum_{i,t} a_t a_t^\top

are the basis, in which the diagonal of the Fisher matrix is exact and the rest is left out:

.. math:: F \approx (U \otimes V) \operatorname{diag}(\Lambda) (U \otimes V)^\top, \qquad
    \Lambda = \frac1b \sum_i (U^\top G_i V)^{\circ 2}.

Labels are drawn from the model, for which F is the Gauss-Newton matrix of the loss in expectation,
or are the data's own (the *empirical* Fisher matrix). A sample's loss is summed over its tokens, as
everywhere here: F grows with the length of the sequences, and damping is in its units.

Positions that nothing flows back from, as padding, count in neither covariance. A convolution's
activations are its patches. Other parts of gradients (:mod:`.factors`) keep their rows: tables by
what was looked up, whose covariance is diagonal in the words; vectors, as biases and norms alone,
by the whole matrix of their block, which is then exact; convolutions with groups, and what a
network makes of weights before it uses them, by their columns. So do sides beyond ``max_dim``.

References: *George et al. 2018, arXiv:1806.03884*; *Grosse et al. 2023, arXiv:2308.03296*.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ksm_ext.checks import (
    brief,
    check_choice,
    check_positive,
    check_positive_int,
    check_seed,
    listed,
    message,
)
from ksm_ext.identity import Checksum, changed
from ksm_ext.network.engines import Ladder
from ksm_ext.network.factors import OuterProducts, Part, Patches, Rows, Whole, added, blocks
from ksm_ext.network.gradients import BLOCK_BYTES
from ksm_ext.network.hessian import CurvatureOperator, checked_vectors, unflatten
from ksm_ext.network.solvers import (
    Operator,
    Solution,
    check_operator,
    check_system,
    without_autocast,
)

Parts = Mapping[str, Sequence[Part]]
_REMEDY = "Pass BlockConjugateGradients() as the solver, which takes every network."


@dataclass(frozen=True)
class EKFAC:
    """A solver by the eigenvalue-corrected Kronecker factors of the Fisher matrix.

    It takes three passes over the data for every draw of labels, and none for more right-hand
    sides. A weight (out, in) takes ``2 (out in + out² + in²)`` numbers. Networks are those of
    ``engine="hooks"`` (:mod:`.engines`).

    Attributes:
        fisher: ``"sampled"``, with labels drawn from the model, or ``"empirical"``.
        seed: Of the labels.
        draws: Of the labels of each sample.
        max_dim: A longer side of a weight is not rotated.
        layer_damping: Share of the mean eigenvalue of each block that is added to the damping;
            Grosse et al. have 0.1, and nothing else.

    Raises:
        ValueError: If a value is out of its range.
        TypeError: If an integer is not one.
    """

    fisher: str = "sampled"
    seed: int = 0
    draws: int = 1
    max_dim: int = 8192
    layer_damping: float = 0.0

    def __post_init__(self) -> None:
        remedy = "Labels drawn from the model give the Gauss-Newton matrix."
        check_choice("fisher", self.fisher, ("sampled", "empirical"), remedy)
        check_positive_int("draws", self.draws)
        check_positive_int("max_dim", self.max_dim)
        check_positive("layer_damping", self.layer_damping, "0.1 is usual.", zero=True)
        check_seed("seed", self.seed)

    @without_autocast()
    def fit(self, operator: Operator) -> "FactoredFisher":
        """The factors of the model, data, loss and parameters that an operator is of.

        Args:
            operator: A :class:`ksm_ext.GaussNewton` or :class:`ksm_ext.Hessian`.

        Raises:
            TypeError: If it is neither.
            ValueError: If labels cannot be drawn, for a loss of one's own.
            RuntimeError: If hooks cannot take the network.
        """
        if not isinstance(operator, CurvatureOperator):
            expected = "ksm_ext.GaussNewton or ksm_ext.Hessian"
            remedy = "EKFAC takes gradients of its model."
            raise TypeError(message("operator", expected, repr(operator), remedy))
        seeds = range(self.seed, self.seed + self.draws)
        labelled = (
            [operator.batches]
            if self.fisher == "empirical"
            else [operator.relabelled(seed) for seed in seeds]
        )
        ladder = Ladder("hooks", _REMEDY, argument="solver")
        bases: list[_Basis] = []
        total = 0

        def passes() -> Iterator[tuple[int, Parts]]:
            for batches in labelled:
                yield from operator.per_sample_parts(ladder, batches, by_factors=True)

        for _, parts in passes():
            bases = bases or [*_bases(parts, operator, self.max_dim)]
            for basis in bases:
                basis.add(parts)
        for side in (side for basis in bases for side in (basis.rows, basis.columns)):
            if side is not None:
                operator.require_finite(side)
        found = [basis.block() for basis in bases]
        for num_samples, parts in passes():
            total += num_samples
            for block in found:
                block.add_squares(parts)
        for block in found:
            block.eigenvalues.div_(total)
        shapes, checksums = operator.parameter_shapes, operator.checksums()
        return FactoredFisher(tuple(found), shapes, self.layer_damping, checksums)

    def solve(
        self, operator: Operator, rhs: Tensor, *, damping: float = 0.0, progress: bool = False
    ) -> Solution:
        """See :meth:`.LinearSolver.solve` and :meth:`FactoredFisher.solve`."""
        check_system(rhs, damping)
        return self.fit(operator).solve(operator, rhs, damping=damping, progress=progress)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a weight, and maybe its bias, is a matrix (rows, columns).

    Attributes:
        weight: Its name.
        bias: The name of its bias, or None.
        axis: Along which the bias comes behind the weight.
        shape: (rows, columns), of the weight alone.
    """

    weight: str
    bias: str | None
    axis: int
    shape: torch.Size

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(s, rows, columns), of stacks (s, ...) by name."""
        weight = tensors[self.weight]
        weight = weight.reshape(len(weight), *self.shape)
        if self.bias is None:
            return weight
        return torch.cat([weight, tensors[self.bias].unsqueeze(self.axis + 1)], self.axis + 1)

    def tensors(self, matrix: Tensor) -> dict[str, Tensor]:
        """The same back, flat: (s, ...) by name."""
        if self.bias is None:
            return {self.weight: matrix.flatten(1)}
        sizes = [self.shape[self.axis], 1]
        weight, bias = matrix.split(sizes, self.axis + 1)
        return {self.weight: weight.flatten(1), self.bias: bias.flatten(1)}

    def parts(self, parts: Parts, dtype: torch.dtype) -> list[OuterProducts | Rows | Whole]:
        """Those of the weight, as of matrices; the ones of a bias are among the activations."""
        return [self._of_matrix(part, dtype) for part in parts[self.weight]]

    def _of_matrix(self, part: Part, dtype: torch.dtype) -> OuterProducts | Rows | Whole:
        product = _product(part)
        if product is not None:
            x, g = product.activations.to(dtype), product.gradients.to(dtype)
            x = x if self.bias is None else F.pad(x, (0, 1), value=1.0)
            return replace(product, activations=x, gradients=g)
        if isinstance(part, Rows):
            return replace(part, gradients=part.gradients.to(dtype))
        whole = part.gradient().to(dtype)
        return Whole(whole.reshape(len(whole), *self.shape))


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """A block of the Fisher matrix by its eigenvectors and corrected eigenvalues.

    Attributes:
        layout: What it is of, as a matrix (rows, columns).
        rows: (rows, rows), U with eigenvectors as columns; None for the identity.
        columns: (columns, columns), V; None for the identity.
        eigenvalues: (rows, columns), Λ.
    """

    layout: Layout
    rows: Tensor | None
    columns: Tensor | None
    eigenvalues: Tensor

    __repr__ = brief

    def rotated(self, x: Tensor) -> Tensor:
        """UᵀxV, of matrices (s, rows, columns)."""
        return _times(_times(x, self.columns).mT, self.rows).mT

    def rotated_back(self, x: Tensor) -> Tensor:
        """UxVᵀ."""
        rows, columns = (None if u is None else u.T for u in (self.rows, self.columns))
        return _times(_times(x, columns).mT, rows).mT

    def add_squares(self, parts: Parts) -> None:
        """Add the squares of some samples' gradients to the eigenvalues."""
        own = self.layout.parts(parts, self.eigenvalues.dtype)
        if not own:
            return
        flat = self.eigenvalues.view(-1)
        for start, block in blocks([self._turned(part) for part in own], BLOCK_BYTES):
            squares = block.square().sum(0).flatten()
            flat[start : start + len(squares)] += squares

    def _turned(self, part: OuterProducts | Rows | Whole) -> Part:
        if isinstance(part, OuterProducts):
            rows, columns = part.sides
            return OuterProducts(
                _times(columns, self.columns), _times(rows, self.rows), self.eigenvalues.shape
            )
        if isinstance(part, Rows):
            return replace(part, gradients=_times(part.gradients, self.columns))
        return Whole(_times(part.values, self.columns))


@dataclass(frozen=True, eq=False)
class FactoredFisher:
    """The Fisher matrix of :class:`EKFAC`: an operator, and a solver that is fitted already.

    Attributes:
        blocks: One for each weight, or weight and bias.
        shapes: Of the parameters by name, in the order in which they are flattened to p numbers.
        layer_damping: See :class:`EKFAC`.
        checksums: Of the network that it was fitted to, which no other's systems are solved by.
    """

    blocks: tuple[KroneckerBlock, ...]
    shapes: dict[str, torch.Size]
    layer_damping: float = 0.0
    checksums: dict[str, Checksum] | None = field(default=None, repr=False)

    def __call__(self, v: Tensor) -> Tensor:
        """OuterProducts with rows: (s, p) -> (s, p), or (p,) -> (p,)."""
        return self._each(v, lambda x, eigenvalues: x * eigenvalues)

    def inverse(self, v: Tensor, damping: float) -> Tensor:
        """OuterProducts of rows with the damped inverse: (s, p) -> (s, p), or (p,) -> (p,).

        Args:
            v: (s, p), in the dtype of the parameters.
            damping: λ, which is added to the eigenvalues, beside the layer's own.

        Raises:
            ValueError: If a block is singular with its damping.
        """
        damping = check_positive("damping", damping, "Pass a small positive number.", zero=True)

        def divided(x: Tensor, eigenvalues: Tensor) -> Tensor:
            if not eigenvalues.numel():  # of a layer without inputs
                return x
            damped = eigenvalues + (damping + self.layer_damping * eigenvalues.mean())
            if not bool((damped > torch.finfo(damped.dtype).eps * eigenvalues.max()).all()):
                found, remedy = str(damping), "Pass a small positive number."
                raise ValueError(message("damping", "positive", found, remedy))
            return x / damped

        return self._each(v, divided)

    def solve(
        self, operator: Operator, rhs: Tensor, *, damping: float = 0.0, progress: bool = False
    ) -> Solution:
        """See :meth:`.LinearSolver.solve`; one product with the operator is for the residuals.

        These are of the operator itself: how far the factored matrix is from it, on these sides.

        Raises:
            ValueError: If the operator is one of another network, or of other parameters.
        """
        check_system(rhs, damping)
        check_operator(operator)
        self._check_network(operator)
        x = self.inverse(rhs, damping)
        length = rhs.norm(dim=1).clamp(min=torch.finfo(rhs.dtype).tiny)
        residuals = (rhs - operator(x) - damping * x).norm(dim=1) / length
        return Solution(x, residuals, 1, residuals <= 1e-6)

    @without_autocast()
    def _each(self, v: Tensor, function: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """A function of rotated matrices (s, rows, columns) and the eigenvalues, turned back."""
        p = sum(shape.numel() for shape in self.shapes.values())
        like = self.blocks[0].eigenvalues
        rows = checked_vectors("v", v, p, like.dtype, like.device)
        stacks, found = unflatten(rows, self.shapes), {}
        for block in self.blocks:
            x = function(block.rotated(block.layout.matrix(stacks)), block.eigenvalues)
            found.update(block.layout.tensors(block.rotated_back(x)))
        return torch.cat([found[name] for name in self.shapes], dim=1).reshape(v.shape)

    def _check_network(self, operator: Operator) -> None:
        if not isinstance(operator, CurvatureOperator) or self.checksums is None:
            return
        names = changed(self.checksums, operator.checksums())
        shapes, others = self.shapes, operator.parameter_shapes
        if names or shapes != others:
            expected = "of the network and the parameters that EKFAC was fitted to"
            names = names or [*dict.fromkeys([*shapes, *others])]
            found, remedy = f"one with another `{listed(names, 3)}`", "Fit EKFAC() to that one."
            raise ValueError(message("operator", expected, found, remedy))


class _Basis:
    """Covariances of what the rows and the columns of a block's gradient come from."""

    def __init__(self, layout: Layout, max_dim: int, like: Tensor) -> None:
        self.layout, self._like = layout, like
        rows, columns = layout.shape
        self.shape = (rows + 1, columns) if layout.axis == 0 else (rows, columns + 1)
        self.shape = self.shape if layout.bias is not None else (rows, columns)
        self.rows, self.columns = (
            like.new_zeros(size, size) if size <= max_dim else None for size in self.shape
        )

    def add(self, parts: Parts) -> None:
        for part in self.layout.parts(parts, self._like.dtype):
            if isinstance(part, OuterProducts):
                flows = part.gradients.any(-1)
                rows, columns = (side[flows] for side in part.sides)
                _add_gram(self.rows, rows)
            else:
                self.rows = None
                columns = part.gradients if isinstance(part, Rows) else part.values
            _add_gram(self.columns, columns)

    def block(self) -> KroneckerBlock:
        """The covariances are given up for their eigenvectors."""
        rows, columns = _eigenvectors(self.rows), _eigenvectors(self.columns)
        self.rows = self.columns = None
        return KroneckerBlock(self.layout, rows, columns, self._like.new_zeros(self.shape))


def _bases(parts: Parts, operator: CurvatureOperator, max_dim: int) -> Iterator[_Basis]:
    """One for each weight with its bias, as some samples show them."""
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    biases = {name: _bias(name, parts) for name in parts}
    for name, shape in operator.parameter_shapes.items():
        if name in biases.values():
            continue
        own = parts[name]
        kernel = any(isinstance(part, Patches) for part in own)
        num_columns = shape[1:].numel() if kernel else shape[-1] if shape else 1
        axis = 0 if any(isinstance(part, OuterProducts) and part.transposed for part in own) else 1
        num_rows = shape[:1].numel() if kernel else shape[:-1].numel()
        matrix = torch.Size((num_rows, num_columns))
        yield _Basis(Layout(name, biases[name], axis, matrix), max_dim, like)


def _bias(weight: str, parts: Parts) -> str | None:
    """The name of what has the gradient that the bias of a layer must have; None without."""
    name = weight.removesuffix("weight") + "bias"
    products = [_product(part) for part in parts[weight]]
    if not weight.endswith("weight") or not parts.get(name) or not all(products):
        return None
    if len({p.transposed for p in products if p is not None}) != 1:
        return None
    summed = added(p.gradients.sum(1) for p in products if p is not None)
    own = added(part.gradient() for part in parts[name])
    same = own.shape == summed.shape and torch.allclose(own.to(summed), summed, rtol=1e-3)
    return name if same else None


def _product(part: Part) -> OuterProducts | None:
    """A part that is a sum over positions of products, as factors of a matrix; or else None."""
    if isinstance(part, OuterProducts):
        return part if len(part.shape) == 2 else None
    if not isinstance(part, Patches) or part.how["groups"] > 1:
        return None
    x, g = part.inputs.flatten(0, 1), part.gradients
    kernel, how = part.shape[2:], part.how
    one = len(kernel) == 1

    def pair(value: Any, of_new: int) -> tuple[int, int]:
        """Of both axes of an image, of which a signal has but the second."""
        given = (*value,) if isinstance(value, (tuple, list)) else (value,) * len(kernel)
        return (of_new, *given) if one else given

    x = F.unfold(
        x.unsqueeze(2) if one else x,
        pair((*kernel,), 1),
        dilation=pair(how["dilation"], 1),
        padding=pair(how["padding"], 0),
        stride=pair(how["stride"], 1),
    )  # (b r, in ..., T)
    b, r = part.inputs.shape[:2]
    activations = x.unflatten(0, (b, r)).mT.flatten(1, 2)
    gradients = g.flatten(3).mT.flatten(1, 2)
    return OuterProducts(
        activations, gradients, torch.Size((part.shape[0], part.shape[1:].numel()))
    )


def _add_gram(gram: Tensor | None, rows: Tensor) -> None:
    if gram is not None:
        rows = rows.flatten(0, -2)
        gram.addmm_(rows.T, rows)


def _eigenvectors(gram: Tensor | None) -> Tensor | None:
    return None if gram is None else torch.linalg.eigh(gram.double())[1].to(gram.dtype)


def _times(x: Tensor, matrix: Tensor | None) -> Tensor:
    return x if matrix is None else x @ matrix
