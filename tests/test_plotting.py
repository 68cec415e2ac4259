"""Figures: what is drawn is what was given."""

import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

from ksm_ext import fit_surrogate
from ksm_ext.plotting import (
    attribution_bars,
    attribution_map,
    beeswarm,
    dendrogram,
    design_coverage,
    interaction_heatmap,
    interaction_network,
    learning_curve,
    predicted_against_true,
    walsh_spectrum,
    waterfall,
    what_if,
)
from ksm_ext.subsets import mixed_sizes

TAU = np.array([0.3, -0.5, 0.1, 0.0, 0.7])
TABLE = np.stack([TAU, TAU[::-1], -TAU], 1)
CALLS = {
    "attribution_map": lambda **kw: attribution_map(TABLE, 0.05 * np.ones((5, 3)), **kw),
    "beeswarm": lambda **kw: beeswarm(TABLE, **kw),
    "waterfall": lambda **kw: waterfall(TAU, 1.0, **kw),
    "dendrogram": lambda **kw: dendrogram(TABLE, **kw),
    "design_coverage": lambda **kw: design_coverage(mixed_sizes(5, 20, seed=0), **kw),
    "interaction_network": lambda **kw: interaction_network(np.outer(TAU, TAU), **kw),
    "attribution_bars": lambda **kw: attribution_bars(TAU, 0.1 * np.ones(5), **kw),
    "interaction_heatmap": lambda **kw: interaction_heatmap(np.outer(TAU, TAU), **kw),
    "predicted_against_true": lambda **kw: predicted_against_true(TAU, TAU**2, **kw),
    "walsh_spectrum": lambda **kw: walsh_spectrum([0.8, 0.15, 0.05], **kw),
    "learning_curve": lambda **kw: learning_curve([10, 20], [0.1, 0.2], [0, 0.1], [0.2, 0.3], **kw),
}
MASKS = mixed_sizes(5, 24, seed=0)
NAMES = [*("wiki", "$5 and $x^2$", "code", "$"), f"{'a' * 100}{'b' * 100}"]
SCORES = (
    MASKS.double() @ torch.tensor([0.5, -1.0, 0.2, 0.0, 0.7]).double() + MASKS[:, 0] * MASKS[:, 1]
)
FITTED = fit_surrogate(
    MASKS,
    torch.stack([SCORES, -SCORES], 1),
    kernel="rbf",
    task_names=NAMES,
    target_names=["u", "$v$"],
)
CALLS["what_if"] = lambda **kw: what_if(FITTED, **kw)
every_figure = pytest.mark.parametrize("draw", CALLS.values(), ids=CALLS)


@pytest.fixture(autouse=True)
def no_figure_is_left():
    plt.close("all")  # those of other tests
    yield
    plt.close("all")


@pytest.fixture
def ax():
    return Figure().subplots()


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


@every_figure
def test_draws_on_the_axes_given_without_pyplot(draw, ax, tmp_path):
    assert draw(ax=ax) is ax
    assert plt.get_fignums() == []
    ax.figure.savefig(tmp_path / "figure.png", dpi=40)


@every_figure
def test_opens_one_figure_and_changes_no_setting(draw):
    before = dict(matplotlib.rcParams)
    axes = draw()
    assert plt.get_fignums() == [axes.figure.number]
    assert dict(matplotlib.rcParams) == before


