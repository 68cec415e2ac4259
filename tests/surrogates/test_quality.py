"""What is said of every target is one thing, wherever it is said."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ksm_ext import fit_surrogate
from ksm_ext.subsets import bernoulli, design, leave_one_out, mixed_sizes
from ksm_ext.surrogates.quality import qualities, suitability


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
        expected.append(error < 1 and rank > 1e-12)  # more than rounding
    assert surrogate.is_predicted.tolist() == expected
    assert [each.predicts for each in qualities(surrogate)] == expected
    said = [line for line in surrogate.warnings if line.startswith("Nothing of")]
    named = [repr(name) in line for line in said for name in surrogate.target_names]
    assert (named or [False] * 3) == [not each for each in expected]


DRAWS = {
    "uniform": lambda seed: bernoulli(14, 120, 0.5, seed=seed),
    "mixed": lambda seed: mixed_sizes(14, 120, seed=seed),
    "nearly full": lambda seed: bernoulli(14, 120, 0.9, seed=seed),
    "loo": lambda seed: leave_one_out(14, include_full=True),
    **{
        f"for {name}": lambda seed, name=name: design(14, 120, readout=name, seed=seed)
        for name in ("loo", "shapley", "banzhaf", "prediction")
    },
}
SUITED = {
    "loo": {"loo", "for loo", "for shapley"},
    "shapley": {"mixed", "for shapley", "for prediction"},
    "banzhaf": {"uniform", "mixed", "for loo", "for shapley", "for banzhaf", "for prediction"},
}


def fitted_to(masks, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = masks.double() @ torch.arange(1.0 * masks.shape[1]).double()
    return fit_surrogate(masks, scores + torch.randn(len(masks), generator=generator).double())


@pytest.mark.parametrize("readout", SUITED)
@pytest.mark.parametrize("draw", DRAWS)
def test_designs_suit_the_questions_that_they_are_for(draw, readout):
    for seed in range(3):
        found = suitability(fitted_to(DRAWS[draw](seed)), readout)
        assert found.suits is (draw in SUITED[readout])


def test_a_design_is_called_by_its_sizes():
    masks = torch.cat([bernoulli(8, 40, 0.5, seed=0), torch.ones(40, 1).bool()], 1)  # one constant
    sizes = masks[:, :8].sum(1).double()
    found = suitability(fitted_to(masks), "shapley")
    low, first, third, high = (float(sizes.quantile(at)) for at in (0, 0.25, 0.75, 1))
    text = f"They have {low:.0f} to {high:.0f} of 8 tasks that vary, half of them {first:.0f} to "
    text += f"{third:.0f}."
    assert found.scored == text
    lacking = int((sizes == 7).sum())
    loo = suitability(fitted_to(masks), "loo")
    assert f"{lacking} of the 8 subsets that lack one task were scored" in loo.verdict
    assert "the full set was not" in loo.verdict
    whole = suitability(fitted_to(leave_one_out(8, include_full=True)), "loo")
    assert "The full set is among them, with all subsets that lack one task." in whole.scored


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_tasks_suit_every_question(n):
    masks = torch.cat([leave_one_out(n, include_full=True), torch.zeros(1, n).bool()])
    for readout in SUITED:
        masks = masks if n > 1 else torch.tensor([[0], [1], [1]]).bool()
        assert suitability(fitted_to(masks), readout).suits


def test_what_is_predicted_is_said_and_constant_tasks_are_not_counted():
    """All effects, unless the full set was scored; of the tasks that vary."""
    masks = torch.cat([mixed_sizes(6, 20, seed=0), torch.ones(20, 1).bool()], dim=1)
    masks = masks[masks[:, :6].sum(1) < 5]
    scores = masks.double().sum(1, keepdim=True)
    found = suitability(fit_surrogate(masks, scores), "loo")
    assert "of 6 tasks that vary," in found.scored
    assert found.verdict.endswith("the full set was not: all effects are predicted.")
    lone = torch.ones(2, 7).bool()
    lone[1, 0] = False
    whole = torch.cat([masks, lone])
    found = suitability(fit_surrogate(whole, whole.double().sum(1, keepdim=True)), "loo")
    assert found.verdict.endswith("the full set was: the other effects are predicted.")
