"""Sphinx: ``make docs`` builds these pages, and any warning is an error."""

import sys
from pathlib import Path

from ksm_ext import __version__

sys.path.insert(0, str(Path(__file__).parents[1]))  # experiments, which are not installed

project = "ksm_ext"
author = "The ksm_ext authors"
release = version = __version__.partition("+")[0]

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"ksm_ext {release}"
html_show_sourcelink = False

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "show-inheritance": True, "member-order": "bysource"}
autodoc_typehints = "none"  # the docstrings give shapes and kinds
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", head_with_name)


def head_with_name(app, what, name, module, options, lines):
    """Modules stand one after another under a heading: each begins with its name."""
    if what == "module":
        lines[:0] = [f".. rubric:: ``{name}``", ""]
