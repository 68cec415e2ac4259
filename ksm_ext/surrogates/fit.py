"""``fit_surrogate``: choose kernel and ridge by exact leave-one-out error, and keep the winner.

``fit_many`` does so for many tables of one shape. What takes long in a small fit is no arithmetic
but the steps between, a thousand small operations: tables take each step together, some hundred at
a time (:mod:`.search` knows b tables throughout, of which ``fit_surrogate`` has one).

Rows of one subset become one observation (:mod:`.observations`); targets that share their subsets
are fitted together, on standardised scores (:mod:`.parts`); every candidate is judged at every
ridge (:mod:`.search`, :mod:`.trials`), and the best is chosen for all targets or for each
(:mod:`.choice`). So `fit_surrogate` calls `fitted_parts`, that `Search.fit`, that `KernelTrial`,
and that `SpectralRidge`: one eigendecomposition per kernel, of a Gram matrix that `Kernel.gram` has
from `ops.mask_gram` (csrc/cpu/mask_gram.cpp, whose loop is `count_tile`).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
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
from ksm_ext.checks import check_choice, check_real, checked, counted, message, shape_text
from ksm_ext.subsets import distinct_rows
from ksm_ext.surrogates.candidates import CandidateTable
from ksm_ext.surrogates.cokriging import (
    TrendModel,
    TrendSearch,
    check_independent,
    levels_of,
)
from ksm_ext.surrogates.kernels import KernelChoice
from ksm_ext.surrogates.krylov import ConjugateGradients, NotConvergedError
from ksm_ext.surrogates.likelihood import sees_sizes
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.observations import Observations, known_rows, noise_rows, observe
from ksm_ext.surrogates.options import Criterion, Missing, ShareRidge, Warp
from ksm_ext.surrogates.parts import Part, fitted_parts, parts_of_many, varying_tasks
from ksm_ext.surrogates.score_warps import fitted_warps
from ksm_ext.surrogates.search import ARD, LINEAR, Search
from ksm_ext.surrogates.surrogate import Surrogate
from ksm_ext.surrogates.terms import KernelTerm, LinearTerm
from ksm_ext.surrogates.trend import Level, Trend

MAX_DIRECT = 20_000
"""Subsets up to which the (m, m) Gram matrix is factored: 3.2 GB, and a few times that to do so."""

_FASTER_DIRECT, _PER_TARGET = 5_000, 30
"""Subsets, and more for each target, up to which ``solver="auto"`` factors.

