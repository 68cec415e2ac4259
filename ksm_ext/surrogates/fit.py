"""``fit_surrogate``: choose kernel and ridge by exact leave-one-out error, and keep the winner.

Every candidate kernel is factored once and judged at every ridge (:mod:`.trials`). The choice may
be made once for all targets, per target, or per principal component of the targets; the freer ways
see less data each, so they are judged on subsets that had no part in their choices.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.arrays import ArrayLike, Kind, aligned, as_tensor, names_along
from ksm_ext.checks import check_choice, check_finite, check_real, message, shape_text
from ksm_ext.kernels import ANOVA2, RBF, Exponential, Kernel, Laplace, Linear, as_kernel
from ksm_ext.masks import Masks
from ksm_ext.surrogates.candidates import Candidate, CandidateTable
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.surrogate import KernelTerm, LinearTerm, Surrogate
from ksm_ext.surrogates.trials import (
    KernelTrial,
    KrylovTrial,
    LinearTrial,
    MeanTrial,
    Scores,
    Trial,
)

Sharing = Literal["shared", "target", "component"]
KernelChoice = str | Kernel | type[Kernel] | Sequence[str | Kernel | type[Kernel]]

LINEAR = ("least_squares", "lasso")
MAX_DIRECT = 20_000
"""Subsets up to which the (m, m) Gram matrix is factored: 3.2 GB, and a few times that to do so."""

_SCREEN_ROWS = 512
_SAMPLE_ROWS = 2048  # the same, where what follows is conjugate gradients on everything
_SCREEN_TARGETS = 128
_SCREEN_FROM = 768  # beyond this many subsets one factorisation is the cost that counts
_LASSO_TASKS = 256  # coordinate descent costs n^2 per sweep: a candidate of "auto" up to here
_LASSO_PROBE = 32
_ANSWERS = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def fit_surrogate(
    masks: ArrayLike,
    scores: ArrayLike,
    *,
    kernel: KernelChoice = "auto",
    ridge: Literal["loo"] | float = "loo",
    criterion: Literal["error", "rank"] = "error",
    share_ridge: Literal["auto"] | bool = "auto",
    center: bool = True,
    solver: Literal["auto", "eigh", "cg"] | ConjugateGradients = "auto",
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
            or table.
        scores: (m,) or (m, t) float, in their own units and sign. Answers come back in this array
            kind, dtype and device.
        kernel: ``"auto"``; a name of :mod:`ksm_ext.kernels` or a sum such as ``"linear+rbf"``; a
            kernel object or class, whose open parameters are searched; a list of these; or
            ``"least_squares"`` (no intercept) and ``"lasso"``, the literature's linear surrogates.
        ridge: ``"loo"``, or the number added to the diagonal of the Gram matrix
            (scikit-learn's ``alpha``).
        criterion: ``"error"`` chooses by squared error, ``"rank"`` by mean Spearman correlation of
            leave-one-out predictions.
        share_ridge: True for one kernel and ridge for all targets, False for one per target;
            ``"auto"`` tries both and one per principal component of the targets, and keeps what
            predicts best on subsets that had no part in the choice.
        center: Fit an intercept. Without one, predictions shrink to zero instead of the mean.
        solver: ``"eigh"`` factors the (m, m) Gram matrix; ``"cg"`` never stores it: preconditioned
            conjugate gradients (:class:`ksm_ext.ConjugateGradients` sets them), with estimated
            leave-one-out residuals, at the ridges around the best; faster from some thousands of
            subsets on. ``"auto"``: ``"eigh"``, which is exact, up to 20,000 subsets.
        task_names: n names; by default those of the columns, or "0", "1", ….
        target_names: t names, likewise.
        progress: Whether to show a bar over kernels.

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
    check_choice("criterion", criterion, ("error", "rank"))
    share_ridge = bool(share_ridge) if share_ridge in (True, False) else share_ridge
    check_choice("share_ridge", share_ridge, ("auto", True, False))
    tables = {"masks": (masks, "subset", "task"), "scores": (scores, "subset", "target")}
    masks, scores = aligned(tables)
    table, outcome = _check_tables(masks, scores)
    fixed_ridge = _check_ridge(ridge, outcome)
    problem = Scores(outcome, center, criterion == "rank")
    if not bool((problem.variance > 0).any()):
        remedy = "There is nothing to explain: check the scores."
        raise ValueError(message("scores", "varying over subsets", "constant targets only", remedy))
    settings = _solver(solver, len(table))
    kernels, linear = _expand(kernel, table)
    if settings is not None and "least_squares" in linear:
        remedy = "Use kernel='linear' with a small ridge."
        expected = "a kernel or 'lasso' with conjugate gradients"
        raise ValueError(message("kernel", expected, "'least_squares'", remedy))
    sharing: tuple[Sharing, ...] = ("target",)
    nothing_to_share = fixed_ridge is not None and len(kernels) == 1
    if share_ridge is True or outcome.shape[1] == 1 or not kernels or nothing_to_share:
        sharing = ("shared",)
    elif share_ridge == "auto":
        sharing = ("shared", "target")
        if len(table) <= _SCREEN_FROM and settings is None:
            sharing = ("shared", "target", "component")
    rows: list[Candidate] = []
    sample = _sample(table, _SCREEN_ROWS if settings is None else _SAMPLE_ROWS)
    if len(kernels) > 2 and len(table) > _SCREEN_FROM:
        kernels = _screen(kernels, table, problem, fixed_ridge, sample, rows)
    components = "component" in sharing
    trials: list[Trial] = [MeanTrial(problem, components=components)]
    trials += [
        KernelTrial(k, table, problem, ridge=fixed_ridge, components=components)
        if settings is None
        else KrylovTrial(
            k,
            table,
            problem,
            settings,
            ridge=fixed_ridge,
            sample=sample,
            per_target=share_ridge is False,
        )
        for k in tqdm(kernels, "kernels", unit="", disable=not progress)
    ]
    if kernel == "auto" and settings is None and _lasso_is_promising(table, problem, trials):
        linear = ["lasso"]
    folds = _folds(len(table), outcome.device)
    trials += [LinearTrial(label, table, problem, folds) for label in linear]
    if kernel in LINEAR or fixed_ridge is not None:
        trials = trials[1:]  # asked for by name: the mean does not stand in for it
    # "auto" leans to the exponential kernel: a mixture of all widths, it is the safest
    # extrapolation
    preferred = {i for i, trial in enumerate(trials) if kernel == "auto" and _is_default(trial)}
    choice = _choose(trials, table, problem, sharing, preferred)
    return _assemble(
        choice,
        trials,
        problem,
        table,
        rows,
        task_names=_names("task_names", task_names, masks, table.num_tasks),
        target_names=_names("target_names", target_names, scores, outcome.shape[1]),
        scores=scores,
        solver=settings,
    )


# -- arguments ----------------------------------------------------------------------------------


def _check_tables(masks: ArrayLike, scores: ArrayLike) -> tuple[Masks, Tensor]:
    outcome = as_tensor("scores", scores)
    if outcome.ndim not in (1, 2):
        remedy = "Give one row per subset and one column per target."
        raise ValueError(message("scores", "of shape (m,) or (m, t)", shape_text(outcome), remedy))
    table = Masks.of(masks).to(outcome.device)
    if len(outcome) != len(table):
        expected = f"of {len(table)} rows like `masks`"
        remedy = "Give one score (row) per subset."
        raise ValueError(message("scores", expected, shape_text(outcome), remedy))
    if outcome.ndim == 2 and outcome.shape[1] == 0:
        remedy = "Give one column per target."
        raise ValueError(message("scores", "of at least one target", shape_text(outcome), remedy))
    check_finite("scores", outcome)
    if len(table) < 3:
        remedy = "Score more subsets; several times the number of tasks is a good start."
        raise ValueError(message("masks", "at least 3 subsets", f"{len(table)}", remedy))
    outcome = outcome.to(torch.float64).reshape(len(outcome), -1)
    rows = table.bits if table.binary else table.values
    if bool((rows == rows[0]).all()):
        what = "the same subset"
        if table.binary and int(table.sizes[0]) in (0, table.num_tasks):
            what = "the empty subset" if int(table.sizes[0]) == 0 else "the full subset"
        remedy = "Draw different subsets, for example with ksm_ext.subsets.bernoulli."
        found = f"{what} {len(table)} times"
        raise ValueError(message("masks", "at least two different subsets", found, remedy))
    return table, outcome


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


def _names(
    argument: str, given: Sequence[str] | None, source: ArrayLike, count: int
) -> tuple[str, ...]:
    if given is None:
        return tuple(str(name) for name in names_along(source, 1) or range(count))
    names = tuple(str(name) for name in given)
    if len(names) != count:
        remedy = "Give one name per column."
        raise ValueError(message(argument, f"{count} names", f"{len(names)}", remedy))
    if len(set(names)) != count:
        twice = next(name for name in names if names.count(name) > 1)
        remedy = "Rename one of them."
        raise ValueError(message(argument, "all different", f"{twice!r} more than once", remedy))
    return names


def _expand(kernel: KernelChoice, masks: Masks) -> tuple[list[Kernel], list[str]]:
    """Kernels with all parameters set, and linear surrogates by name."""
    if isinstance(kernel, str) and kernel == "auto":
        kinds: list[Any] = [Linear(), ANOVA2(), RBF(), Exponential()]
        if not masks.binary:
            kinds.append(Laplace())  # on masks it equals RBF
    elif isinstance(kernel, Iterable) and not isinstance(kernel, str):
        kinds = list(kernel)
    else:
        kinds = [kernel]
    kernels: list[Kernel] = []
    linear: list[str] = []
    for kind in kinds:
        if isinstance(kind, str) and kind in LINEAR:
            linear.append(kind)
        else:
            kernels += as_kernel(kind).grid(masks)
    if not kernels and not linear:
        raise ValueError(message("kernel", "at least one kernel", "an empty list", "Name one."))
    return kernels, linear


def _lasso_is_promising(masks: Masks, scores: Scores, trials: list[Trial]) -> bool:
    """Whether sparse linear effects beat every kernel on a sample of the targets.

    Lasso costs more than all kernels together, and wins rarely, but then by far.
    """
    if masks.num_tasks > _LASSO_TASKS or len(masks) < 10:
        return False
    columns = scores.spaced_targets(_LASSO_PROBE)
    probe_scores = Scores(scores.values[:, columns], scores.center, False)
    probe = LinearTrial("lasso", masks, probe_scores, _folds(len(masks), columns.device))
    # squared residuals of the sample, comparable across trials; the criterion plays no part yet
    best = min(_sample_error(trial, scores, columns) for trial in trials)
    return probe.judgement.errors[0].item() * probe_scores.mean_variance < best


def _sample_error(trial: Trial, scores: Scores, columns: Tensor) -> float:
    """Mean squared residual over some targets, at the trial's best ridge."""
    at = int(trial.judgement.losses.argmin())
    ridges = trial.judgement.ridges[at].expand(len(columns))
    return float(trial.residuals(ridges, columns, components=False).square().mean())


