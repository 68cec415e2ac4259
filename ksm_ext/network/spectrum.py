r"""Traces, eigenvalues and spectral density of a symmetric operator, from its products alone.

For random probes with independent signs :math:`E[v v^\top] = I`, so that

.. math:: \mathrm{tr} A = E[v^\top A v], \qquad
          \frac1p \mathrm{tr} f(A) \approx \frac1s \sum_i \sum_j w_{ij} f(\theta_{ij}),

where the nodes θ and weights w come from Lanczos' tridiagonal matrix started at probe i. Probes are
a function of the seed and their number alone, whatever is multiplied together.

Shapes: operators map (s, p) to (s, p); p, dtype and device are the operator's, where it says so.

References: *Golub & Meurant 1994*; *Ghorbani, Krishnan & Xiao 2019, arXiv:1901.10159*; Hutch++:
*Meyer, Musco, Musco & Woodruff 2021, arXiv:2010.09649*.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ksm_ext.checks import (
    brief,
    check_choice,
    check_function,
    check_ndim,
    check_positive,
    check_positive_int,
    check_real,
    check_seed,
    check_tensor,
    message,
)
from ksm_ext.network.solvers import Operator, check_operator, without_autocast


@dataclass(frozen=True)
class TraceEstimate:
    """A trace and what is known of its error.

    Attributes:
        value: The estimate, in units of the operator.
        std_error: Its standard error, from the spread of the probes; NaN for a single one.
        num_products: Products with one vector that it took.
    """

    value: float
    std_error: float
    num_products: int


@dataclass(frozen=True, eq=False)
class SpectralDensity:
    """The density of eigenvalues, as weighted points for each probe.

    Attributes:
        nodes: (s, k). Ritz values θ.
        weights: (s, k). Their shares of the spectrum w; each row sums to 1.
        dim: p.
    """

    nodes: Tensor
    weights: Tensor
    dim: int

    __repr__ = brief

    def moment(self, order: float) -> float:
        """Mean of λ^order over the p eigenvalues."""
        order = check_real("order", order)
        return float((self.weights * self.nodes**order).sum(1).mean())

    def trace(self) -> float:
        """Sum of all eigenvalues."""
        return self.dim * self.moment(1)

    def density(self, grid: Tensor, width: float) -> Tensor:
        """The density at ``grid`` (g,), smoothed by a Gaussian of standard deviation ``width``."""
        check_tensor("grid", grid)
        check_ndim("grid", grid, 1, "(g,)")
        width = check_positive("width", width, "Such as 1 % of the range.")
        nodes, weights = self.nodes.flatten(), self.weights.flatten() / len(self.weights)
        distance = (grid.to(nodes)[:, None] - nodes) / width
        bells = torch.exp(-distance.square() / 2) / (width * math.sqrt(2 * math.pi))
        return bells @ weights


def hutchinson_trace(
    operator: Operator, dim: int | None = None, *, num_probes: int = 32, seed: int = 0
) -> TraceEstimate:
    """Trace by Hutchinson's estimator; its error falls like ``num_probes ** -0.5``.

    Args:
        operator: A, symmetric.
        dim: p; by default that of the operator's ``shape``.
        num_probes: s, vectors of random signs.
        seed: Draws the probes.
    """
    num_probes = check_positive_int("num_probes", num_probes)
    probes = signs(operator, dim, num_probes, seed)
    return _mean((probes * operator(probes)).sum(1), num_probes)


@without_autocast()
def hutch_pp_trace(
    operator: Operator, dim: int | None = None, *, num_products: int = 32, seed: int = 0
) -> TraceEstimate:
    r"""Trace by Hutch++: exact on a random subspace, Hutchinson's estimate on the rest.

    .. math:: \mathrm{tr}(Q^\top A Q) + \frac{1}{r} \sum_i g_i^\top (I - Q Q^\top) A
              (I - Q Q^\top) g_i, \qquad Q = \mathrm{orth}(A S).

    Where few eigenvalues carry the trace, as in networks, the rest is small and so is the error:
    with a hundred products and more, half of what Hutchinson's estimator needs. With a dozen, that
    one is as good.

    Args:
        operator: A, symmetric.
        dim: p; by default that of the operator's ``shape``.
        num_products: Products with one vector in all, at least 3: a third each for S, for Q and
            for the rest.
        seed: Draws the probes.
    """
    num_products = check_positive_int("num_products", num_products, minimum=3)
    third = num_products // 3
    probes = signs(operator, dim, num_products - third, seed)
    sketch, rest = probes[:third], probes[third:]
    basis = torch.linalg.qr(operator(sketch).T)[0].T  # (third, p)
    inside = (basis * operator(basis)).sum()
    rest = rest - (rest @ basis.T) @ basis
    outside = _mean((rest * operator(rest)).sum(1), num_products)
    return TraceEstimate(float(inside) + outside.value, outside.std_error, num_products)


def per_sample_traces(
    quadratic: Callable[[Tensor], Tensor],
    dim: int,
    *,
    num_probes: int = 32,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Trace of each sample's own Hessian, by Hutchinson's estimator.

    Args:
        quadratic: From vectors (s, p) to ``v^T H_i v`` (s, b), such as
            :meth:`ksm_ext.network.hessian.CurvatureOperator.per_sample_quadratic`.
        dim: p.
        num_probes: s, at least 2.
        seed: Draws the probes.
        dtype: The vectors' dtype.
        device: The vectors' device.

    Returns:
        Traces (b,) and their standard errors (b,).
    """
    num_probes = check_positive_int("num_probes", num_probes, minimum=2)
    check_function("quadratic", quadratic, ("v",), "Pass per_sample_quadratic.", "(s, b)")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        remedy = "Pass the dtype of the parameters."
        raise TypeError(message("dtype", "a floating torch.dtype", repr(dtype), remedy))
    forms = quadratic(_signs(num_probes, dim, seed, dtype, device))  # (s, b)
    return forms.mean(0), forms.std(0) / math.sqrt(num_probes)


