import pytest

from experiments.common import one_thread


@pytest.fixture(autouse=True)
def small_sums():
    """One thread: more would cost small networks time, and change the order of sums."""
    with one_thread():
        yield
