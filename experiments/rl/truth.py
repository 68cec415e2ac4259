"""What is really trained, and kept: policies by batches of subsets.

The score F(S) of a target is the share of the largest return that a policy trained on the tasks of
S does not reach there: 0 for a pole that always stands, and τ > 0 is harm as for any loss.

A batch of subsets is one run of :func:`ksm_ext.retrain_scores`: its mask is those of the subsets
one after another, and so are its scores.

Shapes: masks (m, n), scores (num_seeds, m, t) of t = n targets.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from experiments.experiment import Experiment, Run
from experiments.rl.data import Suite, assigned, suite_of
from experiments.rl.model import Policies
from experiments.rl.ppo import train
from experiments.rl.settings import PolicySettings, RLSettings
from experiments.settings import as_dict
from ksm_ext import retrain_scores
from ksm_ext.correlation import pearson
from ksm_ext.subsets import all_subsets, bernoulli

REFERENCE_SEED = 100
"""The first seed of the subsets that methods are judged by; none of them is fitted to."""
CHOSEN_SEED = 200
"""The first seed of trainings on what was chosen."""
JUDGE_SEED = 300
"""The first seed of more trainings of the subsets that predictions are judged by."""


class Control(Experiment):
    """Policies trained on subsets of the tasks of a suite."""

    settings: PolicySettings

    def policies(self, suite: Suite, masks: Tensor, seed: int) -> Policies:
        """Policies trained on the tasks of masks (p, n), all from one start."""
        settings, generator = self.settings, torch.Generator().manual_seed(seed)
        policies = Policies(
            len(masks),
            suite.num_inputs,
            suite.num_outputs,
            settings.model,
            seed,
            discrete=suite.discrete,
        )
        tasks, shares = assigned(masks, settings.training.num_environments)
        environments = suite.environments(tasks, settings.data.horizon, generator)
        train(policies, environments, shares, settings.training, generator)
        return policies

    def score(self, suite: Suite, mask: Tensor, seed: int) -> Tensor:
        """Scores (p t,) of policies trained on the subsets whose masks (p n,) follow each other."""
        policies = self.policies(suite, mask.view(-1, len(suite.task_names)), seed)
        data = self.settings.data
        generator = torch.Generator().manual_seed(seed + 2**32)  # other draws than in training
        return returns_lost(policies, suite, data.horizon, data.num_episodes, generator).flatten()


@torch.no_grad()
def returns_lost(
    policies: Policies, suite: Suite, horizon: int, num_episodes: int, generator: torch.Generator
) -> Tensor:
    """Scores (p, t) float64: 1 less the mean return over the largest there is."""
    num_tasks = len(suite.task_names)
    tasks = torch.arange(num_tasks).repeat_interleave(num_episodes).expand(policies.count, -1)
    environments = suite.environments(tasks, horizon, generator)
    total = torch.zeros(tasks.shape, dtype=torch.float64)
    going = torch.ones(tasks.shape, dtype=torch.bool)
    for _ in range(horizon):
        actions = policies.sample(policies.said(environments.observations), generator)
        step = environments.step(actions)
        total += going * step.rewards
        going &= ~(step.terminated | step.truncated)
        if not going.any():
            break
    shares = total.view(policies.count, num_tasks, num_episodes).mean(2)
    return 1 - shares / (horizon * suite.largest)


def retrained(run: Run, name: str, part: str, masks: Tensor, seeds: Sequence[int]) -> Tensor:
    """Scores (num_seeds, m, t), from the store or by training what it lacks.

    Trainings run side by side, or wherever ``joblib.parallel_config`` sends them.

    Args:
        run: The experiment and its folder.
        name: The suite.
        part: What the subsets are for; each has a store.
        masks: (m, n) bool.
        seeds: Of the trainings.

    Raises:
        ValueError: If the store is of other settings or code.
        RuntimeError: If a training fails.
        OSError: If the store cannot be written.
    """
    settings, (count, num_tasks) = run.settings.of_policies(name), masks.shape
    size = min(run.settings.truth.batch, count)
    rows = torch.arange(-(-count // size) * size) % count  # the last batch is filled up
    scores = retrain_scores(
        partial(Control(settings).score, suite_of(name)),  # other settings would shut the store
        masks[rows].reshape(-1, size * num_tasks),
        seeds=seeds,
        store=run.output / f"scores-{name}-{part}.sqlite",
        settings=as_dict(settings),
        on_change=run.on_change,
    )
    return scores.values.reshape(len(seeds), -1, num_tasks)[:, :count]


# -- which subsets ------------------------------------------------------------------------------


def fitted_subsets(settings: RLSettings, num_tasks: int) -> Tensor:
    """(m, n) bool: the subsets that surrogates are fitted to."""
    truth = settings.truth
    return bernoulli(num_tasks, truth.num_subsets, 0.5, seed=truth.seed)


def references(settings: RLSettings, num_tasks: int) -> Tensor:
    """(l, n) bool: subsets of which some are judged by; all there are, or some at random."""
    truth = settings.truth
    if truth.num_references is None:
        return all_subsets(num_tasks)
    return bernoulli(num_tasks, truth.num_references, 0.5, seed=truth.seed + 1)


def edges(masks: Tensor) -> Tensor:
    """(m,) bool: of at most one task, or of all but at most one."""
    sizes = masks.sum(1)
    return (sizes <= 1) | (sizes >= masks.shape[1] - 1)


def train_subsets(run: Run, name: str) -> Tensor:
    """Scores (num_seeds, m, t) of the subsets that surrogates are fitted to."""
    masks = fitted_subsets(run.settings, len(suite_of(name).task_names))
    return retrained(run, name, "fitted", masks, range(run.settings.truth.num_seeds))


def train_references(run: Run, name: str) -> tuple[Tensor, Tensor]:
    """Subsets (l, n) to judge by and their scores (l, t), and the mean over seeds at the edges."""
    masks = references(run.settings, len(suite_of(name).task_names))
    scores = retrained(run, name, "references", masks, [REFERENCE_SEED])[0]
    rows = edges(masks)
    if rows.any():
        more = _more_of(run, name, masks[rows])
        scores[rows] = torch.cat([scores[rows][None], more]).mean(0)
    return masks, scores


def train_judges(run: Run, name: str, unseen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (l,) of the references that predictions are judged by, and their scores run by run.

    Scores (num_seeds, l, t) are of one training each; the first are among those of the references.

    Args:
        run: The experiment and its folder.
        name: The suite.
        unseen: Bool, the references that may be drawn.
    """
    truth, masks = run.settings.truth, references(run.settings, len(suite_of(name).task_names))
    rows, generator = unseen.nonzero()[:, 0], torch.Generator().manual_seed(truth.seed + 2)
    rows = rows[torch.randperm(len(rows), generator=generator)[: truth.num_judged]]
    seeds = range(JUDGE_SEED, JUDGE_SEED + truth.num_judges)
    first = retrained(run, name, "references", masks, [REFERENCE_SEED])[:, rows]
    return rows, torch.cat([first, retrained(run, name, "judges", masks[rows], seeds)])


