"""The error of a surrogate by how many of its subsets it is given.

Shapes: masks (m, n), scores (m, t).
"""

from typing import Any

import torch

from ksm_ext.surrogates.fit import fit_surrogate
from ksm_ext.surrogates.surrogate import Surrogate

_FEWEST = 8  # subsets that a point of the curve is fitted to
_MOST = 2048  # subsets of which half are fitted again in the time that a page may take


def errors_by_count(surrogate: Surrogate, *, seed: int = 0) -> list[tuple[int, float]]:
    """Errors of the kernels in use, fitted to an eighth, a quarter and half of the subsets.

    Each fit chooses its own ridge and predicts the subsets that it was not given; the subsets of
    one are among those of the next. The last point is the leave-one-out error of the surrogate.

    Args:
        surrogate: What :func:`ksm_ext.fit_surrogate` returned.
        seed: Of the order in which subsets are given.

    Returns:
        Numbers of subsets with mean squared errors over the variance of the scores, the mean over
        targets. Nothing for fewer than 64 or more than 2,048 subsets, nor where nothing is
        predicted, or with estimates, which are not fitted again.
    """
    surrogate = surrogate.with_tensor_answers()
    terms = [term for term in surrogate.kernel_terms if bool(term.dual.any())]
    used = [row.kernel for row in surrogate.candidates if row.num_chosen]
    kernels: list[Any] = list({repr(term.kernel): term.kernel for term in terms}.values())
    kernels += [name for name in ("lasso", "least_squares") if name in used]
    m = len(surrogate.masks)
    if not kernels or surrogate.trend is not None or not 8 * _FEWEST <= m <= _MOST:
        return []
    masks, scores = surrogate.masks.values.cpu(), surrogate.scores.cpu()
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    points = []
    for size in (m // 8, m // 4, m // 2):
        given, rest = order[:size], order[size:]
        if bool((~scores[given].isnan()).sum(0).lt(3).any()):
            continue
        fitted = fit_surrogate(masks[given], scores[given], kernel=kernels, missing="drop")
        errors = (fitted.predict(masks[rest]) - scores[rest]).square()
        points.append((size, float((errors.nanmean(0) / variances_of(scores)).mean())))
    return [*points, (m, float(surrogate.loo_error.mean()))]


def variances_of(scores: torch.Tensor) -> torch.Tensor:
    """(t,) variances of the scores (m, t) that are there; 1 for a target that does not vary."""
    found = (scores - scores.nanmean(0)).square().nanmean(0)
    return torch.where(found > 0, found, torch.ones_like(found))
