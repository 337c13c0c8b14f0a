"""``pyro-lift bench methods``: every method of the paper's tables on the same tasks, with the same budget.

All get the same backbone, initial adapter, tasks, number of minibatches in meta-training, adaptation steps and number
of networks that a prediction averages over. Joint training, which every meta-learner begins with, and the library of
LoRAs are made once a seed and shared; their seconds count for each method that uses them.

Costs are measured apart, one process, in turn with Union Train: seconds and peak memory of one task's visit in
meta-training, and of adaptation, as ratios.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.bench.choices import GRIDS, Choice, choice_of
from pyro_lift.bench.memory import peak_bytes
from pyro_lift.bench.problems import DIGITS, Experiment, MethodsSettings, Problem, on_tasks
from pyro_lift.bench.records import format_table, write_records
from pyro_lift.inference.baselines.library import TrainedLibrary, train_library
from pyro_lift.inference.baselines.protocol import Baseline, Budget
from pyro_lift.inference.baselines.union_train import warm_up
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.methods.registry import BASELINES
from pyro_lift.metrics.task import scores
from pyro_lift.settings import LiFTSettings
from pyro_lift.support.options import check_choice

__all__ = [
    "draw",
    "run",
    "table",
    "tune",
]

#: Families that settings are chosen on; the benchmark's own are 0, 1, 2, ...
TUNING_SEED = 1000


#: What joint training leaves of a budget, however small: two thirds are draws, of which a mixture of five needs five.
LEAST_VISITS = 8
#: Methods that adapt from another's state in another way, so that it need not be learned twice.
SAME_STATE = {"lift-reg-x": "lift", "lift-noise-x": "lift"}
ZOO = ("retriever", "mbc", "fixed-theta")


def run(
    experiment: Experiment = DIGITS,
    settings: MethodsSettings | None = None,
    names: Sequence[str] | None = None,
    *,
    path: Path | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """The records of every method, seed and task; written to ``path`` as seeds finish.

    Args:
        experiment: where tasks come from.
        settings: sizes.
        names: keys of :data:`BASELINES`; None takes all.
        path: of the JSON file.
        say: where progress goes.

    Raises:
        ValueError: an unknown method.
    """
    settings, names = settings or MethodsSettings(), list(names or BASELINES)
    for name in names:
        check_choice("method", name, BASELINES)
    costs = cost_ratios(experiment, settings, names, say)
    records: list[dict[str, Any]] = []
    for found in _each_seed(experiment, settings, names):
        records += [{**record, **costs.get(record["method"], {})} for record in found]
        say(f"seed {found[0]['seed']}: {len({r['method'] for r in found})} methods judged" if found else "nothing")
        if path is not None:
            write_records(records, path)
    return records


def _each_seed(
    experiment: Experiment, settings: MethodsSettings, names: Sequence[str]
) -> Iterator[list[dict[str, Any]]]:
    seeds = range(settings.seeds)
    if settings.workers == 1 or settings.seeds == 1:
        yield from (run_seed(experiment, settings, names, seed) for seed in seeds)
        return
    threads = max((os.cpu_count() or 1) // settings.workers, 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(settings.workers, context, torch.set_num_threads, (threads,)) as pool:
        waiting = [pool.submit(run_seed, experiment, settings, names, seed) for seed in seeds]
        yield from (future.result() for future in waiting)


# ------------------------------------------------------------------------------------------------ one seed


class Shared(NamedTuple):
    """What the methods of one seed have in common, and the seconds it took."""

    warm_start: Tensor
    warm_seconds: float
    zoo: TrainedLibrary | None
    zoo_seconds: float


def run_seed(
    experiment: Experiment, settings: MethodsSettings, names: Sequence[str], seed: int, part: str = "test"
) -> list[dict[str, Any]]:
    """All methods on one seed's problem."""
    problem = experiment.problem(settings, seed, part)
    shared = _shared(problem, settings, names, seed)
    states: dict[str, tuple[Any, float]] = {}
    records = []
    for name in names:
        try:
            records += _run_method(problem, settings, name, choice_of(name), seed, shared, states)
        except (ValueError, MemoryError, DivergedError) as error:
            records.append({"method": name, "seed": seed, "task": None, "reason": f"{type(error).__name__}: {error}"})
    return records


