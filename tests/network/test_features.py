"""Features on disk: resumed bit for bit wherever the run was killed, and refused if another's."""

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.lib.format import open_memmap
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ksm_ext import Projector
from ksm_ext.identity import fingerprint
from ksm_ext.network import features
from ksm_ext.network.batches import content_digests
from ksm_ext.network.engines import Ladder
from ksm_ext.network.features import Features, FeatureStore, load_features
from ksm_ext.network.gradients import collect_features
from ksm_ext.network.outputs import log_odds, margin
from tests.network.test_gradients import Dense, mlp, table

META = {"num_samples": 7, "dim": 3, "dtype": "float32", "projector": {"seed": 1, "kind": "signs"}}
FORMER = ("ksm_ext.outputs.log_odds", "ksm_ext.projection.Projector")
VALUES, GRADIENTS = torch.arange(7.0), torch.arange(21.0).reshape(7, 3)


def write(path, rows, meta=META):
    """Append the rows of the example that are not there yet, two by two, up to ``rows``."""
    with FeatureStore.open(path, meta) as store:
        while store.num_done < rows:
            block = slice(store.num_done, min(store.num_done + 2, rows))
            store.append(VALUES[block], GRADIENTS[block])


def collect(model, batch, path, output=log_odds, projector=None, **options):
    projector = projector or Dense(6)
    options = {"batch_size": 4, "progress": False} | options
    return collect_features(model, batch, output, projector, store=path, **options)


def same(features, expected):
    assert torch.equal(features.values, expected.values)
    assert torch.equal(features.gradients, expected.gradients)


def contents(path):
    return {name: (path / name).read_bytes() for name in ("values.npy", "gradients.npy")}


# What is stored


def test_rows_come_back(tmp_path):
    path = tmp_path / "deep" / "features"
    write(path, 7)
    features = load_features(path)
    assert len(features) == 7
    assert torch.equal(features.values, VALUES) and torch.equal(features.gradients, GRADIENTS)
    assert np.array_equal(np.load(path / "gradients.npy"), GRADIENTS.numpy())
    assert json.loads((path / "meta.json").read_text())["projector"] == META["projector"]
    names = ["gradients.npy", "lock", "meta.json", "progress.json", "values.npy"]
    assert sorted(os.listdir(path)) == names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_store_holds_what_memory_would(tmp_path, dtype):
    model, batch = mlp(dtype), table(dtype=dtype)
    expected = collect(model, batch, None)
    for _ in range(2):  # made, and found complete
        features = collect(model, batch, tmp_path / "store")
        assert features.gradients.dtype == dtype
        same(features, expected)


def test_a_complete_store_computes_five_samples_and_takes_no_lock(tmp_path, monkeypatch):
    model, batch = mlp(), table(40)
    collect(model, batch, tmp_path)
    (tmp_path / "lock").unlink()
    before, computed = contents(tmp_path), []

    def counted(ladder, model, output, batch, names, begin=None):
        computed.append(batch)
        return call(ladder, model, output, batch, names, begin)

    call = Ladder.__call__
    monkeypatch.setattr(Ladder, "__call__", counted)
    assert len(collect(model, DataLoader(TensorDataset(*batch), batch_size=3), tmp_path)) == 40
    rows = [int((batch[0] == x).all(1).nonzero()) for x, _ in computed]
    assert len(rows) == len(set(rows)) == 5 and {0, 39} < set(rows)
    assert not (tmp_path / "lock").exists() and contents(tmp_path) == before


def test_mapped_tensors_are_private(tmp_path):
    write(tmp_path, 7)
    before = contents(tmp_path)
    load_features(tmp_path).gradients.mul_(2)
    assert contents(tmp_path) == before
    assert torch.equal(load_features(tmp_path).gradients, GRADIENTS)


