"""EK-FAC against brute force and dense algebra in float64, and against kronfluence."""

import copy
import math

import pytest
import torch
from networks import NETWORKS, made
from torch import nn
from torch.nn.functional import unfold

from ksm_ext import EKFAC, GaussNewton, Hessian, influence, sample_influence, task_hessian
from ksm_ext.correlation import pearson
from ksm_ext.network.outputs import cross_entropy

f64 = torch.float64
HOOKED = [
    *("perceptron", "normalised", "convolutions, batch and group norm, dropout"),
    *("Conv1d, instance norm", "nn.utils.weight_norm", "nn.MultiheadAttention, positions first"),
    *("nn.TransformerEncoderLayer", "low-rank adapters", "tied weights", "nn.EmbeddingBag"),
    *("GPT-2", "GPT-2 without mask", "Llama", "Mixtral", "BERT", "T5", "ViT"),
]
FROM_TRANSFORMERS = ("GPT-2", "GPT-2 without mask", "Llama", "Mixtral", "BERT", "T5", "ViT")


def fitted(name, **options):
    """The operator, the factors by the data's labels, and all samples' gradients (b, p)."""
    if name in FROM_TRANSFORMERS:
        pytest.importorskip("transformers")
    model, batch = made(name)
    operator = GaussNewton(model, batch, parameters=NETWORKS[name].parameters, engine="backward")
    fisher = EKFAC("empirical", **options).fit(operator)
    return operator, fisher, operator.per_sample_gradients()


def dense(fisher, num_parameters):
    """The orthogonal matrix (p, p) whose columns are the eigenvectors, and the eigenvalues (p,)."""
    columns, values = [], []
    for block in fisher.blocks:
        for place in range(block.eigenvalues.numel()):
            one = torch.zeros_like(block.eigenvalues).flatten()
            one[place] = 1
            back = block.rotated_back(one.reshape(1, *block.eigenvalues.shape))
            own = {
                name: torch.zeros(1, shape.numel(), dtype=f64)
                for name, shape in fisher.shapes.items()
            }
            own.update(block.layout.tensors(back))
            columns.append(torch.cat([own[name] for name in fisher.shapes], dim=1)[0])
        values.append(block.eigenvalues.flatten())
    matrix = torch.stack(columns, dim=1)
    assert matrix.shape == (num_parameters, num_parameters)
    return matrix, torch.cat(values)


@pytest.mark.parametrize("name", HOOKED)
def test_eigenvalues_are_the_diagonal_of_the_rotated_fisher_matrix(name):
    """And the basis is orthogonal, whatever the layers; gradients are those of `backward`."""
    operator, fisher, gradients = fitted(name)
    basis, values = dense(fisher, operator.shape[0])
    torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=f64))
    matrix = gradients.T @ gradients / len(gradients)
    rotated = (basis.T @ matrix @ basis).diagonal()
    assert rotated.max() > 1e-4
    torch.testing.assert_close(values, rotated, rtol=1e-7, atol=1e-12)
    v = torch.randn(3, len(basis), dtype=f64)
    factored = basis @ values.diag() @ basis.T
    torch.testing.assert_close(fisher(v), v @ factored)
    damped = factored + 0.1 * torch.eye(len(basis), dtype=f64)
    torch.testing.assert_close(fisher.inverse(v, 0.1), torch.linalg.solve(damped, v.T).T)


def test_the_basis_diagonalises_covariances_by_brute_force():
    """Of what layers are given and the gradients of what they give, sample after sample."""
    model, (x, y) = made("convolutions, batch and group norm, dropout")
    model[3] = nn.Conv2d(6, 4, (2, 3), stride=2, padding=1, dilation=(1, 2)).double()
    fisher = EKFAC("empirical").fit(GaussNewton(model, (x, y)))
    layers = {"0": model[0], "3": model[3], "8": model[8]}
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, given, gave, to=seen[name]: to.append((*given, gave)))
    gram = {name: [0, 0] for name in layers}
    for row in range(len(y)):
        loss = cross_entropy(model.eval(), (x[row : row + 1], y[row : row + 1])).sum()
        for name, layer in layers.items():
            given, gave = seen[name].pop()
            (g,) = torch.autograd.grad(loss, gave, retain_graph=True)
            if isinstance(layer, nn.Conv2d):
                padding = 1 if layer.padding == "same" else layer.padding
                a = unfold(given, layer.kernel_size, layer.dilation, padding, layer.stride)
                a, g = a[0].T, g[0].flatten(1).T
            else:
                a = given
            a = torch.cat([a, torch.ones(len(a), 1, dtype=f64)], dim=1)[g.any(1)]
            gram[name][0] += g.T @ g
            gram[name][1] += a.T @ a
    of_weight = {block.layout.weight: block for block in fisher.blocks}
    for name, grams in gram.items():
        block = of_weight[f"{name}.weight"]
        assert block.layout.bias == f"{name}.bias"
        for matrix, vectors in zip(grams, (block.rows, block.columns), strict=True):
            rotated = vectors.T @ matrix.detach() @ vectors
            largest = rotated.diagonal().max()
            assert (rotated - rotated.diagonal().diag()).abs().max() < 1e-10 * largest
            assert (rotated.diagonal().diff() > -1e-12).all()


