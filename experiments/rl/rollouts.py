r"""What policies trained on all tasks saw and did, as samples of tasks and of targets.

A sample is a step: a state, the action that was taken, and its advantage. Near a policy, training
on a subset is a logistic regression on the signs of advantages, weighed by their sizes, whose
log-odds are the log-ratio of probabilities,

.. math:: \log r = \log \pi_W(a | s) - \log \pi_{W_0}(a | s)
          \approx \nabla \log \pi_{W_0}(a | s) \cdot (W - W_0).

Where there are two actions, that is a choice of the better one, and samples drawn in proportion to
their weights are those of a plain classifier, as influence functions, TRAK and TracIn expect.

Shapes: n tasks of b samples each, states (b, d).

Reference: *Zhang, Duan, Ye & Zhang 2025 (PolicyGradEx), arXiv:2511.12779*.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributions import Normal

from experiments.rl.data import Suite
from experiments.rl.model import Policies
from experiments.rl.ppo import collect, standardised
from experiments.rl.settings import NUM_STEPS, RLSettings

MOST_COPIES = 16  # of each task, at a time: short rollouts are made longer, not more
Samples = tuple[Tensor, Tensor, Tensor]
"""States (b, d), actions (b,) or (b, k), and advantages (b,)."""


@dataclass(frozen=True, eq=False)
class Seen:
    """Samples of several policies together.

    Attributes:
        tasks: n samples, drawn alike.
        drawn: n samples, drawn in proportion to the sizes of advantages.
        targets: Other samples of each task, drawn so too.
    """

    tasks: list[Samples]
    drawn: list[Samples]
    targets: dict[str, Samples]

    @property
    def weights(self) -> list[Tensor]:
        """The sizes of the advantages of ``tasks``, n tensors (b,)."""
        return [advantages.abs() for *_, advantages in self.tasks]


def seen_by(policies: list[Policies], suite: Suite, settings: RLSettings) -> Seen:
    """As many samples from each of the policies, which are batches of one."""
    count = settings.methods.num_samples // len(policies)
    parts: list[list[list[Samples]]] = [[], [], []]
    for seed, policy in enumerate(policies):
        generator = torch.Generator().manual_seed(seed)
        for number, part in enumerate(parts):
            steps = steps_of(policy, suite, settings, generator)
            part.append([_drawn(task, count, number > 0, generator) for task in steps])
    tasks, drawn, targets = ([_joined(task) for task in zip(*x, strict=True)] for x in parts)
    return Seen(tasks, drawn, dict(zip(suite.task_names, targets, strict=True)))


def steps_of(
    policy: Policies, suite: Suite, settings: RLSettings, generator: torch.Generator
) -> list[Samples]:
    """All steps of a rollout, task by task; advantages are standardised over them together."""
    num_tasks = len(suite.task_names)
    copies = min(max(2, NUM_STEPS // settings.training.num_steps), MOST_COPIES)
    num_steps = max(settings.training.num_steps, -(-NUM_STEPS // copies))
    training = replace(settings.training, num_steps=num_steps)
    tasks = torch.arange(num_tasks).repeat_interleave(copies)[None]
    environments = suite.environments(tasks, settings.data.horizon, generator)
    rollout = collect(policy, environments, training, generator)
    shares = torch.full_like(rollout.advantages, 1 / rollout.advantages.shape[1])
    advantages = standardised(rollout.advantages, shares)
    number = tasks.repeat(1, num_steps)[0]
    table = rollout.observations, rollout.actions, advantages
    return [_rows(table, 0, number == task) for task in range(num_tasks)]


def _rows(table: Samples, *rows: Tensor | int) -> Samples:
    states, actions, advantages = (x[rows] for x in table)
    return states, actions, advantages


def _drawn(samples: Samples, count: int, proportional: bool, generator: torch.Generator) -> Samples:
    *_, advantages = samples
    weights = advantages.abs() if proportional else torch.ones_like(advantages)
    return _rows(samples, torch.multinomial(weights, count, proportional, generator=generator))


def _joined(parts: tuple[Samples, ...]) -> Samples:
    states, actions, advantages = (torch.cat(x) for x in zip(*parts, strict=True))
    return states, actions, advantages


def better_action(samples: Samples) -> tuple[Tensor, Tensor]:
    """States, and the action of two that the advantages speak for."""
    states, actions, advantages = samples
    return states, torch.where(advantages > 0, actions, 1 - actions)


def log_ratio(model: Callable[..., Tensor], batch: Samples) -> Tensor:
    """(b,): the log-ratio of probabilities, 0 at the policy, with the sign of the advantage."""
    states, actions, advantages = batch
    logarithms = log_probabilities(model(states), actions)
    return advantages.sign() * (logarithms - logarithms.detach())


def log_probabilities(said: Tensor, actions: Tensor) -> Tensor:
    """(b,): log π(a | s) of actions from a list, or of real ones."""
    if actions.ndim == 1:
        return said.log_softmax(-1).gather(1, actions[:, None])[:, 0]
    means, log_std = said.unbind(-1)
    return Normal(means, log_std.exp()).log_prob(actions).sum(-1)
