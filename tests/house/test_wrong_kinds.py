"""Arguments of a wrong kind, at the public functions of surrogates, selection and evaluation.

Each argument of a call that works is replaced by what it cannot be. The call works all the same, or
ends in an error of the package that names the argument: Python's own TypeError or AttributeError
would name a line inside.
"""

import inspect
import re
from itertools import product

import numpy as np
import pytest
import torch

from ksm_ext import (
    evaluation,
    fit_many,
    fit_surrogate,
    interop,
    more_subsets,
    next_best,
    selection,
    subsets,
)

WRONG = (
    *("yes", "", None, True, 2, -1, 0.5, 1e400, 10**400, float("nan"), 1j, [], {}, ["a", "b"]),
    *([None], [[]], {"a": 1}, object(), len, torch.nn.Linear, np.array(["a"]), np.zeros(0)),
    *(torch.zeros(2, 2, 2), range(3)),
)
OURS = re.compile(r"`[^`]+`.* must be .+, got .+\. \S", re.DOTALL)
FITTING = ("target_weights", "predicted_scores", "scores_b", "true_loo", "candidates", "start")
FITTING += (
    "keep",
    "is_bad",
    "known",
    "prior",
    "sizes",
    "masks",
    "scores",
    "size",
    "num_subsets",
    "arrays",
    "costs",
)
"""Arguments that have to fit others: an error may name either."""

MASKS = subsets.mixed_sizes(4, 12, seed=0)
SCORES = (MASKS.double() @ torch.tensor([1.0, -2.0, 0.5, 3.0]).double()).square()
BOTH = torch.stack([SCORES, SCORES.sqrt() + MASKS[:, 0]], 1)
MIXTURES = subsets.dirichlet(4, 12, seed=0)
SURROGATE = fit_surrogate(MASKS, BOTH, kernel="linear")
OF_MIXTURES = fit_surrogate(MIXTURES, MIXTURES @ torch.arange(4.0).double(), kernel="linear")


def predict(masks):
    return masks.double().sum(1)


