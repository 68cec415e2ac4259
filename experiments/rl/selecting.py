"""Choosing tasks for a target, under a budget, with and without the target's own task.

Every way answers a table of predicted scores of all subsets; what it chooses is the best subset of
at most so many tasks. Choices are trained on anew, with seeds that no way has seen.

Returns are heavy-tailed: interquartile means over seeds and targets, as *Agarwal et al. 2021,
arXiv:2108.13264*. Targets share policies, and all policies of a seed their random numbers: the
bootstrap draws seeds for all targets and ways together.

Shapes: all subsets (2ⁿ, n), predictions (2ⁿ, t), returns (num_seeds, num_draws, t).
"""

from collections.abc import Mapping

import numpy as np
import torch
from scipy.stats import trim_mean
from torch import Tensor

from experiments.rl.methods import Answer
from ksm_ext.subsets import all_subsets

WAYS = {
    "kernel surrogate": "kernel surrogate",
    "kernel surrogate, warped": "kernel surrogate, warped",
    "ridge datamodel": "ridge datamodel",
    "ridge datamodel, warped": "ridge datamodel, warped",
    "kernel surrogate, few retrained": "kernel surrogate, few retrained",
    "kernel surrogate, calibrated": "kernel surrogate, calibrated",
    "influence, CG on GGN": "influence, CG on GGN",
    "TRAK": "TRAK",
    "gradient cosine": "gradient similarity",
    "counting camps": "counting camps",
}
"""Methods by which tasks are chosen, and what they are called then."""
NUM_RESAMPLES = 1000


def choices(
    answers: Mapping[str, Answer], num_tasks: int, size: int, num_draws: int, *, held_out: bool
) -> dict[str, Tensor]:
    """Chosen subsets (num_draws, t, n) by the name of the way; without the own task if held out."""
    own, masks = torch.eye(num_tasks, dtype=torch.bool), all_subsets(num_tasks)
    sizes = masks.sum(1)
    generator = torch.Generator().manual_seed(0)
    small = (sizes > 0) & (sizes <= size)
    full = sizes == size

    def best(predictions: Tensor, fitting: Tensor) -> Tensor:
        """(num_draws, t, n), at random among equals."""
        found = torch.empty(num_draws, num_tasks, num_tasks, dtype=torch.bool)
        for target in range(num_tasks):
            rows = (fitting & ~masks[:, target] if held_out else fitting).nonzero()[:, 0]
            values = predictions[rows, target]
            equals = rows[values <= values.min() + 1e-9]
            drawn = torch.randint(len(equals), (num_draws,), generator=generator)
            found[:, target] = masks[equals[drawn]]
        return found

    nothing = torch.zeros(len(masks), num_tasks, dtype=torch.float64)
    found = {
        called: best(answers[name].predictions, full if "camps" in name else small)
        for name, called in WAYS.items()
        if name in answers
    }
    found["random grouping"] = best(nothing, full)
    found["all tasks"] = (~own if held_out else ~torch.zeros_like(own))[None]
    found["each alone"] = best(nothing, sizes == 1) if held_out else own[None]
    return found


def interquartile_mean(returns: Tensor, less: Tensor | None = None) -> tuple[float, float, float]:
    """Of returns (num_seeds, ...), with its interval; or less that of others by the same seeds."""
    count, random = len(returns), np.random.default_rng(0)

    def value(seeds: np.ndarray) -> float:
        mean = trim_mean(returns.numpy()[seeds], 0.25, None)
        return float(mean if less is None else mean - trim_mean(less.numpy()[seeds], 0.25, None))

    drawn = [value(random.integers(count, size=count)) for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return value(np.arange(count)), float(low), float(high)
