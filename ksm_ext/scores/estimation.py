r"""Scores of subsets from one trained model, without retraining on any.

Near the parameters :math:`W_0` that were trained on all tasks, in a random subspace P of k
dimensions, the output of sample i is :math:`h_i(W_0 + P z) \approx h_i + \phi_i \cdot z` with
:math:`\phi_i = P^\top \nabla h_i`. Training on a subset S is then a small convex problem,

.. math:: z_S = \arg\min_z \frac{1}{|S|} \sum_{i \in S} \ell(h_i + \phi_i \cdot z)
          + \frac{\rho}{2} \lVert z \rVert^2,

solved for all subsets at once: for the logistic loss :math:`\ell(h) = \log(1 + e^{-h})`, which
is cross-entropy for any number of classes if h is the log-odds of the right answer, by Newton-CG
(:mod:`ksm_ext.scores.logistic`); for the squared loss :math:`\ell(h) = h^2 / 2` of residuals h,
from Gram matrices of the tasks. A network that has not come to the minimum of its loss would be
moved there even for the full set, which retraining does not do; ``solver="step"`` starts from the
full set instead, and gives every sample the curvature 1 as TRAK does,

.. math:: z_S = -\Big(\frac{1}{|S|} \sum_{i \in S} \phi_i \phi_i^\top + \rho\Big)^{-1}
          (\bar g_S - \bar g), \qquad
          \bar g_S = \frac{1}{|S|} \sum_{i \in S} \ell'(h_i) \, \phi_i .

The score is read off the outputs of a target's samples at :math:`z_S`. Estimates are averaged over
models (checkpoints or seeds), and a few really retrained subsets choose ρ and correct the scale
(:meth:`GradientEstimator.calibrate`).

*Zhang, Duan & Zhang 2026, arXiv:2602.03783*; the linearisation after *Park et al. 2023,
arXiv:2303.14186*.

Shapes: n tasks of b samples together, features (b, k), masks (m, n), scores (m, t).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from ksm_ext.arrays import ArrayKind, ArrayLike, aligned, as_tensor, checked_names, names_along
from ksm_ext.checks import brief, check_choice, check_finite, check_real, message, shape_text
from ksm_ext.network.batches import task_datasets
from ksm_ext.network.distributed import Group, gathered, shard, task_gram
from ksm_ext.network.engines import check_engine
from ksm_ext.network.features import Features
from ksm_ext.network.gradients import (
    AnyProjector,
    collect_features,
    parameter_names,
    usual_projector,
)
from ksm_ext.network.outputs import Output, log_odds
from ksm_ext.scores.logistic import fit_logistic
from ksm_ext.subsets import as_masks

RIDGES = tuple(10.0 ** (step / 2) for step in range(-8, 3))
"""The penalties that :meth:`GradientEstimator.calibrate` tries: 1e-4 to 10."""

_BLOCK_BYTES = 2**27  # of outputs (subsets, samples) at once


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a few retrained subsets taught.

    Attributes:
        ridge: The chosen penalty.
        slope: (t,) and ``intercept`` (t,): scores are ``intercept + slope * estimate``.
        intercept: See ``slope``.
        errors: For every ridge and correction tried, the mean squared relative error of scores of
            subsets that were left out of the correction, see :meth:`GradientEstimator.calibrate`.
    """

    ridge: float
    slope: Tensor
    intercept: Tensor
    errors: dict[tuple[float, str], float]

    __repr__ = brief


