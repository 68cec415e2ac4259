"""Losses of a model on a whole batch at once: one number for each sample.

A loss is any function ``loss(outputs, labels) -> (b,)`` of what the model says of b samples and
their labels. Of a batch that is a tuple ``(x, ..., y)``, ``model(x, ...)`` gives the outputs and y
is the labels; of a dict, all but ``labels`` goes to the model by keyword, and where the logits are
(b, T, C) they are a causal language model's, so that labels (b, T) are shifted by one here.
:mod:`ksm_ext.network.outputs` has the same quantities of one sample at a time.

Shapes: outputs (b, C) or (b, T, C), labels (b,) or (b, T), losses (b,).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ksm_ext.checks import message, shape_text
from ksm_ext.network.batches import Batch
from ksm_ext.network.outputs import IGNORED

Loss = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each sample, summed over its positions; labels of -100 count nothing.

    Args:
        logits: (b, C) or (b, T, C) float.
        labels: (b,) or (b, T) integers.

    Returns:
        (b,) float.
    """
    if labels.shape != logits.shape[:-1]:
        found = f"logits of {shape_text(logits)} for labels of {shape_text(labels)}"
        remedy = "Give one row of logits per label."
        raise ValueError(message("data", "labelled as its logits are laid out", found, remedy))
    flat = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten().long(), reduction="none", ignore_index=IGNORED
    )
    return flat.reshape(len(logits), -1).sum(1)


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Squared error of each sample, summed over its outputs: (b, ...) and (b, ...) -> (b,)."""
    labels = labels.reshape(outputs.shape) if labels.numel() == outputs.numel() else labels
    if labels.shape != outputs.shape:
        found = f"outputs of {shape_text(outputs)} for labels of {shape_text(labels)}"
        remedy = "Give one number per output."
        raise ValueError(message("data", "labelled as its outputs are laid out", found, remedy))
    return (outputs - labels).square().reshape(len(outputs), -1).sum(1)


def outputs_and_labels(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """What the model says of a batch, at least float32, and the batch's labels beside it."""
    if isinstance(batch, dict):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if len(inputs) == len(batch):
            found = ", ".join(f"`{name}`" for name in batch)
            raise ValueError(message("data", "dicts with `labels`", found, "Add the labels."))
        answer, labels = model(**inputs), batch["labels"]
    else:
        *columns, labels = batch
        answer = model(*columns)
    answer = getattr(answer, "logits", answer)  # HuggingFace wraps its logits
    answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
    if isinstance(batch, dict) and answer.ndim == 3 and labels.ndim == 2:
        return answer[:, :-1], labels[:, 1:]
    return answer, labels
