import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ksm_ext import fit_surrogate
from ksm_ext.attribution import influence, task_hessian
from ksm_ext.network.hessian import Hessian
from ksm_ext.network.solvers import BlockConjugateGradients
from ksm_ext.subsets import bernoulli

RIDGE = 0.05
TO_THE_END = BlockConjugateGradients(tolerance=1e-12, max_steps=200)


class Convex:
    """Logistic regression in four tasks, minimised by Newton's method to rounding."""

    def __init__(self, num_tasks=4):
        torch.manual_seed(0)
        x = torch.randn(20 * num_tasks, 3).double()
        y = (x @ torch.randn(3, 3).double() + torch.randn(len(x), 3).double()).argmax(1)
        self.x, self.y = x, y
        self.tasks = [(x[i : i + 20], y[i : i + 20]) for i in range(0, len(x), 20)]
        draw = lambda n: (torch.randn(n, 3).double(), torch.randint(3, (n,)))  # noqa: E731
        self.targets = {"one": draw(9), "two": draw(5)}
        self.model = nn.Linear(3, 3).double()

    def logits(self, w, x):
        return x @ w[:9].view(3, 3).T + w[9:]

    def minimise(self, s):
        """The weights W(s)."""
        weight = s.repeat_interleave(20)

        def objective(w):
            losses = cross_entropy(self.logits(w, self.x), self.y, reduction="none")
            return (weight * losses).sum() / len(self.y) + RIDGE / 2 * w.square().sum()

        w = torch.zeros(12).double()
        for _ in range(9):
            slope = torch.func.grad(objective)(w)
            w = w - torch.linalg.solve(torch.func.hessian(objective)(w), slope)
        assert float(torch.func.grad(objective)(w).norm()) < 1e-13
        return w

    def score(self, s):
        """F(s) of each target, (t,)."""
        w = self.minimise(s)
        return torch.stack([cross_entropy(self.logits(w, x), y) for x, y in self.targets.values()])

    def trained(self):
        torch.nn.utils.vector_to_parameters(
            self.minimise(torch.ones(len(self.tasks)).double()), self.model.parameters()
        )
        return self.model


@pytest.mark.parametrize(
    "num_targets",
    [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(6, marks=pytest.mark.slow)],
)
def test_derivatives_are_differences_of_really_minimised_problems(num_targets):
    problem = Convex()
    names = itertools.cycle(problem.targets.values())
    problem.targets = {str(j): next(names) for j in range(num_targets)}
    found = task_hessian(
        problem.trained(), problem.tasks, problem.targets, damping=RIDGE, solver=TO_THE_END
    )
    one, step = torch.ones(4).double(), 1e-3
    eye = torch.eye(4).double() * step
    gradient = torch.stack(
        [(problem.score(one + e) - problem.score(one - e)) / (2 * step) for e in eye]
    )
    torch.testing.assert_close(found.gradient, gradient, rtol=1e-4, atol=1e-9)
    second = torch.zeros(num_targets, 4, 4).double()
    for a, c in itertools.product(range(4), repeat=2):
        corners = [
            problem.score(one + p * eye[a] + q * eye[c]) * p * q
            for p, q in itertools.product((1, -1), repeat=2)
        ]
        second[:, a, c] = sum(corners) / (4 * step**2)
    scale = float(second.abs().max())
    torch.testing.assert_close(found.hessian, second, rtol=1e-4, atol=1e-5 * scale)


def test_the_gradient_is_the_influence_function():
    problem = Convex()
    model = problem.trained()
    found = task_hessian(model, problem.tasks, problem.targets, damping=RIDGE, solver=TO_THE_END)
    first = influence(
        model, problem.tasks, problem.targets, curvature=Hessian, damping=RIDGE, solver=TO_THE_END
    )
    torch.testing.assert_close(found.gradient, first.values)


def test_without_interactions_the_diagonal_is_the_same():
    problem = Convex()
    options = {"damping": RIDGE, "solver": TO_THE_END}
    model = problem.trained()
    whole = task_hessian(model, problem.tasks, problem.targets, **options)
    alone = task_hessian(model, problem.tasks, problem.targets, interactions=False, **options)
    own, expected = (found.hessian.diagonal(dim1=1, dim2=2) for found in (alone, whole))
    torch.testing.assert_close(own, expected)
    torch.testing.assert_close(alone.gradient, whole.gradient)
    assert int(alone.hessian.isnan().sum()) == 2 * 4 * 3


