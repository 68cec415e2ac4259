"""What is fuzzed: the readers of files, and the code of packed masks.

A target takes the fuzzer's bytes and raises what it should not. Readers may refuse a file, by the
errors that they document and with the standard message; what they accept has to work.
"""

import io
import json
import os
import re
import shutil
import sqlite3
import tempfile
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import atheris
import numpy as np
import torch
from safetensors.torch import load, save

from ksm_ext import ANOVA2, RBF, fit_surrogate, load_surrogate, ops, subsets
from ksm_ext.network.features import FeatureStore, load_features
from ksm_ext.scores.runs import RunStore
from ksm_ext.surrogates.storage import checksum
from ksm_ext.tables.scores import read_scores

Provider = atheris.FuzzedDataProvider

FORM = re.compile(r"(`.+`|[\w.]+) must be .+, got .+\. .+", re.DOTALL)
# Values that other programs, or damage, might put where a reader looks for its own.
ODD_VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**400, 0.5, -1e-300, 1e308, float("nan")),
    *("", "a", "rbf", "float32", "float16", "object", "Tensor", "\ud800", [], ["a"], [[1, {}]], {}),
    {"name": "sum", "terms": []},
    {"name": "rbf", "gamma": "1"},
    {"name": "polynomial", "degree": float("inf"), "gamma": 1.0, "coef0": 0.0},
]
DTYPES = (torch.float32, torch.float64, torch.int64, torch.bool, torch.bfloat16, torch.uint8)
# Inputs that stand for choices of what is exchanged, where a file itself would begin with a zero.
EXCHANGES = [bytes((7 * i + step) % 255 + 1 for i in range(99)) for step in range(8)]
META = {"num_samples": 4, "dim": 3, "dtype": "float32", "model": {"name": "a"}}


def refused(error: Exception) -> None:
    """Raise it, unless it is a documented error in the form of the package's messages."""
    if not isinstance(error, (ValueError, OSError)) or not FORM.match(str(error)):
        raise error


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place in nested JSON, as a container and a key."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, part in inner:
        found.append((value, key))
        if isinstance(part, (dict, list)):
            found += places(part)
    return found


def spoil(provider: Provider, value: Any) -> None:
    """Delete or replace up to three parts of nested JSON."""
    for _ in range(provider.ConsumeIntInRange(1, 3)):
        options = places(value)
        if not options:
            return
        container, key = options[provider.ConsumeIntInRange(0, len(options) - 1)]
        if provider.ConsumeBool():
            odd = ODD_VALUES[provider.ConsumeIntInRange(0, len(ODD_VALUES) - 1)]
            container[key] = deepcopy(odd)  # or a list could come to hold itself
        else:
            del container[key]


def spoil_tensors(provider: Provider, tensors: dict[str, torch.Tensor]) -> None:
    """Delete, reshape, convert or overwrite one of several tensors."""
    name = sorted(tensors)[provider.ConsumeIntInRange(0, len(tensors) - 1)]
    change = provider.ConsumeIntInRange(0, 3)
    if change == 0:
        del tensors[name]
    elif change == 1:
        sizes = [provider.ConsumeIntInRange(0, 4) for _ in range(provider.ConsumeIntInRange(0, 3))]
        tensors[name] = torch.ones(sizes, dtype=tensors[name].dtype)
    elif change == 2:
        tensors[name] = tensors[name].to(DTYPES[provider.ConsumeIntInRange(0, len(DTYPES) - 1)])
    else:
        content = provider.ConsumeBytes(tensors[name].numel() * tensors[name].element_size())
        flat = tensors[name].reshape(-1).view(torch.uint8).clone()
        flat[: len(content)] = torch.tensor(list(content), dtype=torch.uint8)
        tensors[name] = flat.view(tensors[name].dtype).reshape(tensors[name].shape)