def calls():
    """A call that works of every function, by its name: all its arguments are given."""
    fit = {"kernel": "linear", "ridge": "loo", "criterion": "error", "warp": "identity"}
    fit |= {"share_ridge": True, "center": True, "solver": "eigh", "noise_std": 0.1, "known": [0]}
    fit |= {"sample_weight": [1.0] * 12}
    fit |= {"missing": "error", "task_names": list("abcd"), "target_names": list("xy")}
    many = {"masks": MASKS, "scores": torch.stack([BOTH, BOTH + MASKS[:, :2]]), **fit}
    drawn = {"seed": 0, "allow_repeats": False, "allow_fewer": False, "device": "cpu"}
    up = {"maximize": True, "target_weights": [1.0]}
    greedy = {"predict": predict, "num_tasks": 4, "size": 2, "start": [0], **up}
    two = {"true_scores": BOTH, "predicted_scores": BOTH}
    found = [
        (
            fit_surrogate,
            {"masks": MASKS, "scores": BOTH, "estimates": None, "progress": False, **fit},
        ),
        (fit_many, many),
        (
            next_best,
            {
                "surrogate": SURROGATE,
                "num_subsets": 1,
                "readout": "loo",
                "candidates": None,
                "targets": ["0"],
                "seed": 0,
                "allow_fewer": False,
            },
        ),
        (more_subsets, {"surrogate": SURROGATE, "readout": "loo", "factor": 0.9, "seed": 0}),
        (
            selection.top_k,
            {"attributions": BOTH, "k": 2, "maximize": True, "target_weights": [1, 2]},
        ),
        (
            selection.settled,
            {
                "surrogate": SURROGATE,
                "k": 1,
                "readout": "loo",
                "maximize": True,
                "target": "0",
                "level": 0.9,
                "seed": 0,
            },
        ),
        (selection.greedy_forward, {**greedy, "candidates": [1, 2, 3]}),
        (selection.greedy_backward, {**greedy, "start": [0, 1, 2], "keep": [0]}),
        (
            selection.exact,
            {"predict": predict, "num_tasks": 4, "size": 2, "costs": None, "budget": None, **up},
        ),
        (
            selection.under_budget,
            {"predict": predict, "costs": [1.0, 2, 3, 4], "budget": 3.0, **up},
        ),
        (
            selection.best_mixture,
            {"surrogate": OF_MIXTURES, "bounds": (0.0, 0.5), "confidence": 0.5, "seed": 0, **up},
        ),
        (subsets.fixed_size, {"num_tasks": 5, "num_subsets": 3, "size": 2, **drawn}),
        (
            subsets.bernoulli,
            {
                "num_tasks": 5,
                "num_subsets": 3,
                "probability": 0.5,
                "allow_empty_and_full": False,
                **drawn,
            },
        ),
        (subsets.mixed_sizes, {"num_tasks": 5, "num_subsets": 3, "sizes": [2, 3], **drawn}),
        (
            subsets.paired,
            {"num_tasks": 5, "num_subsets": 4, "size": 2, "probability": None, **drawn},
        ),
        (
            subsets.design,
            {
                "num_tasks": 4,
                "num_subsets": 3,
                "readout": "loo",
                "known": MASKS[:1],
                "include_empty": True,
                "seed": 0,
                "allow_fewer": False,
                "device": "cpu",
            },
        ),
        (
            subsets.dirichlet,
            {
                "num_tasks": 3,
                "num_mixtures": 2,
                "prior": [1.0, 2, 3],
                "strength": 1.0,
                "minimum": 0.0,
                "maximum": 1.0,
                "seed": 0,
                "device": "cpu",
            },
        ),
        (subsets.leave_one_out, {"num_tasks": 3, "include_full": True, "device": "cpu"}),
        (subsets.leave_two_out, {"num_tasks": 3, "device": "cpu"}),
        (subsets.all_subsets, {"num_tasks": 3, "include_empty": True, "device": "cpu"}),
        (subsets.iterate_subsets, {"num_tasks": 3, "size": 2, "chunk_rows": 2}),
        (subsets.from_index_lists, {"index_lists": [[0], [1]], "num_tasks": 3, "device": "cpu"}),
        *(
            (function, {"masks": MASKS})
            for function in (
                subsets.to_index_lists,
                subsets.identical_subsets,
                subsets.merge_duplicate_tasks,
            )
        ),
        (evaluation.lds, {**two, "constant": "error"}),
        (evaluation.noise_ceiling, {"scores_a": BOTH, "scores_b": BOTH}),
        (evaluation.loo_correlation, {"attributions": BOTH, "true_loo": BOTH, "method": "pearson"}),
        (evaluation.residual_error, {**two, "pooled": False}),
        (evaluation.relative_error, {**two, "definition": "squared", "baseline": 1.0}),
        (evaluation.retrain_noise, {"masks": MASKS.repeat(2, 1), "scores": BOTH.repeat(2, 1)}),
        (evaluation.mislabel_auc, {"attributions": BOTH, "is_bad": MASKS[:, 0]}),
        (SURROGATE.predict, {"masks": MASKS, "return_std": True, "observed": True}),
        (SURROGATE.attribute, {"readout": "loo", "return_std": True, "scale_rest": None}),
        (OF_MIXTURES.attribute, {"readout": "loo", "return_std": True, "scale_rest": True}),
        (SURROGATE.interactions, {"readout": "loo", "return_std": True}),
        (SURROGATE.mean_score, {"readout": "loo"}),
        (interop.to_game, {"surrogate": SURROGATE, "target": 0, "normalize": True}),
        (interop.to_interaction_values, {"surrogate": SURROGATE, "index": "SII", "target": 0}),
        *(
            (export, {"surrogate": SURROGATE, "readout": "loo", "interactions": True, "level": 0.9})
            for export in (interop.to_pandas, interop.to_polars, interop.to_xarray)
        ),
        (
            interop.attribution_table,
            {
                "surrogate": SURROGATE,
                "readout": "loo",
                "interactions": False,
                "targets": [0],
                "sort": "size",
                "top": 2,
                "intervals": True,
                "level": 0.9,
            },
        ),
        (SURROGATE.attribution_covariance, {"readout": "loo", "relative": True}),
        (SURROGATE.walsh_spectrum, {"max_order": 2}),
        (SURROGATE.noise_range, {"level": 0.9}),
        (evaluation.jackknife, {"metric": evaluation.lds, "level": 0.9, "bounds": (-1.0, 1.0)}),
        (
            evaluation.bootstrap,
            {
                "metric": evaluation.lds,
                "resample": "rows",
                "num_resamples": 9,
                "level": 0.9,
                "method": "percentile",
                "seed": 0,
            },
        ),
    ]
    return {f"{number} {each[0].__name__}": each for number, each in enumerate(found)}


def asked(function, given):
    """The answer; what comes in parts is taken whole."""
    given = dict(given)
    if "metric" in given:
        answer = function(given.pop("metric"), BOTH, BOTH, **given)
    else:
        answer = function(**given)
    return list(answer) if inspect.isgenerator(answer) else answer


def brief(value):
    return repr(value)[:20].replace("\n", " ")


@pytest.mark.parametrize("name", calls())
def test_a_wrong_kind_is_an_error_that_names_the_argument(name):
    function, given = calls()[name]
    failed = []
    asked(function, given)
    for argument, wrong in product(given, WRONG):
        if argument != "metric" or wrong is not len:  # a function, whose error is its own
            try:
                asked(function, given | {argument: wrong})
            except Exception as error:
                text = str(error)
                named = re.findall(r"`([^`]+)`", text.split(" must be ")[0])
                ours = isinstance(error, (ValueError, TypeError)) and OURS.match(text)
                if not ours or not {argument, *FITTING} & set(
                    re.split(r"[\[(]", " ".join(named))[0].split()
                ):
                    failed.append(
                        f"{argument}={brief(wrong)}: {type(error).__name__}: {text[:150]}"
                    )
    assert not failed, "\n".join(failed)
