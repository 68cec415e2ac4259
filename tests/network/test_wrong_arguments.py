"""What is no argument at all: an error of this package that names it, whichever it is."""

import inspect
import math
import re
from functools import partial

import pytest
import torch
from torch import nn

from ksm_ext import (
    EKFAC,
    BlockConjugateGradients,
    FactoredProjector,
    GaussNewton,
    GradientEstimator,
    Hessian,
    LiSSA,
    Projector,
    collect_features,
    load_features,
)
from ksm_ext.attribution.influence import influence, projected_influence, sample_influence
from ksm_ext.attribution.task_hessian import task_hessian
from ksm_ext.attribution.tracin import gradient_cosine, tracin
from ksm_ext.attribution.trak import self_influence, top_samples, trak, trak_scores
from ksm_ext.network.batches import ordered_loader
from ksm_ext.network.gradients import (
    check_networks,
    check_output,
    check_projector,
    parameter_names,
    per_sample_gradients,
)
from ksm_ext.network.hessian import loss_gradients
from ksm_ext.network.outputs import log_odds
from ksm_ext.network.solvers import check_operator
from ksm_ext.network.spectrum import (
    hutch_pp_trace,
    hutchinson_trace,
    lanczos,
    per_sample_traces,
    spectral_density,
    top_eigenpairs,
)

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
DATA = torch.randn(24, 4).double(), torch.randint(3, (24,))
TASKS = [tuple(column[start::3] for column in DATA) for start in range(3)]
OPERATOR = GaussNewton(MODEL, DATA)
FISHER = EKFAC().fit(OPERATOR)
V = torch.randn(2, OPERATOR.shape[0]).double()
FEATURES = collect_features(MODEL, DATA, log_odds, Projector(8))
DIAGONAL = lambda v: v * torch.arange(1.0, 1 + v.shape[1])  # noqa: E731
NAMED = {"tasks": TASKS, "targets": DATA}
FITTED = GradientEstimator(MODEL, **NAMED).fit()
MASKS = torch.tensor([[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1, 1]], dtype=torch.bool)
DENSITY = spectral_density(DIAGONAL, 9, num_steps=4)

