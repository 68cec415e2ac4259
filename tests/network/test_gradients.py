"""Per-sample gradients against loops of autograd, and features whole."""

import math
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, SequentialSampler, TensorDataset

from ksm_ext import Projector
from ksm_ext.attribution.influence import influence
from ksm_ext.network import engines, gradients
from ksm_ext.network.gradients import collect_features, parameter_names, per_sample_gradients
from ksm_ext.network.outputs import (
    cross_entropy,
    log_odds,
    logit,
    margin,
    prediction,
    squared_error,
)
from ksm_ext.scores.estimation import GradientEstimator

f64 = torch.float64
ENGINES = ("hooks", "vmap", "loop", "backward")


@dataclass(frozen=True)
class Dense:
    """A projection by stored random signs, to stand in for the real ones."""

    dim: int
    seed: int = 0

    def signs(self, num_coordinates, dtype):
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (num_coordinates, self.dim), generator=generator)
        return (2 * signs - 1).to(dtype) / math.sqrt(self.dim)

    def __call__(self, x, *, offset=0, out=None):
        assert x.ndim == 2 and x.dtype in (torch.float32, f64)
        out = torch.zeros(len(x), self.dim, dtype=x.dtype) if out is None else out
        return out.add_(x @ self.signs(offset + x.shape[1], x.dtype)[offset:])


def mlp(dtype=f64, dim=4, classes=3):
    return nn.Sequential(nn.Linear(dim, 5), nn.Tanh(), nn.Linear(5, classes)).to(dtype)


class ConvNet(nn.Module):
    """What behaves differently in training: batch statistics and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3)
        self.norm = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        x = self.norm(self.conv(x)).relu()
        return self.head(self.drop(x).mean(dim=(2, 3)))


class Tied(nn.Module):
    """A language model whose embedding is its head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 5)
        self.mix = nn.Linear(5, 5)
        self.head = nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.mix(self.embed(ids)).tanh())


def table(b=11, dim=4, classes=3, dtype=f64):
    return torch.randn(b, dim, dtype=dtype), torch.randint(0, classes, (b,))


def loop(model, output, batch, names=None):
    """One backward pass after another: values, and gradients side by side (b, p)."""
    names = names or [name for name, _ in model.named_parameters()]
    weights = dict(model.named_parameters())
    values, rows = [], []
    for row in range(len(batch[0])):
        value = output(model, tuple(column[row : row + 1] for column in batch))[0]
        grads = torch.autograd.grad(value, [weights[name] for name in names])
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
        values.append(value.detach())
    return torch.stack(values), torch.stack(rows)


def flat(gradients):
    return torch.cat([g.flatten(1) for g in gradients.values()], dim=1)


near = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)


# Per-sample gradients


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("output", [log_odds, margin, cross_entropy, logit])
def test_gradients_are_those_of_a_loop(output, engine):
    model, batch = mlp(), table()
    values, gradients = per_sample_gradients(model, output, batch, engine=engine)
    expected = loop(model, output, batch)
    assert list(gradients) == [name for name, _ in model.named_parameters()]
    assert gradients["0.weight"].shape == (11, 5, 4)
    near((values, flat(gradients)), expected)
    assert not values.requires_grad and not flat(gradients).requires_grad


@pytest.mark.parametrize("output", [prediction, squared_error])
def test_gradients_of_a_regression(output):
    model, batch = mlp(classes=1), (torch.randn(6, 4, dtype=f64), torch.randn(6, dtype=f64))
    values, gradients = per_sample_gradients(model, output, batch)
    near((values, flat(gradients)), loop(model, output, batch))


def test_an_output_of_ones_own_and_several_inputs():
    class Bilinear(nn.Linear):
        def forward(self, left, right):
            return (super().forward(left) * right).sum(dim=1)

    bilinear = Bilinear(3, 4).double()
    batch = torch.randn(5, 3, dtype=f64), torch.randn(5, 4, dtype=f64)

    def energy(model, batch):
        return model(*batch).square()

    values, gradients = per_sample_gradients(bilinear, energy, batch)
    near((values, flat(gradients)), loop(bilinear, energy, batch))