def test_what_blocks_are_of():
    """A layer and its bias are one, also where the matrix is transposed; tables keep their rows."""
    _, fisher, _ = fitted("GPT-2")
    found = {block.layout.weight: block for block in fisher.blocks}
    layer = found["transformer.h.0.attn.c_attn.weight"]  # (8, 24): a Conv1D
    assert layer.layout.bias == "transformer.h.0.attn.c_attn.bias"
    assert layer.eigenvalues.shape == (9, 24) and layer.rows.shape == (9, 9)
    table = found["transformer.wte.weight"]
    assert table.rows is None and table.columns.shape == (8, 8)
    norm = found["transformer.ln_f.weight"]
    assert norm.layout.bias is None and norm.eigenvalues.shape == (1, 8)
    _, narrow, _ = fitted("GPT-2", max_dim=10)
    block = next(b for b in narrow.blocks if b.layout.weight == layer.layout.weight)
    assert block.rows.shape == (9, 9) and block.columns is None


def test_vectors_have_their_whole_block():
    operator, fisher, gradients = fitted("normalised")
    block = next(b for b in fisher.blocks if b.layout.weight == "3.weight")
    own = operator.unflatten(gradients)["3.weight"]
    exact = own.T @ own / len(own)
    torch.testing.assert_close(block.columns @ block.eigenvalues[0].diag() @ block.columns.T, exact)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared_error"])
