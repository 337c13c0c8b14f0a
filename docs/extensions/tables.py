"""Tables of numbers: a number and its error stay on one line."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx

__all__ = ["joined", "setup"]

SPACED = re.compile(r"(?<=\d) ± (?=\d)")
NO_BREAK = "\u00a0"


def joined(text: str) -> str:
    """Put spaces that do not break around each ±."""
    return SPACED.sub(f"{NO_BREAK}±{NO_BREAK}", text)


def _join(app: Any, doctree: Any) -> None:
    del app
    for table in doctree.findall(nodes.table):
        for text in list(table.findall(nodes.Text)):
            if SPACED.search(text):
                text.parent.replace(text, nodes.Text(joined(str(text))))


def setup(app: Sphinx) -> dict[str, bool]:
    """Look at each page after it has been read."""
    app.connect("doctree-read", _join)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
