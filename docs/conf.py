"""Sphinx: ``make docs`` builds these pages, and any warning is an error.

The pages need no network: browsers draw the formulas, which are MathML, and whatever else a page
loads lies beside it.
"""

import re
import sys
from os.path import relpath
from pathlib import Path

from docutils import nodes
from docutils.utils.math import MathError, latex2mathml
from sphinx.util import logging

from ksm_ext import __version__

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
READMES = [*ROOT.glob("experiments/*/README.md"), ROOT / "benchmarks/results/README.md"]
RESULTS = {readme: DOCS / "results" / f"{readme.parent.name}.md" for readme in READMES}
sys.path.insert(0, str(ROOT))  # experiments, which are not installed

project = "ksm_ext"
author = "The ksm_ext authors"
release = version = __version__.partition("+")[0]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ksm_ext {release}"
html_show_sourcelink = False
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "none"  # the docstrings give shapes and kinds
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False

logger = logging.getLogger(__name__)
SPELLED_AS_DOCUTILS_HAS_IT = {
    r"\\(b|B)ig(?![a-zA-Z])": r"\\\1igl",
    r"\\dots\b": r"\\ldots",
    r"\\mathrel\b": "",
}
# What a browser fetches by itself; links that a reader may follow are none of it.
LOADED = re.compile(
    r"""<(?:script|link|img|iframe|source|object|embed)\b[^>]*?(?:src|href|data)=["']?(?:https?:)?//[^>]*>"""
    r"""|url\(["']?(?:https?:)?//[^)]*|@import[^;]*//[^;]*"""
)


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", head_with_name)
    app.connect("config-inited", bring_results)
    app.connect("source-read", link_to_results)
    app.connect("build-finished", find_pages_that_need_a_network)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))


def head_with_name(app, what, name, module, options, lines):
    """Modules stand one after another under a heading: each begins with its name."""
    if what == "module":
        lines[:0] = [f".. rubric:: ``{name}``", ""]


def formula(translator, node):
    """Write a formula, in a line or of its own, as MathML."""
    block, code = isinstance(node, nodes.math_block), node.astext()
    for spelled, known in SPELLED_AS_DOCUTILS_HAS_IT.items():
        code = re.sub(spelled, known, code)
    try:
        written = latex2mathml.tex2mathml(code, as_block=block)
    except MathError as error:
        logger.warning("formula %r: %s", code, error, location=node)
        written = f"<code>{translator.encode(code)}</code>"
    translator.body.append(f'<div class="math">{written}</div>' if block else written)
    raise nodes.SkipNode


def find_pages_that_need_a_network(app, error):
    """Warn, which is an error here, of whatever a page would load from another host."""
    if error is None and app.builder.format == "html":
        for page in [*Path(app.outdir).rglob("*.html"), *Path(app.outdir).rglob("*.css")]:
            for found in LOADED.findall(page.read_text(encoding="utf-8")):
                logger.warning("%s loads %s", page.name, found)


def bring_results(app, config):
    """Make pages of the READMEs with results, which lie outside of docs/."""
    for readme, page in RESULTS.items():
        page.parent.mkdir(exist_ok=True)
        text = relinked(readme.read_text(encoding="utf-8"), readme.parent, page.parent)
        if not page.exists() or page.read_text(encoding="utf-8") != text:
            page.write_text(text, encoding="utf-8")


def link_to_results(app, docname, source):
    """Point a page of docs/ to those pages."""
    folder = Path(app.env.doc2path(docname)).parent
    if folder == DOCS:
        source[0] = relinked(source[0], folder, folder)


def relinked(text, old, new):
    """Markdown of one folder with links for another one; folders, which are no pages, get none."""

    def link(match):
        label, target, section = match.groups(default="")
        found = (old / target).resolve()
        if not found.is_file():
            return label if found.is_dir() else match[0]
        return f"[{label}]({Path(relpath(RESULTS.get(found, found), new)).as_posix()}{section})"

    return re.sub(r"\[([^]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)]*)?\)", link, text)
