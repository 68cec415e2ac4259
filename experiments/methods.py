"""Every method, with one interface: from a problem to attributions (n, t) and predicted scores.

Attributions τ[i, j] estimate F_j(all tasks) - F_j(all but task i) in units of the loss. A method
that gives nothing but attributions predicts the score of a subset by what it lacks,

    F̂(S) = F(1) - Σ_{i not in S} τ_i,

and a surrogate predicts each fold of the subsets from a fit to the others.

Shapes: n tasks, t targets, masks (m, n), scores and predictions (m, t).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from experiments.folds import held_out, split
from experiments.settings import TrainedSettings, Training
from experiments.trained import TrainedExperiment
from ksm_ext import GradientEstimator, Projector, fit_surrogate
from ksm_ext.attribution.influence import influence, projected_influence
from ksm_ext.attribution.task_hessian import task_hessian
from ksm_ext.attribution.tracin import gradient_cosine, tracin
from ksm_ext.attribution.trak import trak
from ksm_ext.network.hessian import CurvatureOperator, GaussNewton, Hessian
from ksm_ext.network.solvers import BlockConjugateGradients, LiSSA
from ksm_ext.network.spectrum import top_eigenpairs
from ksm_ext.subsets import bernoulli, leave_one_out


@dataclass(frozen=True, eq=False)
class Problem:
    """What the methods may look at.

    Attributes:
        experiment: Samples and settings.
        networks: Trained on all tasks, a list of checkpoints for each seed.
        masks: (m, n) bool. The subsets.
        scores: (m, t) their retrained scores, for methods that learn from them.
        full_score: (t,) score of training on all tasks.
        calibration: (c, n) bool, other subsets.
        calibration_scores: (c, t) their retrained scores.
    """

    experiment: TrainedExperiment
    networks: list[list[nn.Module]]
    masks: Tensor
    scores: Tensor
    full_score: Tensor
    calibration: Tensor
    calibration_scores: Tensor

    @property
    def settings(self) -> TrainedSettings:
        return self.experiment.settings

    @cached_property
    def tasks(self) -> list[tuple[Tensor, Tensor]]:
        return self.experiment.data().by_task()

    @cached_property
    def targets(self) -> dict[str, tuple[Tensor, Tensor]]:
        return self.experiment.data().by_target()

    @property
    def models(self) -> list[nn.Module]:
        """One network for each seed, at the checkpoint of the methods."""
        return self.models_at(self.settings.methods.checkpoint)

    def models_at(self, checkpoint: int) -> list[nn.Module]:
        return [path[checkpoint] for path in self.networks]

    @property
    def samples(self) -> tuple[Tensor, Tensor]:
        data = self.experiment.data()
        return data.inputs, data.labels

    @property
    def projector(self) -> Projector:
        return Projector(self.settings.methods.proj_dim, seed=self.settings.truth.seed)


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says.

    Attributes:
        attributions: (n, t).
        predictions: (m, t) scores of the problem's subsets.
        by_sample: (b, t) attributions of single samples, where a method has them on its way.
    """

    attributions: Tensor
    predictions: Tensor
    by_sample: Tensor | None = None


Method = Callable[[Problem], Answer]


# -- surrogates ---------------------------------------------------------------------------------


def retrained_surrogate(problem: Problem, **options: Any) -> Answer:
    """A surrogate of the retrained scores; ``options`` go to :func:`ksm_ext.fit_surrogate`."""
    masks, scores = problem.masks, problem.scores
    folds = split(len(masks), problem.settings.truth.num_folds)
    attributions = fit_surrogate(masks, scores, **options).attribute("loo")
    return Answer(attributions, held_out(masks, scores, folds, **options))


def estimated_surrogate(problem: Problem, *, calibrated: bool, **options: Any) -> Answer:
    """A surrogate of scores that are estimated from gradients; few or no subsets are retrained."""
    fitted = fit_surrogate(*estimated_scores(problem, calibrated=calibrated), **options)
    return Answer(fitted.attribute("loo"), fitted.predict(problem.masks))


def few_retrained(problem: Problem, **options: Any) -> Answer:
    """A surrogate of the few subsets that a calibrated method retrains, and of nothing else."""
    fitted = fit_surrogate(problem.calibration, problem.calibration_scores, **options)
    return Answer(fitted.attribute("loo"), fitted.predict(problem.masks))


