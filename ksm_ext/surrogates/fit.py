"""``fit_surrogate``: choose kernel and ridge by exact leave-one-out error, and keep the winner.

Rows of one subset become one observation (:mod:`.observations`). Every candidate kernel is factored
once and judged at every ridge (:mod:`.trials`), on standardised scores. The choice may be made once
for all targets, per target, or per principal component of the targets (:mod:`.choice`). Targets
that miss different scores are fitted apart, each on its own subsets.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.arrays import ArrayLike, Kind, aligned, as_tensor, names_along, table_library
from ksm_ext.checks import check_choice, check_real, message
from ksm_ext.surrogates.candidates import Candidate, CandidateTable
from ksm_ext.surrogates.choice import (
    CROSSED_FROM,
    Choice,
    Model,
    Sharing,
    assemble,
    best,
    choose,
    clearly_better,
    folds_of,
    residuals,
)
from ksm_ext.surrogates.kernels import ANOVA2, RBF, Exponential, Kernel, Laplace, Linear, as_kernel
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.observations import (
    Missing,
    Observations,
    observe,
    own_share,
    own_to_noise,
    precision_weights,
)
from ksm_ext.surrogates.surrogate import Surrogate
from ksm_ext.surrogates.terms import KEPT, KernelTerm, LinearTerm
from ksm_ext.surrogates.trials import (
    KernelTrial,
    KrylovTrial,
    LinearTrial,
    MeanTrial,
    Scores,
    Trial,
)

KernelChoice = str | Kernel | type[Kernel] | Sequence[str | Kernel | type[Kernel]]

LINEAR = ("least_squares", "lasso")
MAX_DIRECT = 20_000
"""Subsets up to which the (m, m) Gram matrix is factored: 3.2 GB, and a few times that to do so."""

_SCREEN_ROWS = 512
_SAMPLE_ROWS = 2048  # the same, where what follows is conjugate gradients on everything
_SCREEN_TARGETS = 128
_SCREEN_KEPT = 4  # kernels at most, of which two by their pooled error
_LASSO_TASKS = 256  # coordinate descent costs n^2 per sweep: a candidate of "auto" up to here
_LASSO_PROBE = 32
_APART = 4.0  # standard deviations by which the empty subset's score is no continuation of others
_APART_FROM = 8  # subsets that can tell
_SHARED_FROM = 5  # subsets from which folds can judge ways of sharing
_UNEVEN = 1.05  # ratio of weights from which a second fit is worth it
_ANSWERS = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
}


def fit_surrogate(
    masks: ArrayLike,
    scores: ArrayLike | None = None,
    *,
    kernel: KernelChoice = "auto",
    ridge: Literal["loo"] | float = "loo",
    criterion: Literal["error", "rank"] = "error",
    share_ridge: Literal["auto"] | bool = "auto",
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
            predicts best on subsets that had no part in the choice, and lets a target go its own
            way where that is clearly better: no target is fitted worse for the company it is in.
        center: Fit an intercept. Without one, predictions shrink to zero instead of the mean.
        solver: ``"eigh"`` factors the (m, m) Gram matrix; ``"cg"`` never stores it: preconditioned
            conjugate gradients (:class:`ksm_ext.ConjugateGradients` sets them), with estimated
            leave-one-out residuals, at the ridges around the best; faster from some thousands of
            subsets on. ``"auto"``: ``"eigh"``, which is exact, up to 20,000 subsets.
        noise_std: Standard deviation of a single run by its seed: a number, or of shape (t,), (m,)
            or (m, t). Splits the ridge into noise and what is peculiar to a subset; 0 for scores
            without noise. By default measured on repeated subsets, or unknown.
        known: (m,) bool, or numbers of rows, whose scores are exact: they are interpolated. The
            scores of the empty and the full subset are taken so where the ridge is chosen and
            the noise is neither given nor measured.
        missing: ``"drop"`` takes NaN in ``scores`` for a score that is missing, and fits each
            target to the subsets that have it.
        task_names: n names; by default those of the columns, or "0", "1", ….
        target_names: t names, likewise.
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
    check_choice("criterion", criterion, ("error", "rank"))
    share_ridge = bool(share_ridge) if share_ridge in (True, False) else share_ridge
    check_choice("share_ridge", share_ridge, ("auto", True, False))
    masks, scores, target_names = _tables(masks, scores, target_names)
    masks, scores, noise_std, known = _aligned(masks, scores, noise_std, known)
    observed = observe(masks, scores, noise_std=noise_std, known=known, missing=missing)
    _check_problem(observed)
    options = _Options(
        kernel=kernel,
        ridge=_check_ridge(ridge, observed.scores),
        by_rank=criterion == "rank",
        share_ridge=share_ridge,
        center=center,
        solver=_solver(solver, len(observed.masks)),
        progress=progress,
    )
    return _put_together(
        _fit_parts(observed, options),
        observed,
        options,
        task_names=_names("task_names", task_names, masks, observed.masks.num_tasks),
        target_names=_names("target_names", target_names, scores, observed.scores.shape[1]),
        scores=scores,
    )


# -- arguments ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Options:
    """The arguments of a fit that say how."""

    kernel: KernelChoice
    ridge: Tensor | None
    by_rank: bool
    share_ridge: Literal["auto"] | bool
    center: bool
    solver: ConjugateGradients | None
    progress: bool

    @property
    def through_zero(self) -> bool:
        """Whether least squares is asked for, which has no intercept."""
        several = isinstance(self.kernel, (list, tuple))
        kinds = list(self.kernel) if several else [self.kernel]  # type: ignore[arg-type]
        return any(isinstance(kind, str) and kind == "least_squares" for kind in kinds)

    @property
    def textbook(self) -> bool:
        """Whether the caller fixed the smoothing: all residuals are noise then."""
        named = isinstance(self.kernel, str) and self.kernel in LINEAR
        return self.ridge is not None or named


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


# -- fitting ------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Part:
    """Targets (columns) that are fitted to the same subsets (rows), and their model.

    ``own`` (rows, columns) is the share of residuals that is peculiar to subsets; ``noise``
    (columns,) the variance of the noise at weight 1, or None if unknown, or if the ridge is given.
    """

    rows: Tensor
    columns: Tensor
    shift: Tensor
    unit: Tensor
    weights: Tensor
    model: Model
    own: Tensor
    noise: Tensor | None
    candidates: list[Candidate]

    def without_factors(self) -> "_Part":
        """The same part; the eigenvectors of all parts would take more than may be kept."""
        terms = tuple(replace(term, factor=None) for term in self.model.kernel_terms)
        return replace(self, model=replace(self.model, kernel_terms=terms))


def _fit_parts(observed: Observations, options: _Options) -> list[_Part]:
    """A model of every group of targets that are fitted to the same subsets, alike in precision."""
    parts: list[_Part] = []
    active = Masks(observed.masks.values[:, _varying(observed, options)])
    if options.ridge is not None:
        pattern = observed.counts.to(torch.float64)
    elif observed.noise is None:
        pattern = observed.observed.to(torch.float64)
    else:
        pattern = (_relative_noise(observed.noise, observed.observed) * 1e6).round()
    pattern = torch.where(observed.observed, pattern, -1.0)
    patterns, group = torch.unique(pattern, dim=1, return_inverse=True)
    for number in range(patterns.shape[1]):
        columns = (group == number).nonzero()[:, 0]
        rows = (patterns[:, number] >= 0).nonzero()[:, 0]
        apart = _apart(active, observed, rows, columns, options)
        for chosen, fitted in (
            (columns[~apart], rows),
            (columns[apart], rows[active.sizes[rows] > 0] if bool(apart.any()) else rows),
        ):
            if len(chosen):
                found = _fit_part(active, observed, fitted, chosen, options)
                few = len(fitted) ** 2 * patterns.shape[1] <= KEPT**2
                parts += found if few else [part.without_factors() for part in found]
    return parts


def _varying(observed: Observations, options: _Options) -> Tensor:
    """(n,) bool: tasks that are in some subsets and not in others.

    Without an intercept all count: one that is in every subset stands in for it.
    """
    values = observed.masks.values
    if not options.center or options.through_zero:
        return torch.ones(values.shape[1], dtype=torch.bool, device=values.device)
    return (values != values[0]).any(0)


def _relative_noise(noise: Tensor, present: Tensor) -> Tensor:
    """(m, t) variance of the noise over its mean over the subsets that are present; 1 without."""
    largest = noise.amax(0).clamp_min(1e-300)
    squares = (noise / largest).square()
    level = squares.sum(0) / present.sum(0)
    return torch.where(level > 0, squares / level.clamp_min(1e-300), 1.0)


def _apart(
    active: Masks, observed: Observations, rows: Tensor, columns: Tensor, options: _Options
) -> Tensor:
    """(len(columns),) bool: where the empty subset's score is no continuation of the others.

    A score of 0 by convention, or of a network that was never trained, says nothing of subsets
    nearby: it is kept as a value of its own. Judged by its residual when left out, beside the
    others' in units of what each should have.
    """
    apart = torch.zeros(len(columns), dtype=torch.bool, device=columns.device)
    if options.textbook or not active.binary or len(rows) < _APART_FROM:
        return apart
    empty = active.sizes[rows] == 0
    if not bool(empty.any()):
        return apart
    rest = rows[~empty]
    rows = torch.cat([rows[empty], rest[_sample(len(rest), _SCREEN_ROWS, rest.device)]])
    scores, *_ = _standardised(observed, rows, columns, options)
    if not len(scores.varying):
        return apart
    trials = [KernelTrial(kernel, active[rows], scores) for kernel in Exponential().grid(active)]
    losses = torch.stack([trial.judgement.subset_losses[:, 1:].mean(1) for trial in trials])
    nearest = trials[int(losses.amin(1).argmin())]
    ridge = nearest.judgement.ridges[losses.amin(0).argmin()]
    errors = nearest.standardised_residuals(ridge).square()
    apart[scores.varying] = (errors[0] > _APART**2 * errors[1:].mean(0))[scores.varying]
    return apart


def _standardised(
    observed: Observations, rows: Tensor, columns: Tensor, options: _Options
) -> tuple[Scores, Tensor, Tensor]:
    """Scores of some subsets and targets in units of their deviation, with shift and unit."""
    part = observed.part(rows, columns)
    shifted = options.center and not options.through_zero
    shift = part.shift if shifted else torch.zeros_like(part.shift)
    values = (part.scores - shift) / part.unit
    if shifted:
        values[:, ~part.varying] = 0.0  # exactly: the mean is rounded
    weights = torch.ones_like(values[:, 0])
    if options.ridge is not None:  # the ridge of a run: means of several have less
        weights = part.counts.to(torch.float64).mean(1)
    return Scores(values, options.center, options.by_rank, weights), shift, part.unit


def _fit_part(
    active: Masks, observed: Observations, rows: Tensor, columns: Tensor, options: _Options
) -> list[_Part]:
    """Fit some targets to some subsets; twice where these differ in precision."""
    masks = active[rows]
    scores, shift, unit = _standardised(observed, rows, columns, options)
    known = observed.known[rows][:, columns].to(torch.float64)
    if observed.noise is None or options.textbook:
        models, candidates = _fit_table(masks, scores, options)
        unknown = not options.textbook and observed.masks.binary
        own, noise = torch.ones_like(known) if unknown else known, None
    else:
        variance = (observed.noise[rows][:, columns] / unit).square()
        relative = _relative_noise(variance.sqrt(), torch.ones_like(variance))
        noise = variance.mean(0)
        scores = replace(scores, noise=noise)
        models, candidates = _fit_table(masks, scores, options)
        ratio = own_to_noise(_ridge_variance(models, unit), variance)
        if float(relative[:, 0].max() / relative[:, 0].min().clamp_min(1e-9)) > _UNEVEN:
            common = ratio.mean().clamp_max(1e9)
            weights = precision_weights(common, relative[:, 0])
            noise = weights @ variance / len(weights)
            scores = replace(scores, weights=weights, noise=noise)
            models, candidates = _fit_table(masks, scores, options)
            ratio = common.expand_as(ratio)
        own = own_share(ratio, relative)
    parts = []
    for model, targets in models:
        part = _Part(
            rows=rows,
            columns=columns[targets],
            shift=shift[targets],
            unit=unit[targets],
            weights=scores.weights,
            model=model,
            own=own[:, targets],
            noise=None if noise is None else noise[targets],
            candidates=candidates,
        )
        parts.append(part)
        candidates = []
    return parts


def _own_ridge(part: _Part, term: KernelTerm) -> Tensor | None:
    """(q_g,) share of the ridge of latent columns that is peculiar to subsets, at weight 1."""
    if part.noise is None:
        return None
    if part.model.rotation is None:
        return part.own.mean(0)[term.columns]
    noise = (part.model.rotation.square().T @ part.noise)[term.columns]
    total = (term.ridge * term.signal_variance).clamp_min(1e-300)
    return (1 - noise / total).clamp(0.0, 1.0)


def _ridge_variance(models: list[tuple[Model, Tensor]], unit: Tensor) -> Tensor:
    """(t,) of all targets."""
    total = torch.zeros_like(unit)
    for model, targets in models:
        total[targets] = model.ridge_variance
    return total


def _fit_table(
    masks: Masks, scores: Scores, options: _Options
) -> tuple[list[tuple[Model, Tensor]], list[Candidate]]:
    """Choose and solve on one complete table: models with their targets, and what was tried."""
    settings, ridge = options.solver, options.ridge
    kernels, linear = _expand(options.kernel, masks)
    if settings is not None and "least_squares" in linear:
        remedy = "Use kernel='linear' with a small ridge, or solver='eigh'."
        expected = "a kernel or 'lasso' with conjugate gradients"
        raise ValueError(message("kernel", expected, "'least_squares'", remedy))
    sharing = _ways_of_sharing(masks, scores, kernels, options)
    rows: list[Candidate] = []
    limit = _SCREEN_ROWS if settings is None else _SAMPLE_ROWS
    sample = _sample(len(masks), limit, masks.values.device)
    if len(kernels) > 2 and len(masks) > CROSSED_FROM:
        kernels = _screen(kernels, masks, scores, ridge, sample, rows)
    components = "component" in sharing

    def trial_of(kernel: Kernel) -> KernelTrial:
        if settings is None:
            return KernelTrial(kernel, masks, scores, ridge=ridge, components=components)
        per_target = options.share_ridge is False
        more: dict[str, Any] = {"ridge": ridge, "sample": sample, "per_target": per_target}
        more["progress"] = options.progress
        return KrylovTrial(kernel, masks, scores, settings, **more)

    trials: list[Trial] = [MeanTrial(scores, components=components)]
    trials += [trial_of(k) for k in tqdm(kernels, "kernels", unit="", disable=not options.progress)]
    automatic = options.kernel == "auto"
    if automatic and settings is None and _lasso_is_promising(masks, scores, trials):
        linear = ["lasso"]
    folds = folds_of(len(masks), masks.values.device)
    trials += [LinearTrial(label, masks, scores, folds) for label in linear]
    if options.textbook:
        trials = trials[1:]  # asked for by name: the mean does not stand in for it
    # "auto" leans to the exponential kernel: a mixture of all widths, it is the safest
    # extrapolation
    preferred = {i for i, trial in enumerate(trials) if automatic and _is_default(trial)}
    choices = choose(trials, masks, scores, sharing, preferred)
    rows += _describe(trials, len(masks), choices)
    lends = [trial for trial in trials if isinstance(trial, KernelTrial)]
    default = [trial for trial in lends if _is_default(trial)]
    if not lends:
        lends = [trial_of(Linear())]
    companion = (default + lends)[0] if lends else None
    models = [
        (assemble(choice, trials, scores, companion).select(targets), targets)
        for choice, targets in choices
    ]
    return models, rows


def _ways_of_sharing(
    masks: Masks, scores: Scores, kernels: list[Kernel], options: _Options
) -> tuple[Sharing, ...]:
    nothing_to_share = options.ridge is not None and len(kernels) == 1
    alone = scores.values.shape[1] == 1
    if not len(scores.varying):
        return ("target",)
    if options.share_ridge is True or alone or not kernels or nothing_to_share:
        return ("shared",)
    if options.share_ridge is False or len(masks) < _SHARED_FROM:
        return ("target",)
    if len(masks) > CROSSED_FROM or options.solver is not None:
        return ("shared", "target")
    return ("shared", "target", "component")


def _lasso_is_promising(masks: Masks, scores: Scores, trials: list[Trial]) -> bool:
    """Whether sparse linear effects beat the kernels on a sample of targets, or clearly on one.

    Lasso costs more than all kernels together, and wins rarely, but then by far.
    """
    if masks.num_tasks > _LASSO_TASKS or len(masks) < 10 or not len(scores.varying):
        return False
    columns = scores.spaced_targets(_LASSO_PROBE)
    probed = scores.targets(columns)
    probe = LinearTrial("lasso", masks, probed, folds_of(len(masks), columns.device))
    everything = torch.arange(len(columns), device=columns.device)
    charge = probed.charges(probe.residuals(probe.judgement.ridges, everything, components=False))
    together, apart = (
        probed.charges(residuals(best(trials, scores, way), trials, scores)[:, columns])
        for way in ("shared", "target")
    )
    return bool(charge.mean() < together.mean()) or bool(clearly_better(apart - charge).any())


def _is_default(trial: Trial) -> bool:
    return isinstance(trial, KernelTrial) and isinstance(trial.kernel, Exponential)


def _sample(count: int, limit: int, device: torch.device) -> Tensor:
    """At most ``limit`` of ``count`` rows drawn at random, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    return torch.randperm(count, generator=generator)[:limit].to(device)


