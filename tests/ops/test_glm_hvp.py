"""glm_hvp and glm_gradient against loops over the subsets in float64."""

from functools import partial

import pytest
import reference
import torch
from operators import compiled_or_not, derivatives, refusals
from torch.library import opcheck

from ksm_ext import ops

# (samples of each task, k, m): nothing at all, single entries, tasks without samples, tasks that
# are run together and alone, tasks and subsets beyond every block.
PROBLEMS = {
    "no subsets": ([3, 4], 3, 0),
    "no samples": ([0, 0], 3, 4),
    "no tasks": ([], 2, 3),
    "no features": ([3, 4], 0, 5),
    "one": ([1], 1, 1),
    "small": ([5, 0, 7, 1], 3, 6),
    "many small": ([3] * 60 + [40] * 3 + [2] * 30, 9, 40),
    "large tasks": ([700, 3, 90, 1100], 17, 70),
    "many subsets": ([60, 80], 5, 300),
    "products that occupy a GPU": ([1100, 40, 1000], 8, 1000),
}
DTYPES = [torch.float32, torch.float64]
every_problem = pytest.mark.parametrize("name", PROBLEMS)


class Problem:
    """Random subsets, an empty and a full one among them, and random arguments."""

    def __init__(self, name, dtype=torch.float64, device="cpu"):
        counts, k, m = PROBLEMS[name]
        n, b = len(counts), sum(counts)
        put = partial(torch.Tensor.to, device=device, dtype=dtype)
        self.offsets = torch.tensor([0, *counts]).cumsum(0)
        self.task_of = torch.repeat_interleave(torch.arange(n), torch.tensor(counts).long())
        self.masks = torch.rand(m, n) < torch.rand(m, 1)
        self.masks[:1], self.masks[1:2] = False, True
        self.features, self.margins = put(torch.randn(b, k)), put(2 * torch.randn(b))
        self.vectors, self.ridge = put(torch.randn(m, k)), put(torch.rand(m))
        self.curvature = put(torch.rand(m, b))

    def hvp(self, v, curvature):
        return ops.glm_hvp(
            self.features, self.offsets, self.masks, v, curvature=curvature, ridge=self.ridge
        )

    def gradient(self, **options):
        data = self.features, self.margins, self.offsets, self.masks, self.vectors
        return ops.glm_gradient(*data, ridge=self.ridge, **options)

    def expected_hvp(self, curvature):
        on_cpu = None if curvature is None else curvature.cpu()
        return reference.glm_hvp(
            self.features.cpu(),
            self.task_of,
            self.masks,
            on_cpu,
            self.vectors.cpu(),
            self.ridge.cpu(),
        )

    def objective(self, i, w):
        data = self.features.cpu(), self.margins.cpu(), self.task_of, self.masks[i]
        return reference.glm_objective(*data, w, self.ridge[i].cpu())


def tolerance(dtype):
    return {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 0, "atol": 2e-5}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", ["none", "full", "bfloat16"])
@every_problem
def test_hvp_is_the_loop_over_subsets(device, name, stored, dtype):
    problem = Problem(name, dtype, device)
    curvature = None if stored == "none" else problem.curvature
    if stored == "bfloat16":
        curvature = curvature.bfloat16()
    out = problem.hvp(problem.vectors, curvature)
    assert out.dtype == dtype and out.is_contiguous()
    expected = problem.expected_hvp(curvature)
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@every_problem
def test_gradient_is_the_derivative_of_the_loop(device, name, dtype):
    problem = Problem(name, dtype, device)
    result = problem.gradient(curvature_dtype=dtype)
    assert result.gradient.dtype == result.curvature.dtype == dtype
    assert result.objective.dtype == torch.float64
    m, b = len(problem.masks), len(problem.features)
    inside = problem.masks[:, problem.task_of]
    for i in range(m):
        w = problem.vectors[i].cpu().double().requires_grad_()
        objective = problem.objective(i, w)
        (gradient,) = torch.autograd.grad(objective, w)
        close = tolerance(dtype)
        torch.testing.assert_close(result.objective[i].cpu(), objective.detach(), **close)
        torch.testing.assert_close(result.gradient[i].cpu().double(), gradient, **close)
    z = problem.margins + problem.vectors @ problem.features.T  # (m, b)
    curvature = (z.sigmoid() * (-z).sigmoid()).cpu().where(inside, torch.zeros((), dtype=dtype))
    assert result.curvature.shape == (m, b)
    torch.testing.assert_close(result.curvature.cpu(), curvature, **tolerance(dtype))
    narrow = problem.gradient(curvature_dtype=torch.bfloat16)
    assert torch.equal(narrow.curvature, result.curvature.bfloat16())
    without = problem.gradient()
    assert without.curvature is None
    for other in (narrow, without):
        assert torch.equal(other.gradient, result.gradient)
        assert torch.equal(other.objective, result.objective)


