"""Training on a mixture: as many bytes whatever the shares, drawn alike.

The seed alone gives the first weights and the draws; the shares only say which domain a draw falls
into. So two mixtures with one seed see the same windows but for those that change the domain.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.settings import Training
from experiments.training import gradient_step, optimizer_of


def shares_of(mask: Tensor, base_share: float) -> Tensor:
    """(n,) float64: the domains of a mask (n,) alike, and a little of every one."""
    inside = mask.double() if mask.any() else torch.ones(len(mask), dtype=torch.float64)
    return (1 - base_share) * inside / inside.sum() + base_share / len(mask)


def windows_of(
    texts: tuple[Tensor, ...], shares: Tensor, size: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Windows (size, length + 1) of a step, and their domains (size,).

    Domains are drawn by systematic sampling: as many of each as its share says, to one.
    """
    points = (torch.arange(size) + torch.rand(1, generator=generator)) / size
    places = torch.rand(size, generator=generator, dtype=torch.float64)
    domains = torch.searchsorted(shares.cumsum(0), points.double() * float(shares.sum()))
    domains.clamp_(max=len(shares) - 1)
    windows = []
    for domain, place in zip(domains.tolist(), places.tolist(), strict=True):
        start = int(place * (len(texts[domain]) - length))
        windows.append(texts[domain][start : start + length + 1])
    return torch.stack(windows), domains


def train(
    network: nn.Module,
    texts: tuple[Tensor, ...],
    shares: Tensor,
    length: int,
    settings: Training,
    seed: int,
) -> Iterator[nn.Module]:
    """Train on a mixture with shares (n,), and yield the network at each checkpoint."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mixed = torch.autocast(
        device.type, torch.bfloat16, enabled=settings.autocast and device.type == "cuda"
    )
    network = network.to(device).train()
    optimizer, stops = optimizer_of(network, settings), settings.stops()
    generator = torch.Generator().manual_seed(seed)
    for step in range(max(stops)):
        drawn, _ = windows_of(texts, shares, settings.batch_size, length, generator)
        drawn = drawn.to(device)

        def loss(drawn: Tensor = drawn) -> Tensor:
            with mixed:
                logits = network(drawn[:, :-1])
            return cross_entropy(logits.float().flatten(0, 1), drawn[:, 1:].flatten())

        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        with torch.enable_grad():
            gradient_step(optimizer, loss, settings, generator)
        for _ in range(stops.count(step + 1)):
            yield network
