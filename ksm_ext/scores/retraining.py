r"""Scores by really training on each subset: the ground truth, and how far it can be trusted.

A run trains on one subset with one seed. With the scores :math:`F_s(S_i)` of runs with seeds s,

.. math::
    \bar F(S_i) = \tfrac1s \sum_s F_s(S_i), \qquad
    \mathrm{noise\_std}^2 = \tfrac1m \sum_i \mathrm{Var}_s\, F_s(S_i), \qquad
    \mathrm{ceiling} = \operatorname{mean}_{s < s'} \mathrm{Spearman}_i(F_s(S_i), F_{s'}(S_i)) .

Shapes: masks (m, n), scores of one run (t,), of all runs (num_seeds, m, t).
"""

import os
import threading
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import combinations, islice, takewhile
from multiprocessing import parent_process
from time import perf_counter, sleep
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ksm_ext.arrays import ArrayLike, Kind, as_tensor, names_along
from ksm_ext.checks import (
    check_choice,
    check_finite,
    check_positive_int,
    message,
    shape_text,
)
from ksm_ext.correlation import spearman
from ksm_ext.scores.store import RunStore
from ksm_ext.subsets import as_masks

Train = Callable[[Tensor, int], Any]
"""From a mask (n,) bool and a seed to scores: one number, or (t,) of any kind."""


@dataclass(frozen=True, eq=False)
class RetrainedScores:
    """Scores of every subset in repeated runs; :func:`ksm_ext.fit_surrogate` takes their mean.

    Attributes:
        values: (num_seeds, m, t) float64. F(S_i) in the run with each seed, in its own units.
        seeds: The seeds, in the order of ``values``.
        kind: The kind of the masks, in which everything is answered.
        subset_names: m names, as the masks have them; ``None`` for numbers.
        target_names: t names.
    """

    values: Any
    seeds: tuple[int, ...]
    kind: Kind
    subset_names: Sequence[Any] | None
    target_names: tuple[str, ...]

    @property
    def mean(self) -> Any:
        """(m, t) float64: the mean over seeds."""
        return self.kind.restore(
            self._runs().mean(0), {"subset": self.subset_names, "target": self.target_names}
        )

    @property
    def noise_std(self) -> Any:
        """(t,) float64, in units of the scores: the standard deviation of one run by its seed.

        Pooled over subsets. The mean over seeds has ``noise_std / sqrt(num_seeds)``.

        Raises:
            ValueError: If there is one seed only, or a score is not finite.
        """
        variance = self._repeated_runs().var(0).mean(0)
        return self.kind.restore(variance.sqrt(), {"target": self.target_names})

    @property
    def ceiling(self) -> Any:
        r"""(t,) float64 in [-1, 1]: the Spearman correlation of one run with another.

        Over subsets, and averaged over pairs of seeds; a target that is constant in some run counts
        as 0 there. Where it is r, a perfect predictor of the expected score reaches about
        :math:`\sqrt r` against one run: the ceiling of :func:`ksm_ext.evaluation.lds`.

        Raises:
            ValueError: If there is one seed or one subset only, or a score is not finite.
        """
        runs = self._repeated_runs()
        if runs.shape[1] < 2:
            remedy = "Train on more subsets."
            raise ValueError(message("masks", "two subsets or more", "1", remedy))
        pairs = [spearman(a, b) for a, b in combinations(runs, 2)]
        return self.kind.restore(torch.stack(pairs).mean(0), {"target": self.target_names})

    def _runs(self) -> Tensor:
        return as_tensor("values", self.values)

    def _repeated_runs(self) -> Tensor:
        if len(self.seeds) < 2:
            remedy = "Noise is what differs between runs: train with more seeds."
            raise ValueError(message("seeds", "two or more", str(len(self.seeds)), remedy))
        check_finite("values", self._runs())
        return self._runs()


