"""Steps on a mixture: as many bytes whatever the shares, drawn alike.

The seed alone gives the first weights and the draws; the shares only say which domain a draw falls
into. So two mixtures with one seed see the same windows but for those that change the domain.
"""

import torch
from torch import Tensor


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
