"""scikit-learn's handwritten digits in groups, some of which have shuffled labels.

A task is a group of training images, as if labelled by one annotator; in the bad groups the labels
are permuted.

Shapes: images (n, g, 64) in n groups of g; labels (n, g).
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from experiments.digits.settings import Data


@dataclass(frozen=True, eq=False)
class Groups:
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
def grouped(data: Data, seed: int) -> Groups:
    """Split the 1,797 images that come with scikit-learn, and spoil some labels."""
    images, labels = load_digits(return_X_y=True)
    random = np.random.default_rng([seed, 0])
    order = random.permutation(len(images))
    x = torch.from_numpy(images[order] / 16).float()
    y = torch.from_numpy(labels[order]).long()
    n, g = data.num_tasks, data.group_size
    groups = y[: n * g].reshape(n, g).clone()
    bad = sorted(random.choice(n, data.num_bad, replace=False).tolist())
    for task in bad:
        groups[task] = groups[task][torch.from_numpy(random.permutation(g))]
    return Groups(x[: n * g].reshape(n, g, -1), groups, x[n * g :], y[n * g :], tuple(bad))
