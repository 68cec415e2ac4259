"""pack_masks, mask_gram and mask_gram_matmul against their float64 loops."""

from functools import partial

import pytest
import reference
import torch
from instruction_sets import run_with
from linear_in_v import LinearInV
from operators import derivatives, refusals
from torch.autograd import forward_ad
from torch.library import opcheck

from ksm_ext import ops

# (m, l, n): 0, 1, off and on the multiples of 16, 32 and 64, and larger than every block.
SHAPES = [(0, 4, 3), (4, 0, 3), (3, 2, 0), (1, 1, 1), (7, 5, 31), (16, 64, 64), (65, 33, 65)]
SHAPES += [(130, 120, 256), (67, 100, 300), (70, 30, 1024)]
TABLES = ["hamming", "overlap", "both"]
DTYPES = [torch.float32, torch.float64]


def random_masks(m, n, device="cpu"):
    return (torch.rand(m, n) < torch.rand(m, 1)).to(device)


def random_tables(which, n, dtype, device="cpu"):
    """Tables without structure: a wrong count shows as a wrong value."""
    names = ("hamming", "overlap") if which == "both" else (which,)
    return {f"{name}_table": torch.randn(n + 1, dtype=dtype, device=device) for name in names}


def on_cpu(tables):
    return tuple(
        tables[name].cpu() if name in tables else None
        for name in ("hamming_table", "overlap_table")
    )


@pytest.mark.parametrize("m, n", sorted({(m, n) for m, _, n in SHAPES} | {(3, 128), (300, 63)}))
def test_pack_masks_sets_one_bit_per_task(device, m, n):
    masks = random_masks(m, n)
    packed = ops.pack_masks(masks.to(device))
    assert torch.equal(packed.cpu(), reference.pack_masks(masks))


def test_any_byte_but_zero_is_true():
    """NumPy and PyTorch both view other memory as booleans, and take it so."""
    content = torch.tensor([[0, 1, 2, 255, 128, 0, 16, 3, 0, 254]], dtype=torch.uint8)
    packed = ops.pack_masks(content.view(torch.bool))
    assert torch.equal(packed, reference.pack_masks(content != 0))


