"""What a store of features spends to know what its features are of: the table of docs/scale.md.

    python -m experiments.studies.store_identity

For each problem: the seconds of the features without a store, and in percent of them the hashes of
code and parameters, one reading and hashing of all data, and the five samples that are computed
again when a store is opened.
"""

import argparse
import io
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ksm_ext import Projector, collect_features
from ksm_ext.identity import fingerprint, identify
from ksm_ext.network.batches import content_digests, ordered_loader
from ksm_ext.network.gradients import per_sample_gradients
from ksm_ext.network.outputs import log_odds


class Compressed(Dataset[tuple[Tensor, Tensor]]):
    """Images that are decompressed when they are read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.files, self.y = [self.file(image) for image in x], y

    def file(self, image: Tensor) -> bytes:
        file = io.BytesIO()
        np.savez_compressed(file, image=(image * 99).byte().numpy())
        return file.getvalue()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        with np.load(io.BytesIO(self.files[row])) as file:
            return torch.from_numpy(file["image"]).float(), self.y[row]


def problems(samples: int) -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    x, y = torch.rand(samples, 3, 32, 32), torch.randint(10, (samples,))
    perceptron = nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))
    convolutions: list[nn.Module] = []
    for inner, outer in ((3, 32), (32, 64), (64, 64)):
        convolutions += [nn.Conv2d(inner, outer, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(1024, 10))
    return {
        "perceptron, tensors": (perceptron, (x, y)),
        "convolutions, tensors": (network, (x, y)),
        "convolutions, compressed files": (network, Compressed(x, y)),
    }


def seconds(run: Any) -> float:
    """The least of three."""
    times = []
    for _ in range(3):
        start = perf_counter()
        run()
        times.append(perf_counter() - start)
    return min(times)


def row(model: nn.Module, data: Any, samples: int) -> str:
    loader, projector = ordered_loader(data, 64), Projector(512)
    whole = seconds(lambda: collect_features(model, data, log_odds, projector, progress=False))
    _, five = content_digests(loader, 64, range(samples), [0, 100, 200, 300, samples - 1])

    def code_and_parameters() -> None:
        identify(output=log_odds, projector=projector, network=model)
        fingerprint(model.named_parameters())

    def all_data() -> None:
        content_digests(loader, 64, range(samples))

    def five_samples() -> None:
        for sample in five.values():
            projector([*per_sample_gradients(model, log_odds, sample)[1].values()])

    parts = (code_and_parameters, all_data, five_samples)
    return " | ".join([f"{whole:.2f} s", *(f"{seconds(part) / whole:.1%}" for part in parts)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1024)
    samples = parser.parse_args().samples
    torch.set_num_threads(1)
    print("| problem | features | code and parameters | all data | five samples |")
    print("|---|---|---|---|---|")
    for name, (model, data) in problems(samples).items():
        print(f"| {name} | {row(model, data, samples)} |", flush=True)


if __name__ == "__main__":
    main()
