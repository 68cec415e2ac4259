"""The methods that apply to text, in its unit; and a baseline that knows a domain's own share only.

The library's losses are nats of whole windows; scores here are bits per byte. Left out: projected
influence, whose curvature is that of a window's log-odds, nothing where it has a probability of
e^-150; and EK-FAC, whose layers do not include tables.
"""

from collections.abc import Callable
from functools import partial
from math import log

import torch
from torch import Tensor

from experiments.folds import from_the_others, split
from experiments.methods import (
    FEW,
    METHODS,
    OWN_SHARE,
    RETRAINED,
    Answer,
    Method,
    Problem,
    additive,
    by_conjugate_gradients,
    by_cosine,
    by_lissa,
    by_tracin,
    by_trak,
    mean_of,
)
from ksm_ext.network.hessian import GaussNewton


def own_share(problem: Problem) -> Answer:
    """A line for each target: its loss where its own domain is in the subset, and where not."""
    masks, scores = problem.masks, problem.scores

    def effects(rows: Tensor) -> tuple[Tensor, Tensor]:
        """Means (t,) without the own domain, and by how much it changes them."""
        inside, table = masks[rows].double(), scores[rows]
        with_it = (inside * table).sum(0) / inside.sum(0).clamp(min=1)
        without = ((1 - inside) * table).sum(0) / (1 - inside).sum(0).clamp(min=1)
        return without, with_it - without

    def predict(others: Tensor, fold: Tensor) -> Tensor:
        without, effect = effects(others)
        return without + masks[fold].double() * effect

    folds = split(len(masks), problem.settings.truth.num_folds)
    _, effect = effects(torch.arange(len(masks)))
    return Answer(effect.diag(), from_the_others(folds, predict))


def in_bits(attribute: Callable[[Problem], Tensor]) -> Method:
    """The answer of a method whose attributions are nats of a window."""

    def of_a_byte(problem: Problem) -> Tensor:
        return attribute(problem) / (problem.experiment.data().labels.shape[1] * log(2))

    return partial(additive, of_a_byte)


TEXT_METHODS: dict[str, Method] = {
    OWN_SHARE: own_share,
    **RETRAINED,
    **{name: METHODS[name] for name in FEW},
    "influence, CG on GGN": in_bits(
        partial(mean_of, partial(by_conjugate_gradients, curvature=GaussNewton))
    ),
    "influence, LiSSA": in_bits(partial(mean_of, by_lissa)),
    "TRAK": in_bits(by_trak),
    "TracIn": in_bits(by_tracin),
    "gradient cosine": partial(additive, partial(mean_of, by_cosine)),
}
