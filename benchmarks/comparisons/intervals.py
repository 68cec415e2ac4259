"""How often intervals hold: predictions, attributions and interactions at 50, 80 and 95 %.

On complete tables, the empty and the full subset among those that are fitted, and the table's own
values as the truth. A prediction is asked of up to 500 subsets of the same design that were not
fitted, of less than half of the tasks or of more. Width is that of an 80 % interval over the root
mean square of what it is of, on average over games.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from statistics import NormalDist

import numpy as np

from benchmarks.comparisons.common import (
    Game,
    Record,
    cells_of_games,
    mean,
    number,
    progress,
    select,
    values_of,
)
from benchmarks.comparisons.learners import HELD_OUT
from benchmarks.comparisons.ours import fit_ours, variants
from experiments.common import markdown
from experiments.studies.interval_coverage import READOUTS, draw, exact_interactions

LEVELS = (0.5, 0.8, 0.95)
SIZES = (30, 60, 120, 300)
DESIGNS = {"sizes": "mixed sizes", "uniform": "uniform"}
READOUT_NAMES = {"loo": "leave-one-out", "shapley": "Shapley", "banzhaf": "Banzhaf"}

Estimates = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Values, their standard deviations and the truth, of one shape."""


def absent() -> list[str]:
    """What is not installed: there is no peer here."""
    return []


def predictions(fitted, game: Game, held: np.ndarray) -> Iterator[tuple[str, Estimates]]:
    """Of held-out subsets, small ones and large ones."""
    mean, std = fitted.predict(game.masks[held], return_std=True)
    truth = game.values[held]
    large = 2 * game.masks[held].sum(1) >= game.masks.shape[1]
    for name, rows in (("small", ~large), ("large", large)):
        yield f"prediction, {name} subsets", (mean[rows], std[rows], truth[rows])


def questions(fitted, game: Game, held: np.ndarray) -> Iterator[tuple[str, Estimates]]:
    """Everything that has intervals, by name."""
    yield from predictions(fitted, game, held)
    for readout in READOUTS:
        estimate = fitted.attribute(readout, return_std=True)
        yield READOUT_NAMES[readout], (*estimate, game.exact[readout])
    pairs = np.triu_indices(game.masks.shape[1], 1)
    for readout in READOUTS:
        value, std = fitted.interactions(readout, return_std=True)
        truth = exact_interactions(game.masks, game.values, readout)
        name = f"interactions, {READOUT_NAMES[readout]}"
        yield name, (value[pairs], std[pairs], truth[pairs])


def coverage(estimates: Estimates) -> Record:
    """The share of intervals that hold at each level, and their width."""
    value, std, truth = estimates
    size = np.sqrt(np.mean(truth**2))
    error = np.abs(value - truth) - 1e-9 * size  # rounding
    factors = {level: NormalDist().inv_cdf((1 + level) / 2) for level in LEVELS}
    held = {f"{level:.0%}": float(np.mean(error <= z * std)) for level, z in factors.items()}
    return held | {"width": float(2 * factors[0.8] * np.mean(std) / max(size, 1e-300))}


def measure(options: Namespace, ours: bool) -> Iterator[Record]:
    """Records of the first kernel, and its variants, on both designs."""
    if not ours:
        return
    every = cells_of_games(options, options.sizes or SIZES)
    specs = variants(options.kernels)
    cells = [(*cell, design, spec) for cell in every for design in DESIGNS for spec in specs]
    for game, m, seed, design, spec in progress("intervals", cells):
        order = draw(design, game.masks, m + HELD_OUT, seed)
        fitted = fit_ours(spec, game.masks[order[:m]], game.values[order[:m]])
        place = {"game": game.name, "family": game.family, "m": m, "seed": seed}
        for question, estimates in questions(fitted, game, order[m:]):
            numbers = coverage(estimates)
            yield {"method": spec, "design": design, **place, "question": question, **numbers}


def tables(records: Sequence[Record], reference: str) -> Iterator[tuple[str, str]]:
    """Titles and tables: each design and build by question and m, then 95 % by family."""
    sizes, families = sorted(values_of(records, "m")), sorted(values_of(records, "family"))
    for method in values_of(records, "method"):
        for design, name in DESIGNS.items():
            chosen = select(records, method=method, design=design)
            rows, by_family = [], []
            for question in values_of(chosen, "question"):
                asked = select(chosen, question=question)
                cells = [_levels(select(asked, m=m)) for m in sizes]
                rows.append([question, *cells])
                held = [number(mean(select(asked, family=each), "95%"), 2) for each in families]
                by_family.append([question, *held])
            titles = ["50/80/95 % (width of 80 %)", *(f"m = {m}" for m in sizes)]
            yield f"Intervals of {method} that hold, {name}", markdown(titles, rows)
            yield f"95 % intervals, {name}, by family", markdown(["", *families], by_family)


def _levels(rows: list[Record]) -> str:
    shares = "/".join(number(mean(rows, f"{level:.0%}"), 2) for level in LEVELS)
    return f"{shares} ({number(mean(rows, 'width'), 2)})"
