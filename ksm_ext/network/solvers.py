r"""Linear systems of a symmetric operator that is only known by its products.

:class:`BlockConjugateGradients` solves :math:`(A + \lambda I) X = B` for all right-hand sides in
one Krylov space: after j products with s vectors each, every solution is the best of a space of up
to j s dimensions, not of j. The residuals are kept as a product of orthonormal directions and a
small factor, which stays stable when right-hand sides are dependent or have converged (BCGrQ).
:class:`LiSSA` sums the Neumann series instead. A solver holds its own numbers and nothing else, so
that one can be used for many systems; a function of right-hand sides is a solver too.

Shapes: right-hand sides and solutions (s, p), one per row; operators map (s, p) to (s, p).

References: *Dubrulle 2001, Retooling the method of block conjugate gradients*; *Agarwal, Bullins &
Hazan 2017, arXiv:1602.03943* (LiSSA).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.checks import (
    brief,
    check_finite,
    check_function,
    check_ndim,
    check_positive,
    check_positive_int,
    check_tensor,
    message,
)

Operator = Callable[[Tensor], Tensor]
"""Symmetric: products (s, p) of the rows of a matrix (s, p)."""

_LARGEST = "Pass the largest eigenvalue of the damped operator."


@contextmanager
def without_autocast() -> Iterator[None]:
    """Linear algebra in the dtypes of its tensors; autocast is for the networks that made them."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@without_autocast()