class GradientEstimator:
    """Estimates the scores of any subset of tasks from models trained on all of them.

    Attributes:
        num_tasks: n.
        task_names: n names, "0", "1", … where none were given.
        target_names: t names.
        ridge: The penalty ρ in use.
        calibration: What :meth:`calibrate` chose, or None.
    """

    def __init__(
        self,
        models: nn.Module | Sequence[nn.Module],
        tasks: Sequence[Any] | Mapping[str, Any],
        targets: Mapping[str, Any] | Any,
        *,
        output: Output = log_odds,
        projector: AnyProjector | None = None,
        parameters: str | Sequence[str] | None = None,
        loss: Literal["logistic", "squared"] = "logistic",
        ridge: float = 1e-2,
        solver: Literal["exact", "step"] = "exact",
        store: str | os.PathLike[str] | None = None,
        batch_size: int | None = None,
        engine: str = "auto",
        progress: bool = False,
        group: Group = None,
        task_names: Sequence[str] | None = None,
    ) -> None:
        """Say what to estimate; :meth:`fit` does the work.

        Args:
            models: The network trained on all tasks, or several (seeds, checkpoints) whose
                estimates are averaged.
            tasks: n data sets, in a sequence or by name: tensors (b_i, ...), in a tuple or by name,
                a Dataset, or a DataLoader that does not shuffle.
            targets: Data sets by name whose mean loss is a score, or one data set.
            output: The function ``output(model, batch) -> (b,)`` to linearise, see
                :mod:`ksm_ext.network.outputs`: ``log_odds`` for classifiers and language models;
                for the squared loss, a residual.
            projector: The projection to k dimensions. None: a signed block permutation to 1024,
                or no projection where there are fewer parameters.
            parameters: Names or patterns of the parameters that training moves; None: all.
            loss: ``"logistic"`` of the output (cross-entropy of log-odds), or ``"squared"``.
            ridge: ρ > 0, the penalty of moving away from the models.
            solver: ``"exact"`` solves the convex problem of every subset, which is right for models
                that are nearly linear. ``"step"`` takes one step of unit curvature from the full
                set, whose score it keeps: better for deep networks, above all where they have
                memorised their tasks. Its sizes need :meth:`calibrate`.
            store: A folder for the features, from which a killed :meth:`fit` resumes.
            batch_size: Samples whose gradients are taken together, see ``collect_features``.
            engine: See ``collect_features``.
            progress: Whether to show progress bars.
            group: The processes that share the work, see ``network.distributed``: samples in
                :meth:`fit`, subsets afterwards. All of them make this estimator and call its
                methods alike; all get all scores.
            task_names: n names, by which the columns of masks that have names are ordered; None:
                those of ``tasks``, if they have some.

        Raises:
            ValueError: If there is no model, task or target, a value is out of its range, or
                ``task_names`` are not n different ones.
        """
        self._models = [models] if isinstance(models, nn.Module) else list(models)
        if not self._models:
            raise ValueError(message("models", "one network or more", "none", "Train one."))
        self._task_data, named = task_datasets(tasks, targets)
        check_choice("loss", loss, ("logistic", "squared"))
        check_choice("solver", solver, ("exact", "step"))
        check_engine(engine)
        self.ridge = _check_ridge(ridge)
        self.num_tasks = len(tasks)
        self.target_names = tuple(named)
        if task_names is None:
            task_names = [*map(str, tasks if isinstance(tasks, Mapping) else range(len(tasks)))]
        self.task_names = checked_names("task_names", task_names, self.num_tasks)
        self.calibration: Calibration | None = None
        self._target_data = [*named.values()]
        self._output, self._loss, self._solver = output, loss, solver
        self._store = None if store is None else Path(store)
        self._batch_size, self._engine, self._progress = batch_size, engine, progress
        self._group = group
        self._names = parameter_names(self._models[0], parameters)
        chosen = usual_projector(self._models[0], self._names) if projector is None else projector
        self.projector = chosen
        self._features: list[tuple[Features, Features]] = []  # of tasks and targets, by model
        self._sums: list[tuple[Tensor, Tensor]] = []  # over each task's samples, by model
        self._task_offsets = _offsets(self._task_data)
        self._target_offsets = _offsets(self._target_data)

    def fit(self) -> "GradientEstimator":
        """Collect outputs and projected gradients of all samples, once for each model.

        Returns:
            This estimator.

        Raises:
            ValueError: If an output or a gradient is not finite, or the store holds features of
                something else.
            OSError: If the store cannot be written to; what was done is kept.
        """
        self._features, self._sums = [], []
        for number, model in enumerate(self._models):
            store = None if self._store is None else self._store / f"model_{number}"
            of_tasks, of_targets = (
                collect_features(
                    model,
                    ConcatDataset(data),
                    self._output,
                    self.projector,
                    parameters=self._names,
                    store=None if store is None else store / name,
                    batch_size=self._batch_size,
                    engine=self._engine,
                    progress=self._progress,
                    group=self._group,
                )
                for name, data in (("tasks", self._task_data), ("targets", self._target_data))
            )
            self._features.append((of_tasks, of_targets))
        return self

    def predict(self, masks: ArrayLike) -> Any:
        """Estimated scores of subsets, as the kind of ``masks``.

        Args:
            masks: (m, n) bool. An empty subset leaves the models as they are. Columns with names
                are ordered by ``task_names``, where these were given.

        Returns:
            (m, t) float64, in the units of the loss; corrected if there is a calibration.

        Raises:
            ValueError: If ``masks`` has other columns.
            RuntimeError: If :meth:`fit` has not run.
        """
        (masks,) = aligned({"masks": (masks, "subset", "task")}, self._known())
        kind, tensor = ArrayKind.of(masks), self._checked_masks(masks)
        estimate = self._estimate(tensor, self.ridge)
        if self.calibration is not None:
            estimate = self.calibration.intercept + self.calibration.slope * estimate
        return kind.restore(
            estimate, {"subset": names_along(masks, 0), "target": self.target_names}
        )

    def calibrate(
        self, masks: ArrayLike, true_scores: ArrayLike, *, ridges: Sequence[float] = RIDGES
    ) -> "GradientEstimator":
        """Choose the penalty, and an affine correction of scores, from a few retrained subsets.

        Each ridge is tried with no correction, a shift, a factor, or both; what has the least mean
        squared relative error on subsets left out of its correction, one at a time, is kept. For a
        target with a score of 0, such as a success rate, errors are relative to the root mean
        square of its scores.

        Args:
            masks: (m, n) bool. Four subsets or more; a dozen is better.
            true_scores: (m,) or (m, t). Their scores by retraining, best averaged over seeds. Rows
                with labels are put in the order of ``masks``, columns in that of ``target_names``.
            ridges: Penalties to try.

        Returns:
            This estimator, calibrated.

        Raises:
            ValueError: If shapes or labels disagree, or a score is not finite.
            RuntimeError: If :meth:`fit` has not run.
        """
        tables = {
            "masks": (masks, "subset", "task"),
            "true_scores": (true_scores, "subset", "target"),
        }
        masks, true_scores = aligned(tables, self._known())
        tensor = self._checked_masks(masks)
        true = as_tensor("true_scores", true_scores).to("cpu", torch.float64)
        true = true[:, None] if true.ndim == 1 else true
        if true.shape != (len(tensor), len(self.target_names)):
            expected = f"of shape ({len(tensor)}, {len(self.target_names)})"
            remedy = "Pass a row for each subset and a column for each target."
            raise ValueError(message("true_scores", expected, shape_text(true), remedy))
        check_finite("true_scores", true)
        if len(tensor) < 4:
            remedy = "Retrain on more subsets."
            raise ValueError(message("masks", "four subsets or more", str(len(tensor)), remedy))
        size = true.square().mean(0).sqrt()  # of a target whose scores are all 0, none
        unit = torch.where((true != 0).all(0), true.abs(), size.where(size > 0, 1.0))
        best = None
        errors = {}
        for ridge in ridges:
            ridge = _check_ridge(ridge)
            estimate = self._estimate(tensor, ridge)
            for name, correct in _CORRECTIONS.items():
                left_out = [
                    _apply(correct(*_without(row, estimate, true)), estimate[row])
                    for row in range(len(true))
                ]
                relative = (torch.stack(left_out) - true) / unit
                error = errors[ridge, name] = float(relative.square().mean())
                if best is None or error < best[0]:
                    best = error, ridge, correct(estimate, true)
        if best is None:
            raise ValueError(message("ridges", "one penalty or more", "none", "Pass some."))
        _, self.ridge, (intercept, slope) = best
        self.calibration = Calibration(self.ridge, slope, intercept, errors)
        return self

    def _known(self) -> Mapping[str, Sequence[str]]:
        """What the columns of masks and of scores are called, if given."""
        named = self.target_names != ("target",)  # the name of a single data set
        return {"task": self.task_names} | ({"target": self.target_names} if named else {})

    def _checked_masks(self, masks: ArrayLike) -> Tensor:
        if not self._features:
            remedy = "Call .fit() first."
            raise RuntimeError(message("estimator", "fitted", "one without features", remedy))
        tensor = as_masks("masks", masks)
        if tensor.shape[1] != self.num_tasks:
            expected = f"of {self.num_tasks} columns like the tasks"
            remedy = "Pass one column per task."
            raise ValueError(message("masks", expected, shape_text(tensor), remedy))
        return tensor.cpu()

    def _estimate(self, masks: Tensor, ridge: float) -> Tensor:
        """Uncorrected scores (m, t), averaged over models; each rank takes some subsets."""
        rows = shard(len(masks), self._group)
        own = masks[rows.start : rows.stop]
        total = torch.zeros(len(own), len(self.target_names), dtype=torch.float64)
        for number in range(len(self._models)):
            total += self._linearised(number, self._solve(number, own, ridge))
        return gathered(total / len(self._models), len(masks), self._group)

    def _solve(self, number: int, masks: Tensor, ridge: float) -> Tensor:
        """z_S of every subset, (m, k)."""
        features = self._features[number][0]
        if self._solver == "exact" and self._loss == "logistic":
            data = features.gradients, features.values, self._task_offsets
            return fit_logistic(*data, masks, ridge, progress=self._progress).weights
        while len(self._sums) <= number:
            self._sums.append(self._sums_of(self._features[len(self._sums)][0]))
        grams, slopes = self._sums[number]
        sizes = self._task_offsets.diff().double().to(grams.device)
        origin = slopes.sum(0) / sizes.sum() if self._solver == "step" else 0.0
        z = slopes.new_zeros(len(masks), slopes.shape[1])
        for row, mask in enumerate(tqdm(masks, unit=" subsets", disable=not self._progress)):
            if not bool(mask.any()):
                continue
            share = mask.to(sizes) / sizes[mask.to(sizes.device)].sum()
            hessian = torch.einsum("a,akl->kl", share, grams)
            hessian.diagonal().add_(ridge)
            step = (share @ slopes - origin)[:, None]
            z[row] = -torch.cholesky_solve(step, torch.linalg.cholesky(hessian))[:, 0]
        return z.to(features.gradients)

    def _sums_of(self, features: Features) -> tuple[Tensor, Tensor]:
        """Over the samples of each task: φ φᵀ (n, k, k) and ℓ'(h) φ (n, k), in float64."""
        gradients, values = features.gradients.double(), features.values.double()[:, None]
        slopes = -(-values).sigmoid() if self._loss == "logistic" else values
        offsets, group = self._task_offsets, self._group
        return (
            task_gram(gradients, offsets, group=group),
            task_gram(gradients, offsets, slopes, group)[..., 0],
        )

    def _linearised(self, number: int, z: Tensor) -> Tensor:
        """Scores (m, t) of outputs ``h + φ z``."""
        features = self._features[number][1]
        means = torch.empty(len(z), len(self.target_names), dtype=torch.float64)
        rows = max(1, _BLOCK_BYTES // (features.values.element_size() * len(features)))
        for block in torch.arange(len(z)).split(rows):
            outputs = features.values + z[block.to(z.device)] @ features.gradients.T
            losses = softplus(-outputs) if self._loss == "logistic" else outputs.square() / 2
            parts = losses.split(self._target_offsets.diff().tolist(), dim=1)
            means[block] = torch.stack([part.double().mean(1) for part in parts], dim=1).cpu()
        return means


def _check_ridge(ridge: object) -> float:
    remedy = "The problem has no minimum without a penalty."
    number = check_real("ridge", ridge, "a positive number", remedy)
    if not number > 0:
        raise ValueError(message("ridge", "positive", str(number), remedy))
    return number


def _offsets(datasets: Sequence[Any]) -> Tensor:
    """(n + 1,) first sample of each data set, then their number."""
    return torch.tensor([0, *map(len, datasets)]).cumsum(0)


# Corrections of estimates (m, t) by true scores (m, t): intercepts (t,) and slopes (t,).
def _nothing(estimate: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(true[0]), torch.ones_like(true[0])


def _shift(estimate: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    return (true - estimate).mean(0), torch.ones_like(true[0])


def _factor(estimate: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    power = estimate.square().sum(0)
    slope = torch.where(power > 0, (estimate * true).sum(0) / power, 1.0)
    return torch.zeros_like(slope), slope


def _affine(estimate: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    centred = estimate - estimate.mean(0)
    power = centred.square().sum(0)
    slope = torch.where(power > 0, (centred * true).sum(0) / power, 0.0)
    return true.mean(0) - slope * estimate.mean(0), slope


_CORRECTIONS = {"none": _nothing, "shift": _shift, "factor": _factor, "affine": _affine}


def _without(row: int, *tensors: Tensor) -> list[Tensor]:
    return [torch.cat([tensor[:row], tensor[row + 1 :]]) for tensor in tensors]


def _apply(correction: tuple[Tensor, Tensor], estimate: Tensor) -> Tensor:
    intercept, slope = correction
    return intercept + slope * estimate
