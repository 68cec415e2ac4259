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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ksm_ext.checks import check_choice, message, shape_text
from ksm_ext.network.batches import Batch, each, num_rows
from ksm_ext.network.factors import total
from ksm_ext.network.hooks import Proofs, per_sample_parts
from ksm_ext.network.outputs import Output

Found = tuple[Tensor, dict[str, Tensor]]
"""Values (b,), and gradients (b, *shape) by name."""

_LOG = logging.getLogger(__name__)


class Ladder:
    """Engines in the order in which they are tried.

    One is for one network and one output, whose batches it learns to know.

    Args:
        engine: ``"auto"`` for all of them, or the only one.

    Attributes:
        engines: Those that are left.
    """

    def __init__(self, engine: str = "auto") -> None:
        choices = ("auto", *_ENGINES)
        check_choice("engine", engine, choices, "'auto' takes the fastest that the network allows.")
        self.engines = tuple(_ENGINES) if engine == "auto" else (engine,)
        self._take: dict[str, Callable[..., Found]] = {
            **_ENGINES,
            "hooks": partial(_hooks, proofs={}),
        }

    def __call__(
        self, model: nn.Module, output: Output, batch: Batch, names: Sequence[str]
    ) -> Found:
        """Values (b,) and gradients (b, *shape) by name, by the first engine that can.

        Raises:
            RuntimeError: If the only engine cannot.
        """
        return self._climb_down(model, output, batch, names)[1]

    def settle(self, model: nn.Module, output: Output, batch: Batch, names: Sequence[str]) -> None:
        """Leave out the engines that cannot, by a small batch, if there is a choice."""
        if len(self.engines) > 1:
            first, _ = self._climb_down(model, output, batch, names)
            self.engines = self.engines[self.engines.index(first) :]

    def _climb_down(
        self, model: nn.Module, output: Output, batch: Batch, names: Sequence[str]
    ) -> tuple[str, Found]:
        failed: dict[str, Exception] = {}
        with evaluating(model):
            for engine in self.engines:
                try:
                    found = self._take[engine](model, output, batch, names)
                except Exception as error:
                    failed[engine] = error
                    continue
                if failed:
                    _tell(type(model).__name__, engine, tuple(map(_reason, failed.items())))
                return engine, found
            if "backward" not in failed:  # is it the engine's fault?
                _backward(model, output, each(itemgetter(slice(1)), batch), names)
        engine, fault = failed.popitem()
        if engine == "backward":
            raise fault
        text = f"{_reason((engine, fault))} for {type(model).__name__}"
        expected, remedy = "one that can", "Pass engine='auto'."
        raise RuntimeError(message("engine", expected, text, remedy)) from fault


def _reason(failed: tuple[str, Exception]) -> str:
    """Why an engine cannot, in a line."""
    engine, error = failed
    lines = str(error).strip().splitlines()
    text = lines[0][:200] if lines else type(error).__name__
    return f"'{engine}', which cannot ({text.rstrip('. ')})"


@cache
def _tell(model: str, engine: str, reasons: tuple[str, ...]) -> None:
    """Say it once in a process."""
    _LOG.warning("%s: engine='%s', %s. Not %s.", model, engine, _COSTS[engine], "; ".join(reasons))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The network as a function that has derivatives of every kind, and then as it was before.

    In evaluation mode; with the math kernels of attention and without fused recurrent ones, which
    have no batching rule or no second derivative; and rows of a table that ``max_norm`` shortens
    are put back. Gradients are not recorded.
    """
    flags = {module: module.training for module in model.modules()}
    tables = [
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None
    ]
    kept = [table.detach().clone() for table in tables]
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        if any(isinstance(module, nn.RNNBase) for module in flags):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for table, rows in zip(tables, kept, strict=True):
                table.copy_(rows)
            for module, training in flags.items():
                module.training = training


@contextmanager
def _differentiable(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
    """The named parameters, which alone require a gradient meanwhile and have none yet."""
    weights = dict(model.named_parameters())
    before = [(weight, weight.requires_grad, weight.grad) for weight in weights.values()]
    for name, weight in weights.items():
        weight.requires_grad_(name in names)
        weight.grad = None
    try:
        yield {name: weights[name] for name in names}
    finally:
        for weight, required, gradient in before:
            weight.requires_grad_(required)
            weight.grad = gradient


def _hooks(
    model: nn.Module,
    output: Output,
    batch: Batch,
    names: Sequence[str],
    proofs: Proofs | None = None,
) -> Found:
    with _differentiable(model, names) as weights:
        buffers = [*model.buffers()]
        values, parts = per_sample_parts(partial(output, model), batch, weights, buffers, proofs)
    gradients = {
        name: total(parts[name]).to(weight.dtype)
        if parts[name]
        else weight.new_zeros(len(values), *weight.shape)
        for name, weight in weights.items()
    }
    return values, gradients


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


def _vmap(model: nn.Module, output: Output, batch: Batch, names: Sequence[str]) -> Found:
    function, weights = _of_weights(model, output, names)
    gradients, values = vmap(function, in_dims=(None, 0))(weights, batch)
    return values, gradients


def _loop(model: nn.Module, output: Output, batch: Batch, names: Sequence[str]) -> Found:
    function, weights = _of_weights(model, output, names)
    samples = [each(itemgetter(row), batch) for row in range(num_rows(batch))]
    pairs = [function(weights, sample) for sample in samples]
    gradients = {name: torch.stack([pair[0][name] for pair in pairs]) for name in names}
    return torch.stack([value for _, value in pairs]), gradients


def _backward(model: nn.Module, output: Output, batch: Batch, names: Sequence[str]) -> Found:
    applied = _Applied(model, output)
    values = []
    with _differentiable(model, names) as weights, torch.enable_grad():
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
    return torch.stack(values), {name: torch.stack(column) for name, column in rows.items()}


_ENGINES = {"hooks": _hooks, "vmap": _vmap, "loop": _loop, "backward": _backward}
_COSTS = {
    "vmap": "which holds every sample's own activations and gradients of all layers",
    "loop": "which takes as many passes as there are samples",
    "backward": "which takes as many passes as there are samples",
}
