"""project, project_ and project_adjoint against the matrix of the oracle, entry by entry."""

import itertools
import math
from functools import cache, partial

import pytest
import reference
import torch
from instruction_sets import check_every_instruction_set
from operators import check_any_number_of_threads, compiled_or_not, refusals
from torch.library import opcheck

from ksm_ext.ops import Projector, project, project_, project_adjoint

SEED = 123456789012345
# Segments that are and are not multiples of 16 and 128, runs of the rotation from 1 to 64.
PROJECTIONS = [
    Projector(64, seed=SEED),
    Projector(64, seed=SEED, sparsity=4),
    Projector(160, seed=SEED, sparsity=5),
    Projector(24, seed=SEED, sparsity=2),
    Projector(7, seed=-5),
    Projector(12, seed=SEED, sparsity=12),
    Projector(64, seed=SEED, hadamard=True),
    Projector(96, seed=SEED, sparsity=2, hadamard=True),
    Projector(12, seed=SEED, hadamard=True),
    Projector(7, seed=SEED, hadamard=True),
    Projector(48, "rademacher", SEED),
    Projector(70, "rademacher", SEED),
    Projector(20, "gaussian", SEED),
    Projector(64, "sjlt", SEED, sparsity=4),
    Projector(10, "sjlt", SEED, sparsity=5),
    Projector(300, "sjlt", SEED),
]
# Rotations over every number of passes, and segments of several of them.
LONG = [Projector(q, seed=SEED, hadamard=True) for q in (16, 32, 128, 256, 512, 768, 4096)]
LONG += [Projector(1024, seed=SEED, sparsity=2, hadamard=True)]
FEW = [PROJECTIONS[i] for i in (1, 3, 7, 11, 12, 13)]  # every kind
OFFSETS = [0, 37, 2**32 - 50, 10**10 + 3]


def name_of(projection):
    options = f"-s{projection.sparsity}" + "-hadamard" * projection.hadamard
    return f"{projection.kind}-{projection.dim}{options}"


every_projection = pytest.mark.parametrize("projection", PROJECTIONS, ids=name_of)
every_kind = pytest.mark.parametrize("projection", FEW, ids=name_of)


@cache
def matrix(projection, offset, p):
    """Rows offset to offset + p of P, (p, k) float64, from the oracle."""
    p_ = projection
    arguments = p_.dim, p_.kind, p_.seed, p_.sparsity, p_.hadamard
    return torch.stack([reference.projection_row(offset + j, *arguments) for j in range(p)])


def materialized(projection, offset, p, dtype=torch.float32, device="cpu"):
    return project(torch.eye(p, dtype=dtype, device=device), projection, offset=offset)


# The matrix.


