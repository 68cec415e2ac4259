"""How often attribution intervals hold the truth, on complete tables of really retrained scores.

    python -m experiments.studies.interval_coverage DATA [--seeds 4] [--design sizes|uniform]

For each of shapiq's set functions (DATA/games) a surrogate is fitted to random subsets, the empty
and the full one among them, and its intervals ``value +- 1.96 std`` are compared with the exact
attributions from all 2^n values, that of the empty set as the table has it. Printed: the share of
intervals that hold, and the root mean square error relative to the attributions', by family and
number of subsets.
"""

import argparse
import math
import sys
from collections import defaultdict
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import ksm_ext
from experiments.common import markdown
from ksm_ext.surrogates.calibration import quantile

SIZES = (60, 120, 300)
READOUTS = ("loo", "shapley", "banzhaf")


def exact_attributions(masks: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Leave-one-out, Shapley and Banzhaf values of a complete table, by their definitions."""
    n = masks.shape[1]
    codes = masks.astype(np.int64) @ (1 << np.arange(n))
    by_code = np.empty(2**n)
    by_code[codes] = values
    subsets = np.arange(2**n)
    sizes = ((subsets[:, None] >> np.arange(n)) & 1).sum(1)
    shapley_law = np.array([1 / (n * math.comb(n - 1, s)) for s in range(n)])
    effects = {name: np.empty(n) for name in READOUTS}
    for task in range(n):
        without = subsets[(subsets >> task) & 1 == 0]
        gain = by_code[without | (1 << task)] - by_code[without]
        effects["loo"][task] = gain[sizes[without] == n - 1].item()
        effects["shapley"][task] = (shapley_law[sizes[without]] * gain).sum()
        effects["banzhaf"][task] = gain.mean()
    return effects


def exact_interactions(masks: np.ndarray, values: np.ndarray, readout: str) -> np.ndarray:
    """(n, n) interactions of pairs of a complete table, by their definitions; zero diagonal."""
    n = masks.shape[1]
    by_code = np.empty(2**n)
    by_code[masks.astype(np.int64) @ (1 << np.arange(n))] = values
    subsets = np.arange(2**n)
    sizes = ((subsets[:, None] >> np.arange(n)) & 1).sum(1)
    laws = {
        "loo": np.eye(n - 1)[n - 2],
        "shapley": np.array([1 / ((n - 1) * math.comb(n - 2, s)) for s in range(n - 1)]),
        "banzhaf": np.full(n - 1, 0.5 ** (n - 2)),
    }
    found = np.zeros((n, n))
    for i, j in combinations(range(n), 2):
        first, second = 1 << i, 1 << j
        without = subsets[subsets & (first | second) == 0]
        gain = by_code[without | first | second] - by_code[without | first]
        gain += by_code[without] - by_code[without | second]
        found[i, j] = found[j, i] = laws[readout][sizes[without]] @ gain
    return found


def draw(design: str, masks: np.ndarray, num_subsets: int, seed: int) -> np.ndarray:
    """Rows of ``masks``, the ends and others: uniform, or of uniform sizes as Shapley has them."""
    generator = np.random.default_rng(seed)
    sizes = masks.sum(1)
    ends = np.flatnonzero((sizes == 0) | (sizes == masks.shape[1]))
    weights = np.ones(len(masks)) if design == "uniform" else 1.0 / np.bincount(sizes)[sizes]
    keys = generator.exponential(size=len(masks)) / weights  # weighted sampling without repeats
    keys[ends] = -1.0
    return np.argsort(keys)[: min(num_subsets, len(masks))]


def family(path: Path) -> str:
    """What a game is about, such as ``DataValuation``."""
    first, second = path.name.split("_")[:2]
    return second if first == "CaliforniaHousing" else first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--design", choices=("uniform", "sizes"), default="sizes")
    options = parser.parse_args()
    held: dict[tuple[str, str, int], list[np.ndarray]] = defaultdict(list)
    errors: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    for path in tqdm(sorted((options.data / "games").glob("*.npz")), file=sys.stderr):
        with np.load(path) as file:
            masks, values = file["coalitions"].astype(bool), file["values"].astype(float)
        truth = exact_attributions(masks, values)
        for num_subsets in SIZES:
            for seed in range(options.seeds):
                chosen = draw(options.design, masks, num_subsets, seed)
                fitted = ksm_ext.fit_surrogate(masks[chosen], values[chosen], kernel=options.kernel)
                for readout in READOUTS:
                    value, std = fitted.attribute(readout, return_std=True)
                    size = np.sqrt(np.mean(truth[readout] ** 2))
                    error = np.abs(value - truth[readout])
                    cell = (readout, family(path), num_subsets)
                    held[cell].append(error <= quantile(0.95) * std + 1e-9 * size)
                    errors[cell].append(float(np.sqrt(np.mean(error**2)) / size))

    def spelled(*cell: Any) -> str:
        return f"{np.concatenate(held[cell]).mean():.1%} ({np.mean(errors[cell]):.3f})"

    pairs = product(READOUTS, sorted({name for _, name, _ in held}))
    rows = [[*pair, *(spelled(*pair, m) for m in SIZES)] for pair in pairs]
    print(markdown(["readout", "games", *(f"{m} subsets" for m in SIZES)], rows))


if __name__ == "__main__":
    main()
