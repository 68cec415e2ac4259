"""Surrogates on disk: one safetensors file, no pickle, written whole or not at all.

A file holds tensors by name and plain facts as JSON, which :meth:`.surrogate.Surrogate.state` gives
and :meth:`.surrogate.Surrogate.from_state` takes.

Shapes: n tasks, m fitted subsets, t targets, q latent columns (t without a rotation).
"""

import json
import math
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from ksm_ext.arrays import TABLES
from ksm_ext.atomic_write import check_file, write_whole
from ksm_ext.checks import check_choice, check_finite, message
from ksm_ext.identity import fingerprint
from ksm_ext.ops.mask_gram import BITS_PER_WORD
from ksm_ext.surrogates.candidates import Candidate
from ksm_ext.surrogates.kernels import from_description
from ksm_ext.surrogates.krylov import ConjugateGradients
from ksm_ext.surrogates.masks import Masks
from ksm_ext.surrogates.score_warps import suits

FORMAT = "ksm_ext.surrogate.3"
WITH_TREND = "ksm_ext.surrogate.4"
"""Files of surrogates with a trend, which older versions would answer without."""

WITH_WARPS = "ksm_ext.surrogate.5"
"""Those of surrogates that predict through a map, likewise."""

FORMERLY = "ksm_ext.surrogate.2"
"""Files without observed scores: their surrogates have the smooth part alone."""

# What the parts of a damaged or foreign file raise where they are missing, or of other kinds.
_NO_SURROGATE = LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError

Form = tuple[torch.dtype, tuple[int, ...], float, float]
"""dtype, shape, least and largest number of a tensor."""

Built = TypeVar("Built")


