"""1,000 subsets of a network of 10 million parameters: estimated, against retraining on 10 of them.

    python -m experiments.studies.estimate_large                 # on a GPU if there is one
    python -m experiments.studies.estimate_large --width 512 --samples 512 --subsets 50 --steps 500

The network, a residual perceptron, is trained on all tasks for some steps, which are timed.
Training it on a subset takes as many of the same steps as ``--steps`` says: that gives the time of
10 retrainings, and a hundred times as much that of 1,000. The estimate is everything that
GradientEstimator does: gradients of all samples and targets, projected, and all regressions.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ksm_ext import GradientEstimator, Projector
from ksm_ext.subsets import bernoulli

INPUTS, CLASSES, BATCH = 256, 10, 256


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def network(width: int, blocks: int = 2) -> nn.Module:
    inner = [Residual(width) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(INPUTS, width), *inner, nn.Linear(width, CLASSES))


def data(samples: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Labels are those of a random linear map, a fifth of them drawn anew."""
    x = torch.randn(samples, INPUTS, device=device)
    y = (x @ torch.randn(INPUTS, CLASSES, device=device)).argmax(1)
    noisy = torch.rand(samples, device=device) < 0.2
    return x, torch.where(noisy, torch.randint(CLASSES, (samples,), device=device), y)


def trained(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), device=x.device)
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def timed(run: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    wait = torch.cuda.synchronize if device.type == "cuda" else torch.cpu.synchronize
    wait(device)
    start = time.perf_counter()
    result = run()
    wait(device)
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=1088, help="1088: 10 million parameters")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--subsets", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=1024, help="k, the projected dimension")
    parser.add_argument("--steps", type=int, default=10_000, help="of one retraining")
    parser.add_argument("--timed-steps", type=int, default=50, help="that are really taken")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    model = network(arguments.width).to(device)
    x, y = data(arguments.samples, device)
    target = data(256, device)
    trained(model, x, y, 5)
    _, seconds = timed(lambda: trained(model, x, y, arguments.timed_steps), device)
    step = seconds / arguments.timed_steps
    masks = bernoulli(arguments.tasks, arguments.subsets, probability=0.5, seed=0)
    sizes = torch.linspace(0, len(x), arguments.tasks + 1).long().diff().tolist()
    tasks = list(zip(x.split(sizes), y.split(sizes), strict=True))

    def estimate() -> tuple[Tensor, float]:
        projector = Projector(arguments.dim)
        estimator = GradientEstimator(model, tasks, target, projector=projector, progress=False)
        _, of_features = timed(estimator.fit, device)
        return estimator.predict(masks), of_features

    (scores, of_features), end_to_end = timed(estimate, device)
    assert bool(torch.isfinite(torch.as_tensor(scores)).all())
    retraining = arguments.subsets * arguments.steps * step
    facts = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": sum(weight.numel() for weight in model.parameters()),
        **{name: getattr(arguments, name) for name in ("samples", "tasks", "subsets", "dim")},
        "steps of a retraining": arguments.steps,
        "seconds of a step": step,
        "seconds of 10 retrainings": 10 * arguments.steps * step,
        "seconds of all retrainings, scaled up": retraining,
        "seconds of the features": of_features,
        "seconds of the estimate, end to end": end_to_end,
        "times faster than retraining": retraining / end_to_end,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
