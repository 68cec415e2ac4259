"""Surrogates of prompts: sets of demonstrations, or ordered ones.

A prompt is a tuple of demonstration numbers. As a set it is a mask (n,); with a ratio r, the
demonstration at position j weighs r^-j, scaled to a mean square of 1; and by position it is the
one-hot of (demonstration, position), n k columns, beside the set.

The kernel surrogate is fitted to log-odds of the right answer, h = -log(exp(loss) - 1), exactly
that of a choice of two: demonstrations add up there, while the loss log(1 + exp(-h)) levels off,
which is what makes a second demonstration of the same redundant.

Shapes: prompts (m, k) int64, losses (m, t), features (m, n) or (m, n k).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot, softplus

from ksm_ext import fit_surrogate

Predict = Callable[[Tensor], Tensor]
"""From prompts (l, k) to losses (l, t)."""

BY_POSITION = 0.5  # weight of (demonstration, position) beside the set


@dataclass(frozen=True)
class Recipe:
    """How a surrogate of prompts is fitted.

    Attributes:
        kernel: What :func:`ksm_ext.fit_surrogate` takes.
        order: ``"set"``, ``"ratio"`` or ``"position"``.
        log_odds: Whether losses are modelled as log-odds.
        ratio: How many times the next an earlier demonstration weighs, by ``"ratio"``.
    """

    kernel: str
    order: Literal["set", "ratio", "position"] = "set"
    log_odds: bool = False
    ratio: float = 1.2

    def features(self, prompts: Tensor, num_demonstrations: int) -> Tensor:
        """Features of prompts (m, k): 0/1 for sets, real weights otherwise."""
        taken = one_hot(prompts, num_demonstrations).double()  # (m, k, n)
        if self.order == "set":
            return taken.sum(1).bool()
        if self.order == "position":
            return torch.cat([taken.sum(1), BY_POSITION * taken.flatten(1)], dim=1)
        weights = self.ratio ** -torch.arange(prompts.shape[1], dtype=torch.float64)
        weights = weights / weights.square().mean().sqrt()
        return (taken * weights[:, None]).sum(1)

    def fit(
        self, prompts: Tensor, losses: Tensor, num_demonstrations: int, **options: Any
    ) -> Predict:
        """A function that predicts losses of prompts; ``options`` go to ``fit_surrogate``."""
        scores = log_odds(losses) if self.log_odds else losses
        scores = scores if len(scores.T) > 1 else scores[:, 0]
        fitted = fit_surrogate(
            self.features(prompts, num_demonstrations), scores, kernel=self.kernel, **options
        )

        def predict(others: Tensor) -> Tensor:
            scores = fitted.predict(self.features(others, num_demonstrations))
            scores = scores.reshape(len(others), -1)
            return softplus(-scores) if self.log_odds else scores

        return predict


RECIPES = {
    "kernel surrogate": Recipe("rbf", log_odds=True),
    "kernel surrogate, earlier first": Recipe("rbf", "ratio", log_odds=True),
    "kernel surrogate, by position": Recipe("rbf", "position", log_odds=True),
    "kernel on losses": Recipe("rbf"),
    "ridge": Recipe("linear"),
    "ridge, log-odds": Recipe("linear", log_odds=True),
    "ridge, by position": Recipe("linear", "position"),
    "least squares": Recipe("least_squares"),
}


def log_odds(losses: Tensor) -> Tensor:
    """Log-odds of the right answer: -log(exp(loss) - 1), between -30 and 30."""
    return (-torch.log(torch.expm1(losses.clamp(1e-13, 30.0)))).clamp(-30, 30)


def contexts(num_demonstrations: int, size: int, count: int, seed: int) -> Tensor:
    """(count, size - 1): other demonstrations of a prompt, disjoint as long as there are enough."""
    generator = torch.Generator().manual_seed(seed)
    per_draw = num_demonstrations // (size - 1)
    draws = [
        torch.randperm(num_demonstrations, generator=generator)[: per_draw * (size - 1)]
        for _ in range(-(-count // per_draw))
    ]
    return torch.cat(draws).view(-1, size - 1)[:count]


def exchanges(others: Tensor, num_demonstrations: int, seed: int) -> tuple[Tensor, Tensor]:
    """Prompts (p, k) that put every demonstration into every context, and which one it is (p,).

    The slot is a random one for each context, the same for all demonstrations.
    """
    generator = torch.Generator().manual_seed(seed)
    prompts, which = [], []
    for context in others.tolist():
        slot = int(torch.randint(len(context) + 1, (1,), generator=generator))
        for demonstration in range(num_demonstrations):
            if demonstration not in context:
                prompts.append([*context[:slot], demonstration, *context[slot:]])
                which.append(demonstration)
    return torch.tensor(prompts), torch.tensor(which)


def effects(losses: Tensor, which: Tensor, num_demonstrations: int, num_contexts: int) -> Tensor:
    """(n, t): the loss with a demonstration less the mean loss with another in its place.

    Averaged over the contexts it is not in; ``losses`` (p, t) are those of :func:`exchanges`.
    """
    by_context = losses.unflatten(0, (num_contexts, -1))
    centred = (by_context - by_context.mean(1, keepdim=True)).flatten(0, 1)
    sums = torch.zeros(num_demonstrations, losses.shape[1], dtype=losses.dtype)
    sums.index_add_(0, which, centred)
    return sums / which.bincount(minlength=num_demonstrations).clamp(min=1)[:, None]


def random_ensemble(prompts: Tensor, losses: Tensor, num_demonstrations: int) -> Tensor:
    """(n, t): mean loss of the prompts that have a demonstration, less that of all prompts."""
    masks = one_hot(prompts, num_demonstrations).sum(1).to(losses.dtype)  # (m, n)
    counts = masks.sum(0).clamp(min=1)
    return (masks.T @ (losses - losses.mean(0))) / counts[:, None]
