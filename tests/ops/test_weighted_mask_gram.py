"""weighted_mask_gram and weighted_mask_gram_matmul against their float64 loops."""

import math
from functools import partial

import pytest
import reference
import torch
from linear_in_v import LinearInV
from operators import derivatives, refusals
from torch.autograd import forward_ad
from torch.library import opcheck

from ksm_ext import ops

# (m, l, n): 0, 1, off and on the multiples of 4, 16 and 64, more than every block; and tasks for
# which a thread's terms are spread more than once.
SHAPES = [(0, 4, 3), (4, 0, 3), (3, 2, 0), (1, 1, 1), (7, 5, 31), (16, 64, 64), (65, 33, 65)]
SHAPES += [(130, 120, 256), (67, 100, 300), (600, 70, 20), (70, 66, 1100)]
KERNELS = ["rbf", "exponential"]
DTYPES = [torch.float32, torch.float64]


def random_masks(m, n, device="cpu"):
    return (torch.rand(m, n) < torch.rand(m, 1)).to(device)


def random_weights(n, dtype=torch.float64, device="cpu"):
    """Of distances around 2, every tenth zero."""
    weights = torch.rand(n, dtype=dtype) * 4 / max(n, 1)
    weights[::10] = 0
    return weights.to(device)


def bound(n, dtype):
    """Relative error: half a unit for each term of a nibble and each that joins it, and a few."""
    return (n / 4 + 4) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m, l, n", SHAPES)
def test_values_are_those_of_the_weighted_distance(device, m, l, n, kernel, dtype):
    x, y = random_masks(m, n), random_masks(l, n)
    weights = random_weights(n, dtype, device)
    left, right = ops.pack_masks(x.to(device)), ops.pack_masks(y.to(device))
    gram = ops.weighted_mask_gram(left, right, n, weights, kernel=kernel)
    assert gram.is_contiguous() and gram.dtype == dtype
    expected = reference.weighted_mask_gram(x, y, weights.cpu(), kernel)
    torch.testing.assert_close(gram.cpu().double(), expected, rtol=bound(n, dtype), atol=0)
    exchanged = ops.weighted_mask_gram(right, left, n, weights, kernel=kernel)
    assert torch.equal(exchanged.T, gram)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [20, 64, 100])
def test_values_of_few_tasks_are_right_to_a_few_units(n, kernel):
    x, weights = random_masks(300, n), random_weights(n)
    gram = ops.weighted_mask_gram(ops.pack_masks(x), None, n, weights, kernel=kernel)
    expected = reference.weighted_mask_gram(x, x, weights, kernel)
    units = ((gram - expected) / expected).abs() / torch.finfo(torch.float64).eps
    assert units.max() <= 10 and units.square().mean().sqrt() <= 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m, n", [(0, 3), (1, 1), (3, 0), (64, 65), (129, 256), (200, 70)])
def test_symmetric_gram_equals_the_explicit_one(device, m, n, kernel, dtype):
    x = ops.pack_masks(random_masks(m, n, device))
    weights, factors = random_weights(n, dtype, device), torch.randn(m, dtype=dtype, device=device)
    gram = partial(ops.weighted_mask_gram, num_tasks=n, weights=weights, kernel=kernel)
    assert torch.equal(gram(x, None), gram(x, x))
    scaled = gram(x, None, x_factors=factors)
    assert torch.equal(scaled, gram(x, x, x_factors=factors, y_factors=factors))
    assert torch.equal(scaled, scaled.T)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, l, n", SHAPES)
