"""The experiment with text: what is read and parted, the truth, the mixtures, and all of a run."""

import gzip
import json
import random
import shutil
import sqlite3
from contextlib import closing

import joblib
import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
from safetensors.torch import load_file, save_file
from scipy import stats

from experiments import comparison, table
from experiments.experiment import Run
from experiments.methods import Problem
from experiments.runner import main
from experiments.settings import load_settings
from experiments.text import mixtures
from experiments.text import pages as reading
from experiments.text.data import corpus, shared_lines
from experiments.text.drawing import shares_of, windows_of
from experiments.text.experiment import PROGRAM, Text
from experiments.text.families import family_test, nearest, of_different_domains, relations
from experiments.text.fine_tuning import (
    adapted,
    agreement,
    bases,
    fine_tune,
    fine_tuned,
    sizes,
    training_of,
)
from experiments.text.methods import TEXT_METHODS, own_share
from experiments.text.mixtures import WAYS, choose, difference, observed, regmix, trained_on
from experiments.text.settings import PRESETS, Data, FineTuning, Mixtures
from ksm_ext.scores.retraining import _run

SHARED = "a line that all languages have in common"
LETTERS = {
    "fr": "aeiou bcd",
    "it": "aeiou bcf",
    "ro": "aeiou bcg",
    "de": "uvwxyz kl",
    "nl": "uvwxyz kq",
}
TINY = (
    "data.domains=[]",
    "data.train_bytes=4000",
    "data.held_out_bytes=600",
    "data.length=16",
    "data.gradient_windows=6",
    "training.num_steps=12",
    "training.batch_size=8",
    "training.num_warmup=2",
    "methods.num_models=1",
    "methods.num_calibrated=4",
    "methods.num_estimated=10",
    "mixtures.num_random=6",
    "mixtures.chosen_seeds=2",
    "fine_tuning.learning_rate=0.02",
    "fine_tuning.num_steps=40",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Made-up text in five languages of two families: words of each one's letters."""
    root = tmp_path_factory.mktemp("text")
    for domain, letters in LETTERS.items():
        draw = random.Random(domain)
        (root / domain).mkdir()
        for page in range(8):
            lines = ["".join(draw.choices(letters, k=40)) for _ in range(30)]
            lines[3] = lines[7]  # one that is repeated
            (root / domain / f"page{page}.txt").write_text("\n".join([*lines[:9], SHARED, *lines]))
        (root / domain / f"only-{domain}.txt").write_text("a page that is in no other language")
    return root


@pytest.fixture(scope="module")
def settings(folder):
    changes = (*TINY, f"data.path={folder}")
    return load_settings(PRESETS["smoke"], None, changes)


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    """A run that is finished, by the command line."""
    output = tmp_path_factory.mktemp("run")
    flags = ["--preset", "smoke", "--jobs", "1", "--data", settings.data.path]
    flags += [f"--set={change}" for change in TINY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "NUM_RESAMPLES", 20)
        patch.setattr(mixtures, "NUM_CANDIDATES", 2000)
        assert main(PROGRAM, ["run", *flags, "--output", str(output)]) == 0
    return Run(Text(settings), output)


def scores_in(folder, name="main"):
    with closing(sqlite3.connect(folder / f"scores-{name}.sqlite")) as database:
        return set(database.execute("SELECT subset, seed, scores FROM runs"))


# -- the text -----------------------------------------------------------------------------------


def test_roff_is_read_without_its_marks():
    page = r""".\" a comment
.TH NAME 1
.SH "ÜBER SICH"
.PP
Ein \fBfettes\fR Wort, \-\-option und \(bq\*(lqso\*(rq\&.
.B dick
'\" t
.sp
"""
    found = reading.plain(page)
    assert found == "ÜBER SICH\nEin fettes Wort, --option und so.\ndick"


def test_manual_pages_are_those_in_utf8_that_are_no_link(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "MANUALS", tmp_path)
    for language, name, text in (
        ("de", "a.1", "Größe".encode()),
        ("de", "b.1", "Größe".encode("latin-1")),
        ("de", "c.1", b".so man1/a.1"),
        (".", "a.1", b"size"),
        (".", "z.1", b"never translated"),
    ):
        target = tmp_path / language / "man1" / f"{name}.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(gzip.compress(text))
    (tmp_path / "ham.py").write_text('"""Eggs."""\n\nclass A:\n    """Spam."""\n    x = "no"\n')
    monkeypatch.setattr(reading.sysconfig, "get_path", lambda name: str(tmp_path))
    found = reading.domains_of(None, ("de", "en", "python"))
    assert found["de"] == {"a.1": "Größe"} and found["en"] == {"a.1": "size"}
    assert found["python"] == {"ham.py": "Eggs.\nSpam."}
    with pytest.raises(
        ValueError, match=r"`data` must be text of every domain .* got none of fr\. "
    ):
        reading.domains_of(None, ("de", "fr", "en"))


def test_what_is_missing_is_said(folder, tmp_path):
    with pytest.raises(ValueError, match=r"got 0 domains\. Put text files into one folder"):
        corpus(Data(path=str(tmp_path / "none")))
    with pytest.raises(ValueError, match="got none of xx"):
        corpus(Data(path=str(folder), domains=("fr", "xx")))
    with pytest.raises(ValueError, match="`data` must be more than 150,000 bytes"):
        corpus(Data(path=str(folder), gradient_windows=1500, length=100))
    with pytest.raises(ValueError, match="`base_share` must be between 0 and 1, got 0"):
        Data(base_share=0.0)
    with pytest.raises(ValueError, match="`chosen_seeds` must be 2 or more, got 1"):
        Mixtures(chosen_seeds=1)
    with pytest.raises(ValueError, match="`rank` must be at least 1, got 0"):
        FineTuning(rank=0)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "page").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="`data` must be text in UTF-8"):
        corpus(Data(path=str(tmp_path), domains=("a",)))


