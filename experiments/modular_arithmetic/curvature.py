"""How curved the training loss is at each checkpoint of each way of training.

The trace and the largest eigenvalue of the Hessian of the mean training loss, its spectral density
at the main networks, and what a bound makes of the trace.
"""

from pathlib import Path
from typing import Any

from torch import nn
from torch.nn.utils import parameters_to_vector

from experiments.common import write_json
from experiments.modular_arithmetic.settings import Settings
from experiments.modular_arithmetic.training import initial_model
from experiments.modular_arithmetic.truth import load, models
from ksm_ext.bounds import pac_bayes_bound
from ksm_ext.hessian import hessian
from ksm_ext.spectrum import hutch_pp_trace, per_sample_traces, spectral_density, top_eigenpairs

DELTA, LOSS_BOUND = 0.05, 1.0  # of the bound: confidence, and the range of the 0-1 loss


def measure(settings: Settings, output: Path) -> None:
    """Write ``curvature.json`` for every variant, and the density of the main one."""
    facts = {}
    for variant in ("main", *settings.variants):
        path = models(settings, output, variant)[0]
        for number, network in enumerate(path):
            share = settings.variant(variant).checkpoints[number]
            step = round(share * settings.variant(variant).num_steps)
            facts[f"{variant}, step {step}"] = {
                "variant": variant,
                "checkpoint": number,
                **curvature_of(settings, network, with_density=variant == "main"),
            }
            print(f"{variant}, step {step}: trace {facts[f'{variant}, step {step}']['trace']:.4g}")
    write_json(output / "curvature.json", facts)


def curvature_of(settings: Settings, network: nn.Module, *, with_density: bool) -> dict[str, Any]:
    """Trace, eigenvalue, per-sample traces and bound of one network."""
    data, num_probes = load(settings), settings.methods.num_probes
    operator = hessian(network, (data.tokens, data.labels))
    trace = hutch_pp_trace(operator, num_probes=num_probes, seed=0)
    largest, _ = top_eigenpairs(operator, 1, tolerance=1e-2)
    per_sample, _ = per_sample_traces(
        operator.per_sample_quadratic, operator.shape[0], num_probes=8
    )
    start = parameters_to_vector(initial_model(data, settings.model, 0).parameters())
    end = parameters_to_vector(network.parameters()).to(start)
    bound = pac_bayes_bound(
        max(trace.value, 0.0),
        start.detach(),
        end.detach(),
        len(data.labels),
        training_loss=0.0,
        loss_bound=LOSS_BOUND,
        delta=DELTA,
    )
    facts = {
        "trace": trace.value,
        "trace_std_error": trace.std_error,
        "largest_eigenvalue": float(largest[0]),
        "largest_per_sample_trace": float(per_sample.max()),
        "distance": float((end - start).norm()),
        "bound": bound.value,
    }
    if with_density:
        density = spectral_density(operator, num_probes=4, num_steps=40, seed=0)
        facts |= {"nodes": density.nodes.tolist(), "weights": density.weights.tolist()}
    return facts
