"""``fit_surrogate``: choose kernel and ridge by exact leave-one-out error, and keep the winner.

Rows of one subset become one observation (:mod:`.observations`); targets that share their subsets
are fitted together, on standardised scores (:mod:`.parts`); every candidate is judged at every
ridge (:mod:`.search`, :mod:`.trials`), and the best is chosen for all targets or for each
(:mod:`.choice`). So `fit_surrogate` calls `fitted_parts`, that `Search.fit`, that `KernelTrial`,
and that `SpectralRidge`: one eigendecomposition per kernel, of a Gram matrix that `Kernel.gram` has
from `ops.mask_gram` (csrc/cpu/mask_gram.cpp, whose loop is `count_tile`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ksm_ext.arrays import (
    ArrayKind,
    ArrayLike,
    aligned,
    as_tensor,
    checked_names,
    names_along,
    table_library,
)
from ksm_ext.checks import check_choice, check_real, counted, message
from ksm_ext.surrogates.candidates import CandidateTable
from ksm_ext.surrogates.cokriging import TrendModel, TrendSearch, levels_of
from ksm_ext.surrogates.kernels import KernelChoice
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.observations import Observations, observe
from ksm_ext.surrogates.options import Criterion, Missing, ShareRidge
from ksm_ext.surrogates.parts import Part, fitted_parts, varying_tasks
from ksm_ext.surrogates.search import LINEAR, Search
from ksm_ext.surrogates.surrogate import Surrogate
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm
from ksm_ext.surrogates.trend import Level, Trend

MAX_DIRECT = 20_000
"""Subsets up to which the (m, m) Gram matrix is factored: 3.2 GB, and a few times that to do so."""

_ANSWERED_IN_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def fit_surrogate(
    masks: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    estimates: Any = None,
    kernel: KernelChoice = "auto",
    ridge: Literal["loo"] | float = "loo",
    criterion: Criterion = "error",
    share_ridge: ShareRidge = "auto",
    center: bool = True,
    solver: Literal["auto", "eigh", "cg"] | ConjugateGradients = "auto",
    noise_std: ArrayLike | float | None = None,
    known: ArrayLike | Sequence[int] | None = None,
    missing: Missing = "error",
    task_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
    progress: bool = False,
) -> Surrogate:
    r"""Fit a surrogate ``F(S)`` of scores to the subsets they were observed on.

    Kernel ridge regression with an unpenalised intercept (``center``); kernel parameters, ridge and
    what shares them are chosen by exact leave-one-out residuals from one eigendecomposition per
    kernel. Compare ``sklearn.kernel_ridge.KernelRidge`` in ``GridSearchCV``, which refits instead.

    Args:
        masks: (m, n). Row i says which tasks were in subset i: bool or 0/1 of any dtype; other
            numbers are taken as real weights (data mixtures). Tensor, NumPy array, list
            or table. Rows of one subset are repeats: they are averaged, left out together, and five
            or more measure the noise of a run. Or what :func:`ksm_ext.retrain_scores` returned.
        scores: (m,) or (m, t) float, in their own units and sign, which decide nothing. Answers
            come back in this array kind, dtype and device. Left out with retrained scores.
        estimates: Cheaper scores of the same targets, most usefully of many more subsets: a pair
            ``(masks, scores)``; a fitted surrogate, :class:`ksm_ext.GradientEstimator` or whatever
            else has ``predict(masks)``; what :func:`ksm_ext.retrain_scores` returned for a smaller
            model; or a list of these. Their unit and scale are free, since F is fitted as ``a + b
            E + δ`` (:mod:`ksm_ext.surrogates.cokriging`): ``kernel`` is then that of δ (``"auto"``:
            ``"rbf"``), and chosen with the ridge by restricted likelihood.
        kernel: ``"auto"``; a name of :mod:`.kernels` or a sum such as ``"linear+rbf"``; a
            kernel object or class, whose open parameters are searched; a list of these; or
            ``"least_squares"`` (no intercept) and ``"lasso"``, the literature's linear surrogates.
        ridge: ``"loo"``, or the number added to the diagonal of the Gram matrix
            (scikit-learn's ``alpha``): then all of it counts as noise, and no score is answered by
            itself unless it is known.
        criterion: ``"error"`` chooses by squared error, ``"rank"`` by mean Spearman correlation of
            leave-one-out predictions.
        share_ridge: True for one kernel and ridge for all targets, False for one per target;
            ``"auto"`` tries both and one per principal component of the targets, keeps what
            predicts best on subsets that had no part in the choice, and fits a target on its own
            where that is clearly better: no target loses by being fitted with others.
        center: Fit an intercept. Without one, predictions shrink to zero instead of the mean.
        solver: ``"eigh"`` factors the (m, m) Gram matrix; ``"cg"`` never stores it: preconditioned
            conjugate gradients (:class:`ksm_ext.ConjugateGradients` sets them), with estimated
            leave-one-out residuals, at the ridges around the best; faster from some thousands of
            subsets on. ``"auto"``: ``"eigh"``, which is exact, up to 20,000 subsets.
        noise_std: Standard deviation of a single run by its seed: a number, or of shape (t,), (m,)
            or (m, t). Splits the ridge into noise and what is peculiar to a subset; 0 for scores
            without noise. By default measured on repeated subsets, or unknown.
        known: (m,) bool, or numbers of rows, whose scores are exact: they are interpolated. So are
            those of the empty and the full subset where the ridge is chosen and the noise is
            neither given nor measured.
        missing: ``"drop"`` takes NaN in ``scores`` for a score that is missing, and fits each
            target to the subsets that have it.
        task_names: n names; by default those of the columns of ``masks``, or "0", "1", ….
        target_names: t names; by default those of the columns of ``scores``, or numbers.
        progress: Whether to show bars over kernels, and over products of conjugate gradients.

    Returns:
        The fitted :class:`ksm_ext.Surrogate`.

    Raises:
        TypeError: If an argument holds no numbers.
        ValueError: If shapes disagree, scores are not finite, every target is constant, all
            subsets are the same, ``ridge`` is 0 with a singular Gram matrix or conjugate gradients,
            or ``solver`` cannot do it.
        RuntimeError: If conjugate gradients do not converge.

    Example:
        >>> masks = [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0]]
        >>> scores = [3.0, 1.0, 2.0, 3.0, 1.0, 2.0]
        >>> fit_surrogate(masks, scores, kernel="linear").attribute("loo").round(1)
        array([1., 2., 0.])

    Reference: Zhang, Duan & Zhang 2026, arXiv:2602.03783.
    """
    masks, scores, target_names = _tables(masks, scores, target_names)
    masks, scores, noise_std, known = _aligned(masks, scores, noise_std, known)
    observed = observe(masks, scores, noise_std=noise_std, known=known, missing=missing)
    _check_problem(observed)
    search = search_for(
        observed.scores,
        kernel=kernel,
        ridge=ridge,
        criterion=criterion,
        share_ridge=share_ridge,
        center=center,
        solver=solver,
        progress=progress,
    )
    counts = observed.masks.num_tasks, observed.scores.shape[1]
    names = names_for(masks, scores, task_names, target_names, counts)
    levels: tuple[Level, ...] = ()
    if estimates is not None:
        levels = levels_of(estimates, observed.masks, *names.values(), fit=fit_surrogate)
        search = _with_levels(search, levels, observed)
    parts = fitted_parts(observed, search)
    return assembled(parts, observed, search, names, levels, like=scores)


def search_for(
    outcome: Tensor,
    *,
    kernel: KernelChoice,
    ridge: Literal["loo"] | float,
    criterion: Criterion,
    share_ridge: ShareRidge,
    center: bool,
    solver: Literal["auto", "eigh", "cg"] | ConjugateGradients,
    progress: bool = False,
) -> Search:
    """The search that the arguments of :func:`fit_surrogate` ask for, of scores (m, t).

    Raises:
        ValueError: If an argument has no such value.
        TypeError: If one is of another kind.
    """
    check_choice("criterion", criterion, get_args(Criterion))
    share_ridge = bool(share_ridge) if share_ridge in (True, False) else share_ridge
    check_choice("share_ridge", share_ridge, ("auto", True, False))
    several = isinstance(kernel, Iterable) and not isinstance(kernel, str)
    return Search(
        kernel=tuple(kernel) if several else kernel,  # type: ignore[arg-type]
        ridge=_check_ridge(ridge, outcome),
        by_rank=criterion == "rank",
        share_ridge=share_ridge,
        center=center,
        solver=_solver(solver, len(outcome)),
        progress=progress,
    )


def names_for(
    masks: ArrayLike,
    scores: ArrayLike,
    task_names: Sequence[str] | None,
    target_names: Sequence[str] | None,
    counts: tuple[int, int],
) -> dict[str, tuple[str, ...]]:
    """The names of (n, t) tasks and targets: those given, those of the tables, or numbers."""
    names = {}
    for argument, given, table, count in (
        ("task_names", task_names, masks, counts[0]),
        ("target_names", target_names, scores, counts[1]),
    ):
        found = names_along(table, 1) or range(count) if given is None else given
        names[argument] = checked_names(argument, found, count)
    return names


# -- check --------------------------------------------------------------------------------------


def _tables(
    masks: Any, scores: ArrayLike | None, target_names: Sequence[str] | None
) -> tuple[ArrayLike, ArrayLike, Sequence[str] | None]:
    """Masks and scores, a row per run; of retrained scores, those that finished."""
    if scores is not None:
        return masks, scores, target_names
    if not (hasattr(masks, "runs") and hasattr(masks, "target_names")):
        remedy = "Pass masks and scores, or what retrain_scores returned."
        found = f"none beside {type(masks).__name__}"
        raise TypeError(message("scores", "given", found, remedy))
    rows, values = masks.runs()
    return rows, values, masks.target_names if target_names is None else target_names


def _aligned(
    masks: ArrayLike, scores: ArrayLike, noise_std: Any, known: Any
) -> tuple[ArrayLike, ArrayLike, Any, Any]:
    """The tables with their rows and columns in one order, where they have labels."""
    tables: dict[str, tuple[Any, ...]] = {
        "masks": (masks, "subset", "task"),
        "scores": (scores, "subset", "target"),
    }
    if table_library(noise_std):
        axes = ("subset", "target") if len(noise_std.shape) == 2 else ("subset",)
        if len(noise_std.shape) == 1 and len(noise_std) != len(scores):
            axes = ("target",)
        tables["noise_std"] = (noise_std, *axes)
    if table_library(known) and len(known) == len(scores):
        tables["known"] = (known, "subset")
    found = dict(zip(tables, aligned(tables), strict=True))
    rest = found.get("noise_std", noise_std), found.get("known", known)
    return found["masks"], found["scores"], *rest


def _check_problem(observed: Observations) -> None:
    """Raise ``ValueError`` where there is nothing to fit."""
    table = observed.masks
    if len(table) == 1:
        what = "the same subset"
        if table.binary and int(table.sizes[0]) in (0, table.num_tasks):
            what = "the empty subset" if int(table.sizes[0]) == 0 else "the full subset"
        remedy = "Draw different subsets, for example with ksm_ext.subsets.bernoulli."
        found = f"{what} {int(observed.counts.amax())} times"
        raise ValueError(message("masks", "at least two different subsets", found, remedy))
    fewest, runs = observed.observed.sum(0).min(), observed.counts.sum(0).min()
    if runs < 3 or fewest < 2:
        remedy = "Score more subsets; several times the number of tasks is a good start."
        expected, found = "at least 3 subsets", str(int(runs))
        if runs >= 3:
            expected, found = "different subsets for every target", "one for some"
        raise ValueError(message("masks", expected, found, remedy))
    if not bool(observed.varying.any()):
        remedy = "There is nothing to explain: check the scores."
        raise ValueError(message("scores", "varying over subsets", "constant targets only", remedy))


def _check_ridge(ridge: object, outcome: Tensor) -> Tensor | None:
    if isinstance(ridge, str) and ridge == "loo":
        return None
    remedy = "Leave it out for the leave-one-out choice."
    number = check_real("ridge", ridge, "'loo' or a number", remedy)
    if not 0 <= number < float("inf"):
        raise ValueError(message("ridge", "'loo' or at least 0", str(ridge), remedy))
    return torch.tensor([number], dtype=torch.float64, device=outcome.device)


def _solver(solver: object, num_subsets: int) -> ConjugateGradients | None:
    """The settings of conjugate gradients, or None to factor the Gram matrix."""
    if isinstance(solver, ConjugateGradients):
        return solver
    remedy = "Or pass ksm_ext.ConjugateGradients(...) to set them."
    check_choice("solver", solver, ("auto", "eigh", "cg"), remedy)
    if solver == "eigh" and num_subsets > MAX_DIRECT:
        expected = f"'cg' or 'auto' for more than {MAX_DIRECT} subsets"
        remedy = "Or fit a random sample of them."
        raise ValueError(message("solver", expected, f"'eigh' with {num_subsets}", remedy))
    return ConjugateGradients() if solver == "cg" or num_subsets > MAX_DIRECT else None


def _with_levels(search: Search, levels: tuple[Level, ...], observed: Observations) -> TrendSearch:
    """The search of a fit with estimates.

    Raises:
        ValueError: If it was asked for what such a fit has not, or there are too few scores.
    """
    if search.by_rank:
        remedy = "Leave it out: the likelihood chooses."
        raise ValueError(message("criterion", "'error' with estimates", "'rank'", remedy))
    asked = search.kernel if isinstance(search.kernel, tuple) else (search.kernel,)
    linear = [name for name in LINEAR if name in asked]
    if linear:
        remedy = "Leave it out, or name a kernel."
        raise ValueError(message("kernel", "a kernel with estimates", repr(linear[0]), remedy))
    if search.solver is not None:
        remedy = "Fit a sample of the true scores."
        expected = f"'eigh' with estimates, for up to {MAX_DIRECT} subsets"
        raise ValueError(message("solver", expected, "conjugate gradients", remedy))
    least, fewest = len(levels) + 3, int(observed.observed.sum(0).min())
    if fewest < least:
        remedy = "Score more subsets, or leave out estimates."
        expected = f"at least {least} different subsets beside {counted(len(levels), 'estimate')}"
        raise ValueError(message("masks", expected, str(fewest), remedy))
    basis = [level.predict(observed.masks.values, False) for level in levels]
    return TrendSearch(**vars(search), basis=torch.stack(basis).to(observed.scores))


# -- assemble -----------------------------------------------------------------------------------


def assembled(
    parts: list[Part],
    observed: Observations,
    search: Search,
    names: dict[str, tuple[str, ...]],
    levels: tuple[Level, ...] = (),
    *,
    like: ArrayLike,
) -> Surrogate:
    """The surrogate of all parts, answering in the kind of ``like``, the scores given."""
    empty = torch.zeros_like(observed.scores)  # (m, t)
    intercept, unit = (empty[0].clone() for _ in range(2))
    slopes = empty.new_zeros(len(levels), len(unit))
    for part in parts:
        if isinstance(part.model, TrendModel):
            slopes[:, part.columns] = part.unit * part.model.slopes
        intercept[part.columns] = part.shift + part.unit * part.model.intercept
        unit[part.columns] = part.unit

    def cells(start: Tensor, values: Callable[[Part], Tensor | float]) -> Tensor:
        """(m, t) of the parts' values (rows, columns), ``start`` where nothing was fitted."""
        if len(parts) == 1 and tuple(parts[0].nugget_share.shape) == tuple(start.shape):
            return torch.as_tensor(values(parts[0])).to(start).expand_as(start)
        table = start.clone()
        for part in parts:
            table[part.rows[:, None], part.columns] = torch.as_tensor(values(part)).to(table)
        return table

    rotation, kernel_terms, linear_terms = _terms(parts, empty)
    excluded = observed.observed & (cells(empty, lambda part: 1.0) == 0)
    ways = {part.model.sharing for part in parts}
    mixed = "target" if rotation is None else "component"
    tried = tuple(row for part in parts for row in part.candidates)
    original = as_tensor("scores", like)
    single = original.dtype in _ANSWERED_IN_SINGLE
    surrogate = Surrogate(
        masks=observed.masks,
        intercept=intercept,
        kernel_terms=kernel_terms,
        linear_terms=linear_terms,
        rotation=rotation,
        center=search.center,
        **names,
        candidates=CandidateTable(tried, unit.square().clamp_max(torch.finfo(unit.dtype).max)),
        sharing=ways.pop() if len(ways) == 1 else mixed,
        scores=observed.scores.clone(),  # the caller may reuse the table
        unit=unit,
        residuals=cells(empty + torch.nan, lambda part: part.unit * part.model.loo_residuals),
        fit_residuals=cells(empty, lambda part: part.unit * part.model.fit_residuals),
        nugget_share=cells(empty, lambda part: part.nugget_share),
        known=observed.known,
        noise=observed.noise,
        counts=observed.counts,
        excluded=excluded,
        varying=varying_tasks(observed.masks, search),
        kind=ArrayKind.of(like),
        dtype=torch.float32 if single else torch.float64,
        single_target=original.ndim == 1,
        solver=search.solver,
        trend=Trend(levels, slopes) if levels else None,
    )
    return surrogate.with_excluded(excluded) if bool(excluded.any()) else surrogate


def _terms(
    parts: list[Part], like: Tensor
) -> tuple[Tensor | None, tuple[KernelTerm, ...], tuple[LinearTerm, ...]]:
    """The rotation (t, q) and the terms of all parts, their latent columns side by side.

    Where no part has components, latent columns are the targets, and there is no rotation.
    """
    m, t = like.shape
    rotation, places = None, [part.columns for part in parts]
    if any(part.model.rotation is not None for part in parts):
        widths = [part.model.num_latent for part in parts]
        places = list(torch.arange(sum(widths), device=like.device).split(widths))
        rotation = like.new_zeros(t, sum(widths))
        for part, place in zip(parts, places, strict=True):
            found = part.model.rotation
            block = torch.eye(len(part.columns)).to(like) if found is None else found
            rotation[part.columns[:, None], place] = block
    placed = list(zip(parts, places, strict=True))
    kernel_terms = [term for part, place in placed for term in part.kernel_terms(m, place)]
    linear_terms = [
        replace(term, columns=place[term.columns])
        for part, place in placed
        for term in part.model.linear_terms
    ]
    return rotation, tuple(kernel_terms), tuple(linear_terms)
