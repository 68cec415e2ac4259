"""Targets that are fitted to the same subsets, standardised, and told from their noise.

Targets that miss different scores, or were scored with different precision, are fitted separately,
each group on its own subsets. So are those whose score of the empty subset is no continuation of
the other scores: that one is left out of their fit.

Shapes: m distinct subsets, n tasks, t targets; of a part, its rows of subsets and columns of
targets; float64.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ksm_ext.checks import brief
from ksm_ext.surrogates.candidates import Tried
from ksm_ext.surrogates.choice import Choice, Contest, Model
from ksm_ext.surrogates.judgement import Scores
from ksm_ext.surrogates.kernels import Exponential
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.observations import (
    Observations,
    nugget_share,
    nugget_to_noise,
    precision_weights,
    relative_noise,
)
from ksm_ext.surrogates.search import MANY_SUBSETS, Fits, Search, random_rows
from ksm_ext.surrogates.terms import KEPT, KernelTerm
from ksm_ext.surrogates.trials import KernelTrial, judged_kernels

_EMPTY_DEVIATIONS = 4.0  # by which the empty subset's score is no continuation of the others
_EMPTY_FROM = 8  # subsets that can tell
_EMPTY_ROWS = 512  # of them looked at
_UNEVEN = 1.05  # ratio of weights from which a second fit is worth it


@dataclass(frozen=True, eq=False)
class Part:
    """Targets that are fitted to the same subsets, and their model.

    Attributes:
        rows: The subsets, int64.
        columns: The targets, int64.
        shift: (columns,) what was subtracted from the scores.
        unit: (columns,) what they were divided by.
        weights: (rows,) weights of the subsets in the fit.
        model: The fit, of standardised scores.
        nugget_share: (rows, columns) share of residuals that is peculiar to subsets.
        noise: (columns,) variance of the noise at weight 1; None if it is unknown, or counts for
            nothing because the ridge is given.
        candidates: What was tried; with the first part of several that were fitted together.
    """

    rows: Tensor
    columns: Tensor
    shift: Tensor
    unit: Tensor
    weights: Tensor
    model: Model
    nugget_share: Tensor
    noise: Tensor | None
    candidates: list[Tried]

    __repr__ = brief

    def kernel_terms(self, m: int, place: Tensor) -> Iterator[KernelTerm]:
        """The terms over all m subsets, with latent columns numbered by ``place``."""
        for term in self.model.kernel_terms:
            dual = term.dual.new_zeros(m, term.dual.shape[1])
            dual[self.rows] = term.dual
            yield replace(
                term,
                columns=place[term.columns],
                dual=dual,
                rows=None if len(self.rows) == m else self.rows,
                weights=None if bool((self.weights == 1).all()) else self.weights,
                nugget_share=self._nugget_of_ridge(term),
            )

    def _nugget_of_ridge(self, term: KernelTerm) -> Tensor | None:
        """(q_g,) see :attr:`KernelTerm.nugget_share`."""
        if self.noise is None:
            return None
        if self.model.rotation is None:
            return self.nugget_share.mean(0)[term.columns]
        noise = (self.model.rotation.square().T @ self.noise)[term.columns]
        total = (term.ridge * term.signal_variance).clamp_min(1e-300)
        return (1 - noise / total).clamp(0.0, 1.0)


def varying_tasks(masks: Masks, search: Search) -> Tensor:
    """(n,) bool: tasks that are in some subsets and not in others.

    Without an intercept all count: one that is in every subset stands in for it.
    """
    values = masks.values
    if not search.removes_mean:
        return torch.ones(values.shape[1], dtype=torch.bool, device=values.device)
    return (values != values[0]).any(0)


def fitted_parts(observed: Observations, search: Search) -> list[Part]:
    """A model of every group of targets with the same subsets, alike in precision.

    Groups share nothing: those of few subsets, whose products are too small to be shared between
    threads, take a thread each.
    """
    varying = varying_tasks(observed.masks, search)
    active, search = Masks(observed.masks.values[:, varying]), search.of_tasks(varying)
    groups = list(_groups(active, observed, search))

    def fitted(group: tuple[Tensor, Tensor]) -> list[Part]:
        rows, columns = group
        masks, part = active[rows], observed.part(rows, columns)
        scores, shift = _standardised(part, search)
        part_search = search.part(rows, columns)
        if part.noise is None or search.all_is_noise:
            ((fits, candidates),) = part_search.fit([masks], scores)
            share = part.known.to(torch.float64)
            # nothing tells noise: take none out
            if masks.binary and not (search.all_is_noise or observed.uneven):
                share = torch.ones_like(share)
        else:
            variance = (part.noise / part.unit).square()
            of = masks, scores, variance, part_search
            scores, fits, candidates, share = _fitted_to_noise(*of)
        terms = [term for model, _ in fits for term in model.kernel_terms]
        held = len({id(term.factor and term.factor.solver) for term in terms}) * len(groups)
        if len(rows) ** 2 * held > KEPT**2:  # more eigenvectors than may be kept
            fits = [(model.without_factors(), targets) for model, targets in fits]
        found = _parts(fits, rows, columns, shift, part.unit, scores, share)
        return [replace(each, candidates=candidates * (i == 0)) for i, each in enumerate(found)]

    if len(groups) == 1 or len(active) > MANY_SUBSETS:
        return [part for group in groups for part in fitted(group)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return [part for parts in pool.map(fitted, groups) for part in parts]


def parts_of_many(
    tables: Sequence[Masks], scores: Tensor, search: Search, noise: Tensor | None = None
) -> Iterator[tuple[int, list[Part]]]:
    """A model of every table, all fitted together, as :func:`fitted_parts` fits each.

    Args:
        tables: (m, n) distinct 0/1 masks of each, with no constant task.
        scores: (b, m, t) scores, none missing, of targets that vary.
        search: How to fit.
        noise: (b, t) standard deviation of their noise, the same for all subsets, or None.

    Yields:
        The number of a table, and its model. Tables whose empty subset is no continuation of the
        others are left out.
    """
    b, m, t = scores.shape
    flat = scores.movedim(0, 1).flatten(1)  # (m, b t)
    once = torch.ones_like(flat, dtype=torch.int64)
    everything = Observations(tables[0], flat, once, None, once == 0, 0)
    found, shift = _standardised(everything, search)
    values = found.values[0].unflatten(1, (b, t)).movedim(1, 0).contiguous()
    standard = replace(found, values=values, weights=found.weights.expand(b, -1))
    kept = torch.ones(b, dtype=torch.bool, device=scores.device)
    if m >= _EMPTY_FROM and not search.all_is_noise:
        empty = (torch.stack([masks.sizes for masks in tables]) == 0).any(1).nonzero()[:, 0]
        if len(empty):
            with_empty = [tables[i] for i in empty.tolist()]
            apart = are_discontinuous(with_empty, standard.tables(empty))
            kept[empty] = ~apart.any(1)
    places = kept.nonzero()[:, 0]
    if not len(places):
        return
    shift, unit = shift.reshape(b, t), everything.unit.reshape(b, t)
    share = torch.full_like(scores, float(not search.all_is_noise))
    if noise is not None:
        standard = replace(standard, noise=(noise / unit).square())
    rows, columns = (torch.arange(count, device=scores.device) for count in (m, t))
    fits = search.fit([tables[i] for i in places.tolist()], standard.tables(places))
    for i, (models, tried) in zip(places.tolist(), fits, strict=True):
        own = standard.tables(torch.tensor([i]))
        if own.noise is not None:
            share[i] = _peculiar(models, own.noise.expand(m, -1))[1]
        parts = _parts(models, rows, columns, shift[i], unit[i], own, share[i])
        yield i, [replace(each, candidates=tried * (k == 0)) for k, each in enumerate(parts)]


def _parts(
    fits: Fits,
    rows: Tensor,
    columns: Tensor,
    shift: Tensor,
    unit: Tensor,
    scores: Scores,
    share: Tensor,
) -> list[Part]:
    """The models of a group of targets, as parts."""
    return [
        Part(
            rows=rows,
            columns=columns[targets],
            shift=shift[targets],
            unit=unit[targets],
            weights=scores.weights[0],
            model=model,
            nugget_share=share[:, targets],
            noise=None if scores.noise is None else scores.noise[0, targets],
            candidates=[],
        )
        for model, targets in fits
    ]


def _groups(
    active: Masks, observed: Observations, search: Search
) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows and columns of what can be fitted together."""
    if search.all_is_noise or observed.uneven:
        pattern = observed.precision
    elif observed.noise is None:
        pattern = observed.observed.to(torch.float64)
    else:
        pattern = (relative_noise(observed.noise, observed.observed) * 1e6).round()
    pattern = torch.where(observed.observed, pattern, -1.0)
    patterns, group = torch.unique(pattern, dim=1, return_inverse=True)
    for number in range(patterns.shape[1]):
        columns = (group == number).nonzero()[:, 0]
        rows = (patterns[:, number] >= 0).nonzero()[:, 0]
        without_empty = _is_discontinuous(active, observed, rows, columns, search)
        if not bool(without_empty.all()):
            yield rows, columns[~without_empty]
        if bool(without_empty.any()):
            yield rows[active.sizes[rows] > 0], columns[without_empty]


