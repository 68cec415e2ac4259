r"""Which subsets to score next: those that tell most of what is asked of the surrogate.

Given the scores so far, an answer L F (an attribution, say) and the score y(S) of a further subset
are jointly normal. With their covariance c_L(S) and the variance v(S) of that score, scoring S
takes

.. math:: c_L(S)^2 / v(S)

off the variance of L F, whatever the score turns out to be: subsets can be compared, and chosen one
after another, before any is trained on. A choice T changes all candidates by a row of a Cholesky
factor, ``w(S) = c(T, S) / sqrt(v(T))``:

.. math:: c_L(S) \mathrel{-}= c_L(T)\, w(S) / \sqrt{v(T)}, \qquad v(S) \mathrel{-}= w(S)^2 .

Then every chosen subset is taken out and the best put in its place, until none is better. With
``A`` the inverse covariance of the chosen scores, taking out number i adds ``(c_L A)_i (A c)_i /
A_ii`` to c_L and ``(A c)_i^2 / A_ii`` to v.

Readouts use observed scores where they stand in the table (:mod:`.surrogate`), so what is peculiar
to a subset that a readout compares counts as part of the answer: leave-one-out effects want the
subsets that they compare, and once all of these are scored, no other tells more. Kernel, ridge and
noise are taken as fitted: what a wrong kernel misses is not in its variance. Fit again after every
few scores.

Estimates beside the scores have coefficients that a further score tells of, too; their surrogates
are taken as they are.

Shapes: n tasks, m fitted subsets, c candidates, k chosen, r answers (n attributions); float64.

References: *Cohn, Ghahramani & Jordan 1996, arXiv:cs/9603104* (choice by variance); *Fedorov 1972,
Theory of Optimal Experiments* (exchange).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import Tensor

from ksm_ext.arrays import ArrayLike, aligned, position
from ksm_ext.checks import check_choice, check_positive_int, check_several, checked, message
from ksm_ext.subsets import Question, design, distinct_rows, mixed_sizes
from ksm_ext.surrogates.kernels import Identity, Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.posterior import FittedSubsets, Functionals, TrendFunctionals
from ksm_ext.surrogates.readouts import functionals
from ksm_ext.surrogates.spectral import SpectralRidge, TrendRidge
from ksm_ext.surrogates.surrogate import Surrogate, check_surrogate
from ksm_ext.surrogates.terms import KernelTerm

_POOL, _POOL_PER_CHOICE = 1024, 8  # candidates that are drawn
_QUERIES = 256  # subsets whose predictions stand for those of all
_SWEEPS = 10  # of exchanges; two or three are usual


@checked
def next_best(
    surrogate: Surrogate,
    num_subsets: int,
    readout: Question = "shapley",
    *,
    candidates: ArrayLike | None = None,
    targets: Sequence[str | int] | None = None,
    seed: int = 0,
    allow_fewer: bool = False,
) -> Any:
    """The subsets that shrink the variance of an answer most, once scored.

    The posterior variance is summed over tasks (or, for ``"prediction"``, over 256 subsets of all
    sizes alike) and over targets, each in units of its own standard deviation. Chosen greedily,
    then exchanged: no single exchange with a candidate would do better. Costs ``O(c m^2 + c k (c +
    n k))`` and ``8 c (c + m)`` bytes per ridge of the surrogate.

    Args:
        surrogate: A surrogate of 0/1 masks.
        num_subsets: k.
        readout: ``"loo"``, ``"shapley"``, ``"banzhaf"`` or ``"prediction"``.
        candidates: (c, n) subsets to choose from. Those that were fitted are passed over. By
            default 1,024, or 8 k if that is more: the subsets that lack one task, single tasks, and
            others as :func:`ksm_ext.subsets.design` draws them, in which tasks that never varied
            stay as they were. The empty subset is not among them.
        targets: Names or numbers of the targets that count; by default all.
        seed: Seed of the candidates: the same seed gives the same subsets.
        allow_fewer: Whether to answer with all candidates where there are fewer than k.

    Returns:
        (k, n) bool, the one that tells most first: of the array kind of the fitted scores and on
        their device, with the names of the tasks.

    Raises:
        ValueError: If ``readout`` or a target is unknown, the surrogate is of real weights, or
            there are fewer than ``num_subsets`` candidates.
    """
    check_surrogate(surrogate)
    check_choice("readout", readout, get_args(Question))
    num_subsets = check_positive_int("num_subsets", num_subsets)
    if not surrogate.masks.binary:
        remedy = "Draw mixtures by ksm_ext.subsets.dirichlet."
        raise ValueError(message("surrogate", "one of 0/1 masks", "one of mixtures", remedy))
    if not surrogate.has_intervals:
        remedy = "Fit 0/1 masks with this version: its variance is what is made smaller."
        raise ValueError(message("surrogate", "one that has intervals", "one without", remedy))
    pool = _pool(surrogate, num_subsets, candidates, seed)
    if len(pool) < num_subsets and not allow_fewer:
        remedy = "Ask for fewer, give more `candidates`, or pass allow_fewer=True."
        expected = f"at most {len(pool)}, the number of subsets left to choose from"
        raise ValueError(message("num_subsets", expected, str(num_subsets), remedy))
    weights = _target_weights(surrogate, targets)
    axes = {"subset": None, "task": surrogate.task_names}
    if not len(pool):
        return surrogate.kind.restore(pool, axes)
    num_subsets = min(num_subsets, len(pool))
    posteriors = list(_posteriors(surrogate, pool, readout, weights, seed))
    chosen = _greedy(posteriors, num_subsets, torch.ones(len(pool), dtype=torch.bool))
    chosen = _exchanged(posteriors, chosen)
    allowed = torch.zeros(len(pool), dtype=torch.bool)
    allowed[chosen] = True
    best = pool[_greedy(posteriors, num_subsets, allowed)]
    return surrogate.kind.restore(best, axes)


# -- candidates ---------------------------------------------------------------------------------


def _pool(
    surrogate: Surrogate, num_subsets: int, candidates: ArrayLike | None, seed: int
) -> Tensor:
    """(c, n) bool, on the CPU: distinct subsets that were not fitted."""
    fitted, varying = surrogate.masks.values.cpu(), surrogate.varying.cpu()
    if candidates is None:
        count, n = max(_POOL, _POOL_PER_CHOICE * num_subsets), int(varying.sum())
        if n < 2:
            return fitted[:0]
        pool = fitted[:1].repeat(count, 1)
        drawn = design(n, count, known=fitted[:, varying], seed=seed, allow_fewer=True)
        pool = pool[: len(drawn)]
        pool[:, varying] = drawn
        return pool
    (candidates,) = aligned(
        {"candidates": (candidates, "subset", "task")}, {"task": surrogate.task_names}
    )
    given = Masks.of(candidates, num_tasks=surrogate.masks.num_tasks)
    if not given.binary:
        remedy = "A subset has a task or does not."
        raise ValueError(message("candidates", "0 or 1", "other numbers", remedy))
    pool = given.values.cpu()
    _, first = distinct_rows(torch.cat([fitted, pool])[:, varying])
    return pool[first[first >= len(fitted)] - len(fitted)]


def _target_weights(surrogate: Surrogate, targets: Sequence[str | int] | None) -> Tensor:
    """(q,) how much the variance of each latent column counts."""
    counted = torch.ones_like(surrogate.unit)
    if targets is not None:
        one = [targets] if isinstance(targets, (str, int)) else targets
        names = check_several("targets", one, "names or numbers")
        if not names:
            raise ValueError(message("targets", "one at least", "none", "Leave it out for all."))
        counted = torch.zeros_like(counted)
        counted[[position("targets", name, surrogate.target_names) for name in names]] = 1.0
    return counted if surrogate.rotation is None else counted @ surrogate.rotation.square()


# -- posterior ----------------------------------------------------------------------------------


class _Posterior:
    """What is known of the answers and of the candidates' scores, for the columns of one ridge."""

    def __init__(self, weight: float, cross: Tensor, joint: Tensor, ridge: float) -> None:
        """Nothing is chosen yet.

        Args:
            weight: How much the variance of these columns counts.
            cross: (r, c) covariance of the answers with the candidates' scores.
            joint: (c, c) covariance of the scores of different candidates, and of two scores of
                the same one.
            ridge: Variance of what a score has to itself.
        """
        self.weight, self.ridge, self._joint, self._cross = weight, ridge, joint, cross
        self._variance = joint.diagonal() + ridge
        self.forget()

    def forget(self) -> None:
        """Choose nothing."""
        self.cross, self.variance = self._cross, self._variance
        self._rows = self._joint.new_empty(0, len(self._joint))

    def choose(self, candidate: int) -> None:
        """As if it had been scored."""
        root = self.variance[candidate].sqrt()
        row = (self._joint[candidate] - self._rows[:, candidate] @ self._rows) / root
        self.cross = self.cross - torch.outer(self.cross[:, candidate] / root, row)
        self.variance = self.variance - row.square()
        self._rows = torch.cat([self._rows, row[None]])

    def gains(self) -> Tensor:
        """(c,) how much of the answers' variance each candidate would take away."""
        return self._gains(self.cross, self.variance)

    def gains_in_place_of(self, chosen: list[int], place: int) -> Tensor:
        """(c,) the same with ``chosen[place]`` of all that were chosen taken out again."""
        joint = self._joint[chosen]
        own = torch.eye(len(chosen), dtype=joint.dtype, device=joint.device)[place]
        weights = torch.linalg.solve(joint[:, chosen] + self.ridge * torch.diag(0 * own + 1), own)
        row, scale = weights @ joint, weights[place]
        cross = self.cross + torch.outer(self._cross[:, chosen] @ weights, row / scale)
        return self._gains(cross, self.variance + row.square() / scale)

    def _gains(self, cross: Tensor, variance: Tensor) -> Tensor:
        certain = variance <= 1e-10 * self._variance.max()  # a score that is known already
        return self.weight * torch.where(certain, 0.0, cross.square().sum(0) / variance)


