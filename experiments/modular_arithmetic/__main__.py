"""``python -m experiments.modular_arithmetic COMMAND``: every method against the truth.

Each command leaves its results in ``--output`` and does nothing twice; ``run`` is all of them in
this order. A command that is killed goes on where it was.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import joblib
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from experiments.common import environment, one_thread, write_json
from experiments.modular_arithmetic import curvature, figures, table
from experiments.modular_arithmetic.methods import METHODS, Answer, Problem
from experiments.modular_arithmetic.settings import PRESETS, Settings, as_dict, load_settings
from experiments.modular_arithmetic.truth import left_out, load, models, retrained, split, subsets
from ksm_ext.files import write_whole

PACKAGES = ("ksm_ext", "torch", "numpy", "scipy", "joblib")
SHOWN = (
    "kernel surrogate",
    "kernel surrogate, estimated",
    "influence, CG on GGN",
    "TRAK",
    "TracIn",
)


@dataclass(frozen=True)
class Run:
    """Settings and the folder of their results."""

    settings: Settings
    output: Path


# -- the truth ----------------------------------------------------------------------------------


def train_all(run: Run) -> None:
    """Train on all tasks, in each way of training."""
    for variant in ("main", *run.settings.variants):
        models(run.settings, run.output, variant)


def train_subsets(run: Run) -> None:
    """Train on each subset: several times in the main way, once in the others."""
    masks = subsets(run.settings)
    retrained(run.settings, run.output, masks, run.settings.truth.subset_seeds)
    for variant in run.settings.variants:
        retrained(run.settings, run.output, masks, 1, variant)


def leave_one_out(run: Run) -> None:
    """Train without each task, and on all of them."""
    retrained(run.settings, run.output, left_out(run.settings), run.settings.truth.loo_seeds)


# -- the methods --------------------------------------------------------------------------------


def problem_of(run: Run) -> Problem:
    """What the methods look at; trains what is missing."""
    settings, checkpoint = run.settings, run.settings.truth.checkpoint
    masks = subsets(settings)
    runs = retrained(settings, run.output, masks, settings.truth.subset_seeds)
    everything = torch.ones(1, masks.shape[1], dtype=torch.bool)
    full = retrained(settings, run.output, everything, settings.methods.num_models)
    return Problem(
        settings,
        load(settings),
        models(settings, run.output),
        masks,
        runs.mean(0)[:, checkpoint],
        full.mean(0)[0, checkpoint],
    )


def answer(run: Run, *names: str) -> dict[str, tuple[Answer, float]]:
    """What methods say, with their seconds: from the disk, or by running them."""
    folder = run.output / "methods"
    folder.mkdir(parents=True, exist_ok=True)
    spelled = yaml.safe_dump(as_dict(run.settings))
    found, problem = {}, None
    for name in names:
        path = folder / f"{name.replace(', ', '-').replace(' ', '_')}.safetensors"
        kept = _read(path, spelled)
        if kept is None:
            problem = problem or problem_of(run)
            start = perf_counter()
            with one_thread():
                result = METHODS[name](problem)
            seconds = perf_counter() - start
            tensors = {"attributions": result.attributions, "predictions": result.predictions}
            facts = {"settings": spelled, "seconds": str(seconds)}
            content = save({key: x.contiguous() for key, x in tensors.items()}, metadata=facts)
            write_whole(path, content)
            print(f"{name}: {seconds:.1f} s", flush=True)
            kept = result, seconds
        found[name] = kept
    return found


def _read(path: Path, settings: str) -> tuple[Answer, float] | None:
    """An answer on disk, if it is one to these settings."""
    if not path.exists():
        return None
    with safe_open(path, framework="pt") as file:
        facts = file.metadata()
        if facts["settings"] != settings:
            return None
        tensors = (file.get_tensor("attributions"), file.get_tensor("predictions"))
    return Answer(*tensors), float(facts["seconds"])


GROUPS = {
    "datamodels": ("least squares", "ridge datamodel", "lasso datamodel"),
    "influence": tuple(name for name in METHODS if name.startswith("influence")),
    "trak": ("TRAK", "TracIn", "gradient cosine"),
    "kernel-surrogate": tuple(name for name in METHODS if "surrogate" in name),
    "hessian": ("task Hessian",),
}

RETRAINED = (*GROUPS["datamodels"], "kernel surrogate", "surrogate of its own choice")


def _of(group: str) -> Callable[[Run], None]:
    def command(run: Run) -> None:
        answer(run, *GROUPS[group])

    return command


def hessian(run: Run) -> None:
    """Traces, eigenvalues and densities, and the second order in the tasks' weights."""
    if not (run.output / "curvature.json").exists():
        with one_thread():
            curvature.measure(run.settings, run.output)
    answer(run, *GROUPS["hessian"])


