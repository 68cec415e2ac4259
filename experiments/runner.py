"""The command line that every experiment has: commands, presets, settings and a folder.

Each command leaves its results in ``--output`` and does nothing twice; ``run`` is all of them in
their order. A command that is killed goes on where it was.
"""

import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import joblib

from experiments.common import environment, write_json
from experiments.settings import as_dict, load_settings

PACKAGES = ("ksm_ext", "torch", "numpy", "scipy", "joblib")

Command = Callable[[Any, Path], None]
"""From settings and the folder of their results."""


def main(
    name: str,
    description: str,
    presets: Mapping[str, Any],
    commands: Mapping[str, Command],
    arguments: Sequence[str] | None = None,
    *,
    shortcuts: Mapping[str, str] | None = None,
) -> int:
    """Run a command of the experiment ``name``; answers the exit status.

    Each of ``shortcuts`` is a flag of its own that sets the setting it names.
    """
    parser = ArgumentParser(
        prog=f"python -m experiments.{name}",
        description=description,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=(*commands, "run"))
    parser.add_argument("--preset", choices=presets, default="small")
    parser.add_argument("--output", type=Path, metavar="DIR", help=f"default: runs/{name}-PRESET")
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="what differs from it")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="one difference"
    )
    shortcuts = shortcuts or {}
    for flag, setting in shortcuts.items():
        parser.add_argument(f"--{flag}", metavar="VALUE", help=f"short for --set {setting}=VALUE")
    flags = parser.parse_args(arguments)
    given = {setting: getattr(flags, flag) for flag, setting in shortcuts.items()}
    flags.set += [f"{setting}={value}" for setting, value in given.items() if value is not None]
    output = flags.output or Path("runs") / f"{name}-{flags.preset}"
    wanted = commands if flags.command == "run" else {flags.command: commands[flags.command]}
    start = perf_counter()
    try:
        settings = load_settings(presets[flags.preset], flags.config, flags.set)
        output.mkdir(parents=True, exist_ok=True)
        with joblib.parallel_config("loky", inner_max_num_threads=1):
            for title, command in wanted.items():
                print(f"\n== {title}", flush=True)
                command(settings, output)
        facts = {"settings": as_dict(settings), "environment": environment(*PACKAGES)}
        write_json(output / "config.json", facts)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nInterrupted. The same command goes on from {output}.", file=sys.stderr)
        return 130
    print(f"{flags.command}: {perf_counter() - start:.0f} s, results in {output}")
    return 0
