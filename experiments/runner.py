"""The command line that every experiment has: commands, presets, settings and a folder.

Each command leaves its results in ``--output`` and does nothing twice; ``run`` is all of them in
their order. A command that is killed goes on where it was.
"""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

import joblib
import torch

from experiments.common import environment, write_json
from experiments.experiment import Command, Experiment, Run
from experiments.settings import Settings, as_dict, load_settings


@dataclass(frozen=True)
class Program:
    """What the command line knows of an experiment.

    Attributes:
        name: The folder below ``experiments/``.
        description: What ``--help`` says.
        experiment: Made of the settings.
        presets: Settings by name, ``"small"`` among them.
        commands: Commands by name, in their order.
        shortcuts: Flags, and the setting that each sets.
        uses_gpu: Whether all processes would share a GPU, if there is one.
    """

    name: str
    description: str
    experiment: type[Experiment]
    presets: Mapping[str, Settings]
    commands: Mapping[str, Command]
    shortcuts: Mapping[str, str] = field(default_factory=dict)
    uses_gpu: bool = True


def main(program: Program, arguments: Sequence[str] | None = None) -> int:
    """Run a command of an experiment; answers the exit status."""
    flags = _flags(program, arguments)
    output = flags.output or Path("runs") / f"{program.name}-{flags.preset}"
    names = program.commands if flags.command == "run" else (flags.command,)
    start = perf_counter()
    try:
        settings = load_settings(program.presets[flags.preset], flags.config, flags.set)
        output.mkdir(parents=True, exist_ok=True)
        run = Run(program.experiment(settings), output, flags.on_change)
        with joblib.parallel_config("loky", n_jobs=flags.jobs, inner_max_num_threads=1):
            for name in names:
                print(f"\n== {name}", flush=True)
                program.commands[name](run)
        facts = {"settings": as_dict(settings), "environment": environment()}
        write_json(output / "config.json", facts)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on from {output}.", file=sys.stderr)
        return 130
    print(f"{flags.command}: {perf_counter() - start:.0f} s, results in {output}")
    return 0


def _flags(program: Program, arguments: Sequence[str] | None) -> Namespace:
    """What the command line says; shortcuts are among ``set``."""
    name = program.name
    parser = ArgumentParser(f"python -m experiments.{name}", description=program.description)
    parser.add_argument("command", choices=(*program.commands, "run"))
    parser.add_argument("--preset", choices=program.presets, default="small")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: runs/{name}-PRESET")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="what differs from it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="one difference"
    )
    for flag, setting in program.shortcuts.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"short for --set {setting}=VALUE")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1 if program.uses_gpu and torch.cuda.is_available() else -1,
        help="processes at a time (default: one per core, and one in all for a GPU)",
    )
    parser.add_argument(
        "--on-change",
        choices=("raise", "keep"),
        default="raise",
        help="keep: take over scores in the folder though the code has changed since",
    )
    flags = parser.parse_args(arguments)
    if flags.jobs == 0:
        parser.error("--jobs must be a number of processes, got 0. Leave it out for all cores.")
    given = {setting: getattr(flags, flag) for flag, setting in program.shortcuts.items()}
    flags.set += [f"{setting}={value}" for setting, value in given.items() if value is not None]
    return flags
