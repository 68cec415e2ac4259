"""Samples in the order of their data set, regrouped from a loader's batches.

A batch is a tuple of tensors (b, ...) or a dict of them by name; a sample is one without the b.
"""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sized
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    StackDataset,
    TensorDataset,
    default_collate,
)
from tqdm import tqdm

from ksm_ext.arrays import as_tensor
from ksm_ext.checks import check_positive_int, check_several, message, shape_text
from ksm_ext.identity import content_of

Batch = tuple[Tensor, ...] | dict[str, Tensor]

_COLUMNS = (Tensor, np.ndarray)


def as_batch(batch: Any, device: torch.device | None = None, *, name: str = "data") -> Batch:
    """What a loader yields, as a batch on ``device``.

    Args:
        batch: A tuple, list or mapping of tensors or arrays.
        device: None leaves them where they are.
        name: The argument that it comes from.

    Raises:
        TypeError: If it is not a tuple, list or mapping, or holds anything but tensors.
        ValueError: If its tensors differ in their number of rows.
    """
    if not isinstance(batch, (Mapping, tuple, list)):
        remedy = "Collate the samples into a tuple or dict of tensors."
        found = type(batch).__name__
        raise TypeError(message(name, "batches that are tuples or dicts", found, remedy))
    batch = dict(batch) if isinstance(batch, Mapping) else tuple(batch)
    batch = each(lambda x: as_tensor(name, x) if isinstance(x, np.ndarray) else x, batch)
    for place, column in columns(batch):
        if not isinstance(column, Tensor):
            found = f"{type(column).__name__} in {place}"
            remedy = "Drop it or collate it to a tensor (HuggingFace: with_format('torch'))."
            raise TypeError(message(name, "batches of tensors", found, remedy))
    if len({column.shape[:1] for _, column in columns(batch)} - {()}) != 1:
        found = " and ".join(shape_text(column) for _, column in columns(batch)) or "nothing"
        raise ValueError(message(name, "tensors of one row per sample", found, "Align them."))
    return each(lambda column: column.to(device), batch)


def columns(batch: Batch) -> list[tuple[str, Tensor]]:
    """The batch's tensors, each with its name or place."""
    pairs = batch.items() if isinstance(batch, dict) else enumerate(batch)
    return [(str(name), column) for name, column in pairs]