def retrain_scores(
    train: Train,
    masks: ArrayLike,
    *,
    seeds: Sequence[int] = (0,),
    n_jobs: int | None = None,
    store: str | os.PathLike[str] | None = None,
    settings: Mapping[str, Any] | None = None,
    non_finite: Literal["error", "keep"] = "error",
    progress: bool = True,
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
    and seeds than asked for. Without one, an error loses every result of the call.

    When a run fails, those in flight are finished and kept, then the error is raised. Workers end
    with this process, however it ends (not on Windows, where a killed process leaves them idle for
    up to five minutes).

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
        progress: Show a progress bar.
        target_names: t names; by default "0", "1", ….

    Returns:
        The :class:`RetrainedScores`, answering in the kind of ``masks`` and on its device.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If arguments do not fit, the store holds runs of other tasks, targets or
            settings, runs give different numbers of scores, or scores are not finite.
        RuntimeError: If ``train`` raises; the cause is its traceback, the text names the run.
        OSError: If the store cannot be written, or another process has it open.

    Example:
        >>> train = lambda mask, seed: float(mask.sum()) + 0.1 * seed
        >>> retrain_scores(train, [[1, 1, 0], [0, 1, 0]], seeds=(0, 1), progress=False).mean
        array([[2.05],
               [1.05]])
    """
    check_choice("non_finite", non_finite, ("error", "keep"))
    table = as_masks("masks", masks)
    if 0 in table.shape:
        remedy = "There is nothing to train on."
        raise ValueError(message("masks", "at least one row and column", shape_text(table), remedy))
    seeds = _check_seeds(seeds)
    _check_train_and_jobs(train, n_jobs)
    subsets = ["".join("1" if bit else "0" for bit in row) for row in table.tolist()]
    runs = [(subset, seed) for seed in seeds for subset in dict.fromkeys(subsets)]
    num_targets = None if target_names is None else len(target_names)
    failed: list[_Run] = []
    with RunStore(store, table.shape[1], num_targets, settings) as kept:
        scores = kept.load(subsets, seeds)
        missing = [run for run in runs if run not in scores]
        bar = tqdm(
            desc="training",
            unit=" runs",
            initial=len(scores),
            total=len(runs),
            disable=not (progress and missing),
        )
        with bar, _training(train, missing, n_jobs, failed) as finished:
            for run in finished:
                if run.error or kept.num_targets not in (None, len(run.scores)):
                    failed.append(run)
                    continue
                kept.add(run.subset, run.seed, run.scores, run.seconds)
                scores[run.subset, run.seed] = run.scores
                bar.update()
    if failed:
        raise _failure(failed[0], subsets, kept.num_targets, store)
    values = np.array([[scores[subset, seed] for subset in subsets] for seed in seeds])
    if non_finite == "error":
        _check_scores(values, subsets, seeds)
    kind, subset_names = Kind.of(masks), names_along(masks, 0)
    names = tuple(target_names or map(str, range(values.shape[2])))
    return RetrainedScores(
        values=kind.restore(
            torch.from_numpy(values), {"seed": seeds, "subset": subset_names, "target": names}
        ),
        seeds=seeds,
        kind=kind,
        subset_names=subset_names,
        target_names=names,
    )


# -- one run, where it is trained ---------------------------------------------------------------


class _Run(NamedTuple):
    """A run that ended: its scores (t,), or the traceback of what ``train`` raised."""

    subset: str
    seed: int
    scores: np.ndarray
    seconds: float
    error: str = ""


def _run(train: Train, subset: str, seed: int, caller: int) -> _Run:
    """Train once, in a worker of the process ``caller`` or in itself."""
    _end_with(caller)
    mask = torch.tensor([bit == "1" for bit in subset])
    start = perf_counter()
    try:
        with _one_thread():
            scores = _as_scores(train(mask, seed))
    except Exception:  # of any kind, and to be told to the caller: other runs go on
        return _Run(subset, seed, np.empty(0), perf_counter() - start, traceback.format_exc())
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
def _one_thread() -> Iterator[None]:
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


@contextmanager
def _training(
    train: Train, runs: Iterable[tuple[str, int]], n_jobs: int | None, failed: Sequence[_Run]
) -> Iterator[Iterator[_Run]]:
    """The runs as they end; none is begun after one has ``failed``, and none outlives the block."""
    import joblib

    wanted = takewhile(lambda _: not failed, runs)
    calls = (joblib.delayed(_run)(train, *run, os.getpid()) for run in wanted)
    backend, _ = joblib.parallel.get_active_backend()
    finished: Generator[_Run, None, None]
    if backend.supports_return_generator:
        parallel = joblib.Parallel(
            n_jobs=n_jobs, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs"
        )
        finished = parallel(calls)
    else:
        finished = _in_rounds(calls, n_jobs)
    try:
        yield finished
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error tells more than joblib's count of runs
            finished.close()


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


def _failure(
    run: _Run, subsets: Sequence[str], num_targets: int | None, store: object
) -> Exception:
    """What to raise for a run that gave no scores, or another number of them."""
    where = f"for {_spell(subsets, run.subset, run.seed)}"
    remedy = "Correct it and call again" + (
        f": finished runs are kept in {store}."
        if store
        else ", with a `store` to keep finished runs."
    )
    if run.error:
        found = f"{run.error.splitlines()[-1]} {where}"
        error = RuntimeError(message("train", "a function that returns scores", found, remedy))
        error.__cause__ = _WorkerTraceback(run.error)
        return error
    expected = f"a function to {num_targets} scores like `target_names` or earlier runs"
    return ValueError(message("train", expected, f"{len(run.scores)} {where}", remedy))


class _WorkerTraceback(Exception):
    """What ``train`` raised, as text, since not every exception can be pickled."""


def _check_scores(values: np.ndarray, subsets: Sequence[str], seeds: Sequence[int]) -> None:
    """``values`` (num_seeds, m, t) are finite, or the runs that are not are named."""
    bad = np.argwhere(~np.isfinite(values).all(2))
    if len(bad):
        runs = dict.fromkeys((subsets[row], seeds[index]) for index, row in bad)
        listed = "; ".join(_spell(subsets, *run) for run in [*runs][:4])
        raise ValueError(
            message(
                "train",
                "a function to finite scores",
                f"NaN or infinite ones in {len(runs)} runs: {listed}{'; …' * (len(runs) > 4)}",
                "Leave these subsets out, or pass non_finite='keep' to see all scores.",
            )
        )
