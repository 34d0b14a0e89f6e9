"""The docs site: `make docs`. Its source folder is the root of the repository, so that all links work."""

from __future__ import annotations

import hf_mlprune

project = "hf-mlprune"
author = "The hf-mlprune developers"
version = release = hf_mlprune.__version__
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "examples/README.md",
    "docs/*.md",
]

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_heading_anchors = 4
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 100

# References within this project must lead somewhere; those to other projects are names only.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!hf_mlprune\b).*")]

html_theme = "furo"
html_title = f"hf-mlprune {version}"
# The root's page sends readers on to docs/index.html.
html_additional_pages = {"index": "root.html"}
templates_path = ["_templates"]
html_show_copyright = False
