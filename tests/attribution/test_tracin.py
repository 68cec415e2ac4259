import pytest
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.utils.data import TensorDataset

from ksm_ext.attribution.tracin import gradient_cosine, tracin


def problem(seed=0):
    torch.manual_seed(seed)
    models = [nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double() for _ in range(2)]
    draw = lambda n: (torch.randn(n, 4).double(), torch.randint(3, (n,)))  # noqa: E731
    return models, [draw(3), draw(5), draw(2)], {"one": draw(4), "two": draw(6)}


def gradient(model, data, reduction):
    loss = cross_entropy(model(data[0]), data[1], reduction=reduction)
    parts = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def test_tracin_and_cosine_are_products_of_gradients():
    models, tasks, targets = problem()
    exact, cosine = torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    for i, task in enumerate(tasks):
        for j, target in enumerate(targets.values()):
            for model, rate in zip(models, (0.5, 0.1), strict=True):
                of_task, of_target = gradient(model, task, "sum"), gradient(model, target, "mean")
                exact[i, j] -= rate * of_task @ of_target / 10
            of_task, of_target = (gradient(models[0], d, "mean") for d in (task, target))
            cosine[i, j] = -cosine_similarity(of_task, of_target, dim=0)
    torch.testing.assert_close(tracin(models, [0.5, 0.1], tasks, targets), exact)
    torch.testing.assert_close(gradient_cosine(models[0], tasks, targets), cosine)


def test_one_small_step_of_a_task_changes_the_target_so():
    models, tasks, targets = problem()
    model, rate = models[0], 1e-6
    said = tracin(model, rate, tasks, targets)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for i, task in enumerate(tasks):
        step = rate * gradient(model, task, "sum") / 10
        for j, (x, y) in enumerate(targets.values()):
            torch.nn.utils.vector_to_parameters(start, model.parameters())
            before = cross_entropy(model(x), y)
            torch.nn.utils.vector_to_parameters(start - step, model.parameters())
            after = cross_entropy(model(x), y)
            torch.testing.assert_close(said[i, j], (after - before).detach(), rtol=1e-4, atol=1e-12)


def test_captum_agrees():
    """A peer projects gradients at random unless told not to; these are exact."""
    captum = pytest.importorskip("captum.influence")
    models, _, targets = problem()
    train = torch.randn(9, 4).double(), torch.randint(3, (9,))
    query = targets["one"]
    peer = captum.TracInCP(
        models[0],
        TensorDataset(*train),
        ["the only one"],
        checkpoints_load_func=lambda model, path: 1.0,
        loss_fn=nn.CrossEntropyLoss(reduction="none"),
        batch_size=1,
    )
    theirs = peer.influence(query).double()  # (queries, samples)
    single = [tuple(c[i : i + 1] for c in train) for i in range(9)]
    singles = {str(j): tuple(c[j : j + 1] for c in query) for j in range(4)}
    ours = tracin(models[0], 9.0, single, singles)
    ratio = (-ours.T / theirs).flatten()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-5, atol=0)


def test_a_vanishing_gradient_has_no_direction():
    model = nn.Linear(2, 1).double()
    nothing = torch.zeros(3, 2).double(), model(torch.zeros(3, 2).double()).detach()
    other = torch.ones(2, 2).double(), torch.zeros(2, 1).double()
    assert gradient_cosine(model, [nothing], other, "squared_error").tolist() == [[0.0]]


def test_bad_input():
    models, tasks, targets = problem()
    with pytest.raises(ValueError, match="`learning_rates` must be of one number for each of 2"):
        tracin(models, [0.1], tasks, targets)
    with pytest.raises(ValueError, match="`tasks` must be one data set or more"):
        gradient_cosine(models[0], [], targets)