def _screen(
    kernels: list[Kernel],
    masks: Masks,
    scores: Scores,
    ridge: Tensor | None,
    pick: Tensor,
    rows: list[Candidate],
) -> list[Kernel]:
    """The kernels that are not clearly worse than the best, at most two, judged on a sample.

    And those that a target is clearly better served by. One eigendecomposition costs m^3: searching
    kernels on the few subsets of ``pick`` and a sample of the targets, and ridges on everything,
    costs one or two of those instead of one per kernel.
    """
    sample, judged = masks[pick], scores.sample_targets(_SCREEN_TARGETS)[pick]
    if not len(judged.varying):
        return kernels  # the sample saw nothing happen: judge all on everything
    trials: list[Trial] = [KernelTrial(kernel, sample, judged, ridge=ridge) for kernel in kernels]
    rows += _describe(trials, len(sample), [])
    losses = [trial.judgement.subset_losses[trial.judgement.losses.argmin()] for trial in trials]
    first, second = torch.stack(losses).mean(1).argsort(stable=True)[:2].tolist()
    kept = [first]
    if not bool(clearly_better(losses[second] - losses[first])):
        kept.append(second)
    shared, alone = (best(trials, judged, way) for way in ("shared", "target"))
    gain = judged.charges(residuals(shared, trials, judged)) - judged.charges(
        residuals(alone, trials, judged)
    )
    wanted = alone.trial[clearly_better(gain)].bincount(minlength=len(kernels))
    wanted[kept] = 0
    more = wanted.argsort(descending=True, stable=True)[: _SCREEN_KEPT - len(kept)].tolist()
    kept += [index for index in more if wanted[index]]
    return [kernels[index] for index in sorted(kept)]


