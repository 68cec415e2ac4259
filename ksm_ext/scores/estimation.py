r"""Scores of subsets from one trained model, without retraining on any.

Near the parameters :math:`W_0` that were trained on all tasks, in a random subspace P of k
dimensions, the output of sample i is :math:`h_i(W_0 + P z) \approx h_i + \phi_i \cdot z` with
:math:`\phi_i = P^\top \nabla h_i`. Training on a subset S is then a small convex problem,

.. math:: z_S = \arg\min_z \frac{1}{|S|} \sum_{i \in S} \ell(h_i + \phi_i \cdot z)
          + \frac{\rho}{2} \lVert z \rVert^2,

solved for all subsets at once: for the logistic loss :math:`\ell(h) = \log(1 + e^{-h})`, which
is cross-entropy for any number of classes if h is the log-odds of the right answer, by Newton-CG
(:mod:`ksm_ext.scores.logistic`); for the squared loss :math:`\ell(h) = h^2 / 2` of residuals h,
by conjugate gradients. A network that has not come to the minimum of its loss would be
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

Where samples have weights :math:`c_i`, means over S are
:math:`\sum_{i \in S} c_i (\dots) / \sum_{i \in S} c_i`: a weight of 2 is the sample taken twice.
With the size of an advantage as weight, and an output that has its sign, this is the weighted
regression of policy gradients.

Shapes: n tasks of b samples together, features (b, k), masks (m, n), scores (m, t).
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.utils.data import ConcatDataset

from ksm_ext.arrays import ArrayKind, ArrayLike, aligned, as_tensor, checked_names, names_along
from ksm_ext.atomic_write import checked_path
from ksm_ext.checks import (
    check_choice,
    check_finite,
    check_positive,
    check_several,
    counted,
    listed,
    message,
    shape_text,
)
from ksm_ext.network.batches import task_datasets
from ksm_ext.network.distributed import Group, gathered, shard, task_gram
from ksm_ext.network.engines import check_engine
from ksm_ext.network.features import Features
from ksm_ext.network.gradients import (
    AnyProjector,
    check_networks,
    check_output,
    check_projector,
    collect_features,
    parameter_names,
    projection_text,
    usual_projector,
)
from ksm_ext.network.outputs import Output, log_odds
from ksm_ext.network.solvers import without_autocast
from ksm_ext.scores.logistic import fit_logistic, task_sums, unit_steps
from ksm_ext.subsets import as_masks

RIDGES = tuple(10.0 ** (step / 2) for step in range(-8, 3))
"""The penalties that :meth:`GradientEstimator.calibrate` tries: 1e-4 to 10."""

_BLOCK_BYTES = 2**27  # of outputs (subsets, samples) at once


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a few retrained subsets taught.

    Attributes:
        ridge: The chosen penalty.
        correction: ``"none"``, ``"shift"``, ``"factor"`` or ``"affine"``.
        slope: (t,) and ``intercept`` (t,): scores are ``intercept + slope * estimate``.
        intercept: See ``slope``.
        held: Names of the targets whose slope is 0 because the best one is negative: there, the
            retrained scores fall where the estimates rise, and every subset has one score.
        errors: For every ridge and correction tried, the mean squared relative error of scores of
            subsets that were left out of the correction, see :meth:`GradientEstimator.calibrate`.
    """

    ridge: float
    correction: str
    slope: Tensor
    intercept: Tensor
    held: tuple[str, ...]
    errors: dict[tuple[float, str], float]

    def __str__(self) -> str:
        """One line: what was chosen, its error, and where a slope was held at 0."""
        error = self.errors[self.ridge, self.correction]
        text = f"ridge {self.ridge:.3g}, correction {self.correction}, "
        text += f"mean squared relative error {100 * error:.3g} % left out"
        if self.held:
            text += f"; slope held at 0 for {listed(self.held)}: a negative one would reverse ranks"
        return text

    __repr__ = __str__


