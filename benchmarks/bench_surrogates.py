"""Whole fits and readouts against scikit-learn, in one run.

``kernel="rbf"`` with its search over gamma and ridge, against ``KernelRidge`` in a 5-fold
``GridSearchCV`` over the same grid (minutes), of many subsets and of 20; many small tables together
against one after the other; and exact Shapley values of 10,000 tasks.
"""

from collections.abc import Callable

import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV

import ksm_ext
from ksm_ext.evaluation import residual_error
from ksm_ext.surrogates.kernels import RBF
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.trials import RELATIVE_RIDGES

M, N, T = 2_000, 100, 500


@pytest.fixture(scope="module")
def problem() -> tuple[np.ndarray, ...]:
    """Main effects, 200 pairs and noise; 2,000 subsets to fit and 500 held out."""
    generator = np.random.default_rng(0)
    masks = ksm_ext.subsets.bernoulli(N, M + 500, 0.5, seed=0).numpy()
    pairs = generator.integers(0, N, (200, 2))
    scores = masks @ generator.normal(size=(N, T))
    scores += (masks[:, pairs[:, 0]] & masks[:, pairs[:, 1]]) @ generator.normal(size=(200, T))
    scores += generator.normal(size=scores.shape) * 3
    return masks[:M], scores[:M], masks[M:], scores[M:]


def fit_ksm_ext(masks: np.ndarray, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return ksm_ext.fit_surrogate(masks, scores, kernel="rbf").predict


def fit_sklearn(masks: np.ndarray, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The same grid, refitted in five folds."""
    grid = RBF().grid(Masks.of(masks))
    scale = float(SpectralRidge(grid[len(grid) // 2].gram(Masks.of(masks))).scale)
    choices = {
        "gamma": [kernel.gamma for kernel in grid if isinstance(kernel, RBF)],
        "alpha": [relative * scale for relative in RELATIVE_RIDGES],
    }
    search = GridSearchCV(KernelRidge(kernel="rbf"), choices, cv=5)
    mean = scores.mean(0)
    search.fit(masks.astype(float), scores - mean)
    return lambda held: search.predict(held.astype(float)) + mean


FITS = {"ksm_ext": fit_ksm_ext, "sklearn": fit_sklearn}
ERRORS: dict[str, float] = {}


@pytest.mark.benchmark(group=f"fit rbf, gamma and ridge searched, m={M} n={N} t={T}")
@pytest.mark.parametrize("peer", FITS)
def bench_fit_rbf(benchmark, problem, peer) -> None:
    masks, scores, held, truth = problem
    rounds = 3 if peer == "ksm_ext" else 1
    predict = benchmark.pedantic(FITS[peer], (masks, scores), rounds=rounds)
    ERRORS[peer] = float(residual_error(truth, predict(held), pooled=True))
    benchmark.extra_info["held-out error"] = ERRORS[peer]
    print(f"\n{peer}: held-out error {ERRORS[peer]:.4f} of the variance")
    if len(ERRORS) == len(FITS):
        assert ERRORS["ksm_ext"] <= 1.005 * ERRORS["sklearn"]


def small_tables(count: int, num_targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Tables of 20 different subsets of 10 tasks: main effects and noise."""
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(1023)[:20] + 1 for _ in range(count)]  # without the empty one
    masks = (np.stack(drawn)[..., None] >> np.arange(10)) & 1
    scores = masks @ generator.normal(size=(count, 10, num_targets))
    return masks, scores + 0.3 * generator.normal(size=scores.shape)


@pytest.mark.parametrize("num_targets", [1, 20])
@pytest.mark.parametrize("peer", ["ksm_ext, auto", "ksm_ext, rbf", "sklearn, rbf"])
def bench_small_fit(benchmark, num_targets, peer) -> None:
    benchmark.group = f"fit of 20 subsets, n=10 t={num_targets}"
    masks, scores = (table[0] for table in small_tables(1, num_targets))
    library, kernel = peer.split(", ")
    if library == "sklearn":
        benchmark.pedantic(fit_sklearn, (masks, scores), rounds=1)
        return
    fit = ksm_ext.fit_surrogate
    benchmark.pedantic(fit, (masks, scores), {"kernel": kernel}, rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("num_targets", [1, 20])
@pytest.mark.parametrize("way", ["together", "one by one"])
def bench_many_small_fits(benchmark, num_targets, way) -> None:
    tables = 400 if num_targets == 1 else 60
    benchmark.group = f"{tables} fits of 20 subsets, n=10 t={num_targets}"
    masks, scores = small_tables(tables, num_targets)
    if way == "together":
        benchmark.pedantic(ksm_ext.fit_many, (masks, scores), rounds=3, warmup_rounds=1)
        return

    def loop() -> None:
        for table, outcome in zip(masks, scores, strict=True):
            ksm_ext.fit_surrogate(table, outcome)

    benchmark.pedantic(loop, rounds=1)


@pytest.mark.benchmark(group="exact Shapley values, n=10000 m=2000")
def bench_shapley_of_ten_thousand_tasks(benchmark) -> None:
    masks = ksm_ext.subsets.bernoulli(10_000, 2_000, 0.5, seed=0)
    scores = masks[:, :100].double().sum(1)
    fitted = ksm_ext.fit_surrogate(masks, scores, kernel=RBF(gamma=2e-4), ridge=1e-3)
    benchmark.pedantic(fitted.attribute, ("shapley",), rounds=5)