@without_autocast()
def lanczos(operator: Operator, start: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tridiagonal matrices of an operator, from each of s starts, one block of products per step.

    Every new direction is orthogonalised against all earlier ones, twice: without that, eigenvalues
    that have converged come up again and again.

    Args:
        operator: A, symmetric.
        start: (s, p). Not zero; need not have length one.
        num_steps: k, at most p. A start in a smaller invariant subspace ends earlier: what would
            follow is zero.

    Returns:
        Diagonals (s, k), off-diagonals (s, k - 1), and the orthonormal directions (s, k, p).
    """
    check_operator(operator)
    check_tensor("start", start)
    check_ndim("start", start, 2, "(s, p): one start per row")
    s, p = start.shape
    num_steps = check_positive_int("num_steps", num_steps)
    num_steps = min(num_steps, p)
    length = start.norm(dim=1)
    if not bool((length > 0).all()):
        raise ValueError(message("start", "of rows that are not zero", "one that is", "Drop it."))
    basis = start.new_zeros(s, num_steps, p)
    diagonal, off_diagonal = start.new_zeros(s, num_steps), start.new_zeros(s, num_steps - 1)
    basis[:, 0] = start / length[:, None]
    largest = start.new_zeros(s)  # the largest product so far: what rounding is relative to
    for step in range(num_steps):
        product = operator(basis[:, step].contiguous())
        largest = torch.maximum(largest, product.norm(dim=1))
        diagonal[:, step] = (product * basis[:, step]).sum(1)
        if step + 1 == num_steps:
            break
        known = basis[:, : step + 1]
        for _ in range(2):
            product = product - torch.einsum(
                "sk,skp->sp", torch.einsum("skp,sp->sk", known, product), known
            )
        rest = product.norm(dim=1)
        goes_on = rest > 100 * torch.finfo(start.dtype).eps * largest
        off_diagonal[:, step] = torch.where(goes_on, rest, 0.0)
        scale = torch.where(goes_on, 1 / rest, 0.0)
        basis[:, step + 1] = product * scale[:, None]
    return diagonal, off_diagonal, basis


def spectral_density(
    operator: Operator,
    dim: int | None = None,
    *,
    num_probes: int = 8,
    num_steps: int = 64,
    seed: int = 0,
) -> SpectralDensity:
    """Density of eigenvalues by stochastic Lanczos quadrature.

    Each probe's points reproduce ``v^T A^j v`` exactly for j < 2 ``num_steps``. Memory is
    ``num_probes * num_steps`` vectors.

    Args:
        operator: A, symmetric.
        dim: p; by default that of the operator's ``shape``.
        num_probes: s.
        num_steps: k.
        seed: Draws the probes.
    """
    num_probes = check_positive_int("num_probes", num_probes)
    probes = signs(operator, dim, num_probes, seed)
    diagonal, off_diagonal, _ = lanczos(operator, probes, num_steps)
    upper = torch.diag_embed(off_diagonal.double(), 1)
    matrix = torch.diag_embed(diagonal.double()) + (upper + upper.mT)
    nodes, vectors = torch.linalg.eigh(matrix)
    return SpectralDensity(nodes, vectors[:, 0].square(), probes.shape[1])


def top_eigenpairs(
    operator: Operator,
    num_pairs: int,
    dim: int | None = None,
    *,
    which: Literal["largest", "smallest", "magnitude"] = "largest",
    tolerance: float = 1e-6,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues at an end of the spectrum, with their eigenvectors.

    By ARPACK's restarted Lanczos method (``scipy.sparse.linalg.eigsh``), which keeps no more than
    about ``2 num_pairs + 20`` vectors however long it takes.

    Args:
        operator: A, symmetric.
        num_pairs: How many, fewer than p.
        dim: p; by default that of the operator's ``shape``.
        which: ``"largest"`` or ``"smallest"`` eigenvalues, or those of the largest absolute value.
        tolerance: Relative error of the eigenvalues.
        seed: Draws the first vector.

    Returns:
        Eigenvalues (num_pairs,), the most extreme first, and eigenvectors (num_pairs, p).

    Raises:
        RuntimeError: If they are not found.
    """
    from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

    check_choice("which", which, ("largest", "smallest", "magnitude"))
    num_pairs = check_positive_int("num_pairs", num_pairs)
    tolerance = check_positive("tolerance", tolerance, "0 is rounding.", zero=True)
    start = signs(operator, dim, 1, seed)
    p = start.shape[1]
    if num_pairs >= p:
        remedy = "Form the matrix and use torch.linalg.eigh."
        raise ValueError(message("num_pairs", f"below {p}", str(num_pairs), remedy))

    def multiply(x: np.ndarray) -> np.ndarray:
        return operator(torch.from_numpy(x.reshape(1, p)).to(start)).cpu().numpy().reshape(-1)

    first = start[0].cpu().numpy()
    matrix = LinearOperator((p, p), multiply, dtype=first.dtype)
    ends = {"largest": "LA", "smallest": "SA", "magnitude": "LM"}
    try:
        values, vectors = eigsh(matrix, k=num_pairs, which=ends[which], tol=tolerance, v0=first)
    except ArpackNoConvergence as error:
        found = f"one of which only {len(error.eigenvalues)} of {num_pairs} converged"
        remedy = "Raise `tolerance`, or ask for fewer."
        raise RuntimeError(message("operator", "one with eigenvalues", found, remedy)) from error
    key = -np.abs(values) if which == "magnitude" else -values if which == "largest" else values
    order = np.argsort(key)
    pairs = values[order], np.ascontiguousarray(vectors.T[order])
    return torch.from_numpy(pairs[0]).to(start), torch.from_numpy(pairs[1]).to(start)


def signs(operator: Any, dim: int | None, num_probes: int, seed: int) -> Tensor:
    """Probes (num_probes, p) of random signs, as the operator takes its vectors."""
    check_operator(operator)
    if dim is None:
        if not hasattr(operator, "shape"):
            remedy = "Pass the number of coordinates."
            raise TypeError(message("dim", "a number for a plain function", "None", remedy))
        dim = int(operator.shape[0])
    dim = check_positive_int("dim", dim)
    of_operator = getattr(operator, "shape", (dim,))[0]
    if dim != of_operator:
        remedy = "Leave it out: the operator knows."
        raise ValueError(message("dim", f"{of_operator} like the operator", str(dim), remedy))
    dtype = getattr(operator, "dtype", torch.float64)
    return _signs(num_probes, dim, seed, dtype, getattr(operator, "device", "cpu"))


def _signs(
    num_probes: int, dim: int, seed: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Row i from the generator's i-th draw: more probes begin with the same ones."""
    dim = check_positive_int("dim", dim)
    seed = check_seed("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, (dim,), generator=generator) for _ in range(num_probes)]
    return (2 * torch.stack(rows) - 1).to(device, dtype)


def _mean(values: Tensor, num_products: int) -> TraceEstimate:
    error = float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return TraceEstimate(float(values.mean()), error, num_products)