def test_labels_from_the_model_give_the_gauss_newton_matrix(loss):
    """The mean over draws, within five standard errors of single draws."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    y = torch.randint(2, (20,)) if loss == "cross_entropy" else torch.randn(20, 2).double()
    operator = GaussNewton(model, (torch.randn(20, 3).double(), y), loss)
    exact = operator(torch.eye(operator.shape[0]).double())
    matrices = []
    for seed in range(60):
        (batch,) = operator.relabelled(seed)
        rows = GaussNewton(model, batch, loss).per_sample_gradients()
        matrices.append(rows.T @ rows / len(rows))
    draws = torch.stack(matrices)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    basis, values = dense(EKFAC(draws=60).fit(operator), len(exact))
    torch.testing.assert_close(values, (basis.T @ draws.mean(0) @ basis).diagonal())


@pytest.mark.parametrize("name", ["tied weights", "nn.TransformerEncoderLayer"])
def test_drawn_labels_do_not_depend_on_batches(name):
    model, batch = made(name)
    (whole,) = GaussNewton(model, batch).relabelled(3)
    parts = GaussNewton(model, batch, batch_size=1).relabelled(3)
    assert torch.equal(labels(whole), torch.cat([*map(labels, parts)]))
    assert labels(whole).shape == labels(batch).shape
    assert not torch.equal(labels(whole), labels(batch))


def labels(batch):
    return batch["labels"] if isinstance(batch, dict) else batch[-1]


def test_labels_that_are_left_out_stay_so():
    pytest.importorskip("transformers")
    model, batch = made("GPT-2")
    (drawn,) = GaussNewton(model, batch).relabelled(0)
    own, others = labels(batch)[:, 1:], labels(drawn)[:, 1:]
    assert torch.equal(others == -100, own == -100) and (own == -100).any()
    assert (others != own).any()


def problem(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(60, 4).double(), torch.randint(3, (60,))
    tasks = [(x[i : i + 10], y[i : i + 10]) for i in range(0, 60, 10)]
    return model, tasks, {"one": (x[:7], y[:7]), "two": (x[5:9] + 1, y[5:9])}, (x, y)


def test_influence_by_ekfac_is_near_that_of_the_whole_matrix():
    model, tasks, targets, data = problem()
    exact = influence(model, tasks, targets, damping=0.05).values
    found = influence(model, tasks, targets, damping=0.05, solver=EKFAC(draws=20))
    assert float(pearson(found.values.T, exact.T).min()) > 0.95
    assert found.num_steps == 1 and 0.01 < found.residuals.max() < 1
    operator = GaussNewton(model, data)
    factored = EKFAC(draws=20).fit(operator)
    again = influence(model, tasks, targets, damping=0.05, solver=factored)
    torch.testing.assert_close(again.values, found.values)
    basis, values = dense(factored, operator.shape[0])
    matrix = basis @ (values + 0.05).diag() @ basis.T
    queries = GaussNewton(model, targets["one"]).per_sample_gradients()
    expected = -operator.per_sample_gradients() @ torch.linalg.solve(matrix, queries.T) / 60
    of_samples = sample_influence(model, data, targets["one"], damping=0.05, solver=factored)
    torch.testing.assert_close(of_samples.values, expected)
    hessian = task_hessian(model, tasks, targets, damping=0.5, solver=EKFAC(draws=20))
    near = task_hessian(model, tasks, targets, damping=0.5)
    assert float(pearson(hessian.gradient.T, near.gradient.T).min()) > 0.9


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_kronfluence_agrees(tmp_path):
    """Eigenvalues and scores, over positions, by the data's own labels."""
    kronfluence = pytest.importorskip("kronfluence")
    arguments = pytest.importorskip("kronfluence.arguments")
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    model = nn.Sequential(*layers).double()
    draw = lambda n: (torch.randn(n, 7, 4).double(), torch.randint(3, (n, 7)))  # noqa: E731
    data, queries = draw(12), draw(5)
    operator = GaussNewton(model, data)
    fisher = EKFAC("empirical").fit(operator)
    ours = sample_influence(model, data, queries, damping=0.05, solver=fisher).values

    class Task(kronfluence.task.Task):
        def compute_train_loss(self, batch, model, sample=False):
            return cross_entropy(model, batch).sum()

        def compute_measurement(self, batch, model):
            return cross_entropy(model, batch).sum()

    model = kronfluence.prepare_model(model, Task())
    folder = str(tmp_path)
    peer = kronfluence.Analyzer(
        "ours", model, Task(), cpu=True, disable_tqdm=True, output_dir=folder
    )
    names = "activation_covariance", "gradient_covariance", "per_sample_gradient", "lambda"
    options = arguments.FactorArguments(
        use_empirical_fisher=True, **{f"{name}_dtype": torch.float64 for name in names}
    )
    train, test = (torch.utils.data.TensorDataset(*columns) for columns in (data, queries))
    sizes = {"per_device_batch_size": 5, "factor_args": options}
    peer.fit_all_factors("factors", train, **sizes)
    found = peer.load_lambda_matrices("factors")
    for block in fisher.blocks:
        name = block.layout.weight.removesuffix(".weight")
        theirs = found["lambda_matrix"][name] / found["num_lambda_processed"][name]
        torch.testing.assert_close(block.eigenvalues, theirs, rtol=1e-7, atol=1e-12)
    names = "score", "precondition", "per_sample_gradient"
    options = arguments.ScoreArguments(
        damping_factor=0.05, **{f"{name}_dtype": torch.float64 for name in names}
    )
    peer.compute_pairwise_scores("scores", "factors", test, train, 5, score_args=options)
    scores = peer.load_pairwise_scores("scores")["all_modules"]
    torch.testing.assert_close(ours, -scores.T / 12, rtol=1e-7, atol=1e-12)


def test_damping_of_layers():
    model, _, _, data = problem()
    operator = GaussNewton(model, data)
    fisher = EKFAC(layer_damping=0.1).fit(operator)
    plain = EKFAC().fit(operator)
    v = torch.randn(2, operator.shape[0]).double()
    expected = []
    for block in plain.blocks:
        x = block.rotated(block.layout.matrix(operator.unflatten(v)))
        x = x / (block.eigenvalues + 0.1 * block.eigenvalues.mean() + 0.01)
        expected += block.layout.tensors(block.rotated_back(x)).values()
    torch.testing.assert_close(fisher.inverse(v, 0.01), torch.cat(expected, dim=1))


def test_nothing_depends_on_the_batches():
    _, batch = made("tied weights")
    model, _ = made("tied weights")
    whole = EKFAC().fit(GaussNewton(model, batch))
    for size in (1, 3):
        parts = EKFAC().fit(GaussNewton(model, batch, batch_size=size))
        v = torch.randn(2, GaussNewton(model, batch).shape[0]).double()
        torch.testing.assert_close(parts.inverse(v, 0.1), whole.inverse(v, 0.1))


