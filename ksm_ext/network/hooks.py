r"""Per-sample gradients from ordinary passes over a batch: activations times output gradients.

Where a linear layer maps the activations :math:`a_{it}` of sample i at position t, and
:math:`g_{it}` is the gradient of what it gives, the gradient of its weight on sample i alone is
:math:`\sum_t g_{it} a_{it}^\top`: one backward pass over the batch has those of all samples as
their factors (:mod:`.factors`), and a matrix is formed where one is asked for.

Nothing is asked of a network's modules. While its forward pass runs, every operation of PyTorch
that takes a parameter, or what was made of parameters alone (a normalised weight, an expert's
slice, rows of a table of positions), together with anything else is noted as a *use*: products,
convolutions, lookups, and what works entry by entry, to which normalisations are taken apart. What
was found is proved, and where that fails :class:`Unsupported` says why:

* every path of the graph from the output to a parameter leads through one use;
* a second backward pass, in which sample i weighs a power of two, multiplies the gradient at each
  entry of a use by that of one sample: so entries belong to samples, in whatever layout (samples
  first, positions first, flattened, tokens gathered by expert), and no two samples share one;
* one sample alone has the value that it has among the others.

The last two are shown once for batches of one shape, and for every batch of a network that picks
rows by the data, as a mixture of experts does.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode

from ksm_ext.network.batches import Batch, each, num_rows
from ksm_ext.network.factors import OuterProducts, Part, Patches, Rows, Whole, total


class Unsupported(Exception):
    """Why gradients of single samples cannot be had from one pass; the text is the reason."""


Proofs = dict[Any, "dict[int, _Layout]"]
"""What was shown of each use in batches, by the operations and shapes of their forward pass."""

Take = Callable[[str, Part], None]


def per_sample_parts(
    function: Callable[[Batch], Tensor],
    batch: Batch,
    weights: Mapping[str, Tensor],
    take: Take,
    buffers: Sequence[Tensor] = (),
    proofs: Proofs | None = None,
) -> Tensor:
    """Values of a function on a batch, and the parts of each sample's gradient.

    Parts come as the backward pass goes, which forgets what is behind it: if ``take`` does not keep
    them, no more is held than by training.

    Args:
        function: From a batch to one number for each sample, (b,).
        batch: b samples.
        weights: Parameters by name, which require a gradient; no others do.
        take: Is given the name of a parameter and one of its parts, whose ``gradient()`` add up to
            (b, ...), zero without any. They count for nothing where an error follows.
        buffers: Tensors that do not depend on the batch.
        proofs: Those of earlier batches of the same function, which grow by this one's.

    Returns:
        (b,).

    Raises:
        Unsupported: See the module's head.
    """
    b = num_rows(batch)
    with torch.enable_grad(), _Recorder(weights, buffers, b) as recorder:
        values = function(batch)
    if values.shape != (b,):
        raise Unsupported(f"the output has shape {tuple(values.shape)} for {b} samples")
    if values.requires_grad:
        _check_paths(values, recorder.uses.values(), weights)
    if not values.requires_grad or not recorder.uses:
        return values.detach()
    proofs, facts = {} if proofs is None else proofs, (b, recorder.steps)
    uses, names = recorder.uses, {id(weight): name for name, weight in weights.items()}
    proof = None
    if facts not in proofs:
        _check_alone(function, batch, values.detach(), recorder.rounding**0.5)
        proof = _Proof(values, uses, torch.float16 in recorder.dtypes)
    made: dict[int, tuple[Tensor, list[Part]]] = {}  # of parameters, by what was used

    def received(number: int, gradient: Tensor) -> None:
        use = uses.pop(number)
        if not gradient.numel():
            return
        layout = proof.layout(number, use, gradient) if proof else proofs[facts][number]
        for used in use.used:
            part = use.rule.part(use, used, gradient, layout)
            if id(used) in names:
                take(names[id(used)], part)
            else:
                made.setdefault(id(used), (used, []))[1].append(part)

    recorder.backward(values, received)
    if proof and recorder.fixed and all(layout.sure for layout in proof.layouts.values()):
        proofs[facts] = proof.layouts
    for name, pulled in _pulled_back([*made.values()], weights).items():
        take(name, pulled)
    return values.detach()


# -- the forward pass -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Use:
    """An operation that takes parameters and data, and where its result is in the graph."""

    function: Any
    rule: "_Rule"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    used: list[Tensor]
    number: int  # of the result, where there are several
    edge: Any
    behind: list[Any]  # nodes of the graph that the data come from

    def again(self, used: Tensor, replacement: Tensor) -> Tensor:
        """The result once more, as a function of one of what was used."""
        args, kwargs = _each_tensor(
            (self.args, self.kwargs), lambda x: replacement if x is used else x.detach()
        )
        return [*_tensors(self.function(*args, **kwargs))][self.number]


class _Recorder(TorchFunctionMode):
    """Notes every use, by what is constant: what is made of neither the batch nor anything unknown.

    To take data for constant, or the other way round, is not wrong: where a path to a parameter
    would be missed, or counted twice, :func:`_check_paths` refuses.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], buffers: Sequence[Tensor], num_samples: int
    ) -> None:
        super().__init__()
        self.uses: dict[int, _Use] = {}
        self.steps = 0  # a hash of what was done, and of the shapes that came of it
        self.dtypes: set[torch.dtype] = set()  # of what was computed
        self.fixed = True  # whether that decides which entries belong to which sample
        self._names = {id(weight): name for name, weight in weights.items()}
        self._constants = {id(tensor): tensor for tensor in buffers}
        self._num_samples = num_samples
        self._receivers: list[Callable[[int, Tensor], None]] = []

    @property
    def rounding(self) -> float:
        """The coarsest of what was computed."""
        return max((torch.finfo(dtype).eps for dtype in self.dtypes), default=0.0)

    def backward(self, values: Tensor, receive: Callable[[int, Tensor], None]) -> None:
        """Give the gradient of each use's result by its number, in a pass that leaves no graph.

        A pass to the uses before which there is no other goes through all of them.
        """
        edges = [use.edge for use in self.uses.values()]
        nodes = {edge.node for edge in edges}
        first = [
            edge
            for edge in edges
            if nodes.isdisjoint(_nodes([node for node, _ in edge.node.next_functions], {}))
        ]
        self._receivers.append(receive)
        try:
            torch.autograd.grad(values, first, torch.ones_like(values), allow_unused=True)
        finally:
            self._receivers.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = {id(tensor): tensor for tensor in _tensors((args, kwargs))}.values()
        data = [tensor for tensor in tensors if not self._is_constant(tensor)]
        used = [t for t in tensors if self._is_constant(t) and t.requires_grad]
        self.fixed = self.fixed and not _picks(func, args, kwargs, data)
        shaped = _name(func) in ("expand_as", "view_as", "reshape_as", "type_as", "to") or (
            func is Tensor.__getitem__ and all(tensor.ndim == 0 for tensor in data)
        )  # which part of it, or in which form: still it is made of parameters alone
        if used and data and torch.is_grad_enabled() and not shaped:
            return self._use(func, args, kwargs, used, data)
        result = func(*args, **kwargs)
        self._note(func, result)
        if not data or (used and shaped):
            self._keep(_tensors(result))
        elif _in_place(func):
            self._constants.pop(id(args[0]), None)
        return result

    def _is_constant(self, tensor: Tensor) -> bool:
        return id(tensor) in self._constants or isinstance(tensor, nn.Parameter)

    def _note(self, func: Any, result: Any) -> None:
        tensors = [*_tensors(result)]
        self.steps = hash((self.steps, _name(func), *(tensor.shape for tensor in tensors)))
        for tensor in tensors:
            if tensor.is_floating_point():
                self.dtypes.add(tensor.dtype)

    def _keep(self, tensors: Iterator[Tensor]) -> None:
        self._constants.update((id(tensor), tensor) for tensor in tensors)

    def _use(
        self, func: Any, args: Any, kwargs: Any, used: list[Tensor], data: list[Tensor]
    ) -> Any:
        if isinstance(func, FunctionType) and func.__module__ == F.__name__:
            with self:
                return _opened(func)(*args, **kwargs)
        name = _name(func)
        if name in _IN_PARTS and not (name == "addmm" and not kwargs):
            with self:
                return _IN_PARTS[name](*args, **kwargs)
        if name == "scaled_dot_product_attention":  # a bias of positions, or learnt queries
            with self:
                zero = data[0].new_zeros(len(data[0]), *[1] * (data[0].ndim - 1))
                wide = {id(tensor): tensor + zero for tensor in used}
                args, kwargs = _each_tensor((args, kwargs), lambda x: wide.get(id(x), x))
                return func(*args, **kwargs)
        function, recorded = func, args
        if _in_place(func):  # what it changes is kept as it was
            function, recorded = getattr(torch, name), (args[0].detach().clone(), *args[1:])
        behind = [tensor.grad_fn for tensor in data if tensor.requires_grad]
        result = func(*args, **kwargs)
        self._note(func, result)
        results = [*_tensors(result)]
        of_all = self._num_samples > 1 and all(x.shape[:1] in ((), (1,)) for x in results)
        if of_all and not behind:  # such as a bias and a mask that are one for all samples
            self._keep(iter(results))
            return result
        if name not in _RULES and any(x.requires_grad for x in results):
            names = [f" of `{self._names[id(t)]}`" for t in used if id(t) in self._names]
            raise Unsupported(f"there is no rule for `{name}`{''.join(names[:1])}")
        for number, x in enumerate(results):
            if x.requires_grad:
                edge, use = get_gradient_edge(x), len(self.uses)
                self.uses[use] = _Use(
                    function, _RULES[name], recorded, kwargs, used, number, edge, behind
                )
                x.register_hook(partial(_hand_over, self._receivers, use))
        return result


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _tensors(part)
    elif isinstance(x, dict):
        yield from _tensors([*x.values()])


