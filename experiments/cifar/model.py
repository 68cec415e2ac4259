"""Residual networks for small images: ResNet-9, and torchvision's ResNet-18.

Shapes: images (b, 3, h, h), logits (b, C).
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

Norm = Callable[[int], nn.Module]
NORMS: dict[str, Norm] = {"batch": nn.BatchNorm2d, "group": partial(nn.GroupNorm, 4)}


def convolution(
    num_in: int, num_out: int, norm: Norm, size: int = 3, stride: int = 1, padding: int = 1
) -> nn.Sequential:
    """A convolution, a normalisation and a rectifier."""
    return nn.Sequential(
        nn.Conv2d(num_in, num_out, size, stride, padding, bias=False), norm(num_out), nn.ReLU()
    )


class Residual(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(self, width: int, norm: Norm) -> None:
        super().__init__()
        self.inner = nn.Sequential(*(convolution(width, width, norm) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class ResNet9(nn.Module):
    """Eight convolutions and a linear layer; 2,274,880 parameters at the published widths."""

    def __init__(self, num_classes: int, widths: tuple[int, ...], norm: Norm) -> None:
        super().__init__()
        first, second, third, last = widths
        self.features = nn.Sequential(
            convolution(3, first, norm),
            convolution(first, second, norm, size=5, stride=2, padding=2),
            Residual(second, norm),
            convolution(second, third, norm),
            nn.MaxPool2d(2),
            Residual(third, norm),
            convolution(third, last, norm, padding=0),
        )
        self.head = nn.Linear(last, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        strongest = self.features(images).amax((2, 3))  # (b, last)
        return 0.2 * self.head(strongest)


def resnet18(num_classes: int, norm: Norm) -> nn.Module:
    """torchvision's, whose first layers do not shrink images that are small already."""
    from torchvision.models import resnet18 as build

    network: nn.Module = build(num_classes=num_classes, norm_layer=norm)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    return network