@pytest.mark.skipif(sys.platform != "linux", reason="files of holes, and maps larger than memory")
def test_a_table_larger_than_memory(tmp_path):
    """A million samples of 4096 numbers, of which a few are written."""
    meta = {"num_samples": 10**6, "dim": 4096 * 16, "dtype": "float32"}
    with FeatureStore.open(tmp_path, meta) as store:
        store.num_done = 10**6 - 2
        store.append(torch.ones(2), torch.ones(2, 4096 * 16))
    features = load_features(tmp_path)
    assert features.gradients.shape == (10**6, 4096 * 16)
    assert features.gradients[-3:].sum(dim=1).tolist() == [0, 4096 * 16, 4096 * 16]
    assert (tmp_path / "gradients.npy").stat().st_blocks * 512 < 2**20


def test_fingerprints():
    tensors = [("w", torch.randn(3, 2)), ("b", torch.zeros(()))]
    print_ = fingerprint(tensors)
    assert print_ == fingerprint([(name, tensor.clone()) for name, tensor in tensors])
    others = [
        [("v", tensors[0][1]), tensors[1]],
        [("w", tensors[0][1].T), tensors[1]],
        [("w", tensors[0][1].reshape(6)), tensors[1]],
        [("w", tensors[0][1].double()), tensors[1]],
        [("w", tensors[0][1].view(torch.int32)), tensors[1]],
        [tensors[0], ("b", -torch.zeros(()))],
        tensors[:1],
    ]
    assert len({print_, *map(fingerprint, others)}) == 1 + len(others)
    transposed = torch.randn(2, 3).bfloat16().T
    assert fingerprint([("w", transposed)]) == fingerprint([("w", transposed.contiguous())])


# Interruptions


@pytest.mark.parametrize("stop", range(0, 7, 2))
def test_an_interrupted_run_goes_on(tmp_path, stop):
    write(tmp_path / "whole", 7)
    write(tmp_path / "part", stop)
    with FeatureStore.open(tmp_path / "part", META) as store:
        assert store.num_done == stop
    write(tmp_path / "part", 7)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_rows_that_were_not_counted_are_written_again(tmp_path):
    write(tmp_path / "whole", 7)
    write(tmp_path / "part", 4)
    with (tmp_path / "part" / "gradients.npy").open("r+b") as file:
        file.seek(-3 * 12, os.SEEK_END)
        file.write(b"\xff" * 20)
    write(tmp_path / "part", 7)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


def test_rows_are_on_disk_before_they_are_counted(tmp_path, monkeypatch):
    events = []

    def spied(name, function):
        def call(*args, **named):
            events.append(name)
            return function(*args, **named)

        return call

    with FeatureStore.open(tmp_path, META) as store:
        for owner, name in ((os, "pwrite"), (os, "fsync"), (Path, "replace")):
            monkeypatch.setattr(owner, name, spied(name, getattr(owner, name)))
        store.append(VALUES[:2], GRADIENTS[:2])
    assert events == [*("pwrite", "fsync"), *("pwrite", "fsync"), *("fsync", "replace")]


def test_short_writes_are_completed(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:5], offset))
    write(tmp_path, 7)
    assert torch.equal(load_features(tmp_path).gradients, GRADIENTS)


def test_a_run_killed_while_it_laid_out_the_files(tmp_path, monkeypatch):
    def killed(*args, **named):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ksm_ext.network.features.open_memmap", killed)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path, 7)
    (tmp_path / ".progress.json.1.partial").write_bytes(b"{")
    write(tmp_path, 7, META | {"dim": 3})
    assert torch.equal(load_features(tmp_path).gradients, GRADIENTS)
    assert not list(tmp_path.glob(".*"))


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # so that a fork has everything its parent had
from ksm_ext.network.features import _num_done
from tests.network.test_features import contents, long_run

folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
long_run(folder / "whole")

