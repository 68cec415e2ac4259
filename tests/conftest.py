"""Devices, and a private random state for every test."""

import os

import pytest
import torch


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip CUDA tests without a device, unless the run promised one."""
    required = "KSM_EXT_REQUIRE_CUDA" in os.environ
    if item.get_closest_marker("cuda") and not torch.cuda.is_available() and not required:
        pytest.skip("no CUDA device")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish() -> None:
    """End a worker whose GPU an error has left unusable: another one goes on with the next test."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def private_random_state():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