def _shared(problem: Problem, settings: MethodsSettings, names: Sequence[str], seed: int) -> Shared:
    budget = budget_of(problem, settings, Choice(), seed)
    warm, warm_seconds = _timed(lambda: warm_up(problem.adapter, problem.train, budget))
    wanted = next((name for name in names if name.startswith(ZOO)), None)
    if wanted is None:
        return Shared(warm, warm_seconds, None, 0.0)
    zoo_budget = budget_of(problem, settings, choice_of(wanted), seed)
    zoo, zoo_seconds = _timed(lambda: train_library(problem.adapter, problem.train, zoo_budget))
    return Shared(warm, warm_seconds, zoo, zoo_seconds)


def _run_method(
    problem: Problem,
    settings: MethodsSettings,
    name: str,
    choice: Choice,
    seed: int,
    shared: Shared,
    states: dict[str, tuple[Any, float]],
) -> list[dict[str, Any]]:
    method = method_of(problem, settings, name, choice, seed, shared)
    source = SAME_STATE.get(name, name)
    if source not in states:
        state, seconds = _timed(lambda: method.meta_train(problem.train))
        if name.startswith(ZOO):
            seconds += shared.zoo_seconds
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
    """The budget that all methods have, at a method's learning rates."""
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


def method_of(
    problem: Problem,
    settings: MethodsSettings,
    name: str,
    choice: Choice,
    seed: int,
    shared: Shared | None = None,
    **budget: Any,
) -> Baseline:
    """A method of the registry with what was chosen for it."""
    factory: Any = BASELINES[name]
    if choice.warm_share is not None:  # a joint training of its own
        total = settings.warm_up + settings.visits
        visits = max(total - round(choice.warm_share * total), min(LEAST_VISITS, settings.visits))
        budget = {"warm_up": total - visits, "visits": visits, **budget}
    elif shared is not None:
        budget = {"warm_start": shared.warm_start, **budget}
    options = dict(choice.options)
    if shared is not None and shared.zoo is not None and name.startswith(ZOO):
        options["zoo"] = shared.zoo
    if choice.lift:
        settings_of = getattr(factory, "keywords", {}).get("settings", LiFTSettings())
        options["settings"] = replace(settings_of, **choice.lift)
    method: Baseline = factory(problem.adapter, budget_of(problem, settings, choice, seed, **budget), **options)
    return method


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
    experiment: Experiment, settings: MethodsSettings, names: Sequence[str], say: Callable[[str], None] = print
) -> dict[str, dict[str, float | None]]:
    """Of each method over Union Train: seconds and peak bytes of one task's visit, and peak bytes of adaptation."""
    problem = experiment.problem(replace(settings, num_test=1, num_train=4), 0)
    small = replace(settings, draws=2, steps=4)
    plain = _cost(problem, small, "union-train")
    ratios: dict[str, dict[str, float | None]] = {}
    for number, name in enumerate(names):
        if number % 6 == 5:  # in turn with the others, against drifts of the machine
            again = _cost(problem, small, "union-train")
            plain = {key: min(value, again[key]) for key, value in plain.items()}
        try:
            own = _cost(problem, small, name)
        except (ValueError, MemoryError, DivergedError) as error:
            say(f"costs of {name}: {error}")
            continue
        ratios[name] = {f"{key}_rel": _ratio(own[key], plain[key]) for key in plain}
    return ratios


def _ratio(own: float, plain: float) -> float | None:
    return None if math.isnan(own / plain) else round(own / plain, 3)