def _folds(num_subsets: int, device: torch.device) -> Tensor:
    """(m,) int64 fold of each subset, five of equal size, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randperm(num_subsets, generator=generator) % min(5, num_subsets)).to(device)


def _is_default(trial: Trial) -> bool:
    return isinstance(trial, KernelTrial) and isinstance(trial.kernel, Exponential)


# -- choosing -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Choice:
    """The trial and the ridge of every latent column.

    Attributes:
        sharing: What has a choice of its own.
        trial: (q,) int64 index of the trial.
        ridge: (q,) int64 index into the trial's ridges.
    """

    sharing: Sharing
    trial: Tensor
    ridge: Tensor


def _sample(masks: Masks, count: int) -> Tensor:
    """At most ``count`` rows drawn at random, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(len(masks), generator=generator)[:count].to(masks.values.device)


def _screen(
    kernels: list[Kernel],
    masks: Masks,
    scores: Scores,
    ridge: Tensor | None,
    pick: Tensor,
    rows: list[Candidate],
) -> list[Kernel]:
    """The kernels that are not clearly worse than the best, at most two, judged on a sample.

    One eigendecomposition costs m^3: searching kernels on the few subsets of ``pick`` and a sample
    of the targets, and ridges on everything, costs one or two of those instead of one per kernel.
    """
    sample, sample_scores = masks[pick], scores.sample_targets(_SCREEN_TARGETS)[pick]
    if not bool((sample_scores.variance > 0).any()):
        return kernels  # the sample saw nothing happen: judge all on everything
    trials: list[Trial] = []
    for kernel in kernels:
        trials.append(KernelTrial(kernel, sample, sample_scores, ridge=ridge))
    rows += _describe(trials, len(sample), None)
    best = [trial.judgement.subset_losses[trial.judgement.losses.argmin()] for trial in trials]
    order = torch.stack([losses.mean() for losses in best]).argsort(stable=True).tolist()
    first, second = order[0], order[1]
    tied = not _is_clear(best[second] - best[first])
    return [kernels[index] for index in sorted([first, second] if tied else [first])]


