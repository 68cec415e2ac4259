"""Data in the forms that people have them in are the same data."""

import collections

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, StackDataset, TensorDataset

from ksm_ext import GradientEstimator, attribute_tasks, collect_features
from ksm_ext.attribution.influence import influence
from ksm_ext.attribution.tracin import tracin
from ksm_ext.attribution.trak import trak
from ksm_ext.network.batches import as_dataset, task_datasets
from ksm_ext.network.outputs import cross_entropy, log_odds
from ksm_ext.ops.project import Projector

X, Y = torch.randn(9, 4, generator=torch.Generator().manual_seed(1)), torch.arange(9) % 3
Pair = collections.namedtuple("Pair", "x y")


class Once(IterableDataset):
    """Samples one after another, of which nobody knows the number."""

    def __init__(self, samples):
        self.samples = samples

    def __iter__(self):
        return iter(self.samples)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids) * attention_mask[..., None]
        return self.head(x.sum(1) / attention_mask.sum(1, keepdim=True))


SAMPLES = list(zip(X, Y, strict=True))
FORMS = {
    "arrays": (X.numpy(), Y.numpy()),
    "an array and a tensor": (X.numpy(), Y),
    "arrays to be read only": (np.broadcast_to(X.numpy(), X.shape), Y.numpy()),
    "samples": SAMPLES,
    "a loader": DataLoader(TensorDataset(X, Y), batch_size=4),
    "a loader of named tuples": DataLoader(
        SAMPLES,
        batch_size=4,
        collate_fn=lambda rows: Pair(*map(torch.stack, zip(*rows, strict=True))),
    ),
    "a loader of arrays": DataLoader(
        SAMPLES,
        batch_size=4,
        collate_fn=lambda rows: tuple(np.stack(column) for column in zip(*rows, strict=True)),
    ),
    "samples that are read once": Once(SAMPLES),
    "a loader of samples that are read once": DataLoader(Once(SAMPLES), batch_size=4),
}
every_form = pytest.mark.parametrize("form", FORMS)


def model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@every_form
def test_features_do_not_know_the_form_of_their_data(form):
    expected = collect_features(model(), (X, Y), log_odds, batch_size=3)
    found = collect_features(model(), FORMS[form], log_odds, batch_size=3)
    assert torch.equal(found.gradients, expected.gradients)
    assert torch.equal(found.values, expected.values)


@every_form
def test_tasks_and_targets_come_in_every_form(form):
    tasks, few = [(X, Y), (X[:4], Y[:4]), (X[4:], Y[4:])], (X[2:5], Y[2:5])
    methods = {
        "trak": lambda tasks, target: (
            trak(model(), tasks, target, projector=Projector(2), relative_ridge=0.1).values
        ),
        "tracin": lambda tasks, target: tracin(model(), 0.1, tasks, target),
        "influence": lambda *data: influence(model(), *data, damping=1.0).values,
        "estimator": lambda *data: (
            GradientEstimator(model(), *data).fit().predict(torch.eye(3) > 0)
        ),
    }
    for method in methods.values():
        expected = method(tasks, few)
        assert torch.equal(method([FORMS[form], *tasks[1:]], few), expected)
        assert torch.equal(method(dict(zip("abc", tasks, strict=True)), few), expected)
        torch.testing.assert_close(method(tasks, FORMS[form]), method(tasks, (X, Y)))


def test_tasks_by_name_name_the_answers():
    tasks = {"x": (X, Y), "y": (X[:4], Y[:4]), "z": (X[4:], Y[4:])}
    found = attribute_tasks(model(), tasks, (X, Y))
    assert found.estimator.task_names == found.surrogate.task_names == ("x", "y", "z")
    named = attribute_tasks(model(), tasks, (X, Y), task_names=["1", "2", "3"])
    assert named.surrogate.task_names == ("1", "2", "3")
    assert torch.equal(named.values, attribute_tasks(model(), [*tasks.values()], (X, Y)).values)


