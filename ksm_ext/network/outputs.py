"""Outputs h of a model, one number for each sample of a batch, and losses of what a model says.

An output is any function ``output(model, batch) -> (b,)``; its gradients become features of the
samples. ``model`` is called as the module is. A batch of b samples is

- a tuple ``(x, ..., y)``: ``model(x, ...)`` gives the logits (b, C) of the labels y (b,), or
  (b, T, C) of the labels y (b, T), position by position;
- a dict, as HuggingFace models take: all but ``labels`` goes to the model by keyword. Logits
  (b, C) classify; logits (b, T, C) are a causal language model's, so that labels (b, T) are
  shifted by one position here.

Labels of -100 are left out of a sequence. The other labels of a sample are its *answer*, whose
probability is the product p = Π p_t over its tokens, so that for any number of classes and tokens

    log_odds = log(p / (1 - p)),    cross_entropy = -log p = softplus(-log_odds) exactly:

one gradient per sample gives the loss of any model near this one. Half-precision logits are
widened to float32. Reference: *Park et al. 2023, arXiv:2303.14186*.

A loss is any function ``loss(outputs, labels) -> (b,)`` of what the model says, (b, ...), and the
labels beside it: the Gauss-Newton matrix takes the two apart.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ksm_ext.checks import listed, message, shape_text
from ksm_ext.network.batches import Batch

Output = Callable[[Callable[..., Any], Any], Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]

IGNORED = -100  # the label that PyTorch and HuggingFace leave out of losses
_NO_LABEL = -(2**62)


def log_odds(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Log-odds log(p / (1 - p)) of the right answer, stable however near p is to 0 or 1.

    Args:
        model: The module, or a stand-in for it with other parameters.
        batch: b samples, see the module's head.

    Returns:
        (b,) float. Infinite where no label is left to predict.

    Raises:
        ValueError: If logits and labels do not fit together, or there is but one class.
    """
    right, others, kept = _answers(model, batch)
    odds = right - others.logsumexp(dim=-1)  # (b, r)
    return odds[:, 0] if kept is None else _log_odds_of_all(odds, kept)


