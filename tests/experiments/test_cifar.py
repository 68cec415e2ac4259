import json
from dataclasses import replace
from functools import partial
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import nn

from experiments.cifar.attribution import (
    by_conjugate_gradients,
    by_lissa,
    lissa_by_sample,
    lissa_on_batches,
    trak_by_sample,
    trak_ranks,
)
from experiments.cifar.data import draw_groups, grouped, read
from experiments.cifar.experiment import NAMES, PROGRAM, Cifar
from experiments.cifar.mislabelled import (
    as_text,
    by_loss,
    by_self_influence,
    noisy_experiment,
    noisy_problem,
)
from experiments.cifar.model import NORMS, ResNet9, resnet18
from experiments.cifar.settings import PAPER, SMALL, SMOKE, Data, Lissa
from experiments.experiment import Run
from experiments.runner import main
from experiments.training import gradient_step
from experiments.truth import _score
from ksm_ext.attribution.influence import influence
from ksm_ext.attribution.trak import trak
from ksm_ext.identity import identify
from ksm_ext.network.hessian import GaussNewton
from ksm_ext.network.solvers import BlockConjugateGradients

NUM_TRAIN, NUM_TEST = 600, 300


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Images whose class is the place of a bright square, packed."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "squares.npz"
    np.savez(path, **made_up("train", NUM_TRAIN, random), **made_up("test", NUM_TEST, random))
    return str(path)