def _posteriors(
    surrogate: Surrogate, pool: Tensor, readout: Question, weights: Tensor, seed: int
) -> Iterator[_Posterior]:
    """One for every kernel and ridge of the surrogate that counts."""
    active = surrogate.masks.values[:, surrogate.varying]
    every = Masks(torch.cat([active, pool[:, surrogate.varying.cpu()].to(active.device)]))
    m, taken = len(active), _taken(surrogate, len(pool))
    excluded = torch.cat([surrogate.excluded.any(1), taken.new_zeros(len(pool)).bool()])
    fitted = FittedSubsets(every, surrogate.center, excluded, excluded, None, True)
    query = _query(every.num_tasks, seed).to(active.device)
    asked = _asked(every, readout, fitted, query)
    trend = None if surrogate.trend is None else _trend(surrogate, readout, pool, query)
    for term in surrogate.kernel_terms:
        rows = torch.arange(m, device=active.device) if term.rows is None else term.rows
        longer = replace(term, dual=term.dual.new_zeros(len(every), 0), rows=rows, factor=None)
        answers, observed = asked(term.kernel, longer), asked(Identity(), longer)
        of_scores, _, on_mean = fitted.without_excluded(longer, answers, observed)
        peculiar = observed.of_fitted * (taken if term.nugget_share is None else 1.0)
        share = longer.all_weights()[rows]
        total, share = float(share.sum()), share / share.sum() * float(surrogate.center)
        gram = term.kernel.gram(every[m:], every)  # (c, m + c)
        mean = term.kernel.matmul(every[rows], None, share[:, None])[:, 0]
        shift, seen = gram[:, rows] @ share, gram[:, rows] - mean  # scores less the mean score
        prior = gram[:, m:] - shift - shift[:, None] + share @ mean
        factor = term.factored(Masks(active), center=surrogate.center, solver=surrogate.solver)
        beside, of_trend = None, torch.zeros(0)
        if trend is not None:
            assert isinstance(factor, SpectralRidge)
            beside = TrendRidge(factor, trend.of_fitted[:, rows][..., term.columns])
            means = beside.basis_mean
            of_answers = fitted.of_trend(trend, longer, answers, observed, on_mean, means)
            of_pool = trend.of_fitted[:, m:][..., term.columns] - means[:, None]
            of_trend = torch.cat([of_answers, of_pool.transpose(0, 1)])  # (r + c, L, q_g)
        for columns, ridge, nugget, weight in _ridges(term, weights, trend is not None):
            of_mean = ridge / total * float(surrogate.center)  # the mean score's own variance
            both = of_scores + nugget * peculiar
            together = torch.cat([both[:, rows], seen])
            whitened = factor.whitened(together, ridge)
            known, own = whitened[: len(both)], whitened[len(both) :]
            cross = both[:, m:] - (both[:, rows] @ share)[:, None] - known @ own.T
            joint = prior + of_mean - own @ own.T
            if on_mean is not None:
                cross = cross + on_mean * of_mean
            if beside is not None:
                slopes = beside.columns(columns).slopes_in(together, ridge, of_trend[..., columns])
                cross = cross + slopes[: len(both)] @ slopes[len(both) :].T
                joint = joint + slopes[len(both) :] @ slopes[len(both) :].T
            yield _Posterior(weight, cross, joint, ridge)