def _cost(problem: Problem, settings: MethodsSettings, name: str) -> dict[str, float]:
    """Seconds and bytes; NaN where a method has no meta-training."""
    choice, device, visits = choice_of(name), problem.adapter.initial.device, settings.cost_visits
    if name.startswith("fixed-theta"):
        choice = choice._replace(options={**choice.options, "chain_steps": 20})
    start = Shared(problem.adapter.initial, 0.0, None, 0.0)

    def prepared(visits: int) -> Baseline:
        # Union Train's own steps are its warm-up; nobody else's are measured with it.
        return method_of(problem, settings, name, choice, 0, start, warm_up=0, visits=visits)

    def trained(visits: int) -> Any:
        return prepared(visits).meta_train(problem.train)

    found: dict[str, float] = {"seconds_per_visit": math.nan, "peak_bytes": math.nan}
    short, few = _timed(partial(trained, visits))
    if short.meta_steps:
        # The difference of two runs, so that setting up is left out.
        long, many = _timed(partial(trained, 3 * visits))
        more = (long.meta_steps - short.meta_steps) * getattr(prepared(visits), "tasks_per_step", 1)
        found["seconds_per_visit"] = max(many - few, 0.0) / more if more else math.nan
        found["peak_bytes"] = float(peak_bytes(partial(trained, visits if name.startswith("lift") else 1), device))
    method = prepared(visits)
    found["adapt_peak_bytes"] = float(peak_bytes(partial(method.adapt, short, problem.test[0], seed=0), device))
    return found


# ------------------------------------------------------------------------------------------------ choosing


