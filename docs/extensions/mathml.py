"""Formulas as MathML, which browsers draw by themselves: no script, no font and no network at the reader's."""

from __future__ import annotations

import html
import re
from typing import Any

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

log = logging.getLogger(__name__)
#: What docutils does not know, in words that it does.
REWRITTEN = (
    (re.compile(r"\\(?:tfrac|dfrac)\b"), r"\\frac"),
    (re.compile(r"\\lVert\b|\\rVert\b"), r"\\Vert"),
    (re.compile(r"\\(?:big|Big|bigg|Bigg)[lr]?\b"), ""),
    (re.compile(r"\\dots\b"), r"\\ldots"),
    (re.compile(r"\\(?:textstyle|displaystyle)\b"), ""),
    (re.compile(r"\\mathrel\{([^}]*)\}"), r"\1"),
    (re.compile(r"\\operatorname\*?\{([^}]*)\}"), r"\\mathrm{\1}"),
)


def formula(tex: str, *, block: bool, where: Any = None) -> str:
    """Return the MathML of a formula; one that cannot be read is a warning, and stands as it was written."""
    for pattern, by in REWRITTEN:
        tex = pattern.sub(by, tex)
    try:
        return str(tex2mathml(tex, as_block=block))
    except Exception as error:
        log.warning("formula not understood (%s): %s", error, tex, location=where)
        return f"<code>{html.escape(tex)}</code>"


def _inline(translator: Any, node: Any) -> None:
    translator.body.append(formula(node.astext(), block=False, where=node))
    raise SkipNode


def _block(translator: Any, node: Any) -> None:
    number = f'<span class="eqno">({node["number"]})</span>' if node.get("number") else ""
    translator.body.append(f'<div class="math">{number}{formula(node.astext(), block=True, where=node)}</div>')
    raise SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", inline_renderers=(_inline, None), block_renderers=(_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
