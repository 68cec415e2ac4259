"""Designs: exact sizes, seeds, distinct rows, and laws compared with full enumeration."""

import itertools
import math
import resource

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from ksm_ext.subsets import (
    all_subsets,
    as_masks,
    bernoulli,
    design,
    distinct_rows,
    fixed_size,
    from_index_lists,
    identical_subsets,
    iterate_subsets,
    leave_one_out,
    leave_two_out,
    merge_duplicate_tasks,
    mixed_sizes,
    paired,
    to_index_lists,
)

RANDOM_DESIGNS = {
    "fixed_size": lambda m, **kw: fixed_size(20, m, 7, **kw),
    "bernoulli": lambda m, **kw: bernoulli(20, m, 0.3, **kw),
    "mixed_sizes": lambda m, **kw: mixed_sizes(20, m, **kw),
    "paired by size": lambda m, **kw: paired(20, m, size=10, **kw),
    "paired by probability": lambda m, **kw: paired(20, m, probability=0.6, **kw),
    "for Shapley": lambda m, **kw: design(20, m, readout="shapley", **kw),
}
random_design = pytest.mark.parametrize("draw", RANDOM_DESIGNS.values(), ids=RANDOM_DESIGNS)


def sets_of(masks):
    return [frozenset(tasks) for tasks in to_index_lists(masks)]


def chi_square_p(masks, probabilities):
    """p value of independent draws under a law given as {frozenset: probability}."""
    counts = dict.fromkeys(probabilities, 0)
    for tasks in sets_of(masks):
        counts[tasks] += 1
    expected = np.array(list(probabilities.values())) * len(masks)
    return stats.chisquare(list(counts.values()), expected).pvalue


@random_design
@pytest.mark.parametrize("m", [0, 2, 64, 1000])
def test_random_designs_give_distinct_boolean_rows(draw, m):
    masks = draw(m, seed=3)
    assert masks.shape == (m, 20) and masks.dtype == torch.bool and masks.device.type == "cpu"
    assert len(set(sets_of(masks))) == m


