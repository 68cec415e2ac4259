"""Surrogates on disk: one safetensors file, no pickle, written whole or not at all."""

import json
import math
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ksm_ext.arrays import TABLES, Kind
from ksm_ext.atomic_write import write_whole
from ksm_ext.checks import check_choice, check_finite, message
from ksm_ext.identity import fingerprint
from ksm_ext.ops.mask_gram import BITS_PER_WORD
from ksm_ext.surrogates.candidates import Candidate, CandidateTable
from ksm_ext.surrogates.kernels import from_description
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.surrogate import KernelTerm, LinearTerm, Surrogate

FORMAT = "ksm_ext.surrogate.3"
FORMERLY = "ksm_ext.surrogate.2"
"""Files that say nothing of observed scores: read as surrogates that are all smooth."""

_OBSERVED = ("unit", "residuals", "gaps", "own", "known", "counts", "apart", "varying")
_NON_NEGATIVE = ("ridge", "signal_variance", "score_variance", "own", "noise", "weights of rows")
_TERM = ("columns", "dual", "ridge", "signal_variance", "rows", "weights", "own")

# What putting together the parts of another file raises: they are missing, or of other kinds.
_NO_SURROGATE = (
    *(LookupError, TypeError, ValueError, AttributeError),
    *(ArithmeticError, RecursionError),
)


def save_surrogate(surrogate: Surrogate, path: Any) -> None:
    """See :meth:`Surrogate.save`."""
    tensors: dict[str, Tensor] = {
        "masks": surrogate.masks.bits if surrogate.masks.binary else surrogate.masks.values,
        "intercept": surrogate.intercept,
        "scores": surrogate.scores,
        "score_variance": surrogate.candidates.score_variance,
        **{name: getattr(surrogate, name) for name in _OBSERVED},
    }
    if surrogate.noise is not None:
        tensors["noise"] = surrogate.noise
    if surrogate.rotation is not None:
        tensors["rotation"] = surrogate.rotation
    for index, term in enumerate(surrogate.kernel_terms):
        for name in _TERM:
            if getattr(term, name) is not None:
                tensors[f"kernel.{index}.{name}"] = getattr(term, name)
    for index, linear in enumerate(surrogate.linear_terms):
        tensors[f"linear.{index}.columns"] = linear.columns
        tensors[f"linear.{index}.weights"] = linear.weights
    facts = {
        "kernels": [term.kernel.describe() for term in surrogate.kernel_terms],
        "num_linear": len(surrogate.linear_terms),
        "binary": surrogate.masks.binary,
        "center": surrogate.center,
        "task_names": surrogate.task_names,
        "target_names": surrogate.target_names,
        "candidates": [asdict(row) for row in surrogate.candidates],
        "sharing": surrogate.sharing,
        "kind": surrogate.kind.name,
        "dtype": str(surrogate.dtype).removeprefix("torch."),
        "single_target": surrogate.single_target,
        "solver": None if surrogate.solver is None else asdict(surrogate.solver),
    }
    # copies: terms may share what they have in common, which the format does not know
    on_cpu = {name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "facts": json.dumps(facts)}
    metadata["checksum"] = checksum(metadata["facts"], on_cpu)
    write_whole(Path(path), to_bytes(on_cpu, metadata=metadata))


