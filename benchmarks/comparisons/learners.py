"""Other learners on the same subsets: held-out scores, Shapley and leave-one-out values.

Subsets of evenly mixed sizes are drawn from a complete table, the empty and the full one among
them. A learner is fitted to all but the empty subset (whose score is a convention in most tables),
predicts every subset, and the two ends are put in as they are; attributions of the values so found
are compared with the table's own. Surrogates are given the same scores and asked with their own
closed forms. ``nse`` is squared error over variance on up to 500 other subsets of the same design.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import nan

import numpy as np

from benchmarks.comparisons.common import (
    Game,
    Record,
    attempted,
    by_family_and_size,
    cells_of_games,
    geometric_mean,
    mean,
    missing,
    number,
    progress,
    ratio_table,
    ratios,
    select,
    values_of,
)
from benchmarks.comparisons.ours import fit_ours
from experiments.common import markdown
from experiments.studies.interval_coverage import draw, exact_attributions

Predict = Callable[[np.ndarray], np.ndarray]
HELD_OUT = 500
CELL = ("game", "m", "seed")
ERRORS = {"nse": "nse", "shapley": "Shapley", "loo": "leave-one-out"}


# -- learners: (m, n) bool and standardised (m,) scores in, a function of masks out ---------------


def gaussian_process(masks: np.ndarray, scores: np.ndarray) -> Predict:
    """scikit-learn's, isotropic, by marginal likelihood."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

    scale = masks.shape[1] ** 0.5
    kernel = ConstantKernel(1.0, (1e-3, 1e4)) * RBF(scale, (0.3, 100 * scale))
    model = GaussianProcessRegressor(kernel + WhiteKernel(0.1, (1e-6, 1e1)))
    return model.fit(masks.astype(float), scores).predict


def gaussian_process_ard(masks: np.ndarray, scores: np.ndarray) -> Predict:
    """gpytorch's, a length scale per task, by 200 steps of Adam on the marginal likelihood."""
    import gpytorch
    import torch

    class Model(gpytorch.models.ExactGP):
        def __init__(self, x, y, likelihood):
            super().__init__(x, y, likelihood)
            self.mean_module = gpytorch.means.ConstantMean()
            of_masks = gpytorch.kernels.RBFKernel(ard_num_dims=x.shape[1])
            of_masks.lengthscale = x.shape[1] ** 0.5
            self.covar_module = gpytorch.kernels.ScaleKernel(of_masks)

        def forward(self, x):
            covariance = self.covar_module(x)
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), covariance)

    x, y = torch.as_tensor(masks).double(), torch.as_tensor(scores)
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Model(x, y, likelihood.double()).double()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    with gpytorch.settings.fast_computations(False, False, False):
        for _ in range(200):
            optimizer.zero_grad()
            loss = -evidence(model(x), y)
            loss.backward()
            optimizer.step()
        model.eval()

    def predict(query: np.ndarray) -> np.ndarray:
        with torch.no_grad(), gpytorch.settings.fast_computations(False, False, False):
            parts = torch.as_tensor(query).double().split(4096)
            return torch.cat([model(part).mean for part in parts]).numpy()

    return predict


def histogram_boosting(masks: np.ndarray, scores: np.ndarray) -> Predict:
    from sklearn.ensemble import HistGradientBoostingRegressor

    model = HistGradientBoostingRegressor(
        max_iter=300, learning_rate=0.05, min_samples_leaf=5, random_state=0
    )
    return model.fit(masks, scores).predict


def random_forest(masks: np.ndarray, scores: np.ndarray) -> Predict:
    from sklearn.ensemble import RandomForestRegressor

    return RandomForestRegressor(300, random_state=0).fit(masks, scores).predict


def xgboost(masks: np.ndarray, scores: np.ndarray) -> Predict:
    from xgboost import XGBRegressor

    model = XGBRegressor(n_estimators=300, learning_rate=0.05, max_depth=4, n_jobs=1)
    return model.fit(masks, scores).predict


def lightgbm(masks: np.ndarray, scores: np.ndarray) -> Predict:
    from lightgbm import LGBMRegressor

    model = LGBMRegressor(
        n_estimators=300, learning_rate=0.05, min_child_samples=5, n_jobs=1, verbose=-1
    )
    fitted = model.fit(masks.astype(float), scores)
    return lambda query: fitted.booster_.predict(query.astype(float))


def walsh(masks: np.ndarray, degree: int) -> np.ndarray:
    """(m, features) products of up to ``degree`` signs 2 s_i - 1, without the constant."""
    signs = 2.0 * masks - 1
    first, second = np.triu_indices(masks.shape[1], 1)
    return signs if degree == 1 else np.hstack([signs, signs[:, first] * signs[:, second]])


def ridge(masks: np.ndarray, scores: np.ndarray) -> Predict:
    from sklearn.linear_model import RidgeCV

    model = RidgeCV(np.logspace(-4, 5, 46)).fit(walsh(masks, 1), scores)
    return lambda query: model.predict(walsh(query, 1))


