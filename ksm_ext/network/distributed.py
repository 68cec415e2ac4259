r"""Samples split over the processes of a ``torch.distributed`` group, and sums over all of them.

Every rank calls the same function with the same model, data and arguments, and gets the result
that one process would get:

.. code-block:: python

    group = ksm_ext.network.distributed.world()  # torchrun --nproc-per-node 8 script.py
    features = ksm_ext.collect_features(model, data, output, projector, store=folder, group=group)
    gram = ksm_ext.network.distributed.gram(features.gradients, group)

The group is an argument, never taken from an initialised ``torch.distributed``: a program that
trains in parallel may well ask one rank for features, which would then wait for the others forever.

Sums over ranks are taken in the order of the ranks, so that for one number of ranks they have the
same bits in every run and on every rank.

Shapes: features (b, k), Gram matrices (k, k) and (n, k, t).
"""

import json
import os
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from ksm_ext import ops
from ksm_ext.checks import message

Group: TypeAlias = "torch.distributed.ProcessGroup | None"  # as text: some torch is without
"""None is this process alone; others must carry tensors of the CPU, as gloo does."""

_BLOCK_BYTES = 2**26  # from every rank at a time


def world() -> "dist.ProcessGroup":
    """The group of all processes that ``torchrun`` started, which is initialised if it is not yet.

    Tensors of the CPU travel by gloo; those of CUDA by NCCL, where ``LOCAL_RANK`` is the device.
    Ranks wait for each other for up to a week, since after a resumption one may have much less to
    do than another, and torchrun ends all when one ends; a group of one's own has its own timeout.

    Raises:
        RuntimeError: If ``torchrun`` did not start this process.
    """
    if not dist.is_initialized():
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            remedy = "Start it with torchrun --nproc-per-node NUMBER, or initialise the group."
            found = "no RANK and WORLD_SIZE in the environment"
            raise RuntimeError(message("world", "called under torchrun", found, remedy))
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(days=7))
    group = dist.group.WORLD
    assert group is not None
    return group


def place(group: Group) -> tuple[int, int]:
    """This process's place among the others.

    Args:
        group: The ranks, or None.

    Returns:
        Its rank, and the number of ranks; (0, 1) without a group.

    Raises:
        ValueError: If this process is not of the group.
    """
    if group is None:
        return 0, 1
    rank = dist.get_rank(group)
    if rank < 0:
        remedy = "Call it on the ranks that the group was made of, and on all of them."
        raise ValueError(message("group", "one of this process", "one without it", remedy))
    return rank, dist.get_world_size(group)


def shard(num_rows: int, group: Group, unit: int = 1) -> range:
    """The rows of this rank: contiguous, in the order of ranks, in whole units but for the last.

    Args:
        num_rows: Rows of all ranks together.
        group: The ranks, or None.
        unit: Rows that stay together.

    Returns:
        Numbers of some rows out of ``range(num_rows)``; all of them without a group.
    """
    return _shard_of(*place(group), num_rows, unit)


def check_same(facts: Mapping[str, Any], group: Group) -> None:
    """Raise ``ValueError`` on every rank if a named fact, as JSON, differs between ranks."""
    if place(group)[1] == 1:
        return
    first, *others = (json.loads(text) for text in _texts(json.dumps(facts), group))
    for rank, facts_there in enumerate(others, start=1):
        for name in facts:
            if facts_there.get(name) != first.get(name):
                found = f"{first.get(name)!r} on rank 0 and {facts_there.get(name)!r} on {rank}"
                remedy = "Load one checkpoint, the same data and the same arguments everywhere."
                raise ValueError(message(name, "the same on every rank", found, remedy))


def first(facts: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """The facts of rank 0, as JSON, on every rank."""
    text = json.dumps(facts)
    return dict(json.loads(_texts(text, group)[0] if place(group)[1] > 1 else text))


def wait(group: Group) -> None:
    """Go on when every rank has come here."""
    if place(group)[1] > 1:
        dist.all_reduce(torch.zeros(1), group=group)  # a barrier would choose a device itself


def gathered(rows: Tensor, num_rows: int, group: Group, unit: int = 1) -> Tensor:
    """All rows (num_rows, ...) on every rank, of which each has its :func:`shard`."""
    _, size = place(group)
    if size == 1:
        return rows
    shards = [_shard_of(r, size, num_rows, unit) for r in range(size)]
    longest = max(map(len, shards))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in shards]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[: len(own)] for part, own in zip(parts, shards, strict=True)])


def sum_over_ranks(tensor: Tensor, group: Group) -> Tensor:
    """Replace a contiguous tensor by its sum over ranks, in their order, on every rank.

    An all-reduce leaves the order of its sums to the library and the network; this gathers blocks
    of 64 MiB from every rank and adds them up, which moves half as many times the bytes of an
    all-reduce as there are ranks.
    """
    _, size = place(group)
    if size == 1:
        return tensor
    for block in tensor.view(-1).split(max(1, _BLOCK_BYTES // tensor.element_size())):
        parts = [torch.empty_like(block) for _ in range(size)]
        dist.all_gather(parts, block, group=group)
        block.copy_(parts[0])
        for part in parts[1:]:
            block.add_(part)
    return tensor


def gram(features: Tensor, group: Group = None) -> Tensor:
    """``features^T features`` (k, k), to which every rank adds its shard of the samples.

    Args:
        features: (b, k) float32 or float64, the same on every rank. Each reads only its rows.
        group: The ranks; all of them call.
    """
    rows = shard(len(features), group)
    total = features.new_zeros(features.shape[1], features.shape[1])
    ops.gram_update(total, features[rows.start : rows.stop])
    return sum_over_ranks(total, group)


def task_gram(
    features: Tensor, task_offsets: Tensor, other: Tensor | None = None, group: Group = None
) -> Tensor:
    """:func:`ksm_ext.ops.task_gram` (n, k, t), to which every rank adds its shard of the samples.

    Args:
        features: (b, k) float32 or float64, sorted by task, the same on every rank.
        task_offsets: (n + 1,) int64.
        other: (b, t); None means ``features``.
        group: The ranks; all of them call.
    """
    rows = shard(len(features), group)
    part = slice(rows.start, rows.stop)
    offsets = (task_offsets - rows.start).clamp(0, len(rows))
    total = ops.task_gram(features[part], offsets, None if other is None else other[part])
    return sum_over_ranks(total, group)


def _texts(text: str, group: Group) -> list[str]:
    """Every rank's text. Not as objects, which would be pickled."""
    own = torch.tensor(list(text.encode()), dtype=torch.uint8)
    lengths = [torch.empty(1, dtype=torch.int64) for _ in range(place(group)[1])]
    dist.all_gather(lengths, torch.tensor([len(own)]), group=group)
    longest = max(int(length) for length in lengths)
    parts = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - len(own))), group=group)
    pairs = zip(parts, lengths, strict=True)
    return [bytes(part[: int(length)].tolist()).decode() for part, length in pairs]


def _shard_of(rank: int, size: int, num_rows: int, unit: int) -> range:
    units = -(-num_rows // unit)
    begin, end = (min(units * r // size * unit, num_rows) for r in (rank, rank + 1))
    return range(begin, end)
