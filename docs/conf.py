"""Sphinx builds the documentation: `make docs`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

os.environ["PYFUSED_BACKEND"] = "cpu"  # the gallery's few points take the kernels, too
sys.path.append(str(Path(__file__).parent))

import gallery

import pyfused

project = "pyfused"
author = "The pyfused authors"
release = version = pyfused.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_math_renderer = "mathml"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True


def formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """MathML: browsers typeset it themselves, without a script or a network."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def prose(
    _app: Sphinx, _what: str, _name: str, _object: object, _: object, lines: list[str]
) -> None:
    """Else Napoleon takes what stands before a colon, in the line after "Returns:", for a type."""
    for index, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:":
            text = lines[index + 1].lstrip()
            lines[index + 1] = lines[index + 1].removesuffix(text) + f": {text}"


def setup(app: Sphinx) -> None:
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))
    app.connect("source-read", gallery.fill)
    app.connect("autodoc-process-docstring", prose, priority=400)  # before Napoleon's 500
