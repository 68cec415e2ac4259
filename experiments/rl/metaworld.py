"""The ten tasks of Meta-World's MT10, each with goals of its own, for a robot arm.

An observation is that of the arm and of the things around it with a one-hot code of the task behind
it. A goal is drawn at every start of an episode, which Meta-World itself does not do by its seed.

Reference: *Yu et al. 2020, arXiv:1910.10897*.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.rl.gym_environments import GymEnvironments

LARGEST = 10.0  # reward of a step


@cache
def benchmark() -> Any:
    """MT10, whose goals are those of one seed."""
    import metaworld

    return metaworld.MT10(seed=0)


class MetaWorld:
    """The suite; it needs the package ``metaworld``."""

    num_outputs, discrete, largest = 4, False, 1.0

    def __init__(self) -> None:
        self.task_names = tuple(benchmark().train_classes)
        self.camps = torch.zeros(len(self.task_names), dtype=torch.int64)
        self.num_inputs = 39 + len(self.task_names)

    def environments(
        self, tasks: Tensor, horizon: int, generator: torch.Generator
    ) -> GymEnvironments:
        made = [[Arm(task, horizon) for task in row] for row in tasks.tolist()]
        return GymEnvironments(made, torch.ones(len(made), 1), generator)


class Arm:
    """One task, with a goal drawn for each episode."""

    def __init__(self, task: int, horizon: int) -> None:
        self._name, kind = list(benchmark().train_classes.items())[task]
        self._env, self._horizon, self._age = kind(), horizon, 0
        self._goals = [x for x in benchmark().train_tasks if x.env_name == self._name]
        self._code = np.eye(len(benchmark().train_classes), dtype=np.float32)[task]
        self._random = np.random.default_rng(0)

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin with a goal of one's own."""
        if seed is not None:
            self._random = np.random.default_rng(seed)
        self._env.set_task(self._goals[self._random.integers(len(self._goals))])
        self._age = 0
        return self._seen(self._env.reset()[0]), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Move; rewards are from 0 to 1."""
        seen, reward, *_ = self._env.step(np.clip(action, -1, 1).astype(np.float32))
        self._age += 1
        return self._seen(seen), reward / LARGEST, False, self._age >= self._horizon, {}

    def _seen(self, observation: Any) -> Any:
        return np.concatenate([observation.astype(np.float32), self._code])