def _choose(
    trials: list[Trial],
    masks: Masks,
    scores: Scores,
    sharing: tuple[Sharing, ...],
    preferred: set[int],
) -> Choice:
    """One choice for all targets, unless a freer one predicts subsets it has not seen better.

    The freer ways of sharing keep the kernel of the shared choice: the best of hundreds of
    candidates for a single target would be mostly noise.
    """
    choice = _best(trials, scores, sharing[0])
    if sharing[0] != "shared":
        return choice
    if preferred:
        default = _best(trials, scores, "shared", preferred)
        charged, least = (
            scores.losses(_residuals(each, trials, scores))[0] for each in (default, choice)
        )
        choice = choice if _is_clear(charged - least) else default
    kept = int(choice.trial[0])
    trial = trials[kept]
    if len(sharing) == 1 or not isinstance(trial, KernelTrial):
        return choice
    among = {kept} | {i for i, each in enumerate(trials) if isinstance(each, MeanTrial)}
    if len(masks) > _SCREEN_FROM or isinstance(trial, KrylovTrial):
        residuals = [_residuals(choice, trials, scores), _crossed(trials, scores, among)]
    else:
        residuals = _validation_residuals(trial.kernel, masks, scores, sharing)
    # no margin here: nothing in these residuals favours the freer ways
    best = int(torch.stack([scores.losses(each)[0].mean() for each in residuals]).argmin())
    return choice if best == 0 else _best(trials, scores, sharing[best], among)


