"""The report: one page, whole, safe, and with the surrogate's numbers in it."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from ksm_ext import fit_surrogate
from ksm_ext.report import _fitted_scores, write_report
from ksm_ext.subsets import bernoulli

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "<script>alert(\"x\")</script> & 'co' $title"


class Page(HTMLParser):
    """Checks that tags nest, and collects what a test wants to know."""

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
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def problem(n=6, m=40, t=2, seed=0):
    masks = bernoulli(n, m, 0.5, seed=seed)
    random = np.random.default_rng(seed)
    effects = torch.from_numpy(random.normal(size=(n, t)))
    w = masks.double()
    noise = 0.1 * torch.from_numpy(random.normal(size=(m, t)))
    return masks, w @ effects + w[:, :1] * w[:, 1:2] + noise


def page_of(surrogate, tmp_path, **kw):
    write_report(surrogate, tmp_path / "r.html", **kw)
    assert [path.name for path in tmp_path.iterdir()] == ["r.html"]
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_numbers_and_intervals_are_those_of_the_surrogate(tmp_path):
    surrogate = fit_surrogate(*problem())
    html, page = page_of(surrogate, tmp_path)
    shown = [float(value) for value in re.findall(r'data-value="([^"]+)"', html)]
    values, std = surrogate.attribute("shapley", return_std=True)
    for value in (values, values - 1.959964 * std, values + 1.959964 * std):
        for number in value.flatten().tolist():
            assert any(abs(number - other) < 1e-9 for other in shown)
    assert page.tags.count("figure") == 6  # scatter, spectrum, heat map of two targets
    assert "40" in page.text and "4 times as many subsets (160" in page.text


def test_page_needs_no_network(tmp_path):
    html, page = page_of(fit_surrogate(*problem()), tmp_path)
    outside = [(tag, url) for tag, url in page.urls if not url.startswith("#")]
    assert outside == [("a", "https://arxiv.org/abs/2602.03783")]
    assert "url(" not in html and "@import" not in html and "fetch(" not in html


def test_names_are_escaped(tmp_path):
    masks, scores = problem()
    names = [EVIL, *"bcdef"]
    surrogate = fit_surrogate(masks, scores, task_names=names, target_names=["</section>", EVIL])
    html, page = page_of(surrogate, tmp_path, title=EVIL)
    assert page.tags.count("script") == 1
    assert "<script>alert" not in html
    assert EVIL in page.texts


@pytest.mark.parametrize("kernel", ["lasso", "least_squares"])
def test_surrogates_without_a_posterior_have_no_intervals(tmp_path, kernel):
    _, page = page_of(fit_surrogate(*problem(), kernel=kernel), tmp_path)
    assert "no intervals" in page.text and "95 % from" not in page.text


def test_mean_only(tmp_path):
    masks, scores = problem()
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(3)).sign()
    surrogate = fit_surrogate(masks, noise.double(), kernel="auto")
    page_of(surrogate, tmp_path)


def test_weights_know_only_leave_one_out(tmp_path):
    weights = torch.rand(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    surrogate = fit_surrogate(weights, weights.sum(1))
    with pytest.raises(ValueError, match="`readout` must be 'loo'"):
        write_report(surrogate, tmp_path / "r.html")
    _, page = page_of(surrogate, tmp_path, readout="loo")
    assert "mean weights" in page.text


def test_many_targets_and_tasks_are_capped_and_the_page_says_so(tmp_path):
    masks, scores = problem(n=250, m=60, t=500)
    _, page = page_of(fit_surrogate(masks, scores), tmp_path)
    assert "Shown: 6 of 500 targets." in page.text
    assert "Shown: 200 of 250." in page.text


def test_one_target_by_name(tmp_path):
    masks, scores = problem()
    surrogate = fit_surrogate(masks, scores, target_names=["loss", "accuracy"])
    _, page = page_of(surrogate, tmp_path, target="accuracy")
    assert "accuracy" in page.texts and "loss" not in page.texts
    with pytest.raises(ValueError, match="`target` must be a number or one of 'loss', 'accuracy'"):
        write_report(surrogate, tmp_path / "r.html", target="los")


@pytest.mark.parametrize("share_ridge", [True, False, "auto"])
@pytest.mark.parametrize("center", [True, False])
def test_fitted_scores_come_back(share_ridge, center):
    masks, scores = problem(t=3)
    scores[:, 2] = torch.randn(40, generator=torch.Generator().manual_seed(1)).sign()
    surrogate = fit_surrogate(masks, scores, share_ridge=share_ridge, center=center)
    if not surrogate.linear_terms:
        torch.testing.assert_close(_fitted_scores(surrogate), scores)


def test_held_out_scores_are_checked_and_drawn(tmp_path):
    masks, scores = problem()
    surrogate = fit_surrogate(masks[:30], scores[:30, 0])
    _, page = page_of(surrogate, tmp_path, held_out=(masks[30:], scores[30:, 0]))
    assert "Held-out predictions of 10 subsets" in page.text
    with pytest.raises(ValueError, match="`held_out` must be scores of 10 subsets"):
        write_report(surrogate, tmp_path / "r.html", held_out=(masks[30:], scores[:, 0]))
