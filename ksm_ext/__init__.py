"""Kernel surrogate models: which training tasks help or hurt a target, alone and together.

The flow: draw subsets of tasks (:mod:`ksm_ext.subsets`), score a model trained on each
(:func:`retrain_scores`) or estimate its scores from gradients (:class:`GradientEstimator`), fit a
surrogate to the scores (:func:`fit_surrogate`), ask it for attributions and interactions
(:class:`Surrogate`), judge it (:mod:`ksm_ext.evaluation`), choose tasks (:mod:`ksm_ext.selection`),
show it (:mod:`ksm_ext.plotting`, :func:`write_report`). :func:`attribute_tasks` is all in one call;
``ksm`` on the command line (:mod:`ksm_ext.cli`) begins at scores in a file (:func:`read_scores`).

Names are loaded when they are asked for; ``__init__.pyi`` says where each lives.
"""

from importlib.metadata import PackageNotFoundError, version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

try:
    __version__ = version("ksm_ext")
except PackageNotFoundError:  # built in place, and not installed
    __version__ = "0.0.0"
