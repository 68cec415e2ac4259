"""Projections from both sides against dense matrices in float64, and what they are for."""

import pytest
import torch
from networks import NETWORKS, made
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ksm_ext import FactoredProjector, GradientEstimator, Projector, collect_features, trak
from ksm_ext.network import gradients
from ksm_ext.network.engines import Ladder
from ksm_ext.network.factored import _IN, _OUT
from ksm_ext.network.factors import OuterProducts, Rows, blocks, total
from ksm_ext.network.gradients import parameter_names, per_sample_gradients
from ksm_ext.network.outputs import log_odds

f64 = torch.float64
PROJECTORS = [
    FactoredProjector(9, seed=-7),
    FactoredProjector(16, seed=5, sparsity=2),
    FactoredProjector(9, "rademacher", 2**62),
]
every_projector = pytest.mark.parametrize("projector", PROJECTORS, ids=str)
# Those whose gradients come from whole batches, from :mod:`networks`.
HOOKED = [
    *("perceptron", "normalised", "convolutions, batch and group norm, dropout"),
    *("nn.utils.weight_norm", "nn.MultiheadAttention, positions first"),
    *("nn.TransformerEncoderLayer", "low-rank adapters", "tied weights", "nn.EmbeddingBag"),
    *("GPT-2", "GPT-2 without mask", "Llama", "Mixtral", "BERT", "T5", "ViT"),
]


def matrix(projector, num_coordinates, offset):
    """(num_coordinates, k) float64."""
    return projector(torch.eye(num_coordinates, dtype=f64), offset=offset)


def by_matrices(formed, projector):
    """(b, k): P_out G P_inᵀ of every formed gradient, by matrices that are stored."""
    side = round(projector.dim**0.5)
    kind, seed, sparsity = projector.kind, projector.seed, projector.sparsity
    total, offset = 0, 0
    for gradient in formed.values():
        g, (_, *shape) = gradient.to(f64), gradient.shape
        if len(shape) == 2 and min(shape) > side:
            p_out, p_in = (
                matrix(Projector(side, kind, seed ^ bits, sparsity), size, offset)
                for bits, size in zip((_OUT, _IN), shape, strict=True)
            )
            total = total + torch.einsum("boi,or,is->brs", g, p_out, p_in).flatten(1)
        else:
            whole = Projector(projector.dim, kind, seed, sparsity)
            total = total + g.flatten(1) @ matrix(whole, g[0].numel(), offset)
        offset += g[0].numel()
    return total


@every_projector
@pytest.mark.parametrize("name", HOOKED)
def test_features_are_those_of_formed_gradients_by_dense_matrices(name, projector):
    if name in ("GPT-2", "GPT-2 without mask", "Llama", "Mixtral", "BERT", "T5", "ViT"):
        pytest.importorskip("transformers")
    model, batch = made(name)
    options = {"parameters": NETWORKS[name].parameters}
    values, formed = per_sample_gradients(model, log_odds, batch, engine="backward", **options)
    features = collect_features(model, batch, log_odds, projector, **options)
    torch.testing.assert_close(features.values, values, rtol=1e-9, atol=1e-12)
    expected = by_matrices(formed, projector)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(features.gradients, expected, rtol=1e-8, atol=1e-9)
    assert features.engine == "hooks"


@pytest.mark.parametrize("name", ["perceptron", "tied weights", "nn.TransformerEncoderLayer"])
@pytest.mark.parametrize("kind", ["sbp", "rademacher"])
def test_inner_products_are_unbiased(name, kind):
    """Over seeds, within five standard errors of inner products of whole gradients."""
    model, batch = made(name)
    _, parts = Ladder("hooks")(model, log_odds, batch, parameter_names(model))
    weights = dict(model.named_parameters())
    whole = torch.cat([total(own).flatten(1) for own in parts.values()], 1)
    exact = whole @ whole.T
    draws = []
    for seed in range(300):
        projector, features, offset = FactoredProjector(9, kind, seed), 0, 0
        for weight, own in zip(weights.values(), parts.values(), strict=True):
            features = features + projector(own, weight.shape, offset=offset)
            offset += weight.numel()
        draws.append(features @ features.T)
    draws = torch.stack(draws)
    error = draws.std(0) / len(draws) ** 0.5
    assert ((draws.mean(0) - exact).abs() <= 5 * error + 1e-12).all()
    assert error.max() < 0.15 * exact.abs().max(), "or the test could not fail"


