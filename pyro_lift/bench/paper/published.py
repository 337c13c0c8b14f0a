"""The numbers that the paper prints, to stand beside ours."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any, NamedTuple

__all__ = ["PublishedTable", "published"]


class PublishedTable(NamedTuple):
    """One table as printed.

    Attributes:
        columns: keys, in order.
        rows: numbers by contestant, one a column; None where the paper prints none.
        note: on what is missing from it.
    """

    columns: tuple[str, ...]
    rows: dict[str, list[float | None]]
    note: str = ""

    def value(self, row: str, column: str) -> float | None:
        """Return the number of a contestant in a column; None where the paper has none."""
        if row not in self.rows or column not in self.columns:
            return None
        return self.rows[row][self.columns.index(column)]


@cache
def _data() -> dict[str, Any]:
    text = (resources.files("pyro_lift.bench.paper") / "published.json").read_text("utf-8")
    tables: dict[str, Any] = json.loads(text)["tables"]
    return tables


def published(number: int) -> PublishedTable | None:
    """Return a table of the paper by its number; None for a number that has no table."""
    found = _data().get(str(number))
    if found is None:
        return None
    return PublishedTable(tuple(found["columns"]), found["rows"], found.get("note", ""))
