"""``pyro-lift bench methods``: every method of the paper's tables on the same tasks, with the same budget.

All get the same backbone, initial adapter, tasks, number of minibatches in meta-training, adaptation steps and number
of networks that a prediction averages over. Joint training, which every meta-learner begins with, and the library of
LoRAs are made once a seed and shared; their seconds count for each method that uses them.

Costs are measured apart, one process, in turn with Union Train: seconds and peak memory of one task's visit in
meta-training, and of adaptation, as ratios.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.bench.experiments import DIGITS, Experiment, MethodsSettings, Problem
from pyro_lift.bench.grids import GROUPS, Choice, choice_of, group_of
from pyro_lift.bench.memory import peak_bytes
from pyro_lift.bench.records import Record, format_table, write_records
from pyro_lift.bench.sweep import Cell, map_cells
from pyro_lift.inference.baselines.library import TrainedLibrary, train_library
from pyro_lift.inference.baselines.protocol import Baseline, Budget
from pyro_lift.inference.baselines.search_space import Changes
from pyro_lift.inference.baselines.union_train import warm_up
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.methods.registry import BASELINES
from pyro_lift.metrics.task import scores
from pyro_lift.settings import LiFTSettings
from pyro_lift.support.archive import read_json, write_json
from pyro_lift.support.options import check_choice
from pyro_lift.tuning.methods import tune_method, with_changes

__all__ = ["command", "plot", "run", "table", "tune"]

#: Families that settings are chosen on; the benchmark's own are 0, 1, 2, ...
TUNING_SEED = 1000


#: What joint training leaves of a budget, however small: two thirds are draws, of which a mixture of five needs five.
LEAST_VISITS = 8
#: Methods that adapt from another's state in another way, so that it need not be learned twice.
SAME_STATE = {"lift-reg-x": "lift", "lift-noise-x": "lift"}
#: Beginnings of the names of methods that start from a library of LoRAs.
FROM_LIBRARY = ("retriever", "mbc", "fixed-theta")


def run(
    experiment: Experiment = DIGITS,
    settings: MethodsSettings | None = None,
    names: Sequence[str] | None = None,
    *,
    path: Path | None = None,
    tuned: Mapping[str, Changes] | None = None,
    log: Callable[[str], None] = print,
) -> list[Record]:
    """Run every method on every seed and task; the records are written to ``path`` as seeds finish.

    Args:
        experiment: where tasks come from.
        settings: sizes.
        names: keys of :data:`BASELINES`; None takes all.
        path: of the JSON file.
        tuned: what :func:`tune` chose, over the settings in :mod:`~pyro_lift.bench.grids`.
        log: where progress goes.

    Raises:
        ValueError: an unknown method.
    """
    settings, names = settings or MethodsSettings(), list(names or BASELINES)
    for name in names:
        check_choice("method", name, BASELINES)
    costs = cost_ratios(experiment, settings, names, log)
    records: list[Record] = []
    for of_seed in _each_seed(experiment, settings, names, tuned or {}):
        records += [{**record, **costs.get(record["method"], {})} for record in of_seed]
        judged = len({record["method"] for record in of_seed})
        log(f"seed {of_seed[0]['seed']}: {judged} methods judged" if of_seed else "nothing")
        if path is not None:
            write_records(records, path)
    return records


def _each_seed(
    experiment: Experiment, settings: MethodsSettings, names: Sequence[str], tuned: Mapping[str, Changes]
) -> Iterator[list[Record]]:
    common = {"experiment": experiment, "settings": settings, "names": names, "tuned": tuned}
    cells = [Cell(f"seed-{seed}", {**common, "seed": seed}) for seed in range(settings.seeds)]
    threads = max((os.cpu_count() or 1) // settings.workers, 1)
    return map_cells(run_seed, cells, workers=settings.workers, threads=threads)


# ------------------------------------------------------------------------------------------------ one seed


class Shared(NamedTuple):
    """Joint training and library that the methods of one seed share, and the seconds they took."""

    warm_start: Tensor
    warm_seconds: float = 0.0
    library: TrainedLibrary | None = None
    library_seconds: float = 0.0


class Setup(NamedTuple):
    """Surroundings in which methods are set up: the problem, the sizes, the seed, and what they share.

    Attributes:
        tuned: changes to what was chosen before, by the name of a method that is tuned.
    """

    problem: Problem
    settings: MethodsSettings
    seed: int
    shared: Shared | None = None
    tuned: Mapping[str, Changes] = {}


def run_seed(
    experiment: Experiment,
    settings: MethodsSettings,
    names: Sequence[str],
    seed: int,
    part: str = "test",
    *,
    tuned: Mapping[str, Changes] | None = None,
) -> list[Record]:
    """Run all methods on one seed's problem."""
    problem = experiment.problem(settings, seed, part)
    setup = Setup(problem, settings, seed, _shared(problem, settings, names, seed), tuned or {})
    states: dict[str, tuple[Any, float]] = {}
    records = []
    for name in names:
        try:
            records += _run_method(setup, name, choice_of(name), states)
        except (ValueError, MemoryError, DivergedError) as error:
            records.append({"method": name, "seed": seed, "task": None, "reason": f"{type(error).__name__}: {error}"})
    return records


