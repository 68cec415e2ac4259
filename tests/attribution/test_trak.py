import pytest
import torch
from retrained import effects
from torch import nn
from torch.nn.functional import cross_entropy

from ksm_ext import Projector
from ksm_ext.attribution.trak import self_influence, top_samples, trak, trak_scores
from ksm_ext.correlation import pearson
from ksm_ext.network.gradients import collect_features, projection_text
from ksm_ext.network.outputs import log_odds


def problem():
    torch.manual_seed(0)
    layers = lambda: (nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))  # noqa: E731
    models = [nn.Sequential(*layers()).double() for _ in range(2)]
    draw = lambda n: (torch.randn(n, 4).double(), torch.randint(3, (n,)))  # noqa: E731
    return models, [draw(8), draw(25), draw(17)], {"one": draw(4), "two": draw(6)}


def features(model, data, projector):
    return collect_features(model, data, log_odds, projector, progress=False)


def test_trak_is_its_formula_sample_by_sample():
    models, tasks, targets = problem()
    projector = Projector(12)
    found = trak(models, tasks, targets, projector=projector, relative_ridge=0.1).values
    exact = torch.zeros(3, 2).double()
    for model in models:
        train = [features(model, task, projector) for task in tasks]
        phi = torch.cat([part.gradients for part in train])
        gram = phi.T @ phi
        gram += 0.1 * gram.diagonal().mean() * torch.eye(12).double()
        for i, part in enumerate(train):
            for j, target in enumerate(targets.values()):
                query = features(model, target, projector)
                for h, g in zip(query.values, query.gradients, strict=True):
                    for value, row in zip(part.values, part.gradients, strict=True):
                        margin = g @ torch.linalg.solve(gram, row) * (1 - value.sigmoid())
                        exact[i, j] -= (1 - h.sigmoid()) * margin / len(query)
    torch.testing.assert_close(found, exact / 2)


def test_what_is_chosen():
    models, tasks, targets = problem()
    wide = nn.Sequential(nn.Linear(4, 300), nn.Tanh(), nn.Linear(300, 3)).double()
    for network, projector in ((models[0], None), (wide, Projector(1024))):
        chosen = trak(network, tasks, targets)
        ridge = {"relative_ridge": 0.01}
        same = trak(network, tasks, targets, projector=projector, **ridge)
        assert torch.equal(chosen.values, same.values)
        assert chosen.projector == projector and chosen.relative_ridge == 0.01
        to = "as they are" if projector is None else "projected to 1,024 dimensions"
        assert projection_text(projector) == f"gradients {to}"
        said = f"TRAK of 3 tasks for 2 targets: gradients {to}, relative ridge 0.01"
        assert str(chosen) == repr(chosen) == said


def test_scores_of_samples_sum_to_those_of_tasks():
    (model, _), tasks, targets = problem()
    projector = Projector(12)
    data = tuple(torch.cat(column) for column in zip(*tasks, strict=True))
    train = features(model, data, projector)
    query = features(model, targets["one"], projector)
    scores = trak_scores(train, query)  # (b, t)
    slopes = -(1 - query.values.sigmoid())
    by_sample = (scores * slopes).mean(1)
    by_task = torch.stack([part.sum() for part in by_sample.split([8, 25, 17])])
    found = trak(model, tasks, targets, projector=projector).values[:, 0]
    torch.testing.assert_close(by_task, found)


def samples():
    """Features of the training samples and queries of a small problem."""
    (model, _), tasks, targets = problem()
    data = tuple(torch.cat(column) for column in zip(*tasks, strict=True))
    return (features(model, part, Projector(16)) for part in (data, targets["one"]))


@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("block_bytes", [1, 10**9])
def test_top_samples_are_the_extremes_of_all_scores(largest, block_bytes, monkeypatch):
    monkeypatch.setitem(trak.__globals__, "_BLOCK_BYTES", block_bytes)
    train, queries = samples()
    scores = trak_scores(train, queries, relative_ridge=0.1)
    found = top_samples(train, queries, 7, relative_ridge=0.1, largest=largest)
    expected = scores.topk(7, dim=0, largest=largest)
    torch.testing.assert_close(found.scores, expected.values)
    assert torch.equal(found.samples, expected.indices)
    for count in (0, len(train) + 1):
        with pytest.raises(ValueError, match="`count` must be between 1 and 50, the training"):
            top_samples(train, queries, count)


