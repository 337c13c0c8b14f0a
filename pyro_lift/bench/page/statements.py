"""The page's contents as plain data, which HTML and Markdown then say in their own way."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from pyro_lift.bench.page.evidence import PERCENT, Evidence
from pyro_lift.bench.page.findings import OURS, TableTests, better_is_lower, row_tests
from pyro_lift.bench.paper.contestants import title_of
from pyro_lift.bench.paper.published import published
from pyro_lift.bench.paper.tables import Column, Table

__all__ = ["Place", "TableStatement", "statement_of", "table_reference"]


#: Column of the paper's tables with the mean over the others.
AVERAGE = "Avg"


class Place(NamedTuple):
    """One place of a table: our number as text, the paper's, and whether ours is the column's best."""

    ours: str
    theirs: str
    best: bool


class TableStatement(NamedTuple):
    """A table as it is shown.

    Attributes:
        table: of the registry.
        rows: names, in order.
        columns: headings.
        places: by row, then column.
        tests: by row, against ``reference``; None for itself.
        reference: the row that others are tested against.
        note: of the paper's numbers.
        measures: what the columns show, in words.
    """

    table: Table
    rows: list[str]
    columns: list[str]
    places: list[list[Place]]
    tests: list[TableTests | None]
    reference: str | None
    note: str
    measures: str


def table_reference(rows: Sequence[str]) -> str | None:
    """Return the row that a table's others are tested against: LiFT with the most components that was run."""
    found = [row for row in rows if row in OURS]
    return found[-1] if found else None


def statement_of(evidence: Evidence, table: Table) -> TableStatement | None:
    """State a table; None where nothing of it was run, or what it shows are curves."""
    columns = [column for column in table.columns if evidence.measure(column) != "curve"]
    rows = evidence.shown(table)
    if not rows or not columns:
        return None
    present = [c for c in columns if any(evidence.summary(c, row) for row in rows)]
    printed = None if table.number is None else published(table.number)
    average = printed is not None and AVERAGE in printed.columns
    best = {column.key: _best(evidence, column, rows) for column in present}
    places = []
    for row in rows:
        line = []
        for column in present:
            theirs = None if printed is None else printed.value(row, column.key)
            if printed is not None and table.number == 14:
                theirs = printed.value(row, "mean")
            line.append(
                Place(_shown(evidence, column, row), "" if theirs is None else f"{theirs:g}", best[column.key] == row)
            )
        if average:
            theirs = None if printed is None else printed.value(row, AVERAGE)
            line.append(
                Place(_average(evidence, columns, row), "" if theirs is None else f"{theirs:g}", False),
            )
        places.append(line)
    reference = table_reference(rows)
    tests = [
        None if reference is None or row == reference else row_tests(evidence, present, row, reference) for row in rows
    ]
    measures = sorted({_named(evidence.measure(column)) for column in present})
    note = printed.note if printed is not None else ""
    headings = [c.key for c in present] + ([AVERAGE] if average else [])
    return TableStatement(table, rows, headings, places, tests, reference, note, ", ".join(measures))


def _best(evidence: Evidence, column: Column, rows: Sequence[str]) -> str | None:
    found = {row: summary.mean for row in rows if (summary := evidence.summary(column, row))}
    if len(found) < 2:
        return None
    pick = min if better_is_lower(evidence.measure(column)) else max
    return pick(found, key=found.__getitem__)


def _average(evidence: Evidence, columns: Sequence[Column], row: str) -> str:
    """Format the mean over all columns of a table; nothing where the row lacks one, run or not: the paper's has all."""
    found = [evidence.summary(column, row) for column in columns]
    if len({evidence.measure(column) for column in columns}) != 1 or any(summary is None for summary in found):
        return ""
    factor = 100.0 if evidence.measure(columns[0]) in PERCENT else 1.0
    return f"{factor * statistics.fmean(summary.mean for summary in found if summary is not None):.1f}"


def _shown(evidence: Evidence, column: Column, row: str) -> str:
    summary = evidence.summary(column, row)
    if summary is None:
        return ""
    measure = evidence.measure(column)
    factor = 100.0 if measure in PERCENT else 1.0
    digits = 1 if measure in (*PERCENT, "perplexity") else 3
    spread = "" if summary.sd is None else f" ± {factor * summary.sd:.{digits}f}"
    return f"{factor * summary.mean:.{digits}f}{spread}"


def _named(measure: str) -> str:
    return {
        "score": "the task's metric x 100",
        "accuracy": "accuracy x 100",
        "perplexity": "perplexity",
        "nll": "NLL in nats",
        "ece": "ECE of the top class",
        "ece_pooled": "ECE pooled over classes",
        "unexplained": "unexplained variance",
        "seconds": "seconds",
    }.get(measure, measure)


def titles(rows: Sequence[str]) -> dict[str, str]:
    """Return the titles of rows by name."""
    return {row: title_of(row) for row in rows}
