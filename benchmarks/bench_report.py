"""The report of 2,000 tasks, 30 targets and 1,000 subsets: seconds, and bytes of its page.

    pytest benchmarks/bench_report.py

``fitted`` is the report of a surrogate that was just fitted, whose rank correlations nobody asked
for yet; ``stored`` is what ``ksm report`` does, from the file to the page. The last lines of the
run have the processor's seconds and the bytes.
"""

from collections.abc import Callable
from pathlib import Path
from time import process_time

import pytest
import torch

from ksm_ext import Surrogate, fit_surrogate, load_surrogate, subsets, write_report

N, T, M = 2_000, 30, 1_000


@pytest.fixture(scope="module")
def fit() -> Callable[[], Surrogate]:
    generator = torch.Generator().manual_seed(0)
    masks = subsets.mixed_sizes(N, M, seed=0)
    scores = masks.double() @ torch.randn(N, T, generator=generator).double()
    scores += torch.randn(M, T, generator=generator)
    names = {"task_names": [f"task {i}" for i in range(N)]}
    names["target_names"] = [f"score {j}" for j in range(T)]
    return lambda: fit_surrogate(masks, scores, kernel="rbf", **names)


@pytest.mark.parametrize("source", ["fitted", "stored"])
def bench_report(benchmark, fit, source, tmp_path: Path) -> None:
    page, path = tmp_path / "report.html", tmp_path / "surrogate"
    fit().save(path)
    spent: list[float] = []

    def write(surrogate: Surrogate | None) -> None:
        start = process_time()
        write_report(load_surrogate(path) if surrogate is None else surrogate, page)
        spent.append(process_time() - start)

    def setup() -> tuple[tuple[Surrogate | None], dict]:
        return (fit() if source == "fitted" else None,), {}

    benchmark.pedantic(write, setup=setup, rounds=3, warmup_rounds=1)
    benchmark.extra_info |= {"processor seconds": min(spent), "bytes": page.stat().st_size}
    assert page.stat().st_size < 2**20
