"""Gymnasium's environments as a batch, one step of each after the other.

Shapes: p policies with e environments each, k objectives.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.rl.environment import Step


class GymEnvironments:
    """Environments of Gymnasium that begin anew by themselves.

    Attributes:
        observations: (p, e, d) float32.
        objectives: (p, e, k) float64, the rewards of the last step before they are weighed.
    """

    def __init__(
        self, made: Sequence[Sequence[Any]], weights: Tensor, generator: torch.Generator
    ) -> None:
        """Begin.

        Args:
            made: p rows of e environments, whose rewards are numbers, or vectors of k.
            weights: (p, k), how much each objective counts in the reward.
            generator: Draws where episodes begin.
        """
        self._made = made
        self._weights = weights[:, None].double()
        drawn = torch.randint(2**31, (len(made[0]),), generator=generator).tolist()
        first = [[env.reset(seed=s)[0] for env, s in zip(x, drawn, strict=True)] for x in made]
        self.observations = _observed(first)
        self.objectives = torch.zeros(*self.observations.shape[:2], weights.shape[1]).double()

    def step(self, actions: Tensor) -> Step:
        """Act in all of them."""
        listed = actions.numpy()
        seen, last, rewards, ends = [], [], [], []
        for row, chosen in zip(self._made, listed, strict=True):
            steps = [env.step(action) for env, action in zip(row, chosen, strict=True)]
            last.append([x[0] for x in steps])
            rewards.append([np.atleast_1d(x[1]) for x in steps])
            ends.append([x[2:4] for x in steps])
            seen.append(
                [
                    env.reset()[0] if x[2] or x[3] else x[0]
                    for env, x in zip(row, steps, strict=True)
                ]
            )
        self.observations = _observed(seen)
        self.objectives = torch.from_numpy(np.array(rewards)).double()
        terminated, truncated = torch.tensor(ends, dtype=torch.bool).unbind(-1)
        weighed = (self.objectives * self._weights).sum(-1).float()
        return Step(weighed, terminated, truncated & ~terminated, _observed(last))


def _observed(rows: Sequence[Sequence[Any]]) -> Tensor:
    return torch.from_numpy(np.array(rows, dtype=np.float32)).flatten(2)


def batch_of(
    make: Callable[[], Any], weights: Tensor, num_environments: int, generator: torch.Generator
) -> GymEnvironments:
    """So many environments for each row of weights (p, k)."""
    made = [[make() for _ in range(num_environments)] for _ in weights]
    return GymEnvironments(made, weights, generator)
