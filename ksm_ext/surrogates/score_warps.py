r"""Monotone maps g of scores: a surrogate of ``g(F)``, mapped back, may predict F better.

Scores that saturate (accuracies near 1, losses near 0) answer less and less to more tasks; after a
map that undoes it, effects are closer to additive, and fewer subsets show them.

==========  ==============================================================================
warp        g(y)
==========  ==============================================================================
``log``     ``log y``, of positive scores
``logit``   logit of ``1/2 + (1 - 1/m) (y - 1/2)``, of scores in [0, 1]: shrunk so that 0 and
            1 have a finite place (Smithson & Verkuilen 2006)
``normal``  normal scores: the standard normal quantile of ``(rank - 1/2) / m``, ranks of ties
            averaged, joined by a monotone spline
==========  ==============================================================================

**Back.** A prediction z of ``g(F(S))`` is one of ``g(F(S))``'s mean, and what it leaves out is as
large as leave-one-out residuals, of root mean square s. So the prediction of F is the mean (after
Duan 1983)

.. math:: \hat F(S) = E\, g^{-1}(z + s\,\varepsilon), \qquad \varepsilon \sim N(0, 1)

which is again monotone in z; at a subset whose score is known it is that score. Its standard
deviation is such that ``2 * 1.96 std`` is the width of the 95 % interval of ``g(F(S))``, both ends
mapped back.

Only predictions are mapped: attributions and interactions are those of the surrogate of F itself,
in the unit of the scores. (Those of ``g(F)`` are in another unit, and differences of predictions
mapped back are no better than they: Shapley values of games are further off by a tenth.)

Shapes: m subsets, t targets, l query subsets; a map takes scores of one target in any shape.

References: Snelson, Rasmussen & Ghahramani 2003, Warped Gaussian Processes; Duan 1983, Smearing
estimate; Gregory & Delbourgo 1982, Piecewise rational quadratic interpolation to monotonic data;
Fritsch & Butland 1984, A method for constructing local monotone piecewise cubic interpolants.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from ksm_ext.checks import brief, message
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.choice import clearly_better
from ksm_ext.surrogates.judgement import Scores
from ksm_ext.surrogates.options import Warp

_NODES, _SHARES = np.polynomial.hermite_e.hermegauss(9)  # of the mean over epsilon
_Z95 = quantile(0.95)
_APART = 1e-9  # between scores whose logits differ by more than rounding
_CLEAR = 1.0
"""Standard errors by which a map must win. Predictions of 33 games from 50 to 300 subsets then have
.91 of the squared error (subsets of mixed sizes, at worst 1.13) or .95 (uniform ones, 1.6), and .02
more rank correlation; where any gain counts, single ones have twice the error."""


class ScoreMap(Protocol):
    """A strictly increasing function of scores."""

    def __call__(self, scores: Tensor) -> Tensor:
        """g(y), of any shape."""
        ...

    def inverse(self, warped: Tensor) -> Tensor:
        """The scores."""
        ...


class Same:
    """The identity, of targets that are constant or that a map is not defined for."""

    def __call__(self, scores: Tensor) -> Tensor:
        """See :class:`ScoreMap`."""
        return scores

    inverse = __call__


class Log:
    """See the module's head."""

    domain: ClassVar[str] = "positive"

    def __init__(self, scores: Tensor) -> None:
        """Take the (m,) scores that are fitted."""

    @staticmethod
    def suits(scores: Tensor) -> bool:
        """Whether it is defined for all scores."""
        return bool((scores > 0).all())

    def __call__(self, scores: Tensor) -> Tensor:
        """See :class:`ScoreMap`."""
        return scores.log()

    def inverse(self, warped: Tensor) -> Tensor:
        """See :class:`ScoreMap`."""
        return warped.exp()


