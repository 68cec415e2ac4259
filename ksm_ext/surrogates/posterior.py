r"""How uncertain the answers of a surrogate are: the posterior variance of linear functionals.

f is a Gaussian process with kernel ``sigma^2 k``, and the ridge is the variance of what is peculiar
to a subset together with the noise of its score. For a functional L, ``L_a`` its weight of subset
a, and rho the ridge's peculiar part in units of sigma^2,

.. math:: \mathrm{Var} = \sigma^2 \Big[ L k L^T + \rho \sum_S L_S^2 - z P z^T \Big], \qquad
          z = L K + \rho L,

P the inverse of :mod:`.spectral`. With a trend, P and what its coefficients add are those of
:class:`.spectral.TrendRidge`.

**Where the noise is unknown** nothing tells the two parts of the ridge :math:`\lambda` from each
other, and there is a variance for either reading. Answers take what they take of the scores: all
that is peculiar of some subsets, ``A_a = L_a``, nothing of others. If all of the ridge is peculiar
to subsets, or all of it noise, an answer is off by

.. math:: \mathrm{Var}_\lambda + \sigma^2 \lambda^2 (L - A) P (L - A)^T \qquad \text{or} \qquad
          \mathrm{Var}_0 + \sigma^2 \lambda^2 A P A^T

(of a Gaussian posterior the error of the best answer is independent of what another one adds to
it). In between it is in between: whoever takes the larger is safe. Scores that are known to be
exact are peculiar by either reading.

A rough kernel with a small ridge may have followed noise that another kernel leaves out and
predicts left-out subsets as well. If :math:`\nu` is the largest variance of noise of such
(:meth:`.choice.Contest.most_noise`), the second is larger by
:math:`(\nu - \sigma^2 \lambda)_+ |w|^2`, w the weights of the scores in the answer.

Shapes: m subsets, q columns, q_g of them of one term; a row per functional; float64.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import brief
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
        answered: (rows, 1) of :class:`Identity`, 1 where answers take of the fitted scores what is
            peculiar, 0 where they are smooth; None where all do.
    """

    prior: float | Tensor
    of_fitted: Tensor
    on_mean: Tensor | None = None
    answered: Tensor | None = None

    __repr__ = brief

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

    __repr__ = brief


@dataclass(frozen=True, eq=False)
class FittedSubsets:
    """What is known of the m fitted subsets before any question is asked.

    Attributes:
        masks: (m, n) the subsets, of the tasks that vary.
        center: Whether an intercept was fitted.
        exact: (m,) bool: all their scores are known exactly.
        excluded: (m,) bool: a score was left out of the fit, as a value of its own.
        noise: (m, q) variance of the noise of each score; None if unknown.
        all_is_noise: Whether a ridge that is not split counts as noise; else it may be either.
    """

    masks: Masks
    center: bool
    exact: Tensor
    excluded: Tensor
    noise: Tensor | None
    all_is_noise: bool

    __repr__ = brief

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
            return Functionals(prior, rows, None, rows @ answered.any(1).to(rows)[:, None])
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
        """Posterior variance of the module's head for the columns of a term.

        Args:
            term: The kernel term.
            factor: What solves for it.
            smooth: The functionals, of the term's kernel.
            observed: The same, of :class:`Identity`.
            trend: The same, of the functions of a trend.

        Returns:
            (readings, rows, q_g): two readings where the noise is unknown, else one.
        """
        fitted = slice(None) if term.rows is None else term.rows
        all_weights = term.all_weights()
        weights = all_weights[fitted]
        rows, prior, on_mean = self.without_excluded(term, smooth, observed)
        rows, own = rows[:, fitted], observed.of_fitted[:, fitted]  # L K and L
        solver: Any = factor
        of_trend: tuple[Tensor, ...] = ()
        if trend is not None:
            assert isinstance(factor, SpectralRidge)
            solver = TrendRidge(factor, trend.of_fitted[:, fitted][..., term.columns])
            of_trend = (self.of_trend(trend, term, smooth, observed, on_mean, solver.basis_mean),)
        left = self.excluded & (all_weights == 0)  # these scores are certain
        everywhere = observed.prior_column() - observed.of_fitted[:, left].square().sum(1, True)
        taken = torch.ones_like(own[:, :1]) if observed.answered is None else observed.answered
        if term.nugget_share is None:
            nugget, exact = term.ridge, own * (self.exact[fitted] / weights)
        else:
            nugget, exact = term.ridge * term.nugget_share, own * taken
        parts = torch.stack([rows, exact, own - exact])
        explained = solver.explained(parts, term.ridge, *of_trend)  # (3, 3, rows, q)

        def reading(rest: float, others: Tensor) -> Tensor:
            """``others`` (rows, 1): sum of L_S^2; ``rest``: share of what is not exact in it."""
            scale = torch.stack([torch.ones_like(nugget), nugget, rest * nugget])
            known = torch.einsum("aq,abrq,bq->rq", scale, explained, scale)
            found = prior + nugget * others - known
            if on_mean is None:
                return found
            # the mean score has a residual, with parts of these scores in it
            shared = (exact + rest * (own - exact)) @ weights[:, None] / weights.sum()
            of_mean = on_mean.square() * term.ridge / weights.sum()
            return found + of_mean - 2 * nugget * on_mean * shared

        if term.nugget_share is not None:
            variance = reading(0.0, everywhere).clamp_min(0.0) * term.signal_variance
            missed = self._missed_noise(term, term.nugget_share, weights, fitted)
            if missed is not None:
                answer = rows, term.ridge, exact, nugget, missed, *of_trend
                variance = variance + solver.noise_gain(*answer)
            return variance[None]
        all_noise = reading(0.0, (exact * own).sum(1, keepdim=True))
        if self.all_is_noise:
            return all_noise.clamp_min(0.0)[None] * term.signal_variance
        wrong = term.ridge.square() * explained[2, 2]
        peculiar = reading(1.0, everywhere) + (1 - taken) * wrong
        readings = torch.stack([all_noise + taken * wrong, peculiar]).clamp_min(0.0)
        readings = readings * term.signal_variance
        if term.most_noise is None or not isinstance(factor, SpectralRidge):
            return readings
        more = (term.most_noise - term.ridge * term.signal_variance).clamp_min(0.0)
        noise = torch.where(self.exact[fitted, None], 0.0, more)  # (m, q)
        of_mean = 0.0 if on_mean is None else on_mean
        taking = exact + taken * (own - exact)
        readings[0] += factor.noise_gain(rows, term.ridge, taking, term.ridge, noise, of_mean)
        return readings

    def _missed_noise(
        self, term: KernelTerm, nugget_share: Tensor, weights: Tensor, fitted: slice | Tensor
    ) -> Tensor | None:
        """(rows, q_g) known noise that the ridge, shared with others, does not stand for."""
        if self.noise is None:
            return None
        noise = self.noise[:, term.columns][fitted]
        level = (weights[:, None] * noise).mean(0)
        counted = term.ridge * (1 - nugget_share) * term.signal_variance
        missed = (1 - counted / level.clamp_min(1e-300)).clamp(0.0, 1.0)
        missed = torch.where(missed > 1e-6, missed, 0.0) * (level > 0)
        return missed * noise if bool(missed.any()) else None

    def of_trend(
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