CALLS = {
    "parameter_names": (parameter_names, {"model": MODEL}),
    "check_networks": (partial(check_networks, "models"), {"models": MODEL}),
    "check_output": (check_output, {"output": log_odds}),
    "check_projector": (check_projector, {"projector": Projector(4)}),
    "check_operator": (check_operator, {"operator": OPERATOR}),
    "per_sample_gradients": (
        per_sample_gradients,
        {"model": MODEL, "output": log_odds, "batch": DATA},
    ),
    "collect_features": (collect_features, {"model": MODEL, "data": DATA, "output": log_odds}),
    "Hessian": (Hessian, {"model": MODEL, "data": DATA}),
    "GaussNewton": (GaussNewton, {"model": MODEL, "data": DATA}),
    "loss_gradients": (loss_gradients, {"model": MODEL, "datasets": TASKS}),
    "operator": (OPERATOR.__call__, {"v": V}),
    "operator @ x": (OPERATOR.__matmul__, {"x": V.T}),
    "slopes": (OPERATOR.per_sample_slopes, {"v": V}),
    "curvatures": (OPERATOR.per_sample_quadratic, {"v": V}),
    "third": (Hessian(MODEL, DATA).third, {"u": V, "v": V}),
    "relabelled": (OPERATOR.relabelled, {"seed": 0}),
    "unflatten": (OPERATOR.unflatten, {"v": V}),
    "EKFAC": (EKFAC, {}),
    "EKFAC.fit": (EKFAC().fit, {"operator": OPERATOR}),
    "EKFAC.solve": (EKFAC().solve, {"operator": OPERATOR, "rhs": V, "damping": 0.1}),
    "fisher": (FISHER.__call__, {"v": V}),
    "fisher.inverse": (FISHER.inverse, {"v": V, "damping": 0.1}),
    "fisher.solve": (FISHER.solve, {"operator": OPERATOR, "rhs": V, "damping": 0.1}),
    "BlockConjugateGradients": (BlockConjugateGradients, {}),
    "cg": (BlockConjugateGradients().solve, {"operator": DIAGONAL, "rhs": V, "damping": 0.1}),
    "LiSSA": (LiSSA, {"scale": 2.0}),
    "LiSSA.solve": (LiSSA(100.0).solve, {"operator": DIAGONAL, "rhs": V, "damping": 0.1}),
    "FactoredProjector": (FactoredProjector, {"dim": 4}),
    "hutchinson_trace": (hutchinson_trace, {"operator": OPERATOR}),
    "hutch_pp_trace": (hutch_pp_trace, {"operator": OPERATOR}),
    "per_sample_traces": (
        per_sample_traces,
        {"quadratic": OPERATOR.per_sample_quadratic, "dim": V.shape[1], "dtype": torch.float64},
    ),
    "lanczos": (lanczos, {"operator": DIAGONAL, "start": V, "num_steps": 3}),
    "spectral_density": (spectral_density, {"operator": OPERATOR}),
    "density": (DENSITY.density, {"grid": torch.arange(3.0), "width": 1.0}),
    "moment": (DENSITY.moment, {"order": 1}),
    "top_eigenpairs": (top_eigenpairs, {"operator": OPERATOR, "num_pairs": 1}),
    "ordered_loader": (ordered_loader, {"data": DATA, "batch_size": 2}),
    "load_features": (load_features, {"path": "."}),
    "influence": (influence, {"model": MODEL, **NAMED}),
    "sample_influence": (sample_influence, {"model": MODEL, "data": DATA, "queries": TASKS[0]}),
    "projected_influence": (projected_influence, {"model": MODEL, **NAMED}),
    "task_hessian": (task_hessian, {"model": MODEL, **NAMED, "damping": 5.0}),
    "tracin": (tracin, {"checkpoints": MODEL, "learning_rates": 0.1, **NAMED}),
    "gradient_cosine": (gradient_cosine, {"model": MODEL, **NAMED}),
    "trak": (trak, {"models": MODEL, **NAMED}),
    "trak_scores": (trak_scores, {"train": FEATURES, "queries": FEATURES}),
    "top_samples": (top_samples, {"train": FEATURES, "queries": FEATURES, "count": 2}),
    "self_influence": (self_influence, {"train": FEATURES}),
    "GradientEstimator": (GradientEstimator, {"models": MODEL, **NAMED}),
    "predict": (FITTED.predict, {"masks": MASKS}),
    "calibrate": (FITTED.calibrate, {"masks": MASKS, "true_scores": torch.rand(4)}),
}
FLAGS = {
    "check",
    "progress",
    "largest",
    "interactions",
    "hadamard",
    "by_factors",
}  # of any truth value
SET_ELSEWHERE = {"device", "group"}  # PyTorch's own
WRONG = ["wrong", None, 2, [], 1e400, math.nan]
OWN = re.compile(r"^`(\w+)` must be .*, got .*\. .*[.?]$", re.DOTALL)


CASES = [
    pytest.param(function, given, argument, id=f"{name}-{argument}")
    for name, (function, given) in CALLS.items()
    for argument in inspect.signature(function).parameters
    if argument not in FLAGS | SET_ELSEWHERE
]


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
@pytest.mark.parametrize("function, given, argument", CASES)
def test_what_is_of_another_kind_is_named(function, given, argument, wrong, tmp_path, monkeypatch):
    """Or it is taken: there are paths, and numbers of samples, of any name and number."""
    monkeypatch.chdir(tmp_path)
    try:
        function(**{**given, argument: wrong})
    except (TypeError, ValueError, FileNotFoundError, RuntimeError) as error:
        named = OWN.match(str(error))
        assert named, f"{type(error).__name__}: {error}"
        assert named[1] in (argument, "v" if argument == "dim" else argument), error


