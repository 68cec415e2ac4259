"""``python -m experiments.rl COMMAND``: which tasks help a policy with which."""

from experiments.rl.experiment import PROGRAM
from experiments.runner import main

raise SystemExit(main(PROGRAM))