class GradientEstimator:
    """Estimates the scores of any subset of tasks from models trained on all of them.

    Attributes:
        num_tasks: n.
        task_names: n names, "0", "1", … where none were given.
        target_names: t names.
        ridge: The penalty ρ in use; None before :meth:`fit` where it is to choose it.
        projector: The projection in use, or None.
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
        sample_weights: Any = None,
        loss: Literal["logistic", "squared"] = "logistic",
        ridge: float | None = None,
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
            sample_weights: How much each sample of the tasks counts in training, not negative: n
                numbers, n arrays (b_i,), or one array of all samples in the order of tasks; by name
                too. Their unit does not matter. None: all count alike. A weight has no sign: where
                an advantage has one, ``output`` multiplies the log-odds by it. Losses of targets
                are plain means.
            loss: ``"logistic"`` of the output (cross-entropy of log-odds), or ``"squared"``.
            ridge: ρ > 0, the penalty of moving away from the models. None: a hundredth of the
                largest eigenvalue of the full set's curvature, as far as ten steps of the power
                method tell; the mean over models.
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
            ValueError: If there is no model, task or target, a value is out of its range,
                ``sample_weights`` do not fit the tasks, are negative or all 0, or ``task_names``
                are not n different ones.
        """
        self._models = check_networks("models", models)
        self._task_data, named = task_datasets(tasks, targets)
        check_choice("loss", loss, ("logistic", "squared"))
        check_choice("solver", solver, ("exact", "step"))
        check_engine(engine)
        check_output(output)
        check_projector(projector)
        self.ridge = None if ridge is None else _check_ridge("ridge", ridge)
        self.num_tasks = len(tasks)
        self.target_names = tuple(named)
        if task_names is None:
            task_names = [*map(str, tasks if isinstance(tasks, Mapping) else range(len(tasks)))]
        self.task_names = checked_names("task_names", task_names, self.num_tasks)
        self.calibration: Calibration | None = None
        self._target_data = [*named.values()]
        self._output, self._loss, self._solver = output, loss, solver
        self._store = None if store is None else checked_path("store", store)
        self._batch_size, self._engine, self._progress = batch_size, engine, progress
        self._group = group
        self._names = parameter_names(self._models[0], parameters)
        chosen = usual_projector(self._models[0], self._names) if projector is None else projector
        self.projector = chosen
        self._features: list[tuple[Features, Features]] = []  # of tasks and targets, by model
        self._task_offsets = _offsets(self._task_data)
        self._target_offsets = _offsets(self._target_data)
        self._sample_weights = (
            None
            if sample_weights is None
            else _checked_weights(sample_weights, self.task_names, [*map(len, self._task_data)])
        )

    def fit(self) -> "GradientEstimator":
        """Collect outputs and projected gradients of all samples, once for each model.

        Returns:
            This estimator.

        Raises:
            ValueError: If an output or a gradient is not finite, or the store holds features of
                something else.
            OSError: If the store cannot be written to; what was done is kept.
        """
        self._features = []
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
        if self.ridge is None:
            usual = [self._usual_ridge(of_tasks) for of_tasks, _ in self._features]
            self.ridge = sum(usual) / len(usual)
        return self

    @property
    def settings(self) -> str:
        """How estimates are made, in a line: what was given, chosen and calibrated."""
        ridge = "to be chosen" if self.ridge is None else f"{self.ridge:.3g}"
        text = f"{projection_text(self.projector)}, solver {self._solver}, "
        text += "samples weighed, " * (self._sample_weights is not None)
        text += "ridge " * (self.calibration is None)
        return text + (ridge if self.calibration is None else f"calibrated: {self.calibration}")

    def __str__(self) -> str:
        """One line: sizes and settings."""
        counts = (
            counted(len(self.target_names), "target"),
            counted(self.num_tasks, "task"),
            counted(len(self._models), "network"),
        )
        return "Estimates of {} by subsets of {} from {}: {}".format(*counts, self.settings)

    __repr__ = __str__

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
        self, masks: ArrayLike, true_scores: ArrayLike, *, ridges: Sequence[float] | float = RIDGES
    ) -> "GradientEstimator":
        """Choose the penalty, and an affine correction of scores, from a few retrained subsets.

        Each ridge is tried with no correction, a shift, a factor, or both; what has the least mean
        squared relative error on subsets left out of its correction, one at a time, is kept. For a
        target with a score that is 0 or below a tenth of their root mean square, such as a success
        rate, errors are relative to that.

        Factors are not negative, so that the order of estimates is never reversed; where the best
        one would be, it is 0, and ``calibration.held`` says so. Estimates are of losses: pass 1 - a
        success rate, or minus a reward.

        Args:
            masks: (m, n) bool. Four subsets or more; a dozen is better.
            true_scores: (m,) or (m, t). Their scores by retraining, best averaged over seeds. Rows
                with labels are put in the order of ``masks``, columns in that of ``target_names``.
            ridges: Penalties to try, or the one to take.

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
        largest = true.abs().amax(0).clamp_min(1e-300)  # in units of it, squares can be held
        size = largest * (true / largest).square().mean(0).sqrt()  # 0 where all scores are
        near = true.abs().amin(0) <= size / 10
        unit = torch.where(near, size.where(size > 0, 1.0), true.abs())
        best = None
        errors = {}
        one = [ridges] if isinstance(ridges, (int, float)) else ridges
        for ridge in check_several("ridges", one, "penalties"):
            ridge = _check_ridge("ridges", ridge)
            estimate = self._estimate(tensor, ridge)
            for name, correct in _CORRECTIONS.items():
                left_out = [
                    correct(*_without(row, estimate, true)).of(estimate[row])
                    for row in range(len(true))
                ]
                relative = (torch.stack(left_out) - true) / unit
                error = errors[ridge, name] = float(relative.square().mean())
                if best is None or error < best[0]:
                    best = error, ridge, name, correct(estimate, true)
        if best is None:
            raise ValueError(message("ridges", "one penalty or more", "none", "Pass some."))
        _, self.ridge, name, (intercept, slope, negative) = best
        pairs = zip(self.target_names, negative.tolist(), strict=True)
        held = tuple(target for target, reversed_ in pairs if reversed_)
        self.calibration = Calibration(self.ridge, name, slope, intercept, held, errors)
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

    @without_autocast()
    def _estimate(self, masks: Tensor, ridge: float | None) -> Tensor:
        """Uncorrected scores (m, t), averaged over models; each rank takes some subsets."""
        rows = shard(len(masks), self._group)
        own = masks[rows.start : rows.stop]
        assert ridge is not None  # fit has seen to it
        total = torch.zeros(len(own), len(self.target_names), dtype=torch.float64)
        for number in range(len(self._models)):
            total += self._linearised(number, self._solve(number, own, ridge))
        return gathered(total / len(self._models), len(masks), self._group)

    def _solve(self, number: int, masks: Tensor, ridge: float) -> Tensor:
        """z_S of every subset, (m, k)."""
        features = self._features[number][0]
        options: dict[str, Any] = {
            "sample_weights": self._sample_weights,
            "progress": self._progress,
        }
        if self._solver == "exact" and self._loss == "logistic":
            data = features.gradients, features.values, self._task_offsets
            return fit_logistic(*data, masks, ridge, **options).weights
        slopes = self._slopes(number)  # (n, k)
        totals = task_sums(self._weights(), self._task_offsets).to(slopes.device)
        inside = masks.to(slopes) * (totals > 0)
        filled = inside.any(1)  # neither empty nor without weight
        inside = inside[filled]
        right = -(inside @ slopes) / (inside @ totals)[:, None]
        if self._solver == "step":
            right += slopes.sum(0) / totals.sum()
        z = features.gradients.new_zeros(len(masks), slopes.shape[1])
        z[filled] = unit_steps(
            features.gradients,
            self._task_offsets,
            inside.bool(),
            right.to(features.gradients),
            ridge,
            **options,
        )
        return z

    def _weights(self) -> Tensor:
        """(b,) float64, of the tasks' samples."""
        if self._sample_weights is not None:
            return self._sample_weights
        return torch.ones(int(self._task_offsets[-1]), dtype=torch.float64)

    def _slopes(self, number: int) -> Tensor:
        """Sums over the samples of each task, weighed, of ℓ'(h) φ: (n, k) float64."""
        features = self._features[number][0]
        gradients, values = features.gradients.double(), features.values.double()
        slopes = -(-values).sigmoid() if self._loss == "logistic" else values
        slopes = (self._weights().to(slopes.device) * slopes)[:, None]
        return task_gram(gradients, self._task_offsets, slopes, self._group)[..., 0]

    @without_autocast()
    def _usual_ridge(self, features: Features) -> float:
        """A share of the largest curvature of the loss, for the step too.

        A network that has memorised its tasks wants little penalty. Curvatures of samples count as
        1/1000 at least, or a saturated network would have no penalty at all.
        """
        phi, right = features.gradients, features.values.sigmoid()
        curvature = right * (1 - right) if self._loss == "logistic" else torch.ones_like(right)
        weights = self._weights().to(phi)
        curvature = curvature.clamp_min(1e-3) * weights / weights.sum()
        v = phi[torch.linalg.vector_norm(phi, dim=1).argmax()]
        for _ in range(10):
            v = (curvature * (phi @ v) / v.norm().clamp_min(1e-30)) @ phi
        return float(v.norm()) / 100 or 1.0  # without gradients, nothing moves anyway

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