def tune(
    experiment: Experiment = DIGITS,
    settings: MethodsSettings | None = None,
    groups: Sequence[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Choice]:
    """The setting of each group's grid with the lowest mean NLL on the development tasks of another family.

    Settings that differ in the adaptation rate alone share one meta-training.
    """
    settings = replace(settings or MethodsSettings(), num_test=2)
    problem = experiment.problem(settings, TUNING_SEED, "dev")
    warm, _ = _timed(lambda: warm_up(problem.adapter, problem.train, budget_of(problem, settings, Choice(), 0)))
    zoos: dict[float, TrainedLibrary] = {}
    chosen = {}
    for group in groups or list(GRIDS):
        states: dict[str, Any] = {}
        losses = [_judged(problem, settings, group, choice, warm, zoos, states) for choice in GRIDS[group]]
        best = min(range(len(losses)), key=losses.__getitem__)
        chosen[group] = GRIDS[group][best]
        say(f"    {group!r}: {chosen[group]!r},  # {losses[best]:.3f} of {', '.join(f'{x:.3f}' for x in losses)}")
    return chosen


def _judged(
    problem: Problem,
    settings: MethodsSettings,
    group: str,
    choice: Choice,
    warm: Tensor,
    zoos: dict[float, TrainedLibrary],
    states: dict[str, Any],
) -> float:
    zoo = None
    if group.startswith(ZOO):
        rate = choice.meta_learning_rate
        if rate not in zoos:
            zoos[rate] = train_library(problem.adapter, problem.train, budget_of(problem, settings, choice, 0))
        zoo = zoos[rate]
    method = method_of(problem, settings, group, choice, 0, Shared(warm, 0.0, zoo, 0.0))
    key = repr(choice._replace(learning_rate=0.0))
    try:
        if key not in states:
            states[key] = method.meta_train(problem.train)
        losses = []
        for task in problem.test:
            assert task.test is not None
            losses.append(scores(method.adapt(states[key], task).predict(task.test), task.test, task)["nll"])
    except DivergedError:
        return math.inf
    return statistics.fmean(losses)


# ------------------------------------------------------------------------------------------------ showing

HEADER = ("method", "accuracy", "NLL", "ECE", "meta s", "adapt s", "visit x", "peak x", "adapt x", "adapt peak x")


def table(records: Sequence[Mapping[str, Any]]) -> str:
    """One row a method: means over seeds of means over tasks, with the standard error over seeds."""
    found = _by_method(records)
    plain = _over_seeds(found["union-train"], "adapt_seconds")[0] if "union-train" in found else math.nan
    rows = [_row(name, mine, plain) for name, mine in found.items()]
    refused = {r["method"]: r["reason"] for r in records if "reason" in r}
    chance = [r["chance"] for r in records if "chance" in r]
    notes = [f"{name}: not run: {reason}" for name, reason in refused.items()]
    if chance:
        notes.insert(0, f"commonest class: {100 * statistics.fmean(chance):.1f} % of the test rows")
    notes.append(
        "meta s: a whole meta-training; adapt s: one task; x: of a visit and of adaptation, over Union Train's"
    )
    return "\n".join([format_table(HEADER, rows), *notes])


def _by_method(records: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    found: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        if "accuracy" in record:
            found.setdefault(record["method"], []).append(record)
    return found


def _row(name: str, records: Sequence[Mapping[str, Any]], plain: float) -> list[str]:
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


def _over_seeds(records: Sequence[Mapping[str, Any]], key: str) -> tuple[float, float]:
    """Mean over seeds, and its standard error (0 of one seed)."""
    seeds = sorted({r["seed"] for r in records})
    means = [statistics.fmean(r[key] for r in records if r["seed"] == seed) for seed in seeds]
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else 0.0
    return statistics.fmean(means), error


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy, NLL and the cost of a visit, a row a method, best NLL on top."""
    from pyro_lift.bench.figures import COLOURS, new_figure, save_figure

    found = _by_method(records)
    order = sorted(found, key=lambda name: -_over_seeds(found[name], "nll")[0])
    figure, axes = new_figure(1, 3, width=10.0, height=1.2 + 0.24 * len(order), sharey=True)
    for axis, key, label in zip(axes, ("accuracy", "nll", "seconds"), LABELS, strict=True):
        for place, name in enumerate(order):
            colour = COLOURS[0] if name.startswith("lift") else COLOURS[1] if name in PLAIN else COLOURS[7]
            if key == "seconds":
                value, error = found[name][0].get("seconds_per_visit_rel"), 0.0
            else:
                value, error = _over_seeds(found[name], key)
            if value is not None:
                axis.errorbar(value, place, xerr=error, fmt="o", markersize=4, color=colour)
        axis.set_xlabel(label)
        axis.grid(axis="y", linewidth=0.3)
    axes[2].set_xscale("log")
    axes[0].set_yticks(range(len(order)), order, fontsize=8)
    save_figure(figure, path)


def command(
    out: Path,
    family: str,
    tasks: str | None,
    split: str | None,
    root: str | None,
    backbone: str | None,
    kind: str | None,
    methods: str | None,
    seeds: int | None,
    workers: int | None,
    choose: bool,
    smoke: bool,
    device: str,
) -> None:
    """What the command line's ``bench methods`` does."""
    check_choice("family", family, ["digits"])
    experiment = DIGITS if tasks is None else on_tasks(tasks, split, root, backbone, kind)
    settings = MethodsSettings.smoke(device) if smoke else MethodsSettings(device=device)
    settings = replace(
        settings,
        seeds=settings.seeds if seeds is None else seeds,
        workers=settings.workers if workers is None else workers,
    )
    names = None if methods is None else [name.strip() for name in methods.split(",")]
    if choose:
        tune(experiment, settings, names)
        return
    records = run(experiment, settings, names, path=out / "methods.json")
    print(experiment.name)
    print(table(records))
    draw(records, out / "methods.png")
    print(f"records and figure written: {out / 'methods.json'}, {out / 'methods.png'}")


LABELS = ("accuracy", "NLL in nats", "seconds a visit, over Union Train's")
PLAIN = ("no-meta-train", "union-train")
