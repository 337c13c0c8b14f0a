"""Sphinx's settings: ``make docs`` builds the site into build/docs, with every warning an error."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]  # the checkout's package, and docs/extensions
# Tutorials run in processes of their own, which find the package in the same place.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # pages are read side by side
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pyro_lift  # noqa: E402

project = "pyro_lift"
author = "the pyro_lift authors"
copyright = "the pyro_lift authors, Apache-2.0"
release = version = pyro_lift.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_design",
    "extensions.mathml",
    "extensions.pages",
    "extensions.tables",
]

source_suffix = {".md": "myst-nb", ".rst": "restructuredtext"}
exclude_patterns = ["generated/figures", "**/.ipynb_checkpoints"]
FAST = os.environ.get("PYRO_LIFT_DOCS") == "fast"
# ref.python: a short name in a signature that two modules have; it is then no link.
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python", *(["myst-nb.lexer"] if FAST else [])]

# Markdown
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath", "amsmath", "attrs_inline", "attrs_block"]
myst_heading_anchors = 4
# ``PYRO_LIFT_DOCS=fast make docs`` leaves the tutorials unexecuted, for work on the words.
nb_execution_mode = "off" if FAST else "force"
nb_execution_timeout = 600  # a cell, on a machine with other work too
nb_execution_raise_on_error = True
nb_execution_in_temp = True
nb_merge_streams = True
nb_output_stderr = "remove"  # bars and notices of libraries; what a page speaks of, it prints

# Reference, from docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_use_rtype = False
autosummary_generate = False

# Looks
html_theme = "furo"
html_title = f"pyro_lift {version}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_theme_options = {
    "navigation_with_keys": True,
    "light_css_variables": {"color-brand-primary": "#0b62a8", "color-brand-content": "#0b62a8"},
    "dark_css_variables": {"color-brand-primary": "#7ab8f0", "color-brand-content": "#7ab8f0"},
}
html_show_sourcelink = True
html_copy_source = True
templates_path: list[str] = []
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
pygments_style = "friendly"
pygments_dark_style = "github-dark"
