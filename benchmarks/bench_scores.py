"""Logistic regressions of 1,000 subsets at once against a loop of scikit-learn's, in one run.

Same objective, without offsets as scikit-learn has none, to 1e-6: both are checked against the best
objective found by a run to 1e-10 on the first subsets.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import softplus

from ksm_ext.scores.logistic import fit_logistic
from ksm_ext.subsets import bernoulli

M, B, K, N, RIDGE = 1_000, 10_000, 512, 25, 1e-3


@pytest.fixture(scope="module")
def problem() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    features = 2 * torch.randn(B, K, generator=generator) / K**0.5
    chance = torch.sigmoid(features @ torch.randn(K, generator=generator))
    labels = 2 * (torch.rand(B, generator=generator) < chance).float() - 1
    return features, labels, torch.arange(N + 1) * (B // N), bernoulli(N, M, 0.5, seed=0)


def fit_ksm_ext(features, labels, offsets, masks) -> Callable[[], Tensor]:
    signed, margins = features * labels[:, None], torch.zeros(B)
    return lambda: fit_logistic(signed, margins, offsets, masks, RIDGE, tolerance=1e-6).weights


def fit_sklearn(features, labels, offsets, masks) -> Callable[[], Tensor]:
    x, y = features.numpy(), labels.numpy()
    inside = masks.repeat_interleave(offsets.diff(), 1).numpy()

    def run() -> Tensor:
        weights = []
        for rows in inside:
            model = LogisticRegression(
                C=1 / (RIDGE * rows.sum()), fit_intercept=False, tol=TOLERANCE, max_iter=1000
            )
            weights.append(model.fit(x[rows], y[rows]).coef_[0])
        return torch.from_numpy(np.stack(weights))

    return run


TOLERANCE = 1e-5  # of the gradient: the largest round one whose objectives are right to 1e-6
FITS = {"ksm_ext": fit_ksm_ext, "sklearn": fit_sklearn}


def objectives(features, labels, offsets, masks, weights) -> Tensor:
    inside = masks.repeat_interleave(offsets.diff(), 1)
    signed = (features * labels[:, None]).double()
    values = []
    for rows, w in zip(inside, weights.double(), strict=True):
        values.append(softplus(-signed[rows] @ w).mean() + RIDGE / 2 * w.square().sum())
    return torch.stack(values)


@pytest.mark.benchmark(group=f"logistic regressions of {M} subsets, b={B} k={K}")
@pytest.mark.parametrize("peer", FITS)
def bench_subset_regressions(benchmark, problem, peer) -> None:
    features, labels, offsets, masks = problem
    run = FITS[peer](*problem)
    weights = benchmark.pedantic(run, rounds=3 if peer == "ksm_ext" else 1)
    few = features, labels, offsets, masks[:20]
    signed, margins = (features * labels[:, None]).double(), torch.zeros(B, dtype=torch.float64)
    best = fit_logistic(signed, margins, offsets, masks[:20], RIDGE, tolerance=1e-12).weights
    gap = float((objectives(*few, weights[:20]) - objectives(*few, best)).max())
    print(f"\n{peer}: objectives within {gap:.1e}")
    assert gap <= 1e-6
