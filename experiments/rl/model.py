"""Policies by the dozen: the weights of all in one tensor for each layer.

A policy is a perceptron from observations to log-odds of actions, or to the mean of a Gaussian with
a standard deviation of its own for each action; its critic is a second one of the same widths. The
critics stand behind the policies in the same tensors, so that one batched product serves both.

Shapes: p policies, b observations (p, b, d), k outputs.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from experiments.settings import Section, check_least


@dataclass(frozen=True)
class Model(Section):
    """The policy.

    Attributes:
        widths: Of its hidden layers.
    """

    widths: tuple[int, ...] = (32, 32)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_least(self, widths=1)


class Policies:
    """Policies and their critics.

    Attributes:
        weights: Of each layer (2 p, inputs, outputs) and its shift (2 p, 1, outputs), policies
            first; of real actions last the logarithms of standard deviations (p, 1, k).
    """

    def __init__(
        self,
        count: int,
        num_inputs: int,
        num_outputs: int,
        model: Model,
        seed: int,
        *,
        discrete: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Begin all alike: orthogonal weights drawn by a seed, shifts of zero."""
        generator = torch.Generator().manual_seed(seed)
        self.count, self.discrete = count, discrete
        sizes = [num_inputs, *model.widths, num_outputs]
        self.weights: list[Tensor] = []
        for layer, (size_in, size_out) in enumerate(pairwise(sizes)):
            last = layer == len(model.widths)
            pair = []
            for gain in (0.01, 1.0) if last else (2**0.5, 2**0.5):  # of the policy, of the critic
                drawn = torch.empty(size_out, size_in)
                pair.append(nn.init.orthogonal_(drawn, gain, generator=generator).T)
            both = torch.stack(pair).repeat_interleave(count, 0)
            self.weights += [both.to(dtype).contiguous(), torch.zeros(2 * count, 1, size_out)]
        if not discrete:
            self.weights.append(torch.zeros(count, 1, num_outputs))
        self.weights = [weight.to(dtype or torch.float32) for weight in self.weights]

    @property
    def num_layers(self) -> int:
        return len(self.weights) // 2

    def both(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """What policies say (p, b, k), and the values (p, b) of their critics."""
        out = self._forward(observations.repeat(2, 1, 1), slice(None))
        return out[: self.count], out[self.count :, :, 0]

    def said(self, observations: Tensor) -> Tensor:
        """What policies say (p, b, k): log-odds of actions, or means."""
        return self._forward(observations, slice(0, self.count))

    def values(self, observations: Tensor) -> Tensor:
        """(p, b): what the critics expect."""
        return self._forward(observations, slice(self.count, None))[..., 0]

    def _forward(self, x: Tensor, rows: slice) -> Tensor:
        for layer in range(self.num_layers):
            weight, shift = self.weights[2 * layer][rows], self.weights[2 * layer + 1][rows]
            x = torch.baddbmm(shift, x, weight)
            if layer + 1 < self.num_layers:
                x = x.tanh()
        return x

    def sample(self, said: Tensor, generator: torch.Generator) -> Tensor:
        """Actions (p, b) or (p, b, k), of the same random numbers for every policy."""
        if self.discrete:
            chance = torch.rand(said.shape[1], 1, generator=generator, dtype=said.dtype)
            below = said.softmax(-1).cumsum(-1)[..., :-1] < chance
            return below.sum(-1)
        noise = torch.randn(said.shape[1:], generator=generator, dtype=said.dtype)
        return said + self.weights[-1].exp() * noise

    def log_probabilities(self, said: Tensor, actions: Tensor) -> Tensor:
        """(p, b): log π(a | s)."""
        if self.discrete:
            return log_softmax(said, -1).gather(-1, actions[..., None])[..., 0]
        log_std = self.weights[-1]
        scaled = (actions - said) / log_std.exp()
        return -(scaled.square() / 2 + log_std + 0.9189385332046727).sum(-1)

    def entropies(self, said: Tensor) -> Tensor:
        """(p, b)."""
        if self.discrete:
            logarithms = log_softmax(said, -1)
            return -(logarithms.exp() * logarithms).sum(-1)
        return (self.weights[-1] + 1.4189385332046727).sum(-1).expand(said.shape[:-1])

    def policy(self, number: int) -> nn.Sequential:
        """One of them, without its critic."""
        layers: list[nn.Module] = []
        for layer in range(self.num_layers):
            weight, shift = (x[number].detach() for x in self.weights[2 * layer : 2 * layer + 2])
            linear = nn.utils.skip_init(nn.Linear, *weight.shape, dtype=weight.dtype)
            with torch.no_grad():
                linear.weight.copy_(weight.T)
                linear.bias.copy_(shift[0])
            layers += [linear, nn.Tanh()]
        layers.pop()
        if not self.discrete:
            layers.append(Gaussian(self.weights[-1][number, 0].detach().clone()))
        return nn.Sequential(*layers)


class Gaussian(nn.Module):
    """From means (b, k) to means and logarithms of standard deviations (b, k, 2)."""

    def __init__(self, log_std: Tensor) -> None:
        super().__init__()
        self.log_std = nn.Parameter(log_std)

    def forward(self, means: Tensor) -> Tensor:
        return torch.stack([means, self.log_std.expand_as(means)], -1)
