"""Shapley values at a budget of scores, against the estimators of shapiq.

Each method chooses its own subsets of a complete table, the empty and the full one in the budget,
and is judged by the root mean square error of the table's Shapley values, relative to theirs.
Surrogates are given ``subsets.mixed_sizes``, and ``subsets.design(readout="shapley")`` where the
build has it. ``ProxySPEX`` searches a grid of forests and ``ShaplEIG`` chooses one subset after the
other, a minute or more for a table: they are asked with ``--slow``, ``ShaplEIG`` up to 100 subsets.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import numpy as np

import ksm_ext
from benchmarks.comparisons.common import (
    BEFORE,
    Game,
    Record,
    attempted,
    by_family_and_size,
    cells_of_games,
    mean,
    missing,
    number,
    progress,
    select,
    values_of,
)
from benchmarks.comparisons.ours import fit_ours, variants
from experiments.common import markdown

SLOW = {"ProxySPEX": 1000, "ShaplEIG": 100}
"""Estimators that take a minute or more for a table, and the budgets up to which they are asked."""

ESTIMATORS: dict[str, dict[str, Any]] = {
    "ProxySHAP": {"index": "SV", "max_order": 1},
    "RegressionMSR": {"index": "SV"},
    "UnbiasedKernelSHAP": {},
    "SVARM": {},
    "KernelSHAP": {},
    "LeverageSHAP": {},
    "PolySHAP": {},
    "OddSHAP": {},
    "kADDSHAP": {"max_order": 2},
    "ProxySPEX": {"index": "SV", "max_order": 1},
    "PermutationSamplingSV": {},
    "StratifiedSamplingSV": {},
    "OwenSamplingSV": {},
    "ShaplEIG": {"show_progress": False},
}
"""Classes of ``shapiq.approximator``, and how each is asked for Shapley values."""


def absent() -> list[str]:
    """What is not installed: shapiq, or estimators that it has not, or not without more."""
    if missing(["shapiq"]):
        return ["shapiq"]
    from shapiq import approximator

    def lacks(name: str) -> bool:
        # shapiq puts a class that remembers the error in the place of one without its packages
        return getattr(getattr(approximator, name, None), "_import_error", None) is not None

    return [
        f"shapiq.{name}" for name in ESTIMATORS if not hasattr(approximator, name) or lacks(name)
    ]


def estimate(name: str, game: Game, budget: int, seed: int) -> Record:
    """The error of an estimator of shapiq, and how many scores it asked for."""
    from shapiq import approximator

    asked, unit = 0, game.values.std()  # estimators with XGBoost are not indifferent to the unit

    def value(coalitions: Any) -> np.ndarray:
        nonlocal asked
        rows = np.atleast_2d(np.asarray(coalitions, dtype=bool))
        asked += len(rows)
        return game.of(rows) / unit

    n = game.masks.shape[1]
    method = getattr(approximator, name)(n=n, random_state=seed, **ESTIMATORS[name])
    found = method.approximate(budget=budget, game=value)
    values = unit * np.array([found.dict_values.get((task,), 0.0) for task in range(n)])
    return {"shapley": game.relative_error("shapley", values), "asked": asked}


def mixed_sizes(n: int, budget: int, seed: int) -> np.ndarray:
    """Both ends, and subsets of all sizes alike."""
    ends = np.repeat([[False], [True]], n, axis=1)
    drawn = ksm_ext.subsets.mixed_sizes(n, budget - 2, seed=seed, allow_fewer=True)
    return np.concatenate([ends, drawn.numpy()])


def shapley_design(n: int, budget: int, seed: int) -> np.ndarray:
    """The build's own design for Shapley values, the empty set among it."""
    design = ksm_ext.subsets.design
    drawn = design(n, budget, readout="shapley", include_empty=True, seed=seed, allow_fewer=True)
    return drawn.numpy()


def attributed(
    spec: str, design: Callable[[int, int, int], np.ndarray], game: Game, budget: int, seed: int
) -> Record:
    """The error of a surrogate's Shapley values on a design."""
    masks = design(game.masks.shape[1], budget, seed)
    fitted = fit_ours(spec, masks, game.of(masks))
    error = game.relative_error("shapley", fitted.attribute("shapley"))
    return {"shapley": error, "asked": len(masks)}


def measure(options: Namespace, ours: bool) -> Iterator[Record]:
    """Records of all estimators, or of the first kernel and its variants on each design."""
    methods: dict[str, Callable[[Game, int, int], Record]] = {}
    if ours:
        designs = {"": mixed_sizes}
        if hasattr(ksm_ext.subsets, "design"):
            designs[", its design"] = shapley_design
        for spec, (name, design) in product(variants(options.kernels), designs.items()):
            methods[spec + name] = partial(attributed, spec, design)
    elif "shapiq" not in absent():
        found = [name for name in ESTIMATORS if f"shapiq.{name}" not in absent()]
        methods = {name: partial(estimate, name) for name in found}
    sizes = options.sizes or (50, 100, 300, 1000)
    cells = list(cells_of_games(options, sizes))
    for game, m, seed in progress("shapley", cells):
        for name, run in methods.items():
            if name not in SLOW or (options.slow and m <= SLOW[name]):
                start = time.process_time()
                task = partial(run, game, m, seed)
                numbers = task() if ours else attempted(task)
                place = {"game": game.name, "family": game.family, "m": m, "seed": seed}
                spent = {"seconds": time.process_time() - start}
                yield {"method": name, **place, **numbers, **spent}


def tables(records: Sequence[Record], reference: str) -> Iterator[tuple[str, str]]:
    """Titles and tables: mean errors by budget, then by family and budget."""
    sizes = sorted(values_of(records, "m"))
    methods = values_of(records, "method")
    rows = []
    for method in methods:
        chosen = select(records, method=method)
        errors = (number(mean(select(chosen, m=m), "shapley")) for m in sizes)
        most = max((row["asked"] / row["m"] for row in chosen if "asked" in row), default=np.nan)
        rows.append([method, *errors, number(most, 2), number(mean(chosen, "seconds"), 2)])
    titles = ["relative error", *(f"m = {m}" for m in sizes), "scores asked / m", "seconds"]
    yield "Shapley values, mean over games", markdown(titles, rows)
    for m in sizes:
        families = sorted(values_of(select(records, m=m), "family"))
        rows = []
        for method in methods:
            chosen = select(records, m=m, method=method)
            found = (number(mean(select(chosen, family=name), "shapley")) for name in families)
            rows.append([method, *found])
        yield f"Shapley values by family, m = {m}", markdown([f"m = {m}", *families], rows)
    peers = values_of(select(records, peer=True), "method")
    ours = [name for name in methods if name not in peers and not name.endswith(BEFORE)]

    def best(rows: list[Record], names: Sequence[str]) -> tuple[float, str]:
        found = [(mean(select(rows, method=name), "shapley"), name) for name in names]
        return min((pair for pair in found if pair[0] == pair[0]), default=(np.nan, "-"))

    def lead(rows: list[Record]) -> str:
        (mine, _), (theirs, name) = best(rows, ours), best(rows, peers)
        return f"{number(mine / theirs, 2)} ({name})"

    if peers:
        yield "Ours over the best peer", markdown(*by_family_and_size(records, lead))
