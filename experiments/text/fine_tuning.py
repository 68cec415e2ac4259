"""The same question for low-rank fine-tuning: which domain helps which, once all are known?

From a network trained on all domains, each linear layer's weight W (out, in) is trained as
W + alpha / r U V with U (out, r), zero at the start, and V (r, in): LoRA, *Hu et al. 2022,
arXiv:2106.09685*. Nothing else changes. Subsets are the mixtures that they are from scratch.

An effect is what a domain changes in bits per byte, below 0 if it helps: left out, the loss of all
less that of all but it; added, the loss after fine-tuning on it alone, its base share of the others
apart, less the network's before.

Shapes: effects (n, n), a row for each domain that helps; runs of them (num_seeds, n, n).
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

from experiments import comparison, table
from experiments.common import markdown, one_thread, write_json, write_text
from experiments.experiment import Run
from experiments.folds import split
from experiments.methods import RETRAINED, Problem
from experiments.settings import Training, as_dict
from experiments.text.families import family_test, nearest, of_different_domains, over_pairs
from experiments.text.settings import TextSettings
from experiments.truth import left_out, models, subsets
from ksm_ext import retrain_scores
from ksm_ext.identity import fingerprint

if TYPE_CHECKING:
    from experiments.text.experiment import Text

LEFT_OUT, ADDED, SURROGATE, SCRATCH = "left out", "added", "kernel surrogate", "from scratch"


# -- the adapters ---------------------------------------------------------------------------------


class LowRank(nn.Module):
    """A weight and its change of low rank, which is nothing at the start."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        drawn = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.down, self.up = nn.Parameter(drawn), nn.Parameter(torch.zeros(rows, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.scale * self.up @ self.down


