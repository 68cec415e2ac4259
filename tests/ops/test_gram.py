"""gram_update, task_gram and kernel_gram against their float64 loops."""

from functools import partial

import pytest
import reference
import torch
from operators import compiled_or_not, derivatives, refusals
from torch.library import opcheck

from ksm_ext import ops
from ksm_ext.ops.gram import KINDS

DTYPES = [torch.float32, torch.float64]
EXACT = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.float64: {"rtol": 1e-10, "atol": 1e-10}}
# (b, k): 0, 1, off and on the multiples of 16, several strips, several blocks of samples.
SHAPES = [(0, 3), (3, 0), (1, 1), (5, 17), (40, 64), (9, 130), (33, 300), (2100, 20)]
PARAMETERS = {"gamma": 0.3, "coef0": 0.5, "degree": 3}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


def random_samples(b, k, dtype, device="cpu"):
    features, weights = torch.randn(b, k, dtype=dtype), torch.rand(b, dtype=dtype)
    return features.to(device), weights.to(device)


def matrix(kind, x, y):
    """The loop over pairs, with the parameters that the kernel has."""
    names = {"linear": (), "polynomial": ("gamma", "coef0", "degree")}.get(kind, ("gamma",))
    chosen = {name: PARAMETERS[name] for name in names}
    return reference.kernel_matrix(kind, x.double().cpu(), y.double().cpu(), **chosen)


@every_dtype
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("b, k", SHAPES)
def test_updates_accumulate_and_stay_symmetric(device, b, k, weighted, dtype):
    gram = torch.randn(k, k, dtype=dtype, device=device)
    gram = gram + gram.T
    expected = gram.double().clone()
    for _ in range(2):
        features, weights = random_samples(b, k, dtype, device)
        used = weights if weighted else None
        assert ops.gram_update(gram, features, used) is gram
        scaled = features.double() * weights.double()[:, None] if weighted else features.double()
        expected = expected + features.double().T @ scaled
    torch.testing.assert_close(gram.double(), expected, **EXACT[dtype])
    assert torch.equal(gram, gram.T)


@every_dtype
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("t", [None, 0, 3])
@pytest.mark.parametrize(
    "counts, k",
    [([], 3), ([0, 0], 3), ([4], 0), ([1], 1), ([3, 0, 5], 17), ([40, 2, 60], 150), ([1100], 6)],
)
def test_task_gram_is_the_sum_over_samples(device, counts, k, t, weighted, dtype):
    b, n = sum(counts), len(counts)
    features, weights = random_samples(b, k, dtype, device)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    task_of = torch.repeat_interleave(torch.arange(n), torch.tensor(counts).long())
    other = None if t is None else torch.randn(b, t, dtype=dtype, device=device)
    out = ops.task_gram(features, offsets, other, weights if weighted else None)
    assert out.dtype == dtype and out.is_contiguous()
    expected = reference.task_gram(
        features.cpu(),
        task_of,
        n,
        (features if other is None else other).cpu(),
        weights.cpu() if weighted else torch.ones(b),
    )
    torch.testing.assert_close(out.cpu().double(), expected, **EXACT[dtype])
    if other is None:
        assert torch.equal(out, out.mT)


@every_dtype
@every_kind
@pytest.mark.parametrize("m, l, n", [(0, 2, 3), (2, 0, 3), (1, 1, 1), (7, 5, 0), (20, 70, 5)])
def test_kernel_gram_is_the_loop_over_pairs(device, m, l, n, kind, dtype):
    x, y = (torch.randn(rows, n, dtype=dtype, device=device) for rows in (m, l))
    gram = ops.kernel_gram(x, y, kind, **PARAMETERS)
    assert gram.dtype == dtype and gram.is_contiguous() and gram.shape == (m, l)
    torch.testing.assert_close(gram.cpu().double(), matrix(kind, x, y), **EXACT[dtype])
    symmetric = ops.kernel_gram(x, None, kind, **PARAMETERS)
    torch.testing.assert_close(symmetric.cpu().double(), matrix(kind, x, x), **EXACT[dtype])
    assert torch.equal(symmetric, symmetric.T)
    if kind in KINDS[2:]:
        assert bool((symmetric.diagonal() == 1).all())


