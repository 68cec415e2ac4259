r"""Every method: from policies and retrained scores to attributions and predicted scores.

Attributions are leave-one-out effects, Shapley and Banzhaf values of a surrogate; a method that
looks at gradients only has one attribution τ for all three, and predicts
:math:`\hat F(S) = F(1) - \sum_{i \notin S} \tau_i`.
Its unit is that of a loss of log-ratios, not of returns: its ranks count.

Shapes: n tasks, t targets, masks (m, n), scores (m, t), all subsets (2ⁿ, n).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.methods import (
    DATAMODELS,
    Problem,
    by_conjugate_gradients,
    by_cosine,
    by_projection,
    by_trak,
    mean_of,
)
from experiments.rl.data import Suite
from experiments.rl.rollouts import Seen, better_action, log_ratio
from ksm_ext import GradientEstimator, Surrogate, fit_surrogate
from ksm_ext.attribution.tracin import tracin
from ksm_ext.network.hessian import GaussNewton
from ksm_ext.subsets import all_subsets, bernoulli, leave_one_out

READOUTS = ("loo", "shapley", "banzhaf")


@dataclass(frozen=True, eq=False)
class ControlProblem(Problem):
    """What the methods may look at.

    Attributes:
        suite: The tasks, which are targets too.
        seen: Samples of the policies trained on all of them.
    """

    suite: Suite
    seen: Seen

    @cached_property
    def tasks(self) -> list[tuple[Tensor, Tensor]]:
        """States and better actions."""
        return [better_action(samples) for samples in self.seen.drawn]

    @cached_property
    def targets(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {name: better_action(samples) for name, samples in self.seen.targets.items()}

    @property
    def models(self) -> list[nn.Module]:
        return [policy for (policy,) in self.networks]


@dataclass(frozen=True, eq=False)
class Answer:
    """What a method says.

    Attributes:
        loo: (n, t), a positive value is harm.
        shapley: (n, t).
        banzhaf: (n, t).
        predictions: (2ⁿ, t) scores of all subsets, in the order of ``all_subsets``.
    """

    loo: Tensor
    shapley: Tensor
    banzhaf: Tensor
    predictions: Tensor


Method = Callable[[ControlProblem], Answer]


# -- surrogates ---------------------------------------------------------------------------------


def of_surrogate(surrogate: Surrogate) -> Answer:
    values = (surrogate.attribute(readout) for readout in READOUTS)
    return Answer(*values, surrogate.predict(all_subsets(surrogate.masks.num_tasks)))


def retrained(problem: ControlProblem, **options: Any) -> Answer:
    """A surrogate of retrained scores; ``options`` go to :func:`ksm_ext.fit_surrogate`."""
    return of_surrogate(fit_surrogate(problem.masks, problem.scores, **options))


def few_retrained(problem: ControlProblem, **options: Any) -> Answer:
    """A surrogate of the few subsets that estimates are calibrated with."""
    few = problem.calibration, problem.calibration_scores
    return of_surrogate(fit_surrogate(*few, **options))


def estimated(problem: ControlProblem, *, calibrated: bool) -> Answer:
    """A kernel surrogate of scores that are estimated from policies trained on all tasks."""
    scored = estimated_scores(problem, calibrated=calibrated)
    return of_surrogate(fit_surrogate(*scored, kernel="rbf"))


def together(problem: ControlProblem) -> Answer:
    """A kernel surrogate of the few retrained scores, with the estimated ones beside them."""
    estimates = fit_surrogate(*estimated_scores(problem, calibrated=True), kernel="rbf")
    return few_retrained(problem, estimates=estimates)


def estimated_scores(problem: ControlProblem, *, calibrated: bool) -> tuple[Tensor, Tensor]:
    """Many subsets and their estimated scores."""
    estimator = estimator_of(problem)
    if calibrated:
        estimator.calibrate(problem.calibration, problem.calibration_scores)
    num_tasks, settings = problem.masks.shape[1], problem.settings
    count = min(settings.methods.num_estimated, 2**num_tasks - 2)
    drawn = bernoulli(num_tasks, count, 0.5, seed=settings.truth.seed)
    masks = torch.cat([leave_one_out(num_tasks, include_full=True), drawn]).unique(dim=0)
    return masks, estimator.predict(masks)


def estimator_of(problem: ControlProblem) -> GradientEstimator:
    """Estimates by regression on the signs of advantages, weighed by their sizes."""
    return GradientEstimator(
        problem.models,
        problem.seen.tasks,
        problem.seen.targets,
        output=log_ratio,
        sample_weights=problem.seen.weights,
        projector=problem.projector,
    ).fit()


def of_values(values: Tensor, predictions: Tensor) -> Answer:
    """The answer of a method that has one attribution (n, t) for all questions."""
    return Answer(*(values.clone() for _ in READOUTS), predictions)


# -- counting -----------------------------------------------------------------------------------


def counting(problem: ControlProblem) -> Answer:
    """How many of the target's own camp a subset has, less those of the other: no training."""
    camps = problem.suite.camps.double()
    values = -camps[:, None] * camps  # (n, t)
    return of_values(values, all_subsets(len(camps)).double() @ values)


