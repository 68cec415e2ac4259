"""Losses of language models by the mixture of domains they were trained on (RegMix, 1M models).

512 mixtures of 17 domains and 13 losses to fit, or a random part of them; 256 others held out.
Spearman correlation is the mean over losses; ``nse`` is squared error over variance, pooled.
"""

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from scipy.stats import spearmanr

from benchmarks.comparisons.common import (
    Record,
    attempted,
    mean,
    missing,
    number,
    progress,
    select,
    values_of,
)
from benchmarks.comparisons.ours import fit_ours
from experiments.common import markdown
from experiments.studies.mixtures import COLUMNS, Fit
from experiments.studies.reference_tables import regmix

ROWS = (48, 128, 512)


PEERS = {
    "LightGBM": "lightgbm",
    "XGBoost": "xgboost",
    "XGBoost, tuned": "xgboost",
    "mixing law": "scipy",
}
"""Columns of ``experiments.studies.mixtures``, and the package that each needs."""


def absent() -> list[str]:
    """What is not installed."""
    return missing(dict.fromkeys(PEERS.values()))


# -- measure --------------------------------------------------------------------------------------


def judged(predicted: np.ndarray, truth: np.ndarray) -> Record:
    """Mean Spearman correlation, and the pooled squared error over variance."""
    ranks = [spearmanr(*pair).statistic for pair in zip(predicted.T, truth.T, strict=True)]
    error = np.sum((predicted - truth) ** 2) / np.sum((truth - truth.mean(0)) ** 2)
    return {"spearman": float(np.nanmean(ranks)), "nse": float(error)}


def measure(options: Namespace, ours: bool) -> Iterator[Record]:
    """Records of all methods, for each number of rows and draw of them."""
    (split,) = regmix(options.data, 1)
    if ours:  # anova2 is of 0/1 masks
        fits = {spec: _ours(spec) for spec in options.kernels if not spec.startswith("anova2")}
    else:
        fits = {name: COLUMNS[name] for name, package in PEERS.items() if not missing([package])}
    rows = [count for count in ROWS if count <= len(split.masks)]
    draws = [
        (count, seed)
        for count in rows
        for seed in range(1 if count == len(split.masks) else options.seeds)
    ]
    for count, seed in progress("mixtures", draws):
        chosen = np.random.default_rng(seed).permutation(len(split.masks))[:count]
        table = split.masks[chosen], split.scores[chosen]
        for name, fit in fits.items():
            start = time.process_time()
            task = partial(_held_out, fit, table, split.held_masks, split.held_scores)
            numbers = task() if ours else attempted(task)
            spent = {"seconds": time.process_time() - start}
            yield {"method": name, "rows": count, "seed": seed, **numbers, **spent}


def _ours(spec: str) -> Fit:
    return lambda x, y, query: fit_ours(spec, x, y).predict(query)


def _held_out(
    fit: Fit, table: tuple[np.ndarray, np.ndarray], query: np.ndarray, truth: np.ndarray
) -> Record:
    return judged(np.asarray(fit(*table, query), dtype=float), truth)


def tables(records: Sequence[Record], reference: str) -> Iterator[tuple[str, str]]:
    """A title and the table."""
    rows = []
    counts = values_of(records, "rows")
    for method in values_of(records, "method"):
        chosen = [select(records, method=method, rows=count) for count in counts]
        cells = [f"{number(mean(c, 'spearman'))}/{number(mean(c, 'nse'))}" for c in chosen]
        rows.append([method, *cells, number(mean(chosen[-1], "seconds"), 1)])
    titles = ["Spearman/nse", *(f"{count} rows" for count in counts), "seconds of the last"]
    yield "Held-out mixtures", markdown(titles, rows)
