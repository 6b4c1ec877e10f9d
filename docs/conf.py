"""How `make docs` builds these pages, by Sphinx."""

from __future__ import annotations

project = "Codebook Tools"
author = "The Codebook Tools authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project
highlight_language = "none"
myst_heading_anchors = 4
autodoc_member_order = "bysource"
napoleon_use_ivar = True  # a field is described once, though it has a docstring of its own
# Shapes such as (n, dim, *grid) read like emphasis, and fields of several classes share a name.
suppress_warnings = ["docutils", "ref.python"]
autodoc_typehints = "description"
nb_execution_mode = "cache"
nb_execution_timeout = 600
nb_execution_raise_on_error = True
nb_output_stderr = "remove"