Seconds of one core, 50 tasks, ``"rbf"`` (``"auto"`` within a third of it): factored 28-33 at 4,000
subsets and as m³ beyond, so 100 at 6,000, for any number of targets; by conjugate gradients 22-38
at 4,000, 29-41 at 6,000, and 85 at 6,000 with 100 targets.
"""

_AT_A_TIME = 2**21
"""Numbers of Gram matrices and residuals held at a time: 16 MB, by each thread."""

_DIMS = {last: ("table", "subset", last) for last in ("task", "target")}
_MOST_SUBSETS = 192  # where arithmetic is what takes long, there is nothing to share
_KERNELS, _RIDGES = 64, 17  # of a usual search

_ANSWERED_IN_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


@checked
def fit_surrogate(
    masks: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    estimates: Any = None,
    kernel: KernelChoice = "auto",
    ridge: Literal["loo"] | float = "loo",
    criterion: Criterion = "error",
    warp: Warp = "identity",
    share_ridge: ShareRidge = "auto",
    center: bool = True,
    solver: Literal["auto", "eigh", "cg"] | ConjugateGradients = "auto",
    noise_std: ArrayLike | float | None = None,
    known: ArrayLike | Sequence[int] | None = None,
    missing: Missing = "error",
    sample_weight: ArrayLike | None = None,
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
            ``"rbf"``, and up to 192 subsets also kernels that see sizes), and chosen with the ridge
            by restricted likelihood.
        kernel: ``"auto"``; a name of :mod:`.kernels` or a sum such as ``"linear+rbf"``; a
            kernel object or class, whose open parameters are searched (of ``"warped"``, for real
            weights, learnt for every target); a list of these; ``"ard"``, kernels with a decay for
            each task, and an amplitude by size where sizes vary, learnt by restricted likelihood
            (:mod:`.likelihood`); or ``"least_squares"`` (no intercept) and ``"lasso"``, the
            literature's linear surrogates.
        ridge: ``"loo"``, or the number added to the diagonal of the Gram matrix
            (scikit-learn's ``alpha``): then all of it counts as noise, and no score is answered by
            itself unless it is known.
        criterion: ``"error"`` chooses by squared error, ``"rank"`` by mean Spearman correlation of
            leave-one-out predictions, ``"attribution"`` by squared error near the full set, where
            leave-one-out effects are differences (:func:`.judgement.near_full`; Shapley and Banzhaf
            values are served best by ``"error"``).
        warp: A monotone map of the scores (:mod:`ksm_ext.surrogates.score_warps`) that predictions
            go through: ``"identity"``, ``"log"``, ``"logit"``, ``"normal"`` (normal scores), or
            ``"auto"``: for each target the one with the smallest leave-one-out error, if it is
            clearly smaller. For scores that saturate. Costs one more fit for each map that is
            tried. Attributions and interactions are those of the scores as they are.
        share_ridge: True for one kernel and ridge for all targets, False for one per target;
            ``"auto"`` tries both and one per principal component of the targets, keeps what
            predicts best on subsets that had no part in the choice, and fits a target on its own
            where that is clearly better: no target loses by being fitted with others.
        center: Fit an intercept. Without one, predictions shrink to zero instead of the mean.
        solver: ``"eigh"`` factors the (m, m) Gram matrix; ``"cg"`` never stores it: preconditioned
            conjugate gradients (:class:`ksm_ext.ConjugateGradients` sets them), with estimated
            leave-one-out residuals, at the ridges around the best; faster from some thousands of
            subsets on. ``"auto"``: ``"eigh"``, which is exact, up to 5,000 subsets and 30 more
            for each target (up to 20,000 where the ridge is given, or for least squares), or where
            conjugate gradients do not converge.
        noise_std: Standard deviation of a single run by its seed: a number, or of shape (t,), (m,)
            or (m, t). Splits the ridge into noise and what is peculiar to a subset; 0 for scores
            without noise. By default measured on repeated subsets, or unknown.
        known: (m,) bool, or numbers of rows, whose scores are exact: they are interpolated. So are
            those of the empty and the full subset where the ridge is chosen and the noise is
            neither given nor measured.
        missing: ``"drop"`` takes NaN in ``scores`` for a score that is missing, and fits each
            target to the subsets that have it.
        sample_weight: (m,) how sure each row is, as in scikit-learn: a row of weight 2 is as sure
            as two runs, its noise has half the variance, and a row of weight 0 is left out. Where
            weights differ, what the surrogate does not explain counts as noise, unless noise is
            given or measured: then it is that of a run of weight 1.
        task_names: n names; by default those of the columns of ``masks``, or "0", "1", ….
        target_names: t names; by default those of the columns of ``scores``, or numbers.
        progress: Whether to show bars over kernels, and over products of conjugate gradients.

    Returns:
        The fitted :class:`ksm_ext.Surrogate`.

    Raises:
        TypeError: If an argument holds no numbers.
        ValueError: If shapes disagree, scores are not finite, every target is constant, all
            subsets are the same, ``estimates`` are the true scores at ten subsets or more,
            ``ridge`` is 0 with a singular Gram matrix or conjugate gradients, or ``solver`` cannot
            do it.
        RuntimeError: If conjugate gradients do not converge.

    Example:
        >>> masks = [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0]]
        >>> scores = [3.0, 1.0, 2.0, 3.0, 1.0, 2.0]
        >>> fit_surrogate(masks, scores, kernel="linear").attribute("loo").round(1)
        array([1., 2., 0.])

    Reference: Zhang, Duan & Zhang 2026, arXiv:2602.03783.
    """
    masks, scores, target_names = _tables(masks, scores, target_names)
    of_rows = {"known": known, "sample_weight": sample_weight}
    masks, scores, noise_std, of_rows = _aligned(masks, scores, noise_std, of_rows)
    observed = observe(masks, scores, noise_std=noise_std, missing=missing, **of_rows)
    _check_problem(observed)
    if estimates is not None and solver == "auto" and len(observed.masks) <= MAX_DIRECT:
        solver = "eigh"
    options: dict[str, Any] = {
        "kernel": tuple(kernel) if isinstance(kernel, Iterator) else kernel,  # read once
        "ridge": ridge,
        "criterion": criterion,
        "share_ridge": share_ridge,
        "center": center,
        "solver": solver,
        "progress": progress,
    }
    search = _search(observed.scores, **options)
    if criterion == "attribution" and not observed.masks.binary:
        remedy = "Leave it out: mixtures have no sizes."
        raise ValueError(message("masks", f"0/1 for {criterion=}", "real-valued weights", remedy))
    check_choice("warp", warp, get_args(Warp))
    counts = observed.masks.num_tasks, observed.scores.shape[1]
    names = _names(masks, scores, task_names, target_names, counts)
    levels: tuple[Level, ...] = ()
    if estimates is not None:
        levels = levels_of(estimates, observed.masks, *names.values(), fit=fit_surrogate)
        check_independent(levels, observed, names["target_names"])
        search = _with_levels(search, levels, observed, warp)
    try:
        parts = fitted_parts(observed, search)
    except NotConvergedError:
        if solver != "auto" or len(observed.masks) > MAX_DIRECT:
            raise
        search = replace(search, solver=None)  # chosen for its speed alone
        parts = fitted_parts(observed, search)
    surrogate = _assembled(parts, observed, search, names, levels, like=scores)
    if warp == "identity":
        return surrogate
    refit = partial(fit_surrogate, masks, missing=missing, **of_rows | options | names)
    runs = as_tensor("scores", scores).to(torch.float64).reshape(-1, len(surrogate.unit))
    noise = None if noise_std is None else noise_rows(noise_std, ~runs.isnan())
    warps = fitted_warps(warp, surrogate, runs, noise, refit, by_rank=search.by_rank)
    return replace(surrogate, warps=warps)


