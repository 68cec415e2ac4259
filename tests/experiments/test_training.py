"""Steps of training and their rates."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from experiments.settings import Training
from experiments.training import gradient_step


def quadratic():
    """A bowl x^T A x / 2 over two parameters, whose gradients are known."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64, generator=generator)
    bowl = root @ root.T
    weight = nn.Parameter(torch.randn(3, dtype=torch.float64, generator=generator))
    return bowl, weight


def test_sam_steps_along_the_gradient_at_the_worst_neighbour():
    bowl, weight = quadratic()
    start = weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    settings = Training(perturbation="sam", radius=0.5)

    def loss():
        return weight @ bowl @ weight / 2

    gradient_step(optimizer, loss, settings, torch.Generator())
    slope = bowl @ start
    there = start + 0.5 * slope / slope.norm()
    torch.testing.assert_close(weight.detach(), start - 0.1 * bowl @ there)


def test_nso_noise_cancels_in_a_bowl_and_averages_elsewhere():
    bowl, weight = quadratic()
    start = weight.detach().clone()
    settings = Training(perturbation="nso", radius=0.5)

    def step(loss):
        return gradient_step(
            torch.optim.SGD([weight], lr=0.1), loss, settings, torch.Generator().manual_seed(3)
        )

    step(lambda: weight @ bowl @ weight / 2)
    torch.testing.assert_close(weight.detach(), start - 0.1 * bowl @ start)
    with torch.no_grad():
        weight.copy_(start)
    step(lambda: (weight**4).sum() / 4)  # (w + e)³ + (w - e)³ = 2 w³ + 6 w e²
    noise = 0.5 * torch.randn(3, generator=torch.Generator().manual_seed(3)).double()
    torch.testing.assert_close(weight.detach(), start - 0.1 * (start**3 + 3 * start * noise**2))


def test_rates_rise_and_fall():
    constant = Training(learning_rate=2.0, num_warmup=4, num_steps=10)
    assert [constant.rate(step) for step in (0, 3, 9)] == [0.5, 2.0, 2.0]
    triangular = replace(constant, decay="linear")
    assert [triangular.rate(step) for step in (0, 3, 4)] == [0.5, 2.0, 2.0]
    assert triangular.rate(9) == pytest.approx(2 / 6) and triangular.rate(10) == 0