def counting_fitted(problem: ControlProblem, *, warp: str) -> Answer:
    """A surrogate that sees of a subset nothing but the counts of both camps."""
    camps = problem.suite.camps

    def counts(masks: Tensor) -> Tensor:
        sides = torch.stack([camps > 0, camps < 0], 1).double()
        return masks.double() @ sides / sides.sum(0)

    fitted = fit_surrogate(counts(problem.masks), problem.scores, kernel="rbf", warp=warp)
    values = -camps.double()[:, None] * camps.double()
    return of_values(values, fitted.predict(counts(all_subsets(len(camps)))))


# -- gradients ----------------------------------------------------------------------------------


def additive(attribute: Callable[[Problem], Tensor], problem: ControlProblem) -> Answer:
    """The answer of a method that gives attributions (n, t) only."""
    values = attribute(problem).double().cpu()
    lacking = (~all_subsets(len(values))).double()
    return of_values(values, problem.full_score - lacking @ values)


def by_last_tracin(model: nn.Module, problem: Problem) -> Tensor:
    """TracIn's product of gradients, at the trained policy alone."""
    return tracin(model, 1.0, problem.tasks, problem.targets)


def of_gradients(attribute: Callable[[nn.Module, Problem], Tensor]) -> Method:
    return partial(additive, partial(mean_of, attribute))


RETRAINED: dict[str, Method] = {
    **{name: partial(retrained, **told) for name, told in DATAMODELS.items()},
    "surrogate of its own choice, by rank": partial(retrained, criterion="rank"),
    "surrogate of its own choice, warped": partial(retrained, warp="auto"),
    "kernel surrogate, warped": partial(retrained, kernel="rbf", warp="auto"),
    "ridge datamodel, warped": partial(retrained, kernel="linear", warp="auto"),
    "counting camps, fitted": partial(counting_fitted, warp="identity"),
    "counting camps, fitted and warped": partial(counting_fitted, warp="auto"),
}
"""Methods that learn from all retrained subsets."""
FEW: dict[str, Method] = {
    "kernel surrogate, few retrained": partial(few_retrained, kernel="rbf"),
    "kernel surrogate, calibrated": partial(estimated, calibrated=True),
    "kernel surrogate, estimated and retrained together": together,
}
"""Methods that learn from the few to calibrate with; the first from nothing else."""
IN_ORDER: dict[str, Method] = {
    "kernel surrogate, estimated": partial(estimated, calibrated=False),
    "influence, CG on GGN": of_gradients(partial(by_conjugate_gradients, curvature=GaussNewton)),
    "influence, projected": of_gradients(by_projection),
    "TRAK": partial(additive, by_trak),
    "TracIn, last policy": of_gradients(by_last_tracin),
    "gradient cosine": of_gradients(by_cosine),
    "counting camps": counting,
}
"""Methods that retrain nothing, and predict the order of scores, not their size."""
METHODS = RETRAINED | FEW | IN_ORDER


def methods_for(suite: Suite) -> dict[str, Method]:
    """Those that apply: camps are counted where there are two, and a better action likewise."""
    missing = {name for name in METHODS if "camps" in name} if not suite.camps.any() else set()
    if not suite.discrete or suite.num_outputs > 2:
        missing |= {*IN_ORDER} - {"kernel surrogate, estimated"}
    return {name: method for name, method in METHODS.items() if name not in missing}
