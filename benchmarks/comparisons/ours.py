"""Surrogates of the build under test, as the command line names them."""

from typing import Any

import numpy as np

import ksm_ext


def fit_ours(spec: str, masks: np.ndarray, scores: np.ndarray, **options: Any) -> Any:
    """A surrogate: ``spec`` is a kernel, then options, such as ``"auto:criterion=rank"``."""
    kernel, *pairs = spec.split(":")
    named = dict(pair.split("=") for pair in pairs)
    return ksm_ext.fit_surrogate(masks, scores, kernel=kernel, **{**options, **named})