def test_a_data_set_of_huggingface_with_its_collator():
    transformers = pytest.importorskip("transformers")

    class Tokenizer:  # as much of one as pads
        padding_side = "right"

        def __init__(self):
            self.deprecation_warnings = {"Asking-to-pad-a-fast-tokenizer": True}

        def pad(self, features, **options):
            longest = max(len(row["input_ids"]) for row in features)
            ids = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in features]
            ids = torch.tensor(ids)
            labels = torch.tensor([row["label"] for row in features])
            return {"input_ids": ids, "attention_mask": (ids > 0).long(), "label": labels}

    samples = [{"input_ids": [1 + i, 2, 3][: 1 + i % 3], "label": i % 3} for i in range(6)]
    collator = transformers.DataCollatorWithPadding(Tokenizer())
    loader = DataLoader(samples, batch_size=2, collate_fn=collator)
    torch.manual_seed(0)
    network = Words()
    whole = collator(samples)
    expected = collect_features(network, dict(whole), cross_entropy)
    found = collect_features(network, loader, cross_entropy)
    torch.testing.assert_close(found.gradients, expected.gradients)
    raw = StackDataset(input_ids=whole["input_ids"], label=whole["labels"])
    with pytest.raises(ValueError, match=r"got `input_ids`, `label`\. Rename `label`, as DataCol"):
        collect_features(network, raw, cross_entropy)


def test_a_dataset_stays_what_it_is():
    data = TensorDataset(X, Y)
    assert as_dataset(data) is data
    datasets, named = task_datasets([data], {"a": data})
    assert datasets == [data] and named == {"a": data}


@pytest.mark.parametrize(
    ("tasks", "error", "form"),
    [
        (
            (X, Y),
            TypeError,
            "`tasks` must be several data sets, got tensors. Put a tuple or a dict",
        ),
        ({"x": X, "y": Y}, TypeError, "`tasks` must be several data sets, got tensors. Put a tup"),
        ([], ValueError, "`tasks` must be one data set or more, got none. Pass some."),
        ({}, ValueError, "`tasks` must be one data set or more, got none. Pass some."),
    ],
)
def test_what_are_no_tasks(tasks, error, form):
    with pytest.raises(error, match=form):
        task_datasets(tasks, (X, Y))


@pytest.mark.parametrize("label", [3, -1, -100])
def test_labels_out_of_range_are_named(label):
    labels = Y.clone()
    labels[4] = label
    form = rf"`labels` must be from 0 to 2, got {label} for 3 classes\. Number the classes from 0"
    for output in (log_odds, cross_entropy):
        with pytest.raises(ValueError, match=form):
            collect_features(model(), (X, labels), output)


def test_an_error_of_the_output_is_not_blamed_on_the_network():
    def output(model, batch):
        return model(batch[0]).log_softmax(-1)[batch[1]][:, 0]

    with pytest.raises(IndexError, match="out of bounds"):
        collect_features(model(), (X, Y), output)


def test_an_output_is_given_the_network_with_its_attributes():
    class Scaled(nn.Linear):
        factor = 2.0

        def features(self, x):
            return self.factor * self(x)

    def output(model, batch):
        return model.features(batch[0]).gather(1, batch[1][:, None])[:, 0]

    torch.manual_seed(0)
    network = Scaled(4, 3)
    expected = collect_features(network, (X, Y), output, engine="backward")
    for engine in ("hooks", "vmap", "loop"):
        found = collect_features(network, (X, Y), output, engine=engine)
        assert found.engine == engine and found.gradients.any()
        torch.testing.assert_close(found.gradients, expected.gradients)


class Fewer(Dataset):
    def __len__(self):
        return 0

    def __getitem__(self, row):
        raise IndexError(row)


def test_no_samples():
    for none in (Fewer(), Once([]), (X[:0], Y[:0])):
        with pytest.raises(ValueError, match="`data` must be at least one sample, got none"):
            collect_features(model(), none, log_odds)
