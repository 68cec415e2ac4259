"""``python -m experiments.modular_arithmetic COMMAND``: every method against the truth."""

import sys
from collections.abc import Sequence

from experiments import comparison, runner
from experiments.modular_arithmetic.experiment import ModularArithmetic


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; answers the exit status."""
    commands = comparison.commands(ModularArithmetic)
    return runner.main(
        "modular_arithmetic", __doc__, ModularArithmetic.presets, commands, arguments
    )


if __name__ == "__main__":
    sys.exit(main())
