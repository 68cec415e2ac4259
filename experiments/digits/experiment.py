"""Find the groups of digits whose labels were shuffled.

Train on subsets of the groups, fit a surrogate to the test losses, read off Banzhaf values with
their intervals: a group whose interval lies entirely above zero raises the test loss, and is named.

Shapes: masks (n,) bool; t = 2 targets, the test loss and the test accuracy of a network trained on
the groups of a subset.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from experiments.common import one_thread, saved_figure
from experiments.digits.data import Groups, grouped
from experiments.digits.model import train
from experiments.digits.settings import PRESETS, DigitsSettings
from experiments.experiment import Command, Experiment, Run
from experiments.runner import Program
from experiments.settings import as_dict
from ksm_ext import RetrainedScores, Surrogate, fit_surrogate, retrain_scores
from ksm_ext.evaluation import mislabel_auc
from ksm_ext.report.page import write_report
from ksm_ext.subsets import paired
from ksm_ext.surrogates.calibration import quantile

TARGETS = ("test loss", "test accuracy")
KERNELS = ("linear", "anova2", "rbf", "exponential")  # "auto" without lasso, see README


class Digits(Experiment):
    """Which groups carry wrong labels."""

    settings: DigitsSettings

    def data(self) -> Groups:
        return grouped(self.settings.data, self.settings.seed)

    def subsets(self) -> Tensor:
        """(m, n) bool: random halves of the groups and their complements; README.md says why."""
        settings = self.settings
        n = settings.data.num_tasks
        return paired(n, settings.num_subsets, probability=0.5, seed=settings.seed)

    def score(self, mask: Tensor, repeat: int) -> tuple[float, float]:
        """Train on the groups of ``mask``, and test.

        Args:
            mask: (n,) bool. Which groups to train on.
            repeat: Number of the training; the result is a function of settings and these two
                alone, whichever process computes it, and in whichever order.

        Returns:
            The targets of :data:`TARGETS`.
        """
        settings, data = self.settings, self.data()
        subset = int("".join("1" if bit else "0" for bit in mask.tolist()), 2)
        entropy = np.random.SeedSequence([settings.seed, 1, repeat, subset])
        seed = int(entropy.generate_state(1, np.uint64)[0] >> 1)
        generator = torch.Generator().manual_seed(seed)
        images, labels = data.images[mask].flatten(0, 1), data.labels[mask].flatten()
        model = train(images, labels, settings.model, generator)
        with torch.no_grad():
            logits = model(data.test_images)
        accuracy = (logits.argmax(1) == data.test_labels).double().mean()
        return float(cross_entropy(logits, data.test_labels)), float(accuracy)


@dataclass(frozen=True, eq=False)
class Findings:
    """What the scores of the subsets tell.

    Attributes:
        scores: The scores.
        surrogate: Fitted to the mean scores of the subsets; target 0 is the test loss.
        attributions: (n, t) Banzhaf values.
        std: (n, t) their posterior standard deviations.
        found: Groups that were named, the most harmful first.
    """

    scores: RetrainedScores
    surrogate: Surrogate
    attributions: Tensor
    std: Tensor
    found: tuple[int, ...]


# -- the commands -------------------------------------------------------------------------------


def retrained(run: Run, masks: Tensor) -> RetrainedScores:
    """Scores of subsets, from the store or by training what it lacks.

    Raises:
        ValueError: If the store holds the scores of other settings.
        OSError: If it cannot be written.
    """
    return retrain_scores(
        run.experiment.score,
        masks,
        seeds=range(run.settings.num_repeats),
        store=run.output / "scores.sqlite",
        settings=as_dict(run.settings),
        target_names=TARGETS,
        on_change=run.on_change,
    )


def train_subsets(run: Run) -> None:
    settings, data = run.settings, run.settings.data
    print(
        f"Digits: {data.num_tasks} groups of {data.group_size} images, "
        f"{data.num_bad} of them with shuffled labels (seed {settings.seed}).\n"
        f"Which? Train on {settings.num_subsets} subsets of the groups, "
        f"{settings.num_repeats} times each."
    )
    retrained(run, run.experiment.subsets())


@lru_cache(maxsize=1)  # of the run in hand
def findings(run: Run) -> Findings:
    """Fit, attribute, and name the bad groups."""
    masks = run.experiment.subsets()
    scores = retrained(run, masks)
    names = [f"task {task:02d}" for task in range(masks.shape[1])]
    options = {"kernel": KERNELS, "task_names": names, "target_names": TARGETS}
    with one_thread():
        surrogate = fit_surrogate(masks, scores.mean, **options)
        values, std = surrogate.attribute("banzhaf", return_std=True)  # (n, t)
    return Findings(scores, surrogate, values, std, name_bad(values[:, 0], std[:, 0]))


def name_bad(values: Tensor, std: Tensor) -> tuple[int, ...]:
    """Tasks that raise the loss: their 95 % interval lies above zero. The worst first."""
    harmful = (values - quantile(0.95) * std > 0).nonzero()[:, 0].tolist()
    return tuple(sorted(harmful, key=lambda task: -float(values[task])))


def attribute(run: Run) -> None:
    """The table, the surrogate, the figure and the page."""
    told = findings(run)
    print_table(told)
    with one_thread():
        told.surrogate.save(run.output / "surrogate.safetensors")
        draw(told, run)
        title, page = "Digits: which groups have wrong labels?", run.output / "report.html"
        write_report(told.surrogate, page, readout="banzhaf", title=title)
    print(f"\nThe page to look at: {page}")


def check(run: Run) -> Tensor:
    """Mean scores (2, t) of really training on all groups, and without the found ones."""
    told, planted = findings(run), run.experiment.data().bad
    names = told.surrogate.task_names
    masks = torch.ones(2, len(names), dtype=torch.bool)
    masks[1, list(told.found)] = False
    before, after = scores = retrained(run, masks).mean

    def listed(tasks: Sequence[int]) -> str:
        return ", ".join(names[task] for task in sorted(tasks)) or "none"

    correct = "correct" if set(told.found) == set(planted) else "NOT the same"
    flags = [task in planted for task in range(len(names))]
    auc = float(mislabel_auc(told.attributions, flags)[0])
    print(f"Found    {listed(told.found)}\nPlanted  {listed(planted)}   ({correct})")
    print(f"A shuffled group ranks above a clean one with probability {auc:.2f}.")
    if told.found:
        print(
            f"Leaving out the found: "
            f"test accuracy {float(before[1]):.1%} -> {float(after[1]):.1%}, "
            f"test loss {float(before[0]):.3f} -> {float(after[0]):.3f}."
        )
    return scores


# -- what is shown ------------------------------------------------------------------------------


def print_table(told: Findings) -> None:
    """Quality of the fit, then one line per task, the most harmful first."""
    values, std, scores = told.attributions, told.std, told.scores
    share = scores.noise_std**2 / len(scores.seeds) / scores.mean.var(0)
    print(told.surrogate)
    print(f"\n{'':14}{'leave-one-out error':>22}{'of which noise':>18}")
    for j, name in enumerate(TARGETS):
        print(f"{name:14}{float(told.surrogate.loo_error[j]):>20.1%}{float(share[j]):>18.1%}")
    print("\nBanzhaf values with 95 % intervals; a positive test loss is harm.\n")
    print(f"{'':9}{'test loss':>9}{'':22}{'test accuracy [%]':>22}")
    for task in values[:, 0].argsort(descending=True).tolist():
        loss, accuracy = values[task].tolist()
        widths = (quantile(0.95) * std[task]).tolist()
        flag = "  <- harmful" if task in told.found else ""
        print(
            f"{told.surrogate.task_names[task]:9}{loss:>+9.3f} ± {widths[0]:.3f}  "
            f"{_bar(loss, float(values[:, 0].abs().max()))}"
            f"{100 * accuracy:>+9.2f} ± {100 * widths[1]:.2f}{flag}"
        )


def _bar(value: float, largest: float, half: int = 9) -> str:
    """A bar to the right of the middle for harm, to the left for help."""
    length = round(half * abs(value) / largest) if largest else 0
    left, right = ("", "█" * length) if value > 0 else ("█" * length, "")
    return f"{left:>{half}}│{right:<{half}}"


def draw(told: Findings, run: Run) -> None:
    """Bars of both targets, the found tasks in full colour."""
    from ksm_ext.plotting import attribution_bars

    values, std, names = told.attributions, told.std, told.surrogate.task_names
    titles = ("test loss (right: harm)", "test accuracy [%] (left: harm)")
    with saved_figure(run.output / "attributions.png", 9.6, 1.5 + 0.24 * len(values)) as figure:
        for j, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
            unit = 1 if j == 0 else 100
            scaled = unit * values[:, j], unit * std[:, j]
            attribution_bars(*scaled, names, highlight=told.found, ax=axes)
            axes.set_xlabel(f"Banzhaf value, {title}")
        figure.suptitle("Groups of digits; in full colour those found harmful", fontsize=11)


COMMANDS: dict[str, Command] = {
    "train-subsets": train_subsets,
    "attribute": attribute,
    "check": check,
}
PROGRAM = Program(
    "digits",
    "Find the groups of digits whose labels were shuffled.",
    Digits,
    PRESETS,
    COMMANDS,
    {"seed": "seed"},
    uses_gpu=False,
)
