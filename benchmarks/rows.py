"""What is measured: every operator at its sizes, its peers, and its limit.

``bench_ops.py`` measures these rows on the CPU and ``device_ops.py`` on a GPU; ``results_table.py``
prints what the latter found. A method is built, which prepares whatever it likes best, and then
called; one that needs a package or a device which is not there raises ``ModuleNotFoundError``, and
is said not to have run. The limit of a row is what it cannot avoid: bytes to read, write or copy,
or arithmetic.

A new operator is a function from sizes and a device to a ``Problem``, and its rows, which a
function in ``PARTS`` yields.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import softplus

from ksm_ext import ops
from ksm_ext.ops import Projector

Runner = Callable[[], Any]
Builder = Callable[[], Runner]
Scale = Literal["gpu", "cpu", "small"]  # small: for a check of the code, anywhere


@dataclass(frozen=True)
class Problem:
    """Random inputs on a device, and what is done with them."""

    methods: dict[str, Builder]  # ksm_ext is ours
    expected: Callable[[], Tensor]  # the result, or its leading entries; asked before any method
    tolerance: float = 1e-4  # relative to the largest expected entry
    others: tuple[str, ...] = ()  # methods with another result: a lower bound, or an inexact one
    compared: Callable[[Any], Tensor] = lambda result: result

    def check(self, result: Any, expected: Tensor) -> None:
        found = self.compared(result)[tuple(map(slice, expected.shape))].double()
        error = (found - expected).abs().max() / expected.abs().max()
        assert error <= self.tolerance, f"relative error {error:.1e}, not {self.tolerance:.1e}"


@dataclass(frozen=True)
class Row:
    """One operator at one size."""

    name: str
    size: str
    problem: Callable[[torch.device], Problem]
    limit: str  # the name of a ceiling
    amount: float  # bytes, or floating-point operations
    memory: float | None = None  # MiB that ksm_ext may add to a process at its peak

    @property
    def title(self) -> str:
        return f"{self.name}, {self.size}"


# -- projections --------------------------------------------------------------------------------


def project_rows(scale: Scale) -> Iterator[Row]:
    few = [(4, 3000, 64), (32, 3000, 64)]
    many = [
        (32, 10**6, 512),
        (32, 10**6, 4096),
        (256, 10**6, 4096),
        (1024, 10**6, 2048),
        (32, 10**7, 4096),
        (32, 10**8, 4096),
        (8, 10**9, 8192),
    ]
    sparse = {"gpu": many, "cpu": [(64, 10**6, 4096)], "small": few}[scale]
    dense = {"gpu": many[1:4], "cpu": [(16, 10**5, 4096), (256, 10**5, 4096)], "small": few}[scale]
    wide, widest = many[4:6] if scale == "gpu" else 2 * sparse[:1]
    spread = {"torch.sum": _sum, "index_add_": _index_add, "sjlt": _sjlt}
    spread |= {
        "FlashSketch": partial(_flash_sketch, transposed=True),
        "transpose, then FlashSketch": partial(_flash_sketch, transposed=False),
    }
    for sizes in sparse:
        yield _projected("sbp", *sizes, spread, memory=64)
    yield _projected("sbp s=4", *wide, spread, sparsity=4)
    hadamard = {"torch.sum": _sum, "fast_hadamard_transform": _fast_hadamard}
    yield _projected("sbp hadamard", *wide, hadamard)
    yield _projected("sjlt", *wide, {"sjlt": _sjlt})
    b, p, k = widest
    count = 3 if scale == "small" else 148
    size = f"{count} tensors, {_spelt(b=b, p=p, k=k)}"
    yield Row("project_ sbp", size, partial(_listed, *widest, count), "read", 4 * b * p)
    stored = {"torch.mm, stored matrix": _stored}
    peers = stored | {"fast_jl": _fast_jl, "TRAK BasicProjector": _trak}
    for sizes in dense:
        yield _projected("rademacher", *sizes, peers, memory=64)
        yield _projected("rademacher bfloat16", *sizes, stored)
    yield _projected("gaussian", *dense[0], peers)
    adjoint = partial(_unprojected, *widest)
    yield Row("project_adjoint sbp", _spelt(b=b, p=p, k=k), adjoint, "write", 4 * b * p)


def _projected(
    what: str,
    b: int,
    p: int,
    k: int,
    peers: dict[str, Callable[[Tensor, Projector], Runner]],
    *,
    sparsity: int = 1,
    memory: float | None = None,
) -> Row:
    kind = what.split()[0]
    projection = Projector(k, kind, sparsity=sparsity, hadamard="hadamard" in what)

    def problem(device: torch.device) -> Problem:
        x = _normal(device, b, p)
        if "bfloat16" in what:
            x = x.bfloat16()
        methods: dict[str, Builder] = {"ksm_ext": lambda: lambda: ops.project(x, projection)}
        methods |= {name: partial(peer, x, projection) for name, peer in peers.items()}
        return _of_norms(methods, x, 1.0, k, others=("torch.sum",))

    dense = kind in ("rademacher", "gaussian")
    limit = ("bf16", 2 * b * p * k) if dense else ("read", 4 * b * p)
    return Row(f"project {what}", _spelt(b=b, p=p, k=k), problem, *limit, memory=memory)


def _of_norms(
    methods: dict[str, Builder], x: Tensor, factor: float, k: int, others: tuple[str, ...] = ()
) -> Problem:
    """Squared norms are kept, or become ``factor`` times as large, in expectation."""

    def ratio(y: Tensor) -> Tensor:
        return (y.float().square().sum(1) / x.float().square().sum(1)).mean() / factor

    tolerance = 6 * (2 / (k * len(x))) ** 0.5  # six standard deviations
    return Problem(methods, lambda: torch.tensor(1.0), tolerance, others, ratio)


def _listed(b: int, p: int, k: int, count: int, device: torch.device) -> Problem:
    """A network's gradients parameter by parameter, which a peer concatenates first."""
    projection = Projector(k)
    parts = [_normal(device, b, p // count) for _ in range(count)]

    def one_by_one() -> Tensor:
        out = torch.zeros(b, k, device=device)
        for number, part in enumerate(parts):
            ops.project_(out, part, projection, offset=number * (p // count))
        return out

    def together() -> Tensor:
        return ops.project(torch.cat(parts, dim=1), projection)

    methods = {"ksm_ext": lambda: one_by_one, "cat, then ksm_ext": lambda: together}
    return Problem(methods, together)


def _unprojected(b: int, p: int, k: int, device: torch.device) -> Problem:
    y, projection = _normal(device, b, k), Projector(k)
    outputs = torch.randint(k, (p,), device=device)
    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.project_adjoint(y, projection, p),
        "index_select": lambda: lambda: y.index_select(1, outputs),
    }
    return _of_norms(methods, y, p / k, k)


def _sum(x: Tensor, projection: Projector) -> Runner:
    """What reading alone costs."""
    return x.sum


def _index_add(x: Tensor, projection: Projector) -> Runner:
    s, k, p = projection.sparsity, projection.dim, x.shape[1]
    outputs = torch.randint(k // s, (s, p), device=x.device)
    outputs += torch.arange(s, device=x.device)[:, None] * (k // s)
    signs = torch.randint(2, (s, p), device=x.device).mul(2).sub(1).to(x) / s**0.5

    def run() -> Tensor:
        y = torch.zeros(len(x), k, device=x.device)
        for t in range(s):
            y.index_add_(1, outputs[t], x * signs[t])
        return y

    return run


def _stored(x: Tensor, projection: Projector) -> Runner:
    entries = _normal(x.device, x.shape[1], projection.dim)
    if projection.kind == "rademacher":
        entries.sign_()
    entries = (entries / projection.dim**0.5).to(x.dtype)
    return lambda: x @ entries


def _sjlt(x: Tensor, projection: Projector) -> Runner:
    from sjlt import SJLTProjection

    peer = SJLTProjection(x.shape[1], projection.dim, c=projection.sparsity, device=x.device)
    return lambda: peer(x)


def _flash_sketch(x: Tensor, projection: Projector, *, transposed: bool) -> Runner:
    """Its repository, with its kernels built, on ``PYTHONPATH``. Coordinates are its rows."""
    from sketches.flashsketch import FlashSketchConfig, sketch

    if not x.is_cuda:
        raise ModuleNotFoundError("FlashSketch needs a GPU")
    config = FlashSketchConfig(k=projection.dim, kappa=4, s=2, skip_zeros=False)
    if not transposed:
        return lambda: sketch(x.T.contiguous(), config).T
    columns = x.T.contiguous()
    return lambda: sketch(columns, config).T


def _fast_hadamard(x: Tensor, projection: Projector) -> Runner:
    from fast_hadamard_transform import hadamard_transform

    k = projection.dim
    whole = x.shape[1] // k * k
    signs = _normal(x.device, whole).sign_()
    outputs = torch.randint(k, (whole,), device=x.device)

    def run() -> Tensor:
        turned = hadamard_transform((x[:, :whole] * signs).unflatten(1, (-1, k)), k**-0.5)
        return torch.zeros(len(x), k, device=x.device).index_add_(1, outputs, turned.flatten(1))

    return run


def _fast_jl(x: Tensor, projection: Projector) -> Runner:
    import fast_jl

    processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    rows = min(32, len(x))
    call = getattr(fast_jl, f"project_rademacher_{rows}")
    return lambda: torch.cat([call(part, projection.dim, 0, processors) for part in x.split(rows)])


def _trak(x: Tensor, projection: Projector) -> Runner:
    from trak.projectors import BasicProjector

    kind = {"rademacher": "rademacher", "gaussian": "normal"}[projection.kind]
    peer = BasicProjector(x.shape[1], projection.dim, 0, kind, x.device)
    return lambda: peer.project(x, model_id=0).div_(projection.dim**0.5)


# -- masks --------------------------------------------------------------------------------------


def mask_rows(scale: Scale) -> Iterator[Row]:
    grams = {
        "gpu": [(4096, 256), (10_000, 1024), (50_000, 1024)],
        "cpu": [(8192, 256), (8192, 1024)],
        "small": [(300, 70)],
    }
    for m, n in grams[scale]:
        problem = partial(_mask_grams, m, n)
        yield Row("mask_gram rbf", _spelt(m=m, l=m, n=n), problem, "write", 4 * m * m)
    few = {"gpu": [20, 100, 1024], "cpu": [20, 100, 256], "small": [30]}
    m = grams[scale][0][0]
    for n in few[scale]:
        problem = partial(_weighted_mask_grams, m, n)
        yield Row("weighted_mask_gram rbf", _spelt(m=m, l=m, n=n), problem, "write", 4 * m * m)
    largest = (100_000, 256, 8)
    products = {
        "gpu": [largest],
        "cpu": [(16_384, 256, 8), (16_384, 1024, 32), largest],
        "small": [(300, 70, 3)],
    }
    for m, n, t in products[scale]:
        yield Row(
            "mask_gram_matmul rbf",
            _spelt(m=m, l=m, n=n, t=t),
            partial(_mask_matmuls, m, n, t),
            "fp32",
            2 * m * m * t,
            memory=64 if m == 100_000 else None,  # the Gram matrix would take 40 GB
        )
    m, _, t = products[scale][0]
    for n in few[scale]:
        yield Row(
            "weighted_mask_gram_matmul rbf",
            _spelt(m=m, l=m, n=n, t=t),
            partial(_weighted_mask_matmuls, m, n, t),
            "fp32",
            2 * m * m * t,
        )


def _mask_grams(m: int, n: int, device: torch.device) -> Problem:
    masks, gamma = torch.rand(m, n, device=device) < 0.5, 1.0 / n
    packed, table, x = ops.pack_masks(masks), _rbf_table(n, device), masks.float()
    sizes = x.sum(1)

    def product(dtype: torch.dtype) -> Runner:
        x = masks.to(dtype)

        def run() -> Tensor:
            overlaps = (x @ x.T).float()
            return overlaps.mul_(2).sub_(sizes).sub_(sizes[:, None]).mul_(gamma).exp_()

        return run

    def looked_up() -> Tensor:
        distances = torch.addmm(sizes[None, :], x, x.T, alpha=-2).add_(sizes[:, None])
        return table[distances.int()]

    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.mask_gram(packed, None, n, hamming_table=table),
        "torch float32": lambda: product(torch.float32),
        "torch addmm": lambda: lambda: _rbf(x, x, -gamma * sizes, -gamma * sizes, gamma),
        "torch table": lambda: looked_up,
        "torch bfloat16, inexact": lambda: product(torch.bfloat16),
        "torch cdist": lambda: lambda: torch.cdist(x, x).square_().mul_(-gamma).exp_(),
        "torch bfloat16, compiled": lambda: _compiled(_rbf_of_overlaps, masks.bfloat16(), gamma),
        # What any result of this size costs: fresh memory, filled with one number.
        "torch.full": lambda: lambda: torch.full((m, m), 0.5, device=device),
        "scikit-learn": lambda: _of_sklearn("rbf", x, gamma=gamma),
    }
    others = ("torch bfloat16, inexact", "torch bfloat16, compiled", "torch.full")
    return Problem(methods, lambda: _rbf_float64(masks), others=others)


def _rbf(x: Tensor, y: Tensor, row_terms: Tensor, terms: Tensor, gamma: float) -> Tensor:
    """The fastest formula in place; the terms are squared norms times -gamma."""
    gram = torch.addmm(terms[None, :], x, y.T, alpha=2 * gamma)
    return gram.add_(row_terms[:, None]).clamp_max_(0).exp_()


def _products_in_strips(x: Tensor, terms: Tensor, gamma: float, v: Tensor) -> Runner:
    parts = list(zip(x.split(2048), terms.split(2048), strict=True))
    return lambda: torch.cat([_rbf(rows, x, own, terms, gamma) @ v for rows, own in parts])


def _rbf_table(n: int, device: torch.device) -> Tensor:
    return torch.exp(-torch.arange(n + 1.0, device=device) / n)


def _rbf_float64(masks: Tensor) -> Tensor:
    """The first rows."""
    x = masks.double()
    distances = x[:64].sum(1)[:, None] + x.sum(1) - 2 * x[:64] @ x.T
    return torch.exp(-distances / masks.shape[1])


def _rbf_of_overlaps(x: Tensor, gamma: float) -> Tensor:
    sizes = x.sum(1, dtype=torch.float32)
    return torch.exp(gamma * (2 * (x @ x.T).float() - sizes - sizes[:, None]))


def _mask_matmuls(m: int, n: int, t: int, device: torch.device) -> Problem:
    masks, gamma = torch.rand(m, n, device=device) < 0.5, 1.0 / n
    packed, table, v = ops.pack_masks(masks), _rbf_table(n, device), _normal(device, m, t)

    def ours(y: Tensor | None) -> Runner:
        return lambda: ops.mask_gram_matmul(packed, y, n, v, hamming_table=table)

    def strips() -> Runner:
        x = masks.float()
        return _products_in_strips(x, -gamma * x.sum(1), gamma, v)

    methods: dict[str, Builder] = {"ksm_ext": lambda: ours(None)}
    if m < 100_000 or device.type == "cuda":  # minutes on a CPU
        methods["torch in strips"] = strips
        methods["ksm_ext, every pair twice"] = lambda: ours(packed)
    return Problem(methods, lambda: _rbf_float64(masks) @ v.double())


def _weights(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of the tasks, and masks scaled so that squared distances are the weighted ones."""
    weights = torch.rand(masks.shape[1], device=masks.device) * 2 / masks.shape[1]
    return weights, masks * weights.sqrt()


def _weighted_float64(masks: Tensor, weights: Tensor) -> Tensor:
    """The first rows."""
    x = masks.double() * weights.double().sqrt()
    squares = x.square().sum(1)
    return torch.exp(2 * x[:64] @ x.T - squares[:64, None] - squares)


def _weighted_mask_grams(m: int, n: int, device: torch.device) -> Problem:
    masks = torch.rand(m, n, device=device) < 0.5
    packed, (weights, x) = ops.pack_masks(masks), _weights(masks)
    table, terms = _rbf_table(n, device), -x.square().sum(1)
    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.weighted_mask_gram(packed, None, n, weights),
        "torch addmm": lambda: lambda: _rbf(x, x, terms, terms, 1.0),
        "torch cdist": lambda: lambda: torch.cdist(x, x).square_().neg_().exp_(),
        # One decay for all tasks: what weights cost.
        "mask_gram": lambda: lambda: ops.mask_gram(packed, None, n, hamming_table=table),
        "scikit-learn": lambda: _of_sklearn("rbf", x, gamma=1.0),
    }
    return Problem(methods, lambda: _weighted_float64(masks, weights), others=("mask_gram",))


def _weighted_mask_matmuls(m: int, n: int, t: int, device: torch.device) -> Problem:
    masks, v = torch.rand(m, n, device=device) < 0.5, _normal(device, m, t)
    packed, (weights, x) = ops.pack_masks(masks), _weights(masks)
    table = _rbf_table(n, device)
    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.weighted_mask_gram_matmul(packed, None, n, weights, v),
        "torch in strips": lambda: _products_in_strips(x, -x.square().sum(1), 1.0, v),
        "mask_gram_matmul": lambda: (
            lambda: ops.mask_gram_matmul(packed, None, n, v, hamming_table=table)
        ),
    }
    expected = partial(_weighted_float64, masks, weights)
    others = ("mask_gram_matmul",)
    return Problem(methods, lambda: expected() @ v.double(), others=others)


# -- Gram matrices ------------------------------------------------------------------------------


def gram_rows(scale: Scale) -> Iterator[Row]:
    updates = {
        "gpu": [(8192, 4096), (50_000, 4096), (200_000, 1024)],
        "cpu": [(20_000, 512), (4096, 2048)],
        "small": [(90, 33)],
    }
    for b, k in updates[scale]:
        problem = partial(_gram_updates, b, k)
        yield Row("gram_update", _spelt(b=b, k=k), problem, "fp32", b * k * (k + 1))
    tasks = {
        "gpu": [(50, 50_000, 512)],
        "cpu": [(50, 20_000, 256), (200, 20_000, 64)],
        "small": [(5, 90, 33)],
    }
    for n, b, k in tasks[scale]:
        problem = partial(_task_grams, n, b, k)
        yield Row("task_gram", _spelt(n=n, b=b, k=k), problem, "fp32", b * k * (k + 1))
    yield from kernel_rows(scale)


def kernel_rows(scale: Scale) -> Iterator[Row]:
    gpu = {"rbf": [(8192, 4096), (50_000, 512)], "laplace": [(8192, 512)], "polynomial": []}
    for kind, sizes in gpu.items():
        for m, n in {"gpu": sizes, "cpu": [(3000, 128)], "small": [(60, 33)]}[scale]:
            for dtype in [torch.float32, torch.float64] if scale == "cpu" else [torch.float32]:
                yield Row(
                    f"kernel_gram {kind}{' float64' if dtype == torch.float64 else ''}",
                    _spelt(m=m, l=m, n=n),
                    partial(_kernel_grams, kind, m, n, dtype),
                    "fp64" if dtype == torch.float64 else "fp32",
                    m * m * n * 2,
                )


def _gram_updates(b: int, k: int, device: torch.device) -> Problem:
    x, gram = _normal(device, b, k), torch.zeros(k, k, device=device)

    update = partial(torch.addmm, gram, x.T, x, out=gram)
    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.gram_update(gram, x),
        "torch.addmm float32": lambda: update,
        "torch.addmm TF32": lambda: lambda: _in_tf32(update),
    }
    return Problem(methods, lambda: x.double().T @ x.double())


def _task_grams(n: int, b: int, k: int, device: torch.device) -> Problem:
    x, offsets = _normal(device, b, k), torch.arange(n + 1) * b // n
    parts, even = x.split(offsets.diff().tolist()), x.unflatten(0, (n, -1))
    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.task_gram(x, offsets),
        "torch loop": lambda: lambda: torch.stack([part.T @ part for part in parts]),
        "torch.bmm": lambda: lambda: even.mT @ even,  # where every task has as many samples
    }
    return Problem(methods, lambda: even.double().mT @ even.double())


def _kernel_grams(kind: str, m: int, n: int, dtype: torch.dtype, device: torch.device) -> Problem:
    x, gamma = _normal(device, m, n).to(dtype), 1.0 / n
    options = {"coef0": 1.0, "degree": 3} if kind == "polynomial" else {}

    def rbf() -> Tensor:
        terms = x.square().sum(1).mul_(-gamma)
        return _rbf(x, x, terms, terms, gamma)

    def lazy() -> Runner:
        from pykeops.torch import LazyTensor

        v, left, right = _normal(device, m, 1), LazyTensor(x[:, None]), LazyTensor(x[None])
        return lambda: (-gamma * ((left - right) ** 2).sum(-1)).exp() @ v

    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.kernel_gram(x, None, kind, gamma=gamma, **options)
    }
    if kind == "rbf":
        methods |= {
            "torch": lambda: rbf,
            "torch cdist": lambda: lambda: torch.cdist(x, x).square_().mul_(-gamma).exp_(),
            "torch compiled": lambda: _compiled(_rbf_of_rows, x, gamma),
            "pykeops times a vector": lazy,
        }
    elif kind == "laplace":
        methods["torch cdist"] = lambda: lambda: torch.cdist(x, x, p=1.0).mul_(-gamma).exp_()
    else:
        methods["torch"] = lambda: lambda: (x @ x.T).mul_(gamma).add_(1.0).pow_(3)
    methods["scikit-learn"] = lambda: _of_sklearn(kind, x, gamma=gamma, **options)

    def expected() -> Tensor:
        rows, y = x[:64].double(), x.double()
        if kind == "polynomial":
            return (gamma * rows @ y.T + 1.0) ** 3
        squares = torch.cdist(rows, y).square()
        return torch.exp(-gamma * (torch.cdist(rows, y, p=1.0) if kind == "laplace" else squares))

    return Problem(methods, expected, others=("pykeops times a vector",))


def _rbf_of_rows(x: Tensor, gamma: float) -> Tensor:
    squares = x.square().sum(1)
    return torch.exp(-gamma * (squares + squares[:, None] - 2 * x @ x.T).clamp_min(0))


def _of_sklearn(kind: str, x: Tensor, **options: float) -> Runner:
    if x.is_cuda:
        raise ModuleNotFoundError("scikit-learn computes on a CPU")
    from sklearn.metrics import pairwise

    function = getattr(pairwise, {"laplace": "laplacian"}.get(kind, kind) + "_kernel")
    array = x.numpy()
    return lambda: torch.from_numpy(function(array, **options))


# -- curvature ----------------------------------------------------------------------------------


def glm_rows(scale: Scale) -> Iterator[Row]:
    sizes = {
        "gpu": [(10_000, 512, 1000, 50), (50_000, 512, 1000, 100)],
        "cpu": [(10_000, 512, 1000, 50), (10_000, 512, 1000, 200), (50_000, 512, 1000, 100)],
        "small": [(90, 33, 40, 7)],
    }
    for b, k, m, n in sizes[scale]:
        memory = 1.2 * b * m / 2**20  # 0.3 of what two products in PyTorch take
        for name, problem in (("glm_hvp", _glm_hvps), ("glm_gradient", _glm_gradients)):
            yield Row(
                name,
                _spelt(b=b, k=k, m=m, n=n),
                partial(problem, b, k, m, n),
                "fp32",
                2 * b * k * m,  # half of the samples are in a subset, for two products
                memory=memory if name == "glm_hvp" and b == 50_000 else None,
            )


def _glm_inputs(b: int, k: int, m: int, n: int, device: torch.device) -> tuple[Tensor, ...]:
    """Features (b, k), offsets (n + 1,), masks (m, n), vectors (m, k), and the samples (m, b)."""
    x, v = _normal(device, b, k), _normal(device, m, k) / k**0.5
    offsets = torch.arange(n + 1) * b // n
    masks = torch.rand(m, n, generator=torch.Generator().manual_seed(0)) < 0.5
    return x, offsets, masks, v, masks.repeat_interleave(offsets.diff(), dim=1).to(device)


def _glm_hvps(b: int, k: int, m: int, n: int, device: torch.device) -> Problem:
    x, offsets, masks, v, inside = _glm_inputs(b, k, m, n, device)
    curvature, sizes = torch.rand(m, b, device=device), inside.sum(1, keepdim=True)

    def ours(dtype: torch.dtype) -> Runner:
        stored = curvature.to(dtype)
        return lambda: ops.glm_hvp(x, offsets, masks, v, curvature=stored, ridge=0.1)

    def products(workspace: Tensor | None = None) -> Runner:
        weights = curvature * inside

        def run() -> Tensor:
            tangents = torch.mm(v, x.T, out=workspace).mul_(weights)
            return (tangents @ x).div_(sizes).add_(v, alpha=0.1)

        return run

    def expected() -> Tensor:
        weights = (curvature * inside)[:64].double()
        return (v[:64].double() @ x.double().T * weights) @ x.double() / sizes[:64] + 0.1 * v[:64]

    methods: dict[str, Builder] = {
        "ksm_ext": lambda: ours(torch.float32),
        "ksm_ext bfloat16": lambda: ours(torch.bfloat16),
        "torch": products,
        "torch, memory kept": lambda: products(torch.empty(m, b, device=device)),
    }
    return Problem(methods, expected, tolerance=2**-8)  # the rounding of bfloat16


def _glm_gradients(b: int, k: int, m: int, n: int, device: torch.device) -> Problem:
    x, offsets, masks, w, inside = _glm_inputs(b, k, m, n, device)
    h, sizes = _normal(device, b), inside.sum(1, keepdim=True)

    def formula(x: Tensor, w: Tensor, inside: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.addmm(h.to(x.dtype), w, x.T)
        losses = softplus(-z).mul_(inside).sum(1)
        gradient = (torch.sigmoid(-z).neg_().mul_(inside) @ x).div_(sizes).add_(w, alpha=0.1)
        return gradient, losses / sizes[:, 0] + 0.05 * w.square().sum(1)

    def joined(result: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([result[1][:, None], result[0]], dim=1)

    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.glm_gradient(x, h, offsets, masks, w, ridge=0.1),
        "torch": lambda: lambda: formula(x, w, inside, sizes),
    }
    return Problem(
        methods,
        lambda: joined(formula(x.double(), w[:64].double(), inside[:64], sizes[:64])),
        compared=joined,
    )


def softmax_rows(scale: Scale) -> Iterator[Row]:
    sizes = {"gpu": (4096, 50_304, 16), "cpu": (2048, 32_000, 8), "small": (12, 300, 3)}
    b, c, s = sizes[scale]
    tangents = 4 * b * c * s
    size, passes = _spelt(b=b, c=c, s=s), 2 * tangents + 4 * b * c
    if scale != "gpu":
        problem, memory = partial(_softmaxes, b, c, s), 1.05 * tangents / 2**20
        yield Row("softmax_hvp", size, problem, "copy", passes, memory)
    in_place = partial(_softmaxes_in_place, b, c, s)
    yield Row("softmax_hvp_", size, in_place, "copy", passes, memory=50)


def _softmaxes(b: int, c: int, s: int, device: torch.device) -> Problem:
    logits, tangents = _normal(device, b, c), _normal(device, s, b, c)

    def eager() -> Tensor:
        p = logits.softmax(-1)
        return p * (tangents - (p * tangents).sum(-1, keepdim=True))

    def half_in_place() -> Tensor:
        p = logits.softmax(-1)
        out = p * tangents
        return out.sub_(p * out.sum(-1, keepdim=True))

    def einsum() -> Tensor:
        p = logits.softmax(-1)
        means = torch.einsum("bc,sbc->sb", p, tangents)
        return (tangents - means[:, :, None]).mul_(p)

    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.softmax_hvp(logits, tangents),
        "torch": lambda: eager,
        "torch, half in place": lambda: half_in_place,
        "torch, einsum": lambda: einsum,
    }
    return Problem(methods, lambda: _softmax_float64(logits, tangents))


def _softmaxes_in_place(b: int, c: int, s: int, device: torch.device) -> Problem:
    """Tangents shrink from call to call, the time does not."""
    logits, tangents = _normal(device, b, c), _normal(device, s, b, c)

    def eager() -> Tensor:
        p = logits.softmax(-1)
        for tangent in tangents:  # all at once would take three times their memory
            tangent.sub_((p * tangent).sum(-1, keepdim=True)).mul_(p)
        return tangents

    methods: dict[str, Builder] = {
        "ksm_ext": lambda: lambda: ops.softmax_hvp_(tangents, logits),
        "torch": lambda: eager,
        "hessian-eigenthings, Triton": lambda: _eigenthings(logits, tangents),
    }
    leading = lambda found: torch.stack([part[:8] for part in found])  # noqa: E731
    return Problem(methods, lambda: _softmax_float64(logits, tangents), compared=leading)


def _eigenthings(logits: Tensor, tangents: Tensor) -> Runner:
    """Out of place, a tangent at a time; of its repository, not yet of its package."""
    from hessian_eigenthings.loss_fns._fused_ce_hvp import triton_ce_hvp

    if not logits.is_cuda:
        raise ModuleNotFoundError("hessian-eigenthings' Triton kernel needs a GPU")
    valid = torch.ones(len(logits), device=logits.device)
    return lambda: [triton_ce_hvp(logits, tangent, valid, 1.0) for tangent in tangents]


def _softmax_float64(logits: Tensor, tangents: Tensor) -> Tensor:
    """The products of the first samples."""
    p, v = logits[:8].double().softmax(-1), tangents[:, :8].double()
    return p * (v - (p * v).sum(-1, keepdim=True))


def hvp_rows(scale: Scale) -> Iterator[Row]:
    gpu = [(8, 64, 16), (2, 256, 16), (1, 16, 64)]
    # bench_hvp.py measures them on the CPU.
    for b, tokens, r in {"gpu": gpu, "cpu": [], "small": [(2, 5, 3)]}[scale]:
        yield Row(
            "hessian",
            f"transformer of 0.5 M, {_spelt(b=b, tokens=tokens, vectors=r)}",
            partial(_hessians, b, tokens, r),
            "fp32",
            12 * 536_000 * b * tokens * r,  # six times a forward pass of two operations a weight
        )


def _hessians(b: int, tokens: int, r: int, device: torch.device) -> Problem:
    import bench_hvp

    given = tuple(part.to(device) for part in bench_hvp.problem(b, tokens, r))
    model, x, y, v = given

    def captured() -> Runner:
        if device.type != "cuda":
            raise ModuleNotFoundError("CUDA graphs need a GPU")
        run = bench_hvp.of_vmap(*given)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def curvlinops() -> Runner:
        from curvlinops import HessianLinearOperator

        loss = torch.nn.CrossEntropyLoss()
        flat = torch.nn.Sequential(model, torch.nn.Flatten(0, 1))
        given = [(x, y.flatten())]
        operator = HessianLinearOperator(
            flat, loss, list(flat.parameters()), given, check_deterministic=False
        )

        def run() -> Any:
            with sdpa_kernel(SDPBackend.MATH):  # the others have no forward derivative
                return operator @ v.T

        return run

    methods: dict[str, Builder] = {
        "ksm_ext": lambda: bench_hvp.of_ksm_ext(*given),
        "loop on a shared graph": lambda: bench_hvp.of_loop(*given),
        "vmap(jvp(grad))": lambda: bench_hvp.of_vmap(*given),
        "vmap(jvp(grad)) in a CUDA graph": captured,
        "curvlinops": curvlinops,
    }
    # The mean over tokens is that over samples, divided by the tokens of one.
    return Problem(methods, bench_hvp.of_loop(*given), others=("curvlinops",))


# -- what they share ----------------------------------------------------------------------------

PARTS: dict[str, Callable[[Scale], Iterator[Row]]] = {
    "project": project_rows,
    "masks": mask_rows,
    "gram": gram_rows,
    "glm": glm_rows,
    "softmax": softmax_rows,
    "hvp": hvp_rows,
}


def rows_of(scale: Scale, parts: Iterable[str] = PARTS) -> list[Row]:
    return [row for part in parts for row in PARTS[part](scale)]


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device)


def _spelt(**sizes: int) -> str:
    return " ".join(f"{name}={size:,}" for name, size in sizes.items())


def _compiled(function: Callable[..., Tensor], *arguments: Any) -> Runner:
    run = torch.compile(function, dynamic=False)
    run(*arguments)
    return partial(run, *arguments)


def _in_tf32(run: Runner) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision(before)
