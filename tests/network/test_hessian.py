from functools import partial

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, linear
from torch.utils.data import DataLoader, TensorDataset

from experiments.modular_arithmetic.model import Transformer
from ksm_ext import FactoredProjector, Projector, collect_features
from ksm_ext.network.ekfac import EKFAC
from ksm_ext.network.hessian import GaussNewton, Hessian, checked_vectors, flatten, loss_gradients
from ksm_ext.network.outputs import log_odds


def mlp(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    return net, (torch.randn(11, 4).double(), torch.randint(3, (11,)))


def convolution(seed=0):
    torch.manual_seed(seed)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Dropout()
    net = nn.Sequential(*layers, nn.Linear(12, 3)).double()
    net(torch.randn(8, 1, 4, 4).double())  # running statistics that are not the initial ones
    return net, (torch.randn(6, 1, 4, 4).double(), torch.randint(3, (6,)))


def transformer(seed=0):
    torch.manual_seed(seed)
    net = Transformer(6, 4, width=4, num_layers=2, num_heads=2, activation="gelu").double()
    return net, (torch.randint(6, (5, 4)), torch.randint(6, (5,)))


MODELS = {"mlp": mlp, "convolution": convolution, "transformer": transformer}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


def weights_of(model):
    return {name: weight.detach() for name, weight in model.named_parameters()}


def dense(model, batch, loss=cross_entropy):
    """The Hessian (p, p) by torch.func, in one piece."""
    weights = weights_of(model.eval())
    sizes = [weight.numel() for weight in weights.values()]

    def total(vector):
        parts = vector.split(sizes)
        named = {n: x.view(w.shape) for (n, w), x in zip(weights.items(), parts, strict=True)}
        return loss(functional_call(model, named, batch[:-1]), batch[-1])

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        # not torch.func.hessian, whose forward over vmapped reverse is wrong for layer_norm
        return torch.func.jacfwd(torch.func.grad(total))(flatten(weights))


def dense_ggn(model, batch):
    """Σ Jᵀ (diag p - p pᵀ) J / b, sample by sample."""
    weights = weights_of(model.eval())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        jacobians = torch.func.jacrev(lambda w: functional_call(model, w, batch[:-1]))(weights)
        logits = model(*batch[:-1]).detach()
    total = 0
    for i, row in enumerate(logits.softmax(1)):
        jacobian = torch.cat([part[i].flatten(1) for part in jacobians.values()], dim=1)
        total = total + jacobian.T @ (row.diag() - row.outer(row)) @ jacobian
    return total / len(logits)


@every_model
def test_products_are_those_of_the_dense_matrices(make):
    model, batch = make()
    for operator, matrix in (
        (Hessian(model, batch), dense(model, batch)),
        (GaussNewton(model, batch), dense_ggn(model, batch)),
    ):
        assert operator.shape == tuple(matrix.shape) and operator.num_samples == len(batch[-1])
        eye = torch.eye(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(operator(eye), matrix, rtol=1e-10, atol=1e-12)
        x = torch.randn(len(matrix), 3, dtype=torch.float64)
        torch.testing.assert_close(operator @ x, matrix @ x, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(operator(x[:, 0]), matrix @ x[:, 0], rtol=1e-10, atol=1e-12)
        assert not operator(x[:, 0]).requires_grad


@every_model
def test_gradients(make):
    model, batch = make()
    model.eval()
    cross_entropy(model(*batch[:-1]), batch[-1]).backward()
    expected = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    torch.testing.assert_close(Hessian(model, batch).gradient(), expected)
    parts = [tuple(column[rows] for column in batch) for rows in (slice(2), slice(2, None))]
    sums = loss_gradients(model, parts)
    torch.testing.assert_close(sums.sum(0), expected * len(batch[-1]))


@every_model
def test_slopes_and_gradients_of_each_sample(make):
    model, batch = make()
    operator = Hessian(model, batch, batch_size=4)
    each = loss_gradients(
        model, [tuple(c[i : i + 1] for c in batch) for i in range(len(batch[-1]))]
    )
    torch.testing.assert_close(operator.per_sample_gradients(), each)
    v = torch.randn(3, operator.shape[0], dtype=torch.float64)
    torch.testing.assert_close(operator.per_sample_slopes(v), v @ each.T)


@every_model
def test_third_derivatives_are_differences_of_hessians(make):
    model, batch = make()
    operator = Hessian(model, batch, batch_size=4, vectors_per_pass=2)
    u, v = torch.randn(2, 3, operator.shape[0], dtype=torch.float64)
    third = operator.third(u, v)
    torch.testing.assert_close(operator.third(v, u), third)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def moved(step, i):
        torch.nn.utils.vector_to_parameters(start + step * u[i], model.parameters())
        return Hessian(model, batch)(v[i])

    for i in range(3):
        difference = (moved(1e-4, i) - moved(-1e-4, i)) / 2e-4
        scale = float(difference.abs().max())
        torch.testing.assert_close(third[i], difference, rtol=1e-4, atol=1e-5 * scale)


@every_model
def test_curvature_of_each_sample(make):
    model, batch = make()
    v = torch.randn(2, Hessian(model, batch).shape[0], dtype=torch.float64)
    for kind in (Hessian, GaussNewton):
        alone = [kind(model, tuple(c[i : i + 1] for c in batch)) for i in range(len(batch[-1]))]
        expected = torch.stack([(v * operator(v)).sum(1) for operator in alone], dim=1)
        torch.testing.assert_close(kind(model, batch).per_sample_quadratic(v), expected)


def test_curvature_of_a_layer_norm_is_that_of_differences():
    """Differentiating torch's forward derivative of layer_norm gives another number."""
    model, batch = transformer()
    operator = Hessian(model, batch)
    v = torch.randn(operator.shape[0], dtype=torch.float64)
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach().clone()

    def losses(step):
        torch.nn.utils.vector_to_parameters(start + step * v, model.parameters())
        with torch.no_grad():
            return cross_entropy(model(batch[0]), batch[1], reduction="none")

    step = 1e-4
    second = (losses(step) + losses(-step) - 2 * losses(0)) / step**2  # and back at the start
    torch.testing.assert_close(operator.per_sample_quadratic(v)[0], second, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(operator(v) @ v, second.mean(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_nothing_depends_on_batches_passes_or_threads(kind):
    model, batch = mlp()
    v = torch.randn(7, kind(model, batch).shape[0], dtype=torch.float64)
    whole = kind(model, batch)(v)
    for size in (1, 3, 5, 100):
        loader = DataLoader(TensorDataset(*batch), batch_size=size)
        assert torch.equal(kind(model, loader)(v), whole)
        assert torch.equal(kind(model, loader, batch_size=11)(v), whole)
        torch.testing.assert_close(
            kind(model, batch, batch_size=size)(v), whole, rtol=1e-12, atol=1e-14
        )
        in_passes = kind(model, batch, vectors_per_pass=size)(v)
        torch.testing.assert_close(in_passes, whole, rtol=1e-12, atol=1e-14)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        torch.testing.assert_close(kind(model, batch)(v), whole, rtol=1e-12, atol=1e-14)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind, peers", [(Hessian, "Hessian"), (GaussNewton, "GGN")])
def test_curvlinops_agrees(kind, peers):
    curvlinops = pytest.importorskip("curvlinops")
    model, batch = mlp()
    model.eval()
    peer = getattr(curvlinops, f"{peers}LinearOperator")(
        model, nn.CrossEntropyLoss(), list(model.parameters()), [batch]
    )
    ours = kind(model, batch)
    x = torch.randn(ours.shape[0], 3, dtype=torch.float64)
    torch.testing.assert_close(ours @ x, peer @ x, rtol=1e-10, atol=1e-12)


def test_chosen_parameters_are_a_block_of_the_matrix():
    model, batch = mlp()
    matrix = dense(model, batch)
    head = Hessian(model, batch, parameters="2.*")
    assert list(head.parameter_shapes) == ["2.weight", "2.bias"]
    eye = torch.eye(18, dtype=torch.float64)
    torch.testing.assert_close(head(eye), matrix[-18:, -18:], rtol=1e-10, atol=1e-12)
    model[0].requires_grad_(False)
    torch.testing.assert_close(Hessian(model, batch)(eye), head(eye))


def test_a_shared_parameter_counts_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x).sum(1))

    torch.manual_seed(0)
    model = Tied().double()
    batch = torch.randint(5, (7, 2)), torch.randint(5, (7,))
    operator = Hessian(model, batch)
    assert operator.shape == (15, 15)

    def logits(w):
        return nn.functional.embedding(batch[0], w).sum(1) @ w.T

    matrix = torch.func.hessian(lambda w: cross_entropy(logits(w.view(5, 3)), batch[1]))(
        model.embed.weight.detach().flatten()
    )
    torch.testing.assert_close(operator(torch.eye(15, dtype=torch.float64)), matrix)


def test_squared_error_and_own_losses():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    batch = torch.randn(9, 3).double(), torch.randn(9).double()

    def squares(f, y):
        return (f[:, 0] - y).square().mean()

    eye = torch.eye(11, dtype=torch.float64)
    torch.testing.assert_close(
        Hessian(model, batch, "squared_error")(eye), dense(model, batch, squares)
    )

    def own(f, y):
        return (f[:, 0] - y).cosh().log()

    def mean(f, y):
        return own(f, y).mean()

    torch.testing.assert_close(Hessian(model, batch, own)(eye), dense(model, batch, mean))
    curved = GaussNewton(model, batch, own)(eye)
    assert torch.linalg.eigvalsh(curved).min() > -1e-12  # convex: semi-definite


def test_language_models_and_labels_that_are_left_out():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids).cumsum(1).tanh())

    torch.manual_seed(0)
    model = Words().double()
    ids = torch.randint(5, (4, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[2] = -100  # a sample without any
    operator = Hessian(
        model, [dict(input_ids=i, labels=l) for i, l in zip(ids, labels, strict=True)]
    )

    def total(vector):
        embed, weight, bias = vector.split([15, 15, 5])
        hidden = nn.functional.embedding(ids, embed.view(5, 3)).cumsum(1).tanh()
        logits = (hidden @ weight.view(5, 3).T + bias)[:, :-1]
        kept = labels[:, 1:] != -100
        return cross_entropy(logits[kept], labels[:, 1:][kept], reduction="sum") / 4

    vector = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    matrix = torch.func.hessian(total)(vector)
    torch.testing.assert_close(operator(torch.eye(35, dtype=torch.float64)), matrix)
    assert operator.per_sample_quadratic(torch.ones(1, 35, dtype=torch.float64))[0, 2] == 0


def test_scipy_takes_it():
    model, batch = mlp()
    matrix = dense(model, batch).numpy()
    operator = Hessian(model, batch).linear_operator()
    x = np.random.default_rng(0).standard_normal((len(matrix), 2))
    np.testing.assert_allclose(operator @ x, matrix @ x, atol=1e-12)
    np.testing.assert_allclose(operator.rmatvec(x[:, 0]), matrix @ x[:, 0], atol=1e-12)
    largest = eigsh(operator, k=2, return_eigenvectors=False)
    exact = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(np.sort(np.abs(largest)), np.sort(np.abs(exact))[-2:], rtol=1e-8)


def test_single_precision_is_near_double():
    model, batch = mlp()
    operator = Hessian(model, batch)
    v = torch.randn(3, operator.shape[0], dtype=torch.float64)
    exact = operator(v)
    rounded = Hessian(model.float(), (batch[0].float(), batch[1]))(v.float())
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model, batch = convolution()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.zero_grad()
    operator = Hessian(model, batch)
    operator(torch.randn(2, operator.shape[0], dtype=torch.float64))
    assert model.training and model[1].training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


ASKED = {
    "products": lambda operator, v: operator(v),
    "one product": lambda operator, v: operator(v[0]),
    "gradient": lambda operator, v: operator.gradient(),
    "slopes": lambda operator, v: operator.per_sample_slopes(v),
    "gradients": lambda operator, v: operator.per_sample_gradients(),
    "curvatures": lambda operator, v: operator.per_sample_quadratic(v),
    "labels": lambda operator, v: operator.relabelled(0)[0][1],
    "factors": lambda operator, v: EKFAC().fit(operator)(v),
}


@pytest.mark.parametrize("ask", [*ASKED.values()][:6], ids=[*ASKED][:6])
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_a_loss_that_is_not_one_number_for_each_sample(kind, ask):
    operator = kind(*mlp(), cross_entropy)  # the mean of a batch
    form = r"`loss` must be a function \(outputs, labels\) -> \(b,\), got shape \(\) for "
    with pytest.raises(ValueError, match=form):
        ask(operator, torch.ones(2, operator.shape[0]).double())


CHANGES = {
    "a step": lambda net: torch.optim.SGD(net.parameters(), 0.1).step(),
    "data": lambda net: net[0].weight.data.neg_(),
    "one entry": lambda net: net[0].weight.data[0, 0].add_(1e-12),
    "entries that trade places": lambda net: net[0].weight.data.copy_(net[0].weight.data.flip(0)),
    "another parameter": lambda net: setattr(net[0], "bias", nn.Parameter(net[0].bias + 1)),
    "a constant one": lambda net: net[5].weight.data.mul_(2),
    "running statistics": lambda net: net[1].running_mean.add_(1),
    "single precision": lambda net: net.float(),
}


@pytest.mark.parametrize("ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_an_operator_does_not_answer_for_other_weights(kind, ask, change):
    model, batch = convolution()
    cross_entropy(model(batch[0]), batch[1]).backward()
    operator = kind(model, batch, parameters=["0.*", "1.*"])
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    v = torch.randn(2, operator.shape[0]).double()
    before = ask(operator, v)
    change(model)
    with pytest.raises(RuntimeError, match="`model` must be as it was when the operator was made"):
        ask(operator, v)
    model.double().load_state_dict(state)
    torch.testing.assert_close(ask(operator, v), before)


class Kept(nn.Module):
    """A network that uses a parameter by a name which PyTorch does not know."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3).double()
        self.kept = [self.layer.weight]

    def forward(self, x):
        return self.layer(x) + x @ self.kept[0].T


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_weights_have_no_part_in_losses_that_products_would_not_see(kind):
    model, batch = mlp()
    held = [*model.parameters()]

    def own(outputs, labels):
        return cross_entropy(outputs, labels, reduction="none") + penalty(held[0])

    def asked(outputs, labels):
        penalties = sum(map(penalty, model.parameters()))
        return cross_entropy(outputs, labels, reduction="none") + penalties

    def penalty(weight):
        return weight.square().sum()

    for loss in (own, asked):
        with pytest.raises(ValueError, match="`loss` must be a function of outputs and labels al"):
            kind(model, batch, loss)
    with pytest.raises(ValueError, match=r"`model` must be one that .*`layer.weight` elsewhere"):
        kind(Kept(), batch)
    constant = kind(model, batch, own, parameters="2.*")  # by the others it is a number
    plain = kind(model, batch, parameters="2.*")
    v = torch.randn(2, plain.shape[0]).double()
    torch.testing.assert_close(constant(v), plain(v))
    torch.testing.assert_close(constant.gradient(), plain.gradient())


class Odd(nn.Module):
    """Parameters of no dimensions, and some of no numbers, beside usual ones."""

    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.5))
        self.none, self.to_none = (nn.Parameter(torch.zeros(s)) for s in ((3, 0), (0, 3)))
        self.rows, self.table = nn.Parameter(torch.zeros(0, 3)), nn.Parameter(torch.zeros(5, 0))

    def forward(self, x):
        hidden = self.layer(x) * self.scale
        nothing = self.rows.sum() + linear(hidden, self.to_none).sum(1, keepdim=True)
        return torch.tanh(hidden) + linear(x[:, :0], self.none) + nothing


def test_parameters_of_no_dimensions_and_of_no_numbers():
    torch.manual_seed(0)
    model, batch = Odd().double(), (torch.randn(6, 4).double(), torch.randint(3, (6,)))
    operator = Hessian(model, batch)
    matrix = dense(model, batch)
    eye = torch.eye(len(matrix)).double()
    for kind in (Hessian, GaussNewton):
        operator = kind(model, batch)
        whole = operator(eye)
        expected = matrix if kind is Hessian else kind(model, batch, vectors_per_pass=1)(eye)
        torch.testing.assert_close(whole, expected)
        torch.testing.assert_close(operator(eye[0]), whole[0])
        slopes = operator.per_sample_gradients().T
        torch.testing.assert_close(operator.per_sample_slopes(eye), slopes)
        fisher = EKFAC("empirical").fit(operator)
        v = torch.randn(2, len(eye)).double()
        torch.testing.assert_close(fisher.inverse(fisher(v) + 0.1 * v, 0.1), v)
    expected = None
    for engine in ("hooks", "vmap", "loop", "backward"):
        for projector in (None, Projector(8)):
            features = collect_features(model, batch, log_odds, projector, engine=engine)
            assert len(features.gradients) == 6
        expected = features.gradients if expected is None else expected
        torch.testing.assert_close(features.gradients, expected)
    collect_features(model, batch, log_odds, FactoredProjector(4))


CONSTANT = {
    "a constant": lambda outputs, labels: torch.zeros(len(outputs)).double(),
    "labels": lambda outputs, labels: labels.double(),
    "detached": lambda outputs, labels: outputs.detach().sum(1),
    "linear": lambda outputs, labels: outputs.sum(1),
}


@pytest.mark.parametrize("loss", CONSTANT.values(), ids=CONSTANT)
@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
def test_a_loss_that_does_not_curve_or_does_not_depend_on_outputs(kind, loss):
    model, batch = mlp()
    operator = kind(model, batch, loss)
    v = torch.randn(3, operator.shape[0]).double()
    flat = loss is not CONSTANT["linear"]
    for found in (operator(v), operator(v[0]), operator.per_sample_quadratic(v)):
        assert not found.any() or (not flat and kind is Hessian)
    for found in (operator.gradient(), operator.per_sample_slopes(v)):
        assert found.any() != flat


def test_vectors_are_rows_of_one_dtype_and_device():
    v = torch.randn(2, 4)
    of = partial(checked_vectors, "w", p=4, dtype=torch.float32, device=v.device)
    assert torch.equal(of(v=v), v) and torch.equal(of(v=v[0]), v[:1])
    assert not of(v=v.requires_grad_()).requires_grad
    for wrong in (v[:, :3], v[None], v[0, 0], v * torch.inf):
        with pytest.raises(ValueError, match=r"^`w` must be "):
            of(v=wrong)
    with pytest.raises(TypeError, match=r"^`w` must be torch\.float32 on cpu like the parameters"):
        of(v=v.double())


def test_a_loss_that_is_no_tensor():
    model, batch = mlp()
    operator = Hessian(model, batch, lambda outputs, labels: outputs.sum(1).tolist())
    with pytest.raises(ValueError, match=r"^`loss` must be a function .*, got list for 11 samples"):
        operator.gradient()


def test_vectors_that_are_none():
    model, batch = mlp()
    operator = Hessian(model, batch)
    v = torch.randn(2, operator.shape[0]).double()
    for wrong in ([1.0], None, "v", 2, v.numpy(), v.tolist()):
        for ask in (operator, operator.per_sample_slopes, operator.per_sample_quadratic):
            with pytest.raises(TypeError, match=r"^`v` must be a tensor, got "):
                ask(wrong)
        with pytest.raises(TypeError, match=r"^`x` must be a tensor, got "):
            operator @ wrong
        with pytest.raises(TypeError, match=r"^`u` must be a tensor, got "):
            operator.third(wrong, v)
    with pytest.raises(ValueError, match=r"^`v` must be of shape \(2, 43\) like `u`"):
        operator.third(v, v[:1])


def test_bad_input():
    model, batch = mlp()
    operator = Hessian(model, batch)
    p = operator.shape[0]
    with pytest.raises(ValueError, match=rf"`v` must be of shape \(s, {p}\), got shape \(3, 2\)"):
        operator(torch.randn(3, 2).double())
    with pytest.raises(TypeError, match=r"`v` must be torch\.float64 on cpu"):
        operator(torch.randn(p))
    with pytest.raises(ValueError, match="`v` must be finite"):
        operator(torch.full((p,), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="`loss` must be one of 'cross_entropy'"):
        Hessian(model, batch, "hinge")
    with pytest.raises(ValueError, match="`vectors_per_pass` must be at least 1"):
        Hessian(model, batch, vectors_per_pass=0)
    with pytest.raises(ValueError, match="in order"):
        Hessian(model, DataLoader(TensorDataset(*batch), shuffle=True))
    with pytest.raises(ValueError, match="`data` must be labelled"):
        Hessian(model, (batch[0], batch[1][:, None]))(torch.ones(p).double())
    model[0].float()
    with pytest.raises(TypeError, match="of parameters of one dtype"):
        Hessian(model, batch)


class StopsGradients(nn.Module):
    """A scale that gradients do not go through, by one of the ways to say so."""

    def __init__(self, way):
        super().__init__()
        self.inside, self.outside, self.way = nn.Linear(4, 6), nn.Linear(6, 3), way

    def forward(self, x):
        hidden = torch.tanh(self.inside(x))
        if self.way == "no_grad":
            with torch.no_grad():
                scale = hidden.square().mean(1, keepdim=True)
        else:
            scale = (
                (hidden.data if self.way == "data" else hidden.detach()).square().mean(1)[:, None]
            )
        return self.outside(hidden / (1 + scale))


@pytest.mark.parametrize("kind", [Hessian, GaussNewton])
@pytest.mark.parametrize("way", ["no_grad", "data", "detach"])
def test_tangents_do_not_go_where_gradients_stop(way, kind):
    torch.manual_seed(0)
    network = StopsGradients(way).double()
    data = torch.randn(8, 4).double(), torch.randint(3, (8,))
    operator = kind(network, data)
    v = torch.randn(3, operator.shape[0]).double()
    expected = kind(network, data, vectors_per_pass=1)(v)
    torch.testing.assert_close(operator(v), expected, rtol=1e-10, atol=1e-12)
    slopes = kind(network, data).per_sample_slopes(v)
    expected = v @ operator.per_sample_gradients().T
    torch.testing.assert_close(slopes, expected, rtol=1e-10, atol=1e-12)
