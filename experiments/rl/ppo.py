"""Proximal policy optimisation of many policies at once.

Each policy has its own environments and its own gradient, and all that is drawn at random is drawn
once for all of them: a policy is the same with others beside it as alone, up to rounding.

Shapes: p policies with e environments each, h steps of a rollout, b = h e samples of it.

Reference: *Schulman et al. 2017, arXiv:1707.06347*; advantages by *Schulman et al. 2016,
arXiv:1506.02438*.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.rl.environment import Environments
from experiments.rl.model import Policies
from experiments.settings import Section, check_least
from ksm_ext.checks import check_positive, message


@dataclass(frozen=True)
class Training(Section):
    """How policies are trained.

    Attributes:
        num_environments: Of each policy, e; its tasks take turns.
        num_steps: Steps of a rollout, h.
        num_rollouts: Rollouts of a training.
        num_epochs: Passes over each of them.
        batch_size: Samples of a step of Adam.
        learning_rate: The first; it falls linearly to zero.
        discount: γ.
        trace: λ of the generalised advantage.
        clip: How far a step may move a ratio of probabilities.
        entropy: Weight of the entropy.
        max_norm: Gradients are cut to this length.
    """

    num_environments: int = 24
    num_steps: int = 64
    num_rollouts: int = 16
    num_epochs: int = 4
    batch_size: int = 384
    learning_rate: float = 3e-3
    discount: float = 0.98
    trace: float = 0.9
    clip: float = 0.2
    entropy: float = 0.0
    max_norm: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("num_environments", "num_steps", "num_rollouts", "num_epochs", "batch_size")
        check_least(self, **dict.fromkeys(counts, 1))
        for name in ("learning_rate", "clip", "max_norm"):
            check_positive(name, getattr(self, name), "Choose a positive one.")
        check_positive("entropy", self.entropy, "Choose one of 0 or more.", zero=True)
        for name, fits in (("discount", 0 <= self.discount < 1), ("trace", 0 <= self.trace <= 1)):
            if not fits:
                found, remedy = str(getattr(self, name)), "Choose another."
                raise ValueError(message(name, "between 0 and 1", found, remedy))


@dataclass(frozen=True, eq=False)
class Rollout:
    """What policies saw and did.

    Attributes:
        observations: (p, b, d).
        actions: (p, b) or (p, b, k).
        log_probabilities: (p, b) of the actions when they were taken.
        advantages: (p, b), in units of rewards times 1 - γ.
        returns: (p, b), what critics learn, in the same unit.
    """

    observations: Tensor
    actions: Tensor
    log_probabilities: Tensor
    advantages: Tensor
    returns: Tensor


def train(
    policies: Policies,
    environments: Environments,
    shares: Tensor,
    training: Training,
    generator: torch.Generator,
) -> None:
    """Train policies where they are.

    Args:
        policies: p of them.
        environments: Theirs.
        shares: (p, e), how much the samples of each environment count; a policy that has none is
            left as it is.
        training: How.
        generator: Draws actions and batches.
    """
    weights = [weight.requires_grad_() for weight in policies.weights]
    optimizer = torch.optim.Adam(weights, lr=training.learning_rate, eps=1e-5, fused=True)
    sizes = shares.sum(1, keepdim=True).clamp(min=1e-30)
    shares = (shares / sizes).repeat(1, training.num_steps)  # (p, b)
    for number in range(training.num_rollouts):
        rollout = collect(policies, environments, training, generator)
        advantages = standardised(rollout.advantages, shares / training.num_steps)
        optimizer.param_groups[0]["lr"] = training.learning_rate * (
            1 - number / training.num_rollouts
        )
        for _ in range(training.num_epochs):
            order = torch.randperm(shares.shape[1], generator=generator)
            for rows in order.split(training.batch_size):
                optimizer.zero_grad()
                _loss(policies, rollout, advantages, shares, rows, training).backward()
                _cut(weights, policies.count, training.max_norm)
                optimizer.step()
    for weight in weights:
        weight.requires_grad_(False)


@torch.no_grad()
def collect(
    policies: Policies, environments: Environments, training: Training, generator: torch.Generator
) -> Rollout:
    """Steps of all environments, samples in the order of steps."""
    kept = []
    for _ in range(training.num_steps):
        seen = environments.observations
        said = policies.said(seen)
        actions = policies.sample(said, generator)
        step = environments.step(actions)
        kept.append((seen, said, actions, step))
    seen, said, actions = (torch.stack([x[i] for x in kept], 1) for i in range(3))
    steps = [step for *_, step in kept]
    last, rewards, terminated, truncated = (
        torch.stack([getattr(step, name) for step in steps], 1)
        for name in ("last", "rewards", "terminated", "truncated")
    )  # (p, h, e, ...)
    flat = seen.flatten(1, 2)
    values = policies.values(torch.cat([flat, last.flatten(1, 2)], 1))
    before, after = (part.view_as(rewards) for part in values.chunk(2, 1))
    scaled = (1 - training.discount) * rewards
    advantages = generalised(scaled, before, after, terminated, truncated, training)
    said, actions = said.flatten(1, 2), actions.flatten(1, 2)
    probabilities = policies.log_probabilities(said, actions)
    returns = (advantages + before).flatten(1, 2)
    return Rollout(flat, actions, probabilities, advantages.flatten(1, 2), returns)


def generalised(
    rewards: Tensor,
    before: Tensor,
    after: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    training: Training,
) -> Tensor:
    """Generalised advantages (p, h, e) of rewards, and values before and after each step.

    Nothing is expected after an end, and what a horizon cuts off still is.
    """
    errors = rewards + training.discount * after * ~terminated - before
    decay = training.discount * training.trace * ~(terminated | truncated)
    advantages = torch.empty_like(errors)
    ahead = torch.zeros_like(errors[:, 0])
    for step in reversed(range(errors.shape[1])):
        ahead = errors[:, step] + decay[:, step] * ahead
        advantages[:, step] = ahead
    return advantages


def standardised(advantages: Tensor, shares: Tensor) -> Tensor:
    """Less their mean and over their standard deviation, of each policy, weighed by shares."""
    centred = advantages - (shares * advantages).sum(1, keepdim=True)
    return centred / ((shares * centred.square()).sum(1, keepdim=True).sqrt() + 1e-8)


def _loss(
    policies: Policies,
    rollout: Rollout,
    advantages: Tensor,
    shares: Tensor,
    rows: Tensor,
    training: Training,
) -> Tensor:
    """The sum over policies, each of which has its own gradient."""
    said, values = policies.both(rollout.observations[:, rows])
    log_probabilities = policies.log_probabilities(said, rollout.actions[:, rows])
    ratios = (log_probabilities - rollout.log_probabilities[:, rows]).exp()
    clipped = ratios.clamp(1 - training.clip, 1 + training.clip)
    gains = advantages[:, rows]
    loss = (values - rollout.returns[:, rows]).square()
    loss = loss - torch.minimum(gains * ratios, gains * clipped)
    if training.entropy:
        loss = loss - training.entropy * policies.entropies(said)
    scale = shares.shape[1] / len(rows)
    return scale * (shares[:, rows] * loss).sum() / training.num_steps


def _cut(weights: list[Tensor], count: int, max_norm: float) -> None:
    """Cut the gradient of each policy, and of each critic, to a length."""
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    squares = torch.zeros(2 * count, dtype=gradients[0].dtype)
    for gradient in gradients:
        squares[: len(gradient)] += gradient.square().sum((1, 2))
    factors = (max_norm / (squares.sqrt() + 1e-6)).clamp(max=1)[:, None, None]
    for gradient in gradients:
        gradient *= factors[: len(gradient)]