def lines_of(data, held):
    """Whole lines of each domain, from the bytes themselves."""
    found = []
    for number, text in enumerate(data.texts):
        if held:
            windows = data.held_inputs[data.held_targets == number]
            text = windows.flatten()
        found.append(bytes(text.tolist()).decode().split("\n")[1:-1])
    return found


def test_shared_and_repeated_lines_are_gone(settings):
    data = corpus(settings.data)
    trained, held = lines_of(data, False), lines_of(data, True)
    for own, tested in zip(trained, held, strict=True):
        assert SHARED not in own + tested and len(own) > 50 and len(tested) > 5
        assert len(own + tested) == len(set(own + tested))
    pages = reading.domains_of(settings.data.path, ())
    assert shared_lines(pages) == {SHARED, "a page that is in no other language"}


def test_held_out_pages_are_the_same_everywhere(settings):
    held = corpus(settings.data).held_pages
    assert len(set(held)) == 1 and held[0] == ("page0.txt",)
    counts = corpus(settings.data).held_targets.bincount()
    assert len(set(counts.tolist())) == 1 and len(counts) == 5


def test_samples_are_text_of_their_domain_and_labels_the_next_bytes(settings):
    data = corpus(settings.data)
    assert torch.equal(data.inputs[:, 1:], data.labels[:, :-1])
    for text, (inputs, labels) in zip(data.texts, data.by_task(), strict=True):
        whole = bytes(text.tolist())
        assert len(inputs) == settings.data.gradient_windows
        for window, label in zip(inputs, labels, strict=True):
            assert bytes([*window.tolist(), int(label[-1])]) in whole


def test_another_text_has_another_fingerprint(settings, folder, tmp_path):
    for file in folder.rglob("*.txt"):
        copy = tmp_path / file.relative_to(folder)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    same = Data(**{**vars(settings.data), "path": str(tmp_path)})
    assert corpus(same).fingerprint == corpus(settings.data).fingerprint
    corpus.cache_clear()
    (tmp_path / "de" / "page5.txt").write_text("etwas anderes\n" * 2 + "x" * 500)
    assert corpus(same).fingerprint != corpus(settings.data).fingerprint


# -- the truth ----------------------------------------------------------------------------------