@random_design
def test_the_seed_alone_decides(draw):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = draw(50, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(draw(50, seed=7), first)
    assert not torch.equal(draw(50, seed=8), first)


@random_design
def test_device_is_that_asked_for(draw):
    assert draw(4, seed=0, device="meta").device.type == "meta"


@pytest.mark.parametrize("n, size", [(1, 0), (1, 1), (5, 0), (5, 5), (33, 1), (33, 32), (300, 150)])
def test_fixed_size_has_that_size(n, size):
    masks = fixed_size(n, 40, size, seed=0, allow_repeats=True)
    assert masks.sum(dim=1).tolist() == [size] * 40


@pytest.mark.parametrize("allow_repeats", [False, True])
def test_large_designs_have_the_right_sizes(allow_repeats):
    masks = fixed_size(10_000, 300, 5_000, seed=0, allow_repeats=allow_repeats)
    assert masks.sum(dim=1).unique().tolist() == [5_000]
    columns = masks.sum(dim=0).double()  # hypergeometric: mean 150, standard deviation 8.7
    assert abs(columns.mean() - 150) < 1e-9 and abs(columns.std() / math.sqrt(75) - 1) < 0.05


@pytest.mark.parametrize("n, size", [(6, 1), (6, 3), (7, 5), (40, 2), (12, 6)])
def test_fixed_size_is_uniform(n, size):
    subsets = [frozenset(tasks) for tasks in itertools.combinations(range(n), size)]
    law = dict.fromkeys(subsets, 1 / len(subsets))
    masks = fixed_size(n, 30 * len(subsets), size, seed=0, allow_repeats=True)
    assert chi_square_p(masks, law) > 1e-4


def test_coins_and_additions_together_are_uniform():
    # 26 of 60 tasks: all three stages of drawing take part; test one- and two-task margins.
    masks = fixed_size(60, 20_000, 26, seed=1, allow_repeats=True).double()
    inclusion = masks.mean(dim=0)
    both = (masks.T @ masks / len(masks))[~torch.eye(60, dtype=torch.bool)]
    single, pair = 26 / 60, 26 * 25 / (60 * 59)
    assert (inclusion - single).abs().max() < 5 * math.sqrt(single * (1 - single) / 20_000)
    assert (both - pair).abs().max() < 5.5 * math.sqrt(pair * (1 - pair) / 20_000)


@pytest.mark.parametrize("allow_empty_and_full", [False, True])
@pytest.mark.parametrize("probability", [0.2, 0.5, 0.85])
def test_bernoulli_law(probability, allow_empty_and_full):
    n = 5
    law = {}
    for size in range(n + 1):
        if allow_empty_and_full or 0 < size < n:
            for tasks in itertools.combinations(range(n), size):
                law[frozenset(tasks)] = probability**size * (1 - probability) ** (n - size)
    total = sum(law.values())
    law = {tasks: value / total for tasks, value in law.items()}
    options = {"allow_empty_and_full": allow_empty_and_full, "allow_repeats": True}
    assert chi_square_p(bernoulli(n, 40_000, probability, seed=0, **options), law) > 1e-4


@pytest.mark.parametrize("sizes", [None, [0, 2], [1, 1, 4], range(6)])
def test_mixed_sizes_law(sizes):
    n = 5
    chosen = set(range(1, n)) if sizes is None else set(sizes)
    law = {
        frozenset(tasks): 1 / len(chosen) / math.comb(n, size)
        for size in chosen
        for tasks in itertools.combinations(range(n), size)
    }
    masks = mixed_sizes(n, 20_000, sizes, seed=0, allow_repeats=True)
    assert chi_square_p(masks, law) > 1e-4


def test_without_repeats_the_law_is_that_of_successive_draws():
    # The first row follows the law itself; the second, the law without the first row.
    n, probability, trials = 3, 0.2, 1500
    weight = {
        frozenset(tasks): probability**size * (1 - probability) ** (n - size)
        for size in (1, 2)
        for tasks in itertools.combinations(range(n), size)
    }
    total = sum(weight.values())
    law = {
        (a, b): weight[a] / total * weight[b] / (total - weight[a])
        for a in weight
        for b in weight
        if a != b
    }
    counts = dict.fromkeys(law, 0)
    for seed in range(trials):
        counts[tuple(sets_of(bernoulli(n, 2, probability, seed=seed)))] += 1
    expected = np.array(list(law.values())) * trials
    assert stats.chisquare(list(counts.values()), expected).pvalue > 1e-4


@pytest.mark.parametrize(
    "draw, universe",
    [
        (lambda m: fixed_size(6, m, 3, seed=0), 20),
        (lambda m: fixed_size(18, m, 9, seed=0), 48_620),
        (lambda m: bernoulli(8, m, 0.01, seed=0), 254),
        (lambda m: bernoulli(8, m, 0.5, seed=0, allow_empty_and_full=True), 256),
        (lambda m: mixed_sizes(7, m, [1, 6], seed=0), 14),
        (lambda m: paired(6, m, size=3, seed=0), 20),
        (lambda m: paired(6, m, size=2, seed=0), 30),
        (lambda m: paired(6, m, probability=0.4, seed=0), 62),
    ],
)
def test_the_whole_universe_can_be_had_and_no_more(draw, universe):
    assert len(set(sets_of(draw(universe)))) == universe
    with pytest.raises(ValueError, match=f"`num_subsets` must be at most {universe}, .* Ask for f"):
        draw(universe + 2)


def test_almost_impossible_subsets_end_in_an_error():
    with pytest.raises(ValueError, match=r"within reach of sampling, got .* distinct of 1000"):
        bernoulli(60, 1_000, 1e-5, seed=0)


def test_repeats_are_allowed_when_asked_for():
    masks = fixed_size(3, 100, 1, seed=0, allow_repeats=True)
    assert len(masks) == 100 and len(set(sets_of(masks))) == 3


@pytest.mark.parametrize("how", [{"size": 4}, {"size": 5}, {"probability": 0.3}])
def test_paired_rows_are_complements(how):
    masks = paired(10, 60, seed=5, **how)
    assert torch.equal(masks[1::2], ~masks[0::2])
    if "size" in how:
        assert masks[0::2].sum(dim=1).unique().tolist() == [how["size"]]
    assert len(set(sets_of(masks))) == 60


def test_leave_one_out():
    assert leave_one_out(4).tolist() == [[i != j for j in range(4)] for i in range(4)]
    assert leave_one_out(4, include_full=True)[4].tolist() == [True] * 4
    assert leave_one_out(1).tolist() == [[False]]


def test_leave_two_out():
    pairs = list(itertools.combinations(range(5), 2))
    assert sets_of(~leave_two_out(5)) == [frozenset(pair) for pair in pairs]


def test_all_subsets():
    masks = all_subsets(5)
    assert [sum(2**task for task in tasks) for tasks in to_index_lists(masks)] == list(range(32))
    assert torch.equal(all_subsets(5, include_empty=False), masks[1:])
    with pytest.raises(ValueError, match="`num_tasks` must be at most 24, got 25"):
        all_subsets(25)


@pytest.mark.parametrize("chunk_rows", [1, 7, 1000])
@pytest.mark.parametrize("size", [None, 0, 1, 3, 6])
def test_iterate_subsets(size, chunk_rows):
    chunks = list(iterate_subsets(6, size, chunk_rows=chunk_rows))
    assert all(len(chunk) == chunk_rows for chunk in chunks[:-1])
    if size is None:
        assert torch.equal(torch.cat(chunks), all_subsets(6))
    else:
        tuples = [list(tasks) for tasks in itertools.combinations(range(6), size)]
        assert to_index_lists(torch.cat(chunks)) == tuples


@pytest.mark.parametrize("lists", [[], [[]], [[0], [1]], [[], [0, 69]], [list(range(70)), [3, 64]]])
def test_index_lists_round_trip(lists):
    masks = from_index_lists(lists, 70)
    assert masks.shape == (len(lists), 70)
    assert to_index_lists(masks) == lists


@pytest.mark.parametrize(
    "lists, error, found",
    [
        ([[0], [3]], ValueError, "from 0 to 2, got 3 in list 1"),
        ([[-1]], ValueError, "got -1 in list 0"),
        ([[1], [2, 2]], ValueError, "free of repeated task numbers, got list 1"),
        ([[0.5]], TypeError, "lists of integers, got float64"),
        ([[True, False]], TypeError, "got bool"),
    ],
)
def test_index_lists_name_what_is_wrong(lists, error, found):
    with pytest.raises(error, match=f"`index_lists` must be .*{found}"):
        from_index_lists(lists, 3)


@pytest.mark.parametrize("n", [1, 3, 8, 13, 70])
def test_identical_subsets(n):
    masks = torch.rand(60, n, generator=torch.Generator().manual_seed(0)) < 0.1
    seen: dict = {}
    expected = [seen.setdefault(tasks, len(seen)) for tasks in sets_of(masks)]
    assert identical_subsets(masks).tolist() == expected
    assert identical_subsets(masks.T.contiguous().T).tolist() == expected


def test_identical_subsets_of_nothing():
    assert identical_subsets(torch.zeros(0, 4, dtype=torch.bool)).tolist() == []
    assert identical_subsets(torch.zeros(3, 0, dtype=torch.bool)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float64])
