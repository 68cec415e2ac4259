"""Which domain of text helps which, and which mixture of domains is best.

A task is a domain; a target is the held-out text of one, and its score the loss in bits per byte
of a network trained on a mixture. A subset is a mixture too: of its domains in equal shares, and of
a base share of every one. All networks are trained on as many bytes.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from experiments import comparison
from experiments.common import write_json
from experiments.experiment import Command, Run
from experiments.runner import Program
from experiments.settings import Training
from experiments.text.data import Corpus, corpus
from experiments.text.drawing import shares_of, windows_of
from experiments.text.families import draw, family_test, nearest, of_different_domains
from experiments.text.fine_tuning import fine_tune
from experiments.text.methods import TEXT_METHODS
from experiments.text.mixtures import compare_mixtures, train_mixtures
from experiments.text.model import ByteGPT
from experiments.text.settings import PRESETS, TextSettings
from experiments.trained import TrainedExperiment
from experiments.training import train_on


class Text(TrainedExperiment):
    """Which domains help with the held-out text of which."""

    settings: TextSettings

    def data(self) -> Corpus:
        return corpus(self.settings.data)

    def network(self) -> nn.Module:
        return ByteGPT(self.settings.data.length, **asdict(self.settings.model))

    def special(self) -> tuple[Tensor, str]:
        return torch.eye(self.num_tasks, dtype=torch.bool), "a domain on itself"

    def shares(self, mask: Tensor) -> Tensor:
        """(n,) float64: the mixture that a subset is."""
        return shares_of(mask, self.settings.data.base_share)

    def train(self, variant: str, mask: Tensor, seed: int) -> Iterator[nn.Module]:
        """Train on the domains of ``mask``, and a little of the others."""
        return self.train_mixture(variant, self.shares(mask), seed)

    def train_mixture(self, variant: str, shares: Tensor, seed: int) -> Iterator[nn.Module]:
        """Train on a mixture with shares (n,), and yield the network at each checkpoint."""
        settings, generator = self.settings.variant(variant), torch.Generator().manual_seed(seed)
        return self.train_from(self.initial_model(seed), shares, settings, generator)

    def train_from(
        self, network: nn.Module, shares: Tensor, settings: Training, generator: torch.Generator
    ) -> Iterator[nn.Module]:
        """Train a network further on a mixture."""
        texts, length = self.data().texts, self.settings.data.length

        def batch() -> tuple[Tensor, Tensor]:
            drawn, _ = windows_of(texts, shares, settings.batch_size, length, generator)
            return drawn[:, :-1], drawn[:, 1:]

        return train_on(network, batch, settings, generator)

    def score(self, network: nn.Module) -> Tensor:
        """(t,) float64: bits per byte of each domain's held-out text."""
        data = self.data()
        losses, _ = judged(network, data.held_inputs, data.held_labels)
        sums = torch.zeros(self.num_tasks, dtype=torch.float64)
        sums.index_add_(0, data.held_targets, losses)
        return sums / data.held_targets.bincount(minlength=len(sums)) / log(2)

    def accuracy(self, network: nn.Module) -> tuple[float, float]:
        data = self.data()
        pairs = (data.inputs, data.labels), (data.held_inputs, data.held_labels)
        seen, held = (float(judged(network, *pair)[1].mean()) for pair in pairs)
        return seen, held

    def depends_on(self, variant: str) -> dict[str, Any]:
        """The text itself in place of the path to it."""
        parts = super().depends_on(variant)
        return parts | {"data": replace(parts["data"], path=self.data().fingerprint)}


@torch.no_grad()
def judged(network: nn.Module, inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean loss (b,) in nats and share (b,) of right bytes, of windows (b, l)."""
    device, found = next(network.parameters()).device, []
    was_training = network.training
    network.eval()
    for text, wanted in zip(inputs.split(128), labels.split(128), strict=True):
        logits = network(text.to(device)).float().cpu()
        losses = cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        right = logits.argmax(2) == wanted
        found.append(torch.stack([losses, right.float()]).double().mean(2))
    network.train(was_training)
    losses, right = torch.cat(found, 1)
    return losses, right


# -- the commands -------------------------------------------------------------------------------

SHARED = comparison.commands(TEXT_METHODS)
SHOWN = "kernel surrogate"


def figures(run: Run) -> None:
    """The table, the figures, and what domains do to each other."""
    SHARED["figures"](run)
    names = run.experiment.data().task_names
    answers = comparison.answer(run, TEXT_METHODS, TEXT_METHODS)
    loo = comparison.results_of(run).loo  # (seeds, n, n)
    tables = {
        "left out and trained again": loo.mean(0),
        f"{SHOWN} of the subsets": answers[SHOWN][0].attributions,
    }
    order = draw(tables, names, run.output / "domains.png")
    seeds = {f"seed {number}": effects for number, effects in enumerate(loo)}
    found = {
        "order": order,
        "families": {title: family_test(x, names) for title, x in (tables | seeds).items()},
        "nearest": nearest(loo.mean(0), names),
        "correlation over pairs of different domains": {
            name: of_different_domains(loo.mean(0), result.attributions)
            for name, (result, _) in answers.items()
        },
    }
    write_json(run.output / "domains.json", found)
    for title, part in found.items():
        print(f"\n{title}\n")
        for row in part.items() if isinstance(part, dict) else part:
            print(*row if isinstance(row, tuple) else (row,), sep=": ")


COMMANDS: dict[str, Command] = {
    **{name: SHARED[name] for name in ("train-all", "leave-one-out", "train-subsets")},
    **{name: SHARED[name] for name in ("datamodels", "influence", "trak", "kernel-surrogate")},
    "train-mixtures": train_mixtures,
    "mixtures": compare_mixtures,
    "fine-tune": fine_tune,
    "figures": figures,
}
PROGRAM = Program(
    "text",
    "Which domain of text helps which, and which mixture is best.",
    Text,
    PRESETS,
    COMMANDS,
    {"data": "data.path"},
)