def inner_products(rows: Tensor, others: Tensor) -> Tensor:
    """Of rows (s, p) with others (r, p): (s, r)."""
    return rows @ others.T


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found.

    Attributes:
        x: (s, p). One solution per row.
        residuals: (s,). Norm of ``rhs - (A + damping) x`` in units of the norm of ``rhs``.
        num_steps: Products with the operator, of s vectors each.
        converged: (s,) bool. Whether the residual is within the tolerance.
    """

    x: Tensor
    residuals: Tensor
    num_steps: int
    converged: Tensor

    __repr__ = brief


@runtime_checkable
class LinearSolver(Protocol):
    """What is asked of a solver."""

    def solve(
        self, operator: Operator, rhs: Tensor, *, damping: float = 0.0, progress: bool = False
    ) -> Solution:
        """Solve ``(A + damping I) x = rhs`` for every row of ``rhs`` (s, p), float32 or float64.

        Raises:
            ValueError: If ``rhs`` is not finite, or the damping is negative.
            RuntimeError: If the operator is not one that the solver can solve with.
        """


Solver = LinearSolver | Callable[[Tensor], Tensor]
"""An object that solves, or a function from right-hand sides (s, p) to solutions (s, p)."""


@dataclass(frozen=True)
class BlockConjugateGradients:
    """Block conjugate gradients, for operators that are positive definite with their damping.

    Memory for about six matrices like the right-hand sides is needed. Rows of those may be zero or
    depend on each other, and there may be more of them than coordinates.

    Attributes:
        tolerance: Largest norm of a row's residual, as a share of the norm of its right-hand side.
        max_steps: Products with the operator after which the solutions are given as they are; look
            at ``converged``.
    """

    tolerance: float = 1e-6
    max_steps: int = 100

    def __post_init__(self) -> None:
        check_positive_int("max_steps", self.max_steps)
        check_positive("tolerance", self.tolerance, "1e-4 is enough for most uses.", zero=True)

    @without_autocast()
    def solve(
        self, operator: Operator, rhs: Tensor, *, damping: float = 0.0, progress: bool = False
    ) -> Solution:
        """See :meth:`LinearSolver.solve`; the residuals are those of the recurrence."""
        check_system(rhs, damping)
        check_operator(operator)
        scale = rhs.norm(dim=1)  # (s,)
        x = torch.zeros_like(rhs)
        if not rhs.any():
            return Solution(x, torch.zeros_like(scale), 0, torch.ones_like(scale, dtype=torch.bool))
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        # residuals (p, s) = basis @ factor
        basis, factor = torch.linalg.qr((rhs * inverse[:, None]).T)
        directions = basis
        num_steps = 0
        residuals = factor.norm(dim=0)
        with tqdm(total=self.max_steps, unit=" steps", disable=not progress) as bar:
            while num_steps < self.max_steps and bool((residuals > self.tolerance).any()):
                products = operator(directions.T.contiguous()).T + damping * directions
                steps = _inverse(directions.T @ products)
                x += (directions @ (steps @ factor)).T
                basis, change = torch.linalg.qr(basis - products @ steps)
                directions = basis + directions @ change.T
                factor = change @ factor
                residuals = factor.norm(dim=0)
                num_steps += 1
                bar.update()
        return Solution(x * scale[:, None], residuals, num_steps, residuals <= self.tolerance)


@dataclass(frozen=True)
class LiSSA:
    r"""The Neumann series of LiSSA.

    .. math:: h \leftarrow v + (I - (A + \lambda I) / \sigma) h, \qquad x = h / \sigma,

    which converges like :math:`(1 - \lambda_\min / \sigma)^j` for σ above half of the largest
    eigenvalue: slowly, where eigenvalues are far apart. :class:`BlockConjugateGradients` needs no
    scale and fewer products; this is for comparison.

    Attributes:
        scale: σ; the largest eigenvalue of the damped operator is a good choice.
        num_steps: Products with the operator.
    """

    scale: float
    num_steps: int = 100

    def __post_init__(self) -> None:
        check_positive_int("num_steps", self.num_steps)
        check_positive("scale", self.scale, _LARGEST)

    @without_autocast()
    def solve(
        self, operator: Operator, rhs: Tensor, *, damping: float = 0.0, progress: bool = False
    ) -> Solution:
        """See :meth:`LinearSolver.solve`; ``RuntimeError`` where the series diverges."""
        check_system(rhs, damping)
        check_operator(operator)
        length = rhs.norm(dim=1).clamp(min=torch.finfo(rhs.dtype).tiny)
        h, residual = rhs.clone(), rhs
        for _ in tqdm(range(self.num_steps), unit=" steps", disable=not progress):
            residual = rhs - (operator(h) + damping * h) / self.scale
            h = h + residual
            if not bool((residual.norm(dim=1) <= 1e3 * length).all()):
                found = f"{self.scale:.3g}, with which the series diverges"
                raise RuntimeError(message("scale", "large enough", found, _LARGEST))
        residuals = residual.norm(dim=1) / length  # of the step before: one product less
        return Solution(h / self.scale, residuals, self.num_steps, residuals <= 1e-6)


@dataclass(frozen=True)
class _Function:
    """A function from right-hand sides (s, p) to solutions: it knows its operator and damping."""

    function: Callable[[Tensor], Tensor]

    def solve(
        self, operator: Operator, rhs: Tensor, *, damping: float = 0.0, progress: bool = False
    ) -> Solution:
        done = torch.ones(len(rhs), dtype=torch.bool, device=rhs.device)
        return Solution(self.function(rhs), torch.zeros_like(rhs[:, 0]), 0, done)


def as_solver(solver: Solver) -> LinearSolver:
    """The object that solves; a function's residuals are counted as zero.

    Raises:
        TypeError: If ``solver`` is neither an object with ``solve`` nor a function.
    """
    if not isinstance(solver, type):
        if isinstance(solver, LinearSolver):
            return solver
        if callable(solver):
            return _Function(solver)
    names = "BlockConjugateGradients(), EKFAC() or LiSSA(scale) of ksm_ext"
    remedy = f"Pass {names}; to project gradients, call ksm_ext.attribution.projected_influence."
    raise TypeError(message("solver", "a solver or a function", repr(solver), remedy))


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of directions^T A directions (s, s), which is positive definite if A is."""
    factor, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    if int(failed):
        lowest = float(torch.linalg.eigvalsh((gram + gram.T) / 2)[0])
        found = f"one of curvature {lowest:.3g} or less along some direction"
        remedy = "Raise `damping`, or take the Gauss-Newton matrix in place of the Hessian."
        raise RuntimeError(message("operator", "positive definite with its damping", found, remedy))
    return torch.cholesky_inverse(factor)


def check_operator(operator: object) -> None:
    """Raise ``TypeError`` unless it multiplies vectors."""
    remedy = "Pass such as ksm_ext.Hessian, or a function."
    check_function("operator", operator, ("v",), remedy, "(s, p)")


def check_system(rhs: Tensor, damping: float) -> None:
    """Raise unless these are right-hand sides (s, p) of a damped system."""
    check_tensor("rhs", rhs)
    check_ndim("rhs", rhs, 2, "(s, p): one right-hand side per row")
    if rhs.dtype not in (torch.float32, torch.float64):
        remedy = "Convert it to the operator's dtype."
        raise TypeError(message("rhs", "float32 or float64", str(rhs.dtype), remedy))
    check_finite("rhs", rhs, "Find out where it became so.")
    check_positive("damping", damping, "Pass a small positive number.", zero=True)