def test_distinct_rows_of_any_dtype(dtype):
    table = torch.randint(0, 2, (60, 4), generator=torch.Generator().manual_seed(1)).to(dtype)
    if dtype == torch.float64:
        table[::2] *= -0.5  # zeros of either sign among them
    seen: dict = {}
    expected = [seen.setdefault(tuple(row), len(seen)) for row in table.tolist()]
    numbers, first = distinct_rows(table)
    assert numbers.tolist() == expected
    assert first.tolist() == [expected.index(number) for number in range(len(seen))]


def test_merge_duplicate_tasks():
    base = mixed_sizes(6, 30, seed=0)
    owner = [0, 1, 0, 2, 3, 3, 4, 0, 5]
    merged, groups = merge_duplicate_tasks(base[:, owner])
    assert torch.equal(merged, base)
    assert groups == [[0, 2, 7], [1], [3], [4, 5], [6], [8]]


def test_kinds_come_back():
    table = pd.DataFrame([[1, 0, 1], [0, 0, 0]], columns=list("abc"), index=["x", "y"])
    merged, groups = merge_duplicate_tasks(table)
    assert list(merged.columns) == ["a", "b"] and list(merged.index) == ["x", "y"]
    assert groups == [[0, 2], [1]]
    assert identical_subsets(table).tolist() == [0, 1]
    assert isinstance(merge_duplicate_tasks(table.to_numpy())[0], np.ndarray)
    assert isinstance(merge_duplicate_tasks([[1, 0], [1, 1]])[0], np.ndarray)