@pytest.mark.parametrize(
    "seed, counter, words",
    [  # known answers of Random123 for philox4x32-10
        (0, [0] * 4, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, [2**32 - 1] * 4, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            0x299F31D0A4093822,
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_oracle_draws_philox(seed, counter, words):
    assert " ".join(f"{word:08x}" for word in reference.philox(seed, counter)) == words


def signed_outputs(row):
    """Where the row is nonzero, counted from 1, with its sign."""
    return [int(r + 1) * int(row[r].sign()) for r in row.nonzero()[:, 0]]


def signs(row):
    return ["".join("0+-"[int(value.sign())] for value in row)]


def bits(row):
    return [value.item().hex() for value in row]


SIGNS_OF_BLOCKS = """
    -51  52  49  50  55  56  53  54  59  -60  -57  -58  -63  -64  61  62  -3  -4  -1  2"""
SIGNS_OF_SEGMENTS = "-9 -20  -10 -19  -3 22  4 21  -1 -24"
MIXED = "++-+---+++-++++++-++-++-+-+++-+-  -+++-++++---+--+-++++--++--++-+-"
DENSE = "+++++---+-+-++--+++--++++++----+++++---+  --+-+----+---+-------+----+++++-+--+----"
NORMAL = """
    -0x1.4fcfee0000000p-1  0x1.9dea380000000p-4  0x1.50e14a0000000p-4  0x1.5f6bb80000000p-5
    0x1.a013ae0000000p-6  -0x1.cc98ae0000000p-3  -0x1.d5fe0c0000000p-5  0x1.bb548a0000000p-4"""
# Whatever is stored of a projection is worthless once one of these changes.
PINNED = [
    (signed_outputs, Projector(64, seed=SEED), 0, SIGNS_OF_BLOCKS),
    (signed_outputs, Projector(24, seed=SEED, sparsity=2), 2**32 - 2, SIGNS_OF_SEGMENTS),
    (signs, Projector(32, seed=SEED, hadamard=True), 31, MIXED),
    (signs, Projector(40, "rademacher", SEED), 127, DENSE),
    (bits, Projector(4, "gaussian", SEED), 3, NORMAL),
    (
        signed_outputs,
        Projector(300, "sjlt", SEED, sparsity=3),
        2**32 - 2,
        "-94 105 245  -86 123 -241  -79 -166 299",
    ),
]


@pytest.mark.parametrize("form, projection, offset, entries", PINNED)
def test_the_matrices_are_pinned(device, form, projection, offset, entries):
    rows = map(form, materialized(projection, offset, 20, device=device).cpu())
    found, expected = [str(entry) for row in rows for entry in row], entries.split()
    assert found[: len(expected)] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", OFFSETS)
@every_projection
def test_projecting_the_identity_gives_the_matrix_of_the_oracle(device, projection, offset, dtype):
    p = 150
    expected = matrix(projection, offset, p)
    # Box and Muller run in float32; everything else is exact but for the scale.
    tolerance = 5e-7 if projection.kind == "gaussian" else 2 * torch.finfo(dtype).eps
    close = partial(torch.testing.assert_close, rtol=0, atol=tolerance)
    close(materialized(projection, offset, p, dtype, device).cpu().double(), expected)
    eye = torch.eye(projection.dim, dtype=dtype, device=device)
    close(project_adjoint(eye, projection, p, offset=offset).T.cpu().double(), expected)


@pytest.mark.cuda
@every_projection
def test_cuda_has_the_same_matrix_bit_for_bit(projection):
    for offset in OFFSETS:
        for dtype in (torch.float32, torch.float64):
            expected = materialized(projection, offset, 150, dtype)
            assert torch.equal(materialized(projection, offset, 150, dtype, "cuda").cpu(), expected)
            eye = torch.eye(projection.dim, dtype=dtype, device="cuda")
            transposed = project_adjoint(eye, projection, 150, offset=offset)
            assert torch.equal(transposed.T.cpu(), expected)


@every_projection
def test_entries_do_not_depend_on_the_cuts(device, projection):
    p = 300
    whole = materialized(projection, 2**32 - 100, p, device=device)
    eye = torch.eye(p, device=device)
    pieces = torch.zeros_like(whole)
    cuts = [0, 1, 2, 67, 128, 200, p]
    for begin, end in itertools.pairwise(cuts):
        project_(pieces, eye[:, begin:end], projection, offset=2**32 - 100 + begin)
    assert torch.equal(pieces, whole)


def test_seeds_and_kinds_give_different_matrices():
    others = [Projector(64, seed=s) for s in (0, 1, -1, 2**32, 2**63 - 1, -(2**63))]
    others += [Projector(64, kind, 0) for kind in ("rademacher", "gaussian", "sjlt")]
    others += [Projector(64, hadamard=True), Projector(64, sparsity=2)]
    matrices = [materialized(projection, 0, 64) for projection in others]
    for i, first in enumerate(matrices):
        assert not any(torch.equal(first, second) for second in matrices[:i])


# Products.


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@every_projection
def test_products_agree_with_the_oracle(device, projection, dtype):
    b, p, offset = 11, 150, 37
    x = torch.randn(b, p).to(device, dtype)
    y = project(x, projection, offset=offset)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = x.cpu().double() @ matrix(projection, offset, p)
    exact = dtype == torch.float64 and projection.kind != "gaussian"
    torch.testing.assert_close(y.cpu().double(), expected, rtol=0, atol=1e-13 if exact else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("projection", LONG, ids=name_of)
def test_long_rotations_have_the_entries_of_the_oracle(device, projection, dtype):
    q = projection.dim // projection.sparsity
    spots = [0, q // 3, q - 1, q, 2 * q + 5]  # in three blocks, the last of which is cut
    x = torch.zeros(len(spots), 2 * q + 9, dtype=dtype, device=device)
    x[range(len(spots)), spots] = 1.0
    expected = torch.cat([matrix(projection, spot, 1) for spot in spots])
    close = partial(torch.testing.assert_close, rtol=0, atol=2 * torch.finfo(dtype).eps)
    close(project(x, projection).cpu().double(), expected)
    back = project_adjoint(expected.to(x), projection, x.shape[1])[:, spots].cpu().double()
    torch.testing.assert_close(back, expected @ expected.T, rtol=0, atol=1e-5)


@pytest.mark.parametrize("projection", [*FEW, Projector(300, "gaussian", SEED)], ids=name_of)
def test_rows_do_not_depend_on_rows_beside_them(projection):
    x = torch.randn(300, 200)
    whole = project(x, projection, offset=37)
    for part in ([0], range(7), range(250, 263), range(100, 257)):
        assert torch.equal(project(x[list(part)], projection, offset=37), whole[list(part)])


@pytest.mark.parametrize("b, p", [(1, 5000), (70, 1000)])
@every_kind
def test_products_of_many_coordinates_and_rows(device, projection, b, p):
    x, y = torch.randn(b, p).double(), torch.randn(b, projection.dim).double()
    entries = materialized(projection, 77, p, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 3e-4)):
        close = partial(torch.testing.assert_close, rtol=0, atol=tolerance)
        close(project(x.to(device, dtype), projection, offset=77).cpu().double(), x @ entries)
        adjoint = project_adjoint(y.to(device, dtype), projection, p, offset=77)
        close(adjoint.cpu().double(), y @ entries.T)


@every_projection
def test_the_adjoint_is_the_adjoint(device, projection):
    x = torch.randn(5, 400, dtype=torch.float64, device=device)
    y = torch.randn(5, projection.dim, dtype=torch.float64, device=device)
    left = (project(x, projection, offset=9) * y).sum()
    right = (x * project_adjoint(y, projection, 400, offset=9)).sum()
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


@every_projection
def test_parameters_one_after_the_other_equal_their_concatenation(device, projection):
    parts = [torch.randn(4, size, device=device) for size in (1, 300, 64, 0, 77, 1200)]
    out = torch.zeros(4, projection.dim, device=device)
    offset = 2**32 - 300
    for part in parts:
        assert project_(out, part, projection, offset=offset) is out
        offset += part.shape[1]
    whole = project(torch.cat(parts, 1), projection, offset=2**32 - 300)
    torch.testing.assert_close(out, whole, rtol=0, atol=2e-5)


@every_kind
def test_project_adds_to_out(device, projection):
    x = torch.randn(3, 200, device=device)
    out = torch.full((3, projection.dim), 2.0, device=device)
    project_(out, x, projection)
    torch.testing.assert_close(out, 2 + project(x, projection), rtol=0, atol=1e-5)


@every_kind
def test_empty_and_single_sizes(device, projection):
    k = projection.dim
    new = partial(torch.randn, device=device)
    assert project(new(0, 5), projection).shape == (0, k)
    assert torch.equal(project(new(3, 0), projection), torch.zeros(3, k, device=device))
    assert project_adjoint(new(0, k), projection, 5).shape == (0, 5)
    assert project_adjoint(new(3, k), projection, 0).shape == (3, 0)
    entries = matrix(projection, 5, 1).float()
    x, y = new(1, 1), new(1, k)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)
    close(project(x, projection, offset=5).cpu(), x.cpu() * entries)
    close(project_adjoint(y, projection, 1, offset=5).cpu(), y.cpu() @ entries.T)


@pytest.mark.parametrize("kind", ["sbp", "rademacher", "gaussian", "sjlt"])
def test_one_output(device, kind):
    projection = Projector(1, kind, SEED)
    expected = torch.ones(1, 50) @ matrix(projection, 3, 50).float()
    y = project(torch.ones(1, 50, device=device), projection, offset=3)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-5, atol=1e-5)


@every_kind
def test_strided_inputs(device, projection):
    x = torch.randn(6, 90, device=device)
    k = projection.dim
    y = torch.randn(k, 6, device=device).T
    expected = project(x, projection)
    wide = torch.zeros(6, 200, device=device)
    wide[:, 5:95] = x
    assert torch.equal(project(wide[:, 5:95], projection), expected)  # unaligned, as it is
    assert torch.equal(project(x.T.contiguous().T, projection), expected)
    assert torch.equal(project(torch.stack([x, x], 2)[:, :, 1], projection), expected)
    row = project(x[:1], projection).expand(4, k)
    assert torch.equal(project(x[:1].expand(4, 90), projection), row)
    ones = torch.ones(1, 1, device=device)
    constant = project(ones.expand(4, 90).contiguous(), projection)
    assert torch.equal(project(ones.expand(4, 90), projection), constant)
    assert torch.equal(project(x[:, :1].expand(6, 1), projection), project(x[:, :1], projection))
    transposed = project_adjoint(y.contiguous(), projection, 90)
    assert not y.is_contiguous() and torch.equal(project_adjoint(y, projection, 90), transposed)


def test_more_elements_than_32_bits_count(device):
    b, p = 2**11 + 1, 2**20  # of one row, expanded
    x, projection = torch.randn(1, p, device=device), Projector(4096, seed=1)
    y = project(x.expand(b, p), projection, offset=10**10)
    assert b * p > 2**31
    expected = project(x.expand(16, p), projection, offset=10**10)  # cut as the many rows are
    torch.testing.assert_close(y, expected[:1].expand_as(y), rtol=0, atol=2e-4)
    assert torch.equal(y, y[:1].expand_as(y))


@every_kind
def test_rows_further_apart_than_32_bits_count(device, projection):
    # Memory that is not touched is not there.
    memory = torch.empty(2**31 + 300, dtype=torch.bfloat16, device=device)
    x = memory.as_strided((2, 200), (2**31 + 100, 1))
    x.copy_(torch.randn(2, 200))
    assert torch.equal(project(x, projection), project(x.clone(), projection))


def results_of_all(projections=PROJECTIONS + LONG):
    """The matrix, and products of few and many rows, whole blocks and cut ones, by projection."""
    return {name_of(projection): list(results_of(projection)) for projection in projections}


def results_of(projection):
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    for offset, dtype in itertools.product(OFFSETS[1:3], (torch.float32, torch.float64)):
        yield materialized(projection, offset, 150, dtype)
        eye = torch.eye(projection.dim, dtype=dtype)
        yield project_adjoint(eye, projection, 150, offset=offset) + 0.0  # no -0
    for (b, p), offset in itertools.product(((1, 20_000), (5, 150), (70, 1000)), (0, 37)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            yield project(random(b, p).to(dtype), projection, offset=offset)
        for dtype in (torch.float32, torch.float64):
            y = random(b, projection.dim).to(dtype)
            yield project_adjoint(y, projection, p, offset=offset)


@pytest.mark.slow
def test_every_instruction_set_gives_the_same_bits():
    check_every_instruction_set("test_project")


def test_results_do_not_depend_on_threads():
    check_any_number_of_threads(lambda: results_of_all(FEW))


@every_kind
def test_repetition_gives_the_same_bits(device, projection):
    x, y = torch.randn(9, 5000, device=device), torch.randn(9, projection.dim, device=device)
    results = [(project(x, projection), project_adjoint(y, projection, 5000)) for _ in range(5)]
    assert all(all(map(torch.equal, results[0], other)) for other in results[1:])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@every_projection
def test_what_is_not_finite_reaches_every_output_that_it_meets(device, projection, value):
    p, j = 150, 70
    x = torch.randn(6, p, device=device)
    x[2, j] = value
    meets = matrix(projection, 11, p)[j] != 0
    y = project(x, projection, offset=11)
    assert torch.equal(~y[2].isfinite().cpu(), meets)
    assert y[[0, 1, 3, 4, 5]].isfinite().all()


@pytest.mark.cuda
@every_kind
def test_cuda_graphs_and_side_streams(projection):
    x = torch.randn(20, 5000, device="cuda")
    expected = project(x, projection)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        assert torch.equal(project(x, projection), expected)
    torch.cuda.current_stream().wait_stream(side)
    out = torch.zeros_like(expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        project_(out, x, projection)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


# Distortion of squared norms: D = |x P|^2 - 1 for |x| = 1, over seeds.

P = 1024
MOMENTS = [
    Projector(64),
    Projector(64, sparsity=4),
    Projector(64, hadamard=True),
    Projector(64, "rademacher"),
    Projector(64, "gaussian"),
    Projector(64, "sjlt"),
    Projector(64, "sjlt", sparsity=4),
]


def families(p):
    """Unit vectors (3, p): Gaussian, heavy-tailed, and twelve spikes of unequal size."""
    generator = torch.Generator().manual_seed(7)
    gaussian, numerator, *squares = torch.randn(4, p, generator=generator, dtype=torch.float64)
    heavy = numerator / (sum(s.square() for s in squares) / 2).sqrt()  # Student's t
    spiky = torch.zeros(p, dtype=torch.float64)
    spikes = torch.randperm(p, generator=generator)[:12]
    spiky[spikes] = torch.logspace(0, -0.7, 12, dtype=torch.float64)
    x = torch.stack([gaussian, heavy, spiky])
    return x / x.norm(dim=1, keepdim=True)


def distortions(projection, x, count):
    """(count, rows of x) of D, with a seed for each."""
    p = projection
    norms = [
        project(x, Projector(p.dim, p.kind, seed, p.sparsity, p.hadamard)).square().sum(1)
        for seed in range(count)
    ]
    return torch.stack(norms) - x.square().sum(1)


@pytest.mark.parametrize("projection", MOMENTS, ids=name_of)
def test_distortions_have_the_moments_of_theory(projection):
    x = families(P)
    samples = distortions(projection, x, 400)
    k = projection.dim
    if projection.kind == "gaussian":
        never_met = torch.zeros(3, dtype=torch.float64)
    elif projection.kind == "sbp":  # coordinates of one block never meet, rotated or not
        blocks = x.square().reshape(3, -1, k // projection.sparsity).sum(2)
        never_met = blocks.square().sum(1)
    else:
        never_met = x.pow(4).sum(1)
    variance = 2 / k * (1 - never_met)
    error_of_mean = 4 * (variance / len(samples)).sqrt()
    assert (samples.mean(0).abs() < error_of_mean).all()
    squares = samples.square()
    error_of_squares = 4 * squares.std(0) / len(samples) ** 0.5
    assert ((squares.mean(0) - variance).abs() < error_of_squares).all()


@pytest.mark.parametrize("projection", MOMENTS, ids=name_of)
def test_inner_products_keep_their_expectation(projection):
    generator = torch.Generator().manual_seed(8)
    x = families(P)
    y = (x + torch.randn(3, P, generator=generator, dtype=torch.float64) / P**0.5) / 2**0.5
    # 4 <x, y> = |x + y|^2 - |x - y|^2
    both = distortions(projection, torch.cat([x + y, x - y]), 300)
    errors = (both[:, :3] - both[:, 3:]) / 4
    assert (errors.mean(0).abs() < 4 * errors.std(0) / len(errors) ** 0.5).all()


def test_sparsity_and_rotation_tame_the_tails_on_spikes():
    spiky = families(16384)[2:]

    def tail(**options):
        errors = distortions(Projector(256, **options), spiky, 400).abs()
        return errors.quantile(0.98).item() * 16

    # 98th percentiles of |D| sqrt(k); Gaussian matrices reach 3.2 to 3.4.
    plain, sparse, rotated = tail(), tail(sparsity=4), tail(hadamard=True)
    assert rotated < 3.8 and sparse < 4.4 < plain < 6.5, (plain, sparse, rotated)


# Derivatives: linear in x.


@every_kind
def test_gradcheck(projection):
    x = torch.randn(2, 30, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, projection.dim, dtype=torch.float64, requires_grad=True)
    forward = partial(project, projection=projection, offset=37)
    adjoint = partial(project_adjoint, projection=projection, num_coordinates=30, offset=37)
    # An operator that writes to its argument has no batching under is_grads_batched, and says so;
    # torch.func.vmap does.
    torch.autograd.gradcheck(forward, (x,), fast_mode=True, check_batched_grad=True)
    for function, at in ((forward, x), (adjoint, y)):
        torch.autograd.gradcheck(function, (at,), fast_mode=True, check_forward_ad=True)
        torch.autograd.gradgradcheck(function, (at,), fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_come_in_the_dtype_of_x(dtype):
    x = torch.randn(2, 30).to(dtype).requires_grad_()
    weights = torch.randn(2, 64)
    (gradient,) = torch.autograd.grad((project(x, PROJECTIONS[0]) * weights).sum(), x)
    assert gradient.dtype == dtype
    expected = project_adjoint(weights, PROJECTIONS[0], 30).to(dtype)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize(
    "projection, compiled",
    [(projection, False) for projection in FEW] + [(FEW[2], True), (FEW[4], True)],
    ids=lambda value: name_of(value) if isinstance(value, Projector) else f"compiled-{value}",
)
def test_transforms_see_the_derivative(projection, compiled):
    p, offset = 30, 37
    entries = materialized(projection, offset, p, torch.float64)
    x, tangent = torch.randn(2, 3, p, dtype=torch.float64)
    batch = torch.randn(4, 3, p, dtype=torch.float64)

    def function(u):
        return project(u, projection, offset=offset)

    def unproject(y):
        return project_adjoint(y, projection, p, offset=offset)

    def energy(u):
        return 0.5 * function(u).square().sum()

    def hvp(u, du):
        return torch.func.jvp(torch.func.grad(energy), (u,), (du,))[1]

    run = partial(compiled_or_not, compiled)
    close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
    jvp = run(lambda u, du: torch.func.jvp(function, (u,), (du,))[1], x, tangent)
    close(jvp, tangent @ entries)
    step = 1e-3
    difference = (function(x + step * tangent) - function(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(jvp, difference, rtol=1e-8, atol=1e-9)
    y, dy = x @ entries, tangent @ entries
    close(run(lambda u, du: torch.func.jvp(unproject, (u,), (du,))[1], y, dy), dy @ entries.T)
    close(run(torch.func.grad(energy), x), y @ entries.T)
    close(run(hvp, x, tangent), tangent @ entries @ entries.T)
    close(
        run(lambda u, d: torch.func.vmap(hvp, (None, 0))(u, d), x, batch),
        batch @ entries @ entries.T,
    )
    close(run(torch.func.vmap(function, 1), batch), batch.movedim(1, 0) @ entries)


@every_kind
def test_opcheck(device, projection):
    arguments = projection._arguments
    for dtype, result in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        x = torch.randn(3, 50).to(device, dtype)
        out = torch.zeros(3, projection.dim, dtype=result, device=device)
        opcheck(torch.ops.ksm_ext.project_.default, (out, x, 37, *arguments))
        opcheck(torch.ops.ksm_ext.project_adjoint.default, (out, 50, 37, *arguments))


# Errors: <name> must be <expected>, got <found>. <what to do>.

SBP = Projector(8)
X, OUT = torch.zeros(2, 5), torch.zeros(2, 8)


VALUES = {
    "`dim` must be at least 1, got 0": lambda: Projector(0),
    r"`dim` must be below 2\^31, got": lambda: Projector(2**31),
    "`kind` must be one of 'sbp', 'rademacher'": lambda: Projector(8, "srht"),
    r"`seed` must be below 2\*\*63, got 9": lambda: Projector(8, seed=2**63),
    "`seed` must be at least -9": lambda: Projector(8, seed=-(2**63) - 1),
    "`sparsity` must be at least 1": lambda: Projector(8, sparsity=0),
    r"`sparsity` must be 1 for gaussian, got 2\. L": lambda: Projector(8, "gaussian", sparsity=2),
    r"must be a divisor of dim 8 below 65535, got 3\. Ch": lambda: Projector(8, sparsity=3),
    "dim 65535 below 65535, got 65535": lambda: Projector(2**16 - 1, sparsity=2**16 - 1),
    r"must be False for sjlt, got True\. Leave": lambda: Projector(8, "sjlt", hadamard=True),
    r"`x` must be 2-dimensional, got shape \(5,\)": lambda: project(X[0], SBP),
    "`offset` must be at least 0": lambda: project(X, SBP, offset=-1),
    r"`offset` must be at most 2\^62": lambda: project(X, SBP, offset=2**63 - 1),
    "`out` must be 2-dimensional": lambda: project_(OUT[0], X, SBP),
    "`out` must be on cpu like the fir.*, got meta": lambda: project_(OUT.to("meta"), X, SBP),
    r"contiguous of shape \(2, 8\), got shape \(1, 8\)": lambda: project_(OUT[:1], X, SBP),
    r"`out` must be conti.* strides \(1, 2\)": lambda: project_(torch.zeros(8, 2).T, X, SBP),
    "`x` must be without a gradient for a": lambda: project_(OUT, X.clone().requires_grad_(), SBP),
    "`out` must be without a gradient for": lambda: project_(OUT.clone().requires_grad_(), X, SBP),
    "`num_coordinates` must be at least 0": lambda: project_adjoint(OUT, SBP, -1),
    "`y` must be 2-dimensional": lambda: project_adjoint(OUT[0], SBP, 5),
    r"`y` must be of 8 columns like .* \(2, 5\)": lambda: project_adjoint(X, SBP, 5),
}
KINDS_THAT_DIFFER = {
    "`dim` must be an integer, got float": lambda: Projector(8.0),
    "`seed` must be an integer, got str": lambda: Projector(8, seed="a"),
    "`x` must be of a floating-point dtype, got torch.int32": lambda: project(X.int(), SBP),
    "`offset` must be an integer": lambda: project(X, SBP, offset=1.0),
    "`out` must be torch.float64 for this x, got": lambda: project_(OUT, X.double(), SBP),
    "`y` must be float32 or .*, got torch.bfl": lambda: project_adjoint(OUT.bfloat16(), SBP, 5),
}
ERRORS = {ValueError: VALUES, TypeError: KINDS_THAT_DIFFER}


@pytest.mark.parametrize("error, message, call", refusals(ERRORS))
def test_errors_name_what_is_wrong(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_no_grad_allows_accumulation():
    with torch.no_grad():
        project_(torch.zeros(2, 8), X.clone().requires_grad_(), SBP)


def raw(out=OUT, x=X, offset=0, k=8, kind=0, sparsity=1):
    torch.ops.ksm_ext.project_.default(out, x, offset, k, kind, 0, sparsity, False)


def raw_adjoint(y=OUT, count=5, offset=0):
    torch.ops.ksm_ext.project_adjoint.default(y, count, offset, 8, 0, 0, 1, False)


@pytest.mark.parametrize(
    "message, call",
    [
        ("dim must be between 1 and 2", lambda: raw(k=0)),
        ("kind must be one of 0, 1, 2, 3, got 4", lambda: raw(kind=4)),
        ("sparsity must be a divisor of dim 8 below 65535, got 3", lambda: raw(sparsity=3)),
        ("out must be 2-dimensional", lambda: raw(out=OUT[0])),
        ("out must be contiguous", lambda: raw(out=torch.zeros(8, 2).T)),
        (r"out must be of shape \(2, 8\), got \(1, 8\)", lambda: raw(out=OUT[:1])),
        ("x must be 2-dimensional, got 1 dim", lambda: raw(x=X[0])),
        ("x must be contiguous along its coord", lambda: raw(x=torch.zeros(5, 2).T)),
        ("x must be float32, bfloat16 or float16 with", lambda: raw(x=X.int())),
        ("x must be float32, bfloat16 or float16 with", lambda: raw(x=X.double())),
        ("offset must be at least 0 and leave room", lambda: raw(offset=-1)),
        ("offset must be at least 0 and leave room", lambda: raw(offset=2**63 - 4)),
        ("y must be of 8 columns, got 5", lambda: raw_adjoint(y=X)),
        ("y must be of dtype float32 or float64", lambda: raw_adjoint(y=OUT.half())),
        ("y must be contiguous", lambda: raw_adjoint(y=torch.zeros(8, 2).T)),
        ("num_coordinates must be at least 0, got -1", lambda: raw_adjoint(count=-1)),
        ("offset must be at least 0 and leave room", lambda: raw_adjoint(offset=-1)),
    ],
)
def test_the_operators_themselves_refuse_what_would_corrupt_memory(message, call):
    with pytest.raises(RuntimeError, match=message):
        call()