def test_bad_input():
    model, tasks, targets, data = problem()
    with pytest.raises(ValueError, match=r"`fisher` must be .*, got 'true'"):
        EKFAC("true")
    with pytest.raises(ValueError, match="`draws` must be at least 1"):
        EKFAC(draws=0)
    with pytest.raises(ValueError, match="`max_dim` must be at least 1"):
        EKFAC(max_dim=0)
    with pytest.raises(ValueError, match=r"`layer_damping` must be non-negative, got -0\.1"):
        EKFAC(layer_damping=-0.1)
    with pytest.raises(TypeError, match=r"`operator` must be ksm_ext\.GaussNewton or"):
        EKFAC().solve(lambda v: v, torch.ones(1, 3))
    own = lambda outputs, labels: outputs.square().sum(1)  # noqa: E731
    options = {"damping": 0.1, "loss": own}
    with pytest.raises(ValueError, match=r"`loss` must be .*EKFAC\(fisher='empirical'\)"):
        influence(model, tasks, targets, solver=EKFAC(), **options)
    assert influence(model, tasks, targets, solver=EKFAC("empirical"), **options).values.any()
    with pytest.raises(ValueError, match="`damping` must be positive, got 0"):
        EKFAC("empirical").fit(Hessian(model, (data[0][:2], data[1][:2]))).inverse(
            torch.ones(1, 51).double(), 0.0
        )
    network, batch = made("nn.GRU")
    with pytest.raises(
        RuntimeError,
        match=r"^`solver` must be one that can, got 'hooks', which .*BlockConjugateGradients",
    ):
        EKFAC().fit(GaussNewton(network, batch))


def test_a_fitted_matrix_takes_the_systems_of_its_network_alone():
    model, tasks, targets, data = problem()
    fisher = EKFAC().fit(GaussNewton(model, data))
    other = copy.deepcopy(model)
    rhs = torch.randn(2, GaussNewton(model, data).shape[0]).double()
    for same in (Hessian(model, data), GaussNewton(other, data)):
        assert fisher.solve(same, rhs, damping=0.1).x.isfinite().all()
    with torch.no_grad():
        next(other.parameters())[0, 0] += 1e-9
    form = "`operator` must be of the network and the parameters that EKFAC was fitted to, got one "
    with pytest.raises(ValueError, match=form):
        fisher.solve(GaussNewton(other, data), rhs, damping=0.1)
    with pytest.raises(ValueError, match=form):
        influence(other, tasks, targets, damping=0.1, solver=fisher)
    names = [name for name, _ in model.named_parameters()]
    some = GaussNewton(model, data, parameters=names[:-1])
    with pytest.raises(ValueError, match=form):
        fisher.solve(some, rhs, damping=0.1)


def test_vectors_are_taken_as_operators_take_them():
    model, _, _, data = problem()
    operator = GaussNewton(model, data)
    fisher = EKFAC().fit(operator)
    v = torch.randn(2, operator.shape[0]).double()
    for of in (fisher, lambda x: fisher.inverse(x, 0.1)):
        torch.testing.assert_close(of(v[0]), of(v)[0])
        for wrong in (v.float(), v.numpy(), v.tolist(), None, "v", 2):
            with pytest.raises(TypeError, match=r"^`v` must be (a tensor|torch.float64 on cpu)"):
                of(wrong)
        with pytest.raises(ValueError, match=r"^`v` must be finite"):
            of(v * torch.nan)
    for wrong in ("a", None, [1], math.inf, math.nan, -1):
        with pytest.raises(
            (TypeError, ValueError), match=r"^`damping` must be (a non-neg|fini|non)"
        ):
            fisher.inverse(v, wrong)
    for wrong in ("a", None, 1.5, [1], math.inf, 10**30):
        with pytest.raises((TypeError, ValueError), match=r"^`seed` must be (an int|below 2)"):
            EKFAC(seed=wrong)
    for wrong in ("a", None, [1], math.inf, math.nan):
        with pytest.raises(
            (TypeError, ValueError), match=r"^`layer_damping` must be (a non-|finite)"
        ):
            EKFAC(layer_damping=wrong)


def test_numbers_are_drawn_as_numbers_and_singular_systems_are_refused():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(3, (6,))
    traces = [
        sum(float(block.eigenvalues.sum()) for block in EKFAC(draws=20).fit(operator).blocks)
        for operator in (
            GaussNewton(network, (x, labels), "squared_error") for labels in (y, y.double())
        )
    ]
    assert traces[0] == pytest.approx(traces[1], rel=1e-9)
    network = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    fisher = EKFAC().fit(GaussNewton(network, (x, y)))
    p = sum(weight.numel() for weight in network.parameters())
    for damping in (0.0, 1e-300):
        with pytest.raises(ValueError, match=r"^`damping` must be positive, got"):
            fisher.inverse(torch.ones(1, p).double(), damping)
    with pytest.raises(ValueError, match=r"^`v` must be of shape \(s, 66\), got shape \(2, 5\)"):
        fisher(torch.ones(2, 5).double())
