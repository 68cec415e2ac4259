"""``ksm design``: draw the subsets to score."""

import io
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ksm_ext import subsets
from ksm_ext.checks import message
from ksm_ext.cli.output import STANDARD, say, show_table, write_bytes


def design(args: Namespace) -> int:
    """Draw the subsets to score, one row each."""
    names = list(map(str, range(args.num_tasks))) if args.tasks is None else _task_names(args.tasks)
    masks = _draw(args, len(names))
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
    if not path.is_file():
        raise FileNotFoundError(message("tasks", "a file", source, remedy))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(message(source, "text in UTF-8", str(error), remedy)) from error
    names = [line.strip() for line in lines if line.strip()]
    if not names or len(set(names)) < len(names):
        found = "none" if not names else "a name more than once"
        raise ValueError(message(f"the names in {source}", "all different", found, remedy))
    return names


def _draw(args: Namespace, n: int) -> Tensor:
    if args.design == "leave-one-out":
        return subsets.leave_one_out(n, include_full=args.include_full)
    if args.num_subsets is None:
        remedy = "Several times the number of tasks is a good start."
        raise ValueError(message("num-subsets", "given for this design", "none", remedy))
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
        masks = subsets.mixed_sizes(n, args.num_subsets, args.sizes or None, **options)
    elif args.design == "fixed-size":
        masks = subsets.fixed_size(n, args.num_subsets, args.size, **options)
    elif args.design == "paired":
        options |= {"probability": args.probability} if args.size is None else {"size": args.size}
        masks = subsets.paired(n, args.num_subsets, **options)
    else:
        masks = subsets.bernoulli(n, args.num_subsets, args.probability, **options)
    if len(masks) < args.num_subsets:
        say(f"Note: there are {len(masks):,} different subsets in this design, and all are drawn.")
    return masks
