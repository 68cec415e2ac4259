"""Every network of :mod:`networks` by every engine and every method, against loops of autograd."""

import logging
from pathlib import Path

import pytest
import torch
from networks import NETWORKS, hugging_face, made, text
from torch import nn

from ksm_ext import EKFAC, GradientEstimator, Projector, attribute_tasks, collect_features
from ksm_ext.attribution.influence import influence, projected_influence, sample_influence
from ksm_ext.attribution.tracin import gradient_cosine, tracin
from ksm_ext.attribution.trak import trak
from ksm_ext.network.batches import each
from ksm_ext.network.engines import evaluating
from ksm_ext.network.gradients import parameter_names, per_sample_gradients
from ksm_ext.network.hessian import GaussNewton, Hessian
from ksm_ext.network.outputs import cross_entropy, log_odds, outputs_and_labels
from ksm_ext.network.spectrum import lanczos

pytest.importorskip("transformers")
ENGINES = ("hooks", "vmap", "loop", "backward")
DOCS = Path(__file__).parents[2] / "docs" / "networks.md"
NO_CURVATURE = {"checkpoint, reentrant"}  # PyTorch differentiates through it once
SINGLE_INSIDE = {"Llama", "Mixtral", "T5"}  # whose normalisations are of float32
OF_THE_BATCH = {"scaled by the batch"}  # whose samples have another output alone
# Whose gradients are not the slopes of what they compute, or not smooth enough to tell.
NO_SLOPES = {*SINGLE_INSIDE, *OF_THE_BATCH, "autograd.Function", "nn.Embedding(max_norm)"}
every_network = pytest.mark.parametrize("name", NETWORKS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*non-reentrant|.*use_reentrant|None of the inputs"),
]


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, "transformers")


