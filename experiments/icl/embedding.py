"""Losses of thousands of prompts from the gradients of a few, in the input embeddings.

For a prompt P near an anchor A, with E its input embeddings and h the log-odds of a query's right
answer,

    h(P) ≈ h(A) + ⟨∇_E h(A), E(P) - E(A)⟩,        loss = log(1 + exp(-h)).

Every demonstration is filled up to the same number of tokens, so that those of two prompts lie on
top of each other. A prompt is estimated from the anchors that share most demonstrations with it,
place by place; how much of a first-order term to believe is chosen on the anchors, each estimated
from the others.

Shapes: anchors (a, k), prompts (m, k), losses (m, t), gradients (a, k, t, width · tokens).

Reference: GradSel estimates prompts to first order in their embeddings likewise.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from experiments.common import one_thread, write_json
from experiments.experiment import Run
from experiments.icl.data import Example, draw_prompts
from experiments.icl.inference import LanguageModel, Runs, runs_of
from experiments.icl.model import padded
from experiments.icl.surrogates import RECIPES, Predict, log_odds
from ksm_ext import fit_surrogate
from ksm_ext.evaluation import lds, relative_error

SHARES = (0.0, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)
NEAREST = (1, 3, 8, 20)


@dataclass(frozen=True, eq=False)
class Estimate:
    """Log-odds and their gradients at the anchors.

    Attributes:
        anchors: (a, k).
        log_odds: (a, t) at the anchors.
        swaps: (a, k, n, t) first-order change by demonstration n at place k.
        share: How much of the first-order term is believed.
        nearest: Anchors that an estimate is the mean of.
    """

    anchors: Tensor
    log_odds: Tensor
    swaps: Tensor
    share: float
    nearest: int

    def losses(self, prompts: Tensor) -> Tensor:
        """(m, t) estimated losses."""
        return softplus(-_estimated(self, prompts, self.share, self.nearest))

    def losses_left_out(self) -> Tensor:
        """(a, t) estimated losses of the anchors, each from the others."""
        return softplus(-_estimated(self, self.anchors, self.share, self.nearest, leave_out=True))


def estimate(runs: Runs, anchors: Tensor, losses: Tensor) -> Estimate:
    """Take gradients at the anchors, whose losses (a, t) were run."""
    model = runs.model
    rows = [
        model.tokenizer(example.shown(), add_special_tokens=False).input_ids
        for example in runs.demonstrations
    ]
    slots = padded(rows, model.pad)[0]  # (n, tokens)
    table = model.model.get_input_embeddings().weight.detach()[slots].cpu()  # (n, tokens, width)
    swaps = []
    for anchor in anchors:
        slopes = gradients(model, slots[anchor], runs.queries)  # (t, k, tokens, width)
        moves = table[None] - table[anchor][:, None]  # (k, n, tokens, width)
        swaps.append(torch.einsum("tklw,knlw->knt", slopes, moves).double())
    start = Estimate(anchors, log_odds(losses), torch.stack(swaps), 1.0, 1)
    if len(anchors) == 1:
        return start

    def error(choice: tuple[float, int]) -> float:
        odds = _estimated(start, anchors, *choice, leave_out=True)
        return float((softplus(-odds) - losses).square().mean())

    share, nearest = min(product(SHARES, NEAREST), key=error)
    return replace(start, share=share, nearest=nearest)


def gradients(model: LanguageModel, slots: Tensor, queries: Sequence[Example]) -> Tensor:
    """(t, k, tokens, width): how log-odds of queries change with demonstrations' embeddings.

    ``slots`` (k, tokens) are the demonstrations' tokens. They follow the special tokens that open a
    text, and the query follows them, in tokens of its own.
    """
    device, embedding = model.model.device, model.model.get_input_embeddings()
    found = []
    for start in range(0, len(queries), model.batch_size):
        prompts = [model.prompt("", x) for x in queries[start : start + model.batch_size]]
        opening = prompts[0].opening
        rows = [prompt.ids[opening:] for prompt in prompts]
        tails, mask = padded(rows, model.pad, device)
        start_ids = slots.new_tensor(prompts[0].ids[:opening])
        before = embedding(torch.cat([start_ids, slots.flatten()]).to(device)).detach()
        before = before.expand(len(rows), -1, -1).clone().requires_grad_()
        mask = torch.cat([mask.new_ones(before.shape[:2]), mask], dim=1)
        inputs = torch.cat([before, embedding(tails).detach()], dim=1)
        logits = model.model(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits
        ends = before.shape[1] - 1 + torch.tensor([len(row) for row in rows])
        total = inputs.new_zeros(())
        for row, (end, prompt) in enumerate(zip(ends, prompts, strict=True)):
            logs = logits[row, end, prompt.first].float().log_softmax(0)
            right = prompt.right
            others = torch.cat([logs[:right], logs[right + 1 :]])
            total = total + logs[right] - others.logsumexp(0)
        (slope,) = torch.autograd.grad(total, before)
        found.append(slope[:, opening:].unflatten(1, slots.shape).float().cpu())
    return torch.cat(found)


def _estimated(
    estimate: Estimate, prompts: Tensor, share: float, nearest: int, *, leave_out: bool = False
) -> Tensor:
    """(m, t) log-odds, each the mean over the nearest anchors; ``leave_out`` skips its own."""
    alike = (prompts[:, None] == estimate.anchors[None]).sum(2).double()  # (m, a)
    if leave_out:
        alike.fill_diagonal_(-1.0)
    order = alike.argsort(dim=1, descending=True, stable=True)
    chosen = order[:, : min(nearest, len(estimate.anchors) - leave_out)]  # (m, c)
    places = torch.arange(prompts.shape[1])
    total = torch.zeros(len(prompts), estimate.log_odds.shape[1], dtype=torch.float64)
    for column in chosen.T:
        moved = estimate.swaps[column[:, None], places, prompts]  # (m, k, t)
        total += estimate.log_odds[column] + share * moved.sum(1)
    return total / chosen.shape[1]


# -- the command --------------------------------------------------------------------------------


@one_thread()
def estimate_losses(run: Run) -> None:
    """Prompts estimated from the gradients of a few, against prompts that were really run."""
    methods, n = run.settings.methods, run.settings.data.num_demonstrations
    runs = runs_of(run, 0).whole(run.experiment.prompts(0))
    prompts = torch.tensor(run.experiment.prompts(0))
    losses, few = runs.losses(prompts.tolist()), methods.num_anchors
    start = perf_counter()
    made = estimate(runs, prompts[:few], losses[:few])
    gradients = perf_counter() - start
    seed = run.settings.prompts.seed + 500
    many = torch.tensor(draw_prompts(n, prompts.shape[1], methods.num_estimated, seed))
    start = perf_counter()
    estimated = made.losses(many)
    facts: dict[str, Any] = {
        "anchors": few,
        "share": made.share,
        "nearest": made.nearest,
        "seconds of gradients": gradients,
        "prompts estimated": len(many),
        "seconds of estimates": perf_counter() - start,
    }
    true, others = losses[few:], prompts[few:]
    fit = RECIPES["kernel surrogate"].fit
    answers = {
        "embedding gradients": made.losses(others),
        "surrogate of estimated prompts": fit(many, estimated, n)(others),
        "surrogate of the anchors alone": fit(prompts[:few], losses[:few], n)(others),
        "surrogate of both together": together(made, losses[:few], many, estimated, n)(others),
        "mean of the anchors": losses[:few].mean(0).expand_as(true),
    }
    for name, values in answers.items():
        facts[name] = errors_of(true, values)
        line = ", ".join(f"{key} {value:.3f}" for key, value in facts[name].items())
        print(f"{name}: {line}", flush=True)
    write_json(run.output / "estimate.json", facts)


def together(
    made: Estimate, losses: Tensor, prompts: Tensor, estimated: Tensor, num_demonstrations: int
) -> Predict:
    """A surrogate of the anchors' losses (a, t) with those of estimated ``prompts`` beside them.

    An anchor's own estimate is that from the others: from itself it would be its true loss.
    """
    recipe = RECIPES["kernel surrogate"]
    cheap = torch.cat([prompts, made.anchors]), torch.cat([estimated, made.losses_left_out()])
    masks = recipe.features(cheap[0], num_demonstrations)
    estimates = fit_surrogate(masks, log_odds(cheap[1]), kernel=recipe.kernel)
    return recipe.fit(made.anchors, losses, num_demonstrations, estimates=estimates)


def errors_of(true: Tensor, values: Tensor) -> dict[str, float]:
    """Relative errors (m, t), and what is left of them in the mean loss."""
    means = true.mean(1), values.mean(1)
    return {
        "relative error squared": float(relative_error(true, values, definition="squared").mean()),
        "relative error": float(relative_error(true, values, definition="absolute").mean()),
        "relative error squared of the mean loss": float(relative_error(*means)),
        "spearman of the mean loss": float(lds(*means, constant="zero")[0]),
    }
