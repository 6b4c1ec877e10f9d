"""How `make docs` builds these pages, by Sphinx."""

from __future__ import annotations

import re

from sphinx.application import Sphinx

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


def link_files(app: Sphinx, name: str, source: list[str]) -> None:
    """Markdown files outside of docs/ become downloads, as all other files do, and not missing pages."""
    source[0] = re.sub(r"\]\((\.\./[^)]+\.md)\)", r"](path:\1)", source[0])


def setup(app: Sphinx) -> None:
    app.connect("source-read", link_files)
