"""Surrogates on disk: one safetensors file, no pickle, written whole or not at all."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ksm_ext.arrays import Kind
from ksm_ext.checks import message
from ksm_ext.files import write_whole
from ksm_ext.kernels import from_description
from ksm_ext.masks import Masks
from ksm_ext.surrogates.candidates import Candidate, CandidateTable
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.surrogate import KernelTerm, LinearTerm, Surrogate

FORMAT = "ksm_ext.surrogate.2"


def save_surrogate(surrogate: Surrogate, path: Any) -> None:
    """See :meth:`Surrogate.save`."""
    tensors: dict[str, Tensor] = {
        "masks": surrogate.masks.bits if surrogate.masks.binary else surrogate.masks.values,
        "intercept": surrogate.intercept,
        "residuals": surrogate.residuals,
        "score_variance": surrogate.candidates.score_variance,
    }
    if surrogate.rotation is not None:
        tensors["rotation"] = surrogate.rotation
    for index, term in enumerate(surrogate.kernel_terms):
        for name in ("columns", "dual", "ridge", "signal_variance"):
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
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "facts": json.dumps(facts)}
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
        found = f"{path} ({error})"
        remedy = "The file is damaged or no safetensors file: save the surrogate again."
        raise ValueError(message("path", "a saved surrogate", found, remedy)) from error
    if metadata.get("format") != FORMAT:
        found = f"{path} with format {metadata.get('format')!r}"
        remedy = f"This version reads files of Surrogate.save with format {FORMAT!r}."
        raise ValueError(message("path", "a saved surrogate", found, remedy))
    facts = json.loads(metadata["facts"])
    kernel_terms = tuple(
        KernelTerm(
            from_description(description),
            *(tensors[f"kernel.{index}.{name}"] for name in ("columns", "dual")),
            *(tensors[f"kernel.{index}.{name}"] for name in ("ridge", "signal_variance")),
        )
        for index, description in enumerate(facts["kernels"])
    )
    linear_terms = tuple(
        LinearTerm(tensors[f"linear.{index}.columns"], tensors[f"linear.{index}.weights"])
        for index in range(facts["num_linear"])
    )
    rows = tuple(Candidate(**row) for row in facts["candidates"])
    masks = Masks(tensors["masks"])
    if facts["binary"]:
        masks = Masks.from_bits(tensors["masks"], len(facts["task_names"]))
    solver = facts["solver"]
    return Surrogate(
        masks=masks,
        intercept=tensors["intercept"],
        kernel_terms=kernel_terms,
        linear_terms=linear_terms,
        rotation=tensors.get("rotation"),
        center=facts["center"],
        task_names=tuple(facts["task_names"]),
        target_names=tuple(facts["target_names"]),
        candidates=CandidateTable(rows, tensors["score_variance"]),
        sharing=facts["sharing"],
        residuals=tensors["residuals"],
        kind=Kind(facts["kind"], torch.device(device)),
        dtype=getattr(torch, facts["dtype"]),
        single_target=facts["single_target"],
        solver=None if solver is None else ConjugateGradients(**solver),
    )
