"""Surrogates of the build under test, as the command line names them."""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

import ksm_ext


def fit_ours(spec: str, masks: np.ndarray, scores: np.ndarray) -> Any:
    """A surrogate: ``spec`` is a kernel, then options, such as ``"auto:noise_std=0"``."""
    kernel, *pairs = spec.split(":")
    options: dict[str, Any] = dict(pair.split("=") for pair in pairs)
    for name, value in options.items():
        with suppress(ValueError):  # words stay words
            options[name] = float(value)
    return ksm_ext.fit_surrogate(masks, scores, kernel=kernel, **options)


def variants(specs: Sequence[str]) -> list[str]:
    """The first kernel, and the same with other options."""
    return [spec for spec in specs if spec.split(":")[0] == specs[0].split(":")[0]]
