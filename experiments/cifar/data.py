"""CIFAR-10 in groups: at random or each with a class mix of its own, some with flipped labels.

Images come from ``torchvision.datasets.CIFAR10``, or from a packed file of one of two shapes: uint8
``x_train`` (b, 32, 32, 3), ``y_train``, ``x_test`` and ``y_test``; or JPEG files one after another,
``bytes`` with ``offsets`` (b + 1,), ``labels`` and ``is_train``.

Shapes: images (b, 3, h, h) float32, each channel standardised; labels (b,).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from experiments.cifar.settings import Data
from experiments.trained import Grouped
from ksm_ext.checks import message

CLASSES = tuple(
    "airplane automobile bird cat deer dog frog horse ship truck".split()  # noqa: SIM905
)
MEANS, DEVIATIONS = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True, eq=False)
class Split:
    """Training or test images.

    Attributes:
        labels: (b,) int64.
        take: From rows to their images, (rows, 32, 32, 3) uint8.
    """

    labels: np.ndarray
    take: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Images(Grouped):
    """Images in groups, and what has been done to their labels.

    Attributes:
        flipped: (b,) bool. Training images whose labels are wrong on purpose.
        noisy: (n,) bool. Their groups.
    """

    flipped: Tensor
    noisy: Tensor


@lru_cache(maxsize=4)  # every training of a process starts from it
def grouped(data: Data) -> Images:
    """The images that the settings ask for.

    Raises:
        ValueError: If there is no CIFAR-10 at ``data.path``, or it has too few images.
    """
    train, test = read(data.path)
    random = np.random.default_rng(data.seed)
    groups = draw_groups(train.labels, data, random)  # (n, g)
    held = random.permutation(len(test.labels))[: data.num_held]
    if len(held) < data.num_held:
        raise _too_few(data, f"{data.num_held} test images", len(held))
    rows = groups.ravel()
    tasks = torch.arange(data.num_groups).repeat_interleave(data.group_size)
    labels, flipped, noisy = flip_labels(train.labels[rows], data, random)
    held_labels = torch.from_numpy(test.labels[held])
    target_names, targets = CLASSES, held_labels
    if data.targets == "random":
        target_names = tuple(f"held-out group {number}" for number in range(data.num_targets))
        targets = torch.arange(len(held)) % data.num_targets
    samples = pixels(train.take(rows), data.size), labels, tasks
    held_out = pixels(test.take(held), data.size), held_labels, targets
    task_names = tuple(f"group {number:02d}" for number in range(data.num_groups))
    names = task_names, target_names, len(CLASSES)
    return Images(*samples, *held_out, *names, flipped, noisy)


def draw_groups(labels: np.ndarray, data: Data, random: np.random.Generator) -> np.ndarray:
    """Rows (n, g) of disjoint groups.

    With a concentration, each group's shares of classes are drawn first, then the class of one
    image after another, as far as images of it are left.
    """
    wanted = data.num_groups * data.group_size
    if wanted > len(labels):
        raise _too_few(data, f"{wanted} training images", len(labels))
    order = random.permutation(len(labels))
    if data.concentration is None:
        return order[:wanted].reshape(data.num_groups, data.group_size)
    pools = [order[labels[order] == label].tolist() for label in range(len(CLASSES))]
    rows = []
    for _ in range(data.num_groups):
        shares = random.dirichlet(np.full(len(CLASSES), data.concentration))
        for _ in range(data.group_size):
            left = np.where([bool(pool) for pool in pools], shares + 1e-12, 0)
            rows.append(pools[random.choice(len(pools), p=left / left.sum())].pop())
    return np.array(rows).reshape(data.num_groups, data.group_size)


def flip_labels(
    labels: np.ndarray, data: Data, random: np.random.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels of the groups' images with some made wrong, which images (b,), and groups (n,)."""
    labels, flipped = labels.copy(), np.zeros(len(labels), dtype=bool)
    noisy = np.zeros(data.num_groups, dtype=bool)
    noisy[random.choice(data.num_groups, data.num_noisy, replace=False)] = True
    count = round(data.noise * data.group_size)
    for group in noisy.nonzero()[0]:
        rows = random.choice(data.group_size, count, replace=False) + group * data.group_size
        labels[rows] = (labels[rows] + random.integers(1, len(CLASSES), count)) % len(CLASSES)
        flipped[rows] = True
    return tuple(map(torch.from_numpy, (labels, flipped, noisy)))  # type: ignore[return-value]


def pixels(images: np.ndarray, size: int) -> Tensor:
    """(b, 3, size, size): standardised, and averaged over squares."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    x = avg_pool2d(x, images.shape[1] // size)
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEANS, DEVIATIONS))
    return (x - mean) / deviation


# -- where images come from ---------------------------------------------------------------------


def read(path: str) -> tuple[Split, Split]:
    """Training and test images in a folder of torchvision's, or in a packed file."""
    if Path(path).suffix == ".npz":
        return _packed(Path(path))
    try:
        from torchvision.datasets import CIFAR10

        parts = [CIFAR10(path, train=train, download=True) for train in (True, False)]
    except ImportError as error:
        remedy = "Install torchvision, or pass a packed file with `--data FILE.npz`."
        raise _unreadable(f"the folder {path!r} and no torchvision", remedy) from error
    except (OSError, RuntimeError) as error:
        found = f"the folder {path!r} without it, and no download ({error})"
        raise _unreadable(found, "Pass a packed file with `--data FILE.npz`.") from error
    train, test = (Split(np.array(part.targets), part.data.__getitem__) for part in parts)
    return train, test


def _packed(path: Path) -> tuple[Split, Split]:
    if not path.exists():
        raise _unreadable(f"{str(path)!r}, which does not exist", "Correct `--data`.")
    with np.load(path) as file:
        content = dict(file)
    if "bytes" in content:
        return _jpeg(content, content["is_train"]), _jpeg(content, ~content["is_train"])
    try:
        train, test = (
            Split(content[f"y_{part}"].astype(np.int64), content[f"x_{part}"].__getitem__)
            for part in ("train", "test")
        )
    except KeyError as error:
        raise _unreadable(f"{str(path)!r} without {error}", "Pack it so.") from error
    return train, test


def _jpeg(content: dict[str, np.ndarray], chosen: np.ndarray) -> Split:
    """Images that are decoded when they are taken."""
    all_files = chosen.nonzero()[0]

    def take(rows: np.ndarray) -> np.ndarray:
        from PIL import Image

        files, images = all_files[rows], []
        for start, end in zip(
            content["offsets"][files], content["offsets"][files + 1], strict=True
        ):
            with Image.open(BytesIO(content["bytes"][start:end])) as image:
                images.append(np.array(image))
        return np.stack(images)

    return Split(content["labels"][chosen].astype(np.int64), take)


def _too_few(data: Data, expected: str, found: int) -> ValueError:
    remedy = "Ask for fewer, or pass a larger file with `--data`."
    found_where = f"{found} of them in {data.path!r}"
    return ValueError(message("data", f"CIFAR-10 with {expected}", found_where, remedy))


def _unreadable(found: str, remedy: str) -> ValueError:
    expected = "CIFAR-10 as torchvision keeps it or as a packed .npz file"
    return ValueError(message("data", expected, found, remedy))
