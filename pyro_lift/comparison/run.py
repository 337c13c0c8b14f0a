"""The comparison itself: a plan, cells one after the other until all are done or time is up, table, figure, advice."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm

from pyro_lift.bench.records import Record
from pyro_lift.bench.sweep import Cell, results, run_cells, write_manifest
from pyro_lift.comparison.cells import OutOfTimeError, Work, adaptations_of, run_cell
from pyro_lift.comparison.costs import load_all, measured
from pyro_lift.comparison.figure import plot
from pyro_lift.comparison.plan import Plan, solve, whole_budget
from pyro_lift.comparison.problem import (
    Fold,
    Problem,
    chance_losses,
    folds_of,
    in_common_classes,
    pooled_missing,
    probe_missing,
    told_of_one_class,
    without_unjudged,
)
from pyro_lift.comparison.settings import CompareSettings, entrant
from pyro_lift.comparison.summary import Summary, summarise
from pyro_lift.comparison.turns import Agenda, Entries, Turn, told_sizes
from pyro_lift.data.collection import TaskCollection
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.architecture import architecture_of
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.conventions import base_of
from pyro_lift.models.digest import digest_of_network, digest_of_rows
from pyro_lift.models.given_away import warn_of_what_is_given_away
from pyro_lift.models.task import Task
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.support.archive import reason_of_failure, write_file, write_json
from pyro_lift.support.durations import format_duration
from pyro_lift.support.folder_lock import only_run_in
from pyro_lift.support.options import check_choice, settings_of
from pyro_lift.support.said_once import said_once
from pyro_lift.tuning.whose_heads import heads_settled

if TYPE_CHECKING:
    import peft
from pyro_lift.tuning.held_out import judged

__all__ = ["Comparison", "compare", "run"]

log = logging.getLogger("pyro_lift")

#: Fraction of the budget after which nothing more is measured.
MEASURING = 0.1
#: Fraction of the time that is left for the comparison itself where methods are tuned before it.
TUNING = 0.5
#: What stands between the parts of a comparison's mark.
DATA, NETWORK = " data ", " network "
#: Names of the files in the folder of a comparison.
PLAN, CELLS, TABLE, FIGURE, RECORDS = "plan.json", "cells", "table.txt", "comparison.png", "records.json"


@dataclass(frozen=True)
class Comparison:
    """What a comparison found; printed, it is its table and its advice.

    Attributes:
        advice: one sentence.
        table: one row a method.
        summary: the numbers behind both.
        records: one a method, seed, held-out task and rate of adaptation.
        notes: sizes, what was cut, and what could not be compared.
        folder: of the records, the table and the figure; None where none was asked for, or they could not be written.
    """

    advice: str
    table: str
    summary: Summary
    records: list[Record]
    notes: tuple[str, ...]
    folder: Path | None

    def __str__(self) -> str:
        return "\n".join([self.table, *(f"  {note}" for note in self.notes), "", self.advice])


@at_top_level()
def compare(
    tasks: Sequence[Task] | TaskCollection[Task],
    backbone: nn.Module,
    peft_config: peft.PeftConfig | None = None,
    *,
    budget: str | float = "10 min",
    seeds: int = 1,
    methods: Sequence[str] | None = None,
    out: str | Path | None = None,
    **options: Any,
) -> Comparison:
    """Compare methods on these tasks and this backbone, and say whether meta-learning pays.

    A linear probe of each task and one of all, LoRA tuned on each task, Union Train, Reptile and LiFT, on tasks that
    are held out in turn (or on the test tasks of a collection), all with the same number of gradients, chosen so that
    the whole ends in time.

    Args:
        tasks: three or more, or a collection with tasks to be judged by. Tasks without test rows are judged on a third
            of their rows; those of a single row cannot be, and are left out with a warning and a note.
        backbone: as :class:`~pyro_lift.lift.LiFT` takes it.
        peft_config: the adapter to attach to a plain module.
        budget: ``"10 min"``, or seconds.
        seeds: repetitions.
        methods: of :data:`~pyro_lift.methods.registry.BASELINES`; None takes the six.
        out: folder for records, table and figure. A comparison that was stopped goes on from there.
        options: further fields of :class:`~pyro_lift.comparison.settings.CompareSettings`; ``settings`` and ``adapt``,
            LiFT's own.

    Raises:
        ValueError: nothing to learn from beside what is held out; tasks of several kinds; a folder with another
            comparison, or with one at work in it; before any training.
    """
    lift = settings_of("settings", options.pop("settings", None), LiFTSettings)
    adapt = settings_of("adapt", options.pop("adapt", None), AdaptSettings)
    known = [f.name for f in fields(CompareSettings)] + ["settings", "adapt"]
    for name in options:
        check_choice("option", name, known)
    settings = CompareSettings(budget=budget, seeds=seeds, methods=methods, **options)
    parts = tasks if isinstance(tasks, TaskCollection) else TaskCollection("tasks", tuple(tasks))
    if isinstance(backbone, RandomAdapter) and peft_config is not None:
        raise TypeError("the backbone is a RandomAdapter, which has its adapter already; leave peft_config out.")

    def adapter(seed: int) -> RandomAdapter:
        if isinstance(backbone, RandomAdapter):
            return backbone
        return adapt_backbone(backbone, peft_config, seed=seed)

    problem = Problem(parts.train, parts.test, parts.dev, adapter, lift, adapt, parts.name)
    return run(problem, settings, None if out is None else Path(out))


@said_once()
def run(
    problem: Problem,
    settings: CompareSettings,
    out: Path | None,
    *,
    overwrite: bool = False,
    started: float | None = None,
) -> Comparison:
    """Run a comparison in a folder, or go on with one.

    Args:
        problem: tasks and network.
        settings: sizes and budget.
        out: folder; None leaves nothing behind.
        overwrite: drop another comparison that is in the folder.
        started: seconds of ``time.monotonic`` at which the budget began; None: now.

    Raises:
        ValueError: see :func:`compare`.
    """
    start = time.monotonic() if started is None else started
    with contextlib.ExitStack() as stack:
        if out is not None:
            stack.enter_context(only_run_in(out))
        folder = out or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        problem, left_out = without_unjudged(in_common_classes(problem))
        folds = folds_of(problem, settings.folds)
        names, notes = _names(problem, settings)
        notes = [*left_out, *notes]
        warn_of_what_is_given_away([*problem.train, *problem.dev, *problem.test])
        problem = problem._replace(adapter=functools.cache(problem.adapter))  # what it keeps of rows is for all methods
        tasks = [*problem.train, *problem.dev, *problem.test]
        problem = _with_heads_settled(problem, tasks)
        agenda = _agenda(problem, folds, settings, names, folder, start, overwrite)
        done = _run_turns(problem, folds, settings, names, agenda, start)
        by_name = {task.name: judged(task, settings.test_rows) for fold in folds for task in fold.judged}
        chance = chance_losses(list(by_name.values()), tasks)
        summary = summarise(done, folder / CELLS, names, chance)
        notes += _notes(agenda, summary, done, names)
        records = [record for cell in done.values() for record in cell["records"]]
        table = summary.table() if summary.results else "no method has finished a turn"
        missing = [name for name in names if name not in summary.results]
        advice = _unfinished(missing, summary, agenda.plan, settings) if missing else summary.advice
        finished = [by_name[result.task] for result in next(iter(summary.results.values()), ())]
        instead, note = told_of_one_class(finished)
        advice, notes = instead or advice, notes + ([note] if note else [])
        comparison = Comparison(advice, table, summary, records, tuple(notes), out)
        return comparison if out is None else _written(comparison, out)


def _with_heads_settled(problem: Problem, tasks: Sequence[Task]) -> Problem:
    """Settle whose the heads are and what they stand on, for all methods alike."""
    settled = heads_settled(problem.settings, problem.adapter(0), tasks)
    before, adapter = settled.adapter.before_head, problem.adapter
    if before is None:
        return problem._replace(settings=settled.settings)
    return problem._replace(
        settings=settled.settings, adapter=functools.cache(lambda seed: adapter(seed).reading(before))
    )


def _written(comparison: Comparison, out: Path) -> Comparison:
    """Write table, records and figure; a comparison that cannot be written is there all the same, without a folder."""
    try:
        write_file(out / TABLE, f"{comparison}\n".encode())
        told = {"advice": comparison.advice, "notes": list(comparison.notes), "records": comparison.records}
        write_json(out / RECORDS, told)
        if comparison.summary.results:
            plot(comparison.summary, out / FIGURE)
    except OSError as error:
        log.warning("%s: the comparison could not be written (%s)", out, reason_of_failure(error))
        return replace(comparison, folder=None)
    return comparison


def _unfinished(missing: Sequence[str], summary: Summary, plan: Plan, settings: CompareSettings) -> str:
    """Say what is missing, and what budget would be enough: twice what was measured, and more than was given."""
    enough = whole_budget(2.0 * max(plan.least, settings.seconds))
    what = ", ".join(entrant(name).title for name in missing) if summary.results else "any method"
    return (
        f"Time ran out before {what} was finished, so there is nothing to advise. Give a budget of "
        f"{format_duration(enough)} or more."
    )


def _names(problem: Problem, settings: CompareSettings) -> tuple[list[str], list[str]]:
    """Return the methods that can run, and why others cannot."""
    names, notes = list(settings.names), []
    for probe, missing in (("linear-probe", probe_missing(problem)), ("pooled-probe", pooled_missing(problem))):
        if missing and probe in names:
            names.remove(probe)
            notes.append(missing)
    return names, notes


def _agenda(
    problem: Problem,
    folds: Sequence[Fold],
    settings: CompareSettings,
    names: Sequence[str],
    folder: Path,
    start: float,
    overwrite: bool,
) -> Agenda:
    """Read the agenda of a comparison that is gone on with; or measure, plan its first turn, and write it."""
    mark = _mark(problem, folds, settings, names)
    path = folder / PLAN
    held_out = [len(fold.judged) + len(fold.dev) for fold in folds]
    with_steps = [entrant(name) for name in names if entrant(name).steps]
    entries = Entries(sum(e.meta for e in with_steps), sum(not e.meta for e in with_steps))
    if path.is_file() and not overwrite:
        agenda = Agenda.read(path, settings, held_out, entries)
        of_before = (mark.partition(DATA)[0], mark.partition(NETWORK)[0])  # say nothing of inputs, or of the network
        if agenda.mark not in (mark, *of_before):
            raise ValueError(
                f"{folder} holds another comparison (other tasks, network or settings). Give another folder, or "
                "overwrite it."
            )
        return agenda
    shutil.rmtree(folder / CELLS, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    load_all()
    costs = measured(problem, folds, settings, names, MEASURING * settings.seconds)
    left = settings.seconds - (time.monotonic() - start)
    share = TUNING if settings.trials else 1.0
    plan = solve(costs, settings, held_out, *entries, max(left, 0.0) * share, settings.seconds - left, share)
    agenda = Agenda(path, mark, plan, costs, settings, held_out, entries)
    agenda.write()
    return agenda


def _mark(problem: Problem, folds: Sequence[Fold], settings: CompareSettings, names: Sequence[str]) -> str:
    """Digest what a comparison is of, so that another is not taken for it; the budget may differ.

    Behind :data:`DATA` stands a digest of all rows, behind :data:`NETWORK` one of weights and architecture, which
    comparisons of before lack.
    """
    wanted = asdict(replace(settings, budget=1, progress=False, methods=None))
    if not settings.trials:  # as in comparisons of before there was a choice
        del wanted["trials"]
    adapter = problem.adapter(0)
    tasks = [
        [fold.number, part, task.name, task.kind, len(task.train), len(task.test or ()), float(task.train.target.sum())]
        for fold in folds
        for part in ("train", "judged", "dev")
        for task in getattr(fold, part)
    ]
    layout = [[entry.name, list(entry.shape)] for entry in adapter.layout]
    told = [wanted, list(names), tasks, layout, asdict(problem.settings), asdict(problem.adapt)]
    rows = [digest_of_rows(task.train, task.test) for task in (*problem.train, *problem.dev, *problem.test)]
    network = [digest_of_network(adapter), architecture_of(base_of(adapter.backbone))]
    parts = (told, rows, network)
    of, data, computed = (hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest() for part in parts)
    return f"{of}{DATA}{data}{NETWORK}{computed}"


def _run_turns(
    problem: Problem,
    folds: Sequence[Fold],
    settings: CompareSettings,
    names: Sequence[str],
    agenda: Agenda,
    start: float,
) -> Mapping[str, Any]:
    """Run turn after turn, until all are done or time is up; cells of a process that was killed are taken over."""
    folder = agenda.path.parent / CELLS
    deadline = start + settings.seconds - min(0.03 * settings.seconds, 10.0)
    hidden = not settings.progress or "CI" in os.environ or "PYTEST_XDIST_WORKER" in os.environ
    with tqdm(total=0, unit="gradient", disable=hidden, dynamic_ncols=True) as bar, contextlib.suppress(OutOfTimeError):
        work = Work(problem, folds, settings, agenda.plan, folder, bar.update, deadline)
        begun_before = list(agenda.turns)  # of a comparison that is gone on with
        while True:
            left = deadline - time.monotonic()
            turn = begun_before.pop(0) if begun_before else agenda.next(left * (TUNING if settings.trials else 1.0))
            if turn is None:
                break
            if settings.trials:
                ahead = (len(folds) * settings.seeds - agenda.turns.index(turn)) * max(len(names), 1)
                work = work._replace(tuning_seconds=(1.0 - TUNING) * left / ahead)
            cells = [_cell(turn, method) for turn in agenda.turns for method in names]
            write_manifest(folder, cells)
            own = [cell for cell in cells if (cell.arguments["seed"], cell.arguments["fold"]) == (turn.seed, turn.fold)]
            finished = results(folder)
            sizes = {c.name: _gradients(str(c.arguments["method"]), folds[turn.fold], _of(agenda, turn)) for c in own}
            bar.total += sum(sizes.values())
            bar.update(sum(size for name, size in sizes.items() if name in finished))
            begun, whole = time.monotonic(), not any(name in finished for name in sizes)
            run_cells(folder, partial(_told_cell, work, agenda, bar, sizes), retry=True)
            if whole:  # of a turn that was begun before, it is not known how long it takes
                now = results(folder)
                agenda.done(time.monotonic() - begun - sum(now[name].get("tuning_seconds", 0.0) for name in sizes))
    return results(folder)


def _cell(turn: Turn, method: str) -> Cell:
    arguments = {"method": method, "seed": turn.seed, "fold": turn.fold}
    return Cell(f"seed{turn.seed}-fold{turn.fold}-{method}", arguments)


def _of(agenda: Agenda, turn: Turn) -> Plan:
    return agenda.sizes(turn.seed, turn.fold)


def _told_cell(
    work: Work, agenda: Agenda, bar: Any, sizes: Mapping[str, int], *, method: str, seed: int, fold: int
) -> Mapping[str, Any]:
    """Run a cell under its name in the bar; methods count in their own steps, so the bar is put right afterwards."""
    bar.set_description(f"part {fold + 1} of {len(work.folds)}, {entrant(method).title}")
    begun = bar.n
    told = run_cell(work._replace(plan=agenda.sizes(seed, fold)), method=method, seed=seed, fold=fold)
    bar.update(begun + sizes.get(f"seed{seed}-fold{fold}-{method}", 0) - bar.n)
    return told


def _gradients(method: str, fold: Fold, plan: Plan) -> int:
    """Count the gradients of a cell, for the bar."""
    if not entrant(method).steps:
        return 0
    adapting = (len(fold.judged) + len(fold.dev)) * len(adaptations_of(method, plan)) * plan.steps
    return adapting + (plan.gradients if entrant(method).meta else 0)


def _notes(agenda: Agenda, summary: Summary, done: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    plan, turns, folds = agenda.plan, agenda.turns, len(agenda.held_out)
    count = len(next(iter(summary.results.values()), ()))
    expected = len(turns) * len(names)
    held = "held out in turn" if folds > 1 else "to be judged by"
    told = told_sizes(turns, plan, agenda.settings, folds, agenda.entries.meta)
    seeds = len({turn.seed for turn in turns})
    notes = [
        f"{count} tasks {held}; {told['gradients']} gradients of meta-training, {told['steps']} steps of adaptation, "
        f"{len(plan.rates)} rates of adaptation tried by each method on other tasks, {seeds} seed{'s' * (seeds > 1)}.",
        "±: standard error over tasks of the paired difference; p: paired t-test; T: temperature of the predictions, "
        "fitted on other tasks.",
    ]
    advised = any(name not in summary.results for name in names)  # a longer budget is advised as it is
    cut = [*told["cut"], *(note for note in plan.cut if note.startswith("the least") and not advised)]
    if cut:
        notes.append(f"cut to fit the time: {'; '.join(cut)}.")
    failures = {
        f"{entrant(r['method']).title}: {r['reason']}"
        for cell in done.values()
        for r in cell["records"]
        if "reason" in r
    }
    notes += sorted(failures)[:5]
    if agenda.settings.trials:
        records = [record for cell in done.values() for record in cell["records"] if "settings" in record]
        chosen = sorted({f"{entrant(r['method']).title}: {r['settings']}" for r in records})
        notes.append(f"settings chosen among {agenda.settings.trials} a method, on other tasks: {'; '.join(chosen)}.")
    if len(done) < expected:
        notes.append(
            f"time ran out after {len(done)} of {expected} runs: the same command, given again, goes on from there."
        )
    return notes