def adapted(network: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> nn.Module:
    """A copy of a network on the CPU, of which nothing but adapters is trained."""
    network = deepcopy(network).requires_grad_(False)
    for layer in [part for part in network.modules() if isinstance(part, nn.Linear)]:
        change = LowRank(layer.weight, rank, alpha, generator)
        register_parametrization(layer, "weight", change)
    return network


# -- the truth ------------------------------------------------------------------------------------


def training_of(settings: TextSettings) -> Training:
    """How adapters are trained."""
    own = settings.fine_tuning
    return replace(
        settings.training,
        learning_rate=own.learning_rate,
        weight_decay=0.0,
        num_steps=own.num_steps,
        num_warmup=own.num_steps // 10,
        checkpoints=(1.0,),
        perturbation="none",
    )


def bases(run: Run) -> list[nn.Module]:
    """The networks trained on all domains, which seeds take in turn."""
    return [path[run.settings.truth.checkpoint].cpu() for path in models(run)]


def fine_tuned(experiment: "Text", network: nn.Module, mask: Tensor, seed: int) -> nn.Module:
    """The network with adapters trained on the domains of ``mask`` (n,)."""
    own, generator = experiment.settings.fine_tuning, torch.Generator().manual_seed(seed)
    network = adapted(network, own.rank, own.alpha, generator)
    training, shares = training_of(experiment.settings), experiment.shares(mask)
    (network,) = experiment.train_from(network, shares, training, generator)
    return network


def scores_of(run: Run, masks: Tensor, num_seeds: int) -> Tensor:
    """Scores (num_seeds, m, t), from the store or by fine-tuning on what it lacks."""
    networks, own = bases(run), run.settings.fine_tuning
    parts = run.experiment.depends_on("main") | {"training": training_of(run.settings)}
    scores = retrain_scores(
        partial(_score, run.experiment, networks),
        masks,
        seeds=range(num_seeds),
        store=run.output / "scores-fine-tuned.sqlite",
        settings={name: as_dict(part) for name, part in parts.items()}
        | {"rank": own.rank, "alpha": own.alpha}
        | {"networks": [fingerprint(network.state_dict().items()) for network in networks]},
        on_change=run.on_change,
    )
    return scores.values


def _score(experiment: "Text", networks: list[nn.Module], mask: Tensor, seed: int) -> Tensor:
    return experiment.score(fine_tuned(experiment, networks[seed % len(networks)], mask, seed))


# -- the command ----------------------------------------------------------------------------------


def fine_tune(run: Run) -> None:
    """Fine-tune on subsets, without each domain and on each alone; and compare the effects."""
    own, names = run.settings.fine_tuning, run.experiment.data().task_names
    n, masks = len(names), subsets(run.experiment)[: own.num_subsets]
    alone = torch.eye(n, dtype=torch.bool)
    single = scores_of(run, torch.cat([alone, left_out(run.experiment)]), own.loo_seeds)
    scores, full = scores_of(run, masks, own.subset_seeds), single[:, -1:]
    with one_thread():
        start = torch.stack([run.experiment.score(network) for network in bases(run)])
    start = start[torch.arange(own.loo_seeds) % len(start)]  # (num_seeds, t)
    known = scores.mean(0), full.mean((0, 1)), masks[:0], scores[0, :0]
    problem = Problem(run.experiment, [], masks, *known)
    _, answer, seconds = comparison.timed(SURROGATE, RETRAINED[SURROGATE], problem)
    runs = {
        LEFT_OUT: full - single[:, n:-1],
        ADDED: single[:, :n] - start[:, None],
        SURROGATE: answer.attributions[None],
        SCRATCH: comparison.results_of(run).loo,
    }
    bits = {
        "before": start.mean(0),
        "on all": full.mean((0, 1)),
        "on it alone": single[:, :n].mean(0).diag(),
        "without it": single[:, n:-1].mean(0).diag(),
    }
    folds, count = split(len(masks), run.settings.truth.num_folds), len(masks) * own.subset_seeds
    results = table.Results(runs[LEFT_OUT], scores, folds)
    judged = table.judge(
        SURROGATE, results, answer.attributions, answer.predictions, count, seconds
    )
    write_down(run.output, names, runs, bits, judged)


def agreement(effects: Tensor, others: Tensor) -> dict[str, float | None]:
    """Correlations of two tables of effects (n, n)."""
    own = torch.eye(len(effects), dtype=torch.bool)
    return {
        "all pairs": over_pairs(effects, others, torch.ones_like(own)),
        "a domain on itself": over_pairs(effects, others, own),
        "different domains": over_pairs(effects, others, ~own),
    }


def sizes(runs: Tensor) -> dict[str, float | None]:
    """How large effects (num_seeds, n, n) are, and how much of those of others is noise."""
    effects, others = runs.mean(0), ~torch.eye(runs.shape[1], dtype=torch.bool)
    found: dict[str, float | None] = {
        "on itself, mean": float(effects.diag().mean()),
        "on others, mean size": float(effects[others].abs().mean()),
    }
    if len(runs) > 1:
        known = [of_different_domains(*pair) for pair in combinations(runs, 2)]
        found["on others, noise of a seed"] = float(runs[:, others].var(0).mean().sqrt())
        found["a seed with another"] = sum(x or 0.0 for x in known) / len(known)
    return found


def write_down(
    output: Path,
    names: Sequence[str],
    runs: Mapping[str, Tensor],
    bits: Mapping[str, Tensor],
    judged: table.Row,
) -> None:
    """All of it: ``fine_tune.json``; and in tables, on the terminal too, ``fine_tune.md``."""
    means = {name: effects.mean(0) for name, effects in runs.items()}
    families = {name: family_test(effects, names) or {} for name, effects in means.items()}
    agreements = {f"{a}; {b}": agreement(means[a], means[b]) for a, b in combinations(means, 2)}
    facts = {
        "domains": names,
        "bits per byte": {name: column.tolist() for name, column in bits.items()},
        "effects": {name: effects.tolist() for name, effects in means.items()},
        "sizes": {name: sizes(effects) | families[name] for name, effects in runs.items()},
        "agreement": agreements,
        "nearest": {name: nearest(effects, names) for name, effects in means.items()},
        "surrogate": judged.metrics,
    }
    domains = {}
    for number, name in enumerate(names):
        effects = means[LEFT_OUT][:, number].tolist()
        others = sorted((x, names[i]) for i, x in enumerate(effects) if i != number)
        best, worst = (f"{other} {x:+.4f}" for x, other in (others[0], others[-1]))
        values = {title: float(column[number]) for title, column in bits.items()}
        domains[name] = values | {"helped most by": best, "harmed most by": worst}
    texts = (
        tabulated("held-out text of", domains),
        tabulated("effects", facts["sizes"]),
        tabulated("correlation of", agreements),
        table.as_text([judged], "fine-tunings"),
    )
    write_json(output / "fine_tune.json", facts)
    write_text(output / "fine_tune.md", "\n\n".join(texts) + "\n")


def tabulated(title: str, rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Rows by name, with cells by their titles."""
    titles = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = [
        [name, *(f"{x:.4f}" if isinstance(x, float) else x or "" for x in map(row.get, titles))]
        for name, row in rows.items()
    ]
    return markdown([title, *titles], cells)