def _is_discontinuous(
    active: Masks, observed: Observations, rows: Tensor, columns: Tensor, search: Search
) -> Tensor:
    """(columns,) bool: where the empty subset's score is no continuation of the others.

    A score of 0 by convention, or of a network that was never trained, says nothing of subsets
    nearby. Judged by its residual when left out, beside the others' in units of what each should
    have.
    """
    nowhere = torch.zeros(len(columns), dtype=torch.bool, device=columns.device)
    if search.all_is_noise or not active.binary or len(rows) < _EMPTY_FROM:
        return nowhere
    empty = active.sizes[rows] == 0
    if not bool(empty.any()):
        return nowhere
    rest = rows[~empty]
    rows = torch.cat([rows[empty], rest[random_rows(len(rest), _EMPTY_ROWS, rest.device)]])
    scores, _ = _standardised(observed.part(rows, columns), search)
    return are_discontinuous([active[rows]], scores)[0]


def are_discontinuous(tables: Sequence[Masks], scores: Scores) -> Tensor:
    """(b, t) bool: where the score of the empty subset, in every table, leads away from others."""
    others = torch.stack([masks.sizes for masks in tables]) > 0  # (b, m)
    share = others.to(scores.values) / others.sum(1, keepdim=True)
    kernels = [Exponential().grid(masks) for masks in tables]
    judged = Contest(list(judged_kernels(kernels, tables, scores)), scores)
    nearest = (judged.subset_losses @ share[..., None]).argmin(1)  # (b, 1), for the others
    best = Choice(judged, nearest.expand_as(scores.varies))
    errors = best.gathered(KernelTrial.squared_residuals)  # (b, m, t)
    of_empty = torch.where(others[..., None], 0.0, errors).sum(1)
    of_others = (share[:, None] @ errors)[:, 0]
    return (of_empty > _EMPTY_DEVIATIONS**2 * of_others) & scores.varies