def test_shares_of_a_subset():
    found = shares_of(torch.tensor([True, False, True, False]), 0.2)
    assert torch.allclose(found, torch.tensor([0.45, 0.05, 0.45, 0.05]).double())
    assert torch.allclose(
        shares_of(torch.zeros(4, dtype=torch.bool), 0.2), torch.tensor(0.25).double()
    )


def test_a_step_draws_as_the_shares_say():
    texts = tuple(torch.full((100,), domain) for domain in range(3))
    shares = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        windows, domains = windows_of(texts, shares, 10, 16, generator)
        assert windows.shape == (10, 17) and bool((windows == domains[:, None]).all())
        counts = domains.bincount(minlength=3)
        assert bool(((counts - 10 * shares).abs() <= 1).all())


def test_scores_are_bits_of_the_networks_own_probabilities(settings):
    experiment = Text(settings)
    network, data = experiment.initial_model(3), corpus(settings.data)
    with torch.no_grad():
        logits = network(data.held_inputs).double()
    right = logits.softmax(2).gather(2, data.held_labels[:, :, None])[:, :, 0]
    rows = data.held_targets
    want = torch.stack([-right[rows == j].log2().mean() for j in range(5)])
    assert torch.allclose(experiment.score(network), want, atol=1e-5)


def test_networks_see_no_later_byte(settings):
    network = Text(settings).initial_model(0).eval()
    text = torch.randint(256, (2, settings.data.length))
    other = text.clone()
    other[:, 9:] = 65
    with torch.no_grad():
        first, second = network(text), network(other)
    assert torch.allclose(first[:, :9], second[:, :9], atol=1e-6)
    assert not torch.allclose(first[:, 9], second[:, 9], atol=1e-3)


def test_own_share_is_least_squares_on_the_own_column(settings):
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(12, 4, generator=generator) < 0.5
    scores = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    empty = torch.zeros(4)
    problem = Problem(Text(settings), [], masks, scores, empty, masks[:0], scores[:0])
    answer = own_share(problem)
    for target in range(4):
        design = np.c_[np.ones(12), masks[:, target].numpy()]
        line = np.linalg.lstsq(design, scores[:, target].numpy(), rcond=None)[0]
        assert float(answer.attributions[target, target]) == pytest.approx(line[1])
    assert float((answer.attributions - answer.attributions.diag().diag()).abs().max()) == 0


# -- the mixtures -------------------------------------------------------------------------------


def test_chosen_mixtures_are_mixtures_within_their_bounds(finished):
    chosen, limits = choose(finished), finished.settings.mixtures
    assert tuple(chosen) == WAYS  # as read back: all are compared with the first
    for name, shares in chosen.items():
        assert float(shares.sum()) == pytest.approx(1) and bool((shares >= 0).all())
        if name.startswith("best_mixture"):
            assert float(shares.min()) >= limits.low / 5 - 1e-9
            assert float(shares.max()) <= limits.high / 5 + 1e-9
    sizes = finished.experiment.data().num_bytes
    assert torch.allclose(chosen["natural"], sizes / sizes.sum())


def test_a_mixture_is_trained_as_a_subset_of_the_same_shares_is(finished):
    mask = torch.tensor([True, False, True, True, False])
    shares = finished.experiment.shares(mask)[None]
    mixed = trained_on(finished, shares, 1, "same")[0, 0]
    checkpoint = finished.settings.truth.checkpoint
    networks = list(map(finished.experiment.score, finished.experiment.train("main", mask, 0)))
    assert torch.equal(mixed, networks[checkpoint])


def test_what_the_surrogate_sees_has_base_shares_and_logarithms(finished):
    shares, losses = observed(finished)
    settings = finished.settings
    assert len(shares) == len(losses) == settings.truth.num_subsets + settings.mixtures.num_random
    assert torch.allclose(shares.sum(1), torch.ones(1).double())
    assert float(shares.min()) >= settings.data.base_share / 5 - 1e-9
    assert bool((losses.exp() > 1).all() and (losses.exp() < 9).all())  # 8 bits, untrained


def test_regmix_leaves_out_what_raises_the_loss(finished):
    shares = mixtures.random_mixtures(finished, 60, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "NUM_CANDIDATES", 2000)
        found = regmix(finished, shares, shares[:, 0] - shares[:, 1])
    assert float(found.sum()) == pytest.approx(1)
    assert float(found[0]) < 0.1 and float(found[1]) > 0.4  # 0.2 is the mean of all


