"""``python -m experiments.cifar COMMAND``: every method against the truth, on CIFAR-10."""

from experiments.cifar.experiment import PROGRAM
from experiments.runner import main

raise SystemExit(main(PROGRAM))