def _each_tensor(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with ``function`` of each tensor."""
    if isinstance(x, dict):
        return {name: _each_tensor(part, function) for name, part in x.items()}
    if isinstance(x, (tuple, list)):
        return type(x)(_each_tensor(part, function) for part in x)
    return function(x) if isinstance(x, Tensor) else x


def _name(func: Any) -> str:
    return getattr(func, "__name__", type(func).__name__).strip("_")


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _picks(func: Any, args: Any, kwargs: Any, data: list[Tensor]) -> bool:
    """Whether rows may be picked by the data, so that their order is another in every batch."""
    name = _name(func)
    numbers = [tensor for tensor in data if not tensor.is_floating_point()]
    if name in ("item", "tolist", "numpy", "int", "index"):
        return any(tensor.dtype != torch.bool for tensor in numbers)
    if not numbers or len(numbers) == len(data) or name in _BY_ENTRY:
        return False
    within = [x for x in (*args[1:2], kwargs.get("dim")) if isinstance(x, int)]
    last = args[0].ndim - 1 if args and isinstance(args[0], Tensor) else 0
    return not (name in ("gather", "scatter") and last > 0 and within[:1] in ([-1], [last]))


_BY_ENTRY = (
    *("add", "sub", "rsub", "mul", "div", "pow", "eq", "ne", "lt", "gt", "le", "ge"),
    *("where", "masked_fill", "to", "type_as", "expand_as", "copy", "scaled_dot_product_attention"),
    *("nll_loss", "nll_loss_nd", "cross_entropy", "cross_entropy_loss"),
)


@cache
def _opened(func: FunctionType) -> FunctionType:
    """A function of ``torch.nn.functional`` that shows the operations that it is made of.

    It is the same code: only that it does not ask whether to be handled as a whole.
    """
    asks = [name for name in func.__globals__ if name.startswith("has_torch_function")]
    known = {**func.__globals__, **dict.fromkeys(asks, lambda *tensors: False)}
    opened = FunctionType(func.__code__, known, func.__name__, func.__defaults__, func.__closure__)
    opened.__kwdefaults__ = func.__kwdefaults__
    return opened


# Operations of several parts, of which each has a rule; arguments as PyTorch's own.


def _scaled(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if weight is None:
        return x if bias is None else x + bias
    return (x * weight if bias is None else torch.addcmul(bias, x, weight)).to(x.dtype)


def _layer_norm(
    input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return _scaled(torch.layer_norm(input, shape, None, None, eps), weight, bias)


def _rms_norm(input: Tensor, shape: Any, weight: Any = None, eps: Any = None) -> Tensor:
    return _scaled(torch.rms_norm(input, shape, None, eps), weight, None)


def _by_channel(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    weight, bias = (
        None if part is None else part.reshape(-1, *[1] * (x.ndim - 2)) for part in (weight, bias)
    )
    return _scaled(x, weight, bias)


def _group_norm(
    input: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return _by_channel(torch.group_norm(input, groups, None, None, eps), weight, bias)


def _batch_norm(input: Tensor, weight: Any, bias: Any, *statistics: Any) -> Tensor:
    return _by_channel(torch.batch_norm(input, None, None, *statistics), weight, bias)


def _instance_norm(input: Tensor, weight: Any, bias: Any, *statistics: Any) -> Tensor:
    return _by_channel(torch.instance_norm(input, None, None, *statistics), weight, bias)


def _addmm(
    input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = torch.matmul(mat1, mat2)
    return (input if beta == 1 else beta * input) + (product if alpha == 1 else alpha * product)


def _grouped_mm(input: Tensor, weight: Tensor, offs: Any = None, *_: Any, **others: Any) -> Tensor:
    """Rows of experts, who follow each other up to the rows ``offs``."""
    if offs is None or (input.ndim, weight.ndim) != (2, 3) or any(others.values()):
        raise Unsupported("there is no rule for this `grouped_mm`")
    counts = offs.diff(prepend=offs.new_zeros(1)).tolist()
    rows = input[: sum(counts)].split(counts)
    parts = [torch.matmul(own, weight[expert]) for expert, own in enumerate(rows) if len(own)]
    return torch.cat([*parts, input.new_zeros(len(input) - sum(counts), weight.shape[2])])


_IN_PARTS: dict[str, Callable[..., Tensor]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "instance_norm": _instance_norm,
    "addmm": _addmm,
    "baddbmm": _addmm,
    "grouped_mm": _grouped_mm,
}


# -- the backward passes --------------------------------------------------------------------------


def _hand_over(receivers: list[Callable[[int, Tensor], None]], use: int, gradient: Tensor) -> None:
    """A hook, which knows nothing of the graph that knows the hook: neither would be freed."""
    for receive in receivers:
        receive(use, gradient)


def _check_paths(values: Tensor, uses: Collection[_Use], weights: Mapping[str, Tensor]) -> None:
    """Raise :class:`Unsupported` unless each path to a parameter leads through one use."""
    names = {id(weight): name for name, weight in weights.items()}
    behind = {use.edge.node: use.behind for use in uses}
    for node in _nodes([values.grad_fn], behind):
        if id(getattr(node, "variable", None)) in names:
            name = names[id(node.variable)]
            raise Unsupported(f"`{name}` is used where no operation of PyTorch is to be seen")
    made = [used.grad_fn for use in uses for used in use.used]
    if any(node in behind for node in _nodes(made, {})):
        raise Unsupported("what is made of parameters is made of data too")


def _nodes(starts: list[Any], behind: Mapping[Any, list[Any]]) -> Iterator[Any]:
    """Nodes of the graph that paths lead to; those ``behind`` a node may be given."""
    todo, seen = [*starts], {None}
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            yield node
            todo += behind[node] if node in behind else [n for n, _ in node.next_functions]


def _check_alone(
    function: Callable[[Batch], Tensor], batch: Batch, values: Tensor, tolerance: float
) -> None:
    """Raise :class:`Unsupported` if the last sample has another value without the others."""
    if len(values) > 1:
        with torch.no_grad():
            alone = function(each(lambda column: column[-1:], batch))
        if not torch.allclose(alone, values[-1:], rtol=tolerance, atol=tolerance, equal_nan=True):
            found = f"{float(values[-1]):.6g} among {len(values)} and {float(alone):.6g} alone"
            raise Unsupported(f"a sample's output depends on the others: {found}")


class _Proof:
    """What of each gradient belongs to which sample, by backward passes of other weights.

    Attributes:
        layouts: By the numbers of the uses that have shown theirs.
    """

    def __init__(self, values: Tensor, uses: Mapping[int, _Use], half: bool) -> None:
        self.layouts: dict[int, _Layout] = {}
        self._digits: list[Tensor] = []
        base = 4 if half else 64  # powers of two that numbers have room for
        rest = torch.arange(len(values), device=values.device)
        while int(rest[-1]) > 0:
            self._digits.append(rest % base)
            rest = rest // base
        edges = [use.edge for use in uses.values()]
        options: dict[str, Any] = {"retain_graph": True, "allow_unused": True}
        passes = [
            torch.autograd.grad(values, edges, digit.exp2().to(values), **options)
            for digit in self._digits
        ]
        by_use = [*zip(*passes, strict=True)] or [()] * len(uses)
        self._scaled: dict[int, tuple[Tensor, ...]] = dict(zip(uses, by_use, strict=True))

    def layout(self, number: int, use: _Use, gradient: Tensor) -> "_Layout":
        """That of a use, by its gradient with weights of one."""
        scaled = self._scaled.pop(number)
        self.layouts[number] = _Layout.find(use, gradient, scaled, self._digits)
        return self.layouts[number]


@dataclass(frozen=True, eq=False)
class _Layout:
    """Which sample each row of a use's result belongs to, a row being all but its features.

    Attributes:
        num_samples: b.
        samples: Numbers of samples, as broadcast to the result; -1 where there is no gradient.
        axis: The axis that goes through all samples in turn, or None if there is none.
        first: Whether it is (b, T) flattened, not (T, b).
        sure: Whether nothing else explains the gradients, of which no sample's is zero.
    """

    num_samples: int
    samples: Tensor
    axis: int | None = None
    first: bool = True
    sure: bool = True

    @classmethod
    def find(
        cls, use: _Use, gradient: Tensor, scaled: Sequence[Tensor], digits: list[Tensor]
    ) -> "_Layout":
        """From the gradient, and what weights of powers of two make of it."""
        if not digits:
            return cls(1, gradient.new_zeros([1] * gradient.ndim, dtype=torch.int64))
        b = len(digits[0])
        num_features = use.rule.num_features
        rows = gradient.ndim - num_features if num_features >= 0 else 1
        size = gradient.numel()
        places = torch.linspace(0, size - 1, min(size, 2048), dtype=torch.float64).long()
        few, *few_scaled = (x.reshape(-1)[places.to(x.device)] for x in (gradient, *scaled))
        found = []
        for axis in range(rows):
            times, rest = divmod(gradient.shape[axis], b)
            behind = math.prod(gradient.shape[axis + 1 :])
            for first in (True, False)[: times if not rest else 0]:
                numbers = torch.arange(b, device=gradient.device)
                numbers = numbers.repeat_interleave(times) if first else numbers.repeat(times)
                samples = numbers.reshape(-1, *[1] * (gradient.ndim - axis - 1))
                at_places = numbers[places.to(numbers.device) // behind % len(numbers)]
                # most of those that are wrong are wrong on a few entries
                if _explain(at_places, few, few_scaled, digits) and _explain(
                    samples, gradient, scaled, digits
                ):
                    found.append(cls(b, samples, axis, first))
        if found:
            there = bool((found[0].split(gradient) != 0).flatten(1).any(1).all())
            return replace(found[0], sure=there and len(found) == 1)
        by_row = _samples_by_row(gradient, scaled, digits, rows)
        if by_row is None or not _explain(by_row.clamp(min=0), gradient, scaled, digits):
            raise Unsupported(f"samples of a batch share what `{_name(use.function)}` gives")
        return cls(b, by_row, sure=False)

    def split(self, x: Tensor) -> Tensor:
        """(b, ...): the samples first, and what an axis has for each where it was."""
        if self.axis is None:
            return x[None]
        times = x.shape[self.axis] // self.num_samples
        sizes = (self.num_samples, times) if self.first else (times, self.num_samples)
        parts = x.unflatten(self.axis, sizes)
        return parts.movedim(self.axis if self.first else self.axis + 1, 0)

    @property
    def regular(self) -> bool:
        """Whether :meth:`split` can be asked."""
        return self.axis is not None or self.num_samples == 1

    def rows(self, x: Tensor, num_features: int = 1) -> Tensor:
        """(b, T, *features): the rows of each sample, and zeros where others have more."""
        features = x.shape[x.ndim - num_features :]
        if self.regular:
            times = math.prod(x.shape[: x.ndim - num_features]) // self.num_samples
            return self.split(x).reshape(self.num_samples, times, *features)
        samples, x = self.samples.flatten(), x.reshape(-1, *features)
        order = samples.argsort(stable=True)[int((samples < 0).sum()) :]
        counts = samples[order].bincount(minlength=self.num_samples)
        return pad_sequence(x[order].split(counts.tolist()), batch_first=True)

    def masks(self) -> Tensor:
        """(b, ...) bool: what belongs to each sample, as broadcast to the result behind b."""
        numbers = torch.arange(self.num_samples, device=self.samples.device)
        return numbers.reshape(-1, *[1] * self.samples.ndim) == self.samples


def _explain(
    samples: Tensor, gradient: Tensor, scaled: Sequence[Tensor], digits: list[Tensor]
) -> bool:
    """Whether the weights of these samples make of the gradient what they were seen to make."""
    limits = torch.finfo(gradient.dtype)
    rounding = {"rtol": 16 * limits.eps, "atol": 64 * limits.tiny * limits.eps}  # of denormals
    weighted_back = (
        after * (-digit[samples]).exp2().to(gradient)
        for after, digit in zip(scaled, digits, strict=True)
    )
    return all(
        torch.equal(once, gradient)  # as a rule, and much faster
        or torch.allclose(once, gradient, **rounding, equal_nan=True)
        for once in weighted_back
    )


def _samples_by_row(
    gradient: Tensor, scaled: Sequence[Tensor], digits: list[Tensor], rows: int
) -> Tensor | None:
    """The only numbers that may explain the gradients, (rows..., 1...); None if there are none."""
    if not bool(gradient.isfinite().all()):
        return None
    row = gradient.reshape(*gradient.shape[:rows], -1)
    largest = row.abs().argmax(-1, keepdim=True)
    samples = torch.zeros_like(largest)
    base = 1 + int(digits[0].max())
    for place, after in enumerate(scaled):
        digit = (after.reshape(row.shape).gather(-1, largest) / row.gather(-1, largest)).log2()
        samples += digit.where(digit.isfinite(), 0.0).round().long() * base**place
    samples = samples.where(row.gather(-1, largest) != 0, -1)
    if bool((samples >= len(digits[0])).any()) or bool((samples < -1).any()):
        return None
    return samples.reshape(*gradient.shape[:rows], *[1] * (gradient.ndim - rows))


# -- rules ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    """How what was used is differentiated by.

    Attributes:
        part: From a use, what was used, the gradient of the result and its layout.
        num_features: Last dimensions of the result that belong to one sample; -1: all but one.
    """

    part: Callable[[_Use, Tensor, Tensor, _Layout], Part]
    num_features: int


def _arguments(use: _Use, *names: str) -> list[Any]:
    """Those of these names, by place or by name; None where they are not given."""
    given = {**dict(zip(names, use.args, strict=False)), **use.kwargs}
    return [given.get(name) for name in names]


def _linear(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    x, weight = _arguments(use, "input", "weight")
    gradients = layout.rows(gradient)
    if used is weight:
        return OuterProducts(layout.rows(x.detach()), gradients, used.shape)
    if used is x:
        raise Unsupported("the weight of a `linear` depends on the data")
    return Whole(gradients.sum(1))


def _matmul(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    x, weight = _arguments(use, "input", "other")
    if used is not weight or weight.ndim not in (2, x.ndim):
        raise Unsupported(f"there is no rule for this `{_name(use.function)}`")
    x = x.detach()
    if weight.ndim == 2:
        return OuterProducts(layout.rows(x), layout.rows(gradient), used.shape, transposed=True)
    of_one_sample = layout.num_samples == 1 or layout.axis == x.ndim - 2
    if not of_one_sample or weight.shape[:-2] != x.shape[:-2]:
        raise Unsupported(f"there is no rule for this `{_name(use.function)}`")
    return OuterProducts(layout.split(x), layout.split(gradient), used.shape, transposed=True)


def _addmm_of(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    """As :func:`_matmul` with a bias, without what the product alone would take."""
    bias, x, weight = use.args
    if used is bias and used is not weight:
        return _gathered(gradient.to(used.dtype), used, layout)
    return _matmul(replace(use, args=(x, weight)), used, gradient, layout)


def _convolution(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    x, weight, how = _padded(*use.args, **use.kwargs)
    if x.ndim != weight.ndim or not layout.regular:
        raise Unsupported(f"there is no rule for this `{_name(use.function)}`")
    if used is weight:
        return Patches(layout.split(x.detach()), layout.split(gradient), used.shape, how)
    return Whole(layout.split(gradient.flatten(2).sum(2)).sum(1))


def _padded(
    input: Tensor,
    weight: Tensor,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Input and weight of a convolution, and its other arguments, with the padding in numbers."""
    if isinstance(padding, str):
        steps = dilation if isinstance(dilation, (tuple, list)) else (dilation,) * (input.ndim - 2)
        spans = [d * (k - 1) for d, k in zip(steps, weight.shape[2:], strict=True)]
        sides = [side for span in reversed(spans) for side in (span // 2, span - span // 2)]
        input, padding = F.pad(input, sides) if padding == "same" else input, 0
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return input, weight, how


def _embedding(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq")
    _, index, padding, by_frequency = _arguments(use, *names)
    if by_frequency:
        raise Unsupported("there is no rule for an `embedding` that scales by frequency")
    if padding is not None:
        gradient = gradient.masked_fill((index == padding)[..., None], 0.0)
    return Rows(layout.rows(index, 0), layout.rows(gradient), used.shape)


def _entrywise(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    """Of what is broadcast to the result and goes into one of its entries each."""
    wide = used.detach().expand(gradient.shape).requires_grad_()
    with torch.enable_grad():
        (entries,) = torch.autograd.grad(use.again(used, wide), wide, gradient)
    return _gathered(entries, used, layout)


def _addcmul(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    """As :func:`_entrywise`, of the affine maps behind normalisations."""
    bias, x, *_ = use.args
    if use.kwargs or used is x:
        return _entrywise(use, used, gradient, layout)
    return _gathered(gradient if used is bias else gradient * x.detach(), used, layout)


def _gathered(entries: Tensor, used: Tensor, layout: _Layout) -> Part:
    """Gradients by entries of the result, added up for each sample to those of what was used."""
    missing = entries.ndim - used.ndim
    axis = -1 if layout.axis is None else layout.axis - missing
    whole = layout.regular and (axis < 0 or used.shape[axis] == 1)
    by_sample = layout.split(entries) if whole else entries * layout.masks()
    shape = (layout.num_samples, *[1] * missing, *used.shape)
    return Whole(by_sample.sum_to_size(shape).reshape(layout.num_samples, *used.shape))


def _by_sample(use: _Use, used: Tensor, gradient: Tensor, layout: _Layout) -> Part:
    """By the operation's own derivative, one sample after another: for those that cost little."""
    inner = used.detach().requires_grad_()
    with torch.enable_grad():
        result = use.again(used, inner)
    rows = [
        torch.autograd.grad(result, inner, gradient * mask, retain_graph=True)[0]
        for mask in layout.masks()
    ]
    return Whole(torch.stack(rows))


_ENTRYWISE = (
    *("add", "sub", "rsub", "mul", "div", "true_divide", "truediv", "rtruediv", "rdiv"),
    *("where", "pow", "maximum", "minimum"),
)
_CHEAP = (
    *("cat", "concat", "concatenate", "stack", "getitem", "index_select"),
    *("embedding_bag", "prelu"),
)
_RULES = {
    "linear": _Rule(_linear, 1),
    **dict.fromkeys(("matmul", "mm", "bmm"), _Rule(_matmul, 1)),
    "addmm": _Rule(_addmm_of, 1),
    **dict.fromkeys(("conv1d", "conv2d"), _Rule(_convolution, -1)),
    "embedding": _Rule(_embedding, 1),
    "addcmul": _Rule(_addcmul, 0),
    **dict.fromkeys(_ENTRYWISE, _Rule(_entrywise, 0)),
    **dict.fromkeys(_CHEAP, _Rule(_by_sample, 0)),
}


def _pulled_back(
    made: list[tuple[Tensor, list[Part]]], weights: Mapping[str, Tensor]
) -> dict[str, Part]:
    """Gradients of what was made of parameters, as gradients of these."""
    if not made:
        return {}
    used = [tensor for tensor, _ in made]
    totals = [total(own).to(tensor) for tensor, own in made]
    rows = [
        torch.autograd.grad(used, [*weights.values()], one, retain_graph=True, allow_unused=True)
        for one in zip(*totals, strict=True)
    ]
    columns = zip(weights, zip(*rows, strict=True), strict=True)
    return {name: Whole(torch.stack(column)) for name, column in columns if column[0] is not None}