def _is_clear(gain: Tensor) -> bool:
    """Whether a mean gain over subsets (m,) exceeds twice its standard error."""
    return bool(gain.mean() > 2 * gain.std() / len(gain) ** 0.5)


def _crossed(trials: list[Trial], scores: Scores, among: set[int]) -> Tensor:
    """(m, t) leave-one-out residuals of one half under the ridges per target of the other half.

    With many subsets this is as honest as refitting, and costs no factorisation.
    """
    crossed = torch.empty_like(scores.values)
    for half in (0, 1):
        elsewhere = _best(trials, scores, "target", among, half=1 - half)
        crossed[half::2] = _residuals(elsewhere, trials, scores)[half::2]
    return crossed


def _validation_residuals(
    kernel: Kernel, masks: Masks, scores: Scores, sharing: tuple[Sharing, ...]
) -> list[Tensor]:
    """5-fold residuals (m, t) of each way of sharing, everything chosen anew in each fold.

    Leave-one-out residuals would flatter the freer ways: they chose their ridges, and components
    their axes, with the subset at hand.
    """
    residuals = [torch.empty_like(scores.values) for _ in sharing]
    folds = _folds(len(masks), masks.values.device)
    for fold in range(int(folds.max()) + 1):
        held, rest = folds == fold, folds != fold
        known, outcome = masks[rest], scores[rest]
        components = "component" in sharing
        trials: list[Trial] = [
            MeanTrial(outcome, components=components),
            KernelTrial(kernel, known, outcome, components=components),
        ]
        for way, errors in zip(sharing, residuals, strict=True):
            model = _assemble(_best(trials, outcome, way), trials, outcome, known)
            errors[held] = scores.values[held] - model.predict(masks[held].values)
    return residuals


def _best(
    trials: list[Trial],
    scores: Scores,
    sharing: Sharing,
    among: set[int] | None = None,
    *,
    half: int | None = None,
) -> Choice:
    """The best trial and ridge of every latent column under one way of sharing.

    ``among`` restricts the trials; ``half`` has ridges per target chosen on that half of the
    subsets.
    """
    device = scores.values.device
    q = scores.rotation.shape[1] if sharing == "component" else scores.values.shape[1]
    best = torch.full((q,), float("inf"), dtype=torch.float64, device=device)
    trial_index = torch.zeros(q, dtype=torch.int64, device=device)
    ridge_index = torch.zeros(q, dtype=torch.int64, device=device)
    for index, trial in enumerate(trials):
        judgement = trial.judgement
        if among is not None and index not in among:
            continue
        by_half = judgement.target_losses  # (R, 2, t)
        losses: Tensor | None = by_half.mean(1) if half is None else by_half[:, half]
        if sharing == "component":
            losses = judgement.component_losses
        elif sharing == "shared":
            losses = judgement.losses[:, None].expand(-1, q)
        if losses is None:  # lasso is not linear in the scores: it has no components
            continue
        value, at = losses.min(0)
        better = value < best
        best = torch.where(better, value, best)
        trial_index = torch.where(better, index, trial_index)
        ridge_index = torch.where(better, at, ridge_index)
    return Choice(sharing, trial_index, ridge_index)


