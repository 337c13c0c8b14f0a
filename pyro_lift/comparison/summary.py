"""From the records of a comparison to one line a method: choices across folds, temperatures, means and differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pyro_lift.bench.records import Record, format_table
from pyro_lift.comparison.advice import GUESS, Contestant, advise, difference
from pyro_lift.comparison.cells import read_predictions
from pyro_lift.comparison.settings import REFERENCE, entrant
from pyro_lift.inference.adaptation.temperature import careful_temperature, tempered
from pyro_lift.metrics.probabilities import class_scores
from pyro_lift.tuning.choosing import FAILED, choose

__all__ = ["Summary", "TaskResult", "summarise"]


class TaskResult(NamedTuple):
    """One method on one task, means over seeds; NaN where it gave nothing.

    Attributes:
        values: by measure: ``loss`` (NLL in nats, or unexplained variance), ``accuracy``, ``ece``, and at the fitted
            temperature ``loss_t`` and ``ece_t``; ``adapt_seconds``, ``bytes``.
    """

    task: str
    values: Mapping[str, float]


class Summary(NamedTuple):
    """The comparison in numbers.

    Attributes:
        results: of each method, one a task, in one order for all.
        chance: the loss of each task where nothing is looked at; None where there is no such answer.
        measure: ``nll`` or ``unexplained``.
        temperatures: of each method, the mean of those fitted; None where none could be.
        meta_seconds: of each method, of one meta-training.
    """

    results: Mapping[str, Sequence[TaskResult]]
    chance: Sequence[float] | None
    measure: str
    temperatures: Mapping[str, float | None]
    meta_seconds: Mapping[str, float]

    @property
    def losses(self) -> dict[str, list[float]]:
        """The loss of each method on each task."""
        return {name: [result.values["loss"] for result in of] for name, of in self.results.items()}

    @property
    def advice(self) -> str:
        """One sentence; see :func:`~pyro_lift.comparison.advice.advise`."""
        if not self.results:
            return "Nothing was finished in the time given: there is nothing to advise. Give a longer budget."
        contestants = {
            entrant(name).title: Contestant(losses, entrant(name).rank, entrant(name).steps)
            for name, losses in self.losses.items()
        }
        unit, measure = ("nats", "NLL") if self.measure == "nll" else ("of the variance", "unexplained variance")
        return advise(contestants, self.chance, unit=unit, measure=measure)

    def table(self) -> str:
        """Format one row a method, the paired difference to LiFT with its standard error over tasks."""
        shown = "NLL" if self.measure == "nll" else "unexplained"
        against = REFERENCE if REFERENCE in self.results else next(iter(self.results), "")
        title = entrant(against).title if against else ""
        header = ["method", *(["accuracy"] if self.measure == "nll" else []), shown]
        header += ["ECE", "NLL at T", "ECE at T", "T"] if self.measure == "nll" else []
        header += [f"{shown} - {title}'s", "p", "meta s", "s a task", "kB a task"]
        rows = [self._row(name, against) for name in self.results]
        if self.chance is not None:
            blank = [""] * (len(header) - 2 - (self.measure == "nll"))
            rows.append(
                [GUESS, *([""] if self.measure == "nll" else []), f"{statistics.fmean(self.chance):.3f}", *blank]
            )
        return format_table(header, rows)

    def _row(self, name: str, against: str) -> list[str]:
        mean = {
            key: statistics.fmean(r.values[key] for r in self.results[name]) for key in self.results[name][0].values
        }
        cells = [entrant(name).title]
        classes = self.measure == "nll"
        cells += [f"{mean['accuracy']:.3f}"] if classes else []
        cells += [f"{mean['loss']:.3f}"]
        if classes:
            temperature = self.temperatures[name]
            cells += [f"{mean['ece']:.3f}", *(_number(mean[key], 3) for key in ("loss_t", "ece_t"))]
            cells += ["-" if temperature is None else f"{temperature:.2f}"]
        if name == against:
            cells += ["", ""]
        else:
            losses = self.losses
            test = difference(losses[name], losses[against])
            error = "" if math.isnan(test.standard_error) else f" ± {test.standard_error:.3f}"
            cells += [f"{test.difference:+.3f}{error}", _number(test.p_value, 3)]
        return [*cells, f"{self.meta_seconds[name]:.1f}", f"{mean['adapt_seconds']:.2f}", f"{mean['bytes'] / 1e3:,.0f}"]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def summarise(
    cells: Mapping[str, Mapping[str, Any]], folder: Path, methods: Sequence[str], chance: Mapping[str, float | None]
) -> Summary:
    """Summarise the turns that every method has finished; where there is none, the methods that finished one.

    A method's rate of adaptation, and the temperature of its predictions, are chosen for the tasks of a turn by its
    scores on the tasks of the other turns (or on the tasks that are there to choose on): never by the rows that they
    are judged by here.

    Args:
        cells: what :func:`~pyro_lift.comparison.cells.run_cell` returned, by name.
        folder: of the predictions.
        methods: in the order of the table.
        chance: of each task, the loss where nothing is looked at.

    Raises:
        DamagedError: a file of predictions that is not as it was written.
    """
    records = [record for cell in cells.values() for record in cell["records"]]
    turns = sorted({(r["seed"], r["fold"]) for r in records})
    finished = {turn: {r["method"] for r in records if (r["seed"], r["fold"]) == turn} for turn in turns}
    complete = [turn for turn in turns if finished[turn] >= set(methods)]
    if not complete and turns:
        complete = [max(turns, key=lambda turn: len(finished[turn]))]
        methods = [name for name in methods if name in finished[complete[0]]]
    records = [r for r in records if (r["seed"], r["fold"]) in complete]
    measure = "unexplained" if any("unexplained" in r for r in records) else "nll"
    if not complete:
        return Summary({}, None, measure, {}, {})
    predictions = {name: read_predictions(folder, name, cell["predictions"]) for name, cell in cells.items()}
    results: dict[str, list[TaskResult]] = {}
    temperatures: dict[str, float | None] = {}
    for method in methods:
        of_method = [r for r in records if r["method"] == method]
        judged, fitted = _judged(of_method, measure, predictions)
        results[method] = judged
        temperatures[method] = statistics.fmean(fitted) if fitted else None
    seconds = {m: statistics.fmean(r["meta_seconds"] for r in records if r["method"] == m) for m in methods}
    guesses = [chance[result.task] for result in results[methods[0]]]
    known = [guess for guess in guesses if guess is not None]
    return Summary(results, known if len(known) == len(guesses) else None, measure, temperatures, seconds)


def _judged(
    records: Sequence[Record], measure: str, predictions: Mapping[str, Mapping[str, Tensor]]
) -> tuple[list[TaskResult], list[float]]:
    """Score one method on each task, and return the temperatures that were fitted."""
    values: dict[str, list[dict[str, float]]] = {}
    fitted: list[float] = []
    for seed, fold in sorted({(r["seed"], r["fold"]) for r in records}):
        of_seed = [r for r in records if r["seed"] == seed]
        others = [r for r in of_seed if r["fold"] != fold or r["part"] == "dev"]
        rate = _chosen(others, measure)
        temperature = _temperature([r for r in others if r["rate"] == rate], predictions)
        fitted += [] if temperature is None else [temperature]
        for r in of_seed:
            if r["fold"] == fold and r["part"] == "judged" and r["rate"] == rate:
                values.setdefault(r["task"], []).append(_values(r, measure, temperature, predictions))
    results = []
    for task in sorted(values):
        keys = values[task][0]
        results.append(TaskResult(task, {k: statistics.fmean(v[k] for v in values[task]) for k in keys}))
    return results, fitted


def _chosen(records: Sequence[Record], measure: str) -> int:
    """Choose the number of the rate with the lowest mean loss; the first where there is nothing to choose on."""
    rates = sorted({r["rate"] for r in records})
    if not rates:
        return 0
    scores = [
        [
            FAILED if r.get(measure) is None else {"nll": r[measure], "ece": r.get("ece", 0.0)}
            for r in records
            if r["rate"] == rate
        ]
        for rate in rates
    ]
    return int(choose(rates, scores).best)


def _temperature(records: Sequence[Record], predictions: Mapping[str, Mapping[str, Tensor]]) -> float | None:
    pairs = [pair for pair in (_pair(r, predictions) for r in records) if pair is not None]
    return careful_temperature(pairs) if pairs else None


def _pair(record: Record, predictions: Mapping[str, Mapping[str, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Return the probabilities behind a record and their targets; None where none were kept."""
    tensors = predictions.get(f"seed{record['seed']}-fold{record['fold']}-{record['method']}", {})
    place = record.get("place")
    p = tensors.get(f"{record['rate']}.{place}")
    return None if p is None else (p, tensors[f"target.{place}"])


def _values(
    record: Record, measure: str, temperature: float | None, predictions: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, float]:
    values = {"loss": _float(record.get(measure)), "accuracy": _float(record.get("accuracy"))}
    values["ece"] = _float(record.get("ece"))
    values |= {"loss_t": math.nan, "ece_t": math.nan}
    pair = _pair(record, predictions)
    if temperature is not None and pair is not None:
        scores = class_scores(tempered(pair[0], temperature), pair[1])
        values |= {"loss_t": scores["nll"], "ece_t": scores["ece"]}
    return {**values, "adapt_seconds": _float(record.get("adapt_seconds")), "bytes": _float(record.get("bytes"))}


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
