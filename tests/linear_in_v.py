"""Tests that operators share which multiply by a matrix."""

from functools import partial

import pytest
import torch
from operators import compiled_or_not


class LinearInV:
    """Tests of an operator that multiplies v (l, t) float64 by a matrix.

    ``problem``, a fixture of the module that uses them, is the operator as a function of v and the
    dense matrix (m, l).
    """

    def test_gradcheck(self, problem):
        function, gram = problem
        v = torch.randn(gram.shape[1], 2, dtype=torch.float64, requires_grad=True)
        torch.autograd.gradcheck(function, (v,), check_forward_ad=True, check_batched_grad=True)
        torch.autograd.gradgradcheck(function, (v,), check_fwd_over_rev=True)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_transforms_see_the_derivative(self, problem, compiled):
        function, gram = problem
        l = gram.shape[1]
        v, tangent = torch.randn(2, l, 2, dtype=torch.float64)

        def energy(u):
            return 0.5 * function(u).square().sum()

        run = partial(compiled_or_not, compiled)
        close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
        close(
            run(lambda u, du: torch.func.jvp(function, (u,), (du,))[1], v, tangent), gram @ tangent
        )
        close(run(torch.func.grad(energy), v), gram.T @ gram @ v)
        close(
            run(lambda u, du: torch.func.jvp(torch.func.grad(energy), (u,), (du,))[1], v, tangent),
            gram.T @ gram @ tangent,
        )
        batch = torch.randn(3, l, 2, dtype=torch.float64)
        close(run(torch.func.vmap(function), batch), gram @ batch)
        close(run(torch.func.vmap(torch.func.grad(energy)), batch), gram.T @ gram @ batch)

    def test_jvp_agrees_with_finite_differences(self, problem):
        function, gram = problem
        v, tangent = torch.randn(2, gram.shape[1], 2, dtype=torch.float64)
        step = 1e-3
        difference = (function(v + step * tangent) - function(v - step * tangent)) / (2 * step)
        _, derivative = torch.func.jvp(function, (v,), (tangent,))
        torch.testing.assert_close(derivative, difference, rtol=1e-8, atol=1e-9)
