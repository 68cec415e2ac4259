"""Threads, processes, extreme numbers and sizes, disks that fail, and nothing pickled."""

import ast
import errno
import os
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from torch.utils.data import DataLoader, Dataset

from ksm_ext import (
    ANOVA2,
    RBF,
    Exponential,
    Laplace,
    Linear,
    Polynomial,
    Projector,
    fit_surrogate,
    load_features,
    load_surrogate,
    ops,
    retrain_scores,
    subsets,
)
from ksm_ext.network.features import FeatureStore
from ksm_ext.surrogates.masks import Masks

ROOT = Path(__file__).resolve().parents[2]
READOUTS = ("loo", "shapley", "banzhaf")


def normal(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def answers(seed):
    """What every operator says to one problem, large enough for several threads."""
    masks, x = normal(seed, 600, 70) < 0, normal(seed, 64, 3000)
    features, offsets = normal(seed, 900, 24), torch.arange(0, 901, 90)
    packed, table = ops.pack_masks(masks), normal(seed, 71)
    surrogate = fit_surrogate(masks[:40, :9], x[:40, :2], kernel="rbf")
    return [
        packed,
        ops.mask_gram(packed, None, 70, hamming_table=table),
        ops.mask_gram_matmul(packed, packed, 70, x[:1].repeat(600, 1)[:, :4], overlap_table=table),
        Projector(256, seed=seed)(x),
        Projector(256, kind="rademacher", seed=seed)(x.float()),
        ops.kernel_gram(x, None, "rbf", gamma=1e-3),
        ops.task_gram(features, offsets),
        ops.glm_hvp(features, offsets, masks[:50, :10], normal(seed, 50, 24), ridge=0.1),
        ops.softmax_hvp(x, normal(seed + 1, 2, 64, 3000)),
        surrogate.attribute("shapley"),
    ]


def close(actual, expected, rtol=1e-9, atol=1e-9):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def equal(these, those):
    return len(these) == len(those) and all(map(torch.equal, these, those))


# Threads and processes


def test_eight_threads_give_the_bits_of_one():
    alone = [answers(seed) for seed in range(3)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(answers, list(range(3)) * 4))
    for number, answer in enumerate(together):
        assert equal(answer, alone[number % 3])


@pytest.mark.parametrize("kernel", ["auto", "rbf", "lasso", "least_squares"])
def test_fits_repeat_to_the_bit_and_agree_for_any_number_of_threads(kernel):
    masks, noise = normal(0, 150, 20) < 0, normal(1, 150, 3)
    scores = masks.double() @ normal(2, 20, 3) + 0.1 * noise
    before, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 1, 2, 3):
            torch.set_num_threads(num_threads)
            surrogate = fit_surrogate(masks, scores, kernel=kernel)
            found.append((surrogate.attribute("shapley"), surrogate.predict(masks)))
    finally:
        torch.set_num_threads(before)
    assert equal(found[0], found[1])
    for other in found[2:]:
        for one, same in zip(found[0], other, strict=True):
            close(one, same)


