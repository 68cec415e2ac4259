"""What gradients from whole batches rest on: uses that are found, layouts, and proofs that fail."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from networks import FusedLinear
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from ksm_ext.network.engines import differentiable
from ksm_ext.network.factors import OuterProducts, total
from ksm_ext.network.gradients import collect_features, per_sample_gradients
from ksm_ext.network.hooks import Unsupported, per_sample_parts
from ksm_ext.network.outputs import cross_entropy, log_odds

f64 = torch.float64


class Net(nn.Module):
    """Words, positions first or last, a linear layer in some layout, and the mean of it."""

    def __init__(self, through, positions=5):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.inner, self.through = nn.Linear(4, 4), through

    def forward(self, ids):
        return self.head(self.through(self.inner, self.embed(ids)).tanh().mean(1))


def flattened(layer, x):
    return layer(x.reshape(-1, 4)).reshape(x.shape)


def positions_first(layer, x):
    return layer(x.transpose(0, 1)).transpose(0, 1)


def positions_first_flattened(layer, x):
    b, t, _ = x.shape
    return layer(x.transpose(0, 1).reshape(-1, 4)).reshape(t, b, 4).transpose(0, 1)


def gathered(layer, x):
    """Two experts by the sign of a feature, as a mixture of experts gathers its tokens."""
    rows, out = x.reshape(-1, 4), torch.zeros_like(x).reshape(-1, 4)
    first = rows[:, 0] > 0
    for chosen, factor in ((first, 1.0), (~first, -2.0)):
        (index,) = torch.where(chosen)
        out = out.index_add(0, index, factor * layer(rows[index]))
    return out.reshape(x.shape)


def sorted_rows(layer, x):
    """Samples in the order of their data, as packed sequences are, and then back again."""
    order = x.detach()[:, 0, 0].argsort()
    return layer(x[order])[order.argsort()]


def sorted_numbers(layer, x):
    """The same by numbers of Python's own."""
    order = x.detach()[:, 0, 0].argsort().tolist()
    rows = [None] * len(order)
    for place, i in enumerate(order):
        rows[i] = layer(torch.stack([x[j] for j in order]))[place]
    return torch.stack(rows)


LAYOUTS = [flattened, positions_first, positions_first_flattened, gathered, sorted_rows]
LAYOUTS += [sorted_numbers, lambda layer, x: layer(x)]


def words(b=6, t=3):
    return torch.randint(9, (b, t)), torch.randint(3, (b,))


def flat(gradients):
    return torch.cat([part.flatten(1) for part in gradients.values()], dim=1)


@pytest.mark.parametrize("through", LAYOUTS)
@pytest.mark.parametrize("b, t", [(6, 3), (3, 6), (4, 4), (1, 3), (2, 1), (70, 2)])
def test_rows_are_their_samples_in_every_layout(through, b, t):
    model, batch = Net(through).double(), words(b, t)
    found = per_sample_gradients(model, log_odds, batch, engine="hooks")
    expected = per_sample_gradients(model, log_odds, batch, engine="backward")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-36, 1e-43, 1e18])
def test_gradients_of_any_size_are_told_apart(scale):
    """Where numbers lose their digits, and where weights of powers of two are largest."""
    torch.manual_seed(0)
    model, batch = Net(positions_first), words(64, 3)

    def output(model, batch):
        return scale * log_odds(model, batch)

    found = per_sample_gradients(model, output, batch, engine="hooks")[1]
    expected = per_sample_gradients(model, output, batch, engine="backward")[1]
    lost = 2e-44 if scale < 1e-40 else 0.0  # a few of the least numbers that there are
    for name, gradient in found.items():
        size = float(expected[name].abs().max())
        assert (gradient - expected[name]).abs().max() <= 1e-5 * size + lost


@pytest.mark.parametrize("through", LAYOUTS)
def test_what_was_proved_of_a_batch_is_not_taken_for_another(through):
    """Batches of one shape, in which the data put other samples at the same place."""
    model = Net(through).double()
    ids, labels = words(64, 4)
    labels[:8] = labels[0]
    found = collect_features(model, (ids, labels), log_odds, batch_size=4, engine="hooks")
    expected = collect_features(model, (ids, labels), log_odds, batch_size=4, engine="backward")
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-10, atol=1e-12)


def test_a_batch_without_gradients_proves_nothing():
    """The first samples have nothing to learn: whose rows are whose is not to be seen in them."""

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, input_ids):
            x = self.embed(input_ids).transpose(0, 1)
            return self.head(x.cumsum(0)).transpose(0, 1)

    ids = torch.randint(9, (12, 4))
    labels = ids.clone()
    labels[:4, 1:] = -100
    labels[1, 1] = ids[1, 1]
    data, model = {"input_ids": ids, "labels": labels}, Causal().double()
    options = {"batch_size": 4}
    found = collect_features(model, data, cross_entropy, engine="hooks", **options)
    expected = collect_features(model, data, cross_entropy, engine="backward", **options)
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-10, atol=1e-12)


