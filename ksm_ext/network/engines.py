"""Engines of per-sample gradients, as a ladder: each is taken where the one above cannot.

- ``"hooks"``: activations times output gradients, by passes over whole batches (:mod:`.hooks`).
- ``"vmap"``: ``torch.func.grad`` of one sample, over all samples at once.
- ``"loop"``: the same, one sample after another.
- ``"backward"``: PyTorch's ordinary ``backward``, one sample after another. It takes every network
  that can be trained.

``"auto"`` begins at the top. Whatever an engine raises, the next one is asked, and if the last one
fails too its error is raised: it is the network's or the output's own. A step down is told once,
with its reason and its cost, to the logger ``ksm_ext.network.engines``, whose messages Python
writes to standard error. All engines agree to rounding.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from operator import itemgetter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from ksm_ext.checks import check_choice, message, shape_text
from ksm_ext.network.batches import Batch, columns, each, num_rows
from ksm_ext.network.factors import Part, Whole
from ksm_ext.network.hooks import Proofs, Take, Unsupported, per_sample_parts
from ksm_ext.network.outputs import Output

T = TypeVar("T")
Found = tuple[Tensor, dict[str, list[Part]]]
"""Values (b,), and by name the parts of gradients, (b, ...); zeros may have none."""

_LOG = logging.getLogger(__name__)
_TOLD: set[tuple[str, str]] = set()


class Ladder:
    """Engines in the order in which they are tried.

    One is for one network and one output, whose batches it learns to know.

    Args:
        engine: ``"auto"`` for all of them, or the only one.
        remedy: What to do where the only one cannot.
        argument: By which it was chosen.

    Attributes:
        engines: Those that are left.
    """

    def __init__(
        self,
        engine: str = "auto",
        remedy: str = "Pass engine='auto'.",
        *,
        argument: str = "engine",
    ) -> None:
        check_engine(engine)
        self.engines = tuple(_ENGINES) if engine == "auto" else (engine,)
        self._remedy, self._argument = remedy, argument
        self._run: dict[str, Callable[..., Tensor]] = {
            **_ENGINES,
            "hooks": partial(_hooks, proofs={}),
        }

    def __call__(
        self,
        model: nn.Module,
        output: Output,
        batch: Batch,
        names: Sequence[str],
        begin: Callable[[], Take] | None = None,
    ) -> Found:
        """Values (b,) and parts of gradients (b, ...) by name, by the first engine that can.

        Args:
            model: The network.
            output: What is differentiated.
            batch: b samples.
            names: Of the parameters.
            begin: Makes, for each engine that is tried, what takes its parts one after another in
                place of the answer; with ``"hooks"`` they are held no longer than by that.

        Raises:
            RuntimeError: If the only engine cannot.
        """
        return self._climb_down(model, output, batch, names, begin)[1]

    def settle(self, model: nn.Module, output: Output, batch: Batch, names: Sequence[str]) -> None:
        """Leave out the engines that cannot, by a small batch, if there is a choice."""
        if len(self.engines) > 1:
            first, _ = self._climb_down(model, output, batch, names)
            self.engines = self.engines[self.engines.index(first) :]

    def _climb_down(
        self,
        model: nn.Module,
        output: Output,
        batch: Batch,
        names: Sequence[str],
        begin: Callable[[], Take] | None = None,
    ) -> tuple[str, Found]:
        def found(engine: str) -> Found:
            parts: dict[str, list[Part]] = {name: [] for name in names}
            keep: Take = lambda name, part: parts[name].append(part)  # noqa: E731
            take = begin() if begin else keep
            return self._run[engine](model, output, batch, names, take), parts

        with evaluating(model):
            ways = {engine: partial(found, engine) for engine in self.engines}
            if len(ways) > 1:
                return first_that_can(type(model).__name__, ways)
            ((engine, way),) = ways.items()
            try:
                return engine, way()
            except Exception as error:
                if engine == "backward":
                    raise
                # An error of the network's or the output's own comes first.
                _backward(model, output, batch, names, lambda name, part: None)
                text = f"{_reason(engine, error)} for {type(model).__name__}"
                raise RuntimeError(
                    message(self._argument, "one that can", text, self._remedy)
                ) from error


def check_engine(engine: object) -> None:
    """Raise ``ValueError`` unless it is the name of an engine, or ``"auto"``."""
    remedy = "'auto' takes the first that the network allows."
    check_choice("engine", engine, ("auto", *_ENGINES), remedy)


def first_that_can(subject: str, ways: Mapping[str, Callable[[], T]]) -> tuple[str, T]:
    """The first way to something that raises no error, by name, and what it gives.

    A step down is told. Where no way is left the last one's error is raised.
    """
    reasons = []
    *_, last = ways
    for name, way in ways.items():
        try:
            found = way()
        except Exception as error:
            if name == last:
                raise
            reasons.append(_reason(name, error))
            continue
        if reasons:
            _tell(f"{subject} by '{name}', which {_COSTS[name]}, not by ", *reasons)
        return name, found
    raise AssertionError("there is a way")


def _reason(name: str, error: Exception) -> str:
    """Why a way leads nowhere, in a line."""
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else type(error).__name__
    return f"'{name}', which cannot ({text.rstrip('. ')})"


def _tell(what: str, reason: str, *others: str) -> None:
    """Once in a process, by the first reason: PyTorch's may name a shape, another in each batch."""
    if (what, reason) not in _TOLD:
        _TOLD.add((what, reason))
        _LOG.warning("%s%s.", what, "; ".join((reason, *others)))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The network as a function that has derivatives of every kind, and then as it was before.

    In evaluation mode; with the math kernels of attention (``"hooks"`` chooses its own), without
    fused recurrent ones, and with embeddings and weight normalisation in parts: others have no
    batching rule, no second derivative or a wrong one, or a forward derivative that moves the row
    ``padding_idx``. Rows that ``max_norm`` shortens are put back. Gradients are not recorded.
    """
    flags = {module: module.training for module in model.modules()}
    in_parts = [
        (owner, name, partial(_IN_PARTS[type(owner)], owner))
        for module in flags
        for owner, name in [(module, "forward"), *_hooks_of_weights(module)]
        if type(owner) in _IN_PARTS and name not in vars(owner)
    ]
    tables = [
        (module.weight, module.weight.detach().clone())
        for module in flags
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    recurrent = any(isinstance(module, nn.RNNBase) for module in flags)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _without_fused_kernels(recurrent):
        try:
            model.eval()
            for owner, name, function in in_parts:
                setattr(owner, name, function)
            yield
        finally:
            for owner, name, _ in in_parts:
                delattr(owner, name)
            for table, rows in tables:
                table.copy_(rows)
            for module, training in flags.items():
                module.training = training


@contextmanager
def _without_fused_kernels(recurrent: bool) -> Iterator[None]:
    """Attention and, where asked for, recurrent layers by operations that can be differentiated."""
    backends: list[Any] = [torch.backends.mkldnn, torch.backends.cudnn] if recurrent else []
    before = [backend.enabled for backend in backends]
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for backend in backends:
            backend.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for backend, enabled in zip(backends, before, strict=True):
            backend.enabled = enabled


def _rows_of(table: nn.Embedding | nn.EmbeddingBag, index: Tensor) -> Tensor:
    """Rows of a table, of which the one of ``padding_idx`` is constant."""
    rows = F.embedding(index, table.weight, None, table.max_norm, table.norm_type)
    if table.padding_idx is None:
        return rows
    return torch.where((index == table.padding_idx)[..., None], rows.detach(), rows)


def _embedding(table: nn.Embedding, input: Tensor) -> Tensor:
    if table.scale_grad_by_freq:
        return nn.Embedding.forward(table, input)
    return _rows_of(table, input)


def _embedding_bag(
    bags: nn.EmbeddingBag,
    input: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    if input.ndim != 2 or bags.scale_grad_by_freq:
        return nn.EmbeddingBag.forward(bags, input, offsets, per_sample_weights)
    rows = _rows_of(bags, input)  # (b, T, d)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    padding = -1 if bags.padding_idx is None else bags.padding_idx
    kept = (input != padding)[..., None]
    if bags.mode == "max":
        return rows.masked_fill(~kept, -torch.inf).amax(1).where(kept.any(1), 0.0)
    total = (rows * kept).sum(1)
    return total if bags.mode == "sum" else total / kept.sum(1).clamp(min=1)


def _weight_norm(norm: _WeightNorm | WeightNorm, weight_g: Tensor, weight_v: Tensor) -> Tensor:
    return weight_v * (weight_g / torch.norm_except_dim(weight_v, 2, norm.dim))


def _former_weight_norm(norm: WeightNorm, module: nn.Module) -> Tensor:
    parts = (getattr(module, f"{norm.name}_{part}") for part in "gv")
    return _weight_norm(norm, *parts)


def _hooks_of_weights(module: nn.Module) -> list[tuple[Any, str]]:
    """What makes a weight before each pass, as ``nn.utils.weight_norm`` does."""
    return [(hook, "compute_weight") for hook in module._forward_pre_hooks.values()]


_IN_PARTS: dict[type, Callable[..., Tensor]] = {
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding_bag,
    _WeightNorm: _weight_norm,
    WeightNorm: _former_weight_norm,
}


@contextmanager
def differentiable(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The named parameters, which alone require a gradient meanwhile and have none yet."""
    weights = dict(model.named_parameters())
    before = [(weight, weight.requires_grad, weight.grad) for weight in weights.values()]
    try:
        for name, weight in weights.items():
            weight.requires_grad_(name in names)
            weight.grad = None
        yield {name: weights[name] for name in names}
    finally:
        for weight, required, gradient in before:
            weight.requires_grad_(required)
            weight.grad = gradient


