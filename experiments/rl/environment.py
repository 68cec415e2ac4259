"""What a batch of environments is, to those who train in it.

Shapes: p policies with e environments each, observations (p, e, d).
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Step:
    """What a step of all environments gives.

    Attributes:
        rewards: (p, e).
        terminated: (p, e) bool. The episode has ended, and nothing can be earned any more.
        truncated: (p, e) bool. It has been cut off.
        last: (p, e, d). Where the step led; the last observation of an episode that has ended,
            when ``observations`` is already the first of the next.
    """

    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    last: Tensor


class Environments(Protocol):
    """Environments of p policies, e for each, that begin anew by themselves."""

    observations: Tensor
    """(p, e, d)."""

    def step(self, actions: Tensor) -> Step:
        """Act: (p, e) int64 numbers of actions, or (p, e, k) of real ones."""