def test_evaluation_mode_while_it_lasts_and_nothing_changed_after():
    model = ConvNet().double()
    model(torch.randn(16, 1, 6, 6, dtype=f64))  # running statistics that are not the default
    model.drop.eval()  # flags of its own
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    batch = torch.randn(7, 1, 6, 6, dtype=f64), torch.randint(0, 4, (7,))
    values, gradients = per_sample_gradients(model, log_odds, batch)
    assert [module.training for module in model.modules()] == flags
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(weight.grad is None for weight in model.parameters())
    near((values, flat(gradients)), loop(model.eval(), log_odds, batch))


def test_flags_come_back_after_an_error():
    model = mlp().train()
    with pytest.raises(ValueError, match=r"-> \(b,\), got shape \(1, 3\) for a batch of one"):
        per_sample_gradients(model, lambda model, batch: model(batch[0]), table())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "output",
    [
        lambda model, sample: model(sample[0][None])[0, 0],  # of a sample, without the b
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),  # the mean of a batch
        lambda model, batch: model(batch[0])[:, :1],
        lambda model, batch: model(batch[0]).sum(),
    ],
)
def test_an_output_that_is_not_one_number_for_each_sample(output, engine):
    form = (
        r"`output` must be a function \(model, batch\) -> \(b,\), got shape .* for a batch of one "
    )
    with pytest.raises(ValueError, match=form + "sample. Return one number for each of the b sam"):
        per_sample_gradients(mlp(), output, table(), engine=engine)


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 50])
def test_chunks_do_not_matter(chunk_size):
    model, batch = mlp(), table()
    values, gradients = per_sample_gradients(model, log_odds, batch)
    again, pieces = per_sample_gradients(model, log_odds, batch, chunk_size=chunk_size)
    torch.testing.assert_close(again, values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(pieces), flat(gradients), rtol=1e-12, atol=1e-12)


def test_a_shared_parameter_counts_once_and_gathers_both_uses():
    model = Tied().double()
    assert parameter_names(model) == ["embed.weight", "mix.weight", "mix.bias"]
    assert parameter_names(model, "head.weight") == ["embed.weight"]
    batch = torch.randint(0, 7, (5, 6)), torch.randint(0, 7, (5, 6))
    values, gradients = per_sample_gradients(model, log_odds, batch)
    near((values, flat(gradients)), loop(model, log_odds, batch))


@pytest.mark.cuda
def test_gradients_on_cuda_are_those_on_the_cpu():
    model, batch = mlp(), table()
    expected = collect_features(model, batch, log_odds)
    features = collect_features(model.cuda(), batch, log_odds)
    assert features.gradients.is_cuda
    torch.testing.assert_close(features.gradients.cpu(), expected.gradients)


def test_control_flow_that_depends_on_the_data(caplog):
    class Gate(nn.Linear):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    model, batch = Gate(4, 3).double(), table()
    form = r"`engine` must be one that can, got 'vmap', which cannot \(.*\) for Gate. Pass engine="
    with pytest.raises(RuntimeError, match=form):
        per_sample_gradients(model, log_odds, batch, engine="vmap")
    _, gradients = per_sample_gradients(model, log_odds, batch)
    near(flat(gradients), loop(model, log_odds, batch)[1])
    assert "Gate by 'loop', which takes as many passes as there are samples, not " in caplog.text
    assert "'hooks', which cannot (a sample's output depends on the others: " in caplog.text
    caplog.clear()
    per_sample_gradients(model, log_odds, batch)
    assert not caplog.text  # it was told


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_weight_used_beside_the_modules_is_never_left_out(engine):
    model, batch = mlp(), table()
    held = [*model.parameters()]

    def output(network, batch):
        return log_odds(network, batch) + held[0].square().sum()

    with pytest.raises(RuntimeError, match=r"`0.weight` is used beside the model's own modules"):
        per_sample_gradients(model, output, batch, engine=engine)
    expected = loop(model, output, batch)[1]
    for able in ("auto", "hooks", "backward"):
        near(flat(per_sample_gradients(model, output, batch, engine=able)[1]), expected)


def test_engines_that_there_are():
    form = "`engine` must be one of 'auto', 'hooks', 'vmap', 'loop', 'backward', got 'fast'. 'auto'"
    for ask in (
        lambda: per_sample_gradients(mlp(), log_odds, table(), engine="fast"),
        lambda: collect_features(mlp(), table(), log_odds, engine="fast"),
        lambda: GradientEstimator(mlp(), [table()], table(), engine="fast"),
        lambda: influence(mlp(), [table()], table(), engine="fast"),
    ):
        with pytest.raises(ValueError, match=form):
            ask()