@every_dtype
@every_kind
def test_blocks_of_kernel_gram_meet(device, kind, dtype):
    x = torch.randn(290, 9, dtype=dtype, device=device)
    y = torch.randn(1100, 9, dtype=dtype, device=device)
    gram = ops.kernel_gram(x, y, kind, **PARAMETERS)
    for rows, columns in ((slice(0, 3), slice(0, 3)), (slice(126, 130), slice(1020, 1030))):
        part = matrix(kind, x[rows], y[columns])
        torch.testing.assert_close(gram[rows, columns].cpu().double(), part, **EXACT[dtype])
    symmetric = ops.kernel_gram(y, None, kind, **PARAMETERS)
    full = ops.kernel_gram(y, y.clone(), kind, **PARAMETERS)
    # A distance that rounds to zero differs most from one that is exactly zero.
    off = ~torch.eye(len(y), dtype=torch.bool, device=device)
    torch.testing.assert_close(symmetric[off], full[off], **EXACT[dtype])
    assert torch.equal(symmetric, symmetric.T)


@every_dtype
def test_distances_never_round_below_zero(dtype):
    x = 1e3 + torch.randn(200, 6, dtype=dtype)
    gram = ops.kernel_gram(x, torch.cat([x, x]), "rbf", gamma=10.0)
    assert float(gram.max()) <= 1.0
    assert not bool(ops.kernel_gram(x, x.clone(), "exponential", gamma=10.0).isnan().any())


@every_dtype
def test_exponentials_are_exact_to_a_few_units(dtype):
    distance = torch.cat([torch.linspace(0, 80, 4001), torch.tensor([1e-8, 86.9, 1e5])])
    x = distance[:, None].to(dtype)
    gram = ops.kernel_gram(x, torch.zeros(1, 1, dtype=dtype), "laplace")
    few_ulp = 4 * torch.finfo(dtype).eps
    expected = torch.exp(-x.double())
    torch.testing.assert_close(gram.double(), expected, rtol=few_ulp, atol=1e-45)


@every_kind
def test_nan_and_infinity_reach_the_kernel(kind):
    x = torch.tensor([[float("nan")], [float("inf")], [1.0]])
    gram = ops.kernel_gram(x, torch.zeros(1, 1), kind, **PARAMETERS)
    assert bool(gram[0].isnan().all()) and bool(gram[2].isfinite().all())
    symmetric = ops.kernel_gram(x, None, kind, **PARAMETERS)
    assert bool(symmetric[0].isnan().all()) and bool(symmetric[:, 0].isnan().all())


def test_strided_inputs_are_copied(device):
    x = torch.randn(30, 12, device=device)
    y, weights = torch.randn(9, 12, device=device), torch.rand(60, device=device)[::2]
    offsets = torch.tensor([0, 9, 30])
    strided = x.T.contiguous().T
    expected = ops.kernel_gram(x, y, "rbf")
    assert torch.equal(ops.kernel_gram(strided, y.T.contiguous().T, "rbf"), expected)
    dense = weights.clone()
    assert torch.equal(
        ops.task_gram(strided, offsets, strided[:, :2], weights),
        ops.task_gram(x, offsets, x[:, :2].clone(), dense),
    )
    zeros = partial(torch.zeros, 12, 12, device=device)
    assert torch.equal(
        ops.gram_update(zeros(), strided, weights), ops.gram_update(zeros(), x, dense)
    )


# Derivatives: of kernel_gram in x and y, of the others none.


@pytest.fixture(params=KINDS)
def kernel(request):
    return partial(ops.kernel_gram, kind=request.param, **PARAMETERS)