def estimated_and_retrained(problem: Problem) -> Answer:
    """The same with the estimated scores beside them."""
    estimates = fit_surrogate(*estimated_scores(problem, calibrated=True), kernel="rbf")
    return few_retrained(problem, estimates=estimates)


def estimated_scores(problem: Problem, *, calibrated: bool) -> tuple[Tensor, Tensor]:
    """Many subsets near the full set, and their estimated scores."""
    methods, truth = problem.settings.methods, problem.settings.truth
    num_tasks = len(problem.tasks)
    checkpoint = methods.estimate_checkpoint
    estimator = GradientEstimator(
        problem.models_at(methods.checkpoint if checkpoint is None else checkpoint),
        problem.tasks,
        problem.targets,
        projector=problem.projector,
        ridge=methods.estimate_ridge,
        solver=methods.estimate_solver,
        progress=False,
    ).fit()
    if calibrated:
        estimator.calibrate(problem.calibration, problem.calibration_scores)
    nearest = leave_one_out(num_tasks, include_full=True)
    others = bernoulli(num_tasks, methods.num_estimated, truth.inclusion, seed=truth.seed)
    masks = torch.cat([nearest, others]).unique(dim=0)
    return masks, estimator.predict(masks)


# -- gradients ----------------------------------------------------------------------------------


def additive(attribute: Callable[[Problem], Tensor], problem: Problem) -> Answer:
    """The answer of a method that gives attributions (n, t) only."""
    values = attribute(problem).double().cpu()
    return Answer(values, problem.full_score - (~problem.masks).double() @ values)


def over_models(attribute: Callable[[nn.Module, Problem], Tensor], problem: Problem) -> Answer:
    """The answer of a method that gives attributions for one network: their mean over seeds."""
    return additive(lambda problem: mean_of(attribute, problem), problem)


def mean_of(attribute: Callable[[nn.Module, Problem], Tensor], problem: Problem) -> Tensor:
    """Mean over seeds of what a function says of one network."""
    return torch.stack([attribute(model, problem) for model in problem.models]).mean(0)


def influence_of(model: nn.Module, problem: Problem, **options: Any) -> Tensor:
    """Influence at the damping of the settings, unless ``options`` say otherwise."""
    options = {"damping": problem.settings.methods.damping} | options
    return influence(model, problem.tasks, problem.targets, **options).values


def by_conjugate_gradients(
    model: nn.Module, problem: Problem, *, curvature: type[CurvatureOperator]
) -> Tensor:
    methods = problem.settings.methods
    definite = curvature is GaussNewton
    damping = methods.damping if definite else shifted(methods.damping, model, problem)
    solver = BlockConjugateGradients(tolerance=1e-3, max_steps=methods.num_steps)
    return influence_of(model, problem, curvature=curvature, damping=damping, solver=solver)


def shifted(damping: float, model: nn.Module, problem: Problem) -> float:
    """A damping that makes the Hessian definite, which it is not where training has not ended.

    Twice the most negative eigenvalue: no direction is then amplified by more than those of the
    same curvature upwards.
    """
    operator = Hessian(model, problem.samples)
    lowest, _ = top_eigenpairs(operator, 1, which="smallest", tolerance=1e-2)
    return damping + 2 * max(0.0, -float(lowest[0]))


def by_lissa(model: nn.Module, problem: Problem) -> Tensor:
    methods = problem.settings.methods
    largest, _ = top_eigenpairs(GaussNewton(model, problem.samples), 1, tolerance=1e-2)
    solver = LiSSA(1.1 * (float(largest[0]) + methods.damping), num_steps=methods.num_steps)
    return influence_of(model, problem, solver=solver)


def by_projection(model: nn.Module, problem: Problem) -> Tensor:
    data, damping = (problem.tasks, problem.targets), problem.settings.methods.damping
    return projected_influence(model, *data, problem.projector, damping=damping).values