@checked
def fit_many(
    masks: ArrayLike,
    scores: ArrayLike,
    *,
    kernel: KernelChoice = "auto",
    ridge: Literal["loo"] | float = "loo",
    criterion: Criterion = "error",
    warp: Warp = "identity",
    share_ridge: ShareRidge = "auto",
    center: bool = True,
    solver: Literal["auto", "eigh", "cg"] | ConjugateGradients = "auto",
    noise_std: ArrayLike | float | None = None,
    known: ArrayLike | Sequence[int] | None = None,
    missing: Missing = "error",
    sample_weight: ArrayLike | None = None,
    task_names: Sequence[str] | None = None,
    target_names: Sequence[str] | None = None,
) -> list[Surrogate]:
    """Fit a surrogate to each of many tables of one shape.

    The answers are those of :func:`ksm_ext.fit_surrogate` on one table after the other, to
    rounding. Small tables are fitted together; those with repeated subsets, constant tasks
    or targets, weights, or a score of the empty subset that the others do not lead to, are fitted
    one by one, and so is what conjugate gradients solve, and kernels that are learnt, tables whose
    noise or weight differs between subsets, and those with missing scores.

    Args:
        masks: (b, m, n), the subsets of each table, or (m, n), those of all: bool or 0/1.
        scores: (b, m) or (b, m, t) float. Surrogates answer in its array kind, dtype and device.
        kernel: See :func:`ksm_ext.fit_surrogate`, as all that follow.
        ridge: The same for every table.
        criterion: The same for every table.
        warp: The same for every table; with a map, tables are fitted one by one.
        share_ridge: Whether the targets of a table share one; tables share nothing.
        center: The same for every table.
        solver: The same for every table.
        noise_std: Of shape (b, m) or (b, m, t), or else the same for every table.
        known: (b, m) bool, or else the same rows of every table.
        missing: The same for every table.
        sample_weight: (b, m), or (m,) for every table.
        task_names: n names, of every table.
        target_names: t names, of every table.

    Returns:
        b surrogates. What their standard deviations need is factored on first use.

    Raises:
        TypeError: If an argument holds no numbers.
        ValueError: If shapes disagree, or where :func:`ksm_ext.fit_surrogate` refuses a table.

    Example:
        >>> masks = [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0]]
        >>> scores = [[3.0, 1.0, 2.0, 3.0, 1.0, 2.0], [0.0, 1.0, 1.0, 1.0, 0.0, 0.0]]
        >>> [fitted.attribute("loo").round(1).tolist() for fitted in fit_many(masks, scores)]
        [[1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]
    """
    masks, scores, sample_weight = aligned(
        {
            "masks": (masks, *_DIMS["task"][-getattr(masks, "ndim", 3) :]),
            "scores": (scores, *_DIMS["target"][: getattr(scores, "ndim", 3)]),
            "sample_weight": (
                sample_weight,
                *_DIMS["task"][:2][-getattr(sample_weight, "ndim", 2) :],
            ),
        }
    )
    subsets, outcomes = _checked_tables(as_tensor("masks", masks), as_tensor("scores", scores))
    if isinstance(kernel, Iterator):
        kernel = tuple(kernel)  # read once, for all tables
    options: dict[str, Any] = {
        "kernel": kernel,
        "ridge": ridge,
        "criterion": criterion,
        "share_ridge": share_ridge,
        "center": center,
        "solver": solver,
    }
    search = _search(outcomes[0], **options)
    b, m, n = subsets.shape
    t = outcomes[0, 0].numel()
    names = _names(
        masks if len(masks) == m and subsets.stride(0) == 0 else masks[0],
        scores[0] if outcomes.ndim == 3 else outcomes,
        task_names,
        target_names,
        (n, t),
    )
    check_choice("missing", missing, get_args(Missing))
    exact, noise = _of_each("known", known, b, m), _of_each("noise_std", noise_std, b, m)
    weights = _of_each("sample_weight", sample_weight, b, m)
    flags = torch.stack([known_rows(each, m) for each in exact])[..., None].to(outcomes.device)
    found: list[Surrogate | None] = [None] * b

    level = None if noise_std is None else _even_noise(noise, outcomes)  # (b, t), NaN if uneven

    def fit_together(places: Tensor) -> None:
        tables = outcomes[places].to(torch.float64).reshape(len(places), m, t)
        if subsets.stride(0) == 0:
            fitted = [Masks(subsets[0].to(outcomes.device))] * len(places)
        else:
            fitted = [Masks(each.clone()) for each in subsets[places].to(outcomes.device)]
        once = torch.ones(m, t, dtype=torch.int64, device=outcomes.device)
        of_noise = None if level is None else level[places]
        for at, parts in parts_of_many(fitted, tables, search, of_noise):
            i = int(places[at])
            certain = flags[i].repeat(1, t)
            of_scores = None if level is None else level[i].repeat(m, 1)
            observed = Observations(fitted[at], tables[at], once, of_scores, certain, 0)
            found[i] = _assembled(parts, observed, search, names, like=outcomes[i])

    step = max(1, _AT_A_TIME // (_KERNELS * m * (m + _RIDGES * t)))
    check_choice("warp", warp, get_args(Warp))
    alike = _alike(subsets, outcomes, search) & (warp == "identity" and sample_weight is None)
    if level is not None:
        alike &= level.isfinite().all(1) & (not search.all_is_noise)
    if (
        search.all_is_noise or level is not None
    ):  # then scores that are exact are told from the rest
        alike &= ~flags.any(1)[:, 0]
    sized = sees_sizes(subsets).to(alike.device)  # these have more candidates
    groups = [group.nonzero()[:, 0] for group in (alike & sized, alike & ~sized)]
    chunks = [chunk for group in groups if len(group) for chunk in group.split(step)]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        list(pool.map(fit_together, chunks))  # raises what a thread raised
    options |= {"warp": warp, "missing": missing, **names}
    of_each = zip(noise, exact, weights, strict=True)
    names_of = ("noise_std", "known", "sample_weight")
    rest = [dict(zip(names_of, given, strict=True)) for given in of_each]
    alone = (
        fit_surrogate(subsets[i], outcomes[i], **rest[i], **options) if each is None else each
        for i, each in enumerate(found)
    )
    kind = ArrayKind.of(scores)
    return [each if each.kind == kind else replace(each, kind=kind) for each in alone]


def _of_each(name: str, given: Any, b: int, m: int) -> list[Any]:
    """What is given for each of b tables of m rows: a row of (b, m, ...), or the same for all."""
    if isinstance(given, (int, float, type(None))):
        return [given] * b
    table = as_tensor(name, given)
    if table.ndim > 2 and table.shape[:2] != (b, m):
        expected = f"of shape ({b}, {m}) or ({b}, {m}, t), or the same for all tables"
        remedy = "Give what belongs to each table in the order of `scores`."
        raise ValueError(message(name, expected, shape_text(table), remedy))
    return list(table) if table.ndim > 1 and table.shape[:2] == (b, m) else [table] * b


def _even_noise(noise: list[Any], outcomes: Tensor) -> Tensor:
    """(b, t) standard deviation of the noise of each table; NaN where subsets differ in it."""
    b, m = outcomes.shape[:2]
    every = torch.ones_like(outcomes, dtype=torch.bool).reshape(b, m, -1)
    table = torch.stack(
        [noise_rows(*pair).expand(m, every.shape[2]) for pair in zip(noise, every, strict=True)]
    )
    return torch.where((table == table[:, :1]).all(1), table[:, 0], torch.nan)


def _search(
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
    check_choice("share_ridge", share_ridge, ("auto", True, False))
    several = isinstance(kernel, Iterable) and not isinstance(kernel, str)
    kernel = tuple(kernel) if several else kernel  # type: ignore[arg-type]
    by_least_squares = "least_squares" in (kernel if isinstance(kernel, tuple) else (kernel,))
    return Search(
        kernel=kernel,
        ridge=_check_ridge(ridge, outcome),
        criterion=criterion,
        share_ridge=share_ridge,
        center=center,
        solver=_solver(solver, outcome, chooses=ridge == "loo" and not by_least_squares),
        progress=progress,
    )


def _names(
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
    masks: ArrayLike, scores: ArrayLike, noise_std: Any, of_rows: dict[str, Any]
) -> tuple[ArrayLike, ArrayLike, Any, dict[str, Any]]:
    """The tables, and what is said ``of_rows``, in one order where they have labels."""
    tables: dict[str, tuple[Any, ...]] = {
        "masks": (masks, "subset", "task"),
        "scores": (scores, "subset", "target"),
    }
    if table_library(noise_std):
        axes = ("subset", "target") if len(noise_std.shape) == 2 else ("subset",)
        if len(noise_std.shape) == 1 and len(noise_std) != len(scores):
            axes = ("target",)
        tables["noise_std"] = (noise_std, *axes)
    for name, given in of_rows.items():
        if table_library(given) and len(given) == len(scores):
            tables[name] = (given, "subset")
    found = dict(zip(tables, aligned(tables), strict=True))
    rest = {name: found.get(name, given) for name, given in of_rows.items()}
    return found["masks"], found["scores"], found.get("noise_std", noise_std), rest


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
        expected = "'loo' or " + ("finite" if number > 0 else "at least 0")
        raise ValueError(message("ridge", expected, str(ridge), remedy))
    return torch.tensor([number], dtype=torch.float64, device=outcome.device)


def _solver(solver: object, outcome: Tensor, *, chooses: bool) -> ConjugateGradients | None:
    """The settings of conjugate gradients, or None to factor the Gram matrix.

    Args:
        solver: What was asked for.
        outcome: (m, t) scores.
        chooses: Whether conjugate gradients may be chosen for their speed.
    """
    if isinstance(solver, ConjugateGradients):
        return solver
    remedy = "Or pass ksm_ext.ConjugateGradients(...) to set them."
    check_choice("solver", solver, ("auto", "eigh", "cg"), remedy)
    m = len(outcome)
    if solver == "eigh" and m > MAX_DIRECT:
        expected = f"'cg' or 'auto' for more than {MAX_DIRECT} subsets"
        remedy = "Or fit a random sample of them."
        raise ValueError(message("solver", expected, f"'eigh' with {m}", remedy))
    faster = chooses and m > _FASTER_DIRECT + _PER_TARGET * outcome[0].numel()
    chosen = solver == "auto" and (faster or m > MAX_DIRECT)
    return ConjugateGradients() if solver == "cg" or chosen else None


def _checked_tables(subsets: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Masks (b, m, n), bool where they are 0/1, and scores (b, m) or (b, m, t)."""
    remedy = "Give one table after the other, all of one shape."
    if outcomes.ndim not in (2, 3) or 0 in outcomes.shape:
        expected, found = "of shape (b, m) or (b, m, t)", shape_text(outcomes)
        raise ValueError(message("scores", expected, found, remedy))
    b, m = outcomes.shape[:2]
    if subsets.ndim == 2 and len(subsets) == m:
        subsets = subsets.expand(b, -1, -1)
    if subsets.ndim != 3 or subsets.shape[:2] != (b, m) or subsets.shape[2] == 0:
        expected = f"of shape ({b}, {m}, n), or ({m}, n) for all tables, like `scores`"
        raise ValueError(message("masks", expected, shape_text(subsets), remedy))
    table = subsets[0] if subsets.stride(0) == 0 else subsets
    if bool(((table == 0) | (table == 1)).all()):
        table = table.to(torch.bool, copy=True)  # the caller may reuse it
    return table.expand(b, -1, -1), outcomes


def _alike(subsets: Tensor, outcomes: Tensor, search: Search) -> Tensor:
    """(b,) bool: tables that take the same steps, so that they can take them together."""
    b, m, _ = subsets.shape
    nowhere = torch.zeros(b, dtype=torch.bool, device=outcomes.device)
    if subsets.dtype != torch.bool or search.solver is not None or not 3 <= m <= _MOST_SUBSETS:
        return nowhere
    if ARD in search.asked:  # kernels of its own for every table
        return nowhere
    scores = outcomes.reshape(b, m, -1)
    alike = scores.isfinite().all(1).all(1) & (scores.amax(1) > scores.amin(1)).all(1)
    tables = subsets[:1] if subsets.stride(0) == 0 else subsets
    tasks = tables.any(1) & ~tables.all(1)
    number = torch.arange(len(tables), device=tables.device).repeat_interleave(m)[:, None]
    bits = number.bitwise_right_shift(torch.arange(32, device=tables.device)).bitwise_and(1) > 0
    first = distinct_rows(torch.cat([bits, tables.flatten(0, 1)], 1))[1]
    distinct = (first // m).bincount(minlength=len(tables)) == m
    return alike & (tasks.all(1) & distinct).to(alike.device)


def _with_levels(
    search: Search, levels: tuple[Level, ...], observed: Observations, warp: Warp
) -> TrendSearch:
    """The search of a fit with estimates.

    Raises:
        ValueError: If it was asked for what such a fit has not, or there are too few scores.
    """
    if search.criterion != "error":
        remedy = "Leave it out: the likelihood chooses."
        found = repr(search.criterion)
        raise ValueError(message("criterion", "'error' with estimates", found, remedy))
    if warp != "identity":
        remedy = "Leave it out: scores and estimates are compared in their own units."
        raise ValueError(message("warp", "'identity' with estimates", repr(warp), remedy))
    others = [name for name in (*LINEAR, ARD) if name in search.asked]
    if others:
        remedy = "Leave it out, or name a kernel."
        raise ValueError(message("kernel", "a kernel with estimates", repr(others[0]), remedy))
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


def _assembled(
    parts: list[Part],
    observed: Observations,
    search: Search,
    names: dict[str, Any],
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
        all_is_noise=search.all_is_noise or observed.uneven,
        noise_degrees=observed.degrees_of_freedom,
        repeats_std=observed.repeats_std,
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