@every_figure
def test_without_matplotlib_the_remedy_is_named(draw, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(RuntimeError, match=r"`matplotlib` must be installed.*'ksm_ext\[plot\]'"):
        draw()


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, ksm_ext.plotting; assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bars_ascend_and_carry_their_names(ax):
    attribution_bars(TAU, names=list("abcde"), ax=ax)
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == sorted(TAU) and labels_of(ax.yaxis) == list("bdcae")
    middles = [bar.get_y() + bar.get_height() / 2 for bar in ax.patches]
    np.testing.assert_allclose(middles, ax.get_yticks())
    colours = {to_hex(bar.get_facecolor()) for bar in ax.patches if bar.get_width() < 0}
    assert colours == {"#d55e00"}


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_intervals_end_where_the_normal_law_says(ax, level):
    std = np.array([0.1, 0.2, 0.05, 0.0, 0.3])
    attribution_bars(TAU, std, level=level, ax=ax)
    segments = np.array(ax.collections[0].get_segments())  # (n, 2 ends, x and y)
    order = np.argsort(TAU)
    low, high = stats.norm.interval(level, TAU[order], np.maximum(std[order], 1e-300))
    np.testing.assert_allclose(segments[:, 0, 0], low, atol=1e-12)
    np.testing.assert_allclose(segments[:, 1, 0], high, atol=1e-12)


def test_top_keeps_the_largest_magnitudes_in_order(ax):
    attribution_bars(torch.tensor(TAU), top=3, ax=ax)
    assert [bar.get_width() for bar in ax.patches] == [-0.5, 0.3, 0.7]
    assert labels_of(ax.yaxis) == ["1", "0", "4"]


def test_highlight_mutes_the_others(ax):
    attribution_bars(TAU, highlight=[4, 1], ax=ax)
    assert [bar.get_alpha() for bar in ax.patches] == [1, 0.3, 0.3, 0.3, 1]


def test_pandas_names_the_tasks(ax):
    attribution_bars(pd.Series([2.0, 1.0], index=["x", "y"]), ax=ax)
    assert labels_of(ax.yaxis) == ["y", "x"]


def test_heatmap_is_centred_on_zero_without_the_diagonal(ax):
    table = np.array([[9.0, 0.2, -0.4], [0.2, 9.0, 0.1], [-0.4, 0.1, 9.0]])
    interaction_heatmap(pd.DataFrame(table, index=list("abc"), columns=list("abc")), ax=ax)
    image = ax.images[0]
    assert image.get_clim() == (-0.4, 0.4)
    drawn = image.get_array()
    assert drawn.mask.tolist() == np.eye(3, dtype=bool).tolist()
    np.testing.assert_array_equal(drawn.filled(9.0), table)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert len(texts) == 6 and texts[(2, 0)] == "\N{MINUS SIGN}0.40" and texts[(1, 0)] == "0.20"
    assert labels_of(ax.xaxis) == labels_of(ax.yaxis) == list("abc")


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_heatmap_leaves_out_what_is_not_clear_of_zero(ax, level):
    table = np.array([[9.0, 2.0, -0.5], [2.0, 9.0, 0.9], [-0.5, 0.9, 9.0]])
    interaction_heatmap(table, std=np.full((3, 3), 0.5), level=level, ax=ax)
    clear = np.abs(table) > 0.5 * stats.norm.ppf((1 + level) / 2)
    drawn = ~ax.images[0].get_array().mask
    np.testing.assert_array_equal(drawn, clear & ~np.eye(3, dtype=bool))
    assert ax.images[0].get_clim() == (-2.0, 2.0) and len(ax.texts) == drawn.sum()


def test_heatmap_of_nothing_clear(ax):
    interaction_heatmap(np.ones((4, 4)), std=np.ones((4, 4)), ax=ax)
    assert ax.images[0].get_array().mask.all() and not ax.texts


@pytest.mark.parametrize("n", [1, 2, 13, 60])
def test_heatmap_sizes(ax, n):
    interaction_heatmap(np.zeros((n, n)), ax=ax)
    assert ax.images[0].get_array().shape == (n, n)
    assert ax.images[0].get_clim() == (-1, 1)
    assert len(ax.texts) == (n * (n - 1) if n <= 12 else 0)


def test_the_map_shows_what_is_clear_side_by_side(ax):
    random = np.random.default_rng(0)
    groups = np.repeat([[1.0, -1.0, 1.0, -1.0], [-1.0, 1.0, -1.0, 1.0]], 4, axis=0)
    table = groups[random.permutation(8)] + 0.01 * random.normal(size=(8, 4))
    std = np.full((8, 4), 0.1)
    std[2, 1] = 9.0
    attribution_map(pd.DataFrame(table, columns=list("abcd")), std, ax=ax)
    cells = ax.images[0].get_array()
    tasks = [int(text) for text in labels_of(ax.yaxis)]
    targets = labels_of(ax.xaxis)
    scaled = table / np.abs(table).max(0)
    for row, task in enumerate(tasks):
        for column, name in enumerate(targets):
            j = "abcd".index(name)
            if (task, j) == (2, 1):
                assert cells.mask[row, column]
            else:
                assert cells[row, column] == pytest.approx(scaled[task, j])
    signs = np.sign(table[tasks, 0])
    assert (np.diff(signs) != 0).sum() == 1  # one change: groups are not mixed
    assert {*targets[:2]} in ({"a", "c"}, {"b", "d"})


def test_a_swarm_has_every_value_in_the_row_of_its_task(ax):
    beeswarm(TABLE, top=3, ax=ax)
    tasks = [int(text) for text in labels_of(ax.yaxis)]
    strength = np.abs(TABLE).mean(1)
    assert tasks == sorted(np.argsort(-strength, kind="stable")[:3], key=lambda i: strength[i])
    points = [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in ax.lines[:-1]]
    for place, task in enumerate(tasks):
        mine = sorted(x for x, y in points if abs(y - place) < 0.5)
        np.testing.assert_allclose(mine, np.sort(TABLE[task]))


def test_points_that_would_hide_each_other_are_moved(ax):
    beeswarm(np.ones((1, 4)), ax=ax)
    heights = {float(line.get_ydata()[0]) for line in ax.lines[:-1]}
    assert len(heights) == 4 and max(map(abs, heights)) < 0.5


@pytest.mark.parametrize("top", [2, 9])
def test_a_waterfall_goes_from_none_to_all(ax, top):
    waterfall(TAU, 1.0, list("abcde"), top=top, ax=ax)
    order = np.argsort(-np.abs(TAU), kind="stable")
    names = [*np.array(list("abcde"))[order[:top]], *(["3 others"] if top == 2 else [])]
    assert labels_of(ax.yaxis) == ["no task", *names, "all tasks"]
    level = 1.0
    for bar in ax.patches:
        edges = bar.get_x(), bar.get_x() + bar.get_width()
        assert any(edge == pytest.approx(level) for edge in edges)
        level = (
            next(edge for edge in edges[::-1] if edge != pytest.approx(level))
            if (bar.get_width())
            else level
        )
    assert level == pytest.approx(1 + TAU.sum())


@pytest.mark.parametrize(
    ("subset", "inside"),
    [
        (None, [1] * 5),
        ([], [0] * 5),
        (["wiki", 2], [1, 0, 1, 0, 0]),
        (torch.tensor([0, 2]), [1, 0, 1, 0, 0]),
        ([True, False, True, False, False], [1, 0, 1, 0, 0]),
        (np.array([0, 1, 1, 0, 0], dtype=bool), [0, 1, 1, 0, 0]),
    ],
    ids=str,
)
def test_what_if_shows_each_task_toggled(ax, subset, inside):
    what_if(FITTED, subset, target="$v$", level=0.8, ax=ax)
    inside = torch.tensor(inside)
    toggled = torch.stack([inside.bool(), *(inside.bool() ^ torch.eye(5, dtype=torch.bool))])
    values, std = (table[:, 1] for table in FITTED.predict(toggled, return_std=True))
    order = values[1:].argsort(stable=True).tolist()
    shown = [text.replace("\\$", "$") for text in labels_of(ax.yaxis)]
    signs = ["\N{MINUS SIGN}" if inside[task] else "+" for task in order]
    assert [label[0] for label in shown] == signs
    assert [label[2:6] for label in shown] == [NAMES[task][:4] for task in order]
    stems = [line.get_xdata() for line in ax.lines if line.get_linewidth() == 2.4]
    np.testing.assert_allclose(stems, [[values[0], values[1 + task]] for task in order])
    bars = [container.lines[2][0].get_segments()[0][:, 0] for container in ax.containers]
    half = stats.norm.ppf(0.9) * std[1:]
    for (low, high), task in zip(bars, order, strict=True):
        assert (low + high) / 2 == pytest.approx(float(values[1 + task]))
        assert (high - low) / 2 == pytest.approx(float(half[task]))


@pytest.mark.parametrize("letters", [4, 30, 200])
def test_a_map_has_room_for_long_names(letters):
    names = [f"{'n' * letters}{i}" for i in range(6)]
    frame = pd.DataFrame(np.arange(18.0).reshape(6, 3), names, names[:3])
    axes = attribution_map(frame)
    axes.figure.canvas.draw()
    height = axes.get_window_extent().height
    tall = [text.get_window_extent().height for text in axes.get_yticklabels()]
    assert sum(tall) < height  # names of tasks do not overlap


@pytest.mark.parametrize("subset", [["wiki", 0], np.array([0, 1, 1, 0, 0]), [True, False]], ids=str)
def test_what_if_is_sure_of_the_subset(subset, ax):
    with pytest.raises(ValueError, match=r"`subset` must be (of different tasks|5 flags), got "):
        what_if(FITTED, subset, ax=ax)


def test_what_if_keeps_what_changes_most(ax):
    what_if(FITTED, top=2, ax=ax)
    assert len(labels_of(ax.yaxis)) == 2


NAMED = {
    "attribution_bars": lambda ax: attribution_bars(TAU, names=NAMES, ax=ax),
    "attribution_map": lambda ax: attribution_map(FITTED, ax=ax),
    "beeswarm": lambda ax: beeswarm(FITTED, ax=ax),
    "waterfall": lambda ax: waterfall(TAU, 1.0, NAMES, ax=ax),
    "dendrogram": lambda ax: dendrogram(FITTED, ax=ax),
    "interaction_heatmap": lambda ax: interaction_heatmap(np.outer(TAU, TAU), NAMES, ax=ax),
    "interaction_network": lambda ax: interaction_network(1 + np.outer(TAU, TAU), NAMES, ax=ax),
    "what_if": lambda ax: what_if(FITTED, ax=ax),
}


@pytest.mark.parametrize("draw", NAMED.values(), ids=NAMED)
def test_names_are_drawn_as_they_are_and_not_too_long(draw, ax, tmp_path):
    """Dollars begin no formula, and 200 letters leave room for the picture."""
    draw(ax)
    ax.figure.savefig(tmp_path / "figure.svg")
    texts = [*ax.get_xticklabels(), *ax.get_yticklabels(), *ax.texts]
    shown = [text for text in texts if any(part in text.get_text() for part in ("5 and", "aaa"))]
    assert len({text.get_text() for text in shown}) == 2
    for text in shown:
        plain, is_formula = text._preprocess_math(text.get_text())
        assert not is_formula and len(plain) < 40
        assert "$5 and $x^2$" in plain or ("aaa" in plain and "…" in plain and "bbb" in plain)


def test_a_dendrogram_joins_what_is_alike_first(ax):
    table = np.array([[1.0, 0.0], [0.0, 1.0], [0.99, 0.0], [0.0, 0.98]])
    dendrogram(table, list("abcd"), ax=ax)
    order = labels_of(ax.yaxis)
    assert {*order[:2]} in ({"a", "c"}, {"b", "d"})


def test_coverage_counts_sizes_beside_both_laws(ax):
    masks = mixed_sizes(5, 20, seed=0)
    design_coverage(masks, ax=ax)
    assert [bar.get_height() for bar in ax.patches] == [
        int((masks.sum(1) == size).sum()) for size in range(6)
    ]
    shapley, banzhaf = (line.get_ydata() for line in ax.lines)
    np.testing.assert_allclose(shapley, 20 / 6)
    np.testing.assert_allclose(banzhaf, 20 * stats.binom.pmf(range(6), 5, 0.5))


def test_a_network_joins_what_is_clear(ax):
    table = np.zeros((4, 4))
    table[0, 1] = table[1, 0] = 2.0
    table[2, 3] = table[3, 2] = -1.0
    table[0, 3] = table[3, 0] = 0.1
    interaction_network(table, list("abcd"), std=np.full((4, 4), 0.3), ax=ax)
    lines = [line for line in ax.lines if len(line.get_xdata()) == 2]
    assert [to_hex(line.get_color()).upper() for line in lines] == ["#0072B2", "#D55E00"]
    assert lines[0].get_linewidth() > lines[1].get_linewidth()
    assert sorted(text.get_text() for text in ax.texts) == list("abcd")


def test_surrogates_are_drawn_as_their_answers(ax):
    masks = mixed_sizes(4, 14, seed=0)
    scores = (
        masks.double() @ torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 0.5], [0.2, 0.0]]).double()
    )
    names = {"task_names": list("abcd"), "target_names": ["x", "y"]}
    two = fit_surrogate(masks, scores, kernel="linear", **names)
    attribution_map(two, ax=ax)
    cells, effects = ax.images[0].get_array(), two.attribute()
    scaled = (effects / effects.abs().amax(0)).numpy()
    row, column = labels_of(ax.yaxis).index("b"), labels_of(ax.xaxis).index("y")
    assert cells[row, column] == pytest.approx(scaled[1, 1])
    with pytest.raises(ValueError, match="must be a surrogate of one target, got 2 targets"):
        attribution_bars(two)
    one = fit_surrogate(masks, scores[:, 0], kernel="linear", task_names=list("abcd"))
    bars = attribution_bars(one, ax=Figure().subplots())
    assert labels_of(bars.yaxis) == [list("abcd")[i] for i in one.attribute().argsort().tolist()]


