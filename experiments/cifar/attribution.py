r"""Influence at the price of a few thousand images, and what single images do to a target.

Conjugate gradients solve with the curvature of a sample of the images only. LiSSA draws a batch B
at each step: with the curvature :math:`H_B` of its mean loss, damping λ and scale σ,

.. math:: h \leftarrow v + h - (H_B + \lambda) h / \sigma, \qquad x = h / \sigma,

repeated and averaged. H is the Gauss-Newton matrix: with the Hessian, both fail along its negative
directions.

Shapes: b images in n tasks, t targets, values (b, t), right-hand sides (t, p).

References: *Agarwal, Bullins & Hazan 2017, arXiv:1602.03943*; *Koh & Liang 2017,
arXiv:1703.04730*; *Park et al. 2023, arXiv:2303.14186*.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from experiments.cifar.settings import CifarSettings, Lissa
from experiments.methods import Answer, Problem, additive, influence_of, mean_of
from ksm_ext.attribution.trak import trak_scores
from ksm_ext.evaluation import lds
from ksm_ext.network.features import Features
from ksm_ext.network.gradients import collect_features
from ksm_ext.network.hessian import GaussNewton, loss_gradients
from ksm_ext.network.outputs import log_odds
from ksm_ext.network.solvers import BlockConjugateGradients, LiSSA


def lissa_on_batches(
    model: nn.Module, data: tuple[Tensor, Tensor], rhs: Tensor, settings: Lissa, seed: int
) -> Tensor:
    """Solutions (s, p) of ``(H + damping) x = rhs``, from batches drawn with replacement.

    Raises:
        RuntimeError: If the series diverges.
    """
    inputs, labels = data
    generator = torch.Generator().manual_seed(seed)

    def curved(h: Tensor) -> Tensor:
        rows = torch.randint(len(labels), (settings.batch_size,), generator=generator)
        return GaussNewton(model, (inputs[rows], labels[rows]))(h)

    solver = LiSSA(settings.scale, num_steps=settings.depth)
    solutions = [
        solver.solve(curved, rhs, damping=settings.damping).x for _ in range(settings.num_averages)
    ]
    return torch.stack(solutions).mean(0)


def lissa_by_sample(problem: Problem) -> Tensor:
    """(b, t): what each training image does to each target's mean loss; mean over networks."""
    settings: CifarSettings = problem.experiment.settings
    targets = list(problem.targets.values())
    sizes = torch.tensor([len(labels) for _, labels in targets])
    answers = []
    for seed, model in enumerate(problem.models):
        gradients = loss_gradients(model, targets)
        rhs = gradients / sizes.to(gradients)[:, None]
        solved = lissa_on_batches(model, problem.samples, rhs, settings.lissa, seed)
        slopes = GaussNewton(model, problem.samples).per_sample_slopes(solved)  # (t, b)
        answers.append(-slopes.T.cpu() / slopes.shape[1])
    return torch.stack(answers).mean(0)


def by_lissa(problem: Problem) -> Answer:
    """What each image does, and the sums over each task's images."""
    data, by_sample = problem.experiment.data(), lissa_by_sample(problem)
    sums = sums_by_task(by_sample, data.tasks, len(data.task_names))
    return replace(additive(lambda _: sums, problem), by_sample=by_sample)


def by_conjugate_gradients(model: nn.Module, problem: Problem) -> Tensor:
    """(n, t): solved with the curvature of some images, whose slopes are those of all."""
    methods = problem.settings.methods
    count = problem.experiment.settings.curvature_images
    inputs, labels = problem.samples
    generator = torch.Generator().manual_seed(problem.settings.truth.seed)
    rows = torch.randperm(len(labels), generator=generator)[:count]
    curvature = GaussNewton(model, (inputs[rows], labels[rows]))

    def solve(rhs: Tensor) -> Tensor:
        solver = BlockConjugateGradients(tolerance=1e-3, max_steps=methods.num_steps)
        return solver.solve(curvature, rhs, damping=methods.damping).x

    return influence_of(model, problem, solver=solve)


def trak_by_sample(problem: Problem) -> Tensor:
    """(b, t): how much each training image raises a target's mean log-odds; mean over networks."""
    data, ridge = problem.experiment.data(), problem.settings.methods.trak_ridge
    rows = [data.held_targets == target for target in range(len(data.target_names))]

    def of_one(model: nn.Module, problem: Problem) -> Tensor:
        train, held = (
            collect_features(model, part, log_odds, problem.projector, progress=False)
            for part in (problem.samples, (data.held_inputs, data.held_labels))
        )
        means = [(held.values[own].mean(), held.gradients[own].mean(0)) for own in rows]
        targets = Features(*map(torch.stack, zip(*means, strict=True)))
        return trak_scores(train, targets, relative_ridge=ridge)

    return mean_of(of_one, problem)


def sums_by_task(values: Tensor, tasks: Tensor, num_tasks: int) -> Tensor:
    """(n, t) sums of what samples have (b, t)."""
    sums = values.new_zeros(num_tasks, values.shape[1], dtype=torch.float64)
    return sums.index_add_(0, tasks, values.double())


def trak_ranks(scores: Tensor, tasks: Tensor, masks: Tensor, true: Tensor) -> Tensor:
    """(t,) Spearman correlation over subsets of mean TRAK scores and true losses (m, t)."""
    sums, chosen = sums_by_task(scores, tasks, masks.shape[1]), masks.double()
    sizes = tasks.bincount(minlength=len(sums)).double()
    ranks: Tensor = lds(true, (chosen @ sums) / (chosen @ sizes)[:, None])
    return ranks
