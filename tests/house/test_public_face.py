"""What a reader gets after ``import ksm_ext``."""

import dataclasses
import importlib
import inspect
import pkgutil
import subprocess
import sys
import typing

import pytest
import torch

import ksm_ext
from ksm_ext import fit_surrogate, subsets

MODULES = [
    importlib.import_module(found.name)
    for found in pkgutil.walk_packages(ksm_ext.__path__, "ksm_ext.")
    if found.name.rpartition(".")[2][0] != "_"
]
RESULTS = [
    each
    for module in MODULES
    for name, each in vars(module).items()
    if dataclasses.is_dataclass(each)
    and inspect.isclass(each)
    and each.__module__ == module.__name__
    and name[0] != "_"
    and "__str__" not in vars(each)  # a sentence of its own
    and name != "RetrainedScores"  # likewise
    and module.__name__ != "ksm_ext.network.factors"  # parts of gradients, which nobody is given
    and "Tensor" in str([field.type for field in dataclasses.fields(each)])
]


def test_every_public_name_is_found():
    assert not [name for name in ksm_ext.__all__ if getattr(ksm_ext, name, None) is None]
    assert callable(ksm_ext.attribution.influence), "not the module of that name"


def functions(owner, module):
    """Public functions and methods of a module, by their names; of a class, its own."""
    for name, each in vars(owner).items():
        each = getattr(each, "fget", None) or getattr(each, "__func__", each)
        if name[0] == "_" or getattr(each, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(each):
            yield from functions(each, module)
        elif inspect.isfunction(each):
            yield f"{owner.__name__}.{name}", each


def test_annotations_of_public_functions_are_there_at_run_time():
    """For tools that read them; what a readout may be is said once, in `options`."""
    found = {
        name: typing.get_type_hints(function)
        for module in MODULES
        for name, function in functions(module, module)
    }
    assert len(found) > 200
    assert not [name for name, hints in found.items() if hints.get("readout") is str]


def test_import_loads_nothing_that_was_not_asked_for():
    code = (
        "import sys, ksm_ext; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("kind", RESULTS, ids=lambda kind: kind.__name__)
def test_results_are_shown_in_a_few_lines(kind):
    """Tensors by shape, names by number: whatever is in a result."""
    result = object.__new__(kind)
    for field in dataclasses.fields(kind):
        value = torch.zeros(300, 40)
        if "Tensor" not in str(field.type):
            value = tuple(f"a long name of the task {i}" for i in range(300))
        object.__setattr__(result, field.name, value)
    assert "\n" not in repr(result) and len(repr(result)) < 2000
    assert "(300, 40) float32" in repr(result)


def test_all_that_a_surrogate_holds_is_shown_in_a_few_lines():
    masks = subsets.mixed_sizes(30, 200, seed=0)
    scores = torch.rand(200, 40, generator=torch.Generator().manual_seed(0))
    names = [f"a long name of the task {i}" for i in range(30)]
    few = masks[:60], scores[:60, :3]
    found = [
        fit_surrogate(masks, scores, kernel="rbf", task_names=names, share_ridge=False),
        fit_surrogate(masks, scores[:, :3], kernel="lasso"),
        fit_surrogate(*few, kernel="linear", warp="normal"),
        fit_surrogate(*few, kernel="rbf", estimates=(masks, scores[:, :3] ** 3)),
    ]
    shown = []
    for each in found:
        shown += [each, each.masks, each.candidates, each.candidates[0], each.trend, *each.warps]
        shown += [*each.kernel_terms, *each.linear_terms]
        shown += [] if each.trend is None else each.trend.levels
        shown += [term.kernel for term in each.kernel_terms]
    assert max(len(repr(each).split("\n")) for each in shown) <= 10
    assert max(len(line) for each in shown for line in repr(each).split("\n")) < 1000