def write_state(path: Any, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write tensors, none a part of another, and facts to a file that appears whole or not at all.

    Raises:
        OSError: If it cannot be written; the message names the path and the cause.
    """
    on_cpu = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    form = WITH_TREND if facts.get("trend") else WITH_WARPS if facts.get("warps") else FORMAT
    metadata = {"format": form, "facts": json.dumps(facts)}
    metadata["checksum"] = checksum(metadata["facts"], on_cpu)
    write_whole(Path(path), to_bytes(on_cpu, metadata=metadata))


def read_state(
    path: Any, device: torch.device | str, build: Callable[[dict[str, Tensor], Any], Built]
) -> Built:
    """What ``build`` makes of the tensors and facts in a file.

    Args:
        path: The file.
        device: Where the tensors go.
        build: What to call with tensors and facts; where it raises, the file is damaged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds something else.
    """
    check_file("path", path, "Check where it was saved.")
    path = Path(path)
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, error, "damaged or no safetensors file") from error
    if metadata.get("format") not in (FORMAT, WITH_TREND, WITH_WARPS, FORMERLY):
        found = f"{path} with format {metadata.get('format')!r}"
        remedy = f"This version reads files of Surrogate.save with format {FORMAT!r}."
        raise ValueError(message("path", "a saved surrogate", found, remedy))
    try:
        facts = json.loads(metadata["facts"])
        if metadata["format"] != FORMERLY:
            expected = checksum(metadata["facts"], tensors)
            check_choice("checksum", metadata.get("checksum"), [expected])
        else:
            tensors = _without_observations(tensors, facts)
        if facts["solver"] is not None:
            facts["solver"].pop("progress", None)  # once a setting
        return build(tensors, facts)
    except _NO_SURROGATE as error:
        raise _damaged(path, error, "damaged") from error


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
        check_choice("rows of rotation", tensors["rotation"].shape[:1], [unit.shape])
        return found | {"rotation": tensors["rotation"] / unit[:, None]}
    for name, part in tensors.items():
        kind, _, last = name.rpartition(".")
        if last in ("dual", "weights", "signal_variance"):
            scale = unit[tensors[f"{kind}.columns"]]
            check_choice(f"columns of {name}", part.shape[-1:], [scale.shape])
            found[name] = part / (scale.square() if last == "signal_variance" else scale)
    return found


def checksum(facts: str, tensors: dict[str, Tensor]) -> str:
    """A fingerprint of facts and tensors: a changed bit would be another answer."""
    return fingerprint([(facts, torch.zeros(0)), *sorted(tensors.items())])


def _damaged(path: Path, error: Exception, state: str) -> ValueError:
    found = f"{path} ({type(error).__name__}: {error})"
    remedy = f"The file is {state}: save the surrogate again."
    return ValueError(message("path", "a saved surrogate", found, remedy))


# -- what fits together -------------------------------------------------------------------------


def check_state(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Check that every part of a surrogate's state has the form that the others ask for.

    Raises:
        ValueError: If one has not.
        LookupError: If one is missing.
        TypeError: If one is of another kind.
    """
    m, t = tensors["scores"].shape
    _check_facts(facts, t, int(tensors["varying"].sum()))
    _check_masks(tensors["masks"], m, len(facts["task_names"]), facts["binary"])
    forms = _forms(tensors, facts)
    for name, (dtype, shape, _, _) in forms.items():
        check_choice(name, (tensors[name].dtype, tuple(tensors[name].shape)), [(dtype, shape)])
    missing = tensors["counts"] == 0
    for name, (_, _, least, largest) in forms.items():
        table = tensors[name]
        if name in ("scores", "residuals"):  # NaN where there is none
            check_choice(f"NaN in {name}", bool((table.isnan() == missing).all()), [True])
            table = table.masked_fill(missing, 0.0)
        check_finite(name, table, "No fit has such numbers.")
        within = bool(((table >= least) & (table <= largest)).all())
        check_choice(f"{name} from {least} to {largest}", within, [True])
    subset = Masks(torch.zeros(1, int(tensors["varying"].sum()), dtype=torch.bool))
    for description in facts["kernels"]:  # raises where a parameter is open, or of other tasks
        from_description(description).diagonal(subset)
    for kind in ("kernel", "linear"):
        names = [name for name in tensors if name.startswith(kind) and name.endswith(".columns")]
        columns = [column for name in names for column in tensors[name].tolist()]
        check_choice("different columns", len(set(columns)), [len(columns)])
    _check_warps(tensors, facts)


def _check_warps(tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Maps are of different targets, for their scores, with surrogates of as many tasks."""
    scores, taken = tensors["scores"], []
    for i, warp in enumerate(facts.get("warps", ())):
        table, names = tensors[f"warp.{i}.scores"], warp["surrogate"]["task_names"]
        check_choice("shape of warped scores", tuple(table.shape), [tuple(scores.shape)])
        check_choice("tasks of warped scores", len(names), [len(facts["task_names"])])
        for target in warp["targets"]:
            check_choice("targets of a map", target, range(scores.shape[1]))
            known = suits(warp["name"], scores[:, target])
            check_choice("whether scores suit their map", known, [True])
        taken += warp["targets"]
    check_choice("different targets of maps", len(set(taken)), [len(taken)])


def _check_facts(facts: dict[str, Any], t: int, num_varying: int) -> None:
    """Names, kernels, candidates and the choices among a few words."""
    check_choice("kind", facts["kind"], ("torch", "numpy", *TABLES))
    check_choice("dtype", facts["dtype"], ("float32", "float64"))
    check_choice("sharing", facts["sharing"], ("shared", "target", "component"))
    check_choice("number of target_names", len(facts["target_names"]), [t])
    for name in ("task_names", "target_names"):
        given = facts[name]
        check_choice(f"text in {name}", all(isinstance(text, str) for text in given), [True])
        check_choice(f"different {name}", len(set(given)), [len(given)])
    for name in ("center", "single_target"):
        check_choice(name, type(facts[name]), [bool])
    check_choice("single_target", facts["single_target"] and t != 1, [False])
    check_choice("all_is_noise", type(facts.get("all_is_noise", False)), [bool])
    degrees = facts.get("noise_degrees", 0)
    check_choice("noise_degrees", type(degrees) is int and degrees >= 0, [True])
    for given in facts["candidates"]:
        row = Candidate(**given)
        kinds = [type(value) for value in astuple(row)]
        check_choice("candidates", kinds, [[str, float, float, float, int, int]])
        possible = 0 <= row.error < math.inf and -1 <= row.rank_correlation <= 1
        possible = possible and not row.ridge < 0 and min(row.num_subsets, row.num_chosen) >= 0
        check_choice("numbers of candidates that can be", possible, [True])
    for level in facts.get("trend", ()):  # its surrogate is checked when it is made
        n, names = len(facts["task_names"]), level["surrogate"]["target_names"]
        check_choice("tasks of a level", sorted(level["tasks"]), [[*range(n)]])
        check_choice("number of targets of a level", len(level["targets"]), [t])
        for target in level["targets"]:
            check_choice("targets of a level", target, range(len(names)))
        check_choice("tasks of its surrogate", len(level["surrogate"]["task_names"]), [n])
    if facts["solver"] is not None:
        ConjugateGradients(**facts["solver"])


def _check_masks(stored: Tensor, m: int, n: int, binary: object) -> None:
    """Packed bits with none beyond the n tasks, or finite weights."""
    if not binary:
        check_choice("masks", (stored.dtype, tuple(stored.shape)), [(torch.float64, (m, n))])
        check_finite("masks", stored, "No fit has such numbers.")
        return
    shape = (m, -(-n // BITS_PER_WORD))
    check_choice("masks", (stored.dtype, tuple(stored.shape)), [(torch.int64, shape)])
    others = -1 << n % BITS_PER_WORD if n % BITS_PER_WORD else 0  # bits of no task
    check_choice("masks of other tasks", bool((stored[:, -1] & others).any()), [False])


def _forms(tensors: dict[str, Tensor], facts: dict[str, Any]) -> dict[str, Form]:
    """The forms of all tensors but the masks: of those there must be, and of others that are."""
    (m, t), n = tensors["scores"].shape, len(facts["task_names"])
    q = tensors["rotation"].shape[1] if "rotation" in tensors else t
    real, inf = torch.float64, math.inf
    forms: dict[str, Form] = {
        "intercept": (real, (t,), -inf, inf),
        "unit": (real, (t,), 5e-324, inf),
        "score_variance": (real, (t,), 0, inf),
        **dict.fromkeys(("scores", "residuals", "gaps"), (real, (m, t), -inf, inf)),
        "own": (real, (m, t), 0, 1),
        "counts": (torch.int64, (m, t), 0, inf),
        **dict.fromkeys(("known", "apart"), (torch.bool, (m, t), 0, 1)),
        "varying": (torch.bool, (n,), 0, 1),
    }
    optional: dict[str, Form] = {
        "repeats_std": (real, (t,), 0, inf),
        "noise": (real, (m, t), 0, inf),
        "rotation": (real, (t, q), -inf, inf),
    }
    for i in range(len(facts["kernels"])):
        term, width = f"kernel.{i}.", len(tensors[f"kernel.{i}.columns"])
        fitted = len(tensors.get(f"{term}rows", range(m)))
        forms[f"{term}columns"] = torch.int64, (width,), 0, q - 1
        forms[f"{term}dual"] = real, (m, width), -inf, inf
        forms |= dict.fromkeys((f"{term}ridge", f"{term}signal_variance"), (real, (width,), 0, inf))
        optional[f"{term}rows"] = torch.int64, (fitted,), 0, m - 1
        optional[f"{term}weights"] = real, (fitted,), 0, inf
        optional |= dict.fromkeys((f"{term}own", f"{term}most_noise"), (real, (width,), 0, inf))
    if levels := len(facts.get("trend", ())):
        forms["trend.slopes"] = real, (levels, t), -inf, inf
    for i in range(facts["num_linear"]):
        width = len(tensors[f"linear.{i}.columns"])
        forms[f"linear.{i}.columns"] = torch.int64, (width,), 0, q - 1
        forms[f"linear.{i}.weights"] = real, (int(tensors["varying"].sum()), width), -inf, inf
    return forms | {name: form for name, form in optional.items() if name in tensors}
