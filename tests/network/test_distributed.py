"""Two processes on gloo against one: features bit for bit, Gram matrices, estimates, a kill."""

import multiprocessing
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ksm_ext import GradientEstimator, Projector, collect_features, load_features
from ksm_ext.attribution.trak import trak
from ksm_ext.network import distributed
from ksm_ext.network.batches import chunks
from ksm_ext.network.gradients import _some
from ksm_ext.network.outputs import log_odds

NUM_RANKS, BATCH, SAMPLES, DIM = 2, 4, 37, 16
OPTIONS = {"batch_size": BATCH, "progress": False}
COUNTED = {**OPTIONS, "engine": "vmap"}  # which calls an output once for each chunk
SHARDS = [range(20), range(20, SAMPLES)]
DTYPES = (torch.float32, torch.float64)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
# Children of a server that has imported torch once: as clean as spawned ones, and quick to start.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["ksm_ext"])


def problem(dtype=torch.float32, classes=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, classes)).to(dtype)
    return model, (torch.randn(SAMPLES, 6, dtype=dtype), torch.randint(0, classes, (SAMPLES,)))


def tasks_of(data, sizes=(5, 0, 20, 12)):
    parts = zip(*(column.split(sizes) for column in data), strict=True)
    return [part for part in parts if len(part[0])]


def residual(model, batch):
    x, _ = batch
    return model(x)[:, 0] - x.sum(1)


def estimates(folder, group):
    """Everything that two processes share, as tensors by name."""
    found = {}
    masks = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    for dtype in DTYPES:
        model, data = problem(dtype)
        collect = partial(collect_features, model, data, log_odds, Projector(DIM), **OPTIONS)
        kept = collect(group=group)
        stored = collect(group=group, store=folder / f"features_{dtype}")
        offsets = torch.tensor([0, 5, 5, 25, SAMPLES])
        moments = distributed.task_gram(kept.gradients, offsets, kept.values[:, None], group)
        estimator = GradientEstimator(
            model, tasks_of(data), data, projector=Projector(DIM), group=group, **OPTIONS
        ).fit()
        found |= {
            f"values {dtype}": kept.values,
            f"features {dtype}": kept.gradients,
            f"stored {dtype}": stored.gradients.clone(),
            f"gram {dtype}": distributed.gram(kept.gradients, group),
            f"task_gram {dtype}": distributed.task_gram(kept.gradients, offsets, group=group),
            f"moments {dtype}": moments,
            f"scores {dtype}": estimator.predict(masks),
            f"one score {dtype}": estimator.predict(masks[:1]),
            f"trak {dtype}": trak(
                model,
                tasks_of(data),
                data,
                projector=Projector(DIM),
                relative_ridge=0.1,
                group=group,
            ).values,
        }
    squared = GradientEstimator(
        model, tasks_of(data), data, output=residual, loss="squared", group=group, **OPTIONS
    ).fit()
    return found | {"squared torch.float64": squared.predict(masks)}


def refusals(folder, group):
    """What ranks that do not fit together are told."""
    rank = dist.get_rank(group)
    model, data = problem()
    only_first = dist.new_group([0])
    told = {}
    with torch.no_grad():
        model[0].bias += rank
    for name, network, options in (
        ("model", model, {"group": group}),
        ("group", problem()[0], {"group": only_first}),
        ("store", problem()[0], {"group": group, "store": folder / str(rank)}),
    ):
        try:
            collect_features(network, data, log_odds, **OPTIONS, **options)
        except ValueError as error:
            told[name] = str(error)
    return told


def killed(folder, group, die):
    """Collect features while counting chunks; rank 1 may kill itself in its third."""
    model, data = problem()
    log = folder / f"chunks_{dist.get_rank(group)}"
    deadly = folder / "deadly"  # a file, since a store knows the output's variables
    if die and dist.get_rank(group) == 1:
        deadly.touch()

    def output(model, batch):
        with log.open("a") as file:
            file.write("x")
        if deadly.exists() and dist.get_rank(group) == 1 and len(log.read_text()) == 3:
            deadly.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return log_odds(model, batch)

    features = collect_features(
        model, data, output, Projector(DIM), store=folder / "store", group=group, **COUNTED
    )
    return {"features": features.gradients.clone()}


def rank_main(job, rank, folder):
    torch.set_num_threads(1)
    init = f"file://{folder}/init"
    dist.init_process_group("gloo", init_method=init, rank=rank, world_size=NUM_RANKS)
    torch.save(job(folder, dist.group.WORLD), folder / f"result_{rank}.pt")
    dist.destroy_process_group()


def run_ranks(job, folder):
    """Each rank's result, or its exit code where it has none."""
    (folder / "init").unlink(missing_ok=True)
    args = [(job, rank, folder) for rank in range(NUM_RANKS)]
    processes = [context.Process(target=rank_main, args=each) for each in args]
    for process in processes:
        process.start()
    for process in reversed(processes):  # what rank 1 ends of, rank 0 hears of
        process.join(60)
    files = [folder / f"result_{rank}.pt" for rank in range(NUM_RANKS)]
    return [
        torch.load(file) if file.exists() else process.exitcode
        for file, process in zip(files, processes, strict=True)
    ]


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    return run_ranks(estimates, tmp_path_factory.mktemp("two"))


