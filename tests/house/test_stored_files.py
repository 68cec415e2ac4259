"""Files that version 0.1.1 wrote, at commit 7a32958, are read and answered as they were then.

But for deviations of fits whose ridge was chosen: they are what this version makes of them.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from ksm_ext import load_features, load_surrogate, retrain_scores

DATA = Path(__file__).parents[1] / "data"
SETTINGS = {"steps": 10}
SURROGATES = ("auto", "component", "cg", "lasso", "least_squares", "apart", "noise", "weights")
MASKS = torch.randn(30, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) > 0
MASKS[0], MASKS[1] = False, True


def never(mask, seed):
    raise AssertionError("every run is in the store")


def of_surrogate(path):
    surrogate = load_surrogate(path)
    query = MASKS[:5].numpy() if surrogate.masks.binary else (MASKS[:5] * 0.25).numpy()
    tables = {
        "predict": surrogate.predict(query),
        "observed": surrogate.predict(query, observed=True),
        "loo": surrogate.attribute("loo"),
        "loo_error": surrogate.loo_error,
        "loo_residuals": surrogate.loo_residuals,
    }
    tables["variance"] = surrogate.predict(query, return_std=True)[1] ** 2
    if surrogate.masks.binary:
        tables["walsh"] = surrogate.walsh_spectrum()
        tables["pairs"], std = surrogate.interactions("banzhaf", return_std=True)
        tables["pairs variance"] = std**2
        for readout in ("shapley", "banzhaf"):
            tables[readout], std = surrogate.attribute(readout, return_std=True)
            tables[f"{readout} variance"] = std**2
    facts = [str(surrogate), *surrogate.task_names, *surrogate.target_names, *surrogate.warnings]
    return {"facts": facts, **{name: listed(table) for name, table in tables.items()}}


def of_runs(path, folder):
    """From a copy: opening a store may write to it."""
    copy = shutil.copy(path, folder / "copy.sqlite")
    options = {"settings": SETTINGS, "on_change": "keep", "progress": False}
    runs = retrain_scores(never, MASKS[:6], seeds=(0, 1, 2), store=copy, **options)
    return {name: listed(getattr(runs, name)) for name in ("values", "noise_std", "ceiling")}


def of_features(path):
    return {
        str(part.relative_to(path).parent): {
            name: listed(getattr(load_features(part.parent), name))
            for name in ("values", "gradients")
        }
        for part in sorted(path.rglob("meta.json"))
    }


def listed(table):
    return torch.as_tensor(table).double().tolist()


EXPECTED = json.loads((DATA / "expected.json").read_text())


def assert_close(found, expected, tolerance=1e-12, of_variances=1e-9):
    """Up to the rounding of another processor, relative to the largest number of a table."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name in expected:
            allowed = of_variances if "variance" in name else tolerance
            assert_close(found[name], expected[name], allowed)
    elif isinstance(expected, list) and isinstance(expected[0], str):
        assert found == expected
    else:
        found, expected = (torch.tensor(x, dtype=torch.float64) for x in (found, expected))
        atol = tolerance * float(expected.nan_to_num(0.0).abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=atol, equal_nan=True)


@pytest.mark.parametrize("name", SURROGATES)
def test_a_stored_surrogate_answers_as_it_did(name):
    of_variances = 1e-6 if name == "cg" else 1e-9  # solved anew, by iterations
    found = of_surrogate(DATA / f"{name}.safetensors")
    assert_close(found, EXPECTED[name], of_variances=of_variances)


def test_stored_runs_are_not_trained_again(tmp_path):
    assert_close(of_runs(DATA / "runs.sqlite", tmp_path), EXPECTED["runs"])


def test_stored_features_are_read():
    assert_close(of_features(DATA / "features"), EXPECTED["features"])
    assert len(EXPECTED["features"]) == 3


def test_the_files_differ_in_what_they_hold():
    """Every part of the format is in one of them."""
    loaded = {name: load_surrogate(DATA / f"{name}.safetensors") for name in SURROGATES}
    assert loaded["component"].rotation is not None and loaded["component"].solver is None
    assert loaded["cg"].solver is not None and loaded["auto"].kind.name == "numpy"
    assert loaded["lasso"].linear_terms and loaded["least_squares"].linear_terms
    assert bool(loaded["apart"].excluded.any()) and loaded["noise"].noise is not None
    assert bool(loaded["apart"].known.any()) and bool(loaded["apart"].scores.isnan().any())
    assert not loaded["weights"].masks.binary and math.isfinite(float(loaded["weights"].loo_error))
