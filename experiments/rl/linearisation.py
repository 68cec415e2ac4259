r"""How far the first-order expansion of log-probabilities holds, by the distance from the policy.

From a policy trained on all tasks, training goes on for one rollout on each of some subsets; along
these directions the weights are moved by a share of their length. The error is the published one,
the mean square of what the expansion of :math:`\log\pi_W` errs by, over
:math:`\max(|\log\pi_W|, |\log\pi_{W_0}|)`; beside it that of the log-ratio alone, pooled, which is
what estimates need.

Shapes: p directions, b samples.

Reference: PolicyGradEx (see :mod:`.rollouts`).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from experiments.rl.data import Suite, assigned
from experiments.rl.model import Policies
from experiments.rl.ppo import train
from experiments.rl.rollouts import log_probabilities
from experiments.rl.settings import RLSettings

DISTANCES = (0.005, 0.02, 0.05, 0.1)


def directions(
    policy: Policies, suite: Suite, masks: Tensor, settings: RLSettings
) -> list[nn.Module]:
    """Policies that went on training on subsets (p, n), one rollout each."""
    count = len(masks)
    sizes = suite.num_inputs, suite.num_outputs
    batch = Policies(count, *sizes, settings.model, 0, discrete=suite.discrete)
    batch.weights = [weight.repeat_interleave(count, 0) for weight in policy.weights]
    tasks, shares = assigned(masks, settings.training.num_environments)
    generator = torch.Generator().manual_seed(0)
    environments = suite.environments(tasks, settings.data.horizon, generator)
    once = replace(settings.training, num_rollouts=1)
    train(batch, environments, shares, once, generator)
    return [batch.policy(number) for number in range(count)]


def errors(
    policy: nn.Module, moved: list[nn.Module], states: Tensor, actions: Tensor
) -> dict[float, tuple[Tensor, Tensor]]:
    """Errors of log-probabilities and of log-ratios (p,), by the distance."""
    start = dict(policy.double().named_parameters())
    length = torch.cat([x.flatten() for x in start.values()]).norm()
    states = states.double()

    def logarithms(weights: dict[str, Tensor]) -> Tensor:
        return log_probabilities(functional_call(policy, weights, (states,)), actions)

    found = {}
    for distance in DISTANCES:
        pairs = []
        for other in moved:
            step = {name: x.double() - start[name] for name, x in other.named_parameters()}
            norm = torch.cat([x.flatten() for x in step.values()]).norm()
            step = {name: distance * length / norm * x for name, x in step.items()}
            before, slope = jvp(logarithms, (start,), (step,))
            after = logarithms({name: start[name] + x for name, x in step.items()})
            wrong = before + slope - after
            relative = wrong / torch.maximum(before.abs(), after.abs())
            ratio = wrong.square().sum() / (after - before).square().sum()
            pairs.append((relative.square().mean(), ratio))
        found[distance] = tuple(torch.stack(x).detach() for x in zip(*pairs, strict=True))
    return found
