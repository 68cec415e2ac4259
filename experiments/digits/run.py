"""``python -m experiments.digits.run``: find the groups of digits whose labels were shuffled.

Train on subsets of the groups, fit a surrogate to the test losses, read off Shapley values with
their intervals: a group whose interval lies entirely above zero raises the test loss, and is named.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter

import joblib
import torch
from torch import Tensor

from experiments.common import environment, new_figure, one_thread, save_figure, write_json
from experiments.digits.pipeline import (
    PRESETS,
    TARGETS,
    Settings,
    load,
    train_and_score,
)
from ksm_ext import RetrainedScores, Surrogate, fit_surrogate, retrain_scores
from ksm_ext.evaluation import mislabel_auc
from ksm_ext.report.page import write_report
from ksm_ext.subsets import paired
from ksm_ext.surrogates.surrogate import Z95

KERNELS = ("linear", "anova2", "rbf", "exponential")  # "auto" without lasso: no interval there
PACKAGES = ("ksm_ext", "torch", "numpy", "scikit-learn", "joblib")


@dataclass(frozen=True, eq=False)
class Result:
    """What a run found.

    Attributes:
        surrogate: Fitted to the mean scores of the subsets; target 0 is the test loss.
        attributions: (n, t) Shapley values.
        std: (n, t) their posterior standard deviations.
        planted: Groups whose labels were shuffled.
        found: Groups that were named, the most harmful first.
        check: Mean scores (t,) of really training on all groups, and without the found ones.
    """

    surrogate: Surrogate
    attributions: Tensor
    std: Tensor
    planted: tuple[int, ...]
    found: tuple[int, ...]
    check: tuple[Tensor, Tensor]


def run(settings: Settings, output: Path) -> Result:
    """Score, fit, name the bad groups, and write everything to ``output``.

    Training goes through joblib, hence wherever ``joblib.parallel_config`` sends it.

    Raises:
        ValueError: If ``output`` holds the scores of other settings.
        OSError: If ``output`` cannot be written.
    """
    output.mkdir(parents=True, exist_ok=True)
    print(
        f"Digits: {settings.num_tasks} groups of {settings.group_size} images, "
        f"{settings.num_bad} of them with shuffled labels (seed {settings.seed}).\n"
        f"Which? Train on {settings.num_subsets} subsets of the groups, "
        f"{settings.num_repeats} times each.\n"
    )
    score = partial(
        retrain_scores,
        partial(train_and_score, settings),
        seeds=range(settings.num_repeats),
        store=output / "scores.sqlite",
        settings=asdict(settings),
        target_names=TARGETS,
    )
    # Half of the groups each, with the complement: see README.md, "The design".
    masks = paired(settings.num_tasks, settings.num_subsets, probability=0.5, seed=settings.seed)
    scores = score(masks)
    facts = {"settings": asdict(settings), "environment": environment(*PACKAGES)}
    write_json(output / "config.json", facts)  # the store has refused other settings by now
    with one_thread():
        names = [f"task {task:02d}" for task in range(settings.num_tasks)]
        surrogate = fit_surrogate(
            masks, scores.mean, kernel=KERNELS, task_names=names, target_names=TARGETS
        )
        values, std = surrogate.attribute("shapley", return_std=True)  # (n, t)
    found = name_bad(values[:, 0], std[:, 0])
    print_table(surrogate, scores, values, std, found)

    print("\nThe check: train on all groups, and on all but the harmful ones.")
    everything = torch.ones(settings.num_tasks, dtype=torch.bool)
    without = everything.clone()
    without[list(found)] = False
    check = score(torch.stack([everything, without])).mean  # (2, t)
    planted = load(settings).bad
    result = Result(surrogate, values, std, planted, found, (check[0], check[1]))
    print_verdict(result)
    with one_thread():
        write_results(result, output)
    return result


def name_bad(values: Tensor, std: Tensor) -> tuple[int, ...]:
    """Tasks that raise the loss: their 95 % interval lies above zero. The worst first."""
    harmful = (values - Z95 * std > 0).nonzero()[:, 0].tolist()
    return tuple(sorted(harmful, key=lambda task: -float(values[task])))


# -- on the terminal ----------------------------------------------------------------------------


def print_table(
    surrogate: Surrogate,
    scores: RetrainedScores,
    values: Tensor,
    std: Tensor,
    found: Sequence[int],
) -> None:
    """Quality of the fit, then one line per task, the most harmful first."""
    share = scores.noise_std**2 / len(scores.seeds) / scores.mean.var(0)
    print(f"\n{surrogate}")
    print(f"\n{'':14}{'leave-one-out error':>22}{'of which noise':>18}")
    for j, name in enumerate(TARGETS):
        print(f"{name:14}{float(surrogate.loo_error[j]):>20.1%}{float(share[j]):>18.1%}")
    print("\nShapley values with 95 % intervals; a positive test loss is harm.\n")
    print(f"{'':9}{'test loss':>9}{'':22}{'test accuracy [%]':>22}")
    for task in values[:, 0].argsort(descending=True).tolist():
        loss, accuracy = values[task].tolist()
        widths = (Z95 * std[task]).tolist()
        flag = "  <- harmful" if task in found else ""
        print(
            f"{surrogate.task_names[task]:9}{loss:>+9.3f} ± {widths[0]:.3f}  "
            f"{_bar(loss, float(values[:, 0].abs().max()))}"
            f"{100 * accuracy:>+9.2f} ± {100 * widths[1]:.2f}{flag}"
        )


def _bar(value: float, largest: float, half: int = 9) -> str:
    """A bar to the right of the middle for harm, to the left for help."""
    length = round(half * abs(value) / largest) if largest else 0
    left, right = ("", "█" * length) if value > 0 else ("█" * length, "")
    return f"{left:>{half}}│{right:<{half}}"


def print_verdict(result: Result) -> None:
    """Found against planted, and what leaving out the found ones is worth."""
    before, after = result.check
    names = result.surrogate.task_names

    def listed(tasks: Sequence[int]) -> str:
        return ", ".join(names[task] for task in sorted(tasks)) or "none"

    correct = "correct" if set(result.found) == set(result.planted) else "NOT the same"
    flags = [task in result.planted for task in range(len(names))]
    auc = float(mislabel_auc(result.attributions, flags)[0])
    print(f"\nFound    {listed(result.found)}\nPlanted  {listed(result.planted)}   ({correct})")
    print(f"A shuffled group ranks above a clean one with probability {auc:.2f}.")
    if result.found:
        print(
            f"Leaving out the found: "
            f"test accuracy {float(before[1]):.1%} -> {float(after[1]):.1%}, "
            f"test loss {float(before[0]):.3f} -> {float(after[0]):.3f}."
        )


# -- on disk ------------------------------------------------------------------------------------


def write_results(result: Result, output: Path) -> None:
    """The surrogate, the figure and the page."""
    result.surrogate.save(output / "surrogate.safetensors")
    draw(result, output / "attributions.png")
    write_report(
        result.surrogate,
        output / "report.html",
        readout="shapley",
        title="Digits: which groups have wrong labels?",
    )
    print(f"\nWritten to {output}:")
    for name, what in {
        "report.html": "the page to look at",
        "attributions.png": "the figure",
        "surrogate.safetensors": "for ksm_ext.load_surrogate",
        "scores.sqlite": "every score, to resume from",
        "config.json": "settings and versions",
    }.items():
        print(f"  {name:23}{what}")


def draw(result: Result, path: Path) -> None:
    """Bars of both targets, the found tasks in full colour."""
    from ksm_ext.plotting import attribution_bars

    values, std = result.attributions, result.std
    figure = new_figure(9.6, 1.5 + 0.24 * len(values))
    titles = ("test loss (right: harm)", "test accuracy [%] (left: harm)")
    for j, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
        unit = 1 if j == 0 else 100
        attribution_bars(
            unit * values[:, j],
            unit * std[:, j],
            result.surrogate.task_names,
            highlight=result.found,
            ax=axes,
        )
        axes.set_xlabel(f"Shapley value, {title}")
    figure.suptitle("Groups of digits; in full colour those found harmful", fontsize=11)
    save_figure(figure, path)


# -- the command --------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = ArgumentParser(prog="python -m experiments.digits.run", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/digits"), metavar="DIR")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=None, help="processes (default: all cores)")
    flags = parser.parse_args(arguments)
    if flags.seed < 0:
        parser.error(f"--seed must be at least 0, got {flags.seed}. Choose another.")
    jobs = flags.jobs if flags.jobs is not None else joblib.cpu_count()
    if jobs == 0:
        parser.error("--jobs must be a number of processes, got 0. Leave it out for all cores.")
    start = perf_counter()
    try:
        with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=1):
            run(replace(PRESETS[flags.preset], seed=flags.seed), flags.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. What is scored is kept: run the same command to go on.")
        return 130
    print(f"Done in {perf_counter() - start:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
