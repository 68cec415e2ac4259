r"""First and second derivatives of a target's loss by the weights of the tasks, without retraining.

Give task a the weight :math:`s_a` in training,

.. math:: W(s) = \arg\min_W \sum_a s_a L_a(W) + \frac{\rho}{2} \lVert W \rVert^2, \qquad
          F(s) = f(W(s)), \qquad L_a = \frac1b \sum_{i \in a} \ell_i .

At s = 1, with :math:`A = \sum_a \nabla^2 L_a + \rho I`, the minimum moves with
:math:`W_a = -A^{-1} \nabla L_a`; with the adjoint :math:`\lambda = -A^{-1} \nabla f`,

.. math:: \frac{\partial F}{\partial s_a} = \nabla f \cdot W_a, \qquad
    \frac{\partial^2 F}{\partial s_a \partial s_c} = W_a^\top (\nabla^2 f) W_c
    + \lambda^\top (\nabla^2 L_a) W_c + \lambda^\top (\nabla^2 L_c) W_a
    + \nabla^3 L [\lambda, W_a, W_c].

The gradient is the influence function. To second order :math:`F(1) - F(1 - e_a)` is
:math:`F'_a - F''_{aa} / 2`, and two tasks interact by :math:`F''_{ac}`.

Shapes: n tasks of b samples together, t targets, gradient (n, t), Hessian (t, n, n).

Reference: *Zhang, Duan & Zhang 2026, arXiv:2602.03783* (Proposition 3.1).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from ksm_ext.checks import brief, check_positive
from ksm_ext.network.batches import task_datasets
from ksm_ext.network.hessian import Hessian, loss_gradients
from ksm_ext.network.outputs import Loss
from ksm_ext.network.solvers import BlockConjugateGradients, Solver, as_solver, inner_products

SOLVER = BlockConjugateGradients(tolerance=1e-6, max_steps=200)


@dataclass(frozen=True, eq=False)
class TaskHessian:
    """Derivatives of each target's mean loss by the tasks' weights, at 1.

    Attributes:
        gradient: (n, t).
        hessian: (t, n, n), symmetric; NaN off its diagonal where interactions were not asked for.
        residuals: (n + t,). Relative residuals of the linear systems.
    """

    gradient: Tensor
    hessian: Tensor
    residuals: Tensor

    __repr__ = brief


def task_hessian(
    model: nn.Module,
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Mapping[str, Any] | Any,
    loss: str | Loss = "cross_entropy",
    *,
    damping: float,
    interactions: bool = True,
    solver: Solver = SOLVER,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    vectors_per_pass: int | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> TaskHessian:
    """Differentiate training itself, twice.

    Exact at a minimum of the problem above. A network that was not trained to its end, or without
    that penalty, is treated as if it were at the minimum of its own quadratic model.

    Args:
        model: The network trained on all tasks.
        tasks: n data sets, in a sequence or by name: tensors (b_i, ...), in a tuple or by name, a
            Dataset, or a DataLoader that does not shuffle.
        targets: Data sets by name, or one.
        loss: ``"cross_entropy"``, ``"squared_error"``, or a function (outputs, labels) -> (b,);
            three times differentiable.
        damping: ρ > 0, the penalty of training. Where the Hessian is indefinite, above its most
            negative eigenvalue.
        interactions: Whether to compute mixed derivatives too, or those by one task alone, which
            leaving it out needs, from n third derivatives.
        solver: Solves with the Hessian and its damping, see :func:`ksm_ext.attribution.influence`.
        parameters: Names or patterns of the parameters that training moves; None: all.
        batch_size: Samples of a pass.
        vectors_per_pass: Vectors multiplied together.
        engine: How gradients are taken, see :func:`ksm_ext.attribution.tracin`.
        progress: Whether to show progress bars.

    Returns:
        The :class:`TaskHessian`. It takes ``n + t`` solutions, Hessian products of every task and
        target, and ``n min(t, (n + 1) / 2)`` third derivatives.

    Raises:
        ValueError: If there is no task or target, or the damping is not positive.
        TypeError: If ``solver`` is no solver.
        RuntimeError: If the damped Hessian is not positive definite.
    """
    datasets, named = task_datasets(tasks, targets)
    damping = check_positive("damping", damping, "Pass the penalty of training.")
    solve = as_solver(solver).solve
    common: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "engine": engine,
    }
    options = common | {"vectors_per_pass": vectors_per_pass}
    queries = [Hessian(model, data, loss, **options) for data in named.values()]
    whole = Hessian(model, ConcatDataset(datasets), loss, progress=progress, **options)
    b, n = whole.num_samples, len(datasets)
    of_tasks = loss_gradients(model, datasets, loss, **common) / b  # (n, p)
    of_targets = torch.stack([query.gradient() for query in queries])  # (t, p)
    rhs = -torch.cat([of_tasks, of_targets])
    solution = solve(whole, rhs, damping=damping, progress=progress)
    moves, adjoints = solution.x[:n], solution.x[n:]  # W_a (n, p), lambda (t, p)
    second = torch.stack([inner_products(query(moves), moves) for query in queries])  # (t, n, n)
    for a, data in enumerate(datasets):
        share = len(data) / b
        cross = share * inner_products(Hessian(model, data, loss, **options)(adjoints), moves)
        second[:, a] += cross
        second[:, :, a] += cross
    if interactions:
        second += _third(whole, moves, adjoints)
        second = (second + second.transpose(1, 2)) / 2  # rounding alone
    else:
        own = (
            second.diagonal(dim1=1, dim2=2) + inner_products(whole.third(moves, moves), adjoints).T
        )
        second = torch.full_like(second, math.nan)
        second.diagonal(dim1=1, dim2=2).copy_(own)
    return TaskHessian(inner_products(moves, of_targets), second, solution.residuals)


def _third(whole: Hessian, moves: Tensor, adjoints: Tensor) -> Tensor:
    """The term of third derivatives, (t, n, n), from fewer of them: of targets or of pairs."""
    t, n = len(adjoints), len(moves)
    if 2 * t <= n + 1:
        pairs = torch.cartesian_prod(torch.arange(t), torch.arange(n))
        third = whole.third(adjoints[pairs[:, 0]], moves[pairs[:, 1]])  # (t n, p)
        return inner_products(third, moves).reshape(t, n, n)
    rows, columns = torch.triu_indices(n, n)
    upper = moves.new_zeros(t, n, n)
    upper[:, rows, columns] = inner_products(whole.third(moves[rows], moves[columns]), adjoints).T
    return upper + upper.triu(1).transpose(1, 2)
