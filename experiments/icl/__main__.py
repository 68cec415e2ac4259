"""``python -m experiments.icl COMMAND``: which demonstrations help a language model."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments import runner
from experiments.icl.experiment import COMMANDS, Run
from experiments.icl.settings import PRESETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status."""

    def bound(command: Callable[[Run], Any]) -> runner.Command:
        return lambda settings, output: command(Run(settings, output))

    commands = {name: bound(command) for name, command in COMMANDS.items()}
    return runner.main("icl", __doc__, PRESETS, commands, arguments)


if __name__ == "__main__":
    sys.exit(main())