counts = [0]
for kill in range(20):
    child = os.fork()
    if child == 0:
        try:
            long_run(folder / "part")
        finally:
            os._exit(0)
    if kill >= 3:  # the first ones die while they lay out the files or soon after
        target = counts[-1] + chance.randint(0, 2 * (1400 - counts[-1]) // (21 - kill))
        while _num_done(folder / "part") < target and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.0005)
    time.sleep(0.01 * chance.random())  # some moment of computing, writing, flushing, counting
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    counts.append(_num_done(folder / "part"))
print("rows done when killed:", counts)
assert counts == sorted(counts)
assert len(set(counts)) >= 8 and counts[-1] < 1500
long_run(folder / "part")
assert contents(folder / "part") == contents(folder / "whole")
assert (folder / "part" / "meta.json").read_bytes() == (folder / "whole" / "meta.json").read_bytes()
"""


def long_run(path):
    """Some hundred chunks, of the batches of a loader that ends them elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    loader = DataLoader(TensorDataset(*table(1500, 8, dtype=torch.float32)), batch_size=13)
    return collect(model, loader, path, projector=Dense(32), batch_size=6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forks of one process")
def test_runs_killed_at_random_moments_end_with_the_same_bits(tmp_path):
    run = run_python(KILLED, str(tmp_path), str(int.from_bytes(os.urandom(2), "big")))
    assert run.returncode == 0, run.stdout + run.stderr


def run_python(code, *arguments):
    """Run it in a process that finds this package and its tests."""
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


def test_one_writer_at_a_time(tmp_path):
    form = r"`store` must be a folder of its own, got .* that another run is writing to\. Wait"
    with FeatureStore.open(tmp_path, META), pytest.raises(RuntimeError, match=form):
        write(tmp_path, 7)
    write(tmp_path, 7)


# Refusals


def test_another_run_is_refused_by_the_field_that_differs(tmp_path):
    model, (x, y) = mlp(), table()
    collect(model, (x, y), tmp_path)
    other = mlp()
    changed = x.clone()
    changed[7, 0] = torch.nextafter(changed[7, 0], changed[7, 1])
    for field, run in {
        "projector.seed = 1 where": lambda: collect(model, (x, y), tmp_path, projector=Dense(6, 1)),
        "dim = 5": lambda: collect(model, (x, y), tmp_path, projector=Dense(5)),
        "num_samples = 9": lambda: collect(model, (x[:9], y[:9]), tmp_path),
        "output = 'ksm_ext.margin' where .* has 'ksm_ext.log_odds'": lambda: collect(
            model, (x, y), tmp_path, output=margin
        ),
        "model = ": lambda: collect(other, (x, y), tmp_path),
        "data = ": lambda: collect(model, (changed, y), tmp_path),
        "batch_size = 3": lambda: collect(model, (x, y), tmp_path, batch_size=3),
        "engine = 'loop' where .* has 'hooks'": lambda: collect(
            model, (x, y), tmp_path, engine="loop"
        ),
        "parameters.0.weight = None": lambda: collect(model, (x, y), tmp_path, parameters="2.*"),
        "dtype = 'float32'": lambda: collect(mlp(torch.float32), (x.float(), y), tmp_path),
    }.items():
        form = f"`store` must be a folder of the same features, got {field}.* Run it with the same"
        with pytest.raises(ValueError, match=form):
            run()
    assert len(collect(model, (x, y), tmp_path)) == 11


def output_with(scale):
    def output(model, batch):
        return scale * model(batch[0])[:, 0]

    return output


class Attributed(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.linear, self.factor = nn.Linear(4, 3).double(), factor

    def forward(self, x):
        return self.factor * self.linear(x)


class OwnProjector:
    """Says the same of itself whatever its factor."""

    dim = 2

    def __init__(self, factor):
        self.factor = factor

    def __repr__(self):
        return "OwnProjector()"

    def __call__(self, x, *, offset=0, out=None):
        return out.add_(self.factor * x[:, :2])


def with_weights_of(one, other):
    other.load_state_dict(one.state_dict())
    return other


def activated(activation):
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 3)).double()