def _shared(problem: Problem, settings: MethodsSettings, names: Sequence[str], seed: int) -> Shared:
    budget = budget_of(problem, settings, Choice(), seed)
    warm, warm_seconds = _timed(lambda: warm_up(problem.adapter, problem.train, budget))
    wanted = next((name for name in names if name.startswith(FROM_LIBRARY)), None)
    if wanted is None:
        return Shared(warm, warm_seconds)
    library_budget = budget_of(problem, settings, choice_of(wanted), seed)
    library, library_seconds = _timed(lambda: train_library(problem.adapter, problem.train, library_budget))
    return Shared(warm, warm_seconds, library, library_seconds)


def _run_method(setup: Setup, name: str, choice: Choice, states: dict[str, tuple[Any, float]]) -> list[Record]:
    problem, seed, shared = setup.problem, setup.seed, setup.shared
    assert shared is not None
    method = method_of(setup, name, choice)
    source = SAME_STATE.get(name, name)
    if source not in states:
        state, seconds = _timed(lambda: method.meta_train(problem.train))
        if name.startswith(FROM_LIBRARY):
            seconds += shared.library_seconds
        elif method.budget.warm_start is not None and state.meta_steps:
            seconds += 0.0 if name in ("union-train", "taskwise-peft") else shared.warm_seconds
        states[source] = state, seconds
    state, meta_seconds = states[source]
    records = []
    for task in problem.test:
        assert task.test is not None
        test = task.test
        posterior, seconds = _timed(partial(method.adapt, state, task, seed=seed))
        records.append(
            {
                "method": name,
                "seed": seed,
                "task": task.name,
                **scores(posterior.predict(test), test, task),
                "meta_seconds": round(meta_seconds, 3),
                "adapt_seconds": round(seconds, 3),
            }
        )
    return records


def budget_of(problem: Problem, settings: MethodsSettings, choice: Choice, seed: int, **options: Any) -> Budget:
    """Return the budget that all methods have, at a method's learning rates."""
    values: dict[str, Any] = {
        "warm_up": settings.warm_up,
        "visits": settings.visits,
        "meta_learning_rate": choice.meta_learning_rate,
        "steps": settings.steps,
        "learning_rate": choice.learning_rate,
        "batch_size": settings.batch_size,
        "draws": settings.draws,
        "heads": problem.heads,
        "seed": seed,
    }
    return Budget(**{**values, **options})


def method_of(setup: Setup, name: str, choice: Choice, **budget: Any) -> Baseline[Any]:
    """Set up a method of the registry with what was chosen for it."""
    problem, settings, seed, shared, tuned = setup
    changes = tuned.get(group_of(name), {})
    factory: Any = BASELINES[name]
    if choice.warm_share is not None:  # a fraction that was tuned for this method, so joint training is not shared
        total = settings.warm_up + settings.visits
        visits = max(total - round(choice.warm_share * total), min(LEAST_VISITS, settings.visits))
        budget = {"warm_up": total - visits, "visits": visits, **budget}
    elif shared is not None:
        budget = {"warm_start": shared.warm_start, **budget}
    options = dict(choice.options)
    if shared is not None and shared.library is not None and name.startswith(FROM_LIBRARY) and not changes:
        options["library"] = shared.library
    if choice.lift:
        settings_of = getattr(factory, "keywords", {}).get("settings", LiFTSettings())
        options["settings"] = replace(settings_of, **choice.lift)
    method: Baseline[Any] = factory(problem.adapter, budget_of(problem, settings, choice, seed, **budget), **options)
    return with_changes(method, changes) if changes else method


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ costs


