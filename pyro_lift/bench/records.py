"""Records, the flat dictionaries that every benchmark and the demo write as a JSON list, and tables of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Record", "format_table", "write_records"]

Record = dict[str, Any]


def write_records(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a JSON list, one record a line, so that two files can be compared by eye and by ``diff``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(dict(record)) for record in records)
    path.write_text(f"[\n{lines}\n]\n")


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format columns as wide as they need to be, the first flush left and the others flush right.

    Example:
        >>> print(format_table(["method", "nll"], [["LiFT", "0.41"], ["Union Train", "0.52"]]))
        method        nll
        -----------------
        LiFT         0.41
        Union Train  0.52
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in cells]
    return "\n".join([lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]])


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [c.ljust(w) if k == 0 else c.rjust(w) for k, (c, w) in enumerate(zip(row, widths, strict=True))]
