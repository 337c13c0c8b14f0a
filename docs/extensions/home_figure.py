"""The figure of the home page, drawn from README's table, so that the two cannot differ."""

from __future__ import annotations

import re
from pathlib import Path

from pyro_lift.support.figures import COLOURS, new_figure

__all__ = ["draw", "rows"]

MEASURES = ("accuracy (higher is better)", "NLL (lower is better)", "ECE (lower is better)")


def rows(readme: str) -> list[tuple[str, list[tuple[float, float]]]]:
    """Return method, and mean and sd of each measure, from README's table."""
    found = []
    for line in readme.splitlines():
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        numbers = [re.fullmatch(r"([\d.]+) ± ([\d.]+)", cell) for cell in cells[1:4]]
        if len(cells) >= 4 and all(numbers):
            found.append((cells[0], [(float(n[1]), float(n[2])) for n in numbers if n]))
    if not found:
        raise ValueError("README.md has no table with rows 'method | mean ± sd | ...': the home page draws it.")
    return found


def draw(readme: str, path: Path) -> None:
    """Write the figure as SVG, on a transparent ground."""
    import matplotlib as mpl

    methods = rows(readme)
    figure, axes = new_figure(1, 3, width=9.0, height=2.7, sharey=True)
    for k, (axis, title) in enumerate(zip(axes, MEASURES, strict=True)):
        for place, (name, values) in enumerate(reversed(methods)):
            mean, sd = values[k]
            colour = COLOURS[0] if name.startswith("LiFT") else COLOURS[7]
            axis.barh(place, mean, xerr=sd, color=colour, height=0.65, error_kw={"elinewidth": 1, "capsize": 2})
        axis.set_title(title, fontsize=10)
        axis.set_yticks(range(len(methods)), [name for name, _ in reversed(methods)])
        axis.set_xlim(left=0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"svg.hashsalt": "pyro_lift", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(path, transparent=True, metadata={"Date": None})