def test_scatter_has_all_points_the_identity_and_both_numbers(ax):
    rng = np.random.default_rng(0)
    true = rng.normal(size=(20, 3))
    predicted = true + rng.normal(size=(20, 3))
    predicted_against_true(true, predicted, ax=ax)
    points = ax.collections[0].get_offsets()
    np.testing.assert_array_equal(points, np.stack([true.ravel(), predicted.ravel()], axis=1))
    line = ax.lines[0]
    np.testing.assert_array_equal(line.get_xdata(), line.get_ydata())
    assert ax.get_xlim() == ax.get_ylim()
    spearman = np.mean([stats.spearmanr(true[:, j], predicted[:, j])[0] for j in range(3)])
    error = ((true - predicted) ** 2).mean() / true.var(axis=0, ddof=1).mean()
    assert ax.get_title(loc="left") == f"Spearman {spearman:.2f}   residual error {error:.2f}"


def test_spectrum_bars(ax):
    walsh_spectrum([0.7, 0.2, 0.06, 0.034, 0.006, 0.0], ax=ax)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [70, 20, 6, 3.4, 0.6, 0])
    assert [text.get_text() for text in ax.texts] == ["70", "20", "6", "3", "<1", "0"]
    assert labels_of(ax.xaxis) == list("123456")