@pytest.mark.parametrize(
    "name", ["tied weights", "low-rank adapters", "nn.TransformerEncoderLayer"]
)
def test_features_are_a_samples_own_and_the_same_bits_again(name, tmp_path):
    model, batch = made(name)
    projector = FactoredProjector(16, seed=3)
    options = {"parameters": NETWORKS[name].parameters}

    def collect(**more):
        found = collect_features(model, batch, log_odds, projector, **options, **more)
        return found.gradients

    together = collect()
    assert torch.equal(together, collect())
    assert torch.equal(together, collect(store=tmp_path / "store"))
    for size in (1, 3):
        torch.testing.assert_close(collect(batch_size=size), together, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_weights_have_float32_features(dtype):
    model, batch = made("tied weights", dtype)
    projector = FactoredProjector(16)
    features = collect_features(model, batch, log_odds, projector).gradients
    assert features.dtype == torch.float32
    exact = collect_features(model.double(), batch, log_odds, projector).gradients
    error = (features - exact).norm() / exact.norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


class Wide(nn.Module):
    """A language model of one layer whose weights are larger than all else."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(300, 200), nn.Linear(200, 300, bias=False)

    def forward(self, input_ids):
        return self.head(self.embed(input_ids).tanh())


class Largest(TorchDispatchMode):
    """Entries of the largest tensor that any operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage():
            self.entries = max(self.entries, result.untyped_storage().nbytes() // 4)
        return result


def test_no_gradient_of_the_size_of_a_weight_is_formed():
    torch.manual_seed(0)
    model, ids = Wide(), torch.randint(300, (4, 6))
    sizes = {}
    for projector in (FactoredProjector(64), Projector(64)):
        with Largest() as largest:
            options = {"batch_size": 4, "engine": "hooks"}
            collect_features(
                model, {"input_ids": ids, "labels": ids}, log_odds, projector, **options
            )
        # a weight itself may be a result, as a view of it
        sizes[type(projector)] = largest.entries
    assert sizes[FactoredProjector] <= 200 * 300 < 4 * 200 * 300 <= sizes[Projector]


def test_estimators_take_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    tasks = [(torch.randn(6, 5, dtype=f64), torch.randint(4, (6,))) for _ in range(3)]
    projector = FactoredProjector(4, seed=1)
    estimator = GradientEstimator(model, tasks, {"target": tasks[0]}, projector=projector).fit()
    x = torch.cat([x for x, _ in tasks]), torch.cat([y for _, y in tasks])
    _, formed = per_sample_gradients(model, log_odds, x)
    features = estimator._features[0][0].gradients
    torch.testing.assert_close(features, by_matrices(formed, projector), rtol=1e-9, atol=1e-11)
    assert estimator.predict(torch.ones(1, 3, dtype=torch.bool)).isfinite().all()
    scores = trak(model, tasks, tasks[0], projector=projector, relative_ridge=0.1).values
    assert scores.shape == (3, 1)
    assert scores.abs().max() > 0


@pytest.mark.parametrize("engine", ["vmap", "loop", "backward"])
def test_engines_that_form_gradients_are_refused(engine):
    model, batch = made("perceptron")
    with pytest.raises(ValueError, match=r"`engine` must be .*'hooks'.* Projector"):
        collect_features(model, batch, log_odds, FactoredProjector(16), engine=engine)


def test_networks_whose_gradients_have_no_factors_are_refused():
    model, batch = made("nn.GRU")
    with pytest.raises(RuntimeError, match=r"`engine`.*cannot .*GRU|Reader.* Pass a Projector"):
        collect_features(model, batch, log_odds, FactoredProjector(16))
    assert collect_features(model, batch, log_odds, Projector(16)).gradients.isfinite().all()


def test_what_is_not_a_factored_projector():
    with pytest.raises(ValueError, match=r"`dim` must be a square number, got 1,000. Choose 961"):
        FactoredProjector(1000)
    with pytest.raises(ValueError, match=r"`sparsity`.*divisor of √dim = 32"):
        FactoredProjector(1024, sparsity=64)
    with pytest.raises(ValueError, match="`kind`"):
        FactoredProjector(1024, "dense")
    assert FactoredProjector(16, seed=-(2**63)) != FactoredProjector(16, seed=2**63 - 1)


@pytest.mark.parametrize(
    "name", ["tied weights", "normalised", "low-rank adapters", "Conv1d, instance norm"]
)
@pytest.mark.parametrize("num_bytes", [1, 700])
def test_gradients_formed_block_by_block_are_projected_as_whole_ones(name, num_bytes, monkeypatch):
    model, batch = made(name)
    options = {"parameters": NETWORKS[name].parameters}
    _, formed = per_sample_gradients(model, log_odds, batch, engine="backward", **options)
    monkeypatch.setattr(gradients, "BLOCK_BYTES", num_bytes)
    projector = Projector(16, seed=4)
    features = collect_features(model, batch, log_odds, projector, engine="hooks", **options)
    expected = projector([*formed.values()])
    torch.testing.assert_close(features.gradients, expected, rtol=1e-9, atol=1e-11)


def test_blocks_are_small():
    factors = OuterProducts(torch.randn(3, 5, 7), torch.randn(3, 5, 11), torch.Size((11, 7)))
    rows = Rows(torch.randint(11, (3, 4)), torch.randn(3, 4, 7), torch.Size((11, 7)))
    found = [*blocks([factors, rows], 2 * 3 * 7 * 4)]
    assert [start for start, _ in found] == [*range(0, 77, 14)]
    assert [block.shape[1] for _, block in found] == [2, 2, 2, 2, 2, 1]
    torch.testing.assert_close(torch.cat([block for _, block in found], 1), total([factors, rows]))