def changes():
    """By the field that tells it: arguments of a call, and others that give other features."""
    torch.manual_seed(0)
    x, y = table(40)
    model, tanh, one = mlp(), activated(nn.Tanh()), Attributed(1.0)
    base = {"model": model, "batch": (x, y)}
    relu, nine = with_weights_of(tanh, activated(nn.ReLU())), with_weights_of(one, Attributed(9.0))
    row, label, order = x.clone(), y.clone(), torch.arange(40)
    row[7] += 1e-9
    label[23] = (label[23] + 1) % 3
    order[[11, 12]] = order[[12, 11]]
    power = lambda m, z, k: m(z[0])[:, 0] ** k  # noqa: E731
    yield "network.1", base | {"model": tanh}, base | {"model": relu}
    yield "network.model", base | {"model": one}, base | {"model": nine}
    outputs = [lambda m, z: m(z[0])[:, 0], lambda m, z: m(z[0])[:, 1]]
    yield "output.code", *(base | {"output": output} for output in outputs)
    yield "output.closure.scale", *(base | {"output": output_with(s)} for s in (1.0, 5.0))
    outputs = [partial(power, k=k) for k in (1, 2)]
    yield "output.keywords.k", *(base | {"output": output} for output in outputs)
    yield "projector.factor", *(base | {"projector": OwnProjector(k)} for k in (1.0, 2.0))
    yield "data", base, base | {"batch": (row, y)}
    yield "data", base, base | {"batch": (x, label)}
    yield "data", base, base | {"batch": (x[order], y[order])}


@pytest.mark.parametrize("number", range(9))
@pytest.mark.parametrize("is_complete", [True, False])
def test_no_change_goes_unnoticed(tmp_path, number, is_complete):
    field, one, other = list(changes())[number]
    if is_complete:
        first = collect(path=tmp_path, **one)
        assert torch.equal(collect(path=tmp_path, **one).gradients, first.gradients)
    else:
        with interrupted_after(2), pytest.raises(KeyboardInterrupt):
            collect(path=tmp_path, **one)
    form = f"a folder of the same features, got {field} = .* where .* has .*, or delete this one"
    with pytest.raises(ValueError, match=form):
        collect(path=tmp_path, **other)
    again = collect(path=tmp_path, **one)
    assert torch.equal(again.gradients, collect(path=None, **one).gradients)


@contextmanager
def interrupted_after(chunks):
    append = FeatureStore.append

    def interrupt(store, *blocks):
        if store.num_done >= 4 * chunks:
            raise KeyboardInterrupt
        append(store, *blocks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "append", interrupt)
        yield


class Rows(Dataset):
    """Samples of several lengths that a loader pads."""

    def __init__(self, lengths, changed=None):
        generator = torch.Generator().manual_seed(0)
        self.rows = [torch.rand(length, generator=generator) for length in lengths]
        if changed is not None:
            self.rows[changed][-1] += 1e-6

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


