"""CIFAR-10 by a residual network: tasks are groups of training images."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from experiments.cifar.attribution import by_conjugate_gradients, by_lissa
from experiments.cifar.data import Images, grouped
from experiments.cifar.model import NORMS, ResNet9, resnet18
from experiments.cifar.settings import PRESETS, CifarSettings, Data
from experiments.experiment import Experiment
from experiments.methods import Method, additive, over_models


class Cifar(Experiment):
    """Which groups of images help with which held-out images."""

    presets = PRESETS
    methods = (
        "least squares",
        "ridge datamodel",
        "lasso datamodel",
        "kernel surrogate",
        "surrogate of its own choice",
        "kernel surrogate, estimated",
        "kernel surrogate, calibrated",
        "influence, EK-FAC",  # the longest first: they run side by side
        "influence, CG on GGN",
        "influence, mini-batch LiSSA",
        "influence, projected",
        "TRAK",
        "TracIn",
        "gradient cosine",
    )
    own_methods: ClassVar[Mapping[str, Method]] = {
        "influence, CG on GGN": partial(additive, partial(over_models, by_conjugate_gradients)),
        "influence, mini-batch LiSSA": by_lissa,
    }
    settings: CifarSettings

    def data(self) -> Images:
        """The images in their groups."""
        return grouped(self.settings.data)

    def network(self) -> nn.Module:
        """A residual network at its random start."""
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
    """Of all images."""
    images = grouped(data)
    digest = hashlib.sha256()
    for tensor in (images.inputs, images.held_inputs):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
