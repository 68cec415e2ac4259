"""attribute_tasks: estimated scores, a surrogate and attributions in one call."""

import pytest
import torch
from torch import nn

from ksm_ext import (
    GradientEstimator,
    Projector,
    attribute_tasks,
    fit_surrogate,
    retrain_scores,
    subsets,
)
from ksm_ext.scores.runs import RunStore
from tests.scores.test_estimation import MASKS, data, linear


def test_attributions_in_one_call():
    result = attribute_tasks(
        linear(),
        data(),
        {"new": data((20,), seed=1)[0]},
        masks=MASKS,
        readout="shapley",
        kernel="anova2",
        projector=None,
        ridge=0.1,
        task_names=list("abcd"),
        progress=False,
    )
    assert result.values.shape == (4, 1) and result.std.shape == (4, 1)
    assert result.surrogate.task_names == tuple("abcd")
    total = result.surrogate.predict(MASKS[-1:]) - result.surrogate.predict(MASKS[:1])
    torch.testing.assert_close(result.values.sum(0), total[0], rtol=1e-8, atol=1e-8)
    drawn = attribute_tasks(linear(), data(), data()[0], num_subsets=8, progress=False)
    assert drawn.masks.sum(1).min() >= 2 and drawn.values.shape == (4, 1)
    assert not drawn.exhaustive and not result.exhaustive
    said = "gradients as they are, solver exact, ridge 0.1"
    assert str(result) == f"Attributions of 4 tasks to 1 target from 16 subsets: {said}"


def test_what_is_chosen_is_said():
    """With the defaults alone; the same numbers, given, have the same bits."""
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(3, 300), nn.Tanh(), nn.Linear(300, 2)).double()
    for model, projector, text in (
        (linear(), None, "gradients as they are"),
        (wide, Projector(1024), "gradients projected to 1,024 dimensions"),
    ):
        result = attribute_tasks(model, data(), data()[0])
        estimator = result.estimator
        ridge = estimator.ridge
        said = f"{text}, solver exact, ridge {ridge:.3g}"
        assert estimator.settings == said and str(result).endswith(f": {said}")
        assert repr(result) == str(result) and repr(estimator) == str(estimator)
        given = attribute_tasks(model, data(), data()[0], projector=projector, ridge=ridge)
        assert torch.equal(given.values, result.values)
    calibrated = attribute_tasks(
        linear(), data(), data()[0], retrained=(MASKS, result.estimator.predict(MASKS))
    )
    assert str(calibrated).endswith(f"calibrated: {calibrated.estimator.calibration}")


def test_samples_with_weights():
    """Scores are the estimator's; a task without weight has no effect."""
    weights = [1.0, 0.0, 2.0, 0.5]
    options = {"sample_weights": weights, "ridge": 0.1, "projector": None}
    result = attribute_tasks(linear(), data(), data()[0], masks=MASKS, kernel="anova2", **options)
    alone = GradientEstimator(linear(), data(), data()[0], **options).fit().predict(MASKS)
    assert torch.equal(result.scores, alone)
    assert abs(float(result.values[1])) < 1e-3 * float(result.values.abs().max())


