"""Data, model and score: scikit-learn's digits in groups, some of which have shuffled labels.

A task is a group of training images, as if labelled by one annotator; in the bad groups the labels
are permuted. F(S) is the test loss and test accuracy of a small network trained on the groups in S.

Shapes: images (n, g, 64) in n groups of g; labels (n, g); masks (n,) bool; t = 2 targets.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

TARGETS = ("test loss", "test accuracy")


@dataclass(frozen=True)
class Settings:
    """All that a score depends on.

    Attributes:
        seed: Draws the split, the bad groups, the subsets, and every initialisation.
        num_tasks: Groups of training images, n.
        num_bad: How many of them get shuffled labels.
        group_size: Images in a group.
        num_subsets: Subsets that are scored, m; an even number.
        num_repeats: Trainings whose scores are averaged for each subset.
        num_hidden: Width of the network.
        num_epochs: Passes over the training images.
        batch_size: Images in a step.
        learning_rate: Of Adam.
    """

    seed: int = 0
    num_tasks: int = 20
    num_bad: int = 3
    group_size: int = 25
    num_subsets: int = 120
    num_repeats: int = 2
    num_hidden: int = 64
    num_epochs: int = 20
    batch_size: int = 50
    learning_rate: float = 0.02


PRESETS = {
    "small": Settings(),
    "smoke": Settings(num_tasks=8, num_bad=2, group_size=60, num_subsets=24, num_epochs=6),
}


@dataclass(frozen=True, eq=False)
class Digits:
    """Training images in groups, test images, and which groups are bad.

    Attributes:
        images: (n, g, 64) float32 between 0 and 1.
        labels: (n, g) int64, permuted within bad groups.
        test_images: (b, 64) float32; everything that is in no group.
        test_labels: (b,) int64.
        bad: Ascending numbers of the groups with permuted labels.
    """

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    bad: tuple[int, ...]


@lru_cache(maxsize=1)  # every subset of a process starts from it
def load(settings: Settings) -> Digits:
    """Split the 1,797 images that come with scikit-learn, and spoil some labels."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng([settings.seed, 0])
    order = random.permutation(len(images))
    x = torch.from_numpy(images[order] / 16).float()
    y = torch.from_numpy(labels[order]).long()
    n, g = settings.num_tasks, settings.group_size
    groups = y[: n * g].reshape(n, g).clone()
    bad = sorted(random.choice(n, settings.num_bad, replace=False).tolist())
    for task in bad:
        groups[task] = groups[task][torch.from_numpy(random.permutation(g))]
    return Digits(x[: n * g].reshape(n, g, -1), groups, x[n * g :], y[n * g :], tuple(bad))


def train_and_score(settings: Settings, mask: Tensor, repeat: int) -> tuple[float, float]:
    """Train on the groups of ``mask``, and test.

    Args:
        settings: What to train.
        mask: (n,) bool. Which groups to train on.
        repeat: Number of the training; the result is a function of these three alone, whichever
            process computes it, and in whichever order.

    Returns:
        The targets of :data:`TARGETS`.
    """
    digits = load(settings)
    images, labels = digits.images[mask].flatten(0, 1), digits.labels[mask].flatten()
    subset = int("".join("1" if bit else "0" for bit in mask.tolist()), 2)
    entropy = np.random.SeedSequence([settings.seed, 1, repeat, subset])
    seed = int(entropy.generate_state(1, np.uint64)[0] >> 1)
    model = _train(images, labels, settings, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        logits = model(digits.test_images)
    accuracy = (logits.argmax(1) == digits.test_labels).double().mean()
    return float(cross_entropy(logits, digits.test_labels)), float(accuracy)


def _train(
    images: Tensor, labels: Tensor, settings: Settings, generator: torch.Generator
) -> nn.Module:
    """A network of one hidden layer, trained by Adam from a random start."""
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