# -- the comparison -----------------------------------------------------------------------------


def make_figures(run: Run) -> None:
    """The table of all methods, on the terminal and as JSON and text, and the figures."""
    settings, output = run.settings, run.output
    answers = answer(run, *METHODS)
    results = results_of(run)
    rows = []
    for name, (said, seconds) in answers.items():
        needs = (
            len(results.scores[0]) * settings.truth.subset_seeds
            if name in RETRAINED
            else settings.methods.num_models
        )
        rows.append(table.judge(name, results, said.attributions, said.predictions, needs, seconds))
    effects, ranks = table.ceiling(results)
    text = table.markdown(rows) + (
        f"\n\nCeiling, half of the seeds against the other half: leave-one-out {effects:.2f}, "
        f"LDS {ranks:.2f}. Leave-one-out itself: {results.loo.shape[1] + 1} x "
        f"{len(results.loo)} trainings.\n"
    )
    print(f"\n{text}")
    write_whole(output / "table.md", text.encode())
    table.write(rows, output / "table.json")
    with one_thread():
        figures.linear_and_kernel(settings, output)
        found = {"sample complexity": figures.sample_complexity(settings, output)}
        found["over training"] = figures.over_training(settings, output)
        found["rank correlation of trace and error"] = figures.trace_and_error(
            settings, output, found["over training"]
        )
        figures.density(output)
        shown = {name: answers[name][0].attributions for name in SHOWN}
        figures.attributions_and_truth(settings, output, shown)
    write_json(output / "figures.json", found)


def results_of(run: Run) -> table.Results:
    """The truth that methods are compared with."""
    settings, checkpoint = run.settings, run.settings.truth.checkpoint
    alone = retrained(settings, run.output, left_out(settings), settings.truth.loo_seeds)
    alone = alone[:, :, checkpoint]  # (num_seeds, n + 1, t)
    masks = subsets(settings)
    scores = retrained(settings, run.output, masks, settings.truth.subset_seeds)
    loo: Tensor = alone[:, -1:] - alone[:, :-1]
    folds = split(masks, settings.truth.num_folds)
    return table.Results(loo, scores[:, :, checkpoint], folds)


def run_all(run: Run) -> None:
    """All of the above, from nothing to the table."""
    for name, command in COMMANDS.items():
        if name != "run":
            print(f"\n== {name}", flush=True)
            command(run)


COMMANDS: dict[str, Callable[[Run], None]] = {
    "train-all": train_all,
    "leave-one-out": leave_one_out,
    "train-subsets": train_subsets,
    "datamodels": _of("datamodels"),
    "influence": _of("influence"),
    "trak": _of("trak"),
    "kernel-surrogate": _of("kernel-surrogate"),
    "hessian": hessian,
    "figures": make_figures,
    "run": run_all,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status."""
    parser = ArgumentParser(
        prog="python -m experiments.modular_arithmetic",
        description=__doc__,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/modular-PRESET")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="what differs from it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="one difference"
    )
    flags = parser.parse_args(arguments)
    output = flags.output or Path("runs") / f"modular-{flags.preset}"
    start = perf_counter()
    try:
        settings = load_settings(flags.preset, flags.config, flags.set)
        output.mkdir(parents=True, exist_ok=True)
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            COMMANDS[flags.command](Run(settings, output))
        facts = {"settings": as_dict(settings), "environment": environment(*PACKAGES)}
        write_json(output / "config.json", facts)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on from {output}.", file=sys.stderr)
        return 130
    print(f"{flags.command}: {perf_counter() - start:.0f} s, results in {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
