r"""Surrogates of estimates, as the trend of a surrogate of true scores.

.. math:: F(S) = a + \sum_l b_l E_l(S) + \delta(S)

Each :math:`E_l` is a fitted surrogate with the estimates that it was fitted to in it: at a subset
whose score was estimated it is that estimate, less what is known to be noise. So it is a function
with closed-form readouts, and those of F are theirs times b plus those of δ.

Shapes: n tasks, l query subsets, t targets, L estimates; float64.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksm_ext.checks import brief
from ksm_ext.surrogates.options import PairReadout, Readout


@dataclass(frozen=True, eq=False)
class Level:
    """A surrogate of estimates, and where in it the tasks and targets of the true scores are.

    Attributes:
        surrogate: The :class:`ksm_ext.Surrogate`, answering in tensors.
        tasks: n numbers: the true task that each of its tasks is.
        targets: t numbers: its target that estimates each of the true ones.
    """

    surrogate: Any
    tasks: tuple[int, ...]
    targets: tuple[int, ...]

    __repr__ = brief

    def predict(self, masks: Tensor, return_std: bool) -> Any:
        """Estimates of subsets (l, n), (l, t)."""
        asked = masks[:, list(self.tasks)]
        return self._told(self.surrogate.predict(asked, return_std, observed=True), 0)

    def attribute(self, readout: Readout, return_std: bool) -> Any:
        """Attributions, (n, t)."""
        return self._told(self.surrogate.attribute(readout, return_std), 1)

    def owen_values(self, groups: Sequence[Hashable], return_std: bool) -> Any:
        """Owen values, (n, t), of true tasks in these groups."""
        own = [groups[task] for task in self.tasks]
        return self._told(self.surrogate.owen_values(own, return_std), 1)

    def mean_score(self, readout: Readout) -> Any:
        """Mean scores, (t,)."""
        return self._told(self.surrogate.mean_score(readout), 0)

    def interactions(self, readout: PairReadout, return_std: bool) -> Any:
        """Interactions, (n, n, t)."""
        return self._told(self.surrogate.interactions(readout, return_std), 2)

    def attribution_covariance(self, readout: Readout) -> Tensor:
        """Covariances of attributions, (n, n, t) in squares of :attr:`unit`."""
        return self._told(self.surrogate.attribution_covariance(readout, relative=True), 2)

    @property
    def unit(self) -> Tensor:
        """(t,) unit of the estimates of each target."""
        unit: Tensor = self.surrogate.unit[list(self.targets)]
        return unit

    @property
    def places(self) -> list[int]:
        """N numbers: its task that each of the true ones is."""
        return sorted(range(len(self.tasks)), key=self.tasks.__getitem__)

    @property
    def moving(self) -> Tensor:
        """(n,) bool: tasks that some of its answers depend on."""
        names, constant = self.surrogate.task_names, set(self.surrogate.constant_tasks)
        return torch.tensor([names[place] not in constant for place in self.places])

    def _told(self, answer: Any, task_axes: int) -> Any:
        """An answer, or the pair with its standard deviations, for the true tasks and targets."""
        if isinstance(answer, tuple):
            return tuple(self._told(table, task_axes) for table in answer)
        for axis in range(task_axes):
            answer = answer.index_select(axis, torch.tensor(self.places))
        return answer[..., list(self.targets)]


@dataclass(frozen=True, eq=False)
class Trend:
    """What a surrogate of true scores has of its estimates.

    Attributes:
        levels: L surrogates of estimates.
        slopes: (L, t) float64, b: units of the true scores per unit of the estimates.
    """

    levels: tuple[Level, ...]
    slopes: Tensor

    __repr__ = brief

    def ask(self, question: Callable[[Level], Any]) -> "Answers":
        """What the levels answer to a question, with standard deviations if it asks for them."""
        answers = [question(level) for level in self.levels]
        pairs = [each if isinstance(each, tuple) else (each,) for each in answers]
        columns = zip(*pairs, strict=True)
        return Answers(self.slopes, *(torch.stack(each).to(self.slopes) for each in columns))

    def with_slopes(self) -> Iterator[tuple[Level, Tensor]]:
        """Each level and its slopes (t,)."""
        return zip(self.levels, self.slopes, strict=True)


@dataclass(frozen=True, eq=False)
class Answers:
    """What the levels of a trend answer to one question.

    Attributes:
        slopes: (L, t) of the trend.
        values: (L, ..., t).
        std: Their standard deviations, or None.
    """

    slopes: Tensor
    values: Tensor
    std: Tensor | None = None

    __repr__ = brief

    @property
    def mean(self) -> Tensor:
        """What the trend answers, (..., t)."""
        return torch.einsum("l...t,lt->...t", self.values, self.slopes)

    def variance(self, unit: Tensor) -> Tensor:
        """Its variance by that of the levels, which count as independent, (..., t) in ``unit^2``.

        Args:
            unit: (t,).
        """
        assert self.std is not None
        slopes = (self.slopes / unit).reshape(len(self.slopes), *(1,) * (self.std.ndim - 2), -1)
        return (self.std * slopes).square().sum(0)

    def at(self, first: Tensor, second: Tensor) -> "Answers":
        """The answers at these places of the two dimensions after the first."""
        std = None if self.std is None else self.std[:, first, second]
        return Answers(self.slopes, self.values[:, first, second], std)

    def differences(self, first: Tensor, second: Tensor) -> "Answers":
        """Differences of the answers at these places of the dimension after the first."""
        return Answers(self.slopes, self.values[:, first] - self.values[:, second])

    def less(self, share: Tensor) -> "Answers":
        """The same, less uncertain by a ``share`` (..., t)."""
        std = None if self.std is None else self.std * (1 - share)
        return Answers(self.slopes, self.values, std)