def test_differences_have_the_interval_of_students_t():
    ours, others = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).double()
    mean, half = difference(ours, others)
    want = stats.ttest_rel(ours.numpy(), others.numpy()).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((want.low, want.high))


# -- families -----------------------------------------------------------------------------------


def test_families_that_are_there_are_found_and_others_are_not():
    names = ("de", "nl", "sv", "da", "fr", "es", "it", "pt", "python")
    family = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2])
    generator = torch.Generator().manual_seed(0)
    noise = 0.1 * torch.randn(9, 9, generator=generator, dtype=torch.float64)
    planted = noise - 1.0 * (family[:, None] == family)
    found = family_test(planted, names)
    gap, chance = found.values()
    assert gap == pytest.approx(-1, abs=0.15) and chance < 0.05
    assert family_test(noise, names)["p"] > 0.05
    assert family_test(planted[2:5, 2:5], ("sv", "da", "fr")) is None


def test_what_a_domain_does_to_all_is_no_relation():
    generator = torch.Generator().manual_seed(0)
    rows, columns = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    table = rows[:, None] + columns + torch.randn(6).double().diag()
    assert float(relations(table).abs().max()) < 1e-12


def test_pairs_of_different_domains():
    names, generator = list("abcde"), torch.Generator().manual_seed(0)
    effects = torch.randn(5, 5, generator=generator).double() * 0.01
    effects[1, 3] = effects[3, 1] = -1.0
    assert next(iter(nearest(effects, names, 3))) == "b and d"
    assert len(nearest(effects, names, 3)) == 3
    guess = 2 * effects + 1 + 100 * torch.eye(5)  # the diagonal does not count
    assert of_different_domains(effects, guess) == pytest.approx(1.0)
    others = [(i, j) for i in range(5) for j in range(5) if i != j]
    rows, columns = zip(*others, strict=True)
    guess = torch.randn(5, 5, generator=generator).double()
    expected = np.corrcoef(effects[rows, columns], guess[rows, columns])[0, 1]
    assert of_different_domains(effects, guess) == pytest.approx(expected)
    assert of_different_domains(effects, torch.eye(5)) is None


# -- fine-tuning --------------------------------------------------------------------------------


def linear_layers(network):
    return {
        name: part for name, part in network.named_modules() if isinstance(part, torch.nn.Linear)
    }


def test_adapters_start_as_the_network_and_change_weights_by_their_product(settings):
    network, data = Text(settings).initial_model(0), corpus(settings.data)
    copy = adapted(network, 3, 6.0, torch.Generator().manual_seed(0))
    layers = linear_layers(copy)
    assert layers.keys() == linear_layers(network).keys() and len(layers) == 5
    with torch.no_grad():
        assert torch.equal(copy(data.inputs), network(data.inputs))
        for name, layer in linear_layers(network).items():
            (change,) = layers[name].parametrizations.weight
            rows, columns = layer.weight.shape
            assert change.up.shape == (rows, 3) and change.down.shape == (3, columns)
            change.up.copy_(torch.randn(rows, 3))
            layer.weight += 2 * change.up @ change.down  # alpha / r is 2
        found, wanted = copy(data.inputs), network(data.inputs)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_only_adapters_have_gradients(settings):
    network, data = Text(settings).initial_model(0), corpus(settings.data)
    copy = adapted(network, 2, 4.0, torch.Generator().manual_seed(0))
    for layer in linear_layers(copy).values():
        torch.nn.init.normal_(layer.parametrizations.weight[0].up)
    copy(data.inputs).square().sum().backward()
    with_one = {name for name, weight in copy.named_parameters() if weight.grad is not None}
    assert with_one == {name for name in copy.state_dict() if name.endswith((".up", ".down"))}
    assert len(with_one) == 10
    assert all(weight.requires_grad for weight in network.parameters())  # it stays as it was


