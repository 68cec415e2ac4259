"""Outputs against their closed forms, at any logits."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ksm_ext.network.outputs import (
    LOSSES,
    cross_entropy,
    log_odds,
    logit,
    margin,
    prediction,
    squared_error,
)

f64 = torch.float64


def fixed(logits):
    """A model with the given logits (C,) or (T, C) of one sample, and no parameters."""
    return lambda *inputs, **named: logits[None]


def of_sample(output, logits, label):
    """The output of one sample, ()."""
    (value,) = output(fixed(logits), (X, label[None]))
    return value


X = torch.zeros(1, 1)


def test_outputs_are_their_closed_forms():
    logits, y = torch.tensor([0.3, -1.2, 2.0], dtype=f64), torch.tensor(1)
    p = logits.softmax(0)[1]
    assert torch.isclose(of_sample(log_odds, logits, y), (p / (1 - p)).log(), rtol=1e-14)
    assert torch.isclose(of_sample(cross_entropy, logits, y), -p.log(), rtol=1e-14)
    assert of_sample(margin, logits, y).item() == pytest.approx(-3.2, abs=1e-15)
    assert of_sample(logit, logits, y).item() == -1.2
    one, y = torch.tensor([0.7], dtype=f64), torch.tensor(0.2, dtype=f64)
    assert of_sample(prediction, one, y).item() == 0.7
    assert of_sample(squared_error, one, y).item() == pytest.approx(0.25, abs=1e-15)
    assert squared_error(fixed(one), {"x": X, "labels": y[None]}).item() == pytest.approx(0.25)
    two = torch.tensor([0.5, 2.0], dtype=f64)
    assert of_sample(squared_error, two, two - torch.tensor([1.0, 2.0])).item() == 5.0


@settings(derandomize=True, deadline=None, database=None, max_examples=60)
@given(
    b=st.integers(1, 5),
    length=st.integers(0, 6),
    classes=st.integers(2, 5),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 10**6),
)
def test_outputs_of_a_batch_are_those_of_its_samples(b, length, classes, scale, seed):
    """Of classifications, which have no length, and of sequences with labels that are left out."""
    draw = torch.Generator().manual_seed(seed)
    shape = (b, length) if length else (b,)
    logits = scale * torch.randn(*shape, classes, generator=draw, dtype=f64)
    labels = torch.randint(classes, shape, generator=draw)
    if length:
        labels[:, 1:] = labels[:, 1:].where(labels[:, 1:] > 0, -100)
    for output in (log_odds, cross_entropy, margin, logit):
        whole = output(lambda _: logits, (X, labels))
        each = [of_sample(output, *pair) for pair in zip(logits, labels, strict=True)]
        assert whole.shape == (b,)
        torch.testing.assert_close(whole, torch.stack(each), rtol=1e-13, atol=0)
    expected = cross_entropy(lambda _: logits, (X, labels))
    loss = LOSSES["cross_entropy"](logits, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12 * scale)
    expected = squared_error(lambda _: logits, (X, logits.flip(0)))
    assert torch.equal(LOSSES["squared_error"](logits, logits.flip(0)), expected)


@pytest.mark.parametrize("scale", [1, 30, 700, 1e4, 1e6])
def test_cross_entropy_is_softplus_of_minus_log_odds_at_any_logits(scale):
    for logits in scale * torch.randn(20, 5, dtype=f64):
        for y in range(5):
            label = torch.tensor(y)
            h, loss = of_sample(log_odds, logits, label), of_sample(cross_entropy, logits, label)
            # torch's own softplus is linear from 20 on; logaddexp is not
            assert torch.isclose(loss, torch.logaddexp(-h, h.new_zeros(())), rtol=1e-12, atol=1e-12)
            assert torch.isclose(
                loss, F.cross_entropy(logits, label), rtol=1e-12, atol=1e-12 * scale
            )
            assert torch.isfinite(h)


@pytest.mark.parametrize("gap", [-1e4, -50, 0, 20, 36, 50, 800, 1e4])
def test_log_odds_keep_their_value_and_gradient_where_p_is_0_or_1(gap):
    logits = torch.tensor([gap, 0.0], dtype=f64, requires_grad=True)
    h = of_sample(log_odds, logits, torch.tensor(0))
    assert h.item() == gap
    assert torch.equal(torch.autograd.grad(h, logits)[0], torch.tensor([1.0, -1.0], dtype=f64))


@pytest.mark.parametrize("scale", [0.1, 1, 10, 40, 1e3])
def test_outputs_of_a_sequence_are_those_of_the_whole_answer(scale):
    logits = scale * torch.randn(6, 4, dtype=f64)
    labels = torch.tensor([-100, 1, 3, -100, 0, 2])
    kept = labels != -100
    tokens = list(zip(logits[kept], labels[kept], strict=True))
    losses = torch.stack([of_sample(cross_entropy, *token) for token in tokens])
    h, loss = of_sample(log_odds, logits, labels), of_sample(cross_entropy, logits, labels)
    assert torch.isclose(loss, losses.sum(), rtol=1e-14)
    assert torch.isclose(loss, torch.logaddexp(-h, h.new_zeros(())), rtol=1e-12, atol=1e-12)
    gaps = [of_sample(margin, *token) for token in tokens]
    assert of_sample(margin, logits, labels) == min(gaps)
    right = logits[kept].gather(1, labels[kept][:, None])
    assert torch.isclose(of_sample(logit, logits, labels), right.sum())


@pytest.mark.parametrize("gap", [-1e3, -5.0, 0.0, 5.0, 7.6, 29.9, 30.1, 600.0, 2e3])
@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_log_odds_of_two_equal_tokens(gap, dtype):
    """p = s² with s = sigmoid(gap): dh/dgap = 2 (1 - s) / (1 - s²) = 2 / (1 + s)."""
    x = torch.tensor(gap, dtype=dtype, requires_grad=True)
    logits = torch.stack([x, torch.zeros_like(x)]).expand(2, 2)
    h = of_sample(log_odds, logits, torch.zeros(2, dtype=torch.long))
    s = 1 / (1 + math.exp(-gap)) if gap > -700 else 0.0
    # s² / (1 - s²) = e^gap s / (1 + s)
    log_s = gap if gap < -700 else -math.log1p(math.exp(-gap))
    tolerance = {"rel": 1e-12 if dtype == f64 else 2e-6, "abs": 1e-12 if dtype == f64 else 2e-6}
    assert h.item() == pytest.approx(gap + log_s - math.log1p(s), **tolerance)
    (slope,) = torch.autograd.grad(h, x)
    assert slope.item() == pytest.approx(2 / (1 + s), **tolerance)


def test_labels_of_a_dict_are_shifted_and_those_of_a_tuple_are_not():
    logits, labels = torch.randn(5, 4, dtype=f64), torch.tensor([0, 1, 2, 3, 0])
    shifted = log_odds(fixed(logits), {"input_ids": labels[None], "labels": labels[None]})
    assert torch.equal(shifted[0], of_sample(log_odds, logits[:-1], labels[1:]))


def test_half_precision_logits_are_widened():
    logits = torch.tensor([9.0, 0.0], dtype=torch.bfloat16)
    loss = of_sample(cross_entropy, logits, torch.tensor(0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log1p(math.exp(-9)), rel=1e-6)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "form"),
    [
        (torch.zeros(3), torch.ones(1), TypeError, "`labels` must be whole numbers, got"),
        (torch.zeros(3), torch.ones(1, 2), ValueError, r"outputs of shape \(1, 3\) for labels of"),
        (torch.zeros(4, 3), torch.ones(1), ValueError, r"labels of shape \(1\)\. Give labels"),
        (torch.zeros(2, 4, 3), torch.ones(1, 2, 4), ValueError, "as its outputs are laid out"),
        (torch.zeros(1), torch.zeros(1), ValueError, "`model` must be a classifier, got one"),
    ],
)
def test_what_a_classification_output_refuses(logits, labels, error, form):
    labels = labels if error is TypeError else labels.long()
    for output in (log_odds, cross_entropy, margin, logit):
        with pytest.raises(error, match=form):
            output(fixed(logits), (X, labels))
        with pytest.raises(ValueError, match="`data` must be dicts with `labels`, got `x`"):
            output(fixed(logits), {"x": X})


def test_a_prediction_is_one_number_and_has_one_label():
    with pytest.raises(ValueError, match=r"`model` must be a scalar regression, got shape \(1, 2"):
        of_sample(prediction, torch.zeros(2), X[0])
    with pytest.raises(ValueError, match=r"`data` must be labelled as its outputs are laid out"):
        of_sample(squared_error, torch.zeros(2), X[0])