def used_beside(value: Tensor, weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the weights by which a value has a slope that was computed with others in place."""
    if not value.requires_grad:
        return []
    slopes = torch.autograd.grad(value.sum(), [*weights.values()], allow_unused=True)
    return [name for name, slope in zip(weights, slopes, strict=True) if slope is not None]


def _hooks(
    model: nn.Module,
    output: Output,
    batch: Batch,
    names: Sequence[str],
    take: Take,
    proofs: Proofs | None = None,
) -> Tensor:
    with differentiable(model, names) as weights, _attention(model):
        buffers = [*model.buffers()]
        return per_sample_parts(partial(output, model), batch, weights, take, buffers, proofs)


def _attention(model: nn.Module) -> AbstractContextManager[None]:
    """First derivatives alone may take a CPU's fused kernel, which keeps no (T, T) weights.

    Those of a GPU are not taken: nobody has compared them with the math kernels here.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in model.parameters())
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH] if on_cpu else SDPBackend.MATH)


def held_bytes(model: nn.Module, output: Output, batch: Batch, names: Sequence[str]) -> int:
    """What ``"hooks"`` keep of a batch for its backward pass, without data and parameters."""
    own = (*model.parameters(), *model.buffers(), *(column for _, column in columns(batch)))
    known = {x.untyped_storage().data_ptr() for x in own}
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return x

    with (
        evaluating(model),
        differentiable(model, names),
        _attention(model),
        torch.enable_grad(),
        saved_tensors_hooks(pack, lambda x: x),
    ):
        output(model, batch)
    return sum(held.values())