def test_hvp_is_the_derivative_of_the_gradient():
    problem = Problem("large tasks")
    direction, step = torch.randn_like(problem.vectors), 1e-4
    curvature = problem.gradient(curvature_dtype=torch.float64).curvature
    base, gradients = problem.vectors, []
    for sign in (1, -1):
        problem.vectors = base + sign * step * direction
        gradients.append(problem.gradient().gradient)
    difference = (gradients[0] - gradients[1]) / (2 * step)
    torch.testing.assert_close(problem.hvp(direction, curvature), difference, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_loss_holds_at_every_margin(dtype):
    finite = torch.cat([torch.linspace(-150, 150, 3001), torch.linspace(-1e-3, 1e-3, 101)])
    z = torch.cat([finite, torch.tensor([-1e4, 1e4, 0.0, float("nan")])]).to(dtype)
    b = len(z)
    identity, offsets = torch.eye(b, dtype=dtype), torch.arange(b + 1)
    result = ops.glm_gradient(
        torch.zeros(b, 0, dtype=dtype), z, offsets, identity.bool(), torch.zeros(b, 0).to(dtype)
    )
    exact = z.double()
    loss = torch.nn.functional.softplus(-exact, threshold=700)
    few_ulp = 8 * torch.finfo(dtype).eps
    tiny = 2 * torch.finfo(dtype).tiny
    torch.testing.assert_close(result.objective, loss, rtol=few_ulp, atol=tiny, equal_nan=True)
    result = ops.glm_gradient(
        torch.ones(b, 1, dtype=dtype),
        z,
        offsets,
        identity.bool(),
        torch.zeros(b, 1, dtype=dtype),
        curvature_dtype=dtype,
    )
    slope, curvature = -(-exact).sigmoid(), exact.sigmoid() * (-exact).sigmoid()
    close = {"rtol": few_ulp, "atol": tiny, "equal_nan": True}
    torch.testing.assert_close(result.gradient[:, 0].double(), slope, **close)
    torch.testing.assert_close(result.curvature.diagonal().double(), curvature, **close)


def test_hvp_is_symmetric_and_ignores_curvature_outside():
    problem = Problem("many small")
    u, v = torch.randn_like(problem.vectors), torch.randn_like(problem.vectors)
    left = (u * problem.hvp(v, problem.curvature)).sum(1)
    right = (v * problem.hvp(u, problem.curvature)).sum(1)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)
    inside = problem.masks[:, problem.task_of]
    holes = problem.curvature.masked_fill(~inside, float("nan"))
    assert torch.equal(problem.hvp(v, holes), problem.hvp(v, problem.curvature))


def test_an_empty_subset_has_only_its_ridge(device):
    problem = Problem("small", device=device)
    result = problem.gradient()
    ridge, w = problem.ridge[0], problem.vectors[0]
    out = problem.hvp(problem.vectors, problem.curvature)
    torch.testing.assert_close(out[0], ridge * w, rtol=0, atol=0)
    torch.testing.assert_close(result.gradient[0], ridge * w, rtol=0, atol=0)
    torch.testing.assert_close(result.objective[0], ridge / 2 * w.square().sum())


