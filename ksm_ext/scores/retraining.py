r"""Scores by really training on each subset: the ground truth, and how far it can be trusted.

A run trains on one subset with one seed. With the scores :math:`F_s(S_i)` of the runs with seeds s
that finished, :math:`s_i` of them on subset i,

.. math::
    \bar F(S_i) = \tfrac1{s_i} \sum_s F_s(S_i), \qquad
    \mathrm{noise\_std}^2 = \sum_i \sum_s (F_s(S_i) - \bar F(S_i))^2 \Big/ \sum_i (s_i - 1), \qquad
    \mathrm{ceiling} = \operatorname{mean}_{s < s'} \mathrm{Spearman}_i(F_s(S_i), F_{s'}(S_i)) .

Shapes: masks (m, n), scores of one run (t,), of all runs (num_seeds, m, t).
"""

import os
import random
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations, islice, takewhile
from multiprocessing import parent_process
from time import perf_counter, sleep
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.arrays import ArrayKind, ArrayLike, as_tensor, names_along
from ksm_ext.checks import (
    check_choice,
    check_finite,
    check_positive_int,
    counted,
    message,
    shape_text,
)
from ksm_ext.correlation import spearman
from ksm_ext.evaluation import pooled_runs
from ksm_ext.identity import identify
from ksm_ext.scores.runs import RunStore
from ksm_ext.subsets import as_masks

Train = Callable[[Tensor, int], Any]
"""From a mask (n,) bool and a seed to scores: one number, or (t,) of any kind."""


@dataclass(frozen=True)
class SkippedRun:
    """A run that failed and was left out.

    Attributes:
        row: Its subset, a row of the masks that were asked for.
        seed: Its seed.
        traceback: What ``train`` raised.
    """

    row: int
    seed: int
    traceback: str


