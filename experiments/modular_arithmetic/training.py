"""Training on a subset of the tasks, plain, by SAM or by NSO, with its checkpoints.

The seed alone gives the first weights, the order of the samples and the noise; a subset only takes
samples out of the batches. So two subsets with one seed differ by nothing but their samples, and
the effect of a task is not drowned in that of the order.

Sharpness-aware minimisation: *Foret et al. 2021, arXiv:2010.01412*; noise stability optimisation:
*Zhang, Li & Ju 2024, arXiv:2306.08553*, with its two-sided noise. Both perturb every weight.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments.modular_arithmetic.data import Arithmetic
from experiments.modular_arithmetic.model import Transformer
from experiments.modular_arithmetic.settings import Model, Training


def initial_model(data: Arithmetic, settings: Model, seed: int) -> nn.Module:
    """A network at its random start; the global random state is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(
            data.vocabulary,
            data.tokens.shape[1],
            width=settings.width,
            num_layers=settings.num_layers,
            num_heads=settings.num_heads,
            activation=settings.activation,
        )


def train(
    data: Arithmetic, model: Model, settings: Training, mask: Tensor, seed: int
) -> Iterator[nn.Module]:
    """Train on the tasks of ``mask`` (n,) bool, and yield the network at each checkpoint.

    It is one network, that trains on when it is taken back.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = initial_model(data, model, seed).to(device)
    tokens, labels = data.tokens.to(device), data.labels.to(device)
    kept = mask[data.cells]  # (b,)
    generator = torch.Generator().manual_seed(seed)
    optimizer = _optimizer(network, settings)
    warm = max(settings.num_warmup, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / warm))
    stops = [max(1, round(share * settings.num_steps)) for share in settings.checkpoints]
    batches = _batches(len(kept), settings.batch_size, generator)
    for step in range(1, max(stops) + 1):
        rows = next(batches)
        rows = rows[kept[rows]].to(device)
        if len(rows):

            def loss(rows: Tensor = rows) -> Tensor:
                return cross_entropy(network(tokens[rows]), labels[rows])

            with torch.enable_grad():
                gradient_step(optimizer, loss, settings, generator)
            schedule.step()
        for _ in range(stops.count(step)):
            yield network


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


def _optimizer(network: nn.Module, settings: Training) -> torch.optim.Optimizer:
    weights = network.parameters()
    rate, decay = settings.learning_rate, settings.weight_decay
    if settings.optimizer == "sgd":
        return torch.optim.SGD(weights, lr=rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)


@torch.no_grad()
def target_losses(network: nn.Module, data: Arithmetic) -> Tensor:
    """(n,) float64: the mean loss on the held-out samples of each cell."""
    device = next(network.parameters()).device
    losses = cross_entropy(
        network(data.held_tokens.to(device)), data.held_labels.to(device), reduction="none"
    )
    sums = torch.zeros(len(data.names), dtype=torch.float64)
    sums.index_add_(0, data.held_cells, losses.double().cpu())
    return sums / data.held_cells.bincount(minlength=len(sums))


@torch.no_grad()
def accuracy(network: nn.Module, data: Arithmetic) -> tuple[float, float]:
    """Share of right answers on the training and on the held-out samples."""
    device = next(network.parameters()).device
    pairs = (data.tokens, data.labels), (data.held_tokens, data.held_labels)
    shares = [float((network(x.to(device)).argmax(1).cpu() == y).double().mean()) for x, y in pairs]
    return shares[0], shares[1]
