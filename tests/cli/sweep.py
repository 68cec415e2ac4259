"""A table of scores and its surrogate, for the tests of the command line."""

import io

import pandas as pd
import torch

from ksm_ext import RBF, fit_surrogate, subsets

TASKS = ["wiki", "code", "maths", "noise", "news"]
MASKS = subsets.mixed_sizes(5, 24, seed=0)


def scores():
    noise = torch.randn(24, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = MASKS.double()
    loss = 2 - x[:, 0] - 0.5 * x[:, 1] * x[:, 2] + x[:, 3]
    return torch.stack([loss, 0.5 - 0.2 * loss], 1) + 0.02 * noise


def frame():
    tasks = pd.DataFrame(MASKS.int().numpy(), columns=TASKS)
    return pd.concat([tasks, pd.DataFrame(scores().numpy(), columns=["loss", "accuracy"])], axis=1)


def surrogate():
    names = {"task_names": TASKS, "target_names": ["loss", "accuracy"]}
    return fit_surrogate(MASKS, scores(), kernel=RBF(gamma=0.1), ridge=0.05, **names)


def table(text):
    return pd.read_csv(io.StringIO(text))
