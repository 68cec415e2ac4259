r"""Kernels between subsets, each known in the three forms the library computes with.

On 0/1 masks every kernel here is a function of two integers, the Hamming distance ``h`` and the
overlap ``o = |S and S'|``:

.. math:: k(S, S') = A[h] + B[o], \qquad A[h] = \sum_j w_j e^{-\lambda_j h}

with B a polynomial, or one of the two absent. Kernels of distances may see more:

* ``gamma`` of n numbers, one for each task (automatic relevance determination), ``h`` then being a
  weighted sum over the tasks that differ;
* an ``amplitude`` b by size: ``a(S) k(S, S') a(S')`` with ``a(S) = exp(b (1 - |S| / n))``, n the
  tasks that vary, so that scores of small subsets may vary more (b > 0) or less than those of
  large ones.

1. ``tables``: A and B themselves, for the popcount kernels of :mod:`ksm_ext.ops`;
2. ``products`` and ``overlap_degree``: A as a mixture of product kernels and the degree of B, from
   which :mod:`.readouts` has Shapley values, interactions and spectra in closed form;
3. ``on_weights``: the same kernel between real weight vectors.

===============  =====================================  ===========================
kernel           k(x, y)                                on masks
===============  =====================================  ===========================
``Linear``       ``x . y``                              ``o``
``Polynomial``   ``(gamma x . y + coef0)^degree``       ``(gamma o + coef0)^degree``
``ANOVA2``       ``e_1 + pair_weight e_2``              ``o + pair_weight o(o-1)/2``
``RBF``          ``exp(-gamma ||x - y||_2^2)``          ``exp(-gamma h)``
``Laplace``      ``exp(-gamma ||x - y||_1)``            ``exp(-gamma h)``
``Exponential``  ``exp(-gamma ||x - y||_2)``            ``exp(-gamma sqrt(h))``
``Size``         polynomials of the sums of x and y     of ``|S|`` and ``|S'|``
``Warped``       ``exp(-||u(x) - u(y)||_2)``            none: for shares and counts
===============  =====================================  ===========================

(``e_1``, ``e_2`` are the elementary symmetric polynomials of ``x_i y_i``;
``u_i(x) = scale_i x_i^power``.) Names and parameters are scikit-learn's. A parameter left ``None``
is searched by :func:`ksm_ext.fit_surrogate`. With a gamma for each task, squared differences count
``gamma_i`` times in ``RBF``, ``gamma_i^2`` times in ``Exponential``, and absolute ones ``gamma_i``
times in ``Laplace``.

References: Rasmussen & Williams 2006, ch. 4 and 5.1; Zhang, Duan & Zhang 2026, arXiv:2602.03783.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ksm_ext import ops
from ksm_ext.arrays import as_tensor
from ksm_ext.checks import brief, check_positive_int, check_real, message, shape_text
from ksm_ext.surrogates.masks import Masks

_MATMUL_ENTRIES = 2**24  # of a Gram matrix of real weights, held at a time: 128 MB
_LARGEST_AMPLITUDE = 50.0  # beyond, squares of what it makes of the empty subset overflow

T = TypeVar("T")

Gamma = float | tuple[float, ...] | None
"""A decay for all tasks, or one for each; None is searched."""


@dataclass(frozen=True, eq=False)
class Products:
    r"""J product kernels on masks, ``sum_j weight_j prod_i g_ji(s_i, a_i)``.

    .. math:: g_{ji}(1, 1) = 1, \qquad g_{ji}(0, 1) = g_{ji}(1, 0) = e^{\beta - \rho_{ji}}, \qquad
              g_{ji}(0, 0) = e^{2 \beta}

    A task outside of a subset multiplies by ``e^beta``, one that differs by ``e^-rho``.

    Attributes:
        weights: (J,) float64.
        rates: rho, (J,) for all tasks alike or (J, n); ``inf`` where they must not differ.
        tilt: beta.
    """

    weights: Tensor
    rates: Tensor
    tilt: float = 0.0

    __repr__ = brief

    @property
    def by_task(self) -> bool:
        """Whether tasks have rates of their own."""
        return self.rates.ndim == 2

    def change(self, rate: Tensor) -> tuple[Tensor, Tensor]:
        """``g(1, a_i) - g(0, a_i)`` at some rates, for a task out of a and in it."""
        outside = math.exp(2 * self.tilt) * torch.expm1(-self.tilt - rate)
        return outside, -torch.expm1(self.tilt - rate)

    def mean(self, rate: Tensor, present: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """``present g(1, a_i) + absent g(0, a_i)`` at some rates, for a task out of a and in it.

        ``present`` is the probability that the task is there, ``absent`` that it is not.
        """
        outside = present * torch.exp(-self.tilt - rate) + absent
        inside = present + absent * torch.exp(self.tilt - rate)
        return math.exp(2 * self.tilt) * outside, inside


_CERTAIN = torch.full((1,), math.inf, dtype=torch.float64)


class Kernel(ABC):
    """A positive semi-definite function of two subsets."""

    name: ClassVar[str]
    amplitude = 0.0  # b of the module's head
    __array_ufunc__ = None  # a NumPy number times a kernel is the kernel's to answer

    @abstractmethod
    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Kernel matrix of real weights: x (m, n), y (l, n) -> (m, l)."""

    def hamming_values(self, h: Tensor) -> Tensor | None:
        """A at Hamming distances ``h``, or None where A is absent."""
        return None

    def overlap_values(self, o: Tensor) -> Tensor | None:
        """B at overlaps ``o``, or None where B is absent."""
        return None

    def products(self, num_tasks: int, *, coarse: bool = False) -> list[Products]:
        """All of the kernel but B as mixtures of product kernels of n tasks.

        Args:
            num_tasks: Number of tasks n.
            coarse: Whether 1e-8 of the kernel may be missing, for half as many of them.
        """
        return []

    @property
    def overlap_degree(self) -> int:
        """Degree of B in ``o``; 0 where B is absent."""
        return 0

    @property
    def is_tabulated(self) -> bool:
        """Whether it is a function of ``h`` and ``o`` on masks: ``tables`` are all of it."""
        return True

    @property
    def is_counted(self) -> bool:
        """Whether it is ``a(S) A[h] a(S') + B[o]`` on masks, plus functions of sizes."""
        return True

    def size_terms(self) -> list[tuple[float, int]]:
        """Pairs (weight, degree) of the :class:`Size` kernels in it."""
        return []

    @property
    def size_degree(self) -> int:
        """The largest of these degrees; 0 where there are none."""
        return max((degree for _, degree in self.size_terms()), default=0)

    def size_features(self, sizes: Tensor, num_tasks: int) -> Tensor:
        """(C, D): functions phi_d of ``|S|``; these kernels are ``sum_d phi_d(S) phi_d(S')``."""
        parts = [
            math.sqrt(weight) * _legendre(sizes, num_tasks, degree)
            for weight, degree in self.size_terms()
        ]
        return torch.cat(parts, 1) if parts else sizes.new_zeros(len(sizes), 0)

    def grid(self, masks: Masks) -> "list[Kernel]":
        """This kernel with its open parameters filled in, at the scales of ``masks``."""
        return [self]

    def of_tasks(self, kept: Tensor) -> "Kernel":
        """The kernel of the tasks where ``kept`` (n,) bool: what is set for each task is cut.

        Or of the tasks with the numbers ``kept`` (int64), in their order.
        """
        return self

    def __add__(self, other: "Kernel") -> "Sum":
        """The kernel ``k + k'``."""
        return Sum((*_summands(self), *_summands(other)))

    def __rmul__(self, weight: float) -> "Sum":
        """The kernel ``weight * k``."""
        scaled = [(None if w is None else weight * w, kernel) for w, kernel in _summands(self)]
        return Sum(tuple(scaled))

    def tables(self, num_tasks: int, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """A and B at 0..n, each (n + 1,) float64 or None."""
        counts = torch.arange(num_tasks + 1, dtype=torch.float64, device=device)
        return self.hamming_values(counts), self.overlap_values(counts)

    def gram(self, x: Masks, y: Masks | None = None) -> Tensor:
        """Kernel matrix (m, l) float64 between the rows of ``x`` and ``y`` (of ``x`` if None)."""
        if x.binary and (y is None or y.binary):
            return self.mask_gram(x, y)
        return self.on_weights(x.floats, x.floats if y is None else y.floats)

    def matmul(self, x: Masks, y: Masks | None, v: Tensor) -> Tensor:
        """``gram(x, y) @ v`` for v (l, t) float64, the (m, l) matrix never stored."""
        if x.binary and (y is None or y.binary):
            return self.mask_matmul(x, y, v)
        floats = (x if y is None else y).floats
        rows = max(1, _MATMUL_ENTRIES // max(len(floats), 1))
        return torch.cat([self.on_weights(part, floats) @ v for part in x.floats.split(rows)])

    def diagonal(self, x: Masks) -> Tensor:
        """``k(S, S)`` of every row, (m,) float64."""
        if x.binary:
            return self.mask_diagonal(x)
        points = [row[None] for row in x.floats]  # the same tensor twice: distances exactly zero
        rows = [self.on_weights(point, point)[0, 0] for point in points]
        return torch.stack(rows) if rows else x.floats.new_zeros(0)

    def mask_gram(self, x: Masks, y: Masks | None) -> Tensor:
        """:meth:`gram` of 0/1 masks, from tables."""
        hamming, overlap = self.tables(x.num_tasks, x.values.device)
        bits = None if y is None else y.bits
        return ops.mask_gram(
            x.bits, bits, x.num_tasks, hamming_table=hamming, overlap_table=overlap
        )

    def mask_matmul(self, x: Masks, y: Masks | None, v: Tensor) -> Tensor:
        """:meth:`matmul` of 0/1 masks, from tables."""
        hamming, overlap = self.tables(x.num_tasks, x.values.device)
        bits = None if y is None else y.bits
        return ops.mask_gram_matmul(
            x.bits, bits, x.num_tasks, v, hamming_table=hamming, overlap_table=overlap
        )

    def mask_diagonal(self, x: Masks) -> Tensor:
        """:meth:`diagonal` of 0/1 masks, from tables."""
        hamming, overlap = self.tables(x.num_tasks, x.values.device)
        total = x.values.new_zeros(len(x), dtype=torch.float64)
        if hamming is not None:
            total = total + hamming[0]
        return total if overlap is None else total + overlap[x.sizes]

    def variance(self, masks: Masks) -> float:
        """Mean variance of a subset: the mean of ``k(S, S)`` less that of ``k(S, S')``."""
        gram = self.gram(masks)
        return float(gram.diagonal().mean() - gram.mean())

    def describe(self) -> dict[str, Any]:
        """Name and parameters as plain values, for storage; :func:`from_description` inverts it."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def __str__(self) -> str:
        """For people: ``rbf(gamma=0.02)``; of one gamma per task, the smallest and the largest."""
        given = ", ".join(
            f"{field.name}={_shown(value)}"
            for field in fields(self)  # type: ignore[arg-type]
            if (value := getattr(self, field.name)) is not None and not value == field.default == 0
        )
        return f"{self.name}({given})" if given else self.name


@dataclass(frozen=True)
class Linear(Kernel):
    """``x . y``: kernel ridge with it is ridge regression on the tasks (the datamodel)."""

    name: ClassVar[str] = "linear"

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """``x y^T``."""
        return x @ y.T

    def overlap_values(self, o: Tensor) -> Tensor:
        """``o``."""
        return o.clone()

    def diagonal(self, x: Masks) -> Tensor:
        """``x . x``."""
        return super().diagonal(x) if x.binary else x.floats.square().sum(1)

    overlap_degree = 1


@dataclass(frozen=True)
class Polynomial(Kernel):
    """``(gamma x . y + coef0)^degree``; ``gamma=None`` is searched around 1 / mean ``||x||^2``."""

    degree: int = 3
    gamma: float | None = None
    coef0: float = 1.0
    name: ClassVar[str] = "polynomial"

    def __post_init__(self) -> None:
        """Check the parameters."""
        degree = check_real("degree", self.degree)
        if not 1 <= degree < math.inf or degree != int(degree):
            found, remedy = str(self.degree), "Use 2 or 3 for pairs or triples."
            raise ValueError(message("degree", "a whole number of at least 1", found, remedy))
        _set(self, "degree", int(degree))
        _set(self, "gamma", _positive("gamma", self.gamma))
        _set(self, "coef0", check_real("coef0", self.coef0))
        if not 0 <= self.coef0 < math.inf:
            remedy = "A negative one is not positive semi-definite."
            raise ValueError(message("coef0", "at least 0", str(self.coef0), remedy))

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """The kernel of the dot products."""
        return self.overlap_values(x @ y.T)

    def overlap_values(self, o: Tensor) -> Tensor:
        """``(gamma o + coef0)^degree``."""
        return (_given("gamma", self.gamma) * o + self.coef0) ** self.degree

    @property
    def overlap_degree(self) -> int:
        """The degree itself."""
        return self.degree

    def grid(self, masks: Masks) -> list[Kernel]:
        """``gamma`` at 0.3, 1 and 3 times 1 / mean ``||x||^2``."""
        mean = masks.mean_squared_norm()
        return _fill(self, "gamma", [scale / max(mean, _TINY) for scale in (0.3, 1.0, 3.0)])


@dataclass(frozen=True)
class ANOVA2(Kernel):
    """Main effects and pairwise products: ``e_1(x y) + pair_weight e_2(x y)``.

    Equivalent to ridge on all tasks and all pairs of tasks, a pair's feature weighing
    ``sqrt(pair_weight)``; ``pair_weight=None`` is searched.
    """

    pair_weight: float | None = None
    name: ClassVar[str] = "anova2"

    def __post_init__(self) -> None:
        """Check the parameter."""
        _set(self, "pair_weight", _positive("pair_weight", self.pair_weight))

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """``e_2 = (e_1^2 - sum_i x_i^2 y_i^2) / 2``."""
        e1 = x @ y.T
        e2 = (e1.square() - x.square() @ y.square().T) / 2
        return e1 + _given("pair_weight", self.pair_weight) * e2

    def overlap_values(self, o: Tensor) -> Tensor:
        """``o + pair_weight o (o - 1) / 2``."""
        return o + _given("pair_weight", self.pair_weight) * o * (o - 1) / 2

    overlap_degree = 2

    def grid(self, masks: Masks) -> list[Kernel]:
        """``pair_weight`` at 1 down to 0.01."""
        return _fill(self, "pair_weight", [0.01, 0.03, 0.1, 0.3, 1.0])


@dataclass(frozen=True)
class _Radial(Kernel):
    """Kernels ``exp(-gamma d)`` of a distance; ``gamma=None`` is searched around 1 / mean d.

    ``gamma`` of n numbers is one for each task; ``amplitude`` is b of the module's head.
    """

    gamma: Gamma = None
    amplitude: float = 0.0
    scales: ClassVar[Sequence[float]]
    _of_distance: ClassVar[str] = "rbf"  # the operators' name for the kernel of weighted distances

    def __post_init__(self) -> None:
        """Check the parameters."""
        _set(self, "gamma", _positive_each("gamma", self.gamma))
        amplitude = check_real("amplitude", self.amplitude)
        if not abs(amplitude) <= _LARGEST_AMPLITUDE:
            expected = f"between -{_LARGEST_AMPLITUDE:g} and {_LARGEST_AMPLITUDE:g}"
            remedy = "Scores of small subsets that vary twice as much have 0.7."
            raise ValueError(message("amplitude", expected, str(self.amplitude), remedy))
        _set(self, "amplitude", amplitude)

    @abstractmethod
    def typical_distance(self, masks: Masks) -> float:
        """Mean distance of two rows, the unit in which ``gamma`` is searched."""

    @abstractmethod
    def hamming_values(self, h: Tensor) -> Tensor:
        """The kernel at distances ``h``, which include gamma where it is one for each task."""

    @abstractmethod
    def rates(self, num_tasks: int) -> Tensor:
        """What each task that differs adds to ``h``, () or (n,) float64, gamma included."""

    def mixture(self, coarse: bool) -> Iterable[tuple[float, float]]:
        """Pairs (weight, scale): the kernel is ``sum_j weight_j exp(-scale_j h)``."""
        return [(1.0, 1.0)]

    @property
    def is_tabulated(self) -> bool:
        """Not with a gamma for each task, or an amplitude."""
        return not isinstance(self.gamma, tuple) and self.amplitude == 0

    @property
    def is_counted(self) -> bool:
        """Not with a gamma for each task."""
        return not isinstance(self.gamma, tuple)

    def products(self, num_tasks: int, *, coarse: bool = False) -> list[Products]:
        """The mixture at every task's rate; those that must not differ are alike."""
        weights, scales = torch.tensor(list(self.mixture(coarse)), dtype=torch.float64).T
        rates, tilt = self.rates(num_tasks), self.amplitude / max(num_tasks, 1)
        finite = scales < math.inf
        found = [
            Products(weights[finite], scales[finite].reshape(-1, *[1] * rates.ndim) * rates, tilt)
        ]
        rest = weights[~finite]
        return found + [Products(rest, _CERTAIN, tilt)] * len(rest)

    def of_tasks(self, kept: Tensor) -> Kernel:
        """With the gammas of the tasks that are kept."""
        if not isinstance(self.gamma, tuple):
            return self
        return replace(self, gamma=tuple(self._gammas(len(kept))[kept.cpu()].tolist()))

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """From distances; squared ones are clamped at zero against rounding."""
        gamma, same = _shared(self.gamma), x is y
        factors = [self._amplitudes(rows.sum(1), rows.shape[1]) for rows in (x, y)]
        if isinstance(self.gamma, tuple):
            scales = self.rates(x.shape[1]).to(x)
            scales = scales if self.name == "laplace" else scales.sqrt()
            x, y = x * scales, y * scales
        gram = ops.kernel_gram(x, None if same else y, self.name, gamma=gamma)
        return factors[0][:, None] * gram * factors[1] if self.amplitude else gram

    def mask_gram(self, x: Masks, y: Masks | None) -> Tensor:
        """From tables, or with a gamma for each task from weighted distances."""
        if isinstance(self.gamma, tuple):
            gram = ops.weighted_mask_gram(*self._weighted(x, y), kernel=self._of_distance)
        else:
            gram = super().mask_gram(x, y)
        if not self.amplitude:
            return gram
        return self._of_sizes(x)[:, None] * gram * self._of_sizes(x if y is None else y)

    def mask_matmul(self, x: Masks, y: Masks | None, v: Tensor) -> Tensor:
        """As :meth:`mask_gram`, never stored."""
        if self.amplitude:
            v = self._of_sizes(x if y is None else y)[:, None] * v
        if isinstance(self.gamma, tuple):
            each = self._weighted(x, y)
            product = ops.weighted_mask_gram_matmul(*each, v, kernel=self._of_distance)
        else:
            product = super().mask_matmul(x, y, v)
        return self._of_sizes(x)[:, None] * product if self.amplitude else product

    def _weighted(self, x: Masks, y: Masks | None) -> tuple[Tensor, Tensor | None, int, Tensor]:
        """What the operators of weighted distances take."""
        rates = self.rates(x.num_tasks).to(x.values.device)
        return x.bits, None if y is None else y.bits, x.num_tasks, rates

    def mask_diagonal(self, x: Masks) -> Tensor:
        """The square of the amplitude."""
        self.rates(x.num_tasks)  # raises where gamma is open
        return self._of_sizes(x).square()

    def grid(self, masks: Masks) -> list[Kernel]:
        """``gamma`` at ``scales`` over the typical distance."""
        unit = max(self.typical_distance(masks), _TINY)
        return _fill(self, "gamma", [scale / unit for scale in self.scales])

    def _gammas(self, num_tasks: int) -> Tensor:
        """() or (n,) float64."""
        gammas = torch.tensor(_given("gamma", self.gamma), dtype=torch.float64)
        if gammas.ndim and len(gammas) != num_tasks:
            expected, found = f"a number, or one for each of {num_tasks} tasks", str(len(gammas))
            remedy = "Give them in the order of the columns of `masks`."
            raise ValueError(message("gamma", expected, f"{found} numbers", remedy))
        return gammas

    def _amplitudes(self, sizes: Tensor, num_tasks: int) -> Tensor:
        return torch.exp(self.amplitude * (1 - sizes.to(torch.float64) / max(num_tasks, 1)))

    def _of_sizes(self, masks: Masks) -> Tensor:
        """``a(S)``, (m,)."""
        return self._amplitudes(masks.sizes, masks.num_tasks)


@dataclass(frozen=True)
class RBF(_Radial):
    """``exp(-gamma ||x - y||^2)``, the paper's kernel; on masks the noise kernel ``r^h``."""

    name: ClassVar[str] = "rbf"
    scales: ClassVar[Sequence[float]] = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0)

    def typical_distance(self, masks: Masks) -> float:
        """Mean squared distance."""
        return masks.mean_squared_distance()

    def rates(self, num_tasks: int) -> Tensor:
        """``gamma``."""
        return self._gammas(num_tasks)

    def hamming_values(self, h: Tensor) -> Tensor:
        """``exp(-gamma h)``."""
        return torch.exp(-_shared(self.gamma) * h)


@dataclass(frozen=True)
class Laplace(RBF):
    """``exp(-gamma ||x - y||_1)``; equal to :class:`RBF` on masks, sharper on mixture weights."""

    name: ClassVar[str] = "laplace"

    def typical_distance(self, masks: Masks) -> float:
        """Mean absolute distance."""
        return masks.mean_absolute_distance()


@dataclass(frozen=True)
class Exponential(_Radial):
    r"""``exp(-gamma ||x - y||_2)`` (Matern 1/2): on masks ``exp(-gamma sqrt(h))``.

    A mixture of RBF kernels of all widths (the one-sided stable law of index 1/2),

    .. math:: e^{-\gamma \sqrt h} = \int_0^\infty \frac{\gamma}{2 \sqrt\pi} s^{-3/2}
              e^{-\gamma^2 / 4 s} e^{-s h} ds,

    so it is steep at small distances and keeps a long tail, and no length scale has to be right.
    """

    name: ClassVar[str] = "exponential"
    _of_distance: ClassVar[str] = "exponential"
    scales: ClassVar[Sequence[float]] = (0.03, 0.1, 0.3, 1.0, 3.0)

    def typical_distance(self, masks: Masks) -> float:
        """Root mean squared distance."""
        return math.sqrt(masks.mean_squared_distance())

    def rates(self, num_tasks: int) -> Tensor:
        """``gamma^2``: the kernel is ``exp(-sqrt(sum of the rates of tasks that differ))``."""
        return self._gammas(num_tasks).square()

    def hamming_values(self, h: Tensor) -> Tensor:
        """``exp(-gamma sqrt(h))``."""
        return torch.exp(-_shared(self.gamma) * h.sqrt())

    def mixture(self, coarse: bool) -> Iterable[tuple[float, float]]:
        """The integral by the trapezoidal rule in ``log s``, to 1e-14 or 1e-8.

        In units of the smallest gamma. The integrand is analytic in a strip of half-width pi/2, so
        the error falls as ``exp(-pi^2 / step)``; weights begin at ``exp(-40)``, or ``exp(-20)``,
        and beyond ``s = 50``, or 20, only h = 0 is left, which gets the missing mass.
        """
        least = min(self.gamma) if isinstance(self.gamma, tuple) else _shared(self.gamma)
        log_gamma = math.log(least)  # squares of gamma itself overflow
        step, least, most = (0.5, 20.0, 20.0) if coarse else (0.28, 40.0, 50.0)
        start, stop = 2 * log_gamma - math.log(4 * least), math.log(most)
        count = max(1, math.ceil((stop - start) / step))
        left = 1.0
        for index in range(count + 1):
            log_rate = start + index * step
            power = log_gamma - log_rate / 2 - math.exp(2 * log_gamma - log_rate) / 4
            weight = step * math.exp(power) / (2 * math.sqrt(math.pi))
            left -= weight
            yield weight, math.exp(min(log_rate - 2 * log_gamma, 700.0))
        yield left, math.inf


@dataclass(frozen=True)
class Size(Kernel):
    r"""A smooth function of how many tasks there are, whichever they are.

    .. math:: k(S, S') = \frac1D \sum_{d=1}^D P_d(1 - 2 |S| / n)\, P_d(1 - 2 |S'| / n)

    with the Legendre polynomials P_d up to ``degree`` D. Scores that saturate depend on the number
    of tasks more than on any one of them; added to another kernel, it leaves that the rest. On real
    weights ``|S|`` is their sum.
    """

    degree: int = 3
    name: ClassVar[str] = "size"

    def __post_init__(self) -> None:
        """Check the degree."""
        _set(self, "degree", check_positive_int("degree", self.degree))

    @property
    def is_tabulated(self) -> bool:
        """No: it is no function of ``h`` and ``o``."""
        return False

    def size_terms(self) -> list[tuple[float, int]]:
        """Itself."""
        return [(1.0, self.degree)]

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """From the sums of the rows."""
        one, other = (self.size_features(rows.sum(1), rows.shape[1]) for rows in (x, y))
        return one @ other.T

    def mask_gram(self, x: Masks, y: Masks | None) -> Tensor:
        """From the sizes."""
        return self._of(x) @ self._of(x if y is None else y).T

    def mask_matmul(self, x: Masks, y: Masks | None, v: Tensor) -> Tensor:
        """Through the D functions."""
        return self._of(x) @ (self._of(x if y is None else y).T @ v)

    def mask_diagonal(self, x: Masks) -> Tensor:
        """Their squares."""
        return self._of(x).square().sum(1)

    def _of(self, masks: Masks) -> Tensor:
        return self.size_features(masks.sizes, masks.num_tasks)


@dataclass(frozen=True)
class Warped(Kernel):
    """``exp(-||u(x) - u(y)||_2)`` of powers, ``u_i(x) = scale_i sign(x_i) |x_i|^power``.

    For real weights. From no data to a little changes more than from a little to twice as much:
    a power of 1/2 compares square roots of shares, a smaller one nearly their logarithms, of shares
    of 0 too. A scale per task says how much the score depends on it. What is left ``None`` is
    learnt by :func:`ksm_ext.fit_surrogate` for every target, by marginal likelihood
    (:mod:`.warping`).

    Reference: Snoek et al. 2014, arXiv:1402.0929 (warped inputs); Rasmussen & Williams 2006, 5.1
    (automatic relevance determination).
    """

    power: float | None = None
    scales: tuple[float, ...] | None = None
    name: ClassVar[str] = "warped"

    def __post_init__(self) -> None:
        """Check the parameters."""
        _set(self, "power", _positive("power", self.power))
        if self.scales is not None:
            if self.power is None:
                remedy = "What scales mean depends on it."
                raise ValueError(message("power", "given with scales", "None", remedy))
            scales = tuple(check_real("scales", each, "numbers") for each in self.scales)
            if not scales or not all(0 <= each < math.inf for each in scales):
                remedy = "Leave it out to have it learnt."
                raise ValueError(message("scales", "at least 0 each", str(scales[:8]), remedy))
            _set(self, "scales", scales)

    def features(self, x: Tensor) -> Tensor:
        """``u(x)`` of weights x (m, n), (m, n)."""
        if self.scales is None or self.power is None:
            remedy = "Set both, or let fit_surrogate learn them, for kernel='warped' alone."
            raise ValueError(message("power and scales", "numbers", str(self), remedy))
        scales = x.new_tensor(self.scales)
        if scales.shape != x.shape[1:]:
            expected = f"one for each of the {x.shape[1]} tasks that vary"
            remedy = "Leave it out to have it learnt."
            raise ValueError(message("scales", expected, str(len(scales)), remedy))
        return scales * x.sign() * x.abs() ** self.power

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """From the distances of the powers."""
        u = self.features(x)
        other = None if x is y else self.features(y)
        return ops.kernel_gram(u, other, "exponential", gamma=1.0)

    def diagonal(self, x: Masks) -> Tensor:
        """1."""
        return x.floats.new_ones(len(x))

    def hamming_values(self, h: Tensor) -> Tensor:
        """None there could be: on masks it is no function of two counts."""
        remedy = "Use 'exponential': powers of 0 and 1 are 0 and 1."
        raise ValueError(message("kernel", "one for 0/1 masks", repr(self.name), remedy))

    def __str__(self) -> str:
        """``warped(power=0.33, 17 scales)``."""
        power = "" if self.power is None else f"power={self.power:.4g}"
        scales = "" if self.scales is None else f"{len(self.scales)} scales"
        return f"warped({', '.join(filter(None, (power, scales)))})"


@dataclass(frozen=True)
class Sum(Kernel):
    """``sum_j weight_j k_j``: written ``Linear() + 0.5 * RBF(gamma=0.1)``.

    A weight of None is searched: the first such term is scaled to unit variance over the subsets,
    the others to 0.1, 1 and 10 times that.
    """

    terms: tuple[tuple[float | None, Kernel], ...]
    name: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        """Check the weights."""
        if not self.terms:
            raise ValueError(message("terms", "at least one kernel", "none", "Name one."))
        terms = tuple((_positive("weight", weight), kernel) for weight, kernel in self.terms)
        _set(self, "terms", terms)

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """The weighted sum."""
        return torch.stack([w * kernel.on_weights(x, y) for w, kernel in self._weighted()]).sum(0)

    def diagonal(self, x: Masks) -> Tensor:
        """The weighted sum."""
        return torch.stack([w * kernel.diagonal(x) for w, kernel in self._weighted()]).sum(0)

    def hamming_values(self, h: Tensor) -> Tensor | None:
        """The weighted sum of the parts that have one."""
        return _total([(w, kernel.hamming_values(h)) for w, kernel in self._weighted()])

    def overlap_values(self, o: Tensor) -> Tensor | None:
        """The weighted sum of the parts that have one."""
        return _total([(w, kernel.overlap_values(o)) for w, kernel in self._weighted()])

    def products(self, num_tasks: int, *, coarse: bool = False) -> list[Products]:
        """All mixtures, weighted."""
        return [
            replace(each, weights=w * each.weights)
            for w, kernel in self._weighted()
            for each in kernel.products(num_tasks, coarse=coarse)
        ]

    @property
    def is_tabulated(self) -> bool:
        """Where all terms are."""
        return all(kernel.is_tabulated for _, kernel in self.terms)

    @property
    def is_counted(self) -> bool:
        """Where all terms are, with one amplitude."""
        return len(self._all_amplitudes()) < 2 and all(
            kernel.is_counted for _, kernel in self.terms
        )

    @property
    def amplitude(self) -> float:  # type: ignore[override]
        """That of the terms that are functions of ``h``, where there is one."""
        return max(self._all_amplitudes(), default=0.0)

    def of_tasks(self, kept: Tensor) -> Kernel:
        """The sum of the terms' kernels."""
        return Sum(tuple((w, kernel.of_tasks(kept)) for w, kernel in self.terms))

    def mask_gram(self, x: Masks, y: Masks | None) -> Tensor:
        """From the tables of all terms together, or term by term."""
        if self.is_tabulated:
            return super().mask_gram(x, y)
        return torch.stack([w * kernel.mask_gram(x, y) for w, kernel in self._weighted()]).sum(0)

    def mask_matmul(self, x: Masks, y: Masks | None, v: Tensor) -> Tensor:
        """From the tables of all terms together, or term by term."""
        if self.is_tabulated:
            return super().mask_matmul(x, y, v)
        parts = [w * kernel.mask_matmul(x, y, v) for w, kernel in self._weighted()]
        return torch.stack(parts).sum(0)

    def mask_diagonal(self, x: Masks) -> Tensor:
        """The weighted sum."""
        return torch.stack([w * kernel.mask_diagonal(x) for w, kernel in self._weighted()]).sum(0)

    @property
    def overlap_degree(self) -> int:
        """The largest degree."""
        return max(kernel.overlap_degree for _, kernel in self.terms)

    def size_terms(self) -> list[tuple[float, int]]:
        """Those of all terms, weighted."""
        weighted = self._weighted()
        return [(w * weight, d) for w, kernel in weighted for weight, d in kernel.size_terms()]

    def grid(self, masks: Masks) -> list[Kernel]:
        """Every combination of the terms' grids and open weights."""
        sample = masks[: min(len(masks), 256)]
        grids: list[tuple[tuple[float | None, Kernel], ...]] = [()]
        relative: tuple[float, ...] = (1.0,)
        for weight, kernel in self.terms:
            choices: list[tuple[float | None, Kernel]] = []
            for filled in kernel.grid(masks):
                if weight is not None:
                    choices.append((weight, filled))
                    continue
                variance = max(filled.variance(sample), _TINY)
                choices += [(factor / variance, filled) for factor in relative]
            if weight is None:
                relative = (0.1, 1.0, 10.0)
            grids = [(*head, choice) for head in grids for choice in choices]
        return [Sum(terms) for terms in grids]

    def describe(self) -> dict[str, Any]:
        """Weights and descriptions of the terms."""
        return {"name": self.name, "terms": [[w, kernel.describe()] for w, kernel in self.terms]}

    def __str__(self) -> str:
        """``linear + 0.5 rbf(gamma=0.1)``."""
        return " + ".join(str(k) if w in (1.0, None) else f"{w:.4g} {k}" for w, k in self.terms)

    def _all_amplitudes(self) -> set[float]:
        return {kernel.amplitude for _, kernel in self.terms if isinstance(kernel, _Radial)}

    def _weighted(self) -> list[tuple[float, Kernel]]:
        return [(_given("weight", weight), kernel) for weight, kernel in self.terms]


@dataclass(frozen=True)
class Identity(Kernel):
    """1 where both subsets are the same, else 0: what is peculiar to a subset.

    The product kernel ``r^h`` with r = 0. Not searched: the ridge is the amount of it in the fit.
    """

    name: ClassVar[str] = "identity"

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether rows are equal."""
        return (torch.cdist(x, y, p=math.inf) == 0).to(torch.float64)

    def diagonal(self, x: Masks) -> Tensor:
        """1."""
        return torch.ones(len(x), dtype=torch.float64, device=x.values.device)

    def hamming_values(self, h: Tensor) -> Tensor:
        """1 at 0."""
        return (h == 0).to(torch.float64)

    def products(self, num_tasks: int, *, coarse: bool = False) -> list[Products]:
        """One, of infinite rate."""
        return [Products(torch.ones(1, dtype=torch.float64), _CERTAIN)]


def grams(kernels: Sequence[Sequence[Kernel]], tables: Sequence[Masks]) -> Tensor:
    """Gram matrices (b, K, m, m) of K kernels of every table.

    What two subsets share is counted once for all kernels of a table; kernels that are not
    :attr:`Kernel.is_counted`, and those of weights, each have their matrix for themselves.
    """
    everything = [kernel for each in kernels for kernel in each]
    counted = all(masks.binary for masks in tables)
    counted = counted and all(kernel.is_counted for kernel in everything)
    if len(everything) == 1:  # without a copy: it may be most of the memory
        return everything[0].gram(tables[0])[None, None]
    if not counted:
        pairs = zip(kernels, tables, strict=True)
        return torch.stack([torch.stack([k.gram(masks) for k in each]) for each, masks in pairs])
    n, device = tables[0].num_tasks, tables[0].values.device
    numbers = torch.arange(n + 1, dtype=torch.float64, device=device)
    overlap = torch.stack(
        [ops.mask_gram(masks.bits, None, n, overlap_table=numbers).long() for masks in tables]
    )
    sizes = torch.stack([masks.sizes for masks in tables])
    hamming = sizes[:, :, None] + sizes[:, None] - 2 * overlap  # (b, m, m)
    parts = []
    for values, counts in zip(_values(everything, numbers), (hamming, overlap), strict=True):
        lookup = values.reshape(len(tables), -1, n + 1)  # (b, K, n + 1)
        at = counts.flatten(1)[:, None].expand(-1, lookup.shape[1], -1)
        parts.append(lookup.gather(2, at).unflatten(2, counts.shape[1:]))
    amplitudes = numbers.new_tensor([kernel.amplitude for kernel in everything])
    if bool(amplitudes.any()):
        shares = 1 - sizes.to(torch.float64)[:, None] / max(n, 1)  # (b, 1, m) of tasks left out
        factors = torch.exp(amplitudes.reshape(len(tables), -1, 1) * shares)
        parts[0] *= factors[..., None] * factors[..., None, :]
    gram = parts[0] + parts[1]
    for of_table, each, masks in zip(gram, kernels, tables, strict=True):
        of_size: dict[int, Tensor] = {}  # by degree
        for matrix, kernel in zip(of_table, each, strict=True):
            for weight, degree in kernel.size_terms():
                if degree not in of_size:
                    of_size[degree] = Size(degree).gram(masks)
                matrix.add_(of_size[degree], alpha=weight)
    return gram


def _values(kernels: Sequence[Kernel], counts: Tensor) -> tuple[Tensor, Tensor]:
    """A and B of kernels at ``counts`` (n + 1,), each (K, n + 1), zero where one is absent.

    Kernels of one kind are computed together, as one kernel whose parameters are columns.
    """
    of_hamming, of_overlap = (counts.new_zeros(len(kernels), len(counts)) for _ in range(2))
    kinds: dict[Any, list[int]] = {}
    for index, kernel in enumerate(kernels):
        numeric = {type(value) for value in vars(kernel).values()} <= {int, float}
        kinds.setdefault(type(kernel) if numeric else index, []).append(index)
    for places in kinds.values():
        one = copy(kernels[places[0]])
        for name in vars(one) if len(places) > 1 else ():
            column = [[getattr(kernels[place], name)] for place in places]
            _set(one, name, torch.tensor(column, dtype=counts.dtype).to(counts.device))
        at = torch.tensor(places, device=counts.device)
        for all_values, found in (
            (of_hamming, one.hamming_values(counts)),
            (of_overlap, one.overlap_values(counts)),
        ):
            if found is not None:
                all_values[at] = found.expand(len(places), -1)
    return of_hamming, of_overlap


KERNELS: dict[str, type[Kernel]] = {
    kernel.name: kernel for kernel in (Linear, Polynomial, ANOVA2, RBF, Laplace, Exponential, Size)
}
_NAMED: dict[str, type[Kernel]] = {**KERNELS, Warped.name: Warped}  # the last for weights alone

KernelChoice = str | Kernel | type[Kernel] | Sequence[str | Kernel | type[Kernel]]
"""Kernels as :func:`ksm_ext.fit_surrogate` takes them: names, objects, classes, or several."""


def by_name(name: str) -> Kernel:
    """The kernel called ``name``; ``"linear+rbf"`` is a sum.

    Raises:
        ValueError: If a part of ``name`` is no kernel.
    """
    parts = []
    for part in name.split("+"):
        if part.strip() not in _NAMED:
            expected = f"'auto', one of {', '.join(_NAMED)}, a sum such as 'linear+rbf'"
            expected += ", or 'ard', 'lasso', 'least_squares' alone"
            remedy = "Pass a name, or an object such as ksm_ext.RBF(gamma=0.1)."
            raise ValueError(message("kernel", expected, repr(name), remedy))
        parts.append(_NAMED[part.strip()]())
    return parts[0] if len(parts) == 1 else Sum(tuple((None, kernel) for kernel in parts))


def as_kernel(given: object) -> Kernel:
    """A kernel from itself, its class or its name.

    Raises:
        TypeError: If ``given`` is none of these.
        ValueError: If it is a name of no kernel.
    """
    if isinstance(given, str):
        return by_name(given)
    if isinstance(given, Kernel):
        return given
    if isinstance(given, type) and given in _NAMED.values():
        kernel: Kernel = given()
        return kernel
    found = given.__name__ if isinstance(given, type) else type(given).__name__
    remedy = "Pass a name such as 'rbf', or an object such as ksm_ext.RBF()."
    raise TypeError(message("kernel", "a name or a kernel", found, remedy))


def from_description(description: dict[str, Any]) -> Kernel:
    """Inverse of :meth:`Kernel.describe`."""
    if description["name"] == Sum.name:
        return Sum(tuple((w, from_description(inner)) for w, inner in description["terms"]))
    parameters = {name: value for name, value in description.items() if name != "name"}
    return _NAMED[description["name"]](**parameters)


_TINY = 1e-12


def _legendre(sizes: Tensor, num_tasks: int, degree: int) -> Tensor:
    """``P_d(1 - 2 |S| / n) / sqrt(D)`` of d from 1 to D, by their recurrence, (C, D)."""
    x = 1 - 2 * sizes.to(torch.float64) / max(num_tasks, 1)
    found = [torch.ones_like(x), x]
    for d in range(1, degree):
        found.append(((2 * d + 1) * x * found[d] - d * found[d - 1]) / (d + 1))
    return torch.stack(found[1:], 1) / math.sqrt(degree)


def _given(name: str, value: T | None) -> T:
    if value is None:
        remedy = "Set it, or let fit_surrogate search it."
        raise ValueError(message(name, "a number", "None", remedy))
    return value


def _positive(name: str, value: object) -> float | None:
    """``value`` as Python's own float, which files can hold; None is left to be searched."""
    if value is None:
        return None
    remedy = "Leave it out to have it searched."
    number = check_real(name, value, "positive and finite", remedy)
    if not 0 < number < math.inf:
        raise ValueError(message(name, "positive and finite", str(value), remedy))
    return number


def _positive_each(name: str, value: object) -> Gamma:
    """A positive number, one for each task as a tuple, or None."""
    if value is None or getattr(value, "ndim", int(isinstance(value, list | tuple))) == 0:
        return _positive(name, value)
    numbers = as_tensor(name, value)
    if numbers.ndim != 1 or not len(numbers):
        remedy = "Leave it out to have it searched."
        found = shape_text(numbers)
        raise ValueError(message(name, "a number, or one for each task", found, remedy))
    return tuple(_given(name, _positive(name, number)) for number in numbers.tolist())


def _shared(gamma: Gamma) -> float:
    """The factor of distances, which include a gamma that is one for each task."""
    return 1.0 if isinstance(gamma, tuple) else _given("gamma", gamma)


def _shown(value: float | tuple[float, ...]) -> str:
    if isinstance(value, tuple):
        return f"{min(value):.4g} to {max(value):.4g}"
    return f"{value:.4g}"


def _set(kernel: Kernel, parameter: str, value: object) -> None:
    """Replace a parameter of a kernel that is being made, and frozen afterwards."""
    object.__setattr__(kernel, parameter, value)


def _fill(kernel: Any, parameter: str, values: Sequence[float]) -> list[Kernel]:
    if getattr(kernel, parameter) is not None:
        return [kernel]
    rest = {name: given for name, given in vars(kernel).items() if name != parameter}
    return [type(kernel)(**rest, **{parameter: value}) for value in values]


def _summands(kernel: Kernel) -> tuple[tuple[float | None, Kernel], ...]:
    return kernel.terms if isinstance(kernel, Sum) else ((1.0, kernel),)


def _total(parts: list[tuple[float, Tensor | None]]) -> Tensor | None:
    present = [weight * values for weight, values in parts if values is not None]
    return torch.stack(present).sum(0) if present else None