def _query(num_tasks: int, seed: int) -> Tensor:
    """(l, n) subsets whose predictions stand for those of all."""
    return mixed_sizes(num_tasks, _QUERIES, range(num_tasks + 1), seed=seed, allow_fewer=True)


def _trend(
    surrogate: Surrogate, readout: Question, pool: Tensor, query: Tensor
) -> TrendFunctionals:
    """The estimates at the fitted subsets and the candidates, and the answers about them."""
    assert surrogate.trend is not None
    fitted, varying = surrogate.masks.values, surrogate.varying
    every = torch.cat([fitted, pool.to(fitted.device)])
    at_every = surrogate.trend.ask(lambda level: level.predict(every, False)).values
    if readout == "prediction":
        asked = fitted[:1].repeat(len(query), 1)
        asked[:, varying] = query
        answers = surrogate.trend.ask(lambda level: level.predict(asked, False)).values
    else:
        answers = surrogate.trend.ask(lambda level: level.attribute(readout, False)).values
        answers = answers[:, varying]
    return TrendFunctionals(answers, at_every)


def _asked(
    every: Masks, readout: Question, fitted: FittedSubsets, drawn: Tensor
) -> Callable[[Kernel, KernelTerm], Functionals]:
    """The answers as functionals of a kernel, on all subsets: the fitted and the candidates."""
    n = every.num_tasks
    if readout != "prediction":
        tasks = torch.arange(n, device=every.values.device)[:, None]
        return lambda kernel, term: Functionals(0.0, functionals(every, kernel, readout, tasks))
    query = Masks(drawn)

    def predictions(kernel: Kernel, term: KernelTerm) -> Functionals:
        if isinstance(kernel, Identity):  # of the smooth part
            return Functionals(0.0, torch.zeros(len(query), len(every)).to(term.dual))
        return fitted.predictions(kernel, query, term, fitted.excluded[:, None])

    return predictions


