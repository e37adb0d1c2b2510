"""Sphinx configuration: MyST pages, and the API from the docstrings. No network is needed to build."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

sys.path.insert(0, str(Path(__file__).parents[1]))  # document this checkout, whatever is installed

import lightning_muon

project = "lightning_muon"
author = "the authors of lightning_muon"
version = release = lightning_muon.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
nitpicky = True

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings say what each argument is
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_show_copyright = False
html_theme = "furo"
html_title = "lightning_muon"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
copybutton_exclude = ".linenos, .gp, .go"

# What the docstrings mention of other projects; no network at build, so no links.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|lightning|pytorch_lightning|jsonargparse|rich|collections)\..*"),
    (r"py:exc", r"MisconfigurationException"),  # Lightning's
    (r"py:class", r"lightning_muon\.command_line\..*"),  # not public, as the modules that docstrings point to
    (r"py:mod", r"lightning_muon\.partition\..*"),
]


def setup(app: Sphinx) -> None:
    """Resolve names that docstrings give from inside the package to the page of the public name."""
    app.connect("missing-reference", _public_name)


def _public_name(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: nodes.TextElement
) -> nodes.reference | None:
    """The link for ``lightning_muon.optim.NorMuon`` or a bare ``NorMuon``: both are ``lightning_muon.NorMuon`` here."""
    if node.get("refdomain") != "py":
        return None
    domain = env.domains.python_domain
    parts = node["reftarget"].split(".")
    for start in range(len(parts)):
        tail = "." + ".".join(parts[start:])
        found = [name for name, entry in domain.objects.items() if name.endswith(tail) and not entry.aliased]
        if len(found) == 1:
            return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], found[0], node, content)
    return None