def made_up(part, count, random):
    labels = random.integers(0, 10, count)
    images = random.integers(0, 120, (count, 32, 32, 3))
    for image, label in zip(images, labels, strict=True):
        row, column = 8 * (label // 4), 8 * (label % 4)
        image[row : row + 8, column : column + 8] += 120
    return {f"x_{part}": images.astype(np.uint8), f"y_{part}": labels.astype(np.uint8)}


@pytest.fixture
def tiny(packed):
    """An experiment that trains in a second."""
    data = Data(path=packed, num_groups=6, group_size=50, targets="class", num_held=200, size=16)
    training = replace(SMOKE.training, num_steps=40, num_warmup=8, checkpoints=(0.5, 1.0))
    return Cifar(replace(SMOKE, data=data, training=training))


# -- images -------------------------------------------------------------------------------------


def test_groups_are_disjoint_and_standardised(packed):
    data = Data(path=packed, num_groups=8, group_size=60, num_targets=5, num_held=250)
    images = grouped(data)
    assert [len(y) for _, y in images.by_task()] == [60] * 8
    assert [len(y) for _, y in images.by_target().values()] == [50] * 5
    assert images.inputs.shape == (480, 3, 32, 32) and images.num_classes == 10
    assert len(images.inputs.flatten(1).unique(dim=0)) == 480
    train, _ = read(packed)
    rows = draw_groups(train.labels, data, np.random.default_rng(data.seed)).ravel()
    assert images.labels.tolist() == train.labels[rows].tolist()
    pixel = train.take(rows[:1])[0, 3, 4] / 255
    expected = (pixel - [0.4914, 0.4822, 0.4465]) / [0.2470, 0.2435, 0.2616]
    torch.testing.assert_close(images.inputs[0, :, 3, 4].double(), torch.tensor(expected))
    assert not images.flipped.any() and not images.noisy.any()


def test_small_images_are_means_of_squares(packed):
    large, small = (
        grouped(Data(path=packed, num_groups=2, group_size=9, num_held=20, size=size)).inputs
        for size in (32, 16)
    )
    means = large.unflatten(3, (16, 2)).mean(4).unflatten(2, (16, 2)).mean(3)
    torch.testing.assert_close(small, means)


def test_class_targets_hold_one_class_each(tiny):
    for label, (_, labels) in enumerate(tiny.data().by_target().values()):
        assert set(labels.tolist()) == {label}


@pytest.mark.parametrize("concentration", [0.1, 1.0, None])
def test_class_mixes_are_as_concentrated_as_asked(concentration):
    """Two images of a group share their class as often as the Dirichlet distribution says."""
    labels = np.arange(100_000) % 10
    data = Data(num_groups=400, group_size=50, concentration=concentration)
    rows = draw_groups(labels, data, np.random.default_rng(0))
    assert rows.shape == (400, 50) and len(np.unique(rows)) == 400 * 50
    counts = np.stack([np.bincount(labels[group], minlength=10) for group in rows])
    same = (counts * (counts - 1)).sum(1).mean() / (50 * 49)
    alone = 0.1 if concentration is None else (concentration + 1) / (10 * concentration + 1)
    assert same == pytest.approx(alone, abs=0.03)


def test_concentrated_groups_use_up_all_images():
    labels = np.arange(200) % 10
    data = Data(num_groups=4, group_size=50, concentration=0.1)
    rows = draw_groups(labels, data, np.random.default_rng(0))
    assert sorted(rows.ravel().tolist()) == list(range(200))


def test_a_share_of_labels_is_flipped_in_some_groups(packed):
    clean = Data(path=packed, num_groups=8, group_size=50, num_held=100)
    noisy = replace(clean, num_noisy=3, noise=0.1)
    before, after = grouped(clean), grouped(noisy)
    assert torch.equal(before.inputs, after.inputs)
    assert torch.equal(before.labels != after.labels, after.flipped)
    per_group = after.flipped.view(8, 50).sum(1)
    assert per_group[after.noisy].tolist() == [5] * 3 and int(per_group[~after.noisy].sum()) == 0
    assert torch.equal(before.held_labels, after.held_labels)


def test_jpeg_files_are_read_like_arrays(packed, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    arrays = dict(np.load(packed))
    images = np.concatenate([arrays["x_train"][:40], arrays["x_test"][:20]])
    files = []
    for image in images:
        pillow.fromarray(image).save(tmp_path / "one.jpg", quality=95)
        files.append(np.fromfile(tmp_path / "one.jpg", dtype=np.uint8))
    path = tmp_path / "jpeg.npz"
    np.savez(
        path,
        bytes=np.concatenate(files),
        offsets=np.cumsum([0, *map(len, files)]),
        labels=np.concatenate([arrays["y_train"][:40], arrays["y_test"][:20]]),
        is_train=np.arange(60) < 40,
    )
    train, test = read(str(path))
    rows = np.array([7, 3, 15])
    assert train.labels[rows].tolist() == arrays["y_train"][rows].tolist()
    error = np.abs(test.take(rows).astype(int) - arrays["x_test"][rows])
    assert error.mean() < 30  # colours are kept at half of the resolution
    others = np.abs(test.take(rows).astype(int) - arrays["x_test"][rows + 1])
    assert error.mean() < others.mean()


def test_torchvision_images(monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")

    class Stub:
        def __init__(self, root, train, download):
            assert root == "some/folder" and download
            self.data = np.full((4, 32, 32, 3), int(train), dtype=np.uint8)
            self.targets = [3, 1, 2, int(train)]

    monkeypatch.setattr(datasets, "CIFAR10", Stub)
    train, test = read("some/folder")
    assert train.labels.tolist() == [3, 1, 2, 1] and test.labels.tolist() == [3, 1, 2, 0]
    assert train.take(np.array([2, 0])).tolist() == np.ones((2, 32, 32, 3)).tolist()


def test_without_images_the_error_is_one_line(packed, tmp_path, monkeypatch, capsys):
    output = ["--output", str(tmp_path / "out")]
    assert main(PROGRAM, ["run", "--preset", "smoke", "--data", "no/such.npz", *output]) == 2
    message = capsys.readouterr().err
    assert "`data` must be CIFAR-10 as torchvision keeps it" in message
    assert "got 'no/such.npz', which does not exist" in message and message.count("\n") == 1
    with pytest.raises(ValueError, match=r"must be CIFAR-10 with 2000 training images, got 600"):
        grouped(Data(path=packed, num_groups=20, group_size=100))
    np.savez(tmp_path / "other.npz", x_train=np.zeros(3))
    with pytest.raises(ValueError, match="without 'y_train'"):
        read(str(tmp_path / "other.npz"))
    datasets = pytest.importorskip("torchvision.datasets")

    def offline(root, train, download):
        raise URLError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", offline)
    with pytest.raises(ValueError, match=r"no download \(.*no network.*Pass a packed file"):
        read(str(tmp_path))


# -- networks and training ----------------------------------------------------------------------


def test_networks_have_the_known_sizes():
    def size(network):
        return sum(weight.numel() for weight in network.parameters())

    network = ResNet9(10, PAPER.model.widths, NORMS["batch"])
    assert size(network) == 2_274_880  # of the published one
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    pytest.importorskip("torchvision")
    network = resnet18(10, NORMS["batch"])
    assert size(network) == 11_173_962  # of the usual one for CIFAR
    assert network.eval()(torch.randn(1, 3, 32, 32)).shape == (1, 10)


def test_the_schedule_is_the_published_triangle():
    training = PAPER.training
    epochs = np.array([0, 2.5, 5, 10, 25])
    rates = [training.rate(round(98 * epoch) - 1) for epoch in epochs]
    np.testing.assert_allclose(rates, np.interp(epochs, [0, 5, 25], [0, 0.4, 0]), atol=3e-4)
    assert (training.optimizer, training.weight_decay, training.batch_size) == ("sgd", 5e-4, 512)
    assert PAPER.data.num_groups == 50 and PAPER.truth.subset_size == 30
    assert SMALL.data.num_groups * SMALL.data.group_size == 5000


def test_half_of_the_images_are_mirrored(tiny):
    images = tiny.data().inputs
    seen = tiny.augmented(images, torch.Generator().manual_seed(0))
    same, mirrored = ((seen == x).flatten(1).all(1) for x in (images, images.flip(3)))
    assert bool((same ^ mirrored).all()) and 0.4 < float(same.float().mean()) < 0.6
    assert seen.is_contiguous(memory_format=torch.channels_last)


def test_training_learns_and_repeats(tiny):
    mask = torch.tensor([True, True, True, True, True, False])
    first, second = (
        [(tiny.score(net), tiny.accuracy(net)[1]) for net in tiny.train("main", mask, 3)]
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(first, second, strict=True))
    assert first[-1][1] > 0.3  # 0.1 knows nothing


def test_scores_depend_on_the_images_and_not_on_their_path(tiny, packed, tmp_path):
    arrays = dict(np.load(packed))
    np.savez(tmp_path / "copy.npz", **arrays)
    np.savez(tmp_path / "other.npz", **arrays | {"x_train": 255 - arrays["x_train"]})

    def depends_on(path):
        data = replace(tiny.settings.data, path=str(path))
        return Cifar(replace(tiny.settings, data=data)).depends_on("main")

    assert depends_on(packed) == depends_on(tmp_path / "copy.npz")
    assert depends_on(packed) != depends_on(tmp_path / "other.npz")


def test_a_store_knows_how_scores_come_about_and_not_how_methods_work(tiny, monkeypatch):
    def identity():
        return identify(train=partial(_score, tiny, "main"))

    def other(problem):
        return problem.nothing

    before = identity()
    monkeypatch.setattr(by_lissa, "__code__", other.__code__)
    assert identity() == before
    monkeypatch.setattr(gradient_step, "__code__", other.__code__)
    assert identity() != before


# -- attribution --------------------------------------------------------------------------------


def softmax_regression():
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(4, 3, bias=False).double()
    inputs = torch.randn(60, 4, dtype=torch.float64, generator=generator)
    labels = torch.randint(3, (60,), generator=generator)
    rhs = torch.randn(2, 12, dtype=torch.float64, generator=generator)
    return model, (inputs, labels), rhs


def test_lissa_on_batches_averages_to_the_solution():
    model, data, rhs = softmax_regression()
    dense = GaussNewton(model, data)(torch.eye(12, dtype=torch.float64))
    exact = torch.linalg.solve(dense + 0.5 * torch.eye(12), rhs.T).T
    settings = Lissa(depth=20, batch_size=40, damping=0.5, scale=2.0)

    once, often = (
        lissa_on_batches(model, data, rhs, replace(settings, num_averages=number), 0)
        for number in (1, 12)
    )
    once, often = (float((x - exact).norm() / exact.norm()) for x in (once, often))
    assert often < 0.03 and often < once / 2


def test_lissa_says_that_it_diverges():
    model, data, rhs = softmax_regression()
    with pytest.raises(RuntimeError, match=r"`scale` must be large enough, got 0.05"):
        lissa_on_batches(model, data, rhs, Lissa(depth=30, batch_size=20, scale=0.05), 0)


def problem_of(experiment, tmp_path):
    return noisy_problem(Run(experiment, tmp_path))  # trained on all groups, whatever their labels


def test_conjugate_gradients_on_all_images_are_plain_influence(tiny, tmp_path):
    methods = replace(tiny.settings.methods, num_models=1, num_steps=3, damping=10.0)
    data = replace(tiny.settings.data, group_size=20, targets="random", num_targets=2)
    lissa = replace(tiny.settings.lissa, depth=3)
    tiny = Cifar(replace(tiny.settings, data=data, methods=methods, lissa=lissa))
    problem, solver = problem_of(tiny, tmp_path), BlockConjugateGradients(1e-3, 3)
    given = problem.models[0], problem.tasks, problem.targets
    plain = influence(*given, damping=10.0, solver=solver).values
    # The images come in another order, and three steps of float32 amplify what that rounds.
    found = by_conjugate_gradients(problem.models[0], problem)
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-2 * float(plain.abs().max()))
    samples = lissa_by_sample(problem)
    tasks = [samples[tiny.data().tasks == task].double().sum(0) for task in range(6)]
    said = by_lissa(problem)
    torch.testing.assert_close(said.attributions, torch.stack(tasks).double())
    assert torch.equal(said.by_sample, samples)


def test_trak_of_images_adds_up_to_that_of_groups(tiny, tmp_path):
    """For single queries, that of the loss is that of the log-odds times ``-(1 - q)``."""
    tiny = Cifar(replace(tiny.settings, methods=replace(tiny.settings.methods, num_models=1)))
    problem, data = problem_of(tiny, tmp_path), tiny.data()
    by_image = trak_by_sample(problem)  # (b, t)
    assert by_image.shape == (300, 10)
    query = int((data.held_targets == 4).nonzero()[0])
    alone = replace(
        data, held_targets=torch.where(torch.arange(200) == query, 0, 1), target_names=("a", "b")
    )
    model, ridge = problem.models[0], tiny.settings.methods.trak_ridge
    x, y = (part[query : query + 1] for part in (data.held_inputs, data.held_labels))
    options = {"projector": problem.projector, "relative_ridge": ridge}
    by_group = trak(model, problem.tasks, {"a": (x, y)}, **options).values[:, 0]

    class Other(Cifar):
        def data(self):
            return alone

    sums = trak_by_sample(replace(problem, experiment=Other(tiny.settings)))[:, 0]
    sums = torch.stack([sums[data.tasks == task].sum() for task in range(6)])
    right = model(x).softmax(1)[0, y[0]]
    torch.testing.assert_close(by_group, -(1 - right.detach()) * sums, rtol=1e-3, atol=1e-6)


def test_trak_is_judged_as_scipy_does():
    generator = torch.Generator().manual_seed(0)
    tasks = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    masks = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0, 0], [0, 0, 1], [0, 1, 0]]).bool()
    scores, true = (torch.randn(size, 2, generator=generator) for size in (9, 6))
    means = torch.stack([scores[mask[tasks]].mean(0) for mask in masks])
    expected = [spearmanr(true[:, j], means[:, j]).statistic for j in range(2)]
    assert trak_ranks(scores, tasks, masks, true.double()).tolist() == pytest.approx(expected)


