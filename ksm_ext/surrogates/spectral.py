r"""Kernel ridge regression with an intercept for every ridge at once, from one eigendecomposition.

.. math:: \min_{b, \alpha} \|y - b - K\alpha\|^2 + \lambda\, \alpha^T K \alpha

With an unpenalised intercept this is kernel ridge with the doubly centred Gram matrix
``H K H = U diag(sigma) U^T`` and centred scores ``z = U^T H y``. For every ridge and target then

* dual coefficients ``alpha = U z / (sigma + lambda)``,
* ``P = U diag(1 / (sigma + lambda)) U^T``, the inverse covariance of the observations,
* exact leave-one-out residuals ``e_i = alpha_i / P_ii``, the intercept fitted anew each time (Allen
  1974; checked against refitting in the tests).

Subsets that were scored more or less precisely have ridges ``lambda / w_i``: the same with
``W K W``, ``W y`` and the constant ``W 1`` for ``W = diag(sqrt(w))``, and ``W U`` for U, so that
``P = W U diag(1 / (sigma + lambda)) U^T W``.

As a Gaussian process with a flat prior on b the surrogate is the posterior mean, and
``L k L' - (L K H) P (L K H)^T`` the posterior covariance of any linear functional L of it that
ignores constants, in units of the signal variance. That variance is set so that standardised
leave-one-out residuals have mean square one.

**More functions beside the intercept**, of unpenalised coefficients too (:class:`TrendRidge`): with
the values h of a column's functions in the eigenbasis, everything holds for ``z - h b`` in place of
z and ``P~ = P - P h G^-1 h' P`` in place of P, where ``G = h' P h`` and ``b = G^-1 h' P z`` is
generalised least squares, of variance ``G^-1``.

Shapes: K (..., m, m), y (..., m, q), weights (..., m), ridge (..., q) or a number; everything
float64. Leading dimensions are a batch: of tables, kernels or folds, factored in one call.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import message

_FEW_RIDGES = 32  # columns from which it pays to look which have the same ridge


class SpectralRidge:
    """Eigendecomposition of a (centred) Gram matrix, and what follows from it for any ridge."""

    def __init__(self, gram: Tensor, *, center: bool = True, weights: Tensor | None = None) -> None:
        """Factor ``gram``; with ``center`` an unpenalised intercept is part of the model."""
        self.center = center
        self.num_subsets = m = gram.shape[-1]
        weights = gram.new_ones(m) if weights is None else weights
        weights = weights.expand(gram.shape[:-1])
        self.share = share = weights / weights.sum(-1, keepdim=True)  # of scores in their mean
        self.gram_row_mean = (gram @ share[..., None])[..., 0]  # (..., m)
        if center:
            rows = self.gram_row_mean
            mean = (share * rows).sum(-1)[..., None, None]
            gram = gram - rows[..., None, :] - rows[..., None] + mean
        half = weights.sqrt()
        if bool((weights != 1).any()):
            gram = half[..., None] * gram * half[..., None, :]
        if center:
            # The constant direction belongs to the intercept: lifted above all others, it comes
            # last and is dropped, so that its rounded zero never competes with a small ridge.
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
            lift = (2 * trace).clamp_min(1e-300) / weights.sum(-1)
            gram = gram + lift[..., None, None] * half[..., None] * half[..., None, :]
        eigenvalues, vectors = torch.linalg.eigh(gram)
        self.rank = m - int(center)  # the largest it can be
        self.eigenvalues = eigenvalues[..., : self.rank].clamp_min(0.0)
        self.vectors = half[..., None] * vectors[..., : self.rank]  # (..., m, rank) W U
        self.scale = self.eigenvalues.sum(-1) / m  # (...) mean variance of a subset

    def __getitem__(self, index: Any) -> "SpectralRidge":
        """A part of the batch, in the memory of the whole."""
        part = copy(self)
        for name in ("share", "gram_row_mean", "eigenvalues", "vectors", "scale"):
            setattr(part, name, getattr(self, name)[index])
        return part

    def in_single_precision(self) -> "SpectralRidge":
        """A float32 copy: half the time, for comparing ridges, not for the final answer."""
        single = copy(self)
        single.eigenvalues = self.eigenvalues.to(torch.float32)
        single.vectors = self.vectors.to(torch.float32)
        return single

    def rotate(self, y: Tensor) -> Tensor:
        """``U^T W y``, (..., rank, q): scores in the eigenbasis, used by the methods below."""
        return self.vectors.mT @ (y - self.share[..., None, :] @ y if self.center else y)

    def check_ridge(self, ridge: float) -> None:
        """Raise ``ValueError`` if the Gram matrix is singular and the ridge is 0."""
        rank = int((self.eigenvalues > 1e-12 * self.eigenvalues.max()).sum())
        if ridge == 0 and rank < self.rank:
            found = f"0 with a singular Gram matrix (rank {rank} of {self.rank})"
            remedy = "Use a positive ridge or ridge='loo'."
            raise ValueError(message("ridge", "positive for these masks", found, remedy))

    def dual(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Dual coefficients alpha, (..., m, q)."""
        return self.vectors @ (rotated / self._shifted(ridge))

    def offset(self, dual: Tensor) -> Tensor:
        """Minus the mean of ``K alpha``, (..., q): what the intercept adds to the mean score."""
        return -(self.gram_row_mean[..., None, :] @ dual)[..., 0, :]

    def leave_one_out(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Exact residuals ``y_i - F_{-i}(S_i)``, (..., m, q), of scores given as ``rotate(y)``."""
        return self.dual(rotated, ridge) / self._precision(ridge)

    def leave_groups_out(self, rotated: Tensor, ridges: Tensor, groups: Sequence[Tensor]) -> Tensor:
        """Exact residuals (R, m, q) at ridges (R,), of all subsets of a group left out together.

        ``y_G - F_{-G}(S_G) = P_GG^-1 alpha_G``, for ``groups`` of numbers of subsets; no batch.
        """
        found = self.at_ridges(rotated, ridges)[0].movedim(1, 0).clone()
        root = self._shifted(ridges).clamp_min(1e-300).sqrt().T[:, None]  # (R, 1, rank)
        for rows in groups:
            half = self.vectors[rows] / root
            found[:, rows] = torch.linalg.solve(half @ half.mT, found[:, rows])
        return found

    def at_ridges(self, rotated: Tensor, ridges: Tensor) -> tuple[Tensor, Tensor]:
        """Dual coefficients (..., m, R, q) at ``ridges`` (..., R), and ``P_ii`` (..., m, R, 1)."""
        known = 1.0 / self._shifted(ridges)  # (..., rank, R)
        scaled = known[..., None] * rotated[..., None, :]  # (..., rank, R, q)
        dual = (self.vectors @ scaled.flatten(-2)).unflatten(-1, scaled.shape[-2:])
        return dual, (self.vectors.square() @ known).clamp_min(1e-30)[..., None]

    def signal_variance(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Prior variance per unit of kernel that makes leave-one-out errors standard, (..., q).

        Leave-one-out errors have variance ``1 / P_ii``, so this is the mean of ``e_i^2 P_ii``.
        """
        return (self.dual(rotated, ridge).square() / self._precision(ridge)).mean(-2)

    def explained(self, parts: Tensor, ridge: Tensor) -> Tensor:
        """``diag(R_a P R_b^T)`` of functionals R_a, (k, k, rows, q): what the scores explain.

        ``parts`` are (k, rows, m); constants in a row change nothing.
        """
        known = 1.0 / self._shifted(ridge)  # (rank, q)
        seen = parts @ self.vectors  # (k, rows, rank)
        found = seen.new_zeros(len(seen), *seen.shape[:2], known.shape[1])
        live = [a for a in range(len(seen)) if bool(parts[a].any())]
        for a in live:
            for b in live[: live.index(a) + 1]:
                found[a, b] = found[b, a] = (seen[a] * seen[b]) @ known
        return found

    def loo_variance(self, ridge: Tensor | float) -> Tensor:
        """Variance of leave-one-out residuals in units of the signal variance, (..., m, 1 or q)."""
        return 1.0 / self._precision(ridge)

    def precisions(self, rows: Tensor, ridge: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """P among ``rows`` (k,), (k, k), with the columns (c,) it is for, of ridges (q,)."""
        levels, index = ridge.unique(return_inverse=True)
        for number, shifted in enumerate(self._shifted(levels).T):
            half = self.vectors[rows] / shifted.clamp_min(1e-300).sqrt()
            yield (index == number).nonzero()[:, 0], half @ half.T

    def whitened(self, rows: Tensor, ridge: float) -> Tensor:
        """(rows, rank) whose products with each other are ``rows P rows^T``."""
        return rows @ self.vectors / self._shifted(ridge)[:, 0].clamp_min(1e-300).sqrt()

    def noise_gain(
        self,
        rows: Tensor,
        ridge: Tensor,
        more: Tensor,
        scale: Tensor,
        noise: Tensor,
        of_mean: Tensor | float = 0.0,
    ) -> Tensor:
        """``diag(R P N P R^T)`` of the same rows, (rows, q): what noise N adds to an answer.

        ``noise`` (m, q) is the diagonal of N; columns without noise cost nothing. ``of_mean``
        (rows, 1) is how much of the mean score is in the answer, too.
        """
        a, b = rows @ self.vectors, more @ self.vectors
        if bool((noise == noise[0]).all() & (self.share == self.share[0]).all()):
            # weights of the scores in P are orthogonal to each other, and to the mean
            known = self.vectors.square().sum(0)[:, None] / self._shifted(ridge).square()
            both, own = (a * b) @ known, b.square() @ known
            squares = a.square() @ known + scale * (2 * both + scale * own)
            return noise[0] * (squares.clamp_min(0.0) + of_mean * of_mean / self.num_subsets)
        gain = a.new_zeros(len(a), len(ridge))
        for j in noise.any(0).nonzero()[:, 0].tolist():
            weights = ((a + scale[j] * b) / self._shifted(ridge[j])[:, 0]) @ self.vectors.T
            gain[:, j] = (weights + of_mean * self.share).square() @ noise[:, j]
        return gain

    def _shifted(self, ridge: Tensor | float) -> Tensor:
        ridge = torch.as_tensor(ridge, dtype=torch.float64).to(self.eigenvalues)
        ridge = ridge[None] if ridge.ndim == 0 else ridge
        return self.eigenvalues[..., None] + ridge[..., None, :]  # (..., rank, 1 or q)

    def _precision(self, ridge: Tensor | float) -> Tensor:
        """``P_ii``, (..., m, 1 or q)."""
        if isinstance(ridge, Tensor) and ridge.numel() > _FEW_RIDGES:
            levels, index = ridge.unique(return_inverse=True)
            if len(levels) < ridge.shape[-1]:  # many columns share few ridges
                each = self._precision(levels.expand(*ridge.shape[:-1], -1))
                return each.take_along_dim(index[..., None, :], -1)
        return (self.vectors.square() @ (1.0 / self._shifted(ridge))).clamp_min(1e-30)


_DEPENDENT = 1e-8
"""Share of a function that must be left beside the intercept, and beside the other functions."""


class TrendRidge:
    """:class:`SpectralRidge` with more functions of unpenalised coefficients, own ones per column.

    A function that is constant on the subsets, or a sum of others, is told from them by nothing:
    coefficients are those of the smallest norm.

    Shapes: p functions of each of q columns, basis (p, m, q), coefficients (p, q).
    """

    def __init__(self, factor: SpectralRidge, basis: Tensor) -> None:
        """``basis`` (p, m, q) are the functions' values on the subsets of ``factor``."""
        self.factor = factor
        self.basis_mean = torch.einsum("m,pmq->pq", factor.share, basis) * float(factor.center)
        rotated = torch.stack([factor.rotate(values) for values in basis], 2).transpose(0, 1)
        largest = basis.abs().amax(1).T  # (q, p); squares of values beside it can be held
        largest = torch.where(largest > 0, largest, 1.0)
        size = largest * (basis / largest.T[:, None]).square().sum(1).T.sqrt().clamp_min(1.0)
        left, values, right = torch.linalg.svd(rotated / size[:, None], full_matrices=False)
        self._kept = values > _DEPENDENT * values.amax(1, keepdim=True).clamp_min(1.0)  # (q, k)
        self._basis = left * self._kept[:, None]  # (q, rank, k) orthonormal, in the eigenbasis
        inverse = self._kept / torch.where(self._kept, values, 1.0)
        # (q, p, k): coefficients of the functions, of those of the orthonormal ones
        self._back = right.transpose(1, 2) * inverse[:, None] / size[..., None]

    @property
    def num_functions(self) -> Tensor:
        """(q,) how many of the functions tell anything."""
        return self._kept.sum(1)

    def columns(self, columns: Tensor) -> "TrendRidge":
        """The same for some of the columns."""
        chosen = copy(self)
        chosen.basis_mean = self.basis_mean[:, columns]
        for name in ("_kept", "_basis", "_back"):
            setattr(chosen, name, getattr(self, name)[columns])
        return chosen

    def coefficients(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """``b``, (p, q), of scores given as ``factor.rotate(y)``."""
        return torch.einsum("qpk,qk->pq", self._back, self._solved(rotated, ridge)[0])

    def dual(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Dual coefficients alpha, (m, q)."""
        return self.factor.dual(self._solved(rotated, ridge)[1], ridge)

    def leave_one_out(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """Exact residuals, (m, q), intercept and coefficients fitted anew each time."""
        return self.dual(rotated, ridge) / self._precision(ridge)

    def signal_variance(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        """See :meth:`SpectralRidge.signal_variance`, (q,)."""
        return (self.dual(rotated, ridge).square() / self._precision(ridge)).mean(0)

    def log_likelihood(self, rotated: Tensor, ridge: Tensor | float) -> Tensor:
        r"""Restricted log-likelihood, (q,), at the best signal variance, up to a constant.

        .. math:: -\tfrac12 \Big[ \log|\Sigma + \lambda| + \log|G|
                  + (r - p) \log \frac{(z - hb)^T P (z - hb)}{r - p} \Big]

        with r contrasts of the scores (Patterson & Thompson 1971).
        """
        shifted = self.factor._shifted(ridge)
        _, rest = self._solved(rotated, ridge)
        freedom = self.factor.rank - self.num_functions
        scatter = (rest.square() / shifted).sum(0).clamp_min(1e-300) / freedom
        sizes = shifted.log().sum(0) + torch.linalg.slogdet(self._gram(ridge)[1])[1]
        return -(sizes + freedom * scatter.log()) / 2

    def explained(self, parts: Tensor, ridge: Tensor, of_basis: Tensor) -> Tensor:
        """See :meth:`SpectralRidge.explained`; less the coefficients' own variance.

        ``of_basis`` (rows, p, q): the functional of each function, of the first of ``parts``.
        """
        weighted, gram = self._gram(ridge)
        seen = parts @ self.factor.vectors
        left = -torch.einsum("dar,qrk->daqk", seen, weighted)
        left[0] += torch.einsum("apq,qpk->aqk", of_basis, self._back)
        gain = torch.linalg.solve(gram, left[..., None])[..., 0]
        return self.factor.explained(parts, ridge) - (left[:, None] * gain).sum(-1)

    def loo_variance(self, ridge: Tensor | float) -> Tensor:
        """See :meth:`SpectralRidge.loo_variance`, (m, q)."""
        return 1.0 / self._precision(ridge)

    def slopes_in(self, rows: Tensor, ridge: float, of_basis: Tensor) -> Tensor:
        """(rows, k) whose products are what the coefficients add to the covariance of functionals.

        Of a single column; ``rows`` and ``of_basis`` as in :meth:`explained`.
        """
        weighted, gram = self._gram(ridge)
        left = of_basis[..., 0] @ self._back[0] - rows @ self.factor.vectors @ weighted[0]
        root = torch.linalg.cholesky(gram[0])
        return torch.linalg.solve_triangular(root, left.T, upper=False).T

    def precisions(self, rows: Tensor, ridge: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`SpectralRidge.precisions`; each column has its own."""
        weighted, gram = self._gram(ridge)
        on_subsets = self.factor.vectors[rows] @ weighted  # (q, rows, k)
        for columns, precision in self.factor.precisions(rows, ridge):
            for j in columns.tolist():
                part = on_subsets[j] @ torch.linalg.solve(gram[j], on_subsets[j].T)
                yield columns.new_tensor([j]), precision - part

    def noise_gain(
        self,
        rows: Tensor,
        ridge: Tensor,
        more: Tensor,
        scale: Tensor,
        noise: Tensor,
        of_basis: Tensor,
    ) -> Tensor:
        """See :meth:`SpectralRidge.noise_gain`, the coefficients' part in an answer included."""
        a, b = rows @ self.factor.vectors, more @ self.factor.vectors
        _, gain = self._gain(rows, ridge, more, scale, of_basis)
        weighted, _ = self._gram(ridge)
        shifted = self.factor._shifted(ridge)
        found = a.new_zeros(len(a), len(ridge))
        for j in noise.any(0).nonzero()[:, 0].tolist():
            weights = (a + scale[j] * b) / shifted[:, j] + gain[:, j] @ weighted[j].T
            found[:, j] = (weights @ self.factor.vectors.T).square() @ noise[:, j]
        return found

    def _gain(
        self, rows: Tensor, ridge: Tensor, more: Tensor, scale: Tensor, of_basis: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the kernel leaves of the functions in an answer, (rows, q, k); and that by G^-1."""
        weighted, gram = self._gram(ridge)
        a, b = rows @ self.factor.vectors, more @ self.factor.vectors  # (rows, rank)
        by_kernel = torch.einsum("ar,qrk->aqk", a, weighted)
        by_kernel += torch.einsum("ar,q,qrk->aqk", b, scale, weighted)
        left = torch.einsum("apq,qpk->aqk", of_basis, self._back) - by_kernel
        return left, torch.linalg.solve(gram, left[..., None])[..., 0]

    def _gram(self, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
        """``D h`` (q, rank, k) and ``G`` (q, k, k), of 1 where a function is left out."""
        weighted = self._basis / self.factor._shifted(ridge).T[..., None]
        gram = self._basis.transpose(1, 2) @ weighted
        return weighted, gram + torch.diag_embed((~self._kept).to(gram))

    def _solved(self, rotated: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
        """Coefficients (q, k) of the orthonormal functions, and ``z - h b`` (rank, q)."""
        weighted, gram = self._gram(ridge)
        found = torch.linalg.solve(gram, torch.einsum("qrk,rq->qk", weighted, rotated))
        return found, rotated - torch.einsum("qrk,qk->rq", self._basis, found)

    def _precision(self, ridge: Tensor | float) -> Tensor:
        """``P~_ii``, (m, q)."""
        weighted, gram = self._gram(ridge)
        on_subsets = self.factor.vectors @ weighted  # (q, m, k)
        part = on_subsets * torch.linalg.solve(gram, on_subsets.transpose(1, 2)).transpose(1, 2)
        return (self.factor._precision(ridge) - part.sum(2).T).clamp_min(1e-30)
