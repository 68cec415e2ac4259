"""Which tasks there are: poles on carts in two camps, or the ten tasks of Meta-World.

A suite is a list of tasks that a policy can be trained on; each is a target too. Policies are not
told which task they are at, but for Meta-World's: in two camps that take the same action for
opposite ones, a policy can only serve one, and which one is a matter of what else it is trained on.

Shapes: n tasks, p policies with e environments each.
"""

import re
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experiments.rl.cartpole import CartPoles, Physics
from experiments.rl.environment import Environments
from experiments.settings import Section, check_least
from ksm_ext.checks import message

PHYSICS = {
    "plain": Physics(),
    "long pole": Physics(half_length=1.0),
    "short pole": Physics(half_length=0.3),
    "heavy pole": Physics(mass_pole=0.5),
    "heavy cart": Physics(mass_cart=2.0),
    "weak motor": Physics(force=6.0),
    "strong motor": Physics(force=15.0),
    "on Mars": Physics(gravity=3.7),
}
MOST = len(PHYSICS)


@dataclass(frozen=True)
class Data(Section):
    """The tasks.

    Attributes:
        suites: ``"6+6"`` is six variants of CartPole and the same with reversed actions, in the
            order of :data:`PHYSICS`; ``"MT10"`` is Meta-World's.
        horizon: Steps after which an episode is cut off.
        num_episodes: Of each task, that a policy is judged by.
    """

    suites: tuple[str, ...] = ("6+6", "8+4")
    horizon: int = 200
    num_episodes: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.suites:
            raise ValueError(message("data.suites", "one suite or more", "none", "Name them."))
        for name in self.suites:
            counts_of(name)
        check_least(self, horizon=1, num_episodes=1)


def counts_of(name: str) -> tuple[int, ...]:
    """How many tasks each camp of a suite has; the one number of those that have no camps.

    Raises:
        ValueError: If there is no such suite.
    """
    if name == "MT10":
        return (10,)
    found = re.fullmatch(r"(\d)\+(\d)", name, re.ASCII)
    counts = tuple(map(int, found.groups())) if found else ()
    if not counts or not all(0 < count <= MOST for count in counts):
        expected = f"'MT10' or two numbers of variants from 1 to {MOST}, such as '6+6'"
        raise ValueError(message("data.suites", expected, repr(name), "Correct it."))
    return counts


class Suite(Protocol):
    """Tasks.

    Attributes:
        task_names: n names.
        camps: (n,) of 1 and -1, or all 0 where there are none.
        num_inputs: Length of an observation, d.
        num_outputs: Actions to choose from, or numbers of a real one, k.
        discrete: Whether actions are chosen from a list.
        largest: What a step can earn at most.
    """

    task_names: tuple[str, ...]
    camps: Tensor
    num_inputs: int
    num_outputs: int
    discrete: bool
    largest: float

    def environments(self, tasks: Tensor, horizon: int, generator: torch.Generator) -> Environments:
        """Environments of tasks (p, e), by their numbers."""


class Camps:
    """CartPole with the actions of some variants reversed."""

    num_inputs, num_outputs, discrete, largest = 4, 2, True, 1.0

    def __init__(self, num_normal: int, num_reversed: int) -> None:
        normal = list(PHYSICS.items())[:num_normal]
        reversed_ = [
            (f"{name}, reversed", Physics(**(vars(x) | {"force": -x.force})))
            for name, x in list(PHYSICS.items())[:num_reversed]
        ]
        self.task_names = tuple(name for name, _ in normal + reversed_)
        self._physics = [physics for _, physics in normal + reversed_]
        self.camps = torch.tensor([1] * num_normal + [-1] * num_reversed)

    def environments(self, tasks: Tensor, horizon: int, generator: torch.Generator) -> CartPoles:
        physics = [[self._physics[task] for task in row] for row in tasks.tolist()]
        return CartPoles(physics, horizon, generator)


def suite_of(name: str) -> Suite:
    """The suite of a name such as ``"6+6"``.

    Raises:
        ValueError: If there is none.
        RuntimeError: If it needs a package that is not installed.
    """
    counts = counts_of(name)
    if name != "MT10":
        return Camps(*counts)
    from experiments.rl.metaworld import MetaWorld

    try:
        return MetaWorld()
    except ImportError as error:
        expected, remedy = "of installed packages", "Run pip install '.[rl]', or name others."
        raise RuntimeError(message("data.suites", expected, f"MT10 ({error})", remedy)) from error


def assigned(masks: Tensor, num_environments: int) -> tuple[Tensor, Tensor]:
    """Which task each environment has (p, e), and how much its samples count (p, e).

    The tasks of a subset take turns, and share the samples alike even where the turns do not come
    out even. Nothing counts in an empty subset.

    Args:
        masks: (p, n) bool.
        num_environments: e, at least n.
    """
    num_tasks = masks.shape[1]
    if num_environments < num_tasks:
        expected, found = f"at least {num_tasks} like the tasks", str(num_environments)
        raise ValueError(message("training.num_environments", expected, found, "Raise it."))
    order = (~masks).int().argsort(dim=1, stable=True)  # the tasks of the subset first
    sizes = masks.sum(1, keepdim=True)
    turns = torch.arange(num_environments) % sizes.clamp(min=1)
    tasks = order.gather(1, turns)
    counts = torch.zeros(masks.shape).scatter_add_(1, tasks, torch.ones(tasks.shape))
    return tasks, (sizes > 0) / counts.gather(1, tasks)