def test_self_influence_is_the_diagonal_of_all_scores():
    train, _ = samples()
    own = trak_scores(train, train, relative_ridge=0.1).diagonal()
    error = 1 - train.values.sigmoid()
    torch.testing.assert_close(self_influence(train, relative_ridge=0.1), own * error)


def test_traker_agrees_given_the_same_projection(tmp_path):
    trak_package = pytest.importorskip("trak")
    from trak.projectors import AbstractProjector

    models, tasks, targets = problem()
    models = [model.float() for model in models]
    data = tuple(torch.cat(column) for column in zip(*tasks, strict=True))
    data, query = (data[0].float(), data[1]), (targets["one"][0].float(), targets["one"][1])
    p = sum(w.numel() for w in models[0].parameters())
    projector = Projector(16, kind="rademacher")
    matrix = projector(torch.eye(p))

    class Ours(AbstractProjector):
        def __init__(self):
            super().__init__(p, 16, 0, "rademacher", "cpu")

        def project(self, grads, model_id):
            if isinstance(grads, dict):
                grads = torch.cat([part.flatten(1) for part in grads.values()], dim=1)
            return grads @ matrix

    peer = trak_package.TRAKer(
        model=models[0],
        task="image_classification",
        train_set_size=50,
        save_dir=str(tmp_path),
        device="cpu",
        projector=Ours(),
        proj_dim=16,
        use_half_precision=False,
        load_from_save_dir=True,
        logging_level=40,
    )
    peer.load_checkpoint(models[0].state_dict(), model_id=0)
    peer.featurize(batch=data, num_samples=50)
    peer.finalize_features()
    peer.start_scoring_checkpoint("same", models[0].state_dict(), 0, num_targets=4)
    peer.score(batch=query, num_samples=4)
    theirs = torch.as_tensor(peer.finalize_scores("same")).double()  # (samples, queries)
    ours = trak_scores(*(features(models[0], part, projector) for part in (data, query)))
    scale = (theirs / ours.double()).median()  # its own, which is the mean |entry|
    expected = scale * ours.double()  # its features are float32, and its scores have few digits
    torch.testing.assert_close(theirs, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))
    assert float(pearson(theirs.T, ours.double().T).min()) > 0.9999


def test_trak_knows_what_retraining_does():
    """On a logistic regression, whose features do not move."""
    torch.manual_seed(1)
    x = torch.randn(220, 3).double()
    y = (x[:, 0] + 0.5 * torch.randn(220).double() > 0).long()
    tasks = [(x[i : i + 8], y[i : i + 8]) for i in range(0, 120, 8)]
    target = x[120:], y[120:]
    model = nn.Linear(3, 2).double()

    truth = effects(model, tasks, target, lambda x, y: cross_entropy(model(x), y))
    said = trak(model, tasks, target, projector=Projector(6, kind="gaussian"), relative_ridge=1e-3)
    assert float(pearson(said.values.T, truth[None])) > 0.7


def test_singular_grams_are_errors_and_not_garbage():
    (model, _), tasks, targets = problem()
    with pytest.raises(RuntimeError, match="`gram` must be an invertible matrix, got a singular"):
        trak(model, tasks[:1], targets, projector=Projector(20))
    found = trak(model, tasks[:1], targets, projector=Projector(20), relative_ridge=0.01)
    assert bool(found.values.isfinite().all())
    with pytest.raises(ValueError, match="`relative_ridge` must be non-negative"):
        trak(model, tasks, targets, projector=Projector(4), relative_ridge=-1.0)
    with pytest.raises(ValueError, match="`models` must be one network or more"):
        trak([], tasks, targets, projector=Projector(4))


def test_nothing_depends_on_batches():
    models, tasks, targets = problem()
    whole = trak(models, tasks, targets, projector=Projector(12)).values
    for size in (1, 3, 50):
        found = trak(models, tasks, targets, projector=Projector(12), batch_size=size)
        torch.testing.assert_close(found.values, whole, rtol=1e-9, atol=1e-12)
