"""Retrained scores: equal to a plain loop, whatever the workers, and whatever ends the process."""

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch

from ksm_ext import retrain_scores
from ksm_ext.evaluation import noise_ceiling, retrain_noise
from ksm_ext.identity import identify
from ksm_ext.scores.retraining import RetrainingError
from ksm_ext.scores.runs import RunStore
from ksm_ext.subsets import all_subsets, bernoulli

quiet = partial(retrain_scores, progress=False)
MASKS = bernoulli(7, 6, probability=0.5, seed=0)  # (6, 7)


def train(mask, seed, log=None, pause=0.0):
    """Two scores of a little network's worth of arithmetic; each start is a line of ``log``."""
    if log is not None:
        with open(log, "a") as file:
            file.write(f"{spell(mask)} {seed} {os.getpid()}\n")
    time.sleep(pause)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, len(mask), generator=generator)[:, mask] @ torch.ones(int(mask.sum()))
    return [x.tanh().mean(), x.square().mean()]


def spell(mask):
    return "".join("1" if bit else "0" for bit in mask.tolist())


def tasks_of(mask):
    return ", ".join(map(str, mask.nonzero()[:, 0].tolist()))


def logged(log):
    """How often each (subset, seed) was begun."""
    lines = log.read_text().splitlines() if log.exists() else []
    return Counter(tuple(line.split()[:2]) for line in lines)


def plain_loop(masks, seeds):
    return torch.tensor([[train(mask, seed) for mask in masks] for seed in seeds]).double()


# -- what comes back ----------------------------------------------------------------------------


def test_scores_equal_a_plain_loop():
    scores = quiet(train, MASKS, seeds=(3, 0))
    assert scores.seeds == (3, 0) and scores.values.dtype == torch.float64
    assert torch.equal(scores.values, plain_loop(MASKS, (3, 0)))
    assert torch.equal(scores.mean, scores.values.mean(0))


def test_one_number_is_one_target():
    assert quiet(lambda mask, seed: 0.5, MASKS).values.shape == (1, 6, 1)


@pytest.mark.parametrize(
    "as_result", [list, tuple, np.array, torch.tensor, lambda row: [torch.tensor(x) for x in row]]
)
def test_any_vector_is_a_row_of_targets(as_result):
    scores = quiet(lambda mask, seed: as_result([1.0, 2.0]), MASKS)
    assert scores.values[0].tolist() == [[1.0, 2.0]] * 6


def test_answers_are_of_the_kind_of_the_masks():
    import pandas  # here, since workers import this file

    table = pandas.DataFrame(MASKS.int().numpy(), index=list("abcdef"))
    scores = quiet(train, table, seeds=(0, 1), target_names=("loss", "accuracy"))
    assert list(scores.mean.index) == list("abcdef")
    assert list(scores.mean.columns) == list(scores.ceiling.index) == ["loss", "accuracy"]
    for masks in (MASKS.numpy(), MASKS.tolist()):
        answers = quiet(train, masks, seeds=(0, 1))
        for name in ("values", "mean", "noise_std", "ceiling"):
            assert isinstance(getattr(answers, name), np.ndarray)
    assert quiet(train, table).target_names == ("0", "1")


def test_noise_and_ceiling_equal_those_of_evaluation():
    scores = quiet(train, MASKS, seeds=(0, 1, 2))
    noise = retrain_noise(MASKS.repeat(3, 1), scores.values.flatten(0, 1))
    torch.testing.assert_close(scores.noise_std**2, noise)
    a, b, c = scores.values
    pairs = torch.stack([noise_ceiling(a, b), noise_ceiling(a, c), noise_ceiling(b, c)])
    torch.testing.assert_close(scores.ceiling, pairs.mean(0))


def test_identical_rows_are_trained_once(tmp_path):
    masks = MASKS[[0, 1, 0, 0]]
    log = tmp_path / "log"
    scores = quiet(partial(train, log=log), masks, seeds=(0, 1))
    assert set(logged(log).values()) == {1} and len(logged(log)) == 4
    assert torch.equal(scores.values, plain_loop(masks, (0, 1)))


def test_progress_is_a_bar_that_starts_at_what_is_done(tmp_path, capsys):
    store = tmp_path / "runs.sqlite"
    quiet(train, MASKS[:2], store=store)
    assert capsys.readouterr().err == ""
    retrain_scores(train, MASKS, store=store, progress=True)
    assert "2/6" in capsys.readouterr().err
    retrain_scores(train, MASKS, store=store, progress=True)
    assert capsys.readouterr().err == ""


# -- where it is trained ------------------------------------------------------------------------


def threads_and_worker(mask, seed):
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))
    return [torch.get_num_threads(), (x @ x).sum(), os.getpid()]