def test_as_masks_refuses_other_numbers():
    with pytest.raises(ValueError, match=r"`masks` must be boolean, or 0 and 1, got 2 at \(1, 0\)"):
        as_masks("masks", [[0, 1], [2, 0]])
    with pytest.raises(ValueError, match="got nan at"):
        as_masks("masks", [[0.0, math.nan]])
    with pytest.raises(ValueError, match="`masks` must be 2-dimensional"):
        as_masks("masks", [0, 1])


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda: fixed_size(5, 2, 6, seed=0), "`size` must be from 0 to 5, got 6"),
        (lambda: fixed_size(5, 2, -1, seed=0), "`size` must be at least 0, got -1"),
        (lambda: fixed_size(0, 2, 0, seed=0), "`num_tasks` must be at least 1, got 0"),
        (lambda: fixed_size(5, 2, 2, seed=-1), "`seed` must be at least 0"),
        (lambda: bernoulli(5, 2, 1.0, seed=0), "`probability` must be strictly between"),
        (lambda: bernoulli(5, 2, math.nan, seed=0), "`probability` must be strictly between"),
        (lambda: mixed_sizes(5, 2, [], seed=0), "`sizes` must be a list of sizes, got none"),
        (lambda: mixed_sizes(5, 2, [7], seed=0), "`sizes` must be from 0 to 5, got 7"),
        (lambda: paired(6, 3, size=2, seed=0), "`num_subsets` must be even, got 3"),
        (lambda: paired(6, 2, seed=0), "`size` must be given or else `probability`, got neither"),
        (lambda: paired(6, 2, size=1, probability=0.5, seed=0), "got both"),
        (lambda: paired(6, 2, size=6, seed=0), "`size` must be from 1 to 5, got 6"),
    ],
)
def test_errors_name_argument_and_value(call, found):
    with pytest.raises(ValueError, match=found):
        call()


QUESTIONS = ("loo", "shapley", "banzhaf", "prediction")
FULL = frozenset(range(7))


@pytest.mark.parametrize("readout", QUESTIONS)
def test_a_design_begins_with_what_its_question_compares(readout):
    found = sets_of(design(7, 60, readout=readout, seed=2))
    assert len(set(found)) == 60 and found[0] == FULL and frozenset() not in found
    borders = [FULL - {task} for task in range(7)], [frozenset({task}) for task in range(7)]
    if readout in ("loo", "shapley"):
        assert set(found[1:8]) == set(borders[0])
    if readout == "shapley":
        assert set(found[8:15]) == set(borders[1])
        assert sets_of(design(7, 3, readout="shapley", include_empty=True, seed=2))[1] == set()