FUNCTIONS = {
    "output": [
        lambda wrong: per_sample_gradients(MODEL, wrong, DATA),
        lambda wrong: collect_features(MODEL, DATA, wrong),
        lambda wrong: GradientEstimator(MODEL, **NAMED, output=wrong),
    ],
    "loss": [
        lambda wrong: Hessian(MODEL, DATA, wrong),
        lambda wrong: influence(MODEL, **NAMED, loss=wrong),
        lambda wrong: sample_influence(MODEL, DATA, DATA, wrong),
        lambda wrong: task_hessian(MODEL, **NAMED, loss=wrong, damping=5.0),
        lambda wrong: tracin(MODEL, 0.1, **NAMED, loss=wrong),
    ],
}
EXPECTED = {"output": r"\(model, batch\)", "loss": r"\(outputs, labels\)"}


@pytest.mark.parametrize(
    "name, call", [(name, call) for name, calls in FUNCTIONS.items() for call in calls]
)
def test_functions_of_other_arguments_are_told_which(name, call):
    form = rf"^`{name}` must be a function {EXPECTED[name]} -> \(b,\), got "
    for wrong in (lambda one: one, lambda one, two, three: one, lambda one, *, two: one):
        with pytest.raises(TypeError, match=form + r"one of \("):
            call(wrong)
    with pytest.raises(TypeError, match=form + "2"):
        call(2)


def test_methods_share_their_words():
    """One name for one thing; what all methods can be told, all take."""
    words = {
        method: {*inspect.signature(method).parameters}
        for method in (influence, sample_influence, projected_influence, task_hessian, tracin)
    } | {trak: {*inspect.signature(trak).parameters}}
    for method, taken in words.items():
        assert taken >= {"parameters", "batch_size", "engine", "progress"}, method
    for method in (influence, sample_influence, projected_influence, task_hessian):
        assert "damping" in words[method]
    for method in (influence, sample_influence, task_hessian):
        assert words[method] >= {"solver", "vectors_per_pass"}


METHODS = {
    "influence": lambda tasks, targets: influence(MODEL, tasks, targets, damping=1.0),
    "sample_influence": lambda tasks, targets: sample_influence(MODEL, tasks[0], targets),
    "projected_influence": lambda tasks, targets: projected_influence(MODEL, tasks, targets),
    "task_hessian": lambda tasks, targets: task_hessian(MODEL, tasks, targets, damping=1.0),
    "tracin": lambda tasks, targets: tracin(MODEL, 0.1, tasks, targets),
    "trak": lambda tasks, targets: trak(MODEL, tasks, targets),
    "GradientEstimator": lambda tasks, targets: GradientEstimator(MODEL, tasks, targets).fit(),
    "EKFAC": lambda tasks, _: EKFAC(fisher="empirical").fit(GaussNewton(MODEL, tasks[0])),
}


@pytest.mark.parametrize("place", ["tasks", "targets"])
@pytest.mark.parametrize("method", METHODS)
def test_samples_without_an_answer_are_named(method, place):
    """Labels of no class, of no whole number, and inputs that are none: at every method's door."""
    inputs, labels = DATA
    hole, other, left_out = inputs.clone(), labels.clone(), labels.clone()
    hole[5, 1], other[5], left_out[5] = math.nan, 7, -100
    found = {
        r"`labels` must be from 0 to 2, got -100 for 3 classes": (inputs, left_out),
        r"`labels` must be from 0 to 2, got 7 for 3 classes": (inputs, other),
        r"`labels` must be whole numbers, got torch.float64": (inputs, labels.double()),
        r"`(loss|output)` must be finite, got NaN or infinity, .* samples 5": (hole, labels),
    }
    for words, data in found.items():
        given = ([data, *TASKS], DATA) if place == "tasks" else (TASKS, data)
        if method == "EKFAC" and place == "targets":
            continue
        with pytest.raises((ValueError, TypeError), match=words):
            METHODS[method](*given)