def points():
    return torch.rand(4, 3, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)


def test_gradcheck(kernel):
    x, y = (tensor.requires_grad_() for tensor in points())
    torch.autograd.gradcheck(kernel, (x, y), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(kernel, (x, y), check_fwd_over_rev=True)
    torch.autograd.gradcheck(lambda a: kernel(a, None), (x,), check_forward_ad=True)
    torch.autograd.gradgradcheck(lambda a: kernel(a, None), (x,), check_fwd_over_rev=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_transforms_see_the_derivative(kernel, compiled):
    (x, y), (dx, dy) = points(), points()

    run = partial(compiled_or_not, compiled)

    def energy(a):
        return kernel(a, y).square().sum()

    step = 1e-4
    difference = (kernel(x + step * dx, y + step * dy) - kernel(x - step * dx, y - step * dy)) / (
        2 * step
    )
    _, tangent = run(lambda a, b: torch.func.jvp(kernel, (a, b), (dx, dy)), x, y)
    torch.testing.assert_close(tangent, difference, rtol=1e-6, atol=1e-7)
    gradient = run(torch.func.grad(energy), x)
    slope = (energy(x + step * dx) - energy(x - step * dx)) / (2 * step)
    torch.testing.assert_close((gradient * dx).sum(), slope, rtol=1e-6, atol=1e-7)
    curved = run(lambda a: torch.func.jvp(torch.func.grad(energy), (a,), (dx,))[1], x)
    difference = (
        torch.func.grad(energy)(x + step * dx) - torch.func.grad(energy)(x - step * dx)
    ) / (2 * step)
    torch.testing.assert_close(curved, difference, rtol=1e-6, atol=1e-6)
    batch = torch.stack([x, 2 * x])
    expected = torch.stack([kernel(x, y), kernel(2 * x, y)])
    torch.testing.assert_close(
        run(torch.func.vmap(lambda a: kernel(a, y)), batch), expected, rtol=1e-12, atol=1e-12
    )


def test_a_tangent_of_a_tangent_is_refused():
    x, _ = points()

    def total(a):
        return ops.kernel_gram(a, None, "rbf").sum()

    with pytest.raises(ValueError, match="`x` must be differentiated in forward mode at most once"):
        torch.func.jacfwd(torch.func.jacfwd(total))(x)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    hessian = torch.func.jacrev(torch.func.jacrev(total))(x)
    close(torch.func.hessian(total)(x), hessian)


def test_sums_over_samples_refuse_gradients_and_tangents():
    x, offsets = torch.rand(7, 3), torch.tensor([0, 3, 7])
    gram, weights = torch.zeros(3, 3), torch.rand(7)
    calls = [
        ("features", x, lambda a: ops.gram_update(gram, a)),
        ("features", x, lambda a: ops.task_gram(a, offsets)),
        ("weights", weights, lambda a: ops.gram_update(gram, x, a)),
        ("weights", weights, lambda a: ops.task_gram(x, offsets, None, a)),
        ("other", x, lambda a: ops.task_gram(x, offsets, a)),
        ("gram", gram, lambda a: ops.gram_update(a.clone(), x)),
    ]
    for name, value, call in calls:
        for derivative in derivatives(call, value):
            with pytest.raises(ValueError, match=f"`{name}` must be a constant, got a tensor"):
                derivative()


def test_updates_compile():
    torch._dynamo.reset()
    x = torch.rand(7, 3)

    def twice(gram, features):
        ops.gram_update(gram, features)
        return ops.gram_update(gram, 2 * features).sum()

    gram, expected = torch.zeros(3, 3), torch.zeros(3, 3)
    total = torch.compile(twice, backend="aot_eager", fullgraph=True)(gram, x)
    assert torch.equal(total, twice(expected, x)) and torch.equal(gram, expected)


@every_dtype
def test_opcheck(device, dtype):
    features, weights = random_samples(9, 4, dtype, device)
    other, offsets = torch.randn(9, 2, dtype=dtype, device=device), torch.tensor([0, 4, 4, 9])
    gram = torch.zeros(4, 4, dtype=dtype, device=device)
    for used in (None, weights):
        opcheck(torch.ops.ksm_ext.gram_update.default, (gram, features, used))
        for pair in (None, other):
            opcheck(torch.ops.ksm_ext.task_gram.default, (features, offsets, pair, used))
    for kind in range(len(KINDS)):
        for y in (None, features[:3]):
            opcheck(torch.ops.ksm_ext.kernel_gram.default, (features, y, kind, 0.5, 1.0, 2))


# Errors: <name> must be <expected>, got <found>. <what to do>.

X, G, W, OFFSETS = torch.zeros(5, 3), torch.zeros(3, 3), torch.zeros(5), torch.tensor([0, 2, 5])
update, task, kernel_gram = ops.gram_update, ops.task_gram, ops.kernel_gram


VALUES = {
    r"`features` must be 2-dimensional, got shape \(5,\)": lambda: update(G, W),
    r"`gram` must be of shape \(3, 3\), got": lambda: update(G[1:], X),
    "`gram` must be contiguous, to be updated": lambda: update(torch.zeros(3, 6)[:, ::2], X),
    r"`weights` must be of shape \(5,\), got": lambda: update(G, X, W[1:]),
    r"`task_offsets` must be of num_tasks \+ 1": lambda: task(X, OFFSETS[:0]),
    r"`other` must be of shape \(5, 2\)": lambda: task(X, OFFSETS, X[1:, :2]),
    "`kind` must be one of 'linear'": lambda: kernel_gram(X, X, "cosine"),
    "`x` must be 2-dimensional, got": lambda: kernel_gram(W, X, "rbf"),
    r"`y` must be of shape \(5, 3\)": lambda: kernel_gram(X, X[:, 1:], "rbf"),
    "`gamma` must be at least 0": lambda: kernel_gram(X, X, "rbf", gamma=-1.0),
    "`degree` must be at least 1, got 0": lambda: kernel_gram(X, X, "polynomial", degree=0),
}
DTYPES_THAT_DIFFER = {
    "`features` must be float32 or float64": lambda: update(G, X.bfloat16()),
    "`gram` must be of dtype torch.float32 like": lambda: update(G.double(), X),
    "`y` must be of dtype torch.fl": lambda: kernel_gram(X, G.double(), "rbf"),
}
CONTENTS = {"task_offsets must be 0 first and 5": lambda: task(X, OFFSETS[:2])}
ERRORS = {ValueError: VALUES, TypeError: DTYPES_THAT_DIFFER, RuntimeError: CONTENTS}


@pytest.mark.parametrize("error, message, call", refusals(ERRORS))
def test_errors_name_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    "message, call",
    [
        ("features must be of dtype float32 or", lambda op: op.gram_update(G, X.half(), None)),
        ("gram must be contiguous", lambda op: op.gram_update(G[:, :1].expand(3, 3), X, None)),
        ("gram must be of 3 entries in dim", lambda op: op.gram_update(G[1:], X, None)),
        ("other must be of 5 entries in dim", lambda op: op.task_gram(X, OFFSETS, G, None)),
        ("task_offsets must be 0 first", lambda op: op.task_gram(X, 5 - OFFSETS, X, None)),
        ("y must be of 3 entries in", lambda op: op.kernel_gram(X, X[:, :2].clone(), 0, 1, 0, 1)),
        ("kind must be the number of a kernel", lambda op: op.kernel_gram(X, X, 5, 1.0, 0.0, 1)),
        ("degree must be at least 1, got 0", lambda op: op.kernel_gram(X, X, 1, 1.0, 0.0, 0)),
    ],
)
def test_the_operators_themselves_refuse_what_would_corrupt_memory(message, call):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.ksm_ext)
