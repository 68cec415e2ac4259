"""How well projected gradients rank samples as whole gradients do: a table of docs/scale.md.

    python -m experiments.studies.projection_fidelity

A small transformer is trained on bytes of Python's standard library. For each query, training
windows are ranked by the inner product of its gradient with theirs, and by TRAK's score with a
ridge of a hundredth of the mean squared norm; shown is Spearman's correlation with the ranks by
whole gradients, the mean over queries and seeds of the projection, and the least of the seeds.
The width exceeds √k, or matrices would be formed and both projections be one.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.text.model import ByteGPT
from ksm_ext import FactoredProjector, Projector, collect_features
from ksm_ext.correlation import spearman
from ksm_ext.network.outputs import log_odds

LENGTH, QUERIES, SEEDS = 64, 64, 3
KINDS = {"Projector": Projector, "FactoredProjector": FactoredProjector}


def text() -> Tensor:
    """(bytes,) int64: the modules in the order of their names."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(map(Path.read_bytes, files))), dtype=torch.uint8)


def windows(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Bytes (count, LENGTH), and the byte after each."""
    everything = text()
    starts = torch.randint(len(everything) - LENGTH - 1, (count, 1), generator=generator)
    found = everything[starts + torch.arange(LENGTH + 1)].long()
    return found[:, :-1], found[:, 1:]


def trained(width: int, steps: int, generator: torch.Generator) -> nn.Module:
    torch.manual_seed(0)
    model = ByteGPT(LENGTH, width=width, num_layers=3, num_heads=4, num_pairs=2048)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    x, y = windows(32 * max(steps, 1), generator)
    for rows in torch.arange(32 * steps).split(32):
        loss = nn.functional.cross_entropy(model(x[rows]).flatten(0, 1), y[rows].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    size = sum(weight.numel() for weight in model.parameters())
    print(f"{size:,} parameters, loss {float(loss.detach()):.2f}", flush=True)
    return model


def scores(gradients: Tensor) -> dict[str, Tensor]:
    """Scores (queries, b) of the first b rows for the others, whose gradients are the last."""
    gram = sum(
        (part.double() @ part.double().T for part in gradients.split(2**17, 1)), torch.zeros(())
    )
    own, others = gram[:-QUERIES, :-QUERIES], gram[-QUERIES:, :-QUERIES]
    ridge = own.diagonal().mean() / 100 * torch.eye(len(own)).to(own)
    return {"inner products": others, "TRAK": torch.linalg.solve(own + ridge, others.T).T}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--width", type=int, default=160)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dims", type=int, nargs="+", default=[1024, 4096, 16384])
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    model = trained(args.width, args.steps, generator)
    data = windows(args.samples + QUERIES, generator)
    exact = scores(collect_features(model, data, log_odds).gradients)
    print(f"| projection | {' | '.join(exact)} |\n|---|{'---|' * len(exact)}")
    for dim in args.dims:
        for name, kind in KINDS.items():
            found: dict[str, list[float]] = {readout: [] for readout in exact}
            for seed in range(SEEDS):
                features = collect_features(model, data, log_odds, kind(dim, seed=seed))
                for readout, projected in scores(features.gradients).items():
                    found[readout].append(float(spearman(projected, exact[readout]).mean()))
            cells = [f"{sum(values) / SEEDS:.3f} ({min(values):.3f})" for values in found.values()]
            print(f"| `{name}({dim})` | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