def test_two_processes_find_what_one_does(of_ranks, tmp_path):
    torch.set_num_threads(1)
    alone = estimates(tmp_path, None)
    for found in of_ranks:
        assert found.keys() == alone.keys()
        for name, expected in alone.items():
            if name.startswith(("values", "features", "stored")):
                assert torch.equal(found[name], expected), name
                continue
            exact = "float64" in name and not name.startswith(("scores", "one score"))
            tolerance = 1e-12 if exact else 1e-6
            error = (found[name] - expected).abs().max() / expected.abs().max()
            assert error < tolerance, f"{name}: {error}"


def test_both_ranks_have_the_same_bits(of_ranks):
    first, second = of_ranks
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_gram_matrices_are_products(of_ranks):
    found = of_ranks[1]
    features, values = found["features torch.float64"], found["values torch.float64"]
    torch.testing.assert_close(found["gram torch.float64"], features.T @ features)
    parts = list(zip(features.split([5, 0, 20, 12]), values.split([5, 0, 20, 12]), strict=True))
    grams = torch.stack([part.T @ part for part, _ in parts])
    torch.testing.assert_close(found["task_gram torch.float64"], grams)
    moments = torch.stack([part.T @ part_values[:, None] for part, part_values in parts])
    torch.testing.assert_close(found["moments torch.float64"], moments)


def test_ranks_that_do_not_fit_are_told(tmp_path):
    first, second = run_ranks(refusals, tmp_path)
    for told in (first, second):
        assert "`model` must be the same on every rank, got" in told["model"]
        assert "`store` must be the same on every rank, got" in told["store"]
    assert "group" not in first
    assert "`group` must be one of this process, got one without it" in second["group"]


def test_a_killed_rank_loses_nothing(tmp_path):
    _, code = run_ranks(partial(killed, die=True), tmp_path)
    assert code == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"a complete folder of features, got .* of 37"):
        load_features(tmp_path / "store")
    before = sum(len(path.read_text()) for path in tmp_path.glob("chunks_*"))
    found = run_ranks(partial(killed, die=False), tmp_path)
    model, data = problem()
    alone = collect_features(model, data, log_odds, Projector(DIM), **COUNTED)
    for each in found:
        assert torch.equal(each["features"], alone.gradients)
    chunks = sum(len(path.read_text()) for path in tmp_path.glob("chunks_*"))
    done = [range(20), range(20, 28)]  # when rank 1 died; some of them are checked
    checked = sum(
        row in rows for part, rows in zip(SHARDS, done, strict=True) for row in _some(part)
    )
    assert 5 < checked < 10
    assert before < chunks == checked + -(-SAMPLES // BATCH) + 1  # the one that died was lost


def test_a_begun_store_is_for_as_many_processes(tmp_path):
    model, data = problem()
    run_ranks(partial(killed, die=True), tmp_path)
    with pytest.raises(ValueError, match=r"begun by one process, got .*progress_0_of_2\.json"):
        collect_features(model, data, log_odds, store=tmp_path / "store", **OPTIONS)


@pytest.mark.parametrize("num_rows, size, unit", [(10, 3, 4), (37, 2, 4), (2, 5, 1), (64, 4, 16)])
def test_shards_are_all_rows_in_order(num_rows, size, unit):
    shards = [distributed._shard_of(rank, size, num_rows, unit) for rank in range(size)]
    assert [row for part in shards for row in part] == list(range(num_rows))
    assert all(part.start % unit == 0 for part in shards if part)
    lengths = [-(-len(part) // unit) for part in shards]
    assert max(lengths) - min(lengths) <= 1


def test_without_a_group_there_is_one_process():
    x = torch.arange(6.0).reshape(3, 2)
    assert distributed.place(None) == (0, 1)
    assert list(distributed.shard(3, None)) == [0, 1, 2]
    assert torch.equal(distributed.gram(x), x.T @ x)
    assert distributed.gathered(x, 3, None) is x
    distributed.check_same({"model": 1}, None)


def test_the_world_is_made_by_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match="`world` must be called under torchrun, got no RANK"):
        distributed.world()


SCRIPT = """
import torch
from ksm_ext.network import distributed
group = distributed.world()
rank, size = distributed.place(group)
x = torch.arange(14.0).reshape(7, 2)
assert size == 2 and torch.equal(distributed.gram(x, group), x.T @ x)
print("rank", rank, len(distributed.shard(7, distributed.world())), flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_torchrun(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    root = {"PYTHONPATH": str(Path(__file__).parent.parent.parent)}
    printed = subprocess.run(
        [*command, str(tmp_path / "script.py")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **root},
    ).stdout
    assert sorted(printed.split("\n")[:2]) == ["rank 0 3", "rank 1 4"]


class OwnLoader(DataLoader):
    """What may do anything while it is read."""


@pytest.mark.parametrize("loader_class", [DataLoader, OwnLoader])
@pytest.mark.parametrize("batch_size", [1, 5, 40])
def test_chunks_of_a_stretch_are_those_of_the_whole(batch_size, loader_class):
    loader = loader_class(Rows(), batch_size=batch_size)
    whole = [batch[0].tolist() for batch in chunks(loader, 4, 0)]
    assert [row for chunk in whole for row in chunk] == list(range(SAMPLES))
    for begin, end in [(0, 4), (2, 6), (9, 10), (5, 5)]:
        part = [batch[0].tolist() for batch in chunks(loader, 4, 4 * begin, 4 * end)]
        assert part == whole[begin:end]


class Rows(Dataset):
    """Samples that are their own numbers."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, row):
        return (torch.tensor(row),)
