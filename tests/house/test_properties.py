"""What holds for every problem: invariances, identities and bounds, over random designs.

Each property runs on a few problems here and on many among the slow tests, the same ones in every
run. :data:`ELSEWHERE` says where the public functions without a property have their oracles.
"""

import importlib
import inspect
import json
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

import ksm_ext
from ksm_ext import (
    EKFAC,
    Projector,
    collect_features,
    correlation,
    evaluation,
    fit_many,
    fit_surrogate,
    load_features,
    load_surrogate,
    ops,
    retrain_scores,
    selection,
    subsets,
)
from ksm_ext.arrays import ArrayKind, aligned, as_tensor
from ksm_ext.attribution.influence import influence, projected_influence, sample_influence
from ksm_ext.attribution.tracin import gradient_cosine, tracin
from ksm_ext.attribution.trak import trak
from ksm_ext.network.engines import evaluating
from ksm_ext.network.gradients import (
    parameter_names,
    per_sample_gradients,
    samples_of_pass,
    samples_together,
    usual_projector,
)
from ksm_ext.network.hessian import GaussNewton, Hessian, loss_gradients, unflatten
from ksm_ext.network.outputs import log_odds
from ksm_ext.network.solvers import BlockConjugateGradients, LiSSA, as_solver
from ksm_ext.network.spectrum import (
    hutch_pp_trace,
    hutchinson_trace,
    lanczos,
    per_sample_traces,
    spectral_density,
    top_eigenpairs,
)
from ksm_ext.surrogates.kernels import KERNELS, as_kernel, by_name, from_description, grams
from ksm_ext.surrogates.masks import Masks

FEW = settings(derandomize=True, deadline=None, database=None, max_examples=8)
MORE = settings(FEW, max_examples=200)
THOROUGH = []
READOUTS = ("loo", "shapley", "banzhaf")
SEEDS, SIZES, SCALES = st.integers(0, 10**6), st.integers(0, 40), st.floats(0.01, 3.0)


def holds(**strategies):
    """Checks a property on a few examples, and on many in :func:`test_thoroughly`."""

    def decorate(test):
        THOROUGH.append(pytest.param(MORE(given(**strategies)(test)), id=test.__name__[5:]))
        return FEW(given(**strategies)(test))

    return decorate


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, *shape):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@st.composite
def problems(draw, min_tasks=1, kernels=tuple(KERNELS), max_tasks=8):
    """Masks of different rows, scores, and a kernel with a scale."""
    n, m = draw(st.integers(min_tasks, max_tasks)), draw(st.integers(3, 14))
    t, seed = draw(st.integers(1, 3)), draw(SEEDS)
    masks = torch.rand(m, n, generator=generator(seed)) < 0.5
    masks[0], masks[1] = True, False
    return masks, normal(seed + 1, m, t), make_kernel(draw(st.sampled_from(kernels)), draw(SCALES))


def make_kernel(name, scale):
    if name == "linear":
        return ksm_ext.Linear()
    if name == "anova2":
        return ksm_ext.ANOVA2(pair_weight=scale)
    if name == "size":
        return ksm_ext.Size(degree=1 + int(10 * scale) % 4)
    return KERNELS[name](gamma=scale)


def fitted(problem, **options):
    masks, scores, kernel = problem
    return fit_surrogate(masks, scores, **({"kernel": kernel, "ridge": 0.1} | options))


