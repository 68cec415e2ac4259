"""Kernel surrogate models: which training tasks help or hurt a target, alone and together.

The flow: draw subsets of tasks (:mod:`ksm_ext.subsets`), score a model trained on each
(:func:`retrain_scores`) or estimate its scores from gradients (:class:`GradientEstimator`), fit a
surrogate to the scores (:func:`fit_surrogate`), ask it for attributions and interactions
(:class:`Surrogate`), judge it (:mod:`ksm_ext.evaluation`), choose tasks (:mod:`ksm_ext.selection`),
show it (:mod:`ksm_ext.plotting`, :func:`write_report`). :func:`attribute_tasks` is all in one call;
``ksm`` on the command line (:mod:`ksm_ext.cli`) begins at scores in a file (:func:`read_scores`).
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ksm_ext import distributed as distributed
from ksm_ext import evaluation as evaluation
from ksm_ext import gradients as gradients
from ksm_ext import selection as selection
from ksm_ext import subsets as subsets
from ksm_ext.build_facts import build_info as build_info
from ksm_ext.features import Features as Features
from ksm_ext.features import load_features as load_features
from ksm_ext.gradients import collect_features as collect_features
from ksm_ext.kernels import ANOVA2 as ANOVA2
from ksm_ext.kernels import RBF as RBF
from ksm_ext.kernels import Exponential as Exponential
from ksm_ext.kernels import Kernel as Kernel
from ksm_ext.kernels import Laplace as Laplace
from ksm_ext.kernels import Linear as Linear
from ksm_ext.kernels import Polynomial as Polynomial
from ksm_ext.pipeline import TaskAttributions as TaskAttributions
from ksm_ext.pipeline import attribute_tasks as attribute_tasks
from ksm_ext.projection import Projector as Projector
from ksm_ext.report import write_report as write_report
from ksm_ext.sample_size import more_subsets as more_subsets
from ksm_ext.score_tables import read_scores as read_scores
from ksm_ext.scores.gradient import GradientEstimator as GradientEstimator
from ksm_ext.scores.retraining import RetrainedScores as RetrainedScores
from ksm_ext.scores.retraining import RetrainingError as RetrainingError
from ksm_ext.scores.retraining import retrain_scores as retrain_scores
from ksm_ext.surrogates.fit import fit_surrogate as fit_surrogate
from ksm_ext.surrogates.krylov import ConjugateGradients as ConjugateGradients
from ksm_ext.surrogates.storage import load_surrogate as load_surrogate
from ksm_ext.surrogates.surrogate import Surrogate as Surrogate

try:
    __version__ = version("ksm_ext")
except PackageNotFoundError:  # built in place, and not installed
    __version__ = "0.0.0"

_LATER = (
    "attribution",
    "bounds",
    "hessian",
    "interop",
    "plotting",
    "sklearn",
    "solvers",
    "spectrum",
)
_METHODS = ("influence", "task_hessian", "tracin", "trak")


def __getattr__(name: str) -> Any:
    """Modules that README names and not everybody needs, imported when they are asked for."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{name}")
    if name == "attribution":
        for method in _METHODS:
            import_module(f"{__name__}.attribution.{method}")
    return module