# -- flipped labels -----------------------------------------------------------------------------


def test_noisy_groups_are_random_ones(tiny):
    settings = replace(tiny.settings, data=replace(tiny.settings.data, concentration=0.1))
    settings = replace(settings, mislabelled=replace(settings.mislabelled, num_noisy=2, noise=0.5))
    draws = [noisy_experiment(Cifar(settings), draw).data() for draw in range(2)]
    assert all(int(images.noisy.sum()) == 2 for images in draws)
    assert all(int(images.flipped.sum()) == 50 for images in draws)
    assert not torch.equal(draws[0].inputs, draws[1].inputs)


def test_scores_of_single_images(tiny, tmp_path):
    methods = replace(tiny.settings.methods, num_models=1, proj_dim=64, trak_ridge=0.1)
    problem = problem_of(Cifar(replace(tiny.settings, methods=methods)), tmp_path)
    model, (inputs, labels) = problem.models[0], problem.samples
    losses = nn.functional.cross_entropy(model(inputs), labels, reduction="none").detach()
    torch.testing.assert_close(by_loss(model, problem), losses)
    weights = list(model.parameters())
    features = []
    for row in range(len(labels)):
        probability = model(inputs[row : row + 1]).softmax(1)[0, labels[row]]
        gradients = torch.autograd.grad(torch.logit(probability.double()), weights)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        features.append(problem.projector(flat[None])[0])
    phi = torch.stack(features).double()
    gram = phi.T @ phi
    gram += 0.1 * gram.diagonal().mean() * torch.eye(64)
    expected = [
        (1 - torch.exp(-losses[row].double())) ** 2 * phi[row] @ torch.linalg.solve(gram, phi[row])
        for row in (0, 7, 123)
    ]
    said = by_self_influence(model, problem)[[0, 7, 123]].double()
    torch.testing.assert_close(said, torch.stack(expected), rtol=1e-2, atol=1e-6)


def test_areas_are_listed_best_first():
    lines = as_text({"worse": [0.5, 0.6], "better": [1.0, 0.9]}).splitlines()
    assert lines[2] == "| better | 0.95 | 1.00, 0.90 |" and lines[3].startswith("| worse | 0.55")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_smoke_run_end_to_end_and_again(packed, tmp_path, capsys):
    flags = ["--preset", "smoke", "--data", packed, "--output", str(tmp_path)]
    assert main(PROGRAM, ["run", *flags]) == 0
    rows = json.loads((tmp_path / "table.json").read_text())
    assert {row["name"] for row in rows} == set(NAMES)
    assert set(json.loads((tmp_path / "eval_trak.json").read_text())) == set(
        grouped(replace(SMOKE.data, path=packed)).target_names
    )
    areas = json.loads((tmp_path / "mislabelled.json").read_text())
    assert all(0 <= area <= 1 for values in areas.values() for area in values)
    first = (tmp_path / "table.md").read_text()
    assert "groups with flipped labels" in first
    capsys.readouterr()
    assert main(PROGRAM, ["run", *flags]) == 0
    assert (tmp_path / "table.md").read_text() == first
