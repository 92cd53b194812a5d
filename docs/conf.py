"""Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Unpack

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util.logging import getLogger
from sphinx.writers.html5 import HTML5Translator

os.environ["PYFUSED_BACKEND"] = "cpu"  # pictures show kernels, although their tensors are small
sys.path.append(str(Path(__file__).parent))

import pages

import pyfused

# Only type checkers import Unpack. With it, autodoc evaluates and links signatures that name it.
for module in (pyfused.functional, pyfused.nn, pyfused.vocab_parallel):
    module.Unpack = Unpack

project = "pyfused"
author = "The pyfused authors"
project_copyright = f"2026, {author}"
release = version = pyfused.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
highlight_language = "none"  # blocks without a language are plain text
python_maximum_signature_line_length = 88  # longer signatures have a line for each parameter
nitpicky = True  # a reference without a target is an error
nitpick_ignore = [
    ("py:class", "Tensor"),  # the type of fields of a NamedTuple
    ("py:class", "collections.abc.Callable"),
    ("py:class", "collections.abc.Sequence"),
    ("py:class", "typing.Unpack"),
    ("py:class", "pyfused.adopt.convert.Model"),  # type variables
    ("py:class", "pyfused.formula.Function"),
]
pages.write()
intersphinx_mapping = {"torch": ("https://docs.pytorch.org/docs/stable/", pages.INVENTORY)}
html_theme = "furo"
html_theme_options = {
    "source_repository": pages.HOMEPAGE,  # links to the repository and to each page
    "source_branch": "main",
    "source_directory": "docs/",
    "footer_icons": [{"name": "Repository", "url": pages.HOMEPAGE, "html": "Repository"}],
}
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["attrs_inline", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True


def formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Writes MathML, which browsers typeset without a script or a network."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def check_pages(_app: Sphinx) -> None:
    """Warns of parts that `python docs/pages.py` has to write again."""
    for file in pages.outdated():
        getLogger(__name__).warning("%s is outdated: run python docs/pages.py", file)


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("source-read", pages.fill)
    app.connect("builder-inited", check_pages)
    app.connect("autodoc-process-docstring", pages.returns, priority=400)  # Napoleon has 500