def test_an_error_of_the_model_stays_what_it_is():
    with pytest.raises(ValueError, match="`labels` must be from 0 to 2, got 3 for 3 classes"):
        per_sample_gradients(mlp(), log_odds, (torch.randn(2, 4, dtype=f64), torch.tensor([0, 3])))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        per_sample_gradients(mlp(), log_odds, table(dim=6))


# Parameters


def test_parameters_by_name_and_pattern():
    model = mlp()
    assert parameter_names(model) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert parameter_names(model, ["2.*", "0.bias", "*bias"]) == ["0.bias", "2.weight", "2.bias"]
    model[0].requires_grad_(False)
    assert parameter_names(model) == ["2.weight", "2.bias"]
    assert parameter_names(model, "0.*") == ["0.weight", "0.bias"]
    batch = table()
    _, gradients = per_sample_gradients(model, log_odds, batch, parameters="2.bias")
    assert list(gradients) == ["2.bias"]
    torch.testing.assert_close(flat(gradients), loop(model, log_odds, batch, ["2.bias"])[1])


def test_unknown_parameters():
    form = r"`parameters` must be names or patterns of parameters, got '2.wieght'\. Did you mean '2"
    with pytest.raises(ValueError, match=form):
        parameter_names(mlp(), ["0.bias", "2.wieght"])
    with pytest.raises(ValueError, match=r"got '\*lora_\*'\. Did you mean '0.weight'"):
        parameter_names(mlp(), "*lora_*")
    form = "`model` must be a module with parameters that require a gradient, got a Sequential wit"
    with pytest.raises(ValueError, match=form):
        parameter_names(mlp().requires_grad_(False))


# Features


@pytest.mark.parametrize("projector", [None, Dense(6)], ids=["whole", "projected"])
def test_features_are_the_projected_gradients(projector):
    model, batch = mlp(), table()
    features = collect_features(model, batch, log_odds, projector, batch_size=4)
    values, gradients = loop(model, log_odds, batch)
    if projector is not None:
        gradients = gradients @ projector.signs(gradients.shape[1], f64)
    assert len(features) == 11 and features.gradients.dtype == f64
    near((features.values, features.gradients), (values, gradients))


class Samples(Dataset):
    def __init__(self, batch):
        self.batch = batch

    def __len__(self):
        return len(self.batch[0])

    def __getitem__(self, row):
        return tuple(column[row] for column in self.batch)


def test_the_batches_of_the_loader_do_not_matter_to_a_bit():
    model, batch = mlp(torch.float32), table(dtype=torch.float32)

    def collect(data):
        return collect_features(model, data, log_odds, Dense(6), batch_size=4)

    expected = collect(batch)
    loaders = [DataLoader(TensorDataset(*batch), batch_size=size) for size in (1, 2, 3, 5, 11, 64)]
    for data in [Samples(batch), list(Samples(batch)), *loaders]:
        features = collect(data)
        assert torch.equal(features.values, expected.values)
        assert torch.equal(features.gradients, expected.gradients)


@pytest.mark.parametrize("batch_size", [1, 3, 8, 11, 100])
def test_samples_computed_together_do_not_matter_but_for_rounding(batch_size):
    model, batch = mlp(), table()
    expected = collect_features(model, batch, log_odds, Dense(6))
    features = collect_features(
        model, batch, log_odds, Dense(6), batch_size=batch_size, progress=False
    )
    torch.testing.assert_close(features.values, expected.values, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(features.gradients, expected.gradients, rtol=1e-12, atol=1e-12)


def test_a_batch_norm_network_in_training_mode_gives_each_sample_its_own_feature():
    model = ConvNet().double().train()
    batch = torch.randn(10, 1, 6, 6, dtype=f64), torch.randint(0, 4, (10,))
    whole = collect_features(model, batch, log_odds)
    part = collect_features(
        model, tuple(column[7:] for column in batch), log_odds, batch_size=2, progress=False
    )
    torch.testing.assert_close(part.gradients, whole.gradients[7:], rtol=1e-12, atol=1e-12)


def test_batches_padded_to_lengths_of_their_own():
    model = Tied().double()
    samples = [torch.randint(0, 7, (length,)) for length in (3, 5, 4, 4, 6, 2, 2)]

    def padded(rows):
        length = max(len(row) for row in rows)
        ids = torch.stack([F.pad(row, (0, length - len(row))) for row in rows])
        labels = torch.stack([F.pad(row, (0, length - len(row)), value=-100) for row in rows])
        return {"ids": ids, "labels": labels}

    expected = collect_features(
        model, DataLoader(samples, batch_size=1, collate_fn=padded), log_odds, progress=False
    )
    for size in (2, 3, 7):
        loader = DataLoader(samples, batch_size=size, collate_fn=padded)
        features = collect_features(model, loader, log_odds, batch_size=2)
        torch.testing.assert_close(features.gradients, expected.gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, f64, torch.bfloat16])