def close(actual, expected, tolerance=1e-7):
    scale = max(1.0, float(torch.as_tensor(expected).abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


# Surrogates


@holds(
    shape=st.tuples(st.integers(1, 7), st.integers(6, 16), st.integers(4, 6), st.integers(0, 3)),
    shared=st.booleans(),
    odd=st.sampled_from(["", "empty", "repeats", "constant target", "constant task"]),
    options=st.sampled_from(
        [
            {},
            {"kernel": "rbf"},
            {"criterion": "rank"},
            {"criterion": "attribution"},
            {"center": False},
            {"warp": "normal", "kernel": "linear"},
        ]
    ),
    seed=SEEDS,
)
def test_many_fits_are_fits_one_by_one(shape, shared, odd, options, seed):
    b, m, n, t = shape
    orders = [torch.randperm(2**n, generator=generator(seed + i))[:m] for i in range(b)]
    masks = subsets.all_subsets(n)[torch.stack(orders)]  # (b, m, n)
    masks = masks[:1].repeat(b, 1, 1) if shared else masks
    scores = masks.double() @ normal(seed, b, n, max(t, 1)) + normal(seed + 1, b, m, max(t, 1))
    if odd == "empty":
        masks[:, 0], scores[0, 0] = False, 30.0
    elif odd == "repeats":
        masks[:, 0] = masks[:, 1]
    elif odd == "constant target" and t > 1:
        scores[0, :, 0] = 2.0
    elif odd == "constant task":
        masks[:, :, 0] = True
    scores = scores if t else scores[..., 0]
    many = fit_many(masks[0] if shared else masks, scores, **options)
    for one, table, outcome in zip(many, masks, scores, strict=True):
        alone = fit_surrogate(table, outcome, **options)
        for ask in (
            lambda s: s.predict(table, return_std=True),  # noqa: B023
            lambda s: s.attribute("shapley", return_std=True),
            lambda s: (s.loo_residuals, s.scores, s.loo_error, s.nugget_share),
        ):
            for found, expected in zip(ask(one), ask(alone), strict=True):
                close(found, expected, 1e-6)
        assert one.sharing == alone.sharing and one.excluded.equal(alone.excluded)
        for column in ("error", "ridge", "rank_correlation", "num_subsets"):
            found, expected = (
                torch.tensor([getattr(row, column) for row in fit.candidates], dtype=torch.float64)
                for fit in (one, alone)
            )
            close(found.nan_to_num(), expected.nan_to_num(), 1e-6)


@holds(
    seed=SEEDS,
    noise=st.sampled_from([None, 0.1, "run", "row", "target"]),
    known=st.sampled_from([None, "rows", "each"]),
    gaps=st.booleans(),
    ridge=st.sampled_from(["loo", 0.1]),
)
def test_many_fits_know_noise_exact_scores_and_gaps_as_fits_one_by_one(
    seed, noise, known, gaps, ridge
):
    b, m, t = 3, 12, 2
    masks = subsets.all_subsets(5)[torch.randperm(32, generator=generator(seed))[:m]]
    scores = masks.double() @ normal(seed, b, 5, t) + 0.3 * normal(seed + 1, b, m, t)
    if gaps:
        scores[0, 2, 0] = torch.nan
    deviations = 0.1 + torch.rand(b, m, t, generator=generator(seed)).double()
    flags = torch.rand(b, m, generator=generator(seed + 2)) < 0.2
    of_all = {None: None, 0.1: 0.1, "target": deviations[0, 0], "row": deviations[..., 0]}
    given = {
        "noise_std": deviations if noise == "run" else of_all[noise],
        "known": {None: None, "rows": [1, 4], "each": flags}[known],
    }
    options = {"kernel": ["rbf", "linear"], "ridge": ridge, "missing": "drop"}
    for i, one in enumerate(fit_many(masks, scores, **given, **options)):
        own = dict(given)
        if noise in ("run", "row"):
            own["noise_std"] = given["noise_std"][i]
        if known == "each":
            own["known"] = flags[i]
        alone = fit_surrogate(masks, scores[i], **own, **options)
        assert one.known.equal(alone.known) and (one.noise is None) is (alone.noise is None)
        for ask in (
            lambda s: s.predict(masks, return_std=True),
            lambda s: s.attribute("shapley", return_std=True),
            lambda s: (s.loo_residuals.nan_to_num(), s.nugget_share, s.noise_range()),
        ):
            for found, expected in zip(ask(one), ask(alone), strict=True):
                close(found, expected, 1e-6)


@holds(seed=SEEDS, m=st.integers(1, 20), n=st.integers(1, 80), weights=st.booleans())
def test_gram_matrices_of_many_kernels_are_those_of_each(seed, m, n, weights):
    tables = [torch.rand(m, n, generator=generator(seed + i)) < 0.5 for i in range(2)]
    tables = [Masks(0.5 * table.double() if weights else table) for table in tables]
    scales = (0.1, 0.7)
    kernels = [[make_kernel(name, scale) for name in KERNELS] for scale in scales]
    decays = tuple((torch.rand(n, generator=generator(seed)) + 0.1).tolist())
    kernels = [[*each, ksm_ext.RBF(decays), ksm_ext.Exponential(decays, 0.5)] for each in kernels]
    found = grams(kernels, tables)
    for matrices, each, masks in zip(found, kernels, tables, strict=True):
        for matrix, kernel in zip(matrices, each, strict=True):
            close(matrix, kernel.gram(masks), 1e-13)


@holds(problem=problems(), seed=SEEDS)
def test_the_order_of_subsets_and_targets_is_no_information(problem, seed):
    masks, scores, kernel = problem
    rows = torch.randperm(len(masks), generator=generator(seed))
    targets = torch.randperm(scores.shape[1], generator=generator(seed))
    one, other = fitted(problem), fitted((masks[rows], scores[rows][:, targets], kernel))
    close(other.predict(masks), one.predict(masks)[:, targets])
    place = (other.masks.values[:, None] == one.masks.values).all(2).long().argmax(1)
    close(other.loo_residuals, one.loo_residuals[place][:, targets])


@holds(problem=problems(), seed=SEEDS, missing=st.booleans(), readout=st.sampled_from(READOUTS))
def test_a_row_of_some_weight_is_as_many_rows(problem, seed, missing, readout):
    masks, scores, kernel = problem
    if missing and len(masks) > 5:
        scores[-1, 0] = torch.nan
    times = torch.randint(0, 4, (len(masks),), generator=generator(seed))
    times[:4] = times[:4].clamp_min(1)
    rows = torch.arange(len(masks)).repeat_interleave(times)
    repeated = fitted((masks[rows], scores[rows], kernel), missing="drop")
    weighted = fitted(problem, missing="drop", sample_weight=times)
    for ask in (lambda s: s.predict(masks, True), lambda s: s.attribute(readout, True)):
        for found, expected in zip(ask(weighted), ask(repeated), strict=True):
            close(found, expected)
    gaps = weighted.loo_residuals.isnan()
    assert torch.equal(gaps, repeated.loo_residuals.isnan())
    close(weighted.loo_residuals.nan_to_num(), repeated.loo_residuals.nan_to_num())


@holds(problem=problems(), seed=SEEDS, readout=st.sampled_from(READOUTS))
def test_names_of_tasks_are_no_information(problem, seed, readout):
    masks, scores, kernel = problem
    order = torch.randperm(masks.shape[1], generator=generator(seed))
    one, other = fitted(problem), fitted((masks[:, order], scores, kernel))
    close(other.attribute(readout), one.attribute(readout)[order])
    close(other.interactions(readout), one.interactions(readout)[order][:, order])


@holds(problem=problems(), shift=st.floats(-5, 5), factor=st.floats(0.01, 5))
def test_units_are_kept(problem, shift, factor):
    masks, scores, kernel = problem
    one, other = fitted(problem), fitted((masks, factor * scores + shift, kernel))
    close(other.predict(masks), factor * one.predict(masks) + shift)
    close(other.attribute("shapley"), factor * one.attribute("shapley"))


@holds(problem=problems())
def test_shapley_values_share_out_all_there_is(problem):
    surrogate = fitted(problem)
    n = problem[0].shape[1]
    ends = surrogate.predict(torch.tensor([[True] * n, [False] * n]))
    close(surrogate.attribute("shapley").sum(0), ends[0] - ends[1])


@holds(problem=problems(), readout=st.sampled_from(("taylor", "faithful")))
def test_pairs_and_tasks_share_out_all_there_is(problem, readout):
    """Tasks having their Shapley value less half of their pairs; with Taylor's, F of them alone."""
    surrogate = fitted(problem)
    n = problem[0].shape[1]
    pairs = surrogate.interactions(readout)
    tasks = surrogate.attribute("shapley") - pairs.sum(1) / 2
    masks = torch.cat([torch.ones(1, n), torch.zeros(1, n), torch.eye(n)]).bool()
    full, empty, *single = surrogate.predict(masks, observed=True)
    close(tasks.sum(0) + pairs.sum((0, 1)) / 2, full - empty)
    if readout == "taylor":
        close(tasks, torch.stack(single) - empty)


@holds(problem=problems(), readout=st.sampled_from(READOUTS))
def test_mean_scores_are_those_of_what_readouts_compare(problem, readout):
    """Of all subsets, of all sizes alike, and the full one: as the scores of all subsets say."""
    surrogate = fitted(problem)
    every = subsets.all_subsets(problem[0].shape[1])
    scores, sizes = surrogate.predict(every, observed=True), every.sum(1)
    share = {"banzhaf": torch.ones(len(every)), "loo": (sizes == every.shape[1]).float()}
    share["shapley"] = 1 / sizes.bincount()[sizes]
    weights = (share[readout] / share[readout].sum()).double()
    close(surrogate.mean_score(readout), weights @ scores)


@holds(
    problem=problems(kernels=("linear", "polynomial", "anova2")), readout=st.sampled_from(READOUTS)
)
def test_a_dummy_has_no_effect(problem, readout):
    masks, scores, kernel = problem
    alone = torch.cat([masks, torch.zeros(len(masks), 1, dtype=torch.bool)], dim=1)
    surrogate = fitted((alone, scores, kernel))
    close(surrogate.attribute(readout)[-1], torch.zeros_like(scores[0]))
    close(surrogate.attribute(readout)[:-1], fitted(problem).attribute(readout))


@holds(problem=problems(), readout=st.sampled_from(READOUTS))
def test_tasks_that_come_together_are_equal(problem, readout):
    masks, scores, kernel = problem
    surrogate = fitted((torch.cat([masks, masks[:, :1]], dim=1), scores, kernel))
    values, pairs = surrogate.attribute(readout), surrogate.interactions(readout)
    close(values[0], values[-1])
    assert torch.equal(pairs, pairs.transpose(0, 1))
    assert not pairs.diagonal().any()


@st.composite
def decaying(draw):
    """A problem, and its kernel with a decay for each task and an amplitude."""
    masks, scores, kernel = draw(problems(min_tasks=2, kernels=("rbf", "laplace", "exponential")))
    scales = torch.rand(masks.shape[1], generator=generator(draw(SEEDS))) + 0.1
    gamma = tuple(float(kernel.gamma * scale) for scale in scales)
    return masks, scores, replace(kernel, gamma=gamma, amplitude=draw(st.floats(-3, 3)))


def alike(one, other, order=slice(None)):
    """Whether two surrogates answer alike, tasks of the first in ``order``."""
    close(one.walsh_spectrum(), other.walsh_spectrum(), 1e-6)
    for readout in READOUTS:
        for ask in (one.attribute, other.attribute), (one.interactions, other.interactions):
            pairs = zip(*(each(readout, return_std=True) for each in ask), strict=True)
            for found, expected in pairs:
                found = found[order]
                close(found if found.ndim == 2 else found[:, order], expected, 1e-6)


@holds(problem=decaying(), seed=SEEDS)
def test_decays_go_with_their_tasks(problem, seed):
    masks, scores, kernel = problem
    order = torch.randperm(masks.shape[1], generator=generator(seed))
    moved = replace(kernel, gamma=tuple(kernel.gamma[i] for i in order))
    alike(fitted(problem), fitted((masks[:, order], scores, moved)), order)


@holds(problem=decaying())
def test_equal_decays_are_one(problem):
    masks, scores, kernel = problem
    one = replace(kernel, gamma=kernel.gamma[0])
    every = replace(one, gamma=(one.gamma,) * masks.shape[1])
    alike(fitted((masks, scores, one)), fitted((masks, scores, every)))


@holds(problem=decaying(), ever=st.booleans(), place=st.integers(0, 2))
def test_decays_of_tasks_that_never_vary_are_no_information(problem, ever, place):
    masks, scores, kernel = problem
    wider = torch.cat([masks[:, :place], torch.full_like(masks[:, :1], ever), masks[:, place:]], 1)
    gamma = (*kernel.gamma[:place], 7.0, *kernel.gamma[place:])
    found = fitted((wider, scores, replace(kernel, gamma=gamma)))
    kept = torch.arange(wider.shape[1]) != place
    for readout in READOUTS:
        values = found.attribute(readout)
        assert not values[place].any()
        close(values[kept], fitted(problem).attribute(readout))


@holds(problem=decaying())
def test_shapley_values_share_out_what_decays_and_amplitudes_predict(problem):
    test_shapley_values_share_out_all_there_is.hypothesis.inner_test(problem)


@holds(problem=problems())
def test_the_orders_of_a_spectrum_are_all_there_is(problem):
    fractions = fitted(problem).walsh_spectrum()
    assert (fractions >= -1e-9).all()
    close(fractions.sum(0), (fractions.sum(0) > 0.5).double())


@holds(problem=problems())
def test_deviations_are_numbers(problem):
    surrogate = fitted(problem)
    answers = [surrogate.attribute(readout, return_std=True) for readout in READOUTS]
    for _, deviations in [*answers, surrogate.predict(problem[0], return_std=True)]:
        assert deviations.isfinite().all() and (deviations >= 0).all()


@holds(problem=problems(max_tasks=5), kind=st.sampled_from(["numpy", "pandas", "list", "float32"]))
def test_kinds_of_tables_are_no_information(problem, kind):
    masks, scores, kernel = problem
    as_kind = {
        "numpy": lambda table: table.numpy(),
        "pandas": lambda table: pd.DataFrame(table.numpy()),
        "list": lambda table: table.tolist(),
        "float32": lambda table: table.float(),
    }[kind]
    one, other = fitted(problem), fitted((as_kind(masks), as_kind(scores), kernel))
    assert other.kind == ArrayKind.of(as_kind(scores))
    answer = as_tensor("answer", other.attribute("banzhaf"))
    close(answer.double(), one.attribute("banzhaf"), 1e-5 if kind == "float32" else 1e-12)


LABELLED = ("pandas", "xarray", "transposed")


def labelled(kind, values, rows, columns):
    """A table with labels; of xarray also with its dimensions the other way round."""
    if kind == "pandas":
        return pd.DataFrame(values.numpy(), rows, columns)
    xarray = pytest.importorskip("xarray")
    dims = ("subset", "task" if columns[0] == "task 0" else "target")
    table = xarray.DataArray(values.numpy(), dict(zip(dims, (rows, columns), strict=True)), dims)
    return table.T if kind == "transposed" else table


@holds(problem=problems(), kind=st.sampled_from(LABELLED), seed=SEEDS)
def test_labels_decide_the_order_and_nothing_else(problem, kind, seed):
    masks, scores, kernel = problem
    (m, n), t = masks.shape, scores.shape[1]
    rows, tasks = [f"run {i}" for i in range(m)], [f"task {i}" for i in range(n)]
    targets = [f"target {i}" for i in range(t)]
    of_rows, of_tasks = (torch.randperm(k, generator=generator(seed)) for k in (m, n))
    shuffled = labelled(kind, scores[of_rows], [rows[i] for i in of_rows], targets)
    one = fitted((labelled(kind, masks, rows, tasks), shuffled, kernel))
    other = fitted(problem)
    assert torch.equal(one.scores, other.scores) and one.task_names == tuple(tasks)
    query = labelled(kind, masks[:, of_tasks], rows, [tasks[i] for i in of_tasks])
    close(as_tensor("answer", one.predict(query)), other.predict(masks), 1e-12)
    bare = aligned({"masks": (masks, "subset", "task"), "scores": (scores, "subset", "target")})
    assert bare[0] is masks and bare[1] is scores


@holds(
    m=st.integers(1, 5),
    n=st.integers(1, 4),
    missing=st.booleans(),
    kind=st.sampled_from(
        ["masked", "nullable", "objects", "big-endian", "long double", "float8", "list of tensors"]
    ),
    seed=SEEDS,
)
def test_every_kind_of_number_has_its_value(m, n, missing, kind, seed):
    expected = torch.randint(0, 7, (m, n), generator=generator(seed)).double()
    absent = (normal(seed, m, n) < 0) & missing
    array = expected.numpy()
    if kind in ("masked", "nullable", "objects"):
        expected = expected.masked_fill(absent, math.nan)
    objects = np.where(absent.numpy(), None, array)
    made = {
        "masked": lambda: np.ma.masked_array(array.astype(">i4"), absent.numpy()),
        "nullable": lambda: pd.DataFrame(objects).astype("Int64"),
        "objects": lambda: objects.tolist(),
        "big-endian": lambda: array.astype(">f4"),
        "long double": lambda: array.astype(np.longdouble),
        "float8": lambda: expected.to(torch.float8_e5m2),  # exact up to 8
        "list of tensors": lambda: [row.requires_grad_() for row in expected.clone()],
    }[kind]()
    found = as_tensor("x", made)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0, equal_nan=True)


@holds(problem=problems(), kernel=st.sampled_from(["auto", "linear", "rbf"]))
def test_what_is_saved_answers_alike(problem, kernel, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "surrogate"
    surrogate = fitted(problem, kernel=kernel, ridge="loo")
    surrogate.save(path)
    loaded = load_surrogate(path)
    assert torch.equal(loaded.predict(problem[0]), surrogate.predict(problem[0]))
    assert torch.equal(loaded.attribute("shapley"), surrogate.attribute("shapley"))


# Kernels


@holds(name=st.sampled_from(list(KERNELS)), scale=SCALES, n=st.integers(1, 130), seed=SEEDS)
def test_grams_are_symmetric_and_semi_definite(name, scale, n, seed):
    kernel = make_kernel(name, scale)
    for rows in (normal(seed, 9, n) < 0, normal(seed, 9, n)):
        gram = kernel.gram(Masks.of(rows))
        close(gram, gram.T, 1e-12)  # the products of real weights are not symmetric to a bit
        close(gram.diagonal(), kernel.diagonal(Masks.of(rows)), 1e-9)
        lowest = torch.linalg.eigvalsh(gram)[0]
        assert lowest >= -1e-7 * gram.diagonal().max().clamp_min(1)
    both = kernel + 0.5 * make_kernel("rbf", scale)
    assert from_description(both.describe()) == both
    assert type(by_name(name)) is KERNELS[name]


@holds(
    number=st.floats(0.01, 3.0),
    kind=st.sampled_from([np.float32, np.float64, np.longdouble, np.array, torch.tensor]),
    seed=SEEDS,
)
def test_numbers_of_any_kind_are_numbers(number, kind, seed, tmp_path_factory):
    given, same = kind(number), float(kind(number))
    for made, expected in [
        (ksm_ext.RBF(given), ksm_ext.RBF(same)),
        (ksm_ext.ANOVA2(given), ksm_ext.ANOVA2(same)),
        (ksm_ext.Polynomial(np.int32(2), given, given), ksm_ext.Polynomial(2, same, same)),
        (np.float64(number) * ksm_ext.Linear(), number * ksm_ext.Linear()),
    ]:
        assert made == expected and from_description(made.describe()) == expected
        json.dumps(made.describe())
        assert as_kernel(made) is made
    assert as_kernel(ksm_ext.RBF) == as_kernel("rbf") == ksm_ext.RBF()
    masks, scores = subsets.mixed_sizes(4, 8, seed=np.uint16(3)), normal(seed, 8, 1)
    assert torch.equal(masks, subsets.mixed_sizes(np.int64(4), torch.tensor(8), seed=3))
    surrogate = fit_surrogate(masks, scores, kernel=ksm_ext.RBF(given), ridge=given)
    surrogate.save(tmp_path_factory.mktemp("saved") / "surrogate")
    assert float(surrogate.kernel_terms[0].ridge[0]) == same


@holds(m=st.integers(6, 16), n=st.integers(3, 6), t=st.integers(1, 2), seed=SEEDS, scale=SCALES)
def test_the_unit_of_estimates_decides_nothing(m, n, t, seed, scale):
    """Nor their sign, nor that of the scores; and a + b E is found where it is the truth."""
    every = subsets.all_subsets(n)
    cheap = normal(seed, 2**n, t)
    rows = torch.randperm(2**n, generator=generator(seed))[:m]
    scores = normal(seed + 1, len(rows), t)
    estimates = fit_surrogate(every, cheap, kernel=ksm_ext.RBF(0.3), noise_std=0.0)
    other = fit_surrogate(every, 3 - scale * cheap, kernel=ksm_ext.RBF(0.3), noise_std=0.0)
    options = {"kernel": ksm_ext.RBF(0.2), "ridge": 0.1}
    expected = fit_surrogate(every[rows], scores, estimates=estimates, **options)
    found = fit_surrogate(every[rows], 2 - 5 * scores, estimates=other, **options)
    close(found.predict(every), 2 - 5 * expected.predict(every), 1e-6)
    close(found.attribute("shapley", True)[1], 5 * expected.attribute("shapley", True)[1], 1e-5)
    exact = fit_surrogate(every[rows], 1 + scale * cheap[rows], estimates=estimates)
    close(exact.predict(every) / scale, (1 + scale * cheap) / scale, 1e-6)


# Operators


@holds(m=SIZES, l=SIZES, n=st.integers(0, 200), t=st.integers(0, 4), seed=SEEDS)
def test_packed_masks_are_counted(m, l, n, t, seed):
    x, y = normal(seed, m, n) < 0, normal(seed + 1, l, n) < 0
    bits = ops.pack_masks(x).numpy().view(np.uint8)
    unpacked = np.unpackbits(bits, axis=1, bitorder="little")
    assert np.array_equal(unpacked[:, :n], x.numpy()) and not unpacked[:, n:].any()
    overlap = x.double() @ y.double().T
    hamming = x.sum(1)[:, None] + y.sum(1) - 2 * overlap
    a, b, v = normal(seed, n + 1), normal(seed + 1, n + 1), normal(seed, l, t)
    tables = {"hamming_table": a, "overlap_table": b}
    gram = ops.mask_gram(ops.pack_masks(x), ops.pack_masks(y), n, **tables)
    assert torch.equal(gram, a[hamming.long()] + b[overlap.long()])
    product = ops.mask_gram_matmul(ops.pack_masks(x), ops.pack_masks(y), n, v, **tables)
    close(product, gram @ v, 1e-10)
    square = ops.mask_gram_matmul(ops.pack_masks(y), None, n, v, **tables)
    close(square, ops.mask_gram(ops.pack_masks(y), None, n, **tables) @ v, 1e-10)


@holds(m=SIZES, l=SIZES, n=st.integers(0, 200), t=st.integers(0, 4), seed=SEEDS)
def test_weighted_masks_are_kernels_of_their_weighted_distances(m, l, n, t, seed):
    x, y = normal(seed, m, n) < 0, normal(seed + 1, l, n) < 0
    bits, others = ops.pack_masks(x), ops.pack_masks(y)
    weights = normal(seed, n).square() / max(n, 1)
    distances = torch.cdist(x * weights.sqrt(), y * weights.sqrt()).square()
    a, b, v = normal(seed, m), normal(seed + 1, l), normal(seed, l, t)
    for kernel, values in (("rbf", distances), ("exponential", distances.sqrt())):
        gram = ops.weighted_mask_gram(bits, others, n, weights, kernel=kernel)
        close(gram, torch.exp(-values), 1e-6 if kernel == "exponential" else 1e-12)
        assert torch.equal(ops.weighted_mask_gram(others, bits, n, weights, kernel=kernel).T, gram)
        factors = {"x_factors": a, "y_factors": b}
        scaled = ops.weighted_mask_gram(bits, others, n, weights, kernel=kernel, **factors)
        assert torch.equal(scaled, gram * (a[:, None] * b))
        product = ops.weighted_mask_gram_matmul(bits, others, n, weights, v, kernel=kernel)
        close(product, gram @ v, 1e-10)
        square = ops.weighted_mask_gram_matmul(others, None, n, weights, v, kernel=kernel)
        close(square, ops.weighted_mask_gram(others, None, n, weights, kernel=kernel) @ v, 1e-10)
    # A task in which all agree has no say, and splitting a task's weight changes nothing.
    twice = [ops.pack_masks(torch.cat([part, part], 1)) for part in (x, y)]
    halves = torch.cat([weights / 2, weights / 2])
    gram = ops.weighted_mask_gram(bits, others, n, weights)
    close(ops.weighted_mask_gram(*twice, 2 * n, halves), gram, 1e-12)


KINDS = (
    {"kind": "sbp", "hadamard": True},
    {"kind": "sjlt", "sparsity": 2},
    {"kind": "rademacher"},
    {},
)


@holds(
    kind=st.sampled_from(KINDS),
    half=st.integers(1, 40),
    p=st.integers(0, 90),
    b=st.integers(0, 5),
    cut=st.integers(0, 90),
    offset=st.integers(0, 2**40),
    seed=SEEDS,
)
def test_projections_are_linear_and_have_their_adjoint(kind, half, p, b, cut, offset, seed):
    projector, cut = Projector(2 * half, seed=seed, **kind), min(cut, p)
    x, z, y = normal(seed, b, p), normal(seed + 1, b, p), normal(seed + 2, b, 2 * half)
    image = projector(x, offset=offset)
    close(projector(2 * x - z, offset=offset), 2 * image - projector(z, offset=offset), 1e-11)
    back = projector.adjoint(y, p, offset=offset)
    close((image * y).sum(1), (x * back).sum(1), 1e-10)
    close(projector([x[:, :cut], x[:, cut:]], offset=offset), image, 1e-11)
    out = y.clone()
    ops.project_(out, x, projector, offset=offset)
    close(out, y + ops.project(x, projector, offset=offset), 1e-11)
    assert torch.equal(back, ops.project_adjoint(y, projector, p, offset=offset))


@holds(counts=st.lists(st.integers(0, 9), min_size=1, max_size=6), k=st.integers(1, 20), seed=SEEDS)
def test_grams_of_tasks_sum_to_the_gram_of_all(counts, k, seed):
    b = sum(counts)
    features, weights = normal(seed, b, k), normal(seed + 1, b).square()
    offsets = torch.tensor([0, *np.cumsum(counts)])
    grams = ops.task_gram(features, offsets, weights=weights)
    total = ops.gram_update(torch.zeros(k, k, dtype=torch.float64), features, weights)
    close(grams.sum(0), total, 1e-11)
    close(total, features.T @ (weights[:, None] * features), 1e-11)


@holds(
    kind=st.sampled_from(["rbf", "laplace", "exponential", "polynomial"]),
    m=st.integers(0, 20),
    l=st.integers(0, 20),
    n=st.integers(0, 12),
    gamma=SCALES,
    seed=SEEDS,
)
def test_kernels_depend_on_differences_or_products_only(kind, m, l, n, gamma, seed):
    x, y, shift = normal(seed, m, n), normal(seed + 1, l, n), normal(seed + 2, n)
    options = {"gamma": gamma, "degree": 2, "coef0": 1.0}
    gram = ops.kernel_gram(x, y, kind, **options)
    close(ops.kernel_gram(y, x, kind, **options).T, gram, 1e-11)
    if kind != "polynomial":
        close(ops.kernel_gram(x + shift, y + shift, kind, **options), gram, 1e-6)
        assert ((gram >= 0) & (gram <= 1)).all()
    if kind != "laplace":
        turned = torch.linalg.qr(normal(seed, n, n))[0]
        close(ops.kernel_gram(x @ turned, y @ turned, kind, **options), gram, 1e-6)


@holds(counts=st.lists(st.integers(0, 6), min_size=1, max_size=5), m=st.integers(1, 6), seed=SEEDS)
def test_products_of_regressions_are_symmetric_and_add_up(counts, m, seed):
    b, n, k = sum(counts), len(counts), 4
    features, offsets = normal(seed, b, k), torch.tensor([0, *np.cumsum(counts)])
    masks, curvature = normal(seed, m, n) < 0, normal(seed + 1, m, b).square()
    v, u = normal(seed + 2, m, k), normal(seed + 3, m, k)
    product = lambda x: ops.glm_hvp(features, offsets, masks, x, curvature=curvature, ridge=0.5)  # noqa: E731
    close((u * product(v)).sum(1), (v * product(u)).sum(1), 1e-10)
    assert ((v * product(v)).sum(1) >= 0).all()
    close(product(v + u), product(v) + product(u), 1e-10)


@holds(b=st.integers(0, 5), c=st.integers(1, 40), seed=SEEDS)
def test_products_of_the_softmax_are_symmetric_and_sum_to_zero(b, c, seed):
    logits, v, u = 3 * normal(seed, b, c), normal(seed + 1, 1, b, c), normal(seed + 2, 1, b, c)
    product = ops.softmax_hvp(logits, v)
    close(product.sum(-1), torch.zeros(1, b, dtype=torch.float64), 1e-12)
    close((u * product).sum(-1), (v * ops.softmax_hvp(logits, u)).sum(-1), 1e-11)
    assert torch.equal(ops.softmax_hvp_(v.clone(), logits), product)


# Designs


@holds(n=st.integers(2, 12), m=st.integers(2, 6), seed=SEEDS)
def test_designs_are_distinct_rows_that_the_seed_decides(n, m, seed):
    draws = {
        "fixed": lambda: subsets.fixed_size(n, min(m, n), n - 1, seed=seed),
        "bernoulli": lambda: subsets.bernoulli(n, 2, 0.5, seed=seed),
        "mixed": lambda: subsets.mixed_sizes(n, min(m, n), seed=seed),
        "paired": lambda: subsets.paired(n, 2, probability=0.5, seed=seed),
        "design": lambda: subsets.design(n, min(m, 2**n - 2), seed=seed),
    }
    for draw in draws.values():
        masks = draw()
        assert torch.equal(masks, draw()) and masks.dtype == torch.bool
        assert len(torch.unique(masks, dim=0)) == len(masks)
        assert subsets.from_index_lists(subsets.to_index_lists(masks), n).equal(masks)
    pairs = draws["paired"]()
    assert torch.equal(pairs[1::2], ~pairs[::2])
    assert (draws["fixed"]().sum(1) == n - 1).all()


@holds(n=st.integers(2, 7), seed=SEEDS, data=st.data())
def test_a_design_of_more_subsets_than_there_are_is_all_of_them(n, seed, data):
    size = data.draw(st.integers(1, n - 1))
    every = subsets.all_subsets(n)
    inner = every[(every.sum(1) > 0) & (every.sum(1) < n)]
    options = {"seed": seed, "allow_fewer": True}
    for drawn, whole in [
        (subsets.fixed_size(n, 1000, size, **options), every[every.sum(1) == size]),
        (subsets.mixed_sizes(n, 1000, **options), inner),
        (subsets.bernoulli(n, 1000, 0.5, **options), inner),
        (subsets.paired(n, 1000, probability=0.5, **options), inner),
    ]:
        assert torch.equal(torch.unique(drawn, dim=0), torch.unique(whole, dim=0))
        assert len(drawn) == len(whole)
    with pytest.raises(ValueError, match="pass allow_fewer=True or allow_repeats=True"):
        subsets.mixed_sizes(n, 1000, seed=seed)
    fewer = subsets.mixed_sizes(n, 2, seed=seed)
    assert torch.equal(subsets.mixed_sizes(n, 2, **options), fewer)


@holds(n=st.integers(2, 7), known=st.integers(0, 40), m=st.integers(0, 60), seed=SEEDS)
def test_a_design_for_a_question_goes_on_where_the_known_subsets_end(n, known, m, seed):
    every = subsets.all_subsets(n, include_empty=False)
    order = torch.randperm(len(every), generator=generator(seed))
    scored = every[order[:known]]
    options = {"known": scored, "seed": seed, "allow_fewer": True}
    for readout in (*READOUTS, "prediction"):
        drawn = subsets.design(n, m, readout=readout, **options)
        assert len(drawn) == min(m, max(0, len(every) - known)) and bool(drawn.any(1).all())
        assert len(torch.cat([scored, drawn]).unique(dim=0)) == len(scored) + len(drawn)
        longer = subsets.design(n, m + 3, readout=readout, **options)
        borders = subsets.design(n, n + 1, readout="loo", seed=seed)
        common = [row for row in drawn.tolist() if row in borders.tolist()]
        assert readout not in ("loo", "shapley") or longer[: len(common)].tolist() == common


@holds(n=st.integers(2, 9), chunk=st.integers(1, 50))
def test_enumerations_are_complete(n, chunk):
    every = subsets.all_subsets(n)
    assert torch.equal(torch.cat(list(subsets.iterate_subsets(n, chunk_rows=chunk))), every)
    assert len(torch.unique(every, dim=0)) == 2**n
    for left_out, masks in ((1, subsets.leave_one_out(n)), (2, subsets.leave_two_out(n))):
        rows = every[every.sum(1) == n - left_out]
        assert torch.equal(torch.unique(masks, dim=0), torch.unique(rows, dim=0))
    assert torch.equal(subsets.as_masks("masks", every.float()), every)


@holds(m=st.integers(1, 12), n=st.integers(1, 6), seed=SEEDS)
def test_equal_rows_and_columns_are_found(m, n, seed):
    masks = normal(seed, m, n) < 0
    labels = subsets.identical_subsets(masks)
    for i in range(m):
        assert torch.equal(labels == labels[i], (masks == masks[i]).all(dim=1))
    merged, groups = subsets.merge_duplicate_tasks(masks)
    assert sorted(task for group in groups for task in group) == list(range(n))
    for column, group in enumerate(groups):
        assert all(torch.equal(merged[:, column], masks[:, task]) for task in group)


# Evaluation


@holds(l=st.integers(4, 30), t=st.integers(2, 3), seed=SEEDS)
def test_rank_measures_see_ranks_only(l, t, seed):
    true, guess = normal(seed, l, t), normal(seed + 1, l, t)
    rows = torch.randperm(l, generator=generator(seed))
    lds = evaluation.lds(true, guess)
    assert (lds.abs() <= 1 + 1e-12).all()
    close(evaluation.lds(true.exp()[rows], guess.pow(3)[rows]), lds, 1e-12)
    close(evaluation.lds(true, -guess), -lds, 1e-12)
    close(evaluation.noise_ceiling(guess, true), lds, 1e-12)
    bad = torch.arange(l) < l // 2
    auc = evaluation.mislabel_auc(guess, bad)
    close(evaluation.mislabel_auc(-guess, bad), 1 - auc, 1e-12)
    tables, few = (evaluation.lds, true, guess), {"num_resamples": 20}
    intervals = [evaluation.bootstrap(*tables, resample="targets", **few)]
    if l >= 10:
        intervals += [evaluation.jackknife(*tables), evaluation.bootstrap(*tables, **few)]
    else:
        with pytest.raises(ValueError, match="`arrays` must be 10 rows or longer"):
            evaluation.jackknife(*tables)
    for interval in intervals:
        assert interval.estimate == pytest.approx(float(lds.mean()))
        assert -1 <= interval.low <= interval.estimate + 1e-9
        assert interval.estimate - 1e-9 <= interval.high <= 1


@holds(
    l=st.integers(2, 60),
    n=st.integers(1, 20),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=SEEDS,
)
def test_sums_that_tie_tie_in_whatever_order_they_are_summed(l, n, scale, dtype, seed):
    masks = (normal(seed, l, n) < 0.3).to(dtype)
    tenths = torch.randint(1, 9, (n,), generator=generator(seed))
    exact = masks.double() @ tenths.double()  # whole numbers: their ranks are right
    total = torch.zeros(l, dtype=dtype)
    for task in torch.randperm(n, generator=generator(seed + 1)):
        total += masks[:, task] * (int(tenths[task]) / 10 * scale)
    expected = torch.from_numpy(stats.rankdata(exact.numpy()))
    assert torch.equal(correlation.ranks(total[:, None])[0], expected)
    truth = normal(seed + 2, l, 1)
    close(*(evaluation.lds(truth, table[:, None]) for table in (total, exact)), 1e-12)


@holds(l=st.integers(2, 2000), seed=SEEDS)
def test_values_that_lie_close_one_after_another_do_not_tie(l, seed):
    steps = torch.arange(l, dtype=torch.float64) * 4 * torch.finfo(torch.float64).eps
    table = (1 + steps)[torch.randperm(l, generator=generator(seed))][:, None]
    expected = stats.rankdata(table[:, 0].numpy())
    if l <= 5:  # within sixteen units of 1, all together
        expected[:] = (l + 1) / 2
    np.testing.assert_array_equal(correlation.ranks(table)[0].numpy(), expected)


@holds(
    l=st.integers(10, 25),
    t=st.integers(1, 3),
    noise=st.floats(0.0, 2.0),
    level=st.floats(0.5, 0.999),
    seed=SEEDS,
)
def test_intervals_are_of_possible_values(l, t, noise, level, seed):
    true = normal(seed, l, t)
    guess = true + noise * normal(seed + 1, l, t)
    bad = torch.arange(l) % 3 == 0
    for low, high, metric, tables in [
        (-1, 1, evaluation.lds, (true, guess)),
        (-1, 1, evaluation.loo_correlation, (guess, true)),
        (0, 1, evaluation.mislabel_auc, (guess, bad)),
        (0, math.inf, evaluation.residual_error, (true, guess)),
        (0, math.inf, evaluation.relative_error, (true, guess)),
    ]:
        interval = evaluation.jackknife(metric, *tables, level=level)
        assert low <= interval.low <= interval.estimate <= interval.high <= high + 1e-12


@holds(l=st.integers(3, 30), seed=SEEDS, shift=st.floats(-3, 3), factor=st.floats(0.1, 9))
def test_errors_are_in_units_of_the_truth(l, seed, shift, factor):
    true, guess = normal(seed, l, 2), normal(seed + 1, l, 2)
    error = evaluation.residual_error(true, guess)
    close(evaluation.residual_error(factor * true + shift, factor * guess + shift), error, 1e-8)
    of_mean = evaluation.residual_error(true, true.mean(0).expand(l, 2))
    close(of_mean, torch.full((2,), (l - 1) / l, dtype=torch.float64), 1e-10)
    relative = evaluation.relative_error(true, guess)
    close(evaluation.relative_error(factor * true, factor * guess), relative, 1e-8)
    correlation = evaluation.loo_correlation(guess, true)
    close(evaluation.loo_correlation(factor * guess + shift, true), correlation, 1e-9)


@holds(m=st.integers(2, 12), seed=SEEDS, shift=st.floats(-3, 3))
def test_noise_is_what_differs_within_a_subset(m, seed, shift):
    masks = (normal(seed, m, 2) < 0).repeat(2, 1)
    scores = normal(seed + 1, 2 * m, 2)
    noise = evaluation.retrain_noise(masks, scores)
    offsets = subsets.identical_subsets(masks)[:, None] * shift
    close(evaluation.retrain_noise(masks, scores + offsets), noise, 1e-9)
    assert (evaluation.retrain_noise(masks, scores.new_ones(2 * m, 1)) == 0).all()
    numbers, first = subsets.distinct_rows(masks)
    assert torch.equal(masks[first][numbers], masks) and (first.diff() > 0).all()
    runs = scores, numbers, torch.ones_like(scores, dtype=torch.bool)
    means, counts, deviation = evaluation.pooled_runs(*runs)
    close(deviation.square(), noise, 1e-9)
    close((means * counts).sum(0), scores.sum(0), 1e-9)


# Choosing tasks


@holds(n=st.integers(1, 7), seed=SEEDS, maximize=st.booleans(), data=st.data())
def test_choices_of_additive_scores_are_the_best_ones(n, seed, maximize, data):
    size, worth, costs = data.draw(st.integers(0, n)), normal(seed, n), normal(seed + 1, n).exp()
    predict = lambda masks: masks.double() @ worth  # noqa: E731
    best = selection.exact(predict, n, size, maximize=maximize)
    for greedy in (selection.greedy_forward, selection.greedy_backward):
        assert greedy(predict, n, size, maximize=maximize).score == pytest.approx(best.score)
    if size:
        chosen = selection.top_k(worth, size, maximize=maximize)
        assert float(worth[chosen].sum()) == pytest.approx(best.score)
    budget = float(costs.sum()) / 2
    bought = selection.under_budget(predict, costs, budget, maximize=maximize)
    assert float(costs[list(bought.tasks)].sum()) <= budget * (1 + 1e-9)
    assert bought.score >= 0 if maximize else bought.score <= 0


@holds(problem=problems(min_tasks=2, kernels=("rbf", "linear", "laplace")), seed=SEEDS)
def test_tasks_are_not_selected_by_a_surrogate_of_mixtures(problem, seed):
    masks, scores, kernel = problem
    n = masks.shape[1]
    mixtures = torch.rand(len(masks), n, generator=generator(seed), dtype=torch.float64)
    surrogate = fitted((mixtures / mixtures.sum(1, keepdim=True), scores, kernel))
    for predict in (surrogate, surrogate.predict, partial(surrogate.predict)):
        for select, *of in (
            (selection.greedy_forward, n, 1),
            (selection.greedy_backward, n, 1),
            (selection.exact, n, 1),
            (selection.under_budget, [1.0] * n, 1),
        ):
            with pytest.raises(
                ValueError, match=r"`predict` must be of tasks .* Use `best_mixture`"
            ):
                select(predict, *of, maximize=True)


# Spectra, solvers


@holds(p=st.integers(2, 30), seed=SEEDS)
def test_spectra_of_dense_matrices(p, seed):
    half = normal(seed, p, p)
    matrix = half @ half.T / p
    values = torch.linalg.eigvalsh(matrix)
    operator = lambda x: x @ matrix  # noqa: E731
    found, vectors = top_eigenpairs(operator, 1, p)
    close(found, values[-1:], 1e-5)
    close(operator(vectors), found[:, None] * vectors, 1e-3)
    diagonal = lambda x: x * values  # noqa: E731
    assert hutchinson_trace(diagonal, p, num_probes=3).value == pytest.approx(float(values.sum()))
    trace = hutch_pp_trace(operator, p, num_products=3 * p).value
    assert trace == pytest.approx(float(values.sum()))
    weights = normal(seed, p, 3)
    traces, errors = per_sample_traces(lambda x: (x * x) @ weights, p, dtype=torch.float64)
    close(traces, weights.sum(0), 1e-9)
    assert (errors <= 1e-9 * p).all()
    alpha, beta, basis = lanczos(operator, normal(seed, 1, p), 2)
    close(basis[0] @ basis[0].T, torch.eye(2).double(), 1e-9)
    tridiagonal = torch.diag(alpha[0]) + beta[0, 0] * (1 - torch.eye(2).double())
    close(basis[0] @ matrix @ basis[0].T, tridiagonal, 1e-9)
    density = spectral_density(operator, p, num_probes=2, num_steps=min(p, 8))
    assert float(density.weights.sum()) == pytest.approx(2)


@holds(p=st.integers(1, 20), s=st.integers(1, 6), damping=st.floats(0.1, 2), seed=SEEDS)
def test_systems_are_solved(p, s, damping, seed):
    half, rhs = normal(seed, p, p), normal(seed + 1, s, p)
    matrix = half @ half.T / p
    exact = torch.linalg.solve(matrix + damping * torch.eye(p).double(), rhs.T).T
    operator = lambda x: x @ matrix  # noqa: E731
    solver = BlockConjugateGradients(tolerance=1e-10, max_steps=200)
    found = solver.solve(operator, rhs, damping=damping)
    assert found.converged.all()
    close(found.x, exact, 1e-6)
    own = as_solver(lambda rhs: solver.solve(operator, rhs, damping=damping).x)
    assert torch.equal(own.solve(operator, rhs).x, found.x)
    scale = float(torch.linalg.eigvalsh(matrix)[-1]) + damping
    close(LiSSA(scale, num_steps=2000).solve(operator, rhs, damping=damping).x, exact, 1e-5)


# Models


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()


def data(seed, b):
    return normal(seed, b, 3), torch.randint(3, (b,), generator=generator(seed))


BODIES = {
    "linear": lambda width: nn.Linear(4, width),
    "convolution": lambda width: nn.Conv2d(1, width, (1, 2), stride=2, padding=1),
    "groups": lambda width: nn.Sequential(nn.Conv1d(2, 2, 2), nn.Conv1d(2, 2 * width, 1, groups=2)),
    "words": lambda width: nn.Embedding(7, width),
}
INPUTS = {"linear": (3, 4), "convolution": (1, 3, 4), "groups": (2, 5), "words": (5,)}


@holds(
    kind=st.sampled_from([*BODIES]),
    width=st.integers(1, 4),
    b=st.integers(1, 6),
    max_dim=st.sampled_from([1, 4, 100]),
    damping=st.floats(0.01, 2),
    seed=SEEDS,
)
def test_factored_fisher_matrices_keep_the_trace_and_are_inverted(
    kind, width, b, max_dim, damping, seed
):
    """Of any basis: the mean squared norm of gradients is the sum of the eigenvalues."""
    torch.manual_seed(seed)
    body = nn.Sequential(BODIES[kind](width), nn.Tanh(), nn.Flatten())
    x = torch.randint(7, (b, 5)) if kind == "words" else torch.randn(b, *INPUTS[kind])
    model = nn.Sequential(body, nn.Linear(body(x).shape[1], 3)).double()
    x = x if kind == "words" else x.double()
    operator = GaussNewton(model, (x, torch.randint(3, (b,))))
    fisher = EKFAC("empirical", max_dim=max_dim).fit(operator)
    gradients = operator.per_sample_gradients()
    trace = sum(float(block.eigenvalues.sum()) for block in fisher.blocks)
    assert trace == pytest.approx(float(gradients.square().sum(1).mean()), rel=1e-9)
    assert {*unflatten(gradients, fisher.shapes)} == {name for name, _ in model.named_parameters()}
    u, v = normal(seed, 2, 3, operator.shape[0])
    close((u * fisher(v)).sum(1), (fisher(u) * v).sum(1), 1e-9)
    assert ((v * fisher(v)).sum(1) >= -1e-12).all()
    close(fisher.inverse(fisher(v) + damping * v, damping), v, 1e-9)
    if max_dim == 1:  # the diagonal of the Fisher matrix itself
        close(fisher(torch.ones_like(v))[0], gradients.square().mean(0), 1e-9)


@holds(b=st.integers(1, 8), seed=SEEDS)
def test_gradients_of_samples_do_not_know_their_batch(b, seed, tmp_path_factory):
    model, (x, y) = network(seed), data(seed, b)
    order = torch.randperm(b, generator=generator(seed))
    with evaluating(model):
        assert not model.training
    assert model.training
    assert 1 <= samples_together([*model.parameters()]) <= 64
    assert samples_of_pass(model, log_odds, (x, y), parameter_names(model)) == 64
    assert usual_projector(model, None) is None  # of 31 parameters
    values, gradients = per_sample_gradients(model, log_odds, (x, y))
    close(log_odds(model, (x, y)).detach(), values, 1e-12)
    others = per_sample_gradients(model, log_odds, (x[order], y[order]))[1]
    for name in parameter_names(model):
        close(others[name], gradients[name][order], 1e-11)
    projector, store = Projector(4, seed=seed), tmp_path_factory.mktemp("store")
    features = collect_features(model, (x, y), log_odds, projector, batch_size=2, progress=False)
    flat = torch.cat([gradients[name].reshape(b, -1) for name in parameter_names(model)], dim=1)
    close(features.gradients, projector(flat), 1e-10)
    options = {"store": store, "batch_size": 2, "progress": False}
    collect_features(model, (x, y), log_odds, projector, **options)
    assert torch.equal(load_features(store).gradients, features.gradients)


class Words(nn.Module):
    """Rows of words, one of them padding, through layers; the mean of what comes out."""

    def __init__(self, layers, first, padding):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=padding)
        self.layers, self.head, self.first = nn.Sequential(*layers), nn.Linear(4, 3), first

    def forward(self, ids):
        x = self.embed(ids)
        x = self.layers(x) if self.first else self.layers(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


class Memory(nn.GRU):
    def forward(self, x):
        return super().forward(x)[0]


LAYERS = {
    "linear": lambda: nn.Linear(4, 4),
    "tanh": nn.Tanh,
    "layer norm": lambda: nn.LayerNorm(4),
    "rms norm": lambda: nn.RMSNorm(4),
    "no bias": lambda: nn.Linear(4, 4, bias=False),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)),
    "dropout": lambda: nn.Dropout(0.5),
    "encoder": lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
    "recurrent": lambda: Memory(4, 4),
}


