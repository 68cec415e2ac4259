"""Outputs h of a model on one sample, whose gradients become the sample's features.

An output is any function ``output(model, sample) -> scalar tensor``. ``model`` is called as the
module is, on batches, so an output adds the batch dimension; ``sample`` is one sample without it:

- a tuple ``(x, ..., y)``: ``model(x[None], ...)`` gives the logits (1, C) of the label y (), or
  (1, T, C) of the labels y (T,), position by position;
- a dict, as HuggingFace models take: all but ``labels`` goes to the model by keyword. Logits
  (1, C) classify; logits (1, T, C) are a causal language model's, so that labels (T,) are
  shifted by one position here.

Labels of -100 are left out of a sequence. The other labels are the *answer*, whose probability is
the product p = Π p_t over its tokens, so that for any number of classes and tokens

    log_odds = log(p / (1 - p)),    cross_entropy = -log p = softplus(-log_odds) exactly:

one gradient per sample gives the loss of any model near this one. Half-precision logits are
widened to float32. Reference: *Park et al. 2023, arXiv:2303.14186*.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ksm_ext.checks import message, shape_text

Sample = tuple[Tensor, ...] | dict[str, Tensor]
Output = Callable[[Callable[..., Any], Any], Tensor]

IGNORED = -100  # the label that PyTorch and HuggingFace leave out of losses


def log_odds(model: Callable[..., Any], sample: Sample) -> Tensor:
    """Log-odds log(p / (1 - p)) of the right answer, stable however near p is to 0 or 1.

    Args:
        model: The module, or a stand-in for it with other parameters.
        sample: One sample, see the module's head.

    Returns:
        () float. Infinite where no label is left to predict.

    Raises:
        ValueError: If logits and labels do not fit together, or there is but one class.
    """
    right, others, kept = _answer(model, sample)
    odds = right - others.logsumexp(dim=1)  # (r,)
    return odds[0] if kept is None else _log_odds_of_all(odds, kept)


def cross_entropy(model: Callable[..., Any], sample: Sample) -> Tensor:
    """Loss -log p of the right answer, summed over its tokens; see :func:`log_odds`."""
    right, others, kept = _answer(model, sample)
    loss = -F.logsigmoid(right - others.logsumexp(dim=1))  # (r,)
    return loss[0] if kept is None else loss.where(kept, 0.0).sum()


def margin(model: Callable[..., Any], sample: Sample) -> Tensor:
    """Right logit less the largest other one, at the answer's worst token: > 0 if it is chosen."""
    right, others, kept = _answer(model, sample)
    gap = right - others.amax(dim=1)  # (r,)
    return gap[0] if kept is None else gap.where(kept, torch.inf).amin()


def logit(model: Callable[..., Any], sample: Sample) -> Tensor:
    """Logit of the right class, summed over the answer's tokens; see :func:`log_odds`."""
    right, _, kept = _answer(model, sample)
    return right[0] if kept is None else right.where(kept, 0.0).sum()


def prediction(model: Callable[..., Any], sample: Sample) -> Tensor:
    """The one number that a regression predicts, in the units of its labels; () float."""
    return _prediction(model, sample)[0]


def squared_error(model: Callable[..., Any], sample: Sample) -> Tensor:
    """Squared error (f(x) - y)² of a scalar regression; () float."""
    predicted, label = _prediction(model, sample)
    return (predicted - label.reshape(())).square()


def _apply(model: Callable[..., Any], sample: Sample) -> tuple[Tensor, Tensor]:
    """What the model says of the one sample, at least float32, and the sample's label."""
    if isinstance(sample, dict):
        inputs = {name: value[None] for name, value in sample.items() if name != "labels"}
        if len(inputs) == len(sample):
            found = ", ".join(f"`{name}`" for name in sample)
            raise ValueError(message("sample", "a dict with `labels`", found, "Add the labels."))
        answer, label = model(**inputs), sample["labels"]
    else:
        *columns, label = sample
        answer = model(*(column[None] for column in columns))
    answer = getattr(answer, "logits", answer)[0]  # HuggingFace wraps its logits
    return answer.to(torch.promote_types(answer.dtype, torch.float32)), label


def _prediction(model: Callable[..., Any], sample: Sample) -> tuple[Tensor, Tensor]:
    answer, label = _apply(model, sample)
    if answer.numel() != 1:
        remedy = "Write an output of your own that picks one of the numbers."
        raise ValueError(message("model", "a scalar regression", shape_text(answer), remedy))
    return answer.reshape(()), label


def _answer(model: Callable[..., Any], sample: Sample) -> tuple[Tensor, Tensor, Tensor | None]:
    """Right logits (r,), logits of the other classes (r, C), and which of the r tokens count.

    A classification is one token, and None says that it counts.
    """
    logits, labels = _apply(model, sample)
    if labels.is_floating_point():
        remedy = "Convert them, or use `prediction` for a regression."
        raise TypeError(message("labels", "whole numbers", str(labels.dtype), remedy))
    fits = labels.numel() == 1 if logits.ndim == 1 else labels.shape == logits.shape[:-1]
    if logits.ndim not in (1, 2) or not fits:
        found = f"logits of {shape_text(logits)} for labels of {shape_text(labels)}"
        remedy = "Give one label for logits (C,) and T labels for logits (T, C)."
        raise ValueError(message("sample", "labelled as its logits are laid out", found, remedy))
    if logits.shape[-1] < 2:
        remedy = "Use `prediction` for a regression, or a model with one logit per class."
        raise ValueError(message("model", "a classifier", "one logit", remedy))
    kept = None
    if logits.ndim == 1:
        logits, labels = logits[None], labels.reshape(1)
    else:
        if isinstance(sample, dict):
            logits, labels = logits[:-1], labels[1:]
        kept = labels != IGNORED
        labels = labels.where(kept, 0)
    index = labels.long()[:, None]
    right = logits.gather(1, index)[:, 0]
    return right, logits.scatter(1, index, -torch.inf), kept


def _log_odds_of_all(odds: Tensor, kept: Tensor) -> Tensor:
    """Log-odds that all kept tokens are right: -log expm1(S), S = Σ softplus(-odds) = -log p.

    S underflows where every token is nearly certain, so it is carried by its logarithm; and each
    branch of a ``where`` is clamped to its own side, or its infinite derivative would leak.
    """
    log_loss = torch.where(odds > 30, -odds, (-F.logsigmoid(odds.clamp(max=30))).log())
    shift = log_loss.detach().amax()  # the derivative of logsumexp rounds as its value does
    log_sum = shift + (log_loss - shift).where(kept, -torch.inf).logsumexp(dim=0)
    total = (-F.logsigmoid(odds)).where(kept, 0.0).sum()
    small = total.clamp(max=1e-3)
    large = total.clamp(min=1e-3)
    return -torch.where(
        total < 1e-3,
        log_sum + small / 2 + small.square() / 24,  # log expm1 S = log S + S/2 + S²/24 - O(S⁴)
        large + (-torch.expm1(-large)).log(),
    )
