"""The report: one page, whole, safe, and with the surrogate's numbers in it."""

import json
import re
import shutil
import subprocess
from base64 import b64decode
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ksm_ext import fit_surrogate, load_surrogate
from ksm_ext.report.page import write_report
from ksm_ext.subsets import all_subsets, bernoulli
from ksm_ext.surrogates.calibration import quantile
from ksm_ext.surrogates.kernels import Polynomial
from ksm_ext.surrogates.more_subsets import more_subsets
from ksm_ext.surrogates.quality import qualities, suitability

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert(\"x\")</script> & 'co' $title"


class Page(HTMLParser):
    """Checks that tags nest, and collects links and texts, those without style and script."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.urls, self.texts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.urls += [(tag, value) for name, value in attrs if name in ("href", "src")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


def problem(n=6, m=40, t=2, seed=0):
    masks = bernoulli(n, m, 0.5, seed=seed)
    random = np.random.default_rng(seed)
    effects = torch.from_numpy(random.normal(size=(n, t)))
    w = masks.double()
    noise = 0.1 * torch.from_numpy(random.normal(size=(m, t)))
    return masks, w @ effects + w[:, :1] * w[:, 1:2] + noise


def noise(m=80, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, generator=generator, dtype=torch.float64)


def data_of(html):
    """What the script reads, of each target."""
    about = [json.loads(text) for text in re.findall(r'class="data">(.*?)</script>', html)]
    whole = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])
    n = len(whole["tasks"])
    values = np.frombuffer(b64decode(whole["values"]), "<f4").reshape(-1, n)
    halves = np.frombuffer(b64decode(whole["halves"] or ""), "<u2").reshape(-1, n) / 65535
    return [
        {**each, "values": value, "halves": half * each["widest"]}
        for each, value, half in zip(about, values, halves, strict=True)
    ]


def minus(text):
    return text.replace("-", "\N{MINUS SIGN}")


def cells_of(html):
    """The texts of the rows of attributions: name and numbers."""
    rows = re.findall(r'<tr><th scope="row">([^<]*)</th><td class="bar[^>]*></td>(.*?)</tr>', html)
    return [[name, *re.findall(r"<td>(.*?)</td>", cells)] for name, cells in rows]


def page_of(surrogate, tmp_path, **kw):
    write_report(surrogate, tmp_path / "r.html", **kw)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_numbers_and_intervals_are_those_of_the_surrogate(tmp_path):
    surrogate = fit_surrogate(*problem())
    html, page = page_of(surrogate, tmp_path, readout="shapley")
    values, std = surrogate.attribute("shapley", return_std=True)
    for j, data in enumerate(data_of(html)):
        np.testing.assert_allclose(data["values"], values[:, j], rtol=1e-6)
        half = quantile(0.95) * std[:, j]
        np.testing.assert_allclose(data["halves"], half, atol=float(half.max()) / 65535)
        value, half = values[:, j].max(), quantile(0.95) * std[values[:, j].argmax(), j]
        ends = (value, value - half, value + half)
        assert cells_of(html)[6 * j][1:] == [minus(f"{end:.{data['decimals']}f}") for end in ends]
    # scatter, errors, spectrum and heat map of two targets; their map
    assert page.tags.count("figure") == 9
    num_more = more_subsets(surrogate, "shapley").num_more
    assert f"{num_more} more subsets" in page.text and f"({40 + num_more} instead of 40)" in html


def test_what_more_subsets_would_halve_is_what_was_computed(tmp_path):
    """The intervals where the noise of a run is known, and else their smooth part."""
    for noise_std, halved in ((None, "the smooth part of the intervals"), (0.1, "the intervals")):
        surrogate = fit_surrogate(*problem(), kernel="anova2", noise_std=noise_std)
        _, page = page_of(surrogate, tmp_path)
        assert f"would halve {halved} of the attributions" in page.text


@pytest.mark.parametrize("readout", ["loo", "shapley", "banzhaf"])
def test_the_page_says_whether_the_subsets_suit_the_question(readout, tmp_path):
    masks, scores = problem(n=14, m=60)
    for count in (60, 30):
        surrogate = fit_surrogate(masks[:count], scores[:count])
        found = suitability(surrogate, readout)
        html, page = page_of(surrogate, tmp_path, readout=readout)
        assert f"{found.scored} {found.verdict}" in page.text
        assert (f"<strong>{found.verdict}" in html) is not found.suits
        assert f"ksm next surrogate.safetensors --for {readout}" in page.text
        assert f'next_best(surrogate, 10, "{readout}")' in page.text
    weights = fit_surrogate(masks * 0.5 + 0.25 * masks[:, :1], scores, kernel="rbf")
    assert "suit the question" not in page_of(weights, tmp_path)[1].text


def test_strongest_interactions_are_those_of_the_surrogate(tmp_path):
    surrogate = fit_surrogate(*problem(t=1), task_names=list("uvwxyz"))
    _, page = page_of(surrogate, tmp_path, readout="banzhaf")
    value, std = surrogate.interactions("banzhaf", return_std=True)
    at = int(value[..., 0].abs().argmax())
    i, j = sorted((at // 6, at % 6))
    low = value[i, j, 0] - quantile(0.95) * std[i, j, 0]
    texts = [text.strip() for text in page.texts if text.strip()]
    count = int((value.abs() > quantile(0.95) * std).sum()) // 2
    assert 1 <= count <= 10
    caption = f"Strongest interactions. {count} of 15 have a 95 % interval that excludes zero."
    found = texts[texts.index(caption) + 6 :]
    assert found[:2] == ["uvwxyz"[i], "uvwxyz"[j]]
    numbers = [float(text.replace("\N{MINUS SIGN}", "-")) for text in found[2:4]]
    assert numbers == pytest.approx([float(value[i, j, 0]), float(low)], abs=0.006)


def test_page_needs_no_network(tmp_path):
    html, page = page_of(fit_surrogate(*problem()), tmp_path)
    outside = [(tag, url) for tag, url in page.urls if not url.startswith("#")]
    assert outside == [("a", "https://arxiv.org/abs/2602.03783")]
    assert "url(" not in html and "@import" not in html and "fetch(" not in html
    assert "default-src 'none'" in html  # a browser would not load anything either


def test_names_are_escaped(tmp_path):
    masks, scores = problem()
    names = [EVIL, *"bcdef"]
    surrogate = fit_surrogate(masks, scores, task_names=names, target_names=["</section>", EVIL])
    html, page = page_of(surrogate, tmp_path, title=EVIL)
    assert page.tags.count("script") == 4  # the data, the script, and what two targets add
    assert "<script>alert" not in html
    assert EVIL in page.texts
    assert json.loads(re.search(r'id="data">(.*?)</script>', html)[1])["tasks"] == names


@pytest.mark.parametrize("kernel", ["lasso", "least_squares"])
def test_linear_surrogates_have_the_intervals_of_a_kernel(tmp_path, kernel):
    _, page = page_of(fit_surrogate(*problem(), kernel=kernel), tmp_path)
    assert "no intervals" not in page.text and "low" in page.texts


def test_weights_have_intervals_and_know_only_leave_one_out(tmp_path):
    masks, scores = problem()
    surrogate = fit_surrogate(masks.double() * torch.linspace(0.5, 1.0, 6).double(), scores)
    with pytest.raises(ValueError, match="`readout` must be 'loo'"):
        write_report(surrogate, tmp_path / "r.html", readout="shapley")
    _, page = page_of(surrogate, tmp_path)
    assert "mean weights" in page.text
    assert "no intervals" not in page.text and "low" in page.texts


def test_many_targets_and_tasks_are_capped_and_the_page_says_so(tmp_path):
    masks, scores = problem(n=250, m=60, t=500)
    surrogate = fit_surrogate(masks, scores, kernel="linear", ridge=10.0)
    html, page = page_of(surrogate, tmp_path)
    assert html.count('class="target"') == 500 and html.count('name="target" open') == 1
    assert page.tags.count("figure") == 1 + 2 * 40  # a map, and the first 40 are drawn
    assert "Shown: 20 of 250." in page.text and len(data_of(html)[0]["values"]) == 250
    assert "heat map" not in page.text.lower()  # 31 million interactions
    assert len(html) < 4_000_000


def test_the_map_of_many_tasks_shows_those_that_interact_most(tmp_path):
    masks = bernoulli(46, 400, 0.5, seed=0)
    scores = sum(3.0 * (masks[:, 2 * i] & masks[:, 2 * i + 1]) for i in range(22))
    surrogate = fit_surrogate(masks, scores, kernel="anova2")
    _, page = page_of(surrogate, tmp_path, readout="banzhaf")
    pairs, std = surrogate.interactions("banzhaf", return_std=True)
    clear = pairs.abs() > quantile(0.95) * std
    assert int(clear.any(1).sum()) > 40
    assert "Shown: 40 of 46 tasks, those of the strongest." in page.text
    at = int((pairs.abs() * clear).argmax())
    assert f"{at // 46} and {at % 46}: " in page.text
    drawn = re.findall(r"(\d+) and (\d+): ", page.text)
    assert all(clear[int(i), int(j)] for i, j in drawn)


@pytest.mark.parametrize("kernel", ["linear", "lasso", "least_squares", Polynomial(1, 0.1)])
def test_a_linear_surrogate_claims_no_interactions(tmp_path, kernel):
    _, page = page_of(fit_surrogate(*problem(t=1), kernel=kernel), tmp_path)
    assert page.text.count("interactions.") == 1
    assert "A linear surrogate has no interactions." in page.text
    assert page.tags.count("figure") == 2  # predictions and errors


@pytest.mark.parametrize("rounded", [False, True])
def test_no_interaction_is_shown_that_is_not_clear_of_zero(rounded, tmp_path):
    """Nor if every subset is known without noise: intervals of no width, around sums that round."""
    masks = all_subsets(6) if rounded else bernoulli(12, 80, 0.5, seed=0)
    scores = masks.double() @ torch.linspace(-1, 1, masks.shape[1]).double()
    options = {"kernel": "exponential", "ridge": 0.0} if rounded else {"kernel": "anova2"}
    surrogate = fit_surrogate(masks, scores if rounded else scores + noise(), **options)
    values, std = surrogate.interactions("shapley", return_std=True)
    largest = float(values.abs().max())
    if rounded:
        assert float(std.max()) < 1e-9 and largest < 1e-12
    else:
        assert bool((values.abs() <= quantile(0.95) * std).all()) and largest > 0
    html, page = page_of(surrogate, tmp_path, readout="shapley")
    assert "No interaction is clear of zero" in page.text
    assert "Heat map" not in html and "Strongest interactions" not in page.text


@pytest.mark.parametrize("kernel", ["auto", "mean", "least_squares", "lasso"])
@pytest.mark.parametrize("held_out", [False, True])
def test_of_pure_noise_nothing_is_claimed(tmp_path, kernel, held_out):
    masks, scores = bernoulli(12, 80, 0.5, seed=0), noise()
    if kernel == "mean":
        surrogate = only_the_mean(masks, scores)
    else:
        surrogate = fit_surrogate(masks, scores, kernel=kernel)
    (quality,) = qualities(surrogate)
    assert quality.error >= 1 and quality.rank_correlation is None
    others = (bernoulli(12, 30, 0.5, seed=1), noise(30, seed=1)) if held_out else None
    _, page = page_of(surrogate, tmp_path, held_out=others)
    text = page.text
    assert f"Nothing is predicted: the mean is as good ({quality.how} error" in text
    assert "would halve" not in text
    assert "nteraction" not in text and "Walsh" not in text
    if held_out and not quality.mean_only:  # these were measured
        rank = spearmanr(others[1], surrogate.predict(others[0])).statistic
        assert minus(f"Spearman {rank:.2g}") in text
    else:
        assert "Spearman" not in text and "no better than the mean" in text
    if quality.mean_only:
        assert "Attributions" not in text


def only_the_mean(masks, scores):
    """A surrogate without terms, as ``kernel="auto"`` chooses where the mean is best."""
    surrogate, mean, m = fit_surrogate(masks, scores, kernel="linear"), scores.mean(), len(scores)
    residuals = (scores - mean)[:, None] * m / (m - 1)
    return replace(surrogate, kernel_terms=(), intercept=mean[None], residuals=residuals)


def test_a_target_of_its_own_quality_each(tmp_path):
    masks, scores = problem(n=12, m=80, t=1)
    both = torch.stack([scores[:, 0], noise()], 1)
    surrogate = fit_surrogate(masks, both, kernel="anova2", share_ridge=False)
    good, bad = qualities(surrogate)
    left_out = surrogate.scores - surrogate.residuals
    rank = spearmanr(both[:, 0], left_out[:, 0]).statistic
    assert good.rank_correlation == pytest.approx(rank, abs=1e-12)
    error = surrogate.residuals[:, 0].square().mean() / both[:, 0].var()
    assert good.error == pytest.approx(float(error))
    assert str(good).startswith(f"leave-one-out error {good.error:.3f}, Spearman correlation 0.9")
    assert bad.error >= 1 or spearmanr(both[:, 1], left_out[:, 1]).statistic <= 0
    assert str(bad).startswith("nothing is predicted: the mean is as good (leave-one-out error")
    _, page = page_of(surrogate, tmp_path)
    assert page.text.count("Nothing is predicted") == 1
    assert page.text.count("Spearman") == 1 and "more subsets" in page.text


def test_errors_are_named_after_how_they_were_measured(tmp_path):
    for kernel in ("lasso", "least_squares", "linear"):
        how = "cross-validated" if kernel == "lasso" else "leave-one-out"
        surrogate = fit_surrogate(*problem(t=1), kernel=kernel)
        assert qualities(surrogate)[0].how == how
        _, page = page_of(surrogate, tmp_path)
        assert f"{how.capitalize()} predictions of 40 subsets" in page.text
        assert ("eave-one-out" in page.text) == (how == "leave-one-out")


def test_no_rank_correlation_of_a_mean_stands_in_the_table(tmp_path):
    html, _ = page_of(fit_surrogate(bernoulli(12, 80, 0.5, seed=0), noise()), tmp_path)
    table = html[html.index("Kernels compared") :]
    ranks = re.findall(r'<td data-value="[^"]*">([^<]*)</td><td>80</td>', table)
    assert ranks and not any(text.startswith("\N{MINUS SIGN}") for text in ranks)


def test_true_scores_that_are_all_equal_have_no_correlation(tmp_path):
    masks, scores = problem(t=1)
    surrogate = fit_surrogate(masks, scores)
    _, page = page_of(surrogate, tmp_path, held_out=(masks[:4], torch.ones(4, 1)))
    assert "Held-out predictions of 4 subsets: all true scores are equal." in page.text


@given(
    seed=st.integers(0, 10**6),
    kernel=st.sampled_from(["linear", "anova2", "rbf", "lasso", "least_squares"]),
    strength=st.sampled_from([0.0, 0.3, 3.0]),
    scale=st.sampled_from([1e-6, 1.0, 1e6]),
    readout=st.sampled_from(["loo", "shapley", "banzhaf"]),
)
@settings(derandomize=True, deadline=None, database=None, max_examples=12)
def test_every_interaction_of_the_page_is_clear_of_zero(seed, kernel, strength, scale, readout):
    masks = bernoulli(6, 40, 0.5, seed=seed)
    w = masks.double()
    scores = scale * (w.sum(1) + strength * w[:, 0] * w[:, 1] + noise(40, seed=seed))
    surrogate = fit_surrogate(masks, scores, kernel=kernel)
    with TemporaryDirectory() as folder:
        html, _ = page_of(surrogate, Path(folder), readout=readout)
    shown = set(re.findall(r"<title>(\d) and (\d): ", html))
    if not surrogate.has_intervals:
        assert not shown
        return
    values, std = surrogate.interactions(readout, return_std=True)
    clear = (values.abs() > quantile(0.95) * std) & bool(qualities(surrogate)[0].predicts)
    clear &= kernel not in ("linear", "lasso")
    assert shown == {tuple(map(str, pair)) for pair in clear.nonzero().tolist()}
    rows = re.findall('<td class="name">.*?' + 3 * 'data-value="(.*?)".*?', html)
    assert len(rows) == len(shown) // 2
    assert all(float(low) * float(high) > 0 for _, low, high in rows)


@pytest.mark.parametrize("n", [3, 6, 9])
def test_a_constant_task_has_its_row_and_no_more(n, tmp_path):
    masks, scores = problem(n, m=6 if n == 3 else 40)
    masks[:, 1] = True
    surrogate = fit_surrogate(masks, scores)
    html, _ = page_of(surrogate, tmp_path)
    assert surrogate.constant_tasks == ("1",)
    rows = [row for row in cells_of(html) if row[0] == "1"]
    assert rows and all(float(value) == 0 for row in rows for value in row[1:])


def test_missing_scores_are_not_drawn(tmp_path):
    """Each target is drawn, judged and cleared of rounding by the scores that it has."""
    masks, scores = problem(t=2)
    holes = scores.clone()
    holes[3:7, 1] = torch.nan
    surrogate = fit_surrogate(masks, holes, missing="drop")
    present = ~holes[:, 1].isnan()
    alone = fit_surrogate(masks[present], holes[present][:, 1:], target_names=["1"])
    drawn, expected = (page_of(each, tmp_path, target="1")[0] for each in (surrogate, alone))
    dots = re.compile('<path class="dots" d="([^"]*)"')
    first, _ = dots.findall(drawn)
    assert first.count("h0") == int(present.sum())
    assert dots.findall(drawn) == dots.findall(expected)
    assert cells_of(drawn) == cells_of(expected) and "nan" not in drawn


def test_the_page_names_kernels_that_predict(tmp_path):
    """A kernel of which a mean or linear weights only have their intervals is not in use."""
    masks, scores = problem()
    lasso = fit_surrogate(masks, scores, kernel="lasso")
    assert "linear weights" in page_of(lasso, tmp_path)[1].texts
    surrogate = fit_surrogate(masks, noise(len(masks), seed=1))
    assert not any(term.dual.any() for term in surrogate.kernel_terms)
    assert "mean only" in page_of(surrogate, tmp_path)[1].texts


def test_cross_validated_targets_are_found_behind_a_rotation():
    masks, scores = problem(t=2)
    surrogate = fit_surrogate(masks, scores, kernel="lasso")
    (term,) = surrogate.linear_terms
    swapped = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    first = replace(term, columns=term.columns[:1], weights=term.weights[:, :1])
    surrogate = replace(surrogate, linear_terms=(first,), rotation=swapped)
    assert [each.how for each in qualities(surrogate)] == ["leave-one-out", "cross-validated"]


def test_one_target_by_name(tmp_path):
    masks, scores = problem()
    surrogate = fit_surrogate(masks, scores, target_names=["loss", "accuracy"])
    _, page = page_of(surrogate, tmp_path, target="accuracy")
    assert "accuracy" in page.texts and "loss" not in page.texts
    with pytest.raises(ValueError, match="`target` must be one of 'loss', 'accuracy', got 'los'"):
        write_report(surrogate, tmp_path / "r.html", target="los")


@pytest.mark.parametrize("kernel", ["rbf", "lasso", "least_squares"])
def test_a_surrogate_from_a_file_makes_the_same_page(kernel, tmp_path):
    surrogate = fit_surrogate(*problem(), kernel=kernel)
    surrogate.save(tmp_path / "s")
    pages = []
    for each in (surrogate, load_surrogate(tmp_path / "s")):
        write_report(each, tmp_path / "r.html")
        pages.append((tmp_path / "r.html").read_text())
    assert pages[0] == pages[1] and "predictions of 40 subsets" in pages[0]


def test_held_out_scores_are_checked_and_drawn(tmp_path):
    masks, scores = problem()
    surrogate = fit_surrogate(masks[:30], scores[:30, 0])
    _, page = page_of(surrogate, tmp_path, held_out=(masks[30:], scores[30:, 0]))
    assert "Held-out predictions of 10 subsets" in page.text
    with pytest.raises(ValueError, match="`held_out` must be scores of 10 subsets"):
        write_report(surrogate, tmp_path / "r.html", held_out=(masks[30:], scores[:, 0]))


# -- in a browser -------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = r"""
<script>
addEventListener("load", () => {
  const errors = window.probeErrors;
  const table = document.querySelector(".attributions table");
  const numbers = () => [...table.tBodies[0].rows].map((row) => row.cells[2].textContent);
  const found = { errors, first: numbers(), sorts: [], };
  const heads = [...table.tHead.rows[0].cells];
  const press = (i) => {
    heads[i].querySelector("button").click();
    found.sorts.push([heads[i].getAttribute("aria-sort"), numbers().slice(0, 3)]);
  };
  const start = performance.now();
  press(2); press(2); press(0);
  const box = document.querySelector("input[type=search]");
  box.value = "NUMBER 299";
  box.dispatchEvent(new Event("input"));
  found.search = [...table.tBodies[0].rows].map((row) => row.cells[0].textContent);
  box.value = "";
  box.dispatchEvent(new Event("input"));
  document.querySelector(".more").click();
  found.more = table.tBodies[0].rows.length;
  found.milliseconds = performance.now() - start;
  found.status = document.querySelector(".tools output").textContent;
  const real = URL.createObjectURL;
  let saved = null;
  URL.createObjectURL = (blob) => { saved = blob; return real(blob); };
  const [csv] = document.querySelectorAll(".tools .save");
  csv.click();
  const [, png] = document.querySelectorAll("figcaption .save");
  heads[2].querySelector("button").focus();
  found.outline = getComputedStyle(document.activeElement).outlineStyle;
  found.overflow = document.documentElement.scrollWidth - innerWidth;
  found.paper = getComputedStyle(document.body).backgroundColor;
  const links = HTMLAnchorElement.prototype.click;
  HTMLAnchorElement.prototype.click = async function () {
    const lines = (await saved.text()).trim().split("\n");
    found.csv = [lines[0], lines.length, this.href.slice(5, 14)];
    const answer = document.createElement("pre");
    answer.id = "probe";
    answer.textContent = JSON.stringify(found);
    document.body.append(answer);
  };
  png.click();
});
</script>
"""
WATCH = """
<script>
window.probeErrors = [];
addEventListener("error", (event) => probeErrors.push(event.message));
addEventListener("securitypolicyviolation", (event) => probeErrors.push(event.blockedURI));
</script>
"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("dark", [False, True])
def test_in_a_browser(width, dark, tmp_path):
    """Sorted, searched, extended and focused by the page's own script, with 3,000 tasks."""
    n = 3000
    masks = bernoulli(n, 40, 0.5, seed=0)
    scores = masks[:, :20].double() @ torch.arange(20.0).double()
    names = [f"a rather long name of task number {i}" for i in range(n)]
    surrogate = fit_surrogate(masks, scores, kernel="linear", ridge=10.0, task_names=names)
    write_report(surrogate, tmp_path / "r.html", readout="loo")
    html = (tmp_path / "r.html").read_text()
    html = html.replace("<style>", WATCH + "<style>").replace("</body>", PROBE + "</body>")
    (tmp_path / "probed.html").write_text(html)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'x'}"]
    options += [f"--window-size={width},900", "--dump-dom", "--virtual-time-budget=20000"]
    options += [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    call = [CHROMIUM, *options, f"file://{tmp_path}/probed.html"]
    run = subprocess.run(call, capture_output=True, text=True, timeout=280, check=True)
    answer = re.search(r'<pre id="probe">(.*?)</pre>', run.stdout)[1]
    found = json.loads(answer.replace("&lt;", "<"))
    decimals = data_of(html)[0]["decimals"]
    value = surrogate.attribute("loo")
    ordered = [minus(f"{x:.{decimals}f}") for x in value.sort().values]
    assert found["errors"] == [] and len(found["first"]) == 20
    largest = value.abs().sort(descending=True).values[:20]
    shown = [abs(float(text.replace("\N{MINUS SIGN}", "-"))) for text in found["first"]]
    np.testing.assert_allclose(shown, largest, atol=0.6 * 10.0**-decimals)
    down, up, alphabet = found["sorts"]
    assert down == ["descending", ordered[:-4:-1]] and up == ["ascending", ordered[:3]]
    assert alphabet[0] == "ascending"
    assert found["search"] == [names[299], *names[2990:]]
    assert found["more"] == 40 and found["status"] == "Shown: 40 of 3,000"
    assert found["csv"] == ["task,value,low,high", 3001, "image/png"]
    assert found["outline"] != "none"
    assert found["overflow"] <= 0, "the page scrolls sideways"
    assert found["paper"] == ("rgb(20, 23, 27)" if dark else "rgb(251, 251, 249)")


def test_the_page_says_which_targets_go_through_a_map(tmp_path):
    masks = all_subsets(6)[torch.randperm(64, generator=torch.Generator().manual_seed(0))[:40]]
    scores = torch.sigmoid(3 * masks.double() @ torch.arange(6).double() / 5 - 4)
    plain, mapped = (fit_surrogate(masks, scores, warp=w) for w in ("identity", "logit"))
    for surrogate, said in ((plain, False), (mapped, True)):
        write_report(surrogate, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert ("go through a logit map of the scores" in page) == said
    (note,) = mapped.warp_notes
    errors = float(mapped.loo_error), float(plain.loo_error)
    assert all(f"{error:.3f}" in note for error in errors) and note in mapped.warnings