def digests(dataset, batch_size, size, rows=None, keep=()):
    loader = DataLoader(
        dataset, batch_size=batch_size, collate_fn=lambda rows: (torch.stack(rows),)
    )
    rows = range(len(dataset)) if rows is None else rows
    return content_digests(loader, size, rows, keep)


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 2), min_size=1, max_size=20),
    batch_size=st.integers(1, 8),
    size=st.integers(1, 6),
    chance=st.integers(0, 10**6),
)
def test_digests_of_data_see_every_row_and_no_batches(lengths, batch_size, size, chance):
    lengths = sorted(lengths)  # so that most batches can be stacked
    b = len(lengths)
    whole, _ = digests(Rows(lengths), 1, size)
    assert whole.shape == (-(-b // size), 16)
    if len(set(lengths)) == 1:
        assert torch.equal(digests(Rows(lengths), batch_size, size)[0], whole)
    start = chance % len(whole) * size
    part, kept = digests(Rows(lengths), 1, size, range(start, b), keep=[b - 1])
    assert torch.equal(part, whole[start // size :])
    assert torch.equal(kept[b - 1][0][0], Rows(lengths)[b - 1])
    changed = chance % b
    other, _ = digests(Rows(lengths, changed), 1, size)
    differs = (other != whole).any(1).nonzero()[:, 0].tolist()
    assert differs == [changed // size]


class Opaque:
    """What has no identity: a compiled object, as it were."""

    def __init__(self, factor):
        self.factor = factor

    def __reduce_ex__(self, protocol):
        raise TypeError("no state")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_has_no_identity_is_told_and_found_by_its_features(tmp_path, dtype):
    model, batch = mlp(dtype), table(40, dtype=dtype)
    assert collect(model, batch, tmp_path, output_with(2.0)).unidentified == ()
    path, opaque = tmp_path / "opaque", Opaque(2.0)

    def output(model, batch):
        return opaque.factor * model(batch[0])[:, 0]

    first = collect(model, batch, path, output)
    assert first.unidentified == (f"output.closure.opaque ({__name__}.Opaque)",)
    assert load_features(path).unidentified == first.unidentified
    assert torch.equal(collect(model, batch, path, output).gradients, first.gradients)
    opaque.factor = 2.1
    form = r"whose sample [0-9]+ is now another by 0\.048 of the largest\. Something changed that"
    with pytest.raises(ValueError, match=form):
        collect(model, batch, path, output)


def test_rows_that_are_damaged_are_found_where_they_are_looked_at(tmp_path):
    model, batch = mlp(), table(40)
    collect(model, batch, tmp_path)
    rows = open_memmap(tmp_path / "gradients.npy", mode="r+")
    rows[39] *= -1
    rows.flush()
    with pytest.raises(ValueError, match=r"whose sample 39 is now another by .*, or the rows are"):
        collect(model, batch, tmp_path)


def two_writers(path):
    for part, rows in enumerate((range(3), range(3, 7))):
        with FeatureStore.open(path, META, part=(part, 2), rows=rows) as store:
            for row in rows:
                store.append(VALUES[row : row + 1], GRADIENTS[row : row + 1])


WRITERS = {
    "one": lambda path: write(path, 7),
    "one that goes on": lambda path: [write(path, rows) for rows in (2, 4, 7)],
    "two": two_writers,
}


@pytest.mark.parametrize("name", ["values.npy", "gradients.npy"])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_no_flipped_bit_is_loaded(tmp_path, monkeypatch, writer, name):
    writer(tmp_path)
    same(load_features(tmp_path), Features(VALUES, GRADIENTS))
    whole = (tmp_path / name).read_bytes()
    first = len(whole) - 4 * (VALUES if name == "values.npy" else GRADIENTS).numel()
    for place in range(first, len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        (tmp_path / name).write_bytes(flipped)
        with pytest.raises(ValueError, match=f"whole {name}, got other bytes than were written"):
            load_features(tmp_path)
    monkeypatch.setattr(features, "CHECKED", 4 * 28 - 1)  # larger tables are checked if asked for
    for check in (None, False):
        load_features(tmp_path, check=check)
    with pytest.raises(ValueError, match="other bytes than were written"):
        load_features(tmp_path, check=True)


def test_a_folder_that_a_version_without_checksums_began(tmp_path):
    write(tmp_path, 4)
    (tmp_path / "progress.json").write_text('{"num_done": 4}')
    write(tmp_path, 7)
    same(load_features(tmp_path, check=True), Features(VALUES, GRADIENTS))
    (tmp_path / "progress.json").write_text('{"num_done": 7, "start": 0, "checksums": [1, "2"]}')
    with pytest.raises(ValueError, match=r"progress\.json, got start = 0, checksums = \[1, '2'\]"):
        load_features(tmp_path)


def test_other_precision_is_refused(tmp_path):
    model, batch = mlp(torch.float32), table(dtype=torch.float32)
    collect(model, batch, tmp_path)
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(ValueError, match=r"got precision\.float32_matmul = 'medium' where"):
            collect(model, batch, tmp_path)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_folder_of_the_first_format_is_loaded_and_not_continued(tmp_path):
    model, batch = mlp(), table()
    features = collect(model, batch, tmp_path)
    meta = json.loads((tmp_path / "meta.json").read_text())
    for name in ("libraries", "unidentified", "network", "precision"):
        del meta[name]
    meta |= {"format": "ksm_ext.features.1", "output": "log_odds"}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert torch.equal(load_features(tmp_path).gradients, features.gradients)
    with pytest.raises(ValueError, match=r"got format = 'ksm_ext\.features\.2' where .*delete"):
        collect(model, batch, tmp_path)


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_folder_that_names_former_modules_is_continued(tmp_path, is_complete):
    """``ksm_ext.outputs.log_odds`` and ``ksm_ext.projection.Projector``, before they moved."""
    model, batch, projector = mlp(), table(40), Projector(6)
    expected = collect(model, batch, tmp_path / "new", projector=projector)
    path = tmp_path / "old"
    if is_complete:
        collect(model, batch, path, projector=projector)
    else:
        with interrupted_after(2), pytest.raises(KeyboardInterrupt):
            collect(model, batch, path, projector=projector)
    meta = json.loads((path / "meta.json").read_text())
    assert (meta["output"], meta["projector"]["class"]) == ("ksm_ext.log_odds", "ksm_ext.Projector")
    meta["output"], meta["projector"]["class"] = FORMER
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"output = 'ksm_ext\.margin' where .* has .*log_odds'"):
        collect(model, batch, path, margin, projector)
    same(collect(model, batch, path, projector=projector), expected)


@pytest.mark.parametrize("path, error", [("", ValueError), (3, TypeError)])
def test_a_store_without_a_name_is_refused(tmp_path, monkeypatch, path, error):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match="`store` must be a path, got"):
        collect(mlp(), table(), path)
    with pytest.raises(error, match="`path` must be a path, got"):
        load_features(path)
    assert not list(tmp_path.iterdir())


def test_another_version_is_refused(tmp_path, monkeypatch):
    model, batch = mlp(), table()
    collect(model, batch, tmp_path)
    monkeypatch.setattr("ksm_ext.__version__", "9.9")
    with pytest.raises(ValueError, match=r"the same features, got version = '9\.9' where"):
        collect(model, batch, tmp_path)


def test_incomplete_features_are_not_loaded(tmp_path):
    write(tmp_path, 4)
    form = r"`path` must be a complete folder of features, got .* with 4 of 7 samples\. Collect"
    with pytest.raises(ValueError, match=form):
        load_features(tmp_path)


def test_a_folder_of_something_else(tmp_path):
    form = r"`path` must be a folder of features, got .* without meta.json\. Check"
    with pytest.raises(FileNotFoundError, match=form):
        load_features(tmp_path / "nowhere")
    (tmp_path / "values.npy").write_bytes(b"precious")
    form = r"`store` must be a new folder or one of features, got .* with a values.npy of something"
    with pytest.raises(ValueError, match=form):
        write(tmp_path, 7)
    assert (tmp_path / "values.npy").read_bytes() == b"precious"
    (tmp_path / "meta.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"with format 'other'\. This version reads format 'ksm_"):
        load_features(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gradients.npy", b"not an array"),
        ("gradients.npy", b""),
        ("gradients.npy", b"PK\x05\x06" + bytes(18)),
        ("gradients.npy", b"\x93NUMPY\x01\x00\x06\x00('''((\n"),
        ("values.npy", None),
        ("progress.json", b"{"),
        ("progress.json", b"[" * 100_000),
        ("progress.json", b'{"num_done": 1e400}'),
        ("progress.json", b'{"num_done": 8}'),
        ("meta.json", b"{"),
        ("meta.json", b"[]"),
    ],
)
@pytest.mark.parametrize("rows", [4, 7])
def test_damage_is_named(tmp_path, name, content, rows):
    write(tmp_path, rows)
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    form = rf"`store` must be a folder of features with a whole {name}, got .*\. The folder is dam"
    with pytest.raises(ValueError, match=form):
        load_features(tmp_path) if rows == 7 else write(tmp_path, 7)


@pytest.mark.parametrize(
    "array, layout",
    [
        (np.zeros((7, 4), np.float32), r"\(7, 4\)"),
        (np.asfortranarray(GRADIENTS.numpy()), r"\(7, 3\) by columns"),
    ],
)
def test_an_array_of_another_layout_is_damage(tmp_path, array, layout):
    write(tmp_path, 7)
    np.save(tmp_path / "gradients.npy", array)
    form = rf"whole gradients.npy, got float32 of shape {layout}\. The folder"
    with pytest.raises(ValueError, match=form):
        load_features(tmp_path)


@pytest.mark.parametrize(
    "change", [{"num_samples": "7"}, {"num_samples": 0}, {"dim": None}, {"dtype": "load"}]
)
def test_a_layout_that_cannot_be_is_damage(tmp_path, change):
    write(tmp_path, 7)
    stored = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(stored | change))
    ((name, value),) = change.items()
    with pytest.raises(ValueError, match=rf"whole meta.json, got {name} = {value!r}\. The folder"):
        load_features(tmp_path)


def test_what_follows_an_array_is_not_read(tmp_path):
    write(tmp_path, 7)
    with (tmp_path / "gradients.npy").open("ab") as file:
        file.write(b"more")
    assert torch.equal(load_features(tmp_path).gradients, GRADIENTS)


def test_blocks_that_do_not_fit(tmp_path):
    form = r"`blocks` must be the next rows of \(7,\), got shape \(2,\) behind 6 rows\. Append"
    with FeatureStore.open(tmp_path, META) as store:
        store.append(VALUES[:6], GRADIENTS[:6])
        with pytest.raises(ValueError, match=form):
            store.append(VALUES[:2], GRADIENTS[:2])
        with pytest.raises(ValueError, match=r"next rows of \(7, 3\), got shape \(1, 4\) behind 6"):
            store.append(VALUES[:1], torch.zeros(1, 4))
        assert store.num_done == 6


# Disks


@pytest.mark.parametrize("call", ["pwrite", "fsync"])
def test_a_full_disk_keeps_what_was_done(tmp_path, monkeypatch, call):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write(tmp_path / "whole", 7)
    write(tmp_path / "part", 4)
    form = r"be a writable folder, got .*: No space left on device\. Free .*the first 4 samples are"
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(OSError, match=form) as error:
            write(tmp_path / "part", 7)
    assert error.value.errno == errno.ENOSPC
    write(tmp_path / "part", 7)
    assert contents(tmp_path / "part") == contents(tmp_path / "whole")


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files by RLIMIT_FSIZE")
def test_a_write_that_really_breaks_off(tmp_path):
    """Rows of 12 bytes behind a header of 128, and no byte behind the 200th."""
    write(tmp_path / "whole", 7)
    write(tmp_path / "part", 4)
    code = f"""
    import resource, signal
    from pathlib import Path
    from tests.network.test_features import write
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, {resource.RLIM_INFINITY}))
    for name in ("part", "new"):
        try:
            write(Path({str(tmp_path)!r}) / name, 7)
        except OSError as error:
            print(error)
    """
    part, new = run_python(code).stdout.splitlines()
    assert "File too large. Free some space and run again: the first 6 samples are kept" in part
    assert "must be writable" in new or "File too large. Free some space or choose anot" in new
    for name in ("part", "new"):
        write(tmp_path / name, 7)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    form = r"`store` must be a writable folder, got .*/file: File exists\. Free some space or cho"
    with pytest.raises(FileExistsError, match=form):
        write(tmp_path / "file", 7)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_a_read_only_folder(tmp_path):
    write(tmp_path, 4)
    (tmp_path / "gradients.npy").chmod(0o400)
    with pytest.raises(PermissionError, match="`store` must be a writable folder"):
        write(tmp_path, 7)
