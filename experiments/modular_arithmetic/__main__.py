"""``python -m experiments.modular_arithmetic COMMAND``: every method against the truth."""

from experiments.modular_arithmetic.experiment import PROGRAM
from experiments.runner import main

raise SystemExit(main(PROGRAM))