def cost_ratios(
    experiment: Experiment, settings: MethodsSettings, names: Sequence[str], log: Callable[[str], None] = print
) -> dict[str, dict[str, float | None]]:
    """Measure costs over Union Train's: seconds and peak bytes of one task's visit, and peak bytes of adaptation."""
    problem = experiment.problem(replace(settings, num_test=1, num_train=4), 0)
    small = replace(settings, draws=2, steps=4)
    plain = _cost(problem, small, "union-train")
    ratios: dict[str, dict[str, float | None]] = {}
    for number, name in enumerate(names):
        if number % 6 == 5:  # in turn with the others, against drifts of the machine
            again = _cost(problem, small, "union-train")
            plain = {key: min(value, again[key]) for key, value in plain.items()}
        try:
            cost = _cost(problem, small, name)
        except (ValueError, MemoryError, DivergedError) as error:
            log(f"costs of {name}: {error}")
            continue
        ratios[name] = {f"{key}_rel": _ratio(cost[key], plain[key]) for key in plain}
    return ratios


def _ratio(cost: float, plain: float) -> float | None:
    return None if math.isnan(cost / plain) else round(cost / plain, 3)


def _cost(problem: Problem, settings: MethodsSettings, name: str) -> dict[str, float]:
    """Measure seconds and bytes; NaN where a method has no meta-training."""
    choice, device, visits = choice_of(name), problem.adapter.initial.device, settings.cost_visits
    if name.startswith("fixed-theta"):
        choice = choice._replace(options={**choice.options, "chain_steps": 20})
    setup = Setup(problem, settings, 0, Shared(problem.adapter.initial))

    def prepared(visits: int) -> Baseline[Any]:
        # Union Train's own steps are its warm-up; nobody else's are measured with it.
        return method_of(setup, name, choice, warm_up=0, visits=visits)

    def trained(visits: int) -> Any:
        return prepared(visits).meta_train(problem.train)

    costs: dict[str, float] = {"seconds_per_visit": math.nan, "peak_bytes": math.nan}
    short, few = _timed(partial(trained, visits))
    if short.meta_steps:
        # The difference of two runs, so that setting up is left out.
        long, many = _timed(partial(trained, 3 * visits))
        more = (long.meta_steps - short.meta_steps) * getattr(prepared(visits), "tasks_per_step", 1)
        costs["seconds_per_visit"] = max(many - few, 0.0) / more if more else math.nan
        costs["peak_bytes"] = float(peak_bytes(partial(trained, visits if name.startswith("lift") else 1), device))
    method = prepared(visits)
    costs["adapt_peak_bytes"] = float(peak_bytes(partial(method.adapt, short, problem.test[0], seed=0), device))
    return costs


# ------------------------------------------------------------------------------------------------ choosing


