"""Which subsets to score for which question, on complete tables of really retrained scores.

    python -m experiments.studies.designs DATA [--seeds 2] [--adaptive]

Of each kind of shapiq's set functions (DATA/games) one is taken. A surrogate is fitted to the
subsets of every design; the empty and the full one are beside them, known, and not counted. Printed
by number of subsets: the root mean square error of each design over that of ``mixed_sizes``,
geometric mean over games and seeds, and in brackets the mean error relative to the exact
attributions (to the deviation of the scores, for predictions of 400 subsets of all sizes alike).
``--adaptive``: of Shapley values, where every ten subsets are those that ``next_best`` asks for
after the scores before, beside as many of one design.
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import ksm_ext
from experiments.common import markdown
from experiments.studies.interval_coverage import exact_attributions
from ksm_ext import subsets

SIZES = (30, 60, 120, 300)
READOUTS = ("shapley", "loo", "banzhaf", "prediction")
BASE = "mixed sizes"
_FLOOR = 1e-3  # of an error: below, designs are equally good


def borders_first(others: Callable[..., Tensor], n: int, m: int, seed: int) -> Tensor:
    """All that lack one task, single tasks, then others."""
    first = subsets.design(n, 2 * n + 1, known=torch.ones(1, n), seed=seed, allow_fewer=True)[
        : 2 * n
    ]
    masks = torch.cat([first, others(n, m + 2 * n, seed)])
    return masks[subsets.distinct_rows(masks)[1]][:m]


def uniform(n: int, m: int, seed: int) -> Tensor:
    return subsets.bernoulli(n, m, 0.5, seed=seed, allow_fewer=True)


def nearly_full(n: int, m: int, seed: int) -> Tensor:
    return subsets.bernoulli(n, m, 0.8, seed=seed, allow_fewer=True)


def mixed(n: int, m: int, seed: int) -> Tensor:
    return subsets.mixed_sizes(n, m, seed=seed, allow_fewer=True)


def uniform_pairs(n: int, m: int, seed: int) -> Tensor:
    return subsets.paired(n, m + m % 2, probability=0.5, seed=seed, allow_fewer=True)[:m]


def kernel_shap(n: int, m: int, seed: int) -> Tensor:
    """Pairs of complements whose smaller sizes s have weights ``1 / (s (n - s))``."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.arange(1, n)
    drawn = torch.multinomial(1.0 / (size * (n - size)), m, True, generator=generator) + 1
    parts = [
        subsets.fixed_size(n, int((drawn == s).sum()), s, seed=seed + s, allow_repeats=True)
        for s in range(1, n)
    ]
    first = torch.cat(parts)[torch.randperm(m, generator=generator)]
    masks = torch.stack([first, ~first], 1).reshape(-1, n)
    masks = torch.cat([masks, mixed(n, 2 * m, seed)])  # where sizes of few subsets ran out
    return masks[subsets.distinct_rows(masks)[1]][:m]


def chosen(readout: str, n: int, m: int, seed: int) -> Tensor:
    ends = torch.stack([torch.zeros(n), torch.ones(n)])
    return subsets.design(n, m, readout=readout, known=ends, seed=seed)


DESIGNS: dict[str, Callable[[int, int, int], Tensor]] = {
    BASE: mixed,
    "uniform": uniform,
    "Bernoulli .8": nearly_full,
    "kernel SHAP, pairs": kernel_shap,
    "borders, mixed sizes": partial(borders_first, mixed),
    "borders, uniform pairs": partial(borders_first, uniform_pairs),
    "borders, kernel SHAP": partial(borders_first, kernel_shap),
    **{f'design("{readout}")': partial(chosen, readout) for readout in READOUTS},
}


