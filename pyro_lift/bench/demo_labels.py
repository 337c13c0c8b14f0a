"""``pyro-lift demo --labels``: LiFT's lead over Union Train against the labels that the tasks to learn from have.

The demo's own table is of ten labels a task, where a prior has most to say. This is its second panel: the same methods,
settings and gradients with 5, 10, 25 and 50 labels, so that nobody takes one cell for the whole. It is a command of its
own, because it takes as long as the demo does.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from pyro_lift.bench.demo import CHOSEN, LIFT, DemoSettings, FamilyRun, Group, run_family, steps_of
from pyro_lift.bench.records import Record, format_table, write_records
from pyro_lift.bench.sweep import Cell, map_cells
from pyro_lift.bench.tuner import Choice
from pyro_lift.metrics.significance import PairedTest, paired_test
from pyro_lift.support.figures import COLOURS, new_figure, save_figure
from pyro_lift.support.options import check_number

__all__ = ["LABELS", "Lead", "leads", "plot", "run"]

LABELS = (5, 10, 25, 50)
UNION = "Union Train"
#: Scores of the panel, and what they are called.
MEASURES = {"nll": "NLL, nats", "ece": "ECE", "accuracy": "accuracy"}


class Lead(NamedTuple):
    """Union Train's score minus LiFT's at one number of labels, paired over seeds and tasks."""

    labels: int
    measure: str
    test: PairedTest


def run(settings: DemoSettings, out: Path, labels: Sequence[int] = LABELS, *, progress: bool = True) -> list[Record]:
    """Run both methods at each number of labels; writes ``labels.json`` and ``labels.png`` in ``out``.

    Args:
        settings: of the demo; ``train_rows`` is what varies.
        out: a folder.
        labels: labelled images of each task to learn from.
        progress: whether to show a bar.

    Returns:
        One record a number of labels, method, seed and task.
    """
    for count in labels:
        check_number("labels", count, least=1, open_below=False, whole=True)
    out.mkdir(parents=True, exist_ok=True)
    methods: tuple[tuple[Group, Choice], ...] = (("union-train", CHOSEN["union-train"]), ("lift", CHOSEN["lift"]))
    runs = {(count, seed): FamilyRun(seed, methods) for count in labels for seed in range(settings.seeds)}
    sizes = {count: replace(settings, train_rows=count) for count in labels}
    cells = [Cell(f"{n}-{seed}", {"settings": sizes[n], "run": run}) for (n, seed), run in runs.items()]
    total = sum(steps_of(sizes[n], run) for (n, _), run in runs.items())
    hidden = not progress or "CI" in os.environ
    records: list[Record] = []
    with tqdm(total=total, desc="labels", unit="step", disable=hidden, dynamic_ncols=True) as bar:
        found = map_cells(run_family, cells, workers=settings.workers, on_step=bar.update)
        for (count, _), of_run in zip(runs, found, strict=True):
            records += [
                {"labels": count, **judged.record()}
                for of_choice in of_run
                for judged in of_choice
                if judged.method in (UNION, LIFT)
            ]
    write_records(records, out / "labels.json")
    plot(records, out / "labels.png")
    print(table(records))
    return records


def leads(records: Sequence[Record], measure: str) -> list[Lead]:
    """Return the paired differences, Union Train minus LiFT, by number of labels."""
    found = []
    for count in sorted({int(r["labels"]) for r in records}):
        values = [
            {(r["seed"], r["task"]): float(r[measure]) for r in records if r["labels"] == count and r["method"] == name}
            for name in (UNION, LIFT)
        ]
        places = sorted(values[0])
        test = paired_test([values[0][p] for p in places], [values[1][p] for p in places])
        found.append(Lead(count, measure, test))
    return found


def table(records: Sequence[Record]) -> str:
    """Format the leads as text: above zero in NLL and ECE, LiFT is better."""
    rows = []
    for count in sorted({int(r["labels"]) for r in records}):
        row = [str(count)]
        for measure in MEASURES:
            test = next(lead.test for lead in leads(records, measure) if lead.labels == count)
            row.append(f"{test.difference:+.3f} ± {test.standard_error:.3f} (p {test.p_value:.1g})")
        rows.append(row)
    header = ["labels a task", *(f"{name}: Union Train minus LiFT" for name in MEASURES.values())]
    return format_table(header, rows)


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot the lead in NLL and in ECE against the number of labels, with two standard errors."""
    figure, axes = new_figure(1, 2, width=8.0, height=3.2)
    for axis, measure in zip(axes, ("nll", "ece"), strict=True):
        found = leads(records, measure)
        counts = [lead.labels for lead in found]
        axis.axhline(0.0, color="0.6", linewidth=1)
        axis.errorbar(
            counts,
            [lead.test.difference for lead in found],
            yerr=[2.0 * lead.test.standard_error for lead in found],
            fmt="o-",
            color=COLOURS[0],
            capsize=3,
        )
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set(xlabel="labelled images of each task to learn from", title=f"lead of LiFT in {MEASURES[measure]}")
    axes[0].set_ylabel("Union Train minus LiFT")
    save_figure(figure, path)