def near(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def rows(batch, start, stop):
    return each(lambda column: column[start:stop], batch)


def size(batch):
    return len(batch["labels"] if isinstance(batch, dict) else batch[-1])


def loop(model, output, batch, names):
    """One ordinary backward pass after another: values (b,), and gradients (b, p)."""
    weights = [dict(model.named_parameters())[name] for name in names]
    values, gradients = [], []
    model.eval()
    for row in range(size(batch)):
        model.zero_grad()
        value = output(model, rows(batch, row, row + 1))[0]
        value.backward()
        parts = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        values.append(value.detach())
        gradients.append(torch.cat([part.flatten() for part in parts]))
    model.zero_grad()
    return torch.stack(values), torch.stack(gradients)


def flat(gradients):
    return torch.cat([part.flatten(1) for part in gradients.values()], dim=1)


def able(model, batch, parameters):
    """Which engines can, and what each found; others have to say so."""
    found = {}
    for engine in ("auto", *ENGINES):
        try:
            found[engine] = per_sample_gradients(
                model, cross_entropy, batch, parameters=parameters, engine=engine
            )
        except RuntimeError as error:
            assert str(error).startswith(f"`engine` must be one that can, got '{engine}', which")
    return found


def curvature(kind, model, batch, parameters, v):
    """Products, slopes and quadratic forms, and whether forward differentiation had the first."""
    operator = kind(model, batch, parameters=parameters)
    products = operator(v)
    mode = "forward" if operator._forward else "reverse"
    return mode, products, operator.per_sample_slopes(v), operator.per_sample_quadratic(v)


def cells(name):
    """What the table of ``docs/networks.md`` says of a network."""
    rows = [line.split(" | ") for line in DOCS.read_text().splitlines()]
    (found,) = [row[1:] for row in rows if row[0] == f"| {name}"]
    return [cell.rstrip(" |") for cell in found]


def engine_cells(found):
    return ["yes" if engine in found else "no" for engine in ENGINES]


@every_network
def test_engines_agree_with_a_loop_of_backward(name):
    model, batch = made(name)
    model.train()
    parameters = NETWORKS[name].parameters
    before = {key: value.clone() for key, value in model.state_dict().items()}
    required = [weight.requires_grad for weight in model.parameters()]
    found = able(model, batch, parameters)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [weight.requires_grad for weight in model.parameters()] == required
    assert all(weight.grad is None for weight in model.parameters())
    assert all(module.training for module in model.modules())
    values, gradients = loop(model, cross_entropy, batch, parameter_names(model, parameters))
    assert gradients.norm() > 0.1
    for engine in found:
        near((found[engine][0], flat(found[engine][1])), (values, gradients))
    assert engine_cells(found) == cells(name)[:4]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@every_network
def test_narrow_weights_have_the_gradients_of_wide_ones(name, dtype, tolerance):
    if name == "cdist" and dtype == torch.bfloat16:
        pytest.skip("PyTorch has no distances in bfloat16")
    parameters = NETWORKS[name].parameters
    engine = ENGINES[cells(name).index("yes")]
    (model, batch), (wide, same) = made(name, dtype), made(name, dtype)
    same = each(lambda x: x.double() if x.is_floating_point() else x, same)
    values, gradients = per_sample_gradients(
        model, cross_entropy, batch, parameters=parameters, engine=engine
    )
    exact = per_sample_gradients(wide.double(), cross_entropy, same, parameters=parameters)
    assert all(gradient.dtype == dtype for gradient in gradients.values())
    for found, true in ((values, exact[0]), (flat(gradients), flat(exact[1]))):
        assert (found - true).norm() < tolerance * true.norm()


def test_experts_in_grouped_products():
    """As transformers runs them unless told otherwise, in float32 at most."""
    torch.manual_seed(0)
    model = hugging_face("Mixtral lm", num_key_value_heads=1, num_local_experts=3)()
    batch = text()
    found = able(model, batch, None)
    assert {"hooks", "backward"} <= {*found}
    near(found["hooks"], found["backward"], 1e-4)


def reverse_twice(model, batch, v, names):
    """Products (s, p) of Hessian and Gauss-Newton matrix, from one graph of all samples."""
    weights = [dict(model.named_parameters())[name].requires_grad_() for name in names]

    def by_weights(of, along):
        parts = torch.autograd.grad(of, weights, along, create_graph=True, materialize_grads=True)
        return torch.cat([part.flatten() for part in parts])

    with evaluating(model), torch.enable_grad():
        outputs, labels = outputs_and_labels(model, batch)
        loss = nn.functional.cross_entropy(
            outputs.flatten(0, -2), labels.flatten(), reduction="sum"
        ) / len(outputs)
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        gradient, along = by_weights(loss, None), torch.zeros_like(outputs, requires_grad=True)
        transposed = by_weights(outputs, along)
        hessian = [by_weights(gradient, vector) for vector in v]
        changes = [
            torch.autograd.grad(transposed, along, vector, retain_graph=True)[0] for vector in v
        ]
        bent = [torch.autograd.grad(slope, outputs, c, retain_graph=True)[0] for c in changes]
        gauss_newton = [by_weights(outputs, part) for part in bent]
    return torch.stack(hessian).detach(), torch.stack(gauss_newton).detach()


def differences(model, batch, v, names, step=1e-5):
    """Products (s, p) with the Hessian, of gradients at two places."""
    weights = [dict(model.named_parameters())[name] for name in names]
    start = [weight.detach().clone() for weight in weights]
    rows = []
    for row in v:
        ends = []
        for side in (step, -step):
            parts = row.split([weight.numel() for weight in weights])
            with torch.no_grad():
                for weight, at, part in zip(weights, start, parts, strict=True):
                    weight.copy_(at + side * part.reshape(at.shape))
            ends.append(loop(model, cross_entropy, batch, names)[1].mean(0))
        rows.append((ends[0] - ends[1]) / (2 * step))
    with torch.no_grad():
        for weight, at in zip(weights, start, strict=True):
            weight.copy_(at)
    return torch.stack(rows)


def without_padding(model, v, names):
    """Vectors that leave alone the rows that no gradient moves."""
    weights = dict(model.named_parameters())
    parts = dict(zip(names, v.split([weights[n].numel() for n in names], dim=1), strict=True))
    for name, table in model.named_modules():
        index = getattr(table, "padding_idx", None) if isinstance(table, nn.Embedding) else None
        if index is not None and f"{name}.weight" in parts:
            parts[f"{name}.weight"].view(len(v), *table.weight.shape)[:, index] = 0
    return v


@every_network
def test_curvature_with_and_without_forward_differentiation(name):
    if name in NO_CURVATURE:
        assert cells(name)[4:] == ["no", "no"]
        return
    model, batch = made(name)
    parameters = NETWORKS[name].parameters
    names = parameter_names(model, parameters)
    weights = dict(model.named_parameters())
    v = torch.randn(2, sum(weights[name].numel() for name in names), dtype=torch.float64)
    v = without_padding(model, v, names)
    alone = loop(model, cross_entropy, batch, names)[1]
    if name not in NO_SLOPES:
        near(
            Hessian(model, batch, parameters=parameters)(v),
            differences(model, batch, v, names),
            1e-5,
        )
    tolerance = 1e-5 if name in SINGLE_INSIDE else 1e-9
    pairs = zip((Hessian, GaussNewton), reverse_twice(model, batch, v, names), strict=True)
    for (kind, expected), cell in zip(pairs, cells(name)[4:], strict=True):
        mode, products, slopes, quadratic = curvature(kind, model, batch, parameters, v)
        assert mode == cell
        near(products, expected, tolerance)
        near(kind(model, batch, parameters=parameters, vectors_per_pass=1)(v), expected)
        if name not in OF_THE_BATCH:
            near(slopes, v @ alone.T, tolerance)
            near(quadratic.mean(1), (v * expected).sum(1), tolerance)


@pytest.mark.parametrize("name", ["checkpoint", "autograd.Function of a weight", "weight_norm"])
def test_third_derivatives_without_torch_func(name):
    model, batch = made(name)
    u, v = torch.randn(2, 2, Hessian(model, batch).shape[0], dtype=torch.float64)
    u, v = (without_padding(model, x, parameter_names(model)) for x in (u, v))
    found = Hessian(model, batch).third(u, v)
    start = nn.utils.parameters_to_vector(model.parameters()).detach().clone()
    for row, (step, along) in enumerate(zip(u, v, strict=True)):
        ends = []
        for side in (1e-5, -1e-5):
            nn.utils.vector_to_parameters(start + side * step, model.parameters())
            ends.append(Hessian(model, batch)(along))
        nn.utils.vector_to_parameters(start, model.parameters())
        near(found[row], (ends[0] - ends[1]) / 2e-5, 1e-5)


def methods(name, **options):
    """Everything that takes gradients, on three tasks of two samples."""
    model, batch = made(name)
    options["parameters"] = NETWORKS[name].parameters
    tasks = [rows(batch, start, start + 2) for start in range(3)]
    targets = {"first": rows(batch, 0, 2), "last": rows(batch, 3, 4)}
    projected, curved = {"projector": Projector(8), **options}, {"damping": 300.0, **options}
    yield attribute_tasks(model, tasks, targets, **projected).values
    yield trak(model, tasks, targets, relative_ridge=1.0, **projected).values
    yield projected_influence(model, tasks, targets, damping=1.0, **projected).values
    yield tracin(model, 0.1, tasks, targets, **options)
    if name not in NO_CURVATURE:
        for kind in (GaussNewton, Hessian):
            yield influence(model, tasks, targets, curvature=kind, **curved).values
        yield sample_influence(model, batch, targets["first"], **curved).values


@pytest.mark.parametrize("name", [name for name in NETWORKS if name not in OF_THE_BATCH])
def test_methods_agree_whatever_the_engine(name):
    pairs = zip(methods(name), methods(name, engine="backward"), strict=True)
    for found, expected in pairs:
        near(found, expected, 1e-5)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 8), nn.Linear(8, 3)
        self.mix = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, x):
        return self.head(self.mix(self.table(x)).mean(1))


