"""Small fits: the worst case over many small tables, and the processor time of a fit.

Uniform random subsets (none empty) of one complete table of each family; squared error on up to 500
other subsets, over that of ridge regression on the same (scikit-learn's RidgeCV by leave-one-out).
"""

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from benchmarks.comparisons.common import (
    Game,
    Record,
    games,
    mean,
    number,
    progress,
    select,
    values_of,
)
from benchmarks.comparisons.learners import HELD_OUT, Predict, ridge
from benchmarks.comparisons.ours import fit_ours
from experiments.common import markdown

FAMILIES = (
    *("DataValuation", "DatasetValuation", "FeatureSelection"),
    *("ImageClassifier", "SentimentAnalysis"),
)
SMALL = (10, 20)
TIMED = (10, 20, 100, 300, 1000)


def absent() -> list[str]:
    """What is not installed: nothing is needed that the tests do not need."""
    return []


def measure(options: Namespace, ours: bool) -> Iterator[Record]:
    """Errors (``nse``, and ``ridge``'s) on small tables, and seconds of a fit."""
    if not ours:
        return
    every = games(Namespace(**{**vars(options), "games": None}))
    first = {game.family: game for game in reversed(every) if game.family in FAMILIES}
    count = 4 if options.quick else 20
    drawn = [(game, m, seed) for game in first.values() for m in SMALL for seed in range(count)]
    for game, m, seed in progress("small tables", drawn):
        yield from held_out_errors(options.kernels, game, m, seed)
    cells = [(m, t, method) for t in (1, 20) for m in TIMED for method in options.kernels]
    for m, t, method in progress("processor time", cells):
        yield {"method": method, "m": m, "t": t, "seconds": seconds_of_fit(method, m, t)}


def held_out_errors(methods: Sequence[str], game: Game, m: int, seed: int) -> Iterator[Record]:
    """Squared error over variance on subsets that were not fitted, of methods and of ridge."""
    order = np.random.default_rng(seed).permutation(np.flatnonzero(game.masks.any(1)))
    rows, held = order[:m], order[m : m + HELD_OUT]
    fitted, truth = (game.masks[rows], game.values[rows]), game.values[held]

    def error(predict: Predict) -> float:
        return float(np.mean((predict(game.masks[held]) - truth) ** 2) / truth.var())

    place = {"family": game.family, "m": m, "seed": seed, "ridge": error(ridge(*fitted))}
    for method in methods:
        yield {"method": method, **place, "nse": error(fit_ours(method, *fitted).predict)}


def seconds_of_fit(method: str, m: int, t: int) -> float:
    """Median processor time of fits to scores with effects and synergies of ten tasks.

    Distinct subsets, up to 1,000 of the 1,024 there are, and a little noise.
    """
    generator = np.random.default_rng(m)
    codes = generator.permutation(2**10)[:m]
    masks = (codes[:, None] >> np.arange(10) & 1).astype(bool)
    x = np.hstack([masks, masks[:, :5] * masks[:, 5:]])
    scores = x @ generator.normal(size=(15, t)) + 0.1 * generator.normal(size=(m, t))
    fit = partial(fit_ours, method, masks, scores[:, 0] if t == 1 else scores)
    fit()  # what is done once, such as imports
    spent = []
    for _ in range(5 if m <= 100 else 1):
        start = time.process_time()
        fit()
        spent.append(time.process_time() - start)
    return float(np.median(spent))


def tables(records: Sequence[Record], reference: str) -> Iterator[tuple[str, str]]:
    """Titles and tables: errors over ridge's by family, then seconds."""
    small = [row for row in records if "nse" in row]
    rows = []
    for method in values_of(small, "method"):
        chosen = select(small, method=method)
        found = np.array([row["nse"] / row["ridge"] for row in chosen])
        places = np.array([row["family"] for row in chosen])
        worst = [*(max(found[places == name], default=np.nan) for name in FAMILIES), found.max()]
        shares = [f"{np.mean(found > limit):.1%}" for limit in (1.2, 1.5)]
        cells = map(number, [*worst, float(np.median(found))])
        rows.append([method, str(len(found)), *cells, *shares])
    titles = ["worst error over ridge's", "tables", *FAMILIES, "all", "median", "> 1.2", "> 1.5"]
    yield "Small tables (m = 10 and 20)", markdown(titles, rows)
    timed = [row for row in records if "seconds" in row]
    rows = []
    for method in values_of(timed, "method"):
        for t in values_of(timed, "t"):
            chosen = select(timed, method=method, t=t)
            spent = [1e3 * mean(select(chosen, m=m), "seconds") for m in TIMED]
            rows.append([method, str(t), *(number(value, 1) for value in spent)])
    titles = ["milliseconds of a fit", "targets", *(f"m = {m}" for m in TIMED)]
    yield "Processor time (n = 10)", markdown(titles, rows)
