"""Masks: numbers of any kind in, bits and sizes out; what is not 0 or 1 is a weight."""

import itertools

import numpy as np
import pytest
import reference
import torch

from ksm_ext.surrogates import masks as masks_module
from ksm_ext.surrogates.masks import Masks

NUMBERS = [torch.bool, torch.uint8, torch.int8, torch.int64, torch.float16, torch.bfloat16]
NUMBERS += [torch.float32, torch.float64]


def random_masks(m, n, seed=0):
    return torch.rand(m, n, generator=torch.Generator().manual_seed(seed)) < 0.5


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_zeros_and_ones_of_any_dtype_are_masks(dtype):
    plain = random_masks(5, 3)
    masks = Masks.of(plain.to(dtype))
    assert masks.binary and torch.equal(masks.values, plain)


def test_other_numbers_are_weights():
    masks = Masks.of(torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=torch.float32))
    assert not masks.binary and masks.values.dtype == torch.float64
    assert not Masks.of([[0, 2]]).binary
    assert Masks.of([[0, 1]]).as_weights().values.tolist() == [[0.0, 1.0]]
    assert masks.as_weights() is masks


@pytest.mark.parametrize("m, n", [(0, 1), (1, 1), (3, 63), (3, 64), (4, 65), (5, 200)])
def test_bits_sizes_and_rows(m, n):
    plain = random_masks(m, n)
    masks = Masks.of(plain)
    assert len(masks) == m and masks.num_tasks == n
    assert torch.equal(masks.bits, reference.pack_masks(plain))
    assert masks.sizes.tolist() == [sum(row) for row in plain.tolist()]
    assert masks.floats.dtype == torch.float64 and torch.equal(masks.floats, plain.double())
    assert torch.equal(masks[1:].values, plain[1:])
    assert torch.equal(masks[torch.arange(m).flip(0)].values, plain.flip(0))


@pytest.mark.parametrize("weights", [False, True])
def test_mean_distances_are_those_of_all_pairs(weights):
    values = torch.rand(9, 4, dtype=torch.float64) if weights else random_masks(9, 4)
    pairs = list(itertools.combinations(values.double().tolist(), 2))
    squared = [sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for x, y in pairs]
    absolute = [sum(abs(a - b) for a, b in zip(x, y, strict=True)) for x, y in pairs]
    masks = Masks.of(values)
    assert masks.mean_squared_distance() == pytest.approx(sum(squared) / len(pairs), rel=1e-12)
    assert masks.mean_absolute_distance() == pytest.approx(sum(absolute) / len(pairs), rel=1e-12)


@pytest.mark.parametrize("row", [[1, 0], [0.2, 0.8]])
@pytest.mark.filterwarnings("ignore:var.*degrees of freedom")
def test_distances_of_one_row_are_zero(row):
    masks = Masks.of([row])
    assert masks.mean_squared_distance() == masks.mean_absolute_distance() == 0.0


@pytest.mark.parametrize(
    "masks, error, found",
    [
        ([1, 0], ValueError, r"2-dimensional \(subsets, tasks\), got shape \(2\)\. Reshape"),
        (torch.zeros(3, 0), ValueError, r"of at least one task, got shape \(3, 0\)\. Give one"),
        ([[0.0, np.nan]], ValueError, r"finite, got 1 NaN or infinite entries.* nan at \(0, 1\)\."),
        ([[0.0, np.inf]], ValueError, r"finite, got 1 NaN or infinite entries.* inf at \(0, 1\)\."),
        ([["a", "b"]], TypeError, r"numeric, got list of dtype <U1\. Pass"),
        ([[1, 0], [1]], TypeError, r"rectangular, got a ragged list\. Give every row"),
    ],
)
def test_errors_name_what_is_wrong(masks, error, found):
    with pytest.raises(error, match=f"^`masks` must be {found}"):
        Masks.of(masks)


def test_other_tasks_are_refused():
    with pytest.raises(ValueError, match=r"^`masks` must be of 3 columns .*, got shape \(1, 2\)\."):
        Masks.of([[1, 0]], num_tasks=3)


@pytest.mark.parametrize("m, n", [(0, 3), (1, 1), (5, 64), (7, 130), (9, 8)])
def test_masks_come_back_from_their_bits(m, n):
    masks = Masks(random_masks(m, n))
    again = Masks.from_bits(masks.bits, n)
    assert again.binary and torch.equal(again.values, masks.values)


@pytest.mark.parametrize("block", [1, 4, 100])
def test_products_by_blocks_of_rows_are_those_of_the_whole(block, monkeypatch):
    monkeypatch.setattr(masks_module, "_ROWS", block)
    masks, v = Masks(random_masks(9, 5)), torch.randn(9, 2).double()
    w = masks.values.double()
    torch.testing.assert_close(masks.transposed_matmul(v), w.T @ v)
    grams = torch.stack([w.T @ column.diag() @ w for column in v.T], dim=2)
    torch.testing.assert_close(masks.weighted_gram(v), grams)
    assert masks.mean_squared_norm() == pytest.approx(float(w.square().sum(1).mean()))
    weights = Masks(0.3 * w)
    assert weights.mean_squared_norm() == pytest.approx(0.09 * masks.mean_squared_norm())
