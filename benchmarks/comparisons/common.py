"""What sections do alike: options, complete tables, records of single measurements, their means."""

import math
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.common import markdown
from experiments.studies.interval_coverage import exact_attributions, family

Record = dict[str, Any]
"""A measurement: ``section``, ``method``, where it was taken (``family``, ``m``) and numbers."""

QUICK_GAMES = 6
"""Complete tables with ``--quick``: one of each family."""

BEFORE = ", before"
"""What is added to the names of methods of the earlier build."""

FLOOR = 0.01
"""Relative errors below are taken for this where ratios are formed: nobody needs less."""


@dataclass(frozen=True, eq=False)
class Game:
    """A complete table: the scores of all subsets, in any order.

    Attributes:
        name: The file's.
        family: What it is about, such as ``"DataValuation"``.
        masks: (2^n, n) bool, every subset once.
        values: (2^n,) float64.
    """

    name: str
    family: str
    masks: np.ndarray
    values: np.ndarray

    def of(self, masks: np.ndarray) -> np.ndarray:
        """(m,) scores of subsets (m, n)."""
        return self._in_order[masks @ self._powers]

    def with_ends(self, values: np.ndarray) -> np.ndarray:
        """(2^n,) predicted values, with those of the empty and the full subset as they are."""
        ends = self.masks.all(1) | ~self.masks.any(1)
        return np.where(ends, self.values, values)

    @cached_property
    def exact(self) -> dict[str, np.ndarray]:
        """(n,) leave-one-out, Shapley and Banzhaf values, by readout."""
        return exact_attributions(self.masks, self.values)

    def relative_error(self, readout: str, found: np.ndarray) -> float:
        """Root mean square error of attributions over root mean square of the exact ones."""
        truth = self.exact[readout]
        return float(np.sqrt(np.mean((found - truth) ** 2) / np.mean(truth**2)))

    @property
    def _powers(self) -> np.ndarray:
        return 1 << np.arange(self.masks.shape[1])

    @cached_property
    def _in_order(self) -> np.ndarray:
        """(2^n,) scores by the binary number of the subset."""
        return self.values[np.argsort(self.masks @ self._powers)]


def read_game(path: Path) -> Game:
    with np.load(path) as file:
        masks, values = file["coalitions"].astype(bool), file["values"].astype(float)
    return Game(path.stem, family(path), masks, values)


def games(options: Namespace) -> list[Game]:
    """The first ``--games`` complete tables, one of each family after the other."""
    paths: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((options.data / "games").glob("*.npz")):
        paths[family(path)].append(path)
    in_turn = [path for path in chain(*zip_longest(*paths.values())) if path]
    count = options.games or (QUICK_GAMES if options.quick else len(in_turn))
    return [read_game(path) for path in in_turn[:count]]


def cells_of_games(options: Namespace, sizes: Sequence[int]) -> Iterator[tuple[Game, int, int]]:
    """Games, budgets and seeds; a budget is at most three quarters of a table."""
    for game in games(options):
        for m in sizes:
            if 4 * m <= 3 * len(game.masks):
                yield from ((game, m, seed) for seed in range(options.seeds))


def attempted(run: Callable[[], Record]) -> Record:
    """What a method found, or the error it raised: a peer that fails is told, not left out."""
    try:
        return run()
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {error}".split("\n")[0]}


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [package for package in packages if find_spec(package) is None]


def progress(title: str, cells: Iterable[Any]) -> Iterator[Any]:
    """The cells, under a bar on stderr."""
    yield from tqdm(list(cells), title, dynamic_ncols=True)


# -- means of records -----------------------------------------------------------------------------


def select(records: Iterable[Record], **facts: Any) -> list[Record]:
    """The records of which these facts are true."""
    return [row for row in records if all(row.get(key) == value for key, value in facts.items())]


def values_of(records: Iterable[Record], key: str) -> list[Any]:
    """The values of a key, each once, in the order of their first record."""
    return list(dict.fromkeys(row[key] for row in records if key in row))


def mean(records: Sequence[Record], field: str) -> float:
    found = [row[field] for row in records if field in row]
    return math.nan if not found else float(np.mean(found))


def ratios(
    records: Sequence[Record], error: str, method: str, against: str, cell: Sequence[str]
) -> np.ndarray:
    """A method's errors over another's, of the cells that have both; floored at :data:`FLOOR`."""
    found: dict[str, dict[tuple[Any, ...], float]] = {method: {}, against: {}}
    for row in records:
        if row["method"] in found and error in row:
            found[row["method"]][tuple(row[key] for key in cell)] = max(row[error], FLOOR)
    both = found[method].keys() & found[against].keys()
    return np.array([found[method][place] / found[against][place] for place in sorted(both)])


def geometric_mean(values: np.ndarray) -> float:
    return float(np.exp(np.mean(np.log(values)))) if len(values) else math.nan


def number(value: float, digits: int = 3) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def by_family_and_size(
    records: Sequence[Record], cell: Callable[[list[Record]], str]
) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of a table with a row per family, the last for all, and a column per m."""
    families, sizes = sorted(values_of(records, "family")), sorted(values_of(records, "m"))
    rows = []
    for name in [*families, "all"]:
        chosen = records if name == "all" else select(records, family=name)
        rows.append([name, *(cell(select(chosen, m=size)) for size in sizes)])
    return ["games", *(f"m = {size}" for size in sizes)], rows


def ratio_table(records: Sequence[Record], error: str, reference: str, cell: Sequence[str]) -> str:
    """Geometric mean ratios of every other method to the reference, by family and by m."""
    families, sizes = sorted(values_of(records, "family")), sorted(values_of(records, "m"))
    places: list[dict[str, Any]] = [{"family": name} for name in families]
    places += [{"m": size} for size in sizes]
    rows = []
    for method in values_of(records, "method"):
        if method != reference:
            found = [
                ratios(select(records, **place), error, method, reference, cell) for place in places
            ]
            rows.append([method, *(number(geometric_mean(each), 2) for each in found)])
    return markdown(["", *families, *(f"m = {size}" for size in sizes)], rows)
