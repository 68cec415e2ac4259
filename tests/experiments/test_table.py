"""The table of methods: its metrics and their intervals."""

import pytest
import torch
from scipy.stats import spearmanr

from experiments import table
from ksm_ext.evaluation import loo_correlation, residual_error


def made_up():
    random = torch.Generator().manual_seed(0)
    loo = torch.randn(3, 9, 4, dtype=torch.float64, generator=random)
    scores = 5 + torch.randn(2, 15, 4, dtype=torch.float64, generator=random)
    return table.Results(loo, scores, list(torch.arange(15).chunk(5))), random


def test_the_table_holds_the_metrics_of_the_mean_run():
    results, random = made_up()
    tau = torch.randn(9, 4, dtype=torch.float64, generator=random)
    said = results.scores.mean(0) + torch.randn(15, 4, dtype=torch.float64, generator=random)
    row = table.judge("some", results, tau, said, 3, 1.5)
    truth, scores = results.loo.mean(0), results.scores.mean(0)
    metrics = row.metrics
    assert metrics["correlation"][0] == pytest.approx(float(loo_correlation(tau, truth).mean()))
    rank = loo_correlation(tau, truth, method="spearman").mean()
    assert metrics["rank_correlation"][0] == pytest.approx(float(rank))
    by_fold = [
        spearmanr(scores[fold, j], said[fold, j]).statistic
        for fold in results.folds
        for j in range(4)
    ]
    assert metrics["lds"][0] == pytest.approx(sum(by_fold) / len(by_fold))
    assert metrics["residual"][0] == pytest.approx(float(residual_error(scores, said, pooled=True)))
    for key in ("correlation", "lds", "residual", "relative", "relative_absolute"):
        value, low, high = metrics[key]
        assert low < high and low - 0.5 < value < high + 0.5
    assert "| some |" in table.as_text([row])


def test_intervals_narrow_with_more_rows():
    random = torch.Generator().manual_seed(0)

    def mean(runs, rows):
        return float(runs[rows].mean())

    widths = []
    for count in (20, 2000):
        runs = torch.randn(4, count, 1, generator=random)
        _, low, high = table.interval(mean, runs, torch.arange(count))
        widths.append(high - low)
    assert 5 < widths[0] / widths[1] < 20  # about 10, the root of 100