def _more_of(run: Run, name: str, masks: Tensor) -> Tensor:
    """Scores (num_seeds - 1, m, t) of the subsets at the edges, by the other seeds."""
    seeds = range(REFERENCE_SEED + 1, REFERENCE_SEED + run.settings.truth.num_edge_seeds)
    return retrained(run, name, "edges", masks, seeds)


def leave_one_out_agreement(run: Run, name: str) -> tuple[float, float]:
    """How leave-one-out effects (n,) by half of the seeds know the others', over targets.

    And what a perfect method would reach against the mean over all seeds: the root of its
    reliability, by Spearman and Brown's formula from that of a half.
    """
    masks = references(run.settings, len(suite_of(name).task_names))
    masks = masks[edges(masks)]
    sizes = masks.sum(1)
    runs = _more_of(run, name, masks)
    effects = runs[:, sizes == masks.shape[1]] - runs[:, sizes == masks.shape[1] - 1]
    if len(effects) < 2:
        return float("nan"), float("nan")
    count = len(effects) // 2
    halves = [part.mean(0).T for part in effects[: 2 * count].chunk(2)]
    agreement = float(pearson(*halves).mean())
    times = (len(effects) + 1) / count
    reliability = times * agreement / (1 + (times - 1) * agreement)
    return agreement, max(reliability, 0.0) ** 0.5
