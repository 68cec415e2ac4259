r"""Lasso and least squares on the tasks: the surrogates of the literature.

.. math:: \min_{b, w} \tfrac{1}{2m} \|y - b - W w\|^2 + \lambda \|w\|_1

scikit-learn's objective. All targets, penalties, folds and tables are solved together by
covariance-update coordinate descent on one Gram matrix of each fold, so 500 targets cost little
more than one (``sklearn.linear_model.LassoCV`` refits per target).

References: Ilyas et al. 2022, arXiv:2202.00622 (datamodels); Friedman et al. 2010 (the algorithm).
Shapes: features W (..., m, n), scores y (..., m, t), weights (..., n, t), k penalties; leading
dimensions are a batch; float64.
"""

import numpy as np
import torch
from torch import Tensor

_PATH_LENGTH = 20
_PATH_RATIO = 3e-3
_MAX_SWEEPS = 300
_CROWDED = 0.6  # share of columns that still move, below which the others are taken out of the way


def lasso_path(features: Tensor, scores: Tensor, penalties: Tensor, *, tol: float = 1e-4) -> Tensor:
    """Weights at every penalty.

    Args:
        features: (..., m, n) centred columns.
        scores: (..., m, t) centred.
        penalties: (..., k, t) of each target.
        tol: A sweep over the tasks that moves no weight by more than this share of the largest
            single-task weight of its target ends the descent of that target at that penalty.

    Returns:
        (..., k, n, t).
    """
    m = features.shape[-2]
    return _descended(features.mT @ features / m, features.mT @ scores / m, penalties, tol)


def _descended(gram: Tensor, moment: Tensor, penalties: Tensor, tol: float) -> Tensor:
    """Weights (..., k, n, t) from ``x^T x / m`` (..., n, n) and ``x^T y / m`` (..., n, t)."""
    *batch, n, t = moment.shape
    k = penalties.shape[-2]
    # NumPy: the loop over tasks is many small steps, and PyTorch's cost per step is several times
    # the arithmetic. A column is a target at a penalty; those that have converged leave the loop.
    curvature = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300)[..., None]  # (..., n, 1)
    single = moment / curvature  # the weights of tasks on their own
    couplings = gram / curvature  # of a task with others
    couplings.diagonal(dim1=-2, dim2=-1).zero_()
    most = penalties[..., None, :, :] / curvature[..., None]  # (..., n, k, t)

    def flat(table: Tensor) -> np.ndarray:
        """(..., n, k, t) as (size, n, k t)."""
        return table.reshape(-1, n, k * t).cpu().numpy()

    rows = couplings.reshape(-1, n, n).cpu().numpy()
    start, bound = flat(single[..., None, :].expand_as(most)), flat(most)
    stop = tol * np.maximum(np.abs(start).max(1), 1e-300)  # (size, k t)
    weights = np.zeros_like(start)
    left = np.ones_like(stop, dtype=bool)
    sweeps = 0
    while sweeps < _MAX_SWEEPS and left.any():
        problem, column = np.flatnonzero(left.any(1)), np.flatnonzero(left.any(0))
        at, cells = np.ix_(problem, column), np.ix_(problem, np.arange(n), column)
        its, those, enough = weights[cells], left[at], stop[at]
        each = (rows[problem], start[cells], bound[cells], its)
        steps = [
            (row[:, None], *step)
            for row, *step in zip(*(x.swapaxes(0, 1) for x in each), strict=True)
        ]
        while sweeps < _MAX_SWEEPS and min(those.any(0).mean(), those.any(1).mean()) > _CROWDED:
            before = its.copy()
            for row, single_i, most_i, weight in steps:
                target = single_i - np.matmul(row, its)[:, 0]
                # soft threshold: x - clip(x, -p, p)
                target -= np.minimum(np.maximum(target, -most_i), most_i)
                np.copyto(weight, target, where=those)
            those &= np.abs(its - before).max(1) > enough
            sweeps += 1
        weights[cells], left[at] = its, those
    found = torch.from_numpy(weights).reshape(*batch, n, k, t).movedim(-3, -2)
    return found.to(gram.device)


def fit_lasso(
    features: Tensor, scores: Tensor, folds: Tensor, weights: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights with each target's penalty chosen by cross-validation.

    Args:
        features: (..., m, n).
        scores: (..., m, t).
        folds: (m,) int64 fold of each subset.
        weights: (..., m) of the subsets' squared residuals, of mean 1; all 1 by default.

    Returns:
        weights (..., n, t), penalties (..., t), cross-validated residuals (..., m, t) at these
        penalties.
    """
    weights = features.new_ones(features.shape[:-1]) if weights is None else weights
    penalties, residuals = cross_validated_lasso(features, scores, folds, weights)
    return lasso(features, scores, penalties, weights), penalties, residuals


def lasso(features: Tensor, scores: Tensor, penalties: Tensor, weights: Tensor) -> Tensor:
    """Weights (..., n, t) at the penalty (..., t) of each target, see :func:`fit_lasso`."""
    _, _, x, y = _centred(features, scores, weights)
    return lasso_path(x, y, penalties[..., None, :])[..., 0, :, :]


def cross_validated_lasso(
    features: Tensor, scores: Tensor, folds: Tensor, weights: Tensor, *, tol: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Penalties (..., t) and residuals (..., m, t) at them, see :func:`fit_lasso`."""
    _, _, x, y = _centred(features, scores, weights)
    m = features.shape[-2]
    # empties the model, however sums round
    largest = (x.mT @ y).abs().amax(-2).clamp_min(1e-300) / m * (1 + 1e-9)  # (..., t)
    steps = torch.linspace(0, 1, _PATH_LENGTH, dtype=features.dtype, device=features.device)
    penalties = largest[..., None, :] * _PATH_RATIO ** steps[:, None]  # (..., k, t)
    number = torch.arange(int(folds.max()) + 1, device=folds.device)
    rest = folds != number[:, None]  # (F, m)
    known = weights[..., None, :] * rest  # (..., F, m)
    mean_x, mean_y, x, y = _centred(features[..., None, :, :], scores[..., None, :, :], known)
    count = rest.sum(1)[:, None, None]
    of_folds = penalties[..., None, :, :].expand(*known.shape[:-1], *penalties.shape[-2:])
    path = _descended(x.mT @ x / count, x.mT @ y / count, of_folds, tol)  # (..., F, k, n, t)
    residuals = scores.new_empty(*scores.shape[:-2], _PATH_LENGTH, *scores.shape[-2:])
    for fold in number.tolist():
        held = folds == fold
        rows = features[..., held, :] - mean_x[..., fold, :, :]
        outcome = scores[..., held, :] - mean_y[..., fold, :, :]
        predicted = rows[..., None, :, :] @ path[..., fold, :, :, :]  # (..., k, held, t)
        residuals[..., held, :] = outcome[..., None, :, :] - predicted
    squares = weights[..., None, :, None] * residuals.square()
    chosen = squares.mean(-2).argmin(-2)[..., None, :]  # (..., 1, t)
    return (
        penalties.gather(-2, chosen)[..., 0, :],
        residuals.take_along_dim(chosen[..., None, :], -3)[..., 0, :, :],
    )


def _centred(
    features: Tensor, scores: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weighted means (..., 1, n) and (..., 1, t), deviations from them times roots of weights."""
    share = (weights / weights.sum(-1, keepdim=True))[..., None, :]
    mean_x, mean_y, half = share @ features, share @ scores, weights.sqrt()[..., None]
    return mean_x, mean_y, half * (features - mean_x), half * (scores - mean_y)


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
