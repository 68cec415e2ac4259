#!/usr/bin/env bash
# SciPy 1.16.3, NumPy 2.3.5: Spearman's correlation of predictions that are constant but for rounding.
#
# Guess before running: `spearmanr` treats them as `pearsonr` does, which warns that its input is
# nearly constant (NearConstantInputWarning), or answers NaN as it does for exact constants.
#
# Seen: `pearsonr` warns; `spearmanr` ranks differences of one unit in the last place and answers a
# correlation of 0.05 or more in size, without a warning. With an exact constant it warns and
# answers NaN.
#
# Why it matters here: a surrogate that predicts the mean (by lasso, say) predicts it up to rounding,
# and the linear datamodeling score of that is then noise that looks like a result. The scores of
# ksm_ext tie what differs by rounding only, and count a constant prediction as 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scipy==1.16.3 numpy==2.3.5
"$folder/venv/bin/python" - <<'PYTHON'
import warnings

import numpy as np
from scipy.stats import ConstantInputWarning, NearConstantInputWarning, pearsonr, spearmanr

rng = np.random.default_rng(0)
truth = rng.normal(size=30)
constant = np.full(30, -0.0404)
rounded = np.where(rng.random(30) < 0.5, constant, np.nextafter(constant, 0))


def ask(correlation, predicted):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        value = correlation(truth, predicted).statistic
    return value, [type(each.message) for each in caught]


for name, correlation in (("pearsonr", pearsonr), ("spearmanr", spearmanr)):
    for label, predicted in (("constant", constant), ("constant but for rounding", rounded)):
        value, caught = ask(correlation, predicted)
        print(f"{name} of a {label}: {value:.3f}, warnings {[each.__name__ for each in caught]}")

value, caught = ask(spearmanr, constant)
assert np.isnan(value) and ConstantInputWarning in caught
value, caught = ask(pearsonr, rounded)
assert NearConstantInputWarning in caught
value, caught = ask(spearmanr, rounded)
assert abs(value) > 0.05 and not caught, (value, caught)
PYTHON
echo "as found"
