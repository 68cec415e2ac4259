"""``python -m experiments.text COMMAND``: which domain of text helps which, and what to mix."""

from experiments.runner import main
from experiments.text.experiment import PROGRAM

raise SystemExit(main(PROGRAM))
