"""Which mixture of domains is best: looked for in several ways, and really trained on.

The surrogate sees shares, and logarithms of losses: a bit of a domain that is hard to predict
counts no more than one of another. What is minimised is their mean over targets. All mixtures are
trained on as many bytes.

RegMix: *Liu et al. 2025, arXiv:2407.01492*, with scikit-learn's trees for LightGBM's; DoReMi: *Xie
et al. 2023, arXiv:2305.10429*, with a proxy as large as the network.

Shapes: shares (m, n), scores (num_seeds, m, t) in bits per byte.
"""

from functools import partial
from itertools import islice

import numpy as np
import torch
from scipy.stats import t as student
from sklearn.ensemble import GradientBoostingRegressor
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.common import (
    markdown,
    one_thread,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from experiments.experiment import Run
from experiments.settings import as_dict
from experiments.text.drawing import windows_of
from experiments.trained import TrainedExperiment
from experiments.training import optimizer_of
from experiments.truth import models, retrained, subsets
from ksm_ext import fit_surrogate, retrain_scores
from ksm_ext.selection import best_mixture
from ksm_ext.subsets import dirichlet

NUM_CANDIDATES, NUM_BEST = 100_000, 100  # RegMix: the mean of the best of many
WAYS = (
    "uniform",
    "natural",
    "best_mixture",
    "best_mixture, prediction alone",
    "RegMix",
    "DoReMi-like",
)
SMOOTHING = 1e-3  # DoReMi's, of the uniform mixture

# -- the truth ----------------------------------------------------------------------------------


def random_mixtures(run: Run, count: int, seed: int) -> Tensor:
    """(count, n): Dirichlet mixtures, with the base share of every domain."""
    mixtures, base = run.settings.mixtures, run.settings.data.base_share
    n = run.experiment.num_tasks
    drawn = dirichlet(n, count, strength=tuple(mixtures.strength), seed=seed)
    return (1 - base) * drawn + base / n


def trained_on(run: Run, shares: Tensor, num_seeds: int, name: str) -> Tensor:
    """Scores (num_seeds, m, t) of mixtures, from the store of this name or by training."""
    parts = run.experiment.depends_on("main").items()
    scores = retrain_scores(
        partial(_score, run.experiment, shares.tolist()),
        torch.eye(len(shares), dtype=torch.bool),  # a mixture goes by its number
        seeds=range(num_seeds),
        store=run.output / f"scores-{name}.sqlite",
        settings={key: as_dict(part) for key, part in parts}
        | {"checkpoint": run.settings.truth.checkpoint},
        on_change=run.on_change,
    )
    return scores.values


def _score(
    experiment: TrainedExperiment, mixtures: list[list[float]], mask: Tensor, seed: int
) -> Tensor:
    """Bits per byte after one training on the mixture whose number ``mask`` marks."""
    (shares,) = torch.tensor(mixtures, dtype=torch.float64)[mask]
    settings = experiment.settings
    wanted = range(len(settings.training.checkpoints))[settings.truth.checkpoint]
    networks = experiment.train_mixture("main", shares, seed)
    return experiment.score(next(islice(networks, wanted, None)))


def train_mixtures(run: Run) -> tuple[Tensor, Tensor]:
    """Train on Dirichlet mixtures: their shares and scores."""
    mixtures = run.settings.mixtures
    shares = random_mixtures(run, mixtures.num_random, run.settings.truth.seed)
    return shares, trained_on(run, shares, mixtures.random_seeds, "random")


def observed(run: Run) -> tuple[Tensor, Tensor]:
    """Shares (m, n) and mean log losses (m, t) of the subsets and of the Dirichlet mixtures."""
    truth, masks = run.settings.truth, subsets(run.experiment)
    of_subsets = retrained(run, masks, truth.subset_seeds)[:, :, truth.checkpoint]
    as_shares = torch.stack([run.experiment.shares(mask) for mask in masks])
    shares, scores = train_mixtures(run)
    tables = [x.log().mean(0) for x in (of_subsets, scores)]
    return torch.cat([as_shares, shares]), torch.cat(tables)


# -- the ways to choose ---------------------------------------------------------------------------


@one_thread()
def choose(run: Run) -> dict[str, Tensor]:
    """Mixtures (n,) by the name of the way; chosen once, and kept."""
    path, settings = run.output / "chosen.safetensors", as_dict(run.settings)
    if kept := read_tensors(path, settings):
        return {name: kept[0][name] for name in WAYS}
    shares, losses = observed(run)
    mixtures, n = run.settings.mixtures, shares.shape[1]
    natural = run.experiment.data().num_bytes
    fitted = fit_surrogate(shares, losses)
    bounds = (mixtures.low / n, mixtures.high / n)
    print(fitted)

    def best(confidence: float) -> Tensor:
        return best_mixture(fitted, maximize=False, bounds=bounds, confidence=confidence).shares

    mixed = (
        torch.full((n,), 1 / n, dtype=torch.float64),
        natural / natural.sum(),
        best(mixtures.confidence),
        best(0.5),
        regmix(run, shares, losses.mean(1)),
        doremi(run),
    )
    found = dict(zip(WAYS, mixed, strict=True))
    write_tensors(path, found, settings)
    return found


def regmix(run: Run, shares: Tensor, losses: Tensor) -> Tensor:
    """(n,): the mean of the best mixtures of many, as trees predict their losses (m,)."""
    trees = GradientBoostingRegressor(
        n_estimators=1000, learning_rate=0.01, max_depth=4, subsample=0.8, random_state=42
    )
    trees.fit(shares.numpy(), losses.numpy())
    candidates = random_mixtures(run, NUM_CANDIDATES, run.settings.truth.seed + 1)
    order = np.argsort(trees.predict(candidates.numpy()), kind="stable")
    return candidates[order[:NUM_BEST].copy()].mean(0)


def doremi(run: Run) -> Tensor:
    """(n,): mean weights of a network that is trained on where it is worse than a reference.

    The reference is the network trained on all domains alike; weights grow by the exponential of a
    domain's excess loss.
    """
    experiment, settings = run.experiment, run.settings.training
    texts, length = experiment.data().texts, run.settings.data.length
    reference, network = models(run)[0][-1].eval(), experiment.initial_model(1).train()
    device = next(reference.parameters()).device
    network, n = network.to(device), len(texts)
    uniform = torch.full((n,), 1 / n, dtype=torch.float64)
    optimizer, generator = optimizer_of(network, settings), torch.Generator().manual_seed(1)
    logits, total = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(settings.num_steps):
        drawn, domains = windows_of(texts, uniform, settings.batch_size, length, generator)
        drawn, counts = drawn.to(device), domains.bincount(minlength=n).clamp(min=1)

        def losses(net: torch.nn.Module, drawn: Tensor = drawn) -> Tensor:
            said = net(drawn[:, :-1]).transpose(1, 2)
            return cross_entropy(said, drawn[:, 1:], reduction="none").mean(1)

        ours = losses(network)  # (batch_size,)
        with torch.no_grad():
            excess = (ours - losses(reference)).clamp(min=0).double().cpu()
        logits += run.settings.mixtures.rate * torch.zeros(n).double().index_add(
            0, domains, excess / counts[domains]
        )
        weights = (1 - SMOOTHING) * logits.softmax(0) + SMOOTHING / n
        total += weights
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        optimizer.zero_grad()
        ((weights / counts)[domains].to(ours) * ours).sum().backward()
        optimizer.step()
    return total / total.sum()


# -- the comparison -------------------------------------------------------------------------------


def compare_mixtures(run: Run) -> None:
    """Train on every chosen mixture, and write what it gains on the first, the uniform one."""
    chosen, names = choose(run), run.experiment.data().task_names
    count = run.settings.mixtures.chosen_seeds
    scores = trained_on(run, torch.stack([*chosen.values()]), count, "chosen")
    rows, facts = [], {}
    for number, (name, shares) in enumerate(chosen.items()):
        pairs = scores[:, number], scores[:, 0]  # (num_seeds, t) each
        bits = difference(*(table.mean(1) for table in pairs))
        logs = difference(*(table.log().mean(1) for table in pairs))
        order = shares.argsort(descending=True).tolist()
        first, second, *_, last = (f"{names[i]} {float(shares[i]):.0%}" for i in order)
        gains = [
            f"{unit * mean:+.4f} ± {unit * half:.4f}"
            for unit, (mean, half) in ((1, bits), (100, logs))
        ]
        cells = gains if number else ["", ""]
        mean = float(scores[:, number].mean())
        rows.append([name, f"{mean:.4f}", *cells, f"{first}, {second}; {last}"])
        facts[name] = {
            "shares": dict(zip(names, shares.tolist(), strict=True)),
            "bits per byte": dict(zip(names, scores[:, number].mean(0).tolist(), strict=True)),
            "less uniform, bits per byte": bits,
            "less uniform, mean log loss": logs,
        }
    titles = ["mixture", "bits per byte", "less uniform", "mean log loss, %", "most; least"]
    note = f"{count} seeds; ± 95 % of the paired differences. Below 0: better than uniform."
    write_text(run.output / "mixtures.md", f"{markdown(titles, rows)}\n\n{note}\n")
    write_json(run.output / "mixtures.json", facts)


def difference(ours: Tensor, others: Tensor) -> tuple[float, float]:
    """Mean of paired differences of (num_seeds,), half of its 95 % interval by Student's t."""
    values = ours - others
    count = len(values)
    half = student.ppf(0.975, count - 1) * values.std() / count**0.5
    return float(values.mean()), float(half)