class Answers(Dataset):
    """Computed where they are asked for: in the workers of a loader."""

    def __len__(self):
        return 2

    def __getitem__(self, seed):
        return [answer.numpy() for answer in answers(seed)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_answer_alike(start):
    """After the parent's threads were at work, which a fork does not take along."""
    alone = [answers(seed) for seed in range(2)]
    loader = DataLoader(
        Answers(), batch_size=None, num_workers=1, multiprocessing_context=start, timeout=600
    )
    for expected, found in zip(alone, loader, strict=True):
        assert equal([torch.as_tensor(part) for part in found], expected)


# Extreme numbers and sizes

TINY = 2.0**-1060  # numbers below 2^-1022 have fewer digits


def test_denormals_are_numbers():
    """Powers of two only shift them: what a flush to zero would lose is seen exactly."""
    x = torch.randint(-8, 9, (5, 300)).double()
    projector = Projector(16, kind="rademacher", seed=3)
    exact = projector(x) * projector.dim**0.5
    assert torch.equal((projector(x * TINY) * projector.dim**0.5) / TINY, exact)
    masks = torch.rand(40, 20) < 0.5
    packed, table = ops.pack_masks(masks), torch.arange(21.0).double()
    scaled = ops.mask_gram(packed, None, 20, hamming_table=table * TINY)
    assert torch.equal(scaled / TINY, ops.mask_gram(packed, None, 20, hamming_table=table))
    v = torch.randint(-8, 9, (40, 3)).double()
    product = ops.mask_gram_matmul(packed, packed, 20, v, hamming_table=table * TINY)
    assert torch.equal(product / TINY, scaled / TINY @ v)
    assert torch.equal(ops.kernel_gram(x * TINY, None, "rbf"), torch.ones(5, 5).double())
    grams = ops.task_gram(x * TINY, torch.tensor([0, 2, 5]), torch.ones(5, 1).double())
    assert torch.equal(grams[:, :, 0] / TINY, torch.stack([x[:2].sum(0), x[2:].sum(0)]))


@pytest.mark.parametrize("power", [-300, 300])
def test_scores_of_any_size(power):
    masks, scores = torch.rand(20, 6) < 0.5, torch.randn(20, 2).double()
    scale = 2.0**power
    one, other = (
        fit_surrogate(masks, s, kernel=RBF(gamma=0.2), ridge=0.1) for s in (scores, scores * scale)
    )
    close(other.predict(masks) / scale, one.predict(masks), atol=1e-12)
    close(other.walsh_spectrum(), one.walsh_spectrum(), atol=1e-12)
    close(other.attribute("shapley") / scale, one.attribute("shapley"), atol=1e-12)


@pytest.mark.parametrize(
    "kernel, gamma",
    [
        *((RBF, 1e-300), (Laplace, 1e-20), (RBF, 1e3), (Laplace, 1e300)),
        *((Exponential, 1e3), (Exponential, 1e20), (Exponential, 1e300)),
    ],
)
def test_huge_and_tiny_scales_have_their_limits(kernel, gamma):
    """A kernel of nothing but ones predicts the mean, and so does one of the identity elsewhere."""
    every = subsets.all_subsets(5)
    odd = every.sum(1) % 2 == 1
    masks, elsewhere = every[odd], every[~odd]
    scores = normal(0, len(masks), 2)
    surrogate = fit_surrogate(masks, scores, kernel=kernel(gamma=gamma), ridge=1.0)
    mean = scores.mean(0)
    at_fitted = mean + (scores - mean) / 2 if gamma > 1 else mean.expand_as(scores)
    close(surrogate.predict(masks), at_fitted, rtol=0, atol=1e-8)
    close(surrogate.predict(elsewhere), mean.expand(len(elsewhere), 2), rtol=0, atol=1e-8)
    for readout in READOUTS:
        value, deviation = surrogate.attribute(readout, return_std=True)
        assert value.isfinite().all() and deviation.isfinite().all()
        assert surrogate.interactions(readout).isfinite().all()
    total = surrogate.predict(torch.tensor([[True] * 5, [False] * 5]))
    close(surrogate.attribute("shapley").sum(0), total[0] - total[1], rtol=0)
    assert surrogate.walsh_spectrum().isfinite().all()


@pytest.mark.parametrize(
    "kernel",
    [Linear(), ANOVA2(0.2), RBF(gamma=0.1), Exponential(gamma=0.3), Polynomial(gamma=0.1)],
    ids=str,
)
@pytest.mark.parametrize("m, n", [(3, 60), (10, 200), (150, 3), (60, 1)])
def test_more_tasks_than_subsets_and_fewer(kernel, m, n):
    masks, scores = normal(1, m, n) < 0, normal(2, m, 2)
    masks[0], masks[1] = True, False
    surrogate = fit_surrogate(masks, scores, kernel=kernel, ridge=0.3)
    gram = kernel.gram(Masks.of(masks))
    dual, intercept = reference.kernel_ridge(gram, scores, 0.3, True)
    close(surrogate.predict(masks), gram @ dual + intercept, 1e-7, 1e-7)
    ends = surrogate.predict(masks[:2])
    close(surrogate.attribute("shapley").sum(0), ends[0] - ends[1], 1e-7, 1e-7)


def test_ten_thousand_targets_are_single_fits():
    masks, scores = normal(3, 40, 8) < 0, normal(4, 40, 10_000)
    surrogate = fit_surrogate(masks, scores, kernel=RBF(gamma=0.2), share_ridge=False)
    values = surrogate.attribute("shapley")
    assert values.shape == (8, 10_000) and values.isfinite().all()
    for target in (0, 5_000, 9_999):
        single = fit_surrogate(masks, scores[:, target], kernel=RBF(gamma=0.2), share_ridge=False)
        close(values[:, target], single.attribute("shapley"), rtol=1e-7)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_ten_thousand_fits_leave_no_memory_behind(capsys):
    masks = normal(5, 24, 7) < 0
    scores = masks.double() @ normal(6, 7, 2) + 0.1 * normal(7, 24, 2)

    def fits(count):
        for number in range(count):
            search = {} if number % 20 == 0 else {"ridge": 0.1, "share_ridge": True}
            surrogate = fit_surrogate(masks, scores + number, kernel=RBF(gamma=0.2), **search)
            surrogate.attribute("shapley", return_std=True)
        return resident_bytes()

    fits(500)  # caches and the allocator's pools
    start = fits(500)
    end = fits(9_000)
    with capsys.disabled():
        print(f"\nresident after 1,000 fits: {start >> 20} MiB, after 10,000: {end >> 20} MiB")
    assert end - start < 16 << 20  # a leak of 2 KB for each fit


# Disks

META = {"num_samples": 4000, "dim": 8, "dtype": "float32"}


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 256 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    root = os.name == "posix" and os.geteuid() == 0
    if not root or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small file system")
    yield tmp_path
    subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill(folder):
    """Leave no byte of a disk free."""
    with (folder / "ballast").open("wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                assert error.errno == errno.ENOSPC


def linear_surrogate():
    return fit_surrogate(normal(7, 12, 4) < 0, normal(8, 12, 2), kernel="linear")


def train(mask, seed):
    return float(mask.sum()) + seed


def test_a_full_disk_loses_nothing(small_disk):
    surrogate, masks = linear_surrogate(), subsets.all_subsets(4)
    saved, features, runs = (small_disk / name for name in ("surrogate", "features", "runs.sqlite"))
    surrogate.save(saved)
    before = saved.read_bytes()
    retrain_scores(train, masks[:5], store=runs, progress=False)
    with FeatureStore.open(features, META) as store:
        store.append(torch.ones(10), torch.ones(10, 8))
        fill(small_disk)
        found = r"`store` must be .*No space left .* first 10 samples are"
        with pytest.raises(OSError, match=found):
            while store.num_done < 4000:  # the files have holes
                store.append(torch.ones(990), torch.ones(990, 8))
    with pytest.raises(OSError, match=r"`path` must be writable, got .*No space left on device"):
        surrogate.save(saved)
    with pytest.raises(OSError, match=r"`store` must be writable, got .*finished runs are kept"):
        retrain_scores(train, masks, store=runs, progress=False)
    assert saved.read_bytes() == before and load_surrogate(saved)
    (small_disk / "ballast").unlink()
    surrogate.save(saved)
    counted = []

    def counting(mask, seed):
        counted.append(mask)
        return train(mask, seed)

    retrain_scores(counting, masks, store=runs, on_change="keep", progress=False)
    assert len(counted) <= 11
    with FeatureStore.open(features, META) as store:
        assert store.num_done == 10
        store.append(torch.ones(3990), torch.ones(3990, 8))
    assert float(load_features(features).gradients.sum()) == 32_000


@contextmanager
def another_user():
    """Root may write everything: become somebody else."""
    user = os.geteuid()
    os.seteuid(user or 65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of POSIX")
def test_read_only_stores_are_read_and_stay_as_they_are():
    with tempfile.TemporaryDirectory() as name:  # tmp_path is closed to other users
        folder, meta = Path(name), META | {"num_samples": 4}
        surrogate = linear_surrogate()
        surrogate.save(folder / "surrogate")
        for rows, path in ((4, folder / "whole"), (2, folder / "part")):
            with FeatureStore.open(path, meta) as store:
                store.append(torch.ones(rows), torch.ones(rows, 8))
        files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        paths = [folder, *folder.rglob("*")]
        for path in paths:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            with another_user():
                answer = load_surrogate(folder / "surrogate").attribute("loo")
                assert torch.equal(answer, surrogate.attribute("loo"))
                assert float(load_features(folder / "whole").values.sum()) == 4
                with FeatureStore.open(folder / "whole", meta) as store:
                    assert store.num_done == 4
                form = "must be (writable|a writable folder), got .*Permission denied"
                with pytest.raises(PermissionError, match=f"`path` {form}"):
                    surrogate.save(folder / "surrogate")
                unfinished = FeatureStore.open(folder / "part", meta)
                with pytest.raises(PermissionError, match=f"`store` {form}"), unfinished:
                    pass
        finally:
            for path in paths:
                path.chmod(0o755)
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


# Nothing pickled

READERS = {"torch.load", "joblib.load", "yaml.load", "pandas.read_pickle"}
PICKLES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}


@pytest.mark.parametrize("folder", ["ksm_ext", "experiments", "benchmarks"])
def test_nothing_pickled_is_read(folder):
    """``np.load`` refuses objects unless asked for them, and ``yaml.safe_load`` makes none."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not PICKLES & set(names), f"{path}:{node.lineno}"
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in READERS, f"{path}:{node.lineno}"
                assert not any(
                    keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False"
                    for keyword in node.keywords
                ), f"{path}:{node.lineno}"


def test_a_pickle_is_no_store(tmp_path):
    """Reading it would have made the file."""
    witness = tmp_path / "made"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (witness,))

    path = tmp_path / "features"
    with FeatureStore.open(path, META | {"num_samples": 1}) as store:
        store.append(torch.ones(1), torch.ones(1, 8))
    np.save(path / "values.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    torch.save(Trap(), tmp_path / "surrogate")
    for load, stored in ((load_features, path), (load_surrogate, tmp_path / "surrogate")):
        with pytest.raises(ValueError, match="must be a"):
            load(stored)
    assert not witness.exists()
