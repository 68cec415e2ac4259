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
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

import ksm_ext
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
                fit, test = chosen[~held], chosen[held]
                table = f"games {family}"
                yield Split(table, masks[fit], values[fit, None], masks[test], values[test, None])


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
        yield Split(
            "coin_flip", masks[fit], scores[fit], masks[held], scores[held][:, kept], 0.1
        )._replace(scores=scores[fit][:, kept])


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
    """The surrogate of one column."""
    num_tasks = split.masks.shape[1]
    if column == "least squares":
        return ksm_ext.fit_surrogate(split.masks, split.scores, kernel="least_squares")
    if column == "published":
        kernel = ksm_ext.RBF(gamma=1 / num_tasks)
        return ksm_ext.fit_surrogate(
            split.masks, split.scores, kernel=kernel, ridge=split.published_ridge, center=False
        )
    if column in ("ridge", "rbf"):
        kernel_name = {"ridge": "linear", "rbf": "rbf"}[column]
        return ksm_ext.fit_surrogate(
            split.masks, split.scores, kernel=kernel_name, share_ridge=True
        )
    criterion = "rank" if column == "auto, rank" else "error"
    return ksm_ext.fit_surrogate(split.masks, split.scores, criterion=criterion)


def main() -> None:
    """Run all splits and print one line per table."""
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
    print(f"| mean Spearman (pooled error) | splits | {' | '.join(COLUMNS)} |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for table, columns in results.items():
        means = {column: np.mean(values, 0) for column, values in columns.items()}
        cells = [f"{rank:.3f} ({error:.2f})" for rank, error in means.values()]
        print(f"| {table} | {len(columns['auto'])} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