def test_neither_workers_nor_threads_change_a_bit():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        one = quiet(threads_and_worker, MASKS, seeds=(0, 1), n_jobs=1)
        assert torch.get_num_threads() == 2
        two = quiet(threads_and_worker, MASKS, seeds=(0, 1), n_jobs=2)
        with joblib.parallel_config("threading", n_jobs=2):
            threads = quiet(threads_and_worker, MASKS, seeds=(0, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one.values[..., :2], two.values[..., :2])
    assert torch.equal(one.values, threads.values)
    assert (one.values[..., 0] == 1).all()
    assert os.getpid() not in two.values[..., 2]
    assert torch.equal(quiet(train, MASKS, n_jobs=2).values, plain_loop(MASKS, (0,)))


@pytest.mark.slow
def test_a_dask_cluster_trains(tmp_path):
    distributed = pytest.importorskip("distributed")
    cluster = distributed.LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None)
    with cluster, distributed.Client(cluster), joblib.parallel_config("dask"):
        check_other_processes_train(tmp_path)


def check_other_processes_train(folder):
    scores = quiet(train, MASKS, seeds=(0, 1), store=folder / "runs.sqlite")
    assert torch.equal(scores.values, plain_loop(MASKS, (0, 1)))
    assert os.getpid() not in quiet(lambda mask, seed: os.getpid(), MASKS).values
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        quiet(divides_by_zero, MASKS)


def divides_by_zero(mask, seed):
    return 1 / 0


def test_a_backend_without_generators_trains_in_rounds(tmp_path):
    store = tmp_path / "runs.sqlite"
    with joblib.parallel_config("multiprocessing", n_jobs=2):
        scores = quiet(train, MASKS, seeds=(0, 1), store=store)
        assert torch.equal(quiet(train, MASKS, seeds=(0, 1), store=store).values, scores.values)
        with pytest.raises(RuntimeError, match="ValueError: no"):
            quiet(fails_on_the_third, MASKS, store=tmp_path / "failed.sqlite")
    assert torch.equal(scores.values, plain_loop(MASKS, (0, 1)))
    with sqlite3.connect(tmp_path / "failed.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM runs").fetchone() == (3,)  # of two rounds of two


def fails_on_the_third(mask, seed):
    if torch.equal(mask, MASKS[2]):
        raise ValueError("no")
    return train(mask, seed)


@pytest.mark.slow
def test_a_ray_cluster_trains(tmp_path):
    ray = pytest.importorskip("ray")
    joblib_of_ray = pytest.importorskip("ray.util.joblib")
    joblib_of_ray.register_ray()
    here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # where `train` is found
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=here)
    try:
        with joblib.parallel_config("ray", n_jobs=2):
            check_other_processes_train(tmp_path)
    finally:
        ray.shutdown()


# -- ends and resumptions -----------------------------------------------------------------------


def test_a_store_holds_more_than_is_asked(tmp_path):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    logging = partial(train, log=log)
    quiet(logging, MASKS[:4], seeds=(0, 1), store=store)
    scores = quiet(logging, MASKS[[5, 2]], seeds=(2, 1), store=store)
    assert torch.equal(scores.values, plain_loop(MASKS[[5, 2]], (2, 1)))
    assert set(logged(log).values()) == {1} and len(logged(log)) == 8 + 3
    assert [path.name for path in tmp_path.glob("runs*")] == ["runs.sqlite"]


def test_a_store_is_a_table_that_any_tool_reads(tmp_path):
    quiet(train, MASKS, seeds=(4,), store=tmp_path / "runs.sqlite", settings={"width": (8, 8)})
    with sqlite3.connect(tmp_path / "runs.sqlite") as db:
        metadata = dict(db.execute("SELECT name, value FROM metadata"))
        rows = list(db.execute("SELECT subset, seed, scores, finished, seconds FROM runs"))
    db.close()
    assert metadata == {
        "format": "ksm_ext.runs.2",
        "num_tasks": "7",
        "num_targets": "2",
        "settings": '{"width": [8, 8]}',
        "identity": json.dumps(identify(train=train), sort_keys=True),
    }
    rows_of_4 = plain_loop(MASKS, [4])[0].tolist()
    found = {subset: np.frombuffer(scores, "<f8").tolist() for subset, _, scores, _, _ in rows}
    assert found == {spell(mask): row for mask, row in zip(MASKS, rows_of_4, strict=True)}
    assert all(seed == 4 and 0 <= seconds < 10 for _, seed, _, _, seconds in rows)
    assert all(finished[4] == "-" and finished.endswith("+00:00") for *_, finished, _ in rows)


