"""``python -m experiments.digits COMMAND``: which groups carry wrong labels."""

from experiments.digits.experiment import PROGRAM
from experiments.runner import main

raise SystemExit(main(PROGRAM))
