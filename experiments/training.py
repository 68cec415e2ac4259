"""Training on a subset of the samples, plain, by SAM or by NSO, with its checkpoints.

The seed alone gives the first weights, the order of the samples, what augments them and the noise;
a subset only takes samples out of the batches. So two subsets with one seed differ by nothing but
their samples, and the effect of a task is not drowned in that of the order.

Sharpness-aware minimisation: *Foret et al. 2021, arXiv:2010.01412*; noise stability optimisation:
*Zhang, Li & Ju 2024, arXiv:2306.08553*, with its two-sided noise. Both perturb every weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.settings import Training

Augment = Callable[[Tensor, torch.Generator], Tensor]


def train(
    network: nn.Module,
    inputs: Tensor,
    labels: Tensor,
    kept: Tensor,
    settings: Training,
    generator: torch.Generator,
    augment: Augment = lambda inputs, generator: inputs,
) -> Iterator[nn.Module]:
    """Train a network on the samples ``kept`` (b,) bool, and yield it at each checkpoint.

    It is one network, that trains on when it is taken back.

    Args:
        network: The network at its start.
        inputs: (b, ...) of all samples.
        labels: (b,) int64.
        kept: (b,) bool.
        settings: How to train.
        generator: Draws the order of samples, what ``augment`` asks for, and the noise.
        augment: What a step sees of a whole batch, those samples included that are left out.
    """
    device = _device()
    inputs, labels = inputs.to(device), labels.to(device)
    batches = _batches(len(kept), settings.batch_size, generator)

    def batch() -> tuple[Tensor, Tensor]:
        rows = next(batches)
        seen = augment(inputs[rows.to(device)], generator)[kept[rows].to(device)]
        return seen, labels[rows[kept[rows]].to(device)]

    return train_on(network, batch, settings, generator)


def train_on(
    network: nn.Module,
    batch: Callable[[], tuple[Tensor, Tensor]],
    settings: Training,
    generator: torch.Generator,
) -> Iterator[nn.Module]:
    """Train on what ``batch`` gives for each step, and yield the network at each checkpoint.

    Args:
        network: The network at its start.
        batch: Gives inputs (b, ...) and labels (b,) or, one for each place of a sequence, (b, l);
            a step without samples is left out.
        settings: How to train.
        generator: Draws the noise of a perturbation.
    """
    device = _device()
    mixed = torch.autocast(
        device.type, torch.bfloat16, enabled=settings.autocast and device.type == "cuda"
    )
    network = network.to(device).train()
    optimizer, stops = optimizer_of(network, settings), settings.stops()
    for step in range(max(stops)):
        seen, wanted = (part.to(device) for part in batch())
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        if len(seen):

            def loss(seen: Tensor = seen, wanted: Tensor = wanted) -> Tensor:
                with mixed:
                    logits = network(seen)
                return cross_entropy(logits.float().flatten(0, -2), wanted.flatten())

            with torch.enable_grad():
                gradient_step(optimizer, loss, settings, generator)
        for _ in range(stops.count(step + 1)):
            yield network


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def gradient_step(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    settings: Training,
    generator: torch.Generator,
) -> None:
    """One step of ``optimizer`` along the gradient that the perturbation asks for."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    optimizer.zero_grad()
    if settings.perturbation == "none":
        loss().backward()
    elif settings.perturbation == "sam":
        gradients = torch.autograd.grad(loss(), weights)
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        scale = settings.radius / norm.clamp(min=1e-12)
        with _moved(weights, [scale * gradient for gradient in gradients]):
            loss().backward()
    else:
        noise = [
            settings.radius * torch.randn(weight.shape, generator=generator).to(weight)
            for weight in weights
        ]
        for sign in (1, -1):
            with _moved(weights, [sign * step for step in noise]):
                (loss() / 2).backward()
    optimizer.step()


@contextmanager
def _moved(weights: list[Tensor], steps: list[Tensor]) -> Iterator[None]:
    """The weights elsewhere, and then where they were, to the bit."""
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        torch._foreach_add_(weights, steps)
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)


def _batches(num_samples: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Samples in a new order each epoch, without end."""
    while True:
        yield from torch.randperm(num_samples, generator=generator).split(size)


def optimizer_of(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
    weights = network.parameters()
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