def test_second_order_is_nearer_to_leaving_a_task_out():
    problem = Convex()
    model = problem.trained()
    found = task_hessian(model, problem.tasks, problem.targets, damping=RIDGE, solver=TO_THE_END)
    one = torch.ones(4).double()
    truth = torch.stack(
        [problem.score(one) - problem.score(one - e) for e in torch.eye(4).double()]
    )
    first = found.gradient
    second = first - found.hessian.diagonal(dim1=1, dim2=2).T / 2
    assert float((second - truth).norm()) < 0.5 * float((first - truth).norm())


def quadratic(n=6, seed=0):
    """A score F(s) = F(1) + g (s - 1) + (s - 1) H (s - 1) / 2."""
    random = torch.Generator().manual_seed(seed)
    g = torch.randn(n, dtype=torch.float64, generator=random)
    root = torch.randn(n, n, dtype=torch.float64, generator=random)
    return g, root + root.T


def law(g, h, q):
    """Proposition 3.1: the weights that least squares finds on subsets of Bernoulli(q)."""
    return g + (q - 1) * h.sum(1) + (1 - 2 * q) / 2 * h.diagonal()


@pytest.mark.parametrize("q", [0.2, 0.5, 0.9])
def test_the_law_of_linear_surrogates_is_exact_for_quadratic_scores(q):
    g, h = quadratic()
    subsets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6))).double()
    share = (q**subsets * (1 - q) ** (1 - subsets)).prod(1)
    move = subsets - 1
    scores = move @ g + (move @ h * move).sum(1) / 2
    design = torch.cat([subsets, torch.ones(64, 1).double()], dim=1)
    root = share.sqrt()[:, None]
    fitted = torch.linalg.lstsq(root * design, root * scores[:, None]).solution[:6, 0]
    torch.testing.assert_close(fitted, law(g, h, q))


def test_the_law_holds_for_the_fitted_surrogate_on_many_subsets():
    n, q = 20, 0.7
    g, h = quadratic(n)
    h = h / 5
    masks = bernoulli(n, 1500, q, seed=0)
    move = masks.double() - 1
    scores = move @ g + (move @ h * move).sum(1) / 2
    fitted = fit_surrogate(masks, scores, kernel="linear", ridge=1e-6).attribute("loo")
    expected = law(g, h, q)
    assert float((fitted - expected).norm() / expected.norm()) < 0.1
    assert float((fitted - g).norm() / expected.norm()) > 0.3


@pytest.mark.slow
def test_the_law_holds_for_really_minimised_problems():
    """With the task Hessian of this library, up to third order in what is left out."""
    problem = Convex(num_tasks=6)
    found = task_hessian(
        problem.trained(), problem.tasks, problem.targets, damping=RIDGE, solver=TO_THE_END
    )
    errors = []
    subsets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6))).double()
    scores = torch.stack([problem.score(s)[0] for s in subsets])
    for q in (0.98, 0.9):
        root = (q**subsets * (1 - q) ** (1 - subsets)).prod(1).sqrt()[:, None]
        design = torch.cat([subsets, torch.ones(64, 1).double()], dim=1)
        fitted = torch.linalg.lstsq(root * design, root * scores[:, None]).solution[:6, 0]
        expected = law(found.gradient[:, 0], found.hessian[0], q)
        first = found.gradient[:, 0]
        errors.append(float((fitted - expected).norm() / fitted.norm()))
        assert errors[-1] < float((fitted - first).norm() / fitted.norm())
    assert errors[0] < 0.15


def test_a_small_transformer_is_symmetric_and_finite():
    from experiments.modular_arithmetic.model import Transformer

    torch.manual_seed(0)
    model = Transformer(6, 4, width=8, num_layers=1, num_heads=2, activation="gelu").double()
    draw = lambda n: (torch.randint(6, (n, 4)), torch.randint(6, (n,)))  # noqa: E731
    found = task_hessian(model, [draw(3), draw(4)], draw(5), damping=5.0, solver=TO_THE_END)
    assert found.hessian.shape == (1, 2, 2) and bool(found.hessian.isfinite().all())
    assert float(found.residuals.max()) < 1e-10


def test_bad_input():
    problem = Convex()
    with pytest.raises(ValueError, match="`damping` must be positive"):
        task_hessian(problem.model, problem.tasks, problem.targets, damping=0.0)
    with pytest.raises(ValueError, match="`tasks` must be one data set or more"):
        task_hessian(problem.model, [], problem.targets, damping=1.0)
    with pytest.raises(TypeError, match="`solver` must be a solver or a function, got 'cg'"):
        task_hessian(problem.model, problem.tasks, problem.targets, damping=1.0, solver="cg")
