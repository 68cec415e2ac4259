"""Per-sample gradients of any output, and the features that they are projected to.

For an output h (:mod:`.outputs`) at parameters W, sample i has the value h_i(W) and the
feature φ_i = Pᵀ ∇h_i(W), so that near W

    h_i(W + P z) ≈ h_i(W) + φ_i · z.

Gradients are taken in evaluation mode and with the math kernels of attention (:mod:`.engines`), and
go into the projection parameter by parameter: there is never a (b, p) matrix of the data. A
sample's feature is its own: the same up to rounding whatever the batches.

Shapes: values (b,), gradients (b, k); k is the projection's dimension, or p without one.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import ksm_ext
from ksm_ext.atomic_write import checked_path
from ksm_ext.checks import (
    check_choice,
    check_function,
    check_kind,
    check_positive_int,
    check_samples,
    check_several,
    message,
)
from ksm_ext.identity import fingerprint, identify
from ksm_ext.network.batches import (
    Batch,
    as_batch,
    chunks,
    content_digests,
    each,
    num_rows,
    ordered_loader,
    sample_checks,
)
from ksm_ext.network.distributed import Group, check_same, first, gathered, place, shard, wait
from ksm_ext.network.engines import Ladder, held_bytes
from ksm_ext.network.factored import FactoredProjector
from ksm_ext.network.factors import Part, blocks, flat, formed
from ksm_ext.network.features import Features, FeatureStore, load_features
from ksm_ext.network.hooks import Take
from ksm_ext.network.outputs import Output
from ksm_ext.ops.project import Projector

# Formed gradients of one chunk, unless batch_size is given. On a CPU they should stay near its
# cache: perceptrons and a small convolutional network take 1.3 to 1.9 times as long beyond (EPYC).
CPU_BYTES, GPU_BYTES, MAX_CHUNK = 2**25, 2**28, 64
PASS_BYTES = {"cpu": 2**28, "cuda": 2**31}  # kept for the backward pass of one chunk
BLOCK_BYTES = 2**23  # of rows of one weight's gradients that are formed together


class FlatProjector(Protocol):
    """What is asked of a projector of gradients that are formed, as ``ksm_ext.Projector`` is."""

    @property
    def dim(self) -> int:
        """The dimension k projected to."""

    def __call__(self, x: Tensor, *, offset: int = 0, out: Tensor | None = None) -> Tensor:
        """Add to out (b, k) what coordinates ``offset ...`` of the gradients, x (b, p_i), give."""


AnyProjector = FlatProjector | FactoredProjector
"""Of formed gradients, or of their factors."""


def parameter_names(model: nn.Module, parameters: str | Sequence[str] | None = None) -> list[str]:
    """Names of the parameters to differentiate by, in the model's order.

    Args:
        model: The network.
        parameters: Exact names, or patterns as file names have them: ``"*.attn.*"``,
            ``"head.weight"``, ``"*lora_*"``. They choose frozen parameters too. None: all
            parameters that require a gradient.

    Returns:
        Each parameter once, a shared one under its first name.

    Raises:
        ValueError: If a pattern matches nothing, or no parameter requires a gradient.
        TypeError: If the model is no module, or a name no text.
    """
    check_networks("model", model)
    if parameters is None:
        names = [name for name, weight in model.named_parameters() if weight.requires_grad]
        if not names:
            found = f"a {type(model).__name__} without any"
            remedy = "Name the parameters to differentiate by in `parameters`."
            raise ValueError(
                message("model", "a module with parameters that require a gradient", found, remedy)
            )
        return names
    first = {weight: name for name, weight in reversed(list(model.named_parameters()))}
    aliases = {
        name: first[weight] for name, weight in model.named_parameters(remove_duplicate=False)
    }
    chosen = set()
    given = [parameters] if isinstance(parameters, str) else parameters
    patterns = check_several("parameters", given, "names")
    if not patterns:
        remedy = "Pass None for all that require a gradient."
        raise ValueError(message("parameters", "one name or more", "none", remedy))
    for pattern in patterns:
        check_kind("parameters", pattern, str, "names or patterns", "Pass texts.")
        if pattern in aliases:
            matched = {aliases[pattern]}
        else:
            matched = {own for name, own in aliases.items() if fnmatchcase(name, pattern)}
        if not matched:
            close = get_close_matches(pattern, aliases, n=3, cutoff=0.4) or list(aliases)[:3]
            remedy = f"Did you mean {', '.join(repr(name) for name in close)}?"
            raise ValueError(
                message("parameters", "names or patterns of parameters", repr(pattern), remedy)
            )
        chosen |= matched
    return [name for name, _ in model.named_parameters() if name in chosen]


def check_networks(name: str, models: Any) -> list[nn.Module]:
    """One network or several, as a list.

    Raises:
        ValueError: If there is none.
        TypeError: If one is no module.
    """
    one = isinstance(models, nn.Module) or not hasattr(models, "__iter__")
    networks = [models] if one else check_several(name, models, "networks")
    for network in networks:
        check_kind(name, network, nn.Module, "a torch.nn.Module", "Pass the network itself.")
    if not networks:
        raise ValueError(message(name, "one network or more", "none", "Train one."))
    return networks


def check_output(output: object) -> None:
    """Raise ``TypeError`` unless it can be asked for the numbers of a batch."""
    remedy = "Pass such as ksm_ext.network.outputs.log_odds, or a function of your own."
    check_function("output", output, ("model", "batch"), remedy)


def check_projector(projector: object) -> None:
    """Raise ``TypeError`` unless it is a projector, or None."""
    if projector is not None and not (callable(projector) and hasattr(projector, "dim")):
        expected, found = "a projector with a `dim`", type(projector).__name__
        remedy = "Pass ksm_ext.Projector(dim), or None."
        raise TypeError(message("projector", expected, found, remedy))


def per_sample_gradients(
    model: nn.Module,
    output: Output,
    batch: Batch,
    *,
    parameters: str | Sequence[str] | None = None,
    chunk_size: int | None = None,
    engine: str = "auto",
) -> tuple[Tensor, dict[str, Tensor]]:
    """Values and gradients of an output on every sample of a batch.

    The model is in evaluation mode meanwhile: no dropout, running statistics as they are. Its
    flags, parameters and buffers are afterwards what they were before.

    Args:
        model: The network, on any device; the batch is moved there.
        output: ``output(model, batch) -> (b,)``, see :mod:`ksm_ext.network.outputs`; it is given
            batches of one sample.
        batch: Tensors (b, ...), in a tuple or by name.
        parameters: Which to differentiate by, see :func:`parameter_names`.
        chunk_size: Samples computed together; None: all.
        engine: ``"hooks"``, ``"vmap"``, ``"loop"`` or ``"backward"``, see :mod:`.engines`;
            ``"auto"`` takes the first of them that can.

    Returns:
        values (b,), and gradients (b, ...) by name, in the dtypes of output and parameters.

    Raises:
        ValueError: If the output is not one number for each sample, or a pattern in
            ``parameters`` is unknown.
        TypeError: If the batch holds anything but tensors.
        RuntimeError: If the one ``engine`` cannot.
    """
    check_output(output)
    batch = as_batch(batch, name="batch")
    names = parameter_names(model, parameters)
    weights = _named(model, names)
    batch = as_batch(batch, weights[names[0]].device)
    size = num_rows(batch) if chunk_size is None else check_positive_int("chunk_size", chunk_size)
    ladder, found = Ladder(engine), []
    for start in range(0, num_rows(batch), size):
        rows = slice(start, start + size)
        values, parts = ladder(model, output, each(itemgetter(rows), batch), names)
        found.append((values, formed(parts, weights, len(values))))
    gradients = {name: torch.cat([part[name] for _, part in found]) for name in names}
    return torch.cat([values for values, _ in found]), gradients


def collect_features(
    model: nn.Module,
    data: Any,
    output: Output,
    projector: AnyProjector | None = None,
    *,
    parameters: str | Sequence[str] | None = None,
    store: Any = None,
    batch_size: int | None = None,
    engine: str = "auto",
    progress: bool = False,
    group: Group = None,
) -> Features:
    """Values and projected gradients of an output on all samples of a data set, in its order.

    Args:
        model: The network, see :func:`per_sample_gradients`. Half-precision gradients are
            projected as they come: ``model.float()`` first gives better ones.
        data: A DataLoader that does not shuffle, a Dataset, or tensors (b, ...), in a
            tuple or by name.
            Batches are tuples of tensors or dicts of tensors by name.
        output: ``output(model, batch) -> (b,)``, see :mod:`ksm_ext.network.outputs`.
        projector: The projection, from p numbers to ``projector.dim``; None keeps all p. A
            :class:`.FactoredProjector` forms no gradients of weights.
        parameters: Which to differentiate by, see :func:`parameter_names`.
        store: A folder to write to, see :mod:`.features`. A run that was interrupted goes
            on where it was and ends with the same bits as one that was not (on CUDA, under
            ``torch.use_deterministic_algorithms``). It is refused if anything has changed that
            decides the features (:mod:`ksm_ext.identity`): for that all data are read and hashed
            first, and five of the rows that are done are computed again, to within rounding. None:
            in memory.
        batch_size: Samples computed together, whatever the batches of ``data``. None: by memory,
            at most 64. Where ``"hooks"`` take the network and gradients are projected, as many as
            keep 256 MiB for the backward pass (2 GiB on a GPU), by the first samples; else as many
            as have 32 MiB of gradients (256 MiB on a GPU).
        engine: See :func:`per_sample_gradients`.
        progress: Whether to show a progress bar; rank 0 does.
        group: The processes that share the work, see :mod:`.distributed`: each takes whole
            batches of ``batch_size`` samples, one stretch of them. All of them call, get all rows,
            and write to one store, on a file system that they share. None: this process alone.

    Returns:
        Row i for sample i, float64 if a parameter is, float32 otherwise; on the model's device,
        or mapped from the store. The same bits for any number of processes, unless samples have
        several shapes.

    Raises:
        ValueError: If the data are shuffled, an output or gradient is not finite, the store's
            features are of something else, or ranks differ in their model, data or arguments.
        TypeError: If ``data`` is none of these kinds.
        RuntimeError: If another process writes to the store, or the one ``engine`` cannot.
        OSError: If the store cannot be written to; what was done before is kept.
    """
    check_output(output)
    check_projector(projector)
    store = None if store is None else checked_path("store", store)
    names = parameter_names(model, parameters)
    weights = _named(model, names)
    if batch_size is not None:
        batch_size = check_positive_int("batch_size", batch_size)
    loader = ordered_loader(data, batch_size or samples_together(weights.values()))
    ladder = _ladder(engine, projector)
    # The engine and the batches are chosen by the first samples, so that all runs choose alike.
    few = as_batch(next(chunks(loader, min(2, batch_size or 2), 0)), weights[names[0]].device)
    ladder.settle(model, output, few, names)
    if batch_size is None:
        formed_all = projector is None or ladder.engines[0] != "hooks"
        batch_size = (
            samples_together(weights.values())
            if formed_all
            else samples_of_pass(model, output, few, names)
        )
    work = _Collection(
        model, weights, loader, output, projector, batch_size, ladder, progress, group
    )
    if store is None and place(group)[1] == 1:
        return work.in_memory()
    facts = work.facts()
    seen = {
        "data": fingerprint(sample_checks(loader)),
        "store": None if store is None else str(store),
    }
    check_same({**facts, **seen}, group)
    if store is not None:
        return work.in_store(store, facts)
    own, num_samples = work.in_memory(), work.num_samples
    values = gathered(own.values, num_samples, group, batch_size)
    gradients = gathered(own.gradients, num_samples, group, batch_size)
    return Features(values, gradients, engine=own.engine)


def usual_projector(model: nn.Module, parameters: str | Sequence[str] | None) -> Projector | None:
    """A signed block permutation to 1,024 dimensions; None where there are fewer parameters."""
    weights = _named(model, parameter_names(model, parameters)).values()
    return Projector(1024) if sum(weight.numel() for weight in weights) > 1024 else None


def projection_text(projector: AnyProjector | None) -> str:
    """What becomes of gradients, for a line that says how a result came about."""
    if projector is None:
        return "gradients as they are"
    return f"gradients projected to {projector.dim:,} dimensions"


def samples_together(weights: Collection[Tensor]) -> int:
    """How many samples have their gradients taken together, unless something else is asked for."""
    on_cpu = next(iter(weights)).device.type == "cpu"
    budget = CPU_BYTES if on_cpu else GPU_BYTES
    return max(1, min(MAX_CHUNK, budget // sum(weight.nbytes for weight in weights)))


def samples_of_pass(model: nn.Module, output: Output, few: Batch, names: Sequence[str]) -> int:
    """How many samples like these few ``"hooks"`` take together, whose gradients are projected.

    As many as keep 256 MiB for the backward pass (2 GiB on a GPU), and at most 64. With them counts
    the largest weight that is no matrix, whose gradients are formed.
    """
    weights = _named(model, names).values()
    budget = PASS_BYTES["cpu" if next(iter(weights)).device.type == "cpu" else "cuda"]
    kernel = max((weight.nbytes for weight in weights if weight.ndim != 2), default=0)
    each_bytes = held_bytes(model, output, few, names) // num_rows(few) + kernel
    return max(1, min(MAX_CHUNK, budget // max(each_bytes, 1)))


@dataclass(frozen=True)
class _Collection:
    """What features are of, and how this rank's rows of them are computed."""

    model: nn.Module
    weights: dict[str, Tensor]
    loader: DataLoader[Any]
    output: Output
    projector: AnyProjector | None
    batch_size: int
    ladder: Ladder
    progress: bool
    group: Group

    @property
    def num_samples(self) -> int:
        return len(self.loader.dataset)  # type: ignore[arg-type]

    @property
    def rows(self) -> range:
        return shard(self.num_samples, self.group, self.batch_size)

    @property
    def dim(self) -> int:
        num_parameters = sum(weight.numel() for weight in self.weights.values())
        return num_parameters if self.projector is None else self.projector.dim

    @property
    def dtype(self) -> torch.dtype:
        double = any(weight.dtype == torch.float64 for weight in self.weights.values())
        return torch.float64 if double else torch.float32

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def features_of(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Values (rows,) and features (rows, k)."""
        batch = as_batch(batch, self.device)
        common = self.model, self.output, batch, [*self.weights]
        if self.projector is None:
            values, parts = self.ladder(*common)
            whole = formed(parts, self.weights, len(values)).values()
            features = torch.cat([flat(block).to(self.dtype) for block in whole], dim=1)
        else:
            features = torch.empty(num_rows(batch), self.dim, dtype=self.dtype, device=self.device)
            begin = partial(_projection, self.weights, self.projector, features)
            values, _ = self.ladder(*common, begin)
        return values.to(self.dtype), features

    def blocks(self, num_done: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The features of this rank's samples, chunk by chunk, without the first ones."""
        rows, done = self.rows, self.rows.start + num_done
        hidden = not self.progress or place(self.group)[0] > 0
        with tqdm(total=len(rows), initial=num_done, unit=" samples", disable=hidden) as bar:
            for chunk in chunks(self.loader, self.batch_size, done, rows.stop):
                values, features = self.features_of(chunk)
                good = values.isfinite() & features.isfinite().all(dim=1)
                check_samples("output", good, start=done)
                yield values, features
                done += len(values)
                bar.update(len(values))

    def in_memory(self) -> Features:
        """The features of this rank's samples."""
        values = torch.empty(len(self.rows), dtype=self.dtype, device=self.device)
        gradients = values.new_empty(len(self.rows), self.dim)
        start = 0
        for block in self.blocks(0):
            rows = slice(start, start := start + len(block[0]))
            values[rows], gradients[rows] = block
        return Features(values, gradients, engine=self.ladder.engines[0])

    def facts(self) -> dict[str, Any]:
        """What decides the features and is cheap to tell, as JSON holds it."""
        return {
            "version": ksm_ext.__version__,
            "num_samples": self.num_samples,
            "dim": self.dim,
            "dtype": str(self.dtype).removeprefix("torch."),
            "parameters": {name: list(weight.shape) for name, weight in self.weights.items()},
            "model": fingerprint([*self.model.named_parameters(), *self.model.named_buffers()]),
            "precision": _precision(self.device),
            "batch_size": self.batch_size,
            "engine": self.ladder.engines[0],
        }

    def in_store(self, store: Path, facts: dict[str, Any]) -> Features:
        """The features of all ranks' samples, of which this rank writes its own."""
        group, rows = self.group, self.rows
        # Of one rank: in others, functions may well refer to another device, or another log file.
        things = {"output": self.output, "projector": self.projector, "network": self.model}
        facts = facts | first(identify(**things), group)
        shown = self.progress and not place(group)[0]
        digests, samples = content_digests(self.loader, self.batch_size, rows, _some(rows), shown)
        digests = gathered(digests, -(-self.num_samples // self.batch_size), group)
        facts["data"] = fingerprint([("blocks", digests)])
        with _shared_store(store, facts, rows, group) as file:
            tolerance = _tolerance(self.model, self.device)
            _check_stored(file, samples, self.features_of, tolerance, group)
            if file.num_done < len(rows):
                for block in self.blocks(file.num_done):
                    file.append(*block)
        wait(group)  # until every rank's rows are there
        return load_features(store)


def _some(rows: range) -> list[int]:
    """The first and the last row, and three others, the same ones in every run."""
    if len(rows) <= 5:
        return list(rows)
    inner = torch.randperm(len(rows) - 2, generator=torch.Generator().manual_seed(0))[:3]
    return [rows[0], *(rows[1 + int(row)] for row in inner), rows[-1]]


def _check_stored(
    file: FeatureStore,
    samples: Mapping[int, Batch],
    features_of: Callable[[Batch], tuple[Tensor, Tensor]],
    tolerance: float,
    group: Group,
) -> None:
    """Raise ``ValueError`` on every rank if some rows that are done are not what they would be now.

    This finds what has no identity, such as a compiled function, where it changes the features by
    more than rounding in another batch or on another device does.
    """
    done = [row for row in samples if row < file.rows.start + file.num_done]
    worst = torch.zeros(1, 2, dtype=torch.float64)  # the largest difference, and its row
    if done:
        stored = file.read(done)
        pairs = [features_of(samples[row]) for row in done]
        fresh = [torch.cat(parts) for parts in zip(*pairs, strict=True)]
        for table, again in zip((stored.values[:, None], stored.gradients), fresh, strict=True):
            again = again.reshape(table.shape).to(table)
            scale = torch.maximum(table.norm(dim=1).max(), again.norm(dim=1).max())
            difference = (table - again).norm(dim=1) / scale.clamp(
                min=torch.finfo(scale.dtype).tiny
            )
            largest = difference.argmax()
            if not float(difference[largest]) <= max(tolerance, float(worst[0, 0])):
                worst[0] = torch.tensor([float(difference[largest]), done[int(largest)]])
    found = gathered(worst, place(group)[1], group)
    bad = found[~(found[:, 0] <= tolerance)]
    if len(bad):
        share, row = bad[0].tolist()
        text = f"{file.path}, whose sample {int(row)} is now another by {share:.2g} of the largest"
        remedy = (
            "Something changed that has no identity, or the rows are damaged, or differ in every "
            "run: choose another folder, or delete this one."
        )
        raise ValueError(message("store", "a folder of the same features", text, remedy))


def _tolerance(model: nn.Module, device: torch.device) -> float:
    """How far features differ from one batch or device to another, of the largest: generously."""
    dtypes = {weight.dtype for weight in model.parameters()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)
    return 1e-6 if coarsest < 1e-12 else 1e-2 if coarsest < 1e-6 else 0.2


def _precision(device: torch.device) -> dict[str, str | None]:
    """Settings of PyTorch that decide how products are rounded."""
    enabled = torch.is_autocast_enabled(device.type)
    return {
        "float32_matmul": torch.get_float32_matmul_precision(),
        "autocast": str(torch.get_autocast_dtype(device.type)) if enabled else None,
    }


@contextmanager
def _shared_store(
    store: Any, meta: Mapping[str, Any], rows: range, group: Group
) -> Iterator[FeatureStore]:
    """The store, opened by rank 0 first, which lays out the files that the others find."""
    part = place(group)
    if part[0] > 0:
        wait(group)
        if not (Path(store) / "meta.json").is_file():
            remedy = "Choose a folder on a file system that all ranks see."
            found = f"{store}, where rank 0 has made one and this rank sees none"
            raise ValueError(message("store", "a folder that all ranks share", found, remedy))
    with FeatureStore.open(store, meta, part=part, rows=rows) as file:
        if part[0] == 0:
            wait(group)
        yield file


def _named(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
    weights = dict(model.named_parameters())
    return {name: weights[name] for name in names}


def _ladder(engine: str, projector: AnyProjector | None) -> Ladder:
    """Of all engines, or of the one that has the factors that the projector takes."""
    if not isinstance(projector, FactoredProjector):
        return Ladder(engine)
    check_choice("engine", engine, ("auto", "hooks"), "A Projector goes with every engine.")
    remedy = "Pass a Projector, which goes with every engine."
    return Ladder("hooks", remedy, argument="projector")


def _projection(weights: Mapping[str, Tensor], projector: AnyProjector, features: Tensor) -> Take:
    """What adds the projections of parts of gradients to features (b, k), which are zero first."""
    features.zero_()
    sizes = [weight.numel() for weight in weights.values()]
    offsets = dict(zip(weights, accumulate(sizes, initial=0), strict=False))

    def take(name: str, part: Part) -> None:
        weight, offset = weights[name], offsets[name]
        if isinstance(projector, FactoredProjector):
            features.add_(projector([part], weight.shape, offset=offset))
            return
        for start, block in blocks([part], BLOCK_BYTES):
            rows = flat(block.to(weight.dtype).to(features.dtype))
            projector(rows, offset=offset + start, out=features)

    return take
