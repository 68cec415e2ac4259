r"""How uncertain the answers of a surrogate are: the posterior variance of linear functionals.

f is a Gaussian process with kernel ``sigma^2 k``, and the ridge is the variance of what is peculiar
to a subset together with the noise of its score. For a functional L, ``L_a`` its weight of subset
a, and rho the ridge's peculiar part in units of sigma^2,

.. math:: \mathrm{Var} = \sigma^2 \Big[ L k L^T + \rho \sum_S L_S^2 - z P z^T \Big], \qquad
          z = L K + \rho L,

P the inverse of :mod:`.spectral`. Where the noise is unknown, L is restricted to subsets whose
scores are known to be exact. With a trend, P and what its coefficients add are those of
:class:`.spectral.TrendRidge`.

Shapes: m subsets, q columns, q_g of them of one term; a row per functional; float64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksm_ext.surrogates.kernels import Identity, Kernel
from ksm_ext.surrogates.krylov import KrylovRidge
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge, TrendRidge
from ksm_ext.surrogates.terms import KernelTerm


@dataclass(frozen=True, eq=False)
class Functionals:
    """Linear functionals L of a function of subsets, a row each.

    Attributes:
        prior: ``L k L^T``, a number or (rows,).
        of_fitted: (rows, m) ``L K``; for :class:`Identity`, the weight of each fitted subset.
        on_mean: (rows, 1) how much of the mean score was taken out of L, where L does not ignore
            constants.
    """

    prior: float | Tensor
    of_fitted: Tensor
    on_mean: Tensor | None = None

    def prior_column(self) -> Tensor:
        """``L k L^T``, (rows, 1)."""
        prior = torch.as_tensor(self.prior, dtype=torch.float64, device=self.of_fitted.device)
        return prior.expand(len(self.of_fitted))[:, None]


@dataclass(frozen=True, eq=False)
class TrendFunctionals:
    """The same functionals of the L functions of a trend.

    Attributes:
        of_rows: (L, rows, t) the functionals.
        of_fitted: (L, m, t) the functions at the fitted subsets.
    """

    of_rows: Tensor
    of_fitted: Tensor


@dataclass(frozen=True, eq=False)
class FittedSubsets:
    """What is known of the m fitted subsets before any question is asked.

    Attributes:
        masks: (m, n) the subsets, of the tasks that vary.
        center: Whether an intercept was fitted.
        exact: (m,) bool: all their scores are known exactly.
        excluded: (m,) bool: a score was left out of the fit, as a value of its own.
        noise: (m, q) variance of the noise of each score; None if unknown.
    """

    masks: Masks
    center: bool
    exact: Tensor
    excluded: Tensor
    noise: Tensor | None

    def predictions(
        self, kernel: Kernel, query: Masks, term: KernelTerm, answered: Tensor
    ) -> Functionals:
        """``F(S)`` of the subsets in ``query``, as functionals of ``kernel``.

        With an intercept, ``F(S)`` is taken relative to the mean score, which has residuals of its
        own, that of S perhaps among them: their variance is ridge / sum of weights.

        Args:
            kernel: The kernel of ``term``, or :class:`Identity` for the observed scores.
            query: (l, n) subsets.
            term: Whose mean score it is.
            answered: (m, t) bool: scores that answer for their subset.
        """
        rows = kernel.gram(query, self.masks)  # (l, m)
        prior = kernel.diagonal(query)
        if isinstance(kernel, Identity):
            return Functionals(prior, rows * answered.any(1))
        if not self.center:
            return Functionals(prior, rows)
        weights = term.all_weights()
        share = weights / weights.sum()  # (m,)
        mean = kernel.matmul(self.masks, None, share[:, None])[:, 0]
        prior = prior - 2 * rows @ share + share @ mean
        return Functionals(prior, rows - mean, rows.new_ones(len(rows), 1))

    def variance(
        self,
        term: KernelTerm,
        factor: SpectralRidge | KrylovRidge,
        smooth: Functionals,
        observed: Functionals,
        trend: TrendFunctionals | None = None,
    ) -> Tensor:
        """(rows, q_g) posterior variance of the module's head for the columns of a term.

        Args:
            term: The kernel term.
            factor: What solves for it.
            smooth: The functionals, of the term's kernel.
            observed: The same, of :class:`Identity`.
            trend: The same, of the functions of a trend.
        """
        fitted = slice(None) if term.rows is None else term.rows
        all_weights = term.all_weights()
        weights = all_weights[fitted]
        rows, prior, on_mean = self.without_excluded(term, smooth, observed)
        if term.nugget_share is None:  # all of the ridge where a score is known, else nothing
            nugget = term.ridge
            exact = observed.of_fitted[:, fitted] * (self.exact[fitted] / weights)
            others = (exact * observed.of_fitted[:, fitted]).sum(1, keepdim=True)
        else:
            nugget = term.ridge * term.nugget_share
            exact = observed.of_fitted[:, fitted]  # L_a
            left = self.excluded & (all_weights == 0)  # these scores are certain
            of_left = observed.of_fitted[:, left].square().sum(1, keepdim=True)
            others = observed.prior_column() - of_left
        if on_mean is not None:  # the mean score has a residual, with parts of these scores in it
            share = weights / weights.sum()
            prior = prior + on_mean.square() * term.ridge / weights.sum()
            prior = prior - 2 * nugget * on_mean * (exact @ share)[:, None]
        solver: Any = factor
        of_trend: tuple[Tensor, ...] = ()
        if trend is not None:
            assert isinstance(factor, SpectralRidge)
            basis = trend.of_fitted[:, fitted][..., term.columns]
            solver = TrendRidge(factor, basis)
            of_trend = (self._of_trend(trend, term, smooth, observed, on_mean, solver.basis_mean),)
        explained = solver.explained_variance(rows[:, fitted], term.ridge, exact, nugget, *of_trend)
        variance = (prior + nugget * others - explained).clamp_min(0.0) * term.signal_variance
        if term.nugget_share is None or self.noise is None:
            return variance
        # a ridge shared with others may stand for less than the noise of a target
        noise = self.noise[:, term.columns][fitted]  # (rows, q_g)
        level = (weights[:, None] * noise).mean(0)
        counted = (term.ridge - nugget) * term.signal_variance
        missed = (1 - counted / level.clamp_min(1e-300)).clamp(0.0, 1.0)
        missed = torch.where(missed > 1e-6, missed, 0.0) * (level > 0)
        if not bool(missed.any()):
            return variance
        rest = missed * noise
        noisy = rows[:, fitted], term.ridge, exact, nugget, rest, *of_trend
        return variance + solver.noise_gain(*noisy)

    def _of_trend(
        self,
        trend: TrendFunctionals,
        term: KernelTerm,
        smooth: Functionals,
        observed: Functionals,
        on_mean: Tensor | None,
        mean: Tensor,
    ) -> Tensor:
        """(rows, L, q_g) of the trend, without what :meth:`without_excluded` takes out of L."""
        found = trend.of_rows[..., term.columns]  # (L, rows, q_g)
        if smooth.on_mean is None:
            left = self.excluded & (term.all_weights() == 0)
            found = (
                found - observed.of_fitted[:, left] @ trend.of_fitted[:, left][..., term.columns]
            )
        if on_mean is not None:
            found = found - on_mean * mean[:, None]
        return found.transpose(0, 1)

    def without_excluded(
        self, term: KernelTerm, smooth: Functionals, observed: Functionals
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """``L K``, ``L k L^T`` and the part of the mean score, without the scores left out.

        The score of an empty subset that was left out of the fit is certain: only the rest of L is
        not. That no longer ignores constants, so it is taken relative to the mean score.
        """
        rows, prior, on_mean = smooth.of_fitted, smooth.prior_column(), smooth.on_mean
        if term.rows is None or on_mean is not None:
            return rows, prior, on_mean
        left = torch.ones(len(self.masks), dtype=torch.bool, device=rows.device)
        left[term.rows] = False
        weights = term.all_weights()
        share = (weights / weights.sum())[:, None] * float(self.center)  # (m, 1)
        for place in (left & self.excluded).nonzero()[:, 0].tolist():
            point = self.masks[place : place + 1]
            weight = observed.of_fitted[:, place, None]
            mean = term.kernel.matmul(self.masks, None, share)  # (m, 1)
            moved = mean.T - term.kernel.gram(point, self.masks)  # (1, m), of mean minus point
            change = rows @ share - rows[:, place, None]
            size = moved @ share - moved[:, place, None]
            prior = prior + 2 * weight * change + weight.square() * size
            rows = rows + weight * moved
            on_mean = -weight if self.center else None
        return rows, prior, on_mean