def _check_ridge(name: str, ridge: object) -> float:
    remedy = "The problem has no minimum without a penalty, and nothing moves with an infinite one."
    return check_positive(name, ridge, remedy)


def _checked_weights(
    sample_weights: Any, task_names: Sequence[str], sizes: Sequence[int]
) -> Tensor:
    """(b,) float64, the largest 1: of n numbers, n arrays (b_i,) or all samples, or by name."""
    name = "sample_weights"
    if isinstance(sample_weights, Mapping):
        checked_names(name, list(sample_weights), len(sample_weights))
        given = {str(task): weights for task, weights in sample_weights.items()}
        if given.keys() != set(task_names):
            odd = min(given.keys() ^ set(task_names))
            found = f"{'an unknown' if odd in given else 'no'} {odd!r}"
            remedy = "Give weights to each task by its name."
            raise ValueError(message(name, "by the names of tasks", found, remedy))
        sample_weights = [given[task] for task in task_names]
    if isinstance(sample_weights, (list, tuple)) and len(sample_weights) == len(sizes):
        parts = [as_tensor(name, part) for part in sample_weights]
    else:
        if len(names_along(sample_weights, 0) or ()) == len(sizes):
            tables = {name: (sample_weights, "task")}
            (sample_weights,) = aligned(tables, {"task": task_names})
        whole = torch.atleast_1d(as_tensor(name, sample_weights))
        parts = [*(whole.split([*sizes]) if whole.shape == (sum(sizes),) else whole)]
    if len(parts) != len(sizes) or any(
        part.shape not in ((), (size,)) for part, size in zip(parts, sizes, strict=True)
    ):
        expected = f"{len(sizes)} numbers or arrays, of as many as the tasks have samples"
        shapes = listed([shape_text(part) for part in parts], 3)
        remedy = "Give one weight to each task, or to each of its samples."
        found = f"{len(parts)} of {shapes}" if parts else "none"
        raise ValueError(message(name, expected, found, remedy))
    pairs = zip(parts, sizes, strict=True)
    weights = torch.cat([part.cpu().double().expand(size) for part, size in pairs])
    check_finite(name, weights, "Give samples that are not to count a weight of 0.")
    if not bool((weights >= 0).all() & (weights > 0).any()):
        expected = "non-negative and not all 0"
        remedy = "Put the sign of an advantage into `output`, and its size here."
        raise ValueError(message(name, expected, f"a least of {float(weights.min())}", remedy))
    return weights / weights.max()


