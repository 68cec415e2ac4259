r"""Poles on carts, many at once: the equations of CartPole, with physics of each one's own.

A cart of mass M is pushed left or right with a force f and carries a pole of mass m and half-length
l. With the total mass :math:`\mu = M + m`,

.. math:: q = \frac{f + m l \dot\theta^2 \sin\theta}{\mu}, \qquad
          \ddot\theta = \frac{g \sin\theta - q \cos\theta}
                              {l (4/3 - m \cos^2\theta / \mu)}, \qquad
          \ddot x = q - \frac{m l \ddot\theta \cos\theta}{\mu},

by Euler steps of 0.02 s. Every step earns 1; an episode ends where the pole leans by 12 degrees or
the cart is 2.4 m away, and is cut off at the horizon.

Shapes: p policies with e poles each, states (p, e, 4): position, velocity, angle, angular velocity.

Reference: *Barto, Sutton & Anderson 1983*, as Gymnasium's ``CartPole-v1`` has it.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from experiments.rl.environment import Step

TIME_STEP, MAX_POSITION, MAX_ANGLE, SPREAD = 0.02, 2.4, 12 * math.pi / 180, 0.05


@dataclass(frozen=True)
class Physics:
    """What makes a variant of the task.

    Attributes:
        gravity: In m/s².
        mass_cart: In kg.
        mass_pole: In kg.
        half_length: Half of the pole, in m.
        force: Of a push to the right, in N; a negative one reverses the two actions.
    """

    gravity: float = 9.8
    mass_cart: float = 1.0
    mass_pole: float = 0.1
    half_length: float = 0.5
    force: float = 10.0


class CartPoles:
    """Environments of all policies, that begin anew by themselves.

    Starts are drawn for each environment alike, whichever policy it belongs to.

    Attributes:
        observations: (p, e, 4), the states as they are.
    """

    def __init__(
        self, physics: list[list[Physics]], horizon: int, generator: torch.Generator, dtype=None
    ) -> None:
        """Begin.

        Args:
            physics: p lists of e variants.
            horizon: Steps after which an episode is cut off.
            generator: Draws where episodes begin.
            dtype: Of states.
        """
        fields = [[list(vars(one).values()) for one in row] for row in physics]
        gravity, cart, pole, length, force = torch.tensor(fields, dtype=dtype).unbind(-1)
        total = cart + pole
        self._gravity, self._length, self._force = gravity, length, force / total
        self._pole_share = pole / total
        self._horizon, self._generator = horizon, generator
        self._ages = torch.zeros(total.shape, dtype=torch.int32)
        self.observations = self._starts().expand(*total.shape, 4).clone()

    def step(self, actions: Tensor) -> Step:
        """Push to the left (0) or to the right (1): actions (p, e)."""
        x, x_dot, angle, angle_dot = self.observations.unbind(-1)
        push = torch.where(actions > 0, self._force, -self._force)
        sine, cosine = angle.sin(), angle.cos()
        share = self._pole_share * self._length
        q = push + share * angle_dot.square() * sine
        inertia = self._length * (4 / 3 - self._pole_share * cosine.square())
        angle_acc = (self._gravity * sine - cosine * q) / inertia
        x_acc = q - share * angle_acc * cosine
        last = torch.stack(
            [
                x + TIME_STEP * x_dot,
                x_dot + TIME_STEP * x_acc,
                angle + TIME_STEP * angle_dot,
                angle_dot + TIME_STEP * angle_acc,
            ],
            dim=-1,
        )
        self._ages += 1
        terminated = (last[..., 0].abs() > MAX_POSITION) | (last[..., 2].abs() > MAX_ANGLE)
        truncated = (self._ages >= self._horizon) & ~terminated
        ended = terminated | truncated
        self._ages.masked_fill_(ended, 0)
        self.observations = torch.where(ended[..., None], self._starts(), last)
        return Step(torch.ones_like(x), terminated, truncated, last)

    def _starts(self) -> Tensor:
        """(e, 4) uniform."""
        shape = self._ages.shape[1], 4
        drawn = torch.rand(shape, generator=self._generator, dtype=self._gravity.dtype)
        return SPREAD * (2 * drawn - 1)