@dataclass(frozen=True, eq=False, repr=False)
class RetrainedScores:
    """Scores of subsets in repeated runs, which :func:`retrain_scores` makes.

    Answers are of the kind of the masks. With ``on_error="skip"``, m is the number of subsets with
    a finished run.

    Attributes:
        seeds: The seeds, in the order of ``values``.
        kind: The kind of the masks.
        subset_names: m names, as the masks have them; ``None`` for numbers.
        task_names: n names, or ``None``.
        target_names: t names.
        skipped: Runs that failed, none without ``on_error="skip"``.
        notes: What is to be known of these scores beside: what their ``train`` depends on and could
            have changed without the store noticing, or runs of another ``train`` that were kept.
    """

    _masks: Tensor  # (m, n)
    _scores: Tensor  # (num_seeds, m, t), NaN where a run is missing
    _finished: Tensor  # (num_seeds, m)
    seeds: tuple[int, ...]
    kind: ArrayKind
    subset_names: Sequence[Any] | None
    task_names: Sequence[Any] | None
    target_names: tuple[str, ...]
    skipped: tuple[SkippedRun, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        m, n = self._masks.shape
        text = f"{counted(int(self._finished.sum()), 'run')} of {counted(m, 'subset')}"
        text += f" of {counted(n, 'task')}"
        more = [f"{len(self.skipped)} skipped"] if self.skipped else []
        return f"RetrainedScores({'; '.join([text, *more, *self.notes])})"

    @property
    def masks(self) -> Any:
        """(m, n) bool: the subsets, as they were asked for."""
        return self._restored(self._masks, "subset", "task")

    @property
    def values(self) -> Any:
        """(num_seeds, m, t) float64: F(S_i) in the run with each seed, in its own units.

        Raises:
            ValueError: If a run was skipped.
        """
        if not bool(self._finished.all()):
            found = f"{int((~self._finished).sum())} skipped ones"
            remedy = "Use `mean` and `counts`, or call again to train them."
            raise ValueError(message("values", "scores of every run", found, remedy))
        return self._restored(self._scores, "seed", "subset", "target")

    @property
    def counts(self) -> Any:
        """(m,) int64: the finished runs of each subset."""
        return self._restored(self._finished.sum(0), "subset")

    @property
    def mean(self) -> Any:
        """(m, t) float64: the mean over the finished runs of each subset."""
        return self._restored(self._mean(), "subset", "target")

    @property
    def distinct(self) -> "RetrainedScores":
        """The same with each subset once, where it first stands."""
        first: dict[str, int] = {}
        for row, subset in enumerate(_spelled(self._masks)):
            first.setdefault(subset, row)
        rows = list(first.values())
        names = self.subset_names
        return replace(
            self,
            _masks=self._masks[rows],
            _scores=self._scores[:, rows],
            _finished=self._finished[:, rows],
            subset_names=None if names is None else [names[row] for row in rows],
        )

    @property
    def noise_df(self) -> int:
        """Degrees of freedom of ``noise_std``: finished runs less subsets, each subset once."""
        finished = self.distinct._finished
        return int(finished.sum()) - finished.shape[1]

    @property
    def noise_std(self) -> Any:
        """(t,) float64, in units of the scores: the standard deviation of one run by its seed.

        Pooled over subsets. The mean over s runs has ``noise_std / sqrt(s)``.

        Raises:
            ValueError: If there is one seed only, or a score is not finite.
        """
        self._check_repeated()
        if not self.noise_df:
            remedy = "Train the skipped runs, or with more seeds."
            raise ValueError(message("seeds", "two finished runs of a subset", "one each", remedy))
        distinct = self.distinct
        runs = distinct._scores.flatten(0, 1)  # (seeds * subsets, t)
        subset = torch.arange(distinct._scores.shape[1]).repeat(len(distinct._scores))
        finished = distinct._finished.flatten()[:, None].expand_as(runs)
        return self._restored(pooled_runs(runs, subset.to(runs.device), finished)[2], "target")

    @property
    def ceiling(self) -> Any:
        r"""(t,) float64 in [-1, 1]: the Spearman correlation of one run with another.

        Over subsets, and averaged over pairs of seeds; a target that is constant in some run counts
        as 0 there. Where it is r, a perfect predictor of the expected score reaches about
        :math:`\sqrt r` against one run: the ceiling of :func:`ksm_ext.evaluation.lds`.

        Raises:
            ValueError: If there is one seed or one subset only, or a score is not finite.
        """
        self._check_repeated()
        runs = self._scores
        pairs = [
            spearman(runs[a, both], runs[b, both])
            for a, b in combinations(range(len(self.seeds)), 2)
            if int((both := self._finished[a] & self._finished[b]).sum()) > 1
        ]
        if not pairs:
            remedy = "Train on more subsets."
            raise ValueError(message("masks", "two subsets or more", "1", remedy))
        return self._restored(torch.stack(pairs).mean(0), "target")

    def runs(self) -> tuple[Any, Any]:
        """Masks (M, n) and scores (M, t) of every finished run, those of a subset together.

        What :func:`ksm_ext.fit_surrogate` makes of them has the noise of a run measured.
        """
        distinct = self.distinct
        subset, seed = distinct._finished.T.nonzero(as_tuple=True)
        masks, scores = distinct._masks[subset], distinct._scores[seed, subset]
        return (
            self.kind.restore(masks, {"subset": None, "task": self.task_names}),
            self.kind.restore(scores, {"subset": None, "target": self.target_names}),
        )

    def _restored(self, tensor: Tensor, *axes: str) -> Any:
        names = {
            "seed": self.seeds,
            "subset": self.subset_names,
            "task": self.task_names,
            "target": self.target_names,
        }
        return self.kind.restore(tensor, {axis: names[axis] for axis in axes})

    def _mean(self) -> Tensor:
        total = self._scores.where(self._finished[..., None], 0.0).sum(0)
        return total / self._finished.sum(0)[:, None]

    def _check_repeated(self) -> None:
        if len(self.seeds) < 2:
            remedy = "Noise is what differs between runs: train with more seeds."
            raise ValueError(message("seeds", "two or more", str(len(self.seeds)), remedy))
        check_finite("values", self._scores[self._finished])


class RetrainingError(RuntimeError, ValueError):
    """A run that failed, or gave what are no scores.

    Attributes:
        completed: The :class:`RetrainedScores` of all runs that finished, or ``None`` without any.
        traceback: All that is known of what ``train`` raised, where it ran; else empty.
    """

    completed: RetrainedScores | None = None
    traceback: str = ""


def retrain_scores(
    train: Train,
    masks: ArrayLike,
    *,
    seeds: Sequence[int] = (0,),
    n_jobs: int | None = None,
    store: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    non_finite: Literal["error", "keep"] = "error",
    on_error: Literal["raise", "skip"] = "raise",
    on_change: Literal["raise", "keep"] = "raise",
    progress: bool = False,
    target_names: Sequence[str] | None = None,
) -> RetrainedScores:
    """Train on every subset with every seed, in parallel, and keep what is finished.

    Runs go through joblib: to local processes, or wherever ``joblib.parallel_config`` sends them,
    such as ``backend="dask"`` or ``"ray"`` (docs/scale.md). ``train`` travels with every run,
    pickled by value where it has no importable name: let it load its data itself, once per process
    (``functools.cache``). PyTorch is held to one thread in each run, so that a score depends on
    subset and seed alone, not on ``n_jobs``; for other libraries set ``OMP_NUM_THREADS=1``.

    Identical rows of ``masks`` are trained once for each seed and share the scores.

    With a ``store``, each run is on the disk before the next is awaited. After any end (a kill, a
    power cut, an error) the same call trains only what is missing. The store may hold more subsets
    and seeds than asked for. It belongs to one ``train``, which it knows by its code and all that
    this refers to, see :mod:`ksm_ext.identity`; ``on_change`` is for a ``train`` that has been
    mended, or that changes what it refers to when it is called, such as a counter.

    When a run fails, those in flight are finished and kept, then the error is raised; what finished
    is in its ``completed``. Workers end with this process, however it ends (not on Windows, where a
    killed process leaves them idle for up to five minutes).

    The random state of Python, NumPy and PyTorch in this process is afterwards what it was before.
    A DataLoader with workers of its own needs ``multiprocessing_context="fork"`` inside a worker.

    Args:
        train: A function of a mask, (n,) bool on the CPU, and a seed. It returns one score, or t of
            them as a sequence, array or tensor; all its randomness should come from the seed.
        masks: (m, n) bool, or numbers that are 0 or 1. Row i selects the tasks of subset i.
        seeds: Distinct whole numbers; the first seed is trained on all subsets before the next.
        n_jobs: Processes at a time, -1 for one per core; ``None`` leaves it to
            ``joblib.parallel_config``, and is 1, in this process, if that says nothing.
        store: Path of an SQLite file, new or of an earlier call. One process at a time has it open.
        settings: What the scores depend on beside subset and seed (JSON). A store of other settings
            is refused.
        non_finite: Scores that are NaN or infinite are kept in the store like any other and not
            trained again. ``"error"`` raises when all runs are done; ``"keep"`` returns them.
        on_error: ``"raise"``, or ``"skip"`` to skip runs in which ``train`` raises: they
            are in ``skipped`` of the result and not in its ``counts``, and the next call tries them
            again. A worker that dies ends the call in either case.
        on_change: ``"raise"`` refuses a store whose runs are of another ``train``; ``"keep"`` takes
            them over, if you know that they are the same, as after a failure has been mended.
        progress: Whether to show a progress bar.
        target_names: t names; by default "0", "1", ….

    Returns:
        The :class:`RetrainedScores`, answering in the kind of ``masks`` and on its device.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If arguments do not fit, or the store holds runs of other tasks, targets,
            settings or of another ``train``.
        RetrainingError: If ``train`` raises (its traceback is the cause), a worker dies, runs give
            different numbers of scores, or scores are not finite. It is a RuntimeError and a
            ValueError, names the runs, and has all finished ones.
        OSError: If the store cannot be written, or another process has it open.

    Example:
        >>> train = lambda mask, seed: float(mask.sum()) + 0.1 * seed
        >>> retrain_scores(train, [[1, 1, 0], [0, 1, 0]], seeds=(0, 1)).mean
        array([[2.05],
               [1.05]])
    """
    check_choice("non_finite", non_finite, ("error", "keep"))
    check_choice("on_error", on_error, ("raise", "skip"))
    check_choice("on_change", on_change, ("raise", "keep"))
    table = as_masks("masks", masks)
    if 0 in table.shape:
        remedy = "There is nothing to train on."
        raise ValueError(message("masks", "at least one row and column", shape_text(table), remedy))
    seeds = _check_seeds(seeds)
    _check_train_and_jobs(train, n_jobs)
    identity = None if store is None else identify(train=train)
    num_targets = None if target_names is None else len(target_names)
    call = _Call(masks, _spelled(table), seeds, target_names, store)
    keep = on_change == "keep"
    with (
        RunStore(store, table.shape[1], num_targets, settings, identity, keep) as kept,
        _same_random_state(),
    ):
        call.scores |= kept.load(call.subsets, seeds)
        call.note(identity, kept.changed)
        _train_missing(call, kept, train, n_jobs, on_error == "skip", progress)
    if non_finite == "error":
        call.check_finite()
    completed = call.completed()
    if completed is None:
        raise call.failure(call.failed[0], kept.num_targets)
    return completed


# -- one run, where it is trained ---------------------------------------------------------------


class _Run(NamedTuple):
    """A run that ended: its scores (t,), or the traceback of what ``train`` raised."""

    subset: str
    seed: int
    scores: np.ndarray
    seconds: float
    error: str = ""
    summary: str = ""


def _run(train: Train, subset: str, seed: int, caller: int) -> _Run:
    """Train once, in a worker of the process ``caller`` or in itself."""
    _end_with(caller)
    mask = torch.tensor([bit == "1" for bit in subset])
    start = perf_counter()
    try:
        with one_thread():
            scores = _as_scores(train(mask, seed))
    except (Exception, SystemExit) as error:  # to be told to the caller: other runs go on
        summary = f"{type(error).__qualname__}: {error}".splitlines()[0]
        told = (traceback.format_exc(), summary)
        return _Run(subset, seed, np.empty(0), perf_counter() - start, *told)
    return _Run(subset, seed, scores, perf_counter() - start)


def _as_scores(result: Any) -> np.ndarray:
    expected, remedy = "a function to scores", "Return a number, or a vector of t numbers."
    if result is None:  # a forgotten return; NumPy would read it as NaN
        raise TypeError(message("train", expected, "None", remedy))
    scores = as_tensor("train", result)
    if scores.ndim > 1 or not scores.numel():
        raise ValueError(message("train", expected, shape_text(scores), remedy))
    return scores.double().cpu().reshape(-1).numpy()


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order, whatever the number of cores and of runs beside this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _end_with(caller: int) -> None:
    """End this process when its parent is gone, if that is ``caller``.

    A local worker whose parent was killed would train on, holding its GPU memory, then wait for
    minutes. Workers of a cluster have other parents, and stay.
    """
    parent = parent_process()
    if parent is not None and parent.pid == caller:
        threading.Thread(target=_watch, args=(caller,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        sleep(0.5)
    os._exit(1)


# -- all runs, where they are called for --------------------------------------------------------


@dataclass
class _Call:
    """What is asked for, and what came of it."""

    masks: ArrayLike
    subsets: list[str]
    seeds: tuple[int, ...]
    target_names: Sequence[str] | None
    store: Any
    scores: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    failed: list[_Run] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> list[tuple[str, int]]:
        """All that are asked for: the first seed on all subsets, then the next."""
        return [(subset, seed) for seed in self.seeds for subset in dict.fromkeys(self.subsets)]

    def note(self, identity: Mapping[str, Any] | None, changed: Sequence[str]) -> None:
        """Keep in mind what the store cannot verify."""
        unknown = ", ".join(identity["unidentified"]) if identity else ""
        notes = [f"a change would not be noticed in: {unknown}"] if unknown else []
        if changed:
            notes.append(f"some runs are of another `train`, which differs in {', '.join(changed)}")
        self.notes = tuple(notes)

    def completed(self) -> RetrainedScores | None:
        """The result without what is missing; None if that is everything."""
        if not self.scores:
            return None
        num_targets = len(next(iter(self.scores.values())))
        table = np.full((len(self.seeds), len(self.subsets), num_targets), np.nan)
        finished = np.zeros(table.shape[:2], bool)
        for place in np.ndindex(*finished.shape):
            scores = self.scores.get((self.subsets[place[1]], self.seeds[place[0]]))
            if scores is not None:
                table[place], finished[place] = scores, True
        rows = np.flatnonzero(finished.any(axis=0)).tolist()
        names = names_along(self.masks, 0)
        return RetrainedScores(
            _masks=as_masks("masks", self.masks).cpu()[rows],
            _scores=torch.from_numpy(table[:, rows]),
            _finished=torch.from_numpy(finished[:, rows]),
            seeds=self.seeds,
            kind=ArrayKind.of(self.masks),
            subset_names=None if names is None else [names[row] for row in rows],
            task_names=names_along(self.masks, 1),
            target_names=tuple(self.target_names or map(str, range(num_targets))),
            skipped=tuple(
                SkippedRun(self.subsets.index(run.subset), run.seed, run.error)
                for run in self.failed
            ),
            notes=self.notes,
        )

    def check_finite(self) -> None:
        """Raise for scores that are not finite, with the names of their runs."""
        bad = [run for run in self.runs if not np.isfinite(self.scores.get(run, 0.0)).all()]
        if bad:
            listed = "; ".join(_spell(self.subsets, *run) for run in bad[:4]) + "; …" * (
                len(bad) > 4
            )
            found = f"NaN or infinite ones in {len(bad)} runs: {listed}"
            remedy = "Leave these subsets out, or pass non_finite='keep' to see all scores."
            raise self.error(message("train", "a function to finite scores", found, remedy))

    def failure(self, run: _Run, num_targets: int | None) -> "RetrainingError":
        """What to raise for a run that gave no scores, or another number of them."""
        where = f"for {_spell(self.subsets, run.subset, run.seed)}"
        remedy = f"Correct it and call again{self.kept()}"
        if not run.error:
            expected = f"a function to {num_targets} scores like `target_names` or earlier runs"
            return self.error(message("train", expected, f"{len(run.scores)} {where}", remedy))
        if "_MultiProcessingDataLoaderIter(self)" in run.error:
            remedy = (
                "If a DataLoader cannot start its workers inside of joblib's, give it "
                "multiprocessing_context='fork' or num_workers=0, or call with n_jobs=1"
            ) + self.kept()
        found = f"{run.summary} {where}"
        text = message("train", "a function that returns scores", found, remedy)
        error = self.error(text, run.error)
        error.__cause__ = _WorkerTraceback(run.error)
        return error

    def death(self, begun: Sequence[tuple[str, int]], cause: Exception) -> "RetrainingError":
        """What to raise where a worker is gone, with the runs that it may have been at."""
        done = {*self.scores, *((run.subset, run.seed) for run in self.failed)}
        in_flight = [_spell(self.subsets, *run) for run in begun if run not in done]
        found = f"a worker process that died, in one of: {'; '.join(in_flight)}"
        remedy = "Where memory ran out, give it less, or pass a smaller n_jobs; then call again"
        text = message("train", "a function that returns scores", found, remedy + self.kept())
        return self.error(text, str(cause))

    def kept(self) -> str:
        """How what is finished can be had."""
        if self.store is None:
            kept = ", with a `store` to keep finished runs."
            return kept + f" This error's `completed` has {len(self.scores)} of them." * bool(
                self.scores
            )
        kept = f": finished runs are kept in {self.store}."
        return f"{kept} Pass on_change='keep' with a `train` that has been changed for it."

    def error(self, text: str, told: str = "") -> "RetrainingError":
        """An error with all that has been done."""
        error = RetrainingError(text)
        error.completed, error.traceback = self.completed(), told
        return error


def _train_missing(
    call: _Call, kept: RunStore, train: Train, n_jobs: int | None, skip: bool, progress: bool
) -> None:
    """Train what is missing, and keep it as it ends."""
    missing = [run for run in call.runs if run not in call.scores]
    stopped: list[_Run] = []
    begun: list[tuple[str, int]] = []
    bar = tqdm(
        desc="training",
        unit=" runs",
        initial=len(call.scores),
        total=len(call.runs),
        disable=not (progress and missing),
    )
    try:
        with bar, _training(train, missing, n_jobs, stopped, begun) as finished:
            for run in finished:
                if run.error or kept.num_targets not in (None, len(run.scores)):
                    (call.failed if run.error and skip else stopped).append(run)
                    continue
                kept.add(run.subset, run.seed, run.scores, run.seconds)
                call.scores[run.subset, run.seed] = run.scores
                bar.update()
    except BrokenExecutor as error:
        raise call.death(begun, error) from error
    if stopped:
        raise call.failure(stopped[0], kept.num_targets)


@contextmanager
def _training(
    train: Train,
    runs: Iterable[tuple[str, int]],
    n_jobs: int | None,
    stopped: Sequence[_Run],
    begun: list[tuple[str, int]],
) -> Iterator[Iterator[_Run]]:
    """The runs as they end; none is begun after one has ``stopped``; none outlives the block."""
    import joblib

    def calls() -> Iterator[Any]:
        for run in takewhile(lambda _: not stopped, runs):
            begun.append(run)
            yield joblib.delayed(_run)(train, *run, os.getpid())

    backend, _ = joblib.parallel.get_active_backend()
    finished: Generator[_Run, None, None]
    if backend.supports_return_generator:
        parallel = joblib.Parallel(
            n_jobs=n_jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs"
        )
        finished = parallel(calls())
    else:
        finished = _in_rounds(calls(), n_jobs)
    try:
        yield finished
    except Exception as error:  # known by its name, since nothing pickled is read here
        if type(error).__name__ != "PicklingError":
            raise
        cause = str(error.__cause__ or error).strip('"\n ').splitlines()[-1]
        remedy = "Make what cannot be sent inside of it (locks, open files), or pass n_jobs=1."
        found = f"one that holds what cannot: {cause}"
        raise TypeError(
            message("train", "a function that can be sent to processes", found, remedy)
        ) from error
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error tells more than joblib's count of runs
            finished.close()


@contextmanager
def _same_random_state() -> Iterator[None]:
    """Leave the caller's random numbers as they were, whatever a run in this process draws."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


def _in_rounds(calls: Iterator[Any], n_jobs: int | None) -> Generator[_Run, None, None]:
    """The runs as rounds of ``n_jobs`` end: for backends that only return when all is done."""
    import joblib

    with joblib.Parallel(n_jobs=n_jobs, batch_size=1) as parallel:
        while calls_of_round := list(islice(calls, joblib.effective_n_jobs(n_jobs))):
            yield from parallel(calls_of_round)


def _check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(seeds, Iterable):
        remedy = "Pass a list such as [0, 1, 2]."
        raise TypeError(message("seeds", "a sequence", type(seeds).__name__, remedy))
    checked = tuple(check_positive_int("seeds", seed, minimum=0) for seed in seeds)
    if not checked or len(set(checked)) < len(checked) or max(checked) >= 2**63:
        remedy = "Give each run of a subset its own."
        raise ValueError(message("seeds", "distinct and below 2**63", f"{checked}", remedy))
    return checked


def _check_train_and_jobs(train: object, n_jobs: int | None) -> None:
    if not callable(train):
        remedy = "Pass a function of (mask, seed) that returns scores."
        raise TypeError(message("train", "a function", type(train).__name__, remedy))
    if n_jobs == 0:
        remedy = "Pass -1 for one process per core."
        raise ValueError(message("n_jobs", "a number of processes", "0", remedy))


def _spell(subsets: Sequence[str], subset: str, seed: int) -> str:
    """Such as ``subset 3 (tasks 0, 2) with seed 1``."""
    tasks = [str(task) for task, bit in enumerate(subset) if bit == "1"]
    listed = ", ".join(tasks if len(tasks) <= 8 else [*tasks[:8], "…"])
    return f"subset {subsets.index(subset)} (tasks {listed or 'none'}) with seed {seed}"


def _spelled(masks: Tensor) -> list[str]:
    """Rows (m, n) as text, such as "0110"."""
    return ["".join("1" if bit else "0" for bit in row) for row in masks.tolist()]


class _WorkerTraceback(Exception):
    """What ``train`` raised, as text, since not every exception can be pickled."""