def by_ekfac(model: nn.Module, problem: Problem) -> Tensor:
    """Influence with curvlinops' EK-FAC in place of the curvature: linear and convolving layers."""
    from curvlinops import EKFACLinearOperator, FisherType, KFACInverseLinearOperator

    kinds = (nn.Linear, nn.Conv2d)
    linear = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    weights = {n: w for n, w in model.named_parameters() if n.rpartition(".")[0] in linear}
    batches = list(zip(*(part.split(512) for part in problem.samples), strict=True))
    options = {"fisher_type": FisherType.TYPE2, "check_deterministic": False}
    loss = nn.CrossEntropyLoss()
    factored = EKFACLinearOperator(model, loss, list(weights.values()), batches, **options)
    damping = problem.settings.methods.damping
    inverse = KFACInverseLinearOperator(factored, damping=damping, use_exact_damping=True)
    solver = lambda rhs: (inverse @ rhs.T).T  # noqa: E731
    return influence_of(model, problem, parameters=list(weights), solver=solver)


def by_trak(problem: Problem) -> Tensor:
    data, ridge = (problem.tasks, problem.targets), problem.settings.methods.trak_ridge
    return trak(problem.models, *data, projector=problem.projector, relative_ridge=ridge).values


def by_tracin(problem: Problem) -> Tensor:
    rates = _rates(problem.settings.training)
    paths = [tracin(path, rates, problem.tasks, problem.targets) for path in problem.networks]
    return torch.stack(paths).mean(0)


def _rates(training: Training) -> list[float]:
    """Learning rates of the steps that each checkpoint stands for: those since the one before."""
    spans = pairwise((0, *training.stops()))
    return [sum(training.rate(step) for step in range(*span)) for span in spans]


def by_cosine(model: nn.Module, problem: Problem) -> Tensor:
    return gradient_cosine(model, problem.tasks, problem.targets)


def by_task_hessian(model: nn.Module, problem: Problem) -> Tensor:
    """Second order in the task weights: F(1) - F(1 - e_i) = F'_i - F''_ii / 2."""
    methods = problem.settings.methods
    expansion = task_hessian(
        model,
        problem.tasks,
        problem.targets,
        damping=shifted(methods.hessian_ridge, model, problem),
        interactions=False,
        solver=BlockConjugateGradients(tolerance=1e-3, max_steps=methods.num_steps),
    )
    return expansion.gradient - expansion.hessian.diagonal(dim1=1, dim2=2).T / 2


DATAMODELS: dict[str, dict[str, Any]] = {
    "least squares": {"kernel": "least_squares"},
    "ridge datamodel": {"kernel": "linear"},
    "lasso datamodel": {"kernel": "lasso"},
    "kernel surrogate": {"kernel": "rbf"},
    "surrogate of its own choice": {},
}
"""Surrogates of retrained scores, by what `fit_surrogate` is told."""
RETRAINED: dict[str, Method] = {
    name: partial(retrained_surrogate, **told) for name, told in DATAMODELS.items()
}
"""Methods that learn from all retrained subsets."""
FEW = (
    "kernel surrogate, calibrated",
    "kernel surrogate, estimated and retrained together",
    "kernel surrogate, few retrained",
)
"""Methods that learn from the few subsets to calibrate with; the last from nothing else."""
OWN_SHARE = "own share"
"""A baseline of the experiment with text, which learns from all retrained subsets too."""
METHODS = RETRAINED | {
    "kernel surrogate, estimated": partial(estimated_surrogate, calibrated=False, kernel="rbf"),
    "kernel surrogate, calibrated": partial(estimated_surrogate, calibrated=True, kernel="rbf"),
    "kernel surrogate, estimated and retrained together": estimated_and_retrained,
    "kernel surrogate, few retrained": partial(few_retrained, kernel="rbf"),
    "influence, CG on GGN": partial(
        over_models, partial(by_conjugate_gradients, curvature=GaussNewton)
    ),
    "influence, CG on Hessian": partial(
        over_models, partial(by_conjugate_gradients, curvature=Hessian)
    ),
    "influence, LiSSA": partial(over_models, by_lissa),
    "influence, projected": partial(over_models, by_projection),
    "influence, EK-FAC": partial(over_models, by_ekfac),
    "TRAK": partial(additive, by_trak),
    "TracIn": partial(additive, by_tracin),
    "gradient cosine": partial(over_models, by_cosine),
    "task Hessian": partial(over_models, by_task_hessian),
}
