"""Every row of ``rows.py`` on the CPU: the operators of ksm_ext against their peers.

    pytest benchmarks -k mask_gram_matmul
    pytest benchmarks/bench_ops.py --small --benchmark-disable    # checks the results, in seconds

Every peer gets its inputs in the form it likes best, and its result is compared with a float64
formula, or its expectation, once before it is timed. Peak memory is that of one call in a process
of its own.
"""

import subprocess
import time

import pytest
import torch
from peak_memory import needs_linux, peak_growth
from rows import Row, rows_of

MOST_ROUNDS, SECONDS = 9, 4.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    scale = "small" if metafunc.config.getoption("small") else "cpu"
    cases = [
        pytest.param(row, name, id=f"{row.title}-{name}")
        for row in rows_of(scale)
        if metafunc.function is bench_operator or (row.memory and scale == "cpu")
        for name in row.problem(torch.device("meta")).methods  # where tensors have no memory
        # A CPU without instructions for bfloat16 takes minutes.
        if scale == "small" or not ("torch" in name and "bfloat16" in row.name + name)
    ]
    metafunc.parametrize("row, peer", cases)


def bench_operator(benchmark, row: Row, peer: str) -> None:
    benchmark.group = f"{row.title}, {torch.get_num_threads()} threads"
    benchmark.params = {"row": row.title, "peer": peer}
    torch.manual_seed(0)
    problem = row.problem(torch.device("cpu"))
    expected = problem.expected()
    try:
        run = problem.methods[peer]()
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    if peer not in problem.others:
        problem.check(result, expected)
    del result
    benchmark.pedantic(run, rounds=min(MOST_ROUNDS, 1 + int(SECONDS / seconds)))


PREPARE = """
import torch
from rows import rows_of
[row] = [row for row in rows_of("cpu") if row.title == {title!r}]
run = row.problem(torch.device("cpu")).methods[{peer!r}]()
"""


@needs_linux
def bench_memory(capsys, row: Row, peer: str) -> None:
    try:
        growth = peak_growth(PREPARE.format(title=row.title, peer=peer))
    except subprocess.CalledProcessError as error:
        if "ModuleNotFoundError" in error.stderr:
            pytest.skip(error.stderr.splitlines()[-1])
        raise
    with capsys.disabled():
        print(f"\n{row.title}: {growth:.0f} MiB more for {peer}")
    if peer == "ksm_ext":
        assert growth <= row.memory
