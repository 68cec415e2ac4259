"""How curved the training loss is at each checkpoint of each way of training.

The trace and the largest eigenvalue of the Hessian of the mean training loss, its spectral density
at the main networks, and what a bound makes of the trace.
"""

from typing import Any

import joblib
from torch import nn
from torch.nn.utils import parameters_to_vector

from experiments.bounds import hessian_distance, pac_bayes_bound
from experiments.common import one_thread, write_json
from experiments.experiment import Run
from experiments.trained import TrainedExperiment
from experiments.truth import models
from ksm_ext.network.hessian import Hessian
from ksm_ext.network.spectrum import (
    hutch_pp_trace,
    per_sample_traces,
    spectral_density,
    top_eigenpairs,
)


def measure(run: Run) -> None:
    """Write ``curvature.json`` for every variant, and the densities of the main one."""
    todo = []
    for variant in ("main", *run.settings.variants):
        path = models(run, variant)[0]
        steps = run.settings.variant(variant).stops()
        todo += [(variant, *pair) for pair in enumerate(zip(path, steps, strict=True))]
    measured = joblib.Parallel(return_as="generator")(
        joblib.delayed(curvature_of)(run.experiment, network, with_density=variant == "main")
        for variant, _, (network, _) in todo
    )
    facts = {}
    for (variant, number, (_, step)), found in zip(todo, measured, strict=True):
        facts[f"{variant}, step {step}"] = {"variant": variant, "checkpoint": number, **found}
        print(f"{variant}, step {step}: trace {found['trace']:.4g}", flush=True)
    write_json(run.output / "curvature.json", facts)


@one_thread()
def curvature_of(
    experiment: TrainedExperiment, network: nn.Module, *, with_density: bool
) -> dict[str, Any]:
    """Trace, eigenvalue, per-sample traces and bound of one network."""
    data, num_products = experiment.data(), experiment.settings.methods.num_products
    operator = Hessian(network, (data.inputs, data.labels))
    trace = hutch_pp_trace(operator, num_products=num_products, seed=0)
    largest, _ = top_eigenpairs(operator, 1, tolerance=1e-2)
    place = {"dtype": operator.dtype, "device": operator.device}
    per_sample, _ = per_sample_traces(
        operator.per_sample_quadratic, operator.shape[0], num_probes=8, **place
    )
    start, end = (
        parameters_to_vector(net.parameters()).detach().cpu()
        for net in (experiment.initial_model(0), network)
    )
    flatness = max(trace.value, 0.0), start, end, len(data.labels)
    # Without a training loss, it bounds the gap, in units of the largest loss.
    bound = pac_bayes_bound(*flatness, training_loss=0.0)
    facts = {
        "trace": trace.value,
        "trace_std_error": trace.std_error,
        "largest_eigenvalue": float(largest[0]),
        "largest_per_sample_trace": float(per_sample.max()),
        "distance": float((end - start).norm()),
        "hessian_distance": hessian_distance(*flatness),
        "gap_bound": bound.value,
    }
    if with_density:
        density = spectral_density(operator, num_probes=4, num_steps=40, seed=0)
        facts |= {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()}
    return facts
