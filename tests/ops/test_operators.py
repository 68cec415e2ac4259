"""What holds for every operator: compiled whole, captured in graphs, on any stream and device."""

import subprocess
import sys

import pytest
import torch
from instruction_sets import check_every_instruction_set
from operators import SHARED, SIZES, calls, check_any_number_of_threads

from ksm_ext import ops

CALLS = calls()
every_call = pytest.mark.parametrize("name", CALLS)
OPERATORS = list(dict.fromkeys(name.split(",")[0] for name in CALLS))


def same_bits(found, expected):
    assert len(found) == len(expected) > 0
    for tensor, other in zip(found, expected, strict=True):
        assert tensor.dtype == other.dtype and torch.equal(tensor.cpu(), other.cpu())


def test_every_operator_is_called():
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("ksm_ext::")]
    assert {name.removeprefix("ksm_ext::") for name in names} <= set(OPERATORS)


@pytest.mark.parametrize("size", ["one", "odd"])
def test_calls_repeat_their_bits_and_keep_their_arguments(size):
    for name, call in calls(SIZES[size]).items():
        before = [tensor.clone() for tensor in call.tensors]
        same_bits(call.results(), call.results())
        for tensor, kept in zip(call.tensors, before, strict=True):
            assert torch.equal(tensor, kept), name


def test_results_do_not_depend_on_threads():
    check_any_number_of_threads(
        lambda: {name: call.results() for name, call in calls(SHARED).items()}
    )


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="PyTorch multiplies without MKL")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("b", "k", "m", "n"), [(1000, 300, 150, 10), (2000, 512, 300, 20)])
def test_products_of_any_size_do_not_depend_on_threads(b, k, m, n, dtype):
    """MKL cuts large ones by the threads that it may have, and each cut rounds in its own way."""
    generator = torch.Generator().manual_seed(b)
    x, y, v, margins = (
        torch.randn(*shape, generator=generator, dtype=dtype)
        for shape in ((b, k), (k, k), (m, k), (b,))
    )
    offsets = torch.linspace(0, b, n + 1).long()
    masks = torch.rand(m, n, generator=generator) < 0.5

    def results():
        gradient = ops.glm_gradient(x, margins, offsets, masks, v, curvature_dtype=dtype)
        products = ops.glm_hvp(x, offsets, masks, v, curvature=gradient.curvature)
        return {
            "glm_gradient": [gradient.gradient, gradient.objective, gradient.curvature],
            "glm_hvp": [products],
            "gram_update": [ops.gram_update(y.clone(), x)],
            "task_gram": [
                ops.task_gram(x, offsets),
                ops.task_gram(x, offsets, x[:, :9].contiguous()),
            ],
            "kernel_gram": [ops.kernel_gram(x, other, "rbf", gamma=1 / k) for other in (None, y)],
        }

    check_any_number_of_threads(results)


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set("operators")


@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_without_a_graph_break(operator, device):
    name = next(name for name in CALLS if name.split(",")[0] == operator)
    call = CALLS[name].on(device)
    expected = call.results()
    torch._dynamo.reset()
    compiled = torch.compile(call.run, backend="aot_eager", fullgraph=True)
    found = compiled(*call.tensors)
    found = [found] if isinstance(found, torch.Tensor) else [x for x in found if x is not None]
    same_bits(found, expected)


TANGENT_IN_A_GRAPH = """
from ksm_ext import ops
x = ops.pack_masks(torch.eye(3, dtype=torch.bool))
table, v = torch.arange(4.0), torch.ones(3, 1)
product = lambda v: ops.mask_gram_matmul(x, None, 3, v, overlap_table=table)
tangent = lambda v: torch.func.jvp(product, (v,), (v,))[1]
assert torch.equal(torch.compile(tangent, backend="aot_eager", fullgraph=True)(v), v)
"""


@pytest.mark.parametrize(
    "imports",
    [
        "import ksm_ext, sys, torch; assert 'torch._dynamo' not in sys.modules",
        "import torch._dynamo, ksm_ext",
    ],
)
def test_graphs_keep_tangents_whenever_the_compiler_is_imported(imports):
    """It takes as long as the rest of torch: importing ksm_ext leaves it alone."""
    subprocess.run([sys.executable, "-c", imports + TANGENT_IN_A_GRAPH], check=True)


@pytest.mark.cuda
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_cuda_finds_what_the_cpu_does(size, dtype):
    exact = ("pack_masks", "mask_gram,", "mask_gram ", "weighted_mask_gram,", "weighted_mask_gram ")
    tolerance = 1e-4 if dtype == torch.float32 else 1e-12
    for name, call in calls(SIZES[size], dtype).items():
        results = zip(call.on("cuda").results(), call.results(), strict=True)
        for found, expected in results:
            if f"{name} ".startswith(exact):
                assert torch.equal(found.cpu(), expected), name
                continue
            error = (found.cpu() - expected).abs().double().max()
            assert error <= tolerance * expected.abs().double().max().clamp_min(1), name


@pytest.mark.cuda
@every_call
def test_a_graph_replays_on_new_values(name):
    call, other = CALLS[name].on("cuda"), calls(seed=1)[name].on("cuda")
    expected = other.results()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call.results()  # what is made at a first call
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call.results()
    for tensor, value in zip(call.tensors, other.tensors, strict=True):
        tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    same_bits(found, expected)


@pytest.mark.cuda
@every_call
def test_work_is_enqueued_on_the_current_stream(name):
    call, other = CALLS[name].on("cuda"), calls(seed=1)[name].on("cuda")
    expected = other.results()
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # a kernel on another stream would overtake the copies
        for tensor, value in zip(call.tensors, other.tensors, strict=True):
            tensor.copy_(value)
        found = call.results()
    torch.cuda.synchronize()
    same_bits(found, expected)


@pytest.mark.cuda
@every_call
def test_another_device_than_the_current_one(name):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    found = CALLS[name].on("cuda:1").results()
    assert all(tensor.device == torch.device("cuda:1") for tensor in found)
    assert torch.cuda.current_device() == 0
    same_bits(found, CALLS[name].on("cuda:0").results())
