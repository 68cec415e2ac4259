#!/usr/bin/env bash
# XGBoost 3.2.0, LightGBM 4.7.0, scikit-learn 1.9.1: gradient boosting of scores in a smaller unit.
#
# Guess before running: squared error has no unit of its own, so that scores a million times smaller
# give predictions a million times smaller, up to rounding in single precision.
#
# Seen: LightGBM and scikit-learn's HistGradientBoostingRegressor do so. XGBoost explains all but a
# millionth of the variance of scores of deviation 1, all but several per cent where it is 0.001,
# and nothing where it is 0.000001: it predicts the mean, without a warning. A split is made only
# if it gains more than a fixed 1e-6, in squared units of the scores.
#
# Why it matters here: differences of losses between subsets are often that small, and estimators of
# Shapley values that fit an XGBoost proxy to raw scores inherit it. Surrogates of ksm_ext are
# fitted in units of the scores' own deviation; `benchmarks/peers.py` gives them to peers so too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q scipy==1.17.1 scikit-learn==1.9.1 lightgbm==4.7.0
"$folder/venv/bin/pip" install -q --no-deps xgboost==3.2.0 # it needs no more, without a GPU
"$folder/venv/bin/python" - <<'PYTHON'
import numpy as np
from lightgbm import LGBMRegressor
from sklearn.ensemble import HistGradientBoostingRegressor
from xgboost import XGBRegressor

rng = np.random.default_rng(0)
masks = rng.random((60, 6)) < 0.5
scores = masks @ rng.normal(size=6)
models = {
    "XGBoost": XGBRegressor(n_estimators=100),
    "LightGBM": LGBMRegressor(min_child_samples=5, verbose=-1),
    "HistGradientBoosting": HistGradientBoostingRegressor(min_samples_leaf=5),
}
left = {}
for name, model in models.items():
    for unit in (1.0, 1e-3, 1e-6):
        fitted = model.fit(masks.astype(float), unit * scores).predict(masks.astype(float))
        left[name, unit] = np.mean((fitted / unit - scores) ** 2) / scores.var()
        print(f"{name}, scores of deviation {unit * scores.std():.1e}: {left[name, unit]:.2e} left")

assert left["XGBoost", 1.0] < 1e-5
assert left["XGBoost", 1e-3] > 0.01
assert left["XGBoost", 1e-6] > 0.99
for name in ("LightGBM", "HistGradientBoosting"):
    assert abs(left[name, 1e-6] / left[name, 1.0] - 1) < 0.01
PYTHON
echo "as found"
