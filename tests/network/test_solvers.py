import pytest
import torch

from ksm_ext import ConjugateGradients
from ksm_ext.network.solvers import (
    BlockConjugateGradients,
    LiSSA,
    as_solver,
    check_system,
    inner_products,
    without_autocast,
)


def definite(p, condition=1e3, seed=0):
    """A symmetric matrix with eigenvalues from 1 to ``condition``."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(p, p, dtype=torch.float64, generator=generator))
    return basis @ torch.logspace(0, torch.tensor(condition).log10(), p).double().diag() @ basis.T


def vectors(s, p, seed=1):
    return torch.randn(s, p, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("s", [1, 7, 40, 60])
@pytest.mark.parametrize("damping", [0.0, 10.0])
def test_solutions_are_those_of_dense_algebra(s, damping):
    p = 40
    matrix, rhs = definite(p), vectors(s, p)
    found = BlockConjugateGradients(tolerance=1e-11, max_steps=200).solve(
        lambda v: v @ matrix, rhs, damping=damping
    )
    exact = torch.linalg.solve(matrix + damping * torch.eye(p).double(), rhs.T).T
    torch.testing.assert_close(found.x, exact, rtol=1e-7, atol=1e-9)
    assert bool(found.converged.all())
    true = (found.x @ matrix + damping * found.x - rhs).norm(dim=1) / rhs.norm(dim=1)
    assert true.max() < 1e-9


def test_right_hand_sides_help_each_other():
    p = 200
    matrix, rhs = definite(p), vectors(20, p)
    solver = BlockConjugateGradients(tolerance=1e-8, max_steps=500)
    together = solver.solve(lambda v: v @ matrix, rhs)
    alone = solver.solve(lambda v: v @ matrix, rhs[:1])
    assert together.num_steps < alone.num_steps / 4


def test_dependent_zero_and_finished_rows():
    p = 30
    matrix = definite(p)
    rhs = vectors(6, p)
    rhs[1] = rhs[0]
    rhs[2] = 0
    rhs[3] = rhs[4] + rhs[5]
    rhs[4] = torch.linalg.eigh(matrix)[1][:, 0] * 1e-8  # solved by a single step
    found = BlockConjugateGradients(tolerance=1e-10, max_steps=100).solve(lambda v: v @ matrix, rhs)
    torch.testing.assert_close(found.x, torch.linalg.solve(matrix, rhs.T).T, rtol=1e-6, atol=1e-9)
    assert found.x[2].norm() == 0
    nothing = BlockConjugateGradients().solve(lambda v: v @ matrix, torch.zeros(3, p))
    assert nothing.num_steps == 0 and bool(nothing.converged.all())


def test_nothing_breaks_past_convergence():
    """A peer's recurrence divides zero by zero once it has converged."""
    matrix = definite(5)
    for max_steps in (5, 20, 100):
        found = BlockConjugateGradients(tolerance=0.0, max_steps=max_steps).solve(
            lambda v: v @ matrix, vectors(1, 5)
        )
        exact = torch.linalg.solve(matrix, vectors(1, 5).T).T
        torch.testing.assert_close(found.x, exact, rtol=1e-9, atol=1e-12)


def test_single_precision():
    matrix, rhs = definite(50, 100).float(), vectors(5, 50).float()
    found = BlockConjugateGradients(tolerance=1e-5).solve(lambda v: v @ matrix, rhs)
    assert found.x.dtype == torch.float32 and bool(found.converged.all())
    exact = torch.linalg.solve(matrix.double(), rhs.double().T).T
    torch.testing.assert_close(found.x.double(), exact, rtol=1e-3, atol=1e-4)


def test_an_end_before_convergence_is_told():
    matrix, rhs = definite(100, 1e6), vectors(2, 100)
    found = BlockConjugateGradients(tolerance=1e-10, max_steps=3).solve(lambda v: v @ matrix, rhs)
    assert found.num_steps == 3 and not found.converged.any()
    true = (found.x @ matrix - rhs).norm(dim=1) / rhs.norm(dim=1)
    torch.testing.assert_close(found.residuals, true)


