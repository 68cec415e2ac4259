"""A folder to run commands in."""

import pytest
from sweep import frame, surrogate


@pytest.fixture
def there(tmp_path, monkeypatch):
    """A folder with a table of scores and a fitted surrogate."""
    monkeypatch.chdir(tmp_path)
    frame().to_csv("scores.csv", index=False)
    surrogate().save("s")
    return tmp_path
