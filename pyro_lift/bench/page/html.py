"""The page: one HTML file with everything in it, for wide and narrow screens, light and dark."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from pyro_lift.bench.page.drawing import critical_difference_diagram, curves, dots, reliability_diagram
from pyro_lift.bench.page.evidence import Evidence
from pyro_lift.bench.page.findings import (
    NAMED,
    OURS,
    REFERENCE,
    FamilyVerdict,
    TableTests,
    by_task,
    family_names,
    shortfalls,
    verdict_of,
)
from pyro_lift.bench.page.statements import Place, TableStatement, statement_of, titles
from pyro_lift.bench.page.style import STYLE
from pyro_lift.bench.paper.contestants import CONTESTANTS, title_of
from pyro_lift.bench.paper.tables import FIGURES, TABLES, family_table
from pyro_lift.bench.paper.tables import OURS as OUR_FAMILIES
from pyro_lift.metrics.significance import PairedTest

__all__ = ["page"]


def page(evidence: Evidence, source: str) -> str:
    """Return the page as a string.

    Args:
        evidence: what the cells say.
        source: the folder's name, for the head of the page.
    """
    verdicts = [verdict_of(evidence, name) for name in family_names(evidence)]
    body = [
        _head(evidence, source),
        _summary(verdicts),
        *(_family(evidence, verdict) for verdict in verdicts),
        "<h2 id='tables'>The paper's tables</h2><p>Ours above, with the standard deviation over seeds; the paper's "
        "number below it, grey. They are of other networks and data: the order of the rows is what compares.</p>",
        *(_table(statement) for statement in _statements(evidence)),
        *_figures(evidence),
        _absent(evidence),
        _settings(evidence),
        _cost(evidence),
    ]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>LiFT: the evidence</title><style>{STYLE}</style></head><body><main>{''.join(body)}</main></body>"
        "</html>\n"
    )


def _statements(evidence: Evidence) -> list[TableStatement]:
    every = (*TABLES.values(), *FIGURES.values(), *(family_table(name) for name in OUR_FAMILIES))
    return [statement for table in every if (statement := statement_of(evidence, table))]


def _head(evidence: Evidence, source: str) -> str:
    commits = sorted({str(result.get("commit")) for result in evidence.cells.values()})
    backbones = sorted({str(result["backbone"]) for result in evidence.cells.values() if "backbone" in result})
    versions: dict[str, str] = next((result["versions"] for result in evidence.cells.values()), {})
    seconds = sum(float(result["seconds"]) for result in evidence.cells.values())
    waiting = f", {len(evidence.waiting)} more are not run yet" if evidence.waiting else ""
    smoke = any(result["cell"]["smoke"] for result in evidence.cells.values())
    warning = "<p class='warn'>A smoke run: sizes of seconds. The numbers mean nothing.</p>" if smoke else ""
    return (
        f"<h1>LiFT: the evidence</h1><p class='lead'>{len(evidence.cells)} cells of {escape(evidence.scale)} scale "
        f"from <code>{escape(source)}</code>{waiting}; {seconds / 3600:.1f} hours of computing.</p>{warning}"
        f"<p class='small'>Networks: {escape(', '.join(backbones) or 'none')}. Commit {escape(', '.join(commits))}. "
        f"{escape(', '.join(f'{name} {value}' for name, value in versions.items()))}.</p>"
    )


def _summary(verdicts: Sequence[FamilyVerdict]) -> str:
    """Say what falls short first, then what leads, then all in one table."""
    leads = [v.sentence() for v in verdicts if v.leads]
    parts = [
        "<h2 id='short'>Where LiFT falls short, or is not told apart</h2>",
        _list(shortfalls(verdicts), "Nowhere in what was run."),
    ]
    parts += ["<h2 id='leads'>Where LiFT leads</h2>", _list(leads, "Nowhere yet by more than chance (p &lt; 0.05).")]
    header = [
        "family",
        "tasks",
        "seeds",
        "LiFT's place",
        "LiFT",
        "best of the others",
        "LiFT minus it",
        "minus the probe",
    ]
    header += [f"ECE minus {title_of(row)}'s" for row in ("maml", "bmaml", "abml")]
    rows = []
    for v in verdicts:
        best = v.runner_up
        rows.append(
            [
                f"<a href='#{v.family}'>{escape(v.family)}</a>",
                str(v.cases),
                str(v.seeds),
                "" if v.place is None or v.ranking is None else f"{v.place} of {len(v.ranking.methods)}",
                "" if not v.losses.get("lift") else f"{v.mean('lift'):.3f}",
                "" if best is None else f"{escape(title_of(best))} {v.mean(best):.3f}",
                _difference(None if best is None else v.against.get(best)),
                _difference(v.against.get("linear-probe")),
                *(_difference(v.calibration.get(row)) for row in ("maml", "bmaml", "abml")),
            ]
        )
    note = (
        "<p class='small'>Loss: NLL in nats, of regressions the unexplained variance. Differences are paired over "
        "tasks (means over seeds), where seeds make tasks of their own over seeds, ± their standard error, with "
        "Student's p; below zero LiFT is better. Place: by mean rank over tasks, LiFT with K = 1 among the other "
        "methods.</p>"
    )
    return "".join(parts) + _grid(header, rows) + note


def _list(lines: Sequence[str], nothing: str) -> str:
    if not lines:
        return f"<p>{nothing}</p>"
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _difference(test: PairedTest | None) -> str:
    if test is None:
        return ""
    kind = "good" if test.difference < 0 and test.p_value < 0.05 else "bad" if test.p_value < 0.05 else ""
    return (
        f"<span class='{kind}'>{test.difference:+.3f} ± {test.standard_error:.3f}</span>"
        f"<br><span class='theirs'>p {_p(test.p_value)}</span>"
    )


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"


def _grid(header: Sequence[str], rows: Iterable[Sequence[str]], kinds: Sequence[str] = ()) -> str:
    """Format a table whose cells are HTML already; wide ones scroll inside the page, and empty columns are left out."""
    rows = [list(row) for row in rows]
    kept = [k for k in range(len(header)) if k == 0 or any(row[k] for row in rows)]
    header, rows = [header[k] for k in kept], [[row[k] for k in kept] for row in rows]
    head = "".join(f"<th>{name}</th>" for name in header)
    lines = []
    for number, row in enumerate(rows):
        kind = f" class='{kinds[number]}'" if number < len(kinds) and kinds[number] else ""
        first, *rest = row
        lines.append(f"<tr{kind}><th scope='row'>{first}</th>{''.join(f'<td>{cell}</td>' for cell in rest)}</tr>")
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


# ------------------------------------------------------------------------------------------------ a family


def _family(evidence: Evidence, verdict: FamilyVerdict) -> str:
    names = titles(list(verdict.losses))
    parts = [f"<section id='{verdict.family}'><h2>{escape(verdict.family)}</h2>"]
    notes = _notes(evidence, verdict.family)
    parts.append(f"<p>{escape(verdict.sentence())}</p>")
    if verdict.ranking is not None and len(verdict.ranking.methods) > 2:
        p = verdict.ranking.p_value
        test = "" if p is None else f" Friedman's test that all methods are alike: p = {_p(p)}."
        parts.append(f"<h3>Mean ranks over {verdict.ranking.cases} tasks</h3>")
        parts.append(f"<figure>{critical_difference_diagram(verdict.ranking, names, OURS)}")
        parts.append(
            f"<figcaption>Methods under one bar cannot be told apart (Nemenyi, 0.05).{test}</figcaption></figure>"
        )
    parts.append(_dots(verdict, names))
    parts.append(_reliability(evidence, verdict))
    if notes:
        parts.append(f"<details><summary>Tasks, and what is missing of them</summary>{_list(notes, '')}</details>")
    return "".join(parts) + "</section>"


def _notes(evidence: Evidence, family: str) -> list[str]:
    notes: dict[str, None] = {}
    for result in evidence.cells.values():
        if result["cell"]["family"] != family or "tasks" not in result:
            continue
        split = result["cell"]["split"]
        for part, names in result["tasks"].items():
            if names and result["cell"]["seed"] == 0:
                missing = result["missing"].get(part) or []
                lacking = f"; missing: {', '.join(missing)}" if missing else ""
                notes[f"{split}, {part}: {len(names)} tasks ({', '.join(names)}){lacking}"] = None
        for note in result["notes"]:
            notes[f"{split}: {note}"] = None
    return list(notes)


def _dots(verdict: FamilyVerdict, names: dict[str, str]) -> str:
    """Draw every method's loss beside LiFT's: on the tasks that both have, since means over others say nothing."""
    rows = []
    for row, test in verdict.against.items():
        shared = len(
            by_task({case: loss for case, loss in verdict.losses[row].items() if case in verdict.losses[REFERENCE]})
        )
        some = "" if shared == verdict.cases else f" ({shared} of {verdict.cases} tasks)"
        rows.append((names[row] + some, -test.difference, test.standard_error, row in OURS))
    if not rows:
        return ""
    rows.sort(key=lambda entry: entry[1])
    ours = names[REFERENCE]
    loss = NAMED.get(verdict.measure, verdict.measure)
    drawing = dots(rows, f"{loss}, minus that of {ours}", {ours: 0.0})
    note = f"Means over the tasks that both have, ± their standard error; right of the line {escape(ours)} is better."
    return f"<h3>Loss beside LiFT's</h3><figure>{drawing}<figcaption>{note}</figcaption></figure>"


def _reliability(evidence: Evidence, verdict: FamilyVerdict) -> str:
    shown = ("linear-probe", "lora-tuned", "union-train", "maml", "bmaml", "abml", "lift", "lift-k5")
    drawings = []
    for row in (name for name in shown if name in verdict.losses):
        bins, errors = [], []
        for (family, _, contestant), records in evidence.scores.items():
            if family == verdict.family and contestant == row:
                bins += [record["bins"] for record in records.values() if "bins" in record]
                errors += [float(record["ece"]) for record in records.values() if "ece" in record]
        if bins:
            note = f"mean ECE {statistics.fmean(errors):.3f}"
            drawings.append(reliability_diagram(bins, title_of(row), note, row in OURS))
    if not drawings:
        return ""
    return (
        f"<h3>Reliability</h3><figure class='many'>{''.join(drawings)}<figcaption>Share of right answers against "
        "confidence, the rows of all tasks and seeds together. A dot's area is its share of the rows.</figcaption>"
        "</figure>"
    )


# ------------------------------------------------------------------------------------------------ tables and figures


def _table(statement: TableStatement) -> str:
    tested = any(test is not None for test in statement.tests)
    against = f" (against {escape(title_of(statement.reference))})" if statement.reference else ""
    header = ["", *map(escape, statement.columns)]
    if tested:
        header += [f"p{against}: paired over tasks", "pooled t over seeds", "Welch"]
    rows, kinds = [], []
    for row, places, test in zip(statement.rows, statement.places, statement.tests, strict=True):
        cells = [_place(place) for place in places]
        rows.append([escape(title_of(row)), *cells, *(_tests(test) if tested else [])])
        kinds.append("ours" if row in OURS else "added" if row in statement.table.added else "")
    note = f"<p class='small'>{escape(statement.note)}</p>" if statement.note else ""
    title = f"{statement.table.name.capitalize()}: {statement.table.title}"
    return (
        f"<section><h3 id='{statement.table.name.replace(' ', '-')}'>{escape(title)}</h3>"
        f"<p class='small'>{escape(statement.measures)}</p>{_grid(header, rows, kinds)}{note}</section>"
    )


def _place(place: Place) -> str:
    ours = f"<b>{place.ours}</b>" if place.best else place.ours or "&ndash;"
    return f"{ours}<br><span class='theirs'>{place.theirs}</span>"


def _tests(test: TableTests | None) -> list[str]:
    if test is None:
        return ["", "", ""]
    paired = "" if test.paired is None else _p(test.paired.p_value)
    return [paired, _p(test.pooled), _p(test.welch)]


def _figures(evidence: Evidence) -> list[str]:
    found = []
    for number, split, labels, logs in (
        (2, "online-em", ("draws seen, each once", "mean log likelihood, nats"), False),
        (4, "sgld-gibbs", ("visits to a task", "KL from the exact posterior, nats"), True),
    ):
        results = [r for r in evidence.cells.values() if r["cell"]["split"] == split and "curves" in r]
        if results:
            found.append(_curves(number, results[0]["curves"], labels, logs))
    return found


def _curves(number: int, lines: dict[str, Any], labels: tuple[str, str], logs: bool) -> str:
    title = f"Figure {number}: {FIGURES[number].title}"
    parts = [f"<section><h3 id='figure-{number}'>{escape(title)}</h3>"]
    if number == 2:
        drawn = {name: (c["seen"], c["log_likelihood"]) for name, c in lines.items() if "seen" in c}
        ends = "; ".join(
            f"{name} {c['log_likelihood'] if isinstance(c['log_likelihood'], float) else c['log_likelihood'][-1]:.3f}"
            + (f" (KL {c['kl']:.4f})" if "kl" in c else "")
            for name, c in lines.items()
        )
        parts.append(f"<figure>{curves(drawn, labels, logs=logs)}<figcaption>At the end: {escape(ends)}. ")
        parts.append("The paper: online -6.07, offline -6.15 (KL 0.0686 and 0.0781).</figcaption></figure>")
        return "".join(parts) + "</section>"
    for tasks in dict.fromkeys(name.split("N = ")[1] for name in lines):
        drawn = {name.split(",")[0]: (c["visits"], c["kl"]) for name, c in lines.items() if name.endswith(f" {tasks}")}
        parts.append(
            f"<figure>{curves(drawn, labels, logs=logs)}<figcaption>{tasks} tasks; the best of the steps tried. "
        )
        parts.append("sgld: all tasks at every step; table: the paper's J; gibbs: the exact draw; saga: with ")
        parts.append("the translation.</figcaption></figure>")
    return "".join(parts) + "</section>"


# ------------------------------------------------------------------------------------------------ the rest


def _absent(evidence: Evidence) -> str:
    lines = [f"{name}: {reason}" for name, reason in evidence.reasons()]
    counts = ", ".join(f"{count} of {name}" for name, count in evidence.waiting_by_split().items())
    waiting = f"<p>Not run yet: {escape(counts)}.</p>" if counts else ""
    return (
        f"<h2 id='absent'>What was not run, and why</h2>{waiting}{_list(lines, 'Everything that was begun has run.')}"
    )


def _settings(evidence: Evidence) -> str:
    rows = []
    for (family, split, row), by_seed in sorted(evidence.about.items()):
        about = by_seed[min(by_seed)]
        rates = ", ".join(f"{of['rate']:.2g}" for of in by_seed.values())
        heat = ", ".join("" if of["temperature"] is None else f"{of['temperature']:.2f}" for of in by_seed.values())
        tried = "; ".join(
            f"{rate}: {'ran away' if loss is None else f'{loss:.3f}'}" for rate, loss in about["rates"].items()
        )
        rows.append([escape(f"{family} {split}"), escape(title_of(row)), rates, heat, tried, _lift(about)])
    header = ["split", "method", "rate, by seed", "temperature, by seed", "loss by rate, on tasks to choose on"]
    return (
        "<h2 id='settings'>Settings that were chosen</h2><details><summary>Rates, temperatures and what LiFT filled in"
        f"</summary>{_grid([*header, 'filled in by LiFT'], rows)}</details>"
    )


def _lift(about: Any) -> str:
    lift = about["settings"].get("lift")
    if lift is None:
        return ""

    def shown(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return " to ".join(f"{x:.3g}" for x in value)
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    return escape(
        ", ".join(f"{k} {shown(lift[k])}" for k in ("beta", "sigma", "temperature", "n_inflate", "phi_update"))
    )


def _cost(evidence: Evidence) -> str:
    rows = []
    for row in (name for name in CONTESTANTS if any(key[2] == name for key in evidence.about)):
        meta, adapt, memory = [], [], []
        for key, by_seed in evidence.about.items():
            if key[2] != row:
                continue
            meta += [float(of["meta_seconds"]) for of in by_seed.values() if of["meta_seconds"]]
            memory += [float(of["peak_bytes"]) for of in by_seed.values() if of["peak_bytes"]]
            adapt += [float(record["adapt_seconds"]) for record in evidence.scores[key].values()]
        cells = [f"{statistics.median(meta):.1f}" if meta else "&ndash;"]
        cells += [f"{statistics.median(adapt):.2f}" if adapt else "&ndash;"]
        cells += [f"{statistics.median(memory) / 2**20:.0f}" if memory else "&ndash;"]
        rows.append([escape(title_of(row)), *cells])
    header = ["method", "meta-training, s", "adaptation to a task, s", "peak of the process, MiB"]
    longest = max((float(result["seconds"]) for result in evidence.cells.values()), default=0.0)
    return (
        "<h2 id='cost'>Cost</h2><p class='small'>Medians over all cells, on whatever machine ran them, perhaps with "
        "other work on it. A group that shares one meta-training shows it at its first member. "
        f"The longest cell took {longest / 60:.1f} minutes.</p>"
        f"{_grid(header, rows)}"
    )
