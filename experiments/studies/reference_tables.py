"""Surrogates on public tables of real retrained scores: how well held-out subsets are predicted.

    python -m experiments.studies.reference_tables DATA [--seeds 5] [--only games,regmix]

Prints, per table, the mean Spearman correlation over targets (linear datamodeling score) and the
pooled squared error over variance, for six columns fitted on the same subsets:

* ``least squares``: minimum norm, no intercept, the literature's linear surrogate;
* ``ridge``: linear with intercept, ridge by leave-one-out, the honest linear baseline;
* ``published``: RBF with gamma = 1/n, fixed ridge, no intercept, as the paper's code has it;
* ``rbf``: RBF with gamma and ridge by leave-one-out;
* ``auto``: ``ksm_ext.fit_surrogate`` with its defaults (``criterion="error"``);
* ``auto, rank``: the same with ``criterion="rank"``.

DATA holds the folders ``games`` (shapiq's precomputed set functions, MIT), ``regmix``
(sail-sg/regmix, MIT) and ``kernel_surrogate_models`` (VirtuosoResearch/Kernel-surrogate-models,
MIT).
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

import ksm_ext
from experiments.common import markdown
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.tables.scores import read_scores


class Split(NamedTuple):
    """Subsets to fit and to hold out."""

    table: str
    masks: np.ndarray
    scores: np.ndarray
    held_masks: np.ndarray
    held_scores: np.ndarray
    published_ridge: float = 0.01


FAMILIES = ("DataValuation", "DatasetValuation", "FeatureSelection", "ImageClassifier", "Sentiment")


def games(data: Path, seeds: int) -> Iterator[Split]:
    """300 random subsets of each complete set function (without the empty set), 5-fold."""
    for path in sorted((data / "games").glob("*.npz")):
        family = next((name for name in FAMILIES if name in path.name.split("__")[0]), None)
        if family is None:
            continue
        with np.load(path) as file:
            masks, values = file["coalitions"].astype(bool), file["values"].astype(float)
        masks, values = masks[masks.any(1)], values[masks.any(1)]
        for seed in range(seeds):
            generator = np.random.default_rng(seed)
            chosen = generator.permutation(len(masks))[:300]
            for fold in range(5):
                held = np.arange(len(chosen)) % 5 == fold
                pairs = [
                    (masks[rows], values[rows, None]) for rows in (chosen[~held], chosen[held])
                ]
                yield Split(f"games {family}", *pairs[0], *pairs[1])


def regmix(data: Path, seeds: int) -> Iterator[Split]:
    """512 mixtures of 17 domains to fit, 256 to predict: the published split."""
    folder, tables = data / "regmix", []
    for part in ("train", "test"):
        losses, mixtures = (f"{part}_{what}_1m.csv" for what in ("pile_loss", "mixture"))
        table = read_scores(folder / losses, folder / mixtures, weights=True)
        tables += [table.masks.numpy(), table.scores.numpy()]
    yield Split("regmix 1M", *tables)


def coin_flip(data: Path, seeds: int) -> Iterator[Split]:
    """80 prompts to fit, 120 held out; targets that vary by at least 0.1 among the held out."""
    folder = data / "kernel_surrogate_models"
    losses, prompts = "coin_flip_subset_scores_loss.json", "coin_flip_train_ids_list.json"
    table = read_scores(folder / losses, folder / prompts)
    masks, scores = table.masks.numpy(), table.scores.numpy()
    for seed in range(4 * seeds):
        order = np.random.default_rng(seed).permutation(len(masks))
        fit, held = order[:80], order[80:]
        kept = scores[held].var(0, ddof=1) >= 0.1
        parts = masks[fit], scores[fit][:, kept], masks[held], scores[held][:, kept]
        yield Split("coin_flip", *parts, published_ridge=0.1)


def modular(data: Path, seeds: int) -> Iterator[Split]:
    """40 subsets to fit, 10 held out: the shipped split, then 8 random ones per seed."""
    path = data / "kernel_surrogate_models" / "modular_addition.json"
    train, test = read_scores(path, part="train"), read_scores(path, part="test")
    masks = np.concatenate([train.masks, test.masks])
    scores = np.concatenate([train.scores, test.scores])
    shipped = (masks[:40], scores[:40], masks[40:], scores[40:])
    yield Split("modular, shipped split, 500 columns as published", *shipped)
    masks, _ = ksm_ext.subsets.merge_duplicate_tasks(masks)  # 500 columns that are 25 tasks
    yield Split("modular, shipped split", masks[:40], scores[:40], masks[40:], scores[40:])
    for seed in range(8 * seeds):
        order = np.random.default_rng(seed).permutation(len(masks))
        fit, held = order[:40], order[40:]
        yield Split("modular, random splits", masks[fit], scores[fit], masks[held], scores[held])


TABLES = {"games": games, "regmix": regmix, "coin_flip": coin_flip, "modular": modular}
COLUMNS = ("least squares", "ridge", "published", "rbf", "auto", "auto, rank")


def fit(column: str, split: Split) -> ksm_ext.Surrogate:
    gamma, ridge = 1 / split.masks.shape[1], split.published_ridge
    options: dict[str, dict[str, Any]] = {
        "least squares": {"kernel": "least_squares"},
        "ridge": {"kernel": "linear", "share_ridge": True},
        "published": {"kernel": ksm_ext.RBF(gamma=gamma), "ridge": ridge, "center": False},
        "rbf": {"kernel": "rbf", "share_ridge": True},
        "auto": {"criterion": "error"},
        "auto, rank": {"criterion": "rank"},
    }
    return ksm_ext.fit_surrogate(split.masks, split.scores, **options[column])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default=",".join(TABLES))
    options = parser.parse_args()
    results: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for name in options.only.split(","):
        for split in tqdm(TABLES[name](options.data, options.seeds), name, file=sys.stderr):
            for column in COLUMNS:
                predicted = fit(column, split).predict(split.held_masks)
                rank = lds(split.held_scores, predicted, constant="zero").mean()
                error = float(residual_error(split.held_scores, predicted, pooled=True))
                results[split.table][column].append((float(rank), error))
    rows = []
    for table, columns in results.items():
        means = [np.mean(values, 0) for values in columns.values()]
        cells = [f"{rank:.3f} ({error:.2f})" for rank, error in means]
        rows.append([table, str(len(columns["auto"])), *cells])
    print(markdown(["mean Spearman (pooled error)", "splits", *COLUMNS], rows))


if __name__ == "__main__":
    main()
