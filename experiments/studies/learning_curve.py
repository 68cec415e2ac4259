"""How many true scores a surrogate needs, with and without estimates beside them.

    python -m experiments.studies.learning_curve [--output DIR] [--only digits,addition,cifar]

Scores of a pool of subsets by retraining, one seed each; of these, 10 to 160 at random are fitted,
and the others predicted. Three ways: a surrogate of the true scores alone; estimated scores of many
subsets, corrected by the affine function that fits the true scores best; and both together
(`fit_surrogate(masks, scores, estimates=...)`). Retraining is resumable (``--output``).
"""

import argparse
from dataclasses import replace
from pathlib import Path

import joblib
from torch import Tensor

from experiments.cifar.experiment import Cifar
from experiments.cifar.settings import SMALL
from experiments.experiment import Run
from experiments.studies.score_estimates import NUM_TASKS, PROBLEMS, retrain
from experiments.truth import retrained
from ksm_ext.subsets import bernoulli

POOL = 280


def cifar_run(output: Path, images: str) -> Run:
    settings = replace(SMALL, data=replace(SMALL.data, path=images))
    folder = output / "cifar"
    folder.mkdir(parents=True, exist_ok=True)
    return Run(Cifar(settings), folder)


def pool(name: str, output: Path, images: str) -> tuple[Tensor, Tensor]:
    """(m, n) subsets and their true scores (m,): mean loss on held-out samples."""
    if name in PROBLEMS:
        masks = bernoulli(NUM_TASKS, POOL, PROBLEMS[name]().probability, seed=1)
        return masks, retrain(name, masks, output / f"{name}.sqlite", (0,)).mean[:, 0]
    run = cifar_run(output, images)
    masks = bernoulli(run.experiment.num_tasks, POOL, 0.8, seed=1)
    return masks, retrained(run, masks, 1)[0, :, SMALL.truth.checkpoint].mean(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/learning_curve"))
    parser.add_argument("--only", default="digits,addition,cifar")
    parser.add_argument("--cifar", default="runs/data", metavar="PATH", help="where its images are")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.only.split(","):
        with joblib.parallel_config("loky", n_jobs=-1, inner_max_num_threads=1):
            masks, scores = pool(name, options.output, options.cifar)
        print(name, masks.shape, scores.mean(), scores.std(), flush=True)


if __name__ == "__main__":
    main()
