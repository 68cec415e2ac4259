"""What is said of every target is one thing, wherever it is said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ksm_ext import fit_surrogate
from ksm_ext.surrogates.quality import qualities


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([0.3, 3.0, 30.0]), st.booleans())
def test_nothing_is_predicted_by_one_definition(seed, noise, center):
    """By error, rank correlation and whether predictions vary, from the residuals alone."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(24, 4, generator=generator) < 0.5
    scores = masks.double() @ torch.randn(4, 3, generator=generator).double()
    scores = scores + noise * torch.randn(24, 3, generator=generator).double()
    surrogate = fit_surrogate(masks, scores, kernel="rbf", center=center)
    left_out = surrogate.scores - surrogate.loo_residuals
    query = torch.rand(40, 4, generator=generator) < 0.5
    smooth = surrogate._smooth(surrogate._query(query))
    varies = smooth.amax(0) - smooth.amin(0) > 1e-9
    expected = []
    for j in range(3):
        error = float(surrogate.loo_residuals[:, j].square().mean() / surrogate.scores[:, j].var())
        both = (surrogate.scores[:, j].numpy(), left_out[:, j].numpy())
        rank = stats.spearmanr(*both)[0] if varies[j] else 0.0
        assert float(surrogate.rank_correlations[j]) == pytest.approx(rank, abs=1e-9)
        expected.append(error < 1 and rank > 0)
    assert surrogate.is_predicted.tolist() == expected
    assert [each.predicts for each in qualities(surrogate)] == expected
    said = [line for line in surrogate.warnings if line.startswith("Nothing of")]
    named = [repr(name) in line for line in said for name in surrogate.target_names]
    assert (named or [False] * 3) == [not each for each in expected]
