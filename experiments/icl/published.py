"""How well the published coin_flip scores are predicted, under the published protocol.

80 prompts to fit and 120 held out, random permutations, targets that vary among the held-out
prompts: Spearman correlation over these, averaged over targets; and of the mean loss over all
queries.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from experiments.common import markdown, one_thread, write_json, write_text
from experiments.experiment import Run
from experiments.icl.settings import Published
from experiments.icl.surrogates import RECIPES, Recipe
from ksm_ext.evaluation import lds, residual_error
from ksm_ext.tables.scores import read_index_lists, read_scores


def read_published(folder: Path) -> tuple[Tensor, Tensor]:
    """Prompts (200, 4) and losses (200, 869)."""
    prompts = folder / "coin_flip_train_ids_list.json"
    table = read_scores(folder / "coin_flip_subset_scores_loss.json", prompts)
    return torch.tensor(read_index_lists(prompts)), table.scores


def judge_published(
    settings: Published, names: Sequence[str] = tuple(RECIPES)
) -> dict[str, dict[str, list[float]]]:
    """For each recipe, by permutation: both correlations and the pooled error."""
    prompts, losses = read_published(Path(settings.path))
    n = int(prompts.max()) + 1

    def judged(recipe: Recipe, seed: int) -> dict[str, float]:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(prompts)))
        fit, held = order[: settings.num_fit], order[settings.num_fit :]
        true, predicted = losses[held], recipe.fit(prompts[fit], losses[fit], n)(prompts[held])
        kept = true.var(0) >= settings.min_variance
        pair = true[:, kept], predicted[:, kept]
        ranks, error = lds(*pair, constant="zero").mean(), residual_error(*pair, pooled=True)
        mean = spearmanr(true.mean(1), predicted.mean(1)).statistic
        return {"spearman": float(ranks), "of the mean loss": float(mean), "error": float(error)}

    found = {}
    for name in names:
        facts = [judged(RECIPES[name], seed) for seed in range(settings.num_permutations)]
        found[name] = {key: [fact[key] for fact in facts] for key in facts[0]}
    return found


def as_text(found: dict[str, dict[str, list[float]]]) -> str:
    """The table as text, mean and standard deviation over permutations."""
    titles = ("mean Spearman over targets", "Spearman of the mean loss", "pooled error")

    def spelled(x: list[float]) -> str:
        return f"{np.mean(x):.3f} ± {np.std(x, ddof=min(1, len(x) - 1)):.3f}"

    rows = [[name, *map(spelled, values.values())] for name, values in found.items()]
    return markdown(("surrogate", *titles), rows) + "\n"


@one_thread()
def published(run: Run) -> None:
    if not run.settings.published.path:
        print("Skipped: `--set published.path=DIR` names the folder of the published scores.")
        return
    found = judge_published(run.settings.published)
    write_json(run.output / "published.json", found)
    write_text(run.output / "published.md", as_text(found))