def words(seed, b, length):
    ids = torch.randint(7, (b, length), generator=generator(seed))
    return ids, torch.randint(3, (b,), generator=generator(seed))


def reader(seed, layers, first, padding):
    """Layers by name; those that mix positions take samples first."""
    torch.manual_seed(seed)
    first = first or "encoder" in layers
    return Words([LAYERS[name]() for name in layers], first, padding).double()


STACKS = st.lists(st.sampled_from(sorted(LAYERS)), max_size=4)


@holds(
    **{"b": st.integers(1, 6), "length": st.integers(1, 6), "seed": SEEDS, "layers": STACKS},
    **{"first": st.booleans(), "padding": st.none() | st.integers(0, 6)},
)
def test_engines_agree_on_random_networks(b, length, seed, layers, first, padding):
    model, batch = reader(seed, layers, first, padding), words(seed, b, length)
    expected = per_sample_gradients(model, log_odds, batch, engine="backward")
    values, gradients = per_sample_gradients(model, log_odds, batch)
    close(values, expected[0], 1e-10)
    for name, gradient in gradients.items():
        close(gradient, expected[1][name], 1e-10)
    if "recurrent" not in layers:
        per_sample_gradients(model, log_odds, batch, engine="hooks")


@holds(b=st.integers(1, 5), seed=SEEDS, padding=st.integers(0, 6), layers=STACKS)
def test_curvature_is_symmetric_with_rows_of_padding(b, seed, padding, layers):
    model, batch = reader(seed, layers, True, padding), words(seed, b, 3)
    for make in (Hessian, GaussNewton):
        operator = make(model, batch)
        u, v = normal(seed, 2, operator.shape[0])
        products = operator(torch.stack([u, v]))
        across = float(u @ products[1])
        assert across == pytest.approx(float(v @ products[0]), rel=1e-8, abs=1e-8)
        one_by_one = make(model, batch, vectors_per_pass=1)(torch.stack([u, v]))
        close(one_by_one, products, 1e-8)