def _taken(surrogate: Surrogate, num_candidates: int) -> Tensor:
    """(m + c,) 1 where readouts take a score as it is although its noise is unknown, else 0."""
    taken = surrogate.nugget_share > 0  # (m, t)
    of_candidates = (taken & ~surrogate.known & ~surrogate.excluded).any()
    return torch.cat([taken.any(1), of_candidates.expand(num_candidates)]).to(torch.float64)


def _ridges(
    term: KernelTerm, weights: Tensor, apart: bool
) -> Iterator[tuple[Tensor, float, float, float]]:
    """Columns of each ridge, or each ``apart``; the ridge, what of it is peculiar; their weight."""
    nugget = term.ridge * (1.0 if term.nugget_share is None else term.nugget_share)
    pairs, index = torch.stack([term.ridge, nugget]), torch.arange(len(nugget)).to(term.columns)
    if not apart:
        pairs, index = pairs.unique(dim=1, return_inverse=True)
    counted = weights[term.columns] * term.signal_variance
    totals = counted.new_zeros(pairs.shape[1]).index_add_(0, index, counted)
    each = zip(pairs.T.tolist(), totals.tolist(), strict=True)
    for number, ((ridge, peculiar), weight) in enumerate(each):
        if weight > 0:
            yield (index == number).nonzero()[:, 0], ridge, peculiar, weight


# -- choice -------------------------------------------------------------------------------------


def _total(gains: Iterable[Tensor]) -> Tensor:
    """(c,) sum over posteriors, on the CPU."""
    return torch.stack(list(gains)).sum(0).cpu()


def _greedy(posteriors: list[_Posterior], count: int, allowed: Tensor) -> list[int]:
    """Candidates one after another, each the best of those ``allowed`` (c,) given the former."""
    chosen: list[int] = []
    allowed = allowed.clone()
    for posterior in posteriors:
        posterior.forget()
    for _ in range(count):
        gains = _total(posterior.gains() for posterior in posteriors)
        chosen.append(int(torch.where(allowed, gains, -1.0).argmax()))
        allowed[chosen[-1]] = False
        for posterior in posteriors:
            posterior.choose(chosen[-1])
    return chosen


def _exchanged(posteriors: list[_Posterior], chosen: list[int]) -> list[int]:
    """``chosen`` with every one replaced where another candidate would tell more in its place."""
    for _ in range(_SWEEPS):
        before = list(chosen)
        for place in range(len(chosen)):
            gains = _total(each.gains_in_place_of(chosen, place) for each in posteriors)
            others = [candidate for candidate in chosen if candidate != chosen[place]]
            own = float(gains[chosen[place]])
            gains[others] = -1.0
            best = int(gains.argmax())
            if float(gains[best]) > own * (1 + 1e-9):
                chosen = [*chosen[:place], best, *chosen[place + 1 :]]
                for posterior in posteriors:
                    posterior.forget()
                    for candidate in chosen:
                        posterior.choose(candidate)
        if chosen == before:
            break
    return chosen
