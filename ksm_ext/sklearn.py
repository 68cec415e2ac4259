"""Surrogates as scikit-learn regressors: pipelines, grid searches and cross-validation of them.

Needs scikit-learn, which nothing else in the package does. ``X`` holds the masks and ``y`` the
scores of :func:`ksm_ext.fit_surrogate`; all answers are NumPy arrays, as of scikit-learn's own
regressors. Features that are not 0/1 are real weights: every kernel is defined on them, Shapley and
Banzhaf values and interactions are not.

Shapes: X (m, n), y (m,) or (m, t).
"""

from typing import Any, Literal

import numpy as np
import torch

from ksm_ext.arrays import ArrayLike, aligned, as_tensor, names_along, table_library
from ksm_ext.checks import message
from ksm_ext.evaluation import lds
from ksm_ext.surrogates.fit import fit_surrogate
from ksm_ext.surrogates.group_choice import chosen_by_groups
from ksm_ext.surrogates.kernels import Kernel, KernelChoice
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.observations import row_weights
from ksm_ext.surrogates.options import Criterion, Missing, Readout, ShareRidge, Warp

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.metrics import r2_score
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    remedy = "Run: pip install 'ksm_ext[sklearn]'."
    raise ImportError(message("scikit-learn", "installed", "no such module", remedy)) from error


class SurrogateRegressor(RegressorMixin, BaseEstimator):
    """:func:`ksm_ext.fit_surrogate` as a scikit-learn regressor; its arguments mean the same there.

    What is said of single rows goes to :meth:`fit`: ``sample_weight`` and ``groups``, which folds
    and searches pass on where metadata routing is enabled and ``set_fit_request(sample_weight=True,
    groups=True)`` asks for them. ``known`` and ``noise_std`` by row are left out. Rows of one
    subset are repeats here too.

    With ``kernel="linear"`` and a number for ``ridge`` it is ``sklearn.linear_model.Ridge`` with
    ``alpha=ridge``. ``score`` is R², as of every regressor; :func:`lds_score` is the linear
    datamodeling score.

    Attributes:
        surrogate_: The fitted :class:`ksm_ext.Surrogate`.
        n_features_in_: n.
        feature_names_in_: n names, which name the tasks too, if ``X`` was a table with names.
        group_error_: With ``groups``, the squared leave-one-group-out error in variances of the
            scores, the mean over targets.

    Example:
        >>> X = [[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 1, 1], [1, 0, 0], [0, 1, 0]]
        >>> y = [3.0, 1.0, 2.0, 3.0, 1.0, 2.0]
        >>> SurrogateRegressor(kernel="linear").fit(X, y).attribute("shapley").round(1)
        array([1., 2., 0.])
    """

    def __init__(
        self,
        *,
        kernel: KernelChoice = "auto",
        ridge: Literal["loo"] | float = "loo",
        criterion: Criterion = "error",
        warp: Warp = "identity",
        share_ridge: ShareRidge = "auto",
        center: bool = True,
        noise_std: float | None = None,
        missing: Missing = "error",
    ) -> None:
        self.kernel = kernel
        self.ridge = ridge
        self.criterion = criterion
        self.warp = warp
        self.share_ridge = share_ridge
        self.center = center
        self.noise_std = noise_std
        self.missing = missing

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn may expect: several targets, and no missing values."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(
        self,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        groups: ArrayLike | None = None,
    ) -> "SurrogateRegressor":
        """Fit the surrogate.

        Args:
            X: (m, n). Which tasks were in each of the m >= 3 subsets, or real weights.
            y: (m,) or (m, t) float. Their scores, NaN among them with ``missing="drop"``.
            sample_weight: (m,) float. How many runs each row is as sure as; by default one.
            groups: (m,) labels. Rows that belong together (a batch of runs, a family of subsets)
                are left out together where kernel and ridge are chosen: one kernel and ridge for
                all targets, of those that are tried without groups, with the smallest
                leave-one-group-out error, which ``group_error_`` is. The fit is that of this kernel
                and ridge, given. Of few groups, the error is worth more than the choice.

        Returns:
            This regressor.

        Raises:
            ValueError: If shapes disagree, values are not finite, or nothing varies; see
                :func:`ksm_ext.fit_surrogate`. If ``groups`` are given with another criterion than
                ``"error"``, ``share_ridge=False``, or nothing but lasso or least squares.
        """
        X, y, sample_weight, groups = _in_one_order(X, y, sample_weight, groups)
        target_names = names_along(y, 1)
        rows = {"ensure_min_samples": 3}
        if self.missing == "drop":
            scores = {"ensure_2d": False, "ensure_all_finite": "allow-nan"}
            X, y = validate_data(self, X, y, validate_separately=(rows, scores | rows))
        else:
            X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, **rows)
        options = self.get_params(deep=False) | {
            "sample_weight": sample_weight,
            "task_names": getattr(self, "feature_names_in_", None),
            "target_names": target_names,
        }
        self.surrogate_ = fit_surrogate(X, y, **options)
        if hasattr(self, "group_error_"):
            del self.group_error_  # of an earlier fit
        if groups is not None:
            options |= self._by_groups(X, y, sample_weight, groups)
            self.surrogate_ = fit_surrogate(X, y, **options)
        return self

    def _by_groups(self, X: Any, y: Any, sample_weight: Any, groups: Any) -> dict[str, Any]:
        """Kernel and ridge as groups choose them, of those that the fit without groups tried."""
        remedy = "Leave out the groups, or this."
        if self.criterion != "error":
            found = repr(self.criterion)
            raise ValueError(message("criterion", "'error' with groups", found, remedy))
        if self.share_ridge is False:
            raise ValueError(message("share_ridge", "'auto' or True with groups", "False", remedy))
        tried = [kernel for each in self.surrogate_.candidates.tried for kernel in _kernels(each)]
        varying = self.surrogate_.varying
        if not bool(varying.all()):  # those that know tasks know only the ones that vary
            n = int(varying.sum())
            tried = [k for k in tried if not any(p.by_task for p in k.products(n))]
        if not tried:
            raise ValueError(message("kernel", "a kernel with groups", repr(self.kernel), remedy))
        scores = as_tensor("y", y).to(torch.float64).reshape(len(y), -1)
        weights = np.ones(len(y)) if sample_weight is None else sample_weight
        kernel, ridge, self.group_error_ = chosen_by_groups(
            list(dict.fromkeys(tried)),
            Masks(Masks.of(X).values[:, varying]),
            scores,
            groups,
            weights=row_weights(weights, len(y)),
            ridge=None if self.ridge == "loo" else float(self.ridge),
            center=self.center,
        )
        return {"kernel": kernel, "ridge": ridge, "share_ridge": True}

    def predict(self, X: ArrayLike, return_std: bool = False) -> Any:
        """Predicted scores (l,) or (l, t) of subsets (l, n); see :meth:`Surrogate.predict`."""
        check_is_fitted(self)
        (X,) = aligned({"X": (X, "subset", "task")})
        X = validate_data(self, X, reset=False)
        return self.surrogate_.predict(X, return_std)

    def score(self, X: ArrayLike, y: ArrayLike, sample_weight: ArrayLike | None = None) -> float:
        """R² of predictions, the mean over targets; of scores that are there, with ``missing``.

        Args:
            X: (l, n). Subsets.
            y: (l,) or (l, t) float. Their scores.
            sample_weight: (l,) float. What each row counts.
        """
        X, y, sample_weight, _ = _in_one_order(X, y, sample_weight)
        if self.missing != "drop":
            return float(super().score(X, y, sample_weight))
        tables = (np.atleast_2d(np.asarray(table).T) for table in (y, self.predict(X)))
        found = []
        for true, guess in zip(*tables, strict=True):
            seen = ~np.isnan(true)
            weights = None if sample_weight is None else np.asarray(sample_weight)[seen]
            found.append(r2_score(true[seen], guess[seen], sample_weight=weights))
        return float(np.mean(found))

    def attribute(self, readout: Readout = "loo", return_std: bool = False) -> Any:
        """Attributions (n,) or (n, t) of the tasks; see :meth:`Surrogate.attribute`."""
        check_is_fitted(self)
        return self.surrogate_.attribute(readout, return_std)

    def interactions(self, readout: Readout = "loo", return_std: bool = False) -> Any:
        """Interactions (n, n) or (n, n, t) of pairs; see :meth:`Surrogate.interactions`."""
        check_is_fitted(self)
        return self.surrogate_.interactions(readout, return_std)