@holds(b=st.integers(1, 8), seed=SEEDS, batch_size=st.integers(1, 8))
def test_curvature_is_symmetric_and_does_not_know_its_batches(b, seed, batch_size):
    model, batch = network(seed), data(seed, b)
    for make in (Hessian, GaussNewton):
        operator = make(model, batch)
        u, v = normal(seed, 2, operator.shape[0])
        products = operator(torch.stack([u, v]))
        assert float(u @ products[1]) == pytest.approx(float(v @ products[0]), abs=1e-9)
        close(make(model, batch, batch_size=batch_size)(torch.stack([u, v])), products, 1e-10)
    assert float(v @ products[1]) >= -1e-9  # of the Gauss-Newton matrix
    assert loss_gradients(model, [batch]).shape == (1, len(u))


@holds(seed=SEEDS)
def test_attributions_do_not_know_the_order_of_tasks(seed):
    model = network(seed)
    tasks = [data(seed + i, 4 + i) for i in range(3)]  # of 4, 5 and 6 samples
    target, order = data(seed + 9, 4), [2, 0, 1]
    projector = Projector(2, seed=seed)
    options = {"damping": 0.1, "solver": BlockConjugateGradients(tolerance=1e-10)}
    methods = {
        "influence": lambda tasks: influence(model, tasks, target, **options).values,
        "projected": lambda tasks: (
            projected_influence(model, tasks, target, projector, damping=0.1).values
        ),
        "tracin": lambda tasks: tracin(model, 0.1, tasks, target),
        "cosine": lambda tasks: gradient_cosine(model, tasks, target),
        "trak": lambda tasks: (
            trak(model, tasks, target, projector=projector, relative_ridge=0.1).values
        ),
    }
    for method in methods.values():
        close(method([tasks[i] for i in order]), method(tasks)[order], 1e-6)
    whole = tuple(torch.cat(column) for column in zip(*tasks, strict=True))
    samples = sample_influence(model, whole, target, **options).values
    sums = torch.stack([part.sum(0) for part in samples.split([4, 5, 6])])
    close(sums.mean(1, keepdim=True), methods["influence"](tasks), 1e-6)


