r"""Kernel and ridge by leave-one-group-out errors, where rows belong together.

Rows of one batch of runs, or of one family of subsets, resemble each other, so that leaving out one
of them says little of rows elsewhere. Leaving out all rows of a group G takes no refitting either:

.. math:: y_G - F_{-G}(S_G) = P_{GG}^{-1} \alpha_G

with alpha and P of the fit to all rows (:mod:`.spectral`), the intercept fitted anew each time.

Shapes: m rows, n tasks, t targets, R ridges.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from ksm_ext.checks import check_several, message
from ksm_ext.surrogates.kernels import Kernel
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.spectral import SpectralRidge
from ksm_ext.surrogates.trials import RELATIVE_RIDGES


def chosen_by_groups(
    kernels: Sequence[Kernel],
    masks: Masks,
    scores: Tensor,
    groups: Sequence[Hashable],
    *,
    weights: Tensor,
    ridge: float | None = None,
    center: bool = True,
) -> tuple[Kernel, float, float]:
    """The kernel and ridge with the smallest leave-one-group-out error, and that error.

    Args:
        kernels: What is compared, each at :data:`.trials.RELATIVE_RIDGES`.
        masks: (m, n).
        scores: (m, t) float64; NaN where missing.
        groups: m labels.
        weights: (m,) float64 of the rows; those of 0 are left out.
        ridge: Replaces the search of ridges.
        center: Whether an intercept is fitted.

    Returns:
        Kernel, ridge, and the squared error in variances of the scores, the mean over the targets
        that vary.

    Raises:
        TypeError: If ``groups`` is no list.
        ValueError: If there are other than m labels, or one group has all scores of a target.
    """
    places = group_places(groups, len(scores))
    relative = torch.tensor(RELATIVE_RIDGES, dtype=torch.float64)
    best: tuple[float, Kernel, float] | None = None
    for kernel in kernels:
        gram = kernel.gram(masks)
        ridges = (
            relative * float(gram.diagonal().mean()) if ridge is None else relative.new([ridge])
        )
        errors = _errors(gram, scores, places, ridges, weights, center)
        at = int(errors.argmin())
        if best is None or float(errors[at]) < best[0]:
            best = float(errors[at]), kernel, float(ridges[at])
    assert best is not None
    return best[1], best[2], best[0]


def group_places(groups: Sequence[Hashable], count: int) -> Tensor:
    """(count,) int64 number of the group of each row, see :func:`chosen_by_groups`."""
    labels = check_several("groups", groups, "labels, one for each row")
    if len(labels) != count:
        remedy = "Say for each row in which group it is."
        raise ValueError(message("groups", f"of {count} labels", str(len(labels)), remedy))
    labels = [label.item() if hasattr(label, "item") else label for label in labels]
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([number[label] for label in labels])


def _errors(
    gram: Tensor, scores: Tensor, places: Tensor, ridges: Tensor, weights: Tensor, center: bool
) -> Tensor:
    """(R,) errors of a kernel; targets that were scored on the same rows are left out together."""
    counted = ~scores.isnan() & (weights > 0)[:, None]
    patterns, index = torch.unique(counted, dim=1, return_inverse=True)
    total, count = torch.zeros_like(ridges), 0
    for number, seen in enumerate(patterns.T):
        values, share = scores[seen][:, index == number], weights[seen] / weights[seen].sum()
        spread = share @ (values - share @ values).square()
        values = values[:, spread > 0]
        factor = SpectralRidge(gram[seen][:, seen], center=center, weights=weights[seen])
        if len(ridges) == 1:
            factor.check_ridge(float(ridges[0]))
        groups = [(places[seen] == place).nonzero()[:, 0] for place in places[seen].unique()]
        if len(groups) < 2:
            remedy = "Leave them out where no rows belong together."
            raise ValueError(message("groups", "two or more for every target", "one", remedy))
        left_out = factor.leave_groups_out(factor.rotate(values), ridges, groups)  # (R, m, t)
        squares = torch.einsum("rmt,m->rt", left_out.square(), share) / spread[spread > 0]
        total, count = total + squares.sum(1), count + values.shape[1]
    return total / max(count, 1)
