"""What the report says first, against the surrogate's own attributions and intervals."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ksm_ext import fit_surrogate, write_report
from ksm_ext.drawing import shortened, ticks
from ksm_ext.report.answers import answer, directions
from ksm_ext.subsets import mixed_sizes
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.learning_curve import errors_by_count

NAMES = ["wiki", "code", "books", "mail", "spam", "toxic"]
EFFECTS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0]).double()
TARGETS = ("loss", "accuracy", "answer length")


def fitted(targets=TARGETS, seed=0, m=60):
    masks = mixed_sizes(6, m, seed=seed)
    good = masks.double() @ EFFECTS
    generator = torch.Generator().manual_seed(seed)
    noise = 0.1 * torch.randn(m, len(targets), generator=generator, dtype=torch.float64)
    signs = torch.tensor([-1.0 if "loss" in name else 1.0 for name in targets])
    scores = good[:, None] * signs.double() + noise
    return fit_surrogate(masks, scores, task_names=NAMES, target_names=list(targets))


def page_of(surrogate, tmp_path, **options):
    write_report(surrogate, tmp_path / "page.html", **options)
    return (tmp_path / "page.html").read_text()


def words_of(html):
    return re.sub(r"\s+", " ", re.sub("<[^>]*>", "", html))


# -- which way is better ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "maximize"),
    [
        ("val_loss", False),
        ("perplexity", False),
        ("accuracy", True),
        ("bleu", True),
        ("answer length", None),
        ("loss of accuracy", None),
    ],
)
def test_directions_are_guessed_from_words(name, maximize):
    (found,) = directions([name], None)
    assert found.maximize is maximize and not found.given
    assert ("guessed from the name" in str(found)) is (maximize is not None)
    (given_,) = directions([name], {name: True})
    assert given_.maximize is True and str(given_) == "higher is better, as given"
    assert directions([name, "x"], False)[1].maximize is False


def test_directions_are_checked():
    with pytest.raises(ValueError, match=r"`maximize` must be one of 'loss', got 'los'"):
        directions(["loss"], {"los": True})
    for wrong in ("loss", {"loss": 1}, 1, ["loss"]):
        with pytest.raises(TypeError, match=r"`maximize` must be True, False, or these by target"):
            directions(["loss"], wrong)


# -- the answer ---------------------------------------------------------------------------------


@given(
    values=st.lists(st.floats(-10, 10), min_size=1, max_size=12),
    half=st.floats(0, 5),
    maximize=st.sampled_from([True, False, None]),
)
def test_tasks_are_named_where_intervals_exclude_zero(values, half, maximize):
    (way,) = directions(["x"], maximize)
    names = [f"t{i}" for i in range(len(values))]
    found = answer(torch.tensor(values), torch.full((len(values),), half), names, way, 2)
    clear = [i for i, value in enumerate(values) if np.float32(abs(value)) > np.float32(half)]
    assert found["num_clear"] == len(clear)
    for side, sign in zip(found["sides"], (1, -1), strict=True):
        mine = [i for i in clear if values[i] * way.sign * sign > 0]
        assert side["count"] == len(mine)
        mine.sort(key=lambda i: -abs(values[i]))
        sizes = [abs(values[int(name[1:])]) for name, _ in side["tasks"]]
        np.testing.assert_allclose(sizes, [abs(values[i]) for i in mine[:3]], rtol=1e-6)


def test_the_page_answers_first_in_the_direction_of_each_target(tmp_path):
    html = page_of(fitted(), tmp_path, readout="shapley")
    loss, accuracy, length = (words_of(part) for part in html.split('class="target"')[1:])
    assert "lower is better, guessed from the name" in loss
    assert "higher is better, guessed from the name" in accuracy
    assert "which way is better is not known" in length
    for part in (loss, accuracy):
        assert re.search("Tasks that help: wiki .*, code .*, books .*Tasks that hurt: toxic", part)
    assert re.search("Tasks that raise it: wiki .*Tasks that lower it: toxic", length)
    assert "5 of 6 tasks have a 95 % interval that excludes zero." in loss
    text = words_of(html)
    assert "Tasks that help most targets, clear of zero: wiki (2 of 2)" in text
    assert "No task is seen to hurt most targets." not in text
    assert text.index("Tasks that help most targets") < text.index("How far to trust")
    turned = page_of(fitted(), tmp_path, readout="shapley", maximize={"loss": True})
    assert re.search("Tasks that help: toxic", words_of(turned.split('class="target"')[1]))


def test_one_colour_is_good_everywhere(tmp_path):
    """In the table, in the map of tasks and targets, and in what the script is told."""
    html = page_of(fitted(["loss", "accuracy"]), tmp_path)
    for part in html.split('class="target"')[1:]:
        styles = dict(re.findall(r'<th scope="row">(\w+)</th><td class="bar (\w+)', part))
        assert (styles["wiki"], styles["toxic"]) == ("good", "bad")
    assert re.findall(r'"sign":(-?1)', html) == ["-1", "1"]
    drawn = re.search(r'<figure class="whole">.*?</figure>', html, re.S)[0]
    rows = [text for text in re.findall(r"<text[^>]*>([^<]*)</text>", drawn) if text in NAMES]
    heights = dict(re.findall(r'y="([\d.]+)" text-anchor="end">(\w+)<', drawn))
    places = {name: float(y) - 11.5 for y, name in heights.items()}
    for style, path in re.findall(r'<path class="(good|bad) level\d" d="([^"]*)"', drawn):
        tops = {float(y) for y in re.findall(r"M[\d.]+ ([\d.]+)h", path)}
        mine = {name for name in rows if any(abs(places[name] - top) < 0.2 for top in tops)}
        assert mine <= ({"wiki", "code", "books", "mail"} if style == "good" else {"spam", "toxic"})
    assert set(rows) >= {"wiki", "toxic"}


def test_the_map_has_neighbours_alike(tmp_path):
    """Two groups of targets with opposite effects do not interleave."""
    targets = ["a_loss", "b_acc", "c_loss", "d_acc"]
    masks = mixed_sizes(6, 60, seed=0)
    one, other = (masks.double() @ e for e in (EFFECTS, EFFECTS.flip(0)))
    scores = torch.stack([-one, other, -other, one], 1)
    surrogate = fit_surrogate(masks, scores, task_names=NAMES, target_names=targets)
    drawn = re.search(r'<figure class="whole">.*?</figure>', page_of(surrogate, tmp_path), re.S)[0]
    order = [t for t in re.findall(r"<text[^>]*>([^<]*)</text>", drawn) if t in targets]
    assert {*order[:2]} in ({"a_loss", "d_acc"}, {"b_acc", "c_loss"})


# -- the learning curve -------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["linear", "lasso", "least_squares", "rbf"])
def test_the_learning_curve_is_what_fits_to_fewer_subsets_predict(kernel):
    masks = mixed_sizes(9, 80, seed=0)
    noise = torch.randn(80, generator=torch.Generator().manual_seed(0)).double()
    scores = masks.double() @ torch.arange(9.0).double() + noise
    surrogate = fit_surrogate(masks, scores, kernel=kernel)
    points = errors_by_count(surrogate, seed=1)
    assert [size for size, _ in points] == [10, 20, 40, 80]
    assert points[-1][1] == pytest.approx(float(surrogate.loo_error))
    order = torch.randperm(80, generator=torch.Generator().manual_seed(1))
    scores = surrogate.scores
    if kernel == "rbf":  # its scale is the fitted one, and not chosen again
        kernel = surrogate.kernel_terms[0].kernel
    part = fit_surrogate(masks[order[:20]], scores[order[:20]], kernel=kernel)
    errors = (part.predict(masks[order[20:]]) - scores[order[20:]]).square()
    assert points[1][1] == pytest.approx(float(errors.mean() / scores.var(correction=0)))


def test_no_learning_curve_where_it_would_be_another_surrogates():
    masks, scores = mixed_sizes(6, 60, seed=0), torch.arange(60.0)
    assert errors_by_count(fit_surrogate(masks, scores)) == []  # fewer than 64
    masks = mixed_sizes(8, 80, seed=0)
    noise = torch.randn(80, generator=torch.Generator().manual_seed(1))
    nothing = fit_surrogate(masks, noise)
    assert not nothing.predictors and errors_by_count(nothing) == []


# -- numbers and names --------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_and_within(low, width):
    found = ticks(low, low + width)
    slack = 1e-6 * width + 1e-9 * abs(low)
    assert 2 <= len(found) <= 8
    assert all(low - slack <= tick <= low + width + slack for tick in found)
    step = found[1] - found[0]
    leading = float(f"{step:.6e}".split("e")[0])
    assert min(abs(leading - digit) for digit in (1, 2, 5, 10)) < 1e-3


def test_equal_ends_have_no_ticks():
    assert ticks(1.0, 1.0) == []


@given(st.text(min_size=0, max_size=40), st.integers(3, 20))
def test_long_names_lose_their_middle(name, length):
    found = shortened(name, length)
    assert len(found) == min(len(name), length)
    assert name.startswith(found.split("…")[0]) if len(name) > length else found == name


def test_intervals_are_as_wide_as_the_surrogates(tmp_path):
    surrogate = fitted(["loss"])
    value, std = surrogate.attribute("banzhaf", return_std=True)
    half = quantile(0.95) * std[5, 0]
    ends = [f"{float(end):.2f}" for end in (value[5, 0] - half, value[5, 0] + half)]
    html = page_of(surrogate, tmp_path, readout="banzhaf")
    assert f"toxic {float(value[5, 0]):.2f} ({ends[0]} to {ends[1]})" in words_of(html)


# -- in a notebook ------------------------------------------------------------------------------


def test_a_notebook_shows_what_helps_and_hurts():
    surrogate = fitted()
    html = surrogate._repr_html_()
    assert len(html) < 20_000 and "<script" not in html
    assert str(surrogate).splitlines()[0] in words_of(html).replace("&lt;", "<")
    assert "loss: leave-one-out effects, lower is better, guessed from the name; " in words_of(html)
    loss = html[html.index("<b>loss</b>") : html.index("<b>accuracy</b>")]
    styles = re.findall(r'<rect class="(\w+)', loss)
    tasks = [text for text in re.findall(r'text-anchor="end">([^<]*)<', loss) if text in NAMES]
    found = dict(zip(tasks, styles, strict=True))
    assert (found["wiki"], found["toxic"]) == ("good", "bad")


def test_names_are_escaped_in_a_notebook():
    masks = mixed_sizes(6, 40, seed=0)
    evil = "<script>alert(1)</script>"
    names = [evil, *NAMES[1:]]
    surrogate = fit_surrogate(
        masks, masks.double() @ EFFECTS, task_names=names, target_names=[evil]
    )
    assert "<script>" not in surrogate._repr_html_()


def test_a_notebook_shows_text_where_attributions_would_take_long(monkeypatch):
    monkeypatch.setattr("ksm_ext.report.notebook._MAX_WORK", 0)
    assert "<svg" not in fitted()._repr_html_()