class _Applied(nn.Module):
    """An output of a network as a module, so that the output is given the network itself."""

    def __init__(self, model: nn.Module, output: Output) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, batch: Batch) -> Tensor:
        value = self.output(self.model, batch)
        if value.shape != (1,):
            expected = "a function (model, batch) -> (b,)"
            found = f"{shape_text(value)} for a batch of one sample"
            remedy = "Return one number for each of the b samples, whose columns are (b, ...)."
            raise ValueError(message("output", expected, found, remedy))
        return value[0]


def _of_weights(
    model: nn.Module, output: Output, names: Sequence[str]
) -> tuple[
    Callable[[dict[str, Tensor], Batch], tuple[dict[str, Tensor], Tensor]], dict[str, Tensor]
]:
    """A function of weights and a sample to gradients and value, and the weights."""
    applied = _Applied(model, output)
    own = dict(applied.named_parameters())
    weights = {name: own[f"model.{name}"].detach() for name in names}

    def value(weights: dict[str, Tensor], sample: Batch) -> Tensor:
        named = {f"model.{name}": weight for name, weight in weights.items()}
        one = each(itemgetter(None), sample)
        return functional_call(applied, named, (one,))

    return grad_and_value(value), weights


def _vmap(
    model: nn.Module, output: Output, batch: Batch, names: Sequence[str], take: Take
) -> Tensor:
    function, weights = _of_weights(model, output, names)
    with differentiable(model, names) as own, torch.enable_grad():
        gradients, values = vmap(function, in_dims=(None, 0))(weights, batch)
        _check_beside(values, own)
    _give_whole(gradients, take)
    return values.detach()


def _loop(
    model: nn.Module, output: Output, batch: Batch, names: Sequence[str], take: Take
) -> Tensor:
    function, weights = _of_weights(model, output, names)
    samples = [each(itemgetter(row), batch) for row in range(num_rows(batch))]
    with differentiable(model, names) as own, torch.enable_grad():
        pairs = [function(weights, sample) for sample in samples]
        values = torch.stack([value for _, value in pairs])
        _check_beside(values, own)
    gradients = {name: torch.stack([pair[0][name] for pair in pairs]) for name in names}
    _give_whole(gradients, take)
    return values.detach()


def _check_beside(values: Tensor, own: Mapping[str, Tensor]) -> None:
    """Raise :class:`Unsupported` if weights are used that no others can be put in place of."""
    if beside := used_beside(values, own):
        raise Unsupported(f"`{beside[0]}` is used beside the model's own modules")


def _backward(
    model: nn.Module, output: Output, batch: Batch, names: Sequence[str], take: Take
) -> Tensor:
    applied = _Applied(model, output)
    values = []
    with differentiable(model, names) as weights, torch.enable_grad():
        rows: dict[str, list[Tensor]] = {name: [] for name in weights}
        for row in range(num_rows(batch)):
            value = applied(each(itemgetter(slice(row, row + 1)), batch))
            if value.requires_grad:
                value.backward()
            values.append(value.detach())
            for name, weight in weights.items():
                gradient, weight.grad = weight.grad, None
                zero = torch.zeros_like(weight) if gradient is None else gradient
                rows[name].append(zero.to_dense() if zero.is_sparse else zero)
    gradients = {name: torch.stack(column) for name, column in rows.items()}
    _give_whole(gradients, take)
    return torch.stack(values)


def _give_whole(gradients: dict[str, Tensor], take: Take) -> None:
    for name, gradient in gradients.items():
        take(name, Whole(gradient.detach()))


_ENGINES: dict[str, Callable[..., Tensor]] = {
    "hooks": _hooks,
    "vmap": _vmap,
    "loop": _loop,
    "backward": _backward,
}
_COSTS = {
    "vmap": "holds the activations of every sample's own pass",
    "loop": "takes as many passes as there are samples",
    "backward": "takes as many passes as there are samples",
    "reverse": "differentiates backwards twice, vector after vector",
    "gradients": "forms the gradient of each sample",
}
