"""Operations on numbers modulo p, as samples in tasks.

A sample is a tuple of operands and its result; a task is a cell of the grid over the first two
operands. Some samples of every cell are held out: they are the targets, cell by cell.

Shapes: tokens (b, 2 r) for r operands: ``a ∘ b =`` as numbers below p, p for the sign, p + 1 for
the equals sign; labels (b,) the results; cells (b,).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from experiments.trained import Grouped


@dataclass(frozen=True)
class Operation:
    """A function of numbers modulo p.

    Attributes:
        apply: From operands (b,) and p to results (b,), any integers.
        num_operands: r.
        divides: Whether the last operand must not be 0.
        commutes: Whether the first two operands may change places.
    """

    apply: Callable[..., Tensor]
    num_operands: int = 2
    divides: bool = False
    commutes: bool = False


def inverse(b: Tensor, p: int) -> Tensor:
    """``1 / b`` modulo the prime p, by Fermat: b^(p - 2)."""
    table = torch.tensor([pow(number, p - 2, p) for number in range(p)])
    return table[b]


OPERATIONS = {
    "add": Operation(lambda p, a, b: a + b, commutes=True),
    "sub": Operation(lambda p, a, b: a - b),
    "mul": Operation(lambda p, a, b: a * b, commutes=True),
    "div": Operation(lambda p, a, b: a * inverse(b, p), divides=True),
    "quad": Operation(lambda p, a, b: a**2 + a * b + b**2, commutes=True),
    "cubic": Operation(lambda p, a, b: a**3 + a * b),
    "cubic2": Operation(lambda p, a, b: a**3 + a * b**2 + b),
    "parity": Operation(
        lambda p, a, b: torch.where(b % 2 == 1, a * inverse(b, p), a - b), divides=True
    ),
    "quad3": Operation(
        lambda p, a, b, c: a**2 + b**2 + c**2 + a * b + b * c + c * a, num_operands=3, commutes=True
    ),
}


@lru_cache(maxsize=4)  # every training of a process starts from it
def arithmetic(
    operation: str, modulus: int, grid: int, held_out: float, num_samples: int | None, seed: int
) -> Grouped:
    """The samples of an operation, sorted by cell.

    Args:
        operation: Key of :data:`OPERATIONS`.
        modulus: p, a prime if the operation divides.
        grid: Cells along each of the first two operands: n = grid².
        held_out: Share of each cell's samples that is held out.
        num_samples: Draw as many of all tuples; ``None`` takes all.
        seed: Draws the samples, and what is held out.
    """
    rule = OPERATIONS[operation]
    generator = torch.Generator().manual_seed(seed)
    operands = torch.cartesian_prod(*[torch.arange(modulus)] * rule.num_operands)
    if rule.divides:
        operands = operands[operands[:, -1] != 0]
    if num_samples is not None:
        chosen = torch.randperm(len(operands), generator=generator)[:num_samples]
        operands = operands[chosen.sort().values]
    results = rule.apply(modulus, *operands.T) % modulus
    first, second = (operands[:, i] * grid // modulus for i in range(2))
    cells = first * grid + second
    order = cells.argsort(stable=True)
    operands, results, cells = operands[order], results[order], cells[order]
    held = torch.zeros(len(cells), dtype=torch.bool)
    for cell in range(grid**2):
        rows = (cells == cell).nonzero()[:, 0]
        count = round(held_out * len(rows))
        held[rows[torch.randperm(len(rows), generator=generator)[:count]]] = True
    signs = torch.full_like(operands, modulus)
    signs[:, -1] = modulus + 1
    tokens = torch.stack([operands, signs], dim=2).flatten(1)
    edges = [-(-modulus * k // grid) for k in range(grid + 1)]  # first operand of each cell
    spans = [f"{low}-{high - 1}" for low, high in pairwise(edges)]
    names = tuple(f"{a}, {b}" for a in spans for b in spans)
    samples = [part[rows] for rows in (~held, held) for part in (tokens, results, cells)]
    return Grouped(*samples, names, names, modulus + 2)
