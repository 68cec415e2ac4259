"""What ``device_ops.py`` measures: every operator at its sizes, its peers, and its limit.

A row is measured by the functions that its ``methods`` build, of which ``ksm_ext`` is ours. A
method that needs a package which is not there raises ``ModuleNotFoundError``, and is said not to
have run. The limit of a row is what it cannot avoid: bytes to read, write or copy, or arithmetic.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ksm_ext import ops
from ksm_ext.ops import Projector

Runner = Callable[[], Any]
Builder = Callable[[], Runner]


@dataclass(frozen=True)
class Row:
    """One operator at one size."""

    name: str
    size: str
    methods: Callable[[torch.device], dict[str, Builder]]  # of random inputs on the device
    limit: str  # the name of a ceiling
    amount: float  # bytes, or floating-point operations

    @property
    def title(self) -> str:
        return f"{self.name}, {self.size}"


# -- projections --------------------------------------------------------------------------------


def project_rows(small: bool) -> Iterator[Row]:
    sizes = [
        (32, 10**6, 512),
        (32, 10**6, 4096),
        (256, 10**6, 4096),
        (1024, 10**6, 2048),
        (32, 10**7, 4096),
        (32, 10**8, 4096),
        (8, 10**9, 8192),
    ]
    sizes = [(4, 3000, 64), (32, 3000, 64)] if small else sizes
    for b, p, k in sizes:
        yield _projected("sbp", b, p, k, {"index_add_": _index_add, "sjlt": _sjlt})
    b, p, k = sizes[0] if small else sizes[4]
    yield _projected("sbp s=4", b, p, k, {"index_add_": _index_add, "sjlt": _sjlt}, sparsity=4)
    yield _projected("sbp hadamard", b, p, k, {"fast_hadamard_transform": _fast_hadamard})
    yield _projected("sjlt", b, p, k, {"sjlt": _sjlt})
    yield _listed(*(sizes[0] if small else (32, 10**8, 4096)), 3 if small else 148)
    dense = {"torch.mm, stored matrix": _stored, "fast_jl": _fast_jl, "TRAK BasicProjector": _trak}
    for b, p, k in sizes[:2] if small else [sizes[1], sizes[2], sizes[3]]:
        yield _projected("rademacher", b, p, k, dense, dense=True)
        stored = {"torch.mm, stored matrix": _stored}
        yield _projected("rademacher bfloat16", b, p, k, stored, dense=True)
    yield _projected("gaussian", *(sizes[0] if small else sizes[1]), dense, dense=True)
    b, p, k = sizes[0] if small else sizes[5]
    yield Row(
        "project_adjoint sbp",
        _spelt(b=b, p=p, k=k),
        lambda device: _unprojected(device, b, p, k),
        "write",
        4 * b * p,
    )


def _projected(
    what: str,
    b: int,
    p: int,
    k: int,
    peers: dict[str, Callable[[Tensor, Projector], Runner]],
    *,
    sparsity: int = 1,
    dense: bool = False,
) -> Row:
    kind = what.split()[0]
    projection = Projector(k, kind, sparsity=sparsity, hadamard="hadamard" in what)

    def methods(device: torch.device) -> dict[str, Builder]:
        x = _normal(device, b, p)
        if "bfloat16" in what:
            x = x.bfloat16()
        found: dict[str, Builder] = {"ksm_ext": lambda: lambda: ops.project(x, projection)}
        for name, peer in peers.items():
            found[name] = lambda peer=peer: peer(x, projection)
        return found

    limit = ("bf16", 2 * b * p * k) if dense else ("read", 4 * b * p)
    return Row(f"project {what}", _spelt(b=b, p=p, k=k), methods, *limit)


def _listed(b: int, p: int, k: int, count: int) -> Row:
    """A network's gradients parameter by parameter, which a peer concatenates first."""
    projection = Projector(k)

    def methods(device: torch.device) -> dict[str, Builder]:
        parts = [_normal(device, b, p // count) for _ in range(count)]

        def one_by_one() -> Tensor:
            out = torch.zeros(b, k, device=device)
            for number, part in enumerate(parts):
                ops.project_(out, part, projection, offset=number * (p // count))
            return out

        return {
            "ksm_ext": lambda: one_by_one,
            "cat, then ksm_ext": lambda: lambda: ops.project(torch.cat(parts, dim=1), projection),
        }

    size = f"{count} tensors, {_spelt(b=b, p=p, k=k)}"
    return Row("project_ sbp", size, methods, "read", 4 * b * p)


def _unprojected(device: torch.device, b: int, p: int, k: int) -> dict[str, Builder]:
    y, projection = _normal(device, b, k), Projector(k)
    outputs = torch.randint(k, (p,), device=device)
    return {
        "ksm_ext": lambda: lambda: ops.project_adjoint(y, projection, p),
        "index_select": lambda: lambda: y.index_select(1, outputs),
    }


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
    entries = _normal(x.device, x.shape[1], projection.dim).sign_().to(x.dtype)
    return lambda: x @ entries


def _sjlt(x: Tensor, projection: Projector) -> Runner:
    from sjlt import SJLTProjection

    peer = SJLTProjection(x.shape[1], projection.dim, c=projection.sparsity, device=x.device)
    return lambda: peer(x)


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
    return lambda: peer.project(x, model_id=0)


# -- masks --------------------------------------------------------------------------------------


def mask_rows(small: bool) -> Iterator[Row]:
    sizes = [(300, 70)] if small else [(4096, 256), (10_000, 1024), (50_000, 1024)]
    for m, n in sizes:
        yield Row(
            "mask_gram rbf",
            _spelt(m=m, l=m, n=n),
            lambda device, m=m, n=n: _mask_grams(device, m, n),
            "write",
            4 * m * m,
        )
    m, n, t = (300, 70, 3) if small else (100_000, 256, 8)
    yield Row(
        "mask_gram_matmul rbf",
        _spelt(m=m, l=m, n=n, t=t),
        lambda device: _mask_matmuls(device, m, n, t),
        "fp32",
        2 * m * m * t,
    )


def _mask_grams(device: torch.device, m: int, n: int) -> dict[str, Builder]:
    masks, gamma = torch.rand(m, n, device=device) < 0.5, 1.0 / n
    packed = ops.pack_masks(masks)
    table = torch.exp(-gamma * torch.arange(n + 1.0, device=device))

    def product(dtype: torch.dtype) -> Runner:
        x, sizes = masks.to(dtype), masks.sum(1).float()

        def run() -> Tensor:
            overlaps = (x @ x.T).float()
            return overlaps.mul_(2).sub_(sizes).sub_(sizes[:, None]).mul_(gamma).exp_()

        return run

    return {
        "ksm_ext": lambda: lambda: ops.mask_gram(packed, None, n, hamming_table=table),
        "torch float32": lambda: product(torch.float32),
        "torch bfloat16, inexact": lambda: product(torch.bfloat16),
        "torch cdist": lambda: (
            lambda: torch.cdist(masks.float(), masks.float()).square_().mul_(-gamma).exp_()
        ),
        "torch bfloat16, compiled": lambda: _compiled(_rbf_of_overlaps, masks.bfloat16(), gamma),
    }


def _rbf_of_overlaps(x: Tensor, gamma: float) -> Tensor:
    sizes = x.sum(1, dtype=torch.float32)
    return torch.exp(gamma * (2 * (x @ x.T).float() - sizes - sizes[:, None]))


def _mask_matmuls(device: torch.device, m: int, n: int, t: int) -> dict[str, Builder]:
    masks, gamma = torch.rand(m, n, device=device) < 0.5, 1.0 / n
    packed, v = ops.pack_masks(masks), _normal(device, m, t)
    table = torch.exp(-gamma * torch.arange(n + 1.0, device=device))

    def strips() -> Runner:
        x, sizes = masks.float(), masks.sum(1).float()

        def run() -> Tensor:
            parts = []
            for rows, own in zip(x.split(4096), sizes.split(4096), strict=True):
                distances = (rows @ x.T).mul_(2).sub_(sizes).sub_(own[:, None])
                parts.append(distances.mul_(gamma).exp_() @ v)
            return torch.cat(parts)

        return run

    return {
        "ksm_ext": lambda: lambda: ops.mask_gram_matmul(packed, None, n, v, hamming_table=table),
        "torch in strips": strips,
    }


# -- Gram matrices ------------------------------------------------------------------------------


def gram_rows(small: bool) -> Iterator[Row]:
    for b, k in [(90, 33)] if small else [(8192, 4096), (50_000, 4096), (200_000, 1024)]:
        yield Row(
            "gram_update",
            _spelt(b=b, k=k),
            lambda device, b=b, k=k: _gram_updates(device, b, k),
            "fp32",
            b * k * (k + 1),
        )
    n, b, k = (5, 90, 33) if small else (50, 50_000, 512)
    yield Row(
        "task_gram",
        _spelt(n=n, b=b, k=k),
        lambda device: _task_grams(device, n, b, k),
        "fp32",
        b * k * (k + 1),
    )
    for m, n in [(60, 33)] if small else [(8192, 4096), (50_000, 512)]:
        yield Row(
            "kernel_gram rbf",
            _spelt(m=m, l=m, n=n),
            lambda device, m=m, n=n: _kernel_grams(device, m, n),
            "fp32",
            m * m * n * 2,
        )
    m, n = (60, 33) if small else (8192, 512)
    yield Row(
        "kernel_gram laplace",
        _spelt(m=m, l=m, n=n),
        lambda device: _laplace_grams(device, m, n),
        "fp32",
        m * m * n * 2,
    )


def _gram_updates(device: torch.device, b: int, k: int) -> dict[str, Builder]:
    x, gram = _normal(device, b, k), torch.zeros(k, k, device=device)
    return {
        "ksm_ext": lambda: lambda: ops.gram_update(gram, x),
        "torch.addmm float32": lambda: lambda: torch.addmm(gram, x.T, x),
        "torch.addmm TF32": lambda: lambda: _in_tf32(lambda: torch.addmm(gram, x.T, x)),
    }


def _task_grams(device: torch.device, n: int, b: int, k: int) -> dict[str, Builder]:
    x, offsets = _normal(device, b, k), torch.linspace(0, b, n + 1).long()
    parts = x.split(offsets.diff().tolist())
    return {
        "ksm_ext": lambda: lambda: ops.task_gram(x, offsets),
        "torch loop": lambda: lambda: torch.stack([part.T @ part for part in parts]),
    }


def _kernel_grams(device: torch.device, m: int, n: int) -> dict[str, Builder]:
    x, gamma = _normal(device, m, n), 1.0 / n

    def eager() -> Tensor:
        squares = x.square().sum(1)
        products = torch.addmm(squares[None, :], x, x.T, alpha=-2).add_(squares[:, None])
        return products.clamp_min_(0).mul_(-gamma).exp_()

    def lazy() -> Runner:
        from pykeops.torch import LazyTensor

        v, left, right = _normal(device, m, 1), LazyTensor(x[:, None]), LazyTensor(x[None])
        return lambda: (-gamma * ((left - right) ** 2).sum(-1)).exp() @ v

    return {
        "ksm_ext": lambda: lambda: ops.kernel_gram(x, None, "rbf", gamma=gamma),
        "torch": lambda: eager,
        "torch cdist": lambda: lambda: torch.cdist(x, x).square_().mul_(-gamma).exp_(),
        "torch compiled": lambda: _compiled(_rbf_of_rows, x, gamma),
        "pykeops times a vector": lazy,
    }


def _rbf_of_rows(x: Tensor, gamma: float) -> Tensor:
    squares = x.square().sum(1)
    return torch.exp(-gamma * (squares + squares[:, None] - 2 * x @ x.T).clamp_min(0))


def _laplace_grams(device: torch.device, m: int, n: int) -> dict[str, Builder]:
    x, gamma = _normal(device, m, n), 1.0 / n
    return {
        "ksm_ext": lambda: lambda: ops.kernel_gram(x, None, "laplace", gamma=gamma),
        "torch cdist": lambda: lambda: torch.cdist(x, x, p=1.0).mul_(-gamma).exp_(),
    }


# -- curvature ----------------------------------------------------------------------------------


def glm_rows(small: bool) -> Iterator[Row]:
    for b, k, m, n in (
        [(90, 33, 40, 7)] if small else [(10_000, 512, 1000, 50), (50_000, 512, 1000, 100)]
    ):
        size = _spelt(b=b, k=k, m=m, n=n)
        for name in ("glm_hvp", "glm_gradient"):
            yield Row(
                name,
                size,
                lambda device, name=name, b=b, k=k, m=m, n=n: _glms(device, name, b, k, m, n),
                "fp32",
                2 * b * k * m,  # half of the samples are in a subset, for two products
            )


def _glms(device: torch.device, name: str, b: int, k: int, m: int, n: int) -> dict[str, Builder]:
    x, v, h = _normal(device, b, k), _normal(device, m, k), _normal(device, b)
    offsets = torch.linspace(0, b, n + 1).long()
    masks = torch.rand(m, n, generator=torch.Generator().manual_seed(0)) < 0.5
    curvature = torch.rand(m, b, device=device)
    inside = masks.repeat_interleave(offsets.diff(), dim=1).to(device)
    sizes = inside.sum(1, keepdim=True).clamp_min(1)

    def product(weights: Tensor) -> Tensor:
        return ((v @ x.T).mul_(weights) @ x).div_(sizes).add_(v, alpha=0.1)

    def slope() -> Tensor:
        rarer = torch.sigmoid(-(h + v @ x.T))
        return ((-rarer * inside) @ x).div_(sizes).add_(v, alpha=0.1)

    if name == "glm_gradient":
        return {
            "ksm_ext": lambda: lambda: ops.glm_gradient(x, h, offsets, masks, v, ridge=0.1),
            "torch": lambda: slope,
        }
    half = curvature.bfloat16()
    weights = curvature * inside
    return {
        "ksm_ext": lambda: (
            lambda: ops.glm_hvp(x, offsets, masks, v, curvature=curvature, ridge=0.1)
        ),
        "ksm_ext bfloat16": lambda: (
            lambda: ops.glm_hvp(x, offsets, masks, v, curvature=half, ridge=0.1)
        ),
        "torch": lambda: lambda: product(weights),
    }


def softmax_rows(small: bool) -> Iterator[Row]:
    b, c, s = (12, 300, 3) if small else (4096, 50_304, 16)
    passes = 4 * b * c * (2 * s + 1)
    yield Row(
        "softmax_hvp_",
        _spelt(b=b, c=c, s=s),
        lambda device: _softmaxes(device, b, c, s),
        "copy",
        passes,
    )


def _softmaxes(device: torch.device, b: int, c: int, s: int) -> dict[str, Builder]:
    logits, tangents = _normal(device, b, c), _normal(device, s, b, c)

    def eager() -> Tensor:
        p = logits.softmax(-1)
        for tangent in tangents:  # all at once would take three times their memory
            tangent.sub_((p * tangent).sum(-1, keepdim=True)).mul_(p)
        return tangents

    return {
        "ksm_ext": lambda: lambda: ops.softmax_hvp_(tangents, logits),
        "torch": lambda: eager,
    }


def hvp_rows(small: bool) -> Iterator[Row]:
    for b, tokens, r in [(2, 5, 3)] if small else [(8, 64, 16), (2, 256, 16), (1, 16, 64)]:
        yield Row(
            "hessian",
            f"transformer of 0.5 M, {_spelt(b=b, tokens=tokens, vectors=r)}",
            lambda device, b=b, tokens=tokens, r=r: _hessians(device, b, tokens, r),
            "fp32",
            12 * 536_000 * b * tokens * r,  # six times a forward pass of two operations a weight
        )


def _hessians(device: torch.device, b: int, tokens: int, r: int) -> dict[str, Builder]:
    import bench_hvp

    bench_hvp.NUM_VECTORS = r
    bench_hvp.SIZES["here"] = (b, tokens)
    model, x, y, _ = bench_hvp.problem("here")
    model, x, y = model.to(device), x.to(device), y.to(device)
    v = _normal(device, r, sum(weight.numel() for weight in model.parameters()))
    given = model, x, y, v

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

    return {
        "ksm_ext": lambda: bench_hvp.of_ksm_ext(*given),
        "loop on a shared graph": lambda: bench_hvp.of_loop(*given),
        "vmap(jvp(grad))": lambda: bench_hvp.of_vmap(*given),
        "vmap(jvp(grad)) in a CUDA graph": captured,
        "curvlinops": curvlinops,
    }


# -- what they share ----------------------------------------------------------------------------

PARTS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "project": project_rows,
    "masks": mask_rows,
    "gram": gram_rows,
    "glm": glm_rows,
    "softmax": softmax_rows,
    "hvp": hvp_rows,
}


def _normal(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device)


def _spelt(**sizes: int) -> str:
    return " ".join(f"{name}={size:,}" for name, size in sizes.items())


def _compiled(function: Callable[..., Tensor], *arguments: Any) -> Runner:
    run = torch.compile(function, dynamic=False)
    run(*arguments)
    return lambda: run(*arguments)


def _in_tf32(run: Runner) -> Any:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        return run()
    finally:
        torch.set_float32_matmul_precision(before)