class Game:
    """A complete table of 2^n scores."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            masks, values = file["coalitions"].astype(bool), file["values"].astype(float)
        self.n = masks.shape[1]
        self.values = torch.empty(2**self.n, dtype=torch.float64)
        self.values[self._rows(torch.from_numpy(masks))] = torch.from_numpy(values)
        self.truth = exact_attributions(masks, values)

    def _rows(self, masks: Tensor) -> Tensor:
        return (masks.long() << torch.arange(self.n)).sum(1)

    def fit(self, masks: Tensor) -> ksm_ext.Surrogate:
        ends = torch.stack([torch.zeros(self.n), torch.ones(self.n)]).bool()
        masks = torch.cat([ends, masks])
        return ksm_ext.fit_surrogate(masks, self.values[self._rows(masks)], known=[0, 1])

    def error(self, surrogate: ksm_ext.Surrogate, readout: str) -> float:
        """Root mean square, relative."""
        if readout != "prediction":
            truth = torch.from_numpy(self.truth[readout])
            error, size = surrogate.attribute(readout) - truth, truth
        else:
            masks = mixed(self.n, 400, 10**6)
            fitted = set(self._rows(surrogate.masks.values).tolist())
            masks = masks[[row not in fitted for row in self._rows(masks).tolist()]]
            truth = self.values[self._rows(masks)]
            error, size = surrogate.predict(masks) - truth, truth - truth.mean()
        return float((error.square().mean() / size.square().mean()).sqrt())


def one_of_each_kind(data: Path) -> list[Game]:
    """The first game of every name, which ends in a number."""
    kinds = {path.stem.rpartition("_")[0]: path for path in sorted(data.glob("games/*.npz"))[::-1]}
    return [Game(path) for path in tqdm(sorted(kinds.values()), file=sys.stderr)]


def compare(games: list[Game], seeds: int) -> None:
    """Every design, by readout and number of subsets."""
    errors: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    cells = [(m, game, seed) for m in SIZES for game in games for seed in range(seeds)]
    for m, game, seed in tqdm(cells, file=sys.stderr):
        if 2 * m > 2**game.n + 64:
            continue  # nearly all subsets: nothing to choose
        for name, draw in DESIGNS.items():
            surrogate = game.fit(draw(game.n, m, seed))
            for readout in READOUTS:
                errors[readout, name, m].append(max(_FLOOR, game.error(surrogate, readout)))
    for readout in READOUTS:
        rows = []
        for name in DESIGNS:
            found = [(errors[readout, name, m], errors[readout, BASE, m]) for m in SIZES]
            ratios = [np.exp(np.mean(np.log(own) - np.log(base))) for own, base in found]
            means = [np.mean(own) for own, _ in found]
            rows.append([name, *(f"{r:.2f} ({e:.3f})" for r, e in zip(ratios, means, strict=True))])
        print(markdown([readout, *(f"{m} subsets" for m in SIZES)], rows), end="\n\n")


def adapt(games: list[Game], seeds: int, *, start: int = 30, batch: int = 10) -> None:
    """``next_best`` after every ten scores, and one design of as many subsets, at 60 and 120."""
    stops, ratios = (60, 120), defaultdict(list)
    for game, seed in tqdm([(g, s) for g in games for s in range(seeds)], file=sys.stderr):
        if game.n < 9:
            continue
        masks = chosen("shapley", game.n, start, seed)
        while len(masks) < max(stops):
            more = ksm_ext.next_best(game.fit(masks), batch, "shapley", seed=seed)
            masks = torch.cat([masks, torch.as_tensor(more)])
            if len(masks) in stops:
                once = game.fit(chosen("shapley", game.n, len(masks), seed))
                both = (game.error(fit, "shapley") for fit in (game.fit(masks), once))
                ratios[len(masks)].append(np.subtract(*np.log([max(_FLOOR, e) for e in both])))
    row = [f"{np.exp(np.mean(ratios[m])):.2f}" for m in stops]
    print(markdown(["next_best over one design", *(f"{m} subsets" for m in stops)], [["", *row]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--adaptive", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    games = one_of_each_kind(options.data)
    (adapt if options.adaptive else compare)(games, options.seeds)


if __name__ == "__main__":
    main()
