r"""Kernels between subsets, each known in the three forms the library computes with.

On 0/1 masks every kernel here is a function of two integers, the Hamming distance ``h`` and the
overlap ``o = |S and S'|``:

.. math:: k(S, S') = A[h] + B[o], \qquad A[h] = \sum_j w_j e^{-\lambda_j h}

with B a polynomial, or one of the two absent.

1. ``tables``: A and B themselves, for the popcount kernels of :mod:`ksm_ext.ops`;
2. ``decays`` and ``overlap_degree``: A as a mixture of product kernels and the degree of B, from
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
===============  =====================================  ===========================

(``e_1``, ``e_2`` are the elementary symmetric polynomials of ``x_i y_i``.) Names and parameters are
scikit-learn's. A parameter left ``None`` is searched by :func:`ksm_ext.fit_surrogate`.

References: Rasmussen & Williams 2006, ch. 4; Zhang, Duan & Zhang 2026, arXiv:2602.03783.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from ksm_ext import ops
from ksm_ext.checks import check_real, message
from ksm_ext.surrogates.masks import Masks

_MATMUL_ENTRIES = 2**24  # of a Gram matrix of real weights, held at a time: 128 MB

Decays = list[tuple[float, float]]
"""Pairs (weight, rate): the kernel ``sum_j weight_j exp(-rate_j h)`` on masks."""


class Kernel(ABC):
    """A positive semi-definite function of two subsets."""

    name: ClassVar[str]
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

    def decays(self) -> Decays:
        """A as a mixture of exponentials; rate ``inf`` stands for the indicator of h = 0."""
        return []

    @property
    def overlap_degree(self) -> int:
        """Degree of B in ``o``; 0 where B is absent."""
        return 0

    def grid(self, masks: Masks) -> "list[Kernel]":
        """This kernel with its open parameters filled in, at the scales of ``masks``."""
        return [self]

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
            hamming, overlap = self.tables(x.num_tasks, x.values.device)
            bits = None if y is None else y.bits
            return ops.mask_gram(
                x.bits, bits, x.num_tasks, hamming_table=hamming, overlap_table=overlap
            )
        return self.on_weights(x.floats, x.floats if y is None else y.floats)

    def matmul(self, x: Masks, y: Masks | None, v: Tensor) -> Tensor:
        """``gram(x, y) @ v`` for v (l, t) float64, the (m, l) matrix never stored."""
        if x.binary and (y is None or y.binary):
            hamming, overlap = self.tables(x.num_tasks, x.values.device)
            bits = None if y is None else y.bits
            return ops.mask_gram_matmul(
                x.bits, bits, x.num_tasks, v, hamming_table=hamming, overlap_table=overlap
            )
        floats = (x if y is None else y).floats
        rows = max(1, _MATMUL_ENTRIES // max(len(floats), 1))
        return torch.cat([self.on_weights(part, floats) @ v for part in x.floats.split(rows)])

    def diagonal(self, x: Masks) -> Tensor:
        """``k(S, S)`` of every row, (m,) float64."""
        if x.binary:
            hamming, overlap = self.tables(x.num_tasks, x.values.device)
            total = x.values.new_zeros(len(x), dtype=torch.float64)
            if hamming is not None:
                total = total + hamming[0]
            return total if overlap is None else total + overlap[x.sizes]
        points = [row[None] for row in x.floats]  # the same tensor twice: distances exactly zero
        rows = [self.on_weights(point, point)[0, 0] for point in points]
        return torch.stack(rows) if rows else x.floats.new_zeros(0)

    def variance(self, masks: Masks) -> float:
        """Mean variance of a subset: the mean of ``k(S, S)`` less that of ``k(S, S')``."""
        gram = self.gram(masks)
        return float(gram.diagonal().mean() - gram.mean())

    def describe(self) -> dict[str, Any]:
        """Name and parameters as plain values, for storage; :func:`from_description` inverts it."""
        return {"name": self.name, **asdict(self)}  # type: ignore[call-overload]

    def __str__(self) -> str:
        """For people: ``rbf(gamma=0.02)``."""
        given = ", ".join(
            f"{field.name}={getattr(self, field.name):.4g}"
            for field in fields(self)  # type: ignore[arg-type]
            if getattr(self, field.name) is not None
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
    """Kernels ``exp(-gamma d)`` of a distance; ``gamma=None`` is searched around 1 / mean d."""

    gamma: float | None = None
    scales: ClassVar[Sequence[float]]

    def __post_init__(self) -> None:
        """Check the parameter."""
        _set(self, "gamma", _positive("gamma", self.gamma))

    @abstractmethod
    def typical_distance(self, masks: Masks) -> float:
        """Mean distance of two rows, the unit in which ``gamma`` is searched."""

    def on_weights(self, x: Tensor, y: Tensor) -> Tensor:
        """From distances; squared ones are clamped at zero against rounding."""
        gamma = _given("gamma", self.gamma)
        return ops.kernel_gram(x, None if x is y else y, self.name, gamma=gamma)

    def grid(self, masks: Masks) -> list[Kernel]:
        """``gamma`` at ``scales`` over the typical distance."""
        unit = max(self.typical_distance(masks), _TINY)
        return _fill(self, "gamma", [scale / unit for scale in self.scales])


@dataclass(frozen=True)
class RBF(_Radial):
    """``exp(-gamma ||x - y||^2)``, the paper's kernel; on masks the noise kernel ``r^h``."""

    name: ClassVar[str] = "rbf"
    scales: ClassVar[Sequence[float]] = (0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 4.0, 8.0)

    def typical_distance(self, masks: Masks) -> float:
        """Mean squared distance."""
        return masks.mean_squared_distance()

    def hamming_values(self, h: Tensor) -> Tensor:
        """``exp(-gamma h)``."""
        return torch.exp(-_given("gamma", self.gamma) * h)

    def decays(self) -> Decays:
        """One product kernel."""
        return [(1.0, _given("gamma", self.gamma))]


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
    scales: ClassVar[Sequence[float]] = (0.03, 0.1, 0.3, 1.0, 3.0)

    def typical_distance(self, masks: Masks) -> float:
        """Root mean squared distance."""
        return math.sqrt(masks.mean_squared_distance())

    def hamming_values(self, h: Tensor) -> Tensor:
        """``exp(-gamma sqrt(h))``."""
        return torch.exp(-_given("gamma", self.gamma) * h.sqrt())

    def decays(self) -> Decays:
        """The integral by the trapezoidal rule in ``log s``, to 1e-14.

        The integrand is analytic in a strip of half-width pi/2, so the error falls as
        ``exp(-pi^2 / step)``; beyond ``s = 50`` only h = 0 is left, which gets the missing mass.
        """
        log_gamma = math.log(_given("gamma", self.gamma))  # squares of gamma itself overflow
        step, start, stop = 0.28, 2 * log_gamma - math.log(160), math.log(50.0)
        count = max(1, math.ceil((stop - start) / step))
        mixture = []
        for index in range(count + 1):
            log_rate = start + index * step
            power = log_gamma - log_rate / 2 - math.exp(2 * log_gamma - log_rate) / 4
            weight = math.exp(power) / (2 * math.sqrt(math.pi))
            mixture.append((step * weight, math.exp(min(log_rate, 700.0))))
        return [*mixture, (1.0 - sum(weight for weight, _ in mixture), math.inf)]


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

    def hamming_values(self, h: Tensor) -> Tensor | None:
        """The weighted sum of the parts that have one."""
        return _total([(w, kernel.hamming_values(h)) for w, kernel in self._weighted()])

    def overlap_values(self, o: Tensor) -> Tensor | None:
        """The weighted sum of the parts that have one."""
        return _total([(w, kernel.overlap_values(o)) for w, kernel in self._weighted()])

    def decays(self) -> Decays:
        """All mixtures, weighted."""
        weighted = self._weighted()
        return [(w * weight, rate) for w, kernel in weighted for weight, rate in kernel.decays()]

    @property
    def overlap_degree(self) -> int:
        """The largest degree."""
        return max(kernel.overlap_degree for _, kernel in self.terms)

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

    def hamming_values(self, h: Tensor) -> Tensor:
        """1 at 0."""
        return (h == 0).to(torch.float64)

    def decays(self) -> Decays:
        """One, of infinite rate."""
        return [(1.0, math.inf)]


def grams(kernels: Sequence[Sequence[Kernel]], tables: Sequence[Masks]) -> Tensor:
    """Gram matrices (b, K, m, m) of K kernels of every table.

    What two subsets share is counted once for all kernels of a table; kernels with a ``gram`` of
    their own, and those of weights, each have their matrix from that.
    """
    everything = [kernel for each in kernels for kernel in each]
    counted = all(masks.binary for masks in tables) and all(
        type(kernel).gram is Kernel.gram for kernel in everything
    )
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
    return parts[0] + parts[1]


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
    kernel.name: kernel for kernel in (Linear, Polynomial, ANOVA2, RBF, Laplace, Exponential)
}

KernelChoice = str | Kernel | type[Kernel] | Sequence[str | Kernel | type[Kernel]]
"""Kernels as :func:`ksm_ext.fit_surrogate` takes them: names, objects, classes, or several."""


def by_name(name: str) -> Kernel:
    """The kernel called ``name``; ``"linear+rbf"`` is a sum.

    Raises:
        ValueError: If a part of ``name`` is no kernel.
    """
    parts = []
    for part in name.split("+"):
        if part.strip() not in KERNELS:
            expected = f"'auto', one of {', '.join(KERNELS)}, a sum such as 'linear+rbf'"
            remedy = "Pass a name, or an object such as ksm_ext.RBF(gamma=0.1)."
            raise ValueError(message("kernel", expected, repr(name), remedy))
        parts.append(KERNELS[part.strip()]())
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
    if isinstance(given, type) and given in KERNELS.values():
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
    return KERNELS[description["name"]](**parameters)


_TINY = 1e-12


def _given(name: str, value: float | None) -> float:
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
