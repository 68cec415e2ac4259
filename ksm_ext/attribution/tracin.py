r"""TracIn and the cosine of gradients: whether a task's gradient points as a target's.

While gradient descent with learning rate η takes steps on the mean loss of b samples, task a alone
changes a target's loss F at each step by about

.. math:: -\frac{\eta}{b} \nabla F \cdot g_a, \qquad g_a = \sum_{i \in a} \nabla \ell_i,

which TracIn sums over checkpoints. Gradients are exact, all p numbers of them.

Shapes: n tasks of b samples together, t targets, attributions (n, t).

Reference: *Pruthi et al. 2020, arXiv:2002.08484*.
"""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ksm_ext.checks import check_real, check_several, message
from ksm_ext.network.batches import task_datasets
from ksm_ext.network.gradients import check_networks
from ksm_ext.network.hessian import loss_gradients
from ksm_ext.network.outputs import Loss
from ksm_ext.network.solvers import inner_products


def tracin(
    checkpoints: nn.Module | Sequence[nn.Module],
    learning_rates: float | Sequence[float],
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Mapping[str, Any] | Any,
    loss: str | Loss = "cross_entropy",
    *,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> Tensor:
    """What each task's own steps changed in each target's mean loss.

    Args:
        checkpoints: Networks along one training.
        learning_rates: One for each checkpoint, times the number of steps that it stands for.
        tasks: n data sets, in a sequence or by name: tensors (b_i, ...), in a tuple or by name, a
            Dataset, or a DataLoader that does not shuffle.
        targets: Data sets by name, or one.
        loss: ``"cross_entropy"``, ``"squared_error"``, or a function (outputs, labels) -> (b,).
        parameters: Names or patterns of the parameters that training moves; None: all.
        batch_size: Samples of a pass.
        engine: ``"auto"`` for one backward pass of all samples together; others take those of
            single samples, see :mod:`ksm_ext.network.engines`.
        progress: Whether to show bars over data sets.

    Returns:
        (n, t), in units of the loss: negative where a task helps.

    Raises:
        ValueError: If the numbers of checkpoints and learning rates differ, or there is none.
    """
    networks = check_networks("checkpoints", checkpoints)
    single = isinstance(learning_rates, Real) or getattr(learning_rates, "ndim", 1) == 0
    given = (
        [learning_rates] if single else check_several("learning_rates", learning_rates, "numbers")
    )
    rates = [check_real("learning_rates", rate) for rate in given]
    if len(rates) != len(networks):
        expected = f"of one number for each of {len(networks)} checkpoints"
        remedy = "Give the learning rate at each."
        raise ValueError(message("learning_rates", expected, str(len(rates)), remedy))
    datasets, named = task_datasets(tasks, targets)
    num_samples = sum(len(task) for task in datasets)
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "engine": engine,
        "progress": progress,
    }
    total = torch.zeros(())
    for network, rate in zip(networks, rates, strict=True):
        of_tasks, of_targets = _gradients(network, datasets, named, loss, **options)
        total = total.to(of_tasks) - rate / num_samples * inner_products(of_tasks, of_targets)
    return total


def gradient_cosine(
    model: nn.Module,
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Mapping[str, Any] | Any,
    loss: str | Loss = "cross_entropy",
    *,
    parameters: str | Sequence[str] | None = None,
    batch_size: int | None = None,
    engine: str = "auto",
    progress: bool = False,
) -> Tensor:
    """Minus the cosine of each task's and each target's gradient; arguments of :func:`tracin`.

    Returns:
        (n, t) in [-1, 1], without units: -1 where a task's own steps lower the target's loss
        as steeply as can be, 0 where one of the gradients vanishes.
    """
    options: dict[str, Any] = {
        "parameters": parameters,
        "batch_size": batch_size,
        "engine": engine,
        "progress": progress,
    }
    of_tasks, of_targets = _gradients(model, tasks, targets, loss, **options)
    lengths = of_tasks.norm(dim=1)[:, None] * of_targets.norm(dim=1)
    return torch.where(lengths > 0, -inner_products(of_tasks, of_targets) / lengths, 0.0)


def _gradients(
    model: nn.Module,
    tasks: Sequence[Any] | Mapping[str, Any],
    targets: Any,
    loss: str | Loss,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tasks' summed losses (n, p), and of the targets' mean losses (t, p)."""
    datasets, named = task_datasets(tasks, targets)
    of_targets = loss_gradients(model, list(named.values()), loss, **options)
    counts = torch.tensor([len(data) for data in named.values()]).to(of_targets)
    return loss_gradients(model, datasets, loss, **options), of_targets / counts[:, None]