@pytest.mark.parametrize("training", ["perturbation=sam", "weight_decay=0.9", "optimizer=sgd"])
def test_fine_tuning_changes_nothing_but_by_adapters(settings, training):
    experiment = Text(load_settings(settings, None, [f"training.{training}"]))
    network = experiment.initial_model(0)
    before = {name: weight.clone() for name, weight in network.state_dict().items()}
    tuned = fine_tuned(experiment, network, torch.ones(5, dtype=torch.bool), 1).cpu()
    after = tuned.state_dict()
    for name, weight in before.items():
        assert torch.equal(network.state_dict()[name], weight)
        layer, _, kind = name.rpartition(".")
        inside = name if name in after else f"{layer}.parametrizations.{kind}.original"
        assert torch.equal(after[inside], weight)
    for name, layer in linear_layers(tuned).items():
        change = (layer.weight - before[f"{name}.weight"]).double()
        values = torch.linalg.svdvals(change.detach())
        assert float(values[1]) > 0 and float(values[2]) < 1e-4 * float(values[0])  # rank 2


def test_a_fine_tuning_is_its_seeds_and_its_domains(settings):
    experiment = Text(settings)
    network, masks = experiment.initial_model(0), torch.eye(5, dtype=torch.bool)

    def score(mask, seed):
        return experiment.score(fine_tuned(experiment, network, mask, seed))

    first = score(masks[0], 0)
    assert torch.equal(first, score(masks[0], 0))
    assert not torch.equal(first, score(masks[0], 1)) and not torch.equal(first, score(masks[1], 0))
    training = training_of(settings)
    assert training.stops() == [40] and training.learning_rate == 0.02
    assert training.batch_size == settings.training.batch_size
    assert settings.training.weight_decay > 0 and training.weight_decay == 0


def test_fine_tuned_effects_are_those_of_the_networks(finished):
    told = json.loads((finished.output / "fine_tune.json").read_text())
    experiment, networks = finished.experiment, bases(finished)
    everything, seeds = torch.ones(5, dtype=torch.bool), range(2)

    def mean_score(mask):
        runs = [
            fine_tuned(experiment, networks[seed % len(networks)], mask, seed) for seed in seeds
        ]
        return torch.stack([experiment.score(run) for run in runs]).mean(0)

    without, alone = everything.clone(), torch.zeros(5, dtype=torch.bool)
    without[3], alone[3] = False, True
    before = torch.stack([experiment.score(networks[seed % len(networks)]) for seed in seeds])
    effects = {name: torch.tensor(x).double() for name, x in told["effects"].items()}
    wanted = mean_score(everything) - mean_score(without)
    assert torch.allclose(effects["left out"][3], wanted, atol=1e-12)
    assert torch.allclose(effects["added"][3], mean_score(alone) - before.mean(0), atol=1e-12)
    loo = comparison.results_of(finished).loo.mean(0)
    assert torch.allclose(effects["from scratch"], loo, atol=1e-12)


def test_families_are_found_by_fine_tuning(finished):
    """The made-up languages: those of one family share most letters."""
    told = json.loads((finished.output / "fine_tune.json").read_text())
    family = torch.tensor(["a" in LETTERS[name] for name in told["domains"]])
    same, own = family[:, None] == family, torch.eye(5, dtype=torch.bool)
    for name in ("left out", "added", "kernel surrogate"):
        effects = torch.tensor(told["effects"][name])
        assert float(effects[same & ~own].mean()) < float(effects[~same].mean()) - 0.1
        if name != "kernel surrogate":  # of few subsets
            assert torch.equal(effects.argmin(0), torch.arange(5))  # most of all itself