def lds_score(
    estimator: Any, X: ArrayLike, y: ArrayLike, *, constant: Literal["error", "zero"] = "error"
) -> float:
    """Scorer: linear datamodeling score on held-out subsets, the mean over targets.

    Pass it as ``scoring`` to ``cross_val_score`` or ``GridSearchCV``, with any regressor.

    Args:
        estimator: A fitted regressor.
        X: (l, n). Held-out subsets, l at least 2.
        y: (l,) or (l, t) float. Their scores.
        constant: Whether a target that is constant over the subsets is an error, or counts as
            zero, as in :func:`ksm_ext.evaluation.lds` (``functools.partial`` makes that a scorer).

    Returns:
        In [-1, 1]; see :func:`ksm_ext.evaluation.lds`.

    Raises:
        ValueError: If a target is constant over the subsets: no correlation exists.
    """
    X, y, *_ = _in_one_order(X, y)
    return float(np.mean(lds(np.asarray(y), estimator.predict(X), constant=constant)))


def _in_one_order(
    X: ArrayLike, y: ArrayLike, sample_weight: Any = None, groups: Any = None
) -> tuple[Any, Any, Any, Any]:
    """All of them in the order of the subsets where they have labels of rows."""
    tables: dict[str, Any] = {"X": (X, "subset", "task"), "y": (y, "subset", "target")}
    of_rows = {"sample_weight": sample_weight, "groups": groups}
    labelled = {name: (each, "subset") for name, each in of_rows.items() if table_library(each)}
    X, y, *rest = aligned(tables | labelled)
    of_rows |= dict(zip(labelled, rest, strict=True))
    return X, y, of_rows["sample_weight"], of_rows["groups"]


def _kernels(tried: Any) -> list[Kernel]:
    """The kernels among what was judged together."""
    return [each for each, _ in getattr(tried, "predictors", ()) if isinstance(each, Kernel)]