def under_autocast(name):
    torch.manual_seed(0)
    y = torch.arange(9) % 3
    if name == "words":
        return Words(), (y[:, None] + torch.arange(5) % 3, y)
    x = torch.randn(9, 1, 4, 4) + y[:, None, None, None]
    body = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)
    layers = nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 3)
    return nn.Sequential(*(body if name == "convolution" else layers)), (x, y)


def answers(model, batch):
    """What can be asked of a network, by name."""
    options = {"damping": 0.1}
    tasks, target = [tuple(x[i::3] for x in batch) for i in range(3)], batch
    operators = [kind(model, batch, vectors_per_pass=k) for kind in KINDS for k in (1, None)]
    v = torch.randn(3, operators[0].shape[0], generator=torch.Generator().manual_seed(1))
    for number, operator in enumerate(operators):
        yield f"products {number}", operator(v)
        yield f"gradient {number}", operator.gradient()
        yield f"slopes {number}", operator.per_sample_slopes(v)
        yield f"gradients {number}", operator.per_sample_gradients()
        yield f"curvatures {number}", operator.per_sample_quadratic(v)
    yield "third", operators[0].third(v, v)
    yield "fisher", EKFAC("empirical").fit(operators[0])(v)
    yield "lanczos", lanczos(operators[2], v, 3)[0]
    for engine in ("auto", "hooks", "loop", "backward"):
        features = collect_features(model, batch, log_odds, Projector(64), engine=engine)
        yield engine, features.gradients
    yield "influence", influence(model, tasks, target, **options).values
    solver = EKFAC("empirical")
    yield "by EKFAC", influence(model, tasks, target, solver=solver, **options).values
    yield "projected", projected_influence(model, tasks, target, **options).values
    yield "trak", trak(model, tasks, target, relative_ridge=0.1).values
    yield "tracin", tracin(model, 0.1, tasks, target)
    yield "cosine", gradient_cosine(model, tasks, target)
    estimator = GradientEstimator(model, tasks, target, ridge=0.1).fit()
    yield "estimates", estimator.predict(torch.eye(3, dtype=torch.bool))


KINDS = (Hessian, GaussNewton)


@pytest.mark.parametrize("name", ["layers", "convolution", "words"])
def test_autocast_rounds_what_networks_do_and_nothing_else(name):
    model, batch = under_autocast(name)
    expected = dict(answers(model, batch))
    with torch.autocast("cpu", torch.bfloat16):
        found = dict(answers(model, batch))
    for what, right in expected.items():
        assert found[what].dtype == right.dtype, what
        error = (found[what] - right).norm() / right.norm()
        assert 0 < error < 0.1, (what, error)


def print_table():
    """For ``docs/networks.md``."""
    for name, network in NETWORKS.items():
        model, batch = made(name)
        row = engine_cells(able(model, batch, network.parameters))
        for kind in (Hessian, GaussNewton):
            v = torch.ones(2, kind(model, batch, parameters=network.parameters).shape[0]).double()
            curved = name not in NO_CURVATURE
            row.append(curvature(kind, model, batch, network.parameters, v)[0] if curved else "no")
        print(f"| {name} | {' | '.join(row)} |")


if __name__ == "__main__":
    print_table()
