r"""Kernel ridge regression on many subsets, from products with a Gram matrix that is never stored.

The same quantities as :mod:`.spectral`, of ``A = H K H`` (centred where there is an intercept):
coefficients ``alpha = (A + lambda I)^{-1} H y`` and leave-one-out residuals ``alpha_i / P_ii``.
A product with K is what costs, so none is thrown away: an orthonormal basis V of everything that
was multiplied is kept with its images ``A V``, and for every ridge and right-hand side

.. math:: \alpha(\lambda) = V (V^T A V + \lambda I)^{-1} V^T H y, \qquad
          r(\lambda) = H y - (A + \lambda I)\,\alpha(\lambda),

the best approximation in V by energy (Galerkin), with its true residual, for one small
eigendecomposition. Where a residual is too large, the basis grows by ``M^{-1} r``: block conjugate
gradients with full orthogonalisation, in one space for all targets, all probes and, with the few
products more that another ridge may want, all ridges.

``M = L L^T + lambda I`` preconditions, L from ``rank`` columns of K by randomly pivoted Cholesky.
The diagonal of P is that of ``Q = (L L^T + D + lambda I)^{-1}`` (centred), D the diagonal that L
leaves out of K, plus a correction measured on random signs z, ``z * (P z - Q z)`` (Bekas et al.
2007), shrunk towards its mean by as much as the probes disagree.

With weights, everything here is of ``W K W`` and ``W y`` as in :mod:`.spectral`, H takes out the
constant ``W 1``, and coefficients are ``W`` times the solution.

Shapes: m subsets, q right-hand sides, k basis vectors; L (m, rank) float32, all else float64.

References: *Chen, Epperly, Tropp & Webber 2023, arXiv:2207.06503* (pivots); *Frangella, Tropp &
Udell 2021, arXiv:2110.02820* (such preconditioners); *Bekas, Kokiopoulou & Saad 2007* (diagonals).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import RLock

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.checks import check_positive_int, check_real, message
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks

_PIVOTS = 64  # columns of K taken at a time
_BLOCK = 64  # most columns of one product: beyond, its time grows with them
_ROWS = 8192  # rows of L converted to float64 at a time


@dataclass(frozen=True)
class ConjugateGradients:
    """How :func:`ksm_ext.fit_surrogate` solves for more subsets than a Gram matrix fits.

    Memory is ``4 m rank + 16 m k`` bytes, k the columns multiplied (the products taken times
    targets plus probes), and what the masks take.

    Attributes:
        rank: Number of columns of the Gram matrix that the preconditioner is made of.
        tolerance: Largest residual of a solved target, the norm of ``H y - (H K H + ridge) alpha``
            over that of ``H y``.
        max_steps: Most products with the Gram matrix for one ridge; a solve that takes more fails.
        num_probes: Number of random vectors that leave-one-out residuals are estimated with.
        seed: Seed of pivots and probes: the same seed gives the same surrogate.
    """

    rank: int = 1000
    tolerance: float = 1e-6
    max_steps: int = 100
    num_probes: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the numbers."""
        minima = {"rank": 1, "max_steps": 1, "num_probes": 2, "seed": -(2**63)}
        for name, minimum in minima.items():
            number = check_positive_int(name, getattr(self, name), minimum)
            object.__setattr__(self, name, number)  # Python's own, which files can hold
        object.__setattr__(self, "tolerance", check_real("tolerance", self.tolerance))
        if not 0 < self.tolerance < 1:
            remedy = "1e-6 is enough for any use of the surrogate."
            raise ValueError(message("tolerance", "in (0, 1)", str(self.tolerance), remedy))