def test_dtypes(dtype):
    model, batch = mlp(), table()
    expected = collect_features(model, batch, log_odds, Dense(6))
    narrow = (batch[0].to(dtype), batch[1])
    features = collect_features(model.to(dtype), narrow, log_odds, Dense(6))
    wide = f64 if dtype == f64 else torch.float32
    assert features.values.dtype == features.gradients.dtype == wide
    tolerance = {torch.float32: 1e-5, f64: 1e-12, torch.bfloat16: 5e-2}[dtype]
    for name in ("values", "gradients"):
        found, true = getattr(features, name), getattr(expected, name)
        assert (found - true).norm() < tolerance * true.norm()


def test_the_global_random_state_is_left_alone():
    model, batch = mlp(), table()
    before = torch.random.get_rng_state()
    collect_features(model, batch, log_odds, Dense(6))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_progress_bar(capsys):
    collect_features(mlp(), table(), log_odds, batch_size=4)
    assert capsys.readouterr().err == ""
    collect_features(mlp(), table(), log_odds, batch_size=4, progress=True)
    assert "11/11" in capsys.readouterr().err


def loader(**how):
    return DataLoader(TensorDataset(*table()), **how)


@pytest.mark.parametrize(
    ("data", "error", "form"),
    [
        (loader(shuffle=True), ValueError, "in order, got samples drawn by RandomSampler. Build"),
        (loader(batch_size=3, drop_last=True), ValueError, "in order, got drop_last=True. Build"),
        (loader(batch_sampler=[[0, 1]]), ValueError, "in order, got samples drawn by list"),
        (loader(batch_size=None), ValueError, "in order, got samples drawn by NoneType"),
        (3, TypeError, "`data` must be samples by number, got int. Pass a DataLoader, a Dat"),
        ([], ValueError, "`data` must be at least one sample, got none. Check"),
        (table()[:1] + table(b=3)[1:], ValueError, r"per sample, got shape \(11, 4\) and shape"),
        ({"x": torch.zeros(3), "y": torch.zeros(4)}, ValueError, r"got shape \(3\) and shape \(4"),
        ([torch.zeros(4)], TypeError, "batches that are tuples or dicts, got Tensor. Collate"),
        ([{"x": torch.zeros(4), "text": "a"}], TypeError, "batches of tensors, got list in text"),
    ],
    ids=lambda value: "",
)
def test_what_is_no_data(data, error, form):
    with pytest.raises(error, match=form):
        collect_features(mlp(), data, log_odds)


def test_a_loader_in_order_by_its_own_sampler():
    data = TensorDataset(*table())
    loader = DataLoader(data, sampler=SequentialSampler(data), batch_size=4)
    assert len(collect_features(mlp(), loader, log_odds)) == 11


def test_samples_that_are_not_finite_are_named():
    x, y = table()
    x[7, 0] = torch.nan
    form = r"`output` must be finite, got NaN or infinity, or such a gradient, on samples 7\. Look"
    with pytest.raises(ValueError, match=form):
        collect_features(mlp(), (x, y), log_odds, batch_size=4)
    with pytest.raises(ValueError, match="`batch_size` must be at least 1, got 0"):
        collect_features(mlp(), table(), log_odds, batch_size=0)


# HuggingFace models


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers")


def causal(transformers):
    config = transformers.GPT2Config(
        vocab_size=19, n_positions=12, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).double()


def prompts():
    ids = torch.randint(0, 19, (5, 9))
    labels = ids.masked_fill(torch.arange(9) < 6, -100)
    labels[0, 8] = -100
    return {"input_ids": ids, "labels": labels}