def test_factors_multiply_rows_and_columns(device, m, l, n, dtype):
    x, y = ops.pack_masks(random_masks(m, n, device)), ops.pack_masks(random_masks(l, n, device))
    weights = random_weights(n, dtype, device)
    a, b = (torch.randn(count, dtype=dtype, device=device) for count in (m, l))
    plain = ops.weighted_mask_gram(x, y, n, weights)
    scaled = ops.weighted_mask_gram(x, y, n, weights, x_factors=a, y_factors=b)
    assert torch.equal(scaled, plain * (a[:, None] * b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_equal_weights_are_a_shared_decay(device, kernel, dtype):
    n, gamma = 90, 0.03
    x = ops.pack_masks(random_masks(150, n, device))
    h = torch.arange(n + 1, dtype=torch.float64)
    table = torch.exp(-(gamma * h if kernel == "rbf" else (gamma * h).sqrt()))
    expected = ops.mask_gram(x, None, n, hamming_table=table.to(device, dtype))
    weights = torch.full((n,), gamma, dtype=dtype, device=device)
    gram = ops.weighted_mask_gram(x, None, n, weights, kernel=kernel)
    torch.testing.assert_close(gram, expected, rtol=bound(n, dtype), atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_infinite_weights_separate_subsets_that_differ(device, kernel, dtype):
    x = random_masks(100, 9)
    weights = torch.zeros(9, dtype=dtype, device=device)
    weights[4] = torch.inf
    packed = ops.pack_masks(x.to(device))
    gram = ops.weighted_mask_gram(packed, None, 9, weights, kernel=kernel)
    assert torch.equal(gram.cpu(), (x[:, None, 4] == x[None, :, 4]).to(dtype))
    huge = torch.full((9,), torch.finfo(dtype).max, dtype=dtype, device=device)
    gram = ops.weighted_mask_gram(packed, None, 9, huge, kernel=kernel)
    assert torch.equal(gram.cpu(), (x[:, None] == x[None]).all(2).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_that_would_be_subnormal_are_zero(device, dtype):
    """On the way there, products are let go to zero by some processors and not by others."""
    n, least = 100, 2 * torch.finfo(dtype).tiny
    x = random_masks(150, n)
    weights = random_weights(n, dtype) * -math.log(least)  # distances around the last one
    gram = ops.weighted_mask_gram(ops.pack_masks(x.to(device)), None, n, weights.to(device)).cpu()
    assert not ((gram > 0) & (gram < least)).any()
    expected = reference.weighted_mask_gram(x, x, weights, "rbf")
    assert 0.1 < (expected < least).double().mean() < 0.9
    positive = gram > 0
    assert torch.equal(positive, expected >= least)
    relative = (gram.double() / expected)[positive] - 1
    assert relative.abs().max() <= 100 * bound(n, dtype)


def test_large_results_take_the_streaming_path():
    for m in (2912, 2911):  # above 32 MiB, with and without rows that fill whole cache lines
        x, weights = ops.pack_masks(random_masks(m, 40)), random_weights(40, torch.float32)
        full = ops.weighted_mask_gram(x, None, 40, weights)
        assert full.numel() * 4 > 32 << 20
        for rows in (slice(0, 70), slice(m - 70, m)):
            assert torch.equal(full[rows], ops.weighted_mask_gram(x[rows], x, 40, weights))
            assert torch.equal(full[:, rows], ops.weighted_mask_gram(x, x[rows], 40, weights))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("t", [0, 7])
@pytest.mark.parametrize("m, l, n", SHAPES)
def test_matmul_is_gram_times_v(device, m, l, n, t, kernel, dtype):
    x, y = random_masks(m, n), random_masks(l, n)
    weights = random_weights(n, dtype, device)
    v = torch.randn(l, t, dtype=dtype, device=device)
    left, right = ops.pack_masks(x.to(device)), ops.pack_masks(y.to(device))
    out = ops.weighted_mask_gram_matmul(left, right, n, weights, v, kernel=kernel)
    expected = reference.weighted_mask_gram(x, y, weights.cpu(), kernel) @ v.cpu().double()
    assert out.dtype == dtype
    tolerance = (l + 1) * bound(n, dtype)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("m, n, t", [(0, 5, 2), (1, 1, 1), (64, 70, 3), (700, 300, 5)])
def test_symmetric_matmul_is_gram_times_v(device, m, n, t, kernel, dtype):
    x, weights = random_masks(m, n), random_weights(n, dtype, device)
    v = torch.randn(m, t, dtype=dtype, device=device)
    packed = ops.pack_masks(x.to(device))
    out = ops.weighted_mask_gram_matmul(packed, None, n, weights, v, kernel=kernel)
    expected = reference.weighted_mask_gram(x, x, weights.cpu(), kernel) @ v.cpu().double()
    tolerance = (m + 1) * bound(n, dtype)
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("m", [*range(1, 1100, 97), 1024, 1025, 4500])
def test_every_pair_of_masks_is_multiplied_once(m):
    x = ops.pack_masks(torch.zeros(m, 3, dtype=torch.bool))
    v, weights = torch.randint(0, 9, (m, 2)).double(), torch.ones(3).double()
    product = ops.weighted_mask_gram_matmul(x, None, 3, weights, v)
    assert torch.equal(product, v.sum(0).expand(m, 2))


def test_strided_inputs_are_copied(device):
    n = 100
    x, weights = ops.pack_masks(random_masks(12, n, device)), random_weights(n, device=device)
    v, factors = torch.randn(2, 2, 12, dtype=torch.float64, device=device)
    twice = partial(torch.stack, dim=-1)
    strided_x, strided_weights = twice([x, x])[..., 0], twice([weights, weights])[..., 0]
    strided_factors = factors.T[:, 0]
    found = ops.weighted_mask_gram(strided_x, None, n, strided_weights, x_factors=strided_factors)
    assert torch.equal(found, ops.weighted_mask_gram(x, None, n, weights, x_factors=factors[0]))
    product = ops.weighted_mask_gram_matmul(strided_x, strided_x, n, strided_weights, v.T)
    assert torch.equal(product, ops.weighted_mask_gram_matmul(x, x, n, weights, v.T.contiguous()))


# Derivatives: linear in v, nothing in weights and factors.


@pytest.fixture(params=[*KERNELS, "symmetric"])
def problem(request):
    """A matmul of float64 as a function of v, and its dense matrix."""
    n, symmetric = 70, request.param == "symmetric"
    kernel = "rbf" if symmetric else request.param
    x, y, weights = random_masks(9, n), random_masks(5, n), random_weights(n)
    packed = None if symmetric else ops.pack_masks(y)
    function = partial(_matmul, ops.pack_masks(x), packed, n, weights, kernel)
    return function, reference.weighted_mask_gram(x, x if symmetric else y, weights, kernel)


def _matmul(x, y, n, weights, kernel, v):
    return ops.weighted_mask_gram_matmul(x, y, n, weights, v, kernel=kernel)


class TestDerivatives(LinearInV):
    pass


def test_vmap_batches_masks_weights_and_factors():
    n = 20
    packed = torch.stack([ops.pack_masks(random_masks(4, n)) for _ in range(3)])
    weights = torch.stack([random_weights(n) for _ in range(3)])
    a, v = torch.randn(3, 4).double(), torch.randn(3, 4, 2).double()
    grams = torch.func.vmap(lambda x, w, a: ops.weighted_mask_gram(x, None, n, w, x_factors=a))(
        packed, weights, a
    )
    products = torch.func.vmap(lambda x, w, u: ops.weighted_mask_gram_matmul(x, None, n, w, u))(
        packed, weights, v
    )
    for b in range(3):
        expected = ops.weighted_mask_gram(packed[b], None, n, weights[b], x_factors=a[b])
        assert torch.equal(grams[b], expected)
    torch.testing.assert_close(a[:, :, None] * products, grams @ (v / a[:, :, None]))


def test_weights_and_factors_refuse_gradients_and_tangents():
    n = 10
    x, v = ops.pack_masks(random_masks(4, n)), torch.randn(4, 1)
    weights, factors = torch.rand(n), torch.randn(4)
    calls = [
        (lambda w: ops.weighted_mask_gram(x, None, n, w), weights, "weights"),
        (lambda w: ops.weighted_mask_gram_matmul(x, x, n, w, v), weights, "weights"),
        (lambda a: ops.weighted_mask_gram(x, None, n, weights, x_factors=a), factors, "x_factors"),
        (
            lambda b: ops.weighted_mask_gram(x, x, n, weights, x_factors=factors, y_factors=b),
            factors,
            "y_factors",
        ),
    ]
    for call, value, name in calls:
        text = f"`{name}` must be a constant, got a tensor with a"
        for derivative in derivatives(call, value):
            with pytest.raises(ValueError, match=text):
                derivative()
        with forward_ad.dual_level(), pytest.raises(ValueError, match=text):
            call(forward_ad.make_dual(value, value))
        with torch.no_grad():
            call(value.clone().requires_grad_())


@pytest.mark.parametrize("kernel", [0, 1])
def test_opcheck(device, kernel):
    n = 70
    x, y = (ops.pack_masks(random_masks(m, n, device)) for m in (6, 9))
    weights = random_weights(n, device=device)
    a, b = (torch.randn(m, dtype=torch.float64, device=device) for m in (6, 9))
    v = torch.randn(9, 2, dtype=torch.float64, device=device)
    gram = torch.ops.ksm_ext.weighted_mask_gram.default
    matmul = torch.ops.ksm_ext.weighted_mask_gram_matmul.default
    opcheck(gram, (x, y, n, weights, kernel, a, b))
    opcheck(gram, (x, y, n, weights, kernel, None, None))
    opcheck(gram, (x, None, n, weights, kernel, a, None))
    opcheck(matmul, (x, y, n, weights, kernel, v))
    opcheck(matmul, (y, None, n, weights, kernel, v))


# Errors: <name> must be <expected>, got <found>. <what to do>.

N = 70
X = torch.zeros(4, 2, dtype=torch.int64)
STRAY = -(2**62)  # bits 62 and 63 of both words: past the 70th task
W = torch.zeros(N)
A = torch.ones(4)
V = torch.zeros(4, 1)


def gram(x=X, y=None, n=N, w=W, kernel="rbf", a=None, b=None):
    return ops.weighted_mask_gram(x, y, n, w, kernel=kernel, x_factors=a, y_factors=b)


def product(v, y=X):
    return ops.weighted_mask_gram_matmul(X, y, N, W, v)


def weights_with(value):
    return W.index_fill(0, torch.tensor([7]), value)


VALUES = {
    "`num_tasks` must be at least 0, got -1": lambda: gram(n=-1),
    "`x` must be of 2 words for 70 tasks, got shape": lambda: gram(x=X[:, :1]),
    "`y` must be on cpu like the first argument, got meta": lambda: gram(y=X.to("meta")),
    "`kernel` must be one of .*, got 'laplace'": lambda: gram(kernel="laplace"),
    "`weights` must be of 70 values, got shape": lambda: gram(w=W[1:]),
    "`weights` must be 1-dimensional": lambda: gram(w=W[:, None]),
    "`weights` must be on cpu like the first": lambda: gram(w=W.to("meta")),
    "`x_factors` must be of 4 values, got shape": lambda: gram(a=A[1:]),
    "`x_factors` must be 1-dimensional": lambda: gram(a=A[:, None]),
    "`y_factors` must be None without y, got a": lambda: gram(a=A, b=A),
    "`y_factors` must be given where x_factors are": lambda: gram(y=X, a=A),
    "`y_factors` must be of 4 values, got shape": lambda: gram(y=X, a=A, b=A[1:]),
    "`v` must be of 4 rows like y, got shape": lambda: product(V[1:]),
    "`v` must be of 4 rows like x, got": lambda: product(V[1:], None),
}
DTYPES_THAT_DIFFER = {
    "`x` must be packed masks of torch.int64, got": lambda: gram(x=X.int()),
    "`weights` must be float32 or float64": lambda: gram(w=W.half()),
    "`x_factors` must be of dtype torch.float32": lambda: gram(a=A.double()),
    "`v` must be of dtype torch.float32 like the weights": lambda: product(V.double()),
}
ERRORS = {ValueError: VALUES, TypeError: DTYPES_THAT_DIFFER}


@pytest.mark.parametrize("error, message, call", refusals(ERRORS))
def test_errors_name_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "message, call",
    [
        (
            "x must be contiguous",
            lambda gram, _: gram(X[:, :1].expand(4, 2), None, N, W, 0, None, None),
        ),
        (
            "x must be packed masks of 70",
            lambda gram, _: gram(X | STRAY, None, N, W, 0, None, None),
        ),
        ("y must be packed masks of 70", lambda _, product: product(X, X | STRAY, N, W, 0, V)),
        ("x must be of 2 words", lambda gram, _: gram(X[:, :0].clone(), None, N, W, 0, None, None)),
        ("weights must be of 70 val", lambda gram, _: gram(X, None, N, W[1:], 0, None, None)),
        ("weights must be of dtype", lambda gram, _: gram(X, None, N, W.half(), 0, None, None)),
        (
            "weights must be at least 0, got -1 at 7",
            lambda gram, _: gram(X, None, N, weights_with(-1), 0, None, None),
        ),
        (
            "weights must be at least 0, got nan at 7",
            lambda _, product: product(X, None, N, weights_with(torch.nan), 1, V),
        ),
        ("kernel must be the number", lambda gram, _: gram(X, None, N, W, 2, None, None)),
        ("x_factors must be of 4 val", lambda gram, _: gram(X, None, N, W, 0, A[1:], None)),
        (
            "x_factors must be of the dtype",
            lambda gram, _: gram(X, None, N, W, 0, A.double(), None),
        ),
        ("y_factors must be given exactly", lambda gram, _: gram(X, X, N, W, 0, A, None)),
        ("y_factors must be given exactly", lambda gram, _: gram(X, None, N, W, 0, A, A)),
        ("v must be of 4 rows", lambda _, product: product(X, X, N, W, 0, V[1:])),
        ("v must be of the dtype", lambda _, product: product(X, X, N, W, 0, V.double())),
    ],
)
def test_the_operators_themselves_refuse_what_would_corrupt_memory(message, call):
    operators = torch.ops.ksm_ext
    with pytest.raises(RuntimeError, match=message):
        call(operators.weighted_mask_gram, operators.weighted_mask_gram_matmul)