def fails_once(mask, seed, log):
    scores = train(mask, seed, log)
    if spell(mask) == spell(MASKS[2]) and not log.with_suffix(".mended").exists():
        raise KeyError("no such image")
    return scores


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_error_names_the_run_and_loses_no_other(tmp_path, n_jobs):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    failing = partial(fails_once, log=log)
    tasks = tasks_of(MASKS[2])
    with pytest.raises(
        RuntimeError,
        match=rf"`train` must be a function that returns scores, got KeyError: 'no such image' "
        rf"for subset 2 \(tasks {tasks}\) with seed 0\. Correct it and call again: finished runs "
        rf"are kept in {store}\.",
    ) as caught:
        quiet(failing, MASKS, n_jobs=n_jobs, store=store)
    assert "in fails_once" in str(caught.value.__cause__)
    assert 3 <= len(logged(log)) <= 2 + 2 * n_jobs
    log.with_suffix(".mended").touch()
    scores = quiet(failing, MASKS, n_jobs=n_jobs, store=store)
    assert torch.equal(scores.values, plain_loop(MASKS, (0,)))
    assert logged(log).pop((spell(MASKS[2]), "0")) == 2
    assert logged(log).total() == 7


def test_a_worker_that_dies_loses_no_finished_run(tmp_path):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"

    def dies(mask, seed):
        if spell(mask) == spell(MASKS[5]):
            time.sleep(0.5)
            os._exit(3)
        return train(mask, seed, log)

    with pytest.raises(RetrainingError) as caught:
        quiet(dies, MASKS, n_jobs=2, store=store)
    assert "a worker process that died, in one of: " in str(caught.value)
    assert f"subset 5 (tasks {tasks_of(MASKS[5])}) with seed 0" in str(caught.value)
    assert f"then call again: finished runs are kept in {store}." in str(caught.value)
    assert "terminated" in caught.value.traceback
    kept = caught.value.completed
    assert torch.equal(kept.mean, plain_loop(kept.masks, (0,))[0]) and len(kept.masks) == 5
    before = logged(log).total()
    assert before == 5
    quiet(partial(train, log=log), MASKS, store=store, on_change="keep")
    assert logged(log).total() == 6


def interrupted(store, log):
    """Press Ctrl-C after three runs have begun."""

    def presses(mask, seed):
        scores = train(mask, seed, log, pause=0.05)
        if logged(log).total() == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return scores

    with pytest.raises(KeyboardInterrupt):
        quiet(presses, MASKS, store=store)


@pytest.fixture
def ctrl_c():
    """SIGINT as Python has it, also where a shell started the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupt_leaves_the_store_whole(tmp_path):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    interrupted(store, log)
    scores = quiet(partial(train, log=log), MASKS, store=store, on_change="keep")
    assert torch.equal(scores.values, plain_loop(MASKS, (0,)))
    assert logged(log).total() == 7


def train_all(store, log):
    """What the killed process does, and the last one to its end."""
    return quiet(partial(train, log=log, pause=0.01), all_subsets(5), seeds=range(4), store=store)


def test_a_killed_process_loses_the_run_in_flight_and_no_other(tmp_path, monkeypatch):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    context = multiprocessing.get_context("forkserver")  # imports once, then starts in milliseconds
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    context.set_forkserver_preload([__name__])
    moments = random.Random(0)
    finished = set()
    for kill in range(20):
        before = logged(log)
        process = context.Process(target=train_all, args=(store, log))
        process.start()
        if kill % 2:  # after a run at least; else perhaps while the store is opened
            wait_until(lambda before=before: logged(log).total() >= before.total() + 2)
        time.sleep(moments.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        begun = logged(log) - before
        assert not begun.keys() & finished, "a finished run was trained again"
        finished, earlier = finished_runs(store, tmp_path / "copy"), finished
        assert finished >= earlier and begun.total() <= len(finished - earlier) + 1
    assert 10 <= len(finished) < 128
    scores = train_all(store, log)
    assert torch.equal(scores.values, plain_loop(all_subsets(5), range(4)))
    assert len(logged(log)) == 128 and logged(log).total() <= 128 + 20


def finished_runs(store, folder):
    """What a killed process left in ``store``, which stays as it is for the next to mend."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for path in store.parent.glob(f"{store.name}*"):
        shutil.copy(path, folder)
    with RunStore(folder / store.name, 5) as kept:
        runs = kept.load([spell(mask) for mask in all_subsets(5)], range(4))
    return {(subset, str(seed)) for subset, seed in runs}


CHILD = """
import sys
from functools import partial
from pathlib import Path
sys.path[:0] = sys.argv[1:2]
from test_retraining import MASKS, quiet, train
log, pause, store = Path(sys.argv[2]), float(sys.argv[3]), sys.argv[4]
quiet(partial(train, log=log, pause=pause), MASKS, seeds=range(4), n_jobs=2, store=store)
"""


