"""Surrogates of data mixtures beside trees and the data-mixing law, at three numbers of rows.

    python -m experiments.studies.mixtures DATA [--draws 8]

Prints, for 48, 128 and 512 of RegMix's mixtures of 17 domains, the mean Spearman correlation over
13 losses on 256 held-out mixtures, and in brackets the mean squared error over the variance. Few
rows are random draws of the 512; the mean over draws. Columns:

* ``auto``: ``ksm_ext.fit_surrogate`` with its defaults;
* ``exponential``: the same without warped shares;
* ``law + auto``: ``auto`` on the residuals of the mixing law;
* ``auto and LightGBM``: the mean of both;
* ``mixing law``: ``c + exp(t . x)``, arXiv:2403.16952, by least squares from six starts;
* ``LightGBM``: RegMix's settings, 1,000 trees at 0.01; ``XGBoost`` with its defaults, and
  ``XGBoost, tuned``: 1,000 trees of depth 4 at 0.02 of 80 % of rows and columns.

LightGBM and XGBoost have to be installed. DATA holds ``regmix`` (sail-sg/regmix, MIT).
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import least_squares
from tqdm import tqdm

import ksm_ext
from experiments.common import markdown
from experiments.studies.reference_tables import regmix
from ksm_ext.evaluation import lds, residual_error

Fit = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""Predictions (l, t) of mixtures (l, n), from fitted ones (m, n) and their scores (m, t)."""


def surrogate(kernel: str) -> Fit:
    return lambda x, y, query: ksm_ext.fit_surrogate(x, y, kernel=kernel).predict(query)


def mixing_law(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    return np.stack([_law_of_one(x, scores, query) for scores in y.T], 1)


def _law_of_one(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The best of several starts, whose constants lie below the scores by more and more."""

    def residuals(p: np.ndarray) -> np.ndarray:
        return p[0] + np.exp(x @ p[1:]) - y

    def slopes(p: np.ndarray) -> np.ndarray:
        return np.c_[np.ones(len(x)), np.exp(x @ p[1:])[:, None] * x]

    fits = []
    for start in range(1, 7):
        constant = y.min() - 0.1 * start * np.ptp(y)
        normal = x.T @ x + 0.01 * np.eye(x.shape[1])
        rates = np.linalg.solve(normal, x.T @ np.log(y - constant))
        fits.append(least_squares(residuals, np.r_[constant, rates], slopes, max_nfev=200))
    best = min(fits, key=lambda fit: fit.cost).x
    return best[0] + np.exp(query @ best[1:])


def law_and_residual(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    law = mixing_law(x, y, np.concatenate([x, query]))
    return law[len(x) :] + surrogate("auto")(x, y - law[: len(x)], query)


def lightgbm(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    import lightgbm

    options = {"objective": "regression", "learning_rate": 0.01, "seed": 42, "verbosity": -1}
    trees = [lightgbm.train(options, lightgbm.Dataset(x, each), 1000) for each in y.T]
    return np.stack([model.predict(query) for model in trees], 1)


def xgboost(**options: float) -> Fit:
    def fit(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
        from xgboost import XGBRegressor

        return np.stack([XGBRegressor(**options).fit(x, each).predict(query) for each in y.T], 1)

    return fit


def blend(x: np.ndarray, y: np.ndarray, query: np.ndarray) -> np.ndarray:
    return (surrogate("auto")(x, y, query) + lightgbm(x, y, query)) / 2


TUNED = {"n_estimators": 1000, "learning_rate": 0.02, "max_depth": 4}
COLUMNS: dict[str, Fit] = {
    "auto": surrogate("auto"),
    "exponential": surrogate("exponential"),
    "law + auto": law_and_residual,
    "auto and LightGBM": blend,
    "mixing law": mixing_law,
    "LightGBM": lightgbm,
    "XGBoost": xgboost(),
    "XGBoost, tuned": xgboost(**TUNED, subsample=0.8, colsample_bytree=0.8),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--draws", type=int, default=8, help="of 48 rows; half as many of 128")
    options = parser.parse_args()
    (split,) = regmix(options.data, 1)
    rows = []
    for size, draws in ((48, options.draws), (128, options.draws // 2), (512, 1)):
        found = np.empty((draws, len(COLUMNS), 2))
        for draw in tqdm(range(draws), f"{size} mixtures", file=sys.stderr):
            fitted = np.random.default_rng(draw).permutation(len(split.masks))[:size]
            for column, fit in enumerate(COLUMNS.values()):
                predicted = fit(split.masks[fitted], split.scores[fitted], split.held_masks)
                rank = lds(split.held_scores, predicted, constant="zero").mean()
                error = residual_error(split.held_scores, predicted).mean()
                found[draw, column] = rank, error
        rows.append([str(size), *(f"{rank:.3f} ({error:.3f})" for rank, error in found.mean(0))])
    print(markdown(["mixtures", *COLUMNS], rows))


if __name__ == "__main__":
    main()
