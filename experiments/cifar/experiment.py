"""CIFAR-10 by a residual network: tasks are groups of training images."""

import hashlib
import json
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments import comparison
from experiments.cifar.attribution import (
    by_conjugate_gradients,
    by_lissa,
    trak_by_sample,
    trak_ranks,
)
from experiments.cifar.data import Images, grouped
from experiments.cifar.mislabelled import as_text, find
from experiments.cifar.model import NORMS, ResNet9, resnet18
from experiments.cifar.settings import PRESETS, CifarSettings, Data
from experiments.common import one_thread, read_tensors, write_json, write_tensors
from experiments.experiment import Command, Run
from experiments.methods import FEW, METHODS, RETRAINED, Method, over_models
from experiments.runner import Program
from experiments.settings import as_dict
from experiments.trained import TrainedExperiment
from ksm_ext.atomic_write import write_whole


class Cifar(TrainedExperiment):
    """Which groups of images help with which held-out images."""

    settings: CifarSettings

    def data(self) -> Images:
        return grouped(self.settings.data)

    def network(self) -> nn.Module:
        model = self.settings.model
        norm, num_classes = NORMS[model.norm], self.data().num_classes
        if model.name == "resnet18":
            network = resnet18(num_classes, norm)
        else:
            network = ResNet9(num_classes, model.widths, norm)
        return network.to(memory_format=self._format())

    def augmented(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """Half of the images mirrored."""
        mirrored = torch.rand(len(inputs), generator=generator) < 0.5
        mirrored = mirrored.to(inputs.device)[:, None, None, None]
        images = torch.where(mirrored, inputs.flip(3), inputs)
        return images.contiguous(memory_format=self._format())

    def depends_on(self, variant: str) -> dict[str, Any]:
        """The images themselves in place of the path to them."""
        parts = super().depends_on(variant)
        return parts | {"data": replace(parts["data"], path=fingerprint(parts["data"]))}

    def _format(self) -> torch.memory_format:
        last = self.settings.model.channels_last
        return torch.channels_last if last else torch.contiguous_format


@lru_cache(maxsize=4)
def fingerprint(data: Data) -> str:
    images = grouped(data)
    digest = hashlib.sha256()
    for tensor in (images.inputs, images.held_inputs):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


# -- the commands -------------------------------------------------------------------------------

OWN: dict[str, Method] = {
    "influence, CG on GGN": partial(over_models, by_conjugate_gradients),
    "influence, mini-batch LiSSA": by_lissa,
}
NAMES = (
    *RETRAINED,
    "kernel surrogate, estimated",
    *FEW,
    "influence, EK-FAC",  # the longest first: they run side by side
    "influence, CG on GGN",
    "influence, mini-batch LiSSA",
    "influence, projected",
    "TRAK",
    "TracIn",
    "gradient cosine",
)
CIFAR_METHODS = {name: (METHODS | OWN)[name] for name in NAMES}
SHARED = comparison.commands(CIFAR_METHODS)


def trak_of_images(run: Run) -> Tensor:
    """TRAK of single images (b, t) in its own units, kept in ``samples-trak.safetensors``."""
    path, settings = run.output / "samples-trak.safetensors", as_dict(run.settings)
    if kept := read_tensors(path, settings):
        return kept[0]["values"]
    with one_thread():
        values = trak_by_sample(comparison.problem_of(run)).float()
    write_tensors(path, {"values": values}, settings)
    return values.cpu()


def trak(run: Run) -> None:
    """TRAK of groups, and of each image in TRAK's own units."""
    SHARED["trak"](run)
    trak_of_images(run)


def eval_trak(run: Run) -> None:
    """Rank correlation of a subset's mean TRAK score with its true loss: -1 is best."""
    data, problem = run.experiment.data(), comparison.problem_of(run)
    ranks = trak_ranks(trak_of_images(run), data.tasks, problem.masks, problem.scores).tolist()
    found = dict(zip(data.target_names, ranks, strict=True))
    for name, rank in (found | {"mean": sum(ranks) / len(ranks)}).items():
        print(f"{name}: {rank:+.2f}")
    write_json(run.output / "eval_trak.json", found)


def find_mislabelled(run: Run) -> None:
    """Groups with flipped labels, by every method that trains on all of them only."""
    print(as_text(find(run, METHODS | OWN)))


def figures(run: Run) -> None:
    SHARED["figures"](run)
    path, table = run.output / "mislabelled.json", run.output / "table.md"
    if path.exists():
        areas = as_text(json.loads(path.read_text()))
        write_whole(table, f"{table.read_text()}\n{areas}\n".encode())
        print(areas)


COMMANDS: dict[str, Command] = {
    "train": SHARED["train-all"],
    **{
        name: SHARED[name] for name in ("train-subsets", "leave-one-out", "datamodels", "influence")
    },
    "trak": trak,
    "eval-trak": eval_trak,
    "kernel-surrogate": SHARED["kernel-surrogate"],
    "mislabelled": find_mislabelled,
    "figures": figures,
}
PROGRAM = Program(
    "cifar",
    "CIFAR-10: every method against the truth.",
    Cifar,
    PRESETS,
    COMMANDS,
    {"data": "data.path"},
)
