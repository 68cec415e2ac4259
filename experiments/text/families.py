"""Do families of languages come out? Effects of domains on each other, clustered and tested.

Effects (n, n): row i on the held-out text of domain j, in bits per byte; below 0 it helps.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.cluster.hierarchy import dendrogram, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from experiments.common import saved_figure

FAMILIES = {
    **dict.fromkeys(("en", "de", "nl", "sv", "da"), "Germanic"),
    **dict.fromkeys(("fr", "es", "it", "pt", "ro"), "Romance"),
    **dict.fromkeys(("pl", "cs"), "Slavic"),
}
NUM_PERMUTATIONS = 10_000


def relations(effects: Tensor) -> Tensor:
    """(n, n) symmetric: what two domains do to each other, less what each gives and gets in all.

    Of three domains or more, whose own effects do not count: least squares of what is beside the
    diagonal (*Warner, Kenny & Stoto 1979*, the social relations model).
    """
    n = len(effects)
    own = torch.eye(n, dtype=torch.bool)
    others = effects.masked_fill(own, 0.0)
    rows, columns, mean = others.sum(1), others.sum(0), others.sum() / (n * (n - 1))
    scale, shift = n * (n - 2), (n - 1) / (n - 2) * mean
    gives = ((n - 1) * rows + columns) / scale - shift
    gets = ((n - 1) * columns + rows) / scale - shift
    rest = effects - gives[:, None] - gets - mean
    return ((rest + rest.T) / 2).masked_fill(own, 0.0)


def family_test(effects: Tensor, names: Sequence[str]) -> dict[str, float] | None:
    """By how much more domains of one family help each other, and how likely by chance.

    The families are dealt out anew among the languages; ``None`` where fewer than two have two.
    """
    known = [i for i, name in enumerate(names) if name in FAMILIES]
    labels = np.array([FAMILIES[names[i]] for i in known])
    _, counts = np.unique(labels, return_counts=True)
    if len(counts) < 2 or (counts > 1).sum() < 2:
        return None
    table = relations(effects[known][:, known]).numpy()
    pairs = np.triu_indices(len(known), 1)

    def gap(labels: np.ndarray) -> float:
        same = (labels[:, None] == labels)[pairs]
        return float(table[pairs][same].mean() - table[pairs][~same].mean())

    random, found = np.random.default_rng(0), gap(labels)
    chance = [gap(random.permutation(labels)) for _ in range(NUM_PERMUTATIONS)]
    p = (1 + sum(value <= found for value in chance)) / (1 + NUM_PERMUTATIONS)
    return {"same family less others, bits per byte": found, "p": p}


def nearest(effects: Tensor, names: Sequence[str], count: int = 8) -> dict[str, float]:
    """The pairs of domains that do each other most good, and their relation, bits per byte."""
    table = relations(effects)
    first, second = torch.triu_indices(len(names), len(names), 1)
    pairs = [f"{names[i]} and {names[j]}" for i, j in zip(first, second, strict=True)]
    found = sorted(zip(table[first, second].tolist(), pairs, strict=True))
    return {pair: value for value, pair in found[:count]}


def of_different_domains(effects: Tensor, attributions: Tensor) -> float | None:
    """Correlation of effects and attributions over pairs of different domains."""
    return over_pairs(effects, attributions, ~torch.eye(len(effects), dtype=torch.bool))


def over_pairs(effects: Tensor, attributions: Tensor, pairs: Tensor) -> float | None:
    """Correlation over the ``pairs`` (n, n) bool; ``None`` where one of both is constant."""
    table = torch.stack([effects[pairs], attributions.to(effects)[pairs]])
    varies = bool((table.std(1) > 1e-12).all())
    return float(torch.corrcoef(table)[0, 1]) if varies else None


def draw(tables: dict[str, Tensor], names: Sequence[str], path: Path) -> list[str]:
    """Effects with the tree of their first table; answers the order of the domains in it."""
    related = relations(next(iter(tables.values()))).numpy()
    distances = related - related.min()
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform(distances, checks=False), "average")
    order = dendrogram(tree, no_plot=True)["leaves"]
    labels = [names[i] for i in order]
    with saved_figure(path, 1.8 + 4.4 * len(tables), 5.4) as figure:
        axes: Any = figure.subplots(1, 1 + len(tables), width_ratios=[1] + [3] * len(tables))
        dendrogram(
            tree,
            ax=axes[0],
            orientation="left",
            labels=list(names),
            color_threshold=0,
            above_threshold_color="#444444",
        )
        axes[0].set_xticks([])
        axes[0].invert_yaxis()
        for panel, (title, effects) in zip(axes[1:], tables.items(), strict=True):
            shown = effects[order][:, order].clone()
            limit = float(shown[~torch.eye(len(names), dtype=torch.bool)].abs().max())
            image = panel.imshow(shown.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            panel.set_xticks(range(len(names)), labels, rotation=90)
            panel.set_yticks(range(len(names)), labels)
            panel.set(title=title, xlabel="held-out text of", ylabel="training text of")
            figure.colorbar(image, ax=panel, shrink=0.6, label="bits per byte (blue: helps)")
    return labels