def test_workers_of_a_killed_process_end_at_once(tmp_path):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    command = [sys.executable, "-c", CHILD, str(Path(__file__).parent), str(log)]
    with subprocess.Popen([*command, "5", str(store)]) as process:
        wait_until(lambda: logged(log).total() == 2)
        process.kill()
    workers = {int(line.split()[2]) for line in log.read_text().splitlines()}
    wait_until(lambda: not any(is_running(pid) for pid in workers), seconds=4)
    log.unlink()
    logging = partial(train, log=log)  # without a pause
    scores = quiet(logging, MASKS, seeds=range(4), store=store, on_change="keep")
    assert torch.equal(scores.values, plain_loop(MASKS, range(4)))
    assert logged(log).total() == 24


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.002)


def is_running(pid):
    """Whether there is such a process, and not just its exit status that nobody asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


# -- stores that refuse -------------------------------------------------------------------------


def test_a_second_process_is_refused(tmp_path):
    store = tmp_path / "runs.sqlite"
    with RunStore(store, 7) as kept:
        kept.add("1" * 7, 0, np.ones(2), 0.1)
        code = f"from ksm_ext.scores.runs import RunStore; RunStore({str(store)!r}, 7)"
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        with pytest.raises(OSError, match="one process at a time"):  # nor twice in this one
            RunStore(store, 7)
    assert second.stderr.endswith(
        f"OSError: `store` must be open in one process at a time, got {store} (database is locked)."
        " Wait for the other process to end, or choose another path.\n"
    )
    with RunStore(store, 7) as kept:
        assert len(kept.load(["1" * 7], (0,))) == 1


def test_other_settings_tasks_and_targets_are_refused(tmp_path):
    store = tmp_path / "runs.sqlite"
    quiet(train, MASKS, store=store, settings={"width": 8, "lr": 0.1})
    before = store.read_bytes()
    for text, masks, options in [
        ("width = 8 (now 9), depth = None (now 1)", MASKS, {"width": 9, "lr": 0.1, "depth": 1}),
        ("lr = 0.1 (now None), width = 8 (now None)", MASKS, None),
        ("num_tasks = 7 (now 6)", MASKS[:, :6], {"width": 8, "lr": 0.1}),
    ]:
        with pytest.raises(ValueError) as caught:
            quiet(train, masks, store=store, settings=options)
        assert str(caught.value) == (
            "`store` must be a new file or one of the same tasks, targets and settings, got "
            f"{store} with {text}. Choose another path, or delete the file to start over."
        )
    with pytest.raises(ValueError, match=r"num_targets = 2 \(now 1\)"):
        quiet(train, MASKS, store=store, settings={"lr": 0.1, "width": 8}, target_names=["loss"])
    assert store.read_bytes() == before


@pytest.mark.parametrize("content", ["text", "table", "format"])
def test_other_files_are_refused_unchanged(tmp_path, content):
    path = tmp_path / "file"
    if content == "text":
        path.write_bytes(b"precious" * 100)
    else:
        with sqlite3.connect(path) as db:
            db.execute("CREATE TABLE metadata (name, value)")
            if content == "format":
                db.execute("CREATE TABLE runs (subset)")
        db.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"`store` must be a store of runs, got {path} \("):
        quiet(train, MASKS, store=path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "statement, found",
    [
        ("UPDATE metadata SET value = '{' WHERE name = 'settings'", "its metadata is damaged"),
        ("UPDATE metadata SET value = '[]' WHERE name = 'settings'", "its metadata is damaged"),
        ("UPDATE metadata SET value = '4.5' WHERE name = 'num_tasks'", "its metadata is damaged"),
        ("UPDATE metadata SET value = x'00'", "its format is"),
        ("DELETE FROM metadata WHERE name = 'num_tasks'", "its metadata is damaged"),
        ("UPDATE metadata SET value = CAST(x'ff' AS TEXT)", "UTF-8"),
        ("UPDATE runs SET scores = x'00'", "has damaged scores"),
        ("UPDATE runs SET scores = 'text'", "has damaged scores"),
        ("ALTER TABLE runs RENAME COLUMN scores TO others", "no such column"),
    ],
)
def test_damaged_stores_are_refused(tmp_path, statement, found):
    store = tmp_path / "runs.sqlite"
    quiet(train, MASKS[:3], store=store)
    db = sqlite3.connect(store)
    with db:
        db.execute(statement)
    db.close()
    before = store.read_bytes()
    with pytest.raises(ValueError, match=rf"`store` must be a store of runs, got .*\(.*{found}"):
        quiet(train, MASKS[:3], store=store)
    assert store.read_bytes() == before


def test_a_store_that_cannot_be_opened(tmp_path):
    for path in (tmp_path, tmp_path / "missing" / "runs.sqlite"):
        with pytest.raises(OSError, match=rf"`store` must be writable, got {path} \(unable to"):
            quiet(train, MASKS, store=path)


def test_a_read_only_store_is_refused_and_whole(tmp_path):
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is closed to other users
        store = Path(folder) / "runs.sqlite"
        quiet(train, MASKS[:3], store=store)
        before = store.read_bytes()
        store.chmod(0o444)
        Path(folder).chmod(0o555)
        root = os.geteuid() == 0  # who may write everything
        if root:
            os.seteuid(65534)
        try:
            with pytest.raises(OSError, match=r"must be writable, got .*runs.sqlite \(.*readonly"):
                quiet(train, MASKS, store=store)
        finally:
            if root:
                os.seteuid(0)
            Path(folder).chmod(0o755)
        assert store.read_bytes() == before


def test_a_full_disk_loses_nothing_that_was_finished(tmp_path):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    masks = all_subsets(8)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24 * 1024, hard))
    try:
        with pytest.raises(OSError, match=r"must be writable, got .*call again: finished runs are"):
            quiet(partial(train, log=log), masks, store=store)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    begun = logged(log).total()
    assert 20 < begun < 256
    scores = quiet(partial(train, log=log), masks, store=store)
    assert logged(log).total() == 256 + 1  # the run that could not be written, again
    assert torch.equal(scores.values, plain_loop(masks, (0,)))


# -- scores and arguments that are refused ------------------------------------------------------


def diverges(mask, seed, log=None):
    loss, other = train(mask, seed, log)
    return [float("nan") if mask[0] else loss, float("inf") if seed == 1 else other]


def test_scores_that_are_not_finite_are_kept_and_named(tmp_path):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    masks = torch.tensor([[1, 0], [0, 1], [0, 0]])
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            quiet(partial(diverges, log=log), masks, seeds=(0, 1), store=store)
        assert str(caught.value) == (
            "`train` must be a function to finite scores, got NaN or infinite ones in 4 runs: "
            "subset 0 (tasks 0) with seed 0; subset 0 (tasks 0) with seed 1; "
            "subset 1 (tasks 1) with seed 1; subset 2 (tasks none) with seed 1. "
            "Leave these subsets out, or pass non_finite='keep' to see all scores."
        )
    assert logged(log).total() == 6
    options = {"store": store, "non_finite": "keep"}
    scores = quiet(partial(diverges, log=log), masks, seeds=(0, 1), **options)
    assert scores.values.isnan().sum() == 2 and scores.values.isinf().sum() == 3
    with pytest.raises(ValueError, match="`values` must be finite"):
        _ = scores.ceiling


def test_another_number_of_scores_is_refused(tmp_path):
    store = tmp_path / "runs.sqlite"
    ragged = lambda mask, seed: [1.0] * (1 + seed)  # noqa: E731
    with pytest.raises(
        ValueError,
        match=r"`train` must be a function to 1 scores like `target_names` or earlier runs, got 2 "
        r"for subset 0 \(tasks 0\) with seed 1\.",
    ):
        quiet(ragged, [[1, 0]], seeds=(0, 1), store=store)
    with pytest.raises(ValueError, match=r"to 2 scores like `target_names`.*got 1"):
        quiet(ragged, [[1, 0]], target_names=("loss", "accuracy"))
    assert quiet(ragged, [[1, 0]], store=store).values.tolist() == [[[1.0]]]


@pytest.mark.parametrize("result", [None, "0.5", [[1.0]], []])
def test_what_is_no_score_is_refused(result):
    with pytest.raises(RuntimeError, match=r"got (Type|Value)Error: `train` must be .* subset 0"):
        quiet(lambda mask, seed: result, MASKS)


@pytest.mark.parametrize(
    "error, text, arguments, options",
    [
        (TypeError, "`train` must be a function, got int", (3, MASKS), {}),
        (ValueError, "`masks` must be boolean, or 0 and 1", (train, [[2, 0]]), {}),
        (ValueError, "`masks` must be at least one row", (train, MASKS[:0]), {}),
        (ValueError, "`masks` must be at least one row", (train, MASKS[:, :0]), {}),
        (TypeError, "`seeds` must be a sequence, got int", (train, MASKS), {"seeds": 3}),
        (TypeError, "`seeds` must be an integer, got float", (train, MASKS), {"seeds": (0.5,)}),
        (ValueError, "`seeds` must be at least 0, got -1", (train, MASKS), {"seeds": (-1,)}),
        (ValueError, "`seeds` must be distinct", (train, MASKS), {"seeds": (1, 1)}),
        (ValueError, "`seeds` must be distinct", (train, MASKS), {"seeds": ()}),
        (ValueError, r"below 2\*\*63", (train, MASKS), {"seeds": (2**63,)}),
        (ValueError, "`n_jobs` must be a number of processes", (train, MASKS), {"n_jobs": 0}),
        (ValueError, "`non_finite` must be one of", (train, MASKS), {"non_finite": "drop"}),
        (TypeError, "`settings` must be a mapping", (train, MASKS), {"settings": {"a": {1}}}),
        (TypeError, "`settings` must be a mapping", (train, MASKS), {"settings": 3}),
        (TypeError, "`settings` must be a", (train, MASKS), {"settings": {"a": float("nan")}}),
    ],
)
def test_arguments_are_checked(error, text, arguments, options):
    with pytest.raises(error, match=text):
        quiet(*arguments, **options)


def test_noise_needs_two_seeds_and_the_ceiling_two_subsets():
    once = quiet(train, MASKS)
    for name in ("noise_std", "ceiling"):
        with pytest.raises(ValueError, match="`seeds` must be two or more, got 1"):
            getattr(once, name)
    with pytest.raises(ValueError, match="`masks` must be two subsets or more, got 1"):
        _ = quiet(train, MASKS[:1], seeds=(0, 1)).ceiling


# -- failures that lose nothing -----------------------------------------------------------------


def fails_late(mask, seed):
    if spell(mask) == spell(MASKS[4]):
        inner_of_a_failure()
    return train(mask, seed)


def inner_of_a_failure():
    raise LookupError("a first line\nand a second")


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_an_error_has_what_finished_and_the_whole_traceback(n_jobs):
    form = "got LookupError: a first line for subset 4"
    with pytest.raises(RetrainingError, match=form) as caught:
        quiet(fails_late, MASKS, n_jobs=n_jobs, target_names=("loss", "accuracy"))
    error = caught.value
    assert isinstance(error, RuntimeError)
    completed = error.completed
    assert 3 <= len(completed.masks) <= 5  # those beside it may have finished or not
    assert torch.equal(completed.values, plain_loop(completed.masks, (0,)))
    assert completed.target_names == ("loss", "accuracy")
    assert f"This error's `completed` has {len(completed.masks)} of them." in str(error)
    for text in (error.traceback, str(error.__cause__)):
        assert text.startswith("Traceback (most recent call last)")
        for line in ("in fails_late", "in inner_of_a_failure", "a first line", "and a second"):
            assert line in text


def test_an_error_before_anything_finished_has_nothing_and_recommends_a_store():
    form = r"call again, with a `store` to keep finished runs\.$"
    with pytest.raises(RetrainingError, match=form) as caught:
        quiet(divides_by_zero, MASKS)
    assert caught.value.completed is None


def test_scores_that_do_not_fit_lose_no_others():
    ragged = lambda mask, seed: [1.0] * (1 + seed)  # noqa: E731
    with pytest.raises(RetrainingError, match="got 2 for subset 0") as caught:
        quiet(ragged, [[1, 0], [0, 1]], seeds=(0, 1))
    assert caught.value.completed.counts.tolist() == [1, 1]
    with pytest.raises(RetrainingError, match="NaN or infinite ones in 1 runs") as caught:
        quiet(diverges, [[1, 0], [0, 1]])
    assert np.isfinite(caught.value.completed.mean).sum() == 3


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_sys_exit_is_a_failure_like_others(n_jobs):
    def exits(mask, seed):
        sys.exit(3) if spell(mask) == spell(MASKS[1]) else None
        return train(mask, seed)

    with pytest.raises(RetrainingError, match="got SystemExit: 3 for subset 1") as caught:
        quiet(exits, MASKS, n_jobs=n_jobs)
    completed = caught.value.completed
    assert torch.equal(completed.values, plain_loop(completed.masks, (0,)))


def fails_sometimes(mask, seed):
    if (spell(mask), seed) in FAILING:
        raise KeyError("no such image")
    return train(mask, seed)


FAILING = {(spell(MASKS[1]), seed) for seed in (0, 1, 2)} | {(spell(MASKS[3]), 1)}


@pytest.mark.parametrize("n_jobs", [1, 2])
def test_runs_that_fail_are_skipped_and_told(tmp_path, n_jobs):
    options = {"seeds": (0, 1, 2), "store": tmp_path / "runs.sqlite", "on_error": "skip"}
    scores = quiet(fails_sometimes, MASKS, n_jobs=n_jobs, **options)
    rows = [0, 2, 3, 4, 5]
    assert torch.equal(scores.masks, MASKS[rows])
    assert scores.counts.tolist() == [3, 3, 2, 3, 3]
    runs = [torch.stack([plain_loop(MASKS[[row]], [s])[0, 0] for s in (0, 1, 2)]) for row in rows]
    runs[2] = runs[2][[0, 2]]
    torch.testing.assert_close(scores.mean, torch.stack([part.mean(0) for part in runs]))
    assert scores.noise_df == 2 + 2 + 1 + 2 + 2
    pooled = sum(((part - part.mean(0)) ** 2).sum(0) for part in runs) / scores.noise_df
    torch.testing.assert_close(scores.noise_std, pooled.sqrt())
    assert {(run.row, run.seed) for run in scores.skipped} == {(1, 0), (1, 1), (1, 2), (3, 1)}
    assert all("in fails_sometimes" in run.traceback for run in scores.skipped)
    assert "14 runs of 5 subsets of 7 tasks; 4 skipped" in repr(scores)
    with pytest.raises(ValueError, match="`values` must be scores of every run, got 1 skipped"):
        _ = scores.values
    assert scores.ceiling.isfinite().all()


def test_nothing_but_skipped_runs_is_an_error():
    with pytest.raises(RetrainingError, match="ZeroDivisionError"):
        quiet(divides_by_zero, MASKS, on_error="skip")


def with_loader(mask, seed, context=None, num_workers=1):
    data = torch.utils.data.TensorDataset(torch.arange(8.0))
    options = {"num_workers": num_workers, "multiprocessing_context": context}
    loader = torch.utils.data.DataLoader(data, batch_size=2, **options)
    return float(sum(batch.sum() for (batch,) in loader)) + float(mask.sum())


def test_loaders_with_workers_are_told_what_works():
    expected = (28.0 + MASKS[:2].sum(1).double())[:, None]
    with pytest.raises(RetrainingError) as caught:
        quiet(with_loader, MASKS[:2], n_jobs=2)
    advice = "multiprocessing_context='fork' or num_workers=0, or call with n_jobs=1"
    assert advice in str(caught.value)
    for options in ({"context": "fork"}, {"num_workers": 0}):
        found = quiet(partial(with_loader, **options), MASKS[:2], n_jobs=2).mean
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_loaders_with_workers_run_in_this_process():
    expected = (28.0 + MASKS[:2].sum(1).double())[:, None]
    assert torch.equal(quiet(with_loader, MASKS[:2], n_jobs=1).mean, expected)


def test_what_cannot_be_sent_to_processes_is_told():
    lock = threading.Lock()
    form = (
        r"`train` must be a function that can be sent to processes, got one that holds what "
        r"cannot: TypeError: cannot pickle '_thread.lock' object\. Make what cannot be sent inside"
    )
    with pytest.raises(TypeError, match=form):
        quiet(lambda mask, seed: float(lock.locked()), MASKS, n_jobs=2)
    assert quiet(lambda mask, seed: float(lock.locked()), MASKS, n_jobs=1).mean.sum() == 0


@pytest.mark.parametrize("fails", [False, True])
def test_the_callers_random_numbers_go_on(fails):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    def seeds_all(mask, seed):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        return draw() if not fails else 1 / 0

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    try:
        quiet(seeds_all, MASKS)
    except RetrainingError:
        assert fails
    assert draw() == expected


@pytest.mark.parametrize("store", ["", ":memory:"])
def test_a_store_that_keeps_nothing_is_refused(store):
    with pytest.raises(ValueError, match=r"`store` must be a (path|file), got .* or None to keep"):
        quiet(train, MASKS, store=store)


# -- what a fit needs ---------------------------------------------------------------------------


def test_masks_means_counts_and_names_go_together():
    import pandas

    table = pandas.DataFrame(MASKS.int().numpy(), index=list("abcdef"), columns=list("tuvwxyz"))
    table = table.iloc[[0, 1, 0, 2]]
    scores = quiet(train, table, seeds=(0, 1), target_names=("loss", "accuracy"))
    assert (scores.masks == table.astype(bool)).all(axis=None)
    assert list(scores.masks.columns) == scores.task_names == list("tuvwxyz")
    once = scores.distinct
    assert list(once.mean.index) == list(once.masks.index) == list(once.counts.index) == list("abc")
    assert once.counts.tolist() == [2, 2, 2] and once.noise_df == scores.noise_df == 3
    expected = plain_loop(MASKS[:3], (0, 1))
    assert np.array_equal(once.mean.to_numpy(), expected.mean(0).numpy())
    std = expected.var(0).mean(0).sqrt().numpy()
    for runs in (once, scores):  # a row that was given twice is no second measurement
        np.testing.assert_allclose(runs.noise_std.to_numpy(), std, rtol=1e-12)
    assert list(once.noise_std.index) == ["loss", "accuracy"]


# -- stores of another function, and damage -----------------------------------------------------


def test_another_train_is_refused_by_what_changed(tmp_path):
    def made(rate, layers=(8, 8)):
        def own(mask, seed):
            return rate * float(mask.sum()) + len(layers)

        return own

    def other(mask, seed):
        return 2.0 * float(mask.sum())

    store = tmp_path / "runs.sqlite"
    one = quiet(made(1.0), MASKS, store=store)
    for changed, text in (
        (made(2.0), "closure.rate"),
        (made(1.0, (8,)), "closure.layers"),
        (other, "train.code"),
        (partial(made(1.0)), "train.func"),
    ):
        before = store.read_bytes()
        with pytest.raises(ValueError, match=r"one with runs of this `train`, got .*") as caught:
            quiet(changed, MASKS, store=store)
        assert text in str(caught.value) and "pass on_change='keep'" in str(caught.value)
        assert store.read_bytes() == before
    again = quiet(made(1.0), MASKS, store=store)
    assert torch.equal(again.values, one.values) and not again.notes
    kept = quiet(made(2.0), MASKS, store=store, on_change="keep")
    assert torch.equal(kept.values, one.values)
    assert kept.notes == ("some runs are of another `train`, which differs in train.closure.rate",)
    assert not quiet(made(2.0), MASKS, store=store).notes  # which is the store's `train` now


def test_what_has_no_identity_is_told(tmp_path):
    lock = threading.Lock()

    def locked(mask, seed):
        return float(mask.sum()) + lock.locked()

    for _ in range(2):
        scores = quiet(locked, MASKS, store=tmp_path / "runs.sqlite")
        told = "a change would not be noticed in: train.closure.lock (_thread.lock)"
        assert scores.notes == (told,) and told in repr(scores)


def old_store(path):
    """What the first format was."""
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE metadata (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID")
    db.execute(
        "CREATE TABLE runs (subset TEXT, seed INTEGER, scores BLOB NOT NULL, "
        "finished TEXT NOT NULL, seconds REAL NOT NULL, PRIMARY KEY (subset, seed)) WITHOUT ROWID"
    )
    facts = {"format": "ksm_ext.runs.1", "num_tasks": "7", "settings": "{}", "num_targets": "2"}
    db.executemany("INSERT INTO metadata VALUES (?, ?)", facts.items())
    content = plain_loop(MASKS[:1], (0,)).numpy().tobytes()
    db.execute("INSERT INTO runs VALUES (?, 0, ?, '', 0.1)", (spell(MASKS[0]), content))
    db.commit()
    db.close()


def test_an_old_store_is_refused_or_taken_over(tmp_path):
    log, store = tmp_path / "log", tmp_path / "runs.sqlite"
    old_store(store)
    before = store.read_bytes()
    with pytest.raises(ValueError, match="of a function that the file does not tell"):
        quiet(train, MASKS, store=store)
    assert store.read_bytes() == before
    logging = partial(train, log=log)
    scores = quiet(logging, MASKS, store=store, on_change="keep")
    assert torch.equal(scores.values, plain_loop(MASKS, (0,))) and logged(log).total() == 5
    assert torch.equal(quiet(logging, MASKS, store=store).values, scores.values)
    assert logged(log).total() == 5


def test_no_flipped_bits_give_other_scores(tmp_path):
    store = tmp_path / "runs.sqlite"
    scores = quiet(train, MASKS, seeds=(0, 1), store=store)
    runs = {
        (spell(mask), seed): scores.values[seed, row]
        for row, mask in enumerate(MASKS)
        for seed in (0, 1)
    }
    whole, chance, refused = store.read_bytes(), random.Random(0), 0
    places = [whole.index(value.numpy().tobytes()) for value in runs.values()]
    for trial in range(300):
        damaged = bytearray(whole)
        near = trial % 2 == 0  # half of them where scores and keys lie
        for _ in range(chance.randint(1, 4)):
            place = chance.choice(places) + chance.randrange(-12, 40)
            place = place if near else chance.randrange(len(whole))
            damaged[min(place, len(whole) - 1)] ^= 1 << chance.randrange(8)
        store.write_bytes(damaged)
        try:
            with RunStore(store, 7) as kept:
                found = kept.load([subset for subset, _ in runs], (0, 1))
        except (ValueError, OSError) as error:
            assert str(error).startswith("`store` must be ")
            refused += 1
        else:
            for run, values in found.items():
                assert np.array_equal(values, runs[run].numpy()), run
        for beside in tmp_path.glob("runs.sqlite-*"):
            beside.unlink()
    assert refused > 100
