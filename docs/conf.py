"""Sphinx builds the documentation: `make docs`."""

import pyfused

project = "pyfused"
author = "The pyfused authors"
release = version = pyfused.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_use_ivar = True