def test_negative_curvature_is_an_error():
    matrix = definite(10) - 5 * torch.eye(10).double()
    with pytest.raises(RuntimeError, match="positive definite with its damping, got one of curv"):
        BlockConjugateGradients().solve(lambda v: v @ matrix, vectors(3, 10))
    found = BlockConjugateGradients().solve(lambda v: v @ matrix, vectors(3, 10), damping=5.0)
    assert bool(found.converged.all())


def test_lissa_converges_to_the_solution_itself():
    """A peer forgets to divide by the scale."""
    matrix, rhs = definite(20, 10), vectors(3, 20)
    found = LiSSA(scale=11.0, num_steps=300).solve(lambda v: v @ matrix, rhs, damping=1.0)
    exact = torch.linalg.solve(matrix + torch.eye(20).double(), rhs.T).T
    torch.testing.assert_close(found.x, exact, rtol=1e-6, atol=1e-9)
    assert bool(found.converged.all())
    short = LiSSA(scale=11.0, num_steps=3).solve(lambda v: v @ matrix, rhs, damping=1.0)
    assert not short.converged.any()
    with pytest.raises(RuntimeError, match="`scale` must be large enough, got 3, with which"):
        LiSSA(scale=3.0, num_steps=300).solve(lambda v: v @ matrix, rhs, damping=1.0)


def test_a_function_is_a_solver():
    rhs = vectors(3, 4)
    found = as_solver(lambda v: v / 2).solve(lambda v: 2 * v, rhs)
    torch.testing.assert_close(found.x, rhs / 2)
    assert found.num_steps == 0 and bool(found.converged.all())


@pytest.mark.parametrize("solver", ["cg", "projected", None, LiSSA, ConjugateGradients()], ids=str)
def test_what_is_no_solver_is_told_what_to_pass(solver):
    remedy = r"Pass BlockConjugateGradients\(\), EKFAC\(\) or LiSSA\(scale\) of ksm_ext"
    with pytest.raises(TypeError, match=f"`solver` must be a solver or a function.*{remedy}"):
        as_solver(solver)


def test_bad_input():
    with pytest.raises(ValueError, match=r"`rhs` must be 2-dimensional \(s, p\)"):
        BlockConjugateGradients().solve(lambda v: v, torch.ones(3))
    with pytest.raises(ValueError, match="`rhs` must be finite"):
        BlockConjugateGradients().solve(lambda v: v, torch.full((1, 3), torch.inf))
    with pytest.raises(ValueError, match="`damping` must be non-negative, got -1"):
        BlockConjugateGradients().solve(lambda v: v, torch.ones(1, 3), damping=-1.0)
    with pytest.raises(ValueError, match="`damping` must be finite, got nan"):
        check_system(torch.ones(1, 3), float("nan"))
    with pytest.raises(TypeError, match="`rhs` must be float32 or float64"):
        BlockConjugateGradients().solve(lambda v: v, torch.ones(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="`scale` must be positive"):
        LiSSA(scale=0.0)
    with pytest.raises(ValueError, match="`num_steps` must be at least 1"):
        LiSSA(scale=1.0, num_steps=0)
    with pytest.raises(ValueError, match="`max_steps` must be at least 1"):
        BlockConjugateGradients(max_steps=0)
    with pytest.raises(ValueError, match="`tolerance` must be finite, got nan"):
        BlockConjugateGradients(tolerance=float("nan"))


def test_linear_algebra_is_not_rounded_by_autocast():
    rows, others = torch.randn(3, 50), torch.randn(2, 50)
    with torch.autocast("cpu", torch.bfloat16):
        assert (rows @ others.T).dtype == torch.bfloat16
        found = inner_products(rows, others)
        with without_autocast():
            assert torch.equal(rows @ others.T, found)
        assert (rows @ others.T).dtype == torch.bfloat16
    assert torch.equal(found, rows @ others.T)