def each(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The batch with ``function`` of each tensor."""
    if isinstance(batch, dict):
        return {name: function(column) for name, column in batch.items()}
    return tuple(function(column) for column in batch)


def num_rows(batch: Batch) -> int:
    """How many samples there are in the batch."""
    return len(columns(batch)[0][1])


def as_dataset(data: Any) -> Any:
    """Samples by number: a data set of what has them in another form, and others as they are.

    Tensors or NumPy arrays, in a tuple or by name, share their memory; batches of a DataLoader are
    taken apart, and an ``IterableDataset`` is read to its end, once.
    """
    if isinstance(data, tuple) and data and all(isinstance(x, _COLUMNS) for x in data):
        return TensorDataset(*as_batch(data))
    if _is_one(data):
        return StackDataset(**as_batch(data))  # type: ignore[arg-type]
    if isinstance(data, DataLoader):
        loader = data if _is_read_once(data) else ordered_loader(data, 1)
        batches = map(as_batch, loader)
        return [each(itemgetter(row), batch) for batch in batches for row in range(num_rows(batch))]
    return list(data) if _is_read_once(data) else data


def _is_read_once(data: Any) -> bool:
    return isinstance(getattr(data, "dataset", data), IterableDataset)


def _is_one(data: Any) -> bool:
    """Whether a dict is a data set, of columns by name."""
    return isinstance(data, Mapping) and any(isinstance(x, _COLUMNS) for x in data.values())


def datasets_by_name(targets: Any) -> dict[str, Any]:
    """Data sets by name; a single one, which may be a dict of tensors, is called ``target``."""
    named = isinstance(targets, Mapping) and not _is_one(targets)
    return dict(targets) if named else {"target": targets}


def task_datasets(tasks: Any, targets: Any) -> tuple[list[Any], dict[str, Any]]:
    """The tasks' data sets in turn, and the targets' by name, as of :func:`as_dataset`.

    Args:
        tasks: Data sets, in a sequence or by name.
        targets: Data sets by name, or one, which is called ``target``.

    Raises:
        ValueError: If there is no task or no target.
        TypeError: If tasks are not data sets but one, or tensors.
    """
    values = tasks.values() if isinstance(tasks, Mapping) else tasks
    given = check_several("tasks", values, "data sets")
    if _is_one(tasks) or any(isinstance(task, _COLUMNS) for task in given):
        remedy = "Put a tuple or a dict of tensors for each task into a list."
        raise TypeError(message("tasks", "several data sets", "tensors", remedy))
    named = datasets_by_name(targets)
    return checked_datasets("tasks", given), dict(
        zip(named, checked_datasets("targets", [*named.values()]), strict=True)
    )


def checked_datasets(name: str, datasets: Any) -> list[Any]:
    """Data sets as of :func:`as_dataset`.

    Raises:
        ValueError: If there is none, or one has no sample.
        TypeError: If one is of another kind.
    """
    found = [as_dataset(data) for data in check_several(name, datasets, "data sets")]
    if not found:
        raise ValueError(message(name, "one data set or more", "none", "Pass some."))
    for data in found:
        _check_samples(name, data)
    return found


def _check_samples(name: str, data: Any) -> None:
    if isinstance(data, str) or not (hasattr(data, "__getitem__") and isinstance(data, Sized)):
        remedy = "Pass a DataLoader, a Dataset with a length, or tensors."
        raise TypeError(message(name, "samples by number", type(data).__name__, remedy))
    if len(data) == 0:
        raise ValueError(message(name, "at least one sample", "none", "Check the data set."))


def ordered_loader(data: Any, batch_size: int) -> DataLoader[Any]:
    """A loader of all samples in the data set's order.

    Args:
        data: A DataLoader, a Dataset, or tensors or arrays (b, ...), in a tuple or by name.
        batch_size: For those that are no DataLoader.

    Raises:
        ValueError: If ``data`` is shuffled, leaves samples out, has none, or does not line up.
        TypeError: If ``data`` is none of these kinds.
    """
    batch_size = check_positive_int("batch_size", batch_size)
    if not isinstance(data, DataLoader) or _is_read_once(data):
        data = as_dataset(data)
        _check_samples("data", data)
        # A generator of its own, or the loader would draw from the global random state.
        dataset: Any = data
        return DataLoader(
            dataset, batch_size=batch_size, collate_fn=_stacked, generator=torch.Generator()
        )
    batches = data.batch_sampler
    sampler = batches.sampler if type(batches) is BatchSampler else batches
    if not isinstance(sampler, SequentialSampler) or data.drop_last:
        drawn = f"samples drawn by {type(sampler).__name__}"
        found = "drop_last=True" if isinstance(sampler, SequentialSampler) else drawn
        remedy = "Build the DataLoader with shuffle=False and drop_last=False."
        raise ValueError(message("data", "every sample in order", found, remedy))
    return data


def chunks(
    loader: DataLoader[Any], size: int, start: int, stop: int | None = None
) -> Iterator[Batch]:
    """Samples from ``start`` to ``stop``, ``size`` at a time, whatever the loader's batches.

    A chunk ends early where the shape of samples changes, as it does in batches padded to lengths
    of their own. Where it ends depends on the data alone if ``start`` is where a chunk ended.
    Batches before and behind these samples are not loaded.
    """
    loader, start, stop = _part_of(loader, start, stop)
    pending: Batch = ()
    for loaded in loader:
        if stop == 0:
            break
        batch = as_batch(loaded)
        length = num_rows(batch)
        batch = _rows(batch, slice(start, stop))
        start, stop = max(0, start - length), max(0, stop - length)
        if pending and _layout(pending) != _layout(batch):
            yield pending
            pending = ()
        pending = _joined(pending, batch) if pending else batch
        while num_rows(pending) >= size:
            yield _rows(pending, slice(size))
            pending = _rows(pending, slice(size, None))
        if num_rows(pending) == 0:
            pending = ()
    if pending:
        yield pending


def _part_of(
    loader: DataLoader[Any], start: int, stop: int | None
) -> tuple[DataLoader[Any], int, int]:
    """A loader of the same batches without those in front of ``start`` or from ``stop`` on.

    Also where the samples begin and end in what it loads. A loader of the user's own class is kept.
    """
    dataset: Any = loader.dataset
    length = len(dataset)
    stop = length if stop is None else stop
    size = loader.batch_size
    if type(loader) is not DataLoader or size is None or (start < size and stop == length):
        return loader, start, stop
    first, last = start // size * size, min(-(-stop // size) * size, length)
    part: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=size,
        sampler=range(first, last),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        generator=torch.Generator(),
    )
    return part, start - first, stop - first


def content_digests(
    loader: DataLoader[Any],
    size: int,
    rows: range,
    keep: Collection[int] = (),
    progress: bool = False,
) -> tuple[Tensor, dict[int, Batch]]:
    """Hashes of every bit of some rows, block by block, whatever the loader's batches.

    Args:
        loader: See :func:`ordered_loader`.
        size: Rows of a block.
        rows: What to hash; they begin where a block does.
        keep: Rows to return as well, so that data are read only once.
        progress: Whether to show a progress bar where it takes long.

    Returns:
        (num_blocks, 16) uint8, and the kept rows as batches of one.
    """
    digests: list[bytes] = []
    kept: dict[int, Batch] = {}
    block, row = _Block(), rows.start
    bar = tqdm(total=len(rows), unit=" samples checked", delay=2, disable=not progress)
    for chunk in chunks(loader, size, rows.start, rows.stop):
        for wanted in keep:
            if row <= wanted < row + num_rows(chunk):
                one = slice(wanted - row, wanted - row + 1)
                kept[wanted] = each(torch.clone, _rows(chunk, one))
        while num_rows(chunk):
            stop = min(row - row % size + size, rows.stop)
            part, chunk = _rows(chunk, slice(stop - row)), _rows(chunk, slice(stop - row, None))
            block.update(part, row)
            row += num_rows(part)
            if row == stop:
                digests.append(block.digest())
                block = _Block()
                bar.update(row - rows.start - bar.n)
    bar.close()
    table = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 16)
    return torch.from_numpy(table.copy()), kept


class _Block:
    """The hash of some rows, column by column, so that it does not matter how they come."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = {}
        self._layout: Any = None

    def update(self, batch: Batch, row: int) -> None:
        """Add the rows of a batch, the first of which has number ``row``."""
        layout = _layout(batch)
        for (name, column), (_, *kind) in zip(columns(batch), layout, strict=True):
            digest = self._columns.setdefault(name, hashlib.blake2b(digest_size=16))
            if layout != self._layout:
                digest.update(f"{name} {kind} from {row} ".encode())
            digest.update(content_of(column))
        self._layout = layout

    def digest(self) -> bytes:
        """16 bytes."""
        content = b"".join(digest.digest() for digest in self._columns.values())
        return hashlib.blake2b(content, digest_size=16).digest()


def sample_checks(loader: DataLoader[Any]) -> list[tuple[str, Tensor]]:
    """Tensors of the first, middle and last sample: a cheap sign that data are the same."""
    dataset: Any = loader.dataset
    rows = sorted({0, len(dataset) // 2, len(dataset) - 1})
    return [pair for row in rows for pair in columns(as_batch(loader.collate_fn([dataset[row]])))]


def _stacked(samples: list[Any]) -> Any:
    """PyTorch's own collation, which says what to do where samples differ in shape."""
    try:
        return default_collate(samples)
    except RuntimeError as error:
        remedy = "Pass batch_size=1, or a DataLoader that pads them."
        raise ValueError(message("data", "samples of one shape", str(error), remedy)) from error


def _rows(batch: Batch, rows: slice) -> Batch:
    return each(lambda column: column[rows], batch)


def _layout(batch: Batch) -> list[tuple[str, torch.Size, torch.dtype]]:
    """What two batches must share to be joined."""
    return [(name, column.shape[1:], column.dtype) for name, column in columns(batch)]


def _joined(first: Batch, second: Batch) -> Batch:
    """The rows of two batches of one layout."""
    rows = dict(columns(second))
    joined = {name: torch.cat([column, rows[name]]) for name, column in columns(first)}
    return joined if isinstance(first, dict) else tuple(joined.values())