def tune(
    experiment: Experiment = DIGITS,
    settings: MethodsSettings | None = None,
    groups: Sequence[str] | None = None,
    log: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Choose each method's settings on the development tasks of another family, by the one tuner.

    Every method has the same number of trials (``settings.trials``), drawn from its own space around what was chosen
    before, and the same score: the log predictive density of rows of the development tasks.

    Returns:
        By method what is changed: fields of its budget, or its own.
    """
    settings = settings or MethodsSettings()
    problem = experiment.problem(settings, TUNING_SEED, "dev")
    chosen: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(group_of(name) for name in groups or GROUPS):
        method = method_of(Setup(problem, settings, 0), group, choice_of(group))
        _, tuning = tune_method(method, problem.train, held_out=problem.test, trials=settings.trials)
        chosen[group] = {**tuning.meta, **tuning.adapt}
        best = min(trial.loss for trial in tuning.trials if trial.rung == tuning.trials[-1].rung)
        log(f"{group}: {tuning.chosen} ({tuning.measure} {best:.3f})\n{tuning.table()}")
    return chosen


# ------------------------------------------------------------------------------------------------ showing

HEADER = ("method", "accuracy", "NLL", "ECE", "meta s", "adapt s", "visit x", "peak x", "adapt x", "adapt peak x")


def table(records: Sequence[Record]) -> str:
    """Format one row a method: means over seeds of means over tasks, with the standard error over seeds."""
    by_method = _by_method(records)
    plain = _over_seeds(by_method["union-train"], "adapt_seconds")[0] if "union-train" in by_method else math.nan
    rows = [_row(name, of_method, plain) for name, of_method in by_method.items()]
    refused = {r["method"]: r["reason"] for r in records if "reason" in r}
    chance = [r["chance"] for r in records if "chance" in r]
    notes = [f"{name}: not run: {reason}" for name, reason in refused.items()]
    if chance:
        notes.insert(0, f"commonest class: {100 * statistics.fmean(chance):.1f} % of the test rows")
    notes.append(
        "meta s: a whole meta-training; adapt s: one task; x: of a visit and of adaptation, over Union Train's"
    )
    return "\n".join([format_table(HEADER, rows), *notes])


def _by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    by_method: dict[str, list[Record]] = {}
    for record in records:
        if "accuracy" in record:
            by_method.setdefault(record["method"], []).append(record)
    return by_method


def _row(name: str, records: Sequence[Record], plain: float) -> list[str]:
    mean = {key: _over_seeds(records, key) for key in ("accuracy", "nll", "ece", "meta_seconds", "adapt_seconds")}
    first = records[0]
    ratios = [
        first.get("seconds_per_visit_rel"),
        first.get("peak_bytes_rel"),
        None if math.isnan(plain) else mean["adapt_seconds"][0] / plain,
        first.get("adapt_peak_bytes_rel"),
    ]
    shown = [f"{100 * mean['accuracy'][0]:.1f} ± {100 * mean['accuracy'][1]:.1f}"]
    shown += [f"{mean[key][0]:.3f} ± {mean[key][1]:.3f}" for key in ("nll", "ece")]
    seconds = [f"{mean['meta_seconds'][0]:.1f}", f"{mean['adapt_seconds'][0]:.2f}"]
    return [name, *shown, *seconds, *("-" if x is None else f"{x:.2f}" for x in ratios)]


def _over_seeds(records: Sequence[Record], key: str) -> tuple[float, float]:
    """Return the mean over seeds, and its standard error (0 of one seed)."""
    seeds = sorted({r["seed"] for r in records})
    means = [statistics.fmean(r[key] for r in records if r["seed"] == seed) for seed in seeds]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return statistics.fmean(means), error


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot accuracy, NLL and the cost of a visit, a row a method, best NLL on top."""
    from pyro_lift.support.figures import COLOURS, log_axis, new_figure, save_figure

    by_method = _by_method(records)
    order = sorted(by_method, key=lambda name: -_over_seeds(by_method[name], "nll")[0])
    figure, axes = new_figure(1, 3, width=10.0, height=1.2 + 0.24 * len(order), sharey=True)
    for axis, key, label in zip(axes, ("accuracy", "nll", "seconds"), LABELS, strict=True):
        for place, name in enumerate(order):
            colour = COLOURS[0] if name.startswith("lift") else COLOURS[1] if name in PLAIN else COLOURS[7]
            if key == "seconds":
                value, error = by_method[name][0].get("seconds_per_visit_rel"), 0.0
            else:
                value, error = _over_seeds(by_method[name], key)
            if value is not None:
                axis.errorbar(value, place, xerr=error, fmt="o", markersize=4, color=colour)
        axis.set_xlabel(label)
        axis.grid(axis="y", linewidth=0.3)
    log_axis(axes[2])
    axes[0].set_yticks(range(len(order)), order, fontsize=8)
    save_figure(figure, path)


def command(
    out: Path,
    experiment: Experiment,
    settings: MethodsSettings,
    methods: Sequence[str] | None = None,
    *,
    choose: bool = False,
    tuned: Path | None = None,
) -> None:
    """Run ``pyro-lift bench methods``: print the table and write records and figure, or tune and print.

    Args:
        out: folder for ``methods.json`` and ``methods.png``, or for ``tuned.json``.
        experiment: where tasks come from.
        settings: sizes.
        methods: names; None takes all.
        choose: whether to choose the settings again, print and write them, instead.
        tuned: file that was written so, whose settings are taken.

    Raises:
        DamagedError: a file of settings that is none.
    """
    if choose:
        for name in methods or ():
            check_choice("method", name, BASELINES)
        write_json(out / "tuned.json", tune(experiment, settings, methods))
        print(f"settings written: {out / 'tuned.json'}")
        return
    records = run(
        experiment, settings, methods, path=out / "methods.json", tuned=None if tuned is None else read_json(tuned)
    )
    print(experiment.name)
    print(table(records))
    plot(records, out / "methods.png")
    print(f"records and figure written: {out / 'methods.json'}, {out / 'methods.png'}")


LABELS = ("accuracy", "NLL in nats", "seconds a visit, over Union Train's")
PLAIN = ("no-meta-train", "union-train")