def test_agreement_and_sizes_of_effects():
    generator = torch.Generator().manual_seed(0)
    runs = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    own, others = np.eye(4, dtype=bool), ~np.eye(4, dtype=bool)
    a, b = runs[0].numpy(), runs[1].numpy()
    found = agreement(runs[0], runs[1])
    for pairs, value in zip((own | others, own, others), found.values(), strict=True):
        assert value == pytest.approx(np.corrcoef(a[pairs], b[pairs])[0, 1])
    mean, table_of = runs.mean(0).numpy(), runs.numpy()
    pairs = [
        np.corrcoef(table_of[i][others], table_of[j][others])[0, 1]
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert sizes(runs) == pytest.approx(
        {
            "on itself, mean": mean[own].mean(),
            "on others, mean size": np.abs(mean[others]).mean(),
            "on others, noise of a seed": table_of[:, others].var(0, ddof=1).mean() ** 0.5,
            "a seed with another": np.mean(pairs),
        }
    )
    assert len(sizes(runs[:1])) == 2


def test_fine_tuning_goes_on_where_it_was(finished, tmp_path, monkeypatch):
    again = Run(finished.experiment, tmp_path / "run")
    shutil.copytree(finished.output, again.output)
    told = (again.output / "fine_tune.json").read_text()
    with closing(sqlite3.connect(again.output / "scores-fine-tuned.sqlite")) as database, database:
        condition = "WHERE seed = 0 AND subset LIKE '0%'"
        lost = set(database.execute(f"SELECT subset, seed FROM runs {condition}"))
        database.execute(f"DELETE FROM runs {condition}")
    (again.output / "fine_tune.json").unlink()
    trained = []

    def spy(train, subset, seed, caller):
        trained.append((subset, seed))
        return _run(train, subset, seed, caller)

    monkeypatch.setattr("ksm_ext.scores.retraining._run", spy)
    monkeypatch.setattr(table, "NUM_RESAMPLES", 20)
    with joblib.parallel_config("sequential"):
        fine_tune(again)
    assert len(lost) >= 5 and len(trained) == len(lost) and set(trained) == lost
    assert scores_in(again.output, "fine-tuned") == scores_in(finished.output, "fine-tuned")
    assert (again.output / "fine_tune.json").read_text() == told


def test_fine_tunings_of_another_network_are_refused(finished, tmp_path):
    again = Run(finished.experiment, tmp_path / "run", on_change="keep")
    shutil.copytree(finished.output, again.output)
    (path,) = (again.output / "models").glob("*seed0*")
    weights = load_file(path)
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, path)
    with pytest.raises(ValueError, match="networks"):
        fine_tune(again)


# -- a run --------------------------------------------------------------------------------------


def test_everything_is_written(finished):
    folder = finished.output
    rows = json.loads((folder / "table.json").read_text())
    assert {row["name"] for row in rows} == set(TEXT_METHODS)
    told = json.loads((folder / "mixtures.json").read_text())
    assert set(told) == set(choose(finished))
    for name in (
        "domains.png",
        "domains.json",
        "fine_tune.md",
        "mixtures.md",
        "table.md",
        "config.json",
    ):
        assert (folder / name).stat().st_size > 100
    truth = finished.settings.truth
    subsets = truth.num_subsets + finished.settings.methods.num_calibrated
    assert len(scores_in(folder)) >= subsets * truth.subset_seeds
    assert len(scores_in(folder, "chosen")) == len(told) * 2


def test_only_what_is_missing_is_trained_again(finished, tmp_path, monkeypatch):
    for name in ("scores-main.sqlite", "scores-random.sqlite"):
        (tmp_path / name).write_bytes((finished.output / name).read_bytes())
    lost = set()
    for name in ("main", "random"):
        with closing(sqlite3.connect(tmp_path / f"scores-{name}.sqlite")) as database, database:
            condition = "WHERE seed = 0 AND subset LIKE '0%'"
            rows = database.execute(f"SELECT subset, seed FROM runs {condition}")
            lost |= {(name, *row) for row in rows}
            database.execute(f"DELETE FROM runs {condition}")
    trained = []

    def spy(train, subset, seed, caller):
        trained.append((subset, seed))
        return _run(train, subset, seed, caller)

    monkeypatch.setattr("ksm_ext.scores.retraining._run", spy)
    again = Run(finished.experiment, tmp_path)
    with joblib.parallel_config("sequential"):
        for command in ("leave-one-out", "train-subsets", "train-mixtures"):
            PROGRAM.commands[command](again)
    assert set(trained) <= {(subset, seed) for _, subset, seed in lost} and len(trained) >= 5
    assert scores_in(tmp_path, "random") == scores_in(finished.output, "random")
    assert scores_in(tmp_path) <= scores_in(finished.output)