def test_pack_masks_takes_strided_masks():
    masks = random_masks(70, 20)
    assert torch.equal(ops.pack_masks(masks.T), reference.pack_masks(masks.T.clone()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", TABLES)
@pytest.mark.parametrize("m, l, n", SHAPES)
def test_mask_gram_is_the_tables_own_values(device, m, l, n, which, dtype):
    x, y = random_masks(m, n), random_masks(l, n)
    tables = random_tables(which, n, dtype, device)
    gram = ops.mask_gram(ops.pack_masks(x.to(device)), ops.pack_masks(y.to(device)), n, **tables)
    assert gram.is_contiguous() and gram.dtype == dtype
    assert torch.equal(gram.cpu(), reference.mask_gram(x, y, *on_cpu(tables)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", TABLES)
@pytest.mark.parametrize("m, n", [(0, 3), (1, 1), (3, 0), (64, 65), (129, 256), (200, 70)])
def test_symmetric_gram_equals_the_explicit_one(device, m, n, which, dtype):
    x = ops.pack_masks(random_masks(m, n, device))
    tables = random_tables(which, n, dtype, device)
    assert torch.equal(ops.mask_gram(x, None, n, **tables), ops.mask_gram(x, x, n, **tables))


def test_counts_pass_sixteen_bits(device):
    n = 66_000
    x = torch.ones(2, n, dtype=torch.bool)
    x[1, ::2] = False
    packed = ops.pack_masks(x.to(device))
    index = torch.arange(n + 1, dtype=torch.float32, device=device)
    for which, count in (("overlap", reference.overlap), ("hamming", reference.hamming)):
        gram = ops.mask_gram(packed, None, n, **{f"{which}_table": index})
        assert torch.equal(gram.cpu().long(), count(x, x))


def test_large_results_take_the_streaming_path():
    for m in (2912, 2911):  # above 32 MiB, with and without rows that fill whole cache lines
        x = ops.pack_masks(random_masks(m, 40))
        table = torch.randn(41)
        full = ops.mask_gram(x, None, 40, hamming_table=table)
        assert full.numel() * 4 > 32 << 20
        for rows in (slice(0, 70), slice(m - 70, m)):
            assert torch.equal(full[rows], ops.mask_gram(x[rows], x, 40, hamming_table=table))
            assert torch.equal(full[:, rows], ops.mask_gram(x, x[rows], 40, hamming_table=table))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", TABLES)
@pytest.mark.parametrize("t", [0, 1, 3, 8])
@pytest.mark.parametrize("m, l, n", SHAPES)
def test_mask_gram_matmul_is_gram_times_v(device, m, l, n, t, which, dtype):
    x, y = random_masks(m, n), random_masks(l, n)
    tables = random_tables(which, n, dtype, device)
    v = torch.randn(l, t, dtype=dtype, device=device)
    out = ops.mask_gram_matmul(
        ops.pack_masks(x.to(device)), ops.pack_masks(y.to(device)), n, v, **tables
    )
    expected = reference.mask_gram_matmul(x, y, *on_cpu(tables), v.cpu())
    assert out.dtype == dtype
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=float(l + 1) * 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", TABLES)
@pytest.mark.parametrize("m, n, t", [(0, 5, 2), (1, 1, 1), (64, 70, 3), (65, 64, 8), (700, 300, 5)])
def test_symmetric_matmul_is_gram_times_v(device, m, n, t, which, dtype):
    x = random_masks(m, n)
    tables = random_tables(which, n, dtype, device)
    v = torch.randn(m, t, dtype=dtype, device=device)
    out = ops.mask_gram_matmul(ops.pack_masks(x.to(device)), None, n, v, **tables)
    expected = reference.mask_gram_matmul(x, x, *on_cpu(tables), v.cpu())
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=float(m + 1) * 1e-6)


@pytest.mark.parametrize("m", [*range(1, 1100, 97), 1024, 1025, 8200])
def test_every_pair_of_masks_is_multiplied_once(m):
    x = ops.pack_masks(torch.zeros(m, 3, dtype=torch.bool))
    v = torch.randint(0, 9, (m, 2)).double()
    product = ops.mask_gram_matmul(x, None, 3, v, hamming_table=torch.ones(4).double())
    assert torch.equal(product, v.sum(0).expand(m, 2))


def test_float32_sums_of_many_columns_stay_near_float64(device):
    l, n = 100_000, 64
    x, y = random_masks(4, n, device), random_masks(l, n, device)
    table = torch.rand(n + 1, device=device)  # positive terms: a float32 running sum would drift
    v = torch.rand(l, 2, device=device)
    x, y = ops.pack_masks(x), ops.pack_masks(y)
    out = ops.mask_gram_matmul(x, y, n, v, hamming_table=table)
    exact = ops.mask_gram_matmul(x, y, n, v.double(), hamming_table=table.double())
    torch.testing.assert_close(out.double(), exact, rtol=2e-7, atol=0)


def test_strided_inputs_are_copied(device):
    n = 100
    masks = random_masks(12, n, device)
    x, table = ops.pack_masks(masks), torch.randn(n + 1, device=device)
    v = torch.randn(2, 12, device=device)
    strided_x = torch.stack([x, x], dim=2)[:, :, 0]
    strided_table = torch.stack([table, table], dim=1)[:, 0]
    assert not strided_x.is_contiguous() and not strided_table.is_contiguous()
    expected = ops.mask_gram(x, None, n, hamming_table=table)
    assert torch.equal(ops.mask_gram(strided_x, None, n, hamming_table=strided_table), expected)
    product = ops.mask_gram_matmul(strided_x, strided_x, n, v.T, overlap_table=strided_table)
    contiguous = ops.mask_gram_matmul(x, x, n, v.T.contiguous(), overlap_table=table)
    assert torch.equal(product, contiguous)


def test_an_unknown_instruction_set_is_refused():
    result = run_with("sse9", "import torch; from ksm_ext import _C; _C.cpu_instruction_set()")
    assert "KSM_EXT_CPU_ISA must be one of {" in result.stderr
    assert "got sse9. Unset it" in result.stderr


# Derivatives: linear in v, nothing in the tables.


@pytest.fixture(params=[*TABLES, "symmetric"])
def problem(request):
    """A matmul of float64 as a function of v, and its dense matrix."""
    n, symmetric = 70, request.param == "symmetric"
    x, y = random_masks(9, n), random_masks(5, n)
    tables = random_tables("both" if symmetric else request.param, n, torch.float64)
    packed = None if symmetric else ops.pack_masks(y)
    function = partial(_matmul, ops.pack_masks(x), packed, n, tables)
    return function, reference.mask_gram(x, x if symmetric else y, *on_cpu(tables))


def _matmul(x, y, n, tables, v):
    return ops.mask_gram_matmul(x, y, n, v, **tables)


class TestDerivatives(LinearInV):
    pass


def test_vmap_batches_masks_and_tables():
    n = 20
    masks = random_masks(12, n).reshape(3, 4, n)
    packed = torch.stack([ops.pack_masks(rows) for rows in masks])
    tables, v = torch.randn(3, n + 1), torch.randn(3, 4, 2)
    grams = torch.func.vmap(lambda x, a: ops.mask_gram(x, x, n, hamming_table=a))(packed, tables)
    products = torch.func.vmap(lambda x, a, u: ops.mask_gram_matmul(x, x, n, u, hamming_table=a))(
        packed, tables, v
    )
    for b in range(3):
        assert torch.equal(grams[b], ops.mask_gram(packed[b], None, n, hamming_table=tables[b]))
    torch.testing.assert_close(products, grams @ v)


def test_tables_refuse_gradients_and_tangents():
    n = 10
    x, v = ops.pack_masks(random_masks(4, n)), torch.randn(4, 1)
    table = torch.randn(n + 1)
    calls = [
        lambda a: ops.mask_gram(x, None, n, hamming_table=a),
        lambda a: ops.mask_gram(x, None, n, overlap_table=a),
        lambda a: ops.mask_gram_matmul(x, x, n, v, hamming_table=a),
        lambda a: ops.mask_gram_matmul(x, x, n, v, overlap_table=a),
    ]
    for call in calls:
        for derivative in derivatives(call, table):
            with pytest.raises(ValueError, match="_table` must be a constant, got a tensor with a"):
                derivative()
        with forward_ad.dual_level(), pytest.raises(ValueError, match="must be a constant"):
            call(forward_ad.make_dual(table, table))
        with torch.no_grad():
            call(table.clone().requires_grad_())


@pytest.mark.parametrize("which", TABLES)
def test_opcheck(device, which):
    n = 70
    x, y = (ops.pack_masks(random_masks(m, n, device)) for m in (6, 9))
    tables = random_tables(which, n, torch.float64, device)
    pair = tables.get("hamming_table"), tables.get("overlap_table")
    v = torch.randn(9, 2, dtype=torch.float64, device=device)
    opcheck(torch.ops.ksm_ext.pack_masks.default, (random_masks(6, n, device),))
    opcheck(torch.ops.ksm_ext.mask_gram.default, (x, y, n, *pair))
    opcheck(torch.ops.ksm_ext.mask_gram.default, (x, None, n, *pair))
    opcheck(torch.ops.ksm_ext.mask_gram_matmul.default, (x, y, n, *pair, v))
    opcheck(torch.ops.ksm_ext.mask_gram_matmul.default, (y, None, n, *pair, v))


# Errors: <name> must be <expected>, got <found>. <what to do>.

N = 70
X = torch.zeros(4, 2, dtype=torch.int64)
STRAY = -(2**62)  # bits 62 and 63 of both words: past the 70th task
A = torch.zeros(N + 1)
V = torch.zeros(4, 1)


def gram(x=X, y=None, n=N, a=A, b=None):
    return ops.mask_gram(x, y, n, hamming_table=a, overlap_table=b)


def product(v, y=X):
    return ops.mask_gram_matmul(X, y, N, v, hamming_table=A)


VALUES = {
    r"`masks` must be 2-dim.*shape \(3,\)": lambda: ops.pack_masks(A[:3] > 0),
    "`num_tasks` must be at least 0, got -1": lambda: gram(n=-1),
    r"`x` must be 2-dimensional, got shape \(2,\)": lambda: gram(x=X[0]),
    "`x` must be of 2 words for 70 tasks, got shape": lambda: gram(x=X[:, :1]),
    "`y` must be of 2 words for 70 tasks, got shape": lambda: gram(y=X[:, :1]),
    "`y` must be on cpu like the first argument, got meta": lambda: gram(y=X.to("meta")),
    "`hamming_table` must be given where overlap_t": lambda: gram(a=None),
    "`hamming_table` must be of 71 values, got": lambda: gram(a=A[1:]),
    "`hamming_table` must be 1-dimensional": lambda: gram(a=A[:, None]),
    "`v` must be 2-dimensional": lambda: product(V[:, 0]),
    r"`v` must be of 4 rows like y, got shape \(3, 1\)": lambda: product(V[1:]),
    "`v` must be of 4 rows like x, got": lambda: product(V[1:], None),
}
DTYPES_THAT_DIFFER = {
    "`masks` must be of dtype torch.bool, got torch.fl": lambda: ops.pack_masks(V),
    "`x` must be packed masks of torch.int64, got": lambda: gram(x=X.int()),
    "`hamming_table` must be float32 or float64": lambda: gram(a=A.half()),
    "`overlap_table` must be of dtype torch.float32": lambda: gram(b=A.double()),
    "`v` must be of dtype torch.float32 like": lambda: product(V.double()),
}
ERRORS = {ValueError: VALUES, TypeError: DTYPES_THAT_DIFFER}


@pytest.mark.parametrize("error, message, call", refusals(ERRORS))
def test_errors_name_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "message, call",
    [
        ("masks must be contiguous", lambda op: op.pack_masks((V > 0).expand(4, 3))),
        ("masks must be of dtype bool", lambda op: op.pack_masks(V)),
        ("x must be contiguous", lambda op: op.mask_gram(X[:, :1].expand(4, 2), None, N, A, None)),
        ("x must be packed masks of dtype", lambda op: op.mask_gram(X.int(), None, N, A, None)),
        ("x must be packed masks of 70", lambda op: op.mask_gram(X | STRAY, None, N, A, None)),
        ("y must be packed masks of 70", lambda op: op.mask_gram(X, X | STRAY, N, None, A)),
        ("y must be packed", lambda op: op.mask_gram_matmul(X, X | STRAY, N, A, None, V)),
        ("x must be packed", lambda op: op.mask_gram_matmul(X | STRAY, None, N, A, None, V)),
        ("x must be of 2 words", lambda op: op.mask_gram(X[:, :0].clone(), None, N, A, None)),
        ("hamming_table must be of 71 val", lambda op: op.mask_gram(X, None, N, A[1:], None)),
        ("hamming_table must be given", lambda op: op.mask_gram(X, None, N, None, None)),
        ("overlap_table must be of the dtype", lambda op: op.mask_gram(X, X, N, A, A.double())),
        ("v must be of 4 rows", lambda op: op.mask_gram_matmul(X, X, N, A, None, V[1:])),
        ("v must be of the dtype", lambda op: op.mask_gram_matmul(X, X, N, A, None, V.double())),
    ],
)
def test_the_operators_themselves_refuse_what_would_corrupt_memory(message, call):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.ksm_ext)


def test_cuda_tensors_without_cuda_kernels_say_so(monkeypatch):
    from torch._subclasses import FakeTensorMode

    if ops.BUILT_WITH_CUDA and torch.version.cuda:
        pytest.skip("the CUDA kernels are here")
    with FakeTensorMode(allow_non_fake_inputs=True):
        masks = torch.empty(2, 3, dtype=torch.bool, device="cuda")
        with pytest.raises(RuntimeError, match=r"`masks` must be .* but no CUDA device"):
            ops.pack_masks(masks)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        with pytest.raises(RuntimeError, match=r"built without CUDA\. Reinstall with"):
            ops.pack_masks(masks)
