r"""Attributions of a game whose every subset is scored.

.. math:: \tau_i = \sum_{S \not\ni i} w(|S|) \, (F(S \cup i) - F(S)), \qquad
          w_{\text{Shapley}}(s) = \frac{s! (n - 1 - s)!}{n!}, \quad
          w_{\text{Banzhaf}} = 2^{1-n}, \quad
          w_{\text{leave-one-out}}(s) = [s = n - 1]

Shapes: masks (2ⁿ, n), scores (2ⁿ, t), values (n, t).
"""

from math import comb

import torch
from torch import Tensor


def weights_of(masks: Tensor, readout: str) -> Tensor:
    """(n, 2ⁿ) float64: values are these times the scores."""
    num_tasks = masks.shape[1]
    if readout == "loo":
        by_size = torch.zeros(num_tasks, dtype=torch.float64)
        by_size[-1] = 1
    elif readout == "banzhaf":
        by_size = torch.full((num_tasks,), 2.0 ** (1 - num_tasks), dtype=torch.float64)
    else:
        by_size = torch.tensor(
            [1 / (num_tasks * comb(num_tasks - 1, size)) for size in range(num_tasks)],
            dtype=torch.float64,
        )
    inside = masks.T  # (n, 2ⁿ)
    others = masks.sum(1) - inside.int()
    return torch.where(inside, 1.0, -1.0) * by_size[others]


def is_complete(masks: Tensor) -> bool:
    """Whether every subset is there, once."""
    return len(masks) == len(masks.unique(dim=0)) == 2 ** masks.shape[1]