class Logit:
    """See the module's head."""

    domain: ClassVar[str] = "in [0, 1] and apart"

    def __init__(self, scores: Tensor) -> None:
        """Take the (m,) scores that are fitted."""
        self._kept = 1 - 1 / len(scores)

    @staticmethod
    def suits(scores: Tensor) -> bool:
        """Whether it is defined for all scores, and they are not all as near as rounding."""
        low, high = scores.aminmax()
        return bool((low >= 0) & (high <= 1) & (high - low > _APART))

    def __call__(self, scores: Tensor) -> Tensor:
        """See :class:`ScoreMap`."""
        return torch.logit(0.5 + self._kept * (scores - 0.5))

    def inverse(self, warped: Tensor) -> Tensor:
        """See :class:`ScoreMap`."""
        return (0.5 + (warped.sigmoid() - 0.5) / self._kept).clamp(0.0, 1.0)


class NormalScores:
    """A rational quadratic spline through scores and their normal scores, its inverse exact.

    Slopes at inner scores are the harmonic means of PCHIP (Fritsch & Butland 1984), so that where
    two scores nearly tie it is steep between them alone. Beyond the scores it goes on linearly, as
    at the end but never flatter than from end to end, so that an outlier begets none.
    """

    domain: ClassVar[str] = "finite"

    def __init__(self, scores: Tensor) -> None:
        """Take the (m,) scores that are fitted, of two values at least."""
        self._unit = scores.abs().amax()
        x, counts = _to_12_digits(scores / self._unit).unique(return_counts=True)
        z = torch.special.ndtri((counts.cumsum(0) - counts / 2).double() / len(scores))
        width, rise = x.diff(), z.diff()
        slope = rise / width
        left, right = width[:-1] + 2 * width[1:], 2 * width[:-1] + width[1:]
        inner = (left + right) / (left / slope[:-1] + right / slope[1:])
        ends = torch.maximum(slope[[0, -1]], (z[-1] - z[0]) / (x[-1] - x[0]))
        self._x, self._z, self._width, self._rise, self._slope = x, z, width, rise, slope
        self._tangent = torch.cat([ends[:1], inner, ends[1:]])

    @staticmethod
    def suits(scores: Tensor) -> bool:
        """Whether it is defined for all scores: if not all are as close as ties."""
        low, high = _to_12_digits(scores / scores.abs().amax()).aminmax()
        return bool(high > low)

    def __call__(self, scores: Tensor) -> Tensor:
        """See :class:`ScoreMap`."""
        x, z, y = self._x, self._z, scores / self._unit
        width, rise, slope, left, right, k = self._pieces(x, y)
        at = (y.clamp(x[0], x[-1]) - x[k]) / width
        inside = at * (1 - at)
        found = slope * at.square() + left * inside
        found = z[k] + rise * found / (slope + (left + right - 2 * slope) * inside)
        return found + self._beyond(y - y.clamp(x[0], x[-1]), 1.0)

    def inverse(self, warped: Tensor) -> Tensor:
        """See :class:`ScoreMap`."""
        x, z = self._x, self._z
        width, rise, slope, left, right, k = self._pieces(z, warped)
        up = warped.clamp(z[0], z[-1]) - z[k]
        bend = up * (left + right - 2 * slope)
        a, b, c = rise * (slope - left) + bend, rise * left - bend, -slope * up
        root = (b.square() - 4 * a * c).clamp_min(0.0).sqrt()
        found = x[k] + width * 2 * -c / (b + root)
        return self._unit * (found + self._beyond(warped - warped.clamp(z[0], z[-1]), -1.0))

    def _pieces(self, knots: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        """What is known of the piece that each number is in, and its number."""
        k = torch.searchsorted(knots, at.contiguous(), right=True).sub(1).clamp(0, len(knots) - 2)
        pieces = self._width, self._rise, self._slope, self._tangent[:-1], self._tangent[1:]
        return *(each[k] for each in pieces), k

    def _beyond(self, over: Tensor, power: float) -> Tensor:
        """What the line adds beyond an end, by the distance from it."""
        ends = self._tangent[[0, -1]] ** power
        return over * torch.where(over < 0, ends[0], ends[1])


def _to_12_digits(scores: Tensor) -> Tensor:
    """Scores in units of the largest, so that those which differ by rounding tie."""
    return scores.round(decimals=12)


MAPS: dict[str, Any] = {"log": Log, "logit": Logit, "normal": NormalScores}


def map_of(name: str, scores: Tensor) -> ScoreMap:
    """The map of this name for the scores (m,) of a target, NaN where missing.

    The identity where it is not defined for them, or they are constant.
    """
    return MAPS[name](scores[~scores.isnan()]) if suits(name, scores) else Same()


def suits(name: str, scores: Tensor) -> bool:
    """Whether a map is defined for scores (m,), NaN where missing, and they are not constant."""
    present = scores[~scores.isnan()]
    return bool(present.amax() > present.amin()) and bool(MAPS[name].suits(present))


@dataclass(frozen=True, eq=False)
class ScoreWarp:
    """Targets that are predicted through a map, and the surrogate of what it makes of scores.

    Attributes:
        name: Of the map.
        targets: The numbers of these targets.
        scores: (m, t) the scores of all targets, NaN where missing.
        surrogate: The :class:`ksm_ext.Surrogate` of the warped scores of all targets, answering in
            tensors.
    """

    name: str
    targets: tuple[int, ...]
    scores: Tensor
    surrogate: Any

    __repr__ = brief

    @cached_property
    def maps(self) -> list[ScoreMap]:
        """Those of the targets."""
        return [map_of(self.name, self.scores[:, j]) for j in self.targets]

    def predict(self, masks: Tensor, return_std: bool) -> tuple[Tensor, Tensor | None]:
        """Predicted scores (l, targets) of subsets (l, n), and standard deviations if asked for."""
        answer = self.surrogate.predict(masks, return_std)
        tables = answer if return_std else (answer,)
        warped, *std = (each[:, self._places].to(self.scores) for each in tables)
        share = self.surrogate.observed_share(masks)[:, self._places]
        mean = self._back(warped, self.spread * (1 - share))
        if not std:
            return mean, None
        low, high = (self._inverse(warped + side * _Z95 * std[0]) for side in (-1, 1))
        return mean, (high - low) / (2 * _Z95)

    @cached_property
    def residuals(self) -> Tensor:
        """(m, targets) scores minus what predicts them when they are left out; NaN if missing."""
        fitted = self.surrogate.scores - self.surrogate.residuals
        return self.scores[:, self._places] - self._back(fitted[:, self._places], self.spread)

    @cached_property
    def spread(self) -> Tensor:
        """(targets,) root mean square leave-one-out residual of the warped scores."""
        squares = self.surrogate.residuals.square()[:, self._places]
        judged = ~squares.isnan() & ~self.surrogate.excluded[:, self._places]
        return (torch.where(judged, squares, 0.0).sum(0) / judged.sum(0).clamp_min(1)).sqrt()

    @property
    def _places(self) -> list[int]:
        return list(self.targets)

    def _back(self, warped: Tensor, spread: Tensor) -> Tensor:
        """The mean of the module's head, (l, targets)."""
        shares = _SHARES / _SHARES.sum()
        pairs = zip(shares.tolist(), _NODES.tolist(), strict=True)
        return sum(
            (share * self._inverse(warped + node * spread) for share, node in pairs),
            start=torch.zeros_like(warped),
        )

    def _inverse(self, warped: Tensor) -> Tensor:
        each = zip(self.maps, warped.T, strict=True)
        return torch.stack([known.inverse(column) for known, column in each], 1)


# -- fit and choose -----------------------------------------------------------------------------


def fitted_warps(
    warp: Warp,
    surrogate: Any,
    runs: Tensor,
    noise_std: Tensor | None,
    fit: Callable[..., Any],
    *,
    by_rank: bool,
) -> tuple[ScoreWarp, ...]:
    """The targets that are predicted through a map, each map with a surrogate.

    Of several maps each target has the one with the smallest leave-one-out error of its scores, if
    that is clearly smaller than without.

    Args:
        warp: See :func:`ksm_ext.fit_surrogate`.
        surrogate: The surrogate of the scores themselves.
        runs: (M, t) float64 scores of single runs, NaN where missing.
        noise_std: (M, t) standard deviations of these by noise, or None.
        fit: Fits a surrogate to other scores (M, t) of the same runs, and ``noise_std`` of them.
        by_rank: Whether rank correlation counts instead of the error.

    Raises:
        ValueError: If a target has scores that the named map is not defined for.
    """
    varies = [suits("normal", column) for column in surrogate.scores.T]
    warps = []
    for name in MAPS if warp == "auto" else (warp,):
        targets = [j for j, column in enumerate(runs.T) if varies[j] and suits(name, column)]
        if warp != "auto" and len(targets) < sum(varies):
            out = next(j for j, varied in enumerate(varies) if varied and j not in targets)
            low, high = runs[~runs[:, out].isnan(), out].aminmax()
            found = f"{low:.6g} to {high:.6g} of target {surrogate.target_names[out]!r}"
            remedy = "Use warp='normal', which is for any scores, or 'auto'."
            expected = f"{MAPS[name].domain} for warp={name!r}"
            raise ValueError(message("scores", expected, found, remedy))
        if targets:
            warps.append(_fitted(name, targets, surrogate, runs, noise_std, fit))
    if warp != "auto":
        return tuple(warps)
    best = [_best(warps, surrogate, j, by_rank) for j in range(len(varies))]
    kept = ((each, [j for j, one in enumerate(best) if one is each]) for each in warps)
    return tuple(replace(each, targets=tuple(targets)) for each, targets in kept if targets)


def _fitted(
    name: str,
    targets: Sequence[int],
    surrogate: Any,
    runs: Tensor,
    noise_std: Tensor | None,
    fit: Callable[..., Any],
) -> ScoreWarp:
    """A map with its surrogate; noise is what becomes of a standard deviation on either side.

    Within the range of the scores: single slopes of normal scores are as large as ties are close.
    """
    warped = runs.clone()
    noise = None if noise_std is None else noise_std.clone()
    for j in targets:
        known, column = map_of(name, surrogate.scores[:, j]), runs[:, j]
        warped[:, j] = known(column)
        if noise is not None:
            low, high = column[~column.isnan()].aminmax()
            ends = [(column + side * noise[:, j]).clamp(low, high) for side in (-1, 1)]
            rise, width = (known(ends[1]) - known(ends[0])), ends[1] - ends[0]
            # noise below the rounding of the scores is none
            noise[:, j] = torch.where(width > 0, noise[:, j] * (rise / width), 0.0)
    own = fit(warped, noise_std=noise).with_tensor_answers()
    return ScoreWarp(name, tuple(targets), surrogate.scores, own)


def _best(
    warps: Sequence[ScoreWarp], surrogate: Any, target: int, by_rank: bool
) -> ScoreWarp | None:
    """The map with the smallest loss of those with which a target is predicted clearly better."""
    truth = surrogate.scores[:, target] / surrogate.unit[target]
    rows = ~truth.isnan() & ~surrogate.excluded[:, target]
    truth = truth[None, rows, None]
    scores = Scores(truth, True, by_rank, torch.ones_like(truth[..., 0]))

    def losses(residuals: Tensor) -> Tensor:
        return scores.losses((residuals[rows] / surrogate.unit[target])[None, :, None])

    plain = losses(surrogate.residuals[:, target])
    able = [warp for warp in warps if target in warp.targets]
    each = [losses(warp.residuals[:, warp.targets.index(target)]) for warp in able]
    clear = [
        (float(own.mean()), i)
        for i, own in enumerate(each)
        if bool(clearly_better(plain - own, _CLEAR))
    ]
    return able[min(clear)[1]] if clear else None