def _offsets(datasets: Sequence[Any]) -> Tensor:
    """(n + 1,) first sample of each data set, then their number."""
    return torch.tensor([0, *map(len, datasets)]).cumsum(0)


class _Correction(NamedTuple):
    """Of each target's estimates: all (t,)."""

    intercept: Tensor
    slope: Tensor
    negative: Tensor  # whether the best slope is, in place of which this has 0

    def of(self, estimate: Tensor) -> Tensor:
        return self.intercept + self.slope * estimate


_ROUNDING = 1e-12  # of squares: estimates that differ by less are of one subset, in float32


# Least squares of true scores (m, t) by estimates (m, t).
def _nothing(estimate: Tensor, true: Tensor) -> _Correction:
    return _Correction(
        torch.zeros_like(true[0]),
        torch.ones_like(true[0]),
        torch.zeros_like(true[0], dtype=torch.bool),
    )


def _shift(estimate: Tensor, true: Tensor) -> _Correction:
    return _nothing(estimate, true)._replace(intercept=(true - estimate).mean(0))


def _factor(estimate: Tensor, true: Tensor) -> _Correction:
    power, product = estimate.square().sum(0), (estimate * true).sum(0)
    slope = torch.where(power > 0, product / power, 1.0).clamp_min(0)
    return _Correction(torch.zeros_like(slope), slope, product < 0)


def _affine(estimate: Tensor, true: Tensor) -> _Correction:
    centred = estimate - estimate.mean(0)
    power, product = centred.square().sum(0), (centred * true).sum(0)
    varies = power > _ROUNDING * estimate.square().sum(0)
    slope = torch.where(varies, product / power, 0.0).clamp_min(0)
    return _Correction(true.mean(0) - slope * estimate.mean(0), slope, (product < 0) & varies)


_CORRECTIONS = {"none": _nothing, "shift": _shift, "factor": _factor, "affine": _affine}


def _without(row: int, *tensors: Tensor) -> list[Tensor]:
    return [torch.cat([tensor[:row], tensor[row + 1 :]]) for tensor in tensors]
