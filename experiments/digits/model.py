"""A network of one hidden layer.

Shapes: images (b, 64), labels (b,), logits (b, 10).
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.digits.settings import Model


def train(images: Tensor, labels: Tensor, settings: Model, generator: torch.Generator) -> nn.Module:
    """A network trained by Adam from a random start."""
    model = nn.Sequential(
        nn.utils.skip_init(nn.Linear, images.shape[1], settings.num_hidden),
        nn.ReLU(),
        nn.utils.skip_init(nn.Linear, settings.num_hidden, 10),
    )
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5, generator=generator)
        else:
            nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate, fused=True)
    for _ in range(settings.num_epochs):
        for batch in torch.randperm(len(images), generator=generator).split(settings.batch_size):
            optimizer.zero_grad()
            cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    return model