@pytest.mark.parametrize("readout", ["loo", "shapley", "prediction"])
def test_beyond_its_borders_a_design_has_pairs_of_complements(readout):
    masks = design(30, 201, readout=readout, seed=4)
    rest = masks[{"loo": 31, "shapley": 61, "prediction": 1}[readout] :]
    inner = rest[(rest.sum(1) > 1) & (rest.sum(1) < 29)]  # borders may be scored before
    inner = inner[: len(inner) // 2 * 2]  # the last may lack its complement
    assert len(inner) > 60 and torch.equal(inner[1::2], ~inner[::2])


@pytest.mark.parametrize("readout", QUESTIONS)
@pytest.mark.parametrize("include_empty", [False, True])
def test_a_design_draws_nothing_that_is_known_and_all_that_is_left(readout, include_empty):
    every = set(sets_of(all_subsets(5, include_empty=include_empty)))
    known = mixed_sizes(5, 9, [2, 3, 5], seed=1)
    options = {"readout": readout, "known": known, "include_empty": include_empty, "seed": 3}
    left = every - set(sets_of(known))
    few = sets_of(design(5, 4, **options))
    assert len(set(few)) == 4 and set(few) <= left
    assert set(sets_of(design(5, len(left), **options))) == left
    with pytest.raises(ValueError, match=f"`num_subsets` must be at most {len(left)}, the number"):
        design(5, len(left) + 1, **options)
    assert len(design(5, 99, allow_fewer=True, **options)) == len(left)


@pytest.mark.parametrize("m", [600, 4000])
def test_sizes_of_a_design_follow_the_law_of_its_question(m):
    """Uniform among all subsets, or all sizes alike, as pairs are beyond 16 n = 640."""
    n = 40
    sizes = np.arange(1, n)
    uniform, alike = stats.binom.pmf(sizes, n, 0.5), np.ones(n - 1)
    paired_law = uniform if m == 600 else alike
    laws = {"banzhaf": uniform, "prediction": alike, "loo": paired_law, "shapley": paired_law}
    inner = slice(8, n - 9)  # of the others few exist, and none is drawn twice
    for readout, law in laws.items():
        first = {"loo": n + 1, "shapley": 2 * n + 1}.get(readout, 1)
        drawn = design(n, m, readout=readout, seed=1)[first:]
        counts = np.bincount(drawn.sum(1).numpy(), minlength=n + 1)[1:n][inner]
        expected = law[inner] / law[inner].sum() * counts.sum()
        assert counts.sum() > 0.5 * (m - first)
        assert np.abs(counts - expected).max() < 5 * np.sqrt(2 * expected.max())  # 2 of a pair


def test_a_design_refuses_what_it_cannot_read():
    with pytest.raises(ValueError, match="`readout` must be one of 'loo', 'shapley'"):
        design(4, 3, readout="owen", seed=0)
    with pytest.raises(ValueError, match=r"`known` must be of 4 columns, got shape \(1, 5\)"):
        design(4, 3, known=torch.ones(1, 5), seed=0)
    with pytest.raises(ValueError, match="`known` must be boolean, or 0 and 1, got"):
        design(2, 3, known=[[0.5, 1.0]], seed=0)
    with pytest.raises(ValueError, match="`num_tasks` must be at least 2"):
        design(1, 1, seed=0)


def test_a_design_of_many_tasks_draws_only_what_it_needs():
    """Not all 40,000 borders of 20,000 tasks, which are 800 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    masks = design(20_000, 50, readout="shapley", seed=0)
    assert masks.sum(1).tolist() == [20_000] + 49 * [19_999]
    both = torch.cat([masks, design(20_000, 50, known=masks, seed=1)])
    assert len(both.unique(dim=0)) == 100
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
