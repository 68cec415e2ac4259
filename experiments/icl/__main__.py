"""``python -m experiments.icl COMMAND``: which demonstrations help a language model."""

from experiments.icl.experiment import PROGRAM
from experiments.runner import main

raise SystemExit(main(PROGRAM))
