"""How often attribution intervals hold the truth, on complete tables of really retrained scores.

    python benchmarks/interval_coverage.py DATA [--seeds 2] [--kernel auto]

For each of shapiq's set functions (DATA/games) a surrogate is fitted to 300 random subsets and its
intervals ``value +- z std`` are compared with the exact attributions from all 2^n values. The score
of the empty set is 0 by convention there, not a measurement: it is never fitted, and where the
exact Shapley and Banzhaf values need it they take the surrogate's own prediction.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import norm
from tqdm import tqdm

import ksm_ext

LEVELS = (0.5, 0.8, 0.9, 0.95)
READOUTS = ("loo", "shapley", "banzhaf")


def exact_attributions(masks: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """Leave-one-out, Shapley and Banzhaf values of a complete table, by their definitions."""
    n = masks.shape[1]
    codes = masks.astype(np.int64) @ (1 << np.arange(n))
    by_code = np.empty(2**n)
    by_code[codes] = values
    subsets = np.arange(2**n)
    sizes = ((subsets[:, None] >> np.arange(n)) & 1).sum(1)
    shapley_law = np.array([1 / (n * _binomial(n - 1, s)) for s in range(n)])
    effects = {name: np.empty(n) for name in READOUTS}
    for task in range(n):
        without = subsets[(subsets >> task) & 1 == 0]
        gain = by_code[without | (1 << task)] - by_code[without]
        effects["loo"][task] = gain[sizes[without] == n - 1].item()
        effects["shapley"][task] = (shapley_law[sizes[without]] * gain).sum()
        effects["banzhaf"][task] = gain.mean()
    return effects


def draw(design: str, masks: np.ndarray, num_subsets: int, seed: int) -> np.ndarray:
    """Rows of ``masks``: uniform over subsets, or over sizes first as Shapley values weigh them."""
    generator = np.random.default_rng(seed)
    if design == "uniform":
        return generator.permutation(len(masks))[:num_subsets]
    sizes = masks.sum(1)
    weights = 1.0 / np.bincount(sizes)[sizes]
    keys = generator.exponential(size=len(masks)) / weights  # weighted sampling without repeats
    return np.argsort(keys)[:num_subsets]


def _binomial(n: int, k: int) -> float:
    return float(np.prod([(n - j) / (j + 1) for j in range(k)]))


def main() -> None:
    """Fit every game and print the coverage by readout and level."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--kernel", default="auto")
    parser.add_argument("--subsets", type=int, default=300)
    parser.add_argument("--design", choices=("uniform", "sizes"), default="sizes")
    options = parser.parse_args()
    scaled: dict[str, list[np.ndarray]] = defaultdict(list)
    for path in tqdm(sorted((options.data / "games").glob("*.npz")), file=sys.stderr):
        with np.load(path) as file:
            masks, values = file["coalitions"].astype(bool), file["values"].astype(float)
        nonempty = masks.any(1)
        whole, complete = masks, values
        masks, values = masks[nonempty], values[nonempty]
        for seed in range(options.seeds):
            chosen = draw(options.design, masks, options.subsets, seed)
            fitted = ksm_ext.fit_surrogate(masks[chosen], values[chosen], kernel=options.kernel)
            if not fitted.has_intervals:
                continue  # lasso or the mean won: it has no intervals, and says so
            complete[~nonempty] = fitted.predict(whole[~nonempty])
            truth = exact_attributions(whole, complete)
            for readout in READOUTS:
                value, std = fitted.attribute(readout, return_std=True)
                scaled[readout].append((value - truth[readout]) / np.maximum(std, 1e-12))
    print(f"| readout | intervals | {' | '.join(f'{level:.0%}' for level in LEVELS)} | rms z |")
    print("|---" * (len(LEVELS) + 3) + "|")
    for readout in READOUTS:
        z = np.abs(np.concatenate(scaled[readout]))
        cells = [f"{(z <= norm.ppf((1 + level) / 2)).mean():.3f}" for level in LEVELS]
        rms = np.sqrt(np.mean(np.minimum(z, 10) ** 2))
        print(f"| {readout} | {len(z)} | {' | '.join(cells)} | {rms:.2f} |")


if __name__ == "__main__":
    main()