def test_one_ridge_for_all_and_strided_arguments(device):
    problem = Problem("large tasks", torch.float32, device)
    problem.ridge = torch.full_like(problem.ridge, 0.25)
    expected = problem.hvp(problem.vectors, problem.curvature)
    out = ops.glm_hvp(
        problem.features.T.contiguous().T,
        torch.stack([problem.offsets] * 2, 1)[:, 0],
        problem.masks.T.contiguous().T,
        problem.vectors.T.contiguous().T,
        curvature=problem.curvature.T.contiguous().T,
        ridge=0.25,
    )
    assert torch.equal(out, expected)


def test_newton_with_narrow_curvature_reaches_the_exact_minimum():
    problem = Problem("many small")
    k = problem.features.shape[1]
    problem.ridge = torch.full_like(problem.ridge, 0.05)
    problem.vectors = torch.zeros_like(problem.vectors)
    unit = torch.eye(k, dtype=torch.float64)
    for _ in range(40):
        result = problem.gradient(curvature_dtype=torch.bfloat16)
        columns = [
            problem.hvp(unit[j].expand_as(problem.vectors), result.curvature) for j in range(k)
        ]
        hessian = torch.stack(columns, dim=2)
        problem.vectors = problem.vectors - torch.linalg.solve(hessian, result.gradient)
    assert float(problem.gradient().gradient.norm(dim=1).max()) < 1e-12


# Derivatives: linear in v, nothing else.


