"""What the cells of a folder say: scores by contestant, split, seed and task, and what was not run."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pyro_lift.bench.paper.contestants import GROUPS
from pyro_lift.bench.paper.families import FAMILIES, setting_of
from pyro_lift.bench.paper.tables import Column, Table, source_split
from pyro_lift.bench.sweep import MANIFEST, read_manifest, results

__all__ = ["LOWER", "PERCENT", "Evidence", "Summary", "read_evidence"]

#: Scores of which less is better.
LOWER = ("nll", "ece", "ece_pooled", "brier", "perplexity", "unexplained", "mse", "seconds", "empty")
#: Scores that tables show times a hundred, as the paper does.
PERCENT = ("score", "accuracy")

#: Of one contestant on one split: seed and task to the record of its scores.
Records = dict[tuple[int, str], Mapping[str, Any]]


class Summary(NamedTuple):
    """The mean of a score over tasks, by seed, and over seeds.

    Attributes:
        mean: over seeds of the means over tasks.
        sd: over seeds, with n - 1; None of one seed.
        by_seed: means over tasks.
        tasks: how many.
    """

    mean: float
    sd: float | None
    by_seed: dict[int, float]
    tasks: int


@dataclass
class Evidence:
    """Everything that a folder's cells say.

    Attributes:
        scores: by family, split and contestant.
        about: of a contestant on a split, by seed: rate, temperature, settings and seconds.
        cells: every result by its name.
        waiting: names of cells that are in the manifest and not done.
        measures: key of the score that a family's table has, by family and split.
    """

    scores: dict[tuple[str, str, str], Records] = field(default_factory=dict)
    about: dict[tuple[str, str, str], dict[int, Mapping[str, Any]]] = field(default_factory=dict)
    cells: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    waiting: list[str] = field(default_factory=list)
    measures: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def scale(self) -> str:
        """Name the scale of the cells."""
        return next((str(result["cell"]["scale"]) for result in self.cells.values()), "no")

    def records(self, column: Column, row: str) -> Records:
        """Return the scores of a table's place: of one task where the column says so."""
        split = source_split(column.family, column.split, row) if column.family in FAMILIES else column.split
        found = self.scores.get((column.family, split, row), {})
        return {key: record for key, record in found.items() if column.task in (None, key[1])}

    def measure(self, column: Column) -> str:
        """Return the key of the score that a column shows, of splits too that show another split's cells alone."""
        found = column.measure or self.measures.get((column.family, column.split))
        if found is None and column.family in FAMILIES and self.scale in FAMILIES[column.family].settings:
            found = setting_of(self.scale, column.family, column.split).measure  # type: ignore[arg-type]
        return found or "nll"

    def values(self, column: Column, row: str, measure: str | None = None) -> dict[tuple[int, str], float]:
        """Return a place's values by seed and task; records without that score are passed over."""
        key = measure or self.measure(column)
        return {
            place: float(record[key])
            for place, record in self.records(column, row).items()
            if isinstance(record.get(key), (int, float))
        }

    def summary(self, column: Column, row: str, measure: str | None = None) -> Summary | None:
        """Summarise a place; None where nothing was run."""
        if column.family == "cost":
            return self._cost(column, row)
        return summarised(self.values(column, row, measure))

    def _cost(self, column: Column, row: str) -> Summary | None:
        for result in self.cells.values():
            if result["cell"]["family"] == "cost" and result["cell"]["split"] == column.split and "costs" in result:
                found = {**result["costs"], **result["stages"]}
                return Summary(found[row], None, {0: found[row]}, 1) if row in found else None
        return None

    def shown(self, table: Table) -> list[str]:
        """Return the rows of a table of which anything was run."""
        return [row for row in table.rows if any(self.summary(column, row) for column in table.columns)]

    def waiting_by_split(self) -> dict[str, int]:
        """Count the cells that are not done, by family and split as their names have them."""
        return dict(Counter(" ".join(name.split(".")[1:3]) or name for name in self.waiting))

    def reasons(self) -> Iterator[tuple[str, str]]:
        """Yield what was not run and why: cells refused, and tasks that an adaptation ran away on."""
        for name, result in self.cells.items():
            if "reason" in result:
                yield name, str(result["reason"])
            for contestant, judged in result.get("contestants", {}).items():
                for task, record in judged["tasks"].items():
                    if "reason" in record:
                        yield f"{name}: {contestant} on {task}", str(record["reason"])


def summarised(values: Mapping[tuple[int, str], float]) -> Summary | None:
    """Average over tasks within a seed, then over seeds; None of nothing."""
    if not values:
        return None
    by_seed: dict[int, list[float]] = {}
    for (seed, _), value in values.items():
        by_seed.setdefault(seed, []).append(value)
    means = {seed: statistics.fmean(found) for seed, found in sorted(by_seed.items())}
    sd = statistics.stdev(means.values()) if len(means) > 1 else None
    return Summary(statistics.fmean(means.values()), sd, means, len({task for _, task in values}))


def read_evidence(folder: Path, scale: str | None = None) -> Evidence:
    """Read the cells of a folder that ``bench paper`` wrote; smoke runs only where there is nothing else.

    Args:
        folder: with the manifest.
        scale: of the cells that are read; None takes the one that there is.

    Raises:
        ValueError: no manifest there; cells of two scales, whose numbers cannot stand in one table.
    """
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: no {MANIFEST} here. Give the folder that `pyro-lift bench paper` wrote into.")
    done = results(folder)
    waiting = [cell.name for cell in read_manifest(folder) if cell.name not in done]
    scales = {str(result["cell"]["scale"]) for result in done.values()}
    if scale is None and len(scales) > 1:
        raise ValueError(f"{folder} has cells of the scales {' and '.join(sorted(scales))}: give --scale.")
    done = {name: result for name, result in done.items() if scale in (None, result["cell"]["scale"])}
    if any(not result["cell"]["smoke"] for result in done.values()):
        done = {name: result for name, result in done.items() if not result["cell"]["smoke"]}
    evidence = Evidence(cells=done, waiting=waiting)
    known = {name for names in GROUPS.values() for name in names}
    for result in evidence.cells.values():
        cell = result["cell"]
        if "measure" in result:
            evidence.measures[cell["family"], cell["split"]] = str(result["measure"])
        for contestant, judged in result.get("contestants", {}).items():
            if contestant not in known:
                continue  # a row of an older version
            key = (str(cell["family"]), str(cell["split"]), str(contestant))
            records = evidence.scores.setdefault(key, {})
            records |= {(cell["seed"], task): r for task, r in judged["tasks"].items() if "reason" not in r}
            about = {name: value for name, value in judged.items() if name != "tasks"}
            about |= {"seconds": result["seconds"], "peak_bytes": result.get("peak_bytes")}
            evidence.about.setdefault(key, {})[cell["seed"]] = about
    return evidence
