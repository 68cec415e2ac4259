"""What a report says first, in words: which tasks help and harm, and how surely.

Which way a score gets better is given, or guessed from the words of its name, and that is said.
A task is named where the 95 % interval of its attribution excludes zero.

Shapes: n tasks, t targets; values and half-widths (n,) of one target.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ksm_ext.arrays import position
from ksm_ext.checks import message
from ksm_ext.drawing import fixed
from ksm_ext.tables.roles import better_high

_NAMED = 3  # tasks of each kind that are named in words


@dataclass(frozen=True)
class Direction:
    """Which way a score gets better.

    Attributes:
        maximize: Whether more is better; None where that is not known.
        given: Whether the caller said so; otherwise it is guessed from the name.
    """

    maximize: bool | None
    given: bool

    @property
    def sign(self) -> int:
        """-1 where less is better, else 1: attributions times this are good where positive."""
        return -1 if self.maximize is False else 1

    @property
    def words(self) -> tuple[str, str]:
        """What a task of positive and one of negative attribution, times :attr:`sign`, does."""
        return ("raise it", "lower it") if self.maximize is None else ("help", "hurt")

    def __str__(self) -> str:
        """Such as ``lower is better, guessed from the name``."""
        if self.maximize is None:
            return "which way is better is not known"
        why = "as given" if self.given else "guessed from the name"
        return f"{'higher' if self.maximize else 'lower'} is better, {why}"


def directions(names: Sequence[str], maximize: Any) -> list[Direction]:
    """One for each of the t targets.

    Args:
        names: Names of the targets.
        maximize: For all of them, or by name; ``None`` and targets that are not named: a guess.

    Raises:
        ValueError: If a target is unknown.
        TypeError: If it is none of these.
    """
    if maximize is None or isinstance(maximize, bool):
        said = {} if maximize is None else dict.fromkeys(range(len(names)), maximize)
    elif isinstance(maximize, Mapping) and all(isinstance(v, bool) for v in maximize.values()):
        said = {position("maximize", name, names): value for name, value in maximize.items()}
    else:
        expected = "True, False, or these by target"
        remedy = "False says that less is better, as of a loss."
        raise TypeError(message("maximize", expected, repr(maximize)[:60], remedy))
    return [
        Direction(said[j], True) if j in said else Direction(better_high(name), False)
        for j, name in enumerate(names)
    ]


def answer(
    values: Tensor,
    half: Tensor | None,
    names: Sequence[str],
    direction: Direction,
    digits: int,
) -> dict[str, Any]:
    """Which tasks help and harm a target, strongest first, and how many are clear of zero.

    ``half`` is the half-width of the 95 % intervals, or None where there are none; then nothing is
    clear, and the largest are named as they are.
    """
    good = values * direction.sign
    clear = torch.ones_like(values, dtype=torch.bool) if half is None else values.abs() > half
    sides = []
    for style, word, side in zip(("good", "bad"), direction.words, (1, -1), strict=True):
        strength = torch.where(clear, good * side, -torch.inf)
        order = strength.argsort(descending=True, stable=True)
        found = order[: int((strength > 0).sum())].tolist()
        tasks = []
        for i in found[:_NAMED]:
            ends = () if half is None else (values[i] - half[i], values[i] + half[i])
            tasks.append((names[i], [fixed(float(v), digits) for v in (values[i], *ends)]))
        sides.append({"style": style, "word": word, "tasks": tasks, "count": len(found)})
    return {
        "sides": sides,
        "known": half is not None,
        "num_clear": int(clear.sum()),
        "direction": str(direction),
    }