def cross_entropy(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Loss -log p (b,) of the right answer, summed over its tokens; see :func:`log_odds`."""
    right, others, kept = _answers(model, batch)
    loss = -F.logsigmoid(right - others.logsumexp(dim=-1))  # (b, r), as small as p is near 1
    return loss[:, 0] if kept is None else loss.where(kept, 0.0).sum(-1)


def margin(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Right logit less the largest other one, at the answer's worst token: > 0 if it is chosen."""
    right, others, kept = _answers(model, batch)
    gap = right - others.amax(dim=-1)  # (b, r)
    return gap[:, 0] if kept is None else gap.where(kept, torch.inf).amin(-1)


def logit(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Logit (b,) of the right class, summed over the answer's tokens; see :func:`log_odds`."""
    right, _, kept = _answers(model, batch)
    return right[:, 0] if kept is None else right.where(kept, 0.0).sum(-1)


def prediction(model: Callable[..., Any], batch: Batch) -> Tensor:
    """The one number (b,) that a regression predicts of a sample, in the units of its labels."""
    outputs, _ = outputs_and_labels(model, batch)
    if outputs.numel() != len(outputs):
        remedy = "Write an output of your own that picks one of the numbers."
        raise ValueError(message("model", "a scalar regression", shape_text(outputs), remedy))
    return outputs.reshape(-1)


def squared_error(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Squared error (b,) of a regression: (f(x) - y)², summed over its numbers."""
    return _squared_error(*outputs_and_labels(model, batch))


def outputs_and_labels(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor]:
    """What the model says of a batch, at least float32, and the batch's labels beside it."""
    if isinstance(batch, dict):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if len(inputs) == len(batch):
            found = ", ".join(f"`{name}`" for name in batch)
            remedy = "Add the labels."
            if "label" in batch:
                remedy = "Rename `label`, as DataCollatorWithPadding does."
            raise ValueError(message("data", "dicts with `labels`", found, remedy))
        answer, labels = model(**inputs), batch["labels"]
    else:
        *columns, labels = batch
        answer = model(*columns)
    answer = _logits(answer)
    answer = answer.to(torch.promote_types(answer.dtype, torch.float32))
    if isinstance(batch, dict) and answer.ndim == 3 and labels.ndim == 2:
        return answer[:, :-1], labels[:, 1:]
    return answer, labels


def _logits(answer: Any) -> Tensor:
    """What a model says, out of a tuple, a dict or HuggingFace's ``ModelOutput``."""
    found = answer
    if isinstance(answer, Mapping) and "logits" in answer:
        found = answer["logits"]
    elif hasattr(answer, "logits"):
        found = answer.logits
    elif isinstance(answer, (tuple, list)) and answer:
        found = answer[0]
    if not isinstance(found, Tensor):
        expected = "one that returns logits, first in a tuple, or under the name `logits`"
        found_text = f"a {type(found).__name__}"
        if isinstance(found, Mapping):
            found_text += f" of {listed(map(repr, found))}"
        remedy = "Return logits, or write an output of your own."
        raise TypeError(message("model", expected, found_text, remedy))
    return found


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """As the output of that name, by PyTorch's function: it may be differentiated three times."""
    _check_whole(labels)
    _check_labelled(labels.shape == logits.shape[:-1], logits, labels)
    left_out = IGNORED if logits.ndim > 2 else _NO_LABEL  # of a class, none is left out
    try:
        flat = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten().long(), reduction="none", ignore_index=left_out
        )
    except IndexError as error:
        kept = labels[labels != left_out]
        raise ValueError(_out_of_range(kept, logits.shape[-1])) from error
    return flat.reshape(len(logits), -1).sum(1)


def _squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    labels = labels.reshape(outputs.shape) if labels.numel() == outputs.numel() else labels
    _check_labelled(labels.shape == outputs.shape, outputs, labels)
    return (outputs - labels).square().reshape(len(outputs), -1).sum(1)


def _drawn_classes(logits: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Like the labels, by the probabilities of the model; labels that are left out stay so."""
    edges = logits.double().softmax(-1).cumsum(-1)
    at = _uniform(labels.shape, generator).to(edges)[..., None] * edges[..., -1:]
    drawn = torch.searchsorted(edges, at, right=True)[..., 0].clamp(max=logits.shape[-1] - 1)
    return drawn.to(labels.dtype).where(labels != IGNORED, labels)


def _drawn_numbers(outputs: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Like the labels, normal about the model's numbers with the variance 1/2 of exp(-error)."""
    normal = torch.special.ndtri(_uniform(outputs.shape, generator).clamp(min=1e-16))
    return (outputs + normal.to(outputs) / 2**0.5).reshape(labels.shape)


def _uniform(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, dtype=torch.float64, generator=generator)


def with_labels(batch: Batch, labels: Tensor) -> Batch:
    """The batch with other labels, laid out as :func:`outputs_and_labels` has them."""
    if not isinstance(batch, dict):
        return (*batch[:-1], labels)
    before = batch["labels"]
    shifted = labels.shape != before.shape
    return {**batch, "labels": torch.cat([before[:, :1], labels], 1) if shifted else labels}


LOSSES: dict[str, Loss] = {"cross_entropy": _cross_entropy, "squared_error": _squared_error}
DRAWS = {"cross_entropy": _drawn_classes, "squared_error": _drawn_numbers}


def _check_whole(labels: Tensor) -> None:
    if labels.is_floating_point():
        remedy = "Convert them; of a regression, take `prediction` or the loss 'squared_error'."
        raise TypeError(message("labels", "whole numbers", str(labels.dtype), remedy))


def _check_labelled(fits: bool, outputs: Tensor, labels: Tensor) -> None:
    if not fits:
        found = f"outputs of {shape_text(outputs)} for labels of {shape_text(labels)}"
        remedy = (
            "Give labels (b,) for logits (b, C), (b, T) for (b, T, C), one for each prediction."
        )
        raise ValueError(message("data", "labelled as its outputs are laid out", found, remedy))


def _answers(model: Callable[..., Any], batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
    """Right logits (b, r), logits of the other classes (b, r, C), and which of the r tokens count.

    A classification is one token, and None says that it counts.
    """
    logits, labels = outputs_and_labels(model, batch)
    _check_whole(labels)
    one = logits.ndim == 2
    fits = labels.numel() == len(logits) if one else labels.shape == logits.shape[:-1]
    _check_labelled(logits.ndim in (2, 3) and fits, logits, labels)
    if logits.shape[-1] < 2:
        remedy = "Use `prediction` for a regression, or a model with one logit per class."
        raise ValueError(message("model", "a classifier", "one logit", remedy))
    kept = None
    if one:
        logits, labels = logits[:, None], labels.reshape(-1, 1)
    else:
        kept = labels != IGNORED
        labels = labels.where(kept, 0)
    index = labels.long()[..., None]
    try:
        right = logits.gather(-1, index)[..., 0]
    except RuntimeError as error:
        raise ValueError(_out_of_range(labels, logits.shape[-1])) from error
    return right, logits.scatter(-1, index, -torch.inf), kept


def _out_of_range(labels: Tensor, num_classes: int) -> str:
    bad = labels[(labels < 0) | (labels >= num_classes)].unique().tolist()
    found = f"{listed(bad)} for {num_classes} classes"
    remedy = "Number the classes from 0; only in sequences does -100 leave a label out."
    return message("labels", f"from 0 to {num_classes - 1}", found, remedy)


def _log_odds_of_all(odds: Tensor, kept: Tensor) -> Tensor:
    """Log-odds (b,) that all kept tokens are right: -log expm1(S), S = Σ softplus(-odds) = -log p.

    S underflows where every token is nearly certain, so it is carried by its logarithm; and each
    branch of a ``where`` is clamped to its own side, or its infinite derivative would leak.
    """
    log_loss = torch.where(odds > 30, -odds, (-F.logsigmoid(odds.clamp(max=30))).log())
    shift = log_loss.detach().amax(-1, keepdim=True)  # the derivative rounds as the value does
    log_sum = shift[:, 0] + (log_loss - shift).where(kept, -torch.inf).logsumexp(dim=-1)
    total = (-F.logsigmoid(odds)).where(kept, 0.0).sum(-1)
    small = total.clamp(max=1e-3)
    large = total.clamp(min=1e-3)
    return -torch.where(
        total < 1e-3,
        log_sum + small / 2 + small.square() / 24,  # log expm1 S = log S + S/2 + S²/24 - O(S⁴)
        large + (-torch.expm1(-large)).log(),
    )