@pytest.mark.parametrize("stored", [True, False])
def test_gradcheck(stored):
    problem = Problem("small")
    function = partial(problem.hvp, curvature=problem.curvature if stored else None)
    v = problem.vectors.clone().requires_grad_()
    torch.autograd.gradcheck(function, (v,), check_forward_ad=True, check_batched_grad=True)
    torch.autograd.gradgradcheck(function, (v,), check_fwd_over_rev=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_transforms_see_the_derivative(compiled):
    problem = Problem("small")
    v, dv = problem.vectors, torch.randn_like(problem.vectors)
    function = partial(problem.hvp, curvature=problem.curvature)

    run = partial(compiled_or_not, compiled)

    def energy(u):
        return 0.5 * function(u).square().sum()

    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    close(run(function, v), function(v))
    close(run(lambda u, du: torch.func.jvp(function, (u,), (du,))[1], v, dv), function(dv))
    close(run(torch.func.grad(energy), v), function(function(v)))
    close(
        run(lambda u, du: torch.func.jvp(torch.func.grad(energy), (u,), (du,))[1], v, dv),
        function(function(dv)),
    )
    batch = torch.randn(2, *v.shape, dtype=v.dtype)
    close(run(torch.func.vmap(function), batch), torch.stack([function(u) for u in batch]))

    def nested(u):  # a tangent of a tangent: 2 H(dv^2)
        inner = lambda a: torch.func.jvp(lambda c: function(c * c), (a,), (dv,))[1]  # noqa: E731
        return torch.func.jvp(inner, (u,), (dv,))[1]

    close(run(nested, v), 2 * function(dv * dv))


def test_constants_refuse_gradients_and_tangents():
    problem = Problem("small")

    def with_another(ask, name, value):
        other = Problem("small")
        setattr(other, name, value)
        return ask(other)

    hvp, gradient = lambda p: p.hvp(p.vectors, p.curvature), lambda p: p.gradient().gradient
    calls = [
        (name, partial(with_another, hvp, name)) for name in ("features", "curvature", "ridge")
    ]
    names = ("features", "margins", "vectors", "ridge")
    calls += [(name, partial(with_another, gradient, name)) for name in names]
    for name, call in calls:
        value = getattr(problem, name)
        shown = "w" if name == "vectors" else name
        for derivative in derivatives(call, value):
            with pytest.raises(ValueError, match=f"`{shown}` must be a constant, got a tensor wi"):
                derivative()
        with torch.no_grad():
            call(value.clone().requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(device, dtype):
    problem = Problem("small", dtype, device)
    data = problem.features, problem.offsets, problem.masks
    for curvature in (None, problem.curvature, problem.curvature.bfloat16()):
        hvp = torch.ops.ksm_ext.glm_hvp.default
        opcheck(hvp, (*data, curvature, problem.vectors, problem.ridge))
    for stored in (None, dtype, torch.bfloat16):
        arguments = (problem.features, problem.margins, *data[1:], problem.vectors, problem.ridge)
        opcheck(torch.ops.ksm_ext.glm_gradient.default, (*arguments, stored))


# Errors: <name> must be <expected>, got <found>. <what to do>.

X, OFFSETS = torch.zeros(5, 3), torch.tensor([0, 2, 5])
MASKS, V, H = torch.ones(4, 2, dtype=torch.bool), torch.zeros(4, 3), torch.zeros(5)


def hvp(x=X, offsets=OFFSETS, masks=MASKS, v=V, **options):
    return ops.glm_hvp(x, offsets, masks, v, **options)


def gradient(h=H, **options):
    return ops.glm_gradient(X, h, OFFSETS, MASKS, V, **options)


VALUES = {
    r"`features` must be 2-dimensional, got shape \(5,\)": lambda: hvp(x=H),
    "`task_offsets` must be 1-dimensional": lambda: hvp(offsets=OFFSETS[None]),
    "`task_offsets` must be of num_tasks": lambda: hvp(offsets=OFFSETS[:0]),
    "`masks` must be of 2 columns like": lambda: hvp(masks=MASKS[:, :1]),
    "`v` must be 2-dimensional": lambda: hvp(v=V[0]),
    r"`v` must be of shape \(4, 3\), got shape \(3, 3\)": lambda: hvp(v=V[1:]),
    r"`ridge` must be of shape \(4,\), got": lambda: hvp(ridge=H),
    r"`curvature` must be of shape \(4, 5\)": lambda: hvp(curvature=X),
    r"`margins` must be of shape \(5,\), got": lambda: gradient(h=H[1:]),
}
DTYPES_THAT_DIFFER = {
    "`features` must be float32 or float64, got": lambda: hvp(x=X.half()),
    "`task_offsets` must be of dtype torch.int64": lambda: hvp(offsets=H),
    "`masks` must be of dtype torch.bool": lambda: hvp(masks=MASKS.int()),
    "`v` must be of dtype torch.float32 like": lambda: hvp(v=V.double()),
    "`curvature` must be torch.float32 like": lambda: hvp(curvature=X.double()),
    "`curvature_dtype` must be torch.float32 like": lambda: gradient(curvature_dtype=torch.half),
}
CONTENTS = {
    "must be 0 first and 5 samples last, got 0 and 4": lambda: hvp(offsets=torch.tensor([0, 2, 4])),
    "must be non-decreasing, got 7 before 5": lambda: hvp(offsets=torch.tensor([0, 7, 5])),
}
ERRORS = {ValueError: VALUES, TypeError: DTYPES_THAT_DIFFER, RuntimeError: CONTENTS}


@pytest.mark.parametrize("error, message, call", refusals(ERRORS))
def test_errors_name_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


R = torch.zeros(4)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("features must be contiguous", (X[:, :1].expand(5, 3), OFFSETS, MASKS, None, V, R)),
        ("features must be of dtype float32 or", (X.half(), OFFSETS, MASKS, None, V, R)),
        ("task_offsets must be of dtype int64", (X, OFFSETS.int(), MASKS, None, V, R)),
        ("masks must be of dtype bool", (X, OFFSETS, MASKS.int(), None, V, R)),
        ("masks must be of 2 columns", (X, OFFSETS, MASKS[:, :1].clone(), None, V, R)),
        ("v must be of 4 entries in dimension 0, got 3", (X, OFFSETS, MASKS, None, V[1:], R)),
        ("ridge must be of the dtype of the f", (X, OFFSETS, MASKS, None, V, R.double())),
        (r"curvature must be of shape \(4, 5\), got", (X, OFFSETS, MASKS, X, V, R)),
        ("curvature must be of dtype bfloat16", (X, OFFSETS, MASKS, X.half(), V, R)),
    ],
)
def test_the_operator_itself_refuses_what_would_corrupt_memory(message, arguments):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.ksm_ext.glm_hvp(*arguments)