def _groups(choice: Choice, trials: list[Trial]) -> list[tuple[int, Tensor, Tensor]]:
    """(trial index, latent columns, their ridges) for each trial in use."""
    groups = []
    for index in torch.unique(choice.trial).tolist():
        columns = (choice.trial == index).nonzero()[:, 0]
        ridges = trials[index].judgement.ridges[choice.ridge[columns]]
        groups.append((index, columns, ridges))
    return groups


def _latent_residuals(choice: Choice, trials: list[Trial], scores: Scores) -> Tensor:
    """(m, q) leave-one-out residuals of the latent columns of a choice."""
    components = choice.sharing == "component"
    latent = scores.values.new_zeros(len(scores.values), len(choice.trial))
    for index, columns, ridges in _groups(choice, trials):
        latent[:, columns] = trials[index].residuals(ridges, columns, components=components)
    return latent


def _residuals(choice: Choice, trials: list[Trial], scores: Scores) -> Tensor:
    """(m, t) leave-one-out residuals of a choice."""
    latent = _latent_residuals(choice, trials, scores)
    return latent @ scores.rotation.T if choice.sharing == "component" else latent


# -- the result ---------------------------------------------------------------------------------


def _describe(trials: list[Trial], num_subsets: int, choice: Choice | None) -> list[Candidate]:
    rows = []
    for index, trial in enumerate(trials):
        judgement = trial.judgement
        for at, (ridge, error, rank) in enumerate(
            zip(judgement.ridges, judgement.errors, judgement.ranks, strict=True)
        ):
            chosen = 0
            if choice is not None:
                chosen = int(((choice.trial == index) & (choice.ridge == at)).sum())
            rows.append(
                Candidate(trial.label, float(ridge), float(error), float(rank), num_subsets, chosen)
            )
    return rows


def _assemble(
    choice: Choice,
    trials: list[Trial],
    problem: Scores,
    masks: Masks,
    rows: Sequence[Candidate] = (),
    *,
    task_names: tuple[str, ...] = (),
    target_names: tuple[str, ...] = (),
    scores: ArrayLike | None = None,
    solver: ConjugateGradients | None = None,
) -> Surrogate:
    """The surrogate of a choice, answering in the kind of ``scores`` (tensors by default)."""
    components = choice.sharing == "component"
    offset = torch.zeros(len(choice.trial), dtype=torch.float64, device=problem.values.device)
    intercept = problem.offset.clone()
    kernel_terms, linear_terms = [], []
    for index, columns, ridges in _groups(choice, trials):
        trial = trials[index]
        if isinstance(trial, KernelTrial):
            rotated = trial.rotated(columns, components=components)
            dual = trial.factor.dual(rotated, ridges)
            if problem.center:
                offset[columns] = trial.factor.offset(dual)
            variance = trial.factor.signal_variance(rotated, ridges)
            kernel_terms.append(KernelTerm(trial.kernel, columns, dual, ridges, variance))
        elif isinstance(trial, LinearTrial):
            linear_terms.append(LinearTerm(columns, trial.weights[:, columns]))
            intercept[columns] = trial.offset[columns]
    rotation = problem.rotation if components else None
    intercept += offset if rotation is None else rotation @ offset
    original = problem.values if scores is None else as_tensor("scores", scores)
    table = CandidateTable((*rows, *_describe(trials, len(masks), choice)), problem.variance)
    return Surrogate(
        masks=masks,
        intercept=intercept,
        kernel_terms=tuple(kernel_terms),
        linear_terms=tuple(linear_terms),
        rotation=rotation,
        center=problem.center,
        task_names=task_names,
        target_names=target_names,
        candidates=table,
        sharing=choice.sharing,
        scores=problem.values.clone(),  # the caller may reuse the table
        residuals=_residuals(choice, trials, problem),
        kind=Kind.of(problem.values if scores is None else scores),
        dtype=_ANSWERS.get(original.dtype, torch.float64),
        single_target=original.ndim == 1,
        solver=solver,
    )