# -- the result ---------------------------------------------------------------------------------


def _describe(
    trials: list[Trial], num_subsets: int, choices: list[tuple[Choice, Tensor]]
) -> list[Candidate]:
    rows = []
    for index, trial in enumerate(trials):
        judgement = trial.judgement
        for at, (ridge, error, rank) in enumerate(
            zip(judgement.ridges, judgement.errors, judgement.ranks, strict=True)
        ):
            chosen = 0
            for choice, targets in choices:
                taken = (choice.trial == index) & (choice.ridge == at)
                chosen += int((taken if choice.sharing == "component" else taken[targets]).sum())
            rows.append(
                Candidate(trial.label, float(ridge), float(error), float(rank), num_subsets, chosen)
            )
    return rows


def _put_together(
    parts: list[_Part],
    observed: Observations,
    options: _Options,
    *,
    task_names: tuple[str, ...],
    target_names: tuple[str, ...],
    scores: ArrayLike,
) -> Surrogate:
    """The surrogate of all parts, answering in the kind of ``scores``."""
    m, t = observed.scores.shape
    intercept, unit = (observed.scores.new_zeros(t) for _ in range(2))
    left_out = observed.scores.new_full((m, t), torch.nan)
    own = observed.scores.new_zeros(m, t)
    gaps = torch.zeros_like(own)
    fitted = torch.zeros_like(observed.observed)
    width = sum(part.model.num_latent for part in parts)
    rotation = observed.scores.new_zeros(t, width)
    mixed = any(part.model.rotation is not None for part in parts)
    kernel_terms: list[KernelTerm] = []
    linear_terms: list[LinearTerm] = []
    start = 0
    for part in parts:
        rows, columns, model = part.rows, part.columns, part.model
        cells = (rows[:, None], columns)
        intercept[columns] = part.shift + part.unit * model.intercept
        unit[columns] = part.unit
        left_out[cells] = part.unit * model.loo_residuals
        gaps[cells] = part.unit * model.residuals
        own[cells] = part.own
        fitted[cells] = True
        place = columns
        if mixed:
            place = torch.arange(start, start + model.num_latent, device=columns.device)
            block = torch.eye(len(columns)).to(unit) if model.rotation is None else model.rotation
            rotation[columns[:, None], place] = block
            start += model.num_latent
        whole = len(rows) == m
        even = bool((part.weights == 1).all())
        for term in model.kernel_terms:
            dual = term.dual.new_zeros(m, term.dual.shape[1])
            dual[rows] = term.dual
            kernel_terms.append(
                replace(
                    term,
                    columns=place[term.columns],
                    dual=dual,
                    rows=None if whole else rows,
                    weights=None if even else part.weights,
                    own=_own_ridge(part, term),
                )
            )
        linear_terms += [replace(term, columns=place[term.columns]) for term in model.linear_terms]
    apart = observed.observed & ~fitted
    original = as_tensor("scores", scores)
    ways = {part.model.sharing for part in parts}
    surrogate = Surrogate(
        masks=observed.masks,
        intercept=intercept,
        kernel_terms=tuple(kernel_terms),
        linear_terms=tuple(linear_terms),
        rotation=rotation if mixed else None,
        center=options.center,
        task_names=task_names,
        target_names=target_names,
        candidates=CandidateTable(
            tuple(row for part in parts for row in part.candidates),
            unit.square().clamp_max(torch.finfo(torch.float64).max),
        ),
        sharing=ways.pop() if len(ways) == 1 else "component" if mixed else "target",
        scores=observed.scores.clone(),  # the caller may reuse the table
        unit=unit,
        residuals=left_out,
        gaps=gaps,
        own=own,
        known=observed.known,
        noise=observed.noise,
        counts=observed.counts,
        apart=apart,
        varying=_varying(observed, options),
        kind=Kind.of(scores),
        dtype=_ANSWERS.get(original.dtype, torch.float64),
        single_target=original.ndim == 1,
        solver=options.solver,
    )
    return surrogate.with_apart(apart) if bool(apart.any()) else surrogate