class Opaque(FusedLinear):
    """Which computes where no operation of PyTorch is seen."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.from_numpy(x.numpy() @ weight.numpy().T)


class Kept(nn.Linear):
    """Which writes what it computed into a constant of its own, by way of a view."""

    def forward(self, x):
        kept = torch.zeros(len(x), 2, 3, dtype=x.dtype)
        kept[:, 0].copy_(super().forward(x))
        return F.linear(x, self.weight) + kept.sum(1)


class Twice(nn.Linear):
    """Whose weight PyTorch shows in one place and hides in another."""

    def forward(self, x):
        return super().forward(x) + Opaque.apply(x, self.weight)


class Across(nn.Linear):
    """Whose samples see each other, however little."""

    def forward(self, x):
        x = super().forward(x)
        return x + 1e-9 * x.mean(0)


class Detached(nn.Linear):
    """Whose samples see each other where no gradient goes."""

    def forward(self, x):
        return super().forward(x / x.detach().norm())


@pytest.mark.parametrize(
    "model, reason",
    [
        (Twice(4, 3), "`weight` is used where no operation of PyTorch is to be seen"),
        (Kept(4, 3), "what is made of parameters is made of data too"),
        (Across(4, 3), "samples of a batch share what `linear` gives"),
        (Detached(4, 3), "a sample's output depends on the others: "),
        (nn.Bilinear(4, 4, 3), "there is no rule for `bilinear` of `weight`"),
        (nn.Sequential(nn.Unflatten(1, (1, 4)), nn.GRU(4, 3)), "there is no rule for `gru` of"),
    ],
)
def test_what_cannot_be_shown_is_said(model, reason):
    x, y = torch.randn(5, 4, dtype=f64), torch.randint(3, (5,))
    model = model.double()

    def output(model, batch):
        said = model(batch[0], batch[0]) if isinstance(model, nn.Bilinear) else model(batch[0])
        said = said[0][:, 0] if isinstance(said, tuple) else said
        return -F.cross_entropy(said, batch[1], reduction="none")

    with pytest.raises(Unsupported, match=reason.replace("(", r"\(")):
        parts_of(model, lambda batch: output(model, batch), (x, y))
    found = per_sample_gradients(model, output, (x, y))
    torch.testing.assert_close(
        found, per_sample_gradients(model, output, (x, y), engine="backward")
    )


def parts_of(model, function, batch):
    with differentiable(model, [name for name, _ in model.named_parameters()]) as weights:
        parts = {name: [] for name in weights}
        values = per_sample_parts(
            function, batch, weights, lambda name, part: parts[name].append(part)
        )
    return values, parts


@pytest.mark.parametrize("known", [False, True])
def test_what_was_taken_is_forgotten_as_the_pass_goes(known):
    """Activations and gradients of layers behind, also of a batch that is proved first."""
    layers = [layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.Tanh())]
    model, batch = nn.Sequential(*layers), (torch.randn(5, 4), torch.randint(4, (5,)))
    taken, alive = [], []

    def take(name, part):
        alive.append(sum(not storage.expired() for storage in taken))
        if isinstance(part, OuterProducts):
            of_part = part.activations, part.gradients
            taken.extend(StorageWeakRef(x.untyped_storage()) for x in of_part)

    proofs = {}
    with differentiable(model, [name for name, _ in model.named_parameters()]) as weights:
        for _ in range(1 + known):
            taken.clear()
            alive.clear()
            per_sample_parts(partial(log_odds, model), batch, weights, take, (), proofs)
    assert len(alive) == 24 and len(taken) == 24 and len(proofs) == 1
    assert max(alive) <= 6
    assert all(storage.expired() for storage in taken[:-4])


def test_a_linear_layer_hands_over_its_factors():
    model, batch = Net(flattened).double(), words()
    _, parts = parts_of(model, lambda batch: log_odds(model, batch), batch)
    (of_inner,) = parts["inner.weight"]
    assert isinstance(of_inner, OuterProducts)
    assert of_inner.activations.shape == of_inner.gradients.shape == (6, 3, 4)
    torch.testing.assert_close(of_inner.activations, model.embed(batch[0]).detach())
    _, expected = per_sample_gradients(model, log_odds, batch, engine="backward")
    torch.testing.assert_close(total(parts["inner.weight"]), expected["inner.weight"])
    torch.testing.assert_close(
        torch.einsum("bto,bti->boi", of_inner.gradients, of_inner.activations),
        expected["inner.weight"],
    )


@pytest.mark.parametrize(
    "layer, shape",
    [
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (5, 4, 9)),
        (nn.Conv1d(4, 6, 4, padding="same", dilation=2), (5, 4, 9)),
        (nn.Conv2d(4, 6, (2, 3), stride=(1, 2), padding=(0, 1), dilation=(2, 1)), (5, 4, 6, 5)),
        (nn.Conv2d(4, 4, 3, padding=1, groups=4, padding_mode="circular"), (5, 4, 6, 5)),
        (nn.Conv2d(4, 6, (3, 5), padding="same", bias=False), (5, 4, 6, 5)),
        (nn.Conv2d(2, 3, 3), (5, 2, 2, 6, 5)),  # two images of each sample
        (nn.Embedding(7, 4, padding_idx=2), None),
        (nn.EmbeddingBag(7, 4, mode="max", padding_idx=2), None),
        (nn.EmbeddingBag(7, 4, mode="mean", padding_idx=2), None),
        (nn.BatchNorm2d(4), (5, 4, 6, 5)),
        (nn.InstanceNorm2d(4, affine=True), (5, 4, 6, 5)),
        (nn.GroupNorm(2, 4), (5, 4, 6)),
        (nn.LayerNorm((4, 6)), (5, 3, 4, 6)),
        (nn.LayerNorm(6, bias=False), (5, 6)),
        (nn.RMSNorm(6), (5, 2, 6)),
        (nn.PReLU(4), (5, 4, 3)),
    ],
    ids=lambda value: str(value)[:30],
)
def test_layers(layer, shape):
    layer = layer.double()
    for weight in layer.parameters():
        nn.init.normal_(weight)
    x = torch.randint(7, (5, 6)) if shape is None else torch.randn(shape, dtype=f64)

    def output(model, batch):
        (x,) = batch
        folded = x.flatten(0, 1) if x.ndim == 5 else x
        return model(folded).reshape(len(x), -1).square().cos().sum(1)

    found = per_sample_gradients(layer, output, (x,), engine="hooks")
    expected = per_sample_gradients(layer, output, (x,), engine="backward")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


OPERATIONS = {
    "matmul": lambda x, w: x @ w,
    "addmm": lambda x, w: torch.addmm(w[0], x, w),
    "addmm with factors": lambda x, w: torch.addmm(w[0], x, w, beta=0.5, alpha=2.0),
    "addmm to data": lambda x, w: torch.addmm(x, x + w[0], w),
    "addmm of one row": lambda x, w: torch.addmm(w[:1], x, w),
    "bmm of experts": lambda x, w: torch.bmm(x.expand(2, -1, -1), torch.stack([w, 2 * w])).sum(0),
    "of a transpose": lambda x, w: F.linear(x, w.T),
    "of a slice": lambda x, w: F.linear(x[:, :2], w[:, :2]) + w[1],
    "of a product": lambda x, w: x @ (w @ w),
    "named arguments": lambda x, w: F.linear(input=x, weight=w, bias=w[0]),
    "in place": lambda x, w: (x + 0).mul_(w[0]).add_(w[1]).tanh(),
    "division": lambda x, w: x / (1 + w[0] ** 2) - w[1],
    "from the right": lambda x, w: 1 / (2 + w[0].tanh()) * x - (w[2] - x),
    "where": lambda x, w: torch.where(x > 0, x * w[0], w[1]),
    "cat": lambda x, w: torch.cat([x, w[:1].expand(len(x), -1)], dim=1),
    "one for each of a batch": lambda x, w: torch.stack([x, w[0].expand_as(x)], 1).flatten(1),
    "in the form of the data": lambda x, w: x + w[0].expand_as(x).to(x),
    "by index": lambda x, w: x * w[(x[:, 0] > 0).long()],
    "addcmul": lambda x, w: torch.addcmul(w[0], x, w[1], value=2.0) + torch.addcmul(x, w[0], x),
    "compared": lambda x, w: x * w[0] * (x > w[1]),
    "detached": lambda x, w: x * w[0] / w.detach().norm(),
    "scaled by a number of the parameters": lambda x, w: x * w.norm(),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_operations_of_ones_own(operation):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4, dtype=f64))

        def forward(self, x):
            return operation(x, self.w)

    def output(model, batch):
        return model(*batch).cos().sum(1)

    model, batch = Own(), (torch.randn(5, 4, dtype=f64),)
    found = per_sample_gradients(model, output, batch, engine="hooks")
    expected = per_sample_gradients(model, output, batch, engine="backward")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_a_sample_without_any_gradient_and_parameters_without_use():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "idle": nn.Linear(2, 2)}).double()
    batch = torch.randn(3, 4, dtype=f64), torch.tensor([0.0, 1.0, 0.0], dtype=f64)

    def output(model, batch):
        return model["used"](batch[0]).sum(1) * batch[1]

    _, gradients = per_sample_gradients(model, output, batch, engine="hooks")
    assert not gradients["idle.weight"].any() and gradients["idle.weight"].shape == (3, 2, 2)
    assert [bool(row.any()) for row in gradients["used.weight"]] == [False, True, False]
    _, none = per_sample_gradients(model, lambda model, batch: batch[1], batch, engine="hooks")
    assert not flat(none).any()