def _standardised(part: Observations, search: Search) -> tuple[Scores, Tensor]:
    """Scores in units of their deviation, and what was subtracted from them, (columns,)."""
    shift = part.shift if search.removes_mean else torch.zeros_like(part.shift)
    values = (part.scores - shift) / part.unit
    if search.removes_mean:
        values[:, ~part.varying] = 0.0  # exactly: the mean is rounded
    weights = torch.ones_like(values[:, 0])
    if search.ridge is not None:  # the ridge of a run: means of several have less
        weights = part.precision.mean(1)
    elif search.all_is_noise or part.uneven:  # of mean 1, whatever their size
        weights = part.precision.mean(1) / part.precision.max()
        weights = weights / weights.mean()
    return Scores(values[None], search.center, search.by_rank, weights[None]), shift


def _fitted_to_noise(
    masks: Masks, scores: Scores, variance: Tensor, search: Search
) -> tuple[Scores, Fits, list[Tried], Tensor]:
    """A fit to scores of known noise; a second one with weights where their precision differs.

    Args:
        masks: The subsets.
        scores: Standardised scores, of weight 1.
        variance: (m, t) variance of their noise.
        search: How to fit.

    Returns:
        The scores with noise and weights, their fits and candidates, and the share (m, t) of
        residuals that is peculiar to subsets.
    """
    relative = relative_noise(variance.sqrt(), torch.ones_like(variance))
    scores = replace(scores, noise=variance.mean(0)[None])
    ((fits, candidates),) = search.fit([masks], scores)
    ratio, share = _peculiar(fits, variance)
    if float(relative[:, 0].max() / relative[:, 0].min().clamp_min(1e-9)) > _UNEVEN:
        ratio = ratio.mean().clamp_max(1e9).expand_as(ratio)
        weights = precision_weights(ratio[0], relative[:, 0])
        noise = weights @ variance / len(weights)
        scores = replace(scores, weights=weights[None], noise=noise[None])
        ((fits, candidates),) = search.fit([masks], scores)
        share = nugget_share(ratio, relative)
    return scores, fits, candidates, share


def _peculiar(fits: Fits, variance: Tensor) -> tuple[Tensor, Tensor]:
    """(t,) ratio of what is peculiar to a subset to noise, and (m, t) its share of residuals."""
    total = torch.zeros_like(variance[0])
    for model, targets in fits:
        total[targets] = model.ridge_variance
    ratio = nugget_to_noise(total, variance)
    relative = relative_noise(variance.sqrt(), torch.ones_like(variance))
    return ratio, nugget_share(ratio, relative)