class Scaled(nn.Module):
    """A network with a number that is no parameter."""

    def __init__(self, factor, seed):
        super().__init__()
        self.factor, self.network = factor, network(seed)

    def forward(self, x):
        return self.factor * self.network(x)


PARTS = ("sample", "label", "weight", "factor", "activation", "closure", "projector", "order")


@holds(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    solver=st.sampled_from(("exact", "step")),
    unit=SCALES,
    seed=SEEDS,
)
def test_whole_weights_of_samples_are_repetitions(sizes, solver, unit, seed):
    """Of samples that are taken 0 to 3 times, in any unit of the weights."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    y = torch.randint(2, (len(x),), generator=generator)
    times = torch.randint(4, (len(x),), generator=generator)
    times[0] = 1
    torch.manual_seed(seed)
    model, target = nn.Linear(3, 2).double(), (x, y)
    masks = subsets.all_subsets(len(sizes))

    def scores(rows, counts, **options):
        tasks = [*zip(x[rows].split(counts), y[rows].split(counts), strict=True)]
        options |= {"solver": solver, "ridge": 0.01}  # of a chosen one, minima may be all but flat
        return ksm_ext.GradientEstimator(model, tasks, target, **options).fit().predict(masks)

    repeated = [int(part.sum()) for part in times.split(sizes)]
    if not all(repeated):  # a data set has a sample
        return
    expected = scores(torch.arange(len(x)).repeat_interleave(times), repeated)
    weighed = scores(torch.arange(len(x)), sizes, sample_weights=unit * times)
    # Objectives end at most 1e-8 above their minima, so parameters within (2e-8 / ridge)^.5.
    atol = 3e-3 if solver == "exact" else 1e-6
    torch.testing.assert_close(weighed, expected, rtol=1e-3, atol=atol)


@holds(b=st.integers(2, 12), part=st.sampled_from(PARTS), at=st.integers(0, 99), seed=SEEDS)
def test_a_store_never_answers_for_another_problem(b, part, at, seed, tmp_path_factory):
    store = tmp_path_factory.mktemp("store")

    def collect(other, store=None):
        (x, y), model = data(seed, b), Scaled(2.0 if other == "factor" else 1.0, seed)
        power = 2 if other == "closure" else 1
        with torch.no_grad():
            if other == "sample":
                x[at % b] += 1
            elif other == "label":
                y[at % b] = (y[at % b] + 1) % 3
            elif other == "weight":
                model.network[0].weight[at % 4] *= 1.5
            elif other == "activation":
                model.network[1] = nn.Sigmoid()
            elif other == "order":
                x, y = x.roll(1, 0), y.roll(1)
        output = lambda network, batch: log_odds(network, batch) ** power  # noqa: E731
        projector = Projector(4, seed=seed + (other == "projector"))
        options = {"batch_size": 3, "progress": False}
        return collect_features(model, (x, y), output, projector, store=store, **options)

    first = collect(None, store)
    assert torch.equal(collect(None, store).gradients, first.gradients)
    with pytest.raises(ValueError, match="`store` must be a folder of the same features"):
        collect(part, store)


@holds(m=st.integers(1, 6), num_seeds=st.integers(1, 3), chance=SEEDS)
def test_skipped_runs_are_left_out_of_every_number(m, num_seeds, chance):
    masks = subsets.all_subsets(3)[:m]
    scores = normal(chance, num_seeds, m, 2)
    fails = torch.rand(num_seeds, m, generator=generator(chance + 1)) < 0.3
    fails[0, 0] = False

    def train(mask, seed):
        row = int((masks == mask).all(1).nonzero())
        return scores[seed, row] if not fails[seed, row] else 1 / 0

    options = {"seeds": range(num_seeds), "on_error": "skip", "progress": False}
    runs = retrain_scores(train, masks, **options)
    kept = [row for row in range(m) if not bool(fails[:, row].all())]
    groups = [scores[~fails[:, row], row] for row in kept]
    assert torch.equal(runs.masks, masks[kept])
    assert runs.counts.tolist() == [len(group) for group in groups]
    close(runs.mean, torch.stack([group.mean(0) for group in groups]), 1e-12)
    assert len(runs.skipped) == int(fails.sum()) == num_seeds * m - sum(runs.counts)
    assert runs.noise_df == sum(len(group) - 1 for group in groups)
    if runs.noise_df:
        squares = sum((group - group.mean(0)).square().sum(0) for group in groups)
        close(runs.noise_std, (squares / runs.noise_df).sqrt(), 1e-12)


@holds(m=st.integers(2, 6), n=st.integers(1, 4), seed=SEEDS)
def test_retrained_scores_are_those_of_their_rows(m, n, seed):
    masks = normal(seed, m, n) < 0
    order = torch.randperm(m, generator=generator(seed))
    train = lambda mask, seed: [float(mask.sum()) + seed, seed * float(mask[0])]  # noqa: E731
    scores = retrain_scores(train, masks, seeds=(1, 2), progress=False).values.mean(0)
    other = retrain_scores(train, masks[order], seeds=(1, 2), progress=False).values.mean(0)
    assert torch.equal(other, scores[order])
    assert torch.equal(scores[:, 0], masks.sum(1).double() + 1.5)


# All of it

MODULES = (
    "ksm_ext",
    "ksm_ext.ops",
    "ksm_ext.subsets",
    "ksm_ext.evaluation",
    "ksm_ext.selection",
    "ksm_ext.network.spectrum",
    "ksm_ext.network.solvers",
    "ksm_ext.network.gradients",
    "ksm_ext.network.hessian",
    "ksm_ext.surrogates.kernels",
    "ksm_ext.attribution",
)
ELSEWHERE = {  # by the test file that has them
    "attribution/test_task_hessian": ("task_hessian",),
    "scores/test_logistic": ("fit_logistic", "task_sums", "unit_steps"),
    "attribution/test_trak": ("projection_text", "self_influence", "top_samples", "trak_scores"),
    "house/test_build": ("build_info",),
    "network/test_hessian": ("checked_vectors", "flatten"),
    "network/test_solvers": ("check_system", "inner_products", "without_autocast"),
    "network/test_spectrum": ("signs",),
    "network/test_wrong_arguments": (
        "check_networks",
        "check_operator",
        "check_output",
        "check_projector",
    ),
    "ops/test_glm_hvp": ("glm_gradient",),
    "report/test_page": ("write_report",),
    "test_pipeline": ("attribute_tasks",),
    "test_subsets": ("common_sum", "dirichlet"),
    "surrogates/test_more_subsets": ("more_subsets",),
    "surrogates/test_next_best": ("next_best",),
    "test_selection": ("best_mixture", "settled"),
    "tables/test_scores": ("read_scores",),
}


def public_functions():
    """Functions that a module defines, or that a package hands on."""
    for name in MODULES:
        module = importlib.import_module(name)
        for function in getattr(module, "__all__", None) or vars(module):
            value = getattr(module, function)
            own = inspect.isfunction(value) and value.__module__.startswith(name)
            if own and not function.startswith("_"):
                yield function


def test_every_public_function_has_its_property():
    text = Path(__file__).read_text()
    bodies = text[text.index("def fitted") : text.index("# All of it")]
    used = set(re.findall(r"\w+", bodies))
    for file, names in ELSEWHERE.items():
        test = (Path(__file__).parents[1] / f"{file}.py").read_text()
        assert not [name for name in names if name not in test]
        used |= {*names}
    assert not [name for name in public_functions() if name not in used]


@pytest.mark.slow
@pytest.mark.parametrize("property_of", THOROUGH)
def test_thoroughly(property_of, tmp_path_factory):
    fixtures = {"tmp_path_factory": tmp_path_factory}
    property_of(**{name: fixtures[name] for name in inspect.signature(property_of).parameters})