class Preconditioner:
    """``L L^T`` in eigenvectors, and what follows for the inverse of ``K + lambda I``.

    Attributes:
        vectors: (m, rank) float32 orthonormal columns.
        eigenvalues: (rank,) of ``L L^T``.
        missing: (m,) diagonal of ``K - L L^T``.
    """

    def __init__(
        self, kernel: Kernel, masks: Masks, constant: Tensor, *, center: bool, rank: int, seed: int
    ) -> None:
        """Factor ``rank`` columns of ``W K W``; columns lose ``constant`` (m,) with ``center``."""
        self.center, self._constant = center, constant
        factor, missing = pivoted_cholesky(kernel, masks, rank, seed)
        factor *= constant[:, None].float()
        self.missing = missing * constant.square()
        if center:
            half = constant.float()  # below in place, for memory
            factor.addr_(half, half @ factor / half.square().sum(), alpha=-1)
        gram = missing.new_zeros(factor.shape[1], factor.shape[1])
        for rows in factor.split(_ROWS):
            gram += rows.T.double() @ rows.double()
        eigenvalues, rotation = torch.linalg.eigh(gram)
        kept = eigenvalues > 1e-9 * eigenvalues.max().clamp_min(1e-300)
        self.eigenvalues = eigenvalues[kept]
        rotation = (rotation[:, kept] / self.eigenvalues.sqrt()).float()
        for rows in factor.split(_ROWS):  # in place: L is most of the memory
            rows[:, : rotation.shape[1]] = rows @ rotation
        self.vectors = factor[:, : rotation.shape[1]]

    def solve(self, rhs: Tensor, shift: Tensor | float) -> Tensor:
        """``(L L^T + shift I)^{-1} rhs``, (m, q) for a number or (q,) ``shift``."""
        shift = torch.as_tensor(shift, dtype=torch.float64).to(rhs.device).reshape(1, -1)
        weights = 1 / (self.eigenvalues[:, None] + shift) - 1 / shift  # (rank, 1 or q)
        inside = (self.vectors.T @ rhs.float()).double() * weights
        return rhs / shift + (self.vectors @ inside.float()).double()

    def guess(self, signs: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Diagonal (m,) of Q of the module's head, and ``Q signs`` (m, q), by Woodbury."""
        weights = 1 / (self.missing + ridge)  # (m,)
        scaled = torch.cat([signs, self._constant[:, None]], 1) * weights[:, None]
        spread = self.eigenvalues.sqrt()
        inner = torch.eye(len(spread), dtype=torch.float64, device=spread.device)
        within = scaled.new_zeros(len(spread), scaled.shape[1])
        parts = [part.split(_ROWS) for part in (self.vectors, weights, scaled)]
        for vectors, weight, part in zip(*parts, strict=True):
            rows = vectors.double() * spread
            inner.addmm_(rows.T, weight[:, None] * rows)
            within.addmm_(rows.T, part)
        factor = torch.linalg.cholesky(inner)
        within = torch.cholesky_solve(within, factor)
        diagonals, products = [], []
        for vectors, weight, part in zip(*parts, strict=True):
            rows = vectors.double() * spread
            products.append(part - weight[:, None] * (rows @ within))
            half = torch.linalg.solve_triangular(factor, rows.T, upper=False)  # (rank, rows)
            diagonals.append(weight - weight.square() * half.square().sum(0))
        diagonal, product = torch.cat(diagonals), torch.cat(products)
        product, constant = product[:, :-1], product[:, -1]
        if self.center:  # the inverse on what is orthogonal to constants
            total = self._constant @ constant
            diagonal = diagonal - constant.square() / total
            product = product - constant[:, None] * (self._constant @ product / total)
        return diagonal, product


def pivoted_cholesky(kernel: Kernel, masks: Masks, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """``L`` (m, rank) float32 with ``K ~ L L^T``, and the diagonal (m,) that it leaves out.

    Pivots are drawn in proportion to the diagonal of ``K - L L^T``, a block at a time.
    """
    diagonal = kernel.diagonal(masks)
    remaining, filled = diagonal.clone(), 0
    shape = (len(masks), min(rank, len(masks)))
    factor = torch.empty(shape, dtype=torch.float32, device=diagonal.device)
    generator = torch.Generator().manual_seed(seed)
    while filled < factor.shape[1] and float(remaining.sum()) > 1e-7 * float(diagonal.sum()):
        count = min(_PIVOTS, factor.shape[1] - filled)
        drawn = torch.multinomial(remaining.cpu(), count, replacement=True, generator=generator)
        pivots = drawn.unique().to(diagonal.device)
        known = factor[:, :filled]
        columns = kernel.gram(masks, masks[pivots]) - known @ known[pivots].T  # (m, pivots)
        values, rotation = torch.linalg.eigh(columns[pivots])
        kept = values > 1e-6 * diagonal.max()
        block = columns @ (rotation[:, kept] / values[kept].sqrt())
        factor[:, filled : filled + block.shape[1]] = block
        filled += block.shape[1]
        remaining = (remaining - block.square().sum(1)).clamp_min(0.0)
        remaining[pivots] = 0.0
    return factor[:, :filled], remaining


class KrylovRidge:
    """The space of everything multiplied so far, and what follows from it for any ridge.

    The interface of :class:`.spectral.SpectralRidge`; scores "in the eigenbasis" are ``H y`` here.
    """

    def __init__(
        self,
        kernel: Kernel,
        masks: Masks,
        settings: ConjugateGradients,
        *,
        center: bool = True,
        weights: Tensor | None = None,
        progress: bool = False,
    ) -> None:
        """Prepare the preconditioner and the probes; nothing is multiplied yet."""
        self.center, self.settings, self._progress = center, settings, progress
        self.num_subsets, self.num_products = len(masks), 0
        self._kernel, self._masks = kernel, masks
        if weights is None:
            weights = torch.ones(len(masks), dtype=torch.float64, device=masks.values.device)
        self.share = weights / weights.sum()  # (m,) of each score in the mean score
        self._half = weights.sqrt()[:, None]  # (m, 1) the diagonal of W
        self._preconditioner = Preconditioner(
            kernel, masks, self._half[:, 0], center=center, rank=settings.rank, seed=settings.seed
        )
        generator = torch.Generator().manual_seed(settings.seed)
        signs = torch.randint(0, 2, (len(masks), settings.num_probes), generator=generator)
        self._signs = (2.0 * signs.double() - 1.0).to(masks.values.device)
        self.probes = self._centred(self._signs)  # (m, probes)
        self._largest = float((kernel.diagonal(masks) * weights).max())
        self._one_at_a_time = RLock()
        self._guesses: dict[float, tuple[Tensor, Tensor]] = {}
        self._basis: list[Tensor] = []
        self._images: list[Tensor] = []
        self._means: list[Tensor] = []
        self._project(self._signs.new_zeros(0, 0))

    def rotate(self, y: Tensor) -> Tensor:
        """``H W y``, (m, q)."""
        return self._centred(self._half * y)

    def _centred(self, x: Tensor) -> Tensor:
        return without(x, self._half[:, 0]) if self.center else x

    def check_ridge(self, ridge: float) -> None:
        """Raise ``ValueError`` where there is no ridge: nothing would converge."""
        if ridge == 0:
            remedy = "Use a positive ridge or ridge='loo'."
            raise ValueError(message("ridge", "positive with conjugate gradients", "0", remedy))

    def solve(self, rhs: Tensor, ridge: Tensor | float, tolerance: float) -> Tensor:
        """Extend the space until ``rhs`` (m, q), centred, is solved; residuals (q,) it ended with.

        Gives up after ``max_steps`` products: look at what comes back.
        """
        ridges = torch.as_tensor(ridge, dtype=torch.float64).to(rhs.device).expand(rhs.shape[1])
        length = rhs.norm(dim=0)
        length = torch.where(length > 0, length, 1.0)  # a constant target is solved by zero
        label = f"{self._kernel}, ridge {float(ridges.min()):.2g}"
        shown = {"desc": label, "unit": " products", "leave": False, "disable": not self._progress}
        with tqdm(total=self.settings.max_steps, **shown) as bar:
            for step in range(self.settings.max_steps + 1):
                residuals = self._residuals(rhs, ridges) / length
                relative = residuals.norm(dim=0)
                open_columns = relative > tolerance
                bar.set_postfix_str(f"residual {float(relative.max()):.1e}")
                if step == self.settings.max_steps or not bool(open_columns.any()):
                    break
                if not self._extend(residuals[:, open_columns], ridges[open_columns]):
                    break
                bar.update()
        return relative

    def dual(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Dual coefficients alpha, (m, q), solved to the tolerance.

        Raises:
            RuntimeError: If ``max_steps`` products are not enough.
        """
        tolerance = self.settings.tolerance
        worst = float(self.solve(rotated, ridge, tolerance).max())
        check_solved(float(torch.as_tensor(ridge).min()), worst, tolerance)
        return self._half * self._approximate(rotated, ridge)

    def offset(self, dual: Tensor) -> Tensor:
        """Minus the mean of ``K alpha``, (q,): what the intercept adds to the mean score."""
        coordinates = [block.T @ (dual / self._half) for block in self._basis]
        return -torch.cat(self._means) @ torch.cat(coordinates)

    def leave_one_out(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Residuals ``y_i - F_{-i}(S_i)``, (m, q), as well as the space has them by now."""
        return self._approximate(rotated, ridge) / (self._half * self._precision(ridge))

    def dual_so_far(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Dual coefficients alpha, (m, q), as well as the space has them by now."""
        return self._half * self._approximate(rotated, ridge)

    def signal_variance(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """See :meth:`.spectral.SpectralRidge.signal_variance`, (q,)."""
        return (self._approximate(rotated, ridge).square() / self._precision(ridge)).mean(0)

    def explained(self, parts: Tensor, ridge: Tensor) -> Tensor:
        """See :meth:`.spectral.SpectralRidge.explained`, (k, k, rows, q); never too large.

        Every row is a right-hand side of its own, solved to 1e-3. By energy the error is of second
        order and has one sign: what is not solved counts as not explained.
        """
        live = (parts != 0).flatten(1).any(1).nonzero()[:, 0]  # the others explain nothing
        ridges, index = ridge.unique(return_inverse=True)
        explained = parts.new_zeros(len(parts), len(parts), parts.shape[1], len(ridge))
        found = []
        if not len(live):
            return explained
        for block in parts[live].split(max(1, _BLOCK // len(live)), 1):
            rhs = self.rotate(block.flatten(0, 1).T)  # (m, k rows)
            columns = []
            with self._extended():
                for value in ridges.tolist():
                    check_solved(value, float(self.solve(rhs, value, 1e-3).max()), 1e-3)
                    solved = self._approximate(rhs, value)
                    each, both = (table.unflatten(1, block.shape[:2]) for table in (rhs, solved))
                    columns.append(torch.einsum("mar,mbr->abr", each, both))
            found.append(torch.stack(columns, 3))
        explained[live[:, None], live] = torch.cat(found, 2)[..., index]
        return explained

    def loo_variance(self, ridge: Tensor) -> Tensor:
        """See :meth:`.spectral.SpectralRidge.loo_variance`, (m, q); estimated on the probes."""
        ridges, index = ridge.unique(return_inverse=True)
        columns = []
        with self._extended():
            for value in ridges.tolist():
                check_solved(value, float(self.solve(self.probes, value, 1e-2).max()), 1e-2)
                columns.append(1.0 / self._precision_at(value))
        return torch.stack(columns, 1)[:, index]

    def whitened(self, rows: Tensor, ridge: float) -> Tensor:
        """(rows, k) whose products with each other are ``rows P rows^T``, solved to 1e-3.

        Every row is a right-hand side of its own, as for :meth:`explained`.
        """
        with self._extended():
            for part in rows.split(_BLOCK):
                worst = float(self.solve(self.rotate(part.T), ridge, 1e-3).max())
                check_solved(ridge, worst, 1e-3)
            known = torch.cat([block.T @ self.rotate(rows.T) for block in self._basis])
            return (self._vectors.T @ known).T / (self._values + ridge).sqrt()

    def noise_gain(
        self, rows: Tensor, ridge: Tensor, more: Tensor, scale: Tensor, noise: Tensor
    ) -> Tensor:
        """An upper bound of :meth:`.spectral.SpectralRidge.noise_gain`: P is below W² / ridge."""
        largest = (self._half.square() * noise).amax(0)
        scales = torch.stack([torch.ones_like(scale), scale])
        energy = self.explained(torch.stack([rows, more]), ridge)
        return largest / ridge * torch.einsum("aq,abrq,bq->rq", scales, energy, scales)

    # -- the space ------------------------------------------------------------------------------

    @contextmanager
    def _extended(self) -> Iterator[None]:
        """The space for one thread's right-hand sides; afterwards, however it ends, as before."""
        with self._one_at_a_time:
            known = len(self._basis)
            try:
                yield
            finally:
                self._forget(known)

    def _forget(self, blocks: int) -> None:
        """Keep the first ``blocks`` blocks of the basis (m, k), of ``A V`` and of ``1^T K V``."""
        self._basis, self._images = self._basis[:blocks], self._images[:blocks]
        self._means = self._means[:blocks]
        size = sum(block.shape[1] for block in self._basis)
        self._project(self._projected[:size, :size])

    def _project(self, projected: Tensor) -> None:
        self._projected = projected  # (k, k) V^T A V
        self._values, self._vectors = torch.linalg.eigh(projected)

    def _extend(self, residuals: Tensor, ridges: Tensor) -> bool:
        """Add ``M^{-1} r`` to the space; False where it adds no direction."""
        directions = self._preconditioner.solve(residuals, ridges)
        directions = self._centred(directions / directions.norm(dim=0).clamp_min(1e-300))
        for _ in range(2):  # twice is enough (Kahan)
            for block in self._basis:
                directions = directions - block @ (block.T @ directions)
        frame, triangle = torch.linalg.qr(directions)
        rotation, lengths, _ = torch.linalg.svd(triangle)
        kept = (lengths > 1e-9).nonzero()[:_BLOCK, 0]
        if not len(kept):
            return False
        directions = self._centred(frame @ rotation[:, kept])
        for block in self._basis:
            directions = directions - block @ (block.T @ directions)
        directions = torch.linalg.qr(directions)[0]
        products = self._kernel.matmul(self._masks, None, self._half * directions)
        self.num_products += 1
        self._means.append(self.share @ products)
        products = self.rotate(products)
        across = [block.T @ products for block in self._basis]
        corner = directions.T @ products
        upper = torch.cat([*across, (corner + corner.T) / 2])  # (k + new, new)
        size = len(self._projected)
        projected = torch.cat([torch.cat([self._projected, upper[:size]], 1), upper.T])
        self._basis.append(directions)
        self._images.append(products)
        self._project(projected)
        return True

    def _coordinates(self, rhs: Tensor, ridge: Tensor | float) -> Tensor:
        """Coordinates of the approximate solutions in the basis, (k, q)."""
        ridge = torch.as_tensor(ridge, dtype=torch.float64).to(rhs.device).reshape(1, -1)
        known = torch.cat([block.T @ rhs for block in self._basis])
        return self._vectors @ ((self._vectors.T @ known) / (self._values[:, None] + ridge))

    def _combine(self, blocks: list[Tensor], coordinates: Tensor) -> Tensor:
        total = self._signs.new_zeros(self.num_subsets, coordinates.shape[1])
        start = 0
        for block in blocks:
            total.addmm_(block, coordinates[start : start + block.shape[1]])
            start += block.shape[1]
        return total

    def _approximate(self, rhs: Tensor, ridge: Tensor | float) -> Tensor:
        if not self._basis:
            return torch.zeros_like(rhs)
        return self._combine(self._basis, self._coordinates(rhs, ridge))

    def _residuals(self, rhs: Tensor, ridges: Tensor) -> Tensor:
        """``rhs - (A + ridge) x``, (m, q)."""
        if not self._basis:
            return rhs
        coordinates = self._coordinates(rhs, ridges)
        products = self._combine(self._images, coordinates)
        return rhs - products - self._combine(self._basis, coordinates * ridges)

    def _precision(self, ridge: Tensor | float) -> Tensor:
        """``P_ii``, (m, 1 or q)."""
        given = torch.as_tensor(ridge, dtype=torch.float64).reshape(-1)
        ridges, index = given.unique(return_inverse=True)
        columns = [self._precision_at(value) for value in ridges.tolist()]
        return torch.stack(columns, dim=1)[:, index]

    def _precision_at(self, ridge: float) -> Tensor:
        if ridge not in self._guesses:
            self._guesses[ridge] = self._preconditioner.guess(self._signs, ridge)
        smooth, product = self._guesses[ridge]
        excess = self._signs * (self._approximate(self.probes, ridge) - product)
        correction = excess.mean(1)
        noise = float(excess.var(1).mean()) / excess.shape[1]
        trusted = max(0.0, 1 - noise / max(float(correction.var()), 1e-300))
        mean = correction.mean()
        precision = smooth + mean + trusted * (correction - mean)
        lowest = 0.25 / (4 * self._largest + ridge)  # by Cauchy-Schwarz, |phi_i - mean| <= 2 |phi|
        return precision.clamp(lowest, 1 / ridge)


def without(x: Tensor, constant: Tensor) -> Tensor:
    """The part of the columns of ``x`` (m, q) that is orthogonal to ``constant`` (m,)."""
    return x - constant[:, None] * (constant @ x / constant.square().sum())


class NotConvergedError(RuntimeError):
    """Conjugate gradients took all the products they may, and are not there."""


def check_solved(ridge: float, residual: float, tolerance: float) -> None:
    """Raise :class:`NotConvergedError` where a relative residual is above the tolerance."""
    if residual > tolerance:
        found = f"{ridge:.3g}, which leaves a relative residual of {residual:.1g}"
        remedy = "Raise the ridge, or `rank` or `max_steps` of ksm_ext.ConjugateGradients."
        expected = "large enough for conjugate gradients to converge"
        raise NotConvergedError(message("ridge", expected, found, remedy))
