"""The same contents as Markdown, for a repository's docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pyro_lift.bench.page.evidence import Evidence
from pyro_lift.bench.page.findings import FamilyVerdict, family_names, shortfalls, verdict_of
from pyro_lift.bench.page.statements import TableStatement, statement_of
from pyro_lift.bench.paper.contestants import title_of
from pyro_lift.bench.paper.tables import FIGURES, OURS, TABLES, family_table
from pyro_lift.metrics.significance import PairedTest

__all__ = ["markdown"]


def markdown(evidence: Evidence, source: str) -> str:
    """Return the evidence as Markdown: what falls short, what leads, all families, all tables, what was not run."""
    verdicts = [verdict_of(evidence, name) for name in family_names(evidence)]
    commits = ", ".join(sorted({str(result.get("commit")) for result in evidence.cells.values()}))
    parts = [
        "# LiFT: the evidence",
        f"{len(evidence.cells)} cells of {evidence.scale} scale from `{source}`, commit {commits}; "
        f"{len(evidence.waiting)} not run yet.",
        "## Where LiFT falls short, or is not told apart",
        _list(shortfalls(verdicts), "Nowhere in what was run."),
        "## Where LiFT leads",
        _list([v.sentence() for v in verdicts if v.leads], "Nowhere yet by more than chance (p < 0.05)."),
        "## By family",
        _families(verdicts),
        "## Tables",
        "Ours (mean ± sd over seeds), then the paper's number in brackets, which is of other networks and data.",
    ]
    every = (*TABLES.values(), *FIGURES.values(), *(family_table(name) for name in OURS))
    parts += [_table(statement) for table in every if (statement := statement_of(evidence, table))]
    parts += ["## What was not run, and why", _list([f"{n}: {r}" for n, r in evidence.reasons()], "Nothing failed.")]
    if evidence.waiting:
        parts.append(f"Not run yet: {', '.join(f'{n} of {name}' for name, n in evidence.waiting_by_split().items())}.")
    return "\n\n".join(parts) + "\n"


def _list(lines: Iterable[str], nothing: str) -> str:
    return "\n".join(f"- {line}" for line in lines) or nothing


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _families(verdicts: Sequence[FamilyVerdict]) -> str:
    rows = []
    for v in verdicts:
        probe = v.against.get("linear-probe")
        best = None if v.runner_up is None else v.against.get(v.runner_up)
        rows.append(
            [
                v.family,
                str(v.cases),
                str(v.seeds),
                "" if v.place is None or v.ranking is None else f"{v.place} of {len(v.ranking.methods)}",
                f"{v.mean('lift'):.3f}" if v.losses.get("lift") else "",
                "" if v.runner_up is None else title_of(v.runner_up),
                "" if best is None else f"{best.difference:+.3f} ± {best.standard_error:.3f} (p {best.p_value:.2g})",
                ""
                if probe is None
                else f"{probe.difference:+.3f} ± {probe.standard_error:.3f} (p {probe.p_value:.2g})",
            ]
        )
    header = [
        "family",
        "tasks",
        "seeds",
        "LiFT's place",
        "LiFT's loss",
        "best of the others",
        "minus it",
        "minus the probe",
    ]
    return _grid(header, rows)


def _difference(test: PairedTest | None) -> str:
    return "" if test is None else f"{test.difference:+.3f} ± {test.standard_error:.3f} (p {test.p_value:.2g})"


def _table(statement: TableStatement) -> str:
    title = f"### {statement.table.name.capitalize()}: {statement.table.title}"
    header = ["", *statement.columns, "p, paired"]
    rows = []
    for row, places, test in zip(statement.rows, statement.places, statement.tests, strict=True):
        cells = [
            f"{f'**{p.ours}**' if p.best else p.ours}{f' ({p.theirs})' if p.theirs else ''}".strip() for p in places
        ]
        paired = "" if test is None or test.paired is None else f"{test.paired.p_value:.2g}"
        rows.append([title_of(row), *cells, paired])
    return f"{title}\n\n{statement.measures}\n\n{_grid(header, rows)}"
