"""Losses of language models by the mixture of domains they were trained on (RegMix, 1M models).

512 mixtures of 17 domains and 13 losses to fit, or a random part of them; 256 others held out.
Spearman correlation is the mean over losses; ``nse`` is squared error over variance, pooled.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from scipy.optimize import least_squares
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
from benchmarks.comparisons.learners import Predict, standardised
from benchmarks.comparisons.ours import fit_ours
from experiments.common import markdown
from experiments.studies.reference_tables import regmix

ROWS = (48, 128, 512)


# -- peers: (m, n) shares and standardised (m,) scores in, a function of shares out ---------------


def lightgbm(shares: np.ndarray, scores: np.ndarray) -> Predict:
    """RegMix's settings, but without stopping by the scores that are held out."""
    from lightgbm import LGBMRegressor

    model = LGBMRegressor(n_estimators=1000, learning_rate=0.01, n_jobs=1, seed=42, verbose=-1)
    fitted = model.fit(shares, scores)
    return lambda query: fitted.booster_.predict(query)


def xgboost(shares: np.ndarray, scores: np.ndarray) -> Predict:
    from xgboost import XGBRegressor

    model = XGBRegressor(n_estimators=1000, learning_rate=0.03, max_depth=3, n_jobs=1)
    return model.fit(shares, scores).predict


def mixing_law(shares: np.ndarray, scores: np.ndarray) -> Predict:
    """``c + exp(k + t r)`` of shares r (Ye et al. 2024, arXiv:2403.16952), by least squares.

    From starts at several floors c; the best of them.
    """

    def residuals(p: np.ndarray) -> np.ndarray:
        return p[0] + np.exp(np.clip(p[1] + shares @ p[2:], -30, 30)) - scores

    fits = []
    for floor in (0.1, 0.5, 2.0):
        c = scores.min() - floor
        design = np.column_stack([np.ones(len(scores)), shares])
        start = np.linalg.lstsq(design, np.log(scores - c), rcond=1e-3)[0]
        fits.append(least_squares(residuals, [c, *start], max_nfev=200))
    best = min(fits, key=lambda fit: fit.cost).x
    return lambda query: best[0] + np.exp(best[1] + query @ best[2:])


PEERS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], Predict]]] = {
    "LightGBM": ("lightgbm", lightgbm),
    "XGBoost": ("xgboost", xgboost),
    "mixing law": ("scipy", mixing_law),
}
"""By name: the package it needs, and how it is fitted to one loss."""


def absent() -> list[str]:
    """What is not installed."""
    return missing(package for package, _ in PEERS.values())


# -- measure --------------------------------------------------------------------------------------


def judged(predicted: np.ndarray, truth: np.ndarray) -> Record:
    """Mean Spearman correlation, and the pooled squared error over variance."""
    ranks = [spearmanr(*pair).statistic for pair in zip(predicted.T, truth.T, strict=True)]
    error = np.sum((predicted - truth) ** 2) / np.sum((truth - truth.mean(0)) ** 2)
    return {"spearman": float(np.nanmean(ranks)), "nse": float(error)}


def measure(options: Namespace, ours: bool) -> Iterator[Record]:
    """Records of all methods, for each number of rows and draw of them."""
    (split,) = regmix(options.data, 1)
    fits: dict[str, Callable[[np.ndarray, np.ndarray], Predict]] = {}
    if ours:
        for spec in options.kernels:
            if not spec.startswith("anova2"):  # of 0/1 masks
                fits[spec] = lambda *table, spec=spec: fit_ours(spec, *table).predict
    else:
        found = [name for name, (package, _) in PEERS.items() if not missing([package])]
        fits = {name: partial(_each_loss, PEERS[name][1]) for name in found}
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


def _each_loss(
    fit: Callable[[np.ndarray, np.ndarray], Predict], shares: np.ndarray, scores: np.ndarray
) -> Predict:
    """A model for each column of scores."""
    models = [standardised(fit, shares, column) for column in scores.T]
    return lambda query: np.stack([model(query) for model in models], 1)


def _held_out(
    fit: Callable[[np.ndarray, np.ndarray], Predict],
    table: tuple[np.ndarray, np.ndarray],
    query: np.ndarray,
    truth: np.ndarray,
) -> Record:
    return judged(np.asarray(fit(*table)(query), dtype=float), truth)


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
