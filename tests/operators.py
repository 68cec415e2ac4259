"""A call of every operator, for what holds for all of them: tests/ops/test_operators.py and
tools/cuda_smoke.py; and what the tests of single operators share.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from instruction_sets import digests
from torch import Tensor

from ksm_ext import ops
from ksm_ext.ops import Projector


@dataclass(frozen=True)
class Sizes:
    """What a call is made of; k is divisible by 4."""

    m: int = 67  # subsets
    l: int = 130
    n: int = 131  # tasks
    t: int = 5  # targets
    b: int = 35  # samples
    p: int = 1003  # parameters
    k: int = 48  # projected dimension
    s: int = 3  # tangents
    c: int = 257  # classes
    offset: int = 13  # of the parameters


# Masks of many words; and what threads share: more than a block of everything.
WIDE = Sizes(m=75, l=133, n=1024, t=7, b=60, p=300, k=20, c=999)
SHARED = Sizes(m=290, l=1333, n=130, t=3, b=700, p=2000, k=300, s=9, c=500)
SIZES = {
    "one": Sizes(m=1, l=1, n=1, t=1, b=1, p=1, k=4, s=1, c=1),
    "odd": Sizes(),
    # Beyond a tile of everything, in more than one split; tables that leave no room beside them.
    "tiles": Sizes(m=300, l=1025, n=4099, t=17, b=150, p=20_001, k=132, s=9, c=1500),
    # Rows whose groups of four are aligned; enough products to occupy a GPU, and long rows.
    "aligned": Sizes(m=1500, l=1412, n=256, t=8, b=64, p=20_000, k=64, s=3, c=13_000, offset=16),
}


@dataclass(frozen=True)
class Call:
    """``run(*tensors)`` gives a tensor, or several; it leaves its arguments as they are."""

    run: Callable[..., Any]
    tensors: tuple[Tensor, ...]

    def on(self, device: torch.device | str) -> "Call":
        return replace(self, tensors=tuple(tensor.to(device) for tensor in self.tensors))

    def results(self) -> list[Tensor]:
        found = self.run(*self.tensors)
        found = [found] if isinstance(found, Tensor) else found
        return [tensor for tensor in found if tensor is not None]


def projections(k: int) -> Iterator[tuple[str, Projector]]:
    for kind in ("sbp", "rademacher", "gaussian", "sjlt"):
        yield kind, Projector(k, kind, seed=3)
    yield "sbp of 4 segments", Projector(k, "sbp", seed=3, sparsity=4)
    yield "sjlt of 4 segments", Projector(k, "sjlt", seed=3, sparsity=4)
    yield "hadamard", Projector(k, "sbp", seed=3, hadamard=True)


def calls(
    sizes: Sizes = SIZES["odd"], dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Call]:
    """Calls by name, the operator's first. All random tensors come from the seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def positive(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=dtype)

    def chosen(count: int) -> Tensor:
        return torch.rand(count, sizes.n, generator=generator) < 0.5

    m, l, n, t, b = sizes.m, sizes.l, sizes.n, sizes.t, sizes.b
    p, k, s, c = sizes.p, sizes.k, sizes.s, sizes.c
    masks, others = chosen(m), chosen(l)
    x, y = ops.pack_masks(masks), ops.pack_masks(others)
    hamming, overlap = positive(n + 1), positive(n + 1)
    relevances, row_factors, column_factors = positive(n) * 4 / n, normal(m), normal(l)
    features, targets, weights = normal(b, k), normal(b, t), positive(b)
    # These two are read by the host, and the same for every seed: graphs keep them.
    fixed = torch.Generator().manual_seed(0)
    offsets = torch.linspace(0, b, n + 1).long()
    subsets = torch.rand(m, n, generator=fixed) < 0.5

    def gram_update(gram: Tensor, features: Tensor, weights: Tensor | None = None) -> Tensor:
        return ops.gram_update(gram.clone(), features, weights)

    def project_(out: Tensor, x: Tensor) -> Tensor:
        return ops.project_(out.clone(), x, Projector(k, seed=3), offset=77)

    def softmax_hvp_(logits: Tensor, tangents: Tensor) -> Tensor:
        return ops.softmax_hvp_(tangents.clone(), logits)

    found = {
        "pack_masks": Call(ops.pack_masks, (masks,)),
        "mask_gram": Call(lambda x, y, h: ops.mask_gram(x, y, n, hamming_table=h), (x, y, hamming)),
        "mask_gram, symmetric, two tables": Call(
            lambda x, h, o: ops.mask_gram(x, None, n, hamming_table=h, overlap_table=o),
            (x, hamming, overlap),
        ),
        "mask_gram_matmul": Call(
            lambda x, y, v, h: ops.mask_gram_matmul(x, y, n, v, hamming_table=h),
            (x, y, normal(l, t), hamming),
        ),
        "mask_gram_matmul, overlaps": Call(
            lambda x, y, v, o: ops.mask_gram_matmul(x, y, n, v, overlap_table=o),
            (x, y, normal(l, t), overlap),
        ),
        "mask_gram_matmul, symmetric": Call(
            lambda y, v, h: ops.mask_gram_matmul(y, None, n, v, hamming_table=h),
            (y, normal(l, t), hamming),
        ),
        "weighted_mask_gram": Call(
            lambda x, y, w, a, b: ops.weighted_mask_gram(x, y, n, w, x_factors=a, y_factors=b),
            (x, y, relevances, row_factors, column_factors),
        ),
        "weighted_mask_gram, symmetric, exponential": Call(
            lambda x, w, a: ops.weighted_mask_gram(
                x, None, n, w, kernel="exponential", x_factors=a
            ),
            (x, relevances, row_factors),
        ),
        "weighted_mask_gram_matmul": Call(
            lambda x, y, w, v: ops.weighted_mask_gram_matmul(x, y, n, w, v),
            (x, y, relevances, normal(l, t)),
        ),
        "weighted_mask_gram_matmul, symmetric, exponential": Call(
            lambda y, w, v: ops.weighted_mask_gram_matmul(y, None, n, w, v, kernel="exponential"),
            (y, relevances, normal(l, t)),
        ),
        "project_": Call(project_, (normal(b, k), normal(b, p))),
        "gram_update": Call(gram_update, (features.T @ features, features, weights)),
        "gram_update, no weights": Call(gram_update, (features.T @ features, features)),
        "task_gram": Call(lambda x, w: ops.task_gram(x, offsets, None, w), (features, weights)),
        "task_gram, other": Call(lambda x, y: ops.task_gram(x, offsets, y), (features, targets)),
        "glm_hvp": Call(
            lambda x, v, d: ops.glm_hvp(x, offsets, subsets, v, curvature=d, ridge=0.1),
            (features, normal(m, k), positive(m, b)),
        ),
        "glm_hvp, bfloat16": Call(
            lambda x, v, d: ops.glm_hvp(x, offsets, subsets, v, curvature=d, ridge=0.1),
            (features, normal(m, k), positive(m, b).bfloat16()),
        ),
        "glm_hvp, squared loss": Call(
            lambda x, v: ops.glm_hvp(x, offsets, subsets, v), (features, normal(m, k))
        ),
        "glm_gradient": Call(
            lambda x, h, w: ops.glm_gradient(
                x, h, offsets, subsets, w, ridge=0.1, curvature_dtype=dtype
            ),
            (features, normal(b), normal(m, k) / k),
        ),
        "glm_gradient, bfloat16": Call(
            lambda x, h, w: ops.glm_gradient(
                x, h, offsets, subsets, w, curvature_dtype=torch.bfloat16
            ),
            (features, normal(b), normal(m, k) / k),
        ),
        "softmax_hvp": Call(ops.softmax_hvp, (normal(b, c), normal(s, b, c))),
        "softmax_hvp, weights": Call(
            lambda z, v, w: ops.softmax_hvp(z, v, weights=w),
            (normal(b, c), normal(s, b, c), weights),
        ),
        "softmax_hvp_": Call(softmax_hvp_, (normal(b, c), normal(s, b, c))),
    }
    for kind in ("linear", "polynomial", "rbf", "laplace", "exponential"):
        found[f"kernel_gram, {kind}"] = Call(
            lambda x, y, kind=kind: ops.kernel_gram(x, y, kind, gamma=0.1, coef0=1.0, degree=3),
            (normal(m, k), normal(l, k)),
        )
    found["kernel_gram, symmetric"] = Call(
        lambda x: ops.kernel_gram(x, None, "rbf", gamma=0.1), (normal(m, k),)
    )
    for name, projection in projections(k):
        found[f"project, {name}"] = Call(
            lambda x, projection=projection: ops.project(x, projection, offset=sizes.offset),
            (normal(b, p),),
        )
        found[f"project_adjoint, {name}"] = Call(
            lambda y, projection=projection: ops.project_adjoint(
                y, projection, p, offset=sizes.offset
            ),
            (normal(b, k),),
        )
    if dtype == torch.float32:
        for half in (torch.bfloat16, torch.float16):
            found[f"project, {half}"] = Call(
                lambda x: ops.project(x, Projector(k, seed=3)), (normal(b, p).to(half),)
            )
    return found