def lasso(masks: np.ndarray, scores: np.ndarray, *, degree: int) -> Predict:
    from sklearn.linear_model import LassoCV

    model = LassoCV(cv=5, max_iter=5000, tol=1e-3, random_state=0)
    model.fit(walsh(masks, degree), scores)
    return lambda query: model.predict(walsh(query, degree))


LEARNERS: dict[str, tuple[str, Callable[[np.ndarray, np.ndarray], Predict]]] = {
    "GP, RBF + white": ("sklearn", gaussian_process),
    "GP, ARD": ("gpytorch", gaussian_process_ard),
    "HistGradientBoosting": ("sklearn", histogram_boosting),
    "random forest": ("sklearn", random_forest),
    "XGBoost": ("xgboost", xgboost),
    "LightGBM": ("lightgbm", lightgbm),
    "RidgeCV": ("sklearn", ridge),
    "LassoCV, degree 1": ("sklearn", lambda masks, scores: lasso(masks, scores, degree=1)),
    "LassoCV, degree 2": ("sklearn", lambda masks, scores: lasso(masks, scores, degree=2)),
}
"""By name: the package it needs, and how it is fitted."""


def standardised(
    fit: Callable[[np.ndarray, np.ndarray], Predict], inputs: np.ndarray, scores: np.ndarray
) -> Predict:
    """A learner of scores in units of their deviation: some are not indifferent to the unit."""
    center, unit = scores.mean(), scores.std() or 1.0
    predict = fit(inputs, (scores - center) / unit)
    return lambda query: center + unit * np.asarray(predict(query), dtype=float)


# -- measure --------------------------------------------------------------------------------------


def measure_peer(name: str, game: Game, rows: np.ndarray, held: np.ndarray) -> Record:
    """Errors of a learner of :data:`LEARNERS`, and its processor time."""
    fitted = rows[game.masks[rows].any(1)]
    start = time.process_time()
    predict = standardised(LEARNERS[name][1], game.masks[fitted], game.values[fitted])
    seconds = time.process_time() - start
    predicted = predict(game.masks)
    effects = exact_attributions(game.masks, game.with_ends(predicted))
    return _errors(game, held, predicted[held], effects) | {"seconds": seconds}


def measure_ours(spec: str, game: Game, rows: np.ndarray, held: np.ndarray) -> Record:
    """Errors of a surrogate, see :func:`.ours.fit_ours`, and its processor time."""
    start = time.process_time()
    fitted = fit_ours(spec, game.masks[rows], game.values[rows])
    seconds = time.process_time() - start
    effects = {readout: fitted.attribute(readout) for readout in ("shapley", "loo")}
    return _errors(game, held, fitted.predict(game.masks[held]), effects) | {"seconds": seconds}


def _errors(
    game: Game, held: np.ndarray, predicted: np.ndarray, effects: dict[str, np.ndarray]
) -> Record:
    truth = game.values[held]
    attributed = {name: game.relative_error(name, effects[name]) for name in ("shapley", "loo")}
    return {"nse": float(np.mean((predicted - truth) ** 2) / truth.var()), **attributed}


def absent() -> list[str]:
    """What is not installed."""
    return missing(dict.fromkeys(package for package, _ in LEARNERS.values()))


def measure(options: Namespace, ours: bool) -> Iterator[Record]:
    """Records of all learners, or of surrogates, on all games, budgets and seeds."""
    found = [name for name, (package, _) in LEARNERS.items() if package not in absent()]
    run = measure_ours if ours else measure_peer
    cells = list(cells_of_games(options, options.sizes or (50, 100, 300)))
    for game, m, seed in progress("learners", cells):
        order = draw("sizes", game.masks, m + HELD_OUT, seed)
        place = {"game": game.name, "family": game.family, "m": m, "seed": seed}
        for method in options.kernels if ours else found:
            task = partial(run, method, game, order[:m], order[m:])
            numbers = task() if ours else attempted(task)
            yield {"method": method, **place, **numbers}


# -- tables ---------------------------------------------------------------------------------------


def tables(records: Sequence[Record], reference: str) -> Iterator[tuple[str, str]]:
    """Titles and tables: ratios to a reference method, then errors by family and by m."""
    rows = []
    for method in values_of(records, "method"):
        found = {error: ratios(records, error, method, reference, CELL) for error in ERRORS}
        row = [method, *(number(geometric_mean(found[error]), 2) for error in ERRORS)]
        row += [f"{np.mean(found['nse'] > 1.25):.0%}", number(max(found["nse"], default=nan), 2)]
        rows.append([*row, number(mean(select(records, method=method), "seconds"), 2)])
    titles = ["learner", *ERRORS.values(), "nse worse than 1.25 x", "worst nse", "seconds of a fit"]
    yield f"Errors over those of {reference} (geometric means)", markdown(titles, rows)
    for error, title in ERRORS.items():
        chosen = select(records, method=reference)
        table = by_family_and_size(chosen, lambda each, error=error: number(mean(each, error)))
        yield f"{title} of {reference} (means)", markdown(*table)
        if len(rows) > 1:
            yield f"{title} over that of {reference}", ratio_table(records, error, reference, CELL)
