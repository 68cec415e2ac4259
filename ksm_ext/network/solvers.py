r"""Linear systems of a symmetric operator that is only known by its products.

:func:`conjugate_gradient` solves :math:`(A + \lambda I) X = B` for all right-hand sides in one
Krylov space: after j products with s vectors each, every solution is the best of a space of up to
j s dimensions, not of j. The residuals are kept as a product of orthonormal directions and a small
factor, which stays stable when right-hand sides are dependent or have converged (BCGrQ).
:func:`lissa` sums the Neumann series instead.

Shapes: right-hand sides and solutions (s, p), one per row; operators map (s, p) to (s, p).

References: *Dubrulle 2001, Retooling the method of block conjugate gradients*; *Agarwal, Bullins &
Hazan 2017, arXiv:1602.03943* (LiSSA).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.checks import check_finite, check_ndim, check_positive_int, message

Operator = Callable[[Tensor], Tensor]
"""Symmetric: products (s, p) of the rows of a matrix (s, p)."""


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


def conjugate_gradient(
    operator: Operator,
    rhs: Tensor,
    *,
    damping: float = 0.0,
    tolerance: float = 1e-6,
    max_steps: int = 100,
    progress: bool = False,
) -> Solution:
    """Solve ``(A + damping I) x = rhs`` for every row of ``rhs`` by block conjugate gradients.

    Args:
        operator: A, symmetric; with the damping, positive definite.
        rhs: (s, p) float32 or float64. Rows may be zero or depend on each other, and s may exceed
            p. Memory for about six more such matrices is needed.
        damping: Added to the diagonal.
        tolerance: Of the residual of each row, relative to its right-hand side.
        max_steps: After which the solutions are given as they are.
        progress: Whether to show a progress bar.

    Returns:
        The solutions, with the residuals as the recurrence has them; look at ``converged``.

    Raises:
        ValueError: If ``rhs`` is not finite, or a number is out of its range.
        RuntimeError: If the damped operator is not positive definite.
    """
    _check(rhs, damping, max_steps)
    scale = rhs.norm(dim=1)  # (s,)
    x = torch.zeros_like(rhs)
    if not rhs.any():
        return Solution(x, torch.zeros_like(scale), 0, torch.ones_like(scale, dtype=torch.bool))
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    basis, factor = torch.linalg.qr((rhs * inverse[:, None]).T)  # residuals (p, s) = basis @ factor
    directions = basis
    num_steps = 0
    residuals = factor.norm(dim=0)
    with tqdm(total=max_steps, unit=" steps", disable=not progress) as bar:
        while num_steps < max_steps and bool((residuals > tolerance).any()):
            products = operator(directions.T.contiguous()).T + damping * directions
            steps = _inverse(directions.T @ products)
            x += (directions @ (steps @ factor)).T
            basis, change = torch.linalg.qr(basis - products @ steps)
            directions = basis + directions @ change.T
            factor = change @ factor
            residuals = factor.norm(dim=0)
            num_steps += 1
            bar.update()
    return Solution(x * scale[:, None], residuals, num_steps, residuals <= tolerance)


def lissa(
    operator: Operator,
    rhs: Tensor,
    *,
    damping: float,
    scale: float,
    num_steps: int,
    progress: bool = False,
) -> Solution:
    r"""Solve ``(A + damping I) x = rhs`` by the Neumann series of LiSSA.

    .. math:: h \leftarrow v + (I - (A + \lambda I) / \sigma) h, \qquad x = h / \sigma,

    which converges like :math:`(1 - \lambda_\min / \sigma)^j` for σ above half of the largest
    eigenvalue: slowly, where eigenvalues are far apart. :func:`conjugate_gradient` needs no scale
    and fewer products; this is for comparison.

    Args:
        operator: A, see :func:`conjugate_gradient`.
        rhs: (s, p).
        damping: Added to the diagonal.
        scale: σ; the largest eigenvalue of the damped operator is a good choice.
        num_steps: Products.
        progress: Whether to show a progress bar.

    Raises:
        RuntimeError: If the series diverges.
    """
    _check(rhs, damping, num_steps)
    if not scale > 0:
        remedy = "Pass the largest eigenvalue of the damped operator."
        raise ValueError(message("scale", "positive", str(scale), remedy))
    length = rhs.norm(dim=1).clamp(min=torch.finfo(rhs.dtype).tiny)
    h, residual = rhs.clone(), rhs
    for _ in tqdm(range(num_steps), unit=" steps", disable=not progress):
        residual = rhs - (operator(h) + damping * h) / scale
        h = h + residual
        if not bool((residual.norm(dim=1) <= 1e3 * length).all()):
            found = f"{scale:.3g}, with which the series diverges"
            remedy = "Pass the largest eigenvalue of the damped operator."
            raise RuntimeError(message("scale", "large enough", found, remedy))
    residuals = residual.norm(dim=1) / length  # of the step before: one product less
    return Solution(h / scale, residuals, num_steps, residuals <= 1e-6)


def _inverse(gram: Tensor) -> Tensor:
    """The inverse of directions^T A directions (s, s), which is positive definite if A is."""
    factor, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    if int(failed):
        lowest = float(torch.linalg.eigvalsh((gram + gram.T) / 2)[0])
        found = f"one of curvature {lowest:.3g} or less along some direction"
        remedy = "Raise `damping`, or take the Gauss-Newton matrix in place of the Hessian."
        raise RuntimeError(message("operator", "positive definite with its damping", found, remedy))
    return torch.cholesky_inverse(factor)


def _check(rhs: Tensor, damping: float, num_steps: int) -> None:
    check_ndim("rhs", rhs, 2, "(s, p): one right-hand side per row")
    if rhs.dtype not in (torch.float32, torch.float64):
        remedy = "Convert it to the operator's dtype."
        raise TypeError(message("rhs", "float32 or float64", str(rhs.dtype), remedy))
    check_finite("rhs", rhs, "Find out where it became so.")
    check_positive_int("num_steps", num_steps)
    if not damping >= 0:
        remedy = "Pass a small positive number."
        raise ValueError(message("damping", "non-negative", str(damping), remedy))