def load_surrogate(path: Any, *, device: torch.device | str = "cpu") -> Surrogate:
    """Read a surrogate written by :meth:`Surrogate.save`.

    Args:
        path: The file.
        device: Where the surrogate lives; answers in the kind ``torch`` come back there.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(message("path", "a file", str(path), "Check where it was saved."))
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, error, "damaged or no safetensors file") from error
    if metadata.get("format") not in (FORMAT, FORMERLY):
        found = f"{path} with format {metadata.get('format')!r}"
        remedy = f"This version reads files of Surrogate.save with format {FORMAT!r}."
        raise ValueError(message("path", "a saved surrogate", found, remedy))
    try:
        if metadata["format"] == FORMAT:
            expected = checksum(metadata["facts"], tensors)
            check_choice("checksum", metadata.get("checksum"), [expected])
        else:
            tensors = _without_observations(tensors, json.loads(metadata["facts"]))
        surrogate = _assembled(json.loads(metadata["facts"]), tensors, torch.device(device))
        _check_whole(surrogate)
    except _NO_SURROGATE as error:
        raise _damaged(path, error, "damaged") from error
    return surrogate


def _without_observations(tensors: dict[str, Tensor], facts: Any) -> dict[str, Tensor]:
    """The parts of a file of the former format, with those it did not have.

    Its terms were in units of the scores, of all tasks, and it said nothing of observed scores.
    """
    scores, variance = tensors["scores"], tensors["score_variance"]
    (m, t), n = scores.shape, len(facts["task_names"])
    unit = torch.where(variance > 0, variance.sqrt(), 1.0)
    found = tensors | {
        "unit": unit,
        "gaps": torch.zeros_like(scores),
        "own": torch.zeros_like(scores),
        "known": torch.zeros_like(scores, dtype=torch.bool),
        "apart": torch.zeros_like(scores, dtype=torch.bool),
        "counts": torch.ones(m, t, dtype=torch.int64, device=scores.device),
        "varying": torch.ones(n, dtype=torch.bool, device=scores.device),
    }
    if "rotation" in tensors:
        return found | {"rotation": tensors["rotation"] / unit[:, None]}
    for name, part in tensors.items():
        kind, _, last = name.rpartition(".")
        if last in ("dual", "weights"):
            found[name] = part / unit[tensors[f"{kind}.columns"]]
        elif last == "signal_variance":
            found[name] = part / unit[tensors[f"{kind}.columns"]].square()
    return found


def checksum(facts: str, tensors: dict[str, Tensor]) -> str:
    """Of every bit of the file: a changed one would be another answer."""
    return fingerprint([(facts, torch.zeros(0)), *sorted(tensors.items())])


def _damaged(path: Path, error: Exception, state: str) -> ValueError:
    found = f"{path} ({type(error).__name__}: {error})"
    remedy = f"The file is {state}: save the surrogate again."
    return ValueError(message("path", "a saved surrogate", found, remedy))


def _assembled(facts: Any, tensors: dict[str, Tensor], device: torch.device) -> Surrogate:
    """The surrogate of the file's two parts, as they are."""
    kernel_terms = tuple(
        KernelTerm(
            from_description(description),
            *(tensors[f"kernel.{index}.{name}"] for name in _TERM[:4]),
            *(tensors.get(f"kernel.{index}.{name}") for name in _TERM[4:]),
        )
        for index, description in enumerate(facts["kernels"])
    )
    linear_terms = tuple(
        LinearTerm(tensors[f"linear.{index}.columns"], tensors[f"linear.{index}.weights"])
        for index in range(facts["num_linear"])
    )
    rows = tuple(Candidate(**row) for row in facts["candidates"])
    solver = facts["solver"]
    return Surrogate(
        masks=_masks(tensors["masks"], len(facts["task_names"]), facts["binary"]),
        intercept=tensors["intercept"],
        kernel_terms=kernel_terms,
        linear_terms=linear_terms,
        rotation=tensors.get("rotation"),
        center=facts["center"],
        task_names=tuple(facts["task_names"]),
        target_names=tuple(facts["target_names"]),
        candidates=CandidateTable(rows, tensors["score_variance"]),
        sharing=facts["sharing"],
        scores=tensors["scores"],
        noise=tensors.get("noise"),
        **{name: tensors[name] for name in _OBSERVED},
        kind=Kind(facts["kind"], device),
        dtype=getattr(torch, facts["dtype"]),
        single_target=facts["single_target"],
        solver=None if solver is None else ConjugateGradients(**solver),
    )