@pytest.mark.parametrize("n", [2, 3, 5, 8, 10])
def test_few_tasks_have_all_their_subsets(n):
    """With the defaults: up to ten tasks there are fewer subsets than are asked for."""
    torch.manual_seed(0)
    tasks = [(torch.randn(8, 3), torch.randint(2, (8,))) for _ in range(n)]
    options = {"kernel": "linear", "progress": False}
    result = attribute_tasks(nn.Linear(3, 2), tasks, tasks[0], **options)
    sizes = range(max(1, n // 2), max(n, 3))
    every = torch.cat([next(subsets.iterate_subsets(n, size)) for size in sizes])
    assert torch.equal(torch.unique(result.masks, dim=0), torch.unique(every, dim=0))
    assert result.exhaustive and len(result.masks) == len(every) < 1000
    assert f" from {len(every)} subsets, all there are of their sizes: " in str(result)


def retrained_loss(mask, seed):
    """A logistic regression on some of the tasks, and its loss on new samples."""
    tasks, (x, y) = data(), data((20,), seed=1)[0]
    torch.manual_seed(seed)
    model = nn.Linear(x.shape[1], 2).to(x.dtype)
    chosen = [task for task, bit in zip(tasks, mask.tolist(), strict=True) if bit]
    inputs, labels = (torch.cat(parts) for parts in zip(*chosen, strict=True))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=40)

    def closure():
        optimizer.zero_grad()
        penalty = 0.05 * sum(weight.square().sum() for weight in model.parameters())
        loss = nn.functional.cross_entropy(model(inputs), labels) + penalty
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    with torch.no_grad():
        return [float(nn.functional.cross_entropy(model(x), y))]


def test_a_budget_is_of_retraining():
    with pytest.raises(
        ValueError, match=r"^`budget` must be None without `retrain`, got 12\. Pass"
    ):
        attribute_tasks(linear(), data(), data()[0], budget=12)


def test_some_subsets_are_retrained(tmp_path):
    """True scores of the subsets that answer the question, fitted with the estimates."""
    target = {"new": data((20,), seed=1)[0]}
    options = {"retrain": retrained_loss, "seeds": (0, 1), "store": tmp_path}
    result = attribute_tasks(linear(), data(), target, budget=8, **options)
    retrained = result.retrained
    assert len(retrained.masks) == 8 and retrained.seeds == (0, 1)
    assert bool(retrained.masks[0].all()) and (retrained.masks.sum(1) == 3).sum() == 4
    assert "all there are of their sizes and 8 retrained ones: gradients" in str(result)
    own = fit_surrogate(result.masks, result.scores, target_names=["new"])
    expected = fit_surrogate(*retrained.runs(), estimates=own, target_names=["new"])
    torch.testing.assert_close(result.values, expected.attribute("loo"))
    truth = retrained.mean[:1] - retrained.mean[1:5]
    alone = {
        tuple(mask): effect
        for mask, effect in zip(retrained.masks[1:5].tolist(), truth, strict=True)
    }
    for task in range(4):
        mask = [other != task for other in range(4)]
        torch.testing.assert_close(result.values[task], alone[tuple(mask)], rtol=0.02, atol=1e-3)

    with RunStore(tmp_path / "retrained.sqlite", 4) as store:
        assert store.num_targets == 1
    shapley = attribute_tasks(linear(), data(), target, budget=6, readout="shapley", **options)
    assert shapley.retrained.masks.sum(1).tolist() == [4, 3, 3, 3, 3, 1]
    few = attribute_tasks(linear(), data(), target, budget=4, **options)
    order = few.surrogate.trend.levels[0].attribute("loo", False)[:, 0].argsort()
    lacking = (~few.retrained.masks[1:]).int().argmax(1)
    assert lacking[[0, -1]].tolist() == order[[0, -1]].tolist()  # the most harmful and helpful


def test_the_empty_set_is_retrained_where_it_is_asked_for(tmp_path):
    """Shapley values then sum to F(all) - F(none), the true scores of both."""

    def retrain(mask, seed):
        return [float(torch.tensor(2.0).log())] if not any(mask) else retrained_loss(mask, seed)

    target = {"new": data((20,), seed=1)[0]}
    options = {"retrain": retrain, "readout": "shapley", "include_empty": True}
    result = attribute_tasks(linear(), data(), target, budget=8, **options)
    sizes = result.retrained.masks.sum(1).tolist()
    assert sizes[:6] == [4, 0, 3, 3, 3, 3] and len(result.retrained.masks.unique(dim=0)) == 8
    total = result.retrained.mean[0] - result.retrained.mean[1]
    torch.testing.assert_close(result.values.sum(0), total.to(result.values), rtol=1e-6, atol=1e-8)
    few = attribute_tasks(linear(), data(), target, budget=4, **options)
    assert few.retrained.masks.sum(1).tolist() == [4, 0, 3, 3]
    without = attribute_tasks(linear(), data(), target, budget=8, retrain=retrained_loss)
    assert int(without.retrained.masks.sum(1).min()) > 0


def test_scores_that_are_there_calibrate_and_are_no_function():
    true = retrain_scores(retrained_loss, MASKS[1:9], seeds=(0, 1))
    pair = true.runs()
    one, other = (
        attribute_tasks(linear(), data(), data()[0], retrained=each) for each in (true, pair)
    )
    assert torch.equal(one.values, other.values)
    assert one.estimator.calibration.errors == other.estimator.calibration.errors
    expected = "`retrain` must be a function.*Pass scores that are there as `retrained`"
    with pytest.raises(TypeError, match=expected):
        attribute_tasks(linear(), data(), data()[0], retrain=true)


@pytest.mark.parametrize(
    "error, match, tasks, options",
    [
        (ValueError, "`include_empty` must be False without", data(), {"include_empty": True}),
        (
            TypeError,
            "`include_empty` must be True or False, got 'yes'",
            data(),
            {"include_empty": "yes"},
        ),
        (TypeError, "`include_empty` must be True or False, got 2", data(), {"include_empty": 2}),
        (TypeError, "`retrain` must be a function", data(), {"retrain": 3}),
        (TypeError, "`retrained` must be a pair", data(), {"retrained": MASKS}),
        (TypeError, "`tasks` must be a list of data sets", 3, {}),
        (
            ValueError,
            "`ridge` must be finite, got inf",
            data(),
            {"ridge": float("inf")},
        ),
        (ValueError, "`tasks` must be three", data()[:2], {"retrain": retrained_loss}),
        (ValueError, "`budget` must be at least 4", data(), {"retrain": max, "budget": 3}),
        (ValueError, "`group` must be None with", data(), {"retrain": max, "group": object()}),
        (ValueError, "`tasks` must be two", data()[:1], {}),
        (ValueError, "`readout` must be one of", data(), {"readout": "owen"}),
        (TypeError, "got an unexpected keyword argument 'batchsize'", data(), {"batchsize": 4}),
    ],
)
def test_errors_name_what_is_wrong(error, match, tasks, options):
    with pytest.raises(error, match=match):
        attribute_tasks(linear(), tasks, data()[0], **options)
