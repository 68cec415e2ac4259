"""attribute_tasks: estimated scores, a surrogate and attributions in one call."""

import pytest
import torch
from torch import nn

from ksm_ext import attribute_tasks, subsets
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
    assert str(result) == "Attributions of 4 tasks to 1 target from 16 subsets"


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
    assert str(result).endswith(f"from {len(every)} subsets, all there are of their sizes")


@pytest.mark.parametrize(
    "error, match, tasks, options",
    [
        (ValueError, "`tasks` must be two", data()[:1], {}),
        (ValueError, "`readout` must be one of", data(), {"readout": "owen"}),
        (TypeError, "got an unexpected keyword argument 'batchsize'", data(), {"batchsize": 4}),
    ],
)
def test_errors_name_what_is_wrong(error, match, tasks, options):
    with pytest.raises(error, match=match):
        attribute_tasks(linear(), tasks, data()[0], **options)
