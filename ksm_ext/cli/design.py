"""``ksm design`` and ``ksm next``: draw the subsets to score."""

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksm_ext import subsets
from ksm_ext.atomic_write import check_file
from ksm_ext.checks import message
from ksm_ext.cli.output import STANDARD, read_surrogate, say, show_table, write_bytes
from ksm_ext.surrogates.next_best import next_best
from ksm_ext.tables.scores import read_masks


def draw(args: Namespace) -> int:
    """Draw the subsets to score, one row each."""
    if args.command == "next":
        names, masks = _next(args)
    else:
        numbers = args.tasks is None
        names = list(map(str, range(args.num_tasks))) if numbers else _task_names(args.tasks)
        masks = _draw(args, len(names)) if args.question is None else _chosen(args, names)
    if args.format == "npz" or (args.format is None and args.output.endswith(".npz")):
        file = io.BytesIO()
        np.savez_compressed(file, masks=masks.numpy(), task_names=np.array(names))
        write_bytes(file.getvalue(), args.output)
    else:
        cells = masks if masks.is_floating_point() else masks.int()
        columns = dict(zip(names, cells.T.tolist(), strict=True))
        show_table(columns, args.output, args.format)
    what = "mixtures" if masks.is_floating_point() else "subsets"
    say(f"{len(masks):,} {what} of {len(names):,} tasks.", quiet=args.output == STANDARD)
    return 0


def _task_names(source: str) -> list[str]:
    path, remedy = Path(source), "Write one name a line."
    check_file("tasks", path, remedy)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        found = "bytes that are none"
        raise ValueError(message(source, "text in UTF-8", found, remedy)) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        found = "none" if not names else "a name more than once"
        raise ValueError(message(f"the names in {source}", "all different", found, remedy))
    return names


def _next(args: Namespace) -> tuple[list[str], Tensor]:
    """The tasks of a surrogate, and what tells most besides the subsets that it was fitted to."""
    surrogate = read_surrogate(args.surrogate).with_tensor_answers()
    options = {"seed": args.seed, "allow_fewer": True}
    masks = next_best(surrogate, args.num_subsets, args.question, **options)
    if len(masks) < args.num_subsets:
        left = f"{len(masks):,} different subsets that were not scored are left"
        say(f"Note: {left} of the {args.num_subsets:,} asked for.")
    return list(surrogate.task_names), masks


def _chosen(args: Namespace, names: list[str]) -> Tensor:
    """The design for what will be asked."""
    n = len(names)
    known = torch.empty(0, n) if args.known is None else read_masks(args.known, names)
    masks = subsets.design(
        n,
        _num_subsets(args),
        readout=args.question,
        known=known,
        include_empty=args.include_empty,
        seed=args.seed,
        allow_fewer=True,
    )
    if args.question == "shapley" and bool(torch.cat([known.bool(), masks]).any(1).all()):
        say("Note: Shapley values begin at the empty subset: --include-empty if it has a score.")
    _say_fewer(masks, args.num_subsets)
    return masks


def _num_subsets(args: Namespace) -> int:
    if args.num_subsets is None:
        remedy = "Several times the number of tasks is a good start."
        raise ValueError(message("num-subsets", "given for this design", "none", remedy))
    return int(args.num_subsets)


def _say_fewer(masks: Tensor, wanted: int) -> None:
    if len(masks) < wanted:
        say(f"Note: there are {len(masks):,} different subsets in this design, and all are drawn.")


def _draw(args: Namespace, n: int) -> Tensor:
    if args.known is not None or args.include_empty:
        option = "known" if args.known is not None else "include-empty"
        remedy = "Say what will be asked, such as --for shapley."
        raise ValueError(message(option, "given with --for", "a design by name", remedy))
    if args.design == "leave-one-out":
        return subsets.leave_one_out(n, include_full=args.include_full)
    num_subsets = _num_subsets(args)
    if args.design == "fixed-size" and args.size is None:
        remedy = "Say how many tasks each subset has."
        raise ValueError(message("size", "given for this design", "none", remedy))
    if args.design == "dirichlet":
        shares: dict[str, Any] = {
            "strength": args.strength * (3 - len(args.strength)),
            "minimum": args.minimum,
        }
        shares |= {"maximum": args.maximum, "prior": args.prior}
        return subsets.dirichlet(n, args.num_subsets, seed=args.seed, **shares)
    options: dict[str, Any] = {"seed": args.seed, "allow_fewer": True}
    if args.design == "mixed-sizes":
        masks = subsets.mixed_sizes(n, num_subsets, args.sizes or None, **options)
    elif args.design == "fixed-size":
        masks = subsets.fixed_size(n, num_subsets, args.size, **options)
    elif args.design == "paired":
        options |= {"probability": args.probability} if args.size is None else {"size": args.size}
        masks = subsets.paired(n, num_subsets, **options)
    else:
        masks = subsets.bernoulli(n, num_subsets, args.probability, **options)
    _say_fewer(masks, num_subsets)
    return masks