def named_loop(model, output, batch, names):
    """:func:`loop` for samples that are dicts."""
    keys = list(batch)

    def of_tuple(model, batch):
        return output(model, dict(zip(keys, batch, strict=True)))

    return loop(model.eval(), of_tuple, tuple(batch.values()), names)


@pytest.mark.parametrize("output", [log_odds, cross_entropy, margin])
def test_a_causal_language_model(transformers, output):
    model, batch = causal(transformers), prompts()
    values, gradients = per_sample_gradients(model, output, batch)
    expected = named_loop(model, output, batch, list(gradients))
    assert "lm_head.weight" not in gradients
    near((values, flat(gradients)), expected)


def test_the_loss_of_a_causal_language_model_is_its_own(transformers):
    model, batch = causal(transformers).eval(), prompts()
    values, _ = per_sample_gradients(model, cross_entropy, batch)
    for row, value in enumerate(values):
        one = {name: column[row : row + 1] for name, column in batch.items()}
        tokens = (one["labels"][:, 1:] != -100).sum()
        assert (model(**one).loss * tokens).item() == pytest.approx(value.item(), rel=1e-5)


def classifier(transformers):
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 12}
    config = transformers.BertConfig(vocab_size=19, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).double()


def test_a_sequence_classifier(transformers):
    model = classifier(transformers)
    batch = {"input_ids": torch.randint(0, 19, (5, 9)), "labels": torch.tensor([0, 1, 2, 0, 1])}
    values, gradients = per_sample_gradients(model, log_odds, batch)
    near((values, flat(gradients)), named_loop(model, log_odds, batch, list(gradients)))


@pytest.mark.parametrize("engine", ["hooks", "loop", "backward"])
def test_an_attention_mask(transformers, engine):
    """Transformers looks whether a mask masks anything, which differs between samples."""
    model, ids = classifier(transformers), torch.randint(0, 19, (3, 9))
    mask = torch.arange(9) < torch.tensor([9, 4, 6])[:, None]
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([0, 1, 2])}
    _, gradients = per_sample_gradients(model, log_odds, batch, engine=engine)
    short = {"input_ids": ids[1:2, :4], "labels": batch["labels"][1:2]}
    _, alone = per_sample_gradients(model, log_odds, short)
    torch.testing.assert_close(flat(gradients)[1:2], flat(alone), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # in peft
def test_low_rank_adapters(transformers):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.5
    )
    model = peft.get_peft_model(causal(transformers), config).double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zeros at first, which would make half the gradients zero
            nn.init.normal_(weight, std=0.1)
    names = parameter_names(model, "*lora_*")
    assert len(names) == 4 and names == parameter_names(model)
    batch = prompts()
    samples = [{name: column[row] for name, column in batch.items()} for row in range(5)]
    features = collect_features(
        model, samples, log_odds, parameters="*lora_*", batch_size=2, progress=False
    )
    expected = named_loop(model, log_odds, batch, names)
    near((features.values, features.gradients), expected)


def test_batches_are_chosen_by_what_a_pass_keeps(monkeypatch):
    """The outputs of a deep network by hand: tanh keeps what it gives, a layer what it is given."""
    width, depth = 50, 4
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(width, 3))
    x, y = torch.randn(40, width), torch.randint(3, (40,))
    names = [name for name, _ in model.named_parameters()]
    logits = (torch.randn(2, 3), y[:2])
    of_output = engines.held_bytes(nn.Linear(3, 3), log_odds, logits, ["weight"])
    held = engines.held_bytes(model, log_odds, (x[:2], y[:2]), names)
    assert held == of_output + 2 * depth * width * 4
    seen = []
    call = engines.Ladder.__call__

    def spied(ladder, model, output, batch, *others):
        seen.append(len(batch[1]))
        return call(ladder, model, output, batch, *others)

    monkeypatch.setattr(engines.Ladder, "__call__", spied)
    each = held // 2 + 4 * width  # and the largest bias
    for budget, size in ((each, 1), (10 * each + 1, 10), (1, 1), (10**9, 40)):
        seen.clear()
        monkeypatch.setattr(gradients, "PASS_BYTES", {"cpu": budget})
        features = collect_features(model, (x, y), log_odds, Projector(8))
        assert max(seen) == size
    torch.testing.assert_close(
        features.gradients, collect_features(model, (x, y), log_odds, Projector(8)).gradients
    )
