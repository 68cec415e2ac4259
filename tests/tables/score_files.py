"""One table of scores, written in every format."""

import json

import numpy as np
import pandas as pd
import torch

from ksm_ext.subsets import bernoulli

TASKS, TARGETS = ["wiki", "code", "naïve, quoted", "3"], ["loss", "accuracy"]
MASKS = bernoulli(4, 9, 0.5, seed=0)
DIGITS = {"double_precision": 15}
SCORES = torch.randn(9, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def frame():
    tasks = pd.DataFrame(MASKS.numpy(), columns=TASKS).astype(int)
    return pd.concat([tasks, pd.DataFrame(SCORES.numpy(), columns=TARGETS)], axis=1)


def worded(out, within):
    return frame().replace({task: {0: out, 1: within} for task in TASKS})


def arrays():
    names = {"task_names": TASKS, "target_names": TARGETS}
    return {"masks": MASKS.int().tolist(), "scores": SCORES.tolist()} | names


WRITERS = {
    "csv": lambda path: frame().to_csv(path, index=False),
    "csv with row numbers": lambda path: frame().to_csv(path),
    "csv with semicolons": lambda path: frame().to_csv(path, index=False, sep=";"),
    "csv with tabs": lambda path: frame().to_csv(path, index=False, sep="\t"),
    "csv of truth values": lambda path: worded(False, True).to_csv(path, index=False),
    "csv with a byte order mark": lambda path: frame().to_csv(
        path, index=False, encoding="utf-8-sig", lineterminator="\r\n"
    ),
    "csv of an old Mac": lambda path: path.write_bytes(
        frame().to_csv(index=False, lineterminator="\r").encode()
    ),
    "csv of yes and no": lambda path: worded("No", "Yes").to_csv(path, index=False),
    "csv of crosses": lambda path: worded("", "x").to_csv(path, index=False),
    "json records": lambda path: frame().to_json(path, orient="records", **DIGITS),
    "json split": lambda path: frame().to_json(path, orient="split", **DIGITS),
    "json lines": lambda path: frame().to_json(path, orient="records", lines=True, **DIGITS),
    "json lists": lambda path: path.write_text(json.dumps(frame().to_dict("list"))),
    "json arrays": lambda path: path.write_text(json.dumps(arrays())),
    "npz": lambda path: np.savez(path, **{k: np.array(v) for k, v in arrays().items()}),
    "parquet": lambda path: frame().to_parquet(path),
    "parquet of other kinds": lambda path: (
        frame()
        .astype({"wiki": "Int64", "code": "boolean", "3": "float32"})
        .replace({"naïve, quoted": {0: "out", 1: "in"}})
        .astype({"naïve, quoted": "category"})
        .to_parquet(path)
    ),
}


def check(table):
    assert table.masks.dtype == torch.bool and table.masks.equal(MASKS)
    torch.testing.assert_close(table.scores, SCORES, rtol=1e-12, atol=1e-12)
    assert (list(table.task_names), list(table.target_names)) == (TASKS, TARGETS)