def test_spectrum_gathers_the_high_orders(ax):
    walsh_spectrum([0.7, 0.2, 0.06, 0.04], max_order=2, ax=ax)
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], [70, 20, 10])
    assert labels_of(ax.xaxis) == ["1", "2", "\N{GREATER-THAN OR EQUAL TO}3"]


def test_learning_curve_draws_lines_and_bands(ax):
    x = [10, 40, 160]
    mean = np.array([[0.1, 0.3, 0.5], [0.2, 0.3, 0.4]])
    learning_curve(x, mean, mean - 0.1, mean + 0.2, labels=["a", "b"], ax=ax)
    assert ax.get_xscale() == "log" and labels_of(ax.xaxis) == ["10", "40", "160"]
    for number, line in enumerate(ax.lines):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([x, mean[number]], axis=1))
        vertices = ax.collections[number].get_paths()[0].vertices
        for low, at in zip(mean[number] - 0.1, x, strict=True):
            ends = vertices[vertices[:, 0] == at, 1]
            np.testing.assert_allclose([ends.min(), ends.max()], [low, low + 0.3])
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_learning_curve_of_one_curve_without_band(ax):
    learning_curve([10, 20, 30], torch.tensor([0.1, 0.2, 0.3]), ax=ax)
    assert len(ax.lines) == 1 and not ax.collections and ax.get_legend() is None
    assert ax.get_xscale() == "linear"


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda: attribution_bars(np.eye(2)), "`attributions` must be 1-dimensional"),
        (lambda: attribution_bars([1.0, np.nan]), "`attributions` must be finite"),
        (lambda: attribution_bars(TAU, names=["a"]), "`names` must be 5 names, got 1 of them"),
        (lambda: attribution_bars(TAU, [0.1]), "`std` must be 5 non-negative numbers"),
        (lambda: attribution_bars(TAU, -TAU), "`std` must be 5 non-negative numbers"),
        (lambda: interaction_heatmap(np.eye(3), std=np.eye(2)), "`std` must be 3 x 3 non-neg"),
        (lambda: attribution_bars(TAU, TAU**2, level=95), "`level` must be strictly between"),
        (lambda: interaction_heatmap(np.ones((2, 3))), r"`interactions` must be square, got shape"),
        (lambda: walsh_spectrum([1.5]), "`fractions` must be within 0 and 1, got 1.5"),
        (lambda: learning_curve([1, 2], [1.0]), "`mean` must be of 2 columns"),
        (lambda: learning_curve([1], [1.0], [0.5]), "`low` must be given together"),
        (lambda: learning_curve([1], [[1.0], [2.0]], [0.5], [3.0]), "`low` must be of 2 rows"),
        (lambda: learning_curve([1], [1.0], labels=["a", "b"]), "`labels` must be 1 names"),
    ],
)
def test_errors_name_argument_and_value(call, found):
    with pytest.raises(ValueError, match=found):
        call()
    assert plt.get_fignums() == []
