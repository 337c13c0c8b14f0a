"""``pyro-lift report FOLDER``: the page and its Markdown, beside the cells that they are made of."""

from __future__ import annotations

from pathlib import Path

from pyro_lift.bench.page.evidence import read_evidence
from pyro_lift.bench.page.html import page
from pyro_lift.bench.page.markdown import markdown

__all__ = ["command"]


def command(folder: Path, out: Path | None = None, scale: str | None = None) -> Path:
    """Write ``report.html`` and ``report.md``.

    Args:
        folder: that ``bench paper`` wrote into.
        out: folder of the two files; None takes ``folder``.
        scale: of the cells that are shown; None takes the one that there is.

    Returns:
        The HTML file.

    Raises:
        ValueError: not such a folder, or one with cells of two scales and none named.
    """
    evidence = read_evidence(folder, scale)
    if not evidence.cells:
        raise ValueError(f"{folder}: no cell is done yet. Run `pyro-lift bench paper --out {folder}`.")
    place = out or folder
    place.mkdir(parents=True, exist_ok=True)
    html = place / "report.html"
    html.write_text(page(evidence, folder.name), encoding="utf-8")
    (place / "report.md").write_text(markdown(evidence, folder.name), encoding="utf-8")
    print(f"written: {html}, {place / 'report.md'}")
    return html
