r"""Lasso and least squares on the tasks: the surrogates of the literature.

.. math:: \min_{b, w} \tfrac{1}{2m} \|y - b - W w\|^2 + \lambda \|w\|_1

scikit-learn's objective. All targets are solved together by covariance-update coordinate descent on
one Gram matrix, so 500 targets cost little more than one (``sklearn.linear_model.LassoCV`` refits
per target).

References: Ilyas et al. 2022, arXiv:2202.00622 (datamodels); Friedman et al. 2010 (the algorithm).
Shapes: features W (m, n), scores y (m, t), weights (n, t); float64.
"""

import numpy as np
import torch
from torch import Tensor

_PATH_LENGTH = 20
_PATH_RATIO = 3e-3
_MAX_SWEEPS = 300


def lasso_path(features: Tensor, scores: Tensor, penalties: Tensor, *, tol: float = 1e-4) -> Tensor:
    """Weights along a path of penalties, warm-started from the largest.

    Args:
        features: (m, n) centred columns.
        scores: (m, t) centred.
        penalties: (k, t) decreasing penalties of each target.
        tol: A sweep over the tasks that moves no weight by more than this share of the largest
            single-task weight of its target ends the descent of that target.

    Returns:
        (k, n, t).
    """
    # NumPy: the loop over tasks is many small steps, and PyTorch's cost per step is several times
    # the arithmetic. Targets that have converged leave the loop.
    x, y = features.cpu().numpy(), scores.cpu().numpy()
    gram, moment = x.T @ x / len(x), x.T @ y / len(x)  # (n, n), (n, t)
    curvature = np.maximum(gram.diagonal(), 1e-300)
    stop = tol * np.maximum(np.abs(moment / curvature[:, None]).max(0), 1e-300)  # (t,)
    weights = np.zeros_like(moment)
    path = []
    for penalty in penalties.cpu().numpy():
        active = np.arange(y.shape[1])
        for _ in range(_MAX_SWEEPS):
            current, rhs, bound = weights[:, active], moment[:, active], penalty[active]
            before = current.copy()
            for i in range(len(gram)):
                target = rhs[i] - gram[i] @ current + curvature[i] * current[i]
                # soft threshold: x - clip(x, -p, p)
                current[i] = (target - np.clip(target, -bound, bound)) / curvature[i]
            weights[:, active] = current
            moved = np.abs(current - before).max(0) > stop[active]
            active = active[moved]
            if not len(active):
                break
        path.append(weights.copy())
    return torch.from_numpy(np.stack(path)).to(features.device)


def fit_lasso(
    features: Tensor, scores: Tensor, folds: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with each target's penalty chosen by cross-validation.

    Args:
        features: (m, n).
        scores: (m, t).
        folds: (m,) int64 fold of each subset.
        weights: (m,) of the subsets' squared residuals, of mean 1; all 1 by default.

    Returns:
        weights (n, t), penalties (t,), cross-validated residuals (m, t) at these penalties.
    """
    weights = features.new_ones(len(features)) if weights is None else weights
    half = weights.sqrt()[:, None]

    def centred(rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Weighted means over ``rows``, and deviations from them times the root of the weights."""
        share = weights[rows] / weights[rows].sum()
        x, y = share @ features[rows], share @ scores[rows]
        return x, y, half[rows] * (features[rows] - x), half[rows] * (scores[rows] - y)

    *_, x, y = centred(torch.ones_like(folds, dtype=torch.bool))
    # (t,) empties the model, however sums round
    largest = (x.T @ y).abs().amax(0).clamp_min(1e-300) / len(x) * (1 + 1e-9)
    steps = torch.linspace(0, 1, _PATH_LENGTH, dtype=features.dtype, device=features.device)
    penalties = largest * _PATH_RATIO ** steps[:, None]  # (k, t)
    residuals = scores.new_empty(_PATH_LENGTH, *scores.shape)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        mean_x, mean_y, rest_x, rest_y = centred(~held)
        path = lasso_path(rest_x, rest_y, penalties, tol=1e-2)
        residuals[:, held] = scores[held] - mean_y - (features[held] - mean_x) @ path
    chosen = (weights[:, None] * residuals.square()).mean(1).argmin(0)  # (t,)
    columns = torch.arange(scores.shape[1], device=scores.device)
    coefficients = lasso_path(x, y, penalties)[chosen, :, columns].T
    return coefficients, penalties[chosen, columns], residuals[chosen, :, columns].T


def least_squares(features: Tensor, scores: Tensor) -> Tensor:
    """Minimum-norm least-squares weights (n, t), no intercept: the literature's linear surrogate.

    Singular values below ``1e-10`` of the largest count as zero: default tolerances misjudge the
    rank of 0/1 designs, and the solution then explodes.
    """
    return torch.linalg.pinv(features, rtol=1e-10) @ scores


def least_squares_residuals(features: Tensor, scores: Tensor) -> Tensor:
    """Leave-one-out residuals of :func:`least_squares` (m, t), by refitting without each subset."""
    rows = torch.arange(len(features), device=features.device)
    parts = []
    for i in range(len(features)):
        rest = rows != i
        parts.append(scores[i] - features[i] @ least_squares(features[rest], scores[rest]))
    return torch.stack(parts)
