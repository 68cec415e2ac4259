"""Other libraries at the work of ``bench_features.py``: the same layers of the same sequences.

Each is called on a GPT-2 whose projections are ``nn.Linear``, as two of them ask for, on the
``layers`` of its blocks (weights and biases), ``BATCH`` sequences at a time, keeps what it makes in
memory where it can, and has the loss of the next tokens. Each skips where it is not installed.
"""

import logging
import tempfile
from copy import deepcopy
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset


class Sequences(Dataset):
    """Each sequence by its name, as HuggingFace models take it."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[index]}


def bergson(
    model: nn.Module, ids: Tensor, layers: tuple[str, ...], batch_size: int, side: int
) -> Tensor:
    """(b, layers side²): a two-sided projection of each layer's gradient, in memory."""
    library = pytest.importorskip("bergson", exc_type=ImportError)
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"input_ids": ids.tolist()})
    with tempfile.TemporaryDirectory() as folder:
        options = library.IndexConfig(run_path=f"{folder}/run")
        options.partial_run_path.mkdir()
        collector = library.InMemoryCollector(
            model=model,
            data=data,
            cfg=options,
            processor=library.GradientProcessor(projection_dim=side, include_bias=True),
            target_modules=set(layers),
        )
        batches = [rows.tolist() for rows in torch.arange(len(ids)).split(batch_size)]
        library.CollectorComputer(
            model, data, collector=collector, cfg=options, batches=batches
        ).run_with_collector_hooks()
    return torch.cat([part.flatten(1) for part in collector.gradients.values()], 1)


def dattri_logra(
    model: nn.Module, ids: Tensor, layers: tuple[str, ...], batch_size: int, side: int
) -> Tensor:
    """(b, layers side²): dattri's cache of LoGra, in memory, and no Hessian."""
    logra = pytest.importorskip("dattri.algorithm.logra")
    from dattri.task import AttributionTask

    def loss(network: nn.Module, batch: dict[str, Tensor], device: str) -> Tensor:
        return network(**batch, labels=batch["input_ids"]).loss

    task = AttributionTask(loss_func=loss, model=model, checkpoints=[model.state_dict()])
    with tempfile.TemporaryDirectory() as folder:
        options = {"hessian": "Identity", "offload": "none", "cache_dir": folder}
        made = logra.LoGraAttributor(task, [*layers], proj_dim=side**2, **options)
        made.cache(DataLoader(Sequences(ids), batch_size=batch_size))
    return torch.cat([*made.offload_manager.cached_gradients.values()])


@cache
def prepared(model: nn.Module, layers: tuple[str, ...]) -> tuple[nn.Module, Any]:
    """A copy, since layers are replaced in place, and kronfluence's task of the next tokens."""
    library = pytest.importorskip("kronfluence")

    class NextTokens(library.task.Task):
        def compute_train_loss(self, batch, model, sample=False):
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            labels = batch["input_ids"][:, 1:].flatten()
            if sample:
                labels = torch.multinomial(logits.detach().softmax(-1), 1).flatten()
            return cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return [*layers]

    return library.prepare_model(deepcopy(model), NextTokens()), NextTokens()


def kronfluence(
    model: nn.Module, ids: Tensor, layers: tuple[str, ...], batch_size: int, **options: Any
) -> dict[str, dict[str, Tensor]]:
    """Its matrices of corrected eigenvalues, by layer; it writes all factors to files."""
    arguments = pytest.importorskip("kronfluence.arguments")
    analyzer = pytest.importorskip("kronfluence.analyzer")
    quiet = {"cpu": True, "log_level": logging.WARNING, "disable_tqdm": True}
    with tempfile.TemporaryDirectory() as folder:
        made = analyzer.Analyzer("peer", *prepared(model, layers), output_dir=folder, **quiet)
        made.fit_all_factors(
            "factors",
            Sequences(ids),
            per_device_batch_size=batch_size,
            factor_args=arguments.FactorArguments(**options),
        )
        return made.load_lambda_matrices("factors")