class Surrogates:
    """``load_surrogate`` on any bytes, and on files whose parts were exchanged."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "surrogate"
        masks = subsets.mixed_sizes(4, 9, seed=0)
        scores = torch.randn(9, 2, generator=torch.Generator().manual_seed(0)).double()
        kernels = [RBF(gamma=0.3) + 0.5 * ANOVA2(0.2), "lasso", "linear"]
        self.query = masks[:2]
        self.whole = []
        for kernel in kernels:
            fit_surrogate(masks, scores, kernel=kernel, share_ridge=False).save(self.path)
            self.whole.append(self.path.read_bytes())

    def seeds(self) -> list[bytes]:
        return [b"\0" + content for content in self.whole] + EXCHANGES

    def __call__(self, data: bytes) -> None:
        self.path.write_bytes(data[1:] if data[:1] == b"\0" else self.exchanged(Provider(data)))
        try:
            surrogate = load_surrogate(self.path)
        except (ValueError, OSError) as error:
            return refused(error)
        str(surrogate), str(surrogate.candidates)
        for ask in (surrogate.predict, lambda _: surrogate.attribute("loo")):
            try:
                ask(self.query[:, :1].expand(2, surrogate.masks.num_tasks))
            except ValueError as error:
                refused(error)

    def exchanged(self, provider: Provider) -> bytes:
        content = self.whole[provider.ConsumeIntInRange(0, len(self.whole) - 1)]
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        facts = json.loads(header["__metadata__"]["facts"])
        spoil(provider, facts) if provider.ConsumeBool() else spoil_tensors(provider, tensors)
        metadata = {"format": header["__metadata__"]["format"], "facts": json.dumps(facts)}
        metadata["checksum"] = checksum(metadata["facts"], tensors)  # of what is there now
        return save(tensors, metadata=metadata)


class Folders:
    """Folders of features of which one file is something else: read, and written further."""

    FILES = ("meta.json", "progress.json", "values.npy", "gradients.npy")

    def __init__(self, folder: Path) -> None:
        self.path = folder / "features"
        self.kept: list[dict[str, bytes]] = []
        for rows in (2, 4):
            with FeatureStore.open(self.path, META) as store:
                done = store.num_done
                store.append(torch.ones(rows - done), torch.ones(rows - done, 3))
            self.kept.append({name: (self.path / name).read_bytes() for name in self.FILES})

    def seeds(self) -> list[bytes]:
        places = [(kept, file) for kept in (0, 1) for file in range(len(self.FILES))]
        whole = [bytes([k, f, 1]) + self.kept[k][self.FILES[f]] for k, f in places]
        return whole + [bytes([k, f, 0]) + seed for k, f in places for seed in EXCHANGES[:1]]

    def __call__(self, data: bytes) -> None:
        if len(data) < 3:
            return
        content = self.kept[data[0] % 2]
        name = self.FILES[data[1] % len(self.FILES)]
        changed = data[3:]
        if data[2] % 2 == 0 and name.endswith("json"):
            value = json.loads(content[name])
            spoil(Provider(changed), value)
            changed = json.dumps(value).encode()
        for other in self.FILES:
            (self.path / other).write_bytes(changed if other == name else content[other])
        try:
            features = load_features(self.path)
            float(features.values.sum() + features.gradients.sum())
        except (ValueError, OSError) as error:
            refused(error)
        try:
            with FeatureStore.open(self.path, META) as store:
                rows = len(store.rows) - store.num_done
                if rows:
                    store.append(torch.ones(rows), torch.ones(rows, 3))
            load_features(self.path)
        except (ValueError, OSError) as error:
            refused(error)


class Runs:
    """Stores of runs: any bytes, and whole databases with other rows."""

    STATEMENTS = (
        "UPDATE metadata SET value = ? WHERE name = 'settings'",
        "UPDATE metadata SET value = ? WHERE name = 'num_tasks'",
        "UPDATE metadata SET value = ? WHERE name = 'num_targets'",
        "UPDATE metadata SET value = ? WHERE name = 'format'",
        "INSERT OR REPLACE INTO metadata VALUES (?1, ?1)",
        "UPDATE runs SET scores = ?",
        "UPDATE runs SET seed = ?",
        "UPDATE OR REPLACE runs SET subset = ?",
        "DELETE FROM metadata WHERE name != ?",
        "ALTER TABLE runs RENAME TO others",
        "ALTER TABLE runs RENAME COLUMN scores TO others",
        "CREATE VIEW more AS SELECT * FROM runs",
    )

    def __init__(self, folder: Path) -> None:
        self.path = folder / "runs.sqlite"
        with RunStore(self.path, 3, settings={"lr": 0.1}) as store:
            for seed in range(3):
                store.add("011", seed, np.array([1.0, 2.0]), 0.5)
        self.whole = self.path.read_bytes()

    def seeds(self) -> list[bytes]:
        return [b"\0" + self.whole, *EXCHANGES]

    def __call__(self, data: bytes) -> None:
        self.path.write_bytes(data[1:] if data[:1] == b"\0" else self.whole)
        if data[:1] != b"\0":
            self.change(Provider(data))
        try:
            with RunStore(self.path, 3, settings={"lr": 0.1}) as store:
                for scores in store.load({"011", "111"}, range(4)).values():
                    float(scores.sum())
                store.add("111", 3, np.array([1.0, 2.0]), 0.5)
        except (ValueError, OSError) as error:
            refused(error)
        finally:
            for beside in self.path.parent.glob("runs.sqlite-*"):
                beside.unlink()

    def change(self, provider: Provider) -> None:
        statement = self.STATEMENTS[provider.ConsumeIntInRange(0, len(self.STATEMENTS) - 1)]
        kind = provider.ConsumeIntInRange(0, 3)
        if kind == 0:
            value: Any = provider.ConsumeInt(8)
        elif kind == 1:
            value = provider.ConsumeBytes(64)
        else:
            value = provider.ConsumeUnicodeNoSurrogates(64)
        db = sqlite3.connect(self.path)
        try:
            db.execute(statement, (value,) if "?" in statement else ())
            if kind == 3 and "?" in statement:  # text that is no text
                db.execute("UPDATE metadata SET value = CAST(x'ff22' AS TEXT)")
            db.commit()
        except sqlite3.IntegrityError:
            pass
        finally:
            db.close()


class Tables:
    """``read_scores`` on any bytes, in one file or in one of masks beside one of scores."""

    def __init__(self, folder: Path) -> None:
        self.scores, self.masks = folder / "scores", folder / "masks"

    def seeds(self) -> list[bytes]:
        arrays = {"masks": [[1, 0], [0, 1]], "scores": [0.5, 2.5], "task_names": ["a", "b"]}
        packed = io.BytesIO()
        np.savez_compressed(packed, **{name: np.array(value) for name, value in arrays.items()})
        table = {"columns": ["a", "b", "loss"], "data": [[1, 0, 0.5], [0, 1, 2.5]]}
        records = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        alone = [
            b",a,b,loss,note\n0,1,0,.5,\n1,0,1,2.5,\n",
            b"a;b;loss\ryes;no;.5\rno;yes;1e400\r",
            *(json.dumps(value).encode() for value in (arrays, table, records)),
            "\n".join(map(json.dumps, records)).encode(),
            json.dumps({"train_w": [[1, 0]], "train_subset_scores": [[0.5]]}).encode(),
            packed.getvalue(),
        ]
        pairs = [
            (b"run,a,b\nx,1,0\ny,0,1\n", b"run,loss\ny,.5\nx,2.5\n"),
            (b"[[0, 2], [1]]", b"[[0.5], [2.5]]"),
            (b'[{"sampled_train_indices": [3, 0]}]', b'{"scores": [0.5]}'),
        ]
        both = [bytes([1, *len(a).to_bytes(2, "big")]) + a + b for a, b in pairs]
        return [bytes(3) + content for content in alone] + both

    def __call__(self, data: bytes) -> None:
        if len(data) < 4:
            return
        cut = 3 + int.from_bytes(data[1:3], "big")
        self.masks.write_bytes(data[3:cut])
        self.scores.write_bytes(data[cut:] if data[0] & 1 else data[3:])
        masks = self.masks if data[0] & 1 else None
        try:
            table = read_scores(self.scores, masks, weights=bool(data[0] & 2))
        except (ValueError, OSError) as error:
            return refused(error)
        n, t = len(table.task_names), len(table.target_names)
        assert table.masks.shape == (len(table.scores), n) and table.scores.shape[1] == t
        assert len(table.scores) and len(set(table.task_names)) == n
        assert len(set(table.target_names)) == t and not table.scores.isnan().any()
        str(table), table.role_table()
        if table.masks.dtype == torch.bool:
            table.merged()


class PackedMasks:
    """Packing and every product of packed masks, of any shapes, against counts by NumPy."""

    def __init__(self, folder: Path) -> None:
        pass

    def seeds(self) -> list[bytes]:
        return [
            bytes([m, l, n, t, 1, *range(40)]) for m, l, n, t in ((3, 2, 65, 1), (20, 17, 5, 2))
        ]

    def __call__(self, data: bytes) -> None:
        provider = Provider(data)
        m, l = provider.ConsumeIntInRange(0, 40), provider.ConsumeIntInRange(0, 40)
        n, t = provider.ConsumeIntInRange(0, 200), provider.ConsumeIntInRange(0, 5)
        dtype = (torch.float32, torch.float64)[provider.ConsumeBool()]
        which = provider.ConsumeIntInRange(1, 3)
        pad = provider.ConsumeIntInRange(0, 3)  # a view that starts anywhere
        content = np.frombuffer(provider.ConsumeBytes(provider.remaining_bytes()), np.uint8)
        memory = np.resize(content if content.size else np.zeros(1, np.uint8), (m + l) * n + pad)
        table = memory[pad:].reshape(m + l, n)
        x, y = (torch.from_numpy(part.copy()).view(torch.bool) for part in (table[:m], table[m:]))
        packed = [ops.pack_masks(part) for part in (x, y)]
        ones = (table != 0).astype(np.int64)
        for words, rows in zip(packed, (ones[:m], ones[m:]), strict=True):
            bits = np.unpackbits(words.numpy().view(np.uint8), axis=1, bitorder="little")
            assert np.array_equal(bits[:, :n], rows) and not bits[:, n:].any()
        counts = torch.arange(n + 1, dtype=dtype)
        a, b = counts.square() if which & 1 else None, 0.5 * counts if which & 2 else None
        for second, right in ((ones[m:], packed[1]), (ones[:m], None)):
            first = ones[:m]
            overlap = first @ second.T
            hamming = first.sum(1)[:, None] + second.sum(1) - 2 * overlap
            expected = (hamming**2 if which & 1 else 0) + (0.5 * overlap if which & 2 else 0)
            tables = {"hamming_table": a, "overlap_table": b}
            gram = ops.mask_gram(packed[0], right, n, **tables)
            assert np.array_equal(gram.numpy(), expected.reshape(gram.shape))
            v = torch.arange(len(second) * t, dtype=dtype).reshape(len(second), t) % 3
            product = ops.mask_gram_matmul(packed[0], right, n, v, **tables)
            exact = expected.reshape(gram.shape) @ v.double().numpy()
            assert np.allclose(product.numpy(), exact, rtol=1e-5, atol=1e-5)
            weights = counts[1:] % 3 / 8  # sums of these are exact
            shares = first * weights.numpy()
            distances = shares.sum(1)[:, None] + second @ weights.numpy() - 2 * shares @ second.T
            expected = np.exp(-np.sqrt(distances)).reshape(gram.shape)
            kernel = {"kernel": "exponential"}
            gram = ops.weighted_mask_gram(packed[0], right, n, weights, **kernel)
            assert np.allclose(gram.numpy(), expected, rtol=1e-5)
            product = ops.weighted_mask_gram_matmul(packed[0], right, n, weights, v, **kernel)
            assert np.allclose(product.numpy(), expected @ v.numpy(), rtol=1e-4, atol=1e-4)
        self.any_words(content, n, a, b)

    def any_words(self, content: np.ndarray, n: int, a: Any, b: Any) -> None:
        """Words that were never packed: refused, or without bits past n."""
        width = -(-n // 64)
        rows = len(content) // (8 * width) if width else 0
        if rows == 0:
            return
        octets = content[: 8 * width * rows].reshape(rows, 8 * width).copy()
        words = torch.from_numpy(octets.view(np.int64))
        bits = np.unpackbits(octets, axis=1, bitorder="little")
        try:
            ops.mask_gram(words, None, n, hamming_table=a, overlap_table=b)
        except RuntimeError as error:
            assert "must be packed masks of" in str(error) and bits[:, n:].any()
        else:
            assert not bits[:, n:].any()


TARGETS = {
    "surrogate": Surrogates,
    "features": Folders,
    "runs": Runs,
    "tables": Tables,
    "masks": PackedMasks,
}


class Workplace:
    """A folder in memory for a target's files, and one with the inputs it starts from."""

    def __init__(self, name: str) -> None:
        warnings.simplefilter("ignore")  # NumPy's, of headers that Python 2 wrote
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        self.folder = Path(tempfile.mkdtemp(prefix=f"fuzz-{name}-", dir=memory))
        self.target = TARGETS[name](self.folder)
        self.corpus = self.folder / "corpus"
        self.corpus.mkdir()
        for number, seed in enumerate(self.target.seeds()):
            (self.corpus / str(number)).write_bytes(seed)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
