"""What options of fits and readouts may be, once for signatures, checks and the command line.

Nothing is imported here that takes time, so that ``ksm --help`` takes none.
"""

from typing import Literal

Readout = Literal["loo", "shapley", "banzhaf"]
PairReadout = Literal[Readout, "taylor", "faithful"]
Criterion = Literal["error", "rank", "attribution"]
Warp = Literal["identity", "log", "logit", "normal", "auto"]
Missing = Literal["error", "drop"]
ShareRidge = Literal["auto"] | bool