def results_of_all() -> dict[str, list[Tensor]]:
    """What every call gives, by its name and sizes, in both dtypes."""
    return {
        f"{name}, {dtype}, {sizes}": call.results()
        for sizes in (SIZES["odd"], WIDE, SHARED)
        for dtype in (torch.float32, torch.float64)
        for name, call in calls(sizes, dtype).items()
    }


def check_any_number_of_threads(results: Callable[[], Mapping[str, list[Tensor]]]) -> None:
    """Assert that tensors by name are the same, again and with any number of threads."""
    before, expected = torch.get_num_threads(), None
    try:
        for num_threads in (1, 1, 2, 3, 8):
            torch.set_num_threads(num_threads)
            found = digests(results())
            expected = expected or found
            assert found and found == expected, num_threads
    finally:
        torch.set_num_threads(before)


def refusals(
    tables: Mapping[type[Exception], Mapping[str, Callable[[], Any]]],
) -> list[tuple[type[Exception], str, Callable[[], Any]]]:
    """Rows (error, message, call) of tables from messages to calls, by the kind of error."""
    return [(error, text, call) for error, table in tables.items() for text, call in table.items()]


def derivatives(call: Callable[[Tensor], Tensor], value: Tensor) -> list[Callable[[], Any]]:
    """Three ways to ask for the derivative of ``call`` at ``value``."""
    return [
        lambda: call(value.clone().requires_grad_()),
        lambda: torch.func.jvp(call, (value,), (value,)),
        lambda: torch.func.grad(lambda x: call(x).sum())(value),
    ]


def compiled_or_not(compiled: bool, call: Callable[..., Any], *args: Any) -> Any:
    """What ``call`` gives by itself, or compiled whole."""
    torch._dynamo.reset()
    return (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(*args)