def _masks(stored: Tensor, num_tasks: int, binary: bool) -> Masks:
    if not binary:
        return Masks(stored)
    num_words = -(-num_tasks // BITS_PER_WORD)
    check_choice("masks", (stored.dtype, stored.shape[1:]), [(torch.int64, (num_words,))])
    masks = Masks.from_bits(stored, num_tasks)
    check_choice("masks without other tasks", torch.equal(masks.bits, stored), [True])
    return masks


def _check_whole(surrogate: Surrogate) -> None:
    """Raise ``ValueError`` unless every part has the form that the others ask for."""
    m, n = surrogate.masks.values.shape
    (t,) = surrogate.intercept.shape
    rotation = surrogate.rotation
    q = t if rotation is None else rotation.shape[1]
    check_choice("masks", surrogate.masks.values.dtype, (torch.bool, torch.float64))
    check_finite("masks", surrogate.masks.values, "No fit has such numbers.")
    check_choice("kind", surrogate.kind.name, ("torch", "numpy", *TABLES))
    check_choice("dtype", surrogate.dtype, (torch.float32, torch.float64))
    check_choice("sharing", surrogate.sharing, ("shared", "target", "component"))
    names = [("task_names", surrogate.task_names, n), ("target_names", surrogate.target_names, t)]
    for name, given, length in names:
        check_choice(f"length of {name}", len(given), [length])
        check_choice(f"text in {name}", all(isinstance(text, str) for text in given), [True])
        check_choice(f"different {name}", len(set(given)), [length])
    for row in surrogate.candidates:
        kinds = [type(value) for value in astuple(row)]
        check_choice("candidates", kinds, [[str, float, float, float, int, int]])
        possible = 0 <= row.error < math.inf and -1 <= row.rank_correlation <= 1
        possible = possible and not row.ridge < 0 and min(row.num_subsets, row.num_chosen) >= 0
        check_choice("numbers of candidates that can be", possible, [True])
    for name in ("center", "single_target"):
        check_choice(name, type(getattr(surrogate, name)), [bool])
    check_choice("single_target", surrogate.single_target and t != 1, [False])
    tables = [
        ("intercept", surrogate.intercept, (t,)),
        ("unit", surrogate.unit, (t,)),
        ("scores", surrogate.scores, (m, t)),
        ("residuals", surrogate.residuals, (m, t)),
        ("gaps", surrogate.gaps, (m, t)),
        ("own", surrogate.own, (m, t)),
        *([] if surrogate.noise is None else [("noise", surrogate.noise, (m, t))]),
        ("score_variance", surrogate.candidates.score_variance, (t,)),
        *([] if rotation is None else [("rotation", rotation, (t, q))]),
    ]
    for name, axes in (("known", [m, t]), ("apart", [m, t]), ("varying", [n])):
        flag = getattr(surrogate, name)
        check_choice(name, (flag.dtype, list(flag.shape)), [(torch.bool, axes)])
    counts = surrogate.counts
    check_choice("counts", (counts.dtype, tuple(counts.shape)), [(torch.int64, (m, t))])
    check_choice("counts from 0", bool((counts >= 0).all()), [True])
    missing = counts == 0
    columns = [
        *(term.columns for term in surrogate.kernel_terms),
        *(term.columns for term in surrogate.linear_terms),
    ]
    for chosen in columns:
        check_choice("columns", (chosen.dtype, chosen.ndim), [(torch.int64, 1)])
        check_choice("columns", bool(((chosen >= 0) & (chosen < q)).all()), [True])
    for terms in (surrogate.kernel_terms, surrogate.linear_terms):
        predicted = [column for term in terms for column in term.columns.tolist()]
        check_choice("different columns", len(set(predicted)), [len(predicted)])
    for linear in surrogate.linear_terms:
        tables.append(("weights", linear.weights, (surrogate.num_varying, len(linear.columns))))
    for term in surrogate.kernel_terms:
        width = len(term.columns)
        tables += [("dual", term.dual, (m, width)), ("ridge", term.ridge, (width,))]
        tables.append(("signal_variance", term.signal_variance, (width,)))
        rows = torch.arange(m) if term.rows is None else term.rows
        check_choice("rows", (rows.dtype, rows.ndim), [(torch.int64, 1)])
        check_choice("rows", bool(((rows >= 0) & (rows < m)).all()), [True])
        if term.weights is not None:
            tables.append(("weights of rows", term.weights, (len(rows),)))
        if term.own is not None:
            tables.append(("own", term.own, (width,)))
        term.kernel.tables(1, torch.device("cpu"))  # raises where a parameter is open
    for name, table, shape in tables:
        check_choice(name, tuple(table.shape), [shape])
        check_choice(name, table.dtype, [torch.float64])
        if name in ("scores", "residuals"):  # NaN where there is none
            check_choice(f"numbers in {name}", bool((table.isnan() == missing).all()), [True])
            table = table.masked_fill(missing, 0.0)
        check_finite(name, table, "No fit has such numbers.")
        if name in _NON_NEGATIVE:
            check_choice(f"non-negative {name}", bool((table >= 0).all()), [True])
    check_choice("unit above 0", bool((surrogate.unit > 0).all()), [True])
    check_choice("own up to 1", bool((surrogate.own <= 1).all()), [True])
